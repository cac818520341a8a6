//! `deploy-manifest`: reads, edits and publishes the manifest. What a change is, is in
//! [`crate::manifest::edit`]; how it is published, in [`crate::manifest::publish`].

use super::{Call, editor, print};
use crate::clock::Timestamp;
use crate::config::Settings;
use crate::durable;
use crate::error::{Error, Result, did_you_mean, io_text};
use crate::log;
use crate::manifest::belief::{self, Objection};
use crate::manifest::diff::{Difference, diff};
use crate::manifest::lineage::{self, Ancestor, Relation};
use crate::manifest::model::Manifest;
use crate::manifest::newest::{Newest, enough_for, newest};
use crate::manifest::parse::{self, Mode};
use crate::manifest::publish::{self, Author, COPY_BACK, CurrentManifest, PublishedManifest, StartingPoint};
use crate::manifest::signature::{self, Trust};
use crate::manifest::versions::{self, Version, VersionHead};
use crate::manifest::{edit, json, limits, schema};
use crate::names::{ServiceName, StorePath};
use crate::store::{MANIFEST_KEY, Store};
use argh::{ArgsInfo, FromArgs};
use std::io::{IsTerminal, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Edit and read the manifest, which says what should run where. Every change is a new version; what it replaced stays.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "manifest",
    example = "{command_name} show | jq '.services[] | select(.name == \"ava\")'\n{command_name} set ava http.internalPort=8081\n{command_name} rollback",
    note = "'{command_name} help COMMAND' has the arguments and an example of each command."
)]
pub(super) struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, ArgsInfo)]
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

/// Create the first version, unless there is a manifest.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "init", example = "{command_name} --store s3://deploy?region=eu-central-1")]
struct Init {}

/// Print the manifest, or one of its versions, as it is stored: JSON, laid out for reading.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "show",
    example = "{command_name} | jq '.services[] | .artifact.storePath'\n{command_name} manifest-20261122 --service ava"
)]
struct Show {
    /// name of a version, an unambiguous beginning of one, or its serial; default: the current one
    #[argh(positional)]
    version: Option<String>,
    /// only the entry of this service
    #[argh(option)]
    service: Option<String>,
}

/// List the versions, newest first: when, by whom, and what changed. The current one has a *.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "list",
    example = "{command_name} -n 5\n{command_name} --all --json | jq '.versions[].name'"
)]
struct List {
    /// print JSON
    #[argh(switch)]
    json: bool,
    /// how many to list; default: 20
    #[argh(option, short = 'n', arg_name = "count", default = "20", from_str_fn(super::number))]
    number: usize,
    /// list all
    #[argh(switch)]
    all: bool,
}

/// Set the store path that a service runs.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "update",
    example = "{command_name} ava /nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava --revision $(git rev-parse HEAD)"
)]
struct Update {
    /// the service
    #[argh(positional, arg_name = "service")]
    name: String,
    /// the closure's top path, /nix/store/HASH-NAME
    #[argh(positional, arg_name = "storepath")]
    path: String,
    /// the commit it was built from
    #[argh(option, arg_name = "commit")]
    revision: Option<String>,
}

/// Add a service; what its JSON leaves out gets its default. Only name and artifact.storePath are required;
/// /nix/store/placeholder makes the service wait for its first push.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "add-service",
    example = "{command_name} '{{\"name\": \"my-service\", \"hosts\": [\"biz\"],\n    \"artifact\": {{\"storePath\": \"/nix/store/placeholder\"}},\n    \"http\": {{\"domain\": \"my.example.com\", \"internalPort\": 8080}}}}'\n{command_name} @my-service.json"
)]
struct AddService {
    /// the service as JSON, @FILE to read it from a file, or - to read it from stdin
    #[argh(positional, arg_name = "json|@file|-")]
    service: String,
}

/// Remove a service; its hosts stop and remove it.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "remove-service", example = "{command_name} my-service")]
struct RemoveService {
    /// the service
    #[argh(positional, arg_name = "service")]
    name: String,
}

/// Set fields of a service. A list is JSON or words joined by commas; null empties what may be empty, unsets a
/// variable of the environment, and takes http or health away.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "set",
    example = "{command_name} ava http.internalPort=8081 env.PORT=8081 env.DEBUG=null\n{command_name} ava hosts=biz,web1 'systemd.after=[\"postgresql.service\"]' revision=null"
)]
struct Set {
    /// the service
    #[argh(positional, arg_name = "service")]
    name: String,
    /// a field with dots for those below, and its value
    #[argh(positional, arg_name = "field=value")]
    field: String,
    #[argh(positional, arg_name = "field=value")]
    more: Vec<String>,
}

/// Edit the manifest as text with $VISUAL or $EDITOR. The result is checked, then published; what others
/// changed meanwhile stays. serial, generation and change are written by the program. If the current manifest cannot be
/// read or is not signed by a trusted key, the newest version that is signed is opened, and the differences from the
/// current one are shown. A text that could not be published is kept.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "edit", example = "  EDITOR=vim {command_name}")]
struct Edit {
    /// publish a text that an earlier edit kept, once it is corrected
    #[argh(option, arg_name = "file")]
    draft: Option<String>,
}

/// Show what changed between two versions, by service and field.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "diff", example = "{command_name}\n{command_name} 41 42")]
struct Diff {
    /// the older version (name, beginning of one, or serial), default: the one before the current; and the
    /// newer, default: the current one
    #[argh(positional, arg_name = "version")]
    versions: Vec<String>,
}

/// Publish the content of an older version as a new version. Without a version it goes back to the last one before the
/// current one that says something else, so that doing it twice comes back to where it began, or with --service alone to
/// what that service was before its last change; it shows what that undoes, and asks on a terminal. A version that the
/// store has lost can come from a file or from stdin, such as /var/lib/deployer/manifest.json of a host.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "rollback",
    example = "{command_name}\n{command_name} manifest-20261122.json\n{command_name} 41 --service ava\n  ssh biz cat /var/lib/deployer/manifest.json | {command_name} -"
)]
struct Rollback {
    /// the version (name, an unambiguous beginning of one, or serial), @FILE, or - for stdin
    #[argh(positional, arg_name = "version|@file|-")]
    version: Option<String>,
    /// only the entry of this service
    #[argh(option)]
    service: Option<String>,
    /// without a version, or with a copy that is older than what is in force: do not ask
    #[argh(switch, short = 'y')]
    yes: bool,
}

/// Check the manifest in the store, or a file with a manifest or with one service.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "validate", example = "{command_name}\n{command_name} my-service.json")]
struct Validate {
    /// the file, or - for stdin; default: the manifest in the store
    #[argh(positional, arg_name = "file|-")]
    file: Option<String>,
}

/// Sign the manifest as it is with this machine's key: the first signature of an unsigned manifest, or a second key
/// beside the first. What no trusted key has signed is shown first, compared with the newest version that one has, has to
/// be confirmed, and is published as a new version.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "sign", example = "{command_name}")]
struct Sign {
    /// in a script, instead of asking: the hash that 'sign' printed of what you looked at
    #[argh(option, arg_name = "hash")]
    hash: Option<String>,
}

/// Check that the manifest is signed by a trusted key, for this store, and not older than what this machine has seen.
/// Prints the names of the keys.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "verify",
    example = "{command_name}\n{command_name} 41\n{command_name} --accept-version 1"
)]
struct Verify {
    /// forget what this machine has seen, and believe the current version, which must have this number: the store was
    /// created again or restored on purpose
    #[argh(option, arg_name = "number", from_str_fn(super::number))]
    accept_version: Option<u64>,
    /// the version: a name of the list, its beginning, or its serial; default: the current one
    #[argh(positional)]
    version: Option<String>,
}

/// Print the JSON Schema of the manifest.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "schema", example = "{command_name} > manifest.schema.json")]
struct SchemaArgs {}

/// Stands for what comes on stdin.
const STDIN: &str = "-";

/// Runs the command.
pub(super) fn run(call: &Call, args: Args) -> Result<u8> {
    match args.command {
        Command::Schema(SchemaArgs {}) => print(schema::TEXT)?,
        Command::Validate(Validate { file: Some(file) }) => validate_file(&call.settings()?, &file)?,
        command => {
            if matches!(command, Command::Edit(_)) {
                editor::ignore_its_signals(call)?;
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
            let published = publish::init(store, &Timestamp::now, &Author::of(settings)?)?;
            if !published.written {
                let serial = published.manifest.serial;
                log::info(format!(
                    "unchanged: there is a manifest already, serial {serial} ({})",
                    store.url()
                ));
                return Ok(());
            }
            publish::report(store, &published);
        }
        Command::Show(Show { version, service }) => {
            show(settings, store, version.as_deref(), service.as_deref())?;
        }
        Command::List(List { json, number, all }) => {
            list(settings, store, json, if all { usize::MAX } else { number })?
        }
        Command::Update(Update { name, path, revision }) => {
            let path = StorePath::parse(&path).map_err(|why| Error::new(format!("'{path}' {why}")))?;
            let revision = revision.filter(|r| !r.is_empty());
            change(settings, store, StartingPoint::Existing, |manifest| {
                let changed = edit::update(manifest, &name, &path, revision.as_deref())?;
                Ok(changed.then(|| format!("update {name}")))
            })?;
        }
        Command::AddService(AddService { service }) => add_service(settings, store, &service)?,
        Command::RemoveService(RemoveService { name }) => {
            change(settings, store, StartingPoint::Existing, |manifest| {
                edit::remove(manifest, &name)?;
                Ok(Some(format!("remove-service {name}")))
            })?;
        }
        Command::Set(Set { name, field, more }) => {
            set(settings, store, &name, &[&[field], more.as_slice()].concat())?
        }
        Command::Edit(Edit { draft: None }) => edit_text(settings, store)?,
        Command::Edit(Edit { draft: Some(draft) }) => publish_draft(settings, store, Path::new(&draft))?,
        Command::Diff(Diff { versions }) => print_diff(settings, store, &versions)?,
        Command::Rollback(Rollback { version, service: None, yes }) => {
            rollback(settings, store, version.as_deref(), yes)?
        }
        Command::Rollback(Rollback { version, service: Some(name), yes }) => {
            rollback_service(settings, store, version.as_deref(), &name, yes)?;
        }
        Command::Validate(_) => validate_store(settings, store)?,
        Command::Sign(Sign { hash }) => sign(settings, store, hash.as_deref())?,
        Command::Verify(Verify { version: None, accept_version: Some(number) }) => {
            accept(settings, store, number)?
        }
        Command::Verify(Verify { version: Some(_), accept_version: Some(_) }) => {
            return Err(Error::usage("only the version in force can be accepted; leave the other one out"));
        }
        Command::Verify(Verify { version, accept_version: None }) => {
            verify(settings, store, version.as_deref())?
        }
        Command::Schema(_) => {}
    }
    Ok(())
}

/// Publishes a change and says so in one line.
fn change(
    settings: &Settings,
    store: &dyn Store,
    start: StartingPoint,
    change: impl FnMut(&mut Manifest) -> Result<Option<String>>,
) -> Result<PublishedManifest> {
    let published = publish::publish(store, &Timestamp::now, &Author::of(settings)?, start, change)?;
    publish::report(store, &published);
    Ok(published)
}

fn show(settings: &Settings, store: &dyn Store, version: Option<&str>, service: Option<&str>) -> Result<()> {
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

fn print_bytes(bytes: &[u8]) -> Result<()> {
    let text =
        std::str::from_utf8(bytes).map_err(|e| Error::new(format!("the manifest is not UTF-8: {e}")))?;
    print(&log::printable_json(text))
}

fn list(settings: &Settings, store: &dyn Store, as_json: bool, number: usize) -> Result<()> {
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
    let mut rows = vec![["", "NAME", "SERIAL", "WHEN", "BY", "ACTION"].map(String::from)];
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
        rows.push([
            if version.current { "*" } else { "" }.into(),
            version.name.clone(),
            version.serial.to_string(),
            if known { head.generation.to_string() } else { String::new() },
            log::printable(&head.change.by).into_owned(),
            log::printable(&head.change.action).into_owned(),
        ]);
    }
    print(&table(&rows))?;
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
        out.push_str(&log::printable(line.trim_end()));
        out.push('\n');
    }
    out
}

/// The beginnings of versions, read by up to eight threads.
fn heads(store: &dyn Store, versions: &[Version]) -> Result<Vec<Option<VersionHead>>> {
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<Option<VersionHead>>> = Mutex::new(vec![None; versions.len()]);
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

/// What an argument names: `@FILE`, `-`, or the text itself.
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
    let published = change(settings, store, StartingPoint::OrEmpty, |manifest| {
        edit::add(manifest, service.clone())?;
        Ok(Some(format!("add-service {name}")))
    })?;
    if published.manifest.serial == 1 {
        log::info("there was no manifest yet: this is the first version");
    }
    Ok(())
}

fn set(settings: &Settings, store: &dyn Store, name: &str, fields: &[String]) -> Result<()> {
    let usage =
        |what: String| Error::usage(format!("{what}; FIELD=VALUE is meant, such as http.internalPort=8081"));
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
    change(settings, store, StartingPoint::Existing, |manifest| {
        let changed = edit::set(manifest, name, &assignments)
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

/// The name beside a kept draft of the text that it was made from.
const BASE: &str = "base.json";

fn edit_text(settings: &Settings, store: &dyn Store) -> Result<()> {
    let author = Author::of(settings)?;
    let current = publish::load(store)?.ok_or_else(|| publish::lost(store, &author))?;
    let (text, next) = match edit_base(store, &author, &current)? {
        EditBase::InForce => (json::pretty(&current.bytes), ""),
        EditBase::Broken => (current.bytes, ""),
        EditBase::Believed(base) => {
            (json::pretty(&base), "; 'deploy-manifest rollback' publishes it as it was")
        }
    };
    let folder = durable::scratch(&std::env::temp_dir())?;
    let file = folder.path().join("manifest.json");
    durable::write(&file, &text, 0o600)?;
    let result = match editor::edit(&file, editor::Traces::Kept) {
        Ok(bytes) if bytes == text => {
            log::info(format!("unchanged: nothing was published{next}"));
            return Ok(());
        }
        Ok(bytes) => publish_edited(settings, store, &bytes, &text),
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

/// What an edit starts from.
enum EditBase {
    /// The version in force.
    InForce,
    /// The text in force, which is no manifest; without trusted keys there is nothing to tell a better one by.
    Broken,
    /// The newest version that is believed, since what is in force is not.
    Believed(Vec<u8>),
}

/// Says what is in force besides, where that is not what the edit starts from.
fn edit_base(store: &dyn Store, author: &Author, current: &CurrentManifest) -> Result<EditBase> {
    let url = store.url();
    let trusting = !author.trust.trusted.is_empty();
    let why = match (author.objection(store, current)?, current.manifest()) {
        (Some(Objection::Unsigned(why)), _) => {
            format!("the manifest in {url} is not to be trusted: {why}")
        }
        (Some(objection), _) => return Err(author.refusal(store, current, &objection)),
        (None, Ok(_)) => return Ok(EditBase::InForce),
        (None, Err(e)) if e.is_newer_version() => return Err(publish::unusable(store, e)),
        (None, Err(e)) if !trusting => {
            log::warning(format!("warning: the manifest in {url} cannot be used: {e}"));
            return Ok(EditBase::Broken);
        }
        (None, Err(e)) => format!("the manifest in {url} cannot be used: {e}"),
    };
    let Some(newest) = author.newest_believed(store)? else {
        return Err(Error::new(format!(
            "{why}, and no version before it is signed by a key in 'trustedPublicKeys'; put back the copy that a host \
             has kept ('{COPY_BACK}') or one of your own ('deploy-manifest rollback @FILE'); or look at what is there \
             ('deploy-manifest show'), and if all of it is right, 'deploy-manifest sign'"
        )));
    };
    log::warning(format!("warning: {why}; you edit {}, the newest that is believed", newest.words()));
    match current.manifest() {
        Ok(there) => {
            log::warning("what is in force differs from it in this, which nobody trusted has signed:");
            for difference in diff(&newest.manifest, there) {
                log::warning(format!("  {difference}"));
            }
        }
        Err(_) => log::warning("what is in force can be looked at with 'deploy-manifest show'"),
    }
    Ok(EditBase::Believed(newest.bytes))
}

/// Reads a file of a draft. What is signed must be this user's own: a draft is kept where everybody can write, and once
/// it was cleaned away there, anybody can make one of its name.
fn own(file: &Path) -> Result<Vec<u8>> {
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
fn publish_draft(settings: &Settings, store: &dyn Store, draft: &Path) -> Result<()> {
    let bytes = own(draft)?;
    let beside = draft.with_file_name(BASE);
    let base = own(&beside).map_err(|e| {
        Error::new(format!(
            "which version {} was made from is not known: {}; open 'deploy-manifest edit' and make the changes there",
            draft.display(),
            e,
        ))
    })?;
    publish_edited(settings, store, &bytes, &base)
}

/// Publishes what a person made of the text `base`: its changes, in what is believed now.
fn publish_edited(settings: &Settings, store: &dyn Store, bytes: &[u8], base: &[u8]) -> Result<()> {
    let edited = parse::manifest_with(bytes, Mode::Tolerant, settings.default_hosts.as_deref())?;
    let Trust { trusted, .. } = Trust::of(settings)?;
    let made_from = parse::manifest(base, Mode::Tolerant).ok();
    if !trusted.is_empty() {
        let check = made_from.as_ref().map(|m| signature::check(base, m, &store.identity(), &trusted));
        if let Some(Err(why)) = check.or(Some(Err("it cannot be read".into()))) {
            return Err(Error::new(format!(
                "the text was made from a version that is not to be trusted: {why}; open 'deploy-manifest edit' and \
                 make the changes there"
            )));
        }
    }
    parse::check_additions(&edited, made_from.as_ref())?;
    change(settings, store, StartingPoint::Repair, |manifest| {
        let Some(base) = &made_from else {
            // What could not be read cannot be merged with: only what was edited may be replaced.
            if publish::load(store)?.is_none_or(|c| c.bytes != base) {
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

fn print_diff(settings: &Settings, store: &dyn Store, words: &[String]) -> Result<()> {
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
fn none_in_force(store: &dyn Store, author: &Author) -> Error {
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

fn only_version(store: &dyn Store) -> Error {
    Error::new(format!("there is no version before the current one in {}", store.url()))
}

/// What is in force, and why it is not built on; None: nothing that can be read is.
struct InForce {
    current: Option<CurrentManifest>,
    objection: Option<Objection>,
}

impl InForce {
    fn of(store: &dyn Store, author: &Author) -> Result<Self> {
        let current = publish::load_to_replace(store)?;
        let objection = current.as_ref().map(|c| author.objection(store, c)).transpose()?.flatten();
        let mut in_force = InForce { current, objection };
        // Who has seen nothing of this store is told by what it has replaced.
        if let Some(there) = in_force.believed()
            && author.remembered(store)?.is_none()
            && let Some(newest) = author.newest_believed(store)?
            && newest.manifest.serial > there.serial
        {
            in_force.objection = Some(Objection::PutBack(Box::new(newest)));
        }
        Ok(in_force)
    }

    /// It, if it is believed.
    fn believed(&self) -> Option<&Manifest> {
        self.signed().filter(|_| self.objection.is_none())
    }

    /// It, unless nobody trusted has signed it.
    fn signed(&self) -> Option<&Manifest> {
        match (&self.current, &self.objection) {
            (Some(_), Some(Objection::Unsigned(_))) => None,
            (Some(current), _) => current.manifest().as_ref().ok(),
            (None, _) => None,
        }
    }
}

fn rollback(settings: &Settings, store: &dyn Store, word: Option<&str>, yes: bool) -> Result<()> {
    if let Some(word) = word.filter(|w| *w == STDIN || w.starts_with('@')) {
        return rollback_to_copy(settings, store, &input(word)?, yes);
    }
    let author = Author::of(settings)?;
    let in_force = InForce::of(store, &author)?;
    // What is off is looked for among all of them.
    let versions = match in_force.current.is_some() && in_force.objection.is_none() {
        true => enough_for(store, word.as_slice())?,
        false => versions::all(store)?,
    };
    // An old one that was put back is left behind also when it says the same: hosts do not obey it.
    let outrun = |serial: u64| versions.iter().any(|v| v.serial > serial);
    let outrun =
        in_force.objection.is_some() || versions.iter().find(|v| v.current).is_some_and(|v| outrun(v.serial));
    let restore = |manifest: &mut Manifest, old: &Manifest, name: &str| {
        // A repair starts from nothing, and restoring nothing is a change there.
        let repaired = manifest.change.by.is_empty();
        let changed = edit::restore(manifest, old) || repaired || outrun;
        changed.then(|| format!("rollback to {name} (serial {})", old.serial))
    };
    let Some(word) = word else {
        let (old, name) = version_before(&author, store, &versions, &in_force)?;
        show_undone(&in_force, &old);
        let shown = in_force.current.map(|current| current.etag);
        if !yes && !confirmed("Publish that?")? {
            return Err(Error::new("nothing was published"));
        }
        let now = &Timestamp::now;
        let published =
            publish::publish_over(store, now, &author, StartingPoint::Replace, shown.as_ref(), |manifest| {
                Ok(restore(manifest, &old, &name))
            })?;
        publish::report(store, &published);
        return Ok(());
    };
    let version = rollback_target(store, &author, &versions, word)?;
    let old = believed(&author, store, version)?;
    drop(in_force);
    change(settings, store, StartingPoint::Replace, |manifest| Ok(restore(manifest, &old, &version.name)))?;
    Ok(())
}

/// How many differences are shown before something is published.
const SHOWN: usize = 30;

/// Says what a rollback undoes, and whose change that was.
fn show_undone(in_force: &InForce, old: &Manifest) {
    let to = belief::words(old);
    let Some(there) = in_force.believed() else {
        return log::notice(format!("back to {to}"));
    };
    log::notice(format!("from {} back to {to}:", belief::words(there)));
    show_differences(diff(there, old).iter());
}

fn show_differences<'a>(mut differences: impl Iterator<Item = &'a Difference>) {
    for difference in differences.by_ref().take(SHOWN) {
        log::notice(format!("  {difference}"));
    }
    match differences.count() {
        0 => {}
        more => log::notice(format!("  and {more} more")),
    }
}

/// What a rollback goes to when nothing was named, and its name: the last version before the one in force that says
/// something else; where that is not believed or is lost, the newest that is.
fn version_before(
    author: &Author,
    store: &dyn Store,
    versions: &[Version],
    in_force: &InForce,
) -> Result<(Manifest, String)> {
    let found = |search: belief::Search, none: Error| {
        let passed_over = search.passed_over();
        match search.found {
            Some(found) => {
                if !passed_over.is_empty() {
                    log::warning(format!("warning: {passed_over}"));
                }
                let name = found.name();
                Ok((found.manifest, name))
            }
            None if passed_over.is_empty() => Err(none),
            None => Err(Error::new(format!("{none}; {passed_over}"))),
        }
    };
    if let (Some(current), Some(there)) = (&in_force.current, in_force.believed()) {
        let before = there.previous.first().filter(|a| a.serial + 1 == there.serial && a.digest.is_some());
        let digest = signature::digest(&current.bytes).ok();
        let otherwise = |old: &Manifest| old.services != there.services || old.extra != there.extra;
        let search = belief::before(store, author, versions, there, digest.as_ref(), otherwise)?;
        let none = match versions.iter().any(|v| v.serial < there.serial) {
            true => Error::new(format!(
                "there is no version before the current one in {} that says something else",
                store.url()
            )),
            false => only_version(store),
        };
        if let Some(before) = before.filter(|b| search.found.is_some() && !search.met.contains(&b.serial)) {
            log::warning(format!(
                "warning: version {}, the one before, is not among the old ones any more",
                before.serial
            ));
        }
        return found(search, none);
    }
    if let (Some(current), Some(objection @ (Objection::PutBack(_) | Objection::Fork(_)))) =
        (&in_force.current, &in_force.objection)
    {
        return Err(author.refusal(store, current, objection));
    }
    if let Some(newest) = author.newest_believed(store)? {
        return Ok((newest.manifest.clone(), newest.name()));
    }
    let all = Manifest { serial: u64::MAX, ..Manifest::empty(Timestamp::default(), "") };
    let none = match &in_force.current {
        None => publish::missing(store),
        Some(current) => match current.manifest() {
            Err(e) if in_force.objection.is_none() => Error::new(format!("{e}, and {}", only_version(store))),
            _ => only_version(store),
        },
    };
    found(belief::before(store, author, versions, &all, None, |_| true)?, none)
}

/// Publishes a copy of a version from somewhere else, above every serial that it shows to have been there.
fn rollback_to_copy(settings: &Settings, store: &dyn Store, bytes: &[u8], yes: bool) -> Result<()> {
    let mut author = Author::of(settings)?;
    let trusted = author.trust.trusted.clone();
    let refused = |why: &str| {
        Err(Error::new(format!(
            "the copy is not to be trusted in {}: {why}; take one that a host of this store has kept",
            store.url()
        )))
    };
    let signed = (!trusted.is_empty()).then(|| signature::verify(bytes, &store.identity(), &trusted));
    if let Some(Some(Err(why))) = signed {
        return refused(&why);
    }
    let copy = parse::manifest(bytes, Mode::Tolerant).map_err(|e| Error::from(e).context("the copy"))?;
    if let Some(None) = signed {
        return refused("it cannot be told who signed it");
    }
    author.at_hand = copy.serial;
    let line = signature::digest(bytes).map(|digest| lineage::line(&copy, digest)).unwrap_or_default();
    let in_force = InForce::of(store, &author)?;
    // Who can write the store can hold a host at an old version, take the newest away, and wait for somebody to put
    // that host's copy back.
    let newest = match in_force.believed() {
        Some(_) => None,
        None => author.newest_believed(store)?,
    };
    if let (Some(newest), Some(Ancestor { digest: Some(digest), .. })) = (&newest, line.first())
        && lineage::relation(&newest.manifest, &newest.digest, copy.serial, digest) == Relation::Later
    {
        return Err(Error::new(format!(
            "the copy is {}, and {} is newer: publish that with {}, and then, if the older one should be in force \
             after all, the copy",
            belief::words(&copy),
            newest.words(),
            belief::publish_again(newest)
        )));
    }
    if let Some(there) = in_force.signed() {
        log::notice(format!("from {} to the copy of {}:", belief::words(there), belief::words(&copy)));
        show_differences(diff(there, &copy).iter());
    }
    let trusting = !trusted.is_empty();
    // A host says that its copy be put back, and it may be nobody's host any more.
    if let (Some(there), Some(current)) =
        (in_force.believed().filter(|_| trusting && !yes), &in_force.current)
        && let (Some(Ancestor { digest: Some(of_copy), .. }), Ok(digest)) =
            (line.first(), signature::digest(&current.bytes))
        && lineage::relation(there, &digest, copy.serial, of_copy) == Relation::Later
        && !(std::io::stdin().is_terminal() && confirmed("Publish that?")?)
    {
        return Err(Error::new(format!(
            "nothing was published: {} is in force, and it comes after the copy, which is {}; to undo what is between \
             them, add '-y'",
            belief::words(there),
            belief::words(&copy)
        )));
    }
    drop(in_force);
    let published = publish::publish(store, &Timestamp::now, &author, StartingPoint::Replace, |manifest| {
        // Whoever has obeyed the copy knows that the new version comes after it.
        let behind = manifest.serial < copy.serial
            || trusting && line.first().is_some_and(|copy| !manifest.previous.contains(copy));
        manifest.previous = lineage::join(&line, &manifest.previous);
        manifest.serial = manifest.serial.max(copy.serial);
        let changed = edit::restore(manifest, &copy) || behind || manifest.change.by.is_empty();
        Ok(changed.then(|| format!("rollback to a copy of serial {}", copy.serial)))
    })?;
    publish::report(store, &published);
    Ok(())
}

/// An old version, if it is signed as the configuration wants it.
fn believed(author: &Author, store: &dyn Store, version: &Version) -> Result<Manifest> {
    Ok(versions::believed(store, version, &author.trust.trusted)?.0)
}

/// The version in force is what one rolls back from: it does not make a beginning ambiguous. Nor does what is not
/// believed.
fn rollback_target<'a>(
    store: &dyn Store,
    author: &Author,
    versions: &'a [Version],
    word: &str,
) -> Result<&'a Version> {
    let older: Vec<Version> = versions.iter().filter(|v| !v.current).cloned().collect();
    let counts = |version: &Version| Ok(belief::examine(store, version, author)?.is_ok());
    let name = match versions::find_where(&older, word, counts) {
        Ok(found) => found.name.clone(),
        // Only the current one fits: then there is nothing to do, which is said later.
        Err(e) => versions::find(store, versions, word).map_err(|_| e)?.name.clone(),
    };
    versions.iter().find(|v| v.name == name).ok_or_else(|| Error::new(format!("no version '{word}'")))
}

/// How many versions are read in search of a service's last change.
const SEARCHED: usize = 200;

fn rollback_service(
    settings: &Settings,
    store: &dyn Store,
    word: Option<&str>,
    name: &str,
    yes: bool,
) -> Result<()> {
    if word.is_some_and(|w| w == STDIN || w.starts_with('@')) {
        return Err(Error::usage("a copy from a file or stdin is put back whole; leave --service out"));
    }
    let author = Author::of(settings)?;
    let (version, old) = match word {
        Some(word) => {
            let versions = enough_for(store, &[word])?;
            let version = rollback_target(store, &author, &versions, word)?;
            (version.name.clone(), believed(&author, store, version)?)
        }
        None => {
            let versions = newest(store, SEARCHED)?.versions;
            let (bytes, now) = publish::believed_text(store, &author)?;
            let entry = now.service(name).ok_or_else(|| edit::unknown_service(name, &now))?;
            let digest = signature::digest(&bytes).ok();
            let otherwise = |old: &Manifest| old.service(name).is_some_and(|o| o != entry);
            let search = belief::before(store, &author, &versions, &now, digest.as_ref(), otherwise)?;
            let passed_over = search.passed_over();
            let Some(found) = search.found else {
                let joint = if passed_over.is_empty() { "" } else { "; " };
                return Err(Error::new(format!(
                    "no version before the current one has '{name}' otherwise than it is now{joint}{passed_over}"
                )));
            };
            if !passed_over.is_empty() {
                log::warning(format!("warning: {passed_over}"));
            }
            let undone = search.after.unwrap_or_else(|| belief::words(&now));
            log::notice(format!("{name} as it was before {undone}, in {}:", found.words()));
            let of_it = |d: &Difference| d.service().is_some_and(|service| service.as_str() == name);
            show_differences(diff(&now, &found.manifest).iter().filter(|d| of_it(d)));
            if !yes && !confirmed("Publish that?")? {
                return Err(Error::new("nothing was published"));
            }
            (found.name(), found.manifest)
        }
    };
    change(settings, store, StartingPoint::Existing, |manifest| {
        let changed = edit::restore_service(manifest, &old, name)?;
        Ok(changed.then(|| format!("rollback {name} to {version} (serial {})", old.serial)))
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
    let versions = enough_for(store, word.as_slice())?;
    let version = match word {
        Some(word) => versions::find(store, &versions, word)?,
        None => match versions.iter().find(|v| v.current) {
            Some(version) => version,
            None => return Err(none_in_force(store, &Author::of(settings)?)),
        },
    };
    if version.current {
        publish::believed(store, &Author::of(settings)?)?;
    }
    let (_, mut names) = versions::believed(store, version, &trusted)?;
    names.sort();
    names.dedup();
    print(&names.iter().map(|name| format!("{}\n", log::printable(name))).collect::<String>())
}

/// Believes the version in force, of this number, from now on.
fn accept(settings: &Settings, store: &dyn Store, number: u64) -> Result<()> {
    let author = Author::of(settings)?;
    if author.trust.trusted.is_empty() {
        return Err(Error::new(
            "nothing is remembered without 'trustedPublicKeys': there is nothing to accept",
        ));
    }
    let current = publish::load(store)?.ok_or_else(|| publish::missing(store))?;
    match author.objection(store, &current)? {
        Some(objection @ Objection::Unsigned(_)) => return Err(author.refusal(store, &current, &objection)),
        Some(Objection::PutBack(_) | Objection::Fork(_)) | None => {}
    }
    let there = current.manifest().as_ref().map_err(|e| publish::unusable(store, e))?;
    if there.serial != number {
        return Err(Error::new(format!(
            "the manifest in {} is {}, not version {number}; nothing was accepted",
            store.url(),
            belief::words(there)
        )));
    }
    author.believe(store, &current.bytes);
    log::notice(format!(
        "accepted: this machine believes {} from now on ({})",
        belief::words(there),
        store.url()
    ));
    Ok(())
}

/// Signs what is in force: as it is if it is believed; else as a new version, after a person has seen what it is.
fn sign(settings: &Settings, store: &dyn Store, hash: Option<&str>) -> Result<()> {
    let author = Author::of(settings)?;
    author.signer()?;
    let current = publish::load(store)?.ok_or_else(|| publish::missing(store))?;
    let why = match author.objection(store, &current)? {
        None => {
            match publish::add_signature(store, &author)? {
                true => log::notice(format!("signed ({})", store.url())),
                false => {
                    log::info(format!("unchanged: it has this key's signature already ({})", store.url()))
                }
            }
            return Ok(());
        }
        Some(Objection::Unsigned(why)) => why,
        Some(objection) => return Err(author.refusal(store, &current, &objection)),
    };
    let there = current.manifest().as_ref().map_err(|e| publish::unusable(store, e))?;
    let digest = signature::digest(&current.bytes).map_err(Error::new)?;
    match hash {
        // Whole: two documents whose hashes begin alike are soon found, and one of them could be shown.
        Some(hash) if digest.as_str() == hash => {}
        Some(hash) => {
            return Err(Error::new(format!(
                "the manifest in {} has the hash {digest}, not {hash}; look at it again with 'deploy-manifest \
                 sign'",
                store.url()
            )));
        }
        None => show_unsigned(store, &author, there, &why)?,
    }
    if let Some(Objection::PutBack(seen) | Objection::Fork(seen)) = author.contradiction(store, &current)? {
        return Err(Error::new(format!(
            "no host that obeyed {} takes this one, whoever signs it; go back with 'deploy-manifest \
             rollback', then make the changes that are right again",
            seen.words()
        )));
    }
    if hash.is_none() && !std::io::stdin().is_terminal() {
        return Err(Error::new(format!(
            "nothing was signed; if all of it is right, 'deploy-manifest sign --hash {digest}'"
        )));
    }
    if hash.is_none() && !confirmed("Is all of it right, and shall it be signed?")? {
        return Err(Error::new("nothing was signed"));
    }
    publish::report(store, &publish::adopt(store, &Timestamp::now, &author, &digest)?);
    Ok(())
}

/// Shows what differs from the newest version that is believed.
fn show_unsigned(store: &dyn Store, author: &Author, there: &Manifest, why: &str) -> Result<()> {
    let url = store.url();
    log::warning(format!("{} in {url} is not to be trusted: {why}", belief::words(there)));
    let empty = Manifest::empty(there.generation, "");
    let newest = author.newest_believed(store)?;
    match &newest {
        Some(newest) => {
            log::warning(format!("it differs from {}, the newest that is believed, in:", newest.words()))
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
fn confirmed(question: &str) -> Result<bool> {
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
    log::info(format!("valid: {shown} has {said}"));
    Ok(())
}

fn validate_store(settings: &Settings, store: &dyn Store) -> Result<()> {
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

fn count(services: usize) -> String {
    if services == 1 { "1 service".into() } else { format!("{services} services") }
}
