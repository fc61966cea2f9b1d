# shellcheck shell=bash
# Debian roots: the base (plain minbase trixie), and layers on top of it. A layer is the upper directory of an
# overlay mount, so the bed and every image share one base on disk.

SUITE=trixie
MIRROR=http://deb.debian.org/debian

base_dir() { echo "$CRAB_CACHE/base-$( { echo "$SUITE $MIRROR"; cat "$TESTBED/lib/debootstrap.sh"; } | short_hash)"; }

# jail CMD…: CMD in mount and pid namespaces of its own that die with it, and it with us.
jail() { setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child "$@"; }

# make_base: the base, made in a tmpfs (dpkg syncs a lot) and then copied.
make_base() {
  local dir tmp; dir=$(base_dir)
  [ ! -d "$dir" ] || return 0
  say "debootstrap $SUITE (about half a minute)"
  tmp=$(mktemp -d "$CRAB_CACHE/tmp/base.XXXXXX"); mkdir -p "$tmp/root" "$tmp/mnt" "$CRAB_CACHE/debs"
  jail bash "$TESTBED/lib/debootstrap.sh" "$SUITE" "$MIRROR" "$tmp" "$CRAB_CACHE/debs" >"$tmp/log" 2>&1 ||
    { tail -n 30 "$tmp/log" >&2; die "debootstrap failed (log: $tmp/log)"; }
  rmdir "$tmp/mnt"
  publish "$tmp" "$dir"
}

# make_layer SCRIPT UPPER DEBS: run SCRIPT as root on top of the base with the network; what it changed is
# left in UPPER. Callers test its result, so it checks every step itself. DEBS: "keep" (downloaded packages go into the cache) or "seed" (they are offered, but what
# SCRIPT does to /var/cache/apt/archives stays its own business: `apt-get clean` is usual).
make_layer() {
  mkdir -p "$2" "$2.work" "$2.mnt" "$2.debs/upper" "$2.debs/work" "$CRAB_CACHE/debs"
  jail bash "$TESTBED/lib/layer.sh" "$(base_dir)/root" "$2" "$1" "$3" "$CRAB_CACHE/debs" || return
  rm -rf "$2.work" "$2.mnt" "$2.debs"
}
