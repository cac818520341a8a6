//! What a visitor of this host does: a connection, TLS with the domain's name, one GET. Certificates are judged and
//! never stop the visit, so that both what is wrong with one and what answers behind it can be told. No proxy, no
//! redirect, nothing kept, and never longer than the deadline.

use crate::clock::Timestamp;
use crate::parallel::locked;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore,
    SignatureScheme, StreamOwned,
};
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The longest head of an answer that is read, in bytes.
const MAX_HEAD: usize = 32 << 10;

/// Where systems keep the certificates of the authorities that they trust.
const ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// What a certificate is held against; None: this machine trusts nobody.
pub type CertificateTrust = Option<Arc<WebPkiServerVerifier>>;

/// The authorities that this system trusts.
pub fn trust_of_the_system() -> CertificateTrust {
    let named = std::env::var_os("SSL_CERT_FILE").filter(|file| !file.is_empty());
    let files = named.as_deref().map(Path::new).into_iter().chain(ROOTS.iter().map(Path::new));
    let pem = files.filter_map(|file| fs_err::read(file).ok()).next().unwrap_or_default();
    let mut roots = RootCertStore::empty();
    // Some of a bundle may be of a form that rustls does not take; the others count.
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).flatten());
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build().ok()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn signatures() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}

/// What is wrong with a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateFault {
    /// Its time is over.
    Expired,
    /// Its time has not come, or the clock is wrong.
    NotYetValid,
    /// It is for another name.
    OtherName,
    /// Nobody that this system trusts has signed it.
    UnknownIssuer,
    /// This system trusts nobody: it was not looked at.
    NotVerified,
    /// Anything else, in the library's words.
    Other(String),
}

/// The certificate that a server shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Who signed it. Text of the server.
    pub issuer: String,
    /// It has signed itself.
    pub self_signed: bool,
    /// Until when it holds, if that can be read.
    pub until: Option<Timestamp>,
    /// What is wrong with it.
    pub fault: Option<CertificateFault>,
    /// All of it: the same bytes are the same certificate.
    pub der: Vec<u8>,
}

/// The head of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseHead {
    /// Its status.
    pub status: u16,
    /// Where it leads, if anywhere. Text of the server.
    pub location: Option<String>,
    /// Nothing comes after the head.
    pub empty: bool,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoAnswer {
    /// Nothing listens there.
    Refused,
    /// There is no way there.
    Unroutable,
    /// It took too long.
    TimedOut,
    /// The server has no certificate for the name.
    NoCertificate,
    /// What listens there speaks no TLS.
    NotTls,
    /// Anything else.
    Other(String),
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoAnswer::Refused => f.write_str("connection refused"),
            NoAnswer::Unroutable => f.write_str("no route to it"),
            NoAnswer::TimedOut => f.write_str("no answer in time"),
            NoAnswer::NoCertificate => f.write_str("no certificate for this name"),
            NoAnswer::NotTls => f.write_str("it does not speak TLS"),
            NoAnswer::Other(why) => f.write_str(why),
        }
    }
}

/// What a visit met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The certificate, where TLS was spoken and one was shown.
    pub certificate: Option<Certificate>,
    /// The answer, or why there is none.
    pub answer: Result<ResponseHead, NoAnswer>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Whom to connect to.
    pub to: SocketAddr,
    /// The domain.
    pub host: &'a str,
    /// The path.
    pub path: &'a str,
    /// The lines that a proxy adds for the service behind it; empty from a visitor.
    pub forwarded: &'a str,
}

/// Asks over TLS.
pub fn https(request: Request, trust: &CertificateTrust, deadline: Instant) -> Reply {
    let verifier = Arc::new(RecordingVerifier { trust: trust.clone(), seen: Mutex::new(None) });
    let answer = encrypted(request, &verifier, deadline);
    let seen = locked(&verifier.seen).take();
    let certificate = seen.map(|(der, fault)| {
        let (issuer, self_signed, until) = x509::read(&der).unwrap_or_default();
        Certificate { issuer, self_signed, until, fault, der }
    });
    Reply { certificate, answer }
}

/// Asks without TLS.
pub fn http(request: Request, deadline: Instant) -> Reply {
    let answer = connect(request.to, deadline).and_then(|socket| exchange(socket, request));
    Reply { certificate: None, answer: answer.map_err(|e| no_answer(&e)) }
}

fn encrypted(
    request: Request,
    verifier: &Arc<RecordingVerifier>,
    deadline: Instant,
) -> Result<ResponseHead, NoAnswer> {
    let other = |e: &dyn fmt::Display| NoAnswer::Other(e.to_string());
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| other(&e))?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(request.host.to_string()).map_err(|e| other(&e))?;
    let session = ClientConnection::new(Arc::new(config), name).map_err(|e| other(&e))?;
    let socket = connect(request.to, deadline).map_err(|e| no_answer(&e))?;
    exchange(StreamOwned::new(session, socket), request).map_err(|e| no_answer(&e))
}

fn no_answer(e: &io::Error) -> NoAnswer {
    if let Some(tls) = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        return match tls {
            // What Caddy says of a name that it has no certificate for is the first of these.
            rustls::Error::AlertReceived(
                AlertDescription::InternalError
                | AlertDescription::UnrecognisedName
                | AlertDescription::HandshakeFailure,
            ) => NoAnswer::NoCertificate,
            rustls::Error::InvalidMessage(_) => NoAnswer::NotTls,
            other => NoAnswer::Other(format!("no TLS connection: {other}")),
        };
    }
    match e.kind() {
        ErrorKind::ConnectionRefused => NoAnswer::Refused,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
            NoAnswer::Unroutable
        }
        ErrorKind::TimedOut | ErrorKind::WouldBlock => NoAnswer::TimedOut,
        ErrorKind::UnexpectedEof
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe => NoAnswer::Other("the connection was closed without an answer".into()),
        _ => NoAnswer::Other(e.to_string()),
    }
}

/// A connection whose every read and write ends at the deadline.
struct Timed {
    socket: TcpStream,
    deadline: Instant,
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn connect(to: SocketAddr, deadline: Instant) -> io::Result<Timed> {
    Ok(Timed { socket: TcpStream::connect_timeout(&to, left(deadline)?)?, deadline })
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(left(self.deadline)?))?;
        self.socket.read(buffer)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(left(self.deadline)?))?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

fn exchange(mut stream: impl Read + Write, request: Request) -> io::Result<ResponseHead> {
    let Request { host, path, forwarded, .. } = request;
    let text = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: omni-deploy/{}\r\nAccept: */*\r\n{forwarded}Connection: \
         close\r\n\r\n",
        env!("CARGO_PKG_VERSION")
    );
    stream.write_all(text.as_bytes())?;
    stream.flush()?;
    let mut head = Vec::new();
    let mut buffer = [0; 4096];
    let wrong = |what: &str| io::Error::other(format!("what answers is not HTTP: {what}"));
    loop {
        let n = stream.read(&mut buffer)?;
        head.extend_from_slice(&buffer[..n]);
        let mut headers = [httparse::EMPTY_HEADER; 128];
        let mut response = httparse::Response::new(&mut headers);
        match response.parse(&head) {
            Ok(httparse::Status::Complete(end)) => {
                let value = |name: &str| {
                    let header = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name))?;
                    Some(String::from_utf8_lossy(header.value).trim().to_string())
                };
                let length = value("content-length");
                let chunked = value("transfer-encoding").is_some();
                let empty = length.as_deref().is_some_and(|l| l == "0")
                    || length.is_none()
                        && !chunked
                        && head.len() == end
                        && stream.read(&mut buffer).is_ok_and(|n| n == 0);
                return Ok(ResponseHead {
                    status: response.code.unwrap_or_default(),
                    location: value("location"),
                    empty,
                });
            }
            Ok(httparse::Status::Partial) if n == 0 => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(httparse::Status::Partial) if head.len() > MAX_HEAD => {
                return Err(wrong("its head does not end"));
            }
            Ok(httparse::Status::Partial) => {}
            Err(e) => return Err(wrong(&e.to_string())),
        }
    }
}

/// Keeps what was shown and what is wrong with it, and lets the visit go on.
#[derive(Debug)]
struct RecordingVerifier {
    trust: CertificateTrust,
    seen: Mutex<Option<(Vec<u8>, Option<CertificateFault>)>>,
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let fault = match &self.trust {
            None => Some(CertificateFault::NotVerified),
            Some(roots) => match roots.verify_server_cert(leaf, between, name, ocsp, now) {
                Ok(_) => None,
                Err(rustls::Error::InvalidCertificate(why)) => Some(fault(&why)),
                Err(other) => Some(CertificateFault::Other(other.to_string())),
            },
        };
        *locked(&self.seen) = Some((leaf.to_vec(), fault));
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &signatures())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &signatures())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        signatures().supported_schemes()
    }
}

fn fault(why: &CertificateError) -> CertificateFault {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => CertificateFault::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            CertificateFault::NotYetValid
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            CertificateFault::OtherName
        }
        CertificateError::UnknownIssuer => CertificateFault::UnknownIssuer,
        other => CertificateFault::Other(other.to_string()),
    }
}

/// As much of a certificate as is told to people (RFC 5280, 4.1).
mod x509 {
    use crate::clock::Timestamp;

    /// Common name and organization, as the contents of object identifiers.
    const NAMES: [&[u8]; 2] = [&[0x55, 4, 3], &[0x55, 4, 10]];

    /// The longest name that is told, in characters.
    const MAX_NAME: usize = 100;

    /// One element after the other, each with its tag and its content; it ends before what cannot be read.
    fn elements(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
        std::iter::from_fn(move || {
            let (&tag, rest) = bytes.split_first()?;
            let (&first, rest) = rest.split_first()?;
            let (length, rest) = match first {
                0..=0x7f => (usize::from(first), rest),
                0x81..=0x84 => {
                    let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                    (digits.iter().fold(0, |n, d| n << 8 | usize::from(*d)), rest)
                }
                _ => return None,
            };
            let (content, after) = rest.split_at_checked(length)?;
            bytes = after;
            Some((tag, content))
        })
    }

    /// The issuer's name, whether the subject is the same, and the end of the certificate's time.
    pub fn read(der: &[u8]) -> Option<(String, bool, Option<Timestamp>)> {
        let (_, certificate) = elements(der).next()?;
        let (_, signed) = elements(certificate).next()?;
        let mut fields = elements(signed).peekable();
        // The version may be left out.
        fields.next_if(|(tag, _)| *tag == 0xa0);
        let mut next = || Some(fields.next()?.1);
        let (_serial, _algorithm) = (next()?, next()?);
        let (issuer, validity, subject) = (next()?, next()?, next()?);
        let (tag, until) = elements(validity).nth(1)?;
        Some((name(issuer), issuer == subject, time(tag, until)))
    }

    /// The common name, else the organization.
    fn name(sets: &[u8]) -> String {
        let mut found = [None, None];
        for (_, set) in elements(sets) {
            let Some((_, pair)) = elements(set).next() else { continue };
            let mut pair = elements(pair);
            let (Some((_, oid)), Some((_, text))) = (pair.next(), pair.next()) else { continue };
            if let Some(at) = NAMES.iter().position(|name| *name == oid) {
                found[at] = Some(String::from_utf8_lossy(text).chars().take(MAX_NAME).collect());
            }
        }
        found.into_iter().flatten().next().unwrap_or_else(|| "an unnamed issuer".into())
    }

    /// UTCTime `YYMMDDHHMMSSZ` or GeneralizedTime `YYYYMMDDHHMMSSZ`.
    fn time(tag: u8, text: &[u8]) -> Option<Timestamp> {
        let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
        let full = match tag {
            0x17 if text.starts_with(['0', '1', '2', '3', '4']) => format!("20{text}"),
            0x17 => format!("19{text}"),
            _ => text.to_string(),
        };
        let (day, time) = full.split_at_checked(8)?;
        Timestamp::parse_compact(&format!("{day}T{time}Z"))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// Whatever a server shows, it is read to the end or not at all.
        #[test]
        fn bytes_that_are_no_certificate_give_nothing() {
            for bytes in
                [&b""[..], b"\x30", b"\x30\x84\xff\xff\xff\xff", b"\x30\x03\x30\x01\x02", &[0x30; 64]]
            {
                assert_eq!(read(bytes), None, "{bytes:?}");
            }
            assert_eq!(
                time(0x17, b"261127101112Z").map(|t| t.to_string()).as_deref(),
                Some("2026-11-27T10:11:12Z")
            );
            assert_eq!(
                time(0x18, b"20991231235959Z").map(|t| t.to_string()).as_deref(),
                Some("2099-12-31T23:59:59Z")
            );
            assert_eq!(time(0x17, b"2611"), None);
        }
    }
}
