//! What systemd makes of rendered units: entries made of bytes (those the fuzzers make, and their seeds) become
//! units of a booted host, and what its manager then says of each is what the entry meant. Nothing is started.

use crate::solo::solo;
use entries::{Choices, Entry};
use omni_deploy::deployer::unit;
use omni_deploy::manifest::Service;
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::manifest::types::UnitName;
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[path = "../../fuzz/src/entries.rs"]
#[allow(dead_code, reason = "of the fuzzers' part a half is used here")]
mod entries;
#[path = "../../fuzz/src/units.rs"]
#[allow(dead_code, reason = "as above")]
mod reader;

/// How many entries are made here, besides the fuzzers' seeds.
const MADE: usize = 300;

/// A unit of the host with the entry it is of.
struct Rendered {
    service: Service,
    argv: Vec<String>,
    text: String,
}

/// The entry that these bytes stand for, if it is valid and there is something to run.
fn rendered(bytes: &[u8]) -> Option<Rendered> {
    let Entry { value, words } = entries::entry(&mut Choices::new(bytes));
    let service = parse::service(value, Mode::Tolerant, None).ok()?;
    let path = service.artifact.store_path.path()?;
    let (program, args) = service.program(path);
    let argv: Vec<String> = std::iter::once(program.to_str()?.to_string()).chain(args).collect();
    if let Some(words) = words {
        assert_eq!(argv[1..], words[1..], "the words somebody typed");
    }
    let text = unit::render(&service, path);
    Some(Rendered { argv, text, service })
}

/// Always the same bytes for the same number (splitmix64).
fn bytes_of(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..64).flat_map(|_| next().to_le_bytes()).collect()
}

fn corpus() -> Vec<Rendered> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/unit");
    let mut files: Vec<_> = fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let kept = files.iter().filter_map(|file| match fs_err::read(file).unwrap().split_first() {
        Some((0x80.., choices)) => rendered(choices),
        _ => None,
    });
    let kept: Vec<Rendered> = kept.collect();
    assert!(kept.len() >= 25, "only {} of {} files are valid entries", kept.len(), files.len());
    kept.into_iter().chain((0..).filter_map(|seed| rendered(&bytes_of(seed))).take(MADE)).collect()
}

const OF_UNIT: [&str; 4] = ["LoadState", "Description", "After", "Requires"];
const OF_SERVICE: [&str; 19] = [
    "LoadCredential",
    "Type",
    "ExecStart",
    "Environment",
    "EnvironmentFiles",
    "User",
    "Group",
    "DynamicUser",
    "WorkingDirectory",
    "Restart",
    "RestartUSec",
    "TimeoutStopUSec",
    "StateDirectory",
    "MemoryMax",
    "CPUQuotaPerSecUSec",
    "PrivateTmp",
    "ProtectSystem",
    "ProtectHome",
    "ReadWritePaths",
];

/// What the manager says of a unit, by property: busctl prints one a line, as JSON, in the order they were asked for.
fn properties(block: &str) -> BTreeMap<&'static str, Value> {
    let names = OF_UNIT.into_iter().chain(OF_SERVICE);
    let properties: BTreeMap<_, _> = names
        .zip(block.lines())
        .map(|(name, line)| (name, serde_json::from_str::<Value>(line).unwrap()["data"].take()))
        .collect();
    assert_eq!(properties.len(), OF_UNIT.len() + OF_SERVICE.len(), "{block}");
    properties
}

#[test]
fn systemd_reads_back_what_every_entry_of_the_fuzzers_means() {
    let host = solo();
    let version = host.sh("systemctl --version | sed -n '1s/systemd \\([0-9]*\\).*/\\1/p'");
    let mut corpus = corpus();
    if version.parse::<u32>().unwrap() >= 262 {
        // It starts no such program; a pass says so (doors.rs).
        corpus.retain(|rendered| !rendered.argv[0].contains(['?', '*', '[']));
    }
    let folder = host.path("/opt/omni/units");
    fs_err::create_dir_all(&folder).unwrap();
    for (nth, rendered) in corpus.iter().enumerate() {
        fs_err::write(folder.join(format!("fuzz{nth}.service")), &rendered.text).unwrap();
    }
    // What a percentage of the memory is a part of.
    fs_err::write(folder.join("fuzzall.service"), "[Service]\nExecStart=/bin/true\nMemoryMax=100%\n")
        .unwrap();
    let shown = host.sh(&format!(
        "cp /opt/omni/units/* /run/systemd/system/
         systemctl daemon-reload
         bus() {{ busctl --json=short get-property org.freedesktop.systemd1 \"$@\"; }}
         for nth in all $(seq 0 {}); do
             echo \"# $nth\"
             object=/org/freedesktop/systemd1/unit/fuzz${{nth}}_2eservice
             bus $object org.freedesktop.systemd1.Unit {}
             bus $object org.freedesktop.systemd1.Service {}
         done",
        corpus.len() - 1,
        OF_UNIT.join(" "),
        OF_SERVICE.join(" "),
    ));
    let verified = host.sh(
        "{ systemd-analyze verify --man=no --recursive-errors=no /run/systemd/system/fuzz*.service 2>&1 || true; }
         rm -r /opt/omni/units /run/systemd/system/fuzz*.service
         systemctl daemon-reload",
    );
    // No closure is there. Nothing else is to be said.
    for line in verified.lines() {
        assert!(line.contains(" is not executable: No such file or directory"), "{line}");
    }
    let mut blocks =
        shown.strip_prefix('#').unwrap().split("\n#").map(|block| block.split_once('\n').unwrap().1);
    let all_memory = properties(blocks.next().unwrap())["MemoryMax"].as_u64().unwrap();
    for (nth, rendered) in corpus.iter().enumerate() {
        let shown = properties(blocks.next().unwrap());
        for (name, meant) in meant(nth, rendered, all_memory) {
            let said = &shown[name];
            let same = match name {
                // In an order of its own.
                "LoadCredential" => {
                    let (said, meant) = (said.as_array().unwrap(), meant.as_array().unwrap());
                    said.len() == meant.len() && meant.iter().all(|credential| said.contains(credential))
                }
                // systemd adds some of its own.
                "After" | "Requires" => {
                    meant.as_array().unwrap().iter().all(|unit| said.as_array().unwrap().contains(unit))
                }
                _ => *said == meant,
            };
            assert!(same, "{name} is {said}, meant is {meant}:\n{}", rendered.text);
        }
    }
}

/// What systemd should say of an entry's unit.
fn meant(nth: usize, rendered: &Rendered, all_memory: u64) -> Vec<(&'static str, Value)> {
    let Rendered { service, argv, text: _ } = rendered;
    let (exec, systemd, hardening) = (&service.exec, &service.systemd, &service.hardening);
    // systemd writes a template as its instance for this unit.
    let dependencies = |units: &[UnitName]| -> Value {
        let instance = |unit: &UnitName| match unit.split_once('@') {
            Some((before, after)) if after.starts_with('.') && !after[1..].contains('.') => {
                format!("{before}@fuzz{nth}{after}")
            }
            _ => unit.to_string(),
        };
        units.iter().map(instance).collect()
    };
    // What it shows is before variables are put in place, of which there are none.
    let escaped: Vec<String> = argv.iter().map(|word| word.replace('$', "$$")).collect();
    let program: Vec<&str> = argv[0].split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let command = json!([[format!("/{}", program.join("/")), escaped, false, 0, 0, 0, 0, 0, 0, 0]]);
    let env: Vec<String> = service.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let env_files: Vec<Value> = service.env_file.iter().map(|file| json!([file, false])).collect();
    let unlimited = u64::MAX;
    let memory = match systemd.memory_max.as_deref() {
        None => unlimited,
        // In whole pages.
        Some(share) if share.ends_with('%') => {
            let pages = u128::from(all_memory / 4096) * u128::from(reader::share(share).unwrap()) / 10_000;
            pages as u64 * 4096
        }
        Some(bytes) => reader::bytes(bytes).unwrap().unwrap_or(unlimited),
    };
    let quota = systemd.cpu_quota.as_deref().map_or(unlimited, |quota| reader::share(quota).unwrap() * 100);
    // What a user that is made for the service implies (systemd.exec(5), "DynamicUser=").
    let protect_system = if service.dynamic_user() { "strict" } else { hardening.protect_system.as_str() };
    let protect_home = match (hardening.protect_home, service.dynamic_user()) {
        (true, _) => "yes",
        (false, true) => "read-only",
        (false, false) => "no",
    };
    let mut all = vec![
        ("LoadState", json!("loaded")),
        ("Description", json!(format!("{} (deployed by omni-deploy)", service.name))),
        ("After", dependencies(&systemd.after)),
        ("Requires", dependencies(&systemd.requires)),
        ("Type", json!("exec")),
        ("ExecStart", command),
        ("Environment", json!(env)),
        ("EnvironmentFiles", json!(env_files)),
        ("LoadCredential", json!(service.credentials.iter().collect::<Vec<_>>())),
        ("DynamicUser", json!(service.dynamic_user())),
        ("WorkingDirectory", json!(systemd.working_directory.as_deref().unwrap_or_default())),
        ("Restart", json!(systemd.restart)),
        ("RestartUSec", json!(u64::from(systemd.restart_sec.get()) * 1_000_000)),
        ("StateDirectory", json!(systemd.state_directory.iter().collect::<Vec<_>>())),
        ("MemoryMax", json!(memory)),
        ("CPUQuotaPerSecUSec", json!(quota)),
        ("PrivateTmp", json!(hardening.private_tmp || service.dynamic_user())),
        ("ProtectSystem", json!(protect_system)),
        ("ProtectHome", json!(protect_home)),
        ("ReadWritePaths", json!(systemd.read_write_paths)),
    ];
    if let Some(seconds) = systemd.stop_timeout_sec {
        all.push(("TimeoutStopUSec", json!(u64::from(seconds.get()) * 1_000_000)));
    }
    if !service.dynamic_user() {
        all.push(("User", json!(exec.user)));
        all.push(("Group", json!(exec.group)));
    } else if let Some(user) = service.dynamic_user_name() {
        all.push(("User", json!(user)));
    }
    all
}
