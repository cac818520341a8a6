//! What visitors of this host's domains meet: where DNS leads them, what certificate this host shows them, what
//! answers, on :80 too. [`of_host`] looks, on the host itself; [`judge`] says what is wrong, and is pure. Bounded in time
//! and number, through no proxy, and nothing is changed by it.

mod visitor;

use super::{Finding, fail, ok, warn};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::deployer::caddy::{self, CaddyState, Listener};
use crate::deployer::live::{self, LiveState, Verdict, Visit};
use crate::deployer::state::{ServicePhase, State};
use crate::error::Error;
use crate::log::printable;
use crate::manifest::{Manifest, Service};
use crate::names::{HostName, ServiceName};
use crate::parallel;
use crate::systemd;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use visitor::{Certificate, CertificateFault, CertificateTrust, NoAnswer, Reply, Request, ResponseHead};

/// How many domains are visited at most, at the same time; the others are said not to have been.
pub const MOST: usize = 64;

/// How long the look at DNS may take.
const RESOLVE: Duration = Duration::from_secs(4);

/// How long one request may take.
const ANSWER: Duration = Duration::from_secs(4);

/// How long all requests of one domain may take together.
const DOMAIN: Duration = Duration::from_secs(12);

/// How long DNS's addresses are tried, which may be anybody's.
const THERE: Duration = Duration::from_secs(2);

/// A reason of Caddy's is cut here, in characters.
const MAX_REASON: usize = 400;

/// Looks, and tries the domains of the services of this host, by the manifest that its deployer obeys.
pub fn live_with_domains(settings: &Settings, now: Timestamp) -> Result<LiveState, Error> {
    let mut answer = live::look(&settings.unit_dir, now)?;
    if let Some(manifest) = live::obeyed(&settings.unit_dir) {
        let state = answer.state.as_ref();
        let host = state.map_or(&settings.host, |state| &state.host);
        answer.live.domains = of_host(host, &manifest, state, &caddy::look(&settings.caddy_admin));
    }
    Ok(answer)
}

/// Visits the domains of the services that run on this host, all at the same time. One that was never pushed, or is
/// stopped on purpose, serves nobody. `caddy` is what Caddy has.
pub fn of_host(
    host: &HostName,
    manifest: &Manifest,
    state: Option<&State>,
    caddy: &CaddyState,
) -> Vec<Visit> {
    let stopped = |s: &Service| {
        let known = state.and_then(|state| state.services.get(&s.name));
        known.is_some_and(|known| known.status == ServicePhase::Stopped)
    };
    let here = manifest.services.iter().filter(|s| s.hosts.contains(host));
    let serving = here.filter(|s| s.artifact.store_path.path().is_some() && !stopped(s));
    let mut domains: BTreeMap<&str, Vec<&Service>> = BTreeMap::new();
    for service in serving {
        if let Some(http) = &service.http {
            domains.entry(http.domain.as_str()).or_default().push(service);
        }
    }
    let all: Vec<(&str, Vec<&Service>)> = domains.into_iter().collect();
    let trust = visitor::trust_of_the_system();
    let some = &all[..all.len().min(MOST)];
    let seen = parallel::map(some, MOST, |(name, services)| look(name, services, caddy, &trust));
    // Caddy is only asked for its reasons where something is missing.
    let log = if seen.iter().any(DomainView::lacks_a_certificate) { systemd::caddy_log() } else { vec![] };
    let visits = all.iter().enumerate().map(|(at, (domain, services))| {
        let found = match seen.get(at) {
            Some(seen) => judge(seen, reason(&log, &seen.name)),
            None => warn(format!(
                "not looked at: more than {MOST} domains; look with 'curl -v https://{domain}/'"
            )),
        };
        let services = services.iter().map(|s| s.name.clone()).collect();
        let text = printable(&found.text).into_owned();
        Visit { domain: domain.to_string(), services, verdict: found.verdict, text }
    });
    visits.collect()
}

/// A name that the domain covers: of a wildcard the one by which a service is asked (`health.host`), or `www`.
fn concrete(domain: &str, services: &[&Service]) -> String {
    let Some(below) = domain.strip_prefix("*.") else { return domain.to_string() };
    let covered = |host: &&str| host.strip_suffix(below).is_some_and(|label| label.ends_with('.'));
    let set = services.iter().filter_map(|s| s.health.as_ref()?.host.as_deref()).find(covered);
    set.map_or_else(|| format!("www.{below}"), String::from)
}

/// Where a name leads.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Dns {
    /// Nowhere; in the resolver's words.
    Nowhere(String),
    /// It was not found out in time.
    TimedOut,
    /// To these addresses; whether each is this host's.
    To(Vec<(IpAddr, bool)>),
}

/// What one service behind the domain said.
#[derive(Debug, Clone)]
struct ServiceVisit {
    service: ServiceName,
    path: String,
    port: u16,
    /// To a visitor.
    visitor: Reply,
    /// To somebody on the host.
    direct: Result<ResponseHead, NoAnswer>,
}

/// Everything that was seen of a domain.
#[derive(Debug, Clone)]
struct DomainView {
    name: String,
    dns: Dns,
    /// The address that this host uses towards the outside.
    own: Option<IpAddr>,
    listener: Listener,
    /// Somebody else's route answers before ours.
    behind: bool,
    asked: Vec<ServiceVisit>,
    /// For these no time was left.
    not_asked: Vec<ServiceName>,
    /// What :80 answers where :443 is the listener and time was left.
    plain: Option<Result<ResponseHead, NoAnswer>>,
    /// Who else shows the same certificate: DNS leads there, and from there to here.
    forwarded: bool,
    /// What DNS's address shows instead.
    elsewhere: Option<Reply>,
    now: Timestamp,
}

impl DomainView {
    fn lacks_a_certificate(&self) -> bool {
        self.asked.iter().any(|a| {
            matches!(a.visitor.answer, Err(NoAnswer::NoCertificate))
                || a.visitor.certificate.as_ref().is_some_and(|c| c.fault.is_some())
        })
    }
}

fn look(domain: &str, services: &[&Service], caddy: &CaddyState, trust: &CertificateTrust) -> DomainView {
    let name = concrete(domain, services);
    let resolving = resolve(&name);
    let until = within(DOMAIN);
    let deadline = || within(ANSWER).min(until);
    let (listener, behind) = (caddy.listener(domain), caddy.is_behind(domain));
    let (mut asked, mut not_asked) = (vec![], vec![]);
    let mut plain = None;
    if let Listener::Server { https, http, other, .. } = &listener {
        for service in services {
            let Some(route) = &service.http else { continue };
            if Instant::now() + ANSWER > until {
                not_asked.push(service.name.clone());
                continue;
            }
            let path = path(service);
            let over_tls = |to| visitor::https(visitors_request(to, &name, &path), trust, deadline());
            let over_http = |to| visitor::http(visitors_request(to, &name, &path), deadline());
            let reply = match (https, http, other) {
                (Some(to), ..) => over_tls(*to),
                (None, Some(to), _) => over_http(*to),
                (None, None, Some(to)) => match over_tls(*to) {
                    Reply { answer: Err(NoAnswer::NotTls), .. } => over_http(*to),
                    reply => reply,
                },
                (None, None, None) => continue,
            };
            let scheme = if reply.certificate.is_some() { "https" } else { "http" };
            let forwarded = format!(
                "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Host: {name}\r\nX-Forwarded-Proto: {scheme}\r\n"
            );
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, route.internal_port.get()));
            let request = Request { to, host: &name, path: &path, forwarded: &forwarded };
            asked.push(ServiceVisit {
                service: service.name.clone(),
                direct: visitor::http(request, deadline()).answer,
                port: route.internal_port.get(),
                visitor: reply,
                path,
            });
        }
        if let Some(https) = https
            && Instant::now() < until
        {
            let to = SocketAddr::new(http.map_or(https.ip(), |http| http.ip()), 80);
            plain = Some(visitor::http(visitors_request(to, &name, "/"), deadline()).answer);
        }
    }
    let dns = resolving.recv_timeout(RESOLVE).unwrap_or(Dns::TimedOut);
    let shown = asked.iter().find_map(|a| a.visitor.certificate.as_ref());
    let mut elsewhere = None;
    if let Dns::To(addresses) = &dns
        && !addresses.iter().any(|(_, here)| *here)
        && let Some((address, _)) = addresses.first()
        && matches!(listener, Listener::Server { https: Some(_), .. })
    {
        let to = SocketAddr::new(*address, 443);
        elsewhere = Some(visitor::https(visitors_request(to, &name, "/"), trust, within(THERE)));
    }
    let theirs = elsewhere.as_ref().and_then(|reply| reply.certificate.as_ref());
    let forwarded = shown.is_some_and(|ours| theirs.is_some_and(|theirs| theirs.der == ours.der));
    let own = source_towards(Ipv4Addr::new(192, 0, 2, 1).into());
    let now = Timestamp::now();
    DomainView { own, forwarded, elsewhere, name, dns, listener, behind, asked, not_asked, plain, now }
}

/// A request as a visitor makes it.
fn visitors_request<'a>(to: SocketAddr, host: &'a str, path: &'a str) -> Request<'a> {
    Request { to, host, path, forwarded: "" }
}

fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}

/// What is asked of a service: where it says that it is well, if that is within its route, else the top of it.
fn path(service: &Service) -> String {
    let top = service.http.as_ref().map_or("/", |http| http.path.as_str());
    let health = service.health.as_ref().and_then(|health| health.path.as_deref());
    let within = |path: &&str| {
        top == "/" || path.strip_prefix(top).is_some_and(|r| r.is_empty() || r.starts_with('/'))
    };
    health.filter(within).unwrap_or(top).to_string()
}

/// Asks the system's resolver, which has no limit of its own, so that it can be left behind.
fn resolve(name: &str) -> mpsc::Receiver<Dns> {
    let (sender, answer) = mpsc::channel();
    let name = name.to_string();
    std::thread::spawn(move || {
        let dns = match (name.as_str(), 443).to_socket_addrs() {
            Err(e) => {
                let text = e.to_string();
                Dns::Nowhere(
                    text.strip_prefix("failed to lookup address information: ").unwrap_or(&text).into(),
                )
            }
            Ok(found) => {
                let mut addresses: Vec<IpAddr> = found.map(|a| a.ip()).collect();
                addresses.sort();
                addresses.dedup();
                addresses.truncate(8);
                Dns::To(addresses.into_iter().map(|a| (a, source_towards(a) == Some(a))).collect())
            }
        };
        // Nobody may be waiting any more.
        drop(sender.send(dns));
    });
    answer
}

/// The address that the kernel would send from: towards one of this host's own, it is that address. Nothing is sent.
fn source_towards(address: IpAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((address, 443)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// What Caddy logged last of why it has no certificate for a name.
fn reason(log: &[String], name: &str) -> Option<String> {
    log.iter().rev().find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        let of_tls = line["logger"].as_str()?.starts_with("tls");
        let bad = line["level"] == "error" || line["level"] == "warn";
        let error = line["error"].as_str()?;
        let about =
            line["identifier"] == name || line["domain"] == name || error.contains(&format!("[{name}]"));
        (of_tls && bad && about).then(|| error.chars().take(MAX_REASON).collect())
    })
}

/// Says what is wrong, the cause before what follows from it. `reason`: Caddy's, for having no certificate.
fn judge(seen: &DomainView, reason: Option<String>) -> Finding {
    let mut found = match &seen.listener {
        Listener::Unknown(why) => vec![fail(format!("whether visitors get an answer is not known: {why}"))],
        Listener::NoRoute => vec![fail(
            "Caddy has no route for it: run 'sudo systemctl start deployer' here, then 'deployer state' says why",
        )],
        Listener::Server { name, https: None, http: None, other: None } => vec![fail(format!(
            "Caddy's server '{name}' listens nowhere; give it ':443' in Caddy's configuration"
        ))],
        Listener::Server { name, https, http, .. } => {
            let behind = seen.behind.then(|| {
                fail(format!(
                    "another route in Caddy's server '{name}' comes before ours and answers its visitors: run 'sudo \
                     systemctl start deployer' here, which puts ours first"
                ))
            });
            let plain = match (https, http, &seen.plain) {
                (Some(_), _, plain) => plain.as_ref().map(on_port_80),
                (None, Some(_), _) => {
                    Some(ok(format!("over http alone, as Caddy's server '{name}' does not listen on :443")))
                }
                (None, None, _) => None,
            };
            certificate(seen, reason).into_iter().chain(answers(seen)).chain(behind).chain(plain).collect()
        }
    };
    found.push(dns(seen));
    let verdict = found.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Ok);
    // Of one with which something is wrong that is said alone.
    found.retain(|f| verdict == Verdict::Ok || f.verdict != Verdict::Ok);
    let texts: Vec<String> = found.into_iter().map(|f| f.text).collect();
    Finding { verdict, text: texts.join("; ") }
}

fn certificate(seen: &DomainView, reason: Option<String>) -> Option<Finding> {
    const OUTSIDE: &str = "DNS must lead here and ports 80 and 443 be reachable from outside";
    let because = reason.map_or_else(
        || format!("{OUTSIDE}; 'omni-deploy logs caddy' has its attempts"),
        |reason| format!("its last attempt: {reason}; {OUTSIDE}"),
    );
    if seen.asked.iter().any(|a| a.visitor.answer == Err(NoAnswer::NoCertificate)) {
        return Some(fail(format!(
            "no certificate yet: Caddy has none to show for {}; {because}",
            seen.name
        )));
    }
    let shown = seen.asked.iter().find_map(|a| a.visitor.certificate.as_ref())?;
    let Certificate { issuer, self_signed, until, fault, der: _ } = shown;
    let until = until.map_or_else(|| "an unknown time".to_string(), |until| until.to_string());
    Some(match fault {
        None => ok(format!("certificate from '{issuer}' until {until}")),
        Some(CertificateFault::Expired) => fail(format!(
            "its certificate from '{issuer}' expired at {until} (it is {} here): Caddy did not renew it; {because}",
            seen.now
        )),
        Some(CertificateFault::NotYetValid) => fail(format!(
            "its certificate from '{issuer}' is not valid yet, and it is {} here: set the clock ('timedatectl')",
            seen.now
        )),
        Some(CertificateFault::OtherName) => fail(format!(
            "the certificate that is shown, from '{issuer}', is for another name: what listens on :443 has none for \
             {}; {because}",
            seen.name
        )),
        Some(CertificateFault::UnknownIssuer) if *self_signed => fail(
            "its certificate is self-signed, which browsers reject: take 'tls' with that file out of Caddy's \
             configuration, and Caddy gets one",
        ),
        Some(CertificateFault::UnknownIssuer) => fail(format!(
            "its certificate is from '{issuer}', whom this host does not trust, nor does a browser: take 'tls \
             internal' (or that issuer) out of Caddy's configuration; if the authority is your own, put its root \
             into /usr/local/share/ca-certificates and run update-ca-certificates"
        )),
        Some(CertificateFault::NotVerified) => warn(format!(
            "its certificate from '{issuer}' until {until} could not be verified, as this host trusts no authority: \
             install ca-certificates"
        )),
        Some(CertificateFault::Other(why)) => {
            fail(format!("its certificate from '{issuer}' is not valid: {why}; {because}"))
        }
    })
}

fn answers(seen: &DomainView) -> Vec<Finding> {
    let mut found = Vec::new();
    if !seen.not_asked.is_empty() {
        let names: Vec<&str> = seen.not_asked.iter().map(ServiceName::as_str).collect();
        let names = names.join(", ");
        found.push(warn(format!("not asked, because what was asked before took too long: {names}")));
    }
    for ServiceVisit { service, path, port, visitor, direct } in &seen.asked {
        let scheme = if visitor.certificate.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}{path}", seen.name);
        found.push(match (&visitor.answer, direct) {
            // Said already, with its reason.
            (Err(NoAnswer::NoCertificate), _) => continue,
            (Err(NoAnswer::TimedOut) | Ok(_), Err(NoAnswer::TimedOut)) => warn(format!(
                "{service} takes longer than {} s to answer {url}: 'omni-deploy logs {service}' may say why",
                ANSWER.as_secs()
            )),
            (_, Err(why)) => fail(format!(
                "{service} does not answer on 127.0.0.1:{port} ({why}): 'omni-deploy status {service}' has the reason"
            )),
            (Err(why @ (NoAnswer::Refused | NoAnswer::Unroutable)), Ok(_)) => fail(format!(
                "nothing answers for {url} on this host ({why}), though Caddy is told to: 'journalctl -u caddy' says \
                 why"
            )),
            (Err(why), Ok(direct)) => fail(format!(
                "no answer to {url}: {why}; {service} itself answers {} on 127.0.0.1:{port}: see 'journalctl -u caddy'",
                direct.status
            )),
            (Ok(theirs), Ok(own)) if theirs.status / 100 != own.status / 100 => fail(format!(
                "{url} answers {}, and {service} on 127.0.0.1:{port} answers {}: something else answers visitors; look \
                 with 'curl -v' and at who listens there ('ss -ltnp')",
                theirs.status, own.status
            )),
            (Ok(theirs), Ok(own)) if theirs.empty && !own.empty => fail(format!(
                "{url} gives an empty page, as Caddy does without a route, and {service} on 127.0.0.1:{port} does not: \
                 something else answers visitors ('ss -ltnp')"
            )),
            (Ok(answer), Ok(_)) if answer.status >= 500 => warn(format!(
                "{service} answers {} to {url}: 'omni-deploy logs {service}' may say why",
                answer.status
            )),
            (Ok(answer), Ok(_)) => ok(format!("{url} answers {} from {service}", answer.status)),
        });
    }
    found
}

fn on_port_80(plain: &Result<ResponseHead, NoAnswer>) -> Finding {
    match plain {
        Ok(ResponseHead { status: 300..=399, location: Some(to), .. }) if to.starts_with("https://") => {
            ok("http leads to https")
        }
        Ok(answer) => warn(format!(
            "http:// answers {} and does not lead to https: something else than Caddy's redirect answers on :80",
            answer.status
        )),
        Err(NoAnswer::Refused) => warn(
            "nothing listens on :80: visitors who type the name without https:// get no answer, and the HTTP \
             challenge for a certificate fails",
        ),
        Err(why) => warn(format!("http:// gives no answer: {why}")),
    }
}

fn dns(seen: &DomainView) -> Finding {
    let name = &seen.name;
    let addresses = match &seen.dns {
        Dns::TimedOut => {
            return warn("DNS was not looked at: the resolver gave no answer in time; see /etc/resolv.conf");
        }
        Dns::Nowhere(why) => {
            return fail(format!(
                "DNS has no address for {name} ({why}): make an A record that leads to this host{}",
                seen.own.map_or_else(String::new, |own| format!(" ({own}, or its address outside of NAT)"))
            ));
        }
        Dns::To(addresses) => addresses,
    };
    let list = |here: bool| {
        let some = addresses.iter().filter(|(_, h)| *h == here).map(|(a, _)| a.to_string());
        some.collect::<Vec<_>>().join(", ")
    };
    let (here, elsewhere) = (list(true), list(false));
    if here.is_empty() && seen.forwarded {
        ok(format!("DNS leads here through {elsewhere}"))
    } else if here.is_empty() {
        let own = seen.own.map_or_else(String::new, |own| format!(" (it has {own})"));
        let mut text = format!("DNS leads to {elsewhere}, which is not this host{own}");
        match &seen.elsewhere {
            Some(Reply { certificate: Some(theirs), .. }) => {
                text += &format!("; there a certificate from '{}' is shown", theirs.issuer);
            }
            Some(Reply { answer: Err(why), .. }) => {
                text += &format!("; from here that gives no answer ({why})")
            }
            _ => {}
        }
        // A certificate that others vouch for shows that the name led here, whatever DNS says to this host.
        let is_sound = |c: &Certificate| c.fault.is_none();
        let proved = seen.asked.iter().any(|a| a.visitor.certificate.as_ref().is_some_and(is_sound));
        if proved || seen.own.is_none_or(is_private) {
            warn(format!(
                "{text}: right if that address forwards to this host (NAT, a load balancer), else correct \
                                the record of {name}"
            ))
        } else {
            fail(format!("{text}: visitors do not come here; correct the A and AAAA records of {name}"))
        }
    } else if addresses.iter().all(|(a, _)| a.is_loopback()) {
        warn(format!(
            "this host itself resolves {name} to {here} (/etc/hosts?): where DNS leads visitors is not seen \
                            from here"
        ))
    } else if elsewhere.is_empty() {
        ok(format!("DNS leads here ({here})"))
    } else {
        warn(format!(
            "DNS leads here ({here}) and to {elsewhere}: right if another host serves {name} there, else take that record out"
        ))
    }
}

/// Whether an address is one that only a local network knows.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            let [first, second, ..] = a.octets();
            a.is_private() || a.is_loopback() || a.is_link_local() || first == 100 && second & 0xc0 == 64
        }
        IpAddr::V6(a) => {
            a.is_loopback() || a.segments()[0] & 0xfe00 == 0xfc00 || a.segments()[0] & 0xffc0 == 0xfe80
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16) -> ResponseHead {
        ResponseHead { status, location: None, empty: false }
    }

    fn certificate(fault: Option<CertificateFault>) -> Certificate {
        let until = Timestamp::parse("2026-12-01T00:00:00Z");
        Certificate { issuer: "R11".into(), self_signed: false, until, fault, der: vec![1] }
    }

    /// A domain with which all is well.
    fn well() -> DomainView {
        let address: IpAddr = Ipv4Addr::new(198, 51, 100, 7).into();
        DomainView {
            name: "shop.example.com".into(),
            dns: Dns::To(vec![(address, true)]),
            own: Some(address),
            behind: false,
            listener: Listener::Server {
                name: "srv0".into(),
                https: Some("127.0.0.1:443".parse().unwrap()),
                http: None,
                other: None,
            },
            asked: vec![ServiceVisit {
                service: ServiceName::parse("shop").unwrap(),
                path: "/".into(),
                port: 8080,
                visitor: Reply { certificate: Some(certificate(None)), answer: Ok(answer(200)) },
                direct: Ok(answer(204)),
            }],
            not_asked: vec![],
            plain: Some(Ok(ResponseHead {
                location: Some("https://shop.example.com/".into()),
                ..answer(308)
            })),
            forwarded: false,
            elsewhere: None,
            now: Timestamp::parse("2026-11-27T00:00:00Z").unwrap(),
        }
    }

    /// A name and what it says of the host, with what is changed of a domain with which all is well.
    type Row<'a> = (&'a str, Verdict, &'a [&'a str], fn(&mut DomainView));

    #[test]
    fn whatever_keeps_visitors_away_is_named_with_its_cause() {
        let rows: [Row; 21] = [
            ("no time left", Verdict::Warn, &["not asked", "took too long: cart"], |s| {
                s.not_asked.push(ServiceName::parse("cart").unwrap());
            }),
            ("slow", Verdict::Warn, &["shop takes longer than 4 s"], |s| {
                s.asked[0].visitor.answer = Err(NoAnswer::TimedOut);
                s.asked[0].direct = Err(NoAnswer::TimedOut);
            }),
            (
                "well",
                Verdict::Ok,
                &["answers 200 from shop", "'R11' until 2026-12-01", "(198.51.100.7)"],
                |_| {},
            ),
            ("expired", Verdict::Fail, &["expired at 2026-12-01", "did not renew"], |s| {
                s.asked[0].visitor.certificate = Some(certificate(Some(CertificateFault::Expired)));
            }),
            ("not yet valid", Verdict::Fail, &["timedatectl"], |s| {
                s.asked[0].visitor.certificate = Some(certificate(Some(CertificateFault::NotYetValid)));
            }),
            ("for another name", Verdict::Fail, &["is for another name"], |s| {
                s.asked[0].visitor.certificate = Some(certificate(Some(CertificateFault::OtherName)));
            }),
            ("self-signed", Verdict::Fail, &["self-signed"], |s| {
                s.asked[0].visitor.certificate = Some(Certificate {
                    self_signed: true,
                    ..certificate(Some(CertificateFault::UnknownIssuer))
                });
            }),
            ("nobody is trusted", Verdict::Warn, &["install ca-certificates"], |s| {
                s.asked[0].visitor.certificate = Some(certificate(Some(CertificateFault::NotVerified)));
            }),
            ("no certificate", Verdict::Fail, &["no certificate yet", "its last attempt: HTTP 429"], |s| {
                s.asked[0].visitor = Reply { certificate: None, answer: Err(NoAnswer::NoCertificate) };
            }),
            ("nobody listens", Verdict::Fail, &["connection refused", "though Caddy is told to"], |s| {
                s.asked[0].visitor = Reply { certificate: None, answer: Err(NoAnswer::Refused) };
            }),
            ("the service is away", Verdict::Fail, &["shop does not answer on 127.0.0.1:8080"], |s| {
                s.asked[0].direct = Err(NoAnswer::Refused);
                s.asked[0].visitor.answer = Ok(answer(502));
            }),
            ("Caddy's empty page", Verdict::Fail, &["an empty page"], |s| {
                s.asked[0].visitor.answer = Ok(ResponseHead { empty: true, ..answer(200) });
            }),
            ("somebody else's page", Verdict::Fail, &["something else answers"], |s| {
                s.asked[0].visitor.answer = Ok(answer(404));
            }),
            ("unwell all the same", Verdict::Warn, &["answers 500"], |s| {
                s.asked[0].visitor.answer = Ok(answer(500));
                s.asked[0].direct = Ok(answer(503));
            }),
            ("nothing on :80", Verdict::Warn, &["nothing listens on :80"], |s| {
                s.plain = Some(Err(NoAnswer::Refused));
            }),
            ("another page on :80", Verdict::Warn, &["does not lead to https"], |s| {
                s.plain = Some(Ok(answer(200)));
            }),
            ("an old AAAA record", Verdict::Warn, &["and to 2001:db8::1"], |s| {
                let old = "2001:db8::1".parse().unwrap();
                let Dns::To(addresses) = &mut s.dns else { unreachable!() };
                addresses.push((old, false));
            }),
            (
                "elsewhere, and no certificate",
                Verdict::Fail,
                &["visitors do not come here", "(it has 198.51.100.7)"],
                |s| {
                    s.dns = Dns::To(vec![(Ipv4Addr::new(203, 0, 113, 9).into(), false)]);
                    s.asked[0].visitor = Reply { certificate: None, answer: Err(NoAnswer::NoCertificate) };
                },
            ),
            (
                "elsewhere, with a certificate",
                Verdict::Warn,
                &["a certificate from 'R11' is shown", "load balancer"],
                |s| {
                    s.dns = Dns::To(vec![(Ipv4Addr::new(203, 0, 113, 9).into(), false)]);
                    s.elsewhere =
                        Some(Reply { certificate: Some(certificate(None)), answer: Ok(answer(200)) });
                },
            ),
            ("through NAT", Verdict::Ok, &["DNS leads here through 203.0.113.9"], |s| {
                s.dns = Dns::To(vec![(Ipv4Addr::new(203, 0, 113, 9).into(), false)]);
                s.forwarded = true;
            }),
            ("no route", Verdict::Fail, &["Caddy has no route"], |s| {
                s.listener = Listener::NoRoute;
                s.asked.clear();
            }),
        ];
        for (name, verdict, words, change) in rows {
            let mut seen = well();
            change(&mut seen);
            let Finding { verdict: is, text } =
                judge(&seen, seen.lacks_a_certificate().then(|| "HTTP 429".to_string()));
            assert_eq!(is, verdict, "{name}: {text}");
            assert!(words.iter().all(|word| text.contains(word)), "{name}: {text}");
        }
    }

    #[test]
    fn of_a_wildcard_a_name_is_visited_that_it_covers() {
        assert_eq!(concrete("*.example.com", &[]), "www.example.com");
    }

    #[test]
    fn caddys_last_reason_is_the_names_own() {
        let log = [
            r#"{"level":"error","logger":"tls.obtain","msg":"could not get certificate from issuer","identifier":"shop.example.com","issuer":"acme","error":"HTTP 400"}"#,
            r#"{"level":"error","logger":"tls.obtain","msg":"will retry","error":"[shop.example.com] Obtain: HTTP 429"}"#,
            r#"{"level":"error","logger":"tls.obtain","identifier":"other.example.com","error":"HTTP 500"}"#,
            r#"{"level":"info","logger":"tls.obtain","identifier":"shop.example.com","error":"none"}"#,
            "no JSON",
        ]
        .map(String::from);
        assert_eq!(reason(&log, "shop.example.com").as_deref(), Some("[shop.example.com] Obtain: HTTP 429"));
        assert_eq!(reason(&log[..1], "shop.example.com").as_deref(), Some("HTTP 400"));
        assert_eq!(reason(&log, "x.example.com"), None);
    }
}
