//! Objects as they come and go, for what does not fit into memory: the files of a binary cache. A read can go on
//! where an earlier one was cut off; a write can begin anew, so its content is something that can be opened again.
//! Neither knows what the bytes mean.

use super::Etag;
use std::io::{self, Read};
use std::path::Path;

/// The rest of an object from some offset on.
pub struct Download {
    /// How many bytes come.
    pub length: u64,
    /// The version, for going on with it later. A directory's is not that of [`super::Store::get`]: to tell that one, the
    /// whole content would have to be read first.
    pub etag: Etag,
    /// Exactly `length` bytes. An error means that the rest is missing. Who reads to the end (of what is none, too)
    /// gives the connection back to those who come next.
    pub body: Box<dyn Read + Send>,
}

/// The answer to a read that may be the continuation of another.
pub enum Opened {
    /// There is no such object.
    Missing,
    /// It is another version than the one that was named, or has no byte at that offset: begin anew.
    Changed,
    /// The bytes, on their way.
    Found(Download),
}

/// What is to be written.
#[derive(Clone, Copy)]
pub struct Upload<'a> {
    /// How many bytes it has.
    pub length: u64,
    /// Its media type.
    pub content_type: &'a str,
    /// Gives the content from its beginning, as often as it is asked. One that has fewer bytes than `length` makes
    /// the write fail; more are not read.
    pub open: &'a (dyn Fn() -> io::Result<Box<dyn Read + Send>> + Sync),
}

impl Upload<'_> {
    /// The content from its beginning, which ends in an error if it is shorter than promised.
    pub(super) fn content(&self) -> io::Result<impl Read> {
        Exact::new((self.open)()?.take(self.length), self.length)
    }
}

/// The content of a file, for [`Upload::open`].
pub fn file(path: &Path) -> impl Fn() -> io::Result<Box<dyn Read + Send>> + Sync {
    let path = path.to_path_buf();
    move || Ok(Box::new(fs_err::File::open(&path)?))
}

/// A reader that remembers how it failed: who passes its bytes on has an error of its own.
pub struct Witnessed<R> {
    /// What is read.
    pub inner: R,
    /// Its last error.
    pub failed: Option<io::Error>,
}

impl<R: Read> Read for Witnessed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).inspect_err(|e| {
            if e.kind() != io::ErrorKind::Interrupted {
                self.failed = Some(io::Error::new(e.kind(), e.to_string()));
            }
        })
    }
}

/// Exactly so many bytes of another reader, which is then read to its end: a connection whose answer was read to
/// the end can be used again. Fewer are an error.
pub(super) struct Exact<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Exact<R> {
    pub(super) fn new(inner: R, length: u64) -> io::Result<Self> {
        let mut exact = Exact { inner, left: length };
        if length == 0 {
            exact.end()?;
        }
        Ok(exact)
    }

    fn end(&mut self) -> io::Result<()> {
        match self.inner.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "more bytes than promised")),
        }
    }
}

impl<R: Read> Read for Exact<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        match self.inner.read(&mut buffer[..most])? {
            0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{} bytes fewer than promised", self.left),
            )),
            count => {
                self.left -= count as u64;
                if self.left == 0 {
                    self.end()?;
                }
                Ok(count)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::dir::DirStore;
    use crate::store::{Condition, GetResult, Store};

    #[test]
    fn what_was_promised_comes_exactly_or_not_at_all() {
        let read = |length, text: &'static str| {
            let mut got = String::new();
            Exact::new(text.as_bytes(), length)?.read_to_string(&mut got).map(|_| got)
        };
        assert_eq!(read(3, "abc").unwrap(), "abc");
        assert_eq!(read(0, "").unwrap(), "");
        assert_eq!(read(4, "abc").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(read(2, "abc").unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read(0, "abc").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    fn rest(store: &dyn Store, offset: u64, only: Option<&Etag>) -> Option<(Vec<u8>, Etag)> {
        match store.read_from("nar/k", offset, only).unwrap() {
            Opened::Found(mut d) => {
                let mut bytes = Vec::new();
                d.body.read_to_end(&mut bytes).unwrap();
                assert_eq!(bytes.len() as u64, d.length);
                Some((bytes, d.etag))
            }
            Opened::Missing | Opened::Changed => None,
        }
    }

    #[test]
    fn a_directory_is_written_and_read_on_as_a_bucket_is() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(&dir.path().join("a/b"));
        let text = |text: &'static str| {
            move || -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(text.as_bytes())) }
        };
        let write = |length, open: &(dyn Fn() -> io::Result<Box<dyn Read + Send>> + Sync)| {
            store.write_from("nar/k", &Upload { length, content_type: "application/x-nix-nar", open })
        };
        assert!(matches!(store.read_from("nar/k", 0, None), Ok(Opened::Missing)));
        write(10, &text("0123456789")).unwrap();
        let (bytes, etag) = rest(&store, 0, None).unwrap();
        assert_eq!(bytes, b"0123456789");
        assert_eq!(rest(&store, 4, Some(&etag)).unwrap().0, b"456789");
        assert!(matches!(store.read_from("nar/k", 10, None), Ok(Opened::Changed)));
        // What cannot be written whole leaves what was there.
        assert!(write(4, &text("abc")).is_err());
        assert!(write(3, &|| Err(io::Error::other("gone"))).is_err());
        assert_eq!(rest(&store, 0, Some(&etag)).unwrap().0, b"0123456789");
        assert_eq!(fs_err::read_dir(dir.path().join("a/b/nar")).unwrap().count(), 1);
        let path = dir.path().join("new");
        fs_err::write(&path, "another").unwrap();
        write(7, &file(&path)).unwrap();
        assert!(matches!(store.read_from("nar/k", 4, Some(&etag)), Ok(Opened::Changed)));
        assert!(
            matches!(store.get("nar/k", None, 9), Ok(GetResult::Found { bytes, .. }) if bytes == b"another")
        );
        store.put("nar/k", b"", &Condition::Always).unwrap();
        assert_eq!(rest(&store, 0, None).unwrap().0, b"");
        assert!(store.read_from("../k", 0, None).is_err());
        assert!(store.write_from("../k", &Upload { length: 0, content_type: "", open: &text("") }).is_err());
    }
}
