//! Somebody else's WebSockets through the same Caddy: held open, used all the time, opened again at once when
//! they are cut, and counted.

use crate::http::{self, Connection, TIMEOUT, Target};
use crate::serve::{KEY, frame};
use std::io::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How often each says something.
const SAY_EVERY: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Counts {
    /// Frames that came back.
    echoes: AtomicU64,
    /// Attempts to open one that failed.
    refused: AtomicU64,
    /// How often each was cut.
    cuts: Mutex<Vec<u32>>,
}

impl Counts {
    fn json(&self) -> String {
        let cuts = self.cuts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        format!(
            "{{\"cuts\": {cuts:?}, \"refused\": {}, \"echoes\": {}}}",
            self.refused.load(Ordering::Relaxed),
            self.echoes.load(Ordering::Relaxed)
        )
    }
}

/// Holds connections open until stdin ends, telling the counts at each of its lines.
pub fn run(target: &Target, connections: u32) -> io::Result<()> {
    let counts: &'static Counts = Box::leak(Box::default());
    counts.cuts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).resize(connections as usize, 0);
    for which in 0..connections as usize {
        let target = target.clone();
        std::thread::spawn(move || {
            loop {
                let Ok(mut connection) = open(&target) else {
                    counts.refused.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(SAY_EVERY);
                    continue;
                };
                let end = converse(&mut connection, counts);
                eprintln!("neighbour: {which} was cut: {end:?}");
                counts.cuts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[which] += 1;
            }
        });
    }
    for line in io::stdin().lines() {
        line?;
        println!("{}", counts.json());
    }
    Ok(())
}

fn open(target: &Target) -> io::Result<Connection> {
    let mut connection = target.connect()?;
    write!(
        connection.0.get_mut(),
        "GET /ws HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n",
        target.domain
    )?;
    match http::head(&mut connection.0)? {
        Some(head) if head.line.starts_with("HTTP/1.1 101 ") => Ok(connection),
        other => Err(io::Error::other(format!("not a WebSocket: {other:?}"))),
    }
}

/// Says something again and again; returns how it ended.
fn converse(connection: &mut Connection, counts: &Counts) -> io::Result<()> {
    connection.0.get_ref().set_read_timeout(Some(TIMEOUT))?;
    let text = b"still here";
    let mask = [7, 11, 13, 17];
    let mut message = vec![0x81, 0x80 | text.len() as u8];
    message.extend(mask);
    message.extend(text.iter().enumerate().map(|(i, b)| b ^ mask[i % 4]));
    loop {
        connection.0.get_mut().write_all(&message)?;
        match frame(&mut connection.0)? {
            Some(echo) if echo == text => counts.echoes.fetch_add(1, Ordering::Relaxed),
            Some(other) => return Err(io::Error::other(format!("echo of something else: {other:?}"))),
            None => return Ok(()),
        };
        std::thread::sleep(SAY_EVERY);
    }
}
