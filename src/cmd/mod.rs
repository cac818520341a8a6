//! The commands, one file each: they read their arguments, call the modules that do the work, and print.
//! Data goes to stdout; everything else goes to stderr through [`crate::say`].

pub mod completions;
pub mod config;
pub mod deployer;
pub mod doctor;
mod editor;
pub mod init;
pub mod keygen;
pub mod logs;
pub mod man;
pub mod manifest;
pub mod push;
pub mod secrets;
pub mod status;

use crate::config::{Flags, Settings};
use crate::dispatch::{APPLETS, Applet, Invocation};
use crate::error::{Error, Result, did_you_mean};
use crate::say;
use std::io::Write;
use std::process::ExitCode;

/// A command line after its command was found.
#[derive(Debug, Clone)]
pub struct Call {
    /// How it was called, for usage texts: `deploy-manifest`, `omni-deploy push`.
    pub name: String,
    /// Its own arguments.
    pub args: Vec<String>,
    /// The configuration's flags.
    pub flags: Flags,
}

impl Call {
    /// Reads the arguments. Help goes to stdout with exit code 0, a usage error to stderr with 2.
    pub fn parse<T: argh::FromArgs>(&self) -> Result<T> {
        let name: Vec<&str> = self.name.split(' ').collect();
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        T::from_args(&name, &args).map_err(|early| match early.status {
            Ok(()) => match print(&early.output) {
                Ok(()) => Error::said(0),
                Err(e) => e,
            },
            Err(()) => {
                let said: Vec<&str> = early.output.split_whitespace().collect();
                let said = said.join(" ");
                let said = said.trim_end_matches('.');
                Error::usage(format!("{said}; '{} --help' has the arguments and an example", self.name))
            }
        })
    }

    /// The effective configuration.
    pub fn settings(&self) -> Result<Settings> {
        crate::config::load(&self.flags)
    }
}

/// Writes data to stdout, with a newline at the end. A reader that went away (`| head`) is no error.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let newline = if text.ends_with('\n') || text.is_empty() { "" } else { "\n" };
    match out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(newline.as_bytes()))
        .and_then(|()| out.flush())
    {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(Error::said(0)),
        Err(e) => Err(Error::new(format!("cannot write to stdout: {e}"))),
        Ok(()) => Ok(()),
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    crate::dumps::forbid();
    let mut argv = Vec::new();
    for arg in std::env::args_os() {
        match arg.into_string() {
            Ok(arg) => argv.push(arg),
            Err(arg) => {
                say::error(format!("the argument {arg:?} is not UTF-8; write it in UTF-8"));
                return ExitCode::from(crate::error::EXIT_USAGE);
            }
        }
    }
    match run(argv) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            if !e.is_said() {
                say::error(format!("error: {e}"));
            }
            ExitCode::from(e.exit())
        }
    }
}

fn run(argv: Vec<String>) -> Result<u8> {
    let (flags, rest) = crate::config::split_flags(argv.get(1..).unwrap_or_default())?;
    let line: Vec<String> = argv.iter().take(1).cloned().chain(rest).collect();
    let (name, applet, args) = match crate::dispatch::from_args(&line) {
        Invocation::Run { name, applet, args } => (name, applet, args),
        Invocation::Help => return print(&overview()).map(|()| 0),
        Invocation::Version => {
            return print(&format!("omni-deploy {}", env!("CARGO_PKG_VERSION"))).map(|()| 0);
        }
        Invocation::Nothing => {
            say::info(overview().trim_end());
            return Err(Error::said(crate::error::EXIT_USAGE));
        }
        Invocation::Unknown(word) => {
            let near = did_you_mean(&word, APPLETS.iter().map(|(name, ..)| *name));
            return Err(Error::usage(format!("no command '{word}'{near}; 'omni-deploy --help' lists them")));
        }
    };
    let call = Call { name, args, flags };
    match applet {
        Applet::Manifest => manifest::run(&call),
        Applet::Deployer => deployer::run(&call),
        Applet::Push => push::run(&call, false),
        Applet::Ship => push::run(&call, true),
        Applet::Status => status::run(&call),
        Applet::Logs => logs::run(&call),
        Applet::Secrets => secrets::run(&call),
        Applet::Doctor => doctor::run(&call),
        Applet::Init => init::run(&call),
        Applet::Keygen => keygen::run(&call),
        Applet::Config => config::run(&call),
        Applet::Completions => completions::run(&call),
        Applet::Man => man::run(&call),
    }
}

fn overview() -> String {
    let mut text = String::from(
        "Usage: omni-deploy <command> [<args>]\n\n\
         Brings Nix services from a developer's machine to plain hosts.\n\nCommands:\n",
    );
    for (name, _, what) in APPLETS {
        text.push_str(&format!("  {name:<12} {what}\n"));
    }
    text.push_str("\nFlags of the configuration, understood by every command:\n ");
    for key in crate::config::KEYS {
        text.push_str(&format!(" {}", key.flag));
    }
    text.push_str(
        "\n\nExamples:\n  omni-deploy push Biz/PodcastItLater/Web.py\n  omni-deploy status\n  \
         deploy-manifest rollback\n\nExit codes: 0 done, 1 nothing could be done, 2 usage,\n\
         3 a service failed and its previous version runs, 4 a service is down.\n",
    );
    text
}
