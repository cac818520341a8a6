//! The checks of `doctor`: each looks a fact up for real and says what to do when it is not as it must be.
//! [`machine`] and [`credentials`] are for every machine, [`host`] for those that a deployer works on. Nothing is repaired here.

pub mod credentials;
pub mod domains;
pub mod host;
pub mod machine;

use crate::deployer::live::Verdict;
use serde::Serialize;
use std::fmt::Display;
use std::path::Path;

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

/// How a fact was found, before it has its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    verdict: Verdict,
    text: String,
}

impl Finding {
    /// What was found of this.
    pub fn of(self, name: &'static str) -> Check {
        Check { name, verdict: self.verdict, text: self.text }
    }
}

fn ok(text: impl Display) -> Finding {
    Finding { verdict: Verdict::Ok, text: text.to_string() }
}

fn warn(text: impl Display) -> Finding {
    Finding { verdict: Verdict::Warn, text: text.to_string() }
}

/// Something will not work.
pub fn fail(text: impl Display) -> Finding {
    Finding { verdict: Verdict::Fail, text: text.to_string() }
}

/// Whether files can be made in a folder: makes one without a name, which is gone at once.
fn writable(dir: &Path) -> Result<(), String> {
    tempfile::tempfile_in(dir).map(drop).map_err(|e| e.to_string())
}
