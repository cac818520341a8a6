//! The modules of src, as docs/ARCHITECTURE.md has them: among those of one folder, none leads back to itself by what
//! their code names. A folder's own file and the modules below it may know each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Arrows = BTreeSet<(String, String)>;

/// The product's code by the path of its module, without comments and tests.
fn modules(dir: &Path, at: &[String], found: &mut BTreeMap<Vec<String>, String>) {
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        let own = matches!(name.as_str(), "mod" | "lib" | "main");
        let below: Vec<String> = at.iter().cloned().chain(Some(name).filter(|_| !own)).collect();
        if path.is_dir() {
            modules(&path, &below, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs_err::read_to_string(&path).unwrap();
            let code = text.split("\n#[cfg(test)]\nmod tests").next().unwrap().lines();
            let code: Vec<&str> = code.map(|line| line.split("//").next().unwrap()).collect();
            found.entry(below).or_default().push_str(&code.join("\n"));
        }
    }
}

/// The paths that begin here, of a `use` with all its branches too, as seen from the module `from`.
fn paths(text: &str, mut from: Vec<String>, found: &mut Vec<Vec<String>>) {
    let text = text.trim_start();
    if let Some(branches) = text.strip_prefix('{') {
        let (mut depth, mut start) = (0, 0);
        for (at, c) in branches.char_indices() {
            match c {
                ',' | '}' if depth == 0 => {
                    paths(&branches[start..at], from.clone(), found);
                    start = at + 1;
                    if c == '}' {
                        return;
                    }
                }
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
        }
        return;
    }
    let (name, rest) =
        text.split_at(text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len()));
    match name {
        "crate" => from.clear(),
        "super" => drop(from.pop()),
        "self" => {}
        name => from.push(name.into()),
    }
    match rest.strip_prefix("::") {
        Some(rest) => paths(rest, from, found),
        None => found.push(from),
    }
}

/// From which module to which other one of the same folder a path leads.
fn arrows(modules: &BTreeMap<Vec<String>, String>) -> Arrows {
    let mut arrows = Arrows::new();
    for (at, code) in modules {
        let begins = |i: &usize| !code[..*i].ends_with(|c: char| c == ':' || c == '_' || c.is_alphanumeric());
        let roots = ["crate::", "super::"].into_iter().flat_map(|root| code.match_indices(root));
        let mut named = Vec::new();
        roots.map(|(i, _)| i).filter(begins).for_each(|i| paths(&code[i..], at.clone(), &mut named));
        for path in named {
            let to = (0..=path.len()).rev().map(|n| &path[..n]).find(|p| modules.contains_key(*p)).unwrap();
            let shared = at.iter().zip(to).take_while(|(a, b)| a == b).count();
            if shared < at.len() && shared < to.len() {
                arrows.insert((at[..=shared].join("::"), to[..=shared].join("::")));
            }
        }
    }
    arrows
}

/// What is left of these arrows when those that lead nowhere, or that nothing leads to, are taken out again and again.
fn circles(mut arrows: Arrows) -> Arrows {
    loop {
        let count = arrows.len();
        let (from, to): (BTreeSet<String>, BTreeSet<String>) = arrows.iter().cloned().unzip();
        arrows.retain(|(a, b)| to.contains(a) && from.contains(b));
        if arrows.len() == count {
            return arrows;
        }
    }
}

#[test]
fn among_the_modules_of_a_folder_there_is_no_circle() {
    let mut code = BTreeMap::new();
    modules(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &[], &mut code);
    let arrows = arrows(&code);
    let arrow = |from: &str, to: &str| (from.to_string(), to.to_string());
    // By `crate::manifest::…`, by one of several branches, by `super::…`.
    for (from, to) in [("deployer", "manifest"), ("store", "home"), ("manifest::parse", "manifest::limits")] {
        assert!(arrows.contains(&arrow(from, to)), "{from} -> {to} is not seen");
    }
    let mut closed = arrows.clone();
    closed.insert(arrow("home", "store"));
    assert_eq!(circles(closed), Arrows::from([arrow("home", "store"), arrow("store", "home")]));
    assert_eq!(circles(arrows), Arrows::new());
}
