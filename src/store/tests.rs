//! For the tests of modules: a directory as a store that fails as it is told, and takes down what was asked of it.
//! Everything else is the directory's own.

use super::dir::DirStore;
use super::objects::{Download, Opened, Upload};
use super::{Condition, Etag, EtagForm, GetResult, Store, StoreError};
use crate::parallel::locked;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

/// What it does otherwise than a directory.
#[derive(Debug, Default)]
pub struct Faults {
    /// The answer for a key, instead of the object.
    pub refused: BTreeMap<String, StoreError>,
    /// The network is gone.
    pub gone: bool,
    /// Each transfer breaks after so many bytes.
    pub breaks_after: Option<u64>,
    /// No two answers name the same version.
    pub restless: bool,
    /// It is others' software, which takes versions in these forms alone.
    pub takes: Option<&'static [EtagForm]>,
    /// Of so many writes on top of a version the answer is lost, and they are made again.
    pub loses: u32,
    /// What it tells of the sizes below a prefix.
    pub lists: BTreeMap<String, Result<BTreeMap<String, u64>, StoreError>>,
}

/// The store.
pub struct FaultyStore {
    /// The directory, which does as it should.
    pub inner: DirStore,
    faults: Mutex<Faults>,
    asked: Mutex<Vec<(String, u64)>>,
    sized: Mutex<usize>,
    acknowledged: Mutex<Vec<String>>,
    sent: Mutex<EtagForm>,
}

impl FaultyStore {
    /// In this directory, and without a fault.
    pub fn new(root: &Path) -> Self {
        let inner = DirStore::new(root);
        FaultyStore {
            inner,
            faults: Mutex::default(),
            asked: Mutex::default(),
            sized: Mutex::default(),
            acknowledged: Mutex::default(),
            sent: Mutex::default(),
        }
    }

    /// What it does from now on.
    pub fn faults(&self) -> MutexGuard<'_, Faults> {
        locked(&self.faults)
    }

    /// The keys of which streams were asked for, with their offsets; from now on anew.
    pub fn asked(&self) -> Vec<(String, u64)> {
        std::mem::take(&mut locked(&self.asked))
    }

    /// Of how many objects the size was asked for.
    pub fn sized(&self) -> usize {
        *locked(&self.sized)
    }

    /// The form in which versions are sent to it.
    pub fn sent(&self) -> EtagForm {
        *locked(&self.sent)
    }

    /// The keys of the streams that were written, in order.
    pub fn acknowledged(&self) -> Vec<String> {
        locked(&self.acknowledged).clone()
    }

    fn fails(&self, key: &str) -> Result<(), StoreError> {
        let faults = self.faults();
        if faults.gone {
            return Err(StoreError::Unreachable("the network is gone".into()));
        }
        faults.refused.get(key).cloned().map_or(Ok(()), Err)
    }
}

impl Store for FaultyStore {
    fn url(&self) -> String {
        "s3://box".into()
    }
    fn identity(&self) -> String {
        self.url()
    }
    fn get(&self, key: &str, unless: Option<&Etag>, limit: u64) -> Result<GetResult, StoreError> {
        self.fails(key)?;
        self.inner.get(key, unless, limit)
    }
    fn get_start(&self, key: &str, count: u64) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.get_start(key, count)
    }
    fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
        *locked(&self.sized) += 1;
        self.inner.size(key)
    }
    fn put(&self, key: &str, bytes: &[u8], when: &Condition) -> Result<Etag, StoreError> {
        let mut faults = self.faults();
        let on_a_version = matches!(when, Condition::IfMatch(_));
        if on_a_version && faults.takes.is_some_and(|takes| !takes.contains(&self.sent())) {
            return Err(StoreError::Changed("412".into()));
        }
        let written = self.inner.put(key, bytes, when)?;
        if on_a_version && faults.loses > 0 {
            faults.loses -= 1;
            return self.inner.put(key, bytes, when);
        }
        Ok(written)
    }
    fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key)
    }
    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.inner.list(prefix)
    }
    fn sizes(&self, prefix: &str) -> Result<BTreeMap<String, u64>, StoreError> {
        self.faults().lists.get(prefix).cloned().unwrap_or(Ok(BTreeMap::new()))
    }
    fn send_etags(&self, form: EtagForm) {
        *locked(&self.sent) = form;
    }
    fn is_foreign(&self) -> bool {
        self.faults().takes.is_some()
    }

    fn read_from(&self, key: &str, offset: u64, only: Option<&Etag>) -> Result<Opened, StoreError> {
        self.fails(key)?;
        let asked = {
            let mut asked = locked(&self.asked);
            asked.push((key.to_string(), offset));
            asked.len()
        };
        let (breaks_after, restless) = {
            let faults = self.faults();
            (faults.breaks_after, faults.restless)
        };
        if restless && only.is_some() {
            return Ok(Opened::Changed);
        }
        let mut download = match self.inner.read_from(key, offset, only)? {
            Opened::Found(download) => download,
            other => return Ok(other),
        };
        if restless {
            download.etag = Etag(format!("\"{asked}\""));
        }
        let Download { length, etag, mut body } = download;
        if let Some(after) = breaks_after {
            body = Box::new(Breaking(body, after));
        }
        Ok(Opened::Found(Download { length, etag, body }))
    }

    fn write_from(&self, key: &str, upload: &Upload<'_>) -> Result<(), StoreError> {
        self.fails(key)?;
        self.inner.write_from(key, upload)?;
        locked(&self.acknowledged).push(key.to_string());
        Ok(())
    }
}

/// Ends with a reset after so many bytes.
struct Breaking(Box<dyn Read + Send>, u64);

impl Read for Breaking {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.1 == 0 {
            return Err(io::Error::from(io::ErrorKind::ConnectionReset));
        }
        let most = buffer.len().min(self.1 as usize);
        let count = self.0.read(&mut buffer[..most])?;
        self.1 -= count as u64;
        Ok(count)
    }
}
