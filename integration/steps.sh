# Steps, one after the other, and what runs beside them. Sourced by a program that stops at the first step that fails.
# Sets WORK, a directory for what is said meanwhile, and removes it at the end.

WORK=$(mktemp -d)
trap leave EXIT

say() { printf '\n== %s\n' "$*"; }

step() { # step NAME CMD…
  local name=$1 begin=$SECONDS; shift
  say "$name"
  "$@" || { say "FAILED: $name"; exit 1; }
  printf '== %s: %d s\n' "$name" $((SECONDS - begin))
}

# What runs beside the steps: NAME → its process group, its begin. Each has its output in $WORK/NAME.
declare -gA GROUP BEGIN

aside() { # aside NAME CMD…: begin something beside the steps that follow
  local name=$1; shift
  BEGIN[$name]=$SECONDS
  set -m # a process group of its own, to be ended as a whole
  (set +m; "$@"; echo $((SECONDS - BEGIN[$name])) >"$WORK/$name.took") </dev/null >"$WORK/$name" 2>&1 &
  GROUP[$name]=$!
  set +m
}

join() { # join NAME: wait until it has ended; its output, if it has failed
  local name=$1 pid=${GROUP[$1]} waited=$SECONDS
  say "$name"
  wait "$pid" || { cat "$WORK/$name"; say "FAILED: $name"; exit 1; }
  unset "GROUP[$name]"
  tail -n 3 "$WORK/$name"
  printf '== %s: %d s, of which %d s were waited for\n' "$name" "$(cat "$WORK/$name.took")" $((SECONDS - waited))
}

leave() {
  local pid
  for pid in "${GROUP[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  wait
  rm -rf "$WORK"
}
