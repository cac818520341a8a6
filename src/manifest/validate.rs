//! Checks that span services: names twice, a port or a domain and path claimed twice on one host. Pure, and
//! in time linear in what the manifest names.

use super::error::FieldError;
use super::model::{Http, Manifest};
use std::collections::HashMap;

/// The first clash, if any, at the later of the two services; its text names both.
pub fn clashes(manifest: &Manifest) -> Result<(), FieldError> {
    let services = &manifest.services;
    let mut names: HashMap<&str, usize> = HashMap::with_capacity(services.len());
    let mut ports: HashMap<(&str, u16), usize> = HashMap::with_capacity(services.len());
    // Caddy compares paths without regard to case.
    let mut routes: HashMap<(&str, &str, String), usize> = HashMap::with_capacity(services.len());
    for (index, service) in services.iter().enumerate() {
        let error = |field: &str, reason| Err(FieldError::new(format!("services[{index}].{field}"), reason));
        let name = &service.name;
        if let Some(first) = names.insert(name.as_str(), index) {
            let reason = format!("\"{name}\" is the name of services[{first}] already; rename or remove one");
            return error("name", reason);
        }
        let Some(Http { domain, path, internal_port, port_env: _, drain_sec: _, extra: _ }) = &service.http
        else {
            continue;
        };
        for host in &service.hosts {
            if let Some(first) = ports.insert((host.as_str(), internal_port.get()), index) {
                let reason = format!(
                    "{internal_port} is claimed by '{}' and '{name}' on host '{host}'; give one another port",
                    services[first].name
                );
                return error("http.internalPort", reason);
            }
            let route = (host.as_str(), domain.as_str(), path.to_ascii_lowercase());
            if let Some(first) = routes.insert(route, index) {
                let reason = format!(
                    "\"{path}\" of {domain} is claimed by '{}' and '{name}' on host '{host}'; give one another \
                     path or domain",
                    services[first].name
                );
                return error("http.path", reason);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::manifest::parse::{Mode, manifest};
    use serde_json::{Value, json};

    fn service(name: &str, hosts: &[&str], http: Value) -> Value {
        json!({"name": name, "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": hosts, "http": http})
    }

    fn check(services: Vec<Value>) -> Result<(), String> {
        let document =
            json!({"version": 1, "serial": 1, "generation": "2026-11-22T18:31:05Z", "services": services});
        manifest(document.to_string().as_bytes(), Mode::Strict).map(|_| ()).map_err(|e| e.to_string())
    }

    fn http(domain: &str, path: &str, port: u16) -> Value {
        json!({"domain": domain, "path": path, "internalPort": port})
    }

    #[test]
    fn every_clash_names_its_field_and_both_services() {
        let a = service("ava", &["biz", "web"], http("x.org", "/api", 80));
        for (other, path, words) in [
            (service("ava", &["other"], Value::Null), "services[1].name", "services[0]"),
            (
                service("b", &["web"], http("y.org", "/", 80)),
                "services[1].http.internalPort",
                "'ava' and 'b' on host 'web'",
            ),
            (
                service("b", &["biz"], http("X.org", "/api/", 81)),
                "services[1].http.path",
                "'ava' and 'b' on host 'biz'",
            ),
            (service("b", &["biz"], http("x.org", "/API", 81)), "services[1].http.path", "x.org"),
        ] {
            let e = check(vec![a.clone(), other]).unwrap_err();
            assert!(e.starts_with(path) && e.contains(words), "{e}");
        }
    }

    #[test]
    fn the_same_port_or_route_on_different_hosts_is_no_clash() {
        let one = service("a", &["biz"], http("x.org", "/", 80));
        let same_elsewhere = service("b", &["web"], http("x.org", "/", 80));
        let below = service("c", &["biz"], http("x.org", "/c", 81));
        let no_http = service("d", &["biz"], Value::Null);
        assert_eq!(check(vec![one, same_elsewhere, below, no_http]), Ok(()));
    }
}
