# shellcheck shell=bash
# A store is a containerd or docker root with images already unpacked: made once, in a bed, and then given to
# every bed. Importing takes seconds; this takes none.
#
#   store-KIND-HASH/tree    small files and databases: copied for each bed, since they are written in place
#   store-KIND-HASH/blobs   containerd's content blobs: hard-linked, since nothing writes to one in place
#   store-KIND-HASH/layers  unpacked layers: bind-mounted read-only, since files in them must keep st_nlink

# store_dir KIND IMAGE…
store_dir() {
  local kind=$1 name; shift
  echo "$CRAB_CACHE/store-$kind-$( { bed_dir; cat "$TESTBED/lib/store.sh"; for name in "$@"; do echo "$name $(image_tar "$name")"; done; } | short_hash)"
}

# stores_ready DOCKER IMAGE…: make the stores that are missing (docker's if DOCKER is not empty).
stores_ready() {
  local docker=$1 name tar; shift
  for name in "$@"; do
    tar=$(image_tar "$name") || die "no image $name in the cache: make it with integration/testbed/trace-image ENV_SH $name"
    touch "$tar" # in use: see prune in build
  done
  store_ready containerd "$@"
  [ -z "$docker" ] || store_ready docker "$@"
}

store_ready() {
  local dir; dir=$(store_dir "$@")
  if [ -d "$dir" ]; then touch "$dir"; return 0; fi
  # A subshell: the lock ends with it.
  (lock "$CRAB_CACHE/store.lock"; [ -d "$dir" ] || store_make "$dir" "$@")
}

# store_make DIR KIND IMAGE…
store_make() {
  local dir=$1 kind=$2 tmp=$CRAB_CACHE/tmp-store to layer layers; shift 2
  say "unpacking for $kind: $*"
  rm -rf "$tmp"; mkdir -p "$tmp"/{containerd,docker,layers,blobs}
  local flags=(); [ "$kind" = containerd ] || flags=(--docker)
  CRAB_BED_IMAGES="$*" "$TESTBED/enter" "${flags[@]}" --populate "$tmp" -- bash /src/integration/testbed/lib/store-import.sh "$kind" "$@"
  case $kind in
    containerd)
      rmdir "$tmp/blobs"; mv "$tmp/containerd/io.containerd.content.v1.content/blobs" "$tmp/blobs"
      layers=("$tmp"/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/*/fs) ;;
    docker) layers=("$tmp"/docker/overlay2/*/diff) ;;
  esac
  for layer in "${layers[@]}"; do
    to=$(basename "$(dirname "$layer")")
    mv "$layer" "$tmp/layers/$to"
    mkdir "$layer"; chmod --reference="$tmp/layers/$to" "$layer"
    echo "$to var/lib/${layer#"$tmp/"}" >>"$tmp/binds"
  done
  mv "$tmp/$kind" "$tmp/tree"; rm -rf "$tmp/containerd" "$tmp/docker"
  publish "$tmp" "$dir"
}

# store_populating DIR IMAGE…: this bed's containerd and docker roots are DIR's, and it gets the image tars.
store_populating() {
  local dir=$1 kind name; shift
  for kind in containerd docker; do
    rmdir "$RUN/disk/$kind"; ln -s "$dir/$kind" "$RUN/disk/$kind"
  done
  mkdir "$RUN/images"
  for name in "$@"; do ln "$(image_tar "$name")" "$RUN/images/$name.tar"; done
}

# stores_mount DOCKER IMAGE…: give this bed what the stores have.
stores_mount() {
  local docker=$1; shift
  store_mount containerd "$@"
  [ -z "$docker" ] || store_mount docker "$@"
}

store_mount() {
  local kind=$1 dir from to; dir=$(store_dir "$@")
  cp -a "$dir/tree/." "$RUN/disk/$kind/"
  [ "$kind" != containerd ] || cp -al "$dir/blobs" "$RUN/disk/containerd/io.containerd.content.v1.content/"
  while read -r from to; do echo "$dir/layers/$from $to"; done <"$dir/binds" >>"$RUN/binds"
}
