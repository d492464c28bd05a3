#!/bin/bash
# What tests/install.rs does under a systemd of its own: installs the Debian package beside this script, starts daemons
# in every way there is, and removes it. Each line must succeed.
set -euEo pipefail
trap 'echo "failed: line $LINENO: $BASH_COMMAND" >&2; journalctl --no-pager -u "vhost-user-vsock*" >&2' ERR
set -x

name=vhost-user-vsock
run=/run/$name

eventually() {
    for _ in {1..200}; do
        ! "$@" || return 0
        sleep 0.1
    done
    return 1
}
fails() {
    ! "$@" || return 1
}
says() {
    journalctl --no-pager -u "$1" | grep -F "$2"
}
as() {
    setpriv --reuid "$1" --regid nogroup --init-groups "${@:2}"
}
# Whether user $1 may connect to the socket $2. Without a guest the daemon closes it at once.
connects() {
    as "$1" socat -u "UNIX-CONNECT:$2" -
}
# A VMM that only connects to the socket $1. To be started in the background, and killed.
vmm() {
    exec setpriv --reuid member --regid nogroup --init-groups socat -u "UNIX-CONNECT:$1" -
}

dpkg -i $name.deb
units=($name@4.service $name-vmm@4.socket $name-host@4.socket $name-metrics.service $name-metrics.timer)
[ -z "$(systemd-analyze verify "${units[@]}" 2>&1)" ]
# In tenths. It is 4 with systemd 252; others look for more.
systemd-analyze security --no-pager --threshold=9 $name@4.service | tail -n 1
useradd --no-create-home --groups $name member
useradd --no-create-home stranger

# By CID. The test outside is its guest and host programs, in this directory.
sockets=$(echo sockets-*)
mkdir -p $run/4 /etc/$name
mount --bind "$sockets" $run/4
if [ -e user ]; then
    mkdir -p /etc/systemd/system/$name@4.service.d
    cp user /etc/systemd/system/$name@4.service.d/user.conf
    systemctl daemon-reload
fi
systemctl start $name@4.service
eventually says $name@4.service 'CID 4: waiting'
eventually test -e served
[ "$(systemctl show -P NRestarts $name@4.service)" = 0 ]
systemctl stop $name@4.service
[ ! -e "$sockets/vhost.socket" ]
[ ! -e "$sockets/vm.vsock" ]
[ ! -e "$sockets/stats" ]

# By name. Its users are in the group.
printf 'GUEST_CID=77\nOPTIONS=-v --max-connections=5\n' >/etc/$name/web.env
systemctl start $name@web.service
eventually says $name@web.service 'CID 77: waiting'
tr '\0' ' ' </proc/"$(systemctl show -P MainPID $name@web.service)"/cmdline | grep -F -- '-v --max-connections=5'

# All daemons, and their statistics for node_exporter.
$name list | grep -E '^ *web +77 +none +none +0 '
collected=/var/lib/prometheus/node-exporter
mkdir -p $collected
systemctl start $name-metrics.service
grep -Fx "vhost_user_vsock_driver_started{name=\"web\",cid=\"77\"} 0" $collected/$name.prom
[ "$(stat -c %a $collected/$name.prom)" = 644 ]
systemctl start $name-metrics.timer
connects member $run/web/vm.vsock
fails connects stranger $run/web/vm.vsock
vmm $run/web/vhost.socket &
eventually says $name@web.service 'a VMM connected'
kill $!
eventually says $name@web.service 'the VMM disconnected'
# A member's program listens there over the daemon's next life.
as member socat -u UNIX-LISTEN:$run/web/vm.vsock_1234,mode=660 - &
eventually test -S $run/web/vm.vsock_1234
[ "$(stat -c %G $run/web/vm.vsock_1234)" = $name ]
systemctl restart $name@web.service
[ -S $run/web/vm.vsock_1234 ]
setpriv --reuid $name --regid $name --clear-groups socat -u /dev/null UNIX-CONNECT:$run/web/vm.vsock_1234
# A crash.
systemctl kill --signal=KILL $name@web.service
has_restarted() {
    [ "$(systemctl show -P NRestarts $name@web.service)" = 1 ]
}
eventually has_restarted
eventually connects member $run/web/vm.vsock

# The VMM and the listening sockets stay over a restart and a crash. Once the VMM has left, nothing of it is stored.
has_started() {
    says $name@web.service 'CID 77: serving the VMM of' | grep -c . | grep -Fx "$1"
}
stores() {
    [ "$(systemctl show -P NFileDescriptorStore $name@web.service)" = "$1" ]
}
stored=$(systemctl show -P NFileDescriptorStore $name@web.service)
vmm $run/web/vhost.socket &
eventually stores $((stored + 1))
inodes=$(stat -c %i $run/web/{vhost.socket,vm.vsock})
systemctl restart $name@web.service
eventually has_started 1
eventually stores $((stored + 1))
systemctl kill --signal=KILL $name@web.service
eventually has_started 2
[ "$(stat -c %i $run/web/{vhost.socket,vm.vsock})" = "$inodes" ]
kill $!
eventually stores "$stored"

# A mistake in the options is not tried again.
echo 'OPTIONS=--no-such-option' >/etc/$name/9.env
fails systemctl start $name@9.service
eventually says $name@9.service no-such-option
[ "$(systemctl show -P ExecMainStatus $name@9.service)" = 2 ]
[ "$(systemctl show -P ActiveState $name@9.service)" = failed ]

# By its sockets.
systemctl start $name-vmm@5.socket $name-host@5.socket
fails systemctl is-active $name@5.service
fails connects stranger $run/5/vm.vsock
connects member $run/5/vm.vsock
eventually systemctl is-active $name@5.service
eventually says $name@5.service 'CID 5: waiting for a VMM at descriptor'
inode=$(stat -c %i $run/5/vhost.socket)
systemctl restart $name@5.service
[ "$(stat -c %i $run/5/vhost.socket)" = "$inode" ]
connects member $run/5/vm.vsock

# No warning about the sandbox but what the kernel lacks.
fails says "$name@*" 'Operation not permitted'

dpkg -r $name
fails pgrep -x -f "/usr/bin/$name .*"
[ -z "$(systemctl list-units --plain --no-legend --state=active "$name*")" ]
[ ! -e $run/5/vhost.socket ]
[ ! -e $run/web/vm.vsock ]
dpkg -P $name
fails dpkg -s $name
for directory in bin lib/systemd lib/sysusers.d share/{man,bash-completion,zsh,fish,qemu,doc}; do
    [ -z "$(find /usr/$directory -name "*$name*")" ]
done
