//! Any order of edits, faults, hand edits, reboots, kills and passes, on a booted host with the real program: a
//! pass that ends leaves the host as a small model says, down to the bytes of the units, the route, the roots
//! and what is left over. `OMNI_ORDER_HOST_STEPS` is the length (default: short), `OMNI_ORDER_SEED` the
//! sequence (a number, or `random`); a failure prints seed, step, the sequence and the difference.

use crate::lab::{FAULTS, Host};
use crate::random::Random;
use crate::solo::web;
use omni_deploy::clock::Timestamp;
use omni_deploy::deployer::applied::LastKnownGood;
use omni_deploy::deployer::overrides::Overrides;
use omni_deploy::deployer::routes::{self, Reached};
use omni_deploy::deployer::{caddy, unit};
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::manifest::{Manifest, Service};
use omni_deploy::names::{ServiceName, StorePath};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::Instant;

const NAMES: [&str; 5] = ["s0", "s1", "s2", "s3", "s4"];
const GOOD: [&str; 6] = ["one", "two", "three", "four", "five", "six"];
const BAD: [(&str, &str); 2] = [("exits", "exit 3"), ("deaf", "port 8999")];
/// Those that have a secrets file.
const SECRET: [&str; 2] = ["s1", "s3"];

/// What `look` in order.sh prints: sections by title.
type Seen = BTreeMap<String, String>;

fn sections(text: &str) -> Seen {
    text.split('\u{1e}')
        .skip(1)
        .filter_map(|s| s.split_once('\n'))
        .map(|(title, body)| (title.to_string(), body.to_string()))
        .collect()
}

/// What is known of a host, from what passes that ended had to do.
struct Model {
    /// Every version: its name, and whether it comes up.
    versions: BTreeMap<StorePath, (&'static str, bool)>,
    proved: BTreeMap<ServiceName, LastKnownGood>,
    /// Attempts that were refused and must not be made again.
    refused: BTreeMap<ServiceName, String>,
    /// Services of which a pass that was killed may have refused something.
    unsure: BTreeSet<ServiceName>,
    /// Where units are.
    unit_dir: &'static str,
}

/// One campaign.
struct Campaign<'a> {
    host: &'a Host,
    random: Random,
    model: Model,
    /// Snippets since the last pass, run with it in one go.
    script: String,
    story: Vec<String>,
    step: usize,
    /// Who is paused and who is pinned, as of the last pass.
    paused: BTreeSet<String>,
    pinned: BTreeSet<String>,
    /// How often what was met, for people.
    met: BTreeMap<String, usize>,
}

const BUCKET: &str = "/var/lib/omni-deploy";

impl Campaign<'_> {
    fn new<'a>(host: &'a Host, seed: u64, unit_dir: &'static str) -> Campaign<'a> {
        let mut versions = BTreeMap::new();
        let all = GOOD.iter().map(|v| (*v, "")).chain(BAD);
        for (version, behaviour) in all {
            let path = host.closure("page", version, behaviour);
            host.sh(&format!(
                "nix copy --to file://{BUCKET}?compression=none {path}; mkdir -p /opt/v; echo {path} >/opt/v/{version}"
            ));
            versions.insert(StorePath::parse(&path).unwrap(), (version, behaviour.is_empty()));
        }
        let model = Model {
            versions,
            proved: BTreeMap::new(),
            refused: BTreeMap::new(),
            unsure: BTreeSet::new(),
            unit_dir,
        };
        let random = Random::new(seed);
        Campaign {
            host,
            random,
            model,
            script: String::new(),
            story: Vec::new(),
            step: 0,
            paused: BTreeSet::new(),
            pinned: BTreeSet::new(),
            met: BTreeMap::new(),
        }
    }

    /// Something happens.
    fn happens(&mut self, told: String, snippet: &str) {
        // A shell of its own, which ends where the first of its commands fails.
        // Its coins fall the same way at every run.
        let step = self.step;
        writeln!(self.script, "bash -eu >/dev/null 2>&1 <<'EOS' || true\nRANDOM={step}\n{snippet}\nEOS")
            .unwrap();
        self.story.push(told);
        self.step += 1;
    }

    fn version(&mut self) -> &'static str {
        if self.random.one_in(4) {
            BAD[self.random.below(BAD.len())].0
        } else {
            GOOD[self.random.below(GOOD.len())]
        }
    }

    fn event(&mut self) {
        let which = self.random.below(NAMES.len());
        let who = NAMES[which];
        let version = self.version();
        let path = format!("$(cat /opt/v/{version})");
        let unit = format!("{}/{who}.service", self.model.unit_dir);
        match self.random.below(46) {
            0..=3 => {
                let mut service = web(who, 8100 + which as u16, "/nix/store/placeholder");
                service["exec"] = json!({"command": "bin/page"});
                service["health"]["timeoutSec"] = 5.into();
                if SECRET.contains(&who) {
                    service["envFile"] = format!("/var/lib/deployer-secrets/{who}.env").into();
                }
                self.happens(
                    format!("add {who} {version}"),
                    &format!("deploy-manifest add-service '{service}'; deploy-manifest update {who} {path}"),
                );
            }
            4..=11 => self
                .happens(format!("update {who} {version}"), &format!("deploy-manifest update {who} {path}")),
            12 | 13 if who != "s0" => {
                self.happens(format!("remove {who}"), &format!("deploy-manifest remove-service {who}"));
            }
            12..=14 => {
                let n = self.random.below(4);
                self.happens(format!("set {who} env.X={n}"), &format!("deploy-manifest set {who} env.X={n}"));
            }
            15 => {
                let n = self.random.below(3);
                self.happens(
                    format!("set {who} http.path=/{n}"),
                    &format!("deploy-manifest set {who} http.path=/{n}"),
                );
            }
            16 if who != "s0" => self.happens(
                format!("rollback --service {who}"),
                &format!("deploy-manifest rollback --service {who}"),
            ),
            17 => self.happens(
                "rollback".into(),
                // Not to where the host has nothing to run, which a pass refuses.
                "deploy-manifest rollback
                 deploy-manifest show --service s0 | jq -e '.artifact.storePath | contains(\"placeholder\") | not' ||
                     deploy-manifest update s0 $(cat /opt/v/one) || deploy-manifest rollback",
            ),
            18 => self.happens(
                "the manifest is truncated".into(),
                &format!("[[ -d {BUCKET} ]]; cd {BUCKET}; jq . manifest.json >/dev/null; cp manifest.json /root/good.json; head -c 99 manifest.json >x; mv x manifest.json"),
            ),
            19 | 20 => self.happens(
                "the manifest is mended".into(),
                &format!("[[ -d {BUCKET} ]]; cd {BUCKET}; if jq . manifest.json; then exit; fi; cp /root/good.json manifest.json"),
            ),
            21 => self.happens(
                "the bucket is gone".into(),
                &format!("[[ -d {BUCKET} ]]; mv {BUCKET} /root/bucket; touch {BUCKET}"),
            ),
            22 | 23 => self.happens(
                "the bucket is back".into(),
                &format!("[[ -d /root/bucket ]]; rm {BUCKET}; mv /root/bucket {BUCKET}"),
            ),
            24 => self.happens(
                format!("{version} is not in the cache"),
                &format!("p={path}; p=${{p#/nix/store/}}; mkdir -p /root/kept; mv {BUCKET}/${{p%%-*}}.narinfo /root/kept/"),
            ),
            25 => self.happens("the cache is whole".into(), &format!("[[ -d {BUCKET} ]]; mv /root/kept/* {BUCKET}/")),
            26 => self.happens("nix-collect-garbage".into(), "nix-collect-garbage"),
            27 | 28 => {
                let who = SECRET[self.random.below(2)];
                let file = format!("/var/lib/deployer-secrets/{who}.env");
                let (told, snippet) = match self.random.below(6) {
                    0 => ("are readable by all", format!("chmod 644 {file}")),
                    1 => ("are gone", format!("rm -rf {file}")),
                    2 => ("are a link", format!("rm -rf {file}; ln -s /etc/hostname {file}")),
                    _ => ("are good", format!("rm -rf {file}; install -m 600 /dev/null {file}; echo A=$RANDOM >{file}")),
                };
                self.happens(format!("the secrets of {who} {told}"), &snippet);
            }
            29 => {
                let then = ["true", "systemctl daemon-reload", "systemctl daemon-reload; systemctl restart $n"]
                    [self.random.below(3)];
                self.happens(
                    format!("{who}'s unit is edited; {then}"),
                    &format!("n={who}; grep -q Managed {unit}; sed -i s/on-failure/always/ {unit}; {then}"),
                );
            }
            30 => self.happens(
                format!("{who} runs another version than its unit"),
                &format!("grep -q Managed {unit}; cp -p {unit} /root/unit; nix copy --from file://{BUCKET} {path} || test -e {path}
                     sed -i \"s|/nix/store/[^/]*|{path}|\" {unit}; systemctl daemon-reload; systemctl restart {who} || true
                     cp -p /root/unit {unit}.x; mv {unit}.x {unit}; ((RANDOM % 2)) || systemctl daemon-reload"),
            ),
            31 => self.happens(
                format!("{who}'s unit is deleted"),
                &format!("grep -q Managed {unit}; rm {unit}; ((RANDOM % 2)) || systemctl daemon-reload"),
            ),
            32 => self.happens(
                format!("{who}'s unit is deleted and put back"),
                &format!("grep -q Managed {unit}; cp -p {unit} /root/unit; rm {unit}; systemctl daemon-reload; cp -p /root/unit {unit}"),
            ),
            33 => self.happens(format!("{who} is stopped"), &format!("grep -q Managed {unit}; systemctl stop {who}")),
            34 => self.happens(
                format!("{who} is killed"),
                &format!("grep -q Managed {unit}; systemctl kill --signal=KILL {who}"),
            ),
            35 => self.happens(
                format!("{who} is masked"),
                &format!("grep -q Managed {unit}; systemctl stop {who}; [[ {unit} == /run/* ]] || rm {unit}; systemctl mask {who}"),
            ),
            36 => self.happens(
                format!("{who} is disabled"),
                &format!("rm {}/multi-user.target.wants/{who}.service; ((RANDOM % 2)) || systemctl daemon-reload", self.model.unit_dir),
            ),
            37 => self.happens(
                format!("somebody's own {who}.service"),
                &format!("[[ ! -e {unit} && ! -L {unit} ]]; if systemctl -q is-active {who}; then exit; fi; printf '[Service]\\nExecStart=/bin/sleep infinity\\n' >{unit}; systemctl daemon-reload"),
            ),
            38 => self.happens(
                "nobody's own units any more".into(),
                &format!("cd {}; for n in s?.service; do [[ ! -f $n ]] || grep -q Managed $n || {{ systemctl stop $n || true; rm $n; }}; done; systemctl daemon-reload", self.model.unit_dir),
            ),
            39 => {
                let change = [
                    "caddy-api /id/deployer -X DELETE",
                    "caddy-api /id/deployer -X PATCH -H 'Content-Type: application/json' -d '{\"@id\": \"deployer\", \"handle\": []}'",
                    "caddy-api /id/deployer | caddy-api /config/apps/http/servers/srv0/routes -H 'Content-Type: application/json' -d @-",
                    "caddy-api /config/apps/http/servers/srv0/routes/0 -X PUT -H 'Content-Type: application/json' -d '{\"handle\": []}'",
                ];
                let which = self.random.below(change.len());
                let told = ["deleted", "emptied", "doubled", "not the first"][which];
                self.happens(format!("the route is {told}"), change[which]);
            }
            40 => self.happens(
                format!("{who}'s roots are gone"),
                &format!("rm -r /nix/var/nix/gcroots/omni-deploy/{who}; ((RANDOM % 3)) || nix-collect-garbage"),
            ),
            41 => self.happens(
                format!("a root of {who} is gone"),
                &format!("cd /nix/var/nix/gcroots/omni-deploy/{who}; rm \"$(ls | head -n 1)\""),
            ),
            42 => self.happens("Caddy is stopped".into(), "systemctl stop caddy"),
            43 => self.happens("Caddy is started".into(), "systemctl start caddy"),
            44 => self.happens("the state file is lost".into(), "rm /var/lib/deployer/state.json"),
            _ => {
                if self.random.one_in(2) {
                    self.reboots();
                } else {
                    self.happens(
                        "files of somebody's".into(),
                        &format!("touch /nix/var/nix/gcroots/omni-deploy/notes {}/notes.service; cd /nix/var/nix/gcroots/omni-deploy/{who}; touch notes", self.model.unit_dir),
                    );
                }
            }
        }
    }

    fn reboots(&mut self) {
        let script = std::mem::take(&mut self.script);
        self.host.sh(&format!("{script}\nsync"));
        if self.random.one_in(2) {
            self.story.push("reboot".into());
            self.host.reboot();
        } else {
            self.story.push("power failure".into());
            self.host.power_cut();
            self.host.start();
        }
        self.step += 1;
    }

    /// A pass, and what it must leave.
    fn pass(&mut self, command: &str, kill_at: Option<usize>) {
        let script = std::mem::take(&mut self.script);
        self.story
            .push(format!("{command}{}", kill_at.map_or(String::new(), |n| format!(", killed at {n}"))));
        self.step += 1;
        let kill = kill_at.map_or(String::new(), |n| format!("OMNI_DEPLOY_KILL_AT={n}"));
        let text = self.host.sh(&format!(
            "source /opt/omni/order.sh {}
             {script}
             look >/tmp/before
             code=0; env {kill} {command} >/tmp/said 2>&1 || code=$?
             # What the killed one had started is gone as well, as with its unit's KillMode.
             [[ -z '{kill}' ]] || while pgrep -x 'nix|systemctl' >/dev/null; do sleep 0.02; done
             look plan >/tmp/after
             cat /tmp/before; printf '\\035'; cat /tmp/after; printf '\\035%s\\035' $code; cat /tmp/said",
            self.model.unit_dir
        ));
        let mut parts = text.split('\u{1d}');
        let mut part = || parts.next().unwrap_or_default().to_string();
        let (before, after) = (sections(&part()), sections(&part()));
        let (code, said) = (part(), part());
        let state: Value = serde_json::from_str(body(&after, "state")).unwrap_or_default();
        for service in state["services"].as_object().into_iter().flat_map(|s| s.values()) {
            *self.met.entry(service["status"].as_str().unwrap_or_default().into()).or_default() += 1;
        }
        let decided = overrides(&after);
        self.paused = decided.paused.keys().map(ServiceName::to_string).collect();
        self.pinned = decided.pinned.keys().map(ServiceName::to_string).collect();
        *self.met.entry(format!("exit {code}")).or_default() += 1;
        let wrong = if code == "137" {
            self.model.after_kill(&before, &after)
        } else {
            self.model.after_pass(command, &before, &after, &code, &said)
        };
        if !wrong.is_empty() {
            self.fail(&wrong, &said);
        }
    }

    fn fail(&self, wrong: &[String], said: &str) -> ! {
        let from = self.story.len().saturating_sub(60);
        panic!(
            "step {}\n--- the last of the sequence\n{}\n--- the pass said\n{said}\n--- differences\n{}",
            self.step,
            self.story[from..].join("\n"),
            wrong.join("\n")
        );
    }
}

fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

fn body<'a>(seen: &'a Seen, title: &str) -> &'a str {
    seen.get(title).map_or("", String::as_str)
}

fn words(seen: &Seen, title: &str) -> BTreeSet<String> {
    body(seen, title).lines().map(String::from).collect()
}

fn manifest(text: &str) -> Option<Manifest> {
    parse::manifest(text.as_bytes(), Mode::Tolerant).ok()
}

fn applied(seen: &Seen) -> BTreeMap<ServiceName, LastKnownGood> {
    seen.iter()
        .filter_map(|(title, text)| Some((title.strip_prefix("applied ")?, text)))
        .map(|(file, text)| {
            let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("applied/{file}: {e}"));
            let service = parse::service(value["service"].clone(), Mode::Tolerant, None).unwrap();
            let path = service.artifact.store_path.path().unwrap().clone();
            let previous = serde_json::from_value(value["previous"].clone()).unwrap();
            let unit = serde_json::from_value(value["unit"].clone()).unwrap();
            (service.name.clone(), LastKnownGood { service, path, previous, unit })
        })
        .collect()
}

fn overrides(seen: &Seen) -> Overrides {
    match body(seen, "overrides") {
        "" => Overrides::default(),
        text => serde_json::from_str(text).unwrap(),
    }
}

/// A property of a unit, as `systemctl show` has it.
fn shown<'a>(seen: &'a Seen, who: &ServiceName, property: &str) -> &'a str {
    let block =
        body(seen, "show").split("\n\n").find(|b| b.lines().any(|l| l == format!("Id={who}.service")));
    let line = block.and_then(|b| b.lines().find_map(|l| l.strip_prefix(&format!("{property}="))));
    line.unwrap_or_default()
}

/// What must run of a service, and how it stands.
struct Expected<'a> {
    status: &'static str,
    runs: Option<(&'a Service, &'a StorePath)>,
    /// Is still to be fetched, and held for that.
    pending: Option<&'a StorePath>,
}

impl Model {
    fn renders_as_proved(&self, service: &Service, path: &StorePath) -> bool {
        let proved = self.proved.get(&service.name);
        proved.is_some_and(|a| unit::render(&a.service, &a.path) == unit::render(service, path))
    }

    /// Everything that goes into an attempt.
    fn attempt(&self, seen: &Seen, service: &Service) -> String {
        let entry = serde_json::to_string(service).unwrap();
        format!(
            "{entry} {}",
            service.env_file.as_ref().map_or("", |_| body(seen, &format!("secrets {}", service.name)))
        )
    }

    /// A pass was killed: what was proved is what it was, or what the manifest says now.
    fn after_kill(&mut self, before: &Seen, after: &Seen) -> Vec<String> {
        let mut wrong = Vec::new();
        let kept = manifest(body(after, "kept"));
        let overrides = overrides(after);
        let now = applied(after);
        for (name, one) in &now {
            let entry = kept.iter().flat_map(|m| &m.services).find(|s| s.name == *name);
            let new = entry.map(|s| overrides.apply(s));
            let good = self.versions.get(&one.path).is_some_and(|v| v.1);
            let known = self.proved.get(name).is_some_and(|old| old == one);
            let as_wanted = good && new.as_ref() == Some(&one.service);
            if !(known || as_wanted) {
                wrong.push(format!(
                    "{name} was taken down as proved: {one:?}\n  new {new:?}\n  old {:?}",
                    self.proved.get(name)
                ));
            }
        }
        let removed = |n: &ServiceName| {
            let entry = kept.iter().flat_map(|m| &m.services).find(|s| s.name == *n);
            entry.is_none_or(|s| s.artifact.store_path.path().is_none())
        };
        for name in self.proved.keys().filter(|n| !now.contains_key(n) && !removed(n)) {
            wrong.push(format!("{name} was forgotten"));
        }
        self.proved = now;
        // Which attempts it made is not known.
        let _unused = before;
        self.refused.clear();
        self.unsure = NAMES.map(name).into();
        wrong
    }

    fn after_pass(
        &mut self,
        command: &str,
        before: &Seen,
        after: &Seen,
        code: &str,
        said: &str,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut say = |text: String| wrong.push(text);
        if code == "1" {
            // Refused words: a pause of what never was up, an unpin of what is not pinned.
            if command == "deployer run" {
                say("the pass could do nothing".into());
            }
            return wrong;
        }
        let bucket = words(before, "facts").contains("bucket up");
        let fresh = manifest(body(before, "manifest")).filter(|_| bucket);
        let used =
            fresh.clone().or_else(|| manifest(body(before, "kept"))).expect("some manifest is in force");
        if fresh.is_some() && body(after, "kept") != body(after, "manifest") {
            say("the manifest was not kept".into());
        }
        if !words(before, "facts").contains("state") {
            self.refused.clear();
        }
        let overrides = overrides(after);
        let entries: Vec<Service> = used.services.iter().map(|s| overrides.apply(s)).collect();
        let state: Value = serde_json::from_str(body(after, "state")).unwrap_or_default();
        let present = words(before, "present");
        let cached = words(before, "cached");
        let interrupted = body(before, "intent");
        let caddy_up = words(after, "facts").contains("caddy up");
        let mut routed: Vec<Reached> = Vec::new();
        let mut units = BTreeSet::new();
        let mut wanted = BTreeSet::new();
        let mut rooted = BTreeMap::new();
        let mut new_proved = BTreeMap::new();
        let mut new_refused = BTreeMap::new();
        let mut off: u8 = 0;
        let mut loose = BTreeSet::new();
        let mut pending_any = false;
        for entry in &entries {
            let who = &entry.name;
            let target = entry.artifact.store_path.path();
            let proved = self.proved.get(who);
            let file_before = body(before, &format!("unit {who}"));
            let masked = proved.is_some() && file_before == "-> /dev/null";
            let theirs = !(file_before.is_empty() || file_before.starts_with(unit::MARK) || masked);
            let active = shown(after, who, "ActiveState") == "active";
            let told = &state["services"][who.as_str()];
            if theirs {
                if body(after, &format!("unit {who}")) != file_before || told["status"] != "failed" {
                    say(format!("{who} is somebody's: {told}"));
                }
                routed.extend(entry.http.as_ref().filter(|_| target.is_some()).map(|http| Reached {
                    service: &entry.name,
                    http,
                    own: None,
                }));
                off = off.max(if told["storePath"].is_null() { 4 } else { 3 });
                if let Some(proved) = proved {
                    new_proved.insert(who.clone(), proved.clone());
                    loose.insert(who.clone());
                }
                units.insert(who.clone());
                continue;
            }
            let Some(target) = target else {
                if told["status"] != "waiting" {
                    say(format!("{who} should wait: {told}"));
                }
                continue;
            };
            if overrides.is_paused(who, Timestamp::now()) {
                if active || told["status"] != "stopped" {
                    say(format!("{who} is paused, but {} and {told}", shown(after, who, "ActiveState")));
                }
                routed.extend(
                    proved.map_or(entry.http.as_ref(), |a| a.service.http.as_ref()).map(|http| Reached {
                        service: &entry.name,
                        http,
                        own: None,
                    }),
                );
                new_proved.extend(proved.map(|a| (who.clone(), a.clone())));
                // Its unit is as it was: nobody needs it.
                loose.insert(who.clone());
                if let Some(attempt) = self.refused.get(who) {
                    new_refused.insert(who.clone(), attempt.clone());
                }
                continue;
            }
            let previous = proved.map(|a| (&a.service, &a.path));
            let secrets = body(before, &format!("secrets {who}"));
            if entry.env_file.is_some() && !secrets.starts_with("good") {
                if told["status"] != "failed" || !told["failure"]["reason"].to_string().contains("secrets") {
                    say(format!("{who} has bad secrets: {told}"));
                }
                // systemd itself may try again and again what a person started.
                if said.contains(&format!("{who}: starting")) {
                    say(format!("{who} was started with bad secrets"));
                }
                routed.extend(
                    proved.map_or(entry.http.as_ref(), |a| a.service.http.as_ref()).map(|http| Reached {
                        service: &entry.name,
                        http,
                        own: None,
                    }),
                );
                new_proved.extend(proved.map(|a| (who.clone(), a.clone())));
                loose.insert(who.clone());
                off = off.max(if told["storePath"].is_null() { 4 } else { 3 });
                continue;
            }
            let attempt = self.attempt(before, entry);
            let same = self.renders_as_proved(entry, target);
            let retry = command.strip_prefix("deployer run --retry ").is_some_and(|n| n == who.as_str());
            let remembered = !same && !retry && self.refused.get(who) == Some(&attempt);
            let there = present.contains(target.as_ref() as &str)
                || bucket && cached.contains(target.as_ref() as &str);
            let good = self.versions.get(target).is_some_and(|v| v.1);
            let unsure = !good && !there && told["status"] == "rejected" && self.unsure.contains(who);
            if there {
                self.unsure.remove(who);
            }
            let expected = if unsure {
                Expected { status: "rejected", runs: previous, pending: None }
            } else if remembered {
                if said.contains(&format!("{who}: starting {target}")) {
                    say(format!("{who}: {target} was refused and tried again"));
                }
                Expected { status: "rejected", runs: previous, pending: None }
            } else if !there {
                pending_any = true;
                Expected { status: "failed", runs: previous, pending: Some(target) }
            } else if !good {
                Expected { status: "rejected", runs: previous, pending: None }
            } else {
                Expected { status: "running", runs: Some((entry, target)), pending: None }
            };
            if expected.status == "rejected" {
                new_refused.insert(who.clone(), attempt);
            }
            // What would have to be put back is gone from here and the cache: nothing to hold it to.
            if let Some((_, path)) = expected.runs
                && !present.contains(path.as_ref() as &str)
                && !(bucket && cached.contains(path.as_ref() as &str))
            {
                loose.insert(who.clone());
                new_proved.extend(proved.map(|a| (who.clone(), a.clone())));
                routed.extend(
                    proved.map_or(entry.http.as_ref(), |a| a.service.http.as_ref()).map(|http| Reached {
                        service: &entry.name,
                        http,
                        own: None,
                    }),
                );
                pending_any = true;
                off = 9;
                continue;
            }
            if told["status"] != expected.status {
                say(format!("{who} should be {}, is {told}", expected.status));
            }
            if expected.status != "running" {
                off = off.max(if expected.runs.is_some() { 3 } else { 4 });
            }
            let mut roots: BTreeSet<String> = expected.pending.iter().map(|p| p.base().to_string()).collect();
            let file = body(after, &format!("unit {who}"));
            match expected.runs {
                None => {
                    if !file.is_empty() || active {
                        say(format!("{who}: nothing should be there, but {file:?}"));
                    }
                    routed.extend(entry.http.as_ref().map(|http| Reached {
                        service: &entry.name,
                        http,
                        own: None,
                    }));
                }
                Some((service, path)) => {
                    let text = unit::render(service, path);
                    let exe = format!("{path}/bin/page");
                    if file != text {
                        say(format!("{who}: its unit should be\n{text}\nis\n{file}"));
                    }
                    if !active || body(after, &format!("exe {who}")) != exe {
                        say(format!(
                            "{who} should run {exe}, is {active} {}",
                            body(after, &format!("exe {who}"))
                        ));
                    }
                    if shown(after, who, "NeedDaemonReload") != "no"
                        || shown(after, who, "LoadState") != "loaded"
                    {
                        say(format!("{who}: systemd has not read its unit"));
                    }
                    if told["storePath"] != path.as_ref() as &str {
                        say(format!("{who} should be told to run {path}: {told}"));
                    }
                    let record = if expected.status == "running" {
                        LastKnownGood::new(service, path, &text, proved)
                    } else {
                        proved.unwrap().clone()
                    };
                    let ran_well = file_before == text
                        && shown(before, who, "ActiveState") == "active"
                        && body(before, &format!("exe {who}")) == exe
                        && shown(before, who, "LoadState") == "loaded"
                        && !interrupted.contains(&format!("\"{who}\""));
                    let tried = expected.status == "rejected" && !remembered;
                    let same = shown(before, who, "InvocationID") == shown(after, who, "InvocationID");
                    if ran_well
                        && proved.is_some()
                        && !tried
                        && !same
                        && self.renders_as_proved(service, path)
                    {
                        say(format!("{who} ran well and was restarted"));
                    }
                    units.insert(who.clone());
                    wanted.insert(format!("{who}.service"));
                    roots.insert(path.base().into());
                    let there = |p: &&StorePath| present.contains((*p).as_ref() as &str);
                    roots.extend(record.previous.iter().filter(there).map(|p| p.base().to_string()));
                    // A root of a version before, whose closure is lost, holds nothing but stays.
                    let dangling: BTreeSet<String> =
                        record.previous.iter().map(|p| p.base().to_string()).collect();
                    let held: BTreeSet<String> = words(after, "roots")
                        .iter()
                        .filter_map(|l| l.strip_prefix(&format!("{who}/")))
                        .filter(|base| {
                            *base != "notes" && (roots.contains(*base) || !dangling.contains(*base))
                        })
                        .map(String::from)
                        .collect();
                    if held != roots {
                        say(format!("{who} should hold {roots:?}, holds {held:?}"));
                    }
                    if record.previous.len() > 2 {
                        say(format!("{who} remembers {:?}", record.previous));
                    }
                    new_proved.insert(who.clone(), record);
                    routed.extend(service.http.as_ref().map(|http| Reached {
                        service: &service.name,
                        http,
                        own: None,
                    }));
                }
            }
            rooted.insert(who.clone(), roots);
        }
        // Services that are not in the manifest.
        for who in NAMES.map(name) {
            if entries.iter().any(|e| e.name == who) {
                continue;
            }
            let file = body(after, &format!("unit {who}"));
            let left = file.starts_with(unit::MARK)
                || (!file.starts_with('[') && shown(after, &who, "ActiveState") == "active")
                || body(after, "state").contains(&format!("\"{who}\""))
                || words(after, "roots")
                    .iter()
                    .any(|l| l.starts_with(&format!("{who}/")) && !l.ends_with("/notes"))
                || (words(after, "wanted").contains(&format!("{who}.service")) && !file.starts_with('['));
            if left {
                say(format!(
                    "{who} is not in the manifest, but there: {file:?} {} {:?}",
                    shown(after, &who, "ActiveState"),
                    words(after, "roots")
                ));
            }
        }
        for who in NAMES.map(name).iter().filter(|n| !loose.contains(n)) {
            let link = words(after, "wanted").contains(&format!("{who}.service"));
            let theirs = body(after, &format!("unit {who}")).starts_with('[');
            if link != wanted.contains(&format!("{who}.service")) && !theirs {
                say(format!("{who} starts at boot: {link}"));
            }
        }
        let recorded = applied(after);
        for (who, one) in &new_proved {
            if recorded.get(who) != Some(one) {
                say(format!("{who} should be taken down as {one:?}, is {:?}", recorded.get(who)));
            }
        }
        for who in recorded.keys().filter(|n| !new_proved.contains_key(n)) {
            say(format!("{who} should not be taken down as proved"));
        }
        // A candidate waits for a Caddy that can be told to lead past it.
        let waits = |file: &&str| {
            !caddy_up && file.ends_with("-next.service") && body(before, "left").lines().any(|l| l == *file)
        };
        let left: Vec<&str> = body(after, "left").lines().filter(|file| !waits(file)).collect();
        if !left.is_empty() || !body(after, "intent").is_empty() {
            say(format!("left over: {left:?} {}", body(after, "intent")));
        }
        if caddy_up && words(before, "facts").contains("caddy up") {
            let servers: Value = serde_json::from_str(body(after, "caddy")).unwrap_or_default();
            let routes = servers["srv0"]["routes"].as_array().cloned().unwrap_or_default();
            let old: Value = serde_json::from_str(body(before, "caddy")).unwrap_or_default();
            let foreign = |routes: &[Value]| -> Vec<Value> {
                routes.iter().filter(|r| r["@id"] != "deployer").cloned().collect()
            };
            let ours: Vec<&Value> = routes.iter().filter(|r| r["@id"] == "deployer").collect();
            let want = caddy::route(&routes::of(routed, &BTreeSet::new()), None);
            if ours != want.iter().collect::<Vec<_>>() || want.is_some() && routes[0]["@id"] != "deployer" {
                say(format!("the route should be\n{}\nis\n{}", want.unwrap_or_default(), json!(routes)));
            }
            if foreign(&routes) != foreign(old["srv0"]["routes"].as_array().map_or(&[][..], Vec::as_slice)) {
                say("others' routes were changed".into());
            }
        }
        if bucket && body(after, "report") != body(after, "state") {
            say(format!("the report is another than the state: {}", body(after, "report")));
        }
        if off != 9 && code != off.to_string() {
            say(format!("the exit code should be {off}, is {code}"));
        }
        if caddy_up && !pending_any && loose.is_empty() && body(after, "plan").trim() != "true" {
            say(format!("there is still something to do: {}", body(after, "plan")));
        }
        self.proved = new_proved;
        self.refused = new_refused;
        wrong
    }
}

fn campaign(host: &Host, seed: u64, steps: usize, unit_dir: &'static str) {
    println!("seed {seed}, {steps} steps, units in {unit_dir}");
    let begun = Instant::now();
    let mut c = Campaign::new(host, seed, unit_dir);
    let mut first = web("s0", 8100, "/nix/store/placeholder");
    first["exec"] = json!({"command": "bin/page"});
    first["health"]["timeoutSec"] = 5.into();
    c.happens(
        "add s0 one".into(),
        &format!("deploy-manifest add-service '{first}'; deploy-manifest update s0 $(cat /opt/v/one)"),
    );
    c.pass("deployer run", None);
    let (mut passes, mut kills) = (0, 0);
    while c.step < steps {
        for _ in 0..=c.random.below(7) {
            c.event();
        }
        let who = NAMES[c.random.below(NAMES.len())];
        passes += 1;
        // Words that have nothing to do are refused: they are for those that they mean.
        let any = |of: &BTreeSet<String>, r: &mut Random| of.iter().nth(r.below(of.len().max(1))).cloned();
        let paused = any(&c.paused, &mut c.random);
        let pinned = any(&c.pinned, &mut c.random);
        match (c.random.below(16), paused, pinned) {
            (0, ..) => c.pass(&format!("deployer pause {who}"), None),
            (1..=4, Some(who), _) => c.pass(&format!("deployer resume {who}"), None),
            (5, ..) => c.pass(&format!("deployer rollback {who}"), None),
            (6 | 7, _, Some(who)) => c.pass(&format!("deployer rollback {who} --unpin"), None),
            (8, ..) => c.pass(&format!("deployer run --retry {who}"), None),
            (9..=11, ..) => {
                kills += 1;
                let at = 1 + c.random.below(40);
                c.pass("deployer run", Some(at));
            }
            _ => c.pass("deployer run", None),
        }
    }
    println!(
        "    {} steps, {passes} passes, {kills} to be killed, {:.0} s; met: {:?}",
        c.step,
        begun.elapsed().as_secs_f64(),
        c.met
    );
}

fn boot(name: &'static str, unit_dir: &str) -> Host {
    let host = Host::boot(name);
    // What runs cannot be written to.
    host.only_our_passes();
    fs_err::copy(&*FAULTS, host.path("/usr/local/bin/omni-deploy")).unwrap();
    fs_err::write(host.path("/opt/omni/order.sh"), include_str!("order.sh")).unwrap();
    host.sh(&format!(
        "echo '{{\"caddyServer\": \"srv0\", \"host\": \"solo\", \"defaultHosts\": [\"solo\"], \"unitDir\": \"{unit_dir}\"}}' >/etc/omni-deploy/config.json
         deploy-manifest init
         # Passes are made by the test alone.
         systemctl disable --now deployer.timer
         mkdir -p /etc/systemd/system/deployer.service.d
         printf '[Unit]\\nConditionPathExists=/nowhere\\n' >/etc/systemd/system/deployer.service.d/not.conf
         systemctl daemon-reload"
    ));
    host
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

#[test]
fn any_order_of_events_ends_as_the_manifest_says() {
    let fresh = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let steps = number("OMNI_ORDER_HOST_STEPS").unwrap_or(120) as usize;
    // A check of a change must not fail for what the change did not do: chance has to be asked for.
    let seeds = match std::env::var("OMNI_ORDER_SEED").as_deref() {
        Err(_) => vec![1, 2],
        Ok("random") => vec![fresh()],
        Ok(seed) => vec![seed.parse().expect("OMNI_ORDER_SEED is a number or 'random'")],
    };
    for (i, seed) in seeds.into_iter().enumerate() {
        let unit_dir = if i % 2 == 0 { "/etc/systemd/system" } else { "/run/systemd/system" };
        let unit_dir = match std::env::var("OMNI_ORDER_UNITS").as_deref() {
            Ok("run") => "/run/systemd/system",
            Ok("etc") => "/etc/systemd/system",
            _ => unit_dir,
        };
        let host = boot("order", unit_dir);
        campaign(&host, seed, steps, unit_dir);
    }
}
