//! What a binary cache says of one path (`HASH.narinfo`): read with bounds, written in Nix's form, and judged. A narinfo
//! comes from a stranger until [`NarInfo::warrant`] says who vouches for it: a signature, which covers path, hash, size
//! and references and nothing else, or the path's own name, where that was made from the content. What nobody vouches
//! for (where the NAR is, how it is compressed, how large the file is) is never more than a hint. No network, no files.

use crate::hash::Sha256;
use crate::keys::{PublicKey, is_signature};
use crate::names::{STORE_DIR, StorePath};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// The most bytes of a narinfo; thousands of references fit.
pub const MAX_BYTES: u64 = 1 << 20;
/// The most references of one path. The most that a path of Nixpkgs has is a tenth of this.
pub const MAX_REFERENCES: usize = 10_000;
/// The most signatures of one narinfo: each costs a verification.
pub const MAX_SIGNATURES: usize = 64;
/// The longest value of any other field.
const MAX_VALUE: usize = 4096;

/// How the NAR's file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// Zstandard: what `push` writes.
    Zstd,
    /// LZMA: what Nix writes unless it is told otherwise.
    Xz,
    /// What other caches have used: `bzip2`, `gzip`, `br` and the like.
    Other,
}

/// A narinfo. Only what [`NarInfo::parse`] let through, or what was made from the local store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    /// The path it is about.
    pub path: StorePath,
    /// The NAR file's key: a file below `nar/`.
    pub url: String,
    /// How that file is compressed.
    pub compression: Compression,
    /// The file's hash, if it says so.
    pub file_hash: Option<Sha256>,
    /// The file's size in bytes, if it says so.
    pub file_size: Option<u64>,
    /// The NAR's hash.
    pub nar_hash: Sha256,
    /// The NAR's size in bytes.
    pub nar_size: u64,
    /// What the path refers to; itself among them if it does so.
    pub references: BTreeSet<StorePath>,
    /// The derivation that made it (`HASH-NAME.drv`), if it says so.
    pub deriver: Option<String>,
    /// Its signatures, `NAME:BASE64`.
    pub signatures: Vec<String>,
    /// What its name was made from, if it is content-addressed.
    pub ca: Option<String>,
}

/// Who vouches for a narinfo, and hence for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warrant {
    /// A key that is trusted: path, hash, size and references are what was signed.
    Signature,
    /// The path's own name: a NAR of that hash is what it stands for.
    Nar,
    /// The path's own name: a plain file of this content is. The NAR's hash follows from the content and is to be
    /// compared with it.
    File(Sha256),
}

impl NarInfo {
    /// The key of a path's narinfo.
    pub fn key(path: &StorePath) -> String {
        format!("{}.narinfo", path.hash())
    }

    /// Reads a narinfo; the error is the reason alone. Fields that are not known are passed over.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        if text.len() as u64 > MAX_BYTES {
            return Err(format!("has more than {MAX_BYTES} bytes"));
        }
        let text = std::str::from_utf8(text).map_err(|_| "is not text".to_string())?;
        let mut fields = NarInfoFields::default();
        for line in text.split('\n').filter(|line| !line.is_empty()) {
            fields.take(line)?;
        }
        let path = fields.required("StorePath")?;
        let path = StorePath::parse(path)
            .map_err(|why| format!("has the StorePath {}, which {why}", shown(path)))?;
        let url = fields.required("URL")?;
        if !is_nar_key(url) {
            return Err(format!("has the URL {}, which is not a file below nar/", shown(url)));
        }
        let nar_hash = fields.required("NarHash")?;
        let deriver = fields.get("Deriver").filter(|d| *d != "unknown-deriver");
        if let Some(deriver) = deriver {
            reference(deriver, "Deriver")?;
        }
        Ok(NarInfo {
            path,
            url: url.to_string(),
            compression: match fields.get("Compression") {
                // What Nix takes a narinfo for that does not say.
                None => Compression::Other,
                Some("none" | "") => Compression::None,
                Some("zstd") => Compression::Zstd,
                Some("xz") => Compression::Xz,
                Some(_) => Compression::Other,
            },
            // A hint alone, so that one in another algorithm is no fault.
            file_hash: fields.get("FileHash").and_then(|text| Sha256::parse(text).ok()),
            file_size: fields.get("FileSize").map(|text| number(text, "FileSize")).transpose()?,
            nar_hash: Sha256::parse(nar_hash)
                .map_err(|why| format!("has the NarHash {}, which {why}", shown(nar_hash)))?,
            nar_size: number(fields.required("NarSize")?, "NarSize")?,
            references: references(fields.required("References")?)?,
            deriver: deriver.map(str::to_string),
            signatures: fields.signatures.iter().map(|signature| signature.to_string()).collect(),
            ca: fields.get("CA").filter(|ca| !ca.is_empty()).map(str::to_string),
        })
    }

    /// The narinfo as Nix writes it.
    pub fn render(&self) -> String {
        let mut text = format!("StorePath: {}\nURL: {}\n", self.path, self.url);
        let compression = match self.compression {
            Compression::None => "none",
            Compression::Zstd => "zstd",
            Compression::Xz => "xz",
            Compression::Other => "",
        };
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            let _ = writeln!(text, "{name}: {value}");
        };
        if !compression.is_empty() {
            line("Compression", &compression);
        }
        if let Some(hash) = &self.file_hash {
            line("FileHash", hash);
        }
        if let Some(size) = self.file_size {
            line("FileSize", &size);
        }
        line("NarHash", &self.nar_hash);
        line("NarSize", &self.nar_size);
        let bases: Vec<&str> = self.references.iter().map(StorePath::base).collect();
        line("References", &bases.join(" "));
        if let Some(deriver) = &self.deriver {
            line("Deriver", deriver);
        }
        for signature in &self.signatures {
            line("Sig", signature);
        }
        if let Some(ca) = &self.ca {
            line("CA", ca);
        }
        text
    }

    /// What is signed: Nix's form, `1;PATH;NARHASH;NARSIZE;REFERENCES`.
    pub fn fingerprint(&self) -> String {
        let references: Vec<&str> = self.references.iter().map(StorePath::as_str).collect();
        format!("1;{};{};{};{}", self.path, self.nar_hash, self.nar_size, references.join(","))
    }

    /// Whether one of the keys has signed this. Names alone prove nothing: every signature is verified.
    pub fn verified_by(&self, keys: &[PublicKey]) -> bool {
        self.verified(keys).next().is_some()
    }

    /// The signatures that one of the keys has made.
    fn verified(&self, keys: &[PublicKey]) -> impl Iterator<Item = &String> {
        let fingerprint = self.fingerprint();
        let by = move |signature: &str| keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature));
        self.signatures.iter().filter(move |signature| by(signature))
    }

    /// What of this may go to Nix: what is vouched for, and where the file is. Nix believes, and stumbles over, what
    /// nobody signs: a content address, a deriver, a signature that is none. Without keys, Nix judges the signatures.
    pub fn vouched(mut self, keys: &[PublicKey]) -> Self {
        self.signatures = if keys.is_empty() {
            self.signatures.into_iter().filter(|signature| is_signature(signature)).collect()
        } else {
            self.verified(keys).cloned().collect()
        };
        self.deriver = None;
        self.ca = self.own_warrant().and(self.ca);
        self
    }

    /// A field that no signature covers and that is nothing for a host's Nix, if there is one. A content address is that
    /// too unless it is what the path is named after.
    pub fn planted(&self) -> Option<&'static str> {
        let clean = self.clone().without_planted();
        let kept = [
            ("CA", self.ca == clean.ca),
            ("Deriver", self.deriver == clean.deriver),
            ("Sig", self.signatures == clean.signatures),
        ];
        kept.into_iter().find_map(|(field, kept)| (!kept).then_some(field))
    }

    /// The same without what [`Self::planted`] names.
    pub fn without_planted(mut self) -> Self {
        self.ca = self.own_warrant().and(self.ca);
        self.deriver = self.deriver.filter(|deriver| deriver.ends_with(".drv"));
        self.signatures.retain(|signature| is_signature(signature));
        self
    }

    /// Who vouches for it; None: nobody whom we trust.
    pub fn warrant(&self, keys: &[PublicKey]) -> Option<Warrant> {
        self.own_warrant().or_else(|| self.verified_by(keys).then_some(Warrant::Signature))
    }

    /// The warrant of its own name, if it was made from the content by the rules of Nix: `fixed:r:sha256:…` (a NAR),
    /// `fixed:sha256:…` (a file) and `text:sha256:…`. A path that refers to itself is left out, since what is hashed
    /// then is not the NAR: such a one needs a signature, as does one of another algorithm.
    fn own_warrant(&self) -> Option<Warrant> {
        let ca = self.ca.as_deref()?;
        if self.references.contains(&self.path) {
            return None;
        }
        let (kind, warrant, hash): (String, _, _) = if let Some(hash) = ca.strip_prefix("fixed:r:") {
            let hash = Sha256::parse(hash).ok().filter(|hash| *hash == self.nar_hash)?;
            (self.kind("source"), Warrant::Nar, hash)
        } else if let Some(hash) = ca.strip_prefix("fixed:") {
            let hash = Sha256::parse(hash).ok().filter(|_| self.references.is_empty())?;
            let within = Sha256::of(format!("fixed:out:sha256:{}:", hash.base16()).as_bytes());
            ("output:out".into(), Warrant::File(hash), within)
        } else {
            let hash = Sha256::parse(ca.strip_prefix("text:")?).ok()?;
            (self.kind("text"), Warrant::File(hash), hash)
        };
        let name = &self.path.base()[self.path.hash().len() + 1..];
        let made = Sha256::of(format!("{kind}:sha256:{}:{STORE_DIR}:{name}", hash.base16()).as_bytes());
        (made.of_store_path() == self.path.hash()).then_some(warrant)
    }

    fn kind(&self, kind: &str) -> String {
        self.references.iter().fold(kind.to_string(), |kind, reference| format!("{kind}:{reference}"))
    }

    /// What keeps this from being what the local store says, if anything: the signed fields are compared.
    pub fn differs_from(&self, local: &NarInfo) -> Option<&'static str> {
        let signed = [
            ("StorePath", self.path == local.path),
            ("NarHash", self.nar_hash == local.nar_hash),
            ("NarSize", self.nar_size == local.nar_size),
            ("References", self.references == local.references),
        ];
        signed.into_iter().find_map(|(field, same)| (!same).then_some(field))
    }
}

/// The fields as they stand there.
#[derive(Default)]
struct NarInfoFields<'a> {
    /// Those of [`FIELDS`] that are there.
    single: BTreeMap<&'a str, &'a str>,
    signatures: Vec<&'a str>,
}

/// What is read beside the signatures.
const FIELDS: [&str; 10] = [
    "StorePath",
    "URL",
    "Compression",
    "FileHash",
    "FileSize",
    "NarHash",
    "NarSize",
    "References",
    "Deriver",
    "CA",
];

impl<'a> NarInfoFields<'a> {
    fn take(&mut self, line: &'a str) -> Result<(), String> {
        let (name, value) = line
            .split_once(": ")
            .or_else(|| Some((line.strip_suffix(':')?, "")))
            .ok_or_else(|| format!("has the line {}, which is not of the form 'Name: value'", shown(line)))?;
        if let Some(c) = value.chars().find(|c| !(' '..='~').contains(c)) {
            return Err(format!("has {c:?} in {}", shown(name)));
        }
        if value.len() > MAX_VALUE && name != "References" {
            return Err(format!(
                "has {} characters in {}, at most {MAX_VALUE} are possible",
                value.len(),
                shown(name)
            ));
        }
        if name == "Sig" {
            if self.signatures.len() == MAX_SIGNATURES {
                return Err(format!("has more than {MAX_SIGNATURES} signatures"));
            }
            self.signatures.push(value);
        } else if FIELDS.contains(&name) && self.single.insert(name, value).is_some() {
            // Whoever reads the first and whoever reads the last would read two narinfos.
            return Err(format!("has {name} twice"));
        }
        Ok(())
    }

    fn get(&self, name: &str) -> Option<&'a str> {
        self.single.get(name).copied()
    }

    fn required(&self, name: &str) -> Result<&'a str, String> {
        self.get(name).ok_or_else(|| format!("has no {name}"))
    }
}

fn number(text: &str, name: &str) -> Result<u64, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| format!("has the {name} {}", shown(text)))
}

fn reference(base: &str, field: &str) -> Result<StorePath, String> {
    let part = if field == "References" { "reference" } else { field };
    StorePath::parse(&format!("{STORE_DIR}/{base}"))
        .map_err(|why| format!("has the {part} {}, which {why}", shown(base)))
}

fn references(text: &str) -> Result<BTreeSet<StorePath>, String> {
    let mut references = BTreeSet::new();
    for base in text.split(' ').filter(|base| !base.is_empty()) {
        if references.len() == MAX_REFERENCES {
            return Err(format!("has more than {MAX_REFERENCES} references"));
        }
        references.insert(reference(base, "References")?);
    }
    Ok(references)
}

/// The paths below some others, each after all that it refers to. `references` says what one refers to: None leaves it
/// out, with what is below it; its first error is the answer.
pub fn references_first<'a, E>(
    tops: impl IntoIterator<Item = &'a StorePath>,
    references: impl Fn(&'a StorePath) -> Result<Option<&'a BTreeSet<StorePath>>, E>,
) -> Result<Vec<&'a StorePath>, E> {
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    for top in tops {
        // Depth first, without recursion: a closure can be deeper than a thread's stack. With each path, whether what it
        // refers to was put before it.
        let mut open = vec![(top, false)];
        while let Some((path, ready)) = open.pop() {
            if ready {
                order.push(path);
            } else if seen.insert(path)
                && let Some(below) = references(path)?
            {
                open.push((path, true));
                open.extend(below.iter().filter(|r| !seen.contains(r)).map(|r| (r, false)));
            }
        }
    }
    Ok(order)
}

/// Whether a URL is the key of a file below `nar/`, and nothing that leads anywhere else: not to another host, not
/// upwards, not to a query.
pub fn is_nar_key(url: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"+-._".contains(&b);
    url.len() <= 512
        && url.strip_prefix("nar/").is_some_and(|name| {
            name.split('/').all(|part| !part.is_empty() && !part.starts_with('.') && part.bytes().all(plain))
        })
}

/// A text of the cache's for a message: escaped, and not longer than it helps.
fn shown(text: &str) -> String {
    let mut start: String = text.chars().take(120).collect();
    if start.len() < text.len() {
        start.push('…');
    }
    format!("{start:?}")
}

#[cfg(test)]
mod tests {
    use super::super::local::tests::sign;
    use super::*;
    use crate::keys::SecretKey;

    /// Written by Nix 2.8.
    const INFO: &str = "StorePath: /nix/store/3037rf1n52a6y74sx0qhg518wsyfsmny-b\n\
        URL: nar/05xj9al5a0xy58n93097hk5kg3gqrip8a9a1qapwzh46hvl9qh62.nar.zst\n\
        Compression: zstd\nFileHash: sha256:05xj9al5a0xy58n93097hk5kg3gqrip8a9a1qapwzh46hvl9qh62\n\
        FileSize: 124\nNarHash: sha256:156pfjrmv54vh5n3610byyx75nmv4dl63ylrs0mg36ysflwrgc4q\nNarSize: 160\n\
        References: 3037rf1n52a6y74sx0qhg518wsyfsmny-b wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a\n\
        Deriver: 0zix1dpqqm54fl3j4qz1j7yfb2y6fwj7-b.drv\nSig: one-1:AAAA==\nSig: two-1:BBBB==\n";

    fn path(base: &str) -> StorePath {
        StorePath::parse(&format!("{STORE_DIR}/{base}")).unwrap()
    }

    fn parse(text: &str) -> Result<NarInfo, String> {
        NarInfo::parse(text.as_bytes())
    }

    #[test]
    fn a_narinfo_as_nix_writes_it_is_read_and_written_the_same() {
        let info = parse(INFO).unwrap();
        assert_eq!(info.path, path("3037rf1n52a6y74sx0qhg518wsyfsmny-b"));
        assert_eq!(info.references.len(), 2);
        assert_eq!((info.file_size, info.nar_size, info.compression), (Some(124), 160, Compression::Zstd));
        assert_eq!(info.signatures, ["one-1:AAAA==", "two-1:BBBB=="]);
        assert_eq!(info.render(), INFO);
        let none = INFO.replace("3037rf1n52a6y74sx0qhg518wsyfsmny-b wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a", "");
        let info = parse(&none).unwrap();
        assert!(info.references.is_empty());
        assert_eq!(parse(&info.render()), Ok(info));
        let unknown = parse(&format!("{INFO}System: x86_64-linux\n")).unwrap();
        assert_eq!(unknown.render(), INFO);
    }

    #[test]
    fn a_narinfo_that_leads_elsewhere_or_says_two_things_is_refused() {
        for (from, to) in [
            ("URL: nar/", "URL: ../nar/"),
            ("URL: nar/", "URL: nar/../"),
            ("URL: nar/", "URL: nar//"),
            ("URL: nar/", "URL: /nar/"),
            ("URL: nar/", "URL: http://127.0.0.1:7777/latest/meta-data/"),
            ("URL: nar/", "URL: nar/x?y="),
            ("URL: nar/", "URL: nar/x#"),
            ("URL: nar/", "URL: nar/%2e%2e/"),
            ("URL: nar/", "URL: nar/.hidden/"),
            ("StorePath: /nix/store/", "StorePath: /gnu/store/"),
            ("wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a", "../../etc/passwd"),
            ("FileSize: 124", "FileSize: x"),
            ("NarSize: 160", "NarSize: +160"),
            ("NarSize: 160", "NarSize: 99999999999999999999"),
            ("NarSize: 160\n", ""),
            ("NarSize: 160", "NarSize: 160\nNarSize: 161"),
            ("NarHash: sha256:", "NarHash: md5:"),
            ("References:", "Referenzen:"),
            ("Compression: zstd", "garbage"),
            ("Compression: zstd", "Compression: zstd\r"),
            ("Deriver: ", "Deriver: ../"),
            ("Sig: one-1:", "Sig: \u{1b}[2J"),
        ] {
            assert!(INFO.contains(from), "{from}");
            assert!(parse(&INFO.replace(from, to)).is_err(), "{to:?} passed");
        }
        assert!(parse("").is_err());
    }

    #[test]
    fn what_costs_more_than_a_narinfo_may_is_refused() {
        let many = |count: usize| {
            let bases: Vec<String> = (0..count).map(|n| format!("{n:032}-a")).collect();
            INFO.replace("References: ", &format!("References: {} ", bases.join(" ")))
        };
        assert!(parse(&many(MAX_REFERENCES - 2)).is_ok());
        assert!(parse(&many(MAX_REFERENCES - 1)).unwrap_err().contains("references"));
        assert!(parse(&many(200_000)).unwrap_err().contains("bytes"));
        let signatures = format!("{INFO}{}", "Sig: a:b\n".repeat(MAX_SIGNATURES - 1));
        assert!(parse(&signatures).unwrap_err().contains("signatures"));
        assert!(parse(&format!("{INFO}CA: {}\n", "x".repeat(MAX_VALUE + 1))).is_err());
        let long =
            parse(&INFO.replace("StorePath: ", &format!("StorePath: {}", "x".repeat(4000)))).unwrap_err();
        assert!(long.len() < 400, "{long}");
    }

    #[test]
    fn a_signature_counts_if_it_verifies_whatever_its_name() {
        let key = SecretKey::generate("here-1").unwrap();
        let keys = [key.public()];
        let mut info = parse(INFO).unwrap();
        assert_eq!(info.warrant(&keys), None);
        sign(&mut info, &key);
        assert_eq!(info.signatures.len(), 3);
        assert_eq!(info.warrant(&keys), Some(Warrant::Signature));
        assert_eq!(info.warrant(&[SecretKey::generate("here-1").unwrap().public()]), None);
        // What is not signed may differ; what is signed may not.
        let mut other = info.clone();
        (other.url, other.file_size) = ("nar/other.nar".into(), Some(1));
        assert!(other.verified_by(&keys) && other.differs_from(&info).is_none());
        let changes: [fn(&mut NarInfo); 4] = [
            |info| info.path = path("wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a"),
            |info| info.nar_hash = Sha256::of(b"other"),
            |info| info.nar_size += 1,
            |info| info.references.clear(),
        ];
        for change in changes {
            let mut other = info.clone();
            change(&mut other);
            assert!(!other.verified_by(&keys) && other.differs_from(&info).is_some());
        }
    }

    /// Made and signed by Nix 2.8: a tree and a file as `nix-store --add` and `--add-fixed` add them, and a text with a
    /// reference as `builtins.toFile` writes it.
    const TREE: &str = "StorePath: /nix/store/8aihjbwjmzhb13h0j927ib65y26axbvy-tree\n\
        URL: nar/0vvpqikqcsdsqy4213xigwp664iis3w1lb6al7gakrb78m06n6vc.nar.zst\nCompression: zstd\n\
        NarHash: sha256:1f1layi40aar7sfj6mbwpp9r02pp8i0zzcv9nxb15zhkdag66bv4\nNarSize: 288\nReferences: \n\
        Sig: real-1:rb/DvMJVp7Pjl4wbZHg18FgDPLo8Pyi3CWwpe2yhzXa9fv2i6c9q/PD5WTvdfUIEwYn8BeXJilBXxl1LAtGDDg==\n\
        CA: fixed:r:sha256:1f1layi40aar7sfj6mbwpp9r02pp8i0zzcv9nxb15zhkdag66bv4\n";
    const FILE: &str = "StorePath: /nix/store/1vap48aqggkk52ijn2prxzxv7cnzvs0w-file\n\
        URL: nar/0qa62dhmhx2947b66ndaalppnzplds7c3ybf8n3a82xicrwvs8cs.nar.zst\nCompression: zstd\n\
        NarHash: sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw\nNarSize: 120\nReferences: \n\
        CA: fixed:sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq\n";
    const TEXT: &str = "StorePath: /nix/store/1hbx52z4bkavkgx29qdyaf4d0fs8qmcj-refs\n\
        URL: nar/17pwx9d0zikyws5jma79w5z9h2a03cavq4fw5l7kdiz6ah2zbkcc.nar.zst\nCompression: zstd\n\
        NarHash: sha256:19m4cnqk8xk51n1906312acip21b7yjq92awxinlcqagdh84zy5k\nNarSize: 168\n\
        References: lfngsssysp6h1v4ccqg23c52s9sjl779-x\n\
        Sig: real-1:PO7aXB+MfptMAu2okYBFetKkmQ2fsAET+MHFtHhLVZIhK2T4ahTHsJT3xt3CkWvITO8w7HagAJ38uSdRDIhSAw==\n\
        CA: text:sha256:0i927d1smmd0p2xi64zmjh8d34r0inqgwmivg53vxxzwwyxy6r7y\n";
    const REAL: &str = "real-1:6WOj7kBfq5PioPR20nHEyJshOnF5L1pL4rb7et3iZ2g=";

    #[test]
    fn signatures_of_nix_verify() {
        let keys = [PublicKey::parse(REAL).unwrap()];
        for text in [TREE, TEXT] {
            let info = parse(text).unwrap();
            assert!(info.verified_by(&keys), "{}", info.fingerprint());
            assert!(!parse(&text.replace("NarSize: ", "NarSize: 1")).unwrap().verified_by(&keys));
        }
    }

    #[test]
    fn what_nobody_vouches_for_does_not_go_to_nix() {
        let keys = [PublicKey::parse(REAL).unwrap()];
        let tree = parse(TREE).unwrap();
        // Its own content address and the signature that verifies are all that is left.
        let mut other = tree.clone();
        other.deriver = Some("0zix1dpqqm54fl3j4qz1j7yfb2y6fwj7-b.drv".into());
        let stranger = SecretKey::generate("real-1").unwrap();
        sign(&mut other, &stranger);
        other.signatures.push("nocolon".into());
        assert_eq!((other.planted(), other.clone().vouched(&keys)), (Some("Sig"), tree.clone()));
        // Where Nix judges the signatures, it gets all that are some.
        assert_eq!(other.clone().vouched(&[]).signatures, other.signatures[..2]);
        assert_eq!(other.without_planted().signatures.len(), 2);
        for ca in ["garbage", "fixed:r:sha1:0000000000000000000000000000000000000000", "text:sha256:"] {
            let mut other = tree.clone();
            other.ca = Some(ca.into());
            assert_eq!(other.planted(), Some("CA"), "{ca}");
            let vouched = other.clone().vouched(&keys);
            assert_eq!((&vouched.ca, &vouched.signatures), (&None, &tree.signatures), "{ca}");
            assert_eq!(other.without_planted().planted(), None, "{ca}");
        }
        assert_eq!(tree.planted(), None);
    }

    #[test]
    fn a_path_named_after_its_content_vouches_for_itself_and_for_nothing_else() {
        let (tree, file, text) = (parse(TREE).unwrap(), parse(FILE).unwrap(), parse(TEXT).unwrap());
        assert_eq!(tree.warrant(&[]), Some(Warrant::Nar));
        assert_eq!(file.warrant(&[]), Some(Warrant::File(Sha256::of(b"hello\n"))));
        assert_eq!(
            text.warrant(&[]),
            Some(Warrant::File(Sha256::of(b"see /nix/store/lfngsssysp6h1v4ccqg23c52s9sjl779-x")))
        );
        let changes: [fn(&mut NarInfo); 6] = [
            |info| info.path = path(&info.path.base().replace('-', "-z")),
            |info| info.ca = None,
            |info| {
                info.ca = info
                    .ca
                    .take()
                    .map(|ca| ca.replace("sha256:0", "sha256:1").replace("sha256:1f", "sha256:0f"))
            },
            |info| info.references.extend([path("wiklbi1mvf7va1azpbpfpy6bsfpffg2z-a")]),
            |info| info.references.extend([info.path.clone()]),
            |info| info.ca = info.ca.take().map(|ca| ca.replace("sha256", "sha1")),
        ];
        for info in [&tree, &file, &text] {
            for (n, change) in changes.iter().enumerate() {
                let mut other = info.clone();
                change(&mut other);
                assert_eq!(other.warrant(&[]), None, "change {n} of {}", info.path);
            }
        }
        // Of a tree the NAR's hash is what the name was made from; of a file it follows from the content.
        let mut other = tree.clone();
        other.nar_hash = Sha256::of(b"other");
        assert_eq!(other.warrant(&[]), None);
    }

    #[test]
    fn references_come_before_what_refers_to_them() {
        use super::super::local::tests::{info, path};
        let [a, b, c, d] = ['1', '2', '3', '4'].map(|digit| path(digit, "x"));
        let closure = BTreeMap::from([
            (a.clone(), info(&a, &[&a, &d, &c])),
            (b.clone(), info(&b, &[&a])),
            (c.clone(), info(&c, &[&d])),
            (d.clone(), info(&d, &[])),
        ]);
        let order = references_first(closure.keys(), |path| {
            Ok::<_, ()>(closure.get(path).map(|info| &info.references))
        });
        assert_eq!(order.unwrap(), [&d, &c, &a, &b]);
    }
}
