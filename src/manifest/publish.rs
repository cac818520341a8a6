//! Writing the manifest: every write is a compare-and-swap that archives what it replaces, so that two people
//! publishing at once lose nothing and history only grows. What is changed is the caller's ([`super::edit`]).

use super::current::{self, COPY_BACK, CurrentManifest};
use super::edit;
use super::limits;
use super::lineage;
use super::model::{Change, MAX_BYTES, Manifest};
use super::signature;
use super::trust::{self, Author, RejectReason, TrustedVersion};
use super::types::{Ancestor, Digest, FORMAT_VERSION, MAX_SERIAL};
use super::validate::clashes;
use super::versions::{self, archive_key, archive_name};
use crate::error::{Error, Result};
use crate::log;
use crate::names::{ServiceName, StorePath};
use crate::random;
use crate::store::{self, Condition, Etag, MANIFEST_KEY, MAX_REPLACED, Store, StoreError};
use std::time::{Duration, Instant};

/// What a change may start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartingPoint {
    /// A manifest that can be read and is trusted; anything else is an error.
    Existing,
    /// The same, or an empty one where there never was one.
    OrEmpty,
    /// The same, or an empty one where there is none, also if there was one.
    Begin,
    /// Whatever is there, also what cannot be read or is not trusted (it is archived like any other), or nothing:
    /// the change brings the content. Not a manifest of a newer version.
    Replace,
    /// As `Replace`, and where what is there cannot be read or is not trusted, the change is made to the newest
    /// version that is.
    Repair,
}

/// What came of a change.
#[derive(Debug, Clone, PartialEq)]
pub struct PublishedManifest {
    /// The manifest in force.
    pub manifest: Manifest,
    /// As it is stored.
    pub bytes: Vec<u8>,
    /// Whether it was written; false: it said so already.
    pub written: bool,
}

/// As [`current::read`], and that nobody trusted has signed it is an error too.
pub fn read_trusted(author: &Author) -> Result<Manifest> {
    Ok(read_trusted_bytes(author)?.1)
}

/// As [`read_trusted`], with the text that it was read from.
pub fn read_trusted_bytes(author: &Author) -> Result<(Vec<u8>, Manifest)> {
    let current = current::load(author.store)?.ok_or_else(|| lost(author))?;
    author.check_trusted(&current)?;
    let (bytes, manifest) = current.into_parts();
    let manifest = manifest.map_err(|e| current::unusable(author.store, &e))?;
    author.remember(&bytes);
    Ok((bytes, manifest))
}

/// Whether there ever was a manifest in a store that has none now, as far as can be told.
fn ever(author: &Author) -> Result<bool> {
    Ok(author.remembered()?.is_some()
        || !versions::archived(author.store)?.is_empty()
        || current::obedient(author.store)?.is_some())
}

/// As [`current::missing`], of a store in which this machine has seen one: that is put back from here.
pub fn lost(author: &Author) -> Error {
    match author.remembered() {
        Ok(Some(seen)) => Error::new(format!(
            "no manifest in {} any more, and this machine has seen {} there; put it back with {}, or start again with \
             'deploy-manifest init'",
            author.store.url(),
            seen.describe(),
            trust::publish_again(&seen)
        )),
        Ok(None) => current::missing(author.store),
        Err(e) => e,
    }
}

/// Creates an empty manifest where there is none. That there was one before is an error unless `start` allows for it.
pub fn init(author: &Author, start: StartingPoint) -> Result<PublishedManifest> {
    swap(author, start, |_, current| Ok(current.is_none().then(|| "init".into())))
}

/// One service's new closure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathUpdate {
    /// The service.
    pub name: ServiceName,
    /// The closure's top path.
    pub path: StorePath,
    /// The commit it was built from.
    pub revision: Option<String>,
}

/// Publishes new closures of services, all in one version: `update ava, web`.
pub fn update(author: &Author, updates: &[PathUpdate]) -> Result<PublishedManifest> {
    publish(author, StartingPoint::Existing, |manifest| {
        let mut changed = Vec::new();
        for PathUpdate { name, path, revision } in updates {
            if edit::update(manifest, name.as_str(), path, revision.as_deref())? {
                changed.push(name.as_str());
            }
        }
        Ok((!changed.is_empty()).then(|| format!("update {}", changed.join(", "))))
    })
}

/// Changes the manifest and publishes the result as a new version. `change` gives the action in words, or None
/// when there is nothing to change; it is called again on what others wrote meanwhile. Ends within about a
/// minute, also when the store never takes the write.
pub fn publish(
    author: &Author,
    start: StartingPoint,
    mut change: impl FnMut(&mut Manifest) -> Result<Option<String>>,
) -> Result<PublishedManifest> {
    swap(author, start, |manifest, _| change(manifest))
}

/// Publishes the result in the place of what somebody was shown, whatever that is, and of nothing else (None: of
/// nothing); see [`publish`].
pub fn publish_over(
    author: &Author,
    shown: Option<&Etag>,
    mut change: impl FnMut(&mut Manifest) -> Result<Option<String>>,
) -> Result<PublishedManifest> {
    swap(author, StartingPoint::Replace, |manifest, current| {
        if current.map(|c| &c.etag) != shown {
            return Err(Error::new(format!(
                "the manifest in {} was changed meanwhile, and nothing was published; run it again",
                author.store.url()
            )));
        }
        change(manifest)
    })
}

/// Publishes what is in force, which nobody trusted has signed, as a new version of this machine's: `shown` is what
/// a person has looked at. Its content alone is taken over; which number the new one has, and which versions it
/// comes after, is not for a stranger to say.
pub fn adopt(author: &Author, shown: &Digest) -> Result<PublishedManifest> {
    swap(author, StartingPoint::Replace, |manifest, current| {
        let found = current.filter(|c| signature::digest(&c.bytes).as_ref() == Ok(shown));
        let there = found.and_then(|c| c.manifest().as_ref().ok()).ok_or_else(|| {
            Error::new(format!(
                "the manifest in {} was changed meanwhile, and nothing was signed; run it again",
                author.store.url()
            ))
        })?;
        if there.serial == manifest.serial {
            // The nearest first: of a long list the last are left out.
            manifest.previous.insert(0, Ancestor { serial: there.serial, digest: Some(*shown) });
        }
        edit::restore(manifest, there);
        Ok(Some(format!("sign version {}", there.serial)))
    })
}

fn swap(
    author: &Author,
    start: StartingPoint,
    mut change: impl FnMut(&mut Manifest, Option<&CurrentManifest>) -> Result<Option<String>>,
) -> Result<PublishedManifest> {
    let store = author.store;
    let mut contention = Contention::new();
    let mut tried: Option<PublishedManifest> = None;
    let wrote = |new: PublishedManifest| {
        author.remember(&new.bytes);
        Ok(new)
    };
    let limit = match start {
        StartingPoint::Repair | StartingPoint::Replace => MAX_REPLACED,
        StartingPoint::Existing | StartingPoint::OrEmpty | StartingPoint::Begin => MAX_BYTES,
    };
    loop {
        let began = Instant::now();
        let current = current::load_within(store, limit)?;
        if let Some(new) = tried.take()
            && landed(store, current.as_ref(), &new)?
        {
            return wrote(new);
        }
        let Base { mut manifest, replaced, in_force } = base(author, current.as_ref(), start)?;
        let Some(action) = change(&mut manifest, current.as_ref())? else {
            let Some((bytes, Ok(found))) = current.map(CurrentManifest::into_parts) else {
                return Ok(PublishedManifest { manifest, bytes: Vec::new(), written: false });
            };
            if in_force {
                author.remember(&bytes);
            }
            return Ok(PublishedManifest { manifest: found, bytes, written: false });
        };
        manifest.version = FORMAT_VERSION;
        manifest.serial += 1;
        manifest.previous = lineage::before(manifest.serial, std::mem::take(&mut manifest.previous));
        manifest.generation = manifest.generation.max((author.now)());
        manifest.change =
            Change { action, by: author.by.clone(), extra: std::mem::take(&mut manifest.change.extra) };
        clashes(&manifest)?;
        author.sign(&mut manifest)?;
        let bytes = manifest.to_bytes();
        check_size(&manifest, &bytes)?;
        store::before_writing(store, (author.now)())?;
        let when = match &current {
            None => Condition::IfAbsent,
            Some(current) => {
                archive(author, &replaced, &current.bytes)?;
                Condition::IfMatch(current.etag.clone())
            }
        };
        let new = PublishedManifest { manifest, bytes, written: true };
        match store.put(MANIFEST_KEY, &new.bytes, &when) {
            Ok(_) => {
                say_lost(author, &new.manifest);
                return wrote(new);
            }
            Err(StoreError::Changed(_)) => {
                tried = Some(new);
                contention.wait(began.elapsed(), current.map(|c| c.etag), store)?;
            }
            // Without an answer it may have taken place.
            Err(StoreError::Unreachable(why)) => {
                return match current::load(store).and_then(|c| landed(store, c.as_ref(), &new)) {
                    Ok(true) => wrote(new),
                    Ok(false) => Err(Error::new(why)),
                    Err(_) => Err(Error::new(format!(
                        "{why}; whether it was written is not known: see 'deploy-manifest list'"
                    ))),
                };
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// What a change starts from.
struct Base {
    /// `previous` has the versions that the next one comes after, as far as they are known.
    manifest: Manifest,
    /// The name that what is there is archived under.
    replaced: String,
    /// Whether it is what is in force.
    in_force: bool,
}

fn base(author: &Author, current: Option<&CurrentManifest>, start: StartingPoint) -> Result<Base> {
    let Some(found) = current else {
        let expected = match start {
            StartingPoint::Existing => true,
            StartingPoint::OrEmpty => ever(author)?,
            StartingPoint::Begin | StartingPoint::Replace | StartingPoint::Repair => false,
        };
        return if expected { Err(lost(author)) } else { rebuilt(author, None, start) };
    };
    let reason = author.reject_reason(found)?;
    let repairs = matches!(start, StartingPoint::Replace | StartingPoint::Repair);
    let seen = match &reason {
        Some(reason) if !repairs => return Err(author.rejection(found, reason)),
        // Whatever nobody trusted has signed says, also that a newer program wrote it.
        Some(RejectReason::Unsigned(_)) => return rebuilt(author, current, start),
        Some(RejectReason::PutBack(seen) | RejectReason::Fork(seen)) => Some(seen),
        None => None,
    };
    let archived_too = seen.is_some() || start == StartingPoint::Replace;
    let there = match found.manifest() {
        // With keys a number is what somebody trusted gave it.
        Ok(there) if there.serial < LAST_SERIAL || !archived_too => there,
        Err(why) if !repairs || why.is_newer_version() => return Err(current::unusable(author.store, why)),
        Ok(_) | Err(_) => return rebuilt(author, current, start),
    };
    let (mut from, mut serial) = (there, there.serial);
    let mut known =
        signature::digest(&found.bytes).map(|digest| lineage::line(there, digest)).unwrap_or_default();
    // Signed, and hosts have obeyed what it took the place of: the new version comes after both.
    if let Some(seen) = seen {
        known = lineage::join(&seen.line(), &known);
        serial = serial.max(seen.manifest.serial);
        if start == StartingPoint::Repair {
            from = &seen.manifest;
        }
    }
    // Where an old one was put back, hosts have obeyed what it took the place of, which is not in the archive.
    if archived_too
        && !author.trust.trusted.is_empty()
        && let Some(newest) = author.newest_archived()?
        && !known.contains(&newest.line()[0])
    {
        serial = serial.max(newest.manifest.serial + 1);
        known = lineage::join(&newest.line(), &known);
    }
    room_after(author.store, serial, MANIFEST_KEY)?;
    let manifest = Manifest { serial, previous: known, ..from.clone() };
    let replaced = archive_name(there.serial, there.generation);
    Ok(Base { manifest, replaced, in_force: seen.is_none() })
}

/// Says that nobody here knows what a new version took the place of: who does shall bring it back.
fn say_lost(author: &Author, manifest: &Manifest) {
    let Some(Ancestor { serial, digest: None }) = manifest.previous.first() else { return };
    if !author.trust.trusted.is_empty() {
        log::warning(format!(
            "warning: version {serial}, which this one replaces, is not known here: a host that has obeyed it \
             rejects this one, and on every other host what it changed is undone; that host's copy brings it back: \
             '{COPY_BACK}'"
        ));
    }
}

/// Where nothing is in force that could be built on: the number goes on from the highest there was, since a host
/// may have obeyed it. Of what nobody trusted has signed, or nobody has published, not even the number is taken.
fn rebuilt(author: &Author, found: Option<&CurrentManifest>, start: StartingPoint) -> Result<Base> {
    let trusting = !author.trust.trusted.is_empty();
    let remembered = author.remembered()?;
    let archived = if trusting { author.newest_archived()? } else { None };
    let highest = match (&archived, &remembered) {
        (Some(newest), _) => newest.manifest.serial,
        (None, Some(seen)) => seen.manifest.serial.saturating_sub(1),
        (None, None) => newest_name(author.store, trusting)?,
    };
    // What is lost or cannot be read was the one after that.
    let lost = if highest == 0 { 0 } else { highest + 1 };
    let head = found.and_then(|c| versions::head_of(&c.bytes));
    let said = head.as_ref().map(|h| h.serial).filter(|said| !trusting && *said < LAST_SERIAL);
    let serial = match (found, said) {
        (None, _) => lost,
        (Some(_), said) => said.map_or(highest + 1, |said| highest.max(said)),
    };
    let serial = serial.max(remembered.as_ref().map_or(0, |r| r.manifest.serial));
    room_after(author.store, serial, MANIFEST_KEY)?;
    let line =
        |version: &Option<TrustedVersion>| version.as_ref().map(TrustedVersion::line).unwrap_or_default();
    let previous = lineage::join(&line(&archived), &line(&remembered));
    let generation = head.map_or_else(author.now, |h| h.generation);
    let mut manifest = Manifest::empty((author.now)(), "");
    if start == StartingPoint::Repair
        && let Some(newest) = trust::newer(remembered, archived)
    {
        manifest = newest.manifest;
    }
    let manifest = Manifest { serial, previous, ..manifest };
    Ok(Base { manifest, replaced: archive_name(serial, generation), in_force: false })
}

/// The first serial that leaves no room for what is lost after it and the version that is written then.
const LAST_SERIAL: u64 = MAX_SERIAL - 1;

/// The highest number that nobody's signature vouches for and that is taken nevertheless, where there are keys: a
/// number that strangers chose shall leave room for all that come after it.
const MOST_UNSIGNED: u64 = 1 << 40;

/// The highest number among the names of the archived versions; 0 when there is none.
fn newest_name(store: &dyn Store, trusting: bool) -> Result<u64> {
    let archived = versions::archived(store)?;
    let Some(newest) = archived.iter().find(|v| !trusting || v.serial < MOST_UNSIGNED) else { return Ok(0) };
    room_after(store, newest.serial, &archive_key(&newest.name))?;
    Ok(newest.serial)
}

/// Refuses a serial that leaves no room: nobody published so many versions.
fn room_after(store: &dyn Store, serial: u64, key: &str) -> Result<()> {
    if serial < LAST_SERIAL {
        return Ok(());
    }
    Err(Error::new(format!(
        "{key} in {} is version {serial}, and the highest possible number is {MAX_SERIAL}: remove it if nobody \
         published it, otherwise start a new store",
        store.url()
    )))
}

fn archive(author: &Author, name: &str, bytes: &[u8]) -> Result<()> {
    let store = author.store;
    let key = archive_key(name);
    match store.put(&key, bytes, &Condition::IfAbsent) {
        Ok(_) => Ok(()),
        // Another writer, about to replace the same version, archived it; or somebody took its name.
        Err(StoreError::Changed(_)) => {
            if !author.trust.trusted.is_empty() && !holds(store, &key, bytes)? {
                log::warning(format!(
                    "warning: {key} in {} does not hold the version that is being replaced, of which the store has \
                     no other copy: check who can write to the store",
                    store.url()
                ));
            }
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

/// Whether an object has this content, maybe with other signatures.
fn holds(store: &dyn Store, key: &str, bytes: &[u8]) -> Result<bool> {
    match store.read(key, MAX_REPLACED) {
        Ok(Some(there)) => Ok(there == bytes
            || signature::digest(&there).is_ok_and(|there| signature::digest(bytes) == Ok(there))),
        Ok(None) | Err(StoreError::TooLarge(_)) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether a write that was answered with "changed" had taken place nevertheless: its answer was lost, and
/// the repeated request met our own version, in force or replaced by the next writer.
fn landed(store: &dyn Store, current: Option<&CurrentManifest>, new: &PublishedManifest) -> Result<bool> {
    let Some(current) = current else { return Ok(false) };
    if current.bytes == new.bytes {
        return Ok(true);
    }
    let Manifest { serial, generation, .. } = new.manifest;
    if !current.manifest().as_ref().is_ok_and(|c| c.serial > serial) {
        return Ok(false);
    }
    let archived = store.read(&archive_key(&archive_name(serial, generation)), MAX_BYTES)?;
    Ok(archived.is_some_and(|bytes| bytes == new.bytes))
}

fn check_size(manifest: &Manifest, bytes: &[u8]) -> Result<()> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::new(format!(
            "the manifest would have {} bytes, at most {MAX_BYTES} are read; take services or variables out",
            bytes.len()
        )));
    }
    limits::manifest(bytes).map_err(|e| Error::from(e).context("the manifest would be too large"))?;
    if manifest.serial > MAX_SERIAL {
        return Err(Error::new(format!(
            "the number of this version would be {}, and the highest possible one is {MAX_SERIAL}; start a new store",
            manifest.serial
        )));
    }
    Ok(())
}

/// The waiting of a writer that others were faster than. How long depends on how long an attempt takes here
/// (a directory, a bucket far away): first more, so that many writers share the store without
/// standing in one another's way, then less with every attempt, so that those who wait longest
/// come before those who have just begun.
struct Contention {
    started: Instant,
    attempts: u32,
    /// The version the store last refused to replace, and since when it has been that one.
    refused: (Option<Etag>, Instant),
}

/// How long a writer tries at most.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a store may refuse to replace a version that does not change, before it is said to be at fault.
const STUCK: Duration = Duration::from_secs(15);

impl Contention {
    fn new() -> Self {
        let now = Instant::now();
        Contention { started: now, attempts: 0, refused: (None, now) }
    }

    fn wait(&mut self, attempt: Duration, refused: Option<Etag>, store: &dyn Store) -> Result<()> {
        self.attempts += 1;
        if self.refused.0 != refused {
            self.refused = (refused, Instant::now());
        }
        if self.attempts > 4 && self.refused.1.elapsed() > STUCK {
            return Err(Error::new(format!(
                "{} has refused for {} s to replace {MANIFEST_KEY}, as if others had changed it, which nobody did; \
                 nothing was published; check the store with 'omni-deploy doctor'",
                store.url(),
                STUCK.as_secs()
            )));
        }
        if self.started.elapsed() > DEADLINE {
            return Err(Error::new(format!(
                "{} kept refusing for {} s: others changed {MANIFEST_KEY} before each of {} attempts; nothing \
                 was published; try again",
                store.url(),
                DEADLINE.as_secs(),
                self.attempts
            )));
        }
        let unit = attempt.clamp(Duration::from_millis(2), Duration::from_millis(500));
        const UNITS: [u32; 6] = [6, 12, 8, 6, 4, 3];
        let units = UNITS[(self.attempts as usize - 1).min(UNITS.len() - 1)];
        let most = (unit * units).min(Duration::from_secs(4));
        std::thread::sleep(most.mul_f64(random::fraction()));
        Ok(())
    }
}

/// Adds this machine's signature to the manifest as it is, which must be trusted already: its number stays, so
/// nothing is archived. Returns false when it was there.
pub fn add_signature(author: &Author) -> Result<bool> {
    let store = author.store;
    let key = author.signer()?;
    let mut contention = Contention::new();
    loop {
        let began = Instant::now();
        let current = current::load(store)?.ok_or_else(|| current::missing(store))?;
        author.check_trusted(&current)?;
        let manifest = current.manifest().as_ref().map_err(|e| current::unusable(store, e))?;
        if signature::check(&current.bytes, manifest, &store.identity(), &[key.public()]).is_ok() {
            return Ok(false);
        }
        let mut signed = manifest.clone();
        // A signature of other content vouches for nothing.
        signed.signatures.retain(|s| {
            let alone = Manifest { signatures: vec![s.clone()], ..manifest.clone() };
            signature::check(&current.bytes, &alone, &store.identity(), &author.trust.trusted).is_ok()
        });
        signature::sign(&mut signed, &store.identity(), key)?;
        store::before_writing(store, (author.now)())?;
        let bytes = signed.to_bytes();
        match store.put(MANIFEST_KEY, &bytes, &Condition::IfMatch(current.etag.clone())) {
            Ok(_) => {
                author.remember(&bytes);
                return Ok(true);
            }
            Err(StoreError::Changed(_)) => contention.wait(began.elapsed(), Some(current.etag), store)?,
            Err(e) => return Err(e.into()),
        }
    }
}

/// Says what came of a change: one line on stderr.
pub fn report(store: &dyn Store, published: &PublishedManifest) {
    let Manifest { serial, change, .. } = &published.manifest;
    match published.written {
        true => log::notice(format!("version {serial}: {} ({})", change.action, store.url())),
        false => log::info(format!("unchanged: version {serial} already says this ({})", store.url())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::keys::SecretKey;
    use crate::manifest::parse::{self, Mode};
    use crate::manifest::seen::Seen;
    use crate::manifest::signature::Trust;
    use crate::manifest::trust::whoami;
    use crate::store::GetResult;
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    /// A store in memory that does what a script says with the next writes of the manifest.
    #[derive(Default)]
    struct Scripted {
        objects: Mutex<BTreeMap<String, Vec<u8>>>,
        script: Mutex<Vec<Fault>>,
        puts: Mutex<u32>,
    }

    enum Fault {
        /// Somebody else writes this first.
        Overtaken(Vec<u8>),
        /// It is written, and the answer says that it was not.
        AnswerLost,
        /// It is written, somebody else writes the next version upon it, and the answer is lost.
        AnswerLostAndReplaced,
        /// It is written, and no answer comes.
        NoAnswer,
        /// It fails.
        Down,
    }

    fn ann(store: &dyn Store) -> Author<'_> {
        let (trust, seen) = (Trust::default(), Seen::default());
        Author { store, by: "ann@laptop".into(), trust, seen, at_hand: 0, now: NOW }
    }

    fn etag(bytes: &[u8]) -> Etag {
        Etag(crate::hash::Sha256::of(bytes).base16())
    }

    impl Scripted {
        fn current(&self) -> Manifest {
            parse::manifest(&self.objects.lock().unwrap()[MANIFEST_KEY], Mode::Strict).unwrap()
        }

        fn keys(&self) -> Vec<String> {
            self.objects.lock().unwrap().keys().cloned().collect()
        }
    }

    impl Store for Scripted {
        fn url(&self) -> String {
            "file:///test".into()
        }
        fn identity(&self) -> String {
            self.url()
        }
        fn get(&self, key: &str, _: Option<&Etag>, limit: u64) -> Result<GetResult, StoreError> {
            match self.objects.lock().unwrap().get(key) {
                None => Ok(GetResult::Missing),
                Some(bytes) if bytes.len() as u64 > limit => Err(StoreError::TooLarge("too large".into())),
                Some(bytes) => Ok(GetResult::Found { etag: etag(bytes), bytes: bytes.clone() }),
            }
        }
        fn read_from(&self, _: &str, _: u64, _: Option<&Etag>) -> Result<store::Opened, StoreError> {
            unreachable!()
        }
        fn write_from(&self, _: &str, _: &store::Upload<'_>) -> Result<(), StoreError> {
            unreachable!()
        }
        fn get_start(&self, key: &str, count: u64) -> Result<Option<Vec<u8>>, StoreError> {
            let objects = self.objects.lock().unwrap();
            Ok(objects.get(key).map(|b| b[..b.len().min(count as usize)].to_vec()))
        }
        fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
            Ok(self.objects.lock().unwrap().get(key).map(|b| b.len() as u64))
        }
        fn put(&self, key: &str, bytes: &[u8], when: &Condition) -> Result<Etag, StoreError> {
            let mut objects = self.objects.lock().unwrap();
            let fault = if key == MANIFEST_KEY { self.script.lock().unwrap().pop() } else { None };
            *self.puts.lock().unwrap() += u32::from(key == MANIFEST_KEY);
            if let Some(Fault::Overtaken(other)) = &fault {
                objects.insert(key.into(), other.clone());
            }
            let holds = match (when, objects.get(key)) {
                (Condition::Always, _) | (Condition::IfAbsent, None) => true,
                (Condition::IfMatch(e), Some(there)) => etag(there) == *e,
                (Condition::IfAbsent, Some(_)) | (Condition::IfMatch(_), None) => false,
            };
            if matches!(fault, Some(Fault::Down)) {
                return Err(StoreError::Unreachable("the store is down; try again".into()));
            }
            if !holds {
                return Err(StoreError::Changed("changed".into()));
            }
            objects.insert(key.into(), bytes.to_vec());
            match fault {
                Some(Fault::AnswerLost) => Err(StoreError::Changed("changed".into())),
                Some(Fault::NoAnswer) => Err(StoreError::Unreachable("no answer in time".into())),
                Some(Fault::AnswerLostAndReplaced) => {
                    let mut next = parse::manifest(bytes, Mode::Strict).unwrap();
                    objects.insert(archive_key(&archive_name(next.serial, next.generation)), bytes.to_vec());
                    next.serial += 1;
                    objects.insert(key.into(), next.to_bytes());
                    Err(StoreError::Changed("changed".into()))
                }
                _ => Ok(etag(bytes)),
            }
        }
        fn delete(&self, key: &str) -> Result<(), StoreError> {
            self.objects.lock().unwrap().remove(key);
            Ok(())
        }
        fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
            Ok(self.keys().into_iter().filter(|k| k.starts_with(prefix)).collect())
        }
    }

    const NOW: fn() -> Timestamp = || Timestamp(1_795_372_265);

    fn service(name: &str) -> crate::manifest::Service {
        let value = serde_json::json!({"name": name, "artifact": {"storePath": "/nix/store/placeholder"}, "hosts": ["biz"]});
        parse::service(value, Mode::Strict, None).unwrap()
    }

    fn add(store: &Scripted, name: &str) -> Result<PublishedManifest> {
        publish(&ann(store), StartingPoint::OrEmpty, |m| {
            edit::add(m, service(name))?;
            Ok(Some(format!("add-service {name}")))
        })
    }

    fn names(store: &Scripted) -> Vec<String> {
        store.current().services.iter().map(|s| s.name.to_string()).collect()
    }

    #[test]
    fn a_write_archives_what_it_replaces_byte_for_byte() {
        let store = Scripted::default();
        assert!(init(&ann(&store), StartingPoint::Begin).unwrap().written);
        assert!(!init(&ann(&store), StartingPoint::Begin).unwrap().written);
        let first = store.objects.lock().unwrap()[MANIFEST_KEY].clone();
        assert!(add(&store, "ava").unwrap().written);
        let key = "manifests/manifest-20261122T183105Z-00000001.json";
        assert_eq!(store.keys(), [MANIFEST_KEY, key]);
        assert_eq!(store.objects.lock().unwrap()[key], first);
        let now = store.current();
        assert_eq!(
            (now.serial, now.change.action.as_str(), now.change.by.as_str()),
            (2, "add-service ava", "ann@laptop")
        );
    }

    #[test]
    fn a_writer_that_was_overtaken_builds_on_what_the_other_wrote() {
        let store = Scripted::default();
        add(&store, "ava").unwrap();
        let mut other = store.current();
        other.serial += 1;
        other.services.push(service("web"));
        store.script.lock().unwrap().push(Fault::Overtaken(other.to_bytes()));
        assert_eq!(add(&store, "db").unwrap().manifest.serial, 3);
        assert_eq!(names(&store), ["ava", "web", "db"]);
    }

    #[test]
    fn a_write_whose_answer_was_lost_is_not_made_twice() {
        for fault in [Fault::AnswerLost, Fault::AnswerLostAndReplaced, Fault::NoAnswer] {
            let store = Scripted::default();
            add(&store, "ava").unwrap();
            store.script.lock().unwrap().push(fault);
            assert_eq!(add(&store, "db").unwrap().manifest.serial, 2);
            assert_eq!(names(&store), ["ava", "db"]);
            assert_eq!(*store.puts.lock().unwrap(), 2);
        }
    }

    #[test]
    fn a_store_that_fails_ends_the_write_with_its_own_words() {
        let store = Scripted::default();
        store.script.lock().unwrap().push(Fault::Down);
        assert!(add(&store, "ava").unwrap_err().to_string().contains("the store is down"));
        assert!(store.keys().is_empty());
    }

    #[test]
    fn nothing_to_change_writes_nothing() {
        let store = Scripted::default();
        add(&store, "ava").unwrap();
        let path = StorePath::parse("/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava").unwrap();
        let one = PathUpdate { name: ServiceName::parse("ava").unwrap(), path, revision: Some("abc".into()) };
        assert!(update(&ann(&store), std::slice::from_ref(&one)).unwrap().written);
        let before = store.keys();
        assert!(!update(&ann(&store), std::slice::from_ref(&one)).unwrap().written);
        assert!(!update(&ann(&store), &[PathUpdate { revision: None, ..one.clone() }]).unwrap().written);
        assert_eq!((store.keys(), store.current().services[0].revision.as_deref()), (before, Some("abc")));
        assert!(update(&ann(&store), &[PathUpdate { revision: Some("d".into()), ..one }]).unwrap().written);
    }

    #[test]
    fn the_time_of_a_version_never_goes_back() {
        let store = Scripted::default();
        add(&store, "ava").unwrap();
        let earlier = Author { now: || Timestamp(1_000_000), ..ann(&store) };
        publish(&earlier, StartingPoint::Existing, |m| edit::remove(m, "ava").map(|()| Some("x".into())))
            .unwrap();
        assert_eq!(store.current().generation, NOW());
    }

    #[test]
    fn what_cannot_be_read_is_never_written_over_but_by_a_repair_which_archives_it() {
        let store = Scripted::default();
        add(&store, "ava").unwrap();
        add(&store, "web").unwrap();
        store.objects.lock().unwrap().insert(MANIFEST_KEY.into(), b"{\"version\": 1, ".to_vec());
        let e = add(&store, "db").unwrap_err().to_string();
        assert!(e.contains("cut off") && e.contains("rollback"), "{e}");
        let repaired = publish(&ann(&store), StartingPoint::Repair, |_| Ok(Some("mend".into()))).unwrap();
        assert_eq!(repaired.manifest.serial, 3);
        assert_eq!(
            store.objects.lock().unwrap()["manifests/manifest-20261122T183105Z-00000002.json"],
            b"{\"version\": 1, "
        );
        store.objects.lock().unwrap().insert(MANIFEST_KEY.into(), b"{\"version\": 2}".to_vec());
        for start in [StartingPoint::Existing, StartingPoint::OrEmpty, StartingPoint::Repair] {
            let e = publish(&ann(&store), start, |_| Ok(Some("x".into()))).unwrap_err().to_string();
            assert!(e.contains("newer omni-deploy; upgrade"), "{e}");
        }
    }

    #[test]
    fn what_is_too_large_to_be_read_can_be_rolled_back() {
        let store = Scripted::default();
        add(&store, "ava").unwrap();
        let mut padded = store.current().to_bytes();
        padded.resize(MAX_BYTES as usize + 1, b' ');
        store.objects.lock().unwrap().insert(MANIFEST_KEY.into(), padded);
        let e = add(&store, "db").unwrap_err().to_string();
        assert!(e.contains("deploy-manifest rollback"), "{e}");
        let repaired = publish(&ann(&store), StartingPoint::Replace, |_| Ok(Some("mend".into()))).unwrap();
        assert_eq!((repaired.manifest.serial, store.current().serial), (2, 2));
    }

    /// Ann with a key that signs and is trusted.
    fn with_key(store: &dyn Store) -> Author<'_> {
        let key = SecretKey::generate("ann-1").unwrap();
        let trust = Trust { trusted: vec![key.public()], signer: Some(key) };
        Author { trust, ..ann(store) }
    }

    #[test]
    fn what_was_written_is_remembered_also_without_an_answer_and_nothing_older_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Scripted::default();
        let author = Author { seen: Seen::below(dir.path(), &store.url()), ..with_key(&store) };
        let add = |name: &str| {
            publish(&author, StartingPoint::OrEmpty, |m| {
                edit::add(m, service(name))?;
                Ok(Some(format!("add-service {name}")))
            })
            .unwrap()
        };
        let seen = || author.remembered().unwrap().unwrap().manifest.serial;
        add("a");
        let first = store.objects.lock().unwrap()[MANIFEST_KEY].clone();
        store.script.lock().unwrap().push(Fault::NoAnswer);
        add("b");
        assert_eq!(seen(), 2);
        // Another call of this user, which read before and is done later.
        author.remember(&first);
        assert_eq!(seen(), 2);
        author.accept(&first);
        assert_eq!(seen(), 1);
    }

    #[test]
    fn what_a_stranger_has_put_in_the_place_of_an_old_version_is_no_copy_of_it() {
        let store = Scripted::default();
        let author = with_key(&store);
        let publish = |name: &str| {
            publish(&author, StartingPoint::OrEmpty, |m| {
                edit::add(m, service(name))?;
                Ok(Some(format!("add-service {name}")))
            })
            .unwrap()
        };
        publish("a");
        let (key, bytes) = {
            let objects = store.objects.lock().unwrap();
            let Manifest { serial, generation, .. } =
                parse::manifest(&objects[MANIFEST_KEY], Mode::Strict).unwrap();
            (archive_key(&archive_name(serial, generation)), objects[MANIFEST_KEY].clone())
        };
        let put = |bytes: &[u8]| store.objects.lock().unwrap().insert(key.clone(), bytes.to_vec());
        put(&bytes);
        assert!(holds(&store, &key, &bytes).unwrap());
        let mut more = store.current();
        signature::sign(&mut more, "file:///test", &SecretKey::generate("bob-1").unwrap()).unwrap();
        put(&more.to_bytes());
        assert!(holds(&store, &key, &bytes).unwrap(), "another signature");
        more.extra.insert("forged".into(), true.into());
        put(&more.to_bytes());
        assert!(!holds(&store, &key, &bytes).unwrap());
        put(b"");
        assert!(!holds(&store, &key, &bytes).unwrap());
        publish("b");
    }

    #[test]
    fn nobody_without_a_key_drives_the_serial() {
        let add = |author: &Author, name: &str| {
            publish(author, StartingPoint::OrEmpty, |m| {
                edit::add(m, service(name))?;
                Ok(Some(format!("add-service {name}")))
            })
            .unwrap()
        };
        let replace = |author: &Author| publish(author, StartingPoint::Replace, |_| Ok(Some("mend".into())));
        let forged = |store: &Scripted, serial: u64| {
            let mut manifest = store.current();
            manifest.serial = serial;
            manifest.extra.insert("forged".into(), true.into());
            manifest.to_bytes()
        };
        let name = |serial: u64| format!("manifests/manifest-20261122T183105Z-{serial:08}.json");
        type Attack = fn(&Scripted, &dyn Fn(&Scripted, u64) -> Vec<u8>, &dyn Fn(u64) -> String);
        fn put(store: &Scripted, bytes: Vec<u8>) {
            store.objects.lock().unwrap().insert(MANIFEST_KEY.into(), bytes);
        }
        let attacks: [Attack; 6] = [
            |s, f, _| put(s, f(s, MAX_SERIAL)),
            |s, f, _| put(s, f(s, 1_000_000)),
            |s, _, _| {
                let text = format!("{{\"serial\": {}, \"generation\": \"2026-11-22T18:31:05Z\", ", u64::MAX);
                put(s, text.into_bytes());
            },
            |s, f, n| {
                let bytes = f(s, 1_000_000);
                let mut objects = s.objects.lock().unwrap();
                objects.insert(n(1_000_000), bytes);
                objects.remove(MANIFEST_KEY);
            },
            |s, _, n| {
                let mut objects = s.objects.lock().unwrap();
                objects.insert(n(u64::MAX), Vec::new());
                objects.insert(n(MAX_SERIAL), Vec::new());
                objects.remove(MANIFEST_KEY);
            },
            |s, _, n| {
                let mut objects = s.objects.lock().unwrap();
                objects.insert(n(u64::MAX), Vec::new());
                objects.insert(MANIFEST_KEY.into(), b"garbage".to_vec());
            },
        ];
        for (number, attack) in attacks.iter().enumerate() {
            let store = Scripted::default();
            let author = with_key(&store);
            for name in ["a", "b", "c", "d"] {
                add(&author, name);
            }
            // The versions 1 to 3 are archived; 4, which was lost or replaced, may have been seen by a host.
            attack(&store, &forged, &name);
            let mended = replace(&author).unwrap_or_else(|e| panic!("attack {number}: {e}")).manifest;
            assert_eq!(mended.serial, 5, "attack {number}");
            assert!(mended.extra.is_empty(), "attack {number}: {:?}", mended.extra);
            assert_eq!(add(&author, "e").manifest.serial, 6, "attack {number}");
        }
        // More forged versions than are read: they are named.
        let store = Scripted::default();
        let author = with_key(&store);
        add(&author, "a");
        for serial in 0..300 {
            store.objects.lock().unwrap().insert(name(1_000 + serial), Vec::new());
        }
        store.objects.lock().unwrap().remove(MANIFEST_KEY);
        let e = replace(&author).unwrap_err().to_string();
        assert!(e.contains(&name(1_299)) && e.contains("remove what nobody published"), "{e}");
    }

    #[test]
    fn a_serial_that_leaves_no_room_is_named_with_its_object() {
        let store = Scripted::default();
        add(&store, "ava").unwrap();
        let name = format!("manifests/manifest-20261122T183105Z-{}.json", MAX_SERIAL - 1);
        let mut manifest = store.current();
        manifest.serial = MAX_SERIAL - 1;
        store.objects.lock().unwrap().insert(MANIFEST_KEY.into(), manifest.to_bytes());
        let e = add(&store, "web").unwrap_err().to_string();
        assert!(e.contains("manifest.json in file:///test is version 9007199254740990"), "{e}");
        // There is a way out of it that needs no hand in the store, unless an archived version says the same.
        store.objects.lock().unwrap().insert(name.clone(), Vec::new());
        let replace = || publish(&ann(&store), StartingPoint::Replace, |_| Ok(Some("mend".into())));
        let e = replace().unwrap_err().to_string();
        assert!(e.contains(&name) && e.contains("remove it if nobody published it"), "{e}");
        store.objects.lock().unwrap().remove(&name);
        assert!(replace().unwrap().manifest.serial < 10);
    }

    #[test]
    fn a_manifest_that_was_lost_goes_on_from_the_highest_serial_there_was() {
        let store = Scripted::default();
        for name in ["a", "b", "c"] {
            add(&store, name).unwrap();
        }
        store.objects.lock().unwrap().remove(MANIFEST_KEY);
        let e = update(&ann(&store), &[]).unwrap_err().to_string();
        assert!(
            e.contains("no manifest in file:///test any more")
                && e.contains("'deploy-manifest rollback manifest-"),
            "{e}"
        );
        assert_eq!(
            init(&ann(&store), StartingPoint::Begin).unwrap().manifest.serial,
            4,
            "hosts may have seen 3"
        );
    }

    #[test]
    fn the_author_is_plain() {
        let by = whoami();
        assert!(
            by.contains('@') && by.chars().all(|c| c.is_ascii_alphanumeric() || "@._-".contains(c)),
            "{by}"
        );
    }
}
