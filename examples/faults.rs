//! The product with the points at which tests end it or make it fail (the feature `faults`, src/effect.rs).

use std::process::ExitCode;

fn main() -> ExitCode {
    omni_deploy::cmd::main()
}
