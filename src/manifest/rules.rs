//! What the manifest's texts may be, field by field: each rule takes a text and gives it in its normal form,
//! or the reason why it cannot be, without the text itself. Pure. Whatever passes here may be put into a
//! unit, into Caddy's configuration or into a path by whoever escapes for those.

use crate::log::is_invisible;
use crate::names::unit_suffix;

/// Code points that Unicode keeps out of texts. systemd takes them for broken UTF-8 and leaves out the line.
fn is_noncharacter(c: char) -> bool {
    matches!(c, '\u{fdd0}'..='\u{fdef}') || u32::from(c) & 0xfffe == 0xfffe
}

/// Refuses control characters, invisible ones, and what is no character.
pub(super) fn clean(text: &str) -> Result<(), String> {
    without(text, |c| c.is_control() || is_invisible(c) || is_noncharacter(c))
}

/// Refuses a text with one of these characters.
fn without(text: &str, bad: fn(char) -> bool) -> Result<(), String> {
    Err(match text.chars().find(|c| bad(*c)) {
        None => return Ok(()),
        Some(c) if is_noncharacter(c) => {
            format!("has {}, which is not a character; take it out", c.escape_unicode())
        }
        Some(c) if c.is_control() => {
            format!("has the control character {}; take it out", c.escape_default())
        }
        Some(c) => format!("has the invisible character {}; take it out", c.escape_unicode()),
    })
}

pub(super) fn at_most(most: usize, what: &str, text: &str) -> Result<(), String> {
    match text.len() > most {
        true => Err(format!("has {} {what}; at most {most} are possible", text.len())),
        false => Ok(()),
    }
}

/// The text as it is, if it is `good`.
fn unchanged(text: &str, good: bool, why_not: &str) -> Result<String, String> {
    if good { Ok(text.into()) } else { Err(why_not.into()) }
}

/// Any clean text that is not empty.
pub(super) fn words(text: &str) -> Result<String, String> {
    clean(text)?;
    unchanged(text, !text.is_empty(), "is empty")
}

/// The largest value of a variable, in bytes. The kernel takes 131,072 for `NAME=value` (MAX_ARG_STRLEN).
pub(super) const MAX_ENV_BYTES: usize = 100_000;

/// A name of the environment: what systemd does not drop.
pub(super) fn env_name(text: &str) -> Result<String, String> {
    let why_not = "is not a valid name of a variable; expected ASCII letters, digits and '_', no digit first";
    unchanged(text, crate::names::is_variable(text), why_not)
}

/// A value of the environment: tabs and invisible characters are its own affair.
pub(super) fn env_value(text: &str) -> Result<String, String> {
    at_most(MAX_ENV_BYTES, "bytes", text)?;
    without(text, |c| c.is_control() && c != '\t' || is_noncharacter(c))?;
    Ok(text.into())
}

/// A credential's name: what systemd takes for one (a file's name without a colon), in letters that need no
/// escaping anywhere.
pub(super) fn credential_name(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let named = (1..=255).contains(&text.len()) && !matches!(text, "." | "..");
    let why_not = "is not a valid name of a credential; expected a file's name, at most 255 ASCII letters, digits, \
                   '_', '-' and '.'";
    unchanged(text, named && text.chars().all(good), why_not)
}

/// A user or group, by the strict rule of systemd (systemd.exec(5), "User/Group Name Syntax"), or a number.
pub(super) fn user(text: &str) -> Result<String, String> {
    let named = text.len() <= 31
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    // 65535 and 4294967295 mean "no user" to the kernel.
    let numbered = text.chars().all(|c| c.is_ascii_digit())
        && (text == "0" || !text.starts_with('0'))
        && text.parse::<u32>().is_ok_and(|n| n != u32::from(u16::MAX) && n != u32::MAX);
    let why_not = "is not a valid user or group; expected a number, or a name of at most 31 of A-Z, a-z, 0-9, '_', '-', \
                   no digit first";
    unchanged(text, named || numbered, why_not)
}

fn path_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "/-_.+@:,=~".contains(c)
}

/// An absolute path of the host; `//`, `/./` and a trailing slash are taken out.
pub(super) fn absolute(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err("is not absolute; expected a path that begins with '/'".into());
    }
    let parts = components(text)?;
    if parts.is_empty() {
        return Err("is the root of the file system; expected a path below it".into());
    }
    Ok(format!("/{}", parts.join("/")))
}

/// As [`absolute`], and the root itself.
pub(super) fn directory(text: &str) -> Result<String, String> {
    if text == "/" { Ok(text.into()) } else { absolute(text) }
}

/// A path below /var/lib.
pub(super) fn below_state(text: &str) -> Result<String, String> {
    if text.starts_with('/') {
        return Err("is absolute; expected the name of a folder below /var/lib".into());
    }
    let parts = components(text)?;
    // systemd reads 'a:b' as the folder a with a link b to it.
    if parts.is_empty() || text.contains(':') {
        return Err("is not a valid name of a folder below /var/lib".into());
    }
    if parts[0] == "private" {
        return Err("is below /var/lib/private, which systemd keeps for itself; expected another name".into());
    }
    // systemd gives a StateDirectory= to the service's user.
    if let Some(whose) = reserved(&format!("/var/lib/{}", parts.join("/"))) {
        return Err(format!("would give {whose} to this service; expected another name"));
    }
    Ok(parts.join("/"))
}

/// A path that a service may write to, as a manifest may have had it since ever: what is read must go on being read, or
/// one entry would keep a whole host from its manifest.
pub(super) fn writable_as_read(text: &str) -> Result<String, String> {
    let path = absolute(text)?;
    match reserved(&path) {
        Some(whose) => Err(format!("would open {whose} to this service; expected a folder of its own")),
        None => Ok(path),
    }
}

/// A path that a service may write to, as a person may write it: also nothing that what is reserved lies in, or that
/// leads there under another name.
pub(super) fn writable(text: &str) -> Result<String, String> {
    let path = writable_as_read(text)?;
    let real = unaliased(&path)?;
    let held = |dir: &str| dir.strip_prefix(&real).is_some_and(|rest| rest.starts_with('/'));
    let above = || RESERVED.iter().chain(&CADDYS).find(|(dir, _)| held(dir)).map(owner);
    match reserved(&real).or_else(|| found_in(&CADDYS, &real)).or_else(above) {
        Some(whose) => Err(format!("would open {whose} to this service; expected a folder of its own")),
        None => Ok(path),
    }
}

/// A file that systemd reads for a service, as root: nothing of ours but the services' secrets. Caddy's certificates a
/// person may mean to share, as with a mail server.
pub(super) fn secret_file(text: &str) -> Result<String, String> {
    let path = absolute(text)?;
    let real = unaliased(&path)?;
    let intended = [SECRETS, CADDYS_STATE].iter().any(|dir| real.starts_with(&format!("{dir}/")));
    match reserved(&real).filter(|_| !intended) {
        Some(whose) => Err(format!("would give {whose} to this service; expected a file in {SECRETS}")),
        None => Ok(path),
    }
}

/// A path under the name that what is reserved has; below /proc is the whole machine once more.
fn unaliased(path: &str) -> Result<String, String> {
    match path.strip_prefix("/var/run").filter(|rest| rest.is_empty() || rest.starts_with('/')) {
        Some(rest) => Ok(format!("/run{rest}")),
        None if path == "/proc" || path.starts_with("/proc/") => Err(
            "is below /proc, where every folder of the machine has another name; expected the path itself"
                .into(),
        ),
        None => Ok(path.into()),
    }
}

/// What no service may be given: our own folders, and where Caddy keeps the keys of certificates.
const RESERVED: [(&str, &str); 8] = [
    ("/var/lib/deployer", "the deployer's state"),
    (SECRETS, "the services' secrets"),
    ("/var/lib/omni-deploy", "the directory store"),
    (CADDYS_STATE, "Caddy's keys and certificates"),
    ("/var/cache/deployer", "the deployer's cache"),
    ("/run/omni-deploy", "the deployer's locks"),
    ("/etc/omni-deploy", "the deployer's configuration"),
    ("/nix/var/nix/gcroots/omni-deploy", "what keeps closures on the host"),
];

/// Where the services' secrets are.
const SECRETS: &str = "/var/lib/deployer-secrets";

/// Where Caddy keeps the keys of certificates.
const CADDYS_STATE: &str = "/var/lib/caddy";

/// What else of Caddy's is reserved, from people alone: manifests that are older may have it.
const CADDYS: [(&str, &str); 2] =
    [("/run/caddy", "Caddy's admin socket"), ("/etc/caddy", "Caddy's configuration")];

/// What a path in its normal form lies in, if that is reserved.
fn reserved(path: &str) -> Option<String> {
    found_in(&RESERVED, path)
}

fn found_in(dirs: &[(&str, &str)], path: &str) -> Option<String> {
    let within =
        |dir: &str| path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    dirs.iter().find(|(dir, _)| within(dir)).map(owner)
}

fn owner((dir, whose): &(&str, &str)) -> String {
    format!("{whose} ({dir})")
}

/// The longest name of a file (NAME_MAX).
const MAX_NAME: usize = 255;

/// Refuses a path with a name in it that no file can have.
pub(super) fn named(path: &str) -> Result<(), String> {
    match path.split('/').map(str::len).find(|n| *n > MAX_NAME) {
        Some(n) => Err(format!("has a name of {n} bytes in it; at most {MAX_NAME} are possible")),
        None => Ok(()),
    }
}

fn components(text: &str) -> Result<Vec<&str>, String> {
    at_most(4000, "characters", text)?;
    if let Some(c) = text.chars().find(|c| !path_char(*c)) {
        return Err(format!("has {c:?}; expected ASCII letters, digits and /-_.+@:,=~"));
    }
    if text.split('/').any(|part| part == "..") {
        return Err("has '..'; expected the path itself".into());
    }
    named(text)?;
    Ok(text.split('/').filter(|part| !part.is_empty() && *part != ".").collect())
}

/// A DNS name (RFC 1123), lower-cased; the first label may be `*`.
pub(super) fn domain(text: &str) -> Result<String, String> {
    let expected = "expected a DNS name such as ava.example.com";
    let text = text.to_ascii_lowercase();
    if text.len() > 253 {
        return Err(format!("has {} characters; a DNS name has at most 253", text.len()));
    }
    let rest = text.strip_prefix("*.").unwrap_or(&text);
    for label in rest.split('.') {
        if let Some(c) = label.chars().find(|c| !(c.is_ascii_alphanumeric() || *c == '-')) {
            let hint = if c.is_ascii() { "" } else { " (other letters are written as xn--…)" };
            return Err(format!("has {c:?}; {expected}{hint}"));
        }
        if label.is_empty() || label.len() > 63 || label.starts_with('-') || label.ends_with('-') {
            return Err(format!("has the label '{label}'; {expected}"));
        }
    }
    Ok(text)
}

/// A name that a service is asked by: a domain, and no pattern of domains.
pub(super) fn host(text: &str) -> Result<String, String> {
    match domain(text)? {
        name if name.starts_with("*.") => {
            Err(format!("is a pattern; expected one name, such as www.{}", &name[2..]))
        }
        name => Ok(name),
    }
}

/// A path of a URL that Caddy matches as it stands: none of its wildcards, placeholders or escapes. A trailing
/// slash is taken off.
pub(super) fn url_path(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err("does not begin with '/'".into());
    }
    at_most(1000, "characters", text)?;
    if let Some(bad) = ["..", "//"].into_iter().find(|bad| text.contains(bad)) {
        return Err(format!("has '{bad}'; expected the path itself"));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || "/-._~!$&'()+,;=:@".contains(c);
    if let Some(c) = text.chars().find(|c| !good(*c)) {
        return Err(format!("has {c:?}; expected a plain path, without patterns, queries or escapes"));
    }
    Ok(match text.trim_end_matches('/') {
        "" => "/".into(),
        trimmed => trimmed.into(),
    })
}

/// What a probe asks for: a path, and a query if need be. Kept as it is: `/health/` may differ from `/health`.
pub(super) fn probe_path(text: &str) -> Result<String, String> {
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    url_path(path)?;
    let good = |c: char| c.is_ascii_alphanumeric() || "/-._~!$&'()*+,;=:@?%".contains(c);
    if let Some(c) = query.chars().find(|c| !good(*c)) {
        return Err(format!("has {c:?} in its query; write it as %XX"));
    }
    at_most(2000, "characters", text)?;
    Ok(text.into())
}

/// A unit's name with its suffix (systemd.unit(5)).
pub(super) fn unit(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    if unit_suffix(text).is_none() || text.rfind('.') == Some(0) {
        return Err(
            "is not a valid unit name; expected one with its suffix, such as postgresql.service".into()
        );
    }
    let named = text.len() <= 255 && !text.starts_with(['-', '.', '@']) && text.chars().all(good);
    let why_not = "is not a valid unit name; expected at most 255 ASCII letters, digits and :-_.\\@";
    unchanged(text, named, why_not)
}

/// `digits[.digits]`, with at most `places` digits after the point, as (whole, part of it has more than zero,
/// all of it has).
fn decimal(text: &str, places: usize) -> Option<(u64, bool, bool)> {
    let (whole, part) = text.split_once('.').map_or((text, None), |(w, p)| (w, Some(p)));
    let digits =
        |t: &str, most: usize| (1..=most).contains(&t.len()) && t.chars().all(|c| c.is_ascii_digit());
    // A zero in front would make it octal to systemd, where it is a share.
    let octal = whole.len() > 1 && whole.starts_with('0');
    if octal || !digits(whole, 18) || !part.is_none_or(|p| digits(p, places)) {
        return None;
    }
    let some = |t: &str| t.chars().any(|c| matches!(c, '1'..='9'));
    whole.parse().ok().map(|n| (n, part.is_some_and(some), some(text)))
}

/// `MemoryMax=`: bytes with an optional suffix to base 1024, a share of the machine's, or `infinity`
/// (systemd.resource-control(5)).
pub(super) fn memory(text: &str) -> Result<String, String> {
    let good = if let Some(share) = text.strip_suffix('%') {
        decimal(share, 2).is_some_and(|(n, more, some)| some && (n < 100 || n == 100 && !more))
    } else {
        let suffixes = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
        let scaled =
            suffixes.iter().find_map(|(suffix, shift)| Some((text.strip_suffix(*suffix)?, *shift, 3)));
        let (number, shift, places) = scaled.unwrap_or((text, 0, 0));
        decimal(number, places).is_some_and(|(n, _, some)| some && u128::from(n) << shift < 1 << 62)
    };
    let why_not = "is not an amount of memory; expected one such as 512M, 1.5G, 50% or infinity";
    unchanged(text, good || text == "infinity", why_not)
}

/// `CPUQuota=`: a share of one processor, more than 100% for several (systemd.resource-control(5)).
pub(super) fn quota(text: &str) -> Result<String, String> {
    let good = text
        .strip_suffix('%')
        .and_then(|n| decimal(n, 2))
        .is_some_and(|(whole, _, some)| some && whole <= 1_000_000);
    unchanged(text, good, "is not a share of the processors; expected one such as 50% or 150%")
}

#[cfg(test)]
mod tests {
    use super::*;

    type Rule = fn(&str) -> Result<String, String>;

    #[test]
    fn each_rule_passes_what_is_meant_and_refuses_what_is_not() {
        let long = "a".repeat(64);
        let name_of_256 = format!("/a/{}", "n".repeat(256));
        let table: [(&str, Rule, &[&str], &[&str]); 13] = [
            (
                "user",
                user,
                &["root", "_apt", "www-data", "0", "1000"],
                &[
                    "",
                    "a b",
                    "1a",
                    "-x",
                    "a.b",
                    "ü",
                    "65535",
                    "4294967295",
                    "007",
                    "a:b",
                    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
                ],
            ),
            (
                "absolute",
                absolute,
                &["/a", "/var/lib/deployer-secrets/ava.env"],
                &[
                    "",
                    "a",
                    "/",
                    "//",
                    "/a/../b",
                    "/..",
                    "/a b",
                    "/a%n",
                    "/a\\",
                    "/a\"",
                    "/a*",
                    "/a$x",
                    "-/a",
                    "/ü",
                    &name_of_256,
                ],
            ),
            (
                "writable",
                writable,
                &[
                    "/srv",
                    "/srv/web",
                    "/var/lib/web",
                    "/var/log/web",
                    "/run/web",
                    "/etc/web",
                    "/var/runner",
                    "/process",
                ],
                &[
                    "/",
                    "/var",
                    "/var/lib",
                    "/var/cache",
                    "/run",
                    "/var/run",
                    "/etc",
                    "/nix",
                    "/nix/var/nix/gcroots",
                    "/nix/var/nix/gcroots/omni-deploy/web",
                    "/var/lib/deployer",
                    "/var/lib/deployer-secrets/web.env",
                    "/run/caddy",
                    "/etc/caddy/x",
                    "/var/run/omni-deploy",
                    "/var/run/caddy/admin.sock",
                    "/proc",
                    "/proc/1/root/var/lib/deployer",
                ],
            ),
            (
                "secret_file",
                secret_file,
                &[
                    "/var/lib/deployer-secrets/web.env",
                    "/run/secrets/web.env",
                    "/etc/web.env",
                    "/var/lib/web/env",
                    "/var/lib/caddy/certificates/web.key",
                ],
                &[
                    "web.env",
                    "/etc/omni-deploy/deployer.env",
                    "/var/lib/deployer/lines.json",
                    "/var/lib/deployer-secrets",
                    "/var/run/omni-deploy/x",
                    "/proc/1/environ",
                ],
            ),
            ("directory", directory, &["/", "/srv"], &["", "srv", "~", "/../"]),
            (
                "below_state",
                below_state,
                &["ava", "a/b", "privately", "a/private"],
                &["", ".", "/a", "..", "a/../b", "a b", "a:b", "%S", "private", "private/a", "./private"],
            ),
            (
                "host",
                host,
                &["ava.example.com", "localhost"],
                &["", "*.example.com", "a:80", "a b", "a\nb", "a\u{202e}b", "bücher.de"],
            ),
            (
                "domain",
                domain,
                &["ava.example.com", "localhost", "*.example.com", "xn--bcher-kva.example", "10.0.0.1"],
                &[
                    "",
                    "*",
                    "*.",
                    "a..b",
                    ".a",
                    "a.",
                    "-a.b",
                    "a-.b",
                    "a_b.c",
                    "a b",
                    "a.*.b",
                    "**.a",
                    "a:80",
                    "a/b",
                    "bücher.de",
                    "{env.X}",
                    "a\u{202e}b",
                    &long,
                ],
            ),
            (
                "url_path",
                url_path,
                &["/", "/api", "/a/b-c_d.e~f", "/@x:y"],
                &[
                    "", "api", "/a/*", "/{x}", "/a?b", "/a#b", "/a%2f", "/a b", "/../a", "/a//b", "//",
                    "/a\\b", "/ü", "/a|b", "/a\"",
                ],
            ),
            (
                "probe_path",
                probe_path,
                &["/", "/health", "/health/", "/h?deep=1&x=%20"],
                &["", "health", "/h#x", "/a b", "/h?a b", "/h?a\"b", "/h%20", "/a/../b", "/h?ü"],
            ),
            (
                "unit",
                unit,
                &["network-online.target", "a@b.service", "dev-sda\\x2d1.device"],
                &[
                    "",
                    "network-online",
                    ".service",
                    "a.conf",
                    "a b.service",
                    "a\nb.service",
                    "../a.service",
                    "-a.target",
                    "a.service ",
                    "@.service",
                    "ü.service",
                    "a%i.service",
                ],
            ),
            (
                "memory",
                memory,
                &["512M", "1.5G", "1048576", "50%", "100%", "0.5%", "infinity", "1T"],
                &[
                    "",
                    "0",
                    "0M",
                    "0%",
                    "101%",
                    "100.01%",
                    "1000%",
                    "010%",
                    "0512M",
                    "M",
                    "-1",
                    "1X",
                    "1 G",
                    "1e9",
                    "1.5",
                    "half",
                    "99999999999999999999",
                    "9999999999T",
                    "1.G",
                ],
            ),
            (
                "quota",
                quota,
                &["50%", "150%", "0.5%", "33.33%"],
                &["", "50", "0%", "%", "-5%", "1e2%", "infinity", "1.234%", "99999999%", "010%", "08%"],
            ),
        ];
        for (name, rule, good, bad) in table {
            for text in good {
                assert_eq!(rule(text).as_deref(), Ok(*text), "{name}");
            }
            for text in bad {
                assert!(rule(text).is_err(), "{name} passed {text:?}");
            }
        }
    }

    #[test]
    fn what_older_manifests_may_have_is_still_read() {
        for path in ["/etc", "/var/lib", "/run/caddy", "/proc/sys", "/var/run/omni-deploy"] {
            assert!(writable(path).is_err() && writable_as_read(path).as_deref() == Ok(path), "{path}");
        }
        assert!(writable_as_read("/var/lib/deployer").is_err());
    }

    #[test]
    fn normal_forms_are_taken() {
        assert_eq!(domain("Ava.Example.COM").unwrap(), "ava.example.com");
        assert_eq!(url_path("/api/").unwrap(), "/api");
        assert_eq!(absolute("/a//b/./c/").unwrap(), "/a/b/c");
        assert_eq!(below_state("a/").unwrap(), "a");
        assert!(absolute(&format!("/{}", "n".repeat(255))).is_ok());
    }

    #[test]
    fn controls_and_invisible_characters_are_refused() {
        for bad in [
            "a\nb",
            "\0",
            "\u{7f}",
            "\u{9b}2J",
            "a\u{202e}b",
            "\u{200b}",
            "\u{feff}x",
            "\u{2066}",
            "\t",
            "\u{e0041}",
            "\u{fdd0}",
            "\u{fffe}",
            "\u{10ffff}",
        ] {
            assert!(clean(bad).is_err(), "{bad:?} passed");
        }
        assert!(clean("plain ü 日本 😀").is_ok());
        assert!(env_value("a\tb \u{202e} ü").is_ok());
        for bad in ["a\nb", "\0", "\u{85}", "\r", "\u{fdef}", "\u{1fffe}"] {
            assert!(env_value(bad).is_err(), "{bad:?} passed");
        }
        assert!(
            env_value(&"x".repeat(MAX_ENV_BYTES)).is_ok()
                && env_value(&"x".repeat(MAX_ENV_BYTES + 1)).is_err()
        );
        for bad in ["", "1A", "A-B", "A B", "A=B", "Ä", "A\n"] {
            assert!(env_name(bad).is_err(), "{bad:?} passed");
        }
        assert!(env_name("_a1").is_ok());
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a%n", "ü", "a\n", "a\"", "a\\b", &"a".repeat(256)] {
            assert!(credential_name(bad).is_err(), "{bad:?} passed");
        }
        for good in ["token", "db-password", "tls.key", "_A.1", "...", "-x", &"a".repeat(255)] {
            assert!(credential_name(good).is_ok(), "{good:?} refused");
        }
    }
}
