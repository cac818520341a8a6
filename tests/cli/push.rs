//! Push through the built binary: over a real S3 protocol and a directory, with a real Nix.

mod cache;
mod common;

use cache::{Chain, Closure, Many, ask, at_desk, at_home, bucket, key, whole_bucket};
use common::S3Server;
use omni_deploy::clock::Timestamp;
use omni_deploy::config::{Flags, Settings, load};
use omni_deploy::deployer::state::{FailureRecord, ServicePhase, ServiceState, State};
use omni_deploy::hash::Sha256;
use omni_deploy::keys::PublicKey;
use omni_deploy::names::{HostName, ServiceName, StorePath};
use omni_deploy::nix::narinfo::NarInfo;
use omni_deploy::nix::{self, FetchError, Published, Scope};
use omni_deploy::push::wait;
use omni_deploy::runner::{Output, Run, RunError};
use omni_deploy::store::s3::S3Store;
use omni_deploy::store::{Condition, Store};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A developer's machine: a folder with a repository's files, a home, a `bild`, and where the bucket is.
struct Desk {
    dir: tempfile::TempDir,
    store: String,
}

impl Desk {
    fn new(store: &str) -> Desk {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["home", "bin", "Biz/App"] {
            fs_err::create_dir_all(dir.path().join(folder)).unwrap();
        }
        Desk { store: store.to_string(), dir }
    }

    fn in_directory() -> Desk {
        let mut desk = Desk::new("");
        desk.store = format!("file://{}", desk.path("store").display());
        desk
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    fn command(&self, words: &[&str]) -> Run {
        at_desk(env!("CARGO_BIN_EXE_omni-deploy"), self.dir.path(), &self.store)
            .args(words)
            .env("OMNI_DEPLOY_BUILD", format!("sh {}", self.path("bin/bild").display()))
            .env("OMNI_DEPLOY_SSH", format!("sh {}", self.path("bin/enter").display()))
    }

    /// Runs it and kills it once `enough`.
    fn killed(&self, words: &[&str], enough: impl FnMut() -> bool) {
        let flag = Arc::new(AtomicBool::new(false));
        let run = self.command(words).stop(&flag);
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| run.output());
            common::wait_until(std::time::Duration::from_secs(60), "what it is killed after", enough);
            flag.store(true, Ordering::SeqCst);
            let ended = ended.join().unwrap();
            assert!(matches!(ended, Err(RunError::Stopped { .. })), "{ended:?}");
        });
    }

    fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.ok(), "{words:?}: {}", output.stderr);
        output.text()
    }

    fn script(&self, name: &str, text: &str) {
        fs_err::write(self.path("bin").join(name), text).unwrap();
    }

    /// A manifest with services on `biz` that wait for their first push.
    fn begins_with(&self, services: &[&str]) {
        self.ok(&["manifest", "init"]);
        for name in services {
            let json = format!(
                r#"{{"name": "{name}", "artifact": {{"storePath": "/nix/store/placeholder"}}, "hosts": ["biz"]}}"#
            );
            self.ok(&["manifest", "add-service", &json]);
        }
    }

    fn manifest(&self) -> serde_json::Value {
        serde_json::from_str(&self.ok(&["manifest", "show"])).unwrap()
    }

    /// `omni-deploy`'s settings of this desk, for calls of the library.
    fn settings(&self, more: &[(&'static str, &str)]) -> Settings {
        self.settings_as("default", more)
    }

    /// The same for the host `biz`, with its own key.
    fn hosts_settings(&self, more: &[(&'static str, &str)]) -> Settings {
        self.settings_as("host", more)
    }

    fn settings_as(&self, profile: &str, more: &[(&'static str, &str)]) -> Settings {
        let store = match self.store.starts_with("s3:") {
            true => format!("{}&profile={profile}", self.store),
            false => self.store.clone(),
        };
        let mut flags = Flags::from([("store", store), ("host", "laptop".to_string())]);
        flags.extend(more.iter().map(|(name, value)| (*name, value.to_string())));
        load(&flags).unwrap()
    }
}

fn push_and_push_again(desk: &Desk, writes: &dyn Fn() -> usize) {
    desk.begins_with(&["ava"]);
    let closure = Closure::build("ava", 1_000_000);
    fs_err::write(desk.path("Biz/App/Web.py"), "# : out ava\n").unwrap();
    desk.script("bild", &format!("echo \"building $1\"; echo STORE_PATH={}", closure.app));
    assert_eq!(desk.ok(&["push", "Biz/App/Web.py"]), format!("ava {} serial 3\n", closure.app));
    let manifest = desk.manifest();
    assert_eq!(manifest["services"][0]["artifact"]["storePath"], closure.app.as_str());
    assert_eq!(manifest["services"][0]["revision"], serde_json::Value::Null);
    let before = writes();
    let again = desk.run(&["push", "Biz/App/Web.py"]);
    assert_eq!(again.text(), format!("ava {} serial 3\n", closure.app));
    assert!(
        again.stderr.contains("closure of 2 paths") && again.stderr.contains("already"),
        "{}",
        again.stderr
    );
    assert_eq!(writes(), before, "a second push writes nothing");
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_push_to_s3_arrives_once() {
    let s3 = S3Server::start_below("team");
    let desk = Desk::new(&s3.url("team"));
    push_and_push_again(&desk, &|| s3.log().iter().filter(|l| l.starts_with("PUT")).count());
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_push_to_a_directory_arrives_once() {
    let desk = Desk::in_directory();
    let files = |dir: &Path| ask("find", &[dir.to_str().unwrap(), "-type", "f"]).lines().count();
    push_and_push_again(&desk, &|| files(&desk.path("store")));
}

fn publish(settings: &Settings, tops: &[StorePath]) -> Published {
    nix::publish(settings, tops, Scope::Missing, None, &mut |_| {}).unwrap()
}

fn round_trip(desk: &Desk) {
    let (secret, public) = key(&desk.dir, "test-1");
    let closure = Closure::build("trip", 500_000);
    let signing = desk.settings(&[("secretKeyFile", secret.to_str().unwrap())]);
    let tops = [closure.app.clone()];
    let first = publish(&signing, &tops);
    assert_eq!((first.paths, first.written), (2, Some(2)));
    assert_eq!(publish(&signing, &tops), Published { written: Some(0), ..first });
    closure.forget();
    assert_eq!(nix::missing(&closure.paths()).unwrap().len(), 2);
    let host = desk.hosts_settings(&[("trustedPublicKeys", &public)]);
    assert_eq!(nix::fetch(&host, &tops, &std::env::temp_dir()).unwrap(), Default::default());
    assert_eq!(nix::missing(&closure.paths()).unwrap(), []);
    assert_eq!(nix::closure(&tops).unwrap().len(), 2);
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_was_pushed_to_s3_can_be_fetched() {
    if at_home("what_was_pushed_to_s3_can_be_fetched") {
        let s3 = S3Server::start();
        round_trip(&Desk::new(&s3.url("")));
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_was_pushed_to_a_directory_can_be_fetched() {
    if at_home("what_was_pushed_to_a_directory_can_be_fetched") {
        round_trip(&Desk::in_directory());
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn the_reasons_why_a_closure_cannot_be_had_are_told_apart() {
    if !at_home("the_reasons_why_a_closure_cannot_be_had_are_told_apart") {
        return;
    }
    let s3 = S3Server::start_below("cache");
    let desk = Desk::new(&s3.url("cache"));
    let store = bucket(&s3);
    let (secret, public) = key(&desk.dir, "test-1");
    let (_, foreign) = key(&desk.dir, "foreign-1");
    let signing = desk.settings(&[("secretKeyFile", secret.to_str().unwrap())]);
    let host = desk.hosts_settings(&[("trustedPublicKeys", &public)]);
    let names = ["good", "absent", "holed", "zeroed", "swapped", "forged"];
    let closures: Vec<Closure> = names.map(|n| Closure::build(n, 100_000)).into();
    let [good, absent, holed, zeroed, swapped, forged] = &closures[..] else { panic!("six closures") };
    let pushed = [good, holed, zeroed, swapped, forged];
    let tops: Vec<StorePath> = pushed.map(|c| c.app.clone()).into();
    publish(&signing, &tops);
    closures.iter().for_each(Closure::forget);
    let info = |path: &StorePath| {
        let bytes = store.get_start(&format!("{}.narinfo", path.hash()), 4096).unwrap().unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let nar =
        |path: &StorePath| info(path).lines().find_map(|l| l.strip_prefix("URL: ")).unwrap().to_string();
    let put =
        |key: &str, bytes: &[u8]| store.put(key, bytes, &omni_deploy::store::Condition::Always).unwrap();
    // A hole below the top; the right size with no content; a good NAR of another path, which has the same size;
    // a narinfo that says what nobody signed.
    store.delete(&nar(&holed.lib)).unwrap();
    let size = store.size(&nar(&zeroed.lib)).unwrap().unwrap();
    put(&nar(&zeroed.lib), &vec![0; size as usize]);
    let other = store.get_start(&nar(&good.lib), 1 << 20).unwrap().unwrap();
    assert_eq!(store.size(&nar(&swapped.lib)).unwrap(), Some(other.len() as u64));
    put(&nar(&swapped.lib), &other);
    let lie = info(&forged.lib).replace("NarSize: ", "NarSize: 1");
    put(&format!("{}.narinfo", forged.lib.hash()), lie.as_bytes());

    let all: Vec<StorePath> = closures.iter().map(|c| c.app.clone()).collect();
    let reasons = nix::fetch(&host, &all, &std::env::temp_dir()).unwrap();
    assert_eq!(nix::missing(&good.paths()).unwrap(), [], "what is whole arrives: {reasons:?}");
    assert!(!reasons.contains_key(&good.app));
    let text = |c: &Closure| reasons[&c.app].to_string();
    assert!(matches!(reasons[&absent.app], FetchError::NotInCache(_)), "{}", text(absent));
    assert!(text(absent).contains(absent.app.as_str()) && text(absent).contains("omni-deploy push"));
    assert!(matches!(reasons[&holed.app], FetchError::NotInCache(_)), "{}", text(holed));
    assert!(text(holed).contains(holed.lib.as_str()), "{}", text(holed));
    for altered in [zeroed, swapped, forged] {
        assert!(matches!(reasons[&altered.app], FetchError::Refused(_)), "{}", text(altered));
        assert!(nix::missing(&altered.paths()).unwrap().contains(&altered.app));
    }

    good.forget();
    let stranger = desk.hosts_settings(&[("trustedPublicKeys", &foreign)]);
    let refused = nix::fetch(&stranger, std::slice::from_ref(&good.app), &std::env::temp_dir()).unwrap();
    assert!(matches!(refused[&good.app], FetchError::Refused(_)), "{refused:?}");
    assert_eq!(nix::missing(std::slice::from_ref(&good.app)).unwrap().len(), 1);

    let gone = format!("s3://box/cache?endpoint={}&scheme=http", s3.address);
    drop(s3);
    let lost = nix::fetch(
        &desk.hosts_settings(&[("cache", &gone)]),
        std::slice::from_ref(&good.app),
        &std::env::temp_dir(),
    )
    .unwrap();
    assert!(matches!(lost[&good.app], FetchError::Unreachable(_)), "{lost:?}");
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_hole_in_the_cache_is_named_and_the_next_push_fills_it() {
    let desk = Desk::in_directory();
    desk.begins_with(&["holed"]);
    let closure = Closure::build("holed", 100_000);
    let push = || {
        let output = desk.run(&["push", "--service", "holed", closure.app.as_str()]);
        assert!(output.status.ok(), "{}", output.stderr);
        output.stderr
    };
    push();
    let nars = || -> Vec<_> {
        fs_err::read_dir(desk.path("store/nar")).unwrap().map(|e| e.unwrap().path()).collect()
    };
    assert_eq!(nars().len(), 2);
    let info = desk.path("store").join(NarInfo::key(&closure.lib));
    let good = fs_err::read(&info).unwrap();
    for (what, part) in [
        ("has lost its file", "nar"),
        ("bytes instead of", "cut"),
        ("1 path of it written", "info"),
        ("broken narinfo", "text"),
    ] {
        let largest = nars().into_iter().max_by_key(|p| fs_err::metadata(p).unwrap().len()).unwrap();
        match part {
            "nar" => fs_err::remove_file(&largest).unwrap(),
            "cut" => fs_err::write(&largest, "short").unwrap(),
            "info" => fs_err::remove_file(&info).unwrap(),
            _ => fs_err::write(&info, &good[..good.len() / 3]).unwrap(),
        }
        let said = push();
        assert!(said.contains(what), "{part}: {said}");
        assert!(part == "info" || said.contains(closure.lib.as_str()), "{part}: {said}");
        assert_eq!(fs_err::read(&info).unwrap(), good, "{part}");
        assert!(push().contains("already"), "{part}");
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_was_cached_without_a_signature_gets_one() {
    if !at_home("what_was_cached_without_a_signature_gets_one") {
        return;
    }
    let desk = Desk::in_directory();
    let closure = Closure::build("unsigned", 1000);
    let tops = [closure.app.clone()];
    publish(&desk.settings(&[]), &tops);
    let (secret, public) = key(&desk.dir, "late-1");
    let signing = desk.settings(&[("secretKeyFile", secret.to_str().unwrap())]);
    assert_eq!(publish(&signing, &tops).written, Some(2));
    assert_eq!(publish(&signing, &tops).written, Some(0));
    closure.forget();
    assert_eq!(
        nix::fetch(&desk.hosts_settings(&[("trustedPublicKeys", &public)]), &tops, &std::env::temp_dir())
            .unwrap(),
        Default::default()
    );
}

/// A team on a bucket below `cache/`: developers who sign and believe each other's keys, and somebody else who may
/// write whatever they like to the bucket, but has no key.
struct Team {
    s3: S3Server,
    desks: Vec<Desk>,
    trusted: String,
    keys: Vec<PublicKey>,
}

impl Team {
    /// With a service `web`.
    fn new() -> Team {
        let s3 = S3Server::start_below("cache");
        let desks: Vec<Desk> = ["ann", "bob"].iter().map(|_| Desk::new(&s3.url("cache"))).collect();
        let pairs: Vec<_> =
            desks.iter().zip(["ann-1", "bob-1"]).map(|(desk, name)| key(&desk.dir, name)).collect();
        let publics: Vec<&str> = pairs.iter().map(|(_, public)| public.as_str()).collect();
        for (desk, (secret, _)) in desks.iter().zip(&pairs) {
            fs_err::create_dir_all(desk.path("home/.config/omni-deploy")).unwrap();
            let config = serde_json::json!({"secretKeyFile": secret, "trustedPublicKeys": publics});
            fs_err::write(desk.path("home/.config/omni-deploy/config.json"), config.to_string()).unwrap();
        }
        desks[0].begins_with(&["web"]);
        let keys = publics.iter().map(|public| PublicKey::parse(public).unwrap()).collect();
        Team { s3, trusted: publics.join(" "), desks, keys }
    }

    fn push(&self, who: usize, more: &[&str], path: &StorePath) -> String {
        let output = self.desks[who].run(&[&["push"], more, &["--service", "web", path.as_str()]].concat());
        assert!(output.status.ok(), "{}", output.stderr);
        output.stderr
    }

    fn bucket(&self) -> S3Store {
        bucket(&self.s3)
    }

    fn put(&self, key: &str, bytes: &[u8]) {
        self.bucket().put(key, bytes, &Condition::Always).unwrap();
    }

    fn info(&self, path: &StorePath) -> NarInfo {
        let text = self.bucket().get_start(&NarInfo::key(path), 1 << 20).unwrap().unwrap();
        NarInfo::parse(&text).unwrap()
    }

    /// Puts another content under a path's name, with a narinfo that nobody has signed. The narinfo.
    fn forge(&self, path: &StorePath, references: &[&StorePath]) -> NarInfo {
        let dir = tempfile::tempdir().unwrap();
        fs_err::create_dir_all(dir.path().join("bin")).unwrap();
        fs_err::write(dir.path().join("bin/web"), "#!/bin/sh\nid\n").unwrap();
        let dumped = Run::new("nix-store").arg("--dump").arg(dir.path()).success().unwrap().stdout;
        let text = format!(
            "StorePath: {path}\nURL: nar/forged.nar\nCompression: none\nFileSize: {size}\nNarHash: {}\n\
             NarSize: {size}\nReferences: {}\n",
            Sha256::of(&dumped),
            references.iter().map(|r| r.base()).collect::<Vec<_>>().join(" "),
            size = dumped.len(),
        );
        self.put("nar/forged.nar", &dumped);
        self.put(&NarInfo::key(path), text.as_bytes());
        NarInfo::parse(text.as_bytes()).unwrap()
    }

    /// Whether every narinfo that a developer has signed is what this machine's store says.
    fn nothing_else_is_signed(&self, closure: &Closure) {
        let truth = nix::local::read(std::slice::from_ref(&closure.app)).unwrap();
        let bucket = self.bucket();
        for key in bucket.list("").unwrap().iter().filter(|key| key.ends_with(".narinfo")) {
            let text = bucket.get_start(key, 1 << 20).unwrap().unwrap();
            let Ok(info) = NarInfo::parse(&text) else { continue };
            if info.verified_by(&self.keys) {
                assert_eq!(info.differs_from(&truth[&info.path]), None, "{key}");
            }
        }
    }

    /// What a host gets of a closure; it is this machine's again.
    fn host_gets(&self, closure: &Closure) -> bool {
        let before =
            [&closure.app, &closure.lib].map(|p| ask("nix-store", &["--query", "--hash", p.as_str()]));
        closure.forget();
        let host = self.desks[0].hosts_settings(&[("trustedPublicKeys", &self.trusted)]);
        let reasons = nix::fetch(&host, std::slice::from_ref(&closure.app), &std::env::temp_dir()).unwrap();
        if !reasons.is_empty() {
            println!("{reasons:?}");
            return false;
        }
        let after =
            [&closure.app, &closure.lib].map(|p| ask("nix-store", &["--query", "--hash", p.as_str()]));
        assert_eq!(before, after);
        true
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn whoever_writes_the_bucket_gets_nothing_signed_by_those_who_push() {
    if !at_home("whoever_writes_the_bucket_gets_nothing_signed_by_those_who_push") {
        return;
    }
    let team = Team::new();
    let closure = Closure::build("web", 50_000);
    // Planted before anybody has pushed it; then after a push, for the top and for a dependency; each mended by a push
    // that nobody thinks anything of, which is what hosts advise.
    for (when, who, path) in [
        ("before the first push", 0, &closure.app),
        ("after a push", 0, &closure.app),
        ("before another developer's push", 1, &closure.app),
        ("a dependency", 0, &closure.lib),
        ("a dependency, before another developer's push", 1, &closure.lib),
    ] {
        let forged = team.forge(path, &[]);
        let said = team.push(who, &[], &closure.app);
        assert!(
            said.contains(&format!("{path} has a narinfo that no trusted key has signed")),
            "{when}: {said}"
        );
        assert!(
            said.contains("writing it anew") && said.contains("check who can write to"),
            "{when}: {said}"
        );
        assert!(team.info(path).differs_from(&forged).is_some(), "{when}");
        team.nothing_else_is_signed(&closure);
        let again = team.push(who, &[], &closure.app);
        assert!(again.contains("already") && !again.contains("anew"), "{when}: {again}");
    }
    // With the old signature on the forged content, and with the forged content's hash alone.
    let honest = team.info(&closure.app);
    let mut lie = honest.clone();
    lie.nar_hash = Sha256::of(b"something else");
    team.put(&NarInfo::key(&closure.app), lie.render().as_bytes());
    let said = team.push(0, &[], &closure.app);
    assert!(said.contains("NarHash"), "{said}");
    assert_eq!(team.info(&closure.app).differs_from(&honest), None);
    team.nothing_else_is_signed(&closure);
    assert!(team.host_gets(&closure));
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_is_spoiled_in_the_bucket_is_mended_by_a_push_without_the_right_to_delete() {
    if !at_home("what_is_spoiled_in_the_bucket_is_mended_by_a_push_without_the_right_to_delete") {
        return;
    }
    let team = Team::new();
    let closure = Closure::build("web", 50_000);
    team.push(0, &[], &closure.app);
    let good = team.info(&closure.lib);
    let key = NarInfo::key(&closure.lib);
    let unsigned = |signature: &str| {
        let mut info = good.clone();
        info.signatures = vec![signature.to_string()];
        info.render()
    };
    for (text, says) in [
        ("garbage".to_string(), "broken narinfo"),
        (String::new(), "broken narinfo"),
        ("x".repeat(2 << 20), "broken narinfo"),
        (unsigned("ann-1:AAAA"), "no signature that verifies"),
        (unsigned(&good.signatures[0].replace("ann-1:", "ann-1:AAAA")), "no signature that verifies"),
        (good.render().replace("URL: nar/", "URL: http://127.0.0.1:7777/"), "broken narinfo"),
        (good.render() + "CA: garbage\n", "a CA in its narinfo"),
        (good.render() + "Sig: nocolon\n", "a Sig in its narinfo"),
    ] {
        team.put(&key, text.as_bytes());
        let said = team.push(0, &[], &closure.app);
        assert!(said.contains(says) && said.contains(closure.lib.as_str()), "{said}");
        let mended = team.info(&closure.lib);
        assert!(mended.verified_by(&team.keys) && mended.differs_from(&good).is_none());
        assert_eq!(mended.planted(), None);
    }
    // A file of the right size with another content: no size tells, the host does, and `--rewrite` mends it.
    let size = team.bucket().size(&good.url).unwrap().unwrap();
    team.put(&good.url, &vec![0; size as usize]);
    assert!(team.push(0, &[], &closure.app).contains("already"));
    let kept = tempfile::tempdir().unwrap();
    let kept = format!("file://{}", kept.path().display());
    ask("nix", &["copy", "--to", &kept, closure.app.as_str()]);
    assert!(!team.host_gets(&closure));
    ask("nix", &["copy", "--no-check-sigs", "--from", &kept, closure.app.as_str()]);
    team.push(0, &["--rewrite"], &closure.app);
    assert!(team.host_gets(&closure));
    assert!(team.s3.log().iter().all(|line| !line.starts_with("DELETE /box/cache/nar")));
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn another_build_of_a_trusted_colleague_is_said_to_be_one() {
    let team = Team::new();
    let closure = Closure::build("web", 5_000);
    team.push(0, &[], &closure.app);
    // As if bob's build of the same path had come out otherwise.
    let mut other = team.info(&closure.lib);
    other.nar_size += 8;
    let secret = fs_err::read_dir(team.desks[1].dir.path()).unwrap().map(|e| e.unwrap().path());
    let secret = secret.into_iter().find(|p| p.extension().is_some_and(|e| e == "secret")).unwrap();
    other.signatures.clear();
    let bobs = omni_deploy::keys::SecretKey::read(&secret).unwrap();
    other.signatures.push(bobs.sign(other.fingerprint().as_bytes()).unwrap());
    team.put(&NarInfo::key(&closure.lib), other.render().as_bytes());
    let said = team.push(0, &[], &closure.app);
    assert!(said.contains("the narinfo of another build") && !said.contains("check who can write"), "{said}");
    team.nothing_else_is_signed(&closure);
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn many_paths_are_pushed_and_fetched_over_no_more_connections_than_are_kept() {
    if !at_home("many_paths_are_pushed_and_fetched_over_no_more_connections_than_are_kept") {
        return;
    }
    let team = Team::new();
    let many = Many::build(300);
    let made = |work: &dyn Fn()| {
        let before = team.s3.connections();
        work();
        team.s3.connections() - before
    };
    // Each request late, so that as many are made at a time as ever are.
    team.s3.faults(r#"{"delay_ms": 20}"#);
    let pushed = made(&|| drop(team.push(0, &[], &many.top)));
    let again = made(&|| assert!(team.push(0, &[], &many.top).contains("already")));
    many.forget();
    let host = team.desks[0].hosts_settings(&[("trustedPublicKeys", &team.trusted)]);
    let fetched = made(&|| {
        assert_eq!(
            nix::fetch(&host, std::slice::from_ref(&many.top), &std::env::temp_dir()).unwrap(),
            Default::default()
        );
    });
    assert_eq!(nix::missing(&many.paths).unwrap(), []);
    println!("connections: {pushed} for a push, {again} for the same again, {fetched} for a fetch");
    assert!(pushed <= 64 && again <= 64, "{pushed} connections for a push, {again} for the same again");
    // A pass has one more, for the manifest.
    assert!(fetched < 64, "{fetched} connections for a fetch");
    assert!(
        [pushed, again, fetched].iter().all(|count| *count > 16),
        "{pushed}, {again}, {fetched}: not many at a time"
    );
}

/// The most memory that this process has had so far, without its children, in bytes (proc_pid_status(5)).
fn peak() -> u64 {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_is_large_is_pushed_and_fetched_in_little_memory() {
    if !at_home("what_is_large_is_pushed_and_fetched_in_little_memory") {
        return;
    }
    let s3 = S3Server::start_below("cache");
    let desk = Desk::new(&s3.url("cache"));
    let (secret, public) = key(&desk.dir, "test-1");
    let closure = Closure::build("large", 256 << 20);
    let tops = [closure.app.clone()];
    publish(&desk.settings(&[("secretKeyFile", secret.to_str().unwrap())]), &tops);
    let pushed = peak();
    closure.forget();
    let host = desk.hosts_settings(&[("trustedPublicKeys", &public)]);
    assert_eq!(nix::fetch(&host, &tops, &std::env::temp_dir()).unwrap(), Default::default());
    let fetched = peak();
    println!("{} MiB for a push, {} MiB with a fetch", pushed >> 20, fetched >> 20);
    assert!(pushed < 32 << 20 && fetched < 32 << 20, "{pushed} bytes for a push, {fetched} with a fetch");
}

/// The paths of PUTs that were acknowledged, in order.
fn acknowledged(s3: &S3Server) -> Vec<String> {
    let put = |line: &String| {
        let path = line.strip_prefix("PUT /box/")?.strip_suffix(" 200")?;
        Some(path.split('?').next().unwrap_or(path).to_string())
    };
    s3.log().iter().filter_map(put).collect()
}

/// Whether each narinfo was written after its NAR and after the narinfos that it refers to.
fn in_order(store: &S3Store, written: &[String]) -> bool {
    let parsed = |key: &str| NarInfo::parse(&store.get_start(key, 1 << 20).unwrap().unwrap()).unwrap();
    written.iter().enumerate().filter(|(_, key)| key.ends_with(".narinfo")).all(|(at, key)| {
        let before = |key: &str| written[..at].iter().any(|written| written == key);
        let info = parsed(key);
        let above = |r: &StorePath| *r == info.path || before(&NarInfo::key(r));
        before(&info.url) && info.references.iter().all(above)
    })
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_push_that_ends_anywhere_leaves_no_narinfo_that_leads_to_nothing() {
    let s3 = S3Server::start();
    let desk = Desk::new(&s3.url(""));
    desk.begins_with(&["deep"]);
    let store = whole_bucket(&s3);
    // A chain: what ends first, at any point, must have begun at its bottom.
    let chain = Chain::build(6);
    let words = ["push", "--service", "deep", chain.top.as_str()];
    desk.ok(&words);
    let whole = acknowledged(&s3);
    let narinfos = |written: &[String]| written.iter().filter(|key| key.ends_with(".narinfo")).count();
    assert_eq!(narinfos(&whole), 6);
    assert!(in_order(&store, &whole), "{whole:?}");
    // The same, cut off after each of its writes: what is in the bucket then is a beginning of such a list.
    for key in whole.iter().filter(|key| key.ends_with(".narinfo") || key.starts_with("nar/")) {
        store.delete(key).unwrap();
    }
    let from = acknowledged(&s3).len();
    for refused in 0..chain.paths.len() {
        let key = NarInfo::key(&chain.paths[refused]);
        s3.faults(&format!(
            r#"{{"fail": {{"status": 403, "code": "AccessDenied", "methods": ["PUT"], "key_prefix": "{key}"}}}}"#
        ));
        let output = desk.run(&words);
        assert!(!output.status.ok() && output.stderr.contains(&key), "{}", output.stderr);
        assert!(output.stderr.contains("nothing was published"), "{}", output.stderr);
        let there = store.list("").unwrap();
        for (n, path) in chain.paths.iter().enumerate() {
            let has = there.contains(&NarInfo::key(path));
            assert!(has == (n < refused), "{path} beside a refused {key}: {has}");
        }
    }
    s3.faults("{}");
    desk.ok(&words);
    assert!(in_order(&store, &acknowledged(&s3)[from..]));
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_push_that_is_killed_is_taken_up_by_the_next() {
    let s3 = S3Server::start();
    let desk = Desk::new(&s3.url(""));
    desk.begins_with(&["deep"]);
    let store = whole_bucket(&s3);
    let chain = Chain::build(6);
    let words = ["push", "--service", "deep", chain.top.as_str()];
    s3.faults(r#"{"delay_ms": 100}"#);
    let before = acknowledged(&s3).len();
    for some in [1, 4, 8] {
        desk.killed(&words, || acknowledged(&s3).len() >= before + some);
        let there = store.list("").unwrap();
        for path in chain.paths.iter().filter(|path| there.contains(&NarInfo::key(path))) {
            let info =
                NarInfo::parse(&store.get_start(&NarInfo::key(path), 1 << 20).unwrap().unwrap()).unwrap();
            assert!(there.contains(&info.url), "{path}");
            let has = |r: &StorePath| there.contains(&NarInfo::key(r));
            assert!(info.references.iter().all(has), "{path}");
        }
    }
    s3.faults("{}");
    desk.ok(&words);
    assert!(in_order(&store, &acknowledged(&s3)));
    assert!(desk.run(&words).stderr.contains("already"));
    let left = fs_err::read_dir(desk.path("home/.cache/omni-deploy/push/nar")).unwrap().count();
    assert_eq!(left, 0, "the spool is empty again");
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_build_that_fails_publishes_nothing_and_says_so() {
    let desk = Desk::in_directory();
    desk.begins_with(&["app-web"]);
    fs_err::write(desk.path("Biz/App/Web.py"), "print()\n").unwrap();
    let before = desk.manifest();
    let absent = "/nix/store/00000000000000000000000000000000-ava";
    for (script, says) in [
        ("echo boom >&2; exit 7", "exit code 7: boom"),
        ("echo done", "printed no store path"),
        (&format!("echo STORE_PATH={absent} >&2"), "its stderr does not count"),
        ("echo STORE_PATH=/nix/store/x", "is not a store path"),
        (&format!("echo STORE_PATH={absent}"), "is not valid in this machine's Nix store"),
        (&format!("echo {absent}/bin/ava"), "points below a store path"),
        ("kill -9 $$", "signal 9"),
    ] {
        desk.script("bild", script);
        let output = desk.run(&["push", "Biz/App/Web.py"]);
        assert_eq!(
            (output.status.to_string().as_str(), output.text().as_str()),
            ("exit code 1", ""),
            "{script}"
        );
        let error = output.stderr.lines().last().unwrap();
        assert!(
            error.contains("build of Biz/App/Web.py failed") && error.contains(says),
            "{script}: {error}"
        );
        assert_eq!(desk.manifest(), before, "{script}");
    }
}

#[test]
fn an_unknown_service_is_refused_before_anything_is_built() {
    let desk = Desk::in_directory();
    desk.begins_with(&["app-web"]);
    desk.script("bild", "touch built; exit 1");
    fs_err::write(desk.path("Biz/App/Webb.py"), "").unwrap();
    let output = desk.run(&["push", "Biz/App/Webb.py"]);
    assert_eq!(output.status.to_string(), "exit code 1");
    for part in ["'app-webb'", "did you mean 'app-web'", "add-service"] {
        assert!(output.stderr.contains(part), "{}", output.stderr);
    }
    assert!(!desk.path("built").exists());
    for (words, says) in [
        (vec!["push"], "'omni-deploy push' needs <target>"),
        (vec!["push", "a", "b", "--service", "x"], "several targets"),
        (vec!["push", "/nix/store/00000000000000000000000000000000-ava"], "--service"),
        (vec!["push", ".#"], "--service"),
        (vec!["push", "--nope"], "no flag '--nope'"),
        (vec!["push", "--wiat", "a"], "did you mean '--wait'"),
        (vec!["push", "--timeout=soon", "a"], "'--timeout' with value 'soon': expected a number"),
    ] {
        let output = desk.run(&words);
        assert_eq!(output.status.to_string(), "exit code 2", "{words:?}: {}", output.stderr);
        assert!(output.stderr.contains(says), "{words:?}: {}", output.stderr);
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn several_targets_are_one_version_with_their_commit() {
    let desk = Desk::in_directory();
    desk.begins_with(&["one", "two"]);
    let (one, two) = (Closure::build("one", 10), Closure::build("two", 10));
    fs_err::write(desk.path("Biz/One.py"), "").unwrap();
    fs_err::write(desk.path("Biz/Two.py"), "").unwrap();
    desk.script("bild", &format!("case $1 in *One*) echo {};; *) echo {};; esac", one.app, two.app));
    let git = |words: &[&str]| {
        let identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"];
        Run::new("git").args(identity).args(words).dir(desk.dir.path()).success().unwrap().text()
    };
    git(&["init", "-q"]);
    git(&["add", "Biz"]);
    git(&["commit", "-qm", "x"]);
    let printed = desk.ok(&["push", "Biz/One.py", "Biz/Two.py"]);
    assert_eq!(printed, format!("one {} serial 4\ntwo {} serial 4\n", one.app, two.app));
    assert_eq!(desk.manifest()["services"][1]["revision"], git(&["rev-parse", "HEAD"]).trim());
    assert_eq!(desk.manifest()["change"]["action"], "update one, two");

    // A commit that is not all of it, and one that is older than what the manifest has, are said.
    let [first, changed] = [Closure::build("first", 10), Closure::build("changed", 10)];
    desk.script("bild", &format!("echo {}", changed.app));
    let commit = |text: &str| {
        fs_err::write(desk.path("Biz/One.py"), text).unwrap();
        git(&["commit", "-qam", text]);
    };
    ["2", "3", "4"].iter().for_each(|text| commit(text));
    desk.ok(&["push", "--require-clean", "Biz/One.py"]);
    let head = git(&["rev-parse", "HEAD"]).trim().to_string();
    let before = desk.manifest();
    fs_err::write(desk.path("Biz/One.py"), "changed").unwrap();
    for command in ["push", "ship"] {
        let refused = desk.run(&[command, "--require-clean", "Biz/One.py"]);
        assert_eq!(refused.status.to_string(), "exit code 1", "{}", refused.stderr);
        assert!(refused.stderr.contains("changes that are not committed") && desk.manifest() == before);
    }
    let of_no_commit = desk.run(&["push", "--require-clean", "--service", "one", first.app.as_str()]);
    assert!(of_no_commit.stderr.contains("no commit that is known"), "{}", of_no_commit.stderr);
    let dirty = desk.run(&["push", "Biz/One.py"]);
    let says = format!("will be shown as {}-dirty", &head[..10]);
    assert!(dirty.status.ok() && dirty.stderr.contains(&says), "{}", dirty.stderr);
    let shown = desk.run(&["status"]).text();
    assert!(shown.contains(&format!("({}-dirty)", &head[..10])), "{shown}");
    git(&["checkout", "-q", "-f", "HEAD~3"]);
    let older = desk.run(&["push", "Biz/One.py"]);
    let says = format!("is 3 commits behind {}", &head[..10]);
    assert!(older.status.ok() && older.stderr.contains(&says), "{}", older.stderr);
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_flake_and_a_nix_file_are_built_and_named() {
    let desk = Desk::in_directory();
    desk.begins_with(&["ava", "thing"]);
    let derivation = |name: &str, salt: &Path| {
        format!(
            "derivation {{ name = \"{name}\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; \
             args = [ \"-c\" \"/bin/mkdir -p $out/bin; echo {} > $out/bin/{name}\" ]; }}",
            salt.display()
        )
    };
    let flake = format!("{{ outputs = {{ self }}: {{ ava = {}; }}; }}", derivation("ava", desk.dir.path()));
    fs_err::create_dir(desk.path("flake")).unwrap();
    fs_err::write(desk.path("flake/flake.nix"), flake).unwrap();
    let file = format!("# : out thing\n{}\n", derivation("thing", desk.dir.path()));
    fs_err::write(desk.path("Biz/App/any.nix"), file).unwrap();
    let reference = format!("path:{}#ava", desk.path("flake").display());
    let printed = desk.ok(&["push", &reference, "Biz/App/any.nix"]);
    let lines: Vec<Vec<&str>> = printed.lines().map(|l| l.split(' ').collect()).collect();
    assert!(lines.len() == 2 && lines[0][0] == "ava" && lines[1][0] == "thing", "{printed}");
    for line in &lines {
        assert!(fs_err::metadata(format!("{}/bin/{}", line[1], line[0])).is_ok(), "{printed}");
    }
    let refused = desk.run(&["push", "--service", "ava", &reference.replace("#ava", "#nope")]);
    assert!(refused.stderr.contains("build of path:") && !refused.status.ok(), "{}", refused.stderr);
    let flakes = ["--extra-experimental-features", "flakes", "flake", "metadata", "--json"];
    let metadata = ask("nix", &[&flakes[..], &[reference.trim_end_matches("#ava")]].concat());
    let metadata: serde_json::Value = serde_json::from_str(&metadata).unwrap();
    ask("nix-store", &["--delete", metadata["path"].as_str().unwrap()]);
    for line in &lines {
        let drv = ask("nix-store", &["--query", "--deriver", line[1]]);
        ask("nix-store", &["--delete", line[1], drv.trim()]);
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_bucket_that_refuses_a_file_is_named_and_nothing_is_published() {
    let s3 = S3Server::start();
    let desk = Desk::new(&s3.url(""));
    desk.begins_with(&["ava"]);
    let before = desk.manifest();
    let closure = Closure::build("ava", 3_000_000);
    s3.faults(
        r#"{"fail": {"status": 403, "code": "AccessDenied", "methods": ["PUT"], "key_prefix": "nar/"}}"#,
    );
    let output = desk.run(&["push", "--service", "ava", closure.app.as_str()]);
    assert_eq!(output.status.to_string(), "exit code 1");
    let error = output.stderr.lines().last().unwrap();
    assert!(error.contains("copy to the cache failed") && error.contains("nothing was published"), "{error}");
    assert!(error.contains("nar/"), "the object is named: {error}");
    assert!(!output.stderr.contains(".cache/"), "the spool is shown: {}", output.stderr);
    assert_eq!(desk.manifest(), before);
    assert!(!s3.log().iter().any(|l| l.starts_with("PUT") && l.contains(".narinfo")), "{:?}", s3.log());
    // A transfer that breaks off in the middle is taken up again.
    s3.faults(r#"{"reset": {"count": 1, "after": true, "methods": ["PUT"], "key_prefix": "nar/"}}"#);
    let output = desk.run(&["push", "--service", "ava", closure.app.as_str()]);
    assert!(output.status.ok(), "{}", output.stderr);
    assert!(s3.log().iter().any(|l| l.starts_with("PUT /box/nar/") && l.ends_with(" 000")), "{:?}", s3.log());
}

/// What a host's state says of `ava`.
fn state(serial: u64, status: ServicePhase, runs: &StorePath, attempted: Option<&StorePath>) -> String {
    let name = ServiceName::parse("ava").unwrap();
    let mut state = State::new(HostName::parse("biz").unwrap(), Timestamp(0));
    state.serial = Some(serial);
    let failure = attempted.map(|path| FailureRecord {
        reason: "it exits at once; read 'journalctl -u ava'".into(),
        attempted: Some(path.clone()),
        at: Timestamp(0),
        journal: vec!["panic: no database".into()],
        attempts: 0,
        inputs: None,
        kept_out: false,
    });
    let service = ServiceState {
        store_path: Some(runs.clone()),
        failure,
        ..ServiceState::new(name.clone(), status, Timestamp(0))
    };
    state.services.insert(name, service);
    serde_json::to_string(&state).unwrap()
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn shipping_ends_with_the_truth_about_every_host() {
    let desk = Desk::in_directory();
    desk.begins_with(&["ava"]);
    let closure = Closure::build("ava", 10);
    let old = StorePath::parse("/nix/store/00000000000000000000000000000000-ava").unwrap();
    // A host in a few lines, whose login shell greets: every start is written down; the pass after the n-th start
    // leaves state.N, the last of them staying; without any it does not answer.
    desk.script(
        "enter",
        "cd \"$(dirname \"$0\")/../host\" || exit 255\n\
         echo Welcome; echo --omni-deploy-answer--\n\
         host=$1; shift; eval \"set -- $*\"; case $3 in *'exec sudo '*) s='sudo ';; *) s=;; esac; shift 4\n\
         case \"$host $s$*\" in\n\
         'biz sudo omni-deploy deployer watch '*) [ -e answer ] || exit 2; echo watch >> starts; cat answer;;\n\
         'biz sudo systemctl start deployer') echo start >> starts; n=$(wc -l < starts); \
         [ -e \"state.$n\" ] && mv \"state.$n\" state; echo 'a unit failed' >&2; exit 1;;\n\
         'biz systemctl show '*) printf 'Result=exit-code\\nExecMainStatus=%s\\n' $(cat code || echo 3);;\n\
         'biz sudo journalctl '*) echo 'error: nobody knows this key';;\n\
         *'cat /var/lib/deployer/state.json') cat state;;\n\
         *) echo \"what? $*\" >&2; exit 255;;\nesac\n",
    );
    let ship = |states: &[String], timeout: &str| {
        drop(fs_err::remove_dir_all(desk.path("host")));
        if !states.is_empty() {
            fs_err::create_dir(desk.path("host")).unwrap();
        }
        for (n, state) in states.iter().enumerate() {
            fs_err::write(desk.path("host").join(format!("state.{}", n + 1)), state).unwrap();
        }
        desk.run(&["ship", "--timeout", timeout, "--service", "ava", closure.app.as_str()])
    };
    let starts = || fs_err::read_to_string(desk.path("host/starts")).unwrap().lines().count();
    let line = format!("ava {} serial 3\n", closure.app);

    // The first start joins a pass that read an older manifest.
    let states =
        [state(2, ServicePhase::Running, &old, None), state(3, ServicePhase::Running, &closure.app, None)];
    let output = ship(&states, "30");
    assert_eq!(output.text(), format!("{line}ava biz running\n"), "{}", output.stderr);
    assert!(output.status.ok() && starts() == 2, "{} starts: {}", starts(), output.stderr);

    let output = ship(&[state(3, ServicePhase::Rejected, &old, Some(&closure.app))], "30");
    assert_eq!(output.text(), format!("{line}ava biz rejected\n"));
    assert_eq!(output.status.to_string(), "exit code 3");
    assert!(output.stderr.contains("exits at once") && output.stderr.contains("panic: no database"));

    let output = ship(&[], "30");
    assert_eq!(output.text(), format!("{line}ava biz unknown\n"));
    assert_eq!(output.status.to_string(), "exit code 1");
    assert!(output.stderr.contains("biz does not answer"), "{}", output.stderr);

    // A host that knows how answers once, while its candidate still drains; what came of the start is in the answer.
    let answers = |state: &str, start: serde_json::Value| {
        drop(fs_err::remove_dir_all(desk.path("host")));
        fs_err::create_dir(desk.path("host")).unwrap();
        let mut state: serde_json::Value = serde_json::from_str(state).unwrap();
        state["draining"] = serde_json::json!(["ava"]);
        let answer = serde_json::json!({"version": 1, "state": state, "live": {}, "start": start});
        fs_err::write(desk.path("host/answer"), answer.to_string()).unwrap();
        let output = desk.run(&["ship", "--timeout", "30", "--service", "ava", closure.app.as_str()]);
        (output, fs_err::read_to_string(desk.path("host/starts")).unwrap())
    };
    let well = state(3, ServicePhase::Running, &closure.app, None);
    let (output, starts_made) = answers(&well, serde_json::json!({"code": 0}));
    assert_eq!(output.text(), format!("{line}ava biz running\n"), "{}", output.stderr);
    assert!(output.status.ok() && starts_made == "watch\n", "{starts_made}: {}", output.stderr);
    let (output, starts_made) = answers(&well, serde_json::json!({"code": 5, "said": "not loaded"}));
    assert_eq!(output.text(), format!("{line}ava biz unknown\n"), "{}", output.stderr);
    assert!(
        starts_made == "watch\n" && output.stderr.contains("it has no deployer (not loaded); install it"),
        "{starts_made}: {}",
        output.stderr
    );

    // It runs, as an earlier pass left it, and this pass failed: of an older program the journal tells why.
    let well = state(3, ServicePhase::Running, &closure.app, None);
    drop(fs_err::remove_dir_all(desk.path("host")));
    fs_err::create_dir(desk.path("host")).unwrap();
    fs_err::write(desk.path("host/state"), &well).unwrap();
    fs_err::write(desk.path("host/code"), "1").unwrap();
    let words = ["ship", "--timeout", "30", "--service", "ava", closure.app.as_str()];
    let output = desk.run(&words);
    assert_eq!((output.status.to_string().as_str(), starts()), ("exit code 1", 1), "{}", output.stderr);
    assert!(
        output.stderr.contains("its pass failed (exit-code, 1): error: nobody knows this key"),
        "{}",
        output.stderr
    );

    // The same, with the reason in the state.
    let mut changed: serde_json::Value = serde_json::from_str(&well).unwrap();
    changed["lastError"] =
        serde_json::json!({"reason": "the key is revoked", "since": "2026-11-22T18:31:05Z"});
    let output = ship(&[changed.to_string()], "30");
    assert_eq!((output.status.to_string().as_str(), starts()), ("exit code 1", 1), "{}", output.stderr);
    assert!(
        output.text().ends_with("ava biz unknown\n")
            && output.stderr.contains("last pass failed: the key is revoked")
    );

    // Another store's version is neither this one nor one that came after it.
    let mut changed: serde_json::Value = serde_json::from_str(&well).unwrap();
    changed["store"] = serde_json::json!("s3://releases2");
    let output = ship(&[changed.to_string()], "30");
    assert_eq!(output.text(), format!("{line}ava biz unknown\n"), "{}", output.stderr);
    assert_eq!(output.status.to_string(), "exit code 1");
    let both = ["biz reads s3://releases2, you published to file://", "correct 'store'"];
    assert!(both.iter().all(|part| output.stderr.contains(part)), "{}", output.stderr);
    // Of a program that does not say: a number that this store does not have.
    let output = ship(&[state(42, ServicePhase::Running, &old, None)], "30");
    assert_eq!(output.text(), format!("{line}ava biz unknown\n"), "{}", output.stderr);
    assert!(output.stderr.contains("worked from version 42, which is not in file://"), "{}", output.stderr);

    // A host that never gets there is not waited for beyond the timeout.
    let started = std::time::Instant::now();
    let output = ship(&[state(2, ServicePhase::Running, &old, None)], "7");
    assert_eq!(output.status.to_string(), "exit code 1");
    assert!(output.stderr.contains("saw version 2, not yet 3"), "{}", output.stderr);
    assert!(started.elapsed().as_secs() < 20);
    assert!(output.text().ends_with("ava biz pending\n"), "{}", output.text());

    // Somebody publishes in between: it is said who, as the store knows.
    let other = desk.run(&["manifest", "update", "ava", old.as_str()]);
    assert!(other.status.ok(), "{}", other.stderr);
    fs_err::write(desk.path("host/state.1"), state(4, ServicePhase::Running, &old, None)).unwrap();
    fs_err::remove_file(desk.path("host/starts")).unwrap();
    let settings = desk.settings(&[("ssh", &format!("sh {}", desk.path("bin/enter").display()))]);
    let shipped =
        wait::Shipped { name: ServiceName::parse("ava").unwrap(), path: closure.app.clone(), entry: None };
    let hosts = std::collections::BTreeMap::from([(HostName::parse("biz").unwrap(), vec![shipped])]);
    let outcomes = wait::follow(&settings, &hosts, 3, std::time::Duration::from_secs(30)).unwrap();
    let outcome = outcomes.into_values().next().unwrap();
    let wait::Outcome::Superseded(newer) = outcome else { panic!("{outcome:?}") };
    assert_eq!((newer.serial, newer.action.as_str()), (4, "update ava"));
    assert!(newer.by.contains('@'), "{newer:?}");
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn what_a_bucket_wants_or_cannot_do_for_a_moment_ends_no_push() {
    for faults in [
        r#"{"fail": {"status": 400, "code": "RequestTimeout", "methods": ["PUT"], "key_prefix": "nar/", "count": 1}}"#,
        r#"{"fail": {"status": 409, "code": "OperationAborted", "methods": ["PUT"], "count": 2}}"#,
        r#"{"refuse_expect": true}"#,
        r#"{"require_checksum": true}"#,
    ] {
        let s3 = S3Server::start();
        let desk = Desk::new(&s3.url(""));
        desk.begins_with(&["ava"]);
        let closure = Closure::build("ava", 3_000_000);
        s3.faults(faults);
        desk.ok(&["push", "--service", "ava", closure.app.as_str()]);
        let refused = |l: &String| [" 400", " 409", " 417"].iter().any(|status| l.ends_with(status));
        assert!(s3.log().iter().any(refused), "{faults}");
        assert_eq!(desk.manifest()["services"][0]["artifact"]["storePath"], closure.app.as_str(), "{faults}");
    }
}

#[test]
#[ignore = "needs Nix and its store: cargo test -- --ignored"]
fn a_push_finds_out_before_it_copies_that_a_store_ignores_conditions() {
    let s3 = S3Server::start();
    let desk = Desk::new(&s3.url(""));
    desk.begins_with(&["ava"]);
    // Another machine, which has not tried this store.
    fs_err::remove_dir_all(desk.path("home/.local")).unwrap();
    s3.faults(r#"{"ignore_conditions": true}"#);
    let closure = Closure::build("ava", 1_000);
    let before = desk.manifest();
    let output = desk.run(&["push", "--service", "ava", closure.app.as_str()]);
    assert!(!output.status.ok() && output.stderr.contains("ignores If-None-Match"), "{}", output.stderr);
    assert_eq!(desk.manifest(), before);
    assert!(s3.log().iter().all(|l| !l.starts_with("PUT /box/nar/")), "{:?}", s3.log());
}
