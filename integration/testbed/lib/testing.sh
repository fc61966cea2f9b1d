# shellcheck shell=bash
# What the tests of the bed and of the virtual machine share. Other beds may run meanwhile: everything is looked up by bed id.

ENTER=$TESTBED/enter
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
PASSED=0 FAILED=0

# it NAME: runs the function NAME in a shell of its own with `set -e`, and counts.
it() {
  local start=$EPOCHREALTIME rc=0 took
  (set -euo pipefail; "$1") >"$WORK/out" 2>&1 & # in the background: a command in `||` or `if` would not obey set -e
  wait $! || rc=$?
  took=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f s", b - a }')
  if [ "$rc" = 0 ]; then PASSED=$((PASSED + 1)); echo "ok   $1 ($took)"
  else FAILED=$((FAILED + 1)); echo "FAIL $1 ($took)"; sed 's/^/     /' "$WORK/out"; fi
}

# within SECONDS CMD…: wait until CMD succeeds.
within() {
  local end=$((SECONDS + $1)); shift
  until "$@"; do [ "$SECONDS" -lt "$end" ] || { echo "in vain: $*"; return 1; }; sleep 0.1; done
}

# traces_of ID: whatever of bed ID is still on the host.
traces_of() {
  find /sys/fs/cgroup -type d -name "crab-bed-$1" -prune 2>/dev/null
  grep -l "crab-bed-$1" /proc/[0-9]*/cgroup 2>/dev/null
  grep -l "$CRAB_CACHE/run/$1/" /proc/[0-9]*/mountinfo 2>/dev/null
  find "$CRAB_CACHE/run/$1" -maxdepth 0 2>/dev/null || true
}
nothing_of() { local left; left=$(traces_of "$1"); [ -z "$left" ] || { echo "left of bed $1: $left"; return 1; }; }
# owned: whether the enter that is PID has a run directory, ID.
owned() {
  ID=$(grep -s -l "^pid $PID " "$CRAB_CACHE"/run/*/owner) || return
  ID=${ID%/owner}; ID=${ID##*/}
}
no_process_of() { ! grep -sq "crab-bed-$1" /proc/[0-9]*/cgroup; }

# HELPERS: functions that are no tests. Every other function with an underscore in its name is one.
HELPERS=(traces_of nothing_of owned no_process_of short_hash need_root)

# all [NAME…]: every test, or those.
all() {
  local name
  for name in $(declare -F | awk '{ print $3 }'); do
    case $name in *_*) [ $# = 0 ] || [[ " $* " = *" $name "* ]] || continue ;; *) continue ;; esac
    [[ " ${HELPERS[*]} " != *" $name "* ]] || continue
    it "$name"
  done
  echo "$PASSED passed, $FAILED failed"
  [ "$FAILED" = 0 ]
}
