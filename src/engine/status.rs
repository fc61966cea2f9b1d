//! What a member does, in one word, so that it is read and changed as a whole.

use super::moment::Moment;

/// Who waits for a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Somebody, at a gate.
    Urgent,
    /// Nobody.
    Normal,
}

/// What a member wants to do, or does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Capture files.
    Files,
    /// Dump processes, and capture files.
    Dump,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It wants nothing.
    Idle,
    /// It waits for its turn.
    Waiting,
    /// The same, but it did not answer when it could have had it: nobody waits for it.
    Passed,
    /// It captures.
    Working,
    /// It writes to disk what it has captured.
    Draining,
}

/// All of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// How far it is.
    pub phase: Phase,
    /// Who waits for it.
    pub class: Class,
    /// What it does.
    pub work: Work,
    /// When it came to wait, or when the present phase began.
    pub since: Moment,
}

const CLASS: u64 = 1 << 3;
const WORK: u64 = 1 << 4;
const SHIFT: u32 = u64::BITS - Moment::BITS;

impl Status {
    /// Of a member that wants nothing.
    pub const IDLE: Self = Self {
        phase: Phase::Idle,
        class: Class::Normal,
        work: Work::Files,
        since: Moment::from_micros(0),
    };

    /// As it is in the shared file. [`Status::IDLE`] is 0.
    pub fn word(self) -> u64 {
        let phase = match self.phase {
            Phase::Idle => 0,
            Phase::Waiting => 1,
            Phase::Passed => 2,
            Phase::Working => 3,
            Phase::Draining => 4,
        };
        let class = if self.class == Class::Urgent {
            CLASS
        } else {
            0
        };
        let work = if self.work == Work::Dump { WORK } else { 0 };
        phase | class | work | self.since.micros() << SHIFT
    }

    /// From the shared file; what means nothing there is idle.
    pub fn from_word(word: u64) -> Self {
        let phase = match word & (CLASS - 1) {
            1 => Phase::Waiting,
            2 => Phase::Passed,
            3 => Phase::Working,
            4 => Phase::Draining,
            _ => return Self::IDLE,
        };
        Self {
            phase,
            class: match word & CLASS {
                0 => Class::Normal,
                _ => Class::Urgent,
            },
            work: match word & WORK {
                0 => Work::Files,
                _ => Work::Dump,
            },
            since: Moment::from_micros(word >> SHIFT),
        }
    }
}
