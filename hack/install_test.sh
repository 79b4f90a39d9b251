#!/bin/bash
# What `make install` puts where, and whether its readers take it: chsnap its configuration, both containerds theirs.
# Takes what `make build` made.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

WORK=$(mktemp -d "$LOGS/install.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
DEST=$WORK/root
PREFIX=/opt/chsnap
CONFIG=$DEST/etc/chsnap/config.toml

install_there() { DESTDIR=$DEST PREFIX=$PREFIX "$ROOT/hack/install.sh" 2>"$WORK/said" || die "make install failed: $(cat "$WORK/said")"; }

install_there
for file in bin/containerd-shim-chsnap-v2 bin/chsnap lib/chsnap/vmlinux lib/chsnap/initramfs share/doc/chsnap/README.md \
  share/doc/chsnap/LICENSE share/doc/chsnap/deploy/kubernetes/runtimeclass.yaml; do
  [ -s "$DEST$PREFIX/$file" ] || die "make install left out $PREFIX/$file"
done
if outside=$(find "$DEST" -type f ! -path "$DEST$PREFIX/*" ! -path "$CONFIG" | grep .); then
  die "make install put something outside of PREFIX: $outside"
fi
grep -q "^kernel = \"$PREFIX/lib/chsnap/vmlinux\"" "$CONFIG" || die "the kernel that was installed is not the configuration's"
grep -q "^initramfs = \"$PREFIX/lib/chsnap/initramfs\"" "$CONFIG" || die "the initramfs that was installed is not the configuration's"

# It is not in its place, so that a container could not run: what counts is whether the file is taken.
# What it finds out is not to stay on this machine.
sed "s|^#dir = \"/run/chsnap\"|dir = \"$WORK/state\"|" "$CONFIG" >"$WORK/config.toml"
"$DEST$PREFIX/bin/chsnap" doctor --json --config "$WORK/config.toml" >"$WORK/doctor.json" || true
found=$(jq -r '.checks[] | select(.name == "configuration") | .status + ": " + .found' "$WORK/doctor.json")
case $found in ok:*) ;; *) die "chsnap does not take the configuration that was installed: $found" ;; esac

# Once more changes nothing; and what an administrator has changed stays, with the new file beside it.
install_there
[ ! -e "$CONFIG.new" ] || die "make install does not know its own configuration"
echo '# changed' >>"$CONFIG"
install_there
if ! grep -q '^# changed' "$CONFIG" || [ ! -s "$CONFIG.new" ]; then die "make install overwrote a configuration that was changed"; fi

# runtime <containerd's version> <file>: as that containerd understands it
runtime() {
  "$TARGET/tools/containerd-$1/bin/containerd" --config "$ROOT/deploy/containerd/$2" config dump 2>"$WORK/said" |
    tr "'" '"' | grep -A 16 'containerd.runtimes.chsnap' >"$WORK/runtime" || die "containerd $1 does not take $2: $(cat "$WORK/said")"
  for line in 'runtime_type = "io.containerd.chsnap.v2"' 'pod_annotations = ["io.chsnap.*"]' \
    'container_annotations = ["io.chsnap.*"]' 'ConfigPath = "/etc/chsnap/config.toml"'; do
    grep -qF "$line" "$WORK/runtime" || die "containerd $1 does not find $line in $2"
  done
}
runtime 1.6 config-v2.toml
runtime 2.1 config-v2.toml
runtime 2.1 config-v3.toml
