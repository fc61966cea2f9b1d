//! Who listens in a network namespace hears of all that a look reads of its configuration.

use super::*;

/// Two ends of a cable, one of them plugged in; a route by a next hop. Nobody looks whether an address is
/// somebody else's already, which would change it seconds later; and a next hop's change is not told as one of
/// the routes by it, too.
const SETUP: &[&str] = &[
    "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad",
    "echo 0 >/proc/sys/net/ipv4/nexthop_compat_mode",
    "ip link add v0 type veth peer name v1",
    "ip link set v0 up",
    "ip link set v1 up",
    "ip address add 10.2.0.1/24 dev v0",
    "ip nexthop add id 2 via 10.2.0.2 dev v0",
    "ip route add 10.8.0.0/16 nhid 2",
];

/// One after the other.
const CHANGES: &[&str] = &[
    "ip nexthop replace id 2 via 10.2.0.3 dev v0",
    "ip address add 10.3.0.1/24 dev v0",
    "ip address add fd00::1/64 dev v0",
    "ip address delete fd00::1/64 dev v0",
    "ip route add 10.9.0.0/16 via 10.2.0.9",
    "ip route replace 10.9.0.0/16 via 10.2.0.8",
    "ip route delete 10.9.0.0/16",
    "ip rule add from 10.1.1.1 lookup 100",
    "ip link set v1 down",
    "ip link set v1 name w1",
    "ip link set v0 down",
    "ip link add b0 type bridge",
    "ip link delete v0",
    "ip link set lo down",
];

const TOLD: What = What::Sandbox("network interfaces or routes changed");

fn network(baseline: &Baseline) -> &(String, super::super::network::Network) {
    &baseline.snapshot.world.network[0]
}

fn is_unchanged(baseline: &Baseline) -> bool {
    let watched = baseline.network.as_ref().unwrap();
    watched.is_unchanged(&network(baseline).0)
}

/// When all that the kernel does later on has been done.
fn calm(actor: &Actor) -> Baseline {
    let mut found = None;
    eventually(|| {
        let baseline = actor.baseline();
        std::thread::sleep(Duration::from_millis(150));
        let is_calm = is_unchanged(&baseline);
        found = is_calm.then_some(baseline);
        is_calm
    });
    found.unwrap()
}

#[test]
fn each_change_of_the_configuration_is_heard() {
    let actor = Actor::asleep("");
    for command in SETUP {
        actor.enter(&["sh", "-c", command]);
    }
    for command in CHANGES {
        let baseline = calm(&actor);
        actor.enter(&["sh", "-c", command]);
        let now = actor.snapshot();
        let (before, now) = (&network(&baseline).1, &now.world.network[0].1);
        assert!(
            before.configuration != now.configuration,
            "{command}: does not show"
        );
        assert!(!is_unchanged(&baseline), "{command}: not heard");
        let why = reasons(&actor.judge(&baseline, &actor.facts()));
        assert_eq!(why, [TOLD], "{command}");
        // Nor is it forgotten that there was one.
        assert!(!is_unchanged(&baseline), "{command}: forgotten");
    }
}

#[test]
fn it_is_not_read_again_until_there_was_a_change() {
    let actor = Actor::asleep("");
    let mut baseline = calm(&actor);
    // As if it had been another one: it is taken over all the same.
    let own = baseline.snapshot.world.network[0].1.clone();
    baseline.snapshot.world.network[0].1.configuration = [7; 32];
    let look = |baseline: &Baseline| {
        let now = baseline.look(&[actor.pid()], &no_registers).unwrap();
        now.world.network[0].1.configuration
    };
    assert_eq!(look(&baseline), [7; 32]);
    // One that says nothing to the text.
    actor.enter(&["ip", "link", "set", "lo", "mtu", "1300"]);
    assert_eq!(look(&baseline), own.configuration);
    assert_eq!(look(&baseline), own.configuration);
}

#[test]
fn another_namespace_is_not_taken_for_the_one_that_is_watched() {
    let (actor, other) = (Actor::asleep(""), Actor::asleep(""));
    let baseline = calm(&actor);
    let watched = baseline.network.as_ref().unwrap();
    let elsewhere = other.snapshot().world.network[0].0.clone();
    assert!(!watched.is_unchanged(&elsewhere));
    assert!(is_unchanged(&baseline));
}
