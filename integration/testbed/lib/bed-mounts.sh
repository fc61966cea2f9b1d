#!/bin/bash
# bed-mounts.sh RUN LAYERS CHECKOUT TRACES OUT — CMD…: from the host's root into the bed's.
# Runs as pid 1 of new mount, pid, cgroup, UTS, IPC (and perhaps network) namespaces. Everything mounted here
# exists in this mount namespace only and goes with it; nothing of the host's is unmounted or moved.
set -euo pipefail
# shellcheck source=integration/testbed/lib/cgroup.sh
. "$(dirname "$0")/cgroup.sh"
# shellcheck source=integration/testbed/lib/bed-root.sh
. "$(dirname "$0")/bed-root.sh"

cgroups() {
  local at=$1 point fs opts link name
  if [ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ]; then
    mount -t cgroup2 cgroup2 "$at"
    # A cgroup that hands controllers to its children may hold no process itself (the host's real root may).
    mkdir -p "$at/init"; echo 0 >"$at/init/cgroup.procs"
    # shellcheck disable=SC2013 # words of one line
    for name in $(cat "$at/cgroup.controllers"); do echo "+$name" 2>/dev/null >"$at/cgroup.subtree_control" || true; done
    return
  fi
  # Hybrid: the same hierarchies in the same places as on the host.
  mount -t tmpfs -o mode=755 tmpfs "$at"
  cgroup_mounts | while read -r point fs opts; do
    mkdir "$at/${point##*/}"
    case $opts in name=*) opts=none,$opts ;; esac
    case $fs in
      cgroup) mount -t cgroup -o "$opts" cgroup "$at/${point##*/}" ;;
      cgroup2) mount -t cgroup2 cgroup2 "$at/${point##*/}" ;;
    esac
  done
  for link in /sys/fs/cgroup/*; do # cpu -> cpu,cpuacct and its like
    [ ! -L "$link" ] || cp -P "$link" "$at/"
  done
}

devices() {
  local dev=$1
  # The kernel has one devtmpfs for all; pts, shm and mqueue on top of it are the bed's own.
  mount -t devtmpfs devtmpfs "$dev" 2>/dev/null || mount --rbind /dev "$dev"
  mkdir -p "$dev/pts" "$dev/shm" "$dev/mqueue"
  mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$dev/pts"
  mount -t tmpfs -o mode=1777 tmpfs "$dev/shm"
  mount -t mqueue mqueue "$dev/mqueue"
}

main() {
  local run=$1 root=$1/root name from to
  trap 'exit 130' INT; trap 'exit 143' TERM
  bed_root "${@:1:5}"; shift 6
  # On the disk's own file system: overlay's upper directories (containers') may not lie on an overlay (our root).
  for name in var/lib/containerd var/lib/docker var/lib/crab tmp; do bind "$run/disk/${name##*/}" "$root/$name"; done
  chmod 0700 "$run/disk/crab"
  chmod 1777 "$root/tmp"
  # Image layers from the cache: read-only, and shared by all beds. Not hard links: those would show in a
  # container as st_nlink 2 and more.
  if [ -e "$run/binds" ]; then
    while read -r from to; do mount --bind "$from" "$root/$to"; mount -o remount,bind,ro "$root/$to"; done <"$run/binds"
  fi
  if [ -e "$run/host-ca.crt" ]; then # --net
    cp /etc/resolv.conf /etc/hosts "$root/etc/"
    cp "$run/host-ca.crt" "$root/etc/ssl/certs/ca-certificates.crt"
  fi
  hostname crab-bed

  mount -t proc proc "$root/proc"
  mount -t sysfs sysfs "$root/sys"
  cgroups "$root/sys/fs/cgroup"
  mount -t bpf bpf "$root/sys/fs/bpf"
  mount -t tracefs tracefs "$root/sys/kernel/tracing" 2>/dev/null || true
  mount -t debugfs debugfs "$root/sys/kernel/debug" 2>/dev/null || true
  devices "$root/dev"
  mount -t tmpfs -o mode=755 tmpfs "$root/run"; mkdir -p "$root/run/lock"

  # pivot_root, not chroot: CRIU wants a real root mount.
  mkdir -p "$root/.old"; cd "$root"; pivot_root . .old; umount -l /.old; rmdir /.old
  exec /usr/bin/env -i "${PASS[@]}" CRAB_BED_ID="${run##*/}" /bin/bash /src/integration/testbed/lib/bed-init.sh "$@"
}

if [ -n "${BED_NET:-}" ]; then
  for name in SSL_CERT_FILE PIP_CERT REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO; do
    PASS+=("$name=/etc/ssl/certs/ca-certificates.crt")
  done
fi
main "$@"; exit
