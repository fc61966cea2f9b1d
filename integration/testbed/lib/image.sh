# shellcheck shell=bash
# Images: a layer on the base, packed by mkimage.py. Each has an env.sh that makes it; its tar is named after
# the hash of that and of the base. The link NAME.tar points to the newest.

AGENT_SCRIPT=$TESTBED/recipe/agent.sh

# image_made_of NAME ENV_SH: where that image is, or would be.
image_made_of() {
  echo "$CRAB_CACHE/images/$1-$( { base_dir; cat "$2" "$TESTBED/mkimage.py" "$TESTBED/lib/layer.sh"; } | short_hash).tar"
}

# image_tar NAME: the image to be imported; fails if there is none. (The agent image goes by its recipe, not by
# the link: two checkouts may share the cache.)
image_tar() {
  local tar
  if [ "$1" = agent ]; then tar=$(image_made_of agent "$AGENT_SCRIPT"); else tar=$(readlink -f "$CRAB_CACHE/images/$1.tar"); fi
  [ -e "$tar" ] && echo "$tar"
}

# image_ready NAME ENV_SH: whether there is nothing to do.
image_ready() {
  local tar; tar=$(image_made_of "$1" "$2")
  [ -e "$tar" ] && [ "$(readlink "$CRAB_CACHE/images/$1.tar")" = "${tar##*/}" ]
}

# make_image NAME ENV_SH keep|seed
make_image() {
  local name=$1 script=$2 debs=$3 tmp tar link=$CRAB_CACHE/images/$1.tar
  tar=$(image_made_of "$name" "$script")
  mkdir -p "$CRAB_CACHE/images"
  if [ ! -e "$tar" ]; then
    make_base
    say "making the image crab.test/$name:latest"
    tmp=$(mktemp -d "$CRAB_CACHE/tmp/image.XXXXXX")
    make_layer "$script" "$tmp/root" "$debs" >"$tmp/log" 2>&1 ||
      { tail -n 30 "$tmp/log" >&2; die "making the image $name failed (log: $tmp/log)"; }
    python3 "$TESTBED/mkimage.py" "$(base_dir)/root" "crab.test/$name:latest" "$tmp/image.tar" --upper "$tmp/root"
    publish "$tmp/image.tar" "$tar"
    rm -rf "$tmp"
  fi
  ln -sfn "${tar##*/}" "$link.new"; mv -T "$link.new" "$link"
}
