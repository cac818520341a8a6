//! Signed manifests through the built binary, over directories: what somebody who can write the store, but has
//! no key, can make of it.

use omni_deploy::runner::{Output, ProcessStatus, Run};
use serde_json::{Value, json};
use std::path::PathBuf;

const PATH: &str = "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava";
const OTHER: &str = "/nix/store/1c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava";

/// Two stores, and developers with homes of their own.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// Ann has set her machine up for the production store and pushed a service.
    fn new() -> Self {
        let world = World { dir: tempfile::tempdir().unwrap() };
        world.ok("ann", &["init"]);
        let ava = json!({"name": "ava", "artifact": {"storePath": PATH}, "hosts": ["biz"]}).to_string();
        world.ok("ann", &["manifest", "add-service", &ava]);
        world
    }

    fn file(&self, store: &str) -> PathBuf {
        self.dir.path().join(store).join("manifest.json")
    }

    fn call_in(&self, store: &str, who: &str, args: &[&str]) -> Output {
        self.run_in(store, who, Run::new(env!("CARGO_BIN_EXE_omni-deploy")).args(args))
    }

    fn run_in(&self, store: &str, who: &str, run: Run) -> Output {
        let home = self.dir.path().join(who);
        fs_err::create_dir_all(&home).unwrap();
        run.env("OMNI_DEPLOY_STORE", format!("file://{}", self.dir.path().join(store).display()))
            .env("OMNI_DEPLOY_HOST", "biz")
            .env("HOME", &home)
            .env("USER", who)
            .without_env("XDG_CONFIG_HOME")
            .without_env("XDG_STATE_HOME")
            .without_env("JOURNAL_STREAM")
            .output()
            .unwrap()
    }

    fn ok(&self, who: &str, args: &[&str]) -> String {
        let out = self.call_in("prod", who, args);
        assert_eq!(out.status, ProcessStatus::Exit(0), "{args:?}: {}", out.stderr);
        out.text()
    }

    /// The call is refused in one line, and the store stays as it is.
    fn refused(&self, who: &str, args: &[&str], reason: &str) {
        let before = fs_err::read(self.file("prod")).unwrap();
        let out = self.call_in("prod", who, args);
        assert_eq!(out.status, ProcessStatus::Exit(1), "{args:?}: {}", out.stderr);
        assert!(out.stderr.contains(reason) && out.stderr.lines().count() == 1, "{args:?}: {}", out.stderr);
        assert_eq!(fs_err::read(self.file("prod")).unwrap(), before, "{args:?}");
    }

    /// The command between the quotes of `'deploy-manifest …'` in a message, as somebody types it.
    fn types(&self, who: &str, message: &str, begins: &str) -> Output {
        let quoted = message
            .split('\'')
            .find_map(|part| part.strip_prefix("deploy-manifest ").filter(|p| p.starts_with(begins)));
        let words: Vec<&str> =
            quoted.unwrap_or_else(|| panic!("no '{begins}' in {message}")).split(' ').collect();
        self.call_in("prod", who, &[&["manifest"], &words[..]].concat())
    }

    /// As [`World::refused`], with what was said.
    fn says(&self, who: &str, args: &[&str], reason: &str) -> String {
        self.refused(who, args, reason);
        self.call_in("prod", who, args).stderr
    }

    /// An edit whose editor does this with the text, `$1`.
    fn edits(&self, who: &str, script: &str) -> Output {
        let editor = self.dir.path().join("editor");
        fs_err::write(&editor, format!("{script}\n")).unwrap();
        let home = self.dir.path().join(who);
        Run::new(env!("CARGO_BIN_EXE_omni-deploy"))
            .args(["manifest", "edit"])
            .env("OMNI_DEPLOY_STORE", format!("file://{}", self.dir.path().join("prod").display()))
            .env("HOME", &home)
            .env("USER", who)
            .env("EDITOR", format!("sh {}", editor.display()))
            .env("TMPDIR", self.dir.path())
            .without_env("VISUAL")
            .without_env("XDG_CONFIG_HOME")
            .without_env("XDG_STATE_HOME")
            .without_env("JOURNAL_STREAM")
            .output()
            .unwrap()
    }

    fn archive(&self) -> PathBuf {
        self.dir.path().join("prod/manifests")
    }

    /// The archived version of this number.
    fn archived(&self, serial: u64) -> PathBuf {
        let end = format!("-{serial:08}.json");
        let mut names = fs_err::read_dir(self.archive()).unwrap().map(|e| e.unwrap().path());
        names.find(|p| p.to_str().unwrap().ends_with(&end)).unwrap()
    }

    /// Bob's machine, which trusts Ann's key and his own, and whose key Ann's machine trusts.
    fn with_bob(&self) {
        self.ok("bob", &["keygen", "bob-1"]);
        let of = |who: &str| self.dir.path().join(who).join(".config/omni-deploy");
        let key = |who: &str| {
            let keys = fs_err::read_dir(of(who).join("keys")).unwrap().map(|e| e.unwrap().path());
            let public = keys.into_iter().find(|p| p.extension().unwrap() == "pub").unwrap();
            fs_err::read_to_string(public).unwrap().trim().to_string()
        };
        let keys = json!([key("ann"), key("bob")]);
        for who in ["ann", "bob"] {
            let file = of(who).join("config.json");
            let text = fs_err::read_to_string(&file).unwrap_or_else(|_| "{}".into());
            let mut config: Value = serde_json::from_str(&text).unwrap();
            config["trustedPublicKeys"] = keys.clone();
            if who == "bob" {
                config["secretKeyFile"] = of("bob").join("keys/bob-1.secret").display().to_string().into();
            }
            fs_err::write(file, config.to_string()).unwrap();
        }
    }

    fn env(&self) -> Value {
        self.manifest()["services"][0]["env"].clone()
    }

    fn manifest(&self) -> Value {
        serde_json::from_slice(&fs_err::read(self.file("prod")).unwrap()).unwrap()
    }

    /// Somebody with the right to write, and no key.
    fn tamper(&self, change: impl FnOnce(&mut Value)) {
        let mut manifest = self.manifest();
        change(&mut manifest);
        fs_err::write(self.file("prod"), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    }
}

#[test]
fn what_is_published_is_signed_for_its_store() {
    let world = World::new();
    assert_eq!(
        world.ok("ann", &["manifest", "verify"]).trim(),
        "omni-deploy-ann-".to_string() + &host() + "-1"
    );
    let manifest = world.manifest();
    assert_eq!(manifest["store"], format!("file://{}", world.dir.path().join("prod").display()));
    assert_eq!(manifest["signatures"].as_array().unwrap().len(), 1);
}

fn host() -> String {
    omni_deploy::names::HostName::of_this_machine().unwrap().to_string()
}

#[test]
fn no_change_is_built_upon_what_nobody_trusted_has_signed() {
    type Attack = (&'static str, fn(&mut Value));
    let attacks: [Attack; 4] = [
        ("was changed after it was signed", |m| m["services"][0]["artifact"]["storePath"] = OTHER.into()),
        ("was changed after it was signed", |m| m["serial"] = 9_007_199_254_740_991u64.into()),
        ("it is not signed", |m| drop(m.as_object_mut().unwrap().remove("signatures"))),
        ("was changed after it was signed", |m| m["store"] = "file:///elsewhere".into()),
    ];
    for (reason, attack) in attacks {
        let world = World::new();
        world.tamper(attack);
        world.refused("ann", &["manifest", "set", "ava", "env.A=1"], reason);
        world.refused("ann", &["manifest", "update", "ava", OTHER], reason);
        world.refused("ann", &["manifest", "rollback", "--service", "ava", "1"], reason);
        assert_eq!(world.call_in("prod", "ann", &["manifest", "verify"]).status, ProcessStatus::Exit(1));
        // The way back does not need what is there, nor does it take the serial from it.
        fs_err::write(
            world.file("prod").with_file_name("manifests/manifest-20991231T235959Z-9007199254740991.json"),
            "",
        )
        .unwrap();
        world.ok("ann", &["manifest", "rollback", "1"]);
        world.ok("ann", &["manifest", "verify"]);
        assert_eq!(world.manifest()["serial"], 3, "one after what was forged in the place of 2");
    }
}

#[test]
fn a_manifest_of_one_store_means_nothing_in_another() {
    let world = World::new();
    fs_err::create_dir_all(world.dir.path().join("staging")).unwrap();
    fs_err::copy(world.file("prod"), world.file("staging")).unwrap();
    let out = world.call_in("staging", "ann", &["manifest", "update", "ava", OTHER]);
    assert_eq!(out.status, ProcessStatus::Exit(1));
    assert!(out.stderr.contains("was signed for the store"), "{}", out.stderr);
}

#[test]
fn a_file_put_among_the_old_versions_is_not_gone_back_to() {
    let world = World::new();
    let archive = world.dir.path().join("prod/manifests");
    let old = fs_err::read_dir(&archive).unwrap().next().unwrap().unwrap().path();
    let mut forged: Value = serde_json::from_slice(&fs_err::read(&old).unwrap()).unwrap();
    forged["services"] = json!([{"name": "evil", "artifact": {"storePath": OTHER}, "hosts": ["biz"]}]);
    fs_err::write(&old, forged.to_string()).unwrap();
    world.refused("ann", &["manifest", "rollback"], "was changed after it was signed");
}

#[test]
fn a_copy_from_elsewhere_is_gone_back_to_only_if_it_was_signed_for_this_store() {
    let world = World::new();
    let copy = world.dir.path().join("copy.json");
    let at = format!("@{}", copy.display());
    let good = fs_err::read(world.file("prod")).unwrap();
    let mut forged: Value = serde_json::from_slice(&good).unwrap();
    forged["services"][0]["artifact"]["storePath"] = OTHER.into();
    fs_err::write(&copy, forged.to_string()).unwrap();
    world.refused("ann", &["manifest", "rollback", &at], "the copy is not to be trusted");
    let serial = |store: &str| -> u64 {
        let manifest: Value = serde_json::from_slice(&fs_err::read(world.file(store)).unwrap()).unwrap();
        manifest["serial"].as_u64().unwrap()
    };
    let before = serial("prod");
    world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
    fs_err::write(&copy, &good).unwrap();
    // What came after it is undone only by who means that: a host may say that its copy be put back, and be nobody's.
    let out = world.call_in("prod", "ann", &["manifest", "rollback", &at]);
    assert!(out.status == ProcessStatus::Exit(1) && out.stderr.contains("add '-y'"), "{}", out.stderr);
    assert_eq!((world.env(), serial("prod")), (json!({"A": "1"}), before + 1));
    world.ok("ann", &["manifest", "rollback", "-y", &at]);
    assert_eq!(serial("prod"), before + 2);
    let elsewhere = world.call_in("staging", "ann", &["manifest", "rollback", &at]);
    assert!(elsewhere.stderr.contains("signed for the store"), "{}", elsewhere.stderr);
    assert!(!world.file("staging").exists());
}

#[test]
fn a_second_developer_is_told_what_to_do_and_then_both_can_write() {
    let world = World::new();
    world.ok("bob", &["keygen", "bob-1"]);
    let bob = world.dir.path().join("bob/.config/omni-deploy");
    let config = |keys: &[String]| {
        json!({"secretKeyFile": bob.join("keys/bob-1.secret"), "trustedPublicKeys": keys}).to_string()
    };
    let bobs = fs_err::read_to_string(bob.join("keys/bob-1.pub")).unwrap().trim().to_string();
    fs_err::write(bob.join("config.json"), config(std::slice::from_ref(&bobs))).unwrap();
    world.refused("bob", &["manifest", "update", "ava", OTHER], "'trustedPublicKeys' does not have");
    let keys = world.dir.path().join("ann/.config/omni-deploy/keys");
    let file =
        fs_err::read_dir(keys).unwrap().map(|e| e.unwrap().path()).find(|p| p.extension().unwrap() == "pub");
    let anns = fs_err::read_to_string(file.unwrap()).unwrap().trim().to_string();
    fs_err::write(bob.join("config.json"), config(&[bobs.clone(), anns.clone()])).unwrap();
    world.ok("bob", &["manifest", "update", "ava", OTHER]);
    assert_eq!(world.ok("bob", &["manifest", "verify"]).trim(), "bob-1");
    // Ann, who does not trust Bob's key yet, can still vouch for what is there, beside him.
    world.ok("ann", &["--trusted-public-keys", &format!("{bobs} {anns}"), "manifest", "sign"]);
    assert_eq!(world.manifest()["signatures"].as_array().unwrap().len(), 2);
    assert_eq!(world.manifest()["serial"], 3, "the same version");
    world.ok("ann", &["manifest", "verify"]);
}

#[test]
fn a_machine_without_a_key_publishes_nothing_where_signatures_are_expected() {
    let world = World::new();
    world.refused("eve", &["manifest", "update", "ava", OTHER], "this machine has no key");
}

#[test]
fn keygen_makes_a_private_file_and_never_overwrites_it() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new();
    let public = world.ok("ann", &["keygen", "release"]);
    let keys = world.dir.path().join("ann/.config/omni-deploy/keys");
    assert!(public.starts_with("release:"));
    assert_eq!(fs_err::read_to_string(keys.join("release.pub")).unwrap().trim(), public.trim());
    let mode = fs_err::metadata(keys.join("release.secret")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let before = fs_err::read(keys.join("release.secret")).unwrap();
    world.refused("ann", &["keygen", "release"], "exists and is kept");
    assert_eq!(fs_err::read(keys.join("release.secret")).unwrap(), before);
}

#[test]
fn an_old_version_put_back_is_not_built_upon_and_what_it_took_the_place_of_is_published_again() {
    let world = World::new();
    world.ok("ann", &["manifest", "set", "ava", "env.AUTH=none"]);
    world.ok("ann", &["manifest", "set", "ava", "env.AUTH=required"]);
    let fixed = world.manifest();
    assert_eq!(fixed["serial"], 4);
    // Somebody who can write the store undoes the fix.
    fs_err::copy(world.archived(3), world.file("prod")).unwrap();
    for args in [
        &["manifest", "set", "ava", "env.COLOUR=blue"][..],
        &["manifest", "update", "ava", OTHER],
        &["manifest", "rollback"],
        &["manifest", "sign"],
        &["manifest", "verify"],
    ] {
        world.refused("ann", args, "an older version was put back");
    }
    let out = world.edits("ann", "echo >>$1");
    assert!(out.status == ProcessStatus::Exit(1) && out.stderr.contains("was put back"), "{}", out.stderr);
    // She does what she is told.
    let said = world.says("ann", &["manifest", "set", "ava", "env.COLOUR=blue"], "has seen version 4");
    let out = world.types("ann", &said, "rollback @");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    world.ok("ann", &["manifest", "set", "ava", "env.COLOUR=blue"]);
    assert_eq!(world.env(), json!({"AUTH": "required", "COLOUR": "blue"}));
    assert_eq!(world.manifest()["serial"], 6);
    let previous = world.manifest()["previous"].clone();
    for (at, begins) in ["5:", "4:", "3:", "2:", "1:"].iter().enumerate() {
        assert!(previous[at].as_str().unwrap().starts_with(begins), "{previous}");
    }
    // And what is older on purpose is a new version.
    fs_err::copy(world.archived(3), world.file("prod")).unwrap();
    let said = world.says("ann", &["manifest", "set", "ava", "env.COLOUR=blue"], "has seen version 6");
    let out = world.types("ann", &said, "rollback 3");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"AUTH": "none"}), &json!(7)));
    world.ok("ann", &["manifest", "verify"]);
}

#[test]
fn what_somebody_published_upon_an_old_version_is_noticed_by_everybody_else_and_both_go_on() {
    let world = World::new();
    world.with_bob();
    world.ok("bob", &["manifest", "set", "ava", "env.AUTH=none"]);
    world.ok("ann", &["manifest", "set", "ava", "env.AUTH=required"]);
    fs_err::copy(world.archived(3), world.file("prod")).unwrap();
    // Bob's machine has not seen version 4.
    world.ok("bob", &["manifest", "set", "ava", "env.COLOUR=blue"]);
    assert_eq!(world.manifest()["serial"], 4);
    let said = world.says("ann", &["manifest", "set", "ava", "env.A=1"], "does not come after version 4");
    world.ok("bob", &["manifest", "set", "ava", "env.COLOUR=red"]);
    world.refused("ann", &["manifest", "set", "ava", "env.A=1"], "does not come after version 4");
    let out = world.types("ann", &said, "rollback @");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"AUTH": "required"}), &json!(6)));
    world.ok("bob", &["manifest", "set", "ava", "env.COLOUR=red"]);
    world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
    assert_eq!(world.env(), json!({"A": "1", "AUTH": "required", "COLOUR": "red"}));
}

#[test]
fn a_store_that_was_made_anew_or_restored_on_purpose_is_accepted_by_its_number() {
    let world = World::new();
    world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
    let backup = fs_err::read(world.archived(2)).unwrap();
    fs_err::write(world.file("prod"), &backup).unwrap();
    let said = world.says("ann", &["manifest", "set", "ava", "env.B=1"], "verify --accept-version 2");
    world.refused("ann", &["manifest", "verify", "--accept-version", "3"], "not version 3");
    let out = world.types("ann", &said, "verify --accept-version");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    world.ok("ann", &["manifest", "set", "ava", "env.B=1"]);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"B": "1"}), &json!(3)));
    // Emptied: what was seen is put back as it is said, or the number goes on.
    for words in [&["rollback", "@"][..], &["init"]] {
        fs_err::remove_dir_all(world.dir.path().join("prod")).unwrap();
        let set = world.call_in("prod", "ann", &["manifest", "set", "ava", "env.C=1"]);
        assert!(set.stderr.contains("any more, and this machine has seen version"), "{}", set.stderr);
        let ava = json!({"name": "b", "artifact": {"storePath": PATH}, "hosts": ["biz"]}).to_string();
        let add = world.call_in("prod", "ann", &["manifest", "add-service", &ava]);
        assert_eq!(add.status, ProcessStatus::Exit(1), "nothing else is lost by the way: {}", add.stderr);
        let out = world.types("ann", &set.stderr, &words.join(" "));
        assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    }
    assert_eq!((&world.manifest()["serial"], &world.manifest()["services"]), (&json!(5), &json!([])));
}

#[test]
fn without_a_home_it_is_said_that_nothing_is_remembered_and_the_work_goes_on() {
    let world = World::new();
    let key = world.dir.path().join("ann/.config/omni-deploy/config.json");
    let config: Value = serde_json::from_slice(&fs_err::read(key).unwrap()).unwrap();
    let out = Run::new(env!("CARGO_BIN_EXE_omni-deploy"))
        .args(["manifest", "set", "ava", "env.A=1"])
        .env("OMNI_DEPLOY_STORE", format!("file://{}", world.dir.path().join("prod").display()))
        .env("OMNI_DEPLOY_SECRET_KEY_FILE", config["secretKeyFile"].as_str().unwrap())
        .env("OMNI_DEPLOY_TRUSTED_PUBLIC_KEYS", config["trustedPublicKeys"][0].as_str().unwrap())
        .env("HOME", "/proc/nowhere")
        .without_env("XDG_CONFIG_HOME")
        .without_env("XDG_STATE_HOME")
        .without_env("JOURNAL_STREAM")
        .output()
        .unwrap();
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!(out.stderr.matches("will not remember").count(), 1, "{}", out.stderr);
    assert_eq!(world.env(), json!({"A": "1"}));
}

#[test]
fn an_edit_of_a_damaged_or_forged_manifest_starts_from_the_newest_that_is_believed() {
    let forged = |world: &World| {
        let text = fs_err::read_to_string(world.file("prod")).unwrap();
        text.replace("\"command\": null", "\"command\": \"/bin/sh -c id\"")
    };
    let mend = |world: &World| {
        // The developer takes the stray comma out, if there is one.
        let seen = world.dir.path().join("seen.json");
        let script =
            format!("cp $1 {}; sed -i 's/,,/,/; s/\"restartSec\": 5/\"restartSec\": 7/' $1", seen.display());
        let out = world.edits("ann", &script);
        (out, fs_err::read_to_string(seen).unwrap())
    };
    for (damage, said) in [(true, "cannot be used"), (false, "was changed after it was signed")] {
        for forgets in [false, true] {
            let world = World::new();
            world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
            let mut text = forged(&world);
            if damage {
                text = text.replacen("\"serial\": 3,", "\"serial\": 3,,", 1);
            }
            fs_err::write(world.file("prod"), text).unwrap();
            if forgets {
                fs_err::remove_dir_all(world.dir.path().join("ann/.local/state")).unwrap();
            }
            let (out, seen) = mend(&world);
            assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
            assert!(out.stderr.contains(said) && !seen.contains("/bin/sh"), "{}{seen}", out.stderr);
            let base = if forgets { "you edit version 2" } else { "you edit version 3" };
            assert!(out.stderr.contains(base), "{}", out.stderr);
            assert_eq!(out.stderr.contains("exec.command"), !damage, "{}", out.stderr);
            let manifest = world.manifest();
            assert_eq!(manifest["services"][0]["exec"]["command"], Value::Null);
            assert_eq!(manifest["services"][0]["systemd"]["restartSec"], 7);
            assert_eq!(manifest["services"][0]["env"], if forgets { json!({}) } else { json!({"A": "1"}) });
            assert_eq!(manifest["serial"], 4);
            world.ok("ann", &["manifest", "verify"]);
            world.ok("ann", &["manifest", "set", "ava", "env.B=1"]);
        }
    }
}

#[test]
fn a_kept_draft_is_published_upon_what_it_was_made_from_and_nothing_else() {
    let world = World::new();
    let kept = |out: &Output| {
        assert_eq!(out.status, ProcessStatus::Exit(1), "{}", out.stderr);
        PathBuf::from(out.stderr.split("kept in ").nth(1).unwrap().split(": correct").next().unwrap())
    };
    let out = world.edits("ann", "sed -i 's/\"restartSec\": 5/\"restartSec\": -7/' $1");
    let draft = kept(&out);
    let text = fs_err::read_to_string(&draft).unwrap().replace("-7", "7");
    fs_err::write(&draft, text).unwrap();
    // Meanwhile somebody else changes another service.
    let web = json!({"name": "web", "artifact": {"storePath": PATH}, "hosts": ["biz"]}).to_string();
    world.ok("ann", &["manifest", "add-service", &web]);
    let out = world.types("ann", &out.stderr, "edit --draft");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    let manifest = world.manifest();
    assert_eq!(manifest["services"][0]["systemd"]["restartSec"], 7);
    assert_eq!(manifest["services"][1]["name"], "web");
    // A text whose base is not known, or was signed by nobody, is not taken.
    let at = draft.display().to_string();
    let base = draft.with_file_name("base.json");
    let text = fs_err::read_to_string(&base).unwrap();
    fs_err::write(&base, text.replace("\"command\": null", "\"command\": \"/bin/sh\"")).unwrap();
    world.refused(
        "ann",
        &["manifest", "edit", "--draft", &at],
        "made from a version that is not to be trusted",
    );
    fs_err::remove_file(base).unwrap();
    world.refused("ann", &["manifest", "edit", "--draft", &at], "open 'deploy-manifest edit'");
}

#[test]
fn an_archived_version_counts_only_under_the_name_that_its_content_makes() {
    let world = World::new();
    for n in 1..=3 {
        world.ok("ann", &["manifest", "set", "ava", &format!("env.N={n}")]);
    }
    // The signed bytes of version 2 under other names, one of which no terminal should see.
    let old = fs_err::read(world.archived(2)).unwrap();
    for name in [
        "manifest-20991231T235959Z-00000004.json",
        "manifest-20991231T235959Z-00000900.json",
        "manifest-2099\u{9b}31T235959Z-00000004.json",
    ] {
        fs_err::write(world.archive().join(name), &old).unwrap();
    }
    let list = world.call_in("prod", "ann", &["manifest", "list"]);
    assert_eq!(list.status, ProcessStatus::Exit(0), "{}", list.stderr);
    assert_eq!(list.text().matches("not a version: it holds version 2").count(), 2, "{}", list.text());
    assert!(list.stderr.contains("not a version: manifests/manifest-2099\\u{9b}"), "{}", list.stderr);
    assert!(!(list.text() + &list.stderr).contains('\u{9b}'));
    for args in
        [&["manifest", "rollback", "900"][..], &["manifest", "verify", "900"], &["manifest", "diff", "900"]]
    {
        world.refused("ann", args, "not a version: it holds version 2");
    }
    // A number means the version that has it.
    world.ok("ann", &["manifest", "verify", "4"]);
    world.ok("ann", &["manifest", "rollback"]);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"N": "2"}), &json!(6)));
    assert!(!world.manifest()["change"].to_string().contains("2099"));
    world.ok("ann", &["manifest", "rollback", "4"]);
    // Nor does the number go down, or up.
    world.tamper(|m| m["serial"] = 3.into());
    let seen = world.dir.path().join("ann/.local/state");
    fs_err::remove_dir_all(seen).unwrap();
    world.ok("ann", &["manifest", "rollback", "5"]);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"N": "3"}), &json!(8)));
    world.ok("ann", &["manifest", "verify"]);
}

#[test]
fn sign_shows_what_nobody_trusted_has_signed_and_signs_only_what_was_looked_at() {
    let world = World::new();
    // In the place of what hosts have obeyed, nothing else is signed.
    let good = fs_err::read(world.file("prod")).unwrap();
    world.tamper(|m| m["services"][0]["env"] = json!({"A": "1"}));
    let out = world.call_in("prod", "ann", &["manifest", "sign"]);
    assert!(
        out.status == ProcessStatus::Exit(1) && out.stderr.contains("ava: env.A (none) → 1"),
        "{}",
        out.stderr
    );
    assert!(out.stderr.contains("no host that obeyed version 2"), "{}", out.stderr);
    fs_err::write(world.file("prod"), good).unwrap();
    world.tamper(|m| {
        m["serial"] = 3.into();
        m["services"][0]["exec"]["command"] = "/bin/sh -c id".into();
        let paths: Vec<String> = (0..20).map(|n| format!("/var/lib/ava/{n}")).collect();
        m["services"][0]["systemd"]["readWritePaths"] =
            json!([&paths[..], &["/root/.ssh".to_string()]].concat());
        m["services"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "evil", "artifact": {"storePath": OTHER}, "hosts": ["biz"]}));
    });
    let before = fs_err::read(world.file("prod")).unwrap();
    let shown = world.call_in("prod", "ann", &["manifest", "sign"]);
    assert_eq!(shown.status, ProcessStatus::Exit(1), "{}", shown.stderr);
    for part in [
        "ava: exec.command null → /bin/sh -c id",
        "+ service evil",
        OTHER,
        "/root/.ssh",
        "nothing was signed",
    ] {
        assert!(shown.stderr.contains(part), "{part}: {}", shown.stderr);
    }
    assert_eq!(fs_err::read(world.file("prod")).unwrap(), before);
    world.refused("ann", &["manifest", "sign", "--hash", "0123456789ab"], "look at it again");
    // What is signed is what was shown.
    world.tamper(|m| m["services"][0]["env"] = json!({"LATER": "1"}));
    let late = world.types("ann", &shown.stderr, "sign --hash");
    assert!(
        late.status == ProcessStatus::Exit(1) && late.stderr.contains("look at it again"),
        "{}",
        late.stderr
    );
    fs_err::write(world.file("prod"), before).unwrap();
    // Two that begin alike are soon found.
    let whole = hash_in(&world);
    world.refused("ann", &["manifest", "sign", "--hash", &whole[..32]], "look at it again");
    let out = world.types("ann", &shown.stderr, "sign --hash");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    world.ok("ann", &["manifest", "verify"]);
}

/// Ways in which somebody without a key fills the 32 MiB that a manifest may have, each around what is published.
fn floods(good: &Value) -> Vec<(&'static str, Vec<u8>)> {
    let room = (32 << 20) - 64 * 1024;
    let filled = |before: &str, piece: &str, after: &str| {
        let mut text = before.to_string();
        text.push_str(&piece.repeat((room - before.len()) / piece.len()));
        text.truncate(text.trim_end_matches(',').len());
        text.push_str(after);
        text.into_bytes()
    };
    let rest = &good.to_string()[1..];
    let service = |more: &str| {
        format!(r#"{{"name":"x","artifact":{{"storePath":"/nix/store/placeholder"}},"hosts":["biz"],{more}"#)
    };
    let head =
        r#"{"version":1,"serial":9,"generation":"2026-11-22T18:31:05Z","signatures":["a:b"],"services":["#;
    let pair = r#"{"":0},"#;
    vec![
        ("an unknown field", filled(r#"{"later":["#, pair, &format!("],{rest}"))),
        ("unknown members", filled(r#"{"later":{"#, r#""":0,"#, &format!("}},{rest}"))),
        (
            "an unknown field of a service",
            filled(&format!("{head}{}", service(r#""later":["#)), pair, "]}]}"),
        ),
        ("hosts", filled(&format!(r#"{head}{{"name":"x","hosts":["#), r#""","#, "]}]}")),
        ("services", filled(head, &format!("{}}},", service(r#""env":{}"#)), "]}")),
        ("a text", filled(&format!("{head}{}", service(r#""env":{"A":""#)), "x", r#""}}]}"#)),
        ("what was changed", filled(r#"{"change":{"action":["#, pair, &format!("]}},{rest}"))),
        ("signatures", filled(r#"{"signatures":["#, r#""a:b","#, &format!("],{rest}"))),
        ("depth", filled(r#"{"later":"#, "[", "")),
        ("what the bounds let through", {
            let env: Vec<String> = (0..44).map(|n| format!(r#""V{n}":"""#)).collect();
            let env = env.join(",");
            let service = |n: usize| {
                format!(
                    r#"{{"name":"x{n}","artifact":{{"storePath":"/nix/store/placeholder"}},"hosts":["biz"],"env":{{{env}}}}}"#
                )
            };
            let services: Vec<String> = (0..29_000).map(service).collect();
            format!("{head}{}]}}", services.join(",")).into_bytes()
        }),
    ]
}

#[test]
fn the_largest_manifest_of_a_stranger_costs_no_command_more_than_200_mib() {
    let world = World::new();
    let good = world.manifest();
    let bin = env!("CARGO_BIN_EXE_omni-deploy");
    let commands = [
        &["status"][..],
        &["manifest", "set", "ava", "env.A=1"],
        &["manifest", "show"],
        &["manifest", "verify"],
        &["manifest", "list"],
    ];
    for (what, bytes) in floods(&good) {
        fs_err::write(world.file("prod"), bytes).unwrap();
        // All of them where the bounds refuse it, and where they do not; one where another bound does.
        let count = match what {
            "an unknown field" | "a text" => commands.len(),
            "what the bounds let through" => 3,
            _ => 1,
        };
        for args in &commands[..count] {
            // The address space, of which the memory is a part: no measuring, and nothing depends on a clock.
            let script = "ulimit -v 204800 && exec \"$@\"";
            let out = world.run_in("prod", "ann", Run::new("sh").args(["-c", script, "sh", bin]).args(*args));
            let fine = match args[1..].first() {
                Some(&"list" | &"show") => matches!(out.status, ProcessStatus::Exit(0 | 1)),
                _ => out.status == ProcessStatus::Exit(1),
            };
            let said: String = out.stderr.chars().take(500).collect();
            assert!(fine, "{what}, {args:?}: {} {said}", out.status);
            assert!(out.stderr.len() < 4096, "{what}, {args:?}: {} bytes of an error", out.stderr.len());
        }
    }
    // The way back is open, also from what is too large to be read.
    world.ok("ann", &["manifest", "rollback", "1"]);
    world.ok("ann", &["manifest", "verify"]);
    fs_err::write(world.file("prod"), vec![b' '; (32 << 20) + 1]).unwrap();
    world.ok("ann", &["manifest", "rollback"]);
    world.ok("ann", &["manifest", "verify"]);
}

#[test]
fn whoever_only_reads_follows_nobody_who_is_not_trusted() {
    let world = World::new();
    world.tamper(|m| m["services"][0]["hosts"] = json!(["git.evil.example.com"]));
    let asked = world.dir.path().join("asked");
    let ssh = world.dir.path().join("ssh");
    fs_err::write(&ssh, format!("echo \"$@\" >>{}\n", asked.display())).unwrap();
    let ssh = format!("--ssh=sh {}", ssh.display());
    for args in [&["logs", "ava"][..], &["logs", "deployer"], &["status"], &["status", "--live"]] {
        world.refused("ann", &[args, &[&ssh]].concat(), "not to be trusted");
    }
    assert!(!asked.exists(), "somebody was asked");
    let shown = world.call_in("prod", "ann", &["manifest", "show"]);
    assert_eq!(shown.status, ProcessStatus::Exit(0));
    assert!(shown.text().contains("git.evil.example.com"), "it is there to be looked at");
    assert!(shown.stderr.contains("not to be trusted"), "{}", shown.stderr);
    let doctor = world.call_in("prod", "ann", &["doctor"]);
    assert!(doctor.text().contains("no host that trusts these keys obeys it"), "{}", doctor.text());
}

#[test]
fn where_a_manifest_was_taken_away_nothing_begins_anew_by_the_way() {
    let world = World::new();
    world.with_bob();
    world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
    let web = json!({"name": "web", "artifact": {"storePath": PATH}, "hosts": ["biz"]}).to_string();
    let refused = |who: &str, args: &[&str], said: &str| {
        let out = world.call_in("prod", who, args);
        assert_eq!(out.status, ProcessStatus::Exit(1), "{who} {args:?}: {}", out.stderr);
        assert!(out.stderr.contains(said), "{who} {args:?}: {}", out.stderr);
        assert!(!world.file("prod").exists(), "{who} {args:?}");
    };
    // An empty manifest, or one of a single service, would stop all others on hosts that have obeyed the third version.
    fs_err::remove_file(world.file("prod")).unwrap();
    let adds = ["manifest", "add-service", web.as_str()];
    refused("bob", &adds, "any more, only older ones up to version 2");
    refused("bob", &["init"], "any more, only older ones up to version 2");
    refused("ann", &adds, "any more, and this machine has seen version 3");
    refused("ann", &["init"], "any more, and this machine has seen version 3");
    fs_err::remove_dir_all(world.archive()).unwrap();
    let hosts = world.dir.path().join("prod/hosts");
    fs_err::create_dir_all(&hosts).unwrap();
    fs_err::write(hosts.join("x; id #.json"), r#"{"serial": 3}"#).unwrap();
    fs_err::write(hosts.join("zoe.json"), r#"{"serial": 3}"#).unwrap();
    refused("bob", &adds, "the host zoe reports there that it has obeyed one");
    refused("bob", &["init"], "'ssh zoe cat");
    // A host that was set up first has obeyed none.
    fs_err::remove_dir_all(&hosts).unwrap();
    fs_err::create_dir_all(&hosts).unwrap();
    fs_err::write(hosts.join("biz.json"), r#"{"lastError": {"reason": "there is no manifest"}}"#).unwrap();
    world.ok("bob", &adds);
    assert_eq!(world.manifest()["serial"], 1);
}

#[test]
fn what_says_that_a_newer_program_wrote_it_is_replaced_unless_somebody_trusted_has_signed_it() {
    let world = World::new();
    world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
    let newer = r#"{"version": 2, "services": {}}"#;
    fs_err::write(world.file("prod"), newer).unwrap();
    world.refused("ann", &["manifest", "set", "ava", "env.A=2"], "it is not signed");
    world.ok("ann", &["manifest", "rollback"]);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"A": "1"}), &json!(4)));
    fs_err::write(world.file("prod"), newer).unwrap();
    let out = world.edits("ann", "sed -i 's/\"restartSec\": 5/\"restartSec\": 7/' $1");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    world.ok("ann", &["manifest", "verify"]);
    assert_eq!(world.manifest()["services"][0]["systemd"]["restartSec"], 7);
}

#[test]
fn no_copy_takes_the_place_of_what_is_known_to_be_newer() {
    for (who, newer) in [("ann", "version 5"), ("bob", "version 4")] {
        let world = World::new();
        world.with_bob();
        world.ok("ann", &["manifest", "set", "ava", "env.AUTH=none"]);
        // A host is held at this one; what came after it is taken away, and the host says that its copy be put back.
        let copy = world.dir.path().join("copy.json");
        fs_err::copy(world.file("prod"), &copy).unwrap();
        let at = format!("@{}", copy.display());
        world.ok("ann", &["manifest", "set", "ava", "env.AUTH=required"]);
        world.ok("ann", &["manifest", "set", "ava", "env.COLOUR=blue"]);
        fs_err::remove_file(world.file("prod")).unwrap();
        let out = world.call_in("prod", who, &["manifest", "rollback", &at]);
        assert!(
            out.status == ProcessStatus::Exit(1) && !world.file("prod").exists(),
            "{who}: {}",
            out.stderr
        );
        assert!(out.stderr.contains("the copy is version 3"), "{who}: {}", out.stderr);
        assert!(out.stderr.contains(newer), "{who}: {}", out.stderr);
        let out = world.types(who, &out.stderr, "rollback");
        assert_eq!(out.status, ProcessStatus::Exit(0), "{who}: {}", out.stderr);
        assert_eq!(
            (&world.env()["AUTH"], &world.manifest()["serial"]),
            (&json!("required"), &json!(6)),
            "{who}"
        );
        // Who has not seen what was lost is told that there was something, and who has it.
        let lost = out.stderr.contains("version 5, which this one replaces, is not known here");
        assert_eq!(lost, who == "bob", "{}", out.stderr);
        // On purpose it may, and what that changes is said.
        let out = world.call_in("prod", who, &["manifest", "rollback", "-y", &at]);
        assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
        assert!(out.stderr.contains("ava: env.AUTH required → none"), "{}", out.stderr);
    }
}

#[test]
fn of_what_was_put_back_the_newest_that_the_store_has_is_published_again() {
    let world = World::new();
    world.with_bob();
    world.ok("ann", &["manifest", "set", "ava", "env.AUTH=none"]);
    world.ok("bob", &["manifest", "set", "ava", "env.AUTH=required"]);
    world.ok("bob", &["manifest", "set", "ava", "env.COLOUR=blue"]);
    // Who has seen nothing is told by the store itself.
    fs_err::copy(world.archived(2), world.file("prod")).unwrap();
    let seen = world.dir.path().join("bob/.local/state");
    fs_err::rename(&seen, world.dir.path().join("kept")).unwrap();
    world.refused("bob", &["manifest", "rollback"], "rollback manifest-");
    let three = format!("@{}", world.archived(3).display());
    world.refused("bob", &["manifest", "rollback", &three], "and version 4");
    // Ann has seen version 3 alone.
    fs_err::copy(world.archived(2), world.file("prod")).unwrap();
    let said =
        world.says("ann", &["manifest", "set", "ava", "env.A=1"], "has among the replaced ones version 4");
    let out = world.types("ann", &said, "rollback manifest-");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"AUTH": "required"}), &json!(6)));
    assert!(out.stderr.contains("version 5, which this one replaces"), "{}", out.stderr);
}

#[test]
fn who_signs_what_a_stranger_wrote_takes_neither_its_number_nor_its_history() {
    let world = World::new();
    world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
    let digest = "0".repeat(64);
    world.tamper(|m| {
        m["serial"] = 9_007_199_254_740_990u64.into();
        m["previous"] = json!(["9007199254740989:lost", format!("3:{digest}"), "2:lost"]);
        m["services"][0]["env"]["B"] = "1".into();
    });
    let shown = world.call_in("prod", "ann", &["manifest", "sign"]);
    assert!(shown.stderr.contains("ava: env.B (none) → 1"), "{}", shown.stderr);
    // To this machine it is a fork of what it has seen.
    let out = world.call_in("prod", "ann", &["manifest", "sign", "--hash", &hash_in(&world)]);
    assert!(
        out.status == ProcessStatus::Exit(1) && out.stderr.contains("no host that obeyed"),
        "{}",
        out.stderr
    );
    for forgets in [false, true] {
        world.tamper(|m| m["previous"] = json!(["9007199254740989:lost"]));
        if forgets {
            fs_err::remove_dir_all(world.dir.path().join("ann/.local/state")).unwrap();
        }
        let shown = world.call_in("prod", "ann", &["manifest", "sign"]);
        let out = world.types("ann", &shown.stderr, "sign --hash");
        assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
        assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"A": "1", "B": "1"}), &json!(4)));
        let previous = world.manifest()["previous"].to_string();
        assert!(!previous.contains("9007199254740989") && previous.contains("\"2:"), "{previous}");
        assert_eq!(previous.contains("3:lost"), forgets, "{previous}");
        world.ok("ann", &["manifest", "verify"]);
        // Back to what the attack found.
        if !forgets {
            fs_err::remove_file(world.archived(3)).unwrap();
            world.tamper(|m| m["serial"] = 9_007_199_254_740_990u64.into());
        }
    }
}

#[test]
fn what_is_signed_after_many_versions_names_the_one_that_it_takes_the_place_of() {
    let world = World::new();
    for n in 0..20 {
        world.ok("ann", &["manifest", "set", "ava", &format!("env.A={n}")]);
    }
    let signed = world.manifest()["serial"].as_u64().unwrap();
    world.tamper(|m| m["services"][0]["env"]["B"] = "1".into());
    // On a machine that has not seen what was there.
    fs_err::remove_dir_all(world.dir.path().join("ann/.local/state")).unwrap();
    let hash = hash_in(&world);
    let shown = world.call_in("prod", "ann", &["manifest", "sign"]);
    assert_eq!(
        world.types("ann", &shown.stderr, "sign --hash").status,
        ProcessStatus::Exit(0),
        "{}",
        shown.stderr
    );
    let manifest = world.manifest();
    let previous: Vec<&str> =
        manifest["previous"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!((&manifest["serial"], previous[0]), (&json!(signed + 1), &*format!("{signed}:{hash}")));
    assert!(previous[1].starts_with(&format!("{}:", signed - 1)) && previous.len() == 16, "{previous:?}");
}

/// The hash that 'sign' tells.
fn hash_in(world: &World) -> String {
    omni_deploy::manifest::signature::digest(&fs_err::read(world.file("prod")).unwrap()).unwrap().to_string()
}

#[test]
fn a_name_that_no_signature_vouches_for_leaves_room_for_the_numbers_after_it() {
    for args in [&["manifest", "init"][..], &["manifest", "rollback", "-"]] {
        let world = World::new();
        let copy = fs_err::read(world.file("prod")).unwrap();
        // Ann's machine has lost what it has seen, and the store has one name of somebody else's.
        fs_err::remove_dir_all(world.dir.path().join("ann/.local/state")).unwrap();
        fs_err::remove_dir_all(world.dir.path().join("prod")).unwrap();
        fs_err::create_dir_all(world.archive()).unwrap();
        fs_err::write(world.archive().join("manifest-20991231T235959Z-9007199254740980.json"), "").unwrap();
        let run = Run::new(env!("CARGO_BIN_EXE_omni-deploy")).args(args).stdin(copy);
        let out = world.run_in("prod", "ann", run);
        assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
        assert!(world.manifest()["serial"].as_u64().unwrap() < 10, "{}", world.manifest());
    }
}

#[test]
fn a_rollback_passes_over_what_it_does_not_believe_and_says_what_it_undoes() {
    let world = World::new();
    for n in 1..=3 {
        world.ok("ann", &["manifest", "set", "ava", &format!("env.N={n}")]);
    }
    // Somebody puts another version 4 among the old ones, which sorts before the real one, and damages the newest.
    let mut forged: Value = serde_json::from_slice(&fs_err::read(world.archived(4)).unwrap()).unwrap();
    forged["generation"] = "2099-12-31T23:59:59Z".into();
    forged["services"][0]["env"]["N"] = "evil".into();
    let name = "manifest-20991231T235959Z-00000004.json";
    fs_err::write(world.archive().join(name), forged.to_string()).unwrap();
    let out = world.call_in("prod", "ann", &["manifest", "rollback"]);
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"N": "2"}), &json!(6)));
    for part in [
        "from version 5 (set ava env.N by ann@",
        "back to version 4 (",
        "ava: env.N 3 → 2",
        &format!("passed over {name}: it was changed after it was signed"),
    ] {
        assert!(out.stderr.contains(part), "{part}: {}", out.stderr);
    }
    world.ok("ann", &["manifest", "rollback", "4"]);
    let out = world.call_in("prod", "ann", &["manifest", "rollback", "--service", "ava"]);
    assert_eq!((out.status, world.env()), (ProcessStatus::Exit(0), json!({"N": "3"})), "{}", out.stderr);
    let said = "ava as it was before version 6 (rollback to manifest-";
    assert!(out.stderr.contains(said) && out.stderr.contains("ava: env.N 2 → 3"), "{}", out.stderr);
    // A damaged manifest is gone back from, and what it was is passed over by the next rollback.
    let text = fs_err::read_to_string(world.file("prod")).unwrap();
    fs_err::write(world.file("prod"), &text[..text.len() / 2]).unwrap();
    let out = world.call_in("prod", "ann", &["manifest", "rollback"]);
    assert_eq!((out.status, world.env()), (ProcessStatus::Exit(0), json!({"N": "3"})), "{}", out.stderr);
    fs_err::write(world.file("prod"), &text[..text.len() / 2]).unwrap();
    fs_err::remove_dir_all(world.dir.path().join("ann/.local/state")).unwrap();
    let mut back = Vec::new();
    for _ in 0..3 {
        let out = world.call_in("prod", "ann", &["manifest", "rollback"]);
        assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
        back.push(world.env()["N"].as_str().unwrap().to_string());
    }
    // The newest that is believed, and then to and fro.
    assert_eq!(back, ["2", "3", "2"]);
    world.ok("ann", &["manifest", "verify"]);
}

#[test]
fn what_reads_says_of_a_version_that_nobody_trusted_has_signed_it() {
    let world = World::new();
    world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
    let good = fs_err::read(world.file("prod")).unwrap();
    for (what, said) in
        [("put back", "an older version was put back"), ("forged", "changed after it was signed")]
    {
        match what {
            "forged" => world.tamper(|m| m["services"][0]["env"]["A"] = "2".into()),
            _ => drop(fs_err::copy(world.archived(2), world.file("prod")).unwrap()),
        }
        let list = world.call_in("prod", "ann", &["manifest", "list"]);
        assert!(
            list.status == ProcessStatus::Exit(0) && list.stderr.contains(said),
            "{what}: {}",
            list.stderr
        );
        world.refused("ann", &["manifest", "validate"], said);
        fs_err::write(world.file("prod"), &good).unwrap();
    }
    world.tamper(|m| m["services"][0]["env"]["A"] = "2".into());
    let diff = world.call_in("prod", "ann", &["manifest", "diff"]);
    assert!(diff.text().contains("ava: env.A (none) → 2"), "{}", diff.text());
    assert!(diff.stderr.contains("not to be trusted"), "{}", diff.stderr);
}

#[test]
fn what_was_published_without_a_version_that_was_lost_is_noticed_by_whoever_has_seen_it_and_both_go_on() {
    for by_host in [false, true] {
        let world = World::new();
        world.with_bob();
        world.ok("ann", &["manifest", "set", "ava", "env.AUTH=none"]);
        world.ok("bob", &["manifest", "verify"]);
        world.ok("ann", &["manifest", "set", "ava", "env.AUTH=required"]);
        let good = fs_err::read(world.file("prod")).unwrap();
        let copy = world.dir.path().join("copy.json");
        fs_err::write(&copy, &good).unwrap();
        // The store's writer damages it; Bob, who has not seen it, does what he is told.
        fs_err::write(world.file("prod"), &good[..good.len() / 2]).unwrap();
        let said = world.says("bob", &["manifest", "set", "ava", "env.COLOUR=blue"], "cut off");
        let out = world.types("bob", &said, "rollback");
        assert!(
            out.status == ProcessStatus::Exit(0) && out.stderr.contains("a host that has obeyed it rejects"),
            "{}",
            out.stderr
        );
        world.ok("bob", &["manifest", "set", "ava", "env.COLOUR=blue"]);
        assert_eq!(world.env(), json!({"AUTH": "none", "COLOUR": "blue"}));
        assert!(world.manifest()["previous"].to_string().contains("4:lost"), "{}", world.manifest());
        let said = world.says("ann", &["manifest", "set", "ava", "env.A=1"], "does not come after version 4");
        match by_host {
            false => assert_eq!(world.types("ann", &said, "rollback @").status, ProcessStatus::Exit(0)),
            true => drop(world.ok("bob", &["manifest", "rollback", &format!("@{}", copy.display())])),
        }
        assert_eq!(world.env(), json!({"AUTH": "required"}));
        world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
        world.ok("bob", &["manifest", "set", "ava", "env.COLOUR=blue"]);
        assert_eq!(world.env(), json!({"A": "1", "AUTH": "required", "COLOUR": "blue"}));
    }
}

#[test]
fn an_empty_list_of_trusted_keys_makes_nobody_sign_what_a_stranger_wrote() {
    let none = "--trusted-public-keys=";
    for strip in [false, true] {
        let world = World::new();
        world.ok("ann", &["manifest", "set", "ava", "env.A=1"]);
        let copy = world.dir.path().join("copy.json");
        fs_err::copy(world.file("prod"), &copy).unwrap();
        // A machine that has seen nothing, and a store in which nothing good is left.
        fs_err::remove_dir_all(world.dir.path().join("ann/.local/state")).unwrap();
        for serial in [1, 2] {
            fs_err::write(world.archived(serial), "{}").unwrap();
        }
        world.tamper(|m| {
            m["services"][0]["exec"]["command"] = "/bin/sh -c id".into();
            if strip {
                m.as_object_mut().unwrap().remove("signatures");
            }
        });
        let why = if strip { "it is not signed" } else { "was changed after it was signed" };
        let out = world.edits("ann", "echo >>$1");
        assert_eq!(out.status, ProcessStatus::Exit(1), "{}", out.stderr);
        assert!(
            out.stderr.contains("cat /var/lib/deployer/manifest.json | deploy-manifest rollback -'"),
            "{}",
            out.stderr
        );
        assert!(!out.stderr.contains(none), "{}", out.stderr);
        world.refused("ann", &[none, "manifest", "set", "ava", "env.B=1"], why);
        world.refused("ann", &[none, "manifest", "edit"], why);
        let forged = world.manifest().to_string();
        fs_err::write(world.archived(2), forged.replace("\"serial\":3", "\"serial\":2")).unwrap();
        let out = world.call_in("prod", "ann", &[none, "manifest", "rollback", "2"]);
        assert_eq!(out.status, ProcessStatus::Exit(1), "{}", out.stderr);
        world.ok("ann", &["manifest", "rollback", &format!("@{}", copy.display())]);
        assert_eq!(world.manifest()["services"][0]["exec"]["command"], Value::Null);
        world.ok("ann", &["manifest", "verify"]);
    }
}

#[test]
fn what_reads_says_of_a_damaged_manifest_that_it_is_damaged_and_what_it_says_loses_nothing() {
    for command in ["verify", "diff"] {
        let world = World::new();
        world.ok("ann", &["manifest", "set", "ava", "env.AUTH=none"]);
        world.ok("ann", &["manifest", "set", "ava", "env.AUTH=required"]);
        let text = fs_err::read_to_string(world.file("prod")).unwrap();
        fs_err::write(world.file("prod"), text.replacen("\"version\": 1,", "\"version\": 1,,", 1)).unwrap();
        let said = world.says("ann", &["manifest", command], "cannot be used");
        assert!(!said.contains("any more"), "{said}");
        let out = world.types("ann", &said, "rollback");
        assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
        assert_eq!(world.env(), json!({"AUTH": "required"}));
    }
}

#[test]
fn however_many_names_somebody_puts_into_the_archive_what_is_known_is_published_again() {
    let world = World::new();
    world.with_bob();
    world.ok("ann", &["manifest", "set", "ava", "env.AUTH=none"]);
    world.ok("ann", &["manifest", "set", "ava", "env.AUTH=required"]);
    let copy = world.dir.path().join("copy.json");
    fs_err::copy(world.file("prod"), &copy).unwrap();
    for n in 0..201 {
        let name = format!("manifest-20991231T2359{:02}Z-{:08}.json", n % 60, 100 + n);
        fs_err::write(world.archive().join(name), "{}").unwrap();
    }
    let put_back = || fs_err::copy(world.archived(3), world.file("prod")).unwrap();
    // From what this machine has seen.
    put_back();
    let said = world.call_in("prod", "ann", &["manifest", "set", "ava", "env.A=1"]).stderr;
    assert!(said.contains("an older version was put back"), "{said}");
    let out = world.types("ann", &said, "rollback @");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
    assert!(out.stderr.contains("no more were looked at"), "{}", out.stderr);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"AUTH": "required"}), &json!(5)));
    // From the copy that a host has kept, on a machine that has seen nothing.
    put_back();
    let out = world.call_in("prod", "bob", &["manifest", "rollback"]);
    assert!(
        out.status == ProcessStatus::Exit(1) && out.stderr.contains("deploy-manifest rollback -'"),
        "{}",
        out.stderr
    );
    world.ok("bob", &["manifest", "rollback", &format!("@{}", copy.display())]);
    assert_eq!((world.env(), &world.manifest()["serial"]), (json!({"AUTH": "required"}), &json!(5)));
}

#[test]
fn a_kept_draft_that_somebody_else_could_have_written_is_not_published() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new();
    let out = world.edits("ann", "sed -i 's/\"restartSec\": 5/\"restartSec\": -7/' $1");
    let said = out.stderr;
    let draft = PathBuf::from(said.split("kept in ").nth(1).unwrap().split(": correct").next().unwrap());
    let text = fs_err::read_to_string(&draft).unwrap().replace("-7", "7");
    fs_err::write(&draft, text).unwrap();
    let at = draft.display().to_string();
    let folder = draft.parent().unwrap().to_path_buf();
    let base = draft.with_file_name("base.json");
    for what in [&folder, &draft, &base] {
        let before = fs_err::metadata(what).unwrap().permissions();
        fs_err::set_permissions(what, PermissionsExt::from_mode(0o777)).unwrap();
        world.refused("ann", &["manifest", "edit", "--draft", &at], "can be written by others");
        fs_err::set_permissions(what, before).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(what, Some(65_534), None).unwrap();
            world.refused("ann", &["manifest", "edit", "--draft", &at], "belongs to the user 65534");
            std::os::unix::fs::chown(what, Some(0), None).unwrap();
        }
    }
    let out = world.types("ann", &said, "edit --draft");
    assert_eq!(out.status, ProcessStatus::Exit(0), "{}", out.stderr);
}
