//! What the tests of caches need besides the S3 server: its bucket, a home with the keys to it, and small closures in this
//! machine's Nix store that are gone again at the end.
#![allow(dead_code, reason = "each test binary uses a part")]

use crate::common::{DEVELOPER, HOST, KEY, S3Server, SECRET};
use omni_deploy::names::StorePath;
use omni_deploy::runner::Run;
use omni_deploy::store::StoreUrl;
use omni_deploy::store::s3::S3Store;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Settings of Nix for a machine without build users and without a network.
pub const NIX_CONFIG: &str =
    "sandbox = false\nbuild-users-group =\nsubstituters =\nexperimental-features = nix-command";

/// A server's bucket below `cache/`, opened with this user's key.
pub fn bucket_as(s3: &S3Server, id: &'static str, secret: &'static str) -> S3Store {
    opened(&s3.url("cache"), id, secret)
}

/// All of a server's bucket, for somebody who may do everything there.
pub fn whole_bucket(s3: &S3Server) -> S3Store {
    opened(&s3.url(""), KEY, SECRET)
}

fn opened(url: &str, id: &'static str, secret: &'static str) -> S3Store {
    let StoreUrl::S3(location) = StoreUrl::parse(url).unwrap() else { panic!("no s3:// URL") };
    let env = move |name: &str| match name {
        "AWS_ACCESS_KEY_ID" => Some(id.to_string()),
        "AWS_SECRET_ACCESS_KEY" => Some(secret.to_string()),
        "AWS_EC2_METADATA_DISABLED" => Some("true".into()),
        _ => None,
    };
    S3Store::open_in(&location, Arc::new(env)).unwrap()
}

/// A server's bucket below `cache/`, for somebody who may do everything there.
pub fn bucket(s3: &S3Server) -> S3Store {
    bucket_as(s3, KEY, SECRET)
}

/// The same for a developer; the server is one for [`S3Server::start_below`] `cache`.
pub fn developers_bucket(s3: &S3Server) -> S3Store {
    bucket_as(s3, DEVELOPER.0, DEVELOPER.1)
}

/// Runs a test again in a process of its own, whose home has the bucket's credentials and its spools; true there. Root's
/// fetches would have the spool of this machine's deployer otherwise.
pub fn at_home(test: &str) -> bool {
    if std::env::var_os("OMNI_TEST_INSIDE").is_some() {
        return true;
    }
    let home = tempfile::tempdir().unwrap();
    fs_err::create_dir(home.path().join(".aws")).unwrap();
    let profiles = [("default", DEVELOPER), ("host", HOST)].map(|(name, (key, secret))| {
        format!("[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    });
    fs_err::write(home.path().join(".aws/credentials"), profiles.concat()).unwrap();
    let run = Run::new(std::env::current_exe().unwrap().to_str().unwrap())
        .args([test, "--exact", "--nocapture", "--include-ignored"])
        .env("OMNI_TEST_INSIDE", "1")
        .env("HOME", home.path())
        .env("XDG_CACHE_HOME", home.path().join("cache"))
        .env("NIX_CONFIG", NIX_CONFIG)
        .without_env("AWS_ACCESS_KEY_ID");
    let output = run.output().unwrap();
    assert!(output.status.ok() && output.text().contains("1 passed"), "{}{}", output.text(), output.stderr);
    false
}

/// A program of a developer, run in a folder whose `home` is his.
pub fn at_desk(program: &str, dir: &Path, store: &str) -> Run {
    Run::new(program)
        .dir(dir)
        .env("HOME", dir.join("home"))
        .without_env("XDG_CONFIG_HOME")
        .without_env("XDG_STATE_HOME")
        .without_env("XDG_CACHE_HOME")
        .env("NIX_CONFIG", NIX_CONFIG)
        .env("AWS_ACCESS_KEY_ID", DEVELOPER.0)
        .env("AWS_SECRET_ACCESS_KEY", DEVELOPER.1)
        .env("OMNI_DEPLOY_STORE", store)
        .env("OMNI_DEPLOY_HOST", "laptop")
}

/// Builds an expression of Nix's, made from a text that no other build has: its derivation and what came of it.
fn built(expression: impl FnOnce(&str) -> String) -> (String, StorePath) {
    let unique = tempfile::tempdir().unwrap();
    let file = unique.path().join("expression.nix");
    fs_err::write(&file, expression(&unique.path().display().to_string())).unwrap();
    let drv = ask("nix-instantiate", &[file.to_str().unwrap()]).trim().to_string();
    let path = StorePath::parse(ask("nix-store", &["--realise", &drv]).trim()).unwrap();
    (drv, path)
}

/// A function of Nix's language that builds a path with a script, other than in any other build.
fn make(unique: &str) -> String {
    format!(
        "let make = name: script: derivation {{ inherit name; system = builtins.currentSystem; \
         builder = \"/bin/sh\"; args = [ \"-ec\" script ]; PATH = \"/usr/bin:/bin\"; salt = \"{unique}\"; }};\n"
    )
}

/// The derivations that one depends on, and itself.
fn derivations(drv: &str) -> Vec<String> {
    let all = ask("nix-store", &["--query", "--requisites", drv]);
    all.lines().filter(|l| l.ends_with(".drv")).map(String::from).collect()
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
        let (drv, app) = built(|unique| {
            format!(
                "{}lib = make \"{name}-lib\" \"mkdir $out; head -c {size} /dev/urandom > $out/noise\";\n\
                 in make \"{name}\" \"mkdir -p $out/bin; echo ${{lib}} > $out/bin/{name}; chmod +x $out/bin/{name}\"\n",
                make(unique)
            )
        });
        let paths = ask("nix-store", &["--query", "--requisites", app.as_str()]);
        let lib = paths.lines().find(|l| l.ends_with("-lib")).unwrap();
        Closure { lib: StorePath::parse(lib).unwrap(), app, drvs: derivations(&drv) }
    }

    pub fn paths(&self) -> [StorePath; 2] {
        [self.app.clone(), self.lib.clone()]
    }

    /// Takes the closure out of this machine's store.
    pub fn forget(&self) {
        let mut words = vec!["--delete", self.app.as_str(), self.lib.as_str()];
        words.extend(self.drvs.iter().map(String::as_str).filter(|drv| fs_err::metadata(drv).is_ok()));
        ask("nix-store", &words);
    }

    /// Takes what was fetched out of this machine's store again, after [`Closure::forget`].
    pub fn forget_paths(&self) {
        ask("nix-store", &["--delete", self.app.as_str(), self.lib.as_str()]);
    }
}

impl Drop for Closure {
    fn drop(&mut self) {
        // Nix leaves the lock of a path that it refused.
        for path in self.paths() {
            drop(fs_err::remove_file(format!("{path}.lock")));
        }
        let there = |p: &&str| fs_err::metadata(p).is_ok();
        let all = [self.app.as_str(), self.lib.as_str()];
        let words: Vec<&str> =
            all.into_iter().chain(self.drvs.iter().map(String::as_str)).filter(there).collect();
        if !words.is_empty() && !std::thread::panicking() {
            ask("nix-store", &[&["--delete"], &words[..]].concat());
        }
    }
}

/// Input-addressed paths, each of which refers to all below it.
pub struct Chain {
    /// From the bottom up.
    pub paths: Vec<StorePath>,
    pub top: StorePath,
    drvs: Vec<String>,
}

impl Chain {
    pub fn build(length: usize) -> Chain {
        Chain::with_noise(length, 0)
    }

    /// With so many bytes of noise in each, which no compression makes less.
    pub fn with_noise(length: usize, noise: usize) -> Chain {
        let links: String = (0..length)
            .map(|n| {
                let below: String = (0..n).map(|n| format!("${{p{n}}} ")).collect();
                format!(
                    "p{n} = make \"link-{n}\" \"mkdir -p $out/bin; echo {n} {below} > $out/bin/deep; \
                     head -c {noise} /dev/urandom > $out/noise\";\n"
                )
            })
            .collect();
        let (drv, top) = built(|unique| format!("{}{links} in p{}\n", make(unique), length - 1));
        let paths = ask("nix-store", &["--query", "--requisites", top.as_str()]);
        let mut paths: Vec<StorePath> = paths.lines().map(|line| StorePath::parse(line).unwrap()).collect();
        paths.sort_by_key(|path| path.base()[33..].to_string());
        Chain { paths, top, drvs: derivations(&drv) }
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let paths = self.paths.iter().map(StorePath::as_str);
            let all: Vec<&str> = paths.chain(self.drvs.iter().map(String::as_str)).collect();
            ask("nix-store", &[&["--delete"], &all[..]].concat());
        }
    }
}

/// A path that refers to many small files, which are named after their content.
pub struct Many {
    pub top: StorePath,
    /// Those that the top refers to.
    pub paths: Vec<StorePath>,
    drv: String,
}

impl Many {
    /// So many paths, the top among them.
    pub fn build(count: usize) -> Many {
        let (drv, top) = built(|unique| {
            format!(
                "let file = n: builtins.toFile \"part-${{toString n}}\" \"{unique} ${{toString n}}\";\n\
                 in derivation {{ name = \"many\"; system = builtins.currentSystem; builder = \"/bin/sh\"; \
                 parts = builtins.genList file {}; args = [ \"-ec\" \"echo $parts > $out\" ]; }}\n",
                count - 1
            )
        });
        let parts = ask("nix-store", &["--query", "--references", top.as_str()]);
        let paths: Vec<StorePath> = parts.lines().map(|line| StorePath::parse(line).unwrap()).collect();
        assert_eq!(paths.len(), count - 1);
        Many { top, paths, drv }
    }

    /// Takes all of it out of this machine's store.
    pub fn forget(&self) {
        let all = [self.top.as_str(), &self.drv].into_iter().chain(self.paths.iter().map(StorePath::as_str));
        let there: Vec<&str> = all.filter(|path| fs_err::metadata(path).is_ok()).collect();
        if !there.is_empty() {
            ask("nix-store", &[&["--delete"], &there[..]].concat());
        }
    }
}

impl Drop for Many {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.forget();
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
