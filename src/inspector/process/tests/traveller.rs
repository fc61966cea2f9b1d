//! The thread that goes to a sandbox's namespaces, and comes back.

use super::*;
use crate::inspector::process::{ipc, traveller::NAME};

fn link(path: &str) -> Option<PathBuf> {
    fs::read_link(path).ok()
}

/// Where the travelling threads of this process are: there may be one more, which has just ended.
fn places(kind: &str) -> Vec<PathBuf> {
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let its = |entry: fs::DirEntry| {
        let path = entry.path();
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let place = link(path.join("ns").join(kind).to_str()?)?;
        (name.trim_end() == NAME).then_some(place)
    };
    threads.filter_map(|entry| its(entry.unwrap())).collect()
}

#[test]
fn each_sandbox_is_told_of_by_itself_and_the_thread_is_home_again() {
    let (one, other) = (Actor::asleep(""), Actor::asleep(""));
    one.enter(&["hostname", "one"]);
    other.enter(&["hostname", "other"]);
    let of = |actor: &Actor| ipc::ask(actor.pid()).unwrap().answer().unwrap();
    let (first, second) = (of(&one), of(&other));
    assert_ne!(first.names, second.names);
    assert_eq!(first, of(&one));
    other.enter(&["hostname", "one"]);
    assert_eq!(first.names, of(&other).names);
    // Others ask it, too, while this test runs.
    for kind in ["uts", "ipc", "net"] {
        let home = link(&format!("/proc/self/ns/{kind}")).unwrap();
        eventually(|| {
            let places = places(kind);
            !places.is_empty() && places.iter().all(|place| *place == home)
        });
    }
}

#[test]
fn a_dead_process_is_an_error_and_the_next_one_is_told_of() {
    let mut dead = Command::new("true").spawn().unwrap();
    let pid = dead.id().cast_signed();
    // A zombie has no namespaces.
    eventually(|| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| stat.contains(") Z"))
    });
    assert!(ipc::ask(pid).unwrap().answer().is_err());
    dead.wait().unwrap();
    assert!(matches!(ipc::ask(pid), Err(ProcessError::Gone(_))));
    let actor = Actor::asleep("");
    ipc::ask(actor.pid()).unwrap().answer().unwrap();
}
