//! `deploy-manifest`: reads, edits and publishes the manifest. What a change is, is in
//! [`crate::manifest::changes`]; how it is published, in [`crate::manifest::edit`].

use super::{Call, editor, print};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::durable;
use crate::error::{Error, Result, did_you_mean, io_text};
use crate::manifest::diff::diff;
use crate::manifest::edit::{self, Author, Published, Start};
use crate::manifest::model::Manifest;
use crate::manifest::parse::{self, Mode};
use crate::manifest::signature::{self, Trust};
use crate::manifest::versions::{self, Head, Version};
use crate::manifest::{changes, json, schema};
use crate::names::{ServiceName, StorePath};
use crate::say;
use crate::store::{MANIFEST_KEY, Store};
use argh::FromArgs;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Edit and read the manifest: what should run where. Every change is a new version; what it replaced stays.
#[derive(FromArgs)]
#[argh(
    example = "  {command_name} show | jq '.services[] | select(.name == \"ava\")'\n  {command_name} set ava http.internalPort=8081\n  {command_name} rollback",
    note = "'{command_name} COMMAND --help' has the arguments and an example of each command."
)]
struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Command {
    Init(Init),
    Show(Show),
    List(List),
    Update(Update),
    AddService(AddService),
    RemoveService(RemoveService),
    Set(Set),
    Edit(Edit),
    Diff(Diff),
    Rollback(Rollback),
    Validate(Validate),
    Sign(Sign),
    Verify(Verify),
    Schema(SchemaArgs),
}

const COMMANDS: [&str; 14] = [
    "sign",
    "verify",
    "init",
    "show",
    "list",
    "update",
    "add-service",
    "remove-service",
    "set",
    "edit",
    "diff",
    "rollback",
    "validate",
    "schema",
];

/// Create an empty manifest, unless there is one.
#[derive(FromArgs)]
#[argh(subcommand, name = "init", example = "  {command_name} --store s3://deploy?region=eu-central-1")]
struct Init {}

/// Print the manifest, or one of its versions, as it is stored: JSON, laid out for people.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "show",
    example = "  {command_name} | jq '.services[] | .artifact.storePath'\n  {command_name} manifest-20261122 --service ava"
)]
struct Show {
    /// name of a version, an unambiguous beginning of one, or its serial; default: the current one
    #[argh(positional)]
    version: Option<String>,
    /// only the entry of this service
    #[argh(option, arg_name = "name")]
    service: Option<String>,
}

/// List the versions, newest first: which is in force (*), when, by whom and what it changed.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "list",
    example = "  {command_name} -n 5\n  {command_name} --all --json | jq '.versions[].name'"
)]
struct List {
    /// print JSON
    #[argh(switch)]
    json: bool,
    /// how many to list; default: 20
    #[argh(option, short = 'n', arg_name = "count", default = "20")]
    number: usize,
    /// list all
    #[argh(switch)]
    all: bool,
}

/// Give a service a new closure.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "update",
    example = "  {command_name} ava /nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava --revision $(git rev-parse HEAD)"
)]
struct Update {
    /// the service
    #[argh(positional)]
    name: String,
    /// the closure's top path, /nix/store/HASH-NAME
    #[argh(positional, arg_name = "storepath")]
    path: String,
    /// the commit it was built from
    #[argh(option, arg_name = "revision")]
    revision: Option<String>,
}

/// Add a service; what its JSON leaves out gets its default.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "add-service",
    example = "  {command_name} '{{\"name\": \"my-service\", \"hosts\": [\"biz\"],\n    \"artifact\": {{\"storePath\": \"/nix/store/placeholder\"}},\n    \"http\": {{\"domain\": \"my.example.com\", \"internalPort\": 8080}}}}'\n  {command_name} @my-service.json"
)]
struct AddService {
    /// the service as JSON, @FILE to read it from a file, or - to read it from stdin
    #[argh(positional, arg_name = "json|@file|-")]
    service: String,
}

/// Take a service out; its hosts stop and remove it.
#[derive(FromArgs)]
#[argh(subcommand, name = "remove-service", example = "  {command_name} my-service")]
struct RemoveService {
    /// the service
    #[argh(positional)]
    name: String,
}

/// Set fields of a service. A list is JSON or words joined by commas; null empties what may be empty, unsets a
/// variable of the environment, and takes http or health away.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "set",
    example = "  {command_name} ava http.internalPort=8081 env.PORT=8081 env.DEBUG=null\n  {command_name} ava hosts=biz,web1 'systemd.after=[\"postgresql.service\"]' revision=null"
)]
struct Set {
    /// the service
    #[argh(positional)]
    name: String,
    /// a field with dots for those below, and its value
    #[argh(positional, arg_name = "field=value")]
    fields: Vec<String>,
}

/// Edit the manifest as text with $VISUAL or $EDITOR. The result is checked, then published; what others
/// changed meanwhile stays. serial, generation and change are written by the program.
#[derive(FromArgs)]
#[argh(subcommand, name = "edit", example = "  EDITOR=vim {command_name}")]
struct Edit {}

/// Print what differs between two versions, by service and field.
#[derive(FromArgs)]
#[argh(subcommand, name = "diff", example = "  {command_name}\n  {command_name} 41 42")]
struct Diff {
    /// the older version (name, beginning of one, or serial), default: the one before the current; and the
    /// newer, default: the current one
    #[argh(positional, arg_name = "version")]
    versions: Vec<String>,
}

/// Publish what an older version said, as a new version. Without VERSION it goes to the version before the
/// current one, so that doing it twice comes back to where it began; with --service alone, to what that
/// service was before its last change. A version that the store has lost can come from a file: the copy that a
/// host keeps, /var/lib/deployer/manifest.json.
#[derive(FromArgs)]
#[argh(
    subcommand,
    name = "rollback",
    example = "  {command_name}\n  {command_name} manifest-20261122.json\n  {command_name} 41 --service ava\n  ssh biz cat /var/lib/deployer/manifest.json | {command_name} -"
)]
struct Rollback {
    /// the version (name, an unambiguous beginning of one, or serial), @FILE, or - for stdin
    #[argh(positional)]
    version: Option<String>,
    /// only the entry of this service
    #[argh(option, arg_name = "name")]
    service: Option<String>,
}

/// Check the manifest in the store, or a file with a manifest or with one service.
#[derive(FromArgs)]
#[argh(subcommand, name = "validate", example = "  {command_name}\n  {command_name} my-service.json")]
struct Validate {
    /// the file, or - for stdin; default: the manifest in the store
    #[argh(positional)]
    file: Option<String>,
}

/// Add this machine's signature to the manifest as it is: the word that it is right.
#[derive(FromArgs)]
#[argh(subcommand, name = "sign", example = "  {command_name}")]
struct Sign {}

/// Check that the manifest is signed by a trusted key, for this store; print the names of the keys.
#[derive(FromArgs)]
#[argh(subcommand, name = "verify", example = "  {command_name}\n  {command_name} 41")]
struct Verify {
    /// the version: a name of the list, its beginning, or its serial (default: the one in force)
    #[argh(positional)]
    version: Option<String>,
}

/// Print the JSON Schema of the manifest.
#[derive(FromArgs)]
#[argh(subcommand, name = "schema", example = "  {command_name} > manifest.schema.json")]
struct SchemaArgs {}

/// Stands for a lone `-`, which argh takes for an option; no argument of a process can have a NUL.
const STDIN: &str = "\0-";

/// Runs the command.
pub fn run(call: &Call) -> Result<u8> {
    let first = call.args.first().map_or("--help", String::as_str);
    if !first.starts_with('-') && first != "help" && !COMMANDS.contains(&first) {
        let near = did_you_mean(first, COMMANDS);
        return Err(Error::usage(format!("no command '{first}'{near}; '{} --help' lists them", call.name)));
    }
    let args = call.args.iter().map(|a| if a == "-" { STDIN.into() } else { a.clone() }).collect();
    let args: Args = Call { args, ..call.clone() }.parse()?;
    match args.command {
        Command::Schema(SchemaArgs {}) => print(schema::TEXT)?,
        Command::Validate(Validate { file: Some(file) }) => validate_file(&call.settings()?, &file)?,
        command => {
            if matches!(command, Command::Edit(_)) {
                editor::ignore_its_signals(call, "manifest")?;
            }
            let settings = call.settings()?;
            let store = crate::store::open(&settings.store)?;
            with_store(command, &settings, &*store)?;
        }
    }
    Ok(0)
}

fn with_store(command: Command, settings: &Settings, store: &dyn Store) -> Result<()> {
    match command {
        Command::Init(Init {}) => {
            let published = edit::init(store, &Timestamp::now, &Author::of(settings)?)?;
            if !published.written {
                let serial = published.manifest.serial;
                say::info(format!(
                    "unchanged: there is a manifest already, serial {serial} ({})",
                    store.url()
                ));
                return Ok(());
            }
            edit::report(store, &published);
        }
        Command::Show(Show { version, service }) => show(store, version.as_deref(), service.as_deref())?,
        Command::List(List { json, number, all }) => {
            list(store, json, if all { usize::MAX } else { number })?
        }
        Command::Update(Update { name, path, revision }) => {
            let path = StorePath::parse(&path).map_err(|why| Error::new(format!("'{path}' {why}")))?;
            let revision = revision.filter(|r| !r.is_empty());
            change(settings, store, Start::Existing, |manifest| {
                let changed = changes::update(manifest, &name, &path, revision.as_deref())?;
                Ok(changed.then(|| format!("update {name}")))
            })?;
        }
        Command::AddService(AddService { service }) => add_service(settings, store, &service)?,
        Command::RemoveService(RemoveService { name }) => {
            change(settings, store, Start::Existing, |manifest| {
                changes::remove(manifest, &name)?;
                Ok(Some(format!("remove-service {name}")))
            })?;
        }
        Command::Set(Set { name, fields }) => set(settings, store, &name, &fields)?,
        Command::Edit(Edit {}) => edit_text(settings, store)?,
        Command::Diff(Diff { versions }) => print_diff(store, &versions)?,
        Command::Rollback(Rollback { version, service: None }) => {
            rollback(settings, store, version.as_deref())?
        }
        Command::Rollback(Rollback { version, service: Some(name) }) => {
            rollback_service(settings, store, version.as_deref(), &name)?;
        }
        Command::Validate(_) => validate_store(store)?,
        Command::Sign(Sign {}) => match edit::add_signature(store, &Author::of(settings)?)? {
            true => say::notice(format!("signed ({})", store.url())),
            false => say::info(format!("unchanged: it has this key's signature already ({})", store.url())),
        },
        Command::Verify(Verify { version }) => verify(settings, store, version.as_deref())?,
        Command::Schema(_) => {}
    }
    Ok(())
}

/// Publishes a change and says so in one line.
fn change(
    settings: &Settings,
    store: &dyn Store,
    start: Start,
    change: impl FnMut(&mut Manifest) -> Result<Option<String>>,
) -> Result<Published> {
    let published = edit::publish(store, &Timestamp::now, &Author::of(settings)?, start, change)?;
    edit::report(store, &published);
    Ok(published)
}

fn show(store: &dyn Store, version: Option<&str>, service: Option<&str>) -> Result<()> {
    let (what, bytes, unusable) = match version {
        None => {
            let current = edit::load(store)?.ok_or_else(|| edit::missing(store))?;
            let unusable = current.manifest.err().map(|e| edit::unusable(store, &e));
            ("the manifest".to_string(), current.bytes, unusable)
        }
        Some(word) => {
            let versions = versions::all(store)?;
            let version = versions::resolve(&versions, word)?;
            let bytes = versions::bytes(store, version)?;
            let unusable = parse::manifest(&bytes, Mode::Tolerant)
                .err()
                .map(|e| Error::new(format!("{} in {} cannot be used: {e}", version.name, store.url())));
            (version.name.clone(), bytes, unusable)
        }
    };
    if let Some(why) = unusable {
        if serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_err() {
            return Err(why);
        }
        say::warning(format!("warning: {why}"));
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

fn print_bytes(bytes: &[u8]) -> Result<()> {
    print(std::str::from_utf8(bytes).map_err(|e| Error::new(format!("the manifest is not UTF-8: {e}")))?)
}

fn list(store: &dyn Store, as_json: bool, number: usize) -> Result<()> {
    let versions = versions::all(store)?;
    if !versions.iter().any(|v| v.current) {
        match edit::load(store)? {
            None if versions.is_empty() => return Err(edit::missing(store)),
            None => say::warning(format!("warning: {}", edit::missing(store))),
            Some(current) => {
                if let Err(e) = current.manifest {
                    say::warning(format!("warning: {}", edit::unusable(store, &e)));
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
                let text = |f: fn(&Head) -> String| head.as_ref().map(f);
                serde_json::json!({
                    "name": version.name,
                    "serial": version.serial,
                    "current": version.current,
                    "generation": text(|h| h.generation.to_string()),
                    "action": text(|h| h.change.action.clone()),
                    "by": text(|h| h.change.by.clone()),
                })
            })
            .collect();
        let document = serde_json::json!({"version": 1, "versions": rows});
        return print(&format!("{document:#}"));
    }
    let mut rows = vec![["", "NAME", "SERIAL", "WHEN", "BY", "ACTION"].map(String::from)];
    for (version, head) in shown.iter().zip(heads) {
        let unreadable = || Head {
            serial: version.serial,
            generation: Timestamp::default(),
            change: crate::manifest::Change { action: "(cannot be read)".into(), ..Default::default() },
        };
        let known = head.is_some();
        let head = head.unwrap_or_else(unreadable);
        rows.push([
            if version.current { "*" } else { "" }.into(),
            version.name.clone(),
            version.serial.to_string(),
            if known { head.generation.to_string() } else { String::new() },
            say::printable(&head.change.by).into_owned(),
            say::printable(&head.change.action).into_owned(),
        ]);
    }
    print(&table(&rows))?;
    if shown.len() < versions.len() {
        say::info(format!("{} older ones: 'deploy-manifest list --all'", versions.len() - shown.len()));
    }
    Ok(())
}

/// Columns as wide as their widest text, two spaces between them; serials to the right.
fn table(rows: &[[String; 6]]) -> String {
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut out = String::new();
    for [mark, name, serial, when, by, action] in rows {
        let line = format!(
            "{mark:<1} {name:<w1$}  {serial:>w2$}  {when:<w3$}  {by:<w4$}  {action}",
            w1 = widths[1],
            w2 = widths[2],
            w3 = widths[3],
            w4 = widths[4]
        );
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// The beginnings of versions, read by up to eight threads.
fn heads(store: &dyn Store, versions: &[Version]) -> Result<Vec<Option<Head>>> {
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<Option<Head>>> = Mutex::new(vec![None; versions.len()]);
    let work = || -> Result<()> {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(version) = versions.get(at) else { return Ok(()) };
            let archived = versions::archive_key(&version.name);
            let key = if version.current { MANIFEST_KEY } else { &archived };
            let head = versions::head(store, key)?;
            if let Ok(mut found) = found.lock() {
                found[at] = head;
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..versions.len().min(8)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(found.into_inner().unwrap_or_default())
}

/// What an argument names: `@FILE`, `-` (as [`STDIN`]), or the text itself.
fn input(word: &str) -> Result<Vec<u8>> {
    match word.strip_prefix('@') {
        _ if word == STDIN => stdin(),
        Some("-") => stdin(),
        Some(file) => fs_err::read(file)
            .map_err(|e| Error::new(format!("{}; after '@' the path of a file is meant", io_text(&e)))),
        None => Ok(word.as_bytes().to_vec()),
    }
}

fn stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let limit = crate::manifest::model::MAX_BYTES + 1;
    std::io::stdin()
        .lock()
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::new(format!("cannot read stdin: {e}")))?;
    Ok(bytes)
}

fn add_service(settings: &Settings, store: &dyn Store, word: &str) -> Result<()> {
    let bytes = input(word)?;
    let service = parse::service_from(&bytes, Mode::Strict, settings.default_hosts.as_deref())
        .map_err(|e| Error::from(e).context("the service"))?;
    let name = service.name.clone();
    let published = change(settings, store, Start::OrEmpty, |manifest| {
        changes::add(manifest, service.clone())?;
        Ok(Some(format!("add-service {name}")))
    })?;
    if published.manifest.serial == 1 {
        say::info("there was no manifest yet: this is the first version");
    }
    Ok(())
}

fn set(settings: &Settings, store: &dyn Store, name: &str, fields: &[String]) -> Result<()> {
    let usage =
        |what: String| Error::usage(format!("{what}; FIELD=VALUE is meant, such as http.internalPort=8081"));
    if fields.is_empty() {
        return Err(usage("nothing to set".into()));
    }
    let mut assignments = Vec::new();
    for field in fields {
        match field.split_once('=') {
            Some((field, value)) if !field.is_empty() => {
                assignments.push((field.to_string(), value.to_string()))
            }
            _ => return Err(usage(format!("'{field}' sets nothing"))),
        }
    }
    let named: Vec<&str> = assignments.iter().map(|(field, _)| field.as_str()).collect();
    change(settings, store, Start::Existing, |manifest| {
        let changed = changes::set(manifest, name, &assignments)
            .map_err(|e| if manifest.service(name).is_some() { e.context(name) } else { e })?;
        Ok(changed.then(|| format!("set {name} {}", named.join(" "))))
    })?;
    Ok(())
}

/// In words for the action: `ava, web and 3 more`.
fn some_of(names: &[&ServiceName]) -> String {
    let first: Vec<&str> = names.iter().take(3).map(|n| n.as_str()).collect();
    match names.len().saturating_sub(3) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

fn edit_text(settings: &Settings, store: &dyn Store) -> Result<()> {
    let current = edit::load(store)?.ok_or_else(|| edit::missing(store))?;
    let (text, base) = match current.manifest {
        Ok(base) => (json::pretty(&current.bytes), Some(base)),
        Err(e) if e.is_newer_version() => return Err(edit::unusable(store, &e)),
        Err(e) => {
            say::warning(format!("warning: the manifest in {} cannot be used: {e}", store.url()));
            (current.bytes.clone(), None)
        }
    };
    let folder = durable::scratch(&std::env::temp_dir())?;
    let file = folder.path().join("manifest.json");
    durable::write(&file, &text, 0o600)?;
    let result = edit_file(settings, store, &file, &text, base.as_ref(), &current.bytes);
    if result.is_err() && fs_err::read(&file).is_ok_and(|edited| edited != text) {
        let kept = folder.keep().join("manifest.json");
        return result.map_err(|e| {
            let kept = kept.display();
            Error::new(format!(
                "{e}; your text is kept in {kept}: correct it there, then VISUAL='cp {kept}' deploy-manifest edit"
            ))
        });
    }
    result
}

fn edit_file(
    settings: &Settings,
    store: &dyn Store,
    file: &Path,
    text: &[u8],
    base: Option<&Manifest>,
    stored: &[u8],
) -> Result<()> {
    let bytes = editor::edit(file)?;
    if bytes == text {
        say::info("unchanged: nothing was published");
        return Ok(());
    }
    let edited = parse::manifest_with(&bytes, Mode::Tolerant, settings.default_hosts.as_deref())?;
    if let Some(unknown) = parse::new_unknown(&edited, base) {
        return Err(unknown.into());
    }
    let start = if base.is_some() { Start::Existing } else { Start::Repair };
    change(settings, store, start, |manifest| {
        let action = match base {
            Some(base) => {
                if !changes::merge(manifest, base, &edited)? {
                    return Ok(None);
                }
                let differences = diff(base, &edited);
                let mut names: Vec<&ServiceName> = differences.iter().filter_map(|d| d.service()).collect();
                names.dedup();
                format!("edit {}", some_of(&names)).trim_end().to_string()
            }
            None => {
                // What could not be read cannot be merged with: only what was edited may be replaced.
                if edit::load(store)?.is_none_or(|c| c.bytes != stored) {
                    return Err(Error::new("the manifest was changed meanwhile"));
                }
                changes::restore(manifest, &edited);
                "edit".into()
            }
        };
        Ok(Some(action))
    })?;
    Ok(())
}

fn print_diff(store: &dyn Store, words: &[String]) -> Result<()> {
    if words.len() > 2 {
        return Err(Error::usage("diff compares two versions; more were named"));
    }
    let (old, new) = (words.first(), words.get(1));
    let versions = versions::all(store)?;
    let current = || versions.iter().find(|v| v.current).ok_or_else(|| edit::missing(store));
    let new = match new {
        Some(word) => versions::resolve(&versions, word)?,
        None => current()?,
    };
    let old = match old {
        Some(word) => versions::resolve(&versions, word)?,
        None => versions::previous(&versions).ok_or_else(|| only_version(store))?,
    };
    let mut lines = String::new();
    for difference in diff(&versions::read(store, old)?, &versions::read(store, new)?) {
        lines.push_str(&format!("{difference}\n"));
    }
    if lines.is_empty() {
        say::info(format!("serials {} and {} do not differ", old.serial, new.serial));
        return Ok(());
    }
    print(&lines)
}

fn only_version(store: &dyn Store) -> Error {
    Error::new(format!("there is no version before the current one in {}", store.url()))
}

fn rollback(settings: &Settings, store: &dyn Store, word: Option<&str>) -> Result<()> {
    if let Some(word) = word.filter(|w| *w == STDIN || w.starts_with('@')) {
        return rollback_to_copy(settings, store, &input(word)?);
    }
    let versions = versions::all(store)?;
    // An old one that was put back is left behind also when it says the same: hosts do not obey it.
    let outrun = |serial: u64| versions.iter().any(|v| v.serial > serial);
    let outrun = versions.iter().find(|v| v.current).is_some_and(|v| outrun(v.serial));
    let version = match word {
        Some(word) => rollback_target(&versions, word)?,
        // With nothing readable in force, the newest that was replaced is the one before.
        None => match versions.iter().any(|v| v.current) {
            true => versions::previous(&versions),
            false => versions.first(),
        }
        .ok_or_else(|| match edit::load(store) {
            Ok(None) => edit::missing(store),
            Ok(Some(_)) => only_version(store),
            Err(e) => e,
        })?,
    };
    let old = believed(settings, store, version)?;
    change(settings, store, Start::Replace, |manifest| {
        // A repair starts from nothing, and restoring nothing is a change there.
        let repaired = manifest.change.by.is_empty();
        let changed = changes::restore(manifest, &old) || repaired || outrun;
        Ok(changed.then(|| format!("rollback to {} (serial {})", version.name, version.serial)))
    })?;
    Ok(())
}

/// Publishes a copy of a version from somewhere else, above every serial that it shows to have been there.
fn rollback_to_copy(settings: &Settings, store: &dyn Store, bytes: &[u8]) -> Result<()> {
    let copy = parse::manifest(bytes, Mode::Tolerant).map_err(|e| Error::from(e).context("the copy"))?;
    let trusted = signature::trusted(settings)?;
    if !trusted.is_empty()
        && let Err(why) = signature::check(bytes, &copy, &store.identity(), &trusted)
    {
        return Err(Error::new(format!(
            "the copy is not to be trusted in {}: {why}; take one that a host of this store has kept",
            store.url()
        )));
    }
    change(settings, store, Start::Replace, |manifest| {
        let behind = manifest.serial < copy.serial;
        manifest.serial = manifest.serial.max(copy.serial);
        let changed = changes::restore(manifest, &copy) || behind || manifest.change.by.is_empty();
        Ok(changed.then(|| format!("rollback to a copy of serial {}", copy.serial)))
    })?;
    Ok(())
}

/// An old version, if it is signed as the configuration wants it.
fn believed(settings: &Settings, store: &dyn Store, version: &Version) -> Result<Manifest> {
    Ok(versions::believed(store, version, &signature::trusted(settings)?)?.0)
}

/// The version in force is what one rolls back from: it does not make a beginning ambiguous.
fn rollback_target<'a>(versions: &'a [Version], word: &str) -> Result<&'a Version> {
    let older: Vec<Version> = versions.iter().filter(|v| !v.current).cloned().collect();
    let found = versions::resolve(&older, word).or_else(|e| {
        // Only the current one fits: then there is nothing to do, which is said later.
        versions::resolve(versions, word).map_err(|_| e)
    })?;
    let name = found.name.clone();
    versions.iter().find(|v| v.name == name).ok_or_else(|| Error::new(format!("no version '{word}'")))
}

/// How many versions are read in search of a service's last change.
const SEARCHED: usize = 200;

fn rollback_service(settings: &Settings, store: &dyn Store, word: Option<&str>, name: &str) -> Result<()> {
    if word.is_some_and(|w| w == STDIN || w.starts_with('@')) {
        return Err(Error::usage("a copy from a file or stdin is put back whole; leave --service out"));
    }
    let versions = versions::all(store)?;
    let (version, old) = match word {
        Some(word) => {
            let version = rollback_target(&versions, word)?;
            (version, believed(settings, store, version)?)
        }
        None => {
            let now = edit::read(store)?;
            let entry = now.service(name).ok_or_else(|| changes::unknown_service(name, &now))?;
            let older = versions.iter().filter(|v| !v.current && v.serial < now.serial);
            let mut found = None;
            for version in older.take(SEARCHED) {
                let old = believed(settings, store, version)?;
                if old.service(name).is_some_and(|o| o != entry) {
                    found = Some((version, old));
                    break;
                }
            }
            found.ok_or_else(|| {
                Error::new(format!("no version before the current one has '{name}' otherwise than it is now"))
            })?
        }
    };
    change(settings, store, Start::Existing, |manifest| {
        let changed = changes::restore_service(manifest, &old, name)?;
        Ok(changed.then(|| format!("rollback {name} to {} (serial {})", version.name, version.serial)))
    })?;
    Ok(())
}

/// Prints the names of the trusted keys that signed a version.
fn verify(settings: &Settings, store: &dyn Store, word: Option<&str>) -> Result<()> {
    let mut trusted = signature::trusted(settings)?;
    trusted.extend(Trust::of(settings)?.signer.map(|key| key.public()));
    if trusted.is_empty() {
        return Err(Error::new("there is no key to verify with; set 'trustedPublicKeys' or 'secretKeyFile'"));
    }
    let versions = versions::all(store)?;
    let version = match word {
        Some(word) => versions::resolve(&versions, word)?,
        None => versions.iter().find(|v| v.current).ok_or_else(|| edit::missing(store))?,
    };
    let (_, mut names) = versions::believed(store, version, &trusted)?;
    names.sort();
    names.dedup();
    print(&names.join("\n"))
}

fn validate_file(settings: &Settings, file: &str) -> Result<()> {
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
    say::info(format!("valid: {shown} has {said}"));
    Ok(())
}

fn validate_store(store: &dyn Store) -> Result<()> {
    let manifest = edit::read(store)?;
    if let Some(unknown) = parse::new_unknown(&manifest, None) {
        say::warning(format!("warning: {unknown}; a newer version may have written it"));
    }
    let said = count(manifest.services.len());
    say::info(format!("valid: serial {} has {said} ({})", manifest.serial, store.url()));
    Ok(())
}

fn count(services: usize) -> String {
    if services == 1 { "1 service".into() } else { format!("{services} services") }
}
