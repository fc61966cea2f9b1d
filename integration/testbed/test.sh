#!/bin/bash
# test.sh: what the test bed promises, tried out. Other beds may run meanwhile: everything is looked up by bed id.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"

. "$TESTBED/lib/testing.sh"

HELPERS+=(background_bed)
# background_bed CMD…: a bed in a session of its own. Sets PID (enter's, which is also its process group) and
# ID once CMD runs. What CMD prints is in $WORK/log.
background_bed() {
  : >"$WORK/log"
  env --default-signal=INT setsid "$ENTER" bash -c 'echo "bed=$CRAB_BED_ID"; "$@"' bash "$@" >"$WORK/log" 2>&1 </dev/null &
  PID=$!
  within 60 grep -q '^bed=' "$WORK/log"
  ID=$(sed -n 's/^bed=//p' "$WORK/log")
}

exit_codes_and_output_pass() {
  local rc=0 out
  out=$("$ENTER" bash -c 'cat; echo to-stderr >&2; exit 7' <<<from-stdin 2>"$WORK/err") || rc=$?
  [ "$rc" = 7 ] && [ "$out" = from-stdin ] && grep -q to-stderr "$WORK/err"
  rc=0; "$ENTER" bash -c 'kill -9 $$' || rc=$?
  [ "$rc" = 137 ]
  rc=0; "$ENTER" no-such-command || rc=$?
  [ "$rc" = 127 ]
}

wrong_usage_is_2() {
  local rc=0; "$ENTER" --no-such-flag true || rc=$?; [ "$rc" = 2 ]
  rc=0; "$ENTER" || rc=$?; [ "$rc" = 2 ]
}

a_finished_bed_leaves_nothing() {
  local id; id=$("$ENTER" bash -c 'ctr run -d crab.test/agent:latest t sleep 1000 >&2; setsid sleep 1000 & echo "$CRAB_BED_ID"')
  nothing_of "$id"
}

a_frozen_container_does_not_keep_the_bed() {
  local id; id=$("$ENTER" bash -c 'ctr run -d crab.test/agent:latest t sleep 1000 >&2; ctr task pause t; echo "$CRAB_BED_ID"')
  nothing_of "$id"
}

a_killed_enter_leaves_nothing_after_the_next() {
  background_bed bash -c 'ctr run -d crab.test/agent:latest t sleep 1000; ctr task pause t; echo frozen; sleep 1000'
  within 60 grep -q '^frozen' "$WORK/log"
  kill -9 "$PID"
  [ -n "$(traces_of "$ID")" ]
  "$ENTER" true
  within 30 nothing_of "$ID" # within: whoever adopted the dead reaps them
}

a_killed_enter_takes_its_processes_along() {
  background_bed sleep 1000
  kill -9 "$PID"
  within 30 no_process_of "$ID"
  "$ENTER" true
  within 30 nothing_of "$ID"
}

ctrl_c_reaches_cmd_and_leaves_nothing() {
  local rc=0
  background_bed bash -c 'trap "echo caught; exit 5" INT; echo ready; while :; do sleep 0.1; done'
  within 60 grep -q '^ready' "$WORK/log"
  kill -INT -- -"$PID"
  wait "$PID" || rc=$?
  [ "$rc" = 5 ]; grep -q '^caught' "$WORK/log"
  nothing_of "$ID"
}

ctrl_c_that_cmd_ignores_does_not_end_the_bed() {
  background_bed bash -c 'trap "" INT; echo ready; until [ -e /tmp/go ]; do sleep 0.1; done; echo survived'
  within 60 grep -q '^ready' "$WORK/log"
  kill -INT -- -"$PID"
  sleep 0.3 # nothing can be waited for: the claim is that nothing happens
  touch "$CRAB_CACHE/run/$ID/disk/tmp/go"
  wait "$PID"; grep -q '^survived' "$WORK/log"
  nothing_of "$ID"
}

a_terminated_enter_leaves_nothing() {
  local rc=0
  background_bed bash -c 'trap "" TERM; echo ready; sleep 1000'
  kill -TERM "$PID"
  wait "$PID" || rc=$?
  [ "$rc" = 143 ]
  nothing_of "$ID"
}

a_terminal_passes_through() {
  python3 - "$ENTER" <<'PY'
import os, pty, sys
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], [sys.argv[1], "bash", "-c", "test -t 0 -a -t 1 -a -t 2 && echo a-terminal; read line; echo got-$line; sleep 1000"])
seen = b""
def until(word):
    global seen
    while word not in seen:
        try:
            seen += os.read(fd, 4096)
        except OSError:
            sys.exit(f"never saw {word}: {seen}")
until(b"a-terminal"); os.write(fd, b"hello\n"); until(b"got-hello"); os.write(fd, b"\x03")
status = os.waitpid(pid, 0)[1]
assert os.waitstatus_to_exitcode(status) == 130, status
PY
}

a_loop_device_goes_with_its_bed() {
  local loop
  loop=$("$ENTER" bash -ec 'truncate -s 10M /tmp/disk; losetup -f --show /tmp/disk')
  ! losetup "$loop" 2>/dev/null
}

a_second_bed_runs_beside_the_first() {
  background_bed bash -c 'ctr run -d crab.test/agent:latest t sleep 1000; echo up; until [ -e /tmp/go ]; do sleep 0.1; done; ctr task ls | grep RUNNING'
  within 60 grep -q '^up' "$WORK/log"
  "$ENTER" bash -c 'test -z "$(ctr task ls -q)"; ctr run --rm crab.test/agent:latest t true' # the same id
  touch "$CRAB_CACHE/run/$ID/disk/tmp/go"
  wait "$PID"
}

a_bed_never_changes_the_cache() {
  "$ENTER" bash -c 'echo x >/usr/bin/runc; ctr run --rm crab.test/agent:latest t bash -c "echo x >/bin/bash"; ! touch /var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/x'
  "$ENTER" bash -c 'runc --version; ctr run --rm crab.test/agent:latest t bash -c true'
}

the_hosts_cgroups_stay_as_they_are() {
  local tree='find /sys/fs/cgroup -type d -not -path */crab-bed-*' before
  set -f; before=$($tree | sort); "$ENTER" ctr run --rm crab.test/agent:latest t true
  [ "$before" = "$($tree | sort)" ]
}

the_bed_sees_its_own_cgroups_and_pids() {
  "$ENTER" bash -ec '
    ! grep -v ":/$" /proc/self/cgroup | grep -v "^0::/init$"
    test "$(cat /proc/1/comm)" = bash
    test "$(findmnt -nro FSTYPE /var/lib/containerd)" != overlay
    test "$(findmnt -nro FSTYPE /tmp)" != overlay
    test -e /src/integration/testbed/enter
    ip -br link show lo | grep -q UP; test "$(ls /sys/class/net)" = lo'
}

the_network_is_private_unless_asked_for() {
  local host; host=$(readlink /proc/self/ns/net)
  [ "$("$ENTER" readlink /proc/self/ns/net)" != "$host" ]
  [ "$("$ENTER" --net readlink /proc/self/ns/net)" = "$host" ]
}

no_descriptor_of_ours_reaches_cmd() {
  # 3 is ls's own; what the caller had open beyond that may pass.
  local ours; ours=$(ls /proc/self/fd)
  [ "$("$ENTER" ls /proc/self/fd)" = "$ours" ]
}

runc_runs_a_container() { [ "$("$ENTER" ctr run --rm crab.test/agent:latest t echo hi)" = hi ]; }

the_image_has_its_tools() {
  "$ENTER" ctr run --rm crab.test/agent:latest t bash -ec 'for c in bash ls python3 git curl tmux ps; do command -v $c; done; test "$(stat -c %h /bin/bash)" = 1'
}

the_bed_makes_every_file_system_and_compiles_nothing() {
  "$ENTER" bash -ec 'for c in mkfs.ext4 mkfs.xfs mkfs.btrfs; do command -v $c; done; ldconfig -p | grep libelf.so.1; ! command -v cc gcc clang'
}

the_servers_run_in_their_image() {
  "$TESTBED/trace-image" "$TESTBED/recipe/servers.sh" servers
  # The bed's network, whose loopback is up.
  CRAB_BED_IMAGES=servers "$ENTER" ctr run --rm --net-host crab.test/servers:latest t bash -exc '
    nginx; redis-server --daemonize yes; tmux new-session -d; python3 -c pass
    until curl -fs http://127.0.0.1/ | grep nginx; do sleep 0.1; done
    until redis-cli ping | grep PONG; do sleep 0.1; done
    tmux ls; test "$(ps -C nginx,redis-server -o user= | sort -u)" = root'
}

criu_checkpoints_and_restores() {
  "$ENTER" bash -exc '
    criu --version | grep -E "Version: 4\.[2-9]"
    ctr run -d crab.test/agent:latest t bash -c "for ((i = 0; ; i++)); do echo \$i >/count; sleep 0.05; done"
    until ctr task exec --exec-id a t test -s /count; do sleep 0.1; done
    ctr t checkpoint --image-path /tmp/image --work-path /tmp/work t
    test -s /tmp/image/inventory.img
    ctr c checkpoint --rw --image --task t saved
    ctr t kill -s KILL t; until ctr t ls | grep STOPPED; do sleep 0.1; done; ctr t rm t || true; ctr c rm t
    ctr c restore --rw --live back saved
    # The file is empty for an instant before each count.
    was=; until [ -n "$was" ]; do was=$(ctr t exec --exec-id b back cat /count); done
    until [ "$(ctr t exec --exec-id c back cat /count)" -gt "$was" ]; do sleep 0.1; done'
}

an_image_carries_deletions_links_and_attributes() {
  # shellcheck disable=SC2016 # for the inner shell
  unshare --mount bash -euc '
    mkdir "$1/image"; cd "$1/image"; mkdir base upper work merged; mkdir base/gone base/replaced base/kept
    touch base/gone/x base/replaced/x base/file; ln base/file base/kept/link; python3 -c "import os; os.setxattr(\"base/file\", \"user.a\", b\"b\")"
    mount -t overlay overlay -o lowerdir=base,upperdir=upper,workdir=work merged
    rm -r merged/gone merged/replaced; mkdir merged/replaced; touch merged/replaced/y' bash "$WORK"
  cd "$WORK/image"
  "$TESTBED/mkimage.py" base crab.test/x:latest one.tar --upper upper
  "$TESTBED/mkimage.py" base crab.test/x:latest two.tar --upper upper
  cmp one.tar two.tar
  python3 - <<'PY'
import json, tarfile
image = tarfile.open("one.tar")
layers = [tarfile.open(fileobj=image.extractfile(name)) for name in json.load(image.extractfile("manifest.json"))[0]["Layers"]]
base, upper = ({m.name: m for m in layer} for layer in layers)
assert base["kept/link"].islnk() and base["kept/link"].linkname == "file", base["kept/link"]
assert base["file"].pax_headers["SCHILY.xattr.user.a"] == "b"
assert sorted(upper) == [".wh.gone", "replaced", "replaced/.wh..wh..opq", "replaced/y"], sorted(upper)
PY
}

docker_runs_a_container() { [ "$("$ENTER" --docker docker run --rm --network none crab.test/agent:latest echo hi)" = hi ]; }

docker_checkpoints() {
  "$ENTER" --docker bash -exc '
    docker run -d --name one --network none crab.test/agent:latest sleep 1000
    docker checkpoint create --leave-running one first
    docker checkpoint ls one | grep first
    docker exec one true'
}

main() {
  need_root
  "$TESTBED/build"; "$ENTER" --docker true # what takes long for the first time is no test
  all "$@"
}
main "$@"; exit
