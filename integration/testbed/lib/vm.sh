# shellcheck shell=bash
# The virtual machine's parts in the cache. Its root is the bed's, shared with it; its disk holds what must lie on a
# file system of the machine's own: containerd's and Docker's directories, with the images unpacked.

# vm_dir: a layer on the base with QEMU; in it below /vm the kernel, and the layer that the bed's root gets on top.
vm_dir() { echo "$CRAB_CACHE/vm-$( { base_dir; cat "$TESTBED/recipe/vm.sh" "$TESTBED/lib/layer.sh"; } | short_hash)"; }

make_vm() {
  local dir tmp; dir=$(vm_dir)
  [ ! -d "$dir" ] || return 0
  make_base
  say "installing QEMU and Debian's cloud kernel for the virtual machine"
  tmp=$(mktemp -d "$CRAB_CACHE/tmp/vm.XXXXXX")
  make_layer "$TESTBED/recipe/vm.sh" "$tmp/root" keep >"$tmp/log" 2>&1 ||
    { tail -n 30 "$tmp/log" >&2; die "installing QEMU failed (log: $tmp/log)"; }
  publish "$tmp" "$dir"
}

# vm_disk DOCKER IMAGE…: the disk with these images (Docker's too if DOCKER is not empty).
vm_disk() {
  local docker=$1; shift
  echo "$CRAB_CACHE/vm-disk-$( { store_dir containerd "$@"; [ -z "$docker" ] || store_dir docker "$@"
    cat "$TESTBED/lib/vm.sh" "$TESTBED/lib/vm-disk.sh"; } | short_hash).img"
}

vm_disk_ready() {
  local disk; disk=$(vm_disk "$@")
  if [ -e "$disk" ]; then touch "$disk"; return 0; fi
  # A subshell: the lock ends with it.
  (lock "$CRAB_CACHE/vm.lock"; [ -e "$disk" ] || vm_disk_make "$disk" "$@")
}

# vm_disk_make DISK DOCKER IMAGE…: from what a bed would be given.
vm_disk_make() {
  local disk=$1 docker=$2 tmp=$CRAB_CACHE/tmp-vm RUN; shift 2
  say "making the virtual machine's disk: $*"
  rm -rf "$tmp"; mkdir -p "$tmp"/disk/{containerd,docker,crab,tmp}
  RUN=$tmp # for stores_mount
  stores_mount "$docker" "$@"
  jail bash "$TESTBED/lib/vm-disk.sh" "$tmp" || die "making the virtual machine's disk failed"
  publish "$tmp/disk.img" "$disk"
  rm -rf "$tmp"
}
