#!/bin/bash
# vm-host.sh RUN LAYERS CHECKOUT TRACES OUT VM_LAYER BASE DISK KEPT — CMD…: a virtual machine that runs CMD; exits with its
# code. KEPT: not empty if what it writes to its disk is to stay. Runs as pid 1 of new mount, pid and network namespaces: whatever ends it ends QEMU and all else.
set -euo pipefail
# shellcheck source=integration/testbed/lib/bed-root.sh
. "$(dirname "$0")/bed-root.sh"
LIMIT=${VM_LIMIT:-600}

say() { printf 'testbed: %s\n' "$*" >&2; }

# The tree that the machine has as its root, with what it is to do in /vm.
guest_root() {
  local run=$1 root=$1/root
  bed_root "${@:1:5}"; shift 6
  mkdir "$root/vm"
  printf '%s\0' "$@" >"$root/vm/arguments"
  printf '%s\0' "${PASS[@]}" CRAB_BED_ID="${run##*/}" >"$root/vm/environment"
}

# The root that QEMU runs in: the machine's tree is at /share, and what the machine says comes to /io.
qemu_root() {
  local run=$1 layer=$2 base=$3 disk=$4 root=$1/qemu/root
  mkdir -p "$run"/qemu/{root,upper,work} "$run/io"
  mount -t overlay overlay -o "lowerdir=$layer:$base,upperdir=$run/qemu/upper,workdir=$run/qemu/work,volatile" "$root"
  mount -t proc proc "$root/proc"
  mount --rbind /dev "$root/dev"
  mount -t tmpfs tmpfs "$root/run"
  bind "$run/io" "$root/io"
  mkdir "$root/share"; mount --rbind "$run/root" "$root/share"
  : >"$root/disk.img"; mount --bind "$disk" "$root/disk.img"
}

# kvm_works QEMU…: whether a kernel gets as far under KVM as to miss its root. That /dev/kvm is there proves nothing.
kvm_works() {
  [ -e /dev/kvm ] || return 1
  # In a shell of its own: bash would say that QEMU has aborted.
  bash -c 'timeout --signal=KILL 15 "$@"; exit' bash "$@" -accel kvm -cpu host -m 256M -serial file:/io/kvm.log \
    >/dev/null 2>&1 || return 1
  grep -q 'Unable to mount root fs' "$IO/kvm.log"
}

# port NAME: the machine's serial port of that name, whose other end is the file or FIFO of that name in /io.
port() { printf '%s\n' -chardev "file,id=$1,path=/io/$1" -device "virtserialport,name=crab.$1,chardev=$1"; }

# machine QEMU…: the machine, from its start to its end; QEMU's code.
machine() {
  local files rc=0
  rm -f "$ROOT/run/share"
  chroot "$ROOT" /usr/libexec/virtiofsd --socket-path=/run/share --shared-dir=/share --sandbox=none --rlimit-nofile=0 \
    --cache=always --announce-submounts </dev/null >"$IO/virtiofsd.log" 2>&1 {OUT}<&- {ERR}<&- &
  files=$!
  until [ -S "$ROOT/run/share" ]; do
    kill -0 "$files" 2>/dev/null || { cat "$IO/virtiofsd.log" >&2; return 1; }
    sleep 0.05
  done
  # Shared memory: virtiofsd reads and writes in it. snapshot=on: what is written goes to a file that QEMU has unlinked.
  # A kept disk has what was written until the machine was killed: like one that loses power and has no cache of its own.
  timeout --foreground --kill-after=10 "$LIMIT" "$@" -m 2G -object memory-backend-memfd,id=memory,size=2G,share=on \
    -numa node,memdev=memory -serial file:/io/console \
    -chardev socket,id=share,path=/run/share -device vhost-user-fs-pci,chardev=share,tag=root,queue-size=1024 \
    -drive file=/disk.img,if=virtio,format=raw,snapshot="$SNAPSHOT" </dev/null >"$IO/qemu.log" 2>&1 {OUT}<&- {ERR}<&- &
  wait $! || rc=$?
  kill -KILL "$files" 2>/dev/null || true
  wait "$files" 2>/dev/null || true
  return "$rc"
}

# The end of a machine that did not say how CMD ended.
lost() {
  local why=$1 rc=$2
  say "$why; the console's last lines:"
  if [ -e "$IO/console" ]; then tail -n 60 "$IO/console" | tr -d '\r' >&2; fi
  exit "$rc"
}

main() {
  local run=$1 root=$1/qemu/root layer=$6 base=$7 disk=$8 rc=0 cats=() qemu arguments
  IO=$run/io ROOT=$root SNAPSHOT=on
  [ -z "$9" ] || SNAPSHOT=off
  trap 'exit 130' INT; trap 'exit 143' TERM; trap 'exit 129' HUP
  guest_root "${@:1:5}" -- "${@:11}"
  qemu_root "$run" "$layer" "$base" "$disk"

  # virtiofsd holds a descriptor for every file that the machine knows.
  ulimit -n "$(ulimit -Hn)"

  # Both ends are open here, so that neither a cat nor QEMU waits for the other to come.
  mkfifo "$IO/out" "$IO/err"; : >"$IO/rc"
  exec {OUT}<>"$IO/out" {ERR}<>"$IO/err"
  cat <"$IO/out" {OUT}<&- {ERR}<&- & cats+=($!)
  cat <"$IO/err" >&2 {OUT}<&- {ERR}<&- & cats+=($!)

  # mitigations=off: guarding an emulated processor against its own speculation makes system calls twice as dear.
  # clearcpuid=rep_good, -erms: emulated, a string instruction goes round once for each byte or word. To clear pages with
  # it was 22 % of all that the kernel did in a smoke test; as plain stores it is 6 %.
  # init_on_alloc=1 is Debian's own choice, and must stay: virtiofsd writes programs into the machine's memory behind the
  # emulation's back, which, as far as can be told, would go on to run what it has translated of a page before, were the
  # page not cleared first (without it crab, crun and others die of SIGSEGV).
  qemu=(chroot "$root" qemu-system-x86_64 -nodefaults -no-user-config -display none -M q35 -smp 2 -no-reboot -kernel /vm/vmlinuz
    -append "console=ttyS0 quiet panic=-1 mitigations=off clearcpuid=rep_good init_on_alloc=1 rootfstype=virtiofs root=root rw init=/src/integration/testbed/lib/vm-init.sh")
  if kvm_works "${qemu[@]}"; then qemu+=(-accel kvm -cpu host)
  else qemu+=(-accel tcg,thread=multi -cpu Haswell-noTSX,-pcid,-invpcid,-tsc-deadline,-erms); fi
  mapfile -t arguments < <(port out; port err; port rc)
  # Seen once in a while: the emulation itself fails in the midst of a boot. Nothing has begun then.
  for _ in 1 2 3; do
    rc=0
    machine "${qemu[@]}" -device virtio-serial-pci,max_ports=4 "${arguments[@]}" || rc=$?
    if [ "$rc" -le 128 ] || [ "$rc" = 137 ] || grep -qs '^vm: .*: CMD' "$IO/console"; then break; fi
    cat "$IO/qemu.log" >&2; say "QEMU has failed with $rc before CMD began: once more"
  done
  exec {OUT}<&- {ERR}<&-
  wait "${cats[@]}" || true # a reader that has gone away is no failure of ours
  if [ "$rc" = 124 ] || [ "$rc" = 137 ]; then lost "no end within $LIMIT s (VM_LIMIT)" 124; fi
  if [ "$rc" != 0 ]; then cat "$IO/qemu.log" >&2; say "QEMU failed with $rc"; exit 125; fi
  rc=$(cat "$IO/rc")
  [ -n "$rc" ] || lost "the machine went down before CMD ended" 125
  exit "$rc"
}
main "$@"; exit
