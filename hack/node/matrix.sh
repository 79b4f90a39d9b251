#!/bin/bash
# make test-matrix: the integration tests on both architectures, each in a node, on both VMMs: matrix.sh [filter...]
# CHSNAP_CLOUD_HYPERVISOR_AMD64 and _ARM64 name Cloud Hypervisor's binaries; CHSNAP_MATRIX_WITHOUT_CLOUD_HYPERVISOR=1
# goes without.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/../lib.sh"

# Told now rather than after hours.
for name in CHSNAP_CLOUD_HYPERVISOR_ARM64 CHSNAP_CLOUD_HYPERVISOR_AMD64; do
  [ -n "${!name:-}" ] || [ "${CHSNAP_MATRIX_WITHOUT_CLOUD_HYPERVISOR:-}" = 1 ] ||
    die "$name is not set, so Cloud Hypervisor would not be tested: name its binary, or set CHSNAP_MATRIX_WITHOUT_CLOUD_HYPERVISOR=1"
  [ -z "${!name:-}" ] || [ -x "${!name}" ] || die "$name=${!name}: no such program"
done
status=0
# The second is run whatever becomes of the first.
for arch in arm64 amd64; do ARCH=$arch "$ROOT/hack/node.sh" test "$@" || status=1; done
exit "$status"
