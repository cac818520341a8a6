//! The manifest: what should run where. [`model`] has the types, [`parse`] reads them from JSON with the path
//! of every mistake, [`validate`] checks what spans services, [`edit`] changes and publishes a version.

pub mod command;
pub mod model;
pub mod parse;
pub mod validate;

pub use model::{
    Artifact, Change, Exec, Hardening, Health, Http, Manifest, Rollout, Service, Systemd, Target,
};
