//! Bytes that wait in the shim for their reader.

/// The bound of one stream's buffer: a pipe's default capacity.
pub(super) const BOUND: usize = 64 * 1024;

/// A queue of bytes that owns no memory while it is empty.
#[derive(Default)]
pub(super) struct Buffer {
    data: Vec<u8>,
    start: usize,
}

impl Buffer {
    pub(super) fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// How much more may be read before the stream has to wait.
    pub(super) fn room(&self) -> usize {
        BOUND.saturating_sub(self.data.len() - self.start)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.data.get(self.start..).unwrap_or_default()
    }

    /// Appends, beyond the bound too: the bound is kept by whoever reads.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.start > self.data.len() / 2 {
            self.data.drain(..self.start);
            self.start = 0;
        }
        self.data.extend_from_slice(bytes);
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        if self.start >= self.data.len() {
            *self = Self::default();
        }
    }

    /// Everything, leaving nothing.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let mut all = std::mem::take(self);
        all.data.drain(..all.start);
        all.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_buffer_owns_no_memory_and_order_is_kept() {
        let mut buffer = Buffer::default();
        let mut expected = Vec::new();
        let mut got = Vec::new();
        for i in 0..1000u32 {
            buffer.push(&i.to_le_bytes());
            expected.extend_from_slice(&i.to_le_bytes());
            let n = (i as usize % 7).min(buffer.bytes().len());
            got.extend_from_slice(&buffer.bytes()[..n]);
            buffer.consume(n);
        }
        got.extend_from_slice(&buffer.take());
        assert_eq!(got, expected);
        assert!(buffer.is_empty());
        assert_eq!(buffer.data.capacity(), 0);
    }
}
