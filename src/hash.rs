//! SHA-256, in hex and in the other forms that Nix writes: its own base 32 (narinfos, fingerprints, store paths) and SRI.
//! Reads all of them, writes whichever is asked for, and knows no other algorithm: NARs have this one.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{Context, SHA256, digest};
use std::fmt;
use std::io::{self, BufReader, Read, Write};

/// The digits of Nix's base 32; e, o, t and u are left out.
pub const BASE32_DIGITS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

const BYTES: usize = 32;

/// A SHA-256. Displays as narinfos have it: `sha256:` and 52 digits of base 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256([u8; BYTES]);

/// A SHA-256 that is still fed.
pub struct Hasher(Context);

impl Default for Hasher {
    fn default() -> Self {
        Hasher(Context::new(&SHA256))
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Hasher {
    /// The hash of all that was taken in.
    pub fn finish(self) -> Sha256 {
        Sha256::of_digest(self.0.finish().as_ref())
    }
}

impl Sha256 {
    /// The hash of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Sha256::of_digest(digest(&SHA256, bytes).as_ref())
    }

    /// The hash of all that can be read.
    pub fn of_reader(source: &mut impl Read) -> io::Result<Self> {
        let mut hasher = Hasher::default();
        io::copy(&mut BufReader::with_capacity(1 << 16, source), &mut hasher)?;
        Ok(hasher.finish())
    }

    fn of_digest(digest: &[u8]) -> Self {
        let mut bytes = [0; BYTES];
        bytes.copy_from_slice(digest);
        Sha256(bytes)
    }

    /// Reads `sha256:` with base 32, base 16 or base 64 behind it, or SRI's `sha256-` with base 64. The error is the
    /// reason alone.
    pub fn parse(text: &str) -> Result<Self, String> {
        let bytes = match (text.strip_prefix("sha256:"), text.strip_prefix("sha256-")) {
            (Some(digits), _) => match digits.len() {
                52 => of_base32(digits),
                64 => of_base16(digits),
                44 => STANDARD.decode(digits).ok(),
                _ => None,
            },
            (_, Some(digits)) => STANDARD.decode(digits).ok(),
            _ => return Err("is not a SHA-256 (sha256:…)".into()),
        };
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Sha256).ok_or_else(|| "is not a SHA-256 in base 16, 32 or 64".into())
    }

    /// The 52 digits of Nix's base 32.
    pub fn base32(&self) -> String {
        base32(&self.0)
    }

    /// The 64 digits of base 16.
    pub fn base16(&self) -> String {
        hex(&self.0)
    }

    /// Those of its first bytes.
    pub fn short(&self, bytes: usize) -> String {
        hex(&self.0[..bytes])
    }

    /// The 44 characters of base 64.
    pub fn base64(&self) -> String {
        STANDARD.encode(self.0)
    }

    /// The 32 digits that stand in a store path: the hash folded to 160 bits, in base 32.
    pub fn of_store_path(&self) -> String {
        let mut folded = [0u8; 20];
        for (i, byte) in self.0.iter().enumerate() {
            folded[i % 20] ^= byte;
        }
        base32(&folded)
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.base32())
    }
}

/// Two lower-case digits for each byte.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Nix's base 32: five bits a digit, the last bits first.
fn base32(bytes: &[u8]) -> String {
    let digits = (bytes.len() * 8).div_ceil(5);
    let digit = |n: usize| {
        let (byte, bit) = (n * 5 / 8, n * 5 % 8);
        let low = u16::from(bytes[byte]);
        let high = u16::from(bytes.get(byte + 1).copied().unwrap_or(0));
        let value = ((high << 8 | low) >> bit) & 0x1f;
        char::from(BASE32_DIGITS[usize::from(value)])
    };
    (0..digits).rev().map(digit).collect()
}

fn of_base32(text: &str) -> Option<Vec<u8>> {
    let mut bytes = vec![0u8; BYTES];
    for (n, c) in text.bytes().rev().enumerate() {
        let value = BASE32_DIGITS.iter().position(|d| *d == c)? as u16;
        let (byte, bit) = (n * 5 / 8, n * 5 % 8);
        let shifted = value << bit;
        bytes[byte] |= shifted as u8;
        match bytes.get_mut(byte + 1) {
            Some(next) => *next |= (shifted >> 8) as u8,
            // Bits beyond the hash: another text for the same hash, which nobody writes.
            None if shifted >> 8 != 0 => return None,
            None => {}
        }
    }
    Some(bytes)
}

fn of_base16(text: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16).filter(|_| !b.is_ascii_uppercase());
    text.as_bytes().chunks(2).map(|pair| Some((digit(pair[0])? << 4 | digit(*pair.get(1)?)?) as u8)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `nix hash to-base32` and its siblings of Nix 2.8 print for the hash of nothing.
    const EMPTY: [&str; 4] = [
        "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "sha256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
        "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
    ];

    #[test]
    fn all_forms_of_a_hash_are_the_same_hash() {
        let hash = Sha256::of(b"");
        assert!(EMPTY.iter().all(|text| Sha256::parse(text) == Ok(hash)));
        assert_eq!(hash.to_string(), EMPTY[0]);
        assert_eq!(format!("sha256:{}", hash.base16()), EMPTY[1]);
        assert_eq!(format!("sha256-{}", hash.base64()), EMPTY[3]);
    }

    #[test]
    fn what_is_no_sha256_is_refused() {
        let good = EMPTY[0];
        for bad in [
            "",
            "sha256:",
            "sha256-",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            &good[..good.len() - 1],
            &good.replace('0', "e"),
            // Bits that no hash has.
            &format!("sha256:z{}", &good[8..]),
            &EMPTY[1].to_uppercase().replace("SHA256", "sha256"),
            "sha256:äääääääääääääääääääääääääääääääää",
        ] {
            assert!(Sha256::parse(bad).is_err(), "{bad} passed");
        }
    }
}
