#!/usr/bin/env bash
# Everything that a change must pass. As root the tests run twice: as an ordinary user, whom it
# makes for that, and as root.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${HOME:-}" ] && [ -r "$HOME/.cargo/env" ] && ! command -v cargo >/dev/null && . "$HOME/.cargo/env"
command -v cargo >/dev/null || { echo "Rust is missing: see https://rustup.rs" >&2; exit 1; }

sh tests/setup.sh docker-compose
. tests/user.sh

step() { printf '\n== %s\n' "$*"; "$@"; }
step cargo fmt --check
step cargo clippy --locked --all-targets -- -D warnings
RUSTDOCFLAGS='-D warnings' step cargo doc --locked --no-deps --document-private-items
step cargo test --locked --no-run

status=0
if [ "$(id -u)" = 0 ]; then
  here=$PWD
  target=$(cargo metadata --locked --no-deps --format-version 1 | jq -r .target_directory)
  mapfile -t binaries < <(cargo test --locked --no-run --message-format=json 2>/dev/null \
    | jq -r 'select(.reason == "compiler-artifact" and .profile.test and .executable) | .executable')
  [ ${#binaries[@]} -gt 0 ] || { echo "no test binaries" >&2; exit 1; }
  # Both users keep base images here, so that they are made once.
  mkdir -p "$target/fixtures"
  chown -R "$user" "$target/fixtures"
  scratch=$(mktemp -d /var/tmp/sockless-test.XXXXXX)
  trap 'rm -rf --one-file-system -- "$scratch"' EXIT
  chown "$user" "$scratch"

  # Where the repository lies below a directory that is closed to others, such as /root, it is shown
  # at its place all the same, in a mount namespace of these tests' own: paths are compiled in.
  as_ordinary_user() {
    unshare --mount --propagation private bash -euo pipefail -c '
      . tests/user.sh
      reachable() { ( as_user test -x "$1" ); }
      hidden=()
      for path in "$1" "$2"; do
        reachable "$path" || hidden+=("$path")
      done
      # All are held before the first is covered, for one cover may hide another of them.
      for at in "${!hidden[@]}"; do
        mkdir -p "$3/held-$at"
        mount --bind "${hidden[$at]}" "$3/held-$at"
      done
      for at in "${!hidden[@]}"; do
        path=${hidden[$at]} closed=/
        if [ -e "$path" ]; then
          for part in ${path//\// }; do
            closed=${closed%/}/$part
            reachable "$closed" || break
          done
          mount -t tmpfs -o mode=755 tmpfs "$closed"
        fi
        mkdir -p "$path"
        mount --bind "$3/held-$at" "$path"
        reachable "$path" || { echo "$path itself is closed to $user; chmod o+rx it" >&2; exit 1; }
      done
      # Closed to users only where no udev ran, as in many containers; elsewhere everybody may open it.
      if [ -c /dev/net/tun ] && ! ( as_user test -w /dev/net/tun ); then
        [ -c "$3/tun" ] || mknod -m 666 "$3/tun" c 10 200
        mount --bind "$3/tun" /dev/net/tun
      fi
      cd "$1"
      as_user TMPDIR="$3" SOCKLESS_TEST_CACHE="$2/fixtures" CARGO_MANIFEST_DIR="$1" RUST_BACKTRACE="$4" \
        SOCKLESS_TEST_REQUIRE_ALL="$5" SOCKLESS_TEST_ROOT_FOLLOWS=1 "${@:6}"
    ' bash "$here" "$target" "$scratch" "${RUST_BACKTRACE:-1}" "${SOCKLESS_TEST_REQUIRE_ALL:-0}" "$@"
  }
  for binary in "${binaries[@]}"; do
    printf '\n== as %s: %s\n' "$user" "$(basename "$binary")"
    as_ordinary_user "$binary" || status=1
  done
  export SOCKLESS_TEST_CACHE=$target/fixtures
fi

printf '\n== as %s: cargo test\n' "$(id -un)"
if [ "$(id -u)" = 0 ]; then
  # Root's run has cases as other users too, and for these the same device has to be open.
  unshare --mount --propagation private bash -euo pipefail -c '
    if [ -c /dev/net/tun ]; then
      [ -c "$1/tun" ] || mknod -m 666 "$1/tun" c 10 200
      mount --bind "$1/tun" /dev/net/tun
    fi
    exec cargo test --locked --no-fail-fast
  ' bash "$scratch" || status=1
else
  cargo test --locked --no-fail-fast || status=1
fi
exit $status
