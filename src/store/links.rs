//! Inodes with several names, on their way out of a store.

use std::{
    collections::BTreeSet,
    ffi::{CString, OsString},
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode},
    io::Errno,
};

use crate::tree::{self, TreeError, failed, remove_tree};

/// Inodes with several names. Each gets one more, in a directory beside the destination: a path to
/// the first name could be longer than the kernel takes.
pub(super) struct Links {
    path: PathBuf,
    dir: Option<OwnedFd>,
    /// Those that have as many names as their file system allows.
    full: BTreeSet<String>,
}

impl Links {
    pub(super) fn beside(dest: &Path) -> Self {
        let mut name = OsString::from(".crab-links-");
        name.push(dest.file_name().unwrap_or_default());
        Self {
            path: dest.with_file_name(name),
            dir: None,
            full: BTreeSet::new(),
        }
    }

    /// Gives an inode that was made before its further name; false if this is its first.
    pub(super) fn link(
        &mut self,
        link: &str,
        parent: BorrowedFd<'_>,
        name: &CString,
        shown: &Path,
    ) -> Result<bool, TreeError> {
        let Some(dir) = &self.dir else {
            return Ok(false);
        };
        let err = failed("link", shown);
        match rustix::fs::linkat(dir, link, parent, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) if self.full.contains(link) => Err(err(Errno::MLINK)),
            Err(Errno::NOENT) => Ok(false),
            // Ours is one too many.
            Err(Errno::MLINK) => {
                rustix::fs::renameat(dir, link, parent, name).map_err(err)?;
                self.full.insert(link.to_owned());
                Ok(true)
            }
            Err(e) => Err(err(e)),
        }
    }

    pub(super) fn remember(
        &mut self,
        link: &str,
        parent: BorrowedFd<'_>,
        name: &CString,
        shown: &Path,
    ) -> Result<(), TreeError> {
        if self.dir.is_none() {
            remove_tree(&self.path)?;
            rustix::fs::mkdirat(CWD, &self.path, Mode::RWXU).map_err(failed("make", &self.path))?;
            self.dir = Some(tree::open_root(&self.path)?);
        }
        match &self.dir {
            Some(dir) => rustix::fs::linkat(parent, name, dir, link, AtFlags::empty())
                .map_err(failed("link", shown)),
            None => Ok(()),
        }
    }

    pub(super) fn finish(&mut self) -> Result<(), TreeError> {
        match self.dir.take() {
            Some(_) => remove_tree(&self.path),
            None => Ok(()),
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        // Only after an error, of which the caller is told.
        let _ = self.finish();
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::fs::MetadataExt};

    use super::*;

    /// What ext4 allows; other file systems allow more.
    const MANY: u64 = 65_000;

    #[test]
    fn an_inode_may_have_all_the_names_that_its_file_system_allows() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("dest");
        std::fs::create_dir(&dest).unwrap();
        std::fs::write(dest.join("0"), "x").unwrap();
        let root = tree::open_root(&dest).unwrap();
        let mut links = Links::beside(&dest);
        let name = |number: u64| CString::new(number.to_string()).unwrap();
        assert!(!links.link("a", root.as_fd(), &name(0), &dest).unwrap());
        links.remember("a", root.as_fd(), &name(0), &dest).unwrap();
        for number in 1..MANY {
            let linked = links.link("a", root.as_fd(), &name(number), &dest);
            assert!(linked.unwrap(), "{number}");
        }
        // One more is an error where it is one, and never a file of its own.
        let further = links.link("a", root.as_fd(), &name(MANY), &dest);
        assert!(!matches!(further, Ok(false)), "it would be made anew");
        let count = MANY + u64::from(further.is_ok_and(|linked| linked));
        links.finish().unwrap();
        let found = std::fs::metadata(dest.join("0")).unwrap().nlink();
        assert_eq!(found, count);
        assert_eq!(dest.join(MANY.to_string()).exists(), count > MANY);
    }
}
