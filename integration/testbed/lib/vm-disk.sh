#!/bin/bash
# vm-disk.sh DIR: DIR/disk.img, an ext4 of what a bed has on its disk: DIR/disk, with the image layers of DIR/binds in
# their places. Runs in a mount namespace of its own.
set -euo pipefail
main() {
  local dir=$1 from to
  chmod 0700 "$dir/disk/crab"; chmod 1777 "$dir/disk/tmp"
  while read -r from to; do mount --bind "$from" "$dir/disk/${to#var/lib/}"; done <"$dir/binds"
  # Sparse: 16 GB is what it may grow to, in a copy that is thrown away.
  mke2fs -q -t ext4 -m 0 -d "$dir/disk" "$dir/disk.img" 16G >"$dir/log" 2>&1 || { cat "$dir/log" >&2; return 1; }
}
main "$@"; exit
