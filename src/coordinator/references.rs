//! When newer files may stand beside an older dump (D7a).
//!
//! CRIU opens the files of a process again by their paths, and looks at no more than size and mode. So
//! newer files may join the image of dump P only if none of them is one that P's processes stand upon,
//! and if none of the directories above those has gone, or hides what was there.

use std::{
    collections::BTreeMap,
    ops::Bound,
    path::{Path, PathBuf},
};

use crate::{
    inspector::process,
    rootfs::layer::{Attributes, Change, What},
    store::{Checkpoint, Reference},
};

/// The paths that the processes of a dump refer to.
#[derive(Debug, Default)]
pub(super) struct References {
    /// Relative to the root; of directories with type and permission bits.
    paths: BTreeMap<PathBuf, Option<u32>>,
    /// With their entries in the writable layer, once anybody wanted to know.
    recorded: Option<Vec<Reference>>,
}

impl References {
    /// Of the processes `pids`, which stand still.
    pub(super) fn of(pids: &[i32]) -> Result<Self, String> {
        let paths = process::references(pids).map_err(|e| e.to_string())?;
        Ok(Self {
            paths,
            recorded: None,
        })
    }

    /// All of them, for the manifest of the dump itself.
    pub(super) fn named(&self) -> Vec<Reference> {
        let named = |path: &PathBuf| Reference {
            path: path.clone(),
            entry: None,
        };
        self.paths.keys().map(named).collect()
    }

    /// With their entries in the writable layer of a checkpoint in which they are what they were at the
    /// dump. Those of directories are not told: they change with every name in them.
    pub(super) fn recorded(&mut self, checkpoint: &Checkpoint) -> Result<Vec<Reference>, String> {
        if let Some(recorded) = &self.recorded {
            return Ok(recorded.clone());
        }
        let mut tree = checkpoint.tree().map_err(|e| e.to_string())?;
        let mut recorded = self.named();
        if let Some(tree) = &mut tree {
            for reference in &mut recorded {
                let entry = tree.lookup(&reference.path).map_err(|e| e.to_string())?;
                let entry = entry.filter(|entry| entry.dir().is_none());
                reference.entry = entry.map(|entry| entry.digest());
            }
        }
        self.recorded = Some(recorded.clone());
        Ok(recorded)
    }

    /// The first of these changes that touches one, and that one. `linked`: names that merely became
    /// links of others, or are none any more.
    pub(super) fn touched<'a>(
        &'a self,
        changes: &'a [Change],
        mut linked: impl Iterator<Item = &'a Path>,
    ) -> Option<(&'a Path, &'a Path)> {
        let changed = changes.iter().find_map(|change| {
            let path = match change.path == Path::new(".") {
                true => Path::new(""),
                false => &change.path,
            };
            Some((path, self.touched_by(path, change)?))
        });
        changed.or_else(|| {
            let path = linked.find(|path| self.paths.contains_key(*path))?;
            Some((path, path))
        })
    }

    /// What is at this path, or, if `below`, under it.
    pub(super) fn at(&self, path: &Path, below: bool) -> Option<&Path> {
        let from = (Bound::Included(path), Bound::Unbounded);
        let (found, _) = self.paths.range::<Path, _>(from).next()?;
        let touched = found == path || below && found.starts_with(path);
        touched.then_some(found.as_path())
    }

    fn touched_by(&self, path: &Path, change: &Change) -> Option<&Path> {
        if let Some((known, mode)) = self.paths.get_key_value(path)
            && !is_copied_up(change, *mode)
        {
            return Some(known);
        }
        let after = (Bound::Excluded(path), Bound::Unbounded);
        let (below, _) = self.paths.range::<Path, _>(after).next()?;
        (below.starts_with(path) && moves_what_is_below(change)).then_some(below)
    }
}

/// Whether a directory has merely come into the writable layer, with the attributes that it had: its
/// lower one shows through as before. The first name that is made in a working directory does that.
fn is_copied_up(change: &Change, mode: Option<u32>) -> bool {
    let now = change.now.filter(|now| now.is_dir() && !now.hides);
    change.what == What::Added && now.is_some_and(|now| Some(now.mode) == mode)
}

/// Whether a change of a directory can make other files appear below it.
fn moves_what_is_below(change: &Change) -> bool {
    let hides = change.now.is_none_or(|now| !now.is_dir() || now.hides);
    match change.what {
        What::Added => hides,
        // Opaque or redirected it may have been, or be now.
        What::Attributes(which) => hides || which.contains(Attributes::XATTRS),
        What::Removed | What::Kind | What::Content | What::Links => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::layer::Now;

    const DIR: u32 = libc::S_IFDIR | 0o755;
    const FILE: u32 = libc::S_IFREG | 0o644;
    const WHITEOUT: u32 = libc::S_IFCHR;

    fn references() -> References {
        let all = [
            ("", Some(DIR)),
            ("usr/bin/python3", None),
            ("usr/lib/libc.so", None),
            ("work", Some(DIR)),
            ("work/data/log", None),
        ];
        let paths = all.map(|(path, mode)| (PathBuf::from(path), mode));
        References {
            paths: paths.into_iter().collect(),
            recorded: None,
        }
    }

    fn change(path: &str, what: What, mode: u32, hides: bool) -> Change {
        Change {
            path: path.into(),
            what,
            now: (what != What::Removed).then_some(Now {
                mode,
                size: 0,
                hides,
            }),
        }
    }

    #[test]
    fn what_touches_a_reference_and_what_does_not() {
        let mode = What::Attributes(Attributes::MODE);
        let xattrs = What::Attributes(Attributes::XATTRS);
        let table = [
            // The file itself, in whatever way.
            ("usr/bin/python3", What::Added, FILE, false, true),
            ("usr/bin/python3", What::Added, WHITEOUT, false, true),
            ("usr/bin/python3", What::Content, FILE, false, true),
            ("usr/bin/python3", What::Links, FILE, false, true),
            ("usr/bin/python3", mode, FILE, false, true),
            ("usr/bin/python3", What::Removed, 0, false, true),
            ("work/data/log", What::Kind, DIR, false, true),
            // One that is beside it, or has a name that begins so.
            ("usr/bin/python3.11", What::Added, FILE, false, false),
            ("usr/bin/python", What::Removed, 0, false, false),
            ("work/new", What::Added, FILE, false, false),
            ("work/new", What::Added, DIR, true, false),
            ("work-old", What::Removed, 0, false, false),
            ("zzz", What::Removed, 0, false, false),
            // A directory above one: copied up, or with other attributes.
            ("usr", What::Added, DIR, false, false),
            ("usr/lib", What::Added, DIR, false, false),
            ("usr/lib", mode, DIR, false, false),
            (".", mode, DIR, false, true),
            // Or it shows others, or none.
            ("usr/lib", What::Added, DIR, true, true),
            ("usr", What::Added, WHITEOUT, false, true),
            ("usr/lib", xattrs, DIR, false, true),
            ("usr/lib", xattrs, DIR, true, true),
            ("usr/lib", What::Removed, 0, false, true),
            ("usr", What::Kind, libc::S_IFLNK, false, true),
            // The working directory: copied up, or more than that.
            ("work", What::Added, DIR, false, false),
            ("work", What::Added, DIR | 0o2000, false, true),
            ("work", What::Added, DIR, true, true),
            ("work", What::Removed, 0, false, true),
            ("work", mode, DIR, false, true),
        ];
        let references = references();
        for (path, what, mode, hides, touches) in table {
            let change = change(path, what, mode, hides);
            let touched = references.touched(std::slice::from_ref(&change), std::iter::empty());
            assert_eq!(touched.is_some(), touches, "{change:?}: {touched:?}");
        }
    }

    #[test]
    fn the_change_and_what_it_touches_are_told() {
        let harmless = change("aaa", What::Added, FILE, false);
        let above = change("usr", What::Kind, FILE, false);
        let changes = [harmless, above];
        let references = references();
        let (changed, used) = references.touched(&changes, std::iter::empty()).unwrap();
        assert_eq!(changed, Path::new("usr"));
        assert_eq!(used, Path::new("usr/bin/python3"));
        let other = [Path::new("work/data/other")];
        assert_eq!(references.touched(&changes[..1], other.into_iter()), None);
        let linked = [Path::new("work/data/log")];
        assert!(
            references
                .touched(&changes[..1], linked.into_iter())
                .is_some()
        );
        assert_eq!(references.named().len(), 5);
    }
}
