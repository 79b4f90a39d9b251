#!/bin/bash
# Builds the guest: build.sh <amd64|arm64> [kernel|busybox|initramfs|all|verify]
#
#   target/guest/<arch>/vmlinux (amd64) or Image (arm64)   the distribution's cloud kernel
#   target/guest/<arch>/modules                            its modules
#   target/guest/<arch>/initramfs                          busybox, vm_init.sh, modules, agent
#
# CHSNAP_KERNEL=<vmlinux or Image> takes that kernel as it is; its modules come from
# CHSNAP_MODULES=</lib/modules/version>, or everything that is needed is built in.
# CHSNAP_AGENT=<file> takes another agent than the one `make build` made.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=hack/apt.sh
. "$ROOT/hack/apt.sh"

ARCH=${1:-$(host_arch)}
WHAT=${2:-all}
OUT=$TARGET/guest/$ARCH
case $ARCH in
  amd64) KERNEL=$OUT/vmlinux ;;
  arm64) KERNEL=$OUT/Image ;;
  *) die "build.sh: no guest for the architecture $ARCH: amd64 and arm64 are known" ;;
esac
mkdir -p "$OUT"

# The modules a guest can need, and what for: virtio device 4 is a source of entropy, 19 a vsock. A machine with a
# device that no driver has set up cannot be restored by Cloud Hypervisor 53 on arm64: it looks for the queues at address 0,
# where there is no memory.
MODULES=(virtio_rng:d00000004 vmw_vsock_virtio_transport:d00000013)

# The versioned package that the suite's cloud kernel stands for.
kernel_package() {
  local conf
  conf=$(apt_config "$1" "$ARCH") || return
  apt-cache -c "$conf" depends "linux-image-cloud-$ARCH" |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | tail -n 1
}

build_kernel() {
  local suite package tmp=$OUT/unpacked mod want
  if [ -n "${CHSNAP_KERNEL:-}" ]; then
    [ -f "$CHSNAP_KERNEL" ] || die "CHSNAP_KERNEL=$CHSNAP_KERNEL: no such file"
    [ -z "${CHSNAP_MODULES:-}" ] || [ -f "$CHSNAP_MODULES/modules.builtin" ] ||
      die "CHSNAP_MODULES=$CHSNAP_MODULES: not a /lib/modules/<version>, for it has no modules.builtin"
    want=$(digest "$CHSNAP_KERNEL" "${CHSNAP_MODULES:-}")
    if [ -f "$KERNEL" ] && stamped "kernel-$ARCH" "$want"; then return 0; fi
    python3 "$ROOT/hack/guest/extract_kernel.py" "$CHSNAP_KERNEL" "$KERNEL"
    rm -rf "$OUT/modules"
    [ -z "${CHSNAP_MODULES:-}" ] || cp -a "$CHSNAP_MODULES" "$OUT/modules"
    stamp "kernel-$ARCH" "$want"
    return 0
  fi
  if [ -f "$KERNEL" ] && [ -d "$OUT/modules" ] && stamped "kernel-$ARCH" distribution; then return 0; fi
  suite=$(newer_suite)
  apt_update "$suite" "$ARCH"
  package=$(kernel_package "$suite") || die "no package linux-image-cloud-$ARCH in $suite"
  [ -n "$package" ] || die "no package linux-image-cloud-$ARCH in $suite"
  fetch_debs "$suite" "$ARCH" "$tmp" alone "$package"
  python3 "$ROOT/hack/guest/extract_kernel.py" "$tmp"/boot/vmlinuz-* "$KERNEL"
  for mod in "$tmp"/lib/modules/* "$tmp"/usr/lib/modules/*; do
    [ -d "$mod" ] || continue
    rm -rf "$OUT/modules"
    mv "$mod" "$OUT/modules"
  done
  cp "$tmp"/boot/config-* "$OUT/config"
  printf '%s\n' "$package" >"$OUT/kernel-package"
  rm -rf "$tmp"
  stamp "kernel-$ARCH" distribution
  say "guest kernel: $package in $KERNEL"
}

build_busybox() {
  [ ! -x "$OUT/busybox" ] || return 0
  fetch_debs "$(newer_suite)" "$ARCH" "$OUT/unpacked" alone busybox-static
  if [ -f "$OUT/unpacked/bin/busybox" ]; then
    mv "$OUT/unpacked/bin/busybox" "$OUT/busybox"
  else
    mv "$OUT/unpacked/usr/bin/busybox" "$OUT/busybox"
  fi
  rm -rf "$OUT/unpacked"
}

# write_initramfs <file>
# Uncompressed: unpacking costs an emulated guest more time than reading the larger file.
write_initramfs() {
  local args=() m
  if [ -d "$OUT/modules" ]; then
    args+=(--modules "$OUT/modules")
    for m in "${MODULES[@]}"; do args+=(--module "$m"); done
  fi
  python3 "$ROOT/hack/guest/initramfs.py" --output "$1" --busybox "$OUT/busybox" \
    --init "$ROOT/guest-agent/vm_init.sh" --fstab "$ROOT/guest-agent/fstab" --agent "$agent" "${args[@]}"
}

# Again, at another time, in another place and under another umask: not a byte may differ.
verify_initramfs() {
  local agent again rc=0
  agent=${CHSNAP_AGENT:-$TARGET/$(rust_triple "$ARCH")/agent/chsnap-agent}
  again=$(mktemp -p "$TARGET")
  (umask 077 && TZ=Asia/Tokyo && export TZ && cd / && write_initramfs "$again") && cmp "$OUT/initramfs" "$again" || rc=$?
  rm -f "$again"
  return "$rc"
}

build_initramfs() {
  local agent want
  agent=${CHSNAP_AGENT:-$TARGET/$(rust_triple "$ARCH")/agent/chsnap-agent}
  [ -f "$agent" ] || die "no agent at $agent: run 'make build' first"
  want=$(digest "$agent" "$ROOT/guest-agent/vm_init.sh" "$ROOT/guest-agent/fstab" "$ROOT/hack/guest/initramfs.py" "$OUT/busybox" "$TARGET/stamps/kernel-$ARCH" "$KERNEL" "${MODULES[*]}")
  if [ -f "$OUT/initramfs" ] && stamped "initramfs-$ARCH" "$want"; then return 0; fi
  write_initramfs "$OUT/initramfs"
  stamp "initramfs-$ARCH" "$want"
  say "guest initramfs: $OUT/initramfs, $(($(stat -c %s "$OUT/initramfs") / 1024)) KiB"
}

take_lock "guest-$ARCH"
case $WHAT in
  kernel) build_kernel ;;
  busybox) build_busybox ;;
  # One after the other, for `a && b` would have a go on after an error.
  initramfs)
    build_busybox
    build_initramfs
    ;;
  all)
    build_kernel
    build_busybox
    build_initramfs
    ;;
  # What was made of older sources is made anew first: it differs for that reason.
  verify)
    build_initramfs
    verify_initramfs || die "the initramfs is not the same when it is built again"
    ;;
  *) die "build.sh: '$WHAT' is none of kernel, busybox, initramfs, all, verify" ;;
esac
