//! A rollout that overlaps: the new version is started beside the old one as `NAME-next.service` on a spare
//! port and proved there; then requests move to it, and the real unit can be restarted with nobody waiting.
//! Several services go through every phase together. Nothing here is remembered: what an interruption leaves
//! (a candidate, a route to it) is seen by the next pass and undone or finished by it.

use super::apply::{EVERYBODY_WAITS, Host, NotUp, SETTLE, Watched, watch};
use super::caddy::{self, RoutePlan};
use super::plan::{self, Attempts, Goal, Observed, PersistedState, Plan, Step};
use super::systemd::{self, Began, Restarted};
use super::unit;
use crate::clock;
use crate::durable::{self, Batch};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::log;
use crate::manifest::model::DEFAULT_DRAIN_SEC;
use crate::manifest::{Http, Service};
use crate::names::ServiceName;
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::time::{Duration, Instant};

/// Spare ports come from below the kernel's range for outgoing connections (ip_local_port_range begins at
/// 32768), so that none of those can take one between our look and the service's start.
const SPARE_PORTS: std::ops::Range<u16> = 20_000..32_000;

/// How often open connections are counted while an instance drains.
const COUNT_EVERY: Duration = Duration::from_millis(50);

/// The least time an instance drains: Caddy has taken the new route, but a request may be between its old
/// route and the connection, and an HTTP/2 client has a second to learn that its connection ends.
const LEAST_DRAIN: Duration = Duration::from_secs(1);

/// How long the old route may still serve a client that was connected before the change and sends its first
/// request after it, as browsers do that connect ahead: Go's HTTP server ends such connections after 5 s.
const SILENT_CLIENTS: Duration = Duration::from_millis(5500);

struct Candidate<'a> {
    name: &'a ServiceName,
    goal: &'a Goal,
    service: Service,
    text: String,
}

impl Host<'_> {
    /// Starts and proves candidates, and leads requests to those that are well. What fails is learned.
    pub fn overlap(
        &self,
        plan: &Plan,
        desired: &[&Service],
        persisted: &PersistedState,
        observed: &mut Observed,
        attempts: &mut Attempts,
    ) -> Result<bool> {
        let mut taken: BTreeSet<u16> = desired.iter().filter_map(|s| s.port()).collect();
        let mut candidates = Vec::new();
        for service in &plan.services {
            let (Some(goal), true) =
                (&service.goal, service.steps.iter().any(|s| matches!(s, Step::Overlap(_))))
            else {
                continue;
            };
            let port = spare_port(&mut taken)?;
            let texts = goal.service.on_port(port).zip(unit::render_next(&goal.service, &goal.path, port));
            if let Some((on_port, text)) = texts {
                candidates.push(Candidate { name: &service.name, goal, service: on_port, text });
            }
        }
        if candidates.is_empty() {
            return Ok(false);
        }
        let mut batch = Batch::default();
        for u in &candidates {
            let port = u.service.port().unwrap_or(0);
            log::notice(format!(
                "{}: proving {} beside the running version, on port {port}",
                u.name, u.goal.path
            ));
            batch.write(&self.root.next_unit(u.name), u.text.as_bytes(), 0o644);
        }
        let mut failed = batch.finish();
        for u in &candidates {
            match failed.remove(&self.root.next_unit(u.name)) {
                None => drop(observed.candidates.insert(u.name.clone())),
                Some(e) => self.fail_on_host(u.name, u.goal, &e.into(), attempts),
            }
        }
        candidates.retain(|u| observed.candidates.contains(u.name));
        if candidates.is_empty() {
            return Ok(false);
        }
        systemd::daemon_reload()?;
        let units: Vec<String> = candidates.iter().map(|u| u.name.next_unit()).collect();
        systemd::reset_failed(&units)?;
        let begun = clock::journal_now();
        let (complaint, busy) = match systemd::restart(&units, EVERYBODY_WAITS)? {
            Restarted::All(complaint) => (complaint, BTreeSet::new()),
            Restarted::Not(busy) => (None, busy),
        };
        let watched: Vec<Watched> = candidates
            .iter()
            .filter(|u| !busy.contains(&u.name.next_unit()))
            .map(|u| {
                let unit = u.name.next_unit();
                Watched { name: u.name, unit, service: &u.service, was_up: false, settle: SETTLE }
            })
            .collect();
        let outcomes = watch(self.root, &watched, |_| {})?;
        let mut ports: BTreeMap<ServiceName, &Http> = BTreeMap::new();
        let mut refused = Vec::new();
        for u in &candidates {
            match (outcomes.get(u.name), &u.service.http) {
                (Some(Ok(up)), Some(http)) => {
                    log::info(format!(
                        "{}: well beside the running version after {:.1} s",
                        u.name,
                        up.after.as_secs_f64()
                    ));
                    ports.insert(u.name.clone(), http);
                }
                (None, _) if busy.contains(&u.name.next_unit()) => {
                    let unit = u.name.next_unit();
                    let why = format!("systemd does not get to start {unit}; see 'systemctl list-jobs'");
                    self.fail_on_host(u.name, u.goal, &Error::new(why), attempts);
                    refused.push(u.name.clone());
                }
                (Some(Err(NotUp::Host(why))), _) => {
                    self.fail_on_host(u.name, u.goal, &Error::new(why), attempts);
                    refused.push(u.name.clone());
                }
                (outcome, _) => {
                    let why = match outcome {
                        Some(Err(NotUp::Release(why))) => {
                            systemd::could_not_start(complaint.as_deref(), &u.name.next_unit())
                                .unwrap_or_else(|| why.clone())
                        }
                        _ => complaint.clone().unwrap_or_else(|| "systemd says nothing of it".into()),
                    };
                    let began = Began::At(begun);
                    let journal = systemd::journal(&u.name.next_unit(), &began, super::apply::JOURNAL_LINES);
                    self.refuse(u.name, u.goal, why, journal, attempts);
                    refused.push(u.name.clone());
                }
            }
        }
        // Nobody was led to these yet.
        self.remove_candidates(&refused, observed)?;
        if ports.is_empty() {
            return Ok(true);
        }
        let interim = interim_route(desired, persisted, &ports);
        let closed = plan::closed(desired, observed, persisted);
        if let Err(why) = self.lead(&interim, &closed, observed) {
            log::error(format!("route: {why}; the new versions take over by a plain restart"));
            return Ok(true);
        }
        let led = candidates
            .iter()
            .filter_map(|u| Some((u.name.clone(), ((*ports.get(u.name)?).clone(), u.goal.inputs()))));
        attempts.led.extend(led);
        let old: Vec<(&ServiceName, u16, u32)> = ports
            .keys()
            .filter_map(|name| {
                let before = &persisted.applied.get(name)?.service;
                Some((name, before.port()?, before.drain_sec()))
            })
            .collect();
        drain(&old, &observed.caddy)?;
        Ok(true)
    }

    /// Writes the route for these services, if Caddy does not have it already.
    fn lead(
        &self,
        services: &[&Http],
        closed: &BTreeSet<u16>,
        observed: &mut Observed,
    ) -> Result<(), String> {
        let admin = &self.settings.caddy_admin;
        let route = caddy::route(services, closed);
        let plan = |seen: &caddy::CaddyState| {
            caddy::plan(self.settings.caddy_server.as_deref(), route.as_ref(), seen)
        };
        let asked = match plan(&caddy::observe(admin)) {
            RoutePlan::None | RoutePlan::Current => Ok(()),
            RoutePlan::Pending(why) => Err(why),
            RoutePlan::Write(requests) => requests.iter().try_for_each(|request| {
                caddy::perform(admin, request)?;
                log::notice(format!("route: {}", request.what));
                Ok(())
            }),
        };
        // Also of what failed: the answer may have been lost to a change that was made, and what follows must know.
        observed.caddy = caddy::observe(admin);
        asked.or_else(|why| match plan(&observed.caddy) {
            RoutePlan::None | RoutePlan::Current => Ok(()),
            RoutePlan::Pending(_) | RoutePlan::Write(_) => Err(why),
        })
    }

    /// Leads requests to services that have never been up, in one change for all of them: there is nothing older that
    /// could answer. Candidates keep what they have. What Caddy does not take now, the end of the pass tries again.
    pub fn lead_to_first(
        &self,
        desired: &[&Service],
        persisted: &PersistedState,
        attempts: &Attempts,
        observed: &mut Observed,
    ) {
        if !matches!(observed.caddy, caddy::CaddyState::Servers(_)) {
            return;
        }
        let led = attempts.led.iter().map(|(name, (http, _))| (name.clone(), http)).collect();
        let closed = plan::closed(desired, observed, persisted);
        if let Err(why) = self.lead(&interim_route(desired, persisted, &led), &closed, observed) {
            log::warning(format!("route: {why}"));
        }
    }

    /// Leads requests back to versions that are still as they were proved, and removes the candidates that an
    /// earlier pass left beside them.
    pub fn undo_abandoned(
        &self,
        names: &[ServiceName],
        desired: &[&Service],
        persisted: &PersistedState,
        observed: &mut Observed,
    ) -> Result<()> {
        for name in names {
            log::notice(format!(
                "{name}: an earlier pass ended while two versions ran; going back to the proved one"
            ));
        }
        let closed = plan::closed(desired, observed, persisted);
        let mut left = names.to_vec();
        if let Err(why) = self.lead(&interim_route(desired, persisted, &BTreeMap::new()), &closed, observed) {
            log::warning(format!("route: {why}"));
            left = self.led_past(names, observed)?;
        }
        self.drain_candidates(&left, persisted, observed)?;
        self.remove_candidates(&left, observed)
    }

    /// Those of these candidates that nobody can be led to by what Caddy was seen to have. The others stay: without
    /// them, visitors would get a 502 until Caddy can be told.
    pub fn led_past(&self, names: &[ServiceName], observed: &Observed) -> Result<Vec<ServiceName>> {
        let mut left = Vec::new();
        for name in names {
            match self.port_of_candidate(name)? {
                Some(port) if observed.caddy.may_lead_to(port) => log::warning(format!(
                    "{name}: its candidate stays on port {port}, to which visitors may still be led; the next pass goes on"
                )),
                _ => left.push(name.clone()),
            }
        }
        Ok(left)
    }

    /// Where a candidate listens, by its unit; None where there is none.
    fn port_of_candidate(&self, name: &ServiceName) -> Result<Option<u16>> {
        match fs_err::read_to_string(self.root.next_unit(name)) {
            Ok(text) => Ok(unit::next_port(&text)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Lets the connections of candidates end, as long as their services allow.
    pub fn drain_candidates(
        &self,
        names: &[ServiceName],
        persisted: &PersistedState,
        observed: &Observed,
    ) -> Result<()> {
        let mut ports = Vec::new();
        for name in names {
            if let Some(port) = self.port_of_candidate(name)? {
                let seconds =
                    persisted.applied.get(name).map_or(DEFAULT_DRAIN_SEC, |a| a.service.drain_sec());
                ports.push((name, port, seconds));
            }
        }
        drain(&ports, &observed.caddy)
    }

    /// Stops candidates and removes their units.
    pub fn remove_candidates(&self, names: &[ServiceName], observed: &mut Observed) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let units: Vec<String> = names.iter().map(ServiceName::next_unit).collect();
        let stopping = systemd::stop(&units, EVERYBODY_WAITS)?;
        for name in names {
            if stopping.contains(&name.next_unit()) {
                log::warning(format!("{name}: the candidate is still stopping; the next pass removes it"));
                continue;
            }
            durable::remove(&self.root.next_unit(name))?;
            observed.candidates.remove(name);
            log::info(format!("{name}: the candidate is gone"));
        }
        systemd::daemon_reload()?;
        let gone: Vec<String> = units.into_iter().filter(|unit| !stopping.contains(unit)).collect();
        systemd::reset_failed(&gone)
    }
}

/// What requests are led to between the phases: candidates that are well, and for all others what was proved
/// last (what was never proved is led to where it will be).
fn interim_route<'a>(
    desired: &[&'a Service],
    persisted: &'a PersistedState,
    candidates: &BTreeMap<ServiceName, &'a Http>,
) -> Vec<&'a Http> {
    let mut claimed = BTreeSet::new();
    desired
        .iter()
        .filter(|s| s.artifact.store_path.path().is_some())
        .filter_map(|s| match (candidates.get(&s.name), persisted.applied.get(&s.name)) {
            (Some(http), _) => Some(*http),
            (None, Some(applied)) => applied.service.http.as_ref(),
            (None, None) => s.http.as_ref(),
        })
        .filter(|http| claimed.insert((http.domain.as_str(), http.path.as_str())))
        .collect()
}

/// A port nobody listens on and nobody was promised.
fn spare_port(taken: &mut BTreeSet<u16>) -> Result<u16> {
    let mut start = [0u8; 2];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut start)
        .map_err(|_| Error::new("the kernel gives no random numbers"))?;
    let count = SPARE_PORTS.len() as u32;
    let offset = u32::from(u16::from_ne_bytes(start)) % count;
    for i in 0..count {
        let port = SPARE_PORTS.start + ((offset + i) % count) as u16;
        if !taken.contains(&port) && nobody_listens(port) {
            taken.insert(port);
            return Ok(port);
        }
    }
    Err(Error::new(format!(
        "no port from {} to {} is free for an overlapping rollout; use rollout \"restart\"",
        SPARE_PORTS.start, SPARE_PORTS.end
    )))
}

/// Whether a service could listen there on whichever addresses it likes.
fn nobody_listens(port: u16) -> bool {
    let free = |any: IpAddr| match TcpListener::bind((any, port)) {
        Ok(_) => true,
        // Any other complaint is one about the protocol: this machine has no IPv6.
        Err(e) => any.is_ipv6() && e.kind() != ErrorKind::AddrInUse,
    };
    free(Ipv4Addr::UNSPECIFIED.into()) && free(Ipv6Addr::UNSPECIFIED.into())
}

/// Waits until no connection to these ports is open, each at most its own time in seconds: while a request has no whole
/// answer its connection is open, and Caddy ends those that have none. The connections to Caddy itself tell whether a
/// client may still come by the old route: Caddy ends what it has from before the change, idle ones at once, and until
/// then nobody can tell old from new, nor where Caddy's ports are not known.
fn drain(ports: &[(&ServiceName, u16, u32)], caddy: &caddy::CaddyState) -> Result<()> {
    let (front, known) = (caddy.ports(), matches!(caddy, caddy::CaddyState::Servers(_)));
    let begun = Instant::now();
    let mut open: Vec<&(&ServiceName, u16, u32)> = ports.iter().collect();
    if open.is_empty() {
        return Ok(());
    }
    std::thread::sleep(COUNT_EVERY);
    let clients_of = |peers: &Peers| -> BTreeSet<(u16, String)> {
        let fronts = peers.iter().filter(|(port, _)| front.contains(port));
        fronts.flat_map(|(port, all)| all.iter().map(|p| (*port, p.clone()))).collect()
    };
    let mut clients = clients_of(&established()?);
    loop {
        std::thread::sleep(COUNT_EVERY);
        let peers = established()?;
        clients = clients.intersection(&clients_of(&peers)).cloned().collect();
        let waited = begun.elapsed();
        let least = if clients.is_empty() && known { LEAST_DRAIN } else { SILENT_CLIENTS };
        let quiet = waited >= failpoint::shortened(least);
        open.retain(|(name, port, seconds)| {
            let count = peers.get(port).map_or(0, BTreeSet::len);
            let late = waited >= Duration::from_secs((*seconds).into()).max(LEAST_DRAIN);
            if count > 0 && late {
                log::warning(format!(
                    "{name}: {count} connection(s) to port {port} still open after {seconds} s"
                ));
            }
            (count > 0 || !quiet) && !late
        });
        if open.is_empty() {
            return Ok(());
        }
    }
}

/// Who is connected to each local port.
type Peers = BTreeMap<u16, BTreeSet<String>>;

/// The established connections by the kernel's tables (proc_pid_net(5)): column 2 is the local address with its
/// port in hexadecimal, column 3 the remote one, column 4 the state, 01 for established.
fn established() -> Result<Peers> {
    let mut peers = BTreeMap::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = match fs_err::read_to_string(table) {
            Ok(text) => text,
            // A kernel without IPv6 has no such table.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e.into()),
        };
        add_established(&text, &mut peers);
    }
    Ok(peers)
}

fn add_established(table: &str, peers: &mut Peers) {
    for line in table.lines().skip(1) {
        let mut columns = line.split_whitespace().skip(1);
        let (Some(local), Some(remote), Some("01")) = (columns.next(), columns.next(), columns.next()) else {
            continue;
        };
        if let Some(Ok(port)) = local.rsplit(':').next().map(|p| u16::from_str_radix(p, 16)) {
            peers.entry(port).or_default().insert(remote.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, load};
    use crate::deployer::root::Root;
    use serde_json::{Value, json};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    #[test]
    fn only_established_connections_to_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n\
            1: 0100007F:1F90 0100007F:D431 01 00000000:00000000\n\
            2: 0100007F:D431 0100007F:1F90 01 00000000:00000000\n\
            3: 0100007F:1F90 0100007F:D432 06 00000000:00000000\n";
        let mut peers = BTreeMap::new();
        add_established(table, &mut peers);
        assert_eq!(peers[&8080], BTreeSet::from(["0100007F:D431".to_string()]));
    }

    /// A Caddy with one server, which takes what it is told or does not, and answers to that or does not.
    fn caddy_at(path: &Path, takes: bool, answers: bool) {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let mut servers = json!({"srv0": {"listen": [":443"], "routes": []}});
            for mut stream in listener.incoming().map(Result::unwrap) {
                let (mut asked, mut buffer) = (Vec::new(), [0; 4096]);
                let body = loop {
                    let n = stream.read(&mut buffer).unwrap();
                    asked.extend_from_slice(&buffer[..n]);
                    let text = String::from_utf8_lossy(&asked);
                    let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                    let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: "));
                    if body.len() == length.map_or(0, |l| l.parse().unwrap()) {
                        break body.to_string();
                    }
                };
                let told = !asked.starts_with(b"GET ");
                if told && takes {
                    let route: Value = serde_json::from_str(&body).unwrap();
                    servers["srv0"]["routes"] = if route.is_array() { route } else { json!([route]) };
                }
                if !told || answers {
                    write!(stream, "HTTP/1.0 200 OK\r\n\r\n{servers}").unwrap();
                }
            }
        });
    }

    /// Only of a socket that root has made is it known that it is Caddy's.
    #[test]
    #[ignore = "needs root: cargo test -- --ignored"]
    fn what_caddy_was_told_is_known_also_when_its_answer_was_lost() {
        let http = Http {
            domain: "a.example.com".into(),
            path: "/".into(),
            internal_port: 20_001u16.into(),
            port_env: None,
            drain_sec: None,
            extra: serde_json::Map::new(),
        };
        for (takes, answers, well) in
            [(true, true, true), (true, false, true), (false, true, false), (false, false, false)]
        {
            let dir = tempfile::tempdir_in("/root").unwrap();
            let path = dir.path().join("admin.sock");
            caddy_at(&path, takes, answers);
            let flags = [("host", "here".to_string()), ("caddyAdmin", format!("unix/{}", path.display()))];
            let settings = load(&Flags::from(flags)).unwrap();
            let root = Root::system(dir.path());
            let host = Host { settings: &settings, root: &root };
            let mut observed = observed();
            observed.caddy = caddy::observe(&settings.caddy_admin);
            assert!(!observed.caddy.may_lead_to(20_001));
            let led = host.lead(&[&http], &BTreeSet::new(), &mut observed);
            // An answer without an error is believed.
            assert_eq!(led.is_ok(), well || answers, "takes {takes}, answers {answers}: {led:?}");
            assert_eq!(observed.caddy.may_lead_to(20_001), takes, "{observed:?}");
            // Its candidate goes when nobody is led to it, and only then.
            let name = ServiceName::parse("a").unwrap();
            let text = "# Managed by omni-deploy\n# An understudy on port 20001\n";
            durable::write(&root.next_unit(&name), text.as_bytes(), 0o644).unwrap();
            assert_eq!(unit::next_port(text), Some(20_001));
            let left = host.led_past(std::slice::from_ref(&name), &observed).unwrap();
            assert_eq!(left.is_empty(), takes);
        }
    }

    fn observed() -> Observed {
        Observed {
            units: BTreeMap::new(),
            present: BTreeSet::new(),
            roots: BTreeMap::new(),
            secrets: BTreeMap::new(),
            active: BTreeSet::new(),
            ports: BTreeMap::new(),
            kept_out: BTreeSet::new(),
            candidates: BTreeSet::new(),
            foreign_next: BTreeMap::new(),
            caddy: caddy::CaddyState::Unavailable("not asked yet".into()),
        }
    }

    #[test]
    fn a_spare_port_is_free_and_nobody_elses() {
        let mut taken: BTreeSet<u16> = (SPARE_PORTS.start..SPARE_PORTS.end - 2).collect();
        let port = spare_port(&mut taken).unwrap();
        assert!(port >= SPARE_PORTS.end - 2);
        assert!(taken.contains(&port));
        // A service may listen on all addresses, so one on any address is in its way.
        for address in ["127.0.0.1:0", "127.0.0.2:0", "0.0.0.0:0"] {
            let busy = TcpListener::bind(address).unwrap();
            assert!(!nobody_listens(busy.local_addr().unwrap().port()), "{address}");
        }
    }
}
