# shellcheck shell=bash
# The bed's root as a tree, for the bed itself and for the virtual machine. Sourced by what runs in a mount namespace of
# its own, which all this ends with.

bind() { mkdir -p "$2"; mount --bind "$1" "$2"; }

# bed_root RUN LAYERS CHECKOUT TRACES OUT: at RUN/root. TRACES and OUT may be empty.
bed_root() {
  local run=$1 layers=$2 checkout=$3 traces=$4 out=$5 root=$1/root binary target
  mkdir -p "$root" "$run/upper" "$run/work"
  # volatile: the bed's root is thrown away, so no sync needs to reach the disk for it.
  mount -t overlay overlay -o "lowerdir=$layers,upperdir=$run/upper,workdir=$run/work,volatile" "$root"
  bind "$checkout" "$root/src"
  if [ -n "$traces" ]; then bind "$traces" "$root/traces"; mount -o remount,bind,ro "$root/traces"; PASS+=(TRACES=/traces); fi
  if [ -n "$out" ]; then bind "$out" "$root/out"; fi
  if [ -d "$run/images" ]; then bind "$run/images" "$root/images"; mount -o remount,bind,ro "$root/images"; fi
  cp "$checkout/integration/testbed/recipe/containerd.toml" "$root/etc/containerd/config.toml"
  for binary in containerd-shim-crab-v2 crab; do
    target=${CARGO_TARGET_DIR:-$checkout/target}/${CRAB_PROFILE:-release}/$binary
    [ ! -e "$target" ] || install -m 755 "$target" "$root/usr/local/bin/$binary"
  done
  for binary in "$run"/bin/*; do [ ! -e "$binary" ] || install -m 755 "$binary" "$root/usr/local/bin/"; done
  echo crab-bed >"$root/etc/hostname"
}

# What of the caller's environment reaches the bed. The rest would make a test depend on the machine.
PASS=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8)
for name in $(compgen -e); do
  case $name in CRAB_CACHE) ;; TERM | CI | COLUMNS | LINES | RUST_* | CRAB_* | PYTEST_* | BED_*) PASS+=("$name=${!name}") ;; esac
done
unset name
