//! `omni-relay`: a network in user space. What it takes in on one address comes out at another as if there were a long
//! way between: half a round trip in each direction, further round trips before a new connection carries anything (as
//! TCP's and TLS's handshakes take), and slow start: only so much is under way as was acknowledged before. There is no
//! limit to the bandwidth otherwise, and nothing is lost. It never looks at what the bytes say.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a server for benchmarks; it is no part of the product"
)]

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Result, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

const USAGE: &str = "usage: omni-relay --listen ADDR:PORT --to ADDR:PORT --rtt-ms N [--handshakes N] [--connections FILE]

prints 'listening ADDR:PORT'; --handshakes is how many round trips a new connection takes (2); FILE gets a line for each
connection";

/// What a sender may have under way at first: ten segments (RFC 6928).
const FIRST_WINDOW: usize = 10 * 1448;

/// What it may have under way at most, as the kernel's buffers have it.
const LARGEST_WINDOW: usize = 4 << 20;

struct Asked {
    listen: String,
    to: String,
    rtt: Duration,
    handshakes: u32,
    connections: Option<String>,
}

fn parse(mut args: impl Iterator<Item = String>) -> Option<Asked> {
    let (mut listen, mut to, mut rtt, mut handshakes, mut connections) = (None, None, None, 2, None);
    while let Some(flag) = args.next() {
        let value = args.next()?;
        match flag.as_str() {
            "--listen" => listen = Some(value),
            "--to" => to = Some(value),
            "--rtt-ms" => rtt = Some(Duration::from_millis(value.parse().ok()?)),
            "--handshakes" => handshakes = value.parse().ok()?,
            "--connections" => connections = Some(value),
            _ => return None,
        }
    }
    Some(Asked { listen: listen?, to: to?, rtt: rtt?, handshakes, connections })
}

fn main() -> ExitCode {
    let Some(asked) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match serve(&asked) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("omni-relay: {e}");
            ExitCode::FAILURE
        }
    }
}

fn serve(asked: &Asked) -> Result<()> {
    let open = |path: &String| OpenOptions::new().create(true).append(true).open(path);
    let mut counted: Option<File> = asked.connections.as_ref().map(open).transpose()?;
    let listener = TcpListener::bind(&asked.listen)?;
    println!("listening {}", listener.local_addr()?);
    for (number, client) in listener.incoming().enumerate() {
        let client = client?;
        if let Some(file) = &mut counted {
            writeln!(file, "{}", number + 1)?;
        }
        // A server that is not there is a connection that is closed at once.
        let Ok(server) = TcpStream::connect(&asked.to) else { continue };
        let open = Instant::now() + asked.rtt * asked.handshakes;
        for (from, to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
            from.set_nodelay(true)?;
            let (send, receive) = channel();
            let rtt = asked.rtt;
            std::thread::spawn(move || take_in(from, &send, open, rtt));
            std::thread::spawn(move || give_out(to, &receive));
        }
    }
    Ok(())
}

/// Bytes, and when they arrive; none: the end.
type Packet = (Instant, Vec<u8>);

/// The sender's end: takes as much as the window lets, and waits for acknowledgements.
fn take_in(mut from: TcpStream, send: &Sender<Packet>, open: Instant, rtt: Duration) {
    let mut window = FIRST_WINDOW;
    let mut under_way: VecDeque<(Instant, usize)> = VecDeque::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let now = Instant::now();
        while let Some((acknowledged, count)) = under_way.front().copied()
            && acknowledged <= now
        {
            under_way.pop_front();
            // Each acknowledgement lets as much again on its way: it doubles with every round trip.
            window = (window + count).min(LARGEST_WINDOW);
        }
        let sent: usize = under_way.iter().map(|(_, count)| count).sum();
        if sent >= window {
            if let Some((acknowledged, _)) = under_way.front() {
                std::thread::sleep(acknowledged.saturating_duration_since(now));
            }
            continue;
        }
        let room = (window - sent).min(buffer.len());
        let count = from.read(&mut buffer[..room]).unwrap_or(0);
        let arrives = Instant::now().max(open) + rtt / 2;
        under_way.push_back((arrives + rtt / 2, count));
        if send.send((arrives, buffer[..count].to_vec())).is_err() || count == 0 {
            return;
        }
    }
}

/// The receiver's end.
fn give_out(mut to: TcpStream, receive: &Receiver<Packet>) {
    // Small packets are sent as they come; an error shows when writing.
    drop(to.set_nodelay(true));
    for (arrives, bytes) in receive {
        std::thread::sleep(arrives.saturating_duration_since(Instant::now()));
        if bytes.is_empty() || to.write_all(&bytes).is_err() {
            break;
        }
    }
    drop(to.shutdown(Shutdown::Write));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read_whole_or_not_at_all() {
        let words = |text: &str| parse(text.split(' ').map(str::to_string)).is_some();
        assert!(words("--listen a:1 --to b:2 --rtt-ms 30 --handshakes 0 --connections f"));
        for bad in ["--listen a:1 --to b:2", "--rtt-ms x", "--listen", "--other 1"] {
            assert!(!words(bad), "{bad}");
        }
    }

    #[test]
    fn what_goes_in_comes_out_in_order_and_the_ends_too() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let asked = Asked {
            listen: relay.to_string(),
            to: server.local_addr().unwrap().to_string(),
            rtt: Duration::from_millis(2),
            handshakes: 2,
            connections: None,
        };
        std::thread::spawn(move || serve(&asked));
        let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        let sent = bytes.clone();
        let mut client = loop {
            if let Ok(client) = TcpStream::connect(relay) {
                break client;
            }
        };
        std::thread::spawn(move || {
            let (mut there, _) = server.accept().unwrap();
            let mut all = Vec::new();
            there.read_to_end(&mut all).unwrap();
            there.write_all(&all).unwrap();
        });
        client.write_all(&sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert!(back == bytes, "{} bytes came back", back.len());
    }
}
