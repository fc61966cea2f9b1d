# shellcheck shell=bash
# What every script of the test bed shares: where things are, how to complain, how to lock.
# shellcheck disable=SC2034 # used by those that source this
# Sourced, never run; the sourcing script has already said `set -euo pipefail`.

TESTBED=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CHECKOUT=$(cd "$TESTBED/../.." && pwd)
CRAB_CACHE=${CRAB_CACHE:-/var/cache/crab}
umask 022 # the modes of what we make must not depend on who calls us

say() { printf 'testbed: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

need_root() { [ "$(id -u)" = 0 ] || die "must run as root"; }

# The first 12 hex digits of the SHA-256 of stdin. It names a thing in the cache after what it is made of.
short_hash() { sha256sum | cut -c1-12; }

# lock FILE: hold FILE until this shell ends, however it ends (the kernel drops it).
# A function and not a wrapper around one: `wrapper build || …` would switch `set -e` off inside build.
lock() {
  local fd
  mkdir -p "$(dirname "$1")"
  exec {fd}>"$1"
  flock -n "$fd" || { say "waiting for another build (lock $1)"; flock "$fd"; }
}

# publish TMPDIR DIR: the last step of making something. rename(2) is atomic: there is never half a DIR, and after
# the sync not even when the machine loses power.
publish() { sync -f "$1"; mv -T "$1" "$2"; }
