//! A host's report as others find it: where it is in a store, how much of it is read, and that it is one.

use super::state::State;
use crate::bounds::{self, Bounds};
use crate::names::HostName;
use crate::store::{HOSTS_PREFIX, Store};

/// The largest report that is read, in bytes.
pub const MAX_REPORT: u64 = 4 << 20;

/// What a report or an answer may consist of: one of the largest size has at least so many bytes for each value, but
/// for one that was made to cost memory. Many are read at once.
pub const BOUNDS: Bounds = Bounds { values: MAX_REPORT as usize / 16, depth: 16 };

/// Where a host's report is in a store.
pub fn key(host: &HostName) -> String {
    format!("{HOSTS_PREFIX}{host}.json")
}

/// What a store has as a host's report, where it can be read and is one.
pub fn readable(store: &dyn Store, host: &HostName) -> Option<State> {
    parsed(&store.read(&key(host), MAX_REPORT).ok()??).ok()
}

/// Reads a report, which whoever writes to the store may have written.
pub fn parsed(bytes: &[u8]) -> Result<State, String> {
    bounds::check(bytes, BOUNDS)?;
    State::parse(bytes)
}
