//! Nix: closures in, closures out, and builds. Every call of a nix program is here or below. Buckets and folders are
//! reached through a [`spool`]; Nix itself speaks with other caches, and what authenticates in the URL of one goes to it
//! through the environment, which other users cannot read, and never as an argument. Each call has a cache of narinfos of its own: Nix would believe last
//! week's otherwise.

mod announced;
pub mod download;
pub mod fetch;
pub mod held;
pub mod local;
pub mod narinfo;
pub mod present;
pub mod publish;
pub mod spool;
pub mod unpack;
pub mod upload;
pub mod walk;

use crate::config::Settings;
use crate::error::{Error, Result};
use crate::names::StorePath;
use crate::runner::{Output, Run, RunError, Stream, tail};
use crate::store::url::without_secrets;
use crate::{durable, percent};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use fetch::{fetch, forget_transfers, recover};
pub use publish::{Published, Scope, publish};

/// Where roots against the garbage collector are kept, ours in a folder of our own below.
pub const GCROOTS: &str = "/nix/var/nix/gcroots/omni-deploy";

/// How long a question to the local store's database may take.
const ASK_WITHIN: Duration = Duration::from_secs(120);
/// Paths per command line; each has up to 255 bytes, a command line 2 MiB.
const PER_CALL: usize = 2000;

/// Why a closure could not be had from the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchError {
    /// The cache does not have it, or not all of it: only a push helps.
    NotInCache(String),
    /// The cache did not answer, or not in time, or refused us: worth trying again.
    Unreachable(String),
    /// What the cache has was not accepted: no valid signature, or not what was signed.
    Refused(String),
    /// This machine could not take it: disk full, store read-only.
    Failed(String),
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FetchError::NotInCache(t)
            | FetchError::Unreachable(t)
            | FetchError::Refused(t)
            | FetchError::Failed(t) => f.write_str(t),
        }
    }
}

/// Of `paths`, those that are not valid in this machine's store (asks the store's database, not only the
/// file system).
pub fn missing(paths: &[StorePath]) -> Result<Vec<StorePath>> {
    query(&["--check-validity", "--print-invalid"], paths)
}

/// The paths of the closures (`nix-store --query --requisites`), in no order that means anything.
pub fn closure(paths: &[StorePath]) -> Result<Vec<StorePath>> {
    query(&["--query", "--requisites"], paths)
}

fn query(words: &[&str], paths: &[StorePath]) -> Result<Vec<StorePath>> {
    let mut found = BTreeSet::new();
    for some in paths.chunks(PER_CALL) {
        let output =
            Run::new("nix-store").args(words).args(some).deadline(ASK_WITHIN).success().map_err(explained)?;
        for line in output.text().lines() {
            let path = StorePath::parse(line).map_err(|why| {
                Error::new(format!("nix-store printed {line:?}, which {why}; is its store elsewhere?"))
            })?;
            found.insert(path);
        }
    }
    Ok(found.into_iter().collect())
}

/// A cache that Nix itself speaks with, for one piece of work.
struct Cache {
    /// The URL for people.
    shown: String,
    /// The URL for Nix, with our parameters.
    url: String,
    /// What authenticates in the URL: never an argument of a program, never printed.
    secret: Option<String>,
    /// Where Nix's private cache is put.
    scratch: PathBuf,
}

impl Cache {
    fn new(url: &str, settings: &Settings, side: Side) -> Self {
        let packs = side == Side::To && is_binary_cache(url);
        let params = if packs { packing(settings) } else { Vec::new() };
        let secret = without_secrets(url) != url;
        Cache {
            shown: settings.cache.to_string(),
            url: with_params(url, &params),
            secret: secret.then(|| url.split('?').next().unwrap_or(url).to_string()),
            scratch: std::env::temp_dir(),
        }
    }

    /// A call of `nix` with this cache on one side and this machine's store on the other.
    fn nix(&self, settings: &Settings, side: Side, words: &[&str]) -> Result<(Run, tempfile::TempDir)> {
        let (run, scratch) = nix(&["nix-command"], &self.scratch)?;
        let mut run = run.args(words);
        // The option that names the cache, and the one for the store on the other side, if there is one.
        let (of_cache, of_other) = match side {
            Side::From => ("--from", Some("--to")),
            Side::To => ("--to", Some("--from")),
            Side::Store => ("--store", None),
        };
        match &self.secret {
            None => run = run.arg(of_cache).arg(&self.url),
            Some(_) => {
                // The cache takes the place of the default store, and the option names the local one.
                let own = std::env::var("NIX_CONFIG").unwrap_or_default();
                run = run.env("NIX_CONFIG", format!("{own}\nstore = {}\n", self.url));
                let local = std::env::var("NIX_REMOTE").ok().filter(|r| !r.is_empty());
                if let Some(other) = of_other {
                    run = run.arg(other).arg(local.as_deref().unwrap_or("auto"));
                }
            }
        }
        // Nix 2.8 tries an upload again with an empty body, and waits for an answer to it.
        let attempts = if side == Side::To { "1" } else { "3" };
        run = run.args(["--option", "download-attempts", attempts, "--option", "connect-timeout", "15"]);
        Ok((if side == Side::From { trusting(run, settings) } else { run }, scratch))
    }

    /// Why a call of nix failed.
    fn cause(&self, e: &RunError) -> String {
        cause(e, |text| self.clean(text))
    }

    /// A text of Nix's with the cache's name for people in place of what is secret.
    fn clean(&self, text: &str) -> String {
        match &self.secret {
            None => text.to_string(),
            Some(secret) => text.replace(secret, &self.shown),
        }
    }
}

/// On which side of a call of nix the cache stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    From,
    To,
    Store,
}

/// A call of `nix` with experimental features switched on and a private cache folder, which must outlive it.
/// A unit of the system has no HOME: Nix then gets that folder too.
fn nix(features: &[&str], within: &Path) -> Result<(Run, tempfile::TempDir)> {
    let scratch = durable::scratch(within)
        .map_err(|e| Error::new(format!("cannot make a folder in {}: {e}; set TMPDIR", within.display())))?;
    let mut run = Run::new("nix")
        .args(["--extra-experimental-features", &features.join(" ")])
        .env("XDG_CACHE_HOME", scratch.path());
    if std::env::var_os("HOME").is_none_or(|h| h.is_empty()) {
        run = run.env("HOME", scratch.path());
    }
    Ok((run, scratch))
}

/// How Nix packs and signs what it writes into a cache, as parameters of its URL.
fn packing(settings: &Settings) -> Vec<(&'static str, String)> {
    let key = settings.secret_key_file.as_ref().map(|file| ("secret-key", encoded(&file.to_string_lossy())));
    [("compression", "zstd".to_string())].into_iter().chain(key).collect()
}

/// Whose signatures Nix takes; where no key is named, its own settings say so.
fn trusting(run: Run, settings: &Settings) -> Run {
    if settings.trusted_public_keys.is_empty() {
        return run;
    }
    let keys = settings.trusted_public_keys.join(" ");
    run.args(["--option", "require-sigs", "true", "--option", "trusted-public-keys", &keys])
}

/// Runs Nix and hands over what it tells people, as `clean` has it.
fn with_news(
    run: Run,
    clean: impl Fn(&str) -> String,
    on_line: &mut dyn FnMut(&str),
) -> Result<Output, RunError> {
    let output = run.each_line(|_, line| {
        if is_news(line) {
            on_line(&clean(line));
        }
    });
    check(output, "nix")
}

/// Why a call of nix failed; of Nix's words what `clean` leaves.
fn cause(e: &RunError, clean: impl Fn(&str) -> String) -> String {
    match e {
        RunError::Failed { stderr, .. } if !stderr.trim().is_empty() => {
            store_trouble(stderr).unwrap_or_else(|| clean(&tail(&errors_of(stderr))))
        }
        e => clean(&e.to_string()),
    }
}

/// Cuts a list into parts of about so many bytes, and of as many items as fit into a command line.
fn groups<T>(items: &[T], most: u64, size: impl Fn(&T) -> u64) -> impl Iterator<Item = &[T]> {
    let mut left = items;
    std::iter::from_fn(move || {
        let mut bytes = 0u64;
        let fits = |item: &T| {
            bytes = bytes.saturating_add(size(item));
            bytes <= most
        };
        let count = left.iter().take(PER_CALL).map(fits).take_while(|fits| *fits).count().max(1);
        let (group, rest) = left.split_at_checked(count)?;
        left = rest;
        Some(group)
    })
}

/// Why Nix failed, with what to do about it where the disk is full: Nix says neither which nor what.
fn with_room(cause: String, remedy: &str) -> String {
    match cause.contains("No space left on device") {
        true => format!("{cause}; {remedy}"),
        false => cause,
    }
}

/// Of Nix's stderr the lines that say what went wrong; all of it if there are none.
fn errors_of(stderr: &str) -> String {
    let from = stderr.lines().position(|l| l.starts_with("error"));
    let lines: Vec<&str> = stderr.lines().skip(from.unwrap_or(0)).collect();
    lines.join("\n")
}

/// What stands between us and this machine's store, if that is why a call failed: Nix's own words (the same in 2.8, 2.26
/// and 2.34) name a socket or a lock file, and no remedy.
fn store_trouble(stderr: &str) -> Option<String> {
    let line = |word: &str| stderr.lines().find(|line| line.contains(word)).map(str::trim);
    let (line, why) = if let Some(line) = line("cannot connect to socket at") {
        if line.contains("Permission denied") {
            let why = "this user may not use Nix's daemon; run 'sudo usermod -aG nix-users $USER' and log in again \
                       (Debian; elsewhere see who may enter the socket's folder)";
            (line, why)
        } else {
            (line, "Nix's daemon does not run; run 'sudo systemctl enable --now nix-daemon.socket'")
        }
    } else if let Some(line) = line("cannot open connection to remote store 'daemon'") {
        let why = "Nix's daemon turns this user away; name them in 'allowed-users' of /etc/nix/nix.conf, then run 'sudo \
                   systemctl restart nix-daemon'";
        (line, why)
    } else {
        let denied =
            |line: &&str| line.contains("Permission denied") || line.contains("Operation not permitted");
        let line = line("'/nix/var/nix/").or(line("\"/nix/var/nix/")).filter(denied)?;
        let why = "Nix's store is root's, and there is no daemon to ask; run 'sudo systemctl enable --now \
                   nix-daemon.socket' (Debian: apt install nix-setup-systemd)";
        (line, why)
    };
    Some(format!("{why} (nix: {})", line.trim_start_matches("error: ")))
}

/// A failure with its remedy, where it is the way to this machine's store that failed.
fn explained(e: RunError) -> Error {
    match &e {
        RunError::Failed { stderr, .. } => store_trouble(stderr).map_or_else(|| e.into(), Error::new),
        _ => e.into(),
    }
}

/// Whether a line of Nix's is for people: not what it says to everybody whom the daemon does not trust, which changes
/// nothing for a push.
fn is_news(line: &str) -> bool {
    !line.contains("ignoring the client-specified setting")
        && !line.contains("ignoring the user-specified setting")
        && !line.contains("you are not a trusted user")
}

/// A path as a part of a URL.
fn encoded(text: &str) -> String {
    percent::encode(text, "/+,")
}

/// Whether Nix keeps narinfos and NARs at such a URL (and so knows compression and signing there).
fn is_binary_cache(url: &str) -> bool {
    ["http://", "https://", "file://", "s3://"].iter().any(|scheme| url.starts_with(scheme))
}

/// A URL with parameters added; those it has already stay as they are.
fn with_params(url: &str, params: &[(&str, String)]) -> String {
    let (base, query) = url.split_once('?').unwrap_or((url, ""));
    let mut pairs: Vec<String> = query.split('&').filter(|p| !p.is_empty()).map(String::from).collect();
    for (name, value) in params {
        if !pairs.iter().any(|p| p.split('=').next() == Some(name)) {
            pairs.push(format!("{name}={value}"));
        }
    }
    if pairs.is_empty() { base.to_string() } else { format!("{base}?{}", pairs.join("&")) }
}

/// The bytes that are free for us where a store or a spool is; None when the kernel does not say.
fn free_bytes(store: &Path) -> Option<u64> {
    let of = |path: &Path| rustix::fs::statvfs(path).ok().map(|v| v.f_bavail.saturating_mul(v.f_frsize));
    // A store that is still to be made will be where the folder above it is.
    of(store).or_else(|| of(Path::new("/nix"))).or_else(|| of(Path::new("/")))
}

/// A status other than 0 as an error.
fn check(output: Result<Output, RunError>, command: &str) -> Result<Output, RunError> {
    let output = output?;
    if output.status.ok() {
        return Ok(output);
    }
    Err(RunError::Failed { command: command.to_string(), status: output.status, stderr: output.stderr })
}

/// Has Nix copy to a cache that only it knows, and then look whether the whole closure is there.
fn publish_through_nix(
    url: &str,
    settings: &Settings,
    paths: &[StorePath],
    on_line: &mut dyn FnMut(&str),
) -> Result<Published> {
    let cache = Cache::new(url, settings, Side::To);
    for some in paths.chunks(PER_CALL) {
        let (run, _scratch) = cache.nix(settings, Side::To, &["copy"])?;
        with_news(run.args(some), |line| cache.clean(line), on_line)
            .map_err(|e| Error::new(format!("nix copy to {} failed: {}", cache.shown, cache.cause(&e))))?;
    }
    let mut found = BTreeSet::new();
    for some in paths.chunks(PER_CALL) {
        let (run, _scratch) = cache.nix(settings, Side::Store, &["path-info", "--recursive"])?;
        let output = run.args(some).success().map_err(|e| {
            Error::new(format!(
                "the closure is not whole in the cache {}: {}; push it again",
                cache.shown,
                cache.cause(&e)
            ))
        })?;
        found.extend(output.text().lines().map(String::from));
    }
    Ok(Published { paths: found.len(), bytes: None, written: None })
}

/// Builds a flake reference in `dir`; its output's path. Nix's progress is handed over line by line.
pub fn build_flake(reference: &str, dir: &Path, on_line: &mut dyn FnMut(&str)) -> Result<StorePath> {
    let (run, _scratch) = nix(&["nix-command", "flakes"], &std::env::temp_dir())?;
    // Nix 2.8 has no --print-out-paths yet.
    let text = built(
        run.with_all_variables().args(["build", "--no-link", "--json", "--", reference]).dir(dir),
        "nix build",
        on_line,
    )?;
    one_path("nix build", &outputs_of(&text)?)
}

/// Builds a Nix file; its output's path.
pub fn build_file(file: &Path, dir: &Path, on_line: &mut dyn FnMut(&str)) -> Result<StorePath> {
    let text = built(Run::new("nix-build").arg("--no-out-link").arg(file).dir(dir), "nix-build", on_line)?;
    one_path("nix-build", &text.lines().map(String::from).collect::<Vec<_>>())
}

fn built(run: Run, program: &str, on_line: &mut dyn FnMut(&str)) -> Result<String> {
    let output = run.each_line(|stream, line| {
        if stream == Stream::Stderr && is_news(line) {
            on_line(line);
        }
    });
    Ok(check(output, program).map_err(explained)?.text())
}

/// The paths in what `nix build --json` prints: of each derivation the output `out`, or all if there is none.
fn outputs_of(text: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Built {
        outputs: BTreeMap<String, String>,
    }
    let all: Vec<Built> = serde_json::from_str(text)
        .map_err(|e| Error::new(format!("nix build --json printed something other than builds: {e}")))?;
    let chosen = |b: Built| match b.outputs.get("out") {
        Some(out) => vec![out.clone()],
        None => b.outputs.into_values().collect(),
    };
    Ok(all.into_iter().flat_map(chosen).collect())
}

fn one_path(program: &str, paths: &[String]) -> Result<StorePath> {
    match paths {
        [path] => StorePath::parse(path)
            .map_err(|why| Error::new(format!("{program} names {path:?} as its result, which {why}"))),
        [] => Err(Error::new(format!("{program} built nothing; name something that has an output"))),
        _ => Err(Error::new(format!(
            "{program} built {} paths, and a service is one; name one attribute and one output",
            paths.len()
        ))),
    }
}

/// Asks a store whether it answers (this machine's own when none is named).
pub fn ping(store: Option<&str>) -> Result<String> {
    let ask = |verb: &str| {
        let mut run = Run::new("nix").args(["--extra-experimental-features", "nix-command", "store", verb]);
        if let Some(store) = store {
            run = run.env("NIX_REMOTE", store);
        }
        run.deadline(Duration::from_secs(30)).success()
    };
    let output = match ask("info") {
        // Nix before 2.19 has another word for it.
        Err(RunError::Failed { stderr, .. }) if stderr.contains("is not a recognised command") => ask("ping"),
        other => other,
    };
    let output = output.map_err(explained)?;
    // What it found goes to stderr in some versions and to stdout in others; warnings are in front.
    let text = format!("{}\n{}", output.text(), output.stderr);
    let found = |word: &str| text.lines().find_map(|l| l.strip_prefix(word)).map(|v| v.trim().to_string());
    Ok(match found("Version:") {
        Some(version) => format!("version {version}, the store answers"),
        None => "the store answers".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::CacheUrl;

    #[test]
    fn a_password_in_the_url_is_no_argument_and_in_no_message() {
        let url = "https://ann:hush@cache.example.com/x?priority=5";
        let settings = crate::config::load(&[("cache", url.to_string())].into()).unwrap();
        let CacheUrl::Nix(url) = &settings.cache else { panic!("{}", settings.cache) };
        let cache = Cache::new(url, &settings, Side::To);
        for (side, words) in [(Side::From, ["copy"]), (Side::To, ["copy"]), (Side::Store, ["path-info"])] {
            let (run, _scratch) = cache.nix(&settings, side, &words).unwrap();
            assert!(!run.shown().contains("hush"), "{}", run.shown());
        }
        assert!(!cache.shown.contains("hush") && !settings.cache.to_string().contains("hush"));
        let said = cache.clean("error: cannot open https://ann:hush@cache.example.com/x/nix-cache-info");
        assert!(!said.contains("hush") && said.contains("cache.example.com/x"), "{said}");
    }

    #[test]
    fn parameters_are_merged_and_never_doubled() {
        let zstd = [("compression", "zstd".to_string()), ("secret-key", "/k".to_string())];
        for (url, want) in [
            ("file:///c", "file:///c?compression=zstd&secret-key=/k"),
            ("https://c/x?priority=5", "https://c/x?priority=5&compression=zstd&secret-key=/k"),
            ("https://c?compression=xz", "https://c?compression=xz&secret-key=/k"),
            ("https://c?", "https://c?compression=zstd&secret-key=/k"),
        ] {
            assert_eq!(with_params(url, &zstd), want);
        }
        assert_eq!(with_params("ssh://host", &[]), "ssh://host");
    }

    #[test]
    fn of_a_build_the_one_path_counts() {
        let path = |n: u32| format!("/nix/store/{n:032}-ava");
        let json = |outputs: &str| format!("[{{\"drvPath\": \"x.drv\", \"outputs\": {{{outputs}}}}}]");
        let out = |name: &str, n: u32| format!("\"{name}\": \"{}\"", path(n));
        for (text, want) in [
            (json(&out("out", 1)), Some(path(1))),
            (json(&[out("man", 2), out("out", 1)].join(", ")), Some(path(1))),
            (json(&out("bin", 3)), Some(path(3))),
            (json(&[out("man", 2), out("bin", 3)].join(", ")), None),
            ("[]".to_string(), None),
            ("garbage".to_string(), None),
            (json("\"out\": \"/nix/store/x\""), None),
        ] {
            let got = outputs_of(&text).and_then(|paths| one_path("nix build", &paths));
            assert_eq!(got.ok().map(|p| p.to_string()), want, "{text}");
        }
    }

    #[test]
    fn what_keeps_us_from_the_store_is_said_with_its_remedy() {
        for (stderr, word) in [
            (
                "error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Permission denied",
                "nix-users",
            ),
            (
                "error: cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused",
                "enable --now",
            ),
            ("error: cannot connect to socket at '/x/socket': No such file or directory", "enable --now"),
            (
                "error: cannot open connection to remote store 'daemon': error: writing to file: Broken pipe",
                "allowed-users",
            ),
            (
                "warning: x\nerror: cannot open connection to remote store 'daemon': error: read of 32768 bytes: Connection reset by peer",
                "allowed-users",
            ),
            (
                "error:\n    error: opening lock file \"/nix/var/nix/db/big-lock\": Permission denied",
                "nix-setup-systemd",
            ),
            (
                "error: could not set permissions on '/nix/var/nix/profiles/per-user' to 755: Operation not permitted",
                "nix-setup",
            ),
        ] {
            let said = store_trouble(stderr).unwrap();
            assert!(said.contains(word) && said.contains("(nix: "), "{stderr}: {said}");
        }
        assert_eq!(store_trouble("error: path '/nix/store/x' lacks a signature"), None);
        assert!(!is_news(
            "warning: ignoring the client-specified setting 'x', because it is a restricted setting and you are not a trusted user"
        ));
        assert!(is_news("copying 1 paths..."));
    }

    #[test]
    fn of_nix_talk_the_error_is_what_counts() {
        let stderr = "copying 2 paths...\nerror: path '/x' lacks a signature\n  more";
        assert_eq!(errors_of(stderr), "error: path '/x' lacks a signature\n  more");
        assert_eq!(errors_of("plain"), "plain");
        let full = "error: writing to file: No space left on device";
        assert_eq!(with_room(full.into(), "make room"), format!("{full}; make room"));
        assert_eq!(with_room("error: x".into(), "make room"), "error: x");
    }
}
