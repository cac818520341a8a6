//! Takes the values of a service's secrets out of lines that it printed. It errs on the side of hiding: what looks like a
//! value, or like a part of one, is hidden, also where it was meant otherwise. What it cannot know, such as a value that
//! a program has encoded in a way of its own, it does not hide.

use super::{FileFormat, MAX_FILE, SecretFile, environment};
use crate::percent;
use crate::systemd::CUT;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::BTreeSet;
use std::io::{self, Read};

/// What stands in a value's place.
const HIDDEN: &str = "***";

/// A value with fewer characters than these is hidden only where it stands alone: everywhere, it would leave nothing of any
/// text.
const SHORT: usize = 4;

/// What is hidden.
#[derive(Debug, Default)]
pub struct Mask {
    /// Longest first, so that a value within another leaves nothing of that.
    values: Vec<String>,
}

impl Mask {
    /// Of the values in these files. One that cannot be read is an error: without it nothing is safe to be shown.
    pub fn of(files: &[SecretFile]) -> io::Result<Self> {
        let mut values = Vec::new();
        for file in files {
            let mut bytes = Vec::new();
            fs_err::File::open(&file.path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
            match file.form {
                FileFormat::Environment => {
                    values.extend(environment::values(&bytes));
                    // What systemd drops or reads otherwise may have been a value before, or will be one.
                    let text = String::from_utf8_lossy(&bytes);
                    let written = text.lines().filter_map(|line| Some(line.split_once('=')?.1.trim()));
                    values.extend(written.map(|value| value.trim_matches(['"', '\'']).to_string()));
                }
                FileFormat::Bytes => values.push(String::from_utf8_lossy(&bytes).into_owned()),
            }
        }
        Ok(Self::from_values(&values))
    }

    fn from_values(values: &[String]) -> Self {
        let mut all = BTreeSet::new();
        for value in values {
            parts(value, &mut all);
        }
        let mut values: Vec<String> = all.into_iter().collect();
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        Mask { values }
    }

    /// A line without them.
    pub fn hide(&self, line: &str) -> String {
        let mut line = line.to_string();
        for value in &self.values {
            if !line.contains(value.as_str()) {
                continue;
            }
            line = match value.chars().count() < SHORT {
                true => alone(&line, value),
                false => line.replace(value.as_str(), HIDDEN),
            };
        }
        self.without_beginning(line)
    }

    /// A line that was cut may end with the beginning of a value.
    fn without_beginning(&self, line: String) -> String {
        let Some(rest) = line.strip_suffix(CUT) else { return line };
        let long = self.values.iter().filter(|value| value.chars().count() >= SHORT);
        let beginnings = long.filter_map(|value| {
            let ends = value.char_indices().map(|(at, _)| at).take_while(|at| *at <= rest.len());
            ends.filter(|at| *at > 0 && rest.ends_with(&value[..*at])).last()
        });
        match beginnings.max() {
            Some(length) => format!("{}{HIDDEN}{CUT}", &rest[..rest.len() - length]),
            None => line,
        }
    }
}

/// What of a value is hidden: each of its lines as it is and as programs write it in URLs, JSON and base64, the password of
/// a URL, what stands after a '=', and the texts in a JSON document.
fn parts(value: &str, all: &mut BTreeSet<String>) {
    let whole = value.trim();
    if whole.is_empty() {
        return;
    }
    all.insert(STANDARD.encode(value));
    all.insert(STANDARD.encode(whole));
    if let Ok(document) = serde_json::from_str::<serde_json::Value>(whole) {
        texts(&document, all);
    }
    for line in whole.lines().map(str::trim).filter(|line| !line.is_empty()) {
        forms(line, all);
        let password =
            line.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@')).map(|(user, _)| user);
        let after_equals =
            line.split([' ', '\t', ',', ';', '&']).filter_map(|word| Some(word.split_once('=')?.1));
        let password = password.and_then(|user| Some(user.split_once(':')?.1));
        for part in password.into_iter().chain(after_equals).filter(|part| part.chars().count() >= SHORT) {
            forms(part, all);
        }
    }
}

fn texts(document: &serde_json::Value, all: &mut BTreeSet<String>) {
    match document {
        serde_json::Value::String(text) => {
            text.lines().filter(|line| !line.trim().is_empty()).for_each(|line| forms(line.trim(), all))
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| texts(item, all)),
        serde_json::Value::Object(members) => members.values().for_each(|member| texts(member, all)),
        _ => {}
    }
}

fn forms(text: &str, all: &mut BTreeSet<String>) {
    all.insert(text.to_string());
    all.insert(percent::encode(text, ""));
    let quoted = serde_json::Value::from(text).to_string();
    all.insert(quoted[1..quoted.len() - 1].to_string());
}

/// A line with a word hidden where no letter or digit is beside it.
fn alone(line: &str, word: &str) -> String {
    let (mut out, mut rest) = (String::new(), line);
    while let Some(at) = rest.find(word) {
        let (before, after) = (&rest[..at], &rest[at + word.len()..]);
        let beside = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        let last = before.chars().next_back().or_else(|| out.chars().next_back());
        out.push_str(before);
        out.push_str(if beside(last) || beside(after.chars().next()) { word } else { HIDDEN });
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_is_left_in_a_line_however_it_was_written() {
        let file = br#"PASSWORD=hunter2&x
DATABASE='postgres://app:tr0ub4dor@db.example.com/app'
DSN="host=db password=corr3ct"
KEY="-----BEGIN KEY-----
c2VjcmV0LW9uZQ==
-----END KEY-----"
PIN=17
"#;
        let mask = Mask::from_values(&environment::values(file));
        for (line, want) in [
            ("cannot log in with hunter2&x", "cannot log in with ***"),
            ("GET /?p=hunter2%26x", "GET /?p=***"),
            ("Basic aHVudGVyMiZ4", "Basic ***"),
            ("no postgres://app:tr0ub4dor@db.example.com/app", "no ***"),
            ("password tr0ub4dor is wrong", "password *** is wrong"),
            ("corr3ct is wrong", "*** is wrong"),
            ("key c2VjcmV0LW9uZQ== is short", "key *** is short"),
            ("pin 17 of 2017, (17)", "pin *** of 2017, (***)"),
            ("nothing to hide", "nothing to hide"),
        ] {
            assert_eq!(mask.hide(line), want);
        }
        for (line, want) in [
            ("cannot log in with hunter2…", "cannot log in with ***…"),
            ("cannot log in with hunt…", "cannot log in with ***…"),
            ("postgres://app:tr0ub4…", "***…"),
            ("password corr…", "password ***…"),
            ("nothing of it: zzz…", "nothing of it: zzz…"),
        ] {
            assert_eq!(mask.hide(line), want);
        }
        let json = Mask::from_values(&[r#"{"token": "s3cr\"et", "list": ["t0ken"]}"#.to_string()]);
        assert_eq!(json.hide(r#"s3cr"et and s3cr\"et and t0ken"#), "*** and *** and ***");
    }

    #[test]
    fn a_file_that_cannot_be_read_hides_everything() {
        let file = SecretFile { path: "/nonexistent/x.env".into(), form: FileFormat::Environment };
        assert!(Mask::of(&[file]).is_err());
        assert_eq!(Mask::of(&[]).unwrap().hide("as it is"), "as it is");
    }
}
