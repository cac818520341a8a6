//! Percent-encoding (RFC 3986, 2.1).

/// Encodes all but the unreserved characters of RFC 3986 (letters, digits, `-`, `.`, `_`, `~`) and those of `plain`.
pub fn encode(text: &str, plain: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) || plain.as_bytes().contains(&b) {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

/// Decodes `%XX`; the error is the reason.
pub fn decode(text: &str) -> Result<String, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| (b as char).to_digit(16));
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
            _ => return Err("has a '%' that is not followed by two hexadecimal digits".into()),
        }
    }
    String::from_utf8(out).map_err(|_| "is not UTF-8 after decoding".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_and_what_is_plain_stays() {
        assert_eq!(encode("/a b/ü#?&c", "/"), "/a%20b/%C3%BC%23%3F%26c");
        assert_eq!(encode("a/b~", ""), "a%2Fb~");
        assert_eq!(decode("/a%20b/%c3%BC"), Ok("/a b/ü".into()));
        for wrong in ["%", "%2", "%zz", "%ff"] {
            assert!(decode(wrong).is_err(), "{wrong}");
        }
    }
}
