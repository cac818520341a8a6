//! Many requests at a time: a few threads that take one item after the other, and what they share. It knows nothing of what is
//! asked.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ScopedJoinHandle;

/// What threads share. One that panicked with it ends the others anyway.
pub fn locked<T: ?Sized>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a thread came to; its panic is ours.
pub fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The answers to all items, in their order, asked for by at most `at_once` threads.
pub fn map<T: Sync, R: Send>(items: &[T], at_once: usize, ask: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if items.len() < 2 {
        return items.iter().map(ask).collect();
    }
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut answers = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return answers };
            answers.push((at, ask(item)));
        }
    };
    let mut answers: Vec<(usize, R)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..items.len().min(at_once)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(joined).collect()
    });
    answers.sort_by_key(|(at, _)| *at);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// The same for what can fail: the first error is the answer, and once there is one, nothing more is asked.
pub fn try_map<T: Sync, R: Send, E: Send>(
    items: &[T],
    at_once: usize,
    ask: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let failed = AtomicBool::new(false);
    let answers = map(items, at_once, |item| {
        let answer = (!failed.load(Ordering::Relaxed)).then(|| ask(item))?;
        failed.fetch_or(answer.is_err(), Ordering::Relaxed);
        Some(answer)
    });
    // What was not asked any more comes with an error.
    answers.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_asked_once_and_answers_keep_their_order() {
        let items: Vec<usize> = (0..100).collect();
        let asked = AtomicUsize::new(0);
        let answers = map(&items, 7, |n| {
            asked.fetch_add(1, Ordering::Relaxed);
            n * 2
        });
        assert_eq!(answers, (0..100).map(|n| n * 2).collect::<Vec<_>>());
        assert_eq!(asked.load(Ordering::Relaxed), 100);
        assert_eq!(map(&[] as &[u8], 7, |n| *n), [] as [u8; 0]);
        assert_eq!(try_map(&items, 7, |n| Ok::<_, usize>(n * 2)), Ok(answers));
        asked.store(0, Ordering::Relaxed);
        let fails = |n: &usize| {
            asked.fetch_add(1, Ordering::Relaxed);
            if *n >= 10 { Err(*n) } else { Ok(()) }
        };
        assert_eq!(try_map(&items, 1, fails), Err(10));
        assert_eq!(asked.load(Ordering::Relaxed), 11);
    }
}
