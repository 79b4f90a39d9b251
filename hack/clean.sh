#!/bin/bash
# Removes target/. Refuses while a containerd of hack/containerd.sh runs there or something is mounted.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

for lock in "$TARGET"/node/*/lock; do
  [ ! -s "$lock" ] || flock -n "$lock" true || die "a node runs in ${lock%/lock}: stop it first (ARCH=… hack/node.sh stop)"
done
mapfile -d '' -t mounted < <(mounts_below "$TARGET")
[ ${#mounted[@]} -eq 0 ] ||
  die "${mounted[0]} is still mounted: stop the containerd that uses it (hack/containerd.sh stop <directory>)"
# Should something get mounted meanwhile, it is not emptied.
rm -rf --one-file-system "${TARGET:?}"
