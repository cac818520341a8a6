//! The note of which version of the manifest is being read. Reading is bounded, and the unit's memory is too; should
//! a version end the passes that read it all the same, by that limit or by a fault of ours, the passes after them
//! leave it alone and obey the last good one, instead of dying of it every five minutes. Never decides what is obeyed
//! otherwise. In /run: a boot begins anew.

use super::root::Root;
use crate::durable;
use crate::error::io_text;
use crate::failpoint;
use crate::log;
use crate::store::Etag;
use serde::{Deserialize, Serialize};

/// How many passes may end while they read one version. One alone may have been ended by anything.
const MOST: u32 = 2;

/// Which version, and how often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    store: String,
    etag: String,
    /// How many passes began to read it; those that were done with it took the note away.
    passes: u32,
}

fn left(root: &Root) -> Option<Note> {
    // What cannot be read is no note: then the version is read, as if there had never been one.
    serde_json::from_slice(&fs_err::read(root.reading()).ok()?).ok()
}

/// The version of this store that ended the passes which read it.
pub(super) fn fatal(root: &Root, store: &str) -> Option<Etag> {
    left(root).filter(|note| note.store == store && note.passes >= MOST).map(|note| Etag(note.etag))
}

/// Why that version is not read, for whoever looks after this host.
pub(super) fn refusal(root: &Root, store: &str) -> String {
    format!(
        "the manifest in {store} is left alone: {MOST} passes ended while reading this version of it, perhaps \
         because it takes too much memory ('journalctl -u deployer' shows how); publish another one \
         ('deploy-manifest rollback'), or, if somebody ended those passes, remove {}",
        root.reading().display()
    )
}

/// A version is being read until this goes out of scope.
pub(super) struct ReadingMark<'a>(&'a Root);

impl<'a> ReadingMark<'a> {
    /// Takes down which. Where that cannot be written, the version is read nevertheless.
    pub(super) fn begin(root: &'a Root, store: &str, etag: &Etag) -> Self {
        let before = left(root).filter(|note| note.store == store && note.etag == etag.0);
        let passes = before.map_or(1, |note| note.passes.saturating_add(1));
        let note = Note { store: store.into(), etag: etag.0.clone(), passes };
        let bytes = serde_json::to_vec(&note).unwrap_or_default();
        if let Err(e) = durable::write(&root.reading(), &bytes, 0o644) {
            log::warning(format!("cannot note that the manifest is being read: {}", io_text(&e)));
        }
        failpoint::point("within reading", store);
        ReadingMark(root)
    }
}

impl Drop for ReadingMark<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        if let Err(e) = durable::remove(&self.0.reading()) {
            log::warning(format!("cannot remove the note that the manifest was being read: {}", io_text(&e)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_left_alone_when_it_ended_two_passes_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut root = Root::system(dir.path());
        root.run_dir = dir.path().to_path_buf();
        let (one, two) = (Etag("1".into()), Etag("2".into()));
        let dies = |etag: &Etag| std::mem::forget(ReadingMark::begin(&root, "s3://a", etag));
        dies(&one);
        assert_eq!(fatal(&root, "s3://a"), None, "once is chance");
        dies(&one);
        assert_eq!(fatal(&root, "s3://a"), Some(one.clone()));
        assert_eq!(fatal(&root, "s3://b"), None);
        assert!(refusal(&root, "s3://a").contains("reading.json"));
        dies(&two);
        assert_eq!(fatal(&root, "s3://a"), None, "another version");
        drop(ReadingMark::begin(&root, "s3://a", &two));
        assert_eq!(left(&root), None, "read to its end");
        fs_err::write(root.reading(), "{").unwrap();
        assert_eq!(fatal(&root, "s3://a"), None);
    }
}
