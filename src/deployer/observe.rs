//! What is: looks at units, links, store paths, roots, secrets and Caddy. Reads only. A pass that has nothing
//! to do costs one `systemctl list-units`, one request to Caddy, and a few file reads a service.

use super::caddy;
use super::listeners::{Answers, Listeners};
use super::plan::{Observed, UnitFile, UnitSeen};
use super::root::Root;
use super::systemd::{self, UNIT_PATH};
use super::unit;
use crate::error::Result;
use crate::manifest::Service;
use crate::names::{ServiceName, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread::ScopedJoinHandle;

/// Looks at everything that concerns these services and whatever else is ours.
pub fn observe(
    root: &Root,
    caddy_admin: &str,
    desired: &[&Service],
    applied: &BTreeMap<ServiceName, super::plan::Applied>,
) -> Result<Observed> {
    let mut present = BTreeSet::new();
    let mut unproved = BTreeSet::new();
    let proved: BTreeSet<&StorePath> =
        applied.values().flat_map(|a| [&a.path].into_iter().chain(&a.previous)).collect();
    for path in desired.iter().filter_map(|s| s.artifact.store_path.path()).chain(proved.iter().copied()) {
        if !present.contains(path) && is_there(path)? {
            present.insert(path.clone());
            if !proved.contains(path) {
                unproved.insert(path.clone());
            }
        }
    }
    // Nix unpacks in place and registers at the end: a copy that was cut off leaves half a path behind. Whether
    // one is whole is only asked of what never ran here, so that an idle pass starts no program for it. Where
    // Nix cannot be asked, fetching will say so.
    if !unproved.is_empty() {
        let halves = crate::nix::missing(&unproved.iter().cloned().collect::<Vec<_>>());
        for path in halves.unwrap_or_else(|_| unproved.into_iter().collect()) {
            present.remove(&path);
        }
    }
    let mut secrets = BTreeMap::new();
    for service in desired {
        if service.secret_files().next().is_some() {
            secrets.insert(service.name.clone(), secrets_of(service));
        }
    }
    std::thread::scope(|scope| {
        // Caddy answers while files are read. The thread only waits: what it allocated would be taken from the
        // kernel page by page.
        let caddy = scope.spawn(|| caddy::ask(caddy_admin));
        let (units, active) = units(root, desired, applied)?;
        let (roots, understudies) = (roots(root)?, understudies(root)?);
        let ports = ports(desired, applied);
        let caddy = caddy::read(caddy_admin, joined(caddy));
        Ok(Observed { units, active, ports, present, roots, secrets, understudies, caddy })
    })
}

/// Whether a store path is on the disk, whole or not.
fn is_there(path: &StorePath) -> Result<bool> {
    match fs_err::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// The units in question (files, boot links and what systemd says), and the names of all active units.
pub fn units(
    root: &Root,
    desired: &[&Service],
    applied: &BTreeMap<ServiceName, super::plan::Applied>,
) -> Result<(BTreeMap<ServiceName, UnitSeen>, BTreeSet<String>)> {
    // So does systemd.
    let (listed, marked) = std::thread::scope(|scope| {
        let listed = scope.spawn(systemd::list_units);
        let marked = marked(&root.unit_dir, ".service");
        (joined(listed), marked)
    });
    let mut listed = listed?;
    let active = listed.iter().filter(|(_, l)| l.active == "active").map(|(unit, _)| unit.clone()).collect();
    let mut units: BTreeMap<ServiceName, UnitSeen> = BTreeMap::new();
    for (name, text) in marked? {
        units.insert(name, UnitSeen { file: UnitFile::Ours(text), ..UnitSeen::default() });
    }
    let mut without: BTreeSet<&ServiceName> = desired.iter().map(|s| &s.name).chain(applied.keys()).collect();
    without.retain(|name| !units.contains_key(*name));
    if !without.is_empty() {
        let folders: Vec<(&Path, BTreeSet<OsString>)> = [root.unit_dir.as_path()]
            .into_iter()
            .chain(UNIT_PATH.iter().map(Path::new))
            .map(|dir| Ok((dir, names_in(dir)?)))
            .collect::<Result<_>>()?;
        for name in without {
            let file = foreign(&folders, name, applied.contains_key(name))?;
            units.insert(name.clone(), UnitSeen { file, ..UnitSeen::default() });
        }
    }
    let mut older: Vec<ServiceName> = Vec::new();
    let wants = root.wants_dir();
    let links = names_in(&wants)?;
    for (name, seen) in &mut units {
        let unit = name.unit();
        seen.listed = listed.remove(&unit).unwrap_or_default();
        let leads_to_it = |target: PathBuf| {
            let (target, file) = (wants.join(target), root.unit(name));
            // As we make it, to the file that was just read: nothing more to ask.
            (target == file && matches!(seen.file, UnitFile::Ours(_))) || same_file(&target, &file)
        };
        seen.wanted =
            links.contains(OsStr::new(&unit)) && fs_err::read_link(wants.join(&unit)).is_ok_and(leads_to_it);
        // Without a copy in memory, or with a mask there: rare, and only then are the other folders looked into.
        let read = seen.listed.load == "loaded";
        seen.unread = seen.listed.running() && !read;
        if matches!(seen.file, UnitFile::Ours(_)) && !(seen.listed.running() && read) {
            seen.shadowed = !strays(root, name).is_empty();
        }
        if let (true, Some(started)) = (seen.listed.running(), started(name)) {
            seen.current = placed(&root.unit(name)).is_some_and(|written| written <= started);
            if !seen.current {
                older.push(name.clone());
            }
        }
    }
    // Rare: only units whose file is newer than their process are looked into.
    let shown = systemd::show(&older.iter().map(ServiceName::unit).collect::<Vec<_>>())?;
    for name in older {
        if let (Some(seen), Some(shown)) = (units.get_mut(&name), shown.get(&name.unit()))
            && let UnitFile::Ours(text) = &seen.file
        {
            seen.astray = runs_another(shown.main_pid, text);
            seen.unread |= shown.unread || another_closure(&shown.command, text);
        }
    }
    for service in desired {
        if service.secret_files().next().is_some()
            && let Some(seen) = units.get_mut(&service.name)
            && seen.listed.running()
            && let Some(started) = started(&service.name)
        {
            seen.secrets_changed =
                service.secret_files().filter_map(changed).any(|changed| changed > started);
        }
    }
    Ok((units, active))
}

/// Who would answer at the ports of these services: where they should listen, and where they did. Empty where the
/// kernel's tables cannot be read: then the probes alone tell.
pub fn ports(
    desired: &[&Service],
    applied: &BTreeMap<ServiceName, super::plan::Applied>,
) -> BTreeMap<(ServiceName, u16), Answers> {
    let mut ports = BTreeMap::new();
    let Ok(listeners) = Listeners::read() else { return ports };
    for service in desired {
        let before = applied.get(&service.name).map(|a| &a.service);
        for port in [Some(*service), before].into_iter().flatten().filter_map(Service::port) {
            ports
                .entry((service.name.clone(), port))
                .or_insert_with(|| listeners.at(port, &service.name.unit()));
        }
    }
    ports
}

/// When a unit was last started: systemd makes this link anew with every start, and only then.
fn started(name: &ServiceName) -> Option<(i64, i64)> {
    let link = Path::new("/run/systemd/units").join(format!("invocation:{}", name.unit()));
    fs_err::symlink_metadata(link).ok().map(|m| (m.mtime(), m.mtime_nsec()))
}

/// When a file was last put in place: also one that was copied there with an older time.
fn placed(path: &Path) -> Option<(i64, i64)> {
    fs_err::metadata(path).ok().map(|m| (m.ctime(), m.ctime_nsec()))
}

/// When a file's content was last changed.
fn changed(path: &Path) -> Option<(i64, i64)> {
    fs_err::metadata(path).ok().map(|m| (m.mtime(), m.mtime_nsec()))
}

/// Whether a file was changed after a service was last started.
pub fn changed_since_start(name: &ServiceName, file: &Path) -> bool {
    matches!((started(name), changed(file)), (Some(started), Some(changed)) if changed > started)
}

/// Whether a process shows a closure, and none that its unit names. A program that shows none (a system's
/// interpreter) tells nothing.
fn runs_another(pid: u32, unit: &str) -> bool {
    let proc = Path::new("/proc").join(pid.to_string());
    let exe = fs_err::read_link(proc.join("exe")).unwrap_or_default();
    let cmdline = fs_err::read(proc.join("cmdline")).unwrap_or_default();
    let mut shown = exe.to_string_lossy().into_owned();
    for word in cmdline.split(|b| *b == 0) {
        shown.push(' ');
        shown.push_str(&String::from_utf8_lossy(word));
    }
    another_closure(&shown, unit)
}

/// Whether a text names closures, and none that a unit names.
fn another_closure(text: &str, unit: &str) -> bool {
    let prefix = format!("{}/", crate::names::STORE_DIR);
    let mut bases =
        text.split(&prefix).skip(1).map(|rest| rest.split(['/', ' ']).next().unwrap_or_default()).peekable();
    bases.peek().is_some() && !bases.any(|base| unit.contains(base))
}

/// What a thread came to; its panic is ours.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The names in a folder; none if it is not there. Looked at once a folder rather than once a unit, because
/// systemd's folders are many and hold few of ours.
fn names_in(dir: &Path) -> Result<BTreeSet<OsString>> {
    match fs_err::read_dir(dir) {
        Ok(entries) => Ok(entries.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(e) => Err(e.into()),
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    match (fs_err::metadata(a), fs_err::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// The units with our mark in a folder whose file name is a service's and `ending`.
fn marked(dir: &Path, ending: &str) -> Result<Vec<(ServiceName, String)>> {
    let mut found = Vec::new();
    let entries = match fs_err::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(e.into()),
    };
    for entry in entries {
        let entry = entry?;
        let file_name = entry.file_name();
        let name = file_name.to_str().and_then(|n| n.strip_suffix(ending)).map(ServiceName::parse);
        let Some(Ok(name)) = name else { continue };
        if !entry.file_type()?.is_file() {
            continue;
        }
        match fs_err::read(entry.path()) {
            Ok(bytes) if unit::is_ours(&bytes) => {
                found.push((name, String::from_utf8_lossy(&bytes).into_owned()));
            }
            Ok(_) => {}
            // Somebody removed it between the two looks.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
}

/// The services that have an understudy with our mark.
pub fn understudies(root: &Root) -> Result<BTreeSet<ServiceName>> {
    let ending = format!("{}.service", crate::names::NEXT_SUFFIX);
    Ok(marked(&root.unit_dir, &ending)?.into_iter().map(|(name, _)| name).collect())
}

/// Whether somebody else has a unit of this name, anywhere that systemd looks. A link to /dev/null over a
/// service that we run (`systemctl mask`) is drift and may be replaced; over anything else it is a refusal.
fn foreign(folders: &[(&Path, BTreeSet<OsString>)], name: &ServiceName, was_ours: bool) -> Result<UnitFile> {
    let unit = name.unit();
    for (dir, names) in folders {
        if !names.contains(OsStr::new(&unit)) {
            continue;
        }
        let path = dir.join(&unit);
        let meta = match fs_err::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        let masks =
            meta.is_symlink() && fs_err::metadata(&path).is_ok_and(|m| m.file_type().is_char_device());
        // An empty file is nobody's work, and masks as well.
        if was_ours && (masks || meta.is_file() && meta.len() == 0) {
            continue;
        }
        if meta.is_file() && fs_err::read(&path).is_ok_and(|bytes| unit::is_ours(&bytes)) {
            continue;
        }
        return Ok(UnitFile::Foreign(path));
    }
    Ok(UnitFile::Absent)
}

/// Where copies of our unit would take precedence over, or be shadowed by, the one in our folder.
pub fn strays(root: &Root, name: &ServiceName) -> Vec<PathBuf> {
    UNIT_PATH
        .iter()
        .map(Path::new)
        .filter(|dir| *dir != root.unit_dir)
        .map(|dir| dir.join(name.unit()))
        .filter(|path| {
            fs_err::symlink_metadata(path).is_ok_and(|m| m.is_file() || m.is_symlink())
                && (fs_err::read(path).is_ok_and(|bytes| unit::is_ours(&bytes) || bytes.is_empty()))
        })
        .collect()
}

/// Our roots: service to the base names of the paths it holds. Only links whose name is their target's count.
pub fn roots(root: &Root) -> Result<BTreeMap<ServiceName, BTreeSet<String>>> {
    let mut roots = BTreeMap::new();
    let services = match fs_err::read_dir(&root.gcroots) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(roots),
        Err(e) => return Err(e.into()),
    };
    for service in services {
        let service = service?;
        let Some(Ok(name)) = service.file_name().to_str().map(ServiceName::parse) else { continue };
        // What somebody else put there is theirs.
        if !service.file_type()?.is_dir() {
            continue;
        }
        let (mut held, mut others) = (BTreeSet::new(), false);
        for link in fs_err::read_dir(service.path())? {
            let link = link?;
            let base = link.file_name().to_string_lossy().into_owned();
            let expected = Path::new(crate::names::STORE_DIR).join(&base);
            if fs_err::read_link(link.path()).is_ok_and(|target| target == expected) {
                held.insert(base);
            } else {
                others |= !base.starts_with(crate::durable::TEMP_PREFIX);
            }
        }
        if !(held.is_empty() && others) {
            roots.insert(name, held);
        }
    }
    Ok(roots)
}

/// Whether the secrets files of a service may all be used: what identifies their present content, or what is
/// wrong with them.
fn secrets_of(service: &Service) -> Result<String, String> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for file in service.secret_files() {
        match secrets_file(&service.name, file) {
            Ok(content) => good.push(content),
            Err(why) => bad.push(why),
        }
    }
    if bad.is_empty() { Ok(good.join(",")) } else { Err(bad.join("; ")) }
}

/// Whether a secrets file may be used: there, a regular file, root's, readable by nobody else. The answer
/// identifies its present content without telling anything of it (times, size, inode), or is the reason with
/// the command that mends it.
pub fn secrets_file(name: &ServiceName, path: &Path) -> Result<String, String> {
    let shown = path.display();
    let meta = match fs_err::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            return Err(format!(
                "secrets file {shown} of {name} is missing; make it: install -m 600 /dev/null {shown}"
            ));
        }
        Err(e) => return Err(format!("secrets file of {name}: {e}")),
    };
    if meta.is_symlink() {
        return Err(format!("secrets file {shown} of {name} is a symbolic link; put the file itself there"));
    }
    if !meta.is_file() {
        return Err(format!("secrets file {shown} of {name} is not a regular file; put a file there"));
    }
    if meta.uid() != 0 {
        return Err(format!(
            "secrets file {shown} of {name} belongs to user {}; run: chown root:root {shown}",
            meta.uid()
        ));
    }
    let mode = meta.mode() & 0o7777;
    if mode & !0o600 != 0 {
        return Err(format!(
            "secrets file {shown} of {name} has mode {mode:04o}, others could read it; run: chmod 600 {shown}"
        ));
    }
    Ok(format!("{}.{}.{}.{}", meta.mtime(), meta.mtime_nsec(), meta.size(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn secrets_that_others_could_read_are_refused_with_the_line_to_type() {
        let dir = tempfile::tempdir().unwrap();
        let name = ServiceName::parse("ava").unwrap();
        let file = dir.path().join("ava.env");
        assert!(secrets_file(&name, &file).unwrap_err().contains("install -m 600"));
        fs_err::write(&file, "A=1").unwrap();
        for (mode, good) in
            [(0o644, false), (0o640, false), (0o601, false), (0o4600, false), (0o600, true), (0o400, true)]
        {
            fs_err::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let answer = secrets_file(&name, &file);
            assert_eq!(answer.is_ok(), good, "{mode:o}: {answer:?}");
            if let Err(why) = answer {
                assert!(why.contains(&format!("chmod 600 {}", file.display())), "{why}");
            }
        }
        let link = dir.path().join("link.env");
        fs_err::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(secrets_file(&name, &link).unwrap_err().contains("symbolic link"));
        assert!(secrets_file(&name, dir.path()).unwrap_err().contains("regular"));
    }
}
