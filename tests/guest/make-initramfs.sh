#!/bin/bash
# Builds the root of a QEMU guest: `make-initramfs.sh KERNEL OUTPUT`, where KERNEL is a directory that tests/install-guests.sh
# has filled. In it: busybox, ncat, the kernel's vsock modules, and for the tests socat and python3 with the modules that
# agent.py and peer.py use. With `demo` as a third argument it is without those.
set -eu

kernel=$1 output=$2 purpose=${3:-tests}
scripts=$(cd "$(dirname "$0")" && pwd -P)

# In the order they need each other. Those that a kernel has built in have no file.
modules=(virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci
    vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport)

# One at a time: tests run side by side.
exec 9>"$output.lock"
flock 9
if [ -e "$output" ] && [ -z "$(find "$scripts" "$kernel" "$kernel/boot" -newer "$output" -print -quit)" ]; then
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

copy_busybox() {
    local busybox applet library
    busybox=$(command -v busybox)
    cp -L "$busybox" "$root/bin/busybox"
    # It has none where it is linked statically.
    for library in $(ldd "$busybox" 2>/dev/null | grep -o '/[^ ]*'); do
        copy "$library"
    done
    mkdir "$root/busybox"
    for applet in $(busybox --list); do
        ln -s /bin/busybox "$root/busybox/$applet"
    done
}

copy_ncat() {
    local legacy
    copy_binary "$(command -v ncat)"
    # ncat complains without it.
    legacy=$(find /usr/lib -path '*/ossl-modules/legacy.so' -print -quit)
    [ -z "$legacy" ] || copy_binary "$legacy"
}

copy_modules() {
    local name file
    mkdir "$root/modules"
    for name in "${modules[@]}"; do
        file=$(find -L "$kernel/lib/modules" "$kernel/usr/lib/modules" -name "$name.ko*" -print -quit 2>/dev/null || true)
        case $file in
        '') continue ;;
        *.xz) busybox xz -dc "$file" >"$root/modules/$name.ko" ;;
        *.zst) zstd -qdc "$file" >"$root/modules/$name.ko" ;;
        *) cp "$file" "$root/modules/$name.ko" ;;
        esac
        echo "$name" >>"$root/modules/order"
    done
}

mkdir -p "$root"/{bin,sbin,dev,proc,sys,run,tmp,guest}
copy_busybox
# Not busybox's: that one runs its own nc, whatever the PATH.
copy_binary /bin/sh
copy_ncat
copy_modules
if [ "$purpose" = tests ]; then
    copy_binary /usr/bin/socat
    copy_python
fi
cp "$scripts"/*.py "$scripts/demo.sh" "$root/guest/"
cp "$scripts/qemu-init.sh" "$root/init"
chmod +x "$root/init"
# Not packed: an emulated processor is slow at unpacking.
(cd "$root" && find . -print0 | busybox cpio -0 -o -H newc 2>/dev/null) >"$output.new"
mv "$output.new" "$output"
