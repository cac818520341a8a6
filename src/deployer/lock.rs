//! The lock of a pass. The kernel holds it (flock) and lets go when the process ends, however it ends, and
//! knows who that is: nothing is written, because most passes have nothing to do and shall not wake the disk.

use super::root::Root;
use crate::clock::Timestamp;
use crate::durable;
use crate::error::{Error, Result};
use std::os::unix::fs::MetadataExt;

/// Held while a pass runs.
#[derive(Debug)]
pub struct Lock {
    _file: fs_err::File,
}

/// What came of asking for the lock.
#[derive(Debug)]
pub enum Asked {
    /// It is ours.
    Taken(Lock),
    /// Somebody else's; who and since when.
    Held(String),
}

/// Asks for the lock, without waiting.
pub fn take(root: &Root, now: Timestamp) -> Result<Asked> {
    durable::folder(&root.state_dir, 0o755)?;
    let path = root.lock();
    let file = fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    match file.file().try_lock() {
        Ok(()) => Ok(Asked::Taken(Lock { _file: file })),
        Err(std::fs::TryLockError::WouldBlock) => {
            let who = holder(file.metadata()?.ino(), now);
            Ok(Asked::Held(who.unwrap_or_else(|| "another process".into())))
        }
        Err(std::fs::TryLockError::Error(e)) => {
            Err(Error::new(format!("cannot lock {}: {e}", path.display())))
        }
    }
}

/// The process that holds a lock on this inode, and since when it runs; None if it ended meanwhile. Formats:
/// proc_locks(5), proc_pid_stat(5), proc_uptime(5). The device is not compared: on overlays and btrfs the
/// kernel's table names another than stat(2) does.
fn holder(inode: u64, now: Timestamp) -> Option<String> {
    let locks = fs_err::read_to_string("/proc/locks").ok()?;
    let pid: u32 = locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ours = words.get(1) == Some(&"FLOCK") && words.get(5)?.rsplit(':').next()?.parse() == Ok(inode);
        ours.then(|| words.get(4)?.parse().ok()).flatten()
    })?;
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name, which may hold anything; the 22nd counts hundredths of a second.
    let started: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let uptime = fs_err::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let since = Timestamp(now.0 - (uptime - started / 100.0) as i64);
    Some(format!("process {pid} since {since}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_it_again_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut root = Root::system(dir.path());
        root.state_dir = dir.path().to_path_buf();
        let times = || fs_err::metadata(root.lock()).map(|m| (m.mtime(), m.mtime_nsec(), m.size())).unwrap();
        drop(take(&root, Timestamp(0)).unwrap());
        let before = times();
        drop(take(&root, Timestamp(0)).unwrap());
        assert_eq!((times(), before.2), (before, 0));
    }

    #[test]
    fn the_second_asker_is_told_who_holds_it_and_since_when() {
        let dir = tempfile::tempdir().unwrap();
        let mut root = Root::system(dir.path());
        root.state_dir = dir.path().to_path_buf();
        let begun = Timestamp::now();
        let first = take(&root, begun).unwrap();
        assert!(matches!(first, Asked::Taken(_)));
        let Asked::Held(who) = take(&root, Timestamp::now()).unwrap() else { panic!("taken twice") };
        let since = who.strip_prefix(&format!("process {} since ", std::process::id()));
        let since = since.and_then(Timestamp::parse).unwrap_or_else(|| panic!("{who}"));
        assert!((begun.0 - 3600..=begun.0 + 1).contains(&since.0), "{who}, begun {begun}");
        drop(first);
        assert!(matches!(take(&root, Timestamp(0)).unwrap(), Asked::Taken(_)));
    }
}
