//! What remains of a pass: the state on the disk, the report in the bucket, and the story's last lines. Made from
//! values alone, but for what systemd is asked about what was started.

use super::execute::{self, Planned, Situation};
use super::observed::UnitFile;
use super::outcome::{EndedBy, Outcome, PassError};
use super::plan::ServicePlan;
use super::root::Root;
use super::source::SourceManifest;
use super::state::{
    FailureRecord, LastError, OtherMachine, REPORT_EVERY_SEC, SILENT_SEC, ServicePhase, ServiceState, State,
};
use super::{intent, lines, machine, reported};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::durable;
use crate::error::{Error, Exit, Result};
use crate::failpoint;
use crate::files::if_there;
use crate::lock::{self, LockResult};
use crate::log;
use crate::names::{HostName, ServiceName};
use crate::secrets;
use crate::secrets::mask::Mask;
use crate::store::{self, Condition, Store};
use crate::systemd;
use std::collections::BTreeSet;
use std::path::Path;

/// A pass that has done its work.
pub(super) struct Report<'a> {
    /// As it was seen last.
    pub(super) at: Situation<'a>,
    pub(super) store: &'a dyn Store,
    pub(super) source: &'a SourceManifest,
    /// The state that the pass before left.
    pub(super) before: &'a State,
    pub(super) planned: &'a Planned,
    pub(super) outcome: Outcome,
    pub(super) now: Timestamp,
}

impl Report<'_> {
    /// Writes all of it down, and lets go of the candidates that leave; returns the exit code.
    pub(super) fn finish(mut self) -> Result<Exit> {
        let root = self.at.root;
        let mut state = self.state();
        self.log_changes(&state);
        let published =
            publish(root, self.store, self.before, &mut state, |state| self.reported_lines(state));
        self.outcome.wrote(published);
        // Whoever waits for the release need not wait for the last connections of the candidates.
        if !self.outcome.leaving.is_empty() {
            self.outcome = execute::after_report(self.at, self.planned, self.outcome)?;
            state.draining.clear();
            self.outcome.wrote(lines::keep(root, &state));
        }
        // The intent stays with what is not on the disk: the next pass looks at it all again.
        if !self.outcome.unwritten.is_empty() {
            return Ok(state.exit_code().max(Exit::Failed));
        }
        if root.intent().exists() {
            intent::clear(root)?;
        }
        Ok(state.exit_code())
    }

    /// How the host stands after the pass.
    fn state(&self) -> State {
        let plan = &self.planned.plan;
        let services = plan.services.iter().map(|plan| {
            let entry = self.source.entries.get(&plan.name).cloned();
            (plan.name.clone(), ServiceState { entry, ..self.service(plan) })
        });
        let gone = plan.gone.iter().filter_map(|plan| Some((plan.name.clone(), self.going(&plan.name)?)));
        let mut state = State {
            serial: Some(self.source.manifest.serial),
            generation: Some(self.source.manifest.generation),
            changed_at: if self.outcome.changed { Some(Timestamp::now()) } else { self.before.changed_at },
            manifest_error: self.source.error.clone(),
            route: self.outcome.route.clone().unwrap_or_default(),
            reported: true,
            store: Some(self.store.identity()),
            manifest_hash: Some(self.source.hash.clone()),
            machine: machine::this(),
            other_machine: self.before.other_machine.clone(),
            manager_environment: self.manager_environment(),
            draining: self.outcome.leaving.clone(),
            services: services.chain(gone).collect(),
            ..State::new(self.at.settings.host.clone(), self.now)
        };
        if should_publish(self.at.root, self.before, &state) {
            fill_exposure(&mut state, &self.outcome);
        }
        state
    }

    /// How a service stands, from what was seen last.
    fn service(&self, plan: &ServicePlan) -> ServiceState {
        let Report { at: Situation { observed, persisted, .. }, outcome, now, .. } = self;
        let seen = observed.units.get(&plan.name);
        let running = seen.is_some_and(|u| u.listed.running());
        let runs = match &plan.instead {
            Some(other) => other.clone(),
            None => plan.goal.as_ref().map(|g| g.path.clone()),
        };
        let runs = runs.filter(|_| running);
        // One that drop-ins were seen of is not known to be without them by what is loaded now.
        let invocation = seen.filter(|u| running && (u.verified || u.clean && plan.drop_ins.is_empty()));
        let status = match (&plan.target, &plan.failure, &runs) {
            _ if plan.paused => ServicePhase::Stopped,
            (None, None, _) => ServicePhase::Waiting,
            (_, Some(failure), _) if failure.is_rejected() => ServicePhase::Rejected,
            (_, None, Some(_)) => ServicePhase::Running,
            (_, Some(_), _) | (_, None, None) => ServicePhase::Failed,
        };
        let failure = plan.failure.as_ref().map(|f| f.record().clone()).or_else(|| {
            let reason = || format!("it was up and no longer is; see 'journalctl -u {}'", plan.name);
            (status == ServicePhase::Failed).then(|| FailureRecord::new(reason(), plan.target.clone(), *now))
        });
        let before = persisted.state.services.get(&plan.name);
        let since = before.filter(|b| b.status == status && b.store_path == runs).map_or(*now, |b| b.since);
        let previous = persisted.applied.get(&plan.name).into_iter().flat_map(|a| &a.previous);
        let previous = previous.filter(|p| observed.present.contains(*p)).cloned().collect();
        let exposure = match outcome.started.contains(&plan.name) {
            true => outcome.exposures.get(&plan.name.unit()).copied(),
            // It may have been started by the pass that was interrupted.
            false if persisted.interrupted.contains(&plan.name) => None,
            false => before.and_then(|b| b.exposure),
        };
        let overrides = &persisted.overrides;
        ServiceState {
            exposure: exposure.filter(|_| runs.is_some()),
            store_path: runs,
            previous,
            failure,
            secrets_changed: seen.is_some_and(|u| u.secrets_changed),
            drop_ins: plan.drop_ins.clone(),
            invocation: invocation.and_then(|u| u.invocation.clone()),
            pinned_since: overrides.pinned.get(&plan.name).map(|p| p.since),
            paused_until: overrides.paused.get(&plan.name).and_then(|p| p.until),
            ..ServiceState::new(plan.name.clone(), status, since)
        }
    }

    /// A service that is not in the manifest any more and not gone yet, with what it is doing.
    fn going(&self, name: &ServiceName) -> Option<ServiceState> {
        let Report { at: Situation { observed, persisted, .. }, outcome, now, .. } = self;
        let seen = observed.units.get(name);
        let applied = persisted.applied.get(name);
        // What was known to be good is forgotten last.
        if applied.is_none() && !seen.is_some_and(|s| matches!(s.file, UnitFile::Ours(_))) {
            return None;
        }
        let listed = seen.map(|s| &s.listed).filter(|l| !l.active.is_empty());
        let does = listed.map_or("not loaded".to_string(), |l| format!("{}/{}", l.active, l.sub));
        let why = outcome.error.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let reason = format!(
            "it is no longer in the manifest, and not gone yet ({does}){why}; the next pass goes on with it, see \
             'journalctl -u {name}'"
        );
        let before = persisted.state.services.get(name);
        let up = listed.is_some_and(|l| matches!(l.active.as_str(), "active" | "deactivating"));
        let since = before.filter(|b| b.removing).map_or(*now, |b| b.since);
        Some(ServiceState {
            store_path: applied.filter(|_| up).map(|a| a.path.clone()),
            failure: Some(FailureRecord::new(reason, None, *now)),
            removing: true,
            ..ServiceState::new(name.clone(), ServicePhase::Failed, since)
        })
    }

    /// What somebody has systemd give every service. It reaches what is started after that, so it is asked for when
    /// something was started since an earlier pass looked, and while it was there when last asked.
    fn manager_environment(&self) -> Vec<String> {
        let Report { at: Situation { observed, .. }, before, outcome, .. } = self;
        let started = observed.units.values().any(|u| u.invocation.is_some() && !u.verified);
        if !started && outcome.started.is_empty() && before.manager_environment.is_empty() {
            return Vec::new();
        }
        match systemd::given_to_all() {
            Ok(names) => {
                if !names.is_empty() && (names != before.manager_environment || !outcome.started.is_empty()) {
                    log::warning(systemd::given_text(&names));
                }
                names
            }
            Err(e) => {
                log::info(format!("what systemd gives every service is not known: {e}"));
                before.manager_environment.clone()
            }
        }
    }

    /// The story's last lines: everything that is off, with its reason unless this pass has just said it, so that an
    /// exit code of 3 or 4 never stands alone; and what is well again.
    fn log_changes(&self, after: &State) {
        let Report { before, outcome, .. } = self;
        for (name, service) in &after.services {
            let status = service.status;
            if let Some(failure) = &service.failure {
                let runs =
                    service.store_path.as_ref().map_or("nothing runs".into(), |p| format!("{p} runs on"));
                let logged = outcome.failures.values().any(|f| f.record() == failure)
                    || outcome.unfetchable.values().any(|reason| *reason == failure.reason);
                let reason = if logged { String::new() } else { format!(": {}", failure.reason) };
                log::error(format!("{name}: {status}, {runs}{reason}"));
            }
            if let Some(attention) = service.attention() {
                log::warning(format!("{name}: {attention}"));
            }
            if service.failure.is_some() {
                continue;
            }
            let old = before.services.get(name);
            if old.is_some_and(|o| o.status == service.status && o.failure.is_none()) {
                continue;
            }
            match (service.status, &service.store_path) {
                (ServicePhase::Running, Some(path)) => log::info(format!("{name}: running {path}")),
                _ => log::info(format!("{name}: {status}")),
            }
        }
    }

    /// The state as the bucket gets it: without the lines of the journal, or, where that was asked for, without what in them
    /// is in the services' secrets files. Lines that this cannot be said of stay here.
    fn reported_lines(&self, state: &State) -> State {
        let mut open = lines::without(state);
        if !self.at.settings.report_lines {
            return open;
        }
        for service in self.at.desired {
            let name = &service.name;
            let failed = state.services.get(name).and_then(|s| s.failure.as_ref());
            let reported = open.services.get_mut(name).and_then(|s| s.failure.as_mut());
            let Some((failed, reported)) = failed.filter(|f| !f.journal.is_empty()).zip(reported) else {
                continue;
            };
            match Mask::of(&secrets::files(service)) {
                Ok(mask) => reported.journal = failed.journal.iter().map(|line| mask.hide(line)).collect(),
                Err(e) => {
                    let why = crate::error::io_text(&e);
                    log::info(format!("{name}: its last lines are not reported: {why}"));
                }
            }
        }
        open
    }
}

/// Finds out how exposed those services are of which it is not known: one that a person started, or that ran
/// before this program could tell. Only where something is written anyway, so that an idle pass asks nobody.
fn fill_exposure(state: &mut State, outcome: &Outcome) {
    let unrated = |s: &&mut ServiceState| {
        s.store_path.is_some() && s.exposure.is_none() && !outcome.started.contains(&s.name)
    };
    let mut unrated: Vec<&mut ServiceState> = state.services.values_mut().filter(unrated).collect();
    if unrated.is_empty() {
        return;
    }
    match systemd::exposures() {
        Ok(exposures) => {
            unrated.iter_mut().for_each(|s| s.exposure = exposures.get(&s.name.unit()).copied());
        }
        Err(e) => log::info(format!("how exposed the services are is not known: {e}")),
    }
}

/// Whether there is anything to write: something new, or the last report is old.
fn should_publish(root: &Root, before: &State, state: &State) -> bool {
    let same = state.says_the_same(before);
    let fresh = state.checked_at.0.saturating_sub(before.checked_at.0).abs() < REPORT_EVERY_SEC;
    !(same && fresh && root.state_file().exists())
}

/// Writes the state and puts the report, if there is anything new in them or the last ones are old. `open` is what of it
/// is for the bucket.
fn publish(
    root: &Root,
    store: &dyn Store,
    before: &State,
    state: &mut State,
    open: impl Fn(&State) -> State,
) -> Result<()> {
    if !should_publish(root, before, state) {
        return Ok(());
    }
    let key = reported::key(&state.host);
    state.other_machine = other_machine(store, before, state);
    // The report first: a pass that dies between the two finds its old state, and reports again.
    let reported = {
        let _effect = failpoint::mark("put", &key);
        // What drains is of this moment, and a report stands for long.
        let report = lines::to_bytes(&State { draining: BTreeSet::new(), ..open(state) })?;
        store.put(&key, &report, &Condition::Always)
    };
    state.reported = reported.is_ok();
    if let Err(e) = reported {
        log::warning(format!("the report was not written: {e}; the next pass tries again"));
    }
    // A store that goes on refusing is asked again by every pass, and the disk is spared.
    if should_publish(root, before, state) { lines::keep(root, state) } else { Ok(()) }
}

/// Whether the report that is about to be replaced is another machine's: asked only where one is written, so that
/// an idle pass asks the store for nothing but the manifest. Credentials that may not read it tell nothing.
fn other_machine(store: &dyn Store, before: &State, state: &State) -> Option<OtherMachine> {
    let this = state.machine.as_ref()?;
    let found = reported::readable(store, &state.host);
    // Two that are at work find each other at every report: one that is not found any more has given up.
    let lasts = |other: &OtherMachine| {
        other.came_back && state.checked_at.0.saturating_sub(other.reported_at.0) <= SILENT_SEC
    };
    let earlier = before.other_machine.clone().filter(lasts);
    let Some((theirs, reported_at)) = found.and_then(|f| Some((f.machine?, f.checked_at))) else {
        return earlier;
    };
    if theirs.id == this.id {
        return earlier;
    }
    if state.checked_at.0.saturating_sub(reported_at.0) > SILENT_SEC {
        log::info(format!(
            "this machine takes the place of {theirs}, which reported as '{}' before",
            state.host
        ));
        return earlier;
    }
    let came_back =
        before.reported && before.machine.as_ref() == Some(this) && reported_at > before.checked_at;
    let other = OtherMachine { machine: theirs, reported_at, came_back };
    log::warning(other.text(&state.host, this));
    Some(other)
}

/// Leaves the reason of a pass that did not do its work in the state, and reports it where the store takes it:
/// what ran before may look well for long. An idle pass that fails as the one before writes nothing.
pub(super) fn leave_reason(
    settings: &Settings,
    root: &Root,
    ended: &PassError,
    now: Timestamp,
) -> Result<()> {
    let Some(before) = last_state(root, &settings.host, now)? else { return Ok(()) };
    let reason = ended.error.to_string();
    let mut state = failed_state(&before, reason.clone(), now);
    state.host = settings.host.clone();
    if ended.by == EndedBy::Manifest {
        state.manifest_error = Some(reason);
    }
    state.machine = machine::this();
    let store = store::open(&settings.store).ok();
    if let Some(store) = &store {
        state.store = Some(store.identity());
    }
    // What the store did not take once is not pressed upon it by every pass.
    let known = before.last_error == state.last_error;
    state.reported = if known { before.reported } else { true };
    if let Some(store) = store.filter(|_| ended.by != EndedBy::Store) {
        return publish(root, store.as_ref(), &before, &mut state, lines::without);
    }
    state.reported = false;
    if should_publish(root, &before, &state) { lines::keep(root, &state) } else { Ok(()) }
}

/// The state with the reason why passes end, and since when.
fn failed_state(before: &State, reason: String, now: Timestamp) -> State {
    let since = before.last_error.as_ref().filter(|e| e.reason == reason).map_or(now, |e| e.since);
    let deployer = env!("CARGO_PKG_VERSION").into();
    State { checked_at: now, deployer, last_error: Some(LastError { reason, since }), ..before.clone() }
}

/// The state that the pass before left; None where it cannot be read, which the next good pass must still see.
fn last_state(root: &Root, host: &HostName, now: Timestamp) -> Result<Option<State>> {
    let Some(bytes) = if_there(fs_err::read(root.state_file()))? else {
        return Ok(Some(State::new(host.clone(), now)));
    };
    Ok(State::parse(&bytes).ok().map(|state| lines::load(root).put_back(state)))
}

/// A pass that could not begin, because the configuration cannot be used: the state says so, as far as anybody
/// without that configuration can.
pub fn could_not_begin(why: &Error) {
    let now = Timestamp::now();
    // Its unit folder is not known, and not needed.
    let root = Root::system(Path::new("/etc/systemd/system"));
    let note = || -> Result<()> {
        let LockResult::Taken(_lock) = lock::take(&root.run_dir, now)? else { return Ok(()) };
        let Some(host) = HostName::of_this_machine() else { return Ok(()) };
        let Some(before) = last_state(&root, &host, now)? else { return Ok(()) };
        let state = State { reported: false, ..failed_state(&before, why.to_string(), now) };
        if should_publish(&root, &before, &state) {
            durable::folder(&root.state_dir, 0o755)?;
            lines::keep(&root, &state)?;
        }
        Ok(())
    };
    if let Err(e) = note() {
        log::error(format!("why this pass failed could not be recorded: {e}"));
    }
}
