#!/bin/bash
# make demo: a Python service as a microVM on a containerd of its own, asked from the host, taken down.
#
#   CHSNAP_DEMO_RUNS=3          how often it is started
#   CHSNAP_DEMO_CONTAINERD=1.6  or 2.1
#   CHSNAP_DEMO_PORT=18080      on the host's loopback
set -euo pipefail
# shellcheck source=hack/lib.sh
. "$(dirname "$0")/lib.sh"

RUNS=${CHSNAP_DEMO_RUNS:-3}
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

id=
cleanup() {
  local status=$?
  trap - EXIT INT TERM
  if [ "$status" -ne 0 ] && [ -f "$DIR/containerd.log" ]; then
    say "the demo failed; the last complaints in $DIR/containerd.log:"
    { grep -E 'level="?(warn|error|fatal)' "$DIR/containerd.log" || true; } | tail -n 10 | cut -c1-400 | sed 's/^/    /' >&2
  fi
  "$ROOT/hack/containerd.sh" stop "$DIR" || true
  rm -rf "$DIR/root" "$CHSNAP_STATE_DIR"
  rmdir /run/chsnap-dev 2>/dev/null || true
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

mkdir -p "$DIR/runs"
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

for run in $(seq "$RUNS"); do
  id=demo-$run
  start_ms=$("$ROOT/hack/shim_start.py" "$SHIM" "$address")
  say "run $run of $RUNS: ctr run -d --runtime io.containerd.chsnap.v2 --annotation io.chsnap.expose=127.0.0.1:$PORT:8080 ... $id"
  t0=$(now_ms)
  "${ctr[@]}" run -d --runtime io.containerd.chsnap.v2 --runtime-config-path "$DIR/chsnap.toml" \
    --annotation "io.chsnap.expose=127.0.0.1:$PORT:8080" "$IMAGE" "$id" 9>&-
  ran=$(($(now_ms) - t0))
  ms=$(first_response "$t0")
  answer=$(ask -f "$URL/")
  echoed=$(ask -f --data-binary "written on the host" "$URL/echo")
  [ "$echoed" = "written on the host" ] || die "POST $URL/echo answered '$echoed'"
  status=$(ask -o /dev/null -w '%{http_code}' "$URL/")
  "${chsnap[@]}" ps --config "$DIR/chsnap.toml" --json >"$DIR/runs/ps-$run.json"
  printf '%s' "$answer" >"$DIR/runs/answer-$run.json"
  [ "$run" != 1 ] || say "GET $URL/ -> $answer"
  # What `ctr run` took beside the shim's phases is ctr's and containerd's, and the shim's start.
  jq -n --argjson ms "$ms" --argjson ran "$ran" --argjson start "$start_ms" --argjson status "$status" --arg id "$id" \
    --slurpfile ps "$DIR/runs/ps-$run.json" --slurpfile answer "$DIR/runs/answer-$run.json" \
    '($ps | flatten | map(select(.id == $id)) | first) as $pod
     | ($pod.phases_us | map({ (.[0]): (.[1] / 1000) }) | add) as $phases
     | { vmm: $pod.vmm, accelerator: $pod.accelerator, guest_kernel: $answer[0].kernel,
         run: { way: $pod.way, first_response_ms: $ms, status: $status,
                phases: ({ "shim start": $start, "ctr and containerd": ($ran - $start - ($phases | add)) }
                         + $phases + { "process": ($ms - $ran) }) } }' >"$DIR/runs/$run.json"
  "${ctr[@]}" task kill -s SIGTERM "$id"
  for _ in $(seq 100); do
    "${ctr[@]}" task ls | grep -q "^$id .*RUNNING" || break
    sleep 0.1
  done
  "${ctr[@]}" task rm -f "$id" >/dev/null 2>&1 || true
  "${ctr[@]}" container rm "$id"
done

jq -s --arg host "$(uname -r)" \
  '{ vmm: .[0].vmm, accelerator: .[0].accelerator, host_kernel: $host, guest_kernel: .[0].guest_kernel,
     runs: map(.run) }' "$DIR"/runs/[0-9]*.json >"$TARGET/demo.json.new"
# A guest's kernel may be of the host's release, but never of its boot.
jq -se --arg boot "$(cat /proc/sys/kernel/random/boot_id)" 'all(.boot_id and .boot_id != $boot)' "$DIR"/runs/answer-*.json >/dev/null ||
  die "the service runs under the host's own kernel: $(cat "$DIR"/runs/answer-*.json)"
jq -e '.vmm and .accelerator and .guest_kernel and ([.runs[].status] | all(. == 200))' \
  "$TARGET/demo.json.new" >/dev/null || die "this is not what a microVM gives: $(cat "$TARGET/demo.json.new")"
mv "$TARGET/demo.json.new" "$TARGET/demo.json"

say "taking everything down"
"$ROOT/hack/containerd.sh" stop "$DIR"
left=$(processes_naming "$DIR/")
[ -z "$left" ] || die "left behind: $(ps -o pid=,args= -p "$(paste -sd, <<<"$left")")"

jq -r '"
  VMM           \(.vmm), \(.accelerator)
  host kernel   \(.host_kernel)
  guest kernel  \(.guest_kernel)

  run  way      first response  HTTP  phases (ms)",
  (.runs | to_entries[] |
    "  \(.key + 1 | tostring | (. + "    ")[0:4]) \(.value.way | tostring | (. + "        ")[0:8]) \(.value.first_response_ms | tostring | ("      " + .)[-8:]) ms     \(.value.status)   \(.value.phases | to_entries | map("\(.key) \(.value | round)") | join(", "))")' \
  "$TARGET/demo.json"
printf '\n'
say "the same is in $TARGET/demo.json"
