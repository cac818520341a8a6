//! Walks through caches of a few narinfos, good and forged: what nobody vouches for is not followed, what is here is not
//! asked for, and a closure that is found is whole and in order.

use crate::entries::Choices;
use crate::narinfo::{KEYS, path, sign};
use omni_deploy::hash::Sha256;
use omni_deploy::names::StorePath;
use omni_deploy::nix::narinfo::{Compression, NarInfo};
use omni_deploy::nix::walk::{WalkLimits, walk};
use omni_deploy::store::{Condition, Etag, GetResult, Opened, Store, StoreError, Upload};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

const PATHS: usize = 12;
/// The most references of each.
const REFERENCES: usize = 4;
/// So many paths end a walk that may not go far.
const FEW: usize = 3;

/// A cache in memory, which knows what it was asked for.
#[derive(Default)]
struct Cache {
    objects: BTreeMap<String, Vec<u8>>,
    asked: Mutex<Vec<String>>,
}

impl Store for Cache {
    fn url(&self) -> String {
        "memory".into()
    }
    fn identity(&self) -> String {
        self.url()
    }
    fn get(&self, key: &str, _: Option<&Etag>, limit: u64) -> Result<GetResult, StoreError> {
        self.asked.lock().expect("nobody panics").push(key.to_string());
        match self.objects.get(key) {
            None => Ok(GetResult::Missing),
            Some(bytes) if bytes.len() as u64 > limit => Err(StoreError::TooLarge(key.into())),
            Some(bytes) => Ok(GetResult::Found { bytes: bytes.clone(), etag: Etag("x".into()) }),
        }
    }
    fn read_from(&self, _: &str, _: u64, _: Option<&Etag>) -> Result<Opened, StoreError> {
        unreachable!("a walk reads narinfos")
    }
    fn write_from(&self, _: &str, _: &Upload<'_>) -> Result<(), StoreError> {
        unreachable!("a walk reads narinfos")
    }
    fn get_start(&self, _: &str, _: u64) -> Result<Option<Vec<u8>>, StoreError> {
        unreachable!("a walk reads narinfos")
    }
    fn size(&self, _: &str) -> Result<Option<u64>, StoreError> {
        unreachable!("a walk reads narinfos")
    }
    fn put(&self, _: &str, _: &[u8], _: &Condition) -> Result<Etag, StoreError> {
        unreachable!("a walk changes nothing")
    }
    fn delete(&self, _: &str) -> Result<(), StoreError> {
        unreachable!("a walk changes nothing")
    }
    fn list(&self, _: &str) -> Result<Vec<String>, StoreError> {
        unreachable!("a walk reads narinfos")
    }
}

/// How a path stands in the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Signed,
    Strangers,
    Unsigned,
    Absent,
    AboutAnother,
}

pub fn check(data: &[u8]) {
    let mut choices = Choices::new(data);
    let with_keys = !choices.rarely(3);
    let here: BTreeSet<StorePath> = (1..PATHS).filter(|_| choices.rarely(4)).map(path).collect();
    let mut graph: BTreeMap<StorePath, (Kind, BTreeSet<StorePath>)> = BTreeMap::new();
    for n in 0..PATHS {
        let kind = choices.pick(&[
            Kind::Signed,
            Kind::Signed,
            Kind::Signed,
            Kind::Strangers,
            Kind::Unsigned,
            Kind::Absent,
            Kind::AboutAnother,
        ]);
        let references: BTreeSet<StorePath> =
            (0..choices.below(REFERENCES + 1)).map(|_| path(choices.below(PATHS))).collect();
        graph.insert(path(n), (kind, references));
    }
    let believed = |path: &StorePath| match graph[path].0 {
        Kind::Signed => true,
        Kind::Strangers | Kind::Unsigned => !with_keys,
        Kind::Absent | Kind::AboutAnother => false,
    };
    // What may be asked for: the top, and what is not here below what is believed.
    let top = path(0);
    let mut reach = BTreeSet::from([top.clone()]);
    let mut next = vec![top.clone()];
    while let Some(path) = next.pop() {
        if believed(&path) {
            let below = graph[&path].1.iter().filter(|r| !here.contains(r));
            next.extend(below.filter(|r| reach.insert((*r).clone())).cloned());
        }
    }
    // What is beyond is not made: signatures are most of the time, and who asked for it would be seen.
    let made = reach.iter().filter(|path| graph[*path].0 != Kind::Absent);
    let made = made.map(|path| (NarInfo::key(path), narinfo(path, &graph[path]).render().into_bytes()));
    let cache = Cache { objects: made.collect(), asked: Mutex::default() };
    let keys = if with_keys { vec![KEYS[0].public()] } else { Vec::new() };
    let mut lacking = |paths: &[StorePath]| Ok(paths.iter().filter(|p| !here.contains(p)).cloned().collect());
    let limits = WalkLimits::within(Duration::from_secs(600));
    let walked = walk(&cache, std::slice::from_ref(&top), &keys, &mut lacking, limits).expect("few paths");
    let mut asked = cache.asked.into_inner().expect("nobody panics");
    asked.sort();
    let may: BTreeSet<String> = reach.iter().map(NarInfo::key).collect();
    assert_eq!(asked, may.into_iter().collect::<Vec<_>>(), "each once, and no other");
    match walked.closure(&top) {
        Ok(order) => {
            let at: BTreeMap<&StorePath, usize> =
                order.iter().enumerate().map(|(n, f)| (&f.info.path, n)).collect();
            assert_eq!(at.len(), order.len());
            assert_eq!(at.keys().copied().collect::<BTreeSet<_>>(), reach.iter().collect(), "it is whole");
            assert!(reach.iter().all(believed));
            // In order, but for those that refer to each other in a circle.
            let reaches = |from: &StorePath, to: &StorePath| {
                let mut seen = BTreeSet::new();
                let mut next = vec![from.clone()];
                while let Some(path) = next.pop() {
                    if path == *to {
                        return true;
                    }
                    if seen.insert(path.clone()) {
                        next.extend(graph[&path].1.iter().filter(|r| !here.contains(r)).cloned());
                    }
                }
                false
            };
            for (path, place) in &at {
                for reference in graph[*path].1.iter().filter(|r| !here.contains(r) && !reaches(r, path)) {
                    assert!(at[reference] < *place, "{reference} comes after {path}");
                }
            }
        }
        Err((path, _)) => assert!(reach.contains(&path) && !believed(&path), "{path} is no fault"),
    }
    if reach.len() <= FEW {
        return;
    }
    let few = WalkLimits { paths: FEW, ..limits };
    let cache = Cache { asked: Mutex::default(), objects: cache.objects };
    let ended = walk(&cache, &[top], &keys, &mut lacking, few);
    let asked = cache.asked.into_inner().expect("nobody panics").len();
    assert!(
        asked <= FEW + REFERENCES * FEW && (ended.is_err() || asked == reach.len()),
        "{asked} asked: {ended:?}"
    );
}

/// What the cache says of a path that stands so.
fn narinfo(of: &StorePath, (kind, references): &(Kind, BTreeSet<StorePath>)) -> NarInfo {
    let mut info = NarInfo {
        path: if *kind == Kind::AboutAnother { path(PATHS) } else { of.clone() },
        url: "nar/x".into(),
        compression: Compression::Zstd,
        file_hash: None,
        file_size: None,
        nar_hash: Sha256::of(b""),
        nar_size: 1,
        references: references.clone(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    };
    match kind {
        Kind::Signed | Kind::AboutAnother => sign(&mut info, &KEYS[0]),
        Kind::Strangers => sign(&mut info, &KEYS[1]),
        Kind::Unsigned | Kind::Absent => {}
    }
    info
}
