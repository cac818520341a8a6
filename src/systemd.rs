//! systemd: every call of systemctl, systemd-analyze and journalctl on the host, and the pure rule that says
//! whether a service came up.

mod analyze;
mod journal;

use crate::error::{Error, Result};
use crate::failpoint;
use crate::names::is_variable;
use crate::runner::{Output, Run, RunError};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where systemd looks for units and drop-ins besides our folder, what comes first winning (systemd.unit(5)). A
/// cheap look at these says whether systemd is to be asked; what it has loaded is for [`show`] to tell.
pub const UNIT_PATH: [&str; 13] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/run/systemd/generator.late",
];

/// How long systemctl may take for what it does at once, reload included.
const QUICK: Duration = Duration::from_secs(90);

pub use analyze::{Exposure, exposures, verify};
pub use journal::{Began, CUT, caddy_log, journal, last_line};

/// How long it may take where a person waits for the answer.
const LOOK: Duration = Duration::from_secs(20);

fn systemctl() -> Run {
    Run::new("systemctl").arg("--no-pager").arg("--no-ask-password")
}

/// A call for these units; None where there are none, which systemctl takes for all, or for a mistake.
fn call_for(units: &[String], args: &[&str]) -> Option<Run> {
    (!units.is_empty()).then(|| systemctl().args(args).arg("--").args(units).deadline(QUICK))
}

/// What `list-units` says of a unit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listed {
    /// `loaded`, `not-found`, `masked`, …
    pub load: String,
    /// `active`, `inactive`, `failed`, `activating`, …
    pub active: String,
    /// `running`, `dead`, `auto-restart`, …
    pub sub: String,
}

impl Listed {
    /// Up as far as systemd can tell.
    pub fn running(&self) -> bool {
        matches!(self.active.as_str(), "active" | "reloading") && self.sub == "running"
    }
}

/// The word for the state of the whole system, or what was said instead. `systemctl` exits with 1 for anything but
/// `running`.
pub fn system_state() -> Result<String, RunError> {
    let output = systemctl().arg("is-system-running").deadline(LOOK).output()?;
    let text = output.text();
    Ok(if text.trim().is_empty() { output.stderr.trim() } else { text.trim() }.to_string())
}

/// The units that failed, which may be anybody's; none where systemd does not say.
pub fn failed_units() -> Vec<String> {
    let run = systemctl().args(["list-units", "--failed", "--plain", "--no-legend"]).deadline(LOOK);
    let text = run.success().map(|output| output.text()).unwrap_or_default();
    text.lines().filter_map(|line| Some(line.split_whitespace().next()?.to_string())).collect()
}

/// Properties of a unit, by their names.
pub fn properties(unit: &str, names: &str) -> Result<BTreeMap<String, String>, RunError> {
    let text = systemctl().args(["show", "--property", names, "--", unit]).deadline(QUICK).success()?.text();
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Ok(pairs.map(|(name, value)| (name.to_string(), value.to_string())).collect())
}

/// The values of one property, of which a unit may have several; none where systemd does not say.
pub fn values(unit: &str, property: &str) -> Vec<String> {
    let run = systemctl().args(["show", "--value", "--property", property, "--", unit]).deadline(QUICK);
    let text = run.success().map(|output| output.text()).unwrap_or_default();
    text.lines().map(String::from).collect()
}

/// Whether a unit is active, as far as systemd can be asked.
pub fn is_active(unit: &str) -> bool {
    let run = systemctl().args(["--quiet", "is-active", "--", unit]).deadline(LOOK);
    run.output().is_ok_and(|output| output.status.ok())
}

/// Every service unit that systemd has in memory, by unit name.
pub fn list_units() -> Result<BTreeMap<String, Listed>> {
    let output = systemctl()
        .args(["list-units", "--type=service", "--all", "--full", "--plain", "--no-legend"])
        .deadline(QUICK)
        .success()?;
    Ok(parse_list(&output.text()))
}

fn parse_list(text: &str) -> BTreeMap<String, Listed> {
    let unit = |line: &str| {
        let mut words = line.split_whitespace().map(String::from);
        let unit = words.next()?;
        Some((unit, Listed { load: words.next()?, active: words.next()?, sub: words.next()? }))
    };
    text.lines().filter_map(unit).collect()
}

/// What `show` says of a unit: the properties the rule looks at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Shown {
    /// `loaded`, `not-found`, `bad-setting`, `masked`, …
    pub load: String,
    /// `active`, `inactive`, …
    pub active: String,
    /// `running`, `auto-restart`, …
    pub sub: String,
    /// `success`, `exit-code`, `resources`, …
    pub result: String,
    /// How often systemd restarted it by itself since it was started.
    pub restarts: u32,
    /// The invocation's id; another one is another start.
    pub invocation: String,
    /// Its main process.
    pub main_pid: u32,
    /// How the main process ended (`1` exited, `2` killed, `3` dumped core), if it did.
    pub exec_code: u32,
    /// Its exit code or signal.
    pub exec_status: i32,
    /// Its files are newer than what systemd has read.
    pub needs_reload: bool,
    /// What systemd would start (`ExecStart=`).
    pub command: String,
    /// Every name of the unit: one that is an alias belongs to another unit.
    pub names: Vec<String>,
    /// The file it was loaded from.
    pub fragment: Option<PathBuf>,
    /// What a generator made that file from.
    pub source: Option<PathBuf>,
    /// The drop-ins that were loaded with it.
    pub drop_ins: Vec<PathBuf>,
}

impl Shown {
    /// The program that systemd would start: `{ path=PROGRAM ; argv[]=… }`.
    pub fn program(&self) -> Option<&Path> {
        let rest = self.command.strip_prefix("{ path=")?;
        Some(Path::new(rest.split(" ; argv[]=").next()?))
    }

    /// What is loaded in place of a unit whose `file` starts `program`: another file's unit, or a drop-in that has
    /// another program started. None when a start would start that program.
    pub fn replaced(&self, file: &Path, program: &Path) -> Option<String> {
        if self.load != "loaded" {
            return None;
        }
        let fragment = self.fragment.as_deref().filter(|f| *f != file && !same_file(f, file));
        match (fragment, self.program()) {
            (Some(other), _) => Some(format!("systemd has loaded {} in place of its unit", other.display())),
            (None, Some(other)) if other != program => {
                Some(format!("its unit, as systemd has loaded it, starts {}", other.display()))
            }
            (None, None) => Some("its unit, as systemd has loaded it, starts nothing".into()),
            (None, Some(_)) => None,
        }
    }
}

/// Whether two paths lead to one file.
pub fn same_file(a: &Path, b: &Path) -> bool {
    match (fs_err::metadata(a), fs_err::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Whether a drop-in is of the host's own making and for all services alike: below /usr/lib it comes with a package,
/// below /run a generator made it at boot (containers have one). What an administrator says of all services is in
/// /etc or /usr/local, and what is said of one service is said of ours.
pub fn is_vendor_drop_in(path: &Path) -> bool {
    path.parent().and_then(Path::file_name).is_some_and(|dir| dir == "service.d")
        && ["/usr/lib", "/lib", "/run"].iter().any(|vendor| path.starts_with(vendor))
}

/// The properties of some units; those systemd knows nothing of are shown as `not-found`.
pub fn show(units: &[String]) -> Result<BTreeMap<String, Shown>> {
    const PROPERTIES: &str = "--property=Id,LoadState,ActiveState,SubState,Result,NRestarts,InvocationID,MainPID,\
        ExecMainCode,ExecMainStatus,NeedDaemonReload,ExecStart,Names,FragmentPath,SourcePath,DropInPaths";
    let Some(run) = call_for(units, &["show", PROPERTIES]) else { return Ok(BTreeMap::new()) };
    Ok(parse_show(&run.success()?.text()))
}

fn parse_show(text: &str) -> BTreeMap<String, Shown> {
    let mut units = BTreeMap::new();
    for block in blocks(text) {
        let value = |key: &str| block.get(key).copied().unwrap_or_default();
        let text = |key| value(key).to_string();
        let file = |key| Some(value(key)).filter(|path| !path.is_empty()).map(PathBuf::from);
        let shown = Shown {
            load: text("LoadState"),
            active: text("ActiveState"),
            sub: text("SubState"),
            result: text("Result"),
            restarts: value("NRestarts").parse().unwrap_or(0),
            invocation: text("InvocationID"),
            main_pid: value("MainPID").parse().unwrap_or(0),
            exec_code: value("ExecMainCode").parse().unwrap_or(0),
            exec_status: value("ExecMainStatus").parse().unwrap_or(0),
            needs_reload: value("NeedDaemonReload") == "yes",
            command: text("ExecStart"),
            names: value("Names").split_whitespace().map(String::from).collect(),
            fragment: file("FragmentPath"),
            source: file("SourcePath"),
            drop_ins: value("DropInPaths").split_whitespace().map(PathBuf::from).collect(),
        };
        // Asked for by an alias, it is found by that as well.
        for name in shown.names.iter().map(String::as_str).chain(block.get("Id").copied()) {
            units.insert(name.to_string(), shown.clone());
        }
    }
    units
}

/// The invocation's id of an active unit, from the link that systemd keeps for its journal and makes anew with
/// every start; None where there is none.
pub fn invocation(unit: &str) -> Option<String> {
    let link = Path::new("/run/systemd/units").join(format!("invocation:{unit}"));
    fs_err::read_link(link).ok()?.to_str().map(String::from)
}

/// When a unit was last started, in seconds and nanoseconds: by the same link.
pub fn started(unit: &str) -> Option<(i64, i64)> {
    let link = Path::new("/run/systemd/units").join(format!("invocation:{unit}"));
    fs_err::symlink_metadata(link).ok().map(|m| (m.mtime(), m.mtime_nsec()))
}

/// Whether a unit that ended waits for systemd to start it again, by its `SubState`.
pub fn is_between_starts(sub: &str) -> bool {
    sub.starts_with("auto-restart")
}

/// What the rule says of a service that was just started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CameUp {
    /// Nothing speaks against it, but it is not running or not well yet.
    NotYet(String),
    /// Running and well; it must stay so for the settle time.
    Well,
    /// It cannot recover by itself.
    No(String),
}

/// The rule, for one look: `first` is what the first look after the start saw, `probe` the health probe's
/// answer (None where there is nothing to probe).
pub fn came_up(first: Option<&Shown>, now: &Shown, probe: Option<&Result<(), String>>) -> CameUp {
    let ended = || match (now.exec_code, now.exec_status) {
        (1, code) => format!("its process exited with code {code}"),
        (2 | 3, signal) => format!("its process was ended by signal {signal}"),
        _ => format!("systemd's result is '{}'", now.result),
    };
    if now.load != "loaded" {
        return CameUp::No(format!("systemd did not load its unit (LoadState={})", now.load));
    }
    match (now.active.as_str(), now.sub.as_str()) {
        // Since systemd 254 it may be `auto-restart-queued` for a moment.
        (_, sub) if is_between_starts(sub) => {
            return CameUp::No(format!("{}, and systemd is about to restart it", ended()));
        }
        ("failed", _) => return CameUp::No(ended()),
        ("inactive" | "deactivating", _) => {
            return CameUp::No(format!("it does not keep running: {}", ended()));
        }
        _ => {}
    }
    if now.restarts > 0 {
        return CameUp::No(format!("it crashed and was restarted {} time(s): {}", now.restarts, ended()));
    }
    if let Some(first) = first
        && !first.invocation.is_empty()
        && (first.invocation != now.invocation || (first.main_pid != 0 && first.main_pid != now.main_pid))
    {
        return CameUp::No("its process was replaced while it was being watched".into());
    }
    if (now.active.as_str(), now.sub.as_str()) != ("active", "running") {
        return CameUp::NotYet(format!("it is {}/{}", now.active, now.sub));
    }
    match probe {
        Some(Err(why)) => CameUp::NotYet(why.clone()),
        Some(Ok(())) | None => CameUp::Well,
    }
}

/// Whether systemd itself listens on a port for a unit, which it starts and hands the socket to (systemd.socket(5)).
pub fn listens_for(unit: &str, port: u16) -> bool {
    let listens = format!(":{port} (Stream)");
    let triggers = values(unit, "TriggeredBy").join(" ");
    let mut sockets = triggers.split_whitespace().filter(|unit| unit.ends_with(".socket"));
    sockets.any(|socket| values(socket, "Listen").iter().any(|line| line.ends_with(&listens)))
}

/// The names of the variables that the manager gives every service it starts, but those that every system has: the
/// path, the language, and where NixOS keeps locales and time zones.
pub fn given_to_all() -> Result<Vec<String>> {
    let output = systemctl().arg("show-environment").deadline(QUICK).success()?;
    let usual = |name: &str| {
        matches!(name, "PATH" | "LANG" | "LANGUAGE" | "TZ" | "TZDIR" | "LOCALE_ARCHIVE")
            || name.starts_with("LC_")
    };
    let text = output.text();
    let names = text.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name);
    let names = names.filter(|name| is_variable(name) && !usual(name));
    let mut names: Vec<String> = names.map(String::from).collect();
    if !names.is_empty() {
        // What the system's configuration names is meant, and comes again with the next boot.
        let run = Run::new("systemd-analyze").args(["cat-config", "systemd/system.conf"]).deadline(QUICK);
        let configured = run.success().map(|output| output.text()).unwrap_or_default();
        names.retain(|name| !configures(&configured, name));
    }
    Ok(names)
}

/// Whether a system.conf has a variable in its ManagerEnvironment= (systemd-system.conf(5)).
fn configures(text: &str, name: &str) -> bool {
    let lines = text.lines().filter_map(|line| line.trim_start().strip_prefix("ManagerEnvironment="));
    let words = lines.flat_map(str::split_whitespace);
    words.filter_map(|word| word.trim_start_matches(['"', '\'']).split_once('=')).any(|(key, _)| key == name)
}

/// What is said of them, which are names of variables ([`crate::deployer::state::State::manager_environment`]). Never a value.
pub fn given_text(names: &[String]) -> String {
    format!(
        "systemd gives every service it starts {}, which no manifest names; 'sudo systemctl unset-environment {}' takes \
         it back for the next start of each; to keep it, name it in ManagerEnvironment= of /etc/systemd/system.conf",
        names.join(", "),
        names.join(" ")
    )
}

/// Makes systemd read unit files again.
pub fn daemon_reload() -> Result<()> {
    let _effect = failpoint::mark("systemctl", "daemon-reload");
    systemctl().arg("daemon-reload").deadline(QUICK).success()?;
    Ok(())
}

/// Forgets failures and start counts, so that our own starts do not trip the start limit. Units that are not
/// loaded make systemctl complain, which is no news: only loaded ones may be given.
pub fn reset_failed(units: &[String]) -> Result<()> {
    let Some(run) = call_for(units, &["reset-failed"]) else { return Ok(()) };
    let _effect = failpoint::mark("systemctl reset-failed", format_args!("{units:?}"));
    let output = run.output()?;
    if !output.status.ok() && !output.stderr.contains("not loaded") {
        return Err(Error::new(format!("systemctl reset-failed: {}", output.stderr.trim())));
    }
    Ok(())
}

/// What came of asking for restarts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Restarted {
    /// systemctl's complaint, if it has one.
    pub complaint: Option<String>,
    /// Those that are not through yet, with which systemd goes on.
    pub busy: BTreeSet<String>,
}

/// Restarts units in one call, and waits for `within`. A unit that fails makes systemctl fail but not the others
/// start less: what became of each is for [`show`] to tell, so the call's complaint is returned as a text.
pub fn restart(units: &[String], within: Duration) -> Result<Restarted> {
    let Some(run) = call_for(units, &["restart"]) else { return Ok(Restarted::default()) };
    let _effect = failpoint::mark("systemctl restart", format_args!("{units:?}"));
    let before: Vec<Option<String>> = units.iter().map(|unit| invocation(unit)).collect();
    match run.deadline(within).output() {
        Ok(output) if output.status.ok() => Ok(Restarted::default()),
        Ok(output) => Ok(Restarted { complaint: Some(output.stderr.trim().into()), ..Restarted::default() }),
        Err(RunError::Deadline { .. }) => {
            let mut busy = busy(units)?;
            // systemctl asks for one after the other, and on a host that is slow has not come to the last by then. That
            // those did not start is no fault of theirs.
            let same = |(unit, before): &(&String, &Option<String>)| invocation(unit) == **before;
            let unasked = units.iter().zip(&before).filter(|(unit, _)| !busy.contains(*unit)).filter(same);
            let unasked: Vec<String> = unasked.map(|(unit, _)| unit.clone()).collect();
            if let Some(ask) = call_for(&unasked, &["restart", "--no-block"]) {
                // Of those that are not asked for again either, the next look says that they do not run.
                match ask.output() {
                    Ok(_) | Err(RunError::Deadline { .. }) => busy.extend(unasked),
                    Err(e) => return Err(e.into()),
                }
            }
            Ok(Restarted { complaint: None, busy })
        }
        Err(e) => Err(e.into()),
    }
}

/// Stops units in one call, and waits for `within`; those that are not stopped then, with which systemd goes on.
pub fn stop(units: &[String], within: Duration) -> Result<BTreeSet<String>> {
    let Some(run) = call_for(units, &["stop"]) else { return Ok(BTreeSet::new()) };
    let _effect = failpoint::mark("systemctl stop", format_args!("{units:?}"));
    match run.deadline(within).output() {
        Ok(output) if output.status.ok() || output.stderr.contains("not loaded") => Ok(BTreeSet::new()),
        Ok(output) => {
            let (status, said) = (output.status, output.stderr.trim());
            Err(Error::new(format!("systemctl stop failed with {status}: {said}")))
        }
        Err(RunError::Deadline { .. }) => busy(units),
        Err(e) => Err(e.into()),
    }
}

/// Stops those of `units`, which have ended and wait for systemd to start them again, that nothing else is stopped with:
/// once systemd has read a new unit it would start that by itself, and whoever restarts it once more.
pub fn stop_waiting(units: &[String]) -> Result<()> {
    // What a stop reaches besides (systemd.unit(5)).
    const REACHED: &str = "--property=Id,RequiredBy,RequisiteOf,BoundBy,ConsistsOf,PropagatesStopTo";
    let Some(run) = call_for(units, &["show", REACHED]) else { return Ok(()) };
    let alone = stopped_alone(&run.success()?.text());
    // How far that has come within this time does not matter to what follows.
    stop(&alone, QUICK).map(drop)
}

fn stopped_alone(text: &str) -> Vec<String> {
    let alone = blocks(text).filter_map(|mut unit| {
        let id = unit.remove("Id")?;
        unit.values().all(|others| others.is_empty()).then(|| id.to_string())
    });
    alone.collect()
}

/// What `show` prints of several units: the properties of each.
fn blocks(text: &str) -> impl Iterator<Item = BTreeMap<&str, &str>> {
    text.split("\n\n").map(|block| block.lines().filter_map(|line| line.split_once('=')).collect())
}

/// Those of `units` with which systemd is not through: there is a job for them, or their processes are ending.
pub fn busy(units: &[String]) -> Result<BTreeSet<String>> {
    let jobs =
        systemctl().args(["list-jobs", "--full", "--plain", "--no-legend"]).deadline(QUICK).success()?;
    let jobs = jobs.text();
    // Job, unit, type, state.
    let mut busy: BTreeSet<&str> = jobs.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    let listed = list_units()?;
    busy.extend(listed.iter().filter(|(_, l)| l.active == "deactivating").map(|(unit, _)| unit.as_str()));
    Ok(units.iter().filter(|unit| busy.contains(unit.as_str())).cloned().collect())
}

/// Starts a unit without waiting for it.
pub fn start_without_waiting(unit: &str) -> Result<Output> {
    Ok(systemctl().args(["start", "--no-block", unit]).deadline(QUICK).output()?)
}

/// Whether systemd has something to do for a unit, or is at it.
pub fn under_way(unit: &str) -> Result<bool> {
    let shown = properties(unit, "ActiveState,Job")?;
    let value = |name: &str| shown.get(name).map_or("", String::as_str);
    Ok(!matches!(value("Job"), "" | "0")
        || matches!(value("ActiveState"), "activating" | "reloading" | "deactivating"))
}

/// How long systemd lets units take to stop, by what it has loaded (`TimeoutStopSec=`, or the manager's
/// `DefaultTimeoutStopSec=`); None: without end.
pub fn stop_timeouts(units: &[String]) -> Result<BTreeMap<String, Option<Duration>>> {
    let run = call_for(units, &["show", "--property=Id,TimeoutStopUSec"]);
    let Some(run) = run else { return Ok(BTreeMap::new()) };
    let text = run.success()?.text();
    let timeout = |unit: BTreeMap<&str, &str>| {
        Some((unit.get("Id")?.to_string(), time_span(unit.get("TimeoutStopUSec")?)))
    };
    Ok(blocks(&text).filter_map(timeout).collect())
}

/// A length of time as systemd shows it (systemd.time(7)), as `1min 30s`; None: `infinity`, or nothing we know.
fn time_span(text: &str) -> Option<Duration> {
    let mut whole = Duration::ZERO;
    for word in text.split_whitespace() {
        let digits = word.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(word.len());
        let number: f64 = word[..digits].parse().ok()?;
        let unit = match &word[digits..] {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            "w" => 604_800.0,
            "month" => 2_629_800.0,
            "y" => 31_557_600.0,
            _ => return None,
        };
        whole += Duration::try_from_secs_f64(number * unit).ok()?;
    }
    Some(whole)
}

/// What systemctl had to say of one unit, when its call could not even begin to start it: a unit that it requires
/// is not there, or failed.
pub fn could_not_start(complaint: Option<&str>, unit: &str) -> Option<String> {
    let of_it = [format!("Failed to restart {unit}: "), format!("A dependency job for {unit} failed")];
    let line = complaint?.lines().find(|line| of_it.iter().any(|start| line.starts_with(start)))?;
    Some(line.split(". ").next().unwrap_or(line).trim_end_matches('.').to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Shown {
        Shown {
            load: "loaded".into(),
            active: "active".into(),
            sub: "running".into(),
            result: "success".into(),
            invocation: "abc".into(),
            main_pid: 7,
            ..Shown::default()
        }
    }

    #[test]
    fn a_length_of_time_is_read_as_systemd_shows_it() {
        for (text, seconds) in [
            ("1min 30s", Some(90.0)),
            ("7min", Some(420.0)),
            ("1h", Some(3600.0)),
            ("1d 2h 3min 4s 500ms", Some(93_784.5)),
            ("infinity", None),
            ("0", None),
        ] {
            assert_eq!(time_span(text).map(|d| d.as_secs_f64()), seconds, "{text}");
        }
    }

    #[test]
    fn what_systemctl_says_of_one_unit_is_told_apart_from_its_neighbours() {
        let said = "Failed to restart b.service: Unit nosuch.service not found.\n\
                    A dependency job for c.service failed. See 'journalctl -xe' for details.\n\
                    Job for d.service failed because the control process exited with error code.\n";
        for (unit, want) in [
            ("b.service", Some("Failed to restart b.service: Unit nosuch.service not found")),
            ("c.service", Some("A dependency job for c.service failed")),
            ("d.service", None),
            ("ab.service", None),
        ] {
            assert_eq!(could_not_start(Some(said), unit).as_deref(), want);
        }
        assert_eq!(could_not_start(None, "b.service"), None);
    }

    #[test]
    fn a_service_came_up_only_when_nothing_speaks_against_it() {
        let first = running();
        assert_eq!(came_up(Some(&first), &running(), None), CameUp::Well);
        assert_eq!(came_up(Some(&first), &running(), Some(&Ok(()))), CameUp::Well);
        assert_eq!(
            came_up(Some(&first), &running(), Some(&Err("refused".into()))),
            CameUp::NotYet("refused".into())
        );
        let starting = Shown { active: "activating".into(), sub: "start".into(), ..running() };
        assert!(matches!(came_up(None, &starting, None), CameUp::NotYet(_)));
        for hopeless in [
            Shown { load: "not-found".into(), ..running() },
            Shown { load: "bad-setting".into(), ..running() },
            Shown { active: "activating".into(), sub: "auto-restart".into(), ..running() },
            Shown { active: "activating".into(), sub: "auto-restart-queued".into(), ..running() },
            Shown { active: "failed".into(), sub: "failed".into(), ..running() },
            Shown { active: "inactive".into(), sub: "dead".into(), ..running() },
            Shown { restarts: 1, ..running() },
            Shown { invocation: "def".into(), ..running() },
            Shown { main_pid: 8, ..running() },
        ] {
            assert!(matches!(came_up(Some(&first), &hopeless, Some(&Ok(()))), CameUp::No(_)), "{hopeless:?}");
        }
    }

    #[test]
    fn the_exit_code_is_in_the_reason() {
        let dead = Shown {
            active: "activating".into(),
            sub: "auto-restart".into(),
            exec_code: 1,
            exec_status: 42,
            ..running()
        };
        let CameUp::No(why) = came_up(None, &dead, None) else { panic!("came up") };
        assert!(why.contains("code 42"), "{why}");
    }

    #[test]
    fn what_is_loaded_in_place_of_a_unit_is_told_by_its_file_and_its_program() {
        let shown = |fragment: &str, command: &str| Shown {
            fragment: Some(fragment.into()),
            command: command.into(),
            ..running()
        };
        let start =
            |program: &str| format!("{{ path={program} ; argv[]={program} --x ; ignore_errors=no ; pid=0 }}");
        let (file, program) = (Path::new("/u/ava.service"), Path::new("/nix/store/a b/bin/ava"));
        let ours = start("/nix/store/a b/bin/ava");
        assert_eq!(shown("/u/ava.service", &ours).replaced(file, program), None);
        for (fragment, command, word) in [
            ("/u/ava.service", start("/usr/bin/strace"), "starts /usr/bin/strace"),
            ("/run/systemd/generator.early/ava.service", ours.clone(), "generator.early"),
            ("/u/ava.service", String::new(), "starts nothing"),
        ] {
            let why = shown(fragment, &command).replaced(file, program).unwrap();
            assert!(why.contains(word), "{why}");
        }
        let absent = Shown { load: "not-found".into(), ..shown("/u/ava.service", "") };
        assert_eq!(absent.replaced(file, program), None);
    }

    #[test]
    fn only_drop_ins_for_all_services_that_no_administrator_wrote_are_the_hosts_own() {
        for (path, own) in [
            ("/usr/lib/systemd/system/service.d/10-timeout-abort.conf", true),
            ("/run/systemd/system/service.d/zzz-lxc-service.conf", true),
            ("/etc/systemd/system/service.d/all.conf", false),
            ("/usr/local/lib/systemd/system/service.d/all.conf", false),
            ("/usr/lib/systemd/system/ava.service.d/x.conf", false),
            ("/run/systemd/system.control/ava.service.d/50-CPUQuota.conf", false),
        ] {
            assert_eq!(is_vendor_drop_in(Path::new(path)), own, "{path}");
        }
    }

    #[test]
    fn what_something_else_would_be_stopped_with_is_known() {
        let shown = "Id=a.service\nRequiredBy=\nBoundBy=\nConsistsOf=\nPropagatesStopTo=\n\n\
                     Id=b.service\nRequiredBy=c.service d.service\nBoundBy=\n\nId=c.service\n\n";
        assert_eq!(stopped_alone(shown), ["a.service", "c.service"]);
        assert_eq!(stopped_alone(""), [""; 0]);
    }

    #[test]
    fn the_lists_of_systemctl_are_read() {
        let list = parse_list(
            "ava.service loaded active running ava (deployed)\nx.service not-found inactive dead x\n",
        );
        assert!(list["ava.service"].running());
        assert_eq!(list["x.service"].load, "not-found");
        let shown = parse_show(
            "Id=a.service\nLoadState=loaded\nNRestarts=2\nMainPID=5\n\nId=b.service\nResult=exit-code\n",
        );
        assert_eq!((shown["a.service"].restarts, shown["a.service"].main_pid), (2, 5));
        assert_eq!(shown["b.service"].result, "exit-code");
    }
}
