//! What earlier passes left for this one, loaded once the lock is held. A pass folds into it what its effects came to,
//! and nobody else changes it.

use super::applied::{self, LastKnownGood};
use super::outcome::Outcome;
use super::overrides::{self, Overrides};
use super::root::Root;
use super::state::{ServicePhase, ServiceState, State};
use super::trial::Trial;
use super::{intent, lines};
use crate::clock::Timestamp;
use crate::error::Result;
use crate::files::if_there;
use crate::log;
use crate::names::{HostName, ServiceName};
use std::collections::{BTreeMap, BTreeSet};

/// What earlier passes left for this one.
#[derive(Debug, Clone)]
pub struct PersistedState {
    /// The state file.
    pub state: State,
    /// What was last known to be good of each service.
    pub applied: BTreeMap<ServiceName, LastKnownGood>,
    /// False when something of it could not be read: then nothing is removed.
    pub readable: bool,
    /// Services that an interrupted pass was about to touch.
    pub interrupted: BTreeSet<ServiceName>,
    /// Pauses and pins.
    pub overrides: Overrides,
    /// The invocations that were found to run what their units say.
    pub verified: BTreeMap<ServiceName, String>,
    /// What the Caddy of this host was found to be able to do.
    pub trial: Option<Trial>,
}

impl PersistedState {
    /// Reads it. Also whether the state, as an older program left it, has lines of the journal in it that everybody can
    /// read.
    pub(super) fn load(root: &Root, host: &HostName, now: Timestamp) -> Result<(Self, bool)> {
        let mut readable = true;
        let mut complain = |text: String| {
            log::warning(format!("{text}; nothing is removed in this pass"));
            readable = false;
        };
        let state = match if_there(fs_err::read(root.state_file()))? {
            Some(bytes) => State::parse(&bytes).unwrap_or_else(|e| {
                complain(format!("{} cannot be used: {e}", root.state_file().display()));
                State::new(host.clone(), now)
            }),
            None => State::new(host.clone(), now),
        };
        let exposed = lines::any(&state);
        let state = lines::load(root).put_back(state);
        let (applied, complaints) = applied::load(root)?;
        complaints.into_iter().for_each(&mut complain);
        let interrupted = intent::load(root)?;
        let overrides = overrides::load(root)?;
        let verified = state.services.iter();
        let verified = verified.filter_map(|(name, s)| Some((name.clone(), s.invocation.clone()?))).collect();
        let trial = Trial::load(root);
        Ok((PersistedState { state, applied, readable, interrupted, overrides, verified, trial }, exposed))
    }

    /// Folds what the pass has come to so far into it; whether the state now has a rejection that it had not.
    pub fn absorb(&mut self, outcome: &Outcome) -> bool {
        fold(&mut self.applied, &outcome.records);
        fold(&mut self.verified, &outcome.invocations);
        self.interrupted.retain(|name| !outcome.restarted.contains(name));
        let mut new = false;
        for ((name, _), failure) in outcome.failures.iter().filter(|(_, f)| f.is_rejected()) {
            let record = failure.record();
            let before = self.state.services.get(name).cloned();
            let before =
                before.unwrap_or_else(|| ServiceState::new(name.clone(), ServicePhase::Rejected, record.at));
            if before.failure.as_ref() == Some(record) {
                continue;
            }
            let rejected = ServiceState {
                status: ServicePhase::Rejected,
                since: record.at,
                failure: Some(record.clone()),
                secrets_changed: false,
                pinned_since: None,
                paused_until: None,
                removing: false,
                ..before
            };
            self.state.services.insert(name.clone(), rejected);
            // Not what the bucket has: the pass that finishes reports it.
            self.state.reported = false;
            new = true;
        }
        new
    }
}

/// Takes in what is new of each service; None: nothing any more.
fn fold<T: Clone>(known: &mut BTreeMap<ServiceName, T>, news: &BTreeMap<ServiceName, Option<T>>) {
    for (name, new) in news {
        match new {
            Some(new) => drop(known.insert(name.clone(), new.clone())),
            None => drop(known.remove(name)),
        }
    }
}
