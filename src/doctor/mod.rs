//! The checks of `doctor`: each looks a fact up for real and says what to do when it is not as it must be.
//! [`machine`] and [`credentials`] are for every machine, [`host`] for those that a deployer works on. Nothing is repaired here.

pub mod credentials;
pub mod domains;
pub mod host;
pub mod machine;

use crate::runner::RunError;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How a fact was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it must be.
    Ok,
    /// It works, and a person should know.
    Warn,
    /// Something will not work.
    Fail,
}

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at: `store`, `caddy admin`.
    pub name: &'static str,
    /// How it was found.
    pub verdict: Verdict,
    /// What was found, and unless it is well, what to do.
    pub text: String,
}

impl Check {
    /// It is well.
    pub fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Check { name, verdict: Verdict::Ok, text: text.into() }
    }

    /// It works, and a person should know.
    pub fn warn(name: &'static str, text: impl Into<String>) -> Self {
        Check { name, verdict: Verdict::Warn, text: text.into() }
    }

    /// Something will not work.
    pub fn fail(name: &'static str, text: impl Into<String>) -> Self {
        Check { name, verdict: Verdict::Fail, text: text.into() }
    }
}

/// Whether files can be made in a folder: makes one without a name, which is gone at once.
fn writable(dir: &Path) -> Result<(), String> {
    tempfile::tempfile_in(dir).map(drop).map_err(|e| e.to_string())
}

/// What a program's failure means for a check; the text has the remedy.
fn said(name: &'static str, error: RunError) -> Check {
    Check::fail(name, error.to_string())
}
