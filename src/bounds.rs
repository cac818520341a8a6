//! How much of a stranger's JSON is read: one pass over the bytes, before anything is built of them. Eight bytes of
//! text can become seven hundred in memory, so that a bound on bytes alone bounds nothing. It does not judge whether
//! the bytes are JSON: whoever reads them does, and meets the values in the order in which they are counted here,
//! so that nothing can be built that was not counted.

use std::ops::Range;

/// What a document may be at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Values: objects, arrays, texts, numbers, literals.
    pub values: usize,
    /// Objects and arrays within one another.
    pub depth: usize,
}

/// Checks a document before it is read; the error says which bound it exceeds.
pub fn check(bytes: &[u8], bounds: Bounds) -> Result<(), String> {
    let (mut values, mut depth) = (0usize, 0usize);
    for token in Tokens::new(bytes) {
        match token {
            Token::Open(_) => {
                values += 1;
                depth += 1;
            }
            Token::Close => depth = depth.saturating_sub(1),
            Token::Scalar(_) => values += 1,
            Token::Key(_) => {}
        }
        if values > bounds.values {
            return Err(format!("it has more than {} values, too many to be read", bounds.values));
        }
        if depth > bounds.depth {
            return Err(format!("it is nested more than {} levels deep, too deep to be read", bounds.depth));
        }
    }
    Ok(())
}

/// A piece of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Token {
    /// An object or an array begins.
    Open(Container),
    /// One ends.
    Close,
    /// The name of a member, with its quotes.
    Key(Range<usize>),
    /// A text, a number or a literal.
    Scalar(Range<usize>),
}

/// What holds other values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Container {
    Object,
    Array,
}

/// The pieces of the first value in the bytes. Of what is not JSON it makes something of it until the end; up to
/// the first byte at which a parser would stop, these are the document's pieces.
pub(crate) struct Tokens<'a> {
    bytes: &'a [u8],
    at: usize,
    open: Vec<Container>,
    /// Where a name is expected, not a value.
    key: bool,
    done: bool,
}

impl<'a> Tokens<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Tokens { bytes, at: 0, open: Vec::new(), key: false, done: false }
    }

    /// Where the piece that came last ends.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    fn open(&mut self, container: Container) -> Token {
        self.at += 1;
        self.key = container == Container::Object;
        self.open.push(container);
        Token::Open(container)
    }

    fn scalar(&mut self, end: usize) -> Token {
        let range = self.at..end;
        self.at = end;
        self.done = self.open.is_empty();
        Token::Scalar(range)
    }
}

impl Iterator for Tokens<'_> {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        while !self.done {
            match *self.bytes.get(self.at)? {
                b'"' => {
                    let end = string_end(self.bytes, self.at);
                    if std::mem::take(&mut self.key) {
                        let range = self.at..end;
                        self.at = end;
                        return Some(Token::Key(range));
                    }
                    return Some(self.scalar(end));
                }
                b'{' => return Some(self.open(Container::Object)),
                b'[' => return Some(self.open(Container::Array)),
                b'}' | b']' => {
                    self.at += 1;
                    self.key = false;
                    self.open.pop();
                    self.done = self.open.is_empty();
                    return Some(Token::Close);
                }
                b',' => {
                    self.key = self.open.last() == Some(&Container::Object);
                    self.at += 1;
                }
                b':' => {
                    self.key = false;
                    self.at += 1;
                }
                b' ' | b'\t' | b'\n' | b'\r' => self.at += 1,
                _ => {
                    let ends = |b: &u8| b"\"{}[],: \t\n\r".contains(b);
                    let rest = &self.bytes[self.at..];
                    let length = rest.iter().position(ends).unwrap_or(rest.len());
                    return Some(self.scalar(self.at + length));
                }
            }
        }
        None
    }
}

/// The end of the string that begins at `from`.
fn string_end(bytes: &[u8], from: usize) -> usize {
    let mut at = from + 1;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str, values: usize, depth: usize) -> Result<(), String> {
        check(text.as_bytes(), Bounds { values, depth })
    }

    #[test]
    fn what_a_tree_would_hold_is_counted_before_there_is_one() {
        for (text, values, depth) in [
            ("1", 1, 0),
            ("\"a\\\"]}\"", 1, 0),
            ("{}", 1, 1),
            ("[1, -2.5e3,\"x\" ,true,null]", 6, 1),
            ("{\"a\": {\"b\": [{}, {\"c\": \"d\"}]}, \"e\":[]}", 7, 4),
            (" [ [ ] ] ", 2, 2),
            ("[\"\\\\\", \"\\u0022\", 1]", 4, 1),
        ] {
            assert_eq!(said(text, values, depth), Ok(()), "{text}");
            assert!(said(text, values - 1, depth).unwrap_err().contains("values"), "{text}");
            if depth > 0 {
                assert!(said(text, values, depth - 1).unwrap_err().contains("nested"), "{text}");
            }
        }
    }

    #[test]
    fn what_is_cut_off_or_not_json_is_counted_as_far_as_a_parser_gets() {
        for (text, values) in [
            ("[1,2,3", 4),
            ("{\"a\": [1, {\"b\"", 4),
            ("[1, 2}, 3", 3),
            ("[1 \u{1f}", 2),
            ("{\"a\" 1, \"b\": 2", 2),
        ] {
            assert!(said(text, values - 1, 9).is_err(), "{text}");
        }
        let deep = "[".repeat(1 << 20);
        assert!(said(&deep, usize::MAX, 16).unwrap_err().contains("16 levels"));
        assert_eq!(said("", 0, 0), Ok(()));
    }
}
