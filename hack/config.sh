#!/bin/bash
# config.sh <file>: writes a configuration that uses what was built and unpacked below target/.
# CHSNAP_STATE_DIR is where pods are recorded and have their sockets: a short path, for a socket's may
# have 107 bytes. CHSNAP_SNAPSHOT_MODE=auto has pods restored, and templates built beside them; CHSNAP_SNAPSHOT_DIR is
# where those are kept, CHSNAP_CTR containerd's client.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"
[ $# -eq 1 ] || die "usage: config.sh <file>"

kernel=$TARGET/guest/amd64/vmlinux
qemu=$BIN/qemu-system-x86_64
if [ "$(host_arch)" = arm64 ]; then
  kernel=$TARGET/guest/arm64/Image
  qemu=$BIN/qemu-system-aarch64
fi
mkdir -p "$(dirname "$1")"
cat >"$1" <<CONF
[vmm]
qemu = "$qemu"

[guest]
kernel = "$kernel"
initramfs = "${kernel%/*}/initramfs"

[share]
virtiofsd = "$BIN/virtiofsd"

[state]
dir = "${CHSNAP_STATE_DIR:-/run/chsnap}"

[snapshot]
mode = "${CHSNAP_SNAPSHOT_MODE:-off}"
dir = "${CHSNAP_SNAPSHOT_DIR:-$TARGET/snapshots}"
ctr = "${CHSNAP_CTR:-ctr}"
CONF
