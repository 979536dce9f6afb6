#!/usr/bin/env bash
# The program beside BuildKit: a row for each case of fixtures/conformance, then how many passed.
#
#   tests/conformance.sh [BEGINNING]...      only the cases whose names begin so
#
# SOCKLESS_ROOTFS=copy runs the steps on copies instead of overlay mounts.
#
# Runs as whoever starts it, with and without root. The exit status says whether all passed; what a
# row has no room for is in target/conformance.log.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${HOME:-}" ] && [ -r "$HOME/.cargo/env" ] && ! command -v cargo >/dev/null && . "$HOME/.cargo/env"
command -v cargo >/dev/null || { echo "Rust is missing: see https://rustup.rs" >&2; exit 1; }

sh tests/setup.sh
cargo test --locked --quiet --no-run --test it
mkdir -p target
log=target/conformance.log

# The rows stand behind "| ": the test harness prints lines of its own.
set +e
SOCKLESS_CONFORMANCE_TABLE=1 SOCKLESS_CONFORMANCE_CASES="$*" \
  cargo test --locked --quiet --test it -- --exact --nocapture \
  conformance::sandbox_every_case_gives_what_buildkit_gives 2>&1 </dev/null \
  | tee "$log" | sed --unbuffered --quiet 's/^| //p'
status=${PIPESTATUS[0]}
set -e
if ! grep -q '^| [0-9]* passed, ' "$log"; then
  cat "$log" >&2
  echo "conformance: no case was judged" >&2
  exit 1
fi
exit "$status"
