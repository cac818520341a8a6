//! What comes from elsewhere and is read whole: S3's answers, narinfos, URLs, reports, headers of files, times. No
//! bytes stop the program, what is read means what it says, and what is written reads the same.

use omni_deploy::clock::Timestamp;
use omni_deploy::deployer::state::State;
use omni_deploy::log::printable;
use omni_deploy::manifest::command::split_command;
use omni_deploy::manifest::versions;
use omni_deploy::names::{HostName, ServiceName, StorePath};
use omni_deploy::nix::narinfo::NarInfo;
use omni_deploy::push::namespace;
use omni_deploy::store::xml;
use omni_deploy::store::{CacheUrl, StoreUrl};
use std::path::Path;

/// The first byte says which of them the others are for.
pub fn check(data: &[u8]) {
    let Some((which, bytes)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(bytes);
    match which % 8 {
        0 => document(&text),
        1 => narinfo(&text),
        2 => url(&text),
        3 => report(bytes),
        4 => target(&text),
        5 => names(&text),
        6 => {
            if let Some(head) = versions::head_of(bytes) {
                time(head.generation);
            }
            if let Some(read) = Timestamp::parse(&text) {
                time(read);
            }
        }
        _ => words(&text),
    }
}

fn document(text: &str) {
    let mut leaves = 0;
    let read = xml::leaves(text, |path, content| {
        leaves += 1;
        assert!(!path.is_empty() && path.len() <= 17);
        assert!(path.iter().all(|name| !name.is_empty() && !name.contains(['<', '>'])));
        // What is in a leaf was in the text, or in one of its escapes.
        assert!(content.len() <= text.len());
    });
    if read.is_ok() {
        assert!(leaves > 0 && text.contains('<'));
    }
}

fn narinfo(text: &str) {
    if let Ok(info) = NarInfo::parse(text.as_bytes()) {
        assert!(info.url.starts_with("nar/") && info.url.split('/').all(|part| !part.starts_with('.')));
        assert!(text.contains(info.path.as_str()) && text.contains(&info.url));
        assert!(info.references.iter().all(|r| text.contains(r.base())));
    }
}

fn url(text: &str) {
    let cache = CacheUrl::parse(text);
    if let (Ok(CacheUrl::Store(StoreUrl::S3(of_cache))), Ok(StoreUrl::S3(of_store))) =
        (&cache, StoreUrl::parse(text))
    {
        assert_eq!(*of_cache, of_store);
        assert!(!of_store.prefix.split('/').any(|part| part == ".."), "a prefix that leads out");
        assert!(of_store.prefix.is_empty() || of_store.prefix.ends_with('/'));
        for part in [&of_store.region, &of_store.endpoint, &of_store.profile].into_iter().flatten() {
            assert!(!part.is_empty() && !part.chars().any(char::is_control), "{part:?}");
        }
    }
    if let Ok(CacheUrl::Store(StoreUrl::Dir(dir))) = cache {
        assert!(dir.is_absolute() && !dir.to_string_lossy().contains("/../"));
    }
}

fn report(bytes: &[u8]) {
    if let Ok(state) = State::parse(bytes) {
        let written = serde_json::to_vec(&state).expect("a state is plain data");
        assert_eq!(State::parse(&written), Ok(state));
    }
}

fn target(text: &str) {
    if let Some((line, name)) = namespace::out_name(text) {
        assert!((1..=50).contains(&line) && !name.is_empty() && !name.contains(char::is_whitespace));
        assert!(text.lines().nth(line - 1).is_some_and(|l| l.contains(name)));
    }
    if let Ok(form) = namespace::form(text) {
        assert!(!text.is_empty() && !text.starts_with('-') && !text.contains(char::is_control), "{form:?}");
    }
    if let Some(name) = namespace::name_of_flake(text) {
        assert!(!name.is_empty());
    }
    assert!(!namespace::name_of_path(Path::new(text)).contains('/'));
}

fn names(text: &str) {
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_graphic() && !b"/\\\"'$%:".contains(&b));
    if let Ok(name) = ServiceName::parse(text) {
        assert_eq!(name.as_str(), text);
        assert!(plain(text) && !text.starts_with(['-', '.']) && name.unit().len() <= 256);
    }
    if let Ok(name) = HostName::parse(text) {
        assert_eq!(name.as_str(), text);
        assert!(plain(text) && !text.starts_with(['-', '.']));
    }
    if let Ok(path) = StorePath::parse(text) {
        assert_eq!(path.as_str(), text);
        assert_eq!(text.matches('/').count(), 3);
        assert!(path.base().starts_with(path.hash()) && path.base().len() <= 255);
    }
    let shown = printable(text);
    assert!(!shown.chars().any(char::is_control), "{shown:?}");
    assert_eq!(printable(&shown), shown);
}

fn time(time: Timestamp) {
    assert_eq!(Timestamp::parse(&time.to_string()), Some(time), "{time} is not read as it is written");
}

fn words(text: &str) {
    if let Ok(words) = split_command(text) {
        let quoted: Vec<String> = words.iter().map(|w| format!("'{}'", w.replace('\'', "'\\''"))).collect();
        assert_eq!(split_command(&quoted.join(" ")), Ok(words));
    }
}
