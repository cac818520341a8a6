//! Reads the manifest from JSON. Its form is that of the types in [`super::model`]; here is where a mistake stands, what
//! of an entry spans several fields, and what a person may not add. What spans services is in [`super::validate`].
//! Never reads a file and never guesses: what cannot be is refused, with all that is wrong with an entry at once.

use super::error::{FieldError, MOST_SAID, ManifestError};
use super::json::{self, field, shown};
use super::limits::{self, Level};
use super::model::{Manifest, OBJECTS, Service};
use super::rules;
use super::types::{FORMAT_VERSION, Rollout};
use crate::error::did_you_mean;
use crate::names::HostName;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value};
use serde_path_to_error::Segment;
use std::collections::{BTreeMap, HashSet};

/// What a person may write, as against what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// No fields that this version does not know, and no paths that are reserved: input of a person.
    Strict,
    /// These are kept: what a newer version wrote, or an older one.
    Tolerant,
}

/// Reads and checks a whole manifest (each field, and what spans services).
pub fn manifest(bytes: &[u8], mode: Mode) -> Result<Manifest, ManifestError> {
    manifest_with(bytes, mode, None)
}

/// As [`manifest`]; `default_hosts` stand in for services that name none.
pub fn manifest_with(
    bytes: &[u8],
    mode: Mode,
    default_hosts: Option<&[HostName]>,
) -> Result<Manifest, ManifestError> {
    check_document(bytes, Level::Manifest)?;
    let mut manifest: Manifest =
        serde_json::from_slice(bytes).map_err(|e| mistakes_of_manifest(bytes, e, mode))?;
    if mode == Mode::Strict {
        ManifestError::unless_empty(unknown_besides_services(&manifest, None))?;
    }
    for (index, service) in manifest.services.iter_mut().enumerate() {
        let mistakes = settled(service, mode, default_hosts);
        ManifestError::unless_empty(below_service(index, mistakes))?;
    }
    super::validate::clashes(&manifest)?;
    Ok(manifest)
}

/// Reads and checks one service; `default_hosts` stand in when it names none.
pub fn service(
    value: Value,
    mode: Mode,
    default_hosts: Option<&[HostName]>,
) -> Result<Service, ManifestError> {
    service_from(value.to_string().as_bytes(), mode, default_hosts)
}

/// As [`service`], from bytes.
pub fn service_from(
    bytes: &[u8],
    mode: Mode,
    default_hosts: Option<&[HostName]>,
) -> Result<Service, ManifestError> {
    check_document(bytes, Level::Service)?;
    let mut service: Service = match serde_json::from_slice(bytes) {
        Ok(service) => service,
        Err(e) => {
            let mistakes = not_json(bytes, e).map_or_else(|| mistakes_of_service(bytes, mode), |e| vec![e]);
            return Err(ManifestError::Mistakes(mistakes));
        }
    };
    let mistakes = settled(&mut service, mode, default_hosts);
    ManifestError::unless_empty(mistakes).map(|()| service)
}

/// Settles a service that was read; what is wrong with it as a whole, and what a person may not write.
fn settled(service: &mut Service, mode: Mode, default_hosts: Option<&[HostName]>) -> Vec<FieldError> {
    let mut mistakes = service.settle(default_hosts);
    if mode == Mode::Strict {
        mistakes.extend(additions(service, None));
    }
    mistakes
}

fn check_document(bytes: &[u8], level: Level) -> Result<(), FieldError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(FieldError::new("", "empty: there is nothing to read"));
    }
    limits::document(bytes, level)
}

impl Service {
    /// What its fields mean together: defaults that depend on others are filled in, and what contradicts is returned.
    pub(crate) fn settle(&mut self, default_hosts: Option<&[HostName]>) -> Vec<FieldError> {
        let mut mistakes = Vec::new();
        let mut wrong = |path: &str, reason: String| mistakes.push(FieldError::new(path, reason));
        if self.hosts.is_empty() {
            self.hosts = default_hosts.unwrap_or_default().to_vec();
        }
        if self.hosts.is_empty() {
            wrong(
                "hosts",
                "missing; name them, as in \"hosts\": [\"biz\"], or set 'defaultHosts' in the configuration"
                    .into(),
            );
        }
        let mut seen = HashSet::with_capacity(self.hosts.len());
        for (index, host) in self.hosts.iter().enumerate().filter(|(_, host)| !seen.insert(*host)) {
            wrong(&format!("hosts[{index}]"), format!("{} is a duplicate; keep one", shown(host)));
        }
        if let Some(health) = &self.health {
            match (&health.path, &health.host) {
                (Some(path), _) if self.http.is_none() => {
                    let reason = "needs http: without its internalPort there is nothing to ask";
                    wrong("health.path", format!("{} {reason}", shown(path)));
                }
                (None, Some(host)) => {
                    let reason = "needs health.path: without it no request is made";
                    wrong("health.host", format!("{} {reason}", shown(host)));
                }
                (Some(_) | None, _) => {}
            }
        }
        self.hardening.dynamic_user = Some(self.dynamic_user());
        if let Some(why) = overlap_obstacle(self) {
            wrong("rollout", format!("\"overlap\" {why}"));
        }
        mistakes
    }
}

/// Why a service that is to overlap cannot run twice at once.
fn overlap_obstacle(service: &Service) -> Option<String> {
    if service.rollout != Rollout::Overlap {
        return None;
    }
    let Some(http) = &service.http else {
        return Some("needs http: it is for services that answer requests".into());
    };
    if service.port_variable().is_none() {
        let port = http.internal_port.get();
        return Some(match &http.port_env {
            Some(name) => format!("needs the variable '{name}' of http.portEnv in env"),
            None => format!(
                "needs the port in the environment, where a second instance can be given another: no variable of \
                 env is \"{port}\"; add one, as in \"PORT\": \"{port}\", or name it in http.portEnv"
            ),
        });
    }
    if service.dynamic_user() && service.dynamic_user_name().is_none() {
        return Some(
            "with hardening.dynamicUser needs a name in exec.user, so that both instances are the same user"
                .into(),
        );
    }
    None
}

/// Why bytes that could not be read are no JSON, if that is what is wrong with them.
fn not_json(bytes: &[u8], e: serde_json::Error) -> Option<FieldError> {
    use serde_json::error::Category;
    // Said before what is wrong with the part in front.
    let e = serde_json::from_slice::<IgnoredAny>(bytes).err().unwrap_or(e);
    match e.classify() {
        Category::Data => None,
        Category::Eof => {
            let (line, column) = (e.line(), e.column());
            let reason = format!("cut off: it ends at line {line} column {column} in the middle");
            Some(FieldError::new("", reason))
        }
        Category::Syntax | Category::Io => Some(FieldError::new("", format!("not JSON: {e}"))),
    }
}

/// What is wrong with a manifest that could not be read.
fn mistakes_of_manifest(bytes: &[u8], e: serde_json::Error, mode: Mode) -> ManifestError {
    #[derive(Deserialize)]
    struct Head {
        version: u64,
    }
    // A newer format is said first: what is wrong by today's rules may be right by its own. serde would read it from an
    // array as well.
    if bytes.trim_ascii_start().starts_with(b"{")
        && let Ok(Head { version }) = serde_json::from_slice(bytes)
        && version > FORMAT_VERSION
    {
        return ManifestError::Newer(version);
    }
    if let Some(e) = not_json(bytes, e) {
        return e.into();
    }
    for (index, entry) in json::elements(bytes, "services").into_iter().enumerate() {
        let mistakes = mistakes_of_service(entry, mode);
        if !mistakes.is_empty() {
            return ManifestError::Mistakes(below_service(index, mistakes));
        }
    }
    let mut mistakes = Vec::new();
    if mode == Mode::Strict {
        let fields: BTreeMap<String, IgnoredAny> = serde_json::from_slice(bytes).unwrap_or_default();
        let unknown = fields.keys().filter(|name| !Manifest::FIELDS.contains(&name.as_str()));
        mistakes.extend(unknown.map(|name| unknown_field("", name, Manifest::FIELDS)));
    }
    mistakes.extend(read_located::<Manifest>(bytes).err().map(|(path, reason)| located(&path, reason)));
    ManifestError::Mistakes(mistakes)
}

fn below_service(index: usize, mistakes: Vec<FieldError>) -> Vec<FieldError> {
    mistakes.into_iter().map(|e| e.below(&format!("services[{index}]"))).collect()
}

/// Of an entry that is larger than this, one mistake is found at a time.
const MAX_EXAMINED: usize = 1 << 20;

/// What is wrong with the fields of an entry, one by one; none if it can be read.
fn mistakes_of_service(bytes: &[u8], mode: Mode) -> Vec<FieldError> {
    let Err((path, reason)) = read_located::<Service>(bytes) else { return Vec::new() };
    let mut mistakes = vec![located(&path, reason)];
    let tree = if bytes.len() > MAX_EXAMINED { None } else { serde_json::from_slice::<Value>(bytes).ok() };
    let Some(mut tree) = tree else { return mistakes };
    // What is wrong is taken out, until the rest can be read.
    let mut next = path;
    while mistakes.len() <= MOST_SAID && take_out(&mut tree, &next).is_some() {
        match read_located::<Service>(tree.to_string().as_bytes()) {
            Ok(rest) if mode == Mode::Strict => {
                mistakes.extend(additions(&rest, None));
                break;
            }
            Ok(_) => break,
            Err((path, reason)) => {
                mistakes.push(located(&path, reason));
                next = path;
            }
        }
    }
    mistakes
}

/// A place in a document, and what is wrong there.
type Located = (Vec<Segment>, String);

/// Reads bytes that are JSON, with the place of what is wrong.
fn read_located<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Located> {
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_slice(bytes)).map_err(|e| {
        let mut path: Vec<Segment> = e.path().iter().cloned().collect();
        let e = e.into_inner();
        // The place is said better by the path.
        let position = format!(" at line {} column {}", e.line(), e.column());
        let reason = e.to_string();
        let reason = reason.strip_suffix(&position).unwrap_or(&reason);
        // serde says it of the object that lacks the field.
        match reason.strip_prefix("missing field `").and_then(|name| name.strip_suffix('`')) {
            Some(name) => {
                path.push(Segment::Map { key: name.into() });
                (path, "missing; it is required".into())
            }
            None => (path, brief(reason)),
        }
    })
}

/// A reason for one line: without its middle when it is long, nothing in it that a terminal obeys.
fn brief(reason: &str) -> String {
    const HALF: usize = 150;
    let from_end = |n: usize| reason.char_indices().rev().nth(n).map_or(0, |(at, _)| at);
    let brief = match reason.char_indices().nth(HALF) {
        Some((end, _)) if end < from_end(HALF) => format!("{}…{}", &reason[..end], &reason[from_end(HALF)..]),
        _ => reason.to_string(),
    };
    crate::log::printable(&brief).into_owned()
}

fn located(path: &[Segment], reason: String) -> FieldError {
    let path = path.iter().fold(String::new(), |above, segment| match segment {
        Segment::Seq { index } => format!("{above}[{index}]"),
        Segment::Map { key } => field(&above, key),
        Segment::Enum { .. } | Segment::Unknown => above,
    });
    FieldError::new(path, reason)
}

/// Takes a field out of an entry; one that must be there becomes what can be read. Of a list all is taken out, so that
/// what is left of it keeps its places.
fn take_out(entry: &mut Value, path: &[Segment]) -> Option<()> {
    let names = path.iter().map_while(|segment| match segment {
        Segment::Map { key } => Some(key.as_str()),
        Segment::Seq { .. } | Segment::Enum { .. } | Segment::Unknown => None,
    });
    let names: Vec<&str> = names.collect();
    let (last, above) = names.split_last()?;
    let object = above.iter().try_fold(entry, |node, name| node.get_mut(name))?.as_object_mut()?;
    let readable = match names[..] {
        ["name"] | ["http", "domain"] => "x".into(),
        ["http", "internalPort"] => 1.into(),
        ["artifact", "storePath"] => "/nix/store/placeholder".into(),
        ["artifact"] => serde_json::json!({"storePath": "/nix/store/placeholder"}),
        _ => return object.remove(*last).map(drop),
    };
    object.insert((*last).into(), readable);
    Some(())
}

/// A field that is not one of these.
fn unknown_field(above: &str, name: &str, known: &[&str]) -> FieldError {
    let reason = format!("unknown field{}", did_you_mean(name, known.iter().copied()));
    FieldError::new(field(above, name), reason)
}

/// A field that a service, or an object in it, does not have, with those it may stand for. Fields are often written one
/// level too high: those below a service are offered for one of its own.
pub(super) fn unknown_in_service(object: &str, name: &str) -> FieldError {
    if let Some((_, fields)) = OBJECTS.iter().find(|(above, _)| *above == object) {
        return unknown_field(object, name, fields);
    }
    let below = |(above, fields): &(&str, &[&str])| -> Vec<String> {
        fields.iter().map(|name| field(above, name)).collect()
    };
    let below: Vec<String> = OBJECTS.iter().flat_map(below).collect();
    let known: Vec<&str> = below.iter().map(String::as_str).chain(Service::FIELDS.iter().copied()).collect();
    unknown_field("", name, &known)
}

/// What a person may not have added to `before`, at the first place that has any: fields that this version does not
/// know, and reserved paths. Services are told apart by name.
pub fn check_additions(manifest: &Manifest, before: Option<&Manifest>) -> Result<(), ManifestError> {
    ManifestError::unless_empty(unknown_besides_services(manifest, before))?;
    let known: BTreeMap<&str, &Service> =
        before.iter().flat_map(|b| &b.services).map(|s| (s.name.as_str(), s)).collect();
    manifest.services.iter().enumerate().try_for_each(|(index, service)| {
        let mistakes = additions(service, known.get(service.name.as_str()).copied());
        ManifestError::unless_empty(below_service(index, mistakes))
    })
}

/// As [`check_additions`], for one service.
pub fn check_additions_to_service(service: &Service, before: &Service) -> Result<(), ManifestError> {
    ManifestError::unless_empty(additions(service, Some(before)))
}

/// The first field that this version does not know.
pub fn first_unknown(manifest: &Manifest) -> Option<FieldError> {
    let in_services = manifest.services.iter().enumerate();
    let in_services =
        in_services.flat_map(|(index, service)| below_service(index, new_unknown(service, None)));
    unknown_besides_services(manifest, None).into_iter().chain(in_services).next()
}

fn unknown_besides_services(manifest: &Manifest, before: Option<&Manifest>) -> Vec<FieldError> {
    let top = new_names(&manifest.extra, before.map(|b| &b.extra));
    let top = top.map(|name| unknown_field("", name, Manifest::FIELDS));
    let below = new_names(&manifest.change.extra, before.map(|b| &b.change.extra));
    top.chain(below.map(|name| unknown_field("change", name, super::Change::FIELDS))).collect()
}

fn additions(service: &Service, before: Option<&Service>) -> Vec<FieldError> {
    let mut mistakes = new_unknown(service, before);
    mistakes.extend(new_reserved(service, before));
    mistakes
}

fn new_unknown(service: &Service, before: Option<&Service>) -> Vec<FieldError> {
    let before = before.map(unknown_fields);
    let mut mistakes = Vec::new();
    for (nth, (object, extra)) in unknown_fields(service).into_iter().enumerate() {
        let before = before.as_ref().and_then(|b| b[nth].1);
        let new = extra.into_iter().flat_map(|extra| new_names(extra, before));
        mistakes.extend(new.map(|name| unknown_in_service(object, name)));
    }
    mistakes
}

fn new_names<'a>(
    extra: &'a Map<String, Value>,
    before: Option<&'a Map<String, Value>>,
) -> impl Iterator<Item = &'a String> {
    extra.keys().filter(move |name| !before.is_some_and(|b| b.contains_key(*name)))
}

/// The fields that this version does not know, of a service and of each of [`OBJECTS`].
fn unknown_fields(service: &Service) -> [(&'static str, Option<&Map<String, Value>>); 1 + OBJECTS.len()] {
    let Service { artifact, exec, http, health, systemd, hardening, extra, .. } = service;
    [
        ("", Some(extra)),
        ("artifact", Some(&artifact.extra)),
        ("exec", Some(&exec.extra)),
        ("http", http.as_ref().map(|h| &h.extra)),
        ("health", health.as_ref().map(|h| &h.extra)),
        ("systemd", Some(&systemd.extra)),
        ("hardening", Some(&hardening.extra)),
    ]
}

/// The paths that people may not write any more, and that are read where they have been.
fn new_reserved(service: &Service, before: Option<&Service>) -> Vec<FieldError> {
    type Rule = fn(&str) -> Result<String, String>;
    let mut mistakes = Vec::new();
    let mut check = |at: &dyn Fn() -> String, path: &str, rule: Rule| {
        let why = rule(path).err();
        mistakes.extend(why.map(|why| FieldError::new(at(), format!("{} {why}", shown(path)))));
    };
    if let Some(file) = &service.env_file
        && before.and_then(|b| b.env_file.as_ref()) != Some(file)
    {
        check(&|| "envFile".into(), file, rules::secret_file);
    }
    for (name, file) in &service.credentials {
        if before.and_then(|b| b.credentials.get(name)) != Some(file) {
            check(&|| field("credentials", name), file, rules::secret_file);
        }
    }
    for (index, path) in service.systemd.read_write_paths.iter().enumerate() {
        if !before.is_some_and(|b| b.systemd.read_write_paths.contains(path)) {
            check(&|| format!("systemd.readWritePaths[{index}]"), path, rules::writable);
        }
    }
    mistakes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FIXTURE: &[u8] = include_bytes!("../../tests/fixtures/manifest-v1.json");

    fn whole() -> Value {
        serde_json::from_slice(FIXTURE).unwrap()
    }

    fn read(value: &Value, mode: Mode) -> Result<Manifest, ManifestError> {
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
            (
                "/version",
                json!(0),
                "version: invalid value: integer `0`, expected a version of the format, 1",
            ),
            (
                "/version",
                json!("1"),
                "version: invalid type: string \"1\", expected a version of the format, 1",
            ),
            (
                "/serial",
                json!("7"),
                "serial: invalid type: string \"7\", expected a version number from 0 to 9007199254740991",
            ),
            ("/serial", json!(-1), "serial: invalid value: integer `-1`, expected a version number from 0"),
            ("/serial", json!(1.5), "serial: invalid type: floating point `1.5`, expected a version number"),
            ("/generation", json!("yesterday"), "generation: \"yesterday\" is not a time"),
            ("/generation", json!(5), "generation: invalid type: integer `5`, expected a string"),
            ("/change", json!("x"), "change: invalid type: string \"x\", expected an object"),
            ("/change/action", json!("a\nb"), "change.action: \"a\\nb\" has the control character \\n"),
            ("/change/by", json!("a\u{202e}b"), "change.by: "),
            ("/services", json!({}), "services: invalid type: map, expected a sequence"),
            ("/sevices", json!([]), "sevices: unknown field; did you mean 'services'?"),
            ("/services/1", json!(null), "services[1]: invalid type: null, expected an object"),
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
            ("/services/0/name", json!(7), "services[0].name: invalid type: integer `7`, expected a string"),
            (
                "/services/0/name",
                json!("a\u{0}"),
                "services[0].name: \"a\\0\" has '\\0'; a unit name has only ASCII",
            ),
            ("/services/1/name", json!("ava"), "services[1].name: \"ava\" is the name of services[0]"),
            (
                "/services/0/artifact",
                json!("x"),
                "services[0].artifact: invalid type: string \"x\", expected an object",
            ),
            (
                "/services/0/artifact/type",
                json!("docker"),
                "services[0].artifact.type: \"docker\" is not known; expected one of nix-closure",
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
            (
                "/services/0/artifact/storePath",
                json!(null),
                "services[0].artifact.storePath: invalid type: null",
            ),
            ("/services/0/hosts", json!([]), "services[0].hosts: [] names no host"),
            (
                "/services/0/hosts",
                json!("biz"),
                "services[0].hosts: invalid type: string \"biz\", expected an array of strings",
            ),
            ("/services/0/hosts", json!(["biz", "biz"]), "services[0].hosts[1]: \"biz\" is a duplicate"),
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
                "services[0].exec.command: invalid type: sequence, expected a string",
            ),
            ("/services/0/exec/user", json!("a b"), "services[0].exec.user: \"a b\" is not a valid user"),
            ("/services/0/exec/group", json!(null), "services[0].exec.group: invalid type: null"),
            ("/services/0/env", json!([]), "services[0].env: invalid type: sequence, expected a map"),
            (
                "/services/0/env/1A",
                json!("x"),
                "services[0].env.1A: \"1A\" is not a valid name of a variable",
            ),
            (
                "/services/0/env/A-B",
                json!("x"),
                "services[0].env[\"A-B\"]: \"A-B\" is not a valid name of a variable",
            ),
            (
                "/services/0/env/PORT",
                json!(8080),
                "services[0].env.PORT: invalid type: integer `8080`, expected a string",
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
                "services[0].credentials: invalid type: sequence, expected a map",
            ),
            (
                "/services/0/credentials",
                json!({"a:b": "/s"}),
                "services[0].credentials[\"a:b\"]: \"a:b\" is not a valid name of a credential",
            ),
            (
                "/services/0/credentials",
                json!({"..": "/s"}),
                "services[0].credentials[\"..\"]: \"..\" is not a valid name of a credential",
            ),
            (
                "/services/0/credentials",
                json!({"key": null}),
                "services[0].credentials.key: invalid type: null",
            ),
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
            (
                "/services/0/http",
                json!(80),
                "services[0].http: invalid type: integer `80`, expected an object",
            ),
            (
                "/services/0/http/internalPort",
                json!(99999),
                "services[0].http.internalPort: invalid value: integer `99999`, expected a port from 1 to 65535",
            ),
            (
                "/services/0/http/internalPort",
                json!(0),
                "services[0].http.internalPort: invalid value: integer `0`, expected a port",
            ),
            (
                "/services/0/http/internalPort",
                json!("8080"),
                "services[0].http.internalPort: invalid type: string \"8080\", expected a port",
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
                "services[0].health.host: \"*.example.com\" is a pattern; expected one name, such as www.example.com",
            ),
            (
                "/services/0/health/timeoutSec",
                json!(0),
                "services[0].health.timeoutSec: invalid value: integer `0`, expected a number of seconds from 1 to 3600",
            ),
            ("/services/0/http", json!(null), "services[0].health.path: \"/health?deep=1\" needs http"),
            ("/services/0/rollout", json!("canary"), "services[0].rollout: \"canary\" is not known"),
            (
                "/services/0/systemd/after",
                json!(["x"]),
                "services[0].systemd.after[0]: \"x\" is not a valid unit name",
            ),
            ("/services/0/systemd/requires", json!("x.service"), "services[0].systemd.requires: "),
            (
                "/services/0/systemd/after",
                json!(vec!["x.service"; 1001]),
                "services[0].systemd.after: has more than 1000 entries",
            ),
            ("/services/0/env/PORT", json!("a\u{fffe}"), "services[0].env.PORT: \"a\u{fffe}\" has \\u{fffe}"),
            (
                "/services/0/systemd/restart",
                json!("on-crash"),
                "services[0].systemd.restart: \"on-crash\" is not known",
            ),
            (
                "/services/0/systemd/restartSec",
                json!(86_401),
                "services[0].systemd.restartSec: invalid value: integer `86401`",
            ),
            (
                "/services/0/systemd/memoryMax",
                json!(512),
                "services[0].systemd.memoryMax: invalid type: integer `512`, expected a string",
            ),
            (
                "/services/0/systemd/cpuQuota",
                json!("1.5"),
                "services[0].systemd.cpuQuota: \"1.5\" is not a share",
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
                "services[0].systemd.stopTimeoutSec: invalid value: integer `3601`",
            ),
            (
                "/services/0/hardening/protectSystem",
                json!("all"),
                "services[0].hardening.protectSystem: \"all\" is not known",
            ),
            (
                "/services/0/hardening/profile",
                json!("strickt"),
                "services[0].hardening.profile: \"strickt\" is not known; expected one of default, strict; did you mean 'strict'",
            ),
            (
                "/services/0/hardening/profile",
                json!(null),
                "services[0].hardening.profile: invalid type: null",
            ),
            (
                "/services/0/hardening/privateTmp",
                json!("yes"),
                "services[0].hardening.privateTmp: invalid type: string \"yes\", expected a boolean",
            ),
            ("/services/0/revision", json!("a\tb"), "services[0].revision: "),
            ("/services/0/revision", json!(5), "services[0].revision: invalid type: integer `5`"),
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
    fn what_is_no_document_says_how() {
        for (bytes, reason) in [
            (&b""[..], "empty"),
            (b" \n", "empty"),
            (b"{\"a\": [1, ", "cut off: it ends at line 1"),
            (b"{\"a\": \"x", "cut off"),
            (b"hello", "not JSON"),
            (b"{} {}", "not JSON: trailing characters"),
            (b"{\"a\": \"\xff\"}", "not JSON"),
            (b"\0", "not JSON"),
        ] {
            for e in [
                manifest(bytes, Mode::Strict).unwrap_err(),
                service_from(bytes, Mode::Strict, None).unwrap_err(),
            ] {
                assert!(e.to_string().starts_with(reason), "{bytes:?}: {e}");
            }
        }
        let deep = [vec![b'['; 10_000], vec![b']'; 10_000]].concat();
        assert!(manifest(&deep, Mode::Tolerant).unwrap_err().to_string().contains("32 levels deep"));
    }

    #[test]
    fn all_that_is_wrong_with_an_entry_is_said_at_once() {
        let mut manifest_of_it = whole();
        let wrong = json!({
            "nmae": "x",
            "artifact": {"storePath": "/nix/store/x"},
            "hosts": ["biz", "-x", "b c"],
            "env": {"A": 1},
            "http": {"domain": "a_b", "internalPort": 0, "port": 80},
            "systemd": {"restart": "onfailure", "restartSec": -1},
        });
        manifest_of_it["services"][1] = wrong.clone();
        let said =
            |error: ManifestError| error.to_string().split("; also ").map(String::from).collect::<Vec<_>>();
        let expected = [
            "artifact.storePath: \"/nix/store/x\" is not a store path; the form is /nix/store/HASH-NAME",
            "env.A: invalid type: integer `1`, expected a string",
            "hosts[1]: \"-x\" must begin with a letter or a digit",
            "http.domain: \"a_b\" has '_'; expected a DNS name such as ava.example.com",
            "http.internalPort: invalid value: integer `0`, expected a port from 1 to 65535",
            "systemd.restart: \"onfailure\" is not known; expected one of no, on-success, on-failure, on-abnormal, \
             on-watchdog, on-abort, always; did you mean 'on-failure'?",
            "systemd.restartSec: invalid value: integer `-1`, expected a number of seconds from 0 to 86400",
            "name: missing; it is required",
            "nmae: unknown field; did you mean 'name'?",
            "http.port: unknown field; did you mean 'internalPort' or 'portEnv'?",
        ];
        let mistakes = said(service(wrong.clone(), Mode::Strict, None).unwrap_err());
        assert_eq!(mistakes, expected);
        let mistakes = said(read(&manifest_of_it, Mode::Strict).unwrap_err());
        assert_eq!(mistakes, expected.map(|mistake| format!("services[1].{mistake}")));
        let document = json!({"name": "a", "artifact": {"storePath": "x"}, "hosts": ["b"], "env": {"A-B": "1", "B": "2\n"},
            "http": {"domain": "a.b", "port": 80}});
        assert_eq!(
            said(service(document, Mode::Strict, None).unwrap_err()),
            [
                "artifact.storePath: \"x\" is not a store path; the form is /nix/store/HASH-NAME",
                "env[\"A-B\"]: \"A-B\" is not a valid name of a variable; expected ASCII letters, digits and '_', no digit first",
                "env.B: \"2\\n\" has the control character \\n; take it out",
                "http.internalPort: missing; it is required",
                "http.port: unknown field; did you mean 'internalPort' or 'portEnv'?",
            ]
        );
        // What an older program kept is no mistake.
        let mistakes = said(read(&manifest_of_it, Mode::Tolerant).unwrap_err());
        assert_eq!(mistakes.len(), expected.len() - 2);
        let contradictory = json!({"name": "a", "artifact": {"storePath": "/nix/store/placeholder"},
            "hosts": ["b", "b"], "health": {"path": "/"}, "rollout": "overlap", "later": 1});
        assert_eq!(said(service(contradictory, Mode::Strict, None).unwrap_err()).len(), 4);
        let many: BTreeMap<String, u8> = (0..1000).map(|n| (format!("A{n}"), 1)).collect();
        let many = json!({"name": "a", "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["b"], "env": many});
        let mistakes = said(service(many, Mode::Tolerant, None).unwrap_err());
        assert_eq!(mistakes.len(), 20);
        assert!(mistakes[19].ends_with("expected a string; and more"), "{}", mistakes[19]);
        let root = r#"{"version": 1, "serial": 1, "generation": "2026-11-22T18:31:05Z", "sevices": []}"#;
        assert_eq!(
            said(manifest(root.as_bytes(), Mode::Strict).unwrap_err()),
            ["sevices: unknown field; did you mean 'services'?", "services: missing; it is required"]
        );
    }

    #[test]
    fn numbers_are_read_exactly_as_they_are_written() {
        let numbers = r#"[1,-2,0.1,1e300,6.275081424971486e105,18446744073709551615,-9223372036854775808]"#;
        let text = whole().to_string().replacen('{', &format!("{{\"later\":{numbers},"), 1);
        let read = manifest(text.as_bytes(), Mode::Tolerant).unwrap();
        assert_eq!(read.extra["later"], serde_json::from_str::<Value>(numbers).unwrap());
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
        // What no program writes is no newer version, and may be replaced.
        assert!(!manifest(b"[2]", Mode::Tolerant).unwrap_err().is_newer_version());
    }

    #[test]
    fn a_service_may_have_as_many_hosts_as_an_entry_has_values() {
        let mut many = whole();
        many["services"][0]["hosts"] = (0..5000).map(|n| json!(format!("h{n}"))).collect();
        assert_eq!(read(&many, Mode::Tolerant).unwrap().services[0].hosts.len(), 5000);
        many["services"][0]["hosts"] = (0..20_000).map(|n| json!(format!("h{n}"))).collect();
        let error = read(&many, Mode::Tolerant).unwrap_err().to_string();
        assert!(error.contains("has more than 10000 values"), "{error}");
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
            let error = read(&one, Mode::Strict).unwrap_err();
            assert!(error.to_string().contains("later: unknown field"), "{level}: {error}");
            let parsed = read(&one, Mode::Tolerant).unwrap();
            assert_eq!(check_additions(&parsed, None), Err(error), "{level}");
            assert!(first_unknown(&parsed).unwrap().path.ends_with("later"), "{level}");
            assert_eq!(check_additions(&parsed, Some(&parsed)), Ok(()), "{level}");
        }
        let written = read(&all, Mode::Tolerant).unwrap().to_bytes();
        assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), all);
        let base = read(&whole(), Mode::Strict).unwrap();
        assert_eq!((check_additions(&base, None), first_unknown(&base)), (Ok(()), None));
        assert!(check_additions(&read(&all, Mode::Tolerant).unwrap(), Some(&base)).is_err());
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
            assert_eq!(check_additions(&old, Some(&old)), Ok(()), "{pointer}");
            let (service, before) = (&old.services[0], &plain.services[0]);
            assert_eq!(check_additions_to_service(service, service), Ok(()), "{pointer}");
            let error = check_additions_to_service(service, before).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
            for before in [None, Some(&plain)] {
                let error = check_additions(&old, before).unwrap_err().to_string();
                assert!(error.starts_with(&format!("services[0].{message}")), "{error}");
            }
        }
        assert_eq!(check_additions(&plain, None), Ok(()));
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
            (read.health.map(|h| h.timeout_sec.get()), read.hardening.protect_system.as_str()),
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
            assert_eq!(read.dynamic_user(), dynamic_user, "{fields}");
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
                    let error = parsed.unwrap_err().to_string();
                    assert!(error.starts_with("rollout: ") && error.contains(reason), "{error}");
                }
            }
        }
    }
}
