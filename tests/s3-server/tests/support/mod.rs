//! The server as a child process, and a client that signs by hand (AWS Signature Version 4) and speaks
//! HTTP over a plain socket, so that a test decides about every byte.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

pub const BUCKET: &str = "box";

/// What the user `guest` may do. `blind` is the same without the right to list.
pub const GUEST: &str = r#"{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Action": "s3:GetObject", "Resource": ["arn:aws:s3:::box/pub/*", "arn:aws:s3:::box/both/*"]},
    {"Effect": "Allow", "Action": ["s3:PutObject", "s3:DeleteObject"],
     "Resource": ["arn:aws:s3:::box/own/*", "arn:aws:s3:::box/both/*"]},
    {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::box"}]}"#;

/// A running server with a bucket; killed, and its directory removed, at the end of the test.
pub struct Server {
    child: Child,
    pub dir: PathBuf,
    pub address: String,
}

impl Server {
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// `{dir}` in an argument stands for the server's directory.
    pub fn with(arguments: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let dir = dir.join(format!("{}-{count}", std::process::id()));
        // Of a run with the same number that was killed.
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("policy.json"), GUEST).unwrap();
        std::fs::write(dir.join("blind.json"), GUEST.replace("s3:ListBucket", "s3:GetBucketLocation"))
            .unwrap();
        Self::run(dir, arguments)
    }

    fn run(dir: PathBuf, arguments: &[&str]) -> Self {
        let at = |name: &str| dir.join(name).display().to_string();
        let mut child = Command::new(env!("CARGO_BIN_EXE_omni-test-s3"))
            .args(["--root", &at("root"), "--listen", "127.0.0.1:0"])
            .args(["--bucket", BUCKET, "--user", "root:secret"])
            .args(["--user", &format!("guest:word:{}", at("policy.json"))])
            .args(["--user", &format!("blind:word:{}", at("blind.json"))])
            .args(["--log", &at("log"), "--control", &at("control.json")])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let address = line.strip_prefix("listening http://").expect("the address");
        let address = address.trim_end().to_owned();
        Self { child, dir, address }
    }

    /// Ends the server and starts another one over the same directory.
    pub fn restart(mut self) -> Self {
        self.stop();
        let dir = std::mem::take(&mut self.dir);
        Self::run(dir, &[])
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn log(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.dir.join("log")).unwrap();
        log.lines().map(str::to_owned).collect()
    }

    pub fn control(&self, json: &str) {
        let new = self.dir.join("control.new");
        std::fs::write(&new, json).unwrap();
        std::fs::rename(new, self.dir.join("control.json")).unwrap();
    }

    pub fn get(&self, key: &str) -> Response {
        self.request("GET", key).send()
    }

    pub fn head(&self, key: &str) -> Response {
        self.request("HEAD", key).send()
    }

    pub fn delete(&self, key: &str) -> Response {
        self.request("DELETE", key).send()
    }

    pub fn put(&self, key: &str, body: impl AsRef<[u8]>) -> Response {
        self.request("PUT", key).body(body).send()
    }

    /// `query` as on the wire, its names in order.
    pub fn list(&self, query: &str) -> Response {
        let query = format!("list-type=2{query}");
        self.request("GET", "").query(&query).send()
    }

    pub fn request(&self, method: &str, key: &str) -> Request {
        Request {
            address: self.address.clone(),
            method: method.to_owned(),
            path: format!("/{BUCKET}/{key}"),
            query: String::new(),
            headers: Vec::new(),
            body: Vec::new(),
            payload: None,
            time: SystemTime::now(),
            user: Some(("root".to_owned(), "secret".to_owned())),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.dir.as_os_str().is_empty() {
            return;
        }
        self.stop();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[derive(Clone)]
pub struct Request {
    address: String,
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    payload: Option<String>,
    time: SystemTime,
    user: Option<(String, String)>,
}

impl Request {
    pub fn path(mut self, path: &str) -> Self {
        self.path = path.to_owned();
        self
    }

    pub fn query(mut self, query: &str) -> Self {
        self.query = query.to_owned();
        self
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    /// What to claim in `x-amz-content-sha256`, instead of the body's hash.
    pub fn payload(mut self, claim: &str) -> Self {
        self.payload = Some(claim.to_owned());
        self
    }

    pub fn at(mut self, time: SystemTime) -> Self {
        self.time = time;
        self
    }

    pub fn user(mut self, key: &str, secret: &str) -> Self {
        self.user = Some((key.to_owned(), secret.to_owned()));
        self
    }

    pub fn anonymous(mut self) -> Self {
        self.user = None;
        self
    }

    pub fn send(self) -> Response {
        let head_only = self.method == "HEAD";
        let response = self.try_send().unwrap();
        assert!(head_only || response.is_complete(), "{response:?}");
        response
    }

    pub fn try_send(self) -> io::Result<Response> {
        let mut socket = self.start()?;
        socket.write_all(&self.body)?;
        receive(socket)
    }

    /// Sends all but the body. The caller sends that, and calls [`receive`].
    pub fn start(&self) -> io::Result<TcpStream> {
        let mut socket = TcpStream::connect(&self.address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        socket.write_all(self.head().as_bytes())?;
        Ok(socket)
    }

    fn head(&self) -> String {
        let stamp = amz_date(self.time);
        let payload = self.payload.clone();
        let payload = payload.unwrap_or_else(|| hex(&Sha256::digest(&self.body)));
        let mut headers = self.headers.clone();
        headers.push(("host".to_owned(), self.address.clone()));
        headers.push(("x-amz-content-sha256".to_owned(), payload.clone()));
        headers.push(("x-amz-date".to_owned(), stamp.clone()));
        headers.sort();

        let mut canonical = format!("{}\n{}\n{}\n", self.method, self.path, self.query);
        for (name, value) in &headers {
            writeln!(canonical, "{name}:{value}").unwrap();
        }
        let names: Vec<_> = headers.iter().map(|(name, _)| name.as_str()).collect();
        let names = names.join(";");
        write!(canonical, "\n{names}\n{payload}").unwrap();

        let day = &stamp[..8];
        let scope = format!("{day}/us-east-1/s3/aws4_request");
        let digest = hex(&Sha256::digest(&canonical));
        let to_sign = format!("AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}");
        if let Some((key, secret)) = &self.user {
            let parts = [day, "us-east-1", "s3", "aws4_request", &to_sign];
            let seed = format!("AWS4{secret}").into_bytes();
            let signature = hex(&parts.iter().fold(seed, |k, part| hmac(&k, part)));
            let authorization = format!(
                "AWS4-HMAC-SHA256 Credential={key}/{scope},SignedHeaders={names},Signature={signature}"
            );
            headers.push(("authorization".to_owned(), authorization));
        }

        let query = match self.query.as_str() {
            "" => String::new(),
            query => format!("?{query}"),
        };
        let mut head = format!("{} {}{query} HTTP/1.1\r\n", self.method, self.path);
        for (name, value) in &headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        let length = self.body.len();
        write!(head, "content-length: {length}\r\nconnection: close\r\n\r\n").unwrap();
        head
    }
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// Whether the body is as long as was promised.
    pub fn is_complete(&self) -> bool {
        let length = self.headers.get("content-length");
        let length = length.map(|length| length.parse::<usize>().unwrap());
        self.status == 304 || length.is_none_or(|length| length == self.body.len())
    }

    pub fn etag(&self) -> String {
        self.headers["etag"].clone()
    }

    /// Status and, of an error, S3's code.
    pub fn outcome(&self) -> (u16, &str) {
        let code = elements(self.text(), "Code").next().unwrap_or("");
        (self.status, code)
    }
}

/// The texts of all elements of this name.
pub fn elements<'a>(xml: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let parts = xml.split(&close).collect::<Vec<_>>();
    let texts = parts.into_iter().filter_map(move |part| Some(part.rsplit_once(&open)?.1));
    texts.collect::<Vec<_>>().into_iter()
}

pub fn receive(socket: TcpStream) -> io::Result<Response> {
    let mut reader = BufReader::new(socket);
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(line.clone()))?;
    let mut headers = HashMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            None => break,
        };
    }
    assert!(!headers.contains_key("transfer-encoding"), "{headers:?}");
    let mut body = Vec::new();
    reader.read_to_end(&mut body)?;
    Ok(Response { status, headers, body })
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `YYYYMMDDTHHMMSSZ`, by the algorithm for the Gregorian calendar that counts years from March.
fn amz_date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (days, clock) = (seconds / 86400, seconds % 86400);
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}
