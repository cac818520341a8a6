//! Lines for people, on stderr. Where that is the journal (systemd.exec(5), `$JOURNAL_STREAM`) every line
//! carries its priority as `<N>` (sd-daemon(3)) and no time, which the journal adds; on a terminal warnings and
//! errors are coloured unless `NO_COLOR` is set. Control characters are shown as escapes, whoever wrote them.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

#[derive(Clone, Copy)]
enum Style {
    Journal,
    Colour,
    Plain,
}

fn style() -> Style {
    static STYLE: OnceLock<Style> = OnceLock::new();
    *STYLE.get_or_init(|| {
        let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
        if fs_err::metadata("/proc/self/fd/2").is_ok_and(|m| stream == format!("{}:{}", m.dev(), m.ino())) {
            Style::Journal
        } else if std::io::stderr().is_terminal() && colour_wanted() {
            Style::Colour
        } else {
            Style::Plain
        }
    })
}

/// Whether colour may be used at all: `NO_COLOR` is unset or empty and the terminal is not a dumb one.
pub fn colour_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
        && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Characters that show as nothing or turn the text around them (Unicode's bidirectional controls, zero-width
/// characters, separators of lines, tags): what a person reads would not be what is there.
pub fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn odd(c: char) -> bool {
    c.is_control() || is_invisible(c)
}

/// JSON as it may be sent to a terminal: what steers one, or shows as nothing, is written as the escapes that JSON
/// has for it, so that whoever parses it finds what was there. Line breaks of the layout stay.
pub fn printable_json(text: &str) -> Cow<'_, str> {
    let odd = |c: char| c != '\n' && odd(c);
    escaped(text, odd, |c| c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect())
}

/// The text with every control character (but none of the printable ones) written as an escape.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, odd, |c| c.escape_default().to_string())
}

fn escaped(text: &str, odd: impl Fn(char) -> bool, escape: impl Fn(char) -> String) -> Cow<'_, str> {
    if !text.contains(&odd) {
        return Cow::Borrowed(text);
    }
    let one = |c: char| if odd(c) { escape(c) } else { c.to_string() };
    Cow::Owned(text.chars().map(one).collect())
}

fn line(priority: u8, colour: &str, text: &dyn Display) {
    let text = text.to_string();
    let mut out = String::new();
    for part in text.split('\n') {
        let part = printable(part);
        match style() {
            Style::Journal => out.push_str(&format!("<{priority}>{part}\n")),
            Style::Colour if !colour.is_empty() => out.push_str(&format!("\x1b[{colour}m{part}\x1b[0m\n")),
            Style::Colour | Style::Plain => out.push_str(&format!("{part}\n")),
        }
    }
    // A closed stderr leaves nobody to tell; the exit code still says it.
    drop(std::io::stderr().write_all(out.as_bytes()));
}

/// Priority 6: what was seen or done.
pub fn info(text: impl Display) {
    line(6, "", &text);
}

/// Priority 5: a change made on purpose.
pub fn notice(text: impl Display) {
    line(5, "1", &text);
}

/// Priority 4: something is off, and the work goes on.
pub fn warning(text: impl Display) {
    line(4, "33", &text);
}

/// Priority 3: something failed.
pub fn error(text: impl Display) {
    line(3, "31", &text);
}

#[cfg(test)]
mod tests {
    use super::{printable, printable_json};

    #[test]
    fn terminal_controls_are_shown_not_sent() {
        assert_eq!(printable("plain ü"), "plain ü");
        assert_eq!(printable("a\x1b[2Jb\u{202e}\r"), "a\\u{1b}[2Jb\\u{202e}\\r");
        assert_eq!(printable("a\u{200b}b\u{2028}\u{e0041}"), "a\\u{200b}b\\u{2028}\\u{e0041}");
    }

    #[test]
    fn json_says_the_same_in_escapes() {
        let text = "{\n  \"a\u{7f}\u{9b}\": \"\u{202e}ü\u{e0041}\"\n}\n";
        let shown = printable_json(text);
        assert_eq!(shown, "{\n  \"a\\u007f\\u009b\": \"\\u202eü\\udb40\\udc41\"\n}\n");
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&shown), value(text));
        assert_eq!(printable_json("{}\n"), "{}\n");
    }
}
