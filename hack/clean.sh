#!/bin/bash
# Removes target/. Refuses while a containerd of hack/containerd.sh runs there or something is mounted.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

mounted=$(awk -v t="$TARGET/" 'index($5, t) == 1 { print $5; exit }' /proc/self/mountinfo)
[ -z "$mounted" ] || die "$mounted is still mounted: stop the containerd that uses it (hack/containerd.sh stop <directory>)"
rm -rf "${TARGET:?}"
