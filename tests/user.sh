# Sourced by scripts that may run as root: an ordinary user for what must not.
#
# as_user COMMAND… runs a command as that user, without root's environment, and replaces the
# (sub)shell that it is called in by a background `&`, so that $! is the command itself.
# As an ordinary user it is that user who runs everything.

user=$(id -un)
user_home=$HOME
if [ "$(id -u)" = 0 ]; then
  user=sockless-test
  user_home=/var/lib/sockless-test
  if ! id "$user" >/dev/null 2>&1; then
    echo "You are root: making the ordinary user $user, who runs what root need not."
    useradd --create-home --home-dir "$user_home" --shell /bin/sh "$user"
  fi
  for kind in uid gid; do
    grep -q "^$user:" "/etc/sub$kind" 2>/dev/null && continue
    # Behind all ranges that are taken.
    first=$(awk -F: '{ end = $2 + $3; if (end > first) first = end } END { print first < 100000 ? 100000 : first }' \
      "/etc/sub$kind" 2>/dev/null || echo 100000)
    usermod "--add-sub${kind}s" "$first-$((first + 65535))" "$user"
  done
fi

as_user() {
  if [ "$(id -u)" = 0 ]; then
    exec setpriv --reuid="$user" --regid="$(id -g "$user")" --init-groups --reset-env -- \
      env HOME="$user_home" PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin "$@"
  fi
  exec env "$@"
}
