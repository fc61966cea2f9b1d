#!/bin/sh
# hook_digest.sh NAMESPACE ID INIT_PID: crab runs it, as /etc/crab/hooks/frozen or …/restored (replay.py installs
# the links), while the sandbox stands still; it leaves the digest of that very state for replay.py.
# Only for sandboxes that a replay waits for: they have a directory below /run/crab-replay.
set -eu
results=/run/crab-replay/$1/$2
[ -d "$results" ] || exit 0
moment=${0##*/}
digest=$(dirname "$(readlink -f "$0")")/../digest/digest.py
# Renamed when whole. A later cut replaces an earlier one: the newest checkpoint is what a restore goes back to.
python3 "$digest" sandbox --pid "$3" --freeze --json "$results/.$moment" >"$results/$moment.log" 2>&1
mv "$results/.$moment" "$results/$moment.json"
