#!/bin/bash
# Everything that can be tested here: test.sh [arguments for the integration tests]
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

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
cargo test --locked --release --workspace --exclude chsnap-tests
# The harness's own, without its suite.
cargo test --locked --release --workspace --lib -- table::
if [ -s "$CHSNAP_TESTS_SKIPPED" ]; then
  say "skipped, $(wc -l <"$CHSNAP_TESTS_SKIPPED") unit tests:"
  sed 's/^/    /' "$CHSNAP_TESTS_SKIPPED" >&2
fi
say "integration tests"
# Of the whole workspace, too: alone it would have its dependencies with fewer features, and so once more.
cargo test --locked --release --workspace --test suite -- "$@"
