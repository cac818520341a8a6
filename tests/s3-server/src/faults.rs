//! Faults on demand, from a control file that a test may write, change and remove at any time.
//!
//! ```json
//! {"fail": {"status": 503, "code": "SlowDown", "count": 5, "methods": ["GET"], "key_prefix": ""},
//!  "reset": {"count": 1, "after": true},
//!  "cut": {"bytes": 1000},
//!  "garbage": true,
//!  "delay_ms": 100,
//!  "ignore_conditions": true,
//!  "always_412": true,
//!  "refuse_expect": true,
//!  "require_checksum": true,
//!  "refuse_path_style": true}
//! ```
//!
//! Every field may be left out. `fail` answers that error, `garbage` a page that is not XML with status
//! 200, and `reset` closes the connection without an answer: before anything was done, or with `after`
//! once the request was carried out, which is how a client comes to repeat a write that succeeded. `cut`
//! carries it out too, and closes the connection after so many bytes of the answer's body. Each of the
//! four takes the scope shown at `fail` (`garbage` as an object instead of `true`): at most
//! `count` requests (without it: all), only these methods, only keys below this prefix (a listing has
//! the empty key), and only once `skip` such requests have passed unharmed. Counts start again whenever
//! the file changes. `ignore_conditions` and `always_412` are about writes with If-Match or
//! If-None-Match alone, and `delay_ms` about every request. Without a `code`, or with an empty one, what
//! `fail` answers has no body.
//!
//! `refuse_expect` answers 417 to `Expect`, as some fronts do; `require_checksum` answers 400 to a write that
//! brings neither Content-MD5 nor x-amz-checksum-*, as a bucket with Object Lock does; `refuse_path_style`
//! answers 403 to whoever names the bucket in the path (the server must know its own name: `--domain`).
//!
//! A test must replace the file by a rename: a half-written one makes every request fail with status 500.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Faults {
    fail: Option<Fail>,
    reset: Option<Reset>,
    cut: Option<Cut>,
    garbage: Option<Garbage>,
    delay_ms: u64,
    ignore_conditions: bool,
    always_412: bool,
    refuse_expect: bool,
    require_checksum: bool,
    refuse_path_style: bool,
}

// Unknown fields cannot be refused here: serde does not do so together with `flatten`.
#[derive(Debug, Deserialize)]
struct Fail {
    status: u16,
    #[serde(default)]
    code: String,
    #[serde(flatten)]
    scope: Scope,
}

#[derive(Debug, Deserialize)]
struct Reset {
    #[serde(default)]
    after: bool,
    #[serde(flatten)]
    scope: Scope,
}

#[derive(Debug, Deserialize)]
struct Cut {
    bytes: usize,
    #[serde(flatten)]
    scope: Scope,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Garbage {
    Always(bool),
    Within(Scope),
}

/// Which requests a fault befalls.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Scope {
    /// How many more, or all.
    count: Option<u64>,
    /// How many are let through first.
    skip: u64,
    /// All, if empty.
    methods: Vec<String>,
    key_prefix: String,
}

impl Scope {
    /// Whether the fault befalls this request; if so, it is counted.
    fn take(&mut self, method: &str, key: &str) -> bool {
        let named = self.methods.is_empty() || self.methods.iter().any(|m| m == method);
        if !named || !key.starts_with(&self.key_prefix) || self.count == Some(0) {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        if let Some(count) = &mut self.count {
            *count -= 1;
        }
        true
    }
}

/// What is to happen to one request.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    Serve,
    Fail { status: u16, code: String },
    Cut { bytes: usize },
    Garbage,
    ResetBefore,
    ResetAfter,
}

/// What of a request a server may dislike.
#[derive(Debug, Default)]
pub struct Likeness {
    pub path_style: bool,
    pub expects: bool,
    pub write_without_checksum: bool,
}

#[derive(Debug)]
pub struct Control {
    file: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Of the file that `faults` came from. Which file and when, too: the same text written again starts again, also
    /// within one tick of the kernel's clock.
    seen: Option<(u64, SystemTime, Vec<u8>)>,
    faults: Faults,
}

impl Control {
    pub fn new(file: Option<PathBuf>) -> Self {
        Self { file, state: Mutex::default() }
    }

    /// Reads the control file if it changed, and decides about one request.
    ///
    /// Fails if the file cannot be understood, so that a mistake in a test does not look like a store
    /// without faults.
    pub fn decide(&self, method: &str, key: &str) -> Result<(Duration, Fate), String> {
        let mut state = self.lock();
        self.refresh(&mut state)?;
        let Faults { fail, reset, cut, garbage, delay_ms, .. } = &mut state.faults;
        let delay = Duration::from_millis(*delay_ms);
        if let Some(reset) = reset
            && reset.scope.take(method, key)
        {
            let fate = match reset.after {
                true => Fate::ResetAfter,
                false => Fate::ResetBefore,
            };
            return Ok((delay, fate));
        }
        if let Some(fail) = fail
            && fail.scope.take(method, key)
        {
            let (status, code) = (fail.status, fail.code.clone());
            return Ok((delay, Fate::Fail { status, code }));
        }
        if let Some(cut) = cut
            && cut.scope.take(method, key)
        {
            return Ok((delay, Fate::Cut { bytes: cut.bytes }));
        }
        if let Some(garbage) = garbage
            && garbage.take(method, key)
        {
            return Ok((delay, Fate::Garbage));
        }
        Ok((delay, Fate::Serve))
    }

    pub fn ignores_conditions(&self) -> bool {
        self.lock().faults.ignore_conditions
    }

    pub fn always_412(&self) -> bool {
        self.lock().faults.always_412
    }

    /// Why a request like this is refused whatever it asks: status and code.
    pub fn refuses(&self, is: &Likeness) -> Option<(u16, &'static str)> {
        let state = self.lock();
        let faults = &state.faults;
        match is {
            Likeness { path_style: true, .. } if faults.refuse_path_style => {
                Some((403, "SecondLevelDomainForbidden"))
            }
            Likeness { expects: true, .. } if faults.refuse_expect => Some((417, "")),
            Likeness { write_without_checksum: true, .. } if faults.require_checksum => {
                Some((400, "InvalidRequest"))
            }
            _ => None,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn refresh(&self, state: &mut State) -> Result<(), String> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let read = std::fs::metadata(file).and_then(|m| Ok((m.ino(), m.modified()?, std::fs::read(file)?)));
        let now = match read {
            Ok(now) => Some(now),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(format!("control file {}: {e}", file.display())),
        };
        if now == state.seen {
            return Ok(());
        }
        state.faults = match &now {
            None => Faults::default(),
            Some((_, _, text)) => {
                serde_json::from_slice(text).map_err(|e| format!("control file {}: {e}", file.display()))?
            }
        };
        state.seen = now;
        Ok(())
    }
}

impl Garbage {
    fn take(&mut self, method: &str, key: &str) -> bool {
        match self {
            Self::Always(always) => *always,
            Self::Within(scope) => scope.take(method, key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_skips_then_counts_only_what_it_names() {
        let mut scope =
            Scope { count: Some(2), skip: 1, methods: vec!["PUT".to_owned()], key_prefix: "nar/".to_owned() };
        assert!(!scope.take("GET", "nar/a"));
        assert!(!scope.take("PUT", "a.narinfo"));
        let fates = [0; 5].map(|_| scope.take("PUT", "nar/a"));
        assert_eq!(fates, [false, true, true, false, false]);
    }

    #[test]
    fn without_a_file_all_is_served() {
        let control = Control::new(None);
        let served = (Duration::ZERO, Fate::Serve);
        assert_eq!(control.decide("GET", "x"), Ok(served));
    }
}
