//! The last journal lines of services that failed. journald shows them to root and the journal's own readers alone, and
//! a program that cannot start may print anything, a password included: so they live in a file of root's,
//! beside the state that everybody reads and the report that whoever reads the bucket reads. Each belongs to one failure, by
//! the time of that. They are for people: nothing is decided by them, and without them nothing is lost.

use super::root::Root;
use super::state::{FailureRecord, State};
use crate::clock::Timestamp;
use crate::durable;
use crate::error::{Error, Result};
use crate::log::printable_json;
use crate::names::ServiceName;
use crate::runner::Run;
use crate::ssh::is_root;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The version of its form.
const LINES_VERSION: u64 = 1;

/// How long sudo may take.
const SUDO_WITHIN: Duration = Duration::from_secs(10);

/// What is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lines {
    version: u64,
    services: BTreeMap<ServiceName, OfService>,
}

/// The last lines of one failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OfService {
    /// [`FailureRecord::at`].
    at: Timestamp,
    /// Oldest first.
    lines: Vec<String>,
}

impl Lines {
    /// Those that a state has.
    fn of(state: &State) -> Self {
        let kept = state.services.iter().filter_map(|(name, service)| {
            let FailureRecord { at, journal, .. } = service.failure.as_ref()?;
            let of_service = OfService { at: *at, lines: journal.clone() };
            (!journal.is_empty()).then(|| (name.clone(), of_service))
        });
        Lines { version: LINES_VERSION, services: kept.collect() }
    }

    /// The state, with the lines of its failures again.
    pub fn put_back(&self, mut state: State) -> State {
        for (name, kept) in &self.services {
            let failure = state.services.get_mut(name).and_then(|service| service.failure.as_mut());
            // What an older program wrote into the state is there.
            if let Some(failure) = failure.filter(|f| f.at == kept.at && f.journal.is_empty()) {
                failure.journal = kept.lines.clone();
            }
        }
        state
    }

    /// A file that cannot be read as one is none.
    fn parse(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).ok().filter(|l: &Lines| l.version == LINES_VERSION).unwrap_or_default()
    }
}

/// Whether a state has any lines: in a file, it is one of an older program.
pub fn any(state: &State) -> bool {
    state.services.values().filter_map(|s| s.failure.as_ref()).any(|f| !f.journal.is_empty())
}

/// A state as everybody may read it.
pub fn without(state: &State) -> State {
    let mut open = state.clone();
    for failure in open.services.values_mut().filter_map(|service| service.failure.as_mut()) {
        failure.journal.clear();
    }
    open
}

/// What is kept on this host; nothing where there is nothing, or where we may not read it.
pub fn load(root: &Root) -> Lines {
    fs_err::read(root.lines()).map(|bytes| Lines::parse(&bytes)).unwrap_or_default()
}

/// Writes a state: the lines, for root, and then the rest, for everybody. A pass that dies between the two leaves lines of
/// a failure that nobody knows of, which the next one replaces.
pub fn keep(root: &Root, state: &State) -> Result<()> {
    let lines = Lines::of(state);
    let path = root.lines();
    if lines.services.is_empty() {
        if fs_err::symlink_metadata(&path).is_ok() {
            durable::remove(&path)?;
        }
    } else if load(root) != lines {
        durable::write(&path, &to_bytes(&lines)?, 0o600)?;
    }
    durable::write(&root.state_file(), &to_bytes(&without(state))?, 0o644)?;
    Ok(())
}

/// The same for somebody who asks from afar as a user of this host: through sudo, if that asks nothing. Only where something
/// failed whose lines there may be.
pub fn for_whoever_asks(root: &Root, state: &State) -> Lines {
    let failed = state.services.values().filter_map(|s| s.failure.as_ref()).any(|f| f.journal.is_empty());
    if !failed || !hidden(&root.lines()) {
        return load(root);
    }
    let path = root.lines();
    let run = Run::new("sudo").args(["-n", "--", "cat"]).arg(&path).deadline(SUDO_WITHIN);
    run.success().map(|output| Lines::parse(&output.stdout)).unwrap_or_default()
}

/// Whether there are lines that this user may not read.
pub fn hidden(path: &Path) -> bool {
    !is_root() && fs_err::symlink_metadata(path).is_ok()
}

/// A form of ours, with a newline at its end. People read it with cat, and what others have said is in it: what would
/// steer a terminal is written as JSON's escapes.
pub fn to_bytes(form: &impl Serialize) -> Result<Vec<u8>> {
    let text =
        serde_json::to_string_pretty(form).map_err(|e| Error::new(format!("cannot write JSON: {e}")))?;
    Ok(format!("{}\n", printable_json(&text)).into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A state of an older program: with lines in it.
    fn old() -> State {
        State::parse(include_bytes!("../../tests/fixtures/state-v1.json")).unwrap()
    }

    #[test]
    fn lines_are_roots_alone_and_come_back_to_the_failure_they_are_of() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root { state_dir: dir.path().into(), ..Root::system(dir.path()) };
        let state = old();
        assert!(any(&state));
        keep(&root, &state).unwrap();
        let mode = |path| fs_err::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(root.lines()), mode(root.state_file())), (0o600, 0o644));
        let text = fs_err::read_to_string(root.state_file()).unwrap();
        assert!(!text.contains("cannot bind"), "{text}");
        let read = State::parse(text.as_bytes()).unwrap();
        assert_eq!(read, without(&state));
        assert_eq!(load(&root).put_back(read), state);

        // What somebody else has said steers no terminal, and is what he said.
        let mut hostile = state.clone();
        let said = "\u{9b}2J\u{202e}\u{7f}";
        for failure in hostile.services.values_mut().filter_map(|s| s.failure.as_mut()) {
            (failure.reason, failure.journal) = (said.into(), vec![said.into()]);
        }
        keep(&root, &hostile).unwrap();
        for path in [root.lines(), root.state_file()] {
            let text = fs_err::read_to_string(path).unwrap();
            assert!(text.is_ascii() && text.contains("\\u009b2J\\u202e\\u007f"), "{text}");
        }
        let read = State::parse(&fs_err::read(root.state_file()).unwrap()).unwrap();
        assert_eq!(load(&root).put_back(read), hostile);
        keep(&root, &state).unwrap();

        // Another failure of the same service has none of them.
        let mut later = without(&state);
        later.services.values_mut().filter_map(|s| s.failure.as_mut()).for_each(|f| f.at.0 += 1);
        let later = load(&root).put_back(later);
        assert!(!any(&later));
        keep(&root, &later).unwrap();
        assert!(!root.lines().exists());
        fs_err::write(root.lines(), "{").unwrap();
        assert_eq!(load(&root), Lines::default());
    }
}
