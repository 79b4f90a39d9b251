#!/bin/bash
# Makes target/image/python.tar: an OCI archive with Debian's Python and the services of deploy/demo, for
# `ctr images import`; for another architecture, ARCH=arm64, it is target/image-arm64/python.tar. No registry is
# needed; the packages come from the machine's own mirror.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=hack/apt.sh
. "$ROOT/hack/apt.sh"

NAME=localhost/chsnap/python-demo:latest
ARCH=${ARCH:-$(host_arch)}
OUT=$TARGET/image
[ "$ARCH" = "$(host_arch)" ] || OUT=$OUT-$ARCH
APP=$ROOT/deploy/demo/app.py
SEARCH=$ROOT/deploy/demo/search.py
# As images have one, which a pod's is mounted over.
HOSTS=$ROOT/deploy/demo/hosts
SUITE=$(codename)
# Python and enough of a shell to look around with.
PACKAGES=python3,base-files,base-passwd,coreutils,dash,findutils,grep,sed,busybox,ca-certificates

# What the packages' installation scripts would have done; `extract` does not run them, which is
# quicker and independent of this machine. An extract hook: this variant runs no other. $1 is the root.
# shellcheck disable=SC2016 # mmdebstrap's shell expands it
FINISH='
set -e
cp "$1/usr/share/base-passwd/passwd.master" "$1/etc/passwd"
cp "$1/usr/share/base-passwd/group.master" "$1/etc/group"
cat "$1"/usr/share/ca-certificates/mozilla/*.crt >"$1/etc/ssl/certs/ca-certificates.crt"
# The proxy of this machine is no business of the image.
rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap"
# Another architecture goes without, as nothing of it runs here.
[ -n "${FOREIGN:-}" ] || chroot "$1" python3 -m compileall -q -x "/(test|lib2to3)/" /usr/lib/python3.*
'

[ "$ARCH" = "$(host_arch)" ] || export FOREIGN=1

make_rootfs() {
  # The private configuration's sources: the machine's mirror for the machine's release.
  mmdebstrap --variant=extract --mode=root --architectures="$ARCH" --include="$PACKAGES" \
    --aptopt="$APT/$SUITE-$ARCH/acquire.conf" --extract-hook="$FINISH" \
    "$SUITE" "$OUT/rootfs.new.tar" "$APT/$SUITE-$ARCH/chsnap.sources" || return
  mv "$OUT/rootfs.new.tar" "$OUT/rootfs.tar"
}

if ! have mmdebstrap || ! have python3; then "$ROOT/hack/setup.sh" packages; fi
take_lock "${OUT##*/}"
mkdir -p "$OUT"
want=$(digest "$0" "$SUITE" "$ARCH")
if [ ! -f "$OUT/rootfs.tar" ] || ! stamped "${OUT##*/}-rootfs" "$want"; then
  apt_update "$SUITE" "$ARCH"
  step "${OUT##*/}" "making a Debian root with Python" make_rootfs || die "no root file system for the demo image"
  stamp "${OUT##*/}-rootfs" "$want"
fi
want=$(digest "$0" "$ROOT/hack/oci_pack.py" "$APP" "$SEARCH" "$HOSTS" "$(stat -c %Y "$OUT/rootfs.tar")")
if [ ! -f "$OUT/python.tar" ] || ! stamped "${OUT##*/}" "$want"; then
  python3 "$ROOT/hack/oci_pack.py" --output "$OUT/python.tar" --name "$NAME" --arch "$ARCH" \
    --base "$OUT/rootfs.tar" --file "$APP=/app/app.py" --file "$SEARCH=/app/search.py" --file "$HOSTS=/etc/hosts" --expose 8080/tcp --workdir /app \
    --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 \
    -- python3 /app/app.py
  stamp "${OUT##*/}" "$want"
  say "demo image: $OUT/python.tar, $(($(stat -c %s "$OUT/python.tar") >> 20)) MiB, named $NAME"
fi
