//! What `make install` and `make deb` put where, and that it works there.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use common::daemon::{Daemon, binary};
use common::guest::installed;
use common::sim::host::assert_serves;
use common::sim::{Setup, SimGuest};
use nix::unistd::{getegid, geteuid};
use tempfile::TempDir;

const NAME: &str = "vhost-user-vsock";

/// What is installed, below the prefix, but for the programs. README and manual name these places.
const FILES: [&str; 16] = [
    "lib/systemd/system/vhost-user-vsock-host@.socket",
    "lib/systemd/system/vhost-user-vsock-metrics.service",
    "lib/systemd/system/vhost-user-vsock-metrics.timer",
    "lib/systemd/system/vhost-user-vsock-vmm@.socket",
    "lib/systemd/system/vhost-user-vsock@.service",
    "lib/systemd/user/vhost-user-vsock@.service",
    "lib/sysusers.d/vhost-user-vsock.conf",
    "share/bash-completion/completions/vhost-user-vsock",
    "share/doc/vhost-user-vsock/examples/alerts.yml",
    "share/doc/vhost-user-vsock/examples/libvirt-hook",
    "share/doc/vhost-user-vsock/examples/vhost-user-vsock-part-of-vm.conf",
    "share/doc/vhost-user-vsock/examples/vm@.service",
    "share/fish/vendor_completions.d/vhost-user-vsock.fish",
    "share/man/man1/vhost-user-vsock.1",
    "share/qemu/vhost-user/50-vhost-user-vsock.json",
    "share/zsh/site-functions/_vhost-user-vsock",
];

/// How long a machine with systemd may take to start, and again for all that the test has it do.
const BOOT: Duration = Duration::from_secs(150);

/// The output of a program that must succeed.
fn output(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.stdin(Stdio::null()).output().unwrap();
    let stdout = String::from_utf8(stdout).unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout
}

fn make(arguments: &[&str]) {
    output(
        Command::new(installed("make"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(arguments)
            // This test may itself be a part of a `make`, whose options are not for this one.
            .env_remove("MAKEFLAGS")
            .env_remove("CARGO_TARGET_DIR"),
    );
}

/// What `make deb` has made of all this. It replaces the binary, so no test goes on before.
fn package() -> PathBuf {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| make(&["deb"]));
    target("vhost-user-vsock.deb")
}

fn target(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target")
        .join(name)
}

/// The manual, as it reads on a terminal of endless width.
fn manual() -> String {
    package();
    let page = target("manual").join(format!("{NAME}.1"));
    let text = output(
        Command::new(installed("man"))
            .env("MANWIDTH", "10000")
            .env("MANPAGER", "cat")
            .arg("-l")
            .arg(page),
    );
    // As a printer would make characters bold.
    let mut plain = String::new();
    for character in text.chars() {
        match character {
            '\x08' => drop(plain.pop()),
            other => plain.push(other),
        }
    }
    plain.replace('\u{2010}', "-")
}

/// The files below a directory, by their paths from there.
fn files(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(next) = directories.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let path = path.strip_prefix(directory).unwrap();
                found.insert(path.to_str().unwrap().to_owned());
            }
        }
    }
    found
}

#[test]
fn make_installs_below_the_prefix_and_takes_it_away_again() {
    package();
    let directory = TempDir::new().unwrap();
    let root = directory.path();
    let destination = format!("DESTDIR={}", root.display());
    let arguments = [destination.as_str(), "PREFIX=/opt/vsock"];
    make(&[&["install"], &arguments[..]].concat());
    let mut expected = BTreeSet::from(FILES.map(|file| format!("opt/vsock/{file}")));
    expected.insert(format!("opt/vsock/bin/{NAME}"));
    assert_eq!(files(root), expected);

    let read = |file: &str| fs::read_to_string(root.join("opt/vsock").join(file)).unwrap();
    for file in FILES {
        let text = read(file);
        assert!(!text.contains("@bindir@"), "{file}");
        assert!(!text.contains("@datadir@"), "{file}");
    }
    let service = read("lib/systemd/system/vhost-user-vsock@.service");
    assert!(service.contains("\nExecStart=/opt/vsock/bin/vhost-user-vsock "));

    // What QEMU's schema VhostUserBackend wants, and what the program says of itself.
    let json = read("share/qemu/vhost-user/50-vhost-user-vsock.json");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["binary"], "/opt/vsock/bin/vhost-user-vsock");
    assert!(json["description"].is_string());
    let program = root.join("opt/vsock/bin").join(NAME);
    let said = output(Command::new(program).arg("--print-capabilities"));
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(json["type"], said["type"]);

    make(&[&["uninstall"], &arguments[..]].concat());
    assert_eq!(files(root), BTreeSet::new());
}

#[test]
fn cargo_installs_the_program() {
    package();
    let directory = TempDir::new().unwrap();
    output(
        Command::new(env!("CARGO"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["install", "--locked", "--path", ".", "--root"])
            .arg(directory.path())
            .env_remove("CARGO_TARGET_DIR"),
    );
    let program = directory.path().join("bin").join(NAME);
    assert!(output(Command::new(program).arg("--version")).starts_with(NAME));
}

#[test]
fn the_manual_has_no_mistake_in_its_form() {
    package();
    let page = target("manual").join(format!("{NAME}.1"));
    let mandoc = Command::new(installed("mandoc"))
        .args(["-T", "lint", "-W", "warning"])
        .arg(page)
        .output()
        .unwrap();
    let found = String::from_utf8(mandoc.stdout).unwrap();
    assert!(mandoc.status.success() && found.is_empty(), "{found}");
}

#[test]
fn the_manual_names_all_options_and_counters() {
    let manual = manual();
    let help = output(Command::new(binary()).arg("--help"));
    let words = |text: &str| -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c));
        words.map(str::to_owned).collect()
    };
    let (known, named) = (words(&help), words(&manual));
    let options = known.iter().filter(|word| word.starts_with("--"));
    for option in options.clone() {
        assert!(named.contains(option), "{option}");
    }
    assert!(options.count() > 10);

    let directory = TempDir::new().unwrap();
    let stats = directory.path().join("stats");
    let daemon = Daemon::start_with(&["--stats-path", stats.to_str().unwrap()]);
    // Some of the counters stand for connections.
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let _connection = common::sim::host::from_host(&daemon, &mut guest, 7);
    let mut text = String::new();
    UnixStream::connect(&stats)
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    let counters = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let counters: Vec<&str> = counters.filter_map(|rest| rest.split(' ').next()).collect();
    for counter in &counters {
        assert!(named.contains(*counter), "{counter}");
    }
    assert!(counters.len() > 20, "{text}");
}

#[test]
fn shells_complete_what_is_typed() {
    package();
    let directory = target("manual");
    let file = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    // The arguments are the words of the line. There is no line to change, which compopt complains of.
    let bash = r#". "$1"; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        [[ $(complete -p vhost-user-vsock) =~ -F\ ([^ ]+) ]]
        ${BASH_REMATCH[1]} vhost-user-vsock "${@: -1}" "${@: -2:1}" 2>/dev/null
        echo "${COMPREPLY[@]}""#;
    let bash = |words: &[&str]| {
        output(
            Command::new("bash")
                .args(["-c", bash, "bash"])
                .arg(file("vhost-user-vsock.bash"))
                .args(words)
                .current_dir("/"),
        )
    };
    let fish = "source $argv[1]; complete --do-complete $argv[2]";
    let fish = |words: &[&str]| {
        output(
            Command::new(installed("fish"))
                .args(["--no-config", "-c", fish])
                .arg(file("vhost-user-vsock.fish"))
                .arg(words.join(" "))
                .current_dir("/"),
        )
    };
    type Complete<'c> = &'c dyn Fn(&[&str]) -> String;
    for complete in [&bash as Complete<'_>, &fish] {
        let completed = complete(&["vhost-user-vsock", "--so"]);
        for option in ["--socket", "--socket-mode", "--socket-group"] {
            assert!(completed.contains(option), "{completed}");
        }
        let completed = complete(&["vhost-user-vsock", "stats", "--"]);
        for option in ["--all", "--format", "--watch"] {
            assert!(completed.contains(option), "{completed}");
        }
        let completed = complete(&["vhost-user-vsock", "--socket", "/et"]);
        assert!(completed.contains("/etc"), "{completed}");
        // A number is no file.
        let completed = complete(&["vhost-user-vsock", "--guest-cid", ""]);
        assert_eq!(completed.trim(), "");
    }
    // Its completions take a terminal. Here it only reads them.
    let zsh = "autoload -Uz compinit && compinit -D -u && . \"$1\" && whence -w _vhost-user-vsock";
    let zsh = output(
        Command::new(installed("zsh"))
            .args(["-f", "-c", zsh, "zsh"])
            .arg(file("_vhost-user-vsock")),
    );
    assert_eq!(zsh, "_vhost-user-vsock: function\n");
}

#[test]
fn the_package_has_news_of_this_version() {
    let news =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/debian/changelog"));
    let version = concat!(
        env!("CARGO_PKG_NAME"),
        " (",
        env!("CARGO_PKG_VERSION"),
        "-1) "
    );
    assert!(news.unwrap().starts_with(version), "no entry for {version}");
}

/// A field of the package's control file.
fn field(name: &str) -> String {
    let mut dpkg = Command::new(installed("dpkg-deb"));
    output(dpkg.arg("--field").arg(package()).arg(name))
}

#[test]
fn the_package_says_what_it_is_and_what_it_takes() {
    let description = field("Description");
    let synopsis = description.lines().next().unwrap();
    // Whole, and as Debian wants it.
    assert_eq!(synopsis, env!("CARGO_PKG_DESCRIPTION"));
    assert!(synopsis.len() < 80 && !synopsis.ends_with('.'));
    assert!(!synopsis.starts_with("A ") && !synopsis.starts_with("The "));
    assert_eq!(field("Homepage").trim(), env!("CARGO_PKG_HOMEPAGE"));
    assert_eq!(field("Maintainer").trim(), env!("CARGO_PKG_AUTHORS"));
    assert!(field("Depends").contains("libc6 (>= "));
    let news = output(
        Command::new("tail")
            .args(["-n", "1", "dist/debian/changelog"])
            .current_dir(env!("CARGO_MANIFEST_DIR")),
    );
    let maintainer = format!(" -- {}  ", env!("CARGO_PKG_AUTHORS"));
    assert!(news.starts_with(&maintainer), "{news}");
}

/// The programs of ours that README's commands call, with or without a prompt before them.
fn programs_of_the_readme() -> BTreeSet<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"));
    let mut programs = BTreeSet::new();
    for block in text.unwrap().split("```sh\n").skip(1) {
        let block = &block[..block.find("```").unwrap()];
        for word in block.split([' ', '\n', '\'', '"', '(', '|', ';']) {
            let word = word.rsplit_once('/').map_or(word, |(_, name)| name);
            let in_name = |c: char| c.is_ascii_lowercase() || c == '-';
            if word.starts_with("vhost-user-") && word.chars().all(in_name) {
                programs.insert(word.to_owned());
            }
        }
    }
    programs
}

#[test]
fn programs_that_the_readme_calls_are_in_the_package() {
    let listing = output(
        Command::new(installed("dpkg-deb"))
            .arg("--contents")
            .arg(package()),
    );
    let programs = programs_of_the_readme();
    assert!(programs.contains(NAME));
    for program in programs {
        let path = format!(" ./usr/bin/{program}");
        let file = listing.lines().find(|line| line.ends_with(&path));
        let file = file.unwrap_or_else(|| panic!("no {program} in\n{listing}"));
        assert!(file.starts_with("-rwxr-xr-x "), "{file}");
    }
}

#[test]
fn lintian_finds_no_error_in_the_package() {
    let lintian = Command::new(installed("lintian"))
        .args(["--allow-root", "--fail-on", "error"])
        .arg(package())
        .output()
        .unwrap();
    let found = String::from_utf8_lossy(&lintian.stdout);
    assert!(lintian.status.success(), "{found}");
}

/// Installs the package, runs daemons as services, and removes it, under a systemd that leaves this machine as it is. A
/// container may allow no systemd: then what `service` shows without one must do, and that is said past the test's capture.
#[test]
fn services_start_serve_end_and_leave_nothing() {
    let directory = TempDir::with_prefix_in("vsock-test-", "/dev/shm").unwrap();
    let at = |name: &str| directory.path().join(name);
    // In memory, as /run is: elsewhere systemd does not remove the files in a runtime directory.
    let sockets = TempDir::with_prefix_in("sockets-", &directory).unwrap();
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut probe = Command::new(scripts.join("machine.sh"));
    let probe = probe.arg("--probe").output().unwrap();
    if !probe.status.success() {
        let why = String::from_utf8_lossy(&probe.stderr);
        let message = format!("NOT RUN under systemd, which this system does not allow: {why}\n");
        return io::stderr().write_all(message.as_bytes()).unwrap();
    }
    fs::copy(package(), at("vhost-user-vsock.deb")).unwrap();
    fs::copy(scripts.join("service.sh"), at("service.sh")).unwrap();
    if !geteuid().is_root() {
        // The one that this test connects to is our own.
        let (user, group) = (geteuid(), getegid());
        let user = format!("[Service]\nUser={user}\nGroup={group}\n");
        fs::write(at("user"), user).unwrap();
    }
    let served = at("served");
    let log = File::create(at("log")).unwrap();
    let mut command = Command::new(scripts.join("machine.sh"));
    command.arg(at("service.sh"));
    fs::write(sockets.path().join("log"), "").unwrap();
    let machine = Daemon::start_by(&mut command, sockets, log, BOOT);
    assert_serves(&machine, &mut SimGuest::start(&machine, Setup::default()));
    File::create(served).unwrap();
    let status = machine.wait_exit();
    // It is gone with the runtime directory.
    fs::write(machine.directory().join("log"), "").unwrap();
    let log = fs::read_to_string(at("log")).unwrap();
    assert_eq!(status.code(), Some(0), "{log}");
}
