#!/bin/bash
# Installs what demo and tests take: programs as Debian or Ubuntu packages, kernels for guests into a directory of their own,
# target/guests or $VSOCK_GUESTS. The argument says for what: demo, guests (tests with real guests), tests (all tests) or bench.
# Says what it will install before it does. Where nothing is missing it is quick, silent and takes no apt-get.
set -eu

scripts=$(cd "$(dirname "$0")" && pwd)
guests=${VSOCK_GUESTS:-$(dirname "$scripts")/target/guests}

# shellcheck source=packages.sh
. "$scripts/packages.sh"
# shellcheck source=kernels.sh
. "$scripts/kernels.sh"

for_demo=(qemu-system-x86_64:qemu-system-x86 ncat:ncat busybox:busybox-static)
for_guests=("${for_demo[@]}" linux.uml:user-mode-linux socat:socat nc.openbsd:netcat-openbsd /usr/bin/python3:python3 insmod:kmod
    ssh:openssh-client iperf3:iperf3 curl:curl dbus-daemon:dbus-daemon /usr/share/dbus-1/session.conf:dbus-session-bus-common
    busctl:systemd)
for_tests=("${for_guests[@]}" dpkg-shlibdeps:dpkg-dev fish:fish lintian:lintian man:man-db mandoc:mandoc ps:procps zsh:zsh)
for_bench=("${for_guests[@]}" perf:linux-perf)

# The sshd of the guests is not installed: a machine would listen to the network from then on. Its package is unpacked, and
# tests/guest/uml-init.sh puts it in its place.
lacks_sshd() {
    [ ! -e /usr/sbin/sshd ] && [ ! -e "$guests/sshd" ]
}

announce_sshd() {
    echo "to unpack into $guests, not install: openssh-server"
}

unpack_sshd() {
    local package unpacked=$work/sshd
    rm -rf "$unpacked"
    mkdir "$unpacked"
    ask_apt -s install --no-install-recommends openssh-server >"$work/plan" || return 1
    # With the libraries that this machine does not have.
    for package in $(sed -n 's/^Inst \(openssh-[^ ]*\|lib[^ ]*\) .*/\1/p' "$work/plan"); do
        unpack "$package" "$unpacked" || return 1
    done
    # Where /lib leads.
    [ ! -d "$unpacked/lib" ] || cp -a "$unpacked/lib/." "$unpacked/usr/lib"
    mv "$unpacked" "$guests/sshd"
}

case ${1:-} in
demo) needs=("${for_demo[@]}") wanted_kernels=(demo:) ;;
guests) needs=("${for_guests[@]}") wanted_kernels=(6.1:6.1. 6.12:6.12.) ;;
tests) needs=("${for_tests[@]}") wanted_kernels=(6.1:6.1. 6.12:6.12.) ;;
bench) needs=("${for_bench[@]}") wanted_kernels=(6.1:6.1. 6.12:6.12.) ;;
*)
    echo "usage: $0 demo|guests|tests|bench" >&2
    exit 2
    ;;
esac
machine=$(uname -m)
[ "$machine" = x86_64 ] || fail "the guests are x86-64 machines, and this is $machine"
mkdir -p "$guests"
rm -rf "$guests"/fetch.*
work=$(mktemp -d "$guests/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

note_missing "${needs[@]}"
note_missing_linker
plan_programs
plan_kernels "${wanted_kernels[@]}"
if have_zstd_modules; then
    note_missing zstd:zstd
    plan_programs
fi
sshd=
[ "$1" = demo ] || ! lacks_sshd || sshd=yes

announce_programs
announce_kernels
[ -z "$sshd" ] || announce_sshd

install_programs
install_kernels "${wanted_kernels[@]}"
[ -z "$sshd" ] || unpack_sshd || { update_lists && unpack_sshd; } || fail "apt-get can't download openssh-server; is this machine online?"
