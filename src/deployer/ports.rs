//! The files from which Caddy reads the port of a service anew for every request, where it can ([`super::trial`]): then
//! requests move to another instance when a file is renamed, and Caddy's configuration, every change of which cuts
//! somebody's connections, stays as it is. Each service has two: what is in force, below /run, and what a boot begins
//! with, on the disk: systemd-tmpfiles copies the one from the other before Caddy starts. A candidate is never in the
//! second, because nothing starts it at boot.

use super::root::Root;
use super::routes::Route;
use crate::durable::Batch;
use crate::files::if_there;
use crate::log;
use crate::names::ServiceName;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
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

/// How an address begins whose port is in a file.
pub const DIALS_FILE: &str = "127.0.0.1:{file.";

/// What Caddy dials for a service whose port is in a file of this folder.
pub fn dial(dir: &Path, name: &ServiceName) -> String {
    format!("{DIALS_FILE}{}/{name}}}", dir.display())
}

/// Where a service's requests are led now, as far as Caddy goes by the files.
pub fn in_force(root: &Root, name: &ServiceName) -> io::Result<Option<u16>> {
    let text = if_there(fs_err::read_to_string(root.ports_in_force().join(name.as_str())))?;
    Ok(text.and_then(|text| text.parse().ok()))
}

impl PortFiles {
    /// Reads them; None where systemd-tmpfiles has not made their folder, and so would not fill it at boot either.
    pub fn read(root: &Root) -> io::Result<Option<Self>> {
        let Some(in_force) = Folder::read(root.ports_in_force())? else { return Ok(None) };
        let at_boot = root.ports_at_boot();
        let missing = Folder { path: at_boot.clone(), ports: BTreeMap::new() };
        Ok(Some(PortFiles { in_force, at_boot: Folder::read(at_boot)?.unwrap_or(missing) }))
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
    /// None where there is none. What cannot be read of it is written anew.
    fn read(path: PathBuf) -> io::Result<Option<Self>> {
        let Some(entries) = if_there(fs_err::read_dir(&path))? else { return Ok(None) };
        let mut ports = BTreeMap::new();
        for entry in entries {
            let entry = entry?;
            if let Some(name) = entry.file_name().to_str().and_then(|name| ServiceName::parse(name).ok()) {
                ports.insert(name, fs_err::read_to_string(entry.path()).unwrap_or_default());
            }
        }
        Ok(Some(Folder { path, ports }))
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

    /// Writes those that are to be written; the error is the reason.
    pub fn write(&self, root: &Root) -> Result<(), String> {
        if self.write.is_empty() {
            return Ok(());
        }
        crate::durable::folder(&root.ports_at_boot(), 0o755).map_err(|e| e.to_string())?;
        let mut batch = Batch::default();
        for PortFile { path, port } in &self.write {
            // Nothing but the number: Caddy takes what is there as it is.
            batch.write(path, port.to_string().as_bytes(), 0o644);
        }
        finish(batch)?;
        for PortFile { path, port } in self.write.iter().filter(|f| f.path.starts_with(root.ports_in_force()))
        {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            log::notice(format!("route: requests for {name} go to port {port}"));
        }
        Ok(())
    }

    /// Removes those that nobody reads any more; the error is the reason.
    pub fn remove(&self) -> Result<(), String> {
        let mut batch = Batch::default();
        self.remove.iter().for_each(|path| batch.remove(path));
        finish(batch)
    }
}

fn finish(batch: Batch) -> Result<(), String> {
    batch.finish().into_values().next().map_or(Ok(()), |e| Err(e.to_string()))
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
        let changes = PortFiles::read(root).unwrap().unwrap().changes(routes);
        changes.write(root).unwrap();
        changes.remove().unwrap();
        assert!(PortFiles::read(root).unwrap().unwrap().changes(routes).is_empty());
        changes
    }

    #[test]
    fn a_boot_begins_with_the_services_own_ports_whoever_has_the_requests() {
        let dir = tempfile::tempdir().unwrap();
        let mut root = Root::system(dir.path());
        (root.state_dir, root.run_dir) = (dir.path().join("state"), dir.path().join("run"));
        assert_eq!(PortFiles::read(&root).unwrap(), None);
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
        assert_eq!(in_force(&root, &shop).unwrap(), Some(20_001));

        // What somebody broke or took away is mended, and what is no service's stays.
        fs_err::write(root.ports_in_force().join("shop"), "8080\n").unwrap();
        fs_err::remove_file(root.ports_at_boot().join("web")).unwrap();
        fs_err::write(root.ports_in_force().join(".trial"), "1").unwrap();
        assert_eq!(perform(&root, &both).write.len(), 2);
        assert_eq!(perform(&root, &both[..1]).remove.len(), 2);
        assert_eq!(
            (in_force(&root, &shop).unwrap(), in_force(&root, &name("web")).unwrap()),
            (Some(8080), None)
        );
        assert!(root.ports_in_force().join(".trial").exists());
    }
}
