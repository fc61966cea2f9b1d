# shellcheck shell=bash
# A bed's cgroup subtree, one directory per hierarchy. Inside the bed a cgroup namespace shows it as the root.
#
# In a v1 hierarchy the subtree lies below our own cgroup, so the limits and the accounting that we live under
# hold for the bed too. In the unified one it lies at the top: there a cgroup with processes may not hand
# controllers to its children, except the root.

# cgroup_mounts: the host's hierarchies, one a line: mount point, type, and for v1 the controllers.
cgroup_mounts() {
  awk '$5 ~ "^/sys/fs/cgroup(/|$)" { for (i = 7; i < NF; i++) if ($i == "-") { if ($(i + 1) ~ /^cgroup/) print $5, $(i + 1), $(i + 3); break } }' \
    /proc/self/mountinfo | sed 's/ rw,/ /' | sort -u
}

# own_cgroup CONTROLLERS: our own cgroup in that v1 hierarchy. (/proc/self/cgroup may name the controllers in
# another order than mountinfo: one in common is enough.)
own_cgroup() {
  local line_controllers path c
  while IFS=: read -r _ line_controllers path; do
    for c in ${1//,/ }; do
      case ,$line_controllers, in *,"$c",*) echo "$path"; return ;; esac
    done
  done </proc/self/cgroup
}

# cgroup_dirs ID: the directories of bed ID, one a line.
cgroup_dirs() {
  local point fs controllers own
  cgroup_mounts | while read -r point fs controllers; do
    own=
    [ "$fs" = cgroup2 ] || own=$(own_cgroup "$controllers")
    echo "$point${own%/}/crab-bed-$1"
  done
}

# cgroup_make DIR…: make them. A new v1 cpuset is empty and takes no process before it has CPUs and memory nodes.
cgroup_make() {
  local dir file
  for dir in "$@"; do
    mkdir "$dir"
    for file in cpuset.cpus cpuset.mems; do
      if [ -e "$dir/cgroup.clone_children" ] && [ -e "$dir/$file" ]; then cat "${dir%/*}/$file" >"$dir/$file"; fi
    done
  done
}

# cgroup_thaw DIR…: a v1-frozen process does not die before it is thawed, whatever signal it gets.
cgroup_thaw() {
  local dir sub
  for dir in "$@"; do
    [ -e "$dir/freezer.state" ] || continue
    find "$dir" -name freezer.state 2>/dev/null | while read -r sub; do echo THAWED 2>/dev/null >"$sub" || true; done
  done
}

# cgroup_remove DIR…: end every process in them and remove them, leaves first. Fails if something stays.
cgroup_remove() {
  local dir sub
  for _ in $(seq 1500); do
    cgroup_thaw "$@" # in the loop: a runtime that is not dead yet may still freeze something
    for dir in "$@"; do
      [ -d "$dir" ] || continue
      if [ -e "$dir/cgroup.kill" ]; then echo 1 2>/dev/null >"$dir/cgroup.kill" || true; fi
      find "$dir" -depth -type d 2>/dev/null | while read -r sub; do rmdir "$sub" 2>/dev/null || true; done
    done
    for dir in "$@"; do [ ! -d "$dir" ] || { sleep 0.02; continue 2; }; done
    return 0
  done
  return 1
}
