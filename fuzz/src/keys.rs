//! Keys and signatures: what parses prints back, what was signed verifies, and nothing else does.

use crate::entries::{self, Choices};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use omni_deploy::keys::{PublicKey, SecretKey};
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::manifest::signature;
use ring::signature::{Ed25519KeyPair, KeyPair};
use std::sync::LazyLock;

/// Two keys of the same name.
static KEYS: LazyLock<[SecretKey; 2]> = LazyLock::new(|| [key("ann-1", [1; 32]), key("ann-1", [2; 32])]);

pub(crate) fn key(name: &str, seed: [u8; 32]) -> SecretKey {
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("any 32 bytes are a seed");
    let bytes = [&seed[..], pair.public_key().as_ref()].concat();
    SecretKey::parse(&format!("{name}:{}", STANDARD.encode(bytes))).expect("it has the form of a key")
}

/// The first byte says what the others are: the text of a key, a manifest to sign, or a message and what is done to
/// its signature.
pub fn check(data: &[u8]) {
    let mut choices = Choices::new(data);
    match choices.byte() {
        0..0xa0 => text(&String::from_utf8_lossy(choices.rest())),
        0xa0..0xc0 => document(&mut choices),
        _ => message(&mut choices),
    }
}

fn text(text: &str) {
    match PublicKey::parse(text) {
        Ok(key) => {
            assert_eq!(key.to_string(), text.trim());
            assert_eq!(PublicKey::parse(&key.to_string()), Ok(key.clone()));
            assert!(!key.verify(b"message", text));
        }
        Err(why) => unquoted(text, &why),
    }
    match SecretKey::parse(text) {
        Ok(secret) => {
            let public = secret.public();
            let payload = text.trim().split_once(':').expect("a key has a colon").1;
            assert!(!format!("{secret:?}").contains(payload), "a secret key is shown");
            let bytes = STANDARD.decode(payload).expect("a key is base64");
            let half = format!("{}:{}", public.name(), STANDARD.encode(&bytes[32..]));
            assert_eq!(public.to_string(), half);
            let signature = secret.sign(text.as_bytes()).expect("a key signs");
            assert!(public.verify(text.as_bytes(), &signature));
        }
        Err(why) => unquoted(text, &why),
    }
    assert!(!KEYS[0].public().verify(b"message", text), "a signature that nobody made");
}

/// A refusal never holds what may be a secret, nor what a terminal obeys.
fn unquoted(text: &str, why: &str) {
    assert!(!why.chars().any(char::is_control), "{why:?}");
    if let Some((_, payload)) = text.split_once(':')
        && payload.len() >= 16
        && payload.chars().all(|c| c.is_ascii_alphanumeric())
    {
        assert!(!why.contains(payload), "{why}");
    }
}

/// A manifest, signed; then one of its bytes is another.
fn document(choices: &mut Choices<'_>) {
    const STORE: &str = "s3://releases";
    let (at, other) = (usize::from(choices.byte()) << 8 | usize::from(choices.byte()), choices.byte());
    // A small one: what it says does not matter here.
    let rest = choices.rest();
    let value = entries::manifest(&mut Choices::new(&rest[..rest.len().min(40)])).to_string();
    let Ok(mut manifest) = parse::manifest(value.as_bytes(), Mode::Tolerant) else { return };
    let [signer, stranger] = &*KEYS;
    signature::sign(&mut manifest, STORE, signer).expect("a manifest can be signed");
    let mut bytes = manifest.to_bytes();
    let trusted = [signer.public()];
    assert_eq!(signature::check(&bytes, &manifest, STORE, &trusted), Ok(vec!["ann-1".into()]));
    match other % 16 {
        0 => assert!(signature::check(&bytes, &manifest, "s3://staging", &trusted).is_err()),
        1 => assert!(signature::check(&bytes, &manifest, STORE, &[stranger.public()]).is_err()),
        _ => {}
    }
    let before = signature::canonical(&bytes).expect("it was signed");
    let at = at % bytes.len();
    bytes[at] = other;
    if let Ok(changed) = parse::manifest(&bytes, Mode::Tolerant) {
        let same = signature::canonical(&bytes).as_ref() == Ok(&before);
        let signed = signature::check(&bytes, &changed, STORE, &trusted).is_ok();
        // The signature itself may have been hit.
        assert!(same || !signed, "a changed manifest passes for the signed one");
        assert!(
            signed || !same || changed.signatures != manifest.signatures,
            "white space breaks a signature"
        );
    }
}

/// A message, signed; then something about it is another.
fn message(choices: &mut Choices<'_>) {
    let (what, at, bit) = (choices.byte(), choices.byte(), 1 << (choices.byte() & 7));
    let mut message = choices.rest().to_vec();
    let [signer, stranger] = &*KEYS;
    let signature = signer.sign(&message).expect("a key signs");
    assert!(signer.public().verify(&message, &signature));
    let (name, payload) = signature.split_once(':').expect("a signature has a colon");
    let verifies = match what & 3 {
        0 => stranger.public().verify(&message, &signature),
        1 => signer.public().verify(&message, &format!("{name}x:{payload}")),
        2 if !message.is_empty() => {
            let at = usize::from(at) % message.len();
            message[at] ^= bit;
            signer.public().verify(&message, &signature)
        }
        _ => {
            let mut bytes = STANDARD.decode(payload).expect("a signature is base64");
            bytes[usize::from(at) % 64] ^= bit;
            signer.public().verify(&message, &format!("{name}:{}", STANDARD.encode(bytes)))
        }
    };
    assert!(!verifies, "another signature, message, name or key verifies");
}
