//! The one root: every path on the host hangs from here.

use crate::lock::RUN_DIR;
use crate::names::ServiceName;
use std::path::{Path, PathBuf};

/// The deployer's folders on this host.
#[derive(Debug, Clone)]
pub struct Root {
    /// State, last good manifest, applied entries: `/var/lib/deployer`.
    pub state_dir: PathBuf,
    /// What need not outlive a boot, and costs no disk: `/run/omni-deploy`.
    pub run_dir: PathBuf,
    /// Where our units are.
    pub unit_dir: PathBuf,
    /// Our roots against Nix's garbage collector.
    pub gcroots: PathBuf,
}

/// The folder of the deployer's state.
pub const STATE_DIR: &str = "/var/lib/deployer";

/// The state file's path, as the runbook has it.
pub const STATE_FILE: &str = "/var/lib/deployer/state.json";

impl Root {
    /// This machine, with units in `unit_dir`.
    pub fn system(unit_dir: &Path) -> Self {
        Root {
            state_dir: PathBuf::from(STATE_DIR),
            run_dir: PathBuf::from(RUN_DIR),
            unit_dir: unit_dir.to_path_buf(),
            gcroots: PathBuf::from(crate::nix::GCROOTS),
        }
    }

    /// The state file.
    pub fn state_file(&self) -> PathBuf {
        self.state_dir.join("state.json")
    }

    /// The last journal lines of what failed, root's alone.
    pub fn lines(&self) -> PathBuf {
        self.state_dir.join("lines.json")
    }

    /// The last manifest that was good, byte for byte.
    pub fn manifest(&self) -> PathBuf {
        self.state_dir.join("manifest.json")
    }

    /// Which version of which store that manifest is.
    pub fn manifest_origin(&self) -> PathBuf {
        self.state_dir.join("manifest.origin.json")
    }

    /// Pauses and pins.
    pub fn overrides(&self) -> PathBuf {
        self.state_dir.join("overrides.json")
    }

    /// What the pass under way is about to touch.
    pub fn intent(&self) -> PathBuf {
        self.state_dir.join("intent.json")
    }

    /// Which version of the manifest the pass under way reads.
    pub fn reading(&self) -> PathBuf {
        self.run_dir.join("reading.json")
    }

    /// What was last verified of each service: the entry of the manifest that its unit was made from.
    pub fn applied_dir(&self) -> PathBuf {
        self.state_dir.join("applied")
    }

    /// The entry last verified of one service.
    pub fn applied(&self, name: &ServiceName) -> PathBuf {
        self.applied_dir().join(format!("{name}.json"))
    }

    /// The folder of the files that Caddy reads ports from.
    pub fn ports_in_force(&self) -> PathBuf {
        self.run_dir.join("ports")
    }

    /// What systemd-tmpfiles fills that folder from at boot.
    pub fn ports_at_boot(&self) -> PathBuf {
        self.state_dir.join("ports")
    }

    /// What the Caddy of this host was found to be able to do.
    pub fn trial(&self) -> PathBuf {
        self.state_dir.join("caddy.json")
    }

    /// A service's unit.
    pub fn unit(&self, name: &ServiceName) -> PathBuf {
        self.unit_dir.join(name.unit())
    }

    /// The unit of a service's candidate.
    pub fn next_unit(&self, name: &ServiceName) -> PathBuf {
        self.unit_dir.join(name.next_unit())
    }

    /// The folder of the links that start services at boot.
    pub fn wants_dir(&self) -> PathBuf {
        self.unit_dir.join("multi-user.target.wants")
    }

    /// The link that starts a service at boot.
    pub fn boot_link(&self, name: &ServiceName) -> PathBuf {
        self.wants_dir().join(name.unit())
    }

    /// The folder of a service's roots.
    pub fn roots(&self, name: &ServiceName) -> PathBuf {
        self.gcroots.join(name.as_str())
    }
}
