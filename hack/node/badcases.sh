#!/bin/bash
# What can go wrong with a node: one clear line each, and nothing left: badcases.sh [amd64|arm64]
# Takes a prepared node, or prepares it.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/../lib.sh"

ARCH=${1:-${ARCH:-$(host_arch)}}
export ARCH NAME=badcases
NODE=$ROOT/hack/node.sh
STATE=$TARGET/node/$ARCH-$NAME
# Of three of the processes nothing else tells whose they are.
SOCKETS=$(node_sockets "$STATE")
WORK=$(mktemp -d "$LOGS/badcases.XXXXXX")
finish() {
  "$NODE" stop || true
  rm -rf "$WORK" "$STATE"
}
trap finish EXIT
failed=0

left_running() {
  processes_naming "$STATE"
  processes_naming "$SOCKETS"
}

wrong() {
  say "wrong: $*"
  sed 's/^/    /' "$WORK/said" >&2
  failed=1
}

# says <what is tried> <status> <pattern of the last line> <command...>
says() {
  local what=$1 want=$2 pattern=$3 rc=0 left
  shift 3
  "$@" >"$WORK/said" 2>&1 </dev/null || rc=$?
  if [ "$rc" -ne "$want" ]; then
    wrong "$what: status $rc instead of $want"
  elif ! tail -n 1 "$WORK/said" | grep -q "^chsnap: error: .*$pattern"; then
    wrong "$what: its last line does not say '$pattern'"
  else
    say "$what: $(tail -n 1 "$WORK/said" | cut -c1-160)"
  fi
  left=$(left_running)
  [ -z "$left" ] || wrong "$what: left running: $left"
  [ ! -e "$STATE/scratch.ext4" ] || wrong "$what: left the scratch disk"
}

"$NODE" prepare
says "an unknown architecture" 1 "no node for the architecture sparc" env ARCH=sparc "$NODE" run true
says "an unknown CPU" 125 "has ended while booting.*no-such-cpu" env CPU=no-such-cpu "$NODE" run true
says "no space" 1 "a node needs 999999 GiB" env NODE_SPACE=999999 "$NODE" run true
# A disk that fills while the node runs: all there is counts as too little.
says "no space left" 125 "no space left below .*, where the node's disk is" env CHSNAP_NODE_ROOM=$((1 << 60)) "$NODE" run true
program='qemu-system-x86_64'
[ "$ARCH" = amd64 ] || program='qemu-system-aarch64'
# Where the machine itself has a QEMU that will do, none is fetched.
system=$(qemu_version "$program")
if [ -z "$system" ] || ! version_ge "$system" 10; then
  says "no QEMU" 1 "there is no $program 10 or newer here" \
    unshare --net env CHSNAP_TARGET="$WORK/without" "$NODE" run true
fi
# Nor a toolchain, where the machine's own will do.
if [ "$ARCH" != "$(host_arch)" ] && ! CHSNAP_TARGET=$WORK/target bash -c '. "$1/hack/lib.sh"; use_cross "$2"' _ "$ROOT" "$ARCH" 2>/dev/null; then
  # Nothing has been fetched in that directory, and nothing can be.
  for part in host agent; do
    says "no cross toolchain for the $part" 1 "no toolchain for $ARCH: hack/setup.sh cross says why" \
      unshare --net env CHSNAP_TARGET="$WORK/target" "$ROOT/hack/build.sh" "$part"
  done
fi
says "a node that is too slow" 125 "did not come up in 1 s" env START_TIMEOUT=1 "$NODE" run true
says "a command that does not end" 124 "did not end in 2 s" env TIMEOUT=2 "$NODE" run 'sleep 1000'
says "no node" 125 "no node runs" python3 "$ROOT/hack/node/run.py" "$WORK" run -- true

# still_running <tenths of a second>: what runs of the node after that, if anything does.
still_running() {
  local left
  for _ in $(seq "$1"); do
    left=$(left_running)
    [ -n "$left" ] || return 0
    sleep 0.1
  done
  printf '%s' "$left"
}

left_lying() {
  local path
  for path in "$STATE/scratch.ext4" "$SOCKETS"; do [ ! -e "$path" ] || printf '%s ' "$path"; done
}

# gone <what is tried>: within a few seconds nothing of the node is left.
gone() {
  local left
  left="$(still_running 100) $(left_lying)"
  if [ "$left" != " " ]; then wrong "$1: left $left"; else say "$1: nothing is left"; fi
}

# begun <pattern>: waits until the last one that was started beside this has said so.
begun() {
  for _ in $(seq 600); do
    ! grep -q "$1" "$WORK/said" || return 0
    sleep 0.1
  done
  wrong "it never says '$1'"
}

# A node for one command goes with whoever began it, killed or interrupted, at whatever moment.
for how in "KILL booting an" "KILL begun" "INT booting an" "INT begun" "TERM begun" "HUP begun"; do
  signal=${how%% *} moment=${how#* }
  # With a group of its own and the default for SIGINT, as from a terminal, whatever this script was given.
  set -m
  env --default-signal=INT "$NODE" run "echo begun; sleep 1000" >"$WORK/said" 2>&1 </dev/null &
  set +m
  begun "$moment"
  if [ "$signal" = INT ]; then kill -INT -- "-$!"; else kill "-$signal" "$!"; fi
  # One that goes on is to be told of, not waited for.
  for _ in $(seq 200); do
    kill -0 "$!" 2>/dev/null || break
    sleep 0.1
  done
  if kill -KILL "$!" 2>/dev/null; then wrong "SIG$signal, with '$moment': it goes on"; fi
  wait "$!" 2>/dev/null || true
  gone "SIG$signal, with '$moment'"
done
# One that is to stay stays only once it is up.
set -m
"$NODE" start >"$WORK/said" 2>&1 </dev/null &
set +m
begun "booting an"
kill -KILL "$!"
wait "$!" 2>/dev/null || true
gone "a start that is killed"

"$NODE" start
qemu=$(cat "$STATE/qemu.pid")
keeper=$(cat "$STATE/lock")
rc=0
CHSNAP_NODE_SILENCE=12 "$NODE" run "echo begun; sleep 1000" >"$WORK/said" 2>&1 </dev/null &
client=$!
# One that hangs before the client is connected is another case.
for _ in $(seq 300); do
  ! grep -q begun "$WORK/said" || break
  sleep 0.1
done
kill -STOP "$qemu"
wait "$client" || rc=$?
kill -CONT "$qemu"
if [ "$rc" -ne 125 ] || ! grep -q "has not answered for 12 s" "$WORK/said"; then wrong "a node that hangs: status $rc"; else
  say "a node that hangs: $(tail -n 1 "$WORK/said")"
fi
# Everything goes with the process that keeps the node, even if that is killed.
kill -KILL "$keeper"
left=$(still_running 50)
[ -z "$left" ] || wrong "a keeper that is killed: left running: $left"
"$NODE" stop
left=$(left_lying)
[ -z "$left" ] || wrong "a keeper that is killed, and stop: left $left"
[ "$failed" -eq 0 ] || die "a node does not fail as it should"
say "every bad case of a node is told, and leaves nothing"
