//! S3 through rusoto over ureq.

use super::url::S3Location;
use super::{Etag, Got, Store, StoreError, When};
use std::io::Read;

/// The largest object that one PUT can carry, in bytes (S3's limit: 5 GiB).
pub const MAX_SINGLE_PUT: u64 = 5 << 30;

/// What a HEAD says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectHead {
    /// Its size in bytes.
    pub size: u64,
    /// Its media type, if the store names one.
    pub content_type: Option<String>,
    /// Its version.
    pub etag: Option<Etag>,
}

/// An object, or a part of it, on its way.
pub struct ObjectStream {
    /// 200, 206 (a part) or 416 (no such part; the body is empty).
    pub status: u16,
    /// How many bytes come, if the store says so.
    pub content_length: Option<u64>,
    /// `Content-Range` as the store gave it.
    pub content_range: Option<String>,
    /// `Content-Type` as the store gave it.
    pub content_type: Option<String>,
    /// The bytes. An error of reading means that the rest is missing.
    pub body: Box<dyn Read + Send>,
}

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

    /// What the store says of an object; None when it is missing.
    pub fn head(&self, _key: &str) -> Result<Option<ObjectHead>, StoreError> {
        todo!()
    }

    /// Reads an object as it comes; `range` is a `Range` header's value. None when it is missing.
    pub fn read_stream(&self, _key: &str, _range: Option<&str>) -> Result<Option<ObjectStream>, StoreError> {
        todo!()
    }

    /// Writes an object of exactly `length` bytes as it comes, whatever is there. Nothing is retried once a
    /// byte of `body` was taken.
    pub fn write_stream(
        &self,
        _key: &str,
        _length: u64,
        _content_type: Option<&str>,
        _body: &mut dyn Read,
    ) -> Result<(), StoreError> {
        todo!()
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
