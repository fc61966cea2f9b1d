#!/bin/bash
# bed-init.sh CMD…: pid 1 of the bed, in its own root. Starts the daemons, runs CMD in the foreground and
# exits with its code; with pid 1 the kernel ends everything else in the bed. bash reaps orphans while it waits.
set -euo pipefail

CONTAINERD=/run/containerd/containerd.sock

# daemon NAME CMD…: in a session of its own, so that Ctrl-C does not reach it.
daemon() {
  local name=$1; shift
  setsid "$@" </dev/null >"/var/log/bed/$name.log" 2>&1 &
  echo $! >"/run/bed/$name.pid"
}

# wait_for NAME PID PROBE…: until the daemon answers; a dead or mute one shows its log.
wait_for() {
  local name=$1 pid=$2; shift 2
  for _ in $(seq 1200); do
    if "$@" >/dev/null 2>&1; then return 0; fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.05
  done
  echo "bed: $name does not answer; the end of its log:" >&2
  tail -n 20 "/var/log/bed/$name.log" >&2
  exit 125
}

# A unix socket that somebody listens on. Cheaper than a client per try.
# (By the end of its name: dockerd binds the same path as /var/run/….)
# 00010000 in /proc/net/unix: it listens. Read without starting a program: an emulated machine has none to spare.
listening() {
  local flags path
  while read -r _ _ _ flags _ _ _ path; do
    if [[ $flags = 00010000 && $path = */${1##*/} ]]; then return 0; fi
  done </proc/net/unix
  return 1
}

thaw() {
  # A v1-frozen process does not die, not even with its pid namespace.
  local state
  [ -d /sys/fs/cgroup/freezer ] || return 0 # cgroup2 alone
  find /sys/fs/cgroup/freezer -name freezer.state 2>/dev/null | while read -r state; do
    echo THAWED 2>/dev/null >"$state" || true
  done
}

main() {
  local rc=0
  trap 'exit 130' INT; trap 'exit 143' TERM
  mkdir -p /var/log/bed /run/bed
  if [ -z "${BED_NET:-}" ]; then ip link set lo up; fi
  daemon containerd containerd --config /etc/containerd/config.toml
  wait_for containerd $! listening "$CONTAINERD"
  if [ -n "${BED_DOCKER:-}" ]; then
    daemon dockerd dockerd --experimental --iptables=false --ip6tables=false --bridge=none \
      --storage-driver overlay2 --containerd="$CONTAINERD"
    wait_for dockerd $! listening /run/docker.sock
  fi
  unset BED_NET BED_DOCKER
  cd /src
  # Ctrl-C is CMD's to answer; we only must not die of it before CMD does.
  trap : INT TERM HUP QUIT
  "$@" || rc=$?
  thaw
  exit "$rc"
}
main "$@"; exit
