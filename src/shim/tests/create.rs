//! Create: what it makes, and that a failure leaves nothing of it.

use containerd_shim::protos::types::mount::Mount;

use super::{plan::Verb, *};

impl Bed {
    /// A request that takes every step of Create.
    fn full_request(&self, id: &str) -> CreateTaskRequest {
        let mut request = self.request_with(id, &["pid", "network"]);
        request.rootfs.push(Mount {
            type_: "overlay".into(),
            ..Default::default()
        });
        request
    }

    /// Checks that nothing is left of container `c`, and that its name can be used.
    fn assert_undone(&self, step: &str) {
        assert!(!self.run_dir("c").exists(), "{step}");
        assert!(!self.machine.knows("c"), "{step}");
        assert_eq!(code(self.state("c", "")), Code::NOT_FOUND, "{step}");
        assert_eq!(self.events(), [""; 0], "{step}");
        assert!(self.shutdown(), "{step}");
        self.create_as(self.full_request("c")).unwrap();
    }
}

#[test]
fn a_container_is_made_step_by_step() {
    let bed = Bed::new();
    bed.create_as(bed.full_request("c")).unwrap();
    let bundle = bed.path("bundles/c");
    let netns = bed.run_dir("c").join("netns");
    assert_eq!(
        bed.machine.calls(),
        [
            format!("mount 1 {}", bundle.join("rootfs").display()),
            format!("netns {}", netns.display()),
            "create c".into(),
        ]
    );
    let config = fs::read_to_string(bundle.join("config.json")).unwrap();
    assert!(config.contains(netns.to_str().unwrap()), "{config}");
    // What the shim's successor must know to clean up.
    let remains = fs::read_to_string(bed.run_dir("c").join("remains.json")).unwrap();
    assert!(remains.contains("bundles/c/rootfs"), "{remains}");
}

#[test]
fn a_create_that_fails_at_any_step_leaves_nothing() {
    let cases: [(Verb, &str, bool, bool); 4] = [
        (Verb::Mount, "mount root file system", false, false),
        (Verb::Netns, "network namespace", true, false),
        (Verb::Create, "fake create failed", true, true),
        (Verb::Cgroup, "/sys/fs/cgroup/fake", true, true),
    ];
    for (verb, step, mounted, created) in cases {
        let bed = Bed::new();
        bed.machine.fail(verb, "the reason");
        let answer = bed.create_as(bed.full_request("c"));
        assert_names(answer, Code::UNKNOWN, &["test/c", step, "the reason"]);
        assert_eq!(bed.machine.count("unmount"), usize::from(mounted), "{step}");
        let discarded = bed.machine.count("delete --force c");
        assert_eq!(discarded, usize::from(created), "{step}");
        bed.assert_undone(step);
    }
}

#[test]
fn a_runtime_that_says_no_pid_is_a_failure() {
    let bed = Bed::new();
    bed.machine.forget_pid_file(Verb::Create);
    let answer = bed.create_as(bed.full_request("c"));
    assert_names(answer, Code::UNKNOWN, &["test/c", "init.pid"]);
    assert_eq!(bed.machine.count("delete --force c"), 1);
    assert_eq!(bed.machine.count("unmount"), 1);
    bed.assert_undone("pid file");
}

#[test]
fn a_container_without_a_place_for_its_output_is_refused() {
    let bed = Bed::new();
    let mut request = bed.full_request("c");
    request.stdout = "/nowhere/stdout".into();
    let words = ["test/c", "stdout", "/nowhere/stdout"];
    assert_names(bed.create_as(request), Code::UNKNOWN, &words);
    assert_eq!(bed.machine.count("create"), 0);
    bed.assert_undone("stdio");
}

#[test]
fn a_bundle_that_cannot_be_understood_is_named() {
    let bed = Bed::new();
    let request = bed.request("c");
    let config = bed.path("bundles/c/config.json");
    fs::write(&config, "{").unwrap();
    let words = ["test/c", config.to_str().unwrap()];
    assert_names(bed.create_as(request.clone()), Code::UNKNOWN, &words);
    fs::remove_file(&config).unwrap();
    assert_names(bed.create_as(request), Code::UNKNOWN, &words);
    let mut request = bed.request("c");
    request.bundle = "bundles/c".into();
    let words = ["test/c", "no absolute path"];
    assert_names(bed.create_as(request), Code::INVALID_ARGUMENT, &words);
    bed.assert_undone("bundle");
}

#[test]
fn a_wrong_setting_is_refused_by_place_and_key() {
    let bed = Bed::new();
    let request = bed.request("c");
    let config = r#"{"annotations":{"dev.crab.gate":"shut"}}"#;
    fs::write(bed.path("bundles/c/config.json"), config).unwrap();
    let words = ["test/c", "dev.crab.gate", "strict"];
    assert_names(bed.create_as(request), Code::INVALID_ARGUMENT, &words);
    bed.assert_undone("annotation");

    let bed = Bed::with("colour = 3\n");
    let words = ["test/c", "config.toml", "colour"];
    assert_names(bed.create("c"), Code::INVALID_ARGUMENT, &words);
}

#[test]
fn images_that_are_no_checkpoint_fail_the_start_and_not_the_shim() {
    let bed = Bed::new();
    let mut request = bed.request("c");
    request.checkpoint = bed.path("nothing").to_str().unwrap().into();
    bed.create_as(request).unwrap();
    assert_names(
        bed.start("c", ""),
        Code::UNKNOWN,
        &["test/c", "restore from", "nothing"],
    );
    assert_eq!(bed.machine.calls(), [""; 0]);
    bed.delete("c", "").unwrap();
    assert!(bed.shutdown());
}
