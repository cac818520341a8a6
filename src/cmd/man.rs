//! `omni-deploy man`: the manual pages, which are part of the binary. On a terminal man(1) shows them; otherwise
//! they come as roff.

use super::{Call, print};
use crate::error::{Error, Result, did_you_mean};
use crate::runner::{Run, RunError};
use argh::FromArgs;
use std::io::{IsTerminal, Write};

/// List the manual pages, or print one.
#[derive(FromArgs)]
#[argh(
    example = "omni-deploy man\nomni-deploy man deployer\nomni-deploy man deployer > /usr/local/share/man/man8/deployer.8"
)]
struct Args {
    /// the page: omni-deploy, deploy-manifest or deployer
    #[argh(positional)]
    page: Option<String>,
}

/// The pages: name, section, roff with `@VERSION@` for ours.
const PAGES: [(&str, &str, &str); 3] = [
    ("omni-deploy", "1", include_str!("../../docs/man/omni-deploy.1")),
    ("deploy-manifest", "1", include_str!("../../docs/man/deploy-manifest.1")),
    ("deployer", "8", include_str!("../../docs/man/deployer.8")),
];

/// Runs the command.
pub fn run(call: &Call) -> Result<u8> {
    let args: Args = call.parse()?;
    let Some(wanted) = args.page else {
        let list = PAGES.map(|(name, section, _)| format!("{name}({section})\n")).concat();
        return print(&list).map(|()| 0);
    };
    let names = |(name, section, _): &(&str, &str, &str)| {
        wanted == *name || wanted == format!("{name}({section})") || wanted == format!("{name}.{section}")
    };
    let Some((_, _, roff)) = PAGES.iter().find(|page| names(page)) else {
        let near = did_you_mean(&wanted, PAGES.iter().map(|(name, ..)| *name));
        return Err(Error::new(format!("no manual page '{wanted}'{near}; 'omni-deploy man' lists them")));
    };
    let text = roff.replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    if std::io::stdout().is_terminal() {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(text.as_bytes())?;
        match Run::new("man").arg("-l").arg(file.path()).inherit() {
            Err(RunError::NotFound { .. }) => {}
            other => return other.map(|status| u8::from(!status.ok())).map_err(Error::from),
        }
    }
    print(&text).map(|()| 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_the_program_has_every_command_and_every_key() {
        let text = PAGES[0].2.replace("\\-", "-");
        for (name, ..) in crate::dispatch::APPLETS {
            assert!(text.contains(&format!(".BR {name} ")), "{name}");
        }
        for key in crate::config::KEYS {
            let line = format!(".BR {} \" (\" {} \", \" {} )", key.name, key.env, key.flag);
            assert!(text.contains(&line), "{line}");
        }
    }

    #[test]
    fn every_subcommand_and_flag_is_in_its_page() {
        for command in crate::cmd::completions::COMMANDS {
            let (page, words) = match command.words.split_once(' ') {
                Some(("manifest", words)) => (1, words),
                Some(("deployer", words)) => (2, words),
                _ => (0, command.words),
            };
            let text = PAGES[page].2.replace("\\-", "-");
            let named = |mark: &str| text.contains(&format!("\n{mark} {words}"));
            assert!(named(".B") || named(".BR"), "{}", command.words);
            for flag in command.flags {
                assert!(text.contains(flag.long), "{} {}", command.words, flag.long);
            }
        }
    }

    #[test]
    fn man_has_nothing_to_say_against_the_pages() {
        for (name, _, roff) in PAGES {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(roff.as_bytes()).unwrap();
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
