//! omni-deploy: from a developer's machine to a running service on a plain host. See docs/ARCHITECTURE.md for
//! how one manifest flows through these modules.

pub mod bounds;
pub mod clock;
pub mod cmd;
pub mod config;
pub mod coredump;
pub mod deployer;
pub mod dispatch;
pub mod doctor;
pub mod durable;
pub mod error;
pub mod failpoint;
pub mod files;
pub mod hash;
pub mod http;
pub mod keys;
pub mod log;
pub mod manifest;
pub mod names;
pub mod nix;
pub mod parallel;
pub mod percent;
pub mod push;
pub mod random;
pub mod runner;
pub mod secrets;
pub mod ssh;
pub mod status;
pub mod store;
pub mod systemd;
