//! Not written yet.

use super::Call;
use crate::error::Result;

/// Runs the command.
pub fn run(_call: &Call) -> Result<u8> {
    todo!()
}
