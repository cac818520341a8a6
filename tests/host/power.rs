//! Power cuts and reboots in the middle of a deploy, with the bucket within reach afterwards and without: one
//! pass after the boot, everything runs that should.

use crate::bucket::{self, Bucket};
use crate::lab::{Host, soon};
use crate::solo::web;
use std::time::Duration;

/// What is asked of the host while the new version is being proved.
const PROVING: [(&str, &str); 2] =
    [("restart", "curl -sf -m 2 localhost:8001 | grep two"), ("overlap", "systemctl is-active web-next")];

#[test]
fn a_host_that_loses_power_in_a_deploy_finds_back_with_and_without_the_bucket() {
    let host = Host::boot("power");
    let mut bucket = Bucket::start(&host, "power");
    host.sh(&format!(
        "echo '{{\"caddyServer\": \"srv0\", \"store\": \"{}\"}}' >/etc/omni-deploy/config.json
         umask 077; cat >/etc/omni-deploy/deployer.env <<'EOF'\n{}EOF
         cat >/root/developer.env <<'EOF'\n{}EOF
         systemctl disable --now deployer.timer",
        bucket.url(),
        bucket::env(bucket::HOST),
        bucket::env(bucket::DEVELOPER)
    ));
    let edit = |command: &str| {
        host.sh(&format!("set -a; . /root/developer.env; export OMNI_DEPLOY_DEFAULT_HOSTS=power; {command}"));
    };
    let add = |service: &serde_json::Value| edit(&format!("deploy-manifest add-service '{service}'"));
    let (one, two) = (host.closure("web", "one", ""), host.closure("web", "two", ""));
    let other = host.closure("other", "one", "");
    edit("deploy-manifest init");
    add(&web("other", 8002, &other));
    for (rollout, proving) in PROVING {
        let mut service = web("web", 8001, &one);
        service["rollout"] = rollout.into();
        add(&service);
        for (how, reachable) in [("power cut", true), ("power cut", false), ("reboot", false)] {
            let what = format!("{how} in {rollout}, bucket {}", if reachable { "up" } else { "down" });
            edit(&format!("deploy-manifest update web {one}"));
            host.good_pass();
            assert_eq!(host.page("web.example.com").as_deref(), Ok("one"), "{what}");
            edit(&format!("deploy-manifest update web {two}"));
            host.sh("systemctl start --no-block deployer");
            soon(&format!("{what}: it is being proved"), Duration::from_secs(30), || {
                // In one call: the pass goes on after its three seconds of settling.
                let output = host.try_sh(&format!(
                    "{proving}; ls /var/lib/deployer/intent.json; [[ $(systemctl is-active deployer) == activating ]]"
                ));
                if output.status.ok() { Ok(()) } else { Err(output.text()) }
            });
            if !reachable {
                bucket.down();
            }
            if how == "reboot" {
                host.reboot();
            } else {
                host.power_cut();
                host.start();
            }
            let booted = host.sh("systemctl is-active web other || true");
            assert_eq!(booted, "active\nactive", "{what}: before any pass");
            let pass = host.pass();
            assert_eq!(pass.code, 0, "{what}: {}", pass.said);
            for (name, page) in [("web", "two"), ("other", "one")] {
                assert_eq!(
                    host.page(&format!("{name}.example.com")).as_deref(),
                    Ok(page),
                    "{what}: {}",
                    pass.said
                );
            }
            let left = host.sh(
                "ls -A /var/lib/deployer | grep -E 'intent|^\\.omni' || true
                 systemctl list-units --all --plain --no-legend '*-next.service'; ls /etc/systemd/system | grep next || true
                 find /nix/var/nix/gcroots/omni-deploy /etc/systemd/system -name '.omni*'",
            );
            assert_eq!(left, "", "{what}");
            assert!(
                host.sh("readlink /proc/$(systemctl show --property=MainPID --value web)/exe")
                    .starts_with(&two),
                "{what}"
            );
            if !reachable {
                let said = host.sh("journalctl --no-pager --output cat --boot --unit deployer");
                assert!(said.contains("working from the last good manifest"), "{what}: {said}");
                bucket.up();
            }
            // Nothing is left to do, and the report that was held up arrives.
            host.good_pass();
            let report: serde_json::Value = serde_json::from_slice(&bucket.get("hosts/power.json")).unwrap();
            assert_eq!(report["services"]["web"]["storePath"], two.as_str(), "{what}");
            println!("{what}: found back");
        }
        edit("deploy-manifest remove-service web");
        host.good_pass();
    }

    // A boot with nothing under way and nobody to ask: what ran runs again, and the route is there.
    bucket.down();
    host.sh(
        "caddy-api /id/deployer -X DELETE; rm -rf /etc/systemd/system/multi-user.target.wants/other.service",
    );
    host.power_cut();
    host.start();
    let pass = host.pass();
    assert_eq!(pass.code, 0, "{}", pass.said);
    assert_eq!(host.page("other.example.com").as_deref(), Ok("one"), "{}", pass.said);
}
