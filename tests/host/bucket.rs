//! The S3 server that hosts and developers of these tests share: it listens on this side of the host's only
//! wire. Developers and hosts have the policies of contrib/s3. What is put into it behind the product's back goes
//! over S3 as well.

use crate::built::S3_SERVER;
use crate::lab::{Background, Host};
use crate::policy;
use omni_deploy::runner::Run;
use std::path::PathBuf;

/// Access key and secret of a developer, with contrib/s3/developer-policy.json.
pub const DEVELOPER: (&str, &str) = ("AKIADEVELOPER", "b0hw8Zs+secret/of/the/tests");

/// Those of the host, with contrib/s3/host-policy.json.
pub const HOST: (&str, &str) = ("AKIAHOST", "aNother+secret/of/the/tests");

/// Those of the tests themselves.
const ADMIN: (&str, &str) = ("AKIAADMIN", "admins/secret");

const BUCKET: &str = "deploys";

/// Lines that give somebody these credentials: a file for a unit, or for a shell that exports what it reads.
pub fn env((key, secret): (&str, &str)) -> String {
    format!("AWS_ACCESS_KEY_ID={key}\nAWS_SECRET_ACCESS_KEY={secret}\n")
}

/// A running (or stopped) S3 server with one bucket.
#[derive(Debug)]
pub struct Bucket {
    dir: PathBuf,
    listen: String,
    server: Option<Background>,
}

impl Bucket {
    /// Starts a server that `host` can reach, and on which it may report as `name`.
    pub fn start(host: &Host, name: &str) -> Self {
        let mut bucket =
            Bucket { dir: host.outside.join("s3"), listen: format!("{}:0", host.gateway), server: None };
        fs_err::create_dir_all(&bucket.dir).unwrap();
        fs_err::write(bucket.dir.join(DEVELOPER.0), policy::developer(BUCKET, "")).unwrap();
        fs_err::write(bucket.dir.join(HOST.0), policy::host(BUCKET, "", name)).unwrap();
        bucket.up();
        bucket
    }

    /// Starts it (again), at the address it had, unless it runs.
    pub fn up(&mut self) {
        if self.server.is_some() {
            return;
        }
        let program = S3_SERVER.display().to_string();
        let at = |name: &str| self.dir.join(name).display().to_string();
        let user = |(key, secret): (&str, &str)| format!("{key}:{secret}:{}", at(key));
        let mut server = Background::start(
            "exec 3<&0; \"$@\" </dev/null 3<&- & pid=$!; cat <&3 >/dev/null; kill $pid; wait $pid",
            &[
                &program,
                "--root",
                &at("root"),
                "--listen",
                &self.listen,
                "--user",
                &format!("{}:{}", ADMIN.0, ADMIN.1),
                "--user",
                &user(DEVELOPER),
                "--user",
                &user(HOST),
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

    /// Sets the server's faults (tests/s3-server/README.md).
    pub fn faults(&self, json: &str) {
        let new = self.dir.join("control.new");
        fs_err::write(&new, json).unwrap();
        fs_err::rename(new, self.dir.join("control")).unwrap();
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
            &format!("{}:{}", ADMIN.0, ADMIN.1),
            "-H",
            "x-amz-content-sha256: UNSIGNED-PAYLOAD",
            &format!("http://{}/{BUCKET}/{key}", self.listen),
        ])
    }
}
