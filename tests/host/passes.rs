//! What a pass does and does not do: it compares what is with what should be, repairs what differs and says so,
//! and leaves everything else as it is.

use crate::runbook::{Biz, biz};
use crate::solo::{Solo, solo, web};
use omni_deploy::runner::ProcessStatus;
use serde_json::{Value, json};

/// What a pass may change on a host that is as it should be: nothing. Whatever was touched on its disks since
/// `script` began, and whether systemd was reloaded or anything restarted.
#[track_caller]
fn touches(host: &crate::lab::Host, script: &str) -> String {
    host.sh(&format!(
        "facts() {{
             systemctl show --property=UnitsLoadTimestampMonotonic
             for unit in web caddy; do systemctl show --property=InvocationID,MainPID,NRestarts $unit; done
             caddy-api /config/ | sha256sum
         }}
         facts >/tmp/before
         touch /tmp/begun; sleep 0.05
         {{ {script}; }} >/tmp/said 2>&1
         find /etc /var /usr/local /root /srv /opt /nix/store /nix/var/nix/gcroots/omni-deploy -xdev \\( -path /var/tmp \\) -prune -o \\( -newer /tmp/begun -o -cnewer /tmp/begun \\) -print
         facts | diff /tmp/before -"
    ))
}

#[test]
fn a_pass_with_nothing_to_do_writes_nothing_and_asks_the_bucket_once() {
    let mut biz = biz();
    let Biz { host, bucket, developer } = &mut *biz;
    developer.write("Biz/Web.py", "# : out web\nVERSION = web 1\n");
    developer.types(
        r#"deploy-manifest add-service '{"name": "web", "hosts": ["biz"], "env": {"PORT": "8003"},
             "artifact": {"storePath": "/nix/store/placeholder"}, "health": {"path": "/health"},
             "http": {"domain": "web.example.com", "internalPort": 8003}}' && Omni/Ide/push.sh Biz/Web.py"#,
    );
    host.good_pass();
    assert_eq!(host.page("web.example.com").as_deref(), Ok("web 1"));
    host.good_pass();
    let before = bucket.log().len();
    assert_eq!(touches(host, "systemctl start deployer"), "");
    assert_eq!(bucket.log()[before..], ["GET /deploys/manifest.json 304"]);
}

#[test]
fn garbage_in_the_bucket_leaves_the_last_good_manifest_in_force() {
    let mut biz = biz();
    let Biz { host, bucket, .. } = &mut *biz;
    let good = bucket.get("manifest.json");
    let newer = String::from_utf8_lossy(&good).replacen("\"version\": 1", "\"version\": 2", 1);
    let huge = [good.as_slice(), &vec![b' '; 100 << 20]].concat();
    for (what, bytes) in [
        ("truncated", &good[..good.len() / 2]),
        ("empty", b""),
        ("newer", newer.as_bytes()),
        ("100 MB", &huge),
    ] {
        bucket.put("manifest.json", bytes);
        let pass = host.pass();
        assert_eq!(pass.code, 0, "{what}: {}", pass.said);
        assert!(pass.said.contains("working from the last good manifest"), "{what}: {}", pass.said);
        assert!(host.state()["manifestError"].as_str().is_some_and(|e| e.contains("s3://deploys")), "{what}");
    }
    bucket.put("manifest.json", &good);
    host.good_pass();
    assert!(host.state()["manifestError"].is_null());
}

#[test]
fn what_was_changed_by_hand_is_repaired_and_said() {
    let host = solo();
    host.deploys_web();
    let unit = "/etc/systemd/system/web.service";
    host.sh(&format!("cp -p {unit} /root/web.service"));
    for (change, says) in [
        (
            format!("sed -i s/8001/8009/ {unit}; systemctl daemon-reload; systemctl restart web"),
            "the unit was changed",
        ),
        (format!("echo 'Nice=5' >>{unit}"), "the unit was changed"),
        (format!("rm {unit}; systemctl daemon-reload"), "the unit was gone"),
        (format!("systemctl stop web; rm {unit}; systemctl daemon-reload"), "the unit was gone"),
        ("systemctl stop web".into(), "it was not running"),
        ("systemctl kill --signal=KILL web; systemctl stop web".into(), "it was not running"),
        ("systemctl disable web".into(), "started at boot"),
        (format!("systemctl stop web; rm {unit}; systemctl mask web"), "the unit was gone"),
        ("systemctl mask --runtime web; systemctl stop web; systemctl unmask --runtime web".into(), "web"),
        ("caddy-api /id/deployer -X DELETE".into(), "add our route"),
        (
            "caddy-api /id/deployer -X PATCH -H 'Content-Type: application/json' \
             -d '{\"@id\": \"deployer\", \"handle\": []}'"
                .into(),
            "replace our route",
        ),
        ("rm -r /nix/var/nix/gcroots/omni-deploy/web".into(), "had lost its root"),
    ] {
        host.sh(&change);
        let pass = host.passes_with(0);
        assert!(pass.said.contains(says), "{change}: {}", pass.said);
        host.serves("web", "one");
        host.sh(&format!(
            "cmp {unit} /root/web.service; systemctl is-enabled web; systemctl is-active web
             [[ $(systemctl show --property=NeedDaemonReload --value web) == no ]]
             ls /nix/var/nix/gcroots/omni-deploy/web/*-web-one"
        ));
        let plan = host.sh("deployer plan");
        assert!(plan.ends_with("nothing to do"), "{change}: {plan}");
    }
}

#[test]
fn a_service_that_is_taken_out_leaves_nothing_and_the_last_one_only_goes_when_asked() {
    let host = solo();
    let before = host.sh("ls /etc/systemd/system /etc/systemd/system/multi-user.target.wants");
    let one = host.deploys_web();
    let other = host.closure("other", "one", "");
    host.add(&web("other", 8002, &other));
    host.good_pass();
    let invocation = host.invocation("web");

    host.sh("deploy-manifest remove-service other");
    let said = host.good_pass();
    assert!(said.contains("other: removing (not in the manifest)"), "{said}");
    assert_eq!(
        host.sh("systemctl show --property=LoadState,ActiveState --value other"),
        "not-found\ninactive"
    );
    assert!(host.try_sh("pgrep -f bin/other").text().is_empty());
    host.sh("[[ ! -e /nix/var/nix/gcroots/omni-deploy/other && ! -e /var/lib/deployer/applied/other.json ]]");
    assert!(!host.sh("caddy-api /config/").contains("other.example.com"));
    assert_eq!(host.invocation("web"), invocation);
    host.serves("web", "one");

    host.sh("deploy-manifest remove-service web");
    host.refuses_to_be_emptied();
    assert_eq!(host.invocation("web"), invocation);
    host.serves("web", "one");
    host.sh("deployer run --allow-empty");
    assert!(host.page("web.example.com").as_deref() != Ok("one"));
    assert_eq!(host.sh("ls /etc/systemd/system /etc/systemd/system/multi-user.target.wants"), before);
    assert_eq!(host.sh("ls -A /nix/var/nix/gcroots/omni-deploy"), "");
    host.sh(&format!("nix-collect-garbage; [[ ! -e {one} ]]"));
}

#[test]
fn the_plan_is_what_the_pass_then_does() {
    let host = solo();
    host.deploys_web();
    let two = host.closure("web", "two", "");
    host.sh(&format!("nix copy --to file:///var/lib/omni-deploy {two} && nix-store --delete {two}"));
    host.update("web", &two);
    let other = host.closure("other", "one", "");
    host.add(&web("other", 8002, &other));
    assert_eq!(touches(&host, "deployer plan; deployer plan --json"), "");
    let plan = host.sh("deployer plan");
    for line in [
        format!("web: root {two}"),
        format!("web: fetch {two}"),
        "web: write its unit (another version)".into(),
        "web: restart and see it come up (another version)".into(),
        "other: write its unit (new here)".into(),
        "other: have it started at boot".into(),
        "route: replace our route".into(),
    ] {
        assert!(plan.contains(&line), "{line}: {plan}");
    }
    let json: Value = serde_json::from_str(&host.sh("deployer plan --json")).unwrap();
    assert_eq!((&json["empty"], &json["services"][0]["target"]), (&json!(false), &json!(two)));
    let said = host.good_pass();
    for line in [
        format!("web: fetched {two}"),
        format!("web: starting {two} (another version)"),
        "other: starting".into(),
    ] {
        assert!(said.contains(&line), "{line}: {said}");
    }
    host.serves("web", "two");
    host.serves("other", "one");
    assert!(host.sh("deployer plan").ends_with("nothing to do"));
}

#[test]
fn many_services_change_with_one_reload_and_one_restart() {
    let host = solo();
    let path = host.closure("web", "one", "");
    for n in 1..=5 {
        let mut service = web(&format!("web{n}"), 8000 + n, &path);
        service["exec"] = json!({"command": "bin/web"});
        host.add(&service);
    }
    let calls = |host: &Solo| {
        host.sh(
            "mkdir -p /opt/counted; printf '#!/bin/sh\\necho \"$@\" >>/tmp/calls\\nexec /usr/bin/systemctl \"$@\"\\n' \
             >/opt/counted/systemctl; chmod 755 /opt/counted/systemctl; rm -f /tmp/calls
             PATH=/opt/counted:$PATH deployer run; grep -cE 'daemon-reload' /tmp/calls; grep -c ' restart ' /tmp/calls
             grep -c ' stop ' /tmp/calls || true",
        )
    };
    assert_eq!(calls(&host), "1\n1\n0");
    let two = host.closure("web", "two", "");
    for n in 1..=5 {
        host.update(&format!("web{n}"), &two);
    }
    assert_eq!(calls(&host), "1\n1\n0");
    for n in 1..=5 {
        host.serves(&format!("web{n}"), "two");
    }
}

#[test]
fn environment_and_arguments_arrive_as_they_were_written() {
    let host = solo();
    let path = host.closure("web", "one", "");
    let mut service = web("web", 8001, &path);
    let values = [
        ("QUOTED", r#"a "quoted" word and 'another'"#),
        ("PERCENT", "100% %n %%"),
        ("DOLLAR", "$HOME ${HOME} $$ $(id) `id`"),
        ("BACKSLASH", r"back\slash \n \\ \x41 trailing\"),
        ("SPACES", "  two  inside and around  "),
        ("COMMENT", "# ; not"),
        ("WORDS", "ñandú 🚀 ü"),
        ("EQUALS", "=a=b="),
        ("EMPTY", ""),
    ];
    for (name, value) in values {
        service["env"][name] = value.into();
    }
    service["exec"] = json!({"command": r#"bin/web "a b" '%n $HOME' \$x "c\\d" 'e"f' ü"#});
    host.add(&service);
    host.good_pass();
    let environment = host.sh("curl -sSf localhost:8001/env | tr '\\0' '\\n'");
    for (name, value) in values {
        assert!(environment.lines().any(|l| l == format!("{name}={value}")), "{name}: {environment}");
    }
    let line = host.sh("tr '\\0' '\\n' </proc/$(systemctl show --property=MainPID --value web)/cmdline");
    assert_eq!(line, format!("{path}/bin/web\na b\n%n $HOME\n$x\nc\\d\ne\"f\nü"));
}

#[test]
fn systemd_takes_every_field_of_an_entry_as_it_was_meant() {
    let host = solo();
    let path = host.closure("web", "one", "");
    let mut service = web("web", 8001, &path);
    service["exec"] = json!({"command": "bin/web --flag", "user": "www-data", "group": "adm"});
    service["systemd"] = json!({
        "after": ["network-online.target", "caddy.service"], "requires": ["caddy.service"],
        "restart": "always", "restartSec": 2, "stateDirectory": "web", "readWritePaths": ["/srv/web-data"],
        "memoryMax": "200M", "cpuQuota": "50%", "workingDirectory": "/var/lib/web", "stopTimeoutSec": 7,
    });
    service["hardening"] =
        json!({"dynamicUser": false, "privateTmp": false, "protectSystem": "full", "protectHome": false});
    host.sh("mkdir -p /srv/web-data");
    host.add(&service);
    let mut dynamic = web("dynamic", 8002, &path);
    dynamic["exec"] = json!({"command": "bin/web"});
    dynamic["hardening"] = json!({"dynamicUser": true});
    dynamic["systemd"] = json!({"stateDirectory": "dynamic"});
    host.add(&dynamic);
    host.good_pass();
    for name in ["web", "dynamic"] {
        host.serves(name, "one");
        let verify = format!(
            "systemd-analyze verify --man=no --recursive-errors=no /etc/systemd/system/{name}.service 2>&1"
        );
        assert_eq!(host.sh(&verify), "");
    }
    let shown = host.sh(
        "systemctl show web --property=User,Group,Restart,RestartUSec,StateDirectory,ReadWritePaths,MemoryMax,\
         CPUQuotaPerSecUSec,WorkingDirectory,TimeoutStopUSec,PrivateTmp,ProtectSystem,ProtectHome,Requires,After",
    );
    for line in [
        "User=www-data",
        "Group=adm",
        "Restart=always",
        "RestartUSec=2s",
        "StateDirectory=web",
        "ReadWritePaths=/srv/web-data",
        "MemoryMax=209715200",
        "CPUQuotaPerSecUSec=500ms",
        "WorkingDirectory=/var/lib/web",
        "TimeoutStopUSec=7s",
        "PrivateTmp=no",
        "ProtectSystem=full",
        "ProtectHome=no",
    ] {
        assert!(shown.lines().any(|l| l == line), "{line}: {shown}");
    }
    assert!(shown.lines().any(|l| l.starts_with("Requires=") && l.contains("caddy.service")), "{shown}");
    assert_eq!(
        host.sh("systemctl show dynamic --property=DynamicUser,StateDirectory --value"),
        "yes\ndynamic"
    );
    host.sh("rm -r /srv/web-data /var/lib/web");
}

#[test]
fn the_last_three_closures_survive_a_garbage_collection() {
    let host = solo();
    let versions = ["one", "two", "three", "four"];
    let mut paths = vec![host.deploys_web()];
    for version in &versions[1..] {
        let path = host.closure("web", version, "");
        host.update("web", &path);
        host.good_pass();
        paths.push(path);
    }
    host.sh("nix-collect-garbage");
    let kept: Vec<bool> =
        paths.iter().map(|p| host.try_sh(&format!("nix-store --verify-path {p}")).status.ok()).collect();
    assert_eq!(kept, [false, true, true, true]);
    let previous = host.service("web")["previous"].clone();
    assert_eq!(previous, json!([paths[2], paths[1]]));
    // So the way back needs no cache (there never was one here).
    host.update("web", &paths[1]);
    host.good_pass();
    host.serves("web", "two");
    host.sh("nix-collect-garbage");
    for path in &paths[1..] {
        host.sh(&format!("nix-store --verify-path {path}"));
    }
}

#[test]
fn a_placeholder_waits_and_a_changed_entry_is_applied() {
    let host = solo();
    host.deploys_web();
    host.add(&web("later", 8002, "/nix/store/placeholder"));
    host.good_pass();
    assert_eq!(host.service("later")["status"], "waiting");
    assert_eq!(host.sh("systemctl show --property=LoadState --value later"), "not-found");
    // A route needs no restart, an environment does.
    let invocation = host.invocation("web");
    host.sh("deploy-manifest set web http.domain=elsewhere.example.com");
    host.good_pass();
    assert_eq!(host.page("elsewhere.example.com").as_deref(), Ok("one"));
    assert!(host.page("web.example.com").as_deref() != Ok("one"));
    assert_eq!(host.invocation("web"), invocation);
    host.sh("deploy-manifest set web env.PORT=8005 http.internalPort=8005");
    host.good_pass();
    assert_eq!(host.page("elsewhere.example.com").as_deref(), Ok("one"));
    assert_ne!(host.invocation("web"), invocation);
    assert!(host.sh("deployer plan").ends_with("nothing to do"));
}

#[test]
fn a_person_on_the_host_finds_what_is_going_on() {
    let host = solo();
    host.deploys_web();
    let state = host.sh("deployer state");
    assert!(state.contains("web") && state.contains("running"), "{state}");
    let logs = host.sh("omni-deploy logs web -n 20");
    assert!(logs.contains("page: version one on port 8001"), "{logs}");
    assert!(host.sh("omni-deploy logs deployer -n 50").contains("web: up after"));
    host.sh("omni-deploy logs caddy -n 5");
    let unknown = host.try_sh("omni-deploy logs wep");
    assert_eq!(unknown.status, ProcessStatus::Exit(1));
    assert!(unknown.stderr.contains("did you mean 'web'"), "{}", unknown.stderr);
    assert_eq!(host.try_sh("omni-deploy status wep").status, ProcessStatus::Exit(1));
    host.sh("systemctl start deployer.timer");
    let doctor = host.try_sh("omni-deploy doctor");
    host.sh("systemctl stop deployer.timer");
    assert!(doctor.status.ok(), "{}{}", doctor.text(), doctor.stderr);
}

#[test]
fn a_port_goes_from_one_service_to_another_in_one_pass() {
    let host = solo();
    let path = host.deploys_web();
    // A rename: the old one goes, the new one has its port.
    let shop = host.closure("shop", "shop", "");
    host.sh("deploy-manifest remove-service web");
    host.add(&web("shop", 8001, &shop));
    host.good_pass();
    host.serves("shop", "shop");
    assert_ne!(host.try_sh("systemctl is-active web").status, ProcessStatus::Exit(0));
    // And two that swap theirs.
    host.add(&web("web", 8002, &path));
    host.good_pass();
    host.sh("deploy-manifest show | jq '.services |= map(.http.internalPort = 16003 - .http.internalPort
                 | .env.PORT = (.http.internalPort | tostring))' >/tmp/swapped.json
             EDITOR='cp /tmp/swapped.json' deploy-manifest edit");
    host.good_pass();
    host.serves("shop", "shop");
    host.serves("web", "one");
    assert_eq!(host.state()["services"]["web"]["status"], "running");
}
