//! `omni-deploy push` and `ship`.

use super::Call;
use crate::config::Settings;
use crate::error::{Exit, Result};
use crate::log;
use crate::names::{HostName, ServiceName};
use crate::nix::Scope;
use crate::push::wait::{self, Newer, Outcome};
use crate::push::{self, Pushed, What, early};
use argh::{ArgsInfo, FromArgs};
use std::time::Duration;

/// Build, upload what the cache lacks of the closure, and publish. If any step fails, nothing is published.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "push",
    example = "# A namespace, whose service is named by its ': out' header or its path\n{command_name} Biz/PodcastItLater/Web.py\n# A closure that is built already; follow the hosts\n{command_name} --wait --service ava /nix/store/…-ava",
    note = "On stdout: NAME STOREPATH serial N.",
    error_code(
        1,
        "nothing was published; or, with --wait, a host has not picked it up, or its state is not known"
    ),
    error_code(3, "with --wait: a service does not run what was pushed, and another version runs"),
    error_code(4, "with --wait: a service failed and no version of it runs")
)]
pub(super) struct Push {
    /// what to push: a namespace (a file that the build command builds), a flake reference (.#ava), a .nix file, or a
    /// store path; several are published together, in one version
    #[argh(positional)]
    target: String,
    #[argh(positional, arg_name = "target")]
    more: Vec<String>,

    /// the service's name, for a single target
    #[argh(option)]
    service: Option<String>,

    /// refuse to publish uncommitted changes
    #[argh(switch)]
    require_clean: bool,

    /// upload the whole closure again, whatever the cache has
    #[argh(switch)]
    rewrite: bool,

    /// start the deployer on the hosts and follow each until it runs the new version or has rejected it
    #[argh(switch)]
    wait: bool,

    /// how long to follow the hosts; default: 300
    #[argh(option, arg_name = "seconds", default = "300", from_str_fn(super::number))]
    timeout: u64,
}

/// Push, and make it live now. Starts the deployer on the service's hosts over ssh, and waits until each runs what was
/// pushed or has rejected it.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "ship",
    example = "# Make a finished program live now\n{command_name} Omni/Ava.hs",
    note = "On stdout: NAME STOREPATH serial N, then NAME HOST OUTCOME for each host, where OUTCOME is a word of 'omni-deploy status', or superseded: somebody published a later version meanwhile, and the host runs that one.",
    error_code(1, "nothing was published, or a host has not picked it up, or its state is not known"),
    error_code(3, "a service does not run what was pushed, and another version runs"),
    error_code(4, "a service failed and no version of it runs")
)]
pub(super) struct Ship {
    /// what to push: a namespace (a file that the build command builds), a flake reference (.#ava), a .nix file, or a
    /// store path; several are published together, in one version
    #[argh(positional)]
    target: String,
    #[argh(positional, arg_name = "target")]
    more: Vec<String>,

    /// the service's name, for a single target
    #[argh(option)]
    service: Option<String>,

    /// refuse to publish uncommitted changes
    #[argh(switch)]
    require_clean: bool,

    /// upload the whole closure again, whatever the cache has
    #[argh(switch)]
    rewrite: bool,

    /// how long to follow the hosts; default: 300
    #[argh(option, arg_name = "seconds", default = "300", from_str_fn(super::number))]
    timeout: u64,
}

impl From<Ship> for Push {
    fn from(Ship { target, more, service, require_clean, rewrite, timeout }: Ship) -> Push {
        Push { target, more, service, require_clean, rewrite, wait: true, timeout }
    }
}

pub(super) fn run(call: &Call, args: Push) -> Result<Exit> {
    let settings = call.settings()?;
    let cwd = std::env::current_dir()
        .map_err(|e| crate::error::Error::new(format!("cannot tell the current folder: {e}; cd to one")))?;
    let targets: Vec<String> = [args.target].into_iter().chain(args.more).collect();
    let (targets, service) = (targets.as_slice(), args.service.as_deref());
    let scope = if args.rewrite { Scope::Everything } else { Scope::Missing };
    let what = What { targets, service, require_clean: args.require_clean, scope };
    let mut opening = None;
    let pushed = push::push(&settings, what, &cwd, |hosts| {
        opening = args.wait.then(|| early::open(&settings, hosts));
    })?;
    for (name, path) in &pushed.services {
        super::print(&format!("{name} {path} serial {}", pushed.serial))?;
    }
    let hosts: Vec<&str> = pushed.hosts.keys().map(HostName::as_str).collect();
    if hosts.is_empty() {
        log::warning("no host runs what was pushed; name some with 'deploy-manifest set NAME hosts=…'");
        return Ok(Exit::Done);
    }
    if args.wait {
        let (settings, _connections) = match opening {
            Some(opening) => opening.settings(&settings),
            None => (settings, None),
        };
        return follow(&settings, &pushed, Duration::from_secs(args.timeout));
    }
    log::info(format!(
        "{} will pick it up within 5 minutes; 'omni-deploy ship' makes it live at once",
        hosts.join(", ")
    ));
    Ok(Exit::Done)
}

fn follow(settings: &Settings, pushed: &Pushed, timeout: Duration) -> Result<Exit> {
    let outcomes = wait::follow(settings, &pushed.hosts, pushed.serial, timeout)?;
    for ((service, host), outcome) in &outcomes {
        super::print(&format!("{service} {host} {}", outcome.word()))?;
    }
    for ((service, host), outcome) in &outcomes {
        explain(service, host, outcome);
    }
    Ok(wait::exit_code(outcomes.values()))
}

fn explain(service: &ServiceName, host: &HostName, outcome: &Outcome) {
    match outcome {
        Outcome::Running => {}
        Outcome::Superseded(Newer { serial, by, action }) => {
            log::warning(format!(
                "{service} on {host}: {by} published version {serial} meanwhile ({action}), and that counts"
            ));
        }
        Outcome::Off(off) => {
            log::error(format!("{service} on {host}: {}: {}", off.status, off.reason));
            for line in &off.journal {
                log::info(format!("  {line}"));
            }
        }
        Outcome::Pending(why) | Outcome::Unknown(why) => log::error(format!("{service} on {host}: {why}")),
    }
}
