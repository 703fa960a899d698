#!/bin/sh
# Install Ollama Smart Proxy as a service of systemd. Run it again to update: settings and what
# agents keep stay as they are.
#
#   sudo sh examples/systemd/install.sh
#
# PYTHON=python3.13   the Python to use (python3)
# EXTRAS=agents,mcp   what agents need; mcp is for the agent of that name (agents)
# DESTDIR=/a/folder   lay all files below this folder, and touch neither users nor services
set -eu
umask 022
export PIP_DISABLE_PIP_VERSION_CHECK=1

python=${PYTHON:-python3}
extras=${EXTRAS:-agents}
to=${DESTDIR:-}
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$here/../.." && pwd)
opt=$to/opt/osp
etc=$to/etc/osp
units=$to/etc/systemd/system

say() { printf '== %s\n' "$*"; }

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

if [ -z "$to" ]; then
    [ "$(id -u)" = 0 ] || fail "only root can do this; type: sudo sh $0"
    [ -d /run/systemd/system ] || fail "systemd does not run here, so it cannot start a service"
fi
"$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python must be Python 3.11 or newer, with venv; on Debian: sudo apt install python3-venv"
base=$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
case "$to:$base" in
:/home/* | :/root/*) fail "$base is in a home, which the service cannot see; use PYTHON=/usr/bin/python3" ;;
esac

cat <<END
This installs Ollama Smart Proxy, or updates it, from $source:
  $opt               the program and its packages: written anew
  $etc/osp.toml      its settings: kept if they are there
  $to/var/lib/osp           what agents keep: not touched
  $units    osp.service and osp.socket: written anew
and, unless DESTDIR is set, makes the user osp and starts the service, now and at each boot.
END

if [ -z "$to" ] && ! id -u osp >/dev/null 2>&1; then
    say "make the user osp, who cannot log in"
    useradd --system --user-group --home-dir /var/lib/osp --no-create-home \
        --shell /usr/sbin/nologin osp
fi

say "copy the program to $opt/new"
rm -rf "$opt/new"
mkdir -p "$opt/new"
tar -C "$source" -cf - --exclude='./.*' --exclude='.*_cache' \
    --exclude=__pycache__ --exclude='*.egg-info' --exclude=./build --exclude=./data \
    --exclude=./osp.toml --exclude=./tests --exclude=./bench --exclude=./docs . |
    tar -C "$opt/new" --no-same-owner -xf -

# An older Python may be gone after an update of the system.
if [ "$("$opt/venv/bin/python" -V 2>&1)" != "$("$python" -V)" ]; then
    say "make an environment for $("$python" -V) in $opt/venv"
    "$python" -m venv --clear "$opt/venv"
fi
say "install the packages that it needs ($extras); on a small machine this takes minutes"
"$opt/venv/bin/python" -m pip install --quiet "$opt/new[$extras]"
rm -rf "$opt/new/build" "$opt/new/"*.egg-info

say "put the program into its place, $opt/app"
"$opt/venv/bin/python" "$opt/new/osp.py" --version >/dev/null
rm -rf "$opt/old"
[ ! -e "$opt/app" ] || mv "$opt/app" "$opt/old"
mv "$opt/new" "$opt/app"
rm -rf "$opt/old"
"$opt/venv/bin/python" -m compileall -q "$opt/app"

mkdir -p "$etc" "$units"
if [ ! -e "$etc/osp.toml" ]; then
    say "write $etc/osp.toml, in which nothing is set yet; it may hold keys: only osp reads it"
    (umask 027 && cp "$opt/app/osp.example.toml" "$etc/osp.toml")
    chmod 640 "$etc/osp.toml"
    [ -n "$to" ] || chgrp osp "$etc/osp.toml"
fi

say "write osp.service and osp.socket"
cp "$here/osp.service" "$here/osp.socket" "$units/"
[ -z "$to" ] || exit 0

say "start it, now and at each boot"
systemctl daemon-reload
systemctl enable --quiet osp.socket osp.service
systemctl reset-failed osp.socket osp.service 2>/dev/null || true
systemctl start osp.socket
systemctl restart osp.service || fail "it does not start; journalctl -u osp -n 20 says why"
say "it serves: $(systemctl show --property=Listen --value osp.socket)"
