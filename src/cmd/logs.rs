//! `omni-deploy logs`: the journal of a service, of the deployer or of Caddy, from the hosts that run it. Lines
//! of hosts are shown with their control characters escaped; what a person gives reaches journalctl as the
//! value of an option, never as one.

use super::{Call, host, hosts_of, print};
use crate::config::Settings;
use crate::error::{Error, Exit, Result, did_you_mean};
use crate::log::{self, printable};
use crate::manifest::publish;
use crate::manifest::trust::Author;
use crate::names::HostName;
use crate::parallel;
use crate::runner::Stream;
use crate::ssh;
use argh::{ArgsInfo, FromArgs};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Show the journal of a service, the deployer or Caddy, from the hosts that run it.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "logs",
    example = "{command_name} ava -f\n{command_name} ava --since '1 hour ago'\n{command_name} deployer -n 50 --host biz",
    note = "Without -n and --since the last 100 lines are shown. With several hosts, each line begins with its host."
)]
pub(super) struct Args {
    /// whose journal
    #[argh(positional, arg_name = "service|deployer|caddy")]
    name: String,
    /// go on with new lines as they come, until Ctrl-C
    #[argh(switch, short = 'f')]
    follow: bool,
    /// how many of the last lines, or all
    #[argh(option, short = 'n', arg_name = "lines", from_str_fn(lines))]
    lines: Option<usize>,
    /// since when, in a form of systemd.time(7): yesterday, '1 hour ago', '2026-11-22 18:00'
    #[argh(option, arg_name = "time", from_str_fn(since))]
    since: Option<String>,
    /// only this host
    #[argh(option)]
    host: Option<String>,
}

const DEFAULT_LINES: usize = 100;

/// How many lines `all` are.
const ALL: usize = usize::MAX;

/// How long several hosts may take that are not followed: nothing of one is shown before it has ended.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// The most bytes that are kept of what one of several hosts says.
const KEPT_BYTES: usize = 8 << 20;

/// What an entry of a journal takes at most, but for very few: a line of a program is cut at 48 KiB (`LineMax=`).
const ENTRY_BYTES: usize = 64 << 10;

impl Args {
    /// The most entries that a host has to say; each has a line or more.
    fn most(&self) -> usize {
        // Who names a time wants all since then.
        self.lines.unwrap_or(if self.since.is_some() { ALL } else { DEFAULT_LINES })
    }
}

/// The last lines of a host, as far as they are kept.
#[derive(Debug, Default)]
struct Tail {
    lines: VecDeque<(Stream, String)>,
    /// What those take.
    bytes: usize,
    /// What all took that came.
    came: usize,
    left_out: usize,
}

impl Tail {
    fn push(&mut self, stream: Stream, line: &str) {
        let takes = |line: &str| line.len() + size_of::<(Stream, String)>();
        self.lines.push_back((stream, line.to_string()));
        self.bytes += takes(line);
        self.came = self.came.saturating_add(takes(line));
        while self.bytes > KEPT_BYTES {
            let Some((_, first)) = self.lines.pop_front() else { return };
            self.bytes -= takes(&first);
            self.left_out += 1;
        }
    }
}

fn lines(text: &str) -> Result<usize, String> {
    match text.parse::<u32>() {
        Ok(n) => Ok(n as usize),
        Err(_) if text == "all" => Ok(ALL),
        Err(_) => {
            Err(format!("'{}' is not a number of lines; expected one such as 50, or all", printable(text)))
        }
    }
}

fn since(text: &str) -> Result<String, String> {
    let well = |c: char| c.is_ascii_alphanumeric() || " :+-.,@/_".contains(c);
    if text.trim().is_empty() || text.len() > 64 || !text.chars().all(well) {
        return Err(format!(
            "'{}' is not a time; expected one such as '1 hour ago' or '2026-11-22 18:00'",
            printable(text)
        ));
    }
    Ok(text.into())
}

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    let settings = call.settings()?;
    let (unit, hosts) = which(&settings, &args)?;
    let words = journalctl(&unit, &args);
    let failed = if args.follow || hosts.len() == 1 {
        together(&settings, &hosts, &words)?
    } else {
        in_turn(&settings, &hosts, &words, args.most())?
    };
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

/// The unit and the hosts that run it.
fn which(settings: &Settings, args: &Args) -> Result<(String, Vec<HostName>)> {
    let picked = args.host.as_deref().map(host).transpose()?;
    let everywhere = matches!(args.name.as_str(), "deployer" | "caddy");
    // A host's own journal needs no manifest: that may be what is being looked into.
    if everywhere && let Some(host) = picked {
        return Ok((format!("{}.service", args.name), vec![host]));
    }
    let store = crate::store::open(&settings.store)?;
    let manifest = publish::read_trusted(&Author::reader(settings, store.as_ref())?)?;
    if everywhere {
        let hosts: Vec<HostName> = manifest.hosts().into_iter().collect();
        if hosts.is_empty() {
            return Err(Error::new("the manifest names no host; name one with --host"));
        }
        return Ok((format!("{}.service", args.name), hosts));
    }
    let service = manifest.service(&args.name).ok_or_else(|| {
        let names = manifest.services.iter().map(|s| s.name.as_str()).chain(["deployer", "caddy"]);
        let near = did_you_mean(&args.name, names);
        let hint = if near.is_empty() { "; 'omni-deploy status' lists them" } else { near.as_str() };
        Error::new(format!("no service '{}' in the manifest{hint}", printable(&args.name)))
    })?;
    Ok((service.name.unit(), hosts_of(service, args.host.as_deref())?))
}

fn journalctl(unit: &str, args: &Args) -> Vec<String> {
    let mut words: Vec<String> = ["journalctl", "--no-pager", "--output=short-iso"].map(String::from).into();
    let lines = args.most();
    let lines = if lines == ALL { "all".into() } else { lines.to_string() };
    words.extend([format!("--unit={unit}"), format!("--lines={lines}")]);
    words.extend(args.since.as_ref().map(|since| format!("--since={since}")));
    words.extend(args.follow.then(|| "--follow".to_string()));
    words
}

/// Starts the journal on one host and hands its lines over as they come; with a flag to stop it, it has to end in time.
/// Returns why it failed, if it did.
fn stream(
    settings: &Settings,
    host: &HostName,
    words: &[String],
    ends: Option<&Arc<AtomicBool>>,
    mut line: impl FnMut(Stream, &str),
) -> Option<String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut run = ssh::run_on(settings, host, true, &words).keep_end();
    if let Some(stop) = ends {
        run = run.deadline(ENDS_WITHIN).stop(stop);
    }
    match ssh::lines_of(settings, host, run, &mut line) {
        Ok(status) if status.ok() => None,
        Ok(status) => Some(format!("journalctl on {host} ended with {status}")),
        Err(e) => Some(e.to_string()),
    }
}

/// Line by line as they come, from all hosts at once. Returns whether some host failed.
fn together(settings: &Settings, hosts: &[HostName], words: &[String]) -> Result<bool> {
    // A line of one of the hosts, or why one failed. Bounded: a reader that is slower than the journal holds it up
    // instead of filling the memory.
    let (sender, events) = mpsc::sync_channel::<Result<(usize, Stream, String), String>>(1024);
    for (i, host) in hosts.iter().enumerate() {
        let (sender, settings, host, words) =
            (sender.clone(), settings.clone(), host.clone(), words.to_vec());
        // Plain threads: when our reader goes away we end, whatever the hosts are about to say.
        std::thread::spawn(move || {
            let failed = stream(&settings, &host, &words, None, |stream, line| {
                // Nobody listens any more only when the process is about to end.
                drop(sender.send(Ok((i, stream, line.to_string()))));
            });
            if let Some(why) = failed {
                drop(sender.send(Err(why)));
            }
        });
    }
    drop(sender);
    let mut failed = false;
    for event in events {
        match event {
            Ok((i, stream, line)) => show(hosts, &hosts[i], stream, &line)?,
            Err(why) => {
                failed = true;
                log::error(why);
            }
        }
    }
    Ok(failed)
}

/// Asked all at once for `most` entries, shown host after host: of each the last lines. Returns whether some host failed.
fn in_turn(settings: &Settings, hosts: &[HostName], words: &[String], most: usize) -> Result<bool> {
    std::thread::scope(|scope| {
        let ask = |host: &HostName| {
            let (mut tail, stop) = (Tail::default(), Arc::new(AtomicBool::new(false)));
            let enough = most.saturating_mul(ENTRY_BYTES).max(KEPT_BYTES);
            let failed = stream(settings, host, words, Some(&stop), |stream, line| {
                tail.push(stream, line);
                // Whoever says more than was asked for does not end either.
                stop.fetch_or(tail.came > enough, Ordering::SeqCst);
            });
            if stop.load(Ordering::SeqCst) {
                let why = format!(
                    "{host} sent more than {most} journal entries can have, and was cut off; look at it with '{} \
                     {host}'",
                    settings.ssh.join(" ")
                );
                return (Tail::default(), Some(why));
            }
            (tail, failed)
        };
        let asked: Vec<_> = hosts.iter().map(|host| (host, scope.spawn(move || ask(host)))).collect();
        let mut failed = false;
        for (host, answer) in asked {
            let (tail, why) = parallel::joined(answer);
            if tail.left_out > 0 {
                log::warning(format!(
                    "{host}: {} earlier lines are left out; --host {host} shows all",
                    tail.left_out
                ));
            }
            for (stream, line) in tail.lines {
                show(hosts, host, stream, &line)?;
            }
            if let Some(why) = why {
                failed = true;
                log::error(why);
            }
        }
        Ok(failed)
    })
}

fn show(hosts: &[HostName], host: &HostName, stream: Stream, line: &str) -> Result<()> {
    // A tab moves the cursor and does nothing else; programs align their lines with it.
    let text = line.split('\t').map(printable).collect::<Vec<_>>().join("\t");
    match (stream, hosts.len()) {
        (Stream::Stdout, 1) => print(&format!("{text}\n")),
        (Stream::Stdout, _) => print(&format!("{host} | {text}\n")),
        (Stream::Stderr, _) => {
            log::warning(format!("{host}: {text}"));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(lines: Option<&str>, since: Option<&str>, follow: bool) -> Args {
        let (lines, since) = (lines.map(|text| super::lines(text).unwrap()), since.map(String::from));
        Args { name: "ava".into(), follow, lines, since, host: None }
    }

    #[test]
    fn what_is_given_reaches_journalctl_as_values() {
        for (given, want) in [
            (args(None, None, false), "--lines=100"),
            (args(None, None, true), "--lines=100 --follow"),
            (args(Some("5"), None, false), "--lines=5"),
            (args(None, Some("1 hour ago"), false), "--lines=all --since=1 hour ago"),
            (args(Some("5"), Some("-1h"), true), "--lines=5 --since=-1h --follow"),
        ] {
            let words = journalctl("ava.service", &given).join(" ");
            let want = format!("journalctl --no-pager --output=short-iso --unit=ava.service {want}");
            assert_eq!(words, want);
        }
    }

    #[test]
    fn of_a_host_that_never_stops_the_last_lines_are_kept_and_the_rest_is_counted() {
        let mut tail = Tail::default();
        let long = "x".repeat(1 << 20);
        (0..100).for_each(|_| tail.push(Stream::Stdout, &long));
        tail.push(Stream::Stdout, "last");
        assert!(tail.lines.iter().map(|(_, line)| line.len()).sum::<usize>() <= KEPT_BYTES);
        assert!(tail.lines.len() > 5 && tail.came > 100 << 20);
        assert_eq!(tail.lines.len() + tail.left_out, 101);
        assert_eq!(tail.lines.back().map(|(_, line)| line.as_str()), Some("last"));
        let most = [(Some("5"), None), (None, None), (None, Some("-1h")), (Some("all"), None)];
        let most = most.map(|(lines, since)| args(lines, since, false).most());
        assert_eq!(most, [5, 100, usize::MAX, usize::MAX]);
    }

    #[test]
    fn numbers_and_times_that_are_none_are_refused() {
        assert!(["0", "50", "all"].iter().all(|t| lines(t).is_ok()));
        assert!(["", "-5", "5x", "--follow", "all "].iter().all(|t| lines(t).is_err()));
        assert!(["yesterday", "2026-11-22 18:00:01", "-1h", "@1795372265"].iter().all(|t| since(t).is_ok()));
        assert!(["", " ", "a\nb", "$(x)", "'", "a;b", &"1".repeat(65)].iter().all(|t| since(t).is_err()));
    }
}
