//! What a command line means: a walk along its words over the tree of commands, which argh tells of the types that
//! the arguments are read into ([`argh::ArgsInfo`]). The call itself, help, "did you mean" and completions go by this
//! one walk; usage texts and manual pages by the same tree. Pure.

use crate::config::{Flags, KEYS};
use crate::error::{Error, Result, did_you_mean, nearest};
use argh::{FlagInfo, FlagInfoKind, Optionality};

/// A command, with those below it.
pub type Command = argh::CommandInfoWithArgs;

/// The name of the whole program.
const PROGRAM: &str = "omni-deploy";

/// The names of the program that stand for a command of it.
pub const ALIASES: [(&str, &str); 2] = [("deploy-manifest", "manifest"), ("deployer", "deployer")];

/// Words that people know from other programs, and what does it here.
const HINTS: [(&str, &str); 7] = [
    ("restart", "'sudo systemctl restart SERVICE' on its host does that"),
    ("start", "'sudo deployer resume SERVICE' on its host ends a pause"),
    ("stop", "'sudo deployer pause SERVICE' on its host does that"),
    (
        "deploy",
        "'omni-deploy ship' makes a new version live, 'sudo deployer run' on a host what is published",
    ),
    ("ls", "'omni-deploy status' has the services, 'deploy-manifest list' the versions"),
    ("get", "'deploy-manifest show' prints what should run, 'omni-deploy status' what does"),
    ("rm", "'deploy-manifest remove-service' removes a service"),
];

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The command.
    Run,
    /// Its usage text is to be printed.
    Help,
    /// The program's version is to be printed.
    Version,
    /// Nothing was named; exit 2.
    Nothing,
}

/// A command line, as far as it was understood.
#[derive(Debug, Clone)]
pub struct Line<'t> {
    tree: &'t Command,
    /// The command that was found.
    pub command: &'t Command,
    /// Its words below the tree: `manifest`, `set`.
    pub path: Vec<&'static str>,
    /// The flags of the configuration.
    pub flags: Flags,
    /// The command's own flags.
    given: Vec<(&'static FlagInfo<'static>, Option<String>)>,
    /// Its arguments.
    pub words: Vec<String>,
    /// The name of the value that the last word, a flag, still needs.
    pub awaits: Option<&'static str>,
    /// What a person asked for instead of having the command done.
    asked: Option<Action>,
    /// The first thing that was not understood.
    wrong: Option<String>,
    /// Whether the program was called by the name of a command.
    by_alias: bool,
}

/// Reads a whole argument vector: argv[0] or the first word names the command; the configuration's flags may stand
/// anywhere before a `--`.
pub fn read<'t>(tree: &'t Command, argv: &[String]) -> Line<'t> {
    let program = argv.first().map_or("", |a| a.rsplit('/').next().unwrap_or_default());
    let called = ALIASES.iter().find(|(name, _)| *name == program);
    let mut line = Line {
        tree,
        command: tree,
        path: Vec::new(),
        flags: Flags::new(),
        given: Vec::new(),
        words: Vec::new(),
        awaits: None,
        asked: None,
        wrong: None,
        by_alias: called.is_some(),
    };
    if let Some((_, command)) = called {
        line.descend(command);
    }
    let mut flags_end = false;
    let mut rest = argv.iter().skip(1);
    while let Some(word) = rest.next() {
        match word.as_str() {
            "--" if !flags_end => flags_end = true,
            "help" if !flags_end && line.words.is_empty() => line.asked = Some(Action::Help),
            "version" if line.path.is_empty() && line.words.is_empty() => line.asked = Some(Action::Version),
            flag if !flags_end && flag.len() > 1 && flag.starts_with('-') => line.flag(flag, &mut rest),
            word if line.words.is_empty() && line.descend(word) => {}
            word => line.words.push(word.into()),
        }
    }
    line
}

/// Every command that is shown, with its words, each before those below it.
pub fn all(tree: &Command) -> Vec<(Vec<&'static str>, &Command)> {
    let mut found = Vec::new();
    for sub in shown(tree) {
        found.push((vec![sub.name], sub));
        for (path, below) in all(sub) {
            found.push(([&[sub.name], path.as_slice()].concat(), below));
        }
    }
    found
}

/// The commands below one that are for people: those that say what they do.
pub fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command.commands.iter().map(|sub| &sub.command).filter(|sub| !sub.description.is_empty())
}

/// The flags of a command that are for people, without help's.
pub fn flags(command: &Command) -> impl Iterator<Item = &'static FlagInfo<'static>> + use<> {
    command.flags.iter().filter(|f| !f.hidden && f.long != "--help")
}

/// What is done when none of the commands below is named.
pub fn default_command(command: &Command) -> Option<&'static str> {
    (command.name == "deployer").then_some("run")
}

/// How a command is called: `deploy-manifest set`, `omni-deploy push`.
pub fn invocation(path: &[&str]) -> String {
    let called = path.first().and_then(|first| ALIASES.iter().find(|(_, command)| command == first));
    match called {
        Some((name, _)) => [&[*name], &path[1..]].concat().join(" "),
        None => [&[PROGRAM], path].concat().join(" "),
    }
}

impl Line<'_> {
    fn descend(&mut self, word: &str) -> bool {
        let found = self.command.commands.iter().find(|sub| sub.name == word);
        if let Some(sub) = found {
            self.path.push(sub.name);
            self.command = &sub.command;
        }
        found.is_some()
    }

    /// Whether commands are below this one, so that it does nothing by itself.
    fn is_group(&self) -> bool {
        !self.command.commands.is_empty()
    }

    fn flag<'a>(&mut self, word: &str, rest: &mut impl Iterator<Item = &'a String>) {
        match word {
            "--help" | "-h" => return self.asked = Some(Action::Help),
            "--version" | "-V" if self.is_group() => return self.asked = Some(Action::Version),
            _ => {}
        }
        let is_long = word.starts_with("--");
        let (flag, value) = match word.split_once('=') {
            Some((flag, value)) if is_long => (flag, Some(value)),
            // -n5, and -fn5.
            _ if !is_long && word.chars().count() > 2 => {
                let (flag, value) = word.split_at(1 + word.chars().nth(1).map_or(0, char::len_utf8));
                (flag, Some(value))
            }
            _ => (word, None),
        };
        if let Some(key) = KEYS.iter().find(|key| key.flag == flag) {
            if let Some(value) = self.value(flag, key.value, value, rest) {
                self.flags.insert(key.name, value);
            }
            return;
        }
        if self.is_group() && !self.words.is_empty() {
            // Of a command that there is not.
            return;
        }
        if let Some(default_command) = default_command(self.command) {
            self.descend(default_command);
        }
        let is_it = |f: &&FlagInfo| match is_long {
            true => f.long == flag,
            false => f.short.is_some_and(|short| flag == format!("-{short}")),
        };
        let Some(found) = self.command.flags.iter().find(is_it) else {
            return self.wrong(self.no_flag(if is_long { flag } else { word }));
        };
        if found.optionality != Optionality::Repeating && self.given.iter().any(|(f, _)| f.long == found.long)
        {
            self.wrong(format!("{flag} is given twice"));
        }
        match (&found.kind, value) {
            (FlagInfoKind::Switch, Some(value)) if is_long => {
                self.wrong(format!("{flag} takes no value, but '{value}' was given"));
            }
            (FlagInfoKind::Switch, others) => {
                self.given.push((found, None));
                if let Some(others) = others {
                    self.flag(&format!("-{others}"), rest);
                }
            }
            (FlagInfoKind::Option { arg_name }, value) => {
                if let Some(value) = self.value(flag, arg_name, value, rest) {
                    self.given.push((found, Some(value)));
                }
            }
        }
    }

    /// What follows a flag: after its `=`, or the next word, whatever it begins with.
    fn value<'a>(
        &mut self,
        flag: &str,
        name: &'static str,
        here: Option<&str>,
        rest: &mut impl Iterator<Item = &'a String>,
    ) -> Option<String> {
        let value = here.map(String::from).or_else(|| rest.next().cloned());
        if value.is_none() {
            self.awaits = Some(name);
            self.wrong(format!("{flag} needs a value, <{name}>"));
        }
        value
    }

    fn wrong(&mut self, text: String) {
        self.wrong.get_or_insert(text);
    }

    fn no_flag(&self, flag: &str) -> String {
        let name = self.name();
        if self.is_group() {
            return format!("'{name}' has no flag '{flag}'; the flags of a command come after it");
        }
        let known = flags(self.command).map(|f| f.long).chain(["--help"]).chain(KEYS.map(|k| k.flag));
        let meant = if flag.starts_with("--") { flag.to_string() } else { format!("-{flag}") };
        format!("'{name}' has no flag '{flag}'{}", did_you_mean(&meant, known))
    }

    fn no_command(&self, word: &str) -> Error {
        let name = self.name();
        let all = all(self.tree);
        let called = |is_it: &dyn Fn(&str) -> bool| -> Vec<String> {
            let found = all.iter().filter(|(path, _)| path.last().is_some_and(|last| is_it(last)));
            // The deployer's are typed somewhere else than all others.
            let typed = |path: &[&str]| match path[0] == "deployer" && self.path.first() != Some(&"deployer")
            {
                true => format!("on a host 'sudo {}'", invocation(path)),
                false => format!("'{}'", invocation(path)),
            };
            found
                .map(|(path, command)| format!("{} ({})", typed(path), first_sentence(command.description)))
                .collect()
        };
        let own: Vec<&str> = shown(self.command).map(|sub| sub.name).collect();
        let same = called(&|last| last == word);
        let elsewhere = HINTS.iter().find(|(known, _)| *known == word);
        let others = nearest(word, all.iter().filter_map(|(path, _)| path.last().copied()));
        let hint = match elsewhere {
            _ if !same.is_empty() => format!("; there is {}", same.join(" and ")),
            Some((_, what)) => format!("; {what}"),
            None if !nearest(word, own.iter().copied()).is_empty() => did_you_mean(word, own),
            None if others.is_empty() => String::new(),
            None => format!("; did you mean {}?", called(&|last| others.contains(&last)).join(" or ")),
        };
        Error::usage(format!("'{name}' has no command '{word}'{hint}; '{name} --help' lists what it has"))
    }

    /// How the command is called, for texts: `deploy-manifest set`, or `omni-deploy manifest set`.
    pub fn name(&self) -> String {
        match self.by_alias {
            true => invocation(&self.path),
            false => [&[PROGRAM], self.path.as_slice()].concat().join(" "),
        }
    }

    /// The words that argh is given after the program's name: each flag and value apart, arguments after a `--`.
    pub fn args(&self) -> Vec<String> {
        let mut args: Vec<String> = self.path.iter().map(|word| word.to_string()).collect();
        for (flag, value) in &self.given {
            args.push(flag.long.into());
            args.extend(value.clone());
        }
        args.push("--".into());
        args.extend(self.words.iter().cloned());
        args
    }

    /// What is to be done, or why the line is not understood.
    pub fn meaning(&mut self) -> Result<Action> {
        if self.is_group()
            && let Some(word) = self.words.first()
        {
            return Err(match self.wrong.take() {
                Some(wrong) if self.asked.is_none() => self.usage(&wrong),
                _ => self.no_command(word),
            });
        }
        if let Some(asked) = self.asked {
            return Ok(asked);
        }
        if let Some(default_command) = default_command(self.command) {
            self.descend(default_command);
        }
        match self.wrong.take().or_else(|| self.lacks()) {
            Some(wrong) => Err(self.usage(&wrong)),
            None if self.is_group() => Ok(Action::Nothing),
            None => Ok(Action::Run),
        }
    }

    fn usage(&self, wrong: &str) -> Error {
        Error::usage(format!("{wrong}; '{} --help' has the arguments and an example", self.name()))
    }

    /// What is missing, or too much.
    fn lacks(&self) -> Option<String> {
        let name = self.name();
        let places = self.command.positionals;
        if let Some(next) = places.get(self.words.len()).filter(|p| p.optionality == Optionality::Required) {
            return Some(format!("'{name}' needs <{}>", next.name));
        }
        let given = |long: &str| self.given.iter().any(|(f, _)| f.long == long);
        let required = |f: &&FlagInfo| f.optionality == Optionality::Required && !given(f.long);
        if let Some(flag) = self.command.flags.iter().find(required) {
            return Some(format!("'{name}' needs {}", flag.long));
        }
        let repeats = places.last().is_some_and(|p| p.optionality == Optionality::Repeating);
        let extra = self.words.get(places.len()).filter(|_| !repeats && !self.is_group())?;
        Some(format!("'{name}' does not take the argument '{extra}'"))
    }
}

/// The first sentence of a text, without its end.
pub fn first_sentence(text: &str) -> &str {
    let end = text.find(". ").unwrap_or(text.len());
    text[..end].trim_end_matches('.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::tree;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(String::from).collect()
    }

    /// The words for argh and the configuration's flags, or the error.
    fn understood(line: &str) -> Result<(String, Flags)> {
        let tree = tree();
        let mut line = read(&tree, &words(line));
        assert_eq!(line.meaning()?, Action::Run);
        Ok((line.args().join(" "), line.flags))
    }

    #[test]
    fn the_name_or_the_first_word_picks_the_command() {
        for (line, args) in [
            ("deploy-manifest show", "manifest show --"),
            ("/usr/bin/deploy-manifest show 41", "manifest show -- 41"),
            ("./deployer plan", "deployer plan --"),
            ("deployer", "deployer run --"),
            ("/nix/x/omni-deploy deployer --timer", "deployer run --timer --"),
            ("omni-deploy manifest show", "manifest show --"),
            ("anything push a b", "push -- a b"),
        ] {
            assert_eq!(understood(line).unwrap().0, args, "{line}");
        }
    }

    #[test]
    fn a_flag_is_understood_in_every_form_and_place() {
        for (line, args) in [
            ("omni-deploy logs ava --host biz -f", "logs --host biz --follow -- ava"),
            ("omni-deploy logs --host=biz --follow ava", "logs --host biz --follow -- ava"),
            ("omni-deploy logs -n5 ava", "logs --lines 5 -- ava"),
            ("omni-deploy logs -fn 5 ava", "logs --follow --lines 5 -- ava"),
            ("omni-deploy logs ava --since=-1h", "logs --since -1h -- ava"),
            ("omni-deploy logs ava --since -1h", "logs --since -1h -- ava"),
            ("omni-deploy logs -- -rf", "logs -- -rf"),
            ("deploy-manifest rollback -", "manifest rollback -- -"),
            ("deployer --retry=a --retry b", "deployer run --retry a --retry b --"),
            ("omni-deploy secrets check --host=a=b ava", "secrets check --host a=b -- ava"),
        ] {
            let (found, flags) = understood(line).unwrap();
            assert_eq!((found.as_str(), flags.len()), (args, 0), "{line}");
            // What argh and a process of our own are given means the same again.
            assert_eq!(understood(&format!("omni-deploy {args}")).unwrap().0, args);
        }
        for line in [
            "x --store file:///s status ava",
            "x status --store=file:///s ava",
            "x status ava --store file:///s",
        ] {
            let (args, flags) = understood(line).unwrap();
            assert_eq!((args.as_str(), flags["store"].as_str()), ("status -- ava", "file:///s"), "{line}");
        }
        let (args, flags) = understood("omni-deploy keygen -- --store").unwrap();
        assert_eq!((args.as_str(), flags.len()), ("keygen -- --store", 0));
    }

    #[test]
    fn what_is_not_understood_is_said_with_what_was_meant() {
        for (line, said) in [
            ("omni-deploy pusch", "'omni-deploy' has no command 'pusch'; did you mean 'push'?"),
            ("omni-deploy help pusch", "did you mean 'push'?"),
            ("omni-deploy statsu --host biz", "did you mean 'status'"),
            ("deploy-manifest shwo", "'deploy-manifest' has no command 'shwo'; did you mean 'show'?"),
            ("omni-deploy rollback", "there is 'deploy-manifest rollback' (Publish the"),
            ("omni-deploy rollback ava", "and on a host 'sudo deployer rollback' (Go back"),
            ("omni-deploy list", "there is 'deploy-manifest list'"),
            ("omni-deploy rolback", "did you mean 'deploy-manifest rollback' (Publish"),
            ("omni-deploy restart ava", "'sudo systemctl restart SERVICE' on its host"),
            ("deploy-manifest run", "there is on a host 'sudo deployer run' (Make"),
            ("deployer push", "'deployer' has no command 'push'; there is 'omni-deploy push'"),
            ("deployer check", "there is 'omni-deploy secrets check'"),
            ("omni-deploy zzzzzz", "no command 'zzzzzz'; 'omni-deploy --help' lists"),
            (
                "omni-deploy status --hots biz",
                "'omni-deploy status' has no flag '--hots'; did you mean '--host'",
            ),
            ("omni-deploy status --jsno", "did you mean '--json'"),
            ("omni-deploy status --sotre=x", "did you mean '--store'"),
            ("omni-deploy status -host biz", "no flag '-host'; did you mean '--host'"),
            ("omni-deploy logs -x", "no flag '-x'; 'omni-deploy logs --help'"),
            (
                "omni-deploy --host biz status",
                "'omni-deploy' has no flag '--host'; the flags of a command come after it",
            ),
            ("omni-deploy status --json=yes", "--json takes no value, but 'yes' was given"),
            ("omni-deploy status --host", "--host needs a value, <host>"),
            ("omni-deploy status --store", "--store needs a value, <url>"),
            ("omni-deploy status --host a --host=b", "--host is given twice"),
            ("omni-deploy status a b", "'omni-deploy status' does not take the argument 'b'"),
            ("omni-deploy push", "'omni-deploy push' needs <target>"),
            ("deploy-manifest set", "'deploy-manifest set' needs <service>"),
            ("omni-deploy manifest set ava", "'omni-deploy manifest set' needs <field=value>"),
            ("deployer watch", "'deployer watch' needs --serial"),
            ("deployer --tiemr", "'deployer run' has no flag '--tiemr'; did you mean '--timer'"),
        ] {
            let error = understood(line).unwrap_err();
            assert!(
                error.exit() == crate::error::Exit::Usage && error.to_string().contains(said),
                "{line}: {error}"
            );
        }
    }

    #[test]
    fn help_is_of_the_command_that_is_named_wherever_it_is_asked_for() {
        for (line, name) in [
            ("omni-deploy --help", "omni-deploy"),
            ("omni-deploy help", "omni-deploy"),
            ("omni-deploy help status", "omni-deploy status"),
            ("omni-deploy -h status", "omni-deploy status"),
            ("omni-deploy status --hots -h", "omni-deploy status"),
            ("omni-deploy status ava --help", "omni-deploy status"),
            ("omni-deploy push help", "omni-deploy push"),
            ("omni-deploy help manifest set", "omni-deploy manifest set"),
            ("deploy-manifest help set", "deploy-manifest set"),
            ("deploy-manifest set help", "deploy-manifest set"),
            ("deployer --help", "deployer"),
            ("deployer --timer --help", "deployer run"),
        ] {
            let tree = tree();
            let mut read = read(&tree, &words(line));
            let meaning = read.meaning().unwrap();
            assert_eq!((meaning, read.name().as_str()), (Action::Help, name), "{line}");
        }
    }

    #[test]
    fn what_names_nothing_is_told_apart_from_a_question() {
        let meaning = |line: &str| read(&tree(), &words(line)).meaning().unwrap();
        for line in
            ["", "omni-deploy", "deploy-manifest", "omni-deploy secrets", "omni-deploy --store file:///s"]
        {
            assert_eq!(meaning(line), Action::Nothing, "{line}");
        }
        for line in
            ["omni-deploy --version", "omni-deploy version", "deployer --version", "deploy-manifest -V"]
        {
            assert_eq!(meaning(line), Action::Version, "{line}");
        }
    }

    #[test]
    fn the_tables_beside_the_tree_name_what_is_in_it() {
        let tree = tree();
        let all = all(&tree);
        for (name, command) in ALIASES {
            assert!(all.iter().any(|(path, _)| *path == [command]), "{name}");
        }
        let defaults: Vec<Vec<&str>> = all
            .iter()
            .filter_map(|(path, command)| Some([path.as_slice(), &[default_command(command)?]].concat()))
            .collect();
        assert_eq!(defaults, [["deployer", "run"]]);
        assert!(all.iter().any(|(path, _)| *path == defaults[0]));
        for (word, what) in HINTS {
            assert!(!all.iter().any(|(path, _)| path.last() == Some(&word)), "{word} is a command");
            for quoted in what.split('\'').skip(1).step_by(2) {
                let line = words(quoted.trim_start_matches("sudo "));
                let known = line[0] == "systemctl"
                    || all.iter().any(|(path, _)| invocation(path) == line[..2].join(" "));
                assert!(known, "{quoted}");
            }
        }
        for (path, command) in &all {
            for flag in command.flags {
                let taken = KEYS.iter().any(|k| k.flag == flag.long) || flag.short == Some('h');
                assert!(!taken, "{path:?}: {} is understood otherwise", flag.long);
            }
        }
    }
}
