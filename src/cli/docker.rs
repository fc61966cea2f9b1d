//! What only Docker knows: its names.

use std::process::Command;

/// The id of the container that Docker knows under this name, if there is a Docker and it does.
pub(super) fn id_of(name: &str) -> Option<String> {
    let mut command = Command::new("docker");
    command.args([
        "inspect",
        "--type",
        "container",
        "--format",
        "{{.Id}}",
        "--",
        name,
    ]);
    let output = command.output().ok().filter(|o| o.status.success())?;
    let id = String::from_utf8(output.stdout).ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}
