#!/bin/bash
# A containerd of its own, beside whatever the machine runs:
#
#   containerd.sh start <1.6|2.1> <directory>   starts it and prints its address
#   containerd.sh stop <directory>              ends its tasks and it, and removes its state
#   containerd.sh address <directory>
#
# <directory> keeps its configuration, log and content, and is left for a later start. Its state
# and sockets are in /run/chsnap-dev/<digest>, because a socket's path may have 107 bytes at most.
# CHSNAP_BIN_DIR is where containerd finds the shim (default: target/release).
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

usage() { die "usage: containerd.sh start <1.6|2.1> <directory> | stop <directory> | address <directory>"; }

set_paths() {
  DIR=$(realpath -m "$1")
  STATE=/run/chsnap-dev/$(printf %s "$DIR" | sha256sum | cut -c1-12)
  ADDRESS=$STATE/c.sock
  PIDFILE=$DIR/containerd.pid
}

# The process in the pid file, if it is still the one that was started here.
running_pid() {
  local pid
  pid=$(cat "$PIDFILE" 2>/dev/null) || return 1
  { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -qF -- "$DIR/config.toml" || return 1
  printf '%s\n' "$pid"
}

start() {
  local version=$1 home pid n
  home=$TOOLS/containerd-$version
  [ -x "$home/bin/containerd" ] || die "no containerd $version in $home: run hack/setup.sh containerd"
  set_paths "$2"
  if pid=$(running_pid); then die "a containerd already runs for $DIR (process $pid): stop it first"; fi
  mkdir -p "$DIR/root" "$DIR/opt" "$STATE"
  chmod 711 "$STATE"
  cat >"$DIR/config.toml" <<CONF
version = 2
root = "$DIR/root"
state = "$STATE"
# No kubelet speaks to this one, and a system-wide /opt/containerd is not its business.
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri", "io.containerd.podsandbox.controller.v1.podsandbox"]
[grpc]
  address = "$ADDRESS"
[debug]
  level = "${CHSNAP_CONTAINERD_LOG:-info}"
CONF
  printf '%s\n' "$version" >"$DIR/version"
  # The shim is looked up in PATH by its runtime's name; runc is only for comparing.
  PATH="${CHSNAP_BIN_DIR:-$TARGET/release}:$home/bin:$BIN:$PATH" \
    setsid "$home/bin/containerd" --config "$DIR/config.toml" >>"$DIR/containerd.log" 2>&1 </dev/null 9>&- &
  pid=$!
  printf '%s\n' "$pid" >"$PIDFILE"
  for n in $(seq 100); do
    if [ -S "$ADDRESS" ] && "$home/bin/ctr" -a "$ADDRESS" --connect-timeout 1s version >/dev/null 2>&1; then break; fi
    if ! kill -0 "$pid" 2>/dev/null || [ "$n" = 100 ]; then
      tail -n 20 "$DIR/containerd.log" >&2
      stop "$DIR"
      die "containerd $version did not come up; its log is $DIR/containerd.log"
    fi
    sleep 0.1
  done
  printf '%s\n' "$ADDRESS"
}

# What still runs under this containerd: without it, shims and VMs would outlive it.
end_tasks() {
  local ctr ns task
  ctr=("$TOOLS/containerd-$(cat "$DIR/version")/bin/ctr" -a "$ADDRESS" --connect-timeout 2s)
  for ns in $(timeout 10 "${ctr[@]}" namespaces ls -q 2>/dev/null); do
    for task in $(timeout 10 "${ctr[@]}" -n "$ns" task ls -q 2>/dev/null); do
      timeout 20 "${ctr[@]}" -n "$ns" task rm -f "$task" >/dev/null 2>&1 ||
        say "note: the task $task in namespace $ns could not be removed"
    done
    for task in $(timeout 10 "${ctr[@]}" -n "$ns" container ls -q 2>/dev/null); do
      timeout 10 "${ctr[@]}" -n "$ns" container rm "$task" >/dev/null 2>&1 || true
    done
  done
}

stop() {
  local pid left
  set_paths "$1"
  if pid=$(running_pid); then
    end_tasks
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 100); do
      running_pid >/dev/null || break
      sleep 0.1
    done
    if running_pid >/dev/null; then
      say "note: containerd (process $pid) did not end in 10 s and is killed"
      kill -KILL "$pid" 2>/dev/null || true
      sleep 0.2
    fi
  fi
  # Images mounted beside its own directories are in them all the same.
  while IFS= read -r -d '' left; do
    umount -l "$left" || true
  done < <(mounts_below "$DIR" && mounts_below "$STATE")
  rm -rf "$STATE" "$PIDFILE"
  rmdir /run/chsnap-dev 2>/dev/null || true
}

case ${1:-} in
  start) [ $# -eq 3 ] || usage && start "$2" "$3" ;;
  stop) [ $# -eq 2 ] || usage && stop "$2" ;;
  address) [ $# -eq 2 ] || usage && set_paths "$2" && printf '%s\n' "$ADDRESS" ;;
  *) usage ;;
esac
