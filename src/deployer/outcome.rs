//! What effects came to: those of a phase, of a round, of the pass so far. The next plan goes by it, and what is
//! persisted is folded from it ([`super::persisted`]). It decides nothing.

use super::applied::LastKnownGood;
use super::state::{Exposure, FailureRecord, RouteState};
use crate::error::{Error, Result};
use crate::manifest::Http;
use crate::names::{ServiceName, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// Why something does not run as the manifest says.
#[derive(Debug, Clone, PartialEq)]
pub enum AttemptFailure {
    /// The release itself is bad: known by its inputs, and not tried again by itself.
    Rejected(FailureRecord),
    /// Something is in its way: tried again by the next pass, or where its closure cannot be had, less and less often.
    Host(FailureRecord),
}

impl AttemptFailure {
    /// The reason.
    pub fn record(&self) -> &FailureRecord {
        match self {
            AttemptFailure::Rejected(record) | AttemptFailure::Host(record) => record,
        }
    }

    /// The same, to be corrected.
    pub fn record_mut(&mut self) -> &mut FailureRecord {
        match self {
            AttemptFailure::Rejected(record) | AttemptFailure::Host(record) => record,
        }
    }

    /// Whether the release itself is bad.
    pub fn is_rejected(&self) -> bool {
        matches!(self, AttemptFailure::Rejected(_))
    }
}

/// A pass ended without having done its work.
#[derive(Debug)]
pub(super) struct PassError {
    pub(super) by: EndedBy,
    pub(super) error: Error,
}

/// What ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndedBy {
    /// Somebody typed what cannot be: nothing is wrong with the host.
    Typing,
    /// The store was asked and did not answer.
    Store,
    /// It is the manifest that cannot be obeyed.
    Manifest,
    /// Anything else.
    Other,
}

impl<E: Into<Error>> From<E> for PassError {
    fn from(error: E) -> Self {
        PassError { by: EndedBy::Other, error: error.into() }
    }
}

/// A stop or start that takes its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingJob {
    /// What it is at, for people.
    pub why: String,
    /// The unit that is waited for: its own, or the one that has its port.
    pub unit: String,
    /// When it was asked for.
    pub since: Instant,
    /// Whether there is something to do once it is through.
    pub awaited: bool,
}

/// What happened.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Whether units, processes or the route were changed.
    pub changed: bool,
    /// Attempts that failed, by service and inputs.
    pub failures: BTreeMap<(ServiceName, String), AttemptFailure>,
    /// Paths that could not be fetched, with the reason.
    pub unfetchable: BTreeMap<StorePath, String>,
    /// What came up, and is taken down as the last known good; None: the service is gone.
    pub records: BTreeMap<ServiceName, Option<LastKnownGood>>,
    /// Invocations that were found to run what their units say; None: they run with somebody's drop-ins.
    pub invocations: BTreeMap<ServiceName, Option<String>>,
    /// Services of which no process is left from before a pass that was interrupted.
    pub restarted: BTreeSet<ServiceName>,
    /// Services that were started: what was known of their exposure was of their unit before.
    pub started: BTreeSet<ServiceName>,
    /// The exposure of units after the last start, by name; none where systemd did not say.
    pub exposures: BTreeMap<String, Exposure>,
    /// Candidates that are well, verified with these inputs: where they are asked.
    pub candidates: BTreeMap<ServiceName, (Http, String)>,
    /// Those of them that have the requests of their services.
    pub led: BTreeSet<ServiceName>,
    /// Services whose units systemd is not through with.
    pub pending: BTreeMap<ServiceName, PendingJob>,
    /// How the route stands, once the services have settled.
    pub route: Option<RouteState>,
    /// Candidates that nobody is led to any more: they drain and go when the state is written.
    pub leaving: BTreeSet<ServiceName>,
    /// What this host's disk did not take, where the pass went on all the same.
    pub unwritten: Vec<String>,
    /// What ended the phase before its end.
    pub error: Option<Error>,
}

impl Outcome {
    /// What `act` came to, also where an error ended it.
    pub fn of(act: impl FnOnce(&mut Outcome) -> Result<()>) -> Outcome {
        let mut happened = Outcome::default();
        happened.error = act(&mut happened).err();
        happened
    }

    /// Adds what happened after this.
    pub fn absorb(&mut self, later: Outcome) {
        let Outcome {
            changed,
            failures,
            unfetchable,
            records,
            invocations,
            restarted,
            started,
            exposures,
            candidates,
            led,
            pending,
            route,
            leaving,
            unwritten,
            error,
        } = later;
        self.changed |= changed;
        self.failures.extend(failures);
        self.unfetchable.extend(unfetchable);
        self.records.extend(records);
        self.invocations.extend(invocations);
        self.restarted.extend(restarted);
        if !started.is_empty() {
            self.exposures = exposures;
        }
        self.started.extend(started);
        self.candidates.extend(candidates);
        self.led.extend(led);
        self.pending.extend(pending);
        self.route = route.or(self.route.take());
        self.leaving.extend(leaving);
        self.unwritten.extend(unwritten);
        self.error = self.error.take().or(error);
    }

    /// What came of an attempt in this pass, if it failed. `inputs` is asked only where anything failed.
    pub fn failure_of(&self, name: &ServiceName, inputs: impl FnOnce() -> String) -> Option<&AttemptFailure> {
        if self.failures.is_empty() { None } else { self.failures.get(&(name.clone(), inputs())) }
    }

    /// How much has failed.
    pub fn failed(&self) -> usize {
        self.failures.len() + self.unfetchable.len()
    }
}
