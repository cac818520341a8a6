//! `omni-deploy status`: what should run, what runs, and what is off. Everything a host wrote is shown with its
//! control characters escaped.

use super::table::{self, Cell};
use super::{Call, print};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::error::{Error, Exit, Result, did_you_mean};
use crate::log::{self, printable, printable_json};
use crate::manifest::publish;
use crate::manifest::trust::Author;
use crate::manifest::{edit, entry};
use crate::names::{HostName, ServiceName, StorePath};
use crate::parallel;
use crate::push::namespace::DIRTY;
use crate::status::judge::{Expected, ServiceRow, ServiceStatus, StatusReport, judge};
use crate::status::reports;
use crate::store::HOSTS_PREFIX;
use argh::{ArgsInfo, FromArgs};
use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::time::Duration;

/// Show what should run and what does, from the hosts' reports. There is a row for each service on each host.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "status",
    example = "{command_name}\n{command_name} ava --live\n{command_name} --json | jq '.rows[] | select(.off)'",
    note = "STATUS is one of running (the whole entry of the manifest), pending (the host does not have this \
            entry yet; needs attention after 15 minutes), waiting (nothing was pushed yet), stopped (paused on purpose), pinned (held \
            at an earlier version on purpose), failed, rejected (tried, and did not come up; not tried again automatically), differs, \
            missing, leftover (not as the manifest says, although the host has read it), removing (no longer in the \
            manifest, and not gone yet), unknown (no readable report, or the host reads another store). A host that has \
            been silent for 70 minutes needs attention too.",
    note = "Below the table: the reason and the last log lines of whatever needs attention; for one service also how exposed its \
            unit is, as 'systemd-analyze security' rates it from 0.0 to 10.0. With --live also the last pass and the \
            timer, and under RESTARTS how often systemd restarted a unit.",
    error_code(0, "all is as the manifest says, or on its way there"),
    error_code(1, "no manifest, no such service, or the store cannot be reached"),
    error_code(3, "something needs attention")
)]
pub(super) struct Args {
    /// only this service
    #[argh(positional)]
    service: Option<String>,
    /// only this host
    #[argh(option)]
    host: Option<String>,
    /// print JSON
    #[argh(switch)]
    json: bool,
    /// show it again every two seconds; on a pipe, when something changed
    #[argh(switch)]
    watch: bool,
    /// ask the hosts over ssh what systemd has now, and what visitors of their domains get, instead of reading reports
    #[argh(switch)]
    live: bool,
}

const WATCH_EVERY: Duration = Duration::from_secs(2);

/// The most lines of a journal that are shown for one service.
const JOURNAL_LINES: usize = 10;

/// The most characters that are shown of one line of a host.
const LINE_CHARS: usize = 1000;

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    let settings = call.settings()?;
    if args.watch {
        return watch(&settings, &args);
    }
    let (report, left_out) = look(&settings, &args)?;
    if let Some(left_out) = left_out {
        log::warning(left_out);
    }
    if args.json {
        print(&json(&report, true)?)?;
    } else if report.rows.is_empty() {
        log::info(format!("nothing should run; the manifest is version {}", report.serial));
    } else {
        let colour = std::io::stdout().is_terminal() && log::colour_wanted();
        print(&table(&report, Timestamp::now(), colour, args.service.is_some()))?;
    }
    Ok(if report.needs_attention() { Exit::Degraded } else { Exit::Done })
}

/// What is to be shown, and what is to be said of reports that were not read.
fn look(settings: &Settings, args: &Args) -> Result<(StatusReport, Option<String>)> {
    let store = crate::store::open(&settings.store)?;
    let author = Author::reader(settings, store.as_ref())?;
    let (current, listed) = std::thread::scope(|scope| {
        // Which reports there are is asked for beside the manifest: both answers are waited for.
        let listed = (!args.live).then(|| scope.spawn(|| reports::listed(store.as_ref())));
        let current = publish::read_trusted_bytes(&author);
        (current, listed.map(parallel::joined))
    });
    let (bytes, manifest) = current?;
    let named = manifest.hosts();
    let asked_for = |host: &HostName| args.host.as_deref().is_none_or(|only| only == host.as_str());
    let mut hosts = named.clone();
    if let Some(name) = &args.service {
        let service = manifest.service(name).ok_or_else(|| edit::unknown_service(name, &manifest))?;
        hosts.retain(|h| service.hosts.contains(h));
    }
    hosts.retain(asked_for);
    let (reports, left_out) = match listed {
        Some(listed) => {
            let (placed, others): (BTreeSet<_>, BTreeSet<_>) =
                listed?.into_iter().filter(asked_for).partition(|host| named.contains(host));
            hosts.extend(placed);
            let mut reports = reports::stored(store.as_ref(), &hosts)?;
            let (others, left_out) = reports::stored_others(store.as_ref(), &others)?;
            reports.extend(others);
            (reports, left_out)
        }
        None => (reports::live(settings, store.as_ref(), &hosts)?, 0),
    };
    let left_out = (left_out > 0).then(|| {
        format!(
            "{left_out} reports of hosts that the manifest does not name were not read, since they are many or \
             large; 'omni-deploy status --host HOST' reads one; check who can write to {HOSTS_PREFIX} in {}",
            settings.store
        )
    });
    if let Some(host) = &args.host
        && !reports.keys().any(|h| h.as_str() == host)
    {
        let near = did_you_mean(host, named.iter().map(|h| h.as_str()));
        return Err(Error::new(format!("no host '{host}' in the manifest{near}")));
    }
    let shown = |service: &ServiceName, host: &HostName| {
        asked_for(host) && args.service.as_deref().is_none_or(|only| only == service.as_str())
    };
    let wanted = Expected {
        manifest: &manifest,
        entries: entry::digests(&bytes),
        store: store.identity(),
        here: settings.host.clone(),
    };
    Ok((judge(&wanted, &reports, Timestamp::now(), shown), left_out))
}

/// Shows it until it is interrupted. A store that is out of reach for a while is said once and waited for.
fn watch(settings: &Settings, args: &Args) -> Result<Exit> {
    let terminal = std::io::stdout().is_terminal();
    let mut shown = String::new();
    loop {
        let (text, key) = match look(settings, args) {
            Ok((report, left_out)) => {
                let line = json(&report, false)?;
                let colour = terminal && log::colour_wanted();
                let mut text = table(&report, Timestamp::now(), colour, args.service.is_some());
                text.extend(left_out.map(|left_out| format!("\n{left_out}\n")));
                (if args.json { line.clone() } else { text }, line)
            }
            // What is wrong from the start stays wrong: no such service, no manifest.
            Err(e) if shown.is_empty() => return Err(e),
            Err(e) if !terminal || args.json => {
                if e.to_string() != shown {
                    log::warning(&e);
                }
                shown = e.to_string();
                std::thread::sleep(WATCH_EVERY);
                continue;
            }
            Err(e) => (format!("error: {}\n", printable(&e.to_string())), e.to_string()),
        };
        if terminal && !args.json {
            // Home, then each line with the rest of the old one erased, then everything below: no flicker.
            let text = text.replace('\n', "\x1b[K\n");
            print(&format!("\x1b[H{}{text}\x1b[J", if shown.is_empty() { "\x1b[2J" } else { "" }))?;
        } else if key != shown {
            print(&text)?;
        }
        shown = key;
        std::thread::sleep(WATCH_EVERY);
    }
}

/// The report as JSON, safe to send to a terminal: what would steer one is written as `\u` escapes.
fn json(report: &StatusReport, pretty: bool) -> Result<String> {
    let text = if pretty { serde_json::to_string_pretty(report) } else { serde_json::to_string(report) };
    let text = text.map_err(|e| Error::new(format!("cannot write the status as JSON: {e}")))?;
    Ok(printable_json(&text).into_owned())
}

/// `HASH-NAME` with the hash cut to seven digits, as git does.
fn short(path: &StorePath) -> String {
    let name = path.base().split_once('-').map_or("", |(_, name)| name);
    format!("{}-{name}", &path.hash()[..7])
}

/// The beginning of a commit; what was built from more than that is not shown as it.
fn commit(revision: &str) -> String {
    let commit = revision.strip_suffix(DIRTY).unwrap_or(revision);
    let start: String = commit.chars().take(10).collect();
    start + &revision[commit.len()..]
}

fn wanted(row: &ServiceRow) -> String {
    let Some(path) = &row.wanted else { return "-".into() };
    match &row.revision {
        Some(revision) => format!("{} ({})", short(path), printable(&commit(revision))),
        None => short(path),
    }
}

fn colour_of(row: &ServiceRow) -> &'static str {
    match row.status {
        _ if row.off => "31",
        ServiceStatus::Running => "32",
        _ => "33",
    }
}

fn clipped(text: &str) -> String {
    let line: String = text.chars().take(LINE_CHARS).collect();
    let more = if line.len() < text.len() { "…" } else { "" };
    format!("{}{more}", printable(&line))
}

/// `detail`: what is only of interest where one service is looked at.
fn table(report: &StatusReport, now: Timestamp, colour: bool, detail: bool) -> String {
    // Only of hosts that were asked now it is known.
    let asked = report.rows.iter().any(|row| row.restarts.is_some());
    let head = ["SERVICE", "HOST", "WANTED", "RUNNING", "STATUS"].into_iter();
    let head = head.chain(asked.then_some("RESTARTS")).chain(["SINCE", "REPORT"]);
    let age = |t: Option<Timestamp>| Cell::from(t.map_or("-".into(), |t| t.age(now)));
    let mut lines: Vec<Vec<Cell>> = vec![head.map(Cell::from).collect()];
    lines.extend(report.rows.iter().map(|row| {
        let dirty = row.revision.as_ref().is_some_and(|r| r.ends_with(DIRTY));
        let mut cells = vec![
            Cell::from(row.service.as_str()),
            row.host.as_str().into(),
            Cell::from(wanted(row)).coloured((colour && dirty).then_some("33")),
            row.running.as_ref().map_or("-".into(), short).into(),
            Cell::from(row.status.to_string()).coloured(colour.then(|| colour_of(row))),
        ];
        cells.extend(asked.then(|| Cell::from(row.restarts.map_or("-".into(), |n| n.to_string()))));
        cells.extend([age(row.since), age(row.reported_at)]);
        cells
    }));
    let mut out = table::table(&[], &lines);
    let mut below = String::new();
    for host in &report.hosts {
        for problem in &host.problems {
            below.push_str(&format!("{}: {}\n", host.host, clipped(problem)));
        }
    }
    // Of a host as a whole it was said above, once.
    let is_of_host = |row: &ServiceRow| matches!(row.status, ServiceStatus::Unknown | ServiceStatus::Pending);
    for row in report.rows.iter().filter(|row| !is_of_host(row)) {
        let Some(problem) = &row.problem else { continue };
        let tried = row.attempted.as_ref().map_or(String::new(), |path| format!(" {}", short(path)));
        below.push_str(&format!(
            "{} on {}: {}{tried}: {}\n",
            row.service,
            row.host,
            row.status,
            clipped(problem)
        ));
        for line in &row.journal[row.journal.len().saturating_sub(JOURNAL_LINES)..] {
            below.push_str(&format!("  | {}\n", clipped(line)));
        }
        // They are in a host's report only where that was asked for.
        if row.status == ServiceStatus::Rejected && row.journal.is_empty() && row.restarts.is_none() {
            below.push_str(&format!("  its last lines: omni-deploy status {} --live\n", row.service));
        }
    }
    for row in report.rows.iter().filter(|_| detail) {
        if let Some(exposure) = row.exposure {
            below.push_str(&format!("{} on {}: exposure {exposure}\n", row.service, row.host));
        }
    }
    if !below.is_empty() {
        out.push('\n');
        out.push_str(&below);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deployer::state::Exposure;
    use crate::status::judge::HostRow;

    fn report() -> StatusReport {
        let path = |d: &str| StorePath::parse(&format!("/nix/store/{}-ava-1.0", d.repeat(32))).unwrap();
        let host = HostName::parse("biz").unwrap();
        StatusReport {
            version: 1,
            serial: 7,
            generation: Timestamp(1000),
            hosts: vec![HostRow {
                host: host.clone(),
                reported_at: Some(Timestamp(940)),
                serial: Some(7),
                store: None,
                last_error: None,
                off: true,
                problems: vec!["Caddy's route is pending: \x1b]0;x\x07".into()],
            }],
            rows: vec![ServiceRow {
                service: ServiceName::parse("ava").unwrap(),
                host,
                wanted: Some(path("2")),
                revision: Some("0123456789abcdef".into()),
                running: Some(path("1")),
                status: ServiceStatus::Rejected,
                since: Some(Timestamp(700)),
                reported_at: Some(Timestamp(940)),
                exposure: Exposure::parse("1.1"),
                restarts: None,
                off: true,
                problem: Some("exited with 1".into()),
                attempted: Some(path("2")),
                journal: (0..12).map(|i| format!("line {i} \u{9b}2J\u{202e}")).collect(),
            }],
        }
    }

    #[test]
    fn the_table_is_as_wide_as_its_content_and_reasons_stand_below() {
        let text = table(&report(), Timestamp(1000), false, false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..2],
            [
                "SERVICE  HOST  WANTED                        RUNNING          STATUS    SINCE  REPORT",
                "ava      biz   2222222-ava-1.0 (0123456789)  1111111-ava-1.0  rejected  5m     1m",
            ]
        );
        assert_eq!(lines[3], "biz: Caddy's route is pending: \\u{1b}]0;x\\u{7}");
        assert_eq!(lines[4], "ava on biz: rejected 2222222-ava-1.0: exited with 1");
        assert_eq!((lines.len(), lines[5]), (5 + JOURNAL_LINES, "  | line 2 \\u{9b}2J\\u{202e}"));
        let one = table(&report(), Timestamp(1000), false, true);
        assert_eq!(one.strip_prefix(&text), Some("ava on biz: exposure 1.1\n"));
        assert!(table(&report(), Timestamp(1000), true, false).contains("\x1b[31mrejected\x1b[0m  5m"));
    }

    #[test]
    fn json_holds_what_the_host_wrote_and_steers_no_terminal() {
        for pretty in [true, false] {
            let text = json(&report(), pretty).unwrap();
            assert!(
                text.chars().all(|c| c == '\n' || !c.is_control()) && !text.contains('\u{202e}'),
                "{text}"
            );
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value["rows"][0]["journal"][0], "line 0 \u{9b}2J\u{202e}");
            assert_eq!((&value["version"], &value["rows"][0]["exposure"]), (&1.into(), &1.1.into()));
        }
    }
}
