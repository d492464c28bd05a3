#!/bin/bash
# Says in one line what this machine's Rust lacks to build the project, and what to do about it. Fetches the crates where they
# are missing. Quick and silent where all is well. With `linker` as an argument it looks for that too, with `tests` for the crates
# that only those take.
set -u

cd "$(dirname "$0")/.." || exit 1
needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

fail() {
    echo "error: $*" >&2
    exit 1
}

# Whether version $1 is $2 or newer.
is_at_least() {
    [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

check_version() {
    local said version
    if ! command -v cargo >/dev/null || ! command -v rustc >/dev/null; then
        [ ! -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] ||
            fail "cargo is not in the PATH: run \`. ${CARGO_HOME:-$HOME/.cargo}/env\`, or open a new terminal"
        fail "there is no Rust on this machine; this needs Rust $needed or newer: install it from https://rustup.rs"
    fi
    # rustup's cargo fails where it has no toolchain, and can't fetch one.
    if ! said=$(cargo --version 2>&1 && rustc --version 2>&1); then
        said=$(sed -n 's/^error: //p' <<<"$said" | head -n 1)
        fail "cargo does not run${said:+: $said}; with rustup: \`rustup toolchain install stable\`"
    fi
    version=$(sed -n 's/^rustc \([0-9.]*\).*/\1/p' <<<"$said")
    is_at_least "$version" "$needed" && return
    if command -v rustup >/dev/null; then
        fail "this needs Rust $needed or newer, and this machine has $version: run \`rustup update stable\`"
    fi
    fail "this needs Rust $needed or newer, and this machine has $version ($(command -v rustc)): install a newer one from https://rustup.rs"
}

check_linker() {
    command -v cc >/dev/null ||
        fail "there is no C compiler (cc), with which Rust links; on Debian and Ubuntu: apt-get install gcc libc6-dev"
}

list_crates() {
    cargo tree --quiet --locked --edges "$edges" "$@"
}

check_crates() {
    local said
    ! list_crates --offline >/dev/null 2>&1 || return 0
    echo "fetching the crates that this is built from"
    said=$(list_crates 2>&1 >/dev/null) && return
    # The last line is the cause of all before.
    said=$(grep -v '^ *$' <<<"$said" | tail -n 1 | sed 's/^ *//')
    fail "cargo can't fetch the crates that this is built from; is this machine online? ($said)"
}

edges=no-dev
check_version
for argument in "$@"; do
    case $argument in
    linker) check_linker ;;
    tests) edges=all ;;
    esac
done
check_crates
