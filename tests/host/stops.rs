//! A stop that takes its time holds nobody else up, ends no pass, and is gone on with by the next.

use crate::lab::soon;
use crate::ports::{SERVER, program};
use crate::solo::{Solo, solo, web};
use omni_deploy::runner::ProcessStatus;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Puts a service in place that systemd may kill only after seven minutes, and another one beside it.
fn with_a_slow_one(host: &Solo) {
    let slow = SERVER.replace("$| = 1;", "$| = 1; $SIG{TERM} = 'IGNORE';");
    let mut service = web("slow", 8005, &program(host, &slow).replace("/bin/web", ""));
    service["exec"] = serde_json::json!({"command": "bin/web"});
    service["env"]["PAGE"] = "slow".into();
    service["systemd"] = serde_json::json!({"stopTimeoutSec": 420});
    host.add(&service);
    host.add(&web("web", 8001, &host.closure("web", "one", "")));
    host.good_pass();
    host.serves("slow", "slow");
    host.serves("web", "one");
}

/// The slow one is given up by whoever has the say.
fn ends_it(host: &Solo) {
    host.sh("systemctl kill --signal=KILL slow
             while [[ $(systemctl is-active slow) == deactivating ]]; do sleep 0.05; done");
}

/// Nothing of it may be left for the next test, which would wait for it.
struct Slow<'a>(&'a Solo);

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        self.0.try_sh("systemctl kill --signal=KILL slow");
    }
}

#[test]
fn a_slow_stop_of_a_paused_service_holds_nobody_up_and_is_said_until_it_is_done() {
    let host = solo();
    with_a_slow_one(&host);
    let _slow = Slow(&host);
    host.update("web", &host.closure("web", "two", ""));
    let begun = Instant::now();
    let paused = host.try_sh("deployer pause slow");
    assert_eq!(paused.status, ProcessStatus::Exit(0), "{}", paused.stderr);
    assert!(begun.elapsed() < Duration::from_secs(120), "it waited for {:?}", begun.elapsed());
    host.serves("web", "two");
    assert_eq!(host.sh("systemctl is-active slow || true"), "deactivating");
    assert_eq!(host.service("slow")["status"], "stopped");
    assert!(host.reason("slow").contains("still stopping"), "{}", host.reason("slow"));
    ends_it(&host);
    host.good_pass();
    assert_eq!(
        (&host.service("slow")["status"], &host.service("slow")["failure"]),
        (&"stopped".into(), &Value::Null)
    );
    host.sh("deployer resume slow");
    host.serves("slow", "slow");
}

#[test]
fn a_service_that_is_removed_and_slow_to_stop_keeps_its_unit_until_it_has_stopped() {
    let host = solo();
    with_a_slow_one(&host);
    let _slow = Slow(&host);
    let root = host.sh("ls /nix/var/nix/gcroots/omni-deploy/slow");
    host.update("web", &host.closure("web", "two", ""));
    host.sh("deploy-manifest remove-service slow");
    let pass = host.pass();
    assert!(pass.said.contains("still stopping"), "{}", pass.said);
    host.serves("web", "two");
    let status = host.try_sh("omni-deploy status");
    assert!(status.text().contains("slow") && !status.status.ok(), "{}", status.text());
    host.sh(&format!(
        "[[ $(systemctl is-active slow) == deactivating && -e /etc/systemd/system/slow.service ]]
         [[ $(ls /nix/var/nix/gcroots/omni-deploy/slow) == '{root}' ]]
         [[ ! -e /etc/systemd/system/multi-user.target.wants/slow.service ]]"
    ));
    ends_it(&host);
    host.good_pass();
    host.sh("[[ ! -e /etc/systemd/system/slow.service && ! -e /nix/var/nix/gcroots/omni-deploy/slow ]]
             [[ ! -e /var/lib/deployer/applied/slow.json ]]");
}

#[test]
fn while_one_service_is_slow_to_restart_the_others_are_put_back_and_it_is_waited_for_as_long_as_it_may() {
    let host = solo();
    with_a_slow_one(&host);
    let _slow = Slow(&host);
    host.sh("deploy-manifest set slow env.PAGE=new");
    host.update("web", &host.closure("web", "broken", "exit 3"));
    host.add(&web("other", 8006, &host.closure("other", "other", "")));
    host.sh("systemctl start --no-block deployer");
    soon("the other one is back in its version before, and routed", Duration::from_secs(120), || {
        host.sh("[[ $(systemctl is-active deployer) == activating ]]");
        let log = host.sh("journalctl --no-pager --quiet --output cat --unit deployer --lines 20");
        let (web, other) = (host.page("web.example.com"), host.page("other.example.com"));
        let back = log.contains("waiting for slow.service") && web.as_deref() == Ok("one");
        if back && other.as_deref() == Ok("other") { Ok(()) } else { Err(format!("{web:?} {other:?} {log}")) }
    });
    assert_eq!(host.sh("systemctl is-active slow || true"), "deactivating");
    host.sh("systemctl kill --signal=KILL slow");
    host.until_idle();
    host.serves("slow", "new");
    let state = host.state();
    assert_eq!(
        (&state["services"]["slow"]["status"], &state["services"]["web"]["status"]),
        (&"running".into(), &"rejected".into())
    );
    let applied = host.sh("cat /var/lib/deployer/applied/slow.json");
    assert!(applied.contains("\"new\""), "{applied}");
}

#[test]
fn who_takes_the_port_of_a_slow_one_is_started_once_that_has_stopped() {
    let host = solo();
    with_a_slow_one(&host);
    let _slow = Slow(&host);
    host.sh("deploy-manifest remove-service slow");
    host.add(&web("taker", 8005, &host.closure("taker", "taker", "")));
    host.sh("systemctl start --no-block deployer");
    soon("the pass waits", Duration::from_secs(60), || {
        let log = host.sh("journalctl --no-pager --quiet --output cat --unit deployer --lines 5");
        if log.contains("taker: waiting for slow.service") { Ok(()) } else { Err(log) }
    });
    host.sh("systemctl kill --signal=KILL slow");
    host.until_idle();
    host.serves("taker", "taker");
    assert_eq!(host.service("taker")["status"], "running");
    host.sh("[[ ! -e /etc/systemd/system/slow.service ]]");
}

#[test]
fn a_restart_that_systemctl_had_no_time_to_ask_for_is_no_fault_of_the_release() {
    let host = solo();
    host.add(&web("one", 8001, &host.closure("one", "one", "")));
    host.add(&web("two", 8002, &host.closure("two", "two", "")));
    // As where systemd takes long for each: the first alone is asked for.
    host.sh(r#"cat >/usr/local/sbin/systemctl <<'SH'
#!/bin/sh
case " $* " in
  *" restart -- one.service two.service ") /usr/bin/systemctl restart one; exec sleep 300 ;;
  *) exec /usr/bin/systemctl "$@" ;;
esac
SH
               chmod 755 /usr/local/sbin/systemctl"#);
    let pass = host.try_sh("deployer");
    host.sh("rm /usr/local/sbin/systemctl");
    assert!(pass.stderr.contains("waiting for two.service"), "{}", pass.stderr);
    assert!(!pass.stderr.contains("rejected"), "{}", pass.stderr);
    assert_eq!(pass.status, ProcessStatus::Exit(0), "{}", pass.stderr);
    host.serves("one", "one");
    host.serves("two", "two");
}
