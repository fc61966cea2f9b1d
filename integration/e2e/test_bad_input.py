"""What is wrong is refused with an error that names the cause, and nothing is left of it."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

from harness import BUNDLES, CRAB, IMAGE, LIMIT, Ctr, Docker, collect_garbage, ctr, docker, docker_start_from, run, unique, until
from taskapi import PROCESS, RESOURCES, Refused, Shim, any_of, make_bundle


def refuse(*command, options=()):
    """Tries to run a container; returns the error."""
    id = unique("bad")
    done = ctr("run", "--rm", "--runtime", CRAB, *options, IMAGE, id, *(command or ("true",)), check=False)
    ctr("task", "delete", "--force", id, check=False)
    ctr("container", "delete", id, check=False)
    assert done.rc != 0, done
    return done.err


@pytest.fixture(scope="module")
def shared():
    container = Ctr(CRAB)
    yield container
    container.remove()


@pytest.fixture
def shim(shared):
    with Shim.of(shared) as shim:
        yield shim


def refused(shim, method, fields):
    with pytest.raises(Refused) as e:
        shim.call(method, fields)
    return e.value


# configuration


@pytest.mark.parametrize(
    "text,words",
    [
        ("enabeld = true\n", ["/etc/crab/config.toml", "enabeld", "enabled"]),
        ('keep = "many"\n', ["/etc/crab/config.toml", "keep"]),
        ('exec_linger = "10 parsecs"\n', ["/etc/crab/config.toml", "exec_linger", "10 parsecs"]),
        ("enabled = \n", ["/etc/crab/config.toml"]),
        ('runtime = "/no/such/runc"\n', ["/no/such/runc"]),
        ('runtime = "/etc/hostname"\n', ["/etc/hostname"]),
        ('runtime = "false"\n', ["false create"]),
    ],
)
def test_a_wrong_configuration_is_named(config, text, words):
    config(text)
    error = refuse()
    for word in words:
        assert word in error, error


@pytest.mark.parametrize(
    "annotation,words",
    [
        ("dev.crab.enabeld=true", ["dev.crab.enabeld"]),
        ("dev.crab.enabled=perhaps", ["dev.crab.enabled", "perhaps"]),
        ("dev.crab.runtime=/bin/evil", ["dev.crab.runtime"]),
        ("dev.crab.gate=open", ["dev.crab.gate", "strict"]),
    ],
)
def test_a_wrong_annotation_is_named(annotation, words):
    error = refuse(options=["--annotation", annotation])
    for word in words:
        assert word in error, error


def test_docker_shows_what_is_wrong_as_well():
    argv = ["run", "--rm", "--runtime", CRAB, "--network", "none", "--annotation", "dev.crab.enabeld=true", IMAGE, "true"]
    done = docker(*argv, check=False)
    assert done.rc != 0 and "dev.crab.enabeld" in done.err


# what a container is made of


def spec_of(shared):
    return json.loads((shared.bundle / "config.json").read_text())


def test_a_broken_config_json_is_named(shim, shared, tmp_path):
    for n, text in enumerate(("{", "[]", "", '{"linux": 7}', "\0" * 100)):
        bundle = make_bundle(tmp_path / str(n), text)
        error = refused(shim, "Create", {1: unique("bad"), 2: str(bundle)})
        assert "config.json" in error.message, error


def test_a_bundle_that_is_not_there_is_named(shim, tmp_path):
    error = refused(shim, "Create", {1: unique("bad"), 2: f"{tmp_path}/nowhere"})
    assert "nowhere" in error.message
    assert refused(shim, "Create", {1: unique("bad"), 2: "relative"}).kind == "invalid argument"


def test_a_shim_that_cannot_start_says_why(tmp_path):
    bundle = make_bundle(tmp_path / "b", "{")
    with pytest.raises(AssertionError, match="config.json"):
        Shim.start(bundle, unique("bad"))


def test_a_root_file_system_that_cannot_be_mounted_is_named(shim, shared, tmp_path):
    mounts = {
        "lowerdir=/no/such/layer": {1: "overlay", 2: "overlay", 4: ["lowerdir=/no/such/layer", f"upperdir={tmp_path}/u", f"workdir={tmp_path}/w"]},
        "/no/such/dir": {1: "bind", 2: "/no/such/dir", 4: ["rbind"]},
        "no-such-fs": {1: "no-such-fs", 2: "none"},
    }
    for n, (word, mount) in enumerate(mounts.items()):
        bundle = make_bundle(tmp_path / str(n), spec_of(shared))
        error = refused(shim, "Create", {1: unique("bad"), 2: str(bundle), 3: [mount]})
        assert word.split("=")[0] in error.message and "mount" in error.message, error


def test_a_mount_inside_that_fails_is_named():
    error = refuse(options=["--mount", "type=bind,src=/no/such/source,dst=/mnt,options=rbind:ro"])
    assert "/no/such/source" in error


def test_a_command_that_cannot_be_run_is_named():
    assert "no-such-command" in refuse("no-such-command")
    assert "permission denied" in refuse("/etc/passwd")


# a runtime that dies half-way

WRAPPER = """#!/bin/sh
for word in "$@"; do
  case $word in {verb}) test -e {flag} && {action} ;; esac
done
exec runc "$@"
"""
BEFORE, AFTER = "kill -9 $$", '{ runc "$@"; kill -9 $$; }'


@pytest.fixture
def dying(config, tmp_path):
    """Makes a runtime that dies at one of its verbs; returns a file: it dies only while that exists."""

    def make(verb, action):
        flag, wrapper = tmp_path / "die", tmp_path / "wrapper"
        wrapper.write_text(WRAPPER.format(verb=verb, flag=flag, action=action))
        wrapper.chmod(0o755)
        config(f'runtime = "{wrapper}"\n')
        return flag

    return make


@pytest.mark.parametrize("action", [BEFORE, AFTER], ids=["before", "after"])
@pytest.mark.parametrize("verb", ["create", "start"])
def test_a_runtime_that_dies_while_a_container_begins(dying, verb, action):
    dying(verb, action).touch()
    error = refuse("sleep", "infinity")
    assert f"wrapper {verb}" in error and "signal 9" in error, error


@pytest.mark.parametrize("action", [BEFORE, AFTER], ids=["before", "after"])
def test_a_runtime_that_dies_at_exec(dying, action):
    flag = dying("exec", action)
    with Ctr(CRAB) as container:
        flag.touch()
        done = container.exec("sleep", "1000", check=False)
        flag.unlink()
        assert done.rc != 0 and "wrapper exec" in done.err and "signal 9" in done.err, done
        assert container.sh("echo alive") == "alive\n"
        assert container.exec("pgrep", "--exact", "--full", "sleep 1000", check=False).rc == 1, "what nobody knows of runs on"


@pytest.mark.parametrize("action", [BEFORE, AFTER], ids=["before", "after"])
def test_a_runtime_that_dies_at_a_checkpoint_or_delete(dying, action, tmp_path):
    flag = dying("checkpoint" if action is BEFORE else "delete", action)
    with Ctr(CRAB) as container:
        flag.touch()
        if action is BEFORE:
            with Shim.of(container) as shim:
                error = refused(shim, "Checkpoint", {1: container.id, 2: f"{tmp_path}/image"})
            assert "wrapper checkpoint" in error.message and "signal 9" in error.message
            assert container.sh("echo alive") == "alive\n"
        else:
            container.kill()
            container.stopped()
            ctr("task", "delete", container.id, check=False)
        flag.unlink()


@pytest.mark.parametrize("action", [BEFORE, AFTER], ids=["before", "after"])
def test_a_runtime_that_dies_at_restore(dying, action):
    flag = dying("restore", action)
    with Docker(CRAB) as container:
        docker("checkpoint", "create", container.name, "one")
        until(lambda: container.state["Status"] == "exited", "it has stopped")
        collect_garbage("moby")
        flag.touch()
        done = docker("start", "--checkpoint", "one", container.name, check=False)
        flag.unlink()
        assert done.rc != 0 and "wrapper restore" in done.err and "signal 9" in done.err, done
        docker_start_from("one", container.name)
        assert container.sh("echo alive") == "alive\n"


# images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """CRIU images of a container with a file open that only it has."""
    directory = tmp_path_factory.mktemp("images")
    with Ctr(CRAB, "sh", "-c", "mkdir /only; exec 5>/only/here; touch /ready; exec sleep infinity") as container:
        until(lambda: container.exec("test", "-e", "/ready", check=False).rc == 0, "it is ready")
        with Shim.of(container) as shim:
            shim.call("Checkpoint", {1: container.id, 2: f"{directory}/good", 3: {1: "containerd.runc.v1.CheckpointOptions", 2: b""}})
    return directory / "good"


def empty(image):
    for file in image.iterdir():
        file.unlink()


def truncated(image):
    for file in (*image.glob("core-*.img"), *image.glob("pages-*.img")):
        os.truncate(file, file.stat().st_size // 2)


def without_inventory(image):
    (image / "inventory.img").unlink()


def garbage(image):
    for file in image.glob("*.img"):
        file.write_bytes(os.urandom(1000))


def foreign(image):
    """As it is: of another container, whose file is not here."""


@pytest.mark.parametrize("spoil,word", [(empty, "ctrd-checkpoint"), (truncated, "core-1"), (without_inventory, "inventory"), (garbage, "magic"), (foreign, "only/here")])
def test_an_image_that_cannot_be_restored_is_named(images, spoil, word):
    with Docker(CRAB, verb="create") as container:
        image = pathlib.Path(f"/var/lib/docker/containers/{container.id}/checkpoints/bad")
        shutil.copytree(images, image)
        spoil(image)
        done = docker("start", "--checkpoint", "bad", container.name, check=False)
        assert done.rc != 0 and word in done.err.lower(), done
        collect_garbage("moby")
        docker("start", container.name)
        assert container.sh("echo alive") == "alive\n"


def test_an_image_that_is_not_there_is_named(shim, shared, tmp_path):
    bundle = make_bundle(tmp_path / "b", spec_of(shared))
    id = unique("bad")
    with pytest.raises(Refused) as error:
        shim.call("Create", {1: id, 2: str(bundle), 8: "/no/such/image"})
        try:
            shim.call("Start", {1: id})
        finally:
            shim.call("Delete", {1: id})
    assert "/no/such/image" in error.value.message


def test_an_image_path_that_cannot_be_written_is_named(shim, shared, tmp_path):
    (tmp_path / "file").touch()
    for path in ("/proc/image", f"{tmp_path}/file/image", "relative", ""):
        error = refused(shim, "Checkpoint", {1: shared.id, 2: path})
        assert path in error.message and "checkpoint" in error.message, error
    assert shared.sh("echo alive") == "alive\n"


def test_a_full_disk_fails_the_checkpoint_and_the_container_goes_on(tmp_path):
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path)
    try:
        with Ctr(CRAB) as container, Shim.of(container) as shim:
            error = refused(shim, "Checkpoint", {1: container.id, 2: f"{tmp_path}/image"})
            assert "no space left" in error.message.lower(), error
            assert container.sh("echo alive") == "alive\n"
    finally:
        run("umount", tmp_path)


# requests


def test_an_exec_in_a_stopped_container_is_refused():
    with Ctr(CRAB, "true") as container:
        container.stopped()
        done = container.exec("true", check=False)
        assert done.rc != 0 and "stopped" in done.err, done


def test_a_second_start_is_refused(shim, shared):
    assert refused(shim, "Start", {1: shared.id}).kind == "failed precondition"
    assert refused(shim, "Create", {1: shared.id, 2: str(shared.bundle)}).kind == "already exists"
    assert shared.sh("echo alive") == "alive\n"


def test_a_second_exec_of_one_id_is_refused(shim, shared):
    process = any_of(PROCESS, {"args": ["sleep", "1000"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/usr/bin"]})
    shim.call("Exec", {1: shared.id, 2: "twice", 7: process})
    assert refused(shim, "Exec", {1: shared.id, 2: "twice", 7: process}).kind == "already exists"
    shim.call("Start", {1: shared.id, 2: "twice"})
    assert refused(shim, "Start", {1: shared.id, 2: "twice"}).kind == "failed precondition"
    assert refused(shim, "Delete", {1: shared.id, 2: "twice"}).kind == "failed precondition"
    shim.call("Kill", {1: shared.id, 2: "twice", 3: 9})
    assert shim.call("Wait", {1: shared.id, 2: "twice"})[1] == 137
    shim.call("Delete", {1: shared.id, 2: "twice"})
    assert refused(shim, "Delete", {1: shared.id, 2: "twice"}).kind == "not found"


@pytest.mark.parametrize("id", ["../x", "..", ".", "a/b", "/etc", "", "a b", "a\nb", "\u00e9", "-rf", "a" * 77, "x" * 100000])
def test_strange_ids_are_refused(shim, shared, id):
    process = any_of(PROCESS, {"args": ["true"], "cwd": "/"})
    error = refused(shim, "Exec", {1: shared.id, 2: id, 7: process})
    assert error.kind == "invalid argument" and len(error.message) < 500
    error = refused(shim, "Create", {1: id, 2: str(shared.bundle)})
    assert len(error.message) < 500
    assert refused(shim, "State", {1: id}).kind == "not found"


@pytest.mark.parametrize(
    "method,fields,kind",
    [
        ("Kill", {3: 0}, "invalid argument"),
        ("Kill", {3: 65}, "invalid argument"),
        ("Kill", {3: 4294967295}, "invalid argument"),
        ("Kill", {2: "nobody", 3: 15}, "not found"),
        ("State", {2: "nobody"}, "not found"),
        ("Wait", {2: "nobody"}, "not found"),
        ("Update", {2: {1: RESOURCES, 2: b"no json"}}, "invalid argument"),
        ("Update", {}, "invalid argument"),
        ("Exec", {2: "bad", 7: {1: PROCESS, 2: b"no json"}}, "invalid argument"),
        ("Exec", {2: "bad"}, "invalid argument"),
        ("Checkpoint", {2: "/tmp/x", 3: {1: "containerd.runc.v1.CheckpointOptions", 2: b"\xff\xff\xff"}}, "invalid argument"),
        ("Delete", {}, "failed precondition"),
        ("Resume", {}, "failed precondition"),
        ("Fly", {}, "invalid argument"),
    ],
)
def test_requests_that_make_no_sense(shim, shared, method, fields, kind):
    assert refused(shim, method, {1: shared.id, **fields}).kind == kind
    assert shared.sh("echo alive") == "alive\n"


def test_an_exec_without_arguments_is_refused_by_the_runtime(shim, shared):
    for n, process in enumerate(({}, {"args": []}, {"args": [""], "cwd": "/"}, {"args": ["true"], "cwd": "relative"}, {"args": 7})):
        try:
            shim.call("Exec", {1: shared.id, 2: f"empty{n}", 7: any_of(PROCESS, process)})
        except Refused:
            continue
        assert "exec" in refused(shim, "Start", {1: shared.id, 2: f"empty{n}"}).message
        shim.call("Delete", {1: shared.id, 2: f"empty{n}"})
    assert shared.sh("echo alive") == "alive\n"


def test_a_client_that_talks_nonsense_does_not_hurt_others(shared):
    address = (shared.bundle / "address").read_text()
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\0" * 10, os.urandom(1000)):
        with Shim(address) as shim:
            shim.socket.sendall(nonsense)
    assert shared.sh("echo alive") == "alive\n"


def test_the_binary_alone_says_what_it_is():
    done = subprocess.run(["containerd-shim-crab-v2"], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0 and "--runtime" in done.stderr
    until(lambda: not list((BUNDLES / "default").glob("bad*")), "no bundle is left")
