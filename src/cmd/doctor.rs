//! `omni-deploy doctor`: checks this machine and says what to do. It repairs nothing.

use super::{Call, print};
use crate::clock::Timestamp;
use crate::deployer::live::{self, Verdict};
use crate::doctor::{Check, credentials, fail, host, machine};
use crate::error::{Exit, Result};
use crate::log::{self, printable, printable_json};
use argh::{ArgsInfo, FromArgs};
use serde_json::json;
use std::io::IsTerminal;

/// Check this machine, with remedies. Looks at configuration, store, keys and programs, and on a host also at systemd,
/// Caddy, the timer, domains, secrets, how exposed the services are, and disk space.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "doctor",
    example = "{command_name}\nsudo {command_name} --host\n{command_name} --json | jq '.checks[] | select(.verdict == \"fail\")'",
    note = "On a machine with a deployer, the host is checked even without --host.",
    error_code(0, "nothing failed (warnings may have been given)"),
    error_code(1, "some check failed")
)]
pub(super) struct Args {
    /// check this machine as a host, also without a deployer on it
    #[argh(switch)]
    host: bool,
    /// print JSON
    #[argh(switch)]
    json: bool,
}

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    let checks = look(call, args.host || host::is_host());
    let failed = checks.iter().any(|c| c.verdict == Verdict::Fail);
    if args.json {
        print(&printable_json(&format!("{:#}", json!({"version": 1, "checks": checks}))))?;
    } else {
        let colour = std::io::stdout().is_terminal() && log::colour_wanted();
        print(&checks.iter().map(|check| line(check, colour)).collect::<String>())?;
    }
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn look(call: &Call, on_host: bool) -> Vec<Check> {
    let settings = match call.settings() {
        Ok(settings) => settings,
        Err(e) => return vec![fail(e).of("configuration")],
    };
    let mut checks = vec![machine::files().of("configuration")];
    let mut manifest = None;
    match crate::store::open(&settings.store) {
        Err(e) => checks.push(fail(e).of("store")),
        Ok(store) => {
            checks.extend(machine::store(store.as_ref(), on_host));
            // A store that does not answer was said: the manifest would say it again.
            if checks.iter().all(|c| c.name != "store" || c.verdict == Verdict::Ok) {
                let (found, trusted) = machine::manifest(store.as_ref(), &settings);
                checks.push(found.of("manifest"));
                manifest = trusted;
                if on_host {
                    checks.extend(host::report(store.as_ref(), &settings).map(|found| found.of("report")));
                }
            }
        }
    }
    checks.extend(machine::signing(&settings, on_host));
    checks.extend(credentials::own(on_host).into_iter().map(|found| found.of("credentials")));
    checks.push(machine::nix().of("nix"));
    checks.push(machine::cache(&settings, on_host).of("cache"));
    // A host with a key of its own is a developer's machine as well.
    if !on_host || settings.secret_key_file.is_some() {
        checks.extend(machine::programs(&settings));
    }
    if on_host {
        // Of what is not believed nothing is looked at, but at what this host does meanwhile.
        let manifest = manifest.or_else(|| live::obeyed(&settings.unit_dir));
        checks.extend(host::all(&settings, manifest.as_ref(), Timestamp::now()));
    }
    checks
}

fn line(check: &Check, colour: bool) -> String {
    let (word, code) = match check.verdict {
        Verdict::Ok => ("ok  ", "32"),
        Verdict::Warn => ("warn", "33"),
        Verdict::Fail => ("FAIL", "31"),
    };
    let word = if colour { format!("\x1b[{code}m{word}\x1b[0m") } else { word.to_string() };
    format!("{word}  {:<18}  {}\n", check.name, printable(&check.text))
}
