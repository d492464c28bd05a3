#!/bin/sh
# What a guest of tests/record.sh does after its boot, by the variables scene and cid, which are words of the kernel's command line.

# In the scene two-guests, 5 listens, and 4 calls it.
two_guests() {
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
}

# In the scene upgrade, it writes a line every second.
upgrade() {
    echo "Linux $(uname -r) is up"
    echo "guest\$ for n in 1 2 3 4 5 6; do echo line \$n; sleep 1; done | ncat --vsock -l -p 1234"
    (for n in 1 2 3 4 5 6; do echo "line $n"; sleep 1; done) | ncat --vsock -l -p 1234
}

case $scene in
two-guests) two_guests ;;
upgrade) upgrade ;;
esac
poweroff -f
