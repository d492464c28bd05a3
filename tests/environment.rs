//! The daemon's environment: memory, the log, the directory of its sockets, signals.

mod common;

use std::fs::{self, File, Permissions};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::daemon::{Daemon, binary, eventually};
use common::sim::host::{
    FLOW, PORT, accept, assert_moves_bytes, assert_same, assert_serves, connect, dial, from_guest,
    from_host, listen, pattern, read_exactly, read_to_end,
};
use common::sim::memory::{Backing, GuestMemory};
use common::sim::survivor::SLACK_KIB;
use common::sim::vhost_user::{Frontend, Request};
use common::sim::{Flow, Op, Setup, SimGuest, Survivor};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;

// --- The log.

/// Both ends of a full pipe.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer)
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let (mut reader, writer) = full_pipe();
    let daemon = Daemon::start_logging_to(writer, &["-vv"]);
    let log_more_than_is_kept = || {
        let mut guest = SimGuest::start(&daemon, Setup::default());
        (0..20_000).for_each(|port| guest.send(&Flow::new(port, 1).packet(Op::Rst)));
        assert_serves(&daemon, &mut guest);
    };
    log_more_than_is_kept();
    let settled = daemon.anonymous_kib();
    log_more_than_is_kept();
    assert!(
        daemon.anonymous_kib() < settled + SLACK_KIB,
        "the log grows"
    );
    daemon.assert_idle();
    daemon.assert_alive();

    // A reader that resumes is told that lines were lost.
    let log = Arc::new(Mutex::new(Vec::<u8>::new()));
    let reading = std::thread::spawn({
        let log = log.clone();
        move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut piece) {
                log.lock().unwrap().extend(&piece[..count]);
            }
        }
    });
    let has = |text: &[u8]| {
        log.lock()
            .unwrap()
            .windows(text.len())
            .any(|part| part == text)
    };
    eventually("the log to flow again", || {
        has(b"lines of the log were lost")
    });
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    drop(daemon);
    reading.join().unwrap();
    assert!(has(b"stopped\n"), "the last line is missing");
}

#[test]
fn a_stop_does_not_wait_for_who_reads_the_log() {
    let (_reader, writer) = full_pipe();
    let daemon = Daemon::start_logging_to(writer, &[]);
    drop(SimGuest::start(&daemon, Setup::default()));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(!daemon.uds_path().exists());
}

#[test]
fn a_log_that_is_closed_or_on_a_full_disk_stops_nothing() {
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    let full = File::options().write(true).open("/dev/full").unwrap();
    for stderr in [OwnedFd::from(closed), full.into()] {
        Survivor::of(Daemon::start_logging_to(stderr, &["-vv"])).assert_unharmed();
    }
}

#[test]
fn a_daemon_without_descriptors_0_to_2_serves() {
    let directory = tempfile::TempDir::new().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("uds"));
    let mut daemon = Command::new("sh")
        .args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh"])
        .arg(binary())
        .args(["--guest-cid=4", "-vv"])
        .args(["--socket", socket.to_str().unwrap()])
        .args(["--uds-path", uds.to_str().unwrap()])
        .spawn()
        .unwrap();
    eventually("the sockets to be served", || {
        UnixStream::connect(&uds).is_ok()
    });
    assert!(Frontend::connect(&socket).features() != 0);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn the_log_leaves_its_pipe_as_it_was() {
    let (_reader, writer) = std::io::pipe().unwrap();
    let ours = writer.try_clone().unwrap();
    let daemon = Daemon::start_logging_to(writer, &["-vv"]);
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
    let flags = OFlag::from_bits_retain(fcntl(&ours, FcntlArg::F_GETFL).unwrap());
    assert!(
        !flags.contains(OFlag::O_NONBLOCK),
        "another program would be surprised"
    );
}

// --- Memory.

/// Limits the daemon's address space to its current size and `more` bytes.
fn limit_memory(daemon: &Daemon, more: u64) {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let kib = |field: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let limit = kib("VmSize:") * 1024 + more;
    daemon.set_limit("as", limit);
}

#[test]
fn a_connection_for_whose_bytes_there_is_no_memory_is_reset_alone() {
    let daemon = Survivor::start_with(&["--tx-buffer-size=268435456"]);
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let good = from_guest(&daemon, &mut guest, &FLOW);
    limit_memory(&daemon, 24 << 20);
    for round in 0..3 {
        let flow = Flow::new(50_000 + round, PORT);
        let unread = from_guest(&daemon, &mut guest, &flow);
        let sent = pattern(round.into(), 65_536);
        // Less than half of the credit.
        let mut packets = 0;
        let answer = loop {
            guest.send(&flow.rw(&sent));
            guest.wait_tx_done();
            packets += 1;
            if let Some(packet) = guest.poll_packet().filter(|packet| packet.is(Op::Rst)) {
                break packet;
            }
            assert!(packets < 2000, "memory without an end");
        };
        answer.assert_is(Op::Rst, &flow);
        // What was sent after the reset belongs to no connection.
        guest
            .settle()
            .iter()
            .for_each(|packet| packet.assert_is(Op::Rst, &flow));
        let got = read_to_end(&unread);
        assert!(got.len() >= 65_536, "{} bytes", got.len());
        assert_moves_bytes(&mut guest, &good, &FLOW);
        assert_serves(&daemon, &mut guest);
    }
    daemon.set_limit("as", "unlimited");
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn a_guest_for_whose_memory_there_is_no_room_is_not_served_and_the_next_is() {
    let daemon = Daemon::start();
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
    // At the size it has after that guest.
    daemon.at_rest();
    limit_memory(&daemon, 8 << 20);
    for _ in 0..3 {
        let frontend = Frontend::connect(&daemon.vhost_socket());
        frontend.set_owner();
        let memory = common::sim::memory::GuestMemory::new(
            &[2 << 20, 30 << 20],
            common::sim::memory::Backing::Pages,
        );
        frontend.set_mem_table(&memory);
        assert_eq!(
            frontend.stream().read(&mut [0]).unwrap_or(0),
            0,
            "it is served"
        );
    }
    daemon.assert_alive();
    daemon.set_limit("as", "unlimited");
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
    daemon.assert_idle();
}

#[test]
fn without_address_space_a_vmm_can_not_share_memory_and_the_next_one_is_served() {
    let daemon = Daemon::start();
    // The last thread to start is the log's.
    eventually("all threads", || daemon.log().contains("waiting for a VMM"));
    limit_memory(&daemon, 0);
    // It takes no thread to serve a VMM, but its memory has to be mapped.
    let first = Frontend::connect(&daemon.vhost_socket());
    // More than the threads' heaps may have given back since.
    first.set_mem_table(&GuestMemory::new(&[1 << 30], Backing::Pages));
    eventually("the shortage to be noticed", || {
        daemon.log().contains("the VMM is no longer served")
    });
    daemon.assert_alive();
    daemon.set_limit("as", "unlimited");
    drop(first);
    assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
}

// --- The directory of the sockets.

#[test]
fn a_directory_that_is_removed_ends_no_connection() {
    let directory = tempfile::TempDir::new().unwrap();
    let daemon = Daemon::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let (stream, flow, _) = from_host(&daemon, &mut guest, PORT);
    let away = directory.path().join("away");
    fs::rename(daemon.directory(), &away).unwrap();
    assert_moves_bytes(&mut guest, &stream, &flow);
    guest.send(&FLOW.packet(Op::Request));
    guest.recv().assert_is(Op::Rst, &FLOW);
    fs::rename(&away, daemon.directory()).unwrap();
    assert_serves(&daemon, &mut guest);

    fs::remove_file(daemon.uds_path()).unwrap();
    fs::remove_file(daemon.vhost_socket()).unwrap();
    assert_moves_bytes(&mut guest, &stream, &flow);
    daemon.assert_idle();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn permissions_that_are_withdrawn_refuse_what_needs_them() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let stream = from_guest(&daemon, &mut guest, &Flow::new(1, PORT + 1));
    let listener = listen(&daemon, PORT);
    let set = |mode| fs::set_permissions(daemon.host_port_path(PORT), Permissions::from_mode(mode));
    set(0).unwrap();
    guest.send(&FLOW.packet(Op::Request));
    // Not even root may, in the sandbox.
    guest.recv().assert_is(Op::Rst, &FLOW);
    assert_moves_bytes(&mut guest, &stream, &Flow::new(1, PORT + 1));
    set(0o600).unwrap();
    guest.send(&FLOW.packet(Op::Request));
    guest.recv().assert_is(Op::Response, &FLOW);
    assert_moves_bytes(&mut guest, &accept(&listener), &FLOW);
    drop(guest);
    daemon.assert_unharmed();
}

// --- Signals.

#[test]
fn sigterm_ends_it_at_each_step() {
    type Step = fn(&Daemon) -> Box<dyn Send>;
    let steps: [Step; 7] = [
        |_| Box::new(()),
        |daemon| Box::new(connect(&daemon.uds_path())),
        |daemon| Box::new(SimGuest::connect(daemon, Setup::default())),
        |daemon| Box::new(SimGuest::start(daemon, Setup::default())),
        |daemon| {
            let mut guest = SimGuest::start(daemon, Setup::default());
            let client = dial(daemon, PORT);
            assert!(guest.recv().is(Op::Request));
            Box::new((guest, client))
        },
        |daemon| {
            // Bytes in all buffers, both ways.
            let mut guest = SimGuest::start(daemon, Setup::default());
            let stream = from_guest(daemon, &mut guest, &FLOW);
            common::sim::host::fill(&mut guest, &FLOW);
            stream
                .set_write_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            while (&stream).write(&[1; 65_536]).is_ok() {}
            Box::new((guest, stream))
        },
        |daemon| {
            let mut guest = SimGuest::start(daemon, Setup::default());
            let stream = from_guest(daemon, &mut guest, &FLOW);
            guest.stop_rings();
            Box::new((guest, stream))
        },
    ];
    for (number, step) in steps.into_iter().enumerate() {
        let daemon = Daemon::start();
        let held = step(&daemon);
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0), "step {number}");
        assert!(!daemon.uds_path().exists() && !daemon.vhost_socket().exists());
        drop(held);
    }
}

#[test]
fn sighup_and_sigint_end_it_as_sigterm_does() {
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        for has_vmm in [false, true] {
            let daemon = Daemon::start();
            let guest = has_vmm.then(|| {
                let mut guest = SimGuest::start(&daemon, Setup::default());
                let stream = from_guest(&daemon, &mut guest, &FLOW);
                (guest, stream)
            });
            daemon.signal(signal);
            assert_eq!(daemon.wait_exit().code(), Some(0), "{signal}");
            assert!(!daemon.uds_path().exists() && !daemon.vhost_socket().exists());
            assert!(daemon.log().ends_with("stopped\n"), "{}", daemon.log());
            drop(guest);
        }
    }
}

#[test]
fn half_a_message_of_the_vmm_does_not_delay_the_stop() {
    let message = [Request::SetVringNum as u32, 1, 8, 0, 128]
        .map(u32::to_le_bytes)
        .concat();
    for bytes in [1, 4, 11, 12, 13, 19] {
        let start = |inherited: bool| {
            if inherited {
                let (vmm, theirs) = UnixStream::pair().unwrap();
                (Daemon::start_inheriting(OwnedFd::from(theirs)), vmm)
            } else {
                let daemon = Daemon::start();
                let vmm = connect(&daemon.vhost_socket());
                (daemon, vmm)
            }
        };
        for inherited in [false, true] {
            let (daemon, vmm) = start(inherited);
            let frontend = Frontend::over(vmm);
            frontend.set_owner();
            assert_ne!(frontend.features(), 0);
            frontend.send_raw(&message[..bytes], &[]);
            // The daemon has begun to read it.
            daemon.at_rest();
            daemon.signal(Signal::SIGTERM);
            assert_eq!(daemon.wait_exit().code(), Some(0), "{bytes} bytes");
            assert!(!daemon.uds_path().exists());
            drop(frontend);
        }
    }
}

#[test]
fn sigterm_right_behind_the_start_leaves_no_socket() {
    let directory = tempfile::TempDir::new().unwrap();
    let (socket, uds) = (directory.path().join("vhost"), directory.path().join("uds"));
    for round in 0..40 {
        let mut daemon = Command::new(binary())
            .arg("--guest-cid=4")
            .args(["--socket", socket.to_str().unwrap()])
            .args(["--uds-path", uds.to_str().unwrap()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // As soon as there is a socket, or a little later.
        eventually("a socket", || socket.exists());
        (0..round * 1000).for_each(|_| std::hint::spin_loop());
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(daemon.id() as i32),
            Signal::SIGTERM,
        )
        .unwrap();
        assert_eq!(daemon.wait().unwrap().code(), Some(0));
        assert!(!socket.exists() && !uds.exists());
    }
}

#[test]
fn a_pause_of_the_daemon_loses_nothing() {
    let daemon = Survivor::start();
    let mut guest = SimGuest::start(&daemon, Setup::default());
    let mut stream = from_guest(&daemon, &mut guest, &FLOW);
    let mut flow = FLOW;
    for round in 0..20 {
        daemon.signal(Signal::SIGSTOP);
        let bytes = pattern(round, 30_000);
        bytes
            .chunks(2000)
            .for_each(|piece| guest.send(&flow.rw(piece)));
        stream.write_all(&bytes).unwrap();
        let client = dial(&daemon, PORT);
        daemon.signal(Signal::SIGCONT);
        assert_same(&read_exactly(&stream, bytes.len()), &bytes);
        let (mut got, mut requests) = (Vec::new(), 0);
        while got.len() < bytes.len() || requests == 0 {
            let packet = guest.recv();
            requests += u32::from(packet.is(Op::Request));
            if packet.is(Op::Rw) {
                got.extend(packet.payload);
            }
        }
        assert_same(&got, &bytes);
        flow.fwd_cnt += bytes.len() as u32;
        drop(client);
    }
    drop(guest);
    daemon.assert_unharmed();
}

#[test]
fn sockets_of_others_are_left_to_them() {
    let daemon = Daemon::start();
    fs::remove_file(daemon.uds_path()).unwrap();
    let other = UnixListener::bind(daemon.uds_path()).unwrap();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let _client = UnixStream::connect(daemon.uds_path()).unwrap();
    other.accept().unwrap();
}
