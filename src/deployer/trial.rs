//! Whether Caddy reads the ports of services from files ([`super::ports`]). Its admin API tells no version, so it is
//! tried, once for each program that it is: a server of ours, for as long as one request takes. A Caddy that is too old
//! refuses that server, and nothing of its configuration changes.

use super::admin;
use super::caddy;
use super::root::Root;
use crate::config::admin::{Address, Endpoint};
use crate::durable;
use crate::error::Error;
use crate::files;
use crate::hash;
use crate::random;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The form of the file that the outcome is kept in.
const VERSION: u64 = 1;

/// What is known of a Caddy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trial {
    version: u64,
    /// Which program it is.
    pub program: String,
    /// Whether it reads ports from files, and keeps WebSockets when its configuration changes. None: a pass ended before
    /// it knew.
    pub port_files: Option<bool>,
}

impl Trial {
    /// The outcome of the last one. If it cannot be read, Caddy is tried again.
    pub fn load(root: &Root) -> Option<Self> {
        let bytes = fs_err::read(root.trial()).ok()?;
        files::versioned(&bytes, VERSION).ok()
    }

    fn save(&self, root: &Root) -> Result<(), String> {
        let text = serde_json::to_vec(self).expect("plain data serializes");
        durable::write(&root.trial(), &text, 0o644).map_err(|e| Error::from(e).to_string())
    }

    /// Tries the Caddy that runs, which is this program, and keeps the outcome for later passes; the error is why nothing can
    /// be said now. If the outcome could not be kept, nothing is tried, because every pass would try again.
    pub fn run(admin: &Address, root: &Root, program: &str) -> Result<Self, String> {
        let mut trial = Trial { version: VERSION, program: program.to_string(), port_files: None };
        trial.save(root)?;
        trial.port_files = Some(try_it(admin, root)?);
        trial.save(root)?;
        Ok(trial)
    }
}

fn try_it(at: &Address, root: &Root) -> Result<bool, String> {
    let failed =
        |e: io::Error| format!("cannot try whether Caddy reads ports from files: {}", Error::from(e));
    let upstream = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
    // Free a moment ago. If somebody has taken it since, Caddy refuses the server and the next pass tries again.
    let port =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).map_err(failed)?.port();
    // No service can have this name.
    let file = root.ports_in_force().join(".trial");
    let dialed = upstream.local_addr().map_err(failed)?.port();
    durable::write(&file, dialed.to_string().as_bytes(), 0o644).map_err(failed)?;
    let server = json!({
        "listen": [format!("127.0.0.1:{port}")],
        "automatic_https": {"disable": true},
        "routes": [{"handle": [{
            "handler": "reverse_proxy",
            "upstreams": [{"dial": format!("127.0.0.1:{{file.{}}}", file.display())}],
            "stream_close_delay": caddy::STREAMS_STAY,
        }]}],
    });
    let seen = caddy::with_trial(at, server, || asked(port, &upstream));
    durable::remove(&file).map_err(failed)?;
    seen.map_err(|why| format!("cannot try whether Caddy reads ports from files: {why}"))
}

/// Whether a request to Caddy at this port arrives here. Without an answer from Caddy that is not known.
fn asked(port: u16, upstream: &TcpListener) -> Result<bool, String> {
    let word = hash::hex(&random::bytes::<16>());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| answer_all(upstream, &word, &over));
        let at = Address::At(Endpoint::Tcp(Ipv4Addr::LOCALHOST.to_string(), port));
        let answer = admin::exchange(&at, "GET", "/", "");
        over.store(true, Ordering::Relaxed);
        answer.map(|answer| answer.status == 200 && answer.body == word.as_bytes())
    })
}

/// How many may connect during a trial: anybody on the host can.
const MOST: usize = 64;

/// Answers every request with this word, until it is over. Whoever connects and says nothing holds up nobody else.
fn answer_all(upstream: &TcpListener, word: &str, over: &AtomicBool) {
    let _ = upstream.set_nonblocking(true);
    std::thread::scope(|scope| {
        let mut connected = 0;
        while !over.load(Ordering::Relaxed) && connected < MOST {
            match upstream.accept() {
                Ok((stream, _)) => {
                    connected += 1;
                    scope.spawn(move || answer(stream, word));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    });
}

/// If this fails, whoever asked gets no answer.
fn answer(mut stream: TcpStream, word: &str) {
    let length = word.len();
    let text = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{word}");
    let _ = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(Duration::from_secs(1))))
        // The head of a request without a body comes in one piece.
        .and_then(|()| stream.read(&mut [0; 4096]))
        .and_then(|_| stream.write_all(text.as_bytes()));
}
