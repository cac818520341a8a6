//! Deploys under load: requests come to the host's Caddy on a schedule, whatever happens there, while versions
//! come and go. What is promised is asserted; how long requests took is only told, as a line of JSON on stdout.
//! `OMNI_TEST_LOAD` names the generator (tests/load); with `OMNI_LOAD_FULL` set, ten deploys of each kind are
//! made under 280,000 requests and more, as benches/load.sh does.

use crate::built::LOAD;
use crate::lab::{Background, soon};
use crate::solo::{Solo, solo, web};
use crate::switching;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

pub const OVERLAP: &str = "overlap";
const RESTART: &str = "restart";

/// How much of it.
struct Scale {
    /// At 16 at once, and again at 200.
    deploys: usize,
    /// For each of these.
    requests: u32,
    /// A second.
    rate: u32,
    /// Broken releases of each kind.
    broken: usize,
    /// WebSockets of a neighbour.
    sockets: u32,
}

fn scale() -> Scale {
    if std::env::var_os("OMNI_LOAD_FULL").is_some() {
        Scale { deploys: 5, requests: 140_000, rate: 600, broken: 3, sockets: 200 }
    } else {
        Scale { deploys: 1, requests: 10_000, rate: 400, broken: 1, sockets: 8 }
    }
}

/// The generator, which is also the service.
fn program() -> String {
    LOAD.display().to_string()
}

/// Where what failed is told, one by one.
fn log() -> PathBuf {
    std::env::var_os("OMNI_LOAD_LOG").map_or_else(|| "/dev/stderr".into(), PathBuf::from)
}

fn start(args: &[&str]) -> Background {
    let (log, program) = (log().display().to_string(), program());
    let mut all = vec![log.as_str(), program.as_str()];
    all.extend(args);
    Background::start("exec 2>>\"$1\"; shift; exec \"$@\"", &all)
}

/// A load that is under way.
struct Load(Background);

impl Load {
    fn on(host: &Solo, requests: u32, rate: u32, at_once: u32) -> Self {
        let numbers = [requests, rate, at_once].map(|n| n.to_string());
        let [requests, rate, at_once] = &numbers;
        Load(start(&["load", &format!("{}:80", host.ip), "echo.example.com", requests, rate, at_once, "16"]))
    }

    /// Lets it come to its end; returns and tells its figures.
    fn figures(self, what: &str) -> Value {
        let line = self.0.finish();
        println!("{what}: {line}");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{what}: {e}: '{line}'"))
    }
}

/// Somebody else's WebSockets.
struct Neighbour(Background);

impl Neighbour {
    fn on(host: &Solo) -> Self {
        let address = format!("{}:80", host.ip);
        let sockets = scale().sockets.to_string();
        let mut neighbour = Neighbour(start(&["neighbour", &address, "sockets.example.com", &sockets]));
        soon("WebSockets are open", Duration::from_secs(10), || match neighbour.counts() {
            counts if counts["echoes"].as_u64() > Some(0) => Ok(()),
            counts => Err(counts.to_string()),
        });
        neighbour
    }

    fn counts(&mut self) -> Value {
        let line = self.0.ask();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: '{line}'"))
    }

    /// How often the one that was cut most was, so far.
    fn cuts(&mut self) -> u64 {
        let counts = self.counts();
        assert_eq!(counts["refused"], 0, "{counts}");
        let cuts = counts["cuts"].as_array().expect("a list").iter().filter_map(Value::as_u64);
        cuts.max().expect("there are connections")
    }
}

/// A release of the echo service (tests/load/src/serve.rs has its behaviours; `missing`: no executable).
pub fn release(host: &Solo, version: &str, behaviour: &str) -> String {
    let name = if behaviour == "missing" { "other" } else { "echo" };
    host.sh(&format!(
        "dir=$(mktemp -d)/echo-{version}; mkdir -p $dir/bin
         cp /opt/omni/load $dir/bin/{name}; echo '{version}' >$dir/version; echo '{behaviour}' >$dir/behaviour
         nix-store --add $dir; rm -r $dir"
    ))
}

pub fn echo(name: &str, port: u16, rollout: &str, path: &str) -> Value {
    let mut service = web(name, port, path);
    service["exec"] = json!({"command": "bin/echo serve"});
    service["rollout"] = json!(rollout);
    service
}

/// Puts the program of the echo service on the host.
pub fn put_generator(host: &Solo) {
    fs_err::copy(program(), host.path("/opt/omni/load")).unwrap();
}

/// The host with the echo service and a neighbour that serves WebSockets, both in their first version.
fn host_with(rollout: &str) -> Solo {
    let host = solo();
    assert_eq!(host.sh("cat /proc/sys/net/ipv4/tcp_migrate_req"), "1", "install.sh sets it");
    put_generator(&host);
    let first = release(&host, "first", "");
    host.add(&echo("echo", 8001, rollout, &first));
    host.add(&echo("sockets", 8002, RESTART, &first));
    host.good_pass();
    host.serves("echo", "first");
    host
}

/// Releases that are good, each in its way.
const GOOD: [&str; 4] = ["", "hasty", "slow 2", ""];

/// Deploys good releases one after the other; returns how often the neighbour's WebSockets were cut by each.
fn deploy_good(host: &Solo, round: &str, deploys: usize, neighbour: &mut Neighbour) -> Vec<u64> {
    let mut cuts = vec![];
    for i in 0..deploys {
        let version = format!("{round}-{i}");
        let before = neighbour.cuts();
        host.update("echo", &release(host, &version, GOOD[i % GOOD.len()]));
        let said = host.good_pass();
        host.serves("echo", &version);
        assert!(said.contains("echo: up after"), "{said}");
        cuts.push(neighbour.cuts() - before);
    }
    cuts
}

#[test]
fn overlapping_deploys_lose_no_request_and_cut_no_websocket_where_caddy_reads_ports_from_files() {
    let Scale { deploys, requests, rate, .. } = scale();
    let host = host_with(OVERLAP);
    let by_files = switching::reads_files(&host);
    let mut neighbour = Neighbour::on(&host);
    for at_once in [16, 200] {
        let load = Load::on(&host, requests, rate, at_once);
        let cuts = deploy_good(&host, &format!("overlap-{at_once}"), deploys, &mut neighbour);
        let figures = load.figures(&format!("{deploys} overlap deploys, {at_once} at once"));
        println!(
            "WebSockets of a neighbour, cuts by each of {deploys} overlap deploys, {at_once} at once: {cuts:?}"
        );
        assert_eq!(figures["failed"], 0, "{figures}");
        assert!(figures["versions"].as_array().is_some_and(|v| v.len() > deploys), "{figures}");
        // Without files, there and back; the only other way is a change of the configuration.
        assert!(cuts.iter().all(|c| *c <= if by_files { 0 } else { 2 }), "{cuts:?}");
        if by_files {
            assert_eq!(figures["resent"], json!({}), "{figures}");
        }
    }
    let before = neighbour.cuts();
    host.good_pass();
    assert_eq!(neighbour.cuts(), before, "by a pass with nothing to do");
}

#[test]
fn restarting_deploys_lose_no_get() {
    let Scale { deploys, requests, rate, .. } = scale();
    let host = host_with(RESTART);
    let mut neighbour = Neighbour::on(&host);
    for at_once in [16, 200] {
        let load = Load::on(&host, requests / 4, rate, at_once);
        let cuts = deploy_good(&host, &format!("restart-{at_once}"), deploys, &mut neighbour);
        let figures = load.figures(&format!("{deploys} restart deploys, {at_once} at once"));
        let kinds = figures["kinds"].as_object().expect("an object");
        assert!(!kinds.keys().any(|k| k.starts_with("GET")), "{figures}");
        assert!(cuts.iter().all(|c| *c == 0), "no route changes: {cuts:?}");
    }
}

#[test]
fn broken_releases_that_would_overlap_lose_no_request() {
    let Scale { rate, broken, .. } = scale();
    let host = host_with(OVERLAP);
    let mut neighbour = Neighbour::on(&host);
    let before = neighbour.cuts();
    let unit = host.invocation("echo");
    let load = Load::on(&host, 0, rate, 16);
    let kinds = ["exit", "port 8009", "sick", "crash 2", "missing"];
    for i in 0..broken {
        for behaviour in kinds {
            let version = format!("broken-{}-{i}", behaviour.replace(' ', "-"));
            host.update("echo", &release(&host, &version, behaviour));
            host.passes_with(3);
            host.serves("echo", "first");
        }
    }
    let figures = load.figures(&format!("{broken} broken releases of each of {} kinds", kinds.len()));
    assert_eq!(figures["failed"], 0, "{figures}");
    assert_eq!(figures["versions"], json!(["first"]), "nobody saw a broken one");
    assert_eq!(host.invocation("echo"), unit, "the running version was not touched");
    assert_eq!(neighbour.cuts(), before, "no route changes");
}

#[test]
fn a_release_that_fails_on_its_own_port_alone_loses_no_request() {
    let host = host_with(OVERLAP);
    let load = Load::on(&host, 0, scale().rate, 16);
    // Well as a candidate, it has the requests when it fails in the place of the version before.
    host.update("echo", &release(&host, "picky", "refuses 8001"));
    host.passes_with(3);
    host.serves("echo", "first");
    assert_eq!(host.sh("ls /etc/systemd/system | grep -c -- -next || true"), "0");
    let figures = load.figures("1 broken release that fails in its place alone");
    assert_eq!(figures["failed"], 0, "{figures}");
    assert_eq!(figures["versions"], json!(["first", "picky"]));
}
