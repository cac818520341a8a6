//! The web service that the host tests deploy: one page, its own environment, an echo, and the ways in which a
//! release goes wrong. It runs from a closure, `DIR/bin/NAME`, and reads two files there: `DIR/version`, the
//! page, and `DIR/behaviour` (absent in a good release): `exit N`, `crash SECONDS` or `port N`. What it finds below
//! `$CREDENTIALS_DIRECTORY` it tells everybody at `/credentials/NAME`.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

fn main() -> Result<()> {
    let program = std::env::current_exe()?;
    let closure = program.parent().and_then(|bin| bin.parent()).ok_or_else(|| Error::other("no closure"))?;
    let version = fs_err::read_to_string(closure.join("version"))?.trim().to_string();
    let behaviour = fs_err::read_to_string(closure.join("behaviour")).unwrap_or_default();
    let mut words = behaviour.split_whitespace();
    let (what, number) = (words.next(), words.next().and_then(|n| n.parse::<u16>().ok()).unwrap_or(0));

    let mut port: u16 = std::env::var("PORT").ok().and_then(|p| p.parse().ok()).unwrap_or(8080);
    match what {
        Some("exit") => {
            eprintln!("page: cannot open the database of version {version}");
            std::process::exit(number.into());
        }
        Some("crash") => {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_secs(number.into()));
                eprintln!("page: out of luck");
                std::process::exit(1);
            });
        }
        Some("port") => port = number,
        _ => {}
    }
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    eprintln!("page: version {version} on port {port}");
    for stream in listener.incoming() {
        let (stream, version) = (stream?, version.clone());
        std::thread::spawn(move || {
            // A client that went away is no concern of the others.
            if let Err(e) = answer(&stream, &version) {
                eprintln!("page: {e}");
            }
        });
    }
    Ok(())
}

/// Answers one request and closes.
fn answer(mut stream: &TcpStream, version: &str) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        // A probe that only connects.
        return Ok(());
    }
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? <= 2 {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().map_err(Error::other)?;
        }
    }
    let mut words = line.split_whitespace();
    let (status, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/health")) => ("200 OK", b"ok\n".to_vec()),
        // One variable after another, each ended by a NUL, as in /proc/PID/environ.
        (Some("GET"), Some("/env")) => ("200 OK", environment()),
        (Some("GET"), Some(path)) if path.starts_with("/credentials/") => ("200 OK", credential(path)?),
        (Some("GET"), Some(_)) => ("200 OK", format!("{version}\n").into_bytes()),
        (Some("POST"), Some(_)) => {
            let mut body = vec![0; length];
            reader.read_exact(&mut body)?;
            ("200 OK", body)
        }
        _ => ("405 Method Not Allowed", Vec::new()),
    };
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    stream.write_all(&body)
}

fn credential(path: &str) -> Result<Vec<u8>> {
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| Error::other("no credentials"))?;
    let name = path.rsplit('/').next().unwrap_or_default();
    fs_err::read(std::path::Path::new(&folder).join(name))
}

fn environment() -> Vec<u8> {
    let mut all = Vec::new();
    for (name, value) in std::env::vars_os() {
        let mut pair: OsString = name;
        pair.push("=");
        pair.push(value);
        all.extend(pair.into_vec());
        all.push(0);
    }
    all
}
