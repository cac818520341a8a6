//! A developer and the secrets of a service on a host, over real ssh and sudo.

use crate::lab::soon;
use crate::runbook::{Biz, biz};
use std::time::Duration;

#[test]
fn a_developer_edits_secrets_on_a_host_and_they_pass_through_nothing_else() {
    // Stands in the secrets, and may stand nowhere else. Of this run alone: others may be at it on this machine.
    let id = std::process::id();
    let mark = format!("hunter2-4z26c4q7wrivs2ahhnlm2pai59lib54x{id}x");
    // Finds it, without being it: journald notes the arguments of whoever logs.
    let pattern = format!("hunter[2]-4z26c4q7wrivs2ahhnlm2pai59lib54x{id}x");
    let mut biz = biz();
    let Biz { host, developer, .. } = &mut *biz;
    host.sh("rm -rf /var/lib/deployer-secrets");
    developer.types(
        r#"deploy-manifest add-service '{"name": "ava", "hosts": ["biz"], "env": {"PORT": "8002"},
             "artifact": {"storePath": "/nix/store/placeholder"},
             "envFile": "/var/lib/deployer-secrets/ava.env", "health": {"path": "/health"},
             "http": {"domain": "ava.example.com", "path": "/", "internalPort": 8002}}'"#,
    );
    developer.write("Omni/Ava.hs", "-- : out ava\n-- VERSION = ava 1\n");
    developer.types("Omni/Ide/push.sh Omni/Ava.hs");
    let missing = developer.tries("omni-deploy secrets check ava");
    assert!(
        missing.text().starts_with("biz: ") && missing.text().contains("is missing"),
        "{}",
        missing.stderr
    );
    // The first of them: the folder, the file, and a pass, because nothing runs yet.
    developer.types("EDITOR='sh -c \"echo TOKEN=one >$1\" -' omni-deploy secrets edit ava --restart");
    assert_eq!(
        host.sh("stat -c '%a %U' /var/lib/deployer-secrets /var/lib/deployer-secrets/ava.env"),
        "700 root\n600 root"
    );
    assert_eq!(
        developer.types("omni-deploy secrets check ava"),
        "biz: /var/lib/deployer-secrets/ava.env: TOKEN\n"
    );
    soon("ava runs with it", Duration::from_secs(40), || {
        let environment = host.try_sh("curl -sSf localhost:8002/env | tr '\\0' '\\n'").text();
        if environment.contains("TOKEN=one") { Ok(()) } else { Err(environment) }
    });

    // At a terminal. Ctrl-C is the editor's; the answer to the question is the person's. While the host waits with
    // the write, everybody's arguments and environment are looked at, there and here.
    let started = host.invocation("ava");
    developer.write("editor", "trap got=1 INT\ntouch open\nwhile [ -z \"$got\" ]; do sleep 0.05; done\nsed -i s/one/$(cat mark)/ \"$1\"\n");
    developer.write("mark", &mark);
    host.sh(
        "lock=/run/omni-deploy/folder-$(printf %s /var/lib/deployer-secrets | sha256sum | cut -c1-16).lock
         systemd-run --quiet --unit=hold flock $lock sleep 600
         until [[ $(flock --nonblock $lock true; echo $?) == 1 ]]; do sleep 0.1; done",
    );
    developer.types(
        "rm -f open typescript; (until [ -e open ]; do sleep 0.1; done; printf '\\003'
              until grep -qs y/N typescript; do sleep 0.1; done; printf 'y\\n'
              until grep -q restarted typescript; do sleep 0.1; done) |
             EDITOR='bash editor' timeout 300 script --quiet --flush --return --command 'omni-deploy secrets edit ava' typescript >/dev/null &
         echo $! >typing",
    );
    soon("the host is about to write", Duration::from_secs(120), || {
        let there = host.try_sh("pgrep -f 'on-host writ[e]'");
        if there.status.ok() { Ok(()) } else { Err(there.stderr) }
    });
    let look = format!("grep -lsa {pattern} /proc/[0-9]*/cmdline /proc/[0-9]*/environ || true");
    assert_eq!(host.sh(&look), "");
    assert_eq!(developer.types(&look), "");
    assert!(host.sh("cat /var/lib/deployer-secrets/ava.env").contains("TOKEN=one"));
    host.sh("systemctl stop hold");
    soon("the service was restarted with it", Duration::from_secs(60), || {
        let environment = host.try_sh("curl -sSf localhost:8002/env | tr '\\0' '\\n'").text();
        if environment.contains(&mark) { Ok(()) } else { Err(developer.tries("cat typescript").text()) }
    });
    assert_ne!(host.invocation("ava"), started);
    soon("it ended", Duration::from_secs(30), || {
        let said = developer.tries("cat typescript").text();
        if said.contains("restarted ava") { Ok(()) } else { Err(said) }
    });
    let said = developer.types("cat typescript");
    assert!(said.contains("restart ava on biz now? [y/N]") && !said.contains(&mark), "{said}");

    // It is nowhere else: no log, no history, no place in memory or on a disk, on either side.
    assert_eq!(
        host.sh(&format!(
            "journalctl --sync; journalctl --no-pager -o export | grep -a {pattern} || true
             grep -rlsa {pattern} /var/lib /etc /run /tmp /var/tmp /dev/shm /root /home || true"
        )),
        "/var/lib/deployer-secrets/ava.env"
    );
    assert_eq!(developer.types(&format!("rm mark; cd ~; grep -rlsa {pattern} . /dev/shm || true")), "");
    host.sh("journalctl --no-pager | grep 'secrets on-host write ava environment /var/lib/deployer-secrets/ava.env' >/dev/null");

    // What the next start needs to be told.
    host.sh("sleep 1; touch /var/lib/deployer-secrets/ava.env");
    let newer = developer.types("omni-deploy secrets check ava");
    assert!(newer.contains("restart to pick that up: ssh biz sudo systemctl restart ava"), "{newer}");
    host.sh("chmod 644 /var/lib/deployer-secrets/ava.env; chmod 755 /var/lib/deployer-secrets");
    let open = developer.tries("omni-deploy secrets check ava");
    let text = open.text();
    assert_eq!(open.status, omni_deploy::runner::ProcessStatus::Exit(3), "{text}");
    for typed in ["chmod 600 /var/lib/deployer-secrets/ava.env", "chmod 700 /var/lib/deployer-secrets"] {
        assert!(text.contains(typed), "{text}");
        host.sh(typed);
    }
    // On the host itself, without ssh, and without a way to the bucket for who is there.
    let here = host.sh("env -u AWS_ACCESS_KEY_ID omni-deploy secrets check ava 2>&1");
    assert!(here.contains("biz: /var/lib/deployer-secrets/ava.env: TOKEN"), "{here}");
    assert!(here.contains("the last good manifest, /var/lib/deployer/manifest.json"), "{here}");
    host.sh("EDITOR='sed -i s/TOKEN/KEY/' omni-deploy secrets edit ava --restart 2>/dev/null");
    assert!(host.sh("cat /var/lib/deployer-secrets/ava.env").starts_with("KEY="));
}
