//! Which versions a version comes after. A manifest names those before it by number and by the digest of their
//! canonical form ([`super::signature`]), newest first, so that whoever has seen one of them can tell whether a
//! later one was made on top of it. Pure: reads nothing, and believes nothing; whether the list itself is to be
//! believed is decided by the signature over it.

use super::model::Manifest;
use super::parse::MAX_SERIAL;
use serde::{Serialize, Serializer};
use std::fmt;

/// How many versions before it a version names: with that, a host that missed some can still tell.
pub const LENGTH: usize = 16;

/// The SHA-256 of a manifest's content ([`super::signature::digest`]) in lower-case hexadecimal digits: neither the
/// signatures nor the store that they are for are part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest(String);

impl Digest {
    /// Of these bytes.
    pub fn of(canonical: &[u8]) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, canonical);
        Digest(digest.as_ref().iter().map(|b| format!("{b:02x}")).collect())
    }

    fn parse(text: &str) -> Option<Self> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        (text.len() == 64 && text.bytes().all(hex)).then(|| Digest(text.into()))
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A version before another: its number, and which content it had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ancestor {
    /// Its number.
    pub serial: u64,
    /// Its content; None: it was lost or damaged, and a person replaced it whatever it was.
    pub digest: Option<Digest>,
}

/// How an ancestor whose content was lost is written.
const LOST: &str = "lost";

impl Ancestor {
    /// Reads `NUMBER:DIGEST` or `NUMBER:lost`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let read = || {
            let (number, content) = text.split_once(':')?;
            let plain = number.bytes().all(|b| b.is_ascii_digit());
            let serial = number.parse().ok().filter(|n| plain && *n <= MAX_SERIAL)?;
            let digest = if content == LOST { None } else { Some(Digest::parse(content)?) };
            Some(Ancestor { serial, digest })
        };
        read().ok_or_else(|| {
            "is not a version before this one; NUMBER:SHA256 or NUMBER:lost is expected".to_string()
        })
    }
}

impl fmt::Display for Ancestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.serial, self.digest.as_ref().map_or(LOST, Digest::as_str))
    }
}

impl Serialize for Ancestor {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// What a version says of those before it. Empty when it says nothing: it is the first, or a program wrote it that
/// does not know the list and carried along that of the version before.
fn told(manifest: &Manifest) -> &[Ancestor] {
    match manifest.previous.iter().any(|a| a.serial.checked_add(1) == Some(manifest.serial)) {
        true => &manifest.previous,
        false => &[],
    }
}

/// A version and those before it, as the next one has to name them.
pub fn line(manifest: &Manifest, digest: Digest) -> Vec<Ancestor> {
    let mut line = vec![Ancestor { serial: manifest.serial, digest: Some(digest) }];
    line.extend_from_slice(told(manifest));
    line
}

/// What a new version of the number `serial` says of those before it, of all that is known of them. Where the one
/// right before it is not known, it was lost.
pub fn before(serial: u64, known: impl IntoIterator<Item = Ancestor>) -> Vec<Ancestor> {
    let mut list: Vec<Ancestor> = Vec::new();
    for ancestor in known {
        if ancestor.serial < serial && !list.contains(&ancestor) {
            list.push(ancestor);
        }
    }
    let last = serial.saturating_sub(1);
    if last > 0 && list.iter().all(|a| a.serial != last) {
        list.push(Ancestor { serial: last, digest: None });
    }
    list.sort_by_key(|a| std::cmp::Reverse(a.serial));
    list.truncate(LENGTH);
    list
}

/// How a version stands to one that was seen before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// It is that one, perhaps with more signatures.
    Same,
    /// It has a higher number, and nothing says that it does not come after that one.
    Later,
    /// It has a lower number.
    Older,
    /// It has the same number with another content, or names another version of that number as the one before it.
    Fork,
}

/// How `manifest`, of this digest, stands to the version `serial` of the digest `seen`.
pub fn relation(manifest: &Manifest, digest: &Digest, serial: u64, seen: &Digest) -> Relation {
    if manifest.serial < serial {
        return Relation::Older;
    }
    if manifest.serial == serial {
        return if digest == seen { Relation::Same } else { Relation::Fork };
    }
    let told = told(manifest);
    if told.iter().any(|a| a.serial == serial && a.digest.as_ref().is_none_or(|d| d == seen)) {
        return Relation::Later;
    }
    // What is beyond the end of the list cannot be known.
    match told.iter().any(|a| a.serial <= serial) {
        true => Relation::Fork,
        false => Relation::Later,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn ancestor(serial: u64, name: &str) -> Ancestor {
        Ancestor { serial, digest: Some(digest(name)) }
    }

    fn version(serial: u64, previous: Vec<Ancestor>) -> Manifest {
        Manifest { serial, previous, ..Manifest::empty(Timestamp(0), "ann@laptop") }
    }

    #[test]
    fn an_ancestor_is_read_as_it_is_written_and_nothing_else_is() {
        for a in [ancestor(9, "nine"), Ancestor { serial: 3, digest: None }] {
            assert_eq!(Ancestor::parse(&a.to_string()), Ok(a));
        }
        let hex = digest("x").to_string();
        for bad in [
            "9".to_string(),
            "9:".into(),
            ":lost".into(),
            "9:LOST".into(),
            format!("+9:{hex}"),
            format!("9:{}", &hex[1..]),
            format!("9:{}", hex.to_uppercase()),
            format!("9:{hex} "),
            format!("99999999999999999999:{hex}"),
        ] {
            assert!(Ancestor::parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_version_comes_after_another_unless_its_list_says_otherwise() {
        let line = |n: u64| before(n, (1..n).map(|s| ancestor(s, &s.to_string())));
        let new = version(30, line(30));
        assert_eq!(new.previous.len(), LENGTH);
        let to = |serial: u64, seen: &str| relation(&new, &digest("30"), serial, &digest(seen));
        for (serial, seen, expected) in [
            (30, "30", Relation::Same),
            (30, "other", Relation::Fork),
            (31, "31", Relation::Older),
            (29, "29", Relation::Later),
            (29, "other", Relation::Fork),
            (14, "14", Relation::Later),
            (14, "other", Relation::Fork),
            // The list ends before it.
            (13, "other", Relation::Later),
        ] {
            assert_eq!(to(serial, seen), expected, "{serial} {seen}");
        }
        // A number that the writer did not know of, although it knew older ones.
        let gap = version(10, vec![ancestor(9, "9"), ancestor(7, "7")]);
        assert_eq!(relation(&gap, &digest("10"), 8, &digest("8")), Relation::Fork);
    }

    #[test]
    fn a_list_that_an_older_program_carried_along_says_nothing() {
        let carried = version(10, vec![ancestor(8, "8"), ancestor(7, "7")]);
        assert_eq!(relation(&carried, &digest("10"), 8, &digest("other")), Relation::Later);
        assert_eq!(relation(&version(10, Vec::new()), &digest("10"), 8, &digest("other")), Relation::Later);
        assert_eq!(super::line(&carried, digest("10")), [ancestor(10, "10")]);
    }

    #[test]
    fn what_was_lost_may_have_been_anything_and_two_histories_can_be_joined() {
        let mended = version(4, before(4, [ancestor(2, "2"), ancestor(1, "1")]));
        assert_eq!(mended.previous[0], Ancestor { serial: 3, digest: None });
        assert_eq!(relation(&mended, &digest("4"), 3, &digest("whatever")), Relation::Later);
        let joined = version(4, before(4, [ancestor(3, "a"), ancestor(3, "b"), ancestor(3, "a")]));
        assert_eq!(joined.previous, [ancestor(3, "a"), ancestor(3, "b")]);
        for seen in ["a", "b"] {
            assert_eq!(relation(&joined, &digest("4"), 3, &digest(seen)), Relation::Later);
        }
        assert_eq!(relation(&joined, &digest("4"), 3, &digest("c")), Relation::Fork);
        assert!(before(1, []).is_empty());
    }
}
