//! What this machine's own store says of its paths: the NAR's hash and size, the references, the deriver. It is the
//! only source of what a push signs, and what a cache has is measured by it. Reads Nix's database, asks no cache and
//! writes nothing.

use super::narinfo::{Compression, NarInfo};
use super::{ASK_WITHIN, PER_CALL, closure, explained};
use crate::error::{Error, Result};
use crate::hash::Sha256;
use crate::names::StorePath;
use crate::runner::Run;
use std::collections::{BTreeMap, BTreeSet};
use std::str::Lines;

/// What is known of the paths of a closure, each as a narinfo that names no file: it is told apart from a cache's by
/// where it came from, and compared with those.
pub type Closure = BTreeMap<StorePath, NarInfo>;

/// Where the NAR of a path is that is in no cache.
const NOWHERE: &str = "nar/none";

/// The closures of `tops`, as this machine has them.
///
/// They are read as `nix-store --dump-db` writes them, whose form is the same in all versions of Nix that there are;
/// that of `nix path-info --json` is another in each.
pub fn read(tops: &[StorePath]) -> Result<Closure> {
    let paths = closure(tops)?;
    let mut found = Closure::new();
    for some in paths.chunks(PER_CALL) {
        let run = Run::new("nix-store").arg("--dump-db").args(some).deadline(ASK_WITHIN);
        let output = run.success().map_err(explained)?;
        found.extend(parse(&output.text()).map_err(|why| {
            Error::new(format!("nix-store --dump-db printed what is not a registration of paths: {why}"))
        })?);
    }
    // Whatever refers to something must find it: Nix's database holds that, and all that follows builds on it.
    let lost = found.values().flat_map(|info| &info.references).chain(tops);
    match lost.into_iter().find(|path| !found.contains_key(*path)) {
        None => Ok(found),
        Some(path) => Err(Error::new(format!(
            "{path} went out of this machine's Nix store while it was looked at; build it again, and keep it from the \
             garbage collector (nix-store --add-root)"
        ))),
    }
}

/// For each path: itself, hash, size, deriver (or an empty line), the number of references, the references.
fn parse(text: &str) -> std::result::Result<Vec<(StorePath, NarInfo)>, String> {
    let mut lines = text.lines();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        let path = store_path(line)?;
        let hash = next(&mut lines, "hash")?;
        // Without its algorithm, which is the only one there is.
        let prefixed = if hash.contains([':', '-']) { hash.to_string() } else { format!("sha256:{hash}") };
        let nar_hash = Sha256::parse(&prefixed).map_err(|why| format!("the hash {hash:?} {why}"))?;
        let nar_size = number(next(&mut lines, "size")?)?;
        let deriver = Some(next(&mut lines, "deriver")?).filter(|d| !d.is_empty() && *d != "unknown-deriver");
        let deriver = deriver.map(|d| store_path(d).map(|d| d.base().to_string())).transpose()?;
        let count = number(next(&mut lines, "number of references")?)?;
        let mut references = BTreeSet::new();
        for _ in 0..count {
            references.insert(store_path(next(&mut lines, "reference")?)?);
        }
        let info = NarInfo {
            path: path.clone(),
            url: NOWHERE.into(),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
            nar_hash,
            nar_size,
            references,
            deriver,
            signatures: Vec::new(),
            ca: None,
        };
        found.push((path, info));
    }
    Ok(found)
}

fn next<'a>(lines: &mut Lines<'a>, what: &str) -> std::result::Result<&'a str, String> {
    lines.next().ok_or_else(|| format!("it ends where a {what} is due"))
}

fn store_path(text: &str) -> std::result::Result<StorePath, String> {
    StorePath::parse(text).map_err(|why| format!("{text:?} {why}"))
}

fn number(text: &str) -> std::result::Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::keys::SecretKey;

    pub(in crate::nix) fn path(digit: char, name: &str) -> StorePath {
        StorePath::parse(&format!("/nix/store/{}-{name}", digit.to_string().repeat(32))).unwrap()
    }

    /// A path as the local store might have it.
    pub(in crate::nix) fn info(path: &StorePath, references: &[&StorePath]) -> NarInfo {
        NarInfo {
            path: path.clone(),
            url: NOWHERE.into(),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
            nar_hash: Sha256::of(path.as_str().as_bytes()),
            nar_size: 120,
            references: references.iter().map(|r| (*r).clone()).collect(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        }
    }

    /// As Nix does it.
    pub(in crate::nix) fn sign(info: &mut NarInfo, key: &SecretKey) {
        info.signatures.push(key.sign(info.fingerprint().as_bytes()).unwrap());
    }

    /// As Nix 2.8, 2.26 and 2.34 write it.
    const DUMP: &str = "/nix/store/is12d5nb423yc8yl2m2qdd810a5pz73k-app\n\
        eb1aa2b204e1dc5aa24a689dfa963196c083585b0dc912d0470fd8846b1d8c26\n560\n\
        /nix/store/ahdzw19h08z694g45qj0qpwb43j0abpj-app.drv\n2\n\
        /nix/store/a8a86w4rwddkfy4y9g2yrb78ngay2cpc-lib\n/nix/store/is12d5nb423yc8yl2m2qdd810a5pz73k-app\n\
        /nix/store/a8a86w4rwddkfy4y9g2yrb78ngay2cpc-lib\n\
        0a430879c266f8b57f4092a0f935cf3facd48bbccde5760d4748ca405171e969\n120\n\n0\n";

    #[test]
    fn a_registration_as_nix_writes_it_is_read() {
        let found = parse(DUMP).unwrap();
        let [(app, info), (lib, plain)] = &found[..] else { panic!("{found:?}") };
        assert_eq!(info.nar_hash.to_string(), "sha256:09lc3mmq9n0g8z815j8dbdc87h4n66bgm7b89ai5mp710jra46pb");
        assert_eq!((info.nar_size, plain.nar_size), (560, 120));
        assert_eq!(info.references, BTreeSet::from([lib.clone(), app.clone()]));
        assert_eq!(info.deriver.as_deref(), Some("ahdzw19h08z694g45qj0qpwb43j0abpj-app.drv"));
        assert!(plain.references.is_empty() && plain.deriver.is_none());
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn a_registration_that_is_cut_or_says_something_else_is_refused() {
        let lines: Vec<&str> = DUMP.lines().collect();
        for count in (1..lines.len()).filter(|n| *n != 7) {
            assert!(parse(&lines[..count].join("\n")).is_err(), "{count} lines passed");
        }
        for (from, to) in
            [("560", "x"), ("eb1a", "EB1A"), ("\n2\n", "\n99999999999999999999\n"), ("/nix/store/a8", "a8")]
        {
            assert!(parse(&DUMP.replacen(from, to, 1)).is_err(), "{to} passed");
        }
    }
}
