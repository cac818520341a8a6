//! The folders above a file of secrets: whoever may change one of them may lead root to another file, however well
//! the file itself is kept. Judged by the pass, by `secrets` and by `doctor` alike; nothing is changed here.

use crate::files::if_reached;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Where no such trouble is.
const KEPT: &str = "/var/lib/deployer-secrets";

/// How many links are followed, as the kernel does (path_resolution(7)).
const MOST_LINKS: u32 = 40;

/// Why a folder is no place for secrets: it, or one above it, is not root's, or others may write to it. With the next
/// move. One that is missing is nobody's.
pub fn insecure(folder: &Path) -> Option<String> {
    above(folder, MOST_LINKS)
}

/// From the top, and wherever links lead.
fn above(folder: &Path, links: u32) -> Option<String> {
    let mut folders: Vec<&Path> = folder.ancestors().filter(|f| f.is_absolute()).collect();
    folders.reverse();
    folders.into_iter().find_map(|folder| match if_reached(fs_err::symlink_metadata(folder)) {
        Ok(Some(meta)) if meta.is_symlink() => {
            let leads = fs_err::read_link(folder).ok()?;
            let Some(links) = links.checked_sub(1) else {
                return Some(format!(
                    "{} is a link that leads in a circle; put the folder itself there",
                    folder.display()
                ));
            };
            // The mode of a link says nothing.
            let at = folder.display().to_string();
            judge(&at, meta.uid(), 0).or_else(|| above(&folder.parent()?.join(leads), links))
        }
        Ok(Some(meta)) => judge(&folder.display().to_string(), meta.uid(), meta.mode()),
        Ok(None) => None,
        Err(e) => Some(crate::error::io_text(&e)),
    })
}

/// Pure: why a folder of this owner and mode is none for secrets.
fn judge(at: &str, uid: u32, mode: u32) -> Option<String> {
    let mode = mode & 0o7777;
    // One above that place does not get better by it.
    let elsewhere = match Path::new(KEPT).starts_with(at) {
        true => String::new(),
        false => format!(", or keep the file in {KEPT}"),
    };
    let at = crate::log::printable(at);
    if uid != 0 {
        Some(format!(
            "{at} belongs to user {uid}, who can put another file of secrets there; run: chown root:root {at}{elsewhere}"
        ))
    } else if mode & 0o022 != 0 && mode & 0o1000 != 0 {
        // Its own line to type would take /tmp away from everybody.
        Some(format!("everybody can put files into {at} (mode {mode:04o}); keep the file in {KEPT}"))
    } else if mode & 0o022 != 0 {
        Some(format!(
            "{at} has mode {mode:04o}, others can put another file of secrets there; run: chmod go-w {at}{elsewhere}"
        ))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_may_change_is_named_with_the_next_move() {
        for (uid, mode, word) in [
            (1000, 0o755, "chown root:root /x"),
            (0, 0o775, "chmod go-w /x"),
            (0, 0o757, "chmod go-w /x"),
            (0, 0o1777, "keep the file in /var/lib/deployer-secrets"),
        ] {
            let why = judge("/x", uid, mode).unwrap();
            assert!(why.contains(word) && (mode != 0o1777 || !why.contains("chmod")), "{why}");
        }
        for mode in [0o755, 0o700, 0o2755] {
            assert_eq!(judge("/x", 0, mode), None);
        }
        for above in ["/var/lib", KEPT] {
            assert!(judge(above, 0, 0o775).unwrap().ends_with(&format!("run: chmod go-w {above}")));
        }
    }

    #[test]
    fn a_link_is_followed_to_whose_folder_it_leads() {
        let dir = tempfile::tempdir().unwrap();
        // A temporary folder is everybody's, one way or another.
        assert!(insecure(dir.path()).is_some());
        assert_eq!(insecure(Path::new("/")), None);
        assert_eq!(insecure(Path::new("/no-such-folder-here/x")), None);
    }
}
