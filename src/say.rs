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

/// The text with every control character (but none of the printable ones) written as an escape.
pub fn printable(text: &str) -> Cow<'_, str> {
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(odd) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if odd(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
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
    use super::printable;

    #[test]
    fn terminal_controls_are_shown_not_sent() {
        assert_eq!(printable("plain ü"), "plain ü");
        assert_eq!(printable("a\x1b[2Jb\u{202e}\r"), "a\\u{1b}[2Jb\\u{202e}\\r");
    }
}
