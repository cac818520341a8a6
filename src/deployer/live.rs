//! What is on this host at this moment, for whoever asks from afar (`deployer state --live`): the state that the
//! last pass left, and what systemd says now of our units, of the deployer and of its timer. Reads only, needs no
//! root, and is not what a pass works from.

use super::root::{Root, STATE_FILE};
use super::state::State;
use super::{lines, observe};
use crate::clock::Timestamp;
use crate::error::Result;
use crate::files::{self, if_there};
use crate::manifest::Manifest;
use crate::manifest::parse::{self, Mode};
use crate::names::ServiceName;
use crate::systemd;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The version of the answer's form.
pub const LIVE_VERSION: u64 = 1;

/// The unit that makes the passes.
pub const DEPLOYER: &str = "deployer.service";
const TIMER: &str = "deployer.timer";

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LiveState {
    /// [`LIVE_VERSION`].
    pub version: u64,
    /// What the last pass left; null: there is none that can be read.
    pub state: Option<State>,
    /// Why there is none.
    #[serde(default)]
    pub state_error: Option<String>,
    /// What is now.
    pub live: Live,
    /// What came of starting the deployer, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartResult>,
}

/// What came of starting the deployer and waiting for its pass.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StartResult {
    /// What `systemctl start` ends with: 0 also when the pass has come to its result and only lets connections end; 5:
    /// there is no such unit (systemctl(1)).
    pub code: i32,
    /// What was said of a failure.
    #[serde(default)]
    pub said: String,
}

/// What is now.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Live {
    /// When it was looked.
    #[serde(default)]
    pub at: Timestamp,
    /// The units of our services.
    #[serde(default)]
    pub services: BTreeMap<ServiceName, Unit>,
    /// The unit that makes the passes.
    #[serde(default)]
    pub deployer: Option<Unit>,
    /// The unit that starts it.
    #[serde(default)]
    pub timer: Option<Unit>,
    /// The last line that the deployer wrote to the journal, where the asker may read that.
    #[serde(default)]
    pub last_line: Option<String>,
    /// What visitors of its domains meet, where that was asked for.
    #[serde(default)]
    pub domains: Vec<Visit>,
    /// What else is wrong with the host as a whole, each with its next move.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// What a visitor of one domain meets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visit {
    /// The domain, as the manifest has it.
    pub domain: String,
    /// The services behind it.
    pub services: Vec<ServiceName>,
    /// How it was found.
    pub verdict: Verdict,
    /// What was found and, unless it is well, what to do; without the domain. May hold text of others, with its control
    /// characters escaped.
    pub text: String,
}

/// How a fact was found, of a domain or by a check of `doctor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it must be.
    Ok,
    /// It works, and a person should know.
    Warn,
    /// Something will not work.
    Fail,
}

/// What systemd says of a unit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unit {
    /// `loaded`, `not-found`, `masked`, …
    pub load: String,
    /// `active`, `inactive`, `failed`, …
    pub active: String,
    /// `running`, `dead`, `auto-restart`, …
    pub sub: String,
    /// `success`, `exit-code`, …
    pub result: String,
    /// The exit code or signal of its main process, when that has ended.
    pub exit_status: i32,
    /// How often systemd restarted it by itself since it was started.
    pub restarts: u32,
    /// Its main process; 0: none.
    pub main_pid: u32,
    /// When it was last started, by whomever.
    #[serde(default)]
    pub started: Option<Timestamp>,
}

impl Unit {
    /// Up as far as systemd can tell.
    pub fn running(&self) -> bool {
        matches!(self.active.as_str(), "active" | "reloading" | "refreshing") && self.sub == "running"
    }
}

impl LiveState {
    /// Reads the form; the error is for people.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        files::versioned(bytes, LIVE_VERSION).map_err(|e| e.to_string())
    }
}

/// The manifest that this host's deployer obeys, if there is one.
pub fn obeyed(unit_dir: &Path) -> Option<Manifest> {
    let bytes = fs_err::read(Root::system(unit_dir).manifest()).ok()?;
    parse::manifest(&bytes, Mode::Tolerant).ok()
}

/// Looks.
pub fn look(unit_dir: &Path, now: Timestamp) -> Result<LiveState> {
    let root = Root::system(unit_dir);
    let (state, state_error) = match if_there(fs_err::read(root.state_file())) {
        Ok(Some(bytes)) => match State::parse(&bytes) {
            Ok(state) => (Some(lines::for_whoever_asks(&root, &state).put_back(state)), None),
            Err(why) => (None, Some(format!("{STATE_FILE} cannot be read: {why}"))),
        },
        Ok(None) => (None, Some("no pass has finished on this host".to_string())),
        Err(e) => (None, Some(crate::error::io_text(&e))),
    };
    let mut names: BTreeSet<ServiceName> = observe::ours(&root)?;
    names.extend(state.iter().flat_map(|s| s.services.keys().cloned()));
    let mut units: Vec<String> = names.iter().map(ServiceName::unit).collect();
    units.extend([DEPLOYER, TIMER].map(String::from));
    let mut shown = systemd::show(&units)?;
    let mut unit = |name: &str| {
        let shown = shown.remove(name).unwrap_or_default();
        Unit {
            load: shown.load,
            active: shown.active,
            sub: shown.sub,
            result: shown.result,
            exit_status: shown.exec_status,
            restarts: shown.restarts,
            main_pid: shown.main_pid,
            started: systemd::started(name).map(|(seconds, _)| Timestamp(seconds)),
        }
    };
    let services = names.into_iter().map(|name| (name.clone(), unit(&name.unit()))).collect();
    let (deployer, timer) = (unit(DEPLOYER), unit(TIMER));
    let last_line = if deployer.result == "success" { None } else { systemd::last_line(DEPLOYER) };
    let (deployer, timer) = (Some(deployer), Some(timer));
    let live = Live { at: now, services, deployer, timer, last_line, ..Live::default() };
    Ok(LiveState { version: LIVE_VERSION, state, state_error, live, start: None })
}
