//! A port is believed to be a service's only while the service's own processes listen there. Whoever else does is
//! the host's trouble: it is named, nothing is rejected, and nobody is led to it.

use crate::lab::soon;
use crate::solo::{Solo, solo, web};
use omni_deploy::runner::ProcessStatus;
use serde_json::{Value, json};
use std::time::Duration;

/// A web server of few words. It has its page from `PAGE`, shares its port if there is `SHARE`, and stays without
/// one if there is `STAY`.
pub const SERVER: &str = r#"#!/usr/bin/perl
use IO::Socket::INET;
$| = 1; $SIG{PIPE} = 'IGNORE';
my ($port, $page) = ($ENV{PORT}, "$ENV{PAGE}\n");
my $socket = $ENV{LISTEN_FDS} ? IO::Socket::INET->new_from_fd(3, 'r+') : IO::Socket::INET->new(
    LocalAddr => '127.0.0.1', LocalPort => $port, Listen => 64, ReuseAddr => 1, $ENV{SHARE} ? (ReusePort => 1) : ());
if (!$socket) { warn "port $port: $!\n"; sleep 86400 if $ENV{STAY}; exit 1 }
while (my $client = $socket->accept) {
    while (<$client>) { last if /^\r?\n$/ }
    print $client "HTTP/1.1 200 OK\r\nContent-Length: " . length($page) . "\r\nConnection: close\r\n\r\n$page";
    close $client;
}
"#;

/// Puts a program of one text into the host's store, as `bin/web`.
pub fn program(host: &Solo, text: &str) -> String {
    let text = text.replace('\'', r"'\''");
    host.sh(&format!(
        "dir=$(mktemp -d)/web-{}; mkdir -p $dir/bin; printf %s '{text}' >$dir/bin/web; chmod 755 $dir/bin/web
         nix-store --add $dir; rm -r $dir",
        text.len()
    ))
}

/// The service `web` with that server.
fn server(host: &Solo, env: Value) -> Value {
    let mut service = web("web", 8001, &program(host, SERVER));
    service["env"] = env;
    service
}

/// Starts a process of somebody else's that answers everything with `stranger`; it goes with the returned value.
struct Stranger<'a>(&'a Solo);

impl<'a> Stranger<'a> {
    fn on(host: &'a Solo, port: u16, env: &str) -> Self {
        let program = program(host, SERVER);
        host.sh(&format!(
            "systemd-run --quiet --unit stranger -E PAGE=stranger -E PORT={port} {env} {program}/bin/web
             until curl -sf 127.0.0.1:{port} >/dev/null; do sleep 0.05; done"
        ));
        Stranger(host)
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        self.0.try_sh("systemctl stop stranger; systemctl reset-failed stranger");
    }
}

/// A service that is not as the manifest says because of the stranger: named, and nothing remembered as rejected.
#[track_caller]
fn blames_the_stranger(host: &Solo, code: i32) -> Value {
    let pass = host.passes_with(code);
    let service = host.service("web");
    assert_eq!((&service["status"], &service["failure"]["inputs"]), (&json!("failed"), &Value::Null));
    let pid = host.sh("systemctl show --property=MainPID --value stranger");
    let reason = host.reason("web");
    for part in ["port 80", "\"web\"", "stranger.service", pid.as_str(), "http.internalPort"] {
        assert!(reason.contains(part), "no {part}: {reason}\n{}", pass.said);
    }
    let status = host.try_sh("omni-deploy status web");
    assert!(status.text().contains("stranger.service"), "{}", status.text());
    assert_ne!(status.status, ProcessStatus::Exit(0));
    service
}

#[test]
fn a_port_that_a_stranger_holds_is_the_hosts_trouble_and_no_visitor_gets_the_stranger() {
    let host = solo();
    let stranger = Stranger::on(&host, 8001, "");
    host.add(&web("web", 8001, &host.closure("web", "one", "")));
    for _ in 0..2 {
        let service = blames_the_stranger(&host, 4);
        assert_eq!(service["storePath"], Value::Null);
        let page = host.page("web.example.com");
        assert!(page.as_ref().is_err_and(|why| why.contains("503")), "{page:?}");
        let plan = host.sh("deployer plan");
        assert!(plan.contains("stranger.service") && plan.ends_with("nothing to do"), "{plan}");
    }
    drop(stranger);
    host.good_pass();
    host.serves("web", "one");
}

#[test]
fn a_stranger_that_listens_for_ipv6_alone_is_in_nobodys_way() {
    let host = solo();
    host.sh("systemd-run --quiet --unit stranger --socket-property=ListenStream=[::]:8001 \
           --socket-property=BindIPv6Only=ipv6-only sleep 86400
         ss -ltn | grep -F '[::]:8001'");
    host.add(&web("web", 8001, &host.closure("web", "one", "")));
    host.good_pass();
    host.serves("web", "one");
    host.try_sh("systemctl stop stranger.socket");
}

#[test]
fn a_release_that_ends_because_a_stranger_takes_its_port_is_not_rejected() {
    let host = solo();
    let one = host.deploys_web();
    let server = program(&host, SERVER);
    // The stranger comes between the pass's look at the port and the program's.
    let two = program(
        &host,
        &format!(
            "#!/bin/sh\nsystemd-run --quiet --unit stranger -E PAGE=stranger -E PORT=8001 {server}/bin/web\n\
             until curl -sf 127.0.0.1:8001 >/dev/null; do sleep 0.05; done; echo taken >&2; exit 1\n"
        ),
    );
    host.update("web", &two);
    let stranger = Stranger(&host);
    let service = blames_the_stranger(&host, 4);
    assert_eq!(service["failure"]["attempted"], two);
    host.update("web", &one);
    blames_the_stranger(&host, 4);
    drop(stranger);
    host.good_pass();
    host.serves("web", "one");
}

#[test]
fn a_release_for_a_port_that_is_held_leaves_the_running_one_and_its_route() {
    let host = solo();
    let one = host.deploys_web();
    let invocation = host.invocation("web");
    let stranger = Stranger::on(&host, 8002, "");
    host.sh("deploy-manifest set web http.internalPort=8002 env.PORT=8002");
    let service = blames_the_stranger(&host, 3);
    assert_eq!(service["storePath"], one);
    host.serves("web", "one");
    assert_eq!(host.invocation("web"), invocation);
    drop(stranger);
    host.good_pass();
    host.serves("web", "one");
    host.sh("curl -sf 127.0.0.1:8002");
}

#[test]
fn a_port_that_is_shared_with_a_stranger_is_said_and_nothing_is_restarted() {
    let host = solo();
    host.add(&server(&host, json!({"PORT": "8001", "PAGE": "ours", "SHARE": "1"})));
    host.good_pass();
    let invocation = host.invocation("web");
    let stranger = Stranger::on(&host, 8001, "-E SHARE=1");
    blames_the_stranger(&host, 3);
    drop(stranger);
    host.good_pass();
    host.serves("web", "ours");
    assert_eq!(host.invocation("web"), invocation);
}

#[test]
fn a_service_that_runs_on_without_its_port_is_not_running_and_gets_it_once_it_is_free() {
    let host = solo();
    host.add(&server(&host, json!({"PORT": "8001", "PAGE": "ours", "STAY": "1"})));
    host.good_pass();
    host.sh("systemctl stop web");
    let stranger = Stranger::on(&host, 8001, "");
    host.sh("systemctl start web");
    blames_the_stranger(&host, 3);
    blames_the_stranger(&host, 3);
    drop(stranger);
    host.good_pass();
    host.serves("web", "ours");
    let plan = host.sh("deployer plan");
    assert!(plan.ends_with("nothing to do"), "{plan}");
}

#[test]
fn a_candidate_whose_port_a_stranger_takes_is_tried_again_and_the_running_one_serves() {
    let host = solo();
    let one = host.closure("web", "one", "");
    let mut service = web("web", 8001, &one);
    service["rollout"] = "overlap".into();
    host.add(&service);
    host.good_pass();
    let two = host.closure("web", "two", "");
    host.update("web", &two);
    let server = program(&host, SERVER);
    // As soon as the candidate's unit tells its port, and long before it is started.
    let next = "/etc/systemd/system/web-next.service";
    host.sh(&format!(
        "systemd-run --quiet --unit stranger -p Nice=-19 -E PAGE=stranger perl -MIO::Socket::INET -e '
             my $port; until ($port) {{
                 if (open my $f, \"<\", \"{next}\") {{ local $/; $port = $1 if <$f> =~ /on port (\\d+)/ }}
             }}
             $ENV{{PORT}} = $port; do \"{server}/bin/web\"'"
    ));
    let stranger = Stranger(&host);
    let pass = host.passes_with(3);
    let service = host.service("web");
    assert_eq!((&service["status"], &service["storePath"]), (&json!("failed"), &json!(one)), "{}", pass.said);
    assert!(host.reason("web").contains("stranger.service"), "{service}");
    host.serves("web", "one");
    host.sh(&format!("[[ ! -e {next} ]]"));
    drop(stranger);
    host.good_pass();
    host.serves("web", "two");
}

#[test]
fn a_listener_that_systemd_holds_for_the_service_or_that_is_in_a_cgroup_below_its_own_is_its_own() {
    let host = solo();
    host.sh("printf '[Socket]\\nListenStream=127.0.0.1:8001\\n' >/etc/systemd/system/web.socket
             systemctl daemon-reload");
    host.add(&server(&host, json!({"PORT": "8001", "PAGE": "activated"})));
    host.sh("deployer run; systemctl stop web; systemctl start web.socket; systemctl start web");
    host.good_pass();
    host.serves("web", "activated");
    let plan = host.sh("deployer plan");
    assert!(plan.ends_with("nothing to do"), "{plan}");
    // While nothing runs there, systemd holds the socket alone.
    host.sh("systemctl stop web");
    host.good_pass();
    host.serves("web", "activated");
    host.sh("systemctl stop web.socket web; rm /etc/systemd/system/web.socket; systemctl daemon-reload");
    let below = SERVER.replace(
        "my ($port",
        "for my $cgroup (glob '/sys/fs/cgroup/{,unified/,systemd/}system.slice/web.service') {
             mkdir \"$cgroup/below\"; open my $f, '>', \"$cgroup/below/cgroup.procs\"; print $f $$; close $f }
         my ($port",
    );
    host.update("web", &program(&host, &below));
    host.sh("deploy-manifest set web env.PAGE=below");
    host.good_pass();
    host.serves("web", "below");
    host.sh("grep -q below /proc/$(systemctl show --property=MainPID --value web)/cgroup");
    assert!(host.sh("deployer plan").ends_with("nothing to do"));
}

#[test]
fn an_entry_that_changes_the_port_or_the_health_check_alone_is_proved_before_the_route_moves() {
    let host = solo();
    let one = host.deploys_web();
    // That it once crashed, and was restarted, says nothing of what is changed now.
    host.sh("systemctl kill --signal=KILL web
         until [[ $(systemctl show --property=NRestarts --value web) == 1 ]]; do sleep 0.05; done
         until curl -sf 127.0.0.1:8001 >/dev/null; do sleep 0.05; done");
    let invocation = host.invocation("web");
    for (change, says) in [
        ("http.internalPort=8009", "127.0.0.1:8009"),
        ("http.internalPort=8009 health.path=/x", "127.0.0.1:8009"),
    ] {
        host.sh(&format!("deploy-manifest set web health.timeoutSec=2 {change}"));
        let pass = host.passes_with(3);
        let service = host.service("web");
        assert_eq!((&service["status"], &service["storePath"]), (&json!("rejected"), &json!(one)));
        let reason = host.reason("web");
        assert!(reason.contains(says) && reason.contains("deploy-manifest set web"), "{reason}");
        assert!(pass.said.contains(&reason), "{}", pass.said);
        host.serves("web", "one");
        let again = host.passes_with(3);
        assert!(!again.said.contains("watching"), "{}", again.said);
        host.serves("web", "one");
    }
    // What holds is taken, and without a restart.
    host.sh("deploy-manifest set web http.internalPort=8001 health.path=/fine");
    host.good_pass();
    host.serves("web", "one");
    let applied = host.sh("cat /var/lib/deployer/applied/web.json");
    assert!(applied.contains("/fine"), "{applied}");
    assert_eq!(host.invocation("web"), invocation);
}

#[test]
fn a_release_that_a_stranger_keeps_from_all_addresses_is_not_rejected_and_tried_when_the_stranger_is_gone() {
    let host = solo();
    let at = |address: &str| SERVER.replace("'127.0.0.1'", &format!("'{address}'"));
    let (everywhere, elsewhere) = (program(&host, &at("0.0.0.0")), program(&host, &at("127.0.0.22")));
    let comes = || {
        host.sh(&format!(
            "systemd-run --quiet --unit stranger -E PAGE=stranger -E PORT=8001 {elsewhere}/bin/web
             until curl -sf 127.0.0.22:8001 >/dev/null; do sleep 0.05; done"
        ));
        Stranger(&host)
    };
    let blamed = |code: i32| {
        let pass = host.passes_with(code);
        let pid = host.sh("systemctl show --property=MainPID --value stranger");
        let reason = host.reason("web");
        for part in ["port 8001", "stranger.service", pid.as_str()] {
            assert!(reason.contains(part), "no {part}: {reason}\n{}", pass.said);
        }
        assert_eq!(host.service("web")["status"], "failed");
    };
    let stranger = comes();
    let mut service = server(&host, json!({"PORT": "8001", "PAGE": "everywhere"}));
    service["artifact"]["storePath"] = everywhere.clone().into();
    host.add(&service);
    blamed(4);
    blamed(4);
    drop(stranger);
    host.good_pass();
    host.serves("web", "everywhere");
    // What ran before runs on, and is not ended by a try of every pass.
    host.update("web", &program(&host, SERVER));
    host.good_pass();
    let stranger = comes();
    host.update("web", &everywhere);
    blamed(3);
    host.serves("web", "everywhere");
    let invocation = host.invocation("web");
    blamed(3);
    assert_eq!(host.invocation("web"), invocation);
    drop(stranger);
    host.good_pass();
    assert_ne!(host.invocation("web"), invocation);
    assert_eq!(host.service("web")["storePath"], everywhere);
}

#[test]
fn a_service_that_stops_listening_is_not_left_as_running() {
    let host = solo();
    // It closes its socket when it is told to, and lives on.
    let quitter = SERVER
        .replace("while (my $client", "$SIG{USR1} = sub { close $socket; sleep 86400 };\nwhile (my $client");
    let mut service = server(&host, json!({"PORT": "8001", "PAGE": "ours"}));
    service["artifact"]["storePath"] = program(&host, &quitter).into();
    host.add(&service);
    host.good_pass();
    host.sh("systemctl kill --signal=USR1 web");
    soon("it stopped listening", Duration::from_secs(10), || {
        match host.try_sh("curl -sf 127.0.0.1:8001").status {
            ProcessStatus::Exit(7) => Ok(()),
            other => Err(format!("{other}")),
        }
    });
    host.passes_with(3);
    assert_eq!(host.service("web")["status"], "failed");
    host.good_pass();
    host.serves("web", "ours");
}

#[test]
fn a_health_check_asks_by_a_name_that_exists() {
    let host = solo();
    // As frameworks do that look at the name they are asked by: any other than one below the domain is refused.
    let strict = SERVER.replace(
        "while (<$client>) { last",
        "my $by = ''; while (<$client>) { $by = $1 if /^Host: (.*?)\\r?\\n/i; last",
    );
    let strict = strict.replace("    print $client", "    $page = \"$by\\n\"; $by =~ /^[a-z]+\\.example\\.com$/ or do { print $client \"HTTP/1.1 400 Bad Request\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n\"; close $client; next };\n    print $client");
    let mut service = web("web", 8001, &program(&host, &strict));
    service["http"]["domain"] = "*.example.com".into();
    host.add(&service);
    host.good_pass();
    assert_eq!(host.page("shop.example.com").as_deref(), Ok("shop.example.com"));
    let invocation = host.invocation("web");
    host.sh("deploy-manifest set web health.host=shop.example.org");
    host.passes_with(3);
    assert!(host.reason("web").contains("answers 400"), "{}", host.reason("web"));
    host.sh("deploy-manifest set web health.host=Health.example.com");
    host.good_pass();
    assert_eq!(host.invocation("web"), invocation);
    assert!(host.sh("cat /var/lib/deployer/applied/web.json").contains("\"health.example.com\""));
}
