//! The runtime's options as containerd hands them to a shim.

use std::{fs, path::PathBuf};

use containerd_shim::protos::shim::oci::Options as RuncOptions;
use protobuf::{
    Message, UnknownValueRef,
    well_known_types::{any::Any, empty::Empty},
};
use toml::Value;

use super::schema::{ConfigError, Place};

/// What the options hold.
pub(super) enum Options {
    /// TOML in crab's schema.
    Toml { place: Place, text: Vec<u8> },
    /// runc's own, under crab's names; what has protobuf's zero value is left out.
    Keys(Vec<(&'static str, Value)>),
}

/// Decodes them. containerd 1.6 calls the generic ones `cri.runtimeoptions.v1.Options`, later
/// ones `runtimeoptions.v1.Options`; anything may have a host in front (`types.containerd.io/`).
pub(super) fn decode(any: &Any) -> Result<Options, ConfigError> {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    match name {
        "runtimeoptions.v1.Options" | "cri.runtimeoptions.v1.Options" => generic(&any.value),
        "containerd.runc.v1.Options" => runc(&any.value),
        "" if any.value.is_empty() => Ok(Options::Keys(Vec::new())),
        other => Err(ConfigError::new(
            Place::Options,
            format!(
                "found options of type {other:?}, expected runtimeoptions.v1.Options or \
                 containerd.runc.v1.Options"
            ),
        )),
    }
}

/// `Options { string type_url = 1; string config_path = 2; bytes config_body = 3; }`: the body
/// counts only where there is no path, as containerd's api.proto says.
fn generic(bytes: &[u8]) -> Result<Options, ConfigError> {
    // Every field is unknown to an Empty, and so kept as it is.
    let message = Empty::parse_from_bytes(bytes).map_err(garbled)?;
    let mut path = Vec::new();
    let mut text = Vec::new();
    for (field, value) in message.special_fields.unknown_fields() {
        if let UnknownValueRef::LengthDelimited(bytes) = value {
            match field {
                2 => path = bytes.to_vec(),
                3 => text = bytes.to_vec(),
                _ => {}
            }
        }
    }
    if path.is_empty() {
        let place = Place::Options;
        return Ok(Options::Toml { place, text });
    }
    let path = String::from_utf8(path).map_err(garbled)?;
    if !path.starts_with('/') {
        return Err(ConfigError::new(
            Place::Options,
            format!("found the config_path {path:?}, expected an absolute path"),
        ));
    }
    let place = Place::OptionsFile(PathBuf::from(&path));
    match fs::read(&path) {
        Ok(text) => Ok(Options::Toml { place, text }),
        Err(e) => Err(ConfigError::new(place, format!("cannot read it: {e}"))),
    }
}

fn runc(bytes: &[u8]) -> Result<Options, ConfigError> {
    let o = RuncOptions::parse_from_bytes(bytes).map_err(garbled)?;
    let keys = [
        ("runtime", Value::from(o.binary_name)),
        ("root", o.root.into()),
        ("systemd_cgroup", o.systemd_cgroup.into()),
        ("no_pivot_root", o.no_pivot_root.into()),
        ("no_new_keyring", o.no_new_keyring.into()),
        ("shim_cgroup", o.shim_cgroup.into()),
        ("io_uid", o.io_uid.into()),
        ("io_gid", o.io_gid.into()),
        ("criu_image_path", o.criu_image_path.into()),
        ("criu_work_path", o.criu_work_path.into()),
    ];
    Ok(Options::Keys(
        keys.into_iter().filter(|(_, v)| !is_zero(v)).collect(),
    ))
}

/// Whether protobuf and Go could not tell this value from none.
pub(super) fn is_zero(value: &Value) -> bool {
    match value {
        Value::String(s) => s.is_empty(),
        Value::Integer(n) => *n == 0,
        Value::Boolean(b) => !b,
        _ => false,
    }
}

fn garbled(cause: impl std::fmt::Display) -> ConfigError {
    ConfigError::new(Place::Options, format!("cannot decode them: {cause}"))
}
