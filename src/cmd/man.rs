//! `omni-deploy man`: the manual pages, which are part of the binary. What they say of commands, flags and the
//! configuration comes from where those are declared; the rest is in `docs/man/`. On a terminal man(1) shows them;
//! otherwise they come as roff.

use super::usage::{arguments, filled, options, synopsis};
use super::{print, tree};
use crate::config::KEYS;
use crate::dispatch::{self, ALIASES, Command, invocation};
use crate::error::{Error, Exit, Result, did_you_mean};
use crate::runner::{Run, RunError};
use argh::{ArgsInfo, FromArgs};
use std::io::{IsTerminal, Write};

/// List the manual pages, or show one.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "man",
    example = "{command_name}\n{command_name} deployer\n{command_name} deployer > /usr/local/share/man/man8/deployer.8"
)]
pub(super) struct Args {
    /// the page, also as deployer.8 or deployer(8)
    #[argh(positional, arg_name = "omni-deploy|deploy-manifest|deployer")]
    page: Option<String>,
}

/// The pages: name, section, roff with `@VERSION@`, `@COMMANDS@` and `@CONFIGURATION@` for ours.
const PAGES: [(&str, &str, &str); 3] = [
    ("omni-deploy", "1", include_str!("../../docs/man/omni-deploy.1")),
    ("deploy-manifest", "1", include_str!("../../docs/man/deploy-manifest.1")),
    ("deployer", "8", include_str!("../../docs/man/deployer.8")),
];

pub(super) fn run(args: Args) -> Result<Exit> {
    let Some(wanted) = args.page else {
        let list = PAGES.map(|(name, section, _)| format!("{name}({section})\n")).concat();
        return print(&list).map(|()| Exit::Done);
    };
    let names = |(name, section, _): &(&str, &str, &str)| {
        wanted == *name || wanted == format!("{name}({section})") || wanted == format!("{name}.{section}")
    };
    let Some((name, _, roff)) = PAGES.iter().find(|page| names(page)) else {
        let near = did_you_mean(&wanted, PAGES.iter().map(|(name, ..)| *name));
        return Err(Error::new(format!("no manual page '{wanted}'{near}; 'omni-deploy man' lists them")));
    };
    let text = page(name, roff);
    if std::io::stdout().is_terminal() {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(text.as_bytes())?;
        match Run::new("man").arg("-l").arg(file.path()).inherit() {
            Err(RunError::NotFound { .. }) => {}
            Ok(status) => return Ok(if status.ok() { Exit::Done } else { Exit::Failed }),
            Err(e) => return Err(e.into()),
        }
    }
    print(&text).map(|()| Exit::Done)
}

/// A page as man(1) takes it.
fn page(name: &str, roff: &str) -> String {
    let tree = tree();
    let mut commands = String::new();
    match ALIASES.iter().find(|(called, _)| *called == name) {
        Some((_, of)) => dispatch::shown(&tree).filter(|sub| sub.name == *of).for_each(|sub| {
            dispatch::shown(sub).for_each(|below| section(&mut commands, &[of, below.name], below))
        }),
        None => dispatch::shown(&tree).for_each(|sub| section(&mut commands, &[sub.name], sub)),
    }
    let keys: String = KEYS
        .iter()
        .map(|key| {
            format!(".TP\n.BR {} \" ({}, {})\"\n{}", key.name, key.env, marked(key.flag), paragraph(key.what))
        })
        .collect();
    roff.replace("@VERSION@", env!("CARGO_PKG_VERSION"))
        .replace("@COMMANDS@\n", &commands)
        .replace("@CONFIGURATION@\n", &keys)
}

/// What is said of a command: all of it, or where that is.
fn section(text: &mut String, path: &[&str], command: &Command) {
    let name = invocation(path);
    if let Some((page, number, _)) = PAGES.iter().find(|(page, ..)| *page == name) {
        let what = paragraph(command.description);
        text.push_str(&format!(".SS {}\n{what}See\n.BR {} ({number}).\n", path.join(" "), escaped(page)));
        return;
    }
    if !command.commands.is_empty() {
        return dispatch::shown(command).for_each(|sub| section(text, &[path, &[sub.name]].concat(), sub));
    }
    let usage: Vec<String> = synopsis(command).iter().map(|piece| marked(piece)).collect();
    text.push_str(&format!(
        ".SS {}\n.B {}\n{}.PP\n{}",
        escaped(&name[name.find(' ').map_or(0, |space| space + 1)..]),
        escaped(&name),
        usage.iter().map(|piece| format!("{piece}\n")).collect::<String>(),
        paragraph(command.description)
    ));
    for (head, what) in arguments(command).iter().chain(&options(command)) {
        text.push_str(&format!(".TP\n{}\n{}", marked(head), paragraph(what)));
    }
    for note in command.notes {
        text.push_str(&format!(".PP\n{}", paragraph(&filled(note, &name))));
    }
    for code in command.error_codes {
        text.push_str(&format!(".TP\nExit code {}\n{}", code.code, paragraph(code.description)));
    }
    let examples: String = command.examples.iter().map(|example| filled(example, &name) + "\n").collect();
    text.push_str(&format!(".PP\n.EX\n{}.EE\n", examples.lines().map(paragraph).collect::<String>()));
}

/// A line of text that roff takes for nothing else.
fn paragraph(text: &str) -> String {
    let guard = if text.starts_with(['.', '\'']) { "\\&" } else { "" };
    format!("{guard}{}\n", escaped(text))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// A piece of a usage text: flags are bold, names of values in italics.
fn marked(piece: &str) -> String {
    let word = |word: &str| {
        let (open, word) = word.split_at(word.find(|c| c != '[').unwrap_or(word.len()));
        let (flag, close) = word.split_at(word.find([']', ',']).unwrap_or(word.len()));
        match flag.starts_with('-') {
            true => format!("{open}\\fB{}\\fR{close}", escaped(flag)),
            false => open.to_string() + &escaped(word).replace('<', "\\fI").replace('>', "\\fR"),
        }
    };
    piece.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_flag_and_key_is_in_a_page() {
        let texts = PAGES.map(|(name, _, roff)| page(name, roff).replace("\\-", "-"));
        for (path, command) in dispatch::all(&tree()) {
            let name = invocation(&path);
            let text = &texts[PAGES.iter().position(|(page, ..)| name.starts_with(page)).unwrap()];
            let heading =
                format!("\n.SS {}\n", name.split_once(' ').map_or(name.as_str(), |(_, words)| words));
            assert!(!command.commands.is_empty() || text.contains(&heading), "{name}");
            for flag in dispatch::flags(command) {
                assert!(
                    text.contains(flag.long) && text.contains(&escaped(flag.description).replace("\\-", "-")),
                    "{name} {}",
                    flag.long
                );
            }
        }
        for key in KEYS {
            assert!(texts[0].contains(&format!(".BR {} \" ({}, ", key.name, key.env)), "{}", key.name);
        }
        for mark in ["@VERSION@", "@COMMANDS@", "@CONFIGURATION@"] {
            assert!(texts.iter().all(|text| !text.contains(mark)), "{mark}");
        }
    }

    #[test]
    fn man_has_nothing_to_say_against_the_pages() {
        for (name, _, roff) in PAGES {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(page(name, roff).as_bytes()).unwrap();
            match Run::new("man").args(["--warnings", "-l"]).arg(file.path()).output() {
                Ok(out) => {
                    assert!(out.status.ok() && out.stderr.is_empty(), "{name}: {}", out.stderr);
                    assert!(out.text().contains("SEE ALSO"), "{name}");
                }
                // A machine without man(1) cannot be asked.
                Err(e) => assert!(matches!(e, RunError::NotFound { .. }), "{e}"),
            }
        }
    }
}
