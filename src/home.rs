//! The folders of whoever runs this: what is below their home, wherever the environment has it.

use std::path::PathBuf;

/// `~/.config/omni-deploy` of whoever runs this: `$XDG_CONFIG_HOME`, else `$HOME/.config`, else root's.
pub fn user_dir() -> PathBuf {
    folder("XDG_CONFIG_HOME").unwrap_or_else(|| home().join(".config")).join("omni-deploy")
}

/// `~/.local/state/omni-deploy`: what this user's calls remember and can find out again.
pub fn state_dir() -> PathBuf {
    folder("XDG_STATE_HOME").unwrap_or_else(|| home().join(".local/state")).join("omni-deploy")
}

/// The home folder: `$HOME`, else root's (units of the system have none).
pub fn home() -> PathBuf {
    folder("HOME").unwrap_or_else(|| "/root".into())
}

/// The folder that a variable of the environment names.
fn folder(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from)
}
