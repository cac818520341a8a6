//! What an error of S3 means: one table, by the error's code, because one status stands for many things (a 409 is
//! "somebody else is writing, try again" or "this bucket is not empty", a 400 is a slow upload or a wrong header).
//! The status alone decides only where there is no code, or one that is not in the table. Pure.
//!
//! Sources, unless a row names another: Amazon S3 API reference, "Error responses" (the list of error codes), and of
//! the conditional answers its page PutObject ("If-Match", "If-None-Match").

/// What an answer that is no success comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The same request may succeed a moment later.
    Transient,
    /// Another write of this object is under way: neither written nor decided; the same request again tells.
    Conflict,
    /// The condition of the request does not hold.
    ConditionFailed,
    /// There is no such object.
    NoObject,
    /// There is no such bucket.
    NoBucket,
    /// It is still the version that was named.
    NotModified,
    /// There is no such part of the object.
    NoRange,
    /// These credentials may not do it.
    Denied,
    /// The object is where it has to be brought back from before it can be read.
    Archived,
    /// The access key is not known there.
    UnknownKey,
    /// The secret key is another.
    WrongSecret,
    /// The session token has expired.
    ExpiredToken,
    /// The session token is none.
    InvalidToken,
    /// This machine's clock is wrong.
    ClockSkew,
    /// The bucket is in another region, or has another address.
    Elsewhere,
    /// The store has no such function.
    Unsupported,
    /// Perhaps the lack of a checksum of what is written: buckets with Object Lock want one.
    MissingHeader,
    /// `Expect: 100-continue` is not understood (RFC 9110, 10.1.1).
    NoExpect,
    /// The bucket's name must be in the host's name.
    WantsVirtualHost,
    /// Something else; what the store says is all there is.
    Other,
}

use ErrorClass::*;

/// Code and meaning. A code's status is not looked at: other servers send the same codes with other ones.
const CODES: [(&str, ErrorClass); 41] = [
    ("InternalError", Transient),
    ("ServiceUnavailable", Transient),
    ("SlowDown", Transient),
    ("RequestTimeout", Transient),   // 400: the body came too slowly
    ("OperationAborted", Transient), // 409: "a conflicting conditional operation is in progress … try again"
    ("IncompleteBody", Transient),   // 400: the body was cut off on its way
    ("BadDigest", Transient),        // 400: the body arrived damaged; AWS SDK for Python, _retry.json
    ("Busy", Transient),             // 503
    ("Throttling", Transient),       // 400; AWS SDK for Python, _retry.json, as the three below
    ("ThrottlingException", Transient),
    ("RequestLimitExceeded", Transient),
    ("BandwidthLimitExceeded", Transient),
    ("TooManyRequests", Transient),
    ("ConditionalRequestConflict", Conflict), // 409; PutObject: "on a 409 failure … retry the upload"
    ("PreconditionFailed", ConditionFailed),
    ("NoSuchKey", NoObject),
    ("NoSuchBucket", NoBucket),
    ("NotModified", NotModified),
    ("InvalidRange", NoRange),
    ("AccessDenied", Denied),
    ("AccountProblem", Denied),
    ("AllAccessDisabled", Denied),
    ("InvalidObjectState", Archived), // 403; GetObject, "archived objects"
    ("InvalidAccessKeyId", UnknownKey),
    ("SignatureDoesNotMatch", WrongSecret),
    ("ExpiredToken", ExpiredToken),
    ("TokenRefreshRequired", ExpiredToken),
    ("InvalidToken", InvalidToken),
    ("RequestTimeTooSkewed", ClockSkew),
    ("PermanentRedirect", Elsewhere),
    ("Redirect", Elsewhere),
    ("TemporaryRedirect", Elsewhere),
    ("AuthorizationHeaderMalformed", Elsewhere),
    ("NotImplemented", Unsupported),
    // AWS says InvalidRequest ("Content-MD5 … is required for Put Object requests with Object Lock parameters").
    ("InvalidRequest", MissingHeader),
    ("MissingContentMD5", MissingHeader), // MinIO, cmd/api-errors.go
    // Alibaba Cloud OSS, "SecondLevelDomainForbidden": path-style addresses are refused.
    ("SecondLevelDomainForbidden", WantsVirtualHost),
    // What passes for a conflict by its status and is none.
    ("BucketNotEmpty", Other),
    ("BucketAlreadyExists", Other),
    ("InvalidBucketState", Other),
    ("RestoreAlreadyInProgress", Other),
];

/// What an answer means. `code` is empty where the answer had no document that could be read.
pub fn meaning(status: u16, code: &str) -> ErrorClass {
    if let Some((_, meaning)) = CODES.iter().find(|(known, _)| *known == code) {
        return *meaning;
    }
    match (status, code.is_empty()) {
        (304, _) => NotModified,
        (301 | 302 | 307 | 308, _) => Elsewhere,
        (403, _) => Denied,
        (408 | 429, _) => Transient,
        // RFC 9110, 15.5.10: what was asked conflicts with the present state. Only a code says that it will stay so.
        (409, true) => Conflict,
        (412, _) => ConditionFailed,
        (416, _) => NoRange,
        (417, _) => NoExpect,
        (501, _) => Unsupported,
        (505, _) => Other,
        (500.., _) => Transient,
        _ => Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_decides_and_the_status_only_where_there_is_none() {
        for (status, code, expected) in [
            (409, "ConditionalRequestConflict", Conflict),
            (409, "OperationAborted", Transient),
            (409, "", Conflict),
            (409, "BucketNotEmpty", Other),
            (409, "SomethingNew", Other),
            (412, "PreconditionFailed", ConditionFailed),
            (412, "", ConditionFailed),
            (409, "PreconditionFailed", ConditionFailed),
            (400, "RequestTimeout", Transient),
            (400, "InvalidRequest", MissingHeader),
            (400, "", Other),
            (404, "NoSuchKey", NoObject),
            (404, "NoSuchBucket", NoBucket),
            // Any server says 404; only S3 says that the object is missing.
            (404, "", Other),
            (403, "", Denied),
            (403, "RequestTimeTooSkewed", ClockSkew),
            (403, "SecondLevelDomainForbidden", WantsVirtualHost),
            (403, "SomethingNew", Denied),
            (403, "InvalidObjectState", Archived),
            (500, "SomethingNew", Transient),
            (503, "", Transient),
            (599, "", Transient),
            (501, "", Unsupported),
            (505, "", Other),
            (408, "", Transient),
            (429, "", Transient),
            (417, "", NoExpect),
        ] {
            assert_eq!(meaning(status, code), expected, "{status} {code}");
        }
    }

    #[test]
    fn a_code_has_one_meaning() {
        for (at, (code, _)) in CODES.iter().enumerate() {
            assert!(CODES[..at].iter().all(|(other, _)| other != code), "{code}");
        }
    }
}
