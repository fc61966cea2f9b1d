//! What a sandbox's image shows where its writable layer says nothing.

use std::{
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::Mode,
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    },
};

use super::Merged;
use crate::{
    rootfs::Overlay,
    tree::{self, TreeError, failed},
};

/// With these the kernel keeps more in a writable layer than names and files, or shows less of it.
const UNKNOWN: [&str; 6] = [
    "userxattr",
    "metacopy=on",
    "redirect_dir=on",
    "redirect_dir=follow",
    "verity=on",
    "verity=require",
];

impl Overlay {
    /// The option because of which its merged view is not put back name by name, if there is one.
    pub fn unknown_option(&self) -> Option<&str> {
        let mut options = self.options.iter().map(String::as_str);
        options.find(|option| UNKNOWN.contains(option))
    }
}

impl Merged {
    /// The layers below a writable one, merged by the kernel: a mount of their own that nobody else sees, and
    /// that is gone with this value. `scratch` is a directory of ours; an empty one is made in it.
    pub fn lower(overlay: &Overlay, scratch: &Path) -> Result<Self, TreeError> {
        let mut layers: Vec<PathBuf> = overlay.lowerdirs.clone();
        if layers.len() < 2 {
            // The kernel wants two.
            let empty = scratch.join("empty-layer");
            match rustix::fs::mkdirat(rustix::fs::CWD, &empty, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => layers.push(empty),
                Err(e) => return Err(failed("make", &empty)(e)),
            }
        }
        let shown = PathBuf::from("the image");
        let step = || failed("mount the layers of", &shown);
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step())?;
        for layer in &layers {
            let value = layer.as_os_str().as_bytes();
            let context = &context;
            fsconfig_set_string(context, "lowerdir+", value).map_err(failed("mount", layer))?;
        }
        fsconfig_create(&context).map_err(step())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes);
        let mount = mount.map_err(step())?;
        let root = tree::open_dir(&mount).map_err(step())?;
        Ok(Self::of(root, shown))
    }
}
