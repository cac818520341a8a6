//! Holds the hosts' reports against the manifest and says what is off. Pure: the time is an argument, and
//! whatever a host wrote is data (nothing here prints).

use super::hint;
use crate::clock::{Timestamp, human_seconds};
use crate::deployer::live::{Live, Unit};
use crate::deployer::state::{
    Exposure, FailureRecord, RouteStatus, SILENT_SEC, ServicePhase, ServiceState, State,
};
use crate::deployer::systemd;
use crate::manifest::{ArtifactPath, Manifest, Service};
use crate::names::{HostName, ServiceName, StorePath};
use crate::see::checks::Verdict;
use serde::Serialize;
use std::collections::BTreeMap;

/// The version of `status --json`.
pub const STATUS_VERSION: u64 = 1;

/// A report older than this, in seconds, means that the host fell silent: two refreshes were missed.
pub const STALE_SEC: i64 = SILENT_SEC;

/// How long a host may take to pick a manifest up before that is off, in seconds: three passes.
pub const PICK_UP_SEC: i64 = 15 * 60;

/// How far ahead of ours a host's clock may be, in seconds.
const SKEW_SEC: i64 = 5 * 60;

/// How long ago systemd's last restart of a crashed service must be to be no news any more, in seconds.
const CALM_SEC: i64 = 10 * 60;

/// What the reports are held against.
#[derive(Debug, Clone)]
pub struct Expected<'a> {
    /// The manifest in force.
    pub manifest: &'a Manifest,
    /// The digest of each of its entries ([`crate::manifest::entry`]).
    pub entries: BTreeMap<ServiceName, String>,
    /// The identity of the store that it was read from; None: not compared.
    pub store: Option<String>,
    /// The host that the reader sits at.
    pub here: Option<HostName>,
}

impl<'a> Expected<'a> {
    /// The manifest alone: entries and stores are not compared.
    pub fn only(manifest: &'a Manifest) -> Self {
        Expected { manifest, entries: BTreeMap::new(), store: None, here: None }
    }

    /// The store that a host obeys, if it is another one.
    fn other_store<'s>(&self, state: &'s State) -> Option<&'s str> {
        let theirs = state.store.as_deref()?;
        self.store.as_deref().is_some_and(|ours| ours != theirs).then_some(theirs)
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
        match self {
            HostReport::Missing | HostReport::Unreadable(_) | HostReport::Silent(_) | HostReport::Read(_) => {
                None
            }
            HostReport::Live(_, live) => Some(live),
        }
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
    /// What the manifest names was tried and refused.
    Rejected,
    /// The host's report is missing or unreadable, or it does not answer.
    Unknown,
}

impl ServiceStatus {
    /// The word in the formats.
    pub fn as_str(self) -> &'static str {
        match self {
            ServiceStatus::Running => "running",
            ServiceStatus::Waiting => "waiting",
            ServiceStatus::Stopped => "stopped",
            ServiceStatus::Pinned => "pinned",
            ServiceStatus::Pending => "pending",
            ServiceStatus::Differs => "differs",
            ServiceStatus::Missing => "missing",
            ServiceStatus::Leftover => "leftover",
            ServiceStatus::Removing => "removing",
            ServiceStatus::Failed => "failed",
            ServiceStatus::Rejected => "rejected",
            ServiceStatus::Unknown => "unknown",
        }
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
    wanted: &Expected<'_>,
    reports: &BTreeMap<HostName, HostReport>,
    now: Timestamp,
    only: Only<'_>,
) -> StatusReport {
    let manifest = wanted.manifest;
    let mut picture = StatusReport {
        version: STATUS_VERSION,
        serial: manifest.serial,
        generation: manifest.generation,
        hosts: Vec::new(),
        rows: Vec::new(),
    };
    for service in manifest.services.iter().filter(|s| only.service(&s.name)) {
        for host in service.hosts.iter().filter(|h| only.host(h)) {
            let report = reports.get(host).unwrap_or(&HostReport::Missing);
            picture.rows.push(row(wanted, service, host, report, now));
        }
    }
    for (host, report) in reports.iter().filter(|(h, _)| only.host(h)) {
        let placed = |name: &ServiceName| {
            manifest.service(name.as_str()).is_some_and(|service| service.hosts.contains(host))
        };
        let named = manifest.services.iter().any(|s| s.hosts.contains(host));
        if let Some(state) = report.state()
            && (named || now.0.saturating_sub(state.checked_at.0) <= STALE_SEC)
            && wanted.other_store(state).is_none()
        {
            let strangers = state.services.values().filter(|s| only.service(&s.name) && !placed(&s.name));
            picture.rows.extend(strangers.map(|s| leftover(wanted, state, s, now)));
            // What the state does not know: a pass that ended before it could take that down.
            let unknown = report.live().into_iter().flat_map(|live| &live.services);
            let unknown = unknown.filter(|(name, _)| {
                only.service(name) && !placed(name) && !state.services.contains_key(*name)
            });
            picture.rows.extend(unknown.map(|(name, unit)| forgotten(state, name, unit)));
        }
    }
    for (host, report) in reports {
        if picture.rows.iter().any(|r| r.host == *host) {
            picture.hosts.push(host_row(wanted, host, report, now));
        }
    }
    picture
}

/// Whether the host has worked from an older manifest, and whether that has lasted too long.
fn behind(manifest: &Manifest, state: &State, now: Timestamp) -> (bool, bool) {
    let behind = state.serial.is_none_or(|serial| serial < manifest.serial);
    (behind, behind && now.0.saturating_sub(manifest.generation.0) > PICK_UP_SEC)
}

/// A row of which nothing is known.
fn blank(service: &ServiceName, host: &HostName) -> ServiceRow {
    ServiceRow {
        service: service.clone(),
        host: host.clone(),
        wanted: None,
        revision: None,
        running: None,
        status: ServiceStatus::Unknown,
        since: None,
        reported_at: None,
        exposure: None,
        restarts: None,
        off: true,
        problem: None,
        attempted: None,
        journal: Vec::new(),
    }
}

fn row(
    wanted: &Expected<'_>,
    service: &Service,
    host: &HostName,
    report: &HostReport,
    now: Timestamp,
) -> ServiceRow {
    let manifest = wanted.manifest;
    let mut row = ServiceRow {
        wanted: service.artifact.store_path.path().cloned(),
        revision: service.revision.clone(),
        ..blank(&service.name, host)
    };
    let state = match report {
        HostReport::Missing => return ServiceRow { problem: Some(format!("{host} never reported")), ..row },
        HostReport::Unreadable(why) | HostReport::Silent(why) => {
            return ServiceRow { problem: Some(why.clone()), ..row };
        }
        HostReport::Read(state) | HostReport::Live(state, _) => state,
    };
    row.reported_at = Some(state.checked_at);
    if let Some(theirs) = wanted.other_store(state) {
        return ServiceRow { problem: Some(format!("{host} reads {theirs}")), ..row };
    }
    let (behind, overdue) = behind(manifest, state, now);
    let overdue_text = || overdue.then(|| format!("{host} has not picked up version {}", manifest.serial));
    let Some(entry) = state.services.get(&service.name) else {
        (row.status, row.off, row.problem) = if behind {
            (ServiceStatus::Pending, overdue, overdue_text())
        } else {
            let why =
                "worked from this manifest and does not know the service; see 'omni-deploy logs deployer'";
            (ServiceStatus::Missing, true, Some(format!("{host} {why}")))
        };
        return row;
    };
    row.running = entry.store_path.clone();
    row.since = Some(entry.since);
    row.exposure = entry.exposure;
    let same_path = match &service.artifact.store_path {
        ArtifactPath::Placeholder => entry.status == ServicePhase::Waiting,
        ArtifactPath::Path(path) => entry.store_path.as_ref() == Some(path),
    };
    // The path alone is not what the manifest says. An older program tells no more than which version it saw.
    let same_entry = match (&entry.entry, wanted.entries.get(&service.name)) {
        (Some(theirs), Some(ours)) => theirs == ours,
        (None, Some(_)) => !behind,
        (_, None) => true,
    };
    let same = same_path && same_entry;
    let unlike = if behind { ServiceStatus::Pending } else { ServiceStatus::Differs };
    row.status = match entry.status {
        ServicePhase::Failed => ServiceStatus::Failed,
        ServicePhase::Rejected => ServiceStatus::Rejected,
        ServicePhase::Stopped => ServiceStatus::Stopped,
        ServicePhase::Running if entry.pinned_since.is_some() => ServiceStatus::Pinned,
        ServicePhase::Running if same => ServiceStatus::Running,
        ServicePhase::Waiting if same => ServiceStatus::Waiting,
        ServicePhase::Running | ServicePhase::Waiting => unlike,
    };
    row.off = match row.status {
        ServiceStatus::Running | ServiceStatus::Waiting | ServiceStatus::Stopped | ServiceStatus::Pinned => {
            false
        }
        ServiceStatus::Pending => overdue,
        ServiceStatus::Differs
        | ServiceStatus::Missing
        | ServiceStatus::Leftover
        | ServiceStatus::Removing
        | ServiceStatus::Failed
        | ServiceStatus::Rejected
        | ServiceStatus::Unknown => true,
    };
    let here = wanted.here.as_ref();
    let typed = |command: String| hint::typed(host, here, &command);
    match row.status {
        ServiceStatus::Failed | ServiceStatus::Rejected => explain(&mut row, entry.failure.as_ref(), here),
        ServiceStatus::Pending => row.problem = overdue_text(),
        ServiceStatus::Stopped => {
            let resume = typed(format!("deployer resume {}", service.name));
            row.problem = Some(match entry.paused_until {
                Some(until) => format!("stopped by 'deployer pause' until {until}, or '{resume}'"),
                None => format!("stopped by 'deployer pause' until '{resume}'"),
            });
        }
        ServiceStatus::Pinned => {
            row.problem = Some(format!(
                "held by 'deployer rollback' until the manifest names another path or '{}'",
                typed(format!("deployer rollback --unpin {}", service.name))
            ));
        }
        ServiceStatus::Running if entry.secrets_changed => {
            row.problem = Some(format!(
                "its secrets file was changed after it started; '{}' picks that up",
                typed(format!("systemctl restart {}", service.name))
            ));
        }
        ServiceStatus::Differs if same_path => {
            row.problem = Some(format!(
                "{host} worked from this version and has another entry of it; see 'omni-deploy logs deployer'"
            ));
        }
        ServiceStatus::Differs => {
            row.problem = Some(format!(
                "{host} worked from this manifest and runs another version; see 'omni-deploy logs deployer'"
            ));
        }
        _ => {}
    }
    if let Some(live) = report.live() {
        now_row(&mut row, live, here);
        visited(&mut row, live, here);
    }
    if let Some(attention) = entry.attention() {
        let attention = hint::translated(&attention, host, here);
        row.off = true;
        row.problem =
            Some(row.problem.map_or(attention.clone(), |problem| format!("{problem}; {attention}")));
    }
    row
}

/// What systemd says now beats what the last pass left.
fn now_row(row: &mut ServiceRow, live: &Live, here: Option<&HostName>) {
    let Some(unit) = live.services.get(&row.service) else { return };
    row.restarts = Some(unit.restarts);
    let does = format!("{}/{}", unit.active, unit.sub);
    let logs = format!("'omni-deploy logs {}'", row.service);
    let at_work = live.deployer.as_ref().is_some_and(|d| d.active == "activating");
    let ended = match unit.result.as_str() {
        "success" | "" => String::new(),
        result => format!(" ({result}, {})", unit.exit_status),
    };
    match row.status {
        ServiceStatus::Stopped if unit.running() => {
            row.off = true;
            row.problem = Some(format!(
                "paused, but it runs now; '{}' stops it again",
                hint::typed(&row.host, here, "deployer")
            ));
        }
        ServiceStatus::Running | ServiceStatus::Pinned | ServiceStatus::Pending | ServiceStatus::Differs
            if row.running.is_some() && !unit.running() =>
        {
            if at_work {
                row.status = ServiceStatus::Pending;
                row.off = false;
                row.problem = None;
                return;
            }
            row.status = ServiceStatus::Failed;
            row.off = true;
            let starts =
                format!("the next pass starts it again, '{}' now", hint::typed(&row.host, here, "deployer"));
            row.problem = Some(match (unit.load.as_str(), unit.active.as_str(), unit.sub.as_str()) {
                ("loaded", _, "auto-restart") if unit.restarts == 0 => {
                    format!("its process ended{ended}, and systemd is about to restart it; {logs} shows why")
                }
                ("loaded", _, "auto-restart") => format!(
                    "its process keeps ending{ended}: systemd has restarted it {} time(s) and is about to again; {logs} \
                     shows why",
                    unit.restarts
                ),
                ("loaded", "failed", _) => format!("it has failed{ended}; {starts}, {logs} shows why"),
                ("loaded", "inactive", _) => {
                    format!("it is stopped now: somebody stopped it, or it ended by itself{ended}; {starts}")
                }
                ("loaded", ..) => format!("it is {does} now; {logs} shows why"),
                (load, ..) => format!("systemd has no unit of it ({load}); {starts}"),
            });
            if matches!(unit.active.as_str(), "inactive" | "failed") {
                row.running = None;
            }
        }
        ServiceStatus::Running | ServiceStatus::Pinned | ServiceStatus::Differs if unit.restarts > 0 => {
            let age = unit.started.map(|t| live.at.0.saturating_sub(t.0));
            if age.is_some_and(|age| age < CALM_SEC) {
                row.off = true;
                row.problem = Some(format!(
                    "it crashed: systemd has restarted it {} time(s), the last {} ago; {logs} shows why",
                    unit.restarts,
                    human_seconds(age.unwrap_or_default().max(0))
                ));
            }
        }
        _ => {}
    }
}

/// What visitors of its domain meet now; of a service that is down that is known.
fn visited(row: &mut ServiceRow, live: &Live, here: Option<&HostName>) {
    if row.running.is_none()
        || !matches!(row.status, ServiceStatus::Running | ServiceStatus::Pinned | ServiceStatus::Differs)
    {
        return;
    }
    let of_it = live.domains.iter().filter(|v| v.verdict != Verdict::Ok && v.services.contains(&row.service));
    for visit in of_it {
        row.off |= visit.verdict == Verdict::Fail;
        let said = format!("{}: {}", visit.domain, hint::translated(&visit.text, &row.host, here));
        row.problem = Some(row.problem.take().map_or(said.clone(), |problem| format!("{problem}; {said}")));
    }
}

fn explain(row: &mut ServiceRow, failure: Option<&FailureRecord>, here: Option<&HostName>) {
    let Some(failure) = failure else {
        row.problem = Some("the host gives no reason; see 'omni-deploy logs deployer'".into());
        return;
    };
    let FailureRecord { reason, attempted, at: _, journal, attempts: _, inputs: _, kept_out: _ } = failure;
    let reason = hint::translated(reason, &row.host, here);
    row.problem = Some(if attempted.is_some() && *attempted != row.wanted {
        format!("{reason} (the manifest names another version by now)")
    } else {
        reason
    });
    row.attempted = attempted.clone();
    row.journal = journal.clone();
}

fn leftover(wanted: &Expected<'_>, state: &State, entry: &ServiceState, now: Timestamp) -> ServiceRow {
    let (behind, overdue) = behind(wanted.manifest, state, now);
    let status = match (entry.removing, behind) {
        (true, _) => ServiceStatus::Removing,
        (false, true) => ServiceStatus::Pending,
        (false, false) => ServiceStatus::Leftover,
    };
    let mut row = ServiceRow {
        running: entry.store_path.clone(),
        status,
        since: Some(entry.since),
        reported_at: Some(state.checked_at),
        exposure: entry.exposure,
        off: status != ServiceStatus::Pending || overdue,
        ..blank(&entry.name, &state.host)
    };
    if status != ServiceStatus::Pending {
        match &entry.failure {
            Some(failure) => explain(&mut row, Some(failure), wanted.here.as_ref()),
            None => {
                row.problem =
                    Some("the manifest does not place it here; the next pass should remove it".into());
            }
        }
    }
    row
}

/// A unit of ours that neither the manifest nor the host's state knows.
fn forgotten(state: &State, name: &ServiceName, unit: &Unit) -> ServiceRow {
    ServiceRow {
        status: ServiceStatus::Leftover,
        reported_at: Some(state.checked_at),
        restarts: Some(unit.restarts),
        problem: Some(format!(
            "its unit is there ({}/{}), and the manifest does not place it here; the next pass should remove it",
            unit.active, unit.sub
        )),
        ..blank(name, &state.host)
    }
}

fn host_row(wanted: &Expected<'_>, host: &HostName, report: &HostReport, now: Timestamp) -> HostRow {
    let manifest = wanted.manifest;
    let mut row = HostRow {
        host: host.clone(),
        reported_at: None,
        serial: None,
        store: None,
        last_error: None,
        off: true,
        problems: Vec::new(),
    };
    let here = wanted.here.as_ref();
    let state = match report {
        HostReport::Missing => {
            row.problems.push(format!(
                "never reported; check 'systemctl status deployer.timer' on {host}, and that it can write hosts/{host}.json"
            ));
            return row;
        }
        HostReport::Unreadable(why) => {
            row.problems
                .push(format!("its report cannot be read: {why}; upgrade whichever omni-deploy is older"));
            return row;
        }
        HostReport::Silent(why) => {
            row.problems.push(why.clone());
            return row;
        }
        HostReport::Read(state) | HostReport::Live(state, _) => state,
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
        store,
        manifest_hash: _,
        machine,
        other_machine,
        manager_environment,
        last_error,
        draining: _,
        services: _,
    } = state.as_ref();
    row.reported_at = Some(*checked_at);
    row.serial = *serial;
    row.store = store.clone();
    if let (Some(theirs), Some(ours)) = (wanted.other_store(state), &wanted.store) {
        row.problems.push(format!(
            "it reads {theirs}, and this is {ours}; correct 'store' here ('omni-deploy config') or in \
             /etc/omni-deploy/config.json there"
        ));
    }
    let said = |text: &str| hint::translated(text, host, here);
    if let Some(error) = last_error {
        row.last_error = Some(error.reason.clone());
        let age = error.since.age(now);
        row.problems.push(format!("last pass failed: {} (for {age})", said(&error.reason)));
    }
    if !manager_environment.is_empty() {
        row.problems.push(said(&systemd::given_text(manager_environment)));
    }
    if let (Some(other), Some(this)) = (other_machine, machine) {
        row.problems.push(other.text(host, this));
    }
    let age = now.0.saturating_sub(checked_at.0);
    if age > STALE_SEC {
        row.problems.push(format!(
            "silent for {}; check '{}'",
            human_seconds(age),
            hint::typed(host, here, "systemctl status deployer.timer")
        ));
    } else if age < -SKEW_SEC {
        row.problems.push(format!("its clock is {} ahead of this one; check both", human_seconds(-age)));
    }
    if let Some(error) = manifest_error.as_ref().filter(|e| !state.failed_with(e)) {
        row.problems.push(format!("works from its last good manifest: {}", said(error)));
    }
    if route.status == RouteStatus::Pending {
        let why = route.reason.as_deref().unwrap_or("the host gives no reason");
        row.problems.push(format!("Caddy's route is pending: {}", said(why)));
    }
    if wanted.other_store(state).is_none() && behind(manifest, state, now).1 {
        let had = serial.map_or("none".into(), |s| s.to_string());
        row.problems.push(format!(
            "has not picked up version {} in {} (it has {had}); force it with '{}'",
            manifest.serial,
            manifest.generation.age(now),
            hint::typed(host, here, "systemctl start deployer")
        ));
    }
    if let Some(live) = report.live() {
        now_host(&mut row, live, last_error.is_some(), here);
    }
    row.off = !row.problems.is_empty();
    row
}

/// What systemd says now of the deployer and its timer, and what else the host found when it was asked.
fn now_host(row: &mut HostRow, live: &Live, told: bool, here: Option<&HostName>) {
    let Live { at: _, services: _, deployer, timer, last_line, domains: _, problems } = live;
    let host = row.host.clone();
    let logs = format!("'omni-deploy logs deployer --host {host}'");
    if let Some(deployer) = deployer.as_ref().filter(|d| d.load != "loaded") {
        row.problems.push(format!(
            "its deployer.service is {}; install it with contrib/install.sh",
            if deployer.load.is_empty() { "not there" } else { &deployer.load }
        ));
    } else if let Some(deployer) = deployer.as_ref().filter(|d| d.result != "success")
        && !told
        // Those are of services, whose rows say so.
        && !(deployer.result == "exit-code" && matches!(deployer.exit_status, 3 | 4))
    {
        let line = last_line.as_ref().map(|l| format!(": {}", hint::translated(l, &host, here)));
        // With 0 it was not the pass that ended so, but what its unit runs before or after it.
        let status = match deployer.exit_status {
            0 => String::new(),
            status => format!(", {status}"),
        };
        let line = line.unwrap_or_default();
        row.problems.push(format!("last pass failed ({}{status}){line}; see {logs}", deployer.result));
    }
    if let Some(timer) = timer.as_ref().filter(|t| t.active != "active") {
        row.problems.push(format!(
            "its deployer.timer is {}: no pass comes by itself; '{}'",
            if timer.active.is_empty() { "not there" } else { &timer.active },
            hint::typed(&host, here, "systemctl enable --now deployer.timer")
        ));
    }
    row.problems.extend(problems.iter().map(|p| hint::translated(p, &host, here)));
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

    fn judged(manifest: &Manifest, state: State) -> StatusReport {
        judge(&Expected::only(manifest), &reports(HostReport::Read(Box::new(state))), NOW, Only::default())
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
            assert_eq!(state.exit_code(), 3, "{file}");
            let picture = judged(&manifest(Some('1'), 60), state);
            let row = &picture.rows[0];
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
            let picture = judged(&manifest(target, age), state(serial, &services));
            let row = &picture.rows[0];
            assert_eq!((row.status, row.off), (standing, off), "{target:?} {age} {serial} {services:?}");
            assert_eq!(picture.rows.len(), 1);
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
        let picture = judged(&manifest(Some('1'), 60), state);
        assert_eq!(
            (picture.rows[0].exposure, picture.needs_attention()),
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
            let picture = judge(&Expected::only(&manifest), &reports(report.clone()), NOW, Only::default());
            assert_eq!(picture.rows[0].status, ServiceStatus::Unknown);
            assert!(picture.needs_attention() && picture.hosts[0].problems.len() == 1, "{report:?}");
        }
    }

    #[test]
    fn silence_a_pending_route_and_a_bad_manifest_are_off_though_every_service_runs() {
        let manifest = manifest(Some('1'), 60);
        let well = state(7, &[("ava", ServicePhase::Running, Some('1'))]);
        assert!(!judged(&manifest, well.clone()).needs_attention());
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
            assert_eq!(picture.needs_attention(), word.is_some(), "{word:?}");
            let said = picture.hosts[0].problems.join(" ");
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
        let picture = judged(&manifest, state(6, &both));
        assert_eq!((picture.rows[1].status, picture.rows[1].off), (ServiceStatus::Pending, false));
        let picture = judged(&manifest, state(7, &both));
        assert_eq!((picture.rows[1].status, picture.rows[1].off), (ServiceStatus::Leftover, true));
    }

    #[test]
    fn a_host_no_service_names_is_shown_only_while_it_still_runs_something_and_reports() {
        let mut manifest = manifest(Some('1'), 60);
        manifest.services[0].hosts = vec![host("other")];
        let mut left = state(7, &[("ava", ServicePhase::Running, Some('1'))]);
        let of_biz = |p: &StatusReport| p.rows.iter().filter(|r| r.host.as_str() == "biz").count();
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
            let picture = judge(&Expected::only(&manifest), &BTreeMap::new(), NOW, Only { service, host });
            picture.rows.iter().map(|r| format!("{}@{}", r.service, r.host)).collect::<Vec<_>>()
        };
        assert_eq!(shown(None, None), ["ava@biz", "web@biz", "web@two"]);
        assert_eq!(shown(Some("web"), None), ["web@biz", "web@two"]);
        assert_eq!(shown(None, Some("two")), ["web@two"]);
        assert_eq!(shown(Some("ava"), Some("two")), Vec::<String>::new());
    }
}
