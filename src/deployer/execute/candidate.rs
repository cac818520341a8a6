//! A rollout that overlaps: the new version is first started beside the old one, as `NAME-next.service` on a spare port,
//! and verified there; then requests move to it, and the real unit can be restarted with nobody waiting. Several services
//! go through every phase together. Nothing here is remembered: what an interruption leaves (a candidate, a route to it)
//! is seen by the next pass and undone or finished by it.

use super::route::Moved;
use super::watch::{NotUp, SETTLE, Watched, watch};
use super::{EVERYBODY_WAITS, Round, Situation, with_goal};
use crate::clock;
use crate::deployer::caddy::{self, CaddyState};
use crate::deployer::listeners::{self, ESTABLISHED, Socket};
use crate::deployer::outcome::Outcome;
use crate::deployer::plan::{self, Goal, Step};
use crate::deployer::ports;
use crate::deployer::root::Root;
use crate::deployer::state::RouteStatus;
use crate::deployer::unit;
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::files::if_there;
use crate::log;
use crate::manifest::Service;
use crate::manifest::model::DEFAULT_DRAIN_SEC;
use crate::names::ServiceName;
use crate::random;
use crate::systemd::{self, Began, Restarted};
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::time::{Duration, Instant};

/// Spare ports come from below the kernel's range for outgoing connections (ip_local_port_range begins at
/// 32768), so that none of those can take one between our look and the service's start.
const SPARE_PORTS: std::ops::Range<u16> = 20_000..32_000;

/// How often open connections are counted while an instance drains.
const COUNT_EVERY: Duration = Duration::from_millis(50);

/// The least time an instance drains: Caddy has taken the new route, but a request may be between its old
/// route and the connection, and an HTTP/2 client has a second to learn that its connection ends.
const LEAST_DRAIN: Duration = Duration::from_secs(1);

/// The same where the port is in a file: a request may have read the file and not be connected yet.
const LEAST_DRAIN_BY_FILES: Duration = Duration::from_millis(300);

/// How long Caddy keeps an idle connection for another request, and the time of one look.
const IDLE_BY_FILES: Duration = Duration::from_millis(1300);

/// How long the old route may still serve a client that was connected before the change and sends its first
/// request after it, as browsers do that connect ahead: Go's HTTP server ends such connections after 5 s.
const SILENT_CLIENTS: Duration = Duration::from_millis(5500);

struct Candidate<'a> {
    name: &'a ServiceName,
    goal: &'a Goal,
    /// The entry as it is run, and where.
    service: Service,
    port: u16,
    text: String,
}

/// The candidates that a round is to have, each on a port of its own.
fn candidates<'a>(round: &Round<'a>) -> Result<Vec<Candidate<'a>>> {
    let ports = round.at.desired.iter().filter_map(|s| s.port());
    let mut taken: BTreeSet<u16> = ports.collect();
    let mut candidates = Vec::new();
    for (name, goal) in with_goal(round.plan, |step| matches!(step, Step::Overlap(_))) {
        let port = spare_port(&mut taken)?;
        let on_port = goal.service.on_port(port);
        if let Some((service, text)) = on_port.zip(unit::render_next(&goal.service, &goal.path, port)) {
            candidates.push(Candidate { name, goal, service, port, text });
        }
    }
    Ok(candidates)
}

/// Starts candidates and verifies them.
pub(super) fn start(round: &Round) -> Outcome {
    Outcome::of(|done| {
        let mut candidates = candidates(round)?;
        let root = round.at.root;
        let mut batch = Batch::default();
        for Candidate { name, goal, port, text, .. } in &candidates {
            log::notice(format!(
                "{name}: verifying {} beside the running version, on port {port}",
                goal.path
            ));
            batch.write(&root.next_unit(name), text.as_bytes(), 0o644);
        }
        let mut failed = batch.finish();
        candidates.retain(|c| match failed.remove(&root.next_unit(c.name)) {
            None => true,
            Some(e) => {
                done.fail_on_host(c.name, c.goal, &Error::from(e));
                false
            }
        });
        if candidates.is_empty() {
            return Ok(());
        }
        done.changed = true;
        systemd::daemon_reload()?;
        let units: Vec<String> = candidates.iter().map(|c| c.name.next_unit()).collect();
        systemd::reset_failed(&units)?;
        let begun = clock::journal_now();
        let Restarted { complaint, busy } = systemd::restart(&units, EVERYBODY_WAITS)?;
        let watched = candidates.iter().map(|c| Watched {
            name: c.name,
            unit: c.name.next_unit(),
            service: &c.service,
            was_up: false,
            settle: SETTLE,
        });
        let watched: Vec<Watched> = watched.filter(|w| !busy.contains(&w.unit)).collect();
        let outcomes = watch(root, &watched, &mut |_| {})?;
        let mut failed = Vec::new();
        for Candidate { name, goal, service, .. } in &candidates {
            let unit = name.next_unit();
            match (outcomes.get(*name), &service.http) {
                (Some(Ok(up)), Some(http)) => {
                    let seconds = up.after.as_secs_f64();
                    log::info(format!("{name}: verified beside the running version after {seconds:.1} s"));
                    done.candidates.insert((*name).clone(), (http.clone(), goal.inputs()));
                    continue;
                }
                (Some(Err(NotUp::Host(why))), _) => done.fail_on_host(name, goal, why),
                (Some(Err(NotUp::Release(why))), _) => {
                    let not_begun = systemd::could_not_start(complaint.as_deref(), &unit);
                    let journal = systemd::journal(&unit, &Began::At(begun));
                    done.reject(name, goal, not_begun.as_ref().unwrap_or(why), journal);
                }
                (None | Some(Ok(_)), _) => {
                    let why = format!("systemd has not started {unit} yet; see 'systemctl list-jobs'");
                    done.fail_on_host(name, goal, &why);
                }
            }
            failed.push(*name);
        }
        // Nobody was led to these yet.
        remove_units(root, &failed)
    })
}

/// Leads requests to the candidates of this round that are well, and lets the versions before them end what they have.
pub(super) fn switch(round: &Round) -> Outcome {
    Outcome::of(|done| {
        let these = with_goal(round.plan, |step| matches!(step, Step::Overlap(_)));
        let well = these.filter_map(|(name, _)| Some((name, &round.so_far.candidates.get(name)?.0)));
        let well = well.collect::<BTreeMap<_, _>>();
        if well.is_empty() {
            return Ok(());
        }
        let (led, caddy) = round.at.lead(&well);
        let moved = match led {
            Ok(moved) => moved,
            Err(why) => {
                log::error(format!("route: {why}; the new versions take over by a plain restart"));
                return Ok(());
            }
        };
        done.led.extend(well.keys().map(|name| (*name).clone()));
        let old = well.keys().filter_map(|name| {
            let before = &round.at.persisted.applied.get(*name)?.service;
            Some((*name, before.port()?, before.drain_sec()))
        });
        let old: Vec<(&ServiceName, u16, u32)> = old.collect();
        drain_ports(moved, &old, &caddy)
    })
}

/// Leads requests back to versions that are still as they came up, and removes the candidates that an earlier pass left
/// beside them; whether there were any.
pub(in crate::deployer) fn undo_abandoned(at: Situation) -> Result<bool> {
    let names = plan::abandoned(at.observed, at.persisted);
    if names.is_empty() {
        return Ok(false);
    }
    for name in &names {
        log::notice(format!(
            "{name}: an earlier pass ended while two versions ran; going back to the verified one"
        ));
    }
    let mut left: Vec<&ServiceName> = names.iter().collect();
    let (led, caddy) = at.lead(&BTreeMap::new());
    let moved = match led {
        Ok(moved) => moved,
        Err(why) => {
            log::warning(format!("route: {why}"));
            left = led_past(at.root, left, &caddy)?;
            Moved::ByChange
        }
    };
    drain_units(at, moved, &left, &caddy)?;
    remove_units(at.root, &left)?;
    Ok(true)
}

/// Finds out which candidates leave: those that nobody is led to any more.
pub(super) fn leave(round: &Round) -> Outcome {
    Outcome::of(|done| {
        let plan = round.plan;
        let mut leaving: Vec<&ServiceName> = plan.candidates.iter().collect();
        if round.route_is_pending() && !leaving.is_empty() {
            // One of a service that is stopped on purpose, or gone, has no visitors to wait for.
            let serves = |name: &&ServiceName| {
                plan.services.iter().any(|p| p.name == **name && !p.paused && p.goal.is_some())
            };
            let (serving, idle): (Vec<_>, Vec<_>) = leaving.into_iter().partition(serves);
            leaving = led_past(round.at.root, serving, &round.caddy_now())?;
            leaving.extend(idle);
        }
        done.changed = !leaving.is_empty();
        done.leaving = leaving.into_iter().cloned().collect();
        Ok(())
    })
}

impl Round<'_> {
    fn route_is_pending(&self) -> bool {
        self.so_far.route.as_ref().is_some_and(|route| route.status == RouteStatus::Pending)
    }

    /// What Caddy has, asked again where it did not take the route.
    fn caddy_now(&self) -> CaddyState {
        match self.route_is_pending() {
            true => caddy::observe(&self.at.settings.caddy_admin),
            false => self.at.observed.caddy.clone(),
        }
    }
}

/// Lets the connections of the candidates that leave end, as long as their services allow.
pub(super) fn drain(round: &Round) -> Outcome {
    let leaving: Vec<&ServiceName> = round.so_far.leaving.iter().collect();
    Outcome::of(|_| match leaving.is_empty() {
        true => Ok(()),
        false => drain_units(round.at, round.at.moved_by(round.route), &leaving, &round.caddy_now()),
    })
}

/// Stops the candidates that leave and removes their units.
pub(super) fn remove(round: &Round) -> Outcome {
    let leaving: Vec<&ServiceName> = round.so_far.leaving.iter().collect();
    Outcome::of(|_| remove_units(round.at.root, &leaving))
}

/// Those of these candidates that nobody can be led to by what Caddy has. The others stay: without
/// them, visitors would get a 502 until Caddy can be told.
fn led_past<'n>(
    root: &Root,
    names: Vec<&'n ServiceName>,
    caddy: &CaddyState,
) -> Result<Vec<&'n ServiceName>> {
    let mut left = Vec::new();
    for name in names {
        match port_of(root, name)? {
            Some(port) if may_lead_to(root, name, port, caddy) => log::warning(format!(
                "{name}: its candidate stays on port {port}, to which requests may still go; the next pass goes on"
            )),
            _ => left.push(name),
        }
    }
    Ok(left)
}

/// Whether visitors of a service may be led to this port, by its number or by the file that Caddy reads.
fn may_lead_to(root: &Root, name: &ServiceName, port: u16, caddy: &CaddyState) -> bool {
    let by_file = ports::in_force(root, name) == Some(port)
        && caddy.may_dial(&ports::dial(&root.ports_in_force(), name));
    by_file || caddy.may_lead_to(port)
}

/// Where a candidate listens, by its unit; None where there is none.
fn port_of(root: &Root, name: &ServiceName) -> Result<Option<u16>> {
    let text = if_there(fs_err::read_to_string(root.next_unit(name)))?;
    Ok(text.and_then(|text| unit::next_port(&text)))
}

fn drain_units(at: Situation, moved: Moved, names: &[&ServiceName], caddy: &CaddyState) -> Result<()> {
    let mut ports = Vec::new();
    for name in names {
        if let Some(port) = port_of(at.root, name)? {
            let good = at.persisted.applied.get(*name);
            ports.push((*name, port, good.map_or(DEFAULT_DRAIN_SEC, |a| a.service.drain_sec())));
        }
    }
    drain_ports(moved, &ports, caddy)
}

fn remove_units(root: &Root, names: &[&ServiceName]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let units: Vec<String> = names.iter().map(|name| name.next_unit()).collect();
    let stopping = systemd::stop(&units, EVERYBODY_WAITS)?;
    for name in names {
        if stopping.contains(&name.next_unit()) {
            log::warning(format!("{name}: the candidate is still stopping; the next pass removes it"));
            continue;
        }
        durable::remove(&root.next_unit(name))?;
        log::info(format!("{name}: the candidate is gone"));
    }
    systemd::daemon_reload()?;
    let gone: Vec<String> = units.into_iter().filter(|unit| !stopping.contains(unit)).collect();
    systemd::reset_failed(&gone)
}

/// A port nobody listens on and nobody was promised.
fn spare_port(taken: &mut BTreeSet<u16>) -> Result<u16> {
    let count = SPARE_PORTS.len() as u32;
    let offset = u32::from(u16::from_ne_bytes(random::bytes())) % count;
    for i in 0..count {
        let port = SPARE_PORTS.start + ((offset + i) % count) as u16;
        if !taken.contains(&port) && nobody_listens(port) {
            taken.insert(port);
            return Ok(port);
        }
    }
    Err(Error::new(format!(
        "no port from {} to {} is free for an overlapping rollout; use rollout \"restart\"",
        SPARE_PORTS.start, SPARE_PORTS.end
    )))
}

/// Whether a service could listen there on whichever addresses it likes.
fn nobody_listens(port: u16) -> bool {
    let free = |any: IpAddr| match TcpListener::bind((any, port)) {
        Ok(_) => true,
        // Any other complaint is one about the protocol: this machine has no IPv6.
        Err(e) => any.is_ipv6() && e.kind() != ErrorKind::AddrInUse,
    };
    free(Ipv4Addr::UNSPECIFIED.into()) && free(Ipv6Addr::UNSPECIFIED.into())
}

/// Waits until no connection to these ports is open, each at most its own time in seconds: while a request has no whole
/// answer its connection is open, and Caddy ends those that have none. The connections to Caddy itself tell whether a
/// client may still come by the old route: Caddy ends what it has from before the change, idle ones at once, and until
/// then nobody can tell old from new, nor where Caddy's ports are not known. If a file was renamed instead, every new
/// request goes by it, whatever connection it comes over.
fn drain_ports(moved: Moved, ports: &[(&ServiceName, u16, u32)], caddy: &CaddyState) -> Result<()> {
    let (front, known) = (caddy.ports(), caddy.is_available());
    let begun = Instant::now();
    let mut open: Vec<&(&ServiceName, u16, u32)> = ports.iter().collect();
    if open.is_empty() {
        return Ok(());
    }
    std::thread::sleep(COUNT_EVERY);
    let clients_of = |peers: &Peers| -> BTreeSet<(u16, String)> {
        let fronts = peers.iter().filter(|(port, _)| front.contains(port));
        fronts.flat_map(|(port, all)| all.iter().map(|p| (*port, p.clone()))).collect()
    };
    let mut clients = clients_of(&established()?);
    loop {
        std::thread::sleep(COUNT_EVERY);
        let peers = established()?;
        clients = clients.intersection(&clients_of(&peers)).cloned().collect();
        let waited = begun.elapsed();
        let (least, idle) = match moved {
            Moved::ByFiles => (LEAST_DRAIN_BY_FILES, IDLE_BY_FILES),
            Moved::ByChange if clients.is_empty() && known => (LEAST_DRAIN, LEAST_DRAIN),
            Moved::ByChange => (SILENT_CLIENTS, LEAST_DRAIN),
        };
        let quiet = waited >= failpoint::shortened(least);
        open.retain(|(name, port, seconds)| {
            let count = peers.get(port).map_or(0, BTreeSet::len);
            let late = waited >= Duration::from_secs((*seconds).into()).max(idle);
            if count > 0 && late {
                log::warning(format!(
                    "{name}: {count} connection(s) to port {port} still open after {seconds} s"
                ));
            }
            (count > 0 || !quiet) && !late
        });
        if open.is_empty() {
            return Ok(());
        }
    }
}

/// Who is connected to each local port.
type Peers = BTreeMap<u16, BTreeSet<String>>;

fn established() -> Result<Peers> {
    let mut peers = Peers::new();
    listeners::each_socket(ESTABLISHED, |socket| add(&mut peers, socket))?;
    Ok(peers)
}

fn add(peers: &mut Peers, socket: Socket) {
    peers.entry(socket.port).or_default().insert(socket.remote);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::config::{Flags, load};
    use crate::deployer::listeners::each_of;
    use crate::deployer::observed::{Observed, Switching};
    use crate::deployer::overrides::Overrides;
    use crate::deployer::persisted::PersistedState;
    use crate::deployer::state::State;
    use crate::manifest::Http;
    use crate::manifest::parse::{self, Mode};
    use crate::names::HostName;
    use serde_json::{Value, json};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    #[test]
    fn only_established_connections_to_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1\n\
            1: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 12 1\n\
            2: 0100007F:D431 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 13 1\n\
            3: 0100007F:1F90 0100007F:D432 06 00000000:00000000 00:00000000 00000000     0        0 0 1\n";
        let mut peers = Peers::new();
        each_of(table.as_bytes(), false, ESTABLISHED, &mut |socket| add(&mut peers, socket)).unwrap();
        assert_eq!(peers[&8080], BTreeSet::from(["0100007F:D431".to_string()]));
    }

    /// A Caddy with one server, which takes what it is told or does not, and answers to that or does not.
    fn caddy_at(path: &Path, takes: bool, answers: bool) {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let mut servers = json!({"srv0": {"listen": [":443"], "routes": []}});
            for mut stream in listener.incoming().map(Result::unwrap) {
                let (mut asked, mut buffer) = (Vec::new(), [0; 4096]);
                let body = loop {
                    let n = stream.read(&mut buffer).unwrap();
                    asked.extend_from_slice(&buffer[..n]);
                    let text = String::from_utf8_lossy(&asked);
                    let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                    let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: "));
                    if body.len() == length.map_or(0, |l| l.parse().unwrap()) {
                        break body.to_string();
                    }
                };
                let told = !asked.starts_with(b"GET ");
                if told && takes {
                    let route: Value = serde_json::from_str(&body).unwrap();
                    servers["srv0"]["routes"] = if route.is_array() { route } else { json!([route]) };
                }
                if !told || answers {
                    write!(stream, "HTTP/1.0 200 OK\r\n\r\n{servers}").unwrap();
                }
            }
        });
    }

    /// Only of a socket that root has made is it known that it is Caddy's.
    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn what_caddy_was_told_is_known_also_when_its_answer_was_lost() {
        let http = Http {
            domain: "a.example.com".into(),
            path: "/".into(),
            internal_port: 20_001u16.into(),
            port_env: None,
            drain_sec: None,
            extra: serde_json::Map::new(),
        };
        for (takes, answers, well) in
            [(true, true, true), (true, false, true), (false, true, false), (false, false, false)]
        {
            let dir = tempfile::tempdir_in("/root").unwrap();
            let path = dir.path().join("admin.sock");
            caddy_at(&path, takes, answers);
            let flags = [("host", "here".to_string()), ("caddyAdmin", format!("unix/{}", path.display()))];
            let settings = load(&Flags::from(flags)).unwrap();
            let root = Root::system(dir.path());
            let name = ServiceName::parse("a").unwrap();
            let persisted = PersistedState {
                state: State::new(HostName::parse("here").unwrap(), Timestamp(0)),
                applied: BTreeMap::new(),
                readable: true,
                interrupted: BTreeSet::new(),
                overrides: Overrides::default(),
                verified: BTreeMap::new(),
                trial: None,
            };
            let mut service = serde_json::json!({"name": "a", "hosts": ["here"],
                "artifact": {"storePath": "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-a"}});
            service["http"] = serde_json::to_value(&http).unwrap();
            let service = parse::service(service, Mode::Strict, None).unwrap();
            let observed = observed(caddy::observe(&settings.caddy_admin));
            assert!(!observed.caddy.may_lead_to(20_001));
            let at = Situation {
                settings: &settings,
                root: &root,
                desired: &[&service],
                observed: &observed,
                persisted: &persisted,
            };
            let (led, caddy) = at.lead(&BTreeMap::from([(&name, &http)]));
            // An answer without an error is believed.
            assert_eq!(led.is_ok(), well || answers, "takes {takes}, answers {answers}: {led:?}");
            assert_eq!(caddy.may_lead_to(20_001), takes, "{caddy:?}");
            // Its candidate goes when nobody is led to it, and only then.
            let text = "# Managed by omni-deploy\n# An understudy on port 20001\n";
            durable::write(&root.next_unit(&name), text.as_bytes(), 0o644).unwrap();
            assert_eq!(unit::next_port(text), Some(20_001));
            let left = led_past(&root, vec![&name], &caddy).unwrap();
            assert_eq!(left.is_empty(), takes);
        }
    }

    fn observed(caddy: CaddyState) -> Observed {
        Observed {
            units: BTreeMap::new(),
            present: BTreeSet::new(),
            roots: BTreeMap::new(),
            secrets: BTreeMap::new(),
            active: BTreeSet::new(),
            ports: BTreeMap::new(),
            kept_out: BTreeSet::new(),
            candidates: BTreeSet::new(),
            foreign_next: BTreeMap::new(),
            caddy,
            switching: Switching::Configuration,
        }
    }

    #[test]
    fn a_spare_port_is_free_and_nobody_elses() {
        let mut taken: BTreeSet<u16> = (SPARE_PORTS.start..SPARE_PORTS.end - 2).collect();
        let port = spare_port(&mut taken).unwrap();
        assert!(port >= SPARE_PORTS.end - 2);
        assert!(taken.contains(&port));
        // A service may listen on all addresses, so one on any address is in its way.
        for address in ["127.0.0.1:0", "127.0.0.2:0", "0.0.0.0:0"] {
            let busy = TcpListener::bind(address).unwrap();
            assert!(!nobody_listens(busy.local_addr().unwrap().port()), "{address}");
        }
    }
}
