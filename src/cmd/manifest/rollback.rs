//! `rollback`: an older version, or one service of it, published as a new one.

use super::read::only_version;
use super::sign::confirmed;
use super::{InForce, STDIN, Session, change, input};
use crate::clock::Timestamp;
use crate::error::{Error, Result};
use crate::log;
use crate::manifest::current;
use crate::manifest::diff::{Difference, diff};
use crate::manifest::edit;
use crate::manifest::lineage::{self, Relation};
use crate::manifest::model::Manifest;
use crate::manifest::newest::{enough_for, newest};
use crate::manifest::publish::{self, StartingPoint};
use crate::manifest::signature::{self, ReadError};
use crate::manifest::trust::{self, Author, RejectReason, TrustedVersion};
use crate::manifest::versions::{self, Version};
use std::io::IsTerminal;

pub(super) fn rollback(session: &Session, word: Option<&str>, yes: bool) -> Result<()> {
    if let Some(word) = word.filter(|w| *w == STDIN || w.starts_with('@')) {
        return rollback_to_copy(session, input(word)?, yes);
    }
    let author = session.author()?;
    let store = author.store;
    let in_force = InForce::of(&author)?;
    // What is off is looked for among all of them.
    let versions = match in_force.current.is_some() && in_force.reason.is_none() {
        true => enough_for(store, word.as_slice())?,
        false => versions::all(store)?,
    };
    // An old one that was put back is left behind also when it says the same: hosts do not obey it.
    let outrun = |serial: u64| versions.iter().any(|v| v.serial > serial);
    let outrun =
        in_force.reason.is_some() || versions.iter().find(|v| v.current).is_some_and(|v| outrun(v.serial));
    let restore = |manifest: &mut Manifest, old: &Manifest, name: &str| {
        // A repair starts from nothing, and restoring nothing is a change there.
        let repaired = manifest.change.by.is_empty();
        let changed = edit::restore(manifest, old) || repaired || outrun;
        changed.then(|| format!("rollback to {name} (version {})", old.serial))
    };
    let Some(word) = word else {
        let old = version_before(&author, &versions, &in_force)?;
        let to = old.describe();
        match in_force.trusted() {
            None => log::notice(format!("back to {to}")),
            Some(there) => {
                log::notice(format!("from {} back to {to}:", trust::describe(there)));
                show_differences(diff(there, &old.manifest).iter());
            }
        }
        let shown = in_force.current.map(|current| current.etag);
        if !yes && !confirmed("Publish that?")? {
            return Err(Error::new("nothing was published"));
        }
        let published = publish::publish_over(&author, shown.as_ref(), |manifest| {
            Ok(restore(manifest, &old.manifest, &old.name()))
        })?;
        publish::report(store, &published);
        return Ok(());
    };
    let version = rollback_target(&author, &versions, word)?;
    let (old, _) = versions::read_trusted(store, version, &author.trust.trusted)?;
    drop(in_force);
    change(&author, StartingPoint::Replace, |manifest| Ok(restore(manifest, &old, &version.name)))?;
    Ok(())
}

/// How many differences are shown before something is published.
pub(super) const SHOWN: usize = 30;

pub(super) fn show_differences<'a>(mut differences: impl Iterator<Item = &'a Difference>) {
    for difference in differences.by_ref().take(SHOWN) {
        log::notice(format!("  {difference}"));
    }
    match differences.count() {
        0 => {}
        more => log::notice(format!("  and {more} more")),
    }
}

/// What a rollback goes to when nothing was named, and its name: the last version before the one in force that says
/// something else; where that is not trusted or is lost, the newest that is.
pub(super) fn version_before(
    author: &Author,
    versions: &[Version],
    in_force: &InForce,
) -> Result<TrustedVersion> {
    let store = author.store;
    if let (Some(current), Some(there)) = (&in_force.current, in_force.trusted()) {
        let before = there.previous.first().filter(|a| a.serial + 1 == there.serial && a.digest.is_some());
        let digest = signature::digest(&current.bytes).ok();
        let otherwise = |old: &Manifest| old.services != there.services || old.extra != there.extra;
        let search = author.before(versions, there, digest.as_ref(), otherwise)?;
        let none = match versions.iter().any(|v| v.serial < there.serial) {
            true => {
                Error::new(format!("no version before the current one in {} differs from it", store.url()))
            }
            false => only_version(store),
        };
        if let Some(before) = before.filter(|b| search.found.is_some() && !search.met.contains(&b.serial)) {
            log::warning(format!(
                "warning: version {}, the previous one, is no longer among the old ones",
                before.serial
            ));
        }
        return search.found_or(none);
    }
    if let (Some(current), Some(reason @ (RejectReason::PutBack(_) | RejectReason::Fork(_)))) =
        (&in_force.current, &in_force.reason)
    {
        return Err(author.rejection(current, reason));
    }
    if let Some(newest) = author.newest_trusted()? {
        return Ok(newest);
    }
    let all = Manifest { serial: u64::MAX, ..Manifest::empty(Timestamp::default(), "") };
    let none = match &in_force.current {
        None => current::missing(store),
        Some(current) => match current.manifest() {
            Err(e) if in_force.reason.is_none() => Error::new(format!("{e}, and {}", only_version(store))),
            _ => only_version(store),
        },
    };
    author.before(versions, &all, None, |_| true)?.found_or(none)
}

/// Publishes a copy of a version from somewhere else, above every serial that it shows to have been there.
pub(super) fn rollback_to_copy(session: &Session, bytes: Vec<u8>, yes: bool) -> Result<()> {
    let mut author = session.author()?;
    let store = author.store;
    let read = author.read(bytes);
    let copy = read.map_err(|e| match e {
        ReadError::Signature(why) => Error::new(format!(
            "the copy is not to be trusted in {}: {why}; take one that a host of this store has kept",
            store.url()
        )),
        ReadError::Manifest(e) => Error::from(e).context("the copy"),
    })?;
    let TrustedVersion { manifest: Manifest { serial, .. }, digest, .. } = copy;
    author.at_hand = serial;
    let line = copy.line();
    let in_force = InForce::of(&author)?;
    // Who can write the store can hold a host at an old version, take the newest away, and wait for somebody to put
    // that host's copy back.
    let newest = match in_force.trusted() {
        Some(_) => None,
        None => author.newest_trusted()?,
    };
    if let Some(newest) = newest.filter(|newest| newest.comes_after(&copy)) {
        return Err(Error::new(format!(
            "the copy is {}, and {} is newer: publish that with {}, and then, if the older one should be in force \
             after all, the copy",
            copy.describe(),
            newest.describe(),
            trust::publish_again(&newest)
        )));
    }
    if let Some(there) = in_force.signed() {
        log::notice(format!("from {} to the copy of {}:", trust::describe(there), copy.describe()));
        show_differences(diff(there, &copy.manifest).iter());
    }
    let trusting = !author.trust.trusted.is_empty();
    // A host says that its copy be put back, and it may be nobody's host any more.
    if let (Some(there), Some(current)) = (in_force.trusted().filter(|_| trusting && !yes), &in_force.current)
        && let Ok(of_current) = signature::digest(&current.bytes)
        && lineage::relation(there, &of_current, serial, &digest) == Relation::Later
        && !(std::io::stdin().is_terminal() && confirmed("Publish that?")?)
    {
        return Err(Error::new(format!(
            "nothing was published: {} is in force, and it comes after the copy, which is {}; to undo what is between \
             them, add '-y'",
            trust::describe(there),
            copy.describe()
        )));
    }
    drop(in_force);
    change(&author, StartingPoint::Replace, |manifest| {
        // Whoever has obeyed the copy knows that the new version comes after it.
        let behind = manifest.serial < serial || trusting && !manifest.previous.contains(&line[0]);
        manifest.previous = lineage::join(&line, &manifest.previous);
        manifest.serial = manifest.serial.max(serial);
        let changed = edit::restore(manifest, &copy.manifest) || behind || manifest.change.by.is_empty();
        Ok(changed.then(|| format!("rollback to a copy of version {serial}")))
    })?;
    Ok(())
}

/// The version in force is what one rolls back from: it does not make a beginning ambiguous. Nor does what is not
/// trusted.
pub(super) fn rollback_target<'a>(
    author: &Author,
    versions: &'a [Version],
    word: &str,
) -> Result<&'a Version> {
    let older: Vec<Version> = versions.iter().filter(|v| !v.current).cloned().collect();
    let counts = |version: &Version| Ok(author.examine(version)?.is_ok());
    let name = match versions::find_where(&older, word, counts) {
        Ok(found) => found.name.clone(),
        // Only the current one fits: then there is nothing to do, which is said later.
        Err(e) => versions::find(author.store, versions, word).map_err(|_| e)?.name.clone(),
    };
    versions.iter().find(|v| v.name == name).ok_or_else(|| Error::new(format!("no version '{word}'")))
}

pub(super) fn rollback_service(session: &Session, word: Option<&str>, name: &str, yes: bool) -> Result<()> {
    if word.is_some_and(|w| w == STDIN || w.starts_with('@')) {
        return Err(Error::usage("a copy from a file or stdin is put back whole; leave --service out"));
    }
    let author = session.author()?;
    let store = author.store;
    let (version, old) = match word {
        Some(word) => {
            let versions = enough_for(store, &[word])?;
            let version = rollback_target(&author, &versions, word)?;
            (version.name.clone(), versions::read_trusted(store, version, &author.trust.trusted)?.0)
        }
        None => {
            let versions = newest(store, trust::SEARCHED)?.versions;
            let (bytes, now) = publish::read_trusted_bytes(&author)?;
            let entry = now.service(name).ok_or_else(|| edit::unknown_service(name, &now))?;
            let digest = signature::digest(&bytes).ok();
            let otherwise = |old: &Manifest| old.service(name).is_some_and(|o| o != entry);
            let mut search = author.before(&versions, &now, digest.as_ref(), otherwise)?;
            let undone = search.after.take().unwrap_or_else(|| trust::describe(&now));
            let found = search.found_or(Error::new(format!(
                "no version before the current one has a different '{name}'"
            )))?;
            log::notice(format!("{name} as it was before {undone}, in {}:", found.describe()));
            let of_it = |d: &Difference| d.service().is_some_and(|service| service.as_str() == name);
            show_differences(diff(&now, &found.manifest).iter().filter(|d| of_it(d)));
            if !yes && !confirmed("Publish that?")? {
                return Err(Error::new("nothing was published"));
            }
            (found.name(), found.manifest)
        }
    };
    change(&author, StartingPoint::Existing, |manifest| {
        let changed = edit::restore_service(manifest, &old, name)?;
        Ok(changed.then(|| format!("rollback {name} to {version} (version {})", old.serial)))
    })?;
    Ok(())
}
