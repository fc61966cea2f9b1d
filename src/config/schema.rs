//! The keys: what each accepts, and what is said when it does not.

use std::{fmt, num::NonZeroU64, ops::RangeInclusive, path::PathBuf, time::Duration};

use toml::{Table, Value};

use super::{
    Config, Gate, Incremental, OrphanOutput, Pattern, Recover, Tcp, options::is_zero, units,
};

/// The prefix of crab's annotations.
pub(super) const ANNOTATION: &str = "dev.crab.";

/// Where a setting was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The host's file.
    File(PathBuf),
    /// The runtime's options in containerd's or Docker's configuration.
    Options,
    /// The file that these options name.
    OptionsFile(PathBuf),
    /// An annotation of the container: its key after `dev.crab.`.
    Annotation(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Options => f.write_str("runtime options"),
            Self::OptionsFile(path) => {
                write!(f, "{} (config_path of the runtime options)", path.display())
            }
            Self::Annotation(key) => write!(f, "annotation {ANNOTATION}{}", short(key)),
        }
    }
}

/// A setting that crab refuses: where it stands, what it is, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    place: Place,
    key: Option<String>,
    problem: String,
}

impl ConfigError {
    pub(super) fn new(place: Place, problem: String) -> Self {
        Self {
            place,
            key: None,
            problem,
        }
    }

    /// Where the setting stands.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.place, &self.key) {
            (Place::Annotation(_), _) | (_, None) => write!(f, "{}: {}", self.place, self.problem),
            (place, Some(key)) => write!(f, "{place}: {key}: {}", self.problem),
        }
    }
}

impl std::error::Error for ConfigError {}

/// Who may set a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// The host's owner.
    Host,
    /// And, by an annotation, whoever starts the container.
    Sandbox,
}

/// How the text of an annotation becomes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bool,
    Number,
    Text,
    List,
}

const KEYS: &[(&str, Kind, Scope)] = &[
    ("enabled", Kind::Bool, Scope::Sandbox),
    ("runtime", Kind::Text, Scope::Host),
    ("root", Kind::Text, Scope::Host),
    ("systemd_cgroup", Kind::Bool, Scope::Host),
    ("no_pivot_root", Kind::Bool, Scope::Host),
    ("no_new_keyring", Kind::Bool, Scope::Host),
    ("shim_cgroup", Kind::Text, Scope::Host),
    ("io_uid", Kind::Number, Scope::Host),
    ("io_gid", Kind::Number, Scope::Host),
    ("criu_image_path", Kind::Text, Scope::Host),
    ("criu_work_path", Kind::Text, Scope::Host),
    ("store", Kind::Text, Scope::Host),
    ("keep", Kind::Number, Scope::Sandbox),
    ("sandbox_limit", Kind::Text, Scope::Sandbox),
    ("store_limit", Kind::Text, Scope::Host),
    ("checkpoint_stops", Kind::Bool, Scope::Sandbox),
    ("orphan_output", Kind::Text, Scope::Sandbox),
    ("gate", Kind::Text, Scope::Sandbox),
    ("skip_unchanged", Kind::Bool, Scope::Sandbox),
    ("consistent_cut", Kind::Bool, Scope::Sandbox),
    ("incremental", Kind::Bool, Scope::Sandbox),
    ("pre_dumps", Kind::Text, Scope::Sandbox),
    ("timer", Kind::Text, Scope::Sandbox),
    ("view", Kind::Bool, Scope::Sandbox),
    ("not_turns", Kind::List, Scope::Sandbox),
    ("tcp", Kind::Text, Scope::Sandbox),
    ("recover", Kind::Text, Scope::Sandbox),
    ("exec_linger", Kind::Text, Scope::Sandbox),
    ("dump_timeout", Kind::Text, Scope::Sandbox),
    ("engine.rate", Kind::Text, Scope::Host),
    ("engine.burst", Kind::Text, Scope::Host),
    ("engine.dumps", Kind::Number, Scope::Host),
    ("engine.undrained", Kind::Text, Scope::Host),
];

/// Keys may stand in a table of their own: `engine.rate = …`, or `[engine]` and `rate = …`.
const TABLE: &str = "engine";

/// runc's keys as containerd's own configuration spells them: who switches a Kubernetes runtime
/// from runc to crab keeps its `options` table. There a zero value says nothing.
const RUNC_KEYS: &[(&str, Option<&str>)] = &[
    ("BinaryName", Some("runtime")),
    ("Root", Some("root")),
    ("SystemdCgroup", Some("systemd_cgroup")),
    ("NoPivotRoot", Some("no_pivot_root")),
    ("NoNewKeyring", Some("no_new_keyring")),
    ("ShimCgroup", Some("shim_cgroup")),
    ("IoUid", Some("io_uid")),
    ("IoGid", Some("io_gid")),
    ("CriuImagePath", Some("criu_image_path")),
    ("CriuWorkPath", Some("criu_work_path")),
    ("CriuPath", None),
    ("ConfigPath", None),
];

/// Applies a TOML text of one place.
pub(super) fn apply_toml(
    config: &mut Config,
    place: &Place,
    text: &[u8],
) -> Result<(), ConfigError> {
    let refuse = |problem| ConfigError::new(place.clone(), problem);
    let text = std::str::from_utf8(text).map_err(|e| refuse(format!("not UTF-8: {e}")))?;
    let table: Table = text.parse().map_err(|e| refuse(not_toml(text, &e)))?;
    for (key, value) in &table {
        let runc = RUNC_KEYS.iter().find(|(name, _)| name == key);
        match runc.filter(|_| *place == Place::Options) {
            Some(_) if is_zero(value) => {}
            Some((_, Some(name))) => set(config, place, name, value)?,
            // containerd passes the name of the options' type along with them.
            None if key == "TypeUrl" && *place == Place::Options => {}
            _ => set_all(config, place, key, value)?,
        }
    }
    Ok(())
}

/// Sets one key, or those of a table of keys.
fn set_all(
    config: &mut Config,
    place: &Place,
    key: &str,
    value: &Value,
) -> Result<(), ConfigError> {
    match value.as_table().filter(|_| key == TABLE) {
        Some(table) => table
            .iter()
            .try_for_each(|(name, value)| set(config, place, &format!("{key}.{name}"), value)),
        None => set(config, place, key, value),
    }
}

/// Applies one annotation, `key` being what follows the prefix.
pub(super) fn apply_annotation(
    config: &mut Config,
    key: &str,
    text: &str,
) -> Result<(), ConfigError> {
    let place = Place::Annotation(key.to_owned());
    let known = KEYS.iter().find(|(name, ..)| *name == key);
    if let Some((_, _, Scope::Host)) = known {
        return Err(ConfigError::new(
            place,
            "only the host can set this, in /etc/crab/config.toml or the runtime options"
                .to_owned(),
        ));
    }
    let kind = known.map_or(Kind::Text, |(_, kind, _)| *kind);
    let plain = || Value::from(text);
    let value = match kind {
        Kind::Text => plain(),
        Kind::Bool => text.parse().map_or_else(|_| plain(), Value::Boolean),
        Kind::Number => text.parse().map_or_else(|_| plain(), Value::Integer),
        Kind::List if text.trim_start().starts_with('[') => {
            text.trim().parse().unwrap_or_else(|_| plain())
        }
        Kind::List => Value::Array(vec![plain()]),
    };
    set(config, &place, key, &value)
}

/// Sets one key.
pub(super) fn set(
    config: &mut Config,
    place: &Place,
    key: &str,
    value: &Value,
) -> Result<(), ConfigError> {
    assign(config, key, value).map_err(|problem| ConfigError {
        place: place.clone(),
        key: known(key).then(|| key.to_owned()),
        problem,
    })
}

/// The names of all keys.
pub(super) fn keys() -> impl Iterator<Item = &'static str> {
    KEYS.iter().map(|(name, ..)| *name)
}

fn known(key: &str) -> bool {
    keys().any(|name| name == key)
}

fn assign(config: &mut Config, key: &str, value: &Value) -> Result<(), String> {
    match key {
        "enabled" => config.enabled = boolean(value)?,
        "runtime" => config.runtime = program(value)?,
        "root" => config.root = absolute(value)?,
        "systemd_cgroup" => config.systemd_cgroup = boolean(value)?,
        "no_pivot_root" => config.no_pivot_root = boolean(value)?,
        "no_new_keyring" => config.no_new_keyring = boolean(value)?,
        "shim_cgroup" => {
            config.shim_cgroup =
                optional(value, |v| text(v, "a cgroup's path").map(str::to_owned))?;
        }
        "io_uid" => config.io_uid = number(value, 0..=u32::MAX)?,
        "io_gid" => config.io_gid = number(value, 0..=u32::MAX)?,
        "criu_image_path" => config.criu_image_path = optional(value, absolute)?,
        "criu_work_path" => config.criu_work_path = optional(value, absolute)?,
        "store" => config.store = absolute(value)?,
        "keep" => config.keep = number(value, 1..=100_000)?,
        "sandbox_limit" => config.sandbox_limit = optional(value, size)?,
        "store_limit" => config.store_limit = optional(value, size)?,
        "checkpoint_stops" => config.checkpoint_stops = boolean(value)?,
        "orphan_output" => {
            config.orphan_output = one_of(
                value,
                &[
                    ("log", OrphanOutput::Log),
                    ("discard", OrphanOutput::Discard),
                ],
            )?;
        }
        "gate" => {
            config.gate = one_of(
                value,
                &[
                    ("strict", Gate::Strict),
                    ("async", Gate::Async),
                    ("off", Gate::Off),
                ],
            )?;
        }
        "skip_unchanged" => config.skip_unchanged = boolean(value)?,
        "consistent_cut" => config.consistent_cut = boolean(value)?,
        "incremental" => config.incremental = incremental(value)?,
        "pre_dumps" => {
            let numbers = [
                ("auto", None),
                ("0", Some(0)),
                ("1", Some(1)),
                ("2", Some(2)),
                ("3", Some(3)),
            ];
            config.pre_dumps = one_of(value, &numbers)?;
        }
        "timer" => {
            config.timer = optional(value, |v| duration(v, seconds(1)..=seconds(24 * 60 * 60)))?;
        }
        "view" => config.view = boolean(value)?,
        "not_turns" => config.not_turns = patterns(value)?,
        "tcp" => config.tcp = one_of(value, &[("close", Tcp::Close), ("keep", Tcp::Keep)])?,
        "recover" => {
            config.recover = one_of(value, &[("off", Recover::Off), ("last", Recover::Last)])?;
        }
        "exec_linger" => config.exec_linger = duration(value, seconds(0)..=seconds(60))?,
        "dump_timeout" => config.dump_timeout = duration(value, seconds(1)..=seconds(600))?,
        "engine.rate" => config.engine.rate = rate(value)?,
        "engine.burst" => config.engine.burst = size(value)?,
        "engine.dumps" => config.engine.dumps = number(value, 0..=1024)?,
        "engine.undrained" => config.engine.undrained = size(value)?,
        _ => {
            let hint = suggestion(key, keys());
            return Err(format!("unknown key {:?}{hint}", short(key)));
        }
    }
    Ok(())
}

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn boolean(value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| expected(value, "true or false"))
}

/// `"auto"`, or whether or not.
fn incremental(value: &Value) -> Result<Incremental, String> {
    match (value.as_bool(), value.as_str()) {
        (Some(true), _) => Ok(Incremental::Always),
        (Some(false), _) => Ok(Incremental::Never),
        (None, Some("auto")) => Ok(Incremental::Auto),
        _ => Err(expected(value, "\"auto\", true or false")),
    }
}

fn number(value: &Value, range: RangeInclusive<u32>) -> Result<u32, String> {
    value
        .as_integer()
        .and_then(|n| u32::try_from(n).ok())
        .filter(|n| range.contains(n))
        .ok_or_else(|| {
            let (low, high) = (range.start(), range.end());
            expected(value, &format!("a whole number from {low} to {high}"))
        })
}

/// A size that some checkpoint fits into.
fn size(value: &Value) -> Result<u64, String> {
    const WHAT: &str = "a size of at least 1MiB, such as \"20GiB\"";
    let text = text(value, WHAT)?;
    match units::size(text) {
        Ok(size) if size >= 1 << 20 => Ok(size),
        Ok(_) => Err(expected(value, WHAT)),
        Err(e) => Err(format!("{}: {e}", expected(value, WHAT))),
    }
}

/// Bytes a second, or any number of them.
fn rate(value: &Value) -> Result<Option<NonZeroU64>, String> {
    const WHAT: &str =
        "\"unlimited\", or a size of at least 1MiB for each second, such as \"200MB\"";
    if value.as_str() == Some("unlimited") {
        return Ok(None);
    }
    let text = text(value, WHAT)?;
    // People will write the second, too.
    match units::size(text.strip_suffix("/s").unwrap_or(text)) {
        Ok(size) if size >= 1 << 20 => Ok(NonZeroU64::new(size)),
        Ok(_) => Err(expected(value, WHAT)),
        Err(e) => Err(format!("{}: {e}", expected(value, WHAT))),
    }
}

/// A string without NUL (nothing that is handed to the kernel may hold one).
fn text<'a>(value: &'a Value, what: &str) -> Result<&'a str, String> {
    value
        .as_str()
        .filter(|s| !s.contains('\0'))
        .ok_or_else(|| expected(value, what))
}

/// `""` is none.
fn optional<T>(
    value: &Value,
    read: impl Fn(&Value) -> Result<T, String>,
) -> Result<Option<T>, String> {
    match value.as_str() {
        Some("") => Ok(None),
        _ => read(value).map(Some),
    }
}

fn absolute(value: &Value) -> Result<PathBuf, String> {
    const WHAT: &str = "an absolute path";
    let path = text(value, WHAT)?;
    if path.starts_with('/') {
        Ok(PathBuf::from(path))
    } else {
        Err(expected(value, WHAT))
    }
}

fn program(value: &Value) -> Result<PathBuf, String> {
    const WHAT: &str = "\"runc\", \"crun\", another name on PATH or an absolute path";
    let path = text(value, WHAT)?;
    if path.is_empty() || (path.contains('/') && !path.starts_with('/')) {
        Err(expected(value, WHAT))
    } else {
        Ok(PathBuf::from(path))
    }
}

fn one_of<T: Copy>(value: &Value, choices: &[(&str, T)]) -> Result<T, String> {
    let chosen = value
        .as_str()
        .and_then(|s| choices.iter().find(|(name, _)| *name == s));
    chosen.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<String> = choices.iter().map(|(n, _)| format!("{n:?}")).collect();
        let hint = suggestion(
            value.as_str().unwrap_or_default(),
            choices.iter().map(|(n, _)| *n),
        );
        expected(value, &(list(&names) + &hint))
    })
}

/// `"a", "b" or "c"`
fn list(names: &[String]) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}

fn patterns(value: &Value) -> Result<Vec<Pattern>, String> {
    const WHAT: &str = "a list of patterns such as [\"*/healthcheck *\"]";
    let items = value.as_array().ok_or_else(|| expected(value, WHAT))?;
    items
        .iter()
        .map(|item| match item.as_str() {
            Some(pattern) if !pattern.is_empty() => Ok(Pattern(pattern.to_owned())),
            _ => Err(expected(item, WHAT)),
        })
        .collect()
}

fn duration(value: &Value, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let [low, high] = [range.start(), range.end()].map(|d| units::show_duration(*d));
    let what = format!("a duration from {low:?} to {high:?}");
    let Some(text) = value.as_str() else {
        return Err(expected(value, &what));
    };
    match units::duration(text) {
        Ok(duration) if range.contains(&duration) => Ok(duration),
        Ok(_) => Err(expected(value, &what)),
        Err(why) => Err(format!("{}: {why}", expected(value, &what))),
    }
}

fn expected(value: &Value, what: &str) -> String {
    format!("found {}, expected {what}", show(value))
}

fn show(value: &Value) -> String {
    match value {
        Value::String(s) => format!("{:?}", short(s)),
        Value::Array(_) => "a list".to_owned(),
        Value::Table(_) => "a table".to_owned(),
        Value::Datetime(d) => format!("the date {d}"),
        Value::Boolean(b) => b.to_string(),
        Value::Integer(n) => format!("the number {n}"),
        Value::Float(n) => format!("the number {n}"),
    }
}

/// A text that is not crab's own, cut to what an error message can hold.
fn short(text: &str) -> String {
    const MAX: usize = 60;
    let mut out: String = text.chars().take(MAX).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}

fn not_toml(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start);
    let line = 1 + text.bytes().take(start).filter(|b| *b == b'\n').count();
    let message = short(&error.message().replace('\n', " "));
    format!("line {line} is not TOML: {message}")
}

/// `; did you mean "gate"?` when one of the names is near.
fn suggestion<'a>(text: &str, names: impl Iterator<Item = &'a str>) -> String {
    let folded = short(text).to_lowercase().replace('-', "_");
    names
        .map(|name| (distance(&folded, name), name))
        .filter(|(distance, name)| *distance <= (name.len() / 3).max(1))
        .min()
        .map(|(_, name)| format!("; did you mean {name:?}?"))
        .unwrap_or_default()
}

/// Levenshtein's edit distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Whether `*` and `?` in `pattern` can be filled so that it is `text`. Linear in practice,
/// O(pattern × text) at worst: on a mismatch only the last `*` takes one character more.
pub(super) fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == '?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((star_p, star_t)) = star else {
                    return false;
                };
                star = Some((star_p, star_t + 1));
                p = star_p + 1;
                t = star_t + 1;
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}
