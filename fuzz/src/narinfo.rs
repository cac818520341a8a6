//! Narinfos: what is read is written the same, holds what was put there, and is vouched for by nobody who did not sign
//! it.

use crate::entries::Choices;
use crate::keys::key;
use omni_deploy::hash::{BASE32_DIGITS, Sha256};
use omni_deploy::keys::SecretKey;
use omni_deploy::names::StorePath;
use omni_deploy::nix::narinfo::{Compression, MAX_REFERENCES, MAX_SIGNATURES, NarInfo, is_nar_key};
use omni_deploy::nix::walk::{PathFault, judge};
use std::sync::LazyLock;

/// A key that is trusted, and a stranger's of the same name.
pub(crate) static KEYS: LazyLock<[SecretKey; 2]> =
    LazyLock::new(|| [key("ann-1", [1; 32]), key("ann-1", [2; 32])]);

/// The first byte says what the others are: the text of a narinfo, a hash, or a narinfo to write, and what is done to it.
pub fn check(data: &[u8]) {
    let mut choices = Choices::new(data);
    match choices.byte() {
        0..0x60 => text(choices.rest()),
        0x60..0x80 => hash(&String::from_utf8_lossy(choices.rest())),
        _ => written(&mut choices),
    }
}

fn text(bytes: &[u8]) {
    match NarInfo::parse(bytes) {
        Ok(info) => sound(&info),
        Err(why) => plain(&why),
    }
}

/// What holds of every narinfo that was read.
fn sound(info: &NarInfo) {
    assert_eq!(
        NarInfo::parse(info.render().as_bytes()).as_ref(),
        Ok(info),
        "written and read again it is another"
    );
    assert!(is_nar_key(&info.url) && info.url.starts_with("nar/"), "{}", info.url);
    assert!(info.url.split('/').all(|part| !["", ".", ".."].contains(&part)), "{}", info.url);
    assert!(!info.url.contains([':', '?', '#', '%', '\\']), "{}", info.url);
    assert!(info.references.len() <= MAX_REFERENCES && info.signatures.len() <= MAX_SIGNATURES);
    assert!(!info.verified_by(&[KEYS[1].public()]), "a signature that nobody made");
    let fingerprint = info.fingerprint();
    assert!(
        !fingerprint.chars().any(char::is_control) && fingerprint.split(';').count() == 5,
        "{fingerprint}"
    );
}

/// A refusal is short, and steers no terminal.
fn plain(why: &str) {
    assert!(!why.chars().any(char::is_control) && why.len() < 1000, "{why:?}");
}

fn hash(text: &str) {
    match Sha256::parse(text) {
        Ok(hash) => {
            let forms =
                [hash.to_string(), format!("sha256:{}", hash.base16()), format!("sha256-{}", hash.base64())];
            for form in &forms {
                assert_eq!(Sha256::parse(form), Ok(hash), "{form}");
            }
            let digits = hash.base32();
            assert!(digits.len() == 52 && digits.bytes().all(|b| BASE32_DIGITS.contains(&b)), "{digits}");
            // One hash has one text in each form.
            let base64 = forms[2].replacen('-', ":", 1);
            assert!(forms.iter().any(|form| form == text) || base64 == text, "{text} passes for {hash}");
        }
        Err(why) => plain(&why),
    }
}

/// A store path of few, so that they meet.
pub(crate) fn path(n: usize) -> StorePath {
    StorePath::parse(&format!("/nix/store/{n:032}-p{n}")).expect("it has the form of a path")
}

/// Signs as Nix does.
pub(crate) fn sign(info: &mut NarInfo, key: &SecretKey) {
    info.signatures.push(key.sign(info.fingerprint().as_bytes()).expect("a key signs"));
}

fn written(choices: &mut Choices<'_>) {
    let mut info = NarInfo {
        path: path(choices.below(8)),
        url: format!("nar/{}.nar", choices.byte()),
        compression: choices.pick(&[
            Compression::None,
            Compression::Zstd,
            Compression::Xz,
            Compression::Other,
        ]),
        file_hash: choices.rarely(2).then(|| Sha256::of(b"file")),
        file_size: choices.rarely(2).then(|| u64::from(choices.byte())),
        nar_hash: Sha256::of(&[choices.byte()]),
        nar_size: u64::from(choices.byte()) << (choices.byte() % 56),
        references: (0..choices.below(5)).map(|_| path(choices.below(8))).collect(),
        deriver: choices.rarely(2).then(|| format!("{}.drv", path(0).base())),
        signatures: Vec::new(),
        ca: None,
    };
    let [signer, stranger] = &*KEYS;
    let trusted = [signer.public()];
    if choices.rarely(2) {
        sign(&mut info, stranger);
    }
    assert!(!info.verified_by(&trusted));
    sign(&mut info, signer);
    sound_but_for_strangers(&info);
    assert!(judge(&info.path, info.render().as_bytes(), &trusted).is_ok());
    assert!(matches!(judge(&path(9), info.render().as_bytes(), &trusted), Err(PathFault::Unreadable(_))));
    // One byte is another: whoever is still believed says the same of what was signed.
    let mut bytes = info.render().into_bytes();
    let at = (usize::from(choices.byte()) << 8 | usize::from(choices.byte())) % bytes.len();
    let other = choices.byte();
    match choices.below(3) {
        0 => bytes[at] = other,
        1 => bytes.insert(at, other),
        _ => drop(bytes.remove(at)),
    }
    match judge(&info.path, &bytes, &trusted) {
        Ok(found) => {
            assert_eq!(found.info.differs_from(&info), None, "a changed narinfo passes for the signed one");
            assert!(is_nar_key(&found.info.url), "{}", found.info.url);
        }
        Err(PathFault::Unreadable(why)) => plain(&why),
        Err(_) => {}
    }
}

fn sound_but_for_strangers(info: &NarInfo) {
    assert_eq!(NarInfo::parse(info.render().as_bytes()).as_ref(), Ok(info));
}
