//! What the hosts report, held against the manifest: [`judge`] decides (pure), `reports` asks, `hint` turns a host's
//! advice into what is typed on the reader's machine. Never changes anything that lasts.

pub(crate) mod hint;
pub mod judge;
pub(crate) mod reports;
