#!/bin/bash
# Records what Linux guests under QEMU do through the daemon, for the README's pictures. `tests/record.sh two-guests` has two guests
# that talk, `tests/record.sh upgrade` a new daemon that takes over from the old one:
#
#   tests/record.sh upgrade | tests/demo-svg.py 'A new daemon takes over' >docs/upgrade.svg
#
# It takes what `make demo` has built and installed. Everything that is started here is stopped here.
set -eu

scene=${1:?two-guests or upgrade}
# shellcheck source=scene.sh
. "$(dirname "$0")/scene.sh"

# The demo's root with another script in its place: the kernel unpacks one archive over the other.
make_root() {
    mkdir -p root/guest
    cp "$project/tests/guest/scenes.sh" root/guest/demo.sh
    (cd root && find . -print0 | busybox cpio -0 -o -H newc 2>/dev/null) >root.cpio
    cat "$guests/initramfs-demo" root.cpio >initramfs
}

# Starts the daemon under the name $1, with the other arguments.
start_daemon() {
    host "vhost-user-vsock ${*:2}"
    "$daemon" "${@:2}" 2> >(as "$1") &
    pids+=($!)
}

# Starts a guest under the name $1, with the CID $2.
start_guest() {
    local cid=$2 vsock
    vsock=(-object memory-backend-memfd,id=mem0,size=256M,share=on -machine q35,memory-backend=mem0
        -chardev "socket,id=char0,path=vhost$cid.socket" -device vhost-user-vsock-pci,chardev=char0)
    patiently test -S "vhost$cid.socket"
    # The daemon's log comes first.
    sleep 0.3
    host "qemu-system-x86_64 -kernel … -m 256M ${vsock[*]}"
    qemu-system-x86_64 -accel tcg -cpu max,la57=off -smp 1 -m 256M -nodefaults -display none -no-reboot \
        -kernel "$kernel"/boot/vmlinuz-* -initrd initramfs \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr demo=yes scene=$scene cid=$cid" \
        "${vsock[@]}" -serial stdio </dev/null > >(as "$1") &
    pids+=("$!")
}

two_guests() {
    start_daemon daemon --vm guest-cid=4,socket=vhost4.socket,uds-path=vm4.vsock --vm guest-cid=5,socket=vhost5.socket,uds-path=vm5.vsock
    start_guest guest4 4
    start_guest guest5 5
    wait "${pids[1]}" "${pids[2]}"
}

has_line() {
    grep -q "$1" transcript
}

upgrade() {
    local options=(--guest-cid=4 --uds-path=vm4.vsock --socket=vhost4.socket --handover-path=vm4.handover)
    start_daemon daemon "${options[@]}"
    start_guest guest 4
    patiently has_line 'ncat --vsock'
    host "vhost-user-vsock connect vm4.vsock 1234"
    # As a terminal at which nobody types.
    mkfifo keyboard
    exec 3<>keyboard
    "$daemon" connect --wait=60 vm4.vsock 1234 <keyboard > >(as host) &
    local client=$!
    pids+=("$client")
    patiently has_line 'host | line 2'
    sleep 0.3
    start_daemon "new daemon" "${options[@]}"
    patiently has_line 'host | line 6'
    kill "$client"
    wait "${pids[0]}" "${pids[1]}"
}

cd "$work"
touch transcript
make_root
case $scene in
two-guests) two_guests ;;
upgrade) upgrade ;;
esac
sleep 0.3
