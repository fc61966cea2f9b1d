//! A host with many sandboxes in virtual time, on the engine's own code.
//!
//! Each sandbox's agent runs a tool, then waits for its model, then runs the next one. At the end of a
//! tool some sandboxes have something to capture: they ask the engine, capture, drain, settle. If the
//! model has answered before that is done the agent waits at the gate, and the request becomes urgent.
//! Members die and are stopped at random, also between the two steps of taking.
//!
//! One seed is one run, event by event. What must hold is asserted while it runs.

use std::{cell::RefCell, cmp::Reverse, collections::BinaryHeap, time::Duration};

use crab::engine::{Class, Moment, Next, Others, Phase, Proposal, Request, Seat, Table, Work};

use super::{
    audit::{Times, Windows},
    cpus::Cpus,
    random::Random,
    setup::{Outcome, Setup},
};

/// Not the origin, where everything is older than anything.
pub(super) const BEGIN: u64 = 1_000_000_000;
/// Microseconds from a wake-up to a look, at most.
const WAKE_UP: u64 = 50;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    ToolComputes,
    ToolEnds,
    Look(u64),
    Commit,
    Captured,
    Drained,
    ModelAnswers,
    Continue,
    Reborn,
}

pub(super) enum Doing {
    /// Nothing that the engine knows of.
    Nothing,
    Waiting,
    Taking(Proposal),
    Capturing,
    Draining,
}

pub(super) struct Sandbox {
    pub(super) seat: Seat,
    pub(super) doing: Doing,
    pub(super) request: Request,
    pub(super) class: Class,
    pub(super) asked: Moment,
    pub(super) granted: Moment,
    /// When the model has answered, if it has.
    pub(super) answered: Option<Moment>,
    /// Since when its tool computes.
    pub(super) computes_since: Moment,
    /// Since when it is urgent.
    pub(super) urgent_since: Option<Moment>,
    /// When it last came back into the queue: it had been passed, or somebody was faster in taking.
    pub(super) back: Moment,
    /// Which of its timers counts.
    pub(super) timer: u64,
    /// What happens to it while it is stopped.
    pub(super) stopped: Option<Vec<Event>>,
    /// Its turn has a dump.
    pub(super) dumped: bool,
    /// Its times say nothing.
    pub(super) was_stopped: bool,
    /// Distinguishes it from those that had its slot before.
    pub(super) life: u32,
}

pub(super) struct Neighbours {
    alive: RefCell<Vec<bool>>,
    woken: RefCell<Vec<u32>>,
}

impl Others for Neighbours {
    fn is_alive(&self, slot: u32) -> bool {
        self.alive.borrow()[slot as usize]
    }

    fn wake(&self, slot: u32) {
        self.woken.borrow_mut().push(slot);
    }
}

pub(super) struct World {
    pub(super) setup: Setup,
    pub(super) random: Random,
    pub(super) now: Moment,
    pub(super) events: BinaryHeap<Reverse<Due>>,
    pub(super) count: u64,
    pub(super) table: Table,
    pub(super) others: Neighbours,
    pub(super) sandboxes: Vec<Sandbox>,
    pub(super) disk_free: Moment,
    pub(super) cpus: Option<Cpus<(u32, u32, Event)>>,
    pub(super) windows: Windows,
    pub(super) largest: u64,
    pub(super) written: u64,
    pub(super) waiting: usize,
    pub(super) outcome: Outcome,
}

/// An event of a life of a slot's sandbox; of those at one moment the first that was planned.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Due {
    at: Moment,
    count: u64,
    slot: u32,
    life: u32,
    event: Event,
}

/// Runs it until every turn has ended.
pub fn run(setup: Setup) -> Outcome {
    let mut world = World::new(setup);
    while let Some((at, slot, life, event)) = world.next() {
        world.now = at;
        if world.sandboxes[slot as usize].life == life {
            world.happens(slot, event);
        }
    }
    world.finish()
}

impl World {
    fn new(setup: Setup) -> Self {
        let table = Table::on_heap(setup.sandboxes);
        let mut world = Self {
            random: Random(setup.seed),
            now: Moment::from_micros(BEGIN),
            events: BinaryHeap::new(),
            count: 0,
            others: Neighbours {
                alive: RefCell::new(vec![true; setup.sandboxes as usize]),
                woken: RefCell::default(),
            },
            sandboxes: Vec::new(),
            disk_free: Moment::from_micros(0),
            cpus: setup.load.cpus.map(|busy| Cpus::new(busy.number)),
            windows: Windows::new(setup.limits.rate.map_or(u64::MAX, Into::into)),
            largest: 0,
            written: 0,
            waiting: 0,
            outcome: Outcome {
                checkpoints: 0,
                deaths: 0,
                stops: 0,
                urgent: Times::default(),
                normal: Times::default(),
                exposed: Times::default(),
                exposed_dumps: Times::default(),
                own: Times::default(),
                queue: 0,
                excess: 0,
                promised: 0,
                used: 0,
            },
            table,
            setup,
        };
        for slot in 0..setup.sandboxes {
            let sandbox = world.sandbox(slot, 0);
            world.sandboxes.push(sandbox);
            world.start_tool(slot);
        }
        world
    }

    fn sandbox(&self, slot: u32, life: u32) -> Sandbox {
        let (limits, terms) = (self.setup.limits, self.setup.terms);
        Sandbox {
            seat: Seat::new(&self.table, slot, "", limits, terms),
            doing: Doing::Nothing,
            request: Request {
                work: Work::Files,
                tokens: 0,
                staged: 0,
                expected: Duration::ZERO,
            },
            class: Class::Normal,
            asked: self.now,
            granted: self.now,
            answered: None,
            computes_since: self.now,
            urgent_since: None,
            back: self.now,
            timer: 0,
            stopped: None,
            dumped: false,
            was_stopped: false,
            life,
        }
    }

    /// What happens next, to whom.
    fn next(&mut self) -> Option<(Moment, u32, u32, Event)> {
        let planned = self.events.peek().map(|Reverse(due)| due.at);
        let computed = self.cpus.as_ref().and_then(Cpus::next);
        if let Some(at) = computed
            && planned.is_none_or(|planned| at <= planned)
        {
            let (slot, life, event) = self.cpus.as_mut()?.pop(at)?;
            return Some((at, slot, life, event));
        }
        let Reverse(due) = self.events.pop()?;
        Some((due.at, due.slot, due.life, due.event))
    }

    /// Something that wants a CPU for so long, if they are scarce, or else takes so long.
    fn compute(&mut self, slot: u32, takes: Duration, event: Event) {
        let life = self.sandboxes[slot as usize].life;
        match &mut self.cpus {
            Some(cpus) => cpus.add(self.now, takes, (slot, life, event)),
            None => self.at(slot, takes, event),
        }
    }

    fn at(&mut self, slot: u32, after: Duration, event: Event) {
        self.count += 1;
        self.events.push(Reverse(Due {
            at: self.now.after(after),
            count: self.count,
            slot,
            life: self.sandboxes[slot as usize].life,
            event,
        }));
    }

    fn happens(&mut self, slot: u32, event: Event) {
        match (&mut self.sandboxes[slot as usize].stopped, event) {
            (stopped @ Some(_), Event::Continue) => {
                for event in stopped.take().unwrap_or_default() {
                    self.at(slot, Duration::ZERO, event);
                }
                return;
            }
            (Some(later), _) => return later.push(event),
            (None, _) => {}
        }
        match event {
            Event::ToolComputes => self.tool_computes(slot),
            Event::ToolEnds => self.tool_ends(slot),
            Event::Look(timer) => {
                if timer == 0 || timer == self.sandboxes[slot as usize].timer {
                    self.look(slot);
                }
            }
            Event::Commit => self.commit(slot),
            Event::Captured => self.captured(slot),
            Event::Drained => self.drained(slot),
            Event::ModelAnswers => self.model_answers(slot),
            Event::Continue => {}
            Event::Reborn => self.reborn(slot),
        }
        self.misfortune(slot, event);
        self.deliver();
    }

    /// Wakes whom the last step has woken.
    fn deliver(&mut self) {
        let woken = std::mem::take(&mut *self.others.woken.borrow_mut());
        for slot in woken {
            let late = self.random.below(WAKE_UP);
            self.at(slot, Duration::from_micros(1 + late), Event::Look(0));
        }
    }

    fn start_tool(&mut self, slot: u32) {
        let end = BEGIN + self.setup.lasting.as_micros() as u64;
        if self.now.micros() < end {
            let after = self.random.pause(self.setup.load.tool);
            self.at(slot, after, Event::ToolComputes);
        }
    }

    fn tool_computes(&mut self, slot: u32) {
        self.sandboxes[slot as usize].computes_since = self.now;
        match self.setup.load.cpus {
            Some(busy) => {
                let wants = self.random.pause(busy.own);
                self.compute(slot, wants, Event::ToolEnds);
            }
            None => self.tool_ends(slot),
        }
    }

    fn tool_ends(&mut self, slot: u32) {
        let load = self.setup.load;
        if load.cpus.is_some() {
            let since = self.sandboxes[slot as usize].computes_since;
            self.outcome.own.add(self.now.since(since));
        }
        let model = self.random.lognormal(load.model.as_secs_f64(), 0.7);
        let model = Duration::from_secs_f64(model.min(300.0));
        self.at(slot, model, Event::ModelAnswers);
        let changes = self.random.chance(load.changing);
        let sandbox = &mut self.sandboxes[slot as usize];
        sandbox.answered = None;
        sandbox.urgent_since = None;
        sandbox.class = Class::Normal;
        sandbox.was_stopped = false;
        sandbox.dumped = false;
        if !changes {
            return;
        }
        let dump = self.random.chance(load.dumping);
        let mut staged = self.random.lognormal(load.files, 1.0);
        if dump {
            staged += self.random.lognormal(load.dump, 0.8);
        }
        let staged = staged as u64;
        // What is known already, or compresses, is not written.
        let tokens = (staged as f64 * (0.2 + 0.4 * self.random.fraction())) as u64;
        let sandbox = &mut self.sandboxes[slot as usize];
        sandbox.request = Request {
            work: if dump { Work::Dump } else { Work::Files },
            tokens,
            staged,
            expected: capture_time(dump, staged),
        };
        sandbox.dumped = dump;
        sandbox.asked = self.now;
        sandbox.doing = Doing::Waiting;
        self.waiting += 1;
        self.outcome.queue = self.outcome.queue.max(self.waiting);
        let request = sandbox.request;
        sandbox
            .seat
            .enter(&self.table, self.now, &request, Class::Normal);
        self.look(slot);
    }

    fn look(&mut self, slot: u32) {
        let sandbox = &mut self.sandboxes[slot as usize];
        if self.table.status(slot).phase == Phase::Passed {
            sandbox.back = self.now;
        }
        while matches!(sandbox.doing, Doing::Waiting) {
            let (bucket, class) = (self.table.bucket(), sandbox.class);
            let next = sandbox
                .seat
                .consider(&self.table, bucket, self.now, class, &self.others);
            match next {
                Next::Again => {}
                Next::Commit(proposal) => {
                    sandbox.doing = Doing::Taking(proposal);
                    let moment = Duration::from_micros(self.random.below(20));
                    return self.at(slot, moment, Event::Commit);
                }
                Next::Sleep(until) => {
                    sandbox.timer += 1;
                    let (timer, after) = (sandbox.timer, until.since(self.now));
                    return self.at(slot, after, Event::Look(timer));
                }
            }
        }
    }

    fn commit(&mut self, slot: u32) {
        let sandbox = &mut self.sandboxes[slot as usize];
        let Doing::Taking(proposal) = sandbox.doing else {
            unreachable!("slot {slot} takes what it did not propose");
        };
        if !sandbox.seat.commit(&self.table, &proposal, &self.others) {
            sandbox.doing = Doing::Waiting;
            sandbox.back = self.now;
            return self.look(slot);
        }
        sandbox.doing = Doing::Capturing;
        sandbox.granted = proposal.at;
        self.waiting -= 1;
        let (request, asked) = (sandbox.request, sandbox.asked);
        if !sandbox.was_stopped {
            match sandbox.urgent_since {
                Some(since) => self.outcome.urgent.add(self.now.since(since)),
                None => self.outcome.normal.add(self.now.since(asked)),
            }
        }
        self.largest = self.largest.max(request.tokens);
        self.windows.flow(proposal.at, request.tokens as i64);
        self.check_order(slot, proposal.at);
        self.check_dumps(slot);
        let dump = request.work == Work::Dump;
        let more = self.setup.load.cpus.filter(|_| dump);
        let more = more.map_or(Duration::ZERO, |busy| busy.dump);
        let takes = capture_time(dump, request.staged) + more;
        self.compute(slot, takes, Event::Captured);
    }

    fn captured(&mut self, slot: u32) {
        let bytes = self.sandboxes[slot as usize].request.tokens;
        // One disk, which does one thing after the other.
        let begin = self.disk_free.max(self.now);
        let takes = Duration::from_secs_f64(bytes as f64 / self.setup.disk as f64);
        self.disk_free = begin.after(takes + Duration::from_millis(1));
        let drained = self.disk_free.since(self.now);
        let sandbox = &mut self.sandboxes[slot as usize];
        sandbox.doing = Doing::Draining;
        let staged = sandbox.request.staged;
        sandbox
            .seat
            .captured(&self.table, self.now, staged, drained, &self.others);
        self.at(slot, drained, Event::Drained);
    }

    fn drained(&mut self, slot: u32) {
        let share = 0.5 + 0.5 * self.random.fraction();
        let sandbox = &mut self.sandboxes[slot as usize];
        let charged = sandbox.request.tokens;
        let written = (charged as f64 * share) as u64;
        sandbox.doing = Doing::Nothing;
        sandbox
            .seat
            .settle(&self.table, self.now, written, &self.others);
        self.windows
            .flow(self.now, written.cast_signed() - charged.cast_signed());
        if self.now < Moment::from_micros(BEGIN).after(self.setup.lasting) {
            self.written += written;
        }
        self.outcome.checkpoints += 1;
        if let Some(answered) = self.sandboxes[slot as usize].answered {
            self.next_turn(slot, self.now.since(answered));
        }
    }

    fn model_answers(&mut self, slot: u32) {
        let sandbox = &mut self.sandboxes[slot as usize];
        sandbox.answered = Some(self.now);
        if matches!(sandbox.doing, Doing::Nothing) {
            return self.next_turn(slot, Duration::ZERO);
        }
        sandbox.class = Class::Urgent;
        sandbox.urgent_since = Some(self.now);
        self.look(slot);
    }

    fn next_turn(&mut self, slot: u32, exposed: Duration) {
        let sandbox = &self.sandboxes[slot as usize];
        if !sandbox.was_stopped {
            self.outcome.exposed.add(exposed);
            if sandbox.dumped {
                self.outcome.exposed_dumps.add(exposed);
            }
        }
        self.start_tool(slot);
    }

    /// After any step, also between the two of taking.
    fn misfortune(&mut self, slot: u32, event: Event) {
        let faults = self.setup.faults;
        if event == Event::Reborn || matches!(self.sandboxes[slot as usize].doing, Doing::Nothing) {
            return;
        }
        if self.random.chance(faults.deaths) {
            // Also before it could wake anybody.
            self.others.woken.borrow_mut().clear();
            self.others.alive.borrow_mut()[slot as usize] = false;
            self.outcome.deaths += 1;
            let sandbox = &mut self.sandboxes[slot as usize];
            self.waiting -= usize::from(matches!(sandbox.doing, Doing::Waiting | Doing::Taking(_)));
            sandbox.doing = Doing::Nothing;
            sandbox.life += 1;
            let after = self.random.pause(Duration::from_secs(3));
            self.at(slot, after, Event::Reborn);
        } else if self.random.chance(faults.stops) {
            self.outcome.stops += 1;
            let sandbox = &mut self.sandboxes[slot as usize];
            sandbox.was_stopped = true;
            sandbox.stopped = Some(Vec::new());
            let after = self.random.pause(faults.stopped);
            self.at(slot, after, Event::Continue);
        }
    }

    fn reborn(&mut self, slot: u32) {
        self.others.alive.borrow_mut()[slot as usize] = true;
        let life = self.sandboxes[slot as usize].life;
        self.sandboxes[slot as usize] = self.sandbox(slot, life);
        self.start_tool(slot);
    }
}

/// What the README's dumps take: a start, and half a millisecond for a megabyte.
fn capture_time(dump: bool, bytes: u64) -> Duration {
    let (fixed, per_mb) = if dump { (70.0, 0.5) } else { (10.0, 1.0) };
    Duration::from_secs_f64((fixed + per_mb * bytes as f64 / 1e6) / 1e3)
}
