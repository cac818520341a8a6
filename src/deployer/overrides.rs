//! What a person on the host decided against the manifest: services paused (stopped on purpose) and pinned (held
//! at an earlier closure). Kept in one file, shown by `status`, and ended by the word that began it, by time, or
//! by the manifest moving on.

use super::applied::LastKnownGood;
use super::lines;
use super::root::Root;
use crate::clock::Timestamp;
use crate::durable;
use crate::error::{Error, Result};
use crate::files::{self, FormatError, if_there};
use crate::manifest::{ArtifactPath, Service};
use crate::names::{ServiceName, StorePath};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const VERSION: u64 = 1;

/// Everything that was decided here.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Overrides {
    version: u64,
    /// Services that are stopped on purpose.
    #[serde(default)]
    pub paused: BTreeMap<ServiceName, Pause>,
    /// Services that are held at an earlier closure.
    #[serde(default)]
    pub pinned: BTreeMap<ServiceName, Pin>,
}

/// A service that is stopped on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// When it began.
    pub since: Timestamp,
    /// When it ends by itself; None: with `deployer resume`.
    pub until: Option<Timestamp>,
}

/// A service that is held at an earlier closure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The closure.
    pub path: StorePath,
    /// What the manifest named when it began; another path there ends it.
    pub instead: StorePath,
    /// When it began.
    pub since: Timestamp,
}

/// What a person on the host decides against the manifest, or takes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Stop it, for so many seconds or until it is resumed.
    Pause(Option<i64>),
    /// End that.
    Resume,
    /// Hold it at the closure that ran before.
    Rollback,
    /// End that.
    Unpin,
}

impl Overrides {
    /// Adds a decision about a service. `named`: what the manifest names for it.
    pub fn decide(
        &mut self,
        decision: &Decision,
        good: &LastKnownGood,
        named: impl FnOnce() -> Result<StorePath>,
        now: Timestamp,
    ) -> Result<()> {
        let name = &good.service.name;
        let is_not =
            |what: &str| Error::new(format!("{name} is not {what}; 'deployer state' shows how it stands"));
        match decision {
            Decision::Pause(length) => {
                let until = length.map(|seconds| Timestamp(now.0.saturating_add(seconds)));
                self.paused.insert(name.clone(), Pause { since: now, until });
            }
            Decision::Resume => {
                self.paused.remove(name).ok_or_else(|| is_not("paused"))?;
            }
            Decision::Rollback => {
                let instead = named()?;
                // Not what the manifest names: a second step back is not a step forward.
                let earlier = |p: &&StorePath| **p != instead && fs_err::symlink_metadata(p).is_ok();
                let path = good.previous.iter().find(earlier).cloned().ok_or_else(|| {
                    Error::new(format!(
                        "{name} has no earlier closure on this host; go back with 'deploy-manifest rollback --service {name}'"
                    ))
                })?;
                self.pinned.insert(name.clone(), Pin { path, instead, since: now });
            }
            Decision::Unpin => {
                self.pinned.remove(name).ok_or_else(|| is_not("pinned"))?;
            }
        }
        Ok(())
    }

    /// Whether a service is paused at `now`.
    pub fn is_paused(&self, name: &ServiceName, now: Timestamp) -> bool {
        self.paused.get(name).is_some_and(|p| p.until.is_none_or(|until| now < until))
    }

    /// The pin of a service, while the manifest still names what it stands against.
    pub fn pin(&self, service: &Service) -> Option<&Pin> {
        let pin = self.pinned.get(&service.name)?;
        (service.artifact.store_path.path() == Some(&pin.instead)).then_some(pin)
    }

    /// The entry with its pinned path, if it is pinned.
    pub fn apply(&self, service: &Service) -> Service {
        let mut service = service.clone();
        if let Some(pin) = self.pin(&service) {
            service.artifact.store_path = ArtifactPath::Path(pin.path.clone());
        }
        service
    }

    /// Drops what has ended: by time, by the manifest, with the service. Returns whether there was any.
    pub fn expire(&mut self, desired: &[&Service], now: Timestamp) -> bool {
        let before = self.paused.len() + self.pinned.len();
        self.paused.retain(|name, pause| {
            desired.iter().any(|s| s.name == *name) && pause.until.is_none_or(|until| now < until)
        });
        let kept: BTreeMap<ServiceName, Pin> =
            desired.iter().filter_map(|s| self.pin(s).map(|pin| (s.name.clone(), pin.clone()))).collect();
        self.pinned = kept;
        before != self.paused.len() + self.pinned.len()
    }
}

/// Reads them; none when there is no file. A file that cannot be used is an error: starting what somebody
/// stopped on purpose could do harm.
pub fn load(root: &Root) -> Result<Overrides> {
    let path = root.overrides();
    let Some(bytes) = if_there(fs_err::read(&path))? else { return Ok(Overrides::default()) };
    files::versioned(&bytes, VERSION).map_err(|e| {
        let remedy = match e {
            FormatError::Newer(..) => "upgrade omni-deploy",
            FormatError::Broken(_) => "remove it to drop all pauses and pins",
        };
        Error::new(format!("{} cannot be used: {e}; {remedy}", path.display()))
    })
}

/// Writes them.
pub fn save(root: &Root, overrides: &Overrides) -> Result<()> {
    if overrides.paused.is_empty() && overrides.pinned.is_empty() {
        durable::remove(&root.overrides())?;
        return Ok(());
    }
    let written = Overrides { version: VERSION, ..overrides.clone() };
    durable::write(&root.overrides(), &lines::to_bytes(&written)?, 0o644)?;
    Ok(())
}
