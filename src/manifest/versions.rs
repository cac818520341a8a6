//! The versions of the manifest in a store: the current one and those it replaced, which are kept byte for
//! byte under `manifests/`. Finds and reads them; writing is [`super::edit`]'s.

use super::model::{Change, MAX_BYTES, Manifest};
use super::parse::{self, MAX_SERIAL, Mode};
use super::signature;
use crate::clock::Timestamp;
use crate::error::{Error, Result, did_you_mean};
use crate::keys::PublicKey;
use crate::store::{ARCHIVE_PREFIX, Got, MANIFEST_KEY, Store};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::cmp::Reverse;
use std::fmt;

/// One version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// `manifest-20261122T183105Z-00000042.json`; the current one has the name it will be archived under.
    pub name: String,
    /// Its serial.
    pub serial: u64,
    /// Whether it is the one in force.
    pub current: bool,
}

/// What stands at the beginning of a version, before its services.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Its serial.
    pub serial: u64,
    /// When it was written.
    pub generation: Timestamp,
    /// What it changed.
    pub change: Change,
}

/// How much of a version is read for its [`Head`], in bytes.
const HEAD_BYTES: u64 = 4096;

/// The name a version is archived under; names sort by time, then serial.
pub fn archive_name(serial: u64, generation: Timestamp) -> String {
    format!("manifest-{}-{serial:08}.json", generation.compact())
}

/// The key of an archived version.
pub fn archive_key(name: &str) -> String {
    format!("{ARCHIVE_PREFIX}{name}")
}

fn serial_in(name: &str) -> Option<u64> {
    let (_, serial) = name.strip_prefix("manifest-")?.strip_suffix(".json")?.rsplit_once('-')?;
    serial.parse().ok().filter(|serial| *serial <= MAX_SERIAL)
}

/// The archived versions, newest first; objects of other names are left out.
pub fn archived(store: &dyn Store) -> Result<Vec<Version>> {
    let mut versions: Vec<Version> = store
        .list(ARCHIVE_PREFIX)?
        .iter()
        .filter_map(|key| key.strip_prefix(ARCHIVE_PREFIX))
        .filter_map(|name| {
            serial_in(name).map(|serial| Version { name: name.into(), serial, current: false })
        })
        .collect();
    versions
        .sort_by(|a, b| (Reverse(a.serial), Reverse(&a.name)).cmp(&(Reverse(b.serial), Reverse(&b.name))));
    Ok(versions)
}

/// All versions, newest first. A current one that is missing, or whose beginning cannot be read, is not
/// among them.
pub fn all(store: &dyn Store) -> Result<Vec<Version>> {
    let mut versions = archived(store)?;
    if let Some(head) = head(store, MANIFEST_KEY)? {
        let name = archive_name(head.serial, head.generation);
        // A writer that was ended between archiving and replacing leaves the current one in both places.
        versions.retain(|v| v.name != name);
        let at = versions.partition_point(|v| v.serial > head.serial);
        versions.insert(at, Version { name, serial: head.serial, current: true });
    }
    Ok(versions)
}

/// The version before the current one.
pub fn previous(versions: &[Version]) -> Option<&Version> {
    let current = versions.iter().find(|v| v.current)?;
    versions.iter().find(|v| v.serial < current.serial)
}

/// The version that `word` means: a name, an unambiguous beginning of one (`.json` may follow), or a serial.
pub fn resolve<'a>(versions: &'a [Version], word: &str) -> Result<&'a Version> {
    let stem = word.strip_prefix(ARCHIVE_PREFIX).unwrap_or(word);
    let stem = stem.strip_suffix(".json").unwrap_or(stem);
    if let Some(exact) = versions.iter().find(|v| v.name.strip_suffix(".json") == Some(stem)) {
        return Ok(exact);
    }
    let by_serial = stem.parse::<u64>().ok().and_then(|serial| versions.iter().find(|v| v.serial == serial));
    if let Some(version) = by_serial {
        return Ok(version);
    }
    let begins = |v: &&Version| {
        !stem.is_empty()
            && (v.name.starts_with(stem)
                || v.name.strip_prefix("manifest-").is_some_and(|n| n.starts_with(stem)))
    };
    let fitting: Vec<&Version> = versions.iter().filter(begins).collect();
    match fitting[..] {
        [] => {
            let near = did_you_mean(word, versions.iter().map(|v| v.name.as_str()));
            Err(Error::new(format!("no version '{word}'{near}; 'deploy-manifest list --all' shows them")))
        }
        [one] => Ok(one),
        _ => {
            let mut names: Vec<&str> = fitting.iter().take(10).map(|v| v.name.as_str()).collect();
            let more = format!("and {} more", fitting.len().saturating_sub(10));
            if fitting.len() > 10 {
                names.push(&more);
            }
            Err(Error::new(format!(
                "'{word}' fits {} versions: {}; write more of the name, or the serial",
                fitting.len(),
                names.join(", ")
            )))
        }
    }
}

/// The bytes of a version.
pub fn bytes(store: &dyn Store, version: &Version) -> Result<Vec<u8>> {
    let key = if version.current { MANIFEST_KEY.to_string() } else { archive_key(&version.name) };
    match store.get(&key, None, MAX_BYTES)? {
        Got::Found { bytes, .. } => Ok(bytes),
        Got::Missing | Got::NotModified => {
            Err(Error::new(format!("{key} is gone from {}; run the command again", store.url())))
        }
    }
}

/// What to do about a version that is of no use.
const ANOTHER: &str = "; take another one of 'deploy-manifest list', by its name";

/// Reads a version whole.
pub fn read(store: &dyn Store, version: &Version) -> Result<Manifest> {
    parsed(store, version, &bytes(store, version)?)
}

fn parsed(store: &dyn Store, version: &Version, bytes: &[u8]) -> Result<Manifest> {
    parse::manifest(bytes, Mode::Tolerant)
        .map_err(|e| Error::new(format!("{} in {}: {e}{ANOTHER}", version.name, store.url())))
}

/// As [`read`], if it is signed by one of these keys (with none: as it is): whoever can write the store can put
/// files among the old versions too. Returns the names of the keys as well.
pub fn believed(
    store: &dyn Store,
    version: &Version,
    trusted: &[PublicKey],
) -> Result<(Manifest, Vec<String>)> {
    let bytes = bytes(store, version)?;
    let manifest = parsed(store, version, &bytes)?;
    if trusted.is_empty() {
        return Ok((manifest, Vec::new()));
    }
    let names = signature::check(&bytes, &manifest, &store.identity(), trusted).map_err(|why| {
        Error::new(format!("{} in {} is not to be trusted: {why}{ANOTHER}", version.name, store.url()))
    })?;
    Ok((manifest, names))
}

/// The beginning of a version; None when there is no such object, or no head in it.
pub fn head(store: &dyn Store, key: &str) -> Result<Option<Head>> {
    let Some(start) = store.get_start(key, HEAD_BYTES)? else { return Ok(None) };
    if let Some(head) = head_of(&start) {
        return Ok(Some(head));
    }
    // Written by hand, with its services first: the whole of it has the rest.
    if (start.len() as u64) < HEAD_BYTES {
        return Ok(None);
    }
    match store.get(key, None, MAX_BYTES) {
        Ok(Got::Found { bytes, .. }) => Ok(head_of(&bytes)),
        Ok(Got::Missing | Got::NotModified) | Err(crate::store::StoreError::TooLarge(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Reads the head out of the first bytes of a version, which may end anywhere after it.
pub fn head_of(start: &[u8]) -> Option<Head> {
    let mut partial = Partial::default();
    // That it ends in the middle is no error here; what was read until then counts.
    drop(PartialSeed(&mut partial).deserialize(&mut serde_json::Deserializer::from_slice(start)));
    Some(Head {
        serial: partial.serial?,
        generation: partial.generation?,
        change: partial.change.unwrap_or_default(),
    })
}

#[derive(Default)]
struct Partial {
    serial: Option<u64>,
    generation: Option<Timestamp>,
    change: Option<Change>,
}

struct PartialSeed<'a>(&'a mut Partial);

impl<'de> DeserializeSeed<'de> for PartialSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for PartialSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Partial { serial, generation, change } = self.0;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "serial" => *serial = Some(map.next_value()?),
                "generation" => *generation = Some(map.next_value()?),
                "change" => {
                    let value: serde_json::Value = map.next_value()?;
                    let text = |name: &str| value[name].as_str().unwrap_or_default().to_string();
                    *change = Some(Change { action: text("action"), by: text("by"), ..Change::default() });
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            if serial.is_some() && generation.is_some() && change.is_some() {
                return Err(A::Error::custom("enough"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions() -> Vec<Version> {
        let version =
            |name: &str, serial, current| Version { name: format!("manifest-{name}.json"), serial, current };
        vec![
            version("20261122T190000Z-00000004", 4, true),
            version("20261122T183105Z-00000003", 3, false),
            version("20261122T183105Z-00000002", 2, false),
            version("20261101T000000Z-00000001", 1, false),
        ]
    }

    #[test]
    fn a_version_is_found_by_name_beginning_or_serial() {
        for (word, serial) in [
            ("manifest-20261122T183105Z-00000003.json", 3),
            ("manifests/manifest-20261122T183105Z-00000003.json", 3),
            ("manifest-20261122T183105Z-00000002", 2),
            ("manifest-20261101.json", 1),
            ("manifest-202611221", 4),
            ("20261101", 1),
            ("20261122T19", 4),
            ("2", 2),
            ("00000003", 3),
        ] {
            let found = resolve(&versions(), word).map(|v| v.serial);
            let expected = if word == "manifest-202611221" { None } else { Some(serial) };
            assert_eq!(found.ok(), expected, "{word}");
        }
    }

    #[test]
    fn an_ambiguous_beginning_lists_its_candidates() {
        let e = resolve(&versions(), "manifest-20261122.json").unwrap_err().to_string();
        assert!(e.contains("fits 3 versions") && e.contains("T190000Z") && e.contains("00000002"), "{e}");
        for word in ["manifest-2025", "7", "", ".json", "x"] {
            assert!(resolve(&versions(), word).unwrap_err().to_string().contains("no version"), "{word:?}");
        }
    }

    #[test]
    fn the_head_is_read_from_a_beginning_that_ends_anywhere() {
        let text = br#"{"version": 1, "serial": 42, "generation": "2026-11-22T18:31:05Z",
            "change": {"action": "update ava", "by": "ann@laptop"}, "services": [{"name": "a"#;
        let head = head_of(text).unwrap();
        assert_eq!(
            (head.serial, head.change.action.as_str(), head.change.by.as_str()),
            (42, "update ava", "ann@laptop")
        );
        assert_eq!(head.generation.to_string(), "2026-11-22T18:31:05Z");
        for bad in [
            &b""[..],
            b"[]",
            b"{\"serial\": 1",
            b"{\"serial\": \"x\", \"generation\": \"2026-11-22T18:31:05Z\"}",
        ] {
            assert_eq!(head_of(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_version_before_the_current_one_is_by_serial() {
        assert_eq!(previous(&versions()).map(|v| v.serial), Some(3));
        assert_eq!(previous(&versions()[..1]), None);
        assert_eq!(archive_name(42, Timestamp(1_795_372_265)), "manifest-20261122T183105Z-00000042.json");
    }
}
