//! Mounting a rootfs the way containerd's `mount.All` does, and unmounting it.

mod options;

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags},
    sched::CloneFlags,
};
use serde::{Deserialize, Serialize};

use options::Options;

use super::mountinfo::parse_mountinfo;
use crate::tree::{open_within, proc_path};

/// The kernel copies at most this much of a mount's data, its terminator included, and drops the
/// rest without a word.
const PAGE: usize = 4096;
/// Something may hold a mount for a moment (a scanner, a fork of containerd).
const BUSY_TRIES: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// Bound on mounts stacked at one place.
const MAX_STACK: usize = 1024;

/// One mount, in containerd's terms.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// `overlay`, `bind`, `ext4`, …
    pub fstype: String,
    /// A device or directory; any word for an overlay.
    pub source: String,
    /// A path within the target that all mounts share; usually empty.
    pub target: String,
    /// In the words of mount(8), one option each.
    pub options: Vec<String>,
}

/// A mount that could not be made or taken away.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("cannot {step} at {target:?}: {errno} ({spec})")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Where.
        target: PathBuf,
        /// Type, source and options.
        spec: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// An option that needs a helper which this shim does not have.
    #[error("cannot mount at {target:?}: the option {option:?} is not supported ({spec})")]
    Unsupported {
        /// Where.
        target: PathBuf,
        /// Which one.
        option: String,
        /// Type, source and options.
        spec: String,
    },
    /// More than a page of options, which could not be shortened.
    #[error(
        "cannot mount at {target:?}: {length} bytes of options are more than the kernel takes \
         ({max}), even with paths relative to a common directory ({spec})",
        max = PAGE - 1
    )]
    TooLong {
        /// Where.
        target: PathBuf,
        /// How long they are after shortening.
        length: usize,
        /// Type, source and options.
        spec: String,
    },
    /// Not unmounted; everything is as it was.
    #[error("cannot unmount {target:?}: {errno}")]
    Busy {
        /// Where.
        target: PathBuf,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Makes all mounts, in order, at `target`. If one fails, those before it are taken away again.
pub fn mount_all(mounts: &[MountSpec], target: &Path) -> Result<(), MountError> {
    for (done, spec) in mounts.iter().enumerate() {
        if let Err(e) = mount_one(spec, target) {
            for spec in mounts[..done].iter().rev() {
                // The first error is the one to tell.
                if let Ok(place) = Place::find(target, &spec.target) {
                    let _ = nix::mount::umount2(place.path(), MntFlags::MNT_DETACH);
                }
            }
            return Err(e);
        }
    }
    Ok(())
}

/// Unmounts everything that is stacked at `target`; what is busy goes once nobody uses it any more.
/// That nothing is mounted there, or that `target` is absent, is fine.
pub fn unmount(target: &Path) -> Result<(), MountError> {
    match unmount_busy_is_error(target) {
        Err(MountError::Busy {
            errno: Errno::EBUSY,
            ..
        }) => all_of(target, MntFlags::MNT_DETACH),
        done => done,
    }
}

/// The same, but what is busy stays mounted and is an error.
pub fn unmount_busy_is_error(target: &Path) -> Result<(), MountError> {
    patiently(|| all_of(target, MntFlags::empty()))
}

/// Unmounts whatever is mounted below `dir`, the latest first, also what is busy.
pub fn unmount_below(dir: &Path) -> Result<(), MountError> {
    let busy = |errno| MountError::Busy {
        target: dir.to_owned(),
        errno,
    };
    let list = std::fs::read("/proc/thread-self/mountinfo");
    let list = list.map_err(|e| busy(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))))?;
    let mut points: Vec<_> = parse_mountinfo(&list).map(|m| m.mountpoint).collect();
    points.retain(|point| point != dir && point.starts_with(dir));
    for point in points.iter().rev() {
        match nix::mount::umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // It has gone with one above it.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(busy(errno)),
        }
    }
    Ok(())
}

/// Unmounts what is on top at `target`, and nothing below it.
pub(super) fn unmount_one(target: &Path) -> Result<(), MountError> {
    patiently(|| {
        nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW).map_err(|errno| MountError::Busy {
            target: target.to_owned(),
            errno,
        })
    })
}

fn patiently(step: impl Fn() -> Result<(), MountError>) -> Result<(), MountError> {
    for _ in 0..BUSY_TRIES {
        match step() {
            Err(MountError::Busy {
                errno: Errno::EBUSY,
                ..
            }) => std::thread::sleep(BUSY_PAUSE),
            done => return done,
        }
    }
    step()
}

fn all_of(target: &Path, flags: MntFlags) -> Result<(), MountError> {
    for _ in 0..MAX_STACK {
        match nix::mount::umount2(target, flags | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more), or not there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => {
                return Err(MountError::Busy {
                    target: target.to_owned(),
                    errno,
                });
            }
        }
    }
    Err(MountError::Busy {
        target: target.to_owned(),
        errno: Errno::ELOOP,
    })
}

fn mount_one(spec: &MountSpec, target: &Path) -> Result<(), MountError> {
    let refused = |step, errno| MountError::Refused {
        step,
        target: target.join(spec.target.trim_start_matches('/')),
        spec: describe(spec),
        errno,
    };
    let mut options = Options::parse(spec, target)?;
    let place = Place::find(target, &spec.target).map_err(|e| refused("find the target", e))?;
    let working_dir = options.shorten(spec);
    let data = options.data.join(",");
    if data.len() >= PAGE {
        return Err(MountError::TooLong {
            target: target.to_owned(),
            length: data.len(),
            spec: describe(spec),
        });
    }

    let flags = options.flags - propagation();
    if !flags.contains(MsFlags::MS_REMOUNT) || !data.is_empty() {
        let call = Call {
            source: &spec.source,
            target: place.path(),
            fstype: &spec.fstype,
            flags,
            data: &data,
        };
        call.run(working_dir.as_deref())
            .map_err(|e| refused("mount", e))?;
    }
    // From here on the target leads to the new mount, and a descriptor would not.
    let place = place
        .again(target, &spec.target)
        .map_err(|e| refused("find the mount", e))?;
    let follow_up = |flags| {
        let none = None::<&str>;
        nix::mount::mount(none, place.path(), none, flags, none)
    };
    let result = (|| {
        if options.flags.intersects(propagation()) {
            let flags = options.flags & (propagation() | MsFlags::MS_REC | MsFlags::MS_SILENT);
            follow_up(flags).map_err(|e| refused("set the propagation", e))?;
        }
        if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
            // The kernel ignores every other flag of a new bind mount.
            follow_up(flags | MsFlags::MS_REMOUNT).map_err(|e| refused("make read-only", e))?;
        }
        Ok(())
    })();
    if result.is_err() {
        let detach = MntFlags::MNT_DETACH;
        let _ = nix::mount::umount2(place.path(), detach);
    }
    result
}

fn describe(spec: &MountSpec) -> String {
    let MountSpec {
        fstype,
        source,
        options,
        ..
    } = spec;
    format!(
        "type {fstype:?}, source {source:?}, options {:?}",
        options.join(",")
    )
}

fn propagation() -> MsFlags {
    MsFlags::MS_SHARED | MsFlags::MS_PRIVATE | MsFlags::MS_SLAVE | MsFlags::MS_UNBINDABLE
}

/// Where a mount goes. A path within the target is a path of the rootfs, whose links must not
/// lead out of it.
struct Place {
    path: PathBuf,
    _fd: Option<OwnedFd>,
}

impl Place {
    fn find(target: &Path, within: &str) -> Result<Self, Errno> {
        use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
        let within = within.trim_matches('/');
        if within.is_empty() {
            return Ok(Self {
                path: target.to_owned(),
                _fd: None,
            });
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let raw = |e: rustix::io::Errno| Errno::from_raw(e.raw_os_error());
        let root = rustix::fs::openat(CWD, target, flags | OFlags::DIRECTORY, Mode::empty())
            .map_err(raw)?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let fd = open_within(root.as_fd(), within, flags, resolve).map_err(raw)?;
        Ok(Self {
            path: proc_path(fd.as_fd()).into(),
            _fd: Some(fd),
        })
    }

    fn again(self, target: &Path, within: &str) -> Result<Self, Errno> {
        drop(self);
        Self::find(target, within)
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

struct Call<'a> {
    source: &'a str,
    target: &'a Path,
    fstype: &'a str,
    flags: MsFlags,
    data: &'a str,
}

impl Call<'_> {
    fn mount(&self) -> Result<(), Errno> {
        let data = (!self.data.is_empty()).then_some(self.data);
        nix::mount::mount(
            Some(self.source),
            self.target,
            Some(self.fstype),
            self.flags,
            data,
        )
    }

    /// Mounts with `dir` as working directory: in a thread that shares neither its working
    /// directory nor its life with the others, since the process must not fork.
    fn run(&self, dir: Option<&Path>) -> Result<(), Errno> {
        let Some(dir) = dir else {
            return self.mount();
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("mount".into());
            let thread = thread.spawn_scoped(scope, || {
                let absolute = std::path::absolute(self.target).map_err(|_| Errno::EINVAL)?;
                nix::sched::unshare(CloneFlags::CLONE_FS)?;
                nix::unistd::chdir(dir)?;
                Call {
                    target: &absolute,
                    ..*self
                }
                .mount()
            });
            match thread.map(|t| t.join()) {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(Errno::EFAULT),
                Err(_) => Err(Errno::EAGAIN),
            }
        })
    }
}
