//! The effects: performs a plan, phase by phase for all services together, and returns what came of it. It decides
//! nothing: what follows from a failure is for the next call of [`super::plan::plan`].

mod candidate;
mod closures;
mod route;
mod start;
mod units;
mod watch;

pub(super) use candidate::undo_abandoned;
pub(super) use route::is_settled;

use super::applied::{self, LastKnownGood};
use super::caddy::RoutePlan;
use super::intent;
use super::observed::Observed;
use super::outcome::{AttemptFailure, Outcome, PendingJob};
use super::persisted::PersistedState;
use super::plan::{Goal, Plan, ServicePlan, Step, Verified};
use super::ports::PortChanges;
use super::root::Root;
use super::state::FailureRecord;
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::durable::Batch;
use crate::error::{Error, Result};
use crate::log;
use crate::manifest::Service;
use crate::names::ServiceName;
use Phase::{Act, Replan};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long everybody waits for units to stop or start; what takes longer is waited for when nothing else is left
/// to do, or left to the next pass.
const EVERYBODY_WAITS: Duration = Duration::from_secs(20);

/// One kind of effect, for all services that need it.
pub(super) enum Phase {
    Act(fn(&Round) -> Outcome),
    /// What has failed by now has another goal: everything that restarts shall restart in one call.
    Replan,
}

/// Everything that is done for the services of the manifest, in this order.
const SERVICES: [Phase; 17] = [
    Act(|round| record_intent(round, &round.plan.services)),
    Replan,
    Act(closures::root),
    Act(closures::fetch),
    Act(start::check),
    Replan,
    Act(candidate::start),
    Act(candidate::switch),
    Replan,
    Act(units::pause),
    Act(|round| units::remove(round, &round.plan.services)),
    Act(units::write),
    Act(units::enable),
    Act(start::reload),
    Act(start::restart),
    Act(record_entries),
    Act(closures::unroot),
];

/// Then, once the services have settled. The route before what is gone: no request is led to a service that is being
/// stopped.
const SETTLED: [Phase; 5] = [
    Act(route::write),
    Act(candidate::leave),
    Act(|round| record_intent(round, &round.plan.gone)),
    Act(|round| units::remove(round, &round.plan.gone)),
    Act(closures::unroot_gone),
];

/// And last, when the state is written: whoever waits for a release need not wait for these.
const REPORTED: [Phase; 2] = [Act(candidate::drain), Act(candidate::remove)];

/// What effects work on.
#[derive(Clone, Copy)]
pub(super) struct Situation<'a> {
    pub(super) settings: &'a Settings,
    pub(super) root: &'a Root,
    pub(super) desired: &'a [&'a Service],
    pub(super) observed: &'a Observed,
    pub(super) persisted: &'a PersistedState,
}

/// A plan, and what it takes for Caddy to have its routes.
pub(super) struct Planned {
    pub(super) plan: Plan,
    pub(super) route: RoutePlan,
    /// The same for the files that Caddy reads ports from.
    pub(super) ports: PortChanges,
}

/// One call of [`execute`], as its phases see it.
pub(super) struct Round<'a> {
    at: Situation<'a>,
    plan: &'a Plan,
    route: &'a RoutePlan,
    ports: &'a PortChanges,
    /// What this pass has come to, the phases before this one included.
    so_far: Outcome,
}

/// Performs what a plan has for the services of the manifest, until there is something to plan anew. An error that kept
/// it from going on is the failure of those that it was made for, and of nobody else.
pub(super) fn services(at: Situation, planned: &Planned, so_far: Outcome) -> Outcome {
    let mut outcome = execute(&SERVICES, at, planned, so_far);
    let Some(error) = outcome.error.take() else { return outcome };
    outcome.changed = true;
    let mut alone = true;
    for service in planned.plan.services.iter().filter(|s| !s.steps.is_empty()) {
        if let Some(goal) = &service.goal {
            outcome.fail_on_host(&service.name, goal, &error);
            alone = false;
        }
    }
    if alone {
        outcome.not_written(&error);
    }
    outcome
}

/// Performs the rest of a plan: the route, what is gone, and which candidates leave. `error` is why something is not
/// gone yet.
pub(super) fn settled(at: Situation, planned: &Planned, so_far: Outcome) -> Outcome {
    let mut outcome = execute(&SETTLED, at, planned, so_far);
    if let Some(error) = outcome.error.clone() {
        outcome.not_written(&error);
    }
    outcome
}

/// Waits for what takes its time, when everybody else has what is due to him, requests included; false when there is
/// nothing to be waited for any longer.
pub(super) fn wait(at: Situation, planned: &Planned, so_far: &mut Outcome) -> Result<bool> {
    if !so_far.pending.values().any(|job| job.awaited) {
        return Ok(false);
    }
    if !is_settled(&planned.route, &planned.ports) {
        *so_far = execute(&[Act(route::write)], at, planned, std::mem::take(so_far));
    }
    let through = start::wait(&so_far.pending)?;
    so_far.pending.retain(|name, _| !through.contains(name));
    Ok(!through.is_empty())
}

/// Lets the connections of the candidates that leave end, and removes them.
pub(super) fn after_report(at: Situation, planned: &Planned, so_far: Outcome) -> Result<Outcome> {
    let mut outcome = execute(&REPORTED, at, planned, Outcome { error: None, ..so_far });
    outcome.error.take().map_or(Ok(outcome), Err)
}

fn execute(phases: &[Phase], at: Situation, planned: &Planned, so_far: Outcome) -> Outcome {
    let known = so_far.failed();
    let Planned { plan, route, ports } = planned;
    let mut round = Round { at, plan, route, ports, so_far };
    for phase in phases {
        match phase {
            Act(act) => {
                let happened = act(&round);
                round.so_far.absorb(happened);
            }
            Replan if round.so_far.failed() > known => break,
            Replan => {}
        }
        if round.so_far.error.is_some() {
            break;
        }
    }
    round.so_far
}

/// Which services an interruption would leave something to find out of. What cannot be taken down is not begun; what
/// merely does not run is started all the same.
fn record_intent(round: &Round, services: &[ServicePlan]) -> Outcome {
    Outcome::of(|done| {
        let touched = || services.iter().filter(|s| s.steps.iter().any(Step::touches));
        let names: BTreeSet<ServiceName> = touched().map(|s| s.name.clone()).collect();
        if names.is_empty() {
            return Ok(());
        }
        let Err(e) = intent::record(round.at.root, names) else { return Ok(()) };
        let goals = touched().map(|s| Some((&s.name, s.goal.as_ref()?))).collect::<Option<Vec<_>>>();
        for (name, goal) in goals.ok_or_else(|| e.clone())? {
            done.fail_on_host(name, goal, &e);
        }
        Ok(())
    })
}

/// Entries that changed without changing their unit (a route, a health path).
fn record_entries(round: &Round) -> Outcome {
    let mut done = Outcome::default();
    done.came_up(round, with_goal(round.plan, |step| matches!(step, Step::Record)));
    done
}

impl Outcome {
    /// Says what the disk did not take, and takes it down.
    pub(super) fn not_written(&mut self, error: &Error) {
        log::error(error);
        self.unwritten.push(error.to_string());
    }

    /// The same, of something that was to be written; whether it was.
    pub(super) fn wrote(&mut self, written: Result<()>) -> bool {
        written.inspect_err(|e| self.not_written(e)).is_ok()
    }

    /// Takes down that an attempt failed by itself: the reason, with the last lines of its journal. What has been up
    /// before may be started again at any time: only of what has not the release is rejected.
    fn reject(&mut self, name: &ServiceName, goal: &Goal, why: &str, journal: Vec<String>) {
        let reason = match goal.verified {
            Verified::Unit => format!(
                "{why}; its route stays as it was: correct http or health ('deploy-manifest set {name} …'), or try \
                 again with 'deployer run --retry {name}'"
            ),
            Verified::No => {
                format!(
                    "{why}; push a fixed version, or try this one again with 'deployer run --retry {name}'"
                )
            }
            Verified::Yes => format!("{why}; see 'journalctl -u {name}'"),
        };
        log::error(format!("{name}: {reason}"));
        for line in &journal {
            log::info(format!("{name} | {line}"));
        }
        let record = FailureRecord {
            journal,
            ..FailureRecord::new(reason, Some(goal.path.clone()), Timestamp::now())
        };
        let inputs = goal.inputs();
        let failure = match goal.is_verified() {
            true => AttemptFailure::Host(record),
            false => AttemptFailure::Rejected(FailureRecord { inputs: Some(inputs.clone()), ..record }),
        };
        self.failures.insert((name.clone(), inputs), failure);
    }

    /// The host's failure, not the release's: taken down for this pass, and tried again by the next.
    fn fail_on_host(&mut self, name: &ServiceName, goal: &Goal, why: &dyn ToString) {
        self.not_the_release(name, goal, why.to_string(), false);
    }

    /// `kept_out`: where only a try tells, and a try ends what runs, it is tried again when nobody has the port any more.
    fn not_the_release(&mut self, name: &ServiceName, goal: &Goal, reason: String, kept_out: bool) {
        log::error(format!("{name}: {reason}"));
        let inputs = goal.inputs();
        let record = FailureRecord {
            inputs: kept_out.then(|| inputs.clone()),
            kept_out,
            ..FailureRecord::new(reason, Some(goal.path.clone()), Timestamp::now())
        };
        self.failures.insert((name.clone(), inputs), AttemptFailure::Host(record));
    }

    /// Takes down that systemd is not through with a service.
    fn pend(&mut self, name: &ServiceName, why: String, on: &ServiceName, awaited: bool) {
        let since = Instant::now();
        self.pending.insert(name.clone(), PendingJob { why, unit: on.unit(), since, awaited });
    }

    /// Takes down what came up, on the disk as well.
    fn came_up<'g>(&mut self, round: &Round, goals: impl IntoIterator<Item = (&'g ServiceName, &'g Goal)>) {
        let records = goals.into_iter().filter_map(|(name, goal)| {
            let before = round.at.persisted.applied.get(name);
            let good = LastKnownGood::new(&goal.service, &goal.path, &goal.unit, before);
            (before != Some(&good)).then(|| (name.clone(), good))
        });
        let records: Vec<(ServiceName, LastKnownGood)> = records.collect();
        for e in applied::record(round.at.root, records.iter().map(|(_, good)| good)) {
            self.not_written(&e);
        }
        self.records.extend(records.into_iter().map(|(name, good)| (name, Some(good))));
    }
}

impl Round<'_> {
    /// Whether an attempt at this goal has failed in this pass.
    fn has_failed(&self, name: &ServiceName, goal: &Goal) -> bool {
        self.so_far.failure_of(name, || goal.inputs()).is_some()
    }
}

fn still_stopping(name: &ServiceName) -> String {
    format!("it is still stopping (see 'systemctl status {name}', and systemd.stopTimeoutSec)")
}

/// Removes files and links; the first that could not be is the error.
fn remove_all(paths: impl Iterator<Item = PathBuf>) -> Result<()> {
    let mut batch = Batch::default();
    paths.for_each(|path| batch.remove(&path));
    batch.finish().into_values().next().map_or(Ok(()), |e| Err(e.into()))
}

fn steps(services: &[ServicePlan]) -> impl Iterator<Item = (&ServicePlan, &Step)> {
    services.iter().flat_map(|s| s.steps.iter().map(move |step| (s, step)))
}

/// The services that have such a step, with what should run.
fn with_goal(plan: &Plan, is: impl Fn(&Step) -> bool) -> impl Iterator<Item = (&ServiceName, &Goal)> {
    let such = plan.services.iter().filter(move |s| s.steps.iter().any(&is));
    such.filter_map(|s| Some((&s.name, s.goal.as_ref()?)))
}

/// A goal that is about to be put in place.
#[derive(Clone)]
struct Start<'a> {
    name: &'a ServiceName,
    goal: &'a Goal,
    why: &'static str,
    /// False: it runs already and is only to be verified.
    restart: bool,
}
