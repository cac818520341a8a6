//! Where Caddy's admin endpoint is: the setting `caddyAdmin`. Asks nobody; who answers there is
//! [`crate::deployer::admin`]'s to find out.

use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

/// Where install.sh and the NixOS module have Caddy make its socket.
pub const SOCKET: &str = "/run/caddy/admin.sock";
/// Where Caddy listens by itself.
pub const PORT: u16 = 2019;

/// The setting `caddyAdmin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// The socket of [`SOCKET`] while it is there, else Caddy's own port on 127.0.0.1.
    Usual,
    /// This one.
    At(Endpoint),
}

/// One place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A host, as it was written, and a port.
    Tcp(String, u16),
}

impl Address {
    /// Reads `unix//PATH`, as Caddy writes it, or `http://HOST[:PORT]`; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        const FORM: &str = "the form is unix//PATH or http://HOST:PORT";
        if let Some(path) = text.strip_prefix("unix/") {
            return match path.starts_with('/') && !path.contains('|') {
                true => Ok(Address::At(Endpoint::Unix(path.into()))),
                false => Err(format!("is not the absolute path of a socket; {FORM}")),
            };
        }
        let Some(authority) = text.strip_prefix("http://") else {
            return Err(format!("is neither a socket nor an http:// URL; {FORM}"));
        };
        let authority = authority.trim_end_matches('/');
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| format!("has no port after its colon; {FORM}"))?)
            }
            _ => (authority, 80),
        };
        let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let valid = match inner {
            Some(inner) => inner.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()),
            None => {
                !host.is_empty()
                    && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            }
        };
        if !valid {
            return Err(format!("does not name a host and a port alone; {FORM}"));
        }
        Ok(Address::At(Endpoint::Tcp(host.to_string(), port)))
    }

    /// Where that is at this moment.
    pub fn now(&self) -> Endpoint {
        match self {
            Address::At(endpoint) => endpoint.clone(),
            // Who may not look into the folder is told so when he asks: it is there.
            Address::Usual => match fs_err::symlink_metadata(SOCKET) {
                Err(e) if e.kind() != ErrorKind::PermissionDenied => {
                    Endpoint::Tcp(Ipv4Addr::LOCALHOST.to_string(), PORT)
                }
                Ok(_) | Err(_) => Endpoint::Unix(SOCKET.into()),
            },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.now().fmt(f)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix/{}", path.display()),
            Endpoint::Tcp(host, port) => write!(f, "http://{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_socket_or_a_host_with_its_port() {
        for (text, shown) in [
            ("unix//run/caddy/admin.sock", "unix//run/caddy/admin.sock"),
            ("http://127.0.0.1:2019", "http://127.0.0.1:2019"),
            ("http://localhost:2019/", "http://localhost:2019"),
            ("http://[::1]:2020", "http://[::1]:2020"),
            ("http://caddy.internal", "http://caddy.internal:80"),
        ] {
            assert_eq!(Address::parse(text).map(|a| a.to_string()).as_deref(), Ok(shown), "{text}");
        }
        for text in [
            "",
            "localhost:2019",
            "https://localhost:2019",
            "unix/run/caddy.sock",
            "unix//run/caddy.sock|0222",
            "http://",
            "http://user@host:2019",
            "http://host:2019/path",
            "http://host:port",
            "http://[host]:2019",
            "http://::1",
            "http://a b:1",
        ] {
            let why = Address::parse(text).expect_err(text);
            assert!(why.contains("unix//PATH"), "{why}");
        }
    }
}
