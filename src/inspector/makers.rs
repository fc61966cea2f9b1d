//! Where in the kernel's code inodes of /proc are made that belong to no process.
//!
//! The kernel gives these their times before their mode (`fs/proc/inode.c`, `self.c`,
//! `thread_self.c`, `proc_sysctl.c`), so that the programs, which know a `/proc/PID/mem` by its
//! mode, would take some of them for one. They look at who has called instead.

use std::{fs::File, io, io::BufRead};

/// As the kernel's list of symbols names them; as many as `struct makers` has places.
const MAKERS: [&str; 4] = [
    "proc_get_inode",
    "proc_setup_self",
    "proc_setup_thread_self",
    "proc_sys_make_inode",
];

/// A function of the kernel; all zeros if it is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Code {
    start: u64,
    end: u64,
}

/// What this kernel tells of them, as the programs' `struct makers`. Without one of them its inodes may be
/// taken for a process's memory, which costs checkpoints and loses nothing.
pub(super) fn makers() -> io::Result<Vec<u8>> {
    let found = find(io::BufReader::new(File::open("/proc/kallsyms")?))?;
    let words = found.iter().flat_map(|code| [code.start, code.end]);
    Ok(words.flat_map(u64::to_ne_bytes).collect())
}

/// A function ends where the next symbol begins. The list is in no order.
fn find(symbols: impl BufRead) -> io::Result<[Code; 4]> {
    let mut all = Vec::new();
    let mut found = [Code::default(); 4];
    for line in symbols.lines() {
        let line = line?;
        let mut words = line.split(' ');
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        // The rest of the line names a module.
        let Ok(address) = u64::from_str_radix(address, 16) else {
            continue;
        };
        all.push(address);
        let is_code = kind.eq_ignore_ascii_case("t");
        if let Some(place) = MAKERS.iter().position(|maker| is_code && *maker == name) {
            found[place].start = address;
        }
    }
    all.sort_unstable();
    for code in found.iter_mut().filter(|code| code.start != 0) {
        let next = all.partition_point(|address| *address <= code.start);
        code.end = all.get(next).copied().unwrap_or_default();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_ends_where_the_next_symbol_begins() {
        let list = "0000000000000040 T later\n\
                    0000000000000010 t proc_sys_make_inode\n\
                    0000000000000010 t another_name_of_it\n\
                    0000000000000020 d data\n\
                    nonsense\n\
                    0000000000000050 T proc_get_inode\t[proc]\n\
                    0000000000000060 T proc_setup_self\n\
                    0000000000000005 d proc_setup_thread_self\n";
        let [get, own, thread, sysctl] = find(list.as_bytes()).unwrap();
        let code = |start, end| Code { start, end };
        assert_eq!(sysctl, code(0x10, 0x20));
        // Of a module; the last one of all; no code.
        assert_eq!(get, Code::default());
        assert_eq!(own, code(0x60, 0));
        assert_eq!(thread, Code::default());
    }

    /// Who may not see addresses is shown zeros.
    #[test]
    fn hidden_addresses_are_none() {
        let list = "0000000000000000 T proc_get_inode\n0000000000000000 T proc_setup_self\n";
        assert_eq!(find(list.as_bytes()).unwrap(), [Code::default(); 4]);
    }

    #[test]
    fn this_kernel_tells_them() {
        let all = makers().unwrap();
        assert_eq!(all.len(), MAKERS.len() * 16);
        for code in all.chunks(16) {
            let word = |at: usize| u64::from_ne_bytes(code[at..at + 8].try_into().unwrap());
            let (start, end) = (word(0), word(8));
            assert!(
                start != 0 && end > start && end - start < 16 << 10,
                "{start:x} {end:x}"
            );
        }
    }
}
