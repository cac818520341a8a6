//! The spool: a private folder between Nix and a cache, which Nix knows as a `file://` binary cache. Only this user gets
//! in (mode 0700, owner checked, no link followed on the way into it), and only one piece of work at a time (a lock in
//! it, which nobody else can open). What lies in it is a copy of something else: it may be lost or damaged at any time,
//! and whoever uses it checks again what an earlier run left. Never reads or judges what it keeps.

use crate::durable;
use crate::error::{Error, Result};
use crate::failpoint;
use crate::files::if_there;
use fs_err::os::unix::fs::OpenOptionsExt;
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What a cache says of itself that has nothing to say (Nix writes the same into a new one).
const CACHE_INFO: &str = "StoreDir: /nix/store\n";
/// Held by who uses the spool.
const LOCK: &str = "lock";
/// Names the paths that Nix is copying out of the spool ([`super::announced`]).
pub const ANNOUNCED: &str = "copying";
/// The folder of NARs.
pub const NARS: &str = "nar";
/// How many pieces of work of one kind can go on at a time, each with a folder of its own.
const PLACES: u32 = 16;

/// A spool that is ours until the value is dropped.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    lock: fs_err::File,
}

impl Drop for Spool {
    /// At once: what another thread is about to run has this file as well until it runs.
    fn drop(&mut self) {
        // Without it, closing the file does the same a moment later.
        let _unlocked = self.lock.file().unlock();
    }
}

/// Whose spools are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// This user's.
    User,
    /// This machine's: of its deployer, whoever starts that.
    Machine,
}

/// The folder of the deployer's unit for what may be lost.
const MACHINE_CACHE: &str = "/var/cache/deployer";

/// Where spools are: below `XDG_CACHE_HOME`, which the deployer's unit sets; else for root as the deployer where that has
/// it, so that a pass by hand finds what the timer's has left; else below `~/.cache`, if that home is this user's; else
/// `/var/cache/omni-deploy` for root and the folder of temporary files for others.
pub fn home(of: Of) -> PathBuf {
    home_in(of, uid(), &|name| std::env::var_os(name))
}

fn home_in(of: Of, uid: u32, env: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
    let absolute = |name: &str| {
        env(name).map(PathBuf::from).filter(|path| path.is_absolute() && path.as_os_str() != "/")
    };
    // Some sudo leaves HOME as it was: what root made there would be in its owner's way.
    let own = |path: &PathBuf| fs_err::metadata(path).is_ok_and(|meta| meta.uid() == uid);
    let cache = match (absolute("XDG_CACHE_HOME"), of, uid) {
        (Some(cache), _, _) => Some(cache),
        (None, Of::Machine, 0) => Some(MACHINE_CACHE.into()),
        (None, _, _) => absolute("HOME").filter(own).map(|home| home.join(".cache")),
    };
    match cache {
        Some(cache) => cache.join("omni-deploy"),
        None if uid == 0 => PathBuf::from("/var/cache/omni-deploy"),
        None => std::env::temp_dir().join(format!("omni-deploy-{uid}")),
    }
}

/// Empties the spools of such work that nobody is at: what a run that died left in them, and nobody goes on with.
pub fn clear_idle(home: &Path, work: &str) {
    clear_from(home, work, 0);
}

/// All but the first so many; what cannot be removed is left to the next.
fn clear_from(home: &Path, work: &str, first: usize) {
    for dir in places(home, work).skip(first).filter(|dir| dir.is_dir()) {
        if let Ok(Some(idle)) = Spool::take(&dir) {
            drop(idle.clear(|_| false));
        }
    }
}

fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The folders for such work.
fn places(home: &Path, work: &str) -> impl Iterator<Item = PathBuf> {
    (1..=PLACES).map(move |place| match place {
        1 => home.join(work),
        place => home.join(format!("{work}-{place}")),
    })
}

impl Spool {
    /// Takes the first free spool for such work (`push`, `fetch`) below `home`; what an earlier run left in it is still
    /// there, and what others left in the places behind it, which are taken only beside it, is gone. The folders are made
    /// as needed.
    pub fn open(home: &Path, work: &str) -> Result<Self> {
        private_folder(home)?;
        for (n, dir) in places(home, work).enumerate() {
            if let Some(spool) = Spool::take(&dir)? {
                clear_from(home, work, n + 1);
                return Ok(spool);
            }
        }
        Err(Error::new(format!(
            "{PLACES} processes of this user use the spools in {} already; wait for them, or end those that hang \
             ('fuser -v {0}/*/{LOCK}' shows them)",
            home.display()
        )))
    }

    /// The spools for such work that have a file of this key and that nobody uses.
    pub fn with(home: &Path, work: &str, key: &str) -> Result<Vec<Self>> {
        let mut spools = Vec::new();
        for dir in places(home, work).filter(|dir| dir.join(key).exists()) {
            private_folder(home)?;
            spools.extend(Spool::take(&dir)?);
        }
        Ok(spools)
    }

    /// The spool in this folder; None while another process uses it.
    fn take(dir: &Path) -> Result<Option<Self>> {
        private_folder(dir)?;
        let path = dir.join(LOCK);
        let lock = fs_err::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(&path)?;
        match lock.file().try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
            Err(std::fs::TryLockError::Error(e)) => {
                return Err(Error::new(format!("cannot lock {}: {e}", path.display())));
            }
        }
        // Nix inherits it: one that outlives us, when we are killed, still writes here.
        rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty()).map_err(io::Error::from)?;
        let spool = Spool { dir: dir.to_path_buf(), lock };
        private_folder(&dir.join(NARS))?;
        durable::sweep(dir)?;
        let info = dir.join("nix-cache-info");
        if fs_err::read(&info).ok().as_deref() != Some(CACHE_INFO.as_bytes()) {
            durable::write(&info, CACHE_INFO.as_bytes(), 0o600)?;
        }
        Ok(Some(spool))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of a key (`HASH.narinfo`, `nar/…`). Keys come checked: [`super::narinfo::is_nar_key`].
    pub fn file(&self, key: &str) -> PathBuf {
        self.dir.join(key)
    }

    /// The spool as Nix knows it.
    pub fn url(&self) -> String {
        format!("file://{}", super::encoded(&self.dir.to_string_lossy()))
    }

    /// The files of the spool, without its lock, its `nix-cache-info` and an announcement: keys, with sizes.
    pub fn files(&self) -> io::Result<Vec<(String, u64)>> {
        let mut files = Vec::new();
        for (dir, prefix) in [(self.dir.clone(), ""), (self.dir.join(NARS), "nar/")] {
            for entry in fs_err::read_dir(dir)? {
                let entry = entry?;
                let Ok(name) = entry.file_name().into_string() else { continue };
                let meta = entry.metadata()?;
                let own = prefix.is_empty() && [LOCK, "nix-cache-info", ANNOUNCED].contains(&name.as_str());
                if meta.is_file() && !own {
                    files.push((format!("{prefix}{name}"), meta.len()));
                }
            }
        }
        files.sort();
        Ok(files)
    }

    /// Removes a file; one that is not there is no error.
    pub fn remove(&self, key: &str) -> io::Result<()> {
        if_there(fs_err::remove_file(self.file(key))).map(drop)
    }

    /// Removes all files but those that are to be kept.
    pub fn clear(&self, keep: impl Fn(&str) -> bool) -> io::Result<()> {
        let _effect = failpoint::mark("clear", self.dir.display());
        for (key, _) in self.files()? {
            if !keep(&key) {
                self.remove(&key)?;
            }
        }
        Ok(())
    }
}

/// Makes a folder for this user alone, with those above it, or refuses one that others made or can write to.
fn private_folder(dir: &Path) -> Result<()> {
    let refused = |why: &str| {
        Error::new(format!(
            "{} {why}, and would have closures put into it; remove it, or set XDG_CACHE_HOME to a folder of this user",
            dir.display()
        ))
    };
    let made = match if_there(fs_err::symlink_metadata(dir))? {
        Some(meta) => meta,
        None => {
            if let Some(above) = dir.parent() {
                fs_err::create_dir_all(above)?;
            }
            match DirBuilder::new().mode(0o700).create(dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::new(format!(
                        "cannot make {}: {}",
                        dir.display(),
                        crate::error::io_text(&e)
                    )));
                }
                _ => fs_err::symlink_metadata(dir)?,
            }
        }
    };
    if !made.is_dir() {
        return Err(refused("is not a folder"));
    }
    if made.uid() != uid() {
        return Err(refused(&format!("belongs to another user (number {})", made.uid())));
    }
    if made.permissions().mode() & 0o077 != 0 {
        // Ours, so that nobody can have put another in its place while we look.
        fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::Run;

    fn mode(path: &Path) -> u32 {
        fs_err::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_spool_is_for_one_user_and_one_piece_of_work() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("above/cache");
        let first = Spool::open(&home, "fetch").unwrap();
        assert!([&home, first.dir(), &first.file(NARS)].iter().all(|path| mode(path) == 0o700));
        assert_eq!(mode(&first.file(LOCK)), 0o600);
        assert_eq!(fs_err::read_to_string(first.file("nix-cache-info")).unwrap(), CACHE_INFO);
        let second = Spool::open(&home, "fetch").unwrap();
        assert_ne!(first.dir(), second.dir());
        let taken = first.dir().to_path_buf();
        drop(first);
        assert_eq!(Spool::open(&home, "fetch").unwrap().dir(), taken);
        assert_ne!(Spool::open(&home, "push").unwrap().dir(), taken);
    }

    #[test]
    fn a_pass_by_hand_has_the_spool_of_the_timers_and_nobody_one_in_anothers_home() {
        let dir = tempfile::tempdir().unwrap();
        let (uid, own) = (uid(), dir.path().to_str().unwrap());
        for (of, user, vars, want) in [
            (
                Of::Machine,
                0,
                &[("XDG_CACHE_HOME", "/var/cache/deployer"), ("HOME", own)][..],
                "/var/cache/deployer",
            ),
            (Of::Machine, 0, &[("HOME", own)], "/var/cache/deployer"),
            (Of::Machine, 0, &[], "/var/cache/deployer"),
            (Of::Machine, uid.max(1), &[("XDG_CACHE_HOME", "/c")], "/c"),
            (Of::User, 0, &[("XDG_CACHE_HOME", "/c"), ("HOME", own)], "/c"),
            (Of::User, uid, &[("HOME", own)], &format!("{own}/.cache")),
            (Of::User, uid, &[("HOME", own), ("XDG_CACHE_HOME", "relative")], &format!("{own}/.cache")),
            (Of::User, 0, &[("HOME", "/")], "/var/cache"),
            (Of::User, 0, &[], "/var/cache"),
        ] {
            let env = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
            assert_eq!(
                home_in(of, user, &env),
                Path::new(want).join("omni-deploy"),
                "{of:?} {user} {vars:?}"
            );
        }
        let home = |_: &str| Some(OsString::from(own));
        let stranger = |name: &str| if name == "HOME" { home(name) } else { None };
        let theirs = home_in(Of::User, uid + 1, &stranger);
        assert!(!theirs.starts_with(own), "{}", theirs.display());
    }

    #[test]
    fn what_killed_runs_left_in_places_that_are_seldom_taken_goes() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Spool::open(dir.path(), "push").unwrap();
        let (first, second, third) = (open(), open(), open());
        let left = second.file("nar/left");
        fs_err::write(&left, "left").unwrap();
        fs_err::write(third.file("nar/used"), "used").unwrap();
        let used = third.file("nar/used");
        drop((first, second));
        let first = open();
        assert!(!left.exists() && used.exists());
        // Where nobody is at work, nothing stays; who is, keeps what is his.
        fs_err::write(first.file("nar/part"), "part").unwrap();
        let part = first.file("nar/part");
        clear_idle(dir.path(), "push");
        assert!(part.exists() && used.exists());
        drop(first);
        clear_idle(dir.path(), "push");
        clear_idle(dir.path(), "fetch");
        assert!(!part.exists() && used.exists() && !dir.path().join("fetch").exists());
    }

    #[test]
    fn a_spool_is_taken_for_as_long_as_a_program_runs_that_was_started_by_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), "push").unwrap();
        let held = Run::new("sh").args(["-c", "readlink /proc/$$/fd/*"]).output().unwrap().text();
        assert!(held.lines().any(|line| Path::new(line) == spool.file(LOCK)), "{held}");
    }

    #[test]
    fn what_an_earlier_run_left_is_there_and_can_be_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path(), "push").unwrap();
        fs_err::write(spool.file("a.narinfo"), "a").unwrap();
        fs_err::write(spool.file("nar/b"), "bb").unwrap();
        fs_err::write(spool.file(".omni-deploy-x"), "half").unwrap();
        drop(spool);
        let spool = Spool::open(dir.path(), "push").unwrap();
        assert_eq!(spool.files().unwrap(), [("a.narinfo".to_string(), 1), ("nar/b".to_string(), 2)]);
        spool.clear(|key| key.starts_with("nar/")).unwrap();
        assert_eq!(spool.files().unwrap(), [("nar/b".to_string(), 2)]);
        spool.remove("nar/b").unwrap();
        spool.remove("nar/b").unwrap();
        fs_err::write(spool.file("nar/c"), "").unwrap();
        clear_idle(dir.path(), "push");
        assert_eq!(spool.files().unwrap(), [("nar/c".to_string(), 0)], "it is in use");
        drop(spool);
        clear_idle(dir.path(), "push");
        assert_eq!(Spool::open(dir.path(), "push").unwrap().files().unwrap(), []);
        clear_idle(&dir.path().join("none"), "push");
        assert!(!dir.path().join("none").exists());
    }

    #[test]
    fn a_folder_that_others_prepared_is_refused_or_closed() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| Spool::open(dir.path(), name).map(|spool| spool.dir().to_path_buf());
        fs_err::create_dir(dir.path().join("elsewhere")).unwrap();
        fs_err::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join("linked")).unwrap();
        fs_err::write(dir.path().join("file"), "").unwrap();
        for name in ["linked", "file"] {
            let error = open(name).unwrap_err().to_string();
            assert!(error.contains("is not a folder") && error.contains(name), "{error}");
        }
        fs_err::create_dir(dir.path().join("loose")).unwrap();
        fs_err::set_permissions(dir.path().join("loose"), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(mode(&open("loose").unwrap()), 0o700);
        // Only root can make a folder of somebody else's.
        if uid() == 0 {
            let theirs = dir.path().join("theirs");
            fs_err::create_dir(&theirs).unwrap();
            std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
            assert!(open("theirs").unwrap_err().to_string().contains("another user"));
        }
        // A lock that leads elsewhere is not followed.
        fs_err::create_dir(dir.path().join("trap")).unwrap();
        fs_err::os::unix::fs::symlink(dir.path().join("victim"), dir.path().join("trap/lock")).unwrap();
        assert!(open("trap").is_err() && !dir.path().join("victim").exists());
    }
}
