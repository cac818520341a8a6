//! Checks that span services: names twice, a port or a domain and path claimed twice on one host.

use super::model::Manifest;
use super::parse::FieldError;

/// The first clash, if any.
pub fn clashes(_manifest: &Manifest) -> Result<(), FieldError> {
    todo!()
}
