//! `crab diff`: which names of the writable layer differ between two checkpoints.
//!
//! From the store alone, and only the pages of directories that differ are read: no contents. What the
//! image holds below the layer is not at hand. That a name comes from there is known by overlay's own note
//! on what it has copied up (`trusted.overlay.origin`).

use std::{
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use serde::Serialize;

use super::{
    Scope,
    progress::Progress,
    scope::{sandbox_or_turn, split_at},
    term::{Cell, Colour, name, print_json, table},
    turns::{self, Held},
};
use crate::{
    sandbox::SandboxId,
    store::{Checkpoint, Difference, Node, StoreError, Tree, TreeEntry},
};

/// Overlay's bookkeeping, which is no part of a state (`docs/state.md`, OVERLAY_XATTRS).
const BOOKKEEPING: [&[u8]; 5] = [
    b"trusted.overlay.origin",
    b"trusted.overlay.impure",
    b"trusted.overlay.nlink",
    b"trusted.overlay.uuid",
    b"trusted.overlay.upper",
];

/// Accepts the second of two checkpoints.
pub(super) fn other(word: &str) -> Result<String, String> {
    match split_at(word) {
        ("", Some(which)) if !which.is_empty() => Ok(word.to_owned()),
        _ => sandbox_or_turn(word),
    }
}

pub(super) fn run(scope: &Scope, a: &str, b: &str) -> anyhow::Result<ExitCode> {
    let (word, which) = split_at(a);
    let (before, from) = checkpoint(scope, &scope.find(word)?, which)?;
    let (after, to) = match split_at(b) {
        ("", which) => checkpoint(scope, &from, which)?,
        (word, which) => checkpoint(scope, &scope.find(word)?, which)?,
    };
    let progress = Progress::begin(format!("comparing {from} with {to}"));
    let changes = compare(&before, &after)?;
    drop(progress);
    if scope.json {
        for change in &changes {
            print_json(change)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<_> = changes.iter().map(Change::row).collect();
    table(&rows)?;
    Ok(ExitCode::SUCCESS)
}

fn checkpoint(
    scope: &Scope,
    sandbox: &SandboxId,
    which: Option<&str>,
) -> anyhow::Result<(Checkpoint, SandboxId)> {
    let checkpoints = scope.store()?.sandbox(sandbox);
    let Held { by, .. } = turns::find(&checkpoints, which)?;
    let found = checkpoints.get(by);
    Ok((found.with_context(|| sandbox.to_string())?, sandbox.clone()))
}

/// What happened to a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Did {
    Added,
    Modified,
    /// It is another kind of thing.
    Retyped,
    Deleted,
}

/// One name that differs.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Change {
    change: Did,
    /// What it is, or was.
    kind: &'static str,
    /// From the sandbox's root on.
    #[serde(serialize_with = "path")]
    path: PathBuf,
    /// Whether the path is UTF-8; if not, it is escaped.
    utf8: bool,
    /// Of what was there and is there, what differs. Empty for what is new in the layer.
    what: Vec<&'static str>,
}

fn path<S: serde::Serializer>(path: &Path, s: S) -> Result<S::Ok, S::Error> {
    match path.to_str() {
        Some(text) => s.serialize_str(text),
        None => s.serialize_str(&name(path.as_os_str().as_bytes())),
    }
}

impl Change {
    fn row(&self) -> [Cell; 3] {
        let (letter, colour) = match self.change {
            Did::Added => ("A", Colour::Good),
            Did::Modified => ("M", Colour::Warning),
            Did::Retyped => ("T", Colour::Warning),
            Did::Deleted => ("D", Colour::Bad),
        };
        let mut path = name(self.path.as_os_str().as_bytes());
        let what = self.what.join(", ");
        if !what.is_empty() {
            path += &format!("  ({what})");
        }
        [Cell::new(letter, colour), self.kind.into(), path.into()]
    }
}

/// The names that differ, each directory before what is in it.
pub(super) fn compare(before: &Checkpoint, after: &Checkpoint) -> anyhow::Result<Vec<Change>> {
    let (mut a, mut b) = (tree(before)?, tree(after)?);
    let mut changes = Vec::new();
    for difference in a.diff(&mut b)? {
        let Difference {
            path,
            before,
            after,
        } = difference;
        let known = |entry: &Option<TreeEntry>| entry.as_ref().and_then(TreeEntry::dir);
        let (was_dir, is_dir) = (known(&before), known(&after));
        changes.extend(judge(&path, before.as_ref(), after.as_ref()));
        // What differs below two directories comes by itself.
        if let (Some(dir), None) = (was_dir, is_dir) {
            for (path, entry) in below(&mut a, &path, dir)? {
                changes.extend(judge(&path, Some(&entry), None));
            }
        }
        if let (None, Some(dir)) = (was_dir, is_dir) {
            for (path, entry) in below(&mut b, &path, dir)? {
                changes.extend(judge(&path, None, Some(&entry)));
            }
        }
    }
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(changes)
}

fn tree(checkpoint: &Checkpoint) -> anyhow::Result<Tree> {
    let turn = checkpoint.turn();
    match checkpoint.tree() {
        Ok(Some(tree)) => Ok(tree),
        Ok(None) => bail!("the checkpoint of turn {turn} holds no files"),
        Err(e) => Err(e).with_context(|| format!("the checkpoint of turn {turn}")),
    }
}

fn below(
    tree: &mut Tree,
    path: &Path,
    dir: crate::store::DirRef,
) -> Result<Vec<(PathBuf, TreeEntry)>, StoreError> {
    let mut found = Vec::new();
    let mut todo = vec![(path.to_owned(), dir)];
    while let Some((path, dir)) = todo.pop() {
        for entry in tree.entries(&dir)? {
            let path = path.join(entry.name());
            todo.extend(entry.dir().map(|dir| (path.clone(), dir)));
            found.push((path, entry));
        }
    }
    Ok(found)
}

/// What is at a name, as the sandbox sees it.
#[derive(Clone, Copy)]
enum At<'a> {
    /// What the image has there, if anything: the layer says nothing.
    Image,
    /// Nothing: the layer hides it.
    Nothing,
    This(&'a TreeEntry),
}

impl<'a> At<'a> {
    fn of(entry: Option<&'a TreeEntry>) -> Self {
        match entry {
            None => Self::Image,
            Some(entry) if matches!(entry.node, Node::CharDevice(0)) => Self::Nothing,
            Some(entry) => Self::This(entry),
        }
    }
}

/// None if only overlay's books differ.
fn judge(path: &Path, before: Option<&TreeEntry>, after: Option<&TreeEntry>) -> Option<Change> {
    let change = |change, entry, what| {
        Some(Change {
            change,
            kind: kind(entry),
            utf8: path.to_str().is_some(),
            path: Path::new("/").join(path),
            what,
        })
    };
    let lone = |entry: &TreeEntry, otherwise| match is_of_image(entry) {
        true => Did::Modified,
        false => otherwise,
    };
    match (At::of(before), At::of(after)) {
        (At::This(a), At::This(b)) if kind(a) != kind(b) => change(Did::Retyped, b, Vec::new()),
        (At::This(a), At::This(b)) => {
            let what = differing(a, b);
            match what.is_empty() {
                true => None,
                false => change(Did::Modified, b, what),
            }
        }
        // Copied up, or made.
        (At::Image, At::This(b)) => change(lone(b, Did::Added), b, Vec::new()),
        (At::This(a), At::Image) => change(lone(a, Did::Deleted), a, Vec::new()),
        (At::Nothing, At::This(b)) => change(Did::Added, b, Vec::new()),
        (At::This(a), At::Nothing) => change(Did::Deleted, a, Vec::new()),
        (At::Image, At::Nothing) => after.and_then(|b| change(Did::Deleted, b, Vec::new())),
        (At::Nothing, At::Image) => before.and_then(|a| change(Did::Added, a, Vec::new())),
        (At::Image, At::Image) | (At::Nothing, At::Nothing) => None,
    }
}

/// Whether overlay has copied it up from the image.
fn is_of_image(entry: &TreeEntry) -> bool {
    let mut names = entry.xattrs.iter().map(|(name, _)| name.as_bytes());
    names.any(|name| name == b"trusted.overlay.origin")
}

fn kind(entry: &TreeEntry) -> &'static str {
    match entry.node {
        Node::File(_) => "file",
        Node::Directory(_) => "directory",
        Node::Symlink(_) => "symlink",
        // Whiteouts hide something of the image, and nobody knows what.
        Node::CharDevice(0) => "image",
        Node::CharDevice(_) | Node::BlockDevice(_) => "device",
        Node::Fifo => "fifo",
        Node::Socket => "socket",
    }
}

/// What differs between two things of one kind.
fn differing(a: &TreeEntry, b: &TreeEntry) -> Vec<&'static str> {
    let xattrs = |entry: &TreeEntry| {
        let all = entry.xattrs.iter();
        let all = all.filter(|(name, _)| !BOOKKEEPING.contains(&name.as_bytes()));
        all.cloned().collect::<Vec<_>>()
    };
    let is_dir = a.dir().is_some();
    let table = [
        ("content", !is_dir && a.node != b.node),
        ("mode", a.mode != b.mode),
        ("owner", (a.uid, a.gid) != (b.uid, b.gid)),
        ("attributes", xattrs(a) != xattrs(b)),
        ("links", a.link != b.link),
        (
            "mtime",
            !is_dir && (a.mtime, a.mtime_nsec) != (b.mtime, b.mtime_nsec),
        ),
    ];
    let differ = table.into_iter().filter(|(_, differs)| *differs);
    let mut what: Vec<_> = differ.map(|(word, _)| word).collect();
    // Whatever changes a content changes its time.
    if what.contains(&"content") {
        what.retain(|word| *word != "mtime");
    }
    what
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, mknodat};

    use super::*;
    use crate::cli::{
        fixture::{Shelf, facts},
        term::{Screen, align},
    };

    fn copied_up(path: &Path) {
        lsetxattr(path, "trusted.overlay.origin", b"x", XattrFlags::empty()).unwrap();
    }

    fn whiteout(path: &Path) {
        mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    }

    fn lines(before: &Checkpoint, after: &Checkpoint) -> Vec<String> {
        let changes = compare(before, after).unwrap();
        let rows: Vec<_> = changes.iter().map(Change::row).collect();
        align(&rows, &Screen::PLAIN)
    }

    fn before(root: &Path) {
        for dir in ["same/deep", "gone/below", "etc"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        copied_up(&root.join("etc"));
        for file in [
            "same/deep/file",
            "gone/below/file",
            "etc/passwd",
            "text",
            "tool",
            "thing",
        ] {
            fs::write(root.join(file), "before").unwrap();
        }
        for file in ["etc/passwd", "books"] {
            fs::write(root.join(file), "before").unwrap();
            copied_up(&root.join(file));
        }
        symlink("here", root.join("link")).unwrap();
        for path in [root.join("text"), root.join("tool"), root.join("books")] {
            touch(&path, 1);
        }
        whiteout(&root.join("hidden"));
    }

    fn touch(path: &Path, seconds: u64) {
        let file = fs::File::options().write(true).open(path).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        file.set_modified(time).unwrap();
    }

    fn after(root: &Path) {
        before(root);
        fs::write(root.join("text"), "after!").unwrap();
        touch(&root.join("tool"), 1);
        fs::set_permissions(root.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
        lsetxattr(
            root.join("books"),
            "trusted.overlay.nlink",
            b"x",
            XattrFlags::empty(),
        )
        .unwrap();
        fs::remove_dir_all(root.join("gone")).unwrap();
        fs::remove_file(root.join("etc/passwd")).unwrap();
        fs::remove_file(root.join("thing")).unwrap();
        fs::create_dir(root.join("thing")).unwrap();
        fs::write(root.join("thing/new"), "").unwrap();
        fs::remove_file(root.join("link")).unwrap();
        symlink("there", root.join("link")).unwrap();
        fs::remove_file(root.join("hidden")).unwrap();
        fs::write(root.join("hidden"), "new").unwrap();
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        copied_up(&root.join("usr"));
        fs::write(root.join("usr/bin/git"), "new").unwrap();
        copied_up(&root.join("usr/bin/git"));
        whiteout(&root.join("usr/bin/tac"));
        fs::write(root.join(OsStr::from_bytes(b"new\n\xff\x1b[2J")), "").unwrap();
    }

    #[test]
    fn names_that_differ_are_listed_with_what_happened_to_them() {
        let shelf = Shelf::new();
        let one = shelf.checkpoint(1, facts(None), before);
        let two = shelf.checkpoint(2, facts(Some(1)), after);
        // Times of what is made twice differ by chance.
        let said = lines(&one, &two);
        let said: Vec<_> = said
            .iter()
            .filter(|line| !line.ends_with("(mtime)"))
            .collect();
        assert_eq!(
            said,
            [
                "M  file       /etc/passwd",
                "D  directory  /gone",
                "D  directory  /gone/below",
                "D  file       /gone/below/file",
                "A  file       /hidden",
                "M  symlink    /link  (content)",
                "A  file       /new\\n\\xff\\u{1b}[2J",
                "M  file       /text  (content)",
                "T  directory  /thing",
                "A  file       /thing/new",
                "M  file       /tool  (mode)",
                "M  directory  /usr",
                "A  directory  /usr/bin",
                "M  file       /usr/bin/git",
                "D  image      /usr/bin/tac",
            ]
        );
        assert_eq!(lines(&one, &one), [""; 0]);
        let back = lines(&two, &one).join("\n");
        for wanted in [
            "A  file       /gone/below/file",
            "D  file       /hidden",
            "T  file       /thing",
            "D  file       /thing/new",
            "A  image      /usr/bin/tac",
            "M  file       /usr/bin/git",
        ] {
            assert!(back.contains(wanted), "{wanted}: {back}");
        }
    }

    #[test]
    fn one_name_more_among_many_is_one_line() {
        let shelf = Shelf::new();
        let fill = |root: &Path| {
            for n in 0..1000 {
                let dir = root.join(format!("{}", n % 10));
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join(n.to_string()), "").unwrap();
                touch(&dir.join(n.to_string()), 1);
            }
        };
        let one = shelf.checkpoint(1, facts(None), fill);
        let two = shelf.checkpoint(2, facts(Some(1)), |root| {
            fill(root);
            fs::write(root.join("7/new"), "x").unwrap();
        });
        assert_eq!(lines(&one, &two), ["A  file  /7/new"]);
    }
}
