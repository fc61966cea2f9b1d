#!/bin/bash
# vm-init.sh: pid 1 of the virtual machine. Makes of a bare kernel what a bed has from its host, runs bed-init.sh with CMD,
# hands back its code and powers off. What it says itself goes to the console.
set -eEuo pipefail

# What a running system would load by itself, or CRIU wants (it does not load the diag modules).
MODULES=(virtio_blk overlay loop veth tun nf_tables nft_ct unix_diag inet_diag tcp_diag udp_diag netlink_diag af_packet_diag)

# stage WHAT: what begins now, for whoever looks at a console to find out where a machine hangs.
stage() {
  local up
  read -r up _ </proc/uptime
  echo "vm: $up s: $1"
}

kernel_mounts() {
  mount -t proc proc /proc
  mount -t sysfs sysfs /sys
  mount -t devtmpfs devtmpfs /dev
  exec </dev/null >/dev/console 2>&1
  ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
  mkdir -p /dev/pts /dev/shm /dev/mqueue
  mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  mount -t mqueue mqueue /dev/mqueue
  mount -t tmpfs -o mode=755 tmpfs /run; mkdir /run/lock
  mount -t bpf bpf /sys/fs/bpf
  mount -t tracefs tracefs /sys/kernel/tracing
  mount -t debugfs debugfs /sys/kernel/debug
}

# cgroup v2 with all controllers. A cgroup that hands them down may hold no process (but for the real root, which this is;
# in a bed it isn't).
cgroups() {
  local name
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mkdir /sys/fs/cgroup/init; echo $$ >/sys/fs/cgroup/init/cgroup.procs
  # shellcheck disable=SC2013 # words of one line
  for name in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$name" >/sys/fs/cgroup/cgroup.subtree_control; done
}

disk() {
  local name
  mkdir /run/disk; mount /dev/vda /run/disk
  for name in var/lib/containerd var/lib/docker var/lib/crab tmp; do mount --bind "/run/disk/${name##*/}" "/$name"; done
  umount /run/disk; rmdir /run/disk
}

# port NAME: the device of the serial port that the host's side calls NAME.
port() {
  local dir
  for dir in /sys/class/virtio-ports/*; do
    if [ "$(cat "$dir/name")" = "crab.$1" ]; then echo "/dev/${dir##*/}"; return; fi
  done
  echo "vm: no port $1"; return 1
}

# end_all PID…: every process but those and us.
end_all() {
  local pid
  for pid in /proc/[0-9]*; do
    pid=${pid#/proc/}
    case " 1 $* " in *" $pid "*) ;; *) kill -KILL "$pid" 2>/dev/null || true ;; esac
  done
}

# run: CMD's code in RC. Output goes through FIFOs: a port can be opened only once, and programs open
# /dev/stderr again.
run() {
  local out err cats=()
  out=$(port out) err=$(port err)
  mkfifo /run/vm.out /run/vm.err
  cat /run/vm.out >"$out" & cats+=($!)
  cat /run/vm.err >"$err" & cats+=($!)
  RC=0
  mapfile -d '' -t environment </vm/environment
  mapfile -d '' -t arguments </vm/arguments
  env -i "${environment[@]}" setsid bash /src/integration/testbed/lib/bed-init.sh "${arguments[@]}" >/run/vm.out 2>/run/vm.err || RC=$?
  # Whatever still runs may hold the FIFOs open.
  end_all "${cats[@]}"
  wait "${cats[@]}"
}

main() {
  kernel_mounts
  stage "cgroups, modules"
  cgroups
  hostname crab-bed
  modprobe -a "${MODULES[@]}"
  stage disk
  disk
  stage CMD
  run
  stage end
  sync
  echo "$RC" >"$(port rc)"
  echo o >/proc/sysrq-trigger
  sleep 60
}

# However it ends, the machine must not stay: without a code on the port, the host's side shows the console.
trap 'echo "vm: $BASH_COMMAND failed with $?"; echo o >/proc/sysrq-trigger; sleep 60' ERR
main; exit
