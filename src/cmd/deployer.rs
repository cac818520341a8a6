//! `deployer`: one pass, its preview, and the state for people.

use super::{Call, print};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::deployer::caddy::RoutePlan;
use crate::deployer::follow;
use crate::deployer::lines;
use crate::deployer::live::{self, LiveState};
use crate::deployer::overrides::Decision;
use crate::deployer::pass::{self, Preview, RunOptions};
use crate::deployer::plan::ServicePlan;
use crate::deployer::root::{Root, STATE_FILE};
use crate::deployer::state::{LastError, RouteStatus, ServicePhase, State, attention};
use crate::doctor::domains;
use crate::error::{Error, Exit, Result};
use crate::files::if_there;
use crate::log;
use crate::systemd;
use argh::{ArgsInfo, FromArgs};
use serde_json::json;
use std::path::Path;

#[derive(FromArgs, ArgsInfo)]
/// Bring this host to what the manifest says.
#[argh(
    subcommand,
    name = "deployer",
    example = "sudo {command_name} run
sudo {command_name} plan
{command_name} state",
    error_code(0, "done, or nothing to do"),
    error_code(1, "nothing could be done"),
    error_code(3, "a service failed and its previous version runs, or it needs attention"),
    error_code(4, "a service failed and no version of it runs")
)]
pub(super) struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand)]
enum Command {
    Run(RunArgs),
    Plan(PlanArgs),
    State(StateArgs),
    Watch(WatchArgs),
    Pause(PauseArgs),
    Resume(ResumeArgs),
    Rollback(RollbackArgs),
}

#[derive(FromArgs, ArgsInfo)]
/// Make one pass: fetch the manifest, deploy what differs, repair what is off, report. Without a command this is done.
#[argh(
    subcommand,
    name = "run",
    example = "sudo {command_name}
sudo {command_name} --retry ava"
)]
struct RunArgs {
    #[argh(switch)]
    /// started by the timer: if a pass is already under way, exit without an error
    timer: bool,
    #[argh(option, arg_name = "service")]
    /// try a rejected version of this service again
    retry: Vec<String>,
    #[argh(switch)]
    /// accept a manifest that removes every service of this host
    allow_empty: bool,
    #[argh(option, arg_name = "serial", from_str_fn(super::number))]
    /// accept a manifest with this number although this host has accepted a later one, for example after a store was
    /// created again
    accept_serial: Option<u64>,
}

#[derive(FromArgs, ArgsInfo)]
/// Print what run would do, without touching anything.
#[argh(subcommand, name = "plan", example = "sudo {command_name} --json | jq .services")]
struct PlanArgs {
    #[argh(switch)]
    /// print JSON
    json: bool,
    #[argh(option, arg_name = "service")]
    /// plan as if a rejected version of this service were tried again
    retry: Vec<String>,
    #[argh(switch)]
    /// plan for a manifest that removes every service of this host
    allow_empty: bool,
    #[argh(option, arg_name = "serial", from_str_fn(super::number))]
    /// plan for a manifest with this number although this host has accepted a later one
    accept_serial: Option<u64>,
}

#[derive(FromArgs, ArgsInfo)]
/// Print the result of the last pass.
#[argh(subcommand, name = "state", example = "{command_name}\n{command_name} --live --json | jq .live")]
struct StateArgs {
    #[argh(switch)]
    /// print the file as it is
    json: bool,
    #[argh(switch)]
    /// with --json: also what systemd says now about the services' units, the deployer and its timer
    live: bool,
    #[argh(switch)]
    /// with --live: also what visitors of this host's domains get: DNS, certificate, answer
    domains: bool,
}

#[derive(FromArgs, ArgsInfo)]
/// Start the deployer's unit and wait for a result, as 'omni-deploy ship' does. Then prints what 'state --live --json'
/// prints, and how the start ended. A pass has a result when it has ended, or when only the last connections to a
/// candidate are left.
#[argh(subcommand, name = "watch", example = "sudo {command_name} --serial 42 | jq .start")]
struct WatchArgs {
    #[argh(option, arg_name = "serial", from_str_fn(super::number))]
    /// the number of the manifest to wait for
    serial: u64,
}

#[derive(FromArgs, ArgsInfo)]
/// Stop a service. Passes and reboots leave it stopped until it is resumed or its time is over.
#[argh(subcommand, name = "pause", example = "sudo {command_name} ava --for 2h")]
struct PauseArgs {
    #[argh(positional, arg_name = "service")]
    /// the service
    name: String,
    #[argh(option, long = "for", arg_name = "time")]
    /// how long the pause lasts: 90s, 30m, 2h or 1d
    duration: Option<String>,
}

#[derive(FromArgs, ArgsInfo)]
/// End a pause: the service is started again.
#[argh(subcommand, name = "resume", example = "sudo {command_name} ava")]
struct ResumeArgs {
    #[argh(positional, arg_name = "service")]
    /// the service
    name: String,
}

#[derive(FromArgs, ArgsInfo)]
/// Go back to the closure that ran before. The host still has it: no network is needed. The service stays there until the manifest names another
/// path or --unpin is given.
#[argh(
    subcommand,
    name = "rollback",
    example = "sudo {command_name} ava
sudo {command_name} ava --unpin"
)]
struct RollbackArgs {
    #[argh(positional, arg_name = "service")]
    /// the service
    name: String,
    #[argh(switch)]
    /// end a rollback: use what the manifest names
    unpin: bool,
}

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    match args.command {
        Command::Run(RunArgs { timer, retry, allow_empty, accept_serial }) => {
            let asks = RunOptions { timer, retry, allow_empty, accept_serial };
            // Whoever looks from afar sees it, as far as that goes without a configuration.
            let settings = call.settings().inspect_err(|e| {
                // Of what was typed for this call nobody else need hear.
                if crate::ssh::is_root() && call.flags.is_empty() {
                    pass::could_not_begin(e);
                }
            })?;
            pass::run(&settings, &asks)
        }
        Command::Plan(PlanArgs { json, retry, allow_empty, accept_serial }) => {
            let asks = RunOptions { timer: false, retry, allow_empty, accept_serial };
            let settings = call.settings()?;
            let preview = pass::preview(&settings, &asks)?;
            if let Some(error) = &preview.manifest_error {
                log::warning(format!("{error}; planned from the last good manifest"));
            }
            print(&if json { plan_json(&preview) } else { plan_text(&preview, &settings) })?;
            Ok(Exit::Done)
        }
        Command::State(a) if a.live => live(call, &a),
        Command::State(a) if a.domains => Err(Error::usage("--domains needs --live --json")),
        Command::State(a) => state(a.json),
        Command::Watch(a) => watch(call, a.serial),
        Command::Pause(a) => {
            let length = a.duration.as_deref().map(seconds).transpose()?;
            pass::apply_override(&call.settings()?, &a.name, &Decision::Pause(length))
        }
        Command::Resume(a) => pass::apply_override(&call.settings()?, &a.name, &Decision::Resume),
        Command::Rollback(a) => {
            let decision = if a.unpin { Decision::Unpin } else { Decision::Rollback };
            pass::apply_override(&call.settings()?, &a.name, &decision)
        }
    }
}

/// A length of time in seconds, from `90s`, `30m`, `2h` or `1d`.
fn seconds(text: &str) -> Result<i64> {
    let wrong = || {
        Error::usage(format!(
            "--for '{text}' is not a length of time; expected one such as 90s, 30m, 2h or 1d"
        ))
    };
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 86_400,
        _ => return Err(wrong()),
    };
    let count: i64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
    if !(1..=1_000_000).contains(&count) {
        return Err(wrong());
    }
    Ok(count * unit)
}

fn plan_text(preview: &Preview, settings: &Settings) -> String {
    let mut lines = vec![format!(
        "host {}, manifest version {} of {}",
        settings.host, preview.serial, preview.generation
    )];
    let plan = &preview.plan;
    for service in plan.services.iter().chain(&plan.gone) {
        let failure = service.failure.as_ref().map(|failure| failure.record().reason.clone());
        let remarks = [failure, attention(&service.name, &service.drop_ins), service.remark.clone()];
        let steps = service.steps.iter().map(ToString::to_string);
        let said = remarks.into_iter().flatten().chain(steps);
        lines.extend(said.map(|said| format!("{}: {said}", service.name)));
    }
    for name in &plan.candidates {
        lines.push(format!("{name}: stop and remove the candidate that an earlier pass left"));
    }
    let written = preview.ports.write.iter();
    lines.extend(written.map(|file| format!("route: write port {} into {}", file.port, file.path.display())));
    match &preview.route {
        RoutePlan::None | RoutePlan::Current => {}
        RoutePlan::Pending(why) => lines.push(format!("route: pending: {why}")),
        RoutePlan::Write(requests) => {
            lines.extend(requests.iter().map(|request| format!("route: {}", request.what)));
        }
    }
    let removed = preview.ports.remove.iter();
    lines.extend(removed.map(|path| format!("route: remove {}", path.display())));
    if is_empty(preview) {
        lines.push("nothing to do".into());
    }
    shown(&lines)
}

/// Lines for a terminal, of which none steers it.
fn shown(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{}\n", log::printable(line))).collect()
}

fn is_empty(preview: &Preview) -> bool {
    let routed = preview.route.is_settled() && preview.ports.is_empty() && !preview.trial;
    preview.plan.is_empty() && routed
}

fn plan_json(preview: &Preview) -> String {
    let service = |s: &ServicePlan| {
        json!({
            "name": s.name,
            "target": s.target,
            "goal": s.goal.as_ref().map(|g| &g.path),
            "desired": s.goal.as_ref().is_some_and(|g| g.desired),
            "reason": s.failure.as_ref().map(|f| &f.record().reason),
            "dropIns": s.drop_ins,
            "steps": s.steps,
        })
    };
    let route = match &preview.route {
        RoutePlan::None => json!({"status": "none"}),
        RoutePlan::Current => json!({"status": "current"}),
        RoutePlan::Pending(why) => json!({"status": "pending", "reason": why}),
        RoutePlan::Write(requests) => json!({"status": "write", "requests": requests}),
    };
    let value = json!({
        "version": 1,
        "serial": preview.serial,
        "manifestError": preview.manifest_error,
        "empty": is_empty(preview),
        "services": preview.plan.services.iter().map(service).collect::<Vec<_>>(),
        "gone": preview.plan.gone.iter().map(service).collect::<Vec<_>>(),
        "understudies": preview.plan.candidates,
        "route": route,
        "ports": preview.ports,
        "trial": preview.trial,
    });
    log::printable_json(&format!("{value:#}")).into_owned()
}

fn live(call: &Call, args: &StateArgs) -> Result<Exit> {
    if !args.json {
        return Err(Error::usage("--live needs --json; for people there is 'omni-deploy status --live'"));
    }
    answered(call, |settings, unit_dir| match settings {
        Some(settings) if args.domains => domains::live_with_domains(settings, Timestamp::now()),
        _ => live::look(unit_dir, Timestamp::now()),
    })
}

fn watch(call: &Call, serial: u64) -> Result<Exit> {
    answered(call, |_, unit_dir| {
        follow::watch(unit_dir, serial, || systemd::start_without_waiting(live::DEPLOYER))
    })
}

/// Prints an answer, for which a configuration that cannot be used is no reason to be silent.
fn answered(call: &Call, look: impl FnOnce(Option<&Settings>, &Path) -> Result<LiveState>) -> Result<Exit> {
    let settings = call.settings();
    let unit_dir = settings.as_ref().map_or(Path::new("/etc/systemd/system"), |s| s.unit_dir.as_path());
    let mut answer = look(settings.as_ref().ok(), unit_dir)?;
    if let Err(e) = &settings {
        answer.live.problems.push(e.to_string());
    }
    let text = serde_json::to_string(&answer);
    let text = text.map_err(|e| Error::new(format!("cannot write the answer: {e}")))?;
    print(&log::printable_json(&text))?;
    Ok(Exit::Done)
}

fn state(json: bool) -> Result<Exit> {
    let bytes = if_there(fs_err::read(STATE_FILE))?.ok_or_else(|| {
        Error::new(format!("no {STATE_FILE}: no pass has finished on this host; run 'deployer'"))
    })?;
    // It needs no configuration, which may be what is wrong.
    let root = Root::system(Path::new("/etc/systemd/system"));
    let state = State::parse(&bytes).map(|state| lines::load(&root).put_back(state));
    if json {
        let bytes = match &state {
            Ok(state) if lines::any(state) => lines::to_bytes(state)?,
            // As it is, whatever it is, but for what steers a terminal.
            Ok(_) | Err(_) => bytes,
        };
        print(&log::printable_json(&String::from_utf8_lossy(&bytes)))?;
        return Ok(Exit::Done);
    }
    let state = state.map_err(|e| {
        Error::new(format!("{STATE_FILE} cannot be used: {e}; run 'deployer' to write it anew"))
    })?;
    let now = Timestamp::now();
    let mut text = vec![format!(
        "host {}, manifest version {}, last written {} ago",
        state.host,
        state.serial.map_or("none".to_string(), |s| s.to_string()),
        state.checked_at.age(now)
    )];
    if let Some(LastError { reason, since }) = &state.last_error {
        text.push(format!("passes have failed for {}: {reason}", since.age(now)));
    }
    if let Some(error) = state.manifest_error.as_ref().filter(|e| !state.failed_with(e)) {
        text.push(format!("manifest: {error}"));
    }
    if let (Some(other), Some(this)) = (&state.other_machine, &state.machine) {
        text.push(other.text(&state.host, this));
    }
    if !state.manager_environment.is_empty() {
        text.push(systemd::given_text(&state.manager_environment));
    }
    for name in &state.draining {
        text.push(format!("{name}: the last connections to its candidate are ending"));
    }
    for service in state.services.values() {
        let path = service.store_path.as_ref().map_or("nothing runs".to_string(), ToString::to_string);
        text.push(format!(
            "{:<24} {:<9} {:>5}  {path}",
            service.name,
            if service.removing { "removing".to_string() } else { service.status.to_string() },
            service.since.age(now)
        ));
        text.extend(service.exposure.map(|exposure| {
            format!("    exposure {exposure} ('systemd-analyze security {}')", service.name)
        }));
        if let Some(since) = service.pinned_since {
            text.push(format!("    held there by 'deployer rollback' for {}", since.age(now)));
        }
        if service.status == ServicePhase::Stopped {
            let until = service.paused_until.map_or("it is resumed".to_string(), |t| t.to_string());
            text.push(format!("    paused until {until}"));
        }
        if service.secrets_changed {
            text.push("    its secrets file was changed after it started; restart it to pick that up".into());
        }
        if let Some(failure) = &service.failure {
            text.push(format!("    {}", failure.reason));
            text.extend(failure.journal.iter().map(|line| format!("    | {line}")));
            if failure.journal.is_empty() && lines::hidden(&root.lines()) {
                text.push("    only root can see its last lines: sudo deployer state".into());
            }
        }
        text.extend(service.attention().map(|attention| format!("    {attention}")));
    }
    if let (RouteStatus::Pending, Some(reason)) = (state.route.status, &state.route.reason) {
        text.push(format!("route pending: {reason}"));
    }
    print(&shown(&text))?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, load};
    use crate::deployer::plan::Plan;
    use crate::deployer::ports::PortChanges;
    use serde_json::Value;

    #[test]
    fn a_plan_steers_no_terminal_whoever_is_named_in_it() {
        let settings = load(&Flags::from([("host", "here".to_string())])).unwrap();
        let why = "'\u{9b}2J\x1b]0;x' (process 7) listens";
        let route = RoutePlan::Pending(why.into());
        let plan =
            Plan { services: Vec::new(), gone: Vec::new(), routes: Vec::new(), candidates: Vec::new() };
        let (ports, trial) = (PortChanges::default(), false);
        let preview =
            Preview { serial: 1, generation: Timestamp(0), manifest_error: None, plan, route, ports, trial };
        for text in [plan_text(&preview, &settings), plan_json(&preview)] {
            assert!(!text.chars().any(|c| c != '\n' && c.is_control()), "{text:?}");
        }
        let json: Value = serde_json::from_str(&plan_json(&preview)).unwrap();
        assert_eq!(json["route"]["reason"], why);
    }
}
