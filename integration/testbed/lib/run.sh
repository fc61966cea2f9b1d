# shellcheck shell=bash
# What one `enter` leaves on the host while it runs: $CRAB_CACHE/run/ID (scratch; inside it `owner`, `cgroups`)
# and its cgroups. The owner holds a lock on its directory's file `owner`; the kernel drops that with the
# process, so whoever can take the lock looks at the leftovers of a dead one. (Pid and start time are in it
# for people.)

RUNS=$CRAB_CACHE/run

# loops_detach DIR: detach the loop devices whose files lie in DIR. They outlive the mount namespace that they
# were set up in, and the path that they show is that namespace's: device and inode are what can be trusted.
loops_detach() {
  local loop inode device
  losetup --noheadings --output NAME,BACK-INO,BACK-MAJ:MIN 2>/dev/null | while read -r loop inode device; do
    [ "$device" = "$(stat -c %Hd:%Ld "$1")" ] || continue
    [ -n "$(find "$1" -xdev -inum "$inode" -print -quit)" ] || continue
    losetup -d "$loop" || true
  done
}

run_remove() {
  local dir=$1 cgroups=()
  [ ! -e "$dir/cgroups" ] || mapfile -t cgroups <"$dir/cgroups"
  cgroup_remove "${cgroups[@]}" || { say "cgroups of bed ${dir##*/} are still busy; the next enter tries again"; return 0; }
  loops_detach "$dir"
  # `owner` last: while it is there, a sweep sees that somebody is at it.
  find "$dir" -mindepth 1 -maxdepth 1 ! -name owner -exec rm -rf {} + || true
  rm -rf "$dir" || true
}

# run_sweep: remove what dead owners left. The caller holds $RUNS.lock, so nobody is between mkdir and flock.
run_sweep() {
  local dir fd
  for dir in "$RUNS"/*/; do
    dir=${dir%/}; [ -d "$dir" ] || continue
    [ -e "$dir/owner" ] || { run_remove "$dir"; continue; } # died between mkdir and the next line
    exec {fd}<"$dir/owner"
    if flock -n "$fd"; then say "sweeping the leftovers of bed ${dir##*/}"; run_remove "$dir"; fi
    exec {fd}>&-
  done
}

# run_new: sweep, then make a directory of our own. Sets RUN (its path) and RUN_LOCK (the descriptor to be
# closed for children, lest one of them keep us alive in the eyes of a sweep).
run_new() {
  local fd
  mkdir -p "$RUNS"
  exec {fd}>"$RUNS.lock"; flock "$fd"
  run_sweep
  RUN=$(mktemp -d "$RUNS/XXXXXXXX")
  exec {RUN_LOCK}>"$RUN/owner"; flock "$RUN_LOCK"
  echo "pid $$ start $(awk '{ print $22 }' "/proc/$$/stat")" >&"$RUN_LOCK"
  cgroup_dirs "${RUN##*/}" >"$RUN/cgroups"
  exec {fd}>&-
}
