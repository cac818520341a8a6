//! omni-deploy: from a developer's machine to a running service on a plain host. See docs/ARCHITECTURE.md for
//! how one manifest flows through these modules.

pub mod bounds;
pub mod clock;
pub mod cmd;
pub mod config;
mod coredump;
pub mod deployer;
pub mod dispatch;
mod doctor;
mod durable;
pub mod error;
mod failpoint;
mod files;
pub mod hash;
mod home;
mod http;
pub mod keys;
mod lock;
pub mod log;
pub mod manifest;
pub mod names;
pub mod nix;
pub mod parallel;
mod percent;
pub mod push;
mod random;
pub mod runner;
mod secrets;
mod ssh;
pub mod status;
pub mod store;
pub mod systemd;
