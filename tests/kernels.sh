# Sourced by tests/install-guests.sh: kernels for QEMU guests, in directories below $guests as their packages have them, with
# boot/vmlinuz-* and lib/modules. They are not installed. A directory has the kernel's release in its name; linux-demo,
# linux-6.1 and linux-6.12 are links to those that demo and tests boot.

# Where the machine's own kernels are. Tests name another.
system=${VSOCK_SYSTEM:-}
# The kernel packages to fetch, and the links to make: NAME:DIRECTORY.
kernels=()
links=()

# The always-newest kernel packages of Debian and Ubuntu, small ones first.
newest=(linux-image-cloud-amd64 linux-image-6.12-cloud-amd64 linux-image-virtual linux-image-amd64 linux-image-generic)

is_offered() {
    apt-cache policy "$1" 2>/dev/null | grep -q 'Candidate: [0-9]'
}

# Whether the kernel in the directory $1 has the module $2, as a file or built in.
has_module() {
    local modules
    for modules in "$1"/lib/modules/* "$1"/usr/lib/modules/*; do
        [ -z "$(find -L "$modules" -name "$2.ko*" -print -quit 2>/dev/null)" ] || return 0
        ! grep -qs "/$2\.ko" "$modules/modules.builtin" || return 0
    done
    return 1
}

# Whether a guest with the kernel in the directory $1 has a vsock device.
will_do() {
    compgen -G "$1/boot/vmlinuz-*" >/dev/null && has_module "$1" virtio_pci && has_module "$1" vmw_vsock_virtio_transport
}

# The package of the newest kernel whose version begins with $1.
find_kernel() {
    local package name
    if [ "$1" = 6.12. ] && is_offered linux-image-6.12.117+deb12-cloud-amd64; then
        # This one spreads a write of more than 32 KiB over several descriptors.
        echo linux-image-6.12.117+deb12-cloud-amd64
        return
    fi
    for name in "${newest[@]}"; do
        package=$(apt-cache depends "$name" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
        case $package in
        "linux-image-$1"*)
            ! is_offered "$package" || { echo "$package" && return; }
            ;;
        esac
    done
    return 1
}

# Makes a kernel of this machine's own a directory like the others, and prints its name.
adopt_installed() {
    local release image directory
    for release in $(find "$system/lib/modules" -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null | sort -rV); do
        directory=$guests/linux-$release
        for image in "$system/boot/vmlinuz-$release" "$system/lib/modules/$release/vmlinuz"; do
            [ -e "$image" ] && [ ! -e "$directory" ] || continue
            mkdir -p "$work/$release"/{boot,lib/modules}
            ln -s "$system/lib/modules/$release" "$work/$release/lib/modules/$release"
            touch "$work/$release/boot/vmlinuz-$release"
            will_do "$work/$release" || continue
            # Ubuntu lets only root read it.
            cat "$image" 2>/dev/null >"$work/$release/boot/vmlinuz-$release" ||
                as_root cat "$image" >"$work/$release/boot/vmlinuz-$release" || continue
            mv "$work/$release" "$directory"
        done
        ! will_do "$directory" || { basename "$directory" && return; }
    done
    return 1
}

# One that is in $guests.
find_unpacked() {
    local directory
    for directory in "$guests"/linux-[0-9]*; do
        ! will_do "$directory" || { basename "$directory" && return; }
    done
    return 1
}

# Decides which kernel the link linux-$1 shall lead to: one whose version begins with $2, or any, if need be.
plan_kernel() {
    local package= directory=
    ! will_do "$guests/linux-$1" || return 0
    if [ -z "$2" ]; then
        directory=$(find_unpacked || adopt_installed) || true
    fi
    if [ -z "$directory" ] && has_apt; then
        package=$(find_kernel "$2") || { update_lists && package=$(find_kernel "$2"); } || true
    fi
    if [ -z "$directory$package" ] && [ -n "$2" ]; then
        directory=$(find_unpacked || adopt_installed) || true
        [ -n "$directory" ] || ! has_apt || package=$(find_kernel "") || true
        [ -z "$directory$package" ] ||
            echo "note: there is no Linux ${2%.} here; the tests that want it boot ${directory:-$package} instead"
    fi
    [ -n "$directory$package" ] ||
        fail "no kernel with virtio-vsock for the guest: /boot has none that is installed with its modules, and no package source of this machine has Debian's linux-image-cloud-amd64 or Ubuntu's linux-image-virtual"
    if [ -z "$directory" ]; then
        directory=linux-${package#linux-image-}
        will_do "$guests/$directory" || [[ " ${kernels[*]-} " = *" $package "* ]] || kernels+=("$package")
    fi
    links+=("linux-$1:$directory")
}

# The packages of the kernel package $1: Ubuntu has its modules apart.
parts() {
    local release=${1#linux-image-} part
    echo "$1"
    for part in "linux-modules-$release" "linux-modules-extra-$release"; do
        ! is_offered "$part" || echo "$part"
    done
}

# Whether a planned kernel has modules that zstd packed: Debian's packages have not.
have_zstd_modules() {
    local package link
    for package in ${kernels[@]+"${kernels[@]}"}; do
        [[ $package = *-amd64 ]] || return 0
    done
    for link in ${links[@]+"${links[@]}"}; do
        [ -z "$(find -L "$guests/${link#*:}" -name '*.ko.zst' -print -quit 2>/dev/null)" ] || return 0
    done
    return 1
}

announce_kernels() {
    local package
    for package in ${kernels[@]+"${kernels[@]}"}; do
        # shellcheck disable=SC2046
        echo "to unpack into $guests, not install: $package, $(megabytes download $(parts "$package")) to download"
    done
}

# Unpacks the kernel package $1 into a directory that appears only when it is complete.
fetch_kernel() {
    local directory=$guests/linux-${1#linux-image-} unpacked=$work/unpacked part
    ! will_do "$directory" || return 0
    rm -rf "$unpacked"
    mkdir "$unpacked"
    for part in $(parts "$1"); do
        unpack "$part" "$unpacked" || return 1
        ! will_do "$unpacked" || break
    done
    will_do "$unpacked" || fail "$1 has no virtio-vsock"
    rm -rf "$directory"
    mv "$unpacked" "$directory"
}

fetch_kernels() {
    local package
    for package in ${kernels[@]+"${kernels[@]}"}; do
        fetch_kernel "$package" || return 1
    done
}

# Decides on kernels for the pairs NAME VERSION in the arguments.
plan_kernels() {
    kernels=()
    links=()
    local pair
    for pair in "$@"; do
        plan_kernel "${pair%%:*}" "${pair#*:}"
    done
}

# Fetches what is planned, and makes the links.
install_kernels() {
    local link
    # The lists may have been older than the archive.
    fetch_kernels || { update_lists && plan_kernels "$@" && fetch_kernels; } ||
        fail "apt-get can't download ${kernels[*]}; is this machine online?"
    for link in ${links[@]+"${links[@]}"}; do
        rm -rf "$guests/${link%%:*}"
        ln -s "${link#*:}" "$guests/${link%%:*}"
    done
}
