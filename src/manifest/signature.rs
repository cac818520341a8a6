//! Signatures of the manifest. What is signed is the manifest's canonical form: the JSON document without its
//! top-level `signatures`, members of every object sorted by the bytes of their names, no white space, text
//! escaped as little as JSON allows (`\"`, `\\`, `\b`, `\f`, `\n`, `\r`, `\t`, other control characters as
//! `\u00XX`), numbers as they are read. The document names its store, so that what was signed for one store
//! means nothing in another. Keys and signatures have Nix's form ([`crate::keys`]); a canonical form begins with
//! `{`, what Nix signs of closures with `1;`, so that neither can stand for the other.

use super::canonical;
use super::error::ManifestError;
use super::limits;
use super::model::Manifest;
use super::parse::{self, Mode};
use super::types::Digest;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::keys::{PublicKey, SecretKey};
use crate::log::printable;
use serde::Deserialize;
use std::fmt;

/// The keys a machine works with.
#[derive(Debug, Default)]
pub struct Trust {
    /// Signs what this machine publishes.
    pub signer: Option<SecretKey>,
    /// What is trusted; empty: everything.
    pub trusted: Vec<PublicKey>,
}

impl Trust {
    /// The keys of the configuration.
    pub fn of(settings: &Settings) -> Result<Self> {
        let signer = settings.secret_key_file.as_deref().map(SecretKey::read).transpose()?;
        let mut trusted = trusted(settings)?;
        // Hosts trust what this key signs: an empty list for one call does not make it sign a stranger's text.
        let by_flag =
            settings.sources.get("trustedPublicKeys").is_some_and(|s| s.source.starts_with("flag "));
        if trusted.is_empty() && by_flag {
            trusted.extend(signer.iter().map(SecretKey::public));
        }
        Ok(Trust { signer, trusted })
    }
}

/// The public keys of the configuration.
pub fn trusted(settings: &Settings) -> Result<Vec<PublicKey>> {
    let parse = |text: &String| {
        PublicKey::parse(text).map_err(|why| {
            Error::new(format!("trustedPublicKeys: '{text}' {why}; correct the configuration"))
        })
    };
    settings.trusted_public_keys.iter().map(parse).collect()
}

/// The canonical form of a manifest, from its stored bytes.
pub fn canonical(bytes: &[u8]) -> Result<Vec<u8>, String> {
    canonical_without(bytes, &["signatures"])
}

fn canonical_without(bytes: &[u8], members: &[&str]) -> Result<Vec<u8>, String> {
    limits::manifest(bytes).map_err(|e| e.to_string())?;
    canonical::object(bytes, members)
}

/// The digest of a manifest's content, from its stored bytes: of the canonical form without `store`, so that signing
/// what was unsigned leaves it the same version.
pub fn digest(bytes: &[u8]) -> Result<Digest, String> {
    canonical_without(bytes, &["signatures", "store"]).map(|canonical| Digest::of(&canonical))
}

/// Binds a manifest to its store and adds a signature by `key` (or replaces the one of that key's name).
pub fn sign(manifest: &mut Manifest, identity: &str, key: &SecretKey) -> Result<()> {
    if manifest.store.as_deref() != Some(identity) {
        manifest.store = Some(identity.to_string());
        manifest.signatures.clear();
    }
    let document = serde_json::to_vec(&*manifest).map_err(|e| Error::new(format!("cannot sign: {e}")))?;
    let message = canonical(&document).map_err(|e| Error::new(format!("cannot sign: {e}")))?;
    let signature = key.sign(&message)?;
    let name = format!("{}:", key.public().name());
    manifest.signatures.retain(|s| !s.starts_with(&name));
    manifest.signatures.push(signature);
    Ok(())
}

/// Why bytes are not taken for the manifest of a store.
#[derive(Debug)]
pub enum ReadError {
    /// None of the trusted keys has signed it for this store.
    Signature(String),
    /// It is no manifest.
    Manifest(ManifestError),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::Signature(why) => f.write_str(why),
            ReadError::Manifest(e) => e.fmt(f),
        }
    }
}

/// Reads a manifest that may be anybody's: first who signed it, and only then what it says, which may be made to cost
/// much. Without trusted keys, nobody's signature is expected.
pub fn read(bytes: &[u8], identity: &str, trusted: &[PublicKey]) -> Result<Manifest, ReadError> {
    let signed = match trusted.is_empty() {
        true => Some(Ok(Vec::new())),
        false => verify(bytes, identity, trusted),
    };
    if let Some(Err(why)) = signed {
        return Err(ReadError::Signature(why));
    }
    let manifest = parse::manifest(bytes, Mode::Tolerant).map_err(ReadError::Manifest)?;
    match signed {
        Some(_) => Ok(manifest),
        None => Err(ReadError::Signature(UNKNOWN_SIGNER.into())),
    }
}

/// Of what can be read, but not by whom it was signed.
pub(super) const UNKNOWN_SIGNER: &str = "who signed it cannot be determined";

/// Whether a manifest is for this store and signed by one of these keys: their names, or why it is not.
pub fn check(
    bytes: &[u8],
    manifest: &Manifest,
    identity: &str,
    trusted: &[PublicKey],
) -> Result<Vec<String>, String> {
    signed_by(bytes, &manifest.signatures, manifest.store.as_deref(), identity, trusted)
}

/// How many signatures are looked at: for each, all of the document is hashed again.
const MAX_SIGNATURES: usize = 32;

/// The beginning of a text of somebody whom nobody trusts; what is said of it also gets into files that people look at.
fn brief(text: &str) -> String {
    match text.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", printable(&text[..at])),
        None => printable(text).into_owned(),
    }
}

/// What of a manifest must be read to know who signed it.
#[derive(Deserialize)]
struct Signed {
    #[serde(default)]
    signatures: Vec<String>,
    #[serde(default)]
    store: Option<String>,
}

/// As [`check`], of bytes of which nothing else was read yet: what nobody trusted has signed need not be judged any
/// further. None: these bytes are no manifest, which reading it says better.
pub fn verify(bytes: &[u8], identity: &str, trusted: &[PublicKey]) -> Option<Result<Vec<String>, String>> {
    limits::manifest(bytes).ok()?;
    let Signed { signatures, store } = serde_json::from_slice(bytes).ok()?;
    Some(signed_by(bytes, &signatures, store.as_deref(), identity, trusted))
}

fn signed_by(
    bytes: &[u8],
    signatures: &[String],
    store: Option<&str>,
    identity: &str,
    trusted: &[PublicKey],
) -> Result<Vec<String>, String> {
    if signatures.is_empty() {
        return Err("it is not signed".into());
    }
    if signatures.len() > MAX_SIGNATURES {
        return Err(format!(
            "it has {} signatures, at most {MAX_SIGNATURES} are looked at",
            signatures.len()
        ));
    }
    let message = canonical(bytes)?;
    let signed = |key: &&PublicKey| signatures.iter().any(|s| key.verify(&message, s));
    let names: Vec<String> = trusted.iter().filter(signed).map(|k| k.name().to_string()).collect();
    if names.is_empty() {
        let by = || signatures.iter().filter_map(|s| s.split(':').next());
        let known = trusted.iter().any(|k| by().any(|name| name == k.name()));
        return Err(match known {
            true => "it was changed after it was signed".into(),
            false => format!(
                "it is signed by {}, which 'trustedPublicKeys' does not have",
                by().map(brief).collect::<Vec<_>>().join(", ")
            ),
        });
    }
    match store {
        Some(store) if store == identity => Ok(names),
        Some(store) => Err(format!("it was signed for the store {}, this is {identity}", brief(store))),
        None => Err("it does not say for which store it was signed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use serde_json::Value;

    const STORE: &str = "s3://releases";

    fn signed(key: &SecretKey) -> Manifest {
        let mut manifest = Manifest::empty(Timestamp(1_795_372_265), "ann@laptop");
        sign(&mut manifest, STORE, key).unwrap();
        manifest
    }

    #[test]
    fn the_canonical_form_is_the_documented_one() {
        let text = "{ \"b\": [1, 2.5, -3, true, null],\n \"a\": {\"z\": \"\\u00e9\\u0001\\n\\/\", \"B\": \"\"}, \"signatures\": [\"x\"] }";
        let expected = "{\"a\":{\"B\":\"\",\"z\":\"\u{e9}\\u0001\\n/\"},\"b\":[1,2.5,-3,true,null]}";
        assert_eq!(canonical(text.as_bytes()), Ok(expected.as_bytes().to_vec()));
        assert!(canonical(b"[]").is_err() && canonical(b"{\"a\":1,\"a\":2}").is_err());
    }

    #[test]
    fn the_frozen_vectors_hold() {
        let vectors: Value =
            serde_json::from_str(include_str!("../../tests/fixtures/signature-v1.json")).unwrap();
        let text = |name: &str| vectors[name].as_str().unwrap();
        let key = PublicKey::parse(text("publicKey")).unwrap();
        let canonical = canonical(text("manifest").as_bytes()).unwrap();
        assert_eq!(String::from_utf8(canonical.clone()).unwrap(), text("canonical"));
        assert!(key.verify(&canonical, text("signature")));
        let manifest = parse::manifest(text("manifest").as_bytes(), Mode::Strict).unwrap();
        assert_eq!(
            check(text("manifest").as_bytes(), &manifest, text("store"), &[key]),
            Ok(vec!["test-1".into()])
        );
    }

    #[test]
    fn the_frozen_version_after_it_names_it() {
        use crate::manifest::lineage::{Relation, relation};
        let first: Value =
            serde_json::from_str(include_str!("../../tests/fixtures/signature-v1.json")).unwrap();
        let vectors: Value =
            serde_json::from_str(include_str!("../../tests/fixtures/signature-v1-previous.json")).unwrap();
        let text = |name: &str| vectors[name].as_str().unwrap();
        let next = parse::manifest(text("manifest").as_bytes(), Mode::Strict).unwrap();
        let key = PublicKey::parse(text("publicKey")).unwrap();
        assert!(check(text("manifest").as_bytes(), &next, text("store"), &[key]).is_ok());
        let before = digest(first["manifest"].as_str().unwrap().as_bytes()).unwrap();
        let after = digest(text("manifest").as_bytes()).unwrap();
        assert_eq!((&*before.to_string(), &*after.to_string()), (text("previousDigest"), text("digest")));
        assert_eq!(relation(&next, &after, 7, &before), Relation::Later);
        assert_eq!(relation(&next, &after, 7, &after), Relation::Fork);
        assert_eq!(next.previous[1].to_string(), "6:lost");
        // A text of an older program, without the list, is the same as it was.
        let old = parse::manifest(first["manifest"].as_str().unwrap().as_bytes(), Mode::Strict).unwrap();
        assert!(old.previous.is_empty() && !String::from_utf8(old.to_bytes()).unwrap().contains("previous"));
    }

    #[test]
    fn signing_leaves_it_the_same_version() {
        let mut manifest = Manifest::empty(Timestamp(1_795_372_265), "ann@laptop");
        let unsigned = digest(&manifest.to_bytes());
        sign(&mut manifest, STORE, &SecretKey::generate("ann-1").unwrap()).unwrap();
        assert_eq!(digest(&manifest.to_bytes()), unsigned);
        manifest.serial += 1;
        assert_ne!(digest(&manifest.to_bytes()), unsigned);
    }

    #[test]
    fn whoever_changes_anything_breaks_the_signature() {
        let key = SecretKey::generate("ann-1").unwrap();
        let trusted = [key.public()];
        let manifest = signed(&key);
        let bytes = manifest.to_bytes();
        let reason = |bytes: &[u8], identity: &str| {
            let manifest = parse::manifest(bytes, Mode::Tolerant).unwrap();
            check(bytes, &manifest, identity, &trusted).unwrap_err()
        };
        assert_eq!(check(&bytes, &manifest, STORE, &trusted), Ok(vec!["ann-1".into()]));
        let text = String::from_utf8(bytes.clone()).unwrap();
        for (from, to) in [
            ("\"serial\": 1", "\"serial\": 2"),
            ("ann@laptop", "eve@laptop"),
            ("2026-11-22", "2026-11-23"),
            ("\"services\": []", "\"services\": [], \"later\": 1"),
        ] {
            let forged = text.replacen(from, to, 1);
            assert_ne!(forged, text, "{from}");
            assert!(reason(forged.as_bytes(), STORE).contains("changed after"), "{from}");
        }
        assert!(reason(&bytes, "s3://staging").contains("s3://releases"));
        let mut unsigned = manifest.clone();
        unsigned.signatures.clear();
        assert_eq!(reason(&unsigned.to_bytes(), STORE), "it is not signed");
        let stranger = signed(&SecretKey::generate("eve-1").unwrap());
        assert!(reason(&stranger.to_bytes(), STORE).contains("eve-1"));
        let mut steering = signed(&SecretKey::generate("eve-1").unwrap());
        steering.signatures = vec!["\u{9b}31m:x".into()];
        let said = verify(&steering.to_bytes(), STORE, &trusted).unwrap().unwrap_err();
        assert!(said.contains("signed by \\u{9b}31m,"), "{said}");
        let impostor = signed(&SecretKey::generate("ann-1").unwrap());
        assert!(reason(&impostor.to_bytes(), STORE).contains("changed after"));
        // White space and order are not content.
        let compact = serde_json::to_vec(&serde_json::from_slice::<Value>(&bytes).unwrap()).unwrap();
        assert!(check(&compact, &manifest, STORE, &trusted).is_ok());
    }

    #[test]
    fn a_signature_holds_whatever_number_a_newer_version_wrote() {
        let key = SecretKey::generate("ann-1").unwrap();
        // Read inexactly, the third is another number after every time it is read.
        for number in ["0.1", "1e300", "6.275081424971486e105", "-2.2250738585072014e-308", "1e21"] {
            let text = format!(
                r#"{{"version":1,"serial":1,"generation":"2026-11-22T18:31:05Z","services":[],"later":{number}}}"#
            );
            let mut manifest = parse::manifest(text.as_bytes(), Mode::Tolerant).unwrap();
            sign(&mut manifest, STORE, &key).unwrap();
            let bytes = manifest.to_bytes();
            let read = parse::manifest(&bytes, Mode::Tolerant).unwrap();
            assert_eq!(check(&bytes, &read, STORE, &[key.public()]), Ok(vec!["ann-1".into()]), "{number}");
            assert_eq!(read, manifest, "{number}");
        }
    }

    #[test]
    fn two_keys_stand_side_by_side_until_the_content_changes() {
        let (old, new) = (SecretKey::generate("ann-1").unwrap(), SecretKey::generate("ann-2").unwrap());
        let mut manifest = signed(&old);
        sign(&mut manifest, STORE, &new).unwrap();
        let bytes = manifest.to_bytes();
        for key in [&old, &new] {
            assert!(check(&bytes, &manifest, STORE, &[key.public()]).is_ok());
        }
        sign(&mut manifest, STORE, &new).unwrap();
        assert_eq!(manifest.signatures.len(), 2, "the same key signs once");
    }
}
