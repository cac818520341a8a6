//! Starts: checked before anything is touched, restarted in one call, and seen to come up.

use super::watch::{NotUp, SETTLE, Up, Watched, watch};
use super::{EVERYBODY_WAITS, Round, Start, route, steps, still_stopping};
use crate::clock;
use crate::deployer::listeners::{self, Listeners};
use crate::deployer::outcome::{Outcome, PendingJob};
use crate::deployer::plan::{Plan, Step, Verified};
use crate::error::Result;
use crate::log;
use crate::manifest::Service;
use crate::names::{ServiceName, StorePath};
use crate::parallel::joined;
use crate::runner::tail;
use crate::secrets;
use crate::systemd::{self, Began, Restarted};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

/// How long a service must stay up where it has just been verified beside the version before, by the same inputs, and goes
/// on answering there: nobody is led to the second process before it has settled as well.
const SETTLE_AGAIN: Duration = Duration::from_secs(1);
/// How long one pass waits at most, whatever systemd's own limit for a stop is: what was published meanwhile waits with
/// it, and `deployer.service` has a limit too (TimeoutStartSec=). The next pass goes on with what is left.
const ONE_PASS_WAITS: Duration = Duration::from_secs(600);
/// What a start may take after a stop that took as long as it may.
const START_AFTER: Duration = Duration::from_secs(60);
/// How often units that take their time are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(150);

fn starts(plan: &Plan) -> impl Iterator<Item = Start<'_>> {
    steps(&plan.services).filter_map(|(service, step)| {
        let (why, restart) = match step {
            Step::Restart(why) => (why, true),
            Step::Prove(why) => (why, false),
            _ => return None,
        };
        Some(Start { name: &service.name, goal: service.goal.as_ref()?, why, restart })
    })
}

/// What can be known before anything is touched: the executable is there, and systemd takes every line.
pub(super) fn check(round: &Round) -> Outcome {
    Outcome::of(|done| {
        let mut to_verify = Vec::new();
        for Start { name, goal, .. } in starts(round.plan).filter(|s| s.restart) {
            if goal.is_verified() || round.so_far.unfetchable.contains_key(&goal.path) {
                continue;
            }
            match executable(&goal.service, &goal.path).and_then(|()| check_secrets(&goal.service)) {
                Ok(()) => to_verify.push((name.clone(), goal.unit.clone())),
                Err(why) => done.reject(name, goal, &why, Vec::new()),
            }
        }
        for (name, complaint) in systemd::verify(&to_verify, &round.at.root.run_dir)? {
            let Some(start) = starts(round.plan).find(|s| s.restart && *s.name == name) else { continue };
            // systemd 262 and later starts nothing whose path has such a character; Nix allows '?' in a name.
            let why = match complaint.contains("contains special characters") {
                true => format!(
                    "systemd on this host does not start a program with such a character in its path: {complaint}; \
                     give the derivation a name without it, and push that"
                ),
                false => format!("systemd does not accept its unit: {complaint}"),
            };
            done.reject(&name, start.goal, &why, Vec::new());
        }
        Ok(())
    })
}

/// Has systemd read the units. A person who put a unit back leaves systemd with what it had read before, and that is
/// what it would start.
pub(super) fn reload(round: &Round) -> Outcome {
    Outcome::of(|done| {
        for service in &round.plan.services {
            if service.steps.contains(&Step::Reload) {
                log::notice(format!("{}: systemd had read another unit", service.name));
                done.changed = true;
            }
            if service.goal.is_none() {
                continue;
            }
            if let Some(remark) = &service.remark {
                log::warning(format!("{}: {remark}", service.name));
            }
            done.changed |= service.steps.iter().any(|step| matches!(step, Step::Write(_)));
        }
        let restarts: Vec<Start> = to_start(round).into_iter().filter(|s| s.restart).collect();
        if !done.changed && restarts.is_empty() {
            return Ok(());
        }
        // What would be started twice, by systemd and by us. What somebody's drop-ins change may not be started here
        // at all.
        let waits = restarts.iter().filter(|s| {
            let seen = round.at.observed.units.get(s.name);
            seen.is_some_and(|u| systemd::is_between_starts(&u.listed.sub) && u.drop_ins.is_empty())
        });
        systemd::stop_waiting(&waits.map(|s| s.name.unit()).collect::<Vec<_>>())?;
        systemd::daemon_reload()
    })
}

fn to_start<'a>(round: &Round<'a>) -> Vec<Start<'a>> {
    starts(round.plan).filter(|s| !round.has_failed(s.name, s.goal)).collect()
}

/// Restarts in one call, and watches all of it come up.
pub(super) fn restart(round: &Round) -> Outcome {
    Outcome::of(|done| {
        let mut starts = to_start(round);
        leave_replaced(round, &mut starts, done)?;
        if starts.is_empty() {
            return Ok(());
        }
        done.changed = true;
        for start in &starts {
            let what = if start.restart { "starting" } else { "watching" };
            log::notice(format!("{}: {what} {} ({})", start.name, start.goal.path, start.why));
        }
        stop_port_holders(round, &mut starts, done)?;
        if starts.is_empty() {
            return Ok(());
        }
        let called = Called::call(starts, done)?;
        let outcomes = watch_all(round, &called, done)?;
        // What came up is taken down first: a pass that dies among the others' failures leaves it verified.
        let up = called.starts.iter().filter(|s| matches!(outcomes.get(s.name), Some(Ok(_))));
        done.came_up(round, up.map(|s| (s.name, s.goal)));
        for start in &called.starts {
            if let Some(outcome) = outcomes.get(start.name) {
                record_result(round, start, called.begun, outcome, done);
            }
        }
        Ok(())
    })
}

/// Takes out of `starts` what would start something else than our unit, by drop-ins that are known: starting that
/// would only end what runs.
fn leave_replaced(round: &Round, starts: &mut Vec<Start>, done: &mut Outcome) -> Result<()> {
    let has_drop_ins =
        |s: &&Start| round.at.observed.units.get(s.name).is_some_and(|u| !u.drop_ins.is_empty());
    let units: Vec<String> = starts.iter().filter(has_drop_ins).map(|s| s.name.unit()).collect();
    let shown = systemd::show(&units)?;
    starts.retain(|start| {
        let (service, unit) = (&start.goal.service, start.name.unit());
        let watched = Watched { name: start.name, unit, service, was_up: false, settle: SETTLE };
        let why = shown.get(&watched.unit).and_then(|shown| watched.replaced(round.at.root, shown));
        if let Some(why) = &why {
            done.fail_on_host(start.name, start.goal, why);
        }
        why.is_none()
    });
    Ok(())
}

/// Stops services that have, up to now, a port on which another one is about to start: those that go, and those that
/// move to another port in the same call, which systemd would restart in any order.
fn stop_port_holders(round: &Round, starts: &mut Vec<Start>, done: &mut Outcome) -> Result<()> {
    let held = |name: &ServiceName| round.at.persisted.applied.get(name).and_then(|a| a.service.port());
    let restarts = || starts.iter().filter(|s| s.restart);
    let taken: BTreeMap<u16, &ServiceName> =
        restarts().filter_map(|s| Some((s.goal.service.port()?, s.name))).collect();
    let leaving = round.plan.gone.iter().map(|s| &s.name).chain(restarts().map(|s| s.name));
    let holders: Vec<&ServiceName> = leaving
        .filter(|name| held(name).and_then(|p| taken.get(&p)).is_some_and(|taker| taker != name))
        .collect();
    for name in &holders {
        log::info(format!("{name}: stopping first, another service takes its port"));
    }
    let units: Vec<String> = holders.iter().map(|name| name.unit()).collect();
    let stopping = systemd::stop(&units, EVERYBODY_WAITS)?;
    for holder in holders.into_iter().filter(|name| stopping.contains(&name.unit())) {
        // Its port is free once it has stopped: then whoever takes it is started.
        let waits = |s: &&Start| s.name == holder || s.restart && held(holder) == s.goal.service.port();
        for start in starts.iter().filter(waits) {
            let why = match start.name == holder {
                true => still_stopping(holder),
                false => format!("it waits for the port of {holder}, which is still stopping"),
            };
            done.pend(start.name, why, holder, true);
        }
    }
    starts.retain(|s| !done.pending.contains_key(s.name));
    Ok(())
}

/// What the one call came to.
struct Called<'a> {
    /// What is watched, or was not begun.
    starts: Vec<Start<'a>>,
    /// The journal's time before it.
    begun: i64,
    /// A restart that systemd does not even begin leaves the old process running, and that would look well.
    not_begun: BTreeMap<&'a ServiceName, String>,
}

impl<'a> Called<'a> {
    fn call(starts: Vec<Start<'a>>, done: &mut Outcome) -> Result<Self> {
        let units: Vec<String> = starts.iter().filter(|s| s.restart).map(|s| s.name.unit()).collect();
        systemd::reset_failed(&units)?;
        let before: BTreeMap<&str, String> =
            units.iter().filter_map(|u| Some((u.as_str(), systemd::invocation(u)?))).collect();
        let begun = clock::journal_now();
        let Restarted { complaint, busy } = systemd::restart(&units, EVERYBODY_WAITS)?;
        // Whatever comes of it, no process is left from before: a clock that was set back must not make them look older
        // than their units for ever.
        done.restarted.extend(starts.iter().filter(|s| s.restart).map(|s| s.name.clone()));
        let (busy, starts): (Vec<Start>, Vec<Start>) =
            starts.into_iter().partition(|s| busy.contains(&s.name.unit()));
        for Start { name, .. } in busy {
            let why = format!("systemd is still stopping or starting it (see 'systemctl status {name}')");
            done.pend(name, why, name, true);
        }
        let not_begun = |start: &Start| {
            let unit = start.name.unit();
            let why = systemd::could_not_start(complaint.as_deref(), &unit);
            let same =
                before.get(unit.as_str()).is_some_and(|id| systemd::invocation(&unit).as_ref() == Some(id));
            let said = complaint.as_deref().map_or_else(|| "systemd says nothing about it".into(), tail);
            why.or_else(|| same.then(|| format!("it was not restarted: {said}")))
        };
        let restarts = starts.iter().filter(|s| s.restart);
        let not_begun = restarts.filter_map(|s| Some((s.name, not_begun(s)?))).collect();
        Ok(Called { starts, begun, not_begun })
    }
}

/// What came of each start.
fn watch_all(
    round: &Round,
    called: &Called,
    done: &mut Outcome,
) -> Result<BTreeMap<ServiceName, Result<Up, NotUp>>> {
    let Called { starts, not_begun, .. } = called;
    let watched = starts.iter().filter(|s| !not_begun.contains_key(s.name)).map(|s| Watched {
        name: s.name,
        unit: s.name.unit(),
        service: &s.goal.service,
        was_up: !s.restart && s.goal.verified != Verified::No,
        settle: match round.so_far.candidates.get(s.name).filter(|_| round.so_far.led.contains(s.name)) {
            Some((_, inputs)) if *inputs == s.goal.inputs() => SETTLE_AGAIN,
            _ => SETTLE,
        },
    });
    let watched: Vec<Watched> = watched.collect();
    // Those that were never up: there is nothing older to be put back, and nobody else to answer meanwhile.
    let first = |name: &ServiceName| {
        let new = |s: &Start| s.name == name && s.goal.desired && s.goal.service.http.is_some();
        !round.at.persisted.applied.contains_key(name) && starts.iter().any(new)
    };
    let mut led = false;
    let mut well = |name: &ServiceName| {
        if !led && first(name) {
            led = true;
            route::lead_to_first(round);
        }
    };
    // What it says is known before the watch has settled: it costs the pass no time.
    let (outcomes, exposures) = std::thread::scope(|scope| {
        let exposures = scope.spawn(systemd::exposures);
        (watch(round.at.root, &watched, &mut well), joined(exposures))
    });
    done.started.extend(starts.iter().map(|s| s.name.clone()));
    match exposures {
        Ok(exposures) => done.exposures = exposures,
        Err(e) => log::info(format!("how exposed the services are is not known: {e}")),
    }
    let not_begun = not_begun.iter().map(|(name, why)| ((*name).clone(), Err(NotUp::Release(why.clone()))));
    Ok(outcomes?.into_iter().chain(not_begun).collect())
}

/// Takes down what came of one start.
fn record_result(round: &Round, start: &Start, begun: i64, outcome: &Result<Up, NotUp>, done: &mut Outcome) {
    let why = match outcome {
        Ok(up) => {
            log::info(format!("{}: up after {:.1} s", start.name, up.after.as_secs_f64()));
            done.invocations.insert(start.name.clone(), up.verified.clone());
            return;
        }
        Err(NotUp::Host(why)) => return done.fail_on_host(start.name, start.goal, why),
        Err(NotUp::Release(why)) => why,
    };
    // What this pass did not start may have said what there is to be known before it began.
    let ran = round.at.observed.units.get(start.name).filter(|_| !start.restart);
    let ran = ran.and_then(|u| u.invocation.clone());
    let began = ran.map_or(Began::At(begun), Began::Before);
    let journal = systemd::journal(&start.name.unit(), &began);
    match taken(start.name, &start.goal.service, &journal) {
        Some(other) => done.not_the_release(start.name, start.goal, format!("{other} ({why})"), true),
        None => done.reject(start.name, start.goal, why, journal),
    }
}

/// Whether systemd takes a service's secrets: of a line that sets no name of a variable it writes all to the journal,
/// the value with it.
fn check_secrets(service: &Service) -> Result<(), String> {
    // One that cannot be read has been said by the plan, and is systemd's to refuse.
    let wrong = |file: &_| secrets::illegible(&service.name, file).ok().flatten();
    let wrong = secrets::files(service).iter().find_map(wrong);
    wrong.map_or(Ok(()), |why| Err(format!("its secrets file {why}")))
}

/// Who has the port of a service that did not come up and says that it is in use: somebody at another address, which
/// keeps a program from all addresses, and which nobody asks by 127.0.0.1.
fn taken(name: &ServiceName, service: &Service, journal: &[String]) -> Option<String> {
    let port = service.port()?;
    if !listeners::says_in_use(journal) {
        return None;
    }
    let owners = Listeners::read().ok()?.anywhere(port, &name.unit());
    (!owners.is_empty()).then(|| listeners::in_the_way(port, name.as_str(), &owners))
}

/// Whether the program of a service is there and may be executed.
fn executable(service: &Service, path: &StorePath) -> Result<(), String> {
    let (program, _) = service.program(path);
    let shown = program.display();
    match fs_err::metadata(&program) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => Ok(()),
        Ok(meta) if meta.is_file() => Err(format!("{shown} is not executable")),
        Ok(_) => Err(format!("{shown} is not a file")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(format!("there is no {shown} in its closure; correct exec.command or the build"))
        }
        Err(e) => Err(e.to_string()),
    }
}

/// Waits for what takes its time, as long as systemd gives it, until one of them is through: which; none where there is
/// none to be waited for any longer.
pub(super) fn wait(pending: &BTreeMap<ServiceName, PendingJob>) -> Result<BTreeSet<ServiceName>> {
    let awaited: BTreeMap<&ServiceName, &PendingJob> = pending.iter().filter(|(_, p)| p.awaited).collect();
    let units: Vec<String> = awaited.values().map(|p| p.unit.clone()).collect();
    let timeouts = systemd::stop_timeouts(&units)?;
    let limit = |job: &PendingJob| waits_for(timeouts.get(&job.unit).copied().flatten());
    for (name, job) in &awaited {
        log::notice(format!("{name}: waiting for {}, for at most {} s", job.unit, limit(job).as_secs()));
    }
    while awaited.values().any(|job| job.since.elapsed() < limit(job)) {
        let busy = systemd::busy(&units)?;
        let through = awaited.iter().filter(|(_, job)| !busy.contains(&job.unit));
        let through: BTreeSet<ServiceName> = through.map(|(name, _)| (*name).clone()).collect();
        if !through.is_empty() {
            return Ok(through);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(BTreeSet::new())
}

/// How long one pass waits for a unit that systemd lets take so long to stop.
fn waits_for(stop: Option<Duration>) -> Duration {
    stop.map_or(ONE_PASS_WAITS, |stop| ONE_PASS_WAITS.min(stop.saturating_add(START_AFTER)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_waits_as_long_as_systemd_lets_a_stop_take_but_ends_before_its_own_unit_is_ended() {
        let seconds = |stop: Option<u64>| waits_for(stop.map(Duration::from_secs)).as_secs();
        for (stop, waits) in [(Some(5), 65), (Some(420), 480), (Some(3600), 600), (None, 600)] {
            assert_eq!(seconds(stop), waits, "{stop:?}");
        }
        let unit = include_str!("../../../contrib/systemd/deployer.service");
        let limit =
            unit.lines().find_map(|l| l.strip_prefix("TimeoutStartSec=")?.strip_suffix("min")).unwrap();
        // The rest is for what else a pass does.
        assert!(seconds(None) * 2 <= limit.parse::<u64>().unwrap() * 60, "{limit}");
    }
}
