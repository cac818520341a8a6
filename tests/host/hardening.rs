//! Services confined by one field, how exposed they are, and secrets that come as credentials.

use crate::solo::{Solo, solo, web};
use serde_json::{Value, json};

/// The overall level that systemd itself gives a unit.
fn rated(host: &Solo, unit: &str) -> f64 {
    let said = host.sh(&format!("LC_ALL=C systemd-analyze security --no-pager {unit} | tail -n 1"));
    let level = said.split_once(&format!("Overall exposure level for {unit}.service: "));
    let level =
        level.and_then(|(_, rest)| rest.split_whitespace().next()).unwrap_or_else(|| panic!("{said}"));
    level.parse().unwrap()
}

/// What systemd has read of a unit holds these lines.
#[track_caller]
fn shows(host: &Solo, unit: &str, lines: &[&str]) {
    let names: Vec<&str> = lines.iter().filter_map(|l| l.split('=').next()).collect();
    let shown = host.sh(&format!("systemctl show {unit} --property={}", names.join(",")));
    for line in lines {
        assert!(shown.lines().any(|l| l == *line), "{unit}: no {line} in:\n{shown}");
    }
    let verify = format!(
        "systemd-analyze verify --man=no --recursive-errors=no /etc/systemd/system/{unit}.service 2>&1"
    );
    assert_eq!(host.sh(&verify), "");
}

const STRICT: [&str; 16] = [
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "PrivateDevices=yes",
    "PrivateUsers=yes",
    "ProtectProc=invisible",
    "ProcSubset=pid",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces=yes",
    "MemoryDenyWriteExecute=yes",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=1",
    "UMask=0077",
    "RemoveIPC=yes",
    "ProtectSystem=strict",
    "ProtectHome=yes",
];

/// A service that writes to its state folder when it starts.
fn stateful(host: &Solo, name: &str, port: u16, version: &str) -> Value {
    let path = host.closure(name, version, "");
    let mut service = web(name, port, &path);
    service["exec"] = json!({"command": format!(
        "/bin/sh -c 'echo {version} >>$STATE_DIRECTORY/starts && exec {path}/bin/{name}'")});
    service["systemd"] = json!({"stateDirectory": name});
    service
}

#[test]
fn a_strict_service_serves_keeps_its_state_and_is_rated_below_2() {
    let host = solo();
    let mut service = stateful(&host, "web", 8001, "one");
    host.add(&service);
    // As every service has it without a profile, and then with one field more.
    host.good_pass();
    host.serves("web", "one");
    let open = rated(&host, "web");
    assert_eq!(host.service("web")["exposure"], open);
    assert!(open > 5.0, "{open}");
    let doctor = host.try_sh("omni-deploy doctor --json").text();
    let doctor: Value = serde_json::from_str(&doctor).unwrap();
    let checks = doctor["checks"].as_array().unwrap();
    let check = checks.iter().find(|c| c["name"] == "exposure").unwrap();
    let line = "'deploy-manifest set web hardening.profile=strict'";
    assert!(check["verdict"] == "ok" && check["text"].as_str().unwrap().contains(line), "{check}");

    host.sh("deploy-manifest set web hardening.profile=strict");
    host.good_pass();
    host.serves("web", "one");
    shows(&host, "web", &STRICT);
    shows(&host, "web", &["DynamicUser=yes", "User=web", "StateDirectory=web"]);
    let calls = host.sh("systemctl show web --property=SystemCallFilter --value");
    let calls: Vec<&str> = calls.split(' ').collect();
    assert!(
        calls.contains(&"accept4") && !calls.contains(&"setuid") && !calls.contains(&"ptrace"),
        "{calls:?}"
    );
    assert_eq!(host.sh("cat /var/lib/web/starts"), "one\none", "what it kept as root is its own now");
    let level = rated(&host, "web");
    assert!(level < 2.0, "{level}");

    assert_eq!(host.service("web")["exposure"], level);
    let rows: Value = serde_json::from_str(&host.sh("omni-deploy status --json")).unwrap();
    assert_eq!(rows["rows"][0]["exposure"], level);
    for command in ["omni-deploy status web", "deployer state", "omni-deploy doctor"] {
        let said = host.try_sh(command).text();
        assert!(said.contains("exposure") && said.contains(&level.to_string()), "{command}: {said}");
    }
    let doctor = host.try_sh("omni-deploy doctor").text();
    assert!(!doctor.contains("hardening.profile"), "{doctor}");

    // As root, for a program that has to be; still without any of root's powers.
    service = stateful(&host, "job", 8002, "job");
    service["hardening"] = json!({"profile": "strict", "dynamicUser": false});
    host.add(&service);
    host.good_pass();
    host.serves("job", "job");
    shows(&host, "job", &STRICT);
    shows(&host, "job", &["DynamicUser=no", "User=root"]);
    let level = rated(&host, "job");
    assert!(level < 2.0, "{level}");
    assert_eq!(host.service("job")["exposure"], level);

    // And the way back.
    host.sh("deploy-manifest set web hardening.profile=default");
    host.good_pass();
    shows(&host, "web", &["DynamicUser=no", "User=root", "NoNewPrivileges=no"]);
    assert_eq!(host.sh("cat /var/lib/web/starts"), "one\none\none");
    assert_eq!(host.service("web")["exposure"], open);
    host.sh("rm -r /var/lib/web /var/lib/job");
}

#[test]
fn a_strict_service_overlaps_as_one_user() {
    let host = solo();
    let mut service = stateful(&host, "web", 8001, "one");
    service["rollout"] = "overlap".into();
    service["http"]["drainSec"] = 0.into();
    service["hardening"] = json!({"profile": "strict"});
    host.add(&service);
    host.good_pass();
    let two = host.closure("web", "two", "");
    let command = format!("/bin/sh -c \"echo two >>$STATE_DIRECTORY/starts && exec {two}/bin/web\"");
    host.sh(&format!("deploy-manifest set web artifact.storePath={two} exec.command='{command}'"));
    let said = host.good_pass();
    assert!(said.contains("web: verified beside the running version"), "{said}");
    host.serves("web", "two");
    // The candidate, and then the service: the folder was both's.
    assert_eq!(host.sh("cat /var/lib/web/starts"), "one\ntwo\ntwo");
    assert!(rated(&host, "web") < 2.0);
    // Root's candidate would take the folder from the one that runs.
    host.sh("deploy-manifest set web hardening.profile=default");
    let said = host.good_pass();
    assert!(!said.contains("beside the running version"), "{said}");
    host.serves("web", "two");
    assert_eq!(host.sh("cat /var/lib/web/starts"), "one\ntwo\ntwo\ntwo");
    host.sh("deploy-manifest remove-service web; deployer run --allow-empty; rm -r /var/lib/web");
}

#[test]
fn how_exposed_a_service_is_is_found_out_once_and_never_fails_a_pass() {
    let host = solo();
    host.deploys_web();
    let level = host.service("web")["exposure"].clone();
    // Whatever asks systemd for it leaves a trace.
    let counted = |script: &str| {
        host.sh(&format!(
            "mkdir -p /opt/rated; : >/tmp/rated
             printf '#!/bin/sh\\n[ \"$1\" != security ] || {{ echo >>/tmp/rated; {script}; }}\\n' >/opt/rated/systemd-analyze
             echo 'exec /usr/bin/systemd-analyze \"$@\"' >>/opt/rated/systemd-analyze
             chmod 755 /opt/rated/systemd-analyze
             PATH=/opt/rated:$PATH deployer run; wc -l </tmp/rated"
        ))
    };
    assert_eq!(counted("true"), "0", "an idle pass asks nobody");
    // A program that did not know it yet left none: it is found out when something is written anyway.
    let forget =
        "cd /var/lib/deployer; jq 'del(.services.web.exposure)' state.json >s && cat s >state.json; rm s";
    host.sh(forget);
    assert_eq!(counted("true"), "0");
    host.sh(&format!(
        "{forget}; jq '.changedAt = null | .serial = 0' state.json >s && cat s >state.json; rm s"
    ));
    assert_eq!(counted("true"), "1");
    assert_eq!(host.service("web")["exposure"], level);
    // Where it cannot be told, the pass goes on.
    for script in ["echo no such thing >&2; exit 1", "echo gibberish; exit 0"] {
        host.sh("systemctl stop web");
        assert_eq!(counted(script), "1", "{script}");
        assert_eq!(host.service("web")["exposure"], Value::Null, "{script}");
        host.serves("web", "one");
    }
    host.sh("systemctl stop web");
    host.good_pass();
    assert_eq!(host.service("web")["exposure"], level);
}

#[test]
fn a_credential_is_read_by_a_strict_service_and_refused_when_others_could_read_it() {
    let host = solo();
    let (token, key) = ("/var/lib/deployer-secrets/web.token", "/var/lib/deployer-secrets/web:tls.key");
    let put = format!("rm -rf {token}; install -m 600 /dev/null {token}; printf hunter1 >{token}");
    host.sh(&format!("{put}; printf 'a\\nb' >{key}; chmod 400 {key}"));
    let (one, two) = (host.closure("web", "one", ""), host.closure("web", "two", ""));
    let mut service = web("web", 8001, &one);
    service["credentials"] = json!({"token": token, "tls.key": key});
    host.add(&service);
    host.good_pass();
    let read = |name: &str| host.sh(&format!("curl -sSf localhost:8001/credentials/{name}"));
    assert_eq!((read("token"), read("tls.key")), ("hunter1".into(), "a\nb".into()));

    host.sh("deploy-manifest set web hardening.profile=strict");
    host.good_pass();
    assert_eq!((read("token"), read("tls.key")), ("hunter1".into(), "a\nb".into()));
    assert!(rated(&host, "web") < 2.0);
    // systemctl cannot print it.
    let loaded = host
        .sh("busctl get-property org.freedesktop.systemd1 /org/freedesktop/systemd1/unit/web_2eservice \
         org.freedesktop.systemd1.Service LoadCredential");
    // In no order.
    for pair in [format!("\"tls.key\" \"{key}\""), format!("\"token\" \"{token}\"")] {
        assert!(loaded.starts_with("a(ss) 2 ") && loaded.contains(&pair), "{loaded}");
    }
    shows(&host, "web", &["DynamicUser=yes"]);

    // A version that comes when somebody has spoiled a file is not started, and what runs is left alone.
    let invocation = host.invocation("web");
    host.update("web", &two);
    for (spoil, line) in [
        (format!("rm {token}"), format!("install -m 600 /dev/null {token}")),
        (format!("chmod 644 {token}"), format!("chmod 600 {token}")),
        (format!("chown nobody {token}"), format!("chown root:root {token}")),
        (format!("mv {token} /root/t; ln -s /root/t {token}"), "symbolic link".into()),
    ] {
        host.sh(&spoil);
        host.passes_with(3);
        let reason = host.reason("web");
        assert!(reason.contains(&line), "{spoil}: {reason}");
        assert_eq!(
            (host.invocation("web"), &host.service("web")["storePath"]),
            (invocation.clone(), &json!(one))
        );
        host.serves("web", "one");
        let doctor = host.try_sh("omni-deploy doctor").text();
        assert!(doctor.contains(token), "{doctor}");
        host.sh(&put);
    }
    host.good_pass();
    host.serves("web", "two");
    assert_eq!(host.service("web")["secretsChanged"], false);

    // A change is said, and taken up by a restart.
    let invocation = host.invocation("web");
    host.sh(&format!("sleep 0.02; printf hunter2 >{token}"));
    host.good_pass();
    assert_eq!(host.service("web")["secretsChanged"], true);
    assert_eq!((host.invocation("web"), read("token")), (invocation, "hunter1".into()));
    assert!(host.try_sh("omni-deploy status").text().contains("restart"));
    host.sh(
        "if grep -r hunter /var/lib/deployer /var/lib/omni-deploy /etc/systemd/system || journalctl | grep hunter; then exit 1; fi",
    );
    host.sh("systemctl restart web");
    host.good_pass();
    assert_eq!(
        (host.service("web")["secretsChanged"].clone(), read("token")),
        (json!(false), "hunter2".into())
    );
}
