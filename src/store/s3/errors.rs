//! What people are told when a bucket does not do what it was asked: the object, the cause and the next move.

use super::answer::{AttemptError, Refusal};
use super::{MAX_SINGLE_PUT, S3Store};
use crate::clock::{Timestamp, human_seconds};
use crate::http::{GaveUp, TransferError};
use crate::store::codes::ErrorClass;
use crate::store::url::Addressing;
use crate::store::{Store, StoreError};

/// What is being done, for the texts of errors.
#[derive(Clone, Copy)]
pub(super) enum Verb {
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

impl S3Store {
    pub(super) fn too_large_to_write(&self, key: &str, length: u64) -> StoreError {
        StoreError::Refused(format!(
            "cannot write {key} to {}: it has {length} bytes and one PUT carries {MAX_SINGLE_PUT}; split the \
             store path's content over several, or use a cache that is not s3://",
            self.url()
        ))
    }

    /// The error of an operation, in one line.
    pub(super) fn told(&self, verb: Verb, key: &str, gave_up: GaveUp<AttemptError>) -> StoreError {
        let GaveUp { error, tries, after } = gave_up;
        let place = &self.place;
        let url = self.url();
        let object = if key.is_empty() { url } else { format!("{key} in {url}") };
        let what = format!("cannot {} {object}", verb.word());
        let tried =
            if tries > 1 { format!(" ({tries} tries in {} s)", after.as_secs()) } else { String::new() };
        match error {
            AttemptError::Credentials(why) => StoreError::Refused(format!("{what}: {why}")),
            AttemptError::TooLarge(limit) => StoreError::too_large(&object, limit),
            AttemptError::Source(why) => {
                StoreError::Unreachable(format!("{what}: its content could not be read: {why}; run it again"))
            }
            AttemptError::Garbage(how) => StoreError::Refused(format!(
                "{what}: {place} answers {how}, which is not S3; check the store's endpoint and the proxy"
            )),
            AttemptError::Refusal(refusal) => {
                let why = self.why_refused(verb, key, &refusal);
                match refusal.meaning() {
                    ErrorClass::Transient | ErrorClass::Conflict => {
                        StoreError::Unreachable(format!("{what}: {why}{tried}; try again later"))
                    }
                    ErrorClass::Denied => StoreError::Denied(format!("{what}: {why}")),
                    _ => StoreError::Refused(format!("{what}: {why}")),
                }
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
                    TransferError::Certificate(_) => {
                        "name the file with its authority's certificate in AWS_CA_BUNDLE, or correct the endpoint"
                    }
                    TransferError::Tls(_) => "check the endpoint, or add scheme=http to the store's URL",
                    TransferError::Protocol(_) => "check the endpoint and the scheme in the store's URL",
                    TransferError::Other(_) => "check the store's URL and the proxy",
                };
                let text = format!("{what}: {place}{via}: {trouble}{tried}; {remedy}");
                match trouble {
                    TransferError::Tls(_)
                    | TransferError::Certificate(_)
                    | TransferError::Expired(..)
                    | TransferError::NotYetValid(..)
                    | TransferError::Protocol(_) => StoreError::Refused(text),
                    _ => StoreError::Unreachable(text),
                }
            }
        }
    }

    /// The cause, and the next move but where that is to try again.
    fn why_refused(&self, verb: Verb, key: &str, refusal: &Refusal) -> String {
        let now = Timestamp::now();
        let place = &self.place;
        let bucket = &self.location.bucket;
        let (id, source) = match self.credentials.get(now) {
            Ok(c) => (c.id.clone(), c.source.clone()),
            Err(_) => ("unknown".into(), "the credentials' source".into()),
        };
        let said = refusal.said();
        match refusal.meaning() {
            ErrorClass::Transient | ErrorClass::Conflict => format!("{place} answers {said}"),
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
            ErrorClass::Elsewhere => match &refusal.region {
                Some(region) => format!(
                    "the bucket is in region {region}, not {}; write region={region} in the store's URL",
                    self.region
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
            ErrorClass::Denied => format!(
                "{place} denies it to access key {id} ({said}); allow {}",
                verb.permission(bucket, &self.full_key(key))
            ),
            _ if refusal.code.is_empty() => {
                format!("{place} answers {said} without S3's reason; check the store's endpoint")
            }
            _ => format!("{place} answers {said}; check the store's URL"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::tests::refusal;
    use super::super::tests::store;
    use super::*;

    #[test]
    fn every_refusal_names_the_object_the_cause_and_the_next_move() {
        let store = store("s3://bucket/p?endpoint=h:1&scheme=http", &[]);
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
            (409, "OperationAborted", &["OperationAborted (because) (7 tries in 9 s)", "try again later"]),
            (409, "BucketNotEmpty", &["BucketNotEmpty (because)"]),
            (400, "InvalidRequest", &["InvalidRequest (because)", "Object Lock"]),
            (403, "SecondLevelDomainForbidden", &["bucket in the host's name"]),
            (503, "SlowDown", &["503 SlowDown", "(7 tries in 9 s)", "try again later"]),
            (429, "", &["429", "try again later"]),
        ] {
            let error = AttemptError::Refusal(Box::new(refusal(status, code)));
            let gave_up = GaveUp { error, tries: 7, after: std::time::Duration::from_secs(9) };
            let error = store.told(Verb::Write, "k", gave_up);
            let passing = ["OperationAborted", "SlowDown"].contains(&code) || status == 429;
            assert_eq!(matches!(error, StoreError::Denied(_)), code == "AccessDenied", "{error}");
            assert_eq!(matches!(error, StoreError::Unreachable(_)), passing, "{error}");
            let text = error.to_string();
            assert!(text.starts_with("cannot write k in s3://bucket/p?") && text.contains("; "), "{text}");
            assert!(parts.iter().all(|p| text.contains(p)), "{text}");
            assert!(!text.contains("hush") && !text.contains('\n'), "{text}");
        }
    }
}
