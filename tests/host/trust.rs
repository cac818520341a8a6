//! Whoever can write the store does not own the host: what a pass makes of a manifest that somebody without a
//! trusted key has changed, put back or brought from elsewhere; and what a host's own key to the bucket can do.

use crate::runbook::{Biz, biz};
use crate::solo::{Solo, solo};
use omni_deploy::runner::ProcessStatus;
use serde_json::Value;

/// The host obeys signed manifests only, while this lives.
struct Trusting<'a>(&'a Solo);

impl<'a> Trusting<'a> {
    fn new(host: &'a Solo) -> Self {
        host.sh("omni-deploy init >/dev/null
             hash=$({ deploy-manifest sign 2>&1 || true; } | grep -o '[-]-hash [0-9a-f]*'); deploy-manifest sign $hash");
        Trusting(host)
    }
}

impl Drop for Trusting<'_> {
    fn drop(&mut self) {
        self.0.sh("rm -rf /root/.config/omni-deploy /root/.local/state/omni-deploy /var/lib/omni-deploy /var/lib/deployer/manifest*
             deploy-manifest init");
    }
}

fn stored(host: &Solo) -> Value {
    serde_json::from_str(&host.sh("cat /var/lib/omni-deploy/manifest.json")).unwrap()
}

fn put(host: &Solo, manifest: &str) {
    fs_err::write(host.path("/var/lib/omni-deploy/manifest.json"), manifest).unwrap();
}

#[test]
fn a_manifest_that_nobody_trusted_has_signed_changes_nothing() {
    let host = solo();
    let one = host.deploys_web();
    let _trusting = Trusting::new(&host);
    host.good_pass();
    let good = stored(&host);
    let two = host.closure("web", "two", "");
    let mut forged = good.clone();
    forged["services"][0]["artifact"]["storePath"] = two.clone().into();
    forged["serial"] = (good["serial"].as_u64().unwrap() + 1).into();
    let mut unsigned = forged.clone();
    unsigned.as_object_mut().unwrap().remove("signatures");
    let mut elsewhere = good.clone();
    elsewhere["store"] = "s3://staging".into();
    let mut downgraded = unsigned.clone();
    downgraded["version"] = 0.into();
    let mut newer = unsigned.clone();
    newer["version"] = 2.into();
    let mut emptied = forged.clone();
    emptied["signatures"] = Value::Array(Vec::new());
    let text = good.to_string();
    // What the same developer has signed for another store.
    let staging = host.sh(&format!(
        "export OMNI_DEPLOY_STORE=file:///var/lib/staging; deploy-manifest init >&2
         deploy-manifest show --store file:///var/lib/omni-deploy --service web | deploy-manifest add-service - >&2
         deploy-manifest update web {two} >&2; deploy-manifest verify >&2
         cat /var/lib/staging/manifest.json; rm -r /var/lib/staging"
    ));
    for (manifest, reason) in [
        (forged.to_string(), "it was changed after it was signed"),
        (unsigned.to_string(), "it is not signed"),
        (emptied.to_string(), "it is not signed"),
        (elsewhere.to_string(), "it was changed after it was signed"),
        (staging, "it was signed for the store file:///var/lib/staging, this is file:///var/lib/omni-deploy"),
        (downgraded.to_string(), "it is not signed"),
        (newer.to_string(), "it is not signed"),
        (text[..text.len() / 2].to_string(), "cut off"),
        (String::new(), "cannot be used"),
    ] {
        let before = host.invocation("web");
        put(&host, &manifest);
        let pass = host.passes_with(0);
        assert!(pass.said.contains(reason), "{}", pass.said);
        let error = host.state()["manifestError"].as_str().unwrap_or_default().to_string();
        assert!(error.contains(reason), "{error}");
        host.serves("web", "one");
        assert_eq!(
            (host.invocation("web"), host.service("web")["storePath"].as_str()),
            (before, Some(&*one))
        );
    }
    // The developer's next push is refused too, until somebody with a key says that this is right.
    put(&host, &forged.to_string());
    let refused = host.try_sh("deploy-manifest set web env.A=1");
    assert!(!refused.status.ok() && refused.stderr.contains("not to be trusted"), "{}", refused.stderr);
    put(&host, &good.to_string());
    host.good_pass();
    host.update("web", &two);
    host.good_pass();
    host.serves("web", "two");
}

#[test]
fn an_old_manifest_put_back_is_refused_and_a_deliberate_one_is_not() {
    let host = solo();
    host.deploys_web();
    let _trusting = Trusting::new(&host);
    host.good_pass();
    let old = host.sh("cat /var/lib/omni-deploy/manifest.json");
    let serial = stored(&host)["serial"].as_u64().unwrap();
    host.update("web", &host.closure("web", "two", ""));
    host.good_pass();
    host.serves("web", "two");
    put(&host, &old);
    for lost in ["true", "rm /var/lib/deployer/state.json"] {
        host.sh(lost);
        let pass = host.passes_with(0);
        assert!(pass.said.contains(&format!("--accept-serial {serial}")), "{lost}: {}", pass.said);
        host.serves("web", "two");
    }
    host.sh(&format!("deployer run --accept-serial {serial}"));
    host.serves("web", "one");
    // From here on that one is the highest, for the developer too: an ordinary rollback is a new version.
    host.good_pass();
    let forgets = format!("deploy-manifest verify --accept-version {serial}");
    let refused = host.try_sh("deploy-manifest set web env.A=1");
    assert!(!refused.status.ok() && refused.stderr.contains(&forgets), "{}", refused.stderr);
    host.sh(&forgets);
    host.update("web", &host.closure("web", "two", ""));
    host.good_pass();
    host.sh("deploy-manifest rollback");
    host.good_pass();
    host.serves("web", "one");
}

#[test]
fn a_store_that_was_emptied_or_made_anew_is_told_from_an_old_manifest_and_each_remedy_works() {
    let host = solo();
    host.deploys_web();
    let _trusting = Trusting::new(&host);
    host.good_pass();
    let old = host.sh("cat /var/lib/omni-deploy/manifest.json");
    host.update("web", &host.closure("web", "two", ""));
    host.sh("deploy-manifest set web env.A=1; deploy-manifest set web env.A=2");
    host.good_pass();
    let obeyed = stored(&host)["serial"].as_u64().unwrap();

    // An old version put back: what was in force is in no archive, and the copy that this host has of it is named.
    host.sh("rm -r /root/.local/state/omni-deploy");
    put(&host, &old);
    let said = host.passes_with(0).said;
    let back = "cat /var/lib/deployer/manifest.json | deploy-manifest rollback -";
    assert!(said.contains("an old version was put back") && said.contains(back), "{said}");
    host.sh(back);
    host.good_pass();
    assert!(host.state()["serial"].as_u64() > Some(obeyed) && host.state()["manifestError"].is_null());
    host.serves("web", "two");

    // Emptied: the host's copy is named, and the command that puts it back.
    let lost = host.sh("deploy-manifest show --service web");
    host.sh("rm -r /var/lib/omni-deploy/manifest.json /var/lib/omni-deploy/manifests");
    let said = host.passes_with(0).said;
    assert!(said.contains("any more") && said.contains(back), "{said}");
    host.serves("web", "two");
    host.sh(back);
    host.good_pass();
    assert!(host.state()["manifestError"].is_null());
    assert_eq!(host.sh("deploy-manifest show --service web"), lost);

    // Made anew by somebody who has not seen it: nobody is accused, and who did it says so to the host.
    host.sh("rm -r /var/lib/omni-deploy/manifest* /root/.local/state/omni-deploy; deploy-manifest init");
    let said = host.passes_with(0).said;
    assert!(said.contains("recreated") && !said.contains("put back;"), "{said}");
    assert!(said.contains("deployer run --accept-serial 1"), "{said}");
    host.serves("web", "two");
    host.sh("deployer run --accept-serial 1 --allow-empty");
    assert_eq!((host.state()["serial"].as_u64(), host.state()["services"].get("web")), (Some(1), None));
}

#[test]
fn a_version_made_without_the_one_that_was_obeyed_is_refused_and_what_is_said_mends_it() {
    let host = solo();
    host.deploys_web();
    let _trusting = Trusting::new(&host);
    let old = host.sh("deploy-manifest set web env.AUTH=none >&2; cat /var/lib/omni-deploy/manifest.json");
    host.sh("deploy-manifest set web env.AUTH=required");
    host.good_pass();
    let obeyed = stored(&host)["serial"].as_u64().unwrap();
    let unit = || host.sh("systemctl show --value --property=Environment web");
    assert!(unit().contains("AUTH=required"));
    // The store's writer puts the version before back; a developer who has not seen the last one publishes on it.
    put(&host, &old);
    host.sh("rm -r /root/.local/state/omni-deploy; deploy-manifest set web env.COLOUR=blue");
    assert_eq!(stored(&host)["serial"].as_u64(), Some(obeyed));
    let said = host.passes_with(0).said;
    assert!(said.contains(&format!("a different version {obeyed} from the one")), "{said}");
    assert!(said.contains(&format!("--accept-serial {obeyed}")), "{said}");
    host.sh("deploy-manifest set web env.COLOUR=red");
    let said = host.passes_with(0).said;
    let without = format!("version {} was made without version {obeyed}", obeyed + 1);
    assert!(said.contains(&without), "{said}");
    assert!(unit().contains("AUTH=required") && !unit().contains("COLOUR"));
    let back = "cat /var/lib/deployer/manifest.json | deploy-manifest rollback -";
    assert!(said.contains(back), "{said}");
    host.sh(back);
    host.good_pass();
    host.sh("deploy-manifest set web env.COLOUR=red");
    host.good_pass();
    assert!(host.state()["manifestError"].is_null());
    assert!(unit().contains("AUTH=required") && unit().contains("COLOUR=red"));
    // One more signature is no other version.
    host.sh("omni-deploy keygen more >/dev/null
         OMNI_DEPLOY_SECRET_KEY_FILE=/root/.config/omni-deploy/keys/more.secret deploy-manifest sign
         rm /root/.config/omni-deploy/keys/more.*");
    assert_eq!(stored(&host)["signatures"].as_array().map(Vec::len), Some(2));
    host.good_pass();
    assert!(host.state()["manifestError"].is_null());
}

#[test]
fn a_closure_that_nobody_trusted_has_signed_is_not_taken() {
    let host = solo();
    host.deploys_web();
    let _trusting = Trusting::new(&host);
    // In the cache without a signature; consistent in itself, but nobody's. One that was built: what is only
    // added to a store is named by its content, and Nix needs no signature to believe that.
    let two = host.sh("nix-build --no-out-link /opt/omni/contrib/example 2>/dev/null");
    host.sh(&format!(
        "nix --extra-experimental-features nix-command copy --no-check-sigs \
             --to 'file:///var/lib/omni-deploy?compression=zstd' {two}
         nix-store --delete {two}"
    ));
    host.update("web", &two);
    host.passes_with(3);
    assert!(host.reason("web").contains("signature"), "{}", host.reason("web"));
    host.serves("web", "one");
}

#[test]
fn a_hosts_key_to_the_bucket_publishes_nothing() {
    let biz = biz();
    let Biz { host, bucket, developer } = &*biz;
    developer.types(
        r#"deploy-manifest add-service '{"name": "evil", "hosts": ["biz", "web1"], "artifact": {"storePath": "/nix/store/placeholder"}}'"#,
    );
    let before = bucket.get("manifest.json");
    // Somebody with the host's credentials, who signs with a key that they made and trust.
    let stolen = "set -a; . /etc/omni-deploy/deployer.env; set +a; export HOME=$(mktemp -d)
        own=$(omni-deploy keygen own)
        export OMNI_DEPLOY_SECRET_KEY_FILE=$HOME/.config/omni-deploy/keys/own.secret
        export OMNI_DEPLOY_TRUSTED_PUBLIC_KEYS=\"$(jq -r '.trustedPublicKeys[]' /etc/omni-deploy/config.json) $own\"";
    let path = host.closure("evil", "one", "");
    for (command, missing) in [
        (
            "deploy-manifest add-service '{\"name\": \"worse\", \"hosts\": [\"biz\"], \"artifact\": {\"storePath\": \"/nix/store/placeholder\"}}'",
            "allow s3:PutObject on arn:aws:s3:::deploys/manifests/manifest-",
        ),
        ("deploy-manifest sign", "allow s3:PutObject on arn:aws:s3:::deploys/manifest.json"),
        ("omni-deploy status", "allow s3:GetObject on arn:aws:s3:::deploys/hosts/"),
        ("deploy-manifest rollback", "allow s3:GetObject on arn:aws:s3:::deploys/manifests/manifest-"),
    ] {
        let tried = host.try_sh(&format!("{stolen}\n{command}"));
        assert_eq!(tried.status, ProcessStatus::Exit(1), "{command}: {}", tried.stderr);
        assert!(tried.stderr.contains(missing), "{command}: {}", tried.stderr);
    }
    // Nor does a closure get into the cache.
    let tried = host.try_sh(&format!("{stolen}\nomni-deploy push --service evil {path}"));
    assert_eq!(tried.status, ProcessStatus::Exit(1), "{}", tried.stderr);
    assert!(tried.stderr.contains("allow s3:PutObject on arn:aws:s3:::deploys/n"), "{}", tried.stderr);
    assert_eq!(bucket.get("manifest.json"), before);
    developer.types("deploy-manifest remove-service evil");
    assert_ne!(bucket.get("manifest.json"), before, "a developer's key does publish");
    // It is all that a pass needs, and the doctor is content.
    host.sh("rm /var/lib/deployer/state.json");
    host.good_pass();
    assert_eq!(host.state()["reported"], true);
    // Of what these credentials may not do it says nothing, and the report that it tries stays as it was.
    let report = bucket.get("hosts/biz.json");
    let doctor = host.try_sh("set -a; . /etc/omni-deploy/deployer.env; omni-deploy doctor").text();
    assert!(doctor.contains("hosts/biz.json can be written"), "{doctor}");
    assert!(!doctor.contains("conditional writes"), "{doctor}");
    assert_eq!(bucket.get("hosts/biz.json"), report);
    bucket.faults(r#"{"fail": {"status": 403, "code": "AccessDenied", "methods": ["PUT"]}}"#);
    let doctor = host.try_sh("set -a; . /etc/omni-deploy/deployer.env; omni-deploy doctor").text();
    bucket.faults("{}");
    assert!(doctor.lines().any(|l| l.starts_with("FAIL") && l.contains("hosts/biz.json")), "{doctor}");
    let doctor = developer.tries("omni-deploy doctor");
    assert!(doctor.text().contains("honoured: two pushes at once lose nothing"), "{}", doctor.text());
}

#[test]
fn a_closure_that_was_forged_whole_is_not_taken_whoever_signed_it() {
    let host = solo();
    host.deploys_web();
    let _trusting = Trusting::new(&host);
    let key = "$(jq -r .secretKeyFile /root/.config/omni-deploy/config.json)";
    let two = host.sh("nix-build --no-out-link /opt/omni/contrib/example 2>/dev/null");
    let hash = &two["/nix/store/".len()..][..32];
    // A good one, signed by the developer; then one with another content under the same path, consistent in itself:
    // file, sizes and hashes fit. Its references are those of the good one.
    host.sh(&format!(
        "export NIX_CONFIG='experimental-features = nix-command'; cd /var/lib/omni-deploy
         nix copy --to \"file://$PWD?compression=zstd&secret-key={key}\" {two}
         cp {hash}.narinfo /root/good.narinfo; grep -q '^Sig: ' {hash}.narinfo
         cp -r {two} /root/forged; chmod -R u+w /root/forged; echo 'touch /tmp/pwned' >/root/forged/more
         nix-store --dump /root/forged >nar/forged.nar; nix-store --delete {two}
         sum=sha256:$(nix-hash --to-base32 --type sha256 $(sha256sum <nar/forged.nar | cut -d' ' -f1))
         size=$(stat -c %s nar/forged.nar)
         sed -e 's|^URL: .*|URL: nar/forged.nar|; s|^Compression: .*|Compression: none|; /^Sig: /d' \
             -e \"s|^FileHash: .*|FileHash: $sum|; s|^NarHash: .*|NarHash: $sum|\" \
             -e \"s|^FileSize: .*|FileSize: $size|; s|^NarSize: .*|NarSize: $size|\" /root/good.narinfo >/root/forged.narinfo
         nix key generate-secret --key-name eve-1 >/root/eve.secret"
    ));
    host.update("web", &two);
    let before = host.invocation("web");
    // By nobody, by a stranger, by a stranger who takes the trusted key's name, with the good one's signature.
    for signed in [
        "true".to_string(),
        "nix store sign --store file://$PWD --key-file /root/eve.secret PATH".to_string(),
        format!(
            "sed \"s/^[^:]*/$(cut -d: -f1 {key})/\" /root/eve.secret >/root/like.secret
             nix store sign --store file://$PWD --key-file /root/like.secret PATH"
        ),
        "grep '^Sig: ' /root/good.narinfo >>HASH.narinfo".to_string(),
    ] {
        let signed = signed.replace("PATH", &two).replace("HASH", hash);
        host.sh(&format!(
            "export NIX_CONFIG='experimental-features = nix-command'; cd /var/lib/omni-deploy
             cp /root/forged.narinfo {hash}.narinfo; {signed}"
        ));
        host.passes_with(3);
        assert!(host.reason("web").contains("signature"), "{signed}: {}", host.reason("web"));
        host.serves("web", "one");
        assert_eq!(host.invocation("web"), before, "{signed}");
        host.sh(&format!("[[ ! -e {two} ]]"));
    }
    // The good one is taken, so it was the forgery that was refused.
    host.sh(&format!("cp /root/good.narinfo /var/lib/omni-deploy/{hash}.narinfo"));
    host.pass();
    host.sh(&format!("nix-store --verify-path {two}; rm -r /root/forged* /root/good.narinfo /root/*.secret"));
}
