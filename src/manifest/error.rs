//! Why a document is not taken: what is wrong in it, and where.

use crate::error::Error;
use std::fmt;

/// A value that cannot be, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// `services[2].http.internalPort`; empty for the document itself.
    pub path: String,
    /// The reason with the value in it, and what is expected instead.
    pub reason: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.path, self.reason)
        }
    }
}

impl FieldError {
    pub(super) fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        FieldError { path: path.into(), reason: reason.into() }
    }

    /// As seen from what it is a part of.
    pub(super) fn below(self, above: &str) -> Self {
        let joint = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        FieldError { path: format!("{above}{joint}{}", self.path), reason: self.reason }
    }
}

/// How many mistakes of an entry are said at once: enough for a person, and few enough for a journal and a report.
pub(super) const MOST_SAID: usize = 20;

/// Why a document is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestError {
    /// It was written in this newer version of the format, which no mending here can help.
    Newer(u64),
    /// What is wrong with the first entry with which something is, or with the document; at least one.
    Mistakes(Vec<FieldError>),
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ManifestError::Newer(version) => {
                write!(f, "version: {version} was written by a newer omni-deploy; upgrade this one")
            }
            ManifestError::Mistakes(mistakes) => {
                let said: Vec<String> = mistakes.iter().take(MOST_SAID).map(FieldError::to_string).collect();
                let more = if mistakes.len() > MOST_SAID { "; and more" } else { "" };
                write!(f, "{}{more}", said.join("; also "))
            }
        }
    }
}

impl std::error::Error for ManifestError {}

impl From<FieldError> for ManifestError {
    fn from(e: FieldError) -> Self {
        ManifestError::Mistakes(vec![e])
    }
}

impl From<FieldError> for Error {
    fn from(e: FieldError) -> Self {
        Error::new(e.to_string())
    }
}

impl From<ManifestError> for Error {
    fn from(e: ManifestError) -> Self {
        Error::new(e.to_string())
    }
}

impl ManifestError {
    /// Whether the document was written in a newer format.
    pub fn is_newer_version(&self) -> bool {
        matches!(self, ManifestError::Newer(_))
    }

    pub(super) fn unless_empty(mistakes: Vec<FieldError>) -> Result<(), Self> {
        if mistakes.is_empty() { Ok(()) } else { Err(ManifestError::Mistakes(mistakes)) }
    }
}
