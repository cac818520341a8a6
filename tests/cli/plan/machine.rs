//! The machine that a plan is performed on: a model of systemd's, Nix's and Caddy's parts in it, on which effects happen
//! one by one so that a pass can die between any two.

use omni_deploy::clock::Timestamp;
use omni_deploy::deployer::applied::LastKnownGood;
use omni_deploy::deployer::caddy::{self, CaddyState, RoutePlan};
use omni_deploy::deployer::observed::{Observed, Switching, UnitFile, UnitSeen};
use omni_deploy::deployer::outcome::{AttemptFailure, Outcome};
use omni_deploy::deployer::overrides::Overrides;
use omni_deploy::deployer::persisted::PersistedState;
use omni_deploy::deployer::plan::{self, Goal, Options, Plan, ServicePlan, Step, WouldEmpty};
use omni_deploy::deployer::state::{FailureRecord, ServicePhase, ServiceState, State};
use omni_deploy::manifest::Service;
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::names::{HostName, ServiceName, StorePath};
use omni_deploy::systemd::Listed;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

pub const NAMES: [&str; 4] = ["ava", "biz", "cat", "dog"];
pub const VERSIONS: u8 = 9;

pub fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

pub fn path(version: u8) -> StorePath {
    StorePath::parse(&format!("/nix/store/{}-v{version}", version.to_string().repeat(32))).unwrap()
}

/// Versions 7 and up never come up.
pub fn bad(path: &StorePath) -> bool {
    (7..=VERSIONS).any(|v| self::path(v) == *path)
}

pub fn entry(text: &str, version: u8) -> Service {
    entry_with(text, version, json!({}))
}

/// The same with more fields, or others.
pub fn entry_with(text: &str, version: u8, fields: Value) -> Service {
    let port = 8000 + NAMES.iter().position(|n| *n == text).unwrap_or(NAMES.len());
    let mut value = json!({
        "name": text,
        "hosts": ["biz"],
        "artifact": {"storePath": path(version)},
        "http": {"domain": format!("{text}.example.com"), "internalPort": port},
    });
    value.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    parse::service(value, Mode::Tolerant, None).unwrap()
}

/// The version that a unit starts.
pub fn program(text: &str) -> Option<StorePath> {
    (1..=VERSIONS).map(path).find(|p| text.contains(p.base()))
}

#[derive(Debug, Clone, PartialEq)]
pub enum File {
    Ours(String),
    Theirs,
    /// A link to /dev/null.
    Mask,
}

/// What somebody put beside a unit's file.
#[derive(Debug, Clone, PartialEq)]
pub enum DropIn {
    /// It has another program started.
    Starts(StorePath),
    /// It changes anything else.
    Other,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Process {
    /// The unit it was started from.
    pub text: String,
    /// And the drop-in.
    pub with: Option<DropIn>,
    pub path: StorePath,
    pub started: u64,
}

#[derive(Debug, Clone, Default)]
pub struct Unit {
    pub file: Option<File>,
    pub written: u64,
    /// What systemd has read.
    pub loaded: Option<File>,
    pub drop_in: Option<DropIn>,
    pub loaded_drop_in: Option<DropIn>,
    pub had_drop_in: bool,
    pub wanted: bool,
    pub process: Option<Process>,
}

/// The pass died here.
#[derive(Debug)]
pub struct Died;

pub type Done = Result<(), Died>;

/// What the deployer keeps on its disk.
#[derive(Debug, Clone)]
pub struct Disk {
    pub services: BTreeMap<ServiceName, ServiceState>,
    pub applied: BTreeMap<ServiceName, LastKnownGood>,
    pub intent: Option<BTreeSet<ServiceName>>,
    pub overrides: Overrides,
    pub manifest: Option<Vec<Service>>,
}

#[derive(Debug, Clone)]
pub struct Machine {
    pub units: BTreeMap<ServiceName, Unit>,
    pub store: BTreeSet<StorePath>,
    pub roots: BTreeMap<ServiceName, BTreeSet<String>>,
    pub servers: Map<String, Value>,
    pub caddy_up: bool,
    pub disk: Disk,
    /// The unit folder is lost with every boot.
    pub volatile: bool,
    pub clock: u64,
    // The world around.
    pub manifest: Vec<Service>,
    pub bucket_up: bool,
    pub cache: BTreeSet<StorePath>,
    pub secrets: BTreeMap<ServiceName, Result<String, String>>,
    /// Units of others that run.
    pub others: BTreeSet<String>,
    /// Versions that do not come up for now, through no fault of theirs.
    pub ill: BTreeSet<StorePath>,
    // The ledger.
    /// How many effects are left until the pass dies.
    pub fuse: Option<usize>,
    pub restarts: BTreeMap<ServiceName, usize>,
    /// What was refused: the attempt, as the model knows it.
    pub refused: BTreeMap<ServiceName, String>,
}

impl Machine {
    pub fn new(volatile: bool) -> Self {
        let servers = json!({"srv0": {"listen": [":443"], "routes": [{"handle": []}]}});
        Machine {
            units: BTreeMap::new(),
            store: BTreeSet::new(),
            roots: BTreeMap::new(),
            servers: servers.as_object().unwrap().clone(),
            caddy_up: true,
            disk: Disk {
                services: BTreeMap::new(),
                applied: BTreeMap::new(),
                intent: None,
                overrides: Overrides::default(),
                manifest: None,
            },
            volatile,
            clock: 1_000_000,
            manifest: Vec::new(),
            bucket_up: true,
            cache: (1..=VERSIONS).map(path).collect(),
            secrets: BTreeMap::new(),
            others: BTreeSet::new(),
            ill: BTreeSet::new(),
            fuse: None,
            restarts: BTreeMap::new(),
            refused: BTreeMap::new(),
        }
    }

    pub fn now(&self) -> Timestamp {
        Timestamp(self.clock as i64)
    }

    /// One effect is about to happen: time passes, and the pass may die before it.
    fn effect(&mut self) -> Done {
        self.clock += 1;
        match &mut self.fuse {
            Some(0) => Err(Died),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    // --- systemd ---

    pub fn reload(&mut self) {
        for unit in self.units.values_mut() {
            unit.loaded = unit.file.clone();
            unit.loaded_drop_in = unit.drop_in.clone();
        }
    }

    pub fn start(&mut self, name: &ServiceName) {
        self.clock += 1;
        let clock = self.clock;
        let (ill, store) = (&self.ill, &self.store);
        let Some(unit) = self.units.get_mut(name) else { return };
        // A unit that systemd does not have cannot be restarted: what ran goes on.
        let Some(File::Ours(text)) = unit.loaded.clone() else { return };
        let with = unit.loaded_drop_in.clone();
        let path = match &with {
            Some(DropIn::Starts(path)) => Some(path.clone()),
            _ => program(&text),
        };
        let secrets_missing = text.contains("EnvironmentFile") && !self.secrets.contains_key(name);
        unit.process = path
            .filter(|p| !bad(p) && !ill.contains(p) && store.contains(p) && !secrets_missing)
            .map(|path| Process { text: text.clone(), with, path, started: clock });
        if text.contains("Requires=db.service") {
            self.others.insert("db.service".into());
        }
        *self.restarts.entry(name.clone()).or_default() += 1;
    }

    pub fn write_file(&mut self, name: &ServiceName, file: Option<File>) {
        self.clock += 1;
        let clock = self.clock;
        let unit = self.units.entry(name.clone()).or_default();
        unit.file = file;
        unit.written = clock;
    }

    pub fn reboot(&mut self) {
        self.clock += 10;
        for unit in self.units.values_mut() {
            unit.process = None;
            if self.volatile {
                unit.file = None;
                unit.wanted = false;
            }
        }
        self.reload();
        let names: Vec<ServiceName> =
            self.units.iter().filter(|(_, u)| u.wanted).map(|(n, _)| n.clone()).collect();
        for name in names {
            self.start(&name);
        }
        self.restarts.clear();
    }

    // --- the pass ---

    pub fn desired(&self, manifest: &[Service], overrides: &Overrides) -> Vec<Service> {
        manifest.iter().map(|s| overrides.apply(s)).collect()
    }

    fn units_seen(
        &self,
        desired: &[&Service],
        persisted: &PersistedState,
    ) -> BTreeMap<ServiceName, UnitSeen> {
        let applied = &persisted.applied;
        let named = desired.iter().map(|s| &s.name).chain(applied.keys());
        let ours = self.units.iter().filter(|(_, u)| matches!(u.file, Some(File::Ours(_)))).map(|(n, _)| n);
        let none = Unit::default();
        named
            .chain(ours)
            .map(|name| {
                let unit = self.units.get(name).unwrap_or(&none);
                let file = match &unit.file {
                    None => UnitFile::Absent,
                    Some(File::Ours(text)) => UnitFile::Ours(text.clone()),
                    Some(File::Mask) if applied.contains_key(name) => UnitFile::Absent,
                    Some(File::Mask | File::Theirs) => UnitFile::Foreign("/there".into()),
                };
                let load = match unit.loaded {
                    Some(File::Mask) => "masked",
                    None => "not-found",
                    Some(_) => "loaded",
                };
                let (active, sub) =
                    if unit.process.is_some() { ("active", "running") } else { ("inactive", "dead") };
                let listed = Listed { load: load.into(), active: active.into(), sub: sub.into() };
                let current = unit.process.as_ref().is_some_and(|p| unit.written <= p.started);
                let running = unit.process.is_some();
                let older = running && !current;
                let theirs = matches!(file, UnitFile::Foreign(_));
                let drop_in = unit.drop_in.as_ref().filter(|_| !theirs);
                let ours = if let UnitFile::Ours(text) = &file { Some(text.clone()) } else { None };
                let invocation = unit.process.as_ref().map(|p| p.started.to_string());
                let verified = ours.is_some()
                    && invocation.is_some()
                    && invocation.as_ref() == persisted.verified.get(name);
                // Only then is a unit looked at closely.
                let suspect = ours.is_some() && (older || running && !verified || drop_in.is_some());
                let stale = unit.loaded != unit.file || unit.loaded_drop_in != unit.drop_in;
                let replaced = match &unit.loaded_drop_in {
                    Some(DropIn::Starts(other))
                        if suspect && load == "loaded" && (!stale || drop_in.is_some()) =>
                    {
                        ours.as_ref().is_some_and(|text| program(text).as_ref() != Some(other))
                    }
                    _ => false,
                };
                let astray = match (&unit.process, &ours) {
                    (Some(p), Some(text)) => suspect && !replaced && !text.contains(p.path.base()),
                    _ => false,
                };
                let unread = running && (load != "loaded" || suspect && stale) || replaced && stale;
                let seen = UnitSeen {
                    file,
                    enabled: unit.wanted,
                    listed,
                    current,
                    wrong_closure: astray,
                    needs_reload: unread,
                    drop_ins: drop_in.map(|_| "/drop/in.conf".into()).into_iter().collect(),
                    replaced: replaced.then(|| "it starts something else".into()),
                    shows: unit.process.as_ref().filter(|_| suspect).map(|p| p.path.clone()),
                    invocation,
                    verified,
                    clean: suspect && running && !unread && !astray && !replaced && drop_in.is_none(),
                    ..UnitSeen::default()
                };
                (name.clone(), seen)
            })
            .collect()
    }

    fn observe(&self, desired: &[&Service], persisted: &PersistedState) -> Observed {
        let applied = &persisted.applied;
        let asked = desired
            .iter()
            .filter_map(|s| s.artifact.store_path.path())
            .chain(applied.values().flat_map(LastKnownGood::paths));
        Observed {
            units: self.units_seen(desired, persisted),
            present: asked.filter(|p| self.store.contains(p)).cloned().collect(),
            roots: self.roots.clone(),
            secrets: desired
                .iter()
                .filter(|s| s.env_file.is_some())
                .map(|s| {
                    (s.name.clone(), self.secrets.get(&s.name).cloned().unwrap_or(Err("missing".into())))
                })
                .collect(),
            active: self.active(),
            ports: BTreeMap::new(),
            kept_out: BTreeSet::new(),
            candidates: BTreeSet::new(),
            foreign_next: BTreeMap::new(),
            caddy: self.caddy(),
            switching: Switching::Configuration,
        }
    }

    fn active(&self) -> BTreeSet<String> {
        let ours = self.units.iter().filter(|(_, u)| u.process.is_some()).map(|(n, _)| n.unit());
        ours.chain(self.others.iter().cloned()).collect()
    }

    fn persisted(&self) -> PersistedState {
        let verified = self.disk.services.iter();
        PersistedState {
            state: State { services: self.disk.services.clone(), ..State::new(host(), self.now()) },
            applied: self.disk.applied.clone(),
            readable: true,
            interrupted: self.disk.intent.clone().unwrap_or_default(),
            overrides: self.disk.overrides.clone(),
            verified: verified.filter_map(|(n, s)| Some((n.clone(), s.invocation.clone()?))).collect(),
            trial: None,
        }
    }

    /// What a pass would do first for these services, where `also` is so as well.
    pub fn plan(
        &self,
        services: &[&Service],
        options: &Options,
        also: impl FnOnce(&mut Observed, &mut PersistedState),
    ) -> Result<Plan, WouldEmpty> {
        let mut persisted = self.persisted();
        let mut observed = self.observe(services, &persisted);
        also(&mut observed, &mut persisted);
        let options = Options { active: observed.active.clone(), ..options.clone() };
        plan::plan(services, &observed, &persisted, &Outcome::default(), &options, self.now())
    }

    fn caddy(&self) -> CaddyState {
        match self.caddy_up {
            true => CaddyState::Servers(self.servers.clone()),
            false => CaddyState::Unavailable("down".into()),
        }
    }

    /// What it takes for Caddy to have a plan's routes.
    pub fn route_changes(&self, plan: &Plan) -> RoutePlan {
        caddy::plan(None, caddy::route(&plan.routes, None).as_ref(), &self.caddy())
    }

    /// One pass; `Ok(None)` when it refuses to empty the host or has no manifest.
    pub fn pass(&mut self, options: &Options) -> Result<Option<Plan>, Died> {
        let now = self.now();
        let mut persisted = self.persisted();
        if self.bucket_up {
            self.effect()?;
            self.disk.manifest = Some(self.manifest.clone());
        }
        let Some(manifest) = self.disk.manifest.clone() else { return Ok(None) };
        if persisted.overrides.expire(&manifest.iter().collect::<Vec<_>>(), now) {
            self.effect()?;
            self.disk.overrides = persisted.overrides.clone();
        }
        let entries = self.desired(&manifest, &persisted.overrides);
        let desired: Vec<&Service> = entries.iter().collect();
        let mut observed = self.observe(&desired, &persisted);
        let options = Options { active: observed.active.clone(), ..options.clone() };
        let mut outcome = Outcome::default();
        let Ok(mut plan) = plan::plan(&desired, &observed, &persisted, &outcome, &options, now) else {
            return Ok(None);
        };
        for _ in 0..6 {
            if plan.is_settled() {
                break;
            }
            self.round(&plan, &observed, &persisted, &mut outcome)?;
            if persisted.absorb(&outcome) {
                self.effect()?;
                self.disk.services = persisted.state.services.clone();
            }
            observed = self.observe(&desired, &persisted);
            plan = plan::plan(&desired, &observed, &persisted, &outcome, &options, now)
                .unwrap_or_else(|e| panic!("would empty the host in the middle: {e:?}"));
        }
        if let RoutePlan::Write(requests) = self.route_changes(&plan) {
            for request in &requests {
                self.effect()?;
                self.caddy_takes(request);
            }
        }
        self.remove(&plan.gone, &observed, &persisted, &mut outcome)?;
        self.unroot(&plan.gone)?;
        persisted.absorb(&outcome);
        observed = self.observe(&desired, &persisted);
        plan::settle_inputs(&mut plan, &desired, &observed, &outcome);
        self.effect()?;
        self.disk.services = plan.services.iter().map(|p| (p.name.clone(), state_of(p, &observed))).collect();
        self.effect()?;
        self.disk.intent = None;
        Ok(Some(plan))
    }

    fn round(
        &mut self,
        plan: &Plan,
        observed: &Observed,
        persisted: &PersistedState,
        outcome: &mut Outcome,
    ) -> Done {
        let touched: BTreeSet<ServiceName> = plan
            .services
            .iter()
            .filter(|s| s.steps.iter().any(Step::touches))
            .map(|s| s.name.clone())
            .chain(persisted.interrupted.iter().cloned())
            .collect();
        if !touched.is_empty() {
            self.effect()?;
            self.disk.intent = Some(touched);
        }
        for service in &plan.services {
            for step in &service.steps {
                if let Step::Root(path) = step {
                    self.effect()?;
                    self.roots.entry(service.name.clone()).or_default().insert(path.base().into());
                }
            }
        }
        let mut stop = false;
        for service in &plan.services {
            for step in &service.steps {
                let Step::Fetch(path) = step else { continue };
                self.effect()?;
                if self.bucket_up && self.cache.contains(path) {
                    self.store.insert(path.clone());
                } else {
                    outcome.unfetchable.insert(path.clone(), "not in the cache".into());
                    stop = true;
                }
            }
        }
        if stop {
            return Ok(());
        }
        for service in plan.services.iter().filter(|s| s.steps.contains(&Step::Pause)) {
            self.effect()?;
            self.units.entry(service.name.clone()).or_default().wanted = false;
            self.effect()?;
            self.units.entry(service.name.clone()).or_default().process = None;
        }
        self.remove(&plan.services, observed, persisted, outcome)?;
        self.write_and_start(plan, persisted, outcome)?;
        for service in &plan.services {
            if let (true, Some(goal)) = (service.steps.contains(&Step::Record), &service.goal) {
                self.came_up(&service.name, goal, persisted, outcome)?;
            }
        }
        self.unroot(&plan.services)
    }

    fn write_and_start(&mut self, plan: &Plan, persisted: &PersistedState, outcome: &mut Outcome) -> Done {
        let mut starts: Vec<(&ServicePlan, &Goal, bool)> = Vec::new();
        let mut reload = !persisted.interrupted.is_empty();
        for service in &plan.services {
            reload |= service.steps.contains(&Step::Reload);
            let Some(goal) = &service.goal else { continue };
            for step in &service.steps {
                match step {
                    Step::Write(_) => {
                        self.effect()?;
                        self.write_file(&service.name, Some(File::Ours(goal.unit.clone())));
                        reload = true;
                    }
                    Step::Enable => {
                        self.effect()?;
                        self.units.entry(service.name.clone()).or_default().wanted = true;
                    }
                    Step::Restart(_) => {
                        starts.push((service, goal, true));
                        reload = true;
                    }
                    Step::Prove(_) => starts.push((service, goal, false)),
                    _ => {}
                }
            }
        }
        if reload {
            self.effect()?;
            self.reload();
        }
        let replaced = |m: &Machine, service: &ServicePlan, goal: &Goal| match m.units.get(&service.name) {
            Some(Unit { loaded_drop_in: Some(DropIn::Starts(other)), .. }) => *other != goal.path,
            _ => false,
        };
        let (left, starts): (Vec<_>, Vec<_>) =
            starts.into_iter().partition(|(service, goal, _)| replaced(self, service, goal));
        for (service, goal, _) in left {
            let record = self.failed(goal, "it starts something else");
            let key = (service.name.clone(), goal.inputs());
            outcome.failures.insert(key, AttemptFailure::Host(record));
        }
        for (service, _, restart) in &starts {
            if *restart {
                self.effect()?;
                self.start(&service.name);
            }
        }
        for (service, goal, restart) in starts {
            self.effect()?;
            if restart {
                outcome.restarted.insert(service.name.clone());
            }
            let unit = &self.units[&service.name];
            if let Some(process) = &unit.process {
                let invocation = unit.loaded_drop_in.is_none().then(|| process.started.to_string());
                outcome.invocations.insert(service.name.clone(), invocation);
                self.came_up(&service.name, goal, persisted, outcome)?;
                continue;
            }
            let (record, inputs) = (self.failed(goal, "it exits at once"), goal.inputs());
            let failure = match goal.is_verified() {
                true => AttemptFailure::Host(record),
                false => {
                    let attempt = self.attempt(&goal.service);
                    self.refused.insert(service.name.clone(), attempt);
                    AttemptFailure::Rejected(FailureRecord { inputs: Some(inputs.clone()), ..record })
                }
            };
            outcome.failures.insert((service.name.clone(), inputs), failure);
        }
        Ok(())
    }

    fn failed(&self, goal: &Goal, reason: &str) -> FailureRecord {
        FailureRecord::new(reason.into(), Some(goal.path.clone()), self.now())
    }

    fn came_up(
        &mut self,
        name: &ServiceName,
        goal: &Goal,
        persisted: &PersistedState,
        outcome: &mut Outcome,
    ) -> Done {
        let before = persisted.applied.get(name);
        let good = LastKnownGood::new(&goal.service, &goal.path, &goal.unit, before);
        if before != Some(&good) {
            self.effect()?;
            self.disk.applied.insert(name.clone(), good.clone());
            outcome.records.insert(name.clone(), Some(good));
        }
        Ok(())
    }

    fn remove(
        &mut self,
        services: &[ServicePlan],
        observed: &Observed,
        persisted: &PersistedState,
        outcome: &mut Outcome,
    ) -> Done {
        let going = |s: &&ServicePlan| s.steps.iter().any(|s| matches!(s, Step::Remove(_)));
        for service in services.iter().filter(going) {
            let name = &service.name;
            let ours = match observed.units.get(name).map(|u| &u.file) {
                Some(UnitFile::Ours(_)) => true,
                Some(UnitFile::Absent) => persisted.applied.contains_key(name),
                _ => false,
            };
            if ours {
                self.effect()?;
                self.units.entry(name.clone()).or_default().process = None;
                self.effect()?;
                self.units.entry(name.clone()).or_default().wanted = false;
                self.effect()?;
                self.write_file(name, None);
                self.effect()?;
                self.reload();
            }
            self.effect()?;
            self.disk.applied.remove(name);
            outcome.records.insert(name.clone(), None);
        }
        Ok(())
    }

    fn unroot(&mut self, services: &[ServicePlan]) -> Done {
        for service in services {
            for step in &service.steps {
                if let Step::Unroot(base) = step {
                    self.effect()?;
                    let held = self.roots.get_mut(&service.name).expect("only what is held is let go");
                    assert!(held.remove(base), "{base} of {} was not held", service.name);
                }
            }
        }
        self.roots.retain(|_, held| !held.is_empty());
        Ok(())
    }

    fn caddy_takes(&mut self, request: &caddy::AdminRequest) {
        let parts: Vec<&str> = request.path.split('/').skip(1).collect();
        let body = request.body.clone();
        match (request.method, &parts[..]) {
            ("DELETE", [.., "servers", server]) => {
                self.servers.remove(*server);
            }
            ("PUT", [.., "servers", server]) => {
                self.servers.insert((*server).into(), body.unwrap());
            }
            ("PUT" | "PATCH", [.., "servers", server, "routes"]) => {
                self.servers[*server]["routes"] = body.unwrap();
            }
            ("PUT", [.., "servers", server, "routes", "0"]) => {
                self.servers[*server]["routes"].as_array_mut().unwrap().insert(0, body.unwrap());
            }
            ("PATCH", ["id", "deployer"]) => {
                let all = self.servers.values_mut().flat_map(|s| s["routes"].as_array_mut().unwrap());
                *all.into_iter().find(|r| r["@id"] == "deployer").unwrap() = body.unwrap();
            }
            other => panic!("no such request in the model: {other:?}"),
        }
    }

    /// Everything that goes into an attempt.
    pub fn attempt(&self, service: &Service) -> String {
        let secrets = service.env_file.as_ref().map(|_| self.secrets.get(&service.name));
        let required: Vec<bool> =
            service.systemd.requires.iter().map(|unit| self.others.contains(unit.as_str())).collect();
        format!("{} {secrets:?} {required:?}", serde_json::to_string(service).unwrap())
    }
}

fn host() -> HostName {
    HostName::parse("biz").unwrap()
}

fn blank(name: &ServiceName, status: ServicePhase) -> ServiceState {
    ServiceState::new(name.clone(), status, Timestamp(0))
}

fn state_of(plan: &ServicePlan, observed: &Observed) -> ServiceState {
    let seen = &observed.units[&plan.name];
    let runs = seen.listed.running();
    let status = match &plan.failure {
        _ if plan.paused => ServicePhase::Stopped,
        Some(f) if f.is_rejected() => ServicePhase::Rejected,
        Some(_) => ServicePhase::Failed,
        None if plan.target.is_none() => ServicePhase::Waiting,
        None if runs => ServicePhase::Running,
        None => ServicePhase::Failed,
    };
    let failure = plan.failure.as_ref().map(|f| f.record().clone());
    let known = runs && (seen.verified || seen.clean && plan.drop_ins.is_empty());
    let invocation = seen.invocation.clone().filter(|_| known);
    ServiceState { failure, invocation, drop_ins: plan.drop_ins.clone(), ..blank(&plan.name, status) }
}
