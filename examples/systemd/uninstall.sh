#!/bin/sh
# Remove Ollama Smart Proxy. Settings and what agents keep stay, unless you say --purge.
#
#   sudo sh examples/systemd/uninstall.sh [--purge]
#
# DESTDIR=/a/folder   where install.sh laid the files; neither users nor services are touched
set -eu

to=${DESTDIR:-}
units=$to/etc/systemd/system
program=$to/opt/osp
kept="$to/etc/osp $to/var/lib/osp $units/osp.service.d $units/osp.socket.d"
purge=no

say() { printf '== %s\n' "$*"; }

fail() {
    printf 'uninstall.sh: %s\n' "$*" >&2
    exit "${status:-1}"
}

case "$#:${1:-}" in
0:) ;;
1:--purge) purge=yes ;;
*) status=2 fail "$* is wrong here; it takes nothing, or --purge" ;;
esac
[ -n "$to" ] || [ "$(id -u)" = 0 ] || fail "only root can do this; type: sudo sh $0"

echo "This stops Ollama Smart Proxy and removes osp.service, osp.socket and $program"
if [ "$purge" = yes ]; then
    echo "and, because you said --purge, the user osp and $kept"
else
    echo "It keeps the user osp and $kept; --purge removes them, too."
fi

if [ -z "$to" ] && [ -e "$units/osp.service" ]; then
    say "stop it, and start it no more"
    systemctl disable --quiet --now osp.socket osp.service
fi
say "remove osp.service, osp.socket and the program"
rm -f "$units/osp.service" "$units/osp.socket"
rm -rf "$program"
[ -n "$to" ] || systemctl daemon-reload

[ "$purge" = yes ] || exit 0
say "remove settings and what agents keep"
rm -rf "$to/etc/osp" "$to/var/lib/osp" "$units/osp.service.d" "$units/osp.socket.d"
if [ -z "$to" ] && id -u osp >/dev/null 2>&1; then
    say "remove the user osp"
    userdel osp
fi
