//! `omni-deploy init`: sets a developer's machine up. It adds to the user's configuration file and keeps what is
//! in it, makes a signing key unless there is one, makes the manifest unless there is one, and prints what the
//! hosts need. Doing it again changes nothing.

use super::{Call, print};
use crate::clock::Timestamp;
use crate::config::{self, KEYS, Key, Settings};
use crate::durable;
use crate::error::{Error, Exit, Result};
use crate::files::if_there;
use crate::home;
use crate::keys::{PublicKey, SecretKey};
use crate::log;
use crate::manifest::current;
use crate::manifest::publish::{self, StartingPoint};
use crate::manifest::signature::{self, Trust};
use crate::manifest::trust::{self, Author};
use crate::store::url::without_secrets;
use crate::store::{CacheUrl, StoreUrl};
use argh::{ArgsInfo, FromArgs};
use serde_json::{Map, Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Set a developer's machine up. Writes the configuration, makes a signing key unless one is configured, creates the
/// manifest unless there is one, and prints the configuration that hosts need.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "init",
    example = "{command_name} 's3://bucket?region=eu-central-1'\n{command_name} file:///srv/omni-deploy\n{command_name} | ssh biz sudo install -D -m 644 /dev/stdin /etc/omni-deploy/config.json",
    note = "Flags of the configuration that are given here (--cache, --default-hosts, …) are written to the file too."
)]
pub(super) struct Args {
    /// the bucket of the manifest: s3://BUCKET[/PREFIX]?region=… or file:///DIR
    #[argh(positional, arg_name = "url")]
    store: Option<String>,
    /// name of the signing key to make, if none is configured
    #[argh(option, arg_name = "name")]
    key_name: Option<String>,
}

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    let mut flags = call.flags.clone();
    if let Some(store) = args.store
        && let Some(other) = flags.insert("store", store)
    {
        return Err(Error::usage(format!(
            "the store is named twice, also by --store {}",
            without_secrets(&other)
        )));
    }
    let file = config::user_file();
    let old = existing(&file)?;
    let settings = config::load(&flags)?;
    // Before anything is written here: a store that is misspelt must not take the place of one that works.
    let store = crate::store::open(&settings.store)?;
    let probe = crate::store::probe(store.as_ref())?;
    let etags = probe.conditions.map_err(Error::new)?;
    if let Some(leftover) = probe.leftover {
        log::warning(leftover);
    }
    crate::store::probe::remember(store.as_ref(), etags, Timestamp::now());

    let mut new = old.clone();
    for (name, value) in &flags {
        new.insert(name.to_string(), file_value(name, value)?);
    }
    // What the environment of this call has added to the store's URL is missing in that of the next.
    if let StoreUrl::S3(location) = &settings.store
        && let Some(from) = &location.endpoint_from
    {
        log::info(format!("store: {location} (endpoint by {from})"));
        new.insert("store".into(), Value::from(location.to_string()));
    }
    let (key_file, key) = signing_key(&settings, args.key_name.as_deref())?;
    if settings.secret_key_file.is_none() {
        new.insert("secretKeyFile".into(), Value::from(key_file.display().to_string()));
    }
    let public = key.public();
    if settings.trusted_public_keys.is_empty() {
        // Else the next change made here would sign whatever somebody without a key wrote meanwhile.
        new.insert("trustedPublicKeys".into(), json!([public.to_string()]));
    }
    save(&file, &old, &new)?;
    for Key { name, env, .. } in KEYS.iter().filter(|key| flags.contains_key(key.name)) {
        if std::env::var_os(env).is_some_and(|v| !v.is_empty()) {
            log::warning(format!("{env} is set and beats '{name}' of {}; unset it", file.display()));
        }
    }
    let mut trusted = signature::trusted(&settings)?;
    if trusted.is_empty() {
        trusted.push(public.clone());
    }
    let trust = Trust { signer: Some(key), trusted };
    let made = first_manifest(&Author::with(trust, store.as_ref()));

    let for_hosts = for_hosts(&settings, &public);
    log::info(match settings.store.is_shared() {
        false => "a deployer on this machine needs this in /etc/omni-deploy/config.json:",
        true => {
            "every host needs this in /etc/omni-deploy/config.json, and credentials of its own for the bucket:"
        }
    });
    print(&format!("{for_hosts:#}"))?;
    made.map(|()| Exit::Done)
}

/// Makes the manifest, unless there is or was one: in the place of one that was lost, or taken away, an empty one would
/// be signed that hosts obey.
fn first_manifest(author: &Author) -> Result<()> {
    let store = author.store;
    let Some(current) = current::load(store)? else {
        publish::init(author, StartingPoint::OrEmpty)?;
        log::notice(format!("manifest: made in {}", store.url()));
        return Ok(());
    };
    if let Some(reason) = author.reject_reason(&current)? {
        log::warning(format!("warning: {}", author.rejection(&current, &reason)));
        return Ok(());
    }
    let manifest = current.manifest().as_ref().map_err(|e| current::unusable(store, e))?;
    log::info(format!("manifest: {} has one, version {}", store.url(), manifest.serial));
    author.remember(&current.bytes);
    Ok(())
}

/// What the user's file holds. One that is no JSON object is put aside as `config.json.broken`.
fn existing(file: &Path) -> Result<Map<String, Value>> {
    let Some(bytes) = if_there(fs_err::read(file))? else { return Ok(Map::new()) };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        _ => {
            let aside = file.with_extension("json.broken");
            durable::write(&aside, &bytes, 0o600)?;
            durable::remove(file)?;
            log::warning(format!("{} was not a JSON object; kept as {}", file.display(), aside.display()));
            Ok(Map::new())
        }
    }
}

/// A flag's value as the file holds it: lists as arrays, paths absolute.
fn file_value(name: &str, value: &str) -> Result<Value> {
    if KEYS.iter().any(|k| k.name == name && k.list) {
        return Ok(config::words(value).collect());
    }
    if name == "secretKeyFile" && !value.starts_with("~/") {
        return Ok(Value::from(std::path::absolute(value)?.display().to_string()));
    }
    Ok(Value::from(value))
}

/// The configured key, or one that is made (or was made by an earlier call) in the user's folder.
fn signing_key(settings: &Settings, name: Option<&str>) -> Result<(PathBuf, SecretKey)> {
    if let Some(path) = &settings.secret_key_file {
        let key = SecretKey::read(path)?;
        if name.is_some_and(|name| name != key.public().name()) {
            return Err(Error::new(format!(
                "{} is configured and named {}; take secretKeyFile out of the configuration to make another",
                path.display(),
                key.public().name()
            )));
        }
        log::info(format!("signing key: {} (configured)", path.display()));
        return Ok((path.clone(), key));
    }
    let name = name.map_or_else(|| default_key_name(&trust::whoami()), String::from);
    let dir = home::user_dir().join("keys");
    let path = dir.join(format!("{name}.secret"));
    if path.exists() {
        log::info(format!("signing key: {} (was there)", path.display()));
        return Ok((path.clone(), SecretKey::read(&path)?));
    }
    let key = SecretKey::generate(&name)?;
    let path = key.write(&dir)?;
    log::notice(format!("signing key: {} (made; keep a copy where only you can read it)", path.display()));
    Ok((path, key))
}

/// `omni-deploy-ann-laptop-1`: who signs and where, and room for the key after this one.
fn default_key_name(author: &str) -> String {
    format!("omni-deploy-{}-1", author.replace('@', "-"))
}

/// Writes the file if anything differs, and says what.
fn save(file: &Path, old: &Map<String, Value>, new: &Map<String, Value>) -> Result<()> {
    let at = file.display();
    if old == new {
        log::info(format!("configuration: {at} needs no change"));
        return Ok(());
    }
    let mode = fs_err::metadata(file).map_or(0o600, |m| m.permissions().mode() & 0o777);
    let dir = file.parent().ok_or_else(|| Error::new(format!("{at} has no folder above it; set HOME")))?;
    fs_err::create_dir_all(dir)?;
    durable::write(file, format!("{:#}\n", Value::Object(new.clone())).as_bytes(), mode)?;
    let shown = |value: &Value| match value {
        Value::String(text) => without_secrets(text),
        other => other.to_string(),
    };
    for (name, value) in new.iter().filter(|(name, value)| old.get(*name) != Some(*value)) {
        let was = old.get(name).map_or(String::new(), |v| format!(" (was {})", shown(v)));
        log::notice(format!("configuration: {at}: {name} is now {}{was}", shown(value)));
    }
    Ok(())
}

/// The configuration of a host: where to look and whom to believe.
fn for_hosts(settings: &Settings, ours: &PublicKey) -> Value {
    let shown = |name: &str, url: String| {
        let shown = without_secrets(&url);
        if shown != url {
            log::warning(format!(
                "'{name}' below is shown without its credentials; fill them in on the hosts"
            ));
        }
        shown
    };
    let mut trusted = settings.trusted_public_keys.clone();
    if !trusted.contains(&ours.to_string()) {
        trusted.push(ours.to_string());
    }
    json!({
        "store": shown("store", settings.store.for_others().to_string()),
        "cache": shown("cache", match &settings.cache {
            CacheUrl::Store(url) => url.for_others().to_string(),
            CacheUrl::Nix(url) => url.clone(),
        }),
        "trustedPublicKeys": trusted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_told_where_to_look_and_whom_to_believe_and_nothing_of_ours() {
        let key = SecretKey::generate("k").unwrap().public();
        let flags = [
            ("store", "s3://bucket/p?region=eu&profile=dev"),
            ("trustedPublicKeys", "old:igHme8Qi9gyKFZOCtbcuFVJ1hxBRtVR/TyOJJsiLcaI="),
            ("secretKeyFile", "/secret"),
        ];
        let settings = config::load(&flags.map(|(name, value)| (name, value.to_string())).into()).unwrap();
        let value = for_hosts(&settings, &key);
        assert_eq!(value["store"], "s3://bucket/p?region=eu");
        assert_eq!(value["cache"], "s3://bucket/p?region=eu");
        assert_eq!(value["trustedPublicKeys"][1], key.to_string());
        assert_eq!(value.as_object().unwrap().len(), 3);
    }

    #[test]
    fn the_default_key_name_is_a_key_name() {
        assert_eq!(default_key_name("ann@laptop"), "omni-deploy-ann-laptop-1");
        crate::keys::check_name(&default_key_name(&trust::whoami())).unwrap();
    }

    #[test]
    fn what_flags_say_is_written_in_the_form_of_the_file() {
        assert_eq!(file_value("defaultHosts", "a, b").unwrap(), json!(["a", "b"]));
        assert_eq!(file_value("secretKeyFile", "/k").unwrap(), json!("/k"));
        assert!(file_value("secretKeyFile", "k").unwrap().as_str().unwrap().starts_with('/'));
        assert_eq!(file_value("secretKeyFile", "~/k").unwrap(), json!("~/k"));
        assert_eq!(file_value("store", "s3://b").unwrap(), json!("s3://b"));
    }
}
