//! The newest versions, without a listing of all there ever were: names sort by time, and a store can be asked for
//! those behind one. What is found is what [`versions::all`] would say of that part; where it cannot be told from a
//! part, all of them are listed.

use super::versions::{self, Version, VersionHead, archive_key, archive_name, named, newest_first, stem};
use crate::clock::Timestamp;
use crate::error::Result;
use crate::store::{ARCHIVE_PREFIX, MANIFEST_KEY, Store};

/// Some of the versions, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    /// At least as many as were wanted besides the current one, if there are so many.
    pub versions: Vec<Version>,
    /// The names of what was found beside them and has no version's name.
    pub others: Vec<String>,
    /// Whether these are all.
    pub complete: bool,
}

/// As many versions fit into one answer of S3: fewer are listed as they are.
const PAGE: u64 = 1000;

/// How far behind the current version is looked first, in seconds: a week.
const FIRST_SEC: i64 = 7 * 24 * 3600;

/// The fewest that are looked for where too many came: the estimate is coarse.
const FEWEST: usize = 200;

/// How often another beginning is tried before all are listed.
const TRIES: usize = 5;

/// How many versions are enough for a word that most likely means one of the last.
const RECENT: usize = 200;

/// The `wanted` newest versions below the current one, with it and whatever is above it.
pub fn newest(store: &dyn Store, wanted: usize) -> Result<Newest> {
    if let Some(head) = versions::head(store, MANIFEST_KEY)?
        && head.serial > PAGE
        && (wanted as u64) < head.serial
        && let Some(part) = part(store, &head, wanted)?
    {
        return Ok(part);
    }
    let (versions, others) = versions::all_and_others(store)?;
    Ok(Newest { versions, others, complete: true })
}

/// None: all have to be listed.
fn part(store: &dyn Store, current: &VersionHead, wanted: usize) -> Result<Option<Newest>> {
    let own_name = archive_name(current.serial, current.generation);
    let own_key = archive_key(&own_name);
    let (mut back, mut since) = (FIRST_SEC, current.generation.0.saturating_sub(FIRST_SEC));
    for _ in 0..TRIES {
        let after = archive_key(&format!("manifest-{}", Timestamp(since).compact()));
        let page = store.list_after(ARCHIVE_PREFIX, &after)?;
        let (mut found, others) = named(&page.keys);
        if page.more {
            let ends = page.keys.last().filter(|last| **last < own_key).and_then(|_| {
                let (newest, oldest) = (found.first()?, found.last()?);
                Some((time_in(&oldest.name)?.0, time_in(&newest.name)?.0, newest.serial))
            });
            // Newer ones than the current: an old one was put back, and all of them have to be seen.
            let Some((oldest, newest, serial)) = ends else { return Ok(None) };
            // From the oldest on, not to the newest: on from there at the pace of these, as far as numbers are missing.
            let missing = current.serial.saturating_sub(serial).saturating_sub(2 * wanted.max(FEWEST) as u64);
            let pace = (newest - oldest).max(1) as f64 / found.len() as f64;
            since = newest.saturating_add((missing as f64 * pace) as i64);
            continue;
        }
        found.retain(|v| v.name != own_name);
        if found.iter().filter(|v| v.serial < current.serial).count() >= wanted.max(1) {
            found.push(Version { name: own_name, serial: current.serial, current: true });
            newest_first(&mut found);
            return Ok(Some(Newest { versions: found, others, complete: false }));
        }
        back = back.saturating_mul(16);
        since = current.generation.0.saturating_sub(back);
    }
    Ok(None)
}

/// Versions in which each of these words can be looked up as in all of them. Without a word, the newest.
pub fn enough_for(store: &dyn Store, words: &[&str]) -> Result<Vec<Version>> {
    let Newest { mut versions, others: _, complete } = newest(store, RECENT)?;
    if complete {
        return Ok(versions);
    }
    let highest = versions.iter().map(|v| v.serial).max().unwrap_or_default();
    for word in words {
        let stem = stem(word);
        let number: Option<u64> = stem.parse().ok();
        if versions.iter().any(|v| self::stem(&v.name) == stem || Some(v.serial) == number) {
            continue;
        }
        if number.is_some_and(|number| number <= highest) {
            return versions::all(store);
        }
        let stem = stem.strip_prefix("manifest-").unwrap_or(stem);
        let page = store.list_after(&archive_key(&format!("manifest-{stem}")), "")?;
        let (mut fitting, _) = named(&page.keys);
        fitting.retain(|fits| !versions.iter().any(|v| v.name == fits.name));
        let known = versions.iter().any(|v| v.name["manifest-".len()..].starts_with(stem));
        // Of no or of too many, all are shown.
        if page.more || fitting.is_empty() && !known {
            return versions::all(store);
        }
        versions.extend(fitting);
    }
    newest_first(&mut versions);
    Ok(versions)
}

/// The time in a name.
fn time_in(name: &str) -> Option<Timestamp> {
    Timestamp::parse_compact(name.strip_prefix("manifest-")?.get(..16)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Condition, Etag, GetResult, Keys, StoreError};
    use std::sync::Mutex;

    /// An archive of names alone, which gives a thousand at once and counts how often it is asked.
    struct Archive {
        keys: Vec<String>,
        current: VersionHead,
        lists: Mutex<usize>,
    }

    impl Archive {
        /// `count` versions so many seconds apart, the last of them in force.
        fn of(count: u64, apart: i64) -> Self {
            let time = |serial: u64| Timestamp(1_600_000_000 + serial as i64 * apart);
            let keys = (1..count).map(|n| archive_key(&archive_name(n, time(n)))).collect();
            let current = VersionHead { serial: count, generation: time(count), change: Default::default() };
            Archive { keys, current, lists: Mutex::default() }
        }

        fn asked(&self) -> usize {
            std::mem::take(&mut self.lists.lock().unwrap())
        }
    }

    impl Store for Archive {
        fn url(&self) -> String {
            "s3://archive".into()
        }
        fn identity(&self) -> String {
            self.url()
        }
        fn get(&self, _: &str, _: Option<&Etag>, _: u64) -> Result<GetResult, StoreError> {
            unreachable!()
        }
        fn read_from(&self, _: &str, _: u64, _: Option<&Etag>) -> Result<crate::store::Opened, StoreError> {
            unreachable!()
        }
        fn write_from(&self, _: &str, _: &crate::store::Upload<'_>) -> Result<(), StoreError> {
            unreachable!()
        }
        fn get_start(&self, key: &str, _: u64) -> Result<Option<Vec<u8>>, StoreError> {
            assert_eq!(key, MANIFEST_KEY);
            let VersionHead { serial, generation, .. } = &self.current;
            let text = format!(
                r#"{{"version": 1, "serial": {serial}, "generation": "{generation}", "change": {{}}, "services": []}}"#
            );
            Ok(Some(text.into_bytes()))
        }
        fn size(&self, _: &str) -> Result<Option<u64>, StoreError> {
            unreachable!()
        }
        fn put(&self, _: &str, _: &[u8], _: &Condition) -> Result<Etag, StoreError> {
            unreachable!()
        }
        fn delete(&self, _: &str) -> Result<(), StoreError> {
            unreachable!()
        }
        fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
            let keys: Vec<String> = self.keys.iter().filter(|k| k.starts_with(prefix)).cloned().collect();
            *self.lists.lock().unwrap() += keys.len() / 1000 + 1;
            Ok(keys)
        }
        fn list_after(&self, prefix: &str, after: &str) -> Result<Keys, StoreError> {
            *self.lists.lock().unwrap() += 1;
            let fits = |k: &&String| k.starts_with(prefix) && k.as_str() > after;
            let mut keys: Vec<String> = self.keys.iter().filter(fits).take(1001).cloned().collect();
            let more = keys.len() > 1000;
            keys.truncate(1000);
            Ok(Keys { keys, more })
        }
    }

    fn serials(versions: &[Version], count: usize) -> Vec<u64> {
        versions.iter().take(count).map(|v| v.serial).collect()
    }

    #[test]
    fn the_newest_of_ten_thousand_cost_two_listings_however_close_they_are() {
        for apart in [1, 60, 1_000, 1_728, 10_000] {
            let store = Archive::of(10_000, apart);
            for wanted in [1, 20, 200] {
                let found = newest(&store, wanted).unwrap();
                let expected: Vec<u64> = (0..=wanted as u64).map(|n| 10_000 - n).collect();
                assert_eq!(serials(&found.versions, wanted + 1), expected, "{apart} {wanted}");
                assert!(found.versions[0].current && !found.complete);
                let asked = store.asked();
                assert!((1..=2).contains(&asked), "{apart} {wanted}: {asked} listings");
            }
        }
        let store = Archive::of(900, 60);
        let found = newest(&store, 20).unwrap();
        assert_eq!((found.versions.len(), found.complete, store.asked()), (900, true, 1));
    }

    #[test]
    fn a_long_pause_before_the_newest_costs_a_few_more() {
        let mut store = Archive::of(10_000, 1_728);
        for pause in [20, 100, 1_000] {
            store.current.generation = Timestamp(1_600_000_000 + 10_000 * 1_728 + pause * 24 * 3600);
            let found = newest(&store, 20).unwrap();
            assert_eq!(
                serials(&found.versions, 21),
                (0..21).map(|n| 10_000 - n).collect::<Vec<u64>>(),
                "{pause}"
            );
            let asked = store.asked();
            assert!(asked <= 4, "{pause}: {asked} listings");
        }
    }

    #[test]
    fn one_that_was_put_back_is_seen_among_all() {
        let mut store = Archive::of(10_000, 60);
        store.current.serial = 5_000;
        store.current.generation = Timestamp(1_600_000_000 + 5_000 * 60);
        let found = newest(&store, 20).unwrap();
        assert!(found.complete);
        assert_eq!(found.versions, versions::all(&store).unwrap());
        // The last but one: what is above it is among the newest.
        store.current.serial = 9_990;
        store.current.generation = Timestamp(1_600_000_000 + 9_990 * 60);
        let found = newest(&store, 20).unwrap();
        assert_eq!(serials(&found.versions, 30), (0..30).map(|n| 9_999 - n).collect::<Vec<u64>>());
        assert!(found.versions[9].current);
    }

    #[test]
    fn a_word_means_the_same_as_in_all_of_them() {
        let store = Archive::of(10_000, 60);
        let all = versions::all(&store).unwrap();
        let old = archive_name(3, Timestamp(1_600_000_000 + 180));
        let stem = old.strip_suffix(".json").unwrap();
        store.asked();
        for (word, most) in [
            ("9990", 2),
            (&archive_name(9_950, Timestamp(1_600_000_000 + 9_950 * 60)), 2),
            (&old, 3),
            (stem, 3),
            (&stem[..27], 3),
            ("20200913T1229", 3),
            ("manifest-20200913", 3),
            ("17", 20),
            ("nothing", 20),
            ("2020", 20),
            ("2030", 20),
        ] {
            let part = enough_for(&store, &[word]).unwrap();
            let asked = store.asked();
            assert!(asked <= most, "{word}: {asked} listings");
            let meant = |versions: &[Version]| -> Vec<Version> {
                versions::fitting(versions, word).into_iter().cloned().collect()
            };
            assert_eq!(meant(&part), meant(&all), "{word}");
        }
    }
}
