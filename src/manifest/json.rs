//! The manifest as text: reading JSON without losing what serde_json's own `Value` loses silently (a key that
//! stands twice), laying it out again, and finding one entry in it. Knows nothing of what the fields mean.

use super::limits::{self, Level};
use super::parse::FieldError;
use crate::bounds::string_end;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

/// Where a value stands: a chain on the stack that is written out only when something is wrong.
#[derive(Clone, Copy)]
pub(super) enum At<'a> {
    /// The document itself.
    Root,
    /// A field of an object.
    Field(&'a At<'a>, &'a str),
    /// An element of an array.
    Item(&'a At<'a>, usize),
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            At::Root => Ok(()),
            At::Item(above, index) => write!(f, "{above}[{index}]"),
            At::Field(above, name) => {
                let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
                match above {
                    _ if name.is_empty() || !name.chars().all(plain) => {
                        write!(f, "{above}[{}]", shown(&Value::from(name)))
                    }
                    At::Root => f.write_str(name),
                    _ => write!(f, "{above}.{name}"),
                }
            }
        }
    }
}

impl At<'_> {
    /// What is wrong here.
    pub(super) fn error(&self, reason: impl Into<String>) -> FieldError {
        FieldError { path: self.to_string(), reason: reason.into() }
    }
}

/// A value for one line of an error: compact JSON, cut when it is long, nothing in it that a terminal obeys.
pub(super) fn shown(value: &Value) -> String {
    let mut start = Start(Vec::new());
    // That it is longer is no error.
    drop(serde_json::to_writer(&mut start, value));
    let text = String::from_utf8_lossy(&start.0);
    let cut = match text.char_indices().nth(72) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.into_owned(),
    };
    crate::log::printable(&cut).into_owned()
}

/// Takes the beginning of what is written, and no more: a text of megabytes is not copied to be cut.
struct Start(Vec<u8>);

impl std::io::Write for Start {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = 512usize.saturating_sub(self.0.len()).min(bytes.len());
        self.0.extend_from_slice(&bytes[..room]);
        Ok(room)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Takes the elements of one top-level array as they are read, with their index.
pub(super) type Sink<'a> = (&'a str, &'a mut dyn FnMut(usize, Value));

/// Reads a document, `level` being what it should be. Refused: what is no JSON, cut off, beyond the bounds of
/// [`limits`], or has a key twice in one object.
/// With a `sink`, the elements of the top-level array of that name go there one by one and are left out of
/// the result, so that a large document is never held as one tree.
pub(super) fn read(bytes: &[u8], level: Level, sink: Option<Sink<'_>>) -> Result<Value, FieldError> {
    let whole = |reason: String| FieldError { path: String::new(), reason };
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(whole("empty: there is nothing to read".into()));
    }
    limits::check(bytes, level)?;
    let reading = Reading { failed: RefCell::new(None), sink: sink.map(RefCell::new) };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let read = Node { at: At::Root, reading: &reading }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value));
    match (read, reading.failed.into_inner()) {
        (Ok(value), _) => Ok(value),
        (Err(_), Some(failed)) => Err(failed),
        (Err(e), None) if e.is_eof() => {
            Err(whole(format!("cut off: it ends at line {} column {} in the middle", e.line(), e.column())))
        }
        (Err(e), None) => Err(whole(format!("not JSON: {e}"))),
    }
}

struct Reading<'s> {
    failed: RefCell<Option<FieldError>>,
    sink: Option<RefCell<Sink<'s>>>,
}

struct Node<'a, 'r, 's> {
    at: At<'a>,
    reading: &'r Reading<'s>,
}

impl<'de> DeserializeSeed<'de> for Node<'_, '_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_, '_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::from(v))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let reading = self.reading;
        let sink = match (self.at, &reading.sink) {
            (At::Field(At::Root, name), Some(sink)) if name == sink.borrow().0 => Some(sink),
            _ => None,
        };
        let mut items = Vec::new();
        let mut index = 0;
        while let Some(item) = seq.next_element_seed(Node { at: At::Item(&self.at, index), reading })? {
            match sink {
                Some(sink) => (sink.borrow_mut().1)(index, item),
                None => items.push(item),
            }
            index += 1;
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let at = At::Field(&self.at, &key);
            if fields.contains_key(&key) {
                *self.reading.failed.borrow_mut() = Some(at.error("stands twice in its object; keep one"));
                return Err(de::Error::custom("duplicate key"));
            }
            let value = map.next_value_seed(Node { at, reading: self.reading })?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

/// Lays JSON out for people (two spaces, one field a line) without changing a token or the order of anything.
/// `bytes` must be JSON.
pub fn pretty(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 4 + 1);
    let mut depth = 0usize;
    let mut at = 0;
    let newline = |out: &mut Vec<u8>, depth: usize| {
        out.push(b'\n');
        out.resize(out.len() + 2 * depth, b' ');
    };
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' => at += 1,
            b'"' => {
                let end = string_end(bytes, at);
                out.extend_from_slice(&bytes[at..end]);
                at = end;
            }
            b'{' | b'[' => {
                out.push(byte);
                at = space_end(bytes, at + 1);
                match bytes.get(at) {
                    Some(&close @ (b'}' | b']')) => {
                        out.push(close);
                        at += 1;
                    }
                    _ => {
                        depth += 1;
                        newline(&mut out, depth);
                    }
                }
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                newline(&mut out, depth);
                out.push(byte);
                at += 1;
            }
            b',' => {
                out.push(byte);
                newline(&mut out, depth);
                at += 1;
            }
            b':' => {
                out.extend_from_slice(b": ");
                at += 1;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    out.push(b'\n');
    out
}

/// The elements of the top-level array `name`, each as the bytes it is written with. `bytes` must be JSON.
pub fn elements<'a>(bytes: &'a [u8], name: &str) -> Vec<&'a [u8]> {
    let mut found = Vec::new();
    // Written with or without escapes.
    let is = |key: &[u8]| serde_json::from_slice::<String>(key).is_ok_and(|key| key == name);
    members(bytes, 0..bytes.len(), |key, value| {
        if key.is_some_and(is) && bytes.get(value.start) == Some(&b'[') {
            members(bytes, value, |_, element| found.push(&bytes[element]));
        }
    });
    found
}

/// Walks the members of the object or the elements of the array that begins in `range`.
fn members<'a>(bytes: &'a [u8], range: Range<usize>, mut each: impl FnMut(Option<&'a [u8]>, Range<usize>)) {
    let mut at = space_end(bytes, range.start);
    let object = match bytes.get(at) {
        Some(b'{') => true,
        Some(b'[') => false,
        _ => return,
    };
    loop {
        at = space_end(bytes, at + 1);
        if at >= range.end || matches!(bytes[at], b'}' | b']') {
            return;
        }
        let mut key = None;
        if object {
            let end = string_end(bytes, at);
            key = Some(&bytes[at..end]);
            at = space_end(bytes, space_end(bytes, end) + 1);
        }
        let end = value_end(bytes, at);
        each(key, at..end);
        at = space_end(bytes, end);
        if bytes.get(at) != Some(&b',') {
            return;
        }
    }
}

fn space_end(bytes: &[u8], from: usize) -> usize {
    let rest = bytes.get(from..).unwrap_or_default();
    from + rest.iter().position(|b| !b.is_ascii_whitespace()).unwrap_or(rest.len())
}

fn value_end(bytes: &[u8], from: usize) -> usize {
    let mut depth = 0usize;
    let mut at = from;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => at = string_end(bytes, at) - 1,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => depth -= 1,
            b'}' | b']' | b',' if depth == 0 => return at,
            _ if byte.is_ascii_whitespace() && depth == 0 => return at,
            _ => {}
        }
        at += 1;
        if depth == 0 && matches!(byte, b'"' | b'}' | b']') {
            return at;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_document_says_how() {
        for (bytes, reason) in [
            (&b""[..], "empty"),
            (b" \n", "empty"),
            (b"{\"a\": [1, ", "cut off: it ends at line 1"),
            (b"{\"a\": \"x", "cut off"),
            (b"hello", "not JSON"),
            (b"{} {}", "not JSON: trailing characters"),
            (b"{\"a\": \"\xff\"}", "not JSON"),
            (b"\0", "not JSON"),
        ] {
            let e = read(bytes, Level::Manifest, None).unwrap_err();
            assert!(e.path.is_empty() && e.reason.starts_with(reason), "{bytes:?}: {e}");
        }
        let deep = [vec![b'['; 10_000], vec![b']'; 10_000]].concat();
        assert!(read(&deep, Level::Manifest, None).unwrap_err().reason.contains("32 levels deep"));
    }

    #[test]
    fn a_key_that_stands_twice_is_named_with_its_path() {
        let e = read(br#"{"services": [{}, {"http": {"a b": 1, "a b": 2}}]}"#, Level::Manifest, None)
            .unwrap_err();
        assert_eq!(e.to_string(), "services[1].http[\"a b\"]: stands twice in its object; keep one");
    }

    #[test]
    fn reading_gives_what_serde_json_gives() {
        let text =
            r#"{"a": [1, -2, 1.5, true, null, "x\u00e9\n"], "b": {"c": {}}, "d": 18446744073709551615}"#;
        let expected: Value = serde_json::from_str(text).unwrap();
        assert_eq!(read(text.as_bytes(), Level::Manifest, None).unwrap(), expected);
        let mut taken = Vec::new();
        let rest =
            read(text.as_bytes(), Level::Manifest, Some(("a", &mut |i, v| taken.push((i, v))))).unwrap();
        assert_eq!(taken.len(), 6);
        assert_eq!(rest["a"], Value::Array(Vec::new()));
    }

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
