//! What integration tests share: the real S3 test server, started for one test and ended with it.

#![allow(dead_code, reason = "every test program uses a part of it")]

pub mod built;
pub mod policy;

use std::io::{BufRead, BufReader};
#[allow(clippy::disallowed_types, reason = "a server in the background, ended by its own handle")]
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const BUCKET: &str = "box";

/// Access key and secret of somebody who may do everything: what is done behind the product's back.
pub const KEY: &str = "AKTEST";
pub const SECRET: &str = "test-secret";

/// Those of a developer, with contrib/s3/developer-policy.json.
pub const DEVELOPER: (&str, &str) = ("AKDEVELOPER", "developers-secret");

/// Those of the host `biz`, with contrib/s3/host-policy.json.
pub const HOST: (&str, &str) = ("AKHOSTBIZ", "hosts-secret");

/// A running server with the bucket [`BUCKET`]; killed, and its directory removed, when it goes out of scope.
#[allow(clippy::disallowed_types, reason = "as above")]
pub struct S3Server {
    child: Child,
    pub dir: tempfile::TempDir,
    /// `ADDRESS:PORT`.
    pub address: String,
}

impl S3Server {
    /// Three users: [`KEY`], and [`DEVELOPER`] and [`HOST`], who use all of the bucket.
    pub fn start() -> Self {
        Self::start_below("")
    }

    /// As [`S3Server::start`], but what the developer and the host use is below this prefix.
    pub fn start_below(prefix: &str) -> Self {
        Self::start_with(prefix, &[])
    }

    /// As [`S3Server::start`], by a name before which a bucket's may stand.
    pub fn start_as(domain: &str) -> Self {
        Self::start_with("", &["--domain", domain])
    }

    #[allow(clippy::disallowed_types, reason = "as above")]
    fn start_with(prefix: &str, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the server");
        let at = |name: &str| dir.path().join(name);
        let user = |(key, secret): (&str, &str), policy: String| {
            fs_err::write(at(key), policy).expect("the policy is written");
            ["--user".to_string(), format!("{key}:{secret}:{}", at(key).display())]
        };
        let developer = user(DEVELOPER, policy::developer(BUCKET, prefix));
        let host = user(HOST, policy::host(BUCKET, prefix, "biz"));
        let mut child = Command::new(&*built::S3_SERVER)
            .arg("--root")
            .arg(at("root"))
            .args(["--listen", "127.0.0.1:0", "--bucket", BUCKET, "--user", &format!("{KEY}:{SECRET}")])
            .arg("--log")
            .arg(at("log"))
            .arg("--connections")
            .arg(at("connections"))
            .arg("--control")
            .arg(at("control.json"))
            .args(developer)
            .args(more)
            .args(host)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the S3 test server starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the server says where it listens");
        let address =
            line.trim().strip_prefix("listening http://").expect("the server's address").to_string();
        S3Server { child, dir, address }
    }

    /// `s3://box[/PREFIX]?…` of this server.
    pub fn url(&self, prefix: &str) -> String {
        let slash = if prefix.is_empty() { "" } else { "/" };
        format!("s3://{BUCKET}{slash}{prefix}?endpoint={}&scheme=http", self.address)
    }

    /// Sets the server's faults (tests/s3-server/src/faults.rs has their form).
    pub fn faults(&self, json: &str) {
        let new = self.dir.path().join("control.new");
        fs_err::write(&new, json).expect("the control file is written");
        fs_err::rename(new, self.dir.path().join("control.json")).expect("the control file is replaced");
    }

    /// Every request so far: `METHOD PATH STATUS`; status 000 had no answer.
    pub fn log(&self) -> Vec<String> {
        let text = fs_err::read_to_string(self.dir.path().join("log")).expect("the server's log");
        text.lines().map(str::to_string).collect()
    }

    /// How many connections were made to it so far.
    pub fn connections(&self) -> usize {
        let text = fs_err::read_to_string(self.dir.path().join("connections"));
        text.expect("the server's list of connections").lines().count()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.child.kill().expect("the server is ended");
        self.child.wait().expect("the server's end is seen");
    }
}

/// Waits until `done`, at most `limit`.
pub fn wait_until(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
