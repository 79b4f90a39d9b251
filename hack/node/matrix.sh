#!/bin/bash
# make test-matrix: the integration tests on both architectures, each in a node, on both VMMs: matrix.sh [filter...]
# CHSNAP_CLOUD_HYPERVISOR_AMD64 and _ARM64 name Cloud Hypervisor's binaries; CHSNAP_MATRIX_WITHOUT_CLOUD_HYPERVISOR=1
# goes without. In all ways, unless CHSNAP_TEST_WAY says another. Without filters also the rungs on a host that has neither
# performance counters nor SVE.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/../lib.sh"

# Told now rather than after hours.
for name in CHSNAP_CLOUD_HYPERVISOR_ARM64 CHSNAP_CLOUD_HYPERVISOR_AMD64; do
  [ -n "${!name:-}" ] || [ "${CHSNAP_MATRIX_WITHOUT_CLOUD_HYPERVISOR:-}" = 1 ] ||
    die "$name is not set, so Cloud Hypervisor would not be tested: name its binary, or set CHSNAP_MATRIX_WITHOUT_CLOUD_HYPERVISOR=1"
  [ -z "${!name:-}" ] || { [ -f "${!name}" ] && [ -x "${!name}" ]; } || die "$name=${!name}: no such program"
done
export CHSNAP_TEST_WAY=${CHSNAP_TEST_WAY:-all}
status=0
# The second is run whatever becomes of the first.
for arch in arm64 amd64; do ARCH=$arch "$ROOT/hack/node.sh" test "$@" || status=1; done
[ $# -gt 0 ] ||
  ARCH=arm64 CPU=neoverse-n1,pmu=off CHSNAP_TEST_FEATURES=no-pmu,no-sve "$ROOT/hack/node.sh" test rung || status=1
exit "$status"
