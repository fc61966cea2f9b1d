"""What a digest of a sandbox leaves out or makes uniform, and why. docs/state.md lists the same names.

Every name below stands where its rule is applied, so `grep NAME *.py` leads from the promise to the code.
A rule is added here only after an experiment showed that runc and CRIU change the thing on a restore, or because
the thing is no part of a state by definition.
"""
from __future__ import annotations

import os

#: The version of this definition. Digests of different versions are not compared.
VERSION = 2

PAGE = os.sysconf("SC_PAGE_SIZE")

# --- Files -----------------------------------------------------------------------------------------------------

#: Overlay's own bookkeeping. Visible only where an upper directory is digested directly (`digest.py tree`).
OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")

#: Mounts of these kinds show the kernel, not the sandbox's data.
KERNEL_FILE_SYSTEMS = frozenset(
    "proc sysfs cgroup cgroup2 devpts mqueue devtmpfs bpf tracefs debugfs securityfs binfmt_misc configfs".split())

#: Files above this many bytes are hashed by block, all-zero blocks left out, so that a file with holes equals the
#: same file without, and a sparse file of a terabyte costs nothing.
SPARSE_FROM = 16 << 20
SPARSE_BLOCK = 1 << 20

#: Nanoseconds to which mtimes in a tmpfs are rounded down.
TMPFS_MTIME_NS = 1_000_000_000

# --- Processes -------------------------------------------------------------------------------------------------

#: Mappings whose contents belong to the kernel.
KERNEL_MAPPINGS = frozenset(["[vvar]", "[vdso]", "[vsyscall]", "[vvar_vclock]"])

#: Flags of a mapping that tell what the kernel did with it, not what the program asked for.
#: sd: soft-dirty, ac: counted against the overcommit limit, nr: not counted.
KERNEL_VM_FLAGS = frozenset(["sd", "ac", "nr"])

#: Bytes of struct rseq that the kernel writes at each return to user mode: (offset, length).
#: cpu_id_start and cpu_id; node_id and mm_cid.
RSEQ_KERNEL_BYTES = ((0, 8), (20, 8))

#: Fields of /proc/PID/status that are compared, besides those that are translated (pids).
STATUS_FIELDS = (
    "Umask", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp",
    "Seccomp_filters", "ShdPnd", "SigIgn", "SigCgt", "THP_enabled", "untag_mask")

#: The same for one thread, from /proc/PID/task/TID/status.
THREAD_FIELDS = ("SigBlk", "SigPnd", "CapEff", "Uid", "Gid", "NoNewPrivs", "Seccomp")

#: Mappings that the kernel may empty at any time: MAP_DROPPABLE. glibc keeps vDSO getrandom's state in one.
DROPPABLE = "dp"

#: What CRIU puts before the name of anonymous shared memory: it rebuilds it as a memfd.
RENAMED_SHARED_MEMORY = "/memfd:"

#: An open flag without meaning on 64-bit kernels, where every file is a large one.
O_LARGEFILE = 0o100000
#: Open flags that only mean something while a file is being opened.
OPENING_FLAGS = 0o20200000  # O_TMPFILE, O_DIRECTORY

#: No part of a state.
NOT_STATE: dict[str, str] = {
    "CTIME": "not compared. The kernel alone sets it, to the time of the restore.",
    "ATIME": "not compared. Reading is no change.",
    "DIRECTORY_MTIME": "not compared. It changes whenever a name in the directory is made and unmade again; the "
                       "names themselves are compared.",
    "DIRECTORY_SIZE": "not compared, nor a directory's link count. Both are the file system's bookkeeping.",
    "INODE_NUMBER": "not compared, of files, pipes, sockets, namespaces or epoll entries. Where two names or "
                    "descriptors share one object, that they share it is compared.",
    "SPARSENESS": "not compared. A hole equals zeros.",
    "OVERLAY_XATTRS": "not compared. How overlay remembers what it merged is not visible in the merged view.",
    "KERNEL_FILE_SYSTEMS": "/proc, /sys, cgroup, devpts and their like are not read: they show the kernel.",
    "EXTERNAL_MOUNTS": "volumes and the host's files bound into the sandbox are named, their contents are not "
                       "compared: they belong to the host and are never rolled back.",
    "HOST_PID": "not compared. Every pid is translated to the sandbox's own numbers first.",
    "CPU_TIME": "not compared: utime, stime, schedstat, start time, page faults, context switches. Kept beside the "
                "digest (`ran`), to tell which process ran after a restore.",
    "RESIDENT": "not compared: which pages are in memory, swapped, shared or huge. A page never touched equals "
                "zeros.",
    "KERNEL_MAPPINGS": "vdso, vvar and vsyscall: their addresses are compared (vsyscall's is fixed), their contents "
                       "are the running kernel's.",
    "KERNEL_VM_FLAGS": "sd, ac and nr of VmFlags are not compared: the kernel's accounting.",
    "MERGED_MAPPINGS": "neighbouring mappings that agree in everything count as one: the kernel merges and splits "
                       "them as it likes.",
    "SLEEP_STATE": "running, sleeping and waiting for disk count as one; stopped, traced and zombie do not. (A "
                   "frozen task is shown as any of the three; a stopped one frozen by cgroup v1, too.)",
    "EXTERNAL_PIPE": "a pipe whose other end is held outside of the sandbox (a client's stdin, stdout, stderr): "
                     "contents and capacity are not compared. Output is handed to the client, not kept.",
    "SIGQ": "not compared. It counts the user's signals on the whole host.",
    "TIMER_REMAINING": "of a timerfd the clock, the interval and whether it is armed are compared, not the time that "
                       "is left: clocks go on while a sandbox is frozen.",
    "OUTSIDE_TCP": "a TCP connection to an address outside of the sandbox is compared as `connection to the "
                   "outside` only: it is closed by a restore unless configured otherwise.",
}

#: Part of a state, but runc and CRIU 4.2 bring it back in another form that means the same.
NORMALISED: dict[str, str] = {
    "RSEQ_KERNEL_BYTES": "cpu_id, cpu_id_start, node_id and mm_cid of each thread's registered rseq area are hashed "
                         "as zeros: the kernel writes them whenever the thread moves to another CPU.",
    "SYSCALL_RESTART": "a thread's program counter directly after a system call instruction is reported as the "
                       "instruction's own address: CRIU restores an interrupted call to be made again.",
    "DROPPABLE": "contents of MAP_DROPPABLE mappings are not compared: the kernel may empty them at any time, CRIU "
                 "does. (The state of glibc's random numbers: it must not be in two sandboxes anyway.)",
    "RENAMED_SHARED_MEMORY": "shared anonymous memory comes back as `/memfd:/dev/zero`: the prefix is left out.",
    "O_LARGEFILE": "not compared. CRIU opens pipes and terminals with it; on a 64-bit kernel it means nothing.",
    "OPENING_FLAGS": "O_DIRECTORY and O_TMPFILE are not compared: they mean something to open() alone.",
    "EVEN_BUFFERS": "SO_SNDBUF and SO_RCVBUF of a socket are compared without their lowest bit: CRIU sets half of "
                    "what it has read, and the kernel doubles that.",
    "CONNECTED_REUSEPORT": "SO_REUSEPORT of a connected TCP socket is not compared: CRIU sets it to rebuild a "
                           "connection next to its listener.",
    "SOCKET_MTIME": "of the file of a unix socket: not compared. CRIU binds the socket anew.",
    "TMPFS_MTIME": "in a tmpfs, mtimes are compared to the second: CRIU keeps these files in a tar archive.",
    "MASKS": "a mount that hides a part of /proc or /sys is compared as `mask`: runc binds another /dev/null over "
             "it on a restore.",
}
#: Part of a state, and lost: runc and CRIU 4.2 do not bring it back. A sandbox that depends on it notices.
LOST: dict[str, str] = {
    "MEMBER_TERMINAL": "the controlling terminal of a process that does not lead its session: it can no longer open "
                       "/dev/tty, nor can what it starts. Its open descriptors and ^C still work. The leader's "
                       "terminal and foreground group are compared.",
    "CPU_AFFINITY": "sched_setaffinity: a restored task may run on all CPUs of its cgroup.",
    "COREDUMP_FILTER": "/proc/PID/coredump_filter: back to its default.",
    "TIMER_SLACK": "PR_SET_TIMERSLACK: back to 50 µs.",
    "PERSONALITY": "personality(2), so `setarch -R`: back to the default. Addresses stay as they were.",
    "CONNECTED_UNIX_NAME": "getsockname and getpeername of a connected unix socket: an accepted one has lost its "
                           "listener's path. That and to whom it is connected is compared.",
}

#: What a checkpoint promises, too, but nobody can read from outside of a process. Tests check it by use.
UNOBSERVED: dict[str, str] = {
    "REGISTERS": "all but stack pointer and program counter: a frozen task cannot be traced.",
    "INTERVAL_TIMERS": "setitimer's and timer_settime's remaining time (which POSIX timers exist is compared).",
    "SIGNAL_STACK": "sigaltstack, securebits, parent-death signal, child-subreaper bit, clear_child_tid.",
    "TTY_BUFFER": "the bytes queued in a terminal; their number is compared.",
    "SEND_QUEUE": "the bytes not yet sent of a TCP connection.",
}


def text() -> str:
    """The definition, for people."""
    lines = [f"definition of a sandbox's state, version {VERSION}"]
    for title, rules in (("no part of a state", NOT_STATE), ("made uniform", NORMALISED),
                         ("lost in a restore", LOST), ("promised, but not observable from outside", UNOBSERVED)):
        lines += ["", f"{title}:", *(f"  {name}: {reason}" for name, reason in rules.items())]
    return "\n".join(lines)
