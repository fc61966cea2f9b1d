//! What CRIU says of a dump: its `stats-dump`, in its work directory.
//!
//! Two 32-bit magic numbers, then the 32-bit length (all little-endian) of a `stats_entry`, of which field 1
//! is a `dump_stats_entry` (CRIU's `images/stats.proto`, `include/magic.h`).

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    time::Duration,
};

use protobuf::CodedInputStream;

const SERVICE_MAGIC: u32 = 0x5510_5940;
const STATS_MAGIC: u32 = 0x5709_3306;
/// It has a few dozen bytes.
const MAX: u64 = 4096;
const FILE: &str = "stats-dump";
const DUMP: u32 = 1;
/// Microseconds until all tasks stood still, and from then until they ran again.
const FREEZING: u32 = 1;
const FROZEN: u32 = 2;

/// For how long a dump that had its work directory here has frozen the processes.
///
/// # Errors
/// When CRIU has written none, or another format.
pub fn frozen_in(work: &Path) -> io::Result<Duration> {
    let mut bytes = Vec::new();
    File::open(work.join(FILE))?
        .take(MAX)
        .read_to_end(&mut bytes)?;
    parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "CRIU's statistics"))
}

fn parse(bytes: &[u8]) -> Option<Duration> {
    let word = |at: usize| {
        let word = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(word.try_into().ok()?))
    };
    if (word(0)?, word(4)?) != (SERVICE_MAGIC, STATS_MAGIC) {
        return None;
    }
    let length = usize::try_from(word(8)?).ok()?;
    let message = bytes.get(12..)?.get(..length)?;
    let mut stream = CodedInputStream::from_bytes(message);
    while let Some(tag) = stream.read_raw_tag_or_eof().ok()? {
        // All fields of the outer message are messages.
        let inner = stream.read_bytes().ok()?;
        if tag >> 3 == DUMP {
            return frozen(&inner);
        }
    }
    None
}

fn frozen(message: &[u8]) -> Option<Duration> {
    let mut stream = CodedInputStream::from_bytes(message);
    let (mut freezing, mut frozen) = (None, None);
    while let Some(tag) = stream.read_raw_tag_or_eof().ok()? {
        let value = stream.read_raw_varint64().ok()?;
        match tag >> 3 {
            FREEZING => freezing = Some(value),
            FROZEN => frozen = Some(value),
            _ => {}
        }
        if let (Some(freezing), Some(frozen)) = (freezing, frozen) {
            return Some(Duration::from_micros(freezing.saturating_add(frozen)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As CRIU 4.2 writes it: 113,000 µs until frozen, 9,500 µs frozen.
    const DUMP_STATS: [u8; 10] = [0x0a, 8, 8, 0xe8, 0xf2, 6, 16, 0x9c, 0x4a, 24];

    fn file(message: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(SERVICE_MAGIC.to_le_bytes());
        bytes.extend(STATS_MAGIC.to_le_bytes());
        bytes.extend((message.len() as u32).to_le_bytes());
        bytes.extend(message);
        bytes
    }

    #[test]
    fn the_time_in_which_it_stood_still_is_all_of_it() {
        let whole = file(&DUMP_STATS);
        assert_eq!(parse(&whole), Some(Duration::from_micros(122_500)));
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
        assert_eq!(parse(&file(&[])), None);
    }
}
