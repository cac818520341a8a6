//! How a command reaches a host: over ssh, or directly when the host is this machine. It owns the argument
//! vector and its quoting for the remote shell; it never decides what is run, and never asks for a password.

use crate::config::Settings;
use crate::error::{Error, Result};
use crate::names::HostName;
use crate::runner::{Output, Run, RunError, Status, tail};
use std::time::Duration;

/// What ssh exits with when it could not run the command at all (ssh(1)).
const SSH_FAILED: Status = Status::Exit(255);

/// A run of `words` on `host`, as root if `sudo`. Over ssh it fails rather than asks for a password, and a
/// host that does not take the connection is given up after ten seconds, one that falls silent later after a
/// minute; add a deadline for what must end sooner.
pub fn run_on(settings: &Settings, host: &HostName, sudo: bool, words: &[&str]) -> Run {
    let argv = argv_on(settings, host, sudo && !(is_here(settings, host) && is_root()), words);
    Run::new(&argv[0]).args(&argv[1..])
}

/// Runs `words` on `host` and returns what they left, whatever their exit status; an error when the host was
/// not reached or they were still running at the deadline.
pub fn output_on(
    settings: &Settings,
    host: &HostName,
    sudo: bool,
    words: &[&str],
    deadline: Duration,
) -> Result<Output> {
    answer_of(settings, host, words, run_on(settings, host, sudo, words).deadline(deadline))
}

/// What a run of `words` on `host` ([`run_on`], maybe with a stdin) left, as [`output_on`] has it.
pub fn answer_of(settings: &Settings, host: &HostName, words: &[&str], run: Run) -> Result<Output> {
    let over_ssh = !is_here(settings, host);
    match run.output() {
        Ok(output) if over_ssh && output.status == SSH_FAILED => {
            let said = tail(&output.stderr);
            let said = if said.is_empty() { "it said nothing".to_string() } else { said };
            Err(Error::new(format!(
                "host {host} does not answer: {said}; try '{} {host} true'",
                settings.ssh.join(" ")
            )))
        }
        Ok(output) => Ok(output),
        Err(RunError::Deadline { after, .. }) if over_ssh => Err(Error::new(format!(
            "host {host} gave no answer to '{}' within {} s; look at it with '{} {host}'",
            words.join(" "),
            after.as_secs(),
            settings.ssh.join(" ")
        ))),
        Err(e) => Err(e.into()),
    }
}

/// Whether `host` is this machine.
pub fn is_here(settings: &Settings, host: &HostName) -> bool {
    *host == settings.host
}

/// Whether this process may do what root may (its effective user is root).
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn argv_on(settings: &Settings, host: &HostName, sudo: bool, words: &[&str]) -> Vec<String> {
    let command = sudo.then_some("sudo").into_iter().chain(words.iter().copied());
    if is_here(settings, host) {
        return command.map(String::from).collect();
    }
    let mut argv = if settings.ssh.is_empty() { vec!["ssh".to_string()] } else { settings.ssh.clone() };
    if argv[0].rsplit('/').next() == Some("ssh") {
        // Of an option given twice ssh takes the first: the configured words come before ours.
        // A host that dies after it took the connection is given up after three unanswered questions.
        let options = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15"];
        argv.extend(options.iter().flat_map(|o| ["-o", *o]).chain(["--"]).map(String::from));
    }
    argv.push(host.to_string());
    argv.extend(command.map(quote));
    argv
}

/// A word as the remote shell must read it: ssh joins the words of a command with spaces.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, load};

    fn settings(ssh: &str) -> Settings {
        let flags = Flags::from([("host", "here".to_string()), ("ssh", ssh.to_string())]);
        load(&flags).unwrap()
    }

    fn host(name: &str) -> HostName {
        HostName::parse(name).unwrap()
    }

    #[test]
    fn the_words_reach_the_host_through_what_is_configured() {
        let words = ["systemctl", "start", "a b"];
        let ours = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 --";
        for (ssh, on, sudo, want) in [
            ("ssh", "biz", true, format!("ssh {ours} biz sudo systemctl start 'a b'")),
            (
                "/usr/bin/ssh -p 22",
                "biz",
                false,
                format!("/usr/bin/ssh -p 22 {ours} biz systemctl start 'a b'"),
            ),
            ("enter-vm --fast", "biz", true, "enter-vm --fast biz sudo systemctl start 'a b'".to_string()),
            ("ssh", "here", true, "sudo systemctl start a b".to_string()),
            ("ssh", "here", false, "systemctl start a b".to_string()),
        ] {
            assert_eq!(argv_on(&settings(ssh), &host(on), sudo, &words).join(" "), want);
        }
    }

    #[test]
    fn a_shell_reads_back_every_word_that_was_quoted() {
        let words =
            ["", "a b", "it's", "$HOME", "a\nb", "`x`", "\"", "-n", "*", "~", "ü", "a;b", "\\", "x=1"];
        let line: Vec<String> = words.iter().map(|w| quote(w)).collect();
        let script = format!("printf '%s\\0' {}", line.join(" "));
        let out = Run::new("sh").args(["-c", &script]).success().unwrap();
        let read: Vec<String> = out.text().split_terminator('\0').map(String::from).collect();
        assert_eq!(read, words);
    }

    #[test]
    fn a_host_that_was_not_reached_is_told_from_a_command_that_failed() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("fake");
        crate::durable::write(&program, b"shift\necho \"$1\" >&2\nexit \"$1\"\n", 0o644).unwrap();
        let settings = settings(&format!("sh {}", program.display()));
        let run = |words: &[&str]| output_on(&settings, &host("biz"), false, words, Duration::from_secs(20));
        assert_eq!(run(&["3"]).unwrap().status, Status::Exit(3));
        let e = run(&["255"]).unwrap_err().to_string();
        assert!(e.contains("biz does not answer") && e.contains("255"), "{e}");
    }
}
