//! What to do to make a tree equal to another one.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{Kind, Links, MergedError, Node, View};
use crate::{digest::Digest, tree::ShownPath};

/// Longer paths are left to others: the kernel takes 4,095 bytes, and so no name of a plan needs two steps.
const MAX_PATH: usize = 4000;

/// How much may differ at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// What is there itself; names below it that differ are given by themselves.
    Itself,
    /// Anything below it.
    Below,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A name goes; a directory is empty by then.
    Remove {
        /// Where.
        path: PathBuf,
        /// Whether it is a directory.
        is_dir: bool,
    },
    /// A new inode, at a name where nothing is by then.
    Make {
        /// Where.
        path: PathBuf,
        /// What.
        node: Node,
    },
    /// A regular file with this one name gets other bytes and attributes, and stays the inode that it is.
    Rewrite {
        /// Where.
        path: PathBuf,
        /// What it is to be.
        node: Node,
    },
    /// A directory gets other attributes.
    Attributes {
        /// Where.
        path: PathBuf,
        /// What it is to be.
        node: Node,
    },
    /// One more name of an inode.
    Link {
        /// Where.
        path: PathBuf,
        /// One of its names.
        to: PathBuf,
    },
}

impl Step {
    /// The name that it is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Remove { path, .. }
            | Self::Make { path, .. }
            | Self::Rewrite { path, .. }
            | Self::Attributes { path, .. }
            | Self::Link { path, .. } => path,
        }
    }

    /// The regular file whose bytes it needs.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Make { path, node } | Self::Rewrite { path, node } => {
                matches!(node.kind, Kind::File(size) if size > 0).then_some(path)
            }
            _ => None,
        }
    }
}

/// All that is to be done, in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// First.
    pub steps: Vec<Step>,
    /// Then: directories whose names have changed, and their modification times.
    pub times: Vec<(PathBuf, (i64, u32))>,
}

/// What makes `now` equal to `wanted` at `paths`, the names that may differ. All names of an inode are among
/// them, or none, in so far as they differ in which names they are links of.
///
/// `limit`: how many names are looked at.
pub fn plan(
    wanted: &mut dyn View,
    now: &mut dyn View,
    paths: &BTreeMap<PathBuf, Depth>,
    limit: usize,
) -> Result<Plan, MergedError> {
    let mut planner = Planner {
        wanted,
        now,
        limit,
        seen: HashSet::new(),
        gone: BTreeSet::new(),
        dirs: BTreeMap::new(),
        attributes: Vec::new(),
        leaves: Vec::new(),
    };
    // Each directory before what is below it.
    for (path, depth) in paths {
        planner.compare(path, *depth)?;
    }
    planner.finish()
}

struct Planner<'v> {
    wanted: &'v mut dyn View,
    now: &'v mut dyn View,
    limit: usize,
    seen: HashSet<PathBuf>,
    /// Directories that go.
    gone: BTreeSet<PathBuf>,
    /// Directories that come.
    dirs: BTreeMap<PathBuf, Node>,
    attributes: Vec<Step>,
    leaves: Vec<Leaf>,
}

/// A name that stands for something else than a directory, before or afterwards.
struct Leaf {
    path: PathBuf,
    wanted: Option<Node>,
    now: Option<Node>,
}

impl Leaf {
    fn inode(&self) -> Option<(u64, u64, u64)> {
        match self.now.as_ref()?.links {
            Links::Inode { dev, ino, names } => Some((dev, ino, names)),
            _ => None,
        }
    }
}

impl Planner<'_> {
    fn compare(&mut self, path: &Path, depth: Depth) -> Result<(), MergedError> {
        let mut todo = vec![(path.to_owned(), depth)];
        while let Some((path, depth)) = todo.pop() {
            if !self.seen.insert(path.clone()) {
                continue;
            }
            if self.seen.len() > self.limit {
                return Err(MergedError::TooMuch {
                    limit: self.limit,
                    what: "names",
                });
            }
            if path.as_os_str().len() > MAX_PATH {
                return Err(MergedError::unproven(&path, "its path is too long"));
            }
            let below = self.name(&path, depth)?;
            todo.extend(below.into_iter().map(|name| (name, Depth::Below)));
        }
        Ok(())
    }

    /// Compares one name; returns those below it that are to be compared, too.
    fn name(&mut self, path: &Path, depth: Depth) -> Result<BTreeSet<PathBuf>, MergedError> {
        let (wanted, now) = (self.wanted.at(path)?, self.now.at(path)?);
        let mut below = BTreeSet::new();
        let is_dir = |node: &Option<Node>| node.as_ref().is_some_and(Node::is_dir);
        let (dir_wanted, dir_now) = (is_dir(&wanted), is_dir(&now));
        let deep = depth == Depth::Below || dir_wanted != dir_now;
        if dir_wanted && deep {
            let names = self.wanted.names(path)?;
            below.extend(names.iter().map(|name| path.join(name)));
        }
        if dir_now && deep {
            let names = self.now.names(path)?;
            below.extend(names.iter().map(|name| path.join(name)));
        }
        if let (true, true, Some(node), Some(now)) = (dir_wanted, dir_now, &wanted, &now) {
            if !node.looks_like(now) {
                let (path, node) = (path.to_owned(), node.clone());
                self.attributes.push(Step::Attributes { path, node });
            }
            return Ok(below);
        }
        if dir_now {
            self.gone.insert(path.to_owned());
        }
        let leaf = Leaf {
            path: path.to_owned(),
            wanted: wanted.clone().filter(|_| !dir_wanted),
            now: now.filter(|_| !dir_now),
        };
        if let (true, Some(node)) = (dir_wanted, wanted) {
            self.dirs.insert(path.to_owned(), node);
        }
        if leaf.wanted.is_some() || leaf.now.is_some() {
            self.leaves.push(leaf);
        }
        Ok(below)
    }

    fn finish(mut self) -> Result<Plan, MergedError> {
        let mut leaves = std::mem::take(&mut self.leaves);
        leaves.sort_unstable_by(|a, b| a.path.as_os_str().cmp(b.path.as_os_str()));
        let mut work = Work::default();
        let groups = self.groups(&leaves)?;
        for leaf in &leaves {
            let grouped = leaf.wanted.as_ref().map(|node| node.links);
            match grouped {
                Some(Links::Named(id)) => match groups.get(&id) {
                    Some(Group::Stays) => {}
                    Some(Group::Anew { first }) if *first == leaf.path => work.anew(leaf),
                    Some(Group::Anew { first }) => work.link(leaf, first),
                    None => return Err(MergedError::unproven(&leaf.path, "its links")),
                },
                Some(Links::Inode { .. }) => {
                    let why = "a file of the image with several names";
                    return Err(MergedError::unproven(&leaf.path, why));
                }
                Some(Links::One) => self.alone(leaf, &mut work)?,
                None => work.remove(leaf),
            }
        }
        self.order(work)
    }

    /// A name that is to be the only one of its inode.
    fn alone(&mut self, leaf: &Leaf, work: &mut Work) -> Result<(), MergedError> {
        let (Some(wanted), Some(now)) = (&leaf.wanted, &leaf.now) else {
            work.anew(leaf);
            return Ok(());
        };
        if leaf.inode().is_some_and(|(.., names)| names > 1) {
            work.anew(leaf);
            return Ok(());
        }
        if self.is_equal(leaf)? {
            return Ok(());
        }
        match (&wanted.kind, &now.kind) {
            (Kind::File(_), Kind::File(_)) => work.made.push(Step::Rewrite {
                path: leaf.path.clone(),
                node: wanted.clone(),
            }),
            _ => work.anew(leaf),
        }
        Ok(())
    }

    /// Equal but for its links.
    fn is_equal(&mut self, leaf: &Leaf) -> Result<bool, MergedError> {
        let (Some(wanted), Some(now)) = (&leaf.wanted, &leaf.now) else {
            return Ok(false);
        };
        if !wanted.looks_like(now) {
            return Ok(false);
        }
        match wanted.kind {
            Kind::File(size) if size > 0 => {
                Ok(self.wanted.content(&leaf.path)? == self.now.content(&leaf.path)?)
            }
            _ => Ok(true),
        }
    }

    /// What becomes of the names that are to be links of each other.
    fn groups(&mut self, leaves: &[Leaf]) -> Result<HashMap<Digest, Group>, MergedError> {
        let mut members: BTreeMap<Digest, Vec<&Leaf>> = BTreeMap::new();
        let mut known: HashMap<(u64, u64), u64> = HashMap::new();
        for leaf in leaves {
            if let Some(Links::Named(id)) = leaf.wanted.as_ref().map(|node| node.links) {
                members.entry(id).or_default().push(leaf);
            }
            if let Some((dev, ino, _)) = leaf.inode() {
                *known.entry((dev, ino)).or_default() += 1;
            }
        }
        let mut groups = HashMap::new();
        for (id, members) in members {
            // Only of a group whose first name is here it is known that the others are, too.
            let first = |leaf: &&&Leaf| Digest::of(leaf.path.as_os_str().as_bytes()) == id;
            let Some(first) = members.iter().find(first) else {
                let why = "a link of a name that has not changed";
                return Err(MergedError::unproven(&members[0].path, why));
            };
            for leaf in &members {
                if let Some((dev, ino, names)) = leaf.inode()
                    && known.get(&(dev, ino)) != Some(&names)
                {
                    let why = "it has another name that has not changed";
                    return Err(MergedError::unproven(&leaf.path, why));
                }
            }
            let group = match self.are_one(&members)? {
                true => Group::Stays,
                false => Group::Anew {
                    first: first.path.clone(),
                },
            };
            groups.insert(id, group);
        }
        Ok(groups)
    }

    /// Whether these are names of one inode already, and it is what it is to be.
    fn are_one(&mut self, members: &[&Leaf]) -> Result<bool, MergedError> {
        let inode = |leaf: &Leaf| leaf.inode().map(|(dev, ino, _)| (dev, ino));
        let first = inode(members[0]);
        if first.is_none() || members.iter().any(|leaf| inode(leaf) != first) {
            return Ok(false);
        }
        self.is_equal(members[0])
    }

    /// Puts everything in its order: names go before others come, directories come before what is in them.
    fn order(self, work: Work) -> Result<Plan, MergedError> {
        let mut removed: BTreeMap<PathBuf, bool> =
            self.gone.iter().map(|path| (path.clone(), true)).collect();
        removed.extend(work.removed.into_iter().map(|path| (path, false)));
        let mut plan = Plan::default();
        let mut touched: BTreeSet<PathBuf> = self.dirs.keys().cloned().collect();
        for (path, is_dir) in removed.into_iter().rev() {
            touched.extend(path.parent().map(Path::to_owned));
            plan.steps.push(Step::Remove { path, is_dir });
        }
        plan.steps.extend(self.attributes);
        let dirs = self.dirs.iter().map(|(path, node)| Step::Make {
            path: path.clone(),
            node: node.clone(),
        });
        let made: Vec<Step> = dirs.chain(work.made).chain(work.links).collect();
        for step in made {
            if !matches!(step, Step::Rewrite { .. }) {
                let parent = step.path().parent().unwrap_or(Path::new(""));
                let stays = !self.gone.contains(parent)
                    && self.now.at(parent)?.is_some_and(|node| node.is_dir());
                if !self.dirs.contains_key(parent) && !stays {
                    let why = "the directory that it is to be in is not there";
                    return Err(MergedError::Unproven {
                        path: ShownPath::new(step.path()),
                        why,
                    });
                }
                touched.insert(parent.to_owned());
            }
            plan.steps.push(step);
        }
        for path in touched {
            // One that goes has none.
            if let Some(node) = self.wanted.at(&path)?.filter(Node::is_dir) {
                plan.times.push((path, node.mtime));
            }
        }
        Ok(plan)
    }
}

enum Group {
    Stays,
    Anew { first: PathBuf },
}

#[derive(Default)]
struct Work {
    removed: Vec<PathBuf>,
    made: Vec<Step>,
    links: Vec<Step>,
}

impl Work {
    fn remove(&mut self, leaf: &Leaf) {
        if leaf.now.is_some() {
            self.removed.push(leaf.path.clone());
        }
    }

    fn anew(&mut self, leaf: &Leaf) {
        self.remove(leaf);
        if let Some(node) = &leaf.wanted {
            self.made.push(Step::Make {
                path: leaf.path.clone(),
                node: node.clone(),
            });
        }
    }

    fn link(&mut self, leaf: &Leaf, to: &Path) {
        self.remove(leaf);
        self.links.push(Step::Link {
            path: leaf.path.clone(),
            to: to.to_owned(),
        });
    }
}
