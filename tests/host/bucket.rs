//! The S3 server that hosts and developers of these tests share: it listens on this side of the host's only
//! wire. What is put into it behind the product's back goes over S3 as well.

use crate::lab::{Background, Host, TOP};
use omni_deploy::runner::Run;
use std::path::PathBuf;

pub const KEY: &str = "AKIAHOSTTEST";
pub const SECRET: &str = "b0hw8Zs+secret/of/the/tests";
const BUCKET: &str = "deploys";

/// A running (or stopped) S3 server with one bucket.
#[derive(Debug)]
pub struct Bucket {
    dir: PathBuf,
    listen: String,
    server: Option<Background>,
}

impl Bucket {
    /// Starts a server that `host` can reach.
    pub fn start(host: &Host) -> Self {
        let mut bucket =
            Bucket { dir: host.outside.join("s3"), listen: format!("{}:0", host.gateway), server: None };
        fs_err::create_dir_all(&bucket.dir).unwrap();
        bucket.up();
        bucket
    }

    /// Starts it (again), at the address it had, unless it runs.
    pub fn up(&mut self) {
        if self.server.is_some() {
            return;
        }
        let program = std::env::var("OMNI_TEST_S3").unwrap_or_else(|_| {
            panic!("OMNI_TEST_S3 must name the S3 server: build it with 'cargo build --locked' in {TOP}/tests/s3-server")
        });
        let at = |name: &str| self.dir.join(name).display().to_string();
        let mut server = Background::start(
            "exec 3<&0; \"$@\" </dev/null 3<&- & pid=$!; cat <&3 >/dev/null; kill $pid; wait $pid",
            &[
                &program,
                "--root",
                &at("root"),
                "--listen",
                &self.listen,
                "--user",
                &format!("{KEY}:{SECRET}"),
                "--bucket",
                BUCKET,
                "--log",
                &at("log"),
                "--control",
                &at("control"),
            ],
        );
        let line = server.line();
        let address = line.strip_prefix("listening http://");
        self.listen = address.unwrap_or_else(|| panic!("{program} did not start: '{line}'")).to_string();
        self.server = Some(server);
    }

    /// Stops it: nobody listens there any more.
    pub fn down(&mut self) {
        self.server = None;
    }

    /// The store's URL.
    pub fn url(&self) -> String {
        format!("s3://{BUCKET}?endpoint={}&scheme=http&region=eu-1", self.listen)
    }

    /// The requests so far, one line each: `METHOD PATH STATUS`.
    pub fn log(&self) -> Vec<String> {
        let text = fs_err::read_to_string(self.dir.join("log")).unwrap_or_default();
        text.lines().map(str::to_string).collect()
    }

    /// Reads an object.
    pub fn get(&self, key: &str) -> Vec<u8> {
        self.curl(key).success().unwrap().stdout
    }

    /// Puts an object, whatever is there.
    pub fn put(&self, key: &str, bytes: &[u8]) {
        let file = self.dir.join("upload");
        fs_err::write(&file, bytes).unwrap();
        self.curl(key).arg("-T").arg(&file).success().unwrap();
    }

    fn curl(&self, key: &str) -> Run {
        Run::new("curl").args([
            "-sSf",
            "--aws-sigv4",
            "aws:amz:eu-1:s3",
            "--user",
            &format!("{KEY}:{SECRET}"),
            "-H",
            "x-amz-content-sha256: UNSIGNED-PAYLOAD",
            &format!("http://{}/{BUCKET}/{key}", self.listen),
        ])
    }
}
