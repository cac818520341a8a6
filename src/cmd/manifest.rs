//! `deploy-manifest`: reads, edits and publishes the manifest. What a change is, is in
//! [`crate::manifest::edit`]; how it is published, in [`crate::manifest::publish`].

mod draft;
mod read;
mod rollback;
mod sign;

use super::{Call, editor, print};
use crate::config::Settings;
use crate::error::{Error, Exit, Result, io_text};
use crate::log;
use crate::manifest::current::{self, CurrentManifest};
use crate::manifest::model::Manifest;
use crate::manifest::parse::{self, Mode};
use crate::manifest::publish::{self, PublishedManifest, StartingPoint};
use crate::manifest::trust::{Author, RejectReason};
use crate::manifest::{edit, schema};
use crate::names::{ServiceName, StorePath};
use crate::store::{MAX_REPLACED, Store};
use argh::{ArgsInfo, FromArgs};
use std::io::Read;
use std::path::Path;

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
    /// name of a version, an unambiguous beginning of one, or its number; default: the current one
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
    /// the older version (name, beginning of one, or number), default: the one before the current; and the
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
    /// the version (name, an unambiguous beginning of one, or number), @FILE, or - for stdin
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
    /// forget what this machine has seen, and trust the current version, which must have this number: the store was
    /// created again or restored on purpose
    #[argh(option, arg_name = "number", from_str_fn(super::number))]
    accept_version: Option<u64>,
    /// the version: a name of the list, its beginning, or its number; default: the current one
    #[argh(positional)]
    version: Option<String>,
}

/// Print the JSON Schema of the manifest.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "schema", example = "{command_name} > manifest.schema.json")]
struct SchemaArgs {}

/// Stands for what comes on stdin.
const STDIN: &str = "-";

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    match args.command {
        Command::Schema(SchemaArgs {}) => print(schema::TEXT)?,
        Command::Validate(Validate { file: Some(file) }) => read::validate_file(&call.settings()?, &file)?,
        command => {
            if matches!(command, Command::Edit(_)) {
                editor::ignore_its_signals(call)?;
            }
            let settings = call.settings()?;
            let store = crate::store::open(&settings.store)?;
            with_store(command, &Session { settings: &settings, store: &*store })?;
        }
    }
    Ok(Exit::Done)
}

/// The configuration, and the store that it names.
struct Session<'a> {
    settings: &'a Settings,
    store: &'a dyn Store,
}

impl<'a> Session<'a> {
    /// Who publishes: reads the key that signs.
    fn author(&self) -> Result<Author<'a>> {
        Author::of(self.settings, self.store)
    }
}

fn with_store(command: Command, session: &Session) -> Result<()> {
    match command {
        Command::Init(Init {}) => {
            let published = publish::init(&session.author()?, StartingPoint::Begin)?;
            if published.written {
                publish::report(session.store, &published);
            } else {
                let (serial, url) = (published.manifest.serial, session.store.url());
                log::info(format!("unchanged: there is already a manifest, version {serial} ({url})"));
            }
        }
        Command::Show(Show { version, service }) => {
            read::show(session, version.as_deref(), service.as_deref())?;
        }
        Command::List(List { json, number, all }) => {
            read::list(session, json, if all { usize::MAX } else { number })?
        }
        Command::Update(Update { name, path, revision }) => {
            let path = StorePath::parse(&path).map_err(|why| Error::new(format!("'{path}' {why}")))?;
            let revision = revision.filter(|r| !r.is_empty());
            change(&session.author()?, StartingPoint::Existing, |manifest| {
                let changed = edit::update(manifest, &name, &path, revision.as_deref())?;
                Ok(changed.then(|| format!("update {name}")))
            })?;
        }
        Command::AddService(AddService { service }) => add_service(session, &service)?,
        Command::RemoveService(RemoveService { name }) => {
            change(&session.author()?, StartingPoint::Existing, |manifest| {
                edit::remove(manifest, &name)?;
                Ok(Some(format!("remove-service {name}")))
            })?;
        }
        Command::Set(Set { name, field, more }) => {
            set(session, &name, &[&[field], more.as_slice()].concat())?
        }
        Command::Edit(Edit { draft: None }) => draft::edit_text(session)?,
        Command::Edit(Edit { draft: Some(draft) }) => draft::publish_draft(session, Path::new(&draft))?,
        Command::Diff(Diff { versions }) => read::print_diff(session, &versions)?,
        Command::Rollback(Rollback { version, service: None, yes }) => {
            rollback::rollback(session, version.as_deref(), yes)?
        }
        Command::Rollback(Rollback { version, service: Some(name), yes }) => {
            rollback::rollback_service(session, version.as_deref(), &name, yes)?;
        }
        Command::Validate(_) => read::validate_store(session)?,
        Command::Sign(Sign { hash }) => sign::sign(session, hash.as_deref())?,
        Command::Verify(Verify { version: None, accept_version: Some(number) }) => {
            sign::accept(session, number)?
        }
        Command::Verify(Verify { version: Some(_), accept_version: Some(_) }) => {
            return Err(Error::usage("only the version in force can be accepted; leave the other one out"));
        }
        Command::Verify(Verify { version, accept_version: None }) => {
            sign::verify(session, version.as_deref())?
        }
        Command::Schema(_) => {}
    }
    Ok(())
}

/// Publishes a change and says so in one line.
fn change(
    author: &Author,
    start: StartingPoint,
    change: impl FnMut(&mut Manifest) -> Result<Option<String>>,
) -> Result<PublishedManifest> {
    let published = publish::publish(author, start, change)?;
    publish::report(author.store, &published);
    Ok(published)
}

/// What an argument names: `@FILE`, `-`, or the text itself.
fn input(word: &str) -> Result<Vec<u8>> {
    match word.strip_prefix('@') {
        None if word == STDIN => stdin(),
        Some(STDIN) => stdin(),
        Some(file) => fs_err::read(file)
            .map_err(|e| Error::new(format!("{}; expected the path of a file after '@'", io_text(&e)))),
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

fn add_service(session: &Session, word: &str) -> Result<()> {
    let bytes = input(word)?;
    let service = parse::service_from(&bytes, Mode::Strict, session.settings.default_hosts.as_deref())
        .map_err(|e| Error::from(e).context("the service"))?;
    let name = service.name.clone();
    let published = change(&session.author()?, StartingPoint::OrEmpty, |manifest| {
        edit::add(manifest, service.clone())?;
        Ok(Some(format!("add-service {name}")))
    })?;
    if published.manifest.serial == 1 {
        log::info("there was no manifest yet: this is the first version");
    }
    Ok(())
}

fn set(session: &Session, name: &str, fields: &[String]) -> Result<()> {
    let assignments = fields.iter().map(|field| match field.split_once('=') {
        Some((field, value)) if !field.is_empty() => Ok((field, value)),
        _ => Err(Error::usage(format!(
            "'{field}' sets nothing; expected FIELD=VALUE, such as http.internalPort=8081"
        ))),
    });
    let assignments = assignments.collect::<Result<Vec<(&str, &str)>>>()?;
    let named: Vec<&str> = assignments.iter().map(|(field, _)| *field).collect();
    change(&session.author()?, StartingPoint::Existing, |manifest| {
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

/// What is in force, and why it is not built on; None: nothing that can be read is.
struct InForce {
    current: Option<CurrentManifest>,
    reason: Option<RejectReason>,
}

impl InForce {
    fn of(author: &Author) -> Result<Self> {
        let current = current::load_within(author.store, MAX_REPLACED)?;
        let reason = current.as_ref().map(|c| author.reject_reason(c)).transpose()?.flatten();
        let mut in_force = InForce { current, reason };
        // Who has seen nothing of this store is told by what it has replaced.
        if let Some(there) = in_force.trusted()
            && author.remembered()?.is_none()
            && let Some(newest) = author.newest_trusted()?
            && newest.manifest.serial > there.serial
        {
            in_force.reason = Some(RejectReason::PutBack(Box::new(newest)));
        }
        Ok(in_force)
    }

    /// It, if it is trusted.
    fn trusted(&self) -> Option<&Manifest> {
        self.signed().filter(|_| self.reason.is_none())
    }

    /// It, unless nobody trusted has signed it.
    fn signed(&self) -> Option<&Manifest> {
        match (&self.current, &self.reason) {
            (Some(_), Some(RejectReason::Unsigned(_))) => None,
            (Some(current), _) => current.manifest().as_ref().ok(),
            (None, _) => None,
        }
    }
}
