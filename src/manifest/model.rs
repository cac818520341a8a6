//! What the manifest says, as types, and the one definition of its format: a field is declared here once, with its
//! type, its default and how it is written. What a single value may be is in [`super::types`]; reading it from a text,
//! with what spans fields, is in [`super::parse`], what spans services in [`super::validate`]. Fields are written in
//! the order a person reads them; those that this version does not know are kept in `extra` and written back.

use super::rules;
use super::types::{
    AbsolutePath, Ancestor, ArtifactKind, CommandLine, CpuQuota, CredentialName, DirectoryPath, Domain,
    EnvValue, MemoryMax, Port, ProbeHost, ProbePath, Profile, ProtectSystem, Restart, Rollout, Seconds,
    StateDirectory, UnitName, UrlPath, UserName, VariableName, WritablePath,
};
use super::types::{
    FORMAT_VERSION, format_version, given, hosts, line, list, protect_system, serial, words_list,
    words_or_null,
};
use crate::clock::Timestamp;
use crate::names::{HostName, STORE_DIR, ServiceName, StorePath};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The largest manifest that is read, in bytes.
pub const MAX_BYTES: u64 = 32 << 20;

/// Declares an object of the manifest: its fields are written in camelCase, and `FIELDS` has their names.
macro_rules! object {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
    }) => {
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", expecting = "an object")]
        $(#[$meta])*
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            /// Fields of a newer version.
            #[serde(flatten)]
            pub extra: Map<String, Value>,
        }

        impl $name {
            /// The names of the fields that this version knows.
            pub const FIELDS: &'static [&'static str] = &[$({
                const NAME: &([u8; stringify!($field).len()], usize) = &camel_case(stringify!($field));
                match std::str::from_utf8(NAME.0.split_at(NAME.1).0) {
                    Ok(name) => name,
                    Err(_) => panic!("a field's name is ASCII"),
                }
            }),*];
        }
    };
}

/// `internal_port` as `internalPort`, and `r#type` as `type`, with its length: as serde derives it.
const fn camel_case<const N: usize>(field: &str) -> ([u8; N], usize) {
    let field = field.as_bytes();
    let (mut name, mut length, mut at) = ([0; N], 0, 0);
    if N > 2 && field[1] == b'#' {
        at = 2;
    }
    while at < N {
        if field[at] == b'_' {
            at += 1;
            name[length] = field[at].to_ascii_uppercase();
        } else {
            name[length] = field[at];
        }
        length += 1;
        at += 1;
    }
    (name, length)
}

object! {
    /// The whole manifest.
    pub struct Manifest {
        /// The format, [`FORMAT_VERSION`].
        #[serde(deserialize_with = "format_version")]
        pub version: u64,
        /// Grows by one with every write.
        #[serde(deserialize_with = "serial")]
        pub serial: u64,
        /// When this version was written.
        pub generation: Timestamp,
        /// What this version changed, and who did.
        #[serde(default)]
        pub change: Change,
        /// The versions before it, nearest first; see [`super::lineage`].
        #[serde(default, deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
        pub previous: Vec<Ancestor>,
        /// The store it was signed for; see [`super::signature`].
        #[serde(default, deserialize_with = "words_or_null", skip_serializing_if = "Option::is_none")]
        pub store: Option<String>,
        /// Signatures of the canonical form, `NAME:BASE64`.
        #[serde(default, deserialize_with = "words_list", skip_serializing_if = "Vec::is_empty")]
        pub signatures: Vec<String>,
        /// The services, in the order they were added.
        pub services: Vec<Service>,
    }
}

object! {
    /// What a version changed.
    #[derive(Default)]
    pub struct Change {
        /// In words: `update ava`.
        #[serde(default, deserialize_with = "line")]
        pub action: String,
        /// `user@host`.
        #[serde(default, deserialize_with = "line")]
        pub by: String,
    }
}

object! {
    /// One service.
    pub struct Service {
        /// Its name, unique in the manifest.
        pub name: ServiceName,
        /// What runs.
        pub artifact: Artifact,
        /// The hosts it runs on.
        #[serde(default, deserialize_with = "hosts")]
        pub hosts: Vec<HostName>,
        /// How it is started.
        #[serde(default)]
        pub exec: Exec,
        /// Its environment; not secret (anybody on the host can read it).
        #[serde(default)]
        pub env: BTreeMap<VariableName, EnvValue>,
        /// A file of secrets on the host, `NAME=value` lines.
        #[serde(default)]
        pub env_file: Option<AbsolutePath>,
        /// Files of secrets on the host, by the name under which the service finds their content below
        /// `$CREDENTIALS_DIRECTORY`.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        pub credentials: BTreeMap<CredentialName, AbsolutePath>,
        /// How it is reached, if over HTTP.
        #[serde(default)]
        pub http: Option<Http>,
        /// How it shows that it is well.
        #[serde(default)]
        pub health: Option<Health>,
        /// How a new version takes over.
        #[serde(default)]
        pub rollout: Rollout,
        /// Words for its unit.
        #[serde(default)]
        pub systemd: Systemd,
        /// How far its unit is confined.
        #[serde(default)]
        pub hardening: Hardening,
        /// The commit it was built from.
        #[serde(default, deserialize_with = "words_or_null")]
        pub revision: Option<String>,
    }
}

/// The objects of a service, by the field that each stands in.
pub(super) const OBJECTS: [(&str, &[&str]); 6] = [
    ("artifact", Artifact::FIELDS),
    ("exec", Exec::FIELDS),
    ("http", Http::FIELDS),
    ("health", Health::FIELDS),
    ("systemd", Systemd::FIELDS),
    ("hardening", Hardening::FIELDS),
];

object! {
    /// What runs.
    pub struct Artifact {
        /// What it is.
        #[serde(default)]
        pub r#type: ArtifactKind,
        /// The closure's top path, or the placeholder of a service that waits for its first push.
        pub store_path: ArtifactPath,
    }
}

impl Artifact {
    /// A closure.
    pub fn of(store_path: ArtifactPath) -> Self {
        Artifact { r#type: ArtifactKind::NixClosure, store_path, extra: Map::new() }
    }
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

impl<'de> Deserialize<'de> for ArtifactPath {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        super::types::text(d, |text| match text.strip_prefix(STORE_DIR) {
            Some("/placeholder") => Ok(ArtifactPath::Placeholder),
            _ => StorePath::parse(text).map(ArtifactPath::Path),
        })
    }
}

object! {
    /// How a service is started.
    #[derive(Default)]
    #[serde(default)]
    pub struct Exec {
        /// The command line; null is `<storePath>/bin/<name>`.
        pub command: Option<CommandLine>,
        /// The user it runs as.
        pub user: UserName,
        /// The group it runs as.
        pub group: UserName,
    }
}

object! {
    /// How a service is reached.
    pub struct Http {
        /// The domain.
        pub domain: Domain,
        /// The path below which requests go to the service, `/` for all.
        #[serde(default)]
        pub path: UrlPath,
        /// The port it listens on, on 127.0.0.1.
        pub internal_port: Port,
        /// The variable of `env` that tells the service its port; None: the one whose value is `internalPort`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub port_env: Option<VariableName>,
        /// How long connections may take to end before an instance is stopped.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub drain_sec: Option<Seconds<0, 3600>>,
    }
}

object! {
    /// How a service shows that it is well.
    pub struct Health {
        /// What is asked with GET on the internal port; 2xx and 3xx are well. None: a TCP connect.
        #[serde(default)]
        pub path: Option<ProbePath>,
        /// The name that it is asked by, as `Host`; None: the domain's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub host: Option<ProbeHost>,
        /// How long it may take to come up.
        #[serde(default = "default_timeout")]
        pub timeout_sec: Seconds<1, 3600>,
    }
}

fn default_timeout() -> Seconds<1, 3600> {
    Seconds(DEFAULT_TIMEOUT_SEC)
}

/// How long a service without `health` may take to come up, in seconds.
pub const DEFAULT_TIMEOUT_SEC: u32 = 30;

/// How long connections may take to end before an instance is stopped, in seconds, where nothing else is said.
pub const DEFAULT_DRAIN_SEC: u32 = 10;

object! {
    /// Words for the unit; each is systemd's directive of that name (systemd.unit(5), systemd.service(5),
    /// systemd.exec(5), systemd.resource-control(5)).
    #[serde(default)]
    pub struct Systemd {
        /// `After=`.
        #[serde(deserialize_with = "list")]
        pub after: Vec<UnitName>,
        /// `Requires=`.
        #[serde(deserialize_with = "list")]
        pub requires: Vec<UnitName>,
        /// `Restart=`.
        pub restart: Restart,
        /// `RestartSec=`.
        pub restart_sec: Seconds<0, 86_400>,
        /// `StateDirectory=`, below /var/lib.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub state_directory: Option<StateDirectory>,
        /// `ReadWritePaths=`.
        #[serde(deserialize_with = "list", skip_serializing_if = "Vec::is_empty")]
        pub read_write_paths: Vec<WritablePath>,
        /// `MemoryMax=`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub memory_max: Option<MemoryMax>,
        /// `CPUQuota=`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub cpu_quota: Option<CpuQuota>,
        /// `WorkingDirectory=`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub working_directory: Option<DirectoryPath>,
        /// `TimeoutStopSec=`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub stop_timeout_sec: Option<Seconds<1, 3600>>,
    }
}

impl Default for Systemd {
    fn default() -> Self {
        Systemd {
            after: vec![UnitName(UnitName::NETWORK_ONLINE.into())],
            requires: Vec::new(),
            restart: Restart::OnFailure,
            restart_sec: Seconds(5),
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

object! {
    /// How far the unit is confined.
    #[serde(default)]
    pub struct Hardening {
        /// What holds besides the fields below.
        #[serde(skip_serializing_if = "Profile::is_default")]
        pub profile: Profile,
        /// `DynamicUser=`. What was read has it: where it is left out, the profile and the user decide
        /// ([`Service::dynamic_user`]).
        #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
        pub dynamic_user: Option<bool>,
        /// `PrivateTmp=`.
        pub private_tmp: bool,
        /// `ProtectSystem=`.
        #[serde(deserialize_with = "protect_system")]
        pub protect_system: ProtectSystem,
        /// `ProtectHome=`.
        pub protect_home: bool,
    }
}

impl Default for Hardening {
    fn default() -> Self {
        Hardening {
            profile: Profile::Default,
            dynamic_user: None,
            private_tmp: true,
            protect_system: ProtectSystem::Strict,
            protect_home: true,
            extra: Map::new(),
        }
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

    /// The hosts that it names.
    pub fn hosts(&self) -> BTreeSet<HostName> {
        self.services.iter().flat_map(|s| s.hosts.iter().cloned()).collect()
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
    /// Its executable, absolute, and the arguments, when `path` is its closure.
    pub fn program(&self, path: &StorePath) -> (PathBuf, Vec<String>) {
        let below = PathBuf::from(path.as_str());
        let mut words = self.exec.command.iter().flat_map(CommandLine::words);
        match words.next() {
            // Joining an absolute path gives that path.
            Some(first) => (below.join(first), words.collect()),
            None => (below.join("bin").join(self.name.as_str()), Vec::new()),
        }
    }

    /// How long it may take to come up, in seconds.
    pub fn timeout_sec(&self) -> u32 {
        self.health.as_ref().map_or(DEFAULT_TIMEOUT_SEC, |h| h.timeout_sec.get())
    }

    /// What of the entry decides how it is asked whether it is well: the port, and the path with the host's name.
    pub fn probe(&self) -> Option<(u16, Option<(&str, String)>)> {
        let http = self.http.as_ref()?;
        let path = self.health.as_ref().and_then(|h| h.path.as_deref());
        Some((http.internal_port.get(), path.map(|path| (path, self.probed_as(http)))))
    }

    /// The name by which it is asked: `health.host`, else its domain, or where that is a wildcard `www` below it. A
    /// pattern is no name, and frameworks that look at names refuse it.
    fn probed_as(&self, http: &Http) -> String {
        let set = self.health.as_ref().and_then(|h| h.host.as_ref());
        match (set, http.domain.strip_prefix("*.")) {
            (Some(host), _) => host.to_string(),
            (None, Some(below)) => format!("www.{below}"),
            (None, None) => http.domain.to_string(),
        }
    }

    /// The port on which it is reached, if it is.
    pub fn port(&self) -> Option<u16> {
        self.http.as_ref().map(|h| h.internal_port.get())
    }

    /// Its files of secrets, which must be root's alone: `envFile` and those of `credentials`.
    pub fn secret_files(&self) -> impl Iterator<Item = &Path> {
        self.env_file.iter().chain(self.credentials.values()).map(|path| Path::new(&**path))
    }

    /// Whether systemd makes its user. Under the strict profile it does for a service that names none.
    pub fn dynamic_user(&self) -> bool {
        let by_profile =
            || self.hardening.profile == Profile::Strict && self.exec.user == UserName::default();
        self.hardening.dynamic_user.unwrap_or_else(by_profile)
    }

    /// The name of the user that systemd makes for it under `dynamicUser`; None: the one that systemd derives from
    /// its unit's name, which is another one for a second instance. The strict profile gives the first derivation
    /// to both, where the service's name can be a user's.
    pub fn dynamic_user_name(&self) -> Option<&str> {
        if self.exec.user != UserName::default() {
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
            return self.env.contains_key(name.as_str()).then_some(name);
        }
        let port = http.internal_port.to_string();
        let mut holders =
            self.env.iter().filter(|(_, value)| value.as_str() == port).map(|(name, _)| name.as_str());
        let first = holders.next()?;
        if first == "PORT" || holders.next().is_none() {
            return Some(first);
        }
        self.env.get("PORT").is_some_and(|value| value.as_str() == port).then_some("PORT")
    }

    /// The same service on another port, as an overlapping rollout starts it; None without a variable to say so.
    pub fn on_port(&self, port: u16) -> Option<Service> {
        let variable = VariableName(self.port_variable()?.to_string());
        let mut other = self.clone();
        other.env.insert(variable, EnvValue(port.to_string()));
        other.http.as_mut()?.internal_port = Port(port);
        Some(other)
    }

    /// How long its connections may take to end, in seconds.
    pub fn drain_sec(&self) -> u32 {
        self.http.as_ref().and_then(|h| h.drain_sec).map_or(DEFAULT_DRAIN_SEC, Seconds::get)
    }
}
