//! What happens to a request before and after the S3 service: the faults, the conditions on reads,
//! which `s3s-fs` does not know, and the log.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use hyper::body::Incoming;
use hyper::header::{
    CACHE_CONTROL, CONTENT_TYPE, ETAG, EXPECT, EXPIRES, HOST, HeaderMap, HeaderName, HeaderValue, IF_MATCH,
    IF_NONE_MATCH, LAST_MODIFIED, VARY,
};
use hyper::{Method, Request, Response, StatusCode};
use s3s::service::S3Service;
use s3s::{Body, HttpError, HttpResponse, S3Error, S3ErrorCode, s3_error};

use crate::body::{cut, drain, lend};
use crate::faults::{Control, Fate, Likeness};

/// The status in the log of a request that got no answer.
const NO_ANSWER: u16 = 0;

pub struct Front {
    service: S3Service,
    control: Arc<Control>,
    log: Option<Mutex<File>>,
    /// The server's own name: a bucket may stand before it.
    domain: Option<String>,
}

impl Front {
    pub fn new(
        service: S3Service,
        control: Arc<Control>,
        log: Option<&Path>,
        domain: Option<String>,
    ) -> Result<Self, crate::Error> {
        Ok(Self { service, control, log: log.map(appended).transpose()?.map(Mutex::new), domain })
    }

    /// Answers one request. An error makes hyper close the connection without an answer.
    pub async fn handle(&self, request: Request<Incoming>) -> Result<HttpResponse, HttpError> {
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let result = self.answer(request).await;
        // Written before the answer is sent: who has the answer finds its line.
        let status = match &result {
            Ok(response) => response.status().as_u16(),
            Err(_) => NO_ANSWER,
        };
        self.record(&method, &path, status);
        result
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<HttpResponse, HttpError> {
        let in_host = self.has_bucket_in_host(&request);
        let key = match in_host {
            true => key_of(&format!("/bucket{}", request.uri().path())),
            false => key_of(request.uri().path()),
        };
        let (delay, fate) = match self.control.decide(request.method().as_str(), &key) {
            Ok(decision) => decision,
            Err(message) => {
                eprintln!("omni-test-s3: {message}");
                return refuse(S3Error::with_message(S3ErrorCode::InternalError, message));
            }
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let has = |name: &str| request.headers().keys().any(|header| header.as_str().starts_with(name));
        let likeness = Likeness {
            path_style: !in_host,
            expects: has("expect"),
            write_without_checksum: request.method() == Method::PUT
                && !has("content-md5")
                && !has("x-amz-checksum-"),
        };
        let fate = match self.control.refuses(&likeness) {
            Some((status, code)) if fate == Fate::Serve => Fate::Fail { status, code: code.to_owned() },
            _ => fate,
        };
        match fate {
            Fate::Serve => self.serve(request).await,
            Fate::Cut { bytes } => {
                let response = self.serve(request).await?;
                let (head, body) = response.into_parts();
                Ok(Response::from_parts(head, cut(body, bytes)))
            }
            Fate::ResetAfter => {
                self.serve(request).await?;
                Err(HttpError::new("the control file asks for a reset".into()))
            }
            Fate::ResetBefore => Err(HttpError::new("the control file asks for a reset".into())),
            Fate::Fail { status, code } => {
                // A client that waits for 100 Continue has sent no body yet.
                if !request.headers().contains_key(EXPECT) {
                    drain(request.into_body()).await;
                }
                let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                if code.is_empty() {
                    let mut response = Response::new(Body::empty());
                    *response.status_mut() = status;
                    return Ok(response);
                }
                let code = S3ErrorCode::from_bytes(code.as_bytes());
                let mut error = S3Error::with_message(
                    code.unwrap_or(S3ErrorCode::InternalError),
                    "the control file asks for this error",
                );
                error.set_status_code(status);
                refuse(error)
            }
            Fate::Garbage => {
                drain(request.into_body()).await;
                let page = "<!DOCTYPE html><html><body><h1>Welcome & log in<br></body>";
                let mut response = Response::new(Body::from(page.to_owned()));
                let html = HeaderValue::from_static("text/html");
                response.headers_mut().insert(CONTENT_TYPE, html);
                Ok(response)
            }
        }
    }

    fn has_bucket_in_host(&self, request: &Request<Incoming>) -> bool {
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let host = host.split(':').next().unwrap_or_default();
        self.domain.as_ref().is_some_and(|domain| {
            host.strip_suffix(domain.as_str()).is_some_and(|bucket| bucket.ends_with('.'))
        })
    }

    async fn serve(&self, request: Request<Incoming>) -> Result<HttpResponse, HttpError> {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        let conditions = request.headers().clone();
        // A client that waits for 100 Continue has sent no body yet, and shall be spared it.
        let waits = request.headers().contains_key(EXPECT);
        let (head, body) = request.into_parts();
        let (body, mut unread) = lend(body);
        let response = self.service.call(Request::from_parts(head, body)).await?;
        if let Ok(body) = unread.try_recv()
            && !waits
        {
            drain(body).await;
        }
        if reads && response.status().is_success() {
            return condition(response, &conditions);
        }
        Ok(response)
    }

    fn record(&self, method: &Method, path: &str, status: u16) {
        let Some(log) = &self.log else { return };
        let line = format!("{method} {path} {status:03}\n");
        let mut file = log.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(error) = file.write_all(line.as_bytes()) {
            eprintln!("omni-test-s3: log: {error}");
        }
    }
}

/// A file to which lines are added.
pub fn appended(path: &Path) -> Result<File, crate::Error> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map_err(|error| format!("log {}: {error}", path.display()).into())
}

/// The key in `/BUCKET/KEY`; empty for a bucket.
fn key_of(path: &str) -> String {
    let key = path.trim_start_matches('/').split_once('/');
    let key = key.map_or("", |(_, key)| key);
    match urlencoding::decode(key) {
        Ok(key) => key.into_owned(),
        Err(_) => key.to_owned(),
    }
}

fn refuse(error: S3Error) -> Result<HttpResponse, HttpError> {
    let response = error.to_http_response();
    response.map_err(|error| HttpError::new(Box::new(error)))
}

/// Applies a read's If-Match and If-None-Match to the answer it would get (RFC 9110, section 13).
fn condition(response: HttpResponse, asked: &HeaderMap) -> Result<HttpResponse, HttpError> {
    let Some(etag) = response.headers().get(ETAG) else {
        return Ok(response);
    };
    let names = |header: HeaderName| {
        let value = asked.get(header)?;
        Some(lists(value.to_str().ok()?, etag.to_str().ok()?))
    };
    if names(IF_MATCH) == Some(false) {
        return refuse(s3_error!(PreconditionFailed, "the object has another ETag"));
    }
    if names(IF_NONE_MATCH) != Some(true) {
        return Ok(response);
    }
    let mut unchanged = Response::new(Body::empty());
    *unchanged.status_mut() = StatusCode::NOT_MODIFIED;
    for name in [ETAG, LAST_MODIFIED, CACHE_CONTROL, EXPIRES, VARY] {
        if let Some(value) = response.headers().get(&name) {
            unchanged.headers_mut().insert(name, value.clone());
        }
    }
    Ok(unchanged)
}

/// Whether a condition names this ETag. S3's clients also send it without quotes.
fn lists(condition: &str, etag: &str) -> bool {
    let bare = |tag: &str| {
        let tag = tag.trim();
        tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"').to_owned()
    };
    condition.split(',').any(|tag| tag.trim() == "*" || bare(tag) == bare(etag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_decoded_and_a_bucket_has_none() {
        assert_eq!(key_of("/b/a%2Bc/d"), "a+c/d");
        assert_eq!(key_of("/b/"), "");
        assert_eq!(key_of("/b"), "");
        assert_eq!(key_of("/"), "");
    }

    #[test]
    fn a_condition_may_be_a_star_a_list_or_unquoted() {
        for condition in ["*", "\"x\"", "W/\"x\"", "x", "\"a\", \"x\""] {
            assert!(lists(condition, "\"x\""), "{condition}");
        }
        assert!(!lists("\"y\"", "\"x\""));
    }
}
