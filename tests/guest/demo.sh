#!/bin/sh
# What the guest does in `make demo`, after its boot.
kernel=$(uname -r)
echo "Linux $kernel is up"

echo 'guest$ echo "hello from the guest" | ncat --vsock -l -p 1234'
echo "hello from the guest" | ncat --vsock -l -p 1234

echo 'guest$ echo "hello again from the guest" | ncat --vsock 2 1234'
echo "hello again from the guest" | ncat --vsock 2 1234

poweroff -f
