//! The write campaign: the disk is full, read-only or broken at every write that a pass makes. The error names
//! what could not be written, why, and what helps; nothing is torn, what runs goes on, and once the disk is well
//! again the next pass leaves the host as an undisturbed one does.

use crate::kill::{QUICK, boot, on_hosts, prepare, run, scenarios};
use crate::lab::Host;
use std::fmt::Write;

/// What the kernel says, and with what words an operator is helped.
const ERRORS: [(&str, &str, &str); 3] = [
    ("EIO", "Input/output error", "dmesg"),
    ("ENOSPC", "No space left on device", "free some space"),
    ("EROFS", "Read-only file system", "make that file system writable"),
];

#[test]
fn a_write_that_fails_is_named_and_made_up_for() {
    let chosen = ["upgrade", "overlap", "first deploy", "removal", "rollback"];
    let scenarios = scenarios().into_iter().filter(|s| chosen.contains(&s.name)).collect();
    on_hosts(&["write1", "write2"], scenarios, |host, scenario, wrong| {
        prepare(host, scenario);
        let command = scenario.command;
        let list = format!("rm -f /tmp/effects; OMNI_DEPLOY_EFFECTS=/tmp/effects {command}");
        let undisturbed = run(host, &list, ":").unwrap();
        assert_eq!(undisturbed.code, scenario.code, "{}: {}", scenario.name, undisturbed.said);
        let effects = host.sh("cat /tmp/effects");
        let words = ["write", "create", "link", "remove", "make folder", "remove folder"];
        let writes = effects.lines().filter_map(|line| {
            let (number, what) = line.split_once(" before ")?;
            let (what, path) = what.rsplit_once(' ')?;
            words.contains(&what).then_some((number, what, path))
        });
        let mut count = 0;
        let points = writes.flat_map(|write| ERRORS.map(|error| (write, error)));
        for ((number, what, path), (error, cause, helps)) in points {
            count += 1;
            let first =
                format!("OMNI_DEPLOY_FAIL_AT={number}:{error} {command}; echo \"exit code $?\"; between");
            // A person's word that did not reach the disk is given again.
            let then = if path.ends_with("overrides.json") { command } else { "deployer run" };
            let verdict = run(host, &first, then).and_then(|got| {
                let mut verdict = got.against(&undisturbed, scenario.bad);
                let line = got.said.lines().find(|l| l.contains(cause)).unwrap_or_default();
                if !(line.contains(path.rsplit('/').next().unwrap_or(path)) && line.contains(helps)) {
                    writeln!(verdict, "      {cause} on {path} is not named with its remedy: {line}")
                        .unwrap();
                }
                // The report is made up for, a manifest that cannot be kept is not taken up, one of which no note can be
                // made is read without, and what this Caddy can do is found out later.
                let minor = [
                    "/omni-deploy/hosts/",
                    "/deployer/manifest",
                    "/omni-deploy/reading.json",
                    "/deployer/caddy.json",
                    "/omni-deploy/ports/.trial",
                ];
                let minor = minor.iter().any(|part| path.contains(part));
                let code = got.said.lines().find_map(|l| l.strip_prefix("exit code ")).unwrap_or_default();
                let down = code == "4" && scenario.before.is_empty();
                if !(code == "1" || code == "3" || code == "0" && minor || down) {
                    writeln!(verdict, "      the failing pass ended with exit code {code}").unwrap();
                }
                let torn = got.said.lines().find(|l| *l == "TORN" || l.starts_with("LEFT OVER"));
                let served = got.said.lines().find_map(|l| l.strip_prefix("web serves "));
                let may_be_down = scenario.before.is_empty() || scenario.serves == [("web", "")];
                let serving = served.is_some_and(|s| ["one", "two", "half"].contains(&s));
                if torn.is_some() || !(serving || served == Some("") && may_be_down) {
                    writeln!(verdict, "      in between: {torn:?}, web serves {served:?}").unwrap();
                }
                if verdict.is_empty() { Ok(()) } else { Err(format!("{verdict}{}", got.said)) }
            });
            if let Err(why) = verdict {
                writeln!(wrong, "{}, {error} at {what} {path}:\n{why}", scenario.name).unwrap();
            }
        }
        count
    });
}

/// The start of an upgrade on a host whose disk is then not what it was.
fn upgrading(host: &Host) {
    let scenario = scenarios().into_iter().find(|s| s.name == "upgrade").unwrap();
    prepare(host, &scenario);
    host.sh(&format!("{QUICK}; restore"));
}

#[test]
fn a_real_disk_that_is_full_or_read_only_costs_the_deploy_and_nothing_else() {
    let host = boot("disk");
    let read_only = |dir: &str| {
        (format!("mount --bind {dir} {dir}; mount -o remount,ro,bind {dir}"), format!("umount {dir}"))
    };
    // A memory disk of its own, with what was there before; freeing it is half the mending.
    let full = |dir: &str| {
        (
            format!(
                "cp -a {dir} /root/kept; mount -t tmpfs -o size=2m,mode=755 tmpfs {dir}; cp -a /root/kept/. {dir}
                 dd if=/dev/zero of={dir}/filler bs=4k 2>/dev/null || true"
            ),
            format!("rm {dir}/filler"),
            format!("rm -rf /root/after; cp -a {dir} /root/after; umount {dir}; rm -rf {dir} /root/kept; cp -a /root/after {dir}"),
        )
    };
    let (fill, free, put_back) = full("/var/lib/deployer");
    let (units_ro, units_rw) = read_only("/etc/systemd/system");
    let (roots_ro, roots_rw) = read_only("/nix/var/nix/gcroots");
    let (state_ro, state_rw) = read_only("/var/lib/deployer");
    let (store_ro, store_rw) = read_only("/var/lib/omni-deploy/hosts");
    let (fill_store, free_store, put_store_back) = full("/var/lib/omni-deploy/hosts");
    for (what, harm, mend, after, code, names, remedy, page) in [
        (
            "state full",
            &fill,
            &free,
            put_back.as_str(),
            1,
            "/var/lib/deployer/manifest.json",
            "free some space",
            "one",
        ),
        (
            "state read-only",
            &state_ro,
            &state_rw,
            ":",
            1,
            "/var/lib/deployer/manifest.json",
            "writable",
            "one",
        ),
        (
            "units read-only",
            &units_ro,
            &units_rw,
            ":",
            3,
            "/etc/systemd/system/web.service",
            "writable",
            "one",
        ),
        (
            "roots read-only",
            &roots_ro,
            &roots_rw,
            ":",
            3,
            "/nix/var/nix/gcroots/omni-deploy/web",
            "writable",
            "one",
        ),
        ("store read-only", &store_ro, &store_rw, ":", 0, "hosts/solo.json", "writable", "two"),
        (
            "store full",
            &fill_store,
            &free_store,
            put_store_back.as_str(),
            0,
            "hosts/solo.json",
            "free some space",
            "two",
        ),
    ] {
        upgrading(&host);
        let before = (host.invocation("web"), host.invocation("other"));
        let harmed = host.sh(&format!(
            "{QUICK}; {harm}
             {{ deployer run && echo 'exit code 0' || echo \"exit code $?\"; }} 2>&1; between"
        ));
        assert!(harmed.contains(&format!("exit code {code}")), "{what}: {harmed}");
        let named = harmed.lines().any(|l| l.contains(names) && l.contains(remedy));
        assert!(named, "{what}: {harmed}");
        assert!(
            harmed.ends_with(&format!("web serves {page}")) && !harmed.contains("TORN"),
            "{what}: {harmed}"
        );
        assert_eq!(host.invocation("other"), before.1, "{what}");
        if page == "one" {
            assert_eq!(host.invocation("web"), before.0, "{what}: {harmed}");
        }
        let mended = host.sh(&format!("{QUICK}; {mend}; deployer run 2>&1; between; facts; {after}"));
        assert!(mended.contains("web serves two") && mended.ends_with("nothing to do"), "{what}: {mended}");
        assert!(!mended.contains("left over"), "{what}: {mended}");
        println!(
            "{what}: exit code {code}: {}",
            harmed.lines().find(|l| l.contains(names)).unwrap_or_default()
        );
    }

    // What crashed is started again also where nothing can be taken down. That it is another process now is part of
    // the state, which cannot be written.
    upgrading(&host);
    let said = host.sh(&format!(
        "{QUICK}; deployer run; {fill}; systemctl stop web
         {{ deployer run && echo 'exit code 0' || echo \"exit code $?\"; }} 2>&1; between; {free}; {put_back}"
    ));
    assert!(said.contains("web: starting") && said.contains("exit code 1"), "{said}");
    assert!(said.contains("web serves two"), "{said}");
}
