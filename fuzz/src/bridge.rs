//! The bridge's reading of requests: in whatever pieces the bytes come, the same requests with the same bodies are
//! read, none of them reaches anything outside its own path, and not more is read than has to be.

use crate::entries::Choices;
use omni_deploy::bridge::{
    Access, Connection, Framing, Head, MAX_HEAD, Method, Request, Route, is_cache_key, parse_head, route,
};
use std::cell::Cell;
use std::io::{self, Read, Write};

const SECRET: &str = "0123456789abcdef";
/// How much is read at once for a head.
const PIECE: usize = 4096;

/// The first bytes say in which pieces the others come; among these, the first 0xff stands for as many
/// letters as a head may have bytes.
pub fn check(data: &[u8]) {
    let mut choices = Choices::new(data);
    let pieces = choices.take(6);
    let mut input = Vec::new();
    let mut run = false;
    for byte in choices.rest() {
        match byte {
            0xff if !run => {
                run = true;
                input.resize(input.len() + MAX_HEAD, b'a');
            }
            byte => input.push(*byte),
        }
    }
    // A head is looked at again with every piece: single bytes for short input only.
    let least = 1 + input.len() / 48;
    let pieces: Vec<usize> = pieces.iter().map(|b| least + usize::from(*b)).collect();
    let whole = transcript(&input, &[PIECE]);
    assert_eq!(transcript(&input, &pieces), whole, "other pieces, other requests");
    walk(&input, &whole);
}

/// What was read off a connection.
#[derive(Debug, PartialEq)]
enum Event {
    /// A request with its body, and whether that came whole; a broken one is empty.
    Request(Request, Vec<u8>, bool),
    /// Refused with a status; 400 stands for 431 too.
    Refused(u16),
}

/// The other end: gives its bytes in pieces, and counts them.
struct Peer<'a> {
    input: &'a [u8],
    pieces: std::iter::Cycle<std::slice::Iter<'a, usize>>,
    given: &'a Cell<usize>,
    told: &'a Cell<usize>,
}

impl Read for Peer<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = self.pieces.next().copied().unwrap_or(PIECE);
        let n = self.input.len().min(buf.len()).min(most);
        buf[..n].copy_from_slice(&self.input[..n]);
        self.input = &self.input[n..];
        self.given.set(self.given.get() + n);
        Ok(n)
    }
}

impl Write for Peer<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        assert_eq!(buf, b"HTTP/1.1 100 Continue\r\n\r\n", "nothing else is said while a request is read");
        self.told.set(self.told.get() + 1);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn transcript(input: &[u8], pieces: &[usize]) -> Vec<Event> {
    let (given, told) = (Cell::new(0), Cell::new(0));
    let mut connection =
        Connection::new(Peer { input, pieces: pieces.iter().cycle(), given: &given, told: &told });
    let mut events = Vec::new();
    let mut used = 0;
    while let Some(read) = connection.next_request().expect("this peer never fails") {
        let request = match read {
            Ok(request) => request,
            Err(status) => {
                assert!(given.get() <= used + MAX_HEAD + PIECE, "a head is read without end");
                // A head that is both too long and malformed is refused for what shows first.
                events.push(Event::Refused(if status == 431 { 400 } else { status }));
                break;
            }
        };
        let Head::Whole(_, length) = parse_head(&input[used..]) else { panic!("a request out of nowhere") };
        used += length;
        assert!(length <= MAX_HEAD && given.get() <= used + PIECE, "more is read than a head");
        let asked = told.get();
        let before = given.get();
        let mut body = connection.body(&request);
        let mut bytes = Vec::new();
        let read = body.read_to_end(&mut bytes);
        let whole = read.is_ok();
        if !whole {
            // How much of it was read when it broke depends on the pieces; nobody uses it.
            bytes.clear();
        }
        assert_eq!(whole, body.is_whole());
        assert!(told.get() - asked <= usize::from(request.expects_continue), "100 Continue nobody waits for");
        used += match request.framing {
            Framing::Length(n) => usize::try_from(n).unwrap_or(usize::MAX).min(input.len() - used),
            Framing::Chunked => match unchunked(&input[used..]) {
                Some((_, length)) => length,
                None => input.len() - used,
            },
        };
        assert!(given.get() <= used.max(before), "more is read than a body");
        let last = !whole || !request.keep_alive;
        events.push(Event::Request(request, bytes, whole));
        if last {
            break;
        }
    }
    events
}

/// Goes through the same bytes with a reading of its own.
fn walk(input: &[u8], events: &[Event]) {
    let mut rest = input;
    for event in events {
        let (request, body, whole) = match event {
            Event::Request(request, body, whole) => (request, body, *whole),
            Event::Refused(status) => {
                assert!(matches!(status, 400 | 411 | 417 | 501), "{status}");
                return;
            }
        };
        let Head::Whole(_, length) = parse_head(rest) else { panic!("a request out of nowhere") };
        let head = &rest[..length];
        rest = &rest[length..];
        allowed(head, request);
        let (bytes, length) = match request.framing {
            Framing::Length(n) if n <= rest.len() as u64 => (rest[..n as usize].to_vec(), n as usize),
            Framing::Chunked if let Some(read) = unchunked(rest) => read,
            _ => {
                assert!(!whole, "a body that is not all there");
                return;
            }
        };
        assert!(whole, "a body that is all there");
        assert_eq!(body, &bytes, "another body");
        rest = &rest[length..];
    }
}

/// What a request may reach, by its first line.
fn allowed(head: &[u8], request: &Request) {
    let text = String::from_utf8_lossy(head);
    let mut words = text.trim_start_matches(['\r', '\n']).split([' ', '\r', '\n']);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    assert_eq!(request.path, target);
    let key = target.strip_prefix('/').and_then(|t| t.strip_prefix(SECRET)).and_then(|t| t.strip_prefix('/'));
    for access in [Access::Read, Access::Write] {
        let route = route(request, SECRET, access);
        let Some(key) = key else {
            assert_eq!(route, Route::Stranger, "another path than its own");
            continue;
        };
        let good = is_cache_key(key);
        if good {
            assert!(key.split('/').all(|part| !part.is_empty() && !part.starts_with('.')));
            assert!(
                !key.contains(['%', '?', '#', '\\'])
                    && !key.starts_with("hosts/")
                    && !key.contains("manifest.json/")
            );
        }
        let meant = match method {
            _ if !good => Route::Refuse(404),
            "GET" => Route::Get(key),
            "HEAD" => Route::Head(key),
            "PUT" if access == Access::Write => Route::Put(key),
            _ => Route::Refuse(405),
        };
        assert_eq!(route, meant);
        assert_eq!(request.method == Method::Other, !matches!(method, "GET" | "HEAD" | "PUT"));
    }
}

/// A chunked body and how many bytes it takes (RFC 9112, section 7.1); None if it is broken or cut short.
fn unchunked(input: &[u8]) -> Option<(Vec<u8>, usize)> {
    let mut body = Vec::new();
    let mut at = 0;
    loop {
        let line = line(&input[at..])?;
        at += line.len();
        let text = line.strip_suffix(b"\r\n")?;
        if text.contains(&b'\r') {
            return None;
        }
        let size =
            std::str::from_utf8(text.split(|b| *b == b';').next()?).ok()?.trim_end_matches([' ', '\t']);
        if size.is_empty() || size.len() > 16 || !size.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            break;
        }
        body.extend(input[at..].get(..size)?);
        at += size;
        if !input[at..].starts_with(b"\r\n") {
            return None;
        }
        at += 2;
    }
    for _ in 0..=64 {
        let line = line(&input[at..])?;
        at += line.len();
        if line == b"\r\n" {
            return Some((body, at));
        }
    }
    None
}

/// A line of a chunked body's framing, with its end.
fn line(input: &[u8]) -> Option<&[u8]> {
    let end = input.iter().take(1024).position(|b| *b == b'\n')?;
    Some(&input[..=end])
}
