//! What people at a laptop are told of a host is so: held against what systemd, the disk and the bucket show.

use crate::lab::soon;
use crate::runbook::{Biz, biz};
use crate::solo::{solo, web};
use omni_deploy::runner::{Output, ProcessStatus};
use serde_json::Value;
use std::time::Duration;

/// The service that these tests look at, on the host of the bucket.
fn deploys(biz: &mut Biz) {
    let Biz { host, developer, .. } = biz;
    // The timer is there, as on any host, and makes no pass while these tests look.
    host.sh("mkdir -p /run/systemd/system/deployer.timer.d
         printf '[Timer]\\nOnActiveSec=\\nOnActiveSec=1d\\n' > /run/systemd/system/deployer.timer.d/far.conf
         systemctl daemon-reload; systemctl restart deployer.timer; systemctl reset-failed deployer || true");
    developer.write("Biz/Seen.py", "# : out seen\nVERSION = seen 1\n");
    developer.types(
        r#"deploy-manifest add-service '{"name": "seen", "hosts": ["biz"], "env": {"PORT": "8041"},
             "artifact": {"storePath": "/nix/store/placeholder"}, "health": {"path": "/health"},
             "http": {"domain": "seen.example.com", "internalPort": 8041}}' && Omni/Ide/ship.sh Biz/Seen.py"#,
    );
}

/// The service's row of `status --json`, and all that is wrong with the host.
fn row(output: &Output) -> (String, Value, String) {
    let value: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", output.stderr));
    let row = value["rows"].as_array().unwrap().iter().find(|r| r["service"] == "seen").unwrap().clone();
    let problems = value["hosts"][0]["problems"].to_string();
    (row["status"].as_str().unwrap().to_string(), row, problems)
}

#[test]
fn live_says_what_systemd_has_at_this_moment() {
    let mut biz = biz();
    // From its next start on Caddy has a folder that is not the developer's, and its socket there if it knows how.
    biz.host.sh("systemctl restart caddy; if runuser -u admin -- test -x /run/caddy; then exit 1; fi");
    deploys(&mut biz);
    let Biz { host, developer, .. } = &mut *biz;
    // No pass comes in between.
    let live = || developer.tries("omni-deploy status seen --live --json");
    let (status, shown, problems) = row(&live());
    assert_eq!(
        (status.as_str(), &shown["off"], &shown["restarts"]),
        ("running", &false.into(), &0.into()),
        "{problems} {shown}"
    );

    host.sh("systemctl stop seen");
    let (status, shown, _) = row(&live());
    assert_eq!((status.as_str(), &shown["off"], &shown["running"]), ("failed", &true.into(), &Value::Null));
    assert!(shown["problem"].as_str().unwrap().contains("it is stopped now"), "{shown}");
    assert_eq!(developer.tries("omni-deploy status seen --live").status, ProcessStatus::Exit(3));
    // The report is of the pass before.
    assert_eq!(row(&developer.tries("omni-deploy status seen --json")).0, "running");

    // A crash loop between passes.
    host.sh("systemctl start seen");
    for n in 1..=2 {
        host.sh("systemctl kill --signal=KILL seen");
        soon("systemd restarts it", Duration::from_secs(40), || {
            // Counted before the process is there: the next one is killed only when it is.
            let is = host.sh("systemctl show --property=NRestarts,SubState seen | sort");
            if is == format!("NRestarts={n}\nSubState=running") { Ok(()) } else { Err(is) }
        });
    }
    let (status, shown, _) = row(&live());
    assert_eq!(
        (status.as_str(), &shown["restarts"], &shown["off"]),
        ("running", &2.into(), &true.into()),
        "{shown}"
    );
    assert!(shown["problem"].as_str().unwrap().contains("it crashed: systemd has restarted it 2"), "{shown}");
    let table = developer.tries("omni-deploy status --live").text();
    assert!(table.lines().next().unwrap().contains("RESTARTS"), "{table}");

    host.sh("systemctl restart seen; systemctl stop deployer.timer");
    let (status, _, problems) = row(&live());
    assert!(
        status == "running" && problems.contains("deployer.timer is inactive: no pass starts by itself"),
        "{problems}"
    );
    host.sh("systemctl start deployer.timer");
    let well = developer.tries("omni-deploy status seen --live");
    assert_eq!(well.status, ProcessStatus::Exit(0), "{}", well.text());

    // A login shell that greets, as `ship`, `logs` and `status --live` meet it.
    host.sh("printf 'echo Welcome to biz; echo careful >&2; printf unfinished\\n' | cat - /home/admin/.bashrc >/tmp/rc || true
             [ -s /tmp/rc ] || printf 'echo Welcome to biz; echo careful >&2; printf unfinished\\n' >/tmp/rc
             install -o admin -m 644 /tmp/rc /home/admin/.bashrc");
    assert!(developer.types("ssh biz true").contains("Welcome"), "the shell greets");
    assert_eq!(developer.tries("omni-deploy status seen --live").status, ProcessStatus::Exit(0));
    assert!(developer.types("Omni/Ide/ship.sh Biz/Seen.py").ends_with("seen biz running\n"));
    let logs = developer.types("omni-deploy logs seen -n 5");
    assert!(!logs.contains("Welcome") && logs.contains("seen"), "{logs}");
    host.sh("rm /home/admin/.bashrc");
}

#[test]
fn a_change_that_no_host_has_yet_is_pending_and_one_that_it_has_is_not() {
    let mut biz = biz();
    deploys(&mut biz);
    let Biz { host, developer, .. } = &mut *biz;
    for change in ["env.GREETING=changed", "http.domain=seen2.example.com", "hardening.protectHome=false"] {
        developer.types(&format!("deploy-manifest set seen {change}"));
        for how in ["", " --live"] {
            let (status, shown, _) = row(&developer.tries(&format!("omni-deploy status seen --json{how}")));
            assert_eq!((status.as_str(), &shown["off"]), ("pending", &false.into()), "{change}{how}");
        }
        host.good_pass();
        assert_eq!(row(&developer.tries("omni-deploy status seen --json")).0, "running", "{change}");
    }
    assert!(host.sh("systemctl show --property=Environment seen").contains("GREETING=changed"));
    assert_eq!(host.sh("systemctl show --property=ProtectHome --value seen"), "no");
    // A ship of the path that is there already waits for the rest of the entry.
    developer.types("deploy-manifest set seen env.GREETING=shipped");
    assert!(developer.types("Omni/Ide/ship.sh Biz/Seen.py").ends_with("seen biz running\n"));
    assert!(host.sh("systemctl show --property=Environment seen").contains("GREETING=shipped"));
}

#[test]
fn a_host_whose_passes_fail_says_so_to_everybody_and_writes_no_more_than_that() {
    let mut biz = biz();
    deploys(&mut biz);
    let Biz { host, developer, bucket } = &mut *biz;
    let config = "/etc/omni-deploy/config.json";
    let invocation = host.invocation("seen");
    host.sh(&format!("cp {config} /root/config.json; cp /etc/omni-deploy/deployer.env /root/deployer.env"));
    let other = "k:igHme8Qi9gyKFZOCtbcuFVJ1hxBRtVR/TyOJJsiLcaI=";
    for (what, script, reported, says) in [
        (
            "a key that nobody trusts",
            format!("jq '.trustedPublicKeys = [\"{other}\"]' /root/config.json >{config}"),
            true,
            "'trustedPublicKeys' does not have",
        ),
        ("a configuration that is none", format!("echo '{{' >{config}"), false, "is not JSON"),
        (
            "no credentials and no manifest",
            "rm /etc/omni-deploy/deployer.env; mkdir -p /root/kept; mv /var/lib/deployer/manifest* /root/kept/".into(),
            false,
            "nothing was changed",
        ),
    ] {
        host.sh(&script);
        let pass = host.pass();
        assert_eq!(pass.code, 1, "{what}: {}", pass.said);
        let error = host.state()["lastError"]["reason"].as_str().unwrap_or_default().to_string();
        assert!(error.contains(says), "{what}: {error}");
        let live = developer.tries("omni-deploy status --live");
        assert_eq!(live.status, ProcessStatus::Exit(3), "{what}: {}", live.text());
        assert!(live.text().contains("last pass failed: ") && live.text().contains(says), "{what}: {}", live.text());
        if reported {
            let stored = developer.tries("omni-deploy status");
            assert_eq!(stored.status, ProcessStatus::Exit(3), "{what}: {}", stored.text());
            assert!(stored.text().contains("last pass failed: "), "{what}: {}", stored.text());
        }
        let ship = developer.tries("Omni/Ide/ship.sh Biz/Seen.py");
        assert_eq!(ship.status, ProcessStatus::Exit(1), "{what}: {}{}", ship.text(), ship.stderr);
        assert!(ship.stderr.contains("last pass failed: ") && ship.stderr.contains(says), "{what}: {}", ship.stderr);
        // A pass that fails as the one before leaves the disk and the bucket alone.
        let written = host.sh("stat -c %Z%Y /var/lib/deployer/state.json");
        let before = bucket.log().len();
        host.sh("sleep 1.1");
        assert_eq!(host.pass().code, 1);
        assert_eq!(host.sh("stat -c %Z%Y /var/lib/deployer/state.json"), written, "{what}");
        assert!(!bucket.log()[before..].iter().any(|l| l.starts_with("PUT")), "{what}");
        assert_eq!(host.invocation("seen"), invocation, "{what}: what runs runs on");

        host.sh(&format!(
            "cp /root/config.json {config}; cp /root/deployer.env /etc/omni-deploy/deployer.env
             [ ! -d /root/kept ] || mv /root/kept/* /var/lib/deployer/ || true"
        ));
        host.good_pass();
        assert!(host.state()["lastError"].is_null(), "{what}");
        let well = developer.tries("omni-deploy status");
        assert_eq!(well.status, ProcessStatus::Exit(0), "{what}: {}", well.text());
    }
}

#[test]
fn a_host_that_reads_another_store_is_not_taken_for_one_that_has_it() {
    let mut biz = biz();
    deploys(&mut biz);
    let Biz { host, developer, .. } = &mut *biz;
    // The same bucket would do, with a prefix.
    host.sh("cp /etc/omni-deploy/config.json /root/config.json
             mkdir -p /var/lib/omni-deploy
             jq '.store = \"file:///var/lib/omni-deploy\" | .cache = .store | del(.trustedPublicKeys)' /root/config.json >/etc/omni-deploy/config.json
             deploy-manifest init; deploy-manifest add-service \"$(jq '.services[] | select(.name == \"seen\")' /var/lib/deployer/manifest.json)\"
             for i in $(seq 60); do deploy-manifest set seen env.N=$i; done");
    host.good_pass();
    let ship = developer.tries("Omni/Ide/ship.sh Biz/Seen.py");
    assert!(ship.text().ends_with("seen biz unknown\n"), "{}{}", ship.text(), ship.stderr);
    assert_eq!(ship.status, ProcessStatus::Exit(1), "{}", ship.stderr);
    let both = ["biz reads file:///var/lib/omni-deploy, you published to s3://deploys", "correct 'store'"];
    assert!(both.iter().all(|part| ship.stderr.contains(part)), "{}", ship.stderr);
    let (status, _, problems) = row(&developer.tries("omni-deploy status seen --live --json"));
    assert!(status == "unknown" && problems.contains("file:///var/lib/omni-deploy"), "{problems}");
    host.sh("cp /root/config.json /etc/omni-deploy/config.json; rm -rf /var/lib/omni-deploy/*");
    // Back in its own, whose numbers are lower, without being told.
    host.good_pass();
    assert_eq!(developer.tries("omni-deploy status").status, ProcessStatus::Exit(0));
}

#[test]
fn two_machines_of_one_name_are_told_and_one_that_replaced_another_is_told_once() {
    let host = solo();
    host.deploys_web();
    host.sh("cp /etc/machine-id /root/machine-id; cp /var/lib/deployer/state.json /root/first.json");
    let first = host.sh("jq -r .machine.id /var/lib/deployer/state.json");
    assert!(!host.sh("cat /etc/machine-id").contains(&first) && first.len() == 32, "{first}");
    let derived = host.sh("systemd-id128 machine-id --app-specific=3f8c1d526a0e4b97917dc42b58e630af");
    assert_eq!(first, derived);
    let status = || host.try_sh("omni-deploy status");
    // A report of this machine that is due: the last is old.
    let due = "jq '.checkedAt = \"2020-01-01T00:00:00Z\"' /var/lib/deployer/state.json >/root/s && cp /root/s /var/lib/deployer/state.json";
    // Another machine with the same name and a disk of its own.
    host.sh(
        "systemd-id128 new >/root/other; cat /root/other >/etc/machine-id; rm /var/lib/deployer/state.json",
    );
    host.passes_with(0);
    let told = status();
    assert_eq!(told.status, ProcessStatus::Exit(3), "{}", told.text());
    assert!(told.text().contains("two machines report as host 'solo'") && told.text().contains(&first[..8]));
    assert!(host.try_sh("omni-deploy doctor").text().contains("two machines report as host 'solo'"));
    // The first one is gone: the next report that is due says so no more.
    host.sh(due);
    host.passes_with(0);
    assert_eq!(status().status, ProcessStatus::Exit(0), "{}", status().text());

    // It is not: it comes back, and finds the other's.
    host.sh("cp /var/lib/deployer/state.json /root/second.json; cp /root/machine-id /etc/machine-id
             jq '.checkedAt = \"2026-01-01T00:00:00Z\"' /root/first.json >/var/lib/deployer/state.json");
    let said = host.good_pass();
    assert!(
        said.contains("two machines report as host 'solo'") && said.contains("give one of them another name"),
        "{said}"
    );
    let told = status();
    assert_eq!(told.status, ProcessStatus::Exit(3), "{}", told.text());
    // And goes on saying so, by every report, while the other one is at work.
    host.sh("jq '.changedAt = null | .reported = false' /var/lib/deployer/state.json >/root/s && cp /root/s /var/lib/deployer/state.json");
    host.passes_with(0);
    assert_eq!(status().status, ProcessStatus::Exit(3), "{}", status().text());
    host.sh("jq 'del(.otherMachine)' /var/lib/deployer/state.json >/root/s && cp /root/s /var/lib/deployer/state.json");
    host.passes_with(0);
}

#[test]
fn a_removal_that_is_not_done_is_shown_until_it_is() {
    let host = solo();
    host.deploys_web();
    let path = host.closure("going", "one", "");
    host.add(&web("going", 8042, &path));
    host.good_pass();
    // Its unit cannot be taken away.
    host.sh("unit=/etc/systemd/system/going.service; mount --bind $unit $unit
             deploy-manifest remove-service going");
    let pass = host.pass();
    assert_ne!(pass.code, 0, "{}", pass.said);
    let shown = host.try_sh("omni-deploy status");
    assert_eq!(shown.status, ProcessStatus::Exit(3), "{}", shown.text());
    let row = shown.text().lines().find(|l| l.starts_with("going ")).unwrap_or_default().to_string();
    assert!(row.contains("removing"), "{}", shown.text());
    assert!(shown.text().contains("not gone yet"), "{}", shown.text());
    assert!(host.sh("deployer state").contains("removing"));
    host.sh("umount /etc/systemd/system/going.service");
    host.good_pass();
    let shown = host.try_sh("omni-deploy status");
    assert!(shown.status == ProcessStatus::Exit(0) && !shown.text().contains("going"), "{}", shown.text());
    host.sh("[[ ! -e /etc/systemd/system/going.service ]]");
}
