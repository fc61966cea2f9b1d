//! Durations and sizes as people write them: `250ms`, `10s`, `2m`; `64MiB`, `1GB`.

use std::time::Duration;

/// A text that is no duration or no size, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// There is no number at the start.
    #[error("it does not start with a number")]
    NoNumber,
    /// There is a number and nothing else.
    #[error("the unit is missing ({units})")]
    NoUnit {
        /// Those that exist.
        units: &'static str,
    },
    /// There is no such unit.
    #[error("there is no unit {unit:?} ({units})")]
    BadUnit {
        /// The one found.
        unit: String,
        /// Those that exist.
        units: &'static str,
    },
    /// More than 64 bits.
    #[error("it is too large")]
    TooLarge,
}

const DURATION_UNITS: &str = "units: ms, s, m, h";
const SIZE_UNITS: &str = "units: B, KiB, MiB, GiB, TiB, kB, MB, GB, TB";

/// Reads a duration: a whole number and one of `ms`, `s`, `m`, `h`.
///
/// ```
/// # use std::time::Duration;
/// # use crab::config::units::duration;
/// assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
/// assert!(duration("10").is_err());
/// ```
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    let millis = scaled(text, DURATION_UNITS, |unit| {
        Some(match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 60 * 60 * 1000,
            _ => return None,
        })
    })?;
    Ok(Duration::from_millis(millis))
}

/// Reads a size in bytes: a whole number and a unit, binary (`MiB`) or decimal (`MB`).
pub fn size(text: &str) -> Result<u64, UnitError> {
    scaled(text, SIZE_UNITS, |unit| {
        Some(match unit {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            "kB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return None,
        })
    })
}

/// Writes a duration in the largest unit that leaves a whole number.
pub fn show_duration(duration: Duration) -> String {
    match duration.as_millis() {
        ms if ms == 0 || ms % 1000 != 0 => format!("{ms}ms"),
        ms if ms % 60_000 != 0 || ms == 60_000 => format!("{}s", ms / 1000),
        ms => format!("{}m", ms / 60_000),
    }
}

fn scaled(
    text: &str,
    units: &'static str,
    factor: impl Fn(&str) -> Option<u64>,
) -> Result<u64, UnitError> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let unit = unit.trim_start();
    if digits.is_empty() {
        return Err(UnitError::NoNumber);
    }
    if unit.is_empty() {
        return Err(UnitError::NoUnit { units });
    }
    let factor = factor(unit).ok_or_else(|| UnitError::BadUnit {
        unit: unit.chars().take(16).collect(),
        units,
    })?;
    let number: u64 = digits.parse().map_err(|_| UnitError::TooLarge)?;
    number.checked_mul(factor).ok_or(UnitError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_need_a_number_and_a_unit() {
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("64 MB"), Ok(64_000_000));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
        for (text, want) in [
            ("", "it does not start with a number"),
            ("-1s", "it does not start with a number"),
            ("10", "the unit is missing (units: ms, s, m, h)"),
            ("1.5s", "there is no unit \".5s\" (units: ms, s, m, h)"),
            ("10 sec", "there is no unit \"sec\" (units: ms, s, m, h)"),
            ("99999999999999999999s", "it is too large"),
            ("9999999999999999999h", "it is too large"),
        ] {
            assert_eq!(duration(text).unwrap_err().to_string(), want, "{text:?}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for ms in [0, 1, 250, 1000, 1500, 60_000, 90_000, 120_000, 3_600_000] {
            let d = Duration::from_millis(ms);
            assert_eq!(duration(&show_duration(d)), Ok(d), "{ms}");
        }
    }
}
