# shellcheck shell=bash
# Shared by the scripts in hack/: messages, logs, the lock, stamps. Sourced, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Everything that is made goes below TARGET; nothing else on the machine is written to, except for packages
# that `setup.sh packages` has to install, cargo's own cache (~/.cargo), and sockets and mounts below
# /run/chsnap-dev while something runs.
TARGET=${CHSNAP_TARGET:-$ROOT/target}
mkdir -p "$TARGET"
TARGET=$(cd "$TARGET" && pwd -P)
LOGS=$TARGET/logs
TOOLS=$TARGET/tools
BIN=$TOOLS/bin
mkdir -p "$LOGS" "$BIN"
export CHSNAP_TARGET=$TARGET
# The sources stay as they are.
export PYTHONDONTWRITEBYTECODE=1
# Where setup.sh had to bring a Rust of its own; see part_rust there. It may do so after this line, for
# the script that sources it.
PATH=$TOOLS/rust/bin:$PATH

say() { printf '%s\n' "chsnap: $*" >&2; }
die() {
  printf '%s\n' "chsnap: error: $*" >&2
  exit 1
}

# step <log name> <what, for a person> <command...>
# Runs a long command with its output in target/logs/<log name>.log and shows the end of that log
# when the command fails.
step() {
  local name=$1 what=$2 log start rc=0
  shift 2
  log=$LOGS/$name.log
  start=$SECONDS
  say "$what ..."
  "$@" >"$log" 2>&1 </dev/null || rc=$?
  if [ "$rc" -ne 0 ]; then
    say "$what: failed with status $rc after $((SECONDS - start)) s; the end of $log:"
    tail -n 25 "$log" | sed 's/^/    /' >&2
    return "$rc"
  fi
  [ $((SECONDS - start)) -lt 3 ] || say "$what: done in $((SECONDS - start)) s"
}

# node_sockets <state>: where the node with that state has its sockets. A path of one may have 107 bytes at most.
node_sockets() { echo "/run/chsnap-dev/node-$(printf %s "$1" | sha256sum | cut -c1-12)"; }

# processes_naming <string>: ids of the processes with that string in their command lines, but for this
# script and what it runs.
processes_naming() {
  local file pid args
  for file in /proc/[0-9]*/cmdline; do
    pid=${file#/proc/}
    pid=${pid%/cmdline}
    # A process may end meanwhile.
    { args=$(tr '\0' ' ' <"$file"); } 2>/dev/null || continue
    [[ $pid == "$$" || $args != *"$1"* ]] || printf '%s\n' "$pid"
  done
}

have() { command -v "$1" >/dev/null 2>&1; }

# has_std <rustc> <triple>: can it compile for that target?
has_std() {
  local dir
  dir=$("$1" --print target-libdir --target "$2" 2>/dev/null) && [ -d "$dir" ]
}

# For building for another architecture than this machine's: chooses the Rust that can (setup.sh
# cross) and tells cargo the linker.
use_cross() {
  local triple gnu
  triple=$(rust_triple "$1")
  gnu=$(multiarch "$1")
  if ! has_std rustc "$triple"; then
    has_std "$TOOLS/rust-cross/bin/rustc" "$triple" || return 1
    PATH=$TOOLS/rust-cross/bin:$PATH
  fi
  if ! have "$gnu-gcc"; then
    [ -x "$BIN/$gnu-gcc" ] || return 1
    PATH=$BIN:$PATH
  fi
  export "CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$triple")_LINKER=$gnu-gcc" "CC_${triple//-/_}=$gnu-gcc"
}

# Debian's name for this machine's architecture, without needing dpkg.
host_arch() {
  case $(uname -m) in
    x86_64) echo amd64 ;;
    aarch64) echo arm64 ;;
    *) die "no support for the architecture $(uname -m): chsnap knows x86_64 and aarch64" ;;
  esac
}

# Rust's name for a Debian architecture.
rust_triple() {
  case $1 in
    amd64) echo x86_64-unknown-linux-gnu ;;
    arm64) echo aarch64-unknown-linux-gnu ;;
    *) die "no Rust target is known for the architecture $1" ;;
  esac
}

# GNU's name for a Debian architecture, as in /usr/lib/<it>.
multiarch() {
  case $1 in
    amd64) echo x86_64-linux-gnu ;;
    arm64) echo aarch64-linux-gnu ;;
    *) die "no library directory is known for the architecture $1" ;;
  esac
}

# mounts_below <directory>: what is mounted below it, deepest first, each with a NUL at its end.
mounts_below() {
  local at
  while read -r _ _ _ _ at _; do
    # The kernel writes a space as \040.
    printf -v at %b "$at"
    [[ $at != "$1"/* ]] || printf '%s\0' "$at"
  done </proc/self/mountinfo | sort -rz
}

# run_dir <name>: where sockets can be, whose path may have 107 bytes at most; every checkout has its own.
run_dir() { printf '/run/chsnap-dev/%s-%s\n' "$1" "$(printf %s "$TARGET" | sha256sum | cut -c1-12)"; }

# take_lock <name>: one such step at a time, since two would unpack over each other. The lock ends
# with the script or with the next take_lock. Whatever is started to outlive the script must be
# started with `9>&-`.
take_lock() {
  exec 9>"$TARGET/.lock-$1"
  if ! flock -n 9; then
    say "another run is at '$1' in $TARGET; waiting for it"
    flock 9
  fi
}

# Stamps make steps idempotent: a step is repeated when the digest of its inputs changes.
#   if ! stamped kernel "$digest"; then ...; stamp kernel "$digest"; fi
stamped() { [ "$(cat "$TARGET/stamps/$1" 2>/dev/null)" = "$2" ]; }
stamp() {
  mkdir -p "$TARGET/stamps"
  printf '%s\n' "$2" >"$TARGET/stamps/$1"
}

# digest <file|string...>: one digest over files (by content) and strings.
digest() {
  local a
  for a in "$@"; do
    if [ -f "$a" ]; then sha256sum <"$a"; else printf '%s\n' "$a"; fi
  done | sha256sum | cut -c1-32
}

# The commit that is tested; `-dirty` where there are changes beside it, those to the table of what was tested
# excepted, for that is what a test changes.
tested_commit() {
  local commit
  commit=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null) || { echo unknown && return; }
  [ -z "$(git -C "$ROOT" status --porcelain -- . ':!docs/matrix.md' 2>/dev/null)" ] || commit+=-dirty
  printf '%s\n' "$commit"
}

# version_ge 10.0.2 10: is the first at least the second?
version_ge() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# The version a QEMU reports; nothing when it is missing or does not run.
qemu_version() { { "$1" --version 2>/dev/null || true; } | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'; }

# The Debian package with QEMU for that architecture.
qemu_package() {
  case $1 in
    amd64) echo qemu-system-x86 ;;
    arm64) echo qemu-system-arm ;;
    *) die "no QEMU is known for the architecture $1" ;;
  esac
}

# Debian's codename of this machine, e.g. bookworm.
codename() {
  # shellcheck source=/dev/null
  (. /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-unknown}")
}

# The directory in which Debian's version of this machine has no newer stable: used to choose
# where QEMU 10 and the 6.12 kernel come from.
newer_suite() {
  case $(codename) in
    bookworm) echo bookworm-backports ;;
    *) echo trixie ;;
  esac
}
