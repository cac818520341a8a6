//! Finds out whether a store keeps its word: some answer a conditional write with success whatever its
//! condition, and then people who push at the same time overwrite each other; and in which form it takes a version
//! ([`EtagForm`]), which the store that was asked then uses. Writes one object of its own
//! below `probe/` and removes it; never touches another. Whoever is about to write the manifest asks
//! [`before_writing`], which remembers what was found on this machine for a week: a store behind an address may be
//! replaced by another.

use super::{Condition, Etag, EtagForm, GetResult, Store, StoreError};
use crate::clock::Timestamp;
use crate::hash::{Sha256, hex};
use crate::parallel::locked;
use crate::{durable, home, log, random};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

/// For how long a store that was found to keep its conditions is not asked again, in seconds.
const REMEMBERED_SEC: i64 = 7 * 24 * 3600;

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// In which form it takes versions, if it honours conditions; else how it breaks them, with the remedy.
    pub conditions: Result<EtagForm, String>,
    /// Why the probe's own object is still there, if it is.
    pub leftover: Option<String>,
}

/// Writes, reads and removes an object of its own. An error means that not even that could be done.
pub fn probe(store: &dyn Store) -> Result<Probe, StoreError> {
    let key = format!("probe/{}", hex(&random::bytes::<8>()));
    let tested = conditions(store, &key);
    let leftover = store.delete(&key).err().map(|e| e.to_string());
    let conditions = tested?;
    store.send_etags(conditions.clone().unwrap_or_default());
    Ok(Probe { conditions, leftover })
}

/// Refuses a store that breaks its conditions, before anything is written to it. What is known to be well on this
/// machine costs no request.
pub fn before_writing(store: &dyn Store, now: Timestamp) -> Result<(), StoreError> {
    if !store.is_foreign() {
        return Ok(());
    }
    let known = tried().get(&store.identity()).copied();
    if let Some(etags) = known.or_else(|| remembered(store, now)) {
        store.send_etags(etags);
        return Ok(());
    }
    match probe(store) {
        // Not taken for tried: the next write of this process is refused as well.
        Ok(Probe { conditions: Err(why), .. }) => Err(StoreError::Refused(why)),
        Ok(Probe { conditions: Ok(etags), leftover }) => {
            if let Some(leftover) = leftover {
                log::warning(leftover);
            }
            tried().insert(store.identity(), etags);
            remember(store, etags, now);
            Ok(())
        }
        // Who may write the manifest and not here works on, as before there was a trial.
        Err(StoreError::Denied(why)) => {
            log::warning(format!("whether the store honours conditional writes was not tried: {why}"));
            tried().insert(store.identity(), EtagForm::default());
            Ok(())
        }
        Err(e) => Err(e),
    }
}

/// The stores that this process need not try again: one that cannot be remembered is tried once, too.
fn tried() -> MutexGuard<'static, BTreeMap<String, EtagForm>> {
    static TRIED: Mutex<BTreeMap<String, EtagForm>> = Mutex::new(BTreeMap::new());
    locked(&TRIED)
}

/// What follows the time in the note of a store that takes bare versions.
const BARE: &str = " bare";

/// Notes that the store was found to keep its conditions. Where that cannot be written, the next one asks again.
pub fn remember(store: &dyn Store, etags: EtagForm, now: Timestamp) {
    let note = note(store);
    let form = match etags {
        EtagForm::Quoted => "",
        EtagForm::Bare => BARE,
    };
    let text = format!("{} {now}{form}\n", store.identity());
    if store.is_foreign()
        && let Some(folder) = note.parent()
        && fs_err::create_dir_all(folder).is_ok()
        && let Err(e) = durable::write(&note, text.as_bytes(), 0o600)
    {
        log::info(format!("{} cannot be written: {e}; the store will be tried again", note.display()));
    }
}

/// Takes back what [`remember`] noted.
pub fn forget(store: &dyn Store) {
    if let Err(e) = durable::remove(&note(store)) {
        log::info(format!("{} cannot be removed: {e}", note(store).display()));
    }
}

fn remembered(store: &dyn Store, now: Timestamp) -> Option<EtagForm> {
    let text = fs_err::read_to_string(note(store)).ok()?;
    let (text, etags) = match text.trim_end().strip_suffix(BARE) {
        Some(text) => (text, EtagForm::Bare),
        None => (text.trim_end(), EtagForm::Quoted),
    };
    let (identity, at) = text.rsplit_once(' ')?;
    let age = now.0.saturating_sub(Timestamp::parse(at)?.0);
    (identity == store.identity() && (0..REMEMBERED_SEC).contains(&age)).then_some(etags)
}

/// Where it is noted: one file for each store.
fn note(store: &dyn Store) -> PathBuf {
    home::state_dir().join("conditional-writes").join(Sha256::of(store.identity().as_bytes()).short(16))
}

/// The form in which it takes versions, or what is wrong with it.
fn conditions(store: &dyn Store, key: &str) -> Result<Result<EtagForm, String>, StoreError> {
    let ignores = |condition: &str| {
        Ok(Err(format!(
            "{} ignores {condition}: people who push at the same time would overwrite each other's changes; use a \
             store that honours it (AWS S3, MinIO, SeaweedFS, Ceph, or a directory)",
            store.url()
        )))
    };
    let put = |bytes: &[u8], when: Condition| match store.put(key, bytes, &when) {
        Ok(etag) => Ok(Some(etag)),
        Err(StoreError::Changed(_)) => Ok(None),
        Err(e) => Err(e),
    };
    let Some(etag) = put(b"first", Condition::IfAbsent)? else { return Ok(Err(refuses(store))) };
    if put(b"second", Condition::IfAbsent)?.is_some() {
        return ignores("If-None-Match");
    }
    let wrong = Etag("\"00000000000000000000000000000000\"".into());
    for form in [EtagForm::Quoted, EtagForm::Bare] {
        store.send_etags(form);
        // One that compares nothing would take the right one as well.
        if put(b"third", Condition::IfMatch(wrong.clone()))?.is_some() {
            return ignores("If-Match");
        }
        // A write whose answer was lost is made again, and finds its own work.
        if put(b"fourth", Condition::IfMatch(etag.clone()))?.is_some()
            || matches!(store.get(key, None, 16)?, GetResult::Found { bytes, .. } if bytes == b"fourth")
        {
            return Ok(Ok(form));
        }
    }
    Ok(Err(refuses(store)))
}

fn refuses(store: &dyn Store) -> String {
    format!(
        "{} rejects conditional writes whose condition holds: nothing could ever be published; use another store",
        store.url()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{Faults, FaultyStore};

    #[test]
    fn the_form_that_a_store_takes_is_found_out_and_used() {
        use EtagForm::{Bare, Quoted};
        let dir = tempfile::tempdir().unwrap();
        for (takes, loses, found) in [
            (&[Quoted, Bare][..], 0, Some(Quoted)),
            (&[Quoted], 0, Some(Quoted)),
            (&[Bare], 0, Some(Bare)),
            (&[Bare], 1, Some(Bare)),
            (&[Quoted, Bare], 1, Some(Quoted)),
            (&[], 0, None),
        ] {
            let store = FaultyStore::new(dir.path());
            *store.faults() = Faults { takes: Some(takes), loses, ..Faults::default() };
            let probe = probe(&store).unwrap();
            assert_eq!((probe.conditions.ok(), probe.leftover), (found, None), "{takes:?}");
            assert_eq!(store.sent(), found.unwrap_or_default(), "{takes:?} {loses}");
            if found.is_some() {
                let one = store.put("k", b"one", &Condition::Always).unwrap();
                store.put("k", b"two", &Condition::IfMatch(one)).unwrap();
            }
        }
    }
}
