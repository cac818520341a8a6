//! Booted hosts for the tests: what tests/lab/lab.sh does, as values. Everything that is started here ends with
//! the test process, however that ends: it hangs on a pipe that the kernel then closes. It decides nothing
//! about the product; the tests do.

use crate::built::cargo;
use omni_deploy::runner::{Output, ProcessStatus, Run};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is under test: the program that would be installed.
pub static BINARY: LazyLock<PathBuf> = LazyLock::new(|| {
    std::env::var_os("OMNI_TEST_BINARY")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_omni-deploy")), PathBuf::from)
});

/// The folder of this checkout.
pub const TOP: &str = env!("CARGO_MANIFEST_DIR");

/// Where the hosts of this run live. One run at a time: two would take each other's hosts away.
static LAB_DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = std::env::var_os("OMNI_LAB_DIR")
        .map_or_else(|| PathBuf::from("/run/omni-deploy-lab-tests"), PathBuf::from);
    let lock = dir.with_extension("lock");
    let file = fs_err::File::create(&lock).unwrap_or_else(|e| panic!("the host tests run as root: {e}"));
    file.file()
        .try_lock()
        .unwrap_or_else(|e| panic!("another run of the host tests has {}: {e}", lock.display()));
    // Held until the process ends.
    std::mem::forget(file);
    dir
});

/// The service that is deployed: examples/page.rs, built once.
pub static PAGE: LazyLock<PathBuf> = LazyLock::new(|| example("page", &[]));

/// The product with the points at which it can be made to fail: examples/faults.rs, built once.
#[cfg(feature = "campaign")]
pub static FAULTS: LazyLock<PathBuf> = LazyLock::new(|| example("faults", &["--features", "faults"]));

fn example(name: &str, options: &[&str]) -> PathBuf {
    let build = cargo(&["build", "--quiet", "--example", name]).args(options).dir(TOP);
    build.success().unwrap_or_else(|e| panic!("the example '{name}' is needed: {e}"));
    let tests = std::env::current_exe().expect("this test has a path");
    tests.ancestors().nth(2).expect("tests are below target/PROFILE/deps").join("examples").join(name)
}

/// A shell that runs `script` (with `args` as `$1`…) and must have read its stdin to the end before it may
/// clean up; holds the other end of that pipe.
#[derive(Debug)]
#[allow(
    clippy::disallowed_types,
    reason = "the product never leaves a process running, so its runner cannot"
)]
pub struct Background {
    child: std::process::Child,
}

impl Background {
    /// Starts it, in a session of its own so that a Ctrl-C does not reach it before the pipe closes.
    #[allow(clippy::disallowed_types, reason = "as above")]
    pub fn start(script: &str, args: &[&str]) -> Self {
        use std::process::{Command, Stdio};
        let child = Command::new("setsid")
            .args(["sh", "-c", script, "-"])
            .args(args)
            .env("OMNI_LAB_DIR", &*LAB_DIR)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start a shell: {e}"));
        Background { child }
    }

    /// The next line of its stdout.
    pub fn line(&mut self) -> String {
        use std::io::Read;
        let mut line = Vec::new();
        let out = self.child.stdout.as_mut().expect("stdout is a pipe");
        let mut byte = [0];
        while out.read(&mut byte).is_ok_and(|n| n == 1) && byte != *b"\n" {
            line.push(byte[0]);
        }
        String::from_utf8_lossy(&line).into_owned()
    }

    /// Gives it a line to read; returns the next line of its stdout.
    pub fn ask(&mut self) -> String {
        use std::io::Write;
        self.child.stdin.as_mut().expect("stdin is a pipe").write_all(b"\n").expect("it reads its stdin");
        self.line()
    }

    /// Closes the pipe and returns its last line once it has ended.
    pub fn finish(mut self) -> String {
        drop(self.child.stdin.take());
        self.line()
    }
}

impl Drop for Background {
    /// Closes the pipe and waits for the end: what it takes away may be wanted anew by the next test.
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().expect("a child can be waited for");
    }
}

/// Runs tests/lab/lab.sh.
fn lab(args: &[&str]) -> Output {
    // The first host of a suite waits for its base tree.
    let minutes = if args[0] == "up" { 30 } else { 15 };
    Run::new(format!("{TOP}/tests/lab/lab.sh"))
        .args(args)
        .env("OMNI_LAB_DIR", &*LAB_DIR)
        .deadline(Duration::from_secs(60 * minutes))
        .output()
        .unwrap_or_else(|e| panic!("lab.sh {args:?}: {e}"))
}

fn lab_ok(args: &[&str]) -> String {
    let output = lab(args);
    assert!(output.status.ok(), "lab.sh {args:?}: {}\n{}", output.status, output.stderr);
    output.text().trim_end().to_string()
}

const CADDY_API: &str = r#"#!/bin/sh
path=$1; shift
if [ -S /run/caddy/admin.sock ]; then set -- --unix-socket /run/caddy/admin.sock -H 'Host;' "$@"; fi
exec curl -sSf "$@" "http://127.0.0.1:2019$path"
"#;

/// Of a script in a host: waits until no pass of the unit is under way, and none is asked for. A start or reload of Caddy
/// asks for one by a job of its own, which has begun the deployer's before it ends.
pub const UNTIL_IDLE: &str = "until [[ -z $(systemctl list-jobs --no-legend 'deployer*') ]] &&
         [[ $(systemctl is-active deployer) != *activating ]]; do sleep 0.05; done";

/// A booted host with omni-deploy installed by contrib/install.sh.
#[derive(Debug)]
pub struct Host {
    name: &'static str,
    /// Its address, from here.
    pub ip: String,
    /// This machine's address, from there.
    pub gateway: String,
    /// A folder outside that goes away with the host.
    pub outside: PathBuf,
    _guard: Background,
}

/// What a pass left: its exit code and what it told the journal.
#[derive(Debug)]
pub struct Pass {
    /// Its exit code.
    pub code: i32,
    /// Its lines.
    pub said: String,
}

impl Host {
    /// Boots a fresh host and installs omni-deploy there. Needs root and lab.sh's packages.
    pub fn boot(name: &'static str) -> Self {
        let started = lab(&["up", name]);
        assert!(
            started.status.ok(),
            "these tests boot hosts: run them as root, after 'tests/lab/lab.sh packages'\n{}",
            started.stderr
        );
        let guard = Background::start(
            "cat; exec \"$1\" down \"$2\" >/dev/null",
            &[&format!("{TOP}/tests/lab/lab.sh"), name],
        );
        let host = Host {
            name,
            ip: lab_ok(&["ip", name]),
            gateway: lab_ok(&["gateway", name]),
            outside: LAB_DIR.join(name).join("outside"),
            _guard: guard,
        };
        fs_err::create_dir_all(&host.outside).unwrap();
        let opt = host.path("/opt/omni");
        fs_err::create_dir_all(&opt).unwrap();
        Run::new("cp").args(["-r", &format!("{TOP}/contrib")]).arg(&opt).success().unwrap();
        fs_err::copy(&*BINARY, opt.join("omni-deploy")).unwrap();
        fs_err::copy(&*PAGE, opt.join("page")).unwrap();
        // Caddy's admin API, wherever this Caddy has it: caddy-api PATH [OPTION OF CURL]...
        fs_err::write(host.path("/usr/local/bin/caddy-api"), CADDY_API).unwrap();
        host.sh("chmod 755 /usr/local/bin/caddy-api");
        // DNS, as far as visitors of the tests' services ask it: 'doctor' and 'status --live' try their domains.
        host.sh(&format!(
            "echo '{} web.example.com ava.example.com seen.example.com' >>/etc/hosts
             /opt/omni/contrib/install.sh /opt/omni/omni-deploy
             # As it says: where this Caddy can have one, its socket is there from its next start on.
             if grep -qF CADDY_ADMIN /usr/bin/caddy; then systemctl restart caddy; fi
             {UNTIL_IDLE}",
            host.ip
        ));
        host
    }

    /// A file or folder of the host, seen from here.
    pub fn path(&self, inside: &str) -> PathBuf {
        Path::new(&lab_ok(&["root", self.name])).join(inside.trim_start_matches('/'))
    }

    /// Runs a bash script in the host as root; whatever its status.
    pub fn try_sh(&self, script: &str) -> Output {
        lab(&["run", self.name, "bash", "-euo", "pipefail", "-c", script])
    }

    /// Runs a bash script in the host as root, which must succeed; returns its stdout without the last newline.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = self.try_sh(script);
        assert!(
            output.status.ok(),
            "in the host: {script}\n{}\nstdout: {}\nstderr: {}",
            output.status,
            output.text(),
            output.stderr
        );
        output.text().trim_end_matches('\n').to_string()
    }

    /// Shuts it down cleanly and boots the same disk.
    pub fn reboot(&self) {
        lab_ok(&["reboot", self.name]);
    }

    /// Cuts its power: every process ends at once.
    pub fn power_cut(&self) {
        lab_ok(&["kill", self.name]);
    }

    /// Boots the same disk again.
    pub fn start(&self) {
        lab_ok(&["start", self.name]);
    }

    /// `ssh HOSTNAME` for somebody outside; returns the folder to put first on PATH.
    pub fn ssh_setup(&self, dir: &Path) -> String {
        lab_ok(&["ssh-setup", self.name, &dir.display().to_string()])
    }

    /// From here on until the next boot passes are made by the test alone: one of the timer's would repair what a test
    /// has broken before it has looked.
    pub fn only_our_passes(&self) {
        self.sh("systemctl stop deployer.timer");
        self.until_idle();
    }

    /// Waits until no pass of the unit is under way, and none is asked for.
    #[track_caller]
    pub fn until_idle(&self) {
        self.sh(UNTIL_IDLE);
    }

    /// Until the value goes, no pass is made, whoever asks for one: a restart of Caddy does. (A mask for the runtime does
    /// nothing to a unit in `/etc`.)
    pub fn no_pass(&self) -> NoPass<'_> {
        self.sh("mkdir -p /run/systemd/system/deployer.service.d
             printf '[Unit]\\nConditionPathExists=/nowhere\\n' >/run/systemd/system/deployer.service.d/not.conf
             systemctl daemon-reload");
        self.until_idle();
        NoPass(self)
    }

    /// One pass by the unit that is installed, begun after this call.
    pub fn pass(&self) -> Pass {
        // One that is under way may have read an older manifest.
        self.until_idle();
        let said = self.sh("since=$(date +%s.%6N)
             systemctl start deployer || true
             systemctl show --property=ExecMainStatus --value deployer
             journalctl --sync
             # Not by its invocation, which a journal that comes late does not know of a process that is gone.
             journalctl --no-pager --quiet --output cat --since \"@$since\" _SYSTEMD_UNIT=deployer.service");
        let (code, said) = said.split_once('\n').unwrap_or((&said, ""));
        Pass { code: code.parse().unwrap_or(-1), said: said.to_string() }
    }

    /// One pass that must find everything well afterwards.
    #[track_caller]
    pub fn good_pass(&self) -> String {
        let pass = self.pass();
        assert_eq!(pass.code, 0, "{}", pass.said);
        pass.said
    }

    /// The state file.
    #[track_caller]
    pub fn state(&self) -> Value {
        serde_json::from_str(&self.sh("cat /var/lib/deployer/state.json")).unwrap()
    }

    /// One service of the state file.
    #[track_caller]
    pub fn service(&self, name: &str) -> Value {
        self.state()["services"][name].clone()
    }

    /// Adds a closure to the host's own store: the page as `bin/NAME`, its version, and how it misbehaves
    /// (empty: not). Returns its path.
    #[track_caller]
    pub fn closure(&self, name: &str, version: &str, behaviour: &str) -> String {
        self.sh(&format!(
            "dir=$(mktemp -d)/{name}-{version}; mkdir -p $dir/bin
             cp /opt/omni/page $dir/bin/{name}; echo '{version}' >$dir/version
             [[ -z '{behaviour}' ]] || echo '{behaviour}' >$dir/behaviour
             nix-store --add $dir; rm -r $dir"
        ))
    }

    /// What a browser outside gets for a domain through the host's Caddy: the page without its newline.
    pub fn page(&self, domain: &str) -> Result<String, String> {
        let output = Run::new("curl")
            .args(["-sSf", "-m", "15", "-H", &format!("Host: {domain}"), &format!("http://{}/", self.ip)])
            .output()
            .unwrap();
        match output.status {
            ProcessStatus::Exit(0) => Ok(output.text().trim_end().to_string()),
            _ => Err(output.stderr),
        }
    }

    /// The page of a domain becomes this, without a pass being asked for.
    #[track_caller]
    pub fn page_soon(&self, domain: &str, want: &str, within: Duration) {
        soon(&format!("{domain} serves '{want}'"), within, || match self.page(domain) {
            Ok(page) if page == want => Ok(()),
            other => Err(format!("{other:?}")),
        });
    }

    /// The id of a unit's present invocation: another one is another start.
    #[track_caller]
    pub fn invocation(&self, unit: &str) -> String {
        self.sh(&format!("systemctl show --property=InvocationID --value {unit}"))
    }
}

/// Asks until the answer is yes; the answers on the way are the story told when it never is.
#[track_caller]
pub fn soon(what: &str, within: Duration, mut ask: impl FnMut() -> Result<(), String>) {
    let begun = Instant::now();
    loop {
        match ask() {
            Ok(()) => return,
            Err(why) if begun.elapsed() > within => {
                panic!("not within {} s: {what}: {why}", within.as_secs())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Made by [`Host::no_pass`].
pub struct NoPass<'a>(&'a Host);

impl Drop for NoPass<'_> {
    fn drop(&mut self) {
        // What was asked for meanwhile finds it still forbidden. A test that fails may have lost its host.
        self.0.try_sh(&format!(
            "{UNTIL_IDLE}; rm -f /run/systemd/system/deployer.service.d/not.conf; systemctl daemon-reload"
        ));
    }
}

/// Locks what tests share. A test that failed leaves it usable: each brings it to its own start.
pub fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
