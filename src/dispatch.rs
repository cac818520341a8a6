//! Which command a command line means: decided by argv[0] (`deploy-manifest`, `deployer`, also as a path or
//! through a symlink) or by the first argument. Pure.

/// The commands, one module of [`crate::cmd`] each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applet {
    /// Edit and read the manifest.
    Manifest,
    /// Bring this host to what the manifest says.
    Deployer,
    /// Build, cache and publish.
    Push,
    /// Push, then make it live now.
    Ship,
    /// What should run and what does.
    Status,
    /// Journals of the hosts.
    Logs,
    /// Secrets on the hosts.
    Secrets,
    /// Check this machine.
    Doctor,
    /// Set this machine up.
    Init,
    /// Make a signing key.
    Keygen,
    /// The effective configuration.
    Config,
    /// Completions of a shell.
    Completions,
    /// The manual pages.
    Man,
}

/// The commands with the names they are called by and what each is for.
pub const APPLETS: [(&str, Applet, &str); 13] = [
    ("manifest", Applet::Manifest, "edit and read the manifest (also called as deploy-manifest)"),
    ("deployer", Applet::Deployer, "bring this host to what the manifest says (also called as deployer)"),
    ("push", Applet::Push, "build, copy to the cache, publish"),
    ("ship", Applet::Ship, "push, then make it live on its hosts now"),
    ("status", Applet::Status, "what should run, what runs, and what is off"),
    ("logs", Applet::Logs, "the journal of a service, the deployer or Caddy, from the hosts"),
    ("secrets", Applet::Secrets, "look at a service's secrets on its hosts, or edit them"),
    ("doctor", Applet::Doctor, "check configuration, store, keys and host, with remedies"),
    ("init", Applet::Init, "set a developer's machine up"),
    ("keygen", Applet::Keygen, "make a signing key"),
    ("config", Applet::Config, "print the effective configuration and where it came from"),
    ("completions", Applet::Completions, "print completions for bash, zsh or fish"),
    ("man", Applet::Man, "print a manual page"),
];

/// What a command line means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Run a command: how it was called (for usage texts) and its own arguments.
    Run {
        /// `deploy-manifest`, or `omni-deploy manifest`.
        name: String,
        /// The command.
        applet: Applet,
        /// What follows.
        args: Vec<String>,
    },
    /// Print the overview: asked for (exit 0).
    Help,
    /// Print the version.
    Version,
    /// Nothing was asked for: the overview on stderr, exit 2.
    Nothing,
    /// There is no such command; exit 2.
    Unknown(String),
}

/// Decides from the whole argument vector, out of which the configuration's flags were taken before
/// ([`crate::config::split_flags`]).
pub fn from_args(argv: &[String]) -> Invocation {
    let called = argv.first().map_or("", |a| a.rsplit('/').next().unwrap_or_default());
    let args = argv.get(1..).unwrap_or_default();
    let by_name = match called {
        "deploy-manifest" => Some(Applet::Manifest),
        "deployer" => Some(Applet::Deployer),
        _ => None,
    };
    if let Some(applet) = by_name {
        if args.first().is_some_and(|a| a == "--version") {
            return Invocation::Version;
        }
        return Invocation::Run { name: called.to_string(), applet, args: args.to_vec() };
    }
    match args.first().map(String::as_str) {
        None => Invocation::Nothing,
        Some("--help" | "-h" | "help") => Invocation::Help,
        Some("--version" | "-V" | "version") => Invocation::Version,
        Some(word) => match APPLETS.iter().find(|(name, ..)| *name == word) {
            Some((name, applet, _)) => Invocation::Run {
                name: format!("omni-deploy {name}"),
                applet: *applet,
                args: args[1..].to_vec(),
            },
            None => Invocation::Unknown(word.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meaning(line: &[&str]) -> Invocation {
        from_args(&line.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn the_name_or_the_first_argument_picks_the_command() {
        for (line, applet, name, rest) in [
            (vec!["deploy-manifest", "show"], Applet::Manifest, "deploy-manifest", vec!["show"]),
            (vec!["/usr/bin/deploy-manifest"], Applet::Manifest, "deploy-manifest", vec![]),
            (vec!["./deployer", "plan"], Applet::Deployer, "deployer", vec!["plan"]),
            (vec!["omni-deploy", "manifest", "show"], Applet::Manifest, "omni-deploy manifest", vec!["show"]),
            (vec!["/nix/x/omni-deploy", "deployer"], Applet::Deployer, "omni-deploy deployer", vec![]),
            (vec!["anything", "push", "a", "b"], Applet::Push, "omni-deploy push", vec!["a", "b"]),
            (vec!["deployer", "push"], Applet::Deployer, "deployer", vec!["push"]),
        ] {
            let rest: Vec<String> = rest.iter().map(|s| s.to_string()).collect();
            assert_eq!(meaning(&line), Invocation::Run { name: name.into(), applet, args: rest }, "{line:?}");
        }
    }

    #[test]
    fn what_is_no_command_is_told_apart_from_a_question() {
        assert_eq!(meaning(&["omni-deploy"]), Invocation::Nothing);
        assert_eq!(meaning(&[]), Invocation::Nothing);
        assert_eq!(meaning(&["omni-deploy", "--help"]), Invocation::Help);
        assert_eq!(meaning(&["omni-deploy", "--version"]), Invocation::Version);
        assert_eq!(meaning(&["deployer", "--version"]), Invocation::Version);
        assert_eq!(meaning(&["omni-deploy", "pusch"]), Invocation::Unknown("pusch".into()));
    }
}
