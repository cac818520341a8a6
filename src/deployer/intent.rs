//! What a pass is about to touch, written before it does and removed when it has finished. A pass that finds
//! one knows that another was interrupted, and for which services a running process proves nothing.

use super::lines;
use super::root::Root;
use crate::durable;
use crate::error::Result;
use crate::files::if_there;
use crate::names::ServiceName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

#[derive(Serialize, Deserialize)]
struct Intent {
    services: BTreeSet<ServiceName>,
}

/// The services that an interrupted pass was about to touch. A file that cannot be read was torn by nobody
/// ([`durable::write`] replaces whole files); it is then somebody's and means nothing.
pub fn load(root: &Root) -> Result<BTreeSet<ServiceName>> {
    let bytes = if_there(fs_err::read(root.intent()))?.unwrap_or_default();
    Ok(serde_json::from_slice::<Intent>(&bytes).map(|i| i.services).unwrap_or_default())
}

/// Takes down what is about to be touched, besides what was before.
pub fn record(root: &Root, mut services: BTreeSet<ServiceName>) -> Result<()> {
    let before = load(root)?;
    if services.is_subset(&before) {
        return Ok(());
    }
    services.extend(before);
    durable::write(&root.intent(), &lines::to_bytes(&Intent { services })?, 0o644)?;
    Ok(())
}

/// The pass has finished.
pub fn clear(root: &Root) -> Result<()> {
    durable::remove(&root.intent())?;
    Ok(())
}
