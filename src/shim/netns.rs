//! The sandbox's network namespace, made by the shim (D9a).
//!
//! One that the runtime makes itself comes back from a restore with `lo` down; one that has a
//! path is external to CRIU and stays as it is.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// Makes a network namespace with `lo` up, and binds it to `path`.
///
/// The namespace belongs to a thread that ends here, so that the shim itself stays where it is.
pub fn create(path: &Path) -> io::Result<()> {
    File::create(path)?;
    let target = path.to_owned();
    let made = thread::Builder::new()
        .name("netns".into())
        .spawn(move || -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            lo_up()?;
            mount(
                Some("/proc/thread-self/ns/net"),
                &target,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?;
            Ok(())
        })?
        .join()
        .map_err(|_| io::Error::other("the thread panicked"))?;
    if made.is_err() {
        let _ = fs::remove_file(path);
    }
    made
}

/// Lets go of a namespace made by [`create`]; one that is gone already is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(e) => return Err(e.into()),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Brings `lo` up in the calling thread's network namespace, as runc does.
fn lo_up() -> io::Result<()> {
    // SAFETY: socket takes plain numbers and returns a descriptor that is ours alone.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a valid ifreq with a terminated name, and outlives the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
