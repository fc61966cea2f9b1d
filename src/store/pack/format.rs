//! The fixed parts of a pack.

use super::super::{
    Digest,
    codec::{Bad, Input},
};

/// The format that this version writes. A change that an older reader would misunderstand counts
/// it up; a new field of the manifest that it may ignore does not. 1 was a directory for each turn.
pub const FORMAT: u32 = 2;

pub(super) const MAGIC: [u8; 8] = *b"crabpack";
const END_MAGIC: [u8; 8] = *b"packcrab";
pub(super) const HEADER: usize = 16;
pub(super) const TRAILER: usize = 176;
pub(super) const BLOCK_RECORD: usize = 32;
pub(super) const INDEX_ENTRY: usize = 44;
/// No block is larger, as it is in memory: an object of the largest size, behind others.
pub(super) const MAX_BLOCK: usize = 4 << 20;
/// As many objects on average have the same first bits, as far as the fanout tells them apart.
const BUCKET: u64 = 64;
const MAX_FANOUT_BITS: u32 = 24;
const KIND_SHIFT: u32 = 24;

pub(super) fn header() -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    header
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    /// From the file's beginning.
    pub(super) at: u64,
    /// Its bytes in the file.
    pub(super) stored: u32,
    /// And in memory. If the two are equal it is not compressed.
    pub(super) raw: u32,
    /// The first 16 bytes of the BLAKE3 of the bytes in the file.
    pub(super) check: [u8; 16],
}

impl Block {
    pub(super) fn check_of(stored: &[u8]) -> [u8; 16] {
        let mut check = [0; 16];
        check.copy_from_slice(&Digest::of(stored).bytes()[..16]);
        check
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.at.to_le_bytes());
        out.extend(self.stored.to_le_bytes());
        out.extend(self.raw.to_le_bytes());
        out.extend(self.check);
    }

    pub(super) fn decode(input: &mut Input<'_>) -> Result<Self, Bad> {
        let (at, stored, raw) = (input.u64()?, input.u32()?, input.u32()?);
        let mut check = [0; 16];
        check.copy_from_slice(input.bytes(16)?);
        match stored <= raw && raw as usize <= MAX_BLOCK && stored > 0 {
            true => Ok(Self {
                at,
                stored,
                raw,
                check,
            }),
            false => Err("a block's size"),
        }
    }
}

/// Where an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the block.
    pub block: u32,
    /// Where it begins in the block.
    pub offset: u32,
    /// One of `kind`.
    pub kind: u8,
    /// In bytes; less than 16 MiB.
    pub length: u32,
}

impl Place {
    pub(super) fn encode(&self, digest: &Digest, out: &mut Vec<u8>) {
        out.extend(digest.bytes());
        out.extend(self.block.to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        let kind = u32::from(self.kind) << KIND_SHIFT;
        out.extend((kind | self.length).to_le_bytes());
    }

    pub(super) fn decode(input: &mut Input<'_>) -> Result<(Digest, Self), Bad> {
        let digest = input.digest()?;
        let (block, offset, packed) = (input.u32()?, input.u32()?, input.u32()?);
        let place = Self {
            block,
            offset,
            kind: (packed >> KIND_SHIFT) as u8,
            length: packed & ((1 << KIND_SHIFT) - 1),
        };
        Ok((digest, place))
    }
}

/// How many first bits of a digest the fanout tells apart.
pub(super) fn fanout_bits(objects: u64) -> u32 {
    let mut bits = 0;
    while bits < MAX_FANOUT_BITS && objects >> bits > BUCKET {
        bits += 1;
    }
    bits
}

/// A digest's place in the fanout.
pub(super) fn bucket(digest: &Digest, bits: u32) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&digest.bytes()[..8]);
    u64::from_be_bytes(first)
        .checked_shr(64 - bits)
        .unwrap_or(0)
}

/// What the end of a pack says about the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trailer {
    /// Where the blocks end.
    pub(super) table_at: u64,
    pub(super) blocks: u64,
    pub(super) objects: u64,
    /// 0 without a manifest.
    pub(super) manifest_stored: u64,
    pub(super) manifest_raw: u64,
    pub(super) table_check: Digest,
    pub(super) index_check: Digest,
    pub(super) manifest_check: Digest,
}

impl Trailer {
    /// How long the fanout is, in bytes: one number more than there are buckets.
    pub(super) fn fanout_size(&self) -> u64 {
        ((1 << fanout_bits(self.objects)) + 1) * 4
    }

    pub(super) fn fanout_at(&self) -> Option<u64> {
        let table = self.blocks.checked_mul(BLOCK_RECORD as u64)?;
        self.table_at.checked_add(table)
    }

    pub(super) fn index_at(&self) -> Option<u64> {
        self.fanout_at()?.checked_add(self.fanout_size())
    }

    pub(super) fn manifest_at(&self) -> Option<u64> {
        let index = self.objects.checked_mul(INDEX_ENTRY as u64)?;
        self.index_at()?.checked_add(index)
    }

    /// How long the file must be.
    pub(super) fn file_size(&self) -> Option<u64> {
        self.manifest_at()?
            .checked_add(self.manifest_stored)?
            .checked_add(TRAILER as u64)
    }

    pub(super) fn encode(&self, header: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(TRAILER);
        for number in [
            self.table_at,
            self.blocks,
            self.objects,
            self.manifest_stored,
            self.manifest_raw,
        ] {
            out.extend(number.to_le_bytes());
        }
        for check in [&self.table_check, &self.index_check, &self.manifest_check] {
            out.extend(check.bytes());
        }
        out.extend(head_check(header, &out).bytes());
        out.extend(END_MAGIC);
        out
    }

    pub(super) fn decode(header: &[u8], bytes: &[u8]) -> Result<Self, Bad> {
        let mut input = Input(bytes);
        let trailer = Self {
            table_at: input.u64()?,
            blocks: input.u64()?,
            objects: input.u64()?,
            manifest_stored: input.u64()?,
            manifest_raw: input.u64()?,
            table_check: input.digest()?,
            index_check: input.digest()?,
            manifest_check: input.digest()?,
        };
        let covered = bytes.len() - input.0.len();
        let check = input.digest()?;
        if input.bytes(END_MAGIC.len())? != END_MAGIC {
            return Err("it does not end like a pack: it is cut short, or was never finished");
        }
        if check != head_check(header, &bytes[..covered]) {
            return Err("the checksum of its trailer is another one");
        }
        input.end()?;
        if trailer.objects > u64::from(u32::MAX) || trailer.blocks > u64::from(u32::MAX) {
            return Err("it has too many objects");
        }
        Ok(trailer)
    }
}

fn head_check(header: &[u8], numbers: &[u8]) -> Digest {
    Digest::of(&[header, numbers].concat())
}
