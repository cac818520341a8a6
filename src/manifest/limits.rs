//! How much of a manifest is read, looked at before anything is built of it or a signature is computed: who writes
//! the bucket could otherwise cost every host and every command gigabytes. The bounds are some times what a large
//! manifest of 10,000 services has; what they allow takes less than 200 MiB at its worst. Never judges what a
//! value means, nor whether the bytes are JSON.

use super::error::FieldError;
use super::json::field;
use super::model::{Change, Manifest, OBJECTS, Service};
use crate::bounds::{Container, Token, Tokens};
use std::borrow::Cow;

/// The services of a manifest: three times the 10,000 that are meant to be no trouble.
pub const MAX_SERVICES: usize = 30_000;

/// The values of a whole manifest. A service with every field written out has about fifty.
pub const MAX_VALUES: usize = 1_500_000;

/// The values of one service, or of all that stands beside the services: a tree of them is built at a time, at
/// up to 700 bytes each. Lists have at most a thousand entries.
pub const MAX_ENTRY_VALUES: usize = 10_000;

/// The values of fields that this version does not know, in the whole manifest: ten for each of 10,000 services.
/// They are kept as a tree for as long as the manifest is.
pub const MAX_UNKNOWN_VALUES: usize = 100_000;

/// Their bytes.
pub const MAX_UNKNOWN_BYTES: usize = 4 << 20;

/// The bytes of one text that this version knows: ten times the longest that a field may have, so that a mistake can be shown at little cost.
pub const MAX_TEXT_BYTES: usize = 1 << 20;

/// Objects and arrays within one another. Those that this version knows reach five.
pub const MAX_DEPTH: usize = 32;

/// What stands at some place of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// A manifest.
    Manifest,
    /// Its array of services.
    Services,
    /// A service.
    Service,
    /// An object that has these fields.
    Fields(&'static [&'static str]),
    /// What this version knows, with all that is below.
    Known,
    /// What it does not know.
    Unknown,
}

impl Level {
    /// The member of that name.
    fn member(self, key: &[u8]) -> Level {
        let known = |fields: &[&str]| match fields.iter().any(|f| f.as_bytes() == key) {
            true => Level::Known,
            false => Level::Unknown,
        };
        match self {
            Level::Manifest => match key {
                b"services" => Level::Services,
                b"change" => Level::Fields(Change::FIELDS),
                _ => known(Manifest::FIELDS),
            },
            Level::Service => match OBJECTS.iter().find(|(name, _)| name.as_bytes() == key) {
                Some((_, fields)) => Level::Fields(fields),
                None => known(Service::FIELDS),
            },
            Level::Fields(fields) => known(fields),
            // An object where the services should be: it is refused, and no part of it kept.
            Level::Services | Level::Known => Level::Known,
            Level::Unknown => Level::Unknown,
        }
    }

    /// An element.
    fn element(self) -> Level {
        match self {
            Level::Services => Level::Service,
            Level::Unknown => Level::Unknown,
            _ => Level::Known,
        }
    }
}

/// An object or array that is open.
struct Frame<'a> {
    level: Level,
    container: Container,
    /// The member or the element that is being read.
    key: &'a [u8],
    /// What that member is.
    member: Level,
    index: Option<usize>,
    /// How many names there were before its own.
    names: usize,
}

struct Count<'a> {
    open: Vec<Frame<'a>>,
    /// What a document at the root is.
    root: Level,
    values: usize,
    entry: usize,
    unknown: usize,
    unknown_bytes: usize,
    /// The names of the members of all that is open; None: a name may be there twice.
    names: Option<Vec<Cow<'a, [u8]>>>,
}

/// Checks a whole manifest, of which nothing is to be built.
pub fn manifest(bytes: &[u8]) -> Result<(), FieldError> {
    check(bytes, Level::Manifest, None)
}

/// Checks a document that is to be read as `root` says, and that no object of it has a name twice; the error names the
/// place.
pub(super) fn document(bytes: &[u8], root: Level) -> Result<(), FieldError> {
    check(bytes, root, Some(Vec::new()))
}

fn check<'a>(bytes: &'a [u8], root: Level, names: Option<Vec<Cow<'a, [u8]>>>) -> Result<(), FieldError> {
    let mut count =
        Count { open: Vec::new(), root, values: 0, entry: 0, unknown: 0, unknown_bytes: 0, names };
    for token in Tokens::new(bytes) {
        match token {
            Token::Key(range) => {
                let length = range.len();
                if let Some(frame) = count.open.last_mut() {
                    // Without its quotes; one that is cut off has but one.
                    frame.key = bytes[range].get(1..length - 1).unwrap_or_default();
                    let name = unescaped(frame.key);
                    frame.member = frame.level.member(&name);
                    if let Some(names) = &mut count.names {
                        names.push(name);
                        // One without a value: no parser goes on here either, and nothing else counts names.
                        if names.len() > count.values {
                            return Ok(());
                        }
                    }
                    if frame.member == Level::Unknown {
                        count.unknown_bytes += length;
                    } else if length > MAX_TEXT_BYTES {
                        return Err(count.too_long(length));
                    }
                }
            }
            Token::Scalar(range) => {
                count.value(range.len())?;
            }
            Token::Open(container) => {
                let level = count.value(1)?;
                let names = count.names.as_ref().map_or(0, Vec::len);
                count.open.push(Frame {
                    level,
                    container,
                    key: b"",
                    member: Level::Known,
                    index: None,
                    names,
                });
                if count.open.len() > MAX_DEPTH {
                    count.open.truncate(3);
                    return Err(count.error(format!(
                        "is nested more than {MAX_DEPTH} levels deep, too deep to be read; make it flatter"
                    )));
                }
            }
            Token::Close => count.close()?,
        }
    }
    Ok(())
}

/// A name as it is meant; most are written without escapes.
fn unescaped(key: &[u8]) -> Cow<'_, [u8]> {
    if !key.contains(&b'\\') {
        return key.into();
    }
    let quoted = [b"\"", key, b"\""].concat();
    serde_json::from_slice::<String>(&quoted).map_or(key.into(), |name| name.into_bytes().into())
}

impl Count<'_> {
    /// Ends the innermost object or array.
    fn close(&mut self) -> Result<(), FieldError> {
        if let (Some(frame), Some(names)) = (self.open.last(), &mut self.names) {
            names[frame.names..].sort_unstable();
            let twice = names[frame.names..].windows(2).find(|pair| pair[0] == pair[1]);
            if let Some(name) = twice.map(|pair| pair[0].clone()) {
                return Err(self.error_at(&name, "is a duplicate in its object; keep one".into()));
            }
            names.truncate(frame.names);
        }
        self.open.pop();
        Ok(())
    }

    fn too_long(&self, bytes: usize) -> FieldError {
        self.error(format!("has {bytes} bytes, more than the {MAX_TEXT_BYTES} that are read"))
    }

    /// Counts a value of so many bytes and returns what it is.
    fn value(&mut self, bytes: usize) -> Result<Level, FieldError> {
        let level = match self.open.last_mut() {
            None => self.root,
            Some(Frame { container: Container::Object, member, .. }) => *member,
            Some(Frame { level, container: Container::Array, index, .. }) => {
                *index = Some(index.map_or(0, |i| i + 1));
                level.element()
            }
        };
        if level != Level::Unknown && bytes > MAX_TEXT_BYTES {
            return Err(self.too_long(bytes));
        }
        self.values += 1;
        if self.values > MAX_VALUES {
            let reason = format!("has more than {MAX_VALUES} values, too many to be read");
            return Err(FieldError::new("", format!("it {reason}; take services or variables out")));
        }
        match level {
            Level::Service => {
                // The next one is built when this one is done with.
                self.entry = 1;
                if self.open.last().and_then(|f| f.index).is_some_and(|index| index >= MAX_SERVICES) {
                    self.open.truncate(1);
                    return Err(self.error(format!(
                        "has more than {MAX_SERVICES} services, too many to be read; divide them between two stores"
                    )));
                }
            }
            Level::Unknown => {
                self.unknown += 1;
                self.unknown_bytes += bytes;
                if self.unknown > MAX_UNKNOWN_VALUES || self.unknown_bytes > MAX_UNKNOWN_BYTES {
                    return Err(self.error(format!(
                        "with this, fields that this version does not know have more than {MAX_UNKNOWN_VALUES} \
                         values or {} MiB, too much to be read; take them out, or upgrade this omni-deploy if a \
                         newer one wrote them",
                        MAX_UNKNOWN_BYTES >> 20
                    )));
                }
            }
            Level::Manifest | Level::Services | Level::Fields(_) | Level::Known => {
                self.entry += 1;
                if self.entry > MAX_ENTRY_VALUES {
                    self.open.truncate(2);
                    return Err(self.error(format!(
                        "has more than {MAX_ENTRY_VALUES} values, too many to be read; take some out"
                    )));
                }
            }
        }
        Ok(level)
    }

    /// What is wrong at the value that is being read.
    fn error(&self, reason: String) -> FieldError {
        let key = self.open.last().map(|frame| unescaped(frame.key)).unwrap_or_default();
        self.error_at(&key, reason)
    }

    /// What is wrong at the member `key` of the object that is open.
    fn error_at(&self, key: &[u8], reason: String) -> FieldError {
        let mut path = String::new();
        for (nth, frame) in self.open.iter().enumerate() {
            match (frame.container, frame.index) {
                (Container::Array, Some(index)) => path = format!("{path}[{index}]"),
                (Container::Object, _) if !frame.key.is_empty() => {
                    let key = if nth + 1 == self.open.len() { key.into() } else { unescaped(frame.key) };
                    // Whoever sends megabytes of a name gets the beginning of it back.
                    let key = String::from_utf8_lossy(&key[..key.len().min(256)]);
                    path = field(&path, &key.chars().take(64).collect::<String>());
                }
                _ => break,
            }
        }
        FieldError::new(path, reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<(), String> {
        document(text.as_bytes(), Level::Manifest).map_err(|e| e.to_string())
    }

    fn list(of: &str, count: usize) -> String {
        format!("[{}]", vec![of; count].join(","))
    }

    #[test]
    fn each_bound_is_said_with_the_place_that_exceeds_it() {
        let env = |n: usize| (0..n).map(|i| format!("\"V{i}\":\"\"")).collect::<Vec<_>>().join(",");
        let half = "x".repeat(MAX_UNKNOWN_BYTES / 2 + 1);
        for (text, said) in [
            (format!("{{\"later\":{}}}", list("{\"\":0}", MAX_UNKNOWN_VALUES / 2)), "later["),
            (
                format!("{{\"l\\u0061ter\":{}}}", list("0", MAX_UNKNOWN_VALUES)),
                "later[99999]: with this, fields that",
            ),
            (
                format!("{{\"a\":\"{half}\",\"b\":\"{half}\"}}"),
                "b: with this, fields that this version does not know",
            ),
            (
                format!("{{\"services\":[{{}},{{\"http\":{{\"x\":{}}}}}]}}", list("0", MAX_UNKNOWN_VALUES)),
                "services[1].http.x[",
            ),
            (
                format!("{{\"services\":{}}}", list("{}", MAX_SERVICES + 1)),
                "services: has more than 30000 services",
            ),
            (
                format!("{{\"services\":[{{}},{{\"env\":{{{}}}}}]}}", env(MAX_ENTRY_VALUES)),
                "services[1]: has more than 10000 values",
            ),
            (format!("{{\"signatures\":{}}}", list("\"\"", MAX_ENTRY_VALUES)), "signatures["),
            (
                format!("{{\"change\":{{\"by\":{}}}}}", list("{\"\":0}", MAX_ENTRY_VALUES / 2)),
                "change.by: has more than",
            ),
            (
                format!("{{\"services\":{}}}", list(&format!("{{\"hosts\":{}}}", list("\"\"", 9_000)), 170)),
                "it has more than 1500000 values",
            ),
            (
                format!("{{\"services\":[{{\"name\":\"{}\"", "x".repeat(MAX_TEXT_BYTES)),
                "services[0].name: has 1048578 bytes",
            ),
            (format!("{{\"services\":{}1", "[".repeat(40)), "services[0][0]: is nested more than 32 levels"),
        ] {
            let e = of(&text).unwrap_err();
            assert!(e.starts_with(said), "{e}");
        }
    }

    #[test]
    fn ten_thousand_services_with_every_field_and_some_of_a_newer_version_are_read() {
        let fixture: serde_json::Value =
            serde_json::from_slice(include_bytes!("../../tests/fixtures/manifest-v1.json")).unwrap();
        let service = fixture["services"][0].to_string();
        assert_eq!(of(&format!("{{\"version\":1,\"services\":{}}}", list(&service, 10_000))), Ok(()));
        // The same with five fields of a newer version each, and a tree in one of them.
        let newer =
            format!("{},\"a\":1,\"b\":[],\"c\":{{\"d\":{{\"e\":\"f\"}}}}}}", &service[..service.len() - 1]);
        assert_eq!(of(&format!("{{\"version\":1,\"services\":{}}}", list(&newer, 10_000))), Ok(()));
    }

    #[test]
    fn names_without_values_are_not_kept() {
        let names = vec!["\"\""; 100_000].join(",");
        // No parser goes on after the second.
        assert_eq!(of(&format!("{{{names}")), Ok(()));
        assert_eq!(of(&format!("{{{names}}}")), Ok(()));
    }

    #[test]
    fn a_service_alone_has_the_bounds_of_one() {
        assert!(document(b"{\"name\": \"ava\", \"later\": [1]}", Level::Service).is_ok());
        let large = format!("{{\"hosts\":{}}}", list("\"\"", MAX_ENTRY_VALUES));
        assert!(document(large.as_bytes(), Level::Service).is_err());
    }

    #[test]
    fn a_name_that_is_there_twice_is_named_with_its_path_wherever_it_is() {
        for (text, path) in [
            (r#"{"services": [{}, {"http": {"a b": 1, "a b": 2}}]}"#, "services[1].http[\"a b\"]"),
            (r#"{"services": [{"name": "a", "\u006eame": "b"}]}"#, "services[0].name"),
            (r#"{"later": [{"x": {"y": 1, "z": 2, "y": 3}}], "x": 1}"#, "later[0].x.y"),
            (r#"{"version": 1, "services": [{"env": {"A": ""}}], "version": 1}"#, "version"),
        ] {
            assert_eq!(of(text), Err(format!("{path}: is a duplicate in its object; keep one")));
            assert_eq!(manifest(text.as_bytes()), Ok(()), "nothing is built of it");
        }
        assert_eq!(of(r#"{"a": {"a": 1}, "b": [{"a": 1}, {"a": 1}]}"#), Ok(()));
    }
}
