//! Who listens: which process would answer at `127.0.0.1:PORT`, and whether it belongs to a unit. Reads only, from
//! /proc and the cgroups: the kernel's tables once for all ports, and of processes no more than the unit's own while
//! those hold the socket. Nothing follows from it here.

use super::unit;
use crate::files::{self, if_there};
use crate::systemd::{self, UNIT_PATH};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader, ErrorKind, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a connection to this machine itself may take.
const CONNECT: Duration = Duration::from_millis(500);

/// Where systemd's cgroups of services are: in the unified hierarchy, in a hybrid one, in the old one.
const SLICES: [&str; 3] = [
    "/sys/fs/cgroup/system.slice",
    "/sys/fs/cgroup/unified/system.slice",
    "/sys/fs/cgroup/systemd/system.slice",
];

/// The most open files of one process that are looked at for sockets, and of all. A server opens what it listens at
/// early; a socket that is not among these is one of a process that cannot be seen.
const FILES_OF_ONE: usize = 4096;
const FILES_OF_ALL: usize = 1 << 17;

/// The units that Caddy's packages have.
const CADDYS: [&str; 2] = ["caddy.service", "caddy-api.service"];

/// The states of sockets in the kernel's tables.
pub const ESTABLISHED: &str = "01";
const LISTENS: &str = "0A";

/// Who would answer at an address of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answers {
    /// No socket listens there.
    Nobody,
    /// Only sockets of the unit that was asked for.
    Expected,
    /// Somebody else, or somebody else as well.
    Others(Vec<Owner>),
    /// What would tell may not be read by this user.
    Unknown,
}

/// A process that listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// Its id; None: the kernel itself listens, or a process that cannot be seen from here.
    pub pid: Option<u32>,
    /// Its name (proc_pid_comm(5)), as [`plain`] has it.
    pub name: String,
    /// The unit that it belongs to.
    pub unit: Option<String>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, &self.unit) {
            (None, _) => f.write_str("a process that cannot be seen from here"),
            (Some(1), _) => f.write_str("systemd for a socket unit (see 'systemctl list-sockets')"),
            // Not in the quotes that commands are in.
            (Some(pid), Some(unit)) => write!(f, "\"{}\" (process {pid} of {unit})", self.name),
            (Some(pid), None) => write!(f, "\"{}\" (process {pid})", self.name),
        }
    }
}

impl Answers {
    /// Who else has the port, if anybody has.
    pub fn others(&self) -> Option<&[Owner]> {
        if let Answers::Others(owners) = self { Some(owners) } else { None }
    }
}

/// A socket, as the kernel's tables have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    v6: bool,
    /// Where it is; an address of IPv4 as IPv6 has it.
    ip: Ipv6Addr,
    /// And at which port.
    pub port: u16,
    /// The other end, as the kernel writes it.
    pub remote: String,
    /// Who made it. The kernel remembers that, whatever became of the process.
    uid: u32,
    inode: u64,
}

/// How near a socket at all addresses of both protocols is. Also one that is for IPv6 alone, which the tables do not
/// tell: then it is not the nearest, or the only one, and nobody answers ([`is_refused`]).
const EVERYTHING_V6: u8 = 3;

impl Socket {
    /// How near it is to an address of this machine, None where it does not answer for that: the kernel gives a connection
    /// to the nearest, and only among equals (SO_REUSEPORT) by lot. This very address comes before all addresses, and
    /// IPv4's before those that take both.
    fn distance(&self, to: IpAddr) -> Option<u8> {
        let v6 = u8::from(self.v6);
        match (to, self.ip.to_ipv4_mapped()) {
            (IpAddr::V4(to), Some(here)) if here == to => Some(v6),
            (IpAddr::V4(_), Some(here)) if here.is_unspecified() => Some(2 + v6),
            (IpAddr::V4(_), None) if self.ip.is_unspecified() => Some(EVERYTHING_V6),
            (IpAddr::V6(to), _) if self.v6 && self.ip == to => Some(0),
            (IpAddr::V6(_), _) if self.v6 && self.ip.is_unspecified() => Some(1),
            _ => None,
        }
    }
}

/// All sockets that listened when they were read, and whose they are as far as somebody asked.
#[derive(Debug)]
pub struct Listeners {
    sockets: Vec<Socket>,
    slice: PathBuf,
    owners: OnceCell<Owners>,
}

/// Every visible process that holds a listening socket, by the socket's inode.
#[derive(Debug, Default)]
struct Owners {
    by_inode: BTreeMap<u64, Vec<Owner>>,
    /// Some processes may not be looked into.
    partial: bool,
}

impl Listeners {
    /// Reads the kernel's tables.
    pub fn read() -> Result<Self> {
        let mut sockets = Vec::new();
        each_socket(LISTENS, |socket| sockets.push(socket))?;
        let slice = SLICES.iter().map(Path::new).find(|dir| dir.is_dir()).unwrap_or(Path::new(SLICES[0]));
        Ok(Listeners { sockets, slice: slice.to_path_buf(), owners: OnceCell::new() })
    }

    /// The sockets of which one would get a connection to an address of this machine.
    fn nearest(&self, address: SocketAddr) -> Vec<&Socket> {
        let here = || self.sockets.iter().filter(|s| s.port == address.port());
        let nearest = here().filter_map(|s| s.distance(address.ip())).min();
        here().filter(|s| nearest.is_some() && s.distance(address.ip()) == nearest).collect()
    }

    /// Who would answer at this port of 127.0.0.1, asked for a unit.
    pub fn at(&self, port: u16, unit: &str) -> Answers {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let sockets = self.nearest(address);
        if sockets.is_empty() {
            return Answers::Nobody;
        }
        let inodes: Vec<u64> = sockets.iter().map(|s| s.inode).collect();
        let held = held_by(&self.slice.join(unit), &inodes);
        let left: Vec<u64> = inodes.into_iter().filter(|inode| !held.contains(inode)).collect();
        let is_v6 = |s: &&Socket| s.distance(address.ip()) == Some(EVERYTHING_V6) && left.contains(&s.inode);
        if sockets.iter().any(is_v6) && is_refused(port) {
            return Answers::Nobody;
        }
        // Rare: a process of another slice or of a cgroup of the unit's own making, or really a stranger.
        self.others(left, |_, all, _| {
            all.iter().any(|o| o.unit.as_deref() == Some(unit))
                || (all.iter().any(|o| o.pid == Some(1)) && systemd::listens_for(unit, port))
        })
    }

    /// Who has these sockets, but for those of whom `expected` says so: by inode, by all processes that were seen to have
    /// it, and by whether there may be others.
    fn others(&self, inodes: Vec<u64>, expected: impl Fn(u64, &[Owner], bool) -> bool) -> Answers {
        let mut others = BTreeSet::new();
        for inode in inodes {
            let owners = self.owners.get_or_init(|| self.all_owners());
            let all = owners.by_inode.get(&inode).map(Vec::as_slice).unwrap_or_default();
            match all.first() {
                _ if expected(inode, all, owners.partial) => {}
                Some(first) => drop(others.insert(first.clone())),
                None if owners.partial => return Answers::Unknown,
                None => drop(others.insert(Owner { pid: None, name: String::new(), unit: None })),
            }
        }
        if others.is_empty() { Answers::Expected } else { Answers::Others(others.into_iter().collect()) }
    }

    /// Who else than the unit has this port at any address: a program that wants all addresses does not get it then.
    pub fn anywhere(&self, port: u16, unit: &str) -> Vec<Owner> {
        let inodes: Vec<u64> = self.sockets.iter().filter(|s| s.port == port).map(|s| s.inode).collect();
        if inodes.is_empty() {
            return Vec::new();
        }
        let owners = self.owners.get_or_init(|| self.all_owners());
        let all = inodes.iter().filter_map(|inode| owners.by_inode.get(inode)?.first());
        all.filter(|o| o.unit.as_deref() != Some(unit))
            .cloned()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    fn all_owners(&self) -> Owners {
        let mut owners = Owners::default();
        let listening: BTreeSet<u64> = self.sockets.iter().map(|s| s.inode).collect();
        let above = above();
        let Ok(processes) = fs_err::read_dir("/proc") else {
            return Owners { partial: true, ..owners };
        };
        let pids = processes.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let mut left = FILES_OF_ALL;
        for pid in pids.collect::<BTreeSet<u32>>() {
            let inodes = match if_there(files_of(pid)) {
                Ok(Some(files)) => first_of(files, &listening, &mut left),
                // It has ended meanwhile.
                Ok(None) => continue,
                Err(_) => {
                    owners.partial = true;
                    continue;
                }
            };
            if inodes.is_empty() {
                continue;
            }
            let owner = owner_below(pid, &above);
            for inode in inodes {
                owners.by_inode.entry(inode).or_default().push(owner.clone());
            }
        }
        owners
    }
}

/// Who would answer at an address of this machine, asked for Caddy: a unit of its name that is not of ours, or root. A
/// name is what root gave a unit; what a process calls itself says nothing. Also the inodes of the sockets there.
pub fn caddy_at(address: SocketAddr) -> Result<(Answers, Vec<u64>)> {
    let listeners = Listeners::read()?;
    let sockets = listeners.nearest(address);
    let inodes: Vec<u64> = sockets.iter().map(|s| s.inode).collect();
    if sockets.is_empty() {
        return Ok((Answers::Nobody, inodes));
    }
    let mut left: Vec<u64> = sockets.iter().filter(|s| s.uid != 0).map(|s| s.inode).collect();
    for unit in CADDYS {
        if !left.is_empty() {
            let held = held_by(&listeners.slice.join(unit), &left);
            if !held.is_empty() && is_caddys_unit(unit) {
                left.retain(|inode| !held.contains(inode));
            }
        }
    }
    // Rare: a unit with another name of Caddy's, or really a stranger.
    let answers = listeners.others(left, |inode, all, partial| {
        // Whoever may not look into other processes knows the user that Caddy runs as.
        let is_its = |s: &&Socket| s.inode == inode && Some(s.uid) == caddys_user(&listeners.slice);
        all.iter().any(Owner::is_caddys) || all.is_empty() && partial && sockets.iter().any(is_its)
    });
    Ok((answers, inodes))
}

/// The inodes of the sockets of which one would get a connection to an address of this machine.
pub fn listening_at(address: SocketAddr) -> Result<Vec<u64>> {
    Ok(Listeners::read()?.nearest(address).into_iter().map(|s| s.inode).collect())
}

/// An address of the kernel's tables: words of the machine's byte order, in hexadecimal. One of IPv4 as IPv6 has it.
fn words(text: &str) -> Option<Ipv6Addr> {
    let mut bytes = Vec::new();
    for at in (0..text.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(text.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    }
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|b| Ipv4Addr::from(b).to_ipv6_mapped()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from),
        _ => None,
    }
}

/// The processes of Caddy's units, one a line.
fn caddys_processes(slice: &Path) -> String {
    let processes = |unit: &str| files::read_virtual(&slice.join(unit).join("cgroup.procs")).ok();
    let running =
        CADDYS.into_iter().filter_map(|unit| Some((unit, processes(unit).filter(|p| !p.is_empty())?)));
    running.filter(|(unit, _)| is_caddys_unit(unit)).map(|(_, processes)| processes).collect()
}

/// The user that Caddy's unit runs as.
fn caddys_user(slice: &Path) -> Option<u32> {
    let all = caddys_processes(slice);
    let status = fs_err::read_to_string(format!("/proc/{}/status", all.lines().next()?)).ok()?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    uids.split_whitespace().next()?.parse().ok()
}

/// What identifies the program of the Caddy that runs under one of its packages' units; None if none runs.
pub fn caddys_program() -> Option<String> {
    let slice = SLICES.iter().map(Path::new).find(|dir| dir.is_dir())?;
    let all = caddys_processes(slice);
    // While it starts, its unit may also run other programs.
    let named = |pid: &&str| {
        files::read_virtual(&Path::new("/proc").join(pid).join("comm")).is_ok_and(|c| c == "caddy\n")
    };
    let exe = Path::new("/proc").join(all.lines().find(named)?).join("exe");
    let (path, meta) = (fs_err::read_link(&exe).ok()?, fs_err::metadata(&exe).ok()?);
    // A process that was not restarted after its package's upgrade is the same as before.
    let path = path.to_string_lossy();
    let path = path.strip_suffix(" (deleted)").unwrap_or(&path);
    Some(format!("{path} {} {} {}", meta.ino(), meta.len(), meta.mtime()))
}

/// A process, for people.
pub fn owner(pid: u32) -> Owner {
    owner_below(pid, &above())
}

fn owner_below(pid: u32, above: &str) -> Owner {
    let name = fs_err::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let unit = cgroup_of(pid).and_then(|at| unit_of(at.strip_prefix(above).unwrap_or(&at)));
    Owner { pid: Some(pid), name: plain(name.trim_end_matches('\n')), unit: unit.as_deref().map(plain) }
}

/// Where systemd's hierarchy begins, as we see it: below that in a container.
fn above() -> String {
    cgroup_of(1).map(|at| at.trim_end_matches("/init.scope").to_string()).unwrap_or_default()
}

/// A name without what means something to a terminal or a shell, or could be read as a command: whoever runs a process
/// gave it its name.
fn plain(name: &str) -> String {
    let well = |c: char| c.is_ascii_alphanumeric() || "._-+:@/\\".contains(c);
    name.chars().map(|c| if well(c) { c } else { '?' }).collect()
}

impl Owner {
    /// Whether it is of one of Caddy's units.
    pub fn is_caddys(&self) -> bool {
        self.unit.as_deref().is_some_and(is_caddys_unit)
    }
}

/// Whether a unit is one of Caddy's packages, and not a service that a manifest gave that name.
fn is_caddys_unit(unit: &str) -> bool {
    has_caddys_name(unit) && is_others(unit, &UNIT_PATH.map(Path::new), loaded_from)
}

/// The file that systemd has loaded a unit from.
fn loaded_from(unit: &str) -> Option<PathBuf> {
    systemd::show(&[unit.to_string()]).ok()?.remove(unit)?.fragment
}

/// `caddy.service`, `caddy-api.service` and instances of `caddy@.service`.
fn has_caddys_name(unit: &str) -> bool {
    let instance = || unit.strip_prefix("caddy@")?.strip_suffix(".service");
    CADDYS.contains(&unit) || instance().is_some_and(|instance| !instance.is_empty())
}

/// Whether a unit is not of the deployer's making: none of its files has our mark. One whose file is in none of these
/// folders systemd is asked for; one that has no file is nobody's that could be told.
fn is_others(unit: &str, dirs: &[&Path], fragment: impl Fn(&str) -> Option<PathBuf>) -> bool {
    let template = unit.split_once('@').map(|(name, _)| format!("{name}@.service"));
    let names = || std::iter::once(unit).chain(template.as_deref());
    let read = |path: PathBuf| fs_err::read(path).ok();
    let mut texts: Vec<Vec<u8>> =
        dirs.iter().flat_map(|dir| names().map(|name| dir.join(name))).filter_map(read).collect();
    if texts.is_empty() {
        texts.extend(fragment(unit).and_then(read));
    }
    !texts.is_empty() && !texts.iter().any(|text| unit::is_ours(text))
}

/// Whether nobody answers at a port of 127.0.0.1. Asked only of one where something listens.
fn is_refused(port: u16) -> bool {
    let address = (Ipv4Addr::LOCALHOST, port).into();
    TcpStream::connect_timeout(&address, CONNECT).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
}

/// Which of these sockets the processes of a unit's cgroup hold.
fn held_by(cgroup: &Path, inodes: &[u64]) -> BTreeSet<u64> {
    let mut held = BTreeSet::new();
    let processes = files::read_virtual(&cgroup.join("cgroup.procs")).unwrap_or_default();
    for pid in processes.lines().filter_map(|line| line.parse().ok()) {
        // The first file that most servers open is their socket: then there is no need to go through all of them.
        let first = fs_err::read_link(format!("/proc/{pid}/fd/3")).ok();
        let first = first.and_then(|link| socket_inode(link.as_os_str())).filter(|i| inodes.contains(i));
        held.extend(first);
        if held.len() == inodes.len() {
            return held;
        }
        let files = files_of(pid).into_iter().flatten().flatten();
        for inode in files.filter(|inode| inodes.contains(inode)) {
            held.insert(inode);
            // A server opens its sockets early: what follows are its connections, which may be many.
            if held.len() == inodes.len() {
                return held;
            }
        }
    }
    held
}

/// Those sockets that are among the first files of a process, while some of all files are left to be looked at.
fn first_of(
    files: impl Iterator<Item = Option<u64>>,
    listening: &BTreeSet<u64>,
    left: &mut usize,
) -> BTreeSet<u64> {
    let looked_at = files.take(FILES_OF_ONE.min(*left)).inspect(|_| *left -= 1);
    looked_at.flatten().filter(|inode| listening.contains(inode)).collect()
}

/// The files that a process has open (proc_pid_fd(5)), in their order; of each that is a socket its inode.
fn files_of(pid: u32) -> Result<impl Iterator<Item = Option<u64>>> {
    let files = fs_err::read_dir(format!("/proc/{pid}/fd"))?;
    Ok(files.map(|file| socket_inode(fs_err::read_link(file.ok()?.path()).ok()?.as_os_str())))
}

fn socket_inode(link: &OsStr) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// A process's place in systemd's hierarchy of cgroups (cgroups(7)).
fn cgroup_of(pid: u32) -> Option<String> {
    let text = fs_err::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    systemds(&text).map(String::from)
}

/// systemd's is the unified hierarchy; where it does not use that, and so nothing has a place in it, the one of its
/// name. A place outside of what we see is none.
fn systemds(text: &str) -> Option<&str> {
    let place = |of: &str| text.lines().find_map(|line| line.split_once(of)).map(|(_, place)| place);
    let places = [place("0::"), place(":name=systemd:")];
    places.into_iter().flatten().find(|place| *place != "/" && !place.starts_with("/.."))
}

/// The unit of a place: the first part of it that is no slice, as systemd has it.
fn unit_of(place: &str) -> Option<String> {
    let unit = place.split('/').find(|part| !part.is_empty() && !part.ends_with(".slice"))?;
    Some(unit.strip_prefix('_').unwrap_or(unit).to_string())
}

/// Goes through the sockets of a state in the kernel's tables (proc_pid_net(5)).
pub fn each_socket(state: &str, mut each: impl FnMut(Socket)) -> Result<()> {
    for (table, v6) in [("/proc/net/tcp", false), ("/proc/net/tcp6", true)] {
        // A kernel without IPv6 has no such table.
        if let Some(file) = if_there(fs_err::File::open(table))? {
            each_of(BufReader::new(file), v6, state, &mut each)?;
        }
    }
    Ok(())
}

/// In one of them: column 2 is the local address with its port, in hexadecimal and words of the machine's byte order,
/// column 3 the remote one, column 4 the state, column 8 the user, column 10 the inode. The kernel lists those that
/// listen first, and a busy machine has very many others.
pub fn each_of(table: impl BufRead, v6: bool, state: &str, each: &mut impl FnMut(Socket)) -> Result<()> {
    for line in table.lines().skip(1) {
        let line = line?;
        let columns: Vec<&str> = line.split_whitespace().take(10).collect();
        let [_, local, remote, now, _, _, _, uid, _, inode] = columns[..] else { continue };
        if now != state && state == LISTENS {
            break;
        }
        let Some((ip, port)) = local.rsplit_once(':').filter(|_| now == state) else { continue };
        if let (Some(ip), Ok(port), Ok(uid), Ok(inode)) =
            (words(ip), u16::from_str_radix(port, 16), uid.parse(), inode.parse())
        {
            each(Socket { v6, ip, port, remote: remote.into(), uid, inode });
        }
    }
    Ok(())
}

/// Whether a log says that a port was not to be had (EADDRINUSE), in the words that every language's library has.
pub fn says_in_use(log: &[String]) -> bool {
    log.iter().any(|line| line.to_ascii_lowercase().contains("address already in use"))
}

/// Why a port that others hold is in a service's way, with the next move.
pub fn in_the_way(port: u16, service: &str, owners: &[Owner]) -> String {
    let who: Vec<String> = owners.iter().map(Owner::to_string).collect();
    format!(
        "port {port} is held by {}, not by {service}; stop that, or give {service} another port (http.internalPort); \
         the next pass tries again",
        who.join(" and ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// What another thread is about to run has our sockets as well until it runs.
    fn soon(what: &str, is: impl Fn() -> bool) {
        let begun = std::time::Instant::now();
        while !is() {
            assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn of_several_that_listen_the_kernel_asks_the_nearest() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0\n\
            1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100 0\n\
            2: 0100007F:1F91 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 13 1 0 100 0\n\
            3: 00000000:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 14 1 0 100 0\n";
        let mut sockets = Vec::new();
        if cfg!(target_endian = "little") {
            each_of(table.as_bytes(), false, LISTENS, &mut |socket| sockets.push(socket)).unwrap();
            let found: Vec<_> =
                sockets.iter().map(|s| (s.port, s.distance(Ipv4Addr::LOCALHOST.into()), s.inode)).collect();
            assert_eq!(found, [(8080, Some(0), 11), (8080, Some(2), 12)]);
        }
        // The kernel's own tables, with sockets of every kind at one port.
        let nearest = |port: u16| listening_at((Ipv4Addr::LOCALHOST, port).into()).unwrap();
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        let inode = |l: &TcpListener| {
            use std::os::fd::AsRawFd;
            let link = fs_err::read_link(format!("/proc/self/fd/{}", l.as_raw_fd())).unwrap();
            socket_inode(link.as_os_str()).unwrap()
        };
        let _other_address = TcpListener::bind(("127.0.0.2", port)).unwrap();
        assert_eq!(nearest(port), [inode(&v4)]);
        drop(v4);
        soon("nobody is near", || nearest(port).is_empty());
        let in_the_way = Listeners::read().unwrap().anywhere(port, "nobody-of-this-name.service");
        assert_eq!(in_the_way.iter().map(|o| o.pid).collect::<Vec<_>>(), [Some(std::process::id())]);
        drop(_other_address);
        soon("nobody is there", || {
            Listeners::read().unwrap().anywhere(port, "nobody-of-this-name.service").is_empty()
        });
        if let Ok(any) = TcpListener::bind("[::]:0") {
            let port = any.local_addr().unwrap().port();
            assert_eq!(nearest(port), [inode(&any)]);
        }
    }

    #[test]
    fn an_address_is_answered_by_the_nearest_and_by_nobody_elses() {
        let inodes = |address: SocketAddr| listening_at(address).unwrap();
        let inode = |l: &TcpListener| {
            use std::os::fd::AsRawFd;
            let link = fs_err::read_link(format!("/proc/self/fd/{}", l.as_raw_fd())).unwrap();
            socket_inode(link.as_os_str()).unwrap()
        };
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = v4.local_addr().unwrap();
        assert_eq!(inodes(at), [inode(&v4)]);
        let made_by = rustix::process::geteuid().as_raw();
        assert_eq!(Listeners::read().unwrap().nearest(at)[0].uid, made_by);
        assert_eq!(inodes((Ipv4Addr::new(127, 0, 0, 2), at.port()).into()), [0u64; 0]);
        assert_eq!(inodes((Ipv6Addr::LOCALHOST, at.port()).into()), [0u64; 0]);
        if let Ok(v6) = TcpListener::bind((Ipv6Addr::LOCALHOST, at.port())) {
            assert_eq!(inodes((Ipv6Addr::LOCALHOST, at.port()).into()), [inode(&v6)]);
            assert_eq!(inodes(at), [inode(&v4)]);
        }
        if let Ok(any) = TcpListener::bind("[::]:0") {
            let port = any.local_addr().unwrap().port();
            assert_eq!(inodes((Ipv4Addr::LOCALHOST, port).into()), [inode(&any)]);
            assert_eq!(inodes((Ipv6Addr::LOCALHOST, port).into()), [inode(&any)]);
        }
        let any = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = any.local_addr().unwrap().port();
        assert_eq!(inodes((Ipv4Addr::LOCALHOST, port).into()), [inode(&any)]);
        drop(any);
        soon("nobody", || caddy_at((Ipv4Addr::LOCALHOST, port).into()).unwrap().0 == Answers::Nobody);
        // A test is no unit of Caddy's: it is root's, or a stranger that is named.
        match (caddy_at(at).unwrap(), made_by) {
            ((Answers::Expected, found), 0) => assert_eq!(found, [inode(&v4)]),
            ((Answers::Others(owners), _), _) => assert_eq!(owners[0].pid, Some(std::process::id())),
            (seen, _) => panic!("{seen:?}"),
        }
    }

    #[test]
    fn caddys_units_are_those_of_its_packages() {
        for (unit, is) in [
            ("caddy.service", true),
            ("caddy-api.service", true),
            ("caddy@edge.service", true),
            ("caddy@.service", false),
            ("caddy-docs.service", false),
            ("caddy-next.service", false),
            ("caddy.x.service", false),
            ("caddyx.service", false),
            ("web.service", false),
            ("caddy.scope", false),
            ("user@1000.service", false),
        ] {
            assert_eq!(has_caddys_name(unit), is, "{unit}");
        }
        assert!(!Owner { pid: Some(2), name: "caddy".into(), unit: None }.is_caddys());
    }

    #[test]
    fn a_service_that_a_manifest_named_like_caddy_is_not_caddy() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, lib, other) = (dir.path().join("etc"), dir.path().join("lib"), dir.path().join("other"));
        for dir in [&etc, &lib, &other] {
            fs_err::create_dir(dir).unwrap();
        }
        let theirs = "[Service]\nExecStart=/usr/bin/caddy run\n".to_string();
        let ours = format!("{}\n{theirs}", unit::MARK);
        fs_err::write(lib.join("caddy.service"), &theirs).unwrap();
        fs_err::write(etc.join("caddy-api.service"), &ours).unwrap();
        fs_err::write(lib.join("caddy@.service"), &theirs).unwrap();
        let dirs = [&*etc, &*lib];
        let nowhere = |_: &str| None;
        for (unit, is) in
            [("caddy.service", true), ("caddy-api.service", false), ("caddy@edge.service", true)]
        {
            assert_eq!(is_others(unit, &dirs, nowhere), is, "{unit}");
        }
        // In the deployer's folder on a host where that is another one, and in none.
        fs_err::write(other.join("a.service"), &ours).unwrap();
        fs_err::write(other.join("b.service"), &theirs).unwrap();
        for (unit, is) in [("a.service", false), ("b.service", true), ("c.service", false)] {
            assert_eq!(is_others(unit, &dirs, |name| Some(other.join(name))), is, "{unit}");
        }
        assert!(!is_others("a.service", &dirs, nowhere));
        fs_err::write(etc.join("caddy.service"), &ours).unwrap();
        assert!(!is_others("caddy.service", &dirs, nowhere));
    }

    #[test]
    fn what_a_process_calls_itself_is_never_read_as_a_command() {
        let owner = |name: &str| Owner { pid: Some(7), name: plain(name), unit: Some("x.service".into()) };
        for (name, shown) in [
            ("ss -K;curl x|sh", "ss?-K?curl?x?sh"),
            ("deployer", "deployer"),
            ("'$(id)`\"\x1b", "???id????"),
            ("nginx", "nginx"),
        ] {
            let text = owner(name).to_string();
            assert_eq!(text, format!("\"{shown}\" (process 7 of x.service)"));
            let [biz, laptop] = ["biz", "laptop"].map(|name| crate::names::HostName::parse(name).unwrap());
            assert_eq!(crate::status::hint::translated(&text, &biz, &laptop), text);
        }
    }

    #[test]
    fn who_listens_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let listeners = Listeners::read().unwrap();
        assert_eq!(listeners.at(port, "nobody-of-this-name.service"), {
            let owners = listeners.owners.get().unwrap();
            let mine = owners.by_inode.values().flatten().find(|o| o.pid == Some(std::process::id()));
            Answers::Others(vec![mine.unwrap().clone()])
        });
        drop(listener);
        soon("nobody", || {
            Listeners::read().unwrap().at(port, "nobody-of-this-name.service") == Answers::Nobody
        });
    }

    #[test]
    fn whoever_opens_very_many_files_does_not_hold_up_the_search() {
        let listening = BTreeSet::from([1, 2]);
        let mut left = FILES_OF_ALL;
        let mut looked_at = 0;
        let many = std::iter::repeat_n(None, 3).chain([Some(7), Some(1)]);
        let many =
            many.chain(std::iter::repeat_n(None, 1_000_000)).chain([Some(2)]).inspect(|_| looked_at += 1);
        assert_eq!(first_of(many, &listening, &mut left), BTreeSet::from([1]));
        assert_eq!((looked_at, left), (FILES_OF_ONE, FILES_OF_ALL - FILES_OF_ONE));
        // Nor do very many processes.
        left = 2;
        assert_eq!(
            first_of([None, Some(2), Some(1)].into_iter(), &listening, &mut left),
            BTreeSet::from([2])
        );
        assert_eq!(first_of([Some(1)].into_iter(), &listening, &mut left), BTreeSet::new());
        assert_eq!(left, 0);
    }

    #[test]
    fn a_place_in_the_cgroups_names_its_unit() {
        for (place, unit) in [
            ("/system.slice/web.service", Some("web.service")),
            ("/system.slice/web.service/worker", Some("web.service")),
            ("/system.slice/system-getty.slice/getty@tty1.service", Some("getty@tty1.service")),
            ("/machine.slice/m.scope/payload/system.slice/web.service", Some("m.scope")),
            ("/user.slice/user-0.slice/session-3.scope", Some("session-3.scope")),
            ("/system.slice/__odd.service", Some("_odd.service")),
            ("/", None),
        ] {
            assert_eq!(unit_of(place).as_deref(), unit, "{place}");
        }
        assert_eq!(systemds("4:cpu:/\n1:name=systemd:/a.service\n0::/\n"), Some("/a.service"));
        assert_eq!(systemds("1:name=systemd:/\n0::/a.service\n"), Some("/a.service"));
        assert_eq!(systemds("1:name=systemd:/../..\n0::/../run\n"), None);
        assert_eq!(systemds("0::/system.slice/a.service\n"), Some("/system.slice/a.service"));
    }
}
