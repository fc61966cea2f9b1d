"""What a user copies from shim-config/ is loaded by the real programs."""

import json
import pathlib
import subprocess

from harness import BUNDLES, CONFIG, CRAB, LIMIT, Ctr, ctr, run, unique, until

SHIM_CONFIG = pathlib.Path("/src/shim-config")


def test_crab_reads_its_example(config):
    text = (SHIM_CONFIG / "crab.toml").read_text()
    # Every setting is commented out: with the # gone they are what a user would write.
    settings = "\n".join(line[1:] if line.startswith("#") and " = " in line and line[1] != " " else line
                         for line in text.splitlines())
    assert settings != text
    config(settings)
    with Ctr(CRAB) as c:
        assert c.sh("echo hi") == "hi\n"
    run("crab", "ps")


def test_containerd_knows_the_runtime_that_its_example_names():
    shown = run("containerd", "--config", SHIM_CONFIG / "containerd.toml", "config", "dump").out
    runtime = shown[shown.index("runtimes.crab]"):]
    runtime = runtime[:runtime.index("runtimes.", 1)] if "runtimes." in runtime[1:] else runtime
    assert f'runtime_type = "{CRAB}"' in runtime
    assert 'pod_annotations = ["dev.crab.*"]' in runtime and 'container_annotations = ["dev.crab.*"]' in runtime
    # A file that it names must exist, and nobody has made one yet.
    assert 'ConfigPath = "/' not in runtime


def test_dockerd_accepts_its_example_and_runs_containers_with_it(tmp_path):
    daemon = SHIM_CONFIG / "daemon.json"
    assert "runtimes" in json.loads(daemon.read_text())
    said = run("dockerd", "--validate", "--config-file", daemon)
    assert "configuration OK" in said.out + said.err
    # A daemon of its own with this very file, on a host where nobody has configured crab.
    assert not CONFIG.exists()
    # So long that with a container's id it is longer than a socket's path may be.
    name = unique("docker-of-a-long-name")
    root, socket = pathlib.Path("/var/lib/docker") / name, tmp_path / "docker.sock"
    root.mkdir(mode=0o711)
    server = subprocess.Popen(
        ["dockerd", "--config-file", daemon, "--host", f"unix://{socket}", "--data-root", root, "--exec-root", tmp_path / "e",
         "--pidfile", tmp_path / "pid", "--iptables=false", "--bridge=none", "--storage-driver", "overlay2",
         "--containerd", "/run/containerd/containerd.sock", "--containerd-namespace", name,
         "--containerd-plugins-namespace", name + "-plugins"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    client = ["docker", "--host", f"unix://{socket}"]
    try:
        until(lambda: run(*client, "version", check=False).rc == 0, "the second dockerd answers")
        saved = tmp_path / "image.tar"
        ctr("image", "export", saved, "crab.test/agent:latest")
        run(*client, "load", "--input", saved, limit=120)
        done = run(*client, "run", "--rm", "--runtime", "crab", "--network", "none", "crab.test/agent:latest", "echo", "hi")
        assert done.out == "hi\n"
        done = run(*client, "run", "--rm", "--tty", "--runtime", "crab", "--network", "none", "crab.test/agent:latest", "tty")
        assert done.out == "/dev/pts/0\r\n"
        assert "true" in run(*client, "info", "--format", "{{.ExperimentalBuild}}").out
    finally:
        run(*client, "system", "prune", "--all", "--force", check=False)
        server.terminate()
        server.wait(LIMIT)
        run("rm", "-rf", root)
        for space in (name, name + "-plugins"):
            for kind in ("leases", "content"):
                listed = run("ctr", "-n", space, kind, "ls", "--quiet", check=False).out.split()
                if listed:
                    run("ctr", "-n", space, kind, "rm", *listed, check=False)
            ctr("namespaces", "rm", space, check=False)
        # A directory for each namespace stays with both shims.
        for parent in (BUNDLES, "/run/crab/runc", "/run/crab/s"):
            (pathlib.Path(parent) / name).rmdir()


def test_the_runtime_class_names_the_handler_of_the_containerd_example():
    text = (SHIM_CONFIG / "runtimeclass.yaml").read_text()
    handler = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("handler:"))
    assert f"runtimes.{handler}]" in (SHIM_CONFIG / "containerd.toml").read_text()
