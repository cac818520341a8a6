//! How the product speaks HTTP: agents with time limits, proxies and TLS roots as the environment names them,
//! a name for every way in which no answer comes, and one policy of trying again. It never looks at what an
//! answer says: statuses are not errors here.

use crate::clock::Timestamp;
use std::fmt;
use std::time::{Duration, Instant};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

/// Reads a variable of the environment; tests bring their own.
pub type Env<'a> = &'a (dyn Fn(&str) -> Option<String> + 'a);

/// The process's own environment.
pub fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// How long an exchange may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// Until the connection stands: name, TCP, TLS.
    pub connect: Duration,
    /// From the end of the request to the head of the answer.
    pub answer: Duration,
    /// The whole exchange. None: as long as bytes flow.
    pub total: Option<Duration>,
    /// The longest pause between two bytes.
    pub stall: Duration,
}

/// How many connections to one server are kept. More threads than this have no use for one agent.
pub const CONNECTIONS: usize = 64;

/// An agent for one server. Statuses are answers, redirects are not followed; connections are kept and used
/// again. Errors name the variable of the environment that is wrong.
pub fn agent(env: Env, scheme: &str, host: &str, limits: HttpLimits) -> Result<ureq::Agent, String> {
    let roots = if scheme == "https" { roots(env)? } else { RootCerts::WebPki };
    Ok(configured(limits, proxy(env, scheme, host)?, roots))
}

/// An agent for plain HTTP to this machine, and to what only it can reach: never through a proxy.
pub fn local_agent(limits: HttpLimits) -> ureq::Agent {
    configured(limits, None, RootCerts::WebPki)
}

fn configured(limits: HttpLimits, proxy: Option<ureq::Proxy>, roots: RootCerts) -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("omni-deploy/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(limits.connect))
        .timeout_recv_response(Some(limits.answer))
        .timeout_per_read(Some(limits.stall))
        .timeout_per_write(Some(limits.stall))
        .timeout_global(limits.total)
        // Each connection has both for as long as it is kept; the head of an answer must fit.
        .input_buffer_size(64 << 10)
        .output_buffer_size(64 << 10)
        .max_idle_connections_per_host(CONNECTIONS)
        .max_idle_connections(CONNECTIONS)
        .proxy(proxy)
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .build()
        .new_agent()
}

/// Mozilla's roots, which are compiled in, or the PEM bundle that the environment names.
fn roots(env: Env) -> Result<RootCerts, String> {
    let named = ["AWS_CA_BUNDLE", "NIX_SSL_CERT_FILE", "SSL_CERT_FILE"]
        .into_iter()
        .find_map(|name| Some((name, env(name).filter(|v| !v.is_empty())?)));
    let Some((name, path)) = named else { return Ok(RootCerts::WebPki) };
    let wrong = |why: String| format!("cannot use {name}={path}: {why}; correct or unset {name}");
    let pem = fs_err::read(&path).map_err(|e| wrong(e.to_string()))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.map_err(|e| wrong(e.to_string()))? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(wrong("there is no certificate in it".into()));
    }
    Ok(certificates.into())
}

/// The proxy that curl(1) would take for this server; none for loopback, whatever the environment says.
fn proxy(env: Env, scheme: &str, host: &str) -> Result<Option<ureq::Proxy>, String> {
    let set = |name: &&str| Some((name.to_string(), env(name).filter(|v| !v.is_empty())?));
    let names: &[&str] = match scheme {
        "https" => &["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"],
        _ => &["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"],
    };
    let Some((name, url)) = names.iter().find_map(set) else { return Ok(None) };
    let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    let is_in = |domain: &str| format!(".{host}").ends_with(&format!(".{domain}"));
    let direct = ["no_proxy", "NO_PROXY"].iter().find_map(set).is_some_and(|(_, list)| {
        list.split(',').map(str::trim).any(|entry| {
            let domain = entry.trim_start_matches('*').trim_start_matches('.').to_ascii_lowercase();
            entry == "*" || !domain.is_empty() && is_in(&domain)
        })
    });
    let loopback =
        host.parse::<std::net::IpAddr>().map_or_else(|_| is_in("localhost"), |ip| ip.is_loopback());
    if direct || loopback {
        return Ok(None);
    }
    // The URL itself may hold a password: it is not shown.
    ureq::Proxy::new(&url).map(Some).map_err(|_| format!("{name} is not a proxy's URL; correct or unset it"))
}

/// Why no answer came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransferError {
    /// The host's name has no address.
    Unresolved,
    /// Nothing listens there.
    Refused,
    /// There is no way there.
    Unroutable,
    /// A time limit passed.
    Late,
    /// The connection ended before the answer did.
    Cut,
    /// No TLS connection; why.
    Tls(String),
    /// The same, for want of a certificate that is good; why.
    Certificate(String),
    /// The other side's certificate has expired; what the clock says here, and until when it was valid.
    Expired(Timestamp, Timestamp),
    /// The other side's certificate is not valid yet; what the clock says here, and from when it is.
    NotYetValid(Timestamp, Timestamp),
    /// The other side does not speak HTTP, or not as it should; how.
    Protocol(String),
    /// Anything else, in the client's words.
    Other(String),
}

impl TransferError {
    /// Whether the same request may well succeed a moment later.
    pub fn passes(&self) -> bool {
        self.is_absence() || matches!(self, TransferError::Late | TransferError::Cut)
    }

    /// Whether nobody is there at all, so that a few quick tries tell as much as many.
    pub fn is_absence(&self) -> bool {
        matches!(self, TransferError::Unresolved | TransferError::Refused | TransferError::Unroutable)
    }

    fn of_io(e: &std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        match e.kind() {
            Kind::ConnectionRefused => TransferError::Refused,
            Kind::HostUnreachable | Kind::NetworkUnreachable | Kind::NetworkDown => TransferError::Unroutable,
            Kind::TimedOut | Kind::WouldBlock => TransferError::Late,
            Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::NotConnected
            | Kind::UnexpectedEof => TransferError::Cut,
            Kind::InvalidData => match e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
                Some(e) => TransferError::of_tls(e),
                None => TransferError::Tls(e.to_string()),
            },
            // getaddrinfo's failures come without a kind of their own.
            _ if e.to_string().contains("failed to lookup address") => TransferError::Unresolved,
            _ => TransferError::Other(e.to_string()),
        }
    }

    fn of_tls(e: &rustls::Error) -> Self {
        use rustls::CertificateError as Certificate;
        let at = |time: &rustls::pki_types::UnixTime| Timestamp(time.as_secs().cast_signed());
        match e {
            rustls::Error::InvalidCertificate(Certificate::ExpiredContext { time, not_after }) => {
                TransferError::Expired(at(time), at(not_after))
            }
            rustls::Error::InvalidCertificate(Certificate::NotValidYetContext { time, not_before }) => {
                TransferError::NotYetValid(at(time), at(not_before))
            }
            rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
                TransferError::Certificate(e.to_string())
            }
            e => TransferError::Tls(e.to_string()),
        }
    }

    /// The trouble behind an error while the body was read.
    pub fn of_body(e: std::io::Error) -> Self {
        TransferError::from(ureq::Error::from(e))
    }
}

impl From<ureq::Error> for TransferError {
    fn from(e: ureq::Error) -> Self {
        match e {
            ureq::Error::Io(e) => TransferError::of_io(&e),
            ureq::Error::HostNotFound => TransferError::Unresolved,
            ureq::Error::Timeout(_) => TransferError::Late,
            ureq::Error::Tls(why) => TransferError::Tls(why.into()),
            ureq::Error::Rustls(e) => TransferError::of_tls(&e),
            e @ (ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..)) => {
                TransferError::Protocol(e.to_string())
            }
            e => TransferError::Other(e.to_string()),
        }
    }
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TransferError::Unresolved => f.write_str("its host name does not resolve"),
            TransferError::Refused => f.write_str("connection refused"),
            TransferError::Unroutable => f.write_str("no route to it"),
            TransferError::Late => f.write_str("no answer in time"),
            TransferError::Cut => f.write_str("the connection was cut before the answer was complete"),
            TransferError::Tls(why) | TransferError::Certificate(why) => {
                write!(f, "no TLS connection: {why}")
            }
            TransferError::Expired(here, until) => {
                write!(f, "its certificate was valid until {until}, and this machine's clock says {here}")
            }
            TransferError::NotYetValid(here, from) => {
                write!(f, "its certificate is valid from {from} on, and this machine's clock says {here}")
            }
            TransferError::Protocol(how) => write!(f, "what it says is not HTTP: {how}"),
            TransferError::Other(text) => f.write_str(text),
        }
    }
}

/// How often and how long a request is tried: exponential backoff with full jitter (a pause of a random part
/// of a bound that doubles), within a bound on the whole.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// How many tries at most, the first included.
    pub tries: u32,
    /// The bound of the first pause.
    pub first: Duration,
    /// The bound of every later pause.
    pub longest: Duration,
    /// No try begins, and no try lasts, after this.
    pub total: Duration,
}

/// What to do about a failed try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// It will not get better.
    No,
    /// As often as the policy says.
    Yes,
    /// Only this many tries.
    AtMost(u32),
}

/// The last failure, and how long it was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GaveUp<E> {
    /// What went wrong the last time.
    pub error: E,
    /// How many tries there were.
    pub tries: u32,
    /// How long they took together.
    pub after: Duration,
}

impl Retry {
    /// Tries until it works, cannot work, or took too long. `attempt` gets the time that is left to it.
    pub fn run<T, E>(
        &self,
        mut attempt: impl FnMut(Duration) -> Result<T, E>,
        again: impl Fn(&E) -> Again,
    ) -> Result<T, GaveUp<E>> {
        let begun = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match attempt(self.total.saturating_sub(begun.elapsed())) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let again = again(&error);
            let after = begun.elapsed();
            match self.pause(again, tries, after, crate::random::fraction()) {
                Some(pause) => std::thread::sleep(pause),
                None => return Err(GaveUp { error, tries, after }),
            }
        }
    }

    /// The pause after so many tries, which took so long together, by a chance in `0.0..1.0`; None: there is no other try.
    fn pause(&self, again: Again, tries: u32, after: Duration, chance: f64) -> Option<Duration> {
        let most = match again {
            Again::No => 0,
            Again::Yes => self.tries,
            Again::AtMost(tries) => tries.min(self.tries),
        };
        let doubled = self.first.saturating_mul(2_u32.saturating_pow(tries - 1));
        let pause = doubled.min(self.longest).mul_f64(chance);
        (tries < most && after + pause < self.total).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    const POLICY: Retry = Retry {
        tries: 6,
        first: Duration::from_millis(100),
        longest: Duration::from_secs(1),
        total: Duration::from_secs(10),
    };

    #[test]
    fn pauses_double_up_to_their_bound_and_tries_are_counted() {
        let pauses = |again, chance| -> Vec<u128> {
            let pause = |tries| POLICY.pause(again, tries, Duration::ZERO, chance);
            (1..).map_while(pause).map(|pause| pause.as_millis()).collect()
        };
        assert_eq!(pauses(Again::Yes, 0.5), [50, 100, 200, 400, 500]);
        assert_eq!(pauses(Again::Yes, 0.0), [0; 5]);
        assert_eq!(pauses(Again::AtMost(3), 0.5), [50, 100]);
        assert_eq!(pauses(Again::AtMost(9), 0.5).len(), 5);
        assert_eq!(pauses(Again::No, 0.5), [0; 0]);
    }

    #[test]
    fn what_cannot_get_better_is_tried_once_and_what_got_better_is_the_result() {
        let quick = Retry { first: Duration::from_micros(1), ..POLICY };
        let count = Cell::new(0);
        let try_one = |_| {
            count.set(count.get() + 1);
            if count.get() < 4 { Err(count.get()) } else { Ok("done") }
        };
        assert_eq!(quick.run(try_one, |_| Again::Yes), Ok("done"));
        assert_eq!(count.get(), 4);
        for (again, tries) in [(Again::No, 1), (Again::AtMost(3), 3), (Again::Yes, 6)] {
            let gave_up = quick.run(|_| Err::<(), _>(()), |()| again).unwrap_err();
            assert_eq!(gave_up.tries, tries);
        }
    }

    #[test]
    fn the_whole_is_bounded_and_every_try_knows_what_is_left() {
        let slow = Retry { tries: 100, ..POLICY };
        let after = |seconds| slow.pause(Again::Yes, 50, Duration::from_secs(seconds), 0.99);
        assert_eq!(
            (after(0), after(9)),
            (Some(Duration::from_millis(990)), Some(Duration::from_millis(990)))
        );
        assert_eq!((after(10), after(11)), (None, None));
        let short = Retry { total: Duration::from_millis(40), longest: Duration::from_millis(1), ..slow };
        let lefts = RefCell::new(Vec::new());
        let attempt = |left: Duration| {
            lefts.borrow_mut().push(left);
            std::thread::sleep(Duration::from_millis(9));
            Err::<(), _>(())
        };
        let gave_up = short.run(attempt, |()| Again::Yes).unwrap_err();
        assert!((1..=5).contains(&gave_up.tries), "{gave_up:?}");
        assert!(lefts.borrow().windows(2).all(|w| w[1] < w[0]), "{lefts:?}");
        assert!(lefts.borrow().iter().all(|left| *left <= short.total), "{lefts:?}");
    }

    #[test]
    fn proxies_are_for_outside_hosts_that_no_proxy_does_not_name() {
        let env = |name: &str| match name {
            "HTTPS_PROXY" => Some("http://user:pw@proxy.example:3128".to_string()),
            "NO_PROXY" => Some("internal.example, .corp.example,10.0.0.5".to_string()),
            _ => None,
        };
        for (scheme, host, proxied) in [
            ("https", "s3.eu-1.example", true),
            ("http", "s3.eu-1.example", false),
            ("https", "internal.example", false),
            ("https", "a.internal.example", false),
            ("https", "xinternal.example", true),
            ("https", "s3.corp.example", false),
            ("https", "10.0.0.5", false),
            ("https", "127.0.0.1", false),
            ("https", "[::1]", false),
            ("https", "localhost", false),
            ("https", "s3.localhost", false),
        ] {
            assert_eq!(proxy(&env, scheme, host).unwrap().is_some(), proxied, "{scheme} {host}");
        }
        let wrong = |name: &str| (name == "ALL_PROXY").then(|| "http://".to_string());
        assert!(proxy(&wrong, "https", "x.example").unwrap_err().contains("ALL_PROXY"));
    }

    #[test]
    fn a_bundle_of_roots_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let env = |name: &str| (name == "NIX_SSL_CERT_FILE").then(|| path.display().to_string());
        let error = roots(&env).unwrap_err();
        assert!(error.contains("NIX_SSL_CERT_FILE") && error.contains("ca.pem"), "{error}");
        fs_err::write(&path, "nothing").unwrap();
        assert!(roots(&env).unwrap_err().contains("no certificate"));
        assert!(matches!(roots(&|_| None), Ok(RootCerts::WebPki)));
    }
}
