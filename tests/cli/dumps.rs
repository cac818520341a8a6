//! What is in the memory of a process of ours stays there: no core dump, and nobody else's eyes. Needs root, to
//! be somebody else for a moment.

mod common;

use common::wait_until;
use omni_deploy::runner::{ProcessStatus, Run};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

const BIN: &str = env!("CARGO_BIN_EXE_omni-deploy");

/// `nobody` of most systems; any number would do.
const USER: &str = "65534";

fn as_user() -> Run {
    Run::new("setpriv")
        .arg(format!("--reuid={USER}"))
        .args([format!("--regid={USER}").as_str(), "--clear-groups"])
}

/// Starts a program as that user, in `dir` and with core dumps wanted, ends it as a mistake of its own would, and
/// returns the names of the files that it left there. `look` is called with its process id in between.
fn dies(dir: &Path, program: &[&str], signal: &str, look: impl FnOnce(&str)) -> Vec<String> {
    let pid_file = dir.join("pid");
    let script = "ulimit -c unlimited; echo $$ >pid.new; mv pid.new pid; exec \"$@\"";
    let run = as_user().args(["sh", "-c", script, "-"]).args(program).dir(dir).keep_end();
    let run = run.env("HOME", dir).env("OMNI_DEPLOY_HOST", "laptop").env("MARK", "hunter2");
    let died = std::thread::spawn(move || run.output().unwrap().status);
    wait_until(Duration::from_secs(30), "it has a number", || pid_file.exists());
    let pid = fs_err::read_to_string(&pid_file).unwrap().trim().to_string();
    wait_until(Duration::from_secs(30), "the program runs", || {
        let name = fs_err::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Path::new(program[0]).ends_with(name.trim())
    });
    look(&pid);
    // The first SIGSEGV only takes away the handler that Rust's own runtime has for it.
    wait_until(Duration::from_secs(30), "it dies", || {
        Run::new("kill").args([signal, &pid]).output().unwrap();
        died.is_finished()
    });
    let status = died.join().unwrap();
    assert!(matches!(status, ProcessStatus::Signal(_)), "{status}");
    fs_err::remove_file(pid_file).unwrap();
    let names = fs_err::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("core")).collect()
}

/// What another process of the same user reads of a process's environment.
fn environment_of(pid: &str) -> Result<String, String> {
    let read = as_user().args(["cat", &format!("/proc/{pid}/environ")]).output().unwrap();
    if read.status.ok() { Ok(read.text()) } else { Err(read.stderr) }
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn no_process_of_ours_leaves_a_core_dump_or_shows_its_environment() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    let program = dir.join("omni-deploy");
    fs_err::copy(BIN, &program).unwrap();
    let store = format!("--store=file://{}", dir.join("store").display());
    let program = program.to_str().unwrap();
    as_user().args([program, "manifest", "init", &store]).env("HOME", dir).success().unwrap();
    let watch = [program, "status", "--watch", &store];

    // That the kernel would, and that a user may look at what is their own, is what makes the rest worth something.
    let piped = fs_err::read_to_string("/proc/sys/kernel/core_pattern").unwrap().starts_with(['|', '/']);
    let left = dies(dir, &["/usr/bin/sleep", "60"], "-SEGV", |pid| {
        assert!(environment_of(pid).unwrap().contains("MARK=hunter2"));
    });
    assert_eq!(left.len(), usize::from(!piped), "{left:?}");
    for core in left {
        fs_err::remove_file(dir.join(core)).unwrap();
    }
    for signal in ["-SEGV", "-ABRT"] {
        let left = dies(dir, &watch, signal, |pid| {
            wait_until(Duration::from_secs(30), "it forbids dumps first of all", || {
                environment_of(pid).is_err()
            });
            assert!(environment_of(pid).unwrap_err().contains("denied"));
            let limits = fs_err::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let core = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
            let numbers: Vec<&str> = core.split_whitespace().filter(|w| w.parse::<u64>().is_ok()).collect();
            assert_eq!(numbers, ["0", "0"], "{core}");
        });
        assert_eq!(left, [""; 0], "{signal}");
    }
}
