//! What is: looks at units, links, store paths, roots, secrets and Caddy. Reads only. A pass that has nothing
//! to do costs one `systemctl list-units`, one request to Caddy, and a few file reads a service.

use super::applied::LastKnownGood;
use super::caddy::{self, CaddyState};
use super::listeners::{self, Answers, Listeners};
use super::observed::{Observed, Switching, UnitFile, UnitSeen};
use super::persisted::PersistedState;
use super::ports::PortFiles;
use super::root::Root;
use super::unit;
use crate::config::admin::Address;
use crate::error::Result;
use crate::files::{self, if_reached, if_there};
use crate::manifest::{Rollout, Service};
use crate::names::{ServiceName, StorePath};
use crate::parallel::joined;
use crate::secrets;
use crate::systemd::{self, Shown, UNIT_PATH, same_file};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Looks at everything that concerns these services and whatever else is ours. `caddy`: what is known of it, if it is not
/// to be asked.
pub fn observe(
    root: &Root,
    caddy_admin: &Address,
    desired: &[&Service],
    persisted: &PersistedState,
    caddy: Option<CaddyState>,
) -> Result<Observed> {
    let applied = &persisted.applied;
    let (mut present, mut unverified) = (BTreeSet::new(), Vec::new());
    let verified: BTreeSet<&StorePath> = applied.values().flat_map(LastKnownGood::paths).collect();
    for path in desired.iter().filter_map(|s| s.artifact.store_path.path()).chain(verified.iter().copied()) {
        // Whole or not.
        if !present.contains(path) && if_reached(fs_err::symlink_metadata(path))?.is_some() {
            present.insert(path.clone());
            if !verified.contains(path) {
                unverified.push(path.clone());
            }
        }
    }
    // Nix unpacks in place and registers at the end: a copy that was cut off leaves half a path behind. Whether
    // one is whole is only asked of what never ran here, so that an idle pass starts no program for it. Where
    // Nix cannot be asked, fetching will say so.
    if !unverified.is_empty() {
        for path in crate::nix::missing(&unverified).unwrap_or(unverified) {
            present.remove(&path);
        }
    }
    let with_secrets = desired.iter().filter(|service| service.secret_files().next().is_some());
    let secrets = with_secrets.map(|service| (service.name.clone(), secrets_of(service))).collect();
    std::thread::scope(|scope| {
        // Caddy answers while files are read. The thread only waits: what it allocated would be taken from the
        // kernel page by page.
        let caddy = scope.spawn(|| caddy.ok_or_else(|| caddy::ask(caddy_admin)));
        // While systemd answers, for which `units` waits.
        let listening = scope.spawn(|| ports(desired, &persisted.applied));
        let (units, active) = units(root, desired, persisted)?;
        let (roots, candidates) = (roots(root)?, candidates(root)?);
        let foreign_next = foreign_next(root, desired, persisted, &units, &candidates)?;
        let ports = joined(listening);
        let kept_out = kept_out(desired, persisted);
        let caddy = joined(caddy).unwrap_or_else(|asked| caddy::read(caddy_admin, asked));
        let switching = switching(root, persisted, &caddy);
        Ok(Observed {
            units,
            active,
            ports,
            kept_out,
            present,
            roots,
            secrets,
            candidates,
            foreign_next,
            caddy,
            switching,
        })
    })
}

/// How requests move to another port, with the Caddy that runs. As long as nothing is known of it: as before.
fn switching(root: &Root, persisted: &PersistedState, caddy: &CaddyState) -> Switching {
    let program = listeners::caddys_program();
    let tried = persisted.trial.as_ref().filter(|trial| Some(&trial.program) == program.as_ref());
    let reads = tried.and_then(|trial| trial.port_files);
    if reads == Some(false) {
        return Switching::Configuration;
    }
    let Some(files) = PortFiles::read(root) else { return Switching::Configuration };
    match (reads, program) {
        (None, Some(program)) => Switching::Untried(program, caddy.reads_ports().then_some(files)),
        (None, None) if !caddy.reads_ports() => Switching::Configuration,
        (Some(_), _) | (None, None) => Switching::Files(files),
    }
}

/// The units in question (files, boot links and what systemd says), and the names of all active units.
pub fn units(
    root: &Root,
    desired: &[&Service],
    persisted: &PersistedState,
) -> Result<(BTreeMap<ServiceName, UnitSeen>, BTreeSet<String>)> {
    let applied = &persisted.applied;
    // So does systemd.
    let (listed, marked, folders) = std::thread::scope(|scope| {
        let listed = scope.spawn(systemd::list_units);
        let marked = marked(&root.unit_dir, ".service");
        let folders = Folders::look(root);
        (joined(listed), marked, folders)
    });
    let (mut listed, folders) = (listed?, folders?);
    let active = listed.iter().filter(|(_, l)| l.active == "active").map(|(unit, _)| unit.clone()).collect();
    let mut units: BTreeMap<ServiceName, UnitSeen> = BTreeMap::new();
    let mut placed: BTreeMap<ServiceName, (i64, i64)> = BTreeMap::new();
    for Marked { name, text, at } in marked? {
        placed.insert(name.clone(), at);
        units.insert(name, UnitSeen { file: UnitFile::Ours(text), ..UnitSeen::default() });
    }
    let mut without: BTreeSet<&ServiceName> = desired.iter().map(|s| &s.name).chain(applied.keys()).collect();
    without.retain(|name| !units.contains_key(*name));
    // A name that waits for its first push is asked for when it is about to be taken.
    let asked = desired.iter().filter(|s| s.artifact.store_path.path().is_some()).map(|s| &s.name);
    let asked = asked.filter(|name| without.contains(name)).map(ServiceName::unit);
    // Of thousands of new names systemd knows none, and would look for each on the disk.
    let asked: Vec<String> =
        asked.filter(|unit| listed.contains_key(unit) || folders.anywhere(unit)).collect();
    let shown = systemd::show(&asked)?;
    for name in without {
        let was_ours = applied.contains_key(name);
        let mut file = folders.foreign(name, was_ours)?;
        // What systemd still has of a unit that is gone may be left of an attempt that was never verified: it has roots.
        let was_ours = was_ours || root.roots(name).is_dir();
        if let Some(shown) = shown.get(&name.unit())
            && let Some(owner) = owner(root, &name.unit(), was_ours, shown)
        {
            file = UnitFile::Foreign(owner);
        }
        units.insert(name.clone(), UnitSeen { file, ..UnitSeen::default() });
    }
    let drop_ins = folders.drop_ins(units.keys())?;
    let mut suspects: Vec<ServiceName> = Vec::new();
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
        seen.enabled =
            links.contains(OsStr::new(&unit)) && fs_err::read_link(wants.join(&unit)).is_ok_and(leads_to_it);
        let running = seen.listed.running();
        // Without a copy in memory, or with a mask there: rare, and only then are the other folders looked into.
        let read = seen.listed.load == "loaded";
        seen.needs_reload = running && !read;
        let found = drop_ins.get(name).filter(|_| !matches!(seen.file, UnitFile::Foreign(_)));
        seen.drop_ins = found.cloned().unwrap_or_default();
        let UnitFile::Ours(_) = seen.file else { continue };
        if !(running && read) {
            seen.shadowed = !shadow_copies(root, name).is_empty();
        }
        let mut suspect = found.is_some() || folders.elsewhere(&root.unit_dir, &unit);
        if let (true, Some(started)) = (running, systemd::started(&unit)) {
            seen.current = placed.get(name).is_some_and(|written| *written <= started);
            seen.invocation = systemd::invocation(&unit);
            seen.verified =
                seen.invocation.is_some() && seen.invocation.as_ref() == persisted.verified.get(name);
            // What runs since the last pass's look, as it was then, is as it was then.
            suspect |= !seen.current || !seen.verified;
        }
        if suspect {
            suspects.push(name.clone());
        }
    }
    // Rare: what changed since a pass has looked at it.
    let shown = systemd::show(&suspects.iter().map(ServiceName::unit).collect::<Vec<_>>())?;
    for name in suspects {
        if let (Some(seen), Some(shown)) = (units.get_mut(&name), shown.get(&name.unit())) {
            look_closely(root, &name, seen, shown);
        }
    }
    for service in desired {
        if let Some(seen) = units.get_mut(&service.name).filter(|seen| seen.listed.running()) {
            seen.secrets_changed =
                service.secret_files().any(|file| secrets::changed_since_start(&service.name, file));
        }
    }
    Ok((units, active))
}

/// Who would answer at the ports of these services: where they should listen, and where they did. Empty where the
/// kernel's tables cannot be read: then the probes alone tell.
fn ports(
    desired: &[&Service],
    applied: &BTreeMap<ServiceName, LastKnownGood>,
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

/// Services whose last try found the port in use, where somebody else still has it at whatever address. Rare: asked
/// only of those.
fn kept_out(desired: &[&Service], persisted: &PersistedState) -> BTreeSet<ServiceName> {
    let asked: Vec<(&ServiceName, u16)> = desired
        .iter()
        .filter_map(|service| {
            let port = service.port()?;
            let failure = persisted.state.services.get(&service.name)?.failure.as_ref()?;
            failure.kept_out.then_some((&service.name, port))
        })
        .collect();
    if asked.is_empty() {
        return BTreeSet::new();
    }
    let Ok(listeners) = Listeners::read() else { return BTreeSet::new() };
    let still = asked.into_iter().filter(|(name, port)| !listeners.anywhere(*port, &name.unit()).is_empty());
    still.map(|(name, _)| name.clone()).collect()
}

/// What systemd has loaded for a unit of ours, and what its process shows, held against its file.
fn look_closely(root: &Root, name: &ServiceName, seen: &mut UnitSeen, shown: &Shown) {
    let UnitFile::Ours(text) = &seen.file else { return };
    for path in shown.drop_ins.iter().filter(|path| !systemd::is_vendor_drop_in(path)) {
        // One that is gone may still be loaded; it will not be started with again.
        if !seen.drop_ins.contains(path) && fs_err::symlink_metadata(path).is_ok() {
            seen.drop_ins.push(path.clone());
        }
    }
    let running = seen.listed.running();
    let stale = shown.needs_reload || another_closure(&shown.command, text) && seen.drop_ins.is_empty();
    let file = root.unit(name);
    // A copy of ours, or what is not there any more, is put right by another step.
    let stray = shown.fragment.as_ref().is_some_and(|fragment| {
        *fragment != file && fs_err::read(fragment).map_or(true, |bytes| unit::is_ours(&bytes))
    });
    seen.replaced = unit::program_of(text)
        .and_then(|program| shown.replaced(&file, Path::new(&program)))
        .filter(|_| !(stray || stale && seen.drop_ins.is_empty()));
    seen.needs_reload |= stale && (running || seen.replaced.is_some());
    if running {
        let process = process(shown.main_pid);
        seen.shows = shows(&process, text);
        seen.wrong_closure =
            seen.replaced.is_none() && another_closure(&process, text) && !is_part(&seen.shows, text);
    }
    seen.clean = running
        && !seen.needs_reload
        && !seen.wrong_closure
        && seen.replaced.is_none()
        && seen.drop_ins.is_empty();
}

fn is_our_file(path: &Path) -> bool {
    fs_err::read(path).is_ok_and(|bytes| unit::is_ours(&bytes))
}

/// Whose unit a name belongs to, as systemd has it loaded: the file, or what a generator made it from. None: nobody's,
/// or ours.
fn owner(root: &Root, unit: &str, was_ours: bool, shown: &Shown) -> Option<PathBuf> {
    let file = root.unit_dir.join(unit);
    let runs = matches!(shown.active.as_str(), "active" | "activating" | "reloading" | "deactivating");
    let Some(fragment) = &shown.fragment else {
        // A process whose unit is gone is somebody's as long as it runs.
        return (runs && !was_ours).then_some(file);
    };
    let masks =
        shown.load == "masked" || fs_err::metadata(fragment).is_ok_and(|m| !m.is_file() || m.len() == 0);
    let ours = is_our_file(fragment);
    // Deleted, or masked, over a service that we run: drift.
    let drift = was_ours && (*fragment == file || masks || fs_err::symlink_metadata(fragment).is_err());
    (!ours && !drift).then(|| shown.source.clone().unwrap_or_else(|| fragment.clone()))
}

/// Services that would be verified beside their running version, whose `NAME-next` is somebody else's unit. Asked only
/// of those that are about to change.
fn foreign_next(
    root: &Root,
    desired: &[&Service],
    persisted: &PersistedState,
    units: &BTreeMap<ServiceName, UnitSeen>,
    candidates: &BTreeSet<ServiceName>,
) -> Result<BTreeMap<ServiceName, PathBuf>> {
    let about_to_change = |service: &&&Service| {
        service.rollout == Rollout::Overlap
            && units.get(&service.name).is_some_and(|seen| seen.listed.running())
            && !candidates.contains(&service.name)
            && persisted.applied.get(&service.name).is_some_and(|a| a.service != ***service)
    };
    let names: Vec<&ServiceName> = desired.iter().filter(about_to_change).map(|s| &s.name).collect();
    let shown = systemd::show(&names.iter().map(|name| name.next_unit()).collect::<Vec<_>>())?;
    let owned = |name: &&ServiceName| {
        let unit = name.next_unit();
        Some(((*name).clone(), owner(root, &unit, false, shown.get(&unit)?)?))
    };
    Ok(names.iter().filter_map(owned).collect())
}

/// What is in the folders that systemd reads units from: units by name, and drop-in folders.
struct Folders<'a> {
    /// Ours first, the others in systemd's order.
    units: Vec<(&'a Path, BTreeSet<OsString>)>,
}

impl<'a> Folders<'a> {
    /// Each once: they are many, and hold few of ours.
    fn look(root: &'a Root) -> Result<Self> {
        // Nearly everywhere /lib is a link to /usr/lib, which has hundreds of units.
        let merged = fs_err::read_link("/lib").is_ok();
        let others = UNIT_PATH.iter().map(Path::new);
        let others = others.filter(|dir| *dir != root.unit_dir && !(merged && dir.starts_with("/lib")));
        let all = std::iter::once(root.unit_dir.as_path()).chain(others);
        Ok(Folders { units: all.map(|dir| Ok((dir, names_in(dir)?))).collect::<Result<_>>()? })
    }

    /// Whether a unit's name is in any of them.
    fn anywhere(&self, unit: &str) -> bool {
        self.units.iter().any(|(_, names)| names.contains(OsStr::new(unit)))
    }

    /// Whether a unit's name is also in another folder than this.
    fn elsewhere(&self, dir: &Path, unit: &str) -> bool {
        self.units.iter().any(|(other, names)| *other != dir && names.contains(OsStr::new(unit)))
    }

    /// The drop-ins for these services that a start would load, but the host's own for all services: of `NAME.service.d`,
    /// of every beginning of the name that ends with a dash, and of `service.d`.
    fn drop_ins<'n>(
        &self,
        names: impl Iterator<Item = &'n ServiceName>,
    ) -> Result<BTreeMap<ServiceName, Vec<PathBuf>>> {
        // By the name of the folder, then by that of the file: the first folder's counts.
        let mut found: BTreeMap<&str, BTreeMap<OsString, PathBuf>> = BTreeMap::new();
        for (dir, entries) in &self.units {
            let entries = entries.iter().filter_map(|name| name.to_str());
            for folder in entries.filter(|name| name.ends_with(".service.d") || *name == "service.d") {
                let path = dir.join(folder);
                let is_conf = |name: &OsString| Path::new(name).extension().is_some_and(|e| e == "conf");
                for conf in names_in(&path).unwrap_or_default().into_iter().filter(is_conf) {
                    found.entry(folder).or_default().entry(conf.clone()).or_insert_with(|| path.join(conf));
                }
            }
        }
        // A mask, or an empty file, says nothing.
        for confs in found.values_mut() {
            confs.retain(|_, path| {
                !systemd::is_vendor_drop_in(path)
                    && fs_err::metadata(path).is_ok_and(|m| m.is_file() && m.len() > 0)
            });
        }
        found.retain(|_, confs| !confs.is_empty());
        let of = |name: &ServiceName| {
            let concerns = |folder: &str| match folder.strip_suffix(".service.d") {
                None => true,
                Some(start) if start.ends_with('-') => name.as_str().starts_with(start),
                Some(whole) => whole == name.as_str(),
            };
            let here = found.iter().filter(|(folder, _)| concerns(folder));
            let files: Vec<PathBuf> = here.flat_map(|(_, confs)| confs.values().cloned()).collect();
            (!files.is_empty()).then(|| (name.clone(), files))
        };
        Ok(names.filter_map(of).collect())
    }

    /// Whether somebody else has a unit of this name, anywhere that systemd looks. A link to /dev/null over a
    /// service that we run (`systemctl mask`) is drift and may be replaced; over anything else it is a refusal.
    fn foreign(&self, name: &ServiceName, was_ours: bool) -> Result<UnitFile> {
        let unit = name.unit();
        for (dir, names) in &self.units {
            if !names.contains(OsStr::new(&unit)) {
                continue;
            }
            let path = dir.join(&unit);
            let Some(meta) = if_there(fs_err::symlink_metadata(&path))? else { continue };
            let masks =
                meta.is_symlink() && fs_err::metadata(&path).is_ok_and(|m| m.file_type().is_char_device());
            // An empty file is nobody's work, and masks as well.
            if was_ours && (masks || meta.is_file() && meta.len() == 0) {
                continue;
            }
            if meta.is_file() && is_our_file(&path) {
                continue;
            }
            return Ok(UnitFile::Foreign(path));
        }
        Ok(UnitFile::Absent)
    }
}

/// The services that have a unit with our mark.
pub fn ours(root: &Root) -> Result<BTreeSet<ServiceName>> {
    Ok(marked(&root.unit_dir, ".service")?.into_iter().map(|marked| marked.name).collect())
}

/// What a process shows of what it runs: its executable and its command line.
fn process(pid: u32) -> String {
    let proc = Path::new("/proc").join(pid.to_string());
    let exe = fs_err::read_link(proc.join("exe")).unwrap_or_default();
    let cmdline = fs_err::read(proc.join("cmdline")).unwrap_or_default();
    format!("{} {}", exe.display(), String::from_utf8_lossy(&cmdline).replace('\0', " "))
}

/// The closure that a process shows: one that a unit names, if it shows that, else the first.
fn shows(process: &str, unit: &str) -> Option<StorePath> {
    let mut named = bases(process).peekable();
    let first = named.peek().copied();
    store_path(named.find(|base| unit.contains(base)).or(first)?)
}

fn store_path(base: &str) -> Option<StorePath> {
    StorePath::parse(&format!("{STORE_PREFIX}{base}")).ok()
}

/// Whether a path is part of a closure that a unit names: a program may become another one of its own closure. Where
/// Nix does not say, it is.
fn is_part(path: &Option<StorePath>, unit: &str) -> bool {
    let Some(path) = path else { return true };
    let named: BTreeSet<StorePath> = bases(unit).filter_map(store_path).collect();
    let named: Vec<StorePath> = named.into_iter().collect();
    crate::nix::closure(&named).map_or(true, |closure| closure.contains(path))
}

/// The names of the store paths in a text.
fn bases(text: &str) -> impl Iterator<Item = &str> {
    const ENDS: [char; 5] = ['/', ' ', '"', '\n', ';'];
    let rests = text.split(STORE_PREFIX).skip(1);
    rests.map(|rest| rest.split(ENDS).next().unwrap_or_default())
}

const STORE_PREFIX: &str = "/nix/store/";

/// Whether a text names closures, and none that a unit names. A program that shows none (a system's interpreter)
/// tells nothing.
fn another_closure(text: &str, unit: &str) -> bool {
    let mut bases = bases(text).peekable();
    bases.peek().is_some() && !bases.any(|base| unit.contains(base))
}

/// The names in a folder; none if it is not there. Looked at once a folder rather than once a unit, because
/// systemd's folders are many and hold few of ours.
fn names_in(dir: &Path) -> Result<BTreeSet<OsString>> {
    let entries = if_there(fs_err::read_dir(dir))?.into_iter().flatten();
    Ok(entries.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?)
}

/// A unit with our mark.
struct Marked {
    name: ServiceName,
    text: String,
    /// When it was last put in place: also one that was copied there with an older time.
    at: (i64, i64),
}

/// The units with our mark in a folder whose file name is a service's and `ending`.
fn marked(dir: &Path, ending: &str) -> Result<Vec<Marked>> {
    let mut found = Vec::new();
    for entry in if_there(fs_err::read_dir(dir))?.into_iter().flatten() {
        let entry = entry?;
        let file_name = entry.file_name();
        let name = file_name.to_str().and_then(|n| n.strip_suffix(ending)).map(ServiceName::parse);
        let Some(Ok(name)) = name else { continue };
        if !entry.file_type()?.is_file() {
            continue;
        }
        match files::read(&entry.path()) {
            Ok((bytes, meta)) if unit::is_ours(&bytes) => {
                let text = String::from_utf8(bytes)
                    .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
                found.push(Marked { name, text, at: (meta.ctime(), meta.ctime_nsec()) });
            }
            Ok(_) => {}
            // Somebody removed it between the two looks.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(found)
}

/// The services that have a candidate with our mark.
pub fn candidates(root: &Root) -> Result<BTreeSet<ServiceName>> {
    let ending = format!("{}.service", crate::names::NEXT_SUFFIX);
    Ok(marked(&root.unit_dir, &ending)?.into_iter().map(|marked| marked.name).collect())
}

/// Where copies of our unit would take precedence over, or be shadowed by, the one in our folder.
pub fn shadow_copies(root: &Root, name: &ServiceName) -> Vec<PathBuf> {
    UNIT_PATH
        .iter()
        .map(Path::new)
        .filter(|dir| *dir != root.unit_dir && !dir.starts_with("/run/systemd/generator"))
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
    for service in if_there(fs_err::read_dir(&root.gcroots))?.into_iter().flatten() {
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
        match secrets::usable(&service.name, file) {
            Ok(content) => good.push(content),
            Err(why) => bad.push(why),
        }
    }
    if bad.is_empty() { Ok(good.join(",")) } else { Err(bad.join("; ")) }
}
