#!/bin/bash
# Everything that can be tested here: test.sh [arguments for the integration tests]
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

# Before anything is built: a tree may change meanwhile.
commit=$(tested_commit)
"$ROOT/hack/setup.sh"
"$ROOT/hack/build.sh"
"$ROOT/hack/image.sh"
export CARGO_TARGET_DIR=$TARGET
cd "$ROOT"
say "building the tests, then unit tests"
# Nothing that the set-up brings may be missing; what no set-up can bring (KVM, Cloud Hypervisor) is told.
export CHSNAP_TESTS_COMPLETE=1 CHSNAP_TESTS_SKIPPED=$LOGS/skipped
: >"$CHSNAP_TESTS_SKIPPED"
# As released, which is what users run; and a second profile would compile every dependency a second time.
cargo test --locked --release --workspace --no-run
# Everything but the suite, which is a directory. Named, as without the suite's package the others would have their
# dependencies with fewer features, and be compiled once more.
units=(--lib --bins)
for file in */tests/*.rs; do units+=(--test "$(basename "$file" .rs)"); done
cargo test --locked --release --workspace "${units[@]}"
# With targets named, cargo leaves these out, and it takes them only alone.
cargo test --locked --release --workspace --doc
say "tests of the scripts: what is installed, the node's transport, the matrix"
hack/install_test.sh
python3 hack/node/selftest.py
python3 hack/node/matrix_test.py
if [ -s "$CHSNAP_TESTS_SKIPPED" ]; then
  say "skipped, $(wc -l <"$CHSNAP_TESTS_SKIPPED") unit tests:"
  sed 's/^/    /' "$CHSNAP_TESTS_SKIPPED" >&2
fi
say "integration tests"
# Of the whole workspace, too: alone it would have its dependencies with fewer features, and so once more.
suite=(cargo test --locked --release --workspace --test suite --)
export CHSNAP_TEST_LOGS=$LOGS
# Restored or booted, a container has to be the same to everybody.
export CHSNAP_TEST_WAY=${CHSNAP_TEST_WAY:-all}
rc=0
"${suite[@]}" "$@" 2>&1 | tee "$LOGS/suite.log" || rc=$?

# What was tested where, as node/test.sh writes it for nodes.
record() {
  local accelerator vmm=${CHSNAP_CLOUD_HYPERVISOR:-cloud-hypervisor}
  CHSNAP_TEST_FILTERS='' "${suite[@]}" --list >"$LOGS/suite.cases" 2>"$LOGS/suite-list.log" || return
  # What is found out about the host is remembered with the state, and that is to stay below TARGET.
  CHSNAP_STATE_DIR=$LOGS/suite-state "$ROOT/hack/config.sh" "$LOGS/suite.toml" || return
  # It fails where anything is amiss, and says all the same what runs guests.
  accelerator=${CHSNAP_TEST_ACCELERATOR:-$({ "${CHSNAP_BIN_DIR:-$TARGET/release}/chsnap" doctor --json --config "$LOGS/suite.toml" || true; } |
    jq -r '.driver.accelerator // "unknown"')}
  {
    echo "kernel $(uname -r)"
    echo "qemu $(qemu_version "$BIN/qemu-system-$(uname -m)")"
    { "$vmm" --version 2>/dev/null || true; } | sed -n 's/^cloud-hypervisor /cloud-hypervisor /p'
  } >"$LOGS/suite.versions"
  python3 "$ROOT/hack/node/matrix.py" --arch "$(host_arch)" --machine "host, $(nproc) CPUs${CHSNAP_TEST_WAY:+, way $CHSNAP_TEST_WAY}" \
    --accelerator "${accelerator^^}" --commit "$commit" --log "$LOGS/suite.log" --cases "$LOGS/suite.cases" \
    --versions "$LOGS/suite.versions" --table "${CHSNAP_MATRIX:-$TARGET/matrix.md}"
}
record || say "note: what ran is not in ${CHSNAP_MATRIX:-$TARGET/matrix.md}"
exit "$rc"
