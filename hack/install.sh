#!/bin/bash
# Installs what `make build` made. DESTDIR and PREFIX as usual; PREFIX is /usr/local by default.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/usr/local}
case $PREFIX in /*) ;; *) die "PREFIX=$PREFIX must be an absolute path" ;; esac
[ "${ARCH:-$(host_arch)}" = "$(host_arch)" ] || die "ARCH=$ARCH: only what was built for this machine ($(host_arch)) is installed"
ARCH=$(host_arch)
GUEST=$TARGET/guest/$ARCH
KERNEL=$GUEST/vmlinux
[ "$ARCH" = amd64 ] || KERNEL=$GUEST/Image
LIB=$PREFIX/lib/chsnap

for f in "$TARGET/release/containerd-shim-chsnap-v2" "$TARGET/release/chsnap" "$KERNEL" "$GUEST/initramfs"; do
  [ -f "$f" ] || die "$f is missing: run 'make build' first"
done

install -D -m 755 -t "$DESTDIR$PREFIX/bin" "$TARGET/release/containerd-shim-chsnap-v2" "$TARGET/release/chsnap"
install -D -m 644 "$KERNEL" "$DESTDIR$LIB/vmlinux"
install -D -m 644 "$GUEST/initramfs" "$DESTDIR$LIB/initramfs"
# Debian 12 has no virtiofsd of its own that is new enough.
virtiofsd=
if [ -x "$BIN/virtiofsd" ]; then
  virtiofsd=$LIB/virtiofsd
  install -D -m 755 "$BIN/virtiofsd" "$DESTDIR$virtiofsd"
fi
install -D -m 644 -t "$DESTDIR$PREFIX/share/doc/chsnap" "$ROOT"/{README,CHANGELOG,SECURITY}.md "$ROOT/LICENSE"
(cd "$ROOT" && find docs deploy -type f) | while read -r file; do
  install -D -m 644 "$ROOT/$file" "$DESTDIR$PREFIX/share/doc/chsnap/$file"
done

config=$DESTDIR/etc/chsnap/config.toml
new=$config
# An administrator's file is never overwritten; the new one is put beside it to compare with.
[ ! -e "$config" ] || new=$config.new
install -D -m 644 "$ROOT/deploy/config.toml" "$new"
# What is not where the defaults say has to be set.
if [ "$LIB" != /usr/lib/chsnap ]; then
  sed -i -E "s,^#(kernel|initramfs) = \"/usr/lib/chsnap/,\1 = \"$LIB/," "$new"
fi
[ -z "$virtiofsd" ] || sed -i "s|^#virtiofsd = .*|virtiofsd = \"$virtiofsd\"|" "$new"
if [ "$new" != "$config" ] && cmp -s "$new" "$config"; then rm "$new"; new=$config; fi
say "installed in $DESTDIR$PREFIX; configuration: $new"
if [ -z "$DESTDIR" ] && ! have containerd-shim-chsnap-v2; then
  say "note: $PREFIX/bin is not in PATH; containerd looks for the shim in its own PATH"
fi
# What a machine needs beside, and packages bring: a VMM. setup.sh unpacks one for the demo and the tests only.
if [ -z "$DESTDIR" ] && ! have cloud-hypervisor; then
  version=$(qemu_version "qemu-system-$(uname -m)")
  if [ -z "$version" ] || ! version_ge "$version" 10; then
    from=$(newer_suite)
    [ "$from" != "$(codename)" ] || from=
    say "note: there is no VMM yet: QEMU is ${version:-missing}, 10 or newer is needed: apt-get install ${from:+-t $from }$(qemu_package "$ARCH")"
    [ -z "$from" ] || say "note: that takes an entry for $from in the machine's package sources, and apt-get update"
  fi
fi
