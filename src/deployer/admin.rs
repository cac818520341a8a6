//! Caddy's admin endpoint: who answers there, and one exchange with it at a time. Nothing is asked or sent
//! before whoever listens is known to be Caddy: its configuration decides what root does next, and anybody on the host
//! may listen where Caddy does not. No redirects, no proxies, a bounded answer; what somebody else says is shown to
//! nobody. Knows nothing of routes.

use super::listeners::{self, Answers};
use crate::config::admin::{Address, Endpoint, PORT};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How much of an answer is read.
pub const MAX_ANSWER: u64 = 4 << 20;
/// How long an exchange may take, and the connection to it.
const DEADLINE: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(3);
/// What the server that shows Caddy's configuration says of itself ([`super::caddy::VIEW_SERVER`]).
pub const VIEW_HEADER: &str = "Omni-Deploy-View";
/// How often another connection is tried where that server shares its port with Caddy's own endpoint: the kernel gives
/// each to one of them by lot.
const DRAWS: usize = 20;

/// What Caddy answered.
#[derive(Debug)]
pub struct AdminResponse {
    /// Its status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
    /// Whether it was Caddy for sure. Of an address that is not this machine's nobody can tell from here; then what it
    /// says is no text for others.
    pub proven: bool,
    viewed: bool,
}

impl AdminResponse {
    /// One that was not asked for.
    #[cfg(test)]
    pub fn of(status: u16, body: Vec<u8>) -> Self {
        AdminResponse { status, body, proven: true, viewed: false }
    }

    /// Whether what was asked for is done.
    pub fn is_success(&self) -> bool {
        (200..=299).contains(&self.status)
    }

    /// What an answer that was not meant to be says, in one line for people.
    pub fn summary(&self) -> String {
        if !self.proven {
            return self.status.to_string();
        }
        let text = String::from_utf8_lossy(&self.body);
        let line: String = text.lines().next().unwrap_or_default().chars().take(300).collect();
        format!("{}: {line}", self.status)
    }
}

/// One request and its answer; the error says why there is none, with the next move.
pub fn exchange(address: &Address, method: &str, path: &str, body: &str) -> Result<AdminResponse, String> {
    for _ in 0..DRAWS {
        let answer = ask(&address.now(), method, path, body)?;
        if !answer.viewed {
            return Ok(answer);
        }
    }
    Err(format!(
        "{} only shows Caddy's configuration; take 'caddyAdmin' out of the configuration if it is set, or give Caddy its \
         socket again: systemctl restart caddy",
        address.now()
    ))
}

/// What Caddy shows at this path, for whoever only looks and need not be root: where the folder of its socket is closed to
/// this user, its port is asked, at which either it listens itself or the server that shows its configuration.
pub fn shown(address: &Address, path: &str) -> Result<AdminResponse, String> {
    let answer = exchange(address, "GET", path, "");
    match (&answer, address.now()) {
        (Err(_), Endpoint::Unix(_)) if !rustix::process::geteuid().is_root() => {
            ask(&Endpoint::Tcp(Ipv4Addr::LOCALHOST.to_string(), PORT), "GET", path, "").or(answer)
        }
        _ => answer,
    }
}

fn ask(at: &Endpoint, method: &str, path: &str, body: &str) -> Result<AdminResponse, String> {
    let until = Instant::now() + DEADLINE;
    let mut connection = connect(at)?;
    let broke = |e: io::Error| format!("Caddy's answer at {at} broke off ({e}); the next pass asks again");
    connection.send(&request(at, method, path, body), until).map_err(broke)?;
    let bytes = connection.receive(until).map_err(broke)?;
    read(&bytes, connection.proven).map_err(|why| format!("Caddy's answer at {at} {why}"))
}

struct Connection {
    /// Of either kind: what is done with it is the same.
    socket: UnixStream,
    proven: bool,
}

/// Connects to Caddy, or to nobody.
fn connect(at: &Endpoint) -> Result<Connection, String> {
    match at {
        Endpoint::Unix(path) => Ok(Connection { socket: unix(at, path)?, proven: true }),
        Endpoint::Tcp(host, port) => tcp(at, host, *port),
    }
}

fn no_answer(at: &Endpoint, why: &dyn fmt::Display) -> String {
    format!(
        "Caddy's admin endpoint {at} does not answer ({why}); start Caddy ('systemctl start caddy') or set 'caddyAdmin'"
    )
}

fn unix(at: &Endpoint, path: &Path) -> Result<UnixStream, String> {
    let denied = |e: &io::Error| e.kind() == ErrorKind::PermissionDenied;
    let failed = |e: io::Error| match denied(&e) {
        true => format!("Caddy's admin endpoint {at} is root's and Caddy's alone; run this as root"),
        false => no_answer(at, &e),
    };
    let meta = fs_err::symlink_metadata(path).map_err(failed)?;
    if !meta.file_type().is_socket() {
        return Err(format!("{} is not a socket; set 'caddyAdmin' to Caddy's", path.display()));
    }
    let stream = unix_connected(path).map_err(|e| failed(e.into()))?;
    let peer = sockopt::socket_peercred(&stream).map_err(|e| failed(e.into()))?;
    let (uid, pid) = (peer.uid.as_raw(), peer.pid.as_raw_nonzero().get() as u32);
    let owner = || listeners::owner(pid);
    if uid != 0 && !owner().is_caddys() {
        return Err(not_caddy(at, &owner().to_string()));
    }
    // Whoever may put another socket there could lead us to one of root's.
    if let Some(why) = open_to_others(path, uid) {
        return Err(format!("nothing was asked at {at}: {why}"));
    }
    Ok(stream)
}

/// A connection that does not wait for somebody who takes none.
fn unix_connected(path: &Path) -> rustix::io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(|_| rustix::io::Errno::IO)?;
    Ok(stream)
}

/// Why others than root and the user of whoever listens decide what a path leads to; with the next move.
fn open_to_others(path: &Path, uid: u32) -> Option<String> {
    let folder = path.parent()?;
    let real = fs_err::canonicalize(folder).ok();
    let all = folder.ancestors().chain(real.iter().flat_map(|real| real.ancestors()));
    for folder in all.filter(|folder| folder.is_absolute()) {
        let Ok(meta) = fs_err::metadata(folder) else { continue };
        if ![0, uid].contains(&meta.uid()) || meta.mode() & 0o022 != 0 {
            return Some(format!(
                "others can change what is in {}, on the way to it; have Caddy make its socket in a folder of its own",
                folder.display()
            ));
        }
    }
    None
}

/// Whom a socket lets in besides root and the user that made it; None: nobody. For `doctor`.
pub fn lets_in(path: &Path) -> Option<String> {
    let meta = fs_err::symlink_metadata(path).ok()?;
    let folder = fs_err::metadata(path.parent()?).ok()?;
    // A connection takes the right to write to the socket, and to enter the folders on the way.
    let open = |folder_bit: u32, bit: u32| meta.mode() & bit != 0 && folder.mode() & folder_bit != 0;
    if open(0o001, 0o002) {
        Some("every user".into())
    } else if open(0o010, 0o020) && meta.gid() != 0 {
        Some(format!("group {}", meta.gid()))
    } else {
        None
    }
}

fn tcp(at: &Endpoint, host: &str, port: u16) -> Result<Connection, String> {
    let mut failed = None;
    for address in addresses(host, port).map_err(|e| no_answer(at, &e))? {
        // An address of another machine, or of a container's network: who listens there cannot be seen from here.
        let proven = address.ip().is_loopback() || is_ours(address.ip());
        let connected = match proven {
            true => caddys(at, address),
            false => TcpStream::connect_timeout(&address, CONNECT).map_err(|e| no_answer(at, &e)),
        };
        match connected {
            Ok(stream) => return Ok(Connection { socket: OwnedFd::from(stream).into(), proven }),
            Err(why) => failed = Some(why),
        }
    }
    Err(failed.unwrap_or_else(|| no_answer(at, &"its name has no address")))
}

/// How often, and with which pause, who listens is looked at while it changes.
const LOOKS: u32 = 20;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A connection to Caddy at an address of this machine: the same socket of Caddy's listened before and after it was made.
/// Caddy opens its endpoint anew at every change of its configuration, and a socket that is closed while its owner is
/// looked for is nobody's: then it is looked at again.
fn caddys(at: &Endpoint, address: SocketAddr) -> Result<TcpStream, String> {
    let mut changing = String::new();
    for _ in 0..LOOKS {
        match connect_once(at, address)? {
            Ok(stream) => return Ok(stream),
            Err(why) => changing = why,
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Err(changing)
}

/// One look and one connection; an inner error is one that another look may do away with.
fn connect_once(at: &Endpoint, address: SocketAddr) -> Result<Result<TcpStream, String>, String> {
    let (seen, inodes) =
        listeners::caddy_at(address).map_err(|e| format!("who listens at {at} is not known: {e}"))?;
    match seen {
        Answers::Expected => {}
        Answers::Nobody => return Err(no_answer(at, &"nothing listens there")),
        Answers::Others(owners) => {
            let who: Vec<String> = owners.iter().map(ToString::to_string).collect();
            let why = not_caddy(at, &who.join(" and "));
            return if owners.iter().any(|owner| owner.pid.is_none()) { Ok(Err(why)) } else { Err(why) };
        }
        Answers::Unknown => {
            return Err(format!("who listens at {at} cannot be seen by this user; run this as root"));
        }
    }
    let stream = TcpStream::connect_timeout(&address, CONNECT).map_err(|e| no_answer(at, &e))?;
    Ok(match listeners::listening_at(address) {
        Ok(now) if now.iter().all(|inode| inodes.contains(inode)) && !now.is_empty() => Ok(stream),
        _ => Err(format!("Caddy at {at} is being restarted; the next pass asks again")),
    })
}

fn not_caddy(at: &Endpoint, who: &str) -> String {
    format!(
        "{who} listens at {at} and is not Caddy: nothing was asked there; stop that, then 'systemctl restart caddy' (or \
         set 'caddyAdmin')"
    )
}

/// `localhost` is 127.0.0.1, where Caddy listens; what a resolver puts first is often [::1], where it does not.
fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if host.eq_ignore_ascii_case("localhost") {
        return Ok(vec![(Ipv4Addr::LOCALHOST, port).into()]);
    }
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host, port).to_socket_addrs()?.collect())
}

fn is_ours(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// In HTTP/1.0, whose answers end with the connection. On a socket no host is named, as Caddy wants it there.
fn request(at: &Endpoint, method: &str, path: &str, body: &str) -> Vec<u8> {
    let host = match at {
        Endpoint::Unix(_) => String::new(),
        Endpoint::Tcp(host, port) => format!("{host}:{port}"),
    };
    let content = match method {
        "GET" => String::new(),
        _ => format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()),
    };
    format!("{method} {path} HTTP/1.0\r\nHost: {host}\r\n{content}\r\n{body}").into_bytes()
}

impl Connection {
    fn patience(&self, until: Instant) -> io::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, format!("it took {} s", DEADLINE.as_secs())));
        }
        self.socket.set_read_timeout(Some(left)).and(self.socket.set_write_timeout(Some(left)))
    }

    /// Sends all. Who refuses a request need not have read it: what he answers says why.
    fn send(&mut self, bytes: &[u8], until: Instant) -> io::Result<()> {
        self.patience(until)?;
        match self.socket.write_all(bytes) {
            Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Ok(()),
            sent => sent,
        }
    }

    /// Reads to the end, or a byte past what is taken.
    fn receive(&mut self, until: Instant) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut buffer = [0; 16 << 10];
        while bytes.len() as u64 <= MAX_ANSWER {
            self.patience(until)?;
            match self.socket.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => bytes.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(bytes)
    }
}

/// Takes an answer apart; the error says what is wrong with it, with the next move.
fn read(bytes: &[u8], proven: bool) -> Result<AdminResponse, String> {
    if bytes.len() as u64 > MAX_ANSWER {
        return Err(format!(
            "has more than {} MiB, too much to be read; make its configuration smaller",
            MAX_ANSWER >> 20
        ));
    }
    let broken = || "broke off or is not HTTP; the next pass asks again".to_string();
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(length)) = head.parse(bytes) else { return Err(broken()) };
    let header =
        |name: &str| head.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value);
    let body = &bytes[length..];
    if let Some(length) = header("Content-Length") {
        let length = std::str::from_utf8(length).ok().and_then(|l| l.trim().parse::<usize>().ok());
        if length != Some(body.len()) {
            return Err(broken());
        }
    }
    if header("Transfer-Encoding").is_some() {
        return Err(broken());
    }
    let status = head.code.ok_or_else(broken)?;
    let viewed = header(VIEW_HEADER).is_some();
    Ok(AdminResponse { status, body: body.to_vec(), proven, viewed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn localhost_is_this_machine_without_asking_anybody() {
        assert_eq!(addresses("LocalHost", 2019).unwrap(), [(Ipv4Addr::LOCALHOST, 2019).into()]);
    }

    /// What is read of an answer; who answers is not asked here.
    fn answered(answer: &[u8]) -> Result<AdminResponse, String> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = answer.to_vec();
        let other = std::thread::spawn(move || theirs.write_all(&answer));
        let bytes = Connection { socket: ours, proven: true }.receive(Instant::now() + DEADLINE).unwrap();
        // Whoever goes on after we have gone is told.
        let _ = other.join().unwrap();
        read(&bytes, true)
    }

    #[test]
    fn an_answer_is_whole_small_and_not_followed_anywhere() {
        let well = answered(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
        assert_eq!((well.status, &*well.body, well.viewed), (200, &b"{}"[..], false));
        let open = answered(b"HTTP/1.1 500 Internal Server Error\r\n\r\n{\"error\":\"why\"}\nmore").unwrap();
        assert_eq!(open.summary(), "500: {\"error\":\"why\"}");
        let led =
            answered(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:7777/\r\nContent-Length: 0\r\n\r\n")
                .unwrap();
        assert_eq!((led.status, led.body.len()), (302, 0));
        assert!(answered(b"HTTP/1.1 403 Forbidden\r\nOmni-Deploy-View: 1\r\n\r\n").unwrap().viewed);
        let mut large = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        large.resize(MAX_ANSWER as usize + 100_000, b'0');
        assert!(answered(&large).unwrap_err().contains("4 MiB"));
        for broken in [
            &b""[..],
            b"HTTP/1.1 200",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        ] {
            assert!(answered(broken).unwrap_err().contains("broke off"), "{broken:?}");
        }
        let of_others =
            AdminResponse { proven: false, ..answered(b"HTTP/1.1 200 OK\r\n\r\nsession-key").unwrap() };
        assert_eq!(of_others.summary(), "200");
    }

    #[test]
    fn a_socket_that_others_can_replace_or_reach_is_told_from_one_that_is_closed() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("admin.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mode =
            |path: &Path, mode| fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(&path, 0o777);
        for (folder, whom) in [(0o700, None), (0o711, Some("every user"))] {
            mode(dir.path(), folder);
            assert_eq!(lets_in(&path).as_deref(), whom);
        }
        mode(&path, 0o755);
        assert_eq!(lets_in(&path), None);
        let uid = rustix::process::geteuid().as_raw();
        // /var/tmp is everybody's, and so is what it leads to.
        let why = open_to_others(&path, uid).unwrap();
        assert!(why.contains("/var/tmp"), "{why}");
        assert_eq!(open_to_others(Path::new("/etc/caddy/admin.sock"), uid), None);
        // What is no socket, and one of somebody who is neither root nor Caddy.
        let at = |path: &Path| Address::At(Endpoint::Unix(path.into()));
        let why = exchange(&at(Path::new("/etc/passwd")), "GET", "/config/", "").unwrap_err();
        assert!(why.contains("not a socket"), "{why}");
        let why = exchange(&at(&path), "GET", "/config/", "").unwrap_err();
        assert!(why.contains(if uid == 0 { "/var/tmp" } else { "is not Caddy" }), "{why}");
        let why = exchange(&at(Path::new("/nowhere/admin.sock")), "GET", "/config/", "").unwrap_err();
        assert!(why.contains("systemctl start caddy"), "{why}");
    }
}
