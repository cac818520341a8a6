//! Seeing: what the hosts report, held against the manifest. [`judge`] decides (pure), [`reports`] asks. Never
//! changes anything anywhere.

pub mod judge;
pub mod reports;
