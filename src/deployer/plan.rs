//! The plan: a pure function from what should be and what is to what is to be done. It never asks the host.
//! It is called again after every round of effects with what was learned, until it has nothing left to do; the
//! same function so decides the first deploy, the repair of drift, and putting a previous version back.

use super::caddy::{self, RoutePlan};
use super::listeners::{self, Answers, Owner};
use super::overrides::Overrides;
use super::state::{Exposure, FailureRecord, ServicePhase, State};
use super::systemd::Listed;
use super::unit;
use crate::clock::Timestamp;
use crate::manifest::{Http, Rollout, Service};
use crate::names::{ServiceName, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

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
    /// The service units that were active when the pass began, whoever's they are. Not looked at again: a start
    /// of ours that brings up what it requires must not make its own attempt look like another one.
    pub active: BTreeSet<String>,
    /// Who would answer at the ports of the services that should be here; what is not here is not known.
    pub ports: BTreeMap<(ServiceName, u16), Answers>,
    /// Services that found their port in use at another address than 127.0.0.1 when they were tried last, where
    /// somebody still has it.
    pub kept_out: BTreeSet<ServiceName>,
    /// Services that have a candidate: one that an earlier pass left, or this one started.
    pub candidates: BTreeSet<ServiceName>,
    /// Services about to change whose `NAME-next` is somebody else's unit, there.
    pub foreign_next: BTreeMap<ServiceName, PathBuf>,
    /// Caddy.
    pub caddy: caddy::CaddyState,
}

/// What was seen of one unit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnitSeen {
    /// Its file.
    pub file: UnitFile,
    /// Whether it is started at boot.
    pub enabled: bool,
    /// What systemd says of it.
    pub listed: Listed,
    /// Its process started after its file was written. Only of units that run.
    pub current: bool,
    /// Its process runs no closure that its file names: it was started from another one.
    pub wrong_closure: bool,
    /// systemd has read its file as it was before. Only of units that run: a start reads it anew.
    pub needs_reload: bool,
    /// Another file of its name, a mask or a copy of ours, may stand in for it.
    pub shadowed: bool,
    /// Its secrets file was changed after its process started.
    pub secrets_changed: bool,
    /// Somebody's drop-ins: those that systemd has loaded with its file, and those that it would load.
    pub drop_ins: Vec<PathBuf>,
    /// What systemd has loaded starts something else than its file says: what.
    pub replaced: Option<String>,
    /// The closure that its process shows, one that its file names before others. Only where it was looked for.
    pub shows: Option<StorePath>,
    /// Its present invocation. Only of units that run.
    pub invocation: Option<String>,
    /// That invocation was found to run what its file says, with nobody's drop-ins: by an earlier pass, or by the
    /// watch of this one.
    pub verified: bool,
    /// The same by this look alone, which cannot tell what was loaded when it was started.
    pub clean: bool,
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
pub struct LastKnownGood {
    /// The entry.
    pub service: Service,
    /// Its store path.
    pub path: StorePath,
    /// The paths proved before it that are still held, newest first.
    pub previous: Vec<StorePath>,
}

/// What earlier passes left for this one.
#[derive(Debug, Clone)]
pub struct PersistedState {
    /// The state file.
    pub state: State,
    /// What was last proved of each service.
    pub applied: BTreeMap<ServiceName, LastKnownGood>,
    /// False when something of it could not be read: then nothing is removed.
    pub readable: bool,
    /// Services that an interrupted pass was about to touch.
    pub interrupted: BTreeSet<ServiceName>,
    /// Pauses and pins.
    pub overrides: Overrides,
    /// The invocations that were found to run what their units say.
    pub verified: BTreeMap<ServiceName, String>,
}

/// What was learned in this pass about an attempt, known by its inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptFailure {
    /// Whether the release itself is bad (and is remembered), or the attempt just did not work out.
    pub rejected: bool,
    /// The reason.
    pub failure: FailureRecord,
}

/// Everything that was learned in this pass.
#[derive(Debug, Clone, Default)]
pub struct Attempts {
    /// Attempts that failed, by service and inputs.
    pub failures: BTreeMap<(ServiceName, String), AttemptFailure>,
    /// Paths that could not be fetched, with the reason.
    pub unfetchable: BTreeMap<StorePath, String>,
    /// Services that were started: what was known of their exposure was of their unit before.
    pub started: BTreeSet<ServiceName>,
    /// The exposure of units after the last start, by name; none where systemd did not say.
    pub exposures: BTreeMap<String, Exposure>,
    /// Candidates that have the requests of their services, proved with these inputs: where they are asked.
    pub led: BTreeMap<ServiceName, (Http, String)>,
    /// Services whose units systemd is not through with.
    pub pending: BTreeMap<ServiceName, PendingJob>,
    /// What this host's disk did not take, where the pass went on all the same.
    pub unwritten: Vec<String>,
}

impl Attempts {
    /// What came of an attempt at this goal in this pass, if it failed.
    fn trouble_of(&self, name: &ServiceName, goal: &Goal) -> Option<&AttemptFailure> {
        if self.failures.is_empty() {
            return None;
        }
        self.failures.get(&(name.clone(), goal.inputs()))
    }
}

/// A stop or start that takes its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingJob {
    /// What it is at, for people.
    pub why: String,
    /// The unit that is waited for: its own, or the one that has its port.
    pub unit: String,
    /// When it was asked for.
    pub since: Instant,
    /// Whether there is something to do once it is through.
    pub awaited: bool,
}

/// What a person asked for besides.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Rejected services to try again.
    pub retry: BTreeSet<ServiceName>,
    /// Remove everything if the manifest says so.
    pub allow_empty: bool,
    /// Started by the timer: fetching again what could not be fetched may wait.
    pub timer: bool,
    /// Which of Caddy's servers gets our route.
    pub caddy_server: Option<String>,
    /// The socket that Caddy is changed through, if it is one.
    pub caddy_socket: Option<PathBuf>,
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
    /// Whether a pass has proved this very unit before, asked as the entry says.
    pub proved: bool,
    /// Whether it has proved the unit, if maybe at another port or health path.
    pub unit_proved: bool,
    /// Whether this is what the manifest says (else: the version before).
    pub desired: bool,
}

impl Goal {
    /// What goes into an attempt, as a hash. Made when it is asked for: nearly all goals have been reached.
    pub fn inputs(&self) -> String {
        inputs_hash(&self.unit, &self.service, &self.stamp)
    }
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
    /// Have systemd read the unit again: a person changed it back and forth.
    Reload,
    /// Have it started at boot.
    Enable,
    /// Before it is restarted: prove the new version beside it and lead requests there; the reason.
    Overlap(&'static str),
    /// Restart it and see it come up; the reason.
    Restart(&'static str),
    /// See that it is up, without restarting it; the reason.
    Prove(&'static str),
    /// Stop it, and have it not started at boot: it is paused.
    Pause,
    /// Take the entry down as proved: nothing of the unit changed.
    Record,
    /// Stop it and remove its unit; the reason.
    Remove(&'static str),
    /// Let go of a path.
    Unroot(String),
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
    pub trouble: Option<AttemptFailure>,
    /// It is stopped on purpose.
    pub paused: bool,
    /// Somebody's drop-ins: those that its unit has, or that its process was started with.
    pub drop_ins: Vec<String>,
    /// What its process runs instead of its unit, if it runs.
    pub instead: Option<Option<StorePath>>,
    /// Why a new version is not proved beside the one that runs though the manifest says so.
    pub remark: Option<String>,
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
    /// Candidates to stop and remove once the route leads past them.
    pub candidates: Vec<ServiceName>,
}

/// The manifest would remove everything: refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WouldEmpty(pub Vec<ServiceName>);

/// A short hash of what goes into an attempt: the unit, the whole entry (a corrected health path is worth
/// another one), and the stamp of what is outside of both.
fn inputs_hash(unit: &str, service: &Service, stamp: &str) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let entry = serde_json::to_vec(service).expect("plain data with text keys serializes");
    for part in [unit.as_bytes(), &entry, stamp.as_bytes()] {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    }
    context.finish().as_ref()[..12].iter().map(|b| format!("{b:02x}")).collect()
}

/// Compares what should be with what is.
pub fn plan(
    desired: &[&Service],
    observed: &Observed,
    persisted: &PersistedState,
    attempts: &Attempts,
    options: &Options,
    now: Timestamp,
) -> Result<Plan, WouldEmpty> {
    let names: BTreeSet<&ServiceName> = desired.iter().map(|s| &s.name).collect();
    let ours = ours(observed, persisted);
    if desired.iter().all(|s| s.artifact.store_path.path().is_none())
        && !ours.is_empty()
        && !options.allow_empty
    {
        return Err(WouldEmpty(ours.into_iter().cloned().collect()));
    }
    let others = others(desired, observed, persisted);
    let services: Vec<ServicePlan> =
        desired.iter().map(|s| service(s, observed, &others, persisted, attempts, options, now)).collect();
    let gone = if persisted.readable {
        ours.into_iter()
            .filter(|n| !names.contains(n))
            .map(|n| match attempts.pending.contains_key(n) {
                true => ServicePlan { steps: Vec::new(), ..removal(n, observed, "") },
                false => removal(n, observed, "not in the manifest"),
            })
            .collect()
    } else {
        Vec::new()
    };
    let routed = routed(desired, &services);
    let entries: Vec<&Http> = routed.values().copied().collect();
    let closed = closed(desired, observed, persisted);
    let route = caddy::route(&entries, &closed);
    let route = caddy::plan(options.caddy_server.as_deref(), route.as_ref(), &observed.caddy);
    let route = caddy::with_view(route, options.caddy_socket.as_deref(), &observed.caddy);
    let candidates = observed.candidates.iter().cloned().collect();
    Ok(Plan { services, gone, route, candidates })
}

/// How long the timer's passes leave a closure alone that could not be fetched, in seconds: twice as long with
/// every attempt from the third on, half an hour at most. A pass started by a person or a push tries at once.
fn backoff_sec(attempts: u32) -> i64 {
    match attempts {
        0..=2 => 0,
        n => (300_i64 << (n - 2).min(4)).min(1800),
    }
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

/// Who holds ports of services here besides these themselves. Services of ours that leave the port are none of them:
/// they are stopped before another one starts there.
fn others(
    desired: &[&Service],
    observed: &Observed,
    persisted: &PersistedState,
) -> BTreeMap<(ServiceName, u16), Vec<Owner>> {
    let entries: BTreeMap<&str, &Service> = desired.iter().map(|s| (s.name.as_str(), *s)).collect();
    let leaves = |owner: &Owner, port: u16| {
        let Some(name) = owner.unit.as_deref().and_then(|u| u.strip_suffix(".service")) else { return false };
        let name = name.strip_suffix(crate::names::NEXT_SUFFIX).unwrap_or(name);
        let had = persisted.applied.iter().find(|(n, _)| n.as_str() == name).map(|(_, a)| a.service.port());
        match (had, entries.get(name)) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(had), Some(entry)) => had == Some(port) && entry.port() != had,
        }
    };
    let mut others = BTreeMap::new();
    for ((name, port), answers) in &observed.ports {
        let Answers::Others(owners) = answers else { continue };
        let staying: Vec<Owner> = owners.iter().filter(|o| !leaves(o, *port)).cloned().collect();
        if !staying.is_empty() {
            others.insert((name.clone(), *port), staying);
        }
    }
    others
}

/// Ports to which nobody may be led: of services that do not run, where somebody else would answer for them.
pub fn closed(desired: &[&Service], observed: &Observed, persisted: &PersistedState) -> BTreeSet<u16> {
    let runs = |name: &ServiceName| observed.units.get(name).is_some_and(|u| u.listed.running());
    let held = others(desired, observed, persisted).into_keys();
    held.filter(|(name, _)| !runs(name)).map(|(_, port)| port).collect()
}

/// The services that are ours to remove: a unit with our mark, a proved entry, or roots.
fn ours<'a>(observed: &'a Observed, persisted: &'a PersistedState) -> BTreeSet<&'a ServiceName> {
    let units =
        observed.units.iter().filter(|(_, u)| matches!(u.file, UnitFile::Ours(_))).map(|(name, _)| name);
    units.chain(persisted.applied.keys()).chain(observed.roots.keys()).collect()
}

fn removal(name: &ServiceName, observed: &Observed, why: &'static str) -> ServicePlan {
    let roots = observed.roots.get(name).into_iter().flatten().cloned().map(Step::Unroot);
    let steps = [Step::Remove(why)].into_iter().chain(roots).collect();
    let (drop_ins, instead, remark) = (Vec::new(), None, None);
    ServicePlan {
        name: name.clone(),
        target: None,
        goal: None,
        trouble: None,
        paused: false,
        drop_ins,
        instead,
        remark,
        steps,
    }
}

fn goal_of(
    service: &Service,
    path: &StorePath,
    stamp: &str,
    applied: Option<&LastKnownGood>,
    desired: bool,
) -> Goal {
    let unit = unit::render(service, path);
    // The same entry gives the same unit, and is asked for its health in the same way.
    let same = applied.is_some_and(|a| a.service == *service && a.path == *path);
    let unit_proved = same || applied.is_some_and(|a| unit::render(&a.service, &a.path) == unit);
    let proved = same || unit_proved && applied.is_some_and(|a| a.service.probe() == service.probe());
    let stamp = stamp.to_string();
    Goal { service: service.clone(), path: path.clone(), unit, stamp, proved, unit_proved, desired }
}

fn service(
    entry: &Service,
    observed: &Observed,
    others: &BTreeMap<(ServiceName, u16), Vec<Owner>>,
    persisted: &PersistedState,
    attempts: &Attempts,
    options: &Options,
    now: Timestamp,
) -> ServicePlan {
    let name = &entry.name;
    let unseen = UnitSeen::default();
    let seen = observed.units.get(name).unwrap_or(&unseen);
    let applied = persisted.applied.get(name);
    let before = persisted.state.services.get(name);
    let target = entry.artifact.store_path.path();
    // What earlier passes saw of a process that is still the same, and those did not verify, it was started with.
    let outlived = before.filter(|_| seen.listed.running() && !seen.verified && seen.drop_ins.is_empty());
    let outlived = outlived.map(|b| b.drop_ins.as_slice()).unwrap_or_default();
    let drop_ins: Vec<String> = match outlived {
        [] => seen.drop_ins.iter().map(|path| path.display().to_string()).collect(),
        outlived => outlived.to_vec(),
    };
    let done = |goal: Option<Goal>, trouble: Option<AttemptFailure>, steps: Vec<Step>| ServicePlan {
        name: name.clone(),
        target: target.cloned(),
        goal,
        trouble,
        paused: false,
        drop_ins: drop_ins.clone(),
        instead: seen.replaced.as_ref().map(|_| seen.shows.clone()),
        remark: None,
        steps,
    };
    // A reason keeps the time at which it was first found.
    let failed = |reason: String| {
        let old = before.and_then(|b| b.failure.as_ref()).filter(|f| f.reason == reason);
        let failure = FailureRecord {
            at: old.map_or(now, |f| f.at),
            journal: old.map(|f| f.journal.clone()).unwrap_or_default(),
            attempts: old.map_or(0, |f| f.attempts),
            reason,
            attempted: target.cloned(),
            inputs: None,
            kept_out: false,
        };
        AttemptFailure { rejected: false, failure }
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
        if attempts.pending.contains_key(name) {
            steps.clear();
        }
        return done(None, None, steps);
    };

    let secrets = observed.secrets.get(name);
    let stamp = stamp(entry, secrets, observed);
    let candidate = goal_of(entry, path, &stamp, applied, true);
    let tried = candidate.unit.clone();
    if let Some(pending) = attempts.pending.get(name) {
        let paused = persisted.overrides.is_paused(name, now);
        let trouble = failed(format!("{}; the next pass goes on with it", pending.why));
        return ServicePlan { paused, ..done(Some(candidate), Some(trouble), Vec::new()) };
    }
    // Started there, it could not listen, or the other one would answer for it.
    let held = |service: &Service| {
        let port = service.port()?;
        let owners = others.get(&(name.clone(), port))?;
        Some(listeners::in_the_way(port, name.as_str(), owners))
    };
    let answers =
        |service: &Service| service.port().and_then(|port| observed.ports.get(&(name.clone(), port)));
    let trouble_of = |goal: &Goal| -> Option<AttemptFailure> {
        if let Some(trouble) = attempts.trouble_of(name, goal) {
            return Some(trouble.clone());
        }
        if let Some(reason) = attempts.unfetchable.get(&goal.path) {
            let mut trouble = failed(reason.clone());
            trouble.failure.attempts += 1;
            trouble.failure.at = now;
            return Some(trouble);
        }
        if let Some(reason) = held(&goal.service) {
            return Some(failed(reason));
        }
        let failure = before.and_then(|b| b.failure.as_ref())?;
        let again = options.timer
            && !observed.present.contains(&goal.path)
            && failure.attempts > 0
            && failure.attempted.as_ref() == Some(&goal.path)
            && (0..backoff_sec(failure.attempts)).contains(&(now.0 - failure.at.0));
        again.then(|| AttemptFailure { rejected: false, failure: failure.clone() })
    };
    let remembered = || {
        let failure = before.filter(|_| !options.retry.contains(name))?.failure.as_ref()?;
        let same = failure.inputs.as_ref().is_some_and(|inputs| *inputs == candidate.inputs());
        (same && (!failure.kept_out || observed.kept_out.contains(name)))
            .then(|| AttemptFailure { rejected: !failure.kept_out, failure: failure.clone() })
    };

    if persisted.overrides.is_paused(name, now) {
        let goal = applied.map(|a| goal_of(&a.service, &a.path, &stamp, applied, false));
        let stopped = matches!(seen.listed.active.as_str(), "" | "inactive" | "failed") && !seen.enabled;
        let mut steps: Vec<Step> = lost_roots(name, observed, applied).collect();
        if !stopped {
            steps.push(Step::Pause);
        }
        return ServicePlan { paused: true, ..done(goal, remembered(), steps) };
    }
    if let Some(reason) = &seen.replaced {
        // Whatever is started now is not ours: what runs is left alone, and kept from the garbage collector.
        let held = observed.roots.get(name);
        let other = seen.shows.iter().filter(|path| !held.is_some_and(|h| h.contains(path.base())));
        let mut steps: Vec<Step> =
            lost_roots(name, observed, applied).chain(other.cloned().map(Step::Root)).collect();
        if seen.needs_reload {
            steps.push(Step::Reload);
        }
        // Not started anew since: it is as it should be, as long as nobody restarts it.
        let intact = matches!(&seen.file, UnitFile::Ours(text) if *text == candidate.unit);
        if candidate.proved && intact && seen.shows.as_ref() == Some(path) && !drop_ins.is_empty() {
            if applied.is_none_or(|a| a.service != candidate.service) {
                steps.push(Step::Record);
            }
            return done(Some(candidate), None, steps);
        }
        let goal = applied.map(|a| goal_of(&a.service, &a.path, &stamp, applied, false));
        return done(goal, Some(failed(reason.clone())), steps);
    }
    if let Some(Err(reason)) = secrets {
        // Nothing is started with secrets that others can read, and nothing that runs is touched.
        let goal = applied.map(|a| goal_of(&a.service, &a.path, &stamp, applied, false));
        let steps = lost_roots(name, observed, applied).collect();
        return done(goal, Some(failed(reason.clone())), steps);
    }
    // A refusal before what cannot be fetched: that may be another service's attempt with the same closure.
    let attempted = attempts.trouble_of(name, &candidate).cloned();
    let trouble = attempted.or_else(remembered).or_else(|| trouble_of(&candidate));
    let (goal, trouble) = match trouble {
        None => (Some(candidate), None),
        Some(trouble) => {
            let previous = applied.map(|a| goal_of(&a.service, &a.path, &stamp, applied, false));
            // Whose port is held is left as it is, but for a version that this pass has put in its place.
            let there = |goal: &Goal| matches!(&seen.file, UnitFile::Ours(text) if *text == goal.unit);
            let untried = |goal: &Goal| {
                let tried = attempts.trouble_of(name, goal).is_some();
                !tried && held(&goal.service).is_some() && !there(goal)
            };
            match previous {
                // What ran before does not come up either: systemd goes on trying, we do not.
                Some(previous) if trouble_of(&previous).is_some() && !untried(&previous) => {
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
        steps.extend(unroots(name, observed, persisted, None, Some(path), trouble.as_ref()));
        return done(None, trouble, steps);
    };

    let mut steps = Vec::new();
    let held = observed.roots.get(name);
    if !held.is_some_and(|h| h.contains(goal.path.base())) {
        steps.push(Step::Root(goal.path.clone()));
    }
    steps.extend(lost_roots(name, observed, applied).filter(|step| *step != Step::Root(goal.path.clone())));
    if !observed.present.contains(&goal.path) {
        steps.push(Step::Fetch(goal.path.clone()));
    }
    let write = match &seen.file {
        UnitFile::Ours(text) if *text == goal.unit && !seen.shadowed => None,
        UnitFile::Ours(text) if *text == goal.unit => Some("another unit stood in for it"),
        UnitFile::Ours(text) if !goal.desired && *text == tried => Some("putting the version before back"),
        UnitFile::Ours(_) if applied.is_some_and(|a| a.path != goal.path) => Some("another version"),
        UnitFile::Ours(_) if goal.proved => Some("the unit was changed on the host"),
        UnitFile::Ours(_) => Some("the manifest's entry changed"),
        UnitFile::Absent if applied.is_some() => Some("the unit was gone"),
        UnitFile::Absent | UnitFile::Foreign(_) => Some("new here"),
    };
    match write {
        Some(why) => steps.push(Step::Write(why)),
        None if seen.needs_reload => steps.push(Step::Reload),
        None => {}
    }
    if !seen.enabled {
        steps.push(Step::Enable);
    }
    if let Some(why) = write {
        if overlaps(&goal, applied, seen, observed) {
            steps.push(Step::Overlap(why));
        }
        steps.push(Step::Restart(why));
    } else if !seen.listed.running() {
        steps.push(Step::Restart("it was not running"));
    } else if !outlived.is_empty() {
        steps.push(Step::Restart("it was started with a drop-in that is gone"));
    } else if seen.wrong_closure {
        steps.push(Step::Restart("its process ran another version than its unit"));
    } else if persisted.interrupted.contains(name) && !seen.current {
        steps.push(Step::Restart("an earlier pass was interrupted before it restarted it"));
    } else if goal.unit_proved && !goal.proved {
        steps.push(Step::Prove("how it is asked for its health changed"));
    } else if goal.proved
        && !attempts.started.contains(name)
        && answers(&goal.service) == Some(&Answers::Nobody)
    {
        // It may still be coming up, as after a boot. If it did not in the last pass, its process has missed its turn.
        let failed = before.is_some_and(|b| b.status == ServicePhase::Failed);
        steps.push(match failed {
            true => Step::Restart("it runs, but nothing listens on its port"),
            false => Step::Prove("nothing listens on its port"),
        });
    } else if !goal.proved && seen.current {
        steps.push(Step::Prove("an earlier pass was interrupted while it came up"));
    } else if !goal.proved {
        steps.push(Step::Restart("it was not proved yet"));
    } else if goal.desired && applied.is_none_or(|a| a.service != goal.service) {
        steps.push(Step::Record);
    }
    steps.extend(unroots(name, observed, persisted, Some(&goal.path), Some(path), trouble.as_ref()));
    let remark = observed.foreign_next.get(name).filter(|_| write.is_some() && goal.desired).map(|theirs| {
        format!(
            "restarted without an overlap, because {} exists and is not ours; remove or rename that",
            theirs.display()
        )
    });
    ServicePlan { remark, ..done(Some(goal), trouble, steps) }
}

/// Whether the new version is to be proved beside the old one: where there is an old one that answers, and
/// Caddy to lead requests past it. A candidate that is there already has the requests (or had them: an
/// earlier pass died); the unit is then restarted behind it.
fn overlaps(goal: &Goal, applied: Option<&LastKnownGood>, seen: &UnitSeen, observed: &Observed) -> bool {
    goal.desired
        && !applied.is_some_and(|a| takes_state(&goal.service, &a.service))
        && goal.service.rollout == Rollout::Overlap
        && goal.service.port_variable().is_some()
        && seen.listed.running()
        && matches!(observed.caddy, caddy::CaddyState::Servers(_))
        && !observed.candidates.contains(&goal.service.name)
        && !observed.foreign_next.contains_key(&goal.service.name)
}

/// Whether the start of one version takes the state folder away from another that runs: systemd gives the folder
/// to whom its unit names.
fn takes_state(new: &Service, old: &Service) -> bool {
    let user = |s: &Service| {
        let name = if s.dynamic_user() { s.dynamic_user_name() } else { Some(s.exec.user.as_str()) };
        (s.dynamic_user(), name.map(String::from), s.exec.group.clone())
    };
    new.systemd.state_directory.is_some() && user(new) != user(old)
}

/// Candidates that an earlier pass left beside a version that is still as it was proved: nothing of the new
/// version is in place, so requests go back to the proved one before anything else.
pub fn abandoned<'a>(observed: &'a Observed, persisted: &PersistedState) -> Vec<&'a ServiceName> {
    let intact = |name: &ServiceName| {
        let proved = persisted.applied.get(name).map(|a| unit::render(&a.service, &a.path));
        let seen = observed.units.get(name);
        seen.is_some_and(|s| {
            s.listed.running() && matches!((&s.file, &proved), (UnitFile::Ours(t), Some(p)) if t == p)
        })
    };
    observed.candidates.iter().filter(|name| intact(name)).collect()
}

/// What goes into an attempt besides the unit: its secrets, and whether what it requires runs.
fn stamp(entry: &Service, secrets: Option<&Result<String, String>>, observed: &Observed) -> String {
    let mut stamp = secrets.and_then(|s| s.as_ref().ok()).cloned().unwrap_or_default();
    for unit in &entry.systemd.requires {
        let runs = observed.active.contains(unit.as_str());
        stamp.push_str(&format!(";{unit}={}", u8::from(runs)));
    }
    stamp
}

/// Takes down what was refused in this pass as what it is now that the pass is over: with what it requires as
/// its own start left it.
pub fn settle_inputs(plan: &mut Plan, desired: &[&Service], observed: &Observed, attempts: &Attempts) {
    for (plan, entry) in plan.services.iter_mut().zip(desired) {
        let stamp = stamp(entry, observed.secrets.get(&plan.name), observed);
        if let (Some(path), Some(AttemptFailure { failure, .. })) = (&plan.target, &mut plan.trouble)
            && failure.inputs.is_some()
            && failure.attempted.as_ref() == Some(path)
            && attempts.failures.values().any(|t| t.failure == *failure)
        {
            failure.inputs = Some(inputs_hash(&unit::render(entry, path), entry, &stamp));
        }
    }
}

/// Roots that are gone though what they held is still there: of the version that was proved and those before it.
fn lost_roots(
    name: &ServiceName,
    observed: &Observed,
    applied: Option<&LastKnownGood>,
) -> impl Iterator<Item = Step> {
    let held = observed.roots.get(name);
    applied
        .into_iter()
        .flat_map(|a| [&a.path].into_iter().chain(&a.previous))
        .filter(move |path| {
            observed.present.contains(*path) && !held.is_some_and(|h| h.contains(path.base()))
        })
        .map(|path| Step::Root(path.clone()))
}

/// Roots that nothing needs any more: not what runs, not one of the versions before it, and not what is still
/// to be fetched.
fn unroots(
    name: &ServiceName,
    observed: &Observed,
    persisted: &PersistedState,
    current: Option<&StorePath>,
    target: Option<&StorePath>,
    trouble: Option<&AttemptFailure>,
) -> Vec<Step> {
    if !persisted.readable {
        return Vec::new();
    }
    let applied = persisted.applied.get(name).map(|a| &a.path);
    let previous = persisted.applied.get(name).map(|a| a.previous.as_slice()).unwrap_or_default();
    let pending = target.filter(|_| trouble.is_none_or(|t| !t.rejected));
    let kept: BTreeSet<&str> =
        current.into_iter().chain(applied).chain(pending).chain(previous).map(StorePath::base).collect();
    let held = observed.roots.get(name).into_iter().flatten();
    held.filter(|base| !kept.contains(base.as_str())).cloned().map(Step::Unroot).collect()
}

/// The versions before the current one, after `current` was proved where `replaced` was before.
pub fn previous_after(current: &StorePath, replaced: Option<&LastKnownGood>) -> Vec<StorePath> {
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
        self.services_settled() && self.candidates.is_empty() && !matches!(self.route, RoutePlan::Write(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Artifact, ArtifactPath, Exec, Hardening, Rollout, Systemd};
    use serde_json::{Map, json};

    const NOW: Timestamp = Timestamp(1_000_000);

    fn path(n: u8) -> StorePath {
        StorePath::parse(&format!("/nix/store/{}-v{n}", n.to_string().repeat(32))).unwrap()
    }

    fn name(text: &str) -> ServiceName {
        ServiceName::parse(text).unwrap()
    }

    fn entry(text: &str, version: u8) -> Service {
        Service {
            name: name(text),
            artifact: Artifact::of(ArtifactPath::Path(path(version))),
            hosts: Vec::new(),
            exec: Exec::default(),
            env: BTreeMap::new(),
            env_file: None,
            credentials: BTreeMap::new(),
            http: Some(Http {
                domain: format!("{text}.example.com").as_str().into(),
                path: "/".into(),
                internal_port: 8080u16.into(),
                port_env: None,
                drain_sec: None,
                extra: Map::new(),
            }),
            health: None,
            rollout: Rollout::default(),
            systemd: Systemd::default(),
            hardening: Hardening::default(),
            revision: None,
            extra: Map::new(),
        }
    }

    fn waiting(text: &str) -> Service {
        let mut service = entry(text, 1);
        service.artifact.store_path = ArtifactPath::Placeholder;
        service
    }

    fn running() -> Listed {
        Listed { load: "loaded".into(), active: "active".into(), sub: "running".into() }
    }

    /// A host and what is remembered of it, on which steps can be performed as the real ones would be.
    #[derive(Clone)]
    struct World {
        observed: Observed,
        persisted: PersistedState,
        attempts: Attempts,
        options: Options,
        /// Versions that never come up.
        broken: BTreeSet<StorePath>,
        /// Versions that the cache does not have.
        absent: BTreeSet<StorePath>,
        /// How often each service was restarted.
        restarts: BTreeMap<ServiceName, u32>,
    }

    impl World {
        fn new() -> Self {
            let state = State::new(crate::names::HostName::parse("biz").unwrap(), NOW);
            World {
                observed: Observed {
                    units: BTreeMap::new(),
                    present: BTreeSet::new(),
                    roots: BTreeMap::new(),
                    secrets: BTreeMap::new(),
                    active: BTreeSet::new(),
                    ports: BTreeMap::new(),
                    kept_out: BTreeSet::new(),
                    candidates: BTreeSet::new(),
                    foreign_next: BTreeMap::new(),
                    caddy: caddy::CaddyState::Servers(
                        json!({"srv0": {"listen": [":443"], "routes": []}}).as_object().unwrap().clone(),
                    ),
                },
                persisted: PersistedState {
                    state,
                    applied: BTreeMap::new(),
                    readable: true,
                    interrupted: BTreeSet::new(),
                    overrides: Overrides::default(),
                    verified: BTreeMap::new(),
                },
                attempts: Attempts::default(),
                options: Options::default(),
                broken: BTreeSet::new(),
                absent: BTreeSet::new(),
                restarts: BTreeMap::new(),
            }
        }

        fn plan(&self, desired: &[&Service]) -> Result<Plan, WouldEmpty> {
            plan(desired, &self.observed, &self.persisted, &self.attempts, &self.options, NOW)
        }

        fn act(&mut self, service: &ServicePlan) {
            let unit = self.observed.units.entry(service.name.clone()).or_default();
            let fetching =
                service.steps.iter().find_map(|s| if let Step::Fetch(p) = s { Some(p) } else { None });
            for step in &service.steps {
                if let Step::Root(p) = step {
                    self.observed.roots.entry(service.name.clone()).or_default().insert(p.base().into());
                }
            }
            if let Some(path) = fetching {
                if self.absent.contains(path) {
                    self.attempts.unfetchable.insert(path.clone(), "not in the cache".into());
                    return;
                }
                self.observed.present.insert(path.clone());
            }
            for step in &service.steps {
                match step {
                    Step::Root(_) | Step::Fetch(_) | Step::Overlap(_) | Step::Reload => {}
                    Step::Write(_) => unit.file = UnitFile::Ours(service.goal.as_ref().unwrap().unit.clone()),
                    Step::Enable => unit.enabled = true,
                    Step::Pause => {
                        unit.enabled = false;
                        unit.listed = Listed::default();
                    }
                    Step::Restart(_) | Step::Prove(_) | Step::Record => {
                        let goal = service.goal.as_ref().unwrap();
                        if matches!(step, Step::Restart(_)) {
                            *self.restarts.entry(service.name.clone()).or_default() += 1;
                        }
                        if self.broken.contains(&goal.path) {
                            unit.listed = Listed::default();
                            let failure = FailureRecord {
                                reason: "it exits at once".into(),
                                attempted: Some(goal.path.clone()),
                                at: NOW,
                                journal: Vec::new(),
                                attempts: 0,
                                inputs: (!goal.proved).then(|| goal.inputs()),
                                kept_out: false,
                            };
                            let trouble = AttemptFailure { rejected: !goal.proved, failure };
                            self.attempts.failures.insert((service.name.clone(), goal.inputs()), trouble);
                        } else {
                            unit.listed = running();
                            let previous =
                                previous_after(&goal.path, self.persisted.applied.get(&service.name));
                            let proved = LastKnownGood {
                                service: goal.service.clone(),
                                path: goal.path.clone(),
                                previous,
                            };
                            self.persisted.applied.insert(service.name.clone(), proved);
                        }
                    }
                    Step::Remove(_) => {
                        *unit = UnitSeen::default();
                        self.persisted.applied.remove(&service.name);
                    }
                    Step::Unroot(base) => {
                        let held = self.observed.roots.get_mut(&service.name).unwrap();
                        assert!(held.remove(base), "{base} was not held");
                        if held.is_empty() {
                            self.observed.roots.remove(&service.name);
                        }
                    }
                }
            }
        }

        /// One pass, to the end; what was learned is forgotten but for what the state keeps.
        fn pass(&mut self, desired: &[&Service]) -> Plan {
            for _ in 0..6 {
                let plan = self.plan(desired).unwrap();
                if plan.services_settled() {
                    for service in &plan.services {
                        let trouble = service.trouble.as_ref();
                        let status = match trouble {
                            Some(t) if t.rejected => ServicePhase::Rejected,
                            Some(_) => ServicePhase::Failed,
                            None => ServicePhase::Running,
                        };
                        let state = super::super::state::ServiceState {
                            store_path: service.goal.as_ref().map(|g| g.path.clone()),
                            failure: trouble.map(|t| t.failure.clone()),
                            drop_ins: service.drop_ins.clone(),
                            ..super::super::state::ServiceState::new(service.name.clone(), status, NOW)
                        };
                        self.persisted.state.services.insert(service.name.clone(), state);
                    }
                    self.attempts = Attempts::default();
                    return plan;
                }
                for service in plan.services.iter().chain(&plan.gone) {
                    self.act(service);
                }
            }
            panic!("the plan never settles");
        }

        fn unit(&self, service: &str) -> &UnitSeen {
            &self.observed.units[&name(service)]
        }

        fn runs(&self, service: &str, version: u8) -> bool {
            let text = match &self.unit(service).file {
                UnitFile::Ours(text) => text,
                _ => return false,
            };
            self.unit(service).listed.running() && text.contains(path(version).as_str())
        }

        fn held(&self, service: &str) -> Vec<String> {
            self.observed.roots.get(&name(service)).into_iter().flatten().cloned().collect()
        }
    }

    #[test]
    fn nothing_overlaps_with_a_version_whose_state_it_would_take() {
        let mut old = entry("ava", 1);
        old.rollout = Rollout::Overlap;
        old.env.insert("PORT".into(), "8080".into());
        for (state, user, dynamic, overlaps) in [
            (None, "root", false, true),
            (None, "www-data", true, true),
            (Some("ava"), "root", false, true),
            (Some("ava"), "www-data", false, false),
            (Some("ava"), "root", true, false),
        ] {
            let mut world = World::new();
            world.pass(&[&old]);
            let mut new = old.clone();
            new.artifact.store_path = ArtifactPath::Path(path(2));
            new.systemd.state_directory = state.map(Into::into);
            new.exec.user = user.into();
            new.hardening.dynamic_user = Some(dynamic);
            world.observed.present.insert(path(2));
            let plan = world.plan(&[&new]).unwrap();
            let steps = &plan.services[0].steps;
            assert!(steps.contains(&Step::Restart("another version")), "{steps:?}");
            let overlapped = steps.contains(&Step::Overlap("another version"));
            assert_eq!(overlapped, overlaps, "{state:?} {user} {dynamic}: {steps:?}");
        }
    }

    #[test]
    fn a_first_deploy_roots_before_it_fetches_and_then_has_nothing_to_do() {
        let mut world = World::new();
        let ava = entry("ava", 1);
        let first = world.plan(&[&ava]).unwrap();
        assert_eq!(
            first.services[0].steps,
            [
                Step::Root(path(1)),
                Step::Fetch(path(1)),
                Step::Write("new here"),
                Step::Enable,
                Step::Restart("new here")
            ]
        );
        assert!(matches!(first.route, RoutePlan::Write(_)));
        world.pass(&[&ava]);
        assert!(world.runs("ava", 1));
        world.pass(&[&ava]);
        assert_eq!(world.restarts[&name("ava")], 1);
    }

    #[test]
    fn a_broken_version_is_put_back_once_and_not_tried_again_until_asked() {
        let mut world = World::new();
        world.pass(&[&entry("ava", 1)]);
        world.broken.insert(path(2));
        let next = entry("ava", 2);
        let plan = world.pass(&[&next]);
        assert!(world.runs("ava", 1));
        assert!(plan.services[0].trouble.as_ref().unwrap().rejected);
        assert_eq!(world.restarts[&name("ava")], 3, "the attempt and the way back");
        world.pass(&[&next]);
        assert_eq!(world.restarts[&name("ava")], 3, "remembered");
        world.options.retry.insert(name("ava"));
        world.broken.clear();
        world.pass(&[&next]);
        assert!(world.runs("ava", 2));
    }

    #[test]
    fn a_refused_version_is_tried_again_when_anything_that_goes_into_it_changes() {
        let mut world = World::new();
        let mut next = entry("ava", 2);
        next.env_file = Some("/s".into());
        world.observed.secrets.insert(name("ava"), Ok("1".into()));
        world.broken.insert(path(2));
        world.pass(&[&next]);
        let tries = world.restarts[&name("ava")];
        world.pass(&[&next]);
        assert_eq!(world.restarts[&name("ava")], tries);
        world.observed.secrets.insert(name("ava"), Ok("2".into()));
        world.pass(&[&next]);
        assert_eq!(world.restarts[&name("ava")], tries + 1);
        next.env.insert("A".into(), "1".into());
        world.pass(&[&next]);
        assert_eq!(world.restarts[&name("ava")], tries + 2);
        next.http.as_mut().unwrap().internal_port = 8081u16.into();
        world.pass(&[&next]);
        assert_eq!(world.restarts[&name("ava")], tries + 3);
    }

    #[test]
    fn a_refusal_outlives_anothers_failure_to_fetch_the_same_closure() {
        let mut world = World::new();
        let both = [entry("a", 2), entry("b", 2)];
        let both: Vec<&Service> = both.iter().collect();
        world.broken.insert(path(2));
        world.pass(&both);
        world.absent.insert(path(2));
        world.observed.present.remove(&path(2));
        world.options.retry.insert(name("a"));
        let plan = world.pass(&both);
        let rejected: Vec<bool> =
            plan.services.iter().map(|s| s.trouble.as_ref().unwrap().rejected).collect();
        assert_eq!(rejected, [false, true]);
    }

    #[test]
    fn a_first_version_that_is_refused_leaves_no_unit_behind() {
        let mut world = World::new();
        world.broken.insert(path(1));
        let plan = world.pass(&[&entry("ava", 1)]);
        assert!(plan.services[0].goal.is_none());
        assert_eq!(world.unit("ava").file, UnitFile::Absent);
        assert!(world.held("ava").is_empty());
        let RoutePlan::Write(requests) = &plan.route else { panic!("{:?}", plan.route) };
        assert!(
            requests[0].body.as_ref().unwrap().to_string().contains("ava.example.com"),
            "its 502 is its own"
        );
    }

    #[test]
    fn what_cannot_be_fetched_leaves_the_running_version_alone_and_is_tried_every_pass() {
        let mut world = World::new();
        world.pass(&[&entry("ava", 1)]);
        world.absent.insert(path(2));
        let next = entry("ava", 2);
        let plan = world.pass(&[&next]);
        assert!(!plan.services[0].trouble.as_ref().unwrap().rejected);
        assert!(world.runs("ava", 1));
        assert_eq!(world.restarts[&name("ava")], 1);
        let again = world.plan(&[&next]).unwrap();
        assert!(again.services[0].steps.contains(&Step::Fetch(path(2))));
        world.absent.clear();
        world.pass(&[&next]);
        assert!(world.runs("ava", 2));
    }

    #[test]
    fn the_current_and_two_earlier_closures_are_held_and_no_more() {
        let mut world = World::new();
        for version in 1..=5 {
            world.pass(&[&entry("ava", version)]);
        }
        let held: Vec<String> = [3, 4, 5].iter().map(|v| path(*v).base().to_string()).collect();
        assert_eq!(world.held("ava"), held);
        world.pass(&[&entry("ava", 4)]);
        assert_eq!(world.held("ava"), held, "going back needs no other closure");
    }

    #[test]
    fn every_drift_is_repaired_with_a_reason() {
        type Damage = fn(&mut World);
        let damages: [(&str, Damage); 6] = [
            ("the unit was changed on the host", |w| {
                w.observed.units.get_mut(&name("ava")).unwrap().file = UnitFile::Ours(unit::MARK.into());
            }),
            ("the unit was gone", |w| {
                w.observed.units.get_mut(&name("ava")).unwrap().file = UnitFile::Absent;
            }),
            ("it was not running", |w| {
                w.observed.units.get_mut(&name("ava")).unwrap().listed = Listed::default();
            }),
            ("Enable", |w| w.observed.units.get_mut(&name("ava")).unwrap().enabled = false),
            ("Root", |w| w.observed.roots.clear()),
            ("Fetch", |w| w.observed.present.clear()),
        ];
        for (reason, damage) in damages {
            let mut world = World::new();
            let ava = entry("ava", 1);
            world.pass(&[&ava]);
            damage(&mut world);
            let steps = world.plan(&[&ava]).unwrap().services[0].steps.clone();
            assert!(format!("{steps:?}").contains(reason), "{reason}: {steps:?}");
            world.pass(&[&ava]);
            assert!(world.runs("ava", 1) && world.unit("ava").enabled && !world.held("ava").is_empty());
        }
    }

    #[test]
    fn a_drop_in_is_named_and_nothing_is_started_that_it_replaces() {
        let mut world = World::new();
        let ava = entry("ava", 1);
        world.pass(&[&ava]);
        let unit = |world: &mut World, replaced: bool, shows: u8| {
            let unit = world.observed.units.get_mut(&name("ava")).unwrap();
            unit.drop_ins = vec!["/etc/systemd/system/ava.service.d/x.conf".into()];
            unit.replaced = replaced.then(|| "its unit starts something else".into());
            unit.shows = Some(path(shows));
        };
        // Beside the program: deploys go on.
        unit(&mut world, false, 1);
        let plan = world.pass(&[&ava]);
        assert!(plan.services[0].trouble.is_none() && plan.services[0].drop_ins.len() == 1);
        let next = entry("ava", 2);
        world.pass(&[&next]);
        assert!(world.runs("ava", 2));
        // Another program, which nobody has started yet: it runs, and is not restarted.
        unit(&mut world, true, 2);
        let plan = world.plan(&[&next]).unwrap();
        assert!(
            plan.services[0].trouble.is_none() && plan.services[0].steps.is_empty(),
            "{:?}",
            plan.services
        );
        // It runs: what was proved stays so, and what runs is kept.
        unit(&mut world, true, 9);
        let latest = entry("ava", 3);
        let plan = world.plan(&[&latest]).unwrap();
        let ServicePlan { goal, trouble, instead, steps, .. } = &plan.services[0];
        assert_eq!((steps.as_slice(), instead), (&[Step::Root(path(9))][..], &Some(Some(path(9)))));
        assert_eq!(goal.as_ref().map(|g| &g.path), Some(&path(2)), "its route stays");
        assert!(!trouble.as_ref().unwrap().rejected);
        world.pass(&[&latest]);
        assert!(world.persisted.applied[&name("ava")].path == path(2) && world.held("ava").len() == 3);
        // Gone: what it started, and what a pass saw it with, is restarted.
        let gone = world.observed.units.get_mut(&name("ava")).unwrap();
        (gone.drop_ins, gone.replaced) = (Vec::new(), None);
        let plan = world.plan(&[&next]).unwrap();
        let why = "it was started with a drop-in that is gone";
        assert!(plan.services[0].steps.contains(&Step::Restart(why)), "{:?}", plan.services[0].steps);
        world.observed.units.get_mut(&name("ava")).unwrap().verified = true;
        let plan = world.plan(&[&next]).unwrap();
        assert!(!plan.services[0].steps.iter().any(|s| matches!(s, Step::Restart(_))), "once");
    }

    #[test]
    fn nothing_overlaps_where_the_candidates_name_is_taken() {
        let mut world = World::new();
        let mut old = entry("ava", 1);
        old.rollout = Rollout::Overlap;
        old.env.insert("PORT".into(), "8080".into());
        world.pass(&[&old]);
        let mut new = old.clone();
        new.artifact.store_path = ArtifactPath::Path(path(2));
        world.observed.foreign_next.insert(name("ava"), "/etc/systemd/system/ava-next.service".into());
        let plan = world.plan(&[&new]).unwrap();
        let service = &plan.services[0];
        assert!(service.steps.contains(&Step::Restart("another version")), "{:?}", service.steps);
        assert!(!service.steps.iter().any(|s| matches!(s, Step::Overlap(_))), "{:?}", service.steps);
        assert!(
            service.remark.as_ref().is_some_and(|r| r.contains("ava-next.service")),
            "{:?}",
            service.remark
        );
    }

    #[test]
    fn a_service_that_died_is_started_but_never_rejected() {
        let mut world = World::new();
        let ava = entry("ava", 1);
        world.pass(&[&ava]);
        world.broken.insert(path(1));
        world.observed.units.get_mut(&name("ava")).unwrap().listed = Listed::default();
        let plan = world.pass(&[&ava]);
        assert!(!plan.services[0].trouble.as_ref().unwrap().rejected);
        assert!(matches!(world.unit("ava").file, UnitFile::Ours(_)), "its unit stays");
        world.broken.clear();
        world.pass(&[&ava]);
        assert!(world.runs("ava", 1));
    }

    #[test]
    fn bad_secrets_start_nothing_and_stop_nothing() {
        let mut world = World::new();
        world.pass(&[&entry("ava", 1)]);
        let mut next = entry("ava", 2);
        next.env_file = Some("/s".into());
        world.observed.secrets.insert(name("ava"), Err("mode 0644; run: chmod 600 /s".into()));
        let plan = world.pass(&[&next]);
        assert!(plan.services[0].trouble.as_ref().unwrap().failure.reason.contains("chmod"));
        assert!(world.runs("ava", 1));
        assert_eq!(world.restarts[&name("ava")], 1);
    }

    #[test]
    fn a_unit_of_somebody_else_is_never_touched() {
        let mut world = World::new();
        let foreign = UnitFile::Foreign("/lib/systemd/system/ssh.service".into());
        world.observed.units.insert(name("ssh"), UnitSeen { file: foreign, ..UnitSeen::default() });
        let plan = world.pass(&[&entry("ssh", 1)]);
        assert!(plan.services[0].steps.is_empty());
        assert!(plan.services[0].trouble.as_ref().unwrap().failure.reason.contains("not ours"));
    }

    #[test]
    fn one_failure_does_not_hold_the_others_up() {
        let mut world = World::new();
        world.broken.insert(path(1));
        world.absent.insert(path(3));
        let services = [entry("a", 1), entry("b", 2), entry("c", 3)];
        world.pass(&services.iter().collect::<Vec<_>>());
        assert!(!world.runs("a", 1) && world.runs("b", 2) && !world.runs("c", 3));
    }

    #[test]
    fn what_is_gone_from_the_manifest_goes_but_never_everything_at_once() {
        let mut world = World::new();
        let (a, b) = (entry("a", 1), entry("b", 2));
        world.pass(&[&a, &b]);
        let plan = world.plan(&[&a]).unwrap();
        assert_eq!(plan.gone.len(), 1);
        assert_eq!(
            plan.gone[0].steps,
            [Step::Remove("not in the manifest"), Step::Unroot(path(2).base().into())]
        );
        assert_eq!(world.plan(&[]).unwrap_err(), WouldEmpty(vec![name("a"), name("b")]));
        assert!(world.plan(&[&waiting("a")]).is_err(), "a placeholder runs nothing either");
        world.options.allow_empty = true;
        assert_eq!(world.plan(&[]).unwrap().gone.len(), 2);
        world.persisted.readable = false;
        assert!(world.plan(&[]).unwrap().gone.is_empty(), "what cannot be read disables deletion");
    }

    #[test]
    fn an_entry_that_changes_without_its_unit_restarts_nothing() {
        let mut world = World::new();
        let mut ava = entry("ava", 1);
        world.pass(&[&ava]);
        ava.http.as_mut().unwrap().domain = "new.example.com".into();
        assert_eq!(world.plan(&[&ava]).unwrap().services[0].steps, [Step::Record]);
        let plan = world.pass(&[&ava]);
        assert!(matches!(plan.route, RoutePlan::Write(_)));
        assert_eq!(world.restarts[&name("ava")], 1);
    }

    #[test]
    fn the_route_of_a_refused_version_is_that_of_the_version_that_runs() {
        let mut world = World::new();
        world.pass(&[&entry("ava", 1)]);
        let mut next = entry("ava", 2);
        next.http.as_mut().unwrap().internal_port = 9999u16.into();
        world.broken.insert(path(2));
        let plan = world.pass(&[&next]);
        let routed = routed(&[&next], &plan.services);
        assert_eq!(routed["ava"].internal_port.get(), 8080);
    }

    #[test]
    fn a_service_that_waits_has_no_unit_and_no_route() {
        let mut world = World::new();
        let plan = world.pass(&[&waiting("ava")]);
        assert!(plan.services[0].steps.is_empty() && plan.services[0].trouble.is_none());
        assert_eq!(plan.route, RoutePlan::None);
    }
}
