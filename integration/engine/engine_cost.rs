//! Measures what asking the engine costs: alone, and with more and more processes that ask at the
//! same time, as fast as they can.

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::ensure;
use crab::engine::{Caller, Limits, Member, Request, Terms, Work};

const PLACE: &str = "CRAB_ENGINE_COST_PLACE";
const ROUNDS: usize = 2000;

fn main() -> anyhow::Result<()> {
    if let Some(place) = env::var_os(PLACE) {
        return measure(Path::new(&place));
    }
    println!("acquire and settle, {ROUNDS} times a process, all at once; microseconds");
    println!(
        "{:>9}  {:>7}  {:>7}  {:>9}  {:>9}",
        "processes", "p50", "p99", "longest", "CPU each"
    );
    for processes in [1, 2, 10, 60] {
        row(processes)?;
    }
    Ok(())
}

fn row(processes: usize) -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in("/run").or_else(|_| tempfile::tempdir())?;
    let me = env::current_exe()?;
    let children = (0..processes).map(|_| {
        Command::new(&me)
            .env(PLACE, dir.path())
            .stdout(Stdio::piped())
            .spawn()
    });
    let children = children.collect::<Result<Vec<_>, _>>()?;
    let mut times = Vec::new();
    let mut cpu = 0.0;
    for child in children {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "a process has failed");
        let text = String::from_utf8_lossy(&output.stdout);
        let mut numbers = text
            .split_whitespace()
            .filter_map(|word| word.parse::<f64>().ok());
        cpu += numbers.next().unwrap_or_default() / processes as f64;
        times.extend(numbers);
    }
    times.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!(
        "{processes:>9}  {:>7.1}  {:>7.1}  {:>9.0}  {cpu:>9.1}",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    Ok(())
}

/// Prints the CPU time of a round, and the time of each.
fn measure(place: &Path) -> anyhow::Result<()> {
    let limits = Limits {
        rate: None,
        burst: 1 << 30,
        dumps: 1024,
        undrained: 1 << 40,
    };
    let mut member = Member::join(place, "cost", limits, Terms::default());
    ensure!(member.why_alone().is_none(), "{:?}", member.why_alone());
    let request = Request {
        work: Work::Dump,
        tokens: 1 << 20,
        staged: 1 << 20,
        expected: Duration::from_millis(100),
    };
    let mut times = Vec::with_capacity(ROUNDS);
    let before = cpu();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        let mut grant = member.acquire(&request, &Caller::default(), Duration::from_secs(60))?;
        grant.captured(1 << 20, Duration::from_millis(10));
        grant.settle(1 << 19);
        times.push(begin.elapsed().as_nanos() as f64 / 1e3);
    }
    let each = (cpu() - before).as_secs_f64() * 1e6 / ROUNDS as f64;
    let words: Vec<String> = times.iter().map(|time| format!("{time:.1}")).collect();
    println!("{each:.2} {}", words.join(" "));
    Ok(())
}

/// CPU time of this process.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}
