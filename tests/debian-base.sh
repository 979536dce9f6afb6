#!/bin/sh
# Makes the tar of a small Debian root filesystem, as debootstrap leaves it.
#
#   tests/debian-base.sh FILE.tar [SUITE [MIRROR]]
#
# As root, or as an ordinary user with subordinate IDs; the files and their owners come out the same.
# Needs debootstrap, a mirror that can be reached, and util-linux 2.38 for the ordinary user.
set -eu
out=${1:?usage: debian-base.sh FILE.tar [SUITE [MIRROR]]}
suite=${2:-bookworm}
mirror=${3:-http://deb.debian.org/debian}
case $out in /*) ;; *) out=$PWD/$out ;; esac
PATH=$PATH:/usr/sbin:/sbin

if [ "${SOCKLESS_BASE_INSIDE:-}" != 1 ]; then
  ids=
  [ "$(id -u)" = 0 ] || ids="--user --map-auto --map-root-user"
  work=$(mktemp -d "$(dirname "$out")/debian-base.XXXXXX")
  # The mounts below are made in a mount namespace of this script's own and end with it.
  # shellcheck disable=SC2086
  SOCKLESS_BASE_INSIDE=1 WORK=$work unshare $ids --mount --propagation private --pid --fork --kill-child \
    --mount-proc sh -eu "$0" "$out" "$suite" "$mirror" && code=0 || code=$?
  # What is left belongs to subordinate IDs. The namespace is gone and its mounts with it.
  # shellcheck disable=SC2086
  unshare $ids --mount rm -rf --one-file-system -- "$work"
  exit "$code"
fi

root=$WORK/root
mkdir "$root" "$root/dev" "$root/dev/pts" "$root/dev/shm"
chmod 755 "$root"
# A user may not make device nodes, also not in a namespace. debootstrap leaves alone what is there,
# and believes in it where it is told that this is a container.
for device in null zero full random urandom tty ptmx console; do
  [ -e "/dev/$device" ] || continue
  : > "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
container=lxc LC_ALL=C DEBIAN_FRONTEND=noninteractive \
  debootstrap --variant=minbase "$suite" "$root" "$mirror" > "$WORK/log" 2>&1 \
  || { tail -n 20 "$WORK/log" >&2; echo "debian-base.sh: debootstrap failed" >&2; exit 1; }

# As published base images are: no package files, no package lists, no traces of this run.
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*_* \
  "$root"/var/log/bootstrap.log "$root"/var/log/*.log
: > "$root/etc/resolv.conf"
: > "$root/etc/hostname"
printf 'force-unsafe-io\n' > "$root/etc/dpkg/dpkg.cfg.d/image"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
tar --create --file "$out.new" --directory "$root" --numeric-owner --sort=name --one-file-system \
  --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' .
mv "$out.new" "$out"
