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
use crate::store::{ARCHIVE_PREFIX, MANIFEST_KEY, Store, StoreError};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
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

impl Version {
    /// Where it is in the store.
    pub fn key(&self) -> String {
        if self.current { MANIFEST_KEY.to_string() } else { archive_key(&self.name) }
    }
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

impl VersionHead {
    /// What its name is made of.
    pub fn id(&self) -> (u64, Timestamp) {
        (self.serial, self.generation)
    }
}

/// How much of a version is read for its [`VersionHead`], in bytes.
const HEAD_BYTES: u64 = 4096;

/// How much of one that was written by hand, with its services first: several are read at a time.
const WHOLE_BYTES: u64 = 4 << 20;

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
    Ok(named(&store.list(ARCHIVE_PREFIX)?).0)
}

/// The versions among these keys, newest first, and the names of the others.
pub(super) fn named(keys: &[String]) -> (Vec<Version>, Vec<String>) {
    let (mut versions, mut others) = (Vec::new(), Vec::new());
    for name in keys.iter().map(|key| key.strip_prefix(ARCHIVE_PREFIX).unwrap_or(key)) {
        match serial_in(name) {
            Some(serial) => versions.push(Version { name: name.into(), serial, current: false }),
            None => others.push(name.to_string()),
        }
    }
    newest_first(&mut versions);
    (versions, others)
}

pub(super) fn newest_first(versions: &mut [Version]) {
    versions.sort_by(|a, b| (b.serial, b.current, &b.name).cmp(&(a.serial, a.current, &a.name)));
}

/// All versions, newest first. A current one that is missing, or whose beginning cannot be read, is not
/// among them.
pub fn all(store: &dyn Store) -> Result<Vec<Version>> {
    Ok(all_and_others(store)?.0)
}

/// As [`all`], with the names of what is among the archived versions and has no version's name.
pub fn all_and_others(store: &dyn Store) -> Result<(Vec<Version>, Vec<String>)> {
    let (mut versions, others) = named(&store.list(ARCHIVE_PREFIX)?);
    if let Some(head) = head(store, MANIFEST_KEY)? {
        let name = archive_name(head.serial, head.generation);
        // A writer that was ended between archiving and replacing leaves the current one in both places.
        versions.retain(|v| v.name != name);
        versions.push(Version { name, serial: head.serial, current: true });
        newest_first(&mut versions);
    }
    Ok((versions, others))
}

/// Why an object that has the name of a version is none: what it holds has another name. None for a version.
pub fn mismatch(version: &Version, held: Option<(u64, Timestamp)>) -> Option<String> {
    match held {
        _ if version.current => None,
        None => Some("not a version: it cannot be read".into()),
        Some((serial, generation)) if archive_name(serial, generation) == version.name => None,
        Some((serial, generation)) => {
            Some(format!("not a version: it holds version {serial} of {generation}"))
        }
    }
}

/// The version that `word` means: a name, an unambiguous beginning of one (`.json` may follow), or a number. Where
/// it fits several objects, those that are no versions do not count.
pub fn find<'a>(store: &dyn Store, versions: &'a [Version], word: &str) -> Result<&'a Version> {
    find_where(versions, word, |version| {
        let head = if version.current { None } else { head(store, &version.key())? };
        Ok(mismatch(version, head.as_ref().map(VersionHead::id)).is_none())
    })
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

/// What a person writes for a name, without what may be around it.
pub(super) fn stem(word: &str) -> &str {
    let name = word.strip_prefix(ARCHIVE_PREFIX).unwrap_or(word);
    name.strip_suffix(".json").unwrap_or(name)
}

/// All that `word` fits.
pub(super) fn fitting<'a>(versions: &'a [Version], word: &str) -> Vec<&'a Version> {
    let stem = stem(word);
    if let Some(exact) = versions.iter().find(|v| self::stem(&v.name) == stem) {
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
                "'{word}' fits {} versions: {}; write more of the name, or the number",
                fitting.len(),
                names.join(", ")
            )))
        }
    }
}

/// The bytes of a version.
pub fn bytes(store: &dyn Store, version: &Version) -> Result<Vec<u8>> {
    let key = version.key();
    store
        .read(&key, MAX_BYTES)?
        .ok_or_else(|| Error::new(format!("{key} is gone from {}; run the command again", store.url())))
}

/// What to do about a version that is of no use.
const ANOTHER: &str = "; take another one of 'deploy-manifest list', by its name";

/// Reads a version whole, with the names of those of these keys that have signed it, or why it is not to be trusted.
/// Where there are no keys, nobody's signature is expected.
pub fn read(
    store: &dyn Store,
    version: &Version,
    trusted: &[PublicKey],
) -> Result<(Manifest, Result<Vec<String>, String>)> {
    let error = |why: String| Error::new(format!("{} in {}{why}{ANOTHER}", version.name, store.url()));
    let bytes = bytes(store, version)?;
    let manifest = parse::manifest(&bytes, Mode::Tolerant).map_err(|e| error(format!(": {e}")))?;
    let Manifest { serial, generation, .. } = manifest;
    if let Some(why) = mismatch(version, Some((serial, generation))) {
        return Err(error(format!(" is {why}, which nobody published under this name")));
    }
    let signed = match trusted.is_empty() {
        true => Ok(Vec::new()),
        false => signature::check(&bytes, &manifest, &store.identity(), trusted),
    };
    Ok((manifest, signed))
}

/// As [`read`]; that it is not to be trusted is an error: whoever can write the store can put files among the old
/// versions too.
pub fn read_trusted(
    store: &dyn Store,
    version: &Version,
    trusted: &[PublicKey],
) -> Result<(Manifest, Vec<String>)> {
    let (manifest, signed) = read(store, version, trusted)?;
    let names = signed.map_err(|why| {
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
    match store.read(key, WHOLE_BYTES) {
        Ok(whole) => Ok(whole.and_then(|bytes| head_of(&bytes))),
        Err(StoreError::TooLarge(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Reads the head out of the first bytes of a version, which may end anywhere after it.
pub fn head_of(start: &[u8]) -> Option<VersionHead> {
    let mut partial = Partial::default();
    // That it ends in the middle is no error here; what was read until then counts.
    drop(serde_json::Deserializer::from_slice(start).deserialize_map(&mut partial));
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

impl<'de> Visitor<'de> for &mut Partial {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a manifest")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Partial { serial, generation, change } = self;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "serial" => *serial = Some(map.next_value()?),
                "generation" => *generation = Some(map.next_value()?),
                "change" => {
                    // Without what else is there: who sends a tree here does not have it built.
                    #[derive(Default, Deserialize)]
                    #[serde(default)]
                    struct Told {
                        action: String,
                        by: String,
                    }
                    let Told { action, by } = map.next_value()?;
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
