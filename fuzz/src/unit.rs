//! The renderer of units: what a reader of its own ([`crate::units`]) finds in the text is what the entry meant,
//! and nothing besides.

use crate::entries::{self, Choices, Entry};
use crate::units::{self, Directive};
use omni_deploy::deployer::unit;
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::manifest::types::UnitName;
use omni_deploy::manifest::{Profile, Service};
use omni_deploy::names::StorePath;

/// Bytes below 0x80 begin an entry as it is; others stand for decisions of [`entries::entry`].
pub fn check(data: &[u8]) {
    match data.split_first() {
        Some((0x80.., choices)) => {
            let Entry { value, words } = entries::entry(&mut Choices::new(choices));
            if let Ok(service) = parse::service(value, Mode::Tolerant, None) {
                rendered(&service, words.as_deref());
            }
        }
        _ => {
            if let Ok(service) = parse::service_from(data, Mode::Tolerant, None) {
                rendered(&service, None);
            }
        }
    }
}

fn rendered(service: &Service, words: Option<&[String]>) {
    let Some(path) = service.artifact.store_path.path() else { return };
    let text = unit::render(service, path);
    assert!(unit::is_ours(text.as_bytes()));
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "control characters in {text:?}");
    assert!(text.ends_with('\n') && !text.ends_with("\n\n"));
    let read = read(&text);
    assert_eq!(read, meant(service, path, words), "{text}");
    assert_eq!(text, unit::render(service, path), "equal entries give equal bytes");
    assert_eq!(unit::next_port(&text), None);

    let port = 40_000;
    let Some(next) = unit::render_next(service, path, port) else {
        assert!(service.port_variable().is_none(), "a candidate can be told its port");
        return;
    };
    assert!(unit::is_ours(next.as_bytes()));
    assert_eq!(unit::next_port(&next), Some(port));
    let mut expected = meant(&service.on_port(port).expect("it has a port"), path, words);
    expected.retain(|(section, ..)| section != "Install");
    expected[0].2 = vec![format!("{} (taking over, deployed by omni-deploy)", service.name)];
    assert_eq!(self::read(&next), expected, "{next}");
}

/// A directive, as what it means.
type Meaning = (String, String, Vec<String>);

/// What a unit means to systemd.
fn read(text: &str) -> Vec<Meaning> {
    let directives = units::directives(text).unwrap_or_else(|why| panic!("{why}: {text}"));
    let meaning = |d: Directive| {
        let read = meaning(&d).unwrap_or_else(|why| panic!("{}={}: {why}", d.name, d.value));
        (d.section, d.name, read)
    };
    directives.into_iter().map(meaning).collect()
}

/// What one directive means: as a list of words where it is one.
fn meaning(d: &Directive) -> Result<Vec<String>, String> {
    let whole = || vec![d.value.clone()];
    Ok(match (d.section.as_str(), d.name.as_str()) {
        ("Unit", "Description") => vec![units::specifiers(&d.value)?],
        ("Unit", "After" | "Requires" | "Wants") | ("Install", "WantedBy") => {
            // Backslashes are part of units' names; quotes are not.
            if d.value.contains(['"', '\'', '%']) {
                return Err("it would be unquoted or expanded".into());
            }
            d.value.split_whitespace().map(String::from).collect()
        }
        ("Service", "ExecStart") => units::command_line(&d.value)?,
        ("Service", "Environment") => {
            units::words(&d.value)?.iter().map(|w| units::specifiers(w)).collect::<Result<_, _>>()?
        }
        ("Service", "EnvironmentFile" | "WorkingDirectory") => {
            let path = units::specifiers(&d.value)?;
            units::absolute(&path)?;
            if path.contains(['*', '?', '[']) {
                return Err("it would be a pattern".into());
            }
            vec![path]
        }
        ("Service", "LoadCredential") => {
            let (name, path) = d.value.split_once(':').ok_or("no path")?;
            let path = units::specifiers(path)?;
            units::absolute(&path)?;
            if name.is_empty() || name.contains(['%', '/', ' ', '"', '\'', '\\']) {
                return Err("no name of a credential".into());
            }
            vec![name.to_string(), path]
        }
        ("Service", name) if STRICT.iter().any(|(strict, _)| *strict == name) => whole(),
        ("Service", "StateDirectory") => {
            let paths: Vec<_> =
                units::words(&d.value)?.iter().map(|w| units::specifiers(w)).collect::<Result<_, _>>()?;
            paths.iter().try_for_each(|p| units::below(p))?;
            paths
        }
        ("Service", "ReadWritePaths") => {
            let paths: Vec<_> =
                units::words(&d.value)?.iter().map(|w| units::specifiers(w)).collect::<Result<_, _>>()?;
            paths.iter().try_for_each(|p| units::absolute(p))?;
            paths
        }
        ("Service", "MemoryMax") => {
            match d.value.ends_with('%') {
                true if !(1..=10_000).contains(&units::share(&d.value)?) => return Err("out of range".into()),
                true => {}
                false if units::bytes(&d.value)? == Some(0) => return Err("out of range".into()),
                false => {}
            }
            whole()
        }
        ("Service", "CPUQuota") => {
            if !(1..=100_000_000).contains(&units::share(&d.value)?) {
                return Err("out of range".into());
            }
            whole()
        }
        (
            "Service",
            "Type" | "User" | "Group" | "DynamicUser" | "Restart" | "RestartSec" | "TimeoutStopSec"
            | "PrivateTmp" | "ProtectSystem" | "ProtectHome",
        ) => {
            if !d.value.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
                return Err("it is no plain word".into());
            }
            whole()
        }
        _ => return Err("nothing writes this directive".into()),
    })
}

/// What an entry means, in the order in which a unit says it.
fn meant(service: &Service, path: &StorePath, words: Option<&[String]>) -> Vec<Meaning> {
    let mut all: Vec<Meaning> = Vec::new();
    let mut say = |section: &str, name: &str, values: Vec<String>| {
        all.push((section.into(), name.into(), values));
    };
    let (exec, systemd, hardening) = (&service.exec, &service.systemd, &service.hardening);
    let one = |value: &str| vec![value.to_string()];
    let strict = hardening.profile == Profile::Strict;
    let names = |units: &[UnitName]| units.iter().map(UnitName::to_string).collect::<Vec<_>>();
    let yes = |on: bool| one(if on { "yes" } else { "no" });
    say("Unit", "Description", vec![format!("{} (deployed by omni-deploy)", service.name)]);
    if !systemd.after.is_empty() {
        say("Unit", "After", names(&systemd.after));
    }
    if systemd.after.iter().any(|unit| unit.as_str() == "network-online.target") {
        say("Unit", "Wants", one("network-online.target"));
    }
    if !systemd.requires.is_empty() {
        say("Unit", "Requires", names(&systemd.requires));
    }
    say("Service", "Type", one("exec"));
    say("Service", "ExecStart", argv(service, path, words));
    if service.dynamic_user() {
        say("Service", "DynamicUser", one("yes"));
    }
    for (name, value) in [("User", &exec.user), ("Group", &exec.group)] {
        let of_its_own = service.dynamic_user() && value.as_str() == "root";
        if !of_its_own {
            say("Service", name, one(value));
        } else if name == "User" && strict && can_be_a_user(service.name.as_str()) {
            say("Service", name, one(service.name.as_str()));
        }
    }
    for (name, value) in &service.env {
        say("Service", "Environment", vec![format!("{name}={value}")]);
    }
    if let Some(file) = &service.env_file {
        say("Service", "EnvironmentFile", one(file));
    }
    for (name, file) in &service.credentials {
        say("Service", "LoadCredential", vec![name.to_string(), file.to_string()]);
    }
    if let Some(directory) = &systemd.working_directory {
        say("Service", "WorkingDirectory", one(directory));
    }
    say("Service", "Restart", one(systemd.restart.as_str()));
    say("Service", "RestartSec", vec![systemd.restart_sec.get().to_string()]);
    if let Some(seconds) = systemd.stop_timeout_sec {
        say("Service", "TimeoutStopSec", vec![seconds.get().to_string()]);
    }
    let optional = [
        ("StateDirectory", systemd.state_directory.as_deref()),
        ("MemoryMax", systemd.memory_max.as_deref()),
        ("CPUQuota", systemd.cpu_quota.as_deref()),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            say("Service", name, one(value));
        }
    }
    say("Service", "PrivateTmp", yes(hardening.private_tmp));
    say("Service", "ProtectSystem", one(hardening.protect_system.as_str()));
    say("Service", "ProtectHome", yes(hardening.protect_home));
    for path in &systemd.read_write_paths {
        say("Service", "ReadWritePaths", one(path));
    }
    if strict {
        STRICT.iter().for_each(|(name, value)| say("Service", name, one(value)));
    }
    say("Install", "WantedBy", one("multi-user.target"));
    all
}

/// Whether systemd takes a service's name for a user's ("User/Group Name Syntax" in systemd.exec(5)).
fn can_be_a_user(name: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    name.len() <= 31
        && name.starts_with(first)
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
}

/// What the strict profile adds (docs/manifest.md).
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
    ("SystemCallFilter", "@system-service"),
    ("SystemCallFilter", "~@privileged @resources"),
    ("SystemCallErrorNumber", "EPERM"),
];

/// The command line, from the words it was made of where they are known.
fn argv(service: &Service, path: &StorePath, words: Option<&[String]>) -> Vec<String> {
    match words {
        Some([program, args @ ..]) => {
            let program =
                if program.starts_with('/') { program.clone() } else { format!("{path}/{program}") };
            std::iter::once(program).chain(args.iter().cloned()).collect()
        }
        _ => {
            let (program, args) = service.program(path);
            let program = program.to_str().expect("it was text").to_string();
            std::iter::once(program).chain(args).collect()
        }
    }
}
