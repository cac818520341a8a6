//! As much of HTTP/1.1 as the load and the service need: messages with a Content-Length, over blocking
//! sockets. Nothing is retried here; whoever calls decides what an end means.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// How long an answer may take before it counts as none.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Target {
    /// `IP:PORT`.
    pub address: String,
    /// The `Host` header.
    pub domain: String,
}

impl Target {
    /// A connection that has sent nothing yet.
    pub fn connect(&self) -> io::Result<Connection> {
        let address = self.address.parse().map_err(|e| io::Error::new(ErrorKind::InvalidInput, e))?;
        let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Connection(BufReader::with_capacity(32 << 10, stream)))
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection(pub BufReader<TcpStream>);

/// The first line and the headers that matter.
#[derive(Debug, Default)]
pub struct Head {
    /// The first line.
    pub line: String,
    /// Content-Length.
    pub length: usize,
    /// Connection: close.
    pub close: bool,
    /// Upgrade: websocket.
    pub websocket: bool,
}

/// Reads a message's head; None when the other side ended the connection before its first byte.
pub fn head(reader: &mut impl BufRead) -> io::Result<Option<Head>> {
    let mut head = Head::default();
    if reader.read_line(&mut head.line)? == 0 {
        return Ok(None);
    }
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { return Ok(Some(head)) };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                head.length = value.parse().map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
            }
            "connection" => head.close = value.eq_ignore_ascii_case("close"),
            "upgrade" => head.websocket = value.eq_ignore_ascii_case("websocket"),
            "transfer-encoding" => return Err(io::Error::new(ErrorKind::InvalidData, "a chunked body")),
            _ => {}
        }
    }
}

/// How an exchange ended without an answer.
#[derive(Debug)]
pub enum Failure {
    /// The connection had ended before anything of an answer came.
    Unanswered(io::Error),
    /// It ended, or broke the protocol, in the middle of the answer.
    Broken(io::Error),
    /// Nothing came for too long.
    Timeout,
}

impl Failure {
    fn unanswered(e: io::Error) -> Self {
        if is_timeout(&e) { Failure::Timeout } else { Failure::Unanswered(e) }
    }

    fn broken(e: io::Error) -> Self {
        if is_timeout(&e) { Failure::Timeout } else { Failure::Broken(e) }
    }
}

fn is_timeout(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

impl Connection {
    /// Sends a request and reads its answer: status line and body.
    pub fn exchange(&mut self, request: &[u8]) -> Result<(Head, Vec<u8>), Failure> {
        // A server may answer, or end, before it has read everything: the answer decides.
        let sent = self.0.get_mut().write_all(request);
        match self.0.fill_buf() {
            Ok([]) => {
                let e = sent.err().unwrap_or_else(|| ErrorKind::UnexpectedEof.into());
                return Err(Failure::unanswered(e));
            }
            Ok(_) => {}
            Err(e) => return Err(Failure::unanswered(e)),
        }
        let head = match head(&mut self.0) {
            Ok(Some(head)) => head,
            Ok(None) => return Err(Failure::Broken(ErrorKind::UnexpectedEof.into())),
            Err(e) => return Err(Failure::broken(e)),
        };
        let mut body = vec![0; head.length];
        self.0.read_exact(&mut body).map_err(Failure::broken)?;
        Ok((head, body))
    }

    /// Whether the other side has ended it already, as every client looks before it sends on an old connection.
    pub fn ended(&self) -> bool {
        let stream = self.0.get_ref();
        if stream.set_nonblocking(true).is_err() {
            return true;
        }
        let open = matches!(stream.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
        stream.set_nonblocking(false).is_err() || !open
    }

    /// Waits for the other side's end, so that the port is free on this one at once.
    pub fn see_out(mut self) {
        let _ended_or_not = self.0.fill_buf();
    }
}
