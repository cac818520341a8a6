//! The configuration: flag, then environment, then `~/.config/omni-deploy/config.json`, then
//! `/etc/omni-deploy/config.json`, then the default. Every value knows where it came from. Nothing here is
//! secret: keys are named by file, credentials are found elsewhere.

pub mod admin;

use crate::error::{Error, Result, did_you_mean};
use crate::files::if_there;
use crate::home::{home, user_dir};
use crate::http;
use crate::names::HostName;
use crate::store::credentials::{Env, Provider};
use crate::store::url::S3Location;
use crate::store::{CacheUrl, StoreUrl};
use admin::Address;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The keys.
#[rustfmt::skip]
pub const KEYS: [Key; 12] = [
    Key { name: "store", env: "OMNI_DEPLOY_STORE", flag: "--store", value: "url", list: false,
        what: "The bucket of the manifest, s3://BUCKET[/PREFIX]?region=&endpoint=&scheme=&profile=&addressing-style= or \
               file:///DIR; default file:///var/lib/omni-deploy." },
    Key { name: "cache", env: "OMNI_DEPLOY_CACHE", flag: "--cache", value: "url", list: false,
        what: "The binary cache, such a URL or any that nix copy takes; default the store." },
    Key { name: "host", env: "OMNI_DEPLOY_HOST", flag: "--this-host", value: "host", list: false,
        what: "This machine's name in the manifest; default the short host name." },
    Key { name: "secretKeyFile", env: "OMNI_DEPLOY_SECRET_KEY_FILE", flag: "--secret-key-file", value: "file", list: false,
        what: "The ed25519 key that signs, in Nix's format." },
    Key { name: "trustedPublicKeys", env: "OMNI_DEPLOY_TRUSTED_PUBLIC_KEYS", flag: "--trusted-public-keys",
        value: "key", list: true,
        what: "Public keys; if set, nothing is accepted without a signature by one of them." },
    Key { name: "build", env: "OMNI_DEPLOY_BUILD", flag: "--build", value: "command", list: false,
        what: "The command that builds a namespace; default bild if on PATH." },
    Key { name: "ssh", env: "OMNI_DEPLOY_SSH", flag: "--ssh", value: "command", list: false,
        what: "How to reach a host; default ssh." },
    Key { name: "defaultHosts", env: "OMNI_DEPLOY_DEFAULT_HOSTS", flag: "--default-hosts", value: "host", list: true,
        what: "The hosts of a service that names none; default this one if the store is a folder, else none." },
    Key { name: "caddyAdmin", env: "OMNI_DEPLOY_CADDY_ADMIN", flag: "--caddy-admin", value: "url", list: false,
        what: "Caddy's admin endpoint, unix//PATH or http://HOST:PORT; default unix//run/caddy/admin.sock if it \
               exists, else http://127.0.0.1:2019." },
    Key { name: "caddyServer", env: "OMNI_DEPLOY_CADDY_SERVER", flag: "--caddy-server", value: "name", list: false,
        what: "Which of Caddy's servers gets the route; default the one on :443." },
    Key { name: "unitDir", env: "OMNI_DEPLOY_UNIT_DIR", flag: "--unit-dir", value: "directory", list: false,
        what: "Where units are written; default /etc/systemd/system, or /run/systemd/system where that is read-only." },
    Key { name: "reportLines", env: "OMNI_DEPLOY_REPORT_LINES", flag: "--report-lines", value: "true|false", list: false,
        what: "On a host: whether its report in the bucket includes the last log lines of what failed, without the values \
               of the services' secrets files; default false." },
];

/// One key of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Its name in the configuration files.
    pub name: &'static str,
    /// Its variable in the environment; empty counts as unset.
    pub env: &'static str,
    /// Its flag, understood by every command.
    pub flag: &'static str,
    /// What its value is called, as those of the commands' flags are.
    pub value: &'static str,
    /// Several values: a JSON array in the file, words separated by spaces or commas elsewhere.
    pub list: bool,
    /// What it is, for people.
    pub what: &'static str,
}

/// A value and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sourced {
    /// The value as text; lists joined by spaces. None: unset.
    pub value: Option<String>,
    /// `flag --store`, `environment OMNI_DEPLOY_STORE`, a file's path, or `default`.
    pub source: String,
}

type Sources = BTreeMap<&'static str, Sourced>;

/// The effective configuration, parsed.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The bucket of the manifest.
    pub store: StoreUrl,
    /// The binary cache.
    pub cache: CacheUrl,
    /// Which `hosts` entries are this machine.
    pub host: HostName,
    /// The key that signs.
    pub secret_key_file: Option<PathBuf>,
    /// The keys that are believed, in Nix's form `NAME:BASE64`; empty: not restricted by us.
    pub trusted_public_keys: Vec<String>,
    /// The command that builds a namespace, split into words.
    pub build: Option<Vec<String>>,
    /// How a host is reached, split into words; the host and the command are appended.
    pub ssh: Vec<String>,
    /// Hosts to which a connection of ours is being held, with its ControlPath; never from a configuration.
    pub ssh_control: BTreeMap<HostName, PathBuf>,
    /// The hosts of a service that names none; None: such a service is refused.
    pub default_hosts: Option<Vec<HostName>>,
    /// Caddy's admin endpoint.
    pub caddy_admin: Address,
    /// Which of Caddy's servers gets our route; None: the one on :443, else one of our own there.
    pub caddy_server: Option<String>,
    /// Where units are written.
    pub unit_dir: PathBuf,
    /// Whether the report in the bucket has the last journal lines of what failed.
    pub report_lines: bool,
    /// Every key as text with its source, for `omni-deploy config`.
    pub sources: Sources,
}

/// What was given by flags: key name to value.
pub type Flags = BTreeMap<&'static str, String>;

/// The configuration file of this user.
pub fn user_file() -> PathBuf {
    user_dir().join("config.json")
}

/// The configuration file of this machine.
pub const SYSTEM_FILE: &str = "/etc/omni-deploy/config.json";

/// The store where none is configured.
const DEFAULT_STORE: &str = "file:///var/lib/omni-deploy";

/// Whether a store of this URL is only the one that is taken where nobody has named any.
pub fn is_unconfigured(url: &str) -> bool {
    url == DEFAULT_STORE
        && load(&Flags::new()).is_ok_and(|s| s.sources.get("store").is_some_and(|s| s.source == "default"))
}

/// Reads everything and parses it. Errors name the source of the value that is wrong.
pub fn load(flags: &Flags) -> Result<Settings> {
    let files = [read_file(&user_file())?, read_file(Path::new(SYSTEM_FILE))?];
    let env: Env = Arc::new(http::process_env);
    let mut settings = resolve(flags, &*env, &files)?;
    take_endpoints(&mut settings, &env)?;
    Ok(settings)
}

/// Gives buckets whose URL names no endpoint the one that the AWS tools would take.
fn take_endpoints(settings: &mut Settings, env: &Env) -> Result<()> {
    let mut take = |key: &'static str, location: &mut S3Location| -> Result<()> {
        let found = Provider::new(env.clone(), location.profile.as_deref()).endpoint();
        let Some((url, from)) = found.filter(|_| location.endpoint.is_none()) else { return Ok(()) };
        location.take_endpoint(&url, &from).map_err(Error::new)?;
        if let Some(sourced) = settings.sources.get_mut(key) {
            sourced.value = Some(location.to_string());
            sourced.source = format!("{}, endpoint by {from}", sourced.source);
        }
        Ok(())
    };
    if let StoreUrl::S3(location) = &mut settings.store {
        take("store", location)?;
    }
    if let CacheUrl::Store(StoreUrl::S3(location)) = &mut settings.cache {
        take("cache", location)?;
    }
    Ok(())
}

type FileValues = (PathBuf, BTreeMap<&'static str, String>);

/// Reads one file: None when it is not there; unknown keys and wrong types are refused.
fn read_file(path: &Path) -> Result<Option<FileValues>> {
    let text = if_there(fs_err::read_to_string(path))?;
    text.map(|text| parse_file(path, &text)).transpose()
}

fn parse_file(path: &Path, text: &str) -> Result<FileValues> {
    let at = path.display();
    let value: Value = serde_json::from_str(text).map_err(|e| {
        Error::new(format!("{at} is not JSON: {e}; correct it or write it anew with 'omni-deploy init'"))
    })?;
    let Value::Object(map) = value else {
        return Err(Error::new(format!("{at} is not a JSON object; the form is {{\"store\": \"s3://…\"}}")));
    };
    let mut values = BTreeMap::new();
    for (name, value) in map {
        let Some(key) = KEYS.iter().find(|k| k.name == name) else {
            let near = did_you_mean(&name, KEYS.iter().map(|k| k.name));
            return Err(Error::new(format!("{at}: unknown key '{name}'{near}")));
        };
        let text = match (&value, key.list) {
            (Value::Null, _) => continue,
            (Value::String(s), _) => s.clone(),
            (Value::Bool(yes), _) if key.name == "reportLines" => yes.to_string(),
            (Value::Array(items), true) if items.iter().all(Value::is_string) => {
                items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
            }
            (_, true) => {
                return Err(Error::new(format!("{at}: '{name}' is {value}, expected an array of strings")));
            }
            (_, false) => return Err(Error::new(format!("{at}: '{name}' is {value}, expected a string"))),
        };
        values.insert(key.name, text);
    }
    Ok((path.to_path_buf(), values))
}

/// Decides every key; pure but for the probes of the defaults (host name, PATH, writable unit folder).
fn resolve(flags: &Flags, env: http::Env, files: &[Option<FileValues>]) -> Result<Settings> {
    let mut sources: Sources = KEYS.iter().map(|key| (key.name, find(key, flags, env, files))).collect();
    let get = |name: &str| sources[name].value.as_deref();

    let store = needed(&sources, "store", StoreUrl::parse)?;
    let cache = parse(&sources, "cache", CacheUrl::parse)?.unwrap_or(CacheUrl::Store(store.clone()));
    let host = needed(&sources, "host", HostName::parse)?;
    let default_hosts = match get("defaultHosts") {
        Some(text) => {
            let parse = |word: String| {
                HostName::parse(&word).map_err(|why| wrong(&sources, "defaultHosts", &word, &why))
            };
            let hosts = words(text).map(parse).collect::<Result<Vec<_>>>()?;
            (!hosts.is_empty()).then_some(hosts)
        }
        None => (!store.is_shared()).then(|| vec![host.clone()]),
    };
    let trusted_public_keys: Vec<String> = get("trustedPublicKeys").into_iter().flat_map(words).collect();
    let is_key =
        |word: &str| word.split_once(':').is_some_and(|(name, key)| !name.is_empty() && key.len() == 44);
    if let Some(word) = trusted_public_keys.iter().find(|word| !is_key(word)) {
        let why = "is not a public key; the form is NAME:BASE64, as Nix writes it";
        return Err(wrong(&sources, "trustedPublicKeys", word, why));
    }
    let caddy_admin = parse(&sources, "caddyAdmin", Address::parse)?.unwrap_or(Address::Usual);
    let absolute = |text: &str| match text.starts_with('/') {
        true => Ok(PathBuf::from(text)),
        false => Err("is not an absolute path".to_string()),
    };
    let command = |name: &str| get(name).map(|text| text.split_whitespace().map(String::from).collect());
    let switch = |text: &str| text.parse().map_err(|_| "is not 'true' or 'false'".to_string());
    let settings = Settings {
        ssh_control: BTreeMap::new(),
        secret_key_file: get("secretKeyFile").map(expand_home),
        trusted_public_keys,
        build: command("build"),
        ssh: command("ssh").unwrap_or_default(),
        caddy_server: get("caddyServer").map(String::from),
        unit_dir: needed(&sources, "unitDir", absolute)?,
        report_lines: needed(&sources, "reportLines", switch)?,
        sources: Sources::new(),
        store,
        cache,
        host,
        default_hosts,
        caddy_admin,
    };
    // What these are by default depends on others.
    let hosts = settings.default_hosts.iter().flatten().map(HostName::as_str).collect::<Vec<_>>().join(" ");
    for (name, value) in [
        ("cache", settings.cache.to_string()),
        ("defaultHosts", hosts),
        ("caddyAdmin", settings.caddy_admin.to_string()),
    ] {
        if let Some(Sourced { value: unset @ None, .. }) = sources.get_mut(name) {
            *unset = Some(value).filter(|v| !v.is_empty());
        }
    }
    Ok(Settings { sources, ..settings })
}

/// A key's value: flag, environment, files, default.
fn find(key: &Key, flags: &Flags, env: http::Env, files: &[Option<FileValues>]) -> Sourced {
    let given = |value: String, source: String| Sourced { value: Some(value), source };
    if let Some(value) = flags.get(key.name) {
        return given(value.clone(), format!("flag {}", key.flag));
    }
    if let Some(value) = env(key.env).filter(|v| !v.is_empty()) {
        return given(value, format!("environment {}", key.env));
    }
    let mut files = files.iter().flatten();
    match files.find_map(|(path, values)| Some((path, values.get(key.name)?))) {
        Some((path, value)) => given(value.clone(), path.display().to_string()),
        None => Sourced { value: default_of(key.name), source: "default".into() },
    }
}

/// The default of a key, unless it depends on others.
fn default_of(name: &str) -> Option<String> {
    match name {
        "store" => Some(DEFAULT_STORE.into()),
        "host" => HostName::of_this_machine().map(|host| host.to_string()),
        "build" => found_on_path("bild").map(|_| "bild".into()),
        "ssh" => Some("ssh".into()),
        "unitDir" => Some(default_unit_dir().into()),
        "reportLines" => Some("false".into()),
        _ => None,
    }
}

fn parse<T>(sources: &Sources, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>> {
    let parse = |text: &String| parse(text).map_err(|why| wrong(sources, name, text, &why));
    sources[name].value.as_ref().map(parse).transpose()
}

/// The same of a key that has a default on every machine, but for one whose own name is no host name.
fn needed<T>(sources: &Sources, name: &str, parser: impl Fn(&str) -> Result<T, String>) -> Result<T> {
    parse(sources, name, parser)?.ok_or_else(|| {
        Error::new(format!("this machine has no usable {name} name; set '{name}' in the configuration"))
    })
}

fn wrong(sources: &Sources, name: &str, value: &str, why: &str) -> Error {
    // What cannot be used is said in places that everybody reads.
    let value = crate::store::url::without_secrets(value);
    Error::new(format!("{name} '{value}' ({}) {why}", sources[name].source))
}

/// The words of a list, as people write it.
pub fn words(text: &str) -> impl Iterator<Item = String> {
    text.split([' ', ',', '\n', '\t']).filter(|w| !w.is_empty()).map(String::from)
}

fn expand_home(text: &str) -> PathBuf {
    match text.strip_prefix("~/") {
        Some(rest) => home().join(rest),
        None => PathBuf::from(text),
    }
}

/// Where PATH has a program of that name.
pub fn found_on_path(program: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| fs_err::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

/// `/etc/systemd/system`, or `/run/systemd/system` where the former cannot be written (NixOS links it into
/// its store).
fn default_unit_dir() -> &'static str {
    let etc = "/etc/systemd/system";
    let in_store = fs_err::canonicalize(etc).is_ok_and(|p| p.starts_with(crate::names::STORE_DIR));
    if in_store { "/run/systemd/system" } else { etc }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_beats_environment_beats_user_file_beats_system_file() {
        let file = |path: &str, store: &str| {
            Some(parse_file(Path::new(path), &format!("{{\"store\": \"{store}\"}}")).unwrap())
        };
        let files = [file("/u", "file:///user"), file("/s", "file:///system")];
        let env = |name: &str| (name == "OMNI_DEPLOY_STORE").then(|| "file:///env".to_string());
        let none = |_: &str| None;
        let flags = Flags::from([("store", "file:///flag".to_string())]);
        let got = |flags: &Flags, env: http::Env, files: &[Option<FileValues>]| {
            let s = resolve(flags, env, files).unwrap();
            (s.store.to_string(), s.sources["store"].source.clone())
        };
        assert_eq!(got(&flags, &env, &files), ("file:///flag".into(), "flag --store".into()));
        let empty = Flags::new();
        assert_eq!(got(&empty, &env, &files).1, "environment OMNI_DEPLOY_STORE");
        assert_eq!(got(&empty, &none, &files), ("file:///user".into(), "/u".into()));
        assert_eq!(got(&empty, &none, &files[1..]), ("file:///system".into(), "/s".into()));
        assert_eq!(got(&empty, &none, &[]), ("file:///var/lib/omni-deploy".into(), "default".into()));
    }

    #[test]
    fn a_directory_store_makes_this_host_the_default_and_s3_does_not() {
        let none = |_: &str| None;
        let dir = Flags::from([("host", "biz".to_string())]);
        let s = resolve(&dir, &none, &[]).unwrap();
        assert_eq!(s.default_hosts.unwrap()[0].as_str(), "biz");
        let s3 = Flags::from([("host", "biz".to_string()), ("store", "s3://bucket".to_string())]);
        let s = resolve(&s3, &none, &[]).unwrap();
        assert!(s.default_hosts.is_none());
        assert_eq!(s.cache.to_string(), "s3://bucket");
    }

    #[test]
    fn a_wrong_value_names_its_source() {
        let none = |_: &str| None;
        let flags = Flags::from([("store", "bucket".to_string())]);
        let e = resolve(&flags, &none, &[]).unwrap_err().to_string();
        assert!(e.contains("flag --store") && e.contains("'bucket'"), "{e}");
        let e = parse_file(Path::new("/c"), "{\"stor\": \"x\"}").unwrap_err().to_string();
        assert!(e.contains("did you mean 'store'"), "{e}");
        assert!(parse_file(Path::new("/c"), "{\"store\": 1}").is_err());
        assert!(parse_file(Path::new("/c"), "[]").is_err());
    }
}
