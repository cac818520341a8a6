//! Unpacks the file of a NAR and compares it with what was vouched for, before Nix sees a byte of it: it is cut at the
//! size, and its hash is taken on the way. Memory is bounded by the window of what unpacks it, whatever the file says of
//! itself. Knows zstd (what `push` writes), xz (what `nix copy` writes unless it is told otherwise) and no compression at
//! all; `docs/adr/0011-…` says why in Rust.

use super::narinfo::Compression;
use crate::hash::{Hasher, Sha256};
use crate::store::objects::Witnessed;
use lzma_rust2::{XzReader, lzma2_get_memory_usage};
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::io::{self, Read, Write};

/// The largest window that is unpacked, in bytes: what RFC 8878 (section 3.1.1.1.2) asks of every decoder. zstd needs
/// less up to level 19, and Nix's default a quarter.
pub const MAX_WINDOW: u64 = 8 << 20;
/// The largest dictionary of xz that is unpacked, in bytes: that of `xz -9`. Nix's default has an eighth, and memory is
/// taken as it is filled.
pub const MAX_DICTIONARY: u32 = 64 << 20;
const BUFFER: usize = 64 << 10;

/// Why the file was not accepted. The text is a clause after the path's name.
#[derive(Debug)]
pub enum UnpackError {
    /// It is not what was vouched for.
    Altered(String),
    /// It is compressed in a way that is not read here.
    Unknown(String),
    /// This machine could not read or write it.
    Here(io::Error),
}

/// What the NAR must be.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// Its size in bytes.
    pub size: u64,
    /// Its hash.
    pub hash: Sha256,
}

/// Unpacks `packed` into `nar`: exactly what is expected, or an error. What was written before an error is worth
/// nothing.
pub fn unpack(
    packed: impl Read,
    compression: Compression,
    expected: Expected,
    nar: &mut dyn Write,
) -> Result<(), UnpackError> {
    match compression {
        Compression::None => copy(packed, expected, nar),
        Compression::Zstd => copy(Frames::new(packed), expected, nar),
        Compression::Xz => copy(Streams::new(packed), expected, nar),
        Compression::Other => {
            Err(UnpackError::Unknown("is compressed with something else than zstd or xz".to_string()))
        }
    }
}

fn copy(mut from: impl Read, expected: Expected, nar: &mut dyn Write) -> Result<(), UnpackError> {
    let mut buffer = vec![0; BUFFER];
    let mut left = expected.size;
    let mut hasher = Hasher::default();
    loop {
        let count = from.read(&mut buffer).map_err(fault)?;
        if count == 0 {
            break;
        }
        if count as u64 > left {
            return Err(UnpackError::Altered(format!("unpacks to more than its {} bytes", expected.size)));
        }
        left -= count as u64;
        let written = hasher.write_all(&buffer[..count]).and_then(|()| nar.write_all(&buffer[..count]));
        written.map_err(UnpackError::Here)?;
    }
    if left > 0 {
        return Err(UnpackError::Altered(format!(
            "unpacks to {left} bytes fewer than its {}",
            expected.size
        )));
    }
    let hash = hasher.finish();
    if hash != expected.hash {
        return Err(UnpackError::Altered(format!(
            "unpacks to a NAR of the hash {hash} instead of {}",
            expected.hash
        )));
    }
    Ok(())
}

/// What failed while unpacking: the file's own fault, or this machine's.
fn fault(e: io::Error) -> UnpackError {
    match e.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            UnpackError::Altered(format!("does not unpack ({e})"))
        }
        io::ErrorKind::Unsupported => UnpackError::Unknown(e.to_string()),
        _ => UnpackError::Here(e),
    }
}

/// The content of a zstd file: any number of frames one after the other, with skippable ones between, as the format has
/// it (RFC 8878, section 3.1).
struct Frames<R> {
    /// Its own errors are told from those of what it contains.
    source: Witnessed<R>,
    decoder: FrameDecoder,
    open: bool,
    any: bool,
}

impl<R: Read> Frames<R> {
    fn new(inner: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW);
        Frames { source: Witnessed { inner, failed: None }, decoder, open: false, any: false }
    }

    /// Begins the next frame; false at the end of the file.
    fn next(&mut self) -> io::Result<bool> {
        let mut first = [0];
        while self.source.read(&mut first)? == 1 {
            match self.decoder.reset((&first[..]).chain(&mut self.source)) {
                Ok(()) => {
                    (self.open, self.any) = (true, true);
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let skipped = io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                    if skipped < length.into() {
                        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends within a frame"));
                    }
                }
                Err(e) => return Err(self.failure(&e)),
            }
        }
        if !self.any {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty"));
        }
        Ok(false)
    }

    fn failure(&mut self, e: &FrameDecoderError) -> io::Error {
        match (self.source.failed.take(), e) {
            (Some(own), _) => own,
            (None, FrameDecoderError::WindowSizeTooBig { requested, .. }) => io::Error::new(
                io::ErrorKind::Unsupported,
                format!("needs a window of {} MiB, more than {} MiB", requested >> 20, MAX_WINDOW >> 20),
            ),
            (None, FrameDecoderError::DictNotProvided { .. }) => {
                io::Error::new(io::ErrorKind::Unsupported, "needs a dictionary")
            }
            (None, e) => io::Error::new(io::ErrorKind::InvalidData, e.to_string()),
        }
    }
}

impl<R: Read> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.open && self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if !self.open || self.decoder.is_finished() {
                self.open = false;
                if !self.next()? {
                    return Ok(0);
                }
                continue;
            }
            let one = BlockDecodingStrategy::UptoBlocks(1);
            if let Err(e) = self.decoder.decode_blocks(&mut self.source, one) {
                return Err(self.failure(&e));
            }
        }
    }
}

/// The content of an xz file: any number of streams one after the other, with padding between, as the format has it.
struct Streams<R: Read>(XzReader<Witnessed<R>>);

impl<R: Read> Streams<R> {
    fn new(inner: R) -> Self {
        let limit = lzma2_get_memory_usage(MAX_DICTIONARY);
        Streams(XzReader::new_mem_limit(Witnessed { inner, failed: None }, true, limit))
    }
}

impl<R: Read> Read for Streams<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|e| match (self.0.inner_mut().failed.take(), e.kind()) {
            (Some(own), _) => own,
            (None, io::ErrorKind::Interrupted) => e,
            (None, io::ErrorKind::OutOfMemory) => io::Error::new(
                io::ErrorKind::Unsupported,
                format!("needs a dictionary of more than {} MiB", MAX_DICTIONARY >> 20),
            ),
            (None, io::ErrorKind::UnexpectedEof) => {
                io::Error::new(io::ErrorKind::UnexpectedEof, "it ends too early")
            }
            // What it makes of a damaged file has several kinds.
            (None, _) => io::Error::new(io::ErrorKind::InvalidData, e.to_string()),
        })
    }
}

/// The hash of the content, where a NAR holds a plain file and nothing else; None where it holds anything else.
pub fn plain_file(nar: impl Read) -> io::Result<Option<Sha256>> {
    match Words(nar).plain_file() {
        Ok(hash) => Ok(Some(hash)),
        Err(e) if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The short words of a NAR's frame: a length, the bytes, zeros up to a multiple of eight. `InvalidData` is another word.
struct Words<R>(R);

impl<R: Read> Words<R> {
    fn plain_file(&mut self) -> io::Result<Sha256> {
        for word in ["nix-archive-1", "(", "type", "regular"] {
            self.expect(word)?;
        }
        let mut word = self.next()?;
        if word == b"executable" {
            self.expect("")?;
            word = self.next()?;
        }
        if word != b"contents" {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let length = u64::from_le_bytes(self.bytes()?);
        let mut hasher = Hasher::default();
        if io::copy(&mut self.0.by_ref().take(length), &mut hasher)? < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.padding(length)?;
        self.expect(")")?;
        match self.0.read(&mut [0])? {
            0 => Ok(hasher.finish()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn expect(&mut self, word: &str) -> io::Result<()> {
        if self.next()? == word.as_bytes() { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    fn next(&mut self) -> io::Result<Vec<u8>> {
        let length = u64::from_le_bytes(self.bytes()?);
        if length > 16 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut word = vec![0; length as usize];
        self.0.read_exact(&mut word)?;
        self.padding(length)?;
        Ok(word)
    }

    fn padding(&mut self, length: u64) -> io::Result<()> {
        for _ in 0..(8 - length % 8) % 8 {
            if self.bytes::<1>()? != [0] {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::{Engine, engine::general_purpose::STANDARD};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    fn expected(bytes: &[u8]) -> Expected {
        Expected { size: bytes.len() as u64, hash: Sha256::of(bytes) }
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    /// `a NAR of some length` a thousand times, as `xz -6` packs it.
    const NAR_XZ: &str = "/Td6WFoAAATm1rRGAgAhARYAAAB0L+Wj4E4fAFBdADCIBcQSttseSwyT5zPd2ELv4TLsjWBMkMamSsjeq2owsYwY\
        rE0Vf7xQVyC+fJgdJOS7h2RKdaly3DQJ6gtC0YI8gP226uCFrUEQ49NkRL0AAFTaNO0+YTjiAAFsoJwBAABBsBA6scRn+wIAAAAABFla";
    /// 1 MiB of zeros.
    const ZEROS_XZ: &str = "/Td6WFoAAATm1rRGAgAhARYAAAB0L+Wj7///ANldAABv/f//o7f/Rz5IFXI5YVG4kijmo4YH+e7kHoLTL8U6PAFL\
        sX7JiopNL6MN2X+m44wjEVPgWRjFdYrid/i2lH8MasDedElk4ulcU7IE2PdEDKtfDW1G6eXDdoi3llestk3haR1v+0uIEGxCy4g/XACP0E6v\
        JiiUcR89jyThcJ6nI1/sKMuF0ZWYin4qkfIndfcZwAaYTZj92K/VkA/EJVP49ZE2MQWlsO5vwXBNRwzRkRGqrWAdus6xJxhcWYbpZlJYvul2\
        rFnk5VsFCPnH2q38+1Iq9+SVJQAAAAAAwva6PqJwa2AAAfUBgIBAAHmXf0exxGf7AgAAAAAEWVo=";
    /// `hello`, with a dictionary of 64 MiB and of 128 MiB.
    const DICTIONARY_64_XZ: &str =
        "/Td6WFoAAATm1rRGAgAhARwAAAAQz1jMAQAEaGVsbG8AAAAAsTe52+XaHpsAAR0FuC2Arx+2830BAAAAAARZWg==";
    const DICTIONARY_128_XZ: &str =
        "/Td6WFoAAATm1rRGAgAhAR4AAACbB1FmAQAEaGVsbG8AAAAAsTe52+XaHpsAAR0FuC2Arx+2830BAAAAAARZWg==";

    fn xz(base64: &str) -> Vec<u8> {
        STANDARD.decode(base64).unwrap()
    }

    fn unpacked(packed: &[u8], compression: Compression, expected: Expected) -> Result<Vec<u8>, UnpackError> {
        let mut nar = Vec::new();
        unpack(packed, compression, expected, &mut nar).map(|()| nar)
    }

    fn skippable(bytes: &[u8]) -> Vec<u8> {
        [&0x184D_2A53u32.to_le_bytes()[..], &(bytes.len() as u32).to_le_bytes(), bytes].concat()
    }

    #[test]
    fn what_was_packed_comes_out_however_it_was_cut_into_frames() {
        let nar: Vec<u8> = (0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let (first, second) = nar.split_at(500_000);
        for packed in [
            zstd(&nar),
            [zstd(first), zstd(second)].concat(),
            [skippable(b"hello"), zstd(first), skippable(b""), zstd(b""), zstd(second), skippable(&nar)]
                .concat(),
        ] {
            assert_eq!(unpacked(&packed, Compression::Zstd, expected(&nar)).unwrap(), nar);
        }
        assert_eq!(unpacked(&nar, Compression::None, expected(&nar)).unwrap(), nar);
        assert_eq!(unpacked(b"", Compression::None, expected(b"")).unwrap(), b"");
    }

    #[test]
    fn what_is_not_what_was_vouched_for_is_refused_and_cut_at_its_size() {
        let nar = b"a NAR of some length".repeat(1000);
        let altered = |packed: &[u8], compression| match unpacked(packed, compression, expected(&nar)) {
            Err(UnpackError::Altered(why)) => why,
            other => panic!("{other:?}"),
        };
        let mut other = nar.clone();
        other[77] ^= 1;
        assert!(altered(&zstd(&other), Compression::Zstd).contains("hash"));
        assert!(altered(&zstd(&nar[1..]), Compression::Zstd).contains("1 bytes fewer"));
        assert!(altered(&[&nar[..], b"x"].concat(), Compression::None).contains("more than"));
        let packed = zstd(&nar);
        for bad in [&b""[..], b"garbage and more", &packed[..packed.len() / 2], &skippable(b"only")] {
            assert!(altered(bad, Compression::Zstd).contains("does not unpack"));
        }
        let trailing = [&packed[..], b"tail"].concat();
        assert!(altered(&trailing, Compression::Zstd).contains("does not unpack"));
    }

    #[test]
    fn what_nix_copy_packs_with_xz_comes_out_or_is_refused() {
        let nar = b"a NAR of some length".repeat(1000);
        let packed = xz(NAR_XZ);
        assert_eq!(unpacked(&packed, Compression::Xz, expected(&nar)).unwrap(), nar);
        let twice = [&packed[..], &[0; 8], &packed].concat();
        assert_eq!(unpacked(&twice, Compression::Xz, expected(&nar.repeat(2))).unwrap(), nar.repeat(2));
        let hello = unpacked(&xz(DICTIONARY_64_XZ), Compression::Xz, expected(b"hello"));
        assert_eq!(hello.unwrap(), b"hello");

        let altered = |packed: &[u8], nar: &[u8]| match unpacked(packed, Compression::Xz, expected(nar)) {
            Err(UnpackError::Altered(why)) => why,
            other => panic!("{other:?}"),
        };
        let mut other = nar.clone();
        other[77] ^= 1;
        assert!(altered(&packed, &other).contains("hash"));
        assert!(altered(&packed, &nar.repeat(2)).contains("20000 bytes fewer"));
        assert!(altered(&packed, &nar[1..]).contains("more than"));
        for cut in 0..packed.len() {
            assert!(altered(&packed[..cut], &nar).contains("does not unpack"), "{cut}");
        }
        for at in 0..packed.len() {
            let mut struck = packed.clone();
            struck[at] ^= 0x55;
            let refused = unpacked(&struck, Compression::Xz, expected(&nar));
            assert!(
                matches!(refused, Err(UnpackError::Altered(_) | UnpackError::Unknown(_))),
                "{at}: {refused:?}"
            );
        }
        assert!(altered(&[&packed[..], b"tail"].concat(), &nar).contains("does not unpack"));
    }

    /// Counts what it gets.
    struct Counter(u64);

    impl Write for Counter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bomb_is_cut_where_its_size_ends() {
        // 64 MiB of zeros in RLE blocks of 128 KiB: 4 bytes each.
        let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58];
        for n in 0..512u32 {
            let header = u32::from(n == 511) | 1 << 1 | (128 << 10) << 3;
            bomb.extend(&header.to_le_bytes()[..3]);
            bomb.push(0);
        }
        let mut whole = Counter(0);
        let all = Expected { size: 64 << 20, hash: Sha256::of(&vec![0; 64 << 20]) };
        unpack(&bomb[..], Compression::Zstd, all, &mut whole).unwrap();
        let mut counter = Counter(0);
        let small = Expected { size: 300_000, hash: Sha256::of(b"") };
        let cut = unpack(&bomb[..], Compression::Zstd, small, &mut counter);
        assert!(matches!(cut, Err(UnpackError::Altered(why)) if why.contains("300000")));
        assert!(counter.0 <= 300_000);
        let mut counter = Counter(0);
        let cut = unpack(&xz(ZEROS_XZ).repeat(64)[..], Compression::Xz, small, &mut counter);
        assert!(matches!(cut, Err(UnpackError::Altered(why)) if why.contains("300000")));
        assert!(counter.0 <= 300_000);
    }

    #[test]
    fn what_cannot_be_unpacked_here_is_told_from_what_is_damaged() {
        let large_window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x70, 0x01, 0, 0];
        for (packed, compression, word) in [
            (&large_window[..], Compression::Zstd, "window of 16 MiB"),
            (&xz(DICTIONARY_128_XZ), Compression::Xz, "dictionary of more than 64 MiB"),
            (b"", Compression::Other, "zstd"),
        ] {
            let refused = unpacked(packed, compression, expected(b""));
            assert!(matches!(&refused, Err(UnpackError::Unknown(why)) if why.contains(word)), "{refused:?}");
        }
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(5))
            }
        }
        for compression in [Compression::None, Compression::Zstd, Compression::Xz] {
            let refused = unpack(Broken, compression, expected(b""), &mut Vec::new());
            assert!(matches!(refused, Err(UnpackError::Here(_))), "{refused:?}");
        }
    }

    #[test]
    fn of_a_nar_the_plain_file_is_found() {
        let word = |bytes: &[u8]| {
            let mut word = (bytes.len() as u64).to_le_bytes().to_vec();
            word.extend(bytes);
            word.resize(word.len().div_ceil(8) * 8, 0);
            word
        };
        let nar = |words: &[&[u8]]| words.iter().flat_map(|bytes| word(bytes)).collect::<Vec<u8>>();
        let head: [&[u8]; 4] = [b"nix-archive-1", b"(", b"type", b"regular"];
        let plain = nar(&[&head[..], &[b"contents", b"hello\n", b")"]].concat());
        let hash = Some(Sha256::of(b"hello\n"));
        assert_eq!(plain_file(&plain[..]).unwrap(), hash);
        let executable = nar(&[&head[..], &[b"executable", b"", b"contents", b"hello\n", b")"]].concat());
        assert_eq!(plain_file(&executable[..]).unwrap(), hash);
        let folder = nar(&[b"nix-archive-1", b"(", b"type", b"directory", b")"]);
        for bad in [&folder[..], &plain[..plain.len() - 1], &[&plain[..], b"x"].concat(), b""] {
            assert_eq!(plain_file(bad).unwrap(), None);
        }
    }
}
