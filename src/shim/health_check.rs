//! Docker's health check, an exec that is no turn (D3).
//!
//! containerd's request does not tell it from other execs. Its command is in Docker's own file of
//! the container, which lies beside the `hostname` that Docker binds into it.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::spec::Spec;

const HOSTNAME: &str = "/etc/hostname";
const CONFIG: &str = "config.v2.json";
/// Docker's files are some 10 KiB.
const MAX_CONFIG: u64 = 16 << 20;
/// What Docker takes unless the image names another shell.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Docker {
    config: Config,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Config {
    healthcheck: Option<HealthCheck>,
    shell: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct HealthCheck {
    test: Option<Vec<String>>,
}

/// The arguments of the container's health check; none if it has none, or is not Docker's.
pub fn of(spec: &Spec) -> Option<Vec<String>> {
    let path = config_file(spec)?;
    let mut text = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(MAX_CONFIG).read_to_end(&mut text));
    if let Err(e) = read {
        log::debug!("{}: {e}", path.display());
        return None;
    }
    let docker: Docker = serde_json::from_slice(&text)
        .inspect_err(|e| log::warn!("health checks will count as turns: {}: {e}", path.display()))
        .ok()?;
    arguments(docker.config)
}

fn config_file(spec: &Spec) -> Option<PathBuf> {
    let hostname = spec.bound_from(Path::new(HOSTNAME))?;
    let beside = hostname.file_name()? == "hostname";
    beside.then(|| hostname.with_file_name(CONFIG))
}

fn arguments(config: Config) -> Option<Vec<String>> {
    let test = config.healthcheck?.test?;
    let (kind, words) = test.split_first()?;
    match kind.as_str() {
        "CMD" => Some(words.to_vec()),
        "CMD-SHELL" => {
            let shell = config.shell.filter(|shell| !shell.is_empty());
            let mut all = shell.unwrap_or_else(|| SHELL.map(str::to_owned).to_vec());
            all.extend_from_slice(words);
            Some(all)
        }
        // NONE: the image's own is switched off.
        _ => None,
    }
    .filter(|words| !words.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(config: &str) -> Option<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG), config).unwrap();
        let hostname = dir.path().join("hostname");
        let spec = serde_json::json!({ "mounts": [
            { "destination": "/etc/hosts", "source": "/elsewhere/hosts" },
            { "destination": HOSTNAME, "source": hostname },
        ]});
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        of(&Spec::load(dir.path()).unwrap())
    }

    #[test]
    fn the_command_is_what_docker_runs() {
        let with = |rest: &str| check(&format!("{{\"Config\":{{{rest}}},\"ID\":\"x\"}}"));
        let words = |words: &[&str]| Some(words.iter().map(|w| (*w).to_owned()).collect());
        assert_eq!(
            with(r#""Healthcheck":{"Test":["CMD","curl","-f","http://x"]}"#),
            words(&["curl", "-f", "http://x"])
        );
        assert_eq!(
            with(r#""Healthcheck":{"Test":["CMD-SHELL","true || false"]}"#),
            words(&["/bin/sh", "-c", "true || false"])
        );
        assert_eq!(
            with(r#""Shell":["/bin/bash","-ec"],"Healthcheck":{"Test":["CMD-SHELL","true"]}"#),
            words(&["/bin/bash", "-ec", "true"])
        );
        for none in [
            r#""Healthcheck":{"Test":["NONE"]}"#,
            r#""Healthcheck":{"Test":["CMD"]}"#,
            r#""Healthcheck":{"Test":[]}"#,
            r#""Healthcheck":null"#,
            r#""Healthcheck":{"Test":null,"Interval":5}"#,
            "",
        ] {
            assert_eq!(with(none), None, "{none}");
        }
        assert_eq!(check("no JSON"), None);
    }

    #[test]
    fn who_is_not_dockers_has_none() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(of(&Spec::load(dir.path()).unwrap()), None);
    }
}
