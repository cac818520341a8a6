//! Holds the hosts' reports against the manifest and says what is off. Pure: the time is an argument, and
//! whatever a host wrote is data (nothing here prints).

mod host;
mod service;

use crate::clock::Timestamp;
use crate::deployer::live::Live;
use crate::deployer::state::{Exposure, SILENT_SEC, State};
use crate::manifest::{Manifest, Service};
use crate::names::{HostName, ServiceName, StorePath};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// The version of `status --json`.
pub const STATUS_VERSION: u64 = 1;

/// How long a host may take to pick a manifest up before that is off, in seconds: three passes.
pub const PICK_UP_SEC: i64 = 15 * 60;

/// What the reports are held against.
#[derive(Debug, Clone)]
pub struct Expected<'a> {
    /// The manifest in force.
    pub manifest: &'a Manifest,
    /// The digest of each of its entries ([`crate::manifest::entry`]).
    pub entries: BTreeMap<ServiceName, String>,
    /// The identity of the store that it was read from.
    pub store: String,
    /// The host that the reader sits at.
    pub here: HostName,
}

impl Expected<'_> {
    /// The store that a host obeys, if it is another one.
    fn other_store<'s>(&self, state: &'s State) -> Option<&'s str> {
        state.store.as_deref().filter(|theirs| *theirs != self.store)
    }
}

/// What is known of a host.
#[derive(Debug, Clone, PartialEq)]
pub enum HostReport {
    /// The store has no report of it.
    Missing,
    /// There is one, but it cannot be read: the reason.
    Unreadable(String),
    /// It was asked and did not answer: the reason.
    Silent(String),
    /// What it believes.
    Read(Box<State>),
    /// The same, asked for now, with what systemd says there now.
    Live(Box<State>, Box<Live>),
}

impl HostReport {
    fn state(&self) -> Option<&State> {
        match self {
            HostReport::Missing | HostReport::Unreadable(_) | HostReport::Silent(_) => None,
            HostReport::Read(state) | HostReport::Live(state, _) => Some(state),
        }
    }

    fn live(&self) -> Option<&Live> {
        if let HostReport::Live(_, live) = self { Some(live) } else { None }
    }
}

/// How a service stands on a host, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceStatus {
    /// It runs what the manifest names.
    Running,
    /// The manifest names a placeholder.
    Waiting,
    /// It was stopped on purpose.
    Stopped,
    /// It is held at an earlier closure on purpose.
    Pinned,
    /// The host has not worked from this manifest yet.
    Pending,
    /// The host worked from this manifest, and runs something else.
    Differs,
    /// The host worked from this manifest, and does not know the service.
    Missing,
    /// The host runs it, and the manifest does not place it there.
    Leftover,
    /// The host is removing it, and is not done.
    Removing,
    /// It could not be put in place, or is down.
    Failed,
    /// What the manifest names was tried and rejected.
    Rejected,
    /// The host's report is missing or unreadable, or it does not answer.
    Unknown,
}

/// The word in the formats.
impl fmt::Display for ServiceStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// One service on one host.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRow {
    /// The service.
    pub service: ServiceName,
    /// The host.
    pub host: HostName,
    /// What should run; null for a placeholder and for what should not be there.
    pub wanted: Option<StorePath>,
    /// The commit that was built from.
    pub revision: Option<String>,
    /// What runs; null when nothing does or nothing is known.
    pub running: Option<StorePath>,
    /// How it stands.
    pub status: ServiceStatus,
    /// Since when the host says so.
    pub since: Option<Timestamp>,
    /// When the host reported.
    pub reported_at: Option<Timestamp>,
    /// How much its unit leaves open, from 0.0 to 10.0, as systemd rates it; null where the host does not say.
    pub exposure: Option<Exposure>,
    /// How often systemd restarted it since it was started; only where the host was asked now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u32>,
    /// Whether a person should look.
    pub off: bool,
    /// What is wrong, if anything is. May hold text of the host.
    pub problem: Option<String>,
    /// The path that was tried and is not what runs.
    pub attempted: Option<StorePath>,
    /// The last lines of its journal when it failed, oldest first. Text of the host.
    pub journal: Vec<String>,
}

/// One host as a whole.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostRow {
    /// The host.
    pub host: HostName,
    /// When it reported.
    pub reported_at: Option<Timestamp>,
    /// The serial of the manifest that it worked from.
    pub serial: Option<u64>,
    /// The store that it obeys, if it says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
    /// Why its last pass failed, if it did. Text of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// Whether a person should look.
    pub off: bool,
    /// What is wrong with the host as a whole. May hold text of the host.
    pub problems: Vec<String>,
}

/// Everything `status` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusReport {
    /// [`STATUS_VERSION`].
    pub version: u64,
    /// The manifest's serial.
    pub serial: u64,
    /// When the manifest was written.
    pub generation: Timestamp,
    /// The hosts, by name.
    pub hosts: Vec<HostRow>,
    /// Services by hosts, in the manifest's order; what should not be there comes last.
    pub rows: Vec<ServiceRow>,
}

impl StatusReport {
    /// Whether anything is off.
    pub fn needs_attention(&self) -> bool {
        self.rows.iter().any(|r| r.off) || self.hosts.iter().any(|h| h.off)
    }
}

/// Holds reports against the manifest. Hosts that no service names are shown only if they still run something
/// of ours and still report. `shown`: whether a service is looked at on a host.
pub fn judge(
    wanted: &Expected<'_>,
    reports: &BTreeMap<HostName, HostReport>,
    now: Timestamp,
    shown: impl Fn(&ServiceName, &HostName) -> bool,
) -> StatusReport {
    let manifest = wanted.manifest;
    let mut status = StatusReport {
        version: STATUS_VERSION,
        serial: manifest.serial,
        generation: manifest.generation,
        hosts: Vec::new(),
        rows: Vec::new(),
    };
    for service in &manifest.services {
        for host in service.hosts.iter().filter(|host| shown(&service.name, host)) {
            let report = reports.get(host).unwrap_or(&HostReport::Missing);
            status.rows.push(service::row(wanted, service, host, report, now));
        }
    }
    for (host, report) in reports {
        let is_placed = |service: &Service| service.hosts.contains(host);
        let is_stranger =
            |name: &ServiceName| shown(name, host) && !manifest.service(name.as_str()).is_some_and(is_placed);
        let named = manifest.services.iter().any(is_placed);
        if let Some(state) = report.state()
            && (named || now.0.saturating_sub(state.checked_at.0) <= SILENT_SEC)
            && wanted.other_store(state).is_none()
        {
            let strangers = state.services.values().filter(|s| is_stranger(&s.name));
            status.rows.extend(strangers.map(|s| service::leftover(wanted, state, s, now)));
            // What the state does not know: a pass that ended before it could take that down.
            let unknown = report.live().into_iter().flat_map(|live| &live.services);
            let unknown =
                unknown.filter(|(name, _)| is_stranger(name) && !state.services.contains_key(*name));
            status.rows.extend(unknown.map(|(name, unit)| service::unknown_unit(state, name, unit)));
        }
    }
    for (host, report) in reports {
        if status.rows.iter().any(|r| r.host == *host) {
            status.hosts.push(host::row(wanted, host, report, now));
        }
    }
    status
}

/// How far a host is with the manifest in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// It has worked from this version.
    Current,
    /// It has worked from an older one.
    Behind,
    /// The same, for too long.
    Overdue,
}

impl Progress {
    fn of(manifest: &Manifest, state: &State, now: Timestamp) -> Self {
        if state.serial.is_some_and(|serial| serial >= manifest.serial) {
            Progress::Current
        } else if now.0.saturating_sub(manifest.generation.0) <= PICK_UP_SEC {
            Progress::Behind
        } else {
            Progress::Overdue
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deployer::state::{FailureRecord, RouteState, RouteStatus, ServicePhase, ServiceState};
    use crate::manifest::{Artifact, ArtifactPath, Exec, Hardening, Rollout, Systemd};
    use serde_json::Map;

    const NOW: Timestamp = Timestamp(1_800_000_000);

    fn path(digit: char) -> StorePath {
        StorePath::parse(&format!("/nix/store/{}-ava", String::from(digit).repeat(32))).unwrap()
    }

    fn host(name: &str) -> HostName {
        HostName::parse(name).unwrap()
    }

    fn name(text: &str) -> ServiceName {
        ServiceName::parse(text).unwrap()
    }

    /// Serial 7, written `age` seconds ago, with ava on biz.
    fn manifest(target: Option<char>, age: i64) -> Manifest {
        let mut manifest = Manifest::empty(Timestamp(NOW.0 - age), "ann@laptop");
        manifest.serial = 7;
        let store_path = target.map_or(ArtifactPath::Placeholder, |d| ArtifactPath::Path(path(d)));
        manifest.services.push(Service {
            name: name("ava"),
            artifact: Artifact::of(store_path),
            hosts: vec![host("biz")],
            exec: Exec::default(),
            env: BTreeMap::new(),
            env_file: None,
            credentials: BTreeMap::new(),
            http: None,
            health: None,
            rollout: Rollout::default(),
            systemd: Systemd::default(),
            hardening: Hardening::default(),
            revision: None,
            extra: Map::new(),
        });
        manifest
    }

    fn state(serial: u64, services: &[(&str, ServicePhase, Option<char>)]) -> State {
        let mut state = State::new(host("biz"), Timestamp(NOW.0 - 60));
        state.serial = Some(serial);
        for (service, status, runs) in services {
            let entry = ServiceState {
                store_path: runs.map(path),
                ..ServiceState::new(name(service), *status, Timestamp(NOW.0 - 600))
            };
            state.services.insert(name(service), entry);
        }
        state
    }

    fn reports(report: HostReport) -> BTreeMap<HostName, HostReport> {
        BTreeMap::from([(host("biz"), report)])
    }

    /// The manifest alone: entries are not compared, and no state names a store.
    fn expected(manifest: &Manifest) -> Expected<'_> {
        Expected { manifest, entries: BTreeMap::new(), store: "file:///s".into(), here: host("laptop") }
    }

    fn judged(manifest: &Manifest, state: State) -> StatusReport {
        judge(&expected(manifest), &reports(HostReport::Read(Box::new(state))), NOW, |_, _| true)
    }

    #[test]
    fn somebodys_drop_in_needs_attention_and_is_named_with_what_to_type() {
        for (status, file, words) in [
            (
                ServicePhase::Running,
                "/etc/systemd/system/ava.service.d/override.conf",
                "ssh biz 'sudo systemctl revert ava && sudo systemctl start deployer'",
            ),
            (
                ServicePhase::Failed,
                "/etc/systemd/system.control/ava.service.d/50-CPUQuota.conf",
                "ssh biz 'sudo systemctl revert ava && sudo systemctl start deployer'",
            ),
            (
                ServicePhase::Running,
                "/etc/systemd/system/service.d/all.conf",
                "remove that, then 'ssh biz sudo systemctl start deployer'",
            ),
            (
                ServicePhase::Running,
                "/run/systemd/generator/ava.service.d/x.conf",
                "remove that, then 'ssh biz sudo systemctl start deployer'",
            ),
        ] {
            let mut state = state(7, &[("ava", status, Some('1'))]);
            state.services.get_mut(&name("ava")).unwrap().drop_ins = vec![file.into()];
            assert_eq!(state.exit_code(), crate::error::Exit::Degraded, "{file}");
            let report = judged(&manifest(Some('1'), 60), state);
            let row = &report.rows[0];
            let problem = row.problem.as_deref().unwrap_or_default();
            assert!(row.off && problem.contains(file) && problem.contains(words), "{row:?}");
        }
    }

    #[test]
    fn each_standing_follows_from_manifest_and_report() {
        use ServicePhase::*;
        let ava = |status, runs| vec![("ava", status, runs)];
        for (target, age, serial, services, standing, off) in [
            (Some('1'), 60, 7, ava(Running, Some('1')), ServiceStatus::Running, false),
            (Some('1'), 60, 8, ava(Running, Some('1')), ServiceStatus::Running, false),
            (Some('2'), 60, 6, ava(Running, Some('1')), ServiceStatus::Pending, false),
            (Some('2'), PICK_UP_SEC, 6, ava(Running, Some('1')), ServiceStatus::Pending, false),
            (Some('2'), PICK_UP_SEC + 1, 6, ava(Running, Some('1')), ServiceStatus::Pending, true),
            (Some('2'), 60, 7, ava(Running, Some('1')), ServiceStatus::Differs, true),
            (Some('2'), 60, 7, ava(Rejected, Some('1')), ServiceStatus::Rejected, true),
            (Some('2'), 60, 6, ava(Failed, None), ServiceStatus::Failed, true),
            (Some('1'), 60, 7, ava(Stopped, None), ServiceStatus::Stopped, false),
            (None, 60, 7, ava(Waiting, None), ServiceStatus::Waiting, false),
            (Some('1'), 60, 6, ava(Waiting, None), ServiceStatus::Pending, false),
            (Some('1'), 60, 7, ava(Waiting, None), ServiceStatus::Differs, true),
            (None, 60, 7, ava(Running, Some('1')), ServiceStatus::Differs, true),
            (Some('1'), 60, 6, vec![], ServiceStatus::Pending, false),
            (Some('1'), 60, 7, vec![], ServiceStatus::Missing, true),
        ] {
            let report = judged(&manifest(target, age), state(serial, &services));
            let row = &report.rows[0];
            assert_eq!((row.status, row.off), (standing, off), "{target:?} {age} {serial} {services:?}");
            assert_eq!(report.rows.len(), 1);
            assert!(
                (off || standing == ServiceStatus::Stopped) == row.problem.is_some(),
                "what is off or stopped has a reason: {target:?} {age} {serial} {services:?}"
            );
        }
    }

    #[test]
    fn how_exposed_a_service_is_comes_from_its_host() {
        let mut state = state(7, &[("ava", ServicePhase::Running, Some('1'))]);
        assert_eq!(judged(&manifest(Some('1'), 60), state.clone()).rows[0].exposure, None);
        let exposure = Exposure::parse("8.8");
        state.services.get_mut(&name("ava")).unwrap().exposure = exposure;
        let report = judged(&manifest(Some('1'), 60), state);
        assert_eq!(
            (report.rows[0].exposure, report.needs_attention()),
            (exposure, false),
            "it is no reason to be off"
        );
    }

    #[test]
    fn a_host_that_cannot_be_known_is_off_and_says_why() {
        let manifest = manifest(Some('1'), 60);
        for report in [
            HostReport::Missing,
            HostReport::Unreadable("EOF".into()),
            HostReport::Silent("ssh: refused".into()),
        ] {
            let report = judge(&expected(&manifest), &reports(report.clone()), NOW, |_, _| true);
            assert_eq!(report.rows[0].status, ServiceStatus::Unknown);
            assert!(report.needs_attention() && report.hosts[0].problems.len() == 1, "{report:?}");
        }
    }

    #[test]
    fn silence_a_pending_route_and_a_bad_manifest_are_off_though_every_service_runs() {
        let manifest = manifest(Some('1'), 60);
        let well = state(7, &[("ava", ServicePhase::Running, Some('1'))]);
        assert!(!judged(&manifest, well.clone()).needs_attention());
        let at = |age: i64| State { checked_at: Timestamp(NOW.0 - age), ..well.clone() };
        for (state, word) in [
            (at(SILENT_SEC), None),
            (at(SILENT_SEC + 1), Some("silent for 1h")),
            (at(-host::SKEW_SEC - 1), Some("clock")),
            (State { manifest_error: Some("truncated".into()), ..well.clone() }, Some("truncated")),
            (
                State {
                    route: RouteState { status: RouteStatus::Pending, reason: Some("refused".into()) },
                    ..well.clone()
                },
                Some("refused"),
            ),
        ] {
            let report = judged(&manifest, state);
            assert_eq!(report.needs_attention(), word.is_some(), "{word:?}");
            let said = report.hosts[0].problems.join(" ");
            assert!(said.contains(word.unwrap_or_default()), "{said}");
        }
    }

    #[test]
    fn a_failure_is_explained_with_its_journal_and_a_forgotten_one_is_not_shown() {
        let failure = FailureRecord {
            attempts: 0,
            reason: "exited with 1".into(),
            attempted: Some(path('2')),
            at: NOW,
            journal: vec!["boom".into()],
            inputs: None,
            kept_out: false,
        };
        let with = |status| {
            let mut state = state(7, &[("ava", status, Some('1'))]);
            state.services.get_mut(&name("ava")).unwrap().failure = Some(failure.clone());
            state
        };
        let row = judged(&manifest(Some('2'), 60), with(ServicePhase::Rejected)).rows.remove(0);
        assert_eq!((row.problem.as_deref(), row.attempted), (Some("exited with 1"), Some(path('2'))));
        assert_eq!(row.journal, ["boom"]);
        let row = judged(&manifest(Some('3'), 60), with(ServicePhase::Rejected)).rows.remove(0);
        assert!(row.problem.unwrap().contains("another version by now"));
        let row = judged(&manifest(Some('1'), 60), with(ServicePhase::Running)).rows.remove(0);
        assert_eq!((row.off, row.problem), (false, None));
    }

    #[test]
    fn what_the_manifest_does_not_place_on_a_host_is_leaving_or_left_over() {
        let manifest = manifest(Some('1'), 60);
        let both = [("ava", ServicePhase::Running, Some('1')), ("old", ServicePhase::Running, Some('2'))];
        let report = judged(&manifest, state(6, &both));
        assert_eq!((report.rows[1].status, report.rows[1].off), (ServiceStatus::Pending, false));
        let report = judged(&manifest, state(7, &both));
        assert_eq!((report.rows[1].status, report.rows[1].off), (ServiceStatus::Leftover, true));
    }

    #[test]
    fn a_host_no_service_names_is_shown_only_while_it_still_runs_something_and_reports() {
        let mut manifest = manifest(Some('1'), 60);
        manifest.services[0].hosts = vec![host("other")];
        let mut left = state(7, &[("ava", ServicePhase::Running, Some('1'))]);
        let of_biz = |p: &StatusReport| p.rows.iter().filter(|r| r.host.as_str() == "biz").count();
        assert_eq!(of_biz(&judged(&manifest, left.clone())), 1);
        left.checked_at = Timestamp(NOW.0 - SILENT_SEC - 1);
        assert_eq!(of_biz(&judged(&manifest, left)), 0);
        assert_eq!(of_biz(&judged(&manifest, state(7, &[]))), 0);
    }

    #[test]
    fn one_service_or_one_host_can_be_picked() {
        let mut manifest = manifest(Some('1'), 60);
        let mut second = manifest.services[0].clone();
        second.name = name("web");
        second.hosts.push(host("two"));
        manifest.services.push(second);
        let shown = |service: Option<&str>, host: Option<&str>| {
            let report = judge(&expected(&manifest), &BTreeMap::new(), NOW, |name, of| {
                service.is_none_or(|s| s == name.as_str()) && host.is_none_or(|h| h == of.as_str())
            });
            report.rows.iter().map(|r| format!("{}@{}", r.service, r.host)).collect::<Vec<_>>()
        };
        assert_eq!(shown(None, None), ["ava@biz", "web@biz", "web@two"]);
        assert_eq!(shown(Some("web"), None), ["web@biz", "web@two"]);
        assert_eq!(shown(None, Some("two")), ["web@two"]);
        assert_eq!(shown(Some("ava"), Some("two")), Vec::<String>::new());
    }
}
