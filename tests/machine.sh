#!/bin/bash
# Runs the shell script $1 under a systemd of its own, as root of what looks like this machine: the same files, of which
# the script may change every one, since the changes go to memory and are gone at the end. Its working directory is that of
# the script, where `log` takes what it says. Ends with its exit status. Takes root, or sudo. With --probe in place of the
# script it only finds out whether this system lets it do so.
set -eu

if [ "$(id -u)" != 0 ]; then
    exec sudo -n "$0" "$@"
fi

hierarchy=$(findmnt -n -o TARGET -t cgroup2 | head -n 1)
if [ -z "$hierarchy" ]; then
    echo "error: systemd needs cgroup2, which is not mounted here" >&2
    exit 1
fi
# What a machine has left that was killed.
for group in "$hierarchy"/vsock-machine-*; do
    [ -d "/proc/${group##*-}" ] || find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
done
group=$hierarchy/vsock-machine-$$
work=$(mktemp -d)
if [ "$1" = --probe ]; then
    action=mount_files script=$(realpath "$0")
else
    action=boot script=$(realpath "$1")
fi
clean_up() {
    rmdir "$work"
    find "$group" -depth -type d -exec rmdir {} +
}
mkdir "$group"
trap clean_up EXIT

# The files: this machine's, beneath what is changed.
mount_files() {
    mount --make-rprivate /
    mount -t tmpfs -o mode=755 machine "$work"
    mkdir "$work"/{changes,work,root}
    mount -t overlay -o lowerdir=/,upperdir="$work/changes",workdir="$work/work" machine "$work/root"
    cd "$work/root"
    mount --bind "$(dirname "$script")" mnt
    mount -t tmpfs -o mode=755 run run
    mount -t tmpfs tmp tmp
    # Of this machine's kernel and devices it changes nothing.
    mount -t proc proc proc
    mount --bind proc/sys proc/sys
    mount -o remount,ro,bind proc/sys
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs -o mode=755 dev dev
    mkdir dev/{pts,shm}
    mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    local device
    for device in null zero full random urandom tty; do
        touch "dev/$device"
        mount --bind "/dev/$device" "dev/$device"
    done
}

# No services of this machine's, but one that is the script.
make_service() {
    rm -rf etc/systemd/system/* etc/machine-id etc/fstab
    touch etc/machine-id
    cat >etc/systemd/system/script.service <<UNIT
[Unit]
Requires=sysinit.target
After=sysinit.target
SuccessAction=exit-force
FailureAction=exit-force

[Service]
Type=oneshot
WorkingDirectory=/mnt
ExecStart=/bin/bash /mnt/$(basename "$script")
StandardOutput=append:/mnt/log
StandardError=inherit
TimeoutStartSec=120
UNIT
}

boot() {
    mount_files
    make_service
    # A changed root would forbid services users of their own: it is another one.
    pivot_root . .
    umount --lazy .
    cd /
    exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        setpriv --bounding-set=-audit_control,-mknod,-sys_module,-sys_rawio,-sys_time,-syslog,-wake_alarm \
        /lib/systemd/systemd --system --unit=script.service --show-status=no --log-target=journal
}
export -f boot mount_files make_service
export script work

# What it starts ends with it, being in a process namespace of its own.
(
    echo "$BASHPID" >"$group/cgroup.procs"
    exec unshare --mount --pid --fork --kill-child --cgroup --ipc --uts --net bash -euc "$action"
)
