//! What the first `make` on a machine says and does. The machine is made up: in its PATH are only the most common of this one's
//! programs, and in place of Rust, apt-get and the like scripts that note how they were called. Nothing is installed, built or
//! fetched.

mod common;

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::guest::installed;
use tempfile::TempDir;

/// What the smallest Debian has, with make.
const BASE: [&str; 32] = [
    "awk", "basename", "bash", "cat", "chmod", "cp", "cut", "dirname", "echo", "env", "find",
    "grep", "head", "ln", "ls", "make", "mkdir", "mktemp", "mv", "readlink", "realpath", "rm",
    "sed", "sh", "sort", "tail", "touch", "tr", "true", "uniq", "wc", "xargs",
];

/// The packages that the demo takes on a machine that has none of them.
const DEMO_PACKAGES: &str = "qemu-system-x86 ncat busybox-static gcc libc6-dev";

/// Debian 12's kernel.
const DEBIAN: &str = "linux-image-6.1.0-56-cloud-amd64";

/// How a fake program notes that it was called, in the machine's transcript.
const NOTE: &str = r#"echo "CALLED ${0##*/} $*" >>"$MACHINE/transcript""#;

const CARGO: &str = r#"case $1 in
    --version) echo 'cargo 1.95.0 (0 2026-01-01)' ;;
    tree) ;;
    *) exit 1 ;;
esac"#;

const APT_GET: &str = r#"case "$*" in
    -s*) cat "$MACHINE/plan" || { echo "E: Unable to locate package ncat" >&2; exit 100; } ;;
    --print-uris*) echo "'http://archive/package.deb' package.deb 27000000 SHA256:0" ;;
    download*)
        [ ! -e "$MACHINE/offline" ] || { echo "E: Failed to fetch" >&2; exit 100; }
        echo "${!#}" >package.deb ;;
    install*)
        [ ! -e "$MACHINE/offline" ] || { echo "E: Failed to fetch" >&2; exit 100; }
        printf '#!/bin/sh\n' >"$MACHINE/bin/cc"
        chmod +x "$MACHINE/bin/cc" ;;
esac"#;

/// `depends` has lines of an always-newest kernel package and what it depends on.
const APT_CACHE: &str = r#"case $1 in
    depends) sed -n "s/^$2 /  Depends: /p" "$MACHINE/depends" ;;
    policy) grep -qw -- "$2" "$MACHINE/depends" && echo '  Candidate: 1.0' ;;
esac
:"#;

/// Unpacks kernels, Ubuntu's in two parts.
const DPKG_DEB: &str = r#"package=$(cat "$2")
release=${package#linux-*-}
mkdir -p "$3/boot" "$3/lib/modules/$release"
case $package in
    linux-image-*) touch "$3/boot/vmlinuz-$release" ;;
esac
case $package in
    linux-image-*-generic) ;;
    *) touch "$3/lib/modules/$release"/{virtio_pci,vmw_vsock_virtio_transport}.ko ;;
esac"#;

/// A machine on which nothing has been done yet.
struct Machine {
    directory: TempDir,
}

/// What came of a command.
struct Outcome {
    success: bool,
    /// What was written to standard output and which fake programs were called, in the order in which it happened.
    transcript: String,
    errors: String,
}

impl Machine {
    /// A fresh machine, online, with Rust, apt-get and Debian 12's packages.
    fn new() -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let machine = Self { directory };
        fs::create_dir(machine.path("bin")).unwrap();
        for program in BASE {
            symlink(installed(program), machine.path("bin").join(program)).unwrap();
        }
        machine.has("cargo", CARGO);
        machine.has("rustc", "echo 'rustc 1.95.0 (0 2026-01-01)'");
        machine.has("apt-get", APT_GET);
        machine.has("apt-cache", APT_CACHE);
        machine.has("dpkg-deb", DPKG_DEB);
        machine.has("id", "echo 0");
        machine.has("uname", "echo x86_64");
        machine.write("plan", "Inst qemu-system-x86 (1.0)\nInst libfdt1 (1.0)\n");
        machine.write("depends", &format!("linux-image-cloud-amd64 {DEBIAN}\n"));
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Puts a program there.
    fn has(&self, name: &str, script: &str) {
        let path = format!("bin/{name}");
        self.write(&path, &format!("#!/bin/bash\n{NOTE}\n{script}\n"));
        fs::set_permissions(self.path(&path), Permissions::from_mode(0o755)).unwrap();
    }

    fn lacks(&self, name: &str) {
        fs::remove_file(self.path("bin").join(name)).unwrap();
    }

    fn lacks_file(&self, name: &str) {
        fs::remove_file(self.path(name)).unwrap();
    }

    /// All programs that the demo takes.
    fn has_the_demos_programs(&self) {
        for program in ["qemu-system-x86_64", "ncat", "busybox"] {
            self.has(program, "");
        }
        self.has("cc", "cat >/dev/null");
    }

    /// An installed kernel.
    fn has_kernel(&self, release: &str, modules: &[&str]) {
        self.write(&format!("system/boot/vmlinuz-{release}"), "kernel");
        for module in modules {
            self.write(&format!("system/lib/modules/{release}/{module}.ko"), "");
        }
    }

    /// Runs a command in the project.
    fn run(&self, command: &[&str]) -> Outcome {
        let transcript = self.path("transcript");
        let _ = fs::remove_file(&transcript);
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&transcript);
        let status = Command::new(self.path("bin").join(command[0]))
            .args(&command[1..])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env_clear()
            .env("PATH", self.path("bin"))
            .env("HOME", self.directory.path())
            .env("MACHINE", self.directory.path())
            .env("VSOCK_GUESTS", self.path("guests"))
            .env("VSOCK_SYSTEM", self.path("system"))
            .stdin(Stdio::null())
            .stdout(output.unwrap())
            .stderr(File::create(self.path("errors")).unwrap())
            .status();
        let text = |path: &Path| fs::read_to_string(path).unwrap();
        Outcome {
            success: status.unwrap().success(),
            transcript: text(&transcript),
            errors: text(&self.path("errors")),
        }
    }

    fn make(&self, target: &str) -> Outcome {
        self.run(&["make", target])
    }
}

impl Outcome {
    fn called(&self, call: &str) -> bool {
        self.transcript.contains(&format!("CALLED {call}"))
    }

    /// Where in the transcript a text stands.
    fn position(&self, text: &str) -> usize {
        let found = self.transcript.find(text);
        found.unwrap_or_else(|| panic!("no {text:?} in:\n{}{}", self.transcript, self.errors))
    }

    /// It has failed with one line, apart from what `make` says to its end, which has all the parts in it.
    fn assert_says(&self, parts: &[&str]) {
        let all = format!("{}{}", self.transcript, self.errors);
        assert!(!self.success, "{all}");
        let mut lines = self.errors.lines().filter(|line| !line.starts_with("make"));
        let line = lines.next().unwrap_or_default();
        assert!(line.starts_with("error: "), "{all}");
        assert_eq!(lines.next(), None, "{all}");
        for part in parts {
            assert!(line.contains(part), "no {part:?} in:\n{all}");
        }
    }

    /// Nothing was installed, and nothing built.
    fn assert_nothing_done(&self) {
        for call in ["apt-get install", "apt-get download", "cargo build"] {
            assert!(!self.called(call), "{}", self.transcript);
        }
    }
}

#[test]
fn the_demo_says_what_it_installs_then_does_so_then_builds() {
    let demo = Machine::new().make("demo");
    let announced = demo.position(&format!("to install with apt-get: {DEMO_PACKAGES}\n"));
    demo.position("    2 packages with their dependencies, 27 MB to download\n");
    let kernel = demo.position(&format!("not install: {DEBIAN}, 27 MB to download\n"));
    let installed = demo.position("CALLED apt-get install");
    let fetched = demo.position("CALLED apt-get download");
    let built = demo.position("CALLED cargo build");
    let order = [announced, kernel, installed, fetched, built];
    assert!(order.is_sorted(), "{}", demo.transcript);
    let call = demo.transcript[installed..].lines().next().unwrap();
    assert!(call.contains(" --no-remove ") && call.ends_with(DEMO_PACKAGES));
    // All that is known of it was already there.
    assert!(!demo.called("apt-get update"), "{}", demo.transcript);
}

#[test]
fn what_is_there_is_not_installed_again() {
    let machine = Machine::new();
    machine.has_the_demos_programs();
    machine.has_kernel("6.8.0-1", &["virtio_pci", "vmw_vsock_virtio_transport"]);
    for _ in 0..2 {
        let demo = machine.make("demo");
        demo.position("CALLED cargo build");
        assert!(!demo.called("apt-get"), "{}", demo.transcript);
    }
    let kernel = machine.path("guests/linux-demo/boot/vmlinuz-6.8.0-1");
    assert_eq!(fs::read_to_string(kernel).unwrap(), "kernel");
}

#[test]
fn a_kernel_without_vsock_is_not_taken() {
    let machine = Machine::new();
    machine.has_the_demos_programs();
    machine.has_kernel("6.8.0-1", &["virtio_pci"]);
    let demo = machine.make("demo");
    assert!(!demo.called("apt-get install"), "{}", demo.transcript);
    demo.position("CALLED apt-get download");
    demo.position("CALLED cargo build");
}

#[test]
fn a_machine_without_apt_needs_no_apt_where_all_is_there() {
    let machine = Machine::new();
    machine.lacks("apt-get");
    machine.lacks("apt-cache");
    let demo = machine.make("demo");
    demo.assert_says(&["qemu-system-x86_64 ncat busybox cc", "no apt-get"]);
    demo.assert_nothing_done();

    machine.has_the_demos_programs();
    let demo = machine.make("demo");
    demo.assert_says(&["no kernel with virtio-vsock"]);
    demo.assert_nothing_done();

    // Fedora and Arch Linux have it there.
    machine.has_kernel("6.9.1", &["virtio_pci", "vmw_vsock_virtio_transport"]);
    fs::rename(
        machine.path("system/boot/vmlinuz-6.9.1"),
        machine.path("system/lib/modules/6.9.1/vmlinuz"),
    )
    .unwrap();
    machine.make("demo").position("CALLED cargo build");
}

#[test]
fn ubuntus_kernels_have_their_modules_apart() {
    let machine = Machine::new();
    let lines = [
        "linux-image-virtual linux-image-6.8.0-45-generic",
        "linux-image-6.8.0-45-generic linux-modules-6.8.0-45-generic",
    ];
    machine.write("depends", &lines.join("\n"));
    let demo = machine.make("demo");
    demo.position(&format!("{DEMO_PACKAGES} zstd\n"));
    demo.position("not install: linux-image-6.8.0-45-generic");
    demo.position("CALLED cargo build");
    let modules = machine.path("guests/linux-demo/lib/modules/6.8.0-45-generic");
    assert!(modules.join("virtio_pci.ko").exists());
}

#[test]
fn tests_boot_another_kernel_where_debians_is_not_offered() {
    let machine = Machine::new();
    machine.has_the_demos_programs();
    for program in [
        "linux.uml",
        "socat",
        "nc.openbsd",
        "insmod",
        "ssh",
        "iperf3",
        "curl",
        "dbus-daemon",
        "busctl",
    ] {
        let _ = fs::remove_file(machine.path("bin").join(program));
        machine.has(program, "");
    }
    // Debian 13's.
    let newer = "linux-image-6.12.118+deb13-cloud-amd64";
    machine.write("depends", &format!("linux-image-cloud-amd64 {newer}\n"));
    machine.write("guests/sshd/usr/sbin/sshd", "");
    let guests = machine.run(&["bash", "tests/install-guests.sh", "guests"]);
    assert!(guests.success, "{}{}", guests.transcript, guests.errors);
    guests.position(&format!(
        "note: there is no Linux 6.1 here; the tests that want it boot {newer}"
    ));
    let announced = format!("not install: {newer}");
    assert_eq!(guests.transcript.matches(&announced).count(), 1);
    for version in ["6.1", "6.12"] {
        let link = fs::read_link(machine.path(&format!("guests/linux-{version}"))).unwrap();
        assert_eq!(link, Path::new("linux-6.12.118+deb13-cloud-amd64"));
    }
}

#[test]
fn nothing_is_removed() {
    let machine = Machine::new();
    machine.write("plan", "Remv qemu-utils [10]\nInst qemu-system-x86 (1.0)\n");
    let demo = machine.make("demo");
    demo.assert_says(&["apt-get would remove qemu-utils", "nothing was done"]);
    demo.assert_nothing_done();
}

#[test]
fn a_machine_without_network_is_asked_about_it() {
    let machine = Machine::new();
    machine.lacks_file("plan");
    let demo = machine.make("demo");
    demo.position("CALLED apt-get update");
    demo.assert_says(&["Unable to locate package ncat", "Is this machine online"]);
    demo.assert_nothing_done();

    // Its lists are of yesterday.
    let machine = Machine::new();
    machine.write("offline", "");
    let demo = machine.make("demo");
    demo.assert_says(&["can't install qemu-system-x86", "online?"]);
    assert!(!demo.called("cargo build"), "{}", demo.transcript);

    machine.has_the_demos_programs();
    let demo = machine.make("demo");
    demo.assert_says(&["can't download linux-image", "online?"]);
    assert!(!demo.called("cargo build"), "{}", demo.transcript);
}

#[test]
fn who_is_not_root_takes_sudo() {
    let machine = Machine::new();
    machine.has("id", "echo 1000");
    let demo = machine.make("demo");
    let by_hand = format!("apt-get install --no-install-recommends {DEMO_PACKAGES}`");
    demo.assert_says(&["there is no sudo", &by_hand]);
    demo.assert_nothing_done();

    machine.has("sudo", "exit 1");
    let demo = machine.make("demo");
    demo.assert_says(&["sudo refused", &by_hand]);
    demo.assert_nothing_done();

    machine.has("sudo", "exec \"$@\"");
    let demo = machine.make("demo");
    demo.position("CALLED sudo env");
    demo.position("CALLED apt-get install");
    demo.position("CALLED cargo build");
}

#[test]
fn guests_are_of_one_kind_of_processor() {
    let machine = Machine::new();
    machine.has("uname", "echo aarch64");
    let demo = machine.make("demo");
    demo.assert_says(&["x86-64", "aarch64"]);
    demo.assert_nothing_done();
}

#[test]
fn without_rust_there_is_one_line() {
    let needed = format!("Rust {} or newer", env!("CARGO_PKG_RUST_VERSION"));
    for target in ["demo", "test", "build", "deb", "bench", "soak", "manual"] {
        let machine = Machine::new();
        machine.lacks("cargo");
        machine.lacks("rustc");
        let outcome = machine.make(target);
        outcome.assert_says(&["no Rust", &needed, "https://rustup.rs"]);
        outcome.assert_nothing_done();
    }
}

#[test]
fn an_installed_rust_that_is_not_in_the_path_is_pointed_out() {
    let machine = Machine::new();
    fs::create_dir_all(machine.path(".cargo/bin")).unwrap();
    fs::rename(machine.path("bin/cargo"), machine.path(".cargo/bin/cargo")).unwrap();
    let demo = machine.make("demo");
    demo.assert_says(&["not in the PATH", "/.cargo/env"]);
    demo.assert_nothing_done();
}

#[test]
fn an_old_rust_is_one_line() {
    let machine = Machine::new();
    machine.has("rustc", "echo 'rustc 1.63.0 (0 2022-01-01)'");
    let demo = machine.make("demo");
    demo.assert_says(&["Rust 1.95 or newer", "1.63.0", "https://rustup.rs"]);
    demo.assert_nothing_done();

    machine.has("rustup", "");
    let demo = machine.make("demo");
    demo.assert_says(&["1.63.0", "rustup update stable"]);
    demo.assert_nothing_done();
}

#[test]
fn a_newer_rust_is_taken() {
    let machine = Machine::new();
    machine.has("rustc", "echo 'rustc 1.103.0 (0 2027-01-01)'");
    machine.make("demo").position("CALLED cargo build");
}

#[test]
fn a_rustup_without_toolchain_is_one_line() {
    let machine = Machine::new();
    machine.has(
        "cargo",
        "echo \"error: toolchain 'stable' is not installed\" >&2; echo 'help: more' >&2; exit 1",
    );
    let demo = machine.make("demo");
    demo.assert_says(&[
        "'stable' is not installed",
        "rustup toolchain install stable",
    ]);
    demo.assert_nothing_done();
}

#[test]
fn crates_that_cant_be_fetched_are_one_line() {
    let machine = Machine::new();
    machine.has(
        "cargo",
        "[ $1 = --version ] || { printf 'error: no\\n\\nCaused by:\\n  no host\\n' >&2; exit 101; }",
    );
    let demo = machine.make("demo");
    demo.assert_says(&["can't fetch the crates", "online?", "(no host)"]);
    demo.assert_nothing_done();
}

#[test]
fn a_build_without_a_linker_is_one_line() {
    let build = Machine::new().make("build");
    build.assert_says(&["no C compiler", "apt-get install gcc libc6-dev"]);
    build.assert_nothing_done();
}

#[test]
fn a_package_without_dependencies_is_not_made() {
    let machine = Machine::new();
    machine.has("cc", "");
    let deb = machine.make("deb");
    deb.assert_says(&["dpkg-shlibdeps", "apt-get install dpkg-dev"]);
    deb.assert_nothing_done();
}
