//! Keeps what a fetch has brought from the garbage collector until the closure is whole, and so held by its service's own
//! root: whoever may use Nix's daemon can have it collect at any time, also between two groups of one closure. Roots are
//! links in a folder of their own beside the services'; no pass that ended leaves one, and the next removes what one that
//! died has left. Removes nothing but such links, and
//! flushes none of them: they are worth nothing after a power cut.

use crate::log;
use crate::names::{STORE_DIR, StorePath};
use fs_err::os::unix::fs::symlink;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The folder's name among those of the services, none of which begins with a dot.
const FOLDER: &str = ".fetch";

/// Roots of paths, until the value is dropped.
#[derive(Debug)]
pub struct TemporaryRoots {
    dir: PathBuf,
}

impl Drop for TemporaryRoots {
    fn drop(&mut self) {
        release(&self.dir);
    }
}

impl TemporaryRoots {
    /// Holds these paths, whether they are there already or still to come: Nix keeps what it is adding itself, and passes
    /// over a root that leads nowhere.
    pub fn new<'a>(gcroots: &Path, paths: impl IntoIterator<Item = &'a StorePath>) -> Self {
        let held = TemporaryRoots { dir: gcroots.join(FOLDER) };
        release(&held.dir);
        match held.hold(paths) {
            // Only root can, and a fetch of others is short.
            Err(e) if e.kind() != ErrorKind::PermissionDenied => {
                log::warning(format!("cannot keep what comes from Nix's garbage collector meanwhile: {e}"));
            }
            _ => {}
        }
        held
    }

    fn hold<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> io::Result<()> {
        fs_err::create_dir_all(&self.dir)?;
        for path in paths {
            match symlink(path.as_str(), self.dir.join(path.base())) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Lets go what a fetch that died has held.
pub fn release_left(gcroots: &Path) {
    release(&gcroots.join(FOLDER));
}

/// What cannot be removed is left to the next.
fn release(dir: &Path) {
    let Ok(links) = fs_err::read_dir(dir) else { return };
    for link in links.flatten() {
        let expected = Path::new(STORE_DIR).join(link.file_name());
        if fs_err::read_link(link.path()).is_ok_and(|target| target == expected) {
            drop(fs_err::remove_file(link.path()));
        }
    }
    // Not while somebody else's files are there.
    drop(fs_err::remove_dir(dir));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_held_until_the_fetch_ends_and_what_others_put_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = |digit: &str| StorePath::parse(&format!("/nix/store/{}-x", digit.repeat(32))).unwrap();
        let (one, two, left) = (path("1"), path("2"), path("3"));
        let links = || -> Vec<PathBuf> {
            let entries = fs_err::read_dir(dir.path().join(FOLDER)).into_iter().flatten();
            entries.map(|e| fs_err::read_link(e.unwrap().path()).unwrap_or_default()).collect()
        };
        // Of a fetch that died.
        std::mem::forget(TemporaryRoots::new(dir.path(), [&left]));
        assert_eq!(links(), [Path::new(left.as_str())]);
        let held = TemporaryRoots::new(dir.path(), [&one, &two, &one]);
        let mut now = links();
        now.sort();
        assert_eq!(now, [Path::new(one.as_str()), Path::new(two.as_str())]);
        drop(held);
        assert!(!dir.path().join(FOLDER).exists());
        std::mem::forget(TemporaryRoots::new(dir.path(), [&left]));
        release_left(dir.path());
        assert!(!dir.path().join(FOLDER).exists());
        // What is not ours.
        fs_err::create_dir(dir.path().join(FOLDER)).unwrap();
        fs_err::write(dir.path().join(FOLDER).join("theirs"), "").unwrap();
        symlink("/nix/store/elsewhere", dir.path().join(FOLDER).join("link")).unwrap();
        drop(TemporaryRoots::new(dir.path(), [&one]));
        assert_eq!(links().len(), 2);
    }
}
