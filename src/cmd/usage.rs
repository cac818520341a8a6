//! Usage texts: what argh knows of a command, laid out for a terminal. Pure.

use crate::config::KEYS;
use crate::dispatch::{self, Command};
use argh::{FlagInfo, FlagInfoKind, Optionality};

const WIDTH: usize = 80;
/// Where explanations begin.
const COLUMN: usize = 24;

/// What may follow a command's name, in pieces that stay whole: `[--host <host>]`, `<service>`.
pub fn synopsis(command: &Command) -> Vec<String> {
    let piece = |text: String, optionality: &Optionality| match optionality {
        Optionality::Required => text,
        Optionality::Optional => format!("[{text}]"),
        Optionality::Repeating | Optionality::Greedy => format!("[{text}]..."),
    };
    let flag = |f: &FlagInfo| {
        let name = f.short.map_or(f.long.to_string(), |short| format!("-{short}"));
        let text = match f.kind {
            FlagInfoKind::Switch => name,
            FlagInfoKind::Option { arg_name } => format!("{name} <{arg_name}>"),
        };
        piece(text, &f.optionality)
    };
    let mut pieces: Vec<String> = dispatch::flags(command).map(flag).collect();
    let arguments = command.positionals.iter().filter(|p| !p.hidden);
    pieces.extend(arguments.map(|p| piece(format!("<{}>", p.name), &p.optionality)));
    if !command.commands.is_empty() {
        let named = if dispatch::default_command(command).is_some() { "[<command>]" } else { "<command>" };
        pieces.extend([named, "[<args>]"].map(String::from));
    }
    pieces
}

/// A flag as it stands in a list: `-n, --lines <lines>`.
fn heading(flag: &FlagInfo) -> String {
    let short = flag.short.map(|short| format!("-{short}, ")).unwrap_or_default();
    match flag.kind {
        FlagInfoKind::Switch => format!("{short}{}", flag.long),
        FlagInfoKind::Option { arg_name } => format!("{short}{} <{arg_name}>", flag.long),
    }
}

/// Something in a list of a usage text, and what is said of it.
pub type Entry = (String, &'static str);

/// The arguments of a command.
pub fn arguments(command: &Command) -> Vec<Entry> {
    let described = command.positionals.iter().filter(|p| !p.hidden && !p.description.is_empty());
    described.map(|p| (format!("<{}>", p.name), p.description)).collect()
}

/// The flags of a command.
pub fn options(command: &Command) -> Vec<Entry> {
    dispatch::flags(command).map(|f| (heading(f), f.description)).collect()
}

/// An example or a note as it is meant: argh's own form of them has the command's name and braces escaped.
pub fn filled(text: &str, name: &str) -> String {
    text.replace("{command_name}", name).replace("{{", "{").replace("}}", "}")
}

/// The usage text of a command that is called `name`.
pub fn help(command: &Command, name: &str) -> String {
    let mut text = String::from("Usage: ");
    let pieces = synopsis(command);
    let indent = text.len() + 2;
    wrap(&mut text, indent, [name].into_iter().chain(pieces.iter().map(String::as_str)));
    text.push('\n');
    wrap(&mut text, 0, command.description.split_whitespace());
    let mut options = options(command);
    options.push(("-h, --help".into(), "print this"));
    let commands =
        dispatch::shown(command).map(|sub| (sub.name.into(), dispatch::first_sentence(sub.description)));
    let lists = [("Arguments", arguments(command)), ("Options", options), ("Commands", commands.collect())];
    for (title, entries) in lists {
        if !entries.is_empty() {
            text.push_str(&format!("\n{title}:\n"));
        }
        for (head, what) in entries {
            entry(&mut text, &head, COLUMN, what);
        }
    }
    if !command.examples.is_empty() {
        text.push_str("\nExamples:\n");
    }
    for line in command.examples.iter().flat_map(|example| example.lines()) {
        text.push_str(format!("  {}", filled(line, name)).trim_end());
        text.push('\n');
    }
    for line in command.notes.iter().flat_map(|note| note.lines()) {
        text.push('\n');
        wrap(&mut text, 0, filled(line, name).split_whitespace());
    }
    if !command.error_codes.is_empty() {
        text.push_str("\nExit codes:\n");
    }
    for code in command.error_codes {
        entry(&mut text, &code.code.to_string(), 5, code.description);
    }
    text.push('\n');
    if name.contains(' ') || dispatch::ALIASES.iter().any(|(called, _)| *called == name) {
        text.push_str("Takes the flags of the configuration (--store, …) too: omni-deploy --help\n");
    } else {
        let keys = KEYS.map(|key| key.flag);
        let words = "Flags of the configuration, which every command takes:".split(' ').chain(keys);
        wrap(&mut text, 2, words);
    }
    text
}

fn entry(text: &mut String, head: &str, column: usize, what: &str) {
    text.push_str("  ");
    text.push_str(head);
    let width = 2 + head.chars().count();
    let gap = match column.checked_sub(width + 2) {
        Some(gap) => " ".repeat(gap + 2),
        None => format!("\n{}", " ".repeat(column)),
    };
    text.push_str(&gap);
    wrap(text, column, what.split_whitespace());
}

/// Appends words and the end of the line. A line that would be too long is broken, and goes on at `indent`.
fn wrap<'w>(text: &mut String, indent: usize, words: impl Iterator<Item = &'w str>) {
    let mut column = text.rsplit('\n').next().unwrap_or_default().chars().count();
    for (n, word) in words.enumerate() {
        let width = word.chars().count();
        if n > 0 && column + 1 + width > WIDTH {
            text.push('\n');
            text.push_str(&" ".repeat(indent));
            column = indent;
        } else if n > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += width;
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::tree;

    #[test]
    fn what_is_needed_stands_without_brackets() {
        let tree = tree();
        let usage = |name: &str| {
            let all = dispatch::all(&tree);
            let (_, command) = all.into_iter().find(|(path, _)| path.join(" ") == name).unwrap();
            synopsis(command).join(" ")
        };
        assert_eq!(usage("manifest set"), "<service> <field=value> [<field=value>]...");
        assert_eq!(usage("manifest update"), "[--revision <commit>] <service> <storepath>");
        assert_eq!(usage("deployer watch"), "--serial <serial>");
        assert_eq!(usage("deployer"), "[<command>] [<args>]");
        assert_eq!(usage("manifest"), "<command> [<args>]");
        assert_eq!(usage("completions"), "<bash|zsh|fish>");
        assert!(usage("push").ends_with("<target> [<target>]..."), "{}", usage("push"));
    }

    #[test]
    fn no_line_but_an_example_is_wider_than_a_terminal() {
        let tree = tree();
        for (path, command) in dispatch::all(&tree).into_iter().chain([(vec![], &tree)]) {
            let text = help(command, &dispatch::invocation(&path));
            let (before, after) =
                text.split_once("\nExamples:\n").unwrap_or_else(|| panic!("{path:?} has no example"));
            let examples = after.find("\n\n").unwrap_or(0);
            for line in before.lines().chain(after[examples..].lines()) {
                assert!(line.chars().count() <= WIDTH, "{path:?}: {line}");
            }
            assert!(after[..examples].contains(&dispatch::invocation(&path)), "{path:?}: {after}");
            assert!(!text.contains("{{") && !text.contains("{command_name}"), "{text}");
        }
    }
}
