use std::{iter, path::Path};

use containerd_shim::protos::shim::oci::Options as RuncOptions;
use proptest::prelude::*;
use protobuf::{CodedOutputStream, Message};

use super::*;

const NO_FILE: &str = "/nonexistent/crab.toml";

/// `runtimeoptions.v1.Options`, encoded by hand.
fn generic(path: &str, body: &[u8]) -> Any {
    let mut value = Vec::new();
    let mut out = CodedOutputStream::vec(&mut value);
    out.write_string(1, "io.containerd.crab.v2").unwrap();
    if !path.is_empty() {
        out.write_string(2, path).unwrap();
    }
    out.write_bytes(3, body).unwrap();
    out.flush().unwrap();
    drop(out);
    any("runtimeoptions.v1.Options", value)
}

fn any(type_url: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value,
        ..Any::default()
    }
}

fn from_options(options: &Any) -> Result<Config, ConfigError> {
    Config::load(Path::new(NO_FILE), Some(options), iter::empty())
}

fn from_body(body: &str) -> Result<Config, ConfigError> {
    from_options(&generic("", body.as_bytes()))
}

fn from_annotation(key: &str, value: &str) -> Result<Config, ConfigError> {
    Config::load(Path::new(NO_FILE), None, [(key, value)].into_iter())
}

fn error(result: Result<Config, ConfigError>) -> String {
    result.unwrap_err().to_string()
}

/// The example with the `#` taken from every key.
fn example() -> String {
    include_str!("../../shim-config/crab.toml")
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn the_example_holds_every_key_and_its_default() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("crab.toml");
    fs::write(&file, example()).unwrap();
    let config = Config::load(&file, None, iter::empty()).unwrap();
    assert_eq!(config, Config::default());

    let text = example();
    let keys = text.lines().filter_map(|line| line.split_once(" = "));
    let keys: std::collections::BTreeSet<&str> = keys.map(|(key, _)| key).collect();
    assert_eq!(keys, schema::keys().collect());
}

#[test]
fn every_key_is_read() {
    let config = from_body(
        r#"
        enabled = true
        runtime = "/usr/local/bin/crun"
        root = "/run/x"
        systemd_cgroup = true
        no_pivot_root = true
        no_new_keyring = true
        shim_cgroup = "/shims"
        io_uid = 1000
        io_gid = 4294967295
        criu_image_path = "/a"
        criu_work_path = "/b"
        store = "/srv/crab"
        keep = 100000
        checkpoint_stops = false
        orphan_output = "discard"
        gate = "async"
        skip_unchanged = false
        consistent_cut = false
        incremental = true
        pre_dumps = "2"
        timer = "24h"
        view = true
        not_turns = ["/bin/health *", "true"]
        tcp = "keep"
        recover = "last"
        exec_linger = "250ms"
        dump_timeout = "10m"
        sandbox_limit = "2GiB"
        store_limit = "1TB"
        engine.rate = "200MB/s"
        engine.burst = "1GB"
        engine.dumps = 1024
        engine.undrained = "1MiB"
        "#,
    )
    .unwrap();
    let want = Config {
        enabled: true,
        runtime: "/usr/local/bin/crun".into(),
        root: "/run/x".into(),
        systemd_cgroup: true,
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: Some("/shims".to_owned()),
        io_uid: 1000,
        io_gid: u32::MAX,
        criu_image_path: Some("/a".into()),
        criu_work_path: Some("/b".into()),
        store: "/srv/crab".into(),
        keep: 100_000,
        sandbox_limit: Some(2 << 30),
        store_limit: Some(1_000_000_000_000),
        checkpoint_stops: false,
        orphan_output: OrphanOutput::Discard,
        gate: Gate::Async,
        skip_unchanged: false,
        consistent_cut: false,
        incremental: Incremental::Always,
        pre_dumps: Some(2),
        timer: Some(Duration::from_secs(24 * 60 * 60)),
        view: true,
        not_turns: vec![
            Pattern("/bin/health *".to_owned()),
            Pattern("true".to_owned()),
        ],
        tcp: Tcp::Keep,
        recover: Recover::Last,
        exec_linger: Duration::from_millis(250),
        dump_timeout: Duration::from_secs(600),
        engine: Engine {
            rate: NonZeroU64::new(200_000_000),
            burst: 1_000_000_000,
            dumps: 1024,
            undrained: 1 << 20,
        },
    };
    assert_eq!(config, want);
}

#[test]
fn the_later_place_wins() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    fs::write(&file, "keep = 1\ngate = \"off\"\ntcp = \"keep\"\n").unwrap();
    let options = generic("", b"keep = 2\ngate = \"async\"\n");
    let annotations = [
        ("io.kubernetes.cri.container-type", "sandbox"),
        ("dev.crab.keep", "3"),
        ("dev.crab.enabled", "true"),
    ];
    let config = Config::load(&file, Some(&options), annotations.into_iter()).unwrap();
    assert_eq!(
        (config.keep, config.gate, config.tcp, config.enabled),
        (3, Gate::Async, Tcp::Keep, true)
    );
}

#[test]
fn a_bad_setting_is_named_with_what_would_be_right() {
    for (body, want) in [
        (
            "gates = 1",
            "runtime options: unknown key \"gates\"; did you mean \"gate\"?",
        ),
        (
            "exec-linger = \"1s\"",
            "runtime options: unknown key \"exec-linger\"; did you mean \"exec_linger\"?",
        ),
        ("colour = 1", "runtime options: unknown key \"colour\""),
        (
            "[gate]\nx = 1",
            "runtime options: gate: found a table, expected \"strict\", \"async\" or \"off\"",
        ),
        (
            "gate = \"sync\"",
            "runtime options: gate: found \"sync\", expected \"strict\", \"async\" or \"off\"; \
             did you mean \"async\"?",
        ),
        (
            "tcp = \"maybe\"",
            "runtime options: tcp: found \"maybe\", expected \"close\" or \"keep\"",
        ),
        (
            "enabled = \"yes\"",
            "runtime options: enabled: found \"yes\", expected true or false",
        ),
        (
            "incremental = \"yes\"",
            "runtime options: incremental: found \"yes\", expected \"auto\", true or false",
        ),
        (
            "keep = 0",
            "runtime options: keep: found the number 0, expected a whole number from 1 to 100000",
        ),
        (
            "keep = 2.5",
            "runtime options: keep: found the number 2.5, expected a whole number from 1 to 100000",
        ),
        (
            "exec_linger = 10",
            "runtime options: exec_linger: found the number 10, expected a duration from \"0ms\" \
             to \"60s\"",
        ),
        (
            "exec_linger = \"10\"",
            "runtime options: exec_linger: found \"10\", expected a duration from \"0ms\" to \
             \"60s\": the unit is missing (units: ms, s, m, h)",
        ),
        (
            "exec_linger = \"61s\"",
            "runtime options: exec_linger: found \"61s\", expected a duration from \"0ms\" to \
             \"60s\"",
        ),
        (
            "store_limit = \"1000\"",
            "runtime options: store_limit: found \"1000\", expected a size of at least 1MiB, such as \
             \"20GiB\": the unit is missing (units: B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)",
        ),
        (
            "dump_timeout = \"10ms\"",
            "runtime options: dump_timeout: found \"10ms\", expected a duration from \"1s\" to \
             \"10m\"",
        ),
        (
            "engine.rate = \"fast\"",
            "runtime options: engine.rate: found \"fast\", expected \"unlimited\", or a size of at \
             least 1MiB for each second, such as \"200MB\": it does not start with a number",
        ),
        (
            "[engine]\nrate = \"1kB\"",
            "runtime options: engine.rate: found \"1kB\", expected \"unlimited\", or a size of at \
             least 1MiB for each second, such as \"200MB\"",
        ),
        (
            "engine.dumps = 1025",
            "runtime options: engine.dumps: found the number 1025, expected a whole number from 0 to \
             1024",
        ),
        (
            "engine.burts = \"1MiB\"",
            "runtime options: unknown key \"engine.burts\"; did you mean \"engine.burst\"?",
        ),
        ("engine = 5", "runtime options: unknown key \"engine\""),
        (
            "store = \"crab\"",
            "runtime options: store: found \"crab\", expected an absolute path",
        ),
        (
            "runtime = \"./runc\"",
            "runtime options: runtime: found \"./runc\", expected \"runc\", \"crun\", another \
             name on PATH or an absolute path",
        ),
        (
            "not_turns = \"x\"",
            "runtime options: not_turns: found \"x\", expected a list of patterns such as \
             [\"*/healthcheck *\"]",
        ),
        (
            "not_turns = [1]",
            "runtime options: not_turns: found the number 1, expected a list of patterns such as \
             [\"*/healthcheck *\"]",
        ),
        (
            "keep = 1\nkeep = 2",
            "runtime options: line 2 is not TOML: duplicate key",
        ),
        (
            "SystemdCgroup = 3",
            "runtime options: systemd_cgroup: found the number 3, expected true or false",
        ),
    ] {
        assert_eq!(error(from_body(body)), want, "{body}");
    }
}

#[test]
fn an_annotation_is_read_as_its_key_wants_it() {
    let turns = |value| {
        from_annotation("dev.crab.not_turns", value)
            .unwrap()
            .not_turns
    };
    assert_eq!(turns("a, b *"), [Pattern("a, b *".to_owned())]);
    assert_eq!(
        turns(r#" ["a", "b"] "#),
        [Pattern("a".to_owned()), Pattern("b".to_owned())]
    );
    let linger = from_annotation("dev.crab.exec_linger", "2s").unwrap();
    assert_eq!(linger.exec_linger, Duration::from_secs(2));
    for (value, want) in [
        ("auto", Incremental::Auto),
        ("true", Incremental::Always),
        ("false", Incremental::Never),
    ] {
        let read = from_annotation("dev.crab.incremental", value).unwrap();
        assert_eq!(read.incremental, want, "{value}");
    }
    // Somebody else's.
    assert!(from_annotation("dev.crabs.x", "1").is_ok());

    for (key, value, want) in [
        (
            "dev.crab.enabled",
            "yes",
            "annotation dev.crab.enabled: found \"yes\", expected true or false",
        ),
        (
            "dev.crab.keep",
            "many",
            "annotation dev.crab.keep: found \"many\", expected a whole number from 1 to 100000",
        ),
        (
            "dev.crab.enable",
            "true",
            "annotation dev.crab.enable: unknown key \"enable\"; did you mean \"enabled\"?",
        ),
        (
            "dev.crab.not_turns",
            "[\"a\"]\nruntime = \"/evil\"",
            "annotation dev.crab.not_turns: found \"[\\\"a\\\"]\\nruntime = \\\"/evil\\\"\", \
             expected a list of patterns such as [\"*/healthcheck *\"]",
        ),
    ] {
        assert_eq!(error(from_annotation(key, value)), want);
    }
}

#[test]
fn a_container_cannot_configure_its_host() {
    for key in [
        "runtime",
        "root",
        "systemd_cgroup",
        "no_pivot_root",
        "no_new_keyring",
        "shim_cgroup",
        "io_uid",
        "io_gid",
        "criu_image_path",
        "criu_work_path",
        "store",
    ] {
        assert_eq!(
            error(from_annotation(&format!("dev.crab.{key}"), "/tmp/evil")),
            format!(
                "annotation dev.crab.{key}: only the host can set this, in \
                 /etc/crab/config.toml or the runtime options"
            )
        );
    }
}

#[test]
fn runc_options_keep_their_meaning() {
    let options = RuncOptions {
        binary_name: "/opt/runc".to_owned(),
        systemd_cgroup: true,
        io_uid: 7,
        criu_work_path: "/w".to_owned(),
        ..RuncOptions::default()
    };
    let want = Config {
        runtime: "/opt/runc".into(),
        systemd_cgroup: true,
        io_uid: 7,
        criu_work_path: Some("/w".into()),
        ..Config::default()
    };
    for url in [
        "containerd.runc.v1.Options",
        "types.containerd.io/containerd.runc.v1.Options",
    ] {
        let any = any(url, options.write_to_bytes().unwrap());
        assert_eq!(from_options(&any).unwrap(), want);
    }
    // The same table in a Kubernetes configuration, as `containerd config default` prints it.
    let body = r#"
        TypeUrl = ""
        BinaryName = "/opt/runc"
        CriuImagePath = ""
        CriuPath = ""
        CriuWorkPath = "/w"
        IoGid = 0
        IoUid = 7
        NoNewKeyring = false
        Root = ""
        SystemdCgroup = true
    "#;
    assert_eq!(from_body(body).unwrap(), want);
}

#[test]
fn generic_options_come_under_several_names() {
    for url in [
        "runtimeoptions.v1.Options",
        "types.containerd.io/runtimeoptions.v1.Options",
        "cri.runtimeoptions.v1.Options",
    ] {
        let any = any(url, generic("", b"keep = 4").value);
        assert_eq!(from_options(&any).unwrap().keep, 4, "{url}");
    }
    assert_eq!(from_options(&Any::default()).unwrap(), Config::default());
    assert_eq!(
        error(from_options(&any("x/io.y.Options", vec![]))),
        "runtime options: found options of type \"io.y.Options\", expected \
         runtimeoptions.v1.Options or containerd.runc.v1.Options"
    );
}

#[test]
fn a_config_path_is_read_and_must_exist() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("crab.toml");
    fs::write(&file, "keep = 5\n").unwrap();
    let path = file.to_str().unwrap();
    // As containerd's api.proto says, the body is used only without a path.
    let config = from_options(&generic(path, b"keep = 6")).unwrap();
    assert_eq!(config.keep, 5);

    fs::write(&file, "keep = 0\n").unwrap();
    assert_eq!(
        error(from_options(&generic(path, b""))),
        format!(
            "{path} (config_path of the runtime options): keep: found the number 0, expected a \
             whole number from 1 to 100000"
        )
    );
    assert_eq!(
        error(from_options(&generic("/nonexistent/x.toml", b""))),
        "/nonexistent/x.toml (config_path of the runtime options): cannot read it: No such file \
         or directory (os error 2)"
    );
    assert_eq!(
        error(from_options(&generic("x.toml", b""))),
        "runtime options: found the config_path \"x.toml\", expected an absolute path"
    );
}

#[test]
fn the_file_may_be_missing_but_not_unreadable() {
    assert_eq!(
        Config::load(Path::new(NO_FILE), None, iter::empty()).unwrap(),
        Config::default()
    );
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        error(Config::load(dir.path(), None, iter::empty())),
        format!(
            "{}: cannot read it: Is a directory (os error 21)",
            dir.path().display()
        )
    );
}

#[test]
fn a_pattern_takes_the_whole_command_line() {
    let config = Config {
        not_turns: vec![
            Pattern("*/healthcheck*".to_owned()),
            Pattern("sh -c pg_is?ready".to_owned()),
        ],
        ..Config::default()
    };
    let is_turn = |line: &str| {
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        config.is_turn(&args)
    };
    assert!(!is_turn("/usr/bin/healthcheck --fast"));
    assert!(!is_turn("sh -c pg_is-ready"));
    assert!(is_turn("sh -c pg_isready"));
    assert!(is_turn("sh -c pg_is-ready now"));
    assert!(is_turn("healthcheck"));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>, text: String, key: String) {
        for url in ["runtimeoptions.v1.Options", "containerd.runc.v1.Options", &key] {
            let _ = from_options(&any(url, bytes.clone()));
        }
        let _ = from_options(&generic("", &bytes));
        let _ = from_body(&text);
        let _ = from_annotation(&format!("dev.crab.{key}"), &text);
    }

    #[test]
    fn no_value_of_any_key_makes_it_panic(
        key in proptest::sample::select(schema::keys().collect::<Vec<_>>()),
        value in r#"-?[0-9]{0,25}(ms|s|m|h|\.5)?|"[0-9a-z/*]{0,30}"|\[.{0,8}\]|\PC{0,20}"#,
    ) {
        let _ = from_body(&format!("{key} = {value}"));
        let _ = from_body(&format!("{key} = \"{value}\""));
        let _ = from_annotation(&format!("dev.crab.{key}"), &value);
    }

    #[test]
    fn a_pattern_without_wildcards_is_the_text(text in "[a-z/ ]{0,20}", other in "[a-z/ ]{0,20}") {
        prop_assert_eq!(schema::glob(&text, &other), text == other);
        let (pattern, around) = (format!("*{text}*"), format!("{other}{text}{other}"));
        prop_assert!(schema::glob(&pattern, &around));
        prop_assert!(schema::glob(&"?".repeat(text.len()), &text));
    }
}
