# Sourced by tests/install-guests.sh: finds out which programs are missing, and installs their packages with apt-get. Nothing is
# ever removed for them. $work is a directory for files that are in the way of nobody.

# The packages to install.
missing=()
# The programs for which that is.
missing_programs=()

fail() {
    echo "error: $*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

# Notes what is missing of the "PROGRAM:PACKAGE" in the arguments. A program in a certain place, or a file, is named by its path.
note_missing() {
    local need
    for need in "$@"; do
        # A user's PATH may lack the sbin directories.
        ! PATH=$PATH:/usr/sbin:/sbin command -v "${need%%:*}" >/dev/null || continue
        [ ! -e "${need%%:*}" ] || continue
        missing+=("${need##*:}")
        missing_programs+=("${need%%:*}")
    done
}

# A C compiler that can link, which rustc takes.
note_missing_linker() {
    ! { command -v cc && echo 'int main(void) { return 0; }' | cc -x c -o "$work/program" -; } >/dev/null 2>&1 || return 0
    missing+=(gcc libc6-dev)
    missing_programs+=(cc)
}

has_apt() {
    command -v apt-get >/dev/null
}

# What apt-get says to its arguments; with its error, if it has one, in the variable `apt_error`.
apt_error=
ask_apt() {
    local said
    if said=$(LC_ALL=C apt-get "$@" 2>&1); then
        echo "$said"
        return
    fi
    apt_error=$(grep -m 1 '^E:' <<<"$said" || tail -n 1 <<<"$said")
    return 1
}

# The package lists are fetched at most once, and only when they are needed.
lists_are_fresh=
update_lists() {
    [ -z "$lists_are_fresh" ] || return 1
    lists_are_fresh=yes
    require_root
    echo "reading the package lists (apt-get update)"
    as_root env LC_ALL=C apt-get update -qq >/dev/null 2>&1 || true
}

# Lets sudo ask for its password before its output is kept from the terminal.
require_root() {
    [ "$(id -u)" != 0 ] || return 0
    local by_hand="as root, run \`apt-get update && apt-get install --no-install-recommends ${missing[*]}\`"
    command -v sudo >/dev/null || fail "only root may install packages, and there is no sudo: $by_hand"
    sudo true || fail "only root may install packages, and sudo refused: $by_hand"
}

# What apt-get would do to install the missing packages, in lines "Inst …" and "Remv …". Nothing is changed.
plan=
plan_programs() {
    [ ${#missing[@]} -gt 0 ] || return 0
    has_apt ||
        fail "not installed: ${missing_programs[*]}; there is no apt-get on this machine, so install them with its own package manager (Debian's packages are ${missing[*]})"
    local install=(-s install --no-install-recommends "${missing[@]}")
    # Not in a subshell, for the variables.
    if ! ask_apt "${install[@]}" >"$work/plan"; then
        update_lists || true
        ask_apt "${install[@]}" >"$work/plan" ||
            fail "apt-get can't install ${missing[*]}: ${apt_error#E: }. Is this machine online, and does it have Debian's main, or Ubuntu's universe, among its sources?"
    fi
    plan=$(grep -E '^(Inst|Remv) ' "$work/plan" || true)
    local removed
    removed=$(sed -n 's/^Remv \([^ ]*\).*/\1/p' <<<"$plan" | xargs)
    [ -z "$removed" ] ||
        fail "apt-get would remove $removed to install ${missing[*]}, so nothing was done: remove it yourself if you do not need it, or install ${missing_programs[*]} in another way"
}

# The number of bytes that apt-get would download for its arguments, in MB.
megabytes() {
    LC_ALL=C apt-get --print-uris -qq "$@" 2>/dev/null |
        awk '/^\x27/ { bytes += $3 } END { printf "%.0f MB", bytes / 1000000 }'
}

# Says what is going to be installed.
announce_programs() {
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "to install with apt-get: ${missing[*]}"
    echo "    $(grep -c '^Inst ' <<<"$plan") packages with their dependencies, $(megabytes install --no-install-recommends "${missing[@]}") to download"
}

install_programs() {
    [ ${#missing[@]} -gt 0 ] || return 0
    local install=(env LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-remove --no-install-recommends -o DPkg::Lock::Timeout=60 "${missing[@]}")
    require_root
    if ! as_root "${install[@]}" >"$work/log" 2>&1; then
        # The lists may have been older than the archive.
        update_lists && as_root "${install[@]}" >"$work/log" 2>&1 ||
            fail "apt-get can't install ${missing[*]}; is this machine online? ($(grep -m 1 '^E: ' "$work/log" || tail -n 1 "$work/log"))"
    fi
}

# Unpacks the package $1 into the directory $2.
unpack() {
    local download
    download=$(mktemp -d "$work/download.XXXXXX")
    # As root apt would download as a user who may not write here.
    (cd "$download" && ask_apt download -qq -o APT::Sandbox::User=root "$1" >/dev/null) || return 1
    dpkg-deb -x "$download"/*.deb "$2"
}
