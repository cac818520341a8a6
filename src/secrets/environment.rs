//! The form of an EnvironmentFile, as systemd reads it (systemd.exec(5); the states are those of its
//! `env-file.c`). Tells the names of the variables, and what systemd would refuse, drop or read otherwise than it
//! is meant. It never tells a value, nor anything else that may be part of one, but to [`super::mask`], which takes
//! values out of texts.

use std::fmt;

/// The longest assignment that the kernel takes (MAX_ARG_STRLEN), in bytes.
const MAX_ASSIGNMENT: usize = 131_071;

/// What is wrong in a line, without what the line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Counted from 1.
    pub line: usize,
    /// Why systemd would not take it as it is meant.
    pub what: &'static str,
    /// The service would not start, or systemd would write what is in the line to the journal.
    pub grave: bool,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} {}", self.line, self.what)
    }
}

/// What an unquoted value loses.
const BACKSLASH: &str =
    "has a '\\' outside of quotes, which systemd takes away: put the value between single quotes";
/// What swallows a line.
const JOINED: &str = "ends with '\\', so systemd takes the next line for a part of its value: put the value between \
                      single quotes";
const NOT_CLOSED: &str = "ends with '\\\"', which systemd does not take for the closing quote, so that the value goes on \
                          in the next line: put it between single quotes";
const AFTER_QUOTE: &str = "has something after its closing quote, which systemd adds to the value: put all of it between \
                           the quotes, and a comment on a line of its own";

enum ReaderState {
    Before,
    Name,
    BeforeValue,
    Value,
    ValueEscape,
    Single,
    Double,
    DoubleEscape,
    Comment,
    CommentEscape,
}

/// The names that are set, each once and in order, and all mistakes. Pure.
pub fn read(bytes: &[u8]) -> (Vec<String>, Vec<Mistake>) {
    let Reader { names, mistakes, .. } = read_all(bytes);
    (names, mistakes)
}

/// The values, for [`super::mask`] alone.
pub(super) fn values(bytes: &[u8]) -> Vec<String> {
    read_all(bytes).values
}

fn read_all(bytes: &[u8]) -> Reader {
    let line_at = |at: usize| 1 + bytes[..at].iter().filter(|b| **b == b'\n').count();
    // Either of these makes systemd refuse the whole file, and the service with it.
    if let Some(at) = bytes.iter().position(|b| *b == 0) {
        return Reader::refused(Mistake { line: line_at(at), what: "has a NUL byte", grave: true });
    }
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(e) => {
            let line = line_at(e.valid_up_to());
            return Reader::refused(Mistake { line, what: "is not UTF-8", grave: true });
        }
    };
    let mut reader = Reader::default();
    let mut state = ReaderState::Before;
    for c in text.chars() {
        state = reader.step(state, c);
        reader.line += usize::from(c == '\n');
    }
    match state {
        ReaderState::Before | ReaderState::Comment | ReaderState::CommentEscape => {}
        ReaderState::Name => reader.mistake("has no '='; systemd ignores it"),
        ReaderState::Single | ReaderState::Double | ReaderState::DoubleEscape => {
            reader.mistake("opens a quote that nothing closes: the rest of the file is part of the value");
        }
        ReaderState::BeforeValue | ReaderState::Value => reader.assigned(),
        ReaderState::ValueEscape => {
            reader.here(BACKSLASH);
            reader.assigned();
        }
    }
    reader
}

#[derive(Default)]
struct Reader {
    /// Newlines so far.
    line: usize,
    /// The line that the assignment under way began in, counted as `line`.
    began: usize,
    name: String,
    value: String,
    /// A quote was closed; whether white space came after it.
    after_quote: Option<bool>,
    /// The last character within double quotes was a quote that a backslash had made a part of the value.
    quoted_last: bool,
    names: Vec<String>,
    /// One for each assignment.
    values: Vec<String>,
    mistakes: Vec<Mistake>,
}

impl Reader {
    /// Of a file that systemd takes nothing of.
    fn refused(why: Mistake) -> Self {
        Reader { mistakes: vec![why], ..Reader::default() }
    }

    fn step(&mut self, state: ReaderState, c: char) -> ReaderState {
        let newline = matches!(c, '\n' | '\r');
        let white = newline || matches!(c, ' ' | '\t');
        match state {
            ReaderState::Before => match c {
                '#' | ';' => ReaderState::Comment,
                _ if white => ReaderState::Before,
                _ => {
                    (self.began, self.after_quote) = (self.line, None);
                    self.value.clear();
                    self.name = c.to_string();
                    // Also '=': for systemd it begins a name.
                    ReaderState::Name
                }
            },
            ReaderState::Name if newline => {
                self.mistake("has no '='; systemd ignores it");
                ReaderState::Before
            }
            ReaderState::Name if c == '=' => ReaderState::BeforeValue,
            ReaderState::Name => {
                self.name.push(c);
                ReaderState::Name
            }
            ReaderState::BeforeValue if newline => self.ended(),
            ReaderState::BeforeValue => match c {
                '\'' => ReaderState::Single,
                '"' => ReaderState::Double,
                '\\' => ReaderState::ValueEscape,
                _ if white => {
                    self.after_quote = self.after_quote.map(|_| true);
                    ReaderState::BeforeValue
                }
                _ => {
                    // Without a space it is as a shell has it.
                    if self.after_quote == Some(true) {
                        self.here(AFTER_QUOTE);
                    }
                    self.more(c, ReaderState::Value)
                }
            },
            ReaderState::Value if newline => self.ended(),
            ReaderState::Value if c == '\\' => ReaderState::ValueEscape,
            ReaderState::Value => self.more(c, ReaderState::Value),
            // The value goes on in the next line.
            ReaderState::ValueEscape if newline => {
                self.here(if c == '\n' { JOINED } else { BACKSLASH });
                ReaderState::Value
            }
            ReaderState::ValueEscape => {
                self.here(BACKSLASH);
                self.more(c, ReaderState::Value)
            }
            ReaderState::Single if c == '\'' => self.closed(),
            ReaderState::Single => self.more(c, ReaderState::Single),
            ReaderState::Double if c == '"' => self.closed(),
            ReaderState::Double if c == '\\' => ReaderState::DoubleEscape,
            ReaderState::Double => {
                if newline && self.quoted_last {
                    self.here(NOT_CLOSED);
                }
                self.quoted_last = false;
                self.more(c, ReaderState::Double)
            }
            // As a shell has it: quotes, '$', '`' and backslashes lose their backslash, a newline goes, others keep it.
            ReaderState::DoubleEscape => {
                self.quoted_last = c == '"';
                match c {
                    '\n' => return ReaderState::Double,
                    '"' | '\\' | '`' | '$' => {}
                    _ => self.value.push('\\'),
                }
                self.more(c, ReaderState::Double)
            }
            ReaderState::Comment if newline => ReaderState::Before,
            ReaderState::Comment if c == '\\' => ReaderState::CommentEscape,
            ReaderState::CommentEscape if newline => {
                self.began = self.line;
                self.mistake("is a comment that ends with '\\': systemd before 254 takes the next line for a part of it");
                ReaderState::Before
            }
            ReaderState::Comment | ReaderState::CommentEscape => ReaderState::Comment,
        }
    }

    fn more(&mut self, c: char, next: ReaderState) -> ReaderState {
        self.value.push(c);
        next
    }

    fn closed(&mut self) -> ReaderState {
        (self.after_quote, self.quoted_last) = (Some(false), false);
        ReaderState::BeforeValue
    }

    /// A mistake in the line that is being read, told once.
    fn here(&mut self, what: &'static str) {
        let mistake = Mistake { line: self.line + 1, what, grave: false };
        if !self.mistakes.contains(&mistake) {
            self.mistakes.push(mistake);
        }
    }

    fn ended(&mut self) -> ReaderState {
        self.assigned();
        ReaderState::Before
    }

    fn assigned(&mut self) {
        let name = self.name.trim_end_matches([' ', '\t']).to_string();
        self.values.push(self.value.clone());
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(plain) {
            // Measured: with the value.
            self.grave(
                "sets no name of a variable (ASCII letters, digits and '_', no digit first, no 'export'): systemd \
                 drops it and writes all of it to the journal",
            );
        } else if name.len() + 1 + self.value.len() > MAX_ASSIGNMENT {
            self.grave("sets a value that is longer than the kernel takes (131,071 bytes with its name)");
        } else if !self.names.contains(&name) {
            self.names.push(name);
        }
    }

    fn mistake(&mut self, what: &'static str) {
        self.mistakes.push(Mistake { line: self.began + 1, what, grave: false });
    }

    fn grave(&mut self, what: &'static str) {
        self.mistakes.push(Mistake { line: self.began + 1, what, grave: true });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_systemd_takes_gives_its_names() {
        for (text, names) in [
            ("", vec![]),
            ("A=1\nB=2", vec!["A", "B"]),
            ("A=1\r\nB=2\r\n", vec!["A", "B"]),
            ("  A = x y \n\n#C=1\n ; D=2\nA=3\n", vec!["A"]),
            ("A=\"two\nlines # = \\\" \"\nB='x\n=y'z\n", vec!["A", "B"]),
            (
                "A='C:\\new\\table' \nB=\"a\\\\b \\\" \\$x \\n\"\nC='\\'\nD=\"x\\\ny\"",
                vec!["A", "B", "C", "D"],
            ),
            ("A=\n_B1==\n", vec!["A", "_B1"]),
            ("A=ü # no comment\n", vec!["A"]),
        ] {
            assert_eq!(
                read(text.as_bytes()),
                (names.iter().map(|n| n.to_string()).collect(), vec![]),
                "{text:?}"
            );
        }
    }

    #[test]
    fn what_it_would_not_take_as_it_is_meant_is_told_by_line_and_never_by_content() {
        for (text, line, word) in [
            (&b"A=1\nhunter2\n"[..], 2, "no '='"),
            (b"A=1\n\n  hunter2", 3, "no '='"),
            (b"A=1\nexport B=hunter2\n", 2, "journal"),
            (b"1A=hunter2", 1, "journal"),
            (b"A-B=hunter2", 1, "journal"),
            (b"=hunter2=x", 1, "journal"),
            ("\u{feff}A=hunter2".as_bytes(), 1, "journal"),
            ("\u{fc}=hunter2".as_bytes(), 1, "journal"),
            (b"A='one\ntwo'\nB=\"hunter2\nC=1\n", 3, "quote"),
            (b"A=1\n'hunter2\n", 2, "no '='"),
            (b"A=1\nB=hunter2\0\n", 2, "NUL"),
            (b"A=1\nB=hunter2\xff\n", 2, "UTF-8"),
            (b"A=1\nB=C:\\hunter2\\x\n", 2, "takes away"),
            (b"A=hunter2\\", 1, "takes away"),
            (b"A=hunter2\\\r\nB=1\n", 1, "takes away"),
            (b"A=1\nB=hunter2\\\nC=hunter2\n", 2, "next line"),
            (b"A=hunter2 \nB=1\\\n\n", 2, "next line"),
            (b"A=\"C:\\hunter2\\\"\nB=\"\n", 1, "not take for the closing quote"),
            (b"A='hunter2' # hunter2\n", 1, "closing quote"),
            (b"A=1\n# hunter2 \\\nB=1\n", 2, "254"),
        ] {
            let (names, mistakes) = read(text);
            let said = mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
            assert_eq!(mistakes.len(), 1, "{text:?}: {said}");
            let grave = ["journal", "NUL", "UTF-8"].contains(&word);
            assert_eq!(mistakes[0].grave, grave, "{text:?}");
            assert!(mistakes[0].line == line && said.contains(word), "{text:?}: {said}");
            assert!(!said.contains("hunter2") && !names.iter().any(|n| n.contains("hunter2")), "{said}");
        }
        let long = |n: usize| read(format!("A={}\n", "x".repeat(n)).as_bytes()).1.len();
        assert_eq!((long(MAX_ASSIGNMENT - 2), long(MAX_ASSIGNMENT - 1)), (0, 1));
    }
}
