//! Command lines of services: words split as a shell splits them, and nothing else a shell does. Never runs
//! anything.

/// Splits a command line into words: blanks separate, `'…'` keeps everything, `"…"` keeps everything but
/// `\"`, `\\`, `` \` `` and `\$`, a backslash keeps the character after it (POSIX shell, 2.2). Variables,
/// patterns, pipes and the like have no meaning. The error is the reason alone.
pub fn split_command(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' => words.extend(word.take()),
            '\'' => {
                let (quoted, after) =
                    chars.as_str().split_once('\'').ok_or("has a ' that is never closed")?;
                word.get_or_insert_default().push_str(quoted);
                chars = after.chars();
            }
            '"' => {
                let into = word.get_or_insert_default();
                loop {
                    let mut next = || chars.next().ok_or("has a \" that is never closed");
                    match next()? {
                        '"' => break,
                        '\\' => match next()? {
                            c @ ('"' | '\\' | '`' | '$') => into.push(c),
                            c => into.extend(['\\', c]),
                        },
                        c => into.push(c),
                    }
                }
            }
            '\\' => {
                let kept = chars.next().ok_or("ends with a backslash that escapes nothing")?;
                word.get_or_insert_default().push(kept);
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

/// The longest command line, in bytes. A unit's line may have a million (LONG_LINE_MAX), and escaped it is up to
/// two and a half times as long; the kernel takes 131,072 for a word (MAX_ARG_STRLEN).
const MAX_BYTES: usize = 100_000;

/// The longest path of an executable below its store path, in bytes: with that it stays below PATH_MAX.
const MAX_PROGRAM: usize = 3800;

/// A command line that can be run; the error is the reason alone.
pub(super) fn line(text: &str) -> Result<String, String> {
    super::rules::clean(text)?;
    super::rules::at_most(MAX_BYTES, "bytes", text)?;
    let words = split_command(text)?;
    let first = words.first().ok_or("has no word; null means <storePath>/bin/<name>")?;
    // systemd refuses such a path, and takes `$` in it neither for a variable nor, escaped, for itself.
    let unusable = first.chars().find(|c| matches!(c, '"' | '\'' | '\\' | '$') || c.is_control());
    if first.is_empty() {
        return Err("has an empty first word; expected the executable".into());
    }
    if first.split('/').any(|part| part == "..") {
        return Err(
            "has '..' in its first word; expected a path below the store path, or an absolute one".into()
        );
    }
    if matches!(first.rsplit('/').next(), Some("" | ".")) {
        return Err("names a folder; expected the executable".into());
    }
    if first.len() > MAX_PROGRAM {
        return Err(format!("has a first word of {} bytes; at most {MAX_PROGRAM} are possible", first.len()));
    }
    if let Some(c) = unusable {
        return Err(format!(
            "has {c:?} in its first word; systemd starts no executable with that in its path"
        ));
    }
    super::rules::named(first)?;
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::parse::{self, Mode};
    use crate::names::StorePath;

    #[test]
    fn words_are_split_as_a_shell_splits_them() {
        for (text, words) in [
            ("", vec![]),
            ("  ", vec![]),
            ("bin/ava", vec!["bin/ava"]),
            (" bin/ava  --port 8080 ", vec!["bin/ava", "--port", "8080"]),
            (r"a\ b c", vec!["a b", "c"]),
            ("a 'b c' d", vec!["a", "b c", "d"]),
            (r#"a "b \"c\" \\ \n $HOME `x`" '\'"#, vec!["a", r#"b "c" \ \n $HOME `x`"#, r"\"]),
            ("a'b'\"c\"d", vec!["abcd"]),
            ("'' \"\"", vec!["", ""]),
            ("$HOME * ; | > & # %i", vec!["$HOME", "*", ";", "|", ">", "&", "#", "%i"]),
            ("ü 'ß'", vec!["ü", "ß"]),
        ] {
            assert_eq!(split_command(text).unwrap(), words, "{text:?}");
        }
        for text in ["'a", "a \"b", "a\\", "\"a\\", "a 'b\" c"] {
            assert!(split_command(text).is_err(), "{text:?} passed");
        }
    }

    #[test]
    fn an_executable_that_systemd_would_not_start_is_refused() {
        let long_name = format!("bin/{}", "n".repeat(256));
        let long_path = "a/".repeat(2000) + "b";
        let long = format!("a {}", "b".repeat(MAX_BYTES));
        for text in [
            r"'bin/a$b'",
            r#"bin/a\"b"#,
            r"bin/a\\b",
            "bin/\'a",
            "bin/.",
            "/.",
            "bin/",
            &long_name,
            &long_path,
            &long,
        ] {
            assert!(line(text).is_err(), "{text:.80} passed");
        }
        for text in ["bin/a%n '$HOME'", "'bin/a b' \"c'd\" e\\\\f", &format!("bin/{}", "n".repeat(255))] {
            assert!(line(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn the_executable_is_below_the_store_path_unless_it_is_absolute() {
        let path = StorePath::parse("/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava").unwrap();
        for (command, program_path, args) in [
            (serde_json::Value::Null, format!("{path}/bin/ava"), vec![]),
            ("bin/serve -v".into(), format!("{path}/bin/serve"), vec!["-v"]),
            ("serve".into(), format!("{path}/serve"), vec![]),
            ("/usr/bin/env 'a b'".into(), "/usr/bin/env".to_string(), vec!["a b"]),
        ] {
            let value = serde_json::json!({"name": "ava", "artifact": {"storePath": path.as_str()},
                "hosts": ["biz"], "exec": {"command": command}});
            let service = parse::service(value, Mode::Strict, None).unwrap();
            let (got, got_args) = service.program(&path);
            assert_eq!(
                (got.to_str().unwrap(), got_args),
                (program_path.as_str(), args.iter().map(|a| a.to_string()).collect())
            );
        }
    }
}
