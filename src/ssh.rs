//! How a command reaches a host: over ssh, or directly when the host is this machine. It owns the argument
//! vector and its quoting for the remote shell; it never decides what is run, and never asks for a password.

use crate::config::Settings;
use crate::error::{Error, Result};
use crate::names::HostName;
use crate::runner::{Output, ProcessStatus, Run, RunError, Stream, tail};
use std::time::Duration;

/// What ssh exits with when it could not run the command at all (ssh(1)).
const SSH_FAILED: ProcessStatus = ProcessStatus::Exit(255);

/// Stands before an answer on both streams: what a host's login shell prints before it, a greeting or a warning, is
/// no part of it.
const MARK: &str = "--omni-deploy-answer--";

/// Where our program is on a host, besides the folders of the login's PATH.
const OUR_FOLDERS: &str = "/usr/local/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin";

/// The largest answer that is taken of a host, in bytes: some times what any of ours has.
const MAX_ANSWER: u64 = 16 << 20;

const OUR_PROGRAM: &str = "omni-deploy";

/// A run of `words` on `host`, as root if `sudo`. Over ssh it fails rather than asks for a password, and a
/// host that does not take the connection is given up after ten seconds, one that falls silent later after a
/// minute; add a deadline for what must end sooner. What it prints is read by [`answer_of`] or [`lines_of`].
pub fn run_on(settings: &Settings, host: &HostName, sudo: bool, words: &[&str]) -> Run {
    let argv = argv_on(settings, host, sudo && !(is_here(settings, host) && is_root()), words);
    Run::new(&argv[0]).args(&argv[1..]).limit(MAX_ANSWER)
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
    let output = attempt_of(settings, host, words, run)?;
    refused(settings, host, output.status, &output.stderr).map_or(Ok(output), Err)
}

/// The same for a command that a host need not have, or need not let us run: of what it did not do no remedy is said,
/// only of a host that was not reached.
pub fn attempt_of(settings: &Settings, host: &HostName, words: &[&str], run: Run) -> Result<Output> {
    let output = run.output();
    if is_here(settings, host) {
        return Ok(output?);
    }
    let what = match output {
        Ok(output) => {
            let output = without_greeting(output);
            return unreached(settings, host, output.status, &output.stderr).map_or(Ok(output), Err);
        }
        Err(RunError::Deadline { after, .. }) => {
            format!("gave no answer to '{}' within {} s", words.join(" "), after.as_secs())
        }
        Err(RunError::TooMuch { limit, .. }) => {
            format!("answers '{}' with more than {limit} bytes, which were not read", words.join(" "))
        }
        Err(e) => return Err(e.into()),
    };
    Err(Error::new(format!("host {host} {what}; look at it with '{} {host}'", settings.ssh.join(" "))))
}

/// Hands the lines of a run on `host` ([`run_on`]) over as they come, without what its login shell prints before.
/// Returns how it ended, or why the host did not run it.
pub fn lines_of(
    settings: &Settings,
    host: &HostName,
    run: Run,
    mut line: impl FnMut(Stream, &str),
) -> Result<ProcessStatus> {
    if is_here(settings, host) {
        return Ok(run.each_line(line)?.status);
    }
    // Nothing is lost where something in between swallows the mark.
    const KEPT: usize = 100;
    let (mut before, mut said, mut marked) = (Vec::new(), Vec::new(), false);
    let output = run.each_line(|stream, text| match (stream, text.strip_suffix(MARK)) {
        (Stream::Stdout, Some(_)) if !marked => {
            marked = true;
            before.clear();
        }
        (Stream::Stdout, _) if marked || before.len() >= KEPT => line(stream, text),
        (Stream::Stdout, _) => before.push(text.to_string()),
        (Stream::Stderr, Some(_)) => said.clear(),
        (Stream::Stderr, None) => {
            said.truncate(KEPT);
            said.push(text.trim_end().to_string());
            line(stream, text.trim_end());
        }
    })?;
    before.iter().for_each(|text| line(Stream::Stdout, text));
    let said = said.join("\n");
    let failed = unreached(settings, host, output.status, &said);
    failed.or_else(|| refused(settings, host, output.status, &said)).map_or(Ok(output.status), Err)
}

/// An output from the mark on; all of it where there is none.
fn without_greeting(mut output: Output) -> Output {
    let mark = format!("{MARK}\n");
    if let Some(at) = output.stdout.windows(mark.len()).position(|w| w == mark.as_bytes()) {
        output.stdout.drain(..at + mark.len());
    }
    if let Some((_, after)) = output.stderr.split_once(&mark) {
        output.stderr = after.to_string();
    }
    output
}

/// What a program said, for the middle of a sentence.
fn stderr_summary(stderr: &str) -> String {
    let text = tail(stderr).replace(".;", ";");
    let text = text.trim_end_matches('.');
    if text.is_empty() { "it said nothing".to_string() } else { text.to_string() }
}

/// Why sudo on a host did not do what it was asked, where that is a password.
fn refused(settings: &Settings, host: &HostName, status: ProcessStatus, stderr: &str) -> Option<Error> {
    let asks = |line: &str| {
        line.starts_with("sudo")
            && ["password is required", "terminal is required", "authentication is required"]
                .iter()
                .any(|why| line.contains(why))
    };
    let is_refused = !is_here(settings, host) && !status.ok() && stderr.lines().any(asks);
    let ssh = settings.ssh.join(" ");
    is_refused.then(|| {
        Error::new(format!(
            "sudo on {host} asks for a password, and nobody is there to type it; allow the user there to do without: \
             '{ssh} -t {host} sudo visudo -f /etc/sudoers.d/omni-deploy', and in it 'USER ALL=(root) NOPASSWD: ALL'"
        ))
    })
}

/// Why ssh did not get to a host.
fn unreached(settings: &Settings, host: &HostName, status: ProcessStatus, stderr: &str) -> Option<Error> {
    if status != SSH_FAILED {
        return None;
    }
    let ssh = settings.ssh.join(" ");
    Some(Error::new(if stderr.contains("HOST IDENTIFICATION HAS CHANGED") {
        format!(
            "{host} has another host key than ssh remembers: if it was set up anew, 'ssh-keygen -R {host}' and then \
             '{ssh} {host}' once; if not, somebody else answers there"
        )
    } else if stderr.contains("Host key verification failed") {
        format!("ssh does not know {host}'s host key: run '{ssh} {host}' once")
    } else if stderr.contains("Permission denied (") {
        format!("host {host} does not let this user in: {}; try '{ssh} {host} true'", stderr_summary(stderr))
    } else {
        format!("host {host} does not answer: {}; try '{ssh} {host} true'", stderr_summary(stderr))
    }))
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
    if is_here(settings, host) {
        return sudo.then_some("sudo").into_iter().chain(words.iter().copied()).map(String::from).collect();
    }
    let mut argv = with_options(settings);
    if is_ssh(settings) {
        if let Some(path) = settings.ssh_control.get(host) {
            let path = format!("ControlPath={}", path.display());
            argv.extend(["-o", "ControlMaster=no", "-o", &path].map(String::from));
        }
        argv.push("--".into());
    }
    argv.push(host.to_string());
    let script = remote(sudo, words);
    argv.extend(["sh", "-c", &script, "sh"].iter().chain(words).map(|word| quote(word)));
    argv
}

/// Whether hosts are reached by what is called ssh, with its options.
pub fn is_ssh(settings: &Settings) -> bool {
    settings.ssh.first().is_none_or(|program| program.rsplit('/').next() == Some("ssh"))
}

/// The words that reach a host, with our options where they are ssh's.
pub fn with_options(settings: &Settings) -> Vec<String> {
    let mut argv = if settings.ssh.is_empty() { vec!["ssh".to_string()] } else { settings.ssh.clone() };
    if is_ssh(settings) {
        // Of an option given twice ssh takes the first: the configured words come before ours.
        // A host that dies after it took the connection is given up after three unanswered questions.
        let options = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15"];
        argv.extend(options.iter().flat_map(|o| ["-o", *o]).map(String::from));
    }
    argv
}

/// What the host's shell does with the words of a command. A shell of its own, because the login's may be any. Our
/// own program is looked for here: sudo takes whatever has a path, and its secure_path need not have ours.
fn remote(sudo: bool, words: &[&str]) -> String {
    let sudo = if sudo { "sudo " } else { "" };
    let begin = format!("echo {MARK}; echo {MARK} >&2");
    match words.first() {
        Some(&OUR_PROGRAM) => format!(
            "{begin}; PATH=\"$PATH:{OUR_FOLDERS}\"; p=$(command -v \"$1\") || p=$1; shift; exec {sudo}\"$p\" \"$@\""
        ),
        _ => format!("{begin}; exec {sudo}\"$@\""),
    }
}

/// A script's way to our program on a host: `$p`, empty where there is none.
pub fn finds_ours() -> String {
    format!("PATH=\"$PATH:{OUR_FOLDERS}\"; p=$(command -v {OUR_PROGRAM})")
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
        let sh = |sudo: &str| format!("biz sh -c 'echo {MARK}; echo {MARK} >&2; exec {sudo}\"$@\"' sh");
        for (ssh, on, sudo, want) in [
            ("ssh", "biz", true, format!("ssh {ours} {} systemctl start 'a b'", sh("sudo "))),
            (
                "/usr/bin/ssh -p 22",
                "biz",
                false,
                format!("/usr/bin/ssh -p 22 {ours} {} systemctl start 'a b'", sh("")),
            ),
            (
                "enter-vm --fast",
                "biz",
                true,
                format!("enter-vm --fast {} systemctl start 'a b'", sh("sudo ")),
            ),
            ("ssh", "here", true, "sudo systemctl start a b".to_string()),
            ("ssh", "here", false, "systemctl start a b".to_string()),
        ] {
            assert_eq!(argv_on(&settings(ssh), &host(on), sudo, &words).join(" "), want);
        }
    }

    /// What stands in ssh's place: a login shell that greets before it runs what it is given.
    fn greeting(dir: &std::path::Path, greeting: &str) -> Settings {
        let program = dir.join("fake");
        let script = format!("shift\n{greeting}\neval \"$*\"\n");
        crate::durable::write(&program, script.as_bytes(), 0o644).unwrap();
        settings(&format!("sh {}", program.display()))
    }

    #[test]
    fn what_a_login_shell_prints_before_the_answer_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        for greets in ["", "echo Welcome; echo careful >&2", "printf 'no line'; printf 'here too' >&2"] {
            let settings = greeting(dir.path(), greets);
            let words = ["sh", "-c", "echo \"it's $1\"; echo oops >&2; exit 3", "-", "a b"];
            let output = output_on(&settings, &host("biz"), false, &words, Duration::from_secs(20)).unwrap();
            assert_eq!(
                (output.text().as_str(), output.stderr.as_str()),
                ("it's a b\n", "oops\n"),
                "{greets}"
            );
            assert_eq!(output.status, ProcessStatus::Exit(3));
            let mut lines = Vec::new();
            let run = run_on(&settings, &host("biz"), false, &["printf", "%s\\n", "one", "two"]);
            lines_of(&settings, &host("biz"), run, |stream, line| {
                if stream == Stream::Stdout {
                    lines.push(line.to_string());
                }
            })
            .unwrap();
            assert_eq!(lines, ["one", "two"], "{greets}");
        }
    }

    #[test]
    fn our_program_is_found_where_sudo_would_not_look() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            crate::durable::write(&dir.path().join(name), text.as_bytes(), 0o755).unwrap();
        };
        put("omni-deploy", "#!/bin/sh\necho \"$0 $*\"\n");
        // One that has but its own folders.
        put("sudo", "#!/bin/sh\nPATH=/usr/bin:/bin\nexec \"$@\"\n");
        let settings = greeting(dir.path(), &format!("PATH={}:$PATH", dir.path().display()));
        let words = ["omni-deploy", "secrets", "a b"];
        // A program that was just written is busy while another thread's child still has it open.
        let output = loop {
            let output = output_on(&settings, &host("biz"), true, &words, Duration::from_secs(20)).unwrap();
            if !output.stderr.contains("Text file busy") {
                break output;
            }
        };
        assert_eq!(
            output.text(),
            format!("{}/omni-deploy secrets a b\n", dir.path().display()),
            "{}",
            output.stderr
        );
    }

    #[test]
    fn a_host_that_does_not_obey_is_told_with_the_remedy_of_its_cause() {
        let (settings, host) = (settings("ssh"), host("web1"));
        let trouble = |status, stderr: &str| {
            unreached(&settings, &host, status, stderr).or_else(|| refused(&settings, &host, status, stderr))
        };
        for (status, stderr, want) in [
            (
                255,
                "Host key verification failed.\r\n",
                "ssh does not know web1's host key: run 'ssh web1' once",
            ),
            (
                255,
                "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.\r\n",
                "'ssh-keygen -R web1'",
            ),
            (
                255,
                "ann@web1: Permission denied (publickey).\n",
                "does not let this user in: ann@web1: Permission denied (publickey); try",
            ),
            (
                255,
                "ssh: connect to host web1 port 22: No route to host.\r\n",
                "web1 does not answer: ssh: connect to host web1 port 22: No route to host; try 'ssh web1 true'",
            ),
            (
                1,
                "sudo: a terminal is required to read the password\nsudo: a password is required\n",
                "NOPASSWD",
            ),
            (1, "sudo-rs: interactive authentication is required\n", "NOPASSWD"),
        ] {
            let e = trouble(ProcessStatus::Exit(status), stderr).unwrap().to_string();
            assert!(e.contains(want) && !e.contains(".;") && !e.contains('\r'), "{e}");
        }
        for (status, stderr) in [(0, "sudo: a password is required"), (1, "no password is required"), (3, "")]
        {
            assert_eq!(trouble(ProcessStatus::Exit(status), stderr), None, "{stderr}");
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
        let settings = greeting(dir.path(), "");
        let run = |code: &str| {
            let words = ["sh", "-c", "echo \"$1\" >&2; exit \"$1\"", "-", code];
            output_on(&settings, &host("biz"), false, &words, Duration::from_secs(20))
        };
        assert_eq!(run("3").unwrap().status, ProcessStatus::Exit(3));
        let e = run("255").unwrap_err().to_string();
        assert!(e.contains("biz does not answer") && e.contains("255"), "{e}");
    }
}
