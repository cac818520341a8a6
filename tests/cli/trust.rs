//! Signed manifests through the built binary, over directories: what somebody who can write the store, but has
//! no key, can make of it.

use omni_deploy::runner::{Output, Run, Status};
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
        let home = self.dir.path().join(who);
        fs_err::create_dir_all(&home).unwrap();
        Run::new(env!("CARGO_BIN_EXE_omni-deploy"))
            .args(args)
            .env("OMNI_DEPLOY_STORE", format!("file://{}", self.dir.path().join(store).display()))
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
        assert_eq!(out.status, Status::Exit(0), "{args:?}: {}", out.stderr);
        out.text()
    }

    /// The call is refused in one line, and the store stays as it is.
    fn refused(&self, who: &str, args: &[&str], reason: &str) {
        let before = fs_err::read(self.file("prod")).unwrap();
        let out = self.call_in("prod", who, args);
        assert_eq!(out.status, Status::Exit(1), "{args:?}: {}", out.stderr);
        assert!(out.stderr.contains(reason) && out.stderr.lines().count() == 1, "{args:?}: {}", out.stderr);
        assert_eq!(fs_err::read(self.file("prod")).unwrap(), before, "{args:?}");
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
        assert_eq!(world.call_in("prod", "ann", &["manifest", "verify"]).status, Status::Exit(1));
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
    assert_eq!(out.status, Status::Exit(1));
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
    world.ok("ann", &["manifest", "rollback", &at]);
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
