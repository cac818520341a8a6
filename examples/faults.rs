//! The product with the points at which tests end it or make it fail (the feature `faults`, src/failpoint.rs). As
//! `faults fetch PATH...` it is a host's fetch and nothing else, for which no host is needed.

use omni_deploy::config::{Flags, load};
use omni_deploy::names::StorePath;
use omni_deploy::nix;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.split_first() {
        Some((word, paths)) if word == "fetch" => fetch(paths),
        _ => omni_deploy::cmd::main(),
    }
}

fn fetch(paths: &[String]) -> ExitCode {
    let paths: Result<Vec<StorePath>, _> = paths.iter().map(|path| StorePath::parse(path)).collect();
    let settings = load(&Flags::default()).expect("settings");
    match nix::fetch(&settings, &paths.expect("paths of the store"), &std::env::temp_dir()) {
        Ok(reasons) if reasons.is_empty() => ExitCode::SUCCESS,
        failed => {
            eprintln!("{failed:?}");
            ExitCode::FAILURE
        }
    }
}
