//! The bridge between Nix and a bucket: an HTTP server on a loopback port, below a path nobody can guess, that
//! passes Nix's reads and writes of a binary cache on to S3, signed and streamed. It lives as long as its
//! guard and answers this user's (and root's) connections alone. It never holds a NAR in memory, never touches
//! a key that is not part of a binary cache, and never lets Nix take a refusal for a missing path.
//!
//! The requests of Nix 2.8, for which this is made: `GET nix-cache-info`, `HEAD`/`GET HASH.narinfo`, `HEAD`,
//! `GET` (with `Range` after a broken transfer) and `PUT nar/FILE`, `PUT HASH.narinfo`; uploads carry
//! `Content-Length` and `Expect: 100-continue`.

use crate::error::{Error, Result};
use crate::store::s3::{ByteRange, MAX_SINGLE_PUT, S3Store};
use crate::store::{StoreError, url::S3Location};
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::HashMap;
use std::io::{self, Read, Seek, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest request head that is read, in bytes.
pub const MAX_HEAD: usize = 16 << 10;
/// The most connections at a time, each with a thread.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection may stand still, between requests and within a body.
const IDLE: Duration = Duration::from_secs(60);
/// How long a request head may take from its first byte to its last.
const HEAD_WITHIN: Duration = Duration::from_secs(20);
const HEADERS: usize = 64;
const COPY_BUFFER: usize = 64 << 10;

/// What Nix may do through the bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only; a bucket without `nix-cache-info` gets the default one.
    Read,
    /// Reads and writes.
    Write,
}

/// The methods that a binary cache needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The object.
    Get,
    /// Whether there is one, and how large it is.
    Head,
    /// A new object.
    Put,
    /// Anything else.
    Other,
}

/// How the end of a request's body is known (RFC 9112, section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// After so many bytes; 0 is no body.
    Length(u64),
    /// By chunks.
    Chunked,
}

/// A request's head, as far as the bridge cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub method: Method,
    /// The path as it was sent; nothing is decoded.
    pub path: String,
    /// One byte range; several, or one that is malformed, count as none (RFC 9110, section 14.2).
    pub range: Option<ByteRange>,
    /// Its body.
    pub framing: Framing,
    /// The client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// Another request may follow on the connection.
    pub keep_alive: bool,
}

/// What the bytes at the front of a connection are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Head {
    /// The start of a head; more must be read.
    Partial,
    /// No request that is answered; the status to refuse it with.
    Bad(u16),
    /// A request, and how many bytes its head has.
    Whole(Request, usize),
}

/// Reads a request's head from the front of `bytes`. Pure.
pub fn parse_head(bytes: &[u8]) -> Head {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let length = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Head::Partial,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Head::Bad(431),
        Err(_) => return Head::Bad(400),
    };
    let (Some(method), Some(path), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
        return Head::Bad(400);
    };
    let mut request = Request {
        method: match method {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            "PUT" => Method::Put,
            _ => Method::Other,
        },
        path: path.to_string(),
        range: None,
        framing: Framing::Length(0),
        expects_continue: false,
        keep_alive: version == 1,
    };
    let (mut content_length, mut chunked) = (None, false);
    for header in parsed.headers.iter() {
        let Ok(value) = std::str::from_utf8(header.value) else { return Head::Bad(400) };
        let value = value.trim();
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            // Two lengths, or one that is not plain digits, would let a body pass for a request.
            let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
            match value.parse::<u64>() {
                Ok(n) if digits && content_length.is_none() => content_length = Some(n),
                _ => return Head::Bad(400),
            }
        } else if is("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") || chunked || version == 0 {
                return Head::Bad(501);
            }
            chunked = true;
        } else if is("expect") {
            if !value.eq_ignore_ascii_case("100-continue") {
                return Head::Bad(417);
            }
            request.expects_continue = version == 1;
        } else if is("connection") {
            let has = |word: &str| value.split(',').any(|w| w.trim().eq_ignore_ascii_case(word));
            request.keep_alive = !has("close") && (request.keep_alive || has("keep-alive"));
        } else if is("range") {
            request.range = parse_range(value);
        }
    }
    request.framing = match (content_length, chunked) {
        (Some(_), true) => return Head::Bad(400),
        (None, true) => Framing::Chunked,
        (Some(n), false) => Framing::Length(n),
        (None, false) if request.method == Method::Put => return Head::Bad(411),
        (None, false) => Framing::Length(0),
    };
    Head::Whole(request, length)
}

/// One range of `bytes=FIRST-LAST`, `bytes=FIRST-` or `bytes=-LAST`.
fn parse_range(value: &str) -> Option<ByteRange> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| {
        if text.bytes().all(|b| b.is_ascii_digit()) { text.parse::<u64>().ok() } else { None }
    };
    match (first, last) {
        ("", last) => Some(ByteRange::Last(number(last)?)),
        (first, "") => Some(ByteRange::From(number(first)?)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(ByteRange::Between(first, last))
        }
    }
}

/// What is to be done for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route<'a> {
    /// Outside the secret path: 404 without a hint, and the connection ends.
    Stranger,
    /// No key of a binary cache, or no method for one.
    Refuse(u16),
    /// Read the key.
    Get(&'a str),
    /// The size of the key.
    Head(&'a str),
    /// Write the key.
    Put(&'a str),
}

/// Decides what a request may do. Pure; `secret` is the path without slashes.
pub fn route<'a>(request: &'a Request, secret: &str, access: Access) -> Route<'a> {
    let Some((below, key)) = request.path.strip_prefix('/').and_then(|p| p.split_once('/')) else {
        return Route::Stranger;
    };
    // Takes the same time wherever the first difference is.
    let differs = below.bytes().zip(secret.bytes()).fold(0, |d, (a, b)| d | (a ^ b));
    if below.len() != secret.len() || differs != 0 {
        return Route::Stranger;
    }
    if !is_cache_key(key) {
        return Route::Refuse(404);
    }
    match (request.method, access) {
        (Method::Get, _) => Route::Get(key),
        (Method::Head, _) => Route::Head(key),
        (Method::Put, Access::Write) => Route::Put(key),
        (Method::Put | Method::Other, _) => Route::Refuse(405),
    }
}

/// Whether a key is part of a binary cache: `nix-cache-info`, `HASH.narinfo`, `HASH.ls`, and what lies below
/// `nar/`, `realisations/` and `log/`.
pub fn is_cache_key(key: &str) -> bool {
    let odd = |c: char| !(c.is_ascii_alphanumeric() || "-_.+=:!/".contains(c));
    if key.contains(odd) || key.contains("..") || key.split('/').any(|p| p.is_empty() || p.starts_with('.')) {
        return false;
    }
    match key.split_once('/') {
        None => {
            let with_hash = |name: &str| name.len() == 32 && name.bytes().all(|b| b.is_ascii_alphanumeric());
            key == "nix-cache-info"
                || key.strip_suffix(".narinfo").or(key.strip_suffix(".ls")).is_some_and(with_hash)
        }
        Some((folder, _)) => matches!(folder, "nar" | "realisations" | "log"),
    }
}

/// The running bridge. Dropped, it ends every connection and its port is closed.
#[derive(Debug)]
pub struct Bridge {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    store: S3Store,
    access: Access,
    secret: String,
    owner: Option<u32>,
    closing: AtomicBool,
    live: Mutex<HashMap<u64, TcpStream>>,
    troubles: Mutex<Vec<String>>,
}

impl Bridge {
    /// Opens the port. Nothing is asked of the network yet.
    pub fn open(location: &S3Location, access: Access) -> Result<Self> {
        let mut random = [0; 24];
        SystemRandom::new()
            .fill(&mut random)
            .map_err(|_| Error::new("the kernel gives no random bytes; check /dev/urandom"))?;
        let secret = random.iter().map(|b| format!("{b:02x}")).collect();
        let no_port = |e: io::Error| {
            Error::new(format!("cannot listen on a loopback port for nix: {e}; check that 'lo' is up"))
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(no_port)?;
        let address = listener.local_addr().map_err(no_port)?;
        let shared = Arc::new(Shared {
            store: S3Store::open(location)?,
            access,
            secret,
            owner: fs_err::metadata("/proc/self").ok().map(|m| m.uid()),
            closing: AtomicBool::new(false),
            live: Mutex::default(),
            troubles: Mutex::default(),
        });
        let for_acceptor = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("bridge".into())
            .spawn(move || accept(&listener, address, &for_acceptor))
            .map_err(|e| Error::new(format!("cannot start a thread: {e}; raise the limit of tasks")))?;
        Ok(Bridge { shared, address, acceptor: Some(acceptor) })
    }

    /// The cache's URL for Nix. It is as good as a password: never an argument of a program, never printed.
    pub fn url(&self) -> String {
        format!("http://{}/{}", self.address, self.shared.secret)
    }

    /// What went wrong between the bridge and the bucket so far, which Nix shows as a bare status.
    pub fn troubles(&self) -> Vec<String> {
        lock(&self.shared.troubles).clone()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        for stream in lock(&self.shared.live).values() {
            // Fails only for a connection that is gone already.
            drop(stream.shutdown(Shutdown::Both));
        }
        // Wakes the acceptor. Had this failed, the port would stay open until the process ends, refusing all.
        if TcpStream::connect(self.address).is_ok()
            && let Some(acceptor) = self.acceptor.take()
        {
            drop(acceptor.join());
        }
    }
}

/// A thread that panicked while it held the lock leaves plain data behind, good enough to go on with.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(listener: &TcpListener, address: SocketAddr, shared: &Arc<Shared>) {
    let mut next_id = 0;
    loop {
        let accepted = listener.accept();
        if shared.closing.load(Ordering::SeqCst) {
            return;
        }
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                shared.trouble(format!("the loopback port for nix: {e}"));
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
        };
        let foreign = owner_of(peer, address).is_some_and(|uid| uid != 0 && Some(uid) != shared.owner);
        if foreign || lock(&shared.live).len() >= MAX_CONNECTIONS {
            continue;
        }
        let Ok(registered) = stream.try_clone() else { continue };
        next_id += 1;
        let id = next_id;
        lock(&shared.live).insert(id, registered);
        let for_thread = Arc::clone(shared);
        let spawned = std::thread::Builder::new().name("bridge".into()).spawn(move || {
            // An error here is a client that left; what S3 said is in the troubles.
            drop(Connection::new(stream).and_then(|mut c| c.serve(&for_thread)));
            lock(&for_thread.live).remove(&id);
        });
        if let Err(e) = spawned {
            lock(&shared.live).remove(&id);
            shared.trouble(format!("cannot start a thread for nix: {e}; raise the limit of tasks"));
        }
    }
}

/// The user whose socket is at the other end of a loopback connection, from the kernel's table (proc(5),
/// /proc/net/tcp); None where there is no such table.
fn owner_of(peer: SocketAddr, ours: SocketAddr) -> Option<u32> {
    let hex = |a: SocketAddr| match a {
        SocketAddr::V4(a) => Some(format!("{:08X}:{:04X}", u32::from(*a.ip()).to_be().swap_bytes().to_be(), a.port())),
        SocketAddr::V6(_) => None,
    };
    let (peer, ours) = (hex(peer)?, hex(ours)?);
    let table = fs_err::read_to_string("/proc/self/net/tcp").ok()?;
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        (fields.next()? == peer && fields.next()? == ours).then(|| fields.nth(4)?.parse().ok()).flatten()
    })
}

impl Shared {
    fn trouble(&self, text: String) {
        let mut troubles = lock(&self.troubles);
        if troubles.len() < 16 && !troubles.contains(&text) {
            troubles.push(text);
        }
    }

    /// Keeps what S3 said, and the status that stands for it: one that Nix neither takes for "missing" nor
    /// (for a refusal) hides behind a success.
    fn failed(&self, e: StoreError) -> u16 {
        let status = if matches!(e, StoreError::Unreachable(_)) { 502 } else { 500 };
        self.trouble(e.to_string());
        status
    }
}

/// A connection with the bytes that were read beyond the last head.
struct Connection {
    stream: TcpStream,
    ahead: Vec<u8>,
}

/// Whether the connection can carry another request.
#[derive(PartialEq, Eq)]
enum After {
    Go,
    Close,
}

impl Read for Connection {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.ahead.is_empty() {
            return self.stream.read(buf);
        }
        let n = self.ahead.len().min(buf.len());
        buf[..n].copy_from_slice(&self.ahead[..n]);
        self.ahead.drain(..n);
        Ok(n)
    }
}

impl Connection {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(IDLE))?;
        Ok(Connection { stream, ahead: Vec::new() })
    }

    fn serve(&mut self, shared: &Shared) -> io::Result<()> {
        while let Some(request) = self.next_request()? {
            let request = match request {
                Ok(request) => request,
                Err(status) => return self.refuse(status),
            };
            if shared.closing.load(Ordering::SeqCst) {
                return Ok(());
            }
            let after = match route(&request, &shared.secret, shared.access) {
                Route::Stranger => return self.refuse(404),
                Route::Refuse(status) => {
                    if status == 405 && request.method == Method::Put {
                        shared.trouble("nix tried to write to a cache that is open for reading only".into());
                    }
                    return self.refuse(status);
                }
                Route::Get(key) => self.get(shared, &request, key)?,
                Route::Head(key) => self.head(shared, key)?,
                Route::Put(key) => self.put(shared, &request, key)?,
            };
            // A body that nobody asked for is not read.
            let unread = request.method != Method::Put && request.framing != Framing::Length(0);
            if after == After::Close || unread || !request.keep_alive {
                return self.linger();
            }
        }
        Ok(())
    }

    /// The next head, or the status to refuse it with; None at the end of the connection.
    fn next_request(&mut self) -> io::Result<Option<Result<Request, u16>>> {
        let mut started = (!self.ahead.is_empty()).then(Instant::now);
        loop {
            match parse_head(&self.ahead) {
                Head::Whole(request, length) => {
                    self.ahead.drain(..length);
                    return Ok(Some(Ok(request)));
                }
                Head::Bad(status) => return Ok(Some(Err(status))),
                Head::Partial => {}
            }
            if started.is_some_and(|s| s.elapsed() > HEAD_WITHIN) {
                return Ok(Some(Err(408)));
            }
            let mut chunk = [0; 4096];
            let n = self.stream.read(&mut chunk)?;
            if n == 0 {
                return Ok(None);
            }
            started.get_or_insert_with(Instant::now);
            self.ahead.extend_from_slice(&chunk[..n]);
        }
    }

    /// A whole answer without a body.
    fn answer(&mut self, status: u16, headers: &str) -> io::Result<()> {
        let reason = match status {
            200 => "OK",
            206 => "Partial Content",
            404 => "Not Found",
            _ => "Refused",
        };
        self.stream.write_all(format!("HTTP/1.1 {status} {reason}\r\n{headers}\r\n").as_bytes())
    }

    /// Refuses and ends the connection.
    fn refuse(&mut self, status: u16) -> io::Result<()> {
        self.answer(status, "Content-Length: 0\r\nConnection: close\r\n")?;
        self.linger()
    }

    /// Ends the connection so that the client still reads the answer: a socket closed with unread bytes in it
    /// resets the connection, which may overtake what was written.
    fn linger(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)?;
        self.stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let until = Instant::now() + Duration::from_secs(2);
        let mut sink = [0; 4096];
        while Instant::now() < until && self.stream.read(&mut sink)? > 0 {}
        Ok(())
    }

    fn missing(&mut self) -> io::Result<After> {
        self.answer(404, "Content-Length: 0\r\n").map(|()| After::Go)
    }

    fn failed(&mut self, shared: &Shared, e: StoreError) -> io::Result<After> {
        let status = shared.failed(e);
        self.answer(status, "Content-Length: 0\r\n").map(|()| After::Go)
    }

    fn get(&mut self, shared: &Shared, request: &Request, key: &str) -> io::Result<After> {
        todo!()
    }

    fn head(&mut self, shared: &Shared, key: &str) -> io::Result<After> {
        todo!()
    }

    fn put(&mut self, shared: &Shared, request: &Request, key: &str) -> io::Result<After> {
        todo!()
    }
}
