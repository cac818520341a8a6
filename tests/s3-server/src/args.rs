//! The command line. It owns the flags and the checks on them, and touches no file but the policies.

use std::path::{Path, PathBuf};

use crate::Error;
use crate::access::{Policy, User, Users};

const USAGE: &str = "usage: omni-test-s3 --root DIR --listen ADDR:PORT --user KEY:SECRET[:POLICY] \
[--user ...] [--bucket NAME ...] [--domain NAME] [--log FILE] [--connections FILE] [--control FILE]
POLICY: 'rw' (the default: everything) or a file with an IAM policy";

#[derive(Debug)]
pub struct Args {
    /// Holds the buckets; made if it is missing.
    pub root: PathBuf,
    /// `ADDR:PORT`; port 0 takes any.
    pub listen: String,
    pub users: Users,
    pub buckets: Vec<String>,
    /// Gets one line per request.
    pub log: Option<PathBuf>,
    /// Gets one line per connection that was accepted.
    pub connections: Option<PathBuf>,
    /// The server's own name, before which a bucket's may stand.
    pub domain: Option<String>,
    /// Says which faults to show; see [`crate::faults`].
    pub control: Option<PathBuf>,
}

impl Args {
    /// Reads the flags, without the program's name.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, Error> {
        let mut words = words.into_iter();
        let (mut root, mut listen, mut log, mut control, mut domain) = (None, None, None, None, None);
        let mut connections = None;
        let mut users = Users::default();
        let mut buckets = Vec::new();
        while let Some(flag) = words.next() {
            let mut value = || {
                let value = words.next();
                value.ok_or_else(|| format!("{flag} needs a value\n{USAGE}"))
            };
            match flag.as_str() {
                "--root" => root = Some(PathBuf::from(value()?)),
                "--listen" => listen = Some(value()?),
                "--user" => {
                    let (key, user) = parse_user(&value()?)?;
                    users.insert(key, user);
                }
                "--bucket" => buckets.push(value()?),
                "--domain" => domain = Some(value()?),
                "--log" => log = Some(PathBuf::from(value()?)),
                "--connections" => connections = Some(PathBuf::from(value()?)),
                "--control" => control = Some(PathBuf::from(value()?)),
                _ => return Err(format!("unknown argument '{flag}'\n{USAGE}").into()),
            }
        }
        let missing = |flag| format!("{flag} is missing\n{USAGE}");
        if users.is_empty() {
            return Err(missing("--user").into());
        }
        Ok(Self {
            root: root.ok_or_else(|| missing("--root"))?,
            listen: listen.ok_or_else(|| missing("--listen"))?,
            users,
            buckets,
            log,
            connections,
            domain,
            control,
        })
    }
}

fn parse_user(text: &str) -> Result<(String, User), Error> {
    let mut parts = text.splitn(3, ':');
    let (Some(key), Some(secret)) = (parts.next(), parts.next()) else {
        return Err(format!("--user '{text}': expected KEY:SECRET[:POLICY]").into());
    };
    let policy = match parts.next() {
        None | Some("rw") => Policy::Everything,
        Some(file) => Policy::read(Path::new(file))?,
    };
    let user = User { secret: secret.to_owned(), policy };
    Ok((key.to_owned(), user))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Error> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn flags_may_repeat_and_the_policy_defaults_to_everything() {
        let args = parse("--root /r --listen 127.0.0.1:0 --user a:b --user c:d:rw --bucket x --bucket y");
        let args = args.unwrap();
        assert_eq!(args.buckets, ["x", "y"]);
        assert!(matches!(args.users["a"].policy, Policy::Everything));
        assert!(matches!(args.users["c"].policy, Policy::Everything));
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let error = |line| parse(line).unwrap_err().to_string();
        assert!(error("--root /r --listen a:0").contains("--user is missing"));
        assert!(error("--listen a:0 --user a:b").contains("--root is missing"));
        assert!(error("--root").contains("--root needs a value"));
        assert!(error("--frob").contains("unknown argument '--frob'"));
        assert!(error("--user a").contains("KEY:SECRET"));
    }
}
