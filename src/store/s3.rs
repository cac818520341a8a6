//! A bucket as a store: the only file that names rusoto. rusoto builds and signs the requests; they travel
//! over ureq, so every future of rusoto's is ready when it is first polled and no runtime ever starts. rusoto
//! never reads a byte of an answer: its XML reader spins for ever on a document that is cut short and panics on
//! a number that is none, so [`Carrier`] keeps the answer for the code here and shows rusoto an empty success.
//! Addresses are path-style (what rusoto builds, what other people's servers understand, and what keeps TLS names
//! right for buckets with dots) unless the URL or the store wants the bucket in the host's name. What a store turns
//! out to want of us is noted as long as this value lives ([`StoreDemands`]).

mod objects;

use super::codes::{self, ErrorClass};
use super::credentials::{Credentials, Env, Provider};
use super::url::{Addressing, S3Location};
use super::xml;
use super::{Condition, Etag, EtagForm, GetResult, Keys, Store, StoreError};
use crate::clock::{Timestamp, human_seconds};
use crate::http::{self, Again, GaveUp, HttpLimits, RealPace, Retry, TransferError};
use crate::log::printable;
use rusoto_core::credential::{AwsCredentials, StaticProvider};
use rusoto_core::request::{DispatchSignedRequestFuture, HttpResponse};
use rusoto_core::signature::SignedRequest;
use rusoto_core::{ByteStream, Client, DispatchSignedRequest, HttpDispatchError, Region};
use rusoto_s3::{
    DeleteObjectRequest, GetObjectRequest, HeadObjectRequest, ListObjectsV2Request, S3, S3Client,
};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io::{self, Read};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use ureq::AsSendBody;
use ureq::http::{HeaderMap, Request};

/// The largest object that one PUT can carry, in bytes (S3's limit: 5 GiB).
pub const MAX_SINGLE_PUT: u64 = 5 << 30;

const ERROR_LIMIT: u64 = 64 << 10;
const PAGE_LIMIT: u64 = 16 << 20;

const LIMITS: HttpLimits = HttpLimits {
    connect: Duration::from_secs(5),
    answer: Duration::from_secs(10),
    total: None,
    stall: Duration::from_secs(20),
};

/// A store takes its time over a large object once it has the last byte.
const STREAM_ANSWER: Duration = Duration::from_secs(120);

const RETRY: Retry = Retry {
    tries: 10,
    first: Duration::from_millis(100),
    longest: Duration::from_secs(5),
    total: Duration::from_secs(30),
};

/// Where nobody listens at all, a person is waiting for the answer.
const TRIES_OF_ABSENCE: u32 = 5;

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

/// The store in a bucket. May be used by several threads at once; they share its connections.
pub struct S3Store {
    location: S3Location,
    /// `scheme://host[:port]`, for requests and for people.
    place: String,
    region: Region,
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

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store").field("location", &self.location).finish_non_exhaustive()
    }
}

/// The head of an answer, and its body still on the wire.
struct S3Response {
    status: u16,
    headers: HeaderMap,
    body: ureq::BodyReader<'static>,
}

impl S3Response {
    fn header(&self, name: &str) -> Option<String> {
        header(&self.headers, name)
    }

    fn length(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    /// The version; what comes without one comes from no S3.
    fn etag(&self) -> Result<Etag, AttemptError> {
        self.header("etag").map(Etag).ok_or_else(|| {
            let kind = self.header("content-type").unwrap_or_else(|| "nothing S3 would send".into());
            AttemptError::Garbage(format!("{} with {kind} and no ETag", self.status))
        })
    }

    /// The version of what was written.
    fn written(self) -> Result<Etag, AttemptError> {
        let etag = self.etag()?;
        self.finish();
        Ok(etag)
    }

    /// Reads what nobody wants to know, so that the connection can be used again.
    fn finish(self) {
        // What is cut off now was an answer before; a connection that is broken is not kept.
        drop(io::copy(&mut self.body.take(ERROR_LIMIT), &mut io::sink()));
    }

    /// At most `limit` bytes of the body, and whether that was all of it.
    fn read(self, limit: u64) -> Result<(Vec<u8>, bool), AttemptError> {
        let mut bytes = Vec::with_capacity(self.length().unwrap_or(0).min(limit).min(1 << 20) as usize);
        let read = self.body.take(limit.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|e| AttemptError::Trouble(TransferError::of_body(e)))?;
        let whole = bytes.len() as u64 <= limit;
        bytes.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok((bytes, whole))
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_string)
}

/// An answer that is no success. The code and the message are those of S3's error document (Amazon S3 API
/// reference, "Error responses"); empty when there is none.
#[derive(Debug)]
struct Refusal {
    status: u16,
    code: String,
    message: String,
    /// The bucket's region, of an answer that says it is another.
    region: Option<String>,
    headers: HeaderMap,
}

/// Why a try failed.
#[derive(Debug)]
enum AttemptError {
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
    fn status(&self) -> u16 {
        match self {
            AttemptError::Refusal(refusal) => refusal.status,
            _ => 0,
        }
    }

    fn meaning(&self) -> Option<ErrorClass> {
        match self {
            AttemptError::Refusal(refusal) => Some(refusal.meaning()),
            _ => None,
        }
    }

    /// Trouble on the way and what S3 calls transient may pass; what it understood and refused stays refused.
    fn again(&self) -> Again {
        match self {
            AttemptError::Trouble(trouble) if trouble.is_absence() => Again::AtMost(TRIES_OF_ABSENCE),
            AttemptError::Trouble(trouble) if trouble.passes() => Again::Yes,
            AttemptError::Refusal(refusal) if refusal.may_pass() => Again::Yes,
            _ => Again::No,
        }
    }
}

impl Refusal {
    fn meaning(&self) -> ErrorClass {
        codes::meaning(self.status, &self.code)
    }

    fn may_pass(&self) -> bool {
        matches!(self.meaning(), ErrorClass::Transient | ErrorClass::Conflict)
    }

    fn read(answer: S3Response) -> Result<Self, AttemptError> {
        let (status, headers) = (answer.status, answer.headers.clone());
        let mut refusal =
            Refusal { status, code: String::new(), message: String::new(), region: None, headers };
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
                refusal.region = Some(region).filter(|r| !r.is_empty());
            }
        }
        refusal.region = refusal.region.or_else(|| header(&refusal.headers, "x-amz-bucket-region"));
        Ok(refusal)
    }

    /// Its words, for people.
    fn said(&self) -> String {
        let Refusal { status, code, message, .. } = self;
        match (code.is_empty(), message.is_empty()) {
            (true, _) => format!("{status}"),
            (false, true) => format!("{status} {code}"),
            (false, false) => format!("{status} {code} ({message})"),
        }
    }

    /// How far this machine's clock is ahead of the store's, in seconds, by the answer's `Date`.
    fn skew(&self, now: Timestamp) -> Option<i64> {
        let date = header(&self.headers, "date")?;
        Some(now.0 - chrono::DateTime::parse_from_rfc2822(&date).ok()?.timestamp())
    }
}

/// What is being done, for the texts of errors.
#[derive(Clone, Copy)]
enum Verb {
    Read,
    Write,
    Delete,
    List,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Verb::Read => "read",
            Verb::Write => "write",
            Verb::Delete => "delete",
            Verb::List => "list",
        }
    }

    /// The permission it takes on a bucket or an object in it (Amazon S3 user guide, "Actions defined by Amazon
    /// S3"); who may not list is told of a missing object that it is forbidden.
    fn permission(self, bucket: &str, key: &str) -> String {
        let bucket = format!("arn:aws:s3:::{bucket}");
        match self {
            Verb::Read => format!("s3:GetObject on {bucket}/{key} and s3:ListBucket on {bucket}"),
            Verb::Write => format!("s3:PutObject on {bucket}/{key}"),
            Verb::Delete => format!("s3:DeleteObject on {bucket}/{key}"),
            Verb::List => format!("s3:ListBucket on {bucket}"),
        }
    }
}

/// How long one exchange may last, and how long its answer may be awaited.
#[derive(Clone, Copy)]
struct Patience {
    total: Option<Duration>,
    answer: Duration,
}

impl Patience {
    fn within(left: Duration) -> Self {
        Patience { total: Some(left.max(Duration::from_secs(1))), answer: LIMITS.answer }
    }

    const STREAM: Patience = Patience { total: None, answer: STREAM_ANSWER };
}

/// Sends a signed request. An answer that is no success is a fault.
fn exchange(
    agent: &ureq::Agent,
    request: &SignedRequest,
    extra: &[(&str, &str)],
    body: impl AsSendBody,
    patience: Patience,
) -> Result<S3Response, AttemptError> {
    let odd = |e: ureq::http::Error| AttemptError::Trouble(TransferError::Other(e.to_string()));
    let query = Some(request.canonical_query_string()).filter(|q| !q.is_empty());
    let uri = format!(
        "{}://{}{}{}{}",
        request.scheme(),
        request.hostname(),
        request.canonical_uri(),
        if query.is_some() { "?" } else { "" },
        query.unwrap_or_default()
    );
    let mut builder = Request::builder().method(request.method()).uri(uri);
    for (name, values) in request.headers() {
        // Not signed, and the body's own affair.
        if name != "content-length" {
            for value in values {
                builder = builder.header(name, value.as_slice());
            }
        }
    }
    for (name, value) in extra {
        builder = builder.header(*name, *value);
    }
    let request = agent
        .configure_request(builder.body(body).map_err(odd)?)
        .timeout_global(patience.total)
        .timeout_recv_response(Some(patience.answer))
        .build();
    let (head, body) = agent.run(request).map_err(|e| AttemptError::Trouble(e.into()))?.into_parts();
    let answer = S3Response { status: head.status.as_u16(), headers: head.headers, body: body.into_reader() };
    if (200..300).contains(&answer.status) {
        return Ok(answer);
    }
    Err(AttemptError::Refusal(Box::new(Refusal::read(answer)?)))
}

/// Carries one request of rusoto's typed client and keeps its answer.
struct Carrier {
    agent: ureq::Agent,
    patience: Patience,
    /// The bucket that goes into the host's name, and what the request is signed with anew then.
    virtual_host: Option<(String, AwsCredentials)>,
    kept: Mutex<Option<Result<S3Response, AttemptError>>>,
}

impl DispatchSignedRequest for Carrier {
    fn dispatch(&self, mut request: SignedRequest, _: Option<Duration>) -> DispatchSignedRequestFuture {
        if let Some((bucket, credentials)) = &self.virtual_host {
            to_virtual_host(&mut request, bucket);
            request.sign(credentials);
        }
        let answer = exchange(&self.agent, &request, &[], (), self.patience);
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
        let status = 200u16.try_into().map_err(|_| HttpDispatchError::new("200 is no status".into()));
        Box::pin(std::future::ready(status.map(|status| HttpResponse {
            status,
            body: ByteStream::from(Vec::new()),
            headers: Default::default(),
        })))
    }
}

/// Moves the bucket from the path to the host's name (Amazon S3 user guide, "Virtual hosting of buckets").
fn to_virtual_host(request: &mut SignedRequest, bucket: &str) {
    let host = format!("{bucket}.{}", request.hostname());
    request.set_hostname(Some(host));
    if let Some(rest) = request.path.strip_prefix('/').and_then(|p| p.strip_prefix(bucket)) {
        request.path = if rest.is_empty() { "/".into() } else { rest.into() };
    }
}

/// The result of a future that never waits.
fn ready<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

impl S3Store {
    /// Names the bucket; asks nothing of the network. Credentials are looked up with the first request, so
    /// that their absence is one more reason why a store cannot be read.
    pub fn open(location: &S3Location) -> Result<Self, StoreError> {
        S3Store::open_in(location, Arc::new(http::process_env))
    }

    /// [`S3Store::open`] in another environment than the process's own.
    pub fn open_in(location: &S3Location, env: Env) -> Result<Self, StoreError> {
        let set = |name: &str| env(name).filter(|v| !v.is_empty());
        let credentials = Provider::new(env.clone(), location.profile.as_deref());
        let region = location
            .region
            .clone()
            .or_else(|| set("AWS_REGION"))
            .or_else(|| set("AWS_DEFAULT_REGION"))
            .or_else(|| credentials.region())
            .unwrap_or_else(|| "us-east-1".into());
        let host = location.endpoint.clone().unwrap_or_else(|| {
            let china = if region.starts_with("cn-") { ".cn" } else { "" };
            format!("s3.{region}.amazonaws.com{china}")
        });
        let place = format!("{}://{host}", location.scheme);
        let refused = |why: String| StoreError::Refused(format!("cannot open {location}: {why}"));
        let authority = host.split('/').next().unwrap_or_default();
        let uri: ureq::http::uri::Authority = authority
            .parse()
            .map_err(|_| refused(format!("'{host}' is no endpoint; HOST or HOST:PORT is meant")))?;
        let agent = http::agent(&*env, &location.scheme, uri.host(), LIMITS).map_err(refused)?;
        let region = Region::Custom { name: region, endpoint: place.clone() };
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

    fn sign_with(&self) -> Result<Arc<Credentials>, AttemptError> {
        self.credentials.get(Timestamp::now()).map_err(AttemptError::Credentials)
    }

    /// One request of rusoto's typed client, again and again as the policy has it; `read` makes the result of
    /// its answer.
    fn typed<T, F: Future<Output = Option<String>>>(
        &self,
        patience: impl Fn(Duration) -> Patience,
        call: impl Fn(S3Client) -> F,
        read: impl Fn(S3Response) -> Result<T, AttemptError>,
    ) -> Result<T, GaveUp<AttemptError>> {
        self.tried(|left, wants| {
            let c = self.sign_with()?;
            let provider = StaticProvider::new(c.id.clone(), c.secret.clone(), c.token.clone(), None);
            let carrier = Arc::new(Carrier {
                agent: self.agent.clone(),
                patience: patience(left),
                virtual_host: wants.virtual_host.then(|| (self.location.bucket.clone(), signing(&c))),
                kept: Mutex::default(),
            });
            let client = Client::new_with(provider, carrier.clone());
            let said = ready(call(S3Client::new_with_client(client, self.region.clone())));
            match carrier.kept.lock().unwrap_or_else(PoisonError::into_inner).take() {
                Some(answer) => read(answer?),
                None => Err(AttemptError::Trouble(TransferError::Other(
                    said.flatten().unwrap_or_else(|| "rusoto sent nothing".into()),
                ))),
            }
        })
    }

    fn tried<T>(
        &self,
        mut attempt: impl FnMut(Duration, StoreDemands) -> Result<T, AttemptError>,
    ) -> Result<T, GaveUp<AttemptError>> {
        let given = Cell::new(StoreDemands::default());
        let attempt = |left| {
            given.set(self.wants());
            attempt(left, given.get())
        };
        RETRY.run(&RealPace::default(), attempt, |fault| match self.learns(fault, given.get()) {
            true => Again::Yes,
            false => fault.again(),
        })
    }

    fn wants(&self) -> StoreDemands {
        *self.wants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request that was refused can be made as the store wants it; from now on every one is. `given` is
    /// what the refused one had.
    fn learns(&self, fault: &AttemptError, given: StoreDemands) -> bool {
        let mut wants = self.wants.lock().unwrap_or_else(PoisonError::into_inner);
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

    fn get_request(&self, key: &str) -> GetObjectRequest {
        GetObjectRequest {
            bucket: self.location.bucket.clone(),
            key: self.full_key(key),
            ..GetObjectRequest::default()
        }
    }

    /// A GET of one object.
    fn object<T>(
        &self,
        request: &GetObjectRequest,
        patience: impl Fn(Duration) -> Patience,
        read: impl Fn(S3Response) -> Result<T, AttemptError>,
    ) -> Result<T, GaveUp<AttemptError>> {
        let call = |client: S3Client| {
            let request = request.clone();
            async move { client.get_object(request).await.err().map(|e| e.to_string()) }
        };
        self.typed(patience, call, read)
    }

    /// A PUT, to be signed with the hash of `payload`, or unsigned if its bytes are not at hand.
    fn put_request(&self, key: &str, content_type: &str, payload: Option<&[u8]>) -> SignedRequest {
        let path = format!("/{}/{}", self.location.bucket, self.full_key(key));
        let mut request = SignedRequest::new("PUT", "s3", &self.region, &path);
        request.add_header("content-type", content_type);
        match payload {
            Some(bytes) => request.set_payload(Some(bytes.to_vec())),
            // What stands for the stream: rusoto signs any stream as UNSIGNED-PAYLOAD.
            None => request.set_payload_stream(ByteStream::from(Vec::new())),
        }
        request
    }

    fn sign(&self, request: &mut SignedRequest, wants: StoreDemands) -> Result<(), AttemptError> {
        if wants.virtual_host {
            to_virtual_host(request, &self.location.bucket);
        }
        let credentials = self.sign_with()?;
        request.sign(&signing(&credentials));
        Ok(())
    }

    /// A PUT of bytes at hand, under a condition or none.
    fn put_bytes(
        &self,
        key: &str,
        content_type: &str,
        bytes: &[u8],
        condition: Option<(&str, &str)>,
    ) -> Result<Etag, GaveUp<AttemptError>> {
        self.tried(|left, wants| {
            let mut request = self.put_request(key, content_type, Some(bytes));
            if let Some((name, value)) = condition {
                request.add_header(name, value);
            }
            if wants.checksum {
                // Every store that wants a checksum takes this one, also those older than the others.
                request.maybe_set_content_md5_header();
            }
            self.sign(&mut request, wants)?;
            // Its copy was for the signature: many are written at a time.
            request.payload = None;
            exchange(&self.agent, &request, &[], bytes, Patience::within(left))?.written()
        })
    }

    /// What the store says of an object; None when it is missing. A HEAD's answer has no body, so a missing
    /// bucket is a missing object here.
    pub fn head(&self, key: &str) -> Result<Option<ObjectHead>, StoreError> {
        let wanted = self.wants();
        let call = |client: S3Client| {
            let request = HeadObjectRequest {
                bucket: self.location.bucket.clone(),
                key: self.full_key(key),
                ..HeadObjectRequest::default()
            };
            async move { client.head_object(request).await.err().map(|e| e.to_string()) }
        };
        let read = |answer: S3Response| {
            let etag = Some(answer.etag()?);
            let size = answer.length().ok_or_else(|| AttemptError::Garbage("no Content-Length".into()))?;
            Ok(ObjectHead { size, content_type: answer.header("content-type"), etag })
        };
        match self.typed(Patience::within, call, read) {
            Ok(head) => Ok(Some(head)),
            Err(gave_up) if gave_up.error.status() == 404 => Ok(None),
            Err(gave_up) => {
                // The reason of a refusal is in the body that a HEAD does not have: ask for it.
                if let AttemptError::Refusal(refusal) = &gave_up.error
                    && !refusal.may_pass()
                {
                    self.get_start(key, 1)?;
                    // A GET learns what the store wants, so that the HEAD can be asked again.
                    if wanted != self.wants() {
                        return self.head(key);
                    }
                }
                Err(self.told(Verb::Read, key, gave_up))
            }
        }
    }

    fn too_large_to_write(&self, key: &str, length: u64) -> StoreError {
        StoreError::Refused(format!(
            "cannot write {key} to {}: it has {length} bytes and one PUT carries {MAX_SINGLE_PUT}; split the \
             store path's content over several, or use a cache that is not s3://",
            self.url()
        ))
    }

    /// The error of an operation, in one line.
    fn told(&self, verb: Verb, key: &str, gave_up: GaveUp<AttemptError>) -> StoreError {
        let GaveUp { error, tries, after } = gave_up;
        let place = &self.place;
        let url = self.url();
        let object = if key.is_empty() { url } else { format!("{key} in {url}") };
        let what = format!("cannot {} {object}", verb.word());
        let tried =
            if tries > 1 { format!(" ({tries} tries in {} s)", after.as_secs()) } else { String::new() };
        match error {
            AttemptError::Credentials(why) => StoreError::Refused(format!("{what}: {why}")),
            AttemptError::TooLarge(limit) => StoreError::TooLarge(format!(
                "{object} is larger than {limit} bytes; something else wrote it"
            )),
            AttemptError::Source(why) => {
                StoreError::Unreachable(format!("{what}: its content could not be read: {why}; run it again"))
            }
            AttemptError::Garbage(how) => StoreError::Refused(format!(
                "{what}: {place} answers {how}, which is not S3; check the store's endpoint and the proxy"
            )),
            AttemptError::Refusal(refusal) => {
                self.refused(verb, key, &what, &tried, &refusal, Timestamp::now())
            }
            AttemptError::Trouble(trouble) => {
                let proxy = self.agent.config().proxy();
                let via = proxy.map_or(String::new(), |p| format!(" by the proxy {}:{}", p.host(), p.port()));
                let remedy = match &trouble {
                    t if t.is_absence() && proxy.is_some() => {
                        "correct the proxy in the environment, or name the store in NO_PROXY"
                    }
                    TransferError::Unresolved => {
                        "check the store's endpoint or region, and this machine's network"
                    }
                    TransferError::Refused => "start the store, or correct the endpoint in its URL",
                    TransferError::Unroutable | TransferError::Late => {
                        "check this machine's network and the store"
                    }
                    TransferError::Cut => "check the store and the scheme in its URL, and try again",
                    TransferError::Expired(..) => {
                        "if the clock is wrong, run 'timedatectl set-ntp true'; else the store needs a new certificate"
                    }
                    TransferError::NotYetValid(..) => {
                        "if the clock is wrong, run 'timedatectl set-ntp true'; else wait, or give the store another \
                         certificate"
                    }
                    TransferError::Tls(why) if why.contains("certificate") => {
                        "name the file with its authority's certificate in AWS_CA_BUNDLE, or correct the endpoint"
                    }
                    TransferError::Tls(_) => "check the endpoint, or add scheme=http to the store's URL",
                    TransferError::Protocol(_) => "check the endpoint and the scheme in the store's URL",
                    TransferError::Other(_) => "check the store's URL and the proxy",
                };
                let text = format!("{what}: {place}{via}: {trouble}{tried}; {remedy}");
                match trouble {
                    TransferError::Tls(_)
                    | TransferError::Expired(..)
                    | TransferError::NotYetValid(..)
                    | TransferError::Protocol(_) => StoreError::Refused(text),
                    _ => StoreError::Unreachable(text),
                }
            }
        }
    }

    fn refused(
        &self,
        verb: Verb,
        key: &str,
        what: &str,
        tried: &str,
        refusal: &Refusal,
        now: Timestamp,
    ) -> StoreError {
        let Refusal { status: _, code, message: _, region, headers: _ } = refusal;
        let place = &self.place;
        let bucket = &self.location.bucket;
        let (id, source) = match self.sign_with() {
            Ok(c) => (c.id.clone(), c.source.to_string()),
            Err(_) => ("unknown".into(), "the credentials' source".into()),
        };
        let said = refusal.said();
        let why = match refusal.meaning() {
            ErrorClass::Transient | ErrorClass::Conflict => {
                return StoreError::Unreachable(format!(
                    "{what}: {place} answers {said}{tried}; try again later"
                ));
            }
            ErrorClass::NoBucket => {
                format!("there is no bucket '{bucket}' at {place}; create it, or correct the store's URL")
            }
            ErrorClass::UnknownKey => {
                format!("{place} does not know the access key {id}; correct {source}")
            }
            ErrorClass::WrongSecret => {
                format!("the secret key is not the one of access key {id}; correct {source}")
            }
            ErrorClass::ExpiredToken => {
                format!("the session token has expired; renew {source}")
            }
            ErrorClass::InvalidToken => format!("the session token is not valid; renew {source}"),
            ErrorClass::ClockSkew => {
                let skew = match refusal.skew(now) {
                    Some(s) if s.abs() >= 60 => {
                        let side = if s > 0 { "ahead of" } else { "behind" };
                        format!("{} {side} the store's", human_seconds(s.abs()))
                    }
                    _ => "too far from the store's".into(),
                };
                format!("this machine's clock is {skew}; run 'timedatectl set-ntp true'")
            }
            ErrorClass::Elsewhere => match region {
                Some(region) => format!(
                    "the bucket is in region {region}, not {}; write region={region} in the store's URL",
                    self.region.name()
                ),
                None => format!(
                    "{place} answers {said}: the bucket is elsewhere; correct the region or the endpoint in the \
                     store's URL"
                ),
            },
            ErrorClass::Archived => format!(
                "{place} has archived it ({said}); restore it there, or, if it is of a closure, write it anew with \
                 'omni-deploy push --rewrite', and take away the rule that archives what is below {}",
                self.url()
            ),
            ErrorClass::Unsupported => {
                format!("{place} cannot do this ({said}); use a store that has S3's conditional writes")
            }
            ErrorClass::WantsVirtualHost => match self.location.addressing {
                Addressing::Path => format!(
                    "{place} wants the bucket in the host's name ({said}); take addressing-style=path out of the \
                     store's URL"
                ),
                _ => format!(
                    "{place} wants the bucket in the host's name ({said}), which a name like '{bucket}' cannot be; \
                     use a bucket whose name is of a-z, 0-9 and '-'"
                ),
            },
            ErrorClass::MissingHeader if matches!(verb, Verb::Write) => format!(
                "{place} answers {said}, also when a checksum is sent with it; if the bucket has Object Lock, \
                 take its default retention away or use another bucket"
            ),
            ErrorClass::Denied => {
                return StoreError::Denied(format!(
                    "{what}: {place} denies it to access key {id} ({said}); allow {}",
                    verb.permission(bucket, &self.full_key(key))
                ));
            }
            _ if code.is_empty() => {
                format!("{place} answers {said} without S3's reason; check the store's endpoint")
            }
            _ => format!("{place} answers {said}; check the store's URL"),
        };
        StoreError::Refused(format!("{what}: {why}"))
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

/// What rusoto signs with.
fn signing(c: &Credentials) -> AwsCredentials {
    AwsCredentials::new(c.id.clone(), c.secret.clone(), c.token.clone(), None)
}

/// Exactly as many bytes as were promised, and what became of them.
struct ExactReader<'a> {
    inner: &'a mut dyn Read,
    left: u64,
    failed: Option<String>,
}

impl<'a> ExactReader<'a> {
    fn new(inner: &'a mut dyn Read, length: u64) -> Self {
        ExactReader { inner, left: length, failed: None }
    }
}

impl Read for ExactReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = match self.inner.read(&mut buffer[..most]) {
            // Passed on as the end, it would be waited for until the store gives up.
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} bytes fewer than promised", self.left),
            )),
            other => other,
        };
        match read {
            Ok(count) => {
                self.left -= count as u64;
                Ok(count)
            }
            Err(e) => {
                if e.kind() != io::ErrorKind::Interrupted {
                    self.failed = Some(e.to_string());
                }
                Err(e)
            }
        }
    }
}

/// A page of a listing.
#[derive(Debug, Default, PartialEq)]
struct Page {
    keys: Vec<String>,
    /// One for each key, or none where the store does not say.
    sizes: Vec<u64>,
    next: Option<String>,
}

/// Reads `ListBucketResult` (Amazon S3 API reference, ListObjectsV2). The error says what is wrong with it.
fn page(text: &str) -> Result<Page, String> {
    let mut page = Page::default();
    let (mut truncated, mut root) = (false, false);
    xml::leaves(text, |path, text| {
        root |= path[0] == "ListBucketResult";
        match path {
            ["ListBucketResult", "Contents", "Key"] => page.keys.push(text),
            ["ListBucketResult", "Contents", "Size"] => page.sizes.extend(text.trim().parse::<u64>()),
            ["ListBucketResult", "IsTruncated"] => truncated = text.trim() == "true",
            ["ListBucketResult", "NextContinuationToken"] => page.next = Some(text),
            _ => {}
        }
    })?;
    if !root {
        return Err("a document that is no listing".into());
    }
    if page.sizes.len() != page.keys.len() {
        page.sizes.clear();
    }
    match (truncated, &page.next) {
        (true, None) => Err("a part of a listing without the way to the rest".into()),
        (false, _) => Ok(Page { next: None, ..page }),
        (true, Some(_)) => Ok(page),
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
        let request =
            GetObjectRequest { if_none_match: unless.map(|e| e.0.clone()), ..self.get_request(key) };
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
        match self.object(&request, Patience::within, read) {
            Ok(got) => Ok(got),
            Err(gave_up) if gave_up.error.meaning() == Some(ErrorClass::NotModified) && unless.is_some() => {
                Ok(GetResult::NotModified)
            }
            Err(gave_up) if gave_up.error.meaning() == Some(ErrorClass::NoObject) => Ok(GetResult::Missing),
            Err(gave_up) => Err(self.told(Verb::Read, key, gave_up)),
        }
    }

    fn get_start(&self, key: &str, count: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let range = Some(format!("bytes=0-{}", count.max(1) - 1));
        let request = GetObjectRequest { range, ..self.get_request(key) };
        let read = |answer: S3Response| {
            answer.etag()?;
            // A store that knows no Range sends everything: the rest stays unread.
            Ok(answer.read(count)?.0)
        };
        match self.object(&request, Patience::within, read) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(gave_up) if gave_up.error.meaning() == Some(ErrorClass::NoObject) => Ok(None),
            // An empty object has no first byte.
            Err(gave_up) if gave_up.error.meaning() == Some(ErrorClass::NoRange) => Ok(Some(Vec::new())),
            Err(gave_up) => Err(self.told(Verb::Read, key, gave_up)),
        }
    }

    fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
        Ok(self.head(key)?.map(|head| head.size))
    }

    /// A write whose answer is lost is repeated, and the repetition of a conditional one finds its own work:
    /// [`StoreError::Changed`] may then be the echo of our own success. Who gets it and reads again must
    /// compare what is there with what was to be written before writing anew.
    fn put(&self, key: &str, bytes: &[u8], when: &Condition) -> Result<Etag, StoreError> {
        let condition = condition(when, self.wants().etags);
        let content_type =
            if key.ends_with(".json") { "application/json" } else { "application/octet-stream" };
        let gave_up = match self.put_bytes(key, content_type, bytes, condition) {
            Ok(etag) => return Ok(etag),
            Err(gave_up) => gave_up,
        };
        let changed = match gave_up.error.meaning() {
            Some(ErrorClass::ConditionFailed) => condition.is_some(),
            // The object that was to be still the same is gone (PutObject, "If-Match").
            Some(ErrorClass::NoObject) => matches!(when, Condition::IfMatch(_)),
            _ => false,
        };
        if changed {
            return Err(StoreError::Changed(format!(
                "cannot write {key} in {}: somebody else wrote it first; read it again and retry",
                self.url()
            )));
        }
        Err(self.told(Verb::Write, key, gave_up))
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        let call = |client: S3Client| {
            let request = DeleteObjectRequest {
                bucket: self.location.bucket.clone(),
                key: self.full_key(key),
                ..DeleteObjectRequest::default()
            };
            async move { client.delete_object(request).await.err().map(|e| e.to_string()) }
        };
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
        match self.typed(Patience::within, call, read) {
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
        if !self.wants().whole_listings {
            let page = self.page(prefix, Some(after).filter(|a| !a.is_empty()), None)?;
            // Some stores give their keys in no order, and some know no such beginning.
            let ordered =
                page.keys.is_sorted() && page.keys.first().is_none_or(|first| first.as_str() > after);
            if ordered {
                return Ok(Keys { keys: page.keys, more: page.next.is_some() });
            }
            self.wants.lock().unwrap_or_else(PoisonError::into_inner).whole_listings = true;
        }
        let mut keys = self.list(prefix)?;
        keys.retain(|key| key.as_str() > after);
        Ok(Keys { keys, more: false })
    }

    fn sizes(&self, prefix: &str) -> Result<BTreeMap<String, u64>, StoreError> {
        let page = self.page(prefix, None, None)?;
        Ok(page.keys.into_iter().zip(page.sizes).collect())
    }

    fn send_etags(&self, form: EtagForm) {
        self.wants.lock().unwrap_or_else(PoisonError::into_inner).etags = form;
    }
}

impl S3Store {
    /// One answer to a listing, from `token` on or else behind `after`; its keys without the prefix of the store.
    fn page(&self, prefix: &str, after: Option<&str>, token: Option<&str>) -> Result<Page, StoreError> {
        let full = self.full_key(prefix);
        let call = |client: S3Client| {
            let request = ListObjectsV2Request {
                bucket: self.location.bucket.clone(),
                prefix: Some(full.clone()).filter(|p| !p.is_empty()),
                start_after: after.map(|after| self.full_key(after)),
                continuation_token: token.map(str::to_string),
                ..ListObjectsV2Request::default()
            };
            async move { client.list_objects_v2(request).await.err().map(|e| e.to_string()) }
        };
        let read = |answer: S3Response| {
            let (bytes, whole) = answer.read(PAGE_LIMIT)?;
            if !whole {
                return Err(AttemptError::TooLarge(PAGE_LIMIT));
            }
            let text = String::from_utf8(bytes)
                .map_err(|_| AttemptError::Garbage("bytes that are no text".into()))?;
            let page = page(&text).map_err(AttemptError::Garbage)?;
            if page.next.is_some() && page.next.as_deref() == token {
                return Err(AttemptError::Garbage("the same part of a listing again and again".into()));
            }
            Ok(page)
        };
        let page = self
            .typed(Patience::within, call, read)
            .map_err(|gave_up| self.told(Verb::List, prefix, gave_up))?;
        let own = |key: &String| Some(key.strip_prefix(&self.location.prefix)?.to_string());
        let keys: Vec<String> = page.keys.iter().filter_map(own).collect();
        let sizes = if keys.len() == page.keys.len() { page.sizes } else { Vec::new() };
        Ok(Page { keys, sizes, next: page.next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreUrl;

    fn store(url: &str, vars: &'static [(&str, &str)]) -> S3Store {
        let StoreUrl::S3(location) = StoreUrl::parse(url).unwrap() else { panic!("{url} is not s3") };
        let env = move |name: &str| {
            let own =
                [("AWS_ACCESS_KEY_ID", "AKID"), ("AWS_SECRET_ACCESS_KEY", "hush"), ("HOME", "/nonexistent")];
            vars.iter().chain(&own).find(|(n, _)| *n == name).map(|(_, v)| v.to_string())
        };
        S3Store::open_in(&location, Arc::new(env)).unwrap()
    }

    fn refusal(status: u16, code: &str) -> Refusal {
        let mut headers = HeaderMap::new();
        headers.insert("date", "Sun, 22 Nov 2026 18:31:05 GMT".parse().unwrap());
        let region = (code == "PermanentRedirect").then(|| "eu-2".to_string());
        Refusal { status, code: code.into(), message: "because".into(), region, headers }
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
            assert_eq!((store.region.name(), store.place.as_str()), (region, place));
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

    #[test]
    fn every_refusal_names_the_object_the_cause_and_the_next_move() {
        let store = store("s3://bucket/p?endpoint=h:1&scheme=http", &[]);
        // Two hours after the answer's date.
        let now = Timestamp::parse("2026-11-22T20:31:05Z").unwrap();
        for (status, code, parts) in [
            (404, "NoSuchBucket", &["no bucket 'bucket'", "http://h:1", "create it"][..]),
            (403, "InvalidAccessKeyId", &["does not know the access key AKID", "AWS_SECRET_ACCESS_KEY"]),
            (403, "SignatureDoesNotMatch", &["secret key", "AKID", "correct AWS_ACCESS_KEY_ID"]),
            (403, "AccessDenied", &["denies", "AKID", "s3:PutObject", "because"]),
            (403, "InvalidObjectState", &["archived it", "push --rewrite", "s3://bucket/p"]),
            (400, "ExpiredToken", &["expired", "renew"]),
            (403, "RequestTimeTooSkewed", &["2h ahead of", "timedatectl set-ntp true"]),
            (301, "PermanentRedirect", &["region eu-2, not us-east-1", "region=eu-2"]),
            (501, "NotImplemented", &["conditional writes"]),
            (405, "", &["405", "endpoint"]),
            (409, "OperationAborted", &["OperationAborted (because) (7 tries)", "try again later"]),
            (409, "BucketNotEmpty", &["BucketNotEmpty (because)"]),
            (400, "InvalidRequest", &["InvalidRequest (because)", "Object Lock"]),
            (403, "SecondLevelDomainForbidden", &["bucket in the host's name"]),
            (503, "SlowDown", &["503 SlowDown", "(7 tries)", "try again later"]),
            (429, "", &["429", "try again later"]),
        ] {
            let error = store.refused(
                Verb::Write,
                "k",
                "cannot write k in x",
                " (7 tries)",
                &refusal(status, code),
                now,
            );
            let passing = ["OperationAborted", "SlowDown"].contains(&code) || status == 429;
            assert_eq!(matches!(error, StoreError::Denied(_)), code == "AccessDenied", "{error}");
            assert_eq!(matches!(error, StoreError::Unreachable(_)), passing, "{error}");
            let text = error.to_string();
            assert!(text.starts_with("cannot write k in x: ") && text.contains("; "), "{text}");
            assert!(parts.iter().all(|p| text.contains(p)), "{text}");
            assert!(!text.contains("hush") && !text.contains('\n'), "{text}");
        }
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

    #[test]
    fn a_listing_is_read_whole_or_not_at_all() {
        let text = |truncated: &str, token: &str| {
            format!(
                "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"x\"><Name>b</Name><Prefix>k</Prefix>\
                 <IsTruncated>{truncated}</IsTruncated>{token}<Contents><Key>k/a&amp;b</Key><Size>1</Size>\
                 <Owner><ID>Key</ID></Owner></Contents></ListBucketResult>"
            )
        };
        let token = "<NextContinuationToken>t==</NextContinuationToken>";
        let keys = vec!["k/a&b".to_string()];
        let whole = Page { keys: keys.clone(), sizes: vec![1], next: None };
        assert_eq!(page(&text("false", "")), Ok(whole));
        let part = Page { keys: keys.clone(), sizes: vec![1], next: Some("t==".into()) };
        assert_eq!(page(&text("true", token)), Ok(part));
        // Whose size is missing cannot be told.
        let end = "</ListBucketResult>";
        let without = text("false", "").replace(end, &format!("<Contents><Key>k/c</Key></Contents>{end}"));
        assert_eq!(page(&without).map(|p| (p.keys.len(), p.sizes.len())), Ok((2, 0)));
        assert!(page(&text("true", "")).is_err());
        assert!(page("<html><body>Hello</body></html>").is_err());
        assert!(page("").is_err());
    }

    #[test]
    fn a_source_gives_what_was_promised_or_fails() {
        let source = |left, text: &'static str| {
            let mut inner = text.as_bytes();
            let mut source = ExactReader { inner: &mut inner, left, failed: None };
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
