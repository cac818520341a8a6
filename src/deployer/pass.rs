//! One pass: lock, load, source, observe, plan, execute, absorb, report. Data flows one way; a pass that dies
//! anywhere is finished by the next, because each starts from what is.

use super::caddy::{self, CaddyState, RoutePlan};
use super::execute::{self, Planned, Situation};
use super::observed::{Observed, Switching};
use super::outcome::{EndedBy, Outcome, PassError};
use super::overrides::{self, Decision};
use super::persisted::PersistedState;
use super::plan::{self, Options, Plan};
use super::ports::PortChanges;
use super::report::{self, Report};
use super::root::Root;
use super::source::{self, Purpose};
use super::state::State;
use super::trial::Trial;
use super::{lines, observe};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::durable;
use crate::error::{Error, Exit, Result, did_you_mean};
use crate::lock::{self, Lock, LockResult};
use crate::log;
use crate::manifest::{Manifest, Service};
use crate::names::ServiceName;
use crate::nix;
use crate::store;
use crate::systemd;
use std::collections::BTreeSet;

pub use super::report::could_not_begin;

/// How often a round of effects may be followed by another: fetch and check, deploy, put back, and one more
/// for what putting back taught.
const MAX_ROUNDS: usize = 6;

/// What a pass was asked for.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Started by the timer: a lock that is held is then nobody's fault.
    pub timer: bool,
    /// Rejected services to try again.
    pub retry: Vec<String>,
    /// Remove everything if the manifest says so.
    pub allow_empty: bool,
    /// Take a manifest of this serial although a later one was taken before.
    pub accept_serial: Option<u64>,
}

/// Makes one pass; returns the exit code.
pub fn run(settings: &Settings, requested: &RunOptions) -> Result<Exit> {
    let root = Root::system(&settings.unit_dir);
    let lock = match requested.timer {
        false => wait_for_lock(&root)?,
        true => match lock::take(&root.run_dir, Timestamp::now())? {
            LockResult::Taken(lock) => lock,
            LockResult::Held(who) => {
                log::info(format!(
                    "a pass is under way on this host ({who}); this one leaves the work to it"
                ));
                return Ok(Exit::Done);
            }
        },
    };
    locked(settings, requested, &root, lock, Timestamp::now())
}

/// Takes a decision down and makes a pass, which carries it out; returns the pass's exit code.
pub fn apply_override(settings: &Settings, name: &str, decision: &Decision) -> Result<Exit> {
    let root = Root::system(&settings.unit_dir);
    let lock = wait_for_lock(&root)?;
    let now = Timestamp::now();
    let (mut persisted, _) = PersistedState::load(&root, &settings.host, now)?;
    let Some(good) = persisted.applied.values().find(|a| a.service.name.as_str() == name) else {
        let near = did_you_mean(name, persisted.applied.keys().map(|n| n.as_str()));
        return Err(Error::new(format!("no service '{name}' was ever up on host '{}'{near}", settings.host)));
    };
    let named = || source::last_named(settings, &root, &good.service.name);
    persisted.overrides.decide(decision, good, named, now)?;
    overrides::save(&root, &persisted.overrides)?;
    locked(settings, &RunOptions::default(), &root, lock, now)
}

/// The lock, for a person, who wants it done rather than to be sent away.
fn wait_for_lock(root: &Root) -> Result<Lock> {
    lock::wait(&root.run_dir, |who| {
        log::notice(format!(
            "waiting for the pass under way on this host ({who}); Ctrl-C ends the wait, and nothing is done"
        ));
    })
}

/// Makes a pass under the lock; where it does not do its work, the state says why.
fn locked(
    settings: &Settings,
    requested: &RunOptions,
    root: &Root,
    _lock: Lock,
    now: Timestamp,
) -> Result<Exit> {
    pass(settings, requested, root, now).map_err(|ended| {
        if ended.by != EndedBy::Typing
            && let Err(e) = report::leave_reason(settings, root, &ended, now)
        {
            log::error(format!("why this pass failed could not be recorded: {e}"));
        }
        ended.error
    })
}

/// What a pass would do, from the same values that [`run`] performs; touches nothing.
#[derive(Debug)]
pub struct Preview {
    /// The serial of the manifest.
    pub serial: u64,
    /// When it was written.
    pub generation: Timestamp,
    /// Why it is not the bucket's.
    pub manifest_error: Option<String>,
    /// What would be done.
    pub plan: Plan,
    /// And for Caddy to have its routes.
    pub route: RoutePlan,
    /// Files that it reads ports from.
    pub ports: PortChanges,
    /// Whether it is to be tried first whether it reads any.
    pub trial: bool,
}

/// Plans one pass without doing it.
pub fn preview(settings: &Settings, requested: &RunOptions) -> Result<Preview> {
    let now = Timestamp::now();
    let root = Root::system(&settings.unit_dir);
    let store = store::open(&settings.store)?;
    let (mut persisted, _) = PersistedState::load(&root, &settings.host, now)?;
    let known = &persisted.state;
    let source =
        source::current(settings, &root, store.as_ref(), known, requested.accept_serial, Purpose::Preview)
            .map_err(|ended| ended.error)?;
    let (services, _) = services_for_host(&source.manifest, settings, &mut persisted, now);
    let host = Host::new(settings, &root, requested, &services, now);
    let mut host = host.map_err(|ended| ended.error)?;
    let observed = host.observe_first(&persisted)?;
    let Planned { plan, mut route, mut ports } = host.plan(&observed, &persisted, &Outcome::default())?;
    let trial = host.untried(&observed).is_some();
    if trial {
        let why = "it is to be tried first whether this Caddy reads ports from files";
        (route, ports) = (RoutePlan::Pending(why.into()), PortChanges::default());
    }
    Ok(Preview {
        serial: source.manifest.serial,
        generation: source.manifest.generation,
        manifest_error: source.error,
        plan,
        route,
        ports,
        trial,
    })
}

fn pass(settings: &Settings, requested: &RunOptions, root: &Root, now: Timestamp) -> Result<Exit, PassError> {
    let mut persisted = load(settings, root, now)?;
    let before = persisted.state.clone();
    let store = store::open(&settings.store)?;
    let accept = requested.accept_serial;
    let source = source::current(settings, root, store.as_ref(), &before, accept, Purpose::Pass)?;
    if let Some(error) = &source.error {
        let serial = source.manifest.serial;
        log::warning(format!("{error}; working from the last good manifest, version {serial}"));
    }
    let (services, expired) = services_for_host(&source.manifest, settings, &mut persisted, now);
    if expired {
        overrides::save(root, &persisted.overrides)?;
    }
    let mut host = Host::new(settings, root, requested, &services, now)?;
    log_manifest(&source.manifest, &before, &host);
    recover(root, &persisted)?;

    let mut outcome = Outcome::default();
    let mut observed = host.observe_first(&persisted)?;
    if let Some(program) = host.untried(&observed) {
        match Trial::run(&settings.caddy_admin, root, program) {
            Ok(trial) => {
                persisted.trial = Some(trial);
                observed = host.observe_again(&persisted, observed, None)?;
            }
            Err(why) => log::warning(format!("route: {why}; the next pass tries again")),
        }
    }
    if execute::undo_abandoned(host.at(&observed, &persisted))? {
        outcome.changed = true;
        observed = host.observe_again(&persisted, observed, None)?;
    }
    // Whoever looks from afar shall see why nothing happens.
    let mut planned = host
        .plan(&observed, &persisted, &outcome)
        .map_err(|error| PassError { by: EndedBy::Manifest, error })?;
    sweep(root, &planned, &observed, &persisted)?;
    let mut rounds = 0;
    while rounds < MAX_ROUNDS {
        if !planned.plan.is_settled() {
            rounds += 1;
            outcome = execute::services(host.at(&observed, &persisted), &planned, outcome);
        } else if !execute::wait(host.at(&observed, &persisted), &planned, &mut outcome)? {
            break;
        }
        // At once: should this pass die on the way back, the next one goes back as well and does not try the bad
        // version again.
        if persisted.absorb(&outcome) {
            outcome.wrote(lines::keep(root, &persisted.state));
        }
        // One that did not answer is asked again at the end: a version that is to be restored does not wait for it.
        let silent = Some(observed.caddy.clone()).filter(|caddy| !caddy.is_available());
        observed = host.observe_again(&persisted, observed, silent)?;
        planned = host.plan(&observed, &persisted, &outcome)?;
    }
    let touched = outcome.changed || !planned.plan.candidates.is_empty();
    if touched && (!observed.caddy.is_available() || outcome.route.is_some()) {
        // It may answer by now: it opens its endpoint anew at every change, and may have been restarted meanwhile. And
        // where the route was written before a wait, it has it.
        observed = host.observe_again(&persisted, observed, None)?;
        planned = host.plan(&observed, &persisted, &outcome)?;
    }
    outcome = execute::settled(host.at(&observed, &persisted), &planned, outcome);
    persisted.absorb(&outcome);
    if outcome.changed || outcome.error.is_some() {
        let (units, active) = observe::units(root, &host.desired, &persisted)?;
        observed = Observed { units, active, ..observed };
        // An attempt starts what it requires: what this changed is no reason to try again.
        plan::settle_inputs(&mut planned.plan, &host.desired, &observed, &outcome);
    }
    let at = host.at(&observed, &persisted);
    let (store, source, before, planned) = (store.as_ref(), &source, &before, &planned);
    Ok(Report { at, store, source, before, planned, outcome, now }.finish()?)
}

/// What stays the same for a whole pass.
struct Host<'a> {
    settings: &'a Settings,
    root: &'a Root,
    desired: Vec<&'a Service>,
    options: Options,
    now: Timestamp,
}

impl<'a> Host<'a> {
    fn new(
        settings: &'a Settings,
        root: &'a Root,
        requested: &RunOptions,
        services: &'a [Service],
        now: Timestamp,
    ) -> Result<Self, PassError> {
        let desired: Vec<&Service> = services.iter().collect();
        let known = |name: &String| {
            let found = desired.iter().find(|s| s.name.as_str() == name);
            found.map(|s| s.name.clone()).ok_or_else(|| {
                let near = did_you_mean(name, desired.iter().map(|s| s.name.as_str()));
                let unknown = format!("no service '{name}' on host '{}'{near}", settings.host);
                PassError { by: EndedBy::Typing, error: Error::new(unknown) }
            })
        };
        let options = Options {
            retry: requested.retry.iter().map(known).collect::<Result<_, _>>()?,
            allow_empty: requested.allow_empty,
            // systemd tells a service that a timer started it (systemd.exec(5), since 252).
            timer: requested.timer && std::env::var_os("TRIGGER_UNIT").is_some(),
            active: BTreeSet::new(),
        };
        Ok(Host { settings, root, desired, options, now })
    }

    fn observe(&self, persisted: &PersistedState, caddy: Option<CaddyState>) -> Result<Observed> {
        observe::observe(self.root, &self.settings.caddy_admin, &self.desired, persisted, caddy)
    }

    /// Looks again in the same pass. The secrets are those of the first look: what is done to them meanwhile shall neither
    /// keep a version from being restored nor make another attempt of the same one.
    fn observe_again(
        &self,
        persisted: &PersistedState,
        before: Observed,
        caddy: Option<CaddyState>,
    ) -> Result<Observed> {
        Ok(Observed { secrets: before.secrets, ..self.observe(persisted, caddy)? })
    }

    fn observe_first(&mut self, persisted: &PersistedState) -> Result<Observed> {
        let observed = self.observe(persisted, None)?;
        self.options.active = observed.active.clone();
        Ok(observed)
    }

    fn plan(&self, observed: &Observed, persisted: &PersistedState, so_far: &Outcome) -> Result<Planned> {
        let plan = plan::plan(&self.desired, observed, persisted, so_far, &self.options, self.now);
        let plan = plan.map_err(|e| {
            let names: Vec<&str> = e.0.iter().map(ServiceName::as_str).collect();
            Error::new(format!(
                "the manifest has nothing to run on host '{}', but {} run(s) here: nothing was removed; if that is \
                 intended, run 'deployer run --allow-empty', else check 'hosts' in the manifest and 'host' in the \
                 configuration",
                self.settings.host,
                names.join(", ")
            ))
        })?;
        let files = observed.switching.files();
        let route = caddy::changes(self.settings, &plan.routes, &observed.caddy, files);
        let ports = match (files, &route) {
            // They go with what Caddy is told.
            (None, _) | (_, RoutePlan::Pending(_)) => PortChanges::default(),
            (Some(files), _) => files.changes(&plan.routes),
        };
        Ok(Planned { plan, route, ports })
    }

    /// The program that Caddy is, if it is to be tried whether it reads ports from files.
    fn untried<'o>(&self, observed: &'o Observed) -> Option<&'o str> {
        match &observed.switching {
            Switching::Untried(program, _)
                if observed.caddy.is_available() && self.desired.iter().any(|s| s.http.is_some()) =>
            {
                Some(program)
            }
            _ => None,
        }
    }

    fn at<'b>(&'b self, observed: &'b Observed, persisted: &'b PersistedState) -> Situation<'b> {
        let Host { settings, root, desired, .. } = self;
        Situation { settings, root, desired, observed, persisted }
    }
}

fn load(settings: &Settings, root: &Root, now: Timestamp) -> Result<PersistedState> {
    // Its unit has it made; a pass started by hand on a fresh host has not.
    durable::folder(&root.state_dir, 0o755)?;
    let (mut persisted, exposed) = PersistedState::load(root, &settings.host, now)?;
    if exposed {
        // In the bucket, too.
        persisted.state.reported = false;
        lines::keep(root, &persisted.state)?;
    }
    Ok(persisted)
}

/// The services of this host, with the pins that a person on it made; whether a pause or a pin has ended.
fn services_for_host(
    manifest: &Manifest,
    settings: &Settings,
    persisted: &mut PersistedState,
    now: Timestamp,
) -> (Vec<Service>, bool) {
    let services: Vec<&Service> =
        manifest.services.iter().filter(|s| s.hosts.contains(&settings.host)).collect();
    let expired = persisted.overrides.expire(&services, now);
    (services.into_iter().map(|s| persisted.overrides.apply(s)).collect(), expired)
}

fn log_manifest(manifest: &Manifest, before: &State, host: &Host) {
    if before.serial != Some(manifest.serial) {
        let (change, services) = (&manifest.change, host.desired.len());
        log::info(format!(
            "manifest version {} ({}, by {}): {services} service(s) for host '{}'",
            manifest.serial, change.action, change.by, host.settings.host
        ));
    }
}

/// Clears away what an interrupted pass has left with systemd and with Nix: after a write or a removal, systemd has what
/// it had read before.
fn recover(root: &Root, persisted: &PersistedState) -> Result<()> {
    durable::sweep(&root.state_dir)?;
    let interrupted = &persisted.interrupted;
    if !interrupted.is_empty() {
        stop_rewritten(root, interrupted)?;
        systemd::daemon_reload()?;
        let both = interrupted.iter().flat_map(|n| [n.unit(), n.next_unit()]);
        systemd::reset_failed(&both.filter(|u| !root.unit_dir.join(u).exists()).collect::<Vec<_>>())?;
    }
    if let Err(e) = nix::recover() {
        log::error(e);
    }
    Ok(())
}

/// Stops those of an interrupted pass's services that would be started twice ([`systemd::stop_waiting`]), by another unit
/// than systemd has read before.
fn stop_rewritten(root: &Root, interrupted: &BTreeSet<ServiceName>) -> Result<()> {
    let ours = observe::ours(root)?;
    let units: Vec<String> =
        interrupted.iter().filter(|name| ours.contains(*name)).map(ServiceName::unit).collect();
    let shown = systemd::show(&units)?;
    let waits = |unit: &systemd::Shown| unit.needs_reload && systemd::is_between_starts(&unit.sub);
    let units = units.into_iter().filter(|unit| shown.get(unit).is_some_and(waits));
    systemd::stop_waiting(&units.collect::<Vec<_>>())
}

/// Removes writes that were cut short, where this pass changes something.
fn sweep(root: &Root, planned: &Planned, observed: &Observed, persisted: &PersistedState) -> Result<()> {
    let settled = execute::is_settled(&planned.route, &planned.ports);
    if planned.plan.is_empty() && settled && persisted.interrupted.is_empty() {
        return Ok(());
    }
    let ports = [root.ports_in_force(), root.ports_at_boot()];
    for dir in
        [&root.unit_dir, &root.applied_dir(), &root.run_dir, &root.wants_dir()].into_iter().chain(&ports)
    {
        durable::sweep(dir)?;
    }
    for (name, held) in &observed.roots {
        durable::sweep(&root.roots(name))?;
        if held.is_empty() {
            durable::remove_folder(&root.roots(name))?;
        }
    }
    Ok(())
}
