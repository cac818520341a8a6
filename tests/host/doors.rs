//! What stands between a host's services and their visitors: DNS, certificates, Caddy's own configuration, sudo.

use crate::lab::{Host, lock, soon};
use crate::solo::web;
use omni_deploy::runner::{ProcessStatus, Run};
use serde_json::Value;
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Duration;

/// A host of these tests alone, because they change what Caddy is given, and the names that it resolves.
static DOORS: LazyLock<Mutex<Host>> = LazyLock::new(|| {
    let host = Host::boot("doors");
    host.sh("deploy-manifest init; sed /example.com/d /etc/hosts >/root/hosts");
    Mutex::new(host)
});

/// The Caddyfile of Debian's package: one server on port 80.
const PLAIN: &str = ":80 {\n\trespond / \"welcome\"\n}\n";

/// A server on port 443 of somebody else, with an authority of Caddy's own for all of its certificates.
const INTERNAL: &str =
    "{\n\tlocal_certs\n\tskip_install_trust\n}\nhttps://own.example.com {\n\trespond \"own\"\n}\n";

/// The host with `web` in place behind Caddy with this Caddyfile, its name in DNS as `address`.
fn doors(caddyfile: &str, config: &str, address: Option<&str>) -> MutexGuard<'static, Host> {
    let host = lock(&DOORS);
    host.only_our_passes();
    host.sh(&format!("printf '%s' '{config}' >/etc/omni-deploy/config.json"));
    resolves(&host, address);
    gives_caddy(&host, caddyfile);
    host.sh("systemctl stop caddy; rm -rf /var/lib/caddy/.config/caddy; systemctl start caddy");
    if host.sh("deploy-manifest show | jq '.services | length'") == "0" {
        let path = host.closure("web", "one", "");
        host.sh(&format!("deploy-manifest add-service - <<'EOF'\n{}\nEOF", web("web", 8001, &path)));
    }
    host.good_pass();
    host
}

fn gives_caddy(host: &Host, caddyfile: &str) {
    host.sh(&format!("cat >/etc/caddy/Caddyfile <<'EOF'\n{caddyfile}EOF"));
}

fn resolves(host: &Host, address: Option<&str>) {
    let line = address.map_or(String::new(), |address| format!("{address} web.example.com"));
    host.sh(&format!("{{ cat /root/hosts; echo '{line}'; }} >/etc/hosts"));
}

/// What `doctor` says of the domain: its verdict and text.
fn says(host: &Host) -> (String, String) {
    let output = host.try_sh("omni-deploy doctor --json");
    let checks: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = checks["checks"].as_array().unwrap();
    let of_domains: Vec<&Value> = checks.iter().filter(|c| c["name"] == "domain").collect();
    assert_eq!(of_domains.len(), 1, "{checks:?}");
    let text = |key: &str| of_domains[0][key].as_str().unwrap().to_string();
    let failed = text("verdict") == "fail";
    assert!(!failed || output.status == ProcessStatus::Exit(1), "{}", output.status);
    (text("verdict"), text("text"))
}

/// `doctor` comes to say this of the domain.
#[track_caller]
fn comes_to_say(host: &Host, verdict: &str, words: &[&str]) {
    soon(&format!("doctor says {verdict}, {words:?}"), Duration::from_secs(30), || {
        let (is, text) = says(host);
        let well = is == verdict && words.iter().all(|word| text.contains(word));
        if well { Ok(()) } else { Err(format!("{is}: {text}")) }
    });
}

#[test]
fn doctor_tries_a_domain_as_a_visitor_does_and_names_what_dns_says_of_it() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let own = host.ip.clone();
    comes_to_say(&host, "fail", &["web.example.com: ", "DNS has no address"]);
    resolves(&host, Some("203.0.113.9"));
    comes_to_say(&host, "warn", &["DNS leads to 203.0.113.9, which is not this host"]);
    resolves(&host, Some("127.0.0.1"));
    comes_to_say(&host, "warn", &["/etc/hosts"]);
    resolves(&host, Some(&own));
    comes_to_say(
        &host,
        "ok",
        &[
            "http://web.example.com/health answers 200 from web",
            "over http alone",
            &format!("DNS leads here ({own})"),
        ],
    );
    // The service is away, then Caddy.
    host.sh("systemctl stop web");
    comes_to_say(&host, "fail", &["web does not answer on 127.0.0.1:8001"]);
    host.good_pass();
    comes_to_say(&host, "ok", &[]);
    // Somebody's route takes its visitors, with an answer that looks well.
    host.sh(
        "caddy-api /config/apps/http/servers/srv0/routes/0 -X PUT -H 'Content-Type: application/json' \
         -d '{\"@id\": \"theirs\", \"match\": [{\"host\": [\"web.example.com\"]}], \"handle\": [{\"handler\": \
         \"static_response\", \"body\": \"theirs\"}]}'",
    );
    assert_eq!(host.page("web.example.com").as_deref(), Ok("theirs"));
    comes_to_say(&host, "fail", &["another route in Caddy's server 'srv0' comes before ours"]);
    host.good_pass();
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
    comes_to_say(&host, "ok", &[]);
    host.sh("caddy-api /id/theirs -X DELETE");
    // 'status --live' asks the same, and wants a timer besides.
    host.sh("systemctl start deployer.timer");
    let live = host.try_sh("omni-deploy status --live");
    assert!(live.status.ok() && !live.text().contains("DNS"), "{}", live.text());
    resolves(&host, None);
    let live = host.try_sh("omni-deploy status --live");
    assert_eq!(live.status, ProcessStatus::Exit(3), "{}", live.text());
    assert!(
        live.text().contains("web on doors: running: web.example.com: DNS has no address"),
        "{}",
        live.text()
    );
    resolves(&host, Some(&own));
    host.sh("systemctl stop deployer.timer caddy");
    comes_to_say(&host, "fail", &["systemctl start caddy"]);
    host.sh("systemctl start caddy");
    comes_to_say(&host, "ok", &[]);
    host.good_pass();
    // Somebody else's route, or program, answers: here one that took our route's place in front of it.
    host.sh("caddy-api /config/apps/http/servers/srv0/routes/0 -X PUT -H 'Content-Type: application/json' \
         -d '{\"handle\": [{\"handler\": \"static_response\", \"status_code\": 404}]}'");
    comes_to_say(&host, "fail", &["answers 404", "something else answers visitors"]);
    host.good_pass();
    comes_to_say(&host, "ok", &[]);
}

#[test]
fn doctor_names_what_is_wrong_with_a_certificate() {
    let host = doors(INTERNAL, "{}", None);
    resolves(&host, Some(&host.ip));
    comes_to_say(
        &host,
        "fail",
        &["certificate is from 'Caddy Local Authority", "whom this host does not trust"],
    );
    host.sh("mkdir -p /etc/ssl/certs; root=/var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt
         cat $root >>/etc/ssl/certs/ca-certificates.crt");
    comes_to_say(
        &host,
        "ok",
        &[
            "certificate from 'Caddy Local Authority",
            "https://web.example.com/health answers 200 from web",
            "http leads to https",
        ],
    );
    // DNS elsewhere does not make it good: nobody comes here.
    resolves(&host, Some("203.0.113.9"));
    comes_to_say(&host, "warn", &["DNS leads to 203.0.113.9"]);
    drop(host);

    // The public authorities are out of reach: there is none, and Caddy's own reason is told.
    let host = doors("https://own.example.com {\n\trespond \"own\"\n}\n", "{}", None);
    resolves(&host, Some(&host.ip));
    comes_to_say(
        &host,
        "fail",
        &[
            "no certificate yet: Caddy has none to show for web.example.com",
            "its last attempt: ",
            "ports 80 and 443",
        ],
    );
}

/// A unit of systemd's is given each file, and what its process then has is compared with what was written: where it
/// differs, and only there, all three say so, by line and never by value.
#[test]
fn secrets_that_systemd_reads_otherwise_than_they_are_written_are_named() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let file = "/var/lib/deployer-secrets/web.env";
    host.sh("deploy-manifest set web envFile=/var/lib/deployer-secrets/web.env");
    host.sh("install -d -m 700 /var/lib/deployer-secrets");
    for (text, written, line) in [
        ("S_D=C:\\new\\table", "S_D=C:\\new\\table", 1),
        ("S_A=1\nS_D=swallow\\\nS_E=2", "S_A=1\nS_D=swallow\\\nS_E=2", 2),
        ("S_D=end\\", "S_D=end\\", 1),
        ("S_D='quoted'  # remark", "S_D=quoted", 1),
        ("S_D=\"C:\\dir\\\"\nS_E=\"x", "S_D=C:\\dir\\\nS_E=x", 1),
        ("S_D='C:\\new\\table'", "S_D=C:\\new\\table", 0),
        ("S_D=\"C:\\new\\table\"", "S_D=C:\\new\\table", 0),
        ("S_A=a#b 'c' \"d\" $e `f`", "S_A=a#b 'c' \"d\" $e `f`", 0),
    ] {
        host.sh(&format!("umask 077; cat >{file} <<'EOF'\n{text}\nEOF"));
        let read = host.sh(&format!(
            "systemd-run --quiet --wait --pipe --property=EnvironmentFile={file} env | grep -A9 '^S_' | grep -v '^[A-RT-Z]' || true"
        ));
        assert_eq!(read == written, line == 0, "{text}: {read}");
        let check = host.try_sh("omni-deploy secrets check web");
        let doctor = host.try_sh("omni-deploy doctor").text();
        let edit = host.try_sh("EDITOR='sed -i $a#' omni-deploy secrets edit web");
        if line == 0 {
            assert_eq!(check.status, ProcessStatus::Exit(0), "{text}: {}", check.text());
            assert!(edit.status.ok(), "{text}: {}", edit.stderr);
            assert!(!doctor.contains("secrets edit web"), "{text}: {doctor}");
            continue;
        }
        let said = format!("line {line} ");
        assert_eq!(check.status, ProcessStatus::Exit(3), "{text}: {}", check.text());
        assert!(check.text().contains(&said), "{text}: {}", check.text());
        assert!(doctor.contains(&format!("secrets file {file}: {said}")), "{text}: {doctor}");
        assert!(
            edit.stderr.contains("nothing was written") && edit.stderr.contains(&said),
            "{text}: {}",
            edit.stderr
        );
        for told in [check.text(), doctor, edit.stderr] {
            assert!(
                !["new", "swallow", "dir"].iter().any(|part| told.contains(&format!("{part}\\"))),
                "{told}"
            );
        }
    }
    host.sh(&format!("deploy-manifest set web envFile=null; rm {file}; rm -rf /dev/shm/.omni-deploy*"));
    host.good_pass();
}

#[test]
fn a_restarted_caddy_takes_an_edited_caddyfile_and_our_route_is_back() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let other = |host: &Host| host.page("other.example.com").unwrap_or_else(|e| e);
    let starts = || {
        host.sh("journalctl --sync; journalctl --quiet -o cat -u caddy | grep -c 'starting from it' || true")
    };
    let both = |what: &str, welcome: &str| {
        soon(what, Duration::from_secs(20), || match (host.page("web.example.com"), other(&host)) {
            (Ok(web), page) if web == "one" && page == welcome => Ok(()),
            found => Err(format!("{found:?}")),
        });
    };
    both("at first", "welcome");
    // A restart by itself resumes both, without a pass: our route and what somebody else gave to Caddy's API.
    let theirs = "caddy-api /config/apps/http/servers/srv1 -X POST -H 'Content-Type: application/json' \
         -d '{\"listen\": [\":8070\"], \"routes\": [{\"handle\": [{\"handler\": \"static_response\", \"body\": \"theirs\"}]}]}'";
    host.sh(theirs);
    let begun = starts();
    let no_pass = host.no_pass();
    host.sh("systemctl restart caddy");
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
    assert_eq!(host.sh("curl -sSf localhost:8070"), "theirs");
    drop(no_pass);
    assert_eq!(starts(), begun);
    // An edit, also of a file that is imported, holds from the next restart on; our route is back by itself.
    host.sh("echo 'respond / \"edited\"' >/etc/caddy/part.caddy");
    gives_caddy(&host, ":80 {\n\timport part.caddy\n}\n");
    host.sh("systemctl restart caddy");
    both("after an edit", "edited");
    host.sh("echo 'respond / \"imported\"' >/etc/caddy/part.caddy; systemctl restart caddy");
    both("after an edit of what is imported", "imported");
    let edits = starts();
    host.sh("systemctl restart caddy");
    both("the restart after it resumes both", "imported");
    // What a reload took is no edit.
    host.sh("echo 'respond / \"reloaded\"' >/etc/caddy/part.caddy; systemctl reload caddy");
    both("after a reload", "reloaded");
    host.sh(theirs);
    host.sh("systemctl restart caddy");
    both("the restart after a reload", "reloaded");
    assert_eq!(host.sh("curl -sSf localhost:8070"), "theirs");
    assert_eq!(starts(), edits);
    // A Caddyfile that is none keeps nobody from being served.
    gives_caddy(&host, "}\n");
    host.sh("systemctl restart caddy");
    both("with a Caddyfile that cannot be used", "reloaded");
    // And a reboot takes an edit too.
    gives_caddy(&host, PLAIN);
    host.reboot();
    both("after a reboot", "welcome");
}

/// The pass is one that has looked at Caddy for the last time, made by the unit or by hand: it waits for the store, where
/// its report goes.
#[test]
fn a_reload_while_a_pass_is_under_way_has_its_routes_back_without_the_timer() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let store = "/var/lib/omni-deploy/.omni-deploy.lock";
    for (round, pass) in [
        ("unit", "systemctl start --no-block deployer"),
        ("hand", "systemd-run --quiet --collect --setenv=HOME=/root deployer run"),
    ] {
        host.until_idle();
        host.sh(&format!(
            "deploy-manifest set web env.ROUND={round}
             systemd-run --quiet --collect --unit=holder flock {store} sleep 60
             while flock --nonblock {store} true; do sleep 0.05; done
             {pass}"
        ));
        soon(&format!("{round}: the pass waits for the store"), Duration::from_secs(30), || {
            let pid = "$(awk '{ print $2 }' /run/omni-deploy/lock)";
            let output = host.try_sh(&format!("ls -l /proc/{pid}/fd | grep -F {store}"));
            if output.status.ok() { Ok(()) } else { Err(output.stderr) }
        });
        host.sh("systemctl reload caddy; systemctl reload caddy");
        assert_eq!(host.page("web.example.com").as_deref(), Ok("welcome"), "{round}: the route is gone");
        if round == "unit" {
            let asked = host.sh("systemctl list-jobs --no-legend 'deployer-asked-*' | wc -l");
            assert_eq!(asked, "1", "what has yet to begin is not asked for twice");
        }
        host.sh("systemctl stop holder");
        host.page_soon("web.example.com", "one", Duration::from_secs(30));
    }
}

#[test]
fn sudo_finds_the_commands_where_its_path_is_without_usr_local_bin() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let dir = tempfile::tempdir().unwrap();
    let path = host.ssh_setup(dir.path());
    let typed = |command: &str| {
        let ssh = Run::new(format!("{path}/ssh"))
            .arg("doors")
            .arg(command)
            .env("PATH", format!("{path}:/usr/bin:/bin"));
        ssh.deadline(Duration::from_secs(60)).output().unwrap()
    };
    let installs = || host.sh("/opt/omni/contrib/install.sh /opt/omni/omni-deploy");
    // Whatever this suite's sudo has by itself.
    let own = "/etc/sudoers.d/zz-path";
    host.sh(&format!("echo 'Defaults secure_path=\"/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\"' >{own}; rm -f /usr/bin/{{omni-deploy,deployer,deploy-manifest}}"));
    installs();
    assert_eq!(host.sh("ls /usr/bin/{omni-deploy,deployer,deploy-manifest} 2>/dev/null || true"), "");
    host.sh(&format!("echo 'Defaults secure_path=\"/usr/sbin:/usr/bin:/sbin:/bin\"' >{own}"));
    let lost = typed("sudo deployer state");
    assert!(!lost.status.ok() && lost.stderr.contains("not found"), "{}", lost.stderr);
    let doctor = host.try_sh("omni-deploy doctor").text();
    assert!(doctor.contains("does not find omni-deploy, deployer, deploy-manifest"), "{doctor}");
    let said = installs();
    assert!(said.contains("installed /usr/bin/deployer -> /usr/local/bin/deployer"), "{said}");
    assert_eq!(installs(), "nothing to change");
    for command in [
        "sudo deployer state",
        "sudo deployer run --retry web",
        "sudo omni-deploy status",
        "sudo deploy-manifest list",
    ] {
        let output = typed(command);
        assert!(output.status.ok(), "{command}: {}", output.stderr);
    }
    let doctor = host.try_sh("omni-deploy doctor").text();
    assert!(doctor.lines().any(|line| line.contains("sudo") && line.starts_with("ok")), "{doctor}");
    // What is there already stays, and is not taken away.
    host.sh("rm /usr/bin/deployer; cp /bin/true /usr/bin/deployer");
    host.sh("/opt/omni/contrib/install.sh --uninstall");
    assert_eq!(
        host.sh("ls /usr/bin/{omni-deploy,deployer,deploy-manifest} 2>/dev/null || true"),
        "/usr/bin/deployer"
    );
    host.sh(&format!("rm /usr/bin/deployer {own}"));
    installs();
    host.good_pass();
    host.sh("systemctl stop deployer.timer");
}

#[test]
fn who_is_kept_from_nixs_daemon_is_told_what_to_do_and_who_is_not_trusted_is_not_warned() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let path = host.closure("tool", "one", "");
    host.sh("id dev 2>/dev/null || useradd --create-home dev; systemctl start nix-daemon.socket
         sed -i /allowed-users/d /etc/nix/nix.conf");
    let as_dev = |command: &str| {
        let environment = "NIX_REMOTE=daemon OMNI_DEPLOY_STORE=file:///home/dev/box";
        host.try_sh(&format!("cd /home/dev; su dev -c '{environment} {command}'"))
    };
    let entry =
        format!("{{\"name\":\"tool\",\"hosts\":[\"doors\"],\"artifact\":{{\"storePath\":\"{path}\"}}}}");
    host.sh(&format!("cd /home/dev; echo '{entry}' >tool.json"));
    let added = as_dev("deploy-manifest add-service @tool.json");
    assert!(added.status.ok(), "{}", added.stderr);
    let push = format!("omni-deploy push --service tool {path}");
    let refused = |why: &str, remedy: &str| {
        let pushed = as_dev(&push);
        assert_eq!(pushed.status, ProcessStatus::Exit(1), "{why}: {}", pushed.stderr);
        assert!(pushed.stderr.contains(remedy), "{why}: {}", pushed.stderr);
        let doctor = as_dev("omni-deploy doctor --json").text();
        let doctor: Value = serde_json::from_str(&doctor).unwrap();
        let nix = doctor["checks"].as_array().unwrap().iter().find(|c| c["name"] == "nix").unwrap();
        assert!(nix["verdict"] == "fail" && nix["text"].as_str().unwrap().contains(remedy), "{why}: {nix}");
    };
    host.sh("chown root:nix-users /nix/var/nix/daemon-socket; chmod 770 /nix/var/nix/daemon-socket");
    refused("not of the group", "usermod -aG nix-users");
    host.sh("usermod -aG nix-users dev");
    let pushed = as_dev(&push);
    assert!(pushed.status.ok(), "{}", pushed.stderr);
    assert!(!pushed.stderr.contains("warning"), "{}", pushed.stderr);
    let doctor = as_dev("omni-deploy doctor").text();
    assert!(doctor.lines().any(|l| l.starts_with("ok") && l.contains(", the store answers")), "{doctor}");
    host.sh("echo 'allowed-users = root' >>/etc/nix/nix.conf; systemctl restart nix-daemon.service");
    refused("not among the allowed users", "name them in 'allowed-users'");
    host.sh("sed -i /allowed-users/d /etc/nix/nix.conf; systemctl stop nix-daemon.socket nix-daemon.service");
    refused("no daemon", "systemctl enable --now nix-daemon.socket");
}

/// Nix allows '?' in a name; systemd from 262 on starts nothing with it in its path.
#[test]
fn a_path_that_systemd_does_not_start_is_refused_before_anything_is_touched() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let invocation = host.invocation("web");
    let before = host.sh("deploy-manifest show | jq -r '.services[0].artifact.storePath'");
    let path = host.sh(
        "dir=$(mktemp -d)/web?two; mkdir -p $dir/bin; cp /opt/omni/page $dir/bin/web; echo two >$dir/version
         nix-store --add $dir",
    );
    host.sh(&format!("deploy-manifest update web '{path}'"));
    let version: u32 =
        host.sh("systemctl --version | sed -n '1s/systemd \\([0-9]*\\).*/\\1/p'").parse().unwrap();
    let pass = host.pass();
    if version < 262 {
        assert_eq!(pass.code, 0, "{}", pass.said);
        assert_eq!(host.page("web.example.com").as_deref(), Ok("two"));
    } else {
        assert_eq!(pass.code, 3, "{}", pass.said);
        assert!(pass.said.contains("give the derivation a name without it"), "{}", pass.said);
        assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
        assert_eq!(host.invocation("web"), invocation);
    }
    host.sh(&format!("deploy-manifest update web '{before}'"));
    host.good_pass();
}

#[test]
fn the_installer_says_what_a_host_lacks_and_a_configuration_may_come_before_it() {
    let host = doors(PLAIN, r#"{"caddyServer": "srv0"}"#, None);
    let install = "/opt/omni/contrib/install.sh /opt/omni/omni-deploy 2>&1";
    host.sh(install);
    host.sh("mv /usr/bin/nix /usr/bin/caddy /root/");
    let said = host.sh(install);
    host.sh("mv /root/nix /root/caddy /usr/bin/");
    assert!(said.contains("not here yet: nix caddy; run: apt-get install nix-bin caddy"), "{said}");
    // README's line, on a host where nothing was installed yet.
    let dir = tempfile::tempdir().unwrap();
    let path = host.ssh_setup(dir.path());
    host.sh("mv /etc/omni-deploy /root/kept");
    let line = "ssh doors sudo install -D -m 644 /dev/stdin /etc/omni-deploy/config.json";
    let typed = Run::new("sh").args(["-c", line]).env("PATH", format!("{path}:/usr/bin:/bin")).stdin("{}");
    typed.deadline(Duration::from_secs(60)).success().unwrap();
    assert_eq!(host.sh("cat /etc/omni-deploy/config.json"), "{}");
    // What Caddy lacks is said each time.
    let said = host.sh(install);
    assert_eq!(said.lines().last(), Some("nothing to change"), "{said}");
    host.sh("rm -r /etc/omni-deploy; mv /root/kept /etc/omni-deploy; systemctl stop deployer.timer");
}
