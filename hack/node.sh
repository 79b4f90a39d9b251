#!/bin/bash
# An emulated machine with KVM, for hosts that have none: QEMU without acceleration emulates a CPU
# with virtualisation extensions, and the guests inside run on real KVM.
#
#   ARCH=amd64|arm64 [CPU=model,feature=off] node.sh [command]
#
#   start            boots a node and leaves it running
#   run [-i] <cmd>   runs a shell command in it; the status is the command's (-i: with this input).
#                    With no node running, one is booted for the command and taken down again.
#   shell            a shell in it, booting one if none runs
#   stop             takes the running one down
#   status, console  whether one runs; what its kernel has said
#   prepare          only makes what a node needs
#   test             runs the integration tests in it: node/test.sh
#
# With no command: RUN='cmd' as `run` does, else `shell`. NAME=x keeps another node beside the first.
# TIMEOUT=s limits a command, CPUS=2 and MEMORY=6G are the node's size. DISK=file is a disk more, /dev/vdb, which stays.
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=hack/node/prepare.sh
. "$ROOT/hack/node/prepare.sh"

ARCH=${ARCH:-$(host_arch)}
MODEL=${CPU:-max}
case $ARCH in
  amd64)
    # A fifth level of page tables costs each walk, and twice so in a guest's guest. Where string instructions pass for
    # fast, kernel and C library move bytes with them, and they are emulated byte by byte.
    case $MODEL in max | max,*)
      for feature in la57 erms fsrm; do [[ $MODEL == *$feature* ]] || MODEL+=,$feature=off; done
      ;;
    esac
    ;;
  arm64)
    # Emulating the real pointer authentication costs half of the speed.
    case $MODEL in max | max,*) [[ $MODEL == *pauth* ]] || MODEL=${MODEL/max/max,pauth-impdef=on} ;; esac
    ;;
  *) die "no node for the architecture $ARCH: amd64 and arm64 are known" ;;
esac
CPUS=${CPUS:-2}
MEMORY=${MEMORY:-6G}
STATE=$TARGET/node/$ARCH${NAME:+-$NAME}
OUT=$STATE/out
SOCKETS=$(node_sockets "$STATE")
START_TIMEOUT=${START_TIMEOUT:-120}

# As a command that cannot be told of: what it would have come to is not known.
lost() {
  say "error: $1"
  exit 125
}

client() { python3 "$ROOT/hack/node/run.py" "$SOCKETS" "$1" --connect "$START_TIMEOUT" "${@:2}"; }

# The process that keeps the node: it holds the lock and has written its id there.
keeper() {
  [ -s "$STATE/lock" ] || return 1
  if flock -n "$STATE/lock" true; then return 1; fi
  cat "$STATE/lock"
}

# A running node has the CPU it was booted with, whatever is asked for now.
same_cpu() {
  local has
  has=$(cat "$STATE/cpu" 2>/dev/null) || return 0
  [ -z "${CPU:-}" ] || [ "$has" = "$MODEL" ] ||
    die "an $ARCH node runs with the CPU $has, not $MODEL: stop it first (ARCH=$ARCH hack/node.sh stop), or set NAME"
}

no_node() {
  ! keeper >/dev/null || die "an $ARCH node runs already: stop it first (ARCH=$ARCH hack/node.sh stop), or set NAME"
}

# Bash goes on after an interrupt if what it waits for ends in another way at that moment.
trap 'trap - INT; kill -INT $$' INT

# What keeps the node that this run has booted.
started=

show_console() {
  say "the end of the node's console ($STATE/console.log):"
  tail -n 15 "$STATE/console.log" 2>/dev/null | tr -d '\r' | sed 's/^/    /' >&2 || true
}

# reasons <lines>: what the process that keeps the node has said last, but for its everyday lines.
reasons() {
  local said
  said=$({ grep -hv '^+ \| WARN ' "$STATE/keeper.log" "$STATE/machine.log" 2>/dev/null || true; } | tail -n "$1" | tr '\n' ' ')
  printf '%s\n' "${said:-nothing is said in $STATE/machine.log}"
}

# The client only knows that the node has gone, and what keeps it writes down why while it takes it down.
why_gone() {
  local pid
  for _ in $(seq 50); do
    keeper >/dev/null || break
    sleep 0.1
  done
  if pid=$(keeper); then say "the node is still there (process $pid)"; else say "the node has ended: $(reasons 1)"; fi
}

# boot <what becomes of it: it stays when this script ends, or goes>
boot() {
  local pid deadline left clock='' path
  # They go onto the node's command line, and into QEMU's options.
  for path in "$ROOT" "$TARGET" "${DISK:-}"; do
    [[ $path != *[[:space:],]* ]] || die "a node cannot have blanks or commas in the path $path: move the checkout, or set CHSNAP_TARGET"
  done
  [ -z "${DISK:-}" ] || [ -f "$DISK" ] || die "DISK=$DISK: there is no such file"
  no_node
  # Two would format one disk.
  take_lock "node-${STATE##*/}"
  no_node
  prepare
  mkdir -p "$OUT"
  : >"$STATE/console.log"
  : >"$STATE/machine.log"
  printf '%s\n' "$MODEL" >"$STATE/cpu"
  say "booting an $ARCH node ($MODEL, $CPUS CPUs, $MEMORY)"
  deadline=$((SECONDS + START_TIMEOUT))
  # See the shim's vmm/arch.rs: a busy host's node measures a clock that is far too fast.
  if [ "$ARCH" = amd64 ] && [ "$(host_arch)" = amd64 ]; then
    clock=$(awk '/^bogomips/ { printf "tsc_early_khz=%d", $3 * 500; exit }' /proc/cpuinfo)
  fi
  # QEMU does not see virtiofsd write into the node's memory, and runs what it had translated of a page before, unless the
  # kernel clears pages first (init_on_alloc, which is Debian's default). Without that, one node of ten came up.
  # Nor does QEMU bear a second CPU that uses devices while the first one sets some up: it comes later (maxcpus=1).
  setsid python3 "$ROOT/hack/node/machine.py" --arch "$ARCH" --state "$STATE" --sockets "$SOCKETS" \
    --qemu "$QEMU" --virtiofsd "$BIN/virtiofsd" --cpu "$MODEL" --cpus "$CPUS" --memory "$MEMORY" \
    --kernel "$KERNEL" --initrd "$STATE/initramfs" --cache always --with $$ ${DISK:+--disk "$DISK"} \
    --append "console=$CONSOLE quiet panic=-1 mitigations=off init_on_alloc=1 maxcpus=1 cryptomgr.notests node.project=$ROOT node.target=$TARGET node.out=$OUT $clock ${APPEND:-}" \
    --share "root:ro:$SHARED_ROOT" --share "project:ro:$ROOT" --share "target:ro:$SHARED_TARGET" --share "out:rw:$OUT" \
    </dev/null >"$STATE/keeper.log" 2>&1 9>&- &
  pid=$!
  started=$pid
  # Each ping is a connection of its own, and drops what was under way to the one before: on a busy machine one of a
  # second may never hear the answer.
  until left=$((deadline - SECONDS)) && client ping --timeout $((left > 5 ? 5 : left > 1 ? left : 1)) 2>/dev/null; do
    if ! kill -0 "$pid" 2>/dev/null; then
      show_console
      lost "the $ARCH node has ended while booting: $(reasons 3)"
    fi
    if [ $SECONDS -ge $deadline ]; then
      show_console
      # It may not have come as far as to hold the lock, by which halt knows it.
      kill -TERM "$pid" 2>/dev/null || true
      wait "$pid" 2>/dev/null || true
      halt "$pid"
      lost "the $ARCH node did not come up in $START_TIMEOUT s"
    fi
    sleep 0.2
  done
  exec 9>&-
  # Until now it would have gone with who waited for it.
  [ "$1" = goes ] || kill -USR1 "$pid"
  say "the $ARCH node is up after $((SECONDS - deadline + START_TIMEOUT)) s"
}

# halt [<keeper>]: takes the node down, or that keeper's alone.
halt() {
  local pid
  exec 9>&-
  if pid=$(keeper) && [ "${1:-$pid}" = "$pid" ]; then
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 100); do
      keeper >/dev/null || break
      sleep 0.1
    done
    if pid=$(keeper); then
      say "note: the node's keeper (process $pid) did not end in 10 s and is killed, with all it started"
      kill -KILL "$pid" || true
      sleep 0.2
    fi
  fi
  # One that was killed, now or before, leaves its disk and its sockets. They may be those of another run by now.
  (
    flock -n 9 || exit 0
    ! keeper >/dev/null || exit 0
    rm -f "$STATE/scratch.ext4"
    rm -rf "$SOCKETS"
    rmdir /run/chsnap-dev 2>/dev/null || true
  ) 9>"$TARGET/.lock-node-${STATE##*/}"
}

# Runs the client in a running node, or in one that lives only for it.
within() {
  local rc=0
  # OWN_NODE: whoever is there may hold older files.
  if [ -z "${OWN_NODE:-}" ] && keeper >/dev/null; then
    same_cpu
    client "$@" || rc=$?
    [ "$rc" != 125 ] || why_gone
    return "$rc"
  fi
  # Not whatever node there is: another run may have booted one meanwhile.
  trap 'halt "${started:-none}"' EXIT
  boot goes
  client "$@" || rc=$?
  [ "$rc" != 125 ] || { show_console && why_gone; }
  return "$rc"
}

run() {
  local options=(--cwd "$ROOT")
  [ "${1:-}" != -i ] || { options+=(--input) && shift; }
  [ $# -ge 1 ] || die "node.sh run: no command given"
  [ -z "${TIMEOUT:-}" ] || options+=(--timeout "$TIMEOUT")
  within run "${options[@]}" -- /bin/bash -c "$*"
}

shell() {
  if [ -t 0 ]; then
    within run --tty --input --cwd "$ROOT" -- /bin/bash -i
  else
    within run --input --cwd "$ROOT" -- /bin/bash
  fi
}

what=${1:-}
[ $# -eq 0 ] || shift
case $what in
  "") if [ -n "${RUN:-}" ]; then run "$RUN"; else shell; fi ;;
  start) boot stays ;;
  stop) halt ;;
  run) run "$@" ;;
  shell) shell ;;
  prepare) prepare ;;
  status) if pid=$(keeper); then echo "an $ARCH node runs (process $pid)"; else echo "no $ARCH node runs" && exit 3; fi ;;
  console) cat "$STATE/console.log" ;;
  test) exec "$ROOT/hack/node/test.sh" "$@" ;;
  *) die "node.sh: '$what' is none of start, run, shell, stop, status, console, prepare, test" ;;
esac
