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
say "unit tests"
cargo test --locked --workspace --exclude chsnap-tests
# Serially: every test looks for what it left behind, and the machine may have two cores.
say "integration tests"
cargo test --locked --release -p chsnap-tests -- --test-threads=1 "$@"
