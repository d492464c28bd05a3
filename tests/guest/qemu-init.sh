#!/bin/busybox sh
# The first process of a QEMU guest, whose root is the initramfs that make-initramfs.sh builds.
export PATH=/run/bin:/bin:/usr/bin:/busybox HOME=/run TMPDIR=/run GUEST=/guest MODULES=/modules

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

# The guest's nc is ncat: busybox's own does not know vsock.
mkdir -p /run/bin
ln -s /usr/bin/ncat /run/bin/nc

while read -r module; do
    insmod "$MODULES/$module.ko"
done <"$MODULES/order"

# A word of the kernel's command line that the kernel does not know is a variable here.
[ -z "${demo:-}" ] || exec /bin/sh "$GUEST/demo.sh"
exec /usr/bin/python3 "$GUEST/agent.py" /dev/ttyS1
