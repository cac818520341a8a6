//! The watch: whether what was started comes up, and stays up and well until it has settled.

use crate::deployer::listeners::{self, Listeners};
use crate::deployer::root::Root;
use crate::deployer::state;
use crate::error::Result;
use crate::failpoint;
use crate::http::{self, HttpLimits};
use crate::manifest::Service;
use crate::names::ServiceName;
use crate::parallel;
use crate::systemd::{self, CameUp, Listed, Shown};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// How long a service must stay up and well before it counts as up.
pub(super) const SETTLE: Duration = Duration::from_secs(3);
/// How often services that are coming up are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(150);
/// How many services are probed at a time.
const SIDE_BY_SIDE: usize = 16;
const PROBE: Duration = Duration::from_secs(2);

/// A unit that was started and is to come up.
#[derive(Debug)]
pub(super) struct Watched<'a> {
    /// The service.
    pub(super) name: &'a ServiceName,
    /// The unit.
    pub(super) unit: String,
    /// How it is probed, and how long it may take.
    pub(super) service: &'a Service,
    /// It ran as it is before, and was not started now: that it once crashed tells nothing of what is verified.
    pub(super) was_up: bool,
    /// How long it must stay up and well.
    pub(super) settle: Duration,
}

impl Watched<'_> {
    /// Who else has its port, if anybody does.
    fn other(&self, listeners: Option<&Listeners>) -> Option<String> {
        let port = self.service.port()?;
        let answers = listeners?.at(port, &self.unit);
        answers.others().map(|owners| listeners::in_the_way(port, self.name.as_str(), owners))
    }

    /// What systemd has loaded in place of the unit that was written, if anything.
    pub(super) fn replaced(&self, root: &Root, shown: &Shown) -> Option<String> {
        let path = self.service.artifact.store_path.path()?;
        let (program, _) = self.service.program(path);
        let why = shown.replaced(&root.unit_dir.join(&self.unit), &program)?;
        let drop_ins: Vec<String> = shown.drop_ins.iter().map(|p| p.display().to_string()).collect();
        let because = state::attention(self.name, &drop_ins);
        Some(why + &because.map_or(String::new(), |text| format!("; {text}")))
    }
}

/// Why a unit did not come up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum NotUp {
    /// It is the release: it would be so again.
    Release(String),
    /// It is this host: another process has the port, or systemd has loaded something else.
    Host(String),
}

/// A unit that came up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Up {
    /// How long it took to be well.
    pub(super) after: Duration,
    /// The invocation that was watched, if systemd had loaded our file and nobody's drop-ins.
    pub(super) verified: Option<String>,
}

/// A unit under watch.
struct Watching<'a> {
    watched: &'a Watched<'a>,
    first: Option<Shown>,
    /// How often systemd had restarted it before.
    restarts: u32,
    well_since: Option<Instant>,
}

impl Watching<'_> {
    /// `show` costs systemd far more than the list of all units, and a unit that is listed as running under
    /// the invocation of its first look would show the same again.
    fn is_unchanged(&self, listed: &BTreeMap<String, Listed>) -> bool {
        let Some(first) = self.first.as_ref().filter(|_| self.well_since.is_some()) else { return false };
        listed.get(&self.watched.unit).is_some_and(Listed::running)
            && systemd::invocation(&self.watched.unit).is_some_and(|id| id == first.invocation)
    }

    /// What systemd shows of it now, from when it was started.
    fn now(&mut self, unchanged: bool, shown: Option<Shown>) -> Shown {
        match &self.first {
            Some(first) if unchanged => first.clone(),
            first => {
                let shown = shown.unwrap_or_default();
                if self.watched.was_up && first.is_none() {
                    self.restarts = shown.restarts;
                }
                Shown { restarts: shown.restarts.saturating_sub(self.restarts), ..shown }
            }
        }
    }

    /// How long its settling still takes, if it is well.
    fn settles_in(&self) -> Option<Duration> {
        Some(failpoint::shortened(self.watched.settle).saturating_sub(self.well_since?.elapsed()))
    }
}

/// One look at all of them. One time for all, so that all have settled at the same look.
struct Look<'a> {
    root: &'a Root,
    begun: Instant,
    looked: Instant,
    listeners: Option<Listeners>,
}

impl Look<'_> {
    /// What it makes of one; None: that is looked at again. `well` is told when it begins to be.
    fn judge(
        &self,
        one: &mut Watching,
        now: Shown,
        probe: Option<&Result<(), String>>,
        well: &mut dyn FnMut(&ServiceName),
    ) -> Option<Result<Up, NotUp>> {
        // What was started is what systemd had loaded, which need not be what our file says.
        if one.first.is_none()
            && let Some(why) = one.watched.replaced(self.root, &now)
        {
            return Some(Err(NotUp::Host(why)));
        }
        let deadline = Duration::from_secs(one.watched.service.timeout_sec().into());
        let late = self.begun.elapsed() >= deadline;
        let not_up = format!("not up within {} s", deadline.as_secs());
        let other = one.watched.other(self.listeners.as_ref());
        let came_up = systemd::came_up(one.first.as_ref(), &now, probe);
        if !matches!((&came_up, &other), (CameUp::Well, None)) {
            one.well_since = None;
        }
        match (came_up, other) {
            // A program that finds its port taken may end of it.
            (CameUp::No(why), Some(other)) => return Some(Err(NotUp::Host(format!("{other} ({why})")))),
            (CameUp::No(why), None) => return Some(Err(NotUp::Release(why))),
            // It may be one that is just going, or that it waits for.
            (CameUp::Well | CameUp::NotYet(_), Some(other)) if late => {
                return Some(Err(NotUp::Host(format!("{other} ({not_up})"))));
            }
            (CameUp::NotYet(why), None) if late => {
                return Some(Err(NotUp::Release(format!("{not_up}: {why}"))));
            }
            (CameUp::Well, None) => {
                if one.well_since.is_none() {
                    well(one.watched.name);
                }
                let since = *one.well_since.get_or_insert(self.looked);
                if self.looked.duration_since(since) >= failpoint::shortened(one.watched.settle) {
                    let clean = now.drop_ins.iter().all(|path| systemd::is_vendor_drop_in(path));
                    let verified = clean.then(|| now.invocation.clone());
                    return Some(Ok(Up { after: since.duration_since(self.begun), verified }));
                }
            }
            (CameUp::Well | CameUp::NotYet(_), _) => {}
        }
        one.first.get_or_insert(now);
        None
    }
}

/// Watches units come up: each until it has been well for its settle time, cannot recover, or is out of time. `well` is
/// told when one begins to be.
pub(super) fn watch(
    root: &Root,
    watched: &[Watched],
    well: &mut dyn FnMut(&ServiceName),
) -> Result<BTreeMap<ServiceName, Result<Up, NotUp>>> {
    let begun = Instant::now();
    let mut outcomes = BTreeMap::new();
    let fresh = |watched| Watching { watched, first: None, restarts: 0, well_since: None };
    let mut pending: Vec<Watching> = watched.iter().map(fresh).collect();
    while !pending.is_empty() {
        let looked = Instant::now();
        let listed = systemd::list_units()?;
        let unchanged: Vec<bool> = pending.iter().map(|one| one.is_unchanged(&listed)).collect();
        let close = pending.iter().zip(&unchanged).filter(|(_, unchanged)| !**unchanged);
        let mut shown = systemd::show(&close.map(|(p, _)| p.watched.unit.clone()).collect::<Vec<_>>())?;
        let probes = parallel::map(&pending, SIDE_BY_SIDE, |one| probe(one.watched.service));
        // After the probes: whoever has answered them is still there.
        let look = Look { root, begun, looked, listeners: Listeners::read().ok() };
        let mut still = Vec::new();
        for ((mut one, probe), unchanged) in pending.into_iter().zip(probes).zip(unchanged) {
            let now = one.now(unchanged, shown.remove(&one.watched.unit));
            match look.judge(&mut one, now, probe.as_ref(), well) {
                Some(outcome) => drop(outcomes.insert(one.watched.name.clone(), outcome)),
                None => still.push(one),
            }
        }
        pending = still;
        if !pending.is_empty() {
            let look_every = failpoint::shortened(LOOK_EVERY);
            let next_end = pending.iter().filter_map(Watching::settles_in).min();
            std::thread::sleep(next_end.map_or(look_every, |end| end.min(look_every)));
        }
    }
    Ok(outcomes)
}

/// Asks a service whether it is well: GET of its health path, else a TCP connect; None where there is nothing to ask.
fn probe(service: &Service) -> Option<Result<(), String>> {
    let (port, question) = service.probe()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let Some((path, host)) = question else {
        return Some(
            TcpStream::connect_timeout(&address, PROBE)
                .map(drop)
                .map_err(|e| format!("nothing answers on {address} ({e})")),
        );
    };
    let limits = HttpLimits { connect: PROBE, answer: PROBE, total: Some(PROBE), stall: PROBE };
    let agent = http::local_agent(limits);
    let answer = agent.get(format!("http://{address}{path}")).header("Host", &host).call();
    Some(match answer {
        Ok(response) if response.status().is_success() || response.status().is_redirection() => Ok(()),
        Ok(response) => Err(format!("GET {path} on {address} answers {}", response.status().as_u16())),
        Err(e) => Err(format!("GET {path} on {address} fails ({e})")),
    })
}
