//! The manifest: what should run where. [`model`] defines it, with the values of its fields in [`types`]; [`parse`] reads
//! it from JSON with the path of every mistake, [`limits`] bounds what is read, [`validate`] checks what spans services.
//! [`error`] says what is wrong with one. [`edit`] is what people do to it, [`current`] is the one in force, [`publish`] writes a version, [`versions`] finds the replaced ones, [`newest`] the
//! last of them, [`diff`] compares two, [`trust`] tells what may be built on, [`seen`] remembers it, [`lineage`] tells
//! which version comes after which, [`schema`] describes the form to other programs, [`command`] splits command lines,
//! [`entry`] tells whether an entry is still the same.

mod canonical;
pub mod command;
pub mod current;
pub mod diff;
pub mod edit;
pub mod entry;
pub mod error;
pub mod json;
pub mod limits;
pub mod lineage;
pub mod model;
pub mod newest;
pub mod parse;
pub mod publish;
mod rules;
pub mod schema;
pub mod seen;
pub mod signature;
pub mod trust;
pub mod types;
pub mod validate;
pub mod versions;

pub use model::{Artifact, ArtifactPath, Change, Exec, Hardening, Health, Http, Manifest, Service, Systemd};
pub use types::{Profile, Rollout};
