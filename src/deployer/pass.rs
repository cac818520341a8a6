//! One pass: lock, load, fetch the manifest, observe, plan, apply, report. Data flows one way; a pass that dies
//! anywhere is finished by the next, because each starts from what is.

use super::apply::{Host, would_empty};
use super::caddy::{self, RoutePlan};
use super::lock::{self, Asked};
use super::plan::{self, Learned, Memory, Observed, Options, Plan, ServicePlan};
use super::root::Root;
use super::state::{REPORT_EVERY_SEC, RouteState, RouteStatus, STATE_VERSION, ServiceState, State, Status};
use super::{applied, observe};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::durable;
use crate::error::{Error, Result};
use crate::manifest::model::MAX_BYTES;
use crate::manifest::parse::{self, Mode};
use crate::manifest::{Manifest, Service};
use crate::names::ServiceName;
use crate::say;
use crate::store::{self, Etag, Got, HOSTS_PREFIX, MANIFEST_KEY, Store, When};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How often a round of effects may be followed by another: fetch and check, deploy, put back, and one more
/// for what putting back taught.
const MAX_ROUNDS: usize = 6;

/// What a pass was asked for.
#[derive(Debug, Clone, Default)]
pub struct Asks {
    /// Started by the timer: a lock that is held is then nobody's fault.
    pub timer: bool,
    /// Rejected services to try again.
    pub retry: Vec<String>,
    /// Remove everything if the manifest says so.
    pub allow_empty: bool,
}

/// The manifest a pass works from.
struct Current {
    manifest: Manifest,
    /// Why it is the last good one rather than the bucket's.
    error: Option<String>,
}

/// Which version of which store the last good manifest is.
#[derive(Serialize, Deserialize)]
struct Origin {
    store: String,
    etag: String,
    sha256: String,
}

fn sha256(bytes: &[u8]) -> String {
    ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// The last good manifest of this store, with its version; None when there is none that can be trusted.
fn last_good(root: &Root, store: &dyn Store) -> Option<(Vec<u8>, Etag)> {
    let bytes = fs_err::read(root.manifest()).ok()?;
    let origin: Origin = serde_json::from_slice(&fs_err::read(root.manifest_origin()).ok()?).ok()?;
    // The two files are written one after the other: the hash tells whether they belong together.
    (origin.store == store.url() && origin.sha256 == sha256(&bytes)).then_some((bytes, Etag(origin.etag)))
}

/// Reads the manifest, from the bucket if it has a good one, else the last good one. `keep`: a new one is kept
/// on disk for the day the bucket cannot be reached.
fn current(root: &Root, store: &dyn Store, keep: bool) -> Result<Current> {
    let cached = last_good(root, store);
    let url = store.url();
    let error = match store.get(MANIFEST_KEY, cached.as_ref().map(|(_, etag)| etag), MAX_BYTES) {
        Ok(Got::NotModified) => None,
        Ok(Got::Found { bytes, etag }) => match parse::manifest(&bytes, Mode::Tolerant) {
            Ok(manifest) => {
                if keep {
                    let origin = Origin { store: url, etag: etag.0, sha256: sha256(&bytes) };
                    durable::write(&root.manifest(), &bytes, 0o644)?;
                    let origin = serde_json::to_vec(&origin)
                        .map_err(|e| Error::new(format!("cannot write the manifest's origin: {e}")))?;
                    durable::write(&root.manifest_origin(), &origin, 0o644)?;
                }
                return Ok(Current { manifest, error: None });
            }
            Err(e) => Some(format!(
                "the manifest in {url} cannot be used: {e}; publish a good one ('deploy-manifest rollback')"
            )),
        },
        Ok(Got::Missing) => {
            Some(format!("there is no manifest in {url}; make one with 'deploy-manifest init'"))
        }
        Err(e) => Some(e.to_string()),
    };
    let Some((bytes, _)) = cached else {
        return Err(Error::new(match error {
            Some(e) => {
                format!("{e}; there is no earlier manifest on this host to work from, nothing was changed")
            }
            None => format!("{url} says that its manifest is unchanged, but none is on this host; run again"),
        }));
    };
    let manifest = parse::manifest(&bytes, Mode::Tolerant).map_err(|e| {
        Error::new(format!("{} cannot be used: {e}; remove it and run again", root.manifest().display()))
    })?;
    Ok(Current { manifest, error })
}

fn load_memory(settings: &Settings, root: &Root, now: Timestamp) -> Result<Memory> {
    let mut readable = true;
    let mut complain = |text: String| {
        say::warning(format!("{text}; nothing is removed in this pass"));
        readable = false;
    };
    let state = match fs_err::read(root.state_file()) {
        Ok(bytes) => State::parse(&bytes).unwrap_or_else(|e| {
            complain(format!("{} cannot be used: {e}", root.state_file().display()));
            State::new(settings.host.clone(), now)
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => State::new(settings.host.clone(), now),
        Err(e) => return Err(e.into()),
    };
    let (applied, complaints) = applied::load(root)?;
    complaints.into_iter().for_each(&mut complain);
    Ok(Memory { state, applied, readable })
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
}

fn mine<'a>(manifest: &'a Manifest, settings: &Settings) -> Vec<&'a Service> {
    manifest.services.iter().filter(|s| s.hosts.contains(&settings.host)).collect()
}

fn options(settings: &Settings, asks: &Asks, desired: &[&Service]) -> Result<Options> {
    let mut retry = std::collections::BTreeSet::new();
    for name in &asks.retry {
        let Some(service) = desired.iter().find(|s| s.name.as_str() == name) else {
            let near = crate::error::did_you_mean(name, desired.iter().map(|s| s.name.as_str()));
            return Err(Error::new(format!("no service '{name}' on host '{}'{near}", settings.host)));
        };
        retry.insert(service.name.clone());
    }
    Ok(Options { retry, allow_empty: asks.allow_empty, caddy_server: settings.caddy_server.clone() })
}

/// Plans one pass without doing it.
pub fn preview(settings: &Settings, asks: &Asks) -> Result<Preview> {
    let now = Timestamp::now();
    let root = Root::system(&settings.unit_dir);
    let store = store::open(&settings.store)?;
    let memory = load_memory(settings, &root, now)?;
    let current = current(&root, store.as_ref(), false)?;
    let desired = mine(&current.manifest, settings);
    let options = options(settings, asks, &desired)?;
    let observed = observe::observe(&root, &settings.caddy_admin, &desired, &memory.applied)?;
    let plan = plan::plan(&desired, &observed, &memory, &Learned::default(), &options, now)
        .map_err(|e| would_empty(settings.host.as_str(), &e.0))?;
    Ok(Preview {
        serial: current.manifest.serial,
        generation: current.manifest.generation,
        manifest_error: current.error,
        plan,
    })
}

/// Makes one pass; returns the exit code.
pub fn run(settings: &Settings, asks: &Asks) -> Result<u8> {
    let now = Timestamp::now();
    let root = Root::system(&settings.unit_dir);
    let _lock = match lock::take(&root, now)? {
        Asked::Taken(lock) => lock,
        Asked::Held(who) => {
            let text = format!(
                "a pass is under way on this host ({who}); wait for it, or look at 'journalctl -u deployer'"
            );
            if asks.timer {
                say::info(text);
                return Ok(0);
            }
            return Err(Error::new(text));
        }
    };
    let store = store::open(&settings.store)?;
    let mut memory = load_memory(settings, &root, now)?;
    let current = current(&root, store.as_ref(), true)?;
    if let Some(error) = &current.error {
        say::warning(format!(
            "{error}; working from the last good manifest, serial {}",
            current.manifest.serial
        ));
    }
    let manifest = &current.manifest;
    let desired = mine(manifest, settings);
    let options = options(settings, asks, &desired)?;
    if memory.state.serial != Some(manifest.serial) {
        say::info(format!(
            "manifest serial {} ({}, by {}): {} service(s) for host '{}'",
            manifest.serial,
            manifest.change.action,
            manifest.change.by,
            desired.len(),
            settings.host
        ));
    }
    let mut observed = observe::observe(&root, &settings.caddy_admin, &desired, &memory.applied)?;
    let mut learned = Learned::default();
    let host = Host { settings, root: &root };
    let mut changed = false;
    let decide = |observed: &Observed, memory: &Memory, learned: &Learned| {
        plan::plan(&desired, observed, memory, learned, &options, now)
            .map_err(|e| would_empty(settings.host.as_str(), &e.0))
    };

    let abandoned: Vec<ServiceName> = plan::abandoned(&observed, &memory).into_iter().cloned().collect();
    if !abandoned.is_empty() {
        host.undo_abandoned(&abandoned, &desired, &memory, &mut observed)?;
        changed = true;
    }
    let mut plan = decide(&observed, &memory, &learned)?;
    if !plan.is_empty() {
        for dir in [&root.state_dir, &root.unit_dir, &root.applied_dir()] {
            durable::sweep(dir)?;
        }
    }
    for _ in 0..MAX_ROUNDS {
        if plan.services.iter().all(|s| s.steps.is_empty()) {
            break;
        }
        changed |= host.round(&plan, &desired, &mut observed, &mut memory, &mut learned)?;
        observed.units = observe::units(&root, &desired, &memory.applied)?;
        plan = decide(&observed, &memory, &learned)?;
    }

    // The route before what is gone: no request is led to a service that is being stopped.
    let route = match &plan.route {
        RoutePlan::None => RouteState::default(),
        RoutePlan::Current => RouteState { status: RouteStatus::Current, reason: None },
        RoutePlan::Pending(reason) => {
            say::warning(format!("route: {reason}"));
            RouteState { status: RouteStatus::Pending, reason: Some(reason.clone()) }
        }
        RoutePlan::Write(requests) => {
            changed = true;
            let mut state = RouteState::default();
            for request in requests {
                match caddy::perform(&settings.caddy_admin, request) {
                    Ok(()) => {
                        say::notice(format!("route: {}", request.what));
                        state.status = RouteStatus::Current;
                    }
                    Err(why) => {
                        say::error(format!("route: {why}; the next pass tries again"));
                        state = RouteState { status: RouteStatus::Pending, reason: Some(why) };
                        break;
                    }
                }
            }
            if plan::routed(&desired, &plan.services).is_empty() && state.status == RouteStatus::Current {
                state = RouteState::default();
            }
            state
        }
    };
    if !plan.understudies.is_empty() {
        changed = true;
        host.drain_understudies(&plan.understudies, &memory)?;
        host.remove_understudies(&plan.understudies, &mut observed)?;
    }
    if !plan.gone.is_empty() {
        changed |= host.remove(&plan.gone, &mut memory, &observed)?;
        host.unroot(&plan.gone, &mut observed)?;
    }
    if changed {
        observed.units = observe::units(&root, &desired, &memory.applied)?;
    }

    let services = plan
        .services
        .iter()
        .map(|p| (p.name.clone(), service_state(p, &observed, &memory, now)))
        .collect::<BTreeMap<_, _>>();
    let state = State {
        version: STATE_VERSION,
        host: settings.host.clone(),
        deployer: env!("CARGO_PKG_VERSION").into(),
        serial: Some(manifest.serial),
        generation: Some(manifest.generation),
        checked_at: now,
        changed_at: if changed { Some(Timestamp::now()) } else { memory.state.changed_at },
        manifest_error: current.error,
        route,
        reported: true,
        services,
    };
    tell(&memory.state, &state);
    let code = state.exit_code();
    publish(&root, store.as_ref(), &memory.state, state)?;
    Ok(code)
}

/// How a service stands after the pass, from what was seen last.
fn service_state(plan: &ServicePlan, observed: &Observed, memory: &Memory, now: Timestamp) -> ServiceState {
    let running = observed.units.get(&plan.name).is_some_and(|u| u.listed.running());
    let runs = plan.goal.as_ref().filter(|_| running).map(|g| g.path.clone());
    let status = match (&plan.target, &plan.trouble, &runs) {
        (None, None, _) => Status::Waiting,
        (_, Some(trouble), _) if trouble.rejected => Status::Rejected,
        (_, None, Some(_)) => Status::Running,
        (_, Some(_), _) | (_, None, None) => Status::Failed,
    };
    let failure = plan.trouble.as_ref().map(|t| t.failure.clone()).or_else(|| {
        (status == Status::Failed).then(|| super::state::Failure {
            reason: format!("it was up and is not any more; see 'journalctl -u {}'", plan.name),
            attempted: plan.target.clone(),
            at: now,
            journal: Vec::new(),
            inputs: None,
        })
    });
    let before = memory.state.services.get(&plan.name);
    let since = before.filter(|b| b.status == status && b.store_path == runs).map_or(now, |b| b.since);
    let previous = memory.applied.get(&plan.name).map(|a| a.previous.clone()).unwrap_or_default();
    ServiceState { name: plan.name.clone(), store_path: runs, status, since, previous, failure }
}

/// The story's last lines: what is off (once, when it begins), and what is well again.
fn tell(before: &State, after: &State) {
    for (name, service) in &after.services {
        let old = before.services.get(name);
        let same = old.is_some_and(|o| o.status == service.status && o.failure == service.failure);
        if same {
            continue;
        }
        match (&service.failure, service.status) {
            (Some(failure), status) => {
                let runs =
                    service.store_path.as_ref().map_or("nothing runs".into(), |p| format!("{p} runs on"));
                // The reason of an attempt was said when it failed.
                let reason =
                    if failure.inputs.is_some() { String::new() } else { format!(": {}", failure.reason) };
                say::error(format!("{name}: {}, {runs}{reason}", status.as_str()));
            }
            (None, Status::Running) => {
                if let Some(path) = &service.store_path {
                    say::info(format!("{name}: running {path}"));
                }
            }
            (None, status) => say::info(format!("{name}: {}", status.as_str())),
        }
    }
}

/// Writes the state and puts the report, if there is anything new in them or the last ones are old.
fn publish(root: &Root, store: &dyn Store, before: &State, mut state: State) -> Result<()> {
    let same =
        State { checked_at: before.checked_at, changed_at: before.changed_at, ..state.clone() } == *before;
    let fresh = state.checked_at.0.saturating_sub(before.checked_at.0).abs() < REPORT_EVERY_SEC;
    if same && fresh && root.state_file().exists() {
        return Ok(());
    }
    let key = format!("{HOSTS_PREFIX}{}.json", state.host);
    let mut bytes = to_bytes(&state)?;
    durable::write(&root.state_file(), &bytes, 0o644)?;
    if let Err(e) = store.put(&key, &bytes, &When::Always) {
        say::warning(format!("the report was not written: {e}; the next pass tries again"));
        state.reported = false;
        bytes = to_bytes(&state)?;
        durable::write(&root.state_file(), &bytes, 0o644)?;
    }
    Ok(())
}

fn to_bytes(state: &State) -> Result<Vec<u8>> {
    let mut bytes =
        serde_json::to_vec_pretty(state).map_err(|e| Error::new(format!("cannot write the state: {e}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}
