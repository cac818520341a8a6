//! After a push: starts the deployer on the services' hosts and follows each until it runs what was pushed, has
//! refused it, or has not answered in time. It reads the hosts' state and starts a unit; it changes nothing
//! else, and never believes that a start which returned was a pass that saw this push.

use crate::config::Settings;
use crate::deployer::root::STATE_FILE;
use crate::deployer::state::{ServiceState, State, Status};
use crate::error::{EXIT_DEGRADED, EXIT_DOWN, EXIT_FAILED};
use crate::names::{HostName, ServiceName, StorePath};
use crate::runner::{Status as Ended, tail};
use crate::say;
use crate::ssh;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How often a host may fail to answer, or to get anywhere, before it is given up.
const TRIES: u32 = 3;
/// What systemctl exits with when there is no such unit (systemctl(1)).
const NO_UNIT: Ended = Ended::Exit(5);

/// What a service came to on one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The pushed path runs.
    Runs,
    /// The host works from a version published after this push, and runs what that names.
    Superseded(u64),
    /// The host would not have it; what ran before runs.
    Refused(Trouble),
    /// The host would not have it, and nothing runs.
    Down(Trouble),
    /// Nobody can tell.
    Unknown(String),
}

/// Why a host did not take a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The host's reason.
    pub reason: String,
    /// The service's last lines.
    pub journal: Vec<String>,
}

impl Outcome {
    /// The word in the output.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Runs => "running",
            Outcome::Superseded(_) => "superseded",
            Outcome::Refused(_) => "refused",
            Outcome::Down(_) => "down",
            Outcome::Unknown(_) => "unknown",
        }
    }
}

/// The exit code that outcomes stand for: 4 when a service is down, else 3 when a host refused one, else 1 when
/// a host could not tell.
pub fn exit_code<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> u8 {
    let rank = |o: &Outcome| match o {
        Outcome::Runs | Outcome::Superseded(_) => (0, 0),
        Outcome::Unknown(_) => (1, EXIT_FAILED),
        Outcome::Refused(_) => (2, EXIT_DEGRADED),
        Outcome::Down(_) => (3, EXIT_DOWN),
    };
    outcomes.into_iter().map(rank).max().map_or(0, |(_, code)| code)
}

/// What a host's state says of a pushed service; None when its passes have not seen that serial yet. Pure.
pub fn judge(state: &State, service: &ServiceName, path: &StorePath, serial: u64) -> Option<Outcome> {
    let seen = state.serial.filter(|s| *s >= serial)?;
    let Some(found) = state.services.get(service) else {
        return Some(if seen > serial {
            Outcome::Superseded(seen)
        } else {
            Outcome::Unknown(format!(
                "its deployer does not count {service} among its own; is its 'host' ({}) the name in 'hosts'?",
                state.host
            ))
        });
    };
    let ServiceState { store_path, status, failure, .. } = found;
    let attempted = failure.as_ref().and_then(|f| f.attempted.as_ref());
    let attention = found.attention(Some(&state.host)).map_or(String::new(), |text| format!("; {text}"));
    let trouble = || Trouble {
        reason: failure.as_ref().map_or_else(|| format!("it is {}", status.as_str()), |f| f.reason.clone())
            + &attention,
        journal: failure.as_ref().map(|f| f.journal.clone()).unwrap_or_default(),
    };
    Some(match status {
        Status::Running if store_path.as_ref() == Some(path) => Outcome::Runs,
        // Somebody pushed in between: what the host says is about their version.
        _ if seen > serial && attempted.is_none_or(|a| a != path) && store_path.as_ref() != Some(path) => {
            Outcome::Superseded(seen)
        }
        _ if store_path.is_none() => Outcome::Down(trouble()),
        Status::Running => Outcome::Refused(Trouble {
            reason: failure.as_ref().map_or_else(
                || format!("it runs {} instead", store_path.as_ref().map_or("nothing", StorePath::as_str)),
                |f| f.reason.clone(),
            ),
            journal: trouble().journal,
        }),
        Status::Failed | Status::Rejected | Status::Waiting | Status::Stopped => Outcome::Refused(trouble()),
    })
}

/// Follows all hosts at once until each has an answer or `timeout` is over. The outcomes come by service and
/// host.
pub fn follow(
    settings: &Settings,
    hosts: &BTreeMap<HostName, Vec<(ServiceName, StorePath)>>,
    serial: u64,
    timeout: Duration,
) -> BTreeMap<(ServiceName, HostName), Outcome> {
    let until = Instant::now() + timeout;
    let mut all = BTreeMap::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = hosts
            .iter()
            .map(|(host, pushed)| {
                (host, pushed, scope.spawn(move || follow_one(settings, host, pushed, serial, until)))
            })
            .collect();
        for (host, pushed, thread) in threads {
            let outcomes = thread.join().unwrap_or_else(|_| {
                vec![Outcome::Unknown("following it broke off by a mistake of ours".into()); pushed.len()]
            });
            for ((service, _), outcome) in pushed.iter().zip(outcomes) {
                all.insert((service.clone(), host.clone()), outcome);
            }
        }
    });
    all
}

/// How one start of the deployer and the look at the state after it ended.
enum Step {
    /// Every service has its outcome.
    Done(Vec<Outcome>),
    /// The pass worked from an older manifest; how that looks.
    Behind(String),
    /// Something failed that another try may mend.
    Trouble(String),
    /// Something that no other try mends.
    Hopeless(String),
}

fn follow_one(
    settings: &Settings,
    host: &HostName,
    pushed: &[(ServiceName, StorePath)],
    serial: u64,
    until: Instant,
) -> Vec<Outcome> {
    let mut failures = 0;
    let mut last_said = String::new();
    let mut tell = |text: &str| {
        if last_said != text {
            say::info(format!("{host}: {text}"));
            last_said = text.to_string();
        }
    };
    tell("starting the deployer");
    let mut pause = Duration::from_millis(500);
    loop {
        let why = match step(settings, host, pushed, serial, until) {
            Step::Done(outcomes) => {
                for ((service, _), outcome) in pushed.iter().zip(&outcomes) {
                    tell(&format!("{service} {}", outcome.word()));
                }
                return outcomes;
            }
            Step::Hopeless(why) => {
                failures = TRIES;
                why
            }
            Step::Trouble(why) => {
                failures += 1;
                why
            }
            Step::Behind(why) => {
                failures = 0;
                why
            }
        };
        tell(&why);
        let left = until.saturating_duration_since(Instant::now());
        if failures >= TRIES || left <= pause {
            return vec![Outcome::Unknown(why); pushed.len()];
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

fn step(
    settings: &Settings,
    host: &HostName,
    pushed: &[(ServiceName, StorePath)],
    serial: u64,
    until: Instant,
) -> Step {
    let left = || until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
    // `start` waits for the pass to end, and fails when a service did: the state says which.
    let started = match ssh::output_on(settings, host, true, &["systemctl", "start", "deployer"], left()) {
        Ok(output) => output,
        Err(e) => return Step::Trouble(e.to_string()),
    };
    if started.status == NO_UNIT {
        return Step::Hopeless(format!(
            "it has no deployer ({}); install it with contrib/install.sh",
            tail(&started.stderr)
        ));
    }
    let start_said = || {
        if started.status.ok() { String::new() } else { format!(" (start: {})", tail(&started.stderr)) }
    };
    let state = match ssh::output_on(settings, host, false, &["cat", STATE_FILE], left()) {
        Ok(output) if output.status.ok() => match State::parse(&output.stdout) {
            Ok(state) => state,
            Err(why) => return Step::Trouble(format!("its {STATE_FILE} cannot be read: {why}")),
        },
        Ok(output) => {
            return Step::Trouble(format!("no state to read: {}{}", tail(&output.stderr), start_said()));
        }
        Err(e) => return Step::Trouble(e.to_string()),
    };
    let judged: Option<Vec<Outcome>> =
        pushed.iter().map(|(service, path)| judge(&state, service, path, serial)).collect();
    if let Some(outcomes) = judged {
        return Step::Done(outcomes);
    }
    let at = state.serial.map_or("none".to_string(), |s| s.to_string());
    let behind = format!("its last pass saw serial {at}, not yet {serial}");
    match &state.manifest_error {
        Some(why) => Step::Trouble(format!("{behind}: {why}")),
        None if !started.status.ok() => Step::Trouble(format!("{behind}{}", start_said())),
        None => Step::Behind(format!("{behind}; starting another")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::deployer::state::Failure;

    fn path(n: u32) -> StorePath {
        StorePath::parse(&format!("/nix/store/{n:032}-ava")).unwrap()
    }

    fn state(serial: u64, status: Status, runs: Option<u32>, attempted: Option<u32>) -> State {
        let name = ServiceName::parse("ava").unwrap();
        let mut state = State::new(HostName::parse("biz").unwrap(), Timestamp(0));
        state.serial = Some(serial);
        let failure = attempted.map(|n| Failure {
            attempts: 0,
            reason: "it exits at once".into(),
            attempted: Some(path(n)),
            at: Timestamp(0),
            journal: vec!["boom".into()],
            inputs: None,
        });
        let service = ServiceState {
            secrets_changed: false,
            exposure: None,
            drop_ins: Vec::new(),
            invocation: None,
            pinned_since: None,
            paused_until: None,
            name: name.clone(),
            store_path: runs.map(path),
            status,
            since: Timestamp(0),
            previous: Vec::new(),
            failure,
        };
        state.services.insert(name, service);
        state
    }

    #[test]
    fn only_a_pass_that_saw_the_push_is_believed() {
        let ava = ServiceName::parse("ava").unwrap();
        for (serial, status, runs, attempted, want) in [
            (41, Status::Running, Some(2), None, None),
            (42, Status::Running, Some(2), None, Some("running")),
            (43, Status::Running, Some(2), None, Some("running")),
            (43, Status::Running, Some(3), None, Some("superseded")),
            (43, Status::Failed, Some(1), Some(3), Some("superseded")),
            (43, Status::Rejected, Some(1), Some(2), Some("refused")),
            (42, Status::Rejected, Some(1), Some(2), Some("refused")),
            (42, Status::Failed, Some(1), Some(2), Some("refused")),
            (42, Status::Failed, None, Some(2), Some("down")),
            (42, Status::Failed, Some(2), Some(2), Some("refused")),
            (42, Status::Running, Some(1), None, Some("refused")),
            (42, Status::Stopped, Some(2), None, Some("refused")),
            (42, Status::Waiting, None, None, Some("down")),
        ] {
            let outcome = judge(&state(serial, status, runs, attempted), &ava, &path(2), 42);
            let what = format!("{serial} {status:?} {runs:?} {attempted:?}");
            assert_eq!(outcome.as_ref().map(Outcome::word), want, "{what}");
            if let Some(Outcome::Refused(t) | Outcome::Down(t)) = outcome
                && attempted.is_some()
            {
                assert_eq!((t.reason.as_str(), t.journal.len()), ("it exits at once", 1), "{what}");
            }
        }
        let other = ServiceName::parse("other").unwrap();
        let unknown = judge(&state(42, Status::Running, Some(2), None), &other, &path(2), 42);
        assert!(matches!(unknown, Some(Outcome::Unknown(_))), "{unknown:?}");
        let mut fresh = state(42, Status::Running, Some(2), None);
        fresh.serial = None;
        assert_eq!(judge(&fresh, &ava, &path(2), 42), None);
    }

    #[test]
    fn the_exit_code_tells_the_worst() {
        let trouble = Trouble { reason: String::new(), journal: Vec::new() };
        let (refused, down) = (Outcome::Refused(trouble.clone()), Outcome::Down(trouble));
        let unknown = Outcome::Unknown(String::new());
        assert_eq!(exit_code([]), 0);
        assert_eq!(exit_code([&Outcome::Runs, &Outcome::Superseded(1)]), 0);
        assert_eq!(exit_code([&Outcome::Runs, &unknown]), 1);
        assert_eq!(exit_code([&unknown, &refused]), 3);
        assert_eq!(exit_code([&down, &refused, &unknown]), 4);
    }
}
