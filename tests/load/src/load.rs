//! The load: requests are due on a schedule whatever becomes of those before them, and latency counts from the
//! time at which a request was due. Each burst is due at one instant; who sends it holds a connection of its
//! own, used for every other request, and more senders are made as long as too few wait for what is due next.
//! Besides them, early clients connect up to four seconds before they send, as browsers do.

use crate::http::{Connection, Failure, Head, Target};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// More senders than this are not made: the machine is then what is measured.
const MOST_SENDERS: u32 = 3000;
/// How much is sent and echoed at most.
const LARGEST_BODY: u64 = 16 << 10;
/// One in so many GETs asks for an answer that takes its time.
const ONE_WAITS: u64 = 32;
/// The longest of these, in milliseconds.
const LONGEST_WAIT: u64 = 800;
/// How long the answer to a POST takes at least, in milliseconds; at most twice that. Caddy before 2.8 (a
/// defect of Go, its issue 40747) cuts the answer to a body that came over a kept HTTP/1.1 connection when it
/// begins before Caddy has seen that the body has ended, with and without deploys: a service that answers at
/// once loses about one POST in a thousand to that, and here it is the deploys that are measured.
const POST_WAITS: u64 = 30;
/// How long an early client may hold its connection before it sends, in milliseconds.
const EARLIEST: u64 = 4000;
/// So many failures are told one by one.
const TOLD: u64 = 60;

/// What is sent when.
#[derive(Debug)]
pub struct Schedule {
    /// At least so many requests.
    pub requests: u64,
    /// So many a second.
    pub rate: u32,
    /// So many due at one instant.
    pub at_once: u32,
    /// So many clients that connect early.
    pub early: u32,
}

/// What came of all requests.
#[derive(Debug, Default)]
struct Tally {
    /// By method: asked, and the latencies of those that were answered well, in microseconds.
    sent: BTreeMap<&'static str, (u64, Vec<u32>)>,
    /// By method and kind.
    failed: BTreeMap<String, u64>,
    /// Kept connections that ended unanswered under a request, by method; it was sent again on a fresh one.
    resent: BTreeMap<&'static str, u64>,
    /// What `GET` told.
    versions: BTreeSet<String>,
    told: u64,
}

struct Run<'a> {
    target: &'a Target,
    schedule: &'a Schedule,
    begun: Instant,
    next: AtomicU64,
    stop: AtomicBool,
    senders: AtomicU32,
    waiting: AtomicU32,
    most_senders: AtomicU32,
    tally: Mutex<Tally>,
}

/// How a request's connection comes about.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Kept,
    Fresh,
}

/// Sends until enough is sent and stdin has ended; prints the tally.
pub fn run(target: &Target, schedule: &Schedule) -> io::Result<()> {
    let run = Run {
        target,
        schedule,
        begun: Instant::now() + Duration::from_millis(200),
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        senders: AtomicU32::new(0),
        waiting: AtomicU32::new(0),
        most_senders: AtomicU32::new(0),
        tally: Mutex::default(),
    };
    std::thread::scope(|scope| -> io::Result<()> {
        for _ in 0..schedule.at_once {
            run.senders.fetch_add(1, Ordering::SeqCst);
            scope.spawn(|| run.send_what_is_due(scope));
        }
        for i in 0..schedule.early {
            let run = &run;
            scope.spawn(move || run.connect_early(u64::from(i)));
        }
        io::copy(&mut io::stdin(), &mut io::sink())?;
        while run.tally().answered() < schedule.requests {
            std::thread::sleep(Duration::from_millis(20));
        }
        run.stop.store(true, Ordering::SeqCst);
        Ok(())
    })?;
    println!("{}", run.json());
    Ok(())
}

impl<'scope> Run<'_> {
    fn due(&self, i: u64) -> Instant {
        let burst = i / u64::from(self.schedule.at_once) * u64::from(self.schedule.at_once);
        self.begun + Duration::from_secs_f64(burst as f64 / f64::from(self.schedule.rate))
    }

    fn send_what_is_due(&'scope self, scope: &'scope std::thread::Scope<'scope, '_>) {
        let mut kept = None;
        let mut random = Random(0);
        loop {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let i = self.next.fetch_add(1, Ordering::SeqCst);
            let due = self.due(i);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let waiting = self.waiting.fetch_sub(1, Ordering::SeqCst) - 1;
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if waiting == 0 {
                let senders = self.senders.fetch_add(1, Ordering::SeqCst) + 1;
                if senders > MOST_SENDERS {
                    self.senders.fetch_sub(1, Ordering::SeqCst);
                } else {
                    self.most_senders.fetch_max(senders, Ordering::SeqCst);
                    scope.spawn(|| self.send_what_is_due(scope));
                }
            }
            random.seed(i);
            let way = if i & 2 == 0 { Way::Kept } else { Way::Fresh };
            self.perform(&mut kept, way, i, due, &mut random);
            // Made for a moment in which answers were late: it is over.
            if self.waiting.load(Ordering::SeqCst) >= self.schedule.at_once {
                self.senders.fetch_sub(1, Ordering::SeqCst);
                return;
            }
        }
    }

    fn connect_early(&self, which: u64) {
        let mut random = Random(0);
        for i in 0.. {
            random.seed(which << 32 | i);
            // Not all at the same time.
            std::thread::sleep(Duration::from_millis(random.below(500)));
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let mut early = self.target.connect().ok();
            std::thread::sleep(Duration::from_millis(random.below(EARLIEST)));
            self.perform(&mut early, Way::Kept, i, Instant::now(), &mut random);
        }
    }

    /// One request, and what came of it.
    fn perform(&self, kept: &mut Option<Connection>, way: Way, i: u64, due: Instant, random: &mut Random) {
        let get = i & 1 == 0;
        let method = if get { "GET" } else { "POST" };
        let wait = match get {
            true if (i / 4).is_multiple_of(ONE_WAITS) => random.below(LONGEST_WAIT),
            true => 0,
            false => POST_WAITS + random.below(POST_WAITS),
        };
        let body = if get { Vec::new() } else { random.bytes() };
        let path = if wait > 0 { format!("/wait/{wait}") } else { "/".into() };
        let close = if way == Way::Fresh { "Connection: close\r\n" } else { "" };
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n{close}", self.target.domain).into_bytes();
        if !get {
            request.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
        }
        request.extend_from_slice(b"\r\n");
        request.extend_from_slice(&body);

        let outcome = self.ask(kept, way, method, &request).and_then(|(head, answer)| {
            let status = head.line.split(' ').nth(1).unwrap_or_default().to_string();
            if status != "200" {
                return Err(format!("status {status}"));
            }
            if get {
                let version = String::from_utf8_lossy(&answer).trim_end().to_string();
                let sound = !version.is_empty() && version.len() < 40;
                return if sound { Ok(Some(version)) } else { Err("wrong body".into()) };
            }
            if answer == body { Ok(None) } else { Err("wrong body".into()) }
        });
        let latency = due.elapsed().saturating_sub(Duration::from_millis(wait));
        let mut tally = self.tally();
        let (sent, latencies) = tally.sent.entry(method).or_default();
        *sent += 1;
        match outcome {
            Ok(version) => {
                latencies.push(latency.as_micros().try_into().unwrap_or(u32::MAX));
                if let Some(version) = version {
                    tally.versions.insert(version);
                }
            }
            Err(kind) => {
                let kept = if way == Way::Kept { "kept" } else { "fresh" };
                tally.tell(format!(
                    "{method} failed: {kind} ({kept}, {} bytes, after {:.3} s)",
                    body.len(),
                    latency.as_secs_f64()
                ));
                *tally.failed.entry(format!("{method} {kind}")).or_default() += 1;
            }
        }
    }

    /// Sends and reads the answer. A kept connection that ends without a byte of an answer is one that the other
    /// side gave up while the request was on its way: it is counted, and the request sent again once.
    fn ask(
        &self,
        kept: &mut Option<Connection>,
        way: Way,
        method: &'static str,
        request: &[u8],
    ) -> Result<(Head, Vec<u8>), String> {
        let told = |failure: Failure| match failure {
            Failure::Unanswered(e) => format!("reset before the answer: {:?}", e.kind()),
            Failure::Broken(e) => format!("reset in the answer: {:?}", e.kind()),
            Failure::Timeout => "timeout".into(),
        };
        if way == Way::Kept
            && let Some(mut connection) = kept.take().filter(|c| !c.ended())
        {
            match connection.exchange(request) {
                Ok(answer) => {
                    *kept = (!answer.0.close).then_some(connection);
                    return Ok(answer);
                }
                Err(Failure::Unanswered(e)) => {
                    let mut tally = self.tally();
                    *tally.resent.entry(method).or_default() += 1;
                    tally
                        .tell(format!("{method} sent again: its kept connection had ended ({:?})", e.kind()));
                }
                Err(failure) => return Err(told(failure)),
            }
        }
        let mut connection = self.target.connect().map_err(|e| format!("connect: {:?}", e.kind()))?;
        let answer = connection.exchange(request).map_err(told)?;
        match way {
            Way::Kept => *kept = (!answer.0.close).then_some(connection),
            Way::Fresh => connection.see_out(),
        }
        Ok(answer)
    }

    fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn json(&self) -> String {
        let tally = self.tally();
        let failed: u64 = tally.failed.values().sum();
        let sent = tally.answered();
        let methods = tally.sent.iter().map(|(method, (sent, latencies))| {
            let mut sorted = latencies.clone();
            sorted.sort_unstable();
            let at = |share: f64| {
                let i = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
                f64::from(sorted.get(i).copied().unwrap_or(0)) / 1000.0
            };
            format!(
                "\"{method}\": {{\"sent\": {sent}, \"ok\": {}, \"p50Ms\": {:.1}, \"p99Ms\": {:.1}, \"worstMs\": {:.1}}}",
                sorted.len(),
                at(0.5),
                at(0.99),
                at(1.0)
            )
        });
        let methods: Vec<String> = methods.collect();
        let counts = |map: Vec<(&str, u64)>| {
            let pairs: Vec<String> = map.iter().map(|(k, n)| format!("{k:?}: {n}")).collect();
            format!("{{{}}}", pairs.join(", "))
        };
        format!(
            "{{\"sent\": {sent}, \"failed\": {failed}, \"kinds\": {}, \"resent\": {}, \"atOnce\": {}, \"mostSenders\": {}, \"seconds\": {:.1}, {}, \"versions\": {:?}}}",
            counts(tally.failed.iter().map(|(k, n)| (k.as_str(), *n)).collect()),
            counts(tally.resent.iter().map(|(k, n)| (*k, *n)).collect()),
            self.schedule.at_once,
            self.most_senders.load(Ordering::SeqCst).max(self.schedule.at_once),
            self.begun.elapsed().as_secs_f64(),
            methods.join(", "),
            tally.versions.iter().collect::<Vec<_>>()
        )
    }
}

impl Tally {
    fn answered(&self) -> u64 {
        self.sent.values().map(|(sent, _)| sent).sum()
    }

    fn tell(&mut self, what: String) {
        self.told += 1;
        if self.told <= TOLD {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            eprintln!("{:.3} {what}", now.as_secs_f64());
        }
    }
}

/// Marsaglia's xorshift64: the same requests at every run.
struct Random(u64);

impl Random {
    fn seed(&mut self, i: u64) {
        self.0 = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        self.next();
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = self.below(LARGEST_BODY) as usize + 1;
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}
