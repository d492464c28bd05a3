//! The daemon under a service manager: socket activation and status notification.

mod common;

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::daemon::{Daemon, PATIENCE, binary, eventually};
use common::sim::host::assert_serves;
use common::sim::{Setup, SimGuest};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// Runs a program with its standard input and output as the first two descriptors of a socket activation.
const ACTIVATE: &str =
    r#"exec 3<&0 4>&1 </dev/null >/dev/null; LISTEN_PID=$$ LISTEN_FDS=2 exec "$@""#;

/// A command that starts the daemon with two sockets, called `names`, and its host programs in `directory`.
fn activated(directory: &Path, sockets: [OwnedFd; 2], names: &str) -> Command {
    let [first, second] = sockets;
    let mut command = Command::new("sh");
    command
        .args(["-c", ACTIVATE, "sh"])
        .arg(binary())
        .arg("--guest-cid=4")
        .arg("--uds-path")
        .arg(directory.join("vm.vsock"))
        .env("LISTEN_FDNAMES", names)
        .stdin(first)
        .stdout(second);
    command
}

fn listener(directory: &Path, name: &str) -> OwnedFd {
    UnixListener::bind(directory.join(name)).unwrap().into()
}

fn directory_with_log() -> (TempDir, File) {
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let log = File::create(directory.path().join("log")).unwrap();
    (directory, log)
}

#[test]
fn sockets_of_a_service_manager_are_served_and_left_to_it() {
    let (vmm, host) = ("vhost.socket", "vm.vsock");
    for (sockets, names) in [
        ([vmm, host], "vhost-user:host"),
        ([host, vmm], "host:vhost-user"),
        ([vmm, host], "first:second"),
    ] {
        let (directory, log) = directory_with_log();
        let inherited = sockets.map(|name| listener(directory.path(), name));
        let mut command = activated(directory.path(), inherited, names);
        let daemon = Daemon::start_by(&mut command, directory, log, PATIENCE);
        // Nobody else holds them.
        drop(command);
        assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0), "{names}");
        assert!(daemon.vhost_socket().exists() && daemon.uds_path().exists());
    }
}

#[test]
fn sockets_that_a_service_manager_should_not_have_given_are_refused() {
    let directory = TempDir::new().unwrap();
    let run = |sockets, names| -> Output {
        let mut command = activated(directory.path(), sockets, names);
        command
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap()
    };
    let listeners = || {
        ["a", "b"].map(|name| {
            let _ = std::fs::remove_file(directory.path().join(name));
            listener(directory.path(), name)
        })
    };
    let file = || File::open("/dev/null").unwrap().into();
    let [socket, _] = listeners();
    for (output, code, message) in [
        (run(listeners(), "host:host"), 2, "one too many"),
        (run(listeners(), "vhost-user:vhost-user"), 2, "one too many"),
        (run([socket, file()], "vhost-user:host"), 1, "descriptor 4"),
        (run([file(), file()], "vhost-user:host"), 1, "descriptor 3"),
    ] {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(message), "{stderr}");
    }
}

/// Waits for a message to the service manager with a line that starts with `line`.
fn await_state(manager: &UnixDatagram, line: &str) {
    let mut message = [0; 4096];
    loop {
        let len = manager
            .recv(&mut message)
            .unwrap_or_else(|error| panic!("no {line}: {error}"));
        let text = String::from_utf8_lossy(&message[..len]);
        if text.lines().any(|told| told.starts_with(line)) {
            return;
        }
    }
}

#[test]
fn the_journal_gets_priorities_and_no_times() {
    let (directory, log) = directory_with_log();
    let journal = log.metadata().unwrap();
    let stream = format!("{}:{}", journal.dev(), journal.ino());
    let daemon = started_with(("JOURNAL_STREAM", stream.as_ref()), directory, log);
    let is_complete = |log: String| log.lines().count() > 1 && log.ends_with('\n');
    eventually("the first lines", || is_complete(daemon.log()));
    let log = daemon.log();
    let version = env!("CARGO_PKG_VERSION");
    let first = format!("<6>vhost_user_vsock: vhost-user-vsock {version}\n");
    let rest = log.strip_prefix(&first).unwrap_or_else(|| panic!("{log}"));
    assert!(
        rest.starts_with("<6>vhost_user_vsock::daemon::server: CID 4: "),
        "{log}"
    );
}

/// A daemon with an environment variable.
fn started_with(variable: (&str, &OsStr), directory: TempDir, log: File) -> Daemon {
    let mut command = Command::new(binary());
    command
        .arg("--guest-cid=4")
        .arg("--socket")
        .arg(directory.path().join("vhost.socket"))
        .arg("--uds-path")
        .arg(directory.path().join("vm.vsock"))
        .env(variable.0, variable.1);
    Daemon::start_by(&mut command, directory, log, PATIENCE)
}

#[test]
fn a_service_manager_that_is_not_there_or_does_not_read_hinders_nothing() {
    let managers = TempDir::new().unwrap();
    let full = managers.path().join("full");
    let _manager = UnixDatagram::bind(&full).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"X", &full).is_ok() {}
    for path in [full, managers.path().join("nobody")] {
        let (directory, log) = directory_with_log();
        let daemon = started_with(("NOTIFY_SOCKET", path.as_ref()), directory, log);
        assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0));
    }
}

#[test]
fn a_service_manager_is_notified_of_the_start_and_the_stop() {
    let (directory, log) = directory_with_log();
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let daemon = started_with(("NOTIFY_SOCKET", path.as_ref()), directory, log);
    await_state(&manager, "READY=1");
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
    await_state(&manager, "STATUS=");
    daemon.signal(Signal::SIGTERM);
    await_state(&manager, "STOPPING=1");
    assert_eq!(daemon.wait_exit().code(), Some(0));
}
