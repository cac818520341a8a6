//! One service on one host.

use super::{Expected, HostReport, Progress, ServiceRow, ServiceStatus};
use crate::clock::{Timestamp, human_seconds};
use crate::deployer::live::{Live, Unit, Verdict};
use crate::deployer::state::{FailureRecord, ServicePhase, ServiceState, State};
use crate::manifest::{ArtifactPath, Service};
use crate::names::{HostName, ServiceName};
use crate::status::hint;

/// How long ago systemd's last restart of a crashed service must be to be no news any more, in seconds.
const CALM_SEC: i64 = 10 * 60;

impl ServiceRow {
    fn add_problem(&mut self, problem: String) {
        self.problem = Some(match self.problem.take() {
            Some(before) => format!("{before}; {problem}"),
            None => problem,
        });
    }
}

/// A row of which nothing is known.
fn unknown(service: &ServiceName, host: &HostName) -> ServiceRow {
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

pub(super) fn row(
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
        ..unknown(&service.name, host)
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
    let progress = Progress::of(manifest, state, now);
    let overdue = progress == Progress::Overdue;
    let overdue_text = overdue.then(|| format!("{host} has not picked up version {}", manifest.serial));
    let Some(entry) = state.services.get(&service.name) else {
        (row.status, row.off, row.problem) = if progress == Progress::Current {
            let why =
                "worked from this manifest and does not know the service; see 'omni-deploy logs deployer'";
            (ServiceStatus::Missing, true, Some(format!("{host} {why}")))
        } else {
            (ServiceStatus::Pending, overdue, overdue_text)
        };
        return row;
    };
    row.running = entry.store_path.clone();
    row.since = Some(entry.since);
    row.exposure = entry.exposure;
    row.status = status(service, entry, wanted.entries.get(&service.name), progress);
    row.off = match row.status {
        ServiceStatus::Running | ServiceStatus::Waiting | ServiceStatus::Stopped | ServiceStatus::Pinned => {
            false
        }
        ServiceStatus::Pending => overdue,
        _ => true,
    };
    let here = &wanted.here;
    match row.status {
        ServiceStatus::Failed | ServiceStatus::Rejected => explain(&mut row, entry.failure.as_ref(), here),
        ServiceStatus::Pending => row.problem = overdue_text,
        status => row.problem = remark(status, service, entry, host, here),
    }
    if let Some(live) = report.live() {
        apply_live(&mut row, live, here);
        apply_domains(&mut row, live, here);
    }
    if let Some(attention) = entry.attention() {
        row.off = true;
        row.add_problem(hint::translated(&attention, host, here));
    }
    row
}

fn has_its_path(service: &Service, entry: &ServiceState) -> bool {
    match &service.artifact.store_path {
        ArtifactPath::Placeholder => entry.status == ServicePhase::Waiting,
        ArtifactPath::Path(path) => entry.store_path.as_ref() == Some(path),
    }
}

/// What a host's entry comes to; `digest` is that of the manifest's.
fn status(
    service: &Service,
    entry: &ServiceState,
    digest: Option<&String>,
    progress: Progress,
) -> ServiceStatus {
    // The path alone is not what the manifest says. An older program tells no more than which version it saw.
    let same_entry = match (&entry.entry, digest) {
        (Some(theirs), Some(ours)) => theirs == ours,
        (None, Some(_)) => progress == Progress::Current,
        (_, None) => true,
    };
    let same = same_entry && has_its_path(service, entry);
    match entry.status {
        ServicePhase::Failed => ServiceStatus::Failed,
        ServicePhase::Rejected => ServiceStatus::Rejected,
        ServicePhase::Stopped => ServiceStatus::Stopped,
        ServicePhase::Running if entry.pinned_since.is_some() => ServiceStatus::Pinned,
        ServicePhase::Running if same => ServiceStatus::Running,
        ServicePhase::Waiting if same => ServiceStatus::Waiting,
        ServicePhase::Running | ServicePhase::Waiting if progress == Progress::Current => {
            ServiceStatus::Differs
        }
        ServicePhase::Running | ServicePhase::Waiting => ServiceStatus::Pending,
    }
}

/// What is to be said of a service that neither failed nor is waited for.
fn remark(
    status: ServiceStatus,
    service: &Service,
    entry: &ServiceState,
    host: &HostName,
    here: &HostName,
) -> Option<String> {
    let name = &service.name;
    let typed = |command: String| hint::typed(host, here, &command);
    match status {
        ServiceStatus::Stopped => {
            let resume = typed(format!("deployer resume {name}"));
            Some(match entry.paused_until {
                Some(until) => format!("stopped by 'deployer pause' until {until}, or '{resume}'"),
                None => format!("stopped by 'deployer pause' until '{resume}'"),
            })
        }
        ServiceStatus::Pinned => Some(format!(
            "held by 'deployer rollback' until the manifest names another path or '{}'",
            typed(format!("deployer rollback --unpin {name}"))
        )),
        ServiceStatus::Running if entry.secrets_changed => Some(format!(
            "its secrets file was changed after it started; '{}' picks that up",
            typed(format!("systemctl restart {name}"))
        )),
        ServiceStatus::Differs if has_its_path(service, entry) => Some(format!(
            "{host} worked from this version and has another entry of it; see 'omni-deploy logs deployer'"
        )),
        ServiceStatus::Differs => Some(format!(
            "{host} worked from this manifest and runs another version; see 'omni-deploy logs deployer'"
        )),
        _ => None,
    }
}

/// What systemd says now beats what the last pass left.
fn apply_live(row: &mut ServiceRow, live: &Live, here: &HostName) {
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
fn apply_domains(row: &mut ServiceRow, live: &Live, here: &HostName) {
    if row.running.is_none()
        || !matches!(row.status, ServiceStatus::Running | ServiceStatus::Pinned | ServiceStatus::Differs)
    {
        return;
    }
    for visit in live.domains.iter().filter(|visit| visit.verdict != Verdict::Ok) {
        if !visit.services.contains(&row.service) {
            continue;
        }
        row.off |= visit.verdict == Verdict::Fail;
        row.add_problem(format!("{}: {}", visit.domain, hint::translated(&visit.text, &row.host, here)));
    }
}

fn explain(row: &mut ServiceRow, failure: Option<&FailureRecord>, here: &HostName) {
    let Some(failure) = failure else {
        row.problem = Some("the host gives no reason; see 'omni-deploy logs deployer'".into());
        return;
    };
    let FailureRecord { reason, attempted, at: _, journal, attempts: _, inputs: _, kept_out: _ } = failure;
    let is_old = attempted.is_some() && *attempted != row.wanted;
    let remark = if is_old { " (the manifest names another version by now)" } else { "" };
    row.problem = Some(hint::translated(reason, &row.host, here) + remark);
    row.attempted = attempted.clone();
    row.journal = journal.clone();
}

pub(super) fn leftover(
    wanted: &Expected<'_>,
    state: &State,
    entry: &ServiceState,
    now: Timestamp,
) -> ServiceRow {
    let progress = Progress::of(wanted.manifest, state, now);
    let status = match progress {
        _ if entry.removing => ServiceStatus::Removing,
        Progress::Current => ServiceStatus::Leftover,
        Progress::Behind | Progress::Overdue => ServiceStatus::Pending,
    };
    let mut row = ServiceRow {
        running: entry.store_path.clone(),
        status,
        since: Some(entry.since),
        reported_at: Some(state.checked_at),
        exposure: entry.exposure,
        off: status != ServiceStatus::Pending || progress == Progress::Overdue,
        ..unknown(&entry.name, &state.host)
    };
    match &entry.failure {
        _ if status == ServiceStatus::Pending => {}
        Some(failure) => explain(&mut row, Some(failure), &wanted.here),
        None => row.add_problem("the manifest does not place it here; the next pass should remove it".into()),
    }
    row
}

/// A unit of ours that neither the manifest nor the host's state knows.
pub(super) fn unknown_unit(state: &State, name: &ServiceName, unit: &Unit) -> ServiceRow {
    ServiceRow {
        status: ServiceStatus::Leftover,
        reported_at: Some(state.checked_at),
        restarts: Some(unit.restarts),
        problem: Some(format!(
            "its unit is there ({}/{}), and the manifest does not place it here; the next pass should remove it",
            unit.active, unit.sub
        )),
        ..unknown(name, &state.host)
    }
}
