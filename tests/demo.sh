#!/usr/bin/env bash
# The whole way on this machine: a signed webhook of a merged pull request, a build without root and
# without a daemon, a push to a private registry with TLS and a password, and the image's Apache
# answering. Afterwards, what the builder added to the time of the steps.
#
# GitHub and the registries are programs on the loopback. The base image is Docker Hub's ubuntu where
# that can be reached, and otherwise a Debian made by debootstrap.
#
# SOCKLESS_TEST_BIN=FILE shows that program instead of building one.
# DEMO_KEEP=1 keeps everything running until Ctrl-C, as when standard input is a terminal.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${HOME:-}" ] && [ -r "$HOME/.cargo/env" ] && ! command -v cargo >/dev/null && . "$HOME/.cargo/env"
command -v cargo >/dev/null || { echo "Rust is missing: see https://rustup.rs" >&2; exit 1; }
PATH=$PATH:/usr/sbin:/sbin

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
die() { echo "demo: $*" >&2; exit 1; }

# Buildah only for the comparison.
sh tests/setup.sh buildah
. tests/user.sh

target=$(cargo metadata --locked --no-deps --format-version 1 | jq -r .target_directory)
built=${SOCKLESS_TEST_BIN:-}
if [ -z "$built" ]; then
  say "Building the program (release)"
  cargo build --release --locked
  built=$(cargo build --release --locked --message-format=json 2>/dev/null \
    | jq -r 'select(.reason == "compiler-artifact" and .executable and .target.name == "sockless") | .executable')
fi

work=$(mktemp -d /var/tmp/sockless-demo.XXXXXX)
pids=()
clean_up() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  # Unpacked images belong to the user's subordinate IDs, which only their own "root" may remove.
  if [ "$(id -u)" = 0 ]; then
    rm -rf --one-file-system -- "$work"
  else
    unshare --user --map-auto --map-root-user rm -rf --one-file-system -- "$work"
  fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM
mkdir "$work/bin" "$work/tmp" "$work/docker"
cp "$built" "$work/bin/sockless"
cp tests/debian-base.sh tests/run-image.sh certs/make.sh "$work/bin/"
cp -r fixtures/scenario "$work/repository"
[ "$(id -u)" != 0 ] || chown -R "$user" "$work"
chmod 755 "$work"
if [ "$(id -u)" = 0 ]; then
  echo "You are root; everything from here on runs as the ordinary user $user ($(id -u "$user")," \
    "subordinate IDs $(grep "^$user:" /etc/subuid | head -n1))."
else
  echo "Everything runs as you, $user."
fi
common=(TMPDIR="$work/tmp" DOCKER_CONFIG="$work/docker")

# wait_for SECONDS WHAT COMMAND…: until the command succeeds.
wait_for() {
  local tries=$(($1 * 10)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { echo "demo: $what did not come up" >&2; return 1; }
    sleep 0.1
  done
}

# registry NAME: starts a registry with the configuration on standard input, on a free port that the
# kernel picks. Sets `address`.
registry() {
  cat > "$work/$1.yml"
  (as_user docker-registry serve "$work/$1.yml") > "$work/$1.log" 2>&1 &
  pids+=($!)
  wait_for 20 "registry $1" grep -q 'msg="listening on' "$work/$1.log" || { cat "$work/$1.log" >&2; exit 1; }
  address=$(sed -n 's/.*msg="listening on \([0-9.:]*\).*/\1/p' "$work/$1.log" | head -n1)
}

say "Starting a private registry: TLS by an authority of its own, one user, bcrypt"
(as_user sh "$work/bin/make.sh" --out "$work/certs")
registry private <<CONFIG
version: 0.1
log: { level: info, formatter: text }
storage: { filesystem: { rootdirectory: $work/private }, delete: { enabled: true } }
auth: { htpasswd: { realm: demo, path: $work/certs/htpasswd } }
http:
  addr: 127.0.0.1:0
  secret: of the demonstration
  tls: { certificate: $work/certs/registry.crt, key: $work/certs/registry.key }
CONFIG
private=$address
login=$(cat "$work/certs/htpasswd.txt")
umask 077
printf '{"auths":{"%s":{"auth":"%s"}}}\n' "$private" "$(printf %s "$login" | base64 -w0)" > "$work/docker/config.json"
[ "$(id -u)" != 0 ] || chown "$user" "$work/docker/config.json"
umask 022
echo "https://$private"

mirror=()
settings=
if timeout 20 skopeo --insecure-policy inspect --raw docker://docker.io/library/ubuntu >/dev/null 2>&1; then
  say "The base image is Docker Hub's ubuntu"
else
  say "Docker Hub cannot be reached: making a Debian with debootstrap that stands in for ubuntu"
  registry hub <<CONFIG
version: 0.1
log: { level: info, formatter: text }
storage: { filesystem: { rootdirectory: $work/hub } }
http: { addr: "127.0.0.1:0", secret: of the demonstration }
CONFIG
  hub=$address
  # Kept between runs.
  kept=$target/fixtures/debian-bookworm.tar
  mkdir -p "$work/base" "$target/fixtures"
  if [ -s "$kept" ]; then
    cp "$kept" "$work/base/root.tar"
  else
    [ "$(id -u)" != 0 ] || chown "$user" "$work/base"
    (as_user "${common[@]}" sh "$work/bin/debian-base.sh" "$work/base/root.tar")
    cp "$work/base/root.tar" "$kept"
  fi
  # An image of one layer, by hand.
  blobs=$work/base/layout/blobs/sha256
  mkdir -p "$blobs"
  put() { # stores standard input; sets `digest` and `size`
    cat > "$blobs/new"
    digest=$(sha256sum < "$blobs/new" | cut -d' ' -f1)
    size=$(stat -c %s "$blobs/new")
    mv "$blobs/new" "$blobs/$digest"
  }
  put < <(gzip -1 < "$work/base/root.tar")
  layer="{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\"digest\":\"sha256:$digest\",\"size\":$size}"
  put <<CONFIG
{"architecture":"$(dpkg --print-architecture)","os":"linux","config":{"Cmd":["/bin/bash"],
"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},"rootfs":{"type":"layers",
"diff_ids":["sha256:$(sha256sum < "$work/base/root.tar" | cut -d' ' -f1)"]},"history":[{"created_by":"debootstrap"}]}
CONFIG
  put <<CONFIG
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":
"application/vnd.oci.image.config.v1+json","digest":"sha256:$digest","size":$size},"layers":[$layer]}
CONFIG
  printf '{"imageLayoutVersion":"1.0.0"}' > "$work/base/layout/oci-layout"
  printf '{"schemaVersion":2,"manifests":[{"mediaType":"%s","digest":"sha256:%s","size":%s}]}' \
    application/vnd.oci.image.manifest.v1+json "$digest" "$size" > "$work/base/layout/index.json"
  skopeo --insecure-policy copy --quiet --dest-tls-verify=false "oci:$work/base/layout" "docker://$hub/library/ubuntu:latest"
  mirror=(--registry-mirror "docker.io=http://$hub")
  settings="registry_mirrors = [\"docker.io=http://$hub\"]"
  echo "http://$hub/v2/library/ubuntu"
fi

say "Starting a server in the shape of raw.githubusercontent.com"
commit=$(jq -r .pull_request.merge_commit_sha "$work/repository/pull_request.json")
tree=$work/raw/$(jq -r .repository.full_name "$work/repository/pull_request.json")/$commit
mkdir -p "$tree"
cp "$work/repository/Dockerfile" "$work/repository/spec.json" "$tree/"
chmod -R a+rX "$work/raw"
for try in 1 2 3 4 5 6 7 8 9 10; do
  raw=127.0.0.1:$((20000 + RANDOM % 20000))
  (as_user busybox httpd -f -p "$raw" -h "$work/raw") 2> "$work/raw.log" &
  raw_pid=$!
  sleep 0.2
  if kill -0 $raw_pid 2>/dev/null; then break; fi
  [ "$try" -lt 10 ] || { cat "$work/raw.log" >&2; die "no free port"; }
done
pids+=($raw_pid)
sed 's/^/    /' "$tree/Dockerfile"
sed 's/^/    /' "$tree/spec.json"

# Open to everybody where udev runs, but not in many containers.
weak='allow_weak_isolation = "false"'
if ! (as_user test -w /dev/net/tun); then
  say "$user may not open /dev/net/tun: steps share this machine's network here, which serve refuses unless it is told"
  weak='allow_weak_isolation = "true"'
fi

say "Starting sockless serve as $user"
secret=$(openssl rand -hex 20)
cat > "$work/sockless.toml" <<CONFIG
listen = "127.0.0.1:0"
webhook_secret = "$secret"
branches = ["develop"]
raw_url = "http://$raw"
registry = "$private"
registry_ca_files = ["$work/certs/ca.crt"]
$weak
$settings
CONFIG
[ "$(id -u)" != 0 ] || chown "$user" "$work/sockless.toml"
chmod 600 "$work/sockless.toml"
(as_user "${common[@]}" SOCKLESS_ROOT="$work/store" "$work/bin/sockless" serve --config "$work/sockless.toml") \
  > "$work/serve.log" 2>&1 &
serve_pid=$!
pids+=($serve_pid)
wait_for 20 "sockless serve" grep -q '^sockless: listening on' "$work/serve.log" || { cat "$work/serve.log" >&2; exit 1; }
page=$(sed -n 's/^sockless: listening on //p' "$work/serve.log")
echo "the page, live: $page/"

say "GitHub delivers: pull request 17 was merged into develop"
body=$work/repository/pull_request.json
signature=$(openssl dgst -sha256 -mac hmac -macopt "key:$secret" -r "$body" | cut -d' ' -f1)
answer=$(curl -sS -X POST "$page/webhook" -H 'Content-Type: application/json' -H 'X-GitHub-Event: pull_request' \
  -H "X-GitHub-Delivery: $(cat /proc/sys/kernel/random/uuid)" -H "X-Hub-Signature-256: sha256=$signature" \
  --data-binary "@$body" -w '\n%{http_code}')
printf '%s\n' "$answer" | sed 's/^/    /'
[ "$(printf '%s\n' "$answer" | tail -n1)" = 202 ] || { cat "$work/serve.log" >&2; die "the delivery was not taken"; }
job=$page$(printf '%s\n' "$answer" | head -n1 | jq -r .url)

say "The job's log, as it comes"
shown=0
while :; do
  # The state first: when it is an end, the log that follows is whole.
  state=$(curl -sS "$job" | jq -r .state)
  curl -sS "$job/log?format=text" > "$work/job.log"
  tail -c +$((shown + 1)) "$work/job.log"
  shown=$(stat -c %s "$work/job.log")
  case $state in queued|running) sleep 0.3 ;; *) break ;; esac
done
[ "$state" = succeeded ] || { curl -sS "$job" | jq . >&2; cat "$work/serve.log" >&2; die "the job $state"; }
image=$(curl -sS "$job" | jq -r .image)
digest=$(curl -sS "$job" | jq -r .digest)

say "Pulling it back, and checking every byte"
mkdir "$work/cert-dir"
cp "$work/certs/ca.crt" "$work/cert-dir/"
skopeo --insecure-policy copy --quiet --preserve-digests --src-cert-dir "$work/cert-dir" --src-creds "$login" \
  "docker://$private/apache:0.4.0" "oci:$work/layout:apache"
blob() { printf '%s/layout/blobs/sha256/%s' "$work" "${1#sha256:}"; }
manifest=$(jq -r '.manifests[0].digest' "$work/layout/index.json")
[ "$manifest" = "$digest" ] || die "the registry has $manifest, the job pushed $digest"
config=$(jq -r .config.digest "$(blob "$manifest")")
mapfile -t layers < <(jq -r '.layers[].digest' "$(blob "$manifest")")
mapfile -t diff_ids < <(jq -r '.rootfs.diff_ids[]' "$(blob "$config")")
[ ${#layers[@]} = ${#diff_ids[@]} ] || die "${#layers[@]} layers, ${#diff_ids[@]} diff IDs"
for one in "$manifest" "$config" "${layers[@]}"; do
  echo "${one#sha256:}  $(blob "$one")" | sha256sum --check --quiet || die "$one is not what its name says"
done
files=()
for at in "${!layers[@]}"; do
  file=$(blob "${layers[$at]}")
  [ "sha256:$(gzip -dc "$file" | sha256sum | cut -d' ' -f1)" = "${diff_ids[$at]}" ] || die "diff ID of ${layers[$at]}"
  files+=("$file")
done
for file in "${files[@]}"; do tar --list --verbose --numeric-owner --file "$file"; done > "$work/owners"
awk '$6 ~ /(lists|archives)\/partial\/?$|etc\/shadow$|var\/mail\/?$|usr\/bin\/chage$/ { sub(/^\.\//, "", $6); owner[$6] = $1 "  " $2 }
  END { for (path in owner) print "    " owner[path] "  " path }' "$work/owners" | sort -k3
grep -Eq ' 42/0 .* (\./)?var/lib/apt/lists/partial/?$' "$work/owners" || die "ownership is lost: no files of user 42 (_apt)"
echo "    manifest, config and ${#layers[@]} layers are what their digests say"

say "Starting its command in namespaces of its own, and asking it for its page"
chmod -R a+rX "$work/layout"
mapfile -t command < <(jq -r '.config.Cmd[]' "$(blob "$config")")
mkdir "$work/run"
[ "$(id -u)" != 0 ] || chown "$user" "$work/run"
(as_user "${common[@]}" sh "$work/bin/run-image.sh" "$work/run/root" http://127.0.0.1/ "${files[@]}" -- "${command[@]}") \
  > "$work/page.html" 2> "$work/apache.log" || { cat "$work/apache.log" >&2; die "Apache did not answer"; }
served=$(grep -m1 -o '<title>.*</title>' "$work/page.html" || grep -m1 -o '<title>.*' "$work/page.html") \
  || die "Apache's page has no title"
echo "    $served"

say "What the builder adds to the steps: first build, empty store, from pull to push"
# The same Dockerfile, whose steps also say how long they took, so that both builders are measured
# with the same clock: what is not inside a step is the builder's.
measured=$work/measured
mkdir "$measured"
sed 's/^RUN \(.*\)$/RUN t=$(date +%s%N); \1 \&\& echo "step-took=$((($(date +%s%N) - t) \/ 1000000))"/' \
  "$tree/Dockerfile" > "$measured/Dockerfile"
chmod -R a+rX "$measured"

# peak EXECUTABLE: the largest high-water mark of memory, in KiB, among the processes of a program.
# The builder's own processes, that is, not those that the steps run. Buildah goes on as a copy of
# itself in memory once it is in its user namespace.
peak() {
  local process
  for process in /proc/[0-9]*; do
    case $(readlink "$process/exe" 2>/dev/null) in
      "$1"|/memfd:*) [ "$(stat -c %U "$process" 2>/dev/null)" = "$user" ] || continue ;;
      *) continue ;;
    esac
    awk '/^VmHWM/ { print $2 }' "$process/status" 2>/dev/null || true
  done | sort -n | tail -n1
}

# measure NAME EXECUTABLE COMMAND…: prints a line of the table.
measure() {
  local name=$1 executable=$2 log=$work/measure-$1.log most=0 start end steps now pid
  shift 2
  start=$(date +%s%N)
  (as_user "${common[@]}" "$@") > "$log" 2>&1 &
  pid=$!
  while kill -0 $pid 2>/dev/null; do
    now=$(peak "$executable")
    [ "${now:-0}" -le "$most" ] || most=$now
    sleep 0.1
  done
  wait $pid || { tail -n 30 "$log" >&2; return 1; }
  end=$(date +%s%N)
  # In whatever form a builder shows a step's output, the word is in there once a step.
  steps=$(grep -o 'step-took=[0-9][0-9]*' "$log" | cut -d= -f2 | sort -un | awk '{ sum += $1 } END { print sum + 0 }')
  [ "$steps" -gt 0 ] || { tail -n 30 "$log" >&2; return 1; }
  awk -v name="$name" -v total="$(((end - start) / 1000000))" -v steps="$steps" -v peak="$most" 'BEGIN {
    printf "    %-28s %8.2f s %8.2f s %8.2f s %8.0f MiB\n", name, total / 1000, steps / 1000, (total - steps) / 1000, peak / 1024 }'
}
# A copy, which must not be confused with the running service.
cp "$work/bin/sockless" "$work/bin/sockless-measured"
printf '    %-28s %10s %10s %10s %12s\n' builder whole steps added 'peak memory'
measure sockless "$work/bin/sockless-measured" SOCKLESS_ROOT="$work/store-measured" "$work/bin/sockless-measured" build \
  --progress rawjson --push "${mirror[@]}" --registry-ca "$work/certs/ca.crt" -t "$private/measured:sockless" "$measured"
jq -Rr 'fromjson? | select(.event == "finished") | .timings_ms | to_entries[] | "\(.key) \(.value)"' \
  < "$work/measure-sockless.log" | awk '{ printf "        of it, %-18s %7.2f s\n", $1, $2 / 1000 }'
if command -v buildah >/dev/null; then
  base=docker.io/library/ubuntu
  [ ${#mirror[@]} = 0 ] || base=$hub/library/ubuntu
  mkdir "$work/measured-buildah" "$work/buildah"
  sed "s#^FROM ubuntu#FROM $base#" "$measured/Dockerfile" > "$work/measured-buildah/Dockerfile"
  chmod -R a+rX "$work/measured-buildah"
  cp "$(command -v buildah)" "$work/bin/buildah"
  [ "$(id -u)" != 0 ] || chown "$user" "$work/buildah"
  for driver in overlay vfs; do
    options="--root $work/buildah/$driver --runroot $work/buildah/$driver-run --storage-driver $driver"
    measure "buildah-$driver" "$work/bin/buildah" XDG_RUNTIME_DIR="$work/buildah" sh -euc "
      $work/bin/buildah $options bud --isolation chroot --tls-verify=false --layers -t measured $work/measured-buildah
      $work/bin/buildah $options push --cert-dir $work/cert-dir --creds '$login' measured docker://$private/measured:buildah
    " 2> "$work/buildah.err" && break
    echo "    buildah-$driver does not work here: $(grep . "$work/buildah.err" | tail -n1)"
  done
else
  echo "    (buildah is not installed, so there is nothing beside it)"
fi

say "Done"
echo "    page     $page/"
echo "    image    $image"
echo "    digest   $digest"
echo "    Apache   $served"
if [ -t 0 ] || [ "${DEMO_KEEP:-}" = 1 ]; then
  echo
  echo "The page stays up until Ctrl-C."
  wait $serve_pid
fi
