use crate::machine::{DropIn, File, Machine, entry, entry_with, name, path};
use omni_deploy::deployer::caddy::RoutePlan;
use omni_deploy::deployer::plan::{Options, Plan, ServicePlan, Step, WouldEmpty};
use omni_deploy::deployer::unit;
use omni_deploy::manifest::{ArtifactPath, Service};
use serde_json::{Value, json};

fn waiting(text: &str) -> Service {
    let mut service = entry(text, 1);
    service.artifact.store_path = ArtifactPath::Placeholder;
    service
}

fn overlapping(version: u8, fields: Value) -> Service {
    let mut all = json!({"rollout": "overlap", "env": {"PORT": "8000"}});
    all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    entry_with("ava", version, all)
}

/// Publishes these services and makes a pass.
fn deploy(m: &mut Machine, services: &[&Service]) -> Plan {
    deploy_with(m, services, &Options::default())
}

fn deploy_with(m: &mut Machine, services: &[&Service], options: &Options) -> Plan {
    m.manifest = services.iter().map(|s| (*s).clone()).collect();
    m.pass(options).unwrap().unwrap()
}

fn retry(text: &str) -> Options {
    Options { retry: [name(text)].into(), ..Options::default() }
}

/// What a pass for these would do.
fn plan(m: &Machine, services: &[&Service]) -> Result<Plan, WouldEmpty> {
    m.plan(services, &Options::default(), |_, _| {})
}

fn is_rejected(plan: &ServicePlan) -> bool {
    plan.failure.as_ref().unwrap().is_rejected()
}

impl Machine {
    fn runs(&self, service: &str, version: u8) -> bool {
        let text = path(version).to_string();
        self.units.get(&name(service)).is_some_and(|unit| {
            matches!(&unit.file, Some(File::Ours(file)) if file.contains(&text))
                && unit.process.as_ref().is_some_and(|process| process.path == path(version))
        })
    }

    fn held(&self, service: &str) -> Vec<String> {
        self.roots.get(&name(service)).into_iter().flatten().cloned().collect()
    }
}

#[test]
fn nothing_overlaps_with_a_version_whose_state_it_would_take() {
    for (state, user, dynamic, overlaps) in [
        (None, "root", false, true),
        (None, "www-data", true, true),
        (Some("ava"), "root", false, true),
        (Some("ava"), "www-data", false, false),
        (Some("ava"), "root", true, false),
    ] {
        let mut m = Machine::new(false);
        deploy(&mut m, &[&overlapping(1, json!({}))]);
        let new = json!({"systemd": {"stateDirectory": state}, "exec": {"user": user}});
        let mut new = overlapping(2, new);
        new.hardening.dynamic_user = Some(dynamic);
        let plan = plan(&m, &[&new]).unwrap();
        let steps = &plan.services[0].steps;
        assert!(steps.contains(&Step::Restart("another version")), "{steps:?}");
        let overlapped = steps.contains(&Step::Overlap("another version"));
        assert_eq!(overlapped, overlaps, "{state:?} {user} {dynamic}: {steps:?}");
    }
}

#[test]
fn a_first_deploy_roots_before_it_fetches_and_then_has_nothing_to_do() {
    let mut m = Machine::new(false);
    let ava = entry("ava", 1);
    let first = plan(&m, &[&ava]).unwrap();
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
    assert!(matches!(m.route_changes(&first), RoutePlan::Write(_)));
    deploy(&mut m, &[&ava]);
    assert!(m.runs("ava", 1));
    deploy(&mut m, &[&ava]);
    assert_eq!(m.restarts[&name("ava")], 1);
}

#[test]
fn a_broken_version_is_put_back_once_and_not_tried_again_until_asked() {
    let mut m = Machine::new(false);
    deploy(&mut m, &[&entry("ava", 1)]);
    m.ill.insert(path(2));
    let next = entry("ava", 2);
    let plan = deploy(&mut m, &[&next]);
    assert!(m.runs("ava", 1));
    assert!(is_rejected(&plan.services[0]));
    assert_eq!(m.restarts[&name("ava")], 3, "the attempt and the way back");
    deploy(&mut m, &[&next]);
    assert_eq!(m.restarts[&name("ava")], 3, "remembered");
    m.ill.clear();
    deploy_with(&mut m, &[&next], &retry("ava"));
    assert!(m.runs("ava", 2));
}

#[test]
fn a_refused_version_is_tried_again_when_anything_that_goes_into_it_changes() {
    let mut m = Machine::new(false);
    m.secrets.insert(name("ava"), Ok("1".into()));
    m.ill.insert(path(2));
    let mut next = entry_with("ava", 2, json!({"envFile": "/s"}));
    deploy(&mut m, &[&next]);
    let tries = m.restarts[&name("ava")];
    deploy(&mut m, &[&next]);
    assert_eq!(m.restarts[&name("ava")], tries);
    m.secrets.insert(name("ava"), Ok("2".into()));
    deploy(&mut m, &[&next]);
    assert_eq!(m.restarts[&name("ava")], tries + 1);
    next = entry_with("ava", 2, json!({"envFile": "/s", "env": {"A": "1"}}));
    deploy(&mut m, &[&next]);
    assert_eq!(m.restarts[&name("ava")], tries + 2);
    next.http =
        entry_with("ava", 2, json!({"http": {"domain": "ava.example.com", "internalPort": 8081}})).http;
    deploy(&mut m, &[&next]);
    assert_eq!(m.restarts[&name("ava")], tries + 3);
}

#[test]
fn a_refusal_outlives_anothers_failure_to_fetch_the_same_closure() {
    let mut m = Machine::new(false);
    let both = [&entry("a", 2), &entry("b", 2)];
    m.ill.insert(path(2));
    deploy(&mut m, &both);
    m.cache.remove(&path(2));
    m.store.remove(&path(2));
    let plan = deploy_with(&mut m, &both, &retry("a"));
    let rejected: Vec<bool> = plan.services.iter().map(is_rejected).collect();
    assert_eq!(rejected, [false, true]);
}

#[test]
fn a_first_version_that_is_refused_leaves_no_unit_behind() {
    let mut m = Machine::new(false);
    m.ill.insert(path(1));
    let plan = deploy(&mut m, &[&entry("ava", 1)]);
    assert!(plan.services[0].goal.is_none());
    assert_eq!(m.units[&name("ava")].file, None);
    assert!(m.held("ava").is_empty());
    assert_eq!(plan.routes[0].domain.as_str(), "ava.example.com", "its 502 is its own");
}

#[test]
fn what_cannot_be_fetched_leaves_the_running_version_alone_and_is_tried_every_pass() {
    let mut m = Machine::new(false);
    deploy(&mut m, &[&entry("ava", 1)]);
    m.cache.remove(&path(2));
    let next = entry("ava", 2);
    assert!(!is_rejected(&deploy(&mut m, &[&next]).services[0]));
    assert!(m.runs("ava", 1));
    assert_eq!(m.restarts[&name("ava")], 1);
    let again = plan(&m, &[&next]).unwrap();
    assert!(again.services[0].steps.contains(&Step::Fetch(path(2))));
    m.cache.insert(path(2));
    deploy(&mut m, &[&next]);
    assert!(m.runs("ava", 2));
}

#[test]
fn the_current_and_two_earlier_closures_are_held_and_no_more() {
    let mut m = Machine::new(false);
    for version in 1..=5 {
        deploy(&mut m, &[&entry("ava", version)]);
    }
    let held: Vec<String> = [3, 4, 5].iter().map(|v| path(*v).base().to_string()).collect();
    assert_eq!(m.held("ava"), held);
    deploy(&mut m, &[&entry("ava", 4)]);
    assert_eq!(m.held("ava"), held, "going back needs no other closure");
}

#[test]
fn every_drift_is_repaired_with_a_reason() {
    type Damage = fn(&mut Machine);
    let damages: [(&str, Damage); 6] = [
        ("the unit was changed on the host", |m| {
            m.write_file(&name("ava"), Some(File::Ours(unit::MARK.into())));
        }),
        ("the unit was gone", |m| m.write_file(&name("ava"), None)),
        ("it was not running", |m| m.units.get_mut(&name("ava")).unwrap().process = None),
        ("Enable", |m| m.units.get_mut(&name("ava")).unwrap().wanted = false),
        ("Root", |m| m.roots.clear()),
        ("Fetch", |m| m.store.clear()),
    ];
    for (reason, damage) in damages {
        let mut m = Machine::new(false);
        let ava = entry("ava", 1);
        deploy(&mut m, &[&ava]);
        damage(&mut m);
        let steps = plan(&m, &[&ava]).unwrap().services[0].steps.clone();
        assert!(format!("{steps:?}").contains(reason), "{reason}: {steps:?}");
        deploy(&mut m, &[&ava]);
        assert!(m.runs("ava", 1) && m.units[&name("ava")].wanted && !m.held("ava").is_empty());
    }
}

#[test]
fn a_drop_in_is_named_and_nothing_is_started_that_it_replaces() {
    let mut m = Machine::new(false);
    let ava = entry("ava", 1);
    deploy(&mut m, &[&ava]);
    let drop_in = |m: &mut Machine, drop_in: Option<DropIn>| {
        m.units.get_mut(&name("ava")).unwrap().drop_in = drop_in;
        m.reload();
    };
    // Beside the program: deploys go on.
    drop_in(&mut m, Some(DropIn::Other));
    let first = deploy(&mut m, &[&ava]);
    assert!(first.services[0].failure.is_none() && first.services[0].drop_ins.len() == 1);
    let next = entry("ava", 2);
    deploy(&mut m, &[&next]);
    assert!(m.runs("ava", 2));
    // Another program, which nobody has started yet: it runs, and is not restarted.
    m.store.insert(path(3));
    drop_in(&mut m, Some(DropIn::Starts(path(3))));
    let planned = plan(&m, &[&next]).unwrap();
    let service = &planned.services[0];
    assert!(service.failure.is_none() && service.steps.is_empty(), "{service:?}");
    // It runs: what was proved stays so, and what runs is kept.
    m.start(&name("ava"));
    let latest = entry("ava", 4);
    let planned = plan(&m, &[&latest]).unwrap();
    let ServicePlan { goal, failure, instead, steps, .. } = &planned.services[0];
    assert_eq!((steps.as_slice(), instead), (&[Step::Root(path(3))][..], &Some(Some(path(3)))));
    assert_eq!(goal.as_ref().map(|g| &g.path), Some(&path(2)), "its route stays");
    assert!(!failure.as_ref().unwrap().is_rejected());
    deploy(&mut m, &[&latest]);
    assert!(m.disk.applied[&name("ava")].path == path(2) && m.held("ava").len() == 3);
    // Gone: what it started, and what a pass saw it with, is restarted.
    drop_in(&mut m, None);
    let planned = plan(&m, &[&next]).unwrap();
    let why = "it was started with a drop-in that is gone";
    assert!(planned.services[0].steps.contains(&Step::Restart(why)), "{:?}", planned.services[0].steps);
    deploy(&mut m, &[&next]);
    let planned = plan(&m, &[&next]).unwrap();
    assert!(!planned.services[0].steps.iter().any(|s| matches!(s, Step::Restart(_))), "once");
}

#[test]
fn nothing_overlaps_where_the_candidates_name_is_taken() {
    let mut m = Machine::new(false);
    deploy(&mut m, &[&overlapping(1, json!({}))]);
    let new = overlapping(2, json!({}));
    let theirs = "/etc/systemd/system/ava-next.service";
    let plan = m.plan(&[&new], &Options::default(), |observed, _| {
        observed.foreign_next.insert(name("ava"), theirs.into());
    });
    let service = &plan.unwrap().services[0];
    assert!(service.steps.contains(&Step::Restart("another version")), "{:?}", service.steps);
    assert!(!service.steps.iter().any(|s| matches!(s, Step::Overlap(_))), "{:?}", service.steps);
    assert!(service.remark.as_ref().is_some_and(|r| r.contains("ava-next.service")), "{:?}", service.remark);
}

#[test]
fn a_service_that_died_is_started_but_never_rejected() {
    let mut m = Machine::new(false);
    let ava = entry("ava", 1);
    deploy(&mut m, &[&ava]);
    m.ill.insert(path(1));
    m.units.get_mut(&name("ava")).unwrap().process = None;
    assert!(!is_rejected(&deploy(&mut m, &[&ava]).services[0]));
    assert!(matches!(m.units[&name("ava")].file, Some(File::Ours(_))), "its unit stays");
    m.ill.clear();
    deploy(&mut m, &[&ava]);
    assert!(m.runs("ava", 1));
}

#[test]
fn bad_secrets_start_nothing_and_stop_nothing() {
    let mut m = Machine::new(false);
    deploy(&mut m, &[&entry("ava", 1)]);
    m.secrets.insert(name("ava"), Err("mode 0644; run: chmod 600 /s".into()));
    let plan = deploy(&mut m, &[&entry_with("ava", 2, json!({"envFile": "/s"}))]);
    assert!(plan.services[0].failure.as_ref().unwrap().record().reason.contains("chmod"));
    assert!(m.runs("ava", 1));
    assert_eq!(m.restarts[&name("ava")], 1);
}

#[test]
fn a_unit_of_somebody_else_is_never_touched() {
    let mut m = Machine::new(false);
    m.write_file(&name("ssh"), Some(File::Theirs));
    m.reload();
    let plan = deploy(&mut m, &[&entry("ssh", 1)]);
    assert!(plan.services[0].steps.is_empty());
    assert!(plan.services[0].failure.as_ref().unwrap().record().reason.contains("not ours"));
}

#[test]
fn one_failure_does_not_hold_the_others_up() {
    let mut m = Machine::new(false);
    m.ill.insert(path(1));
    m.cache.remove(&path(3));
    deploy(&mut m, &[&entry("a", 1), &entry("b", 2), &entry("c", 3)]);
    assert!(!m.runs("a", 1) && m.runs("b", 2) && !m.runs("c", 3));
}

#[test]
fn what_is_gone_from_the_manifest_goes_but_never_everything_at_once() {
    let mut m = Machine::new(false);
    let (a, b) = (entry("a", 1), entry("b", 2));
    deploy(&mut m, &[&a, &b]);
    let first = plan(&m, &[&a]).unwrap();
    assert_eq!(first.gone.len(), 1);
    assert_eq!(
        first.gone[0].steps,
        [Step::Remove("not in the manifest"), Step::Unroot(path(2).base().into())]
    );
    assert_eq!(plan(&m, &[]).unwrap_err(), WouldEmpty(vec![name("a"), name("b")]));
    assert!(plan(&m, &[&waiting("a")]).is_err(), "a placeholder runs nothing either");
    let allowed = Options { allow_empty: true, ..Options::default() };
    assert_eq!(m.plan(&[], &allowed, |_, _| {}).unwrap().gone.len(), 2);
    let unreadable = m.plan(&[], &allowed, |_, persisted| persisted.readable = false);
    assert!(unreadable.unwrap().gone.is_empty(), "what cannot be read disables deletion");
}

#[test]
fn an_entry_that_changes_without_its_unit_restarts_nothing() {
    let mut m = Machine::new(false);
    deploy(&mut m, &[&entry("ava", 1)]);
    let ava = entry_with("ava", 1, json!({"http": {"domain": "new.example.com", "internalPort": 8000}}));
    let planned = plan(&m, &[&ava]).unwrap();
    assert_eq!(planned.services[0].steps, [Step::Record]);
    assert!(matches!(m.route_changes(&planned), RoutePlan::Write(_)));
    deploy(&mut m, &[&ava]);
    assert_eq!(m.restarts[&name("ava")], 1);
}

#[test]
fn the_route_of_a_refused_version_is_that_of_the_version_that_runs() {
    let mut m = Machine::new(false);
    deploy(&mut m, &[&entry("ava", 1)]);
    m.ill.insert(path(2));
    let http = json!({"http": {"domain": "ava.example.com", "internalPort": 9999}});
    let plan = deploy(&mut m, &[&entry_with("ava", 2, http)]);
    assert_eq!(plan.routes.iter().map(|r| r.port).collect::<Vec<_>>(), [8000]);
}

#[test]
fn a_service_that_waits_has_no_unit_and_no_route() {
    let mut m = Machine::new(false);
    let plan = deploy(&mut m, &[&waiting("ava")]);
    assert!(plan.services[0].steps.is_empty() && plan.services[0].failure.is_none());
    assert_eq!(m.route_changes(&plan), RoutePlan::None);
}

#[test]
fn a_step_in_json_says_what_is_done_to_what_or_why() {
    let base = path(1).base().to_string();
    for (step, form) in [
        (Step::Root(path(1)), json!({"do": "root", "path": path(1)})),
        (Step::Fetch(path(1)), json!({"do": "fetch", "path": path(1)})),
        (Step::Write("new here"), json!({"do": "write", "why": "new here"})),
        (Step::Reload, json!({"do": "reload"})),
        (Step::Unroot(base), json!({"do": "unroot", "path": path(1)})),
    ] {
        assert_eq!(serde_json::to_value(&step).unwrap(), form, "{step}");
    }
}
