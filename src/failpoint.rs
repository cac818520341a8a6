//! Every effect of the deployer on its host, and those of pushes and fetches, pass here, so that tests can end it, or
//! make it fail, at each of them in turn: `OMNI_DEPLOY_EFFECTS=FILE` takes down the points that a run goes through,
//! `OMNI_DEPLOY_KILL_AT=N` ends the process at one of them as SIGKILL and a power cut do (`N of WORDS`: at the Nth that is
//! taken down with these words, for threads side by side count otherwise every time), and `OMNI_DEPLOY_FAIL_AT=N:EIO`
//! makes the write at one of them fail. Only with the feature `faults`: without it all of this compiles to nothing, and
//! no variable is read. It never decides anything.

pub use points::{Effect, begin, mark, point, shortened};

#[cfg(not(feature = "faults"))]
mod points {
    use std::fmt::Display;
    use std::io;
    use std::time::Duration;

    /// An effect under way.
    #[derive(Debug)]
    pub struct Effect;

    /// Begins an effect on the file system.
    #[inline(always)]
    pub fn begin(_what: &str, _object: impl Display) -> io::Result<Effect> {
        Ok(Effect)
    }

    /// Begins any other effect.
    #[inline(always)]
    pub fn mark(_what: &str, _object: impl Display) -> Effect {
        Effect
    }

    /// A point within an effect.
    #[inline(always)]
    pub fn point(_what: &str, _object: impl Display) {}

    /// This length of time.
    #[inline(always)]
    pub fn shortened(time: Duration) -> Duration {
        time
    }
}

#[cfg(feature = "faults")]
mod points {
    use crate::runner::Run;
    use std::fmt::Display;
    use std::io::{self, Write};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    static POINTS: AtomicUsize = AtomicUsize::new(0);
    /// How often the point came that `OMNI_DEPLOY_KILL_AT` names by its words.
    static SAME: AtomicUsize = AtomicUsize::new(0);

    /// An effect under way; its end is a point as well.
    #[derive(Debug)]
    pub struct Effect(String);

    impl Drop for Effect {
        fn drop(&mut self) {
            point("after", &self.0);
        }
    }

    fn variable(name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn passed(what: &str, object: &dyn Display) -> usize {
        let number = POINTS.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(file) = variable("OMNI_DEPLOY_EFFECTS") {
            let listed = fs_err::OpenOptions::new().create(true).append(true).open(file);
            // In one write: threads side by side add to it.
            let line = format!("{number} {what} {object}\n");
            listed.and_then(|mut f| f.write_all(line.as_bytes())).expect("the list of effects");
        }
        let here = |at: &str| match at.split_once(" of ") {
            Some((nth, words)) if words == format!("{what} {object}") => {
                nth == (SAME.fetch_add(1, Ordering::Relaxed) + 1).to_string()
            }
            Some(_) => false,
            None => at == number.to_string(),
        };
        if variable("OMNI_DEPLOY_KILL_AT").is_some_and(|at| here(&at)) {
            // By a shell: a signal to oneself takes unsafe code.
            let killed = Run::new("sh").args(["-c", "kill -KILL $PPID"]).output();
            panic!("survived the kill at point {number}: {killed:?}");
        }
        number
    }

    /// Begins an effect on the file system, which may be made to fail as the kernel does.
    pub fn begin(what: &str, object: impl Display) -> io::Result<Effect> {
        let number = passed("before", &format!("{what} {object}"));
        if let Some((at, error)) = variable("OMNI_DEPLOY_FAIL_AT").as_deref().and_then(|v| v.split_once(':'))
            && at == number.to_string()
        {
            // errno(3) of Linux.
            let code = match error {
                "EIO" => 5,
                "ENOSPC" => 28,
                "EROFS" => 30,
                other => panic!("no error {other}"),
            };
            return Err(io::Error::from_raw_os_error(code));
        }
        Ok(Effect(format!("{what} {object}")))
    }

    /// Begins any other effect.
    pub fn mark(what: &str, object: impl Display) -> Effect {
        let label = format!("{what} {object}");
        passed("before", &label);
        Effect(label)
    }

    /// A point within an effect.
    pub fn point(what: &str, object: impl Display) {
        passed(what, &object);
    }

    /// This length of time, or what `OMNI_DEPLOY_SETTLE_MS` says if that is less.
    pub fn shortened(time: Duration) -> Duration {
        let told = variable("OMNI_DEPLOY_SETTLE_MS").and_then(|ms| ms.parse().ok());
        told.map_or(time, |ms| time.min(Duration::from_millis(ms)))
    }
}
