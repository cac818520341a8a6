//! What a bucket answers, and why a try brought no answer that counts. Knows nothing of what was asked.

use crate::clock::Timestamp;
use crate::http::{Again, TransferError};
use crate::log::printable;
use crate::store::codes::{self, ErrorClass};
use crate::store::{Etag, xml};
use std::io::{self, Read};
use ureq::http::HeaderMap;

const ERROR_LIMIT: u64 = 64 << 10;

/// Where nobody listens at all, a person is waiting for the answer.
const TRIES_OF_ABSENCE: u32 = 5;

/// The head of an answer, and its body still on the wire.
pub(super) struct S3Response {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: ureq::BodyReader<'static>,
}

impl S3Response {
    pub(super) fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name)?.to_str().ok().map(str::to_string)
    }

    pub(super) fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    /// The version; what comes without one comes from no S3.
    pub(super) fn etag(&self) -> Result<Etag, AttemptError> {
        self.header("etag").map(Etag).ok_or_else(|| {
            let kind = self.header("content-type").unwrap_or_else(|| "nothing S3 would send".into());
            AttemptError::Garbage(format!("{} with {kind} and no ETag", self.status))
        })
    }

    /// The version of what was written.
    pub(super) fn written(self) -> Result<Etag, AttemptError> {
        let etag = self.etag()?;
        self.finish();
        Ok(etag)
    }

    /// Reads what nobody wants to know, so that the connection can be used again.
    pub(super) fn finish(self) {
        // What is cut off now was an answer before; a connection that is broken is not kept.
        drop(io::copy(&mut self.body.take(ERROR_LIMIT), &mut io::sink()));
    }

    /// At most `limit` bytes of the body, and whether that was all of it.
    pub(super) fn read(self, limit: u64) -> Result<(Vec<u8>, bool), AttemptError> {
        let mut bytes = Vec::with_capacity(self.length().unwrap_or(0).min(limit).min(1 << 20) as usize);
        let read = self.body.take(limit.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|e| AttemptError::Trouble(TransferError::of_body(e)))?;
        let whole = bytes.len() as u64 <= limit;
        bytes.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok((bytes, whole))
    }
}

/// An answer that is no success. The code and the message are those of S3's error document (Amazon S3 API
/// reference, "Error responses"); empty when there is none.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) code: String,
    pub(super) message: String,
    /// The bucket's region, of an answer that says it is another.
    pub(super) region: Option<String>,
    /// When it was given, by the store's clock.
    pub(super) date: Option<String>,
}

/// Why a try failed.
#[derive(Debug)]
pub(super) enum AttemptError {
    /// There is nothing to sign with; the text says why.
    Credentials(String),
    Trouble(TransferError),
    Refusal(Box<Refusal>),
    /// An answer that is not S3's; what it was.
    Garbage(String),
    /// The object is larger than this many bytes.
    TooLarge(u64),
    /// What was to be sent could not be read.
    Source(String),
}

impl AttemptError {
    pub(super) fn meaning(&self) -> Option<ErrorClass> {
        match self {
            AttemptError::Refusal(refusal) => Some(refusal.meaning()),
            _ => None,
        }
    }

    /// Trouble on the way and what S3 calls transient may pass; what it understood and refused stays refused.
    pub(super) fn again(&self) -> Again {
        match self {
            AttemptError::Trouble(trouble) if trouble.is_absence() => Again::AtMost(TRIES_OF_ABSENCE),
            AttemptError::Trouble(trouble) if trouble.passes() => Again::Yes,
            AttemptError::Refusal(refusal) if refusal.may_pass() => Again::Yes,
            _ => Again::No,
        }
    }
}

impl Refusal {
    pub(super) fn meaning(&self) -> ErrorClass {
        codes::meaning(self.status, &self.code)
    }

    pub(super) fn may_pass(&self) -> bool {
        matches!(self.meaning(), ErrorClass::Transient | ErrorClass::Conflict)
    }

    pub(super) fn read(answer: S3Response) -> Self {
        let (status, date) = (answer.status, answer.header("date"));
        let region = answer.header("x-amz-bucket-region");
        let mut refusal = Refusal { status, code: String::new(), message: String::new(), region, date };
        // An error page that is cut short is still the error its status says.
        if let Ok((bytes, true)) = answer.read(ERROR_LIMIT) {
            let mut fields = [String::new(), String::new(), String::new()];
            let read = xml::leaves(&String::from_utf8_lossy(&bytes), |path, text| {
                let names = ["Code", "Message", "Region"];
                if let ["Error", name] = path
                    && let Some(at) = names.iter().position(|n| n == name)
                {
                    fields[at] = printable(text.trim()).chars().take(300).collect();
                }
            });
            if read.is_ok() {
                let [code, message, region] = fields;
                (refusal.code, refusal.message) = (code, message);
                refusal.region = Some(region).filter(|r| !r.is_empty()).or(refusal.region);
            }
        }
        refusal
    }

    /// Its words, for people.
    pub(super) fn said(&self) -> String {
        let Refusal { status, code, message, .. } = self;
        match (code.is_empty(), message.is_empty()) {
            (true, _) => format!("{status}"),
            (false, true) => format!("{status} {code}"),
            (false, false) => format!("{status} {code} ({message})"),
        }
    }

    /// How far this machine's clock is ahead of the store's, in seconds, by the answer's `Date`.
    pub(super) fn skew(&self, now: Timestamp) -> Option<i64> {
        let date = self.date.as_deref()?;
        Some(now.0 - chrono::DateTime::parse_from_rfc2822(date).ok()?.timestamp())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn refusal(status: u16, code: &str) -> Refusal {
        let two_hours_ago = chrono::DateTime::from_timestamp(Timestamp::now().0 - 7200, 0).unwrap();
        let date = Some(two_hours_ago.to_rfc2822());
        let region = (code == "PermanentRedirect").then(|| "eu-2".to_string());
        Refusal { status, code: code.into(), message: "because".into(), region, date }
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let fault = |status| AttemptError::Refusal(Box::new(refusal(status, "")));
        for (fault, again) in [
            (fault(500), Again::Yes),
            (fault(503), Again::Yes),
            (fault(429), Again::Yes),
            (fault(400), Again::No),
            (fault(403), Again::No),
            (fault(404), Again::No),
            (fault(412), Again::No),
            (fault(501), Again::No),
            (AttemptError::Trouble(TransferError::Cut), Again::Yes),
            (AttemptError::Trouble(TransferError::Late), Again::Yes),
            (AttemptError::Trouble(TransferError::Refused), Again::AtMost(TRIES_OF_ABSENCE)),
            (AttemptError::Trouble(TransferError::Tls(String::new())), Again::No),
            (AttemptError::Garbage(String::new()), Again::No),
        ] {
            assert_eq!(fault.again(), again, "{fault:?}");
        }
    }
}
