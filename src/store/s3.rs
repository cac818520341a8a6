//! S3 through rusoto over ureq.

use super::url::S3Location;
use super::{Etag, Got, Store, StoreError, When};

/// The store in a bucket.
#[derive(Debug)]
pub struct S3Store {
    _location: S3Location,
}

impl S3Store {
    /// Looks the credentials up.
    pub fn open(location: &S3Location) -> Result<Self, StoreError> {
        Ok(S3Store { _location: location.clone() })
    }
}

impl Store for S3Store {
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
