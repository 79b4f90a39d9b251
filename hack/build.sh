#!/bin/bash
# Builds what runs on the host, the agent for the guest, and the guest: build.sh [host|agent|guest ...]
# The agent's architecture is this machine's, or that of CHSNAP_GUEST_ARCH (amd64, arm64).
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

ARCH=${CHSNAP_GUEST_ARCH:-$(host_arch)}
export CARGO_TARGET_DIR=$TARGET
cd "$ROOT"

# Cargo prints its own progress.
build_host() {
  say "building the shim and chsnap"
  cargo build --locked --release -p chsnap-shim
}

# Static, so that the initramfs needs no libraries. --target is given even for the own
# architecture: without it the flags would reach build scripts and procedural macros, which cannot
# be linked statically.
build_agent() {
  local triple
  triple=$(rust_triple "$ARCH")
  if [ "$ARCH" != "$(host_arch)" ]; then
    use_cross "$ARCH" || die "no toolchain for $ARCH: run hack/setup.sh cross"
  fi
  say "building the agent for $ARCH"
  RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build --locked --profile agent --target "$triple" -p chsnap-agent
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(host agent guest)
for part in "${parts[@]}"; do
  case $part in
    host) build_host ;;
    agent) build_agent ;;
    guest) "$ROOT/hack/guest/build.sh" "$ARCH" ;;
    *) die "build.sh: '$part' is none of host, agent, guest" ;;
  esac
done
