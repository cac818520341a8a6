//! The kill campaign: a pass is ended (SIGKILL) before, after and within every effect that it has, one run of
//! the host for each; one more pass must then leave the host exactly as an undisturbed one does, and must not
//! have restarted what was well more often. The points are those that an undisturbed pass goes through.

use crate::lab::{FAULTS, Host};
use crate::solo::web;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How many hosts work side by side: most of the time is waiting.
pub const HOSTS: [&str; 4] = ["kill1", "kill2", "kill3", "kill4"];

/// What every pass of the campaign is given: a settle time that serves these services well enough.
pub const QUICK: &str = "export OMNI_DEPLOY_SETTLE_MS=100; source /opt/omni/kill.sh";

pub struct Scenario {
    pub name: &'static str,
    /// Services before, with their versions in the order in which they were deployed.
    pub before: Vec<(Value, Vec<&'static str>)>,
    /// What changes the manifest; `$VERSION` is a closure.
    pub change: String,
    /// What is run, and its exit code when it is left alone.
    pub command: &'static str,
    pub code: i32,
    /// The pages afterwards.
    pub serves: Vec<(&'static str, &'static str)>,
    /// A version of web that may be tried any number of times.
    pub bad: &'static str,
}

/// The service `NAME` of these scenarios.
pub fn entry(name: &str, port: u16, rollout: &str) -> Value {
    let mut service = web(name, port, "/nix/store/placeholder");
    service["exec"] = json!({"command": "bin/web"});
    service["rollout"] = rollout.into();
    // Also for a page on a machine that stands still for a moment.
    service["health"]["timeoutSec"] = 3.into();
    service["http"]["drainSec"] = 1.into();
    service
}

pub fn scenarios() -> Vec<Scenario> {
    let old = vec!["zero", "half", "one"];
    let before = |rollout: &str| vec![(entry("web", 8001, rollout), old.clone())];
    let update = |version: &str| format!("deploy-manifest update web ${version}");
    // Of a version that never answers all of its time is waited for, at every point.
    let deaf = || format!("{}; deploy-manifest set web health.timeoutSec=1", update("deaf"));
    let add = |name: &str, port: u16, version: &str| {
        let service = entry(name, port, "restart")
            .to_string()
            .replace("/nix/store/placeholder", &format!("'${version}'"));
        format!("deploy-manifest add-service '{service}'")
    };
    // It has to find out what this Caddy can do, because its neighbour has a domain.
    let untried = |change| format!("rm /var/lib/deployer/caddy.json; {change}");
    let scenario = |name, before, change, code, serves, bad| Scenario {
        name,
        before,
        change,
        command: "deployer run",
        code,
        serves: vec![("web", serves)],
        bad,
    };
    let several =
        vec![(entry("web", 8001, "overlap"), vec!["one"]), (entry("web2", 8002, "restart"), vec!["one"])];
    let all = format!(
        "deploy-manifest update web $two; deploy-manifest update web2 $bad; {}",
        add("web3", 8003, "two")
    );
    vec![
        Scenario {
            serves: vec![("web", "two"), ("web2", "one"), ("web3", "two")],
            ..scenario("several services at once", several, all, 3, "", "bad")
        },
        scenario("overlap", before("overlap"), update("two"), 0, "two", ""),
        scenario("overlap with a version that exits", before("overlap"), update("bad"), 3, "one", "bad"),
        scenario("overlap with a version that does not answer", before("overlap"), deaf(), 3, "one", "deaf"),
        scenario("upgrade", before("restart"), update("two"), 0, "two", ""),
        scenario("upgrade to a version that exits", before("restart"), update("bad"), 3, "one", "bad"),
        scenario("upgrade to a version that does not answer", before("restart"), deaf(), 3, "one", "deaf"),
        scenario("first deploy", vec![], untried(add("web", 8001, "two")), 0, "two", ""),
        scenario("first deploy of a version that exits", vec![], add("web", 8001, "bad"), 4, "", "bad"),
        scenario("removal", before("restart"), "deploy-manifest remove-service web".into(), 0, "", ""),
        Scenario {
            command: "deployer rollback web",
            ..scenario("rollback", before("restart"), "true".into(), 0, "half", "")
        },
    ]
}

/// A host of the campaign: the faulty build in place, the versions in the cache, a neighbour that runs.
pub fn boot(name: &'static str) -> Host {
    let host = Host::boot(name);
    // What runs cannot be written to.
    host.only_our_passes();
    fs_err::copy(&*FAULTS, host.path("/usr/local/bin/omni-deploy")).unwrap();
    fs_err::write(host.path("/opt/omni/kill.sh"), include_str!("kill.sh")).unwrap();
    host.sh(
        "echo '{\"caddyServer\": \"srv0\", \"host\": \"solo\", \"defaultHosts\": [\"solo\"]}' >/etc/omni-deploy/config.json
         deploy-manifest init
         systemctl stop deployer.timer",
    );
    let mut paths = String::new();
    for (version, behaviour) in
        [("zero", ""), ("half", ""), ("one", ""), ("two", ""), ("bad", "exit 3"), ("deaf", "port 9999")]
    {
        writeln!(paths, "{version}={}", host.closure("web", version, behaviour)).unwrap();
    }
    host.sh(&format!(
        "{paths} nix copy --to file:///var/lib/omni-deploy?compression=none $zero $half $one $two $bad $deaf"
    ));
    fs_err::write(host.path("/opt/omni/versions"), &paths).unwrap();
    let neighbour = entry("other", 8009, "restart");
    host.sh(&format!(
        "source /opt/omni/versions; {QUICK}
         deploy-manifest add-service '{neighbour}'; deploy-manifest update other $zero; deployer run"
    ));
    host
}

/// Brings a host to the start of a scenario.
pub fn prepare(host: &Host, scenario: &Scenario) {
    let mut script = format!(
        "{QUICK}; source /opt/omni/versions
         for name in $(deploy-manifest show | jq -r '.services[].name | select(. != \"other\")'); do
             deploy-manifest remove-service $name
         done
         deployer run\n"
    );
    for (service, versions) in &scenario.before {
        writeln!(script, "deploy-manifest add-service '{service}'").unwrap();
        for version in versions {
            let name = service["name"].as_str().unwrap();
            writeln!(script, "deploy-manifest update {name} ${version}; deployer run").unwrap();
        }
    }
    // What the scenario brings has to be fetched, where nothing else holds it.
    writeln!(script, "{}; save $two $bad $deaf", scenario.change).unwrap();
    host.sh(&script);
}

/// What one run left behind.
pub struct Left {
    pub code: i32,
    pub facts: String,
    pub starts: BTreeMap<String, u32>,
    pub said: String,
}

/// From the start: `first` (whatever becomes of it), then one pass, then a look.
pub fn run(host: &Host, first: &str, then: &str) -> Result<Left, String> {
    let output = host.try_sh(&format!(
        "{QUICK}; restore; set +e
         ({first}) >/tmp/first 2>&1; echo $?
         {then} >/tmp/then 2>&1; echo $?
         facts; echo ----; starts; echo ----; cat /tmp/first /tmp/then"
    ));
    let text = output.text();
    let told = || format!("{}\n{text}\n{}", output.status, output.stderr);
    let (codes, rest) = text.split_once('\n').and_then(|(a, b)| Some((a, b.split_once('\n')?))).map_or_else(
        || Err(told()),
        |(first, (then, rest))| Ok(((first.to_string(), then.to_string()), rest)),
    )?;
    let mut parts = rest.splitn(3, "----\n");
    let (Some(facts), Some(starts), Some(said)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(told());
    };
    let code = if then == ":" { &codes.0 } else { &codes.1 };
    let starts = starts
        .lines()
        .filter_map(|l| l.trim().split_once(' '))
        .map(|(count, what)| (what.to_string(), count.parse().unwrap_or(0)))
        .collect();
    Ok(Left { code: code.parse().unwrap_or(-1), facts: facts.to_string(), starts, said: said.to_string() })
}

impl Left {
    /// What is not as an undisturbed pass leaves it; nothing that is well may have been started more often.
    pub fn against(&self, want: &Left, bad: &str) -> String {
        let mut wrong = difference(&want.facts, &self.facts);
        if self.code != want.code {
            writeln!(wrong, "      exit code {} instead of {}", self.code, want.code).unwrap();
        }
        for (what, count) in self.starts.iter().filter(|(w, _)| w.split('@').next() != Some(bad)) {
            let planned = want.starts.get(what).copied().unwrap_or(0);
            if *count > planned {
                writeln!(wrong, "      {what} was started {count} times, not {planned}").unwrap();
            }
        }
        wrong
    }
}

/// The lines that only one of two texts has.
pub fn difference(want: &str, got: &str) -> String {
    let mut out = String::new();
    for (sign, of, other) in [('-', want, got), ('+', got, want)] {
        for line in of.lines().filter(|l| !other.lines().any(|o| o == *l)) {
            writeln!(out, "      {sign} {line}").unwrap();
        }
    }
    if out.is_empty() && want != got { "      (the same lines in another order)\n".into() } else { out }
}

/// All points of one scenario; returns how many there were, and appends what went wrong.
fn campaign(host: &Host, scenario: &Scenario, wrong: &mut String) -> usize {
    prepare(host, scenario);
    let command = scenario.command;
    let list = format!("rm -f /tmp/effects; OMNI_DEPLOY_EFFECTS=/tmp/effects {command}");
    let undisturbed = run(host, &list, ":").unwrap();
    let effects = host.sh("cat /tmp/effects");
    let left = |line: &&str| line.starts_with("left over") || line.contains("-next");
    assert_eq!(undisturbed.code, scenario.code, "{}: {}", scenario.name, undisturbed.said);
    assert_eq!(undisturbed.facts.lines().find(left), None, "{}: {}", scenario.name, undisturbed.said);
    assert!(undisturbed.facts.ends_with("nothing to do\n"), "{}: {}", scenario.name, undisturbed.facts);
    for (name, page) in &scenario.serves {
        let line = format!("\n{name} serves {page}\n");
        assert!(undisturbed.facts.contains(&line), "{}: {name}: {}", scenario.name, undisturbed.facts);
    }
    assert_eq!(undisturbed.starts.get("zero@8009"), None, "{}", scenario.name);
    // A person's word counts once it is on the disk; before, a pass has nothing to carry out.
    let unasked = (command != "deployer run").then(|| run(host, "deployer run", ":").unwrap());
    let asked =
        effects.lines().position(|l| l.contains("after write") && l.contains("overrides.json")).unwrap_or(0);

    let points: Vec<&str> = effects.lines().collect();
    for (i, point) in points.iter().enumerate() {
        let kill = format!("OMNI_DEPLOY_KILL_AT={} {command}; [[ $? == 137 ]] || echo 'NOT KILLED'", i + 1);
        let want = unasked.as_ref().filter(|_| i < asked).unwrap_or(&undisturbed);
        let verdict = run(host, &kill, "deployer run").and_then(|got| {
            let mut verdict = got.against(want, scenario.bad);
            if got.said.contains("NOT KILLED") {
                writeln!(verdict, "      it was not killed").unwrap();
            }
            if verdict.is_empty() { Ok(()) } else { Err(format!("{verdict}{}", got.said)) }
        });
        if let Err(why) = verdict {
            writeln!(wrong, "{}, killed at {point}:\n{why}", scenario.name).unwrap();
        }
    }
    points.len()
}

/// Works through scenarios on several hosts side by side; what goes wrong is told at the end of each.
pub fn on_hosts(
    hosts: &[&'static str],
    scenarios: Vec<Scenario>,
    work: impl Fn(&Host, &Scenario, &mut String) -> usize + Sync,
) {
    let only = std::env::var("OMNI_TEST_SCENARIO").unwrap_or_default();
    let left: Mutex<VecDeque<Scenario>> =
        Mutex::new(scenarios.into_iter().filter(|s| s.name.starts_with(&only)).collect());
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for name in hosts {
            scope.spawn(|| {
                let mut host = None;
                loop {
                    let next = left.lock().unwrap().pop_front();
                    let Some(scenario) = next else { break };
                    let begun = Instant::now();
                    let mut wrong = String::new();
                    let points = work(host.get_or_insert_with(|| boot(name)), &scenario, &mut wrong);
                    let seconds = begun.elapsed().as_secs();
                    println!("{}: {points} points, {seconds} s\n{wrong}", scenario.name);
                    failed.fetch_or(!wrong.is_empty(), Ordering::Relaxed);
                }
            });
        }
    });
    assert!(!failed.into_inner(), "see above");
}

#[test]
fn a_pass_killed_at_any_point_is_finished_or_undone_by_the_next() {
    on_hosts(&HOSTS, scenarios(), campaign);
}

/// A host at the start of a scenario, and the number of the first effect that is like this.
fn at(name: &'static str, scenario: &str, pattern: &str) -> (Host, String) {
    let host = boot(name);
    let scenario = scenarios().into_iter().find(|s| s.name == scenario).unwrap();
    prepare(&host, &scenario);
    let point = host.sh(&format!(
        "{QUICK}; restore; rm -f /tmp/effects; OMNI_DEPLOY_EFFECTS=/tmp/effects deployer run >&2 || true
         grep -E -m 1 '{pattern}' /tmp/effects | cut -d ' ' -f 1"
    ));
    assert!(!point.is_empty(), "no effect '{pattern}'");
    (host, point)
}

#[test]
fn a_candidate_that_visitors_are_led_to_stays_until_caddy_can_be_told() {
    let (host, point) =
        at("stays", "overlap", "after (PATCH /id/deployer|write /run/omni-deploy/ports/web)$");
    let said = host.sh(&format!(
        "{QUICK}; restore; code=0
         OMNI_DEPLOY_KILL_AT={point} deployer run >&2 || code=$?; echo ended with $code
         cp /etc/omni-deploy/config.json /tmp/config.json
         jq '.caddyAdmin = \"http://127.0.0.1:2999\"' /tmp/config.json >/etc/omni-deploy/config.json
         echo ----; deployer run 2>&1; between; systemctl is-active web-next; jq -r .route.status /var/lib/deployer/state.json
         cp /tmp/config.json /etc/omni-deploy/config.json
         echo ----; deployer run 2>&1; between; ls /etc/systemd/system; jq -r .route.status /var/lib/deployer/state.json"
    ));
    let parts: Vec<&str> = said.split("----\n").collect();
    assert!(parts[0].contains("ended with 137"), "{said}");
    assert!(parts[1].contains("its candidate stays on port"), "{said}");
    assert!(parts[1].ends_with("web serves two\nactive\npending\n"), "{said}");
    assert!(parts[2].contains("web serves two") && !parts[2].contains("web-next.service"), "{said}");
    assert!(parts[2].ends_with("current"), "{said}");
}

#[test]
fn what_was_started_before_a_pass_began_is_refused_with_its_own_lines() {
    let (host, point) = at("before", "upgrade to a version that does not answer", "after systemctl restart");
    let said = host.sh(&format!(
        "{QUICK}; restore; code=0
         OMNI_DEPLOY_KILL_AT={point} deployer run >&2 || code=$?; echo ended with $code
         code=0; deployer run >&2 || code=$?; echo ended with $code; between
         jq -r '.services.web.lines[]' /var/lib/deployer/lines.json"
    ));
    assert!(said.starts_with("ended with 137\nended with 3\nweb serves one\n"), "{said}");
    assert!(said.contains("page: version deaf on port 9999"), "{said}");
}

#[test]
fn a_manifest_that_ends_the_passes_which_read_it_is_left_alone() {
    let host = boot("reading");
    let scenario = scenarios().into_iter().find(|s| s.name == "upgrade").unwrap();
    prepare(&host, &scenario);
    let begin = format!("{QUICK}; restore; rm -f /tmp/effects");
    let point = host.sh(&format!(
        "{begin}; OMNI_DEPLOY_EFFECTS=/tmp/effects deployer run >&2
         awk '/within reading/ {{ print $1; exit }}' /tmp/effects"
    ));
    let point = point.trim();
    assert!(!point.is_empty(), "reading is no point of a pass");
    // What ran is gone too: whoever keeps dying of the new manifest repairs nothing.
    let said = host.sh(&format!(
        "{begin}; systemctl stop web
         for i in 1 2; do
             code=0; OMNI_DEPLOY_KILL_AT={point} deployer run 2>&1 || code=$?; echo \"ended with $code\"
         done
         between; echo ----; deployer run 2>&1; between; jq -r .manifestError /var/lib/deployer/state.json
         echo ----; deployer run 2>&1; between
         deploy-manifest set other env.NEW=1 >&2; echo ----; deployer run 2>&1; between
         jq -r .manifestError /var/lib/deployer/state.json; ls /run/omni-deploy"
    ));
    let parts: Vec<&str> = said.split("----\n").collect();
    assert_eq!(parts[0].matches("ended with 137").count(), 2, "{said}");
    assert!(!parts[0].contains("web serves one"), "{said}");
    for part in &parts[1..3] {
        assert!(part.contains("is left alone") && part.contains("web serves one"), "{said}");
    }
    // The next version is read, and with it what the last one brought.
    assert!(parts[3].contains("web serves two") && parts[3].contains("null"), "{said}");
    assert!(!parts[3].contains("reading.json"), "{said}");
}
