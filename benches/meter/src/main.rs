//! `omni-meter`: runs programs side by side, again and again, and prints what each took. One run of each is a
//! round and the order turns with every round, so that a machine which is busy for a moment is busy for all.
//! It never interprets what the programs print.
//!
//! The peak memory is the kernel's word (wait4(2), ru_maxrss): the largest of the program and of the children
//! it waited for. Of the program alone it is VmHWM of proc_pid_status(5), which only grows, as it was last seen while
//! the program ran.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "to start programs is what it is for; it is no part of the product"
)]

use std::io::{Error, ErrorKind, Read, Result, Seek};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const USAGE: &str =
    "usage: omni-meter [--runs N] [--warmup N] [--urgent] [--alone] -- PROGRAM [ARG...] [::: PROGRAM [ARG...]]...

prints a line per program: median, least and most milliseconds, its peak memory in KiB, and the median of the
milliseconds that it and its children kept a processor busy
--urgent runs them before everything else on the machine (SCHED_FIFO)
--alone leaves their children out of the peak memory
{} in an argument is the number of the round, 0001 and so on; programs get no input, and must exit 0";

/// What one run cost.
struct Cost {
    time: Duration,
    peak_kib: i64,
    busy: Duration,
}

struct Asked {
    runs: usize,
    warmup: usize,
    urgent: bool,
    alone: bool,
    programs: Vec<Vec<String>>,
}

fn main() -> ExitCode {
    let Some(asked) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match measure(&asked) {
        Ok(lines) => {
            print!("{lines}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("omni-meter: {e}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Option<Asked> {
    let mut asked = Asked { runs: 10, warmup: 1, urgent: false, alone: false, programs: Vec::new() };
    loop {
        match args.next()?.as_str() {
            "--runs" => asked.runs = args.next()?.parse().ok().filter(|n| *n > 0)?,
            "--warmup" => asked.warmup = args.next()?.parse().ok()?,
            "--urgent" => asked.urgent = true,
            "--alone" => asked.alone = true,
            "--" => break,
            _ => return None,
        }
    }
    let words: Vec<String> = args.collect();
    asked.programs = words.split(|w| w == ":::").map(<[String]>::to_vec).collect();
    asked.programs.iter().all(|p| !p.is_empty()).then_some(asked)
}

fn measure(asked: &Asked) -> Result<String> {
    if asked.urgent {
        let lowest = libc::sched_param { sched_priority: 1 };
        // SAFETY: the pointer is to a local that outlives the call; 0 is this process, its children inherit.
        if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &lowest) } < 0 {
            let e = Error::last_os_error();
            return Err(Error::new(e.kind(), format!("no real-time priority: {e}")));
        }
    }
    let count = asked.programs.len();
    let mut costs: Vec<Vec<Cost>> = (0..count).map(|_| Vec::new()).collect();
    for round in 1..=asked.warmup + asked.runs {
        for turn in 0..count {
            let which = (round + turn) % count;
            let cost = run(&asked.programs[which], round, asked.alone)?;
            if round > asked.warmup {
                costs[which].push(cost);
            }
        }
    }
    let ms = |t: Duration| t.as_secs_f64() * 1e3;
    let mut lines = String::new();
    for costs in &mut costs {
        costs.sort_by_key(|c| c.time);
        let (low, high) = (costs[(costs.len() - 1) / 2].time, costs[costs.len() / 2].time);
        let mut busy: Vec<Duration> = costs.iter().map(|c| c.busy).collect();
        busy.sort();
        let busy = ms(busy[busy.len() / 2]);
        let peak = costs.iter().map(|c| c.peak_kib).max().unwrap_or(0);
        let (least, most) = (costs[0].time, costs[costs.len() - 1].time);
        lines.push_str(&format!(
            "{:.3} {:.3} {:.3} {peak} {busy:.3}\n",
            ms((low + high) / 2),
            ms(least),
            ms(most)
        ));
    }
    Ok(lines)
}

/// Looks at a program's own peak memory until it is gone, in KiB.
fn own_peak(id: u32) -> i64 {
    let mut peak = 0;
    // A program that ended and was not waited for has a status without memory.
    while let Some(seen) = std::fs::read_to_string(format!("/proc/{id}/status")).ok().and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    }) {
        peak = seen;
        std::thread::sleep(Duration::from_millis(2));
    }
    peak
}

fn run(words: &[String], round: usize, alone: bool) -> Result<Cost> {
    let words: Vec<String> = words.iter().map(|w| w.replace("{}", &format!("{round:04}"))).collect();
    let mut said = tempfile()?;
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?);
    let start = Instant::now();
    let child = command.spawn().map_err(|e| Error::new(e.kind(), format!("{}: {e}", words[0])))?;
    let id = child.id();
    let watch = alone.then(|| std::thread::spawn(move || own_peak(id)));
    let mut status = 0;
    // SAFETY: wait4 fills a plain struct of integers, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to locals that outlive the call; the child is ours and not waited for elsewhere.
    if unsafe { libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage) } < 0 {
        return Err(Error::last_os_error());
    }
    let time = start.elapsed();
    if status != 0 {
        let mut text = String::new();
        said.rewind()?;
        said.read_to_string(&mut text)?;
        return Err(Error::other(format!("{} ended with wait status {status:#x}:\n{text}", words.join(" "))));
    }
    let peak_kib = watch.map_or(usage.ru_maxrss, |watch| watch.join().unwrap_or_default());
    let spent = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Ok(Cost { time, peak_kib, busy: spent(usage.ru_utime) + spent(usage.ru_stime) })
}

/// A file without a name, for what a program says on stderr: a pipe would have to be read while it runs.
fn tempfile() -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(std::env::temp_dir())
        .map_err(|e| if e.kind() == ErrorKind::NotFound { Error::new(e.kind(), "no TMPDIR") } else { e })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_own_memory_is_without_its_childrens() {
        // The shell stays a small one while its child keeps fifty megabytes; it is there to be looked at in the end.
        let words = ["sh", "-c", "head -c 60000000 /dev/zero | tail -c 50000000 >/dev/null; sleep 0.1"];
        let words = words.map(String::from);
        let (own, all) = (run(&words, 1, true).unwrap().peak_kib, run(&words, 1, false).unwrap().peak_kib);
        assert!((200..20_000).contains(&own), "{own}");
        assert!(all > 40_000, "{all}");
    }
}
