//! The plan: a pure function from what should be and what is to what is to be done. It never asks the host.
//! It is called again after every round of effects with what was learned, until it has nothing left to do; the
//! same function so decides the first deploy, the repair of drift, and putting a previous version back.

use super::caddy::{self, RoutePlan};
use super::state::{Failure, State, Status};
use super::systemd::Listed;
use super::unit;
use crate::clock::Timestamp;
use crate::manifest::{Http, Service};
use crate::names::{ServiceName, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// How many closures of a service stay on the host, the current one included.
pub const KEEP_CLOSURES: usize = 3;

/// What was seen of the host.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Units: of every service that should be here, and every other one that is ours.
    pub units: BTreeMap<ServiceName, UnitSeen>,
    /// Which of the paths in question are in this machine's store.
    pub present: BTreeSet<StorePath>,
    /// Our roots: service to the names (`HASH-NAME`) of what it holds.
    pub roots: BTreeMap<ServiceName, BTreeSet<String>>,
    /// Secrets files of services that have one: what identifies their present content, or why they cannot be
    /// used.
    pub secrets: BTreeMap<ServiceName, Result<String, String>>,
    /// Caddy.
    pub caddy: caddy::Observed,
}

/// What was seen of one unit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnitSeen {
    /// Its file.
    pub file: UnitFile,
    /// Whether it is started at boot.
    pub wanted: bool,
    /// What systemd says of it.
    pub listed: Listed,
}

/// A unit's file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum UnitFile {
    /// There is none.
    #[default]
    Absent,
    /// One with our mark.
    Ours(String),
    /// Somebody else's, there.
    Foreign(PathBuf),
}

/// What was last proved of a service: the entry of the manifest, and the path that ran.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// The entry.
    pub service: Service,
    /// Its store path.
    pub path: StorePath,
    /// The paths proved before it that are still held, newest first.
    pub previous: Vec<StorePath>,
}

/// What earlier passes left for this one.
#[derive(Debug, Clone)]
pub struct Memory {
    /// The state file.
    pub state: State,
    /// What was last proved of each service.
    pub applied: BTreeMap<ServiceName, Applied>,
    /// False when something of it could not be read: then nothing is removed.
    pub readable: bool,
}

/// What was learned in this pass about an attempt, known by its inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Trouble {
    /// Whether the release itself is bad (and is remembered), or the attempt just did not work out.
    pub rejected: bool,
    /// The reason.
    pub failure: Failure,
}

/// Everything that was learned in this pass.
#[derive(Debug, Clone, Default)]
pub struct Learned {
    /// Attempts that failed, by service and inputs.
    pub troubles: BTreeMap<(ServiceName, String), Trouble>,
    /// Paths that could not be fetched, with the reason.
    pub unfetchable: BTreeMap<StorePath, String>,
}

/// What a person asked for besides.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Rejected services to try again.
    pub retry: BTreeSet<ServiceName>,
    /// Remove everything if the manifest says so.
    pub allow_empty: bool,
    /// Which of Caddy's servers gets our route.
    pub caddy_server: Option<String>,
}

/// What should run under a service's name.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    /// The entry.
    pub service: Service,
    /// Its store path.
    pub path: StorePath,
    /// Its unit.
    pub unit: String,
    /// What goes into an attempt, as a hash: unit and secrets.
    pub inputs: String,
    /// Whether a pass has proved this very unit before.
    pub proved: bool,
    /// Whether this is what the manifest says (else: the version before).
    pub desired: bool,
}

/// One thing to do for one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Keep a path from the garbage collector.
    Root(StorePath),
    /// Get a closure from the cache.
    Fetch(StorePath),
    /// Write the unit; the reason.
    Write(&'static str),
    /// Have it started at boot.
    Enable,
    /// Restart it and see it come up; the reason.
    Restart(&'static str),
    /// Take the entry down as proved: nothing of the unit changed.
    Record,
    /// Stop it and remove its unit; the reason.
    Remove(&'static str),
    /// Let go of a path.
    Unroot(String),
}

/// What is to be done for one service.
#[derive(Debug, Clone, PartialEq)]
pub struct ServicePlan {
    /// The service.
    pub name: ServiceName,
    /// What the manifest names; None: a placeholder.
    pub target: Option<StorePath>,
    /// What should run now; None: nothing can.
    pub goal: Option<Goal>,
    /// Why that is not what the manifest says, or not running.
    pub trouble: Option<Trouble>,
    /// In this order.
    pub steps: Vec<Step>,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The services of this host, in the manifest's order, then those that go.
    pub services: Vec<ServicePlan>,
    /// Services of ours that are not in the manifest (any more).
    pub gone: Vec<ServicePlan>,
    /// Caddy's route.
    pub route: RoutePlan,
}

/// The manifest would remove everything: refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WouldEmpty(pub Vec<ServiceName>);

/// A short hash of what goes into an attempt.
pub fn inputs_hash(unit: &str, secrets: Option<&str>) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(unit.as_bytes());
    context.update(b"\0");
    context.update(secrets.unwrap_or_default().as_bytes());
    context.finish().as_ref()[..12].iter().map(|b| format!("{b:02x}")).collect()
}

/// Compares what should be with what is.
pub fn plan(
    desired: &[&Service],
    observed: &Observed,
    memory: &Memory,
    learned: &Learned,
    options: &Options,
    now: Timestamp,
) -> Result<Plan, WouldEmpty> {
    let names: BTreeSet<&ServiceName> = desired.iter().map(|s| &s.name).collect();
    let ours = ours(observed, memory);
    if desired.iter().all(|s| s.artifact.store_path.path().is_none())
        && !ours.is_empty()
        && !options.allow_empty
    {
        return Err(WouldEmpty(ours.into_iter().cloned().collect()));
    }
    let services: Vec<ServicePlan> =
        desired.iter().map(|s| service(s, observed, memory, learned, options, now)).collect();
    let gone = if memory.readable {
        ours.into_iter()
            .filter(|n| !names.contains(n))
            .map(|n| removal(n, observed, "not in the manifest"))
            .collect()
    } else {
        Vec::new()
    };
    let routed = routed(desired, &services);
    let entries: Vec<&Http> = routed.values().copied().collect();
    let route =
        caddy::plan(options.caddy_server.as_deref(), caddy::route(&entries).as_ref(), &observed.caddy);
    Ok(Plan { services, gone, route })
}

/// The services whose requests Caddy should bring, by name: what runs, and what should run but cannot (whose
/// answer is then honestly a 502, and never the neighbour's page). Waiting services are not routed.
pub fn routed<'a>(desired: &[&'a Service], plans: &'a [ServicePlan]) -> BTreeMap<String, &'a Http> {
    let mut routed = BTreeMap::new();
    let mut claimed = BTreeSet::new();
    for (entry, plan) in desired.iter().zip(plans) {
        let http = match (&plan.goal, &plan.target) {
            (Some(goal), _) => goal.service.http.as_ref(),
            (None, Some(_)) => entry.http.as_ref(),
            (None, None) => None,
        };
        // A version that was put back may claim what a neighbour has by now; the first keeps it.
        if let Some(http) = http
            && claimed.insert((http.domain.as_str(), http.path.as_str()))
        {
            routed.insert(plan.name.to_string(), http);
        }
    }
    routed
}

/// The services that are ours to remove: a unit with our mark, a proved entry, or roots.
fn ours<'a>(observed: &'a Observed, memory: &'a Memory) -> BTreeSet<&'a ServiceName> {
    let units =
        observed.units.iter().filter(|(_, u)| matches!(u.file, UnitFile::Ours(_))).map(|(name, _)| name);
    units.chain(memory.applied.keys()).chain(observed.roots.keys()).collect()
}

fn removal(name: &ServiceName, observed: &Observed, why: &'static str) -> ServicePlan {
    let roots = observed.roots.get(name).into_iter().flatten().cloned().map(Step::Unroot);
    let steps = [Step::Remove(why)].into_iter().chain(roots).collect();
    ServicePlan { name: name.clone(), target: None, goal: None, trouble: None, steps }
}

fn goal_of(
    service: &Service,
    path: &StorePath,
    secrets: Option<&str>,
    applied: Option<&Applied>,
    desired: bool,
) -> Goal {
    let unit = unit::render(service, path);
    let proved = applied.is_some_and(|a| unit::render(&a.service, &a.path) == unit);
    let inputs = inputs_hash(&unit, secrets);
    Goal { service: service.clone(), path: path.clone(), unit, inputs, proved, desired }
}

fn service(
    entry: &Service,
    observed: &Observed,
    memory: &Memory,
    learned: &Learned,
    options: &Options,
    now: Timestamp,
) -> ServicePlan {
    let name = &entry.name;
    let unseen = UnitSeen::default();
    let seen = observed.units.get(name).unwrap_or(&unseen);
    let applied = memory.applied.get(name);
    let before = memory.state.services.get(name);
    let target = entry.artifact.store_path.path();
    let done = |goal: Option<Goal>, trouble: Option<Trouble>, steps: Vec<Step>| ServicePlan {
        name: name.clone(),
        target: target.cloned(),
        goal,
        trouble,
        steps,
    };
    // A reason keeps the time at which it was first found.
    let failed = |reason: String| {
        let old = before.and_then(|b| b.failure.as_ref()).filter(|f| f.reason == reason);
        let failure = Failure {
            at: old.map_or(now, |f| f.at),
            journal: old.map(|f| f.journal.clone()).unwrap_or_default(),
            reason,
            attempted: target.cloned(),
            inputs: None,
        };
        Trouble { rejected: false, failure }
    };

    if let UnitFile::Foreign(path) = &seen.file {
        let reason = format!(
            "{} exists and is not ours; rename the service, or remove that unit and run 'deployer'",
            path.display()
        );
        return done(None, Some(failed(reason)), Vec::new());
    }
    let Some(path) = target else {
        let mut steps = Vec::new();
        if matches!(seen.file, UnitFile::Ours(_)) || applied.is_some() || observed.roots.contains_key(name) {
            steps = removal(name, observed, "the manifest names a placeholder").steps;
        }
        return done(None, None, steps);
    };

    let secrets = observed.secrets.get(name);
    let stamp = secrets.and_then(|s| s.as_ref().ok()).map(String::as_str);
    let candidate = goal_of(entry, path, stamp, applied, true);
    let trouble_of = |goal: &Goal| -> Option<Trouble> {
        if let Some(trouble) = learned.troubles.get(&(name.clone(), goal.inputs.clone())) {
            return Some(trouble.clone());
        }
        if let Some(reason) = learned.unfetchable.get(&goal.path) {
            return Some(failed(reason.clone()));
        }
        None
    };
    let remembered = || {
        let before = before.filter(|b| b.status == Status::Rejected && !options.retry.contains(name))?;
        let failure = before.failure.as_ref()?;
        (failure.inputs.as_deref() == Some(candidate.inputs.as_str()))
            .then(|| Trouble { rejected: true, failure: failure.clone() })
    };

    if let Some(Err(reason)) = secrets {
        // Nothing is started with secrets that others can read, and nothing that runs is touched.
        let goal = applied.map(|a| goal_of(&a.service, &a.path, stamp, applied, false));
        return done(goal, Some(failed(reason.clone())), Vec::new());
    }
    let trouble = trouble_of(&candidate).or_else(remembered);
    let (goal, trouble) = match trouble {
        None => (Some(candidate), None),
        Some(trouble) => {
            let previous = applied.map(|a| goal_of(&a.service, &a.path, stamp, applied, false));
            match previous {
                // What ran before does not come up either: systemd goes on trying, we do not.
                Some(previous) if trouble_of(&previous).is_some() => {
                    return done(Some(previous), Some(trouble), Vec::new());
                }
                other => (other, Some(trouble)),
            }
        }
    };
    let Some(goal) = goal else {
        // Refused, and nothing ran before: nothing is left behind that would crash at every boot.
        let mut steps = Vec::new();
        if matches!(seen.file, UnitFile::Ours(_)) {
            steps.push(Step::Remove("it was refused and there is no version before it"));
        }
        steps.extend(unroots(name, observed, memory, None, Some(path), trouble.as_ref()));
        return done(None, trouble, steps);
    };

    let mut steps = Vec::new();
    let held = observed.roots.get(name);
    if !held.is_some_and(|h| h.contains(goal.path.base())) {
        steps.push(Step::Root(goal.path.clone()));
    }
    if !observed.present.contains(&goal.path) {
        steps.push(Step::Fetch(goal.path.clone()));
    }
    let write = match &seen.file {
        UnitFile::Ours(text) if *text == goal.unit => None,
        UnitFile::Ours(_) if applied.is_some_and(|a| a.path != goal.path) => Some("another version"),
        UnitFile::Ours(_) if goal.proved => Some("the unit was changed on the host"),
        UnitFile::Ours(_) => Some("the manifest's entry changed"),
        UnitFile::Absent if applied.is_some() => Some("the unit was gone"),
        UnitFile::Absent | UnitFile::Foreign(_) => Some("new here"),
    };
    if let Some(why) = write {
        steps.push(Step::Write(why));
    }
    if !seen.wanted {
        steps.push(Step::Enable);
    }
    if let Some(why) = write {
        steps.push(Step::Restart(why));
    } else if !seen.listed.running() {
        steps.push(Step::Restart("it was not running"));
    } else if !goal.proved {
        steps.push(Step::Restart("it was not proved yet"));
    } else if goal.desired && applied.is_none_or(|a| a.service != goal.service) {
        steps.push(Step::Record);
    }
    steps.extend(unroots(name, observed, memory, Some(&goal.path), Some(path), trouble.as_ref()));
    done(Some(goal), trouble, steps)
}

/// Roots that nothing needs any more: not what runs, not one of the versions before it, and not what is still
/// to be fetched.
fn unroots(
    name: &ServiceName,
    observed: &Observed,
    memory: &Memory,
    current: Option<&StorePath>,
    target: Option<&StorePath>,
    trouble: Option<&Trouble>,
) -> Vec<Step> {
    if !memory.readable {
        return Vec::new();
    }
    let applied = memory.applied.get(name).map(|a| &a.path);
    let previous = memory.applied.get(name).map(|a| a.previous.as_slice()).unwrap_or_default();
    let pending = target.filter(|_| trouble.is_none_or(|t| !t.rejected));
    let kept: BTreeSet<&str> =
        current.into_iter().chain(applied).chain(pending).chain(previous).map(StorePath::base).collect();
    let held = observed.roots.get(name).into_iter().flatten();
    held.filter(|base| !kept.contains(base.as_str())).cloned().map(Step::Unroot).collect()
}

/// The versions before the current one, after `current` was proved where `replaced` was before.
pub fn previous_after(current: &StorePath, replaced: Option<&Applied>) -> Vec<StorePath> {
    let mut previous: Vec<StorePath> = Vec::new();
    for path in replaced.iter().flat_map(|a| [&a.path].into_iter().chain(&a.previous)) {
        if path != current && !previous.contains(path) {
            previous.push(path.clone());
        }
    }
    previous.truncate(KEEP_CLOSURES - 1);
    previous
}

impl Plan {
    /// Whether there is nothing to do for any unit, root or closure (the route apart).
    pub fn services_settled(&self) -> bool {
        self.services.iter().chain(&self.gone).all(|s| s.steps.is_empty())
    }

    /// Whether there is nothing to do at all.
    pub fn is_empty(&self) -> bool {
        self.services_settled() && !matches!(self.route, RoutePlan::Write(_))
    }
}
