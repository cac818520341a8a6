//! A reader of units of its own, written from systemd's manuals (systemd.syntax(7), systemd.unit(5),
//! systemd.service(5), systemd.exec(5)) and from what systemd 252 does, without a look at the renderer. It knows
//! as much as is needed to say what a directive means, and refuses what systemd would refuse or expand.

/// A directive: its section, its name, and its value as it is written, lines joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directive {
    /// `Service`.
    pub section: String,
    /// `ExecStart`.
    pub name: String,
    /// What follows the `=`.
    pub value: String,
}

type Read<T> = Result<T, String>;

/// The longest line systemd reads (LONG_LINE_MAX).
const LONGEST_LINE: usize = 1 << 20;

/// The directives of a unit in their order.
pub fn directives(text: &str) -> Read<Vec<Directive>> {
    let mut section = String::new();
    let mut found = Vec::new();
    let mut joined: Option<String> = None;
    for line in text.split('\n') {
        if line.len() >= LONGEST_LINE {
            return Err("a line is too long".into());
        }
        if let Some(c) = line.chars().find(|c| is_noncharacter(*c) || *c == '\0') {
            return Err(format!("systemd takes {c:?} for a mistake in the encoding"));
        }
        let line = line.trim_start_matches(WHITE);
        if line.starts_with(['#', ';']) || (line.is_empty() && joined.is_none()) {
            continue;
        }
        let mut whole = match joined.take() {
            Some(before) => before + line,
            None => line.to_string(),
        };
        let backslashes = whole.len() - whole.trim_end_matches('\\').len();
        if backslashes % 2 == 1 {
            whole.pop();
            joined = Some(whole + " ");
            continue;
        }
        let whole = whole.trim_matches(WHITE);
        if let Some(name) = whole.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.to_string();
        } else if let Some((name, value)) = whole.split_once('=') {
            found.push(Directive {
                section: section.clone(),
                name: name.trim_matches(WHITE).to_string(),
                value: value.trim_matches(WHITE).to_string(),
            });
        } else {
            return Err(format!("the line {whole:?} is no directive"));
        }
    }
    match joined {
        Some(_) => Err("it ends in the middle of a line".into()),
        None => Ok(found),
    }
}

const WHITE: [char; 4] = [' ', '\t', '\n', '\r'];

/// Code points that are for no text; systemd takes them for broken UTF-8.
fn is_noncharacter(c: char) -> bool {
    let c = c as u32;
    (0xfdd0..=0xfdef).contains(&c) || c & 0xfffe == 0xfffe
}

/// Splits a value into words, with quotes and C escapes undone ("QUOTING" in systemd.syntax(7)).
pub fn words(value: &str) -> Read<Vec<String>> {
    Ok(split(value)?.into_iter().map(|(word, _)| word).collect())
}

/// As [`words`], each with whether it is written as it is, without quotes or escapes.
fn split(value: &str) -> Read<Vec<(String, bool)>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut bare = true;
    let mut quote = None;
    let mut rest = value.chars();
    while let Some(c) = rest.next() {
        match (c, quote) {
            (' ' | '\t' | '\n' | '\r', None) => {
                words.extend(word.take().map(|w| (w, bare)));
                bare = true;
            }
            ('"' | '\'', None) => {
                quote = Some(c);
                bare = false;
                word.get_or_insert_default();
            }
            (c, Some(open)) if c == open => quote = None,
            ('\\', _) => {
                let (bytes, after) = escape(rest.as_str())?;
                bare = false;
                word.get_or_insert_default().extend(bytes);
                rest = after.chars();
            }
            (c, _) => {
                let mut buffer = [0; 4];
                word.get_or_insert_default().extend(c.encode_utf8(&mut buffer).as_bytes());
            }
        }
    }
    if quote.is_some() {
        return Err("a quote is never closed".into());
    }
    words.extend(word.map(|w| (w, bare)));
    words
        .into_iter()
        .map(|(bytes, bare)| match String::from_utf8(bytes) {
            Ok(word) => Ok((word, bare)),
            Err(_) => Err("escapes that are no UTF-8".to_string()),
        })
        .collect()
}

/// What stands for the characters after a backslash, and what follows them.
fn escape(text: &str) -> Read<(Vec<u8>, &str)> {
    let kind = text.chars().next().ok_or("a backslash at the end")?;
    let after = &text[kind.len_utf8()..];
    let number = |from: &str, digits: usize, radix: u32| -> Read<u32> {
        let digits = from.get(..digits).filter(|d| d.chars().all(|c| c.is_digit(radix)));
        let number = digits.and_then(|d| u32::from_str_radix(d, radix).ok());
        number.filter(|n| *n != 0).ok_or_else(|| format!("no escape: \\{text:.10}"))
    };
    let character = |code: u32| -> Read<Vec<u8>> {
        Ok(char::from_u32(code).ok_or("an escape that is no character")?.to_string().into_bytes())
    };
    Ok(match kind {
        'a' => (vec![7], after),
        'b' => (vec![8], after),
        'f' => (vec![12], after),
        'n' => (vec![10], after),
        'r' => (vec![13], after),
        't' => (vec![9], after),
        'v' => (vec![11], after),
        's' => (vec![b' '], after),
        '\\' | '"' | '\'' => (vec![kind as u8], after),
        'x' => (vec![number(after, 2, 16)? as u8], &after[2..]),
        'u' => (character(number(after, 4, 16)?)?, &after[4..]),
        'U' => (character(number(after, 8, 16)?)?, &after[8..]),
        '0'..='7' => {
            let code = number(text, 3, 8)?;
            (vec![u8::try_from(code).map_err(|_| "an octal escape above 255")?], &text[3..])
        }
        _ => return Err(format!("no escape: \\{kind}")),
    })
}

/// Undoes `%%`; any other `%` would be expanded ("SPECIFIERS" in systemd.unit(5)).
pub fn specifiers(word: &str) -> Read<String> {
    doubled(word, '%')
}

/// Undoes `$$`; any other `$` would be a variable ("COMMAND LINES" in systemd.service(5)).
pub fn variables(word: &str) -> Read<String> {
    doubled(word, '$')
}

fn doubled(word: &str, special: char) -> Read<String> {
    let mut out = String::with_capacity(word.len());
    let mut rest = word.chars();
    while let Some(c) = rest.next() {
        if c == special && rest.next() != Some(special) {
            return Err(format!("a single {special} in {word:?}"));
        }
        out.push(c);
    }
    Ok(out)
}

/// The words of `ExecStart=` as the program gets them: the first is the file that is executed.
pub fn command_line(value: &str) -> Read<Vec<String>> {
    let split = split(value)?;
    if split.iter().any(|(word, bare)| *bare && word == ";") {
        return Err("a ; between two commands".into());
    }
    let mut words: Vec<String> = split.iter().map(|(w, _)| specifiers(w)).collect::<Read<_>>()?;
    let program = words.first().ok_or("no program")?;
    // No prefix ('@', '-', ':', '+', '!', '|'), and nothing of it is a variable: systemd executes it as it is.
    absolute(program)?;
    if matches!(program.rsplit('/').next(), Some("" | ".")) {
        return Err(format!("{program:?} is a folder"));
    }
    if let Some(c) = program.chars().find(|c| matches!(c, '"' | '\'' | '\\' | '$' | '\u{7f}') || *c < ' ') {
        return Err(format!("systemd takes no program with {c:?} in its path"));
    }
    for word in &mut words[1..] {
        *word = variables(word)?;
    }
    Ok(words)
}

/// A path as systemd takes one: absolute, no part of it longer than a file's name can be.
pub fn absolute(path: &str) -> Read<()> {
    if !path.starts_with('/') {
        return Err(format!("{path:?} is not absolute"));
    }
    parts(path)
}

/// A path below one of systemd's own folders (`StateDirectory=`).
pub fn below(path: &str) -> Read<()> {
    if path.starts_with('/') || path.contains(':') {
        return Err(format!("{path:?} is no folder below another"));
    }
    if path.split('/').find(|part| !part.is_empty() && *part != ".") == Some("private") {
        return Err("systemd keeps 'private' for itself".into());
    }
    parts(path)
}

fn parts(path: &str) -> Read<()> {
    if path.len() >= 4096 || path.split('/').any(|part| part.len() > 255 || part == "..") {
        return Err(format!("{path:.40?}… has a part that cannot be"));
    }
    Ok(())
}

/// A share in hundredths of a percent, as systemd reads `50%`: a zero in front makes it octal.
pub fn share(value: &str) -> Read<u64> {
    let number = value.strip_suffix('%').ok_or("no %")?;
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    if whole.len() > 1 && whole.starts_with('0') {
        return Err(format!("{value} is octal"));
    }
    let whole: u64 = whole.parse().map_err(|_| "no number")?;
    let part: u64 = match part.len() {
        1 => part.parse::<u64>().map_err(|_| "no number")? * 10,
        2 => part.parse().map_err(|_| "no number")?,
        _ => return Err("too many places".into()),
    };
    Ok(whole * 100 + part)
}

/// An amount of memory in bytes, as systemd reads `1.5G`; None is no limit.
pub fn bytes(value: &str) -> Read<Option<u64>> {
    if value == "infinity" {
        return Ok(None);
    }
    let shift = match value.chars().last() {
        Some('K') => 10,
        Some('M') => 20,
        Some('G') => 30,
        Some('T') => 40,
        _ => 0,
    };
    let number = value.strip_suffix(['K', 'M', 'G', 'T']).unwrap_or(value);
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().map_err(|_| "no number")?;
    let scale = 10u64.pow(part.len() as u32);
    let part: u64 = if part.is_empty() { 0 } else { part.parse().map_err(|_| "no number")? };
    let whole = whole.checked_mul(1 << shift).ok_or("too large")?;
    Ok(Some(whole + ((part << shift) / scale)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_systemds_manuals_read_as_they_say() {
        // systemd.syntax(7), and systemd.service(5), "COMMAND LINES".
        let text = "[Section A]\nKeyOne=value 1\nKeyTwo=value 2\n\n# a comment\n\n[Section B]\n\
                    Setting=\"something\" \"some thing\" \"…\"\nKeyTwo=value 2 \\\n       value 2 continued\n\n\
                    [Section C]\nKeyThree=value 3\\\n# this line is ignored\n; this line is ignored too\n       value 3 continued\n";
        let read = directives(text).unwrap();
        let values: Vec<(&str, &str)> = read.iter().map(|d| (d.section.as_str(), d.value.as_str())).collect();
        assert_eq!(
            values,
            [
                ("Section A", "value 1"),
                ("Section A", "value 2"),
                ("Section B", "\"something\" \"some thing\" \"…\""),
                ("Section B", "value 2  value 2 continued"),
                ("Section C", "value 3 value 3 continued"),
            ]
        );
        assert_eq!(words(&read[2].value).unwrap(), ["something", "some thing", "…"]);
        assert_eq!(
            words(r#"a "b \"c\"" 'd e' f\x20g \u00e9 \101 \s"#).unwrap(),
            ["a", "b \"c\"", "d e", "f g", "é", "A", " "]
        );
        for bad in ["\"a", "a\\", "\\q", "\\x4", "\\000", "'a"] {
            assert!(words(bad).is_err(), "{bad}");
        }
        assert_eq!(command_line("/bin/echo \"$$HOME\" 100%%").unwrap(), ["/bin/echo", "$HOME", "100%"]);
        for bad in
            ["/bin/echo $HOME", "/bin/echo %n", "-/bin/echo", "echo", "/bin/a ; /bin/b", "/bin/a\\x24b", ""]
        {
            assert!(command_line(bad).is_err(), "{bad}");
        }
        assert!(directives("[Service]\nEnvironment=A=\u{fffe}\n").is_err());
        assert!(directives("[Service]\nA=b\\").is_err());
        assert_eq!((share("0.5%"), share("150%")), (Ok(50), Ok(15000)));
        assert!(share("010%").is_err());
        assert_eq!((bytes("1.5K"), bytes("infinity"), bytes("7")), (Ok(Some(1536)), Ok(None), Ok(Some(7))));
    }
}
