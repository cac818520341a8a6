//! A host's fetch against a cache that somebody else can write, with a real Nix: what he puts there is refused by name
//! and leaves nothing behind, and what is honest comes with few requests.

mod cache;
mod common;

use cache::{Closure, Many, ask, at_home, bucket, key};
use common::S3Server;
use omni_deploy::config::{Settings, load};
use omni_deploy::names::StorePath;
use omni_deploy::nix::{self, FetchError};
use omni_deploy::store::{Condition, Store};
use std::path::{Path, PathBuf};

/// A folder as cache, and the host that fetches from it.
struct Scene {
    dir: tempfile::TempDir,
    secret: PathBuf,
    public: String,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let (secret, public) = key(&dir, "test-1");
        Scene { secret, public, dir }
    }

    /// Fills the cache as `nix copy` does, signed.
    fn fill(&self, top: &StorePath) {
        let url = format!(
            "file://{}?compression=zstd&secret-key={}",
            self.cache().display(),
            self.secret.display()
        );
        ask("nix", &["copy", "--to", &url, top.as_str()]);
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn info(&self, path: &StorePath) -> PathBuf {
        self.cache().join(format!("{}.narinfo", path.hash()))
    }

    fn edit(&self, path: &StorePath, edit: impl FnOnce(String) -> String) {
        let info = self.info(path);
        fs_err::write(&info, edit(fs_err::read_to_string(&info).unwrap())).unwrap();
    }

    fn nar(&self, path: &StorePath) -> PathBuf {
        let text = fs_err::read_to_string(self.info(path)).unwrap();
        self.cache().join(text.lines().find_map(|l| l.strip_prefix("URL: ")).unwrap())
    }

    fn settings(&self, cache: &str) -> Settings {
        let flags = [("store", cache), ("host", "biz"), ("trustedPublicKeys", &self.public)];
        load(&flags.map(|(name, value)| (name, value.to_string())).into()).unwrap()
    }

    fn fetch(&self, top: &StorePath) -> Option<FetchError> {
        let settings = self.settings(&format!("file://{}", self.cache().display()));
        nix::fetch(&settings, std::slice::from_ref(top), &std::env::temp_dir()).unwrap().remove(top)
    }

    fn refused(&self, top: &StorePath, parts: &[&str]) {
        let Some(FetchError::Refused(why)) = self.fetch(top) else { panic!("{top} is not refused") };
        assert!(parts.iter().all(|part| why.contains(part)), "{why}");
        assert!(fs_err::symlink_metadata(top).is_err(), "{top} is in the store");
    }

    /// Puts the cache into a server's bucket; returns the settings of a host that reads it there.
    fn upload(&self, s3: &S3Server) -> Settings {
        let store = bucket(s3);
        for dir in [self.cache(), self.cache().join("nar")] {
            for entry in fs_err::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
                let key = entry.strip_prefix(self.cache()).unwrap().to_str().unwrap();
                store.put(key, &fs_err::read(&entry).unwrap(), &Condition::Always).unwrap();
            }
        }
        self.settings(&format!("{}&profile=host", s3.url("cache")))
    }
}

/// The files in this home's spool, without its lock and what it says of itself.
fn spooled() -> Vec<PathBuf> {
    let spool = Path::new(&std::env::var_os("XDG_CACHE_HOME").unwrap()).join("omni-deploy/fetch");
    let files = |dir: &Path| -> Vec<PathBuf> {
        fs_err::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()).collect()
    };
    let mut all = files(&spool);
    all.extend(files(&spool.join("nar")));
    all.retain(|path| !path.ends_with("lock") && !path.ends_with("nix-cache-info"));
    all
}

/// 64 MiB of zeros in 2 kB of zstd.
fn bomb() -> Vec<u8> {
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58];
    for n in 0..512u32 {
        let header = u32::from(n == 511) | 1 << 1 | (128 << 10) << 3;
        bomb.extend(&header.to_le_bytes()[..3]);
        bomb.push(0);
    }
    bomb
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_nar_that_is_not_the_one_that_was_signed_never_reaches_nix() {
    if !at_home("a_nar_that_is_not_the_one_that_was_signed_never_reaches_nix") {
        return;
    }
    let scene = Scene::new();
    let closure = Closure::build("struck", 100_000);
    scene.fill(&closure.app);
    closure.forget();
    let (lib, app) = (&closure.lib, &closure.app);
    let nar = scene.nar(lib);
    let good = fs_err::read(&nar).unwrap();
    for (what, object, says) in [
        ("a bomb", bomb(), "unpacks to more than"),
        ("another path's", fs_err::read(scene.nar(app)).unwrap(), "unpacks to"),
        ("half of it", good[..good.len() / 2].to_vec(), "does not unpack"),
    ] {
        fs_err::write(&nar, object).unwrap();
        scene.refused(app, &[lib.as_str(), says, "push --rewrite"]);
        assert!(fs_err::symlink_metadata(lib).is_err(), "{what} is in the store");
        assert!(spooled().iter().all(|file| !file.to_string_lossy().contains(lib.hash())), "{:?}", spooled());
    }
    // The signature does not cover how the NAR is packed: that is said, with the way out.
    fs_err::write(&nar, &good).unwrap();
    let info = fs_err::read_to_string(scene.info(lib)).unwrap();
    scene.edit(lib, |text| text.replace("Compression: zstd", "Compression: bzip2"));
    scene.refused(app, &[lib.as_str(), "something else than zstd or xz", "push --rewrite"]);
    fs_err::write(scene.info(lib), info).unwrap();
    assert_eq!(scene.fetch(app), None);
    assert_eq!(nix::missing(&closure.paths()).unwrap(), []);
    assert_eq!(spooled(), [] as [PathBuf; 0]);
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_no_signature_covers_does_not_reach_nix() {
    if !at_home("what_no_signature_covers_does_not_reach_nix") {
        return;
    }
    let scene = Scene::new();
    let closure = Closure::build("planted", 1000);
    scene.fill(&closure.app);
    let good = fs_err::read_to_string(scene.info(&closure.lib)).unwrap();
    let without = |name: &str| -> String {
        good.lines().filter(|line| !line.starts_with(name)).map(|line| format!("{line}\n")).collect()
    };
    for (name, line) in [
        ("CA", "CA: garbage"),
        ("CA", "CA: fixed:r:sha256:1f1layi40aar7sfj6mbwpp9r02pp8i0zzcv9nxb15zhkdag66bv4"),
        ("CA", "CA: fixed:r:sha1:0000000000000000000000000000000000000000"),
        ("Deriver", "Deriver: 0zix1dpqqm54fl3j4qz1j7yfb2y6fwj7-web?x.drv"),
        ("Nothing", "Sig: nocolon"),
    ] {
        closure.forget();
        fs_err::write(scene.info(&closure.lib), format!("{}{line}\n", without(name))).unwrap();
        assert_eq!(scene.fetch(&closure.app), None, "{line}");
        assert_eq!(nix::missing(&closure.paths()).unwrap(), [], "{line}");
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_a_plain_nix_copy_wrote_is_fetched() {
    if !at_home("what_a_plain_nix_copy_wrote_is_fetched") {
        return;
    }
    let scene = Scene::new();
    let closure = Closure::build("plain", 100_000);
    let url = format!("file://{}?secret-key={}", scene.cache().display(), scene.secret.display());
    ask("nix", &["copy", "--to", &url, closure.app.as_str()]);
    closure.forget();
    assert!(fs_err::read_to_string(scene.info(&closure.lib)).unwrap().contains("Compression: xz"));
    assert_eq!(scene.fetch(&closure.app), None);
    assert_eq!(nix::missing(&closure.paths()).unwrap(), []);
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_narinfo_leads_nowhere_but_into_the_cache() {
    if !at_home("a_narinfo_leads_nowhere_but_into_the_cache") {
        return;
    }
    let scene = Scene::new();
    let closure = Closure::build("led", 1000);
    scene.fill(&closure.app);
    closure.forget();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let good = fs_err::read_to_string(scene.info(&closure.lib)).unwrap();
    let there = format!("URL: http://{}/latest/meta-data?nar=", listener.local_addr().unwrap());
    for url in [there.as_str(), "URL: ../../../../etc/passwd?", "URL: file:///etc/passwd?"] {
        scene.edit(&closure.lib, |_| good.replace("URL: ", url));
        scene.refused(&closure.app, &[closure.lib.as_str(), "broken narinfo", "URL", "omni-deploy push"]);
    }
    let asked = listener.accept().map(|(_, from)| from).unwrap_err();
    assert_eq!(asked.kind(), std::io::ErrorKind::WouldBlock);
    // One that is larger than any narinfo is.
    scene.edit(&closure.lib, |_| format!("{good}Comment: {}\n", "x".repeat(2 << 20)));
    scene.refused(&closure.app, &[closure.lib.as_str(), "more than 1 MiB"]);
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn below_what_nobody_signed_nothing_is_asked_for() {
    if !at_home("below_what_nobody_signed_nothing_is_asked_for") {
        return;
    }
    let s3 = S3Server::start_below("cache");
    let scene = Scene::new();
    let closure = Closure::build("below", 1000);
    scene.fill(&closure.app);
    closure.forget();
    let other = "0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-other";
    scene.edit(&closure.lib, |text| text.replace("References: ", &format!("References: {other} ")));
    let settings = scene.upload(&s3);
    let before = s3.log().len();
    let reasons = nix::fetch(&settings, std::slice::from_ref(&closure.app), &std::env::temp_dir()).unwrap();
    let Some(FetchError::Refused(why)) = reasons.get(&closure.app) else { panic!("{reasons:?}") };
    assert!(why.contains(closure.lib.as_str()) && why.contains("no signature"), "{why}");
    // What it advises is done on the machine that has the path; the key of who wrote the bucket is not to be trusted.
    assert!(why.contains("push it again from a machine whose key is among"), "{why}");
    let asked = s3.log().split_off(before);
    assert_eq!(asked.len(), 2, "the two narinfos: {asked:?}");
    assert!(asked.iter().all(|line| line.contains(".narinfo")), "{asked:?}");
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn one_path_of_many_costs_two_requests_and_all_of_them_come_at_once() {
    if !at_home("one_path_of_many_costs_two_requests_and_all_of_them_come_at_once") {
        return;
    }
    let s3 = S3Server::start_below("cache");
    let scene = Scene::new();
    let many = Many::build(101);
    scene.fill(&many.top);
    let settings = scene.upload(&s3);
    let fetch = || {
        let before = s3.log().len();
        let reasons = nix::fetch(&settings, std::slice::from_ref(&many.top), &std::env::temp_dir()).unwrap();
        assert_eq!(reasons, Default::default());
        assert_eq!(nix::missing(&many.paths).unwrap(), []);
        assert_eq!(spooled(), [] as [PathBuf; 0]);
        s3.log().split_off(before)
    };
    ask("nix-store", &["--delete", many.top.as_str()]);
    let asked = fetch();
    assert_eq!(asked.len(), 2, "{asked:?}");
    many.forget();
    let asked = fetch();
    assert_eq!(asked.len(), 202, "a narinfo and a NAR for each: {asked:?}");
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_transfer_that_broke_off_goes_on_also_in_the_next_pass() {
    if !at_home("a_transfer_that_broke_off_goes_on_also_in_the_next_pass") {
        return;
    }
    let s3 = S3Server::start_below("cache");
    let scene = Scene::new();
    let closure = Closure::build("broken", 3_000_000);
    scene.fill(&closure.app);
    closure.forget();
    let settings = scene.upload(&s3);
    let fetch = || nix::fetch(&settings, std::slice::from_ref(&closure.app), &std::env::temp_dir()).unwrap();
    let parts = |log: &[String]| log.iter().filter(|l| l.contains("/nar/") && l.ends_with(" 206")).count();
    // The large one alone: which of two comes first is open.
    let nar = scene.nar(&closure.lib);
    let scope =
        format!(r#""methods": ["GET"], "key_prefix": "cache/nar/{}""#, nar.file_name().unwrap().display());
    // One break within a pass.
    s3.faults(&format!(r#"{{"cut": {{"bytes": 1000000, "count": 1, {scope}, "skip": 0}}}}"#));
    assert_eq!(fetch(), Default::default());
    assert!(parts(&s3.log()) >= 1, "{:?}", s3.log());
    closure.forget_paths();
    // A network that is gone after a megabyte.
    let seen = s3.log().len();
    s3.faults(&format!(
        r#"{{"cut": {{"bytes": 1000000, "count": 2, {scope}}},
            "fail": {{"status": 403, "code": "AccessDenied", {scope}, "skip": 2}}}}"#,
    ));
    let reasons = fetch();
    assert!(matches!(reasons.get(&closure.app), Some(FetchError::Unreachable(_))), "{reasons:?}");
    assert!(spooled().iter().any(|path| path.extension().is_some_and(|e| e == "part")), "{:?}", spooled());
    s3.faults("{}");
    let lost = s3.log().len();
    assert_eq!(fetch(), Default::default());
    assert!(parts(&s3.log()[lost..]) == 1, "{:?}", &s3.log()[seen..]);
    assert_eq!(spooled(), [] as [PathBuf; 0]);
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn one_closure_that_is_spoiled_keeps_no_other_from_coming() {
    if !at_home("one_closure_that_is_spoiled_keeps_no_other_from_coming") {
        return;
    }
    let scene = Scene::new();
    let closures: Vec<Closure> = ["one", "two", "three"].map(|n| Closure::build(n, 10_000)).into();
    closures.iter().for_each(|c| scene.fill(&c.app));
    closures.iter().for_each(Closure::forget);
    fs_err::write(scene.nar(&closures[1].lib), bomb()).unwrap();
    let tops: Vec<StorePath> = closures.iter().map(|c| c.app.clone()).collect();
    let settings = scene.settings(&format!("file://{}", scene.cache().display()));
    let reasons = nix::fetch(&settings, &tops, &std::env::temp_dir()).unwrap();
    assert_eq!(reasons.keys().collect::<Vec<_>>(), [&tops[1]], "{reasons:?}");
    assert_eq!(nix::missing(&[closures[0].paths(), closures[2].paths()].concat()).unwrap(), []);
}
