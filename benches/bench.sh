#!/usr/bin/env bash
# sockless beside every other builder that is installed: same contexts, same registry, empty stores,
# builders in turn (A B C A B C), medians and ratios.
#
#   benches/bench.sh [--rounds N] [--builders "NAME…"] [--out DIR] [WORKLOAD]…
#
# Workloads: meta runs stages small big base noop edit runner tree limit (see workloads.sh). Builders:
# sockless-user, sockless-root, buildah, podman, docker (BuildKit in a running daemon).
#
# Needs root: the peers are measured as root, and the registry gets a network namespace of its own, whose
# counters say how many bytes each build moved. What it writes: DIR/results.csv (every run), DIR/table.md.
# BENCH_BIN=FILE measures that program instead of building one. BENCH_WORK=DIR is where it works; it needs
# some 40 GB there for `limit`, 20 GB without.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${HOME:-}" ] && [ -r "$HOME/.cargo/env" ] && ! command -v cargo >/dev/null && . "$HOME/.cargo/env"
PATH=$PATH:/usr/sbin:/sbin
[ "$(id -u)" = 0 ] || { echo "bench: run it as root (it makes a network namespace, and peers run as root)" >&2; exit 1; }

rounds=3
builders=
out=$PWD/target/bench
workloads=()
while [ $# -gt 0 ]; do
  case $1 in
    --rounds) rounds=$2; shift 2 ;;
    --builders) builders=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "bench: unknown option $1" >&2; exit 2 ;;
    *) workloads+=("$1"); shift ;;
  esac
done
[ ${#workloads[@]} -gt 0 ] || workloads=(meta runs stages small big base noop edit runner tree limit)

sh tests/setup.sh buildah iproute2 pigz perl
. tests/user.sh
. benches/workloads.sh
. benches/builders.sh
for workload in "${workloads[@]}"; do
  declare -F "context_$workload" >/dev/null || { echo "bench: there is no workload $workload" >&2; exit 2; }
done

say() { printf '\n== %s\n' "$*" >&2; }
die() { echo "bench: $*" >&2; exit 1; }

target=$(cargo metadata --locked --no-deps --format-version 1 | jq -r .target_directory)
binary=${BENCH_BIN:-}
if [ -z "$binary" ]; then
  say "Building the program (release)"
  cargo build --release --locked
  binary=$(cargo build --release --locked --message-format=json 2>/dev/null \
    | jq -r 'select(.reason == "compiler-artifact" and .executable and .target.name == "sockless") | .executable')
fi

work=$(mktemp -d "${BENCH_WORK:-/var/tmp}/sockless-bench.XXXXXX")
pids=()
clean_up() {
  stop_docker
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  [ -z "${net:-}" ] || ip netns del "$net" 2>/dev/null || true
  [ -z "${memory_group:-}" ] || rmdir "$memory_group" 2>/dev/null || true
  rm -rf --one-file-system -- "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
chmod 755 "$work"
cp "$binary" "$work/sockless"
mkdir -p "$work/contexts" "$out"

# The registry's end of a cable, in a namespace of its own. 198.18.0.0/15 is for benchmarks (RFC 2544).
net=sockless-bench-$$
cable=slb$$
here=198.18.7.1 there=198.18.7.2
ip netns add "$net"
ip link add "$cable" type veth peer name eth0 netns "$net"
ip address add $here/30 dev "$cable"
ip link set "$cable" up
ip -n "$net" address add $there/30 dev eth0
ip -n "$net" link set eth0 up
ip -n "$net" link set lo up
registry=$there:5000

sh certs/make.sh --out "$work/certs" --san $there 2>/dev/null
mkdir "$work/ca"
cp "$work/certs/ca.crt" "$work/ca/"
chmod 755 "$work/certs" "$work/ca"

start_registry() {
  cat > "$work/registry.yml" <<CONFIG
version: 0.1
log: { level: warn }
storage: { filesystem: { rootdirectory: $work/registry }, delete: { enabled: true } }
http:
  addr: "$registry"
  secret: of the benchmark
  tls: { certificate: $work/certs/registry.crt, key: $work/certs/registry.key }
CONFIG
  ip netns exec "$net" docker-registry serve "$work/registry.yml" > "$work/registry.log" 2>&1 &
  pids+=($!)
  local tries=300
  until curl -sf --cacert "$work/ca/ca.crt" "https://$registry/v2/" >/dev/null; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { cat "$work/registry.log" >&2; die "the registry did not come up"; }
    sleep 0.1
  done
}

# Bytes that came from the registry, and that went to it, since the cable exists.
pulled() { cat "/sys/class/net/$cable/statistics/rx_bytes"; }
pushed() { cat "/sys/class/net/$cable/statistics/tx_bytes"; }

# blob DIR: stores standard input in the layout DIR; sets `digest` and `size`.
blob() {
  cat > "$1/blobs/sha256/new"
  digest=$(sha256sum < "$1/blobs/sha256/new" | cut -d' ' -f1)
  size=$(stat -c %s "$1/blobs/sha256/new")
  mv "$1/blobs/sha256/new" "$1/blobs/sha256/$digest"
}

# push_base NAME TAR…: an image of these layers, compressed by gzip, as the repository base/NAME.
push_base() {
  local name=$1 layout=$work/layout layers= diffs= history= tar
  shift
  rm -rf "$layout"
  mkdir -p "$layout/blobs/sha256"
  for tar in "$@"; do
    blob "$layout" < <(pigz -6 < "$tar")
    layers="$layers${layers:+,}{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\"digest\":\"sha256:$digest\",\"size\":$size}"
    # Buildah wants an entry for each layer.
    history="$history${history:+,}{\"created\":\"2026-01-01T00:00:00Z\",\"created_by\":\"tar\"}"
    diffs="$diffs${diffs:+,}\"sha256:$(sha256sum < "$tar" | cut -d' ' -f1)\""
  done
  blob "$layout" <<< "{\"architecture\":\"$(dpkg --print-architecture)\",\"os\":\"linux\",\"config\":{\"Cmd\":[\"/bin/sh\"],\"Env\":[\"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\"]},\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[$diffs]},\"history\":[$history]}"
  blob "$layout" <<< "{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"config\":{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"digest\":\"sha256:$digest\",\"size\":$size},\"layers\":[$layers]}"
  printf '{"imageLayoutVersion":"1.0.0"}' > "$layout/oci-layout"
  printf '{"schemaVersion":2,"manifests":[{"mediaType":"%s","digest":"sha256:%s","size":%s}]}' \
    application/vnd.oci.image.manifest.v1+json "$digest" "$size" > "$layout/index.json"
  skopeo --insecure-policy copy --quiet --dest-cert-dir "$work/ca" "oci:$layout" "docker://$registry/base/$name:latest"
  rm -rf "$layout"
}

# timed WORKLOAD BUILDER ROUND COMMAND…: runs the command, writes a line of results.
timed() {
  local workload=$1 builder=$2 round=$3 from to start end code=0 peak log=$work/run.log
  shift 3
  sync
  from=$(pulled) to=$(pushed) start=$EPOCHREALTIME
  /usr/bin/time -f %M -o "$work/peak" "$@" > "$log" 2>&1 < /dev/null || code=$?
  end=$EPOCHREALTIME
  from=$(($(pulled) - from)) to=$(($(pushed) - to))
  peak=$(tail -n1 "$work/peak")
  case $builder in docker) peak=$(docker_peak) ;; esac
  echo "$workload,$builder,$round,$(awk -v a="$start" -v b="$end" 'BEGIN { printf "%.3f", b - a }'),$peak,$from,$to,$code" \
    | tee -a "$out/results.csv" >&2
  if [ "$code" != 0 ]; then
    tail -n 15 "$log" >&2
    cp "$log" "$out/failed-$workload-$builder-$round.log"
  fi
}

[ -n "$builders" ] || builders=$(installed_builders)
say "Builders: $builders; rounds: $rounds; workloads: ${workloads[*]}"
start_registry
prepare_bases
printf 'workload,builder,round,seconds,peak_kib,pulled_bytes,pushed_bytes,exit\n' > "$out/results.csv"
for workload in "${workloads[@]}"; do
  say "$workload"
  mkdir -p "$work/contexts/$workload"
  "context_$workload" "$work/contexts/$workload"
  chmod -R a+rX "$work/contexts/$workload"
  "measure_$workload"
  reset_all
  discard "$work/contexts/$workload"
  remove_discarded
done
say "Results"
benches/table.sh "$out/results.csv" | tee "$out/table.md"
