#!/bin/bash
# Runs the integration tests in a node, on real KVM: node.sh test [filter...]
#
# QEMU always; Cloud Hypervisor where CHSNAP_CLOUD_HYPERVISOR_AMD64 or _ARM64 names its binary for the
# node's architecture. Filters are the tests' own: a part of <vmm>/<containerd>/<topic>::<case>.
# CHSNAP_NO_BUILD=1 takes what has been built. The table in docs/matrix.md (CHSNAP_MATRIX names another) is
# written from the outcome of the cases that ran.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/../lib.sh"

export ARCH=${ARCH:-$(host_arch)}
NODE=$ROOT/hack/node.sh
OUT=$TARGET/node/$ARCH${NAME:+-$NAME}/out
LOG=$OUT/suite.log
case $ARCH in
  amd64) VMM=${CHSNAP_CLOUD_HYPERVISOR_AMD64:-} VARIABLE=CHSNAP_CLOUD_HYPERVISOR_AMD64 ;;
  arm64) VMM=${CHSNAP_CLOUD_HYPERVISOR_ARM64:-} VARIABLE=CHSNAP_CLOUD_HYPERVISOR_ARM64 ;;
  *) die "no node for the architecture $ARCH: amd64 and arm64 are known" ;;
esac
[ -z "$VMM" ] || [ -x "$VMM" ] || die "$VARIABLE=$VMM: no such program"
"$NODE" status >/dev/null && die "an $ARCH node runs already and may hold older files: stop it first"

target=()
[ "$ARCH" = "$(host_arch)" ] || target=(--target "$(rust_triple "$ARCH")")
if [ -z "${CHSNAP_NO_BUILD:-}" ]; then
  "$ROOT/hack/setup.sh"
  "$ROOT/hack/build.sh"
  "$ROOT/hack/image.sh"
fi

suite() {
  if [ "$ARCH" != "$(host_arch)" ]; then use_cross "$ARCH" || die "no toolchain for $ARCH: run hack/setup.sh cross"; fi
  cd "$ROOT"
  CARGO_TARGET_DIR=$TARGET cargo test --locked --release "${target[@]}" --workspace --test suite --no-run --message-format=json-render-diagnostics |
    jq -r 'select(.reason == "compiler-artifact" and .target.name == "suite") | .executable // empty' | tail -n 1
}
say "building the integration tests for $ARCH"
SUITE=$(suite)
[ -x "$SUITE" ] || die "the integration tests did not build for $ARCH"

mkdir -p "$OUT"
cp "$SUITE" "$OUT/suite"
rm -f "$OUT/cloud-hypervisor" "$LOG"
[ -z "$VMM" ] || cp "$VMM" "$OUT/cloud-hypervisor"

# Emulated machines are slow, and the limits are for others: they are PATIENCE times as long.
cat >"$OUT/test" <<'NODE'
#!/bin/bash
set -uo pipefail
cd "$(dirname "$0")"
[ ! -x cloud-hypervisor ] || export CHSNAP_CLOUD_HYPERVISOR=$PWD/cloud-hypervisor
export CHSNAP_TEST_ACCELERATOR=kvm CHSNAP_TEST_PATIENCE=${PATIENCE:-4}
{
  echo "kernel $(uname -r)"
  "$CHSNAP_TARGET/tools/bin/qemu-system-$(uname -m)" --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/qemu \1/p'
  [ ! -x cloud-hypervisor ] || ./cloud-hypervisor --version | sed -n 's/^cloud-hypervisor /cloud-hypervisor /p'
} >versions
# One filter a run is all that the tests' harness takes.
rc=0
for filter in "${@:-}"; do
  ./suite "$filter" 2>&1 | tee -a suite.log || rc=$?
done
exit "$rc"
NODE
chmod 755 "$OUT/test"
rc=0
"$NODE" run "PATIENCE=${PATIENCE:-4} $OUT/test $(printf '%q ' "$@")" || rc=$?
[ -f "$LOG" ] || die "the tests did not run in the $ARCH node"
python3 "$ROOT/hack/node/matrix.py" --arch "$ARCH" --machine "emulated, CPU ${CPU:-max}" --accelerator KVM \
  --commit "$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)" --log "$LOG" --versions "$OUT/versions" \
  --table "${CHSNAP_MATRIX:-$ROOT/docs/matrix.md}" || rc=1
if [ "$rc" -ne 0 ]; then
  say "the end of the node's console:"
  "$NODE" console | tail -n 20 | tr -d '\r' | sed 's/^/    /' >&2
  die "the integration tests failed in the $ARCH node (status $rc); their log is $LOG"
fi
