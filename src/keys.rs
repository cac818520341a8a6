//! Signing keys in Nix's own form, so that one pair serves closures and manifests: `NAME:BASE64`, the secret
//! one with 64 bytes (seed, then public key; libsodium's layout), the public one with 32, signatures with 64.
//! Never prints secret material: [`SecretKey`] has no `Display`, and its `Debug` shows the name alone.

use crate::durable;
use crate::error::{Error, Result};
use crate::files::if_there;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SecureRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const SEED: usize = 32;
const PUBLIC: usize = 32;

/// The longest key file that is read, in bytes; a real one has about 110.
const MAX_FILE: u64 = 4096;

/// An ed25519 key pair with its name.
pub struct SecretKey {
    name: String,
    /// Seed, then public key.
    bytes: [u8; SEED + PUBLIC],
}

/// The public half: what verifies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    bytes: [u8; PUBLIC],
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Checks a key's name: it stands before a colon in lists separated by spaces, and names files.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 128 {
        return Err(format!("has a name of {} characters, 1 to 128 are possible", name.len()));
    }
    if name.starts_with(['.', '-']) {
        return Err("has a name that begins with '.' or '-'".into());
    }
    match name.chars().find(|c| !(c.is_ascii_alphanumeric() || "-._+@=".contains(*c))) {
        Some(c) => Err(format!("has {c:?} in its name; expected letters, digits and -._+@=")),
        None => Ok(()),
    }
}

/// Whether a text has the form of a signature, whoever may have made it.
pub fn is_signature(text: &str) -> bool {
    split::<64>(text).is_ok()
}

/// Splits `NAME:BASE64` and decodes exactly `N` bytes; the error is a reason that never quotes the payload.
fn split<const N: usize>(text: &str) -> Result<(String, [u8; N]), String> {
    let (name, payload) =
        text.trim().split_once(':').ok_or("has no colon; the form is NAME:BASE64, as Nix writes it")?;
    check_name(name)?;
    let bytes = STANDARD.decode(payload).map_err(|_| "is not base64 after the colon".to_string())?;
    let count = bytes.len();
    let bytes = bytes.try_into().map_err(|_| format!("has {count} bytes after the colon; expected {N}"))?;
    Ok((name.to_string(), bytes))
}

impl SecretKey {
    /// A new pair from the system's randomness.
    pub fn generate(name: &str) -> Result<Self> {
        check_name(name).map_err(|why| Error::new(format!("the key name '{name}' {why}")))?;
        let mut bytes = [0; SEED + PUBLIC];
        ring::rand::SystemRandom::new()
            .fill(&mut bytes[..SEED])
            .map_err(|_| Error::new("the system has no randomness for a key; check /dev/urandom"))?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&bytes[..SEED])
            .map_err(|_| Error::new("cannot make a key of the system's randomness; try again"))?;
        bytes[SEED..].copy_from_slice(pair.public_key().as_ref());
        Ok(SecretKey { name: name.to_string(), bytes })
    }

    /// Parses the text of a key file; the error is the reason alone.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, bytes) = split::<{ SEED + PUBLIC }>(text)?;
        Ed25519KeyPair::from_seed_and_public_key(&bytes[..SEED], &bytes[SEED..])
            .map_err(|_| "is damaged: its two halves do not belong together".to_string())?;
        Ok(SecretKey { name, bytes })
    }

    /// Reads a key file. Errors name the file and what to do.
    pub fn read(path: &Path) -> Result<Self> {
        let at = path.display();
        let remedy = "or make one with 'omni-deploy init'";
        let meta = if_there(fs_err::metadata(path))?
            .ok_or_else(|| Error::new(format!("there is no key file {at}; copy it there, {remedy}")))?;
        if !meta.is_file() || meta.len() > MAX_FILE {
            return Err(Error::new(format!("{at} is not a key file; copy one there, {remedy}")));
        }
        let text = match fs_err::read_to_string(path) {
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                return Err(Error::new(format!("{at} is not text; copy a key file there, {remedy}")));
            }
            other => other?,
        };
        SecretKey::parse(&text).map_err(|why| {
            Error::new(format!("{at} {why}; copy it again, or make a new one with 'omni-deploy init'"))
        })
    }

    /// Writes `NAME.secret` (mode 0600) and `NAME.pub` into `dir` (made with mode 0700) and returns the
    /// former's path. Refuses to overwrite a secret key. No newline follows it, as Nix writes it.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        durable::folder(dir, 0o700)?;
        let path = dir.join(format!("{}.secret", self.name));
        let text = format!("{}:{}", self.name, STANDARD.encode(self.bytes));
        if !durable::create_new(&path, text.as_bytes(), 0o600)? {
            return Err(Error::new(format!("{} exists and is kept; choose another name", path.display())));
        }
        let public = format!("{}\n", self.public());
        durable::write(&dir.join(format!("{}.pub", self.name)), public.as_bytes(), 0o644)?;
        Ok(path)
    }

    /// The half to give away.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; PUBLIC];
        bytes.copy_from_slice(&self.bytes[SEED..]);
        PublicKey { name: self.name.clone(), bytes }
    }

    /// Signs a message: `NAME:BASE64`, Nix's form of a signature.
    pub fn sign(&self, message: &[u8]) -> Result<String> {
        let pair = Ed25519KeyPair::from_seed_and_public_key(&self.bytes[..SEED], &self.bytes[SEED..])
            .map_err(|_| Error::new(format!("the key '{}' is damaged; copy it again", self.name)))?;
        Ok(format!("{}:{}", self.name, STANDARD.encode(pair.sign(message))))
    }
}

impl PublicKey {
    /// Parses `NAME:BASE64`; the error is the reason alone.
    pub fn parse(text: &str) -> Result<Self, String> {
        split(text).map(|(name, bytes)| PublicKey { name, bytes })
    }

    /// The name that signatures carry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether `signature` (`NAME:BASE64`) carries this key's name and is its signature of `message`.
    pub fn verify(&self, message: &[u8], signature: &str) -> bool {
        split::<64>(signature).is_ok_and(|(name, bytes)| {
            name == self.name && UnparsedPublicKey::new(&ED25519, &self.bytes).verify(message, &bytes).is_ok()
        })
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, STANDARD.encode(self.bytes))
    }
}

/// What is wrong with who may read a secret key file; None when it is well or cannot be looked at.
pub fn mode_trouble(path: &Path) -> Option<String> {
    let mode = fs_err::metadata(path).ok()?.permissions().mode() & 0o7777;
    (mode & 0o077 != 0)
        .then(|| format!("has mode {mode:04o}, others can use it; chmod 600 {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::Run;

    /// Made by `nix key generate-secret` of Nix 2.8.
    const NIX_SECRET: &str =
        "test-1:Q1qDeIIbvS8jOm1ZCn6GlJHgkVZnnW7YPIlvmulhVT6KAeZ7xCL2DIoVk4K1ty4VUnWHEFG1VH9PI4kmyItxog==";
    const NIX_PUBLIC: &str = "test-1:igHme8Qi9gyKFZOCtbcuFVJ1hxBRtVR/TyOJJsiLcaI=";

    #[test]
    fn a_key_of_nix_gives_the_public_key_nix_gives() {
        assert_eq!(SecretKey::parse(NIX_SECRET).unwrap().public().to_string(), NIX_PUBLIC);
        assert_eq!(PublicKey::parse(NIX_PUBLIC).unwrap().to_string(), NIX_PUBLIC);
    }

    #[test]
    #[ignore = "needs Nix and its store: cargo test -- --ignored"]
    fn nix_reads_the_keys_made_here() {
        let dir = tempfile::tempdir().unwrap();
        let key = SecretKey::generate("omni-deploy-ann-laptop-1").unwrap();
        let path = key.write(&dir.path().join("keys")).unwrap();
        let out = Run::new("nix")
            .args(["--extra-experimental-features", "nix-command", "key", "convert-secret-to-public"])
            .stdin(fs_err::read(&path).unwrap())
            .success()
            .unwrap();
        assert_eq!(out.text().trim(), key.public().to_string());
        assert_eq!(fs_err::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(SecretKey::read(&path).unwrap().public(), key.public());
        let public = fs_err::read_to_string(path.with_extension("pub")).unwrap();
        assert_eq!(PublicKey::parse(&public).unwrap(), key.public());
        assert!(key.write(&dir.path().join("keys")).unwrap_err().to_string().contains("is kept"));
    }

    #[test]
    fn only_the_same_name_key_and_message_verify() {
        let key = SecretKey::generate("a").unwrap();
        let signature = key.sign(b"message").unwrap();
        assert!(key.public().verify(b"message", &signature));
        assert!(!key.public().verify(b"messagf", &signature));
        assert!(!SecretKey::generate("a").unwrap().public().verify(b"message", &signature));
        assert!(!key.public().verify(b"message", &signature.replacen("a:", "b:", 1)));
        for junk in ["", ":", "a", "a:", "a:AAAA", "a:=", &signature[..signature.len() - 4]] {
            assert!(!key.public().verify(b"message", junk), "{junk:?} verified");
        }
    }

    #[test]
    fn what_is_no_key_is_refused_without_quoting_it() {
        let (name, payload) = NIX_SECRET.split_once(':').unwrap();
        let swapped = format!("{name}:A{}", &payload[1..]);
        for bad in [
            "",
            payload,
            &swapped,
            &NIX_SECRET[..60],
            &format!(":{payload}"),
            &format!("a b:{payload}"),
            &format!("../a:{payload}"),
            &format!("a\u{1b}:{payload}"),
            NIX_PUBLIC,
        ] {
            let why = SecretKey::parse(bad).unwrap_err();
            assert!(!why.contains(&payload[1..20]), "{why}");
        }
        assert!(PublicKey::parse(NIX_SECRET).is_err());
        assert!(!format!("{:?}", SecretKey::parse(NIX_SECRET).unwrap()).contains(&payload[..10]));
    }

    #[test]
    fn a_key_file_that_cannot_be_used_is_named_with_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        let missing = SecretKey::read(&path).unwrap_err().to_string();
        fs_err::write(&path, "x:y").unwrap();
        let broken = SecretKey::read(&path).unwrap_err().to_string();
        fs_err::write(&path, [0xff, 0xfe]).unwrap();
        let binary = SecretKey::read(&path).unwrap_err().to_string();
        let folder = SecretKey::read(dir.path()).unwrap_err().to_string();
        for error in [missing, broken, binary, folder] {
            assert!(error.contains(&dir.path().display().to_string()), "{error}");
            assert!(error.contains("omni-deploy init"), "{error}");
        }
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(mode_trouble(&path).unwrap().contains("chmod 600"));
    }
}
