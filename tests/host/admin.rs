//! Caddy's admin endpoint: whoever changes Caddy decides what visitors get, and whoever answers for Caddy decides what
//! a pass does. Somebody with an account on the host, or a service there, can do neither.

use crate::lab::{Host, lock, soon};
use crate::solo::web;
use omni_deploy::runner::Output;
use serde_json::{Value, json};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Duration;

/// A host of these tests alone, because they change where Caddy is told things.
static ADMIN: LazyLock<Mutex<Host>> = LazyLock::new(|| {
    let host = Host::boot("admin");
    host.sh("useradd --create-home mallory; deploy-manifest init");
    Mutex::new(host)
});

/// Answers everything with what it was given and writes down what it was asked: [`Squatter`].
const SQUATTER: &str = r#"#!/usr/bin/python3
import socket, sys
address, port, log, answer = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
s = socket.create_server((address, port), family=socket.AF_INET6 if ':' in address else socket.AF_INET)
while True:
    c, _ = s.accept()
    c.settimeout(5)
    try:
        asked = c.recv(65536)
        if asked:
            with open(log, 'ab') as f: f.write(asked + b'\n')
        c.sendall(answer.encode().decode('unicode_escape').encode())
    except OSError: pass
    c.close()
"#;

/// Somebody without rights who listens where Caddy is asked; he goes with this value.
struct Squatter<'a> {
    host: &'a Host,
    unit: &'static str,
}

impl<'a> Squatter<'a> {
    fn on(host: &'a Host, unit: &'static str, user: &str, address: &str, port: u16, answer: &str) -> Self {
        host.sh(&format!(
            "cat >/usr/local/bin/squat <<'EOF'\n{SQUATTER}EOF
             chmod 755 /usr/local/bin/squat; rm -f /tmp/{unit}.log
             systemd-run --quiet --unit {unit} --uid {user} /usr/local/bin/squat '{address}' {port} /tmp/{unit}.log \
               '{answer}'
             for i in $(seq 600); do ss -Hltn | grep -qF -e '{address}:{port} ' -e '[{address}]:{port} ' && exit 0; sleep 0.1; done
             exit 1"
        ));
        Squatter { host, unit }
    }

    /// What he was asked.
    fn was_asked(&self) -> String {
        self.host.sh(&format!("cat /tmp/{}.log 2>/dev/null || true", self.unit))
    }
}

impl Drop for Squatter<'_> {
    fn drop(&mut self) {
        self.host.try_sh(&format!("systemctl stop {0}; systemctl reset-failed {0}", self.unit));
    }
}

/// The host with `web` in place behind the Caddy of Debian's package, told things where it is by default.
fn admin() -> MutexGuard<'static, Host> {
    let host = lock(&ADMIN);
    host.only_our_passes();
    host.sh("echo '{\"caddyServer\": \"srv0\"}' >/etc/omni-deploy/config.json
         printf ':80 {\\n\\trespond / \"welcome\"\\n}\\n' >/etc/caddy/Caddyfile
         rm -f /etc/systemd/system/caddy.service.d/zz.conf; systemctl daemon-reload
         systemctl restart caddy");
    let path = host.closure("web", "one", "");
    match host.sh("deploy-manifest show | jq '.services | length'").as_str() {
        "0" => host.sh(&format!("deploy-manifest add-service - <<'EOF'\n{}\nEOF", web("web", 8001, &path))),
        _ => host.sh(&format!("deploy-manifest update web {path}")),
    };
    host.good_pass();
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
    host
}

fn mallory(host: &Host, script: &str) -> Output {
    host.try_sh(&format!("runuser -u mallory -- bash -uo pipefail -c '{}'", script.replace('\'', r"'\''")))
}

/// What `doctor` says of who can change Caddy: its verdict and text.
fn doctor(host: &Host) -> (String, String) {
    let checks: Value = serde_json::from_slice(&host.try_sh("omni-deploy doctor --json").stdout).unwrap();
    let all = checks["checks"].as_array().unwrap();
    let check = all.iter().find(|c| c["name"] == "caddy admin").unwrap_or_else(|| panic!("{checks}"));
    let text = |key: &str| check[key].as_str().unwrap().to_string();
    (text("verdict"), text("text"))
}

#[test]
fn whoever_plays_caddy_is_named_and_nothing_is_asked_of_him() {
    let host = admin();
    // Where a resolver looks for localhost first, somebody has what Caddy would say.
    host.sh("echo '{\"caddyServer\": \"srv0\", \"caddyAdmin\": \"http://localhost:2019\"}' >/etc/omni-deploy/config.json
             printf '%s\\n' '[Service]' UnsetEnvironment=CADDY_ADMIN >/etc/systemd/system/caddy.service.d/zz.conf
             systemctl daemon-reload; systemctl restart caddy");
    let answer = r#"HTTP/1.1 200 OK\r\nContent-Length: 36\r\n\r\n{"srv0":{"listen":[":80"],"routes":[]}}"#;
    host.good_pass();
    let first = Squatter::on(&host, "squat6", "mallory", "::1", 2019, answer);
    host.sh("caddy-api /id/deployer -X DELETE");
    host.good_pass();
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"), "the real one was told");
    assert_eq!(first.was_asked(), "");
    drop(first);

    // Caddy is down, and he has its own port: he leads whoever asks to what answers root alone, or floods him.
    host.sh("systemctl stop caddy");
    let private = Squatter::on(
        &host,
        "private",
        "root",
        "127.0.0.1",
        7777,
        r#"HTTP/1.1 200 OK\r\n\r\nsession-key-of-root"#,
    );
    let answer =
        r#"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:7777/only-for-root\r\nContent-Length: 0\r\n\r\n"#;
    let second = Squatter::on(&host, "squat4", "mallory", "127.0.0.1", 2019, answer);
    host.sh(&format!("deploy-manifest update web {}", host.closure("web", "two", "")));
    let said = host.good_pass();
    assert_eq!(host.sh("curl -sSf localhost:8001/"), "two", "services are deployed nevertheless");
    assert_eq!((second.was_asked(), private.was_asked()), (String::new(), String::new()), "{said}");
    let pid = host.sh("systemctl show --property=MainPID --value squat4");
    let state = host.state();
    assert_eq!(state["route"]["status"], "pending", "{said}");
    let reason = state["route"]["reason"].as_str().unwrap();
    for part in ["\"squat\"", pid.as_str(), "squat4.service", "is not Caddy", "systemctl restart caddy"] {
        assert!(reason.contains(part), "no {part}: {reason}");
    }
    let status = host.try_sh("omni-deploy status");
    assert!(status.text().contains("squat4.service") && !status.status.ok(), "{}", status.text());
    let (verdict, text) = doctor(&host);
    assert!(verdict == "fail" && text.contains("squat4.service"), "{verdict}: {text}");
    assert_eq!((second.was_asked(), private.was_asked()), (String::new(), String::new()));
    drop((second, private));

    host.sh("systemctl start caddy");
    host.page_soon("web.example.com", "two", Duration::from_secs(30));
}

/// Takes the port as soon as it is free and keeps it.
const GRABBER: &str = r#"#!/usr/bin/python3
import socket, time
while True:
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(('127.0.0.1', 2019))
        s.listen()
        break
    except OSError:
        s.close()
        time.sleep(0.0005)
open('/tmp/grabbed', 'w').close()
time.sleep(600)
"#;

/// A local user waits for Caddy's restart and has port 2019 before it; `both` waits until visitors and people who look
/// have what they had.
fn nobody_keeps_caddy_from_starting(host: &Host, both: impl Fn(&str)) {
    host.sh(&format!(
        "cat >/usr/local/bin/grab <<'EOF'\n{GRABBER}EOF
         chmod 755 /usr/local/bin/grab; rm -f /tmp/grabbed
         systemd-run --quiet --unit grab --uid mallory /usr/local/bin/grab"
    ));
    // However late he begins: until he has the port no pass takes it.
    let no_pass = host.no_pass();
    host.sh("systemctl restart caddy; systemctl is-active caddy");
    soon("he has the port", Duration::from_secs(30), || {
        match host.try_sh("test -e /tmp/grabbed").status.ok() {
            true => Ok(()),
            false => Err("not yet".to_string()),
        }
    });
    drop(no_pass);
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"), "Caddy serves");
    // The pass names him, and changes what has to be changed.
    host.sh("caddy-api /id/deployer -X DELETE");
    let said = host.good_pass();
    assert!(said.contains("grab.service") && said.contains("port 2019"), "{said}");
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
    assert_eq!(host.state()["route"]["status"], "current");
    host.sh("systemctl restart caddy; systemctl is-active caddy");
    host.sh("systemctl stop grab; systemctl reset-failed grab || true; rm -f /tmp/grabbed");
    host.good_pass();
    both("after he has gone");
}

#[test]
fn nobody_but_root_and_caddy_changes_caddy_through_its_socket() {
    let host = admin();
    let socket = "--unix-socket /run/caddy/admin.sock -H 'Host;'";
    // A Caddy that does not know the variable of the drop-in is told by its Caddyfile.
    let knows = host.try_sh("grep -qF CADDY_ADMIN /usr/bin/caddy").status.ok();
    if !knows {
        let (verdict, text) = doctor(&host);
        assert!(verdict == "warn" && text.contains("admin unix//run/caddy/admin.sock"), "{verdict}: {text}");
        host.sh("systemctl reload caddy");
        host.sh("sed -i '1i {\\n\\tadmin unix//run/caddy/admin.sock\\n}' /etc/caddy/Caddyfile; systemctl restart caddy");
    }
    host.good_pass();
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
    let (verdict, text) = doctor(&host);
    assert!(verdict == "ok" && text.contains("unix//run/caddy/admin.sock"), "{verdict}: {text}");
    assert!(host.sh("deployer plan").ends_with("nothing to do"));
    assert_eq!(host.sh("stat -c '%a %U' /run/caddy"), "750 caddy");

    // He sees what he always saw, and changes nothing, by whatever way.
    let before = host.sh("caddy-api /config/ | jq -S .");
    for url in ["localhost:2019", "127.0.0.1:2019", "[::1]:2019"] {
        let seen = mallory(&host, &format!("curl -s {url}/config/ | jq -S ."));
        assert_eq!(seen.text().trim_end(), before, "{url}");
    }
    let json = "-H 'Content-Type: application/json'";
    for (request, status) in [
        ("-X DELETE localhost:2019/id/deployer".to_string(), "403"),
        (format!("-X POST {json} -d '{{}}' localhost:2019/load"), "403"),
        (format!("-X POST {json} -d '{{}}' localhost:2019/config/../load"), "403"),
        (format!("-X PATCH {json} -d '[]' '[::1]:2019/config/apps/http/servers/srv0/routes'"), "403"),
        ("-X POST localhost:2019/stop".into(), "403"),
        ("-X POST -H 'X-HTTP-Method-Override: GET' localhost:2019/config/".into(), "403"),
        ("localhost:2019/debug/pprof/cmdline".into(), "403"),
        ("-H 'Host: attacker.example.com' localhost:2019/config/".into(), "403"),
        (format!("{socket} -X DELETE localhost/id/deployer"), "000"),
        (format!("{socket} localhost/config/"), "000"),
    ] {
        let got = mallory(
            &host,
            &format!("curl -s -o /dev/null -w '%{{http_code}}' --path-as-is {request} || true"),
        );
        assert_eq!(got.text().trim(), status, "{request}");
    }
    assert_eq!(host.sh("caddy-api /config/ | jq -S ."), before);
    assert!(!mallory(&host, "ls /run/caddy").status.ok());

    // What people do with Caddy goes on working: a reload loses our route until the pass that it asks for.
    let both = |what: &str| {
        soon(what, Duration::from_secs(30), || {
            let shown = host
                .try_sh("curl -s localhost:2019/config/ | jq -e .apps.http.servers.srv0 >/dev/null")
                .status
                .ok();
            match host.page("web.example.com") {
                Ok(page) if page == "one" && shown => Ok(()),
                other => Err(format!("{other:?}, shown: {shown}")),
            }
        });
    };
    host.sh("systemctl reload caddy");
    both("after a reload");
    host.sh("caddy reload --config /etc/caddy/Caddyfile --force --address unix//run/caddy/admin.sock");
    host.good_pass();
    both("after a reload by hand");
    // A restart resumes, without a pass; what is shown is there with the next.
    let no_pass = host.no_pass();
    host.sh("systemctl restart caddy");
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
    assert_eq!(host.sh("ss -Hltn | grep -c :2019 || true"), "0");
    drop(no_pass);
    host.good_pass();
    assert!(host.sh("curl -sSf localhost:2019/config/").contains("web.example.com"));
    assert!(host.sh("deployer plan").ends_with("nothing to do"));

    nobody_keeps_caddy_from_starting(&host, both);

    // Back at its port, Caddy has that to itself again.
    let back = match knows {
        true => {
            "printf '%s\\n' '[Service]' UnsetEnvironment=CADDY_ADMIN >/etc/systemd/system/caddy.service.d/zz.conf"
        }
        false => "sed -i 1,3d /etc/caddy/Caddyfile",
    };
    host.sh(&format!("{back}; systemctl daemon-reload; systemctl restart caddy"));
    host.good_pass();
    let all: Value = serde_json::from_str(&host.sh("caddy-api /config/apps/http/servers")).unwrap();
    assert_eq!(all.as_object().unwrap().keys().map(|name| json!(name)).collect::<Vec<_>>(), [json!("srv0")]);
    assert_eq!(doctor(&host).0, "warn");
    assert_eq!(host.page("web.example.com").as_deref(), Ok("one"));
}
