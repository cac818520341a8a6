//! The manifest's parser: what it accepts it writes so that it reads the same again, what it refuses it refuses in
//! words that a terminal can be shown.

use crate::entries::{self, Choices};
use omni_deploy::bounds::{self, Bounds};
use omni_deploy::manifest::parse::{self, Mode};
use omni_deploy::manifest::{Manifest, Service, diff, json, signature, versions};
use serde_json::Value;

/// Bytes below 0x80 begin a manifest as it is; others stand for decisions of [`entries::manifest`].
pub fn check(data: &[u8]) {
    match data.split_first() {
        Some((0x80.., choices)) => text(entries::manifest(&mut Choices::new(choices)).to_string().as_bytes()),
        _ => text(data),
    }
}

fn text(bytes: &[u8]) {
    counted(bytes);
    let tolerant = parse::manifest(bytes, Mode::Tolerant);
    let strict = parse::manifest(bytes, Mode::Strict);
    for refusal in [&tolerant, &strict].into_iter().filter_map(|read| read.as_ref().err()) {
        let shown = refusal.to_string();
        assert!(!shown.chars().any(char::is_control), "a refusal has control characters: {shown:?}");
    }
    if let Ok(strict) = &strict {
        assert_eq!(tolerant.as_ref(), Ok(strict), "strict takes what tolerant does not");
    }
    if let Ok(manifest) = tolerant {
        accepted(bytes, &manifest);
    }
}

/// What is counted before anything is built is what the tree has then.
fn counted(bytes: &[u8]) {
    let Ok(tree) = serde_json::from_slice::<Value>(bytes) else { return };
    let says_once = signature::canonical(bytes).is_ok();
    let (values, depth) = size(&tree);
    let fits = |values, depth| bounds::check(bytes, Bounds { values, depth }).is_ok();
    // Of a name that stands twice the tree has one.
    assert!(fits(values, depth) || !says_once, "more is counted than is there");
    assert!(!fits(values - 1, depth), "values are not counted");
    assert!(depth == 0 || !fits(values, depth - 1), "depth is not counted");
}

/// Values and depth of a tree.
fn size(value: &Value) -> (usize, usize) {
    let all = |inner: &mut dyn Iterator<Item = &Value>| {
        let (values, depth) =
            inner.map(size).fold((0, 0), |(n, deep), (m, deeper)| (n + m, deep.max(deeper)));
        (values + 1, depth + 1)
    };
    match value {
        Value::Array(items) => all(&mut items.iter()),
        Value::Object(members) => all(&mut members.values()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => (1, 0),
    }
}

/// Of what holds for all that is accepted, a part, for the sake of speed: which one follows from the bytes.
fn accepted(bytes: &[u8], manifest: &Manifest) {
    match bytes.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b)) % 4 {
        0 => round_trip(manifest),
        1 => canonical_form(bytes, manifest),
        2 => text_tools(bytes, manifest),
        _ => manifest.services.iter().for_each(known_fields),
    }
}

/// What is written reads the same again.
fn round_trip(manifest: &Manifest) {
    let written = manifest.to_bytes();
    let again = parse::manifest(&written, Mode::Tolerant).expect("what is written is accepted");
    assert_eq!(&again, manifest, "what is written says the same");
    assert_eq!(again.to_bytes(), written, "and is written the same");
    assert_eq!(diff::diff(manifest, &again), []);
}

/// One signature fits the manifest as it was read and as it is written.
fn canonical_form(bytes: &[u8], manifest: &Manifest) {
    let written = manifest.to_bytes();
    let canonical = signature::canonical(&written).expect("a manifest has a canonical form");
    let mut tree = serde_json::to_value(manifest).expect("a manifest is plain data");
    tree.as_object_mut().expect("a manifest is an object").remove("signatures");
    assert_eq!(canonical, tree.to_string().as_bytes(), "it is signed as it is verified");
    let given = signature::canonical(bytes).expect("a manifest has a canonical form");
    assert_eq!(signature::canonical(&given).as_deref(), Ok(&given[..]), "a canonical form is its own");
}

/// What shows a manifest works on its text, and finds the same there.
fn text_tools(bytes: &[u8], manifest: &Manifest) {
    let laid = json::pretty(bytes);
    assert_eq!(parse::manifest(&laid, Mode::Tolerant).as_ref(), Ok(manifest), "the layout changes nothing");
    assert_eq!(json::pretty(&laid), laid);
    let services: Vec<_> = json::elements(bytes, "services")
        .into_iter()
        .map(|entry| {
            parse::service_from(entry, Mode::Tolerant, None).expect("an entry of its own is accepted")
        })
        .collect();
    assert_eq!(services, manifest.services, "the entries as they are written");
    let head = versions::head_of(bytes).expect("a manifest has a head");
    assert_eq!((head.serial, head.generation), (manifest.serial, manifest.generation));
    assert_eq!((&head.change.action, &head.change.by), (&manifest.change.action, &manifest.change.by));
}

/// Nothing of an entry that goes to a unit, to Caddy or into a path has a control character.
fn known_fields(service: &Service) {
    let mut known = serde_json::to_value(service).expect("an entry is plain data");
    let levels = [
        ("", Some(&service.extra)),
        ("/artifact", Some(&service.artifact.extra)),
        ("/exec", Some(&service.exec.extra)),
        ("/http", service.http.as_ref().map(|h| &h.extra)),
        ("/health", service.health.as_ref().map(|h| &h.extra)),
        ("/systemd", Some(&service.systemd.extra)),
        ("/hardening", Some(&service.hardening.extra)),
    ];
    for (pointer, extra) in levels {
        let fields = known.pointer_mut(pointer).and_then(Value::as_object_mut);
        if let (Some(fields), Some(extra)) = (fields, extra) {
            fields.retain(|name, _| !extra.contains_key(name));
        }
    }
    no_controls(&known);
}

/// Nothing of what this version knows has a control character in it, but for tabs.
fn no_controls(value: &Value) {
    match value {
        Value::String(text) => {
            assert!(!text.chars().any(|c| c.is_control() && c != '\t'), "control characters in {text:?}");
        }
        Value::Array(items) => items.iter().for_each(no_controls),
        Value::Object(fields) => fields.values().for_each(no_controls),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
