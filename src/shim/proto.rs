//! Small conversions to and from the wire.

use containerd_shim::protos::{
    protobuf::{
        self, Message,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    types::mount::Mount,
};
use time::OffsetDateTime;

use crate::rootfs::MountSpec;

/// A message in an `Any`, under the name that containerd's typeurl gives it.
pub fn pack(type_url: &str, message: &impl Message) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: type_url.to_owned(),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}

/// A point in time.
pub fn timestamp(at: OffsetDateTime) -> Timestamp {
    Timestamp {
        seconds: at.unix_timestamp(),
        nanos: at.nanosecond() as i32,
        ..Default::default()
    }
}

/// A mount of a Create request.
pub fn mount_spec(mount: &Mount) -> MountSpec {
    MountSpec {
        fstype: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

/// Bytes in base 16.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The opposite of [`to_hex`]; None for anything else.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_there_and_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)).unwrap(), bytes);
        for bad in ["0", "zz", "é0"] {
            assert_eq!(from_hex(bad), None);
        }
    }
}
