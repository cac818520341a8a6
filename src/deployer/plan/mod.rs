//! The plan: a pure function from what should be and what is to what is to be done. It never asks the host.
//! It is called again after every round of effects with what that came to, until it has nothing left to do; the
//! same function so decides the first deploy, the repair of drift, and putting a previous version back.

mod service;

use super::applied::LastKnownGood;
use super::listeners::Owner;
use super::observed::{Observed, UnitFile};
use super::outcome::{AttemptFailure, Outcome};
use super::persisted::PersistedState;
use super::routes::{self, Reached, Route};
use super::unit;
use crate::clock::Timestamp;
use crate::hash::Sha256;
use crate::manifest::Service;
use crate::names::{NEXT_SUFFIX, STORE_DIR, ServiceName, StorePath};
use serde::{Serialize, Serializer};
use service::{Given, attempt_stamp};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What a pass goes by besides.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Rejected services to try again.
    pub retry: BTreeSet<ServiceName>,
    /// Remove everything if the manifest says so.
    pub allow_empty: bool,
    /// Started by the timer: fetching again what could not be fetched may wait.
    pub timer: bool,
    /// The units that were active when the pass began. Not as they are now: a start of ours that brings up what it
    /// requires must not make its own attempt look like another one.
    pub active: BTreeSet<String>,
}

/// How much of a goal a pass has seen come up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verified {
    /// Nothing.
    No,
    /// This very unit, but asked for its health at another port or path.
    Unit,
    /// All of it.
    Yes,
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
    /// What goes into an attempt besides entry and unit: its secrets, and whether what it requires runs.
    pub stamp: String,
    /// How much of it has come up before.
    pub verified: Verified,
    /// Whether this is what the manifest says (else: the version before).
    pub desired: bool,
}

impl Goal {
    fn new(
        service: &Service,
        path: &StorePath,
        stamp: String,
        applied: Option<&LastKnownGood>,
        desired: bool,
    ) -> Self {
        let unit = unit::render(service, path);
        // The same entry gives the same unit, and is asked for its health in the same way.
        let verified = match applied {
            Some(a) if a.service == *service && a.path == *path => Verified::Yes,
            Some(a) if !a.is_of_unit(&unit) => Verified::No,
            Some(a) if a.service.probe() == service.probe() => Verified::Yes,
            Some(_) => Verified::Unit,
            None => Verified::No,
        };
        Goal { service: service.clone(), path: path.clone(), unit, stamp, verified, desired }
    }

    /// Whether all of it has come up before.
    pub fn is_verified(&self) -> bool {
        self.verified == Verified::Yes
    }

    /// What goes into an attempt, as a hash. Made when it is asked for: nearly all goals have been reached.
    pub fn inputs(&self) -> String {
        inputs_hash(&self.unit, &self.service, &self.stamp)
    }
}

/// One thing to do for one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Step {
    /// Keep a path from the garbage collector.
    Root(#[serde(serialize_with = "path")] StorePath),
    /// Get a closure from the cache.
    Fetch(#[serde(serialize_with = "path")] StorePath),
    /// Write the unit; the reason.
    Write(#[serde(serialize_with = "why")] &'static str),
    /// Have systemd read the unit again: a person changed it back and forth.
    Reload,
    /// Have it started at boot.
    Enable,
    /// Before it is restarted: verify the new version beside it and lead requests there; the reason.
    Overlap(#[serde(serialize_with = "why")] &'static str),
    /// Restart it and see it come up; the reason.
    Restart(#[serde(serialize_with = "why")] &'static str),
    /// See that it is up, without restarting it; the reason.
    Prove(#[serde(serialize_with = "why")] &'static str),
    /// Stop it, and have it not started at boot: it is paused.
    Pause,
    /// Take the entry down as verified: nothing of the unit changed.
    Record,
    /// Stop it and remove its unit; the reason.
    Remove(#[serde(serialize_with = "why")] &'static str),
    /// Let go of a path.
    Unroot(#[serde(serialize_with = "base")] String),
}

impl Step {
    /// Whether it changes units: an interruption then leaves something to find out.
    pub fn touches(&self) -> bool {
        match self {
            Step::Write(_) | Step::Overlap(_) | Step::Pause | Step::Remove(_) => true,
            Step::Enable | Step::Restart(_) | Step::Prove(_) => false,
            Step::Root(_) | Step::Fetch(_) | Step::Reload | Step::Record | Step::Unroot(_) => false,
        }
    }
}

/// As people read it.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Root(path) => write!(f, "root {path}"),
            Step::Fetch(path) => write!(f, "fetch {path}"),
            Step::Write(why) => write!(f, "write its unit ({why})"),
            Step::Reload => f.write_str("have systemd read its unit again"),
            Step::Enable => f.write_str("have it started at boot"),
            Step::Overlap(why) => {
                write!(f, "verify the new version beside it and route requests to it ({why})")
            }
            Step::Restart(why) => write!(f, "restart and see it come up ({why})"),
            Step::Prove(why) => write!(f, "see that it is up ({why})"),
            Step::Pause => f.write_str("stop it: it is paused"),
            Step::Record => f.write_str("record its changed entry"),
            Step::Remove(why) => write!(f, "stop and remove ({why})"),
            Step::Unroot(base) => write!(f, "unroot {STORE_DIR}/{base}"),
        }
    }
}

/// What a step is done to, in `deployer plan --json`.
fn path<S: Serializer>(path: &StorePath, s: S) -> Result<S::Ok, S::Error> {
    s.collect_map([("path", path)])
}

fn base<S: Serializer>(base: &str, s: S) -> Result<S::Ok, S::Error> {
    s.collect_map([("path", format!("{STORE_DIR}/{base}"))])
}

/// Why it is done.
fn why<S: Serializer>(why: &str, s: S) -> Result<S::Ok, S::Error> {
    s.collect_map([("why", why)])
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
    pub failure: Option<AttemptFailure>,
    /// It is stopped on purpose.
    pub paused: bool,
    /// Somebody's drop-ins: those that its unit has, or that its process was started with.
    pub drop_ins: Vec<String>,
    /// What its process runs instead of its unit, if it runs.
    pub instead: Option<Option<StorePath>>,
    /// Why a new version is not verified beside the one that runs though the manifest says so.
    pub remark: Option<String>,
    /// In this order.
    pub steps: Vec<Step>,
}

impl ServicePlan {
    fn nothing(name: &ServiceName) -> Self {
        ServicePlan {
            name: name.clone(),
            target: None,
            goal: None,
            failure: None,
            paused: false,
            drop_ins: Vec::new(),
            instead: None,
            remark: None,
            steps: Vec::new(),
        }
    }
}

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The services of this host, in the manifest's order, then those that go.
    pub services: Vec<ServicePlan>,
    /// Services of ours that are not in the manifest (any more).
    pub gone: Vec<ServicePlan>,
    /// Where requests are led.
    pub routes: Vec<Route>,
    /// Candidates to stop and remove once the route leads past them.
    pub candidates: Vec<ServiceName>,
}

impl Plan {
    /// Whether there is nothing to do for any service that is in the manifest.
    pub fn is_settled(&self) -> bool {
        self.services.iter().all(|s| s.steps.is_empty())
    }

    /// Whether there is nothing to do at all, but for the routes.
    pub fn is_empty(&self) -> bool {
        self.is_settled() && self.gone.iter().all(|s| s.steps.is_empty()) && self.candidates.is_empty()
    }
}

/// The manifest would remove everything: refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WouldEmpty(pub Vec<ServiceName>);

/// A short hash of what goes into an attempt: the unit, the whole entry (a corrected health path is worth
/// another one), and the stamp of what is outside of both.
fn inputs_hash(unit: &str, service: &Service, stamp: &str) -> String {
    let mut inputs = Vec::new();
    let entry = serde_json::to_vec(service).expect("plain data with text keys serializes");
    for part in [unit.as_bytes(), &entry, stamp.as_bytes()] {
        inputs.extend((part.len() as u64).to_le_bytes());
        inputs.extend(part);
    }
    Sha256::of(&inputs).short(12)
}

/// Compares what should be with what is. `so_far`: what the effects of this pass came to.
pub fn plan(
    desired: &[&Service],
    observed: &Observed,
    persisted: &PersistedState,
    so_far: &Outcome,
    options: &Options,
    now: Timestamp,
) -> Result<Plan, WouldEmpty> {
    let ours = ours(observed, persisted);
    if desired.iter().all(|s| s.artifact.store_path.path().is_none())
        && !ours.is_empty()
        && !options.allow_empty
    {
        return Err(WouldEmpty(ours.into_iter().cloned().collect()));
    }
    let others = others(desired, observed, persisted);
    let closed = closed_of(&others, observed);
    let given = Given { observed, others, persisted, so_far, options, now };
    let services: Vec<ServicePlan> = desired.iter().map(|s| service::service(s, &given)).collect();
    let names: BTreeSet<&ServiceName> = desired.iter().map(|s| &s.name).collect();
    // What cannot be read disables deletion.
    let gone = ours.into_iter().filter(|n| persisted.readable && !names.contains(n)).map(|name| {
        let removal = service::removal(name, observed, "not in the manifest");
        let steps = if so_far.pending.contains_key(name) { Vec::new() } else { removal };
        ServicePlan { steps, ..ServicePlan::nothing(name) }
    });
    let gone = gone.collect();
    let routes = routes::of(routed(desired, &services), &closed);
    let candidates = observed.candidates.iter().cloned().collect();
    Ok(Plan { services, gone, routes, candidates })
}

/// What is reached over HTTP: what runs, and what should run but cannot (whose answer is then honestly a 502, and never
/// the neighbour's page). Waiting services are not routed.
fn routed<'a>(desired: &[&'a Service], plans: &'a [ServicePlan]) -> impl Iterator<Item = Reached<'a>> {
    desired.iter().zip(plans).filter_map(|(entry, plan)| {
        let http = match (&plan.goal, &plan.target) {
            (Some(goal), _) => goal.service.http.as_ref(),
            (None, Some(_)) => entry.http.as_ref(),
            (None, None) => None,
        };
        Some(Reached { service: &plan.name, http: http?, own: None })
    })
}

type PortOwners = BTreeMap<(ServiceName, u16), Vec<Owner>>;

/// Who holds ports of services here besides these themselves. Services of ours that leave the port are none of them:
/// they are stopped before another one starts there.
fn others(desired: &[&Service], observed: &Observed, persisted: &PersistedState) -> PortOwners {
    let held = observed.ports.iter().filter_map(|(at, answers)| Some((at, answers.others()?)));
    let leaves = |owner: &Owner, port: u16| {
        let Some(name) = owner.unit.as_deref().and_then(|u| u.strip_suffix(".service")) else { return false };
        let name = name.strip_suffix(NEXT_SUFFIX).unwrap_or(name);
        let Some(had) = persisted.applied.values().find(|a| a.service.name.as_str() == name) else {
            return false;
        };
        let had = had.service.port();
        let entry = desired.iter().find(|s| s.name.as_str() == name);
        entry.is_none_or(|entry| had == Some(port) && entry.port() != had)
    };
    held.map(|((name, port), owners)| {
        let staying: Vec<Owner> = owners.iter().filter(|o| !leaves(o, *port)).cloned().collect();
        ((name.clone(), *port), staying)
    })
    .filter(|(_, staying)| !staying.is_empty())
    .collect()
}

/// Ports to which nobody may be led: of services that do not run, where somebody else would answer for them.
pub fn closed(desired: &[&Service], observed: &Observed, persisted: &PersistedState) -> BTreeSet<u16> {
    closed_of(&others(desired, observed, persisted), observed)
}

fn closed_of(others: &PortOwners, observed: &Observed) -> BTreeSet<u16> {
    let runs = |name: &ServiceName| observed.units.get(name).is_some_and(|u| u.listed.running());
    others.keys().filter(|(name, _)| !runs(name)).map(|(_, port)| *port).collect()
}

/// The services that are ours to remove: a unit with our mark, a last known good, or roots.
fn ours<'a>(observed: &'a Observed, persisted: &'a PersistedState) -> BTreeSet<&'a ServiceName> {
    let units = observed.units.iter().filter(|(_, u)| matches!(u.file, UnitFile::Ours(_)));
    units.map(|(name, _)| name).chain(persisted.applied.keys()).chain(observed.roots.keys()).collect()
}

/// Candidates that an earlier pass left beside a version that is still as it came up: nothing of the new
/// version is in place, so requests go back to that one before anything else.
pub fn abandoned(observed: &Observed, persisted: &PersistedState) -> Vec<ServiceName> {
    let intact = |name: &&ServiceName| {
        let seen = observed.units.get(*name).filter(|seen| seen.listed.running());
        match (seen.map(|seen| &seen.file), persisted.applied.get(*name)) {
            (Some(UnitFile::Ours(text)), Some(good)) => good.is_of_unit(text),
            _ => false,
        }
    };
    observed.candidates.iter().filter(intact).cloned().collect()
}

/// Takes down what was rejected in this pass as what it is now that the pass is over: with what it requires as
/// its own start left it.
pub fn settle_inputs(plan: &mut Plan, desired: &[&Service], observed: &Observed, so_far: &Outcome) {
    for (plan, entry) in plan.services.iter_mut().zip(desired) {
        let (Some(path), Some(failure)) = (&plan.target, &mut plan.failure) else { continue };
        let of_this_pass = so_far.failures.values().any(|f| f.record() == failure.record());
        let record = failure.record_mut();
        if of_this_pass && record.inputs.is_some() && record.attempted.as_ref() == Some(path) {
            let stamp = attempt_stamp(entry, observed, &observed.active);
            record.inputs = Some(inputs_hash(&unit::render(entry, path), entry, &stamp));
        }
    }
}
