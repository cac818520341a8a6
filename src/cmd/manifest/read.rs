//! What only reads: versions shown, listed, compared and validated.

use super::super::print;
use super::super::table::{Cell, Column, table};
use super::{STDIN, stdin};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::error::{Error, Result, did_you_mean};
use crate::log;
use crate::manifest::belief;
use crate::manifest::diff::diff;
use crate::manifest::model::Manifest;
use crate::manifest::newest::{Newest, enough_for, newest};
use crate::manifest::parse::{self, Mode};
use crate::manifest::publish::{self, Author};
use crate::manifest::signature;
use crate::manifest::versions::{self, Version, VersionHead};
use crate::manifest::{json, limits};
use crate::parallel;
use crate::store::{MANIFEST_KEY, Store};

pub(super) fn show(
    settings: &Settings,
    store: &dyn Store,
    version: Option<&str>,
    service: Option<&str>,
) -> Result<()> {
    let versions = version.map(|word| enough_for(store, &[word])).transpose()?.unwrap_or_default();
    let (what, bytes, version) = match version {
        None => {
            let current = publish::load(store)?.ok_or_else(|| publish::missing(store))?;
            ("the manifest".to_string(), current.bytes, None)
        }
        Some(word) => {
            let version = versions::find(store, &versions, word)?;
            let bytes = versions::bytes(store, version)?;
            (version.name.clone(), bytes, Some(version))
        }
    };
    // It is there to be looked at; nobody shall take it for what the hosts obey.
    let trusted = signature::trusted(settings)?;
    let signed = match trusted.is_empty() {
        true => None,
        false => signature::verify(&bytes, &store.identity(), &trusted),
    };
    let unusable = match (&signed, version) {
        // What nobody trusted has signed is not read, which may be made to cost much.
        (Some(Err(_)), _) => None,
        (_, None) => parse::manifest(&bytes, Mode::Tolerant).err().map(|e| publish::unusable(store, &e)),
        (_, Some(version)) => {
            let why = match parse::manifest(&bytes, Mode::Tolerant) {
                Ok(_) => versions::mismatch(version, versions::head_of(&bytes).as_ref())
                    .map(|why| format!("is {why}")),
                Err(e) => Some(format!("cannot be used: {e}")),
            };
            why.map(|why| Error::new(format!("{} in {} {why}", version.name, store.url())))
        }
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
    if let Some(Err(why)) = signed {
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

pub(super) fn list(settings: &Settings, store: &dyn Store, as_json: bool, number: usize) -> Result<()> {
    let Newest { versions, others, complete } = newest(store, number)?;
    let author = Author::reader(settings)?;
    let current = match author.trust.trusted.is_empty() {
        true => None,
        // What is too large to be read is said below.
        false => publish::load(store).ok().flatten(),
    };
    if let Some(current) = current
        && let Some(objection) = author.objection(store, &current)?
    {
        log::warning(format!("warning: {}", author.refusal(store, &current, &objection)));
    } else if !versions.iter().any(|v| v.current) {
        match publish::load(store)? {
            None if versions.is_empty() => return Err(publish::missing(store)),
            None => log::warning(format!("warning: {}", publish::missing(store))),
            Some(current) => {
                if let Err(e) = current.into_parts().1 {
                    log::warning(format!("warning: {}", publish::unusable(store, &e)));
                }
            }
        }
    }
    let shown = &versions[..versions.len().min(number)];
    let heads = heads(store, shown)?;
    if as_json {
        let rows: Vec<serde_json::Value> = shown
            .iter()
            .zip(&heads)
            .map(|(version, head)| {
                let problem = versions::mismatch(version, head.as_ref());
                let text = |f: fn(&VersionHead) -> String| head.as_ref().filter(|_| problem.is_none()).map(f);
                let mut row = serde_json::json!({
                    "name": version.name,
                    "serial": version.serial,
                    "current": version.current,
                    "generation": text(|h| h.generation.to_string()),
                    "action": text(|h| h.change.action.clone()),
                    "by": text(|h| h.change.by.clone()),
                });
                if let Some(problem) = problem {
                    row["problem"] = problem.into();
                }
                row
            })
            .collect();
        let document = serde_json::json!({"version": 1, "versions": rows});
        return print(&log::printable_json(&format!("{document:#}")));
    }
    let mut rows = vec![["  NAME", "SERIAL", "WHEN", "BY", "ACTION"].map(Cell::from).into()];
    for (version, head) in shown.iter().zip(heads) {
        let problem = |action: String| VersionHead {
            serial: version.serial,
            generation: Timestamp::default(),
            change: crate::manifest::Change { action, ..Default::default() },
        };
        let mismatch = versions::mismatch(version, head.as_ref());
        let known = head.is_some() && mismatch.is_none();
        let head = match (mismatch, head) {
            (Some(why), _) => problem(why),
            (None, Some(head)) => head,
            (None, None) => problem("(cannot be read)".into()),
        };
        let mark = if version.current { '*' } else { ' ' };
        rows.push(vec![
            Cell::from(format!("{mark} {}", version.name)),
            version.serial.to_string().into(),
            if known { head.generation.to_string() } else { String::new() }.into(),
            head.change.by.into(),
            head.change.action.into(),
        ]);
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
    parallel::try_map(versions, 8, |version| {
        let archived = versions::archive_key(&version.name);
        let key = if version.current { MANIFEST_KEY } else { &archived };
        versions::head(store, key)
    })
}

pub(super) fn print_diff(settings: &Settings, store: &dyn Store, words: &[String]) -> Result<()> {
    if words.len() > 2 {
        return Err(Error::usage("diff compares two versions; more were named"));
    }
    let (old, new) = (words.first(), words.get(1));
    let versions = enough_for(store, &words.iter().map(String::as_str).collect::<Vec<_>>())?;
    let author = Author::reader(settings)?;
    let current = || versions.iter().find(|v| v.current).ok_or_else(|| none_in_force(store, &author));
    let read = |version: &Version| -> Result<Manifest> {
        // It is there to be looked at, as by 'show'.
        let (manifest, doubt) = versions::read_with_doubt(store, version, &author.trust.trusted)?;
        if let Some(why) = doubt {
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
            let there = if there.serial == new.serial { new.clone() } else { versions::read(store, there)? };
            let search = belief::before(store, &author, &versions, &there, None, |_| true)?;
            search.found.ok_or_else(|| only_version(store))?.manifest
        }
    };
    let mut lines = String::new();
    for difference in diff(&old, &new) {
        lines.push_str(&format!("{}\n", log::printable(&difference.to_string())));
    }
    if lines.is_empty() {
        log::info(format!("serials {} and {} do not differ", old.serial, new.serial));
        return Ok(());
    }
    print(&lines)
}

/// Why none of the versions is the one in force: there is none, or what is there is not one.
pub(super) fn none_in_force(store: &dyn Store, author: &Author) -> Error {
    let why = || -> Result<Error> {
        let Some(current) = publish::load(store)? else { return Ok(publish::lost(store, author)) };
        if let Some(objection) = author.objection(store, &current)? {
            return Ok(author.refusal(store, &current, &objection));
        }
        Ok(match current.manifest() {
            Err(e) => publish::unusable(store, e),
            Ok(_) => {
                Error::new(format!("the manifest in {} was changed meanwhile; run it again", store.url()))
            }
        })
    };
    why().unwrap_or_else(|e| e)
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

pub(super) fn validate_store(settings: &Settings, store: &dyn Store) -> Result<()> {
    let author = Author::reader(settings)?;
    let current = publish::load(store)?.ok_or_else(|| publish::missing(store))?;
    if let Some(objection) = author.objection(store, &current)? {
        return Err(author.refusal(store, &current, &objection));
    }
    let manifest = current.into_parts().1.map_err(|e| publish::unusable(store, &e))?;
    if let Some(unknown) = parse::first_unknown(&manifest) {
        log::warning(format!("warning: {unknown}; a newer version may have written it"));
    }
    let said = count(manifest.services.len());
    log::info(format!("valid: serial {} has {said} ({})", manifest.serial, store.url()));
    Ok(())
}

pub(super) fn count(services: usize) -> String {
    if services == 1 { "1 service".into() } else { format!("{services} services") }
}
