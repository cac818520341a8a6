//! What units wrote to the journal of this host.

use crate::runner::Run;
use std::time::Duration;

/// How long journald may take to have read what was written.
const SYNC: Duration = Duration::from_secs(5);

/// How many lines of a unit's are asked for.
const LINES: usize = 10;

fn journalctl() -> Run {
    Run::new("journalctl").args(["--no-pager", "--output=cat", "--quiet"])
}

/// Of which start of a unit the lines are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Began {
    /// Of one that was asked for at this time (microseconds since the Unix epoch). By its invocation a line of a process
    /// that ended at once may not be found: journald looks for that when it reads the line, and may find none any more.
    At(i64),
    /// Of this invocation, which ran before: whenever it began.
    Before(String),
}

/// The last lines that a unit wrote to the journal, and systemd about it, oldest first.
pub fn journal(unit: &str, began: &Began) -> Vec<String> {
    // What was written a moment ago journald may not have read yet: it answers this when it has. A journald that does not
    // gives what it has.
    drop(Run::new("journalctl").arg("--sync").deadline(SYNC).output());
    let run = journalctl().arg(format!("--lines={LINES}")).args(lines_of(unit, began));
    match run.deadline(Duration::from_secs(20)).output() {
        Ok(output) => last(&output.text(), LINES),
        Err(e) => vec![format!("(its journal cannot be read: {e})")],
    }
}

/// How journalctl is asked for them. What systemd says of an invocation is known by who said it: anybody may send
/// journald a line with a field of that name.
fn lines_of(unit: &str, began: &Began) -> Vec<String> {
    match began {
        Began::At(time) => {
            vec![format!("--unit={unit}"), format!("--since=@{}.{:06}", time / 1_000_000, time % 1_000_000)]
        }
        Began::Before(id) => vec![
            format!("_SYSTEMD_INVOCATION_ID={id}"),
            "+".into(),
            format!("INVOCATION_ID={id}"),
            "_PID=1".into(),
        ],
    }
}

/// The last lines of a log: an entry of the journal may have very many.
fn last(log: &str, lines: usize) -> Vec<String> {
    let mut last: Vec<String> = log.lines().rev().take(lines).map(clip).collect();
    last.reverse();
    last
}

/// The last lines that Caddy wrote to the journal, oldest first, whole: they are JSON. None where there is no journal.
pub fn caddy_log() -> Vec<String> {
    let output = journalctl()
        .args(["--unit=caddy.service", "--unit=caddy-api.service", "--since=-2days", "--lines=3000"])
        .deadline(Duration::from_secs(5))
        .output();
    output.map(|output| output.text().lines().map(String::from).collect()).unwrap_or_default()
}

/// The last line a unit wrote to the journal; None where there is none, or where we may not read it.
pub fn last_line(unit: &str) -> Option<String> {
    let output = journalctl()
        .arg("--lines=1")
        // What systemd itself says of the unit says less than the unit did.
        .arg(format!("_SYSTEMD_UNIT={unit}"))
        .deadline(Duration::from_secs(5))
        .output();
    output.ok()?.text().lines().last().map(clip)
}

/// Stands at the end of a line that was cut.
pub const CUT: char = '…';

/// A line of a log, cut where it stops being one.
fn clip(line: &str) -> String {
    match line.char_indices().nth(500) {
        Some((at, _)) => format!("{}{CUT}", &line[..at]),
        None => line.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_those_of_one_start_and_no_more_than_were_asked_for() {
        let began = Began::At(1_795_372_265_000_042);
        assert_eq!(lines_of("ava.service", &began), ["--unit=ava.service", "--since=@1795372265.000042"]);
        let asked = lines_of("ava.service", &Began::Before("0a1b".into())).join(" ");
        assert_eq!(asked, "_SYSTEMD_INVOCATION_ID=0a1b + INVOCATION_ID=0a1b _PID=1");
        assert_eq!(last("one\ntwo\nthree\n", 2), ["two", "three"]);
        assert_eq!(last("\n", 2), [""]);
        assert_eq!(last("", 2), [""; 0]);
        // One entry that is a flood of empty lines, and one without end.
        assert_eq!(last(&format!("{}end", "\n".repeat(1 << 20)), 10).len(), 10);
        assert_eq!(last(&"x".repeat(1 << 20), 10)[0].chars().count(), 501);
    }
}
