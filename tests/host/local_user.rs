//! Somebody with an account on the host and nothing else: what he can read of a service's secrets, hold up, plant,
//! and see of the spool while a closure is fetched. He is root's guest at most; nothing of ours is his.

use crate::lab::{Background, soon};
use crate::runbook::biz;
use crate::solo::{Solo, solo, web};
use omni_deploy::runner::Output;
use serde_json::json;
use std::time::Duration;

/// Stands in the secrets, and may stand nowhere else.
const MARK: &str = "hunter2-1sjbxcbfq0nbh72q8g0wx8dwach1kcp4";
/// Finds it, without being it: journald notes the arguments of whoever logs.
const PATTERN: &str = "hunter[2]-1sjbxcbfq0nbh72q8g0wx8dwach1kcp4";
/// Every place that a pass writes, or that is ours.
const OURS: &str = "/etc/omni-deploy /etc/systemd/system /run/systemd /run/omni-deploy /var/lib/deployer \
                    /var/lib/omni-deploy /var/lib/deployer-secrets /var/cache/deployer /nix/var/nix/gcroots \
                    /usr/local/bin";

/// The host with that user, and with a service that has secrets.
fn host() -> Solo {
    let host = solo();
    host.sh(&format!(
        "id mallory >/dev/null 2>&1 || useradd --create-home mallory
         umask 077; echo 'TOKEN={MARK}' >/var/lib/deployer-secrets/web.env"
    ));
    let mut service = web("web", 8001, &host.closure("web", "one", ""));
    service["envFile"] = json!("/var/lib/deployer-secrets/web.env");
    host.add(&service);
    host.good_pass();
    host.serves("web", "one");
    assert!(host.sh("curl -sSf localhost:8001/env").contains(MARK), "the service has its secret");
    host
}

/// Runs a script as that user, whatever its status.
fn mallory(host: &Solo, script: &str) -> Output {
    host.try_sh(&format!("runuser -u mallory -- bash -uo pipefail -c {}", quoted(script)))
}

fn quoted(script: &str) -> String {
    format!("'{}'", script.replace('\'', r"'\''"))
}

/// What root reads in the journal has it nowhere.
#[track_caller]
fn in_no_log(host: &Solo) {
    let found =
        host.sh(&format!("journalctl --sync; journalctl --no-pager -o export | grep -a {PATTERN} || true"));
    assert_eq!(found, "");
}

/// Everything that he gets out of a script.
#[track_caller]
fn gets(host: &Solo, script: &str) -> String {
    let output = mallory(host, script);
    format!("{}{}", output.text(), output.stderr)
}

#[test]
fn a_secret_is_nowhere_but_in_its_file_and_its_process() {
    let host = host();
    // Also after a new version, one that is refused, and a look by everybody's means.
    host.update("web", &host.closure("web", "two", ""));
    host.good_pass();
    host.update("web", &host.closure("web", "three", "exit 7"));
    host.passes_with(3);
    host.serves("web", "two");
    host.sh("deployer plan; deployer state; omni-deploy status || true; omni-deploy secrets check web; omni-deploy doctor || true");
    for script in [
        "systemctl show web; systemctl cat web; systemctl status web; systemctl show-environment",
        "journalctl --no-pager -o export",
        "cat /var/lib/deployer/state.json /var/lib/deployer/applied/* /var/lib/omni-deploy/hosts/*",
        "cat /proc/*/cmdline /proc/*/environ | tr '\\0' '\\n'",
        "caddy-api /config/",
        &format!(
            "grep -rsa {PATTERN} {OURS} /tmp /var/tmp /dev/shm /var/log /etc /run /home --exclude-dir=proc"
        ),
        "ls -la /var/lib/deployer-secrets; cat /var/lib/deployer-secrets/web.env",
        "omni-deploy secrets check web; EDITOR=cat omni-deploy secrets edit web",
        "omni-deploy secrets on-host read web environment /var/lib/deployer-secrets/web.env",
        "deployer plan; deployer state; omni-deploy doctor; omni-deploy status",
    ] {
        let got = gets(&host, script);
        assert!(!got.contains(MARK), "{script}: {got}");
        assert!(!got.trim().is_empty() || script.starts_with("grep"), "{script} was no look at all");
    }
    assert!(gets(&host, "ls /var/lib/deployer-secrets").contains("Permission denied"));
    // Not for root either, but in the file itself and in the memory of who has to know it.
    let found = host.sh(&format!(
        "grep -rlsa {PATTERN} {OURS} /tmp /var/tmp /dev/shm /root /var/log /nix/store /nix/var || true"
    ));
    assert_eq!(found, "/var/lib/deployer-secrets/web.env");
    in_no_log(&host);
    assert!(!host.sh("caddy-api /config/").contains(MARK));
    let pid = host.sh("systemctl show --property=MainPID --value web");
    let processes =
        host.sh(&format!("grep -lsa {PATTERN} /proc/[0-9]*/environ /proc/[0-9]*/cmdline || true"));
    assert_eq!(processes, format!("/proc/{pid}/environ"));
}

/// What a program says that cannot log in. Not MARK, which may be in no log.
const SAID: &str = "tr0ub4dor-hq9kxr5rmq0p";

#[test]
fn the_last_words_of_a_release_that_fails_are_roots_to_read() {
    let host = host();
    host.sh(&format!("echo 'PASSWORD={SAID}' >>/var/lib/deployer-secrets/web.env"));
    let leaky = host.sh("dir=$(mktemp -d)/web-leaky; mkdir -p $dir/bin; cat >$dir/bin/web <<'EOF'
#!/bin/sh
echo \"fatal: postgres://app:$PASSWORD@db does not answer\"; exit 3
EOF
         chmod 755 $dir/bin/web; nix-store --add $dir");
    host.update("web", &leaky);
    host.passes_with(3);
    let report = "/var/lib/omni-deploy/hosts/solo.json";
    let his = [
        "journalctl --no-pager -u web; cat /var/lib/deployer/*.json".into(),
        format!("cat {report}"),
        "deployer state; deployer state --json; deployer state --live --json; omni-deploy status; omni-deploy status --live".into(),
    ];
    let he_learns_nothing = |when: &str| {
        for script in &his {
            let got = gets(&host, script);
            assert!(!got.contains(SAID) && !got.trim().is_empty(), "{when}: {script}: {got}");
        }
        assert!(!host.sh(&format!("cat {report}")).contains(SAID), "{when}");
    };
    let root_reads = |when: &str| {
        for command in [
            "deployer state",
            "deployer state --json",
            "deployer state --live --json",
            "omni-deploy status --live",
        ] {
            let told = host.try_sh(command).text();
            assert!(told.contains(SAID), "{when}: {command}: {told}");
        }
        assert_eq!(host.sh("stat -c %a:%U /var/lib/deployer/lines.json"), "600:root", "{when}");
    };
    he_learns_nothing("after the release");
    root_reads("after the release");
    assert!(gets(&host, "deployer state").contains("sudo deployer state"));

    // As a program before this one left it, everywhere.
    let lines = format!("[\"password {SAID}\"]");
    host.sh(&format!(
        "cd /var/lib/deployer; rm lines.json; jq '.services.web.failure.journal = {lines}' state.json >/root/old
         cat /root/old >state.json; cat /root/old >{report}"
    ));
    assert!(gets(&host, "cat /var/lib/deployer/state.json").contains(SAID));
    host.passes_with(3);
    he_learns_nothing("after the upgrade");
    root_reads("after the upgrade");

    // Who wants them in the bucket gets them without what is in the secrets file.
    let config = "/etc/omni-deploy/config.json";
    host.sh(&format!("cp {config} /root/config; jq '.reportLines = true' /root/config >{config}"));
    assert!(host.try_sh("deployer run --retry web").status == omni_deploy::runner::ProcessStatus::Exit(3));
    let told = host.sh(&format!("cat {report}"));
    assert!(told.contains("fatal: *** does not answer") || told.contains("postgres://app:***@db"), "{told}");
    he_learns_nothing("with lines in the report");
    host.sh(&format!("cp /root/config {config}"));
    host.update("web", &host.closure("web", "two", ""));
    host.good_pass();
    host.sh("test ! -e /var/lib/deployer/lines.json");
}

#[test]
fn a_line_that_systemd_would_write_to_the_journal_starts_nothing() {
    let host = host();
    host.sh(&format!("echo 'export KEY={MARK}' >>/var/lib/deployer-secrets/web.env"));
    host.update("web", &host.closure("web", "two", ""));
    host.passes_with(3);
    let reason = host.reason("web");
    assert!(reason.contains("web.env, line 2 ") && reason.contains("secrets edit web"), "{reason}");
    host.serves("web", "one");
    in_no_log(&host);
    // Mended, it is tried again without being asked.
    host.sh("sed -i '/^export/d' /var/lib/deployer-secrets/web.env");
    host.good_pass();
    host.serves("web", "two");
}

#[test]
fn he_holds_nothing_up_and_plants_nothing() {
    let host = host();
    // Every lock there is, and the folders and files themselves, which can be locked as well.
    let locks = host.sh(&format!(
        "find {OURS} -xdev \\( -name '*lock*' -o -path '*omni-deploy*' -o -path '*deployer*' \\) 2>/dev/null"
    ));
    assert!(
        ["/run/omni-deploy/lock", "/var/lib/omni-deploy/.omni-deploy.lock"].iter().all(|l| locks.contains(l))
    );
    for lock in
        ["/run/omni-deploy/lock", "/var/lib/omni-deploy/.omni-deploy.lock", "/var/lib/deployer-secrets"]
    {
        let held = mallory(&host, &format!("flock --nonblock {lock} true"));
        assert!(!held.status.ok() && held.stderr.contains("Permission denied"), "{lock}: {}", held.stderr);
    }
    assert_eq!(host.sh("find /run/omni-deploy -type f -name '*lock*' ! -perm 600"), "");
    // He holds whatever else he can open of ours, for as long as a pass, a push and an edit take.
    let mut holder = Background::start(
        "exec 3<&0; \"$@\" <&3 3<&-",
        &[
            &format!("{}/tests/lab/lab.sh", crate::lab::TOP),
            "run",
            "solo",
            "runuser",
            "-u",
            "mallory",
            "--",
            "bash",
            "-c",
            &format!(
                "n=0; while read -r path; do
                   exec {{fd}}<\"$path\" && flock --nonblock $fd && n=$((n + 1)); done 2>/dev/null \
                   < <(find {OURS} -xdev -readable \\( -type f -o -type d \\) 2>/dev/null)
                 echo held $n; cat"
            ),
        ],
    );
    let held = holder.line();
    assert!(held.strip_prefix("held ").is_some_and(|n| n.parse::<u32>().unwrap() > 5), "{held}");
    host.update("web", &host.closure("web", "two", ""));
    host.good_pass();
    host.serves("web", "two");
    host.sh("EDITOR='sed -i s/TOKEN/KEY/' omni-deploy secrets edit web --restart");
    soon("it has the new name", Duration::from_secs(10), || {
        let all = host.try_sh("curl -sSf localhost:8001/env | tr '\\0' '\\n'").text();
        if all.contains(&format!("KEY={MARK}")) { Ok(()) } else { Err("not yet".into()) }
    });
    drop(holder);
    // Nothing of it is writable for him, nor are the folders on the way there.
    let writable = gets(
        &host,
        &format!(
            "find {OURS} / /usr /usr/local /var /var/lib /run /nix /nix/var /nix/var/nix /etc \
        -maxdepth 0 -writable; find {OURS} -xdev -writable ! -type l 2>/dev/null"
        ),
    );
    let his: Vec<&str> =
        writable.lines().filter(|l| !l.starts_with("find:") && !l.contains("/gcroots/per-user")).collect();
    // What anybody may write to in systemd's own folder are its sockets.
    let his: Vec<&&str> = his.iter().filter(|l| !l.starts_with("/run/systemd/")).collect();
    assert!(his.is_empty(), "{his:?}");
    // Nor does a pass by hand, which uses the shared folders, trip over what he has put there.
    mallory(
        &host,
        "cd /tmp; for n in $(seq 9); do ln -s /etc/shadow .omni-deploy-$n; done; ln -s /etc/shadow deploy-manifest-x",
    );
    host.update("web", &host.closure("web", "three", ""));
    host.sh("deployer run; rm -f /tmp/.omni-deploy-? /tmp/deploy-manifest-x");
    host.serves("web", "three");
    // And what he may start himself tells him that it is root's.
    for command in
        ["deployer run", "deployer pause web", "deployer rollback web", "deploy-manifest set web env.A=1"]
    {
        let output = mallory(&host, command);
        assert!(!output.status.ok(), "{command}: {}", output.text());
    }
    host.serves("web", "three");
}

#[test]
fn he_sees_nothing_of_the_spool_while_a_closure_is_fetched() {
    let mut biz = biz();
    let crate::runbook::Biz { host, bucket, developer } = &mut *biz;
    host.sh("id mallory >/dev/null 2>&1 || useradd --create-home mallory");
    developer.types(
        r#"deploy-manifest add-service '{"name": "spooled", "hosts": ["biz"],
             "artifact": {"storePath": "/nix/store/placeholder"}, "env": {"PORT": "8001"},
             "http": {"domain": "spooled.example.com", "internalPort": 8001}, "health": {"path": "/health"}}'"#,
    );
    // Of its own, which no other test has brought to the host yet.
    developer.write("Biz/Spooled.py", "# : out spooled\nVERSION = spooled 1\n");
    developer.types("Omni/Ide/push.sh Biz/Spooled.py");
    let ports = || host.sh("ss -Htln | awk '{print $4}' | sort");
    let before = ports();
    // Every request takes two seconds: time to look around.
    bucket.faults(r#"{"delay_ms": 2000}"#);
    host.sh("systemctl start --no-block deployer");
    let spool = "/var/cache/deployer/omni-deploy/fetch";
    soon("the spool is in use", Duration::from_secs(60), || {
        match host.try_sh(&format!("! flock --nonblock {spool}/lock true")).status.ok()
            && host.try_sh(&format!("test -e {spool}/lock")).status.ok()
        {
            true => Ok(()),
            false => Err("no".into()),
        }
    });
    let as_him = |script: &str| {
        host.try_sh(&format!("runuser -u mallory -- bash -uo pipefail -c {}", quoted(script))).status.ok()
    };
    // First of all: when it has come, its service listens.
    assert_eq!(ports(), before, "a fetch listens nowhere");
    for script in [
        format!("ls {spool}"),
        format!("cat {spool}/nix-cache-info"),
        format!("touch {spool}/nar/x"),
        format!("exec 9<{spool}/lock"),
        format!("cd {spool}"),
        "touch /var/cache/deployer/omni-deploy/x".to_string(),
    ] {
        assert!(!as_him(&script), "{script}");
    }
    bucket.faults("{}");
    let pass = host.pass();
    assert_eq!(pass.code, 0, "{}", pass.said);
    assert_eq!(host.page("spooled.example.com").as_deref(), Ok("spooled 1"));
}
