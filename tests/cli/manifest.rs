//! `deploy-manifest` through the built binary, over real directories: the runbook's lines, every command, every
//! refusal (which changes nothing), and many writers at once.

mod common;

use common::{DEVELOPER, S3Server};
use omni_deploy::clock::Timestamp;
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::runner::{Output, ProcessStatus, Run};
use omni_deploy::store::dir::DirStore;
use omni_deploy::store::s3::S3Store;
use omni_deploy::store::{GetResult, Store, StoreUrl};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A store in a directory and the binary under its other name.
struct Bench {
    dir: tempfile::TempDir,
}

const HASH: &str = "0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd";

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("deploy-manifest");
        fs_err::os::unix::fs::symlink(env!("CARGO_BIN_EXE_omni-deploy"), link).unwrap();
        Bench { dir }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn command(&self, args: &[&str]) -> Run {
        Run::new(self.dir.path().join("deploy-manifest").to_str().unwrap())
            .args(args)
            .env("OMNI_DEPLOY_STORE", format!("file://{}", self.store().display()))
            .env("OMNI_DEPLOY_HOST", "biz")
            .env("HOME", self.dir.path())
            .env("USER", "ann")
            .without_env("XDG_CONFIG_HOME")
            .without_env("XDG_STATE_HOME")
            .without_env("OMNI_DEPLOY_DEFAULT_HOSTS")
            .without_env("JOURNAL_STREAM")
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed; its stdout.
    fn ok(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert_eq!(out.status, ProcessStatus::Exit(0), "{args:?}: {}", out.stderr);
        out.text()
    }

    /// Runs a command that must fail with this code and change nothing; the one line it says.
    fn refused(&self, code: i32, args: &[&str]) -> String {
        let before = self.files();
        let out = self.run(args);
        assert_eq!(out.status, ProcessStatus::Exit(code), "{args:?}: {} {}", out.text(), out.stderr);
        assert_eq!(out.text(), "", "{args:?}");
        assert_eq!(self.files(), before, "{args:?} changed the store");
        assert_eq!(out.stderr.lines().count(), 1, "{args:?}: {}", out.stderr);
        out.stderr
    }

    fn manifest(&self) -> Value {
        serde_json::from_slice(&fs_err::read(self.store().join("manifest.json")).unwrap()).unwrap()
    }

    fn archived(&self) -> Vec<String> {
        let names = self.files().into_keys();
        names.filter_map(|n| n.strip_prefix("manifests/").map(String::from)).collect()
    }

    /// Every object of the store with its bytes.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        fn walk(root: &Path, dir: &Path, into: &mut BTreeMap<String, Vec<u8>>) {
            let Ok(entries) = fs_err::read_dir(dir) else { return };
            for entry in entries {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
                if path.is_dir() {
                    walk(root, &path, into);
                } else if !name.contains(".omni-deploy") {
                    into.insert(name, fs_err::read(&path).unwrap());
                }
            }
        }
        let mut files = BTreeMap::new();
        walk(&self.store(), &self.store(), &mut files);
        files
    }

    fn with_ava() -> Self {
        let bench = Bench::new();
        bench.ok(&["add-service", r#"{"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}}"#]);
        bench
    }
}

fn path(name: &str) -> String {
    format!("/nix/store/{HASH}-{name}")
}

#[test]
fn the_runbooks_lines_work_as_they_stand() {
    let bench = Bench::new();
    let service = r#"{
       "name": "my-service",
       "artifact": {"storePath": "/nix/store/placeholder"},
       "hosts": ["biz"],
       "exec": {"command": null, "user": "root", "group": "root"},
       "env": {"PORT": "8080"},
       "envFile": "/var/lib/deployer-secrets/my-service.env",
       "http": {"domain": "my.example.com", "path": "/", "internalPort": 8080}
       }"#;
    bench.ok(&["add-service", service]);
    bench.ok(&["update", "my-service", &path("my-service")]);
    let shown: Value = serde_json::from_str(&bench.ok(&["show"])).unwrap();
    assert_eq!(shown["services"][0]["artifact"]["storePath"], path("my-service"));
    assert_eq!(shown["services"][0]["http"]["internalPort"], 8080);
    let listed = bench.ok(&["list"]);
    assert!(
        listed.lines().any(|l| l.starts_with("* manifest-") && l.ends_with("update my-service")),
        "{listed}"
    );
    let day = &bench.archived()[0][.."manifest-20261122".len()];
    bench.ok(&["rollback", &format!("{day}.json")]);
    assert_eq!(bench.manifest()["services"][0]["artifact"]["storePath"], "/nix/store/placeholder");
    assert_eq!(bench.manifest()["serial"], 3);
    assert_eq!(bench.archived().len(), 2);
}

#[test]
fn every_write_says_one_line_and_archives_what_it_replaced() {
    let bench = Bench::new();
    let url = format!("file://{}", bench.store().display());
    let mut expected = Vec::new();
    let mut replaced: Option<Vec<u8>> = None;
    for (args, line) in [
        (vec!["init"], format!("version 1: init ({url})")),
        (vec!["init"], format!("unchanged: there is already a manifest, version 1 ({url})")),
        (
            vec!["add-service", r#"{"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}}"#],
            format!("version 2: add-service ava ({url})"),
        ),
        (
            vec!["update", "ava", "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava", "--revision", "abc"],
            format!("version 3: update ava ({url})"),
        ),
        (
            vec!["update", "ava", "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava"],
            format!("unchanged: version 3 already says this ({url})"),
        ),
        (vec!["set", "ava", "env.A=1", "hosts=biz,web1"], format!("version 4: set ava env.A hosts ({url})")),
        (vec!["remove-service", "ava"], format!("version 5: remove-service ava ({url})")),
    ] {
        let out = bench.run(&args);
        assert_eq!((out.status, out.stderr.trim_end()), (ProcessStatus::Exit(0), line.as_str()), "{args:?}");
        if line.starts_with("version") {
            expected.extend(replaced.take());
        }
        replaced = Some(bench.files()["manifest.json"].clone());
        let archived: Vec<Vec<u8>> =
            bench.files().into_iter().filter(|(n, _)| n.starts_with("manifests/")).map(|(_, b)| b).collect();
        assert_eq!(archived, expected, "{args:?}");
    }
    assert_eq!(bench.manifest()["change"]["action"], "remove-service ava");
    assert!(bench.manifest()["change"]["by"].as_str().unwrap().starts_with("ann@"));
}

#[test]
fn every_mistake_is_one_line_and_changes_nothing() {
    let empty = Bench::new();
    for args in [
        &["show"][..],
        &["list"],
        &["diff"],
        &["rollback"],
        &["update", "a", &path("a")],
        &["set", "a", "x=1"],
        &["edit"],
        &["validate"],
    ] {
        let line = empty.refused(1, args);
        assert!(
            line.contains("no manifest in file:///") && line.contains("run 'deploy-manifest init'"),
            "{line}"
        );
    }
    let bench = Bench::with_ava();
    bench.ok(&["add-service", r#"{"name": "web", "artifact": {"storePath": "/nix/store/placeholder"}, "http": {"domain": "a.org", "internalPort": 80}}"#]);
    let service = |fields: &str| {
        format!(r#"{{"name": "x", "artifact": {{"storePath": "/nix/store/placeholder"}}, {fields}}}"#)
    };
    let add = |fields: &str| vec!["add-service".to_string(), service(fields)];
    let words = |list: &[&str]| list.iter().map(|w| w.to_string()).collect::<Vec<_>>();
    for (args, said) in [
        (words(&["update", "avaa", &path("a")]), "no service 'avaa' in the manifest; did you mean 'ava'?"),
        (words(&["update", "zzzz", &path("a")]), "add it with 'deploy-manifest add-service'"),
        (words(&["update", "ava", "/nix/store/x"]), "'/nix/store/x' is not a store path"),
        (words(&["update", "ava", "/nix/store/placeholder"]), "is not a store path"),
        (words(&["update", "ava", "./result"]), "'./result' is not a store path"),
        (words(&["rollback", "--service", "avaa"]), "did you mean 'ava'"),
        (words(&["rollback", "1", "--service", "wbe"]), "did you mean"),
        (words(&["rollback", "nope"]), "no version 'nope'"),
        (words(&["show", "--service", "avaa"]), "did you mean 'ava'"),
        (words(&["remove-service", "we"]), "did you mean 'web'"),
        (
            words(&["set", "ava", "http.port=1"]),
            "ava: http.port: unknown field; did you mean 'internalPort' or 'portEnv'?",
        ),
        (
            words(&["set", "ava", "http={\"domain\": \"b.org\", \"internalPort\": 80}"]),
            "services[1].http.internalPort: 80 is claimed by 'ava' and 'web' on host 'biz'",
        ),
        (
            words(&["set", "ava", "http={\"domain\": \"a.org\", \"internalPort\": 81}"]),
            "services[1].http.path: \"/\" of a.org is claimed by 'ava' and 'web'",
        ),
        (words(&["add-service", "{"]), "cut off"),
        (words(&["add-service", "hello"]), "not JSON"),
        (words(&["add-service", ""]), "empty"),
        (words(&["add-service", "[]"]), "invalid type: sequence, expected an object"),
        (words(&["add-service", "@/nonexistent-file"]), "/nonexistent-file"),
        (
            words(&[
                "add-service",
                r#"{"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}}"#,
            ]),
            "service 'ava' is in the manifest already; change it with 'deploy-manifest set ava",
        ),
        (add(r#""port": 80"#), "port: unknown field; did you mean 'http.internalPort' or 'http.portEnv'?"),
        (add(r#""hosts": "biz""#), "hosts: invalid type: string \"biz\", expected an array of strings"),
        (add(r#""name": "y""#), "name: is a duplicate"),
        (add(r#""env": {"A-B": "1"}"#), "env[\"A-B\"]"),
        (add(r#""env": {"A": "x\ny"}"#), "env.A: "),
        (add(r#""envFile": "/a/../b""#), "envFile: \"/a/../b\" has '..'"),
        (add(r#""envFile": "/etc/omni-deploy/x""#), "would give the deployer's configuration"),
        (words(&["set", "ava", "envFile=/etc/omni-deploy/x"]), "envFile: \"/etc/omni-deploy/x\" would give"),
        (
            words(&["set", "ava", "systemd.readWritePaths=[\"/srv\",\"/var/run/caddy\"]"]),
            "systemd.readWritePaths[1]: \"/var/run/caddy\" would open Caddy's admin socket",
        ),
        (
            add(r#""credentials": {"a:b": "/s/a"}"#),
            "credentials[\"a:b\"]: \"a:b\" is not a valid name of a credential",
        ),
        (add(r#""credentials": {"a": "s/a"}"#), "credentials.a: \"s/a\" is not absolute"),
        (
            add(r#""hardening": {"profile": "strick"}"#),
            "hardening.profile: \"strick\" is not known; expected one of default, strict",
        ),
        (
            words(&["set", "web", "hardening.profile=loose"]),
            "hardening.profile: \"loose\" is not known; expected one of default, strict",
        ),
        (add(r#""rollout": "overlap""#), "rollout: \"overlap\" needs http"),
        (
            add(r#""http": {"domain": "a.org", "internalPort": 81, "path": "/"}"#),
            "is claimed by 'web' and 'x'",
        ),
    ] {
        // JSON on a command line has its escapes; a newline in it is a newline.
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let line = bench.refused(1, &args);
        assert!(line.starts_with("error: ") && line.contains(said), "{args:?}: {line}");
    }
    for args in [&["shwo"][..], &["set", "ava"], &["set", "ava", "nothing"], &["diff", "1", "2", "3"]] {
        bench.refused(2, args);
    }
    for args in [&["list", "-n", "x"][..], &["update", "ava"], &["show", "--nope"], &[]] {
        let before = bench.files();
        assert_eq!(bench.run(args).status, ProcessStatus::Exit(2), "{args:?}");
        assert_eq!(bench.files(), before);
    }
}

/// Its folder may be somebody else's, who puts there what he likes, and root reads and writes it.
#[test]
fn what_is_no_regular_file_in_a_store_is_named_and_neither_waited_for_nor_followed() {
    let bench = Bench::new();
    bench.ok(&["init"]);
    let elsewhere = bench.dir.path().join("elsewhere");
    fs_err::create_dir(&elsewhere).unwrap();
    fs_err::write(elsewhere.join(".omni-deploy-a1b2c3"), "precious").unwrap();
    // A note of one who died holding the lock has the folders swept.
    let add = [
        "add-service",
        r#"{"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]}"#,
    ];
    let refused = |said: &str| {
        let output = bench.command(&add).deadline(std::time::Duration::from_secs(60)).output().unwrap();
        assert_eq!(output.status, ProcessStatus::Exit(1), "{}", output.stderr);
        assert!(output.stderr.contains(said), "{said}: {}", output.stderr);
        let left: Vec<_> = fs_err::read_dir(&elsewhere).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, [".omni-deploy-a1b2c3"]);
    };
    let archive = bench.store().join("manifests");
    fs_err::write(bench.store().join(".omni-deploy.lock"), "process 4194305 (gone)\n").unwrap();
    fs_err::os::unix::fs::symlink(&elsewhere, &archive).unwrap();
    refused("/store/manifests is a symbolic link, where a folder should be");
    fs_err::remove_file(&archive).unwrap();

    let manifest = bench.store().join("manifest.json");
    let good = fs_err::read(&manifest).unwrap();
    fs_err::write(elsewhere.join(".omni-deploy-a1b2c3"), &good).unwrap();
    fs_err::remove_file(&manifest).unwrap();
    Run::new("mkfifo").arg(&manifest).success().unwrap();
    refused("manifest.json is a pipe (FIFO), where a regular file should be; remove it: rm ");
    fs_err::remove_file(&manifest).unwrap();
    fs_err::os::unix::fs::symlink(elsewhere.join(".omni-deploy-a1b2c3"), &manifest).unwrap();
    refused("manifest.json is a symbolic link");
    fs_err::remove_file(&manifest).unwrap();
    fs_err::write(&manifest, good).unwrap();

    let lock = bench.store().join(".omni-deploy.lock");
    fs_err::remove_file(&lock).unwrap();
    Run::new("mkfifo").arg(&lock).success().unwrap();
    refused(".omni-deploy.lock is");
    fs_err::remove_file(&lock).unwrap();
    bench.ok(&add);
}

#[test]
fn a_service_without_hosts_needs_default_hosts() {
    let bench = Bench::new();
    let service = r#"{"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}}"#;
    let out = bench
        .command(&["add-service", service])
        .env("OMNI_DEPLOY_DEFAULT_HOSTS", "one two")
        .output()
        .unwrap();
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!(bench.manifest()["services"][0]["hosts"], json!(["one", "two"]));
}

#[test]
fn a_service_comes_from_a_file_or_from_stdin() {
    let bench = Bench::new();
    let file = bench.dir.path().join("s.json");
    fs_err::write(&file, r#"{"name": "a", "artifact": {"storePath": "/nix/store/placeholder"}}"#).unwrap();
    bench.ok(&["add-service", &format!("@{}", file.display())]);
    let stdin = r#"{"name": "b", "artifact": {"storePath": "/nix/store/placeholder"}}"#;
    let out = bench.command(&["add-service", "-"]).stdin(stdin).output().unwrap();
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    let out = bench.command(&["validate", "-"]).stdin(stdin).output().unwrap();
    assert_eq!((out.status, out.stderr.trim_end()), (ProcessStatus::Exit(0), "valid: stdin has service 'b'"));
    bench.ok(&["validate", file.to_str().unwrap()]);
    bench.ok(&["validate", bench.store().join("manifest.json").to_str().unwrap()]);
    bench.ok(&["validate"]);
    fs_err::write(&file, r#"{"version": 1, "serial": 1, "generation": "x", "services": []}"#).unwrap();
    let line = bench.refused(1, &["validate", file.to_str().unwrap()]);
    assert!(line.contains("s.json: generation: \"x\" is not a time"), "{line}");
}

#[test]
fn show_prints_what_is_stored_in_its_own_order_with_fields_of_a_newer_version() {
    let bench = Bench::with_ava();
    let stored = r#"{"zebra":1,"services":[{"hosts":["biz"],"name":"ava","artifact":{"storePath":"/nix/store/placeholder"},"new":{"z":1,"a":[]}}],"version":1,"serial":7,"generation":"2026-11-22T18:31:05Z"}"#;
    fs_err::write(bench.store().join("manifest.json"), stored).unwrap();
    let shown = bench.ok(&["show"]);
    assert!(
        shown.starts_with("{\n  \"zebra\": 1,\n  \"services\": [\n    {\n      \"hosts\": [\n"),
        "{shown}"
    );
    assert_eq!(
        serde_json::from_str::<Value>(&shown).unwrap(),
        serde_json::from_str::<Value>(stored).unwrap()
    );
    let one = bench.ok(&["show", "--service", "ava"]);
    assert!(one.starts_with("{\n  \"hosts\": [") && one.contains("\"z\": 1,\n    \"a\": []"), "{one}");
    bench.ok(&["set", "ava", "env.A=1"]);
    assert_eq!(
        (&bench.manifest()["zebra"], &bench.manifest()["services"][0]["new"]["z"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(bench.files()["manifests/manifest-20261122T183105Z-00000007.json"], stored.as_bytes());
    // JSON that says nothing usable is shown all the same, and said.
    fs_err::write(bench.store().join("manifest.json"), r#"{"version": 9, "x": 1}"#).unwrap();
    let out = bench.run(&["show"]);
    assert_eq!(
        (out.status, out.text().as_str()),
        (ProcessStatus::Exit(0), "{\n  \"version\": 9,\n  \"x\": 1\n}\n")
    );
    assert!(out.stderr.contains("warning") && out.stderr.contains("newer omni-deploy"), "{}", out.stderr);
    let line = bench.refused(1, &["update", "ava", &path("a")]);
    assert!(line.contains("upgrade this one"), "{line}");
    for (bytes, said) in [(&b""[..], "empty"), (b"{\"version\": 1,", "cut off"), (b"\xff\xfe", "not JSON")] {
        fs_err::write(bench.store().join("manifest.json"), bytes).unwrap();
        for args in [&["show"][..], &["set", "ava", "env.A=2"], &["validate"]] {
            let line = bench.refused(1, args);
            assert!(line.contains(said), "{args:?}: {line}");
        }
    }
}

#[test]
fn a_rollback_goes_to_the_version_before_and_twice_comes_back() {
    let bench = Bench::with_ava();
    let at = |bench: &Bench| {
        bench.manifest()["services"][0]["artifact"]["storePath"].as_str().unwrap().to_string()
    };
    bench.ok(&["update", "ava", &path("one")]);
    bench.ok(&["update", "ava", &path("two")]);
    bench.ok(&["rollback"]);
    assert_eq!((at(&bench), &bench.manifest()["serial"]), (path("one"), &json!(4)));
    let action = bench.manifest()["change"]["action"].as_str().unwrap().to_string();
    assert!(
        action.starts_with("rollback to manifest-") && action.ends_with("-00000002.json (version 2)"),
        "{action}"
    );
    bench.ok(&["rollback"]);
    assert_eq!(at(&bench), path("two"));
    bench.ok(&["rollback", "1"]);
    assert_eq!(at(&bench), "/nix/store/placeholder");
    let name = bench.archived().into_iter().find(|n| n.ends_with("00000002.json")).unwrap();
    bench.ok(&["rollback", &name]);
    assert_eq!(at(&bench), path("one"));
    let line = bench.refused(1, &["rollback", "manifest-2"]);
    assert!(line.contains("fits 6 versions: manifest-"), "{line}");
    assert_eq!(bench.manifest()["serial"], 7);
}

#[test]
fn a_rollback_of_one_service_leaves_the_others() {
    let bench = Bench::with_ava();
    bench.ok(&["add-service", r#"{"name": "web", "artifact": {"storePath": "/nix/store/placeholder"}}"#]);
    bench.ok(&["update", "ava", &path("one")]);
    bench.ok(&["update", "ava", &path("two")]);
    bench.ok(&["update", "web", &path("web")]);
    bench.ok(&["rollback", "--service", "ava"]);
    let now = bench.manifest();
    assert_eq!(now["services"][0]["artifact"]["storePath"], path("one"));
    assert_eq!(now["services"][1]["artifact"]["storePath"], path("web"));
    bench.ok(&["rollback", "2", "--service", "web"]);
    assert_eq!(bench.manifest()["services"][1]["artifact"]["storePath"], "/nix/store/placeholder");
    bench.ok(&["remove-service", "web"]);
    bench.ok(&["rollback", "2", "--service", "web"]);
    assert_eq!(bench.manifest()["services"][1]["name"], "web");
}

#[test]
fn a_rollback_mends_a_manifest_that_cannot_be_read() {
    let bench = Bench::with_ava();
    bench.ok(&["update", "ava", &path("one")]);
    fs_err::write(bench.store().join("manifest.json"), "{\"version\": 1,").unwrap();
    bench.ok(&["rollback"]);
    assert_eq!(bench.manifest()["services"][0]["artifact"]["storePath"], "/nix/store/placeholder");
    assert_eq!(bench.archived().len(), 2, "what could not be read is kept, too");
    fs_err::remove_file(bench.store().join("manifest.json")).unwrap();
    bench.ok(&["rollback", "1"]);
    assert_eq!(bench.manifest()["services"][0]["name"], "ava");
}

#[test]
fn list_shows_the_newest_first_in_columns_and_as_json() {
    let bench = Bench::with_ava();
    for n in 0..24 {
        bench.ok(&["set", "ava", &format!("env.N={n}")]);
    }
    let out = bench.run(&["list"]);
    assert_eq!(out.text().lines().count(), 21);
    assert!(out.stderr.contains("5 older ones: 'deploy-manifest list --all'"), "{}", out.stderr);
    assert_eq!(bench.ok(&["list", "-n", "3"]).lines().count(), 4);
    let document: Value = serde_json::from_str(&bench.ok(&["list", "--all", "--json"])).unwrap();
    assert_eq!(document["version"], 1);
    let rows = document["versions"].as_array().unwrap();
    let serials: Vec<u64> = rows.iter().map(|r| r["serial"].as_u64().unwrap()).collect();
    assert_eq!(serials, (1..=25).rev().collect::<Vec<_>>());
    assert_eq!((&rows[0]["current"], &rows[1]["current"]), (&json!(true), &json!(false)));
    assert_eq!(
        (&rows[24]["action"], &rows[0]["action"]),
        (&json!("add-service ava"), &json!("set ava env.N"))
    );
    assert!(rows.iter().all(|r| r["by"].as_str().unwrap().starts_with("ann@")));
}

#[test]
fn diff_names_services_and_fields() {
    let bench = Bench::with_ava();
    bench.refused(1, &["diff"]);
    bench.ok(&["update", "ava", &path("one")]);
    assert_eq!(
        bench.ok(&["diff"]),
        format!("ava: artifact.storePath /nix/store/placeholder → {}\n", path("one"))
    );
    bench.ok(&["remove-service", "ava"]);
    assert_eq!(bench.ok(&["diff"]), "- service ava\n");
    assert_eq!(bench.ok(&["diff", "3", "1"]), "+ service ava\n");
    assert_eq!(bench.ok(&["diff", "2", "2"]), "");
}

#[test]
fn an_edit_is_checked_then_published_and_a_wrong_text_is_kept() {
    let bench = Bench::with_ava();
    let edit = |script: &str| {
        let editor = bench.dir.path().join("editor");
        fs_err::write(&editor, format!("{script}\n")).unwrap();
        let editor = format!("sh {}", editor.display());
        bench.command(&["edit"]).without_env("VISUAL").env("EDITOR", editor).env("TMPDIR", bench.dir.path())
    };
    let out = edit("true").output().unwrap();
    assert_eq!(
        (out.status, out.stderr.trim_end()),
        (ProcessStatus::Exit(0), "unchanged: nothing was published")
    );
    let out = edit(r#"sed -i 's/"restartSec": 5/"restartSec": 7/' "$1""#).output().unwrap();
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!(bench.manifest()["services"][0]["systemd"]["restartSec"], 7);
    assert_eq!(bench.manifest()["change"]["action"], "edit ava");
    // Ctrl-C in an editor is the editor's, though the terminal sends it to both.
    let interrupted =
        r#"kill -INT $PPID; kill -QUIT $PPID; sed -i 's/"restartSec": 7/"restartSec": 8/' "$1""#;
    for (script, seconds) in [(interrupted, 8), (r#"sed -i 's/"restartSec": 8/"restartSec": 7/' "$1""#, 7)] {
        let out = edit(script).output().unwrap();
        assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
        assert_eq!(bench.manifest()["services"][0]["systemd"]["restartSec"], seconds);
    }
    let before = bench.files();
    for (script, said) in [
        (
            r#"sed -i 's/"restartSec": 7/"restartSec": -7/' "$1""#,
            "services[0].systemd.restartSec: invalid value: integer `-7`, expected a number of seconds from 0 to 86400",
        ),
        (
            r#"sed -i 's/"restartSec": 7/"restartSecs": 7/' "$1""#,
            "services[0].systemd.restartSecs: unknown field; did you mean 'restart' or 'restartSec'?",
        ),
        (r#"printf '{' > "$1""#, "cut off"),
    ] {
        let out = edit(script).output().unwrap();
        assert_eq!(out.status, ProcessStatus::Exit(1), "{}", out.stderr);
        assert!(out.stderr.contains(said), "{}", out.stderr);
        let kept = out.stderr.split("kept in ").nth(1).unwrap().split(':').next().unwrap();
        assert!(Path::new(kept).is_file(), "{}", out.stderr);
    }
    let out = edit("exit 3").output().unwrap();
    assert!(out.status == ProcessStatus::Exit(1) && out.stderr.contains("exit code 3"), "{}", out.stderr);
    assert_eq!(bench.files(), before);
    // What somebody else publishes while the text is open stays.
    let other = bench.dir.path().join("deploy-manifest");
    let script = format!(
        "{} add-service '{{\"name\": \"web\", \"artifact\": {{\"storePath\": \"/nix/store/placeholder\"}}}}'\n\
         sed -i 's/\"restartSec\": 7/\"restartSec\": 9/' \"$1\"",
        other.display()
    );
    let out = edit(&script).output().unwrap();
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!(bench.manifest()["services"][0]["systemd"]["restartSec"], 9);
    assert_eq!(bench.manifest()["services"][1]["name"], "web");
}

#[test]
fn every_command_has_help_with_an_example() {
    let bench = Bench::new();
    for command in [
        "init",
        "show",
        "list",
        "update",
        "add-service",
        "remove-service",
        "set",
        "edit",
        "diff",
        "rollback",
        "validate",
        "schema",
    ] {
        let help = bench.ok(&[command, "--help"]);
        assert!(help.contains(&format!("Usage: deploy-manifest {command}")), "{help}");
        let example = help.split("Examples:").nth(1).unwrap_or_default();
        assert!(example.contains(&format!("deploy-manifest {command}")), "{help}");
    }
    assert!(bench.ok(&["--help"]).contains("Examples:"));
    let schema: Value = serde_json::from_str(&bench.ok(&["schema"])).unwrap();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert!(bench.files().is_empty());
}

/// 16 processes of 25 updates each, every one to a path of its own; then nothing may be lost, of a store that
/// had one version with one service.
fn many_writers(call: &(dyn Fn(&[&str]) + Sync), store: &dyn Store) {
    const WRITERS: usize = 16;
    const UPDATES: usize = 25;
    let digits: Vec<char> = "0123456789abcdfghijklmnpqrsvwxyz".chars().collect();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let digits = &digits;
            scope.spawn(move || {
                for update in 0..UPDATES {
                    let mut hash: String = HASH[2..].into();
                    hash.extend([digits[writer], digits[update]]);
                    call(&["update", "ava", &format!("/nix/store/{hash}-ava")]);
                }
            });
        }
    });
    let read = |key: &str| match store.get(key, None, 1 << 20).unwrap() {
        GetResult::Found { bytes, .. } => parse::manifest(&bytes, Mode::Strict).unwrap(),
        other => panic!("{key}: {other:?}"),
    };
    let archived = store.list("manifests/").unwrap();
    assert_eq!(archived.len(), WRITERS * UPDATES);
    let mut versions: Vec<_> = archived.iter().map(|key| read(key)).collect();
    versions.push(read("manifest.json"));
    versions.sort_by_key(|m| m.serial);
    let serials: Vec<u64> = versions.iter().map(|m| m.serial).collect();
    assert_eq!(serials, (1..=1 + (WRITERS * UPDATES) as u64).collect::<Vec<_>>());
    let mut paths: Vec<String> =
        versions.iter().map(|m| m.services[0].artifact.store_path.to_string()).collect();
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), 1 + WRITERS * UPDATES, "an update was lost or made twice");
}

#[test]
fn many_writers_at_once_lose_no_update_in_a_directory() {
    let bench = Bench::with_ava();
    let call = |args: &[&str]| drop(bench.ok(args));
    many_writers(&call, &DirStore::new(&bench.store()));
}

#[test]
fn many_writers_at_once_lose_no_update_in_a_bucket() {
    let server = S3Server::start();
    let bench = Bench::new();
    let call = |args: &[&str]| {
        let run = bench
            .command(args)
            .env("OMNI_DEPLOY_STORE", server.url(""))
            .env("AWS_ACCESS_KEY_ID", DEVELOPER.0);
        let out = run.env("AWS_SECRET_ACCESS_KEY", DEVELOPER.1).output().unwrap();
        assert_eq!(out.status, ProcessStatus::Exit(0), "{args:?}: {}", out.stderr);
    };
    let path = format!("/nix/store/{HASH}-ava");
    let ava = json!({"name": "ava", "artifact": {"storePath": path}, "hosts": ["biz"]}).to_string();
    // The first version has the service already, as in the directory.
    call(&["add-service", &ava]);
    let StoreUrl::S3(location) = StoreUrl::parse(&server.url("")).unwrap() else { panic!("not s3") };
    let env = |name: &str| match name {
        "AWS_ACCESS_KEY_ID" => Some(DEVELOPER.0.to_string()),
        "AWS_SECRET_ACCESS_KEY" => Some(DEVELOPER.1.to_string()),
        _ => None,
    };
    many_writers(&call, &S3Store::open_in(&location, Arc::new(env)).unwrap());
}

/// `deploy-manifest` over a bucket, as a developer; what is in the bucket is looked at in the server's own folder.
struct Bucket {
    bench: Bench,
    server: S3Server,
}

impl Bucket {
    fn new() -> Self {
        Bucket { bench: Bench::new(), server: S3Server::start() }
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn command(&self, args: &[&str]) -> Run {
        self.bench
            .command(args)
            .env("OMNI_DEPLOY_STORE", self.server.url(""))
            .env("AWS_ACCESS_KEY_ID", DEVELOPER.0)
            .env("AWS_SECRET_ACCESS_KEY", DEVELOPER.1)
    }

    fn ok(&self, args: &[&str]) -> Output {
        let out = self.run(args);
        assert_eq!(out.status, ProcessStatus::Exit(0), "{args:?}: {}", out.stderr);
        out
    }

    fn object(&self, key: &str) -> Option<Vec<u8>> {
        fs_err::read(self.server.dir.path().join("root/box").join(key)).ok()
    }

    fn history(&self) -> Vec<Vec<u8>> {
        let folder = self.server.dir.path().join("root/box/manifests");
        let Ok(entries) = fs_err::read_dir(folder) else { return Vec::new() };
        let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|path| fs_err::read(path).unwrap()).collect()
    }

    /// How many of the requests so far were those of a trial.
    fn trials(&self) -> usize {
        self.server.log().iter().filter(|l| l.starts_with("PUT /box/probe/")).count()
    }
}

const AVA: &str = r#"{"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]}"#;

#[test]
fn the_history_is_complete_whatever_conflicts_the_store_has() {
    for (prefix, status, code) in [
        ("manifests/", 409, "ConditionalRequestConflict"),
        ("manifests/", 409, "OperationAborted"),
        ("manifests/", 409, ""),
        ("manifests/", 400, "RequestTimeout"),
        ("manifest.json", 409, "ConditionalRequestConflict"),
        ("manifest.json", 409, "OperationAborted"),
    ] {
        let bucket = Bucket::new();
        bucket.ok(&["add-service", AVA]);
        let mut versions = vec![bucket.object("manifest.json").unwrap()];
        for number in 0..3 {
            bucket.server.faults(&format!(
                r#"{{"fail": {{"status": {status}, "code": "{code}", "count": 1, "methods": ["PUT"],
                    "key_prefix": "{prefix}"}}}}"#
            ));
            bucket.ok(&["set", "ava", &format!("env.X={number}")]);
            assert!(bucket.server.log().iter().any(|l| l.ends_with(&format!(" {status}"))), "{code}");
            assert_eq!(bucket.history(), versions, "{prefix} {status} {code}");
            versions.push(bucket.object("manifest.json").unwrap());
        }
        bucket.ok(&["rollback", "2"]);
    }
}

#[test]
fn whatever_writes_first_refuses_a_store_that_ignores_conditions() {
    for args in [&["init"][..], &["add-service", AVA]] {
        let bucket = Bucket::new();
        bucket.server.faults(r#"{"ignore_conditions": true}"#);
        let refused = bucket.run(args);
        assert_eq!(refused.status, ProcessStatus::Exit(1), "{args:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("ignores If-None-Match"), "{args:?}: {}", refused.stderr);
        assert_eq!((bucket.object("manifest.json"), bucket.history()), (None, vec![]), "{args:?}");
    }
    // The same for whoever comes to it later from another machine.
    let bucket = Bucket::new();
    bucket.ok(&["add-service", AVA]);
    let before = bucket.object("manifest.json");
    fs_err::remove_dir_all(bucket.bench.dir.path().join(".local")).unwrap();
    bucket.server.faults(r#"{"ignore_conditions": true}"#);
    for args in [&["set", "ava", "env.X=1"][..], &["update", "ava", &path("ava")], &["remove-service", "ava"]]
    {
        let refused = bucket.run(args);
        assert!(refused.stderr.contains("ignores If-None-Match"), "{}", refused.stderr);
        assert_eq!((bucket.object("manifest.json"), bucket.history()), (before.clone(), vec![]), "{args:?}");
    }
}

#[test]
fn a_store_is_tried_once_and_remembered_also_where_nothing_can_be_written() {
    let bucket = Bucket::new();
    bucket.ok(&["add-service", AVA]);
    let trial = bucket.trials();
    assert!(trial > 0);
    bucket.ok(&["set", "ava", "env.X=1"]);
    bucket.ok(&["set", "ava", "env.X=2"]);
    assert_eq!(bucket.trials(), trial, "it was remembered");
    assert_eq!(bucket.object("probe"), None);
    let left = bucket.server.dir.path().join("root/box/probe");
    assert!(fs_err::read_dir(left).map_or(0, Iterator::count) == 0, "a trial left something");
    // What reads tries nothing.
    let elsewhere = |args: &[&str]| {
        let out = bucket.command(args).env("HOME", "/proc/nowhere").output().unwrap();
        assert_eq!(out.status, ProcessStatus::Exit(0), "{args:?}: {}", out.stderr);
    };
    elsewhere(&["show"]);
    elsewhere(&["list"]);
    assert_eq!(bucket.trials(), trial);
    // Without a home it works, and is tried each time.
    elsewhere(&["set", "ava", "env.X=3"]);
    elsewhere(&["set", "ava", "env.X=4"]);
    assert_eq!(bucket.trials(), trial * 3);
    // A directory is locked by this program itself.
    let bench = Bench::with_ava();
    assert!(!bench.dir.path().join(".local").exists());
}

#[test]
fn a_manifest_that_was_lost_is_put_back_from_the_copy_a_host_kept() {
    let bucket = Bucket::new();
    bucket.ok(&["add-service", AVA]);
    bucket.ok(&["set", "ava", "env.X=1"]);
    let copy = bucket.bench.dir.path().join("copy.json");
    fs_err::write(&copy, bucket.object("manifest.json").unwrap()).unwrap();
    let root = bucket.server.dir.path().join("root/box");
    fs_err::remove_file(root.join("manifest.json")).unwrap();
    let says = |parts: &[&str]| {
        for args in [&["set", "ava", "env.X=2"][..], &["show"]] {
            let out = bucket.run(args);
            assert_eq!(out.status, ProcessStatus::Exit(1), "{}", out.stderr);
            assert!(parts.iter().all(|p| out.stderr.contains(p)), "{parts:?} in {}", out.stderr);
        }
    };
    says(&[
        "any more",
        "up to version 1",
        "deploy-manifest rollback manifest-",
        "deploy-manifest rollback -",
    ]);
    fs_err::remove_dir_all(root.join("manifests")).unwrap();
    says(&["no manifest in", "yet; run 'deploy-manifest init'"]);
    // A host that reports there has obeyed one.
    fs_err::create_dir_all(root.join("hosts")).unwrap();
    fs_err::write(root.join("hosts/biz.json"), r#"{"serial": 2}"#).unwrap();
    says(&["any more", "ssh biz cat /var/lib/deployer/manifest.json | deploy-manifest rollback -"]);
    let out = bucket.command(&["rollback", "-"]).stdin(fs_err::read(&copy).unwrap()).output().unwrap();
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    let now: Value = serde_json::from_slice(&bucket.object("manifest.json").unwrap()).unwrap();
    assert_eq!((&now["serial"], &now["services"][0]["env"]["X"]), (&json!(3), &json!("1")), "{now}");
    let copy = format!("@{}", copy.display());
    let part = bucket.run(&["rollback", &copy, "--service", "ava"]);
    assert_eq!(part.status, ProcessStatus::Exit(2), "{}", part.stderr);
    let again = bucket.ok(&["rollback", &copy]);
    assert!(again.stderr.contains("unchanged"), "{}", again.stderr);
}

/// A bucket with these versions of two services, so many seconds apart: `bob` differs in each, `ava` never.
fn bucket_with_versions(serials: std::ops::RangeInclusive<i64>, apart: i64) -> Bucket {
    let bucket = Bucket::new();
    let root = bucket.server.dir.path().join("root/box");
    fs_err::create_dir_all(root.join("manifests")).unwrap();
    let count = *serials.end();
    for serial in serials {
        let time = Timestamp(1_700_000_000 + serial * apart);
        let service = |name: &str, n: i64| json!({"name": name, "artifact": {"storePath": path(name)}, "hosts": ["biz"], "env": {"N": n.to_string()}});
        let text = json!({
            "version": 1, "serial": serial, "generation": time.to_string(),
            "change": {"action": "update bob", "by": "ann"},
            "services": [service("ava", 0), service("bob", serial)]
        });
        let name = match serial == count {
            true => "manifest.json".to_string(),
            false => format!("manifests/manifest-{}-{serial:08}.json", time.compact()),
        };
        fs_err::write(root.join(name), text.to_string()).unwrap();
    }
    bucket
}

/// The requests of a command: those that list, and those that read an archived version.
fn requests_of(bucket: &Bucket, args: &[&str]) -> (Output, usize, usize) {
    let before = bucket.server.log().len();
    let output = bucket.run(args);
    let log = bucket.server.log().split_off(before);
    let path = |line: &String| line.split(' ').nth(1).unwrap().trim_end_matches('/').to_string();
    let listings = log.iter().filter(|l| l.starts_with("GET ") && path(l) == "/box").count();
    let read = log.iter().filter(|l| l.starts_with("GET /box/manifests/manifest-")).count();
    (output, listings, read)
}

#[test]
fn the_newest_of_thousands_of_versions_cost_two_listings() {
    // The oldest are not there, which nobody asks for: the server would take its time over them.
    for apart in [1, 3_600] {
        let bucket = bucket_with_versions(2_201..=2_500, apart);
        for (args, said, most) in [
            (&["list"][..], "2481", 2),
            (&["diff"], "2499", 2),
            (&["diff", "2490", "2499"], "2490", 2),
            (&["show", "2400"], "2400", 2),
            (&["rollback", "2450"], "2450", 2),
            // The one in force is years younger now than those before it.
            (&["rollback"], "2500", 4),
        ] {
            let (output, listings, _) = requests_of(&bucket, args);
            let text = format!("{}{}", output.text(), output.stderr);
            assert_eq!(output.status, ProcessStatus::Exit(0), "{args:?}: {text}");
            assert!(text.contains(said), "{args:?}: {text}");
            assert!((1..=most).contains(&listings), "{args:?}: {listings} listings");
        }
    }
}

#[test]
fn a_services_last_change_is_searched_without_reading_a_version_twice() {
    let bucket = bucket_with_versions(1..=260, 60);
    let (output, listings, read) = requests_of(&bucket, &["rollback", "--service", "ava"]);
    assert_eq!(output.status, ProcessStatus::Exit(1), "{}", output.text());
    assert!(
        output.stderr.contains("no version before the current one has a different 'ava'"),
        "{}",
        output.stderr
    );
    assert_eq!((listings, read), (1, 200));
    // What is found at once is not searched for among all.
    let (output, _, read) = requests_of(&bucket, &["rollback", "--service", "bob"]);
    assert_eq!(output.status, ProcessStatus::Exit(0), "{}", output.stderr);
    assert!(
        output.stderr.contains("rollback bob to manifest-") && output.stderr.contains("259"),
        "{}",
        output.stderr
    );
    assert!((1..=16).contains(&read), "{read}");
}

#[test]
fn nothing_of_a_manifest_steers_the_terminal_that_shows_it() {
    let bench = Bench::with_ava();
    bench.ok(&["set", "ava", "env.A=1"]);
    let odd = "\u{9b}2J\u{7f}\u{202e}\u{200b}";
    let mut manifest = bench.manifest();
    manifest[odd] = odd.into();
    manifest["services"][0]["note"] = json!({odd: [odd]});
    fs_err::write(bench.store().join("manifest.json"), manifest.to_string()).unwrap();
    let steers = |c: char| c != '\n' && c.is_control() || "\u{202e}\u{200b}".contains(c);
    let clean = |args: &[&str]| {
        let out = bench.run(args);
        let said = format!("{}{}", out.text(), out.stderr);
        assert!(!said.contains(steers), "{args:?}: {said:?}");
        out
    };
    for args in [&["diff"][..], &["validate"], &["list"], &["list", "--json"]] {
        assert_eq!(clean(args).status, ProcessStatus::Exit(0), "{args:?}");
    }
    let read = |out: Output| serde_json::from_slice::<Value>(&out.stdout).unwrap();
    assert_eq!(read(clean(&["show"])), manifest, "what parses it finds what is there");
    assert_eq!(read(clean(&["show", "--service", "ava"])), manifest["services"][0]);
    // Also where nothing can be used of it.
    manifest["change"]["by"] = odd.into();
    fs_err::write(bench.store().join("manifest.json"), manifest.to_string()).unwrap();
    for args in [&["show"][..], &["list"], &["list", "--json"], &["validate"], &["set", "ava", "env.A=2"]] {
        clean(args);
    }
}
