//! Requests to a bucket: the only file that names rusoto, which signs them and does nothing else. They travel over
//! ureq. Addresses are path-style (what other people's servers understand, and what keeps TLS names right for buckets
//! with dots) unless the URL or the store wants the bucket in the host's name.

use super::answer::{AttemptError, Refusal, S3Response};
use crate::http::{HttpLimits, TransferError};
use crate::store::credentials::Credentials;
use rusoto_signature::credential::AwsCredentials;
use rusoto_signature::{ByteStream, Region, SignedRequest};
use ureq::AsSendBody;
use ureq::http::Request;

/// A request, before it is signed or after.
pub(super) struct S3Request(SignedRequest);

impl S3Request {
    /// A request without a body, to an object or to the bucket itself. `place` is `scheme://host[:port]`, `key` the
    /// whole of an object's key.
    pub(super) fn new(method: &str, place: &str, region: &str, bucket: &str, key: Option<&str>) -> Self {
        let region = Region::Custom { name: region.into(), endpoint: place.into() };
        let path = key.map_or(format!("/{bucket}"), |key| format!("/{bucket}/{key}"));
        S3Request(SignedRequest::new(method, "s3", &region, &path))
    }

    pub(super) fn headers<'a>(mut self, headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        headers.into_iter().for_each(|(name, value)| self.0.add_header(name, value));
        self
    }

    pub(super) fn query<'a>(mut self, params: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        params.into_iter().for_each(|(name, value)| self.0.add_param(name, value));
        self
    }

    /// The hash of these bytes is signed.
    pub(super) fn payload(mut self, bytes: &[u8]) -> Self {
        self.0.set_payload(Some(bytes.to_vec()));
        self
    }

    /// What the body is, nobody signs. rusoto does this for every stream.
    pub(super) fn unsigned_payload(mut self) -> Self {
        self.0.set_payload_stream(ByteStream::from(Vec::new()));
        self
    }

    /// Adds a checksum of the payload. Every store that wants one takes this one, also those older than the others.
    pub(super) fn content_md5(mut self) -> Self {
        self.0.maybe_set_content_md5_header();
        self
    }

    /// Moves the bucket from the path to the host's name (Amazon S3 user guide, "Virtual hosting of buckets").
    pub(super) fn virtual_host(mut self, bucket: &str) -> Self {
        let host = format!("{bucket}.{}", self.0.hostname());
        self.0.set_hostname(Some(host));
        if let Some(rest) = self.0.path.strip_prefix('/').and_then(|p| p.strip_prefix(bucket)) {
            self.0.path = if rest.is_empty() { "/".into() } else { rest.into() };
        }
        self
    }

    pub(super) fn sign(mut self, with: &Credentials) -> Self {
        self.0.sign(&AwsCredentials::new(with.id.clone(), with.secret.clone(), with.token.clone(), None));
        // Its copy was for the signature: many are written at a time.
        self.0.payload = None;
        self
    }

    /// Sends it, with headers that are not signed. An answer that is no success is an error.
    pub(super) fn send(
        &self,
        agent: &ureq::Agent,
        unsigned: &[(&str, &str)],
        body: impl AsSendBody,
        limits: HttpLimits,
    ) -> Result<S3Response, AttemptError> {
        let odd = |e: ureq::http::Error| AttemptError::Trouble(TransferError::Other(e.to_string()));
        let request = &self.0;
        let query = request.canonical_query_string();
        let mark = if query.is_empty() { "" } else { "?" };
        let address = format!("{}://{}{}", request.scheme(), request.hostname(), request.canonical_uri());
        let mut builder = Request::builder().method(request.method()).uri(format!("{address}{mark}{query}"));
        // The length is not signed, and the body's own affair.
        for (name, values) in request.headers().iter().filter(|(name, _)| *name != "content-length") {
            for value in values {
                builder = builder.header(name, value.as_slice());
            }
        }
        for (name, value) in unsigned {
            builder = builder.header(*name, *value);
        }
        let request = agent
            .configure_request(builder.body(body).map_err(odd)?)
            .timeout_global(limits.total)
            .timeout_recv_response(Some(limits.answer))
            .build();
        let (head, body) = agent.run(request).map_err(|e| AttemptError::Trouble(e.into()))?.into_parts();
        let answer =
            S3Response { status: head.status.as_u16(), headers: head.headers, body: body.into_reader() };
        if (200..300).contains(&answer.status) {
            return Ok(answer);
        }
        Err(AttemptError::Refusal(Box::new(Refusal::read(answer))))
    }
}
