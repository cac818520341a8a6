//! Each mistake that a host can meet gives one line that names the object, the cause and the next move, and
//! leaves what runs alone.

use crate::solo::{Solo, solo, web};
use omni_deploy::runner::ProcessStatus;
use serde_json::json;

/// What runs of the service `web`, to be compared: another invocation would be a restart.
#[track_caller]
fn unharmed(host: &Solo, invocation: &str) {
    host.serves("web", "one");
    assert_eq!(host.invocation("web"), invocation, "web was restarted");
}

#[test]
fn a_path_that_is_not_in_the_cache_leaves_the_running_version_and_is_fetched_when_it_is_there() {
    let host = solo();
    let one = host.deploys_web();
    let invocation = host.invocation("web");
    // A closure that exists, but not here: as if its push had been forgotten.
    let two = host.closure("web", "two", "");
    host.sh(&format!("nix copy --to 'file:///root/elsewhere' {two} && nix-store --delete {two}"));
    host.update("web", &two);
    let pass = host.passes_with(3);
    unharmed(&host, &invocation);
    let reason = host.reason("web");
    assert!(["web", two.as_str(), "push"].iter().all(|part| reason.contains(part)), "{reason}");
    assert!(pass.said.contains(&reason), "{}", pass.said);
    assert_eq!(host.service("web")["storePath"], one);
    let status = host.try_sh("omni-deploy status");
    assert_eq!(status.status, ProcessStatus::Exit(3), "{}", status.text());
    assert!(status.text().contains(two.trim_start_matches("/nix/store/")), "{}", status.text());
    // It is not the release's fault: tried again by itself.
    host.sh("cp -rn /root/elsewhere/. /var/lib/omni-deploy/");
    host.good_pass();
    host.serves("web", "two");
}

#[test]
fn a_closure_that_was_half_unpacked_when_the_power_failed_is_fetched_anew() {
    let host = solo();
    let one = host.closure("web", "one", "");
    host.sh(&format!(
        "nix copy --to file:///var/lib/omni-deploy {one} && nix-store --delete {one}
         mkdir -p {one}/bin && cp /opt/omni/page {one}/bin/web && echo half >{one}/version"
    ));
    host.add(&web("web", 8001, &one));
    host.good_pass();
    host.serves("web", "one");
    host.sh(&format!("nix-store --verify-path {one}"));
}

#[test]
fn a_manifest_that_cannot_be_used_leaves_the_last_good_one_in_force() {
    let host = solo();
    host.deploys_web();
    let invocation = host.invocation("web");
    host.sh("cp /var/lib/omni-deploy/manifest.json /root/good.json");
    for (what, script) in [
        ("truncated", "head -c 200 /root/good.json"),
        ("empty", "true"),
        ("of a newer version", "jq '.version = 99' /root/good.json"),
        ("100 MB", "cat /root/good.json; head -c 100M /dev/zero | tr '\\0' ' '"),
        ("no JSON", "echo '<html>'"),
        ("with a name that is none", "jq '.services[0].name = \"../x\"' /root/good.json"),
    ] {
        host.sh(&format!(
            "{{ {script}; }} >/root/bad.json; mv /root/bad.json /var/lib/omni-deploy/manifest.json"
        ));
        let pass = host.passes_with(0);
        assert!(pass.said.contains("working from the last good manifest"), "{what}: {}", pass.said);
        let error = host.state()["manifestError"].as_str().unwrap_or_default().to_string();
        assert!(error.contains("/var/lib/omni-deploy"), "{what}: {error}");
        unharmed(&host, &invocation);
    }
    // It is in force: what is amiss on the host is still repaired.
    host.sh("systemctl stop web");
    host.passes_with(0);
    host.serves("web", "one");
    // A host that has none can do nothing.
    host.sh("mkdir /root/kept; mv /var/lib/deployer/manifest* /root/kept/");
    let pass = host.passes_with(1);
    assert!(pass.said.contains("nothing was changed"), "{}", pass.said);
    host.serves("web", "one");
    host.sh("mv /root/kept/* /var/lib/deployer/; cp /root/good.json /var/lib/omni-deploy/manifest.json");
    host.good_pass();
    assert!(host.state()["manifestError"].is_null());
}

#[test]
fn a_unit_that_is_not_ours_is_never_touched() {
    let host = solo();
    host.sh("printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >/etc/systemd/system/mine.service
             systemctl daemon-reload; systemctl start mine");
    let names = ["ssh", "caddy", "mine"];
    let seen = || {
        host.sh(
            "for unit in ssh caddy mine; do systemctl show --property=MainPID,InvocationID,ActiveState $unit; done
             sha256sum /lib/systemd/system/{ssh,caddy}.service /etc/systemd/system/{mine,deployer}.service
             ls /etc/systemd/system /etc/systemd/system/multi-user.target.wants | grep -v '^web\\.service'",
        )
    };
    let before = seen();
    let path = host.closure("ssh", "one", "");
    for (port, name) in (8101..).zip(names) {
        host.add(&web(name, port, &path));
    }
    // The neighbours are none the worse for it.
    let one = host.closure("web", "one", "");
    host.add(&web("web", 8001, &one));
    host.passes_with(4);
    assert_eq!(seen(), before);
    host.serves("web", "one");
    for name in names {
        let reason = host.reason(name);
        assert!(reason.contains(&format!("{name}.service exists and is not ours")), "{reason}");
    }
    for name in names {
        host.sh(&format!("deploy-manifest remove-service {name}"));
    }
    host.good_pass();
    assert_eq!(seen(), before);
    host.sh("systemctl stop mine; rm /etc/systemd/system/mine.service; systemctl daemon-reload");
}

#[test]
fn secrets_that_others_could_read_stop_a_deploy_with_the_line_to_type() {
    let host = solo();
    let file = "/var/lib/deployer-secrets/web.env";
    let put = format!("rm -rf {file}; install -m 600 /dev/null {file}; echo TOKEN=x >{file}");
    host.sh(&put);
    let (one, two) = (host.closure("web", "one", ""), host.closure("web", "two", ""));
    let mut service = web("web", 8001, &one);
    service["envFile"] = file.into();
    host.add(&service);
    host.good_pass();
    let invocation = host.invocation("web");
    host.update("web", &two);
    for (spoil, line) in [
        (format!("rm {file}"), format!("install -m 600 /dev/null {file}")),
        (format!("chmod 644 {file}"), format!("chmod 600 {file}")),
        (format!("chown nobody {file}"), format!("chown root:root {file}")),
        (format!("mv {file} /root/web.env; ln -s /root/web.env {file}"), "symbolic link".into()),
        (format!("rm {file}; mkdir {file}"), "not a regular file".into()),
    ] {
        host.sh(&spoil);
        let pass = host.passes_with(3);
        unharmed(&host, &invocation);
        let reason = host.reason("web");
        assert!(reason.contains(&line) && reason.contains("web"), "{spoil}: {reason}");
        assert!(pass.said.contains(&line), "{spoil}: {}", pass.said);
        assert_eq!(host.service("web")["storePath"], one, "{spoil}");
        host.sh(&put);
    }
    host.good_pass();
    host.serves("web", "two");
    // And one that runs nowhere yet is not started.
    host.sh("touch /var/lib/deployer-secrets/new.env; chmod 644 /var/lib/deployer-secrets/new.env");
    let path = host.closure("new", "one", "");
    let mut service = web("new", 8002, &path);
    service["envFile"] = "/var/lib/deployer-secrets/new.env".into();
    host.add(&service);
    host.passes_with(4);
    assert_eq!(host.sh("systemctl show --property=LoadState --value new"), "not-found");
}

#[test]
fn secrets_that_change_while_a_release_fails_keep_nobody_from_the_version_before() {
    let host = solo();
    let file = "/var/lib/deployer-secrets/web.env";
    let put = format!("rm -rf {file}; install -m 600 /dev/null {file}; echo TOKEN=x >{file}");
    host.sh(&put);
    let one = host.closure("web", "one", "");
    let mut service = web("web", 8001, &one);
    service["envFile"] = file.into();
    host.add(&service);
    host.good_pass();
    for (version, meddle) in [
        ("spoilt", format!("chmod 644 {file}")),
        // The same over and over, as an agent does that fetches secrets anew.
        (
            "renewed",
            format!("while sleep 0.5; do cp --preserve=mode {file} {file}.new; mv {file}.new {file}; done"),
        ),
    ] {
        let deaf = host.closure("web", version, "port 8999");
        host.update("web", &deaf);
        let started = format!("systemctl show --property=ExecStart web | grep -q {deaf}");
        host.sh(&format!(
            "systemd-run --quiet --collect --unit=meddler bash -c 'until {started}; do sleep 0.1; done; {meddle}'"
        ));
        let pass = host.passes_with(3);
        host.serves("web", "one");
        let service = host.service("web");
        assert_eq!((&service["status"], &service["storePath"]), (&"rejected".into(), &one.as_str().into()));
        let tries = pass.said.lines().filter(|line| line.contains(&format!("starting {deaf}"))).count();
        assert_eq!(tries, 1, "{version}: {}", pass.said);
        host.sh("systemctl stop meddler 2>/dev/null || true");
        host.sh(&put);
    }
}

#[test]
fn a_release_that_does_not_come_up_is_refused_and_the_one_before_it_runs() {
    let host = solo();
    let one = host.deploys_web();
    let missing =
        host.sh("dir=$(mktemp -d)/web-nothing; mkdir $dir; echo x >$dir/readme; nix-store --add $dir");
    for (path, part, journal) in [
        (missing, "there is no /nix/store/", ""),
        (
            host.closure("web", "exits", "exit 3"),
            "exited with code 3",
            "cannot open the database of version exits",
        ),
        (host.closure("web", "deaf", "port 8999"), "not up within 6 s", "version deaf on port 8999"),
        (host.closure("web", "crashes", "crash 2"), "exited with code 1", "out of luck"),
    ] {
        host.update("web", &path);
        let pass = host.passes_with(3);
        host.serves("web", "one");
        let service = host.service("web");
        assert_eq!((&service["status"], &service["storePath"]), (&"rejected".into(), &one.as_str().into()));
        let failure = &service["failure"];
        let reason = failure["reason"].as_str().unwrap();
        assert!(reason.contains(part) && reason.contains("deployer run --retry web"), "{reason}");
        assert!(pass.said.contains(reason), "{}", pass.said);
        assert_eq!(failure["attempted"], path.as_str());
        let lines = host.sh("deployer state --json | jq .services.web.failure.journal");
        assert!(lines.contains(journal) && failure["journal"] == json!([]), "{lines}: {failure}");
        // Once was enough.
        let invocation = host.invocation("web");
        let pass = host.passes_with(3);
        assert!(!pass.said.contains("starting"), "{}", pass.said);
        unharmed(&host, &invocation);
        let status = host.try_sh("omni-deploy status web");
        assert_eq!(status.status, ProcessStatus::Exit(3));
        assert!(status.text().contains("rejected"), "{}", status.text());
        // Until a person asks.
        let again = host.try_sh("deployer run --retry web");
        assert_eq!(again.status, ProcessStatus::Exit(3), "{}", again.stderr);
        assert!(again.stderr.contains(part), "{}", again.stderr);
        host.serves("web", "one");
    }
    // A mended one goes out as any other.
    let two = host.closure("web", "two", "");
    host.update("web", &two);
    host.good_pass();
    host.serves("web", "two");
    // A unit that it requires and that is not there.
    host.sh("deploy-manifest set web 'systemd.requires=[\"nosuch.service\"]'");
    let pass = host.passes_with(3);
    assert!(pass.said.contains("Unit nosuch.service not found"), "{}", pass.said);
    host.serves("web", "two");
    host.sh("deploy-manifest set web 'systemd.requires=[]'");
    host.good_pass();
    // With nothing before it, nothing is left behind that would crash at every boot.
    let path = host.closure("new", "exits", "exit 3");
    host.add(&web("new", 8002, &path));
    host.passes_with(4);
    assert_eq!(host.sh("systemctl show --property=LoadState --value new"), "not-found");
    host.serves("web", "two");
}

#[test]
fn without_caddy_services_are_deployed_and_the_route_follows_when_it_is_back() {
    let host = solo();
    host.sh("systemctl stop caddy");
    let one = host.closure("web", "one", "");
    host.add(&web("web", 8001, &one));
    let pass = host.passes_with(0);
    assert!(pass.said.contains("route: "), "{}", pass.said);
    assert_eq!(host.sh("curl -sSf localhost:8001/"), "one");
    let state = host.state();
    assert_eq!(state["route"]["status"], "pending");
    assert!(state["route"]["reason"].as_str().unwrap().contains("systemctl start caddy"), "{state}");
    // Its drop-in asks for a pass.
    host.sh("systemctl start caddy");
    host.serves_soon("web", "one");

    let two = host.closure("web", "two", "");
    host.update("web", &two);
    host.sh("caddy-api /load -H 'Content-Type: application/json' -d '{}'");
    host.passes_with(0);
    assert_eq!(host.sh("curl -sSf localhost:8001/"), "two");
    let state = host.state();
    assert_eq!(state["route"]["status"], "pending");
    assert!(state["route"]["reason"].as_str().unwrap().contains("no http app"), "{state}");
    host.sh("systemctl reload caddy");
    host.serves_soon("web", "two");
    host.good_pass();
    assert_eq!(host.state()["route"]["status"], "current");
}

#[test]
fn of_two_passes_at_once_the_second_says_who_is_at_it_and_a_persons_waits() {
    let host = solo();
    host.deploys_web();
    // One that takes its time, because the release never answers.
    let deaf = host.closure("web", "deaf", "port 8999");
    host.update("web", &deaf);
    let said = host.sh("before=$(systemctl show --property=InvocationID --value deployer)
         systemctl start --no-block deployer
         until id=$(systemctl show --property=InvocationID --value deployer)
             [[ $id != \"$before\" ]] && grep -q starting <<<\"$(journalctl -o cat _SYSTEMD_INVOCATION_ID=$id)\"; do sleep 0.05; done
         pid=$(systemctl show --property=MainPID --value deployer)
         deployer run --timer 2>/tmp/by-timer
         [[ $(systemctl is-active deployer) == activating ]]
         code=0; deployer run 2>/tmp/by-hand || code=$?
         [[ $(systemctl is-active deployer) != activating ]]
         echo $code $pid; head -n1 /tmp/by-hand; cat /tmp/by-timer");
    let lines: Vec<&str> = said.lines().collect();
    let (code, pid) = lines[0].split_once(' ').unwrap();
    assert_eq!((code, lines.len()), ("3", 3), "{said}");
    for (line, says) in lines[1..].iter().zip(["waiting for the pass under way on", "a pass is under way on"])
    {
        assert!(line.contains(&format!("{says} this host (process {pid} since ")), "{line}");
    }
    host.passes_with(3);
}

#[test]
fn what_a_person_decides_waits_for_the_pass_under_way_and_is_then_done() {
    let host = solo();
    host.deploys_web();
    host.update("web", &host.closure("web", "two", ""));
    host.good_pass();
    let lock = "/run/omni-deploy/lock";
    let held = |command: &str| {
        host.sh(&format!(
            "rm -f /tmp/until /tmp/held /tmp/said; mkfifo /tmp/until
             flock {lock} sh -c \"echo process $$ since noon >{lock}; touch /tmp/held; cat /tmp/until >/dev/null\" &
             until [[ -e /tmp/held ]]; do sleep 0.05; done
             {command} 2>/tmp/said & pid=$!
             until grep -q 'waiting for the pass under way' /tmp/said; do sleep 0.05; done
             sleep 0.5; kill -0 $pid; echo >/tmp/until; wait $pid
             grep -c 'since noon' /tmp/said"
        ))
    };
    for (command, page) in [
        ("deployer rollback web", Some("one")),
        ("deployer pause web", None),
        ("deployer resume web", Some("one")),
        ("deployer rollback web --unpin", Some("two")),
        ("deployer run --retry web", Some("two")),
    ] {
        assert_eq!(held(command), "1", "{command}");
        assert_eq!(host.page("web.example.com").ok().as_deref(), page, "{command}");
    }
    // Who gives up has decided nothing, and who is killed holds nothing.
    host.sh(&format!("flock {lock} timeout --signal=INT 1 deployer pause web && exit 1; [[ ! -e /var/lib/deployer/overrides.json ]]"));
    host.update("web", &host.closure("web", "deaf", "port 8999"));
    host.sh("systemctl start --no-block deployer
             until [[ $(cat /run/omni-deploy/lock) == \"process $(systemctl show --property=MainPID --value deployer) \"* ]]; do
                 sleep 0.05
             done
             systemctl kill --signal=KILL deployer");
    host.until_idle();
    let run = host.try_sh("deployer run");
    assert!(run.status == ProcessStatus::Exit(3) && !run.stderr.contains("waiting"), "{}", run.stderr);
}

#[test]
fn a_program_that_is_not_there_is_named_with_its_package() {
    let host = solo();
    let one = host.deploys_web();
    let bare = host.try_sh("env -i PATH=/nonexistent /usr/local/bin/deployer run");
    assert_eq!(bare.status, ProcessStatus::Exit(1), "{}", bare.stderr);
    assert!(bare.stderr.contains("systemctl not found: install systemd"), "{}", bare.stderr);

    let two = host.closure("web", "two", "");
    host.sh(&format!("nix copy --to file:///var/lib/omni-deploy {two} && nix-store --delete {two}"));
    host.update("web", &two);
    let run = host.try_sh(
        "mkdir -p /opt/without-nix; ln -sf /usr/bin/{systemctl,systemd-analyze,journalctl} /opt/without-nix/
         env -i PATH=/opt/without-nix /usr/local/bin/deployer run",
    );
    assert_eq!(run.status, ProcessStatus::Exit(3), "{}", run.stderr);
    assert!(run.stderr.contains("not found: install Nix (Debian: apt install nix-bin"), "{}", run.stderr);
    host.serves("web", "one");
    assert_eq!(host.service("web")["storePath"], one);

    host.sh("deploy-manifest set web 'hosts=[\"solo\",\"far\"]'");
    let logs = host.try_sh("env PATH=/nonexistent /usr/local/bin/omni-deploy logs web --host far");
    assert_eq!(logs.status, ProcessStatus::Exit(1), "{}", logs.stderr);
    assert!(
        logs.stderr.contains("ssh not found") && logs.stderr.contains("openssh-client"),
        "{}",
        logs.stderr
    );
    host.good_pass();
    host.serves("web", "two");
}

#[test]
fn what_a_person_has_set_in_the_environment_changes_nothing_in_a_pass() {
    let host = solo();
    host.deploys_web();
    let set = "SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console SYSTEMD_COLORS=1 SYSTEMD_PAGER=cat LANGUAGE=de LC_ALL=de_DE.UTF-8 \
               GIT_TRACE=1 DF_BLOCK_SIZE=human-readable";
    for (version, how) in [
        ("two", format!("env {set} deployer run")),
        // Such variables reach what is started as well, so that pass ends with 3, and systemctl talks of it.
        ("three", format!("systemctl set-environment {set}; systemctl start deployer 2>&1 || true")),
    ] {
        host.update("web", &host.closure("web", version, ""));
        let run = host.try_sh(&format!(
            "{how}; systemctl unset-environment {}",
            set.split_whitespace()
                .filter_map(|v| v.split_once('='))
                .map(|(n, _)| n)
                .collect::<Vec<_>>()
                .join(" ")
        ));
        assert_eq!(host.service("web")["status"], "running", "{}", run.stderr);
        host.serves("web", version);
        let talk: Vec<&str> = run.stderr.lines().filter(|l| !l.starts_with("web: ")).collect();
        assert!(talk.iter().all(|l| l.starts_with("manifest version ")), "{talk:?}");
    }
    let said = host.sh("journalctl --no-pager --quiet --output cat _SYSTEMD_UNIT=deployer.service");
    assert!(!said.contains("Handling") && !said.contains("\u{1b}"), "{said}");
    let doctor = host.try_sh(&format!("env {set} omni-deploy doctor"));
    let plain = host.try_sh("omni-deploy doctor");
    assert_eq!((doctor.status, doctor.text().lines().count()), (plain.status, plain.text().lines().count()));
}
