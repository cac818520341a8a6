//! `omni-deploy keygen`: a new signing key, for closures and manifests alike.

use super::print;
use crate::error::{Exit, Result};
use crate::home;
use crate::keys::SecretKey;
use crate::log;
use argh::{ArgsInfo, FromArgs};

/// Make a signing key. It is NAME.secret (mode 0600) and NAME.pub below ~/.config/omni-deploy/keys; the public key is
/// printed. Never overwrites one.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "keygen", example = "{command_name} ann-2026")]
pub(super) struct Args {
    /// the key's name, which its signatures carry
    #[argh(positional)]
    name: String,
}

pub(super) fn run(args: Args) -> Result<Exit> {
    let key = SecretKey::generate(&args.name)?;
    let path = key.write(&home::user_dir().join("keys"))?;
    log::notice(format!("made {}; to sign with it: 'secretKeyFile' in the configuration", path.display()));
    print(&key.public().to_string())?;
    Ok(Exit::Done)
}
