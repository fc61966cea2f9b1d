//! Whatever clients ask for, and whenever processes end: nothing panics, nothing stays shut, and
//! every process's events come in order.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{plan::Verb, *};

/// What a call of the runtime comes to.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    Well,
    Fails,
    NoPidFile,
    EndsAtOnce,
}

/// Something that happens. Execs are `e0` to `e2`.
#[derive(Debug, Clone, Copy)]
enum Step {
    Create(Outcome),
    CreateFromImages(Outcome),
    Start(Outcome),
    Exec(u8),
    StartExec(u8, Outcome),
    EndInit,
    EndExec(u8),
    Kill(i32),
    KillExec(u8, i32),
    Pause(Outcome),
    Resume,
    Checkpoint(Outcome),
    Delete(Outcome),
    DeleteExec(u8),
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        6 => Just(Outcome::Well),
        1 => Just(Outcome::Fails),
        1 => Just(Outcome::NoPidFile),
        1 => Just(Outcome::EndsAtOnce),
    ]
}

fn signal() -> impl Strategy<Value = i32> {
    prop_oneof![Just(0), Just(libc::SIGTERM), Just(libc::SIGKILL)]
}

fn step() -> impl Strategy<Value = Step> {
    use Step::*;
    prop_oneof![
        2 => outcome().prop_map(Create),
        1 => outcome().prop_map(CreateFromImages),
        3 => outcome().prop_map(Start),
        4 => (0..3u8).prop_map(Exec),
        6 => (0..3u8, outcome()).prop_map(|(e, o)| StartExec(e, o)),
        1 => Just(EndInit),
        5 => (0..3u8).prop_map(EndExec),
        1 => signal().prop_map(Kill),
        1 => (0..3u8, signal()).prop_map(|(e, s)| KillExec(e, s)),
        1 => outcome().prop_map(Pause),
        2 => Just(Resume),
        2 => outcome().prop_map(Checkpoint),
        1 => outcome().prop_map(Delete),
        2 => (0..3u8).prop_map(DeleteExec),
    ]
}

/// Steps that lead somewhere: a container that runs comes first.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let begin = [Step::Create(Outcome::Well), Step::Start(Outcome::Well)];
    (prop::collection::vec(step(), 1..30), 0..3usize).prop_map(move |(steps, skip)| {
        let begin = begin.into_iter().take(skip);
        begin.chain(steps).collect()
    })
}

impl Bed {
    fn plan(&self, verb: Verb, outcome: Outcome) {
        match outcome {
            Outcome::Well => {}
            Outcome::Fails => self.machine.fail(verb, "as planned"),
            Outcome::NoPidFile => self.machine.forget_pid_file(verb),
            Outcome::EndsAtOnce => self.machine.end_at_once(verb, 77),
        }
    }

    /// A request with a bundle of its own: clients do not share one.
    fn own_request(&self) -> CreateTaskRequest {
        let bundle = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let config = r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"ipc"}]}}"#;
        fs::write(bundle.join("config.json"), config).unwrap();
        CreateTaskRequest {
            id: "c".into(),
            bundle: bundle.to_str().unwrap().into(),
            ..Default::default()
        }
    }

    /// Ends what a client knows by this name, if it has a pid.
    fn end_named(&self, exec_id: &str) {
        if let Ok(state) = self.state("c", exec_id) {
            self.machine.end(state.pid as i32, 1);
        }
    }

    /// Refusals are as good as any other answer.
    fn take(&self, step: Step) {
        use Step::*;
        let name = |e: u8| format!("e{e}");
        match step {
            Create(outcome) => {
                self.plan(Verb::Create, outcome);
                drop(self.create_as(self.own_request()));
            }
            CreateFromImages(outcome) => {
                self.plan(Verb::Restore, outcome);
                let mut request = self.own_request();
                request.checkpoint = self.images();
                drop(self.create_as(request));
            }
            Start(outcome) => {
                self.plan(Verb::Start, outcome);
                drop(self.start("c", ""));
            }
            Exec(e) => drop(self.exec("c", &name(e))),
            StartExec(e, outcome) => {
                self.plan(Verb::Exec, outcome);
                drop(self.start("c", &name(e)));
            }
            EndInit => self.end_named(""),
            EndExec(e) => self.end_named(&name(e)),
            Kill(signal) => drop(self.kill("c", "", signal)),
            KillExec(e, signal) => drop(self.kill("c", &name(e), signal)),
            Pause(outcome) => {
                self.plan(Verb::Freeze, outcome);
                drop(self.pause("c"));
            }
            Resume => drop(self.resume("c")),
            Checkpoint(outcome) => {
                self.plan(Verb::Checkpoint, outcome);
                drop(self.checkpoint("c"));
            }
            Delete(outcome) => {
                self.plan(Verb::Delete, outcome);
                drop(self.delete("c", ""));
            }
            DeleteExec(e) => drop(self.delete("c", &name(e))),
        }
    }

    fn for_random(protected: bool) -> Self {
        let config = format!("enabled = {protected}\ncheckpoint_stops = false\n");
        let bed = Self::with(&config);
        fs::create_dir(bed.path("upper")).unwrap();
        bed.machine.set_upper(&bed.path("upper"));
        bed
    }

    /// Whatever has happened: what lives can be used, and then ended and deleted.
    fn assert_nothing_stays_shut(&self) {
        self.machine.clear_plans();
        let Ok(container) = self.service.container("c") else {
            assert!(self.shutdown());
            return;
        };
        if self.status("c", "") == Status::PAUSED
            && let Err(e) = self.resume("c")
        {
            assert_eq!(self.status("c", ""), Status::STOPPED, "{e}");
        }
        for exec in 0..3 {
            self.end_named(&format!("e{exec}"));
        }
        if self.status("c", "") == Status::RUNNING && self.machine.lives("c") {
            // Neither latch nor gate is shut.
            let probe = self.go(|bed| bed.run_exec("c", "probe"));
            probe.get();
        }
        if self.machine.knows("c") {
            self.machine.end_all("c", 137);
        }
        if container.init.pid() != 0 {
            self.go(|bed| bed.wait("c", "")).get().unwrap();
            assert_eq!(container.doors.inside(), [""; 0]);
        }
        assert!(container.doors.latch(LIMIT).is_some());
        self.go(|bed| bed.delete("c", "")).get().unwrap();
        assert!(self.shutdown());
        assert!(!self.run_dir("c").exists());
    }
}

/// Checks the order of all events of container `c`.
fn assert_order(events: &[String]) {
    let mut init = "";
    let mut execs: BTreeMap<&str, &str> = BTreeMap::new();
    for event in events {
        let mut words = event.split(' ');
        let (Some(what), Some(who)) = (words.next(), words.next()) else {
            panic!("{event:?}");
        };
        let ok = match (what, who.strip_prefix("c/")) {
            ("create", _) => matches!(init, "" | "delete"),
            ("start", _) => init == "create",
            ("exit", None) => {
                !execs.values().any(|e| *e == "started") && matches!(init, "create" | "start")
            }
            ("delete", _) => init == "exit" || init == "create",
            ("added", Some(e)) => {
                let before = execs.get(e).copied();
                before != Some("started") && matches!(init, "create" | "start")
            }
            ("started", Some(e)) => {
                execs.get(e) == Some(&"added") && matches!(init, "create" | "start")
            }
            ("exit", Some(e)) => execs.get(e) == Some(&"started"),
            ("paused" | "resumed", _) => init == "start",
            ("checkpointed", _) => init != "delete",
            _ => false,
        };
        assert!(ok, "{event:?} in {events:#?}");
        match who.strip_prefix("c/") {
            Some(e) => drop(execs.insert(e, what)),
            None if matches!(what, "create" | "start" | "exit" | "delete") => {
                init = what;
                if what == "create" {
                    execs.clear();
                }
            }
            None => {}
        }
    }
}

proptest! {
    // Each is a container's life: half as many as usual.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 2))]

    #[test]
    fn nothing_stays_shut_and_events_keep_their_order(
        steps in steps(),
        protected in any::<bool>(),
    ) {
        let bed = Bed::for_random(protected);
        for step in steps {
            bed.go(move |bed| bed.take(step)).get();
        }
        bed.assert_nothing_stays_shut();
        assert_order(&bed.events());
    }

    #[test]
    fn the_same_holds_with_three_clients_at_once(
        clients in prop::array::uniform3(steps()),
        protected in any::<bool>(),
    ) {
        let bed = Bed::for_random(protected);
        let clients = clients.map(|steps| {
            bed.go(move |bed| steps.into_iter().for_each(|step| bed.take(step)))
        });
        clients.into_iter().for_each(Call::get);
        bed.assert_nothing_stays_shut();
        assert_order(&bed.events());
    }
}
