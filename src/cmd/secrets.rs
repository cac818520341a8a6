//! `omni-deploy secrets`: looks at a service's secrets on its hosts, and edits them. What is in them goes from the
//! host to a folder in memory, and back over stdin: never into an argument, a log, or a message. On the host the
//! same program does the work, as root ([`crate::secrets`]).

use super::editor::{self, Traces, as_the_terminal_has_it};
use super::{Call, hosts_of, listed, print};
use crate::config::Settings;
use crate::deployer::live;
use crate::deployer::root::Root;
use crate::durable;
use crate::error::{Error, Exit, Result};
use crate::files::if_there;
use crate::log::{self, printable};
use crate::manifest::publish;
use crate::manifest::trust::Author;
use crate::manifest::{Manifest, Service, edit};
use crate::names::{HostName, ServiceName};
use crate::parallel;
use crate::runner::{BackgroundProcess, ProcessStatus, Run, tail};
use crate::secrets::{
    self, FileFormat, FileState, MAX_FILE, SecretFile, WriteRequest, WriteResult, environment,
};
use crate::ssh;
use argh::{ArgsInfo, FromArgs};
use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Look at a service's secrets on its hosts, or edit them. They are files there and nowhere else; the manifest
/// only says where.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "secrets",
    example = "{command_name} check ava\n{command_name} edit ava --host biz",
    note = "'{command_name} help COMMAND' has the arguments and an example of each command."
)]
pub(super) struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand)]
enum Command {
    Check(CheckArgs),
    Edit(SecretsEditArgs),
    OnHost(OnHost),
    Sweep(Sweep),
}

/// Check a service's secrets on its hosts: that they exist, that only root can read them, that systemd can read them,
/// and that the service was started after they were changed. Prints names of variables, never a value.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "check",
    example = "{command_name} ava\n{command_name} ava --host biz",
    error_code(0, "all is well"),
    error_code(1, "no such service, or a host cannot be reached"),
    error_code(3, "something is wrong, and the command to type was printed")
)]
struct CheckArgs {
    /// the service
    #[argh(positional)]
    service: String,
    /// only this host
    #[argh(option)]
    host: Option<String>,
}

/// Edit a service's secrets on a host with $VISUAL or $EDITOR. Nothing is written if systemd would misread it, or if
/// somebody else has changed the file meanwhile; the text is then kept, and a message says where. The host needs this
/// program and a sudo that asks for no password.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "edit",
    example = "{command_name} ava\n{command_name} ava --host biz --restart",
    note = "While you edit, the text is in a folder in memory (/dev/shm) that is yours alone; where there is none, a \
            message says where the text goes. vim and nvim are told to keep nothing of it elsewhere (-n -i NONE, \
            noundofile, nobackup); what other editors keep is up to them."
)]
struct SecretsEditArgs {
    /// the service
    #[argh(positional)]
    service: String,
    /// the host; needed when the service has several
    #[argh(option)]
    host: Option<String>,
    /// which file, when the service has several
    #[argh(option)]
    file: Option<String>,
    /// restart the service afterwards without asking
    #[argh(switch)]
    restart: bool,
}

// The host's side: one question, answered on stdout. Without a description a command is shown to nobody.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "on-host", description = "")]
struct OnHost {
    #[argh(positional)]
    verb: String,
    #[argh(positional)]
    service: String,
    #[argh(positional, from_str_fn(FileFormat::parse))]
    form: FileFormat,
    #[argh(positional)]
    path: String,
}

// Removes an edit's folder when its stdin ends.
#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand, name = "sweep", description = "")]
struct Sweep {
    #[argh(positional)]
    folder: PathBuf,
}

/// What keeps the folder.
const KEEP: &str = "keep";
/// How long a host may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// How long a restart may take.
const RESTART_WITHIN: Duration = Duration::from_secs(180);

pub(super) fn run(call: &Call, args: Args) -> Result<Exit> {
    match args.command {
        Command::OnHost(OnHost { verb, service, form, path }) => on_host(&verb, &service, form, &path),
        Command::Sweep(Sweep { folder }) => sweep(&folder),
        Command::Check(args) => check(&call.settings()?, &args),
        Command::Edit(args) => edit_on_host(call, &args),
    }
}

/// The host's side: one question, answered on stdout.
fn on_host(verb: &str, service: &str, form: FileFormat, path: &str) -> Result<Exit> {
    let name = ServiceName::parse(service)
        .map_err(|why| Error::usage(format!("the service '{}' {why}", printable(service))))?;
    if !ssh::is_root() {
        return Err(Error::new("only root can read secrets; run this with sudo"));
    }
    let path = Path::new(path);
    let answer = match verb {
        "look" | "read" => serde_json::to_string(&secrets::look(&name, path, form, verb == "read")?),
        "write" => {
            let mut wanted = Vec::new();
            std::io::stdin().take(MAX_FILE * 2).read_to_end(&mut wanted)?;
            let wanted: WriteRequest =
                serde_json::from_slice(&wanted).map_err(|_| Error::new("stdin is not a request to write"))?;
            serde_json::to_string(&secrets::write(path, &wanted)?)
        }
        _ => return Err(Error::usage("expected look, read or write")),
    };
    print(&answer.map_err(|e| Error::new(format!("cannot write the answer: {e}")))?).map(|()| Exit::Done)
}

/// Waits for the end of stdin, which comes when the editing process ends, however it ends; then removes its
/// folder, unless it was told to keep it.
fn sweep(folder: &Path) -> Result<Exit> {
    if !folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(durable::TEMP_PREFIX)) {
        return Err(Error::usage(format!("'{}' is not a folder that an edit made", folder.display())));
    }
    let mut word = String::new();
    std::io::stdin().take(KEEP.len() as u64).read_to_string(&mut word)?;
    if word != KEEP {
        if_there(fs_err::remove_dir_all(folder))?;
    }
    Ok(Exit::Done)
}

/// The manifest; on a host that has no way to the bucket, the last good one of its deployer.
fn manifest(settings: &Settings) -> Result<Manifest> {
    let read = || {
        let store = crate::store::open(&settings.store)?;
        publish::read_trusted(&Author::of(settings, store.as_ref())?)
    };
    read().or_else(|e| {
        let kept = Root::system(&settings.unit_dir).manifest();
        let last = live::obeyed(&settings.unit_dir).filter(|_| ssh::is_root()).ok_or_else(|| e.clone())?;
        log::warning(format!("{e}; going by the last good manifest, {}", kept.display()));
        Ok(last)
    })
}

/// A service, its hosts or the one of them that is named, and its files of secrets.
fn placed(
    settings: &Settings,
    name: &str,
    host: Option<&str>,
) -> Result<(Service, Vec<HostName>, Vec<SecretFile>)> {
    let manifest = manifest(settings)?;
    let service = manifest.service(name).ok_or_else(|| edit::unknown_service(name, &manifest))?;
    Ok((service.clone(), hosts_of(service, host)?, secrets::files(service)))
}

fn no_secrets(service: &Service) -> String {
    format!(
        "{0} has no secrets file; give it one: deploy-manifest set {0} envFile=/var/lib/deployer-secrets/{0}.env",
        service.name
    )
}

/// The answer of a host's side.
fn ask<T: serde::de::DeserializeOwned>(
    settings: &Settings,
    host: &HostName,
    verb: &str,
    name: &ServiceName,
    file: &SecretFile,
    stdin: Vec<u8>,
) -> Result<T> {
    let ours = std::env::current_exe()?.to_string_lossy().into_owned();
    let program = if ssh::is_here(settings, host) { ours.as_str() } else { "omni-deploy" };
    let words = [program, "secrets", "on-host", verb, name.as_str(), file.form.as_str(), &file.path];
    let run = ssh::run_on(settings, host, true, &words).stdin(stdin).deadline(ANSWER_WITHIN);
    let output = ssh::answer_of(settings, host, &words[..4], as_the_terminal_has_it(run))?;
    if output.status.ok() {
        return serde_json::from_slice(&output.stdout).map_err(|_| {
            Error::new(format!(
                "omni-deploy on {host} gives an answer that this version does not know; install this version there"
            ))
        });
    }
    let said = tail(&output.stderr);
    let unknown = matches!(output.status, ProcessStatus::Exit(127)) || said.contains("command not found");
    Err(Error::new(if unknown || output.status == ProcessStatus::Exit(Exit::Usage.code().into()) {
        format!("host {host} has no omni-deploy that knows 'secrets': {said}; install this version there")
    } else if said.is_empty() {
        format!("host {host}: omni-deploy there ended with {} and said nothing", output.status)
    } else {
        format!("host {host}: {}", said.trim_start_matches("error: "))
    }))
}

/// What to type for a command on a host.
fn typed(settings: &Settings, host: &HostName, command: &str) -> String {
    match ssh::is_here(settings, host) {
        true => format!("sudo {command}"),
        false => format!("{} {host} sudo {command}", settings.ssh.join(" ")),
    }
}

fn check(settings: &Settings, args: &CheckArgs) -> Result<Exit> {
    let (service, hosts, files) = placed(settings, &args.service, args.host.as_deref())?;
    if files.is_empty() {
        log::info(no_secrets(&service));
        return Ok(Exit::Done);
    }
    let pairs: Vec<(&HostName, &SecretFile)> =
        hosts.iter().flat_map(|host| files.iter().map(move |file| (host, file))).collect();
    let answers: Vec<Result<FileState>> = parallel::map(&pairs, pairs.len(), |(host, file)| {
        ask(settings, host, "look", &service.name, file, Vec::new())
    });
    let (mut code, mut failed) = (Exit::Done, false);
    for ((host, file), answer) in pairs.iter().zip(answers) {
        match answer {
            Ok(found) => {
                if !found.problems.is_empty() || !found.mistakes.is_empty() {
                    code = code.max(Exit::Degraded);
                }
                print(&description(settings, &service, host, file, &found))?;
            }
            // Whoever does not answer may have anything.
            Err(e) => {
                failed = true;
                log::error(format!("error: {e}"));
            }
        }
    }
    Ok(if failed { Exit::Failed } else { code })
}

/// What is known of a file on a host, a line for each thing.
fn description(
    settings: &Settings,
    service: &Service,
    host: &HostName,
    file: &SecretFile,
    found: &FileState,
) -> String {
    let mut lines = found.problems.clone();
    lines.extend(found.mistakes.iter().map(|mistake| format!("{}: {mistake}", file.path)));
    if lines.is_empty() {
        let names = match (file.form, found.names.is_empty()) {
            (FileFormat::Bytes, _) => "well".to_string(),
            (FileFormat::Environment, true) => "sets nothing".to_string(),
            (FileFormat::Environment, false) => found.names.join(", "),
        };
        lines.push(format!("{}: {names}", file.path));
    }
    if found.newer {
        let restart = typed(settings, host, &format!("systemctl restart {}", service.name));
        lines.push(format!(
            "{} was started before {} was changed; restart to pick that up: {restart}",
            service.name, file.path
        ));
    }
    lines.iter().map(|line| format!("{host}: {}\n", printable(line))).collect()
}

fn edit_on_host(call: &Call, args: &SecretsEditArgs) -> Result<Exit> {
    editor::ignore_its_signals(call)?;
    let settings = call.settings()?;
    let (service, hosts, files) = placed(&settings, &args.service, args.host.as_deref())?;
    let [host] = hosts.as_slice() else {
        return Err(Error::new(format!("{} runs on {}; name one with --host", service.name, listed(&hosts))));
    };
    let named = |file: &&SecretFile| {
        let Some(named) = args.file.as_deref() else { return true };
        file.path == named || Path::new(&file.path).file_name().is_some_and(|n| n == named)
    };
    let chosen: Vec<&SecretFile> = files.iter().filter(named).collect();
    let [file] = chosen.as_slice() else {
        let paths: Vec<&str> = files.iter().map(|f| f.path.as_str()).collect();
        return Err(Error::new(match paths.as_slice() {
            [] => no_secrets(&service),
            _ => format!("{} has {}; name one of them with --file", service.name, paths.join(", ")),
        }));
    };
    let found: FileState = ask(&settings, host, "read", &service.name, file, Vec::new())?;
    if !edited(&settings, host, &service, file, &found)? {
        return Ok(Exit::Done);
    }
    log::info(format!("{host}: wrote {}", file.path));
    after(&settings, host, &service, found.running, args.restart)
}

/// The folder in which a person edits: in memory where there is such a place, theirs alone, and gone when we are.
struct DraftFolder {
    folder: PathBuf,
    sweeper: BackgroundProcess,
}

impl DraftFolder {
    fn new() -> Result<Self> {
        let in_memory = secrets::folder_in_memory();
        let folder = durable::scratch(in_memory.as_deref().unwrap_or(&std::env::temp_dir()))?;
        if in_memory.is_none() {
            log::warning(format!(
                "this machine has no folder in memory for you (/dev/shm, XDG_RUNTIME_DIR): while you edit, the text is on \
                 the disk, in {}",
                folder.path().display()
            ));
        }
        let program = std::env::current_exe()?.to_string_lossy().into_owned();
        let sweeper = Run::new(program).args(["secrets", "sweep"]).arg(folder.path()).spawn_detached()?;
        Ok(DraftFolder { folder: folder.keep(), sweeper })
    }

    /// Ends it; `keep` leaves the folder for the person.
    fn clear(self, keep: bool) -> Result<()> {
        let status = self.sweeper.finish(if keep { KEEP } else { "" })?;
        match status.ok() {
            true => Ok(()),
            false => Err(Error::new(format!(
                "{} could not be removed ({status}); it holds secrets: rm -r {0}",
                self.folder.display()
            ))),
        }
    }
}

/// Has a file edited, of which this was found, and written back. Returns whether it was; an error keeps what the person
/// has written.
fn edited(
    settings: &Settings,
    host: &HostName,
    service: &Service,
    file: &SecretFile,
    found: &FileState,
) -> Result<bool> {
    let before = found.content.as_deref().map(secrets::decode).transpose()?.unwrap_or_default();
    let drafts = DraftFolder::new()?;
    let name = Path::new(&file.path).file_name().unwrap_or_default();
    let draft = drafts.folder.join(name);
    let result = durable::write(&draft, &before, 0o600).map_err(Error::from).and_then(|()| {
        let text = editor::edit(&draft, Traces::None)?;
        if text == before {
            return Ok(false);
        }
        if let (FileFormat::Environment, (_, mistakes)) = (file.form, environment::read(&text))
            && !mistakes.is_empty()
        {
            let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            return Err(Error::new(format!("nothing was written: {}", lines.join("; "))));
        }
        if text.len() as u64 > MAX_FILE {
            return Err(Error::new(format!("nothing was written: it has more than {MAX_FILE} bytes")));
        }
        let wanted = WriteRequest { instead_of: found.hash.clone(), content: secrets::encode(&text) };
        let wanted = serde_json::to_vec(&wanted)
            .map_err(|_| Error::new("nothing was written: it cannot be put into a message"))?;
        match ask(settings, host, "write", &service.name, file, wanted)? {
            WriteResult::Done => Ok(true),
            WriteResult::Changed => Err(Error::new(format!(
                "nothing was written: somebody else changed {} on {host} meanwhile",
                file.path
            ))),
        }
    });
    let keep = result.is_err() && fs_err::read(&draft).is_ok_and(|text| text != before);
    let folder = drafts.folder.display().to_string();
    drafts.clear(keep)?;
    if result == Ok(false) {
        log::info("unchanged: nothing was written");
    }
    result.map_err(|e| match keep {
        true => Error::new(format!(
            "{e}; your text is kept in {0}: correct it there, then VISUAL='cp {0}' omni-deploy secrets edit {1} --host \
             {host}, and rm -r {folder}",
            draft.display(),
            service.name
        )),
        false => e,
    })
}

/// Restarts the service, or asks whether to, or says how.
fn after(
    settings: &Settings,
    host: &HostName,
    service: &Service,
    running: bool,
    restart: bool,
) -> Result<Exit> {
    // One that waits for its secrets is the deployer's to start, which looks at them again now.
    let (verb, unit) =
        if running { ("restart", service.name.unit()) } else { ("start", "deployer.service".into()) };
    let short = unit.trim_end_matches(".service");
    let typed = typed(settings, host, &format!("systemctl {verb} {short}"));
    let wanted = restart || {
        let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        terminal && agreed(&format!("{verb} {short} on {host} now? [y/N] "))?
    };
    if !wanted {
        log::info(format!("{} sees it after: {typed}", service.name));
        return Ok(Exit::Done);
    }
    let words = ["systemctl", verb, "--", &unit];
    let run = ssh::run_on(settings, host, true, &words).deadline(RESTART_WITHIN);
    let output = ssh::answer_of(settings, host, &words, as_the_terminal_has_it(run))?;
    if !output.status.ok() {
        log::error(format!("error: host {host}: systemctl {verb} {short}: {}", tail(&output.stderr)));
        return Ok(Exit::Failed);
    }
    log::info(format!("{host}: {verb}ed {short}"));
    Ok(Exit::Done)
}

fn agreed(question: &str) -> Result<bool> {
    let mut err = std::io::stderr().lock();
    err.write_all(question.as_bytes()).and_then(|()| err.flush())?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
