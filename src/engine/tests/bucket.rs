use proptest::prelude::*;

use super::{tools::audit::Windows, *};
use crate::engine::limits::HORIZON;

#[test]
fn a_full_bucket_gives_its_burst_at_once_and_then_the_rate() {
    let now = at(0);
    let bucket = Bucket::default();
    assert_eq!(bucket.level(now, &LIMITS), Some(50 * MB as i64));
    assert_eq!(bucket.ready_at(now, 50 * MB, &LIMITS), now);
    let bucket = bucket.take(now, 50 * MB, &LIMITS);
    assert_eq!(bucket.level(now, &LIMITS), Some(0));
    assert_eq!(bucket.ready_at(now, 10 * MB, &LIMITS), at(100));
    assert_eq!(bucket.level(at(100), &LIMITS), Some(10 * MB as i64));
    // It never holds more than the burst.
    assert_eq!(bucket.level(at(60_000), &LIMITS), Some(50 * MB as i64));
}

#[test]
fn what_exceeds_the_burst_is_waited_for_afterwards() {
    let now = at(0);
    let bucket = Bucket::default();
    assert_eq!(bucket.ready_at(now, 1_000 * MB, &LIMITS), now);
    let bucket = bucket.take(now, 1_000 * MB, &LIMITS);
    assert_eq!(bucket.level(now, &LIMITS), Some(-950 * MB as i64));
    assert_eq!(bucket.ready_at(now, MB, &LIMITS), at(9_510));
}

#[test]
fn what_is_given_back_can_be_taken_and_no_more() {
    let now = at(0);
    let bucket = Bucket::default().take(now, 40 * MB, &LIMITS);
    let back = bucket.give_back(now, 30 * MB, &LIMITS);
    let level = back.level(now, &LIMITS).unwrap();
    // Rounded to microseconds, in the host's favour.
    assert!((39_999_800..=40 * MB as i64).contains(&level), "{level}");
    // Into a full bucket nothing goes.
    let full = bucket.give_back(at(10_000), 30 * MB, &LIMITS);
    assert_eq!(full.level(at(10_000), &LIMITS), Some(50 * MB as i64));
}

#[test]
fn without_a_rate_all_is_there_and_changes_are_counted() {
    let limits = Limits {
        rate: None,
        ..LIMITS
    };
    let bucket = Bucket::default().take(at(0), 40 * MB, &LIMITS);
    let taken = bucket.take(at(0), u64::MAX, &limits);
    assert_ne!(taken, bucket);
    assert_eq!(taken.level(at(0), &limits), None);
    assert_eq!(taken.ready_at(at(0), u64::MAX, &limits), at(0));
    assert_eq!(
        taken.level(at(0), &LIMITS),
        bucket.level(at(0), &LIMITS),
        "for those with a rate nothing has changed"
    );
}

#[test]
fn a_debt_that_no_member_can_have_made_is_forgiven_and_gives_nothing() {
    let now = at(0);
    let far = Moment::from_micros(now.micros() + 3 * HORIZON.as_micros() as u64);
    let damaged = Bucket::from_word(far.micros() << 16);
    assert!(!damaged.is_sound(now));
    assert_eq!(damaged.level(now, &LIMITS), Some(0));
    assert!(damaged.take(now, 0, &LIMITS).is_sound(now));
}

/// Limits that configurations may have.
fn limits() -> impl Strategy<Value = Limits> {
    (1_u64 << 20..1 << 34, 1_u64 << 20..1 << 34).prop_map(|(rate, burst)| Limits {
        rate: NonZeroU64::new(rate),
        burst,
        ..LIMITS
    })
}

proptest! {
    /// From any word, damaged or not, whatever is taken when it is ready.
    #[test]
    fn no_window_has_more_than_the_rate_and_the_burst(
        word in any::<u64>(),
        limits in limits(),
        steps in prop::collection::vec((0_u64..2_000_000, 0_u64..1 << 33, 0_u64..=4), 1..50),
    ) {
        let mut bucket = Bucket::from_word(word);
        let mut now = at(0);
        let mut windows = Windows::new(limits.rate.unwrap().get());
        let mut largest = 0;
        for (pause, bytes, quarters_back) in steps {
            now = now.after(Duration::from_micros(pause));
            if bucket.ready_at(now, bytes, &limits) > now {
                continue;
            }
            bucket = bucket.take(now, bytes, &limits);
            windows.flow(now, bytes as i64);
            largest = largest.max(bytes);
            let back = bytes / 4 * quarters_back;
            bucket = bucket.give_back(now, back, &limits);
            windows.flow(now, -(back as i64));
        }
        // A horizon's worth is the most that a charge counts for.
        prop_assert!(windows.worst() <= limits.burst.max(largest) + 1);
    }

    #[test]
    fn what_is_ready_later_is_ready_then(
        word in any::<u64>(), limits in limits(), bytes in 0_u64..1 << 33,
    ) {
        let bucket = Bucket::from_word(at(0).micros() << 16 | word & 0xffff);
        let bucket = bucket.take(at(0), bytes, &limits);
        let ready = bucket.ready_at(at(0), bytes, &limits);
        prop_assert_eq!(bucket.ready_at(ready, bytes, &limits), ready);
        if ready > at(0) {
            let before = Moment::from_micros(ready.micros() - 1);
            prop_assert!(bucket.ready_at(before, bytes, &limits) > before);
        }
    }

    #[test]
    fn a_status_is_read_as_it_was_written(
        word in any::<u64>(),
    ) {
        let status = Status::from_word(word);
        prop_assert_eq!(Status::from_word(status.word()), status);
    }
}
