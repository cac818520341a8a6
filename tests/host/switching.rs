//! How requests move from one instance of a service to the next: by a file that Caddy reads the port from, where it can
//! (2.8 and later), else by a change of its configuration.

use crate::load::{OVERLAP, echo, put_generator, release};
use crate::solo::{Solo, solo};
use std::time::Duration;

const IN_FORCE: &str = "/run/omni-deploy/ports/echo";
const AT_BOOT: &str = "/var/lib/deployer/ports/echo";

/// Whether the host's Caddy reads the value of a placeholder from a file, by its version.
pub fn reads_files(host: &Solo) -> bool {
    let version = host.sh("caddy version");
    let parts: Vec<u32> = version
        .trim_start_matches('v')
        .split(|c: char| !c.is_ascii_digit())
        .take(2)
        .map(|part| part.parse().unwrap_or_else(|e| panic!("{e}: {version}")))
        .collect();
    parts >= vec![2, 8]
}

/// The host with the echo service, which is deployed beside itself.
fn host() -> Solo {
    let host = solo();
    put_generator(&host);
    host.add(&echo("echo", 8001, OVERLAP, &release(&host, "first", "")));
    host.good_pass();
    host.serves("echo", "first");
    host
}

/// What Caddy dials for our services.
fn dials(host: &Solo) -> String {
    host.sh(
        "curl -sf localhost:2019/config/apps/http/servers \
         | jq -r '[.. | objects | select(.[\"@id\"] == \"deployer\") | .. | .dial? // empty] | unique | join(\" \")'",
    )
}

#[test]
fn a_deploy_renames_a_file_where_caddy_reads_it_and_changes_its_configuration_elsewhere() {
    let host = host();
    let by_files = reads_files(&host);
    let said = host.sh("omni-deploy doctor --host || true");
    let way = if by_files { "by files" } else { "by its configuration" };
    assert!(said.lines().any(|l| l.contains("caddy switching") && l.contains(way)), "{said}");
    let file = format!("127.0.0.1:{{file.{IN_FORCE}}}");
    assert_eq!(dials(&host), if by_files { file.as_str() } else { "127.0.0.1:8001" });
    if by_files {
        assert_eq!(
            host.sh(&format!("cat {IN_FORCE} {AT_BOOT}; stat -c %a:%U {IN_FORCE}")),
            "80018001644:root"
        );
        // Nobody may write there but root: with it goes what every visitor gets.
        assert_eq!(
            host.sh("stat -c %a:%U /run/omni-deploy/ports /var/lib/deployer/ports"),
            "755:root\n755:root"
        );
    }

    // No pass leaves anything of its trial, and the next makes none.
    assert_eq!(host.sh("curl -sf localhost:2019/config/ | grep -c deployer-trial || true"), "0");
    let tried = host.sh("stat -c %y /var/lib/deployer/caddy.json");
    let said = host.good_pass();
    assert!(!said.contains("port"), "{said}");
    assert_eq!(host.sh("stat -c %y /var/lib/deployer/caddy.json"), tried);
    assert!(host.sh("deployer plan").ends_with("\nnothing to do"));

    // Another port is another file, or another configuration.
    let before = dials(&host);
    host.sh("deploy-manifest set echo http.internalPort=8003 env.PORT=8003");
    host.good_pass();
    host.serves("echo", "first");
    assert_eq!(dials(&host) == before, by_files, "{}", dials(&host));

    // A Caddy that reads none, as one that was put back: what it has then is of no use to it.
    if by_files {
        host.sh("sed -i 's/\"portFiles\":true/\"portFiles\":false/' /var/lib/deployer/caddy.json");
        host.good_pass();
        assert_eq!(dials(&host), "127.0.0.1:8003");
        host.serves("echo", "first");
        host.sh("rm /var/lib/deployer/caddy.json");
        assert!(host.sh("deployer plan").contains("tried first whether this Caddy reads ports from files"));
        host.good_pass();
        assert_eq!(dials(&host), before);
        host.serves("echo", "first");
    }

    // What is gone leaves none.
    host.sh("deploy-manifest remove-service echo; deployer run --allow-empty");
    assert_eq!(host.sh("ls /run/omni-deploy/ports /var/lib/deployer/ports | grep -c echo || true"), "0");
}

#[test]
fn port_files_that_are_gone_or_wrong_are_put_right_by_the_next_pass() {
    let host = host();
    if !reads_files(&host) {
        // They are nothing to this Caddy, and none are made.
        assert_eq!(host.sh("ls -A /run/omni-deploy/ports"), "");
        return;
    }
    for damage in [
        format!("rm {IN_FORCE} {AT_BOOT}"),
        format!("echo 1 >{IN_FORCE}"),
        format!(": >{IN_FORCE}; printf 8002 >{AT_BOOT}"),
        "rm -r /var/lib/deployer/ports".into(),
        format!("chmod 600 {IN_FORCE}"),
        format!("chmod 666 {IN_FORCE}"),
        format!("rm {AT_BOOT}; mkfifo {AT_BOOT}"),
        "printf 7 >/run/omni-deploy/ports/other".into(),
    ] {
        host.sh(&damage);
        host.good_pass();
        host.serves("echo", "first");
        assert_eq!(
            host.sh(&format!("cat {IN_FORCE} {AT_BOOT}; ls /run/omni-deploy/ports")),
            "80018001echo",
            "{damage}"
        );
    }
    // What is no file is not gone by at all, until it is gone; a pass does not wait for a pipe.
    for damage in
        [format!("mkfifo {IN_FORCE}"), format!("mkdir {IN_FORCE}"), "chmod 700 /run/omni-deploy/ports".into()]
    {
        host.sh(&format!(
            "rm {IN_FORCE}; touch {IN_FORCE}; [[ '{damage}' == chmod* ]] || rm {IN_FORCE}; {damage}"
        ));
        host.good_pass();
        host.serves("echo", "first");
        assert_eq!(dials(&host), "127.0.0.1:8001", "{damage}");
        let said = host.sh("omni-deploy doctor --host || true");
        assert!(said.contains("remove it and install"), "{said}");
        host.sh("rm -r /run/omni-deploy/ports; systemd-tmpfiles --create /etc/tmpfiles.d/omni-deploy.conf");
        host.good_pass();
        host.serves("echo", "first");
        assert!(dials(&host).contains(IN_FORCE), "{damage}");
    }
    // While the file is missing, requests wait for it.
    host.sh(&format!("mv {IN_FORCE} /run/echo; (sleep 2; mv /run/echo {IN_FORCE}) >/dev/null 2>&1 &"));
    host.serves("echo", "first");
}

#[test]
fn a_host_whose_power_goes_while_a_candidate_has_the_requests_serves_without_a_pass() {
    let host = host();
    if !reads_files(&host) {
        // What Caddy resumes with leads to the candidate, until a pass has been made.
        assert_eq!(dials(&host), "127.0.0.1:8001");
        return;
    }
    // The time that it takes to start is the time that the candidate has the requests.
    host.update("echo", &release(&host, "second", "slow 5"));
    host.sh("systemctl start --no-block deployer
         until grep -q echo-second /etc/systemd/system/echo.service; do sleep 0.05; done");
    assert_ne!(host.sh(&format!("cat {IN_FORCE}")), "8001");
    assert_eq!(host.sh(&format!("cat {AT_BOOT}")), "8001");
    let never = "/etc/systemd/system/deployer.service.d";
    host.sh(&format!(
        "mkdir -p {never}; printf '[Unit]\\nConditionPathExists=/nowhere\\n' >{never}/never.conf; sync -f {never}"
    ));
    host.power_cut();
    host.start();
    host.page_soon("echo.example.com", "second", Duration::from_secs(40));
    assert_eq!(host.sh(&format!("cat {IN_FORCE}; systemctl is-active echo-next || true")), "8001inactive");
    host.sh(&format!("rm -r {never}; systemctl daemon-reload; systemctl stop deployer.timer"));
    host.good_pass();
    host.serves("echo", "second");
    assert_eq!(host.sh("ls /etc/systemd/system | grep -c -- -next || true"), "0");
}
