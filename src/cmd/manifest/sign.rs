//! `sign` and `verify`: who vouches for the version in force.

use super::super::print;
use super::Session;
use super::read::none_in_force;
use crate::error::{Error, Result};
use crate::log;
use crate::manifest::diff::{Difference, diff};
use crate::manifest::model::Manifest;
use crate::manifest::newest::enough_for;
use crate::manifest::signature::{self, Trust};
use crate::manifest::trust::{self, Author, RejectReason};
use crate::manifest::versions;
use crate::manifest::{current, publish};
use std::io::IsTerminal;

/// Prints the names of the trusted keys that signed a version.
pub(super) fn verify(session: &Session, word: Option<&str>) -> Result<()> {
    let Session { settings, store } = *session;
    let mut trusted = signature::trusted(settings)?;
    trusted.extend(Trust::of(settings)?.signer.map(|key| key.public()));
    if trusted.is_empty() {
        return Err(Error::new("there is no key to verify with; set 'trustedPublicKeys' or 'secretKeyFile'"));
    }
    let versions = enough_for(store, word.as_slice())?;
    let version = match word {
        Some(word) => versions::find(store, &versions, word)?,
        None => match versions.iter().find(|v| v.current) {
            Some(version) => version,
            None => return Err(none_in_force(&session.author()?)),
        },
    };
    if version.current {
        publish::read_trusted(&session.author()?)?;
    }
    let (_, mut names) = versions::read_trusted(store, version, &trusted)?;
    names.sort();
    names.dedup();
    print(&names.iter().map(|name| format!("{}\n", log::printable(name))).collect::<String>())
}

/// Believes the version in force, of this number, from now on.
pub(super) fn accept(session: &Session, number: u64) -> Result<()> {
    let author = session.author()?;
    let store = author.store;
    if author.trust.trusted.is_empty() {
        return Err(Error::new(
            "nothing is remembered without 'trustedPublicKeys': there is nothing to accept",
        ));
    }
    let current = current::load(store)?.ok_or_else(|| current::missing(store))?;
    match author.reject_reason(&current)? {
        Some(reason @ RejectReason::Unsigned(_)) => return Err(author.rejection(&current, &reason)),
        Some(RejectReason::PutBack(_) | RejectReason::Fork(_)) | None => {}
    }
    let there = current.manifest().as_ref().map_err(|e| current::unusable(store, e))?;
    if there.serial != number {
        return Err(Error::new(format!(
            "the manifest in {} is {}, not version {number}; nothing was accepted",
            store.url(),
            trust::describe(there)
        )));
    }
    author.accept(&current.bytes);
    log::notice(format!(
        "accepted: this machine trusts {} from now on ({})",
        trust::describe(there),
        store.url()
    ));
    Ok(())
}

/// Signs what is in force: as it is if it is trusted; else as a new version, after a person has seen what it is.
pub(super) fn sign(session: &Session, hash: Option<&str>) -> Result<()> {
    let author = session.author()?;
    let store = author.store;
    author.signer()?;
    let url = store.url();
    let current = current::load(store)?.ok_or_else(|| current::missing(store))?;
    let why = match author.reject_reason(&current)? {
        None => {
            match publish::add_signature(&author)? {
                true => log::notice(format!("signed ({url})")),
                false => log::info(format!("unchanged: it has this key's signature already ({url})")),
            }
            return Ok(());
        }
        Some(RejectReason::Unsigned(why)) => why,
        Some(reason) => return Err(author.rejection(&current, &reason)),
    };
    let there = current.manifest().as_ref().map_err(|e| current::unusable(store, e))?;
    let digest = signature::digest(&current.bytes).map_err(Error::new)?;
    match hash {
        // Whole: two documents whose hashes begin alike are soon found, and one of them could be shown.
        Some(hash) if digest.to_string() == hash => {}
        Some(hash) => {
            return Err(Error::new(format!(
                "the manifest in {url} has the hash {digest}, not {hash}; look at it again with 'deploy-manifest sign'"
            )));
        }
        None => show_unsigned(&author, there, &why)?,
    }
    if let Some(RejectReason::PutBack(seen) | RejectReason::Fork(seen)) = author.contradicts_seen(&current)? {
        return Err(Error::new(format!(
            "no host that obeyed {} takes this one, whoever signs it; go back with 'deploy-manifest \
             rollback', then make the changes that are right again",
            seen.describe()
        )));
    }
    if hash.is_none() && !std::io::stdin().is_terminal() {
        return Err(Error::new(format!(
            "nothing was signed; if all of it is right, 'deploy-manifest sign --hash {digest}'"
        )));
    }
    if hash.is_none() && !confirmed("Is all of it right, and should it be signed?")? {
        return Err(Error::new("nothing was signed"));
    }
    publish::report(store, &publish::adopt(&author, &digest)?);
    Ok(())
}

/// Shows what differs from the newest version that is trusted.
pub(super) fn show_unsigned(author: &Author, there: &Manifest, why: &str) -> Result<()> {
    let url = author.store.url();
    log::warning(format!("{} in {url} is not to be trusted: {why}", trust::describe(there)));
    let empty = Manifest::empty(there.generation, "");
    let newest = author.newest_trusted()?;
    match &newest {
        Some(newest) => {
            log::warning(format!("it differs from {}, the newest that is trusted, in:", newest.describe()))
        }
        None => log::warning("no version here is signed by a trusted key, so all of it is new:"),
    }
    for difference in diff(newest.as_ref().map_or(&empty, |n| &n.manifest), there) {
        log::warning(format!("  {difference:#}"));
        if let (Difference::Added(_), Some(service)) =
            (&difference, difference.service().and_then(|n| there.service(n.as_str())))
        {
            let entry = serde_json::to_string_pretty(service).unwrap_or_default();
            entry.lines().for_each(|line| log::warning(format!("    {}", log::printable(line))));
        }
    }
    Ok(())
}

/// Whether a person says yes; where nobody is there to be asked, what was typed was meant.
pub(super) fn confirmed(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(true);
    }
    log::notice(format!("{question} [y/N]"));
    let mut answer = String::new();
    std::io::stdin()
        .read_line(&mut answer)
        .map_err(|e| Error::new(format!("cannot read the answer: {e}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
