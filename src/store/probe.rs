//! Finds out whether a store keeps its word: some answer a conditional write with success whatever its
//! condition, and then people who push at the same time overwrite each other. Writes one object of its own
//! below `probe/` and removes it; never touches another.

use super::{Etag, Store, StoreError, When};

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

fn conditions(store: &dyn Store, key: &str) -> Result<Option<String>, StoreError> {
    let ignores = |condition: &str| {
        Ok(Some(format!(
            "{} ignores {condition}: people who push at the same time would overwrite each other's changes; use a \
             store that honours it (AWS S3, MinIO, Ceph, or a directory)",
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
