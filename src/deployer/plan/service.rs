//! What is to be done for one service: by cases, the first that holds.

use super::{Goal, Options, PortOwners, ServicePlan, Step, Verified};
use crate::clock::Timestamp;
use crate::deployer::applied::LastKnownGood;
use crate::deployer::listeners::{self, Answers};
use crate::deployer::observed::{Observed, UnitFile, UnitSeen};
use crate::deployer::outcome::{AttemptFailure, Outcome, PendingJob};
use crate::deployer::persisted::PersistedState;
use crate::deployer::state::{FailureRecord, ServicePhase, ServiceState};
use crate::manifest::{Rollout, Service};
use crate::names::{ServiceName, StorePath};
use std::collections::BTreeSet;
use std::path::Path;

/// What all services of a plan have in common.
pub(super) struct Given<'a> {
    pub(super) observed: &'a Observed,
    /// Who else holds ports of services here.
    pub(super) others: PortOwners,
    pub(super) persisted: &'a PersistedState,
    pub(super) so_far: &'a Outcome,
    pub(super) options: &'a Options,
    pub(super) now: Timestamp,
}

/// One service, with what is known of it.
struct Case<'a> {
    given: &'a Given<'a>,
    entry: &'a Service,
    name: &'a ServiceName,
    seen: Option<&'a UnitSeen>,
    applied: Option<&'a LastKnownGood>,
    /// How it stood after the last pass.
    before: Option<&'a ServiceState>,
    /// What its process was started with, and is gone.
    outlived: &'a [String],
}

/// What is to be done for a service of the manifest.
pub(super) fn service(entry: &Service, given: &Given) -> ServicePlan {
    let case = Case::new(entry, given);
    if let Some(UnitFile::Foreign(path)) = case.seen.map(|seen| &seen.file) {
        return case.foreign(path);
    }
    let Some(target) = entry.artifact.store_path.path() else { return case.placeholder() };
    let desired = Goal::new(entry, target, case.stamp(), case.applied, true);
    if let Some(job) = given.so_far.pending.get(case.name) {
        return case.pending(desired, job);
    }
    if given.persisted.overrides.is_paused(case.name, given.now) {
        return case.paused(&desired);
    }
    if let Some(reason) = case.seen.and_then(|seen| seen.replaced.as_ref()) {
        return case.replaced(desired, reason);
    }
    if let Some(Err(reason)) = given.observed.secrets.get(case.name) {
        return case.bad_secrets(reason);
    }
    // A rejection before what cannot be fetched: that may be another service's attempt with the same closure.
    let failure = case.failed_now(&desired).or_else(|| case.remembered(&desired));
    let Some(failure) = failure.or_else(|| case.in_the_way(&desired)) else {
        return case.converge(desired, None);
    };
    let Some(previous) = case.last_known_good() else { return case.without_predecessor(target, failure) };
    let failed_too = case.failed_now(&previous).or_else(|| case.in_the_way(&previous)).is_some();
    match failed_too && !case.was_put_aside(&previous) {
        // What ran before does not come up either: systemd goes on trying, we do not.
        true => case.done(Some(previous), Some(failure), Vec::new()),
        false => case.converge(previous, Some((failure, &desired))),
    }
}

// The cases.
impl Case<'_> {
    fn foreign(&self, path: &Path) -> ServicePlan {
        let reason = format!(
            "{} exists and is not ours; rename the service, or remove that unit and run 'deployer'",
            path.display()
        );
        self.done(None, Some(self.host_failure(reason)), Vec::new())
    }

    fn placeholder(&self) -> ServicePlan {
        let Given { observed, so_far, .. } = self.given;
        let there = self.text().is_some() || self.applied.is_some() || observed.roots.contains_key(self.name);
        let steps = match there && !so_far.pending.contains_key(self.name) {
            true => removal(self.name, observed, "the manifest names a placeholder"),
            false => Vec::new(),
        };
        self.done(None, None, steps)
    }

    /// systemd is not through with it.
    fn pending(&self, desired: Goal, job: &PendingJob) -> ServicePlan {
        let failure = self.host_failure(format!("{}; the next pass goes on with it", job.why));
        let paused = self.given.persisted.overrides.is_paused(self.name, self.given.now);
        ServicePlan { paused, ..self.done(Some(desired), Some(failure), Vec::new()) }
    }

    fn paused(&self, desired: &Goal) -> ServicePlan {
        let stopped = self.seen.is_none_or(|seen| {
            matches!(seen.listed.active.as_str(), "" | "inactive" | "failed") && !seen.enabled
        });
        let mut steps = self.lost_roots();
        if !stopped {
            steps.push(Step::Pause);
        }
        let plan = self.done(self.last_known_good(), self.remembered(desired), steps);
        ServicePlan { paused: true, ..plan }
    }

    /// Whatever is started now is not ours: what runs is left alone, and kept from the garbage collector.
    fn replaced(&self, desired: Goal, reason: &str) -> ServicePlan {
        let shows = self.seen.and_then(|seen| seen.shows.as_ref());
        let mut steps = self.lost_roots();
        steps.extend(shows.filter(|path| !self.holds(path)).cloned().map(Step::Root));
        if self.seen.is_some_and(|seen| seen.needs_reload) {
            steps.push(Step::Reload);
        }
        // Not started anew since: it is as it should be, as long as nobody restarts it.
        let intact = self.text() == Some(&desired.unit) && shows == Some(&desired.path);
        if desired.is_verified() && intact && !self.drop_ins().is_empty() {
            if self.applied.is_none_or(|a| a.service != desired.service) {
                steps.push(Step::Record);
            }
            return self.done(Some(desired), None, steps);
        }
        self.done(self.last_known_good(), Some(self.host_failure(reason.into())), steps)
    }

    /// Nothing is started with secrets that others can read, and nothing that runs is touched.
    fn bad_secrets(&self, reason: &str) -> ServicePlan {
        let failure = self.host_failure(reason.into());
        self.done(self.last_known_good(), Some(failure), self.lost_roots())
    }

    /// It failed, and nothing ran before: nothing is left behind that would crash at every boot.
    fn without_predecessor(&self, target: &StorePath, failure: AttemptFailure) -> ServicePlan {
        let mut steps = Vec::new();
        if self.text().is_some() {
            steps.push(Step::Remove("it was rejected and there is no version before it"));
        }
        steps.extend(self.unroots(None, Some(target), Some(&failure)));
        self.done(None, Some(failure), steps)
    }

    /// The steps to a goal; `failed`: what was desired instead, and why that cannot be.
    fn converge(&self, goal: Goal, failed: Option<(AttemptFailure, &Goal)>) -> ServicePlan {
        let mut steps = Vec::new();
        if !self.holds(&goal.path) {
            steps.push(Step::Root(goal.path.clone()));
        }
        steps.extend(self.lost_roots().into_iter().filter(|step| *step != Step::Root(goal.path.clone())));
        if !self.given.observed.present.contains(&goal.path) {
            steps.push(Step::Fetch(goal.path.clone()));
        }
        let write = self.reason_to_write(&goal, failed.as_ref().map(|(_, desired)| *desired));
        match write {
            Some(why) => steps.push(Step::Write(why)),
            None if self.seen.is_some_and(|seen| seen.needs_reload) => steps.push(Step::Reload),
            None => {}
        }
        if !self.seen.is_some_and(|seen| seen.enabled) {
            steps.push(Step::Enable);
        }
        match write {
            Some(why) => {
                steps.extend(self.overlaps(&goal).then_some(Step::Overlap(why)));
                steps.push(Step::Restart(why));
            }
            None => steps.extend(self.reason_to_start(&goal)),
        }
        let failure = failed.map(|(failure, _)| failure);
        let target = self.entry.artifact.store_path.path();
        steps.extend(self.unroots(Some(&goal.path), target, failure.as_ref()));
        let theirs = self.given.observed.foreign_next.get(self.name);
        let remark = theirs.filter(|_| write.is_some() && goal.desired).map(|theirs| {
            let theirs = theirs.display();
            format!(
                "restarted without an overlap, because {theirs} exists and is not ours; remove or rename that"
            )
        });
        ServicePlan { remark, ..self.done(Some(goal), failure, steps) }
    }
}

// What the cases ask.
impl<'a> Case<'a> {
    fn new(entry: &'a Service, given: &'a Given<'a>) -> Self {
        let name = &entry.name;
        let seen = given.observed.units.get(name);
        let before = given.persisted.state.services.get(name);
        // What earlier passes saw of a process that is still the same, and those did not verify, it was started with.
        let outlived =
            seen.is_some_and(|seen| seen.listed.running() && !seen.verified && seen.drop_ins.is_empty());
        let outlived = before.filter(|_| outlived).map(|b| b.drop_ins.as_slice()).unwrap_or_default();
        let applied = given.persisted.applied.get(name);
        Case { given, entry, name, seen, applied, before, outlived }
    }

    fn done(&self, goal: Option<Goal>, failure: Option<AttemptFailure>, steps: Vec<Step>) -> ServicePlan {
        ServicePlan {
            target: self.entry.artifact.store_path.path().cloned(),
            goal,
            failure,
            drop_ins: self.drop_ins(),
            instead: self.seen.filter(|seen| seen.replaced.is_some()).map(|seen| seen.shows.clone()),
            steps,
            ..ServicePlan::nothing(self.name)
        }
    }

    fn drop_ins(&self) -> Vec<String> {
        match self.outlived {
            [] => {
                let now = self.seen.map(|seen| seen.drop_ins.as_slice()).unwrap_or_default();
                now.iter().map(|path| path.display().to_string()).collect()
            }
            outlived => outlived.to_vec(),
        }
    }

    /// The text of its unit, if that is ours.
    fn text(&self) -> Option<&String> {
        match &self.seen?.file {
            UnitFile::Ours(text) => Some(text),
            UnitFile::Absent | UnitFile::Foreign(_) => None,
        }
    }

    fn stamp(&self) -> String {
        attempt_stamp(self.entry, self.given.observed, &self.given.options.active)
    }

    fn last_known_good(&self) -> Option<Goal> {
        let good = self.applied?;
        Some(Goal::new(&good.service, &good.path, self.stamp(), self.applied, false))
    }

    /// A failure whose reason keeps the time at which it was first found.
    fn host_failure(&self, reason: String) -> AttemptFailure {
        let old = self.before.and_then(|b| b.failure.as_ref()).filter(|f| f.reason == reason);
        let target = self.entry.artifact.store_path.path().cloned();
        AttemptFailure::Host(FailureRecord {
            journal: old.map(|f| f.journal.clone()).unwrap_or_default(),
            attempts: old.map_or(0, |f| f.attempts),
            ..FailureRecord::new(reason, target, old.map_or(self.given.now, |f| f.at))
        })
    }

    /// What came of an attempt at this goal in this pass, if it failed.
    fn failed_now(&self, goal: &Goal) -> Option<AttemptFailure> {
        self.given.so_far.failure_of(self.name, || goal.inputs()).cloned()
    }

    /// What an earlier pass found out about the same attempt.
    fn remembered(&self, goal: &Goal) -> Option<AttemptFailure> {
        if self.given.options.retry.contains(self.name) {
            return None;
        }
        let failure = self.before?.failure.as_ref()?;
        let same = failure.inputs.as_ref().is_some_and(|inputs| *inputs == goal.inputs());
        match failure.kept_out {
            _ if !same => None,
            false => Some(AttemptFailure::Rejected(failure.clone())),
            true if self.given.observed.kept_out.contains(self.name) => {
                Some(AttemptFailure::Host(failure.clone()))
            }
            true => None,
        }
    }

    /// What keeps a goal from being tried now: its closure, or its port.
    fn in_the_way(&self, goal: &Goal) -> Option<AttemptFailure> {
        let Given { observed, so_far, options, now, .. } = self.given;
        if let Some(reason) = so_far.unfetchable.get(&goal.path) {
            let mut record = self.host_failure(reason.clone()).record().clone();
            record.attempts += 1;
            record.at = *now;
            return Some(AttemptFailure::Host(record));
        }
        if let Some(reason) = self.port_held(&goal.service) {
            return Some(self.host_failure(reason));
        }
        let failure = self.before.and_then(|b| b.failure.as_ref())?;
        let waits = options.timer
            && !observed.present.contains(&goal.path)
            && failure.attempts > 0
            && failure.attempted.as_ref() == Some(&goal.path)
            && (0..backoff_sec(failure.attempts)).contains(&(now.0 - failure.at.0));
        waits.then(|| AttemptFailure::Host(failure.clone()))
    }

    /// Who has the port: started there, it could not listen, or the other one would answer for it.
    fn port_held(&self, service: &Service) -> Option<String> {
        let port = service.port()?;
        let owners = self.given.others.get(&(self.name.clone(), port))?;
        Some(listeners::in_the_way(port, self.name.as_str(), owners))
    }

    /// Whose port is held is left as it is, but for a version that this pass has put in its place.
    fn was_put_aside(&self, previous: &Goal) -> bool {
        self.failed_now(previous).is_none()
            && self.port_held(&previous.service).is_some()
            && self.text() != Some(&previous.unit)
    }

    /// Why its unit is to be written, if it is. `desired`: what the manifest says, if that is not the goal.
    fn reason_to_write(&self, goal: &Goal, desired: Option<&Goal>) -> Option<&'static str> {
        let shadowed = self.seen.is_some_and(|seen| seen.shadowed);
        match self.text() {
            Some(text) if *text == goal.unit && !shadowed => None,
            Some(text) if *text == goal.unit => Some("another unit stood in for it"),
            Some(text) if desired.is_some_and(|w| w.unit == *text) => Some("restoring the previous version"),
            Some(_) if self.applied.is_some_and(|a| a.path != goal.path) => Some("another version"),
            Some(_) if goal.is_verified() => Some("the unit was changed on the host"),
            Some(_) => Some("the manifest's entry changed"),
            None if self.applied.is_some() => Some("the unit was gone"),
            None => Some("new here"),
        }
    }

    /// What is to be done about a service whose unit is as it should be.
    fn reason_to_start(&self, goal: &Goal) -> Option<Step> {
        let Some(seen) = self.seen.filter(|seen| seen.listed.running()) else {
            return Some(Step::Restart("it was not running"));
        };
        if !self.outlived.is_empty() {
            return Some(Step::Restart("it was started with a drop-in that is gone"));
        }
        if seen.wrong_closure {
            return Some(Step::Restart("its process ran another version than its unit"));
        }
        if self.given.persisted.interrupted.contains(self.name) && !seen.current {
            return Some(Step::Restart("an earlier pass was interrupted before it restarted it"));
        }
        match goal.verified {
            Verified::Unit => Some(Step::Prove("its health check changed")),
            Verified::No if seen.current => {
                Some(Step::Prove("an earlier pass was interrupted while it came up"))
            }
            Verified::No => Some(Step::Restart("it is not verified yet")),
            Verified::Yes if self.nothing_listens(goal) => Some(match self.before.map(|b| b.status) {
                Some(ServicePhase::Failed) => Step::Restart("it runs, but nothing listens on its port"),
                _ => Step::Prove("nothing listens on its port"),
            }),
            Verified::Yes => {
                let new = goal.desired && self.applied.is_none_or(|a| a.service != goal.service);
                new.then_some(Step::Record)
            }
        }
    }

    /// Whether nothing listens on its port. It may still be coming up, as after a boot. If it did not in the last pass,
    /// its process has missed its turn.
    fn nothing_listens(&self, goal: &Goal) -> bool {
        let Given { observed, so_far, .. } = self.given;
        let answers = goal.service.port().and_then(|port| observed.ports.get(&(self.name.clone(), port)));
        !so_far.started.contains(self.name) && answers == Some(&Answers::Nobody)
    }

    /// Whether the new version is to be verified beside the old one: where there is an old one that answers, and
    /// Caddy to lead requests past it. A candidate that is there already has the requests (or had them: an
    /// earlier pass died); the unit is then restarted behind it.
    fn overlaps(&self, goal: &Goal) -> bool {
        let Observed { caddy, candidates, foreign_next, .. } = self.given.observed;
        goal.desired
            && !self.applied.is_some_and(|a| takes_state(&goal.service, &a.service))
            && goal.service.rollout == Rollout::Overlap
            && goal.service.port_variable().is_some()
            && self.seen.is_some_and(|seen| seen.listed.running())
            && caddy.is_available()
            && !candidates.contains(self.name)
            && !foreign_next.contains_key(self.name)
    }

    fn holds(&self, path: &StorePath) -> bool {
        self.given.observed.roots.get(self.name).is_some_and(|held| held.contains(path.base()))
    }

    /// Roots that are gone though what they held is still there: of the last known good and those before it.
    fn lost_roots(&self) -> Vec<Step> {
        let paths = self.applied.into_iter().flat_map(LastKnownGood::paths);
        let lost = paths.filter(|path| self.given.observed.present.contains(*path) && !self.holds(path));
        lost.cloned().map(Step::Root).collect()
    }

    /// Roots that nothing needs any more: not what runs, not one of the versions before it, and not what is still
    /// to be fetched.
    fn unroots(
        &self,
        current: Option<&StorePath>,
        target: Option<&StorePath>,
        failure: Option<&AttemptFailure>,
    ) -> Vec<Step> {
        let Given { observed, persisted, .. } = self.given;
        if !persisted.readable {
            return Vec::new();
        }
        let good = self.applied.into_iter().flat_map(LastKnownGood::paths);
        let pending = target.filter(|_| !failure.is_some_and(AttemptFailure::is_rejected));
        let kept: BTreeSet<&str> =
            current.into_iter().chain(pending).chain(good).map(StorePath::base).collect();
        let held = observed.roots.get(self.name).into_iter().flatten();
        held.filter(|base| !kept.contains(base.as_str())).cloned().map(Step::Unroot).collect()
    }
}

/// The steps that take a service off this host.
pub(super) fn removal(name: &ServiceName, observed: &Observed, why: &'static str) -> Vec<Step> {
    let roots = observed.roots.get(name).into_iter().flatten().cloned().map(Step::Unroot);
    [Step::Remove(why)].into_iter().chain(roots).collect()
}

/// How long the timer's passes leave a closure alone that could not be fetched, in seconds: twice as long with
/// every attempt from the third on, half an hour at most. A pass started by a person or a push tries at once.
fn backoff_sec(attempts: u32) -> i64 {
    match attempts {
        0..=2 => 0,
        n => (300_i64 << (n - 2).min(4)).min(1800),
    }
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

/// What goes into an attempt besides the unit: its secrets, and whether what it requires runs.
pub(super) fn attempt_stamp(entry: &Service, observed: &Observed, active: &BTreeSet<String>) -> String {
    let secrets = observed.secrets.get(&entry.name).and_then(|s| s.as_ref().ok());
    let mut stamp = secrets.cloned().unwrap_or_default();
    for unit in &entry.systemd.requires {
        stamp.push_str(&format!(";{unit}={}", u8::from(active.contains(unit.as_str()))));
    }
    stamp
}
