//! A host by itself: manifest and closures in the embedded directory store, everything on one machine. The
//! tests that need no network share it; each begins with an empty manifest, an empty cache and a Caddy
//! that runs.

use crate::lab::{Host, Pass, lock};
use serde_json::{Value, json};
use std::ops::Deref;
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Duration;

/// The host, while one test has it.
#[derive(Debug)]
pub struct Solo(MutexGuard<'static, Host>);

impl Deref for Solo {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.0
    }
}

static SOLO: LazyLock<Mutex<Host>> = LazyLock::new(|| {
    let host = Host::boot("solo");
    host.sh("echo '{\"caddyServer\": \"srv0\"}' >/etc/omni-deploy/config.json
         deploy-manifest init");
    Mutex::new(host)
});

/// The host as every test finds it.
pub fn solo() -> Solo {
    let host = Solo(lock(&SOLO));
    host.sh("systemctl stop deployer.timer; systemctl start caddy");
    host.until_idle();
    host.sh("if ! names=$(deploy-manifest show | jq -r '.services[].name'); then
             rm -rf /var/lib/omni-deploy /var/lib/deployer/manifest*; deploy-manifest init; names=
         fi
         for name in $names; do deploy-manifest remove-service $name; done
         deployer run --allow-empty
         rm -f /var/lib/deployer-secrets/*
         # What another test has cached is not there for this one.
         rm -rf /var/lib/omni-deploy/nar /var/lib/omni-deploy/*.narinfo /root/elsewhere");
    host
}

/// A web service that is probed by its health path, reached as `NAME.example.com`.
pub fn web(name: &str, port: u16, path: &str) -> Value {
    json!({
        "name": name,
        "artifact": {"storePath": path},
        "env": {"PORT": port.to_string()},
        "http": {"domain": format!("{name}.example.com"), "internalPort": port},
        "health": {"path": "/health", "timeoutSec": 6},
    })
}

impl Solo {
    /// `deploy-manifest add-service`.
    #[track_caller]
    pub fn add(&self, service: &Value) {
        self.sh(&format!("deploy-manifest add-service - <<'EOF'\n{service}\nEOF"));
    }

    /// `deploy-manifest update`.
    #[track_caller]
    pub fn update(&self, name: &str, path: &str) {
        self.sh(&format!("deploy-manifest update {name} {path}"));
    }

    /// Puts the service `web` in place, in its first version, served on port 8001; returns its path.
    #[track_caller]
    pub fn deploys_web(&self) -> String {
        let path = self.closure("web", "one", "");
        self.add(&web("web", 8001, &path));
        self.good_pass();
        self.serves("web", "one");
        path
    }

    /// The page of a service, through Caddy, is this.
    #[track_caller]
    pub fn serves(&self, name: &str, want: &str) {
        assert_eq!(self.page(&format!("{name}.example.com")).as_deref(), Ok(want), "{name}");
    }

    /// The page of a service becomes this, without a pass being asked for.
    #[track_caller]
    pub fn serves_soon(&self, name: &str, want: &str) {
        self.page_soon(&format!("{name}.example.com"), want, Duration::from_secs(30));
    }

    /// A pass that ends with this code.
    #[track_caller]
    pub fn passes_with(&self, code: i32) -> Pass {
        let pass = self.pass();
        assert_eq!(pass.code, code, "{}", pass.said);
        pass
    }

    /// A pass that stops nothing, because the manifest would stop everything.
    #[track_caller]
    pub fn refuses_to_be_emptied(&self) {
        let said = self.passes_with(1).said;
        assert!(said.contains("nothing was removed") && said.contains("--allow-empty"), "{said}");
    }

    /// Why a service is not as the manifest says.
    #[track_caller]
    pub fn reason(&self, name: &str) -> String {
        let service = self.service(name);
        service["failure"]["reason"].as_str().unwrap_or_else(|| panic!("no failure: {service}")).to_string()
    }
}
