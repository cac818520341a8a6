//! A developer outside the host: a home, a checkout, a PATH with the product's names, the team's builder and an
//! ssh that knows the host, and a Nix store of their own, so that the machine's store is left alone.

use crate::bucket;
use crate::lab::{BINARY, Host, PAGE, TOP};
use omni_deploy::runner::{Output, ProcessStatus, Run};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

/// Stands for the team's builder: makes a closure of two paths from a namespace and prints it as theirs does.
const BILD: &str = r#"#!/usr/bin/env bash
set -euo pipefail
source=$1
name=$(sed -n 's/^.*: out //p' "$source")
: "${name:=$(cut -d/ -f2- <<<"${source%.*}" | tr / - | tr '[:upper:]' '[:lower:]')}"
echo "building $source" >&2
path=$(nix-build --no-out-link - <<NIX
let
  assets = derivation {
    name = "$name-assets"; system = builtins.currentSystem; builder = "/bin/busybox"; source = ./$source;
    args = [ "sh" "-euc" "/bin/busybox mkdir \$out; /bin/busybox sed -n 's/^.*VERSION = //p' \$source >\$out/version" ];
  };
in derivation {
  inherit assets; name = "$name"; system = builtins.currentSystem; builder = "/bin/busybox"; page = $PAGE;
  args = [ "sh" "-euc" "b=/bin/busybox; \$b mkdir -p \$out/bin; \$b cp \$page \$out/bin/$name; \$b ln -s \$assets/version \$out/version" ];
}
NIX
)
echo "STORE_PATH=$path"
"#;

/// Somebody at a shell outside.
#[derive(Debug)]
pub struct Developer {
    home: PathBuf,
    path: String,
}

impl Developer {
    /// Sets the machine of a developer up who can reach `host` by ssh.
    pub fn new(host: &Host) -> Self {
        let home = host.outside.join("home");
        let bin = home.join("bin");
        for dir in ["bin", "nix", ".aws", "src/Omni/Ide", "src/Biz/PodcastItLater"] {
            fs_err::create_dir_all(home.join(dir)).unwrap();
        }
        for name in ["omni-deploy", "deploy-manifest", "deployer"] {
            fs_err::os::unix::fs::symlink(&*BINARY, bin.join(name)).unwrap();
        }
        for name in ["push.sh", "ship.sh"] {
            let link = home.join("src/Omni/Ide").join(name);
            fs_err::os::unix::fs::symlink(format!("{TOP}/contrib/{name}"), link).unwrap();
        }
        fs_err::write(bin.join("bild"), BILD).unwrap();
        fs_err::set_permissions(bin.join("bild"), PermissionsExt::from_mode(0o755)).unwrap();
        fs_err::write(
            home.join(".aws/credentials"),
            format!(
                "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
                bucket::DEVELOPER.0,
                bucket::DEVELOPER.1
            ),
        )
        .unwrap();
        let ssh = host.ssh_setup(&home.join("ssh"));
        let path =
            format!("{}:{ssh}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", bin.display());
        Developer { home, path }
    }

    /// Writes a file of the checkout.
    pub fn write(&self, name: &str, text: &str) {
        fs_err::write(self.home.join("src").join(name), text).unwrap();
    }

    /// Types a command into bash, in the checkout; whatever its status.
    pub fn tries(&self, command: &str) -> Output {
        // A mount namespace in which /nix is the developer's. The machine may never have had a Nix.
        Run::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-euc"])
            .arg("mkdir -p /nix; mount --bind \"$1\" /nix; shift; exec \"$@\"")
            .arg("-")
            .arg(self.home.join("nix"))
            .args(["env", "-i", "LANG=C.UTF-8", "TERM=dumb", "USER=ann", "LOGNAME=ann"])
            .arg(format!("HOME={}", self.home.display()))
            .arg(format!("PATH={}", self.path))
            .arg(format!("PAGE={}", PAGE.display()))
            .arg("NIX_CONFIG=sandbox = false\nbuild-users-group =\nsubstituters =")
            .args(["bash", "-c", command])
            .dir(self.home.join("src"))
            .deadline(Duration::from_secs(600))
            .output()
            .unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// Types a command that must succeed; returns its stdout.
    #[track_caller]
    pub fn types(&self, command: &str) -> String {
        let output = self.tries(command);
        assert!(output.status.ok(), "$ {command}\n{}{}[{}]", output.text(), output.stderr, output.status);
        println!("$ {command}\n{}{}", output.text(), output.stderr);
        output.text()
    }

    /// Types a command that goes on until it is interrupted, and interrupts it after some seconds; by then it has
    /// printed these words, or is given more of them.
    #[track_caller]
    pub fn watches(&self, command: &str, words: &str) {
        let mut text = String::new();
        for seconds in [4, 12, 36] {
            let output = self.tries(&format!("timeout {seconds} {command}"));
            assert_eq!(output.status, ProcessStatus::Exit(124), "$ {command}\n{}", output.stderr);
            text = output.text();
            if text.contains(words) {
                return;
            }
        }
        panic!("$ {command}\nno '{words}' in: {text}");
    }
}
