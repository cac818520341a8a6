//! Who may do what: the users' secrets, and an allow list of key prefixes for each of them.
//!
//! `s3s` checks the signatures with the secrets given here, and asks [`Access`] once a request's sender
//! is known. An operation that is not listed here is refused to everyone but a user who may do
//! everything, so that a new operation is never open by accident.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{Credentials, S3Auth, SecretKey};
use s3s::dto::{CopyObjectInput, CopySource, DeleteObjectsInput, ListObjectsInput, ListObjectsV2Input};
use s3s::{S3Request, S3Result, s3_error};
use serde::Deserialize;

/// By access key.
pub type Users = HashMap<String, User>;

#[derive(Debug)]
pub struct User {
    pub secret: String,
    pub policy: Policy,
}

#[derive(Debug)]
pub enum Policy {
    Everything,
    Prefixes(Prefixes),
}

/// Prefixes of keys, in every bucket; the empty one is a prefix of all.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefixes {
    #[serde(default)]
    read: Vec<String>,
    #[serde(default)]
    write: Vec<String>,
}

#[derive(Clone, Copy)]
enum Right {
    Read,
    Write,
}

impl Policy {
    pub fn read(file: &Path) -> Result<Self, crate::Error> {
        let error = |error: &dyn std::fmt::Display| format!("policy {}: {error}", file.display());
        let text = std::fs::read(file).map_err(|e| error(&e))?;
        let prefixes = serde_json::from_slice(&text).map_err(|e| error(&e))?;
        Ok(Self::Prefixes(prefixes))
    }

    /// `name` is a key, or the prefix of a listing.
    fn allows(&self, right: Right, name: &str) -> bool {
        match self {
            Self::Everything => true,
            Self::Prefixes(Prefixes { read, write }) => {
                let prefixes = match right {
                    Right::Read => read,
                    Right::Write => write,
                };
                prefixes.iter().any(|prefix| name.starts_with(prefix))
            }
        }
    }
}

pub struct Auth(pub Arc<Users>);

#[async_trait::async_trait]
impl S3Auth for Auth {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        match self.0.get(access_key) {
            Some(user) => Ok(SecretKey::from(user.secret.as_str())),
            None => Err(s3_error!(InvalidAccessKeyId, "no user with this access key")),
        }
    }
}

pub struct Access(pub Arc<Users>);

impl Access {
    fn policy(&self, credentials: Option<&Credentials>) -> S3Result<&Policy> {
        let Some(credentials) = credentials else {
            return Err(s3_error!(AccessDenied, "the request is not signed"));
        };
        match self.0.get(&credentials.access_key) {
            Some(user) => Ok(&user.policy),
            None => Err(s3_error!(InvalidAccessKeyId)),
        }
    }

    fn require(&self, credentials: Option<&Credentials>, right: Right, name: &str) -> S3Result<()> {
        if self.policy(credentials)?.allows(right, name) {
            return Ok(());
        }
        let verb = match right {
            Right::Read => "read",
            Right::Write => "write",
        };
        Err(s3_error!(AccessDenied, "no right to {verb} '{name}'"))
    }
}

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let user = context.credentials();
        if matches!(self.policy(user)?, Policy::Everything) {
            return Ok(());
        }
        let key = context.s3_path().get_object_key().unwrap_or_default();
        match context.s3_op().name() {
            "GetObject" | "HeadObject" => self.require(user, Right::Read, key),
            // S3 asks for the right to list the bucket here.
            "HeadBucket" | "GetBucketLocation" => self.require(user, Right::Read, ""),
            "PutObject"
            | "CopyObject"
            | "DeleteObject"
            | "CreateMultipartUpload"
            | "UploadPart"
            | "CompleteMultipartUpload"
            | "AbortMultipartUpload" => self.require(user, Right::Write, key),
            // The names that matter are in the query or the body: decided below, once they are read.
            "ListObjects" | "ListObjectsV2" | "DeleteObjects" => Ok(()),
            other => Err(s3_error!(AccessDenied, "no right to {other}")),
        }
    }

    async fn list_objects(&self, request: &mut S3Request<ListObjectsInput>) -> S3Result<()> {
        let prefix = request.input.prefix.as_deref().unwrap_or_default();
        self.require(request.credentials.as_ref(), Right::Read, prefix)
    }

    async fn list_objects_v2(&self, request: &mut S3Request<ListObjectsV2Input>) -> S3Result<()> {
        let prefix = request.input.prefix.as_deref().unwrap_or_default();
        self.require(request.credentials.as_ref(), Right::Read, prefix)
    }

    async fn delete_objects(&self, request: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        let user = request.credentials.as_ref();
        let mut objects = request.input.delete.objects.iter();
        objects.try_for_each(|object| self.require(user, Right::Write, &object.key))
    }

    async fn copy_object(&self, request: &mut S3Request<CopyObjectInput>) -> S3Result<()> {
        match &request.input.copy_source {
            CopySource::Bucket { key, .. } => self.require(request.credentials.as_ref(), Right::Read, key),
            _ => Err(s3_error!(NotImplemented)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_gives_its_own_right_and_no_other() {
        let policy =
            Policy::Prefixes(Prefixes { read: vec![String::new()], write: vec!["hosts/biz/".to_owned()] });
        assert!(policy.allows(Right::Read, "manifest.json"));
        assert!(policy.allows(Right::Write, "hosts/biz/report.json"));
        assert!(!policy.allows(Right::Write, "hosts/biz"));
        assert!(!policy.allows(Right::Write, "manifest.json"));
    }
}
