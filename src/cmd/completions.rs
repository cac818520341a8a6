//! `omni-deploy completions`: completion for bash, zsh and fish. The scripts are a few lines each and ask this
//! program for the candidates, which come from one table here and, for names, from the manifest. A question of
//! a shell is answered quickly or not at all, and never with an error.

use super::{Call, print};
use crate::config::{self, KEYS};
use crate::dispatch::APPLETS;
use crate::error::{Error, Result};
use crate::manifest::edit;
use crate::see::reports;
use crate::store::ARCHIVE_PREFIX;
use argh::FromArgs;
use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

/// Print the completion script of a shell.
#[derive(FromArgs)]
#[argh(
    example = "omni-deploy completions bash > /etc/bash_completion.d/omni-deploy\nomni-deploy completions zsh > /usr/share/zsh/site-functions/_omni-deploy\nomni-deploy completions fish > ~/.config/fish/completions/omni-deploy.fish",
    note = "The scripts complete omni-deploy, deploy-manifest and deployer, with the services of the manifest."
)]
struct Args {
    /// print the candidates for the last of these words
    #[argh(switch, hidden_help)]
    complete: bool,
    /// bash, zsh or fish
    #[argh(positional, arg_name = "shell")]
    words: Vec<String>,
}

/// What may stand in a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A service of the manifest.
    Service,
    /// A service, `deployer` or `caddy`.
    Journal,
    /// A host of the manifest.
    Host,
    /// A version of the manifest.
    Version,
    /// A file: the shell's own affair.
    File,
    /// One of these words.
    Words(&'static [&'static str]),
    /// Whatever a person likes.
    Free,
}

/// One flag of a command.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// With its dashes.
    pub long: &'static str,
    /// With its dash, or empty.
    pub short: &'static str,
    /// What follows it; None: nothing.
    pub value: Option<Kind>,
}

/// One command as shells see it.
#[derive(Debug, Clone, Copy)]
pub struct Command {
    /// Its words after `omni-deploy`: `status`, `manifest add-service`.
    pub words: &'static str,
    /// Its flags beside those of the configuration and `--help`.
    pub flags: &'static [Flag],
    /// Its arguments in order; files repeat.
    pub args: &'static [Kind],
}

const fn switch(long: &'static str, short: &'static str) -> Flag {
    Flag { long, short, value: None }
}

const fn option(long: &'static str, short: &'static str, kind: Kind) -> Flag {
    Flag { long, short, value: Some(kind) }
}

const JSON: Flag = switch("--json", "");
const HOST: Flag = option("--host", "", Kind::Host);
const SERVICE: Flag = option("--service", "", Kind::Service);
const TIMEOUT: Flag = option("--timeout", "", Kind::Free);
const ACCEPT_SERIAL: Flag = option("--accept-serial", "", Kind::Free);
const RETRY: Flag = option("--retry", "", Kind::Service);
const ALLOW_EMPTY: Flag = switch("--allow-empty", "");

const fn command(words: &'static str, flags: &'static [Flag], args: &'static [Kind]) -> Command {
    Command { words, flags, args }
}

/// The commands and subcommands. A test holds it against what `--help` of each says.
pub const COMMANDS: &[Command] = &[
    command("manifest", &[], &[]),
    command("manifest init", &[], &[]),
    command("manifest show", &[SERVICE], &[Kind::Version]),
    command("manifest list", &[JSON, option("--number", "-n", Kind::Free), switch("--all", "")], &[]),
    command("manifest update", &[option("--revision", "", Kind::Free)], &[Kind::Service, Kind::File]),
    command("manifest add-service", &[], &[Kind::File]),
    command("manifest remove-service", &[], &[Kind::Service]),
    command("manifest set", &[], &[Kind::Service]),
    command("manifest edit", &[option("--draft", "", Kind::File)], &[]),
    command("manifest diff", &[], &[Kind::Version, Kind::Version]),
    command("manifest rollback", &[SERVICE], &[Kind::Version]),
    command("manifest validate", &[], &[Kind::File]),
    command("manifest sign", &[option("--hash", "", Kind::Free)], &[]),
    command("manifest verify", &[option("--accept-version", "", Kind::Free)], &[Kind::Version]),
    command("manifest schema", &[], &[]),
    command("keygen", &[], &[Kind::Free]),
    command("deployer", &[], &[]),
    command("deployer run", &[switch("--timer", ""), RETRY, ALLOW_EMPTY, ACCEPT_SERIAL], &[]),
    command("deployer plan", &[JSON, RETRY, ALLOW_EMPTY, ACCEPT_SERIAL], &[]),
    command("deployer state", &[JSON, switch("--live", ""), switch("--domains", "")], &[]),
    command("deployer watch", &[option("--serial", "", Kind::Free)], &[]),
    command("deployer pause", &[option("--for", "", Kind::Free)], &[Kind::Service]),
    command("deployer resume", &[], &[Kind::Service]),
    command("deployer rollback", &[switch("--unpin", "")], &[Kind::Service]),
    command(
        "push",
        &[SERVICE, switch("--require-clean", ""), switch("--rewrite", ""), switch("--wait", ""), TIMEOUT],
        &[Kind::File],
    ),
    command(
        "ship",
        &[SERVICE, switch("--require-clean", ""), switch("--rewrite", ""), TIMEOUT],
        &[Kind::File],
    ),
    command("status", &[HOST, JSON, switch("--watch", ""), switch("--live", "")], &[Kind::Service]),
    command(
        "logs",
        &[
            switch("--follow", "-f"),
            option("--lines", "-n", Kind::Free),
            option("--since", "", Kind::Free),
            HOST,
        ],
        &[Kind::Journal],
    ),
    command("secrets", &[], &[]),
    command("secrets check", &[HOST], &[Kind::Service]),
    command(
        "secrets edit",
        &[HOST, option("--file", "", Kind::Free), switch("--restart", "")],
        &[Kind::Service],
    ),
    command("doctor", &[switch("--host", ""), JSON], &[]),
    command("init", &[option("--key-name", "", Kind::Free)], &[Kind::Free]),
    command("config", &[JSON], &[]),
    command("completions", &[], &[Kind::Words(&["bash", "zsh", "fish"])]),
    command("man", &[], &[Kind::Words(&["omni-deploy", "deploy-manifest", "deployer"])]),
];

/// How long a shell waits for names.
const PATIENCE: Duration = Duration::from_secs(2);

const BASH: &str = r#"# bash completion for omni-deploy, deploy-manifest and deployer
_omni_deploy() {
    local line cur=${COMP_WORDS[COMP_CWORD]} files=
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ $line == :files ]]; then files=1; else COMPREPLY+=("${line%%$'\t'*}"); fi
    done < <(omni-deploy completions --complete -- "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null)
    if [[ $files ]]; then
        compopt -o filenames
        while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$cur")
    fi
}
complete -F _omni_deploy omni-deploy deploy-manifest deployer
"#;

const ZSH: &str = r#"#compdef omni-deploy deploy-manifest deployer
_omni-deploy() {
    local -a found
    local line word meaning files=0
    for line in "${(@f)$(omni-deploy completions --complete -- "${(@)words[1,CURRENT]}" 2>/dev/null)}"; do
        if [[ $line == :files ]]; then
            files=1
        elif [[ -n $line ]]; then
            # A word, and after a tab what it means, if that is said.
            word=${line%%$'\t'*} meaning=${line#"$word"}
            found+=("${word//:/\\:}${meaning:+:${meaning#$'\t'}}")
        fi
    done
    (( $#found )) && _describe -V omni-deploy found
    (( files )) && _files
    return 0
}
if [[ $funcstack[1] == _omni-deploy ]]; then
    _omni-deploy "$@"
else
    compdef _omni-deploy omni-deploy deploy-manifest deployer
fi
"#;

const FISH: &str = r#"# fish completion for omni-deploy, deploy-manifest and deployer
function __omni_deploy_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    for line in (omni-deploy completions --complete -- $words "$current" 2>/dev/null)
        if test "$line" = :files
            __fish_complete_path "$current"
        else
            printf '%s\n' $line
        end
    end
end
for name in omni-deploy deploy-manifest deployer
    complete -c $name -f -a '(__omni_deploy_complete)'
end
"#;

/// Runs the command.
pub fn run(call: &Call) -> Result<u8> {
    let args: Args = call.parse()?;
    if args.complete {
        let found = candidates(&args.words, &names);
        return print(&found.iter().map(|line| format!("{line}\n")).collect::<String>()).map(|()| 0);
    }
    let script = match args.words.as_slice() {
        [shell] => match shell.as_str() {
            "bash" => BASH,
            "zsh" => ZSH,
            "fish" => FISH,
            _ => {
                return Err(Error::usage(format!(
                    "no completions for '{shell}'; bash, zsh and fish have them"
                )));
            }
        },
        _ => return Err(Error::usage("name one shell: bash, zsh or fish")),
    };
    print(script).map(|()| 0)
}

/// The candidates for the last word, each with a tab and a description where there is one. `names` looks names
/// up for a kind, with the configuration's flags that were typed.
fn candidates(words: &[String], names: &dyn Fn(Kind, &config::Flags) -> Vec<String>) -> Vec<String> {
    let Some((current, before)) = words.split_last() else { return Vec::new() };
    let Some((called, before)) = before.split_first() else { return Vec::new() };
    let mut path = match called.rsplit('/').next() {
        Some("deploy-manifest") => "manifest".to_string(),
        Some("deployer") => "deployer".to_string(),
        _ => String::new(),
    };
    let begins = |candidate: &str| candidate.starts_with(current.as_str());
    if let Some(key) = before.last().and_then(|word| KEYS.iter().find(|k| k.flag == word)) {
        let kind = match key.name {
            "host" | "defaultHosts" => Kind::Host,
            "secretKeyFile" | "unitDir" => Kind::File,
            _ => Kind::Free,
        };
        return values(kind, current, &config::Flags::new(), names);
    }
    let Ok((flags, before)) = config::split_flags(before) else { return Vec::new() };
    let below = |path: &str| -> Vec<&'static str> {
        let prefix = if path.is_empty() { String::new() } else { format!("{path} ") };
        let rest = COMMANDS.iter().filter_map(|c| c.words.strip_prefix(prefix.as_str()));
        rest.filter(|rest| !rest.contains(' ')).collect()
    };
    let mut given = 0;
    let mut before = before.iter();
    while let Some(word) = before.next() {
        let command = COMMANDS.iter().find(|c| c.words == path);
        let flag = command.and_then(|c| c.flags.iter().find(|f| f.long == word || f.short == word));
        match flag {
            Some(Flag { value: Some(kind), .. }) => {
                if before.next().is_none() {
                    return values(*kind, current, &flags, names);
                }
            }
            Some(_) => {}
            None if given == 0 && (path.is_empty() || below(&path).contains(&word.as_str())) => {
                path = if path.is_empty() { word.clone() } else { format!("{path} {word}") };
            }
            None if word.starts_with('-') => {}
            None => given += 1,
        }
    }
    let command = COMMANDS.iter().find(|c| c.words == path);
    if current.starts_with('-') {
        let own = command.map_or(&[][..], |c| c.flags).iter().map(|f| f.long);
        return own
            .chain(["--help"])
            .chain(KEYS.iter().map(|k| k.flag))
            .filter(|f| begins(f))
            .map(String::from)
            .collect();
    }
    if path.is_empty() {
        let applets = APPLETS.iter().filter(|(name, ..)| begins(name));
        return applets.map(|(name, _, what)| format!("{name}\t{what}")).collect();
    }
    let mut found: Vec<String> = match given {
        0 => below(&path).into_iter().filter(|word| begins(word)).map(String::from).collect(),
        _ => Vec::new(),
    };
    let args = command.map_or(&[][..], |c| c.args);
    let repeated = args.last().filter(|kind| **kind == Kind::File);
    if let Some(kind) = args.get(given).or(repeated) {
        found.extend(values(*kind, current, &flags, names));
    }
    found
}

fn values(
    kind: Kind,
    current: &str,
    flags: &config::Flags,
    names: &dyn Fn(Kind, &config::Flags) -> Vec<String>,
) -> Vec<String> {
    let mut all: Vec<String> = match kind {
        Kind::Free => Vec::new(),
        Kind::File => return vec![":files".into()],
        Kind::Words(words) => words.iter().map(|w| w.to_string()).collect(),
        Kind::Service | Kind::Host | Kind::Version => names(kind, flags),
        Kind::Journal => {
            let mut all = names(Kind::Service, flags);
            all.extend(["deployer".into(), "caddy".into()]);
            all
        }
    };
    all.retain(|word| word.starts_with(current));
    all
}

/// Names from the store; none when it does not answer soon.
fn names(kind: Kind, flags: &config::Flags) -> Vec<String> {
    let (sender, found) = mpsc::channel();
    let flags = flags.clone();
    std::thread::spawn(move || {
        // Nobody listens any more when patience ran out.
        drop(sender.send(look_up(kind, &flags).unwrap_or_default()));
    });
    found.recv_timeout(PATIENCE).unwrap_or_default()
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
    let manifest = edit::read(store.as_ref())?;
    Ok(match kind {
        Kind::Host => reports::hosts(&manifest).iter().map(|h| h.to_string()).collect(),
        _ => manifest
            .services
            .iter()
            .map(|s| s.name.to_string())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect(),
    })
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
            ("omni-deploy status ", vec!["ava", "web"]),
            ("omni-deploy status a", vec!["ava"]),
            ("omni-deploy status ava ", vec![]),
            ("omni-deploy status --host ", vec!["biz"]),
            ("omni-deploy --this-host b", vec!["biz"]),
            ("omni-deploy logs -f ", vec!["ava", "web", "deployer", "caddy"]),
            ("omni-deploy logs -n 5 w", vec!["web"]),
            ("omni-deploy logs -n ", vec![]),
            ("omni-deploy status --li", vec!["--live"]),
            ("omni-deploy status --stor", vec!["--store"]),
            ("omni-deploy --secret-key-file ", vec![":files"]),
            ("omni-deploy completions z", vec!["zsh"]),
            ("deploy-manifest ro", vec!["rollback"]),
            ("deploy-manifest rollback --service w", vec!["web"]),
            ("omni-deploy manifest rollback ", vec!["manifest-1.json"]),
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
        let all = complete("omni-deploy ");
        assert_eq!(all, APPLETS.iter().map(|(name, ..)| name.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn every_command_of_the_table_is_one_that_is_dispatched() {
        for command in COMMANDS {
            let first = command.words.split(' ').next().unwrap_or_default();
            assert!(APPLETS.iter().any(|(name, ..)| *name == first), "{}", command.words);
        }
    }

    #[test]
    fn bash_reads_its_script() {
        Run::new("bash").args(["-n", "-c", BASH]).success().unwrap();
    }
}
