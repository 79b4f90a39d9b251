#!/bin/bash
# Brings in what building and running chsnap needs: setup.sh [all | <part>...]
# Every part is idempotent and cheap when it is already done. Parts: see the end of this file.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=hack/apt.sh
. "$ROOT/hack/apt.sh"

VIRTIOFSD_VERSION=1.14.0
CARGO_DENY_VERSION=0.18.5
RUST_VERSION=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$ROOT/Cargo.toml" 2>/dev/null || true)
RUST_VERSION=${RUST_VERSION:-1.88}

# Command or file, and the Debian package that brings it. Only what is missing is installed.
part_packages() {
  local missing=() line what package
  [ "$(id -u)" = 0 ] || die "run this as root: a runtime for containerd mounts file systems"
  [ -f /etc/debian_version ] || die "this set-up knows Debian 12 and 13 only; see README.md for what chsnap needs"
  while read -r what package; do
    case $what in
      /*) [ -e "$what" ] || missing+=("$package") ;;
      *) have "$what" || missing+=("$package") ;;
    esac
  done <<LIST
gcc gcc
/usr/include/stdio.h libc6-dev
make make
pkg-config pkg-config
/usr/lib/$(multiarch "$(host_arch)")/pkgconfig/libseccomp.pc libseccomp-dev
/usr/lib/$(multiarch "$(host_arch)")/pkgconfig/libcap-ng.pc libcap-ng-dev
/usr/bin/python3 python3
curl curl
ip iproute2
jq jq
mke2fs e2fsprogs
mmdebstrap mmdebstrap
ps procps
shellcheck shellcheck
xz xz-utils
zstd zstd
flock util-linux
/etc/ssl/certs/ca-certificates.crt ca-certificates
LIST
  [ ${#missing[@]} -gt 0 ] || return 0
  for line in "${missing[@]}"; do say "missing: $line"; done
  step apt-update "reading the machine's package lists" apt-get update || die "apt-get update failed"
  DEBIAN_FRONTEND=noninteractive step apt-install "installing ${missing[*]}" \
    apt-get install -y --no-install-recommends --no-upgrade "${missing[@]}" ||
    die "could not install ${missing[*]}"
}

# The version a program reports; nothing when it is missing or does not run.
cargo_version() { { "$1" --version 2>/dev/null || true; } | sed -n 's/^cargo \([0-9.]*\).*/\1/p'; }

# unpack_rust <directory>: the distribution's newest Rust, with programs in <directory>/bin.
unpack_rust() {
  fetch_debs "$(codename)" "$(host_arch)" "$1" deps cargo-web rustc-web rustfmt-web rust-web-clippy
  rust_wrappers "$1"
}

# rust_wrappers <directory>: what makes unpacked programs run where they are.
rust_wrappers() {
  local dir=$1 lib program
  lib=$dir/usr/lib/$(multiarch "$(host_arch)")
  mkdir -p "$dir/bin"
  # Not plain sh, which drops variables such as cargo's CARGO_BIN_EXE_some-program.
  for program in "$dir"/usr/bin/{cargo,rustc,rustdoc,rustfmt,cargo-fmt,cargo-clippy,clippy-driver}; do
    cat >"$dir/bin/${program##*/}" <<WRAPPER
#!/bin/bash
export LD_LIBRARY_PATH="$dir/usr/lib:$lib:$dir/lib/${lib##*/}\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
exec "$program" "\$@"
WRAPPER
    chmod 755 "$dir/bin/${program##*/}"
  done
}

# The releases' own Rust is older (1.63 in Debian 12, 1.85 in 13), but their security updates carry
# a current one for building browsers: rustc-web and cargo-web. Those conflict with rustc and cargo,
# so they are unpacked rather than installed. A cargo that is new enough, such as rustup's, is used
# as it is.
part_rust() {
  local v dir=$TOOLS/rust
  # An earlier set-up's may be of an earlier kind.
  [ ! -x "$dir/usr/bin/cargo" ] || rust_wrappers "$dir"
  v=$(cargo_version cargo)
  if [ -n "$v" ] && version_ge "$v" "$RUST_VERSION"; then return 0; fi
  say "cargo is ${v:-missing} and $RUST_VERSION is needed: taking the distribution's newest"
  unpack_rust "$dir"
  # lib.sh has put its programs first in PATH.
  hash -r
  v=$(cargo_version cargo)
  if [ -z "$v" ] || ! version_ge "$v" "$RUST_VERSION"; then
    die "cargo of $(codename) is ${v:-not runnable}, not $RUST_VERSION or newer$(security_note "$(codename)" "$(host_arch)"). Or install Rust with rustup, then run this again"
  fi
  say "Rust: $(rustc --version) in $dir"
}

# What `make check` needs of Rust beside the compiler. rustup can be installed without.
part_rust_lints() {
  if cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1; then return 0; fi
  say "this Rust has no rustfmt or no clippy: taking the distribution's newest"
  unpack_rust "$TOOLS/rust"
  hash -r
  if ! cargo fmt --version >/dev/null || ! cargo clippy --version >/dev/null; then
    die "the Rust in $TOOLS/rust does not format and lint either: add the components rustfmt and clippy to yours"
  fi
}

# For the other architecture's agent: Rust's standard library for it and a linker. Where the Rust in
# use has that library (rustup target add) and the linker is installed, nothing is fetched.
part_cross() {
  local arch=arm64 triple gnu dir=$TOOLS/rust-cross tmp=$TOOLS/rust-cross-std
  [ "$(host_arch)" = amd64 ] || arch=amd64
  triple=$(rust_triple "$arch")
  gnu=$(multiarch "$arch")
  if ! have "$gnu-gcc"; then
    [ -x "$TOOLS/gcc-$arch/usr/bin/$gnu-gcc" ] ||
      fetch_debs "$(codename)" "$(host_arch)" "$TOOLS/gcc-$arch" deps "gcc-${gnu/x86_64/x86-64}" "libc6-dev-$arch-cross"
    # GCC finds the rest of itself relative to its own path; its assembler and linker have libraries, and the linker's
    # script for the C library has absolute paths.
    cat >"$BIN/$gnu-gcc" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH="$TOOLS/gcc-$arch/usr/lib/$(multiarch "$(host_arch)")\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
exec "$TOOLS/gcc-$arch/usr/bin/$gnu-gcc" --sysroot="$TOOLS/gcc-$arch" "\$@"
WRAPPER
    chmod 755 "$BIN/$gnu-gcc"
  fi
  [ ! -x "$dir/usr/bin/cargo" ] || rust_wrappers "$dir"
  if has_std rustc "$triple" || has_std "$dir/bin/rustc" "$triple"; then return 0; fi
  unpack_rust "$dir"
  fetch_debs "$(codename)" "$arch" "$tmp" alone libstd-rust-web-dev
  rm -rf "$dir/usr/lib/rustlib/$triple"
  cp -a "$tmp/usr/lib/rustlib/$triple" "$dir/usr/lib/rustlib/"
  rm -rf "$tmp"
  has_std "$dir/bin/rustc" "$triple" || die "the Rust in $dir has no standard library for $triple: the suites' versions differ"
  say "Rust for $arch: $("$dir/bin/rustc" --version) in $dir"
}

# wrapper <directory of unpacked packages> <binary>: QEMU finds its own libraries and firmware.
# It execs, so the process id is QEMU's, and it is plain sh, so it costs a millisecond.
qemu_wrapper() {
  local dir=$1 binary=$2 arch lib
  arch=$(multiarch "$(host_arch)")
  lib=$dir/usr/lib/$arch
  cat >"$BIN/$binary.new" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH="$lib:$dir/lib/$arch\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" QEMU_MODULE_DIR="$lib/qemu"
exec "$dir/usr/bin/$binary" -L "$dir/usr/share/qemu" -L "$dir/usr/share/seabios" -L "$dir/usr/lib/ipxe/qemu" "\$@"
WRAPPER
  chmod 755 "$BIN/$binary.new"
  mv "$BIN/$binary.new" "$BIN/$binary"
}

# qemu_for <binary> <package> <name below target/tools>
qemu_for() {
  local binary=$1 package=$2 dir=$TOOLS/$3 v
  # The one that setup took before, or the system's where it is new enough.
  v=$(qemu_version "$BIN/$binary")
  if [ -n "$v" ] && version_ge "$v" 10; then return 0; fi
  v=$(qemu_version "$binary")
  if [ -n "$v" ] && version_ge "$v" 10; then
    ln -sfn "$(command -v "$binary")" "$BIN/$binary"
    say "QEMU: the system's, $v"
    return 0
  fi
  (fetch_debs "$(newer_suite)" "$(host_arch)" "$dir" deps "$package") ||
    die "there is no $binary 10 or newer here, and it could not be fetched from $(newer_suite): install $package, or mend what is said above"
  qemu_wrapper "$dir" "$binary"
  v=$(qemu_version "$BIN/$binary")
  if [ -z "$v" ] || ! version_ge "$v" 10; then
    "$BIN/$binary" --version || true
    die "the unpacked QEMU in $dir does not run or is too old (${v:-no version}); 10 or newer is needed"
  fi
  say "QEMU: $v in $dir"
}

part_qemu() {
  case $(host_arch) in
    amd64) qemu_for qemu-system-x86_64 "$(qemu_package amd64)" qemu ;;
    arm64) qemu_for qemu-system-aarch64 "$(qemu_package arm64)" qemu ;;
  esac
}

# Only for nodes: a machine of the other kind, emulated.
part_qemu_arm64() { qemu_for qemu-system-aarch64 "$(qemu_package arm64)" qemu-arm64; }
part_qemu_amd64() { qemu_for qemu-system-x86_64 "$(qemu_package amd64)" qemu-amd64; }

# cargo_install <crate> <version> [option...]: into target/tools/<crate>, and its program into target/tools/bin.
# Cargo would compile in /tmp, which may be memory.
cargo_install() {
  local crate=$1 version=$2 build=$TARGET/install-$1
  shift 2
  step "$crate" "building $crate $version (some minutes)" \
    env CARGO_TARGET_DIR="$build" cargo install "$crate" --version "$version" --locked --force --root "$TOOLS/$crate" "$@" ||
    die "$crate $version could not be built"
  rm -rf "$build"
  ln -sfn "../$crate/bin/$crate" "$BIN/$crate"
}

virtiofsd_version() { { "$1" --version 2>/dev/null || true; } | sed -n 's/^virtiofsd \([0-9.]*\).*/\1/p'; }

# Debian 12's virtiofsd is the old one in C, and newer suites' need a newer C library than it has. On Debian 13 the newest
# suite's package runs, which saves some minutes of building.
part_virtiofsd() {
  local v dir=$TOOLS/virtiofsd-packaged
  v=$(virtiofsd_version "$BIN/virtiofsd")
  if [ -n "$v" ] && version_ge "$v" "$VIRTIOFSD_VERSION"; then return 0; fi
  if [ "$(codename)" != bookworm ] && (fetch_debs sid "$(host_arch)" "$dir" alone virtiofsd); then
    v=$(virtiofsd_version "$dir/usr/libexec/virtiofsd")
    if [ -n "$v" ] && version_ge "$v" "$VIRTIOFSD_VERSION"; then
      ln -sfn ../virtiofsd-packaged/usr/libexec/virtiofsd "$BIN/virtiofsd"
      say "virtiofsd: $v in $dir"
      return 0
    fi
    say "note: sid's virtiofsd (${v:-does not run here}) cannot be used"
  fi
  # Without link-time optimisation, which is half of the time that building takes.
  CARGO_PROFILE_RELEASE_LTO=off cargo_install virtiofsd "$VIRTIOFSD_VERSION"
}

# containerd_from <suite> <version wanted> <name below target/tools>
containerd_from() {
  local suite=$1 want=$2 dir=$TOOLS/containerd-$2 v
  if [ -x "$dir/bin/containerd" ] && "$dir/bin/containerd" --version >/dev/null 2>&1; then return 0; fi
  fetch_debs "$suite" "$(host_arch)" "$dir" alone containerd
  ln -sfn usr/bin "$dir/bin"
  v=$("$dir/bin/containerd" --version | awk '{ print $3 }') || die "containerd of $suite does not run on this machine"
  case ${v#v} in
    "$want".*) say "containerd $v in $dir" ;;
    *) say "note: $suite now has containerd $v where $want was expected; the newest is taken" ;;
  esac
}

part_containerd() {
  containerd_from bookworm 1.6
  containerd_from sid 2.1
  if [ ! -x "$BIN/runc" ]; then
    fetch_debs bookworm "$(host_arch)" "$TOOLS/runc" alone runc
    ln -sfn ../runc/usr/sbin/runc "$BIN/runc"
    say "runc: $("$BIN/runc" --version | head -n 1)"
  fi
}

# Unoptimised: it runs for a second, and building it is what takes long.
part_cargo_deny() {
  if "$BIN/cargo-deny" --version >/dev/null 2>&1; then return 0; fi
  CARGO_PROFILE_DEV_DEBUG=0 cargo_install cargo-deny "$CARGO_DENY_VERSION" --debug
}

PARTS="packages rust qemu virtiofsd containerd"

parts=("$@")
if [ ${#parts[@]} -eq 0 ] || [ "${parts[0]}" = all ]; then read -ra parts <<<"$PARTS"; fi
for part in "${parts[@]}"; do
  take_lock "setup-$part"
  case $part in
    packages | rust | rust-lints | cross | qemu | qemu-arm64 | qemu-amd64 | virtiofsd | containerd | cargo-deny) "part_${part//-/_}" ;;
    *) die "setup.sh: no part '$part'; there are: $PARTS rust-lints cross qemu-arm64 qemu-amd64 cargo-deny" ;;
  esac
done
