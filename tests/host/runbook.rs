//! The users' runbook on a host called `biz`, with the manifest and the closures in S3: every command as it is
//! written there, and what the users expect of it.

use crate::bucket::{self, Bucket};
use crate::developer::Developer;
use crate::lab::{Host, lock, soon};
use omni_deploy::runner::ProcessStatus;
use serde_json::{Value, json};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Duration;

/// The host, its bucket and a developer: shared by the tests that need S3.
#[derive(Debug)]
pub struct Biz {
    pub host: Host,
    pub bucket: Bucket,
    pub developer: Developer,
}

static BIZ: LazyLock<Mutex<Biz>> = LazyLock::new(|| Mutex::new(boot()));

/// All of it as every test finds it: no service, and no pass but those that are asked for.
pub fn biz() -> MutexGuard<'static, Biz> {
    let mut biz = lock(&BIZ);
    biz.bucket.up();
    // Of a test that failed.
    biz.bucket.faults("{}");
    let Biz { host, developer, .. } = &*biz;
    developer.types(
        "for name in $(deploy-manifest show | jq -r '.services[].name'); do deploy-manifest remove-service $name; done",
    );
    host.sh("rm -rf /run/systemd/system/deployer.timer.d; systemctl daemon-reload
         systemctl stop deployer.timer deployer; systemctl start caddy");
    host.until_idle();
    host.sh("set -a; . /etc/omni-deploy/deployer.env; deployer run --allow-empty");
    biz
}

/// Boots the host and sets both sides up as README and `omni-deploy init` say.
fn boot() -> Biz {
    let host = Host::boot("biz");
    let bucket = Bucket::start(&host, "biz");
    let developer = Developer::new(&host);
    let url = bucket.url();
    // What it prints is what the host needs, but for which of its Caddy's servers is meant.
    developer.types(&format!(
        "omni-deploy init '{url}' | jq '. + {{caddyServer: \"srv0\"}}' | ssh biz sudo install -D -m 644 /dev/stdin /etc/omni-deploy/config.json"
    ));
    host.sh(&format!(
        "jq -e '.trustedPublicKeys | length == 1' /etc/omni-deploy/config.json; umask 077
         cat >/etc/omni-deploy/deployer.env <<'EOF'\n{}EOF",
        bucket::env(bucket::HOST)
    ));
    Biz { host, bucket, developer }
}

/// The page of a domain, outside, is this.
#[track_caller]
fn served(host: &Host, domain: &str, want: &str) {
    assert_eq!(host.page(domain).as_deref(), Ok(want), "{domain}");
}

#[test]
fn every_command_of_the_runbook_works_as_written() {
    let mut biz = biz();
    let Biz { host, bucket, developer } = &mut *biz;
    // `/` alone waits for its first push; the two others have been there for long.
    developer.types(
        r#"deploy-manifest add-service '{"name": "podcastitlater-web", "hosts": ["biz"],
             "artifact": {"storePath": "/nix/store/placeholder"}, "env": {"PORT": "8001"},
             "http": {"domain": "podcasts.example.com", "internalPort": 8001}, "health": {"path": "/health"}}' &&
           deploy-manifest add-service '{"name": "ava", "hosts": ["biz"], "env": {"PORT": "8002"},
             "artifact": {"storePath": "/nix/store/placeholder"},
             "envFile": "/var/lib/deployer-secrets/ava.env",
             "http": {"domain": "ava.example.com", "path": "/", "internalPort": 8002}}'"#,
    );
    host.sh("umask 077; echo TOKEN=one >/var/lib/deployer-secrets/ava.env");
    developer.write("Biz/PodcastItLater/Web.py", "VERSION = podcasts 1\n");
    developer.write("Omni/Ava.hs", "-- : out ava\n-- VERSION = ava 1\n");

    // Deploying a service
    developer.types("Omni/Ide/push.sh Biz/PodcastItLater/Web.py");
    let said = developer.tries("Omni/Ide/ship.sh Omni/Ava.hs");
    assert!(said.status.ok() && said.stderr.contains("biz"), "{}{}", said.text(), said.stderr);
    // `ship` has waited until it is live, with all that was pushed before.
    served(host, "ava.example.com", "ava 1");
    served(host, "podcasts.example.com", "podcasts 1");
    developer.types("ssh biz sudo systemctl start deployer");

    // Checking status
    let shown: Value = serde_json::from_str(&developer.types("deploy-manifest show")).unwrap();
    assert_eq!(shown["services"][0]["name"], "podcastitlater-web");
    let ava: Value = serde_json::from_str(
        &developer.types(r#"deploy-manifest show | jq '.services[] | select(.name == "ava")'"#),
    )
    .unwrap();
    let ava_1 = ava["artifact"]["storePath"].as_str().unwrap().to_string();
    assert!(ava_1.ends_with("-ava"), "{ava_1}");
    // A oneshot that has ended is inactive, for which systemctl has an exit code of its own.
    let status = developer.tries("ssh biz sudo systemctl status deployer").text();
    assert!(status.contains("inactive (dead)") && status.contains("TriggeredBy"), "{status}");
    let state: Value =
        serde_json::from_str(&developer.types("ssh biz cat /var/lib/deployer/state.json")).unwrap();
    assert_eq!((&state["host"], &state["services"]["ava"]["storePath"]), (&json!("biz"), &json!(ava_1)));
    assert_eq!(state["services"]["ava"]["status"], "running");

    // Viewing logs
    developer.watches("ssh biz sudo journalctl -u ava -f", "version ava 1 on port 8002");
    developer.watches("ssh biz sudo journalctl -u deployer -f", "deployer");
    developer.watches("ssh biz sudo journalctl -u caddy -f", "caddy");

    // The second version
    developer.write("Biz/PodcastItLater/Web.py", "VERSION = podcasts 2\n");
    developer.types("Omni/Ide/push.sh Biz/PodcastItLater/Web.py");
    served(host, "podcasts.example.com", "podcasts 1");
    developer.types("ssh biz sudo systemctl start deployer");
    served(host, "podcasts.example.com", "podcasts 2");

    // Rollback
    let list = developer.types("deploy-manifest list");
    // The current version is marked, and comes first.
    let versions: Vec<&str> =
        list.split_whitespace().filter(|w| w.starts_with("manifest-") && w.ends_with(".json")).collect();
    assert!(list.lines().nth(1).is_some_and(|l| l.starts_with("* ")) && versions.len() > 4, "{list}");
    let before = versions[1];
    developer.types(&format!("deploy-manifest rollback {before}"));
    developer.types("ssh biz sudo systemctl start deployer");
    served(host, "podcasts.example.com", "podcasts 1");
    // No version: the one before.
    developer.types("deploy-manifest rollback && ssh biz sudo systemctl start deployer");
    served(host, "podcasts.example.com", "podcasts 2");
    // A day names one version only if there was no other on it: the candidates are listed, of
    // many the ten newest, of which two have come since.
    let day =
        developer.tries(&format!("deploy-manifest rollback {}.json", &before[.."manifest-YYYYMMDD".len()]));
    assert_eq!(day.status, ProcessStatus::Exit(1), "{}", day.stderr);
    assert!(versions.iter().take(8).all(|v| day.stderr.contains(v)), "{}", day.stderr);

    // Secrets; the editor is a person at the keyboard.
    host.sh("printf '#!/bin/sh\\nsed -i s/one/two/ \"$1\"\\n' >/usr/bin/vim; chmod 755 /usr/bin/vim");
    assert_eq!(developer.types("ssh biz sudo cat /var/lib/deployer-secrets/ava.env"), "TOKEN=one\n");
    developer.types("ssh biz sudo vim /var/lib/deployer-secrets/ava.env");
    developer.types("ssh biz sudo systemctl restart ava");
    soon("ava has its new secret", Duration::from_secs(10), || {
        let environment = host.try_sh("curl -sSf localhost:8002/env | tr '\\0' '\\n'").text();
        if environment.contains("TOKEN=two") { Ok(()) } else { Err(environment) }
    });

    // Adding a new service
    developer.types(
        r#"deploy-manifest add-service '{
"name": "my-service",
"artifact": {"storePath": "/nix/store/placeholder"},
"hosts": ["biz"],
"exec": {"command": null, "user": "root", "group": "root"},
"env": {"PORT": "8080"},
"envFile": "/var/lib/deployer-secrets/my-service.env",
"http": {"domain": "my.example.com", "path": "/", "internalPort": 8080}
}'"#,
    );
    developer.types(
        "ssh biz sudo tee /var/lib/deployer-secrets/my-service.env << 'EOF'\nSECRET_KEY=...\nDATABASE_URL=...\nEOF",
    );
    developer.types("ssh biz sudo chmod 600 /var/lib/deployer-secrets/my-service.env");
    developer.write("Biz/MyService.py", "# : out my-service\nVERSION = mine 1\n");
    developer.types("Omni/Ide/push.sh Biz/MyService.py");
    assert_ne!(host.page("my.example.com").as_deref(), Ok("mine 1"));
    developer.types("ssh biz sudo systemctl start deployer");
    served(host, "my.example.com", "mine 1");
    assert!(host.sh("curl -sSf localhost:8080/env").contains("SECRET_KEY=...\0"));

    // Troubleshooting
    assert!(developer.types("ssh biz sudo journalctl -u my-service -n 50").contains("version mine 1"));
    let path = developer.types(
        r#"deploy-manifest show | jq -r '.services[] | select(.name == "my-service") | .artifact.storePath'"#,
    );
    let path = path.trim();
    assert!(developer.types(&format!("ssh biz ls -la {path}")).contains("bin"));
    // By hand it finds its port taken, and says so.
    let by_hand = developer.tries(&format!("ssh biz sudo {path}/bin/my-service"));
    assert!(by_hand.stderr.contains("Address already in use"), "{}", by_hand.stderr);
    assert!(
        developer
            .tries("ssh biz sudo systemctl status deployer")
            .text()
            .contains("Bring this host to what the manifest says")
    );
    let paths = developer.types("deploy-manifest show | jq '.services[] | .artifact.storePath'");
    assert_eq!(paths.lines().count(), 3, "{paths}");
    developer.types("ssh biz sudo systemctl start deployer");
    assert!(developer.types("ssh biz sudo systemctl status my-service").contains("active (running)"));
    let caddy = developer.types("ssh biz curl -s localhost:2019/config/ | jq .");
    let dials = ["127.0.0.1:8080", "127.0.0.1:{file./run/omni-deploy/ports/my-service}"];
    assert!(caddy.contains("my.example.com") && dials.iter().any(|dial| caddy.contains(dial)), "{caddy}");

    // And what the hosts report is there to be seen.
    let status = developer.types("omni-deploy status");
    assert!(["ava", "podcastitlater-web", "my-service"].iter().all(|n| status.contains(n)), "{status}");
    let logs = developer.types("omni-deploy logs ava -n 5");
    assert!(logs.contains("ava"), "{logs}");

    // "Stays up": after a reboot, also while the bucket cannot be reached.
    host.reboot();
    for (domain, page) in
        [("ava.example.com", "ava 1"), ("podcasts.example.com", "podcasts 2"), ("my.example.com", "mine 1")]
    {
        host.page_soon(domain, page, Duration::from_secs(40));
    }
    assert_eq!(
        host.sh("systemctl is-enabled deployer.timer; systemctl is-active deployer.timer"),
        "enabled\nactive"
    );
    bucket.down();
    host.reboot();
    for (domain, page) in
        [("ava.example.com", "ava 1"), ("podcasts.example.com", "podcasts 2"), ("my.example.com", "mine 1")]
    {
        host.page_soon(domain, page, Duration::from_secs(40));
    }
    let pass = host.pass();
    assert_eq!(pass.code, 0, "{}", pass.said);
    assert!(pass.said.contains("working from the last good manifest"), "{}", pass.said);
    assert!(host.state()["manifestError"].is_string());
    bucket.up();
    host.good_pass();
    assert!(host.state()["manifestError"].is_null());
}
