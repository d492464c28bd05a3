#!/bin/bash
# Records two Linux guests under QEMU that talk with ncat, through one daemon, for the README's picture:
# `tests/two-guests.sh | tests/demo-svg.py 'Two guests talk' >docs/two-guests.svg`. It takes what `make demo` has built and
# installed. Everything that is started here is stopped here.
set -eu

project=$(cd "$(dirname "$0")/.." && pwd)
guests=$(realpath "${VSOCK_GUESTS:-$project/target/guests}")
daemon=$project/target/release/vhost-user-vsock
kernel=$guests/linux-demo
work=$(mktemp -d)
pids=()

stop() {
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    wait
    rm -rf "$work"
}
trap stop EXIT

host() {
    echo "host\$ $*"
}

# Prints what comes in, line by line, with the word $1 in front.
as() {
    sed -u "s/^/$1 | /; s/\r$//"
}

# The demo's root with another script in its place: the kernel unpacks one archive over the other.
make_root() {
    mkdir -p root/guest
    cp "$project/tests/guest/two-guests.sh" root/guest/demo.sh
    (cd root && find . -print0 | busybox cpio -0 -o -H newc 2>/dev/null) >root.cpio
    cat "$guests/initramfs-demo" root.cpio >initramfs
}

start_daemon() {
    local vms=(--vm guest-cid=4,socket=vhost4.socket,uds-path=vm4.vsock --vm guest-cid=5,socket=vhost5.socket,uds-path=vm5.vsock)
    host "vhost-user-vsock ${vms[*]}"
    "$daemon" "${vms[@]}" 2> >(as daemon) &
    pids+=($!)
    until [ -S vhost4.socket ] && [ -S vhost5.socket ]; do sleep 0.1; done
    # Its log comes first.
    sleep 0.3
}

start_guest() {
    local cid=$1 vsock
    vsock=(-object memory-backend-memfd,id=mem0,size=256M,share=on -machine q35,memory-backend=mem0
        -chardev "socket,id=char0,path=vhost$cid.socket" -device vhost-user-vsock-pci,chardev=char0)
    host "qemu-system-x86_64 -kernel … -m 256M ${vsock[*]}"
    qemu-system-x86_64 -accel tcg -cpu max,la57=off -smp 1 -m 256M -nodefaults -display none -no-reboot \
        -kernel "$kernel"/boot/vmlinuz-* -initrd initramfs \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr demo=yes cid=$cid" \
        "${vsock[@]}" -serial stdio </dev/null > >(as "guest$cid") &
    pids+=("$!")
}

cd "$work"
make_root
start_daemon
start_guest 4
start_guest 5
wait "${pids[1]}" "${pids[2]}"
sleep 0.3
host "kill <vhost-user-vsock>"
kill "${pids[0]}"
wait "${pids[0]}"
sleep 0.3
