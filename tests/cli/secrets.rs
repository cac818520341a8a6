//! `omni-deploy secrets`, through the built binary. Hosts are reached through a script in ssh's place that runs the
//! words as a host's shell would, on this machine. What needs root does so because secrets are
//! root's.

mod common;

use common::wait_until;
use omni_deploy::runner::{Output, ProcessStatus, Run};
use serde_json::json;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const BIN: &str = env!("CARGO_BIN_EXE_omni-deploy");
const AVA: &str = "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava-1.0";
/// Stands in every secret and nowhere else.
const MARK: &str = "hunter2-0c0zzgbsl9";
const LIMIT: Duration = Duration::from_secs(30);

/// A developer's machine and the hosts it reaches.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    /// Ava on `hosts`, with a secrets file that is not there yet.
    fn new(hosts: &[&str]) -> Self {
        // Secrets are root's all the way up, which what is below /tmp is not.
        let root = rustix::process::geteuid().is_root();
        let dir = if root { tempfile::tempdir_in("/var/lib") } else { tempfile::tempdir() };
        let machine = Machine { dir: dir.unwrap() };
        let ava = json!({"name": "ava", "artifact": {"storePath": AVA}, "hosts": hosts, "envFile": machine.secrets()});
        let keyed = json!({"name": "keyed", "artifact": {"storePath": AVA}, "hosts": ["biz"],
            "envFile": machine.secrets(), "credentials": {"key": machine.path("secrets/keyed.key")}});
        let plain = json!({"name": "plain", "artifact": {"storePath": AVA}, "hosts": hosts});
        fs_err::create_dir_all(machine.path("host-bin")).unwrap();
        fs_err::os::unix::fs::symlink(BIN, machine.path("host-bin/omni-deploy")).unwrap();
        machine.script(
            "host-bin/systemctl",
            &format!(
                "echo \"$@\" >>{0}/systemctl; case \"$*\" in *is-active*) test -e {0}/active;; esac",
                machine.dir.path().display()
            ),
        );
        // One that knows no folders but its own, as Debian's newest.
        machine.script(
            "host-bin/sudo",
            &format!(
                "case $1 in /*) ;; *) test -e {0}/host-bin/systemctl -a \"$1\" = systemctl || \
                 {{ echo \"sudo: $1: command not found\" >&2; exit 1; }};; esac; exec \"$@\"",
                machine.dir.path().display()
            ),
        );
        machine.script("editor", "exit 9");
        // As sshd does it: the words, joined by spaces, are read again by a shell.
        machine.ssh("true");
        for service in [ava, keyed, plain] {
            machine.good(&["manifest", "add-service", &service.to_string()]);
        }
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Ava's file on every host.
    fn secrets(&self) -> PathBuf {
        self.path("secrets/ava.env")
    }

    fn has_secrets(&self, text: &str) {
        fs_err::create_dir_all(self.path("secrets")).unwrap();
        fs_err::set_permissions(self.path("secrets"), std::fs::Permissions::from_mode(0o700)).unwrap();
        fs_err::write(self.secrets(), text).unwrap();
        fs_err::set_permissions(self.secrets(), std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn text(&self) -> String {
        fs_err::read_to_string(self.secrets()).unwrap()
    }

    fn script(&self, name: &str, body: &str) -> PathBuf {
        let path = self.path(name);
        fs_err::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// What a host does before it obeys.
    fn ssh(&self, first: &str) {
        let dir = self.dir.path().display();
        self.script(
            "ssh-of-ours",
            &format!(
                "echo \"$@\" >>{dir}/asked\nhost=$1; shift\n{first}\nPATH={dir}/host-bin:$PATH; eval \"$*\""
            ),
        );
    }

    fn run(&self, args: &[&str]) -> Run {
        self.of(BIN, args)
    }

    /// A program on the developer's machine.
    fn of(&self, program: &str, args: &[&str]) -> Run {
        let mut run = Run::new(program).args(args);
        for key in omni_deploy::config::KEYS {
            run = run.without_env(key.env);
        }
        run.env("HOME", self.path("home"))
            .env("OMNI_DEPLOY_STORE", format!("file://{}", self.path("store").display()))
            .env("OMNI_DEPLOY_HOST", "laptop")
            .env("OMNI_DEPLOY_SSH", self.path("ssh-of-ours"))
            .env("EDITOR", self.path("editor"))
            .without_env("VISUAL")
            .without_env("XDG_CONFIG_HOME")
            .without_env("XDG_STATE_HOME")
            .deadline(Duration::from_secs(60))
    }

    fn call(&self, args: &[&str]) -> Output {
        let output = self.run(args).output().unwrap();
        assert!(!output.text().contains(MARK) && !output.stderr.contains(MARK), "{args:?}");
        output
    }

    #[track_caller]
    fn good(&self, args: &[&str]) -> Output {
        let output = self.call(args);
        assert_eq!(exit(&output), 0, "{args:?}: {}{}", output.text(), output.stderr);
        output
    }

    /// A call that fails with this code and says this.
    #[track_caller]
    fn bad(&self, args: &[&str], code: i32, said: &str) -> Output {
        let output = self.call(args);
        assert_eq!(exit(&output), code, "{args:?}: {}{}", output.text(), output.stderr);
        let all = format!("{}{}", output.text(), output.stderr);
        assert!(all.contains(said), "{args:?}: no '{said}' in: {all}");
        output
    }

    /// The file that the editor was given, as it noted it.
    fn draft(&self) -> PathBuf {
        fs_err::read_to_string(self.path("draft")).unwrap().trim().into()
    }
}

fn exit(output: &Output) -> i32 {
    match output.status {
        ProcessStatus::Exit(code) => code,
        other => panic!("{other}: {}", output.stderr),
    }
}

/// The processes whose arguments have the mark.
fn who_shows_the_mark() -> Vec<String> {
    let mut shown = Vec::new();
    for process in fs_err::read_dir("/proc").unwrap() {
        // One that ended meanwhile shows nothing.
        let line = fs_err::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains(MARK) {
            shown.push(line);
        }
    }
    shown
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn check_tells_names_and_remedies_and_never_a_value() {
    let machine = Machine::new(&["biz", "two"]);
    machine.has_secrets(&format!("TOKEN={MARK}\n# {MARK}\nKEY='{MARK}\n{MARK}'\n"));
    let file = machine.secrets().display().to_string();
    let well = machine.good(&["secrets", "check", "ava"]);
    assert_eq!(well.text(), ["biz", "two"].map(|h| format!("{h}: {file}: TOKEN, KEY\n")).concat());
    let asked = fs_err::read_to_string(machine.path("asked")).unwrap();
    let mut asked: Vec<&str> = asked.lines().collect();
    asked.sort();
    let words = format!(" sh omni-deploy secrets on-host look ava environment {file}");
    for (asked, host) in asked.iter().zip(["biz ", "two "]) {
        assert!(
            asked.starts_with(host) && asked.contains("exec sudo ") && asked.ends_with(&words),
            "{asked}"
        );
    }
    assert_eq!(asked.len(), 2);
    // What a host's login shell prints before the answer does not matter.
    machine.ssh("echo Welcome; echo careful >&2; printf 'and no newline'");
    assert_eq!(machine.good(&["secrets", "check", "ava"]).text(), well.text());
    machine.ssh("true");

    let mode = |mode| fs_err::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    machine.bad(&["secrets", "check", "ava", "--host", "biz"], 3, &format!("run: chmod 600 {file}"));
    mode(0o400);
    machine.good(&["secrets", "check", "ava"]);
    std::os::unix::fs::chown(&file, Some(65534), None).unwrap();
    machine.bad(&["secrets", "check", "ava"], 3, &format!("run: chown root:root {file}"));
    machine.has_secrets("");
    std::os::unix::fs::chown(&file, Some(0), None).unwrap();
    machine.has_secrets(&format!("A=1\nexport TOKEN={MARK}\n{MARK}\n"));
    let off = machine.bad(&["secrets", "check", "ava", "--host", "two"], 3, "line 2 ");
    assert!(off.text().contains("line 3 ") && !off.text().contains("TOKEN"), "{}", off.text());
    // However well the file is kept, whoever may change a folder above it may put another in its place.
    machine.has_secrets("A=1");
    let above = machine.dir.path();
    let folder = |mode| fs_err::set_permissions(above, std::fs::Permissions::from_mode(mode)).unwrap();
    for (mode, remedy) in [(0o775, "run: chmod go-w"), (0o1777, "keep the file in /var/lib/deployer-secrets")]
    {
        folder(mode);
        let told = machine.bad(&["secrets", "check", "ava", "--host", "biz"], 3, remedy).text();
        assert!(told.contains(&format!("{} ", above.display())), "{told}");
    }
    folder(0o700);
    machine.good(&["secrets", "check", "ava"]);
    fs_err::remove_file(&file).unwrap();
    machine.bad(&["secrets", "check", "ava"], 3, "is missing; make it: install -m 600");
    fs_err::os::unix::fs::symlink(machine.path("elsewhere"), &file).unwrap();
    machine.bad(&["secrets", "check", "ava"], 1, "symbolic link");
    fs_err::remove_file(&file).unwrap();

    machine.bad(&["secrets", "check", "avaa"], 1, "did you mean 'ava'?");
    machine.bad(&["secrets", "check", "ava", "--host", "bix"], 1, "did you mean 'biz'?");
    let none = machine.good(&["secrets", "check", "plain"]);
    assert!(none.stderr.contains("plain has no secrets file"), "{}", none.stderr);
    // One that is silent, and one without the program, do not hide what the others say.
    machine.has_secrets("A=1");
    machine.ssh("if [ $host = biz ]; then echo 'Connection refused' >&2; exit 255; fi");
    let part = machine.bad(&["secrets", "check", "ava"], 1, "biz does not answer: Connection refused");
    assert_eq!(part.text(), format!("two: {file}: A\n"));
    machine.ssh("echo 'sudo: omni-deploy: command not found' >&2; exit 1");
    machine.bad(&["secrets", "check", "ava"], 1, "install this version there");
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn an_edit_goes_over_stdin_into_the_same_file_whole_and_leaves_nothing_behind() {
    let machine = Machine::new(&["biz"]);
    machine.has_secrets(&format!("TOKEN={MARK}-old\n"));
    fs_err::set_permissions(machine.secrets(), std::fs::Permissions::from_mode(0o400)).unwrap();
    std::os::unix::fs::chown(machine.secrets(), None, Some(7)).unwrap();
    let dir = machine.dir.path().display();
    // With arguments, as in EDITOR='code --wait'.
    let editor = machine.script(
        "editor",
        &format!(
        "test \"$1\" = --wait || exit 8; echo $2 >{dir}/draft; stat -c '%a %u' $2 $(dirname $2) >{dir}/modes
         ulimit -c >{dir}/limit; sed -i s/old/new/ $2"
    ),
    );
    machine.ssh(&format!(
        "case \"$*\" in *' write '*) touch {dir}/writing; while [ ! -e {dir}/go ]; do sleep 0.05; done;; esac"
    ));
    fs_err::write(machine.path("active"), "").unwrap();
    // By somebody who wants core dumps of everything else.
    let script = "ulimit -c unlimited; exec \"$@\"";
    let run = machine.of("sh", &["-c", script, "-", BIN, "secrets", "edit", "ava"]);
    let run = run.env("EDITOR", format!("{} --wait", editor.display()));
    let editing = std::thread::spawn(move || run.output().unwrap());
    wait_until(LIMIT, "it writes", || machine.path("writing").exists());
    assert_eq!(who_shows_the_mark(), [""; 0]);
    assert!(machine.text().contains("old"), "nothing is written before all of it is there");
    fs_err::write(machine.path("go"), "").unwrap();
    let output = editing.join().unwrap();
    assert_eq!(exit(&output), 0, "{}", output.stderr);
    assert!(!output.text().contains(MARK) && !output.stderr.contains(MARK));
    let meta = fs_err::metadata(machine.secrets()).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o400, 0, 7));
    assert_eq!(machine.text(), format!("TOKEN={MARK}-new\n"));
    assert_eq!(fs_err::read_dir(machine.path("secrets")).unwrap().count(), 1);
    let noted = |name: &str| fs_err::read_to_string(machine.path(name)).unwrap();
    assert_eq!((noted("modes").as_str(), noted("limit").trim()), ("600 0\n700 0\n", "0"));
    assert!(!machine.draft().parent().unwrap().exists());
    assert!(!noted("asked").contains(MARK) && !noted("systemctl").contains(MARK));
    // Not on a terminal: it says what to type.
    let typed = format!("{} biz sudo systemctl restart ava", machine.path("ssh-of-ours").display());
    assert!(output.stderr.contains(&typed), "{}", output.stderr);
    assert!(!noted("systemctl").contains("restart"));

    machine.script("editor", "sed -i s/new/newer/ $1");
    let again = machine.good(&["secrets", "edit", "ava", "--restart"]);
    assert!(again.stderr.contains("biz: restarted ava"), "{}", again.stderr);
    assert!(noted("systemctl").contains("restart -- ava.service\n"));
    machine.script("editor", "touch $1");
    let same = machine.good(&["secrets", "edit", "ava", "--restart"]);
    assert!(same.stderr.contains("unchanged") && noted("systemctl").matches(" restart").count() <= 1);
    // Not running: it is the deployer's to start.
    fs_err::remove_file(machine.path("active")).unwrap();
    machine.script("editor", "sed -i s/newer/newest/ $1");
    machine.good(&["secrets", "edit", "ava", "--restart"]);
    assert!(noted("systemctl").contains("start -- deployer.service\n"));
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn vim_is_told_to_keep_nothing_of_a_secret_by_whatever_name_it_is_called() {
    let machine = Machine::new(&["biz"]);
    let dir = machine.dir.path().display();
    let body = format!("printf '%s ' \"$@\" >{dir}/called; for draft; do :; done; echo B=2 >>\"$draft\"");
    machine.has_secrets("A=1\n");
    machine.script("vim.basic", &body);
    fs_err::os::unix::fs::symlink(machine.path("vim.basic"), machine.path("vi")).unwrap();
    machine.script("nano", &body);
    for (editor, quiet) in [("vi", true), ("vim.basic", true), ("nano", false)] {
        let run = machine.run(&["secrets", "edit", "ava"]).env("EDITOR", format!("{dir}/{editor} -R"));
        let output = run.output().unwrap();
        assert_eq!(exit(&output), 0, "{}", output.stderr);
        let called = fs_err::read_to_string(machine.path("called")).unwrap();
        let told =
            called.starts_with("-n -i NONE -c silent! set noundofile nobackup nowritebackup viminfo= -R ");
        assert_eq!(told, quiet, "{editor}: {called}");
    }
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn a_lock_on_the_folder_which_anybody_may_hold_keeps_nobody_from_an_edit() {
    let machine = Machine::new(&["biz"]);
    machine.has_secrets("A=1\n");
    let folder = fs_err::File::open(machine.path("secrets")).unwrap();
    folder.file().lock().unwrap();
    machine.script("editor", "echo B=2 >>$1");
    machine.good(&["secrets", "edit", "ava"]);
    assert_eq!(machine.text(), "A=1\nB=2\n");
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn a_file_that_is_not_there_is_made_for_root_alone_with_its_folder() {
    let machine = Machine::new(&["biz"]);
    machine.script("editor", &format!("test ! -s $1 && echo TOKEN={MARK} >$1"));
    machine.good(&["secrets", "edit", "ava"]);
    assert_eq!(machine.text(), format!("TOKEN={MARK}\n"));
    let mode = |path: &Path| fs_err::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&machine.secrets()), mode(&machine.path("secrets"))), (0o600, 0o700));
    // On the host itself no ssh is needed.
    machine.ssh("exit 255");
    machine.script("editor", "echo B=2 >>$1");
    machine.good(&["secrets", "edit", "ava", "--this-host", "biz"]);
    assert_eq!(machine.text(), format!("TOKEN={MARK}\nB=2\n"));
    let check = machine.good(&["secrets", "check", "ava", "--this-host", "biz"]);
    assert!(check.text().ends_with(": TOKEN, B\n"), "{}", check.text());
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn a_credential_is_one_file_of_several_and_takes_any_bytes() {
    let machine = Machine::new(&["biz"]);
    machine.has_secrets("A=1\n");
    machine.script("editor", "printf 'no line\\000\\377' >$1");
    machine.bad(&["secrets", "edit", "keyed"], 1, "keyed.key; name one of them with --file");
    machine.good(&["secrets", "edit", "keyed", "--file", "keyed.key"]);
    assert_eq!(fs_err::read(machine.path("secrets/keyed.key")).unwrap(), b"no line\0\xff");
    let check = machine.good(&["secrets", "check", "keyed"]).text();
    let said: Vec<&str> = check.lines().map(|l| l.rsplit('/').next().unwrap()).collect();
    assert_eq!(said, ["ava.env: A", "keyed.key: well"]);
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn what_cannot_be_written_is_kept_for_the_person_who_wrote_it() {
    let machine = Machine::new(&["biz"]);
    let dir = machine.dir.path().display().to_string();
    machine.has_secrets("TOKEN=one\n");
    // Refused for what it says; overtaken; not answered; and an editor that died.
    let overtaking = format!("TOKEN={MARK}-theirs\n");
    for (change, ssh, said) in [
        ("", "true", "line 2 opens a quote"),
        ("", "case \"$*\" in *' write '*) exit 255;; esac", "line 2 opens a quote"),
        ("sed -i \"s/'//\" $1", "case \"$*\" in *' write '*) exit 255;; esac", "does not answer"),
        ("sed -i \"s/'//\" $1; kill -KILL $$", "true", "ended with signal 9"),
        (
            &format!("sed -i \"s/'//\" $1; echo '{}' >{dir}/secrets/ava.env", overtaking.trim()),
            "true",
            "meanwhile",
        ),
    ] {
        machine.ssh(ssh);
        machine.script("editor", &format!("echo $1 >{dir}/draft; echo \"NEW='{MARK}\" >>$1; {change}"));
        let before = machine.text();
        let output = machine.bad(&["secrets", "edit", "ava", "--restart"], 1, said);
        let draft = machine.draft();
        assert!(output.stderr.contains(&format!("kept in {}", draft.display())), "{}", output.stderr);
        let kept = fs_err::read_to_string(&draft).unwrap();
        assert!(kept.starts_with("TOKEN=one\n") && kept.contains(MARK), "{said}");
        let after = machine.text();
        assert!(after == before || after == overtaking, "{said}");
        fs_err::remove_dir_all(draft.parent().unwrap()).unwrap();
    }
    // Nothing was written, and nothing has to be kept.
    machine.ssh("true");
    machine.script("editor", &format!("echo $1 >{dir}/draft; exit 1"));
    machine.bad(&["secrets", "edit", "ava"], 1, "ended with exit code 1");
    assert!(!machine.draft().parent().unwrap().exists());
    let run = machine.run(&["secrets", "edit", "ava"]).env("EDITOR", "no-such-editor -x");
    let output = run.output().unwrap();
    assert!(output.stderr.contains("set EDITOR"), "{}", output.stderr);
}

#[test]
#[ignore = "needs root: cargo test -- --ignored"]
fn ctrl_c_is_the_editors_and_any_other_end_leaves_nothing_on_the_disk() {
    let machine = Machine::new(&["biz"]);
    let dir = machine.dir.path().display();
    for signal in ["INT", "QUIT", "TERM", "HUP", "KILL"] {
        machine.has_secrets(&format!("TOKEN={MARK}\n"));
        for left in ["pid", "go", "draft"] {
            drop(fs_err::remove_file(machine.path(left)));
        }
        // The shell becomes the program, which is ended by the number it had.
        machine.script("editor", &format!(
            "echo $1 >{dir}/draft; echo B=2 >>$1; touch {dir}/open; while [ ! -e {dir}/go ]; do sleep 0.05; done"
        ));
        let script = format!("echo $$ >{dir}/pid; exec \"$@\"");
        let run = machine.of("sh", &["-c", &script, "-", BIN, "secrets", "edit", "ava"]);
        let editing = std::thread::spawn(move || run.output().unwrap());
        wait_until(LIMIT, "the editor is open", || machine.path("open").exists());
        fs_err::remove_file(machine.path("open")).unwrap();
        let pid = fs_err::read_to_string(machine.path("pid")).unwrap();
        Run::new("kill").args([&format!("-{signal}"), pid.trim()]).success().unwrap();
        let folder = machine.draft().parent().unwrap().to_path_buf();
        if matches!(signal, "INT" | "QUIT") {
            assert!(folder.exists());
            fs_err::write(machine.path("go"), "").unwrap();
            let output = editing.join().unwrap();
            assert_eq!((exit(&output), machine.text().ends_with("B=2\n")), (0, true), "{}", output.stderr);
        } else {
            wait_until(LIMIT, "the folder is gone", || !folder.exists());
            fs_err::write(machine.path("go"), "").unwrap();
            assert!(matches!(editing.join().unwrap().status, ProcessStatus::Signal(_)), "{signal}");
            assert_eq!(machine.text(), format!("TOKEN={MARK}\n"));
        }
        assert!(!folder.exists(), "{signal}");
    }
}

#[test]
fn one_host_is_edited_at_a_time_and_nothing_given_becomes_an_option() {
    let machine = Machine::new(&["biz", "two"]);
    machine.bad(&["secrets", "edit", "ava"], 1, "ava runs on biz, two; name one with --host");
    machine.bad(&["secrets", "edit", "ava", "--host", "three"], 1, "it runs on biz, two");
    machine.bad(&["secrets", "edit", "plain", "--host", "biz"], 1, "set plain envFile=");
    machine.bad(&["secrets", "edit", "ava", "--host", "biz", "--file", "x"], 1, "ava.env; name one of them");
    machine.bad(&["secrets"], 2, "Usage: omni-deploy secrets <command>");
    // What removes a draft's folder removes no other.
    let theirs = machine.path("theirs");
    fs_err::create_dir(&theirs).unwrap();
    machine.bad(&["secrets", "sweep", theirs.to_str().unwrap()], 2, "not a folder that an edit made");
    assert!(theirs.exists());
    let option = "-oProxyCommand=touch /tmp/owned";
    for (args, code) in [
        (vec!["secrets", "check", "ava", "--host", option], 2),
        (vec!["secrets", "edit", "ava", "--host", option], 2),
        (vec!["logs", "ava", "--host", option], 2),
        (vec!["status", "--live", "--host", option], 1),
        (vec!["secrets", "check", "-rf"], 2),
        (vec!["secrets", "check", "--", "-rf"], 1),
        (vec!["logs", "--", "-rf"], 1),
        (vec!["config", "--this-host", option], 1),
        (vec!["status", "--default-hosts", option], 1),
        (vec!["manifest", "set", "ava", &format!("hosts={option}")], 1),
        (vec!["manifest", "set", "ava", "hosts=-F/tmp/x"], 1),
        (vec!["manifest", "set", "ava", "envFile=-rf"], 1),
        (vec!["manifest", "update", "--", "-rf", AVA], 1),
        (vec!["push", "--", "-rf"], 2),
        (vec!["ship", "--service", "-rf", AVA], 2),
    ] {
        let output = machine.call(&args);
        assert_eq!(exit(&output), code, "{args:?}: {}{}", output.text(), output.stderr);
        assert!(!machine.path("asked").exists(), "{args:?}");
    }
    // A manifest that was written by hand names such a host: it is refused whole, and nobody is called.
    let manifest = machine.path("store/manifest.json");
    let text = fs_err::read_to_string(&manifest).unwrap().replace("\"two\"", &format!("\"{option}\""));
    fs_err::write(&manifest, text).unwrap();
    for args in [vec!["secrets", "check", "ava"], vec!["logs", "ava"], vec!["status", "--live"]] {
        machine.bad(&args, 1, "only ASCII letters");
    }
    let config = machine.path("home/.config/omni-deploy/config.json");
    fs_err::create_dir_all(config.parent().unwrap()).unwrap();
    fs_err::write(&config, json!({"defaultHosts": [option]}).to_string()).unwrap();
    machine.bad(&["status"], 1, "defaultHosts");
    assert!(!machine.path("asked").exists());
}
