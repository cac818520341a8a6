//! Not written yet.

use super::Call;
use crate::error::Result;

/// Runs the command.
pub fn run(_call: &Call, _live: bool) -> Result<u8> {
    todo!()
}
