//! What a host remembers, and how it finds its way back: from refusals, changed secrets, outages of the bucket
//! and of the whole network, and a disk that is too small.

use crate::bucket::{self, Bucket};
use crate::lab::{Host, soon};
use crate::solo::{solo, web};
use omni_deploy::runner::ProcessStatus;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[test]
fn a_refused_version_is_tried_again_only_when_something_that_goes_into_it_changes() {
    let host = solo();
    host.sh("printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >/etc/systemd/system/dep.service
             systemctl daemon-reload; systemctl start dep
             echo A=1 >/var/lib/deployer-secrets/web.env; chmod 600 /var/lib/deployer-secrets/web.env");
    let one = host.closure("web", "one", "");
    let mut service = web("web", 8001, &one);
    service["envFile"] = "/var/lib/deployer-secrets/web.env".into();
    service["systemd"] = json!({"requires": ["dep.service"]});
    host.add(&service);
    host.good_pass();
    let two = host.closure("web", "two", "exit 3");
    host.update("web", &two);
    let tried = format!("web: starting {two}");
    let tries = |when: &str, again: bool| {
        let pass = host.passes_with(3);
        assert_eq!(pass.said.contains(&tried), again, "{when}: {}", pass.said);
        host.serves("web", "one");
        let failure = host.service("web")["failure"].clone();
        assert_eq!(
            (&failure["attempted"], &host.service("web")["status"]),
            (&json!(two), &json!("rejected"))
        );
        let lines = host.sh("deployer state --json | jq .services.web.failure.journal");
        assert!(lines.contains("cannot open the database"), "{failure}: {lines}");
        let pass = host.passes_with(3);
        assert!(!pass.said.contains("starting"), "after {when}: {}", pass.said);
    };
    tries("the update", true);
    tries("nothing", false);
    let status = host.try_sh("omni-deploy status web").text();
    assert!(status.contains("rejected") && status.contains("--retry web"), "{status}");
    host.sh("deploy-manifest set web env.X=1");
    tries("its entry changed", true);
    host.sh("deploy-manifest set web health.path=/healthy health.timeoutSec=5");
    tries("its health path changed", true);
    host.add(&web("other", 8002, "/nix/store/placeholder"));
    tries("another service changed", false);
    host.sh("echo A=2 >/var/lib/deployer-secrets/web.env");
    tries("its secrets changed", true);
    // Stopping what it requires stops it; its start brings both up, which is no reason for another attempt.
    host.sh("systemctl stop dep");
    tries("what it requires was stopped", true);
    assert_eq!(host.sh("systemctl is-active dep"), "active");
    let again = host.try_sh("deployer run --retry web");
    assert!(again.status == ProcessStatus::Exit(3) && again.stderr.contains(&tried), "{}", again.stderr);
    tries("a person asked", false);
    // Back to what runs: nothing is refused any more, and nothing restarts.
    let invocation = host.invocation("web");
    host.update("web", &one);
    host.sh("deploy-manifest set web health.path=/health; deploy-manifest set web env.X=; true");
    host.sh("systemctl stop dep; rm /etc/systemd/system/dep.service; systemctl daemon-reload");
    host.sh("deploy-manifest set web systemd.requires=[]");
    host.good_pass();
    host.serves("web", "one");
    assert_ne!(host.invocation("web"), invocation);
}

#[test]
fn what_cannot_be_fetched_is_tried_again_more_and_more_rarely_by_the_timer_alone() {
    let host = solo();
    let one = host.deploys_web();
    let invocation = host.invocation("web");
    let two = host.closure("web", "apart", "");
    host.sh(&format!("nix copy --to file:///root/elsewhere {two} && nix-store --delete {two}"));
    host.update("web", &two);
    let timer = |fetches: bool| {
        let run = host.try_sh("TRIGGER_UNIT=deployer.timer deployer run --timer");
        assert_eq!(run.status, ProcessStatus::Exit(3), "{}", run.stderr);
        assert_eq!(run.stderr.contains("fetching"), fetches, "{}", run.stderr);
        let service = host.service("web");
        assert_eq!((&service["status"], &service["storePath"]), (&json!("failed"), &json!(one)));
        assert_eq!(host.invocation("web"), invocation);
    };
    // A state that is old by so many seconds.
    let later = |seconds: u32| {
        host.sh(&format!(
            "cd /var/lib/deployer; jq '.services.web.failure.at |= (fromdate - {seconds} | todate)' state.json >x; mv x state.json"
        ));
    };
    timer(true);
    timer(true);
    timer(true);
    timer(false);
    // What else happens meanwhile does not put it off.
    host.add(&web("later", 8002, "/nix/store/placeholder"));
    timer(false);
    later(290);
    timer(false);
    later(600);
    timer(true);
    timer(false);
    // A person or a push does not wait.
    let pass = host.passes_with(3);
    assert!(pass.said.contains("fetching"), "{}", pass.said);
    host.serves("web", "one");
    host.sh("cp -rn /root/elsewhere/. /var/lib/omni-deploy/");
    host.good_pass();
    host.serves("web", "apart");
}

#[test]
fn changed_secrets_are_said_without_their_content_until_a_restart() {
    let host = solo();
    let file = "/var/lib/deployer-secrets/web.env";
    host.sh(&format!("echo TOKEN=hunter1 >{file}; chmod 600 {file}"));
    let mut service = web("web", 8001, &host.closure("web", "one", ""));
    service["envFile"] = file.into();
    host.add(&service);
    host.good_pass();
    assert_eq!(host.service("web")["secretsChanged"], false);
    let invocation = host.invocation("web");
    host.sh(&format!("sleep 0.02; echo TOKEN=hunter2 >{file}"));
    host.good_pass();
    assert_eq!(host.service("web")["secretsChanged"], true);
    assert_eq!(host.invocation("web"), invocation, "a change of secrets restarts nothing");
    for command in ["omni-deploy status", "deployer state"] {
        let said = host.try_sh(command).text();
        assert!(said.contains("restart"), "{command}: {said}");
    }
    assert_eq!(host.service("web")["status"], "running");
    host.sh(
        "if grep -r hunter /var/lib/deployer /var/lib/omni-deploy /etc/systemd/system || journalctl | grep hunter; then exit 1; fi",
    );
    host.sh("systemctl restart web");
    host.good_pass();
    assert_eq!(host.service("web")["secretsChanged"], false);
    assert!(!host.try_sh("omni-deploy status").text().contains("secrets"));
    assert!(host.sh("curl -sSf localhost:8001/env | tr '\\0' '\\n'").contains("TOKEN=hunter2"));
}

#[test]
fn what_a_unit_was_or_was_read_as_is_repaired_and_said() {
    let host = solo();
    let one = host.deploys_web();
    let two = host.closure("web", "two", "");
    host.update("web", &two);
    host.good_pass();
    let unit = "/etc/systemd/system/web.service";
    let roots = "/nix/var/nix/gcroots/omni-deploy/web";
    host.sh(&format!("cp -p {unit} /root/unit"));
    for (what, says, change) in [
        (
            "its process runs an older path",
            "another version than its unit",
            format!(
                "sed -i s,{two},{one}, {unit}; systemctl daemon-reload; systemctl restart web; cp -p /root/unit {unit}"
            ),
        ),
        (
            "its process runs an older path, and systemd knows",
            "another version than its unit",
            format!(
                "sed -i s,{two},{one}, {unit}; systemctl daemon-reload; systemctl restart web; cp -p /root/unit {unit}; systemctl daemon-reload"
            ),
        ),
        (
            "ExecStart as systemd read it",
            "systemd had read another unit",
            format!("sed -i s,{two},{one}, {unit}; systemctl daemon-reload; cp -p /root/unit {unit}"),
        ),
        (
            "systemd has no unit of the process",
            "systemd had read another unit",
            format!("rm {unit}; systemctl daemon-reload; cp -p /root/unit {unit}"),
        ),
        ("masked", "the unit was gone", format!("systemctl stop web; rm {unit}; systemctl mask web")),
        ("masked while it runs", "the unit was gone", format!("rm {unit}; systemctl mask web")),
        (
            "a root of the version before",
            "root",
            format!("rm {roots}/{}", one.trim_start_matches("/nix/store/")),
        ),
        ("disabled", "started at boot", "systemctl disable web".into()),
    ] {
        host.sh(&change);
        let pass = host.passes_with(0);
        assert!(pass.said.contains(says), "{what}: {}", pass.said);
        host.serves("web", "two");
        host.sh(&format!(
            "cmp {unit} /root/unit; systemctl is-enabled web
             [[ $(systemctl show --property=NeedDaemonReload,LoadState --value web | xargs) =~ ^(no loaded|loaded no)$ ]]
             systemctl show --property=ExecStart web | grep -q {two}
             test -e {roots}/{}; test -e {roots}/{}",
            one.trim_start_matches("/nix/store/"),
            two.trim_start_matches("/nix/store/")
        ));
        let plan = host.sh("deployer plan");
        assert!(plan.ends_with("nothing to do"), "{what}: {plan}");
    }
    // Removed from the manifest while its unit is gone: its process goes as well.
    host.add(&web("other", 8002, &host.closure("other", "one", "")));
    host.good_pass();
    host.sh(
        "rm /etc/systemd/system/other.service; systemctl daemon-reload; deploy-manifest remove-service other",
    );
    host.good_pass();
    assert!(host.try_sh("pgrep -f bin/other").text().is_empty());
    host.sh("[[ ! -L /etc/systemd/system/multi-user.target.wants/other.service ]]");
    // Somebody's files among the roots neither end a pass nor keep a service from going.
    host.add(&web("other", 8002, &host.closure("other", "one", "")));
    host.good_pass();
    host.sh("touch /nix/var/nix/gcroots/omni-deploy/notes /nix/var/nix/gcroots/omni-deploy/other/notes");
    host.sh("deploy-manifest remove-service other");
    host.good_pass();
    let plan = host.sh("deployer plan");
    assert!(plan.ends_with("nothing to do"), "{plan}");
    host.sh("rm -r /nix/var/nix/gcroots/omni-deploy/notes /nix/var/nix/gcroots/omni-deploy/other");
}

#[test]
fn a_pause_holds_until_it_is_resumed_or_over() {
    let host = solo();
    let one = host.deploys_web();
    host.sh("deployer pause web --for 2h");
    assert_eq!(host.sh("systemctl show --property=ActiveState --value web"), "inactive");
    let service = host.service("web");
    assert!(service["status"] == "stopped" && service["pausedUntil"].is_string(), "{service}");
    let status = host.try_sh("omni-deploy status web");
    assert!(status.text().contains("paused") || status.text().contains("stopped"), "{}", status.text());
    host.sh("systemctl start web");
    host.passes_with(0);
    assert_eq!(host.sh("systemctl show --property=ActiveState --value web"), "inactive", "it stays paused");
    // Also a process whose unit is gone.
    host.sh("deployer resume web; rm /etc/systemd/system/web.service; systemctl daemon-reload; deployer pause web");
    assert!(host.try_sh("pgrep -f bin/web").text().is_empty());
    // Its closure is not collected meanwhile, though somebody removed the root.
    host.sh("rm -r /nix/var/nix/gcroots/omni-deploy/web");
    host.passes_with(0);
    host.sh(&format!("nix-collect-garbage; test -e {one}"));
    host.sh("deployer resume web");
    host.serves("web", "one");
    host.sh("deployer pause web --for 1s; sleep 1.1");
    host.good_pass();
    host.serves("web", "one");
}

#[test]
fn a_manifest_that_would_empty_the_host_is_refused_where_people_look() {
    let host = solo();
    host.deploys_web();
    let invocation = host.invocation("web");
    host.sh("deploy-manifest set web 'hosts=[\"elsewhere\"]'");
    for _ in 0..2 {
        host.refuses_to_be_emptied();
        assert_eq!(host.invocation("web"), invocation);
        host.serves("web", "one");
        let state = host.state();
        assert!(state["manifestError"].as_str().is_some_and(|e| e.contains("--allow-empty")), "{state}");
        assert_eq!(state["services"]["web"]["status"], "running");
        host.sh("cmp /var/lib/deployer/state.json /var/lib/omni-deploy/hosts/solo.json");
    }
    let status = host.try_sh("omni-deploy status");
    assert!(status.text().contains("allow-empty"), "{}{}", status.text(), status.stderr);
    // A person who means it.
    host.sh("deployer run --allow-empty");
    assert_eq!(host.sh("systemctl show --property=LoadState --value web"), "not-found");
    assert!(host.state()["manifestError"].is_null());
}

/// A host whose manifest and closures come over the network, with web in two versions deployed.
struct Remote {
    host: Host,
    bucket: Bucket,
    one: String,
    two: String,
}

fn remote(name: &'static str, unit_dir: &str) -> Remote {
    let host = Host::boot(name);
    let bucket = Bucket::start(&host, "far");
    let config = json!({"store": bucket.url(), "caddyServer": "srv0", "unitDir": unit_dir, "host": "far"});
    host.sh(&format!(
        "echo '{config}' >/etc/omni-deploy/config.json; umask 077
         cat >/etc/omni-deploy/deployer.env <<'EOF'\n{}EOF
         cat >/root/developer.env <<'EOF'\n{}EOF
         sed 's/^/export /' /etc/omni-deploy/deployer.env >/root/.profile-host
         sed 's/^/export /' /root/developer.env >/root/.profile-developer; . /root/.profile-developer; deploy-manifest init",
        bucket::env(bucket::HOST),
        bucket::env(bucket::DEVELOPER)
    ));
    let (one, two) = (host.closure("web", "one", ""), host.closure("web", "two", ""));
    let mut service = web("web", 8001, &one);
    service["hosts"] = json!(["far"]);
    host.sh(&format!(". /root/.profile-developer; deploy-manifest add-service '{service}'"));
    host.good_pass();
    host.sh(&format!(". /root/.profile-developer; deploy-manifest update web {two}"));
    host.good_pass();
    assert_eq!(host.page("web.example.com").as_deref(), Ok("two"));
    Remote { host, bucket, one, two }
}

#[test]
fn a_host_that_boots_without_its_bucket_runs_everything_again() {
    for unit_dir in ["/etc/systemd/system", "/run/systemd/system"] {
        let Remote { host, mut bucket, two, .. } = remote("offline", unit_dir);
        bucket.down();
        host.sh(". /root/.profile-host; deployer run"); // The report cannot be written; everything else is well.
        assert_eq!(host.state()["reported"], false);
        for cut in [false, true] {
            if cut {
                host.power_cut();
                host.start();
            } else {
                host.reboot();
            }
            // The timer's pass at boot, and no other.
            soon("web serves again", Duration::from_secs(40), || match host.page("web.example.com") {
                Ok(page) if page == "two" => Ok(()),
                other => Err(format!(
                    "{other:?} {}",
                    host.try_sh("journalctl -b -u deployer -u web -u caddy -n 40 --no-pager").text()
                )),
            });
            host.sh("until [[ -n $(systemctl show --property=ExecMainExitTimestamp --value deployer) ]]; do sleep 0.1; done");
            host.until_idle();
            let state = host.state();
            assert_eq!(state["services"]["web"]["storePath"], two, "{unit_dir}: {state}");
            assert!(state["manifestError"].is_string(), "{state}");
            assert_eq!(state["route"]["status"], "current", "{state}");
        }
        bucket.up();
        host.good_pass();
        assert!(host.state()["manifestError"].is_null());
        assert_eq!(host.state()["reported"], true);
    }
}

#[test]
fn a_rollback_on_the_host_needs_no_network_and_holds_until_the_manifest_moves_on() {
    let Remote { host, one, two, bucket: _bucket } = remote("nonet", "/etc/systemd/system");
    let three = host.closure("web", "three", "");
    host.sh("ip link set host0 down");
    let begun = Instant::now();
    let run = host.try_sh(". /root/.profile-host; deployer rollback web");
    assert_eq!(run.status, ProcessStatus::Exit(0), "{}", run.stderr);
    println!("rollback without a network: {:.1} s", begun.elapsed().as_secs_f64());
    let here = |host: &Host| host.sh("curl -sSf -H 'Host: web.example.com' localhost/");
    assert_eq!(here(&host), "one");
    let service = host.service("web");
    assert!(service["pinnedSince"].is_string() && service["storePath"] == one, "{service}");
    assert_eq!(host.pass().code, 0);
    assert_eq!(here(&host), "one", "it is pinned");
    // There is nothing before that.
    let again = host.try_sh(". /root/.profile-host; deployer rollback web");
    assert!(
        again.status == ProcessStatus::Exit(1) && again.stderr.contains("no earlier closure"),
        "{}",
        again.stderr
    );
    assert_eq!(here(&host), "one");
    host.sh("ip link set host0 up; ip route show | grep -q host0");
    host.sh(". /root/.profile-host; deployer run");
    let status = host.try_sh(". /root/.profile-developer; omni-deploy status web");
    assert!(status.text().contains("pinned"), "{}{}", status.text(), status.stderr);
    // Another entry with the same path does not end it, another path does.
    host.sh(
        "(. /root/.profile-developer; deploy-manifest set web env.X=1); . /root/.profile-host; deployer run",
    );
    assert_eq!(here(&host), "one");
    host.sh(&format!("(. /root/.profile-developer; deploy-manifest update web {three}); . /root/.profile-host; deployer run"));
    assert_eq!(here(&host), "three");
    assert!(host.service("web")["pinnedSince"].is_null());
    // Three closures are held, so two steps back are possible, and --unpin leads forward.
    host.sh(". /root/.profile-host; deployer rollback web");
    let first = host.service("web")["storePath"].clone();
    assert!(first == json!(one) || first == json!(two), "{first}");
    host.sh(". /root/.profile-host; deployer rollback web");
    let second: Value = host.service("web")["storePath"].clone();
    assert!(second != first && second != json!(three), "{second}");
    host.sh(". /root/.profile-host; deployer rollback web --unpin");
    assert_eq!(here(&host), "three");
    let unpin = host.try_sh(". /root/.profile-host; deployer rollback web --unpin");
    assert!(
        unpin.status == ProcessStatus::Exit(1) && unpin.stderr.contains("not pinned"),
        "{}",
        unpin.stderr
    );
}

#[test]
fn a_closure_that_does_not_fit_is_refused_before_it_is_begun() {
    let host = Host::boot("small");
    // A disk for Nix that has room for what is small.
    host.sh(
        "systemctl disable --now deployer.timer; mount -t tmpfs -o size=600M tmpfs /nix; mkdir -p /nix/store /nix/var/nix
         echo '{\"caddyServer\": \"srv0\", \"host\": \"solo\", \"defaultHosts\": [\"solo\"]}' >/etc/omni-deploy/config.json
         deploy-manifest init",
    );
    let (one, small) = (host.closure("web", "one", ""), host.closure("small", "one", ""));
    let large = host.sh(
        "dir=$(mktemp -d)/web-large; mkdir -p $dir/bin; cp /opt/omni/page $dir/bin/web; echo large >$dir/version
         head -c 80M /dev/urandom >$dir/data; nix-store --add $dir; rm -r $dir",
    );
    host.sh(&format!("deploy-manifest add-service '{}'; deployer run", web("web", 8001, &one)));
    let invocation = host.invocation("web");
    host.sh(&format!(
        "for p in {small} {large}; do nix copy --to file:///var/lib/omni-deploy?compression=none $p; nix-store --delete $p; done
         deploy-manifest update web {large}; deploy-manifest add-service '{}'
         used=$(df --output=used --block-size=1M /nix | tail -n 1); mount -o remount,size=$((used + 90))M /nix",
        web("small", 8002, &small)
    ));
    let pass = host.pass();
    assert_eq!(pass.code, 3, "{}", pass.said);
    let reason = host.service("web")["failure"]["reason"].as_str().unwrap().to_string();
    for part in [large.as_str(), "MiB", "free", "nix-collect-garbage"] {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    assert!(pass.said.contains(&reason), "{}", pass.said);
    host.sh(&format!("[[ ! -e {large} ]]"));
    assert_eq!(host.invocation("web"), invocation);
    assert_eq!(host.service("web")["storePath"], one);
    // One that fits is not held up.
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
    assert_eq!(host.page("small.example.com").as_deref(), Ok("one"));
    host.sh("mount -o remount,size=600M /nix");
    host.good_pass();
    assert_eq!(host.page("web.example.com").as_deref(), Ok("large"));
}
