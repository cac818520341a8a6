//! The names that cross every module, parsed once at the edge: services, hosts and store paths. Whoever holds
//! one of these types may put it into a unit name, a file name or a key of the bucket without asking again.

use serde::Serialize;
use std::fmt;

/// The name of a service: also the name of its unit (`NAME.service`), of its secrets file and of its log.
/// ASCII letters, digits, `-`, `_` and `.`; begins with a letter or digit; at most 64 characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ServiceName(String);

/// The name of a host as the manifest's `hosts` lists it: the characters of a DNS name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct HostName(String);

/// A store path, `/nix/store/HASH-NAME`: exactly one level below the store, hash and name well-formed
/// (Nix's own rules: 32 digits of its base 32, then up to 211 of `[A-Za-z0-9+._?=-]`, no leading dot).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct StorePath(String);

/// Whether this is the name of an environment variable, as systemd and every shell have them.
pub fn is_variable(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// Where Nix keeps its store. A store elsewhere has other hashes, hence other paths, and is not supported.
pub const STORE_DIR: &str = "/nix/store";

/// The ending that names the second instance of a service while a rollout overlaps; no service may have it.
pub const NEXT_SUFFIX: &str = "-next";

/// The endings of the names of units (systemd.unit(5)).
const UNIT_SUFFIXES: &str = "service socket device mount automount swap target path timer slice scope";

/// The ending of a unit's name, if the text has one.
pub fn unit_suffix(text: &str) -> Option<&str> {
    let (_, suffix) = text.rsplit_once('.')?;
    UNIT_SUFFIXES.split(' ').find(|known| *known == suffix)
}

/// Refuses what is not a plain name of at most `most` characters; the error is the reason alone.
fn check_plain(text: &str, most: usize, what: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("is empty".into());
    }
    if text.len() > most {
        return Err(format!("has {} characters, at most {most} are possible", text.len()));
    }
    if let Some(c) = text.chars().find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))) {
        return Err(format!("has {c:?}; a {what} has only ASCII letters, digits, '-', '_' and '.'"));
    }
    if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err("must begin with a letter or a digit".into());
    }
    if text.contains("..") {
        return Err("has '..'".into());
    }
    Ok(())
}

impl ServiceName {
    /// Parses a name; the error is the reason alone, without the name.
    pub fn parse(text: &str) -> Result<Self, String> {
        check_plain(text, 64, "unit name")?;
        if let Some(suffix) = unit_suffix(text) {
            return Err(format!("ends with '.{suffix}'; expected the name of the service alone"));
        }
        if text == "deployer" {
            return Err("is the name of the deployer's own unit".into());
        }
        if text.ends_with(NEXT_SUFFIX) {
            return Err(format!("ends with '{NEXT_SUFFIX}', which is kept for overlapping rollouts"));
        }
        Ok(ServiceName(text.to_string()))
    }

    /// The name of the unit, `NAME.service`.
    pub fn unit(&self) -> String {
        format!("{}.service", self.0)
    }

    /// The name of the unit of its candidate while a rollout overlaps, `NAME-next.service`.
    pub fn next_unit(&self) -> String {
        format!("{}{NEXT_SUFFIX}.service", self.0)
    }
}

impl HostName {
    /// Parses a name; the error is the reason alone, without the name.
    pub fn parse(text: &str) -> Result<Self, String> {
        check_plain(text, 253, "host name")?;
        Ok(HostName(text.to_string()))
    }

    /// This machine's short name: the kernel's host name up to the first dot.
    pub fn of_this_machine() -> Option<Self> {
        let name = fs_err::read_to_string("/proc/sys/kernel/hostname").ok()?;
        HostName::parse(name.trim().split('.').next().unwrap_or_default()).ok()
    }
}

impl StorePath {
    /// Parses a path; the error is the reason alone, without the path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let form = || "is not a store path; the form is /nix/store/HASH-NAME".to_string();
        let base = text.strip_prefix(STORE_DIR).and_then(|r| r.strip_prefix('/')).ok_or_else(form)?;
        if let Some((top, _)) = base.split_once('/') {
            return Err(match StorePath::parse(&format!("{STORE_DIR}/{top}")) {
                Ok(path) => format!("points below a store path; the path itself is {path}"),
                Err(_) => form(),
            });
        }
        let (hash, name) = base.split_once('-').ok_or_else(form)?;
        if hash.len() != 32 {
            return Err(format!("has a hash of {} characters, a store path has 32", hash.len()));
        }
        if let Some(c) = hash.chars().find(|c| !"0123456789abcdfghijklmnpqrsvwxyz".contains(*c)) {
            return Err(format!("has {c:?} in its hash, which Nix's base 32 does not have"));
        }
        if name.is_empty() || name.len() > 211 {
            return Err(format!("has a name of {} characters, 1 to 211 are possible", name.len()));
        }
        if name.starts_with('.') {
            return Err("has a name that begins with '.'".into());
        }
        if let Some(c) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || "+-._?=".contains(*c))) {
            return Err(format!("has {c:?} in its name, which Nix does not allow"));
        }
        Ok(StorePath(text.to_string()))
    }

    /// The 32 digits that name the path in a binary cache (`HASH.narinfo`).
    pub fn hash(&self) -> &str {
        &self.0[STORE_DIR.len() + 1..STORE_DIR.len() + 33]
    }

    /// `HASH-NAME`: the path without the store's folder.
    pub fn base(&self) -> &str {
        &self.0[STORE_DIR.len() + 1..]
    }
}

macro_rules! text_type {
    ($($t:ty),*) => {$(
        impl $t {
            /// The text as it was parsed.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl AsRef<str> for $t {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
        impl AsRef<std::ffi::OsStr> for $t {
            fn as_ref(&self) -> &std::ffi::OsStr {
                self.0.as_ref()
            }
        }
        impl AsRef<std::path::Path> for $t {
            fn as_ref(&self) -> &std::path::Path {
                self.0.as_ref()
            }
        }
        impl<'de> serde::Deserialize<'de> for $t {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                <$t>::parse(&text).map_err(|why| {
                    let start: String = text.chars().take(72).collect();
                    serde::de::Error::custom(format!("{start:?} {why}"))
                })
            }
        }
    )*};
}
text_type!(ServiceName, HostName, StorePath);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_unit_names_are_refused() {
        for good in ["ava", "podcastitlater-web", "a", "A1_b.c-d", "0x"] {
            assert_eq!(ServiceName::parse(good).map(|n| n.unit()), Ok(format!("{good}.service")));
        }
        let long = "a".repeat(65);
        for bad in [
            "",
            "../x",
            "-rf",
            "a b",
            "con@",
            ".service",
            "ava.service",
            "a..b",
            "a/b",
            "ava-next",
            "a\nb",
            "a\0b",
            "ä",
            &long,
            "_x",
            "a%i",
            "x.timer",
        ] {
            assert!(ServiceName::parse(bad).is_err(), "{bad:?} passed");
        }
    }

    #[test]
    fn store_paths_are_exactly_one_level_below_the_store() {
        let hash = "0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd";
        let good = format!("/nix/store/{hash}-ava-1.0");
        let path = StorePath::parse(&good).unwrap();
        assert_eq!((path.hash(), path.base()), (hash, &good["/nix/store/".len()..]));
        for bad in [
            "".to_string(),
            "/nix/store/".to_string(),
            "/nix/store/placeholder".to_string(),
            format!("/nix/store/{hash}"),
            format!("/nix/store/{hash}-"),
            format!("/nix/store/{hash}-.x"),
            format!("/nix/store/{hash}-a b"),
            format!("/nix/store/{hash}-a\nb"),
            format!("/nix/store/e{}-ava", &hash[1..]),
            format!("/nix/store/../{hash}-ava"),
            format!("/nix/store//{hash}-ava"),
            format!("{good}/bin/ava"),
            format!("{good}/.."),
            format!("{good}/"),
            format!("/gnu/store/{hash}-ava"),
        ] {
            assert!(StorePath::parse(&bad).is_err(), "{bad:?} passed");
        }
        assert!(StorePath::parse(&format!("{good}/bin/ava")).unwrap_err().contains(&good));
    }

    #[test]
    fn host_names_cannot_be_options_or_paths() {
        assert!(HostName::parse("biz").is_ok() && HostName::parse("web-1.example.com").is_ok());
        for bad in ["", "-oProxyCommand=x", "a b", "a/b", "..", "a@b", "ä", "a\u{202e}b"] {
            assert!(HostName::parse(bad).is_err(), "{bad:?} passed");
        }
    }
}
