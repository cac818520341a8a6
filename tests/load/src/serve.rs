//! The service that is deployed. It runs from a closure, `DIR/bin/NAME serve`, listens on 127.0.0.1:$PORT, and
//! reads two files there: `DIR/version`, told by `GET /`, and `DIR/behaviour` (absent: a good release), one of
//! `exit` (at once), `port N` (listens there instead), `refuses N` (exits when told to listen there), `sick`
//! (health answers 500), `crash SECONDS`, `slow SECONDS` (until it listens) and `hasty` (ends at SIGTERM
//! without finishing what it has).
//! `POST` echoes, `/wait/MS` answers that much later, `/health` is for the deployer, and a WebSocket echoes text
//! frames of up to 125 bytes.

use crate::http::{self, Head};
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;
use std::collections::HashMap;
use std::io::{self, BufReader, Error, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The one key that is answered, with its answer: RFC 6455's own example.
pub const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// What is open, and whether it is being ended.
#[derive(Default)]
struct Connections {
    ending: bool,
    next: u64,
    /// Each with whether a request is under way on it.
    open: HashMap<u64, (Arc<TcpStream>, bool)>,
}

#[derive(Default)]
struct Shared {
    version: String,
    sick: bool,
    connections: Mutex<Connections>,
    changed: Condvar,
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves until SIGTERM.
pub fn run() -> io::Result<()> {
    let program = std::env::current_exe()?;
    let closure = program.parent().and_then(|bin| bin.parent()).ok_or_else(|| Error::other("no closure"))?;
    let version = std::fs::read_to_string(closure.join("version"))?.trim().to_string();
    let behaviour = std::fs::read_to_string(closure.join("behaviour")).unwrap_or_default();
    let mut words = behaviour.split_whitespace();
    let what = words.next().unwrap_or_default();
    let number: u16 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let seconds = Duration::from_secs(number.into());

    let mut port: u16 = std::env::var("PORT").ok().and_then(|p| p.parse().ok()).unwrap_or(8080);
    match what {
        "exit" => return Err(Error::other(format!("cannot open the database of version {version}"))),
        "port" => port = number,
        "refuses" if port == number => {
            return Err(Error::other(format!("version {version} minds port {port}")));
        }
        "slow" => std::thread::sleep(seconds),
        "crash" => {
            std::thread::spawn(move || {
                std::thread::sleep(seconds);
                eprintln!("out of luck");
                std::process::exit(1);
            });
        }
        _ => {}
    }
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let address = listener.local_addr()?;
    eprintln!("version {version} on {address}");
    let shared = Arc::new(Shared { version, sick: what == "sick", ..Shared::default() });
    if what != "hasty" {
        let mut signals = Signals::new([SIGTERM])?;
        let shared = shared.clone();
        std::thread::spawn(move || {
            signals.forever().next();
            end_idle(&shared, address);
        });
    }
    for stream in listener.incoming() {
        let Ok(stream) = stream.map(Arc::new) else {
            // Too many at once: they wait where they are.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let mut connections = shared.connections();
        if connections.ending {
            break;
        }
        let id = connections.next;
        connections.next += 1;
        connections.open.insert(id, (stream.clone(), false));
        drop(connections);
        let shared = shared.clone();
        std::thread::spawn(move || {
            // A client that went away is no concern of the others.
            let _gone = converse(&stream, id, &shared);
            shared.connections().open.remove(&id);
            shared.changed.notify_all();
        });
    }
    drop(listener);
    let mut connections = shared.connections();
    while !connections.open.is_empty() {
        connections = shared.changed.wait(connections).unwrap_or_else(PoisonError::into_inner);
    }
    Ok(())
}

/// Takes no more connections and ends those that wait for a request.
fn end_idle(shared: &Shared, address: SocketAddr) {
    let mut connections = shared.connections();
    connections.ending = true;
    for (stream, busy) in connections.open.values() {
        if !busy {
            let _gone = stream.shutdown(Shutdown::Both);
        }
    }
    drop(connections);
    // Wakes the listener, which then sees.
    let _woken = TcpStream::connect(address);
}

fn converse(stream: &TcpStream, id: u64, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(32 << 10, stream);
    while let Some(head) = http::head(&mut reader)? {
        if let Some((_, busy)) = shared.connections().open.get_mut(&id) {
            *busy = true;
        }
        let mut body = vec![0; head.length];
        reader.read_exact(&mut body)?;
        if head.websocket {
            return websocket(&mut reader, stream);
        }
        let (status, body) = answer(&head, body, shared);
        let close = head.close || shared.connections().ending;
        let mut message = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len()).into_bytes();
        message.extend_from_slice(if close { b"Connection: close\r\n\r\n" } else { b"\r\n" });
        message.extend_from_slice(&body);
        (&mut &*stream).write_all(&message)?;
        let mut connections = shared.connections();
        if close || connections.ending {
            return Ok(());
        }
        if let Some((_, busy)) = connections.open.get_mut(&id) {
            *busy = false;
        }
    }
    Ok(())
}

fn answer(head: &Head, body: Vec<u8>, shared: &Shared) -> (&'static str, Vec<u8>) {
    let mut words = head.line.split_whitespace();
    let wait =
        words.clone().nth(1).and_then(|path| path.strip_prefix("/wait/")).and_then(|ms| ms.parse().ok());
    if let Some(ms) = wait {
        std::thread::sleep(Duration::from_millis(ms));
    }
    match (words.next(), words.next()) {
        (Some("GET"), Some("/health")) if shared.sick => ("500 Internal Server Error", b"sick\n".to_vec()),
        (Some("GET"), Some("/health")) => ("200 OK", b"ok\n".to_vec()),
        (Some("GET"), Some(_)) => ("200 OK", format!("{}\n", shared.version).into_bytes()),
        (Some("POST"), Some(_)) => ("200 OK", body),
        _ => ("405 Method Not Allowed", Vec::new()),
    }
}

fn websocket(reader: &mut impl Read, mut stream: &TcpStream) -> io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {ACCEPT}\r\n\r\n"
    )?;
    while let Some(text) = frame(reader)? {
        stream.write_all(&[&[0x81, text.len() as u8], &text[..]].concat())?;
    }
    Ok(())
}

/// Reads one short frame (RFC 6455, section 5.2), masked or not; None at a close frame.
pub fn frame(reader: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut start = [0; 2];
    reader.read_exact(&mut start)?;
    let mut mask = [0; 4];
    if start[1] & 0x80 != 0 {
        reader.read_exact(&mut mask)?;
    }
    let mut text = vec![0; usize::from(start[1] & 0x7f)];
    reader.read_exact(&mut text)?;
    for (i, byte) in text.iter_mut().enumerate() {
        *byte ^= mask[i % 4];
    }
    Ok((start[0] & 0x0f != 8).then_some(text))
}
