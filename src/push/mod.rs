//! From a namespace to a published version.

pub mod namespace;
pub mod wait;
