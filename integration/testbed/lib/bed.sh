# shellcheck shell=bash
# The bed's own root: a layer on the base.

bed_dir() {
  echo "$CRAB_CACHE/bed-$( { base_dir; cat "$TESTBED/recipe/bed.sh" "$TESTBED/lib/layer.sh"; } | short_hash)"
}

make_bed() {
  local dir tmp; dir=$(bed_dir)
  [ ! -d "$dir" ] || return 0
  make_base
  say "installing containerd, runc, docker, CRIU into the bed"
  tmp=$(mktemp -d "$CRAB_CACHE/tmp/bed.XXXXXX")
  make_layer "$TESTBED/recipe/bed.sh" "$tmp/root" keep >"$tmp/log" 2>&1 ||
    { tail -n 30 "$tmp/log" >&2; die "building the bed failed (log: $tmp/log)"; }
  publish "$tmp" "$dir"
}
