//! No memory of ours ends on a disk: what signs, reads credentials or carries secrets leaves no core dump, and no
//! other process of the same user can look into it.

use crate::log;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Forbids core dumps of this process, also those that the kernel pipes to a program, for which the limit alone
/// does not count (core(5)). `/proc/PID/environ` and the like are root's from here on (prctl(2)). The limit
/// reaches the programs we start, an editor with secrets among them.
pub fn forbid() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    for (what, done) in [
        ("limit", setrlimit(Resource::Core, none)),
        ("switch", set_dumpable_behavior(DumpableBehavior::NotDumpable)),
    ] {
        if let Err(e) = done {
            log::warning(format!("core dumps of this process cannot be forbidden (the {what}): {e}"));
        }
    }
}
