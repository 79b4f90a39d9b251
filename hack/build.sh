#!/bin/bash
# Builds what runs on the host, the agent for the guest, and the guest: build.sh [host|agent|guest ...]
# The architecture is this machine's, or ARCH=amd64|arm64; CHSNAP_GUEST_ARCH is the agent's and guest's alone.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

HOST=${ARCH:-$(host_arch)}
ARCH=${CHSNAP_GUEST_ARCH:-$HOST}
export CARGO_TARGET_DIR=$TARGET
cd "$ROOT"

# Never within a step, whose log would have what it says.
cross() {
  [ "$1" != "$(host_arch)" ] || return 0
  use_cross "$1" || { "$ROOT/hack/setup.sh" packages rust cross && use_cross "$1"; } ||
    die "no toolchain for $1: hack/setup.sh cross says why"
}

# For another architecture the programs are in target/<triple>/release.
build_host() {
  local target=()
  cross "$HOST"
  [ "$HOST" = "$(host_arch)" ] || target=(--target "$(rust_triple "$HOST")")
  say "building the shim and chsnap for $HOST"
  cargo build --locked --release "${target[@]}" -p chsnap-shim
}

# Static, so that the initramfs needs no libraries. --target is given even for the own
# architecture: without it the flags would reach build scripts and procedural macros, which cannot
# be linked statically.
build_agent() {
  local triple
  triple=$(rust_triple "$ARCH")
  # What a panic names is the same wherever the crates lie: the initramfs is the same on every machine.
  RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}/registry/src=/registry" \
    cargo build --locked --profile agent --target "$triple" -p chsnap-agent
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(host agent guest)
# The agent's last step is as long as many before it, and is one thread's: beside the other programs it costs little.
if [ "${parts[0]} ${parts[1]:-}" = "host agent" ]; then
  rc=0
  cross "$ARCH"
  # In a group of its own, and to go with this script: what a shell runs beside itself ignores a terminal's interrupt.
  set -m
  step agent "building the agent for $ARCH, beside the shim" build_agent &
  beside=$!
  set +m
  trap 'kill -- "-$beside" 2>/dev/null || true' EXIT
  build_host || rc=$?
  wait "$beside" || rc=$?
  trap - EXIT
  [ "$rc" -eq 0 ] || exit "$rc"
  parts=("${parts[@]:2}")
fi
for part in "${parts[@]}"; do
  case $part in
    host) build_host ;;
    agent)
      cross "$ARCH"
      step agent "building the agent for $ARCH" build_agent
      ;;
    guest) "$ROOT/hack/guest/build.sh" "$ARCH" ;;
    *) die "build.sh: '$part' is none of host, agent, guest" ;;
  esac
done
