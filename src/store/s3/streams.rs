//! A bucket's objects as streams. Of a read only its beginning is tried again: who reads has what came before it was
//! cut, and goes on from there. A write is tried again whole.

use super::answer::{AttemptError, S3Response};
use super::errors::Verb;
use super::{LIMITS, MAX_SINGLE_PUT, S3Store, STREAM_LIMITS};
use crate::hash::Sha256;
use crate::http::{GaveUp, Retry, TransferError};
use crate::store::codes::ErrorClass;
use crate::store::objects::{Download, Exact, Opened, Upload, Witnessed};
use crate::store::{Etag, StoreError};
use std::cell::OnceCell;
use std::io::{self, Read};
use std::time::Duration;
use ureq::SendBody;

/// Up to this size the content is held in memory while it is written, and its hash is signed. Many threads write at
/// once: all of theirs together is what counts.
const HELD: u64 = 128 << 10;

/// From this size on the store is asked whether it wants the bytes before they travel.
const EXPECT: u64 = 1 << 20;

/// A try lasts as long as bytes flow, so that tries are counted rather than their time.
const RETRY: Retry = Retry {
    tries: 8,
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
    total: Duration::from_secs(3600),
};

impl S3Store {
    pub(super) fn read_stream(
        &self,
        key: &str,
        offset: u64,
        only: Option<&Etag>,
    ) -> Result<Opened, StoreError> {
        let range = format!("bytes={offset}-");
        let range = (offset > 0).then_some(("range", range.as_str()));
        // The version is compared here: not every store knows the conditions of a read.
        let read = |answer: S3Response| {
            let etag = answer.etag()?;
            if only.is_some_and(|only| *only != etag) {
                return Ok(Opened::Changed);
            }
            let (skip, length) = match answer.status {
                206 => (0, part(&answer, offset)?),
                _ => match answer.length() {
                    Some(size) if offset > 0 && offset >= size => return Ok(Opened::Changed),
                    Some(size) => (offset, size - offset),
                    None => return Err(AttemptError::Garbage("no Content-Length".into())),
                },
            };
            let cut = |e| AttemptError::Trouble(TransferError::of_body(e));
            let mut body = answer.body;
            // A store that knows no Range sends everything.
            if io::copy(&mut body.by_ref().take(skip), &mut io::sink()).map_err(cut)? < skip {
                return Err(AttemptError::Trouble(TransferError::Cut));
            }
            let body = Box::new(Exact::new(body, length).map_err(cut)?);
            Ok(Opened::Found(Download { length, etag, body }))
        };
        let request = || self.request("GET", Some(key)).headers(range);
        self.exchange(|_| LIMITS, request, read).or_else(|gave_up| match gave_up.error.meaning() {
            Some(ErrorClass::NoObject) => Ok(Opened::Missing),
            Some(ErrorClass::NoRange) if offset > 0 => Ok(Opened::Changed),
            _ => Err(self.told(Verb::Read, key, gave_up)),
        })
    }

    pub(super) fn write_stream(&self, key: &str, upload: &Upload<'_>) -> Result<(), StoreError> {
        let Upload { length, content_type, .. } = *upload;
        if length > MAX_SINGLE_PUT {
            return Err(self.too_large_to_write(key, length));
        }
        let written = if length <= HELD {
            let read = || {
                let mut bytes = Vec::with_capacity(length as usize);
                upload.content()?.read_to_end(&mut bytes)?;
                io::Result::Ok(bytes)
            };
            match read() {
                Ok(bytes) => self.put_bytes(key, content_type, &bytes, None).map(drop),
                Err(e) => Err(GaveUp {
                    error: AttemptError::Source(e.to_string()),
                    tries: 1,
                    after: Duration::ZERO,
                }),
            }
        } else {
            self.write_opened(key, upload)
        };
        written.map_err(|gave_up| self.told(Verb::Write, key, gave_up))
    }

    fn write_opened(&self, key: &str, upload: &Upload<'_>) -> Result<(), GaveUp<AttemptError>> {
        let Upload { length, content_type, .. } = *upload;
        let source = |e: io::Error| AttemptError::Source(e.to_string());
        let opened = || upload.content().map_err(source);
        let said_length = length.to_string();
        let checksum: OnceCell<String> = OnceCell::new();
        self.tried(RETRY, |_, wants| {
            let request = self.request("PUT", Some(key)).headers([("content-type", content_type)]);
            let mut request = request.unsigned_payload();
            if wants.checksum {
                let sha256 = match checksum.get() {
                    Some(known) => known,
                    None => {
                        let sum = Sha256::of_reader(&mut opened()?).map_err(source)?.base64();
                        checksum.get_or_init(|| sum)
                    }
                };
                request = request.headers([
                    ("x-amz-sdk-checksum-algorithm", "SHA256"),
                    ("x-amz-checksum-sha256", sha256.as_str()),
                ]);
            }
            let mut unsigned = vec![("content-length", said_length.as_str())];
            if length > EXPECT && !wants.no_expect {
                unsigned.push(("expect", "100-continue"));
            }
            let mut content = Witnessed { inner: opened()?, failed: None };
            let body = SendBody::from_reader(&mut content);
            let sent = self.signed(request, wants)?.send(&self.agent, &unsigned, body, STREAM_LIMITS);
            match (sent, content.failed.take()) {
                // What becomes of the request does not tell.
                (Err(_), Some(e)) => Err(source(e)),
                (Err(error), None) => Err(error),
                (Ok(answer), _) => answer.written().map(drop),
            }
        })
    }
}

/// The length of a part that is to begin at `offset`.
fn part(answer: &S3Response, offset: u64) -> Result<u64, AttemptError> {
    let range = answer.header("content-range").unwrap_or_default();
    let told = || {
        let (first, rest) = range.strip_prefix("bytes ")?.split_once('-')?;
        let (last, size) = rest.split_once('/')?;
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        // Otherwise the end of what comes is not the object's.
        (first == offset && size.parse() == Ok(last.checked_add(1)?)).then_some(last - first + 1)
    };
    told().ok_or_else(|| {
        AttemptError::Garbage(format!("another part of the object than was asked for ({range:?})"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gives_what_was_promised_or_fails() {
        let source = |length, text: &'static str| {
            let exact = Exact::new(text.as_bytes().take(length), length).unwrap();
            let mut source = Witnessed { inner: exact, failed: None };
            let mut got = String::new();
            let result = source.read_to_string(&mut got).map(drop);
            (result.is_ok(), got, source.failed.is_some())
        };
        assert_eq!(source(3, "abc"), (true, "abc".into(), false));
        assert_eq!(source(2, "abc"), (true, "ab".into(), false));
        assert!(!source(4, "abc").0 && source(4, "abc").2);
        assert_eq!(source(0, ""), (true, String::new(), false));
    }
}
