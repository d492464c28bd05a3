#!/bin/sh
# The first process of a UML guest, whose root is the host's, read only. The kernel's command line gave it the variables.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

mount -t proc proc /proc
modules=/usr/lib/uml/modules/$(uname -r)/kernel/net/vmw_vsock
for module in vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do
    insmod "$modules/$module.ko"
done

exec "$STREAM_PROGRAM" "$STREAM_MODE" "$STREAM_HOST_PORT" "$STREAM_GUEST_PORT" "$STREAM_SIZE"
