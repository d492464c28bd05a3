//! A VMM whose descriptors block whoever signals them: it may clear O_NONBLOCK, since it shares the open file, and keep the
//! descriptor full. The daemon goes on, for everybody else and for this guest.

mod common;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::daemon::{Daemon, eventually};
use common::sim::guest::{RX, TX};
use common::sim::host::{assert_serves, connect, read_to_end};
use common::sim::vhost_user::Request;
use common::sim::{Flow, Op, Setup, SimGuest};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;
use nix::sys::termios::{FlowArg, tcflow};
use nix::unistd::pipe;
use tempfile::TempDir;

/// Where nobody listens.
const NOBODY: u32 = 99;

/// A descriptor that takes no more, and the other end of it, which nobody reads.
struct Full {
    file: File,
    _other: Option<OwnedFd>,
}

impl Full {
    fn eventfd() -> Self {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap();
        event.write(u64::MAX - 1).unwrap();
        Self {
            file: OwnedFd::from(event).into(),
            _other: None,
        }
    }

    fn pipe() -> Self {
        let (reader, writer) = pipe().unwrap();
        Self::filled(writer, reader)
    }

    fn socket() -> Self {
        let (one, other) = UnixStream::pair().unwrap();
        Self::filled(one, other)
    }

    fn terminal() -> Self {
        let pty = openpty(None, None).unwrap();
        // What it takes otherwise goes on to its other end, sooner or later.
        tcflow(&pty.slave, FlowArg::TCOOFF).unwrap();
        Self::filled(pty.slave, pty.master)
    }

    fn filled(fd: impl Into<OwnedFd>, other: impl Into<OwnedFd>) -> Self {
        let file = File::from(fd.into());
        set_blocking(&file, false);
        for size in [4096, 1] {
            let error = loop {
                if let Err(error) = (&file).write(&vec![0; size]) {
                    break error;
                }
            };
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
        }
        Self {
            file,
            _other: Some(other.into()),
        }
    }

    fn all() -> [Self; 4] {
        [
            Self::eventfd(),
            Self::pipe(),
            Self::socket(),
            Self::terminal(),
        ]
    }

    /// Gives it to the daemon, and makes it block.
    fn give(&self, guest: &SimGuest, request: Request, index: usize) {
        let fd = self.file.as_fd();
        guest.frontend.set_vring_fd(request, index as u32, fd);
        set_blocking(&self.file, true);
    }
}

fn set_blocking(file: &File, blocking: bool) {
    let flags = fcntl(file, FcntlArg::F_GETFL).unwrap();
    let mut flags = OFlag::from_bits_retain(flags);
    flags.set(OFlag::O_NONBLOCK, !blocking);
    fcntl(file, FcntlArg::F_SETFL(flags)).unwrap();
}

/// A daemon with a stats socket.
struct Monitored {
    daemon: Daemon,
    stats: PathBuf,
    _directory: TempDir,
}

impl Monitored {
    fn start() -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let stats = directory.path().join("stats");
        let option = format!("--stats-path={}", stats.display());
        Self {
            daemon: Daemon::start_with(&[&option]),
            stats,
            _directory: directory,
        }
    }

    fn assert_statistics(&self) {
        let stream = connect(&self.stats);
        stream.shutdown(Shutdown::Write).unwrap();
        let text = String::from_utf8(read_to_end(&stream)).unwrap();
        assert!(text.contains("vhost_user_vsock_"), "{text}");
    }

    /// The VMM goes, the next one is served, and the daemon ends when it is asked to.
    fn assert_goes_on(self, guest: SimGuest) {
        self.assert_statistics();
        drop(guest);
        let mut next = SimGuest::start(&self.daemon, Setup::default());
        assert_serves(&self.daemon, &mut next);
        self.daemon.signal(Signal::SIGTERM);
        assert!(self.daemon.wait_exit().success());
        let log = self.daemon.log();
        assert!(!log.contains("did not end"), "{log}");
    }
}

/// Sends a packet that is answered, and asks for interrupts of it in both rings.
fn provoke_interrupts(guest: &mut SimGuest, port: u32) {
    guest.wait_tx_done();
    guest.rings[RX].arm();
    guest.rings[TX].arm();
    guest.send(&Flow::new(port, NOBODY).packet(Op::Request));
}

/// The answers come, though no interrupts do.
fn assert_answered(guest: &mut SimGuest, port: u32) {
    eventually("an answer to the guest", || guest.poll_packet().is_some());
    provoke_interrupts(guest, port);
    eventually("another answer", || guest.poll_packet().is_some());
}

#[test]
fn interrupts_that_block() {
    for full in Full::all() {
        for index in [RX, TX] {
            let daemon = Monitored::start();
            let mut guest = SimGuest::start(&daemon.daemon, Setup::default());
            full.give(&guest, Request::SetVringCall, index);
            provoke_interrupts(&mut guest, 1);
            assert_answered(&mut guest, 2);
            eventually("it is given up", || daemon.daemon.log().contains("blocks"));
            daemon.assert_goes_on(guest);
        }
    }
}

#[test]
fn error_notices_that_block() {
    for full in Full::all() {
        let daemon = Monitored::start();
        let mut guest = SimGuest::start(&daemon.daemon, Setup::default());
        full.give(&guest, Request::SetVringErr, TX);
        let ring = &mut guest.rings[TX];
        ring.set_avail_idx(ring.avail_idx().wrapping_add(1000));
        ring.kick();
        eventually("the ring is given up", || {
            daemon.daemon.log().contains("ring 1 stops")
        });
        daemon.assert_goes_on(guest);
    }
}

#[test]
fn a_descriptor_of_all_rings_that_blocks_when_it_is_given_again() {
    let daemon = Monitored::start();
    let mut guest = SimGuest::start(&daemon.daemon, Setup::default());
    let full = Full::eventfd();
    for port in 0..5 {
        for index in [RX, TX] {
            full.give(&guest, Request::SetVringCall, index);
            full.give(&guest, Request::SetVringErr, index);
        }
        provoke_interrupts(&mut guest, 10 * port);
        assert_answered(&mut guest, 10 * port + 1);
    }
    daemon.assert_goes_on(guest);
}

#[test]
fn the_end_while_a_descriptor_blocks() {
    for by_signal in [false, true] {
        let Monitored { daemon, .. } = Monitored::start();
        let mut guest = SimGuest::start(&daemon, Setup::default());
        let full = [Full::eventfd(), Full::eventfd()];
        full[0].give(&guest, Request::SetVringCall, RX);
        full[1].give(&guest, Request::SetVringCall, TX);
        provoke_interrupts(&mut guest, 1);
        if by_signal {
            daemon.signal(Signal::SIGTERM);
            assert!(daemon.wait_exit().success());
            assert!(!daemon.vhost_socket().exists() && !daemon.uds_path().exists());
        } else {
            drop(guest);
            assert_serves(&daemon, &mut SimGuest::start(&daemon, Setup::default()));
        }
    }
}

#[test]
fn a_vmm_that_keeps_its_descriptors_full() {
    let daemon = Monitored::start();
    let mut guest = SimGuest::start(&daemon.daemon, Setup::default());
    let full = [Full::eventfd(), Full::eventfd()];
    full[0].give(&guest, Request::SetVringCall, RX);
    full[1].give(&guest, Request::SetVringCall, TX);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Whatever comes out is put back at once: who waits for room wins it hardly ever.
        for full in &full {
            let (file, is_over) = (&full.file, &is_over);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    set_blocking(file, false);
                    let _ = (&*file).read(&mut [0; 8]);
                    let _ = (&*file).write(&(u64::MAX - 1).to_ne_bytes());
                    set_blocking(file, true);
                }
            });
        }
        for port in 0..20 {
            provoke_interrupts(&mut guest, 100 + port);
            eventually("an answer", || guest.poll_packet().is_some());
        }
        is_over.store(true, Ordering::Relaxed);
    });
    daemon.assert_goes_on(guest);
}
