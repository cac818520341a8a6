//! Connections to the hosts that a push will be followed on, opened while its closure is still being copied: an ssh that
//! stays (ssh_config(5), ControlMaster), in a folder of this user's alone, over which the later ones go. Only where ssh
//! is OpenSSH's and nobody has configured that for himself. One that does not come about costs nothing: the later ssh
//! then connects by itself. They end with this process, however it ends.

use crate::config::Settings;
use crate::durable;
use crate::names::HostName;
use crate::runner::{BackgroundProcess, Run};
use crate::ssh;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

/// The longest name of the folder: with the names in it, and what ssh adds while it makes one, a socket's address has
/// 108 bytes (unix(7)).
const MAX_FOLDER: usize = 64;
/// How long ssh may take to say how it is configured.
const SAYS_WITHIN: Duration = Duration::from_secs(5);

/// Connections that are being opened.
#[derive(Debug)]
pub struct Opening(Option<JoinHandle<Option<Connections>>>);

/// Connections that may be used until this is dropped.
#[derive(Debug)]
pub struct Connections {
    // They end when their stdin does, and go before their folder.
    _masters: Vec<BackgroundProcess>,
    _folder: tempfile::TempDir,
    paths: BTreeMap<HostName, PathBuf>,
}

/// Begins to open connections to these hosts, and does not wait for them.
pub fn open(settings: &Settings, hosts: &BTreeSet<HostName>) -> Opening {
    let hosts: Vec<HostName> = hosts.iter().filter(|host| !ssh::is_here(settings, host)).cloned().collect();
    if hosts.is_empty() || !ssh::is_ssh(settings) {
        return Opening(None);
    }
    let settings = settings.clone();
    Opening(Some(std::thread::spawn(move || connections(&settings, &hosts))))
}

impl Opening {
    /// Settings by which the hosts are reached over what was opened, for as long as the second is there.
    pub fn settings(mut self, settings: &Settings) -> (Settings, Option<Connections>) {
        let opened = self.take();
        let ssh_control = opened.as_ref().map(|all| all.paths.clone()).unwrap_or_default();
        (Settings { ssh_control, ..settings.clone() }, opened)
    }

    fn take(&mut self) -> Option<Connections> {
        self.0.take().and_then(|thread| thread.join().ok().flatten())
    }
}

impl Drop for Opening {
    /// Of a push that failed: what was opened goes with it, and its folder.
    fn drop(&mut self) {
        drop(self.take());
    }
}

fn connections(settings: &Settings, hosts: &[HostName]) -> Option<Connections> {
    let folder = folder()?;
    let mut paths = BTreeMap::new();
    let mut masters = Vec::new();
    for (n, host) in hosts.iter().enumerate() {
        if !is_free(settings, host) {
            continue;
        }
        let path = folder.path().join(n.to_string());
        // The folder goes with the last of them also where this process is killed.
        let script = "\"$@\"; rmdir \"$0\" 2>/dev/null";
        let words = master(settings, host, &path);
        let run = Run::new("sh").args(["-c", script]).arg(folder.path()).args(words);
        if let Ok(master) = run.spawn_detached() {
            masters.push(master);
            paths.insert(host.clone(), path);
        }
    }
    (!paths.is_empty()).then_some(Connections { _masters: masters, _folder: folder, paths })
}

/// A folder whose name leaves room for a socket's. That of temporary files has a long name on some systems.
fn folder() -> Option<tempfile::TempDir> {
    // In the value of an option, these mean something.
    let plain =
        |text: &str| text.len() <= MAX_FOLDER && !text.contains(['%', ' ', '"', '\'', '\\', '$', '~']);
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    runtime.into_iter().chain([std::env::temp_dir(), "/tmp".into()]).find_map(|dir| {
        let folder = durable::scratch(&dir).ok()?;
        folder.path().to_str().is_some_and(plain).then_some(folder)
    })
}

/// An ssh that holds the connection for as long as its stdin is open.
fn master(settings: &Settings, host: &HostName, path: &Path) -> Vec<String> {
    let mut words = ssh::with_options(settings);
    let path = format!("ControlPath={}", path.display());
    words.extend(["-o", "ControlMaster=yes", "-o", &path, "-T", "--"].map(String::from));
    words.extend([host.to_string(), "cat".to_string()]);
    words
}

/// Whether ssh is one that knows of this, and nobody has configured it for this host.
fn is_free(settings: &Settings, host: &HostName) -> bool {
    let words = ssh::with_options(settings);
    let run = Run::new(&words[0]).args(&words[1..]).args(["-G", "--", host.as_str()]);
    let says = run.deadline(SAYS_WITHIN).output();
    says.is_ok_and(|output| output.status.ok() && unconfigured(&output.text()))
}

/// What `ssh -G` prints of it: `controlmaster` always, `controlpath` where there is one.
fn unconfigured(text: &str) -> bool {
    let of = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    of("controlmaster") == Some("false") && of("controlpath").is_none_or(|path| path == "none")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, load};

    #[test]
    fn what_somebody_has_configured_is_left_alone() {
        for (text, free) in [
            ("host biz\ncontrolmaster false\nport 22\n", true),
            ("controlmaster false\ncontrolpath none\n", true),
            ("controlmaster auto\n", false),
            ("controlmaster false\ncontrolpath /home/ann/.ssh/%C\n", false),
            // Not OpenSSH's.
            ("", false),
            ("Usage: ssh\n", false),
        ] {
            assert_eq!(unconfigured(text), free, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_opened_changes_nothing() {
        let hosts = BTreeSet::from([HostName::parse("biz").unwrap(), HostName::parse("here").unwrap()]);
        for program in ["ssh-of-nobody", "false", "sh /nowhere/ssh"] {
            let flags = Flags::from([("host", "here".to_string()), ("ssh", program.to_string())]);
            let settings = load(&flags).unwrap();
            let (with, connections) = open(&settings, &hosts).settings(&settings);
            assert!(connections.is_none() && with.ssh_control.is_empty(), "{program}");
        }
    }

    #[test]
    fn connections_end_and_their_folder_is_gone_when_they_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        // Stands for OpenSSH's: says that nothing is configured, or holds its stdin, and tells when that ends.
        let script = dir.path().join("script");
        let text = format!(
            "case \" $* \" in *' -G '*) echo controlmaster false;; *) cd '{}'; echo \"$*\" >told; cat; echo over >>told;; esac\n",
            dir.path().display()
        );
        durable::write(&script, text.as_bytes(), 0o644).unwrap();
        // A program that was just written is busy while another thread's child still has it open.
        let program = dir.path().join("ssh");
        fs_err::os::unix::fs::symlink("/bin/sh", &program).unwrap();
        let ssh = format!("{} {}", program.display(), script.display());
        let flags = Flags::from([("host", "here".to_string()), ("ssh", ssh)]);
        let settings = load(&flags).unwrap();
        let hosts = BTreeSet::from([HostName::parse("biz").unwrap(), HostName::parse("here").unwrap()]);
        let (with, connections) = open(&settings, &hosts).settings(&settings);
        let path = with.ssh_control.get(&HostName::parse("biz").unwrap()).unwrap().clone();
        assert_eq!(with.ssh_control.len(), 1, "this machine is reached by none");
        let folder = path.parent().unwrap().to_path_buf();
        let told = |what: &str| loop {
            let text = fs_err::read_to_string(dir.path().join("told")).unwrap_or_default();
            if text.contains(what) {
                break text;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let text = told("cat");
        assert!(text.contains(&format!("ControlMaster=yes -o ControlPath={} -T -- biz cat", path.display())));
        drop(connections);
        told("over");
        assert!(!folder.exists());
    }
}
