#!/bin/sh
# Runs an image's command in namespaces of its own and fetches a page from it, with nothing but
# util-linux, GNU tar and busybox: no container engine, and no code of the program that built the image.
#
#   tests/run-image.sh DIRECTORY URL LAYER... -- COMMAND [ARGUMENT]...
#
# DIRECTORY is new; the layers (lowest first) are unpacked into it and it is left behind. The command
# runs with it as root, in user, mount, PID and network namespaces that end with this script. Once URL
# (of the command's own loopback) answers, the page goes to standard output. What the command prints
# goes to standard error.
set -eu
PATH=$PATH:/usr/sbin:/sbin
if [ "${SOCKLESS_RUN_INSIDE:-}" != 1 ]; then
  ids=
  [ "$(id -u)" = 0 ] || ids="--user --map-auto --map-root-user"
  # shellcheck disable=SC2086
  SOCKLESS_RUN_INSIDE=1 exec unshare $ids --mount --propagation private --net --uts --ipc --pid --fork \
    --kill-child sh -eu "$0" "$@"
fi

root=$1 url=$2
shift 2
mkdir "$root"
while [ "$1" != -- ]; do
  layer=$1
  shift
  # Whiteouts first: they hide what lower layers have, never what their own layer brings.
  tar --list --file "$layer" | grep -E '(^|/)\.wh\.' | while IFS= read -r entry; do
    dir=$(dirname "$entry") name=$(basename "$entry")
    if [ "$name" = .wh..wh..opq ]; then
      find "$root/$dir" -mindepth 1 -delete
    else
      rm -rf -- "$root/$dir/${name#.wh.}"
    fi
  done
  # A directory of the layer replaces what it finds there unless that is a directory too; device
  # nodes are left out because a user namespace cannot make any.
  tar --extract --file "$layer" --directory "$root" --numeric-owner --preserve-permissions \
    --exclude='*.wh.*' --exclude='dev/*' --exclude='./dev/*'
done
shift

mkdir -p "$root/proc" "$root/dev" "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
busybox ip link set lo up 2>/dev/null || ip link set lo up
hostname localhost
env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
  chroot "$root" "$@" >&2 </dev/null &
command=$!
tries=0
until page=$(busybox wget -q -O - "$url" 2>/dev/null); do
  tries=$((tries + 1))
  if [ $tries -gt 300 ]; then
    echo "run-image.sh: $url did not answer within 30 seconds" >&2
    exit 1
  fi
  if ! kill -0 $command 2>/dev/null; then
    echo "run-image.sh: the command ended before $url answered" >&2
    exit 1
  fi
  sleep 0.1
done
printf '%s\n' "$page"
# This shell is the first process of its PID namespace: the kernel ends all others with it.
