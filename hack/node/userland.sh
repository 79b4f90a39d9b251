#!/bin/bash
# A Debian userland for a node whose architecture is not this machine's:
# userland.sh <arch> <directory> <what the node has as target/>
# Nothing foreign runs here: packages are only unpacked, and what their scripts would have done that
# a node needs is done by hand.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/../lib.sh"
# shellcheck source=hack/apt.sh
. "$ROOT/hack/apt.sh"

ARCH=$1
DIR=$2
NODE_TARGET=$3
# The first release whose packages are all new enough but for those below.
SUITE=trixie
case $ARCH in
  arm64) QEMU_PACKAGE=qemu-system-arm ;;
  amd64) QEMU_PACKAGE=qemu-system-x86 ;;
  *) die "userland.sh: no userland for the architecture $ARCH: amd64 and arm64 are known" ;;
esac
PACKAGES=base-files,base-passwd,bash,bridge-utils,ca-certificates,conntrack,coreutils,curl,dash,diffutils,e2fsprogs,\
findutils,gawk,grep,gzip,hostname,iproute2,iptables,iputils-ping,jq,kmod,libc-bin,login,mount,nftables,procps,\
python3,$QEMU_PACKAGE,qemu-utils,runc,sed,strace,tar,util-linux,xz-utils
# virtiofsd before 1.14 is reported to hang when a machine is restored; sid's runs on this release.
NEWER=(virtiofsd containerd)

# mmdebstrap runs no hooks in this variant.
finish() {
  local t root=$1
  cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
  cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
  mkdir -p "$root/etc/ssl/certs"
  cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
  ln -sf gawk "$root/usr/bin/awk"
  for t in iptables ip6tables iptables-save iptables-restore ip6tables-save ip6tables-restore; do
    ln -sf xtables-nft-multi "$root/usr/sbin/$t"
  done
  ln -sf ../libexec/virtiofsd "$root/usr/bin/virtiofsd"
  printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
  printf 'chsnap-node\n' >"$root/etc/hostname"
  rm -rf "$root"/usr/share/{doc,man,locale} "$root"/var/{cache,lib}/apt
}

unpack() {
  rm -rf "$DIR.new" && mkdir -p "${DIR%/*}" || return
  mmdebstrap --variant=extract --mode=root --architectures="$ARCH" --include="$PACKAGES" \
    --aptopt="$APT/$SUITE-$ARCH/acquire.conf" "$SUITE" "$DIR.new" "$APT/$SUITE-$ARCH/chsnap.sources" || return
  rm -f "$DIR.new/etc/apt/apt.conf.d/99mmdebstrap"
}

# The same places below target/ as setup.sh makes on a machine of that architecture.
tools() {
  local tools=$NODE_TARGET/tools name machine=aarch64
  [ "$ARCH" = arm64 ] || machine=x86_64
  mkdir -p "$tools/bin" "$tools/containerd-2.1/bin"
  fetch_debs bookworm "$ARCH" "$tools/containerd-1.6" alone containerd
  ln -sfn usr/bin "$tools/containerd-1.6/bin"
  for name in containerd ctr containerd-shim-runc-v2; do ln -sfn "/usr/bin/$name" "$tools/containerd-2.1/bin/$name"; done
  for name in "qemu-system-$machine" virtiofsd; do ln -sfn "/usr/bin/$name" "$tools/bin/$name"; done
  ln -sfn /usr/sbin/runc "$tools/bin/runc"
}

want=$(digest "$0" "$ARCH")
if [ -d "$DIR" ] && stamped "userland-$ARCH" "$want"; then exit 0; fi
have mmdebstrap || "$ROOT/hack/setup.sh" packages
take_lock "userland-$ARCH"
# Whoever had the lock may have made it.
if [ -d "$DIR" ] && stamped "userland-$ARCH" "$want"; then exit 0; fi
for running in "$TARGET/node/$ARCH"/lock "$TARGET/node/$ARCH"-*/lock; do
  [ ! -s "$running" ] || flock -n "$running" true ||
    die "the userland for $ARCH is out of date, and a node runs on it (process $(cat "$running")): stop that first"
done
apt_update "$SUITE" "$ARCH"
step "userland-$ARCH" "unpacking Debian $SUITE for $ARCH" unpack ||
  die "no userland for $ARCH: is there space below $TARGET, and are the machine's package sources reachable?"
fetch_debs sid "$ARCH" "$TARGET/node/newer-$ARCH" alone "${NEWER[@]}"
cp -a "$TARGET/node/newer-$ARCH/." "$DIR.new/"
finish "$DIR.new"
tools
rm -rf "$DIR" "$TARGET/node/newer-$ARCH"
mv "$DIR.new" "$DIR"
stamp "userland-$ARCH" "$want"
say "userland for $ARCH: $(du -sh "$DIR" | cut -f1) in $DIR"
