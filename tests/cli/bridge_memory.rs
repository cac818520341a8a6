//! The bridge's memory, measured in a process of its own.

mod cache;
mod common;

use cache::developers_bucket;
use common::S3Server;
use omni_deploy::bridge::{Access, Bridge};
use std::io::{Read, Write};
use std::net::TcpStream;

/// The most memory this process had at once since it was last asked, in KiB.
fn peak() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    fs_err::write("/proc/self/clear_refs", "5").unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_nar_passes_both_ways_without_being_held_in_memory() {
    const SIZE: usize = 64 << 20;
    let s3 = S3Server::start_below("cache");
    let bridge = Bridge::open(developers_bucket(&s3), Access::Write).unwrap();
    let url = bridge.url();
    let (address, secret) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut buffer = vec![b'x'; 64 << 10];
    let mut stream = TcpStream::connect(address).unwrap();
    let mut answer = [0; 15];
    let ask = |stream: &mut TcpStream, method: &str, headers: &str| {
        write!(stream, "{method} /{secret}/nar/large HTTP/1.1\r\n{headers}\r\n").unwrap();
    };
    // Once small, so that what is only set up once does not count.
    ask(&mut stream, "PUT", "Content-Length: 5\r\nConnection: close\r\n");
    stream.write_all(b"small").unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    peak();
    let before = peak();

    let mut stream = TcpStream::connect(address).unwrap();
    ask(&mut stream, "PUT", &format!("Content-Length: {SIZE}\r\nConnection: close\r\n"));
    for _ in 0..SIZE / buffer.len() {
        stream.write_all(&buffer).unwrap();
    }
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    let mut stream = TcpStream::connect(address).unwrap();
    ask(&mut stream, "GET", "Connection: close\r\n");
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            n => total += n,
        }
    }
    assert!(total > SIZE, "{total}");

    let mut stream = TcpStream::connect(address).unwrap();
    ask(&mut stream, "PUT", "Transfer-Encoding: chunked\r\nConnection: close\r\n");
    buffer.fill(b'y');
    for _ in 0..SIZE / buffer.len() {
        write!(stream, "{:x}\r\n", buffer.len()).unwrap();
        stream.write_all(&buffer).unwrap();
        stream.write_all(b"\r\n").unwrap();
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");

    let grown = peak().saturating_sub(before);
    assert!(grown < 8 << 10, "{grown} KiB more for {} KiB", SIZE >> 10);
}
