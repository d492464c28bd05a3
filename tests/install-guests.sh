#!/bin/bash
# Installs what the tests with real guests need: the programs as Debian or Ubuntu packages, two kernels into a directory of their own.
# Quick when everything is there. VSOCK_GUESTS names another directory for the kernels than target/guests. Arguments are more
# packages to install.
set -eu

project=$(cd "$(dirname "$0")/.." && pwd)
guests=${VSOCK_GUESTS:-$project/target/guests}
packages=(user-mode-linux qemu-system-x86 socat ncat netcat-openbsd python3 busybox-static cpio kmod xz-utils gzip gcc libc6-dev
    openssh-server openssh-client iperf3 curl dbus-daemon dbus-session-bus-common systemd "$@")

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# The package lists are fetched at most once, and only when they are needed.
update_lists() {
    [ -z "${lists_are_fresh:-}" ] || return 0
    as_root apt-get update -q
    lists_are_fresh=1
}

is_installed() {
    dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null | grep -qx installed
}

# Only the program is wanted: a machine without an sshd shall not listen to the network from now on.
keep_sshd_from_starting() {
    local unit
    as_root mkdir -p /etc/systemd/system
    for unit in ssh.service ssh.socket; do
        [ -e "/etc/systemd/system/$unit" ] || as_root ln -s /dev/null "/etc/systemd/system/$unit"
    done
}

install_programs() {
    local missing=() package
    for package in "${packages[@]}"; do
        is_installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing ${missing[*]}"
    update_lists
    is_installed openssh-server || keep_sshd_from_starting
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "${missing[@]}"
}

# The kernel package that the always-newest package $1 stands for.
newest_kernel() {
    apt-cache depends "$1" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*-cloud-amd64\)$/\1/p' | head -n 1
}

is_offered() {
    apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [0-9]'
}

# Unpacks the kernel package $2 into the directory $1, which appears only when it is complete.
unpack_kernel() {
    local directory=$guests/$1 package=$2 work
    echo "fetching $package"
    work=$(mktemp -d "$guests/fetch.XXXXXX")
    # As root apt would download as a user who may not write here.
    (cd "$work" && apt-get download -q -o APT::Sandbox::User=root "$package") || return 1
    dpkg-deb -x "$work"/linux-image-*.deb "$work/kernel" || return 1
    rm -rf "$directory"
    mv "$work/kernel" "$directory"
    rm -rf "$work"
}

# What kernel $1 is called today; empty when no source offers it.
find_kernel() {
    case $1 in
    6.1) newest_kernel linux-image-cloud-amd64 ;;
    6.12)
        # This one spreads a write of more than 32 KiB over several descriptors.
        if is_offered linux-image-6.12.117+deb12-cloud-amd64; then
            echo linux-image-6.12.117+deb12-cloud-amd64
        else
            newest_kernel linux-image-6.12-cloud-amd64
        fi
        ;;
    esac
}

install_kernel() {
    local package
    ! compgen -G "$guests/linux-$1/boot/vmlinuz-*" >/dev/null || return 0
    package=$(find_kernel "$1")
    if [ -z "$package" ]; then
        update_lists
        package=$(find_kernel "$1")
    fi
    if [ -z "$package" ]; then
        echo "error: no apt source of this machine has Debian's Linux $1 cloud kernel (Debian 12 and its security updates have it)" >&2
        exit 1
    fi
    unpack_kernel "linux-$1" "$package" && return 0
    # The lists were older than the archive.
    update_lists
    unpack_kernel "linux-$1" "$(find_kernel "$1")"
}

install_programs
mkdir -p "$guests"
rm -rf "$guests"/fetch.*
install_kernel 6.1
install_kernel 6.12
echo "guests are ready in $guests"
