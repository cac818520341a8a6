//! Reads the manifest from JSON, with the path of every mistake. Every field is read by one cursor that knows
//! where it stands; what a text may be is in [`super::rules`], what spans services in [`super::validate`].
//! Never reads a file and never guesses: what cannot be is refused.

use super::json::{self, At, shown};
use super::limits::Level;
use super::lineage::Ancestor;
use super::model::{
    Artifact, ArtifactPath, Change, DEFAULT_TIMEOUT_SEC, Exec, FORMAT_VERSION, Hardening, Health, Http,
    Manifest, Profile, Rollout, Service, Systemd,
};
use super::rules::{self, Rule};
use crate::clock::Timestamp;
use crate::error::{Error, did_you_mean};
use crate::names::{HostName, STORE_DIR, ServiceName, StorePath};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::RangeInclusive;

/// What happens to fields this version does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They are refused: input of a person.
    Strict,
    /// They are kept: what a newer version wrote.
    Tolerant,
}

/// A value that cannot be, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// `services[2].http.internalPort`; empty for the document itself.
    pub path: String,
    /// The reason with the value in it, and what is meant instead.
    pub reason: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.path, self.reason)
        }
    }
}

impl std::error::Error for FieldError {}

impl FieldError {
    /// Whether the document was written in a newer format, which no mending here can help.
    pub fn is_newer_version(&self) -> bool {
        self.path == "version" && self.reason.ends_with(NEWER)
    }
}

const NEWER: &str = "was written by a newer omni-deploy; upgrade this one";

impl From<FieldError> for Error {
    fn from(e: FieldError) -> Self {
        Error::new(e.to_string())
    }
}

type Parsed<T> = Result<T, FieldError>;

/// The highest serial: what every reader of JSON holds exactly.
pub const MAX_SERIAL: u64 = (1 << 53) - 1;

pub(super) const MANIFEST_FIELDS: &[&str] =
    &["version", "serial", "generation", "change", "previous", "store", "signatures", "services"];
pub(super) const CHANGE_FIELDS: &[&str] = &["action", "by"];
pub(super) const SERVICE_FIELDS: &[&str] = &[
    "name",
    "artifact",
    "hosts",
    "exec",
    "env",
    "envFile",
    "credentials",
    "http",
    "health",
    "rollout",
    "systemd",
    "hardening",
    "revision",
];
pub(super) const ARTIFACT_FIELDS: &[&str] = &["type", "storePath"];
pub(super) const EXEC_FIELDS: &[&str] = &["command", "user", "group"];
pub(super) const HTTP_FIELDS: &[&str] = &["domain", "path", "internalPort", "portEnv", "drainSec"];
pub(super) const HEALTH_FIELDS: &[&str] = &["path", "host", "timeoutSec"];
pub(super) const SYSTEMD_FIELDS: &[&str] = &[
    "after",
    "requires",
    "restart",
    "restartSec",
    "stateDirectory",
    "readWritePaths",
    "memoryMax",
    "cpuQuota",
    "workingDirectory",
    "stopTimeoutSec",
];
pub(super) const HARDENING_FIELDS: &[&str] =
    &["profile", "dynamicUser", "privateTmp", "protectSystem", "protectHome"];

/// The objects of a service that have fields of their own.
pub(super) const LEVELS: [(&str, &[&str]); 6] = [
    ("artifact", ARTIFACT_FIELDS),
    ("exec", EXEC_FIELDS),
    ("http", HTTP_FIELDS),
    ("health", HEALTH_FIELDS),
    ("systemd", SYSTEMD_FIELDS),
    ("hardening", HARDENING_FIELDS),
];

/// Reads and checks a whole manifest (each field, and what spans services).
pub fn manifest(bytes: &[u8], mode: Mode) -> Parsed<Manifest> {
    manifest_with(bytes, mode, None)
}

/// As [`manifest`]; `default_hosts` stand in for services that name none.
pub fn manifest_with(bytes: &[u8], mode: Mode, default_hosts: Option<&[HostName]>) -> Parsed<Manifest> {
    let list = At::Field(&At::Root, "services");
    let mut services = Vec::new();
    let mut first_error = None;
    let mut take = |index, value| {
        if first_error.is_none() {
            match service_at(value, &At::Item(&list, index), mode, default_hosts) {
                Ok(service) => services.push(service),
                Err(e) => first_error = Some(e),
            }
        }
    };
    let root = json::read(bytes, Level::Manifest, Some(("services", &mut take)))?;
    // A newer format is said first: what is wrong by today's rules may be right by its own.
    if let Some(version) = root.get("version") {
        check_version(version)?;
    }
    let mut fields = Fields::open(root, &At::Root, mode, MANIFEST_FIELDS, "a manifest")?;
    fields.required("version", "1 is meant")?;
    let serial = fields.number("serial", None, 0..=MAX_SERIAL, "a serial")?;
    let generation = fields.required("generation", "the time it was written is meant")?;
    let generation = text_of(generation, &fields.at("generation"), timestamp)?;
    let change = match fields.take("change") {
        None => Change::default(),
        Some(value) => change(value, &fields.at("change"), mode)?,
    };
    let previous =
        fields.texts("previous", Vec::new(), |text| Ancestor::parse(text).map(|a| a.to_string()))?;
    let store = fields.optional_text("store", rules::words)?;
    let signatures = fields.texts("signatures", Vec::new(), rules::words)?;
    match fields.required("services", "an array of services is meant")? {
        Value::Array(_) => {}
        other => return Err(wrong_type(&list, &other, "an array of services")),
    }
    if let Some(e) = first_error {
        return Err(e);
    }
    let manifest = Manifest {
        version: FORMAT_VERSION,
        serial,
        generation: Timestamp::parse(&generation).unwrap_or_default(),
        change,
        previous: previous.iter().filter_map(|text| Ancestor::parse(text).ok()).collect(),
        store,
        signatures,
        services,
        extra: fields.rest(),
    };
    super::validate::clashes(&manifest)?;
    Ok(manifest)
}

/// Reads and checks one service; `default_hosts` stand in when it names none.
pub fn service(value: Value, mode: Mode, default_hosts: Option<&[HostName]>) -> Parsed<Service> {
    service_at(value, &At::Root, mode, default_hosts)
}

/// As [`service`], from bytes, with every check of the text itself.
pub fn service_from(bytes: &[u8], mode: Mode, default_hosts: Option<&[HostName]>) -> Parsed<Service> {
    service(json::read(bytes, Level::Service, None)?, mode, default_hosts)
}

fn check_version(version: &Value) -> Parsed<()> {
    let at = At::Field(&At::Root, "version");
    match version.as_u64() {
        Some(FORMAT_VERSION) => Ok(()),
        Some(newer) if newer > FORMAT_VERSION => Err(at.error(format!("{newer} {NEWER}"))),
        _ => Err(
            at.error(format!("{} is not a version of the format; {FORMAT_VERSION} is meant", shown(version)))
        ),
    }
}

fn timestamp(text: &str) -> Result<String, String> {
    match Timestamp::parse(text) {
        Some(_) => Ok(text.into()),
        None => Err("is not a time; RFC 3339 is meant, such as 2026-11-22T18:31:05Z".into()),
    }
}

fn any_text(text: &str) -> Result<String, String> {
    Ok(text.into())
}

fn change(value: Value, at: &At<'_>, mode: Mode) -> Parsed<Change> {
    let mut fields = Fields::open(value, at, mode, CHANGE_FIELDS, "what was changed, and by whom,")?;
    Ok(Change {
        action: fields.text("action", Some(""), any_text)?,
        by: fields.text("by", Some(""), any_text)?,
        extra: fields.rest(),
    })
}

fn service_at(value: Value, at: &At<'_>, mode: Mode, default_hosts: Option<&[HostName]>) -> Parsed<Service> {
    let mut fields = Fields::open(value, at, mode, SERVICE_FIELDS, "a service")?;
    let name = fields.required("name", "the name of its unit is meant")?;
    let name = parsed_text(name, &fields.at("name"), "a name", ServiceName::parse)?;
    let artifact = fields.required("artifact", "{\"storePath\": \"/nix/store/…\"} is meant")?;
    let artifact = artifact_at(artifact, &fields.at("artifact"), mode)?;
    let hosts = match (fields.take("hosts"), default_hosts) {
        (Some(value), _) => hosts(value, &fields.at("hosts"))?,
        (None, Some(hosts)) if !hosts.is_empty() => hosts.to_vec(),
        (None, _) => {
            return Err(fields.at("hosts").error(
                "missing; name them, as in \"hosts\": [\"biz\"], or set 'defaultHosts' in the configuration",
            ));
        }
    };
    let exec = match fields.take("exec") {
        None => Exec::default(),
        Some(value) => exec(value, &fields.at("exec"), mode)?,
    };
    let env = match fields.take("env") {
        None => BTreeMap::new(),
        Some(value) => env(value, &fields.at("env"))?,
    };
    let env_file = fields.optional_text("envFile", secret_file(mode))?;
    let credentials = match fields.take("credentials") {
        None => BTreeMap::new(),
        Some(value) => credentials(value, &fields.at("credentials"), mode)?,
    };
    let http = match fields.take_set("http") {
        None => None,
        Some(value) => Some(http(value, &fields.at("http"), mode)?),
    };
    let health = match fields.take_set("health") {
        None => None,
        Some(value) => Some(health(value, &fields.at("health"), mode)?),
    };
    if let (None, Some(Health { path: Some(path), .. })) = (&http, &health) {
        let at = fields.at("health");
        let reason = format!(
            "{} needs http: without its internalPort there is nothing to ask",
            shown(&path[..].into())
        );
        return Err(At::Field(&at, "path").error(reason));
    }
    let rollout = match fields.text("rollout", Some("restart"), rollout)?.as_str() {
        "overlap" => Rollout::Overlap,
        _ => Rollout::Restart,
    };
    let systemd = match fields.take("systemd") {
        None => Systemd::default(),
        Some(value) => systemd(value, &fields.at("systemd"), mode)?,
    };
    let hardening = match fields.take("hardening") {
        None => Hardening::default(),
        Some(value) => hardening(value, &exec, &fields.at("hardening"), mode)?,
    };
    let revision = fields.optional_text("revision", rules::words)?;
    let at_rollout = fields.at("rollout").to_string();
    let service = Service {
        name,
        artifact,
        hosts,
        exec,
        env,
        env_file,
        credentials,
        http,
        health,
        rollout,
        systemd,
        hardening,
        revision,
        extra: fields.rest(),
    };
    match overlap_hindrance(&service) {
        Some(why) => Err(FieldError { path: at_rollout, reason: format!("\"overlap\" {why}") }),
        None => Ok(service),
    }
}

/// Why a service that is to overlap cannot run twice at once.
fn overlap_hindrance(service: &Service) -> Option<String> {
    if service.rollout != Rollout::Overlap {
        return None;
    }
    let Some(http) = &service.http else {
        return Some("needs http: requests are what it keeps going".into());
    };
    if service.port_variable().is_none() {
        let port = http.internal_port;
        return Some(match &http.port_env {
            Some(name) => format!("needs the variable '{name}' of http.portEnv in env"),
            None => format!(
                "needs the port in the environment, where a second instance can be given another: no variable of \
                 env is \"{port}\"; add one, as in \"PORT\": \"{port}\", or name it in http.portEnv"
            ),
        });
    }
    if service.hardening.dynamic_user && service.dynamic_user_name().is_none() {
        return Some(
            "with hardening.dynamicUser needs a name in exec.user, so that both instances are the same user"
                .into(),
        );
    }
    None
}

fn rollout(text: &str) -> Result<String, String> {
    rules::one_of(text, &["restart", "overlap"])
}

fn artifact_at(value: Value, at: &At<'_>, mode: Mode) -> Parsed<Artifact> {
    let mut fields = Fields::open(value, at, mode, ARTIFACT_FIELDS, "an artifact")?;
    let kind = fields.text("type", Some("nix-closure"), |t| rules::one_of(t, &["nix-closure"]))?;
    let path = fields.required("storePath", "the closure's top path is meant")?;
    let store_path = parsed_text(path, &fields.at("storePath"), "a store path", |text| {
        if text.strip_prefix(STORE_DIR) == Some("/placeholder") {
            return Ok(ArtifactPath::Placeholder);
        }
        StorePath::parse(text).map(ArtifactPath::Path)
    })?;
    Ok(Artifact { kind, store_path, extra: fields.rest() })
}

fn hosts(value: Value, at: &At<'_>) -> Parsed<Vec<HostName>> {
    let Value::Array(items) = value else {
        return Err(wrong_type(at, &value, "an array of host names"));
    };
    if items.is_empty() {
        return Err(at.error("[] names no host; a service runs on at least one"));
    }
    let mut seen = HashSet::new();
    let mut hosts = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let at = At::Item(at, index);
        let host = parsed_text(item, &at, "a host name", HostName::parse)?;
        if !seen.insert(host.clone()) {
            return Err(at.error(format!("{} stands twice; keep one", shown(&host.as_str().into()))));
        }
        hosts.push(host);
    }
    Ok(hosts)
}

fn exec(value: Value, at: &At<'_>, mode: Mode) -> Parsed<Exec> {
    let mut fields = Fields::open(value, at, mode, EXEC_FIELDS, "how it is started")?;
    Ok(Exec {
        command: fields.optional_text("command", rules::command)?,
        user: fields.text("user", Some("root"), rules::user)?,
        group: fields.text("group", Some("root"), rules::user)?,
        extra: fields.rest(),
    })
}

fn env(value: Value, at: &At<'_>) -> Parsed<BTreeMap<String, String>> {
    let Value::Object(map) = value else {
        return Err(wrong_type(at, &value, "an object of texts"));
    };
    let mut env = BTreeMap::new();
    for (name, value) in map {
        let at = At::Field(at, &name);
        rules::env_name(&name).map_err(|why| at.error(format!("{} {why}", shown(&name[..].into()))))?;
        let Value::String(text) = value else {
            return Err(wrong_type(&at, &value, "a string"));
        };
        rules::env_value(&text).map_err(|why| at.error(format!("{} {why}", shown(&text[..].into()))))?;
        env.insert(name, text);
    }
    Ok(env)
}

/// What is reserved since manifests with it could be written is refused from people alone.
fn secret_file(mode: Mode) -> Rule {
    match mode {
        Mode::Strict => rules::secret_file,
        Mode::Tolerant => rules::absolute,
    }
}

fn credentials(value: Value, at: &At<'_>, mode: Mode) -> Parsed<BTreeMap<String, String>> {
    let Value::Object(map) = value else {
        return Err(wrong_type(at, &value, "an object of paths"));
    };
    let mut credentials = BTreeMap::new();
    for (name, value) in map {
        let at = At::Field(at, &name);
        rules::credential_name(&name)
            .map_err(|why| at.error(format!("{} {why}", shown(&name[..].into()))))?;
        let path = parsed_text(value, &at, "the path of its file", secret_file(mode))?;
        credentials.insert(name, path);
    }
    Ok(credentials)
}

fn http(value: Value, at: &At<'_>, mode: Mode) -> Parsed<Http> {
    let mut fields = Fields::open(value, at, mode, HTTP_FIELDS, "how it is reached")?;
    let domain = fields.text("domain", None, rules::domain)?;
    let path = fields.text("path", Some("/"), rules::url_path)?;
    let port = fields.number("internalPort", None, 1..=65535, "a port")?;
    let port_env = fields.optional_text("portEnv", |t| rules::env_name(t).map(|()| t.to_string()))?;
    let drain_sec = fields.optional_number("drainSec", 0..=3600, "seconds")?.map(|n| n as u32);
    Ok(Http { domain, path, internal_port: port as u16, port_env, drain_sec, extra: fields.rest() })
}

fn health(value: Value, at: &At<'_>, mode: Mode) -> Parsed<Health> {
    let mut fields = Fields::open(value, at, mode, HEALTH_FIELDS, "how it shows that it is well")?;
    let path = fields.optional_text("path", rules::probe_path)?;
    let host = fields.optional_text("host", rules::host)?;
    if let (None, Some(host)) = (&path, &host) {
        let reason =
            format!("{} needs health.path: without it nobody is asked by name", shown(&host[..].into()));
        return Err(At::Field(at, "host").error(reason));
    }
    let default = Some(u64::from(DEFAULT_TIMEOUT_SEC));
    let timeout = fields.number("timeoutSec", default, 1..=3600, "a number of seconds")?;
    Ok(Health { path, host, timeout_sec: timeout as u32, extra: fields.rest() })
}

fn systemd(value: Value, at: &At<'_>, mode: Mode) -> Parsed<Systemd> {
    let mut fields = Fields::open(value, at, mode, SYSTEMD_FIELDS, "words for its unit")?;
    let default = Systemd::default();
    let seconds = "a number of seconds";
    let stop = fields.optional_number("stopTimeoutSec", 1..=3600, seconds)?.map(|n| n as u32);
    Ok(Systemd {
        after: fields.texts("after", default.after, rules::unit)?,
        requires: fields.texts("requires", default.requires, rules::unit)?,
        restart: fields.text("restart", Some(&default.restart), rules::restart)?,
        restart_sec: fields.number("restartSec", Some(default.restart_sec.into()), 0..=86_400, seconds)?
            as u32,
        state_directory: fields.optional_text("stateDirectory", rules::below_state)?,
        read_write_paths: fields.texts(
            "readWritePaths",
            Vec::new(),
            match mode {
                Mode::Strict => rules::writable,
                Mode::Tolerant => rules::writable_as_read,
            },
        )?,
        memory_max: fields.optional_text("memoryMax", rules::memory)?,
        cpu_quota: fields.optional_text("cpuQuota", rules::quota)?,
        working_directory: fields.optional_text("workingDirectory", rules::directory)?,
        stop_timeout_sec: stop,
        extra: fields.rest(),
    })
}

fn hardening(value: Value, exec: &Exec, at: &At<'_>, mode: Mode) -> Parsed<Hardening> {
    let mut fields = Fields::open(value, at, mode, HARDENING_FIELDS, "how far it is confined")?;
    let profile = match fields.text("profile", Some("default"), profile)?.as_str() {
        "strict" => Profile::Strict,
        _ => Profile::Default,
    };
    let default = Hardening::of(profile, exec);
    if let Some(Value::Bool(on)) = fields.map.get("protectSystem") {
        let word = if *on { "yes" } else { "no" };
        fields.map.insert("protectSystem".into(), word.into());
    }
    Ok(Hardening {
        profile,
        dynamic_user: fields.flag("dynamicUser", default.dynamic_user)?,
        private_tmp: fields.flag("privateTmp", default.private_tmp)?,
        protect_system: fields.text("protectSystem", Some(&default.protect_system), |text| {
            rules::one_of(text, &rules::PROTECT_SYSTEM)
        })?,
        protect_home: fields.flag("protectHome", default.protect_home)?,
        extra: fields.rest(),
    })
}

fn profile(text: &str) -> Result<String, String> {
    rules::one_of(text, &Profile::NAMES)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn wrong_type(at: &At<'_>, value: &Value, meant: &str) -> FieldError {
    at.error(match value {
        Value::Null => format!("null was found; {meant} is meant"),
        _ => format!("{} is {}; {meant} is meant", shown(value), kind(value)),
    })
}

/// A text that `parse` turns into something; control characters are refused first.
fn parsed_text<T>(
    value: Value,
    at: &At<'_>,
    meant: &str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Parsed<T> {
    let Value::String(text) = value else {
        return Err(wrong_type(at, &value, meant));
    };
    rules::clean(&text)
        .and_then(|()| parse(&text))
        .map_err(|why| at.error(format!("{} {why}", shown(&text.into()))))
}

fn text_of(value: Value, at: &At<'_>, rule: Rule) -> Parsed<String> {
    parsed_text(value, at, "a string", rule)
}

/// The most entries of a list: with that, a line of a unit stays below what systemd reads (LONG_LINE_MAX).
const MAX_TEXTS: usize = 1000;

/// An object whose fields are taken out one by one; what is left at the end are the unknown ones.
struct Fields<'a> {
    at: &'a At<'a>,
    map: Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn open(value: Value, at: &'a At<'a>, mode: Mode, known: &[&str], meant: &str) -> Parsed<Self> {
        let Value::Object(map) = value else {
            return Err(wrong_type(at, &value, &format!("an object with {meant}")));
        };
        if mode == Mode::Strict
            && let Some(name) = map.keys().find(|name| !known.contains(&name.as_str()))
        {
            return Err(unknown_field(&At::Field(at, name), name, known));
        }
        Ok(Fields { at, map })
    }

    fn at<'b>(&'b self, name: &'b str) -> At<'b> {
        At::Field(self.at, name)
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name)
    }

    /// As [`Fields::take`]; null counts as absent.
    fn take_set(&mut self, name: &str) -> Option<Value> {
        self.take(name).filter(|v| !v.is_null())
    }

    fn required(&mut self, name: &str, meant: &str) -> Parsed<Value> {
        match self.take(name) {
            Some(value) => Ok(value),
            None => Err(self.at(name).error(format!("missing; {meant}"))),
        }
    }

    fn text(&mut self, name: &str, default: Option<&str>, rule: Rule) -> Parsed<String> {
        match (self.take(name), default) {
            (Some(value), _) => text_of(value, &self.at(name), rule),
            (None, Some(default)) => Ok(default.into()),
            (None, None) => Err(self.at(name).error("missing; a string is meant")),
        }
    }

    fn optional_text(&mut self, name: &str, rule: Rule) -> Parsed<Option<String>> {
        match self.take_set(name) {
            None => Ok(None),
            Some(value) => parsed_text(value, &self.at(name), "a string or null", rule).map(Some),
        }
    }

    fn texts(&mut self, name: &str, default: Vec<String>, rule: Rule) -> Parsed<Vec<String>> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Array(items)) => {
                let at = self.at(name);
                if items.len() > MAX_TEXTS {
                    return Err(
                        at.error(format!("has {} entries; at most {MAX_TEXTS} are possible", items.len()))
                    );
                }
                let read = |(index, item)| text_of(item, &At::Item(&at, index), rule);
                items.into_iter().enumerate().map(read).collect()
            }
            Some(other) => Err(wrong_type(&self.at(name), &other, "an array of strings")),
        }
    }

    fn flag(&mut self, name: &str, default: bool) -> Parsed<bool> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Bool(on)) => Ok(on),
            Some(other) => Err(wrong_type(&self.at(name), &other, "true or false")),
        }
    }

    fn number(
        &mut self,
        name: &str,
        default: Option<u64>,
        range: RangeInclusive<u64>,
        what: &str,
    ) -> Parsed<u64> {
        let meant = format!("{} to {}", range.start(), range.end());
        match (self.take(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.at(name).error(format!("missing; {what} is meant, {meant}"))),
            (Some(Value::Number(n)), _) => match n.as_u64().filter(|n| range.contains(n)) {
                Some(n) => Ok(n),
                None => Err(self.at(name).error(format!("{n} is not {what}; {meant} is meant"))),
            },
            (Some(other), _) => {
                Err(wrong_type(&self.at(name), &other, &format!("a whole number from {meant}")))
            }
        }
    }

    fn optional_number(&mut self, name: &str, range: RangeInclusive<u64>, what: &str) -> Parsed<Option<u64>> {
        match self.map.get(name) {
            None | Some(Value::Null) => {
                self.take(name);
                Ok(None)
            }
            Some(_) => self.number(name, None, range, what).map(Some),
        }
    }

    fn rest(self) -> Map<String, Value> {
        self.map
    }
}

/// Fields are often written one level too high: those below a service are offered for one of its own.
fn unknown_field(at: &At<'_>, name: &str, known: &[&str]) -> FieldError {
    let mut candidates: Vec<String> = known.iter().map(|k| k.to_string()).collect();
    if known == SERVICE_FIELDS {
        for (above, below) in LEVELS {
            candidates.extend(below.iter().map(|field| format!("{above}.{field}")));
        }
    }
    at.error(format!("unknown field{}", did_you_mean(name, candidates.iter().map(String::as_str))))
}

/// A field that a service does not have, with those it may stand for.
pub(super) fn unknown_in_service(at: &At<'_>, name: &str) -> FieldError {
    unknown_field(&At::Field(at, name), name, SERVICE_FIELDS)
}

/// The first field that this version does not know in `manifest` and that `before` did not have at the same
/// place (services are told apart by name): what a person typed, as against what a newer version wrote.
pub fn new_unknown(manifest: &Manifest, before: Option<&Manifest>) -> Option<FieldError> {
    let Manifest {
        version: _,
        serial: _,
        generation: _,
        change,
        previous: _,
        store: _,
        signatures: _,
        services,
        extra,
    } = manifest;
    let root = At::Root;
    new_in(&root, extra, before.map(|b| &b.extra), MANIFEST_FIELDS)
        .or_else(|| {
            let at = At::Field(&root, "change");
            new_in(&at, &change.extra, before.map(|b| &b.change.extra), CHANGE_FIELDS)
        })
        .or_else(|| {
            let list = At::Field(&root, "services");
            let known: BTreeMap<&str, &Service> =
                before.iter().flat_map(|b| &b.services).map(|s| (s.name.as_str(), s)).collect();
            services.iter().enumerate().find_map(|(index, service)| {
                new_unknown_at(&At::Item(&list, index), service, known.get(service.name.as_str()).copied())
            })
        })
}

/// As [`new_unknown`], for one service.
pub fn new_unknown_in_service(service: &Service, before: Option<&Service>) -> Option<FieldError> {
    new_unknown_at(&At::Root, service, before)
}

fn new_unknown_at(at: &At<'_>, service: &Service, before: Option<&Service>) -> Option<FieldError> {
    extras(service).into_iter().enumerate().find_map(|(nth, (field, extra, known))| {
        let before = before.and_then(|b| extras(b)[nth].1);
        let extra = extra?;
        match field {
            "" => new_in(at, extra, before, known),
            _ => new_in(&At::Field(at, field), extra, before, known),
        }
    })
}

/// The first path in `manifest` that people may not write any more and that `before` did not have for the same service:
/// of what a person edited, which is read tolerantly.
pub fn new_reserved(manifest: &Manifest, before: Option<&Manifest>) -> Option<FieldError> {
    let list = At::Field(&At::Root, "services");
    let known: BTreeMap<&str, &Service> =
        before.iter().flat_map(|b| &b.services).map(|s| (s.name.as_str(), s)).collect();
    manifest.services.iter().enumerate().find_map(|(index, service)| {
        new_reserved_at(&At::Item(&list, index), service, known.get(service.name.as_str()).copied())
    })
}

/// As [`new_reserved`], for one service.
pub fn new_reserved_in_service(service: &Service, before: Option<&Service>) -> Option<FieldError> {
    new_reserved_at(&At::Root, service, before)
}

fn new_reserved_at(at: &At<'_>, service: &Service, before: Option<&Service>) -> Option<FieldError> {
    let wrong = |text: &String, at: &At<'_>, rule: Rule| text_of(Value::String(text.clone()), at, rule).err();
    let env_file = || {
        let file = service.env_file.as_ref()?;
        let is_new = before.and_then(|b| b.env_file.as_ref()) != Some(file);
        is_new.then(|| wrong(file, &At::Field(at, "envFile"), rules::secret_file))?
    };
    let credential = || {
        let above = At::Field(at, "credentials");
        let is_new =
            |name: &String, file: &String| before.and_then(|b| b.credentials.get(name)) != Some(file);
        let mut new = service.credentials.iter().filter(|(name, file)| is_new(name, file));
        new.find_map(|(name, file)| wrong(file, &At::Field(&above, name), rules::secret_file))
    };
    let writable = || {
        let above = At::Field(at, "systemd");
        let list = At::Field(&above, "readWritePaths");
        let is_new = |path: &String| !before.is_some_and(|b| b.systemd.read_write_paths.contains(path));
        let mut new = service.systemd.read_write_paths.iter().enumerate().filter(|(_, path)| is_new(path));
        new.find_map(|(index, path)| wrong(path, &At::Item(&list, index), rules::writable))
    };
    env_file().or_else(credential).or_else(writable)
}

fn new_in(
    at: &At<'_>,
    extra: &Map<String, Value>,
    before: Option<&Map<String, Value>>,
    known: &[&str],
) -> Option<FieldError> {
    let name = extra.keys().find(|name| !before.is_some_and(|b| b.contains_key(*name)))?;
    Some(unknown_field(&At::Field(at, name), name, known))
}

type Extra<'a> = (&'static str, Option<&'a Map<String, Value>>, &'static [&'static str]);

/// The unknown fields of a service, level by level, always in this order. Destructured whole, so that a new
/// level cannot be forgotten.
fn extras(service: &Service) -> [Extra<'_>; 7] {
    let Service {
        name: _,
        artifact,
        hosts: _,
        exec,
        env: _,
        env_file: _,
        credentials: _,
        http,
        health,
        rollout: _,
        systemd,
        hardening,
        revision: _,
        extra,
    } = service;
    [
        ("", Some(extra), SERVICE_FIELDS),
        ("artifact", Some(&artifact.extra), ARTIFACT_FIELDS),
        ("exec", Some(&exec.extra), EXEC_FIELDS),
        ("http", http.as_ref().map(|h| &h.extra), HTTP_FIELDS),
        ("health", health.as_ref().map(|h| &h.extra), HEALTH_FIELDS),
        ("systemd", Some(&systemd.extra), SYSTEMD_FIELDS),
        ("hardening", Some(&hardening.extra), HARDENING_FIELDS),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FIXTURE: &[u8] = include_bytes!("../../tests/fixtures/manifest-v1.json");

    fn whole() -> Value {
        serde_json::from_slice(FIXTURE).unwrap()
    }

    fn read(value: &Value, mode: Mode) -> Parsed<Manifest> {
        manifest(value.to_string().as_bytes(), mode)
    }

    #[test]
    fn todays_code_reads_the_first_version_and_writes_it_back_byte_for_byte() {
        let read = manifest(FIXTURE, Mode::Strict).unwrap();
        assert_eq!(String::from_utf8(read.to_bytes()).unwrap(), String::from_utf8(FIXTURE.to_vec()).unwrap());
        assert_eq!(manifest(&read.to_bytes(), Mode::Strict).unwrap(), read);
        let ava = read.service("ava").unwrap();
        assert_eq!((ava.timeout_sec(), ava.env["GREETING"].as_str()), (60, "100% \"free\" \\ $HOME"));
    }

    #[test]
    fn every_mistake_is_refused_with_its_path_its_value_and_what_is_meant() {
        let long = "x".repeat(200_000);
        for (pointer, value, message) in [
            ("/version", json!(2), "version: 2 was written by a newer omni-deploy; upgrade this one"),
            ("/version", json!(0), "version: 0 is not a version"),
            ("/version", json!("1"), "version: \"1\" is not a version"),
            ("/serial", json!("7"), "serial: \"7\" is a string; a whole number from 0"),
            ("/serial", json!(-1), "serial: -1 is not a serial"),
            ("/serial", json!(1.5), "serial: 1.5 is not a serial"),
            ("/generation", json!("yesterday"), "generation: \"yesterday\" is not a time"),
            ("/generation", json!(5), "generation: 5 is a number; a string is meant"),
            ("/change", json!("x"), "change: \"x\" is a string; an object with"),
            ("/change/action", json!("a\nb"), "change.action: \"a\\nb\" has the control character \\n"),
            ("/change/by", json!("a\u{202e}b"), "change.by: "),
            ("/services", json!({}), "services: {} is an object; an array of services"),
            ("/sevices", json!([]), "sevices: unknown field; did you mean 'services'?"),
            ("/services/1", json!(null), "services[1]: null was found; an object with a service is meant"),
            (
                "/services/0/port",
                json!(80),
                "services[0].port: unknown field; did you mean 'http.internalPort' or 'http.portEnv'?",
            ),
            ("/services/0/nmae", json!(80), "services[0].nmae: unknown field; did you mean 'name'"),
            ("/services/0/a b", json!(80), "services[0][\"a b\"]: unknown field"),
            ("/services/0/name", json!("../x"), "services[0].name: \"../x\" has '/'"),
            (
                "/services/0/name",
                json!("ssh.service"),
                "services[0].name: \"ssh.service\" ends with '.service'",
            ),
            ("/services/0/name", json!(7), "services[0].name: 7 is a number; a name is meant"),
            ("/services/0/name", json!("a\u{0}"), "services[0].name: \"a\\u0000\" has the control character"),
            ("/services/1/name", json!("ava"), "services[1].name: \"ava\" is the name of services[0]"),
            ("/services/0/artifact", json!("x"), "services[0].artifact: \"x\" is a string; an object"),
            (
                "/services/0/artifact/type",
                json!("docker"),
                "services[0].artifact.type: \"docker\" is not known; one of nix-closure",
            ),
            (
                "/services/0/artifact/storePath",
                json!("/nix/store/x"),
                "services[0].artifact.storePath: \"/nix/store/x\" is not a store path",
            ),
            (
                "/services/0/artifact/storePath",
                json!("/nix/store/placeholder/"),
                "services[0].artifact.storePath",
            ),
            ("/services/0/artifact/storePath", json!(null), "services[0].artifact.storePath: null was found"),
            ("/services/0/hosts", json!([]), "services[0].hosts: [] names no host"),
            (
                "/services/0/hosts",
                json!("biz"),
                "services[0].hosts: \"biz\" is a string; an array of host names",
            ),
            ("/services/0/hosts", json!(["biz", "biz"]), "services[0].hosts[1]: \"biz\" stands twice"),
            ("/services/0/hosts", json!(["-oProxyCommand=x"]), "services[0].hosts[0]: "),
            (
                "/services/0/exec/command",
                json!("'a"),
                "services[0].exec.command: \"'a\" has a ' that is never closed",
            ),
            ("/services/0/exec/command", json!(" "), "services[0].exec.command: \" \" has no word"),
            (
                "/services/0/exec/command",
                json!("../../bin/sh"),
                "services[0].exec.command: \"../../bin/sh\" has '..'",
            ),
            ("/services/0/exec/command", json!("a\nExecStart=b"), "services[0].exec.command: "),
            (
                "/services/0/exec/command",
                json!(["a"]),
                "services[0].exec.command: [\"a\"] is an array; a string or null",
            ),
            ("/services/0/exec/user", json!("a b"), "services[0].exec.user: \"a b\" is no user"),
            ("/services/0/exec/group", json!(null), "services[0].exec.group: null was found"),
            ("/services/0/env", json!([]), "services[0].env: [] is an array; an object of texts"),
            ("/services/0/env/1A", json!("x"), "services[0].env.1A: \"1A\" is no name of a variable"),
            ("/services/0/env/A-B", json!("x"), "services[0].env[\"A-B\"]: \"A-B\" is no name of a variable"),
            (
                "/services/0/env/PORT",
                json!(8080),
                "services[0].env.PORT: 8080 is a number; a string is meant",
            ),
            (
                "/services/0/env/PORT",
                json!("a\nb"),
                "services[0].env.PORT: \"a\\nb\" has the control character",
            ),
            ("/services/0/env/PORT", json!("a\u{0}"), "services[0].env.PORT: "),
            ("/services/0/env/PORT", json!(long), "services[0].env.PORT: \"xxx"),
            ("/services/0/envFile", json!("ava.env"), "services[0].envFile: \"ava.env\" is not absolute"),
            ("/services/0/envFile", json!("/a/../b"), "services[0].envFile: \"/a/../b\" has '..'"),
            (
                "/services/0/credentials",
                json!([]),
                "services[0].credentials: [] is an array; an object of paths",
            ),
            (
                "/services/0/credentials",
                json!({"a:b": "/s"}),
                "services[0].credentials[\"a:b\"]: \"a:b\" is no name of a credential",
            ),
            (
                "/services/0/credentials",
                json!({"..": "/s"}),
                "services[0].credentials[\"..\"]: \"..\" is no name of a credential",
            ),
            ("/services/0/credentials", json!({"key": null}), "services[0].credentials.key: null was found"),
            (
                "/services/0/credentials",
                json!({"key": "s/key"}),
                "services[0].credentials.key: \"s/key\" is not absolute",
            ),
            ("/services/0/credentials", json!({"key": "/s/../key"}), "services[0].credentials.key: "),
            (
                "/services/0/credentials",
                json!({"key": "/s/%n"}),
                "services[0].credentials.key: \"/s/%n\" has '%'",
            ),
            ("/services/0/credentials", json!({"key": "/s\nUser=root"}), "services[0].credentials.key: "),
            ("/services/0/http", json!(80), "services[0].http: 80 is a number; an object"),
            (
                "/services/0/http/internalPort",
                json!(99999),
                "services[0].http.internalPort: 99999 is not a port; 1 to 65535 is meant",
            ),
            ("/services/0/http/internalPort", json!(0), "services[0].http.internalPort: 0 is not a port"),
            (
                "/services/0/http/internalPort",
                json!("8080"),
                "services[0].http.internalPort: \"8080\" is a string; a whole number",
            ),
            (
                "/services/0/http/port",
                json!(80),
                "services[0].http.port: unknown field; did you mean 'internalPort' or 'portEnv'?",
            ),
            ("/services/0/http/domain", json!("a_b.c"), "services[0].http.domain: \"a_b.c\" has '_'"),
            ("/services/0/http/domain", json!("bücher.de"), "services[0].http.domain: \"bücher.de\" has 'ü'"),
            ("/services/0/http/path", json!("/{x}"), "services[0].http.path: \"/{x}\" has '{'"),
            ("/services/0/http/path", json!("api"), "services[0].http.path: \"api\" does not begin with '/'"),
            ("/services/0/health/path", json!("/a b"), "services[0].health.path: \"/a b\" has ' '"),
            (
                "/services/0/health/host",
                json!("*.example.com"),
                "services[0].health.host: \"*.example.com\" is a pattern; one name is meant, such as www.example.com",
            ),
            (
                "/services/0/health/timeoutSec",
                json!(0),
                "services[0].health.timeoutSec: 0 is not a number of seconds",
            ),
            ("/services/0/http", json!(null), "services[0].health.path: \"/health?deep=1\" needs http"),
            ("/services/0/rollout", json!("canary"), "services[0].rollout: \"canary\" is not known"),
            ("/services/0/systemd/after", json!(["x"]), "services[0].systemd.after[0]: \"x\" is no unit"),
            ("/services/0/systemd/requires", json!("x.service"), "services[0].systemd.requires: "),
            (
                "/services/0/systemd/after",
                json!(vec!["x.service"; 1001]),
                "services[0].systemd.after: has 1001 entries; at most 1000 are possible",
            ),
            ("/services/0/env/PORT", json!("a\u{fffe}"), "services[0].env.PORT: \"a\u{fffe}\" has \\u{fffe}"),
            (
                "/services/0/systemd/restart",
                json!("on-crash"),
                "services[0].systemd.restart: \"on-crash\" is not known",
            ),
            ("/services/0/systemd/restartSec", json!(86_401), "services[0].systemd.restartSec: 86401 is not"),
            (
                "/services/0/systemd/memoryMax",
                json!(512),
                "services[0].systemd.memoryMax: 512 is a number; a string",
            ),
            (
                "/services/0/systemd/cpuQuota",
                json!("1.5"),
                "services[0].systemd.cpuQuota: \"1.5\" is no share",
            ),
            ("/services/0/systemd/stateDirectory", json!("../x"), "services[0].systemd.stateDirectory: "),
            (
                "/services/0/systemd/stateDirectory",
                json!("./deployer"),
                "services[0].systemd.stateDirectory: \"./deployer\" would give the deployer's state (/var/lib/deployer)",
            ),
            (
                "/services/0/systemd/stateDirectory",
                json!("deployer-secrets//ava"),
                "services[0].systemd.stateDirectory: \"deployer-secrets//ava\" would give the services' secrets",
            ),
            (
                "/services/0/systemd/readWritePaths",
                json!(["/srv", "/run/./omni-deploy"]),
                "services[0].systemd.readWritePaths[1]: \"/run/./omni-deploy\" would open the deployer's locks",
            ),
            (
                "/services/0/systemd/readWritePaths",
                json!(["/"]),
                "services[0].systemd.readWritePaths[0]: \"/\" is the root",
            ),
            ("/services/0/systemd/workingDirectory", json!("x"), "services[0].systemd.workingDirectory: "),
            (
                "/services/0/systemd/stopTimeoutSec",
                json!(3601),
                "services[0].systemd.stopTimeoutSec: 3601 is not",
            ),
            (
                "/services/0/hardening/protectSystem",
                json!("all"),
                "services[0].hardening.protectSystem: \"all\" is not known",
            ),
            (
                "/services/0/hardening/profile",
                json!("strickt"),
                "services[0].hardening.profile: \"strickt\" is not known; one of default, strict is meant; did you mean 'strict'",
            ),
            ("/services/0/hardening/profile", json!(null), "services[0].hardening.profile: null was found"),
            (
                "/services/0/hardening/privateTmp",
                json!("yes"),
                "services[0].hardening.privateTmp: \"yes\" is a string; true or false",
            ),
            ("/services/0/revision", json!("a\tb"), "services[0].revision: "),
            ("/services/0/revision", json!(5), "services[0].revision: 5 is a number"),
        ] {
            let mut document = whole();
            let (above, name) = pointer.rsplit_once('/').unwrap();
            match document.pointer_mut(above).unwrap() {
                Value::Array(items) => items[name.parse::<usize>().unwrap()] = value,
                other => other[name] = value,
            }
            let error = read(&document, Mode::Strict).map(|_| ()).unwrap_err().to_string();
            assert!(error.starts_with(message), "{pointer}: {error}");
            assert!(!error.contains('\n') && error.len() < 400, "{pointer}: {error}");
        }
        for (missing, message) in [
            ("/version", "version: missing"),
            ("/serial", "serial: missing"),
            ("/generation", "generation: missing"),
            ("/services", "services: missing"),
            ("/services/0/name", "services[0].name: missing"),
            ("/services/0/artifact", "services[0].artifact: missing"),
            ("/services/0/artifact/storePath", "services[0].artifact.storePath: missing"),
            ("/services/0/hosts", "services[0].hosts: missing"),
            ("/services/0/http/domain", "services[0].http.domain: missing"),
            ("/services/0/http/internalPort", "services[0].http.internalPort: missing"),
        ] {
            let mut document = whole();
            let (above, name) = missing.rsplit_once('/').unwrap();
            document.pointer_mut(above).unwrap().as_object_mut().unwrap().remove(name);
            let error = read(&document, Mode::Tolerant).unwrap_err().to_string();
            assert!(error.starts_with(message), "{missing}: {error}");
        }
    }

    #[test]
    fn a_newer_version_is_said_before_anything_else_is_wrong() {
        for text in
            [r#"{"services": "later", "version": 2}"#, r#"{"services": [{"new": 1}], "x": 1, "version": 9}"#]
        {
            for mode in [Mode::Strict, Mode::Tolerant] {
                let error = manifest(text.as_bytes(), mode).unwrap_err();
                assert!(error.is_newer_version(), "{error}");
            }
        }
    }

    #[test]
    fn unknown_fields_of_every_level_survive_and_are_refused_from_a_person() {
        let levels = [
            "",
            "/change",
            "/services/0",
            "/services/0/artifact",
            "/services/0/exec",
            "/services/0/http",
            "/services/0/health",
            "/services/0/systemd",
            "/services/0/hardening",
        ];
        let later = json!({"deep": [1, -2.5, null, "ü\n"], "b": true});
        let mut all = whole();
        for level in levels {
            let mut one = whole();
            for document in [&mut one, &mut all] {
                document.pointer_mut(level).unwrap()["later"] = later.clone();
            }
            assert!(read(&one, Mode::Strict).unwrap_err().path.ends_with("later"), "{level}");
            let parsed = read(&one, Mode::Tolerant).unwrap();
            let error = new_unknown(&parsed, None).unwrap_or_else(|| panic!("{level}: nothing new"));
            assert!(error.path.ends_with("later"), "{error}");
            assert_eq!(new_unknown(&parsed, Some(&parsed)), None, "{level}");
        }
        let written = read(&all, Mode::Tolerant).unwrap().to_bytes();
        assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), all);
        let base = read(&whole(), Mode::Strict).unwrap();
        assert_eq!(new_unknown(&base, None), None);
        assert!(new_unknown(&read(&all, Mode::Tolerant).unwrap(), Some(&base)).is_some());
    }

    #[test]
    fn what_is_reserved_since_is_read_where_it_was_and_refused_where_a_person_writes_it() {
        let document = whole();
        let plain = read(&document, Mode::Tolerant).unwrap();
        for (pointer, value, message) in [
            ("/services/0/envFile", json!("/etc/omni-deploy/deployer.env"), "envFile: \"/etc/omni-deploy"),
            ("/services/0/credentials", json!({"key": "/proc/1/environ"}), "credentials.key: \"/proc/1"),
            (
                "/services/0/systemd/readWritePaths",
                json!(["/srv/web-data", "/etc"]),
                "systemd.readWritePaths[1]: \"/etc\" would open the deployer's configuration",
            ),
        ] {
            let mut document = document.clone();
            let (above, name) = pointer.rsplit_once('/').unwrap();
            document.pointer_mut(above).unwrap()[name] = value;
            let error = read(&document, Mode::Strict).map(|_| ()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("services[0].{message}")), "{error}");
            // An older manifest keeps no host from the others, and no person from changing something else.
            let old = read(&document, Mode::Tolerant).unwrap();
            assert_eq!(new_reserved(&old, Some(&old)), None, "{pointer}");
            let (service, before) = (&old.services[0], &plain.services[0]);
            assert_eq!(new_reserved_in_service(service, Some(service)), None, "{pointer}");
            let error = new_reserved_in_service(service, Some(before)).unwrap().to_string();
            assert!(error.starts_with(message), "{error}");
            for before in [None, Some(&plain)] {
                let error = new_reserved(&old, before).unwrap().to_string();
                assert!(error.starts_with(&format!("services[0].{message}")), "{error}");
            }
        }
        assert_eq!(new_reserved(&plain, None), None);
    }

    #[test]
    fn what_a_service_leaves_out_has_its_default() {
        let bare = json!({"name": "ava", "artifact": {"storePath": "/nix/store/placeholder"}});
        let error = service(bare.clone(), Mode::Strict, None).unwrap_err().to_string();
        assert!(error.starts_with("hosts: missing") && error.contains("defaultHosts"), "{error}");
        let hosts = [HostName::parse("biz").unwrap()];
        let read = service(bare, Mode::Strict, Some(&hosts)).unwrap();
        assert_eq!(
            serde_json::to_value(&read).unwrap(),
            json!({"name": "ava", "artifact": {"type": "nix-closure", "storePath": "/nix/store/placeholder"},
                "hosts": ["biz"], "exec": {"command": null, "user": "root", "group": "root"}, "env": {},
                "envFile": null, "http": null, "health": null, "rollout": "restart",
                "systemd": {"after": ["network-online.target"], "requires": [], "restart": "on-failure", "restartSec": 5},
                "hardening": {"dynamicUser": false, "privateTmp": true, "protectSystem": "strict", "protectHome": true},
                "revision": null})
        );
        let http = json!({"name": "a", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["b"],
            "http": {"domain": "A.Org", "internalPort": 80}, "health": {}, "hardening": {"protectSystem": false}});
        let read = service(http, Mode::Strict, None).unwrap();
        assert_eq!(read.http.map(|h| (h.domain, h.path)), Some(("a.org".into(), "/".into())));
        assert_eq!(
            (read.health.map(|h| h.timeout_sec), read.hardening.protect_system.as_str()),
            (Some(30), "no")
        );
    }

    #[test]
    fn the_strict_profile_makes_a_user_unless_one_is_given_and_explicit_fields_hold() {
        for (fields, dynamic_user, written) in [
            (json!({}), false, None),
            (json!({"hardening": {"profile": "default"}}), false, None),
            (json!({"hardening": {"profile": "strict"}}), true, Some("strict")),
            (json!({"hardening": {"profile": "strict"}, "exec": {"user": "root"}}), true, Some("strict")),
            (
                json!({"hardening": {"profile": "strict"}, "exec": {"user": "www-data"}}),
                false,
                Some("strict"),
            ),
            (json!({"hardening": {"profile": "strict", "dynamicUser": false}}), false, Some("strict")),
            (
                json!({"hardening": {"profile": "strict", "dynamicUser": true}, "exec": {"user": "ava"}}),
                true,
                Some("strict"),
            ),
        ] {
            let mut entry =
                json!({"name": "ava", "hosts": ["biz"], "artifact": {"storePath": "/nix/store/placeholder"}});
            entry.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let read = service(entry, Mode::Strict, None).unwrap();
            assert_eq!(read.hardening.dynamic_user, dynamic_user, "{fields}");
            let value = serde_json::to_value(&read).unwrap();
            assert_eq!(value["hardening"].get("profile").and_then(Value::as_str), written, "{fields}");
            assert_eq!(service(value, Mode::Strict, None).unwrap(), read, "{fields}");
        }
    }

    #[test]
    fn credentials_are_read_in_their_normal_form_and_written_back() {
        let entry = json!({"name": "ava", "hosts": ["biz"], "artifact": {"storePath": "/nix/store/placeholder"},
            "credentials": {"tls.key": "/s//key:1", "token": "/s/./token"}});
        let read = service(entry, Mode::Strict, None).unwrap();
        let value = serde_json::to_value(&read).unwrap();
        assert_eq!(value["credentials"], json!({"tls.key": "/s/key:1", "token": "/s/token"}));
        let files: Vec<&std::path::Path> = read.secret_files().collect();
        assert_eq!(files, [std::path::Path::new("/s/key:1"), std::path::Path::new("/s/token")]);
    }

    #[test]
    fn any_manifest_that_was_read_is_read_the_same_after_writing() {
        // Every subset of the optional fields of the fixture's first service.
        let fields = ["exec", "env", "envFile", "health", "systemd", "hardening", "revision", "rollout"];
        for subset in 0..1u32 << fields.len() {
            let mut document = whole();
            let service = document["services"][0].as_object_mut().unwrap();
            for (bit, field) in fields.iter().enumerate() {
                if subset & (1 << bit) != 0 {
                    service.remove(*field);
                }
            }
            let first = read(&document, Mode::Strict).unwrap();
            assert_eq!(manifest(&first.to_bytes(), Mode::Strict).unwrap(), first, "{subset:b}");
        }
    }

    #[test]
    fn a_service_overlaps_only_where_a_second_instance_can_be_given_its_port() {
        let http = json!({"domain": "a.example.com", "internalPort": 8080});
        for (fields, reason) in [
            (json!({"http": null}), Some("needs http")),
            (json!({"http": http}), Some("no variable of env is \"8080\"")),
            (json!({"http": http, "env": {"PORT": "8080"}}), None),
            (json!({"http": http, "env": {"LISTEN": "8080"}}), None),
            (json!({"http": http, "env": {"A": "8080", "PORT": "8080"}}), None),
            (json!({"http": http, "env": {"A": "8080", "B": "8080"}}), Some("no variable")),
            (
                json!({"http": {"domain": "a.b", "internalPort": 1, "portEnv": "P"}, "env": {"PORT": "1"}}),
                Some("'P' of http.portEnv"),
            ),
            (
                json!({"http": http, "env": {"PORT": "8080"}, "hardening": {"dynamicUser": true}}),
                Some("a name in exec.user"),
            ),
            (json!({"http": http, "env": {"PORT": "8080"}, "hardening": {"profile": "strict"}}), None),
            (
                json!({"name": "a.b", "http": http, "env": {"PORT": "8080"}, "hardening": {"profile": "strict"}}),
                Some("a name in exec.user"),
            ),
        ] {
            let mut service = json!({
                "name": "ava", "hosts": ["biz"], "rollout": "overlap",
                "artifact": {"storePath": "/nix/store/placeholder"},
            });
            let entries = fields.as_object().unwrap().clone();
            service.as_object_mut().unwrap().extend(entries);
            let parsed = super::service(service, Mode::Strict, None);
            match reason {
                None => assert_eq!(parsed.unwrap().rollout, Rollout::Overlap, "{fields}"),
                Some(reason) => {
                    let error = parsed.unwrap_err();
                    assert!(error.path.ends_with("rollout") && error.reason.contains(reason), "{error}");
                }
            }
        }
    }
}
