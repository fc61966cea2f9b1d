//! Reading and writing the binary parts of the format. Integers are little-endian. A reader takes
//! no byte on trust: each step is bounds-checked, and nothing is allocated by a length that the
//! input alone vouches for.

use super::Digest;

/// Why bytes are not what they should be.
pub(super) type Bad = &'static str;

/// Bytes that are left to read.
pub(super) struct Input<'a>(pub(super) &'a [u8]);

impl<'a> Input<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Bad> {
        let (head, tail) = self.0.split_at_checked(count).ok_or("it ends too soon")?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Bad> {
        let (head, tail) = self.0.split_first_chunk().ok_or("it ends too soon")?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Bad> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Bad> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Bad> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Bad> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn i64(&mut self) -> Result<i64, Bad> {
        self.array().map(i64::from_le_bytes)
    }

    pub(super) fn digest(&mut self) -> Result<Digest, Bad> {
        self.array().map(Digest::from_bytes)
    }

    /// Bytes behind their length, which takes 16 bits.
    pub(super) fn short(&mut self) -> Result<&'a [u8], Bad> {
        let length = self.u16()?;
        self.bytes(length.into())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn end(&self) -> Result<(), Bad> {
        match self.is_empty() {
            true => Ok(()),
            false => Err("there is more than should be"),
        }
    }
}

/// Appends bytes behind their length; false if that does not fit into 16 bits.
#[must_use]
pub(super) fn put_short(out: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let Ok(length) = u16::try_from(bytes.len()) else {
        return false;
    };
    out.extend(length.to_le_bytes());
    out.extend(bytes);
    true
}
