//! Gets what the hosts say of themselves: their reports in the store, or the answer of each to what runs there now,
//! asked for over ssh. A report that is missing, oversized or malformed is an answer, not an error.

use super::hint;
use super::judge::HostReport;
use crate::bounds;
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::deployer::follow;
use crate::deployer::live::{self, LIVE_VERSION, Live, LiveState};
use crate::deployer::reported::{BOUNDS, MAX_REPORT, key, parsed, readable};
use crate::deployer::root::STATE_FILE;
use crate::deployer::state::State;
use crate::doctor::domains;
use crate::error::{Error, Exit, Result};
use crate::names::HostName;
use crate::parallel;
use crate::ssh;
use crate::store::{HOSTS_PREFIX, Store, StoreError, StoreUrl};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a host may take to answer, in all.
const LIVE_DEADLINE: Duration = Duration::from_secs(30);

/// How many hosts are asked at once, each by an ssh of its own.
const HOSTS_AT_ONCE: usize = 16;

/// How many reports are read at once.
const REPORTS_AT_ONCE: usize = crate::http::CONNECTIONS;

/// So many reports of hosts that the manifest does not name are read at most, and no more once they have so many bytes
/// together: whoever writes to the store can make up any number of them.
const OTHERS: usize = 32;
const OTHERS_BYTES: u64 = 8 << 20;

/// How many of these are read at once, which is how far their bytes can be exceeded.
const OTHERS_AT_ONCE: usize = 4;

/// The hosts that have a report in the store.
pub fn listed(store: &dyn Store) -> Result<BTreeSet<HostName>> {
    let host = |key: &String| HostName::parse(key.strip_prefix(HOSTS_PREFIX)?.strip_suffix(".json")?).ok();
    Ok(store.list(HOSTS_PREFIX)?.iter().filter_map(host).collect())
}

/// The reports of all these hosts in the store.
pub fn stored(store: &dyn Store, hosts: &BTreeSet<HostName>) -> Result<BTreeMap<HostName, HostReport>> {
    let identity = store.identity();
    let hosts: Vec<&HostName> = hosts.iter().collect();
    each(&hosts, REPORTS_AT_ONCE, |host| Ok(one(store, &identity, host)?.0))
}

/// The reports of hosts that the manifest does not name, as far as they cost little; with how many were left out.
pub fn stored_others(
    store: &dyn Store,
    hosts: &BTreeSet<HostName>,
) -> Result<(BTreeMap<HostName, HostReport>, usize)> {
    let identity = store.identity();
    let bytes = AtomicU64::new(0);
    let all: Vec<&HostName> = hosts.iter().take(OTHERS).collect();
    let mut reports = BTreeMap::new();
    for some in all.chunks(OTHERS_AT_ONCE) {
        if bytes.load(Ordering::Relaxed) >= OTHERS_BYTES {
            break;
        }
        reports.extend(each(some, OTHERS_AT_ONCE, |host| {
            let (report, size) = one(store, &identity, host)?;
            bytes.fetch_add(size, Ordering::Relaxed);
            Ok(report)
        })?);
    }
    let left_out = hosts.len() - reports.len();
    Ok((reports, left_out))
}

/// A host's report, with its bytes.
fn one(store: &dyn Store, identity: &str, host: &HostName) -> Result<(HostReport, u64)> {
    Ok(match store.read(&key(host), MAX_REPORT) {
        Ok(Some(bytes)) => (read(host, &bytes, identity), bytes.len() as u64),
        Ok(None) => (HostReport::Missing, 0),
        Err(StoreError::TooLarge(why)) => (HostReport::Unreadable(why), 0),
        Err(e) => return Err(e.into()),
    })
}

/// Whether two identities of stores differ in nothing but the address at which they are reached.
fn but_for_address(one: &str, other: &str) -> bool {
    match (StoreUrl::parse(one), StoreUrl::parse(other)) {
        (Ok(one), Ok(other)) => one.differs_in_address_alone(&other),
        _ => false,
    }
}

/// Gives a host that names its store otherwise than we do the benefit of a look: what it reported is in our store
/// if the two are one.
pub fn same_store(store: &dyn Store, state: &mut State) {
    let identity = store.identity();
    if state.store.as_deref().is_none_or(|theirs| theirs == identity || !but_for_address(theirs, &identity)) {
        return;
    }
    if let Some(reported) = readable(store, &state.host)
        && (&reported.machine, &reported.store, reported.checked_at)
            == (&state.machine, &state.store, state.checked_at)
    {
        state.store = Some(identity);
    }
}

/// What the hosts answer now.
pub fn live(
    settings: &Settings,
    store: &dyn Store,
    hosts: &BTreeSet<HostName>,
) -> Result<BTreeMap<HostName, HostReport>> {
    let hosts: Vec<&HostName> = hosts.iter().collect();
    each(&hosts, HOSTS_AT_ONCE, |host| {
        Ok(match ask(settings, host, With::Domains, LIVE_DEADLINE) {
            Err(e) => HostReport::Silent(e.to_string()),
            Ok(LiveState { state: Some(mut state), live, .. }) if state.host == *host => {
                same_store(store, &mut state);
                HostReport::Live(Box::new(state), Box::new(live))
            }
            Ok(LiveState { state: Some(state), .. }) => by_another(&state),
            Ok(LiveState { state: None, state_error, live, .. }) => {
                let line = live.last_line.map(|line| format!("; the deployer says: {line}"));
                HostReport::Silent(format!(
                    "its state could not be read: {}{}; run '{}'",
                    state_error.unwrap_or_else(|| "it is not there".into()),
                    line.unwrap_or_default(),
                    hint::typed(host, &settings.host, "deployer")
                ))
            }
        })
    })
}

/// Starts a host's deployer and waits until its pass has ended, or has come to a result for version `serial`: by one
/// command of the host's own program. None where the host has none that knows how, or does not let us run it as root.
pub fn watch(
    settings: &Settings,
    host: &HostName,
    serial: u64,
    deadline: Duration,
) -> Result<Option<LiveState>> {
    if ssh::is_here(settings, host) {
        let words = ["systemctl", "start", "--no-block", "deployer"];
        let start = || ssh::output_on(settings, host, true, &words, LIVE_DEADLINE);
        return follow::watch(&settings.unit_dir, serial, start).map(Some);
    }
    let serial = serial.to_string();
    let words = ["omni-deploy", "deployer", "watch", "--serial", &serial];
    let run = ssh::run_on(settings, host, true, &words).deadline(deadline);
    let output = ssh::attempt_of(settings, host, &words, run)?;
    if !output.status.ok() || output.stdout.len() as u64 > MAX_REPORT {
        return Ok(None);
    }
    bounds::check(&output.stdout, BOUNDS).map_err(|why| not_read(&why))?;
    Ok(LiveState::parse(&output.stdout).ok())
}

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum With {
    /// State and units.
    Units,
    /// Its domains too, which takes seconds.
    Domains,
}

/// Asks a host for its state and for what systemd says there now. One that has an older program, or none that can
/// be found, gives its state alone, and that is among the problems.
pub fn ask(settings: &Settings, host: &HostName, with: With, deadline: Duration) -> Result<LiveState> {
    if ssh::is_here(settings, host) {
        return match with {
            With::Units => live::look(&settings.unit_dir, Timestamp::now()),
            With::Domains => domains::live_with_domains(settings, Timestamp::now()),
        };
    }
    let domains = if with == With::Domains { " --domains" } else { "" };
    let usage = Exit::Usage.code();
    let script = format!(
        "{}; if [ -n \"$p\" ]; then \"$p\" deployer state --live{domains} --json; s=$?; [ $s = {usage} ] || exit $s; fi; \
         exec cat {STATE_FILE}",
        ssh::finds_ours()
    );
    let output = ssh::output_on(settings, host, false, &["sh", "-c", &script], deadline)?;
    if !output.status.ok() {
        return Err(Error::new(format!(
            "its state could not be read ({}): {}; run '{}'",
            output.status,
            crate::runner::tail(&output.stderr),
            hint::typed(host, &settings.host, "deployer")
        )));
    }
    if output.stdout.len() as u64 > MAX_REPORT {
        return Err(Error::new(format!("its state has more than {MAX_REPORT} bytes")));
    }
    bounds::check(&output.stdout, BOUNDS).map_err(|why| not_read(&why))?;
    if let Ok(state) = State::parse(&output.stdout) {
        let problems = vec![
            "its omni-deploy is too old to say what runs now, or is not on the PATH of a login by ssh; this is what its \
             last pass left; upgrade it, or install it with contrib/install.sh"
                .into(),
        ];
        let live = Live { at: Timestamp::now(), problems, ..Live::default() };
        let (version, state, state_error, start) = (LIVE_VERSION, Some(state), None, None);
        return Ok(LiveState { version, state, state_error, live, start });
    }
    LiveState::parse(&output.stdout).map_err(|why| {
        Error::new(format!("its state cannot be read: {why}; upgrade whichever omni-deploy is older"))
    })
}

fn not_read(why: &str) -> Error {
    Error::new(format!("its answer cannot be read: {why}; check what runs as 'deployer' there"))
}

fn by_another(state: &State) -> HostReport {
    HostReport::Unreadable(format!("it is from a host that calls itself {}", state.host))
}

/// A report that is in the store of this identity.
fn read(host: &HostName, bytes: &[u8], identity: &str) -> HostReport {
    match parsed(bytes) {
        Err(why) => HostReport::Unreadable(why),
        Ok(state) if state.host != *host => by_another(&state),
        Ok(mut state) => {
            // Its host reaches this store, by whatever address.
            if state.store.as_deref().is_some_and(|theirs| but_for_address(theirs, identity)) {
                state.store = Some(identity.to_string());
            }
            HostReport::Read(Box::new(state))
        }
    }
}

/// Asks for every host in parallel; the first error ends it.
fn each(
    hosts: &[&HostName],
    at_once: usize,
    ask: impl Fn(&HostName) -> Result<HostReport> + Sync,
) -> Result<BTreeMap<HostName, HostReport>> {
    let reports = parallel::try_map(hosts, at_once, |host| Ok::<_, Error>(((*host).clone(), ask(host)?)))?;
    Ok(reports.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_report_that_is_broken_or_another_hosts_is_an_answer() {
        let biz = HostName::parse("biz").unwrap();
        let now = crate::clock::Timestamp(1_800_000_000);
        let bytes =
            |name: &str| serde_json::to_vec(&State::new(HostName::parse(name).unwrap(), now)).unwrap();
        assert!(matches!(read(&biz, &bytes("biz"), ""), HostReport::Read(_)));
        for (bytes, word) in [
            (bytes("other"), "other"),
            (b"".to_vec(), "EOF"),
            (b"{\"version\": 99}".to_vec(), "version 99"),
            (bytes("biz")[..40].to_vec(), "EOF"),
            (format!("{{\"version\": 1, \"x\": [{}0]}}", "0,".repeat(BOUNDS.values)).into_bytes(), "values"),
            (format!("{{\"version\": 1, \"x\": {}", "[".repeat(100)).into_bytes(), "nested"),
        ] {
            match read(&biz, &bytes, "") {
                HostReport::Unreadable(why) => assert!(why.contains(word), "{why}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn made_up_reports_cost_no_more_than_a_few_and_those_left_out_are_counted() {
        use crate::store::Condition;
        let dir = tempfile::tempdir().unwrap();
        let store = crate::store::dir::DirStore::new(dir.path());
        let mut state = State::new(HostName::parse("z").unwrap(), Timestamp(1_800_000_000));
        let hosts: BTreeSet<HostName> = (0..40).map(|i| HostName::parse(&format!("z{i}")).unwrap()).collect();
        let put = |state: &State, host: &HostName, spaces: usize| {
            let mut bytes = serde_json::to_vec(&State { host: host.clone(), ..state.clone() }).unwrap();
            bytes.extend(vec![b' '; spaces]);
            store.put(&key(host), &bytes, &Condition::Always).unwrap();
        };
        state.store = None;
        hosts.iter().for_each(|host| put(&state, host, 0));
        assert_eq!(listed(&store).unwrap(), hosts);
        let (reports, left_out) = stored_others(&store, &hosts).unwrap();
        assert_eq!((reports.len(), left_out), (OTHERS, hosts.len() - OTHERS));
        assert!(reports.values().all(|report| matches!(report, HostReport::Read(_))));
        // Of those whom the manifest names, and of one that is asked for, all are read.
        assert_eq!(stored(&store, &hosts).unwrap().len(), hosts.len());
        // Large ones end it sooner.
        hosts.iter().take(OTHERS_AT_ONCE).for_each(|host| put(&state, host, (MAX_REPORT - 10_000) as usize));
        let (reports, left_out) = stored_others(&store, &hosts).unwrap();
        assert_eq!((reports.len(), left_out), (OTHERS_AT_ONCE, hosts.len() - OTHERS_AT_ONCE));
    }

    #[test]
    fn every_host_is_asked_once_and_an_error_ends_it() {
        let hosts: BTreeSet<HostName> =
            (0..100).map(|i| HostName::parse(&format!("h{i}")).unwrap()).collect();
        let hosts: Vec<&HostName> = hosts.iter().collect();
        let asked = Mutex::new(Vec::new());
        let reports = each(&hosts, 7, |host| {
            asked.lock().unwrap().push(host.clone());
            Ok(HostReport::Missing)
        });
        assert_eq!(reports.unwrap().len(), 100);
        assert_eq!(asked.lock().unwrap().len(), 100);
        let failing = each(&hosts, 7, |host| match host.as_str() {
            "h50" => Err(Error::new("down")),
            _ => Ok(HostReport::Missing),
        });
        assert_eq!(failing.unwrap_err().to_string(), "down");
    }
}
