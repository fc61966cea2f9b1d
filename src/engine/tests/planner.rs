use proptest::prelude::*;

use super::*;
use crate::engine::planner::MOST_PRE_DUMPS;

fn situation() -> Situation {
    Situation {
        files: 10 * MB,
        reason: Reason::Processes,
        memory: Some(500 * MB),
        last_dump: None,
        tokens: None,
        wait: Duration::from_secs(30),
        can_pre_dump: true,
        fixed: None,
    }
}

#[test]
fn what_is_taken_follows_what_changed() {
    let full = Action::Full { pre_dumps: 0 };
    let cases = [
        (Reason::Unchanged, Action::Nothing),
        (Reason::OnlyFiles, Action::Files),
        (Reason::Processes, full),
        (Reason::UsedFiles, full),
        (Reason::AskedFor, full),
    ];
    for (reason, action) in cases {
        let situation = Situation {
            reason,
            can_pre_dump: false,
            ..situation()
        };
        let plan = plan(&situation, &Costs::default());
        assert_eq!((plan.action, plan.reason), (action, reason));
        assert_eq!(plan.pre_dumps, None);
        assert_eq!(plan.tokens == 0, action == Action::Nothing);
    }
}

#[test]
fn the_journal_is_told_what_for_and_what_was_expected() {
    let costs = Costs {
        change_rate: 5e6,
        ..Costs::default()
    };
    let told = |reason, can_pre_dump| {
        let situation = Situation {
            reason,
            can_pre_dump,
            ..situation()
        };
        plan(&situation, &costs).to_string()
    };
    assert_eq!(
        told(Reason::Unchanged, true),
        "nothing: nothing has changed"
    );
    assert_eq!(
        told(Reason::OnlyFiles, true),
        "files: no process has changed (expected: 10.0 MB captured, 10.0 MB written, frozen for 55 ms)"
    );
    assert_eq!(
        told(Reason::UsedFiles, false),
        "full: files have changed that a process stands upon (expected: 510.0 MB captured, 510.0 MB \
         written, frozen for 375 ms)"
    );
    let after = told(Reason::Processes, true);
    assert!(
        after.starts_with(
            "full after 1 pre-dump(s): processes have changed, or may have, pre-dumps shorten the freeze (expected: "
        ),
        "{after}"
    );
}

#[test]
fn pre_dumps_pay_for_large_dumps_that_hardly_change_and_for_no_small_ones() {
    let costs = Costs {
        change_rate: 5e6,
        ..Costs::default()
    };
    let large = plan(&situation(), &costs);
    assert_eq!(large.action, Action::Full { pre_dumps: 1 });
    assert_eq!(large.pre_dumps, Some(PreDumps::ShorterFreeze));
    let cases = [
        (
            PreDumps::TooSmall,
            Situation {
                memory: Some(20 * MB),
                ..situation()
            },
        ),
        (
            PreDumps::TooSlow,
            Situation {
                wait: ms(500),
                ..situation()
            },
        ),
        (
            PreDumps::TooFewTokens,
            Situation {
                tokens: Some(510 * MB),
                ..situation()
            },
        ),
    ];
    for (reason, situation) in cases {
        let plan = plan(&situation, &costs);
        assert_eq!(
            (plan.action, plan.pre_dumps),
            (Action::Full { pre_dumps: 0 }, Some(reason))
        );
    }
}

#[test]
fn a_configured_number_of_pre_dumps_is_taken_where_any_can_be() {
    let of = |fixed, can_pre_dump| {
        let situation = Situation {
            fixed,
            can_pre_dump,
            tokens: Some(0),
            wait: ms(0),
            ..situation()
        };
        plan(&situation, &Costs::default()).pre_dumps()
    };
    assert_eq!(of(None, true), 0);
    assert_eq!((of(Some(0), true), of(Some(2), true)), (0, 2));
    assert_eq!(of(Some(u32::MAX), true), MOST_PRE_DUMPS);
    assert_eq!(of(Some(2), false), 0);
}

#[test]
fn a_sandbox_with_many_processes_is_known_by_its_last_dump() {
    let alone = plan(
        &Situation {
            can_pre_dump: false,
            ..situation()
        },
        &Costs::default(),
    );
    let crowd = Situation {
        can_pre_dump: false,
        last_dump: Some(Dump {
            bytes: MB,
            took: Duration::from_secs(2),
        }),
        ..situation()
    };
    let crowd = plan(&crowd, &Costs::default());
    assert!(crowd.frozen > alone.frozen + ms(1900), "{:?}", crowd.frozen);
}

prop_compose! {
    fn costs()(
        dump_start in 1_u64..500, pre in 1_u64..500, files_start in 0_u64..50, drain_start in 0_u64..50,
        dump_rate in 1e7..1e10, files_rate in 1e7..1e10, drain_rate in 1e6..1e10,
        written_share in 0.001..1.5, change_rate in 1e6..1e10,
    ) -> Costs {
        Costs {
            dump_start: ms(dump_start), pre_dump_freeze: ms(pre), files_start: ms(files_start),
            drain_start: ms(drain_start), dump_rate, files_rate, drain_rate, written_share, change_rate,
        }
    }
}

prop_compose! {
    fn situations()(
        files in 0_u64..1 << 32, memory in prop::option::of(0_u64..1 << 36),
        last in prop::option::of((0_u64..1 << 36, 0_u64..100_000)),
        tokens in prop::option::of(0_u64..1 << 36), wait in 0_u64..120_000,
        reason in prop::sample::select(vec![
            Reason::Unchanged, Reason::OnlyFiles, Reason::Processes, Reason::UsedFiles, Reason::AskedFor,
        ]),
        can_pre_dump: bool,
    ) -> Situation {
        Situation {
            files, reason, memory,
            last_dump: last.map(|(bytes, took)| Dump { bytes, took: ms(took) }),
            tokens, wait: ms(wait), can_pre_dump, fixed: None,
        }
    }
}

proptest! {
    #[test]
    fn a_pre_dump_is_planned_only_where_it_pays(now in situations(), costs in costs()) {
        let chosen = plan(&now, &costs);
        let plain = plan(&Situation { can_pre_dump: false, ..now }, &costs);
        if let Action::Full { pre_dumps: rounds @ 1.. } = chosen.action {
            prop_assert!(rounds <= MOST_PRE_DUMPS && now.can_pre_dump);
            prop_assert!(chosen.frozen < plain.frozen, "it freezes for longer");
            prop_assert!(chosen.durable <= now.wait.max(plain.durable), "somebody waits for it");
            prop_assert!(now.tokens.is_none_or(|tokens| chosen.tokens <= tokens), "it is not paid");
            // However fast the rest is: what the rounds save is more than their own freezes.
            prop_assert!(plain.frozen - chosen.frozen < plain.frozen - costs.pre_dump_freeze * rounds);
        } else {
            prop_assert_eq!(chosen.frozen, plain.frozen);
        }
    }

    #[test]
    fn more_to_do_costs_more(now in situations(), costs in costs(), more in 0_u64..1 << 34) {
        let plain = Situation { can_pre_dump: false, ..now };
        let before = plan(&plain, &costs);
        for after in [
            Situation { files: now.files + more, ..plain },
            Situation { memory: now.memory.map(|memory| memory + more), ..plain },
        ] {
            let after = plan(&after, &costs);
            prop_assert!(after.tokens >= before.tokens && after.staged >= before.staged);
            prop_assert!(after.frozen >= before.frozen && after.durable >= before.durable);
        }
    }

    #[test]
    fn more_time_and_more_tokens_never_make_the_freeze_longer(
        now in situations(), costs in costs(), more in 0_u64..1 << 34,
    ) {
        let before = plan(&now, &costs);
        for after in [
            Situation { wait: now.wait + Duration::from_micros(more), ..now },
            Situation { tokens: now.tokens.map(|tokens| tokens + more), ..now },
        ] {
            prop_assert!(plan(&after, &costs).frozen <= before.frozen);
        }
    }

    #[test]
    fn what_is_learnt_stays_within_reason(
        seen in prop::collection::vec((any::<u64>(), 0_u64..1 << 40, any::<u64>(), 0_u8..4), 0..40),
        now in situations(),
    ) {
        let mut estimator = Estimator::default();
        for (bytes, micros, written, what) in seen {
            let took = Duration::from_micros(micros);
            match what {
                0 => estimator.dumped(Dump { bytes, took }),
                1 => estimator.files_captured(bytes, took),
                2 => estimator.drained(bytes, written, took),
                _ => estimator.changed(bytes, took),
            }
        }
        let costs = estimator.costs();
        for rate in [costs.dump_rate, costs.files_rate, costs.drain_rate] {
            prop_assert!((1e6..=1e11).contains(&rate), "{}", rate);
        }
        prop_assert!((0.0..=1e11).contains(&costs.change_rate), "{}", costs.change_rate);
        plan(&now, costs);
    }

    #[test]
    fn a_host_of_any_speed_is_known_after_some_dumps(rate in 2e7..5e9_f64) {
        let mut estimator = Estimator::default();
        for _ in 0..40 {
            let took = |bytes: u64| ms(30) + Duration::from_secs_f64(bytes as f64 / rate);
            estimator.dumped(Dump { bytes: 100 * MB, took: took(100 * MB) });
            estimator.dumped(Dump { bytes: MB, took: took(MB) });
        }
        let found = estimator.costs().dump_rate;
        prop_assert!((0.9 * rate..1.1 * rate).contains(&found), "{} for {}", found, rate);
    }
}

#[test]
fn a_large_dump_that_comes_first_is_not_taken_for_a_slow_rate() {
    let mut estimator = Estimator::default();
    let first = Dump {
        bytes: 20 * MB,
        took: Duration::from_secs(5),
    };
    estimator.dumped(first);
    let small = Situation {
        memory: Some(MB),
        last_dump: Some(first),
        ..situation()
    };
    let plan = plan(&small, estimator.costs());
    assert_eq!(plan.pre_dumps, Some(PreDumps::TooSmall), "{plan}");
}

#[test]
fn the_first_dumps_of_a_slow_host_take_the_place_of_what_was_believed() {
    let mut estimator = Estimator::default();
    let of = |bytes: u64| Dump {
        bytes,
        took: Duration::from_millis(900) + Duration::from_secs_f64(bytes as f64 / 80e6),
    };
    estimator.dumped(of(MB / 2));
    estimator.dumped(of(64 * MB));
    let costs = estimator.costs();
    assert!(
        (850..950).contains(&costs.dump_start.as_millis()),
        "{costs:?}"
    );
    assert!((70e6..90e6).contains(&costs.dump_rate), "{costs:?}");
}

#[test]
fn a_slow_host_takes_pre_dumps_of_a_large_dump_too() {
    let mut estimator = Estimator::default();
    let of = |bytes: u64| Dump {
        bytes,
        took: Duration::from_secs(4) + Duration::from_secs_f64(bytes as f64 / 2e6),
    };
    estimator.dumped(of(MB / 2));
    estimator.dumped(of(24 * MB));
    estimator.drained(24 * MB, MB, Duration::from_secs(24));
    let large = Situation {
        memory: Some(24 * MB),
        last_dump: Some(of(24 * MB)),
        wait: Duration::from_secs(80),
        tokens: None,
        ..situation()
    };
    let plan = plan(&large, estimator.costs());
    assert!(plan.pre_dumps() > 0, "{plan}");
    assert!(plan.frozen < Duration::from_secs(8), "{plan}");
}
