//! Several VMs in one process: each is served by sockets of its own, and whatever one does, the others feel nothing of it.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::daemon::{Daemon, PATIENCE, binary, eventually};
use common::sim::host::{accept, assert_closed, assert_moves_bytes, connect, read_ok, read_to_end};
use common::sim::vhost_user::{Frontend, Request};
use common::sim::{Flow, Op, Setup, SimGuest};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// The CIDs of most tests' VMs. The first has the paths that a [`Daemon`] has.
const CIDS: [u64; 3] = [4, 5, 6];

/// A port where a host program listens.
const PORT: u32 = 1234;

/// The sockets of a VM.
#[derive(Clone)]
struct Vm {
    cid: u64,
    socket: PathBuf,
    uds_path: PathBuf,
}

impl Vm {
    fn new(directory: &Path, cid: u64) -> Self {
        let own = directory.join(cid.to_string());
        let folder = if cid == CIDS[0] { directory } else { &own };
        fs::create_dir_all(folder).unwrap();
        Self {
            cid,
            socket: folder.join("vhost.socket"),
            uds_path: folder.join("vm.vsock"),
        }
    }

    /// The text of its `--vm`.
    fn text(&self) -> String {
        let (socket, uds) = (self.socket.display(), self.uds_path.display());
        format!("guest-cid={},socket={socket},uds-path={uds}", self.cid)
    }

    /// A guest whose device runs.
    fn guest(&self) -> SimGuest {
        let setup = Setup {
            cid: self.cid,
            ..Setup::default()
        };
        SimGuest::start_over(UnixStream::connect(&self.socket).unwrap(), setup)
    }

    fn flow(&self, guest_port: u32, host_port: u32) -> Flow {
        Flow {
            guest_cid: self.cid,
            ..Flow::new(guest_port, host_port)
        }
    }

    /// A host program that listens for the guest.
    fn listen(&self, port: u32) -> UnixListener {
        let path = format!("{}_{port}", self.uds_path.display());
        let _ = fs::remove_file(&path);
        UnixListener::bind(path).unwrap()
    }

    /// A connection that the guest has opened.
    #[track_caller]
    fn opened_by_guest(&self, guest: &mut SimGuest, guest_port: u32) -> (UnixStream, Flow) {
        let (listener, flow) = (self.listen(PORT), self.flow(guest_port, PORT));
        guest.send(&flow.packet(Op::Request));
        guest.recv().assert_is(Op::Response, &flow);
        (accept(&listener), flow)
    }

    /// A client that has asked for a port of the guest.
    fn dial(&self, port: u32) -> UnixStream {
        let mut client = connect(&self.uds_path);
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        client
    }

    /// A connection that a host program has opened.
    #[track_caller]
    fn opened_by_host(&self, guest: &mut SimGuest, port: u32) -> (UnixStream, Flow) {
        let client = self.dial(port);
        let request = guest.recv();
        let flow = Flow::of(&request);
        assert!(request.is(Op::Request) && flow == self.flow(port, request.src_port));
        guest.send(&flow.packet(Op::Response));
        assert_eq!(read_ok(&client), flow.host_port);
        (client, flow)
    }

    /// Opens a connection from either side, moves bytes both ways and resets it.
    #[track_caller]
    fn assert_serves(&self, guest: &mut SimGuest) {
        let (program, flow) = self.opened_by_guest(guest, 50_000);
        assert_moves_bytes(guest, &program, &flow);
        guest.send(&flow.packet(Op::Rst));
        assert_closed(&program);
        let (client, flow) = self.opened_by_host(guest, 50_001);
        assert_moves_bytes(guest, &client, &flow);
        guest.send(&flow.packet(Op::Rst));
        assert_closed(&client);
    }
}

/// A daemon with several VMs.
struct Vms {
    daemon: Daemon,
    vms: Vec<Vm>,
}

impl Vms {
    fn start(options: &[&str]) -> Self {
        Self::start_as(Command::new(binary()), &CIDS, |_| String::new(), options)
    }

    /// Starts the daemon by this command. Each `--vm` ends with what `more` returns for the CID.
    fn start_as(
        mut command: Command,
        cids: &[u64],
        more: impl Fn(u64) -> String,
        options: &[&str],
    ) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        let vms = cids.iter().map(|cid| Vm::new(directory.path(), *cid));
        let vms: Vec<Vm> = vms.collect();
        for vm in &vms {
            command.arg(format!("--vm={}{}", vm.text(), more(vm.cid)));
        }
        command.args(options).stdin(Stdio::null());
        let daemon = Daemon::start_by(&mut command, directory, log, PATIENCE);
        Self { daemon, vms }
    }

    /// Guests whose devices run, in the order of the VMs.
    fn guests(&self) -> Vec<SimGuest> {
        self.vms.iter().map(Vm::guest).collect()
    }

    /// Checks that the first and the last VM serve, and that no warning concerns them.
    #[track_caller]
    fn assert_others_serve(&self, guests: &mut [SimGuest]) {
        for index in [0, 2] {
            self.vms[index].assert_serves(&mut guests[index]);
        }
        let log = self.daemon.log();
        for line in log.lines().filter(|line| line.contains("WARN")) {
            assert!(line.contains("CID 5: "), "{line}");
        }
    }
}

#[test]
fn each_vm_is_served_by_its_own_sockets() {
    let vms = Vms::start(&["-v"]);
    let mut guests = vms.guests();
    for (vm, guest) in vms.vms.iter().zip(&mut guests) {
        let cid = guest.frontend.config(0, 8);
        assert_eq!(cid, Some(vm.cid.to_le_bytes().to_vec()));
    }
    // All at once: the ports are the same in each VM.
    let mut connections = Vec::new();
    for (vm, guest) in vms.vms.iter().zip(&mut guests) {
        connections.push([vm.opened_by_guest(guest, 1), vm.opened_by_host(guest, 2)]);
    }
    for (connections, guest) in connections.iter().zip(&mut guests) {
        for (stream, flow) in connections {
            assert_moves_bytes(guest, stream, flow);
        }
    }
    let log = vms.daemon.log();
    for cid in CIDS {
        for line in [
            "waiting for a VMM at",
            "a VMM connected",
            "opened by the guest",
        ] {
            let line_of_vm =
                |text: &str| text.contains(&format!("CID {cid}: ")) && text.contains(line);
            assert!(log.lines().any(line_of_vm), "{cid} {line}: {log}");
        }
    }
}

#[test]
fn a_guest_can_not_speak_for_another_vm() {
    let vms = Vms::start(&[]);
    let mut guests = vms.guests();
    let listener = vms.vms[1].listen(PORT);
    listener.set_nonblocking(true).unwrap();
    guests[0].send(&vms.vms[1].flow(1, PORT).packet(Op::Request));
    vms.vms[0].assert_serves(&mut guests[0]);
    assert!(
        listener.accept().is_err(),
        "the other guest's program was reached"
    );
}

#[test]
fn a_broken_vmm_of_one_is_not_felt_by_others() {
    let vms = Vms::start(&[]);
    let mut guests = vms.guests();
    // A ring that stands nowhere.
    let _program = vms.vms[1].opened_by_guest(&mut guests[1], 1);
    guests[1].rings[1].set_avail_idx(40_000);
    guests[1].rings[1].kick();
    vms.assert_others_serve(&mut guests);
    // The next VMMs get no further than one message.
    let broken: [&dyn Fn(&Frontend); 3] = [
        &|vmm| vmm.send_raw(&[0xff; 4096], &[]),
        &|vmm| vmm.send_raw(&[1, 0, 0], &[]),
        &|vmm| vmm.send_message(Request::SetVringNum as u32, 0, &[0xff; 8], &[]),
    ];
    let nobody = Frontend::over(UnixStream::pair().unwrap().0);
    guests[1].frontend = nobody;
    for misbehave in broken {
        let vmm = Frontend::connect(&vms.vms[1].socket);
        misbehave(&vmm);
        vms.assert_others_serve(&mut guests);
    }
    // And its own next VMM is served.
    let mut next = vms.vms[1].guest();
    vms.vms[1].assert_serves(&mut next);
    vms.daemon.assert_alive();
}

#[test]
fn a_flood_of_one_is_not_felt_by_others() {
    let vms = Vms::start(&[]);
    let mut guests = vms.guests();
    let connections: Vec<_> = [0, 2]
        .map(|index| vms.vms[index].opened_by_guest(&mut guests[index], 1))
        .into();
    // It takes no answers, and its host programs come in any number and say nothing.
    guests[1].auto_repost = false;
    let mut clients = Vec::new();
    for round in 0..2000 {
        for port in 0..20 {
            guests[1].send(&vms.vms[1].flow(round * 20 + port, 9).packet(Op::Request));
        }
        if round % 4 == 0 {
            clients.push(UnixStream::connect(&vms.vms[1].uds_path));
        }
        if round % 100 == 0 {
            for (index, (stream, flow)) in [0, 2].into_iter().zip(&connections) {
                assert_moves_bytes(&mut guests[index], stream, flow);
            }
        }
    }
    vms.assert_others_serve(&mut guests);
}

#[test]
fn full_tables_of_one_leave_others_their_places() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(65_536), hard).unwrap();
    // Two VMs, for which these descriptors are few.
    let mut command = Command::new("prlimit");
    command.arg("--nofile=1024:1024").arg(binary());
    let vms = Vms::start_as(command, &[5, 4], |_| String::new(), &[]);
    let places = |cid: u64| {
        let has = |line: &&str| {
            line.contains(&format!("CID {cid}: ")) && line.contains("connections instead of 1024")
        };
        eventually("the log to tell the places", || {
            vms.daemon.log().lines().any(|line| has(&line))
        });
        let log = vms.daemon.log();
        let words = log.lines().find(has).unwrap().split_whitespace();
        let words: Vec<&str> = words.collect();
        let number = words.iter().position(|word| *word == "connections");
        words[number.unwrap() - 1].parse::<u32>().unwrap()
    };
    let places = [places(5), places(4)];
    let mut guests = vms.guests();
    let mut streams = Vec::new();
    for ((vm, guest), places) in vms.vms.iter().zip(&mut guests).zip(places) {
        // All that the guest may open.
        let listener = vm.listen(PORT);
        for port in 0..places {
            let flow = vm.flow(port, PORT);
            guest.send(&flow.packet(Op::Request));
            guest.recv().assert_is(Op::Response, &flow);
            streams.push(accept(&listener));
        }
        let refused = vm.flow(places, PORT);
        guest.send(&refused.packet(Op::Request));
        guest.recv().assert_is(Op::Rst, &refused);
        // The places that are kept for host programs, and as many clients that say nothing as come.
        for port in 0..places / 3 {
            streams.push(vm.opened_by_host(guest, 60_000 + port).0);
        }
        assert_closed(&vm.dial(1));
        let silent: Vec<UnixStream> = (0..500).map(|_| connect(&vm.uds_path)).collect();
        assert_closed(&silent[0]);
        streams.extend(silent);
    }
    let log = vms.daemon.log();
    assert!(!log.contains("clients must wait"), "{log}");
    // The next VMM and the statistics of the process find descriptors as well.
    drop(guests.remove(0));
    let mut next = vms.vms[0].guest();
    vms.vms[0].assert_serves(&mut next);
}

#[test]
fn a_stop_removes_all_sockets_whatever_the_vms_do() {
    let folder = TempDir::new().unwrap();
    let ssh = |cid| folder.path().join(format!("ssh{cid}"));
    let more = |cid| format!(",guest-port=22={}", ssh(cid).display());
    let vms = Vms::start_as(Command::new(binary()), &CIDS, more, &[]);
    assert!(CIDS.iter().all(|cid| ssh(*cid).exists()));
    // One VMM has stopped in the middle of a message, one guest runs, one VM has nobody.
    let vmm = Frontend::connect(&vms.vms[0].socket);
    vmm.send_raw(&[1, 0, 0], &[]);
    let mut guest = vms.vms[1].guest();
    let (program, _) = vms.vms[1].opened_by_guest(&mut guest, 1);
    vms.daemon.signal(Signal::SIGTERM);
    assert_eq!(vms.daemon.wait_exit().code(), Some(0));
    for vm in &vms.vms {
        assert!(!vm.socket.exists() && !vm.uds_path.exists(), "{}", vm.cid);
    }
    assert!(CIDS.iter().all(|cid| !ssh(*cid).exists()));
    assert_closed(&program);
}

/// Waits for a status line of the service manager.
#[track_caller]
fn await_state(manager: &UnixDatagram, line: &str) {
    let mut message = [0; 4096];
    let mut seen = Vec::new();
    loop {
        let received = manager.recv(&mut message);
        let len = received.unwrap_or_else(|error| panic!("no {line}: {error}, but {seen:?}"));
        let text = String::from_utf8_lossy(&message[..len]).into_owned();
        if text.lines().any(|told| told == line) {
            return;
        }
        seen.push(text);
    }
}

#[test]
fn the_service_manager_is_told_of_all() {
    let managers = TempDir::new().unwrap();
    let path = managers.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = Command::new(binary());
    command.env("NOTIFY_SOCKET", &path);
    let vms = Vms::start_as(command, &CIDS, |_| String::new(), &[]);
    await_state(&manager, "READY=1");
    await_state(&manager, "STATUS=Waiting for 3 VMMs");
    let mut first = vms.vms[0].guest();
    let _one = vms.vms[0].opened_by_guest(&mut first, 1);
    await_state(
        &manager,
        "STATUS=1 of 3 VMMs is connected, with 1 connection",
    );
    let mut last = vms.vms[2].guest();
    let _others = [1, 2].map(|port| vms.vms[2].opened_by_guest(&mut last, port));
    await_state(
        &manager,
        "STATUS=2 of 3 VMMs are connected, with 3 connections",
    );
    drop(first);
    await_state(
        &manager,
        "STATUS=1 of 3 VMMs is connected, with 2 connections",
    );
    vms.daemon.signal(Signal::SIGTERM);
    await_state(&manager, "STOPPING=1");
    assert_eq!(vms.daemon.wait_exit().code(), Some(0));
}

#[test]
fn lines_about_a_vm_name_its_cid() {
    let vms = Vms::start(&["-v"]);
    let mut guests = vms.guests();
    for (vm, guest) in vms.vms.iter().zip(&mut guests) {
        vm.assert_serves(guest);
    }
    drop(guests);
    let log = || vms.daemon.log();
    eventually("the VMMs to be gone", || {
        log().matches("the VMM disconnected").count() == CIDS.len()
    });
    let log = log();
    let mut texts = log.lines().filter_map(|line| line.split_once("] "));
    let (_, first) = texts.next().unwrap();
    assert!(first.starts_with("vhost-user-vsock "), "{first}");
    for (_, text) in texts {
        let cid = CIDS
            .iter()
            .find(|cid| text.starts_with(&format!("CID {cid}: ")));
        assert!(cid.is_some(), "{text}");
    }
    for cid in CIDS {
        let started = format!("CID {cid}: the guest's driver has started the device");
        assert!(log.contains(&started), "{log}");
    }
}

#[test]
fn counters_carry_the_cid() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("stats");
    let vms = Vms::start(&["--stats-path", path.to_str().unwrap()]);
    let mut guest = vms.vms[1].guest();
    let (_program, _) = vms.vms[1].opened_by_guest(&mut guest, 1);
    let stream = connect(&path);
    stream.shutdown(Shutdown::Write).unwrap();
    let text = String::from_utf8(read_to_end(&stream)).unwrap();
    for (cid, connected) in [(4, 0), (5, 1), (6, 0)] {
        let line = format!("vhost_user_vsock_vmm_connected{{cid=\"{cid}\"}} {connected}");
        assert!(text.lines().any(|text| text == line), "{line}: {text}");
    }
    let mut names = text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.contains("build_info"));
    assert!(names.all(|line| line.contains("cid=\"")), "{text}");
}

#[test]
fn a_vm_whose_only_vmm_leaves_ends_alone() {
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let log = File::create(directory.path().join("log")).unwrap();
    let vms = [5, 6].map(|cid| Vm::new(directory.path(), cid));
    let fifth = directory.path().join("vm.vsock");
    let (vmms, inherited): (Vec<_>, Vec<_>) = (0..2).map(|_| UnixStream::pair().unwrap()).unzip();
    let mut inherited = inherited.into_iter().map(std::os::fd::OwnedFd::from);
    let mut command = Command::new("sh");
    // Standard input and output are the VMMs.
    command
        .args([
            "-c",
            r#"exec 3<&0 4>&1 </dev/null >/dev/null; exec "$@""#,
            "sh",
        ])
        .arg(binary())
        .arg(format!(
            "--vm=guest-cid=5,fd=3,uds-path={}",
            fifth.display()
        ))
        .arg(format!(
            "--vm=guest-cid=6,fd=4,uds-path={}",
            vms[1].uds_path.display()
        ))
        .stdin(inherited.next().unwrap())
        .stdout(inherited.next().unwrap());
    let daemon = Daemon::start_by(&mut command, directory, log, PATIENCE);
    drop(command);
    let mut vmms = vmms.into_iter();
    let setup = |cid| Setup {
        cid,
        ..Setup::default()
    };
    let first = SimGuest::start_over(vmms.next().unwrap(), setup(5));
    let mut second = SimGuest::start_over(vmms.next().unwrap(), setup(6));
    drop(first);
    eventually("its socket to be removed", || !fifth.exists());
    vms[1].assert_serves(&mut second);
    daemon.assert_alive();
    drop(second);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(!vms[1].uds_path.exists());
}

#[test]
fn a_service_manager_passes_sockets_by_cid() {
    let directory = TempDir::with_prefix("vsock-test-").unwrap();
    let log = File::create(directory.path().join("log")).unwrap();
    let vms = [4, 5].map(|cid| Vm::new(directory.path(), cid));
    let host = UnixListener::bind(&vms[0].uds_path).unwrap();
    let vmm = UnixListener::bind(&vms[1].socket).unwrap();
    let mut command = Command::new("sh");
    let script = r#"exec 3<&0 4>&1 </dev/null >/dev/null; LISTEN_PID=$$ LISTEN_FDS=2 exec "$@""#;
    command
        .args(["-c", script, "sh"])
        .arg(binary())
        .arg(format!("--vm={}", vms[0].text()))
        .arg(format!(
            "--vm=guest-cid=5,uds-path={}",
            vms[1].uds_path.display()
        ))
        .env("LISTEN_FDNAMES", "host-4:vhost-user-5")
        .stdin(std::os::fd::OwnedFd::from(host))
        .stdout(std::os::fd::OwnedFd::from(vmm));
    let daemon = Daemon::start_by(&mut command, directory, log, PATIENCE);
    drop(command);
    let mut guests = vms.each_ref().map(Vm::guest);
    for (vm, guest) in vms.iter().zip(&mut guests) {
        vm.assert_serves(guest);
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    // Those that were passed stay.
    assert!(vms[0].uds_path.exists() && vms[1].socket.exists());
    assert!(!vms[0].socket.exists() && !vms[1].uds_path.exists());
}
