//! The effects: performs the steps of a plan, phase by phase for all services together, and returns what was
//! learned. It decides nothing: what follows from a failure is for the next call of [`super::plan::plan`].

use super::listeners::{self, Answers, Listeners};
use super::plan::{
    AttemptFailure, Attempts, Goal, LastKnownGood, Observed, PendingJob, PersistedState, Plan, ServicePlan,
    Step, UnitFile, previous_after,
};
use super::root::Root;
use super::state::{self, FailureRecord};
use super::systemd::{self, Began, CameUp, Listed, Restarted, Shown};
use super::{applied, intent, observe};
use crate::clock::{self, Timestamp};
use crate::config::Settings;
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::manifest::{Service, command};
use crate::names::{ServiceName, StorePath};
use crate::secrets;
use crate::{log, nix};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a service must stay up and well before it counts as up.
pub const SETTLE: Duration = Duration::from_secs(3);
/// The same for one that has just been proved beside the version before, by the same inputs, and goes on answering there:
/// nobody is led to the second process before it has settled as well.
const SETTLE_AGAIN: Duration = Duration::from_secs(1);
/// How often services that are coming up are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(150);
/// How long everybody waits for units to stop or start; what takes longer is waited for when nothing else is left
/// to do, or left to the next pass.
pub const EVERYBODY_WAITS: Duration = Duration::from_secs(20);
/// How long one pass waits at most, whatever systemd's own limit for a stop is: what was published meanwhile waits with
/// it, and `deployer.service` has a limit too (TimeoutStartSec=). The next pass goes on with what is left.
const ONE_PASS_WAITS: Duration = Duration::from_secs(600);
/// What a start may take after a stop that took as long as it may.
const START_AFTER: Duration = Duration::from_secs(60);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How many lines of its journal go with a refusal.
pub const JOURNAL_LINES: u32 = 10;

/// What the effects work on.
#[derive(Debug)]
pub struct Host<'a> {
    /// The configuration.
    pub settings: &'a Settings,
    /// The paths.
    pub root: &'a Root,
}

/// A goal that is about to be put in place.
#[derive(Clone)]
struct Start<'a> {
    name: &'a ServiceName,
    goal: &'a Goal,
    why: &'static str,
    /// False: it runs already and is only to be proved.
    restart: bool,
}

impl Attempts {
    /// Says what the disk did not take, and takes it down; whether there was such a thing.
    pub fn disk(&mut self, written: Result<()>) -> bool {
        let failed = written.err();
        if let Some(e) = &failed {
            log::error(e);
            self.unwritten.push(e.to_string());
        }
        failed.is_some()
    }
}

impl Host<'_> {
    /// Performs the steps of the services (not those of what is gone, not the route) and keeps `observed`,
    /// `persisted` and `attempts` true. Returns whether anything on the host was changed.
    pub fn round(
        &self,
        plan: &Plan,
        desired: &[&Service],
        observed: &mut Observed,
        persisted: &mut PersistedState,
        attempts: &mut Attempts,
    ) -> Result<bool> {
        let known = attempts.failures.len() + attempts.unfetchable.len();
        let touched: BTreeSet<ServiceName> = plan
            .services
            .iter()
            .filter(|s| s.steps.iter().any(Step::touches))
            .map(|s| s.name.clone())
            .collect();
        if !touched.is_empty()
            && let Err(e) = intent::record(self.root, touched.clone())
        {
            // What cannot be taken down is not begun; what merely does not run is started all the same.
            let touched = plan.services.iter().filter(|s| touched.contains(&s.name));
            let goals = touched.map(|s| s.goal.as_ref().map(|g| (&s.name, g))).collect::<Option<Vec<_>>>();
            for (name, goal) in goals.ok_or_else(|| e.clone())? {
                self.fail_on_host(name, goal, &e, attempts);
            }
            return Ok(false);
        }
        self.root_and_fetch(plan, observed, attempts)?;
        self.check(plan, attempts)?;
        if attempts.failures.len() + attempts.unfetchable.len() > known {
            // What was refused has another goal now: everything that restarts shall restart in one call.
            return Ok(false);
        }
        let overlapped = self.overlap(plan, desired, persisted, observed, attempts)?;
        if attempts.failures.len() + attempts.unfetchable.len() > known {
            return Ok(overlapped);
        }
        let paused = self.pause(&plan.services, attempts)?;
        let removed = self.remove(&plan.services, persisted, observed, attempts)?;
        let started = self.write_and_start(plan, desired, observed, persisted, attempts)?;
        self.record(plan, persisted, attempts);
        let unrooted = self.unroot(&plan.services, observed, attempts);
        attempts.disk(unrooted);
        Ok(paused || removed || started)
    }

    /// Roots first, so that no collection can come between; then all closures in one copy.
    fn root_and_fetch(&self, plan: &Plan, observed: &mut Observed, attempts: &mut Attempts) -> Result<()> {
        let mut wanted: BTreeMap<&StorePath, Vec<&ServiceName>> = BTreeMap::new();
        let mut rooting = Vec::new();
        let mut batch = Batch::default();
        for (service, step) in steps(&plan.services) {
            match step {
                Step::Root(path) => {
                    let dir = self.root.roots(&service.name);
                    let link = dir.join(path.base());
                    let made = durable::folder(&dir, 0o755);
                    if made.is_ok() {
                        batch.symlink(path.as_ref(), &link);
                    }
                    rooting.push((service, path, link, made.err()));
                }
                Step::Fetch(path) => wanted.entry(path).or_default().push(&service.name),
                _ => {}
            }
        }
        let mut failed = batch.finish();
        for (service, path, link, not_made) in rooting {
            if let (Some(e), Some(goal)) = (not_made.or_else(|| failed.remove(&link)), &service.goal) {
                self.fail_on_host(&service.name, goal, &e.into(), attempts);
                continue;
            }
            observed.roots.entry(service.name.clone()).or_default().insert(path.base().into());
            if service.goal.as_ref().is_none_or(|g| g.proved || g.path != *path) {
                log::notice(format!("{}: {path} had lost its root and has one again", service.name));
            }
        }
        if wanted.is_empty() {
            // Also what a pass that died has left of something that was taken back since.
            if attempts.unfetchable.is_empty() {
                nix::forget_transfers();
            }
            return Ok(());
        }
        let paths: Vec<StorePath> = wanted.keys().map(|p| (*p).clone()).collect();
        log::info(format!("fetching {} closure(s) from {}", paths.len(), self.settings.cache));
        let begun = Instant::now();
        let failures = match nix::fetch_within(self.settings, &paths, &self.root.run_dir) {
            Ok(failures) => failures,
            // Nix itself is missing or broken: true for each of them, and no reason to stop what runs.
            Err(e) => {
                let reason = e.to_string();
                for path in &paths {
                    attempts.unfetchable.insert(path.clone(), reason.clone());
                }
                log::error(reason);
                return Ok(());
            }
        };
        for path in paths {
            let names: Vec<&str> = wanted[&path].iter().map(|n| n.as_str()).collect();
            let names = names.join(", ");
            match failures.get(&path) {
                None => {
                    log::info(format!("{names}: fetched {path} ({:.1} s)", begun.elapsed().as_secs_f64()));
                    observed.present.insert(path);
                }
                Some(why) => {
                    log::error(format!("{names}: {why}"));
                    attempts.unfetchable.insert(path, why.to_string());
                }
            }
        }
        Ok(())
    }

    /// What can be known before anything is touched: the executable is there, and systemd takes every line.
    fn check(&self, plan: &Plan, attempts: &mut Attempts) -> Result<()> {
        let mut to_verify = Vec::new();
        for Start { name, goal, .. } in starts(plan) {
            if goal.proved || attempts.unfetchable.contains_key(&goal.path) {
                continue;
            }
            match executable(&goal.service, &goal.path).and_then(|()| legible(&goal.service)) {
                Ok(()) => to_verify.push((name.clone(), goal.unit.clone())),
                Err(why) => self.refuse(name, goal, why, Vec::new(), attempts),
            }
        }
        for (name, complaint) in systemd::verify(&to_verify, &self.root.run_dir)? {
            let goal = starts(plan).find(|s| *s.name == name).map(|s| s.goal);
            if let Some(goal) = goal {
                // systemd 262 and later starts nothing whose path has such a character; Nix allows '?' in a name.
                let why = match complaint.contains("contains special characters") {
                    true => format!(
                        "systemd on this host does not start a program with such a character in its path: {complaint}; \
                         give the derivation a name without it, and push that"
                    ),
                    false => format!("systemd does not take its unit: {complaint}"),
                };
                self.refuse(&name, goal, why, Vec::new(), attempts);
            }
        }
        Ok(())
    }

    /// Takes a failed attempt down: the reason, with the last lines of its journal.
    pub fn refuse(
        &self,
        name: &ServiceName,
        goal: &Goal,
        why: String,
        journal: Vec<String>,
        attempts: &mut Attempts,
    ) {
        let rejected = !goal.proved;
        let reason = if rejected && goal.unit_proved {
            format!(
                "{why}; its route stays as it was: correct http or health ('deploy-manifest set {name} …'), or try \
                 again with 'deployer run --retry {name}'"
            )
        } else if rejected {
            format!("{why}; push a mended version, or try this one again with 'deployer run --retry {name}'")
        } else {
            format!("{why}; see 'journalctl -u {name}'")
        };
        log::error(format!("{name}: {reason}"));
        for line in &journal {
            log::info(format!("{name} | {line}"));
        }
        let failure = FailureRecord {
            reason,
            attempted: Some(goal.path.clone()),
            at: Timestamp::now(),
            journal,
            attempts: 0,
            // What has been up before may be started again at any time: only a refusal is remembered.
            inputs: rejected.then(|| goal.inputs()),
            kept_out: false,
        };
        attempts.failures.insert((name.clone(), goal.inputs()), AttemptFailure { rejected, failure });
    }

    /// The host's trouble, not the release's: taken down for this pass, and tried again by the next.
    pub fn fail_on_host(&self, name: &ServiceName, goal: &Goal, why: &Error, attempts: &mut Attempts) {
        self.not_the_release(name, goal, why, None, attempts);
    }

    /// The same, where only a try tells, and a try ends what runs: tried again when nobody has the port any more.
    fn kept_out(&self, name: &ServiceName, goal: &Goal, why: &Error, attempts: &mut Attempts) {
        self.not_the_release(name, goal, why, Some(goal.inputs()), attempts);
    }

    fn not_the_release(
        &self,
        name: &ServiceName,
        goal: &Goal,
        why: &Error,
        inputs: Option<String>,
        attempts: &mut Attempts,
    ) {
        let reason = why.to_string();
        log::error(format!("{name}: {reason}"));
        let failure = FailureRecord {
            reason,
            attempted: Some(goal.path.clone()),
            at: Timestamp::now(),
            journal: Vec::new(),
            attempts: 0,
            kept_out: inputs.is_some(),
            inputs,
        };
        let key = (name.clone(), goal.inputs());
        attempts.failures.insert(key, AttemptFailure { rejected: false, failure });
    }

    /// Writes units, makes systemd read them, restarts in one call, and watches them come up.
    fn write_and_start(
        &self,
        plan: &Plan,
        desired: &[&Service],
        observed: &mut Observed,
        persisted: &mut PersistedState,
        attempts: &mut Attempts,
    ) -> Result<bool> {
        let mut reload = false;
        let mut starts: Vec<Start> = Vec::new();
        let mut failed = self.write_units(plan)?;
        failed.extend(self.enable(plan, &failed)?);
        for service in &plan.services {
            if service.steps.contains(&Step::Reload) {
                log::notice(format!("{}: systemd had read another unit", service.name));
                reload = true;
            }
            let Some(goal) = &service.goal else { continue };
            if let Some(remark) = &service.remark {
                log::warning(format!("{}: {remark}", service.name));
            }
            reload |= service.steps.iter().any(|step| matches!(step, Step::Write(_)));
            if let Some(e) = failed.get(&service.name) {
                self.fail_on_host(&service.name, goal, e, attempts);
                continue;
            }
            for step in &service.steps {
                let (why, restart) = match step {
                    Step::Restart(why) => (why, true),
                    Step::Prove(why) => (why, false),
                    _ => continue,
                };
                starts.push(Start { name: &service.name, goal, why, restart });
            }
        }
        // A person who put a unit back leaves systemd with what it had read before, and that is what it would start.
        if reload || starts.iter().any(|s| s.restart) {
            self.stop_waiting(&starts, observed)?;
            systemd::daemon_reload()?;
        }
        self.leave_replaced(&mut starts, observed, attempts)?;
        if starts.is_empty() {
            return Ok(reload);
        }
        for start in &starts {
            let what = if start.restart { "starting" } else { "watching" };
            log::notice(format!("{}: {what} {} ({})", start.name, start.goal.path, start.why));
        }
        let holders = port_holders(plan, &starts, persisted);
        for name in &holders {
            log::info(format!("{name}: stopping first, another service takes its port"));
        }
        let units: Vec<String> = holders.iter().map(|name| name.unit()).collect();
        let stopping = systemd::stop(&units, EVERYBODY_WAITS)?;
        for holder in holders.into_iter().filter(|name| stopping.contains(&name.unit())) {
            // Its port is free once it has stopped: then whoever takes it is started.
            let port = persisted.applied.get(holder).and_then(|a| a.service.port());
            let waits = |s: &Start| s.name == holder || s.restart && port == s.goal.service.port();
            for start in starts.iter().filter(|s| waits(s)) {
                let why = match start.name == holder {
                    true => still_stopping(holder),
                    false => format!("it waits for the port of {holder}, which is still stopping"),
                };
                pend(start.name, why, holder, true, attempts);
            }
        }
        starts.retain(|s| !attempts.pending.contains_key(s.name));
        if starts.is_empty() {
            return Ok(true);
        }
        let restarts = || starts.iter().filter(|s| s.restart);
        let units: Vec<String> = restarts().map(|s| s.name.unit()).collect();
        systemd::reset_failed(&units)?;
        let before: BTreeMap<&str, String> =
            units.iter().filter_map(|u| Some((u.as_str(), systemd::invocation(u)?))).collect();
        let begun = clock::journal_now();
        let (complaint, busy) = match systemd::restart(&units, EVERYBODY_WAITS)? {
            Restarted::All(complaint) => (complaint, BTreeSet::new()),
            Restarted::Not(busy) => (None, busy),
        };
        for start in restarts().filter(|s| busy.contains(&s.name.unit())) {
            let name = start.name;
            persisted.interrupted.remove(name);
            let why = format!("systemd is still stopping or starting it (see 'systemctl status {name}')");
            pend(name, why, name, true, attempts);
        }
        let starts: Vec<Start> = starts.iter().filter(|s| !busy.contains(&s.name.unit())).cloned().collect();
        let restarts = || starts.iter().filter(|s| s.restart);
        // A restart that systemd does not even begin leaves the old process running, and that would look well.
        let not_begun = |unit: &str| {
            let why = systemd::could_not_start(complaint.as_deref(), unit);
            let same = before.get(unit).is_some_and(|id| systemd::invocation(unit).as_ref() == Some(id));
            why.or_else(|| same.then(|| format!("it was not restarted: {}", said(complaint.as_deref()))))
        };
        let not_begun: BTreeMap<&ServiceName, String> =
            restarts().filter_map(|s| Some((s.name, not_begun(&s.name.unit())?))).collect();
        let watched: Vec<Watched> = starts
            .iter()
            .filter(|s| !not_begun.contains_key(s.name))
            .map(|s| Watched {
                name: s.name,
                unit: s.name.unit(),
                service: &s.goal.service,
                was_up: !s.restart && (s.goal.proved || s.goal.unit_proved),
                settle: match attempts.led.get(s.name) {
                    Some((_, inputs)) if *inputs == s.goal.inputs() => SETTLE_AGAIN,
                    _ => SETTLE,
                },
            })
            .collect();
        // What this pass did not start may have said what there is to be known before it began.
        let ran_before: BTreeMap<&ServiceName, String> = starts
            .iter()
            .filter(|s| !s.restart)
            .filter_map(|s| Some((s.name, observed.units.get(s.name)?.invocation.clone()?)))
            .collect();
        // Done for those: a clock that was set back must not make them look older than their units for ever.
        for start in restarts() {
            persisted.interrupted.remove(start.name);
        }
        // Those that were never up: there is nothing older to be put back, and nobody else to answer meanwhile.
        let first = |name: &ServiceName| {
            let new = |s: &Start| *s.name == *name && s.goal.desired && s.goal.service.http.is_some();
            !persisted.applied.contains_key(name) && starts.iter().any(new)
        };
        let mut led = false;
        let mut well = |name: &ServiceName| {
            if !led && first(name) {
                led = true;
                self.lead_to_first(desired, persisted, attempts, observed);
            }
        };
        // What it says is known before the watch has settled: it costs the pass no time.
        let (outcomes, exposures) = std::thread::scope(|scope| {
            let exposures = scope.spawn(systemd::exposures);
            (watch(self.root, &watched, &mut well), exposures.join())
        });
        attempts.started.extend(starts.iter().map(|s| s.name.clone()));
        match exposures.unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
            Ok(exposures) => attempts.exposures = exposures,
            Err(e) => {
                attempts.exposures.clear();
                log::info(format!("how exposed the services are is not known: {e}"));
            }
        }
        let outcomes = outcomes?;
        let up = starts.iter().filter(|start| {
            !not_begun.contains_key(start.name) && matches!(outcomes.get(start.name), Some(Ok(_)))
        });
        // What came up is taken down first: a pass that dies among the others' failures leaves it proved.
        self.proved(up.map(|start| (start.name, start.goal)), persisted, attempts);
        for start in &starts {
            let why = match (not_begun.get(start.name), outcomes.get(start.name)) {
                (None, Some(Ok(up))) => {
                    log::info(format!("{}: up after {:.1} s", start.name, up.after.as_secs_f64()));
                    match &up.verified {
                        Some(id) => persisted.verified.insert(start.name.clone(), id.clone()),
                        None => persisted.verified.remove(start.name),
                    };
                    continue;
                }
                (None, Some(Err(NotUp::Host(why)))) => {
                    self.fail_on_host(start.name, start.goal, &Error::new(why), attempts);
                    continue;
                }
                (Some(why), _) | (None, Some(Err(NotUp::Release(why)))) => why.clone(),
                (None, None) => said(complaint.as_deref()),
            };
            let began = ran_before.get(start.name).cloned().map_or(Began::At(begun), Began::Before);
            let journal = systemd::journal(&start.name.unit(), &began, JOURNAL_LINES);
            match taken(start.name, &start.goal.service, &journal) {
                Some(other) => {
                    self.kept_out(start.name, start.goal, &Error::new(format!("{other} ({why})")), attempts)
                }
                None => self.refuse(start.name, start.goal, why, journal, attempts),
            }
        }
        Ok(true)
    }

    /// Stops what would be started twice, by systemd and by us ([`systemd::stop_waiting`]). What somebody's drop-ins change
    /// may not be started here at all.
    fn stop_waiting(&self, starts: &[Start], observed: &Observed) -> Result<()> {
        let waits = |s: &&Start| {
            let seen = observed.units.get(s.name);
            seen.is_some_and(|u| systemd::is_between_starts(&u.listed.sub) && u.drop_ins.is_empty())
        };
        let units = starts.iter().filter(|s| s.restart).filter(waits).map(|s| s.name.unit());
        systemd::stop_waiting(&units.collect::<Vec<_>>())
    }

    /// Takes out of `starts` what would start something else than our unit, by drop-ins that are known: starting that
    /// would only end what runs.
    fn leave_replaced(
        &self,
        starts: &mut Vec<Start>,
        observed: &Observed,
        attempts: &mut Attempts,
    ) -> Result<()> {
        let has_drop_ins = |s: &&Start| observed.units.get(s.name).is_some_and(|u| !u.drop_ins.is_empty());
        let units: Vec<String> = starts.iter().filter(has_drop_ins).map(|s| s.name.unit()).collect();
        let shown = systemd::show(&units)?;
        starts.retain(|start| {
            let unit = start.name.unit();
            let watched = Watched {
                name: start.name,
                service: &start.goal.service,
                unit,
                was_up: false,
                settle: SETTLE,
            };
            let why = shown.get(&watched.unit).and_then(|shown| watched.replaced(self.root, shown));
            if let Some(why) = &why {
                self.fail_on_host(start.name, start.goal, &Error::new(why), attempts);
            }
            why.is_none()
        });
        Ok(())
    }

    /// Writes all units, and takes away what would stand in for them; which of them failed, and why.
    fn write_units(&self, plan: &Plan) -> Result<BTreeMap<ServiceName, Error>> {
        let write = |step: &Step| matches!(step, Step::Write(_));
        let all: Vec<(&ServiceName, &Goal)> = with_goal(plan, write).collect();
        if all.is_empty() {
            return Ok(BTreeMap::new());
        }
        fs_err::create_dir_all(&self.root.unit_dir)?;
        let mut batch = Batch::default();
        all.iter().for_each(|(name, goal)| batch.write(&self.root.unit(name), goal.unit.as_bytes(), 0o644));
        let mut failed = batch.finish();
        let written = all.into_iter().map(|(name, _)| {
            let ended = failed.remove(&self.root.unit(name)).map_or(Ok(()), Err);
            (name.clone(), ended.and_then(|()| self.remove_strays(name)))
        });
        Ok(written.filter_map(|(name, ended)| Some((name, ended.err()?.into()))).collect())
    }

    fn remove_strays(&self, name: &ServiceName) -> std::io::Result<()> {
        for stray in observe::strays(self.root, name) {
            log::notice(format!("{name}: removing {}, which would stand in for its unit", stray.display()));
            durable::remove(&stray)?;
        }
        Ok(())
    }

    /// Makes the links that start services at boot, but of those whose units `failed`; which of them failed, and why.
    fn enable(
        &self,
        plan: &Plan,
        failed: &BTreeMap<ServiceName, Error>,
    ) -> Result<BTreeMap<ServiceName, Error>> {
        let enable = |step: &Step| matches!(step, Step::Enable);
        let all = with_goal(plan, enable).map(|(name, _)| name).filter(|name| !failed.contains_key(*name));
        let all: Vec<&ServiceName> = all.collect();
        if all.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut batch = Batch::default();
        match durable::folder(&self.root.wants_dir(), 0o755) {
            Ok(()) => {
                all.iter().for_each(|name| batch.symlink(&self.root.unit(name), &self.root.wanted(name)));
            }
            Err(e) => {
                let e = Error::from(e);
                return Ok(all.into_iter().map(|name| (name.clone(), e.clone())).collect());
            }
        }
        let mut not = batch.finish();
        let mut failed = BTreeMap::new();
        for name in all {
            match not.remove(&self.root.wanted(name)) {
                None => log::info(format!("{name}: started at boot from now on")),
                Some(e) => drop(failed.insert(name.clone(), e.into())),
            }
        }
        Ok(failed)
    }

    fn proved<'g>(
        &self,
        goals: impl IntoIterator<Item = (&'g ServiceName, &'g Goal)>,
        persisted: &mut PersistedState,
        attempts: &mut Attempts,
    ) {
        let proved = goals.into_iter().filter_map(|(name, goal)| {
            let before = persisted.applied.get(name);
            let previous = previous_after(&goal.path, before);
            let proved = LastKnownGood { service: goal.service.clone(), path: goal.path.clone(), previous };
            (before != Some(&proved)).then(|| (name.clone(), proved))
        });
        let proved: Vec<(ServiceName, LastKnownGood)> = proved.collect();
        for e in applied::record(self.root, proved.iter().map(|(_, applied)| applied)) {
            attempts.disk(Err(e));
        }
        persisted.applied.extend(proved);
    }

    /// Entries that changed without changing their unit (a route, a health path).
    fn record(&self, plan: &Plan, persisted: &mut PersistedState, attempts: &mut Attempts) {
        self.proved(with_goal(plan, |step| matches!(step, Step::Record)), persisted, attempts);
    }

    /// Stops what is paused and keeps it from starting at boot; its unit stays.
    fn pause(&self, services: &[ServicePlan], attempts: &mut Attempts) -> Result<bool> {
        let names: Vec<&ServiceName> =
            steps(services).filter(|(_, step)| matches!(step, Step::Pause)).map(|(s, _)| &s.name).collect();
        let units: Vec<String> = names.iter().map(|n| n.unit()).collect();
        for name in &names {
            log::notice(format!("{name}: stopping (paused)"));
            durable::remove(&self.root.wanted(name)).or_else(missing_folder)?;
        }
        let stopping = systemd::stop(&units, EVERYBODY_WAITS)?;
        for name in names.iter().filter(|name| stopping.contains(&name.unit())) {
            pend(name, still_stopping(name), name, false, attempts);
        }
        Ok(!names.is_empty())
    }

    /// Stops services and removes their units, links and entries; returns whether there were any. Only units
    /// with our mark, or that are gone but were proved, are touched.
    pub fn remove(
        &self,
        services: &[ServicePlan],
        persisted: &mut PersistedState,
        observed: &Observed,
        attempts: &mut Attempts,
    ) -> Result<bool> {
        let mut going: Vec<(&ServiceName, &str)> = steps(services)
            .filter_map(|(service, step)| match step {
                Step::Remove(why) => Some((&service.name, *why)),
                _ => None,
            })
            .collect();
        if going.is_empty() {
            return Ok(false);
        }
        let mut marked = Vec::new();
        for (name, why) in &going {
            log::notice(format!("{name}: removing ({why})"));
            // A unit that was deleted by hand leaves its process and its boot link, which are ours as well.
            let ours = match observed.units.get(*name).map(|u| &u.file) {
                Some(UnitFile::Ours(_)) => true,
                Some(UnitFile::Absent) => persisted.applied.contains_key(*name),
                Some(UnitFile::Foreign(_)) | None => false,
            };
            if ours {
                marked.push(name.unit());
            }
        }
        // Stop before deleting: a unit without a file keeps its process and cannot be restarted.
        let stopping = systemd::stop(&marked, EVERYBODY_WAITS)?;
        for (name, _) in going.iter().filter(|(name, _)| stopping.contains(&name.unit())) {
            durable::remove(&self.root.wanted(name)).or_else(missing_folder)?;
            log::warning(format!("{name}: {}; the next pass removes it", still_stopping(name)));
            pend(name, still_stopping(name), name, false, attempts);
        }
        going.retain(|(name, _)| !stopping.contains(&name.unit()));
        marked.retain(|unit| !stopping.contains(unit));
        let ours = || going.iter().map(|(name, _)| *name).filter(|name| marked.contains(&name.unit()));
        // What would start it, before what it is started from.
        remove_all(ours().map(|name| self.root.wanted(name)))?;
        remove_all(ours().map(|name| self.root.unit(name)))?;
        for stray in ours().flat_map(|name| observe::strays(self.root, name)) {
            durable::remove(&stray)?;
        }
        if !marked.is_empty() {
            systemd::daemon_reload()?;
            systemd::reset_failed(&marked)?;
        }
        // Last: while it is remembered as proved, an interrupted removal is begun anew.
        remove_all(going.iter().map(|(name, _)| self.root.applied(name)))?;
        for (name, _) in &going {
            persisted.applied.remove(*name);
        }
        Ok(true)
    }

    /// Lets go of paths; a service's folder goes with its last one.
    pub fn unroot(
        &self,
        services: &[ServicePlan],
        observed: &mut Observed,
        attempts: &Attempts,
    ) -> Result<()> {
        let unrooted: Vec<(&ServiceName, &String)> = steps(services)
            .filter_map(|(service, step)| match step {
                // What still stops runs from there.
                Step::Unroot(base) if !attempts.pending.contains_key(&service.name) => {
                    Some((&service.name, base))
                }
                _ => None,
            })
            .collect();
        remove_all(unrooted.iter().map(|(name, base)| self.root.roots(name).join(base)))?;
        for (name, base) in unrooted {
            if let Some(held) = observed.roots.get_mut(name) {
                held.remove(base);
            }
        }
        let emptied: BTreeSet<&ServiceName> = services
            .iter()
            .filter(|s| s.goal.is_none() && observed.roots.get(&s.name).is_some_and(BTreeSet::is_empty))
            .map(|s| &s.name)
            .collect();
        for name in emptied {
            // Somebody else may have put something there: it is theirs.
            durable::remove_folder(&self.root.roots(name))?;
            observed.roots.remove(name);
        }
        Ok(())
    }
}

impl Host<'_> {
    /// Waits for what takes its time, as long as systemd gives it, until one of them is through; false when there
    /// is none to be waited for any longer.
    pub fn wait(&self, attempts: &mut Attempts) -> Result<bool> {
        let awaited: BTreeMap<ServiceName, PendingJob> =
            attempts.pending.iter().filter(|(_, p)| p.awaited).map(|(n, p)| (n.clone(), p.clone())).collect();
        let units: Vec<String> = awaited.values().map(|p| p.unit.clone()).collect();
        let timeouts = systemd::stop_timeouts(&units)?;
        let limit = |pending: &PendingJob| waits_for(timeouts.get(&pending.unit).copied().flatten());
        for (name, pending) in &awaited {
            let seconds = limit(pending).as_secs();
            log::notice(format!("{name}: waiting for {}, for at most {seconds} s", pending.unit));
        }
        loop {
            if awaited.values().all(|p| p.since.elapsed() >= limit(p)) {
                return Ok(false);
            }
            let busy = systemd::busy(&units)?;
            let before = attempts.pending.len();
            attempts.pending.retain(|_, p| !p.awaited || busy.contains(&p.unit));
            if attempts.pending.len() < before {
                return Ok(true);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// An error that kept a round from going on is the trouble of those that it was made for, and of nobody else.
    pub fn hinder_all(&self, plan: &Plan, error: &Error, attempts: &mut Attempts) {
        let mut alone = true;
        for service in plan.services.iter().filter(|s| !s.steps.is_empty()) {
            if let Some(goal) = &service.goal {
                self.fail_on_host(&service.name, goal, error, attempts);
                alone = false;
            }
        }
        if alone {
            attempts.disk(Err(error.clone()));
        }
    }
}

/// How long one pass waits for a unit that systemd lets take so long to stop.
fn waits_for(stop: Option<Duration>) -> Duration {
    stop.map_or(ONE_PASS_WAITS, |stop| ONE_PASS_WAITS.min(stop.saturating_add(START_AFTER)))
}

fn still_stopping(name: &ServiceName) -> String {
    format!("it is still stopping (see 'systemctl status {name}', and systemd.stopTimeoutSec)")
}

/// Takes down that systemd is not through with a service.
fn pend(name: &ServiceName, why: String, on: &ServiceName, awaited: bool, attempts: &mut Attempts) {
    let since = Instant::now();
    attempts.pending.insert(name.clone(), PendingJob { why, unit: on.unit(), since, awaited });
}

/// A complaint of systemctl, for a reason.
fn said(complaint: Option<&str>) -> String {
    complaint.map_or_else(|| "systemd says nothing of it".into(), crate::runner::tail)
}

/// Removes files and links; the first that could not be is the error.
fn remove_all(paths: impl Iterator<Item = PathBuf>) -> Result<()> {
    let mut batch = Batch::default();
    paths.for_each(|path| batch.remove(&path));
    batch.finish().into_values().next().map_or(Ok(()), |e| Err(e.into()))
}

fn missing_folder(e: std::io::Error) -> std::io::Result<bool> {
    if e.kind() == std::io::ErrorKind::NotFound { Ok(false) } else { Err(e) }
}

fn steps(services: &[ServicePlan]) -> impl Iterator<Item = (&ServicePlan, &Step)> {
    services.iter().flat_map(|s| s.steps.iter().map(move |step| (s, step)))
}

/// The services that have such a step, with what should run.
fn with_goal(plan: &Plan, is: impl Fn(&Step) -> bool) -> impl Iterator<Item = (&ServiceName, &Goal)> {
    let such = plan.services.iter().filter(move |s| s.steps.iter().any(&is));
    such.filter_map(|s| Some((&s.name, s.goal.as_ref()?)))
}

fn starts(plan: &Plan) -> impl Iterator<Item = Start<'_>> {
    steps(&plan.services).filter_map(|(service, step)| match (step, &service.goal) {
        (Step::Restart(why), Some(goal)) => Some(Start { name: &service.name, goal, why, restart: true }),
        _ => None,
    })
}

/// Services that have, up to now, a port on which another one is about to start: those that go, and those that
/// move to another port in the same call, which systemd would restart in any order.
fn port_holders<'a>(
    plan: &'a Plan,
    starts: &[Start<'a>],
    persisted: &PersistedState,
) -> Vec<&'a ServiceName> {
    let taken: BTreeMap<u16, &ServiceName> =
        starts.iter().filter(|s| s.restart).filter_map(|s| Some((s.goal.service.port()?, s.name))).collect();
    let leaving =
        plan.gone.iter().map(|s| &s.name).chain(starts.iter().filter(|s| s.restart).map(|s| s.name));
    leaving
        .filter(|name| {
            let held = persisted.applied.get(*name).and_then(|a| a.service.port());
            held.and_then(|p| taken.get(&p)).is_some_and(|taker| taker != name)
        })
        .collect()
}

/// Whether systemd takes a service's secrets: of a line that sets no name of a variable it writes all to the journal,
/// the value with it.
fn legible(service: &Service) -> Result<(), String> {
    for file in secrets::files(service) {
        // One that cannot be read has been said by the plan, and is systemd's to refuse.
        if let Ok(Some(why)) = secrets::illegible(&service.name, &file) {
            return Err(format!("its secrets file {why}"));
        }
    }
    Ok(())
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
    let (program, _) = command::program(service, path);
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

/// A unit that was started and is to come up.
#[derive(Debug)]
pub struct Watched<'a> {
    /// The service.
    pub name: &'a ServiceName,
    /// The unit.
    pub unit: String,
    /// How it is probed, and how long it may take.
    pub service: &'a Service,
    /// It ran as it is before, and was not started now: that it once crashed tells nothing of what is proved.
    pub was_up: bool,
    /// How long it must stay up and well.
    pub settle: Duration,
}

impl Watched<'_> {
    /// Who else has its port, if anybody does.
    fn other(&self, listeners: Option<&Listeners>) -> Option<String> {
        let port = self.service.port()?;
        match listeners?.at(port, &self.unit) {
            Answers::Others(owners) => Some(listeners::in_the_way(port, self.name.as_str(), &owners)),
            Answers::Nobody | Answers::Unit | Answers::Unknown => None,
        }
    }

    /// What systemd has loaded in place of the unit that was written, if anything.
    fn replaced(&self, root: &Root, shown: &Shown) -> Option<String> {
        let path = self.service.artifact.store_path.path()?;
        let (program, _) = command::program(self.service, path);
        let why = shown.replaced(&root.unit_dir.join(&self.unit), &program)?;
        let drop_ins: Vec<String> = shown.drop_ins.iter().map(|p| p.display().to_string()).collect();
        let because = state::attention(self.name, &drop_ins);
        Some(why + &because.map_or(String::new(), |text| format!("; {text}")))
    }
}

/// Why a unit did not come up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotUp {
    /// It is the release: it would be so again.
    Release(String),
    /// It is this host: another process has the port, or systemd has loaded something else.
    Host(String),
}

/// A unit that came up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Up {
    /// How long it took to be well.
    pub after: Duration,
    /// The invocation that was watched, if systemd had loaded our file and nobody's drop-ins.
    pub verified: Option<String>,
}

/// Watches units come up: each until it has been well for its settle time, cannot recover, or is out of time. `well` is
/// told when one begins to be.
pub fn watch(
    root: &Root,
    watched: &[Watched],
    mut well: impl FnMut(&ServiceName),
) -> Result<BTreeMap<ServiceName, Result<Up, NotUp>>> {
    struct Watching<'a> {
        watched: &'a Watched<'a>,
        first: Option<Shown>,
        /// How often systemd had restarted it before.
        restarts: u32,
        well_since: Option<Instant>,
    }
    let begun = Instant::now();
    let mut outcomes = BTreeMap::new();
    let mut pending: Vec<Watching> = watched
        .iter()
        .map(|watched| Watching { watched, first: None, restarts: 0, well_since: None })
        .collect();
    while !pending.is_empty() {
        // One time for all, so that all have settled at the same look.
        let looked = Instant::now();
        // `show` costs systemd far more than the list of all units, and a unit that is listed as running under
        // the invocation of its first look would show the same again.
        let listed = systemd::list_units()?;
        let unchanged = |p: &Watching| match &p.first {
            Some(first) if p.well_since.is_some() => {
                listed.get(&p.watched.unit).is_some_and(Listed::running)
                    && systemd::invocation(&p.watched.unit).is_some_and(|id| id == first.invocation)
            }
            _ => false,
        };
        let unchanged: Vec<bool> = pending.iter().map(unchanged).collect();
        let close = pending.iter().zip(&unchanged).filter(|(_, unchanged)| !**unchanged);
        let mut shown = systemd::show(&close.map(|(p, _)| p.watched.unit.clone()).collect::<Vec<_>>())?;
        let probes = probe_all(pending.iter().map(|p| p.watched.service));
        // After the probes: whoever has answered them is still there.
        let listeners = Listeners::read().ok();
        let mut still = Vec::new();
        for ((mut one, probe), unchanged) in pending.into_iter().zip(probes).zip(unchanged) {
            let now = match &one.first {
                Some(first) if unchanged => first.clone(),
                _ => {
                    let shown = shown.remove(&one.watched.unit).unwrap_or_default();
                    if one.watched.was_up && one.first.is_none() {
                        one.restarts = shown.restarts;
                    }
                    Shown { restarts: shown.restarts.saturating_sub(one.restarts), ..shown }
                }
            };
            let name = one.watched.name.clone();
            let deadline = Duration::from_secs(one.watched.service.timeout_sec().into());
            // What was started is what systemd had loaded, which need not be what our file says.
            if one.first.is_none()
                && let Some(why) = one.watched.replaced(root, &now)
            {
                outcomes.insert(name, Err(NotUp::Host(why)));
                continue;
            }
            let other = one.watched.other(listeners.as_ref());
            let of_the_host = |why: &str, other: String| NotUp::Host(format!("{other} ({why})"));
            match (systemd::came_up(one.first.as_ref(), &now, probe.as_ref()), other) {
                // A program that finds its port taken may end of it.
                (CameUp::No(why), Some(other)) => {
                    outcomes.insert(name, Err(of_the_host(&why, other)));
                    continue;
                }
                (CameUp::No(why), None) => {
                    outcomes.insert(name, Err(NotUp::Release(why)));
                    continue;
                }
                // It may be one that is just going, or that it waits for.
                (CameUp::Well | CameUp::NotYet(_), Some(other)) => {
                    one.well_since = None;
                    if begun.elapsed() >= deadline {
                        let why = format!("not up within {} s", deadline.as_secs());
                        outcomes.insert(name, Err(of_the_host(&why, other)));
                        continue;
                    }
                }
                (CameUp::Well, None) => {
                    if one.well_since.is_none() {
                        well(one.watched.name);
                    }
                    let since = *one.well_since.get_or_insert(looked);
                    if looked.duration_since(since) >= failpoint::shortened(one.watched.settle) {
                        let clean = now.drop_ins.iter().all(|path| systemd::is_vendor_drop_in(path));
                        let verified = clean.then(|| now.invocation.clone());
                        outcomes.insert(name, Ok(Up { after: since.duration_since(begun), verified }));
                        continue;
                    }
                }
                (CameUp::NotYet(why), None) => {
                    one.well_since = None;
                    if begun.elapsed() >= deadline {
                        let why = format!("not up within {} s: {why}", deadline.as_secs());
                        outcomes.insert(name, Err(NotUp::Release(why)));
                        continue;
                    }
                }
            }
            one.first.get_or_insert(now);
            still.push(one);
        }
        pending = still;
        let end = |p: &Watching| {
            Some(failpoint::shortened(p.watched.settle).saturating_sub(p.well_since?.elapsed()))
        };
        let next_end = pending.iter().filter_map(end).min();
        if !pending.is_empty() {
            let look_every = failpoint::shortened(LOOK_EVERY);
            std::thread::sleep(next_end.map_or(look_every, |end| end.min(look_every)));
        }
    }
    Ok(outcomes)
}

/// One probe of each service, side by side; None where there is nothing to probe.
fn probe_all<'a>(services: impl Iterator<Item = &'a Service>) -> Vec<Option<Result<(), String>>> {
    let services: Vec<&Service> = services.collect();
    let mut answers = Vec::with_capacity(services.len());
    for some in services.chunks(16) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().map(|s| scope.spawn(|| probe(s))).collect();
            for thread in threads {
                // A probe that panics is a defect of ours; the service is then not known to be well.
                answers.push(thread.join().unwrap_or_else(|_| Some(Err("the probe broke".into()))));
            }
        });
    }
    answers
}

/// Asks a service whether it is well: GET of its health path, else a TCP connect, else nothing.
fn probe(service: &Service) -> Option<Result<(), String>> {
    let (port, question) = service.probe()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let Some((path, host)) = question else {
        return Some(
            TcpStream::connect_timeout(&address, PROBE_TIMEOUT)
                .map(drop)
                .map_err(|e| format!("nothing answers on {address} ({e})")),
        );
    };
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .proxy(None)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .timeout_global(Some(PROBE_TIMEOUT))
        .build()
        .into();
    let answer = agent.get(format!("http://{address}{path}")).header("Host", &host).call();
    Some(match answer {
        Ok(response) if response.status().is_success() || response.status().is_redirection() => Ok(()),
        Ok(response) => Err(format!("GET {path} on {address} answers {}", response.status().as_u16())),
        Err(e) => Err(format!("GET {path} on {address} fails ({e})")),
    })
}

/// The error for a manifest that would remove everything.
pub fn would_empty(host: &str, names: &[ServiceName]) -> Error {
    let names: Vec<&str> = names.iter().map(ServiceName::as_str).collect();
    Error::new(format!(
        "the manifest has nothing to run on host '{host}', but {} run(s) here: nothing was removed; if that is meant, \
         run 'deployer run --allow-empty', else check 'hosts' in the manifest and 'host' in the configuration",
        names.join(", ")
    ))
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
        let unit = include_str!("../../contrib/systemd/deployer.service");
        let limit =
            unit.lines().find_map(|l| l.strip_prefix("TimeoutStartSec=")?.strip_suffix("min")).unwrap();
        // The rest is for what else a pass does.
        assert!(seconds(None) * 2 <= limit.parse::<u64>().unwrap() * 60, "{limit}");
    }
}
