//! A person's editor: `$VISUAL` or `$EDITOR`, with its arguments, on a draft. Ctrl-C is the editor's while it has
//! the terminal.

use super::Call;
use crate::config::{self, KEYS};
use crate::error::{Error, Result};
use crate::runner::{ProcessStatus, Run};
use std::path::{Path, PathBuf};

/// In the environment of a process that ignores the terminal's signals.
const SIGNALS_IGNORED: &str = "OMNI_DEPLOY_SIGNALS_IGNORED";

/// Becomes a process that an editor's Ctrl-C does not end, once.
pub fn ignore_its_signals(call: &Call) -> Result<()> {
    if std::env::var_os(SIGNALS_IGNORED).is_some() {
        return Ok(());
    }
    let flags = KEYS.iter().filter_map(|key| Some(format!("{}={}", key.flag, call.flags.get(key.name)?)));
    let run = Run::new(std::env::current_exe()?.to_string_lossy()).args(flags);
    Ok(run.args(&call.args).env(SIGNALS_IGNORED, "1").ignore_signals()?)
}

/// The same run, with the terminal's signals as they usually are.
pub fn as_the_terminal_has_it(run: Run) -> Run {
    if std::env::var_os(SIGNALS_IGNORED).is_some() { run.interruptible() } else { run }
}

/// What an editor may remember of a draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traces {
    /// Whatever it likes.
    Kept,
    /// Nothing outside of the draft's folder, as far as we know how to tell it so.
    None,
}

/// What keeps vim and nvim from writing parts of a text elsewhere: swap and undo files, backups, and the registers and
/// searches that they keep for the next time. After the person's own settings, which may ask for any of them.
const VIM_WITHOUT_TRACES: [&str; 5] =
    ["-n", "-i", "NONE", "-c", "silent! set noundofile nobackup nowritebackup viminfo="];

/// Whether a program is vim or nvim, by whatever name it is called (vi and editor are links to it on many machines).
fn is_vim(program: &str) -> bool {
    let path =
        if program.contains('/') { Some(PathBuf::from(program)) } else { config::found_on_path(program) };
    let path = path.and_then(|path| fs_err::canonicalize(path).ok());
    let name = path.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    name.is_some_and(|name| name == "vim" || name == "nvim" || name.starts_with("vim."))
}

/// Has a person edit the file `draft`, and returns what is in it then.
pub fn edit(draft: &Path, traces: Traces) -> Result<Vec<u8>> {
    let (shown, words) = words()?;
    let (program, args) = words.split_first().ok_or_else(|| Error::new("EDITOR is empty; set it"))?;
    let quiet: &[&str] = if traces == Traces::None && is_vim(program) { &VIM_WITHOUT_TRACES } else { &[] };
    let run = Run::new(program).args(quiet).args(args).arg(draft).without_env(SIGNALS_IGNORED);
    let status = as_the_terminal_has_it(run)
        .inherit()
        .map_err(|e| Error::new(format!("cannot edit: {e}; or set EDITOR to another editor")))?;
    match status {
        ProcessStatus::Exit(0) => Ok(fs_err::read(draft)?),
        ProcessStatus::Exit(127) => {
            Err(Error::new(format!("cannot edit: no '{shown}'; set EDITOR to another editor")))
        }
        status => Err(Error::new(format!("nothing was written: the editor '{shown}' ended with {status}"))),
    }
}

/// The words of the editor, and how it was written.
fn words() -> Result<(String, Vec<String>)> {
    let set = |name: &str| std::env::var(name).ok().filter(|v| !v.trim().is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "vi".into());
    let words = crate::manifest::command::split_command(&editor)
        .map_err(|why| Error::new(format!("EDITOR '{editor}' {why}")))?;
    Ok((editor, words))
}
