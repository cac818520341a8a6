//! Copies into this machine's store, and the power: Nix flushes its database and not what it unpacked, so that after a power
//! cut there are paths that count as valid and whose files are empty. So each copy is announced in the spool before it
//! begins, flushed when it is over, and its announcement taken back; one that is found later is of a copy whose end
//! nobody has seen, and its paths are compared with their hashes before anything runs from them. Removes no path but those
//! that this program had announced.

use super::download::hash_of;
use super::spool::{ANNOUNCED, Spool};
use super::{ASK_WITHIN, PER_CALL, explained, missing};
use crate::durable;
use crate::error::{Error, Result};
use crate::log;
use crate::names::{STORE_DIR, StorePath};
use crate::runner::Run;
use std::collections::BTreeSet;
use std::path::Path;

/// Copies with `copy` what is valid only when it is on the disk, too; it is in the spool no more then.
pub fn copying<T, E>(
    spool: &Spool,
    paths: &[StorePath],
    copy: impl FnOnce() -> std::result::Result<T, E>,
) -> Result<std::result::Result<T, E>> {
    let lines: String = paths.iter().map(|path| format!("{path}\n")).collect();
    durable::write(&spool.file(ANNOUNCED), lines.as_bytes(), 0o600)?;
    let copied = copy();
    // Also after a copy that failed: some of it may be valid.
    flushed(spool, if copied.is_ok() { paths } else { &[] })?;
    Ok(copied)
}

/// Flushes, and takes the announcement back; `done` need not come again.
fn flushed(spool: &Spool, done: &[StorePath]) -> Result<()> {
    durable::flush(Path::new(STORE_DIR))?;
    let done: BTreeSet<&str> = done.iter().map(StorePath::hash).collect();
    spool.clear(|key| !done.contains(hash_of(key)))?;
    durable::remove(&spool.file(ANNOUNCED))?;
    Ok(())
}

/// Has Nix forget what is damaged of copies whose end nobody has seen: it is fetched again then.
pub fn recover(home: &Path, work: &str) -> Result<()> {
    for spool in Spool::with(home, work, ANNOUNCED)? {
        let text = fs_err::read_to_string(spool.file(ANNOUNCED))?;
        let paths: Vec<StorePath> = text.lines().filter_map(|line| StorePath::parse(line).ok()).collect();
        let lacking = missing(&paths)?;
        let valid: Vec<StorePath> = paths.into_iter().filter(|path| !lacking.contains(path)).collect();
        let whole = whole(&valid)?;
        if !whole {
            forget(&valid)?;
            log::warning(format!(
                "the machine went down while Nix was copying: {} path(s) of that copy are not whole on the disk, and \
                 are fetched again",
                valid.len()
            ));
        }
        flushed(&spool, if whole { &valid } else { &[] })?;
    }
    Ok(())
}

/// Whether all of these have the hash that Nix's database knows.
fn whole(paths: &[StorePath]) -> Result<bool> {
    for some in paths.chunks(PER_CALL) {
        let run = Run::new("nix-store").arg("--verify-path").args(some).deadline(ASK_WITHIN);
        if !run.output().map_err(explained)?.status.ok() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Takes paths out of the store. Whatever roots they have already are ours.
fn forget(paths: &[StorePath]) -> Result<()> {
    let run = Run::new("nix-store").args(["--delete", "--ignore-liveness"]).args(paths).deadline(ASK_WITHIN);
    run.success().map(drop).map_err(|e| {
        Error::new(format!(
            "the machine went down while Nix was copying, and what is damaged of that copy cannot be removed: {e}; \
             'nix-store --verify --check-contents' names it, 'nix-store --repair-path' repairs it"
        ))
    })
}
