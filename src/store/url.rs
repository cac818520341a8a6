//! URLs of stores and caches: `s3://BUCKET[/PREFIX]?region=&endpoint=&scheme=&profile=&addressing-style=` (the
//! grammar of Nix's own S3 stores), `file:///DIR`, and for caches anything else that `nix copy` takes.

use crate::percent;
use std::fmt;
use std::path::PathBuf;

/// Where a bucket is and how it is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct S3Location {
    /// The bucket's name.
    pub bucket: String,
    /// What stands before every key: empty, or without a leading and with a trailing slash.
    pub prefix: String,
    /// The region of the URL, if it has one.
    pub region: Option<String>,
    /// `host[:port]` of a store that is not AWS's; addressed path-style.
    pub endpoint: Option<String>,
    /// `https` unless the URL says `http`.
    pub scheme: String,
    /// The profile of the URL, if it has one.
    pub profile: Option<String>,
    /// Where the bucket's name stands.
    pub addressing: Addressing,
    /// What named the endpoint, if the URL did not.
    pub endpoint_from: Option<String>,
}

/// Where the bucket's name stands in an address; the words of Nix's S3 stores (`addressing-style`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Addressing {
    /// In the path; in the host's name for a store that refuses this.
    #[default]
    Auto,
    /// In the path.
    Path,
    /// In the host's name.
    Virtual,
}

/// Its words.
const ADDRESSING: [(&str, Addressing); 3] =
    [("auto", Addressing::Auto), ("path", Addressing::Path), ("virtual", Addressing::Virtual)];

/// The store of the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// A directory.
    Dir(PathBuf),
    /// A bucket.
    S3(S3Location),
}

/// A binary cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheUrl {
    /// One that objects are moved to and from here.
    Store(StoreUrl),
    /// Whatever else Nix understands, given to it as it is.
    Nix(String),
}

impl StoreUrl {
    /// Parses a URL; the error is the reason and the remedy, without the URL.
    pub fn parse(text: &str) -> Result<Self, String> {
        match CacheUrl::parse(text)? {
            CacheUrl::Store(url) => Ok(url),
            CacheUrl::Nix(_) => Err("is neither s3://BUCKET nor file:///DIR".into()),
        }
    }

    /// Whether all machines that have this URL mean the same store.
    pub fn is_shared(&self) -> bool {
        matches!(self, StoreUrl::S3(_))
    }

    /// As another machine is told of it: a profile is of this machine's credentials.
    pub fn for_others(&self) -> StoreUrl {
        match self {
            StoreUrl::Dir(path) => StoreUrl::Dir(path.clone()),
            StoreUrl::S3(location) => StoreUrl::S3(S3Location { profile: None, ..location.clone() }),
        }
    }

    /// Whether two URLs differ in nothing but the address at which the store is reached, and how.
    pub fn differs_in_address_alone(&self, other: &StoreUrl) -> bool {
        match (self, other) {
            (StoreUrl::S3(one), StoreUrl::S3(other)) => {
                (&one.bucket, &one.prefix) == (&other.bucket, &other.prefix)
            }
            (StoreUrl::Dir(_) | StoreUrl::S3(_), _) => false,
        }
    }
}

impl CacheUrl {
    /// Parses a URL; the error is the reason and the remedy, without the URL.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(c) = text.chars().find(|c| c.is_control() || c.is_whitespace()) {
            return Err(format!("has {c:?} in it"));
        }
        if let Some(rest) = text.strip_prefix("file://") {
            let path = rest.split('?').next().unwrap_or_default();
            if !path.starts_with('/') {
                return Err("needs an absolute folder: file:///DIR".into());
            }
            if path.split('/').any(|part| part == "..") {
                return Err("has '..' in it".into());
            }
            let trimmed = path.trim_end_matches('/');
            return Ok(CacheUrl::Store(StoreUrl::Dir(if trimmed.is_empty() { "/" } else { trimmed }.into())));
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            return Ok(CacheUrl::Store(StoreUrl::S3(s3_location(rest)?)));
        }
        let in_scheme = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        match text.split_once("://") {
            Some((scheme, rest))
                if !rest.is_empty() && scheme.chars().all(in_scheme) && !scheme.is_empty() =>
            {
                Ok(CacheUrl::Nix(text.to_string()))
            }
            _ => Err("is not a URL; expected s3://BUCKET or file:///DIR".into()),
        }
    }
}

fn s3_location(rest: &str) -> Result<S3Location, String> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
    let bucket_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(bucket_char) {
        return Err("has no bucket name (3 to 63 of a-z, 0-9, '-' and '.') after s3://".into());
    }
    let prefix = prefix.trim_matches('/');
    if prefix.split('/').any(|part| part == ".." || part == ".") {
        return Err("has '.' or '..' in its prefix".into());
    }
    let mut location = S3Location {
        bucket: bucket.to_string(),
        prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
        scheme: "https".to_string(),
        ..S3Location::default()
    };
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = percent::decode(value)?;
        // Written back as they are: these would be read otherwise, or steer whatever shows them.
        if let Some(c) = value.chars().find(|c| c.is_control() || c.is_whitespace() || "&%".contains(*c)) {
            return Err(format!("has {c:?} in the parameter '{name}'; expected the plain value"));
        }
        if value.is_empty() {
            continue;
        }
        match name {
            "region" => location.region = Some(value),
            "endpoint" => {
                // An endpoint is often pasted with its scheme; what it says then counts.
                let (scheme, host) = match value.split_once("://") {
                    Some((scheme, host)) => (Some(scheme.to_string()), host.to_string()),
                    None => (None, value),
                };
                if let Some(scheme) = scheme {
                    location.scheme = scheme;
                }
                location.endpoint = Some(host.trim_end_matches('/').to_string());
            }
            "scheme" => location.scheme = value,
            "profile" => location.profile = Some(value),
            "addressing-style" => {
                let known = ADDRESSING.iter().find(|(word, _)| *word == value);
                location.addressing = known.map(|(_, addressing)| *addressing).ok_or_else(|| {
                    format!("has the addressing-style '{value}'; expected auto, path or virtual")
                })?;
            }
            // Nix's own settings of an s3 store are Nix's affair.
            "compression"
            | "parallel-compression"
            | "priority"
            | "want-mass-query"
            | "trusted"
            | "multipart-upload"
            | "buffer-size"
            | "secret-key"
            | "ls-compression"
            | "log-compression"
            | "write-nar-listing"
            | "index-debug-info"
            | "path-info-cache-size"
            | "compression-level"
            | "narinfo-compression" => {}
            _ => {
                return Err(format!(
                    "has the parameter '{name}', which is none of region, endpoint, scheme, profile, addressing-style"
                ));
            }
        }
    }
    if !matches!(location.scheme.as_str(), "http" | "https") {
        return Err(format!("has the scheme '{}'; expected http or https", location.scheme));
    }
    Ok(location)
}

/// A URL as it may be shown: user and password before an `@`, and values of parameters that are secrets by
/// their name, are replaced by `***`. `secret-key` names a file and stays.
pub fn without_secrets(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_string() };
    let (address, query) = rest.split_once('?').map_or((rest, None), |(a, q)| (a, Some(q)));
    let hidden = |text: &str| match text.rsplit_once('@') {
        Some((before, host)) => match before.rsplit_once("://") {
            Some((scheme, _)) => format!("{scheme}://***@{host}"),
            None => format!("***@{host}"),
        },
        None => text.to_string(),
    };
    let mut out = match address.split_once('/') {
        Some((authority, path)) => format!("{scheme}://{}/{path}", hidden(authority)),
        None => format!("{scheme}://{}", hidden(address)),
    };
    for (i, pair) in query.into_iter().flat_map(|q| q.split('&')).enumerate() {
        out.push(if i == 0 { '?' } else { '&' });
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let lower = name.to_lowercase();
        let secret = lower != "secret-key"
            && ["token", "secret", "password", "signature", "credential"].iter().any(|w| lower.contains(w));
        match (pair.contains('='), secret) {
            (false, _) => out.push_str(&hidden(pair)),
            (true, true) => out.push_str(&format!("{name}=***")),
            (true, false) => out.push_str(&format!("{name}={}", hidden(&value.replace("%40", "@")))),
        }
    }
    out
}

impl S3Location {
    /// Takes the endpoint that `from` names, for want of one in the URL. From here on it is as if the URL had one: two
    /// buckets of one name at two addresses are two stores.
    pub fn take_endpoint(&mut self, url: &str, from: &str) -> Result<(), String> {
        match url.split_once("://") {
            Some((scheme @ ("http" | "https"), host))
                if !host.trim_matches('/').is_empty()
                    && !host.contains(|c: char| c.is_control() || c.is_whitespace() || "&%".contains(c)) =>
            {
                self.scheme = scheme.into();
                self.endpoint = Some(host.trim_end_matches('/').into());
                self.endpoint_from = Some(from.into());
                Ok(())
            }
            _ => {
                Err(format!("{from} is '{}', expected http://HOST[:PORT] or https://…", without_secrets(url)))
            }
        }
    }

    /// The URL without its parameters.
    fn without_query(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.prefix).trim_end_matches('/').to_string()
    }

    /// Bucket and prefix, with the endpoint where it is not AWS's; how it is reached is left out.
    pub fn identity(&self) -> String {
        let mut text = self.without_query();
        // One of AWS's own addresses that was not written into the URL is a way to the same bucket.
        let own = |host: &str| host.ends_with(".amazonaws.com") || host.ends_with(".amazonaws.com.cn");
        if let Some(endpoint) = &self.endpoint
            && !(self.endpoint_from.is_some() && own(endpoint))
        {
            text.push_str(&format!("?endpoint={endpoint}"));
        }
        text
    }
}

impl fmt::Display for S3Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.without_query())?;
        let addressing = ADDRESSING.iter().find(|(_, addressing)| *addressing == self.addressing);
        let addressing = addressing.map(|(word, _)| *word).filter(|word| *word != "auto");
        let query = [
            ("region", self.region.as_deref()),
            ("endpoint", self.endpoint.as_deref()),
            ("scheme", Some(self.scheme.as_str()).filter(|scheme| *scheme != "https")),
            ("profile", self.profile.as_deref()),
            ("addressing-style", addressing),
        ];
        let given = query.into_iter().filter_map(|(name, value)| Some((name, value?)));
        given
            .enumerate()
            .try_for_each(|(n, (name, value))| write!(f, "{}{name}={value}", if n == 0 { '?' } else { '&' }))
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUrl::Dir(path) => write!(f, "file://{}", path.display()),
            StoreUrl::S3(location) => location.fmt(f),
        }
    }
}

/// For people: without what authenticates.
impl fmt::Display for CacheUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CacheUrl::Store(url) => url.fmt(f),
            CacheUrl::Nix(url) => f.write_str(&without_secrets(url)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_of_nix_s3_stores_is_read_and_written_back() {
        let text = "s3://bucket/a/b?region=eu-1&endpoint=127.0.0.1:9000&scheme=http&profile=p&addressing-style=virtual";
        let StoreUrl::S3(l) = StoreUrl::parse(text).unwrap() else { panic!("not s3") };
        assert_eq!((l.bucket.as_str(), l.prefix.as_str(), l.scheme.as_str()), ("bucket", "a/b/", "http"));
        assert_eq!(l.endpoint.as_deref(), Some("127.0.0.1:9000"));
        assert_eq!(StoreUrl::S3(l).to_string(), text);
        let StoreUrl::S3(l) = StoreUrl::parse("s3://bucket?endpoint=http%3A%2F%2Fx%3A1").unwrap() else {
            panic!("not s3")
        };
        assert_eq!((l.endpoint.as_deref(), l.scheme.as_str()), (Some("x:1"), "http"));
        assert_eq!(StoreUrl::parse("file:///var/x/").unwrap().to_string(), "file:///var/x");
    }

    #[test]
    fn what_is_secret_in_a_url_is_not_shown() {
        for (url, shown) in [
            ("s3://bucket/a?region=x&profile=p", "s3://bucket/a?region=x&profile=p"),
            ("https://ann:pw@cache.example.org/a@b", "https://***@cache.example.org/a@b"),
            ("https://pw@x", "https://***@x"),
            ("https://ann:p@w@x?y=1", "https://***@x?y=1"),
            (
                "s3://bucket?endpoint=http://a:pw@h:1&scheme=http",
                "s3://bucket?endpoint=http://***@h:1&scheme=http",
            ),
            ("s3://bucket?endpoint=http%3A%2F%2Fa%3Apw%40h", "s3://bucket?endpoint=***@h"),
            ("https://x?access_token=abc&secret-key=/f", "https://x?access_token=***&secret-key=/f"),
            ("file:///var/x", "file:///var/x"),
            ("ssh-ng://root@biz", "ssh-ng://***@biz"),
        ] {
            assert_eq!(without_secrets(url), shown);
        }
    }

    #[test]
    fn what_is_no_store_is_refused_with_the_form_that_is_meant() {
        for bad in [
            "",
            "bucket",
            "s3://",
            "s3://a",
            "s3://bucket/../x",
            "file://relative",
            "https://x",
            "s3://b b",
            "s3://bucket?regoin=x",
            "s3://bucket?scheme=ftp",
            "s3://bucket?addressing-style=host",
            "file:///a/../b",
            "s3://bucket?region=%zz",
            "s3://bucket?region=eu%1a1",
            "s3://bucket?profile=a%26region=b",
        ] {
            assert!(StoreUrl::parse(bad).is_err(), "{bad:?} passed");
        }
        assert_eq!(
            CacheUrl::parse("https://cache.example.org").unwrap().to_string(),
            "https://cache.example.org"
        );
    }
}
