//! Holds the hosts' reports against the manifest and says what is off. Pure: the time is an argument, and
//! whatever a host wrote is data (nothing here prints).

use crate::clock::{Timestamp, human_seconds};
use crate::deployer::state::{Exposure, Failure, REPORT_EVERY_SEC, RouteStatus, ServiceState, State, Status};
use crate::manifest::{Manifest, Service, Target};
use crate::names::{HostName, ServiceName, StorePath};
use serde::Serialize;
use std::collections::BTreeMap;

/// The version of `status --json`.
pub const STATUS_VERSION: u64 = 1;

/// A report older than this, in seconds, means that the host fell silent: two refreshes were missed.
pub const STALE_SEC: i64 = 2 * REPORT_EVERY_SEC + 10 * 60;

/// How long a host may take to pick a manifest up before that is off, in seconds: three passes.
pub const PICK_UP_SEC: i64 = 15 * 60;

/// How far ahead of ours a host's clock may be, in seconds.
const SKEW_SEC: i64 = 5 * 60;

/// What is known of a host.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// The store has no report of it.
    Missing,
    /// There is one, but it cannot be read: the reason.
    Unreadable(String),
    /// It was asked and did not answer: the reason.
    Silent(String),
    /// What it believes.
    Read(Box<State>),
}

/// How a service stands on a host, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
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
    /// It could not be put in place, or is down.
    Failed,
    /// What the manifest names was tried and refused.
    Rejected,
    /// The host's report is missing or unreadable, or it does not answer.
    Unknown,
}

impl Standing {
    /// The word in the formats.
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Running => "running",
            Standing::Waiting => "waiting",
            Standing::Stopped => "stopped",
            Standing::Pinned => "pinned",
            Standing::Pending => "pending",
            Standing::Differs => "differs",
            Standing::Missing => "missing",
            Standing::Leftover => "leftover",
            Standing::Failed => "failed",
            Standing::Rejected => "rejected",
            Standing::Unknown => "unknown",
        }
    }
}

/// One service on one host.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
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
    pub status: Standing,
    /// Since when the host says so.
    pub since: Option<Timestamp>,
    /// When the host reported.
    pub reported_at: Option<Timestamp>,
    /// How much its unit leaves open, from 0.0 to 10.0, as systemd rates it; null where the host does not say.
    pub exposure: Option<Exposure>,
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
    /// Whether a person should look.
    pub off: bool,
    /// What is wrong with the host as a whole. May hold text of the host.
    pub problems: Vec<String>,
}

/// Everything `status` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Picture {
    /// [`STATUS_VERSION`].
    pub version: u64,
    /// The manifest's serial.
    pub serial: u64,
    /// When the manifest was written.
    pub generation: Timestamp,
    /// The hosts, by name.
    pub hosts: Vec<HostRow>,
    /// Services by hosts, in the manifest's order; what should not be there comes last.
    pub rows: Vec<Row>,
}

impl Picture {
    /// Whether anything is off.
    pub fn off(&self) -> bool {
        self.rows.iter().any(|r| r.off) || self.hosts.iter().any(|h| h.off)
    }
}

/// What is shown: everything, or one service, or one host, or one service on one host.
#[derive(Debug, Clone, Copy, Default)]
pub struct Only<'a> {
    /// This service alone.
    pub service: Option<&'a str>,
    /// This host alone.
    pub host: Option<&'a str>,
}

impl Only<'_> {
    fn service(&self, name: &ServiceName) -> bool {
        self.service.is_none_or(|s| s == name.as_str())
    }

    fn host(&self, name: &HostName) -> bool {
        self.host.is_none_or(|h| h == name.as_str())
    }
}

/// Holds reports against the manifest. Hosts that no service names are shown only if they still run something
/// of ours and still report.
pub fn judge(
    manifest: &Manifest,
    reports: &BTreeMap<HostName, Report>,
    now: Timestamp,
    only: Only<'_>,
) -> Picture {
    let mut picture = Picture {
        version: STATUS_VERSION,
        serial: manifest.serial,
        generation: manifest.generation,
        hosts: Vec::new(),
        rows: Vec::new(),
    };
    for service in manifest.services.iter().filter(|s| only.service(&s.name)) {
        for host in service.hosts.iter().filter(|h| only.host(h)) {
            let report = reports.get(host).unwrap_or(&Report::Missing);
            picture.rows.push(row(manifest, service, host, report, now));
        }
    }
    for (host, report) in reports.iter().filter(|(h, _)| only.host(h)) {
        let placed = |name: &ServiceName| {
            manifest.service(name.as_str()).is_some_and(|service| service.hosts.contains(host))
        };
        let named = manifest.services.iter().any(|s| s.hosts.contains(host));
        if let Report::Read(state) = report
            && (named || now.0.saturating_sub(state.checked_at.0) <= STALE_SEC)
        {
            let strangers = state.services.values().filter(|s| only.service(&s.name) && !placed(&s.name));
            picture.rows.extend(strangers.map(|s| leftover(manifest, state, s, now)));
        }
    }
    for (host, report) in reports {
        if picture.rows.iter().any(|r| r.host == *host) {
            picture.hosts.push(host_row(manifest, host, report, now));
        }
    }
    picture
}

/// Whether the host has worked from an older manifest, and whether that has lasted too long.
fn behind(manifest: &Manifest, state: &State, now: Timestamp) -> (bool, bool) {
    let behind = state.serial.is_none_or(|serial| serial < manifest.serial);
    (behind, behind && now.0.saturating_sub(manifest.generation.0) > PICK_UP_SEC)
}

fn row(manifest: &Manifest, service: &Service, host: &HostName, report: &Report, now: Timestamp) -> Row {
    let mut row = Row {
        service: service.name.clone(),
        host: host.clone(),
        wanted: service.artifact.store_path.path().cloned(),
        revision: service.revision.clone(),
        running: None,
        status: Standing::Unknown,
        since: None,
        reported_at: None,
        exposure: None,
        off: true,
        problem: None,
        attempted: None,
        journal: Vec::new(),
    };
    let state = match report {
        Report::Missing => return Row { problem: Some(format!("{host} never reported")), ..row },
        Report::Unreadable(why) | Report::Silent(why) => return Row { problem: Some(why.clone()), ..row },
        Report::Read(state) => state,
    };
    row.reported_at = Some(state.checked_at);
    let (behind, overdue) = behind(manifest, state, now);
    let overdue_text = || overdue.then(|| format!("{host} has not picked up serial {}", manifest.serial));
    let Some(entry) = state.services.get(&service.name) else {
        (row.status, row.off, row.problem) = if behind {
            (Standing::Pending, overdue, overdue_text())
        } else {
            let why =
                "worked from this manifest and does not know the service; see 'omni-deploy logs deployer'";
            (Standing::Missing, true, Some(format!("{host} {why}")))
        };
        return row;
    };
    row.running = entry.store_path.clone();
    row.since = Some(entry.since);
    row.exposure = entry.exposure;
    let same = match &service.artifact.store_path {
        Target::Placeholder => entry.status == Status::Waiting,
        Target::Path(path) => entry.store_path.as_ref() == Some(path),
    };
    let unlike = if behind { Standing::Pending } else { Standing::Differs };
    row.status = match entry.status {
        Status::Failed => Standing::Failed,
        Status::Rejected => Standing::Rejected,
        Status::Stopped => Standing::Stopped,
        Status::Running if entry.pinned_since.is_some() => Standing::Pinned,
        Status::Running if same => Standing::Running,
        Status::Waiting if same => Standing::Waiting,
        Status::Running | Status::Waiting => unlike,
    };
    row.off = match row.status {
        Standing::Running | Standing::Waiting | Standing::Stopped | Standing::Pinned => false,
        Standing::Pending => overdue,
        Standing::Differs
        | Standing::Missing
        | Standing::Leftover
        | Standing::Failed
        | Standing::Rejected
        | Standing::Unknown => true,
    };
    match row.status {
        Standing::Failed | Standing::Rejected => explain(&mut row, entry.failure.as_ref()),
        Standing::Pending => row.problem = overdue_text(),
        Standing::Stopped => {
            let until = entry.paused_until.map_or("'deployer resume'".into(), |t| t.to_string());
            row.problem = Some(format!("stopped by 'deployer pause' until {until}"));
        }
        Standing::Pinned => {
            row.problem = Some(
                "held by 'deployer rollback' until the manifest names another path or 'deployer rollback --unpin'"
                    .into(),
            );
        }
        Standing::Running if entry.secrets_changed => {
            row.problem =
                Some("its secrets file was changed after it started; restart it to pick that up".into());
        }
        Standing::Differs => {
            row.problem = Some(format!(
                "{host} worked from this manifest and runs another version; see 'omni-deploy logs deployer'"
            ));
        }
        _ => {}
    }
    if let Some(attention) = entry.attention(Some(host)) {
        row.off = true;
        row.problem =
            Some(row.problem.map_or(attention.clone(), |problem| format!("{problem}; {attention}")));
    }
    row
}

fn explain(row: &mut Row, failure: Option<&Failure>) {
    let Some(failure) = failure else {
        row.problem = Some("the host gives no reason; see 'omni-deploy logs deployer'".into());
        return;
    };
    let Failure { reason, attempted, at: _, journal, attempts: _, inputs: _ } = failure;
    row.problem = Some(if attempted.is_some() && *attempted != row.wanted {
        format!("{reason} (the manifest names another version by now)")
    } else {
        reason.clone()
    });
    row.attempted = attempted.clone();
    row.journal = journal.clone();
}

fn leftover(manifest: &Manifest, state: &State, entry: &ServiceState, now: Timestamp) -> Row {
    let (behind, overdue) = behind(manifest, state, now);
    let mut row = Row {
        service: entry.name.clone(),
        host: state.host.clone(),
        wanted: None,
        revision: None,
        running: entry.store_path.clone(),
        status: if behind { Standing::Pending } else { Standing::Leftover },
        since: Some(entry.since),
        reported_at: Some(state.checked_at),
        exposure: entry.exposure,
        off: !behind || overdue,
        problem: None,
        attempted: None,
        journal: Vec::new(),
    };
    if !behind {
        match &entry.failure {
            Some(failure) => explain(&mut row, Some(failure)),
            None => {
                row.problem =
                    Some("the manifest does not place it here; the next pass should remove it".into());
            }
        }
    }
    row
}

fn host_row(manifest: &Manifest, host: &HostName, report: &Report, now: Timestamp) -> HostRow {
    let mut row =
        HostRow { host: host.clone(), reported_at: None, serial: None, off: true, problems: Vec::new() };
    let state = match report {
        Report::Missing => {
            row.problems.push(format!(
                "never reported; check 'systemctl status deployer.timer' on {host}, and that it can write hosts/{host}.json"
            ));
            return row;
        }
        Report::Unreadable(why) => {
            row.problems
                .push(format!("its report cannot be read: {why}; upgrade whichever omni-deploy is older"));
            return row;
        }
        Report::Silent(why) => {
            row.problems.push(why.clone());
            return row;
        }
        Report::Read(state) => state,
    };
    // Every field is looked at: a new one is to be judged here.
    let State {
        version: _,
        host: _,
        deployer: _,
        serial,
        generation: _,
        checked_at,
        changed_at: _,
        manifest_error,
        route,
        reported: _,
        services: _,
    } = state.as_ref();
    row.reported_at = Some(*checked_at);
    row.serial = *serial;
    let age = now.0.saturating_sub(checked_at.0);
    if age > STALE_SEC {
        row.problems.push(format!(
            "silent for {}; check 'systemctl status deployer.timer' on {host}",
            human_seconds(age)
        ));
    } else if age < -SKEW_SEC {
        row.problems.push(format!("its clock is {} ahead of this one; check both", human_seconds(-age)));
    }
    if let Some(error) = manifest_error {
        row.problems.push(format!("works from its last good manifest: {error}"));
    }
    if route.status == RouteStatus::Pending {
        let why = route.reason.as_deref().unwrap_or("the host gives no reason");
        row.problems.push(format!("Caddy's route is pending: {why}"));
    }
    if behind(manifest, state, now).1 {
        let had = serial.map_or("none".into(), |s| s.to_string());
        row.problems.push(format!(
            "has not picked up serial {} in {} (it has {had}); force it with 'ssh {host} sudo systemctl start deployer'",
            manifest.serial,
            manifest.generation.age(now)
        ));
    }
    row.off = !row.problems.is_empty();
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deployer::state::RouteState;
    use crate::manifest::{Artifact, Exec, Hardening, Rollout, Systemd};
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
        let store_path = target.map_or(Target::Placeholder, |d| Target::Path(path(d)));
        manifest.services.push(Service {
            name: name("ava"),
            artifact: Artifact { kind: "nix-closure".into(), store_path, extra: Map::new() },
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

    fn state(serial: u64, services: &[(&str, Status, Option<char>)]) -> State {
        let mut state = State::new(host("biz"), Timestamp(NOW.0 - 60));
        state.serial = Some(serial);
        for (service, status, runs) in services {
            let entry = ServiceState {
                name: name(service),
                store_path: runs.map(path),
                status: *status,
                since: Timestamp(NOW.0 - 600),
                previous: Vec::new(),
                failure: None,
                secrets_changed: false,
                exposure: None,
                drop_ins: Vec::new(),
                invocation: None,
                pinned_since: None,
                paused_until: None,
            };
            state.services.insert(name(service), entry);
        }
        state
    }

    fn reports(report: Report) -> BTreeMap<HostName, Report> {
        BTreeMap::from([(host("biz"), report)])
    }

    fn judged(manifest: &Manifest, state: State) -> Picture {
        judge(manifest, &reports(Report::Read(Box::new(state))), NOW, Only::default())
    }

    #[test]
    fn each_standing_follows_from_manifest_and_report() {
        use Status::*;
        let ava = |status, runs| vec![("ava", status, runs)];
        for (target, age, serial, services, standing, off) in [
            (Some('1'), 60, 7, ava(Running, Some('1')), Standing::Running, false),
            (Some('1'), 60, 8, ava(Running, Some('1')), Standing::Running, false),
            (Some('2'), 60, 6, ava(Running, Some('1')), Standing::Pending, false),
            (Some('2'), PICK_UP_SEC, 6, ava(Running, Some('1')), Standing::Pending, false),
            (Some('2'), PICK_UP_SEC + 1, 6, ava(Running, Some('1')), Standing::Pending, true),
            (Some('2'), 60, 7, ava(Running, Some('1')), Standing::Differs, true),
            (Some('2'), 60, 7, ava(Rejected, Some('1')), Standing::Rejected, true),
            (Some('2'), 60, 6, ava(Failed, None), Standing::Failed, true),
            (Some('1'), 60, 7, ava(Stopped, None), Standing::Stopped, false),
            (None, 60, 7, ava(Waiting, None), Standing::Waiting, false),
            (Some('1'), 60, 6, ava(Waiting, None), Standing::Pending, false),
            (Some('1'), 60, 7, ava(Waiting, None), Standing::Differs, true),
            (None, 60, 7, ava(Running, Some('1')), Standing::Differs, true),
            (Some('1'), 60, 6, vec![], Standing::Pending, false),
            (Some('1'), 60, 7, vec![], Standing::Missing, true),
        ] {
            let picture = judged(&manifest(target, age), state(serial, &services));
            let row = &picture.rows[0];
            assert_eq!((row.status, row.off), (standing, off), "{target:?} {age} {serial} {services:?}");
            assert_eq!(picture.rows.len(), 1);
            assert!(
                (off || standing == Standing::Stopped) == row.problem.is_some(),
                "what is off or stopped has a reason: {target:?} {age} {serial} {services:?}"
            );
        }
    }

    #[test]
    fn how_exposed_a_service_is_comes_from_its_host() {
        let mut state = state(7, &[("ava", Status::Running, Some('1'))]);
        assert_eq!(judged(&manifest(Some('1'), 60), state.clone()).rows[0].exposure, None);
        let exposure = Exposure::parse("8.8");
        state.services.get_mut(&name("ava")).unwrap().exposure = exposure;
        let picture = judged(&manifest(Some('1'), 60), state);
        assert_eq!((picture.rows[0].exposure, picture.off()), (exposure, false), "it is no reason to be off");
    }

    #[test]
    fn a_host_that_cannot_be_known_is_off_and_says_why() {
        let manifest = manifest(Some('1'), 60);
        for report in
            [Report::Missing, Report::Unreadable("EOF".into()), Report::Silent("ssh: refused".into())]
        {
            let picture = judge(&manifest, &reports(report.clone()), NOW, Only::default());
            assert_eq!(picture.rows[0].status, Standing::Unknown);
            assert!(picture.off() && picture.hosts[0].problems.len() == 1, "{report:?}");
        }
    }

    #[test]
    fn silence_a_pending_route_and_a_bad_manifest_are_off_though_every_service_runs() {
        let manifest = manifest(Some('1'), 60);
        let well = state(7, &[("ava", Status::Running, Some('1'))]);
        assert!(!judged(&manifest, well.clone()).off());
        let at = |age: i64| State { checked_at: Timestamp(NOW.0 - age), ..well.clone() };
        for (state, word) in [
            (at(STALE_SEC), None),
            (at(STALE_SEC + 1), Some("silent for 1h")),
            (at(-SKEW_SEC - 1), Some("clock")),
            (State { manifest_error: Some("truncated".into()), ..well.clone() }, Some("truncated")),
            (
                State {
                    route: RouteState { status: RouteStatus::Pending, reason: Some("refused".into()) },
                    ..well.clone()
                },
                Some("refused"),
            ),
        ] {
            let picture = judged(&manifest, state);
            assert_eq!(picture.off(), word.is_some(), "{word:?}");
            let said = picture.hosts[0].problems.join(" ");
            assert!(said.contains(word.unwrap_or_default()), "{said}");
        }
    }

    #[test]
    fn a_failure_is_explained_with_its_journal_and_a_forgotten_one_is_not_shown() {
        let failure = Failure {
            attempts: 0,
            reason: "exited with 1".into(),
            attempted: Some(path('2')),
            at: NOW,
            journal: vec!["boom".into()],
            inputs: None,
        };
        let with = |status| {
            let mut state = state(7, &[("ava", status, Some('1'))]);
            state.services.get_mut(&name("ava")).unwrap().failure = Some(failure.clone());
            state
        };
        let row = judged(&manifest(Some('2'), 60), with(Status::Rejected)).rows.remove(0);
        assert_eq!((row.problem.as_deref(), row.attempted), (Some("exited with 1"), Some(path('2'))));
        assert_eq!(row.journal, ["boom"]);
        let row = judged(&manifest(Some('3'), 60), with(Status::Rejected)).rows.remove(0);
        assert!(row.problem.unwrap().contains("another version by now"));
        let row = judged(&manifest(Some('1'), 60), with(Status::Running)).rows.remove(0);
        assert_eq!((row.off, row.problem), (false, None));
    }

    #[test]
    fn what_the_manifest_does_not_place_on_a_host_is_leaving_or_left_over() {
        let manifest = manifest(Some('1'), 60);
        let both = [("ava", Status::Running, Some('1')), ("old", Status::Running, Some('2'))];
        let picture = judged(&manifest, state(6, &both));
        assert_eq!((picture.rows[1].status, picture.rows[1].off), (Standing::Pending, false));
        let picture = judged(&manifest, state(7, &both));
        assert_eq!((picture.rows[1].status, picture.rows[1].off), (Standing::Leftover, true));
    }

    #[test]
    fn a_host_no_service_names_is_shown_only_while_it_still_runs_something_and_reports() {
        let mut manifest = manifest(Some('1'), 60);
        manifest.services[0].hosts = vec![host("other")];
        let mut left = state(7, &[("ava", Status::Running, Some('1'))]);
        let of_biz = |p: &Picture| p.rows.iter().filter(|r| r.host.as_str() == "biz").count();
        assert_eq!(of_biz(&judged(&manifest, left.clone())), 1);
        left.checked_at = Timestamp(NOW.0 - STALE_SEC - 1);
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
        let shown = |service, host| {
            let picture = judge(&manifest, &BTreeMap::new(), NOW, Only { service, host });
            picture.rows.iter().map(|r| format!("{}@{}", r.service, r.host)).collect::<Vec<_>>()
        };
        assert_eq!(shown(None, None), ["ava@biz", "web@biz", "web@two"]);
        assert_eq!(shown(Some("web"), None), ["web@biz", "web@two"]);
        assert_eq!(shown(None, Some("two")), ["web@two"]);
        assert_eq!(shown(Some("ava"), Some("two")), Vec::<String>::new());
    }
}
