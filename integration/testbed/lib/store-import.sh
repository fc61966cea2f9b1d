#!/bin/bash
# store-import.sh containerd|docker IMAGE…: import /images/IMAGE.tar, then stop the daemons in good order, so
# that what they leave on the disk is complete. Runs as a bed's CMD.
set -euo pipefail
main() {
  local kind=$1 name daemon pid; shift
  for name in "$@"; do
    case $kind in
      containerd) ctr images import --local "/images/$name.tar" ;;
      docker) docker load --quiet --input "/images/$name.tar" ;;
    esac
  done >/dev/null
  for daemon in dockerd containerd; do
    [ -e "/run/bed/$daemon.pid" ] || continue
    pid=$(cat "/run/bed/$daemon.pid"); kill "$pid"
    timeout 120 tail --pid="$pid" -f /dev/null
  done
}
main "$@"; exit
