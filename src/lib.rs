//! omni-deploy: from a developer's machine to a running service on a plain host. See docs/ARCHITECTURE.md for
//! how one manifest flows through these modules.

pub mod bounds;
pub mod clock;
pub mod cmd;
pub mod config;
pub mod coredump;
pub mod deployer;
pub mod dispatch;
pub mod durable;
pub mod error;
pub mod failpoint;
pub mod http;
pub mod keys;
pub mod log;
pub mod manifest;
pub mod names;
pub mod nix;
pub mod parallel;
pub mod push;
pub mod runner;
pub mod secrets;
pub mod see;
pub mod ssh;
pub mod store;
