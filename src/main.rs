//! The binary: hands its arguments over and ends with the exit code it is given.

use std::process::ExitCode;

fn main() -> ExitCode {
    omni_deploy::cmd::main()
}
