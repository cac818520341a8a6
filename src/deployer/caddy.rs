//! How Caddy is told the routes, and the server that shows its configuration. [`changes`] is pure but for where Caddy
//! is: routes and Caddy's present servers in, the requests to make out. All routes of the host are one with the id
//! `deployer` that matches all their domains (Caddy manages certificates only for hosts matched by a server's own routes)
//! and holds a subroute, longest path first. Other people's routes and servers are never changed.

use super::admin;
use super::listeners::{self, Answers};
use super::ports::{self, PortFiles};
use super::routes::Route;
use crate::bounds::{self, Bounds};
use crate::config::Settings;
use crate::config::admin::{Address, Endpoint};
use crate::log;
use crate::percent;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// The id of our route in Caddy's configuration.
const ROUTE_ID: &str = "deployer";
/// The server we make where none listens on :443.
pub const OWN_SERVER: &str = "deployer";
/// The server that shows Caddy's configuration where it is changed through a socket.
pub const VIEW_SERVER: &str = "deployer-view";
/// The server we make for as long as one request, to see what this Caddy can do ([`super::trial`]).
const TRIAL_SERVER: &str = "deployer-trial";
/// How long a WebSocket may go on after a change of the configuration. A Caddy before 2.7 does not know the setting, and
/// closes WebSockets at every change.
pub const STREAMS_STAY: &str = "24h";
/// Where that listens: where people look for Caddy's configuration.
const VIEW_PORT: u16 = 2019;
const SERVERS: &str = "/config/apps/http/servers";
/// What the servers may consist of. Our own routes have 16 bytes for each value, twice what is asked here; a subroute
/// within another takes four levels.
const BOUNDS: Bounds = Bounds { values: admin::MAX_ANSWER as usize / 8, depth: 100 };

/// What Caddy has, as far as it concerns us.
#[derive(Debug, Clone, PartialEq)]
pub enum CaddyState {
    /// Its servers, as its admin API gives them.
    Servers(Map<String, Value>),
    /// It cannot be asked, or has no http app; the reason with the next move.
    Unavailable(String),
}

/// Where on this host the visitors of a domain are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listener {
    /// Caddy was not to be asked; why.
    Unknown(String),
    /// No server of Caddy has a route for the domain.
    NoRoute,
    /// This server has, at these addresses for ports 443, 80 and, without those two, some other.
    Server { name: String, https: Option<SocketAddr>, http: Option<SocketAddr>, other: Option<SocketAddr> },
}

/// One request to Caddy's admin API.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdminRequest {
    /// `PUT`, `PATCH` or `DELETE`.
    pub method: &'static str,
    /// The path below the admin endpoint.
    pub path: String,
    /// The JSON body, if any.
    pub body: Option<Value>,
    /// What it does, for people.
    #[serde(skip)]
    pub what: String,
}

/// What is to be done about the route.
#[derive(Debug, Clone, PartialEq)]
pub enum RoutePlan {
    /// No service needs one and there is none.
    None,
    /// Caddy has it as it should be.
    Current,
    /// These requests, in this order.
    Write(Vec<AdminRequest>),
    /// It cannot be done now; why, and the next move.
    Pending(String),
}

impl RoutePlan {
    /// Whether there is nothing to do, or nothing that can be done now.
    pub fn is_settled(&self) -> bool {
        !matches!(self, RoutePlan::Write(_))
    }
}

/// What is to be done for Caddy to have these routes, and to show its configuration. `files`: the ports are there.
pub fn changes(
    settings: &Settings,
    routes: &[Route],
    observed: &CaddyState,
    files: Option<&PortFiles>,
) -> RoutePlan {
    let plan = plan(settings.caddy_server.as_deref(), route(routes, files).as_ref(), observed);
    let plan = match settings.caddy_admin.now() {
        Endpoint::Unix(socket) => with_view(plan, Some(&socket), observed),
        Endpoint::Tcp(..) => with_view(plan, None, observed),
    };
    without_trial(plan, observed)
}

/// Caddy's one route for all of these, or None when there are none. Equal sets of routes give equal ones. `files`: the
/// ports are there, and the route stays the same when they change.
pub fn route(routes: &[Route], files: Option<&PortFiles>) -> Option<Value> {
    if routes.is_empty() {
        return None;
    }
    let domains: BTreeSet<&str> = routes.iter().map(|r| r.domain.as_str()).collect();
    let mut sorted: Vec<&Route> = routes.iter().collect();
    // First match wins in Caddy: a plain name before a wildcard, then the longest path.
    fn rank(r: &Route) -> (bool, &str, Reverse<usize>, &str) {
        (r.domain.starts_with("*."), &r.domain, Reverse(r.path.len()), &r.path)
    }
    sorted.sort_by(|a, b| rank(a).cmp(&rank(b)));
    let routes: Vec<Value> = sorted
        .iter()
        .map(|Route { service, domain, path, port, own_port: _, closed }| {
            let mut matcher = json!({"host": [domain]});
            if path.as_str() != "/" {
                // `/api/*` alone misses `/api`, and `/api*` would catch `/apix`.
                matcher["path"] = json!([path, format!("{path}/*")]);
            }
            if *closed {
                let unavailable = json!({"handler": "static_response", "status_code": 503});
                return json!({"match": [matcher], "handle": [unavailable], "terminal": true});
            }
            let (dial, idle) = match files {
                Some(files) => (files.dial(service), "1s"),
                None => (format!("127.0.0.1:{port}"), "3s"),
            };
            let mut proxy = json!({
                "handler": "reverse_proxy",
                "upstreams": [{"dial": dial}],
                // Only of a transport that is given does Caddy close the idle connections when the route
                // changes, and only so can be told when a service has drained. The values are Caddy's own
                // but for the idle time: that is below what servers allow by themselves (5 s is common), as
                // a POST on a connection that the service is just closing would fail. Where the route does not
                // change, a service that drains waits for it.
                "transport": {
                    "protocol": "http",
                    "dial_timeout": "10s",
                    "keep_alive": {
                        "probe_interval": "30s",
                        "max_idle_conns_per_host": 32,
                        "idle_timeout": idle,
                    },
                },
                // Requests that come while the unit restarts wait for it.
                "load_balancing": {"try_duration": "10s", "try_interval": "50ms"},
            });
            if files.is_some() {
                proxy["stream_close_delay"] = STREAMS_STAY.into();
            }
            json!({"match": [matcher], "handle": [proxy], "terminal": true})
        })
        .collect();
    let mut route = json!({
        "@id": ROUTE_ID,
        "match": [{"host": domains}],
        "handle": [{"handler": "subroute", "routes": []}],
    });
    // Moved: the macro would copy them.
    route["handle"][0]["routes"] = Value::Array(routes);
    Some(route)
}

/// In a server that is ours alone, what nobody's route matches is a 404 rather than Caddy's empty 200.
fn not_found() -> Value {
    json!({"handle": [{"handler": "static_response", "status_code": 404}]})
}

fn routes_of(server: &Value) -> &[Value] {
    server.get("routes").and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn is_ours(route: &Value) -> bool {
    route.get("@id").and_then(Value::as_str) == Some(ROUTE_ID)
}

/// Whether a server is one that we made: our name, and no route but ours and the 404 after it.
fn own_server(name: &str, server: &Value) -> bool {
    name == OWN_SERVER && routes_of(server).iter().all(|r| is_ours(r) || *r == not_found())
}

fn listens_on_https(server: &Value) -> bool {
    port_ranges(server).any(|range| range == "443")
}

/// The name of a server as one segment of a path of the admin API. Names come from Caddy or the configuration.
fn segment(name: &str) -> String {
    percent::encode(name, "")
}

/// What would be done for Caddy to have a first route. `wanted` is the server of the configuration, if set.
pub fn first_route(wanted: Option<&str>, observed: &CaddyState) -> RoutePlan {
    plan(wanted, Some(&json!({"@id": ROUTE_ID})), observed)
}

/// Compares what Caddy has with what it should have. `wanted` is the server of the configuration, if set.
pub fn plan(wanted: Option<&str>, desired: Option<&Value>, observed: &CaddyState) -> RoutePlan {
    let servers = match observed {
        CaddyState::Unavailable(why) => {
            return if desired.is_none() { RoutePlan::None } else { RoutePlan::Pending(why.clone()) };
        }
        CaddyState::Servers(servers) => servers,
    };
    let target: Option<&str> = match wanted {
        Some(name) if name == OWN_SERVER || servers.contains_key(name) => Some(name),
        Some(name) if desired.is_some() => {
            let names: Vec<&str> = servers.keys().map(String::as_str).collect();
            return RoutePlan::Pending(format!(
                "Caddy has no server '{name}' (it has: {}); correct 'caddyServer' in the configuration",
                if names.is_empty() { "none".to_string() } else { names.join(", ") }
            ));
        }
        Some(_) => None,
        None => servers.iter().find(|(_, s)| listens_on_https(s)).map(|(name, _)| name.as_str()),
    };
    let target = target.unwrap_or(OWN_SERVER);
    let mut requests = Vec::new();

    // Ours where it should not be: in other servers, or anywhere when no service has http.
    for (name, server) in servers {
        let ours = routes_of(server).iter().filter(|r| is_ours(r)).count();
        if ours == 0 || (name == target && desired.is_some()) {
            continue;
        }
        let path = format!("{SERVERS}/{}", segment(name));
        if own_server(name, server) {
            let what = format!("remove our server '{name}'");
            requests.push(AdminRequest { method: "DELETE", path, body: None, what });
        } else {
            let rest: Vec<&Value> = routes_of(server).iter().filter(|r| !is_ours(r)).collect();
            let what = format!("remove our route from server '{name}'");
            requests.push(AdminRequest::new("PATCH", format!("{path}/routes"), json!(rest), what));
        }
    }
    let Some(desired) = desired else {
        return if requests.is_empty() { RoutePlan::None } else { RoutePlan::Write(requests) };
    };

    let path = format!("{SERVERS}/{}", segment(target));
    let add = format!("add our route to server '{target}'");
    let Some(server) = servers.get(target) else {
        let made = json!({"listen": [":443"], "routes": [desired, not_found()]});
        let what = format!("make server '{target}' on :443 with our route");
        requests.push(AdminRequest::new("PUT", path, made, what));
        return RoutePlan::Write(requests);
    };
    let routes = routes_of(server);
    let ours: Vec<usize> = routes.iter().enumerate().filter(|(_, r)| is_ours(r)).map(|(i, _)| i).collect();
    requests.extend(match ours[..] {
        [0] if routes[0] == *desired => None,
        [0] => {
            let what = format!("replace our route in server '{target}'");
            Some(AdminRequest::new("PATCH", format!("/id/{ROUTE_ID}"), desired.clone(), what))
        }
        // Caddy inserts before a route that is there, not into an empty list.
        [] if !routes.is_empty() => {
            Some(AdminRequest::new("PUT", format!("{path}/routes/0"), desired.clone(), add))
        }
        [] => {
            let method = if server.get("routes").is_some() { "PATCH" } else { "PUT" };
            Some(AdminRequest::new(method, format!("{path}/routes"), json!([desired]), add))
        }
        // Not first, or more than once: the list is written anew, others' routes in their order.
        _ => {
            let mut all = vec![desired];
            all.extend(routes.iter().filter(|r| !is_ours(r)));
            let what = format!("put our route first in server '{target}'");
            Some(AdminRequest::new("PATCH", format!("{path}/routes"), json!(all), what))
        }
    });
    if requests.is_empty() { RoutePlan::Current } else { RoutePlan::Write(requests) }
}

impl AdminRequest {
    fn new(method: &'static str, path: String, body: Value, what: String) -> Self {
        AdminRequest { method, path, body: Some(body), what }
    }

    fn trial(method: &'static str, body: Option<Value>) -> Self {
        let what = "try whether Caddy reads ports from files".to_string();
        AdminRequest { method, path: format!("{SERVERS}/{TRIAL_SERVER}"), body, what }
    }

    /// Whether it is about the server that shows the configuration, which no visitor meets.
    fn is_view(&self) -> bool {
        self.path == format!("{SERVERS}/{VIEW_SERVER}")
    }
}

/// A server that shows everybody on the host what Caddy's own endpoint shows everybody by default, and changes
/// nothing: what is read there is asked for at the socket, and anything else refused.
fn view(socket: &Path) -> Value {
    let at = format!("unix/{}", socket.display());
    let refusal = json!({"error": format!(
        "this only shows Caddy's configuration; root changes it through {at}: 'systemctl reload caddy', or 'caddy reload \
         --address {at}'"
    )});
    let marked = json!({"handler": "headers", "response": {"set": {admin::VIEW_HEADER: ["1"]}}});
    json!({
        "listen": [format!("127.0.0.1:{VIEW_PORT}"), format!("[::1]:{VIEW_PORT}")],
        // Names of hosts would have it look for certificates.
        "automatic_https": {"disable": true},
        "routes": [
            {
                "match": [{
                    "method": ["GET", "HEAD"],
                    "path": ["/config/*", "/id/*", "/reverse_proxy/upstreams", "/metrics"],
                    // As Caddy's own does: a page in somebody's browser shall not reach it by a name of its own.
                    "host": ["localhost", "127.0.0.1", "::1"],
                }],
                "handle": [marked, {
                    "handler": "reverse_proxy",
                    "upstreams": [{"dial": at}],
                    // On a socket Caddy takes requests that name no host; versions before 2.7 no others.
                    "headers": {"request": {"set": {"Host": [""]}}},
                }],
                "terminal": true,
            },
            {"handle": [marked, {
                "handler": "static_response",
                "status_code": 403,
                "headers": {"Content-Type": ["application/json"]},
                "body": refusal.to_string(),
            }]},
        ],
    })
}

/// Adds to a plan what the server that shows the configuration needs: that it is there while Caddy is changed through
/// a socket, and is not while Caddy's own endpoint has that port, or another server does.
pub fn with_view(plan: RoutePlan, socket: Option<&Path>, observed: &CaddyState) -> RoutePlan {
    let CaddyState::Servers(servers) = observed else { return plan };
    let taken =
        servers.iter().any(|(name, server)| name != VIEW_SERVER && ports(server).contains(&VIEW_PORT));
    let wanted = socket.filter(|_| !taken).map(view);
    let (method, what) = match (servers.get(VIEW_SERVER), &wanted) {
        (Some(there), Some(wanted)) if there == wanted => return plan,
        (None, None) => return plan,
        (Some(_), Some(_)) => ("PATCH", "mend"),
        (None, Some(_)) => ("PUT", "make"),
        (Some(_), None) => ("DELETE", "remove"),
    };
    let request = AdminRequest {
        method,
        path: format!("{SERVERS}/{VIEW_SERVER}"),
        body: wanted,
        what: format!("{what} server '{VIEW_SERVER}', which shows Caddy's configuration on port {VIEW_PORT}"),
    };
    let mut requests = match plan {
        RoutePlan::Write(requests) => requests,
        RoutePlan::None | RoutePlan::Current => Vec::new(),
        RoutePlan::Pending(_) => return plan,
    };
    requests.push(request);
    RoutePlan::Write(requests)
}

/// Adds to a plan the removal of a trial's server that a killed pass has left.
fn without_trial(plan: RoutePlan, observed: &CaddyState) -> RoutePlan {
    let CaddyState::Servers(servers) = observed else { return plan };
    let mut requests = match plan {
        _ if !servers.contains_key(TRIAL_SERVER) => return plan,
        RoutePlan::Pending(_) => return plan,
        RoutePlan::None | RoutePlan::Current => Vec::new(),
        RoutePlan::Write(requests) => requests,
    };
    requests.push(AdminRequest::trial("DELETE", None));
    RoutePlan::Write(requests)
}

/// Whether something holds while Caddy also has this server; false if Caddy does not know all of its settings.
pub(super) fn with_trial(
    at: &Address,
    server: Value,
    holds: impl FnOnce() -> Result<bool, String>,
) -> Result<bool, String> {
    let answer = sent(at, &AdminRequest::trial("POST", Some(server)))?;
    if !answer.is_success() {
        // This is how every Caddy words it that does not know a setting.
        let unknown = String::from_utf8_lossy(&answer.body).contains("unknown field");
        return if unknown { Ok(false) } else { Err(format!("Caddy answered {}", answer.summary())) };
    }
    let held = holds();
    perform_one(at, &AdminRequest::trial("DELETE", None))?;
    held
}

/// Where a server listens: every address is `[NETWORK/]HOST:PORT[-LAST]`.
fn port_ranges(server: &Value) -> impl Iterator<Item = &str> {
    list(server, "listen").filter_map(Value::as_str).filter_map(|address| address.rsplit(':').next())
}

/// The ports that a server listens on.
fn ports(server: &Value) -> BTreeSet<u16> {
    port_ranges(server).filter_map(range).flat_map(|(first, last)| first..=last).collect()
}

/// The first and the last of `PORT[-LAST]`.
fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some((first.parse().ok()?, last.parse().ok()?))
}

impl CaddyState {
    /// Whether it can be told anything.
    pub fn is_available(&self) -> bool {
        matches!(self, CaddyState::Servers(_))
    }

    /// Whether our route may lead visitors to a port of this host: it does, or nobody can tell.
    pub fn may_lead_to(&self, port: u16) -> bool {
        self.may_dial(&format!("127.0.0.1:{port}"))
    }

    /// The same, of whatever an upstream is.
    pub fn may_dial(&self, dial: &str) -> bool {
        match self {
            CaddyState::Servers(servers) => servers
                .values()
                .flat_map(routes_of)
                .filter(|route| is_ours(route))
                .any(|r| dials(r, &|to| to == dial)),
            CaddyState::Unavailable(_) => true,
        }
    }

    /// Whether our route has an upstream whose port is in a file.
    pub fn reads_ports(&self) -> bool {
        let CaddyState::Servers(servers) = self else { return false };
        let mut ours = servers.values().flat_map(routes_of).filter(|route| is_ours(route));
        ours.any(|route| dials(route, &|to| to.starts_with(ports::DIALS_FILE)))
    }

    /// The ports that its servers listen on.
    pub fn ports(&self) -> BTreeSet<u16> {
        match self {
            CaddyState::Servers(servers) => servers.values().flat_map(ports).collect(),
            CaddyState::Unavailable(_) => BTreeSet::new(),
        }
    }

    /// The name of the server that has our route.
    pub fn server_of_ours(&self) -> Option<&str> {
        let CaddyState::Servers(servers) = self else { return None };
        let found = servers.iter().find(|(_, server)| routes_of(server).iter().any(is_ours));
        found.map(|(name, _)| name.as_str())
    }

    /// The server that has our route with this domain, and where it listens.
    pub(crate) fn listener(&self, domain: &str) -> Listener {
        let servers = match self {
            CaddyState::Unavailable(why) => return Listener::Unknown(why.clone()),
            CaddyState::Servers(servers) => servers,
        };
        let ours = |server: &Value| routes_of(server).iter().any(|route| leads(route, domain));
        let Some((name, server)) = servers.iter().find(|(_, server)| ours(server)) else {
            return Listener::NoRoute;
        };
        let listens: Vec<(IpAddr, u16, u16)> =
            list(server, "listen").filter_map(Value::as_str).filter_map(listen).collect();
        let at = |port: u16| {
            let found = listens.iter().find(|(_, first, last)| (*first..=*last).contains(&port));
            found.map(|(address, ..)| SocketAddr::new(*address, port))
        };
        let other = listens.first().map(|(address, first, _)| SocketAddr::new(*address, *first));
        Listener::Server { name: name.clone(), https: at(443), http: at(80), other }
    }

    /// Whether somebody else's route stands before ours and answers all visitors of the domain. What only adds to an answer
    /// lets requests go on to ours.
    pub fn is_behind(&self, domain: &str) -> bool {
        let CaddyState::Servers(servers) = self else { return false };
        servers.values().map(routes_of).any(|routes| {
            let ours = routes.iter().position(|route| leads(route, domain));
            ours.is_some_and(|at| routes[..at].iter().any(|route| takes(route, domain)))
        })
    }
}

fn list<'v>(value: &'v Value, key: &str) -> impl Iterator<Item = &'v Value> + use<'v> {
    value[key].as_array().into_iter().flatten()
}

/// Whether a route is ours, with this domain.
fn leads(route: &Value, domain: &str) -> bool {
    let named = |matcher: &Value| list(matcher, "host").any(|host| host == domain);
    is_ours(route) && list(route, "match").any(named)
}

/// Whether a route answers all visitors of a domain.
fn takes(route: &Value, domain: &str) -> bool {
    let covers = |host: &str| {
        let below = host.strip_prefix("*.");
        host == domain || below.is_some_and(|below| domain.split_once('.').is_some_and(|(_, d)| d == below))
    };
    let all = |matcher: &Value| {
        let named = list(matcher, "host").filter_map(Value::as_str).any(covers);
        matcher.as_object().is_some_and(|m| m.keys().all(|key| key == "host"))
            && (named || list(matcher, "host").next().is_none())
    };
    let answers = list(route, "handle").any(|handler| {
        let handler = handler["handler"].as_str();
        matches!(handler, Some("static_response" | "reverse_proxy" | "file_server"))
    });
    (answers || route["terminal"] == true)
        && (list(route, "match").next().is_none() || list(route, "match").any(all))
}

/// `[NETWORK/]HOST:PORT[-LAST]` as an address to connect to, and the first and last port.
fn listen(text: &str) -> Option<(IpAddr, u16, u16)> {
    let text = match text.split_once('/') {
        Some((network, rest)) if network.starts_with("tcp") => rest,
        Some(_) => return None,
        None => text,
    };
    let (host, ports) = text.rsplit_once(':')?;
    let (first, last) = range(ports)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = match host.parse::<IpAddr>() {
        Ok(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        Ok(address) => address,
        Err(_) => Ipv4Addr::LOCALHOST.into(),
    };
    Some((address, first, last))
}

/// Whether something in a route has such an address for its upstream.
fn dials(value: &Value, such: &dyn Fn(&str) -> bool) -> bool {
    match value {
        Value::Object(members) => {
            members.get("dial").and_then(Value::as_str).is_some_and(such)
                || members.values().any(|v| dials(v, such))
        }
        Value::Array(items) => items.iter().any(|item| dials(item, such)),
        _ => false,
    }
}

/// Caddy's answer to the question for its servers, not looked into yet.
pub type AdminResult = Result<admin::AdminResponse, String>;

/// Asks Caddy for its servers and reads the answer.
pub fn observe(at: &Address) -> CaddyState {
    read(at, ask(at))
}

/// The same for whoever only looks, and need not be root.
pub fn look(at: &Address) -> CaddyState {
    read(at, admin::shown(at, SERVERS))
}

/// Asks Caddy for its servers; an error is the reason why there is no answer, with the next move.
pub fn ask(at: &Address) -> AdminResult {
    admin::exchange(at, "GET", SERVERS, "")
}

/// What Caddy's answer says.
pub fn read(at: &Address, answer: AdminResult) -> CaddyState {
    let answer = match answer {
        Ok(answer) => answer,
        Err(why) => return CaddyState::Unavailable(why),
    };
    // Of an address that is not this machine's nobody can tell that it is Caddy who answers.
    if let Err(why) = bounds::check(&answer.body, BOUNDS) {
        return CaddyState::Unavailable(format!(
            "Caddy's answer at {at} cannot be read: {why}; make its configuration smaller, or correct 'caddyAdmin'"
        ));
    }
    match (answer.status, serde_json::from_slice::<Value>(&answer.body)) {
        (200, Ok(Value::Object(servers))) => CaddyState::Servers(servers),
        (200, Ok(Value::Null)) | (400 | 404, _) => CaddyState::Unavailable(format!(
            "Caddy at {at} has no http app to put a route into; give it a configuration with one server"
        )),
        (200, Err(_)) => {
            CaddyState::Unavailable(format!("Caddy's answer at {at} broke off; the next pass asks again"))
        }
        _ => CaddyState::Unavailable(format!("Caddy at {at} answered {}", answer.summary())),
    }
}

/// Who keeps Caddy from showing its configuration, if somebody does. Caddy would take nothing that it is given then.
fn view_kept_out() -> Option<String> {
    let addresses = [(Ipv4Addr::LOCALHOST, VIEW_PORT).into(), (Ipv6Addr::LOCALHOST, VIEW_PORT).into()];
    let seen = addresses.into_iter().filter_map(|address: SocketAddr| listeners::caddy_at(address).ok());
    let seen: Vec<Answers> = seen.map(|(answers, _)| answers).collect();
    let others = seen.iter().filter_map(Answers::others).flatten();
    let who: BTreeSet<String> = others.map(ToString::to_string).collect();
    let who: Vec<String> = who.into_iter().collect();
    let next = "what it says there is not Caddy's; stop that, the next pass tries again";
    (!who.is_empty()).then(|| format!("{} listens on port {VIEW_PORT}: {next}", who.join(" and ")))
}

/// Makes these requests, one after the other; the error is the reason.
pub fn perform(at: &Address, requests: &[AdminRequest]) -> Result<(), String> {
    requests.iter().try_for_each(|request| {
        match perform_one(at, request) {
            Ok(()) => log::notice(format!("route: {}", request.what)),
            // No visitor misses it.
            Err(why) if request.is_view() => log::warning(why),
            Err(why) => return Err(why),
        }
        Ok(())
    })
}

fn perform_one(at: &Address, request: &AdminRequest) -> Result<(), String> {
    if request.is_view()
        && request.body.is_some()
        && let Some(why) = view_kept_out()
    {
        return Err(format!("cannot {}: {why}", request.what));
    }
    let answer = sent(at, request).map_err(|why| format!("cannot {}: {why}", request.what))?;
    match answer.is_success() {
        true => Ok(()),
        false => Err(format!("cannot {}: Caddy answered {}", request.what, answer.summary())),
    }
}

fn sent(at: &Address, request: &AdminRequest) -> AdminResult {
    let body = request.body.as_ref().map(Value::to_string).unwrap_or_default();
    let _effect = crate::failpoint::mark(request.method, &request.path);
    admin::exchange(at, request.method, &request.path, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::ServiceName;
    use crate::runner::Run;
    use std::time::Duration;

    fn lead(domain: &str, path: &str, port: u16) -> Route {
        let service = ServiceName::parse(domain.trim_start_matches("*.")).unwrap();
        Route { service, domain: domain.into(), path: path.into(), port, own_port: port, closed: false }
    }

    fn servers(value: Value) -> CaddyState {
        CaddyState::Servers(value.as_object().unwrap().clone())
    }

    /// What Caddy would have after the requests; enough of its API for this module's own requests.
    fn apply(observed: &CaddyState, plan: &RoutePlan) -> CaddyState {
        let (CaddyState::Servers(servers), RoutePlan::Write(requests)) = (observed, plan) else {
            return observed.clone();
        };
        let mut servers = servers.clone();
        for r in requests {
            let parts: Vec<&str> = r.path.split('/').skip(1).collect();
            match (r.method, &parts[..]) {
                ("DELETE", ["config", "apps", "http", "servers", name]) => {
                    servers.remove(*name).unwrap();
                }
                ("PUT", ["config", "apps", "http", "servers", name]) => {
                    assert!(servers.insert(name.to_string(), r.body.clone().unwrap()).is_none());
                }
                ("PATCH" | "PUT", ["config", "apps", "http", "servers", name, "routes"]) => {
                    servers[*name]["routes"] = r.body.clone().unwrap();
                }
                ("PUT", ["config", "apps", "http", "servers", name, "routes", "0"]) => {
                    assert!(!routes_of(&servers[*name]).is_empty(), "array index out of bounds: 0");
                    servers[*name]["routes"].as_array_mut().unwrap().insert(0, r.body.clone().unwrap());
                }
                ("PATCH", ["id", ROUTE_ID]) => {
                    let mut places = servers.iter_mut().flat_map(|(_, s)| {
                        s["routes"].as_array_mut().unwrap().iter_mut().filter(|r| is_ours(r))
                    });
                    *places.next().unwrap() = r.body.clone().unwrap();
                }
                other => panic!("no such request in Caddy: {other:?}"),
            }
        }
        CaddyState::Servers(servers)
    }

    #[test]
    fn after_the_plan_nothing_is_left_to_do_and_others_are_untouched() {
        let a = lead("a.example.com", "/", 8080);
        let b = lead("b.example.com", "/api", 8081);
        let desired = route(&[a.clone(), b], None).unwrap();
        let old = route(&[a], None).unwrap();
        let foreign = json!({"handle": [{"handler": "static_response", "body": "theirs"}]});
        for (wanted, start) in [
            (None, json!({})),
            (None, json!({"srv0": {"listen": [":80"], "routes": [foreign]}})),
            (None, json!({"web": {"listen": ["0.0.0.0:443"], "routes": [foreign]}})),
            (None, json!({"web": {"listen": [":443"], "routes": [foreign, old]}})),
            (None, json!({"web": {"listen": [":443"], "routes": [old, foreign, old]}})),
            (None, json!({"web": {"listen": [":443"], "routes": [old, foreign]}})),
            (None, json!({"web": {"listen": [":443"]}})),
            (None, json!({"web": {"listen": [":443"], "routes": []}})),
            (
                Some("srv0"),
                json!({"srv0": {"listen": [":80"], "routes": []}, "deployer": {"listen": [":443"], "routes": [old, not_found()]}}),
            ),
            (
                Some("srv0"),
                json!({"srv0": {"listen": [":80"], "routes": [foreign]}, "web": {"listen": [":443"], "routes": [foreign, old]}}),
            ),
        ] {
            let start = servers(start);
            let first = plan(wanted, Some(&desired), &start);
            assert!(matches!(first, RoutePlan::Write(_)), "{start:?}");
            let after = apply(&start, &first);
            assert_eq!(plan(wanted, Some(&desired), &after), RoutePlan::Current, "{after:?}");
            let CaddyState::Servers(after_servers) = &after else { unreachable!() };
            let CaddyState::Servers(start_servers) = &start else { unreachable!() };
            for (name, server) in start_servers {
                let theirs = |s: &Value| routes_of(s).iter().filter(|r| **r == foreign).count();
                if theirs(server) > 0 {
                    assert_eq!(theirs(server), theirs(&after_servers[name]), "{name}");
                }
            }
            // And back: no trace of ours is left.
            let gone = plan(wanted, None, &after);
            let cleaned = apply(&after, &gone);
            assert_eq!(plan(wanted, None, &cleaned), RoutePlan::None);
            let CaddyState::Servers(cleaned) = cleaned else { unreachable!() };
            assert!(cleaned.values().all(|s| !routes_of(s).iter().any(is_ours)));
        }
    }

    #[test]
    fn the_outer_route_matches_every_domain_and_the_longest_path_comes_first() {
        let entries = [
            lead("a.example.com", "/", 1),
            lead("a.example.com", "/api/v2", 2),
            lead("a.example.com", "/api", 3),
            lead("*.example.com", "/", 4),
        ];
        let route = route(&entries, None).unwrap();
        assert_eq!(route["match"], json!([{"host": ["*.example.com", "a.example.com"]}]));
        let inner = route["handle"][0]["routes"].as_array().unwrap();
        let dials: Vec<&str> =
            inner.iter().map(|r| r["handle"][0]["upstreams"][0]["dial"].as_str().unwrap()).collect();
        assert_eq!(dials, ["127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:1", "127.0.0.1:4"]);
        assert_eq!(inner[1]["match"][0]["path"], json!(["/api", "/api/*"]));
    }

    #[test]
    fn the_configuration_is_shown_on_its_port_exactly_while_it_is_changed_through_a_socket() {
        let socket = Path::new("/run/caddy/admin.sock");
        let theirs = json!({"listen": [":443"]});
        let start = servers(json!({"srv0": theirs}));
        let RoutePlan::Write(first) = with_view(RoutePlan::Current, Some(socket), &start) else { panic!() };
        assert!(first.len() == 1 && first[0].method == "PUT" && first[0].is_view(), "{first:?}");
        let shown = servers(json!({"srv0": theirs, VIEW_SERVER: first[0].body}));
        assert_eq!(with_view(RoutePlan::Current, Some(socket), &shown), RoutePlan::Current);
        let gone = json!({"srv0": theirs, VIEW_SERVER: {"listen": ["127.0.0.1:2019"]}});
        let taken = json!({"mine": {"listen": [":2000-2020"]}, VIEW_SERVER: first[0].body});
        for (socket, observed, method) in [
            (Some(socket), servers(gone), "PATCH"),
            (Some(socket), servers(taken), "DELETE"),
            (None, shown, "DELETE"),
        ] {
            let RoutePlan::Write(requests) = with_view(RoutePlan::None, socket, &observed) else { panic!() };
            assert!(requests.len() == 1 && requests[0].method == method, "{requests:?}");
        }
        let down = CaddyState::Unavailable("down".into());
        assert_eq!(with_view(RoutePlan::None, Some(socket), &down), RoutePlan::None);
        assert_eq!(with_view(RoutePlan::None, None, &start), RoutePlan::None);
        assert_eq!(
            with_view(RoutePlan::None, Some(socket), &servers(json!({"a": {"listen": [":2019"]}}))),
            RoutePlan::None
        );
    }

    #[test]
    fn an_answer_that_would_cost_memory_is_not_read() {
        let at = Address::parse("http://caddy.internal:2019").unwrap();
        let read = |body: String| read(&at, Ok(admin::AdminResponse::of(200, body.into_bytes())));
        let many = format!("{{\"srv0\": {{\"routes\": [{}0]}}}}", "0,".repeat(BOUNDS.values));
        let deep = format!("{{\"srv0\": {}{}}}", "[".repeat(110), "]".repeat(110));
        for (body, word) in [(many, "values"), (deep, "nested")] {
            let CaddyState::Unavailable(why) = read(body) else { panic!("read") };
            assert!(why.contains(word) && why.contains("caddyAdmin"), "{why}");
        }
        // 8,000 services, and a configuration with ten subroutes within one another.
        let all: Vec<Route> = (0..8000).map(|n| lead(&format!("{n}.example.com"), "/api", 8080)).collect();
        let ours = route(&all, None).unwrap();
        let nested = (0..10).fold(json!([]), |inner, _| json!([{"handle": [{"routes": inner}]}]));
        let text = json!({"srv0": {"routes": [ours]}, "other": {"routes": nested}}).to_string();
        assert!((text.len() as u64) < admin::MAX_ANSWER, "{}", text.len());
        assert!(matches!(read(text), CaddyState::Servers(servers) if servers.len() == 2));
    }

    #[test]
    fn visitors_are_led_where_our_route_dials_or_caddy_does_not_say() {
        let (a, b) = (lead("a.example.com", "/", 8080), lead("b.example.com", "/x", 20_001));
        let ours = route(&[a.clone(), b], None).unwrap();
        let theirs =
            json!({"handle": [{"handler": "reverse_proxy", "upstreams": [{"dial": "127.0.0.1:9000"}]}]});
        let seen = servers(json!({"srv0": {"routes": [ours, theirs]}, "srv1": {}}));
        for (port, led) in [(8080, true), (20_001, true), (9000, false), (2000, false)] {
            assert_eq!(seen.may_lead_to(port), led, "{port}");
        }
        assert!(!servers(json!({})).may_lead_to(8080));
        assert!(CaddyState::Unavailable("down".into()).may_lead_to(8080));
    }

    #[test]
    fn the_ports_of_all_servers_are_known() {
        let observed = servers(json!({
            "a": {"listen": [":443", "tcp/127.0.0.1:8080-8082", "[::1]:80"]},
            "b": {"listen": ["unix//run/web.sock", "udp/:99999"]},
            "c": {},
        }));
        assert_eq!(observed.ports().into_iter().collect::<Vec<_>>(), [80, 443, 8080, 8081, 8082]);
        assert!(CaddyState::Unavailable("down".into()).ports().is_empty());
    }

    #[test]
    fn the_server_with_our_route_is_asked_where_it_listens() {
        let caddy = |listen: Value| {
            let route = json!({"@id": ROUTE_ID, "match": [{"host": ["*.example.com"]}]});
            let servers = json!({"a": {"listen": [":443"], "routes": [{"match": [{"host": ["*.example.com"]}]}]},
                "b": {"listen": listen, "routes": [route]}});
            self::servers(servers)
        };
        let at = |listen: Value| match caddy(listen).listener("*.example.com") {
            Listener::Server { name, https, http, other } if name == "b" => {
                [https, http, other].map(|a| a.map_or("-".to_string(), |a| a.to_string()))
            }
            listener => panic!("{listener:?}"),
        };
        assert_eq!(at(json!([":443"])), ["127.0.0.1:443", "-", "127.0.0.1:443"]);
        assert_eq!(at(json!(["unix//run/x", "tcp/[::1]:80-90"])), ["-", "[::1]:80", "[::1]:80"]);
        assert_eq!(at(json!(["192.0.2.1:8080"])), ["-", "-", "192.0.2.1:8080"]);
        assert_eq!(at(json!([])), ["-", "-", "-"]);
        assert_eq!(caddy(json!([":443"])).listener("example.com"), Listener::NoRoute);
    }

    #[test]
    fn a_route_that_stands_before_ours_and_answers_is_found() {
        let ours = json!({"@id": ROUTE_ID, "match": [{"host": ["shop.example.com"]}]});
        let says = json!([{"handler": "static_response"}]);
        let behind = |first: Value| {
            let servers = json!({"a": {"listen": [":443"], "routes": [first, ours]}});
            self::servers(servers).is_behind("shop.example.com")
        };
        for host in ["shop.example.com", "*.example.com"] {
            assert!(behind(json!({"match": [{"host": [host]}], "handle": says})), "{host}");
        }
        assert!(behind(json!({"handle": says})));
        assert!(behind(json!({"match": [{"host": ["shop.example.com"]}], "terminal": true})));
        for other in [
            json!({"match": [{"host": ["example.com"]}], "handle": says}),
            json!({"match": [{"host": ["*.com"]}], "handle": says}),
            json!({"match": [{"host": ["shop.example.com"], "path": ["/x"]}], "handle": says}),
            json!({"match": [{"path": ["/.well-known/*"]}], "handle": says}),
            json!({"handle": [{"handler": "headers"}]}),
        ] {
            assert!(!behind(other.clone()), "{other}");
        }
    }

    #[test]
    fn what_cannot_be_done_now_is_pending_with_a_reason() {
        let a = lead("a.example.com", "/", 8080);
        let desired = route(&[a], None).unwrap();
        let down = CaddyState::Unavailable("down".into());
        assert_eq!(plan(None, Some(&desired), &down), RoutePlan::Pending("down".into()));
        assert_eq!(plan(None, None, &down), RoutePlan::None);
        let RoutePlan::Pending(why) = plan(Some("nosuch"), Some(&desired), &servers(json!({"srv0": {}})))
        else {
            panic!("not pending")
        };
        assert!(why.contains("nosuch") && why.contains("srv0"), "{why}");
    }

    #[test]
    fn caddy_resumes_without_a_port_that_anybody_may_have_and_without_a_setting_that_it_does_not_know() {
        let contrib = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/contrib"));
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join(".config/caddy");
        fs_err::create_dir_all(&dir).unwrap();
        // Somebody's own server there is his affair.
        let theirs =
            json!({"automatic_https": {"disable": true}, "listen": ["127.0.0.1:2019", "[::1]:2019"]});
        let view = view(Path::new("/run/caddy/admin.sock"));
        let with = |view: &Value| json!({"apps": {"http": {"servers": {"a": theirs, VIEW_SERVER: view, "z": theirs}}}});
        let starts = |saved: &str, mode: &str| {
            fs_err::write(dir.join("autosave.json"), saved).unwrap();
            let script = contrib.join("systemd/caddy-start.sh");
            let run = Run::new("sh").arg(script).args([mode].iter().filter(|mode| !mode.is_empty()));
            let run = run.env("HOME", home.path()).without_env("XDG_CONFIG_HOME");
            run.deadline(Duration::from_secs(30)).output().unwrap();
            // Where this machine has a Caddyfile that was not seen yet, it is set aside.
            let now = fs_err::read_to_string(dir.join("autosave.json"));
            now.or_else(|_| fs_err::read_to_string(dir.join("autosave.json.before"))).unwrap()
        };
        let mut closed = view.clone();
        closed["listen"] = json!([]);
        let saved = with(&view).to_string();
        assert_eq!(starts(&saved, ""), with(&closed).to_string());
        // A Caddy that runs has it, and what is none of ours stays as it is.
        assert_eq!(starts(&saved, "reloaded"), saved);
        let none = json!({"apps": {"http": {"servers": {"a": theirs}}}}).to_string();
        assert_eq!(starts(&none, ""), none);
        let trial = |listen: Value, proxy: Value| {
            let off = json!({"disable": true});
            let tried = json!({"automatic_https": off, "listen": listen, "routes": [{"handle": [proxy]}]});
            json!({"apps": {"http": {"servers": {TRIAL_SERVER: tried, "z": theirs}}}}).to_string()
        };
        let without = json!({"handler": "reverse_proxy", "upstreams": [{"dial": "127.0.0.1:1"}]});
        let mut proxy = without.clone();
        proxy["stream_close_delay"] = STREAMS_STAY.into();
        let caddy = fs_err::read("/usr/bin/caddy").unwrap_or_default();
        let setting = b"stream_close_delay";
        let knows = caddy.windows(setting.len()).any(|at| at == setting);
        let closed_trial = trial(json!([]), if knows { proxy.clone() } else { without });
        assert_eq!(starts(&trial(json!(["127.0.0.1:4567"]), proxy), ""), closed_trial);
        assert_eq!(starts("", ""), "");

        // The pass gives it back.
        let observed = servers(json!({VIEW_SERVER: closed}));
        let plan = with_view(RoutePlan::Current, Some(Path::new("/run/caddy/admin.sock")), &observed);
        let RoutePlan::Write(requests) = plan else { panic!("{plan:?}") };
        assert_eq!((requests.len(), requests[0].method), (1, "PATCH"));
        assert!(requests[0].is_view() && requests[0].body == Some(view));

        // NixOS has a script of its own.
        let lines = |file: &str| {
            let text = fs_err::read_to_string(contrib.join(file)).unwrap();
            let those = text.lines().filter(|l| l.contains("sed 's/") || l.contains("stream_close_delay"));
            let it: Vec<String> =
                those.map(|l| l.trim().replace("${config.services.caddy.package}", "/usr")).collect();
            assert_eq!(it.len(), 2, "{file}");
            it
        };
        assert_eq!(lines("systemd/caddy-start.sh"), lines("nix/module.nix"));
    }
}
