//! Seeing and setting up, through the built binary over directory stores. Hosts are reached through scripts in
//! ssh's place, which show what argument vector a host's shell would be given.

mod common;

use common::{DEVELOPER, HOST, KEY, S3Server, SECRET};
use omni_deploy::clock::Timestamp;
use omni_deploy::cmd::tree;
use omni_deploy::deployer::live::LiveState;
use omni_deploy::deployer::state::State;
use omni_deploy::dispatch;
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::names::HostName;
use omni_deploy::runner::{Output, ProcessStatus, Run, Stream};
use omni_deploy::status::judge::{Expected, HostReport, judge};
use omni_deploy::store::dir::DirStore;
use omni_deploy::store::{Condition, Store};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

const BIN: &str = env!("CARGO_BIN_EXE_omni-deploy");
const MANIFEST: &str = include_str!("../fixtures/manifest-v1.json");
const STATE: &str = include_str!("../fixtures/state-v1.json");
const AVA: &str = "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava-1.0";
const OLD: &str = "/nix/store/1c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava-0.9";

/// A home and a store, both empty.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        Machine { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn store_url(&self) -> String {
        format!("file://{}", self.path("store").display())
    }

    fn put(&self, key: &str, bytes: impl AsRef<[u8]>) {
        DirStore::new(&self.path("store")).put(key, bytes.as_ref(), &Condition::Always).unwrap();
    }

    /// Ava on `hosts`, written a minute ago, and what each host reports.
    fn with_ava(hosts: &[&str]) -> Self {
        let machine = Machine::new();
        let manifest = json!({"version": 1, "serial": 7, "generation": now(-60),
            "change": {"action": "update ava", "by": "ann@laptop"},
            "services": [{"name": "ava", "artifact": {"type": "nix-closure", "storePath": AVA}, "hosts": hosts}]});
        machine.put("manifest.json", manifest.to_string());
        for host in hosts {
            machine.put(&format!("hosts/{host}.json"), report(host, "running", AVA).to_string());
        }
        machine
    }

    /// The program on this machine; nothing of the environment's own configuration reaches it.
    fn run(&self, program: &str) -> Run {
        let mut run = Run::new(program)
            .env("HOME", self.path("home"))
            .env("USER", "ann")
            .env("OMNI_DEPLOY_STORE", self.store_url())
            .env("OMNI_DEPLOY_HOST", "laptop")
            .without_env("XDG_CONFIG_HOME")
            .without_env("XDG_STATE_HOME")
            .without_env("JOURNAL_STREAM");
        for key in omni_deploy::config::KEYS.iter().filter(|k| !matches!(k.name, "store" | "host")) {
            run = run.without_env(key.env);
        }
        run.deadline(Duration::from_secs(60))
    }

    fn call(&self, args: &[&str]) -> Output {
        self.run(BIN).args(args).output().unwrap()
    }

    /// What to call in ssh's place, with a host and the words of a command.
    fn ssh(&self, script: &str) -> String {
        let path = self.path("fake-ssh");
        fs_err::write(&path, format!("{script}\n")).unwrap();
        format!("sh {}", path.display())
    }
}

fn now(offset: i64) -> String {
    Timestamp(Timestamp::now().0 + offset).to_string()
}

fn report(host: &str, status: &str, path: &str) -> Value {
    json!({"version": 1, "host": host, "deployer": "0.1.0", "serial": 7, "generation": now(-60),
        "checkedAt": now(-30), "changedAt": now(-30), "manifestError": null, "route": {"status": "none", "reason": null},
        "services": {"ava": {"name": "ava", "storePath": path, "status": status, "since": now(-30),
            "previous": [], "failure": null}}})
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", output.text()))
}

fn exit(output: &Output) -> i32 {
    match output.status {
        ProcessStatus::Exit(code) => code,
        other => panic!("{other}: {}", output.stderr),
    }
}

#[test]
fn a_state_of_version_1_is_still_read_whole() {
    let state = State::parse(STATE.as_bytes()).unwrap();
    let again = serde_json::to_value(&state).unwrap();
    let fixture: Value = serde_json::from_str(STATE).unwrap();
    kept(&fixture, &again);
    assert_eq!(state.exit_code(), omni_deploy::error::Exit::Degraded);
}

#[test]
fn an_answer_of_version_1_is_still_read_whole() {
    let fixture: Value = serde_json::from_str(include_str!("../fixtures/live-v1.json")).unwrap();
    let answer = LiveState::parse(fixture.to_string().as_bytes()).unwrap();
    kept(&fixture, &serde_json::to_value(&answer).unwrap());
    let mut newer = fixture;
    newer["version"] = json!(2);
    assert!(LiveState::parse(newer.to_string().as_bytes()).unwrap_err().contains("version 2"));
}

/// Everything of `old` is in `new`; fields may have come since.
fn kept(old: &Value, new: &Value) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            old.iter()
                .for_each(|(key, value)| kept(value, new.get(key).unwrap_or_else(|| panic!("no {key}"))));
        }
        _ => assert_eq!(old, new),
    }
}

#[test]
fn status_json_keeps_its_form() {
    let manifest = parse::manifest(MANIFEST.as_bytes(), Mode::Tolerant).unwrap();
    let biz = HostName::parse("biz").unwrap();
    let web = HostName::parse("web-1.example.com").unwrap();
    let state = State::parse(STATE.as_bytes()).unwrap();
    let reports = BTreeMap::from([(biz, HostReport::Read(Box::new(state))), (web, HostReport::Missing)]);
    let now = Timestamp::parse("2026-11-22T18:35:00Z").unwrap();
    let here = HostName::parse("laptop").unwrap();
    let expected = Expected { manifest: &manifest, entries: BTreeMap::new(), store: String::new(), here };
    let picture = serde_json::to_value(judge(&expected, &reports, now, |_, _| true)).unwrap();
    let fixture: Value = serde_json::from_str(include_str!("../fixtures/status-v1.json")).unwrap();
    assert_eq!(picture, fixture, "{}", serde_json::to_string_pretty(&picture).unwrap());
}

#[test]
fn status_is_0_when_all_is_well_and_3_with_the_reason_when_something_is_off() {
    let machine = Machine::with_ava(&["biz", "two"]);
    let well = machine.call(&["status"]);
    assert_eq!((exit(&well), well.stderr.as_str()), (0, ""), "{}", well.text());
    assert_eq!(well.text().lines().count(), 3, "{}", well.text());

    let mut refused = report("two", "rejected", OLD);
    refused["services"]["ava"]["failure"] = json!({"reason": "exited with 1\u{1b}[2J", "attempted": AVA,
        "at": now(-30), "journal": ["\u{9b}31mboom"], "inputs": null});
    machine.put("hosts/two.json", refused.to_string());
    let off = machine.call(&["status", "ava"]);
    let text = off.text();
    assert_eq!(exit(&off), 3);
    assert!(text.contains("ava on two: rejected 0c0zzgb-ava-1.0: exited with 1\\u{1b}[2J\n"), "{text}");
    assert!(text.contains("  | \\u{9b}31mboom\n"), "{text}");
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");

    let rows = json_of(&machine.call(&["status", "--json"]));
    assert_eq!((&rows["version"], &rows["serial"]), (&json!(1), &json!(7)));
    let off: Vec<_> = rows["rows"].as_array().unwrap().iter().map(|r| (&r["host"], &r["off"])).collect();
    assert_eq!(off, [(&json!("biz"), &json!(false)), (&json!("two"), &json!(true))]);
    assert_eq!(exit(&machine.call(&["status", "--host", "biz"])), 0);
}

#[test]
fn a_report_that_cannot_be_used_is_a_line_and_not_the_end() {
    let machine = Machine::with_ava(&["biz", "broken", "huge", "liar", "silent"]);
    machine.put("hosts/broken.json", "{\"version\": 1, ");
    machine.put("hosts/huge.json", vec![b' '; (4 << 20) + 1]);
    machine.put("hosts/liar.json", report("biz", "running", AVA).to_string());
    fs_err::remove_file(machine.path("store/hosts/silent.json")).unwrap();
    let output = machine.call(&["status"]);
    let text = output.text();
    assert_eq!(exit(&output), 3, "{}", output.stderr);
    assert!(text.contains("broken: its report cannot be read: EOF"), "{text}");
    assert!(text.contains("huge: its report cannot be read:"), "{text}");
    assert!(
        text.contains("liar: its report cannot be read: it is from a host that calls itself biz"),
        "{text}"
    );
    assert!(text.contains("silent: never reported"), "{text}");
    let biz = text.lines().find(|l| l.contains(" biz ")).unwrap();
    assert!(biz.contains("running"), "{text}");
}

#[test]
fn an_unknown_name_gives_the_nearest_ones_and_exit_1() {
    let machine = Machine::with_ava(&["biz"]);
    for (args, word) in [
        (vec!["status", "avaa"], "did you mean 'ava'?"),
        (vec!["logs", "avaa"], "did you mean 'ava'?"),
        (vec!["logs", "cady"], "did you mean 'caddy'?"),
        (vec!["status", "--host", "bix"], "did you mean 'biz'?"),
        (vec!["logs", "ava", "--host", "two"], "it runs on biz"),
        (vec!["man", "deployr"], "did you mean 'deployer'?"),
    ] {
        let output = machine.call(&args);
        assert_eq!((exit(&output), output.text().as_str()), (1, ""), "{args:?}");
        assert!(output.stderr.contains(word) && output.stderr.lines().count() == 1, "{}", output.stderr);
    }
    let empty = Machine::new();
    let output = empty.call(&["status"]);
    assert_eq!(exit(&output), 1);
    assert!(output.stderr.contains("deploy-manifest init"), "{}", output.stderr);
}

#[test]
fn live_asks_every_host_and_says_which_do_not_answer() {
    let machine = Machine::with_ava(&["biz", "dead", "empty"]);
    fs_err::write(machine.path("state"), report("biz", "failed", OLD).to_string()).unwrap();
    let ssh = machine.ssh(&format!(
        "echo \"$@\" >> {0}/asked\ncase $1 in biz) cat {0}/state;; empty) echo none >&2; exit 1;; \
         *) echo 'Connection refused' >&2; exit 255;; esac",
        machine.dir.path().display()
    ));
    let output = machine.call(&["status", "--live", "--ssh", &ssh]);
    let text = output.text();
    assert_eq!(exit(&output), 3);
    assert!(text.lines().any(|l| l.contains(" biz ") && l.contains("failed")), "{text}");
    assert!(text.contains("dead: host dead does not answer: Connection refused"), "{text}");
    assert!(text.contains("empty: its state could not be read (exit code 1): none"), "{text}");
    let asked = fs_err::read_to_string(machine.path("asked")).unwrap();
    let mut asked: Vec<&str> = asked.lines().map(|l| l.split(' ').next().unwrap()).collect();
    asked.sort();
    assert_eq!(asked, ["biz", "dead", "empty"], "each once");
}

#[test]
fn a_host_that_never_stops_talking_is_cut_off_and_said() {
    let machine = Machine::with_ava(&["biz"]);
    // With lines, and without an end of any.
    for endless in ["yes $(head -c 60000 /dev/zero | tr '\\0' x)", "cat /dev/zero"] {
        let ssh = machine.ssh(&format!("exec {endless}"));
        let output = machine.call(&["status", "--live", "--ssh", &ssh]);
        assert_eq!(exit(&output), 3, "{}", output.stderr);
        let told = output.text();
        assert!(told.contains("more than 16777216 bytes, which were not read"), "{endless}: {told}");
    }
}

#[test]
fn of_several_hosts_one_whose_journal_never_ends_is_cut_off_and_the_other_is_shown() {
    let machine = Machine::with_ava(&["biz", "box"]);
    let ssh = machine.ssh("case \"$*\" in *biz*) exec yes endless;; esac; echo well");
    let output = machine.call(&["logs", "ava", "-n", "3", "--ssh", &ssh]);
    assert_eq!(exit(&output), 1, "{}", output.stderr);
    assert!(output.stderr.contains("biz sent more than 3 journal entries can have"), "{}", output.stderr);
    assert_eq!(output.text(), "box | well\n");
}

/// What a host answers that is asked what runs now.
fn answer(host: &str, unit: Value, deployer: Value, timer: &str) -> Value {
    let well = json!({"load": "loaded", "active": "active", "sub": "running", "result": "success", "exitStatus": 0,
        "restarts": 0, "mainPid": 7, "started": now(-3600)});
    let with = |over: &Value| {
        let mut unit = well.clone();
        over.as_object().unwrap().iter().for_each(|(name, value)| unit[name] = value.clone());
        unit
    };
    json!({"version": 1, "state": report(host, "running", AVA), "live": {"at": now(0),
        "services": {"ava": with(&unit)}, "deployer": with(&deployer), "timer": with(&json!({"active": timer})),
        "lastLine": "error: the bucket refuses this key", "problems": []}})
}

#[test]
fn live_shows_what_systemd_has_now_and_not_what_the_last_pass_left() {
    let machine = Machine::with_ava(&["biz"]);
    let ssh = machine.ssh(&format!("echo Welcome; cat {}/answer", machine.dir.path().display()));
    // As a host prints it, with the mark before.
    let live = |answer: &Value| {
        fs_err::write(machine.path("answer"), format!("--omni-deploy-answer--\n{answer}")).unwrap();
        machine.call(&["status", "--live", "--ssh", &ssh])
    };
    let well = live(&answer("biz", json!({}), json!({}), "active"));
    assert_eq!(exit(&well), 0, "{}", well.text());
    let lines: Vec<Vec<String>> =
        well.text().lines().map(|l| l.split_whitespace().map(String::from).collect()).collect();
    assert_eq!(
        (lines[0][5].as_str(), lines[1][4].as_str(), lines[1][5].as_str()),
        ("RESTARTS", "running", "0")
    );

    let dead = json!({"active": "inactive", "sub": "dead", "mainPid": 0});
    let crashing = json!({"active": "activating", "sub": "auto-restart", "result": "exit-code", "exitStatus": 7,
        "restarts": 12});
    let failed_pass = json!({"active": "failed", "sub": "failed", "result": "exit-code", "exitStatus": 1});
    let of_services = json!({"active": "failed", "sub": "failed", "result": "exit-code", "exitStatus": 3});
    for (unit, deployer, timer, status, says) in [
        (dead, json!({}), "active", "failed", "it is stopped now"),
        (crashing, json!({}), "active", "failed", "restarted it 12 time(s) and is about to again"),
        (json!({"active": "failed", "sub": "failed"}), json!({}), "active", "failed", "it has failed"),
        (
            json!({"load": "not-found", "active": "inactive", "sub": "dead"}),
            json!({}),
            "active",
            "failed",
            "no unit",
        ),
        (
            json!({"restarts": 3, "started": now(-20)}),
            json!({}),
            "active",
            "running",
            "it crashed: systemd has restarted it 3",
        ),
        (
            json!({}),
            failed_pass,
            "active",
            "running",
            "last pass failed (exit-code, 1): error: the bucket refuses",
        ),
        (
            json!({}),
            json!({}),
            "inactive",
            "running",
            "no pass starts by itself; 'ssh biz sudo systemctl enable --now",
        ),
    ] {
        let output = live(&answer("biz", unit, deployer, timer));
        let text = output.text();
        assert_eq!(exit(&output), 3, "{says}: {text}");
        assert!(text.contains(says) && text.lines().nth(1).unwrap().contains(status), "{says}: {text}");
    }
    // Long calm, and a pass that ended with 3 for a service: the rows tell.
    let calm = live(&answer("biz", json!({"restarts": 3}), of_services, "active"));
    assert_eq!(exit(&calm), 0, "{}", calm.text());
    assert!(calm.text().lines().nth(1).unwrap().split_whitespace().nth(5) == Some("3"), "{}", calm.text());
}

#[test]
fn an_entry_that_no_host_has_yet_is_pending_whatever_of_it_was_changed() {
    let machine = Machine::with_ava(&["biz"]);
    let statuses = || {
        let value = json_of(&machine.call(&["status", "--json"]));
        let rows = value["rows"].as_array().unwrap().clone();
        rows.iter().map(|r| r["status"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    // What the host's pass would report: it has worked from the manifest that is there now.
    let passed = |entry: bool| {
        let bytes = fs_err::read(machine.path("store/manifest.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&bytes).unwrap();
        let mut report = report("biz", "running", AVA);
        report["serial"] = manifest["serial"].clone();
        if entry {
            let digests = omni_deploy::manifest::entry::digests(&bytes);
            report["services"]["ava"]["entry"] = json!(digests.values().next().unwrap());
        }
        machine.put("hosts/biz.json", report.to_string());
    };
    for (entry, change) in [
        (true, "env.GREETING=changed"),
        (true, "http={\"domain\": \"ava.example.com\", \"internalPort\": 8080}"),
        (true, "http.domain=two.example.com"),
        (true, "hosts=biz,biz2"),
        (true, "hardening.privateTmp=false"),
        (true, "systemd.memoryMax=512M"),
        // An older program says no more than which version it saw.
        (false, "env.GREETING=again"),
    ] {
        passed(entry);
        assert_eq!(statuses()[0], "running", "{change}");
        let set = machine.call(&["manifest", "set", "ava", change]);
        assert_eq!(exit(&set), 0, "{}", set.stderr);
        assert_eq!(statuses()[0], "pending", "{change}");
        passed(entry);
        assert_eq!(statuses()[0], "running", "{change}");
    }
    // What another service gets is none of its affair.
    passed(true);
    let other = json!({"name": "other", "artifact": {"storePath": AVA}, "hosts": ["biz"]}).to_string();
    assert_eq!(exit(&machine.call(&["manifest", "add-service", &other])), 0);
    assert_eq!(statuses(), ["running", "unknown", "pending"]);
    // A host that says it has this version and has another entry does not have it.
    let mut odd = report("biz", "running", AVA);
    odd["serial"] = json!(99);
    odd["services"]["ava"]["entry"] = json!("0123");
    machine.put("hosts/biz.json", odd.to_string());
    assert_eq!(statuses()[0], "differs");
}

#[test]
fn a_host_that_reads_another_store_is_unknown_and_both_are_named() {
    let machine = Machine::with_ava(&["biz"]);
    let mut elsewhere = report("biz", "running", AVA);
    elsewhere["store"] = json!("s3://releases2");
    machine.put("hosts/biz.json", elsewhere.to_string());
    let stored = machine.call(&["status"]);
    fs_err::write(machine.path("state"), elsewhere.to_string()).unwrap();
    let ssh = machine.ssh(&format!("cat {}/state", machine.dir.path().display()));
    let live = machine.call(&["status", "--live", "--ssh", &ssh]);
    for output in [stored, live] {
        let text = output.text();
        assert_eq!(exit(&output), 3, "{text}");
        assert!(text.lines().nth(1).unwrap().contains("unknown"), "{text}");
        assert!(
            text.contains("it reads s3://releases2, and this is ") && text.contains(&machine.store_url()),
            "{text}"
        );
    }
    elsewhere["store"] = json!(machine.store_url());
    machine.put("hosts/biz.json", elsewhere.to_string());
    assert_eq!(exit(&machine.call(&["status"])), 0);
}

#[test]
fn a_pass_that_failed_two_machines_of_one_name_and_a_removal_under_way_are_said() {
    let machine = Machine::with_ava(&["biz"]);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut changed = report("biz", "running", AVA);
        change(&mut changed);
        machine.put("hosts/biz.json", changed.to_string());
        let output = machine.call(&["status"]);
        assert_eq!(exit(&output), 3, "{}", output.text());
        output.text()
    };
    let text =
        with(&|r| r["lastError"] = json!({"reason": "no key; run 'deployer run'", "since": now(-700)}));
    assert!(
        text.contains("biz: last pass failed: no key; run 'ssh biz sudo deployer run' (for 11m)"),
        "{text}"
    );
    let text = with(&|r| {
        r["machine"] = json!({"id": "aaaaaaaaaaaa", "name": "web1"});
        r["otherMachine"] = json!({"machine": {"id": "bbbbbbbbbbbb", "name": "web2"}, "reportedAt": now(-60),
            "cameBack": true});
    });
    assert!(
        text.contains("two machines report as host 'biz': web1 (aaaaaaaa), and web2 (bbbbbbbb)"),
        "{text}"
    );
    let text = with(&|r| {
        r["services"]["old"] = json!({"name": "old", "storePath": OLD, "status": "failed", "since": now(-30),
            "removing": true, "failure": {"reason": "not gone yet (deactivating/stop-sigterm)", "at": now(-30)}});
    });
    let row = text.lines().find(|l| l.starts_with("old ")).unwrap();
    assert!(row.contains("removing") && text.contains("(deactivating/stop-sigterm)"), "{text}");
}

#[test]
fn watching_on_a_pipe_prints_only_what_changed() {
    let machine = Machine::with_ava(&["biz"]);
    let (sender, lines) = mpsc::channel();
    // The shell says its number and becomes the program, so that it can be ended by it.
    let watch = machine.run("sh").args(["-c", "echo $$; exec \"$0\" status --watch --json", BIN]);
    let watcher = std::thread::spawn(move || {
        watch.each_line(|stream, line| {
            if stream == Stream::Stdout {
                sender.send(line.to_string()).unwrap();
            }
        })
    });
    let next = || lines.recv_timeout(Duration::from_secs(30)).unwrap();
    let pid = next();
    let first: Value = serde_json::from_str(&next()).unwrap();
    assert_eq!(first["rows"][0]["status"], "running");
    machine.put("hosts/biz.json", report("biz", "failed", OLD).to_string());
    let second: Value = serde_json::from_str(&next()).unwrap();
    assert_eq!(second["rows"][0]["status"], "failed");
    Run::new("kill").arg(pid).success().unwrap();
    assert_eq!(watcher.join().unwrap().unwrap().status, ProcessStatus::Signal(15));
    assert_eq!(lines.try_iter().count(), 0);
}

#[test]
fn logs_come_from_every_host_with_its_name_and_nothing_given_becomes_an_option() {
    let machine = Machine::with_ava(&["biz", "two"]);
    // What a remote shell would make of the words, one a line.
    let ssh = machine.ssh(
        "host=$1; shift; eval \"set -- $*\"; case $3 in *'exec sudo '*) s='<sudo>';; *) s=;; esac; shift 4
             printf '%s: %s' $host \"$s\"; printf '<%s>' \"$@\"; echo",
    );
    let words = |output: &Output| output.text().lines().map(String::from).collect::<Vec<_>>();
    let asked = "<sudo><journalctl><--no-pager><--output=short-iso>";
    let output = machine.call(&["logs", "ava", "--ssh", &ssh, "-n", "5", "--since", "1 hour ago"]);
    assert_eq!(exit(&output), 0, "{}", output.stderr);
    assert_eq!(
        words(&output),
        ["biz", "two"]
            .map(|h| { format!("{h} | {h}: {asked}<--unit=ava.service><--lines=5><--since=1 hour ago>") })
    );
    let output = machine.call(&["logs", "deployer", "--host", "new-host", "--ssh", &ssh]);
    assert_eq!(words(&output), [format!("new-host: {asked}<--unit=deployer.service><--lines=100>")]);
    for wrong in [["-n", "--follow"], ["--since", "$(reboot)"], ["--host", "-oProxyCommand=x"]] {
        let output = machine.call(&["logs", "caddy", "--ssh", &ssh, wrong[0], wrong[1]]);
        assert_eq!((exit(&output), output.text().as_str()), (2, ""), "{wrong:?}: {}", output.stderr);
    }
}

#[test]
fn following_shows_all_hosts_as_they_speak_and_says_who_fell_silent() {
    let machine = Machine::with_ava(&["biz", "two"]);
    // Two speaks only after biz has: together, or this would end with its deadline.
    let ssh = machine.ssh(&format!(
        "cd {}; case $1 in biz) printf 'a\\033[2J\\tb\\n'; touch spoke; while [ ! -e done ]; do sleep 0.05; done;; \
         *) while [ ! -e spoke ]; do sleep 0.05; done; echo hello; touch done; exit 255;; esac",
        machine.dir.path().display()
    ));
    let output = machine.call(&["logs", "ava", "-f", "--ssh", &ssh]);
    let text = output.text();
    let lines: BTreeSet<&str> = text.lines().collect();
    assert_eq!(lines, BTreeSet::from(["biz | a\\u{1b}[2J\tb", "two | hello"]));
    assert_eq!(exit(&output), 1);
    assert!(output.stderr.contains("host two does not answer"), "{}", output.stderr);
}

#[test]
fn init_sets_up_once_and_keeps_what_is_there() {
    let machine = Machine::new();
    let file = machine.path("home/.config/omni-deploy/config.json");
    fs_err::create_dir_all(file.parent().unwrap()).unwrap();
    fs_err::write(&file, "{\"build\": \"make\", \"defaultHosts\": [\"old\"]}").unwrap();
    let url = machine.store_url();
    let init = |args: &[&str]| {
        machine.run(BIN).without_env("OMNI_DEPLOY_STORE").arg("init").args(args).output().unwrap()
    };
    let first = init(&[&url, "--default-hosts", "biz,two"]);
    assert_eq!(exit(&first), 0, "{}", first.stderr);
    assert!(
        first.stderr.contains("defaultHosts is now [\"biz\",\"two\"] (was [\"old\"])"),
        "{}",
        first.stderr
    );
    let host = json_of(&first);
    assert_eq!((&host["store"], &host["cache"]), (&json!(url), &json!(url)));
    let config: Value = serde_json::from_slice(&fs_err::read(&file).unwrap()).unwrap();
    assert_eq!((&config["build"], &config["defaultHosts"]), (&json!("make"), &json!(["biz", "two"])));
    let secret = PathBuf::from(config["secretKeyFile"].as_str().unwrap());
    assert_eq!(fs_err::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
    let public = fs_err::read_to_string(secret.with_extension("pub")).unwrap();
    assert_eq!(host["trustedPublicKeys"], json!([public.trim()]));
    let secret_text = fs_err::read_to_string(&secret).unwrap();
    let payload = secret_text.split_once(':').unwrap().1;
    assert!(!first.text().contains(payload) && !first.stderr.contains(payload));

    let files = || {
        let mut all = BTreeMap::new();
        snapshot(machine.dir.path(), &mut all);
        all
    };
    let before = files();
    let second = init(&[]);
    assert_eq!((exit(&second), json_of(&second)), (0, host), "{}", second.stderr);
    assert_eq!(files(), before);
    assert_eq!(exit(&init(&["s3://", "--key-name", "x"])), 1);
    assert_eq!(exit(&init(&[&url, "--key-name", "other"])), 1);
    assert_eq!(files(), before);
}

fn snapshot(dir: &Path, all: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            snapshot(&path, all);
        } else if path.file_name().is_some_and(|name| name != ".omni-deploy.lock") {
            all.insert(path.clone(), fs_err::read(&path).unwrap());
        }
    }
}

#[test]
fn a_configuration_that_is_no_json_is_put_aside_by_init() {
    let machine = Machine::new();
    let file = machine.path("home/.config/omni-deploy/config.json");
    fs_err::create_dir_all(file.parent().unwrap()).unwrap();
    fs_err::write(&file, "store = x").unwrap();
    let status = machine.call(&["status"]);
    assert!(exit(&status) == 1 && status.stderr.contains("omni-deploy init"), "{}", status.stderr);
    let output = machine.call(&["init", &machine.store_url()]);
    assert_eq!(exit(&output), 0, "{}", output.stderr);
    assert!(output.stderr.contains("OMNI_DEPLOY_STORE is set and beats 'store'"), "{}", output.stderr);
    let aside = file.with_extension("json.broken");
    assert_eq!(fs_err::read_to_string(aside).unwrap(), "store = x");
}

#[test]
fn config_names_every_key_with_its_source_and_no_secret() {
    let machine = Machine::new();
    let url = "https://ann:hunter2@cache.example.org?token=hunter2";
    let text = machine.call(&["config", "--cache", url]);
    let value = json_of(&machine.call(&["config", "--json", "--cache", url]));
    assert!(!text.text().contains("hunter2") && !value.to_string().contains("hunter2"), "{}", text.text());
    assert_eq!(value["version"], 1);
    assert_eq!(
        value["settings"]["store"],
        json!({"value": machine.store_url(), "source": "environment OMNI_DEPLOY_STORE"})
    );
    assert_eq!(value["settings"]["defaultHosts"], json!({"value": ["laptop"], "source": "default"}));
    for key in omni_deploy::config::KEYS {
        assert!(text.text().lines().any(|l| l.starts_with(key.name)), "{}", key.name);
        assert!(value["settings"][key.name]["source"].is_string(), "{}", key.name);
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn doctor_finds_what_is_wrong_and_names_the_remedy() {
    let machine = Machine::new();
    assert_eq!(exit(&machine.call(&["init"])), 0);
    let keys = fs_err::read_dir(machine.path("home/.config/omni-deploy/keys")).unwrap();
    let key = keys.map(|e| e.unwrap().path()).find(|p| p.extension().is_some_and(|e| e == "secret")).unwrap();
    let (store, ssh) = (machine.path("store"), machine.ssh("exit 0"));
    let doctor = |args: &[&str]| machine.call(&[&["doctor", "--json", "--ssh", &ssh], args].concat());
    let verdict = |output: &Output, name: &str| {
        let checks = json_of(output);
        let check = checks["checks"].as_array().unwrap().iter().find(|c| c["name"] == name).cloned();
        check.map(|c| (c["verdict"].as_str().unwrap().to_string(), c["text"].as_str().unwrap().to_string()))
    };
    let well = doctor(&[]);
    for name in
        ["configuration", "store", "conditional writes", "manifest", "signing key", "nix", "cache", "ssh"]
    {
        assert_eq!(verdict(&well, name).map(|v| v.0).as_deref(), Some("ok"), "{name}: {}", well.text());
    }
    let other = "k:igHme8Qi9gyKFZOCtbcuFVJ1hxBRtVR/TyOJJsiLcaI=";
    fs_err::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let open = doctor(&[]);
    assert_eq!(exit(&open), 1);
    assert!(verdict(&open, "signing key").unwrap().1.contains("chmod 600"), "{}", open.text());
    fs_err::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let stranger = doctor(&["--trusted-public-keys", other]);
    assert_eq!(verdict(&stranger, "trusted keys").unwrap().0, "fail");
    let build = doctor(&["--build", "no-such-program-here x"]);
    assert_eq!(verdict(&build, "build").unwrap().0, "fail");
    fs_err::write(store.join("manifest.json"), "{\"version\": 1,").unwrap();
    let broken = doctor(&[]);
    assert_eq!((exit(&broken), verdict(&broken, "manifest").unwrap().0), (1, "fail".into()));
    let wrong = machine.call(&["doctor", "--store", "nonsense"]);
    assert_eq!(exit(&wrong), 1);
    assert!(wrong.text().starts_with("FAIL  configuration"), "{}", wrong.text());
}

#[test]
fn every_command_has_help_in_both_forms_and_runs_nothing_for_it() {
    let machine = Machine::new();
    for (path, command) in dispatch::all(&tree()) {
        let help = machine.call(&[path.as_slice(), &["--help"]].concat());
        assert_eq!((exit(&help), help.stderr.as_str()), (0, ""), "{path:?}");
        assert_eq!(machine.call(&[&["help"], path.as_slice()].concat()).text(), help.text(), "{path:?}");
        assert!(
            help.text().starts_with(&format!("Usage: omni-deploy {}", path.join(" "))),
            "{}",
            help.text()
        );
        assert!(help.text().contains("\nExamples:\n"), "{path:?} has no example");
        for flag in dispatch::flags(command) {
            assert!(help.text().contains(&format!("{} ", flag.long)), "{path:?} {}", flag.long);
        }
    }
    assert!(fs_err::read_dir(machine.dir.path()).unwrap().next().is_none(), "something was written");
}

#[test]
fn a_word_of_another_command_is_answered_with_where_it_is() {
    let machine = Machine::new();
    for (args, said) in [
        (vec!["rollback"], "there is 'deploy-manifest rollback' "),
        (vec!["manifest", "run"], "there is on a host 'sudo deployer run' "),
        (vec!["deployer", "push"], "there is 'omni-deploy push' "),
        (vec!["restart", "ava"], "'sudo systemctl restart SERVICE' on its host"),
        (vec!["status", "--hots=biz"], "did you mean '--host'"),
    ] {
        let output = machine.call(&args);
        assert_eq!((exit(&output), output.text().as_str()), (2, ""), "{args:?}");
        assert!(output.stderr.contains(said) && output.stderr.lines().count() == 1, "{}", output.stderr);
    }
}

#[test]
fn bash_completes_names_of_the_manifest_through_its_script() {
    let machine = Machine::with_ava(&["biz"]);
    let bin = machine.path("bin");
    fs_err::create_dir_all(&bin).unwrap();
    fs_err::os::unix::fs::symlink(BIN, bin.join("omni-deploy")).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    // The line, and as bash takes it apart.
    let complete = |line: &str, words: &[&str]| {
        let quoted: Vec<String> = words.iter().map(|w| format!("'{w}'")).collect();
        let script = format!(
            "source <(omni-deploy completions bash); compopt() {{ :; }}; COMP_LINE='{line}' COMP_POINT={}; \
             COMP_WORDS=({}); COMP_CWORD={}; _omni_deploy; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            line.len(),
            quoted.join(" "),
            words.len() - 1
        );
        let output = machine.run("bash").env("PATH", &path).args(["-c", &script]).success().unwrap();
        assert_eq!(output.stderr, "");
        output.text().trim().to_string()
    };
    assert_eq!(complete("omni-deploy status ", &["omni-deploy", "status", ""]), "ava");
    assert_eq!(complete("omni-deploy logs --host b", &["omni-deploy", "logs", "--host", "b"]), "biz");
    assert_eq!(complete("omni-deploy logs --host=", &["omni-deploy", "logs", "--host", "="]), "biz");
    assert_eq!(complete("omni-deploy logs --host=b", &["omni-deploy", "logs", "--host", "=", "b"]), "biz");
    assert_eq!(complete("deploy-manifest roll", &["deploy-manifest", "roll"]), "rollback");
    let elsewhere = ["omni-deploy", "status", "--store", "=", "file", ":", "///nonexistent", ""];
    assert_eq!(complete("omni-deploy status --store=file:///nonexistent ", &elsewhere), "");
    let file = ["deploy-manifest", "validate", "/etc/hostna"];
    assert_eq!(complete("deploy-manifest validate /etc/hostna", &file), "/etc/hostname");
}

#[test]
fn a_manual_page_goes_to_a_pipe_as_roff() {
    let machine = Machine::new();
    let list = machine.call(&["man"]);
    assert_eq!(list.text(), "omni-deploy(1)\ndeploy-manifest(1)\ndeployer(8)\n");
    for page in ["omni-deploy", "deploy-manifest(1)", "deployer.8"] {
        let output = machine.call(&["man", page]);
        assert!(exit(&output) == 0 && output.text().starts_with(".TH "), "{page}");
        assert!(!output.text().contains("@VERSION@"));
    }
}

/// A machine whose store is a bucket, with one of the server's keys.
fn over(machine: &Machine, url: &str, (id, secret): (&str, &str), args: &[&str]) -> Output {
    let run = machine.run(BIN).args(args).env("OMNI_DEPLOY_STORE", url);
    run.env("AWS_ACCESS_KEY_ID", id).env("AWS_SECRET_ACCESS_KEY", secret).output().unwrap()
}

fn check(output: &Output, name: &str) -> Option<(String, String)> {
    let checks = json_of(output);
    let check = checks["checks"].as_array().unwrap().iter().find(|c| c["name"] == name).cloned()?;
    Some((check["verdict"].as_str().unwrap().into(), check["text"].as_str().unwrap().into()))
}

#[test]
fn doctor_on_a_host_says_ok_of_nothing_that_it_could_not_do() {
    let server = S3Server::start();
    let machine = Machine::new();
    assert_eq!(exit(&over(&machine, &server.url(""), DEVELOPER, &["manifest", "init"])), 0);
    const WRITES: &str = "conditional writes";
    let doctor = |who| over(&machine, &server.url(""), who, &["doctor", "--host", "--json"]);
    assert_eq!(check(&doctor(DEVELOPER), WRITES).unwrap().0, "ok");
    // A host's own key writes nothing but its report: of the rest there is nothing to say.
    let host = doctor(HOST);
    assert_eq!((check(&host, WRITES), check(&host, "store").unwrap().0), (None, "ok".into()));
    for (status, code) in [(501, "NotImplemented"), (400, "InvalidArgument"), (405, "")] {
        let scope = r#""methods": ["PUT"], "key_prefix": "probe/""#;
        server.faults(&format!(r#"{{"fail": {{"status": {status}, "code": "{code}", {scope}}}}}"#));
        let (verdict, text) = check(&doctor(DEVELOPER), WRITES).unwrap();
        assert!(verdict == "fail" && text.contains(&status.to_string()), "{verdict} {text}");
    }
    server.faults(r#"{"ignore_conditions": true}"#);
    assert_eq!(check(&doctor(DEVELOPER), WRITES).unwrap().0, "fail");
    server.faults("{}");
    // A bucket that is not there is no cache without content.
    let elsewhere = server.url("").replace("//box", "//no-such-box");
    for (host, verdict) in [(&elsewhere, "fail"), (&server.url("cache"), "ok")] {
        let args = ["doctor", "--host", "--json", "--cache", host];
        let cache = check(&over(&machine, &server.url(""), (KEY, SECRET), &args), "cache").unwrap();
        assert_eq!(cache.0, verdict, "{cache:?}");
    }
}

#[test]
fn doctor_takes_a_manifest_for_well_only_if_a_host_would() {
    let machine = Machine::new();
    assert_eq!(exit(&machine.call(&["init"])), 0);
    let signed = check(&machine.call(&["doctor", "--json"]), "manifest").unwrap();
    assert!(signed.0 == "ok" && signed.1.contains("signed by"), "{signed:?}");
    let file = machine.path("store/manifest.json");
    let text = fs_err::read_to_string(&file).unwrap();
    fs_err::write(&file, text.replace("\"serial\": 1", "\"serial\": 5")).unwrap();
    let doctor = machine.call(&["doctor", "--json"]);
    let (verdict, text) = check(&doctor, "manifest").unwrap();
    assert_eq!((exit(&doctor), verdict.as_str()), (1, "fail"), "{text}");
    assert!(text.contains("changed after it was signed") && text.contains("deploy-manifest sign"), "{text}");
    // Nor is anything read or visited that it names.
    let secrets = |machine: &Machine| check(&machine.call(&["doctor", "--host", "--json"]), "secrets");
    let obeys_one = Path::new("/var/lib/deployer/manifest.json").exists();
    assert_eq!(secrets(&machine).is_some(), obeys_one);
    let shown = machine.call(&["manifest", "sign"]).stderr;
    let hash = shown.split("--hash ").nth(1).and_then(|rest| rest.split('\'').next()).unwrap().to_string();
    assert_eq!(exit(&machine.call(&["manifest", "sign", "--hash", &hash])), 0);
    assert_eq!(check(&machine.call(&["doctor", "--json"]), "manifest").unwrap().0, "ok");
    assert!(secrets(&machine).is_some());
}

#[test]
fn status_asks_for_each_report_once_and_for_what_there_is_once() {
    let server = S3Server::start();
    let hosts: Vec<String> = (0..150).map(|n| format!("h{n}")).collect();
    let machine = Machine::with_ava(&hosts.iter().map(String::as_str).collect::<Vec<_>>());
    let root = server.dir.path().join("root/box");
    fs_err::remove_dir(&root).unwrap();
    fs_err::rename(machine.path("store"), &root).unwrap();
    let before = server.log().len();
    let status = over(&machine, &server.url(""), (KEY, SECRET), &["status", "--json"]);
    assert_eq!(exit(&status), 0, "{}", status.stderr);
    assert_eq!(json_of(&status)["rows"].as_array().unwrap().len(), 150);
    let log = server.log().split_off(before);
    let count = |begins: &str| log.iter().filter(|l| l.starts_with(begins)).count();
    assert_eq!(
        (count("GET /box/hosts/"), count("GET /box/manifest.json"), log.len()),
        (150, 1, 152),
        "{log:?}"
    );
}

#[test]
fn where_nothing_is_configured_that_is_what_is_said() {
    if ["/etc/omni-deploy/config.json", "/var/lib/omni-deploy"].iter().any(|p| Path::new(p).exists()) {
        eprintln!("left out: this machine is configured");
        return;
    }
    let machine = Machine::new();
    for args in [&["status"][..], &["push", AVA, "--service", "ava"], &["manifest", "list"], &["doctor"]] {
        let output = machine.run(BIN).args(args).without_env("OMNI_DEPLOY_STORE").output().unwrap();
        let said = output.text() + &output.stderr;
        assert!(exit(&output) == 1 && said.contains("nothing is configured here"), "{args:?}: {said}");
        assert!(said.contains("omni-deploy init s3://BUCKET?region="), "{args:?}: {said}");
    }
}

#[test]
fn the_endpoint_of_the_aws_tools_is_taken_and_shown_unless_the_url_has_one() {
    let server = S3Server::start();
    let machine = Machine::new();
    let (here, nowhere) = (format!("http://{}/", server.address), "http://127.0.0.1:1".to_string());
    let config = machine.path("home/.aws/config");
    fs_err::create_dir_all(config.parent().unwrap()).unwrap();
    let shown = format!("s3://box?endpoint={}&scheme=http", server.address);
    let call = |vars: &[(&str, &str)], url: &str, args: &[&str]| {
        let run = machine.run(BIN).args(args).env("OMNI_DEPLOY_STORE", url);
        let run = run.env("AWS_ACCESS_KEY_ID", KEY).env("AWS_SECRET_ACCESS_KEY", SECRET);
        vars.iter().fold(run, |run, (name, value)| run.env(name, value)).output().unwrap()
    };
    let s3 = "AWS_ENDPOINT_URL_S3";
    let general = "AWS_ENDPOINT_URL";
    for (vars, profile, by) in [
        (vec![(s3, &*here)], "", Some(s3)),
        (vec![(general, &*here)], "", Some(general)),
        (vec![(s3, &*here), (general, &*nowhere)], "", Some(s3)),
        (vec![], &*here, Some("endpoint_url of profile 'default'")),
        (vec![(general, &*here)], &*nowhere, Some(general)),
        (vec![(s3, &*here), ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")], "", None),
    ] {
        fs_err::write(&config, format!("[default]\nendpoint_url = {profile}\n")).unwrap();
        let store = json_of(&call(&vars, "s3://box", &["config", "--json"]))["settings"]["store"].clone();
        match by {
            None => assert_eq!(store["value"], "s3://box", "{vars:?}"),
            Some(by) => {
                assert_eq!(store["value"], shown, "{vars:?}");
                assert!(store["source"].as_str().unwrap().contains(by), "{store}");
                let show = call(&vars, "s3://box", &["manifest", "init"]);
                assert_eq!(exit(&show), 0, "{vars:?}: {}", show.stderr);
            }
        }
    }
    fs_err::remove_file(&config).unwrap();
    // A URL's own endpoint beats them all, and it is the same store: what was signed for one is for the other.
    let init = call(&[(s3, &here)], "s3://box/signed", &["init", "--key-name", "k-1"]);
    assert_eq!(exit(&init), 0, "{}", init.stderr);
    assert_eq!(json_of(&init)["store"], shown.replace("box", "box/signed"));
    let verify = call(&[(s3, &nowhere)], &shown.replace("box", "box/signed"), &["manifest", "verify"]);
    assert_eq!((exit(&verify), verify.text().trim()), (0, "k-1"), "{}", verify.stderr);
    let wrong = call(&[(s3, "box.example.org")], "s3://box", &["status"]);
    assert!(exit(&wrong) == 1 && wrong.stderr.contains(s3), "{}", wrong.stderr);
}

/// A server that has a certificate of tests/fixtures/tls and says nothing.
fn tls_server(certificate: &'static [u8]) -> String {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let key = PrivateKeyDer::from_pem_slice(include_bytes!("../fixtures/tls/leaf.key")).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(certificate).unwrap()];
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let config = std::sync::Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut connection = rustls::ServerConnection::new(config.clone()).unwrap();
            drop(connection.complete_io(&mut socket.unwrap()));
        }
    });
    address
}

#[test]
fn a_certificate_that_is_not_valid_now_points_to_the_clock_and_not_to_the_authority() {
    let machine = Machine::new();
    let authority = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tls/ca.pem");
    let year = now(0)[..4].to_string();
    for (certificate, parts) in [
        (&include_bytes!("../fixtures/tls/expired.pem")[..], ["until 2020-01-01T00:00:00Z", "timedatectl"]),
        (include_bytes!("../fixtures/tls/future.pem"), ["from 2095-01-01T00:00:00Z", "timedatectl"]),
    ] {
        let url = format!("s3://box?endpoint={}", tls_server(certificate));
        let run = machine.run(BIN).args(["manifest", "show"]).env("OMNI_DEPLOY_STORE", &url);
        let run = run.env("AWS_CA_BUNDLE", authority).env("AWS_ACCESS_KEY_ID", "k");
        let said = run.env("AWS_SECRET_ACCESS_KEY", "s").output().unwrap().stderr;
        assert!(parts.iter().all(|p| said.contains(p)), "{said}");
        assert!(said.contains(&format!("clock says {year}-")) && !said.contains("AWS_CA_BUNDLE"), "{said}");
    }
}
