#!/bin/bash
# Runs the integration tests in a node, on real KVM: node.sh test [filter...]
#
# QEMU always; Cloud Hypervisor where CHSNAP_CLOUD_HYPERVISOR_AMD64 or _ARM64 names its binary for the
# node's architecture. Filters are the tests' own: a part of <vmm>/<containerd>/<topic>::<case>. The drivers' own tests, with
# the real KVM of that architecture, are the topic "drivers": they run without filters, with that one, or, those with a part
# in their names, with drivers::<part>.
# CHSNAP_TEST_WAY, CHSNAP_TEST_MEMORY_RESTORE, CHSNAP_TEST_TIMES and CHSNAP_TEST_FEATURES hold as they do without a node.
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
[ -z "$VMM" ] || { [ -f "$VMM" ] && [ -x "$VMM" ]; } || die "$VARIABLE=$VMM: no such program"
[ -n "$VMM" ] || say "$VARIABLE is not set: Cloud Hypervisor is not tested, and has no row in the table"
# Two would write into one directory.
mkdir -p "${OUT%/out}"
exec 8>"${OUT%/out}/test.lock"
flock -n 8 || die "the integration tests run in this $ARCH node already: wait for them, or set NAME"
"$NODE" status >/dev/null && die "an $ARCH node runs already and may hold older files: stop it first"

# Before anything is built: a tree may change meanwhile.
commit=$(tested_commit)
machine="emulated, CPU ${CPU:-max}${CHSNAP_TEST_WAY:+, way $CHSNAP_TEST_WAY}${CHSNAP_TEST_MEMORY_RESTORE:+, $CHSNAP_TEST_MEMORY_RESTORE}"
target=()
[ "$ARCH" = "$(host_arch)" ] || target=(--target "$(rust_triple "$ARCH")")
if [ -z "${CHSNAP_NO_BUILD:-}" ]; then
  "$ROOT/hack/setup.sh"
  "$ROOT/hack/build.sh"
  "$ROOT/hack/image.sh"
else
  # Who knows of what.
  commit=${commit%-dirty}-dirty
fi

# built <name> <what cargo builds of it...>: the program of these tests
built() {
  if [ "$ARCH" != "$(host_arch)" ]; then use_cross "$ARCH" || die "no toolchain for $ARCH: run hack/setup.sh cross"; fi
  cd "$ROOT" || return
  local name=$1
  shift
  CARGO_TARGET_DIR=$TARGET cargo test --locked --release "${target[@]}" "$@" --no-run --message-format=json-render-diagnostics |
    jq -r --arg name "$name" 'select(.reason == "compiler-artifact" and .target.name == $name) | .executable // empty' | tail -n 1
}
drivers='' filters=()
for filter in "$@"; do
  case $filter in
    drivers) drivers+=' vmm::' ;;
    drivers::*) drivers+=" ${filter#drivers::}" ;;
    *) filters+=("$filter") ;;
  esac
done
[ $# -gt 0 ] || drivers='vmm::'
SUITE=''
if [ $# -eq 0 ] || [ "${#filters[@]}" -gt 0 ]; then
  say "building the integration tests for $ARCH"
  SUITE=$(built suite --workspace --test suite) || die "the integration tests did not build for $ARCH"
  [ -x "$SUITE" ] || die "the integration tests did not build for $ARCH"
fi
DRIVERS=''
if [ -n "$drivers" ]; then
  say "building the drivers' tests for $ARCH"
  DRIVERS=$(built chsnap --package chsnap-shim --lib) || die "the drivers' tests did not build for $ARCH"
  [ -x "$DRIVERS" ] || die "the drivers' tests did not build for $ARCH"
fi

mkdir -p "$OUT"
rm -f "$OUT"/{suite,drivers,cloud-hypervisor,cases,times} "$LOG" "$OUT"/containerd*.log "${OUT%/out}/console.log"
for pair in "$SUITE suite" "$DRIVERS drivers" "$VMM cloud-hypervisor"; do
  [ -z "${pair% *}" ] || cp "${pair% *}" "$OUT/${pair##* }"
done

# Emulated machines are slow, and the limits are for others: they are PATIENCE times as long.
cat >"$OUT/test" <<'NODE'
#!/bin/bash
set -uo pipefail
cd "$(dirname "$0")"
[ ! -x cloud-hypervisor ] || export CHSNAP_CLOUD_HYPERVISOR=$PWD/cloud-hypervisor
export CHSNAP_TEST_ACCELERATOR=kvm CHSNAP_TEST_LOGS=$PWD
{
  echo "kernel $(uname -r)"
  "$CHSNAP_TARGET/tools/bin/qemu-system-$(uname -m)" --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/qemu \1/p'
  [ ! -x cloud-hypervisor ] || ./cloud-hypervisor --version | sed -n 's/^cloud-hypervisor /cloud-hypervisor /p'
} >versions
rc=0
: >cases
: >suite.log
# Told at once, as a node that hangs takes what is told at the end with it.
if [ -x drivers ]; then
  # Without Cloud Hypervisor, of its driver there is the mask, which takes no more than KVM.
  ours='qemu|cloud_hypervisor::mask'
  [ ! -x cloud-hypervisor ] || ours='qemu|cloud_hypervisor'
  ./drivers --list | grep -E "^vmm::($ours)::.*: test$" >>cases
  parts=()
  for part in $DRIVERS; do parts+=(-e "$part"); done
  mapfile -t chosen < <(sed -n 's/: test$//p' cases | grep -F "${parts[@]}")
  rm -f skipped
  # What the set-up brings is missing if it is not there. Of the rest, a test that is skipped counts as passed for Rust's harness.
  CHSNAP_TESTS_COMPLETE=1 CHSNAP_TESTS_SKIPPED=$PWD/skipped CARGO_TARGET_DIR=$CHSNAP_TARGET \
    ./drivers --exact "${chosen[@]:-none}" --test-threads=1 2>&1 | tee -a suite.log || rc=$?
  if [ "${#chosen[@]}" -eq 0 ]; then
    echo "chsnap: error: no driver's test is called $DRIVERS" >&2
    rc=1
  fi
  if [ -s skipped ]; then
    sed 's/^/chsnap: error: a test was skipped: /' skipped >&2
    rc=1
  fi
fi
[ -x suite ] || exit "$rc"
CHSNAP_TEST_FILTERS='' ./suite --list >>cases || exit
# Cases that are ignored do not fail, so a Cloud Hypervisor that cannot run would pass for one that was tested.
why=$(sed -n 's/^cloud-hypervisor: [0-9]* cases are ignored: //p' cases)
if [ -x cloud-hypervisor ] && [ -n "$why" ] && ./suite --list | grep '^cloud-hypervisor/' >/dev/null; then
  echo "chsnap: error: Cloud Hypervisor is to be tested and cannot: $why" >&2
  exit 1
fi
# Kept now and then: they lie on the node's own disk, which goes with a node that hangs.
keep_logs() {
  for log in "$CHSNAP_TARGET"/tests/*/containerd.log; do
    [ ! -f "$log" ] || tail -c 4M "$log" >"containerd-of-$(basename "$(dirname "$log")").log"
  done
}
{ while sleep 15; do keep_logs; done; } >/dev/null 2>&1 &
keeper=$!
cases=0
./suite --nocapture 2>&1 | tee -a suite.log || cases=$?
kill "$keeper"
wait "$keeper" || true
rm -f containerd-of-*.log
if [ "$cases" -ne 0 ]; then
  # The suite keeps its logs itself, unless it was killed.
  keep_logs
  rc=$cases
fi
exit "$rc"
NODE
chmod 755 "$OUT/test"
variables=("CHSNAP_TEST_PATIENCE=${PATIENCE:-4}" "CHSNAP_TEST_FILTERS=${filters[*]}" "DRIVERS=$drivers")
[ -z "${CHSNAP_TEST_TIMES:-}" ] || variables+=("CHSNAP_TEST_TIMES=$OUT/times")
# That CPU has both, and without them the cases of the rungs would have nothing to hide.
if [ "$ARCH" = arm64 ] && [ "${CPU:-max}" = max ]; then CHSNAP_TEST_FEATURES=${CHSNAP_TEST_FEATURES:-pmu,sve}; fi
for name in CHSNAP_TEST_WAY CHSNAP_TEST_MEMORY_RESTORE CHSNAP_TEST_FEATURES; do [ -z "${!name:-}" ] || variables+=("$name=${!name}"); done
rc=0
OWN_NODE=1 "$NODE" run "env $(printf '%q ' "${variables[@]}" "$OUT/test")" || rc=$?
[ -z "${CHSNAP_TEST_TIMES:-}" ] || [ "$CHSNAP_TEST_TIMES" -ef "$OUT/times" ] || cat "$OUT/times" >>"$CHSNAP_TEST_TIMES" || true
if [ -s "$LOG" ]; then
  # A node that hangs has another status than cases that fail.
  python3 "$ROOT/hack/node/matrix.py" --arch "$ARCH" --machine "$machine" --accelerator KVM --commit "$commit" \
    --log "$LOG" --cases "$OUT/cases" --versions "$OUT/versions" --table "${CHSNAP_MATRIX:-$ROOT/docs/matrix.md}" ||
    [ "$rc" -ne 0 ] || rc=1
fi
[ "$rc" -ne 0 ] || exit 0
say "the end of the node's console:"
{ "$NODE" console 2>/dev/null || true; } | tail -n 20 | tr -d '\r' | sed 's/^/    /' >&2
for log in "$OUT"/containerd*.log; do [ ! -f "$log" ] || say "a containerd's log: $log"; done
if [ -s "$LOG" ]; then
  say "error: the integration tests failed in the $ARCH node (status $rc); their log is $LOG"
else
  say "error: the integration tests did not run in the $ARCH node (status $rc)"
fi
exit "$rc"
