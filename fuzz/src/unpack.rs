//! Files of NARs: what comes out is what was packed, or an error; no bytes stop the program, or make it write more than
//! was promised.

use crate::entries::Choices;
use omni_deploy::hash::Sha256;
use omni_deploy::nix::narinfo::Compression;
use omni_deploy::nix::unpack::{Expected, plain_file, unpack};

/// The most bytes that the unpacked may have here.
const SIZE: usize = 1 << 20;

/// How a file of xz begins, as far as the headers are held against their checksums: the stream's, with CRC64, and that of a
/// block with a dictionary of 8 MiB.
const XZ_HEAD: [u8; 24] = *b"\xfd7zXZ\0\0\x04\xe6\xd6\xb4\x46\x02\0\x21\x01\x16\0\0\0\x74\x2f\xe5\xa3";

/// The first byte says what the others are: a zstd or xz file as it is, a NAR, or content to pack.
pub fn check(data: &[u8]) {
    let mut choices = Choices::new(data);
    match choices.byte() {
        0..0x60 => anything(choices.rest()),
        0x60..0x80 => drop(plain_file(choices.rest())),
        _ => packed(&mut choices),
    }
}

fn anything(bytes: &[u8]) {
    for head in [&[][..], &[0x28, 0xb5, 0x2f, 0xfd]] {
        let file = [head, bytes].concat();
        let mut nar = Vec::new();
        let expected = Expected { size: SIZE as u64, hash: Sha256::of(b"") };
        let unpacked = unpack(&file[..], Compression::Zstd, expected, &mut nar);
        assert!(unpacked.is_err(), "a megabyte of the empty hash");
        assert!(nar.len() <= SIZE);
    }
    for head in [&[][..], &XZ_HEAD] {
        let file = [head, bytes].concat();
        let mut nar = Vec::new();
        let expected = Expected { size: SIZE as u64, hash: Sha256::of(b"") };
        let unpacked = unpack(&file[..], Compression::Xz, expected, &mut nar);
        assert!(unpacked.is_err(), "a megabyte of the empty hash");
        assert!(nar.len() <= SIZE);
    }
    let mut nar = Vec::new();
    let expected = Expected { size: bytes.len() as u64, hash: Sha256::of(bytes) };
    unpack(bytes, Compression::None, expected, &mut nar).expect("it is what it is");
    assert_eq!(nar, bytes);
}

/// Frames of raw and of repeated bytes, and skippable ones, put together here.
fn packed(choices: &mut Choices<'_>) {
    let (mut file, mut content) = (Vec::new(), Vec::new());
    let mut frames = 0;
    for _ in 0..1 + choices.below(4) {
        if choices.rarely(3) {
            let skipped = choices.take(40);
            file.extend((0x184D_2A50u32 + u32::from(choices.byte() % 16)).to_le_bytes());
            file.extend((skipped.len() as u32).to_le_bytes());
            file.extend(skipped);
            continue;
        }
        frames += 1;
        // A window of 128 KiB, no checksum, no size.
        file.extend([0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38]);
        let blocks = 1 + choices.below(4);
        for block in 0..blocks {
            let last = u32::from(block + 1 == blocks);
            if choices.rarely(2) {
                let count = (u32::from(choices.byte()) << 8 | 1) % (64 << 10);
                let byte = choices.byte();
                file.extend(&(last | 1 << 1 | count << 3).to_le_bytes()[..3]);
                file.push(byte);
                content.resize(content.len() + count as usize, byte);
            } else {
                let raw = choices.take(60);
                file.extend(&(last | (raw.len() as u32) << 3).to_le_bytes()[..3]);
                file.extend(raw);
                content.extend(raw);
            }
        }
    }
    let expected = Expected { size: content.len() as u64, hash: Sha256::of(&content) };
    let mut nar = Vec::new();
    let unpacked = unpack(&file[..], Compression::Zstd, expected, &mut nar);
    assert_eq!(unpacked.is_ok(), frames > 0, "{unpacked:?}");
    if frames > 0 {
        assert_eq!(nar, content);
    }
    // Another size is another NAR.
    let other = Expected { size: expected.size + 1, ..expected };
    assert!(unpack(&file[..], Compression::Zstd, other, &mut Vec::new()).is_err());
    if let Some(less) = expected.size.checked_sub(1) {
        let mut nar = Vec::new();
        assert!(unpack(&file[..], Compression::Zstd, Expected { size: less, ..expected }, &mut nar).is_err());
        assert!(nar.len() as u64 <= less);
    }
    // Cut anywhere, it is still never another.
    let cut = usize::from(choices.byte()) % file.len().max(1);
    let mut nar = Vec::new();
    if unpack(&file[..cut], Compression::Zstd, expected, &mut nar).is_ok() {
        assert_eq!(nar, content, "{cut} of {}", file.len());
    }
}
