//! What is done as soon as it may be: `ship` is told of a release that is live while its candidate still ends a
//! connection, and a service that was never up is led to as soon as it is well. By the order of events, not by the clock.

use crate::lab::{Host, soon};
use crate::runbook::biz;
use crate::solo::{solo, web};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the body of an open request is.
const LENGTH: usize = 10_000;

/// A request through Caddy whose body comes slowly, a byte at a time, until it is told to end.
struct Open {
    stream: TcpStream,
    end: mpsc::Sender<()>,
    dripping: JoinHandle<usize>,
}

impl Open {
    fn to(host: &Host, domain: &str) -> Self {
        let stream = TcpStream::connect((host.ip.as_str(), 80)).unwrap();
        let mut body = stream.try_clone().unwrap();
        write!(
            body,
            "POST /echo HTTP/1.1\r\nHost: {domain}\r\nConnection: close\r\nContent-Length: {LENGTH}\r\n\r\n"
        )
        .unwrap();
        let (end, ended) = mpsc::channel();
        let dripping = std::thread::spawn(move || {
            let mut sent = 0;
            loop {
                body.write_all(b"x").unwrap();
                sent += 1;
                if ended.recv_timeout(Duration::from_millis(500)) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return sent;
                }
            }
        });
        Open { stream, end, dripping }
    }

    /// Sends the rest; returns the answer.
    fn ends(mut self) -> String {
        self.end.send(()).unwrap();
        let sent = self.dripping.join().unwrap();
        self.stream.write_all(&vec![b'x'; LENGTH - sent]).unwrap();
        self.stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut answer = String::new();
        self.stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

/// Who has a connection from Caddy that is open, by the ports of this host.
fn connected(host: &Host) -> String {
    host.sh("ss -Htn state established | awk '{ print $3 }' | grep -oE '[0-9]+$' | sort -u | tr '\\n' ' '")
}

#[test]
fn ship_returns_when_the_release_is_live_and_its_candidate_ends_an_open_request_after_that() {
    let mut biz = biz();
    let crate::runbook::Biz { host, developer, .. } = &mut *biz;
    developer.write("Biz/Early.py", "-- : out early\nVERSION = early 1\n");
    developer.types(
        r#"deploy-manifest add-service '{"name": "early", "hosts": ["biz"], "env": {"PORT": "8051"},
             "artifact": {"storePath": "/nix/store/placeholder"}, "rollout": "overlap", "health": {"path": "/health"},
             "http": {"domain": "early.example.com", "internalPort": 8051, "drainSec": 300}}' && Omni/Ide/ship.sh Biz/Early.py"#,
    );
    assert_eq!(host.page("early.example.com").as_deref(), Ok("early 1"));
    developer.write("Biz/Early.py", "-- : out early\nVERSION = early 2\n");
    // The old version is not ended before this is: until then the candidate has all new requests.
    let first = Open::to(host, "early.example.com");
    soon("the old version has the request", Duration::from_secs(20), || {
        let ports = connected(host);
        if ports.split(' ').any(|port| port == "8051") { Ok(()) } else { Err(ports) }
    });
    let shipped = std::thread::scope(|scope| {
        let ship = scope.spawn(|| developer.tries("Omni/Ide/ship.sh Biz/Early.py"));
        // The candidate answers.
        host.page_soon("early.example.com", "early 2", Duration::from_secs(90));
        let second = Open::to(host, "early.example.com");
        soon("the candidate has the request", Duration::from_secs(20), || {
            let ports = connected(host);
            let spare = |port: &str| (20_000..32_000).contains(&port.parse::<u32>().unwrap_or(0));
            if ports.split(' ').any(spare) { Ok(()) } else { Err(ports) }
        });
        let answer = first.ends();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        (ship.join().unwrap(), second)
    });
    let (ship, second) = shipped;
    assert!(
        ship.status.ok() && ship.text().ends_with("early biz running\n"),
        "{}{}",
        ship.text(),
        ship.stderr
    );
    // It has returned, and the pass is at it: the state stands, and says what is left.
    assert_eq!(
        host.sh("systemctl is-active early early-next; systemctl is-active deployer || true"),
        "active\nactive\nactivating"
    );
    assert_eq!(host.state()["draining"], json!(["early"]));
    assert_eq!(host.service("early")["status"], "running");
    assert_eq!(host.page("early.example.com").as_deref(), Ok("early 2"));
    let answer = second.ends();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&"x".repeat(1000)), "{answer}");
    soon("the pass ends", Duration::from_secs(60), || {
        let deployer = host.sh("systemctl is-active deployer || true");
        if deployer == "inactive" { Ok(()) } else { Err(deployer) }
    });
    assert_eq!(host.sh("ls /etc/systemd/system | grep -c -- -next || true"), "0");
    assert_eq!(host.state()["draining"], json!(null));
    assert_eq!(host.sh("ls /var/lib/deployer/intent.json 2>/dev/null || true"), "");
}

#[test]
fn services_that_were_never_up_are_led_to_when_they_are_well_in_one_change() {
    let host = solo();
    let (one, other) = (host.closure("web", "one", ""), host.closure("other", "one", ""));
    host.add(&web("web", 8001, &one));
    host.add(&web("other", 8002, &other));
    let said = host.good_pass();
    let lines: Vec<&str> = said.lines().collect();
    let at =
        |text: &str| lines.iter().position(|l| l.contains(text)).unwrap_or_else(|| panic!("{text}: {said}"));
    let routes: Vec<usize> = (0..lines.len()).filter(|n| lines[*n].contains("route: ")).collect();
    assert_eq!(routes.len(), 1, "{said}");
    assert!(at("web: starting") < routes[0] && routes[0] < at("web: up after"), "{said}");
    assert!(routes[0] < at("other: up after"), "{said}");
    host.serves("web", "one");
    host.serves("other", "one");

    // Well at first, and not for as long as it must be: rejected, and its route answers as of what does not run.
    host.add(&web("brief", 8003, &host.closure("brief", "one", "crash 2")));
    let said = host.passes_with(4).said;
    let lines: Vec<&str> = said.lines().collect();
    let at =
        |text: &str| lines.iter().position(|l| l.contains(text)).unwrap_or_else(|| panic!("{text}: {said}"));
    assert!(at("route: ") < at("brief: rejected"), "{said}");
    assert_eq!(host.service("brief")["status"], "rejected");
    assert_eq!(
        host.sh("curl -s -o /dev/null -w '%{http_code}' -H 'Host: brief.example.com' localhost/"),
        "502"
    );
    host.serves("web", "one");
}
