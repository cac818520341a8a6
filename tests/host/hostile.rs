//! Manifests that mean harm, one pass for each, on a host that obeys unsigned ones: each is refused, or changes
//! what it names and nothing else. Those written by hand are in the tables below, the others come out of a
//! generator with a fixed seed. Texts that would run a program where somebody interprets them all run the same
//! one, which leaves a mark.

use crate::random::Random;
use crate::solo::{Solo, solo};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// The generator's seed: print it, and the run can be had again.
const SEED: u64 = 0x5eed_0f0b_57ac_1e00;

/// What a hostile text tries to run.
const MARK: &str = "touch /tmp/pwned";

/// Stands for an entry's place in the raw JSON of a case.
const HERE: &str = "@HERE@";

/// One manifest, as somebody who can write the store puts it there.
struct Case {
    what: String,
    bytes: Vec<u8>,
    /// The services that it may touch.
    names: BTreeSet<String>,
    /// What must come of it, where that is known beforehand.
    expected: Option<Fate>,
}

/// What a pass made of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Not taken up.
    Refused,
    /// Taken up; only what it names has changed.
    Harmless,
}

/// The service that hostile values are put into; it waits for its first push, so that nothing of it starts.
fn evil() -> Value {
    json!({
        "name": "evil", "artifact": {"type": "nix-closure", "storePath": "/nix/store/placeholder"},
        "hosts": ["solo"], "exec": {"command": "bin/web", "user": "root", "group": "root"},
        "env": {"PORT": "8066"}, "envFile": "/var/lib/deployer-secrets/evil.env",
        "credentials": {"token": "/var/lib/deployer-secrets/evil.token"},
        "http": {"domain": "evil.example.com", "path": "/", "internalPort": 8066, "portEnv": "PORT"},
        "health": {"path": "/health", "timeoutSec": 2}, "rollout": "restart",
        "systemd": {"after": ["network-online.target"], "requires": ["basic.target"], "restart": "no",
                    "restartSec": 5, "stateDirectory": "evil", "readWritePaths": ["/srv"], "memoryMax": "1G",
                    "cpuQuota": "50%", "workingDirectory": "/", "stopTimeoutSec": 2},
        "hardening": {"profile": "default", "dynamicUser": false, "privateTmp": true, "protectSystem": "strict", "protectHome": true},
        "revision": "4f2d1c0"
    })
}

/// The manifest with the good service, and these besides.
fn document(good: &Value, others: &[Value]) -> Value {
    let mut services = vec![good.clone()];
    services.extend_from_slice(others);
    json!({"version": 1, "serial": 50, "generation": "2026-11-22T18:31:05Z",
        "change": {"action": "update evil", "by": "eve@laptop"}, "services": services})
}

/// Where the texts of a manifest are: below the document, or below `evil`, which is its second service.
const TEXTS: &[&str] = &[
    "/services/1/name",
    "/services/1/artifact/type",
    "/services/1/artifact/storePath",
    "/services/1/hosts/0",
    "/services/1/exec/command",
    "/services/1/exec/user",
    "/services/1/exec/group",
    "/services/1/env/PORT",
    "/services/1/envFile",
    "/services/1/credentials/token",
    "/services/1/http/domain",
    "/services/1/http/path",
    "/services/1/http/portEnv",
    "/services/1/health/path",
    "/services/1/rollout",
    "/services/1/systemd/after/0",
    "/services/1/systemd/requires/0",
    "/services/1/systemd/restart",
    "/services/1/systemd/stateDirectory",
    "/services/1/systemd/readWritePaths/0",
    "/services/1/systemd/memoryMax",
    "/services/1/systemd/cpuQuota",
    "/services/1/systemd/workingDirectory",
    "/services/1/hardening/profile",
    "/services/1/hardening/protectSystem",
    "/services/1/revision",
    "/generation",
    "/change/action",
    "/change/by",
];

/// Numbers of a manifest, in the same way.
const NUMBERS: &[&str] = &[
    "/version",
    "/serial",
    "/services/1/http/internalPort",
    "/services/1/health/timeoutSec",
    "/services/1/systemd/restartSec",
    "/services/1/systemd/stopTimeoutSec",
];

/// Texts that mean something to a shell, to systemd, to Caddy, to a path, to a terminal or to a reader.
fn hostile_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "evil\n[Service]\nExecStartPre=/bin/touch /tmp/pwned",
        "evil\r\nExecStartPre=/bin/touch /tmp/pwned",
        "evil\"\nExecStartPre=/bin/touch /tmp/pwned\nEnvironment=\"Y=1",
        "bin/web\\\nExecStartPre=/bin/touch /tmp/pwned",
        "evil\0/tmp/pwned",
        "bin/web ; touch /tmp/pwned",
        "bin/web | touch /tmp/pwned",
        "bin/web && touch /tmp/pwned",
        "bin/web \" ; /bin/touch /tmp/pwned ; \"",
        "bin/web $(touch /tmp/pwned) `touch /tmp/pwned` ${PATH} $HOME",
        "bin/web %n %h %H %i %%s ${SHELL}",
        "'bin/web' '; touch /tmp/pwned'",
        "+/bin/touch",
        "!!bin/web",
        "-bin/web",
        "@bin/web touch /tmp/pwned",
        ":bin/web",
        "\\",
        "\"",
        "'",
        "%",
        "$",
        "",
        " ",
        "\t",
        "../../../../etc/passwd",
        "/nix/store/../../etc/shadow",
        "/etc/shadow",
        "/",
        "-rf",
        "--help",
        "a b",
        "a:b:c",
        "~root",
        "*",
        "{env.SECRET}",
        "{http.request.header.X}",
        "evil.example.com\u{202e}moc.knab",
        "ev\u{200b}il",
        "с\u{430}ddy",
        "\u{feff}evil",
        "\u{1b}[2J\u{1b}]0;pwned\u{7}",
        "\u{9b}31m",
        "\u{2028}evil",
        "<script>alert(1)</script>",
        "null",
        "true",
    ]
    .map(String::from)
    .into();
    texts.push("a".repeat(1_000_000));
    texts.push("é".repeat(2000));
    texts
}

/// Names of services: of paths, of options, of other people's units, of our own.
const NAMES: &[&str] = &[
    "../x",
    "..",
    ".",
    "-rf",
    "a b",
    "con@",
    "getty@tty1",
    ".service",
    "x.service",
    "x.timer",
    "x.mount",
    "-.mount",
    "-",
    "_",
    "a/b",
    "/etc/passwd",
    "a\\x2db",
    "a..b",
    "evil-next",
    "deployer",
    "sshd",
    "autovt@",
    "user@0",
    "\u{441}addy",
    "EVIL\u{212a}",
];

/// And those that are other people's units on the host: accepted by the form, and refused by the host.
const OTHERS: &[&str] = &[
    "ssh",
    "caddy",
    "caddy-api",
    "nix-daemon",
    "dbus",
    "systemd-journald",
    "systemd-logind",
    "dbus-org.freedesktop.login1",
    "emergency",
    "rescue",
    "theirs",
    "theirs-too",
];

/// Fields with values that are wrong in kind, in size or in combination; raw JSON.
const VALUES: &[(&str, &str)] = &[
    ("/version", "0"),
    ("/version", "2"),
    ("/version", "-1"),
    ("/version", "18446744073709551616"),
    ("/version", "\"1\""),
    ("/version", "null"),
    ("/serial", "9007199254740992"),
    ("/serial", "18446744073709551615"),
    ("/serial", "1e400"),
    ("/generation", "\"+292277026596-12-04T15:30:07Z\""),
    ("/generation", "\"0000-00-00T00:00:00Z\""),
    ("/change", "[]"),
    ("/services", "{}"),
    ("/services", "null"),
    ("/services", "\"x\""),
    ("/services", "[null]"),
    ("/services", "[[]]"),
    ("/services", "[]"),
    ("/services/1", "null"),
    ("/services/1/hosts", "[]"),
    ("/services/1/hosts", "\"solo\""),
    ("/services/1/hosts", "[\"solo\", \"solo\"]"),
    ("/services/1/hosts", "[\"..\"]"),
    ("/services/1/hosts", "[\"solo\", \"../hosts/other\"]"),
    ("/services/1/hosts", "[null]"),
    ("/services/1/exec", "[]"),
    ("/services/1/exec", "{\"command\": [\"/bin/sh\", \"-c\", \"touch /tmp/pwned\"]}"),
    ("/services/1/exec", "{\"command\": \"../../bin/touch /tmp/pwned\"}"),
    ("/services/1/credentials", "{\"../x\": \"/etc/shadow\"}"),
    ("/services/1/credentials", "{\"a:b\": \"/etc/shadow\"}"),
    ("/services/1/credentials", "{\"a\\nExecStartPre\": \"/bin/touch /tmp/pwned\"}"),
    ("/services/1/credentials", "{\"a\": \"/etc/shadow\\nExecStartPre=/bin/touch /tmp/pwned\"}"),
    ("/services/1/credentials", "{\"a\": \"../../etc/shadow\"}"),
    ("/services/1/credentials", "[\"/etc/shadow\"]"),
    ("/services/1/env", "{\"A B\": \"x\"}"),
    ("/services/1/env", "{\"A=B\": \"x\"}"),
    ("/services/1/env", "{\"A\\nExecStartPre\": \"/bin/touch /tmp/pwned\"}"),
    ("/services/1/env", "{\"\": \"x\"}"),
    ("/services/1/env", "{\"1A\": \"x\"}"),
    ("/services/1/env", "{\"A\": 1}"),
    ("/services/1/env", "{\"A\": null}"),
    ("/services/1/env", "{\"A\": {\"B\": \"x\"}}"),
    ("/services/1/env", "{\"A\": \"\\ud800\"}"),
    ("/services/1/env", "{\"A\": \"\\udc00\\ud800\"}"),
    ("/services/1/env", "{\"A\": \"\\u0000\"}"),
    ("/services/1/env", "{\"A\": \"1\", \"A\": \"2\"}"),
    ("/services/1/http/internalPort", "0"),
    ("/services/1/http/internalPort", "65536"),
    ("/services/1/http/internalPort", "-80"),
    ("/services/1/http/internalPort", "8066.5"),
    ("/services/1/http/internalPort", "\"8066\""),
    ("/services/1/http/internalPort", "8001"),
    ("/services/1/http", "{\"domain\": \"web.example.com\", \"internalPort\": 8066}"),
    ("/services/1/http", "{\"domain\": \"WEB.example.com\", \"path\": \"/\", \"internalPort\": 8066}"),
    (
        "/services/1/http",
        "{\"domain\": \"web.example.com\", \"path\": \"/{http.vars.x}\", \"internalPort\": 8066}",
    ),
    ("/services/1/http", "{\"domain\": \"*\", \"internalPort\": 8066}"),
    ("/services/1/http", "{\"domain\": \":2019\", \"internalPort\": 8066}"),
    ("/services/1/http", "[]"),
    ("/services/1/http", "{}"),
    ("/services/1/systemd/readWritePaths", "[\"/\"]"),
    ("/services/1/systemd/readWritePaths", "[\"-/\"]"),
    ("/services/1/systemd/readWritePaths", "[\"/srv /\"]"),
    ("/services/1/systemd/stateDirectory", "\"../..\""),
    ("/services/1/systemd/stateDirectory", "\"/etc\""),
    ("/services/1/systemd/stateDirectory", "\"evil:../../etc\""),
    ("/services/1/systemd/requires", "[\"poweroff.target\\nExecStartPre=/bin/touch /tmp/pwned\"]"),
    ("/services/1/systemd/ExecStartPre", "\"/bin/touch /tmp/pwned\""),
    ("/services/1/hardening/dynamicUser", "\"yes\\nUser=root\""),
    ("/services/1/ExecStartPre", "\"/bin/touch /tmp/pwned\""),
    ("/services/1/artifact/storePath", "\"/nix/store/00000000000000000000000000000000-evil/../../../bin\""),
    ("/services/1/artifact/storePath", "\"/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-evil\""),
    ("/services/1/artifact/storePath", "\"/nix/store/00000000000000000000000000000000-.drv\""),
    ("/services/1/artifact/storePath", "\"/nix/store/00000000000000000000000000000000-evil --option x y\""),
    ("/services/1/rollout", "\"overlap\""),
    ("/signatures", "\"x\""),
    ("/signatures", "[\"\"]"),
    ("/signatures", "[1]"),
    ("/store", "[]"),
];

/// Puts raw JSON in the place of a field (or adds it), which serde_json's own values could not hold.
fn with_raw(document: &Value, pointer: &str, raw: &str) -> Vec<u8> {
    let mut document = document.clone();
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    match document.pointer_mut(pointer) {
        Some(value) => *value = HERE.into(),
        None => document.pointer_mut(parent).unwrap()[field] = HERE.into(),
    }
    document.to_string().replacen(&format!("\"{HERE}\""), raw, 1).into_bytes()
}

/// Every case that starts nothing, with what is known of its fate.
fn cases(good: &Value, running: &str) -> Vec<Case> {
    let mut random = Random::new(SEED);
    let mut cases = Vec::new();
    let only_evil = || BTreeSet::from(["evil".to_string()]);
    let mut add = |what: String, bytes: Vec<u8>, names: BTreeSet<String>, expected| {
        cases.push(Case { what, bytes, names, expected });
    };
    let whole = document(good, &[evil()]);
    let text = whole.to_string();
    let refused = Some(Fate::Refused);

    // What is no manifest.
    let raw: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("blank", b" \n\t".to_vec()),
        ("null", b"null".to_vec()),
        ("a list", b"[]".to_vec()),
        ("an empty object", b"{}".to_vec()),
        ("a number", b"42".to_vec()),
        ("a text", b"\"manifest\"".to_vec()),
        ("NaN", text.replacen("\"serial\":50", "\"serial\":NaN", 1).into_bytes()),
        ("a comment", format!("// x\n{text}").into_bytes()),
        ("two documents", format!("{text}{text}").into_bytes()),
        ("more after its end", format!("{text} ; {MARK}").into_bytes()),
        ("single quotes", text.replace('"', "'").into_bytes()),
        ("a comma too many", text.replacen("}]", "},]", 1).into_bytes()),
        ("a byte order mark", [b"\xef\xbb\xbf", text.as_bytes()].concat()),
        ("UTF-16", text.encode_utf16().flat_map(u16::to_le_bytes).collect()),
        ("a NUL in front", format!("\0{text}").into_bytes()),
        ("a bare newline in a text", text.replacen("4f2d1c0", "4f\n2d", 1).into_bytes()),
        ("100,000 brackets", vec![b'['; 100_000]),
        ("100,000 braces", b"{\"a\":".repeat(100_000)),
        (
            "brackets where services are",
            with_raw(&whole, "/services", &("[".repeat(100_000) + &"]".repeat(100_000))),
        ),
        (
            "brackets in a field nobody knows",
            with_raw(&whole, "/services/1/later", &("[".repeat(100_000) + &"]".repeat(100_000))),
        ),
        ("a number of 100,000 digits", with_raw(&whole, "/serial", &"9".repeat(100_000))),
        ("services twice", text.replacen("{\"change\"", "{\"services\":[],\"change\"", 1).into_bytes()),
        ("version twice", text.replacen("{\"change\"", "{\"version\":1,\"change\"", 1).into_bytes()),
        ("a name twice in a service", with_raw(&whole, "/services/1/name", "\"evil\",\"name\":\"web\"")),
        ("40 MB", [text.as_bytes(), &vec![b' '; 40 << 20]].concat()),
        ("a gzip header", b"\x1f\x8b\x08\0\0\0\0\0".to_vec()),
        ("HTML", b"<!DOCTYPE html><html><script>touch /tmp/pwned</script>".to_vec()),
        ("a shell script", format!("#!/bin/sh\n{MARK}\n").into_bytes()),
        ("a unit", format!("[Service]\nExecStart=/bin/{MARK}\n").into_bytes()),
    ];
    for (what, bytes) in raw {
        add(what.into(), bytes, BTreeSet::new(), refused);
    }
    for (what, bad) in [
        ("overlong", &b"\xc0\xaf"[..]),
        ("a lone continuation", b"\x80"),
        ("a surrogate in UTF-8", b"\xed\xa0\x80"),
        ("beyond Unicode", b"\xf4\x90\x80\x80"),
        ("cut", b"\xe2\x82"),
        ("Latin-1", b"\xfc"),
    ] {
        let at = text.find("4f2d1c0").unwrap();
        let bytes = [&text.as_bytes()[..at], bad, &text.as_bytes()[at..]].concat();
        add(format!("invalid UTF-8: {what}"), bytes, BTreeSet::new(), refused);
    }
    for _ in 0..25 {
        let at = 1 + random.below(text.len() - 2);
        add(format!("cut after {at} bytes"), text.as_bytes()[..at].to_vec(), BTreeSet::new(), refused);
    }
    for _ in 0..15 {
        let length = 1 + random.below(3000);
        let bytes = (0..length).map(|_| random.below(256) as u8).collect();
        add(format!("{length} bytes of noise"), bytes, BTreeSet::new(), refused);
    }

    // Fields with what they must not have.
    for (pointer, value) in VALUES {
        add(format!("{pointer} = {value}"), with_raw(&whole, pointer, value), only_evil(), None);
    }
    for pointer in NUMBERS {
        for value in ["-1", "1.5", "1e999", "99999999999999999999", "\"1\"", "[1]", "{}", "true"] {
            add(format!("{pointer} = {value}"), with_raw(&whole, pointer, value), only_evil(), refused);
        }
    }
    for name in NAMES.iter().chain(OTHERS) {
        let mut other = evil();
        other["name"] = (*name).into();
        // One that would start, were it not somebody else's.
        other["artifact"]["storePath"] = running.into();
        other["envFile"] = Value::Null;
        other["systemd"]["stateDirectory"] = Value::Null;
        let expected = match OTHERS.contains(name) {
            true => Some(Fate::Harmless),
            false => None,
        };
        let bytes = document(good, &[other]).to_string().into_bytes();
        // Nothing may change by those that are no names, or somebody else's; sshd is free where ssh is not enabled.
        let names = ["sshd".to_string()].into_iter().filter(|free| free == name).collect();
        add(format!("a service named {name:?}"), bytes, names, expected);
    }
    for (what, others) in
        [("two services of one name", vec![evil(), evil()]), ("the good service again", vec![good.clone()])]
    {
        add(what.into(), document(good, &others).to_string().into_bytes(), BTreeSet::new(), refused);
    }
    let mut gone = good.clone();
    gone["hosts"] = json!(["elsewhere"]);
    add(
        "nothing for this host".into(),
        document(&gone, &[]).to_string().into_bytes(),
        BTreeSet::new(),
        refused,
    );

    // Every text with hostile ones: all of the first kinds, and others as the numbers fall.
    let texts = hostile_texts();
    for pointer in TEXTS {
        let mut chosen: BTreeSet<usize> = BTreeSet::from([0, 3, 8]);
        while chosen.len() < 6 {
            chosen.insert(random.below(texts.len()));
        }
        for index in chosen {
            let mut hostile = whole.clone();
            *hostile.pointer_mut(pointer).unwrap() = texts[index].clone().into();
            let shown: String = texts[index].chars().take(40).collect();
            add(format!("{pointer} = {shown:?}"), hostile.to_string().into_bytes(), only_evil(), None);
        }
    }

    // As an argument and as a variable, where much is possible: all that mean something to a shell or a unit.
    for text in &texts[..28] {
        let shown: String = text.chars().take(40).collect();
        let mut hostile = whole.clone();
        hostile["services"][1]["exec"]["command"] = format!("bin/web {text}").into();
        add(format!("the argument {shown:?}"), hostile.to_string().into_bytes(), only_evil(), None);
        let mut hostile = whole.clone();
        hostile["services"][1]["env"]["X"] = text.as_str().into();
        add(format!("the variable {shown:?}"), hostile.to_string().into_bytes(), only_evil(), None);
    }

    // Bytes of the hostile service's own text changed, dropped and doubled.
    let begin = text.rfind("{\"artifact\"").unwrap();
    for n in 0..40 {
        let mut bytes = text.clone().into_bytes();
        let end = bytes.len() - 2;
        let at = begin + random.below(end - begin);
        let length = 1 + random.below(12).min(end - at - 1);
        match random.below(4) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => drop(bytes.drain(at..at + length)),
            2 => {
                let again = bytes[at..at + length].to_vec();
                drop(bytes.splice(at..at, again));
            }
            _ => {
                let token = texts[random.below(texts.len() - 2)].clone().into_bytes();
                drop(bytes.splice(at..at, token));
            }
        }
        add(format!("mutation {n} at byte {at}"), bytes, only_evil(), None);
    }
    cases
}

/// What the shell in the host does. `changed` names every file that was touched since the last `touch stamp`, by
/// its change time, which no program can set; `seen` what is not in files: the starts of units, cgroups, listening
/// sockets, Caddy's configuration. `whole` is what must be the same in the end as in the beginning.
const SHELL: &str = r#"
set +e; cd /opt/hostile; store=/var/lib/omni-deploy/manifest.json
places="/etc /root /home /usr/local /srv /var/lib/deployer-secrets /var/spool /boot /nix/var/nix/gcroots"
changed() {
    find $places -cnewer stamp -printf '%y %p %m %u %g\n'
    find /tmp /var/tmp /run /dev/shm -name '*pwned*' -printf 'marker %p\n'
}
seen() {
    find /run/systemd/units -name 'invocation:*' -printf '%f %l\n' | sort
    printf 'cgroup %s\n' /sys/fs/cgroup/system.slice/*.{service,socket,mount,timer}
    printf 'state %s\n' /var/lib/*
    awk '$4 == "0A" { print "listens", FILENAME, $2 }' /proc/net/tcp /proc/net/tcp6 | sort
    exec 5<>/dev/tcp/localhost/2019
    printf 'GET /config/ HTTP/1.0\r\nHost: localhost:2019\r\n\r\n' >&5
    sed -n 's/^{/caddy {/p' <&5
    exec 5>&-
}
whole() {
    find $places \( -type d -printf 'd %p %m %u %g\n' \) -o -printf '%y %p %m %u %g %s %T@ %i %l\n' | sort
}
# Every case has the number of the one before, which is no version that anybody published.
pass() { timeout -k 1 120 deployer run --accept-serial 50 >out 2>&1; }
back() {
    cp good $store; pass || { echo "the good manifest is not obeyed: $?"; cat out; exit 1; }
}
each() {
    touch stamp; cp "$1" $store; rm "$1"; pass; local code=$? fate=refused
    [[ $(</var/lib/deployer/state.json) == *'"manifestError": null'* ]] && fate=taken
    echo "case $1 $code $fate"
    changed >touched; seen >after; cat touched
    diff base after | grep '^[<>]'
    if [[ -s touched ]] || ! cmp -s base after; then
        back; seen >after; diff base after | sed -n 's/^[<>]/left &/p'; cp after base
    fi
}
"#;

/// Makes a pass for each case, one after the other, and tells what came of each: its fate, its exit code, and
/// whatever of the host was touched or is not as it was.
fn run(host: &Solo, cases: &[Case], good: &Value) -> Vec<(Fate, i32, Vec<String>)> {
    let folder = host.path("/opt/hostile");
    drop(fs_err::remove_dir_all(&folder));
    fs_err::create_dir_all(&folder).unwrap();
    fs_err::write(folder.join("good"), document(good, &[]).to_string()).unwrap();
    for (index, case) in cases.iter().enumerate() {
        fs_err::write(folder.join(index.to_string()), &case.bytes).unwrap();
    }
    // Nothing has changed since: also the first pass must leave alone what is not ours.
    host.sh(&format!("{SHELL} seen >base; whole >whole; back; exit 0"));
    let mut results: Vec<(Fate, i32, Vec<String>)> = Vec::new();
    for part in (0..cases.len()).collect::<Vec<_>>().chunks(20) {
        let numbers: Vec<String> = part.iter().map(usize::to_string).collect();
        let said = host.sh(&format!("{SHELL} for n in {}; do each $n; done; exit 0", numbers.join(" ")));
        for line in said.lines() {
            if let Some(head) = line.strip_prefix("case ") {
                let words: Vec<&str> = head.split(' ').collect();
                let code = words[1].parse().unwrap();
                // A guard ends a pass with 1 and leaves the state as it was.
                let fate = if code == 1 || words[2] == "refused" { Fate::Refused } else { Fate::Harmless };
                results.push((fate, code, Vec::new()));
            } else {
                results.last_mut().unwrap_or_else(|| panic!("{line}")).2.push(line.to_string());
            }
        }
        assert_eq!(results.len(), part[part.len() - 1] + 1, "{said}");
    }
    assert_eq!(host.sh(&format!("{SHELL} back; whole | diff whole - | head -n 20; exit 0")), "");
    results
}

/// Whether a difference is one that a service of these names makes: its unit, what starts it at boot, its root,
/// its folder, its cgroup, and the folders around them.
fn is_named(line: &str, names: &BTreeSet<String>) -> bool {
    const UNITS: &str = "/etc/systemd/system";
    const ROOTS: &str = "/nix/var/nix/gcroots/omni-deploy";
    if names.is_empty() {
        return false;
    }
    let words: Vec<&str> = line.trim_start_matches("left ").trim_start_matches("> ").split(' ').collect();
    let around = [UNITS, &format!("{UNITS}/multi-user.target.wants"), ROOTS];
    names.iter().any(|name| {
        let unit = format!("{name}.service");
        match words[..] {
            ["cgroup", found] => found == format!("/sys/fs/cgroup/system.slice/{unit}"),
            [found, _] if found.starts_with("invocation:") => found == format!("invocation:{unit}"),
            ["state", found] => found == format!("/var/lib/{name}"),
            ["f", found, "644", "root", "root"] => found == format!("{UNITS}/{unit}"),
            ["l", found, ..] => {
                found == format!("{UNITS}/multi-user.target.wants/{unit}")
                    || found.starts_with(&format!("{ROOTS}/{name}/"))
            }
            ["d", found, ..] => around.contains(&found) || found == format!("{ROOTS}/{name}"),
            ["listens", "/proc/net/tcp", address] => {
                // The page listens on 127.0.0.1, on what PORT says: 8066, 8100 and so on, or 8080 by default.
                let port = address.strip_prefix("0100007F:").and_then(|p| u32::from_str_radix(p, 16).ok());
                port.is_some_and(|p| p == 8066 || p == 8080 || (8100..8400).contains(&p))
            }
            _ => false,
        }
    })
}

/// Caddy's configuration without our route.
fn not_ours(mut config: Value) -> Value {
    for (_, server) in config["apps"]["http"]["servers"].as_object_mut().unwrap() {
        server["routes"].as_array_mut().unwrap().retain(|route| route["@id"] != "deployer");
    }
    config
}

/// Holds what came of each case against what may; returns how many were refused and how many harmless.
fn judge(cases: &[Case], results: &[(Fate, i32, Vec<String>)]) -> (usize, usize) {
    let mut wrong = Vec::new();
    for (case, (fate, code, differences)) in cases.iter().zip(results) {
        let allowed = match fate {
            Fate::Refused => BTreeSet::new(),
            Fate::Harmless => case.names.clone(),
        };
        let harm: Vec<&String> =
            differences.iter().filter(|l| !l.contains(" caddy {") && !is_named(l, &allowed)).collect();
        let caddy = |sign: &str| {
            let line = differences.iter().find_map(|l| l.strip_prefix(sign)?.strip_prefix(" caddy "))?;
            Some(not_ours(serde_json::from_str(line).unwrap()))
        };
        if caddy("<") != caddy(">") {
            wrong.push(format!(
                "{}: {fate:?}: other people's part of Caddy's configuration changed",
                case.what
            ));
        }
        if !harm.is_empty() {
            wrong.push(format!("{}: {fate:?}: {harm:?}", case.what));
        }
        if case.expected.is_some_and(|expected| expected != *fate) {
            wrong.push(format!("{}: {fate:?}, but {:?} is right", case.what, case.expected));
        }
        if !matches!(code, 0 | 1 | 3 | 4) {
            wrong.push(format!("{}: it ended with {code}", case.what));
        }
    }
    assert!(wrong.is_empty(), "seed {SEED:#x}: {} are wrong:\n{}", wrong.len(), wrong.join("\n"));
    let refused = results.iter().filter(|(fate, ..)| *fate == Fate::Refused).count();
    (refused, results.len() - refused)
}

/// Units of somebody else where ours are: one that runs, and another name of one.
struct Theirs<'a>(&'a Solo);

impl<'a> Theirs<'a> {
    fn new(host: &'a Solo) -> Self {
        host.sh(
            "cd /etc/systemd/system; printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >theirs.service
             ln -s /lib/systemd/system/ssh.service theirs-too.service
             systemctl daemon-reload; systemctl start theirs",
        );
        Theirs(host)
    }
}

impl Drop for Theirs<'_> {
    fn drop(&mut self) {
        self.0
            .sh("systemctl stop theirs || true; rm -f /etc/systemd/system/theirs*; systemctl daemon-reload");
    }
}

#[test]
fn a_hostile_manifest_is_refused_or_changes_only_what_it_names() {
    let host = solo();
    let running = host.deploys_web();
    let good: Value = serde_json::from_str(&host.sh("deploy-manifest show --service web")).unwrap();
    let _theirs = Theirs::new(&host);
    let before = ["web", "theirs"].map(|unit| host.invocation(unit));
    let cases = cases(&good, &running);
    let results = run(&host, &cases, &good);
    let (refused, harmless) = judge(&cases, &results);

    // What was taken up while it waited is started for real: the same values, many services in a manifest.
    let (mut started, mut units): (Vec<Value>, Vec<Value>) = (Vec::new(), Vec::new());
    for (case, (fate, ..)) in cases.iter().zip(&results) {
        let Ok(document) = serde_json::from_slice::<Value>(&case.bytes) else { continue };
        let hostile = &document["services"][1];
        if *fate == Fate::Refused || hostile["artifact"]["storePath"] != "/nix/store/placeholder" {
            continue;
        }
        let mut service = hostile.clone();
        let n = started.len();
        service["name"] = format!("evil-{n}").into();
        service["artifact"]["storePath"] = running.as_str().into();
        service["hosts"] = json!(["solo"]);
        if service["envFile"] == evil()["envFile"] {
            service["envFile"] = Value::Null;
        }
        if service["credentials"] == evil()["credentials"] {
            service["credentials"] = json!({});
        }
        if service["env"]["PORT"] == "8066" {
            service["env"]["PORT"] = (8100 + n).to_string().into();
        }
        if service["systemd"]["stateDirectory"] == "evil" {
            service["systemd"]["stateDirectory"] = format!("evil-{n}").into();
        }
        service["http"] = Value::Null;
        service["health"] = Value::Null;
        service["rollout"] = "restart".into();
        // A text that does not reach the unit starts nothing new.
        let mut unit = hostile.clone();
        for field in ["name", "revision", "health", "http", "hosts"] {
            unit[field] = Value::Null;
        }
        if !units.contains(&unit) {
            units.push(unit);
            started.push(service);
        }
    }
    let batches: Vec<Case> = started
        .chunks(30)
        .map(|services| Case {
            what: format!("{} of them started", services.len()),
            bytes: document(&good, services).to_string().into_bytes(),
            names: services
                .iter()
                .flat_map(|s| [&s["name"], &s["systemd"]["stateDirectory"]])
                .filter_map(|text| Some(text.as_str()?.to_string()))
                .collect(),
            expected: Some(Fate::Harmless),
        })
        .collect();
    let results = run(&host, &batches, &good);
    judge(&batches, &results);

    host.serves("web", "one");
    let after = ["web", "theirs"].map(|unit| host.invocation(unit));
    assert_eq!(after, before, "neither was ever restarted");
    let strangers = host.sh("ps -eo unit=,args= | awk '$1 ~ /^evil/' | head");
    assert_eq!(strangers, "");
    assert_eq!(host.sh("find / -xdev -name '*pwned*' -not -path '/proc/*' 2>/dev/null || true"), "");
    println!(
        "{} manifests, seed {SEED:#x}: {refused} refused, {harmless} harmless; {} services of these started in {} more",
        cases.len(),
        started.len(),
        batches.len()
    );
    assert!(cases.len() >= 300, "{}", cases.len());
    assert!(refused > 0 && harmless > 0 && started.len() >= 20, "{refused} {harmless} {}", started.len());
}
