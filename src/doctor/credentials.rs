//! Whether what opens the bucket is its owner's alone: files of credentials, the deployer's environment, and
//! configurations whose URLs have a password in them. Modes and owners are looked at, and the words that make a file one
//! of secrets; none of its values.

use super::{Finding, fail, ok};
use crate::config::{self, SYSTEM_FILE};
use crate::log::printable;
use crate::store::credentials;
use crate::store::url::without_secrets;
use crate::systemd;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where the deployer's unit finds root's credentials, and the variables that its installer leaves room for.
const OF_THE_DEPLOYER: [&str; 3] =
    ["/root/.aws/credentials", "/root/.aws/config", "/etc/omni-deploy/deployer.env"];

/// The files of this machine that hold credentials of ours; none: there are none, and nothing to be said.
pub fn own(on_host: bool) -> Vec<Finding> {
    let mut files: BTreeSet<PathBuf> = credentials::files().into();
    files.extend([config::user_file(), PathBuf::from(SYSTEM_FILE)]);
    if on_host {
        files.extend(OF_THE_DEPLOYER.map(PathBuf::from));
        files.extend(environment_files());
    }
    let secret: Vec<&PathBuf> = files.iter().filter(|path| is_secret(path)).collect();
    let wrong: Vec<Finding> = secret.iter().filter_map(|path| exposed(path).map(fail)).collect();
    match (wrong.is_empty(), secret.len()) {
        (false, _) => wrong,
        (true, 0) => Vec::new(),
        (true, count) => vec![ok(format!("files that only their owner can read: {count}"))],
    }
}

/// The files that the deployer's unit names, wherever an administrator has put them.
fn environment_files() -> Vec<PathBuf> {
    // "/path (ignore_errors=yes)"
    let files = systemd::values("deployer.service", "EnvironmentFiles");
    files.iter().filter_map(|line| Some(PathBuf::from(line.split(" (ignore_errors=").next()?))).collect()
}

/// Whether a file has something secret in it, as far as we may read it: one that we may not read is not everybody's.
fn is_secret(path: &Path) -> bool {
    const LARGEST: u64 = 1 << 20;
    if !fs_err::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() <= LARGEST) {
        return false;
    }
    let Ok(text) = fs_err::read_to_string(path) else { return false };
    let named = |word: &str| text.to_ascii_lowercase().contains(word);
    let in_url = |value: &serde_json::Value| value.as_str().is_some_and(|url| without_secrets(url) != url);
    match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(serde_json::Value::Object(config)) => config.values().any(in_url),
        _ => ["aws_secret_access_key", "aws_session_token", "password", "token"].into_iter().any(named),
    }
}

/// Why others could use what is in a file, with the line that ends that.
fn exposed(path: &Path) -> Option<String> {
    let meta = fs_err::metadata(path).ok()?;
    let shown = path.display().to_string();
    let at = printable(&shown);
    let (mode, us) = (meta.mode() & 0o7777, rustix::process::geteuid().as_raw());
    if meta.uid() != 0 && meta.uid() != us {
        return Some(format!(
            "{at} belongs to user {}; run: chown root:root {at}; chmod 600 {at}",
            meta.uid()
        ));
    }
    (mode & 0o077 != 0).then(|| {
        format!(
            "{at} has mode {mode:04o}, others can use what is in it; run: chmod 600 {at}, and change the keys"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_with_secrets_that_others_read_is_named_with_the_line_to_type() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for (text, secret) in [
            ("[default]\naws_access_key_id = A\naws_secret_access_key = x\n", true),
            ("AWS_SECRET_ACCESS_KEY=x\n", true),
            ("[default]\nregion = eu\n", false),
            (r#"{"store": "s3://bucket?endpoint=minio.example.com"}"#, false),
            (r#"{"cache": "https://me:hunter2@cache.example.com"}"#, true),
        ] {
            fs_err::write(&path, text).unwrap();
            assert_eq!(is_secret(&path), secret, "{text}");
        }
        for (mode, well) in [(0o644, false), (0o640, false), (0o600, true), (0o400, true)] {
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let why = exposed(&path);
            assert_eq!(why.is_none(), well, "{mode:o}");
            assert!(why.is_none_or(|why| why.contains(&format!("chmod 600 {}", path.display()))));
        }
    }
}
