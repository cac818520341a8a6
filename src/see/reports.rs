//! Gets what the hosts say of themselves: their reports in the store, or the state file of
//! each, asked for over ssh. A report that is missing, oversized or malformed is an answer, not an error.

use super::judge::Report;
use crate::config::Settings;
use crate::deployer::root::STATE_FILE;
use crate::deployer::state::State;
use crate::error::Result;
use crate::manifest::Manifest;
use crate::names::HostName;
use crate::ssh;
use crate::store::{Got, HOSTS_PREFIX, Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

/// The largest report that is read, in bytes.
const MAX_REPORT: u64 = 4 << 20;

/// How long a host may take to answer, in all.
const LIVE_DEADLINE: Duration = Duration::from_secs(15);

/// How many hosts or reports are asked at once.
const AT_ONCE: usize = 16;

/// The hosts that the manifest names.
pub fn hosts(manifest: &Manifest) -> BTreeSet<HostName> {
    manifest.services.iter().flat_map(|s| s.hosts.iter().cloned()).collect()
}

/// The reports in the store: of `hosts`, and of all others that have one.
pub fn stored(store: &dyn Store, hosts: &BTreeSet<HostName>) -> Result<BTreeMap<HostName, Report>> {
    let mut all = hosts.clone();
    all.extend(
        store
            .list(HOSTS_PREFIX)?
            .iter()
            .filter_map(|key| HostName::parse(key.strip_prefix(HOSTS_PREFIX)?.strip_suffix(".json")?).ok()),
    );
    each(&all, |host| {
        Ok(match store.get(&format!("{HOSTS_PREFIX}{host}.json"), None, MAX_REPORT) {
            Ok(Got::Found { bytes, .. }) => read(host, &bytes),
            Ok(Got::Missing | Got::NotModified) => Report::Missing,
            Err(StoreError::TooLarge(why)) => Report::Unreadable(why),
            Err(e) => return Err(e.into()),
        })
    })
}

/// What the hosts answer now.
pub fn live(settings: &Settings, hosts: &BTreeSet<HostName>) -> Result<BTreeMap<HostName, Report>> {
    each(hosts, |host| {
        Ok(match ssh::output_on(settings, host, false, &["cat", STATE_FILE], LIVE_DEADLINE) {
            Err(e) => Report::Silent(e.to_string()),
            Ok(output) if !output.status.ok() => Report::Silent(format!(
                "its state could not be read ({}): {}; run 'sudo deployer' there",
                output.status,
                crate::runner::tail(&output.stderr)
            )),
            Ok(output) if output.stdout.len() as u64 > MAX_REPORT => {
                Report::Unreadable(format!("it has more than {MAX_REPORT} bytes"))
            }
            Ok(output) => read(host, &output.stdout),
        })
    })
}

fn read(host: &HostName, bytes: &[u8]) -> Report {
    match State::parse(bytes) {
        Ok(state) if state.host == *host => Report::Read(Box::new(state)),
        Ok(state) => Report::Unreadable(format!("it is by a host that calls itself {}", state.host)),
        Err(why) => Report::Unreadable(why),
    }
}

/// Asks for every host in parallel; the first error ends it.
fn each(
    hosts: &BTreeSet<HostName>,
    ask: impl Fn(&HostName) -> Result<Report> + Sync,
) -> Result<BTreeMap<HostName, Report>> {
    let queue = Mutex::new(hosts.iter());
    let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    let worker = || -> Result<Vec<(HostName, Report)>> {
        std::iter::from_fn(next).map(|host| Ok((host.clone(), ask(host)?))).collect()
    };
    let mut reports = BTreeMap::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..hosts.len().min(AT_ONCE)).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            let part = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            reports.extend(part);
        }
        Ok(reports)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn a_report_that_is_broken_or_another_hosts_is_an_answer() {
        let biz = HostName::parse("biz").unwrap();
        let now = crate::clock::Timestamp(1_800_000_000);
        let bytes =
            |name: &str| serde_json::to_vec(&State::new(HostName::parse(name).unwrap(), now)).unwrap();
        assert!(matches!(read(&biz, &bytes("biz")), Report::Read(_)));
        for (bytes, word) in [
            (bytes("other"), "other"),
            (b"".to_vec(), "EOF"),
            (b"{\"version\": 99}".to_vec(), "version 99"),
            (bytes("biz")[..40].to_vec(), "EOF"),
        ] {
            match read(&biz, &bytes) {
                Report::Unreadable(why) => assert!(why.contains(word), "{why}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn every_host_is_asked_once_and_an_error_ends_it() {
        let hosts: BTreeSet<HostName> =
            (0..100).map(|i| HostName::parse(&format!("h{i}")).unwrap()).collect();
        let asked = Mutex::new(Vec::new());
        let reports = each(&hosts, |host| {
            asked.lock().unwrap().push(host.clone());
            Ok(Report::Missing)
        });
        assert_eq!(reports.unwrap().len(), 100);
        assert_eq!(asked.lock().unwrap().len(), 100);
        let failing = each(&hosts, |host| match host.as_str() {
            "h50" => Err(Error::new("down")),
            _ => Ok(Report::Missing),
        });
        assert_eq!(failing.unwrap_err().to_string(), "down");
    }
}
