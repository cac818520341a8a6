//! What the manifest says, as types. Parsing and its error paths are in [`super::parse`], checks across
//! services in [`super::validate`]. Serializing writes every field in the order a person reads them; fields
//! this version does not know are kept in `extra` and written back.

use super::lineage::Ancestor;
use super::rules;
use crate::clock::Timestamp;
use crate::names::{HostName, STORE_DIR, ServiceName, StorePath};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// The version of the format that this program writes, and the highest it reads.
pub const FORMAT_VERSION: u64 = 1;

/// The largest manifest that is read, in bytes.
pub const MAX_BYTES: u64 = 32 << 20;

/// The whole manifest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Manifest {
    /// The format, [`FORMAT_VERSION`].
    pub version: u64,
    /// Grows by one with every write.
    pub serial: u64,
    /// When this version was written.
    pub generation: Timestamp,
    /// What this version changed, and who did.
    pub change: Change,
    /// The versions before it, nearest first; see [`super::lineage`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<Ancestor>,
    /// The store it was signed for; see [`super::signature`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
    /// Signatures of the canonical form, `NAME:BASE64`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub signatures: Vec<String>,
    /// The services, in the order they were added.
    pub services: Vec<Service>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// What a version changed.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Change {
    /// In words: `update ava`.
    pub action: String,
    /// `user@host`.
    pub by: String,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Its name, unique in the manifest.
    pub name: ServiceName,
    /// What runs.
    pub artifact: Artifact,
    /// The hosts it runs on.
    pub hosts: Vec<HostName>,
    /// How it is started.
    pub exec: Exec,
    /// Its environment; not secret (anybody on the host can read it).
    pub env: BTreeMap<String, String>,
    /// A file of secrets on the host, `NAME=value` lines; absolute.
    pub env_file: Option<String>,
    /// Files of secrets on the host, by the name under which the service finds their content below
    /// `$CREDENTIALS_DIRECTORY`; absolute.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub credentials: BTreeMap<String, String>,
    /// How it is reached, if over HTTP.
    pub http: Option<Http>,
    /// How it shows that it is well.
    pub health: Option<Health>,
    /// How a new version takes over.
    pub rollout: Rollout,
    /// Words for its unit.
    pub systemd: Systemd,
    /// How far its unit is confined.
    pub hardening: Hardening,
    /// The commit it was built from.
    pub revision: Option<String>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// What runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Always `nix-closure`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The closure's top path, or the placeholder of a service that waits for its first push.
    pub store_path: ArtifactPath,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A store path, or the promise of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArtifactPath {
    /// `/nix/store/placeholder`: nothing was pushed yet.
    Placeholder,
    /// What to run.
    Path(StorePath),
}

impl ArtifactPath {
    /// The path, unless it is still a placeholder.
    pub fn path(&self) -> Option<&StorePath> {
        match self {
            ArtifactPath::Placeholder => None,
            ArtifactPath::Path(path) => Some(path),
        }
    }
}

impl std::fmt::Display for ArtifactPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ArtifactPath::Placeholder => write!(f, "{STORE_DIR}/placeholder"),
            ArtifactPath::Path(path) => path.fmt(f),
        }
    }
}

impl Serialize for ArtifactPath {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// How a service is started.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exec {
    /// The command line, words quoted as in a shell (no variables, no expansion); null is
    /// `<storePath>/bin/<name>`. A first word that is not absolute is taken below the store path.
    pub command: Option<String>,
    /// The user it runs as.
    pub user: String,
    /// The group it runs as.
    pub group: String,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Default for Exec {
    fn default() -> Self {
        Exec { command: None, user: "root".into(), group: "root".into(), extra: Map::new() }
    }
}

/// How a service is reached.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Http {
    /// The domain, lower-case; may begin with `*.`.
    pub domain: String,
    /// The path below which requests go to the service, `/` for all; no trailing slash otherwise.
    pub path: String,
    /// The port it listens on, on 127.0.0.1.
    pub internal_port: u16,
    /// The variable of `env` that tells the service its port; None: the one whose value is `internalPort`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_env: Option<String>,
    /// How long connections may take to end before an instance is stopped, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_sec: Option<u32>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// How a service shows that it is well.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Health {
    /// What is asked with GET on the internal port; 2xx and 3xx are well. None: a TCP connect.
    pub path: Option<String>,
    /// The name that it is asked by, as `Host`; None: the domain's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// How long it may take to come up, in seconds.
    pub timeout_sec: u32,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// How long a service without `health` may take to come up, in seconds.
pub const DEFAULT_TIMEOUT_SEC: u32 = 30;

/// How a new version takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rollout {
    /// The unit is restarted; Caddy holds requests meanwhile.
    #[default]
    Restart,
    /// The new version is proved beside the old one, on a spare port, before traffic moves to it; no request
    /// fails. For services that take their port from the environment.
    Overlap,
}

/// How long connections may take to end before an instance is stopped, in seconds, where nothing else is said.
pub const DEFAULT_DRAIN_SEC: u32 = 10;

/// Words for the unit; each is systemd's directive of that name (systemd.unit(5), systemd.service(5),
/// systemd.exec(5), systemd.resource-control(5)).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Systemd {
    /// `After=`.
    pub after: Vec<String>,
    /// `Requires=`.
    pub requires: Vec<String>,
    /// `Restart=`.
    pub restart: String,
    /// `RestartSec=`, in seconds.
    pub restart_sec: u32,
    /// `StateDirectory=`, below /var/lib.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_directory: Option<String>,
    /// `ReadWritePaths=`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub read_write_paths: Vec<String>,
    /// `MemoryMax=`, as systemd writes it: `512M`, `50%`, `infinity`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<String>,
    /// `CPUQuota=`, as systemd writes it: `150%`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_quota: Option<String>,
    /// `WorkingDirectory=`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_directory: Option<String>,
    /// `TimeoutStopSec=`, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_timeout_sec: Option<u32>,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Default for Systemd {
    fn default() -> Self {
        Systemd {
            after: vec!["network-online.target".into()],
            requires: Vec::new(),
            restart: "on-failure".into(),
            restart_sec: 5,
            state_directory: None,
            read_write_paths: Vec::new(),
            memory_max: None,
            cpu_quota: None,
            working_directory: None,
            stop_timeout_sec: None,
            extra: Map::new(),
        }
    }
}

/// How far a unit is confined besides what its entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Not at all.
    #[default]
    Default,
    /// As far as a network service that generates no code can be: see `STRICT` in the deployer's `unit.rs`.
    Strict,
}

impl Profile {
    /// The names of all.
    pub const NAMES: [&str; 2] = ["default", "strict"];

    fn is_default(&self) -> bool {
        *self == Profile::Default
    }
}

/// How far the unit is confined.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hardening {
    /// What holds besides the fields below.
    #[serde(skip_serializing_if = "Profile::is_default")]
    pub profile: Profile,
    /// `DynamicUser=`.
    pub dynamic_user: bool,
    /// `PrivateTmp=`.
    pub private_tmp: bool,
    /// `ProtectSystem=`: `no`, `yes`, `full` or `strict`.
    pub protect_system: String,
    /// `ProtectHome=`.
    pub protect_home: bool,
    /// Fields of a newer version.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Hardening {
    /// What an entry gets that gives the profile and no other field. Under the strict one a service that names no
    /// user gets one that systemd makes for it.
    pub fn of(profile: Profile, exec: &Exec) -> Self {
        Hardening {
            profile,
            dynamic_user: profile == Profile::Strict && exec.user == Exec::default().user,
            private_tmp: true,
            protect_system: "strict".into(),
            protect_home: true,
            extra: Map::new(),
        }
    }
}

impl Default for Hardening {
    fn default() -> Self {
        Hardening::of(Profile::Default, &Exec::default())
    }
}

impl Manifest {
    /// The first version: no services.
    pub fn empty(now: Timestamp, by: &str) -> Self {
        Manifest {
            version: FORMAT_VERSION,
            serial: 1,
            generation: now,
            change: Change { action: "init".into(), by: by.into(), extra: Map::new() },
            previous: Vec::new(),
            store: None,
            signatures: Vec::new(),
            services: Vec::new(),
            extra: Map::new(),
        }
    }

    /// The service of that name.
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.iter().find(|s| s.name.as_str() == name)
    }

    /// The bytes that are stored: pretty-printed JSON with a newline at the end.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Serializing plain data into memory cannot fail: no map has a key that is not a string.
        let mut bytes = serde_json::to_vec_pretty(self).expect("plain data with text keys serializes");
        bytes.push(b'\n');
        bytes
    }
}

impl Service {
    /// How long it may take to come up, in seconds.
    pub fn timeout_sec(&self) -> u32 {
        self.health.as_ref().map_or(DEFAULT_TIMEOUT_SEC, |h| h.timeout_sec)
    }

    /// What of the entry decides how it is asked whether it is well: the port, and the path with the host's name.
    pub fn probe(&self) -> Option<(u16, Option<(&str, String)>)> {
        let http = self.http.as_ref()?;
        let path = self.health.as_ref().and_then(|h| h.path.as_deref());
        Some((http.internal_port, path.map(|path| (path, self.probed_as(http)))))
    }

    /// The name by which it is asked: `health.host`, else its domain, or where that is a wildcard `www` below it. A
    /// pattern is no name, and frameworks that look at names refuse it.
    fn probed_as(&self, http: &Http) -> String {
        let set = self.health.as_ref().and_then(|h| h.host.clone());
        set.unwrap_or_else(|| match http.domain.strip_prefix("*.") {
            Some(below) => format!("www.{below}"),
            None => http.domain.clone(),
        })
    }

    /// The port on which it is reached, if it is.
    pub fn port(&self) -> Option<u16> {
        self.http.as_ref().map(|h| h.internal_port)
    }

    /// Its files of secrets, which must be root's alone: `envFile` and those of `credentials`.
    pub fn secret_files(&self) -> impl Iterator<Item = &Path> {
        self.env_file.iter().chain(self.credentials.values()).map(Path::new)
    }

    /// The name of the user that systemd makes for it under `dynamicUser`; None: the one that systemd derives from
    /// its unit's name, which is another one for a second instance. The strict profile gives the first derivation
    /// to both, where the service's name can be a user's.
    pub fn dynamic_user_name(&self) -> Option<&str> {
        if self.exec.user != Exec::default().user {
            return Some(&self.exec.user);
        }
        let name = self.name.as_str();
        let usable = rules::user(name).is_ok() && !name.starts_with(|c: char| c.is_ascii_digit());
        (self.hardening.profile == Profile::Strict && usable).then_some(name)
    }

    /// The variable of its environment that holds its port: the one that `http.portEnv` names, else the one
    /// whose value is `internalPort` (`PORT` if there are several). None: an overlap cannot give it another.
    pub fn port_variable(&self) -> Option<&str> {
        let http = self.http.as_ref()?;
        if let Some(name) = &http.port_env {
            return self.env.contains_key(name).then_some(name);
        }
        let port = http.internal_port.to_string();
        let mut holders = self.env.iter().filter(|(_, value)| **value == port).map(|(name, _)| name.as_str());
        let first = holders.next()?;
        if first == "PORT" || holders.next().is_none() {
            return Some(first);
        }
        (self.env.get("PORT") == Some(&port)).then_some("PORT")
    }

    /// The same service on another port, as an overlapping rollout starts it; None without a variable to say so.
    pub fn on_port(&self, port: u16) -> Option<Service> {
        let variable = self.port_variable()?.to_string();
        let mut other = self.clone();
        other.env.insert(variable, port.to_string());
        other.http.as_mut()?.internal_port = port;
        Some(other)
    }

    /// How long its connections may take to end, in seconds.
    pub fn drain_sec(&self) -> u32 {
        self.http.as_ref().and_then(|h| h.drain_sec).unwrap_or(DEFAULT_DRAIN_SEC)
    }
}
