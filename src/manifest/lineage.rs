//! Which versions a version comes after. A manifest names those before it by number and by the digest of their
//! canonical form ([`super::signature`]), nearest first, so that whoever has seen one of them can tell whether a
//! later one was made on top of it. Pure: reads nothing, and trusts nothing; whether the list itself is to be
//! trusted is decided by the signature over it.

use super::model::Manifest;
use super::types::{self, MAX_SERIAL};
use crate::hash::Sha256;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// How many versions before it a version names: with that, a host that missed some can still tell.
pub const LENGTH: usize = 16;

/// The SHA-256 of a manifest's content ([`super::signature::digest`]) in lower-case hexadecimal digits: neither the
/// signatures nor the store that they are for are part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest(Sha256);

impl Digest {
    /// Of these bytes.
    pub fn of(canonical: &[u8]) -> Self {
        Digest(Sha256::of(canonical))
    }

    fn parse(text: &str) -> Option<Self> {
        let hash = Sha256::parse(&format!("sha256:{text}")).ok()?;
        Some(Digest(hash)).filter(|_| text.len() == 64)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.base16())
    }
}

/// A version before another: its number, and which content it had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ancestor {
    /// Its number.
    pub serial: u64,
    /// Its content; None: it was lost or damaged, and a person published without it.
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
            "is not a version before this one; expected NUMBER:SHA256 or NUMBER:lost".to_string()
        })
    }
}

impl fmt::Display for Ancestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.digest {
            Some(digest) => write!(f, "{}:{digest}", self.serial),
            None => write!(f, "{}:{LOST}", self.serial),
        }
    }
}

impl Serialize for Ancestor {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ancestor {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        types::text(d, Ancestor::parse)
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

/// Two lines as one, by turns, so that both reach equally far; of what they have in common, once. The first one's newest
/// comes first: as versions are added to it, that is the last to be left out.
pub fn join(one: &[Ancestor], other: &[Ancestor]) -> Vec<Ancestor> {
    let mut joined: Vec<Ancestor> = Vec::new();
    for at in 0..one.len().max(other.len()) {
        for ancestor in [one.get(at), other.get(at)].into_iter().flatten() {
            if !joined.contains(ancestor) {
                joined.push(ancestor.clone());
            }
        }
    }
    joined
}

/// What a new version of the number `serial` says of those before it, of all that is known of them, the nearest first.
/// Where the one right before it is not known, it was lost.
pub fn before(serial: u64, known: impl IntoIterator<Item = Ancestor>) -> Vec<Ancestor> {
    let mut list: Vec<Ancestor> = Vec::new();
    for ancestor in known {
        if ancestor.serial < serial && !list.contains(&ancestor) {
            list.push(ancestor);
        }
    }
    let last = serial.saturating_sub(1);
    if last > 0 && list.iter().all(|a| a.serial != last) {
        list.insert(0, Ancestor { serial: last, digest: None });
    }
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
    /// It has the same number with another content, or names another version of that number as one before it, or
    /// says that this one was lost.
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
    // Of a version that was lost, whoever made the next one knew nothing: it was not made on what was seen.
    if told.iter().any(|a| a.serial == serial && a.digest.as_ref() == Some(seen)) {
        return Relation::Later;
    }
    // What is beyond the end of the list, or of one of several that were joined, cannot be known. Before a version that
    // was lost, the list goes on with what the next one was made of.
    let next = told.iter().filter(|a| a.serial > serial).min_by_key(|a| a.serial);
    let ends = next.is_some_and(|a| a.digest.is_some()) && told.iter().all(|a| a.serial != serial);
    match told.iter().any(|a| a.serial <= serial) && !ends {
        true => Relation::Fork,
        false => Relation::Later,
    }
}

/// Whether `manifest` is, or was made on, a version that was `refused` because it came without the version `serial` of
/// the digest `seen`, and does not name that one itself. Where its list ends with the refused one, this is not known.
pub fn goes_on(manifest: &Manifest, digest: &Digest, refused: &Ancestor, serial: u64, seen: &Digest) -> bool {
    let told = told(manifest);
    if told.iter().any(|a| a.serial == serial && a.digest.as_ref() == Some(seen)) {
        return false;
    }
    let itself = manifest.serial == refused.serial && Some(digest) == refused.digest.as_ref();
    itself || told.contains(refused) && told.last() != Some(refused)
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
        let line = |n: u64| before(n, (1..n).rev().map(|s| ancestor(s, &s.to_string())));
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
        // The writer went on from an older one, and knew of no number between them.
        let lost = version(10, before(10, [ancestor(6, "6"), ancestor(5, "5")]));
        for (serial, expected) in [(9, Relation::Fork), (8, Relation::Fork), (6, Relation::Later)] {
            assert_eq!(
                relation(&lost, &digest("10"), serial, &digest(&serial.to_string())),
                expected,
                "{serial}"
            );
        }
    }

    #[test]
    fn of_two_histories_that_were_joined_the_one_that_was_restored_is_named_longest() {
        let line = |name: &str, newest: u64| -> Vec<Ancestor> {
            (1..=newest).rev().take(LENGTH).map(|s| ancestor(s, &format!("{s}{name}"))).collect()
        };
        let (right, fork) = (line("", 12), line("'", 30));
        let mut next = version(31, before(31, join(&right, &fork)));
        assert_eq!(
            next.previous[..4],
            [right[0].clone(), fork[0].clone(), right[1].clone(), fork[1].clone()]
        );
        // Whoever has seen the middle of one cannot tell, and whoever has seen another version of a number that is named can.
        let to = |v: &Manifest, n: u64, name: &str| relation(v, &digest("v"), n, &digest(name));
        assert_eq!((to(&next, 20, "20'"), to(&next, 28, "28")), (Relation::Later, Relation::Fork));
        assert_eq!((to(&next, 12, "12"), to(&next, 30, "30'")), (Relation::Later, Relation::Later));
        let names = |v: &Manifest, a: &Ancestor| v.previous.contains(a);
        for serial in 32..60 {
            next = version(serial, before(serial, super::line(&next, digest(&(serial - 1).to_string()))));
            assert!(names(&next, &right[0]) || !names(&next, &fork[0]), "{serial}");
        }
        assert!(!names(&next, &right[0]));
    }

    #[test]
    fn a_list_that_an_older_program_carried_along_says_nothing() {
        let carried = version(10, vec![ancestor(8, "8"), ancestor(7, "7")]);
        assert_eq!(relation(&carried, &digest("10"), 8, &digest("other")), Relation::Later);
        assert_eq!(relation(&version(10, Vec::new()), &digest("10"), 8, &digest("other")), Relation::Later);
        assert_eq!(super::line(&carried, digest("10")), [ancestor(10, "10")]);
    }

    #[test]
    fn what_was_lost_to_others_is_not_lost_to_who_has_seen_it_and_two_histories_can_be_joined() {
        let mended = version(4, before(4, [ancestor(2, "2"), ancestor(1, "1")]));
        assert_eq!(mended.previous[0], Ancestor { serial: 3, digest: None });
        assert_eq!(relation(&mended, &digest("4"), 3, &digest("seen")), Relation::Fork);
        assert_eq!(relation(&mended, &digest("4"), 2, &digest("2")), Relation::Later);
        // Who has it joins it to what was made without it.
        let line = [super::line(&mended, digest("4")), vec![ancestor(3, "seen")]].concat();
        let restored = version(5, before(5, line));
        for (serial, name) in [(4, "4"), (3, "seen"), (2, "2")] {
            assert_eq!(relation(&restored, &digest("5"), serial, &digest(name)), Relation::Later);
        }
        let joined = version(4, before(4, [ancestor(3, "a"), ancestor(3, "b"), ancestor(3, "a")]));
        assert_eq!(joined.previous, [ancestor(3, "a"), ancestor(3, "b")]);
        for seen in ["a", "b"] {
            assert_eq!(relation(&joined, &digest("4"), 3, &digest(seen)), Relation::Later);
        }
        assert_eq!(relation(&joined, &digest("4"), 3, &digest("c")), Relation::Fork);
        assert!(before(1, []).is_empty());
    }
}
