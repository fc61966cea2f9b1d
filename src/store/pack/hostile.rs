//! Packs as somebody else might make them: every checksum is right, and nothing else need be.

use super::{
    super::{Digest, codec::Input},
    format::{self, Block, Trailer},
};

/// A pack in parts.
#[derive(Debug, Clone)]
pub struct Parts {
    pub header: Vec<u8>,
    /// As in the file, one behind the other.
    pub blocks: Vec<u8>,
    pub table: Vec<u8>,
    /// With the fanout.
    pub index: Vec<u8>,
    /// Compressed.
    pub manifest: Vec<u8>,
    trailer: Trailer,
}

impl Parts {
    /// Takes a sound pack apart.
    pub fn of(pack: &[u8]) -> Self {
        let (header, trailer) = (
            &pack[..format::HEADER],
            &pack[pack.len() - format::TRAILER..],
        );
        let trailer = Trailer::decode(header, trailer).unwrap();
        let part = |from: u64, to: u64| pack[from as usize..to as usize].to_vec();
        let fanout = trailer.fanout_at().unwrap();
        let manifest = trailer.manifest_at().unwrap();
        Self {
            header: header.to_vec(),
            blocks: part(format::HEADER as u64, trailer.table_at),
            table: part(trailer.table_at, fanout),
            index: part(fanout, manifest),
            manifest: part(manifest, manifest + trailer.manifest_stored),
            trailer,
        }
    }

    /// What the trailer says about lengths and places.
    pub fn numbers(&mut self) -> [&mut u64; 5] {
        let trailer = &mut self.trailer;
        [
            &mut trailer.table_at,
            &mut trailer.blocks,
            &mut trailer.objects,
            &mut trailer.manifest_stored,
            &mut trailer.manifest_raw,
        ]
    }

    /// Makes the checksums of blocks right, as far as the table still says where they are.
    pub fn check_blocks(&mut self) {
        let mut table = Vec::new();
        let mut input = Input(&self.table);
        while let Ok(mut block) = Block::decode(&mut input) {
            let from = (block.at as usize).wrapping_sub(format::HEADER);
            let to = from.wrapping_add(block.stored as usize);
            if let Some(stored) = self.blocks.get(from..to) {
                block.check = Block::check_of(stored);
            }
            block.encode(&mut table);
        }
        self.table.splice(..table.len(), table);
    }

    /// A pack of these parts.
    pub fn seal(mut self) -> Vec<u8> {
        self.trailer.table_check = Digest::of(&self.table);
        self.trailer.index_check = Digest::of(&self.index);
        self.trailer.manifest_check = Digest::of(&self.manifest);
        let trailer = self.trailer.encode(&self.header);
        let parts = [self.header, self.blocks, self.table, self.index];
        [&parts.concat()[..], &self.manifest, &trailer].concat()
    }
}
