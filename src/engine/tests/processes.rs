//! Real processes, some of which are killed and stopped while others ask.

use std::{
    env,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

use nix::{
    sys::{
        signal::{Signal, kill, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{
    tools::{audit::Windows, random::Random},
    *,
};

const PLACE: &str = "CRAB_TEST_ENGINE_PLACE";
const SEED: &str = "CRAB_TEST_ENGINE_SEED";
/// A signal that a process sends to itself when it is at work.
const SIGNAL: &str = "CRAB_TEST_ENGINE_SIGNAL";
/// The longest wait: far beyond what anybody needs, and less than the longest lease.
const LONGEST: Duration = Duration::from_secs(25);
const INNOCENT: u64 = 3;
const VICTIMS: u64 = 9;
const RATE: u64 = 200 * MB;
const BURST: u64 = 4 * MB;

/// The body of each process: asks again and again, and writes down what it was granted.
#[test]
fn asks_again_and_again() {
    let Some(place) = env::var_os(PLACE).map(PathBuf::from) else {
        return;
    };
    let seed: u64 = env::var(SEED).unwrap().parse().unwrap();
    let mut random = Random(seed);
    let mut member = join(&place, Terms::default());
    if let Ok(signal) = env::var(SIGNAL) {
        let grant = member.acquire(&at_work(), &Caller::default(), LONGEST);
        raise(signal.parse().unwrap()).unwrap();
        return drop(grant.unwrap());
    }
    let mut log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(place.join(format!("log{seed}")))
        .unwrap();
    while !place.join("stop").exists() {
        let bytes = random.below(2 * MB);
        let request = Request {
            work: if random.chance(0.5) {
                Work::Dump
            } else {
                Work::Files
            },
            expected: ms(5),
            ..files(bytes)
        };
        let caller = Caller::default();
        if random.chance(0.3) {
            caller.promote();
        }
        let mut grant = member.acquire(&request, &caller, LONGEST).unwrap();
        let line = format!("{} {bytes}\n", grant.at.micros());
        log.write_all(line.as_bytes()).unwrap();
        thread::sleep(Duration::from_micros(random.below(5_000)));
        grant.captured(bytes, ms(5));
        thread::sleep(Duration::from_micros(random.below(5_000)));
        grant.settle(bytes);
    }
}

fn join(place: &Path, terms: Terms) -> Member {
    let limits = Limits {
        rate: NonZeroU64::new(RATE),
        burst: BURST,
        dumps: 2,
        undrained: 8 * MB,
    };
    let member = Member::join(&place.join("run"), "", limits, terms);
    assert_eq!(member.why_alone(), None);
    member
}

/// A dump that is expected to take longer than anybody waits for it.
fn at_work() -> Request {
    Request {
        expected: Duration::from_secs(3600),
        ..dump(MB)
    }
}

fn start(place: &Path, seed: u64) -> Child {
    command(place, seed).spawn().unwrap()
}

fn command(place: &Path, seed: u64) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "engine::tests::processes::asks_again_and_again"])
        .env(PLACE, place)
        .env(SEED, seed.to_string())
        .stdout(Stdio::null());
    command
}

fn send(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

fn grants(place: &Path, seed: u64) -> Vec<(u64, u64)> {
    let log = fs::read_to_string(place.join(format!("log{seed}"))).unwrap_or_default();
    let line = |line: &str| {
        let (at, bytes) = line.split_once(' ')?;
        Some((at.parse().ok()?, bytes.parse().ok()?))
    };
    log.lines().filter_map(line).collect()
}

#[test]
fn processes_that_die_and_stop_hold_nobody_up_and_break_no_budget() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path();
    let mut random = Random(11);
    let mut innocent: Vec<Child> = (0..INNOCENT).map(|seed| start(place, seed)).collect();
    let mut seeds = INNOCENT..;
    let mut victims: Vec<Child> = seeds
        .by_ref()
        .take(VICTIMS as usize)
        .map(|seed| start(place, seed))
        .collect();
    // Until enough has happened, and everybody who is left alone has had enough.
    let end = Instant::now() + LONGEST;
    for round in 0.. {
        let had = |seed| grants(place, seed).len() >= 25;
        if round >= 50 && (0..INNOCENT).all(had) {
            break;
        }
        assert!(Instant::now() < end, "somebody is held up");
        let victim = &mut victims[random.below(VICTIMS) as usize];
        match random.below(3) {
            0 => {
                send(victim, Signal::SIGKILL);
                victim.wait().unwrap();
                *victim = start(place, seeds.next().unwrap());
            }
            1 => send(victim, Signal::SIGSTOP),
            _ => send(victim, Signal::SIGCONT),
        }
        thread::sleep(ms(random.below(60)));
    }
    fs::write(place.join("stop"), "").unwrap();
    for victim in &victims {
        send(victim, Signal::SIGCONT);
    }
    for child in innocent.iter_mut().chain(&mut victims) {
        assert!(child.wait().unwrap().success(), "was denied something");
    }
    let mut all: Vec<(u64, u64)> = (0..seeds.start)
        .flat_map(|seed| grants(place, seed))
        .collect();
    all.sort_unstable();
    let mut windows = Windows::new(RATE);
    for (at, bytes) in &all {
        windows.flow(Moment::from_micros(*at), *bytes as i64);
    }
    println!(
        "{} grants, {} bytes beyond the rate",
        all.len(),
        windows.worst()
    );
    assert!(windows.worst() <= BURST, "{}", windows.worst());
}

#[test]
fn those_who_die_at_work_give_back_what_they_had() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path();
    for seed in 0..2 {
        let status = command(place, seed)
            .env(SIGNAL, "SIGKILL")
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32));
    }
    let mut third = join(place, Terms::default());
    let grant = third.acquire(&dump(MB), &Caller::default(), LONGEST);
    assert!(grant.unwrap().waited < LONGEST);
}

#[test]
fn those_who_are_stopped_at_work_count_for_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path();
    let mut stopped: Vec<Child> = (0..2)
        .map(|seed| command(place, seed).env(SIGNAL, "SIGSTOP").spawn().unwrap())
        .collect();
    for child in &stopped {
        let pid = Pid::from_raw(child.id().cast_signed());
        let status = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert_eq!(status, WaitStatus::Stopped(pid, Signal::SIGSTOP));
    }
    let terms = Terms {
        longest_lease: Duration::from_secs(10),
        ..Terms::default()
    };
    let mut third = join(place, terms);
    let ask = |member: &mut Member, limit| {
        member
            .acquire(&dump(MB), &Caller::default(), limit)
            .map(drop)
    };
    // Two dumps run, as far as anybody can tell.
    assert_eq!(ask(&mut third, ms(50)), Err(Denied::TooLong(ms(50))));
    assert_eq!(ask(&mut third, LONGEST), Ok(()));
    for child in &mut stopped {
        send(child, Signal::SIGKILL);
        child.wait().unwrap();
    }
}
