//! The token bucket, in one word.
//!
//! It is not a level that somebody would have to raise as time passes, but the moment at which the
//! bucket will be full (the "theoretical arrival time" of the generic cell rate algorithm, ITU-T
//! I.371): taking tokens moves it later, by the time in which the host earns them. Its other bits count
//! the changes, so that a compare-and-swap succeeds only if nobody has taken anything in between.

use super::{
    limits::{HORIZON, Limits},
    moment::Moment,
};

const CHANGES: u64 = (1 << (u64::BITS - Moment::BITS)) - 1;
/// Later than this from now is damage. A burst and one charge are at most a horizon each.
const FARTHEST: u64 = 2 * HORIZON.as_micros() as u64;

/// The word that all members share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bucket(u64);

impl Bucket {
    /// As it is in the shared file. Every word means something; see [`Bucket::is_sound`].
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// As it is in the shared file.
    pub const fn word(self) -> u64 {
        self.0
    }

    /// Whether members can have made this. If not it counts as empty, without a debt.
    pub fn is_sound(self, now: Moment) -> bool {
        self.full_at() <= now.micros().saturating_add(FARTHEST)
    }

    /// Bytes that could be taken, negative for a debt; None if any number could.
    pub fn level(self, now: Moment, limits: &Limits) -> Option<i64> {
        let rate = i128::from(limits.rate?.get());
        let missing = i128::from(self.missing(now, limits));
        let level = (i128::from(limits.depth()) - missing) * rate / 1_000_000;
        Some(i64::try_from(level).unwrap_or(i64::MIN))
    }

    /// When so many bytes can be taken: `now`, or later. What exceeds the burst is waited for after it
    /// is taken, not before.
    pub fn ready_at(self, now: Moment, bytes: u64, limits: &Limits) -> Moment {
        let depth = limits.depth();
        let may_miss = depth - limits.price(bytes).min(depth);
        let too_much = self.missing(now, limits).saturating_sub(may_miss);
        Moment::from_micros(now.micros().saturating_add(too_much))
    }

    /// After so many bytes are taken, whether they are there or not.
    pub fn take(self, now: Moment, bytes: u64, limits: &Limits) -> Self {
        let missing = self.missing(now, limits);
        self.changed(now, missing.saturating_add(limits.price(bytes)), limits)
    }

    /// After so many bytes are given back.
    pub fn give_back(self, now: Moment, bytes: u64, limits: &Limits) -> Self {
        // Rounded against the one who gives.
        let given = limits.price(bytes).saturating_sub(1);
        let missing = self.missing(now, limits).saturating_sub(given);
        self.changed(now, missing, limits)
    }

    /// The time that it takes to fill it, in microseconds. With no rate it is full.
    fn missing(self, now: Moment, limits: &Limits) -> u64 {
        match (limits.rate, self.is_sound(now)) {
            (None, _) => 0,
            (Some(_), true) => self.full_at().saturating_sub(now.micros()),
            (Some(_), false) => limits.depth(),
        }
    }

    fn changed(self, now: Moment, missing: u64, limits: &Limits) -> Self {
        let changes = self.0.wrapping_add(1) & CHANGES;
        let full_at = match limits.rate {
            // A member without a rate leaves to those with one what they have.
            None => self.full_at(),
            Some(_) => now.micros().saturating_add(missing.min(FARTHEST)),
        };
        let full_at = Moment::from_micros(full_at).micros();
        Self(full_at << (u64::BITS - Moment::BITS) | changes)
    }

    fn full_at(self) -> u64 {
        self.0 >> (u64::BITS - Moment::BITS)
    }
}
