//! `omni-cache`: a plain HTTP server for files, as small as one can be, for `nix copy` to compare with: GET, HEAD and
//! PUT, connections that stay open, and a delay before each answer. Only for benchmarks on loopback: it trusts whoever
//! calls.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a server for benchmarks; it is no part of the product"
)]

use std::fs::File;
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

const USAGE: &str = "usage: omni-cache --listen ADDR:PORT --root DIR [--delay-ms N]

prints 'listening ADDR:PORT'";

struct Asked {
    listen: String,
    root: PathBuf,
    delay: Duration,
}

fn parse(mut args: impl Iterator<Item = String>) -> Option<Asked> {
    let (mut listen, mut root, mut delay) = (None, None, Duration::ZERO);
    while let Some(flag) = args.next() {
        let value = args.next()?;
        match flag.as_str() {
            "--listen" => listen = Some(value),
            "--root" => root = Some(PathBuf::from(value)),
            "--delay-ms" => delay = Duration::from_millis(value.parse().ok()?),
            _ => return None,
        }
    }
    Some(Asked { listen: listen?, root: root?, delay })
}

fn main() -> ExitCode {
    let Some(asked) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match serve(asked) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("omni-cache: {e}");
            ExitCode::FAILURE
        }
    }
}

fn serve(asked: Asked) -> Result<()> {
    let listener = TcpListener::bind(&asked.listen)?;
    println!("listening {}", listener.local_addr()?);
    let asked = Arc::new(asked);
    for client in listener.incoming() {
        let (client, asked) = (client?, asked.clone());
        // A client that goes away ends its connection, no more.
        std::thread::spawn(move || drop(talk(&client, &asked)));
    }
    Ok(())
}

fn talk(client: &TcpStream, asked: &Asked) -> Result<()> {
    client.set_nodelay(true)?;
    let mut from = BufReader::with_capacity(64 << 10, client);
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace();
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (method, path) = (method.to_string(), file_of(&asked.root, target));
        let (mut length, mut expects) = (0, false);
        loop {
            let mut header = String::new();
            from.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().map_err(Error::other)?,
                "transfer-encoding" => return Err(Error::other("chunks are not understood")),
                "expect" => expects = true,
                _ => {}
            }
        }
        let mut to = client;
        if expects {
            to.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        std::thread::sleep(asked.delay);
        match (method.as_str(), path) {
            ("PUT", Some(path)) => {
                store(&path, &mut from.by_ref().take(length), length)?;
                answer(to, "201 Created", 0)?;
            }
            ("GET" | "HEAD", Some(path)) => match File::open(&path) {
                Ok(mut file) => {
                    answer(to, "200 OK", file.metadata()?.len())?;
                    if method == "GET" {
                        std::io::copy(&mut file, &mut to)?;
                    }
                }
                Err(_) => answer(to, "404 Not Found", 0)?,
            },
            _ => answer(to, "400 Bad Request", 0)?,
        }
    }
}

/// The file of a request's target; none for one that leads elsewhere.
fn file_of(root: &Path, target: &str) -> Option<PathBuf> {
    let path = target.strip_prefix('/')?;
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['%', '?']);
    path.split('/').all(plain).then(|| root.join(path))
}

fn store(path: &Path, body: &mut dyn Read, length: u64) -> Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(path))?;
    // Beside it, as readers must not see a half.
    let part = path.with_extension("part");
    if std::io::copy(body, &mut File::create(&part)?)? < length {
        return Err(Error::from(ErrorKind::UnexpectedEof));
    }
    std::fs::rename(part, path)
}

fn answer(mut to: &TcpStream, status: &str, length: u64) -> Result<()> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n");
    to.write_all(head.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_stays_below_the_root() {
        let root = Path::new("/r");
        assert_eq!(file_of(root, "/a/nar/x.nar.zst"), Some(PathBuf::from("/r/a/nar/x.nar.zst")));
        for bad in ["/", "/../x", "/a//b", "/%2e%2e/x", "x", "/a?b"] {
            assert_eq!(file_of(root, bad), None, "{bad}");
        }
    }

    #[test]
    fn what_was_put_is_got_over_the_same_connection() {
        let root = std::env::temp_dir().join(format!("omni-cache-{}", std::process::id()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let asked = Asked { listen: String::new(), root: root.clone(), delay: Duration::ZERO };
        std::thread::spawn(move || talk(&listener.accept().unwrap().0, &asked));
        let mut from = BufReader::new(client.try_clone().unwrap());
        let mut ask = |request: &str| {
            client.write_all(request.as_bytes()).unwrap();
            let (mut status, mut length) = (String::new(), 0);
            from.read_line(&mut status).unwrap();
            loop {
                let mut line = String::new();
                from.read_line(&mut line).unwrap();
                match line.trim_end().strip_prefix("Content-Length: ") {
                    Some(text) => length = text.parse().unwrap(),
                    None => break,
                }
            }
            let mut body = vec![0; if request.starts_with("HEAD") { 0 } else { length }];
            from.read_exact(&mut body).unwrap();
            (status.split_whitespace().nth(1).unwrap().to_string(), String::from_utf8(body).unwrap())
        };
        assert_eq!(ask("GET /nar/x HTTP/1.1\r\n\r\n").0, "404");
        assert_eq!(ask("PUT /nar/x HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello").0, "201");
        assert_eq!(ask("HEAD /nar/x HTTP/1.1\r\n\r\n"), ("200".into(), String::new()));
        assert_eq!(ask("GET /nar/x HTTP/1.1\r\n\r\n"), ("200".into(), "hello".into()));
        std::fs::remove_dir_all(root).unwrap();
    }
}
