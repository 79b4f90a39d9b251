#!/bin/bash
# What a store of snapshots is after a power cut: powercut.sh [amd64|arm64]
#
# In a node whose disk outlives it, snapshots are published and removed, two at a time, until the node is killed; what its
# kernel had not written by then is lost, as in a power cut. Then another node with that disk looks: what was said to be
# published is there, everything that is there is whole, nothing else stays. CUTS=4 times. At last a base snapshot is built
# for real and the power cut behind its builder's last word. CHSNAP_NO_BUILD=1 takes what has been built.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/../lib.sh"

ARCH=${1:-${ARCH:-$(host_arch)}}
export ARCH NAME=powercut
NODE=$ROOT/hack/node.sh
STATE=$TARGET/node/$ARCH-$NAME
OUT=$STATE/out
DISK=$STATE/disk.ext4
export DISK
finish() {
  "$NODE" stop || true
  rm -rf "$STATE"
}
trap finish EXIT

target=()
[ "$ARCH" = "$(host_arch)" ] || target=(--target "$(rust_triple "$ARCH")")
if [ -z "${CHSNAP_NO_BUILD:-}" ]; then
  "$ROOT/hack/setup.sh"
  "$ROOT/hack/build.sh"
fi
"$NODE" prepare
say "building what publishes, for $ARCH"
(
  if [ "$ARCH" != "$(host_arch)" ]; then use_cross "$ARCH" || die "no toolchain for $ARCH: run hack/setup.sh cross"; fi
  cd "$ROOT"
  CARGO_TARGET_DIR=$TARGET cargo build --locked --release "${target[@]}" -p chsnap-shim --example publish
)
mkdir -p "$OUT"
examples=$TARGET${target[1]:+/${target[1]}}/release/examples
cp "$examples/publish" "$OUT/publish"
# With a journal, as hosts have it: of a file system that is itself lost nothing could be told.
truncate -s 6G "$DISK"
mke2fs -q -t ext4 -E nodiscard "$DISK"

cat >"$OUT/publish.sh" <<'INSIDE'
#!/bin/bash
# publish.sh <number>: two at a time, each with keys of its own.
cd "$(dirname "$0")" || exit
./publish /mnt/snapshots "$1" &
./publish /mnt/snapshots "$(($1 + 5000))" &
wait
INSIDE
# Reads what was said so far, the words of all cuts, and looks whether the store fits.
cat >"$OUT/look.sh" <<'INSIDE'
#!/bin/bash
set -euo pipefail
cd "$(dirname "$0")"
chsnap=$CHSNAP_TARGET/release/chsnap
printf '[snapshot]\ndir = "/mnt/snapshots"\nbudget = "100GiB"\n' >/tmp/config.toml
mkdir -p /mnt
mount /dev/vdb /mnt
mkdir -p /mnt/snapshots
# As the next builder or `prune` of any budget does it.
"$chsnap" snapshot prune --budget 100GiB --config /tmp/config.toml >/dev/null
"$chsnap" snapshot ls --json --config /tmp/config.toml | jq -r '.[].key' | sort >there
[ ! -s there ] || "$chsnap" snapshot verify --all --config /tmp/config.toml >verified || { cat verified && exit 1; }
# Beside them there may be what is known of the ladder, and of images.
(cd /mnt/snapshots && ls -A) | { grep -vxE '(ladder|layers)\.json' || true; } | sort >names
diff there names >&2 || { echo "something is left beside the snapshots" && exit 1; }
INSIDE
chmod 755 "$OUT"/*.sh

: >"$STATE/said"
look() {
  local lost
  "$NODE" run "$OUT/look.sh" || die "after cut $1 the store is not whole"
  sed -n 's/^removing //p' "$STATE/said" | sort -u >"$STATE/removing"
  sed -n 's/^published //p' "$STATE/said" | sort -u | comm -23 - "$STATE/removing" >"$STATE/published"
  lost=$(comm -23 "$STATE/published" "$OUT/there")
  [ -z "$lost" ] || die "after cut $1 these are lost, which were said to be published: $lost"
  say "cut $1: $(wc -l <"$STATE/published") were to be there, $(wc -l <"$OUT/there") are, and are whole"
}

# cut <what runs meanwhile>: ends the node when it says so.
cut() {
  kill -KILL "$(cat "$STATE/qemu.pid")"
  wait "$1" || true
  for _ in $(seq 100); do
    "$NODE" status >/dev/null || return 0
    sleep 0.1
  done
  die "the node is still there after its QEMU was killed"
}

"$NODE" start
look 0
for number in $(seq "${CUTS:-4}"); do
  "$NODE" run "$OUT/publish.sh $((number * 10000))" >"$STATE/words" 2>"$STATE/trouble" </dev/null &
  running=$!
  # Behind as many as there are at a time, or more: before its kernel writes of its own accord, and after.
  for _ in $(seq 600); do
    [ "$(wc -l <"$STATE/words")" -lt $((12 + number * 16)) ] || break
    kill -0 "$running" 2>/dev/null || break
    sleep 0.1
  done
  cut "$running"
  # The last line may be half of one.
  grep -E '^(published|removing) [0-9a-f]{64}$' "$STATE/words" >>"$STATE/said" ||
    { cat "$STATE/trouble" >&2 && die "nothing was published before cut $number"; }
  "$NODE" start
  look "$number"
done

say "building a base snapshot"
# shellcheck disable=SC2016 # for the node's shell
"$NODE" run 'CHSNAP_SNAPSHOT_DIR=/mnt/snapshots hack/config.sh /tmp/real.toml
  "$CHSNAP_TARGET/release/chsnap" snapshot build --base --json --config /tmp/real.toml && sleep 1000' \
  >"$STATE/words" 2>"$STATE/trouble" </dev/null &
running=$!
for _ in $(seq 3000); do
  key=$(jq -r '.key // empty' "$STATE/words" 2>/dev/null) || true
  [ -z "$key" ] || break
  kill -0 "$running" 2>/dev/null || break
  sleep 0.1
done
cut "$running"
[ -n "${key:-}" ] || { cat "$STATE/words" "$STATE/trouble" >&2 && die "the base snapshot was not built"; }
echo "published $key" >>"$STATE/said"
"$NODE" start
look "behind the build"
say "after a power cut the store has what was published, whole, and nothing else"
