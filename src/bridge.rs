//! The bridge between Nix and a bucket: an HTTP server on a loopback port, below a path nobody can guess, that
//! passes Nix's reads and writes of a binary cache on to S3, signed and streamed. It lives as long as its
//! guard and answers this user's (and root's) connections alone. It never holds a NAR in memory, never touches
//! a key that is not part of a binary cache, and never lets Nix take a refusal for a missing path.
//!
//! The requests of Nix 2.8, for which this is made: `GET nix-cache-info`, `HEAD`/`GET HASH.narinfo`, `HEAD`,
//! `GET` (with `Range` after a broken transfer) and `PUT nar/FILE`, `PUT HASH.narinfo`; uploads carry
//! `Content-Length` and `Expect: 100-continue`.

use crate::error::{Error, Result};
use crate::store::s3::{MAX_SINGLE_PUT, S3Store};
use crate::store::{Store, StoreError};
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::HashMap;
use std::io::{self, Read, Seek, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
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
const CACHE_INFO: &str = "nix-cache-info";
/// What a cache says of itself that has nothing to say (Nix writes the same into a new one).
const DEFAULT_INFO: &str = "StoreDir: /nix/store\n";
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
    /// The `Range` header, if it names one byte range; several, or a malformed one, count as none (RFC 9110,
    /// section 14.2).
    pub range: Option<String>,
    /// The media type of its body.
    pub content_type: Option<String>,
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
        content_type: None,
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
            request.range = is_one_range(value).then(|| value.to_string());
        } else if is("content-type") && value.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            request.content_type = Some(value.to_string());
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

/// Whether a value is `bytes=FIRST-LAST`, `bytes=FIRST-` or `bytes=-LAST`.
fn is_one_range(value: &str) -> bool {
    let Some((first, last)) = value.strip_prefix("bytes=").and_then(|v| v.split_once('-')) else {
        return false;
    };
    let number =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    match (number(first), number(last)) {
        (Some(first), Some(last)) => first <= last,
        (Some(_), None) => last.is_empty(),
        (None, Some(_)) => first.is_empty(),
        (None, None) => false,
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
            key == CACHE_INFO
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
    owner: u32,
    closing: AtomicBool,
    live: Mutex<HashMap<u64, TcpStream>>,
    troubles: Mutex<Vec<String>>,
    /// Among the troubles is one that no other try mends.
    lasting: AtomicBool,
}

impl Bridge {
    /// Opens the port for a bucket. Nothing is asked of the network yet.
    pub fn open(store: S3Store, access: Access) -> Result<Self> {
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
            store,
            access,
            secret,
            // Not that of /proc/self, which is root's for a process without core dumps.
            owner: rustix::process::geteuid().as_raw(),
            closing: AtomicBool::new(false),
            live: Mutex::default(),
            troubles: Mutex::default(),
            lasting: AtomicBool::new(false),
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

    /// Whether there was trouble, all of it of the kind that passes: the bucket did not answer, or not to the
    /// end.
    pub fn may_pass(&self) -> bool {
        !lock(&self.shared.troubles).is_empty() && !self.shared.lasting.load(Ordering::SeqCst)
    }

    /// Forgets the trouble so far, before another try.
    pub fn forgive(&self) {
        lock(&self.shared.troubles).clear();
        self.shared.lasting.store(false, Ordering::SeqCst);
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
        if is_foreign(peer, address, shared.owner) || lock(&shared.live).len() >= MAX_CONNECTIONS {
            continue;
        }
        let Ok(registered) = stream.try_clone() else { continue };
        next_id += 1;
        let id = next_id;
        lock(&shared.live).insert(id, registered);
        // Closed after the first look, and before this connection could be seen to be ended with the others.
        if shared.closing.load(Ordering::SeqCst) {
            lock(&shared.live).remove(&id);
            return;
        }
        let for_thread = Arc::clone(shared);
        let spawned = std::thread::Builder::new().name("bridge".into()).spawn(move || {
            // An error here is a client that left; what S3 said is in the troubles.
            drop(Connection::open(stream).and_then(|mut c| c.serve(&for_thread)));
            lock(&for_thread.live).remove(&id);
        });
        if let Err(e) = spawned {
            lock(&shared.live).remove(&id);
            shared.trouble(format!("cannot start a thread for nix: {e}; raise the limit of tasks"));
        }
    }
}

/// Whether somebody else than `owner` or root is at the other end of a loopback connection. Who cannot be found is;
/// where the kernel shows no table, the path alone protects.
fn is_foreign(peer: SocketAddr, ours: SocketAddr, owner: u32) -> bool {
    // A table is read in pieces, between which a line may move out of sight: a few looks are enough.
    for _ in 0..3 {
        match owner_of(peer, ours) {
            None => return false,
            Some(Some(uid)) => return uid != 0 && uid != owner,
            Some(None) => {}
        }
    }
    true
}

/// The user whose socket is at the other end of a loopback connection, from the kernel's tables (proc(5),
/// /proc/net/tcp); None where there is no such table, Some(None) for a connection that nobody has open any more:
/// a socket without an inode, which is shown as root's whosever it was.
fn owner_of(peer: SocketAddr, ours: SocketAddr) -> Option<Option<u32>> {
    let words = |octets: &[u8]| -> String {
        let word = |four: &[u8]| four.try_into().map_or(0, u32::from_ne_bytes);
        octets.chunks(4).map(|four| format!("{:08X}", word(four))).collect()
    };
    // Whoever writes ::ffff:127.0.0.1 for 127.0.0.1 is in the other table.
    let shown = |a: SocketAddr, wide: bool| match a {
        SocketAddr::V4(a) if wide => format!("{}:{:04X}", words(&a.ip().to_ipv6_mapped().octets()), a.port()),
        SocketAddr::V4(a) => format!("{}:{:04X}", words(&a.ip().octets()), a.port()),
        SocketAddr::V6(a) => format!("{}:{:04X}", words(&a.ip().octets()), a.port()),
    };
    let mut known = false;
    for (table, wide) in [("/proc/self/net/tcp", false), ("/proc/self/net/tcp6", true)] {
        let Ok(table) = fs_err::read_to_string(table) else { continue };
        known = true;
        let (peer, ours) = (shown(peer, wide), shown(ours, wide));
        for line in table.lines() {
            let fields: Vec<&str> = line.split_whitespace().take(10).collect();
            if let [_, from, to, _, _, _, _, uid, _, inode] = fields[..]
                && (from, to) == (peer.as_str(), ours.as_str())
            {
                return Some(uid.parse().ok().filter(|_| inode != "0"));
            }
        }
    }
    known.then_some(None)
}

impl Shared {
    fn trouble(&self, text: String) {
        let mut troubles = lock(&self.troubles);
        if troubles.len() < 16 && !troubles.contains(&text) {
            troubles.push(text);
        }
    }

    fn refused(&self, e: &StoreError) {
        if !matches!(e, StoreError::Unreachable(_)) {
            self.lasting.store(true, Ordering::SeqCst);
        }
        self.trouble(e.to_string());
    }
}

/// The status that stands for what S3 said: never one that Nix takes for "missing".
fn status_of(e: &StoreError) -> u16 {
    if matches!(e, StoreError::Unreachable(_)) { 502 } else { 500 }
}

/// A connection with the bytes that were read beyond the last head.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    ahead: Vec<u8>,
}

/// Whether the connection can carry another request.
#[derive(PartialEq, Eq)]
enum After {
    Go,
    Close,
}

impl<S: Read> Read for Connection<S> {
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

impl<S: Read + Write> Connection<S> {
    /// A connection of which nothing was read yet.
    pub fn new(stream: S) -> Self {
        Connection { stream, ahead: Vec::new() }
    }

    /// The next head, or the status to refuse it with; None at the end of the connection.
    pub fn next_request(&mut self) -> io::Result<Option<Result<Request, u16>>> {
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

    /// The body of the request that was read last, which is to be read to its end before the next one is.
    pub fn body(&mut self, request: &Request) -> Body<'_, S> {
        Body {
            awaited: request.expects_continue,
            left: match request.framing {
                Framing::Length(n) => Left::Bytes(n),
                Framing::Chunked => Left::NextChunk,
            },
            broken: false,
            connection: self,
        }
    }
}

impl Connection<TcpStream> {
    fn open(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_write_timeout(Some(IDLE))?;
        Ok(Connection::new(stream))
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

    fn failed(&mut self, shared: &Shared, e: &StoreError) -> io::Result<After> {
        shared.refused(e);
        self.answer(status_of(e), "Content-Length: 0\r\n").map(|()| After::Go)
    }

    fn get(&mut self, shared: &Shared, request: &Request, key: &str) -> io::Result<After> {
        let stream = match shared.store.read_stream(key, request.range.as_deref()) {
            Ok(Some(stream)) => stream,
            Ok(None) if key == CACHE_INFO && shared.access == Access::Read => {
                self.answer(200, &format!("Content-Length: {}\r\n", DEFAULT_INFO.len()))?;
                self.stream.write_all(DEFAULT_INFO.as_bytes())?;
                return Ok(After::Go);
            }
            Ok(None) => return self.missing(),
            Err(e) => return self.failed(shared, &e),
        };
        let Some(length) = stream.content_length else {
            let text = format!(
                "{} sends {key} without its length; a proxy in between may do that",
                shared.store.url()
            );
            return self.failed(shared, &StoreError::Refused(text));
        };
        let mut headers = format!("Content-Length: {length}\r\nAccept-Ranges: bytes\r\n");
        for (name, value) in
            [("Content-Range", &stream.content_range), ("Content-Type", &stream.content_type)]
        {
            if let Some(value) = value.as_deref().filter(|v| !v.contains(['\r', '\n'])) {
                headers.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        self.answer(stream.status, &headers)?;
        let mut body = stream.body.take(length);
        let mut left = length;
        let mut buffer = vec![0; COPY_BUFFER];
        while left > 0 {
            // The head promised the length: a shorter body can only be told by ending the connection.
            let n = match body.read(&mut buffer) {
                Ok(0) => return Ok(self.broken(shared, key, "it ended early")),
                Ok(n) => n,
                Err(e) => return Ok(self.broken(shared, key, &e.to_string())),
            };
            self.stream.write_all(&buffer[..n])?;
            left -= n as u64;
        }
        Ok(After::Go)
    }

    fn broken(&self, shared: &Shared, key: &str, cause: &str) -> After {
        shared.trouble(format!("reading {key} from {} broke off: {cause}; try again", shared.store.url()));
        After::Close
    }

    fn head(&mut self, shared: &Shared, key: &str) -> io::Result<After> {
        let size = match shared.store.head(key) {
            Ok(Some(head)) => head.size,
            Ok(None) if key == CACHE_INFO && shared.access == Access::Read => DEFAULT_INFO.len() as u64,
            Ok(None) => return self.missing(),
            Err(e) => return self.failed(shared, &e),
        };
        self.answer(200, &format!("Content-Length: {size}\r\nAccept-Ranges: bytes\r\n")).map(|()| After::Go)
    }

    fn put(&mut self, shared: &Shared, request: &Request, key: &str) -> io::Result<After> {
        let mut body = self.body(request);
        let content_type = request.content_type.as_deref();
        let written = match request.framing {
            Framing::Length(length) if length > MAX_SINGLE_PUT => Err(too_large(shared, key)),
            Framing::Length(length) => shared.store.write_stream(key, length, content_type, &mut body),
            // S3 wants the length first.
            Framing::Chunked => match spool(&mut body) {
                Ok((_, length)) if length > MAX_SINGLE_PUT => Err(too_large(shared, key)),
                Ok((mut file, length)) => shared.store.write_stream(key, length, content_type, &mut file),
                Err(_) if body.broken => return Ok(After::Close),
                Err(e) => Err(StoreError::Refused(format!(
                    "cannot hold {key} back in {}: {e}; free some space there or set TMPDIR",
                    std::env::temp_dir().display()
                ))),
            },
        };
        let (broken, whole) = (body.broken, body.is_whole());
        match written {
            Ok(()) => self.answer(200, "Content-Length: 0\r\n").map(|()| After::Go),
            // The client left in the middle of its body: there is nobody to answer.
            Err(_) if broken => Ok(After::Close),
            Err(e) => {
                let status = if matches!(e, StoreError::TooLarge(_)) { 413 } else { status_of(&e) };
                shared.refused(&e);
                let end = if whole { "" } else { "Connection: close\r\n" };
                self.answer(status, &format!("Content-Length: 0\r\n{end}"))?;
                Ok(if whole { After::Go } else { After::Close })
            }
        }
    }
}

fn too_large(shared: &Shared, key: &str) -> StoreError {
    StoreError::TooLarge(format!(
        "{key} is larger than the {} GiB that {} takes in one PUT; split the closure into smaller paths or use \
         a cache that is not S3",
        MAX_SINGLE_PUT >> 30,
        shared.store.url()
    ))
}

/// Writes a body to a file without a name and goes back to its start; reads at most one byte more than S3
/// would take.
fn spool(body: &mut Body<'_, TcpStream>) -> io::Result<(impl Read + use<>, u64)> {
    let mut file = tempfile::tempfile()?;
    let length = io::copy(&mut body.take(MAX_SINGLE_PUT + 1), &mut file)?;
    file.rewind()?;
    Ok((file, length))
}

/// The size in a chunk's first line; None if there is none (httparse takes a line without digits for 0).
fn chunk_size(line: &[u8]) -> Option<u64> {
    match httparse::parse_chunk_size(line) {
        Ok(httparse::Status::Complete((_, size))) if line[0].is_ascii_hexdigit() => Some(size),
        _ => None,
    }
}

/// What is still to come of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// So many bytes, then the end.
    Bytes(u64),
    /// So many bytes of a chunk, then another chunk.
    Chunk(u64),
    /// A chunk's head.
    NextChunk,
}

/// A request's body as it comes. The client is told to go on when the first byte is asked for.
#[derive(Debug)]
pub struct Body<'a, S> {
    connection: &'a mut Connection<S>,
    awaited: bool,
    left: Left,
    broken: bool,
}

impl<S: Read + Write> Read for Body<'_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.next(buf);
        self.broken |= read.is_err();
        read
    }
}

impl<S: Read + Write> Body<'_, S> {
    /// Whether it was read to its end, so that another request may follow.
    pub fn is_whole(&self) -> bool {
        self.left == Left::Bytes(0)
    }

    fn next(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() || self.left == Left::Bytes(0) {
            return Ok(0);
        }
        if std::mem::take(&mut self.awaited) {
            self.connection.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        if self.left == Left::NextChunk {
            self.left = match self.line(chunk_size)? {
                0 => {
                    // Trailers say nothing that matters here.
                    let mut trailers = 0;
                    while !self.line(|line| Some(line == b"\r\n"))? {
                        trailers += 1;
                        if trailers > HEADERS {
                            return Err(io::ErrorKind::InvalidData.into());
                        }
                    }
                    Left::Bytes(0)
                }
                size => Left::Chunk(size),
            };
        }
        let (Left::Bytes(left) | Left::Chunk(left)) = self.left else { return Ok(0) };
        if left == 0 {
            return Ok(0);
        }
        let most = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = self.connection.read(&mut buf[..most])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let left = left - n as u64;
        self.left = match self.left {
            Left::Chunk(_) if left == 0 => {
                self.line(|line| (line == b"\r\n").then_some(()))?;
                Left::NextChunk
            }
            Left::Chunk(_) => Left::Chunk(left),
            Left::Bytes(_) | Left::NextChunk => Left::Bytes(left),
        };
        Ok(n)
    }

    /// Reads one line of the chunks' framing, with its end, and what it means.
    fn line<T>(&mut self, meaning: impl Fn(&[u8]) -> Option<T>) -> io::Result<T> {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.len() < 1024 && self.connection.read(&mut byte)? == 1 {
            line.push(byte[0]);
            if byte[0] == b'\n' {
                return meaning(&line).ok_or_else(|| io::ErrorKind::InvalidData.into());
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "0123456789abcdef";

    fn whole(text: &str) -> Request {
        match parse_head(text.as_bytes()) {
            Head::Whole(request, length) => {
                assert_eq!(length, text.len());
                request
            }
            other => panic!("{text:?} is {other:?}"),
        }
    }

    #[test]
    fn the_requests_of_nix_are_understood() {
        let put = whole(
            "PUT /s/nar/x.nar.zst HTTP/1.1\r\nHost: 127.0.0.1:1\r\nUser-Agent: curl/7.85.0 Nix/2.8.0\r\n\
             Accept: */*\r\nContent-Type: application/x-nix-nar\r\nContent-Length: 3000723\r\n\
             Expect: 100-continue\r\n\r\n",
        );
        let want = Request {
            method: Method::Put,
            path: "/s/nar/x.nar.zst".into(),
            range: None,
            content_type: Some("application/x-nix-nar".into()),
            framing: Framing::Length(3_000_723),
            expects_continue: true,
            keep_alive: true,
        };
        assert_eq!(put, want);
        let get = whole("GET /s/nar/x HTTP/1.1\r\nrange: bytes=5-\r\nConnection: close\r\n\r\n");
        assert_eq!(
            (get.method, get.range.as_deref(), get.keep_alive),
            (Method::Get, Some("bytes=5-"), false)
        );
        let chunked = whole("PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
        assert_eq!(chunked.framing, Framing::Chunked);
        assert!(!whole("GET / HTTP/1.0\r\n\r\n").keep_alive);
        assert!(whole("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keep_alive);
    }

    #[test]
    fn a_head_is_read_alike_however_it_is_cut() {
        let text = b"GET /s/a.narinfo HTTP/1.1\r\nHost: x\r\n\r\nrest";
        for cut in 0..text.len() - 4 {
            assert_eq!(parse_head(&text[..cut]), Head::Partial, "cut at {cut}");
        }
        assert!(matches!(parse_head(text), Head::Whole(_, n) if n == text.len() - 4));
    }

    #[test]
    fn a_head_that_could_hide_another_request_is_refused() {
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(HEADERS + 1));
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(MAX_HEAD));
        for (text, status) in [
            ("PUT /a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("PUT /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
            ("PUT /a HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
            ("PUT /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            ("PUT /a HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n", 400),
            ("PUT /a HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
            ("PUT /a HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
            ("PUT /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
            ("PUT /a HTTP/1.1\r\nExpect: something\r\n\r\n", 417),
            ("PUT /a HTTP/1.1\r\n\r\n", 411),
            ("GET / HTTP/1.1\r\nA : b\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\n\r\n", 400),
            ("\x16\x03\x01\x02\x00\x01\x00", 400),
            (&many, 431),
            (&long, 431),
        ] {
            assert_eq!(parse_head(text.as_bytes()), Head::Bad(status), "{:.80}", text);
        }
        assert_eq!(parse_head(&vec![b'a'; MAX_HEAD]), Head::Bad(431));
    }

    /// A peer that sends these bytes and hears nothing.
    struct Peer<'a>(&'a [u8]);

    impl Read for Peer<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.0.read(buf)
        }
    }

    impl Write for Peer<'_> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_chunked_body_is_whole_only_with_its_last_chunk() {
        let read = |chunks: &str| {
            let text = format!("PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}");
            let mut connection = Connection::new(Peer(text.as_bytes()));
            let request = connection.next_request().unwrap().unwrap().unwrap();
            let (mut body, mut bytes) = (connection.body(&request), Vec::new());
            let read = body.read_to_end(&mut bytes);
            assert_eq!(read.is_ok(), body.is_whole(), "{chunks:?}");
            body.is_whole().then_some(bytes)
        };
        assert_eq!(read("0\r\n\r\n").as_deref(), Some(&b""[..]));
        assert_eq!(read("3;x=y\r\nabc\r\nA \r\n0123456789\r\n00\r\nT: v\r\n\r\n").unwrap(), b"abc0123456789");
        for broken in [
            "",
            "\r\n",
            "\r\n\r\n",
            ";x\r\n\r\n",
            " \r\n\r\n",
            "3\r\nabc",
            "3\r\nabc\r\n",
            "3\r\nabc\r\n\r\n\r\n",
            "3\r\nabcd\r\n0\r\n\r\n",
            "3\nabc\r\n0\r\n\r\n",
            "-3\r\nabc\r\n0\r\n\r\n",
            "0x3\r\nabc\r\n0\r\n\r\n",
            "10000000000000000\r\nabc",
            "0\r\n",
            "0\r\nT: v\r\n",
        ] {
            assert_eq!(read(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn only_one_well_formed_range_counts() {
        for (value, counts) in [
            ("bytes=0-0", true),
            ("bytes=5-", true),
            ("bytes=-5", true),
            ("bytes=5-4", false),
            ("bytes=-", false),
            ("bytes=0-1,3-4", false),
            ("bytes=+1-2", false),
            ("lines=1-2", false),
            ("bytes=1-99999999999999999999", false),
        ] {
            assert_eq!(is_one_range(value), counts, "{value}");
        }
    }

    #[test]
    fn only_keys_of_a_binary_cache_below_the_secret_path_are_reached() {
        let hash = "0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd";
        let narinfo = format!("{hash}.narinfo");
        let listing = format!("{hash}.ls");
        for key in [
            "nix-cache-info",
            &narinfo,
            &listing,
            "nar/a.nar.zst",
            "log/x.drv",
            "realisations/sha256:a!out.doi",
        ] {
            let request = whole(&format!("GET /{SECRET}/{key} HTTP/1.1\r\n\r\n"));
            assert_eq!(route(&request, SECRET, Access::Read), Route::Get(key));
        }
        for key in [
            "",
            "/",
            "manifest.json",
            "manifests/x",
            "hosts/biz.json",
            "x.narinfo",
            ".narinfo",
            "nar",
            "nar/",
            "nar//x",
            "nar/../manifest.json",
            "nar/..",
            "nar/.x",
            "nar/a/./b",
            "nar/%2e%2e/x",
            "nar/a?b",
            "nar/a#b",
            "nix-cache-info/",
            "/nix-cache-info",
            "NAR/x",
            "nar/a\\b",
            "nar/a;b",
        ] {
            let request = whole(&format!("GET /{SECRET}/{key} HTTP/1.1\r\n\r\n"));
            assert_eq!(route(&request, SECRET, Access::Write), Route::Refuse(404), "{key}");
        }
        for path in [
            "/",
            "/nix-cache-info",
            "/0123456789abcdee/nix-cache-info",
            "/0123456789abcdef",
            "/0123456789abcdef0/x",
            "*",
            "http://x/0123456789abcdef/nix-cache-info",
            "//0123456789abcdef/nix-cache-info",
        ] {
            let request = whole(&format!("GET {path} HTTP/1.1\r\n\r\n"));
            assert_eq!(route(&request, SECRET, Access::Write), Route::Stranger, "{path}");
        }
    }

    #[test]
    fn only_a_bridge_opened_for_writing_writes() {
        let put = whole(&format!("PUT /{SECRET}/nar/x HTTP/1.1\r\nContent-Length: 1\r\n\r\n"));
        assert_eq!(route(&put, SECRET, Access::Read), Route::Refuse(405));
        assert_eq!(route(&put, SECRET, Access::Write), Route::Put("nar/x"));
        for method in ["POST", "DELETE", "PATCH", "OPTIONS", "CONNECT", "get"] {
            let request = whole(&format!("{method} /{SECRET}/nar/x HTTP/1.1\r\n\r\n"));
            assert_eq!(route(&request, SECRET, Access::Write), Route::Refuse(405), "{method}");
        }
    }

    #[test]
    fn the_owner_of_a_loopback_connection_is_known() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let ours = listener.local_addr().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        // Also of one that is made as IPv6, and of none that is gone.
        for address in [ours, SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), ours.port()))] {
            let client = TcpStream::connect(address).unwrap();
            let (server, peer) = listener.accept().unwrap();
            assert_eq!(owner_of(peer, ours), Some(Some(uid)), "{address}");
            assert!(is_foreign(peer, ours, uid + 1) == (uid != 0) && !is_foreign(peer, ours, uid));
            drop(client);
            assert!(is_foreign(peer, ours, uid), "{address}");
            drop(server);
        }
    }
}
