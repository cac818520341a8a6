//! What the tests of caches need: an S3 server, and small closures in this machine's Nix store that are gone
//! again at the end.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::disallowed_types, reason = "a server in the background is no matter for the runner")]

use omni_deploy::names::StorePath;
use omni_deploy::runner::Run;
use omni_deploy::store::s3::S3Store;
use omni_deploy::store::{StoreUrl, url::S3Location};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// Settings of Nix for a machine without build users and without a network.
pub const NIX_CONFIG: &str =
    "sandbox = false\nbuild-users-group =\nsubstituters =\nexperimental-features = nix-command";

pub struct S3 {
    child: Child,
    pub endpoint: String,
    pub dir: tempfile::TempDir,
}

impl S3 {
    pub fn start() -> S3 {
        let program = std::env::var("OMNI_TEST_S3").expect(
            "OMNI_TEST_S3 names no server: cargo build --manifest-path tests/s3-server/Cargo.toml, then set it to \
             the omni-test-s3 that was built",
        );
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(program)
            .args(["--listen", "127.0.0.1:0", "--user", "key:secret", "--bucket", "box", "--root"])
            .arg(dir.path().join("root"))
            .arg("--log")
            .arg(dir.path().join("log"))
            .arg("--control")
            .arg(dir.path().join("control"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let endpoint = line.trim().strip_prefix("listening http://").unwrap().to_string();
        S3 { child, endpoint, dir }
    }

    pub fn url(&self) -> String {
        format!("s3://box/cache?region=us-east-1&endpoint={}&scheme=http", self.endpoint)
    }

    pub fn location(&self) -> S3Location {
        match StoreUrl::parse(&self.url()).unwrap() {
            StoreUrl::S3(location) => location,
            StoreUrl::Dir(_) => unreachable!("the URL is an s3:// one"),
        }
    }

    /// The bucket, opened with this user's key.
    pub fn store_as(&self, id: &'static str, secret: &'static str) -> S3Store {
        let env = move |name: &str| match name {
            "AWS_ACCESS_KEY_ID" => Some(id.to_string()),
            "AWS_SECRET_ACCESS_KEY" => Some(secret.to_string()),
            "AWS_EC2_METADATA_DISABLED" => Some("true".into()),
            _ => None,
        };
        S3Store::open_in(&self.location(), Arc::new(env)).unwrap()
    }

    pub fn store(&self) -> S3Store {
        self.store_as("key", "secret")
    }

    /// Makes the server fail as the JSON says.
    pub fn control(&self, json: &str) {
        let temp = self.dir.path().join("control.new");
        fs_err::write(&temp, json).unwrap();
        fs_err::rename(&temp, self.dir.path().join("control")).unwrap();
    }

    /// The requests so far: method, path, status.
    pub fn log(&self) -> Vec<String> {
        let text = fs_err::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        text.lines().map(String::from).collect()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A closure of two input-addressed paths, `app` with a program that refers to `lib`.
pub struct Closure {
    pub app: StorePath,
    pub lib: StorePath,
    drvs: Vec<String>,
}

impl Closure {
    /// `name` is the program's; `size` the bytes of noise in the library.
    pub fn build(name: &str, size: u64) -> Closure {
        let unique = tempfile::tempdir().unwrap();
        let expression = format!(
            "let make = name: script: derivation {{ inherit name; system = builtins.currentSystem; \
             builder = \"/bin/sh\"; args = [ \"-ec\" script ]; PATH = \"/usr/bin:/bin\"; salt = \"{}\"; }};\n\
             lib = make \"{name}-lib\" \"mkdir $out; head -c {size} /dev/urandom > $out/noise\";\n\
             in make \"{name}\" \"mkdir -p $out/bin; echo ${{lib}} > $out/bin/{name}; chmod +x $out/bin/{name}\"\n",
            unique.path().display()
        );
        let file = unique.path().join("closure.nix");
        fs_err::write(&file, expression).unwrap();
        let drv = ask("nix-instantiate", &[file.to_str().unwrap()]).trim().to_string();
        let app = StorePath::parse(ask("nix-store", &["--realise", &drv]).trim()).unwrap();
        let paths = ask("nix-store", &["--query", "--requisites", app.as_str()]);
        let lib = paths.lines().find(|l| l.ends_with("-lib")).unwrap();
        let drvs = ask("nix-store", &["--query", "--requisites", &drv]);
        let drvs = drvs.lines().filter(|l| l.ends_with(".drv")).map(String::from).collect();
        Closure { lib: StorePath::parse(lib).unwrap(), app, drvs }
    }

    pub fn paths(&self) -> [StorePath; 2] {
        [self.app.clone(), self.lib.clone()]
    }

    /// Takes the closure out of this machine's store.
    pub fn forget(&self) {
        let mut words = vec!["--delete", self.app.as_str(), self.lib.as_str()];
        words.extend(self.drvs.iter().map(String::as_str));
        ask("nix-store", &words);
    }
}

impl Drop for Closure {
    fn drop(&mut self) {
        let there = |p: &&str| fs_err::metadata(p).is_ok();
        let all = [self.app.as_str(), self.lib.as_str()];
        let words: Vec<&str> =
            all.into_iter().chain(self.drvs.iter().map(String::as_str)).filter(there).collect();
        if !words.is_empty() && !std::thread::panicking() {
            ask("nix-store", &[&["--delete"], &words[..]].concat());
        }
    }
}

/// What a program of Nix's prints.
pub fn ask(program: &str, words: &[&str]) -> String {
    Run::new(program).args(words).env("NIX_CONFIG", NIX_CONFIG).success().unwrap().text()
}

/// A new signing key: its file, and its public part.
pub fn key(dir: &tempfile::TempDir, name: &str) -> (PathBuf, String) {
    let secret = ask("nix", &["key", "generate-secret", "--key-name", name]);
    let file = dir.path().join(format!("{name}.secret"));
    fs_err::write(&file, &secret).unwrap();
    let public = Run::new("nix")
        .args(["key", "convert-secret-to-public"])
        .env("NIX_CONFIG", NIX_CONFIG)
        .stdin(secret)
        .success()
        .unwrap();
    (file, public.text().trim().to_string())
}
