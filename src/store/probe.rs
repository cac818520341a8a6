//! Finds out whether a store keeps its word: some answer a conditional write with success whatever its
//! condition, and then people who push at the same time overwrite each other. Writes one object of its own
//! below `probe/` and removes it; never touches another. Whoever is about to write the manifest asks
//! [`before_writing`], which remembers what was found on this machine for a week: a store behind an address may be
//! replaced by another.

use super::{Etag, Store, StoreError, When};
use crate::clock::Timestamp;
use crate::{config, durable, say};
use ring::digest::{SHA256, digest};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// For how long a store that was found to keep its conditions is not asked again, in seconds.
const REMEMBERED_SEC: i64 = 7 * 24 * 3600;

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// How the store breaks its conditions, with the remedy; None: it honours them.
    pub complaint: Option<String>,
    /// Why the probe's own object is still there, if it is.
    pub leftover: Option<String>,
}

/// Writes, reads and removes an object of its own. An error means that not even that could be done.
pub fn probe(store: &dyn Store) -> Result<Probe, StoreError> {
    let random: String = crate::http::random::<8>().iter().map(|b| format!("{b:02x}")).collect();
    let key = format!("probe/{random}");
    let tested = conditions(store, &key);
    let removed = store.delete(&key);
    Ok(Probe { complaint: tested?, leftover: removed.err().map(|e| e.to_string()) })
}

/// Refuses a store that breaks its conditions, before anything is written to it. What is known to be well on this
/// machine costs no request.
pub fn before_writing(store: &dyn Store, now: Timestamp) -> Result<(), StoreError> {
    if !store.is_foreign() || tried().contains(&store.identity()) || remembered(store, now) {
        return Ok(());
    }
    match probe(store) {
        // Not taken for tried: the next write of this process is refused as well.
        Ok(Probe { complaint: Some(why), .. }) => Err(StoreError::Refused(why)),
        Ok(Probe { complaint: None, leftover }) => {
            if let Some(leftover) = leftover {
                say::warning(leftover);
            }
            tried().insert(store.identity());
            remember(store, now);
            Ok(())
        }
        // Who may write the manifest and not here works on, as before there was a trial.
        Err(StoreError::Denied(why)) => {
            say::warning(format!("whether the store honours conditional writes was not tried: {why}"));
            tried().insert(store.identity());
            Ok(())
        }
        Err(e) => Err(e),
    }
}

/// The stores that this process need not try again: one that cannot be remembered is tried once, too.
fn tried() -> MutexGuard<'static, BTreeSet<String>> {
    static TRIED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    TRIED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes that the store was found to keep its conditions. Where that cannot be written, the next one asks again.
pub fn remember(store: &dyn Store, now: Timestamp) {
    let note = note(store);
    let text = format!("{} {now}\n", store.identity());
    if store.is_foreign()
        && let Some(folder) = note.parent()
        && fs_err::create_dir_all(folder).is_ok()
        && let Err(e) = durable::write(&note, text.as_bytes(), 0o600)
    {
        say::info(format!("{} cannot be written: {e}; the store will be tried again", note.display()));
    }
}

/// Takes back what [`remember`] noted.
pub fn forget(store: &dyn Store) {
    if let Err(e) = durable::remove(&note(store)) {
        say::info(format!("{} cannot be removed: {e}", note(store).display()));
    }
}

fn remembered(store: &dyn Store, now: Timestamp) -> bool {
    let Ok(text) = fs_err::read_to_string(note(store)) else { return false };
    text.trim_end().rsplit_once(' ').is_some_and(|(identity, at)| {
        let age = Timestamp::parse(at).map(|at| now.0.saturating_sub(at.0));
        identity == store.identity() && age.is_some_and(|age| (0..REMEMBERED_SEC).contains(&age))
    })
}

/// Where it is noted: one file for each store.
fn note(store: &dyn Store) -> PathBuf {
    let hash = digest(&SHA256, store.identity().as_bytes());
    let hex: String = hash.as_ref().iter().take(16).map(|b| format!("{b:02x}")).collect();
    config::state_dir().join("conditional-writes").join(hex)
}

fn conditions(store: &dyn Store, key: &str) -> Result<Option<String>, StoreError> {
    let ignores = |condition: &str| {
        Ok(Some(format!(
            "{} ignores {condition}: people who push at the same time would overwrite each other's changes; use a \
             store that honours it (AWS S3, MinIO, SeaweedFS, Ceph 20, or a directory)",
            store.url()
        )))
    };
    let etag = match store.put(key, b"first", &When::Absent) {
        Ok(etag) => etag,
        Err(StoreError::Changed(_)) => return Ok(Some(refuses(store))),
        Err(e) => return Err(e),
    };
    match store.put(key, b"second", &When::Absent) {
        Err(StoreError::Changed(_)) => {}
        Ok(_) => return ignores("If-None-Match"),
        Err(e) => return Err(e),
    }
    let wrong = Etag("\"00000000000000000000000000000000\"".into());
    match store.put(key, b"third", &When::Still(wrong)) {
        Err(StoreError::Changed(_)) => {}
        Ok(_) => return ignores("If-Match"),
        Err(e) => return Err(e),
    }
    match store.put(key, b"fourth", &When::Still(etag)) {
        Ok(_) => Ok(None),
        Err(StoreError::Changed(_)) => Ok(Some(refuses(store))),
        Err(e) => Err(e),
    }
}

fn refuses(store: &dyn Store) -> String {
    format!(
        "{} refuses conditional writes whose condition holds: nothing could ever be published; use another store",
        store.url()
    )
}
