//! What counts is what systemd has loaded and what a process really runs, not what a unit's file says: drop-ins of
//! every kind are named and left alone, what runs because of them is kept, and what they leave behind goes.

use crate::solo::{Solo, solo, web};
use omni_deploy::runner::ProcessStatus;
use serde_json::Value;

const OVERRIDE: &str = "/etc/systemd/system/web.service.d/override.conf";

/// The service `web` as the tests of this module leave it: without anything that changes it.
struct Bare(Solo);

impl std::ops::Deref for Bare {
    type Target = Solo;

    fn deref(&self) -> &Solo {
        &self.0
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.0.sh("rm -rf /etc/systemd/system/web.service.d /etc/systemd/system/we-.service.d \
             /etc/systemd/system/w-.service.d /etc/systemd/system/service.d /etc/systemd/system.control \
             /run/systemd/system.control; systemctl unset-environment OMNI_TEST; systemctl daemon-reload");
    }
}

fn bare() -> Bare {
    Bare(solo())
}

impl Bare {
    /// What somebody writes with `systemctl edit web`.
    fn edits(&self, text: &str) {
        self.sh(&format!(
            "mkdir -p $(dirname {OVERRIDE}); printf '[Service]\\n{text}\\n' >{OVERRIDE}; systemctl daemon-reload"
        ));
    }

    /// The program that systemd would start.
    fn loaded(&self) -> String {
        self.sh("systemctl show --property=ExecStart --value web | sed 's/^{ path=//; s/ ; argv.*//'")
    }

    /// The program that runs.
    fn executable(&self) -> String {
        self.sh("readlink /proc/$(systemctl show --property=MainPID --value web)/exe")
    }

    /// Whether the garbage collector would take a path away.
    fn is_garbage(&self, path: &str) -> bool {
        self.sh("nix-store --gc --print-dead 2>/dev/null").lines().any(|line| line == path)
    }

    /// Status, pass and plan all name this file, and the first two exit with 3.
    #[track_caller]
    fn is_said(&self, file: &str) -> Value {
        let pass = self.passes_with(3);
        assert!(pass.said.contains(file) && pass.said.contains("needs attention"), "{}", pass.said);
        let status = self.try_sh("omni-deploy status");
        assert_eq!(status.status, ProcessStatus::Exit(3), "{}", status.text());
        let text = status.text();
        // Read on the host itself, it is typed there.
        assert!(text.contains(file) && text.contains("'sudo systemctl ") && !text.contains("ssh"), "{text}");
        let plan = self.sh("deployer plan");
        assert!(plan.contains(file), "{plan}");
        let service = self.service("web");
        assert!(service["dropIns"].to_string().contains(file), "{service}");
        service
    }
}

#[test]
fn a_drop_in_that_starts_another_program_is_named_and_what_runs_is_kept() {
    let host = bare();
    let one = host.deploys_web();
    let (old, two) = (host.closure("web", "old", ""), host.closure("web", "two", ""));
    host.edits(&format!("ExecStart=\\nExecStart={old}/bin/web"));
    // Nobody restarted it yet: it is well, and would not be after the next start.
    let invocation = host.invocation("web");
    let service = host.is_said(OVERRIDE);
    assert_eq!((&service["status"], &service["storePath"]), (&"running".into(), &one.as_str().into()));
    host.sh("systemctl restart web");
    let invocation_of_theirs = host.invocation("web");
    assert_ne!(invocation_of_theirs, invocation);
    host.update("web", &two);
    let service = host.is_said(OVERRIDE);
    assert_eq!((&service["status"], &service["storePath"]), (&"failed".into(), &old.as_str().into()));
    let reason = service["failure"]["reason"].as_str().unwrap();
    assert!(reason.contains(&format!("starts {old}/bin/web")), "{reason}");
    assert_eq!(service["failure"]["inputs"], Value::Null, "not held against the release");
    assert_eq!(host.executable(), format!("{old}/bin/web"));
    assert!(host.sh("cat /var/lib/deployer/applied/web.json").contains(&one), "what was proved stays so");
    assert!(!host.is_garbage(&old) && !host.is_garbage(&one));
    // It is left as it is, and passes do nothing.
    let plan = host.sh("deployer plan");
    assert!(plan.contains("nothing to do"), "{plan}");
    host.is_said(OVERRIDE);
    assert_eq!(host.invocation("web"), invocation_of_theirs);
    host.sh(&format!("test -e {OVERRIDE}"));
    // What was said to be typed.
    host.sh("systemctl revert web && systemctl start deployer");
    assert_eq!((host.executable(), host.loaded()), (format!("{two}/bin/web"), format!("{two}/bin/web")));
    host.serves("web", "two");
    let after = host.invocation("web");
    host.good_pass();
    assert_eq!(host.invocation("web"), after, "restarted once");
    assert_eq!(host.service("web")["dropIns"], Value::Array(Vec::new()));
    assert_eq!(host.try_sh("omni-deploy status").status, ProcessStatus::Exit(0));
    assert!(host.is_garbage(&old), "nothing needs it any more");
}

#[test]
fn a_drop_in_that_was_there_first_is_named_and_nothing_is_started() {
    let host = bare();
    let (one, old) = (host.closure("web", "one", ""), host.closure("web", "old", ""));
    host.edits(&format!("ExecStart=\\nExecStart={old}/bin/web"));
    host.add(&web("web", 8001, &one));
    let pass = host.passes_with(4);
    assert!(pass.said.contains(OVERRIDE), "{}", pass.said);
    assert_eq!(host.sh("systemctl is-active web || true"), "inactive");
    host.sh("test ! -e /var/lib/deployer/applied/web.json");
    assert_ne!(host.try_sh("omni-deploy status").status, ProcessStatus::Exit(0));
    let again = host.passes_with(4);
    assert!(!again.said.contains("starting"), "{}", again.said);
    host.sh(&format!("rm {OVERRIDE}"));
    host.good_pass();
    host.serves("web", "one");
}

#[test]
fn a_change_beside_the_program_is_named_and_when_it_is_gone_the_process_is_started_anew_once() {
    let host = bare();
    let one = host.deploys_web();
    let environment = |name: &str| {
        host.sh(&format!(
            "tr '\\0' '\\n' </proc/$(systemctl show --property=MainPID --value web)/environ | grep -c '^{name}=' || true"
        ))
    };
    for (file, make) in [
        (OVERRIDE, None),
        ("/etc/systemd/system/service.d/all.conf", None),
        ("/run/systemd/system/web.service.d/run.conf", None),
        (
            "/etc/systemd/system.control/web.service.d/50-CPUQuota.conf",
            Some("systemctl set-property web CPUQuota=50%"),
        ),
        (
            "/run/systemd/system.control/web.service.d/50-CPUQuota.conf",
            Some("systemctl set-property --runtime web CPUQuota=50%"),
        ),
    ] {
        host.good_pass();
        match make {
            Some(command) => drop(host.sh(command)),
            None => drop(host.sh(&format!(
                "mkdir -p $(dirname {file}); printf '[Service]\\nEnvironment=OMNI_TEST=x\\n' >{file}; systemctl daemon-reload"
            ))),
        }
        let before = host.invocation("web");
        let service = host.is_said(file);
        assert_eq!(
            (&service["status"], &service["storePath"]),
            (&"running".into(), &one.as_str().into()),
            "{file}"
        );
        assert_eq!(host.invocation("web"), before, "{file}: nothing is restarted for it");
        host.sh("systemctl restart web");
        assert_eq!(environment("OMNI_TEST"), if make.is_some() { "0" } else { "1" }, "{file}");
        host.is_said(file);
        // Gone, without systemd being told.
        let theirs = host.invocation("web");
        host.sh(&format!("rm {file}; rmdir $(dirname {file})"));
        let said = host.good_pass();
        assert!(said.contains("a drop-in that is gone"), "{file}: {said}");
        assert_eq!(environment("OMNI_TEST"), "0", "{file}");
        let after = host.invocation("web");
        assert_ne!(after, theirs, "{file}");
        assert_eq!(host.sh("systemctl show --property=DropInPaths --value web"), "", "{file}");
        host.good_pass();
        assert_eq!(host.invocation("web"), after, "{file}: restarted once");
    }
    // One that the process was never started with leaves nothing behind.
    let before = host.invocation("web");
    host.edits("Environment=OMNI_TEST=x");
    host.is_said(OVERRIDE);
    host.sh("systemctl revert web");
    host.good_pass();
    assert_eq!(host.invocation("web"), before);
}

#[test]
fn a_program_that_was_started_by_a_drop_in_between_two_passes_does_not_run_on() {
    let host = bare();
    let one = host.deploys_web();
    let old = host.closure("web", "old", "");
    host.edits(&format!("ExecStart=\\nExecStart={old}/bin/web"));
    host.sh("systemctl restart web; systemctl revert web");
    assert_eq!(host.executable(), format!("{old}/bin/web"));
    let said = host.good_pass();
    assert!(said.contains("its process ran another version"), "{said}");
    assert_eq!(host.executable(), format!("{one}/bin/web"));
    let after = host.invocation("web");
    host.good_pass();
    assert_eq!(host.invocation("web"), after);
}

#[test]
fn a_program_that_becomes_another_one_of_its_own_closure_is_left_alone() {
    let host = bare();
    let real = host.closure("web", "real", "");
    let path = host.sh(&format!(
        "dir=$(mktemp -d)/web-wrapped; mkdir -p $dir/bin
         printf '#!/bin/sh\\nexec {real}/bin/web\\n' >$dir/bin/web; chmod +x $dir/bin/web
         mkdir /root/wrapped
         cat >/root/wrapped/default.nix <<'EOF'
derivation {{ name = \"web-wrapped\"; system = builtins.currentSystem; builder = \"/bin/sh\";
  args = [ \"-c\" \"/bin/mkdir -p $out/bin; /bin/cp ${{./web}} $out/bin/web; /bin/chmod +x $out/bin/web\" ]; real = builtins.storePath \"{real}\"; }}
EOF
         cp $dir/bin/web /root/wrapped/web
         nix-build --no-out-link --option sandbox false --option build-users-group '' --option substituters '' /root/wrapped
         rm -r /root/wrapped"
    ));
    assert!(host.sh(&format!("nix-store -qR {path}")).contains(&real));
    host.add(&web("web", 8001, &path));
    host.good_pass();
    assert_eq!(host.executable(), format!("{real}/bin/web"));
    host.sh("systemctl restart web");
    let theirs = host.invocation("web");
    host.good_pass();
    assert_eq!(host.invocation("web"), theirs);
}

#[test]
fn a_unit_that_something_else_made_is_never_touched() {
    let host = bare();
    host.deploys_web();
    host.sh("rm -f /etc/systemd/system-generators/systemd-sysv-generator
        printf '#!/bin/sh\\n### BEGIN INIT INFO\\n# Provides: legacy\\n### END INIT INFO\\ncase $1 in start) sleep 99999 & ;; esac\\n' >/etc/init.d/legacy
        chmod +x /etc/init.d/legacy
        mkdir -p /etc/systemd/system.control /etc/systemd/system-generators
        printf '[Service]\\nExecStart=/bin/sleep 99999\\n' >/etc/systemd/system.control/controlled.service
        printf '#!/bin/sh\\nprintf \"[Unit]\\\\nSourcePath=/etc/containers/systemd/quad.container\\\\n[Service]\\\\nExecStart=/bin/sleep 99999\\\\n\" >$1/quad.service\\n' >/etc/systemd/system-generators/quadlet
        chmod +x /etc/systemd/system-generators/quadlet
        ln -sf /lib/systemd/system/ssh.service /etc/systemd/system/alias.service
        systemctl daemon-reload; systemctl start legacy quad controlled
        systemd-run --quiet --unit=transient sleep 99999");
    let names = ["legacy", "quad", "controlled", "alias", "transient"];
    let seen = || {
        host.sh(&format!(
            "for unit in {}; do systemctl show --property=Id,MainPID,InvocationID,ActiveState,FragmentPath $unit; done
             ls /etc/systemd/system /etc/systemd/system/multi-user.target.wants",
            names.join(" ")
        ))
    };
    let before = seen();
    let path = host.closure("page", "one", "");
    for (port, name) in (8101..).zip(names) {
        host.add(&web(name, port, &path));
    }
    host.passes_with(4);
    assert_eq!(seen(), before);
    for (name, whose) in [
        ("legacy", "/etc/init.d/legacy"),
        ("quad", "/etc/containers/systemd/quad.container"),
        ("controlled", "/etc/systemd/system.control/controlled.service"),
        ("alias", "ssh.service"),
        ("transient", "/run/systemd/transient/transient.service"),
    ] {
        let reason = host.reason(name);
        assert!(reason.contains(&format!("{whose} exists and is not ours")), "{reason}");
    }
    for name in names {
        host.sh(&format!("deploy-manifest remove-service {name}"));
    }
    host.good_pass();
    assert_eq!(seen(), before);
    host.sh("systemctl stop legacy quad controlled transient; systemctl disable legacy 2>/dev/null || true
        rm /etc/init.d/legacy /etc/systemd/system/alias.service /etc/systemd/system-generators/quadlet
        rm -r /etc/systemd/system.control
        ln -s /dev/null /etc/systemd/system-generators/systemd-sysv-generator; systemctl daemon-reload");
}

#[test]
fn what_is_left_of_an_attempt_that_was_never_proved_is_ours() {
    let host = bare();
    let one = host.deploys_web();
    // As a pass leaves it that died while its first version came up, and a person who then deleted the unit.
    host.sh("rm /var/lib/deployer/applied/web.json /etc/systemd/system/web.service");
    assert_eq!(host.sh("systemctl show --property=ActiveState --value web"), "active");
    host.good_pass();
    assert_eq!(host.executable(), format!("{one}/bin/web"));
    host.sh("rm /var/lib/deployer/applied/web.json /etc/systemd/system/web.service; systemctl daemon-reload");
    host.good_pass();
    host.serves("web", "one");
}

#[test]
fn a_candidates_name_that_is_somebody_elses_is_never_taken() {
    let host = bare();
    let one = host.closure("web", "one", "");
    let mut service = web("web", 8001, &one);
    service["rollout"] = "overlap".into();
    host.add(&service);
    host.good_pass();
    host.sh("printf '[Service]\\nExecStart=/bin/sleep 99999\\n' >/etc/systemd/system/web-next.service
        systemctl daemon-reload; systemctl start web-next");
    let theirs = || {
        host.sh("systemctl show --property=MainPID,InvocationID web-next; sha256sum /etc/systemd/system/web-next.service")
    };
    let before = theirs();
    let two = host.closure("web", "two", "");
    host.update("web", &two);
    let plan = host.sh("deployer plan");
    assert!(plan.contains("web-next.service") && plan.contains("not ours"), "{plan}");
    let said = host.good_pass();
    assert!(said.contains("web-next.service"), "{said}");
    assert_eq!(theirs(), before);
    host.serves("web", "two");
    host.sh("systemctl stop web-next; rm /etc/systemd/system/web-next.service; systemctl daemon-reload");
    let three = host.closure("web", "three", "");
    host.update("web", &three);
    let said = host.good_pass();
    assert!(said.contains("beside the running version"), "{said}");
    host.serves("web", "three");
}

#[test]
fn a_variable_that_the_manager_gives_every_service_is_named() {
    let host = bare();
    host.deploys_web();
    let doctor = || host.try_sh("omni-deploy doctor").text();
    assert!(!doctor().contains("OMNI_TEST"));
    host.sh("systemctl set-environment OMNI_TEST=hunter2");
    let said = doctor();
    assert!(said.contains("OMNI_TEST") && said.contains("systemctl unset-environment OMNI_TEST"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
    // Nobody was started with it yet, and an idle pass does not ask.
    host.good_pass();
    host.sh("systemctl restart web");
    let runs = "tr '\\0' '\\n' </proc/$(systemctl show --property=MainPID --value web)/environ";
    assert!(host.sh(runs).contains("OMNI_TEST=hunter2"));
    let pass = host.pass();
    assert_eq!(pass.code, 3, "{}", pass.said);
    assert!(pass.said.contains("OMNI_TEST") && !pass.said.contains("hunter2"), "{}", pass.said);
    let status = host.try_sh("omni-deploy status");
    assert_eq!(status.status, ProcessStatus::Exit(3), "{}", status.text());
    assert!(status.text().contains("systemctl unset-environment OMNI_TEST"), "{}", status.text());
    assert_eq!(host.state()["managerEnvironment"], serde_json::json!(["OMNI_TEST"]));
    // The system's own configuration may name it: then it is meant.
    let configured = "/etc/systemd/system.conf.d/test.conf";
    host.sh(&format!(
        "mkdir -p $(dirname {configured}); printf '[Manager]\nManagerEnvironment=OMNI_TEST=\"x y\"\n' >{configured}"
    ));
    host.good_pass();
    assert_eq!(host.state()["managerEnvironment"], serde_json::Value::Null);
    host.sh(&format!("rm {configured}"));
    // What a pass starts is started with it as well.
    let two = host.closure("web", "two", "");
    host.update("web", &two);
    let pass = host.pass();
    assert_eq!(pass.code, 3, "{}", pass.said);
    assert!(pass.said.contains("OMNI_TEST") && !pass.said.contains("hunter2"), "{}", pass.said);
    host.sh("systemctl unset-environment OMNI_TEST");
    host.good_pass();
    assert_eq!(host.try_sh("omni-deploy status").status, ProcessStatus::Exit(0));
}
