# Sourced by bench.sh: how each builder is asked for a build and a push, and how it forgets everything.
#
# build_NAME CONTEXT IMAGE [OPTION]…   prints nothing; is run by `timed`. Options: push (default), nopush,
#                                      cache-to=REF, cache-from=REF.
# reset_NAME                           empties its store.

installed_builders() {
  local list="sockless-user sockless-root" name
  for name in buildah podman; do
    if command -v $name >/dev/null; then list="$list $name"; fi
  done
  if command -v dockerd >/dev/null && [ -n "$(docker_client)" ]; then list="$list docker"; fi
  echo "$list"
}

# A client that builds with BuildKit: newer ones need a plugin for it, which may be missing.
docker_client() {
  local client
  while read -r client; do
    if DOCKER_BUILDKIT=1 "$client" build --help >/dev/null 2>&1 </dev/null; then echo "$client"; break; fi
  done < <(hash -r; type -aP docker || true)
}

# command_for BUILDER CONTEXT IMAGE OPTION…: sets `command` to what builds and pushes.
command_for() {
  local builder=$1 context=$2 image=$registry/$3 option push=1 to= from=
  shift 3
  for option in "$@"; do
    case $option in
      nopush) push= ;;
      cache-to=*) to=${option#*=} ;;
      cache-from=*) from=${option#*=} ;;
    esac
  done
  local script
  case $builder in
    sockless-*)
      command=(as_user_or_root "$builder" SOCKLESS_ROOT="$work/store-$builder" "$work/sockless" build --progress plain
        --registry-ca "$work/ca/ca.crt" ${push:+--push} -t "$image"
        ${to:+--cache-to "type=registry,ref=$registry/$to,mode=max"}
        ${from:+--cache-from "type=registry,ref=$registry/$from"} "$context")
      ;;
    buildah | podman)
      local verb=build
      [ "$builder" = podman ] || verb=bud
      script="set -e; mount --make-rprivate /
        b() { $builder --root $work/store-$builder --runroot $work/store-$builder/run --storage-driver overlay \"\$@\"; }
        b $verb --isolation ${bench_isolation:-chroot} --cert-dir $work/ca --layers --quiet \
          ${to:+--cache-to $registry/$to} ${from:+--cache-from $registry/$from} -t $image $context"
      [ -z "$push" ] || script="$script; b push --quiet --cert-dir $work/ca $image"
      command=(unshare --mount sh -c "$script")
      ;;
    docker)
      local client
      client=$(docker_client)
      script="set -e; export DOCKER_BUILDKIT=1 DOCKER_HOST=unix://$work/docker/socket DOCKER_CONFIG=$work/docker
        $client build -q --network host ${to:+--build-arg BUILDKIT_INLINE_CACHE=1} ${from:+--cache-from $registry/$from} -t $image $context"
      [ -z "$push" ] || script="$script; $client push -q $image"
      [ -z "$to" ] || script="$script; $client tag $image $registry/$to; $client push -q $registry/$to"
      command=(sh -c "$script")
      ;;
    *) die "unknown builder $builder" ;;
  esac
}

# timed runs programs, no functions: this one is a program's beginning.
as_user_or_root() { die "not for running"; }

# resolved: `command` without shell functions in it.
resolve_command() {
  [ "${command[0]}" = as_user_or_root ] || return 0
  local who=${command[1]}
  command=("${command[@]:2}")
  case $who in
    sockless-user)
      command=(setpriv --reuid="$user" --regid="$(id -g "$user")" --init-groups --reset-env --
        env HOME="$user_home" PATH=/usr/bin:/bin:/usr/sbin:/sbin TMPDIR="$work/tmp-user" "${command[@]}")
      ;;
    *) command=(env "${command[@]}") ;;
  esac
}

# discard PATH…: puts it where nobody finds it. Nothing is removed while something is measured: for
# a minute and more, ext4 looks at every inode that was freed before it makes a file near them, so
# that each builder would pay for the files of the one before.
discards=0
discard() {
  local path
  for path; do
    if [ -e "$path" ]; then
      mkdir -p "$work/discarded"
      discards=$((discards + 1))
      mv -- "$path" "$work/discarded/$discards"
    fi
  done
}

# Removes what was discarded, and has the file system forget it. The base is read once, so that it is as
# warm for the first builder as for the last.
remove_discarded() {
  [ -e "$work/discarded" ] || return 0
  rm -rf --one-file-system -- "$work/discarded"
  sync
  echo 3 > /proc/sys/vm/drop_caches
  skopeo --insecure-policy copy --quiet --src-cert-dir "$work/ca" "docker://$registry/$debian" "dir:$work/warm"
  rm -rf "$work/warm"
}

reset_builder() {
  case $1 in
    sockless-user)
      discard "$work/store-$1"
      install -d -o "$user" "$work/store-$1" "$work/tmp-user"
      ;;
    docker) start_docker ;;
    # Where the mount namespace of buildah and podman ended, nothing of it is mounted any more.
    *) discard "$work/store-$1" ;;
  esac
}

reset_all() {
  local builder
  stop_docker
  for builder in $builders; do
    [ "$builder" = docker ] || reset_builder "$builder"
  done
}

docker_pid=
# An empty daemon. It runs before the measurement starts: its best case.
start_docker() {
  stop_docker
  mkdir -p "$work/docker"
  SSL_CERT_FILE=$work/ca/ca.crt unshare --mount --propagation private dockerd --data-root "$work/docker/data" --exec-root "$work/docker/run" \
    --host "unix://$work/docker/socket" --pidfile "$work/docker/pid" --bridge none --iptables=false --ip-forward=false \
    > "$work/docker/log" 2>&1 &
  docker_pid=$!
  local tries=200
  until DOCKER_HOST=unix://$work/docker/socket docker info >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { tail "$work/docker/log" >&2; die "dockerd did not come up"; }
    sleep 0.1
  done
}

stop_docker() {
  [ -n "$docker_pid" ] || return 0
  kill "$docker_pid" 2>/dev/null || true
  wait "$docker_pid" 2>/dev/null || true
  docker_pid=
  discard "$work/docker"
}

# The daemon's high-water mark of memory in KiB, from its start.
docker_peak() { awk '/^VmHWM/ { print $2 }' "/proc/$(cat "$work/docker/pid")/status"; }
