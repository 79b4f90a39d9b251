#!/bin/bash
# What can be said without running anything: format, lints, dependencies' licences, shell scripts.
# Both architectures are compiled where a cross linker and the target's standard library are there.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"
export CARGO_TARGET_DIR=$TARGET
cd "$ROOT"

failed=()
# check <name> <command...>: all checks run, and the failures are named together.
check() {
  local name=$1
  shift
  say "check: $name"
  "$@" || failed+=("$name")
}

shell_scripts() {
  # Not from git: a copy of the sources has none, and git refuses another user's checkout.
  find . \( -path ./.git -o -path ./target -o -path "./${TARGET#"$PWD"/}" \) -prune -o \
    \( -name '*.sh' -o -path ./.ci/run \) -type f -print0 | xargs -0 shellcheck -x
}

# The advisory database would have to be downloaded from a place that is no package registry, and a
# check that fails without the network says nothing about this code.
dependencies() { "$BIN/cargo-deny" --offline --log-level error check --hide-inclusion-graph bans licenses sources; }

other_arch() (
  arch=arm64
  [ "$(host_arch)" = amd64 ] || arch=amd64
  if ! use_cross "$arch"; then
    say "check: $arch is left out, for want of a toolchain: hack/setup.sh cross brings one"
    return 0
  fi
  cargo check --locked --workspace --all-targets --target "$(rust_triple "$arch")"
)

"$ROOT/hack/setup.sh" packages rust rust-lints cargo-deny
# cargo-deny works offline and looks at every platform's dependencies, not only at what was compiled.
step cargo-fetch "fetching the dependencies' sources" cargo fetch --locked || die "the dependencies could not be fetched"
check format cargo fmt --all --check
check clippy cargo clippy --locked --workspace --all-targets -- -D warnings
check dependencies dependencies
check shell shell_scripts
check "the node's transport" python3 hack/node/selftest.py
check "the matrix of what was run" python3 hack/node/matrix_test.py
check "the other architecture" other_arch
for arch in amd64 arm64; do
  [ ! -f "$TARGET/guest/$arch/initramfs" ] || check "the initramfs for $arch, again" hack/guest/build.sh "$arch" verify
done
if [ -x "$TARGET/release/chsnap" ] && [ -d "$TARGET/tools/containerd-1.6" ] && [ -d "$TARGET/tools/containerd-2.1" ]; then
  check "what is installed" hack/install_test.sh
else
  say "check: what is installed is left out, as it is not built: 'make test' brings all it takes"
fi
[ ${#failed[@]} -eq 0 ] || die "failed: $(printf '%s; ' "${failed[@]}")"
say "all checks passed"
