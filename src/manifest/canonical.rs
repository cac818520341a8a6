//! The canonical form of a JSON document, written as the document is read: no tree of it is ever held, so that who
//! signs nothing costs no more than the bytes he sent, twice. Which document that is, and what is left out of it, is
//! [`super::signature`]'s.

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

/// The form: members sorted by the bytes of their names, no white space, texts escaped as little as JSON allows,
/// numbers as they are read. `without` are members of the document itself that are left out.
pub(super) fn object(bytes: &[u8], without: &[&str]) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let form = CanonicalWriter { out: &mut out, without };
    form.deserialize(&mut deserializer).and_then(|()| deserializer.end()).map_err(|e| match e.is_data() {
        true => e.to_string(),
        false => format!("not JSON: {e}"),
    })?;
    match out.first() {
        Some(b'{') => Ok(out),
        _ => Err("it is not a JSON object".into()),
    }
}

struct CanonicalWriter<'a> {
    out: &'a mut Vec<u8>,
    without: &'a [&'a str],
}

impl CanonicalWriter<'_> {
    fn put<E: de::Error>(self, value: &(impl serde::Serialize + ?Sized)) -> Result<(), E> {
        // Into memory, which takes everything.
        serde_json::to_writer(self.out, value).map_err(E::custom)
    }
}

impl<'de> DeserializeSeed<'de> for CanonicalWriter<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for CanonicalWriter<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.put(&())
    }

    fn visit_bool<E: de::Error>(self, v: bool) -> Result<(), E> {
        self.put(&v)
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<(), E> {
        self.put(&v)
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> Result<(), E> {
        self.put(&v)
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<(), E> {
        self.put(&v)
    }

    fn visit_str<E: de::Error>(self, v: &str) -> Result<(), E> {
        self.put(v)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        self.out.push(b'[');
        let first = self.out.len();
        while seq.next_element_seed(CanonicalWriter { out: self.out, without: &[] })?.is_some() {
            self.out.push(b',');
        }
        if self.out.len() > first {
            self.out.pop();
        }
        self.out.push(b']');
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.out.push(b'{');
        let first = self.out.len();
        // Each with where it stands in what was written, its comma included.
        let mut members: Vec<(Cow<'de, str>, std::ops::Range<usize>)> = Vec::new();
        while let Some(Name(name)) = map.next_key()? {
            let start = self.out.len();
            serde_json::to_writer(&mut *self.out, &name).map_err(de::Error::custom)?;
            self.out.push(b':');
            map.next_value_seed(CanonicalWriter { out: self.out, without: &[] })?;
            self.out.push(b',');
            members.push((name, start..self.out.len()));
        }
        let sorted = members.is_sorted_by(|a, b| a.0 < b.0);
        if !sorted || !self.without.is_empty() {
            members.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
            if let Some(twice) = members.windows(2).find(|pair| pair[0].0 == pair[1].0) {
                return Err(de::Error::custom(format!("{:?} is a duplicate in its object", twice[0].0)));
            }
            let mut ordered = Vec::with_capacity(self.out.len() - first);
            for (name, range) in members {
                if !self.without.contains(&&*name) {
                    ordered.extend_from_slice(&self.out[range]);
                }
            }
            self.out.truncate(first);
            self.out.extend_from_slice(&ordered);
        }
        if self.out.len() > first {
            self.out.pop();
        }
        self.out.push(b'}');
        Ok(())
    }
}

/// The name of a member, out of the bytes where it is written without escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn it_is_the_form_that_a_sorted_tree_is_written_in() {
        for text in [
            r#"{}"#,
            r#"{"b":[],"a":{}}"#,
            r#"{"b": [1, -2, 2.5, 1e300, -0, 18446744073709551615, 1e21, true, null], "a": {"z": "\u00e9\u0001\n\/\ud83d\ude00", "B": ""}}"#,
            r#"{"\u0061": 1, "A": 2, "aa": 3, "": {"y": [{"x": 1, "w": [[], {}]}, "s"]}, "é": 0}"#,
        ] {
            let tree: Value = serde_json::from_str(text).unwrap();
            assert_eq!(String::from_utf8(object(text.as_bytes(), &[]).unwrap()).unwrap(), tree.to_string());
        }
        assert_eq!(object(br#"{"s": [1], "t": {"s": 2}}"#, &["s"]).unwrap(), br#"{"t":{"s":2}}"#);
        assert_eq!(object(br#"{"\u0073": 1}"#, &["x", "s"]).unwrap(), b"{}");
    }

    #[test]
    fn what_is_no_object_or_says_a_thing_twice_has_none() {
        for bad in [
            "",
            "[]",
            "1",
            "\"{\"",
            "{",
            "{} 1",
            "{\"a\":1,\"a\":1}",
            "{\"b\":{\"a\":1,\"x\":2,\"\\u0061\":1}}",
            "{\"a\":1e999}",
        ] {
            assert!(object(bad.as_bytes(), &["s"]).is_err(), "{bad}");
        }
    }
}
