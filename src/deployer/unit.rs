//! Units as text: a pure function from an entry of the manifest to the bytes of its unit file. Every value is
//! escaped for the directive it stands in (systemd.syntax(7), systemd.exec(5)); nothing is expanded by a
//! shell, and neither `%` nor `$` means anything.

use crate::hash::Sha256;
use crate::manifest::types::UnitName;
use crate::manifest::{Exec, Hardening, Profile, Service, Systemd};
use crate::names::StorePath;
use std::fmt::{Display, Write};

/// The first line of every unit we write: whoever sees it knows whose the unit is, and so do we.
pub const MARK: &str = "# Managed by omni-deploy: edit the manifest instead, changes here are undone.";

/// Whether a unit's text is one of ours.
pub fn is_ours(text: &[u8]) -> bool {
    text.split(|b| *b == b'\n').next() == Some(MARK.as_bytes())
}

/// The digest of a unit's text, by which one that came up is known again.
pub fn digest(text: &str) -> String {
    Sha256::of(text.as_bytes()).short(12)
}

/// A word in double quotes, with what systemd would interpret escaped. `%` is a specifier everywhere.
fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '%' => out.push_str("%%"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c => out.push(c),
        }
    }
    out + "\""
}

/// A word of `ExecStart=`, where `$` would be a variable as well.
fn exec_word(text: &str) -> String {
    quoted(text).replace('$', "$$")
}

/// A path in a directive that takes the rest of the line as it is: only specifiers mean anything.
fn bare(text: &str) -> String {
    text.replace('%', "%%")
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// What the strict profile writes, besides the directives that have fields of their own. Together with those
/// it leaves a service the network, its own folders and what it has in memory.
const STRICT: [(&str, &str); 24] = [
    ("NoNewPrivileges", "yes"),
    ("CapabilityBoundingSet", ""),
    ("PrivateDevices", "yes"),
    ("PrivateUsers", "yes"),
    ("ProtectClock", "yes"),
    ("ProtectControlGroups", "yes"),
    ("ProtectHostname", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("ProtectProc", "invisible"),
    ("ProcSubset", "pid"),
    ("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6"),
    ("RestrictNamespaces", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("LockPersonality", "yes"),
    ("MemoryDenyWriteExecute", "yes"),
    ("SystemCallArchitectures", "native"),
    ("RemoveIPC", "yes"),
    ("UMask", "0077"),
    // The system calls; the second line takes out of the first. What is refused is an error that the service can go
    // on from, not its end.
    ("SystemCallFilter", "@system-service"),
    ("SystemCallFilter", "~@privileged @resources"),
    ("SystemCallErrorNumber", "EPERM"),
];

/// The unit of a service that runs `path`. Equal entries give equal bytes.
pub fn render(service: &Service, path: &StorePath) -> String {
    let Service {
        name,
        artifact: _,
        hosts: _,
        exec,
        env,
        env_file,
        credentials,
        http: _,
        health: _,
        rollout: _,
        systemd,
        hardening,
        revision: _,
        extra: _,
    } = service;
    let Exec { command: _, user, group, extra: _ } = exec;
    let Systemd {
        after,
        requires,
        restart,
        restart_sec,
        state_directory,
        read_write_paths,
        memory_max,
        cpu_quota,
        working_directory,
        stop_timeout_sec,
        extra: _,
    } = systemd;
    // `dynamicUser` is read through the service: its default depends on the profile and the user.
    let Hardening { profile, dynamic_user: _, private_tmp, protect_system, protect_home, extra: _ } =
        hardening;
    let (program, args) = service.program(path);
    let names = |units: &[UnitName]| units.iter().map(UnitName::as_str).collect::<Vec<_>>().join(" ");
    let some_names = |units: &[UnitName]| Some(names(units)).filter(|names| !names.is_empty());
    let is_online = |unit: &&UnitName| unit.as_str() == UnitName::NETWORK_ONLINE;
    let mut u = UnitText(format!("{MARK}\n"));
    u.section("Unit");
    u.line("Description", format!("{name} (deployed by omni-deploy)"));
    u.lines("After", some_names(after));
    u.lines("Wants", after.iter().find(is_online));
    u.lines("Requires", some_names(requires));

    u.section("Service");
    u.line("Type", "exec");
    let program = program.to_string_lossy();
    let words = std::iter::once(&*program).chain(args.iter().map(String::as_str));
    u.line("ExecStart", words.map(exec_word).collect::<Vec<_>>().join(" "));
    if service.dynamic_user() {
        u.line("DynamicUser", "yes");
        // The default names say nothing here: the user is made for the service.
        u.lines("User", service.dynamic_user_name());
        u.lines("Group", Some(group).filter(|group| group.as_str() != "root"));
    } else {
        u.line("User", user);
        u.line("Group", group);
    }
    u.lines("Environment", env.iter().map(|(name, value)| quoted(&format!("{name}={value}"))));
    u.lines("EnvironmentFile", env_file.as_deref().map(bare));
    u.lines("LoadCredential", credentials.iter().map(|(name, file)| bare(&format!("{name}:{file}"))));
    u.lines("WorkingDirectory", working_directory.as_deref().map(bare));
    u.line("Restart", restart.as_str());
    u.line("RestartSec", restart_sec.get());
    u.lines("TimeoutStopSec", stop_timeout_sec.map(|seconds| seconds.get()));
    u.lines("StateDirectory", state_directory.as_deref().map(quoted));
    // A percentage is not a specifier here: systemd does not expand them in resource limits.
    u.lines("MemoryMax", memory_max.as_deref());
    u.lines("CPUQuota", cpu_quota.as_deref());
    u.line("PrivateTmp", yes(*private_tmp));
    u.line("ProtectSystem", protect_system.as_str());
    u.line("ProtectHome", yes(*protect_home));
    u.lines("ReadWritePaths", read_write_paths.iter().map(|path| quoted(path)));
    if *profile == Profile::Strict {
        STRICT.iter().for_each(|(key, value)| u.line(key, value));
    }
    u.section("Install");
    u.line("WantedBy", "multi-user.target");
    u.0
}

struct UnitText(String);

impl UnitText {
    fn section(&mut self, name: &str) {
        let _infallible = writeln!(self.0, "\n[{name}]");
    }

    fn line(&mut self, key: &str, value: impl Display) {
        // Writing into a String cannot fail.
        let _infallible = writeln!(self.0, "{key}={value}");
    }

    /// A directive for each of these values, of which there may be none.
    fn lines(&mut self, key: &str, values: impl IntoIterator<Item = impl Display>) {
        values.into_iter().for_each(|value| self.line(key, value));
    }
}

/// The program that a unit of ours starts, from its text: the inverse of what [`render`] writes.
pub fn program_of(text: &str) -> Option<String> {
    let rest = text.lines().find_map(|line| line.strip_prefix("ExecStart=\""))?;
    let (mut program, mut chars) = (String::new(), rest.chars());
    loop {
        match (chars.next()?, chars.clone().next()) {
            ('"', _) => return Some(program),
            ('\\', Some('n')) => program.push('\n'),
            ('\\', Some('r')) => program.push('\r'),
            ('\\', Some('t')) => program.push('\t'),
            ('\\', Some(c)) => program.push(c),
            ('%', Some('%')) => program.push('%'),
            ('$', Some('$')) => program.push('$'),
            (c, _) => {
                program.push(c);
                continue;
            }
        }
        chars.next();
    }
}

/// The unit of the candidate: the same service on a spare port, never started at boot. None when nothing in
/// its environment says its port.
pub fn render_next(service: &Service, path: &StorePath, port: u16) -> Option<String> {
    let text = render(&service.on_port(port)?, path);
    let body = text.split("\n[Install]").next()?;
    let body = body.strip_prefix(MARK)?;
    Some(format!("{MARK}\n{NEXT_PORT}{port}{}", body.replacen(" (deployed", " (taking over, deployed", 1)))
}

/// The second line of a candidate's unit: the port it was given.
const NEXT_PORT: &str = "# An understudy on port ";

/// The port of a candidate, from its unit.
pub fn next_port(text: &str) -> Option<u16> {
    text.lines().nth(1)?.strip_prefix(NEXT_PORT)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::parse;

    #[test]
    fn what_systemd_would_interpret_is_escaped() {
        for (text, expected) in [
            ("plain", r#""plain""#),
            ("a b", r#""a b""#),
            (r#"say "hi""#, r#""say \"hi\"""#),
            (r"c:\x", r#""c:\\x""#),
            ("100%", r#""100%%""#),
            ("two\nlines\r\tx", r#""two\nlines\r\tx""#),
            ("$HOME", r#""$HOME""#),
        ] {
            assert_eq!(quoted(text), expected);
        }
        assert_eq!(exec_word("$HOME %i"), r#""$$HOME %%i""#);
        assert_eq!(bare("/a%b"), "/a%%b");
    }

    fn rendered(fields: serde_json::Value) -> (Service, String) {
        let mut entry = serde_json::json!({"name": "ava", "hosts": ["biz"],
            "artifact": {"storePath": "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava"}});
        entry.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let service = parse::service(entry, parse::Mode::Strict, None).unwrap();
        let text = render(&service, service.artifact.store_path.path().unwrap());
        (service, text)
    }

    #[test]
    fn the_program_of_a_unit_is_read_back_as_it_was_written() {
        for command in ["bin/ava", "bin/a%c --x", "/usr/bin/env $x", "'bin/a b' d"] {
            let (service, text) = rendered(serde_json::json!({"exec": {"command": command}}));
            let (program, _) = service.program(service.artifact.store_path.path().unwrap());
            assert_eq!(program_of(&text).as_deref(), program.to_str(), "{text}");
        }
        assert_eq!(program_of("[Service]\nExecStart=/bin/true\n"), None);
    }

    #[test]
    fn an_entry_without_a_profile_has_the_bytes_it_always_had() {
        let (_, text) = rendered(serde_json::json!({
            "env": {"PORT": "8080"}, "envFile": "/var/lib/deployer-secrets/ava.env"}));
        let expected = "\
# Managed by omni-deploy: edit the manifest instead, changes here are undone.

[Unit]
Description=ava (deployed by omni-deploy)
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
ExecStart=\"/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava/bin/ava\"
User=root
Group=root
Environment=\"PORT=8080\"
EnvironmentFile=/var/lib/deployer-secrets/ava.env
Restart=on-failure
RestartSec=5
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes

[Install]
WantedBy=multi-user.target
";
        assert_eq!(text, expected);
        let default = serde_json::json!({"env": {"PORT": "8080"}, "envFile": "/var/lib/deployer-secrets/ava.env",
            "hardening": {"profile": "default"}, "credentials": {}});
        assert_eq!(rendered(default).1, expected);
    }

    #[test]
    fn the_strict_profile_adds_to_the_fields_and_overrules_none() {
        let strict = |fields: serde_json::Value, exec: serde_json::Value| {
            let mut hardening = serde_json::json!({"profile": "strict"});
            hardening.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            rendered(serde_json::json!({"hardening": hardening, "exec": exec})).1
        };
        let none = serde_json::json!({});
        for (fields, exec, there, absent) in [
            (
                none.clone(),
                none.clone(),
                &["DynamicUser=yes", "User=ava", "PrivateTmp=yes"][..],
                &["Group="][..],
            ),
            (none.clone(), serde_json::json!({"group": "adm"}), &["User=ava", "Group=adm"], &["User=root"]),
            (
                none.clone(),
                serde_json::json!({"user": "www-data"}),
                &["User=www-data", "Group=root"],
                &["DynamicUser"],
            ),
            (
                serde_json::json!({"dynamicUser": false, "privateTmp": false, "protectHome": false,
                    "protectSystem": "full"}),
                none.clone(),
                &["User=root", "PrivateTmp=no", "ProtectSystem=full", "ProtectHome=no"],
                &["DynamicUser"],
            ),
        ] {
            let text = strict(fields, exec);
            let lines: Vec<&str> = text.lines().collect();
            for line in there {
                assert!(lines.contains(line), "no {line}: {text}");
            }
            for start in absent {
                assert!(!lines.iter().any(|l| l.starts_with(start)), "{start}: {text}");
            }
            for (key, value) in &STRICT {
                assert!(lines.contains(&format!("{key}={value}").as_str()), "no {key}={value}: {text}");
                // A directive of a field is that field's alone: whatever came later would win.
                let field = ["DynamicUser", "PrivateTmp", "ProtectSystem", "ProtectHome", "User"];
                assert!(!field.contains(key), "{key}");
            }
        }
    }

    #[test]
    fn an_candidate_is_the_same_user_with_the_same_secrets_and_as_confined() {
        let (service, text) = rendered(serde_json::json!({"env": {"PORT": "8080"}, "rollout": "overlap",
            "http": {"domain": "a.org", "internalPort": 8080}, "hardening": {"profile": "strict"},
            "credentials": {"token": "/s/token", "tls.key": "/s/a:b=~,@+"}}));
        for line in ["LoadCredential=tls.key:/s/a:b=~,@+", "LoadCredential=token:/s/token", "User=ava"] {
            assert!(text.lines().any(|l| l == line), "no {line}: {text}");
        }
        let next = render_next(&service, service.artifact.store_path.path().unwrap(), 20_000).unwrap();
        let section = |text: &str| {
            let lines = text.lines().skip_while(|l| *l != "[Service]").take_while(|l| *l != "[Install]");
            let lines: Vec<String> = lines.map(|l| l.replace("PORT=20000", "PORT=8080")).collect();
            lines.join("\n").trim_end().to_string()
        };
        assert_eq!(section(&next), section(&text));
    }

    #[test]
    fn a_unit_is_ours_by_its_first_line_alone() {
        assert!(is_ours(format!("{MARK}\n[Unit]\n").as_bytes()));
        assert!(!is_ours(format!("[Unit]\n{MARK}\n").as_bytes()));
        assert!(!is_ours(format!("{MARK} \n").as_bytes()));
        assert!(!is_ours(b""));
    }
}
