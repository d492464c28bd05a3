//! A listening socket that more than the daemon holds: who loses the race for a VMM, or its listener, still ends when asked.

mod common;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;

use common::daemon::Daemon;
use common::sim::host::{FLOW, assert_moves_bytes, assert_serves, from_guest};
use common::sim::vhost_user::Frontend;
use common::sim::{Setup, SimGuest};
use nix::sys::signal::Signal;
use nix::sys::socket::{Shutdown, shutdown};
use tempfile::TempDir;

/// A listener that stays with the test, for daemons to share.
struct Shared {
    listener: UnixListener,
    path: PathBuf,
    _directory: TempDir,
}

impl Shared {
    fn new(nonblocking: bool) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let path = directory.path().join("shared");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(nonblocking).unwrap();
        Self {
            listener,
            path,
            _directory: directory,
        }
    }

    fn daemon(&self) -> Daemon {
        Daemon::start_inheriting(OwnedFd::from(self.listener.try_clone().unwrap()))
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    fn shut_down(&self) {
        shutdown(self.listener.as_raw_fd(), Shutdown::Both).unwrap();
    }
}

#[track_caller]
fn assert_stops(daemon: &mut Daemon) {
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(!daemon.uds_path().exists());
}

/// Daemons on one listener, one of which has got the VMM that has connected there.
struct Race {
    shared: Shared,
    daemons: Vec<Daemon>,
    vmm: Frontend,
}

/// Several races, since not every one has a daemon that wakes for the VMM and finds that another has accepted it. They need
/// the processors for themselves.
fn races(nonblocking: bool) -> Vec<Race> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let race = |_| {
        let shared = Shared::new(nonblocking);
        let daemons: Vec<_> = (0..4).map(|_| shared.daemon()).collect();
        daemons[3].at_rest();
        let vmm = Frontend::over(shared.connect());
        assert_ne!(vmm.features(), 0, "nobody serves the VMM");
        Race {
            shared,
            daemons,
            vmm,
        }
    };
    (0..8).map(race).collect()
}

#[track_caller]
fn assert_losers_sleep_and_stop(nonblocking: bool, shut_down: bool) {
    let mut races = races(nonblocking);
    if shut_down {
        races.iter().for_each(|race| race.shared.shut_down());
    }
    let daemons: Vec<_> = races.iter().flat_map(|race| &race.daemons).collect();
    Daemon::assert_all_idle(&daemons);
    for race in &mut races {
        assert_ne!(race.vmm.features(), 0, "the VMM is served no longer");
        race.daemons.iter_mut().for_each(assert_stops);
    }
}

#[test]
fn a_daemon_that_lost_the_race_for_a_vmm_sleeps_and_stops() {
    assert_losers_sleep_and_stop(false, false);
}

#[test]
fn a_daemon_that_lost_the_race_on_a_nonblocking_listener_sleeps_and_stops() {
    assert_losers_sleep_and_stop(true, false);
}

#[test]
fn a_daemon_whose_blocking_listener_is_shut_down_behind_a_lost_race_sleeps_and_stops() {
    assert_losers_sleep_and_stop(false, true);
}

#[test]
fn a_daemon_whose_nonblocking_listener_is_shut_down_behind_a_lost_race_sleeps_and_stops() {
    assert_losers_sleep_and_stop(true, true);
}

#[test]
fn a_daemon_that_waits_at_a_listener_that_is_shut_down_sleeps_and_stops() {
    for nonblocking in [false, true] {
        let shared = Shared::new(nonblocking);
        let mut daemon = shared.daemon();
        shared.shut_down();
        daemon.assert_idle();
        assert_stops(&mut daemon);
    }
}

#[test]
fn a_vmm_outlives_the_listener_it_came_through() {
    for nonblocking in [false, true] {
        let shared = Shared::new(nonblocking);
        let mut daemon = shared.daemon();
        let mut guest = SimGuest::start_over(shared.connect(), Setup::default());
        let stream = from_guest(&daemon, &mut guest, &FLOW);
        shared.shut_down();
        daemon.assert_idle();
        assert_moves_bytes(&mut guest, &stream, &FLOW);
        assert_serves(&daemon, &mut guest);
        drop(guest);
        daemon.assert_idle();
        assert_stops(&mut daemon);
    }
}
