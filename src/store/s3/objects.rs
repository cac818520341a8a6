//! A bucket's objects as streams. Of a read only its beginning is tried again: who reads has what came before it was
//! cut, and goes on from there. A write is tried again whole.

use super::{
    AttemptError, ExactReader, LIMITS, MAX_SINGLE_PUT, Patience, S3Response, S3Store, Verb, exchange,
};
use crate::http::{Again, GaveUp, RealPace, Retry, TransferError};
use crate::store::codes::ErrorClass;
use crate::store::objects::{Download, Exact, Objects, Opened, Upload};
use crate::store::{Etag, StoreError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::digest::{Context, SHA256};
use std::cell::{Cell, OnceCell};
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

impl Objects for S3Store {
    fn read_from(&self, key: &str, offset: u64, only: Option<&Etag>) -> Result<Opened, StoreError> {
        let mut request = self.get_request(key);
        request.range = (offset > 0).then(|| format!("bytes={offset}-"));
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
        match self.object(&request, |_| Patience { answer: LIMITS.answer, ..Patience::STREAM }, read) {
            Ok(opened) => Ok(opened),
            Err(gave_up) => match gave_up.error.meaning() {
                Some(ErrorClass::NoObject) => Ok(Opened::Missing),
                Some(ErrorClass::NoRange) if offset > 0 => Ok(Opened::Changed),
                _ => Err(self.told(Verb::Read, key, gave_up)),
            },
        }
    }

    fn write_from(&self, key: &str, upload: &Upload<'_>) -> Result<(), StoreError> {
        let Upload { length, content_type, open } = *upload;
        if length > MAX_SINGLE_PUT {
            return Err(self.too_large_to_write(key, length));
        }
        let written = if length <= HELD {
            let read = || {
                let mut bytes = Vec::with_capacity(length as usize);
                ExactReader::new(&mut *open()?, length).read_to_end(&mut bytes)?;
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
}

impl S3Store {
    fn write_opened(&self, key: &str, upload: &Upload<'_>) -> Result<(), GaveUp<AttemptError>> {
        let Upload { length, content_type, open } = *upload;
        let unread = |e: io::Error| AttemptError::Source(e.to_string());
        let said_length = length.to_string();
        let given = Cell::new(self.wants());
        let checksum: OnceCell<String> = OnceCell::new();
        let attempt = |_| {
            let wants = self.wants();
            given.set(wants);
            let mut request = self.put_request(key, content_type, None);
            if wants.checksum {
                let sha256 = match checksum.get() {
                    Some(known) => known,
                    None => {
                        let sum = sha256(ExactReader::new(&mut *open().map_err(unread)?, length))
                            .map_err(unread)?;
                        checksum.get_or_init(|| sum)
                    }
                };
                request.add_header("x-amz-sdk-checksum-algorithm", "SHA256");
                request.add_header("x-amz-checksum-sha256", sha256);
            }
            self.sign(&mut request, wants)?;
            let mut extra = vec![("content-length", said_length.as_str())];
            if length > EXPECT && !wants.no_expect {
                extra.push(("expect", "100-continue"));
            }
            let mut content = open().map_err(unread)?;
            let mut source = ExactReader::new(&mut *content, length);
            let sent =
                exchange(&self.agent, &request, &extra, SendBody::from_reader(&mut source), Patience::STREAM);
            match (sent, source.failed.take()) {
                (Err(_), Some(why)) => Err(AttemptError::Source(why)),
                (Err(fault), None) => Err(fault),
                (Ok(answer), _) => answer.written().map(drop),
            }
        };
        RETRY.run(&RealPace::default(), attempt, |fault| match self.learns(fault, given.get()) {
            true => Again::Yes,
            false => fault.again(),
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

fn sha256(mut source: impl Read) -> io::Result<String> {
    let mut sum = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 16];
    loop {
        match source.read(&mut buffer)? {
            0 => return Ok(BASE64.encode(sum.finish())),
            read => sum.update(&buffer[..read]),
        }
    }
}
