//! `omni-deploy completions`: completion for bash, zsh and fish. The scripts are a few lines each and ask this
//! program for the candidates, which come from the tree of commands and, for names, from the manifest. A question of
//! a shell is answered quickly or not at all, and never with an error.

use super::{print, tree};
use crate::config::{self, KEYS};
use crate::dispatch;
use crate::error::{Error, Exit, Result};
use crate::manifest::current;
use crate::store::ARCHIVE_PREFIX;
use argh::{ArgsInfo, FromArgs, Optionality};
use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

/// Print the completion script of a shell.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "completions",
    example = "{command_name} bash > /etc/bash_completion.d/omni-deploy\n{command_name} zsh > /usr/share/zsh/site-functions/_omni-deploy\n{command_name} fish > ~/.config/fish/completions/omni-deploy.fish",
    note = "The scripts complete omni-deploy, deploy-manifest and deployer, with the services of the manifest."
)]
pub(super) struct Args {
    /// print the candidates for the last of the words
    #[argh(switch, hidden_help)]
    complete: bool,
    /// the shell
    #[argh(positional, arg_name = "bash|zsh|fish")]
    shell: String,
    #[argh(positional, hidden_help)]
    words: Vec<String>,
}

/// What can be offered for a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A service of the manifest.
    Service,
    /// A host of the manifest.
    Host,
    /// A version of the manifest.
    Version,
    /// A file: the shell's own affair.
    File,
    /// Whatever a person likes.
    Free,
}

/// What can be offered for the values that usage texts name so. Of several, as in `deployer|caddy`, those that are not
/// here are to be typed as they are.
const KINDS: [(Kind, &[&str]); 5] = [
    (Kind::Service, &["service"]),
    (Kind::Host, &["host"]),
    (Kind::Version, &["version"]),
    (Kind::File, &["file", "directory", "storepath", "target"]),
    (
        Kind::Free,
        &[
            "@file",
            "-",
            "json",
            "name",
            "key",
            "url",
            "command",
            "commit",
            "hash",
            "count",
            "lines",
            "number",
            "serial",
            "seconds",
            "time",
            "field=value",
        ],
    ),
];

/// How long a shell waits for names.
const LOOKUP_WITHIN: Duration = Duration::from_secs(2);

const BASH: &str = include_str!("completions/omni-deploy.bash");
const ZSH: &str = include_str!("completions/omni-deploy.zsh");
const FISH: &str = include_str!("completions/omni-deploy.fish");

pub(super) fn run(args: &Args) -> Result<Exit> {
    if args.complete {
        let words = [std::slice::from_ref(&args.shell), &args.words].concat();
        let found = candidates(&words, &names);
        return print(&found.iter().map(|line| format!("{line}\n")).collect::<String>()).map(|()| Exit::Done);
    }
    if let Some(other) = args.words.first() {
        return Err(Error::usage(format!("expected one shell; '{other}' is a second one")));
    }
    let script = match args.shell.as_str() {
        "bash" => BASH,
        "zsh" => ZSH,
        "fish" => FISH,
        shell => {
            return Err(Error::usage(format!("no completions for '{shell}'; expected bash, zsh or fish")));
        }
    };
    print(script).map(|()| Exit::Done)
}

/// The candidates for the last word, each with a tab and a description where there is one. `names` looks names
/// up for a kind, with the configuration's flags that were typed.
fn candidates(words: &[String], names: &dyn Fn(Kind, &config::Flags) -> Vec<String>) -> Vec<String> {
    let Some((current, before)) = words.split_last() else { return Vec::new() };
    if before.is_empty() {
        return Vec::new();
    }
    let (current, before, prefix) = match current.split_once('=') {
        Some((flag, value)) if flag.starts_with("--") => {
            (value, [before, &[flag.to_string()]].concat(), format!("{flag}="))
        }
        _ => (current.as_str(), before.to_vec(), String::new()),
    };
    let tree = tree();
    let line = dispatch::read(&tree, &before);
    let value = |name: &str| {
        let mut all: Vec<String> =
            name.split('|').flat_map(|part| offered(part, name, &line.flags, names)).collect();
        all.retain(|word| word.starts_with(current) || word == FILES);
        all.iter().map(|word| if word == FILES { word.clone() } else { format!("{prefix}{word}") }).collect()
    };
    if let Some(name) = line.awaits {
        return value(name);
    }
    let described = |(word, what): (&str, &str)| {
        word.starts_with(current).then(|| format!("{word}\t{}", dispatch::first_sentence(what)))
    };
    if current.starts_with('-') {
        let own = dispatch::flags(line.command).map(|f| (f.long, f.description));
        let others = KEYS.map(|k| (k.flag, k.what));
        return own.chain([("--help", "print the usage")]).chain(others).filter_map(described).collect();
    }
    if !line.command.commands.is_empty() {
        let below = dispatch::shown(line.command).map(|sub| (sub.name, sub.description));
        return if line.words.is_empty() { below.filter_map(described).collect() } else { Vec::new() };
    }
    let places = line.command.positionals;
    let repeated = places.last().filter(|p| p.optionality == Optionality::Repeating);
    match places.get(line.words.len()).or(repeated).filter(|p| !p.hidden) {
        Some(place) => value(place.name),
        None => Vec::new(),
    }
}

/// Stands for files, which the shell completes itself.
const FILES: &str = ":files";

/// What can be offered for a part of a value's name.
fn offered(
    part: &str,
    name: &str,
    flags: &config::Flags,
    names: &dyn Fn(Kind, &config::Flags) -> Vec<String>,
) -> Vec<String> {
    match KINDS.iter().find(|(_, known)| known.contains(&part)) {
        Some((Kind::Free, _)) => Vec::new(),
        Some((Kind::File, _)) => vec![FILES.into()],
        Some((kind, _)) => names(*kind, flags),
        None if part == name => Vec::new(),
        None => vec![part.into()],
    }
}

/// Names from the store; none when it does not answer soon.
fn names(kind: Kind, flags: &config::Flags) -> Vec<String> {
    let (sender, found) = mpsc::channel();
    let flags = flags.clone();
    std::thread::spawn(move || {
        // Nobody listens any more after that.
        drop(sender.send(look_up(kind, &flags).unwrap_or_default()));
    });
    found.recv_timeout(LOOKUP_WITHIN).unwrap_or_default()
}

fn look_up(kind: Kind, flags: &config::Flags) -> Result<Vec<String>> {
    let settings = config::load(flags)?;
    let store = crate::store::open(&settings.store)?;
    if kind == Kind::Version {
        let plain = |key: &str| {
            let name = key.strip_prefix(ARCHIVE_PREFIX)?;
            let well = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (!name.is_empty() && name.chars().all(well)).then(|| name.to_string())
        };
        return Ok(store.list(ARCHIVE_PREFIX)?.iter().filter_map(|key| plain(key)).collect());
    }
    let manifest = current::read(store.as_ref())?;
    let names: BTreeSet<String> = match kind {
        Kind::Host => manifest.hosts().iter().map(ToString::to_string).collect(),
        _ => manifest.services.iter().map(|s| s.name.to_string()).collect(),
    };
    Ok(names.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::Run;

    fn complete(line: &str) -> Vec<String> {
        let names = |kind: Kind, _: &config::Flags| match kind {
            Kind::Service => vec!["ava".to_string(), "web".to_string()],
            Kind::Host => vec!["biz".to_string()],
            _ => vec!["manifest-1.json".to_string()],
        };
        let words: Vec<String> = line.split(' ').map(String::from).collect();
        let found = candidates(&words, &names);
        found.iter().map(|l| l.split('\t').next().unwrap_or_default().to_string()).collect()
    }

    #[test]
    fn the_word_is_completed_by_what_stands_before_it() {
        for (line, want) in [
            ("omni-deploy sta", vec!["status"]),
            ("/usr/bin/omni-deploy --store s3://b sta", vec!["status"]),
            ("omni-deploy help sta", vec!["status"]),
            ("omni-deploy status ", vec!["ava", "web"]),
            ("omni-deploy status a", vec!["ava"]),
            ("omni-deploy status ava ", vec![]),
            ("omni-deploy status --host ", vec!["biz"]),
            ("omni-deploy status --host=", vec!["--host=biz"]),
            ("omni-deploy status --host=b", vec!["--host=biz"]),
            ("omni-deploy status --host=biz w", vec!["web"]),
            ("omni-deploy --this-host b", vec!["biz"]),
            ("omni-deploy logs -f ", vec!["ava", "web", "deployer", "caddy"]),
            ("omni-deploy logs -n 5 w", vec!["web"]),
            ("omni-deploy logs -n ", vec![]),
            ("omni-deploy status --li", vec!["--live"]),
            ("omni-deploy status --stor", vec!["--store"]),
            ("omni-deploy --secret-key-file ", vec![":files"]),
            ("omni-deploy --secret-key-file=/et", vec![":files"]),
            ("omni-deploy completions z", vec!["zsh"]),
            ("omni-deploy completions zsh ", vec![]),
            ("omni-deploy man depl", vec!["deploy-manifest", "deployer"]),
            ("omni-deploy secrets ", vec!["check", "edit"]),
            ("omni-deploy secrets check ", vec!["ava", "web"]),
            ("deploy-manifest ro", vec!["rollback"]),
            ("deploy-manifest rollback --service w", vec!["web"]),
            ("omni-deploy manifest rollback ", vec!["manifest-1.json"]),
            ("deploy-manifest diff 1 ", vec!["manifest-1.json"]),
            ("deploy-manifest update ava ", vec![":files"]),
            ("omni-deploy push a.py ", vec![":files"]),
            ("deployer run --retry a", vec!["ava"]),
            ("deployer run --all", vec!["--allow-empty"]),
            ("deployer pl", vec!["plan"]),
            ("omni-deploy nonsense ", vec![]),
            ("omni-deploy", vec![]),
        ] {
            assert_eq!(complete(line), want, "{line:?}");
        }
        let tree = tree();
        let commands: Vec<&str> = dispatch::shown(&tree).map(|sub| sub.name).collect();
        assert_eq!(complete("omni-deploy "), commands);
    }

    #[test]
    fn every_value_has_a_kind_and_every_kind_a_value() {
        fn used(command: &dispatch::Command, names: &mut BTreeSet<&'static str>) {
            names.extend(command.positionals.iter().filter(|p| !p.hidden).map(|p| p.name));
            names.extend(dispatch::flags(command).filter_map(|f| match f.kind {
                argh::FlagInfoKind::Option { arg_name } => Some(arg_name),
                argh::FlagInfoKind::Switch => None,
            }));
            dispatch::shown(command).for_each(|sub| used(sub, names));
        }
        let mut names: BTreeSet<&str> = KEYS.iter().map(|k| k.value).collect();
        used(&tree(), &mut names);
        for name in &names {
            let known = KINDS.iter().any(|(_, known)| known.contains(name)) || name.contains('|');
            assert!(known, "what can be offered for <{name}>? KINDS does not say");
        }
        let parts: BTreeSet<&str> = names.iter().flat_map(|name| name.split('|')).collect();
        for known in KINDS.iter().flat_map(|(_, known)| *known) {
            assert!(parts.contains(known), "nothing is called <{known}>");
        }
    }

    #[test]
    fn bash_reads_its_script() {
        Run::new("bash").args(["-n", "-c", BASH]).success().unwrap();
    }
}
