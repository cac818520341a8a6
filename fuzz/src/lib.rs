//! Fuzzers of what omni-deploy reads from others and writes for others: each module has one `check`, which takes
//! any bytes and panics when a property does not hold. fuzz/fuzz_targets/ gives them to libFuzzer, fuzz/run.sh runs
//! them. Never touches a file, the network or a clock.

pub mod answers;
pub mod entries;
pub mod keys;
pub mod manifest;
pub mod narinfo;
pub mod unit;
pub mod units;
pub mod unpack;
pub mod walk;
