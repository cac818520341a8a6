//! A directory as a bucket.

use super::{Etag, Got, Store, StoreError, When};
use std::path::{Path, PathBuf};

/// The store in a directory.
#[derive(Debug)]
pub struct DirStore {
    _root: PathBuf,
}

impl DirStore {
    /// Names the directory; it is made with the first write.
    pub fn new(root: &Path) -> Self {
        DirStore { _root: root.to_path_buf() }
    }
}

impl Store for DirStore {
    fn url(&self) -> String {
        todo!()
    }
    fn get(&self, _key: &str, _unless: Option<&Etag>, _limit: u64) -> Result<Got, StoreError> {
        todo!()
    }
    fn get_start(&self, _key: &str, _count: u64) -> Result<Option<Vec<u8>>, StoreError> {
        todo!()
    }
    fn size(&self, _key: &str) -> Result<Option<u64>, StoreError> {
        todo!()
    }
    fn put(&self, _key: &str, _bytes: &[u8], _when: &When) -> Result<Etag, StoreError> {
        todo!()
    }
    fn delete(&self, _key: &str) -> Result<(), StoreError> {
        todo!()
    }
    fn list(&self, _prefix: &str) -> Result<Vec<String>, StoreError> {
        todo!()
    }
}
