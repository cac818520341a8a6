//! Who may do what: the users' secrets, and for each of them an IAM policy as AWS has them (IAM user guide, "IAM
//! JSON policy elements"): statements that allow actions on resources, both with `*` and `?`. Denials and
//! conditions are not understood, so a policy that has any is refused.
//!
//! `s3s` checks the signatures with the secrets given here, and asks [`Access`] once a request's sender
//! is known. An operation that is not listed here is refused to everyone but a user who may do
//! everything, so that a new operation is never open by accident.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{Credentials, S3Auth, SecretKey};
use s3s::dto::{CopyObjectInput, CopySource, DeleteObjectsInput};
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
    Allows(Vec<Statement>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct Document {
    #[serde(rename = "Version")]
    _version: Version,
    statement: Vec<Statement>,
}

#[derive(Debug, Deserialize)]
enum Version {
    #[serde(rename = "2012-10-17")]
    Current,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
pub struct Statement {
    #[serde(default, rename = "Sid")]
    _sid: Option<String>,
    #[serde(rename = "Effect")]
    _effect: Effect,
    action: Patterns,
    resource: Patterns,
}

#[derive(Debug, Deserialize)]
enum Effect {
    Allow,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Patterns {
    One(String),
    Many(Vec<String>),
}

impl Patterns {
    fn cover(&self, text: &str) -> bool {
        match self {
            Self::One(pattern) => matches(pattern.as_bytes(), text.as_bytes()),
            Self::Many(patterns) => patterns.iter().any(|p| matches(p.as_bytes(), text.as_bytes())),
        }
    }
}

/// `*` stands for any number of characters, `/` among them, `?` for one.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, _) => text.is_empty(),
        (Some((b'*', rest)), _) => (0..=text.len()).any(|n| matches(rest, &text[n..])),
        (Some((p, rest)), Some((t, text))) => (*p == b'?' || p == t) && matches(rest, text),
        (Some(_), None) => false,
    }
}

impl Policy {
    pub fn read(file: &Path) -> Result<Self, crate::Error> {
        let error = |error: &dyn std::fmt::Display| format!("policy {}: {error}", file.display());
        let text = std::fs::read(file).map_err(|e| error(&e))?;
        let document: Document = serde_json::from_slice(&text).map_err(|e| error(&e))?;
        Ok(Self::Allows(document.statement))
    }

    /// `resource` is `BUCKET` or `BUCKET/KEY`.
    fn allows(&self, action: &str, resource: &str) -> bool {
        match self {
            Self::Everything => true,
            Self::Allows(statements) => {
                let resource = format!("arn:aws:s3:::{resource}");
                statements.iter().any(|s| s.action.cover(action) && s.resource.cover(&resource))
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

/// The users, and the folder of the buckets: what is missing is shown as missing only to who may list.
pub struct Access {
    pub users: Arc<Users>,
    pub root: PathBuf,
}

impl Access {
    fn policy(&self, credentials: Option<&Credentials>) -> S3Result<&Policy> {
        let Some(credentials) = credentials else {
            return Err(s3_error!(AccessDenied, "the request is not signed"));
        };
        match self.users.get(&credentials.access_key) {
            Some(user) => Ok(&user.policy),
            None => Err(s3_error!(InvalidAccessKeyId)),
        }
    }

    fn require(&self, credentials: Option<&Credentials>, action: &str, resource: &str) -> S3Result<()> {
        if self.policy(credentials)?.allows(action, resource) {
            return Ok(());
        }
        Err(s3_error!(AccessDenied, "no policy allows {action} on arn:aws:s3:::{resource}"))
    }
}

#[async_trait::async_trait]
impl S3Access for Access {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let user = context.credentials();
        if matches!(self.policy(user)?, Policy::Everything) {
            return Ok(());
        }
        let bucket = context.s3_path().get_bucket_name().unwrap_or_default();
        let key = context.s3_path().get_object_key().unwrap_or_default();
        let object = format!("{bucket}/{key}");
        match context.s3_op().name() {
            "GetObject" | "HeadObject" => {
                self.require(user, "s3:GetObject", &object)?;
                // Amazon S3 API reference, GetObject, "Permissions".
                match self.root.join(&object).is_file() {
                    true => Ok(()),
                    false => self.require(user, "s3:ListBucket", bucket),
                }
            }
            "HeadBucket" | "ListObjects" | "ListObjectsV2" => self.require(user, "s3:ListBucket", bucket),
            "GetBucketLocation" => self.require(user, "s3:GetBucketLocation", bucket),
            "PutObject" | "CopyObject" => {
                self.require(user, "s3:PutObject", &object)?;
                // Amazon S3 user guide, "How to prevent object overwrites with conditional writes".
                match context.headers().contains_key("if-match") {
                    true => self.require(user, "s3:GetObject", &object),
                    false => Ok(()),
                }
            }
            "CreateMultipartUpload" | "UploadPart" | "CompleteMultipartUpload" => {
                self.require(user, "s3:PutObject", &object)
            }
            "AbortMultipartUpload" => self.require(user, "s3:AbortMultipartUpload", &object),
            "DeleteObject" => self.require(user, "s3:DeleteObject", &object),
            // The names that matter are in the body: decided below, once it is read.
            "DeleteObjects" => Ok(()),
            other => Err(s3_error!(AccessDenied, "no right to {other}")),
        }
    }

    async fn delete_objects(&self, request: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        let user = request.credentials.as_ref();
        let bucket = &request.input.bucket;
        let mut objects = request.input.delete.objects.iter();
        objects.try_for_each(|o| self.require(user, "s3:DeleteObject", &format!("{bucket}/{}", o.key)))
    }

    async fn copy_object(&self, request: &mut S3Request<CopyObjectInput>) -> S3Result<()> {
        match &request.input.copy_source {
            CopySource::Bucket { bucket, key, .. } => {
                self.require(request.credentials.as_ref(), "s3:GetObject", &format!("{bucket}/{key}"))
            }
            _ => Err(s3_error!(NotImplemented)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_gives_its_actions_on_its_resources_and_no_other() {
        let document: Document = serde_json::from_str(
            r#"{"Version": "2012-10-17", "Statement": [
                {"Effect": "Allow", "Action": "s3:Get*", "Resource": "arn:aws:s3:::box/*"},
                {"Sid": "x", "Effect": "Allow", "Action": ["s3:PutObject"],
                 "Resource": ["arn:aws:s3:::box/hosts/b?z.json", "arn:aws:s3:::box/*.narinfo"]}]}"#,
        )
        .unwrap();
        let policy = Policy::Allows(document.statement);
        for (action, resource, allowed) in [
            ("s3:GetObject", "box/a/b", true),
            ("s3:GetObject", "box", false),
            ("s3:GetObject", "other/a", false),
            ("s3:PutObject", "box/hosts/biz.json", true),
            ("s3:PutObject", "box/hosts/biz.json2", false),
            ("s3:PutObject", "box/hosts/bz.json", false),
            ("s3:PutObject", "box/x.narinfo", true),
            ("s3:PutObject", "box/manifest.json", false),
            ("s3:ListBucket", "box", false),
        ] {
            assert_eq!(policy.allows(action, resource), allowed, "{action} {resource}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let allow = r#""Effect": "Allow", "Action": "s3:*", "Resource": "*""#;
        for statement in [
            r#""Effect": "Deny", "Action": "s3:*", "Resource": "*""#.to_owned(),
            format!(r#"{allow}, "Condition": {{}}"#),
            format!(r#"{allow}, "NotAction": "s3:PutObject""#),
        ] {
            let text = format!(r#"{{"Version": "2012-10-17", "Statement": [{{{statement}}}]}}"#);
            assert!(serde_json::from_str::<Document>(&text).is_err(), "{statement}");
        }
        assert!(serde_json::from_str::<Document>(r#"{"Version": "2008-10-17", "Statement": []}"#).is_err());
    }
}
