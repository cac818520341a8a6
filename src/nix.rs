//! Nix: closures in, closures out. Every call of a nix program is in this file.

use crate::config::Settings;
use crate::error::Result;
use crate::names::StorePath;
use crate::runner::{Run, RunError};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Where roots against the garbage collector are kept, ours in a folder of our own below.
pub const GCROOTS: &str = "/nix/var/nix/gcroots/omni-deploy";

/// Of `paths`, those that are not valid in this machine's store (asks the store's database, not only the
/// file system).
pub fn missing(_paths: &[StorePath]) -> Result<Vec<StorePath>> {
    todo!()
}

/// Copies closures from the cache into this machine's store: one `nix copy` for all, then, if that fails, one
/// by one for those still missing. Returns the reason for each path that could not be had.
pub fn fetch(_settings: &Settings, _paths: &[StorePath]) -> Result<BTreeMap<StorePath, String>> {
    todo!()
}

/// Signs a closure (if there is a key), copies it to the cache and returns how many paths it has.
pub fn publish(_settings: &Settings, _paths: &[StorePath]) -> Result<()> {
    todo!()
}

/// The paths of the closures (`nix-store --query --requisites`).
pub fn closure(_paths: &[StorePath]) -> Result<Vec<StorePath>> {
    todo!()
}

/// Where `nix` keeps its state (for tests).
pub fn state_dir() -> &'static Path {
    Path::new("/nix/var/nix")
}

/// Asks a store whether it answers (this machine's own when none is named): its version, or its URL.
pub fn ping(store: Option<&str>) -> Result<String, RunError> {
    let mut run = Run::new("nix").args(["--extra-experimental-features", "nix-command", "store", "ping"]);
    if let Some(store) = store {
        run = run.args(["--store", store]);
    }
    let output = run.deadline(Duration::from_secs(30)).success()?;
    // What it found goes to stderr in some versions and to stdout in others; warnings are in front.
    let text = format!("{}\n{}", output.text(), output.stderr);
    let found = |word: &str| text.lines().find_map(|l| l.strip_prefix(word)).map(|v| v.trim().to_string());
    Ok(match found("Version:") {
        Some(version) => format!("version {version}, the store answers"),
        None => "the store answers".into(),
    })
}
