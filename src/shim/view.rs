//! Where an agent sees its turns (option `view`): a directory of the host's memory, mounted read-only in the
//! sandbox. It belongs to no checkpoint, so a sandbox that was taken back reads there that it was.
//!
//! The file keeps its inode and its size: CRIU brings back whoever holds it open.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::{
    error::{Context, Kind, Result, ShimError},
    restore::Source,
    run_dir::RunDir,
    spec::{self, Spec},
};
use crate::{config::Config, coordinator::view::View, sandbox::SandboxId, store::Store};

/// Where it is in the sandbox.
pub const MOUNT: &str = "/run/crab";
/// The file there.
pub const FILE: &str = "turn.json";
/// Its size in bytes: the rest are spaces, and a line's end.
const SIZE: usize = 512;

fn dir(run_dir: &RunDir) -> PathBuf {
    run_dir.path().join("view")
}

/// Before a sandbox is made: gives it its view, and returns its specification with that.
pub fn give(
    sandbox: &SandboxId,
    bundle: &Path,
    spec: &Spec,
    config: &Config,
    source: Option<&Source>,
    run_dir: &RunDir,
) -> Result<Spec> {
    if spec.mounts_at_or_below(Path::new(MOUNT)) {
        let text = format!(
            "{sandbox}: view: the container has something of its own mounted at {MOUNT}: mount that \
             elsewhere, or leave `view` off"
        );
        return Err(ShimError::new(Kind::InvalidArgument, text));
    }
    let step = || format!("{sandbox}: view");
    let journal = match config.store.exists() {
        true => {
            Store::open(&config.store)
                .and_then(|store| store.sandbox(sandbox).journal())
                .context(step())?
                .lines
        }
        false => Vec::new(),
    };
    let dir = dir(run_dir);
    let shown = fs::create_dir_all(&dir)
        .and_then(|()| fs::set_permissions(&dir, Permissions::from_mode(0o755)))
        .and_then(|()| write(&dir, &View::of(&journal, source.and_then(Source::turn))));
    shown.context(step())?;
    spec::add_read_only(bundle, &dir, Path::new(MOUNT)).context(step())?;
    Spec::load(bundle).context(step())
}

/// Shows what there is to know now.
pub fn show(run_dir: &RunDir, view: &View) -> io::Result<()> {
    write(&dir(run_dir), view)
}

fn write(dir: &Path, view: &View) -> io::Result<()> {
    let mut text = serde_json::to_vec(view)?;
    text.resize(SIZE.max(text.len() + 1), b' ');
    if let Some(last) = text.last_mut() {
        *last = b'\n';
    }
    let mut options = OpenOptions::new();
    let mut file: File = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join(FILE))?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    // In one piece, over the former one.
    file.write_all(&text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::{coordinator::view::WentBack, sandbox::TurnNo};

    #[test]
    fn the_file_keeps_its_inode_and_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let look = || {
            let path = dir.path().join(FILE);
            let meta = fs::metadata(&path).unwrap();
            (meta.ino(), meta.len(), fs::read_to_string(path).unwrap())
        };
        let largest = View {
            turn: TurnNo(u64::MAX),
            went_back: Some(WentBack {
                times: u64::MAX,
                from: TurnNo(u64::MAX),
                to: TurnNo(u64::MAX),
            }),
        };
        write(dir.path(), &largest).unwrap();
        let (ino, size, text) = look();
        assert_eq!(size, SIZE as u64);
        assert!(text.starts_with(r#"{"turn":18446744073709551615,"went_back":{"times":"#));
        write(dir.path(), &View::default()).unwrap();
        let after = look();
        assert_eq!((after.0, after.1), (ino, size));
        assert_eq!(after.2.trim_end(), r#"{"turn":0,"went_back":null}"#);
        assert!(after.2.ends_with(" \n"));
    }
}
