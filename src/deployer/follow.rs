//! Starts the unit that makes the passes and waits for what a pass makes of a version (`deployer watch`), for somebody
//! who has just published one. It reads the state and asks systemd; it makes no pass itself and decides nothing.

use super::live::{self, DEPLOYER, LiveState, StartResult};
use super::root::Root;
use super::state::State;
use crate::clock::Timestamp;
use crate::error::Result;
use crate::runner::{Output, ProcessStatus, tail};
use crate::systemd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// How often the state is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How many of those looks come to one question to systemd.
const ASK_EVERY: u32 = 2;

/// Starts the deployer by `start`, which does not wait for it, and waits until its pass has ended, or has left a state
/// that stands: of version `serial` or a later one, with nothing left to do but to let connections end. The unit has a
/// limit of its own (TimeoutStartSec=), so this ends as well.
pub fn watch(unit_dir: &Path, serial: u64, start: impl FnOnce() -> Result<Output>) -> Result<LiveState> {
    let root = Root::system(unit_dir);
    let look = || live::look(unit_dir, Timestamp::now());
    let mut seen = written(&root);
    let started = start()?;
    if !started.status.ok() {
        let code = match started.status {
            ProcessStatus::Exit(code) => code,
            ProcessStatus::Signal(_) => -1,
        };
        let start = StartResult { code, said: tail(&started.stderr) };
        return Ok(LiveState { start: Some(start), ..look()? });
    }
    for looks in 0_u32.. {
        let now = written(&root);
        if now != seen && stands(&root, serial) {
            // Read again: what is answered is one look at everything.
            return Ok(LiveState { start: Some(StartResult::default()), ..look()? });
        }
        seen = now;
        if looks.is_multiple_of(ASK_EVERY) && !systemd::under_way(DEPLOYER)? {
            break;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let answer = look()?;
    let ended = answer.live.deployer.as_ref().filter(|unit| unit.result != "success");
    let start = ended.map_or(StartResult::default(), |unit| StartResult {
        code: 1,
        said: format!("{DEPLOYER} ended with {} ({})", unit.result, unit.exit_status),
    });
    Ok(LiveState { start: Some(start), ..answer })
}

/// Which file the state is: every pass that writes one puts a new one in place.
fn written(root: &Root) -> Option<(u64, i64, i64)> {
    fs_err::metadata(root.state_file()).ok().map(|m| (m.ino(), m.mtime(), m.mtime_nsec()))
}

/// Whether the state is what the pass under way has come to.
fn stands(root: &Root, serial: u64) -> bool {
    let state = fs_err::read(root.state_file()).ok().and_then(|bytes| State::parse(&bytes).ok());
    state.is_some_and(|s| !s.draining.is_empty() && s.serial >= Some(serial))
}
