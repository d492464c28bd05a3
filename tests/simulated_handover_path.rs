//! Hand-overs at `--handover-path`: what a daemon does when the other side of that socket is not what it should be.

mod common;

use std::fs;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use common::daemon::{Daemon, PATIENCE, binary, eventually, program};
use common::handover::{Service, Way, take_descriptors};
use common::manager::append_to_log;
use common::sim::host::{
    FLOW, accept, assert_closed, assert_moves_bytes, assert_same, assert_serves, connect,
    connect_for_messages, fill, from_guest, listen_for_messages, read_exactly,
};
use common::sim::{Setup, SimGuest};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const MAX_FDS: usize = 253;

/// What every state begins with.
const MAGIC: &[u8] = b"vhuvsock";

// --- Either side of the protocol, as the test speaks it: JSON in messages.

struct Peer(UnixStream);

impl Peer {
    fn connect(service: &Service) -> Self {
        Self(connect_for_messages(&handover_path(service)))
    }

    fn say(&self, message: &Value) {
        self.write(message.to_string().as_bytes());
    }

    /// The daemon may have hung up.
    fn write(&self, message: &[u8]) {
        let _ = (&self.0).write(message);
    }

    fn say_with(&self, message: &Value, fds: &[BorrowedFd]) {
        let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let text = message.to_string();
        let buffers = [IoSlice::new(text.as_bytes())];
        sendmsg(&self.0, &buffers, &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next message and its descriptors; null at the end.
    #[track_caller]
    fn hear(&self) -> (Value, Vec<OwnedFd>) {
        let mut bytes = vec![0; 1 << 16];
        let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let len = match recvmsg(&self.0, &mut buffers, &mut control, flags) {
            Ok(message) => message.bytes,
            Err(rustix::io::Errno::CONNRESET) => 0,
            Err(error) => panic!("no message: {error}"),
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        let message = match len {
            0 => Value::Null,
            len => serde_json::from_slice(&bytes[..len]).unwrap(),
        };
        (message, fds)
    }

    fn ask(&self) {
        self.say(&json!({"take_over": {"version": 1}}));
    }

    /// Asks, and receives all that is handed over.
    #[track_caller]
    fn take(&self) -> Vec<OwnedFd> {
        self.ask();
        let mut all = Vec::new();
        loop {
            let (message, fds) = self.hear();
            assert!(fds.len() <= 200);
            all.extend(fds);
            let number = |key: &str| message[key].as_u64().unwrap_or_else(|| panic!("{message}"));
            if number("parcel") + 1 == number("of") {
                return all;
            }
        }
    }
}

fn handover_path(service: &Service) -> PathBuf {
    service.directory().join("handover")
}

/// A daemon and a guest with a stream, in which there is much that the host program has not read.
struct Busy {
    service: Service,
    guest: SimGuest,
    program: UnixStream,
    sent: Vec<u8>,
}

impl Busy {
    fn start() -> Self {
        let service = Service::start(Way::Path, &[]);
        let mut guest = SimGuest::start(&service, Setup::default());
        let program = from_guest(&service, &mut guest, &FLOW);
        let sent = fill(&mut guest, &FLOW);
        Self {
            service,
            guest,
            program,
            sent,
        }
    }

    /// The same daemon serves, and answers this guest.
    #[track_caller]
    fn assert_goes_on(&mut self) {
        self.service.daemon().assert_alive();
        assert_serves(&self.service, &mut self.guest);
    }

    /// Nothing was lost, and a true successor is made way for.
    #[track_caller]
    fn finish(mut self) {
        self.assert_goes_on();
        self.service.hand_over();
        self.assert_complete();
    }

    #[track_caller]
    fn assert_complete(&mut self) {
        let got = read_exactly(&self.program, self.sent.len());
        assert_same(&got, &self.sent);
        assert_moves_bytes(&mut self.guest, &self.program, &FLOW);
        assert_serves(&self.service, &mut self.guest);
    }
}

// --- The daemon that serves, and what asks it for all it has.

#[test]
fn what_is_no_successor_changes_nothing() {
    let mut busy = Busy::start();
    let long = vec![b' '; 60_000];
    for message in [
        &b"garbage"[..],
        b"{}",
        b"[]",
        b"\xff\xfe",
        br#"{"take_over":{}}"#,
        br#"{"take_over":{"version":0}}"#,
        br#"{"take_over":{"version":-1}}"#,
        br#"{"ready":true}"#,
        br#"{"go":true}"#,
        br#"{"refused":"no"}"#,
        &long,
    ] {
        let peer = Peer::connect(&busy.service);
        peer.write(message);
        busy.assert_goes_on();
        // It gets no descriptors.
        let (answer, fds) = peer.hear();
        assert!(fds.is_empty());
        assert!(
            answer.is_null() || answer.get("refused").is_some(),
            "{answer}"
        );
    }
    busy.finish();
}

#[test]
fn one_that_hangs_up_at_any_stage_changes_nothing() {
    let mut busy = Busy::start();
    let stages: [&dyn Fn(&Peer); 9] = [
        &|_| (),
        &|peer| peer.ask(),
        &|peer| drop((peer.ask(), peer.hear())),
        &|peer| drop(peer.take()),
        &|peer| drop((peer.take(), peer.say(&json!({"refused": "no"})))),
        &|peer| drop((peer.take(), peer.write(b"garbage"))),
        &|peer| drop((peer.take(), peer.say(&json!({"ready": false})))),
        &|peer| drop((peer.take(), peer.ask())),
        // It is gone before it can hear that it may go on.
        &|peer| {
            peer.take();
            peer.0.shutdown(std::net::Shutdown::Read).unwrap();
            peer.say(&json!({"ready": true}));
        },
    ];
    for stage in stages {
        let peer = Peer::connect(&busy.service);
        stage(&peer);
        drop(peer);
        busy.assert_goes_on();
    }
    busy.finish();
}

#[test]
fn one_that_falls_silent_is_given_up() {
    let mut busy = Busy::start();
    // Before it has asked, nobody waits for it.
    let silent = Peer::connect(&busy.service);
    busy.assert_goes_on();
    busy.assert_goes_on();
    drop(silent);
    let silent = Peer::connect(&busy.service);
    let taken = silent.take();
    busy.assert_goes_on();
    // Too late.
    silent.say(&json!({"ready": true}));
    let (answer, _) = silent.hear();
    assert_ne!(answer, json!({"go": true}));
    busy.assert_goes_on();
    drop(taken);
    busy.finish();
}

#[test]
fn a_successor_waits_until_a_silent_one_is_given_up() {
    let mut busy = Busy::start();
    let silent = Peer::connect(&busy.service);
    let successor = busy.service.spawn_successor();
    busy.assert_goes_on();
    busy.service.expect_successor(successor);
    drop(silent);
    busy.assert_complete();
}

#[test]
fn one_that_is_ready_has_all_and_the_old_daemon_ends() {
    let mut busy = Busy::start();
    let peer = Peer::connect(&busy.service);
    let mut fds = peer.take();
    let state: fs::File = fds.remove(0).into();
    let mut magic = [0; 8];
    state.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(magic, MAGIC);
    peer.say(&json!({"ready": true}));
    assert_eq!(peer.hear().0, json!({"go": true}));
    assert_eq!(busy.service.daemon().wait_exit().code(), Some(0));
    // All that is open stays open, and no path is gone.
    let mut got = vec![0; busy.sent.len()];
    busy.program.set_nonblocking(true).unwrap();
    let mut count = 0;
    let error = loop {
        match busy.program.read(&mut got[count..]) {
            Ok(0) => panic!("the stream has ended"),
            Ok(more) => count += more,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    let waiting = connect(&busy.service.uds_path());
    assert!(busy.service.vhost_socket().exists());
    busy.guest.frontend.send_message(1, 0, &[], &[]);
    drop((fds, state, peer));
    assert_closed(&waiting);
    assert_closed(busy.guest.frontend.stream());
    busy.program.set_nonblocking(false).unwrap();
    assert_closed(&busy.program);
}

#[test]
fn a_daemon_that_hands_over_stops_on_a_signal() {
    let mut busy = Busy::start();
    let peer = Peer::connect(&busy.service);
    let _taken = peer.take();
    busy.service.signal(Signal::SIGTERM);
    assert_eq!(busy.service.daemon().wait_exit().code(), Some(0));
    for path in [
        busy.service.uds_path(),
        busy.service.vhost_socket(),
        handover_path(&busy.service),
    ] {
        assert!(!path.exists(), "{}", path.display());
    }
}

// --- Real successors.

#[test]
fn a_daemon_that_is_out_of_descriptors_lets_its_successor_wait() {
    let mut busy = Busy::start();
    let clients = take_descriptors(&busy.service);
    let successor = busy.service.spawn_successor();
    eventually("the daemon says so", || {
        busy.service
            .log()
            .contains("nothing is handed over to a process")
    });
    busy.service.assert_idle();
    drop(clients);
    busy.service.expect_successor(successor);
    busy.assert_complete();
}

#[test]
fn of_several_successors_one_serves_in_the_end() {
    let mut busy = Busy::start();
    for _ in 0..3 {
        let mut others: Vec<_> = (0..3).map(|_| busy.service.spawn_successor()).collect();
        eventually("only one is left", || {
            let all = others.iter_mut().chain([busy.service.daemon()]);
            all.map(|daemon| usize::from(daemon.has_ended().is_none()))
                .sum::<usize>()
                == 1
        });
        let place = others
            .iter_mut()
            .position(|other| other.has_ended().is_none());
        if let Some(place) = place {
            let successor = others.swap_remove(place);
            busy.service.expect_successor(successor);
        }
        assert_serves(&busy.service, &mut busy.guest);
    }
    busy.finish();
}

/// Starts a successor with other options, which fails.
#[track_caller]
fn assert_fails(busy: &mut Busy, change: impl FnOnce(&mut Vec<String>)) -> String {
    let mut options = busy.service.options().to_vec();
    change(&mut options);
    let mut command = program();
    let output = command
        .args(&options)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    busy.assert_goes_on();
    message
}

#[test]
fn a_successor_that_can_not_serve_changes_nothing() {
    let mut busy = Busy::start();
    let inodes = |busy: &Busy| {
        [busy.service.uds_path(), busy.service.vhost_socket()]
            .map(|path| fs::metadata(path).unwrap().ino())
    };
    let before = inodes(&busy);
    // Another VM.
    let message = assert_fails(&mut busy, |options| {
        for option in options {
            if option.starts_with("--guest-cid=") {
                *option = "--guest-cid=5".into();
            }
        }
    });
    assert!(message.contains('4'), "{message}");
    // A socket that can't be made.
    // A file is in the way.
    let log = busy.service.directory().join("log");
    assert_fails(&mut busy, |options| {
        options.push(format!("--guest-port=23={}", log.display()));
    });
    assert_eq!(inodes(&busy), before);
    busy.finish();
}

#[test]
fn a_successor_may_have_more_or_fewer_sockets() {
    let mut service = Service::start(Way::Path, &["--guest-port=22={}/ssh"]);
    let mut guest = SimGuest::start(&service, Setup::default());
    let program = from_guest(&service, &mut guest, &FLOW);
    service.add_option("--guest-port=80={}/web");
    service.hand_over();
    let path = service.directory().join("web");
    let client = connect(&path);
    let flow = common::sim::Flow::of(&guest.recv());
    assert_eq!(flow.guest_port, 80);
    guest.send(&flow.packet(common::sim::Op::Response));
    assert_moves_bytes(&mut guest, &client, &flow);
    let mut fewer = service.options().to_vec();
    fewer.retain(|option| !option.contains("=80="));
    service.hand_over_to(fewer);
    // Nobody waits there for ever.
    eventually("the socket is removed", || !path.exists());
    // What came through it goes on.
    assert_moves_bytes(&mut guest, &client, &flow);
    assert_moves_bytes(&mut guest, &program, &FLOW);
    assert!(service.directory().join("ssh").exists());
}

fn program_with<'a>(options: impl Iterator<Item = &'a String>) -> Command {
    let mut command = program();
    command
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// The predecessor stands still meanwhile: it must not have made way for the one that is killed.
#[test]
fn a_successor_that_is_killed_at_its_start_changes_nothing() {
    let mut busy = Busy::start();
    for round in 0..10 {
        busy.service.signal(Signal::SIGSTOP);
        let successor = busy.service.spawn_successor();
        sleep(Duration::from_millis(5 * round));
        successor.signal(Signal::SIGKILL);
        successor.wait_exit();
        busy.service.signal(Signal::SIGCONT);
        busy.assert_goes_on();
    }
    busy.finish();
}

#[test]
fn an_ordinary_stop_removes_all_sockets() {
    let mut busy = Busy::start();
    busy.service.hand_over();
    busy.service.signal(Signal::SIGTERM);
    assert_eq!(busy.service.daemon().wait_exit().code(), Some(0));
    let left: Vec<_> = fs::read_dir(busy.service.directory()).unwrap().collect();
    // The log, and the host program's.
    assert_eq!(left.len(), 2, "{left:?}");
}

// --- Who may ask.

#[test]
fn only_the_user_and_root_may_ask() {
    let mut busy = Busy::start();
    let path = handover_path(&busy.service);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    if !geteuid().is_root() {
        return println!("only root can become another user: not tried");
    }
    // The program where everybody may run it.
    let open = |path: &std::path::Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let copy = busy.service.directory().join("program");
    // Not by this process: a child of another test may have the copy open, which can't be run then.
    let copied = Command::new("cp").arg(binary()).arg(&copy).status();
    assert!(copied.unwrap().success());
    open(&copy, 0o755);
    open(busy.service.directory(), 0o777);
    let options = busy.service.options().to_vec();
    for mode in [0o600, 0o666] {
        open(&path, mode);
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&copy)
            .args(&options)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("handover"), "{message}");
        busy.assert_goes_on();
    }
    busy.finish();
}

// --- The daemon that starts, and what answers it.

/// A daemon that is started where the test answers.
struct Starting {
    daemon: Daemon,
    listener: UnixListener,
    peer: Peer,
}

impl Starting {
    /// Its first message was read.
    fn new() -> Self {
        let directory = Arc::new(TempDir::with_prefix("vsock-test-").unwrap());
        let path = |name| directory.path().join(name).display().to_string();
        let listener = listen_for_messages(&directory.path().join("handover"));
        let options = [
            "--guest-cid=4".to_owned(),
            format!("--socket={}", path("vhost.socket")),
            format!("--uds-path={}", path("vm.vsock")),
            format!("--handover-path={}", path("handover")),
        ];
        let log = append_to_log(&directory);
        let mut command = program_with(options.iter());
        let daemon = Daemon::spawn(&mut command, &directory, log, PATIENCE, &[]);
        let peer = Peer(accept(&listener));
        assert_eq!(peer.hear().0["take_over"]["version"], 1);
        Self {
            daemon,
            listener,
            peer,
        }
    }

    /// It ends, with a message, and leaves the socket of the one before alone.
    #[track_caller]
    fn assert_gives_up(self) -> String {
        assert_eq!(self.daemon.wait_exit().code(), Some(1));
        assert!(self.daemon.directory().join("handover").exists());
        drop(self.listener);
        let log = self.daemon.log();
        assert!(!log.contains("panicked"), "{log}");
        log
    }
}

#[test]
fn a_successor_that_is_refused_says_why() {
    let starting = Starting::new();
    starting.peer.say(&json!({"refused": "the reason"}));
    let log = starting.assert_gives_up();
    assert!(log.contains("the reason"), "{log}");
}

#[test]
fn a_successor_of_what_is_no_daemon_gives_up() {
    for answer in [
        &b"garbage"[..],
        b"{}",
        br#"{"go":true}"#,
        br#"{"parcel":0,"of":1}"#,
    ] {
        let starting = Starting::new();
        starting.peer.write(answer);
        starting.assert_gives_up();
    }
    let starting = Starting::new();
    let (end, _) = UnixStream::pair().unwrap();
    let Starting {
        peer,
        daemon,
        listener,
    } = starting;
    drop(peer);
    let peer = Peer(end);
    Starting {
        daemon,
        listener,
        peer,
    }
    .assert_gives_up();
}

#[test]
fn a_successor_refuses_what_is_no_state() {
    for content in [&b"garbage"[..], b"", &[0; 4096]] {
        let starting = Starting::new();
        let mut state = tempfile::tempfile().unwrap();
        state.write_all(content).unwrap();
        let parcel = json!({"parcel": 0, "of": 1});
        starting.peer.say_with(&parcel, &[state.as_fd()]);
        let (answer, _) = starting.peer.hear();
        assert!(answer["refused"].is_string(), "{answer}");
        starting.assert_gives_up();
    }
}

#[test]
fn a_successor_without_an_answer_gives_up() {
    Starting::new().assert_gives_up();
}

#[test]
fn what_nobody_listens_at_is_replaced_and_what_is_no_socket_is_not() {
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let path = directory.path().join("handover");
    drop(listen_for_messages(&path));
    let option = format!("--handover-path={}", path.display());
    let daemon = Daemon::start_with(&[&option]);
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
    drop(daemon);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    let other = TempDir::with_prefix("vsock-test-").unwrap();
    let output = Command::new(binary())
        .arg("--guest-cid=4")
        .arg(format!("--socket={}/vhost", other.path().display()))
        .arg(format!("--uds-path={}/vm", other.path().display()))
        .arg(&option)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}
