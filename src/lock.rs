//! One pass at a time, and one writer to a folder of secrets. The kernel holds a lock (flock) and lets go when the process ends, however it ends; the
//! file's content only says who.

use crate::clock::Timestamp;
use crate::durable;
use crate::error::{Error, Result};
use crate::hash::Sha256;
use fs_err::os::unix::fs::OpenOptionsExt;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// The folder of the locks.
pub const RUN_DIR: &str = "/run/omni-deploy";

/// Held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    file: fs_err::File,
}

impl Drop for Lock {
    /// At once: what another thread is about to run has this file as well until it runs.
    fn drop(&mut self) {
        // If it fails, the end of this process lets go.
        let _unlocked = self.file.file().unlock();
    }
}

/// What came of asking for the lock.
#[derive(Debug)]
pub enum LockResult {
    /// It is ours.
    Taken(Lock),
    /// Somebody else's; who and since when.
    Held(String),
}

/// Asks for the lock, without waiting.
pub fn take(run_dir: &Path, now: Timestamp) -> Result<LockResult> {
    durable::folder(run_dir, 0o755)?;
    let path = run_dir.join("lock");
    let mut file = opened(&path)?;
    match file.file().try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            let holder = holder.trim();
            let holder = if holder.is_empty() { "another process" } else { holder };
            return Ok(LockResult::Held(holder.into()));
        }
        Err(std::fs::TryLockError::Error(e)) => {
            return Err(Error::new(format!("cannot lock {}: {e}", path.display())));
        }
    }
    // Whose it is, is for people only: a torn line harms nothing, so this needs no durable write.
    file.set_len(0)?;
    file.rewind()?;
    write!(file, "process {} since {now}", std::process::id())?;
    Ok(LockResult::Taken(Lock { file }))
}

/// A file to lock, root's alone: whoever may open one may lock it, and keep us from working.
fn opened(path: &Path) -> std::io::Result<fs_err::File> {
    let mut options = fs_err::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Takes the lock of what root does in a folder: a file of ours, named by the folder. A lock on the folder itself would
/// be anybody's to hold who may look into it.
pub fn of_folder(folder: &Path, patience: Duration) -> Result<Lock> {
    durable::folder(Path::new(RUN_DIR), 0o755)?;
    let real = fs_err::canonicalize(folder)?;
    let name = Sha256::of(real.as_os_str().as_encoded_bytes()).short(8);
    let path = Path::new(RUN_DIR).join(format!("folder-{name}.lock"));
    let file = opened(&path)?;
    let begun = Instant::now();
    while let Err(e) = file.file().try_lock() {
        if begun.elapsed() > patience {
            return Err(Error::new(format!(
                "cannot lock {} against others who write to {}: {e}; 'fuser -v {0}' shows who has it",
                path.display(),
                folder.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Lock { file })
}

/// How often a lock that is held is asked for again.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How often a person who waits is told.
const REMIND_EVERY: Duration = Duration::from_secs(60);

/// Asks for the lock and waits until it is ours, as long as that takes: who holds it may be stopping a service that
/// is slow. `on_wait` is told who that is, at once and then every minute.
pub fn wait(run_dir: &Path, mut on_wait: impl FnMut(&str)) -> Result<Lock> {
    let mut last: Option<Instant> = None;
    loop {
        match take(run_dir, Timestamp::now())? {
            LockResult::Taken(lock) => return Ok(lock),
            LockResult::Held(who) => {
                if last.is_none_or(|last| last.elapsed() >= REMIND_EVERY) {
                    on_wait(&who);
                    last = Some(Instant::now());
                }
                std::thread::sleep(ASK_EVERY);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_asker_is_told_who_holds_it_and_since_when() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path(), Timestamp(1_795_372_265)).unwrap();
        assert!(matches!(first, LockResult::Taken(_)));
        let LockResult::Held(who) = take(dir.path(), Timestamp(0)).unwrap() else { panic!("taken twice") };
        assert_eq!(who, format!("process {} since 2026-11-22T18:31:05Z", std::process::id()));
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let waiting =
                scope.spawn(|| wait(dir.path(), |who| tell.send(who.to_string()).unwrap()).unwrap());
            assert_eq!(told.recv().unwrap(), who);
            std::thread::sleep(ASK_EVERY * 3);
            assert!(!waiting.is_finished());
            drop(first);
            waiting.join().unwrap()
        });
        assert!(told.try_recv().is_err(), "told once");
        assert!(matches!(take(dir.path(), Timestamp(0)).unwrap(), LockResult::Taken(_)));
    }
}
