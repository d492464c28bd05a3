# Sourced by tests/demo.sh and tests/record.sh: a temporary directory $work, the programs in $pids, which end with the script, and how
# what is typed and what comes back is shown.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
guests=$(realpath "${VSOCK_GUESTS:-$project/target/guests}")
daemon=$project/target/release/vhost-user-vsock
kernel=$guests/linux-demo
work=$(mktemp -d)
pids=()

stop() {
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    wait
    rm -rf "$work"
}
trap stop EXIT

host() {
    echo "host\$ $*"
}

# Prints what comes in, line by line, with the words $1 in front.
as() {
    sed -u "s/^/$1 | /; s/\r$//" | tee -a "$work/transcript"
}

# Runs "$@" until it succeeds, for at most a minute.
patiently() {
    for _ in $(seq 300); do
        "$@" && return 0
        sleep 0.2
    done
    echo "$(basename "$0" .sh): gave up: $*" >&2
    exit 1
}
