//! The little XML that S3 answers with: elements and text. It reads whole documents or none; attributes are
//! skipped, and anything that S3 does not send (a document type, unknown entities) is refused.

/// Calls `leaf` with the path and the text of every element without elements in it. The error says what the
/// document is instead of well-formed.
pub fn leaves(text: &str, mut leaf: impl FnMut(&[&str], String)) -> Result<(), String> {
    let mut open: Vec<&str> = Vec::new();
    let mut content = String::new();
    // Whether the element that closes next is a leaf.
    let mut bare = false;
    let mut seen = false;
    let mut rest = text.trim_start_matches('\u{feff}');
    while let Some(at) = rest.find('<') {
        let before = unescape(&rest[..at])?;
        if open.is_empty() && !before.trim().is_empty() {
            return Err("text around a document".into());
        }
        content.push_str(&before);
        rest = &rest[at + 1..];
        let (skip, end) = match rest {
            r if r.starts_with("!--") => (true, "-->"),
            r if r.starts_with("![CDATA[") => (true, "]]>"),
            r if r.starts_with('?') => (true, "?>"),
            r if r.starts_with('!') => return Err("a web page or other document".into()),
            _ => (false, ">"),
        };
        let length = rest.find(end).ok_or("a document that is cut short")?;
        let tag = &rest[..length];
        rest = &rest[length + end.len()..];
        if skip {
            if let Some(data) = tag.strip_prefix("![CDATA[") {
                content.push_str(data);
            }
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            if open.last() != Some(&name.trim_end()) {
                return Err("a document whose elements do not nest".into());
            }
            if bare {
                leaf(&open, std::mem::take(&mut content));
            }
            open.pop();
            bare = false;
            continue;
        }
        if open.is_empty() && seen {
            return Err("several documents".into());
        }
        seen = true;
        let empty = tag.ends_with('/');
        let name = tag.trim_end_matches('/').split_whitespace().next().unwrap_or_default();
        if name.is_empty() || name.contains('<') || open.len() > 16 {
            return Err("a document with an odd element".into());
        }
        open.push(name);
        content.clear();
        bare = true;
        if empty {
            leaf(&open, String::new());
            open.pop();
            bare = false;
        }
    }
    match (seen && open.is_empty(), rest.trim().is_empty()) {
        (true, true) => Ok(()),
        (true, false) => Err("text around a document".into()),
        (false, _) if seen => Err("a document that is cut short".into()),
        (false, _) => Err("no XML".into()),
    }
}

fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        let end = rest[at..].find(';').ok_or("a document with a stray '&'")?;
        let entity = &rest[at + 1..at + end];
        let number = entity.strip_prefix('#').and_then(|digits| match digits.strip_prefix('x') {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => digits.parse().ok(),
        });
        out.push(match (entity, number.and_then(char::from_u32)) {
            (_, Some(c)) => c,
            ("amp", _) => '&',
            ("lt", _) => '<',
            ("gt", _) => '>',
            ("quot", _) => '"',
            ("apos", _) => '\'',
            _ => return Err("a document with an unknown entity".into()),
        });
        rest = &rest[at + end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(String, String)>, String> {
        let mut found = Vec::new();
        leaves(text, |path, text| found.push((path.join("/"), text)))?;
        Ok(found)
    }

    #[test]
    fn leaves_come_with_their_paths_and_their_text_unescaped() {
        let text = "<?xml version=\"1.0\"?>\n<A xmlns=\"http://x/\">\n <B><C>1 &lt;&#x32;&amp;&#51;</C><D/></B>\
                    <!-- <E>no</E> --><E><![CDATA[<raw>]]></E><F></F></A>\n";
        let found: Vec<(String, String)> =
            [("A/B/C", "1 <2&3"), ("A/B/D", ""), ("A/E", "<raw>"), ("A/F", "")]
                .map(|(p, t)| (p.to_string(), t.to_string()))
                .to_vec();
        assert_eq!(read(text), Ok(found));
    }

    #[test]
    fn what_is_not_whole_and_well_formed_is_refused() {
        for bad in [
            "",
            "text",
            "<A>",
            "<A><B></A></B>",
            "<A/><B/>",
            "<A/>x",
            "x<A/>",
            "<A>&nope;</A>",
            "<A>& </A>",
            "<A><!-- </A>",
            "<!DOCTYPE html><html><body><h1>Welcome & log in<br></body>",
            "<A><B",
            "</A>",
            "<>x</>",
            "<A<>x</A<>",
        ] {
            assert!(read(bad).is_err(), "{bad:?} passed");
        }
        let whole = "<A><B>1</B><C x=\"y\">&amp;</C></A>";
        assert!(read(whole).is_ok());
        for cut in 1..whole.len() {
            assert!(read(&whole[..cut]).is_err(), "{:?} passed", &whole[..cut]);
        }
    }
}
