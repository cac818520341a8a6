//! What was seen of the host: values, made by [`super::observe`] alone, and changed by nobody.

use super::caddy::CaddyState;
use super::listeners::Answers;
use super::ports::PortFiles;
use crate::names::{ServiceName, StorePath};
use crate::systemd::Listed;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// What was seen of the host.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Units: of every service that should be here, and every other one that is ours.
    pub units: BTreeMap<ServiceName, UnitSeen>,
    /// Which of the paths in question are in this machine's store.
    pub present: BTreeSet<StorePath>,
    /// Our roots: service to the names (`HASH-NAME`) of what it holds.
    pub roots: BTreeMap<ServiceName, BTreeSet<String>>,
    /// Secrets files of services that have one: what identifies their present content, or why they cannot be
    /// used.
    pub secrets: BTreeMap<ServiceName, Result<String, String>>,
    /// The service units that are active, whoever's they are.
    pub active: BTreeSet<String>,
    /// Who would answer at the ports of the services that should be here; what is not here is not known.
    pub ports: BTreeMap<(ServiceName, u16), Answers>,
    /// Services that found their port in use at another address than 127.0.0.1 when they were tried last, where
    /// somebody still has it.
    pub kept_out: BTreeSet<ServiceName>,
    /// Services that have a candidate.
    pub candidates: BTreeSet<ServiceName>,
    /// Services about to change whose `NAME-next` is somebody else's unit, there.
    pub foreign_next: BTreeMap<ServiceName, PathBuf>,
    /// Caddy.
    pub caddy: CaddyState,
    /// How requests move to another port.
    pub switching: Switching,
}

/// How requests move to another port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Switching {
    /// By a change of Caddy's configuration.
    Configuration,
    /// As before, until it has been tried whether this program reads ports from files: by these files, if the route that
    /// Caddy has already does.
    Untried(String, Option<PortFiles>),
    /// By these files.
    Files(PortFiles),
}

impl Switching {
    /// The files, where Caddy reads them.
    pub fn files(&self) -> Option<&PortFiles> {
        match self {
            Switching::Files(files) => Some(files),
            Switching::Untried(_, files) => files.as_ref(),
            Switching::Configuration => None,
        }
    }
}

/// What was seen of one unit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UnitSeen {
    /// Its file.
    pub file: UnitFile,
    /// Whether it is started at boot.
    pub enabled: bool,
    /// What systemd says of it.
    pub listed: Listed,
    /// Its process started after its file was written. Only of units that run.
    pub current: bool,
    /// Its process runs no closure that its file names: it was started from another one.
    pub wrong_closure: bool,
    /// systemd has read its file as it was before. Only of units that run: a start reads it anew.
    pub needs_reload: bool,
    /// Another file of its name, a mask or a copy of ours, may stand in for it.
    pub shadowed: bool,
    /// Its secrets file was changed after its process started.
    pub secrets_changed: bool,
    /// Somebody's drop-ins: those that systemd has loaded with its file, and those that it would load.
    pub drop_ins: Vec<PathBuf>,
    /// What systemd has loaded starts something else than its file says: what.
    pub replaced: Option<String>,
    /// The closure that its process shows, one that its file names before others. Only where it was looked for.
    pub shows: Option<StorePath>,
    /// Its present invocation. Only of units that run.
    pub invocation: Option<String>,
    /// That invocation was found to run what its file says, with nobody's drop-ins: by an earlier pass, or by the
    /// watch of this one.
    pub verified: bool,
    /// The same by this look alone, which cannot tell what was loaded when it was started.
    pub clean: bool,
}

/// A unit's file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum UnitFile {
    /// There is none.
    #[default]
    Absent,
    /// One with our mark.
    Ours(String),
    /// Somebody else's, there.
    Foreign(PathBuf),
}
