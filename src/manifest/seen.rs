//! What this user's calls have seen of each store: the newest version that they trusted, one file per store below
//! `~/.local/state/omni-deploy/seen`, byte for byte as the store had it. It is what tells an old version that was
//! put back from the newest, and the copy from which the newest can be published again. Never decides: what is
//! kept here counts only while a trusted key's signature on it holds ([`super::trust`]).

use super::model::MAX_BYTES;
use crate::durable;
use crate::error::{Error, Result};
use crate::files::if_reached;
use crate::hash::Sha256;
use crate::home;
use crate::log;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where it is kept of one store. The default remembers nothing.
#[derive(Debug, Default)]
pub struct Seen {
    pub(super) file: Option<PathBuf>,
}

impl Seen {
    /// Of whoever runs this, and the store of this identity.
    pub fn of_user(identity: &str) -> Self {
        Seen::below(&home::state_dir().join("seen"), identity)
    }

    pub(super) fn below(folder: &Path, identity: &str) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let readable: String = identity.chars().take(60).map(plain).collect();
        let digest = Sha256::of(identity.as_bytes()).short(8);
        Seen { file: Some(folder.join(format!("{readable}-{digest}.json"))) }
    }

    /// What was kept of the store.
    pub fn read(&self) -> Result<Option<Vec<u8>>> {
        let Some(file) = &self.file else { return Ok(None) };
        let read = || -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            fs_err::File::open(file)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        // A home that is none remembers nothing.
        if_reached(read()).map_err(|e| {
            Error::new(format!(
                "which version of this store was seen last is not known: {e}; make the file readable, or remove it to \
                 trust what the store has now"
            ))
        })
    }

    /// Keeps a version in the place of the one before. Where that cannot be, it is said, and no more: what was
    /// asked for is done.
    pub fn keep(&self, bytes: &[u8]) {
        let Some(file) = &self.file else { return };
        let write = || -> std::io::Result<()> {
            durable::folder(file.parent().unwrap_or(file), 0o700)?;
            durable::write(file, bytes, 0o600)
        };
        if let Err(e) = write() {
            log::warning(format!(
                "warning: this machine will not remember which version it has seen, and would not notice an old one put \
                 back: {e}; set HOME or XDG_STATE_HOME to a folder that can be written"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn each_store_has_a_file_of_its_own_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        let seen = |identity: &str| Seen::below(&dir.path().join("state/seen"), identity);
        assert_eq!(seen("s3://a").read().unwrap(), None);
        seen("s3://a/b").keep(b"one");
        seen("s3://a-b").keep(b"two");
        assert_eq!(seen("s3://a/b").read().unwrap().as_deref(), Some(&b"one"[..]));
        assert_eq!(seen("s3://a-b").read().unwrap().as_deref(), Some(&b"two"[..]));
        let file = seen("s3://a/b").file.unwrap();
        assert_eq!(fs_err::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs_err::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(file.file_name().unwrap().to_str().unwrap().starts_with("s3---a-b-"));
        assert_eq!(Seen::default().read().unwrap(), None);
    }
}
