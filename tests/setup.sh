#!/bin/sh
# Installs the Debian packages that the tests and the demonstration need, and says so beforehand.
#
#   tests/setup.sh [PACKAGE]...        these beside the usual ones
#
# Asks for root (sudo) only for that, and only if something is missing.
set -eu

# A C compiler for the C parts of some crates, then what runs steps, what serves and checks images,
# and what makes the base image.
packages="gcc libc6-dev make ca-certificates curl openssl jq time procps
  bubblewrap runc crun uidmap passt
  docker-registry skopeo apache2-utils git
  debootstrap busybox-static openssh-client $*"

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup: this is no Debian; what is needed are the programs of the packages" $packages >&2
  exit 0
fi

missing=
for package in $packages; do
  case $(dpkg-query --show --showformat='${db:Status-Abbrev}' "$package" 2>/dev/null) in
    ii*) ;;
    *) missing="$missing $package" ;;
  esac
done
[ -n "$missing" ] || exit 0

echo "These Debian packages are missing and will be installed:$missing"
install='set -e
export DEBIAN_FRONTEND=noninteractive
# docker-registry would start a service on port 5000; nobody here wants it.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap "rm -f $policy" EXIT
  printf "#!/bin/sh\nexit 101\n" > $policy
  chmod 755 $policy
fi
apt-get update -q
apt-get install -q -y --no-install-recommends "$@"'
# shellcheck disable=SC2086
if [ "$(id -u)" = 0 ]; then
  sh -c "$install" sh $missing
elif command -v sudo >/dev/null; then
  echo "Installing them needs root, so sudo may ask for your password. Nothing else here runs as root."
  sudo sh -c "$install" sh $missing
else
  echo "setup: they can be installed only as root, and there is no sudo. As root, run:" >&2
  echo "  apt-get update && apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
