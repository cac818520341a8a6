//! Reads the manifest from JSON, with the path of every mistake.

use super::model::{Manifest, Service};
use crate::error::Error;
use crate::names::HostName;
use serde_json::Value;
use std::fmt;

/// What happens to fields this version does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They are refused: input of a person.
    Strict,
    /// They are kept: what a newer version wrote.
    Tolerant,
}

/// A value that cannot be, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// `services[2].http.internalPort`; empty for the document itself.
    pub path: String,
    /// The reason with the value in it, and what is meant instead.
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

impl std::error::Error for FieldError {}

impl From<FieldError> for Error {
    fn from(e: FieldError) -> Self {
        Error::new(e.to_string())
    }
}

/// Reads and checks a whole manifest (each field, and what spans services).
pub fn manifest(_bytes: &[u8], _mode: Mode) -> Result<Manifest, FieldError> {
    todo!()
}

/// Reads and checks one service; `default_hosts` stand in when it names none.
pub fn service(
    _value: Value,
    _mode: Mode,
    _default_hosts: Option<&[HostName]>,
) -> Result<Service, FieldError> {
    todo!()
}
