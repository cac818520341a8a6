//! The files from which Caddy reads the port of a service anew for every request, where it can ([`super::trial`]): then
//! requests move to another instance when a file is renamed, and Caddy's configuration, every change of which cuts
//! somebody's connections, stays as it is. Each service has two: what is in force, below /run, and what a boot begins
//! with, on the disk: systemd-tmpfiles copies the one from the other before Caddy starts. A candidate is never in the
//! second, because nothing starts it at boot.

use super::root::Root;
use super::routes::Route;
use crate::durable::{self, Batch};
use crate::error::Error;
use crate::log;
use crate::names::ServiceName;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Both files of every service, as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortFiles {
    in_force: Folder,
    at_boot: Folder,
}

/// A folder, with what is in the files of services there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Folder {
    path: PathBuf,
    ports: BTreeMap<ServiceName, String>,
    /// Whether anything but a file has the name of a service there.
    strange: bool,
}

/// A file that is to have another port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PortFile {
    /// Its path.
    pub path: PathBuf,
    /// The port.
    pub port: u16,
}

/// What it takes for the files to be as they should.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PortChanges {
    /// Files to write, before Caddy is told of anything that reads them.
    pub write: Vec<PortFile>,
    /// Files of services that have no route, to remove when Caddy reads them no more.
    pub remove: Vec<PathBuf>,
}

/// Everybody may read them, Caddy among them; root alone decides what visitors get.
const FILE_MODE: u32 = 0o644;
const FOLDER_MODE: u32 = 0o755;
/// The most bytes that a port has.
const LONGEST: u64 = 5;

/// How an address begins whose port is in a file.
pub const DIALS_FILE: &str = "127.0.0.1:{file.";

/// What Caddy dials for a service whose port is in a file of this folder.
pub fn dial(dir: &Path, name: &ServiceName) -> String {
    format!("{DIALS_FILE}{}/{name}}}", dir.display())
}

/// Where a service's requests are led now, as far as Caddy goes by the files.
pub fn in_force(root: &Root, name: &ServiceName) -> Option<u16> {
    read_port(&root.ports_in_force().join(name.as_str()))?.parse().ok()
}

/// What is in such a file; an empty text if it is not as it was made. None if it is not a file: that is not opened, because a
/// pass must not wait for whoever writes into a pipe.
fn read_port(path: &Path) -> Option<String> {
    let meta = fs_err::symlink_metadata(path).ok().filter(|meta| meta.is_file())?;
    let as_made = is_ours(&meta, FILE_MODE) && meta.len() <= LONGEST;
    Some(if as_made { fs_err::read_to_string(path).unwrap_or_default() } else { String::new() })
}

/// Whether this belongs to whoever makes passes, root, with this mode.
fn is_ours(meta: &Metadata, mode: u32) -> bool {
    meta.uid() == rustix::process::geteuid().as_raw() && meta.mode() & 0o7777 == mode
}

impl PortFiles {
    /// Reads them. None if Caddy must not use them: systemd-tmpfiles has not made their folder, and so would not fill it at
    /// boot either, or the folder is not as it was made.
    pub fn read(root: &Root) -> Option<Self> {
        let in_force = Folder::read(root.ports_in_force()).filter(Folder::is_well)?;
        let at_boot = root.ports_at_boot();
        let missing = Folder { path: at_boot.clone(), ports: BTreeMap::new(), strange: false };
        Some(PortFiles { in_force, at_boot: Folder::read(at_boot).unwrap_or(missing) })
    }

    /// What Caddy dials for a service.
    pub fn dial(&self, name: &ServiceName) -> String {
        dial(&self.in_force.path, name)
    }

    /// What it takes for these routes.
    pub fn changes(&self, routes: &[Route]) -> PortChanges {
        let PortFiles { in_force, at_boot } = self;
        let now = routes.iter().map(|r| (&r.service, r.port)).collect();
        let boot = routes.iter().map(|r| (&r.service, r.own_port)).collect();
        let mut changes = PortChanges::default();
        // What is in force last: it takes effect at once.
        at_boot.compare(&boot, &mut changes);
        in_force.compare(&now, &mut changes);
        changes
    }
}

impl Folder {
    /// None if there is none. What cannot be read, or is not as it was made, will be written anew.
    fn read(path: PathBuf) -> Option<Self> {
        let (mut ports, mut strange) = (BTreeMap::new(), false);
        for entry in fs_err::read_dir(&path).ok()?.flatten() {
            if let Some(name) = entry.file_name().to_str().and_then(|name| ServiceName::parse(name).ok()) {
                let text = read_port(&entry.path());
                strange |= text.is_none();
                ports.insert(name, text.unwrap_or_default());
            }
        }
        Some(Folder { path, ports, strange })
    }

    /// Whether everybody can read what is there, and root alone change it.
    fn is_well(&self) -> bool {
        let meta = fs_err::symlink_metadata(&self.path);
        !self.strange && meta.is_ok_and(|m| m.is_dir() && is_ours(&m, FOLDER_MODE))
    }

    fn compare(&self, wanted: &BTreeMap<&ServiceName, u16>, changes: &mut PortChanges) {
        for (name, port) in wanted {
            if self.ports.get(*name).is_none_or(|text| *text != port.to_string()) {
                changes.write.push(PortFile { path: self.path.join(name.as_str()), port: *port });
            }
        }
        let stale = self.ports.keys().filter(|name| !wanted.contains_key(name));
        changes.remove.extend(stale.map(|name| self.path.join(name.as_str())));
    }
}

impl PortChanges {
    /// Whether there is nothing to change.
    pub fn is_empty(&self) -> bool {
        self.write.is_empty() && self.remove.is_empty()
    }

    /// Writes those that are to be written; the error is the reason. A file for the next boot that cannot be written is
    /// only warned about: requests go where they should all the same.
    pub fn write(&self, root: &Root) -> Result<(), String> {
        let in_force = root.ports_in_force();
        if !self.write.is_empty()
            && let Err(e) = durable::folder(&root.ports_at_boot(), FOLDER_MODE)
        {
            log::warning(Error::from(e));
        }
        let mut batch = Batch::default();
        for PortFile { path, port } in &self.write {
            // Nothing but the number: Caddy takes what is there as it is.
            batch.write(path, port.to_string().as_bytes(), FILE_MODE);
        }
        let (failed, at_boot): (BTreeMap<_, _>, BTreeMap<_, _>) =
            batch.finish().into_iter().partition(|(path, _)| path.starts_with(&in_force));
        warn(at_boot);
        let written =
            self.write.iter().filter(|f| f.path.starts_with(&in_force) && !failed.contains_key(&f.path));
        for PortFile { path, port } in written {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            log::notice(format!("route: requests for {name} go to port {port}"));
        }
        failed.into_values().next().map_or(Ok(()), |e| Err(Error::from(e).to_string()))
    }

    /// Removes those that nobody reads any more.
    pub fn remove(&self) {
        let mut batch = Batch::default();
        self.remove.iter().for_each(|path| batch.remove(path));
        warn(batch.finish());
    }
}

fn warn(failed: BTreeMap<PathBuf, io::Error>) {
    for e in failed.into_values() {
        log::warning(Error::from(e));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ServiceName {
        ServiceName::parse(text).unwrap()
    }

    fn lead(service: &str, port: u16, own_port: u16) -> Route {
        let domain = format!("{service}.example.com");
        Route {
            service: name(service),
            domain: domain.as_str().into(),
            path: "/".into(),
            port,
            own_port,
            closed: false,
        }
    }

    fn perform(root: &Root, routes: &[Route]) -> PortChanges {
        let changes = PortFiles::read(root).unwrap().changes(routes);
        changes.write(root).unwrap();
        changes.remove();
        assert!(PortFiles::read(root).unwrap().changes(routes).is_empty());
        changes
    }

    #[test]
    fn a_boot_begins_with_the_services_own_ports_whoever_has_the_requests() {
        let dir = tempfile::tempdir().unwrap();
        let mut root = Root::system(dir.path());
        (root.state_dir, root.run_dir) = (dir.path().join("state"), dir.path().join("run"));
        assert_eq!(PortFiles::read(&root), None);
        fs_err::create_dir_all(root.ports_in_force()).unwrap();
        fs_err::create_dir_all(&root.state_dir).unwrap();
        let text = |path: PathBuf| fs_err::read_to_string(path).unwrap();
        let (shop, both) = (name("shop"), [lead("shop", 8080, 8080), lead("web", 8081, 8081)]);
        assert_eq!(perform(&root, &both).write.len(), 4);
        assert_eq!(text(root.ports_in_force().join("shop")), "8080");

        // Requests move to a candidate, and nothing but its file changes.
        let changes = perform(&root, &[lead("shop", 20_001, 8080), lead("web", 8081, 8081)]);
        let moved = PortFile { path: root.ports_in_force().join("shop"), port: 20_001 };
        assert_eq!(changes, PortChanges { write: vec![moved], remove: vec![] });
        assert_eq!(text(root.ports_at_boot().join("shop")), "8080");
        assert_eq!(in_force(&root, &shop), Some(20_001));

        // What somebody broke or took away is mended, and what is no service's stays.
        fs_err::write(root.ports_in_force().join("shop"), "8080\n").unwrap();
        fs_err::remove_file(root.ports_at_boot().join("web")).unwrap();
        fs_err::write(root.ports_in_force().join(".trial"), "1").unwrap();
        assert_eq!(perform(&root, &both).write.len(), 2);
        assert_eq!(perform(&root, &both[..1]).remove.len(), 2);
        assert_eq!((in_force(&root, &shop), in_force(&root, &name("web"))), (Some(8080), None));
        assert!(root.ports_in_force().join(".trial").exists());
    }
}
