#!/bin/sh
# Makes the certificates and the password file of the local registry.
#
#   certs/make.sh [--out DIR] [--san NAME-OR-ADDRESS]... [--user NAME] [--password WORD]
#
# In DIR (default: the directory of this script) it leaves
#
#   ca.crt  ca.key               an authority of this machine's own
#   registry.crt  registry.key   the registry's certificate, signed by it
#   htpasswd  htpasswd.txt       the registry's one user (bcrypt), and NAME:WORD in clear
#
# What is there and still fits stays as it is, so the script may run before every use. Keys and the
# clear password are for the owner only (mode 0600). Nothing made here belongs in version control.
# Needs openssl, and htpasswd (Debian: apache2-utils) or python3 with bcrypt.
set -eu
umask 077

out=$(cd "$(dirname "$0")" && pwd)
user=sockless
password=
names="localhost 127.0.0.1 ::1 registry"
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out needs a directory}; shift 2 ;;
    --san) names="$names ${2:?--san needs a name or an address}"; shift 2 ;;
    --user) user=${2:?--user needs a name}; shift 2 ;;
    --password) password=${2:?--password needs a word}; shift 2 ;;
    *) echo "certs/make.sh: unknown argument '$1'" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
cd "$out"

die() { echo "certs/make.sh: $*" >&2; exit 1; }
command -v openssl >/dev/null || die "openssl is not installed"
# Quiet unless it fails: openssl talks on stderr about everything it does.
quietly() { "$@" 2>openssl.log || { cat openssl.log >&2; rm -f openssl.log; die "failed: $*"; }; rm -f openssl.log; }

# Whether $1 is valid for a day more and, where $2 is given, signed by it.
good() {
  [ -s "$1" ] && openssl x509 -in "$1" -noout -checkend 86400 >/dev/null 2>&1 || return 1
  [ -z "${2:-}" ] || openssl verify -CAfile "$2" "$1" >/dev/null 2>&1
}

if ! { [ -s ca.key ] && good ca.crt; }; then
  quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -days 825 \
    -keyout ca.key -out ca.crt -subj '/CN=sockless local registry authority' \
    -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign
  echo "made $out/ca.crt" >&2
fi

# ADDRESS or NAME, as subjectAltName spells them, sorted so that the order of arguments does not matter.
san=$(for n in $names; do
  case $n in
    *:*|*[0-9].[0-9]*.[0-9]*.[0-9]*) echo "IP:$n" ;;
    *) echo "DNS:$n" ;;
  esac
done | LC_ALL=C sort -u | paste -sd, -)

if ! { [ -s registry.key ] && good registry.crt ca.crt && [ "$(cat registry.san.crt 2>/dev/null)" = "$san" ]; }; then
  ext=$(mktemp)
  trap 'rm -f "$ext" registry.csr.key' EXIT
  printf '%s\n' 'basicConstraints=critical,CA:FALSE' 'keyUsage=critical,digitalSignature' \
    'extendedKeyUsage=serverAuth' "subjectAltName=$san" > "$ext"
  quietly openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 \
    -keyout registry.key -out registry.csr.key -subj '/CN=registry'
  quietly openssl x509 -req -in registry.csr.key -CA ca.crt -CAkey ca.key -sha256 -days 397 \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$ext" -out registry.crt
  printf '%s\n' "$san" > registry.san.crt
  echo "made $out/registry.crt for $san" >&2
fi
chmod 0644 ca.crt registry.crt

if [ -n "$password" ] && [ "$(cat htpasswd.txt 2>/dev/null)" != "$user:$password" ]; then rm -f htpasswd; fi
if ! { [ -s htpasswd ] && [ -s htpasswd.txt ]; }; then
  [ -n "$password" ] || password=$(openssl rand -hex 16)
  # The registry takes bcrypt only, which openssl passwd cannot make.
  if command -v htpasswd >/dev/null; then
    printf '%s\n' "$password" | htpasswd -iBn "$user" | sed '/^$/d' > htpasswd.new
  elif python3 -c 'import bcrypt' 2>/dev/null; then
    printf '%s' "$password" | python3 -c 'import bcrypt, sys
print(sys.argv[1] + ":" + bcrypt.hashpw(sys.stdin.buffer.read(), bcrypt.gensalt(10)).decode())' "$user" > htpasswd.new
  else
    die "no program makes bcrypt hashes: install apache2-utils (htpasswd) or python3-bcrypt"
  fi
  [ -s htpasswd.new ] || die "could not hash the password"
  mv htpasswd.new htpasswd
  printf '%s\n' "$user:$password" > htpasswd.txt
  echo "made $out/htpasswd for user $user; the password is in $out/htpasswd.txt" >&2
fi
chmod 0600 ca.key registry.key htpasswd htpasswd.txt
