//! What only reads: versions shown, listed, compared and validated.

use super::super::print;
use super::super::table::{Cell, Column, table};
use super::{STDIN, Session, stdin};
use crate::config::Settings;
use crate::error::{Error, Result, did_you_mean};
use crate::log;
use crate::manifest::diff::{Difference, diff};
use crate::manifest::model::Manifest;
use crate::manifest::newest::{Newest, enough_for, newest};
use crate::manifest::parse::{self, Mode};
use crate::manifest::signature::{self, ReadError};
use crate::manifest::trust::Author;
use crate::manifest::versions::{self, Version, VersionHead};
use crate::manifest::{Change, current, json, limits, publish};
use crate::parallel;
use crate::store::Store;

pub(super) fn show(session: &Session, version: Option<&str>, service: Option<&str>) -> Result<()> {
    let Session { settings, store } = *session;
    let versions = version.map(|word| enough_for(store, &[word])).transpose()?.unwrap_or_default();
    let (what, bytes, version) = match version {
        None => {
            let current = current::load(store)?.ok_or_else(|| current::missing(store))?;
            ("the manifest".to_string(), current.bytes, None)
        }
        Some(word) => {
            let version = versions::find(store, &versions, word)?;
            let bytes = versions::bytes(store, version)?;
            (version.name.clone(), bytes, Some(version))
        }
    };
    // It is there to be looked at; nobody shall take it for what the hosts obey.
    let read = signature::read(&bytes, &store.identity(), &signature::trusted(settings)?);
    let error =
        |version: &Version, why: String| Error::new(format!("{} in {} {why}", version.name, store.url()));
    let unusable = match (&read, version) {
        (Ok(_), None) | (Err(ReadError::Signature(_)), _) => None,
        (Ok(there), Some(version)) => versions::mismatch(version, Some((there.serial, there.generation)))
            .map(|why| error(version, format!("is {why}"))),
        (Err(ReadError::Manifest(e)), None) => Some(current::unusable(store, e)),
        (Err(ReadError::Manifest(e)), Some(version)) => Some(error(version, format!("cannot be used: {e}"))),
    };
    if let Some(why) = unusable {
        // What is too much to be read is too much to be laid out.
        if limits::manifest(&bytes).is_err()
            || serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_err()
        {
            return Err(why);
        }
        log::warning(format!("warning: {why}"));
    }
    if let Err(ReadError::Signature(why)) = read {
        log::warning(format!("warning: {what} is not to be trusted, and no host obeys it: {why}"));
    }
    let Some(name) = service else {
        return print_bytes(&json::pretty(&bytes));
    };
    #[derive(serde::Deserialize)]
    struct Named {
        name: String,
    }
    let mut names = Vec::new();
    for entry in json::elements(&bytes, "services") {
        match serde_json::from_slice::<Named>(entry) {
            Ok(named) if named.name == name => return print_bytes(&json::pretty(entry)),
            Ok(named) => names.push(named.name),
            // The warning above named it.
            Err(_) => {}
        }
    }
    let near = did_you_mean(name, names.iter().map(String::as_str));
    let next = if near.is_empty() { "; 'deploy-manifest show' prints all of it" } else { near.as_str() };
    Err(Error::new(format!("no service '{name}' in {what}{next}")))
}

pub(super) fn print_bytes(bytes: &[u8]) -> Result<()> {
    let text =
        std::str::from_utf8(bytes).map_err(|e| Error::new(format!("the manifest is not UTF-8: {e}")))?;
    print(&log::printable_json(text))
}

pub(super) fn list(session: &Session, as_json: bool, number: usize) -> Result<()> {
    let Session { settings, store } = *session;
    let Newest { versions, others, complete } = newest(store, number)?;
    let author = Author::reader(settings, store)?;
    let current = match author.trust.trusted.is_empty() {
        true => None,
        // What is too large to be read is said below.
        false => current::load(store).ok().flatten(),
    };
    if let Some(current) = current
        && let Some(reason) = author.reject_reason(&current)?
    {
        log::warning(format!("warning: {}", author.rejection(&current, &reason)));
    } else if !versions.iter().any(|v| v.current) {
        match current::load(store)? {
            None if versions.is_empty() => return Err(current::missing(store)),
            None => log::warning(format!("warning: {}", current::missing(store))),
            Some(current) => {
                if let Err(e) = current.into_parts().1 {
                    log::warning(format!("warning: {}", current::unusable(store, &e)));
                }
            }
        }
    }
    let shown = &versions[..versions.len().min(number)];
    // Of an object that has a version's name and is none, nothing that it says of itself is shown.
    let read = |(version, head): (_, Option<VersionHead>)| {
        let problem = versions::mismatch(version, head.as_ref().map(VersionHead::id));
        (version, head.filter(|_| problem.is_none()), problem)
    };
    let listed = shown.iter().zip(heads(store, shown)?).map(read);
    if as_json {
        let row = |(version, head, problem): (&Version, Option<VersionHead>, Option<String>)| {
            let mut row = serde_json::json!({
                "name": version.name,
                "serial": version.serial,
                "current": version.current,
                "generation": head.as_ref().map(|h| h.generation.to_string()),
                "action": head.as_ref().map(|h| &h.change.action),
                "by": head.as_ref().map(|h| &h.change.by),
            });
            if let Some(problem) = problem {
                row["problem"] = problem.into();
            }
            row
        };
        let rows: Vec<serde_json::Value> = listed.map(row).collect();
        let document = serde_json::json!({"version": 1, "versions": rows});
        return print(&log::printable_json(&format!("{document:#}")));
    }
    let mut rows = vec![["  NAME", "SERIAL", "WHEN", "BY", "ACTION"].map(Cell::from).into()];
    for (version, head, problem) in listed {
        let (when, Change { by, action, .. }) = match head {
            Some(head) => (head.generation.to_string(), head.change),
            None => {
                let action = problem.unwrap_or_else(|| "(cannot be read)".into());
                (String::new(), Change { action, ..Change::default() })
            }
        };
        let mark = if version.current { '*' } else { ' ' };
        let name = format!("{mark} {}", version.name);
        rows.push([name, version.serial.to_string(), when, by, action].map(Cell::from).into());
    }
    print(&table(&[Column::Left, Column::Right], &rows))?;
    if !complete {
        log::info("older ones: 'deploy-manifest list --all'");
    } else if shown.len() < versions.len() {
        log::info(format!("{} older ones: 'deploy-manifest list --all'", versions.len() - shown.len()));
    }
    for name in others.iter().take(10) {
        log::warning(format!("not a version: {}", log::printable(&versions::archive_key(name))));
    }
    if others.len() > 10 {
        log::warning(format!("not a version: {} more objects beside them", others.len() - 10));
    }
    Ok(())
}

/// The beginnings of versions.
fn heads(store: &dyn Store, versions: &[Version]) -> Result<Vec<Option<VersionHead>>> {
    parallel::try_map(versions, 8, |version| versions::head(store, &version.key()))
}

pub(super) fn print_diff(session: &Session, words: &[String]) -> Result<()> {
    let Session { settings, store } = *session;
    if words.len() > 2 {
        return Err(Error::usage("diff compares two versions; more were named"));
    }
    let (old, new) = (words.first(), words.get(1));
    let versions = enough_for(store, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
    let author = Author::reader(settings, store)?;
    let current = || versions.iter().find(|v| v.current).ok_or_else(|| none_in_force(&author));
    let read = |version: &Version| -> Result<Manifest> {
        // It is there to be looked at, as by 'show'.
        let (manifest, signed) = versions::read(store, version, &author.trust.trusted)?;
        if let Err(why) = signed {
            log::warning(format!(
                "warning: {} is not to be trusted, and no host obeys it: {why}",
                version.name
            ));
        }
        Ok(manifest)
    };
    let new = read(match new {
        Some(word) => versions::find(store, &versions, word)?,
        None => current()?,
    })?;
    let old = match old {
        Some(word) => read(versions::find(store, &versions, word)?)?,
        None => {
            let there = current()?;
            let there =
                if there.serial == new.serial { new.clone() } else { versions::read(store, there, &[])?.0 };
            let search = author.before(&versions, &there, None, |_| true)?;
            search.found.ok_or_else(|| only_version(store))?.manifest
        }
    };
    let line = |difference: Difference| format!("{}\n", log::printable(&difference.to_string()));
    let lines: String = diff(&old, &new).into_iter().map(line).collect();
    if lines.is_empty() {
        log::info(format!("versions {} and {} do not differ", old.serial, new.serial));
        return Ok(());
    }
    print(&lines)
}

/// Why none of the versions is the one in force: there is none, or what is there is not one.
pub(super) fn none_in_force(author: &Author) -> Error {
    let store = author.store;
    let found = || {
        let current = current::load(store)?.ok_or_else(|| publish::lost(author))?;
        author.check_trusted(&current)?;
        current.into_parts().1.map_err(|e| current::unusable(store, &e))
    };
    found().err().unwrap_or_else(|| {
        Error::new(format!("the manifest in {} was changed meanwhile; run it again", store.url()))
    })
}

pub(super) fn only_version(store: &dyn Store) -> Error {
    Error::new(format!("there is no version before the current one in {}", store.url()))
}

pub(super) fn validate_file(settings: &Settings, file: &str) -> Result<()> {
    let bytes = if file == STDIN { stdin()? } else { fs_err::read(file)? };
    let shown = if file == STDIN { "stdin" } else { file };
    let hosts = settings.default_hosts.as_deref();
    // A manifest has services; whatever else is an object is meant as one service.
    let is_manifest = || {
        let fields = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&bytes);
        fields.map_or(true, |f| f.contains_key("services") || f.contains_key("version"))
    };
    let said = if is_manifest() {
        parse::manifest_with(&bytes, Mode::Strict, hosts).map(|m| count(m.services.len()))
    } else {
        parse::service_from(&bytes, Mode::Strict, hosts).map(|s| format!("service '{}'", s.name))
    };
    let said = said.map_err(|e| Error::from(e).context(shown))?;
    log::info(format!("valid: {shown} has {said}"));
    Ok(())
}

pub(super) fn validate_store(session: &Session) -> Result<()> {
    let Session { settings, store } = *session;
    let author = Author::reader(settings, store)?;
    let current = current::load(store)?.ok_or_else(|| current::missing(store))?;
    author.check_trusted(&current)?;
    let manifest = current.into_parts().1.map_err(|e| current::unusable(store, &e))?;
    if let Some(unknown) = parse::first_unknown(&manifest) {
        log::warning(format!("warning: {unknown}; a newer version may have written it"));
    }
    let said = count(manifest.services.len());
    log::info(format!("valid: version {} has {said} ({})", manifest.serial, store.url()));
    Ok(())
}

pub(super) fn count(services: usize) -> String {
    if services == 1 { "1 service".into() } else { format!("{services} services") }
}
