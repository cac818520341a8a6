//! The policies of contrib/s3, filled in as docs/configuration.md says.

use std::path::Path;

/// What a developer may do, as IAM's JSON. `prefix` is empty or a path without slashes at its ends.
pub fn developer(bucket: &str, prefix: &str) -> String {
    filled("developer-policy.json", bucket, prefix, "")
}

/// What a host may do.
pub fn host(bucket: &str, prefix: &str, host: &str) -> String {
    filled("host-policy.json", bucket, prefix, host)
}

fn filled(name: &str, bucket: &str, prefix: &str, host: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/s3").join(name);
    let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
    let text = fs_err::read_to_string(file).expect("the policies are in contrib/s3");
    text.replace("BUCKET", bucket).replace("PREFIX/", &prefix).replace("HOST", host)
}
