//! Seeing: what the hosts report, held against the manifest. [`judge`] decides (pure), [`reports`] asks;
//! [`checks`] looks at this machine for `doctor`. Never changes anything that lasts.

pub mod checks;
pub mod domains;
pub mod hint;
pub mod judge;
pub mod reports;
