//! What the engine does at this moment, for people.

use std::{io, path::Path, time::Duration};

use super::{
    bucket::Bucket,
    decide::View,
    file::Window,
    limits::{Limits, Terms},
    member::now,
    status::{Class, Phase, Work},
    table::{Field, Table},
};

/// All of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Bytes that could be taken, negative for a debt; None if any number could.
    pub tokens: Option<i64>,
    /// Whether the bucket's word is damaged: members count it as empty.
    pub is_damaged: bool,
    /// Dumps that run.
    pub dumps: u64,
    /// Bytes that are captured, or are about to be, and not written to disk.
    pub undrained: u64,
    /// Those who want something: first who has it, then who waits, in the order in which they come.
    pub members: Vec<Row>,
    /// How many sandboxes there are besides.
    pub idle: u64,
    /// How many sandboxes go by other limits than those that were asked about.
    pub others_limits: u64,
    /// The tables of other versions of crab that are in use: each with a budget of its own.
    pub other_versions: Vec<String>,
    /// Sums since the file was made.
    pub sums: Sums,
}

/// One that wants something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its shim.
    pub pid: u32,
    /// The sandbox, as the shim calls it.
    pub name: String,
    /// How far it is.
    pub phase: Phase,
    /// Who waits for it.
    pub class: Class,
    /// What it is about.
    pub work: Work,
    /// For how long it has waited, or been in this phase.
    pub age: Duration,
    /// Bytes that it has been charged, or wants to be.
    pub tokens: u64,
    /// Bytes that it captures.
    pub staged: u64,
    /// It takes longer than it may, and does not count any more.
    pub is_overdue: bool,
}

/// Counted over all members that there have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sums {
    /// Times that something was granted.
    pub grants: u64,
    /// Of them without tokens, after a wait that was too long.
    pub forced: u64,
    /// Bytes that were charged.
    pub granted: u64,
    /// Bytes that were written.
    pub written: u64,
    /// Microseconds that were waited.
    pub waited_micros: u64,
}

impl Report {
    /// Reads the table of the host whose directory below /run this is; None if there is none: no
    /// sandbox has asked for anything since the host was booted.
    pub fn read(run: &Path, limits: &Limits, terms: &Terms) -> io::Result<Option<Self>> {
        let Some(window) = Window::open(run)? else {
            return Ok(None);
        };
        let table = &window.table;
        let (bucket, now) = (table.bucket(), now());
        let mut report = Self {
            tokens: bucket.level(now, limits),
            is_damaged: limits.rate.is_some() && !bucket.is_sound(now),
            ..Self::of_nobody(limits)
        };
        let mut alive = Vec::new();
        for slot in 0..table.slots() {
            report.sums.add(table, slot);
            if table.get(slot, Field::Pid) != 0 && window.is_alive(slot)? {
                alive.push(slot);
                report.others_limits += u64::from(!has_limits(table, slot, limits));
            }
        }
        let mut view = View::of(table, bucket, now, terms);
        view.members.retain(|its| alive.contains(&its.slot));
        report.idle = (alive.len() - view.members.len()) as u64;
        report.look(table, view, terms);
        Ok(Some(report))
    }

    /// That of a host on which nobody has asked for anything.
    pub fn of_nobody(limits: &Limits) -> Self {
        Self {
            tokens: Bucket::default().level(now(), limits),
            is_damaged: false,
            dumps: 0,
            undrained: 0,
            members: Vec::new(),
            idle: 0,
            others_limits: 0,
            other_versions: Vec::new(),
            sums: Sums::default(),
        }
    }

    fn look(&mut self, table: &Table, mut view: View, terms: &Terms) {
        self.dumps = view.dumps(terms);
        self.undrained = view.undrained(None, terms);
        view.members.sort_by_key(|its| {
            let waits = matches!(its.status.phase, Phase::Waiting | Phase::Passed);
            (waits, its.rank(terms))
        });
        self.members = view
            .members
            .iter()
            .map(|its| Row {
                pid: table.get(its.slot, Field::Pid) as u32,
                name: table.name(its.slot),
                phase: its.status.phase,
                class: its.status.class,
                work: its.status.work,
                age: view.now.since(its.status.since),
                tokens: its.tokens,
                staged: its.staged,
                is_overdue: its.holds() && !its.counts(view.now, terms),
            })
            .collect();
    }
}

impl Sums {
    fn add(&mut self, table: &Table, slot: u32) {
        for (sum, field) in [
            (&mut self.grants, Field::Grants),
            (&mut self.forced, Field::Forced),
            (&mut self.granted, Field::Granted),
            (&mut self.written, Field::Written),
            (&mut self.waited_micros, Field::WaitedMicros),
        ] {
            *sum = sum.wrapping_add(table.get(slot, field));
        }
    }
}

fn has_limits(table: &Table, slot: u32, limits: &Limits) -> bool {
    let its = [Field::Rate, Field::Burst, Field::Dumps, Field::Undrained];
    let wanted = [
        limits.rate.map_or(0, Into::into),
        limits.burst,
        limits.dumps.into(),
        limits.undrained,
    ];
    its.map(|field| table.get(slot, field)) == wanted
}
