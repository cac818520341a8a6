//! The values of the manifest's fields: each is parsed once, where the manifest is read, and is from then on what its
//! type says. What a text may be is in [`super::rules`]. An error has the value, the reason, and what is expected; the
//! path is the reader's ([`super::parse`]).

use super::json::shown;
use super::{command, rules};
use crate::error::did_you_mean;
use crate::hash::Sha256;
use crate::names::HostName;
use serde::de::{self, Deserializer, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::borrow::Borrow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

/// A string that `parse` makes something of; its errors are reasons, without the string.
pub(super) fn text<'de, D: Deserializer<'de>, T>(
    d: D,
    parse: fn(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    d.deserialize_str(TextVisitor(parse))
}

struct TextVisitor<T>(fn(&str) -> Result<T, String>);

impl<T> Visitor<'_> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.0)(text).map_err(|why| E::custom(format!("{} {why}", shown(text))))
    }
}

macro_rules! texts {
    ($($(#[$doc:meta])* $name:ident: $rule:path;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        pub struct $name(pub(super) String);

        impl $name {
            /// In its normal form, or the reason why it cannot be, without the text.
            pub fn parse(text: &str) -> Result<Self, String> {
                $rule(text).map($name)
            }

            /// In its normal form.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                text(d, $name::parse)
            }
        }

        #[cfg(test)]
        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                $name::parse(text).unwrap_or_else(|why| panic!("{text} {why}"))
            }
        }
    )*};
}

texts! {
    /// A line of text that is not empty.
    Words: rules::words;
    /// A user or a group, by name or number.
    UserName: rules::user;
    /// The name of a variable of the environment.
    VariableName: rules::env_name;
    /// The value of a variable of the environment.
    EnvValue: rules::env_value;
    /// The name under which a service finds a credential.
    CredentialName: rules::credential_name;
    /// A file of the host.
    AbsolutePath: rules::absolute;
    /// A file of the host, or its root.
    DirectoryPath: rules::directory;
    /// A path that a service may write to.
    WritablePath: rules::writable_as_read;
    /// A path below /var/lib.
    StateDirectory: rules::below_state;
    /// A DNS name in lower case; may begin with `*.`.
    Domain: rules::domain;
    /// A DNS name in lower case.
    ProbeHost: rules::host;
    /// A path of a URL, without a trailing slash but for `/` itself.
    UrlPath: rules::url_path;
    /// A path of a URL, with a query if need be.
    ProbePath: rules::probe_path;
    /// A unit with its suffix.
    UnitName: rules::unit;
    /// `MemoryMax=`, as systemd writes it: `512M`, `50%`, `infinity`.
    MemoryMax: rules::memory;
    /// `CPUQuota=`, as systemd writes it: `150%`.
    CpuQuota: rules::quota;
    /// A command line, words quoted as in a shell (no variables, no expansion). A first word that is not absolute is
    /// taken below the store path.
    CommandLine: command::line;
}

impl Default for UserName {
    fn default() -> Self {
        UserName("root".into())
    }
}

impl Default for UrlPath {
    fn default() -> Self {
        UrlPath("/".into())
    }
}

impl UnitName {
    /// The target after which the network is there.
    pub const NETWORK_ONLINE: &str = "network-online.target";
}

impl CommandLine {
    /// Its words: at least one. They are split anew each time, because kept they take thirty times the memory of the
    /// text, and of those a manifest may have 32 MiB.
    pub fn words(&self) -> Vec<String> {
        command::split_command(&self.0).unwrap_or_default()
    }
}

macro_rules! words {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $word:literal,)* }) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        $(#[$meta])*
        pub enum $name { $($(#[$variant_meta])* $variant,)* }

        impl $name {
            /// All that there are.
            pub const ALL: &[$name] = &[$($name::$variant),*];

            /// The word for it.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word,)* }
            }

            /// One of the words, or the reason why it is none.
            pub fn parse(text: &str) -> Result<Self, String> {
                let found = Self::ALL.iter().find(|word| word.as_str() == text);
                found.copied().ok_or_else(|| {
                    let words: Vec<&str> = Self::ALL.iter().map(|word| word.as_str()).collect();
                    let near = did_you_mean(text, words.iter().copied());
                    format!("is not known; expected one of {}{near}", words.join(", "))
                })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                text(d, $name::parse)
            }
        }
    };
}

words! {
    /// What an artifact is.
    #[derive(Default)]
    pub enum ArtifactKind {
        /// A store path with all that it refers to.
        #[default]
        NixClosure = "nix-closure",
    }
}

words! {
    /// How a new version takes over.
    #[derive(Default)]
    pub enum Rollout {
        /// The unit is restarted; Caddy holds requests meanwhile.
        #[default]
        Restart = "restart",
        /// The new version is verified beside the old one, on a spare port, before traffic moves to it; no request
        /// fails. For services that take their port from the environment.
        Overlap = "overlap",
    }
}

words! {
    /// When systemd starts a service again: its `Restart=` (systemd.service(5)).
    #[allow(missing_docs)]
    pub enum Restart {
        No = "no",
        OnSuccess = "on-success",
        OnFailure = "on-failure",
        OnAbnormal = "on-abnormal",
        OnWatchdog = "on-watchdog",
        OnAbort = "on-abort",
        Always = "always",
    }
}

words! {
    /// How far a unit is confined besides what its entry says.
    #[derive(Default)]
    pub enum Profile {
        /// Not at all.
        #[default]
        Default = "default",
        /// As far as a network service that generates no code can be: see `STRICT` in the deployer's `unit.rs`.
        Strict = "strict",
    }
}

impl Profile {
    pub(super) fn is_default(&self) -> bool {
        *self == Profile::Default
    }
}

words! {
    /// What of the file system a service can only read: systemd's `ProtectSystem=` (systemd.exec(5)).
    #[allow(missing_docs)]
    pub enum ProtectSystem {
        No = "no",
        Yes = "yes",
        Full = "full",
        Strict = "strict",
    }
}

/// By its word, or as true and false.
pub(super) fn protect_system<'de, D: Deserializer<'de>>(d: D) -> Result<ProtectSystem, D::Error> {
    struct WordOrBool;
    impl Visitor<'_> for WordOrBool {
        type Value = ProtectSystem;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string, true or false")
        }

        fn visit_bool<E>(self, on: bool) -> Result<ProtectSystem, E> {
            Ok(if on { ProtectSystem::Yes } else { ProtectSystem::No })
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<ProtectSystem, E> {
            TextVisitor(ProtectSystem::parse).visit_str(text)
        }
    }
    d.deserialize_any(WordOrBool)
}

/// A port, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Port(pub(super) u16);

impl Port {
    /// Its number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        whole(d, "a port", 1, u16::MAX.into()).map(|n| Port(n as u16))
    }
}

#[cfg(test)]
impl From<u16> for Port {
    fn from(port: u16) -> Self {
        Port(port)
    }
}

/// A length of time in seconds, within bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Seconds<const MIN: u32, const MAX: u32>(pub(super) u32);

impl<const MIN: u32, const MAX: u32> Seconds<MIN, MAX> {
    /// Its number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl<'de, const MIN: u32, const MAX: u32> Deserialize<'de> for Seconds<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        whole(d, "a number of seconds", MIN.into(), MAX.into()).map(|n| Seconds(n as u32))
    }
}

/// The highest serial: what every reader of JSON holds exactly.
pub const MAX_SERIAL: u64 = (1 << 53) - 1;

pub(super) fn serial<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    whole(d, "a version number", 0, MAX_SERIAL)
}

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
        text(d, Ancestor::parse)
    }
}

/// The version of the format that this program writes, and the highest it reads.
pub const FORMAT_VERSION: u64 = 1;

pub(super) fn format_version<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    whole(d, "a version of the format", 1, FORMAT_VERSION)
}

/// A whole number within bounds.
fn whole<'de, D: Deserializer<'de>>(d: D, what: &'static str, min: u64, max: u64) -> Result<u64, D::Error> {
    d.deserialize_u64(WholeVisitor { what, min, max })
}

struct WholeVisitor {
    what: &'static str,
    min: u64,
    max: u64,
}

impl Visitor<'_> for WholeVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WholeVisitor { what, min, max } = self;
        if min == max { write!(f, "{what}, {min}") } else { write!(f, "{what} from {min} to {max}") }
    }

    fn visit_u64<E: de::Error>(self, n: u64) -> Result<u64, E> {
        match (self.min..=self.max).contains(&n) {
            true => Ok(n),
            false => Err(E::invalid_value(Unexpected::Unsigned(n), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, n: i64) -> Result<u64, E> {
        let positive = u64::try_from(n).map_err(|_| E::invalid_value(Unexpected::Signed(n), &self))?;
        self.visit_u64(positive)
    }
}

/// A value that null does not stand for, where one that is left out has no default of its own.
pub(super) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    T::deserialize(d).map(Some)
}

/// A line of text, which may be empty.
pub(super) fn line<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    text(d, |text| rules::clean(text).map(|()| text.into()))
}

pub(super) fn words_or_null<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<Words>::deserialize(d)?.map(|words| words.0))
}

pub(super) fn words_list<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    Ok(list::<D, Words>(d)?.into_iter().map(|words| words.0).collect())
}

/// The most entries of a list: with that, a line of a unit stays below what systemd reads (LONG_LINE_MAX).
const MAX_ENTRIES: usize = 1000;

pub(super) fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    list_of_at_most(MAX_ENTRIES, d)
}

fn list_of_at_most<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    most: usize,
    d: D,
) -> Result<Vec<T>, D::Error> {
    struct ListVisitor<T>(usize, PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of strings")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(entry) = seq.next_element()? {
                if list.len() == self.0 {
                    return Err(de::Error::custom(format!(
                        "has more than {} entries; take some out",
                        self.0
                    )));
                }
                list.push(entry);
            }
            Ok(list)
        }
    }
    d.deserialize_seq(ListVisitor(most, PhantomData))
}

/// The hosts of a service: at least one. They stand in no unit, so that only what an entry may have bounds them.
pub(super) fn hosts<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<HostName>, D::Error> {
    match list_of_at_most(usize::MAX, d)? {
        hosts if hosts.is_empty() => {
            Err(de::Error::custom("[] names no host; a service runs on at least one"))
        }
        hosts => Ok(hosts),
    }
}
