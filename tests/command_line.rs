//! The daemon as a program: its options, error messages, sockets and exit.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::daemon::{Daemon, binary, eventually};
use common::tracer::Traced;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::Pid;
use tempfile::TempDir;

const USE: Option<i32> = Some(2);
const FAILURE: Option<i32> = Some(1);

/// The system call with which the standard library removes a file.
#[cfg(target_arch = "x86_64")]
const UNLINK: i64 = libc::SYS_unlink;
#[cfg(not(target_arch = "x86_64"))]
const UNLINK: i64 = libc::SYS_unlinkat;

fn run(args: &[&str]) -> Output {
    Command::new(binary()).args(args).output().unwrap()
}

/// Runs the daemon with three options of which at least one is wrong.
fn start(cid: &str, socket: &Path, uds_path: &Path, more: &[&str]) -> Output {
    let socket = socket.to_str().unwrap();
    let uds_path = uds_path.to_str().unwrap();
    let cid = format!("--guest-cid={cid}");
    let options = [&cid, "--socket", socket, "--uds-path", uds_path];
    run(&[&options, more].concat())
}

#[track_caller]
fn assert_refused(output: &Output, code: Option<i32>, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), code, "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one clear line: {stderr}");
    assert!(lines[0].starts_with("vhost-user-vsock: "), "{stderr}");
    assert!(lines[0].contains(message), "{stderr} should say {message}");
    assert!(output.stdout.is_empty());
}

#[test]
fn the_help_has_an_example_and_the_version_is_printed() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for text in [
        "--guest-cid=4 --socket=/tmp/vhost4.socket --uds-path=/tmp/vm4.vsock",
        "--tx-buffer-size",
        "[default: 262144]",
        "--queue-size",
        "--max-connections",
        "--busy-poll",
        "--sandbox",
        "--socket-mode",
        "--socket-group",
        "--verbose",
        "CONNECT 1234",
        "vhost-user-vsock-pci",
    ] {
        assert!(help.contains(text), "{text}");
    }
    let version = String::from_utf8(run(&["--version"]).stdout).unwrap();
    assert_eq!(
        version,
        format!("vhost-user-vsock {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn misspelled_and_missing_options_are_named() {
    assert_refused(
        &run(&["--guest-cid=4", "--sokcet=/tmp/x"]),
        USE,
        "'--sokcet'",
    );
    assert_refused(
        &run(&["--guest-cid=4", "--sokcet=/tmp/x"]),
        USE,
        "'--sokcet' found; a similar argument exists: '--socket'",
    );
    assert_refused(&run(&["--guest-cid=4"]), USE, "--socket <SOCKET>");
    assert_refused(&run(&["surplus"]), USE, "'surplus'");
}

#[test]
fn wrong_values_are_refused() {
    let directory = TempDir::new().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("uds"));
    for cid in ["0", "1", "2", "4294967295", "18446744073709551615"] {
        assert_refused(&start(cid, &socket, &uds, &[]), USE, "from 3 to 4294967294");
    }
    for cid in ["four", "-1", "18446744073709551616", ""] {
        assert_refused(&start(cid, &socket, &uds, &[]), USE, "--guest-cid");
    }
    for wrong in [
        "--tx-buffer-size=0",
        "--tx-buffer-size=4294967295",
        "--tx-buffer-size=much",
        "--queue-size=0",
        "--queue-size=1000",
        "--queue-size=65536",
        "--max-connections=0",
        "--busy-poll=1000000",
        "--sandbox=on",
        "--socket-mode=0800",
        "--socket-mode=1777",
        "--socket-mode=rw",
        "--socket-group=no such group",
        "--socket-group=4294967295",
    ] {
        let option = wrong.split('=').next().unwrap();
        assert_refused(&start("4", &socket, &uds, &[wrong]), USE, option);
    }
    for size in ["0", "3", "32769", "65536", "70000", "18446744073709551615"] {
        let wrong = format!("--queue-size={size}");
        let message = format!("{wrong}: a ring has a power of two from 2 to 32768 entries");
        assert_refused(&start("4", &socket, &uds, &[&wrong]), USE, &message);
    }
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        0,
        "nothing is created"
    );
}

#[test]
fn wrong_paths_are_refused() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let long = |len: usize| path(&"x".repeat(len - directory.path().as_os_str().len() - 1));
    let short = path("short");
    assert_refused(
        &start("4", &long(108), &short, &[]),
        USE,
        "the limit is 107",
    );
    assert_refused(&start("4", &short, &long(97), &[]), USE, "the limit is 96");
    assert_refused(&start("4", &short, &short, &[]), USE, "its own");
    assert_refused(
        &start("4", &path("no/socket"), &short, &[]),
        USE,
        "does not exist",
    );
    assert_refused(
        &start("4", &short, &path("no/uds"), &[]),
        USE,
        "does not exist",
    );
    let file = path("file");
    fs::write(&file, "").unwrap();
    let message = format!("{} is not a directory", file.display());
    for below in ["socket", "deeper/socket"] {
        let below = file.join(below);
        assert_refused(&start("4", &below, &short, &[]), USE, &message);
        assert_refused(&start("4", &short, &below, &[]), USE, &message);
    }
    fs::remove_file(&file).unwrap();
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        0,
        "nothing is created"
    );
}

#[test]
fn a_file_in_the_way_is_never_touched() {
    let directory = TempDir::new().unwrap();
    let (file, free) = (directory.path().join("file"), directory.path().join("free"));
    fs::write(&file, "precious").unwrap();
    assert_refused(&start("4", &file, &free, &[]), FAILURE, "not a socket");
    assert_refused(&start("4", &free, &file, &[]), FAILURE, "not a socket");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert!(!free.exists(), "what was created before is removed");
}

#[test]
fn a_directory_where_no_socket_can_be_created_is_a_failure() {
    assert_refused(
        &start("4", Path::new("/proc/vhost"), Path::new("/proc/uds"), &[]),
        FAILURE,
        "/proc/vhost",
    );
}

#[test]
fn a_path_of_another_daemon_is_refused_and_the_other_lives() {
    let daemon = Daemon::start();
    let free = daemon.directory().join("free");
    let in_use = "another daemon";
    assert_refused(
        &start("5", &daemon.vhost_socket(), &free, &[]),
        FAILURE,
        in_use,
    );
    assert_refused(&start("5", &free, &daemon.uds_path(), &[]), FAILURE, in_use);
    daemon.assert_alive();
    UnixStream::connect(daemon.uds_path()).unwrap();
    drop(UnixStream::connect(daemon.vhost_socket()).unwrap());
    // VMMs are served in their order: any that came before would be in the log by now.
    eventually("the VMM to be gone", || {
        daemon.log().contains("the VMM disconnected")
    });
    assert_eq!(daemon.log().matches("a VMM connected").count(), 1);
}

#[test]
fn sockets_of_a_dead_daemon_are_replaced() {
    let directory = TempDir::new().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("uds"));
    drop(UnixListener::bind(&socket).unwrap());
    drop(UnixListener::bind(&uds).unwrap());
    let mut daemon = Command::new(binary())
        .arg("--guest-cid=4")
        .args(["--socket", socket.to_str().unwrap()])
        .args(["--uds-path", uds.to_str().unwrap()])
        .spawn()
        .unwrap();
    eventually("the sockets to be served", || {
        UnixStream::connect(&socket).is_ok() && UnixStream::connect(&uds).is_ok()
    });
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn of_daemons_that_start_at_once_one_lives() {
    let directory = TempDir::new().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("uds"));
    for _ in 0..10 {
        // A dead socket file, which all of them try to replace.
        drop(UnixListener::bind(&socket));
        let mut daemons: Vec<_> = (0..4)
            .map(|_| {
                Command::new(binary())
                    .arg("--guest-cid=4")
                    .args(["--socket", socket.to_str().unwrap()])
                    .args(["--uds-path", uds.to_str().unwrap()])
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap()
            })
            .collect();
        eventually("all but one to exit", || {
            let ended = |daemon: &mut std::process::Child| daemon.try_wait().unwrap().is_some();
            daemons
                .iter_mut()
                .filter_map(|daemon| ended(daemon).then_some(()))
                .count()
                == 3
        });
        UnixStream::connect(&socket).unwrap();
        UnixStream::connect(&uds).unwrap();
        for daemon in &mut daemons {
            let _ = daemon.kill();
            daemon.wait().unwrap();
        }
    }
}

#[test]
fn signals_end_it_and_remove_the_sockets() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let daemon = Daemon::start();
        assert!(
            fs::metadata(daemon.uds_path())
                .unwrap()
                .file_type()
                .is_socket()
        );
        daemon.signal(signal);
        assert_eq!(daemon.wait_exit().code(), Some(0), "{signal}");
        assert!(!daemon.uds_path().exists());
        assert!(!daemon.vhost_socket().exists());
    }
}

/// A successor that starts meanwhile must not take the file for a dead one and replace it, only to lose its own.
#[test]
fn a_stopping_daemon_removes_its_sockets_while_they_listen_and_under_the_lock() {
    let mut daemon = Traced::signalled(Signal::SIGTERM);
    let directory = daemon.uds_path().parent().unwrap().to_owned();
    let sockets = [daemon.vhost_socket(), daemon.uds_path()];
    let links = ["vhost.link", "uds.link"].map(|name| directory.join(name));
    for (socket, link) in sockets.iter().zip(&links) {
        fs::hard_link(socket, link).unwrap();
    }
    let lock = fs::File::open(&directory).unwrap();
    for (socket, link) in sockets.iter().zip(&links) {
        daemon.run_to(UNLINK);
        assert!(!socket.exists(), "{}", socket.display());
        UnixStream::connect(link).expect("the socket to listen");
        assert!(lock.try_lock().is_err(), "the directory is not locked");
    }
    assert_eq!(daemon.wait_exit().code(), Some(0));
    lock.try_lock().unwrap();
}

#[test]
fn a_signal_ends_it_while_a_silent_vmm_is_connected() {
    let daemon = Daemon::start();
    let _vmm = UnixStream::connect(daemon.vhost_socket()).unwrap();
    eventually("the VMM to be served", || {
        daemon.log().contains("a VMM connected")
    });
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(!daemon.vhost_socket().exists());
}

#[test]
fn the_log_has_lines_for_the_version_the_start_each_vmm_and_the_end() {
    let daemon = Daemon::start();
    drop(UnixStream::connect(daemon.vhost_socket()).unwrap());
    eventually("the VMM to be gone", || {
        daemon.log().contains("the VMM disconnected")
    });
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let log = daemon.log();
    assert_eq!(log.lines().count(), 5, "{log}");
    let version = format!("] vhost-user-vsock {}", env!("CARGO_PKG_VERSION"));
    assert!(log.lines().next().unwrap().ends_with(&version), "{log}");
    assert!(log.contains("CID 4: waiting for a VMM at"), "{log}");
    assert!(log.contains(daemon.uds_path().to_str().unwrap()), "{log}");
}

#[test]
fn a_full_disk_under_the_log_stops_nothing() {
    let full = || {
        fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let mistaken = Command::new(binary())
        .arg("--sokcet")
        .stderr(full())
        .status();
    assert_eq!(mistaken.unwrap().code(), USE);

    let directory = TempDir::new().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("uds"));
    let mut daemon = Command::new(binary())
        .args(["--guest-cid=4", "-vv"])
        .args(["--socket", socket.to_str().unwrap()])
        .args(["--uds-path", uds.to_str().unwrap()])
        .stderr(full())
        .spawn()
        .unwrap();
    eventually("the sockets to be served", || {
        UnixStream::connect(&socket).is_ok() && UnixStream::connect(&uds).is_ok()
    });
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
    assert!(!uds.exists());
}

/// Runs a daemon with a variable in its environment until it serves, then stops it.
fn serve_with(variable: (&str, &OsStr), stderr: impl Into<Stdio>) -> Option<i32> {
    let directory = TempDir::new().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("uds"));
    let mut daemon = Command::new(binary())
        .arg("--guest-cid=4")
        .args(["--socket", socket.to_str().unwrap()])
        .args(["--uds-path", uds.to_str().unwrap()])
        .env(variable.0, variable.1)
        .stderr(stderr)
        .spawn()
        .unwrap();
    eventually("the sockets to be served", || {
        UnixStream::connect(&uds).is_ok()
    });
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    daemon.wait().unwrap().code()
}

#[test]
fn a_mistake_in_rust_log_is_one_line_of_the_log() {
    for (filter, mistake) in [
        ("=[=(,,".as_ref(), "invalid logging spec '=[=('"),
        ("vhost_user_vsock=loud".as_ref(), "'loud'"),
        ("info/a/b".as_ref(), "too many '/'"),
        (OsStr::from_bytes(b"\xff"), "not UTF-8"),
    ] {
        let mut log = tempfile::tempfile().unwrap();
        let code = serve_with(("RUST_LOG", filter), log.try_clone().unwrap());
        assert_eq!(code, Some(0), "{filter:?}");
        let mut text = String::new();
        log.seek(SeekFrom::Start(0)).unwrap();
        log.read_to_string(&mut text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let what = "the version, the mistake, the start and the end";
        assert_eq!(lines.len(), 4, "{what}: {text}");
        assert!(lines[1].contains("RUST_LOG is ignored: "), "{text}");
        assert!(lines[1].contains(mistake), "{text}");

        let full = fs::OpenOptions::new().write(true).open("/dev/full");
        let code = serve_with(("RUST_LOG", filter), full.unwrap());
        assert_eq!(code, Some(0), "{filter:?} on a full disk");
    }
}

#[test]
fn the_limit_of_descriptors_is_raised() {
    let daemon = Daemon::start();
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let numbers: Vec<&str> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers[0], numbers[1], "soft and hard limit");
}

#[test]
fn capabilities_are_printed_whatever_the_other_options() {
    for args in [
        &["--print-capabilities"][..],
        &["--nonsense", "--print-capabilities"],
    ] {
        let output = run(args);
        assert!(output.status.success());
        let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(capabilities, serde_json::json!({ "type": "vsock" }));
    }
}

#[test]
fn the_form_of_vhost_device_vsock_and_the_name_of_qemu_are_understood() {
    let directory = TempDir::new().unwrap();
    let (socket, uds_path) = (directory.path().join("vhost"), directory.path().join("uds"));
    let vm = format!(
        "guest-cid=4,socket={},uds-path={}",
        socket.display(),
        uds_path.display()
    );
    let conventional = format!("--socket-path={}", socket.display());
    let uds = format!("--uds-path={}", uds_path.display());
    for args in [&["--vm", &vm][..], &["--guest-cid=4", &conventional, &uds]] {
        let mut daemon = Command::new(binary()).args(args).spawn().unwrap();
        eventually("both sockets are there", || {
            socket.exists() && uds_path.exists()
        });
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success());
    }
    let two = run(&["--vm", &vm, "--vm", &vm]);
    let message = "--vm number 2: --guest-cid=4: another VM has this CID";
    assert_refused(&two, USE, message);
    assert_refused(&run(&["--vm", "guest-cid=4"]), USE, "socket= is missing");
}

#[test]
fn a_descriptor_that_is_no_listening_socket_is_refused() {
    let directory = TempDir::new().unwrap();
    let uds = format!("--uds-path={}", directory.path().join("uds").display());
    let output = run(&["--guest-cid=4", "--fd=0", &uds]);
    assert_refused(&output, FAILURE, "descriptor 0: ");
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let lonely = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )
    .unwrap();
    for socket in [OwnedFd::from(datagram), lonely] {
        let mut command = Command::new(binary());
        let command = command
            .args(["--guest-cid=4", "--fd=0", &uds])
            .stdin(socket);
        assert_refused(&command.output().unwrap(), FAILURE, "descriptor 0: ");
    }
    let output = run(&["--guest-cid=4", "--fd=99", &uds]);
    assert_refused(&output, FAILURE, "descriptor 99: ");
}
