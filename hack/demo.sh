#!/bin/bash
# make demo: a Python service as a microVM on a containerd of its own, asked from the host: booted, then restored from the
# snapshot that was built meanwhile, then restored twice at the same time. All of it is taken down.
#
#   CHSNAP_DEMO_RUNS=1          how often it is restored
#   CHSNAP_DEMO_CONTAINERD=1.6  or 2.1
#   CHSNAP_DEMO_PORT=18080      on the host's loopback
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

RUNS=${CHSNAP_DEMO_RUNS:-1}
VERSION=${CHSNAP_DEMO_CONTAINERD:-1.6}
PORT=${CHSNAP_DEMO_PORT:-18080}
IMAGE=localhost/chsnap/python-demo:latest
DIR=$TARGET/demo
CHSNAP_STATE_DIR=$(run_dir demo)
export CHSNAP_STATE_DIR
SHIM=${CHSNAP_BIN_DIR:-$TARGET/release}/containerd-shim-chsnap-v2
URL=http://127.0.0.1:$PORT

"$ROOT/hack/setup.sh"
"$ROOT/hack/build.sh"
"$ROOT/hack/image.sh"

take_lock demo
# Of an earlier run that was killed, which may hold the port.
"$ROOT/hack/containerd.sh" stop "$DIR"
rm -rf --one-file-system "$DIR" "$CHSNAP_STATE_DIR"
if (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
  die "port $PORT of the loopback is taken: choose another with CHSNAP_DEMO_PORT"
fi

id='' both=()
cleanup() {
  local status=$?
  trap - EXIT INT TERM
  if [ "$status" -ne 0 ] && [ -f "$DIR/containerd.log" ]; then
    say "the demo failed; the last complaints in $DIR/containerd.log:"
    { grep -E 'level="?(warn|error|fatal)' "$DIR/containerd.log" || true; } | tail -n 10 | cut -c1-400 | sed 's/^/    /' >&2
  fi
  "$ROOT/hack/containerd.sh" stop "$DIR" || true
  rm -rf "$DIR/root" "$DIR/snapshots" "$CHSNAP_STATE_DIR"
  rmdir /run/chsnap-dev 2>/dev/null || true
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

mkdir -p "$DIR/runs"
CHSNAP_SNAPSHOT_MODE=auto CHSNAP_SNAPSHOT_DIR=$DIR/snapshots CHSNAP_CTR=$TOOLS/containerd-$VERSION/bin/ctr \
  "$ROOT/hack/config.sh" "$DIR/chsnap.toml"

say "starting containerd $VERSION and importing the image"
address=$("$ROOT/hack/containerd.sh" start "$VERSION" "$DIR")
export CONTAINERD_ADDRESS=$address
ctr=("$TOOLS/containerd-$VERSION/bin/ctr" -a "$address")
chsnap=("${CHSNAP_BIN_DIR:-$TARGET/release}/chsnap")
"${ctr[@]}" images import "$TARGET/image/python.tar" >"$LOGS/demo-import.log" 2>&1 ||
  die "the image could not be imported: $(tail -n 3 "$LOGS/demo-import.log")"

# The loopback is not behind a proxy, whatever the environment says.
ask() { curl --noproxy '*' -s "$@"; }

now_ms() { date +%s%3N; }

# Waits until the service answers, and prints the milliseconds since $1.
first_response() {
  local t0=$1 deadline=$(($1 + 120000))
  until ask -f -m 2 -o /dev/null "$URL/healthz"; do
    [ "$(now_ms)" -lt "$deadline" ] || die "no answer at $URL within 120 s"
    "${ctr[@]}" task ls 2>/dev/null | grep -q "^$id .*RUNNING" || die "the container ended before it answered"
    sleep 0.02
  done
  echo $(($(now_ms) - t0))
}

pods() { "${chsnap[@]}" ps --config "$DIR/chsnap.toml" --json; }

# start <id> <expose>: in the background, as `ctr run -d`.
start() {
  "${ctr[@]}" run -d --runtime io.containerd.chsnap.v2 --runtime-config-path "$DIR/chsnap.toml" \
    --annotation "io.chsnap.expose=$2" --annotation "io.chsnap.ready=http://:8080/healthz" \
    "$IMAGE" "$1" python3 /app/search.py 9>&-
}

end() {
  "${ctr[@]}" task kill -s SIGTERM "$1"
  for _ in $(seq 100); do
    "${ctr[@]}" task ls | grep -q "^$1 .*RUNNING" || break
    sleep 0.1
  done
  "${ctr[@]}" task rm -f "$1" >/dev/null 2>&1 || true
  "${ctr[@]}" container rm "$1"
}

# record <run> <id> <start of the shim, null if not measured> <ctr run> <first response> <HTTP status>, in ms
record() {
  pods >"$DIR/runs/ps-$1.json"
  # What `ctr run` took beside the shim's phases is ctr's and containerd's, and the shim's start.
  jq -n --argjson start "$3" --argjson ran "$4" --argjson ms "$5" --argjson status "$6" --arg id "$2" \
    --slurpfile ps "$DIR/runs/ps-$1.json" --slurpfile answer "$DIR/runs/answer-$1.json" \
    '($ps | flatten | map(select(.id == $id)) | first) as $pod
     | ($pod.phases_us | map({ (.[0]): (.[1] / 1000) }) | add) as $phases
     | { vmm: $pod.vmm, accelerator: $pod.accelerator, guest_kernel: $answer[0].kernel,
         run: { way: $pod.way, first_response_ms: $ms, status: $status,
                phases: ((if $start then { "shim start": $start, "ctr and containerd": ($ran - $start - ($phases | add)) }
                          else { "ctr, containerd and shim start": ($ran - ($phases | add)) } end)
                         + $phases + { "process": ($ms - $ran) }) } }' >"$DIR/runs/$1.json"
}

# one <run>: starts it, asks it and leaves it running.
one() {
  local start_ms t0 ran ms answer echoed status
  id=demo-$1
  start_ms=$("$ROOT/hack/shim_start.py" "$SHIM" "$address")
  say "run $1: ctr run -d --runtime io.containerd.chsnap.v2 --annotation io.chsnap.expose=127.0.0.1:$PORT:8080" \
    "--annotation io.chsnap.ready=http://:8080/healthz ... $id python3 /app/search.py"
  t0=$(now_ms)
  start "$id" "127.0.0.1:$PORT:8080"
  ran=$(($(now_ms) - t0))
  ms=$(first_response "$t0")
  answer=$(ask -f "$URL/")
  echoed=$(ask -f --data-binary "written on the host" "$URL/echo")
  [ "$echoed" = "written on the host" ] || die "POST $URL/echo answered '$echoed'"
  status=$(ask -o /dev/null -w '%{http_code}' "$URL/search?q=snapshot")
  printf '%s' "$answer" >"$DIR/runs/answer-$1.json"
  [ "$1" != 1 ] || say "GET $URL/ -> $answer"
  record "$1" "$id" "$start_ms" "$ran" "$ms" "$status"
}

has_snapshot() {
  "${chsnap[@]}" snapshot ls --config "$DIR/chsnap.toml" --json >"$DIR/snapshots.json"
  jq -e 'any(.manifest.inputs.kind == "image")' "$DIR/snapshots.json" >/dev/null
}

one 1
say "the snapshot is being built beside it, from the image alone"
for _ in $(seq 1800); do
  ! has_snapshot || break
  sleep 0.1
done
has_snapshot || die "no snapshot came of it: $(pods | jq -r '.[].why_not') $(grep -o 'template: .*' "$DIR/containerd.log" | tail -n 3)"
say "$(jq -r '.[] | select(.manifest.inputs.kind == "image")
  | "it took \(.manifest.build_ms) ms and has \(.bytes / 1048576 | round) MiB"' "$DIR/snapshots.json")"
end "$id"

last=$((RUNS + 1))
for run in $(seq 2 "$last"); do
  one "$run"
  end "$id"
done

say "two at the same time: ctr run -d ... demo-a & ctr run -d ... demo-b"
for id in demo-a demo-b; do
  {
    t0=$(now_ms)
    start "$id" 8080
    ran=$(($(now_ms) - t0))
    socket=$CHSNAP_STATE_DIR/default/$id/8080.sock
    until ask -f -m 2 -o /dev/null --unix-socket "$socket" http://pod/healthz; do
      [ "$(now_ms)" -lt $((t0 + 120000)) ] || die "no answer at $socket within 120 s"
      sleep 0.02
    done
    ms=$(($(now_ms) - t0))
    status=$(ask -o "$DIR/runs/identity-$id.json" -w '%{http_code}' --unix-socket "$socket" http://pod/identity)
    ask -f --unix-socket "$socket" http://pod/ >"$DIR/runs/answer-$id.json"
    record "$id" "$id" null "$ran" "$ms" "$status"
  } &
  both+=($!)
done
for pid in "${both[@]}"; do wait "$pid" || die "one of the two did not answer"; done
end demo-a
end demo-b
# What a machine is known by has to differ in all of it.
jq -se '[.[0], .[1]] as [$a, $b] | [$a | keys[] | select(. != "restored") | select($a[.] == $b[.])] == []' \
  "$DIR"/runs/identity-demo-*.json >/dev/null || die "the two are not distinct: $(cat "$DIR"/runs/identity-demo-*.json)"

jq -s --arg host "$(uname -r)" \
  '{ vmm: .[0].vmm, accelerator: .[0].accelerator, host_kernel: $host, guest_kernel: .[0].guest_kernel,
     runs: map(.run) }' "$DIR"/runs/[0-9]*.json "$DIR"/runs/demo-[ab].json >"$TARGET/demo.json.new"
# A guest's kernel may be of the host's release, but never of its boot.
jq -se --arg boot "$(cat /proc/sys/kernel/random/boot_id)" 'all(.boot_id and .boot_id != $boot)' "$DIR"/runs/answer-*.json >/dev/null ||
  die "the service runs under the host's own kernel: $(cat "$DIR"/runs/answer-*.json)"
jq -e '.vmm and .accelerator and .guest_kernel and ([.runs[].status] | all(. == 200))
  and .runs[0].way == "direct" and ([.runs[1:][].way] | all(. == "image"))' \
  "$TARGET/demo.json.new" >/dev/null || die "this is not what a microVM gives: $(cat "$TARGET/demo.json.new")"
mv "$TARGET/demo.json.new" "$TARGET/demo.json"

# Shims, VMMs and virtiofsd's name one of these, each another.
places=("$DIR" "$CHSNAP_STATE_DIR" "$(dirname "$address")")

mounts_left() {
  local place
  for place in "${places[@]}"; do mounts_below "$place" | tr '\0' '\n'; done
}

processes_left() {
  local place pid
  {
    for place in "${places[@]}"; do processes_naming "$place/"; done
    # What builds a snapshot names nothing, and may be another containerd's.
    for pid in $(processes_naming build-template); do
      { tr '\0' '\n' <"/proc/$pid/environ"; } 2>/dev/null | grep -F -- "${places[2]}/" >/dev/null || continue
      printf '%s\n' "$pid"
    done
  } | sort -un
}

# gone <what lists it>: what is left is listed; a shim ends a little after its container.
gone() {
  local deadline=$((SECONDS + 10))
  while left=$("$1") && [ -n "$left" ]; do
    [ $SECONDS -lt "$deadline" ] || return 1
    sleep 0.1
  done
}

say "taking everything down"
# Before containerd's end, after which whatever is left is unmounted.
gone mounts_left || die "left mounted: $(paste -sd' ' <<<"$left")"
"$ROOT/hack/containerd.sh" stop "$DIR"
rm -rf "$DIR/snapshots"
gone processes_left || die "left behind: $(ps -o pid=,args= -p "$(paste -sd, <<<"$left")")"

jq -r '"
  VMM           \(.vmm), \(.accelerator)
  host kernel   \(.host_kernel)
  guest kernel  \(.guest_kernel)

  run  way      first response  HTTP  phases (ms)",
  (.runs | to_entries[] |
    "  \(.key + 1 | tostring | (. + "    ")[0:4]) \(.value.way | tostring | (. + "        ")[0:8]) \(.value.first_response_ms | tostring | ("      " + .)[-8:]) ms     \(.value.status)   \(.value.phases | to_entries | map("\(.key) \(.value | round)") | join(", "))")' \
  "$TARGET/demo.json"
jq -sr '"",
  "  the last two  \(.[0].hostname)                              \(.[1].hostname)",
  (["epoch", "kernel_uuid", "uuid4", "urandom", "random", "ssl"][] as $what
    | "  \($what | (. + "              ")[0:14])\(.[0][$what] | tostring | (. + "                                        ")[0:40])\(.[1][$what])")' \
  "$DIR"/runs/identity-demo-*.json
printf '\n'
say "the same is in $TARGET/demo.json"
