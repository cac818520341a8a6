//! `edit`: a text for the person's editor, and what became of it published.

use super::super::editor;
use super::{Session, change, some_of};
use crate::durable;
use crate::error::{Error, Result};
use crate::log;
use crate::manifest::current::{self, COPY_BACK, CurrentManifest};
use crate::manifest::diff::diff;
use crate::manifest::parse::{self, Mode};
use crate::manifest::publish::{self, StartingPoint};
use crate::manifest::signature::{self, ReadError};
use crate::manifest::trust::{Author, RejectReason};
use crate::manifest::{edit, json};
use crate::names::ServiceName;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The name beside a kept draft of the text that it was made from.
pub(super) const BASE: &str = "base.json";

pub(super) fn edit_text(session: &Session) -> Result<()> {
    let author = session.author()?;
    let current = current::load(author.store)?.ok_or_else(|| publish::lost(&author))?;
    let (text, next) = edit_base(&author, &current)?;
    let folder = durable::scratch(&std::env::temp_dir())?;
    let file = folder.path().join("manifest.json");
    durable::write(&file, &text, 0o600)?;
    let result = match editor::edit(&file, editor::Traces::Kept) {
        Ok(bytes) if bytes == text => {
            log::info(format!("unchanged: nothing was published{next}"));
            return Ok(());
        }
        Ok(bytes) => publish_edited(session, &bytes, &text),
        Err(e) => Err(e),
    };
    if result.is_err() && fs_err::read(&file).is_ok_and(|edited| edited != text) {
        durable::write(&folder.path().join(BASE), &text, 0o600)?;
        let kept = folder.keep().join("manifest.json");
        return result.map_err(|e| {
            let kept = kept.display();
            Error::new(format!(
                "{e}; your text is kept in {kept}: correct it there, then 'deploy-manifest edit --draft {kept}'"
            ))
        });
    }
    result
}

/// The text that an edit starts from, and what to do where it is left as it is: that of the version in force, or of the
/// newest that is trusted. Says what is in force besides, where that is not what the edit starts from.
fn edit_base(author: &Author, current: &CurrentManifest) -> Result<(Vec<u8>, &'static str)> {
    let url = author.store.url();
    let trusting = !author.trust.trusted.is_empty();
    let why = match (author.reject_reason(current)?, current.manifest()) {
        (Some(RejectReason::Unsigned(why)), _) => {
            format!("the manifest in {url} is not to be trusted: {why}")
        }
        (Some(reason), _) => return Err(author.rejection(current, &reason)),
        (None, Ok(_)) => return Ok((json::pretty(&current.bytes), "")),
        (None, Err(e)) if e.is_newer_version() => return Err(current::unusable(author.store, e)),
        (None, Err(e)) if !trusting => {
            log::warning(format!("warning: the manifest in {url} cannot be used: {e}"));
            // No manifest, and nothing to tell a better one by.
            return Ok((current.bytes.clone(), ""));
        }
        (None, Err(e)) => format!("the manifest in {url} cannot be used: {e}"),
    };
    let Some(newest) = author.newest_trusted()? else {
        return Err(Error::new(format!(
            "{why}, and no version before it is signed by a key in 'trustedPublicKeys'; put back the copy that a host \
             has kept ('{COPY_BACK}') or one of your own ('deploy-manifest rollback @FILE'); or look at what is there \
             ('deploy-manifest show'), and if all of it is right, 'deploy-manifest sign'"
        )));
    };
    log::warning(format!("warning: {why}; you edit {}, the newest that is trusted", newest.describe()));
    match current.manifest() {
        Ok(there) => {
            log::warning("what is in force differs from it in this, which nobody trusted has signed:");
            for difference in diff(&newest.manifest, there) {
                log::warning(format!("  {difference}"));
            }
        }
        Err(_) => log::warning("what is in force can be looked at with 'deploy-manifest show'"),
    }
    Ok((json::pretty(&newest.bytes), "; 'deploy-manifest rollback' publishes it as it was"))
}

/// Reads a file of a draft. What is signed must be this user's own: a draft is kept where everybody can write, and once
/// it was cleaned away there, anybody can make one of its name.
pub(super) fn own(file: &Path) -> Result<Vec<u8>> {
    let user = rustix::process::geteuid().as_raw();
    let foreign = |what: &Path, why: String| {
        Error::new(format!(
            "{} {why}, so it may not be your text; open 'deploy-manifest edit' and make the changes there",
            what.display()
        ))
    };
    let judge = |what: &Path, found: std::fs::Metadata| match (found.uid() == user, found.mode() & 0o022) {
        (false, _) => Err(foreign(what, format!("belongs to the user {}", found.uid()))),
        (true, 0) => Ok(()),
        (true, _) => {
            Err(foreign(what, format!("can be written by others (mode {:o})", found.mode() & 0o7777)))
        }
    };
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    judge(folder, fs_err::symlink_metadata(folder)?)?;
    let mut opened = fs_err::File::open(file)?;
    judge(file, opened.metadata()?)?;
    let mut bytes = Vec::new();
    opened.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Publishes a draft that an earlier edit kept, on the text that it was made from.
pub(super) fn publish_draft(session: &Session, draft: &Path) -> Result<()> {
    let bytes = own(draft)?;
    let beside = draft.with_file_name(BASE);
    let base = own(&beside).map_err(|e| {
        Error::new(format!(
            "which version {} was made from is not known: {}; open 'deploy-manifest edit' and make the changes there",
            draft.display(),
            e,
        ))
    })?;
    publish_edited(session, &bytes, &base)
}

/// Publishes what a person made of the text `base`: its changes, in what is trusted now.
pub(super) fn publish_edited(session: &Session, bytes: &[u8], base: &[u8]) -> Result<()> {
    let edited = parse::manifest_with(bytes, Mode::Tolerant, session.settings.default_hosts.as_deref())?;
    let author = session.author()?;
    let (store, trusted) = (author.store, &author.trust.trusted);
    let made_from = match signature::read(base, &store.identity(), trusted) {
        Ok(manifest) => Some(manifest),
        Err(ReadError::Manifest(_)) if trusted.is_empty() => None,
        Err(e) => {
            let why = if let ReadError::Signature(why) = e { why } else { "it cannot be read".into() };
            return Err(Error::new(format!(
                "the text was made from a version that is not to be trusted: {why}; open 'deploy-manifest edit' and \
                 make the changes there"
            )));
        }
    };
    parse::check_additions(&edited, made_from.as_ref())?;
    change(&author, StartingPoint::Repair, |manifest| {
        let Some(base) = &made_from else {
            // What could not be read cannot be merged with: only what was edited may be replaced.
            if current::load(store)?.is_none_or(|c| c.bytes != base) {
                return Err(Error::new("the manifest was changed meanwhile"));
            }
            edit::restore(manifest, &edited);
            return Ok(Some("edit".into()));
        };
        if !edit::merge(manifest, base, &edited)? {
            return Ok(None);
        }
        let differences = diff(base, &edited);
        let mut names: Vec<&ServiceName> = differences.iter().filter_map(|d| d.service()).collect();
        names.dedup();
        Ok(Some(format!("edit {}", some_of(&names)).trim_end().to_string()))
    })?;
    Ok(())
}
