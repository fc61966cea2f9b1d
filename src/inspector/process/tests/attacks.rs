//! Ways to move data past the flags.

use super::*;

#[test]
fn a_connection_without_a_byte_is_a_message() {
    let setup = "s = socket.socket(); s.bind(('127.0.0.1', 7000)); s.listen()";
    let actor = Actor::ready(setup, "a = s.accept(); a[0].close(); del a");
    let baseline = actor.baseline();
    let code = "import socket; socket.socket().connect(('127.0.0.1', 7000))";
    actor.enter(&["python3", "-c", code]);
    actor.go();
    assert_eq!(
        reasons(&actor.judge(&baseline, &actor.facts())),
        [What::Connected]
    );
}

#[test]
fn who_maps_a_file_for_writing_is_not_cut_consistently() {
    let setup = "f = open('f', 'wb+'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)";
    let actor = Actor::asleep(setup);
    let asleep = actor.judge(&actor.baseline(), &actor.facts());
    assert_eq!(acquittals(&asleep), [Acquittal::NotRun]);
    let actor = Actor::ready(setup, "m[0] = 1");
    let baseline = actor.baseline();
    actor.go();
    assert_eq!(
        reasons(&actor.judge(&baseline, &actor.facts())),
        [What::SharedFile]
    );
}

#[test]
fn memory_shared_within_the_set_goes_back_with_it_unless_an_exec_used_some() {
    for setup in [
        "m = mmap.mmap(-1, 4096)",
        "libc.shmat.restype = ctypes.c_void_p; a = libc.shmat(libc.shmget(0, 4096, 0o1600), None, 0)\n\
         m = (ctypes.c_char * 4096).from_address(a)",
    ] {
        let actor = Actor::ready(
            setup,
            "m[0] = b'1'[0] if isinstance(m, mmap.mmap) else b'1'",
        );
        let baseline = actor.baseline();
        actor.go();
        let mut facts = actor.facts();
        let verdict = actor.judge(&baseline, &facts);
        assert_eq!(acquittals(&verdict), [Acquittal::ConsistentCut]);
        facts.others = Others::SHM;
        let why = reasons(&actor.judge(&baseline, &facts));
        assert!(why.contains(&What::SharedMemory), "{why:?}");
    }
}

#[test]
fn a_memfd_counts_as_shared_memory() {
    let actor = Actor::asleep("m = os.memfd_create('x')");
    let baseline = actor.baseline();
    let mut facts = actor.facts();
    assert_eq!(
        acquittals(&actor.judge(&baseline, &facts)),
        [Acquittal::NotRun]
    );
    facts.others = Others::SHM;
    assert_eq!(
        reasons(&actor.judge(&baseline, &facts)),
        [What::SharedMemory]
    );
    // Written from outside, its times and size show.
    let fd = actor.snapshot().processes[0]
        .table
        .all
        .iter()
        .find(|one| one.target.contains("memfd"))
        .unwrap()
        .fd;
    write_through(actor.pid(), fd, b"x");
    assert_eq!(
        blamed_descriptor(&actor.judge(&baseline, &actor.facts())),
        fd
    );
}

#[test]
fn sysv_memory_without_a_mapping_counts_once_an_exec_used_shared_memory() {
    let actor = Actor::asleep("libc.shmget(0x77, 4096, 0o1600)");
    let baseline = actor.baseline();
    let mut facts = actor.facts();
    assert_eq!(
        acquittals(&actor.judge(&baseline, &facts)),
        [Acquittal::NotRun]
    );
    facts.others = Others::MEMORY;
    let why = reasons(&actor.judge(&baseline, &facts));
    assert!(matches!(why[..], [What::Sandbox(_)]), "{why:?}");
    // A reader that attaches for reading only is no event of the kernel side; it shows here.
    let read = "import ctypes; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p\n\
        libc.shmat(libc.shmget(0x77, 4096, 0), None, 0o10000)";
    actor.enter(&["python3", "-c", read]);
    let why = reasons(&actor.judge(&baseline, &actor.facts()));
    assert_eq!(why, [What::Sandbox("SysV IPC changed")]);
}

/// Up by an exec, down by the process: the value is as before.
#[test]
fn semaphores_forbid_the_consistent_cut() {
    let setup = "sem = libc.semget(0x77, 1, 0o1600); op = struct.pack('hhh', 0, -1, 0)";
    let actor = Actor::ready(setup, "assert libc.semop(sem, op, 1) == 0");
    let baseline = actor.baseline();
    let up = "import ctypes, struct; libc = ctypes.CDLL(None)\n\
        libc.semop(libc.semget(0x77, 1, 0), struct.pack('hhh', 0, 1, 0), 1)";
    actor.enter(&["python3", "-c", up]);
    actor.go();
    let why = reasons(&actor.judge(&baseline, &actor.facts()));
    assert!(
        why.contains(&What::MayHaveRead("SysV semaphores or message queues")),
        "{why:?}"
    );
}

#[test]
fn a_deleted_file_counts_once_an_exec_changed_one() {
    for setup in [
        "f = open('f', 'w'); os.unlink('f')",
        "f = open('f', 'wb+'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096, prot=mmap.PROT_READ); os.close(f.fileno()); os.unlink('f')",
    ] {
        let actor = Actor::asleep(setup);
        let baseline = actor.baseline();
        let mut facts = actor.facts();
        assert_eq!(
            acquittals(&actor.judge(&baseline, &facts)),
            [Acquittal::NotRun]
        );
        facts.orphans_touched = true;
        assert_eq!(
            reasons(&actor.judge(&baseline, &facts)),
            [What::DeletedFile],
            "{setup}"
        );
    }
    // The temporary file of an exec is nobody's business.
    let actor = Actor::asleep("");
    let baseline = actor.baseline();
    let mut facts = actor.facts();
    facts.orphans_touched = true;
    assert_eq!(
        acquittals(&actor.judge(&baseline, &facts)),
        [Acquittal::NotRun]
    );
}

#[test]
fn a_pipe_that_could_not_be_watched_counts_as_moved() {
    let actor = Actor::ready("r, w = os.pipe()", "pass");
    let mut baseline = actor.baseline();
    baseline.watches = watches::Watches::new();
    actor.go();
    let why = reasons(&actor.judge(&baseline, &actor.facts()));
    assert!(matches!(why[..], [What::PipeMoved { .. }]), "{why:?}");
}

#[test]
fn lost_events_count_as_moved() {
    let setup = "r, w = os.pipe(); r2, w2 = os.pipe(); r3, w3 = os.pipe()\n\
        os.dup2(r, 50); os.dup2(r2, 51); os.dup2(r3, 52)";
    let actor = Actor::ready(setup, "pass");
    let baseline = actor.baseline();
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    // Two objects in turn: equal events in a row are merged.
    for _ in 0..limit / 2 + 1 {
        for fd in [50, 51] {
            write_through(actor.pid(), fd, b"x");
            read_through(actor.pid(), fd, 1);
        }
    }
    actor.go();
    let why = reasons(&actor.judge(&baseline, &actor.facts()));
    // Nobody wrote to this one, but nobody can know.
    assert!(why.contains(&What::PipeMoved { fd: 52 }), "{why:?}");
}

/// Packets arrive in its memory while it sleeps.
#[test]
fn who_lets_the_kernel_write_its_memory_is_never_acquitted() {
    let setup = "s = socket.socket(17, 3, 0x0300)\n\
        s.setsockopt(263, 5, struct.pack('IIII', 4096, 1, 2048, 2))\n\
        m = mmap.mmap(s.fileno(), 4096)";
    let actor = Actor::asleep(setup);
    let why = reasons(&actor.judge(&actor.baseline(), &actor.facts()));
    assert_eq!(why, [What::FilledByKernel]);
}

/// /proc/PID/mem and process_vm_writev leave no trace in a process that sleeps.
#[test]
fn who_may_have_been_written_to_is_not_acquitted_without_a_comparison() {
    let actor = Actor::asleep("");
    let baseline = actor.baseline();
    let mut facts = actor.facts();
    facts.memory_reached = true;
    let why = reasons(&actor.judge(&baseline, &facts));
    assert!(matches!(why[..], [What::MemoryReached]), "{why:?}");
}
