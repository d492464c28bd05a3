#!/bin/sh
# What each of the two guests of tests/two-guests.sh does after its boot: 5 listens, and 4 calls it.
echo "Linux $(uname -r) is up, with CID $cid"

if [ "$cid" = 5 ]; then
    echo 'guest5$ echo "hello 4, this is 5" | ncat --vsock -l -p 1234'
    echo "hello 4, this is 5" | ncat --vsock -l -p 1234
else
    # The other one may still be booting.
    sleep 5
    echo 'guest4$ echo "hello 5, this is 4" | ncat --vsock 5 1234'
    until echo "hello 5, this is 4" | ncat --vsock 5 1234 2>/dev/null; do
        sleep 1
    done
fi

poweroff -f
