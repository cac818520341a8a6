//! The third storey: a booted systemd with Caddy, Nix and sshd, on which the product does all it promises.
//! Needs root and the packages of contrib/lab.sh, and fails without; contrib/lab.sh tells what a host is.
//! `OMNI_TEST_BINARY` names the omni-deploy to test (default: this profile's), `OMNI_TEST_S3` the S3 server,
//! `OMNI_TEST_LOAD` the load generator.

mod bucket;
mod developer;
mod hardening;
mod hostile;
#[cfg(feature = "campaign")]
mod kill;
mod lab;
mod load;
mod local_user;
mod mistakes;
#[cfg(feature = "campaign")]
mod order;
mod passes;
#[path = "../common/policy.rs"]
mod policy;
mod power;
mod returns;
mod runbook;
mod secrets;
mod solo;
mod trust;
mod units;
#[cfg(feature = "campaign")]
mod writes;
