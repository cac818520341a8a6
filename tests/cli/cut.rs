//! The campaign of closures: a push and a fetch are cut off at every point they have, by a SIGKILL or by the power. A
//! stranger who looks then finds in the bucket what is whole or nothing, and the next run goes on as if nothing had been.
//!
//! The power is that of a disk of its own: a file with a file system, mounted in a mount namespace. What is in the file when
//! a process is killed is what had been flushed, and a copy of the file is the disk after the power came back.

mod cache;
mod common;

use cache::{Chain, NIX_CONFIG, ask, at_desk, key, whole_bucket};
use common::built::cargo;
use common::{S3Server, wait_until};
use omni_deploy::hash::Sha256;
use omni_deploy::names::StorePath;
use omni_deploy::nix::narinfo::NarInfo;
use omni_deploy::runner::{Output, ProcessStatus, Run};
use omni_deploy::store::dir::DirStore;
use omni_deploy::store::{Condition, GetResult, Store};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

/// The product with its points: examples/faults.rs, built once, unless `OMNI_TEST_FAULTS` names one.
static FAULTS: LazyLock<PathBuf> = LazyLock::new(|| {
    if let Some(named) = std::env::var_os("OMNI_TEST_FAULTS") {
        return named.into();
    }
    let build = cargo(&["build", "--quiet", "--locked", "--example", "faults", "--features", "faults"]);
    build.dir(env!("CARGO_MANIFEST_DIR")).success().unwrap_or_else(|e| panic!("the example is needed: {e}"));
    let tests = std::env::current_exe().unwrap();
    tests.ancestors().nth(2).unwrap().join("examples/faults")
});

const KILLED: ProcessStatus = ProcessStatus::Signal(9);

/// Runs a test again in a mount namespace of its own; true there.
fn in_namespace(test: &str) -> bool {
    if std::env::var_os("OMNI_TEST_INSIDE").is_some() {
        return true;
    }
    let run = Run::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--include-ignored"])
        .env("OMNI_TEST_INSIDE", "1")
        .env("OMNI_TEST_FAULTS", &*FAULTS)
        .env("NIX_CONFIG", NIX_CONFIG);
    let output = run.output().unwrap();
    print!("{}", output.text());
    assert!(output.status.ok() && output.text().contains("1 passed"), "{}", output.stderr);
    false
}

fn mount(words: &[&str]) {
    Run::new("mount").args(words).success().unwrap();
}

/// Waits for who was started by a process that is dead now.
fn unmount(at: &Path) {
    wait_until(Duration::from_secs(60), "nobody uses the mount", || {
        Run::new("umount").arg(at).output().unwrap().status.ok()
    });
}

fn shown(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The point in the middle of a copy by Nix.
const HALF: &str = "half a copy";

/// Of a list of points, each with how often it came before: `1 of before write /x`.
fn points(list: &Path) -> Vec<String> {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let text = fs_err::read_to_string(list).unwrap();
    let count = |line: &str| {
        let words = line.split_once(' ').unwrap().1.to_string();
        let nth = seen.entry(words.clone()).and_modify(|n| *n += 1).or_insert(1);
        format!("{nth} of {words}")
    };
    text.lines().map(count).chain([HALF.to_string()]).collect()
}

/// A Nix that is cut off in the middle of a copy, together with who called it: the last path has not come.
fn half_a_copy(dir: &Path) -> String {
    let bin = dir.join("bin");
    fs_err::create_dir_all(&bin).unwrap();
    let real = Run::new("sh").args(["-c", "command -v nix"]).success().unwrap().text();
    let script = format!(
        "#!/bin/bash\ncase \" $* \" in *\" copy \"*) {0} \"${{@:1:$#-1}}\"; kill -KILL $PPID ;; *) exec {0} \"$@\" ;; esac\n",
        real.trim()
    );
    fs_err::write(bin.join("nix"), script).unwrap();
    Run::new("chmod").args(["+x", shown(&bin.join("nix"))]).success().unwrap();
    format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())
}

/// What ends a run at a point.
fn ending<'a>(point: &'a str, half: &'a str) -> [(&'a str, &'a str); 1] {
    if point == HALF { [("PATH", half)] } else { [("OMNI_DEPLOY_KILL_AT", point)] }
}

/// Waits until nobody uses a spool any more: a Nix outlives who was killed for a moment, and keeps it.
fn free(cache: &Path) {
    let each = "for lock in \"$1\"/*/lock; do flock --timeout 60 \"$lock\" true || exit 1; done";
    Run::new("sh").args(["-c", each, "-", shown(&cache.join("omni-deploy"))]).output().unwrap();
}

/// What lies in the spools below a folder, without what they say of themselves.
fn spooled(cache: &Path) -> Vec<String> {
    let find = "find \"$1\" -mindepth 2 -type f ! -name lock ! -name nix-cache-info";
    let found = Run::new("sh").args(["-c", find, "-", shown(&cache.join("omni-deploy"))]).success().unwrap();
    found.text().lines().map(String::from).collect()
}

/// What is wrong in a bucket for somebody who only reads it.
fn unsound(store: &dyn Store) -> String {
    let mut wrong = String::new();
    let keys = store.list("").unwrap();
    let get = |key: &str| match store.get(key, None, 64 << 20).unwrap() {
        GetResult::Found { bytes, .. } => Some(bytes),
        _ => None,
    };
    for key in keys.iter().filter(|key| key.ends_with(".narinfo")) {
        let info = match NarInfo::parse(&get(key).unwrap()) {
            Ok(info) => info,
            Err(why) => {
                writeln!(wrong, "{key} {why}").unwrap();
                continue;
            }
        };
        match get(&info.url) {
            None => writeln!(wrong, "{key} names {}, which is not there", info.url).unwrap(),
            Some(nar) => {
                if Some(Sha256::of(&nar)) != info.file_hash || Some(nar.len() as u64) != info.file_size {
                    writeln!(wrong, "{} is not what {key} says", info.url).unwrap();
                }
            }
        }
        for reference in info.references.iter().map(NarInfo::key).filter(|r| !keys.contains(r)) {
            writeln!(wrong, "{key} refers to {reference}, which is not there").unwrap();
        }
    }
    let manifest: serde_json::Value = match serde_json::from_slice(&get("manifest.json").unwrap()) {
        Ok(manifest) => manifest,
        Err(e) => return wrong + &format!("manifest.json {e}\n"),
    };
    let path = StorePath::parse(manifest["services"][0]["artifact"]["storePath"].as_str().unwrap());
    if let Ok(path) = path
        && path.base() != "placeholder"
        && !keys.contains(&NarInfo::key(&path))
    {
        writeln!(wrong, "the manifest names {path}, which is not there").unwrap();
    }
    wrong
}

/// A developer's machine whose home, and bucket if it is a folder, are below one folder.
struct Desk {
    dir: PathBuf,
    url: String,
    secret: PathBuf,
    top: StorePath,
}

impl Desk {
    fn run(&self, words: &[&str], env: &[(&str, &str)]) -> Output {
        let mut run = at_desk(FAULTS.to_str().unwrap(), &self.dir, &self.url)
            .args(words)
            .env("OMNI_DEPLOY_SECRET_KEY_FILE", &self.secret);
        for (name, value) in env {
            run = run.env(name, value);
        }
        run.output().unwrap()
    }

    fn ok(&self, words: &[&str]) {
        let output = self.run(words, &[]);
        assert!(output.status.ok(), "{words:?}: {}", output.stderr);
    }

    /// An empty home, and a manifest with a service that waits for its first push.
    fn begin(&self) {
        fs_err::create_dir_all(self.dir.join("home")).unwrap();
        self.ok(&["manifest", "init"]);
        let service =
            r#"{"name": "deep", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]}"#;
        self.ok(&["manifest", "add-service", service]);
    }

    fn push(&self, env: &[(&str, &str)]) -> Output {
        self.run(&["push", "--service", "deep", self.top.as_str()], env)
    }

    /// What is wrong after a run that was cut off, and after one more.
    fn afterwards(&self, store: &dyn Store) -> String {
        let cut = unsound(store);
        free(&self.dir.join("home/.cache"));
        let next = self.push(&[]);
        let mut wrong = if cut.is_empty() { cut } else { format!("cut off:\n{cut}") };
        if !next.status.ok() {
            return wrong + &format!("the next one failed: {}", next.stderr);
        }
        wrong += &unsound(store);
        let top = NarInfo::key(&self.top);
        let manifest = store.get_start("manifest.json", 64 << 10).unwrap().unwrap_or_default();
        if !store.list("").unwrap().contains(&top)
            || !String::from_utf8_lossy(&manifest).contains(self.top.as_str())
        {
            writeln!(wrong, "the next one did not bring it: {}", next.stderr).unwrap();
        }
        let left = spooled(&self.dir.join("home/.cache"));
        if !left.is_empty() {
            writeln!(wrong, "left in the spool: {left:?}").unwrap();
        }
        wrong
    }
}

/// Runs something cut off at each of its points; what is wrong is told at the end, all of it.
fn campaign(what: &str, points: Vec<String>, cut_off: impl Fn(&str) -> String) {
    let mut wrong = String::new();
    assert!(points.len() > 10, "{what}: only {points:?}");
    for point in &points {
        let found = cut_off(point);
        if !found.is_empty() {
            writeln!(wrong, "{what}, cut off at {point}:\n{found}").unwrap();
        }
    }
    println!("{what}: {} points", points.len());
    assert_eq!(wrong, "", "{what}");
}

/// Temporary files of ours that nobody will ever take away.
fn halves(dir: &Path) -> String {
    let find = "find \"$1\" -name '.omni-deploy-*' -printf 'left over: %p\\n'";
    Run::new("sh").args(["-c", find, "-", shown(dir)]).success().unwrap().text()
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_push_killed_at_any_point_leaves_a_bucket_that_is_sound_and_is_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, _) = key(&dir, "test-1");
    let chain = Chain::with_noise(3, 100_000);
    let half = half_a_copy(dir.path());
    let list = dir.path().join("list");
    let listed = [("OMNI_DEPLOY_EFFECTS", shown(&list))];

    // A folder: copied anew for each point.
    let at = dir.path().join("desk");
    let url = format!("file://{}", at.join("bucket").display());
    let desk = Desk { dir: at.clone(), url, secret: secret.clone(), top: chain.top.clone() };
    desk.begin();
    let kept = dir.path().join("kept");
    let copy = |from: &Path, to: &Path| {
        Run::new("cp").args(["-a", shown(from), shown(to)]).success().unwrap();
    };
    copy(&at, &kept);
    let anew = || {
        fs_err::remove_dir_all(&at).unwrap();
        copy(&kept, &at);
    };
    let undisturbed = desk.push(&listed);
    assert!(undisturbed.status.ok(), "{}", undisturbed.stderr);
    campaign("push to a folder", points(&list), |point| {
        anew();
        let killed = desk.push(&ending(point, &half));
        assert_eq!(killed.status, KILLED, "{point}: {}", killed.stderr);
        desk.afterwards(&DirStore::new(&at.join("bucket"))) + &halves(&at)
    });

    // A bucket of S3: what it had is put back.
    let s3 = S3Server::start();
    let store = whole_bucket(&s3);
    fs_err::remove_dir_all(&at).unwrap();
    let desk = Desk { url: s3.url(""), ..desk };
    desk.begin();
    fs_err::remove_dir_all(&kept).unwrap();
    copy(&at, &kept);
    let had: Vec<(String, Vec<u8>)> = (store.list("").unwrap().into_iter())
        .map(|key| (key.clone(), store.get_start(&key, 1 << 20).unwrap().unwrap()))
        .collect();
    let anew = || {
        fs_err::remove_dir_all(&at).unwrap();
        copy(&kept, &at);
        store.list("").unwrap().iter().for_each(|key| store.delete(key).unwrap());
        had.iter().for_each(|(key, bytes)| drop(store.put(key, bytes, &Condition::Always).unwrap()));
    };
    fs_err::remove_file(&list).unwrap();
    let undisturbed = desk.push(&listed);
    assert!(undisturbed.status.ok(), "{}", undisturbed.stderr);
    campaign("push to S3", points(&list), |point| {
        anew();
        let killed = desk.push(&ending(point, &half));
        assert_eq!(killed.status, KILLED, "{point}: {}", killed.stderr);
        desk.afterwards(&store) + &halves(&at)
    });
}

/// A disk of its own, which can lose its power. Only in a mount namespace.
struct Disk {
    image: PathBuf,
    template: PathBuf,
    at: PathBuf,
}

impl Disk {
    /// An empty disk; `fill` puts onto it what is there at the start.
    fn make(dir: &Path, fill: impl FnOnce(&Path)) -> Disk {
        let disk = Disk { image: dir.join("disk"), template: dir.join("template"), at: dir.join("mnt") };
        fs_err::create_dir(&disk.at).unwrap();
        fs_err::File::create(&disk.template).unwrap().set_len(96 << 20).unwrap();
        Run::new("mkfs.ext4").args(["-q", "-F", shown(&disk.template)]).success().unwrap();
        mount(&["-o", "loop", shown(&disk.template), shown(&disk.at)]);
        fill(&disk.at);
        disk.unmount();
        disk
    }

    /// Begins as it was at the start. Nothing is written to it but what somebody flushes.
    fn start(&self) {
        self.copy(&self.template, &self.image);
        mount(&["-o", "loop,noatime,noauto_da_alloc,commit=900", shown(&self.image), shown(&self.at)]);
    }

    /// Everything that was not flushed is gone.
    fn lose_power(&self) {
        let after = self.image.with_extension("after");
        self.copy(&self.image, &after);
        self.unmount();
        fs_err::rename(&after, &self.image).unwrap();
        mount(&["-o", "loop", shown(&self.image), shown(&self.at)]);
    }

    fn unmount(&self) {
        unmount(&self.at);
    }

    fn copy(&self, from: &Path, to: &Path) {
        Run::new("cp").args(["--sparse=always", shown(from), shown(to)]).success().unwrap();
    }
}

#[test]
#[ignore = "needs Nix and its store, and a loop device: cargo test -- --ignored"]
fn a_push_whose_power_goes_at_any_point_leaves_a_bucket_that_is_sound_and_is_made_up_for() {
    if !in_namespace("a_push_whose_power_goes_at_any_point_leaves_a_bucket_that_is_sound_and_is_made_up_for")
    {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (secret, _) = key(&dir, "test-1");
    let chain = Chain::with_noise(3, 100_000);
    let at = dir.path().join("mnt/desk");
    let url = format!("file://{}", at.join("bucket").display());
    let desk = Desk { dir: at.clone(), url, secret, top: chain.top.clone() };
    let disk = Disk::make(dir.path(), |_| desk.begin());
    let half = half_a_copy(dir.path());
    let list = dir.path().join("list");
    disk.start();
    let undisturbed = desk.push(&[("OMNI_DEPLOY_EFFECTS", shown(&list))]);
    assert!(undisturbed.status.ok(), "{}", undisturbed.stderr);
    // What it said to be published is, whatever happens next.
    disk.lose_power();
    let store = DirStore::new(&at.join("bucket"));
    assert_eq!(unsound(&store), "");
    assert!(store.list("").unwrap().contains(&NarInfo::key(&chain.top)));
    disk.unmount();
    campaign("push, power", points(&list), |point| {
        disk.start();
        let killed = desk.push(&ending(point, &half));
        assert_eq!(killed.status, KILLED, "{point}: {}", killed.stderr);
        disk.lose_power();
        let wrong = desk.afterwards(&store) + &halves(&at);
        disk.unmount();
        wrong
    });
}

/// A host whose store and spool are below one folder, and the cache it fetches from.
struct Host {
    dir: PathBuf,
    cache: PathBuf,
    public: String,
    paths: Vec<StorePath>,
    top: StorePath,
}

impl Host {
    fn run(&self, program: &str, words: &[&str], env: &[(&str, &str)]) -> Output {
        let mut run = Run::new(program)
            .args(words)
            .env("HOME", &self.dir)
            .env("XDG_CACHE_HOME", self.dir.join("cache"))
            // What a host has in /run, and not on its disk.
            .env("TMPDIR", self.cache.parent().unwrap())
            .env("OMNI_DEPLOY_STORE", format!("file://{}", self.cache.display()))
            .env("OMNI_DEPLOY_TRUSTED_PUBLIC_KEYS", &self.public);
        for (name, value) in env {
            run = run.env(name, value);
        }
        run.output().unwrap()
    }

    /// Makes the folder what a new host has, once.
    fn begin(&self) {
        fs_err::create_dir_all(self.dir.join("nix")).unwrap();
        self.enter();
        ask("nix-store", &["--init"]);
        self.leave();
    }

    /// Its store is the one in the namespace.
    fn enter(&self) {
        mount(&["--bind", shown(&self.dir.join("nix")), "/nix"]);
    }

    fn leave(&self) {
        unmount(Path::new("/nix"));
    }

    fn fetch(&self, env: &[(&str, &str)]) -> Output {
        self.run(FAULTS.to_str().unwrap(), &["fetch", self.top.as_str()], env)
    }

    /// What Nix says is valid and is not whole, or lacks what it refers to.
    fn unsound(&self, all: bool) -> String {
        let mut wrong = String::new();
        for path in &self.paths {
            if !self.run("nix-store", &["--check-validity", path.as_str()], &[]).status.ok() {
                if all {
                    writeln!(wrong, "{path} is not there").unwrap();
                }
                continue;
            }
            let verified = self.run("nix-store", &["--verify-path", path.as_str()], &[]);
            if !verified.status.ok() {
                writeln!(wrong, "{path} is valid, and is not whole: {}", verified.stderr).unwrap();
            }
            let references = self.run("nix-store", &["--query", "--references", path.as_str()], &[]).text();
            for reference in references.lines() {
                if !self.run("nix-store", &["--check-validity", reference], &[]).status.ok() {
                    writeln!(wrong, "{path} is valid, and {reference} is not").unwrap();
                }
            }
        }
        wrong
    }

    /// What is wrong after one more fetch.
    fn afterwards(&self) -> String {
        let next = self.fetch(&[]);
        let mut wrong = self.unsound(true);
        if !next.status.ok() {
            writeln!(wrong, "the next one failed: {}", next.stderr).unwrap();
        }
        let left = spooled(&self.dir.join("cache"));
        if !left.is_empty() {
            writeln!(wrong, "left in the spool: {left:?}").unwrap();
        }
        wrong
    }
}

/// A cache with a closure of three paths, and a host that has nothing of it.
fn host(dir: &tempfile::TempDir, at: &str) -> (Host, Chain) {
    let (secret, public) = key(dir, "test-1");
    let chain = Chain::with_noise(3, 100_000);
    let cache = dir.path().join("bucket");
    let url = format!("file://{}?compression=zstd&secret-key={}", cache.display(), secret.display());
    ask("nix", &["copy", "--to", &url, chain.top.as_str()]);
    let (paths, top) = (chain.paths.clone(), chain.top.clone());
    (Host { dir: dir.path().join(at), cache, public, paths, top }, chain)
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_fetch_killed_at_any_point_leaves_nothing_valid_that_is_not_whole_and_is_taken_up() {
    if !in_namespace("a_fetch_killed_at_any_point_leaves_nothing_valid_that_is_not_whole_and_is_taken_up") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (host, _chain) = host(&dir, "host");
    host.begin();
    let kept = dir.path().join("kept");
    fs_err::rename(&host.dir, &kept).unwrap();
    let start = || {
        Run::new("cp").args(["-a", shown(&kept), shown(&host.dir)]).success().unwrap();
        host.enter();
    };
    let end = || {
        host.leave();
        fs_err::remove_dir_all(&host.dir).unwrap();
    };
    let list = dir.path().join("list");
    start();
    let undisturbed = host.fetch(&[("OMNI_DEPLOY_EFFECTS", shown(&list))]);
    assert!(undisturbed.status.ok(), "{}", undisturbed.stderr);
    assert_eq!(host.unsound(true), "");
    end();
    let half = half_a_copy(dir.path());
    campaign("fetch", points(&list), |point| {
        start();
        let killed = host.fetch(&ending(point, &half));
        assert_eq!(killed.status, KILLED, "{point}: {}", killed.stderr);
        let wrong = host.unsound(false) + &host.afterwards();
        end();
        wrong
    });
}

#[test]
#[ignore = "needs Nix and its store, and a loop device: cargo test -- --ignored"]
fn a_fetch_whose_power_goes_at_any_point_is_made_up_for_before_anything_is_believed() {
    if !in_namespace("a_fetch_whose_power_goes_at_any_point_is_made_up_for_before_anything_is_believed") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (host, _chain) = host(&dir, "mnt/host");
    let disk = Disk::make(dir.path(), |_| host.begin());
    let list = dir.path().join("list");
    disk.start();
    host.enter();
    let undisturbed = host.fetch(&[("OMNI_DEPLOY_EFFECTS", shown(&list))]);
    assert!(undisturbed.status.ok(), "{}", undisturbed.stderr);
    host.leave();
    // What it said to be there is, without anybody's help.
    disk.lose_power();
    host.enter();
    assert_eq!(host.unsound(true), "");
    host.leave();
    disk.unmount();
    let half = half_a_copy(dir.path());
    campaign("fetch, power", points(&list), |point| {
        disk.start();
        host.enter();
        let killed = host.fetch(&ending(point, &half));
        assert_eq!(killed.status, KILLED, "{point}: {}", killed.stderr);
        host.leave();
        disk.lose_power();
        host.enter();
        // Nix itself may believe in what is damaged; whoever asks after a fetch does not find it.
        let wrong = host.afterwards();
        host.leave();
        disk.unmount();
        wrong
    });
}
