//! Reads the files of which a pass has one for each service, with few calls of the kernel: what they cost is most of
//! what an idle pass costs. Knows nothing of what is in them.

use fs_err::File;
use std::fs::Metadata;
use std::io::{Read, Result};
use std::path::Path;

/// What a reader of std's wants free before it reads into a buffer of the caller's own.
const SPARE: usize = 64;

/// Reads a file of a disk, up to the size that it had when it was opened, and what it was then: files of ours are never
/// written in place. Not for the kernel's own, whose size is not known.
pub fn read(path: &Path) -> Result<(Vec<u8>, Metadata)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0).saturating_add(SPARE));
    file.take(meta.len()).read_to_end(&mut bytes)?;
    Ok((bytes, meta))
}

/// Reads a text of the kernel's own, to its end.
pub fn read_virtual(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut text = [0; 4096];
    let mut all = Vec::new();
    loop {
        match file.read(&mut text)? {
            0 => return Ok(String::from_utf8_lossy(&all).into_owned()),
            count => all.extend_from_slice(&text[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_whole_whatever_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for size in [0, 1, 31, 32, 64, 4096, 8191, 8192, 100_000] {
            let bytes: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            fs_err::write(&path, &bytes).unwrap();
            let (read, meta) = read(&path).unwrap();
            assert!(read == bytes, "{size}: {}", read.len());
            assert_eq!(meta.len(), size as u64);
        }
        let missing = read(&dir.path().join("none")).unwrap_err();
        assert!(missing.kind() == std::io::ErrorKind::NotFound && missing.to_string().contains("none"));
    }

    #[test]
    fn a_text_of_the_kernels_is_read_to_its_end() {
        // More than one buffer of it, and no size.
        let maps = read_virtual(Path::new("/proc/self/smaps")).unwrap();
        assert!(maps.len() > 4096 && maps.ends_with('\n') && maps.contains("[stack]"), "{maps}");
        assert_eq!(fs_err::metadata("/proc/self/smaps").unwrap().len(), 0);
    }
}
