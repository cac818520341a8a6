//! The versions of the manifest in a store: the current one and those it replaced, which are kept byte for
//! byte under `manifests/`. Finds and reads them; writing is [`super::publish`]'s. A name is what anybody who can
//! write the store makes of it: an object counts as a version only if what it holds has that name.

use super::model::{Change, MAX_BYTES, Manifest};
use super::parse::{self, Mode};
use super::signature;
use super::types::MAX_SERIAL;
use crate::clock::Timestamp;
use crate::error::{Error, Result, did_you_mean};
use crate::keys::PublicKey;
use crate::store::{ARCHIVE_PREFIX, GetResult, MANIFEST_KEY, Store};
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
pub struct VersionHead {
    /// Its serial.
    pub serial: u64,
    /// When it was written.
    pub generation: Timestamp,
    /// What it changed.
    pub change: Change,
}

/// How much of a version is read for its [`VersionHead`], in bytes.
const HEAD_BYTES: u64 = 4096;

/// How much of one that was written by hand, with its services first: several are read at a time.
const WHOLE_BYTES: u64 = 4 << 20;

/// A text, or nothing where something else stands: who sends a tree here does not have it built.
#[derive(Default)]
struct Text(String);

impl<'de> serde::Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(TextVisitor)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E>(self, text: &str) -> Result<Text, E> {
        Ok(Text(text.to_string()))
    }

    fn visit_unit<E>(self) -> Result<Text, E> {
        Ok(Text::default())
    }

    fn visit_bool<E>(self, _: bool) -> Result<Text, E> {
        Ok(Text::default())
    }

    fn visit_u64<E>(self, _: u64) -> Result<Text, E> {
        Ok(Text::default())
    }

    fn visit_i64<E>(self, _: i64) -> Result<Text, E> {
        Ok(Text::default())
    }

    fn visit_f64<E>(self, _: f64) -> Result<Text, E> {
        Ok(Text::default())
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Text, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Text::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Text::default())
    }
}

/// The name a version is archived under; names sort by time, then serial.
pub fn archive_name(serial: u64, generation: Timestamp) -> String {
    format!("manifest-{}-{serial:08}.json", generation.compact())
}

/// The key of an archived version.
pub fn archive_key(name: &str) -> String {
    format!("{ARCHIVE_PREFIX}{name}")
}

/// The number in a name that has exactly the form of [`archive_name`].
pub(super) fn serial_in(name: &str) -> Option<u64> {
    let (time, serial) = name.strip_prefix("manifest-")?.strip_suffix(".json")?.split_once('-')?;
    let (date, clock) = time.strip_suffix('Z')?.split_once('T')?;
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let plain = date.len() == 8 && clock.len() == 6 && digits(date) && digits(clock) && digits(serial);
    let number: u64 = serial.parse().ok().filter(|n| plain && *n <= MAX_SERIAL)?;
    (serial == format!("{number:08}")).then_some(number)
}

/// The archived versions, newest first, by their names; objects of other names are left out.
pub fn archived(store: &dyn Store) -> Result<Vec<Version>> {
    Ok(listing(store)?.0)
}

/// The archived versions, newest first, and the names of what else is there.
fn listing(store: &dyn Store) -> Result<(Vec<Version>, Vec<String>)> {
    let (mut versions, mut others) = (Vec::new(), Vec::new());
    for key in store.list(ARCHIVE_PREFIX)? {
        let name = key.strip_prefix(ARCHIVE_PREFIX).unwrap_or(&key).to_string();
        match serial_in(&name) {
            Some(serial) => versions.push(Version { name, serial, current: false }),
            None => others.push(name),
        }
    }
    versions
        .sort_by(|a, b| (Reverse(a.serial), Reverse(&a.name)).cmp(&(Reverse(b.serial), Reverse(&b.name))));
    Ok((versions, others))
}

/// All versions, newest first. A current one that is missing, or whose beginning cannot be read, is not
/// among them.
pub fn all(store: &dyn Store) -> Result<Vec<Version>> {
    Ok(all_and_others(store)?.0)
}

/// As [`all`], with the names of what is among the archived versions and has no version's name.
pub fn all_and_others(store: &dyn Store) -> Result<(Vec<Version>, Vec<String>)> {
    let (mut versions, others) = listing(store)?;
    if let Some(head) = head(store, MANIFEST_KEY)? {
        let name = archive_name(head.serial, head.generation);
        // A writer that was ended between archiving and replacing leaves the current one in both places.
        versions.retain(|v| v.name != name);
        let at = versions.partition_point(|v| v.serial > head.serial);
        versions.insert(at, Version { name, serial: head.serial, current: true });
    }
    Ok((versions, others))
}

/// Why an object that has the name of a version is none: what it holds has another name. None for a version.
pub fn mismatch(version: &Version, head: Option<&VersionHead>) -> Option<String> {
    if version.current {
        return None;
    }
    let Some(VersionHead { serial, generation, .. }) = head else {
        return Some("not a version: it cannot be read".into());
    };
    let named = archive_name(*serial, *generation) == version.name;
    (!named).then(|| format!("not a version: it holds version {serial} of {generation}"))
}

/// Whether what it holds has its name; one request.
fn is_version(store: &dyn Store, version: &Version) -> Result<bool> {
    Ok(version.current || mismatch(version, head(store, &archive_key(&version.name))?.as_ref()).is_none())
}

/// The version that `word` means: a name, an unambiguous beginning of one (`.json` may follow), or a number. Where
/// it fits several objects, those that are no versions do not count.
pub fn find<'a>(store: &dyn Store, versions: &'a [Version], word: &str) -> Result<&'a Version> {
    find_where(versions, word, |version| is_version(store, version))
}

/// As [`find`]; where the word fits several, those for which `counts` says no do not count.
pub fn find_where<'a>(
    versions: &'a [Version],
    word: &str,
    counts: impl Fn(&Version) -> Result<bool>,
) -> Result<&'a Version> {
    let mut fitting = fitting(versions, word);
    if (2..=COMPARED).contains(&fitting.len()) {
        let mut real = Vec::new();
        for version in &fitting {
            if counts(version)? {
                real.push(*version);
            }
        }
        if !real.is_empty() {
            fitting = real;
        }
    }
    one_of(versions, &fitting, word)
}

/// How many objects that a word fits are looked at for whether they are versions.
const COMPARED: usize = 20;

/// All that `word` fits.
pub(super) fn fitting<'a>(versions: &'a [Version], word: &str) -> Vec<&'a Version> {
    let stem = word.strip_prefix(ARCHIVE_PREFIX).unwrap_or(word);
    let stem = stem.strip_suffix(".json").unwrap_or(stem);
    if let Some(exact) = versions.iter().find(|v| v.name.strip_suffix(".json") == Some(stem)) {
        return vec![exact];
    }
    if let Ok(serial) = stem.parse::<u64>() {
        let numbered: Vec<&Version> = versions.iter().filter(|v| v.serial == serial).collect();
        if !numbered.is_empty() {
            return numbered;
        }
    }
    let begins = |v: &&Version| {
        !stem.is_empty()
            && (v.name.starts_with(stem)
                || v.name.strip_prefix("manifest-").is_some_and(|n| n.starts_with(stem)))
    };
    versions.iter().filter(begins).collect()
}

/// The one that is meant of those that `word` fits.
fn one_of<'a>(versions: &[Version], fitting: &[&'a Version], word: &str) -> Result<&'a Version> {
    let same_number =
        |v: &Version| fitting.iter().all(|o| o.serial == v.serial) && word.parse() == Ok(v.serial);
    match *fitting {
        [] => {
            let near = did_you_mean(word, versions.iter().map(|v| v.name.as_str()));
            Err(Error::new(format!("no version '{word}'{near}; 'deploy-manifest list --all' shows them")))
        }
        [one] => Ok(one),
        // Two histories that were joined have the number twice; the newest by name is meant, the others have names.
        [first, ..] if same_number(first) => Ok(first),
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
        GetResult::Found { bytes, .. } => Ok(bytes),
        GetResult::Missing | GetResult::NotModified => {
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
    let manifest = parse::manifest(bytes, Mode::Tolerant)
        .map_err(|e| Error::new(format!("{} in {}: {e}{ANOTHER}", version.name, store.url())))?;
    let head =
        VersionHead { serial: manifest.serial, generation: manifest.generation, change: Change::default() };
    match mismatch(version, Some(&head)) {
        None => Ok(manifest),
        Some(why) => Err(Error::new(format!(
            "{} in {} is {why}, which nobody published under this name{ANOTHER}",
            version.name,
            store.url()
        ))),
    }
}

/// As [`read`], also what none of these keys has signed, with why it is not believed.
pub fn read_with_doubt(
    store: &dyn Store,
    version: &Version,
    trusted: &[PublicKey],
) -> Result<(Manifest, Option<String>)> {
    let bytes = bytes(store, version)?;
    let manifest = parsed(store, version, &bytes)?;
    let doubt = match trusted.is_empty() {
        true => None,
        false => signature::check(&bytes, &manifest, &store.identity(), trusted).err(),
    };
    Ok((manifest, doubt))
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
pub fn head(store: &dyn Store, key: &str) -> Result<Option<VersionHead>> {
    let Some(start) = store.get_start(key, HEAD_BYTES)? else { return Ok(None) };
    if let Some(head) = head_of(&start) {
        return Ok(Some(head));
    }
    // Written by hand, with its services first: the whole of it has the rest.
    if (start.len() as u64) < HEAD_BYTES {
        return Ok(None);
    }
    match store.get(key, None, WHOLE_BYTES) {
        Ok(GetResult::Found { bytes, .. }) => Ok(head_of(&bytes)),
        Ok(GetResult::Missing | GetResult::NotModified) | Err(crate::store::StoreError::TooLarge(_)) => {
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}

/// Reads the head out of the first bytes of a version, which may end anywhere after it.
pub fn head_of(start: &[u8]) -> Option<VersionHead> {
    let mut partial = Partial::default();
    // That it ends in the middle is no error here; what was read until then counts.
    drop(PartialSeed(&mut partial).deserialize(&mut serde_json::Deserializer::from_slice(start)));
    Some(VersionHead {
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
                    #[derive(Default, serde::Deserialize)]
                    #[serde(default)]
                    struct Told {
                        action: Text,
                        by: Text,
                    }
                    let Told { action: Text(action), by: Text(by) } = map.next_value()?;
                    *change = Some(Change { action, by, ..Change::default() });
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

    fn resolve<'a>(versions: &'a [Version], word: &str) -> Result<&'a Version> {
        one_of(versions, &fitting(versions, word), word)
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
    fn only_a_name_of_the_exact_form_is_a_versions() {
        assert_eq!(serial_in("manifest-20261122T183105Z-00000042.json"), Some(42));
        assert_eq!(serial_in("manifest-20261122T183105Z-123456789.json"), Some(123_456_789));
        for name in [
            "manifest-20261122T183105Z-42.json",
            "manifest-20261122T183105Z-0000000042.json",
            "manifest-20261122T183105Z-+0000042.json",
            "manifest-20261122T18310\u{9b}-00000042.json",
            "manifest-\u{9b}20261122T183105Z-00000042.json",
            "manifest-20261122T183105Z-x-00000042.json",
            "manifest-2026112T183105Z-00000042.json",
            "manifest-20261122T183105Z-99999999999999999.json",
        ] {
            assert_eq!(serial_in(name), None, "{name}");
        }
    }

    #[test]
    fn an_archived_version_has_the_name_that_its_content_makes() {
        assert_eq!(archive_name(42, Timestamp(1_795_372_265)), "manifest-20261122T183105Z-00000042.json");
    }
}
