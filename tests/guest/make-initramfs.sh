#!/bin/bash
# Builds the root of a QEMU guest: `make-initramfs.sh KERNEL OUTPUT`, where KERNEL is a directory that tests/install-guests.sh has filled.
# In it: busybox, socat, ncat, python3 with the modules that agent.py and peer.py use, and the kernel's vsock modules.
set -eu

kernel=$1 output=$2
scripts=$(cd "$(dirname "$0")" && pwd -P)

# In the order they need each other. Those that a kernel has built in have no file.
modules=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci
    vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport)

# One at a time: tests run side by side.
exec 9>"$output.lock"
flock 9
if [ -e "$output" ] && [ -z "$(find "$scripts" "$kernel/boot" -newer "$output" -print -quit)" ]; then
    exit 0
fi

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

copy() {
    mkdir -p "$root$(dirname "$1")"
    cp -Lpn "$1" "$root$1"
}

# Copies a program or library and the libraries that it needs.
copy_binary() {
    local library
    copy "$1"
    for library in $(ldd "$1" | grep -o '/[^ ]*'); do
        copy "$library"
    done
}

# The files behind what the scripts import, and behind what Python imports by itself.
list_python_files() {
    /usr/bin/python3 -I - <<'PYTHON'
import errno, hashlib, os, random, signal, socket, subprocess, sys, threading, time, traceback, tty
import encodings.ascii, encodings.idna, encodings.latin_1
for module in list(sys.modules.values()):
    file = getattr(module, "__file__", None)
    if file and module.__name__ != "__main__":
        print(file)
PYTHON
}

copy_python() {
    local file
    copy_binary /usr/bin/python3
    for file in $(list_python_files); do
        case $file in
        *.so) copy_binary "$file" ;;
        *) copy "$file" ;;
        esac
    done
    /usr/bin/python3 -m compileall -q -s "$root" "$root"/usr/lib/python3*
}

copy_applets() {
    local applet
    mkdir "$root/busybox"
    for applet in $(busybox --list); do
        ln -s /bin/busybox "$root/busybox/$applet"
    done
}

copy_modules() {
    local name file
    mkdir "$root/modules"
    for name in "${modules[@]}"; do
        file=$(find "$kernel/lib/modules" -name "$name.ko*" -print -quit)
        case $file in
        '') continue ;;
        *.xz) xz -dc "$file" >"$root/modules/$name.ko" ;;
        *.zst) zstd -qdc "$file" >"$root/modules/$name.ko" ;;
        *) cp "$file" "$root/modules/$name.ko" ;;
        esac
        echo "$name" >>"$root/modules/order"
    done
}

mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,guest}
cp /bin/busybox "$root/bin/busybox"
copy_applets
# Not busybox's: that one runs its own nc, whatever the PATH.
copy_binary /bin/sh
copy_binary /usr/bin/socat
copy_binary /usr/bin/ncat
# ncat complains without it.
copy_binary "$(find /usr/lib -path '*/ossl-modules/legacy.so' -print -quit)"
copy_python
copy_modules
cp "$scripts"/*.py "$scripts/demo.sh" "$root/guest/"
cp "$scripts/qemu-init.sh" "$root/init"
chmod +x "$root/init"
# Not packed: an emulated processor is slow at unpacking.
(cd "$root" && find . -print0 | cpio -0 -o -H newc --quiet) >"$output.new"
mv "$output.new" "$output"
