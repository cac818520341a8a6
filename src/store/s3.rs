//! A bucket as a store. What a store turns out to want of us is noted as long as the value lives ([`StoreDemands`]).

mod answer;
mod errors;
mod listing;
mod request;
mod streams;

use super::codes::ErrorClass;
use super::credentials::{Env, Provider};
use super::objects::{Opened, Upload};
use super::url::{Addressing, S3Location};
use super::{Condition, Etag, EtagForm, GetResult, Keys, Store, StoreError};
use crate::clock::Timestamp;
use crate::http::{self, Again, GaveUp, HttpLimits, Retry};
use crate::parallel::locked;
use answer::{AttemptError, S3Response};
use errors::Verb;
use request::S3Request;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

/// The largest object that one PUT can carry, in bytes (S3's limit: 5 GiB).
pub const MAX_SINGLE_PUT: u64 = 5 << 30;

const LIMITS: HttpLimits = HttpLimits {
    connect: Duration::from_secs(5),
    answer: Duration::from_secs(10),
    total: None,
    stall: Duration::from_secs(20),
};

/// A store takes its time over a large object once it has the last byte.
const STREAM_LIMITS: HttpLimits = HttpLimits { answer: Duration::from_secs(120), ..LIMITS };

/// The limits of one exchange in what is left of the time for all tries.
fn within(left: Duration) -> HttpLimits {
    HttpLimits { total: Some(left.max(Duration::from_secs(1))), ..LIMITS }
}

const RETRY: Retry = Retry {
    tries: 10,
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
    total: Duration::from_secs(30),
};

/// The store in a bucket. May be used by several threads at once; they share its connections.
pub struct S3Store {
    location: S3Location,
    /// `scheme://host[:port]`, for requests and for people.
    place: String,
    region: String,
    agent: ureq::Agent,
    credentials: Provider,
    wants: Mutex<StoreDemands>,
}

/// What a store has refused to do without. Nobody is asked in advance: most stores want none of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct StoreDemands {
    /// The bucket in the host's name.
    virtual_host: bool,
    /// A checksum of what is written.
    checksum: bool,
    /// No `Expect`.
    no_expect: bool,
    /// How it reads the version in the condition of a write; found by the probe.
    etags: EtagForm,
    /// Listings from their beginning: it does not know `start-after`.
    whole_listings: bool,
}

impl S3Store {
    /// Names the bucket, as this environment has it; asks nothing of the network. Credentials are looked up with the
    /// first request, so that their absence is one more reason why a store cannot be read.
    pub fn open_in(location: &S3Location, env: Env) -> Result<Self, StoreError> {
        let credentials = Provider::new(env.clone(), location.profile.as_deref());
        let region = location.region.clone().or_else(|| credentials.region());
        let region = region.unwrap_or_else(|| "us-east-1".into());
        let host = location.endpoint.clone().unwrap_or_else(|| {
            let china = if region.starts_with("cn-") { ".cn" } else { "" };
            format!("s3.{region}.amazonaws.com{china}")
        });
        let place = format!("{}://{host}", location.scheme);
        let refused = |why: String| StoreError::Refused(format!("cannot open {location}: {why}"));
        let authority = host.split('/').next().unwrap_or_default();
        let uri: ureq::http::uri::Authority = authority
            .parse()
            .map_err(|_| refused(format!("'{host}' is not a valid endpoint; expected HOST or HOST:PORT")))?;
        let agent = http::agent(&*env, &location.scheme, uri.host(), LIMITS).map_err(refused)?;
        let wants = StoreDemands {
            virtual_host: location.addressing == Addressing::Virtual,
            ..StoreDemands::default()
        };
        let wants = Mutex::new(wants);
        Ok(S3Store { location: location.clone(), place, region, agent, credentials, wants })
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.location.prefix)
    }

    /// A request to an object, or to the bucket itself.
    fn request(&self, method: &str, key: Option<&str>) -> S3Request {
        let key = key.map(|key| self.full_key(key));
        S3Request::new(method, &self.place, &self.region, &self.location.bucket, key.as_deref())
    }

    fn signed(&self, request: S3Request, wants: StoreDemands) -> Result<S3Request, AttemptError> {
        let request = match wants.virtual_host {
            true => request.virtual_host(&self.location.bucket),
            false => request,
        };
        let with = self.credentials.get(Timestamp::now()).map_err(AttemptError::Credentials)?;
        Ok(request.sign(&with))
    }

    /// One request without a body, again and again as the policy has it; `read` makes the result of its answer.
    fn exchange<T>(
        &self,
        limits: impl Fn(Duration) -> HttpLimits,
        request: impl Fn() -> S3Request,
        read: impl Fn(S3Response) -> Result<T, AttemptError>,
    ) -> Result<T, GaveUp<AttemptError>> {
        self.tried(RETRY, |left, wants| {
            read(self.signed(request(), wants)?.send(&self.agent, &[], (), limits(left))?)
        })
    }

    fn tried<T>(
        &self,
        policy: Retry,
        mut attempt: impl FnMut(Duration, StoreDemands) -> Result<T, AttemptError>,
    ) -> Result<T, GaveUp<AttemptError>> {
        let given = Cell::new(StoreDemands::default());
        let attempt = |left| {
            given.set(*locked(&self.wants));
            attempt(left, given.get())
        };
        policy.run(attempt, |fault| match self.learns(fault, given.get()) {
            true => Again::Yes,
            false => fault.again(),
        })
    }

    /// Whether a request that was refused can be made as the store wants it; from now on every one is. `given` is
    /// what the refused one had.
    fn learns(&self, fault: &AttemptError, given: StoreDemands) -> bool {
        let mut wants = locked(&self.wants);
        match fault.meaning() {
            Some(ErrorClass::WantsVirtualHost) if self.may_be_virtual() && !given.virtual_host => {
                wants.virtual_host = true;
            }
            Some(ErrorClass::MissingHeader) if !given.checksum => wants.checksum = true,
            Some(ErrorClass::NoExpect) if !given.no_expect => wants.no_expect = true,
            _ => return false,
        }
        true
    }

    /// Whether the bucket's name may stand in a host's name; no certificate is valid for one with dots.
    fn may_be_virtual(&self) -> bool {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let dots = |c: char| c == '.' && self.location.scheme == "http";
        self.location.addressing != Addressing::Path
            && self.location.bucket.chars().all(|c| plain(c) || dots(c))
    }

    /// A PUT of bytes at hand, under a condition or none.
    fn put_bytes(
        &self,
        key: &str,
        content_type: &str,
        bytes: &[u8],
        condition: Option<(&str, &str)>,
    ) -> Result<Etag, GaveUp<AttemptError>> {
        self.tried(RETRY, |left, wants| {
            let headers = [("content-type", content_type)].into_iter().chain(condition);
            let mut request = self.request("PUT", Some(key)).headers(headers).payload(bytes);
            if wants.checksum {
                request = request.content_md5();
            }
            self.signed(request, wants)?.send(&self.agent, &[], bytes, within(left))?.written()
        })
    }
}

/// The header of a condition.
fn condition(when: &Condition, form: EtagForm) -> Option<(&'static str, &str)> {
    match (when, form) {
        (Condition::Always, _) => None,
        (Condition::IfAbsent, _) => Some(("if-none-match", "*")),
        (Condition::IfMatch(Etag(etag)), EtagForm::Quoted) => Some(("if-match", etag)),
        (Condition::IfMatch(Etag(etag)), EtagForm::Bare) => Some(("if-match", etag.trim_matches('"'))),
    }
}

impl Store for S3Store {
    fn url(&self) -> String {
        self.location.to_string()
    }

    fn identity(&self) -> String {
        self.location.identity()
    }

    fn is_foreign(&self) -> bool {
        true
    }

    fn get(&self, key: &str, unless: Option<&Etag>, limit: u64) -> Result<GetResult, StoreError> {
        let condition = unless.map(|etag| ("if-none-match", etag.0.as_str()));
        let read = |answer: S3Response| {
            let etag = answer.etag()?;
            // Some stores know no If-None-Match.
            if Some(&etag) == unless {
                return Ok(GetResult::NotModified);
            }
            if answer.length().is_some_and(|length| length > limit) {
                return Err(AttemptError::TooLarge(limit));
            }
            match answer.read(limit)? {
                (bytes, true) => Ok(GetResult::Found { bytes, etag }),
                (_, false) => Err(AttemptError::TooLarge(limit)),
            }
        };
        let request = || self.request("GET", Some(key)).headers(condition);
        self.exchange(within, request, read).or_else(|gave_up| match gave_up.error.meaning() {
            Some(ErrorClass::NotModified) if unless.is_some() => Ok(GetResult::NotModified),
            Some(ErrorClass::NoObject) => Ok(GetResult::Missing),
            _ => Err(self.told(Verb::Read, key, gave_up)),
        })
    }

    fn get_start(&self, key: &str, count: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let range = format!("bytes=0-{}", count.max(1) - 1);
        let read = |answer: S3Response| {
            answer.etag()?;
            // A store that knows no Range sends everything: the rest stays unread.
            Ok(answer.read(count)?.0)
        };
        let request = || self.request("GET", Some(key)).headers([("range", range.as_str())]);
        self.exchange(within, request, read).map(Some).or_else(|gave_up| match gave_up.error.meaning() {
            Some(ErrorClass::NoObject) => Ok(None),
            // An empty object has no first byte.
            Some(ErrorClass::NoRange) => Ok(Some(Vec::new())),
            _ => Err(self.told(Verb::Read, key, gave_up)),
        })
    }

    /// A HEAD's answer has no body, so a missing bucket is a missing object here.
    fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let wanted = *locked(&self.wants);
        let read = |answer: S3Response| {
            answer.etag()?;
            answer.length().ok_or_else(|| AttemptError::Garbage("no Content-Length".into()))
        };
        match self.exchange(within, || self.request("HEAD", Some(key)), read) {
            Ok(size) => Ok(Some(size)),
            Err(GaveUp { error: AttemptError::Refusal(refusal), .. }) if refusal.status == 404 => Ok(None),
            Err(gave_up) => {
                // The reason of a refusal is in the body that a HEAD does not have: ask for it.
                if let AttemptError::Refusal(refusal) = &gave_up.error
                    && !refusal.may_pass()
                {
                    self.get_start(key, 1)?;
                    // A GET learns what the store wants, so that the HEAD can be asked again.
                    if wanted != *locked(&self.wants) {
                        return self.size(key);
                    }
                }
                Err(self.told(Verb::Read, key, gave_up))
            }
        }
    }

    /// A write whose answer is lost is repeated, and the repetition of a conditional one finds its own work:
    /// [`StoreError::Changed`] may then be the echo of our own success. Who gets it and reads again must
    /// compare what is there with what was to be written before writing anew.
    fn put(&self, key: &str, bytes: &[u8], when: &Condition) -> Result<Etag, StoreError> {
        let condition = condition(when, locked(&self.wants).etags);
        let content_type =
            if key.ends_with(".json") { "application/json" } else { "application/octet-stream" };
        self.put_bytes(key, content_type, bytes, condition).map_err(|gave_up| match gave_up.error.meaning() {
            Some(ErrorClass::ConditionFailed) if condition.is_some() => StoreError::changed(key, self),
            // The object that was to be still the same is gone (PutObject, "If-Match").
            Some(ErrorClass::NoObject) if matches!(when, Condition::IfMatch(_)) => {
                StoreError::changed(key, self)
            }
            _ => self.told(Verb::Write, key, gave_up),
        })
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        // S3 answers 204. A page of some other server comes with 200.
        let read = |answer: S3Response| match answer.header("content-type") {
            Some(kind) if answer.status == 200 && kind.starts_with("text/html") => {
                Err(AttemptError::Garbage("with a web page".into()))
            }
            _ => {
                answer.finish();
                Ok(())
            }
        };
        match self.exchange(within, || self.request("DELETE", Some(key)), read) {
            Err(gave_up) if gave_up.error.meaning() != Some(ErrorClass::NoObject) => {
                Err(self.told(Verb::Delete, key, gave_up))
            }
            _ => Ok(()),
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut keys = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let page = self.page(prefix, None, token.as_deref())?;
            keys.extend(page.keys);
            token = page.next;
            if token.is_none() {
                keys.sort();
                return Ok(keys);
            }
        }
    }

    fn list_after(&self, prefix: &str, after: &str) -> Result<Keys, StoreError> {
        if !locked(&self.wants).whole_listings {
            let page = self.page(prefix, Some(after).filter(|a| !a.is_empty()), None)?;
            // Some stores give their keys in no order, and some know no such beginning.
            let ordered =
                page.keys.is_sorted() && page.keys.first().is_none_or(|first| first.as_str() > after);
            if ordered {
                return Ok(Keys { keys: page.keys, more: page.next.is_some() });
            }
            locked(&self.wants).whole_listings = true;
        }
        Ok(Keys::behind(after, self.list(prefix)?))
    }

    fn sizes(&self, prefix: &str) -> Result<BTreeMap<String, u64>, StoreError> {
        let page = self.page(prefix, None, None)?;
        Ok(page.keys.into_iter().zip(page.sizes).collect())
    }

    fn send_etags(&self, form: EtagForm) {
        locked(&self.wants).etags = form;
    }

    fn read_from(&self, key: &str, offset: u64, only: Option<&Etag>) -> Result<Opened, StoreError> {
        self.read_stream(key, offset, only)
    }

    fn write_from(&self, key: &str, upload: &Upload<'_>) -> Result<(), StoreError> {
        self.write_stream(key, upload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreUrl;
    use std::sync::Arc;

    pub(super) fn store(url: &str, vars: &'static [(&str, &str)]) -> S3Store {
        let StoreUrl::S3(location) = StoreUrl::parse(url).unwrap() else { panic!("{url} is not s3") };
        let env = move |name: &str| {
            let own =
                [("AWS_ACCESS_KEY_ID", "AKID"), ("AWS_SECRET_ACCESS_KEY", "hush"), ("HOME", "/nonexistent")];
            vars.iter().chain(&own).find(|(n, _)| *n == name).map(|(_, v)| v.to_string())
        };
        S3Store::open_in(&location, Arc::new(env)).unwrap()
    }

    #[test]
    fn the_region_is_the_urls_then_the_environments_then_the_default() {
        for (url, vars, region, place) in [
            ("s3://bucket", &[] as &[(&str, &str)], "us-east-1", "https://s3.us-east-1.amazonaws.com"),
            ("s3://bucket", &[("AWS_DEFAULT_REGION", "b-1")], "b-1", "https://s3.b-1.amazonaws.com"),
            (
                "s3://bucket",
                &[("AWS_DEFAULT_REGION", "b-1"), ("AWS_REGION", "a-1")],
                "a-1",
                "https://s3.a-1.amazonaws.com",
            ),
            ("s3://bucket?region=cn-x", &[("AWS_REGION", "a-1")], "cn-x", "https://s3.cn-x.amazonaws.com.cn"),
            ("s3://bucket?endpoint=h:1&scheme=http", &[], "us-east-1", "http://h:1"),
        ] {
            let store = store(url, vars);
            assert_eq!((store.region.as_str(), store.place.as_str()), (region, place));
        }
    }

    #[test]
    fn a_condition_names_the_version_as_the_store_reads_it() {
        let still = Condition::IfMatch(Etag("\"abc-2\"".into()));
        assert_eq!(condition(&still, EtagForm::Quoted), Some(("if-match", "\"abc-2\"")));
        assert_eq!(condition(&still, EtagForm::Bare), Some(("if-match", "abc-2")));
        for form in [EtagForm::Quoted, EtagForm::Bare] {
            assert_eq!(condition(&Condition::IfAbsent, form), Some(("if-none-match", "*")));
            assert_eq!(condition(&Condition::Always, form), None);
        }
    }
}
