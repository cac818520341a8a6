//! The commands, one file each: they read their arguments, call the modules that do the work, and print.
//! Data goes to stdout; everything else goes to stderr through [`crate::log`].

mod completions;
mod config;
mod deployer;
mod doctor;
mod editor;
mod init;
mod keygen;
mod logs;
mod man;
mod manifest;
mod push;
mod secrets;
mod status;
mod table;
mod usage;

use crate::config::{Flags, Settings};
use crate::dispatch::{self, Action};
use crate::error::{Error, Exit, Result, did_you_mean};
use crate::log::{self, printable};
use crate::manifest::Service;
use crate::names::HostName;
use argh::{ArgsInfo, FromArgs};
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

/// Deploy Nix services from a developer's machine to plain hosts.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    example = "{command_name} init 's3://bucket?region=eu-central-1'\n{command_name} push Biz/PodcastItLater/Web.py\n{command_name} status\ndeploy-manifest rollback",
    note = "'{command_name} help COMMAND' has the arguments and an example of each command, '{command_name} man' the manual.",
    error_code(0, "done, or nothing to do"),
    error_code(1, "nothing could be done"),
    error_code(2, "the command line was not understood"),
    error_code(3, "something needs attention: a service failed and its previous version runs"),
    error_code(4, "a service failed and no version of it runs")
)]
struct Args {
    #[argh(subcommand)]
    command: Command,
}

/// The commands, in the order in which help lists them.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand)]
enum Command {
    Init(init::Args),
    Push(push::Push),
    Ship(push::Ship),
    Status(status::Args),
    Logs(logs::Args),
    Secrets(secrets::Args),
    Manifest(manifest::Args),
    Deployer(deployer::Args),
    Doctor(doctor::Args),
    Config(config::Args),
    Keygen(keygen::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// The tree of commands: the one place that knows their names, arguments and flags.
pub fn tree() -> dispatch::Command {
    Args::get_args_info()
}

/// A command line after its command was found.
#[derive(Debug, Clone)]
pub struct Call {
    /// The command and its arguments, in the one form that is given to argh.
    pub args: Vec<String>,
    /// The configuration's flags.
    pub flags: Flags,
}

impl Call {
    /// The effective configuration.
    pub fn settings(&self) -> Result<Settings> {
        crate::config::load(&self.flags)
    }
}

/// A number as the value of a flag.
fn number<T: std::str::FromStr>(text: &str) -> std::result::Result<T, String> {
    text.parse().map_err(|_| "expected a number".into())
}

/// A host that was named on the command line.
fn host(named: &str) -> Result<HostName> {
    HostName::parse(named).map_err(|why| Error::usage(format!("the host '{}' {why}", printable(named))))
}

fn listed(hosts: &[HostName]) -> String {
    hosts.iter().map(HostName::as_str).collect::<Vec<_>>().join(", ")
}

/// The hosts of a service, or the one of them that is named.
fn hosts_of(service: &Service, named: Option<&str>) -> Result<Vec<HostName>> {
    let mut placed = service.hosts.clone();
    placed.sort();
    placed.dedup();
    let Some(host) = named.map(host).transpose()? else { return Ok(placed) };
    if placed.contains(&host) {
        return Ok(vec![host]);
    }
    let near = did_you_mean(host.as_str(), placed.iter().map(HostName::as_str));
    Err(Error::new(format!("{} does not run on {host}{near}; it runs on {}", service.name, listed(&placed))))
}

/// Writes data to stdout, with a newline at the end. A reader that went away (`| head`) is no error.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let newline = if text.ends_with('\n') || text.is_empty() { "" } else { "\n" };
    match write!(out, "{text}{newline}").and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(Error::ReaderGone),
        Err(e) => Err(Error::new(format!("cannot write to stdout: {e}"))),
        Ok(()) => Ok(()),
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    crate::coredump::forbid();
    let argv: Vec<String> = match std::env::args_os().map(OsString::into_string).collect() {
        Ok(argv) => argv,
        Err(arg) => {
            log::error(format!("the argument {arg:?} is not UTF-8; write it in UTF-8"));
            return ExitCode::from(Exit::Usage.code());
        }
    };
    let exit = run(argv).unwrap_or_else(|e| {
        if e != Error::ReaderGone {
            log::error(format!("error: {e}"));
        }
        e.exit()
    });
    ExitCode::from(exit.code())
}

fn run(argv: Vec<String>) -> Result<Exit> {
    let tree = tree();
    let mut line = dispatch::read(&tree, &argv);
    match line.meaning()? {
        Action::Run => {}
        Action::Help => {
            return print(&usage::help(line.command, &line.name())).map(|()| Exit::Done);
        }
        Action::Version => {
            return print(&format!("omni-deploy {}", env!("CARGO_PKG_VERSION"))).map(|()| Exit::Done);
        }
        Action::Nothing => {
            log::info(usage::help(line.command, &line.name()).trim_end());
            return Ok(Exit::Usage);
        }
    }
    let (args, name) = (line.args(), line.name());
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    // The line was held against the tree already: what is left to be refused are values.
    let parsed = Args::from_args(&[], &words).map_err(|early| {
        let said = early.output.trim_end().trim_start_matches("Error parsing option ");
        Error::usage(format!("{said}; '{name} --help' has the arguments and an example"))
    })?;
    let call = Call { args, flags: line.flags };
    match parsed.command {
        Command::Init(args) => init::run(&call, args),
        Command::Push(args) => push::run(&call, args),
        Command::Ship(args) => push::run(&call, args.into()),
        Command::Status(args) => status::run(&call, args),
        Command::Logs(args) => logs::run(&call, args),
        Command::Secrets(args) => secrets::run(&call, args),
        Command::Manifest(args) => manifest::run(&call, args),
        Command::Deployer(args) => deployer::run(&call, args),
        Command::Doctor(args) => doctor::run(&call, args),
        Command::Config(args) => config::run(&call, args),
        Command::Keygen(args) => keygen::run(args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(args),
    }
}
