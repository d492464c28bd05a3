#!/bin/bash
# `make demo`: a Linux guest under QEMU and its host talk with ncat in both directions, through the daemon.
# Lines that begin with "guest |" come from the guest's console. Everything that is started here is stopped here.
set -eu

# shellcheck source=scene.sh
. "$(dirname "$0")/scene.sh"

start_daemon() {
    local options=(--guest-cid=4 --uds-path=vm4.vsock --socket=vhost4.socket --wait-for-guest=120)
    host "vhost-user-vsock ${options[*]}"
    "$daemon" "${options[@]}" 2> >(as daemon) &
    pids+=($!)
    patiently test -S vm4.vsock
}

start_guest() {
    local initramfs=$guests/initramfs-demo vsock
    "$project/tests/guest/make-initramfs.sh" "$kernel" "$initramfs" demo
    vsock=(-object memory-backend-memfd,id=mem0,size=512M,share=on -machine q35,memory-backend=mem0
        -chardev "socket,id=char0,reconnect=0,path=vhost4.socket"
        -device vhost-user-vsock-pci,chardev=char0)
    host "qemu-system-x86_64 -kernel … -m 512M ${vsock[*]}"
    timeout 180 qemu-system-x86_64 -accel tcg -cpu max,la57=off -smp 2 -m 512M -nodefaults -display none -no-reboot \
        -kernel "$kernel"/boot/vmlinuz-* -initrd "$initramfs" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr demo=yes" \
        "${vsock[@]}" -serial stdio </dev/null > >(as guest) &
    qemu=$!
    pids+=("$qemu")
}

# The CONNECT line and a greeting, and what comes back. The daemon waits for the guest, which is still booting.
call_guest() {
    host "printf 'CONNECT 1234\nhello from the host\n' | ncat -U vm4.vsock"
    printf 'CONNECT 1234\nhello from the host\n' | ncat -U vm4.vsock | as host
}

listen() {
    host "echo 'hello again from the host' | ncat -l -U vm4.vsock_1234"
    { echo "hello again from the host" | timeout 180 ncat -l -U vm4.vsock_1234 | as host; } &
    listener=$!
    patiently test -S vm4.vsock_1234
}

# The paths are as short as a person would type them.
cd "$work"
start_daemon
start_guest
listen
call_guest
wait "$listener" "$qemu" || true
host "kill <vhost-user-vsock>"
kill "${pids[0]}"
wait "${pids[0]}"
sleep 0.2

for line in "guest | hello from the host" "host | hello from the guest" \
    "guest | hello again from the host" "host | hello again from the guest"; do
    grep -qxF "$line" transcript || { echo "demo: missing: $line" >&2; exit 1; }
done
[ ! -e vm4.vsock ] || { echo "demo: the daemon left its socket" >&2; exit 1; }
echo "Both directions worked, and everything was stopped."
