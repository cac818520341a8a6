//! A host as a whole.

use super::{Expected, HostReport, HostRow, Progress};
use crate::clock::{Timestamp, human_seconds};
use crate::deployer::live::Live;
use crate::deployer::state::{RouteStatus, SILENT_SEC, State};
use crate::names::HostName;
use crate::status::hint;
use crate::systemd;

/// How far ahead of ours a host's clock may be, in seconds.
pub(super) const SKEW_SEC: i64 = 5 * 60;

pub(super) fn row(wanted: &Expected<'_>, host: &HostName, report: &HostReport, now: Timestamp) -> HostRow {
    let state = report.state();
    let mut row = HostRow {
        host: host.clone(),
        reported_at: state.map(|state| state.checked_at),
        serial: state.and_then(|state| state.serial),
        store: state.and_then(|state| state.store.clone()),
        last_error: state.and_then(|state| Some(state.last_error.as_ref()?.reason.clone())),
        off: true,
        problems: match report {
            HostReport::Missing => vec![format!(
                "never reported; check 'systemctl status deployer.timer' on {host}, and that it can write hosts/{host}.json"
            )],
            HostReport::Unreadable(why) => {
                vec![format!("its report cannot be read: {why}; upgrade whichever omni-deploy is older")]
            }
            HostReport::Silent(why) => vec![why.clone()],
            HostReport::Read(state) | HostReport::Live(state, _) => problems(wanted, host, state, now),
        },
    };
    if let Some(live) = report.live() {
        apply_live(&mut row, live, &wanted.here);
    }
    row.off = !row.problems.is_empty();
    row
}

/// What a host's state says is wrong with it.
fn problems(wanted: &Expected<'_>, host: &HostName, state: &State, now: Timestamp) -> Vec<String> {
    let (here, manifest) = (&wanted.here, wanted.manifest);
    let mut problems = Vec::new();
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
        store: _,
        manifest_hash: _,
        machine,
        other_machine,
        manager_environment,
        last_error,
        draining: _,
        services: _,
    } = state;
    if let Some(theirs) = wanted.other_store(state) {
        problems.push(format!(
            "it reads {theirs}, and this is {}; correct 'store' here ('omni-deploy config') or in \
             /etc/omni-deploy/config.json there",
            wanted.store
        ));
    }
    let said = |text: &str| hint::translated(text, host, here);
    if let Some(error) = last_error {
        let age = error.since.age(now);
        problems.push(format!("last pass failed: {} (for {age})", said(&error.reason)));
    }
    if !manager_environment.is_empty() {
        problems.push(said(&systemd::given_text(manager_environment)));
    }
    if let (Some(other), Some(this)) = (other_machine, machine) {
        problems.push(other.text(host, this));
    }
    let age = now.0.saturating_sub(checked_at.0);
    if age > SILENT_SEC {
        problems.push(format!(
            "silent for {}; check '{}'",
            human_seconds(age),
            hint::typed(host, here, "systemctl status deployer.timer")
        ));
    } else if age < -SKEW_SEC {
        problems.push(format!("its clock is {} ahead of this one; check both", human_seconds(-age)));
    }
    if let Some(error) = manifest_error.as_ref().filter(|e| !state.failed_with(e)) {
        problems.push(format!("works from its last good manifest: {}", said(error)));
    }
    if route.status == RouteStatus::Pending {
        let why = route.reason.as_deref().unwrap_or("the host gives no reason");
        problems.push(format!("Caddy's route is pending: {}", said(why)));
    }
    if wanted.other_store(state).is_none() && Progress::of(manifest, state, now) == Progress::Overdue {
        let had = serial.map_or("none".into(), |s| s.to_string());
        problems.push(format!(
            "has not picked up version {} in {} (it has {had}); force it with '{}'",
            manifest.serial,
            manifest.generation.age(now),
            hint::typed(host, here, "systemctl start deployer")
        ));
    }
    problems
}

/// What systemd says now of the deployer and its timer, and what else the host found when it was asked.
fn apply_live(row: &mut HostRow, live: &Live, here: &HostName) {
    let Live { at: _, services: _, deployer, timer, last_line, domains: _, problems } = live;
    let host = row.host.clone();
    let logs = format!("'omni-deploy logs deployer --host {host}'");
    if let Some(deployer) = deployer.as_ref().filter(|d| d.load != "loaded") {
        row.problems.push(format!(
            "its deployer.service is {}; install it with contrib/install.sh",
            if deployer.load.is_empty() { "not there" } else { &deployer.load }
        ));
    } else if let Some(deployer) = deployer.as_ref().filter(|d| d.result != "success")
        && row.last_error.is_none()
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
            "its deployer.timer is {}: no pass starts by itself; '{}'",
            if timer.active.is_empty() { "not there" } else { &timer.active },
            hint::typed(&host, here, "systemctl enable --now deployer.timer")
        ));
    }
    row.problems.extend(problems.iter().map(|p| hint::translated(p, &host, here)));
}
