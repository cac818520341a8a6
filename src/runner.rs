//! The one runner: every program the product starts is started here. Argument vectors only, never a shell.
//! Exit status and stderr are kept; an exit, a signal, a deadline and a failure to start are told apart.

use crate::error::Error;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
#[allow(clippy::disallowed_types, reason = "this is the one runner")]
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessStatus {
    /// It exited by itself with this code.
    Exit(i32),
    /// This signal ended it.
    Signal(i32),
}

impl ProcessStatus {
    /// Exit code 0.
    pub fn ok(self) -> bool {
        self == ProcessStatus::Exit(0)
    }
}

impl From<ExitStatus> for ProcessStatus {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => ProcessStatus::Exit(code),
            (None, Some(signal)) => ProcessStatus::Signal(signal),
            (None, None) => ProcessStatus::Exit(-1),
        }
    }
}

impl fmt::Display for ProcessStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProcessStatus::Exit(code) => write!(f, "exit code {code}"),
            ProcessStatus::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// What a program that ran left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ProcessStatus,
    /// Its stdout, whole.
    pub stdout: Vec<u8>,
    /// Its stderr, with invalid UTF-8 replaced.
    pub stderr: String,
}

impl Output {
    /// Its stdout as text, with invalid UTF-8 replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Why a program did not do its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunError {
    /// There is no such program on PATH (or at that path).
    NotFound {
        /// The program as it was called.
        program: String,
    },
    /// It is there, but the kernel would not start it.
    Spawn {
        /// The program as it was called.
        program: String,
        /// What the kernel said.
        cause: String,
    },
    /// It ran and failed.
    Failed {
        /// The program with its arguments, for people.
        command: String,
        /// How it ended.
        status: ProcessStatus,
        /// Its stderr.
        stderr: String,
    },
    /// It printed more than is taken of it, and was ended.
    TooMuch {
        /// The program with its arguments, for people.
        command: String,
        /// How many bytes are taken.
        limit: u64,
    },
    /// It was still running at its deadline and was killed.
    Deadline {
        /// The program with its arguments, for people.
        command: String,
        /// The deadline it was given.
        after: Duration,
        /// Its stderr so far.
        stderr: String,
    },
    /// It was told to stop ([`Run::stop`]) and was killed.
    Stopped {
        /// The program with its arguments, for people.
        command: String,
    },
}

/// The Debian package (and what else there is to do) that brings a program.
fn remedy(program: &str) -> &'static str {
    match program.rsplit('/').next().unwrap_or(program) {
        "nix" | "nix-store" | "nix-build" | "nix-instantiate" => {
            "install Nix (Debian: apt install nix-bin; NixOS has it) or put it on PATH"
        }
        "systemctl" | "journalctl" | "systemd-analyze" => "install systemd (Debian: apt install systemd)",
        "ssh" => {
            "install OpenSSH's client (Debian: apt install openssh-client) or set 'ssh' in the configuration"
        }
        "sudo" => "install sudo (Debian: apt install sudo) or run this as root",
        "git" => "install git (Debian: apt install git)",
        "bild" => "put bild on PATH or set 'build' in the configuration",
        _ => "install it or put it on PATH",
    }
}

/// Whether the answers of a program are read by us: it then gets an environment that we chose, because a variable
/// that somebody has set for himself changes what it prints (`SYSTEMD_LOG_LEVEL`, `SYSTEMD_COLORS`, a language,
/// `DF_BLOCK_SIZE`) or what it speaks of (`GIT_DIR`). What a person runs through us, a build, an editor, ssh, sudo, a
/// manual page, gets the person's.
fn answers_us(program: &str) -> bool {
    let ours = ["systemctl", "systemd-analyze", "journalctl", "nix", "nix-store", "git"];
    ours.contains(&program.rsplit('/').next().unwrap_or(program))
}

/// The variables that such a program keeps: where things are, who asks, how the network is reached, what Nix and git
/// are configured with. The language is ours.
fn is_kept(name: &str) -> bool {
    let names = [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "TMPDIR",
        "TZ",
        "LOCALE_ARCHIVE",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "CURL_CA_BUNDLE",
        "DBUS_SYSTEM_BUS_ADDRESS",
        "GIT_CEILING_DIRECTORIES",
        "GIT_DISCOVERY_ACROSS_FILESYSTEM",
    ];
    let beginnings = ["XDG_", "NIX_", "AWS_", "SSH_", "GIT_CONFIG", "GIT_SSH"];
    names.contains(&name)
        || beginnings.iter().any(|beginning| name.starts_with(beginning))
        || name.to_ascii_lowercase().ends_with("_proxy")
}

/// The last lines of a program's stderr, joined for one line of ours; at most 600 characters.
pub fn tail(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let text = lines[lines.len().saturating_sub(4)..].join("; ");
    match text.char_indices().rev().nth(599) {
        Some((at, _)) => format!("…{}", &text[at..]),
        None => text,
    }
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunError::NotFound { program } => write!(f, "{program} not found: {}", remedy(program)),
            RunError::Spawn { program, cause } => {
                write!(f, "cannot start {program}: {cause}; check that it is executable")
            }
            RunError::Failed { command, status, stderr } if stderr.trim().is_empty() => {
                write!(f, "{command} failed with {status} and said nothing")
            }
            RunError::Failed { command, status, stderr } => {
                write!(f, "{command} failed with {status}: {}", tail(stderr))
            }
            RunError::TooMuch { command, limit } => {
                write!(
                    f,
                    "{command} printed more than {limit} bytes and was ended; run it by hand to see what it says"
                )
            }
            RunError::Deadline { command, after, stderr } => {
                write!(f, "{command} was still running after {} s and was ended", after.as_secs())?;
                if stderr.trim().is_empty() { Ok(()) } else { write!(f, ": {}", tail(stderr)) }
            }
            RunError::Stopped { command } => write!(f, "{command} was stopped"),
        }
    }
}

impl std::error::Error for RunError {}

impl From<RunError> for Error {
    fn from(e: RunError) -> Self {
        Error::new(e.to_string())
    }
}

/// A program about to run. Stdin is empty unless given; stdout is read whole, up to a limit ([`Run::limit`]), and of
/// stderr the end is kept: whoever is at the other end of a program must not fill our memory.
#[derive(Debug, Clone)]
pub struct Run {
    program: String,
    args: Vec<OsString>,
    env: Vec<(String, Option<OsString>)>,
    stdin: Vec<u8>,
    dir: Option<PathBuf>,
    deadline: Option<Duration>,
    keep: Keep,
    /// What env(1) makes of the terminal's signals; None: what we do.
    signals: Option<&'static str>,
    clean_env: bool,
    stop: Option<Arc<AtomicBool>>,
}

/// What is kept of a program's stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// All of it; more bytes than these are an error.
    AtMost(u64),
    /// As much of its end as of stderr.
    End,
}

/// Which of a program's streams a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Lines as they come.
type LinesRead = mpsc::Receiver<(Stream, Vec<u8>)>;

impl Run {
    /// A run of `program`, looked up on PATH unless it has a slash.
    pub fn new(program: impl Into<String>) -> Self {
        let program = program.into();
        Run {
            clean_env: answers_us(&program),
            program,
            args: Vec::new(),
            env: Vec::new(),
            stdin: Vec::new(),
            dir: None,
            deadline: None,
            keep: Keep::AtMost(MOST_STDOUT),
            signals: None,
            stop: None,
        }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Gives it our whole environment, though we read what it prints: a build may depend on anything there.
    pub fn with_all_variables(mut self) -> Self {
        self.clean_env = false;
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), Some(value.as_ref().to_owned())));
        self
    }

    /// Takes a variable out of its environment.
    pub fn without_env(mut self, name: &str) -> Self {
        self.env.push((name.into(), None));
        self
    }

    /// What it reads on stdin.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// The folder it runs in.
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Ends it (SIGKILL) when it runs longer than this.
    pub fn deadline(mut self, after: Duration) -> Self {
        self.deadline = Some(after);
        self
    }

    /// Ends it (SIGKILL) when this becomes true: what it makes is not needed any more.
    pub fn stop(mut self, flag: &Arc<AtomicBool>) -> Self {
        self.stop = Some(Arc::clone(flag));
        self
    }

    /// Keeps only the end of its stdout, whose lines are handed over: a build may talk for hours, a journal for ever.
    pub fn keep_end(mut self) -> Self {
        self.keep = Keep::End;
        self
    }

    /// Ends it when it prints more bytes than these, which is then an error. Everything has such a limit.
    pub fn limit(mut self, bytes: u64) -> Self {
        self.keep = Keep::AtMost(bytes);
        self
    }

    /// Gives it the terminal's signals with their usual effect, where we ignore them ([`Run::ignore_signals`]).
    pub fn interruptible(mut self) -> Self {
        self.signals = Some(DEFAULT_SIGNALS);
        self
    }

    /// Becomes this program, which then ignores Ctrl-C and Ctrl-\\, as we must while an editor has the terminal:
    /// they are the editor's, and reach us as well. Returns only when that cannot be, as where env(1) is not GNU's.
    pub fn ignore_signals(mut self) -> Result<(), RunError> {
        use std::os::unix::process::CommandExt;
        let known = Run::new("env").args([DEFAULT_SIGNALS, "true"]).output()?;
        if !known.status.ok() {
            return Ok(());
        }
        self.signals = Some("--ignore-signal=INT,QUIT");
        Err(self.cannot_start(self.command().exec()))
    }

    /// Starts it beside us, out of reach of the terminal's signals, with a pipe to its stdin that closes when we
    /// end, however we end.
    #[allow(clippy::disallowed_types, reason = "this is the one runner")]
    pub fn spawn_detached(self) -> Result<BackgroundProcess, RunError> {
        use std::os::unix::process::CommandExt;
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Ok(BackgroundProcess(self.spawn(command)?))
    }

    /// The command for people; words with anything unusual are quoted.
    pub fn shown(&self) -> String {
        let mut words = vec![self.program.clone()];
        words.extend(self.args.iter().map(|a| a.to_string_lossy().into_owned()));
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
        let quoted: Vec<String> = words
            .into_iter()
            .map(|w| if !w.is_empty() && w.chars().all(plain) { w } else { format!("{w:?}") })
            .collect();
        let text = quoted.join(" ");
        match text.char_indices().nth(300) {
            Some((at, _)) => format!("{}…", &text[..at]),
            None => text,
        }
    }

    #[allow(clippy::disallowed_types, reason = "this is the one runner")]
    fn command(&self) -> Command {
        let mut command = Command::new(self.signals.map_or(self.program.as_str(), |_| "env"));
        if let Some(signals) = self.signals {
            command.args([signals, &self.program]);
        }
        command.args(&self.args);
        if self.clean_env {
            command.env_clear().envs(std::env::vars_os().filter(|(n, _)| n.to_str().is_some_and(is_kept)));
            command.env("LC_ALL", "C.UTF-8");
        }
        for (name, value) in &self.env {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    #[allow(clippy::disallowed_types, reason = "this is the one runner")]
    fn spawn(&self, mut command: Command) -> Result<Child, RunError> {
        // A missing working folder gives the same error number as a missing program.
        let missing = self.dir.as_ref().filter(|dir| !dir.is_dir());
        command.spawn().map_err(|e| match missing {
            Some(dir) => self.cannot_start(format!("no folder {}", dir.display())),
            None if e.kind() == ErrorKind::NotFound => RunError::NotFound { program: self.program.clone() },
            None => self.cannot_start(e),
        })
    }

    fn cannot_start(&self, cause: impl fmt::Display) -> RunError {
        RunError::Spawn { program: self.program.clone(), cause: cause.to_string() }
    }

    /// Runs it with our own stdin, stdout and stderr (an editor, a pager, ssh).
    pub fn inherit(self) -> Result<ProcessStatus, RunError> {
        let mut child = self.spawn(self.command())?;
        child.wait().map(ProcessStatus::from).map_err(|e| self.cannot_start(e))
    }

    /// Runs it and returns what it left, whatever its exit status.
    pub fn output(self) -> Result<Output, RunError> {
        self.each_line(|_, _| {})
    }

    /// Runs it; a status other than 0 is an error.
    pub fn success(self) -> Result<Output, RunError> {
        let shown = self.shown();
        let output = self.output()?;
        if output.status.ok() {
            Ok(output)
        } else {
            Err(RunError::Failed { command: shown, status: output.status, stderr: output.stderr })
        }
    }

    /// Starts it, with threads that feed it and hand over its lines.
    fn start(&self) -> Result<(Child, LinesRead), RunError> {
        let mut command = self.command();
        command
            .stdin(if self.stdin.is_empty() { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.spawn(command)?;
        let (sender, lines) = mpsc::sync_channel(CHANNEL_LINES);
        // Readers that outlive the program (a grandchild holds the pipe) must not hold us: they are plain
        // threads, and the channel is left when the program has ended and a short grace has passed.
        if let Some(out) = child.stdout.take() {
            let sender = sender.clone();
            std::thread::spawn(move || read_lines(out, Stream::Stdout, &sender));
        }
        if let Some(err) = child.stderr.take() {
            std::thread::spawn(move || read_lines(err, Stream::Stderr, &sender));
        }
        if let Some(mut input) = child.stdin.take() {
            let bytes = self.stdin.clone();
            // A program that does not read its stdin closes the pipe: that is its affair, its status tells.
            std::thread::spawn(move || drop(input.write_all(&bytes)));
        }
        Ok((child, lines))
    }

    /// Runs it and hands every line over as it comes (without its newline); returns the whole as well. A line without
    /// end comes in parts.
    pub fn each_line(self, mut on_line: impl FnMut(Stream, &str)) -> Result<Output, RunError> {
        let (mut child, lines) = self.start()?;
        let mut stdout = Vec::new();
        let mut stderr = Vec::new();
        let started = Instant::now();
        let (mut late, mut stopped) = (false, false);
        let should_stop = || self.stop.as_ref().is_some_and(|flag| flag.load(Ordering::SeqCst));
        // Of those that answer us none leaves a grandchild, and what they said must be whole however busy the machine is.
        let grace = if self.clean_env { GRACE_OURS } else { GRACE };
        let mut ended: Option<(ExitStatus, Instant)> = None;
        let mut killed: Option<Instant> = None;
        let mut left_behind = 0;
        loop {
            let wait = match (ended, self.deadline) {
                (Some(_), _) => Duration::from_millis(50),
                (None, Some(deadline)) => {
                    deadline.saturating_sub(started.elapsed()).clamp(Duration::from_millis(1), POLL)
                }
                (None, None) => POLL,
            };
            match lines.recv_timeout(wait) {
                Ok((stream, line)) => {
                    let shown = line.strip_suffix(b"\n").unwrap_or(&line);
                    on_line(stream, &String::from_utf8_lossy(shown));
                    match (stream, self.keep) {
                        (Stream::Stdout, Keep::AtMost(limit)) => {
                            if (stdout.len() + line.len()) as u64 > limit {
                                // What it is worth is known; how it ends is not.
                                drop(child.kill());
                                drop(child.wait());
                                return Err(RunError::TooMuch { command: self.shown(), limit });
                            }
                            stdout.extend_from_slice(&line);
                        }
                        (Stream::Stdout, Keep::End) => keep_end(&mut stdout, &line),
                        (Stream::Stderr, _) => keep_end(&mut stderr, &line),
                    }
                    if ended.is_some() {
                        left_behind += 1;
                        if left_behind > LEFT_BEHIND {
                            break;
                        }
                        continue;
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    if ended.is_none() {
                        let status = match (self.deadline, &self.stop) {
                            (None, None) => child.wait().ok(),
                            _ => child.try_wait().ok().flatten(),
                        };
                        if let Some(status) = status {
                            ended = Some((status, Instant::now()));
                        } else {
                            std::thread::sleep(Duration::from_millis(2));
                        }
                    }
                    if ended.is_some() {
                        break;
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            match ended {
                Some((_, at)) if at.elapsed() > grace => break,
                Some(_) => {}
                // The kernel does not end what waits for a disk that hangs.
                None if killed.is_some_and(|at| at.elapsed() > KILLED_WITHIN) => break,
                None => {
                    let is_late = !late && self.deadline.is_some_and(|d| started.elapsed() >= d);
                    let is_stopped = !stopped && should_stop();
                    if let Ok(Some(status)) = child.try_wait() {
                        ended = Some((status, Instant::now()));
                    } else if is_late || is_stopped {
                        (late, stopped) = (late || is_late, stopped || is_stopped);
                        killed = Some(Instant::now());
                        child.kill().map_err(|e| self.cannot_start(format!("cannot end it: {e}")))?;
                    }
                }
            }
        }
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        let after = self.deadline.unwrap_or_default();
        match ended {
            _ if stopped => Err(RunError::Stopped { command: self.shown() }),
            Some((status, _)) if !late => Ok(Output { status: status.into(), stdout, stderr }),
            _ => Err(RunError::Deadline { command: self.shown(), after, stderr }),
        }
    }
}

/// env(1) of GNU, since 8.31.
const DEFAULT_SIGNALS: &str = "--default-signal=INT,QUIT";

/// A program that runs beside us and waits for the end of its stdin.
#[derive(Debug)]
#[allow(clippy::disallowed_types, reason = "this is the one runner")]
pub struct BackgroundProcess(Child);

impl BackgroundProcess {
    /// Gives it a last word, then the end of its stdin, and waits until it has ended.
    pub fn finish(mut self, word: &str) -> Result<ProcessStatus, RunError> {
        if let Some(mut input) = self.0.stdin.take() {
            // One that does not listen tells by its status.
            drop(input.write_all(word.as_bytes()));
        }
        let ended = self.0.wait();
        ended
            .map(ProcessStatus::from)
            .map_err(|e| RunError::Spawn { program: "a program beside".into(), cause: e.to_string() })
    }
}

const POLL: Duration = Duration::from_millis(100);
/// How long the pipes of a program that has ended are read on, where a grandchild may hold them, and where not.
const GRACE: Duration = Duration::from_secs(1);
const GRACE_OURS: Duration = Duration::from_secs(10);
/// How long a program that was killed may take to be gone.
const KILLED_WITHIN: Duration = Duration::from_secs(10);
/// How many bytes of stdout are taken where nothing else is said. The closure of a large system, as `nix path-info --json`
/// has it, takes a tenth of it.
const MOST_STDOUT: u64 = 64 << 20;
/// How much is kept where only the end is.
const KEPT_END: usize = 256 << 10;
/// The longest part of a line that is handed over at once.
const LONGEST_PART: u64 = 64 << 10;
/// How many lines a program may be ahead of who reads them.
const CHANNEL_LINES: usize = 256;
/// More lines than a program can leave behind in the channel and in two pipes of 64 KiB with their readers'
/// buffers: what comes after these is a grandchild's.
const LEFT_BEHIND: usize = CHANNEL_LINES + (160 << 10);

/// Adds to what is kept, and lets go of the beginning.
fn keep_end(kept: &mut Vec<u8>, more: &[u8]) {
    kept.extend_from_slice(more);
    if kept.len() > 2 * KEPT_END {
        kept.drain(..kept.len() - KEPT_END);
    }
}

fn read_lines(stream: impl Read, which: Stream, sender: &mpsc::SyncSender<(Stream, Vec<u8>)>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(LONGEST_PART).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if sender.send((which, line)).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_needed_any_more_is_ended() {
        let flag = Arc::new(AtomicBool::new(false));
        let run = Run::new("sh").args(["-c", "echo begun; exec sleep 1000"]).stop(&flag);
        let ended = run.each_line(|_, _| flag.store(true, Ordering::SeqCst));
        assert!(
            matches!(&ended, Err(RunError::Stopped { command }) if command.contains("sleep")),
            "{ended:?}"
        );
        // One that ends by itself before is what it is.
        let flag = Arc::new(AtomicBool::new(false));
        assert!(Run::new("true").stop(&flag).output().unwrap().status.ok());
    }

    #[test]
    fn exit_signal_and_failure_to_start_are_told_apart() {
        let exit = Run::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]).output().unwrap();
        assert_eq!(
            (exit.status, exit.text().as_str(), exit.stderr.as_str()),
            (ProcessStatus::Exit(3), "out\n", "err\n")
        );
        let signal = Run::new("sh").args(["-c", "kill -TERM $$"]).output().unwrap();
        assert_eq!(signal.status, ProcessStatus::Signal(15));
        let missing = Run::new("no-such-program-here").output().unwrap_err();
        assert!(matches!(missing, RunError::NotFound { .. }), "{missing:?}");
        let plain_file = Run::new("/etc/hostname").output().unwrap_err();
        assert!(matches!(plain_file, RunError::Spawn { .. }), "{plain_file:?}");
        let no_dir = Run::new("true").dir("/nonexistent-folder").output().unwrap_err();
        assert!(no_dir.to_string().contains("/nonexistent-folder"), "{no_dir}");
    }

    #[test]
    fn what_answers_us_gets_an_environment_that_we_chose_and_what_a_person_runs_the_persons() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("systemctl");
        fs_err::os::unix::fs::symlink("/usr/bin/env", &program).unwrap();
        let all = || std::env::vars().map(|(name, _)| name).filter(|n| n != "LC_ALL" && !n.starts_with('_'));
        let given = |run: Run| -> Vec<String> {
            run.output().unwrap().text().lines().filter_map(|l| Some(l.split_once('=')?.0.into())).collect()
        };
        let names = given(Run::new(program.display().to_string()).env("SET_BY_US", "1"));
        assert!(
            names.iter().all(|n| is_kept(n) || ["LC_ALL", "SET_BY_US"].contains(&n.as_str())),
            "{names:?}"
        );
        assert!(["PATH", "LC_ALL", "SET_BY_US"].iter().all(|n| names.iter().any(|m| m == n)), "{names:?}");
        for run in [Run::new("env"), Run::new(program.display().to_string()).with_all_variables()] {
            let names = given(run);
            assert!(all().all(|name| names.contains(&name)), "{names:?}");
        }
        for (name, kept) in [
            ("NIX_CONFIG", true),
            ("https_proxy", true),
            ("AWS_PROFILE", true),
            ("GIT_CONFIG_COUNT", true),
            ("GIT_DIR", false),
            ("SYSTEMD_LOG_LEVEL", false),
            ("LANGUAGE", false),
            ("DF_BLOCK_SIZE", false),
        ] {
            assert_eq!(is_kept(name), kept, "{name}");
        }
    }

    #[test]
    fn a_run_past_its_deadline_is_ended_and_says_so() {
        let e = Run::new("sh").args(["-c", "echo busy >&2; exec sleep 60"]).deadline(Duration::from_secs(3));
        let e = e.output().unwrap_err();
        assert!(matches!(e, RunError::Deadline { .. }) && e.to_string().contains("busy"), "{e}");
    }

    #[test]
    fn a_grandchild_that_keeps_the_pipe_does_not_hold_us() {
        let started = Instant::now();
        let out = Run::new("sh").args(["-c", "sleep 30 & echo done"]).output().unwrap();
        assert_eq!(out.text(), "done\n");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn output_without_end_outlasts_neither_the_deadline_nor_the_program() {
        let e = Run::new("yes").keep_end().deadline(Duration::from_millis(300)).output().unwrap_err();
        assert!(matches!(e, RunError::Deadline { .. }), "{e}");
        // The grandchild ends of a broken pipe once nobody reads it any more.
        let out = Run::new("sh").args(["-c", "yes & exec true"]).keep_end().output().unwrap();
        assert!(out.status.ok());
    }

    #[test]
    fn a_slow_reader_still_gets_all_that_a_program_left_behind() {
        let mut lines = 0;
        let run = Run::new("seq").arg("30000");
        let out = run.each_line(|_, _| {
            lines += 1;
            if lines % 10_000 == 1 {
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        assert_eq!((lines, out.unwrap().text().lines().last()), (30_000, Some("30000")));
    }

    #[test]
    fn output_without_end_is_cut_at_a_limit_with_or_without_newlines() {
        for script in ["yes", "cat /dev/zero"] {
            let e = Run::new("sh").args(["-c", script]).limit(1 << 20).output().unwrap_err();
            assert_eq!(e, RunError::TooMuch { command: format!("sh -c {}", quoted(script)), limit: 1 << 20 });
            assert!(e.to_string().contains("sh -c") && e.to_string().contains("1048576 bytes"), "{e}");
        }
        let script = "head -c 4000000 /dev/zero >&2; echo boom >&2; exit 3";
        let out = Run::new("sh").args(["-c", script]).output().unwrap();
        assert!(out.status == ProcessStatus::Exit(3) && out.stderr.ends_with("boom\n"));
        assert!(out.stderr.len() <= 2 * KEPT_END, "{}", out.stderr.len());
        let out =
            Run::new("sh").args(["-c", "head -c 4000000 /dev/zero; echo end"]).keep_end().output().unwrap();
        assert!(out.stdout.ends_with(b"end\n") && out.stdout.len() <= 2 * KEPT_END);
    }

    fn quoted(script: &str) -> String {
        if script.contains(' ') { format!("{script:?}") } else { script.into() }
    }

    #[test]
    fn a_program_that_is_missing_names_its_package() {
        let text = RunError::NotFound { program: "nix".into() }.to_string();
        assert!(text.contains("nix-bin"), "{text}");
    }

    #[test]
    fn stdin_and_large_output_do_not_block_each_other() {
        let big = vec![b'x'; 1 << 20];
        let out = Run::new("cat").stdin(big.clone()).output().unwrap();
        assert_eq!(out.stdout, big);
    }
}
