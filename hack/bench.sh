#!/bin/bash
# make bench: where the time of a start goes, and what a running pod costs. Writes target/bench.json, and
# fails when the shim takes more than its limits.
#
#   CHSNAP_BENCH_RUNS=5         starts of each kind; 5 at least
#   CHSNAP_BENCH_CONTAINERD=1.6 or 2.1
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

RUNS=${CHSNAP_BENCH_RUNS:-5}
VERSION=${CHSNAP_BENCH_CONTAINERD:-1.6}
IMAGE=localhost/chsnap/python-demo:latest
DIR=$TARGET/bench
CHSNAP_STATE_DIR=$(run_dir bench)
export CHSNAP_STATE_DIR
if [[ ! $RUNS =~ ^[0-9]+$ ]] || [ "$RUNS" -lt 5 ]; then die "CHSNAP_BENCH_RUNS=$RUNS: a number of 5 or more is needed"; fi

"$ROOT/hack/setup.sh"
"$ROOT/hack/build.sh"
"$ROOT/hack/image.sh"
say "building the floor that the shim is compared with"
CARGO_TARGET_DIR=$TARGET cargo build --locked --release -p chsnap-shim --example bare

take_lock bench
ctr=("$TOOLS/containerd-$VERSION/bin/ctr")
cleanup() {
  local status=$?
  trap - EXIT INT TERM
  [ -z "${address:-}" ] || "${ctr[@]}" images unmount "$DIR/rootfs" >/dev/null 2>&1 || true
  "$ROOT/hack/containerd.sh" stop "$DIR" || true
  rm -rf "$DIR/root" "$DIR/snapshots" "$CHSNAP_STATE_DIR"
  rmdir "$DIR/rootfs" /run/chsnap-dev 2>/dev/null || true
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

"$ROOT/hack/containerd.sh" stop "$DIR"
rm -rf --one-file-system "$DIR" "$CHSNAP_STATE_DIR"
mkdir -p "$DIR/rootfs" "$CHSNAP_STATE_DIR"
CHSNAP_SNAPSHOT_DIR=$DIR/snapshots CHSNAP_CTR=${ctr[0]} "$ROOT/hack/config.sh" "$DIR/chsnap.toml"
say "starting containerd $VERSION and importing the image"
address=$("$ROOT/hack/containerd.sh" start "$VERSION" "$DIR")
ctr+=(-a "$address")
"${ctr[@]}" images import "$TARGET/image/python.tar" >"$LOGS/bench-import.log" 2>&1 ||
  die "the image could not be imported: $(tail -n 3 "$LOGS/bench-import.log")"
"${ctr[@]}" images mount --rw "$IMAGE" "$DIR/rootfs" >/dev/null

python3 "$ROOT/hack/bench.py" --runs "$RUNS" --ctr "${ctr[0]}" --address "$address" --image "$IMAGE" \
  --config "$DIR/chsnap.toml" --state "$CHSNAP_STATE_DIR" --snapshots "$DIR/snapshots" --rootfs "$DIR/rootfs" \
  --bin "${CHSNAP_BIN_DIR:-$TARGET/release}" --bare "$TARGET/release/examples/bare" --out "$TARGET/bench.json"
say "the same is in $TARGET/bench.json"
