use super::*;
use crate::deployer::caddy::CaddyState;
use crate::deployer::observed::UnitSeen;
use crate::deployer::overrides::Overrides;
use crate::deployer::state::{FailureRecord, ServicePhase, ServiceState, State};
use crate::manifest::{Artifact, ArtifactPath, Exec, Hardening, Rollout, Systemd};
use crate::systemd::Listed;
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
    outcome: Outcome,
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
                caddy: CaddyState::Servers(
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
            outcome: Outcome::default(),
            options: Options::default(),
            broken: BTreeSet::new(),
            absent: BTreeSet::new(),
            restarts: BTreeMap::new(),
        }
    }

    fn plan(&self, desired: &[&Service]) -> Result<Plan, WouldEmpty> {
        plan(desired, &self.observed, &self.persisted, &self.outcome, &self.options, NOW)
    }

    fn act(&mut self, service: &ServicePlan) {
        let unit = self.observed.units.entry(service.name.clone()).or_default();
        let fetching = service.steps.iter().find_map(|s| if let Step::Fetch(p) = s { Some(p) } else { None });
        for step in &service.steps {
            if let Step::Root(p) = step {
                self.observed.roots.entry(service.name.clone()).or_default().insert(p.base().into());
            }
        }
        if let Some(path) = fetching {
            if self.absent.contains(path) {
                self.outcome.unfetchable.insert(path.clone(), "not in the cache".into());
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
                        let record =
                            FailureRecord::new("it exits at once".into(), Some(goal.path.clone()), NOW);
                        let inputs = goal.inputs();
                        let failure = match goal.is_verified() {
                            true => AttemptFailure::Host(record),
                            false => AttemptFailure::Rejected(FailureRecord {
                                inputs: Some(inputs.clone()),
                                ..record
                            }),
                        };
                        self.outcome.failures.insert((service.name.clone(), inputs), failure);
                    } else {
                        unit.listed = running();
                        let before = self.persisted.applied.get(&service.name);
                        let good = LastKnownGood::new(&goal.service, &goal.path, &goal.unit, before);
                        self.persisted.applied.insert(service.name.clone(), good);
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
            if plan.services.iter().chain(&plan.gone).all(|s| s.steps.is_empty()) {
                for service in &plan.services {
                    let failure = service.failure.as_ref();
                    let status = match failure {
                        Some(f) if f.is_rejected() => ServicePhase::Rejected,
                        Some(_) => ServicePhase::Failed,
                        None => ServicePhase::Running,
                    };
                    let state = ServiceState {
                        store_path: service.goal.as_ref().map(|g| g.path.clone()),
                        failure: failure.map(|f| f.record().clone()),
                        drop_ins: service.drop_ins.clone(),
                        ..ServiceState::new(service.name.clone(), status, NOW)
                    };
                    self.persisted.state.services.insert(service.name.clone(), state);
                }
                self.outcome = Outcome::default();
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
    assert!(plan.services[0].failure.as_ref().unwrap().is_rejected());
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
        plan.services.iter().map(|s| s.failure.as_ref().unwrap().is_rejected()).collect();
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
    assert!(requests[0].body.as_ref().unwrap().to_string().contains("ava.example.com"), "its 502 is its own");
}

#[test]
fn what_cannot_be_fetched_leaves_the_running_version_alone_and_is_tried_every_pass() {
    let mut world = World::new();
    world.pass(&[&entry("ava", 1)]);
    world.absent.insert(path(2));
    let next = entry("ava", 2);
    let plan = world.pass(&[&next]);
    assert!(!plan.services[0].failure.as_ref().unwrap().is_rejected());
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
    assert!(plan.services[0].failure.is_none() && plan.services[0].drop_ins.len() == 1);
    let next = entry("ava", 2);
    world.pass(&[&next]);
    assert!(world.runs("ava", 2));
    // Another program, which nobody has started yet: it runs, and is not restarted.
    unit(&mut world, true, 2);
    let plan = world.plan(&[&next]).unwrap();
    assert!(plan.services[0].failure.is_none() && plan.services[0].steps.is_empty(), "{:?}", plan.services);
    // It runs: what was proved stays so, and what runs is kept.
    unit(&mut world, true, 9);
    let latest = entry("ava", 3);
    let plan = world.plan(&[&latest]).unwrap();
    let ServicePlan { goal, failure, instead, steps, .. } = &plan.services[0];
    assert_eq!((steps.as_slice(), instead), (&[Step::Root(path(9))][..], &Some(Some(path(9)))));
    assert_eq!(goal.as_ref().map(|g| &g.path), Some(&path(2)), "its route stays");
    assert!(!failure.as_ref().unwrap().is_rejected());
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
    assert!(service.remark.as_ref().is_some_and(|r| r.contains("ava-next.service")), "{:?}", service.remark);
}

#[test]
fn a_service_that_died_is_started_but_never_rejected() {
    let mut world = World::new();
    let ava = entry("ava", 1);
    world.pass(&[&ava]);
    world.broken.insert(path(1));
    world.observed.units.get_mut(&name("ava")).unwrap().listed = Listed::default();
    let plan = world.pass(&[&ava]);
    assert!(!plan.services[0].failure.as_ref().unwrap().is_rejected());
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
    assert!(plan.services[0].failure.as_ref().unwrap().record().reason.contains("chmod"));
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
    assert!(plan.services[0].failure.as_ref().unwrap().record().reason.contains("not ours"));
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
    assert!(plan.services[0].steps.is_empty() && plan.services[0].failure.is_none());
    assert_eq!(plan.route, RoutePlan::None);
}
