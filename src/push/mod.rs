//! From a target to a published version: resolve, build, copy, verify, publish. Each step is for all targets
//! before the next begins, and the manifest is written once, at the end: a failure anywhere publishes nothing
//! and says at which step.

pub(crate) mod early;
pub mod namespace;
pub mod wait;

use crate::clock::{Timestamp, human_seconds};
use crate::config::Settings;
use crate::error::{Error, Result, did_you_mean};
use crate::log;
use crate::manifest::publish::{self, PathUpdate};
use crate::manifest::trust::Author;
use crate::manifest::{Manifest, entry};
use crate::names::{HostName, STORE_DIR, ServiceName, StorePath};
use crate::nix::{self, Scope};
use crate::runner::{Run, Stream, tail};
use crate::store::{self, Store};
use namespace::{DIRTY, How, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use wait::Shipped;

/// A version with everything that was pushed in it.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// The version's serial.
    pub serial: u64,
    /// What runs from now on, in the order of the targets.
    pub services: Vec<(ServiceName, StorePath)>,
    /// The services by the hosts they run on.
    pub hosts: BTreeMap<HostName, Vec<Shipped>>,
}

/// A step's time for people.
fn took(since: Instant) -> String {
    match since.elapsed() {
        t if t.as_secs() < 60 => format!("{:.1} s", t.as_secs_f64()),
        t => human_seconds(t.as_secs() as i64),
    }
}

/// A size for people.
fn size(bytes: u64) -> String {
    match bytes {
        b if b < 1 << 10 => format!("{b} B"),
        b if b < 1 << 20 => format!("{:.1} KiB", b as f64 / 1024.0),
        b if b < 1 << 30 => format!("{:.1} MiB", b as f64 / f64::from(1 << 20)),
        b => format!("{:.2} GiB", b as f64 / f64::from(1 << 30)),
    }
}

/// What is pushed.
#[derive(Debug, Clone, Copy)]
pub struct What<'a> {
    /// As they were typed.
    pub targets: &'a [String],
    /// The name of the only one.
    pub service: Option<&'a str>,
    /// Only what comes from a commit, with nothing changed since.
    pub require_clean: bool,
    /// What of the closures is written to the cache.
    pub scope: Scope,
}

/// Pushes all targets, seen from the folder `cwd`. `on_hosts` gets the hosts that they run on as soon as it is
/// known that there will be something to run.
pub fn push(
    settings: &Settings,
    what: What<'_>,
    cwd: &Path,
    mut on_hosts: impl FnMut(&BTreeSet<HostName>),
) -> Result<Pushed> {
    let What { targets, service, require_clean, scope } = what;
    if targets.len() > 1 && service.is_some() {
        return Err(Error::usage(
            "--service names one service, and there are several targets; push them apart",
        ));
    }
    let mut resolved = Vec::new();
    let mut names = BTreeSet::new();
    for text in targets {
        let target = namespace::resolve(text, service, cwd)?;
        if !names.insert(target.service.clone()) {
            return Err(Error::usage(format!("two targets are the service '{}'; push one", target.service)));
        }
        resolved.push(target);
    }
    // One client for the manifest and the closures, if they are in one bucket.
    let store = store::open(&settings.store)?;
    // Before anything is built: a key that cannot be read, or a manifest that is not to be trusted.
    let author = Author::of(settings, store.as_ref())?;
    let manifest = publish::read_trusted(&author)?;
    for target in &resolved {
        known(&manifest, target)?;
        if require_clean {
            clean(target, revision(target)?.as_deref())?;
        }
    }
    store::before_writing(store.as_ref(), Timestamp::now())?;

    let mut built = Vec::new();
    for target in &resolved {
        let path =
            build(settings, target).map_err(|e| e.context(format!("build of {} failed", target.shown)))?;
        let revision = revision(target)?;
        if require_clean {
            // Also what the build itself changed.
            clean(target, revision.as_deref())?;
        }
        warn_about_revision(&manifest, target, revision.as_deref())?;
        built.push(PathUpdate { name: target.service.clone(), path, revision });
    }
    let paths: Vec<StorePath> = built.iter().map(|u| u.path.clone()).collect();
    for update in &built {
        warn_without_program(&manifest, update);
    }

    let names = built.iter().filter_map(|u| manifest.service(u.name.as_str()));
    on_hosts(&names.flat_map(|service| service.hosts.iter().cloned()).collect());
    copy(settings, &paths, scope, &store)
        .map_err(|e| Error::new(format!("copy to the cache failed: {e}; nothing was published")))?;

    let since = Instant::now();
    let version = publish::update(&author, &built).map_err(|e| e.context("publishing failed"))?;
    let (serial, written) = (version.manifest.serial, version.written);
    // As hosts make them, from the text.
    let entries = entry::digests(&version.bytes);
    let mut hosts: BTreeMap<HostName, Vec<Shipped>> = BTreeMap::new();
    for PathUpdate { name, path, .. } in &built {
        for host in version.manifest.service(name.as_str()).map(|s| s.hosts.as_slice()).unwrap_or_default() {
            let (name, path, entry) = (name.clone(), path.clone(), entries.get(name).cloned());
            hosts.entry(host.clone()).or_default().push(Shipped { name, path, entry });
        }
    }
    let url = store.url();
    if written {
        log::notice(format!("published version {serial} to {url} in {}", took(since)));
    } else {
        log::info(format!("nothing to publish: version {serial} in {url} already says this"));
    }
    Ok(Pushed { serial, services: built.into_iter().map(|u| (u.name, u.path)).collect(), hosts })
}

/// The commit that a target comes from.
fn revision(target: &Target) -> Result<Option<String>> {
    Ok(target.repository.as_deref().map(namespace::revision).transpose()?.flatten())
}

/// Refuses what does not come from a commit alone.
fn clean(target: &Target, revision: Option<&str>) -> Result<()> {
    let why = match (revision, &target.repository) {
        (Some(revision), _) if !revision.ends_with(DIRTY) => return Ok(()),
        (Some(_), Some(repository)) => {
            format!("{} has changes that are not committed; commit or stash them", repository.display())
        }
        _ => "it comes from no commit that is known; name it as the repository does".to_string(),
    };
    Err(Error::new(format!(
        "{}: {why}, or push it without --require-clean; nothing was published",
        target.shown
    )))
}

/// Says what people will see as the commit and should know of it: that it is not all, or that it is older than what
/// the manifest has.
fn warn_about_revision(manifest: &Manifest, target: &Target, revision: Option<&str>) -> Result<()> {
    let (Some(revision), Some(repository)) = (revision, target.repository.as_deref()) else { return Ok(()) };
    let name = &target.service;
    let short = |revision: &str| revision.chars().take(10).collect::<String>();
    if revision.ends_with(DIRTY) {
        log::warning(format!(
            "{name} is built from {} with changes that are not committed, and will be shown as {}{DIRTY}",
            short(revision),
            short(revision)
        ));
    }
    let before = manifest.service(name.as_str()).and_then(|s| s.revision.as_deref());
    let Some(before) = before else { return Ok(()) };
    if let Some((count, apart)) = namespace::left_out(repository, before, revision)? {
        let commits = if count == 1 { "commit" } else { "commits" };
        let how = match apart {
            true => format!("leaves out {count} {commits} of"),
            false => format!("is {count} {commits} behind"),
        };
        log::warning(format!("{name}: {} {how} {}, which the manifest has", short(revision), short(before)));
    }
    Ok(())
}

/// Refuses a target whose service the manifest does not have.
fn known(manifest: &Manifest, target: &Target) -> Result<()> {
    let name = target.service.as_str();
    if manifest.service(name).is_some() {
        return Ok(());
    }
    let near = did_you_mean(name, manifest.services.iter().map(|s| s.name.as_str()));
    Err(Error::new(format!(
        "no service '{name}' in the manifest (the name comes from {}){near}; add it with 'deploy-manifest \
         add-service', or name another with --service",
        target.shown
    )))
}

fn build(settings: &Settings, target: &Target) -> Result<StorePath> {
    let since = Instant::now();
    let mut progress = |line: &str| log::info(line);
    let path = match &target.how {
        How::Built(path) => path.clone(),
        How::Flake(reference) => nix::build_flake(reference, &target.dir, &mut progress)?,
        How::NixFile(file) => nix::build_file(file, &target.dir, &mut progress)?,
        How::Command(namespace) => build_with_command(settings, namespace, &target.dir)?,
    };
    if !nix::missing(std::slice::from_ref(&path))?.is_empty() {
        return Err(Error::new(format!(
            "{path} is not valid in this machine's Nix store; build it here, or fetch it with 'nix copy --from'"
        )));
    }
    match target.how {
        How::Built(_) => {}
        _ => log::info(format!("built {} as {path} in {}", target.shown, took(since))),
    }
    Ok(path)
}

fn build_with_command(settings: &Settings, namespace: &str, dir: &Path) -> Result<StorePath> {
    let Some((program, words)) = settings.build.as_ref().and_then(|words| words.split_first()) else {
        return Err(Error::new(
            "there is no 'bild' on PATH and no other build command; set 'build' in the configuration, or push a \
             flake reference, a .nix file or a store path",
        ));
    };
    let run = Run::new(program).args(words).arg(namespace).dir(dir).keep_end();
    let mut found = None;
    let output = run.each_line(|stream, line| match path_in(stream, line) {
        Some(path) => found = Some(path.to_string()),
        None => log::info(line),
    })?;
    if !output.status.ok() {
        let said = if output.stderr.trim().is_empty() { output.text() } else { output.stderr };
        return Err(Error::new(format!("{program} ended with {}: {}", output.status, tail(&said))));
    }
    match found {
        Some(text) => StorePath::parse(&text)
            .map_err(|why| Error::new(format!("{program} names {text:?} as its result, which {why}"))),
        None => {
            let elsewhere = output.stderr.lines().any(|line| line.trim().starts_with("STORE_PATH="));
            let elsewhere =
                if elsewhere { " (its stderr does not count: builds write there too)" } else { "" };
            Err(Error::new(format!(
                "{program} succeeded and printed no store path; it must print STORE_PATH=/nix/store/… on its standard \
                 output{elsewhere}"
            )))
        }
    }
}

/// The path that a line of a build command's stdout names: `STORE_PATH=…`, or a path in the store and nothing else.
/// On stderr is the talk of everything that is built, dependencies included: none of it is believed.
fn path_in(stream: Stream, line: &str) -> Option<&str> {
    if stream != Stream::Stdout {
        return None;
    }
    let line = line.trim();
    match line.strip_prefix("STORE_PATH=") {
        Some(path) => Some(path.trim().trim_matches('"')),
        None => {
            let below = line.strip_prefix(STORE_DIR).and_then(|l| l.strip_prefix('/'))?;
            (!below.contains(char::is_whitespace)).then_some(line)
        }
    }
}

/// Says early what the host would reject: a closure without the program that the unit starts.
fn warn_without_program(manifest: &Manifest, PathUpdate { name, path, .. }: &PathUpdate) {
    let own_command = manifest.service(name.as_str()).is_some_and(|s| s.exec.command.is_some());
    let program = format!("{path}/bin/{name}");
    if !own_command && fs_err::metadata(&program).is_err() {
        log::warning(format!(
            "there is no {program}, which '{name}' starts by default; set it with 'deploy-manifest set {name} \
             exec.command=…'"
        ));
    }
}

/// Brings the closures into the cache, and says what that took.
fn copy(settings: &Settings, paths: &[StorePath], scope: Scope, store: &Arc<dyn Store>) -> Result<()> {
    let url = settings.cache.to_string();
    let cache = url.split('?').next().unwrap_or(&url);
    let since = Instant::now();
    let on_line = &mut |line: &str| log::info(line.replace(&url, cache));
    let published = nix::publish(settings, paths, scope, Some(store), on_line)?;
    let counted = |count: usize| format!("{count} {}", if count == 1 { "path" } else { "paths" });
    let bytes = published.bytes.map(|b| format!(", {}", size(b))).unwrap_or_default();
    let done = match published.written {
        Some(0) => format!("is in {cache} already ({})", took(since)),
        Some(count) if count < published.paths => {
            format!("is in {cache}: {} of it written in {}, the rest was there", counted(count), took(since))
        }
        Some(_) | None => format!("copied to {cache} in {}", took(since)),
    };
    log::info(format!("closure of {}{bytes} {done}", counted(published.paths)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_commands_result_is_told_from_its_talk() {
        let path = "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava";
        let (out, err) = (Stream::Stdout, Stream::Stderr);
        for (stream, line, want) in [
            (out, format!("STORE_PATH={path}"), Some(path)),
            (out, format!("STORE_PATH={path}\r"), Some(path)),
            // The log of a dependency's build, say.
            (err, format!("STORE_PATH={path}"), None),
            (out, format!("  {path}  "), Some(path)),
            (out, format!("STORE_PATH=\"{path}\""), Some(path)),
            // nix lists on stderr what it is about to build.
            (err, format!("  {path}"), None),
            (out, format!("built {path}"), None),
            (out, format!("{path} is old"), None),
            (out, "STORE_PATH".to_string(), None),
            (out, String::new(), None),
        ] {
            assert_eq!(path_in(stream, &line), want, "{line:?}");
        }
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(
            (size(512), size(1536), size(3 << 20)),
            ("512 B".into(), "1.5 KiB".into(), "3.0 MiB".into())
        );
    }
}
