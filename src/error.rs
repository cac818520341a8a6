//! The error a command ends with: one line for the person, one exit code for the script. Modules whose
//! callers must tell causes apart (the store, the runner, the manifest) have enums of their own and turn into
//! this one at the edge. It never carries a chain of causes: the text names the object, the cause and the
//! next move.

use std::fmt;

/// What a process ends with, for scripts; the worse, the higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// Done, or nothing to do.
    Done = 0,
    /// Nothing could be done: bad manifest, bucket out of reach, refused input.
    Failed = 1,
    /// The command line was not understood.
    Usage = 2,
    /// Some service failed and its previous version runs.
    Degraded = 3,
    /// Some service is down.
    Down = 4,
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// What ends a command before it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// Something went wrong.
    Failure {
        /// One line for the person.
        text: String,
        /// The same for a script.
        exit: Exit,
    },
    /// Whoever read our output went away (`| head`): nothing is wrong, and nobody is there to be told.
    ReaderGone,
}

/// The result of everything that can end a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure: exit code 1.
    pub fn new(text: impl Into<String>) -> Self {
        Error::Failure { text: text.into(), exit: Exit::Failed }
    }

    /// A usage error: exit code 2.
    pub fn usage(text: impl Into<String>) -> Self {
        Error::Failure { text: text.into(), exit: Exit::Usage }
    }

    /// What the process ends with.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Failure { exit, .. } => *exit,
            Error::ReaderGone => Exit::Done,
        }
    }

    /// Puts what was being done in front: `"{context}: {text}"`.
    pub fn context(self, context: impl fmt::Display) -> Self {
        match self {
            Error::Failure { text, exit } => Error::Failure { text: format!("{context}: {text}"), exit },
            Error::ReaderGone => Error::ReaderGone,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Failure { text, .. } => f.write_str(text),
            Error::ReaderGone => f.write_str("whoever read our output went away"),
        }
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    /// Errors of fs-err name the path and the operation already.
    fn from(e: std::io::Error) -> Self {
        Error::new(io_text(&e))
    }
}

/// An I/O error with the next move for the causes an operator can do something about.
pub fn io_text(e: &std::io::Error) -> String {
    let source = std::error::Error::source(e).map(|s| s.to_string());
    let mut text = e.to_string();
    if let Some(source) = source
        && !text.contains(&source)
    {
        text = format!("{text}: {source}");
    }
    match e.kind() {
        std::io::ErrorKind::StorageFull => format!("{text}; free some space on that file system"),
        std::io::ErrorKind::ReadOnlyFilesystem => format!("{text}; make that file system writable"),
        // EIO has no kind, and whoever names the path drops its number.
        _ if text.contains("(os error 5)") => {
            format!("{text}; that disk fails: look at 'dmesg', and at its backups")
        }
        std::io::ErrorKind::PermissionDenied => format!("{text}; run this as root or as the file's owner"),
        _ => text,
    }
}

/// Edit distance, for "did you mean": counts insertions, deletions and substitutions.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The (at most three) candidates most like `word`, nearest first; those nothing like it are left out.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let lower = word.to_lowercase();
    let mut scored: Vec<(usize, &str)> = candidates
        .into_iter()
        .filter_map(|c| {
            let candidate = c.to_lowercase();
            let d = if !lower.is_empty() && (candidate.contains(&lower) || lower.contains(&candidate)) {
                1
            } else {
                distance(&lower, &candidate)
            };
            (d <= 1 + word.chars().count() / 3).then_some((d, c))
        })
        .collect();
    scored.sort();
    scored.truncate(3);
    scored.into_iter().map(|(_, c)| c).collect()
}

/// `"; did you mean 'a' or 'b'?"`, or nothing when nothing is near.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    let near = nearest(word, candidates);
    if near.is_empty() {
        return String::new();
    }
    let quoted: Vec<String> = near.iter().map(|n| format!("'{n}'")).collect();
    format!("; did you mean {}?", quoted.join(" or "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_names_come_first_and_strangers_are_left_out() {
        let names = ["ava", "podcastitlater-web", "storage"];
        assert_eq!(nearest("avaa", names), ["ava"]);
        assert_eq!(nearest("podcast", names), ["podcastitlater-web"]);
        assert_eq!(nearest("zzz", names), Vec::<&str>::new());
        assert_eq!(did_you_mean("storge", names), "; did you mean 'storage'?");
    }
}
