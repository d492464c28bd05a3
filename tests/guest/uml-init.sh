#!/bin/sh
# The first process of a UML guest, whose root is the host's, read only.
export PATH=/run/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run
GUEST=$(dirname "$0")
export GUEST

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run

# The guest's nc is ncat: the host's own may not know vsock.
mkdir /run/bin
ln -s /usr/bin/ncat /run/bin/nc

# The sshd that tests/install-guests.sh unpacked for a machine without one is installed in here alone. The kernel's command line
# says where it is, in $sshd.
install_sshd() {
    insmod "/usr/lib/uml/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko"
    for directory in /usr/sbin /usr/lib; do
        mount -t overlay -o "ro,lowerdir=$sshd$directory:$directory" overlay "$directory"
    done
    cp /etc/passwd /run/passwd
    echo 'sshd:x:100:65534::/run/sshd:/usr/sbin/nologin' >>/run/passwd
    mount --bind /run/passwd /etc/passwd
}
if [ ! -e /usr/sbin/sshd ] && [ -e "$sshd" ]; then
    install_sshd
fi

MODULES=/usr/lib/uml/modules/$(uname -r)/kernel/net/vmw_vsock
export MODULES
for module in vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do
    insmod "$MODULES/$module.ko"
done

exec /usr/bin/python3 "$GUEST/agent.py" /dev/ttyS0
