#!/bin/bash
# debootstrap.sh SUITE MIRROR DIR DEBS: the base root in DIR/root. Runs in a mount namespace of its own.
set -euo pipefail
main() {
  local suite=$1 mirror=$2 dir=$3 debs=$4 mnt=$3/mnt
  mount -t tmpfs -o mode=755 tmpfs "$mnt"
  debootstrap --variant=minbase --cache-dir="$debs" "$suite" "$mnt/root" "$mirror"
  # debootstrap copies these from the host; a base knows nothing of the machine that made it.
  : >"$mnt/root/etc/resolv.conf"; echo localhost >"$mnt/root/etc/hostname"
  chmod 644 "$mnt/root/etc/resolv.conf" "$mnt/root/etc/hostname"
  rm -rf "$mnt/root/var/cache/apt/archives/"*.deb "$mnt/root/var/log/bootstrap.log" "$mnt/root/debootstrap"
  cp -a "$mnt/root/." "$dir/root/"
}
main "$@"; exit
