//! `omni-deploy keygen`: a new signing key, for closures and manifests alike.

use super::{Call, print};
use crate::config;
use crate::error::Result;
use crate::keys::SecretKey;
use crate::say;
use argh::FromArgs;

/// Make a signing key: NAME.secret (mode 0600) and NAME.pub below ~/.config/omni-deploy/keys. Prints the public
/// key; never overwrites one.
#[derive(FromArgs)]
#[argh(example = "  {command_name} ann-2026")]
struct Args {
    /// the key's name, which its signatures carry
    #[argh(positional)]
    name: String,
}

/// Runs the command.
pub fn run(call: &Call) -> Result<u8> {
    let args: Args = call.parse()?;
    let key = SecretKey::generate(&args.name)?;
    let path = key.write(&config::user_dir().join("keys"))?;
    say::notice(format!("made {}; to sign with it: 'secretKeyFile' in the configuration", path.display()));
    print(&key.public().to_string())?;
    Ok(0)
}
