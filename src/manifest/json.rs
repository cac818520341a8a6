//! The manifest as text: laying it out, finding one entry in it, and showing a place or a value of it. Knows nothing of
//! what the fields mean.

use crate::bounds::{Container, Token, Tokens};
use serde::Serialize;
use std::io::Cursor;

/// The path of a field of what is at `above`.
pub(super) fn field(above: &str, name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    match above {
        _ if name.is_empty() || !name.chars().all(plain) => format!("{above}[{}]", shown(name)),
        "" => name.into(),
        _ => format!("{above}.{name}"),
    }
}

/// A value for one line of an error: compact JSON, cut when it is long, nothing in it that a terminal obeys.
pub(super) fn shown(value: &(impl Serialize + ?Sized)) -> String {
    // Its beginning, and no more: a text of megabytes is not copied to be cut.
    let mut start = Cursor::new([0; 512]);
    // That it is longer is no error.
    drop(serde_json::to_writer(&mut start, value));
    let length = start.position() as usize;
    let text = String::from_utf8_lossy(&start.get_ref()[..length]);
    let cut = match text.char_indices().nth(72) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.into_owned(),
    };
    crate::log::printable(&cut).into_owned()
}

/// Lays JSON out for people (two spaces, one field a line) without changing a token or the order of anything.
/// `bytes` must be JSON.
pub fn pretty(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 4 + 1);
    let (mut depth, mut empty, mut named) = (0, true, false);
    let newline = |out: &mut Vec<u8>, depth: usize| {
        out.push(b'\n');
        out.resize(out.len() + 2 * depth, b' ');
    };
    let mut tokens = Tokens::new(bytes);
    while let Some(token) = tokens.next() {
        if token == Token::Close {
            depth = usize::saturating_sub(depth, 1);
            if !std::mem::take(&mut empty) {
                newline(&mut out, depth);
            }
            out.push(bytes[tokens.position() - 1]);
            continue;
        }
        if !std::mem::take(&mut named) && depth > 0 {
            if !empty {
                out.push(b',');
            }
            newline(&mut out, depth);
        }
        empty = matches!(token, Token::Open(_));
        match token {
            Token::Key(range) => {
                out.extend_from_slice(&bytes[range]);
                out.extend_from_slice(b": ");
                named = true;
            }
            Token::Scalar(range) => out.extend_from_slice(&bytes[range]),
            Token::Open(_) | Token::Close => {
                out.push(bytes[tokens.position() - 1]);
                depth += 1;
            }
        }
    }
    // Of what is not JSON, the rest.
    out.extend_from_slice(bytes[tokens.position()..].trim_ascii());
    out.push(b'\n');
    out
}

/// The elements of the top-level array `name`, each as the bytes it is written with. `bytes` must be JSON.
pub fn elements<'a>(bytes: &'a [u8], name: &str) -> Vec<&'a [u8]> {
    // Written with or without escapes.
    let is = |key: &[u8]| serde_json::from_slice::<String>(key).is_ok_and(|key| key == name);
    let (mut found, mut named, mut depth, mut start) = (Vec::new(), false, 0, None);
    let mut tokens = Tokens::new(bytes);
    while let Some(token) = tokens.next() {
        match token {
            Token::Key(range) if depth == 1 => named = is(&bytes[range]),
            Token::Scalar(range) if depth == 2 && named => found.push(&bytes[range]),
            Token::Key(_) | Token::Scalar(_) => {}
            Token::Open(container) => {
                depth += 1;
                match depth {
                    1 | 2 if container != [Container::Object, Container::Array][depth - 1] => named = false,
                    3 => start = Some(tokens.position() - 1),
                    _ => {}
                }
            }
            Token::Close => {
                if let (3, true, Some(start)) = (depth, named, start) {
                    found.push(&bytes[start..tokens.position()]);
                }
                depth = usize::saturating_sub(depth, 1);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn layout_changes_space_only_and_equals_serde_jsons() {
        let text = r#"{"z":1,"a":[],"b":{ },"c":[{"x":"a\"b, {c}: [d]","y":[1,2]},null,-1.5e3],"":"\\"}"#;
        let tree: Value = serde_json::from_str(text).unwrap();
        let laid = pretty(text.as_bytes());
        assert_eq!(serde_json::from_slice::<Value>(&laid).unwrap(), tree);
        assert_eq!(pretty(&laid), laid, "not stable");
        assert!(laid.starts_with(b"{\n  \"z\": 1,\n  \"a\": [],\n  \"b\": {},\n"), "order or layout is lost");
        let mut by_serde = serde_json::to_vec_pretty(&tree).unwrap();
        by_serde.push(b'\n');
        assert_eq!(pretty(tree.to_string().as_bytes()), by_serde);
    }

    #[test]
    fn elements_are_found_as_they_are_written() {
        let text =
            br#" { "x" : {"services": [9]}, "services" : [ {"a": "]}"} , 12,"s" ,[1,[2]],null ] , "y": 1 } "#;
        let found: Vec<&str> =
            elements(text, "services").into_iter().map(|e| std::str::from_utf8(e).unwrap()).collect();
        assert_eq!(found, [r#"{"a": "]}"}"#, "12", "\"s\"", "[1,[2]]", "null"]);
        assert_eq!(elements(br#"{"\u0073ervices": [1]}"#, "services"), [b"1"]);
        assert!(elements(b"[1]", "services").is_empty());
        assert!(elements(b"{\"services\": []}", "services").is_empty());
    }
}
