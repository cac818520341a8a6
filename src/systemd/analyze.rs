//! What systemd-analyze says of units: whether they can be loaded, and how much they leave open.

use crate::error::{Error, Result};
use crate::failpoint;
use crate::names::ServiceName;
use crate::runner::{ProcessStatus, Run};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The overall exposure level of a unit, in tenths: 0.0 has nothing to attack, 10.0 everything
/// (systemd-analyze(1), "security").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Exposure(u8);

impl Exposure {
    /// Below this systemd calls a unit safe enough (`OK`), from here on `MEDIUM` and worse.
    pub const MEDIUM: Exposure = Exposure(50);

    /// From a number with at most one digit after the point, as systemd writes it.
    pub fn parse(text: &str) -> Option<Self> {
        Self::try_from(text.parse::<f64>().ok()?).ok()
    }
}

impl TryFrom<f64> for Exposure {
    type Error = String;

    fn try_from(level: f64) -> Result<Self, String> {
        // Rounded, and within the range: the cast loses nothing.
        let exposure = (0.0..=10.0).contains(&level).then(|| Exposure((level * 10.0).round() as u8));
        exposure.ok_or_else(|| format!("{level} is not a valid exposure; expected 0.0 to 10.0"))
    }
}

impl From<Exposure> for f64 {
    fn from(exposure: Exposure) -> f64 {
        f64::from(exposure.0) / 10.0
    }
}

impl fmt::Display for Exposure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 10, self.0 % 10)
    }
}

/// What `systemd-analyze verify` has to say of unit texts: the complaint per service; none is good.
/// Its exit status does not tell (it is 0 also for lines that systemd ignores), its output does.
/// The units are put below `scratch` for it.
pub fn verify(units: &[(ServiceName, String)], scratch: &Path) -> Result<BTreeMap<ServiceName, String>> {
    let mut complaints = BTreeMap::new();
    if units.is_empty() {
        return Ok(complaints);
    }
    let dir = crate::durable::scratch(scratch)?;
    let _effect = failpoint::mark("verify below", scratch.display());
    let file = |name: &ServiceName| dir.path().join(name.unit());
    for (name, text) in units {
        // Gone in a moment: nothing that the disk would have to hear of.
        fs_err::write(file(name), text)?;
    }
    let all: Vec<PathBuf> = units.iter().map(|(name, _)| file(name)).collect();
    if analyze(&all)?.is_none() {
        return Ok(complaints);
    }
    // Something was said: one by one, so that it is known of whom.
    for (name, _) in units {
        if let Some(complaint) = analyze(&[file(name)])? {
            let text = complaint.replace(&format!("{}/", dir.path().display()), "");
            complaints.insert(name.clone(), text);
        }
    }
    Ok(complaints)
}

fn analyze(files: &[PathBuf]) -> Result<Option<String>> {
    let output = Run::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no", "--"])
        .args(files)
        .deadline(Duration::from_secs(120))
        .output()?;
    let names: Vec<String> =
        files.iter().filter_map(|f| f.file_name()).map(|n| n.to_string_lossy().into_owned()).collect();
    complaint(&names, output.status, &output.stderr)
}

/// What of an answer is about these units. One that a signal ended (for want of memory, say) has judged nothing: that is
/// this host's trouble, and no release is rejected for it.
fn complaint(names: &[String], status: ProcessStatus, stderr: &str) -> Result<Option<String>> {
    if let ProcessStatus::Signal(_) = status {
        return Err(Error::new(format!(
            "systemd-analyze verify was ended by {status}; the next pass tries again, see 'journalctl -k'"
        )));
    }
    let of_them = |l: &&str| names.iter().any(|n| l.contains(n.as_str()));
    let said: Vec<&str> = stderr.lines().filter(of_them).map(str::trim).collect();
    Ok(match (said.is_empty(), status.ok()) {
        (false, _) => Some(said.join("; ")),
        (true, false) => Some(crate::runner::tail(stderr)),
        (true, true) => None,
    })
}

/// How much each running service unit leaves open. One call for all of them, because that is faster than one for
/// a few by name, whose answer has no form that a program could rely on.
pub fn exposures() -> Result<BTreeMap<String, Exposure>> {
    let output = Run::new("systemd-analyze")
        .args(["security", "--no-pager", "--json=short"])
        .deadline(Duration::from_secs(30))
        .success()?;
    parse_exposures(&output.stdout)
        .ok_or_else(|| Error::new("systemd-analyze security gives no list of units and their exposure"))
}

fn parse_exposures(bytes: &[u8]) -> Option<BTreeMap<String, Exposure>> {
    let rows: Vec<Value> = serde_json::from_slice(bytes).ok()?;
    let row = |row: &Value| {
        let exposure = match &row["exposure"] {
            Value::String(text) => Exposure::parse(text),
            other => Exposure::parse(&other.to_string()),
        };
        Some((row["unit"].as_str()?.to_string(), exposure?))
    };
    Some(rows.iter().filter_map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exposure_of_every_unit_is_read_and_what_has_none_is_left_out() {
        let rows = br#"[{"unit":"a.service","exposure":"1.1","predicate":"OK","happy":":-)"},
            {"unit":"b.service","exposure":9.6}, {"unit":"c.service","exposure":null}, {"exposure":"1.0"}]"#;
        let read = parse_exposures(rows).unwrap();
        let read: Vec<(&str, String)> = read.iter().map(|(u, e)| (u.as_str(), e.to_string())).collect();
        assert_eq!(read, [("a.service", "1.1".to_string()), ("b.service", "9.6".to_string())]);
        for bad in ["", "{}", "Unknown option --json"] {
            assert_eq!(parse_exposures(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_check_that_was_ended_refuses_nothing() {
        let names = ["ava.service".to_string()];
        let told = |status, stderr| complaint(&names, status, stderr);
        assert_eq!(told(ProcessStatus::Exit(0), "other.service:3: Unknown key\n").unwrap(), None);
        let said = "/x/ava.service:3: Unknown key 'A'\nother.service:1: x\n";
        assert_eq!(told(ProcessStatus::Exit(0), said).unwrap().unwrap(), "/x/ava.service:3: Unknown key 'A'");
        assert_eq!(told(ProcessStatus::Exit(1), "no such unit\n").unwrap().unwrap(), "no such unit");
        assert!(told(ProcessStatus::Signal(9), "").unwrap_err().to_string().contains("signal 9"));
    }

    #[test]
    fn an_exposure_is_a_number_of_one_digit_after_the_point() {
        for (text, json) in [("0.0", "0.0"), ("1.1", "1.1"), ("9.6", "9.6"), ("10.0", "10.0"), ("3", "3.0")] {
            let exposure = Exposure::parse(text).unwrap();
            assert_eq!(serde_json::to_string(&exposure).unwrap(), json);
            assert_eq!(serde_json::from_str::<Exposure>(json).unwrap(), exposure);
            assert_eq!(exposure.to_string(), json);
        }
        for bad in ["", "n/a", "-1", "10.1", "NaN", "inf", "1,1"] {
            assert_eq!(Exposure::parse(bad), None, "{bad}");
        }
        assert!(serde_json::from_str::<Exposure>("11").is_err());
        assert!(Exposure::parse("4.9").unwrap() < Exposure::MEDIUM);
    }
}
