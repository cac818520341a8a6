//! The third storey: a booted systemd with Caddy, Nix and sshd, on which the product does all it promises.
//! Needs root and the packages of tests/lab/lab.sh, which tells what a host is; so `cargo test` leaves it out:
//!
//! ```text
//! sudo tests/lab/lab.sh packages
//! cargo test --no-run --test host        # prints the program to run with sudo, as in
//! sudo target/debug/deps/host-… passes:: --test-threads 2
//! ```
//!
//! `OMNI_TEST_BINARY` names the omni-deploy to test (default: this profile's); `OMNI_TEST_S3` the S3 server and
//! `OMNI_TEST_LOAD` the load generator (default: built when first needed); `OMNI_LAB_DIR` where the hosts live.

mod admin;
mod bucket;
#[path = "../cli/common/built.rs"]
mod built;
mod developer;
mod doors;
mod early;
mod hardening;
mod hostile;
#[cfg(feature = "campaign")]
mod kill;
mod lab;
mod load;
mod loaded;
mod local_user;
mod mistakes;
#[cfg(feature = "campaign")]
mod order;
mod passes;
#[path = "../cli/common/policy.rs"]
mod policy;
mod ports;
mod power;
#[cfg(feature = "campaign")]
#[path = "../cli/common/random.rs"]
mod random;
mod returns;
mod runbook;
mod secrets;
mod seen;
mod solo;
mod stops;
mod switching;
mod trust;
mod units;
#[cfg(feature = "campaign")]
mod writes;
