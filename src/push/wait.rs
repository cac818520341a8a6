//! After a push: starts the deployer on the services' hosts and follows each until it runs what was pushed, has
//! rejected it, or has not answered in time. It reads the hosts' state and starts a unit; it changes nothing
//! else, and never believes that a start which returned was a pass that saw this push.

use crate::config::Settings;
use crate::deployer::live::{LiveState, StartResult, Unit};
use crate::deployer::state::{ServicePhase, ServiceState, State};
use crate::error::{Error, Exit, Result};
use crate::log;
use crate::manifest::versions;
use crate::names::{HostName, ServiceName, StorePath};
use crate::parallel;
use crate::runner::{ProcessStatus as Ended, tail};
use crate::ssh;
use crate::status::hint;
use crate::status::judge::ServiceStatus;
use crate::status::reports::{self, With};
use crate::store::Store;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How often a host may fail to answer, or to get anywhere, before it is given up.
const TRIES: u32 = 3;
/// What systemctl exits with when there is no such unit (systemctl(1)).
const NO_UNIT: i32 = 5;
/// How long a host may take to say how its deployer ended.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// What is followed on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shipped {
    /// The service.
    pub name: ServiceName,
    /// What is to run.
    pub path: StorePath,
    /// The digest of the entry that was published ([`crate::manifest::entry`]).
    pub entry: Option<String>,
}

/// What a service came to on one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// What was pushed runs.
    Running,
    /// The host works from a version that somebody published after this push, and runs what that names.
    Superseded(Newer),
    /// The host has seen it, and it does not run.
    Off(Off),
    /// It is published, and the host has not taken it up: why.
    Pending(String),
    /// Nobody can tell.
    Unknown(String),
}

/// A version that came after this push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newer {
    /// Its number.
    pub serial: u64,
    /// Who published it, and what it changed; empty until the store was asked.
    pub by: String,
    /// What it changed.
    pub action: String,
}

/// Why a host does not run what was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Off {
    /// The word that `status` has for it.
    pub status: ServiceStatus,
    /// Whether nothing runs, against somebody's will.
    pub down: bool,
    /// The host's reason.
    pub reason: String,
    /// The service's last lines.
    pub journal: Vec<String>,
}

impl Outcome {
    /// The word in the output; the same as in `status`, but for `superseded`.
    pub fn word(&self) -> String {
        let status = match self {
            Outcome::Superseded(_) => return "superseded".into(),
            Outcome::Running => ServiceStatus::Running,
            Outcome::Off(off) => off.status,
            Outcome::Pending(_) => ServiceStatus::Pending,
            Outcome::Unknown(_) => ServiceStatus::Unknown,
        };
        status.to_string()
    }
}

/// The exit code that outcomes stand for: 4 when a service is down, else 3 when a host runs another version of one,
/// else 1 when a host has not taken it up or could not tell.
pub fn exit_code<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> Exit {
    let exit = |outcome: &Outcome| match outcome {
        Outcome::Running | Outcome::Superseded(_) => Exit::Done,
        Outcome::Pending(_) | Outcome::Unknown(_) => Exit::Failed,
        Outcome::Off(Off { down: false, .. }) => Exit::Degraded,
        Outcome::Off(Off { down: true, .. }) => Exit::Down,
    };
    outcomes.into_iter().map(exit).max().unwrap_or(Exit::Done)
}

/// What a host's state says of a pushed service; None when its passes have not seen that version yet. `store` is the
/// identity of the one that was published to. Pure.
pub fn judge(state: &State, shipped: &Shipped, serial: u64, store: &str) -> Option<Outcome> {
    let Shipped { name, path, entry } = shipped;
    if let Some(theirs) = state.store.as_ref().filter(|s| *s != store) {
        return Some(Outcome::Unknown(format!(
            "{} reads {theirs}, you published to {store}; correct 'store' here ('omni-deploy config') or in \
             /etc/omni-deploy/config.json there",
            state.host
        )));
    }
    let seen = state.serial.filter(|s| *s >= serial);
    if let Some(failed) = &state.last_error {
        let why = format!("its last pass failed: {}", failed.reason);
        // What it says of services is from before.
        return Some(if seen.is_some() { Outcome::Unknown(why) } else { Outcome::Pending(why) });
    }
    let seen = seen?;
    let superseded = || Outcome::Superseded(Newer { serial: seen, by: String::new(), action: String::new() });
    let Some(found) = state.services.get(name) else {
        return Some(if seen > serial {
            superseded()
        } else {
            Outcome::Unknown(format!(
                "its deployer does not count {name} among its own; is its 'host' ({}) the name in 'hosts'?",
                state.host
            ))
        });
    };
    let ServiceState { store_path, status, failure, .. } = found;
    let attempted = failure.as_ref().and_then(|f| f.attempted.as_ref());
    let runs = store_path.as_ref();
    let attention = found.attention().map_or(String::new(), |text| format!("; {text}"));
    let off = |status: ServiceStatus, otherwise: String| {
        let down = runs.is_none() && status != ServiceStatus::Stopped;
        let (reason, journal) =
            failure.as_ref().map_or((otherwise, vec![]), |f| (f.reason.clone(), f.journal.clone()));
        let nothing = if down { "; nothing runs" } else { "" };
        Outcome::Off(Off { status, down, reason: format!("{reason}{attention}{nothing}"), journal })
    };
    let another_entry = matches!((&found.entry, entry), (Some(theirs), Some(ours)) if theirs != ours);
    Some(match status {
        // The path is the same and the rest is not: somebody changed the rest since.
        ServicePhase::Running if runs == Some(path) && another_entry && seen > serial => superseded(),
        ServicePhase::Running if runs == Some(path) && another_entry => {
            Outcome::Unknown("it works from another entry of that version; run it again".into())
        }
        // As in `status`: it runs, and not as its unit says.
        ServicePhase::Running if runs == Some(path) => match found.attention() {
            Some(reason) => {
                Outcome::Off(Off { status: ServiceStatus::Running, down: false, reason, journal: Vec::new() })
            }
            None => Outcome::Running,
        },
        // Somebody pushed in between: what the host says is about their version.
        _ if seen > serial && attempted.is_none_or(|a| a != path) && runs != Some(path) => superseded(),
        ServicePhase::Running if found.pinned_since.is_some() => off(
            ServiceStatus::Pinned,
            format!("it is held at an earlier path; it moves with 'deployer rollback --unpin {name}'"),
        ),
        ServicePhase::Running => off(
            ServiceStatus::Differs,
            format!("it runs {} instead", runs.map_or("nothing", StorePath::as_str)),
        ),
        ServicePhase::Stopped => {
            let until = found.paused_until.map(|t| format!(" until {t}")).unwrap_or_default();
            off(
                ServiceStatus::Stopped,
                format!(
                    "it is paused{until}; this version is published, and starts with 'deployer resume {name}'"
                ),
            )
        }
        ServicePhase::Failed => off(ServiceStatus::Failed, "the host gives no reason".into()),
        ServicePhase::Rejected => off(ServiceStatus::Rejected, "the host gives no reason".into()),
        ServicePhase::Waiting => off(ServiceStatus::Waiting, "it waits for its first push".into()),
    })
}

/// Who published a version that a host has seen, as this store knows it: a number alone may be another store's.
fn name_newer(store: &dyn Store, host: &HostName, outcome: Outcome) -> Outcome {
    let Outcome::Superseded(newer) = outcome else { return outcome };
    let find = || -> Result<Option<versions::VersionHead>> {
        let all = versions::all(store)?;
        let Some(version) = all.iter().find(|v| v.serial == newer.serial) else { return Ok(None) };
        Ok(versions::head(store, &version.key())?.filter(|h| h.serial == newer.serial))
    };
    // One that is replaced at this moment is in neither place for whoever looks at one after the other.
    let found = find().and_then(|head| if head.is_some() { Ok(head) } else { find() });
    match found {
        Ok(Some(head)) => {
            Outcome::Superseded(Newer { by: head.change.by, action: head.change.action, ..newer })
        }
        Ok(None) => Outcome::Unknown(format!(
            "{host} has worked from version {}, which is not in {}: it reads another store; compare 'store' here \
             ('omni-deploy config') and in /etc/omni-deploy/config.json there",
            newer.serial,
            store.url()
        )),
        Err(e) => Outcome::Unknown(format!("{host} has seen version {}: {e}", newer.serial)),
    }
}

/// Follows all hosts at once until each has an answer or `timeout` is over. The outcomes come by service and
/// host.
pub fn follow(
    settings: &Settings,
    hosts: &BTreeMap<HostName, Vec<Shipped>>,
    serial: u64,
    timeout: Duration,
) -> Result<BTreeMap<(ServiceName, HostName), Outcome>> {
    let store = crate::store::open(&settings.store)?;
    let follower = Follower { settings, store: store.as_ref(), serial, until: Instant::now() + timeout };
    let hosts: Vec<(&HostName, &Vec<Shipped>)> = hosts.iter().collect();
    let outcomes = parallel::map(&hosts, hosts.len(), |(host, shipped)| follower.follow(host, shipped));
    let each = hosts.iter().zip(outcomes).flat_map(|((host, shipped), outcomes)| {
        let names = shipped.iter().map(|service| (service.name.clone(), (*host).clone()));
        names.zip(outcomes)
    });
    Ok(each.collect())
}

/// How one start of the deployer and the look at the state after it ended.
enum WaitStep {
    /// Every service has its outcome.
    Done(Vec<Outcome>),
    /// There is none yet, since the pass worked from an older manifest: why.
    Behind(String),
    /// The same, and its pass failed or could not use the manifest.
    Stuck(String),
    /// The host was not heard.
    Unheard(String),
    /// The host's pass failed: why. It said so itself, and would say it again.
    Failed(String),
    /// Something that no other try mends.
    Hopeless(String),
}

struct Follower<'a> {
    settings: &'a Settings,
    store: &'a dyn Store,
    serial: u64,
    until: Instant,
}

impl Follower<'_> {
    fn follow(&self, host: &HostName, shipped: &[Shipped]) -> Vec<Outcome> {
        let mut failures = 0;
        let mut last_said = String::new();
        let mut report = |text: &str| {
            if last_said != text {
                log::info(format!("{host}: {text}"));
                last_said = text.to_string();
            }
        };
        report("starting the deployer");
        let mut pause = Duration::from_millis(500);
        loop {
            // Whether the host was heard: what it has not taken up is pending, of the rest nothing is known.
            let (heard, in_vain, why) = match self.step(host, shipped) {
                WaitStep::Done(outcomes) => {
                    for (service, outcome) in shipped.iter().zip(&outcomes) {
                        report(&format!("{} {}", service.name, outcome.word()));
                    }
                    return outcomes;
                }
                WaitStep::Failed(why) => (true, TRIES, why),
                WaitStep::Hopeless(why) => (false, TRIES, why),
                WaitStep::Behind(why) => (true, 0, why),
                WaitStep::Stuck(why) => (true, failures + 1, why),
                WaitStep::Unheard(why) => (false, failures + 1, why),
            };
            failures = in_vain;
            report(&why);
            let left = self.until.saturating_duration_since(Instant::now());
            if failures >= TRIES || left <= pause {
                let outcome = if heard { Outcome::Pending(why) } else { Outcome::Unknown(why) };
                return vec![outcome; shipped.len()];
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    fn step(&self, host: &HostName, shipped: &[Shipped]) -> WaitStep {
        let Follower { settings, store, serial, until } = self;
        let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
        let (started, answer) = match self.start(host, left) {
            Ok(both) => both,
            Err(e) => return WaitStep::Unheard(e.to_string()),
        };
        if started.code == NO_UNIT {
            return WaitStep::Hopeless(format!(
                "it has no deployer ({}); install it with contrib/install.sh",
                started.said
            ));
        }
        let well = started.code == 0;
        // Of a start that failed the reason is what its pass said last.
        let failed = |line: Option<String>, otherwise: String| {
            let line = if well { None } else { line.or_else(|| self.last_line(host)) };
            match line {
                Some(why) => WaitStep::Failed(format!("its pass failed: {why}")),
                None => WaitStep::Unheard(otherwise),
            }
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => return failed(None, e.to_string()),
        };
        let Some(mut state) = answer.state else {
            return failed(
                answer.live.last_line,
                answer.state_error.unwrap_or_else(|| "it has no state".into()),
            );
        };
        reports::same_store(*store, &mut state);
        let identity = store.identity();
        let judged: Option<Vec<Outcome>> =
            shipped.iter().map(|service| judge(&state, service, *serial, &identity)).collect();
        // A pass that ended without leaving a reason: killed, out of time, or of an older program.
        if !well
            && state.last_error.is_none()
            && let Some(why) = self.pass_failure(host, answer.live.deployer.as_ref(), answer.live.last_line)
        {
            return WaitStep::Failed(why);
        }
        if let Some(outcomes) = judged {
            let read = |outcome| self.as_read_here(host, name_newer(*store, host, outcome));
            return WaitStep::Done(outcomes.into_iter().map(read).collect());
        }
        let at = state.serial.map_or("none".to_string(), |s| s.to_string());
        let behind = format!("its last pass saw version {at}, not yet {serial}");
        match &state.manifest_error {
            Some(why) => {
                WaitStep::Stuck(format!("{behind}: {}", hint::translated(why, host, &settings.host)))
            }
            None if !well => WaitStep::Stuck(format!("{behind} (start: {})", started.said)),
            None => WaitStep::Behind(format!("{behind}; starting another")),
        }
    }

    /// Starts the deployer, and asks the host for its state when there is a result: by one command where the host knows
    /// how. The plain way waits for the pass to end, and fails when a service did: the state says which.
    fn start(
        &self,
        host: &HostName,
        left: impl Fn() -> Duration,
    ) -> Result<(StartResult, Result<LiveState>)> {
        let Follower { settings, serial, .. } = self;
        if let Some(mut answer) = reports::watch(settings, host, *serial, left())?
            && let Some(start) = answer.start.take()
        {
            return Ok((start, Ok(answer)));
        }
        let started = ssh::output_on(settings, host, true, &["systemctl", "start", "deployer"], left())?;
        let code = match started.status {
            Ended::Exit(code) => code,
            Ended::Signal(_) => -1,
        };
        let start = StartResult { code, said: tail(&started.stderr) };
        let answer = if code == NO_UNIT {
            Err(Error::new(start.said.clone()))
        } else {
            reports::ask(settings, host, With::Units, left())
        };
        Ok((start, answer))
    }

    /// How a start of the deployer failed, unless it was for a service (exit 3 and 4), of which the state tells.
    fn pass_failure(&self, host: &HostName, unit: Option<&Unit>, line: Option<String>) -> Option<String> {
        let (result, status) = match unit {
            Some(unit) => (unit.result.clone(), unit.exit_status),
            None => {
                let words = ["systemctl", "show", "--property=Result,ExecMainStatus", "deployer.service"];
                let output = ssh::output_on(self.settings, host, false, &words, ANSWER_WITHIN).ok()?;
                let text = output.text();
                let of = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).map(String::from);
                (of("Result=")?, of("ExecMainStatus=")?.parse().ok()?)
            }
        };
        if result == "success" || (result == "exit-code" && matches!(status, 3 | 4)) {
            return None;
        }
        let line = line.or_else(|| self.last_line(host)).unwrap_or_else(|| "it left no reason".into());
        Some(format!("its pass failed ({result}, {status}): {line}"))
    }

    /// The last line that the deployer wrote to the host's journal.
    fn last_line(&self, host: &HostName) -> Option<String> {
        let words = [
            "journalctl",
            "--no-pager",
            "--quiet",
            "--output=cat",
            "--lines=1",
            "_SYSTEMD_UNIT=deployer.service",
        ];
        let output = ssh::output_on(self.settings, host, true, &words, ANSWER_WITHIN).ok()?;
        let line = output.text().lines().last().map(str::trim).unwrap_or_default().to_string();
        (output.status.ok() && !line.is_empty()).then(|| hint::translated(&line, host, &self.settings.host))
    }

    /// What the host advises, as it is to be typed here.
    fn as_read_here(&self, host: &HostName, outcome: Outcome) -> Outcome {
        let translated = |text: &str| hint::translated(text, host, &self.settings.host);
        match outcome {
            Outcome::Off(off) => Outcome::Off(Off { reason: translated(&off.reason), ..off }),
            Outcome::Pending(why) => Outcome::Pending(translated(&why)),
            Outcome::Unknown(why) => Outcome::Unknown(translated(&why)),
            other @ (Outcome::Running | Outcome::Superseded(_)) => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::deployer::state::{FailureRecord, LastError};

    fn path(n: u32) -> StorePath {
        StorePath::parse(&format!("/nix/store/{n:032}-ava")).unwrap()
    }

    fn state(serial: u64, status: ServicePhase, runs: Option<u32>, attempted: Option<u32>) -> State {
        let name = ServiceName::parse("ava").unwrap();
        let mut state = State::new(HostName::parse("biz").unwrap(), Timestamp(0));
        state.serial = Some(serial);
        let failure = attempted.map(|n| FailureRecord {
            attempts: 0,
            reason: "it exits at once".into(),
            attempted: Some(path(n)),
            at: Timestamp(0),
            journal: vec!["boom".into()],
            inputs: None,
            kept_out: false,
        });
        let service = ServiceState {
            store_path: runs.map(path),
            failure,
            ..ServiceState::new(name.clone(), status, Timestamp(0))
        };
        state.services.insert(name, service);
        state
    }

    fn shipped(name: &str) -> Shipped {
        Shipped { name: ServiceName::parse(name).unwrap(), path: path(2), entry: Some("ours".into()) }
    }

    const STORE: &str = "s3://releases";

    #[test]
    fn only_a_pass_that_saw_the_push_is_believed() {
        for (serial, status, runs, attempted, want) in [
            (41, ServicePhase::Running, Some(2), None, None),
            (42, ServicePhase::Running, Some(2), None, Some("running")),
            (43, ServicePhase::Running, Some(2), None, Some("running")),
            (43, ServicePhase::Running, Some(3), None, Some("superseded")),
            (43, ServicePhase::Failed, Some(1), Some(3), Some("superseded")),
            (43, ServicePhase::Rejected, Some(1), Some(2), Some("rejected")),
            (42, ServicePhase::Rejected, Some(1), Some(2), Some("rejected")),
            (42, ServicePhase::Failed, Some(1), Some(2), Some("failed")),
            (42, ServicePhase::Failed, None, Some(2), Some("failed")),
            (42, ServicePhase::Failed, Some(2), Some(2), Some("failed")),
            (42, ServicePhase::Running, Some(1), None, Some("differs")),
            (42, ServicePhase::Stopped, None, None, Some("stopped")),
            (42, ServicePhase::Waiting, None, None, Some("waiting")),
        ] {
            let outcome = judge(&state(serial, status, runs, attempted), &shipped("ava"), 42, STORE);
            let what = format!("{serial} {status:?} {runs:?} {attempted:?}");
            assert_eq!(outcome.as_ref().map(Outcome::word).as_deref(), want, "{what}");
            if let Some(Outcome::Off(off)) = outcome {
                assert_eq!(off.down, runs.is_none() && status != ServicePhase::Stopped, "{what}");
                if attempted.is_some() {
                    assert!(off.reason.starts_with("it exits at once") && off.journal.len() == 1, "{what}");
                }
            }
        }
        let unknown = judge(&state(42, ServicePhase::Running, Some(2), None), &shipped("other"), 42, STORE);
        assert!(matches!(unknown, Some(Outcome::Unknown(_))), "{unknown:?}");
        let mut fresh = state(42, ServicePhase::Running, Some(2), None);
        fresh.serial = None;
        assert_eq!(judge(&fresh, &shipped("ava"), 42, STORE), None);
    }

    #[test]
    fn another_store_another_entry_and_a_pass_that_failed_are_no_success() {
        let well = |serial| state(serial, ServicePhase::Running, Some(2), None);
        let word = |state: &State| judge(state, &shipped("ava"), 42, STORE).map(|o| o.word());
        let mut other = well(40);
        other.store = Some("s3://releases2".into());
        let Some(Outcome::Unknown(why)) = judge(&other, &shipped("ava"), 42, STORE) else {
            panic!("believed")
        };
        assert!(why.contains("biz reads s3://releases2, you published to s3://releases;"), "{why}");
        other.store = Some(STORE.into());
        other.serial = Some(42);
        assert_eq!(word(&other).as_deref(), Some("running"));
        for (serial, entry, want) in [
            (42, "ours", "running"),
            (42, "theirs", "unknown"),
            (43, "theirs", "superseded"),
            (43, "ours", "running"),
        ] {
            let mut state = well(serial);
            state.services.values_mut().for_each(|s| s.entry = Some(entry.into()));
            assert_eq!(word(&state).as_deref(), Some(want), "{serial} {entry}");
        }
        // A drop-in beside it: the program is the pushed one, and what it runs with is not the manifest's.
        let mut changed = well(42);
        let drop_in = "/etc/systemd/system/ava.service.d/x.conf";
        changed.services.values_mut().for_each(|s| s.drop_ins = vec![drop_in.into()]);
        let Some(Outcome::Off(off)) = judge(&changed, &shipped("ava"), 42, STORE) else { panic!("believed") };
        assert_eq!((off.status, off.down), (ServiceStatus::Running, false));
        assert!(off.reason.contains(drop_in), "{}", off.reason);
        for (serial, want) in [(41, "pending"), (42, "unknown"), (43, "unknown")] {
            let mut failed = well(serial);
            failed.last_error = Some(LastError { reason: "wrong key".into(), since: Timestamp(0) });
            let outcome = judge(&failed, &shipped("ava"), 42, STORE).unwrap();
            let (Outcome::Unknown(why) | Outcome::Pending(why)) = &outcome else { panic!("{outcome:?}") };
            assert_eq!((outcome.word().as_str(), why.as_str()), (want, "its last pass failed: wrong key"));
        }
    }

    #[test]
    fn the_exit_code_tells_the_worst() {
        let off = |down| {
            let (reason, journal) = (String::new(), Vec::new());
            Outcome::Off(Off { status: ServiceStatus::Failed, down, reason, journal })
        };
        let newer = Outcome::Superseded(Newer { serial: 1, by: String::new(), action: String::new() });
        let (unknown, pending) = (Outcome::Unknown(String::new()), Outcome::Pending(String::new()));
        assert_eq!(exit_code([]), Exit::Done);
        assert_eq!(exit_code([&Outcome::Running, &newer]), Exit::Done);
        assert_eq!(exit_code([&Outcome::Running, &unknown]), Exit::Failed);
        assert_eq!(exit_code([&Outcome::Running, &pending]), Exit::Failed);
        assert_eq!(exit_code([&unknown, &off(false)]), Exit::Degraded);
        assert_eq!(exit_code([&off(true), &off(false), &unknown]), Exit::Down);
    }
}
