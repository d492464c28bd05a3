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

exec /usr/bin/python3 "$GUEST/agent.py" /dev/ttyS1
