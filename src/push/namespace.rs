//! What is to be pushed, and as which service: a namespace (a file of the repository), a Nix file, a flake
//! reference or a store path. Pure, but for [`resolve`], which looks at the files.

use crate::error::{Error, Result};
use crate::log;
use crate::names::{STORE_DIR, ServiceName, StorePath};
use crate::runner::{Output, Run, RunError, tail};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// How many lines at the top of a file are its header.
const HEADER_LINES: usize = 50;
/// How many bytes at the top of a file are looked at.
const HEADER_BYTES: u64 = 64 << 10;
/// What opens a comment, the longer before the shorter that begins alike.
const LEADERS: [&str; 9] = ["{-", "--", "//", "(*", "/*", "#", ";;", ";", "%"];
/// What closes one.
const CLOSERS: [&str; 3] = ["-}", "*)", "*/"];

/// How a target is built, by its form alone: files are as they were typed. The error is the reason alone.
pub fn form(text: &str) -> Result<How, String> {
    if text.is_empty() || text.contains(|c: char| c.is_control()) {
        return Err("is empty or has control characters".into());
    }
    if text.starts_with('-') {
        return Err("looks like an option; write ./ before a file of that name".into());
    }
    if text == STORE_DIR || text.starts_with(&format!("{STORE_DIR}/")) {
        return StorePath::parse(text).map(How::Built);
    }
    Ok(if text.contains('#') {
        How::Flake(text.to_string())
    } else if text.ends_with(".nix") {
        How::NixFile(text.into())
    } else {
        How::Command(text.to_string())
    })
}

/// The name after `: out` in a header's comment, with its line number. The comment says nothing else.
pub fn out_name(text: &str) -> Option<(usize, &str)> {
    text.lines().take(HEADER_LINES).enumerate().find_map(|(number, line)| {
        let line = line.trim();
        let mut comment = LEADERS.iter().find_map(|leader| line.strip_prefix(leader))?;
        for closer in CLOSERS {
            comment = comment.strip_suffix(closer).unwrap_or(comment);
        }
        let mut words =
            comment.strip_prefix(|c: char| c == ' ' || c == '\t').unwrap_or(comment).split_whitespace();
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some(":"), Some("out"), Some(name), None) => Some((number + 1, name)),
            _ => None,
        }
    })
}

/// The name that a file's place gives: its path below the first folder, lower-cased, joined by `-`, without
/// extension. A `default.nix` is named by its folder.
pub fn name_of_path(path: &Path) -> String {
    let mut parts: Vec<String> = path
        .with_extension("")
        .components()
        .filter_map(|c| match c {
            Component::Normal(part) => Some(part.to_string_lossy().to_lowercase()),
            _ => None,
        })
        .collect();
    if parts.len() > 1 && path.file_name().is_some_and(|n| n == "default.nix") {
        parts.pop();
    }
    if parts.len() > 1 {
        parts.remove(0);
    }
    parts.join("-")
}

/// The name that a flake reference gives: the last part of its attribute path, without the outputs it picks.
/// None for the default package, whose name says nothing.
pub fn name_of_flake(reference: &str) -> Option<&str> {
    let (_, attribute) = reference.split_once('#')?;
    let attribute = attribute.split('^').next().unwrap_or_default();
    let last = attribute.rsplit('.').next().unwrap_or_default().trim_matches('"');
    (!last.is_empty() && last != "default").then_some(last)
}

/// How a target is built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// It is there already.
    Built(StorePath),
    /// `nix build REFERENCE#ATTRIBUTE`.
    Flake(String),
    /// `nix-build FILE`.
    NixFile(PathBuf),
    /// The build command with the namespace, relative to the folder.
    Command(String),
}

/// A target with everything that is known before it is built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// As it was typed.
    pub shown: String,
    /// The service it is pushed as.
    pub service: ServiceName,
    /// How it is built.
    pub how: How,
    /// The folder it is built in: the repository's, or the current one.
    pub dir: PathBuf,
    /// The repository it comes from, if it comes from one.
    pub repository: Option<PathBuf>,
}

/// Finds out what one target is, seen from the folder `cwd`. `service` overrides the name.
pub fn resolve(text: &str, service: Option<&str>, cwd: &Path) -> Result<Target> {
    let form = form(text).map_err(|why| Error::usage(format!("target {text:?} {why}")))?;
    let named = |derived: &str, from: &str| {
        let (name, from) = service.map_or((derived, from), |s| (s, "--service"));
        ServiceName::parse(name).map_err(|why| {
            Error::usage(format!(
                "the service's name '{name}' (from {from}) {why}; name it with --service NAME"
            ))
        })
    };
    let target = |service, how, dir: &Path, repository| {
        Ok(Target { shown: text.to_string(), service, how, dir: dir.to_path_buf(), repository })
    };
    match form {
        How::Built(path) => {
            let Some(name) = service else {
                return Err(Error::usage(format!(
                    "{path} does not say which service it is; add --service NAME"
                )));
            };
            target(named(name, "--service")?, How::Built(path), cwd, None)
        }
        How::Flake(reference) => {
            let Some(name) = service.or_else(|| name_of_flake(&reference)) else {
                return Err(Error::usage(format!("{reference} does not name a service; add --service NAME")));
            };
            let name = named(name, "the flake reference")?;
            // A reference to a folder has that folder's repository; any other has none here.
            let at = reference.split(['#', '?']).next().unwrap_or_default();
            let folder = cwd.join(at.strip_prefix("path:").unwrap_or(at));
            let repository = if folder.is_dir() { repository(&folder)? } else { None };
            target(name, How::Flake(reference), cwd, repository)
        }
        How::NixFile(_) | How::Command(_) => {
            let (path, repository) = find(text, cwd)?;
            let root = repository.clone().unwrap_or_else(|| cwd.to_path_buf());
            let Ok(relative) = path.strip_prefix(&root) else {
                return Err(Error::usage(format!(
                    "{} is outside of {}; push it from its own repository",
                    path.display(),
                    root.display()
                )));
            };
            let head = header(&path)?;
            let name = match out_name(&head) {
                Some((line, name)) => named(name, &format!("{text}, line {line}"))?,
                None => named(&name_of_path(relative), "its path")?,
            };
            let how = match form {
                How::NixFile(_) => How::NixFile(path.clone()),
                _ => How::Command(relative.to_string_lossy().into_owned()),
            };
            target(name, how, &root, repository)
        }
    }
}

/// The file a namespace means, below the current folder or else below the repository's, and its repository.
fn find(file: &str, cwd: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    let here = cwd.join(file);
    if here.is_file() {
        let path = fs_err::canonicalize(&here)?;
        let repository = repository(path.parent().unwrap_or(cwd))?;
        return Ok((path, repository));
    }
    let root = repository(cwd)?;
    if let Some(root) = &root
        && root.join(file).is_file()
    {
        return Ok((fs_err::canonicalize(root.join(file))?, Some(root.clone())));
    }
    let looked = match root {
        Some(root) if root != cwd => format!("{} or {}", cwd.display(), root.display()),
        _ => cwd.display().to_string(),
    };
    Err(Error::new(format!("no file {file} in {looked}; name it as the repository does (Biz/App.py)")))
}

fn header(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    fs_err::File::open(path)?.take(HEADER_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// None without git.
fn run_git(dir: &Path, words: &[&str]) -> Result<Option<Output>> {
    match Run::new("git").args(words).dir(dir).env("GIT_OPTIONAL_LOCKS", "0").output() {
        Err(RunError::NotFound { .. }) => Ok(None),
        output => Ok(Some(output?)),
    }
}

fn git(dir: &Path, words: &[&str]) -> Result<Option<String>> {
    let Some(output) = run_git(dir, words)? else { return Ok(None) };
    if output.status.ok() {
        return Ok(Some(output.text().trim_end().to_string()));
    }
    let none = ["not a git repository", "Needed a single revision"];
    if !none.iter().any(|text| output.stderr.contains(text)) {
        log::warning(format!("git says nothing about {}: {}", dir.display(), tail(&output.stderr)));
    }
    Ok(None)
}

/// The top folder of the repository that `dir` is in; None without git.
fn repository(dir: &Path) -> Result<Option<PathBuf>> {
    match git(dir, &["rev-parse", "--show-toplevel"])? {
        Some(top) if !top.is_empty() => Ok(Some(fs_err::canonicalize(top)?)),
        _ => Ok(None),
    }
}

/// Stands after a commit whose tracked files were changed when it was built.
pub const DIRTY: &str = "-dirty";

/// The commit of a repository, with `-dirty` when tracked files differ from it; None before the first commit.
pub fn revision(repository: &Path) -> Result<Option<String>> {
    let Some(commit) = git(repository, &["rev-parse", "--verify", "HEAD"])? else { return Ok(None) };
    let changes = git(repository, &["status", "--porcelain", "--untracked-files=no"])?;
    let dirty = changes.is_none_or(|c| !c.is_empty());
    Ok(Some(if dirty { format!("{commit}{DIRTY}") } else { commit }))
}

/// A revision of a manifest as a commit that may be given to git: what a person wrote there may be anything.
fn commit_of(revision: &str) -> Option<&str> {
    let commit = revision.strip_suffix(DIRTY).unwrap_or(revision);
    let hex = commit.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    (hex && matches!(commit.len(), 40 | 64)).then_some(commit)
}

/// What of `before` is not in `after`, both commits of this repository: how many commits, and whether `after` has
/// some of its own. None when `after` comes after `before`, or one of them is not known here.
pub fn left_out(repository: &Path, before: &str, after: &str) -> Result<Option<(u64, bool)>> {
    let (Some(before), Some(after)) = (commit_of(before), commit_of(after)) else { return Ok(None) };
    if before == after {
        return Ok(None);
    }
    let range = format!("{before}...{after}");
    let counted = run_git(repository, &["rev-list", "--left-right", "--count", &range, "--"])?;
    // It fails where one of them is in no clone of this machine.
    let Some(output) = counted.filter(|output| output.status.ok()) else { return Ok(None) };
    let counts: Vec<u64> = output.text().split_whitespace().filter_map(|w| w.parse().ok()).collect();
    Ok(match counts[..] {
        [left, right] if left > 0 => Some((left, right > 0)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_of_a_target_is_told_by_its_looks() {
        let path = "/nix/store/0c0zzgbsl9wnzv7wpkdjmzbi8yq6lvjd-ava";
        assert_eq!(form(path), Ok(How::Built(StorePath::parse(path).unwrap())));
        assert_eq!(form(".#ava"), Ok(How::Flake(".#ava".into())));
        assert_eq!(form("github:o/r#x"), Ok(How::Flake("github:o/r#x".into())));
        assert_eq!(form("Biz/App.nix"), Ok(How::NixFile("Biz/App.nix".into())));
        assert_eq!(form("Biz/PodcastItLater/Web.py"), Ok(How::Command("Biz/PodcastItLater/Web.py".into())));
        for bad in ["", "-x", "--service", "a\nb", "/nix/store/x", &format!("{path}/bin/ava"), "/nix/store"] {
            assert!(form(bad).is_err(), "{bad:?} passed");
        }
    }

    #[test]
    fn a_header_comment_names_the_service_in_any_language() {
        for (text, want) in [
            ("#!/usr/bin/env python3\n# : out podcastitlater-web\n", Some((2, "podcastitlater-web"))),
            ("{-# LANGUAGE X #-}\n\n-- : out ava\nmodule Main where", Some((3, "ava"))),
            ("// : out site", Some((1, "site"))),
            (";; : out scm", Some((1, "scm"))),
            ("(* : out ml *)", Some((1, "ml"))),
            ("/* : out c */\r\n", Some((1, "c"))),
            ("% : out tex", Some((1, "tex"))),
            ("  #   : out   spaced  ", Some((1, "spaced"))),
            ("#: out tight", Some((1, "tight"))),
            ("{- : out hs -}", Some((1, "hs"))),
            ("# : out", None),
            ("# : out two words", None),
            ("# see : out x", None),
            (": out x", None),
            ("x = \": out x\"", None),
            ("# :out x", None),
            ("# : dep x", None),
            ("", None),
        ] {
            assert_eq!(out_name(text), want, "{text:?}");
        }
        assert_eq!(out_name(&format!("{}# : out late", "\n".repeat(HEADER_LINES))), None);
        assert_eq!(out_name("# : out first\n# : out second"), Some((1, "first")));
    }

    #[test]
    fn a_path_names_the_service_below_its_first_folder() {
        for (path, want) in [
            ("Biz/PodcastItLater/Web.py", "podcastitlater-web"),
            ("Omni/Ava.hs", "ava"),
            ("Ava.hs", "ava"),
            ("Biz/A/B/C.tar.gz", "a-b-c.tar"),
            ("Biz/Thing/default.nix", "thing"),
            ("Thing/default.nix", "thing"),
            ("default.nix", "default"),
            ("Biz/My_App.rs", "my_app"),
        ] {
            assert_eq!(name_of_path(Path::new(path)), want, "{path}");
        }
    }

    #[test]
    fn a_flake_attribute_names_the_service() {
        for (reference, want) in [
            (".#ava", Some("ava")),
            (".#packages.x86_64-linux.ava", Some("ava")),
            ("github:o/r#ava^bin", Some("ava")),
            (".#", None),
            (".#default", None),
        ] {
            assert_eq!(name_of_flake(reference), want, "{reference}");
        }
    }

    fn repo() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = fs_err::canonicalize(dir.path()).unwrap();
        fs_err::create_dir_all(root.join("Biz/App")).unwrap();
        fs_err::write(root.join("Biz/App/Web.py"), "# nothing\n").unwrap();
        fs_err::write(root.join("Biz/Named.py"), "# : out other\n").unwrap();
        (dir, root)
    }

    fn as_author(root: &Path, words: &[&str]) {
        let identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"];
        Run::new("git").args(identity).args(words).dir(root).success().unwrap();
    }

    #[test]
    fn a_namespace_is_found_from_anywhere_in_its_repository() {
        let (_dir, root) = repo();
        as_author(&root, &["init", "-q"]);
        let absolute = root.join("Biz/App/Web.py");
        for (text, cwd) in [
            ("Biz/App/Web.py", root.clone()),
            ("./Biz/App/Web.py", root.clone()),
            ("Web.py", root.join("Biz/App")),
            ("Biz/App/Web.py", root.join("Biz/App")),
            ("../App/Web.py", root.join("Biz/App")),
            (absolute.to_str().unwrap(), PathBuf::from("/")),
        ] {
            let target = resolve(text, None, &cwd).unwrap();
            assert_eq!(target.how, How::Command("Biz/App/Web.py".into()), "{text} in {}", cwd.display());
            assert_eq!((target.service.as_str(), &target.dir), ("app-web", &root));
        }
        assert_eq!(resolve("Biz/Named.py", None, &root).unwrap().service.as_str(), "other");
        assert_eq!(resolve("Biz/Named.py", Some("mine"), &root).unwrap().service.as_str(), "mine");
        let e = resolve("Biz/Nope.py", None, &root).unwrap_err().to_string();
        assert!(e.contains("no file Biz/Nope.py"), "{e}");
    }

    #[test]
    fn without_a_repository_the_current_folder_counts() {
        let (_dir, root) = repo();
        let target = resolve("Biz/App/Web.py", None, &root).unwrap();
        assert_eq!((target.service.as_str(), target.repository), ("app-web", None));
        let outside = resolve(root.join("Biz/Named.py").to_str().unwrap(), None, &root.join("Biz/App"));
        assert!(outside.unwrap_err().to_string().contains("outside"));
    }

    #[test]
    fn the_revision_is_the_commit_and_tells_of_changes() {
        let (_dir, root) = repo();
        as_author(&root, &["init", "-q"]);
        assert_eq!(revision(&root).unwrap(), None);
        as_author(&root, &["add", "-A"]);
        as_author(&root, &["commit", "-qm", "x"]);
        let clean = revision(&root).unwrap().unwrap();
        assert_eq!(clean.len(), 40, "{clean}");
        fs_err::write(root.join("untracked"), "").unwrap();
        assert_eq!(revision(&root).unwrap().unwrap(), clean);
        fs_err::write(root.join("Biz/Named.py"), "changed").unwrap();
        assert_eq!(revision(&root).unwrap().unwrap(), format!("{clean}-dirty"));
    }

    #[test]
    fn what_a_commit_leaves_out_of_another_is_counted() {
        let (_dir, root) = repo();
        as_author(&root, &["init", "-q", "-b", "main"]);
        as_author(&root, &["add", "-A"]);
        let mut commits = Vec::new();
        let mut commit = |message: &str| {
            as_author(&root, &["commit", "-q", "--allow-empty", "-m", message]);
            commits.push(revision(&root).unwrap().unwrap());
        };
        ["a", "b", "c"].iter().for_each(|m| commit(m));
        as_author(&root, &["checkout", "-q", "-b", "side", "HEAD~1"]);
        as_author(&root, &["commit", "-q", "--allow-empty", "-m", "d"]);
        let side = revision(&root).unwrap().unwrap();
        let [a, b, c] = &commits[..] else { panic!("three commits") };
        let unknown = "0".repeat(40);
        for (before, after, want) in [
            (c, a, Some((2, false))),
            (&format!("{c}{DIRTY}"), a, Some((2, false))),
            (a, c, None),
            (b, b, None),
            (b, &format!("{b}{DIRTY}"), None),
            (c, &side, Some((1, true))),
            (&unknown, c, None),
            (&"--all".to_string(), c, None),
        ] {
            assert_eq!(left_out(&root, before, after).unwrap(), want, "{before} {after}");
        }
    }
}
