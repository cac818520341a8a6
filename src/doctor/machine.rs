//! What every machine needs: configuration, store, keys, cache and the programs that push and ship call.

use super::{Check, Finding, fail, ok, warn, writable};
use crate::config::{self, SYSTEM_FILE, Settings};
use crate::keys::{self, PublicKey, SecretKey};
use crate::manifest::{Manifest, current, signature};
use crate::store::url::without_secrets;
use crate::store::{CacheUrl, Probe, Store, StoreError, StoreUrl};
use std::path::Path;

/// Which files the configuration was read from.
pub fn files() -> Finding {
    let user = config::user_file();
    let found: Vec<String> = [user.as_path(), Path::new(SYSTEM_FILE)]
        .iter()
        .filter(|path| path.exists())
        .map(|path| path.display().to_string())
        .collect();
    if found.is_empty() {
        warn("no file, defaults are used; 'omni-deploy init STORE' writes one")
    } else {
        ok(found.join(", "))
    }
}

/// The store: whether it answers and honours conditional writes. A host need not write there but for its report,
/// and of what its credentials do not allow nothing is said.
pub fn store(store: &dyn Store, on_host: bool) -> Vec<Check> {
    let url = store.url();
    if let Err(e) = store.list(crate::store::HOSTS_PREFIX) {
        return vec![fail(e).of("store")];
    }
    let reached = ok(format!("{url} answers")).of("store");
    let writes = match crate::store::probe(store) {
        Ok(Probe { conditions: Err(why), .. }) => {
            crate::store::probe::forget(store);
            fail(why)
        }
        Ok(Probe { conditions: Ok(_), leftover: Some(why) }) => warn(format!("honoured, but {why}")),
        Ok(Probe { conditions: Ok(_), leftover: None }) => ok("honoured: two pushes at once lose nothing"),
        Err(StoreError::Denied(_)) if on_host => return vec![reached],
        Err(e) => fail(e),
    };
    vec![reached, writes.of("conditional writes")]
}

/// The manifest, as a host would take it. Where trusted keys are configured, one that none of them has signed is looked at
/// no further: what it names is not to be visited, nor read as root.
pub fn manifest(store: &dyn Store, settings: &Settings) -> (Finding, Option<Manifest>) {
    let found = current::load(store).and_then(|c| c.ok_or_else(|| current::missing(store)));
    let (bytes, manifest) = match found.map(current::CurrentManifest::into_parts) {
        Ok((bytes, Ok(manifest))) => (bytes, manifest),
        Ok((_, Err(e))) => return (fail(current::unusable(store, &e)), None),
        Err(e) => return (fail(e), None),
    };
    let text = format!("version {}, services: {}", manifest.serial, manifest.services.len());
    match signature::trusted(settings) {
        // The check of the keys says what is wrong with them.
        Err(_) => (warn(format!("{text}; its signature was not checked")), None),
        Ok(trusted) if trusted.is_empty() => (ok(text), Some(manifest)),
        Ok(trusted) => match signature::check(&bytes, &manifest, &store.identity(), &trusted) {
            Ok(keys) => (ok(format!("{text}, signed by {}", keys.join(", "))), Some(manifest)),
            Err(why) => {
                let text = format!(
                    "{text}, and no host that trusts these keys obeys it: {why}; look at it ('deploy-manifest \
                     show'), and if it is right, 'deploy-manifest sign'"
                );
                (fail(text), None)
            }
        },
    }
}

/// The key that signs and the keys that are believed.
pub fn signing(settings: &Settings, on_host: bool) -> Vec<Check> {
    let mut ours = None;
    let key = settings.secret_key_file.as_ref().map(|path| {
        match (SecretKey::read(path), keys::mode_trouble(path)) {
            (Err(e), _) => fail(e),
            (_, Some(why)) => fail(format!("{} {why}", path.display())),
            (Ok(key), None) => {
                let key = ours.insert(key.public());
                ok(format!("{} ({})", key.name(), path.display()))
            }
        }
    });
    let none = || warn("none: what is pushed is unsigned; 'omni-deploy init' makes one");
    let key = key.or_else(|| (!on_host).then(none)).map(|found| found.of("signing key"));
    let mut trusted = Vec::new();
    let mut keys = Vec::new();
    for text in &settings.trusted_public_keys {
        match PublicKey::parse(text) {
            Ok(key) => trusted.push(key),
            Err(why) => keys.push(fail(format!("'{text}' {why}; correct it"))),
        }
    }
    keys.push(match ours {
        _ if trusted.is_empty() && on_host => warn("none: whoever can write the bucket decides what runs here; set trustedPublicKeys ('omni-deploy init' prints them)",
        ),
        _ if trusted.is_empty() => ok("none here; set them on the hosts"),
        Some(ours) if !trusted.contains(&ours) => fail(format!(
            "our own key is not among them: what is pushed from here is rejected; add {ours} to trustedPublicKeys"
        )),
        _ => ok(trusted.iter().map(PublicKey::name).collect::<Vec<_>>().join(", ")),
    });
    key.into_iter().chain(keys.into_iter().map(|found| found.of("trusted keys"))).collect()
}

/// The binary cache.
pub fn cache(settings: &Settings, on_host: bool) -> Finding {
    if settings.store.is_shared() && settings.cache == CacheUrl::Store(settings.store.clone()) {
        return ok("is the store");
    }
    let url = without_secrets(&settings.cache.to_string());
    match &settings.cache {
        CacheUrl::Store(StoreUrl::Dir(dir)) => {
            // One that is not there yet is made by the first push.
            let nearest = dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/"));
            match (nearest == dir, writable(nearest)) {
                (true, Ok(())) => ok(format!("{url} can be written")),
                (false, Ok(())) => ok(format!("{url} is made by the first push")),
                (true, Err(_)) if on_host => ok(format!("{url} can be read")),
                (_, Err(why)) => warn(format!(
                    "{url} cannot be written: {why}; pushes need chown or chmod of {}",
                    nearest.display()
                )),
            }
        }
        CacheUrl::Store(store) => match crate::store::open(store) {
            Err(e) => fail(e),
            // A GET: a HEAD cannot tell a bucket that is missing from an object that is.
            Ok(bucket) => match (bucket.get_start("nix-cache-info", 1), on_host) {
                (Err(e), _) => fail(e),
                (Ok(_), true) => ok(format!("{url} answers")),
                (Ok(_), false) => match crate::store::probe(bucket.as_ref()) {
                    // A cache is written without conditions.
                    Ok(_) => ok(format!("{url} can be written")),
                    Err(e) => warn(format!("pushes may fail: {e}")),
                },
            },
        },
        CacheUrl::Nix(url) => match crate::nix::ping(Some(url)) {
            Ok(_) => ok(format!("{} answers", without_secrets(url))),
            // Nix repeats the URL; what authenticates in it is not shown.
            Err(e) => fail(format!(
                "{}; check the URL of 'cache'",
                e.to_string().replace(url, &without_secrets(url))
            )),
        },
    }
}

/// Nix itself.
pub fn nix() -> Finding {
    match crate::nix::ping(None) {
        Ok(text) => ok(text),
        Err(e) => fail(e),
    }
}

/// The programs that pushing calls.
pub fn programs(settings: &Settings) -> Vec<Check> {
    let known = |program: &str| match program.contains('/') {
        true => Path::new(program).exists(),
        false => config::found_on_path(program).is_some(),
    };
    let build = match settings.build.as_deref().and_then(|words| words.first()) {
        Some(program) if known(program) => ok(program.clone()),
        Some(program) => {
            fail(format!("'{program}' is not on PATH; put it there or correct 'build' in the configuration"))
        }
        None => warn(
            "no command builds namespaces; put bild on PATH or set 'build' (flakes and .nix files need neither)",
        ),
    };
    let ssh = match settings.ssh.first() {
        Some(program) if known(program) => ok(program.clone()),
        program => warn(format!(
            "'{}' is not on PATH, so logs, --live and ship cannot reach hosts; install OpenSSH's client (Debian: apt install openssh-client) or set 'ssh'",
            program.map_or("ssh", String::as_str)
        )),
    };
    vec![build.of("build"), ssh.of("ssh")]
}
