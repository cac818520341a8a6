//! Programs of the tests' own, each a crate of its own below tests/: built when first asked for, unless a variable
//! names one that is built already.

#![allow(dead_code, reason = "every test program uses a part of it")]

use omni_deploy::runner::Run;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

/// The S3 server, `OMNI_TEST_S3`.
pub static S3_SERVER: LazyLock<PathBuf> =
    LazyLock::new(|| program("OMNI_TEST_S3", "tests/s3-server", "omni-test-s3"));

/// The load generator, `OMNI_TEST_LOAD`.
pub static LOAD: LazyLock<PathBuf> =
    LazyLock::new(|| program("OMNI_TEST_LOAD", "tests/load", "omni-test-load"));

fn program(variable: &str, folder: &str, name: &str) -> PathBuf {
    if let Some(named) = std::env::var_os(variable) {
        return named.into();
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let target = folder.join("target");
    // Cargo's own lock on the folder keeps test programs that run side by side apart.
    let build = cargo(&["build", "--quiet", "--locked", "--target-dir"]).arg(&target).dir(&folder);
    build.success().unwrap_or_else(|e| panic!("{name} is needed, or {variable} that names it: {e}"));
    target.join("debug").join(name)
}

/// Cargo, without what it tells the tests it runs, at which build scripts would think that everything has changed.
pub fn cargo(words: &[&str]) -> Run {
    // With RUSTC_BOOTSTRAP they are run in random order, and nothing is built otherwise.
    let told = [
        "RUSTC_BOOTSTRAP",
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_EXE_",
        "CARGO_CRATE_NAME",
        "LD_LIBRARY_PATH",
    ];
    let program = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut run = Run::new(program).args(words).deadline(Duration::from_secs(1800));
    for (name, _) in std::env::vars().filter(|(name, _)| told.iter().any(|t| name.starts_with(t))) {
        run = run.without_env(&name);
    }
    run
}
