//! What a host needs: systemd and the deployer's timer, Caddy with an HTTP app that survives a restart, secrets
//! nobody else reads, folders that can be written, space.

use super::{Check, Finding, fail, ok, warn, writable};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::config::admin::{Endpoint, SOCKET};
use crate::deployer::admin;
use crate::deployer::caddy::{self, CaddyState, RoutePlan};
use crate::deployer::live::Visit;
use crate::deployer::ports::PortFiles;
use crate::deployer::root::{Root, STATE_DIR, STATE_FILE};
use crate::deployer::state::{Exposure, OtherMachine, SILENT_SEC, State};
use crate::deployer::trial::Trial;
use crate::deployer::{listeners, machine, reported};
use crate::doctor::domains;
use crate::error::{Exit, did_you_mean};
use crate::files::if_there;
use crate::log::printable;
use crate::manifest::{Manifest, Service};
use crate::names::{HostName, ServiceName};
use crate::runner::{Run, RunError};
use crate::secrets::{self, SecretFile};
use crate::ssh::is_root;
use crate::store::{Condition, Store, StoreError};
use crate::systemd;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Below this much free space, in bytes, a warning; a closure is easily as large.
const LOW_SPACE: u64 = 2 << 30;

/// Below this much, in bytes, even units and state may not fit any more.
const NO_SPACE: u64 = 100 << 20;

const DEADLINE: Duration = Duration::from_secs(20);

/// Whether this machine is one that a deployer works on.
pub fn is_host() -> bool {
    let unit = |name: &str| systemd::UNIT_PATH.iter().any(|dir| Path::new(dir).join(name).exists());
    unit("deployer.timer") || unit("deployer.service") || is_root() && Path::new(STATE_DIR).is_dir()
}

/// Everything, in the order in which one thing needs the other.
pub fn all(settings: &Settings, manifest: Option<&Manifest>, now: Timestamp) -> Vec<Check> {
    let mut checks = vec![];
    checks.extend(manifest.map(|manifest| placement(settings, manifest).of("host name")));
    checks.extend(systemd(now));
    checks.extend(sudo().map(|found| found.of("sudo")));
    let observed = caddy::observe(&settings.caddy_admin);
    let is_routed = |s: &Service| s.http.is_some() && s.hosts.contains(&settings.host);
    let needed = manifest.is_some_and(|manifest| manifest.services.iter().any(is_routed));
    checks.extend(route(&observed, settings, needed));
    checks.push(caddy_unit().unwrap_or_else(fail).of("caddy unit"));
    checks.extend(
        switching(&Root::system(&settings.unit_dir), &observed).map(|found| found.of("caddy switching")),
    );
    checks.push(migrate_req(Path::new("/proc/sys/net/ipv4/tcp_migrate_req")).of("tcp_migrate_req"));
    if let Some(manifest) = manifest {
        checks.extend(domains(settings, manifest, &observed));
        checks.extend(secrets(&settings.host, manifest).into_iter().map(|found| found.of("secrets")));
        checks.extend(state_file().ok().map(|state| exposed(&state, manifest).of("exposure")));
    }
    checks.push(unit_dir(&settings.unit_dir).of("unit folder"));
    checks.extend(["/nix", "/var"].map(|dir| space(dir).of("disk space")));
    checks
}

/// Whether this host's report can be written: the one write that every host must be able to do. What is tried is to
/// write it as the last pass did, where there is none: one that is there stays. Nothing to be said before the first.
pub fn report(store: &dyn Store, settings: &Settings) -> Option<Finding> {
    let state = fs_err::read(STATE_FILE).ok()?;
    let key = reported::key(&settings.host);
    Some(match store.put(&key, &state, &Condition::IfAbsent) {
        Ok(_) | Err(StoreError::Changed(_)) => {
            match other_machine_text(store, &settings.host, &State::parse(&state).ok()?) {
                Some(text) => fail(text),
                None => ok(format!("{key} can be written")),
            }
        }
        Err(e) => fail(e),
    })
}

/// Whether another machine reports under this host's name: as the last pass found, or as its report is there now.
fn other_machine_text(store: &dyn Store, host: &HostName, state: &State) -> Option<String> {
    let this = machine::this()?;
    // Who may not read it is not told.
    let there = reported::readable(store, host).and_then(|now| Some((now.machine?, now.checked_at)));
    let there = there.filter(|(machine, _)| machine.id != this.id);
    let there = there.map(|(machine, reported_at)| {
        let came_back = state.reported && reported_at > state.checked_at;
        OtherMachine { machine, reported_at, came_back }
    });
    Some(there.as_ref().or(state.other_machine.as_ref())?.text(&state.host, &this))
}

/// Whether the manifest places anything on this host.
fn placement(settings: &Settings, manifest: &Manifest) -> Finding {
    let hosts = manifest.hosts();
    let here = manifest.services.iter().filter(|s| s.hosts.contains(&settings.host)).count();
    if here > 0 {
        return ok(format!("{}, services: {here}", settings.host));
    }
    let near = did_you_mean(settings.host.as_str(), hosts.iter().map(HostName::as_str));
    warn(format!(
        "no service is placed on '{}'{near}; 'host' in {} says who this is",
        settings.host,
        crate::config::SYSTEM_FILE
    ))
}

fn systemd(now: Timestamp) -> Vec<Check> {
    const NAME: &str = "systemd";
    if !Path::new("/run/systemd/system").is_dir() {
        return vec![fail("does not run this machine; the deployer needs it as PID 1").of(NAME)];
    }
    let state = match systemd::system_state() {
        Err(e) => return vec![fail(e).of(NAME)],
        Ok(word) => match word.as_str() {
            "running" => ok("running"),
            "degraded" => ok(format!("running; failed: {}", failed_units())),
            "starting" | "initializing" => warn("still starting; 'systemctl list-jobs' shows why"),
            word => fail(format!("is '{}'; see 'systemctl status'", printable(word))),
        },
    };
    let mut checks = vec![
        state.of(NAME),
        timer().unwrap_or_else(fail).of("deployer.timer"),
        last_pass(now).of("last pass"),
        environment().of("environment"),
    ];
    checks.extend(state_file().ok().map(|state| drop_ins(&state).of("drop-ins")));
    checks
}

/// Whether people who come by ssh can type `sudo deployer`: sudo has a path of its own. Nothing where there is no sudo, or
/// where it is not for us to ask.
fn sudo() -> Option<Finding> {
    const SCRIPT: &str = "for name in omni-deploy deployer deploy-manifest; do command -v $name >/dev/null || echo $name; done";
    if !is_root() {
        return None;
    }
    let run = Run::new("sudo").args(["-n", "--", "sh", "-c", SCRIPT]);
    // What somebody has who comes by ssh.
    let output = run.env("PATH", "/usr/local/bin:/usr/bin:/bin").deadline(DEADLINE).output().ok()?;
    if !output.status.ok() {
        return None;
    }
    let missing = output.text().lines().collect::<Vec<_>>().join(", ");
    Some(if missing.is_empty() {
        ok("finds the commands")
    } else {
        warn(format!(
            "does not find {missing} ('command not found'): run contrib/install.sh again, or add their folder to \
                 secure_path in /etc/sudoers (visudo)"
        ))
    })
}

/// What every service gets that no manifest names.
fn environment() -> Finding {
    match systemd::given_to_all() {
        Ok(names) if names.is_empty() => ok("services get what the manifest names"),
        Ok(names) => warn(printable(&systemd::given_text(&names))),
        Err(e) => warn(e),
    }
}

/// What changes our units beside the manifest: of each service, and of all services alike.
fn drop_ins(state: &State) -> Finding {
    let changed: Vec<String> =
        state.services.values().filter_map(|s| Some(format!("{} {}", s.name, s.attention()?))).collect();
    let units: Vec<String> = state.services.keys().map(ServiceName::unit).take(1).collect();
    let shown = systemd::show(&units).unwrap_or_default();
    let all = shown.values().flat_map(|s| &s.drop_ins).filter(|path| systemd::is_vendor_drop_in(path));
    let all: Vec<String> = all.map(|path| path.display().to_string()).collect();
    match (changed.is_empty(), all.is_empty()) {
        (false, _) => warn(printable(&changed.join("; "))),
        (true, true) => ok("none for services of ours"),
        (true, false) => {
            ok(format!("only the system's own for all services: {}", printable(&all.join(", "))))
        }
    }
}

fn failed_units() -> String {
    let names = systemd::failed_units().join(", ");
    if names.is_empty() { "see 'systemctl --failed'".into() } else { printable(&names).into() }
}

fn timer() -> Result<Finding, RunError> {
    let timer = systemd::properties("deployer.timer", "LoadState,UnitFileState,ActiveState")?;
    let is = |name: &str| timer.get(name).map_or("", String::as_str);
    Ok(match (is("LoadState"), is("UnitFileState"), is("ActiveState")) {
        ("loaded", "enabled" | "linked" | "static", "active") => ok("enabled and active"),
        ("loaded", file, active) => {
            fail(format!("is {active} and {file}; systemctl enable --now deployer.timer"))
        }
        (load, ..) => fail(format!("is {load}; install it with contrib/install.sh")),
    })
}

/// The state that the last pass left, or what is wrong with it.
fn state_file() -> Result<State, Finding> {
    let found = if_there(fs_err::read(STATE_FILE)).map_err(|e| warn(crate::error::io_text(&e)))?;
    let bytes = found.ok_or_else(|| warn("there was none; systemctl start deployer"))?;
    let unreadable = |why| format!("{STATE_FILE} cannot be read: {why}; the next pass writes it anew");
    State::parse(&bytes).map_err(|why| fail(unreadable(why)))
}

/// What the last pass left: its state, and how its unit ended.
fn last_pass(now: Timestamp) -> Finding {
    let state = match state_file() {
        Ok(state) => state,
        Err(check) => return check,
    };
    let age = state.checked_at.age(now);
    let ended = systemd::properties("deployer.service", "Result,ExecMainStatus").unwrap_or_default();
    let result = ended.get("Result").map_or("", String::as_str);
    if now.0.saturating_sub(state.checked_at.0) > SILENT_SEC {
        return fail(format!("was {age} ago; see 'journalctl -u deployer'"));
    }
    if let Some(error) = &state.last_error {
        let why = printable(&error.reason);
        return fail(format!("{age} ago; passes have failed for {}: {why}", error.since.age(now)));
    }
    match (&state.manifest_error, state.exit_code()) {
        (Some(error), _) => warn(format!("{age} ago, from the last good manifest: {}", printable(error))),
        (None, Exit::Done) if matches!(result, "" | "success") => ok(format!("{age} ago, all well")),
        (None, Exit::Done) => warn(format!("ended with {result}; see 'journalctl -u deployer'")),
        (None, _) => warn(format!("{age} ago, something needs attention; see 'omni-deploy status'")),
    }
}

/// Whether Caddy can be told, and which of its servers gets our route: both by the deployer's own rule.
fn route(observed: &CaddyState, settings: &Settings, needed: bool) -> Vec<Check> {
    let bad = |why: &str| if needed { fail(why) } else { warn(why) };
    if let CaddyState::Unavailable(why) = observed {
        return vec![bad(why).of("caddy admin")];
    }
    let planned = caddy::first_route(settings.caddy_server.as_deref(), observed);
    let server = match (planned, observed.server_of_ours()) {
        (RoutePlan::Pending(why), _) => bad(&why),
        (_, Some(name)) => ok(format!("'{name}' has our route")),
        (RoutePlan::Write(requests), None) => {
            let steps: Vec<&str> = requests.iter().map(|r| r.what.as_str()).collect();
            ok(format!("the first route: {}", steps.join(", ")))
        }
        (RoutePlan::None | RoutePlan::Current, None) => ok("nothing to route"),
    };
    vec![admin(&settings.caddy_admin.now()).of("caddy admin"), server.of("caddy server")]
}

/// Who can change Caddy where it has just answered.
fn admin(at: &Endpoint) -> Finding {
    match at {
        Endpoint::Unix(path) => match admin::lets_in(path) {
            None => ok(format!("{at} answers, and root and Caddy's own user alone reach it")),
            Some(who) => warn(format!(
                "{at} answers, and {who} can change Caddy through it; have it in a folder that is closed to others \
                     (RuntimeDirectory=caddy, RuntimeDirectoryMode=0750)"
            )),
        },
        Endpoint::Tcp(..) => warn(format!(
            "{at} answers, and every user and service of this host can change Caddy through it; 'systemctl restart \
                 caddy' gives it the socket of contrib/install.sh; one before 2.7 wants 'admin unix/{}' in its \
                 Caddyfile's global options first",
            SOCKET
        )),
    }
}

/// What visitors of each domain meet.
fn domains(settings: &Settings, manifest: &Manifest, observed: &CaddyState) -> Vec<Check> {
    let state = state_file().ok();
    let check = |visit: Visit| Check {
        name: "domain",
        verdict: visit.verdict,
        text: format!("{}: {}", visit.domain, visit.text),
    };
    domains::of_host(&settings.host, manifest, state.as_ref(), observed).into_iter().map(check).collect()
}

/// Whether what the deployer tells Caddy survives Caddy's restart, and whether Caddy is started again.
fn caddy_unit() -> Result<Finding, RunError> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(warn("not looked at without systemd"));
    }
    let mut units = Vec::new();
    for unit in ["caddy.service", "caddy-api.service"] {
        let names = "Id,LoadState,ActiveState,Restart,ExecStart,ExecStartPre";
        units.push((unit, systemd::properties(unit, names)?));
    }
    let is = |shown: &BTreeMap<String, String>, name: &str, value: &str| {
        shown.get(name).is_some_and(|v| v == value)
    };
    units.retain(|(_, shown)| is(shown, "LoadState", "loaded"));
    let active = units.iter().find(|(_, shown)| is(shown, "ActiveState", "active"));
    let Some(&(unit, ref shown)) = active.or(units.first()) else {
        return Ok(warn("there is none: nothing starts Caddy at boot (Debian: apt install caddy)"));
    };
    let drop_in = "install the drop-in with contrib/install.sh";
    let start = shown.get("ExecStart").map_or("", String::as_str);
    Ok(if active.is_none() {
        fail(format!("{unit} is not active; systemctl enable --now {unit}"))
    } else if !start.split_whitespace().any(|word| word == "--resume") {
        warn(format!(
            "{unit} runs without --resume and forgets our route at a restart, until the next pass; {drop_in}"
        ))
    } else if shown.get("Restart").is_none_or(|r| r == "no") {
        warn(format!("{unit} has no Restart= and stays stopped after a crash; {drop_in}"))
    } else if unit == "caddy.service"
        && !shown.get("ExecStartPre").is_some_and(|pre| pre.contains("caddy-start"))
    {
        warn(format!(
            "{unit} resumes, so a restart does not take an edited Caddyfile ('systemctl reload caddy' does); {drop_in}"
        ))
    } else {
        ok(format!("{unit} resumes and restarts"))
    })
}

/// How requests move to another instance, with the Caddy that runs. Nothing to be said without one.
fn switching(root: &Root, observed: &CaddyState) -> Option<Finding> {
    let program = listeners::caddys_program()?;
    let tried = Trial::load(root).filter(|trial| trial.program == program).and_then(|trial| trial.port_files);
    let by_change =
        "a deploy with \"rollout\": \"overlap\" changes Caddy's configuration, which ends WebSockets";
    Some(match tried {
        _ if PortFiles::read(root).is_none() => warn(format!(
            "{by_change}: {} is missing, or not root's with mode 755, or has something else than files; remove it and install contrib/systemd/tmpfiles.d with contrib/install.sh",
            root.ports_in_force().display()
        )),
        Some(true) if observed.server_of_ours().is_some() && !observed.reads_ports() => warn(format!(
            "{by_change}: this Caddy reads ports from files, but its route has none; systemctl start deployer"
        )),
        Some(true) => ok("by files: a deploy does not change Caddy's configuration"),
        Some(false) => {
            ok(format!("by its configuration: {by_change}; Caddy 2.8 and later read ports from files"))
        }
        None => ok("not tried yet: the first pass with a service that has a domain finds out"),
    })
}

/// Without this, connections that wait in a listening socket which Caddy closes on a change are reset.
fn migrate_req(path: &Path) -> Finding {
    match fs_err::read_to_string(path) {
        Ok(text) if text.trim() == "1" => ok("1"),
        Ok(text) => warn(format!(
            "{}: a change of Caddy's routes resets some new connections; sysctl -w net.ipv4.tcp_migrate_req=1, and put it into /etc/sysctl.d",
            text.trim()
        )),
        Err(_) => warn(
            "this kernel has none (it came with 5.14): a change of Caddy's routes resets some new connections; upgrade it",
        ),
    }
}

/// The secrets of this host's services: whom they belong to and who may read them. Never what is in them.
fn secrets(host: &HostName, manifest: &Manifest) -> Vec<Finding> {
    let here = manifest.services.iter().filter(|s| s.hosts.contains(host));
    let of_each = here.flat_map(|s| secrets::files(s).into_iter().map(|file| (&s.name, file)));
    let files: Vec<(&ServiceName, SecretFile)> = of_each.collect();
    if files.is_empty() {
        return vec![ok("no service here has any")];
    }
    if !is_root() {
        return vec![warn("not looked at; run this as root")];
    }
    let mut dirs: Vec<&Path> = files.iter().filter_map(|(_, file)| Path::new(&file.path).parent()).collect();
    dirs.sort();
    dirs.dedup();
    let mut found: Vec<Finding> = dirs.iter().filter_map(|dir| secrets::secret_dir(dir).map(fail)).collect();
    for (name, file) in &files {
        match secret_file(name, file) {
            Some(why) => found.push(fail(why)),
            None => found.extend(misread(name, file).map(warn)),
        }
    }
    if found.is_empty() {
        found.push(ok(format!("files that only root can read: {}", files.len())));
    }
    found
}

/// What is wrong with a file of secrets: what the deployer would not start the service with.
fn secret_file(name: &ServiceName, file: &SecretFile) -> Option<String> {
    if let Err(why) = secrets::usable(name, Path::new(&file.path)) {
        return Some(why);
    }
    match secrets::illegible(name, file) {
        Ok(mistake) => mistake.map(|why| format!("secrets file {why}")),
        Err(e) => Some(crate::error::io_text(&e)),
    }
}

/// What a service is told otherwise than its file says.
fn misread(name: &ServiceName, file: &SecretFile) -> Option<String> {
    /// How many lines are named.
    const NAMED: usize = 5;
    let mistakes = secrets::misread(file).ok().filter(|mistakes| !mistakes.is_empty())?;
    let lines: Vec<String> = mistakes.iter().take(NAMED).map(ToString::to_string).collect();
    let more = mistakes.len().saturating_sub(NAMED);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    Some(format!(
        "secrets file {}: {}{more}; fix it with 'omni-deploy secrets edit {name}'",
        file.path,
        lines.join("; ")
    ))
}

/// How exposed the services are that run here, and which of them are reached over HTTP and could be confined.
/// Nothing of it is wrong: a program that generates code, or must be root, cannot have the strict profile.
fn exposed(state: &State, manifest: &Manifest) -> Finding {
    /// How many services are named.
    const NAMED: usize = 5;
    let mut known: Vec<(Exposure, &ServiceName)> =
        state.services.values().filter_map(|s| Some((s.exposure?, &s.name))).collect();
    known.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    let list = |some: &[&(Exposure, &ServiceName)]| {
        let named: Vec<String> = some.iter().take(NAMED).map(|(e, name)| format!("{name} {e}")).collect();
        let more = some.len().saturating_sub(NAMED);
        named.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
    };
    let all: Vec<&(Exposure, &ServiceName)> = known.iter().collect();
    let open: Vec<&(Exposure, &ServiceName)> = known
        .iter()
        .filter(|(exposure, name)| {
            let entry = manifest.service(name.as_str());
            *exposure >= Exposure::MEDIUM
                && entry.is_some_and(|s| s.http.is_some() && s.hosts.contains(&state.host))
        })
        .collect();
    ok(match open.first() {
        None if all.is_empty() => "not known of any service yet".into(),
        None => format!("from 0.0 to 10.0: {}", list(&all)),
        Some((_, name)) => format!(
            "from 0.0 to 10.0: {}; reached over HTTP and not below {}: {}; 'deploy-manifest set {name} \
                 hardening.profile=strict' confines one",
            list(&all),
            Exposure::MEDIUM,
            list(&open)
        ),
    })
}

fn unit_dir(dir: &Path) -> Finding {
    let at = dir.display();
    if !is_root() {
        return warn(format!("{at} not tried; run this as root"));
    }
    match writable(dir) {
        Ok(()) => ok(format!("{at} can be written")),
        Err(why) => fail(format!(
            "{at} cannot be written: {why}; set unitDir (NixOS: a folder of boot.extraSystemdUnitPaths)"
        )),
    }
}

/// Free space where closures and state go.
fn space(dir: &str) -> Finding {
    match rustix::fs::statvfs(dir) {
        Ok(of) => free(dir, of.f_bavail * of.f_frsize, of.f_ffree),
        Err(e) => warn(format!("of {dir} is not known: {e}; look with 'df {dir}'")),
    }
}

fn free(dir: &str, bytes: u64, inodes: u64) -> Finding {
    let text = format!("{dir} has {:.1} GiB free", bytes as f64 / f64::from(1 << 30));
    let remedy = "nix-collect-garbage -d frees what no root holds";
    if bytes < NO_SPACE {
        fail(format!("{text}; {remedy}"))
    } else if bytes < LOW_SPACE {
        warn(format!("{text}; {remedy}"))
    // File systems that make inodes as they go say 0.
    } else if (1..10_000).contains(&inodes) {
        warn(format!("{dir} has {} inodes free; {remedy}", inodes))
    } else {
        ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deployer::live::Verdict;
    use crate::secrets::FileFormat;
    use serde_json::{Value, json};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_server_that_gets_our_route_is_named_and_trouble_counts_when_it_is_needed() {
        let servers = |value: Value| match value {
            Value::Object(servers) => CaddyState::Servers(servers),
            other => panic!("{other}"),
        };
        let two = servers(json!({
            "srv0": {"listen": [":80"], "routes": []},
            "srv1": {"listen": [":443"], "routes": [{"@id": "deployer"}]}}));
        let plain = servers(json!({"srv0": {"listen": [":80"], "routes": []}}));
        let down = CaddyState::Unavailable("down".into());
        for (observed, configured, needed, verdict, word) in [
            (&two, None, true, Verdict::Ok, "'srv1' has our route"),
            (&two, Some("srv9"), true, Verdict::Fail, "srv0, srv1"),
            (&plain, None, true, Verdict::Ok, "on :443"),
            (&plain, Some("srv0"), true, Verdict::Ok, "to server 'srv0'"),
            (&down, None, true, Verdict::Fail, "down"),
            (&down, None, false, Verdict::Warn, "down"),
        ] {
            let mut settings = crate::config::load(&Default::default()).unwrap();
            settings.caddy_server = configured.map(String::from);
            let check = route(observed, &settings, needed).pop().unwrap();
            assert!(check.verdict == verdict && check.text.contains(word), "{check:?}");
        }
    }

    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn a_secrets_file_that_others_reach_comes_with_the_line_to_type() {
        let dir = tempfile::tempdir_in("/root").unwrap();
        let file = dir.path().join("ava.env");
        let link = dir.path().join("link.env");
        let secret_file = |path: &Path, form| {
            let file = SecretFile { path: path.to_str().unwrap().into(), form };
            super::secret_file(&ServiceName::parse("ava").unwrap(), &file)
        };
        assert!(secret_file(&file, FileFormat::Environment).unwrap().contains("missing"));
        fs_err::write(&file, "K=v").unwrap();
        let mode = |m| fs_err::set_permissions(&file, std::fs::Permissions::from_mode(m)).unwrap();
        for (m, well) in
            [(0o644, false), (0o640, false), (0o700, false), (0o4600, false), (0o600, true), (0o400, true)]
        {
            mode(m);
            let why = secret_file(&file, FileFormat::Environment);
            assert_eq!(why.is_none(), well, "{m:o}: {why:?}");
            assert!(well || why.unwrap().contains(&format!("chmod 600 {}", file.display())));
        }
        mode(0o600);
        fs_err::write(&file, "A=1\nexport K=hunter2").unwrap();
        let why = secret_file(&file, FileFormat::Environment).unwrap();
        assert!(why.contains("line 2 ") && !why.contains("hunter2"), "{why}");
        assert_eq!(secret_file(&file, FileFormat::Bytes), None);
        fs_err::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(secret_file(&link, FileFormat::Environment).unwrap().contains("symbolic link"));
        assert!(secret_file(dir.path(), FileFormat::Environment).unwrap().contains("not a regular file"));
    }

    #[test]
    fn services_reached_over_http_that_are_wide_open_are_named_with_the_line_to_type() {
        let entry = |name: &str, http: Value| json!({"name": name, "hosts": ["biz"], "artifact": {"storePath": "/nix/store/placeholder"}, "http": http});
        let http = |port: u16| json!({"domain": format!("d{port}.org"), "internalPort": port});
        let document = json!({"version": 1, "serial": 1, "generation": "2026-11-22T18:31:05Z", "services": [
            entry("web", http(1)), entry("job", json!(null)), entry("ava", http(2))]});
        let mode = crate::manifest::parse::Mode::Strict;
        let manifest = crate::manifest::parse::manifest(document.to_string().as_bytes(), mode).unwrap();
        let looked = |exposures: &[(&str, &str)]| {
            let service = |(name, exposure): &(&str, &str)| {
                let level: f64 = exposure.parse().unwrap();
                let path = "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-x";
                (
                    name.to_string(),
                    json!({"name": name, "storePath": path, "status": "running",
                    "since": "2026-11-22T18:31:05Z", "exposure": level}),
                )
            };
            let services: serde_json::Map<String, Value> = exposures.iter().map(service).collect();
            let state = json!({"version": 1, "host": "biz", "checkedAt": "2026-11-22T18:31:05Z",
                "services": services});
            exposed(&State::parse(state.to_string().as_bytes()).unwrap(), &manifest)
        };
        for (exposures, text) in [
            (&[][..], "not known of any service yet"),
            (
                &[("ava", "1.1"), ("job", "9.2"), ("web", "4.9")],
                "from 0.0 to 10.0: job 9.2, web 4.9, ava 1.1",
            ),
            (
                &[("ava", "1.1"), ("job", "9.2"), ("web", "5.0")],
                "from 0.0 to 10.0: job 9.2, web 5.0, ava 1.1; reached over HTTP and not below 5.0: web 5.0; \
                 'deploy-manifest set web hardening.profile=strict' confines one",
            ),
        ] {
            let check = looked(exposures);
            assert_eq!((check.verdict, check.text.as_str()), (Verdict::Ok, text));
        }
        let many: Vec<String> = (0..7).map(|n| format!("s{n}")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|n| (n.as_str(), "8.8")).collect();
        assert!(looked(&many).text.ends_with("s4 8.8 and 2 more"));
    }

    #[test]
    fn space_that_runs_out_is_said_before_it_does() {
        for (bytes, inodes, verdict) in [
            (81110257664, 16359128, Verdict::Ok),
            (81110257664, 0, Verdict::Ok),
            (81110257664, 12, Verdict::Warn),
            (1073741824, 16359128, Verdict::Warn),
            (1048576, 16359128, Verdict::Fail),
        ] {
            assert_eq!(free("/nix", bytes, inodes).verdict, verdict, "{bytes} {inodes}");
        }
    }

    #[test]
    fn a_kernel_switch_that_is_off_or_missing_is_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        assert_eq!(migrate_req(&path).verdict, Verdict::Warn);
        for (text, verdict) in [("0\n", Verdict::Warn), ("1\n", Verdict::Ok)] {
            fs_err::write(&path, text).unwrap();
            assert_eq!(migrate_req(&path).verdict, verdict);
        }
    }
}
