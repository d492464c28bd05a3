//! Several daemons that compete for a listening socket they share, or for the paths of one that runs.

mod common;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use common::daemon::{Daemon, GUEST_CID, binary, eventually};
use common::sim::host::{
    FLOW, assert_moves_bytes, assert_serves, connect, from_guest, read_to_end,
};
use common::sim::vhost_user::Frontend;
use common::sim::{Setup, SimGuest};
use nix::sys::signal::Signal;
use nix::sys::socket::{Shutdown, shutdown};
use tempfile::TempDir;

// --- A shared listener. A daemon that loses the race for a VMM, or the listener itself, sleeps and stops on SIGTERM.

/// A listener held by the test and shared by daemons.
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

/// Daemons on one listener, one of which has accepted a VMM.
struct Race {
    shared: Shared,
    daemons: Vec<Daemon>,
    vmm: Frontend,
}

/// Several races: not in each of them does a daemon wake up for a VMM that another one has accepted. Tests hold them one at
/// a time, on idle CPUs, which makes that likelier.
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
    (0..12).map(race).collect()
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

// --- The paths of a running daemon.

/// A daemon that logs and counts everything.
struct First {
    daemon: Daemon,
    stats: PathBuf,
    _directory: TempDir,
}

impl First {
    fn start() -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let stats = directory.path().join("stats");
        let option = format!("--stats-path={}", stats.display());
        Self {
            daemon: Daemon::start_with(&["-vv", &option]),
            stats,
            _directory: directory,
        }
    }

    /// The counters about VMMs and host programs.
    fn counters(&self) -> Vec<String> {
        let names = [
            "vhost_user_vsock_vmm_",
            "vhost_user_vsock_client",
            "vhost_user_vsock_connection",
            "vhost_user_vsock_kicks",
        ];
        let text = String::from_utf8(read_to_end(&connect(&self.stats))).unwrap();
        let lines = text
            .lines()
            .filter(|line| names.iter().any(|name| line.starts_with(name)));
        lines.map(str::to_owned).collect()
    }

    /// The log lines about VMMs and host programs.
    fn visitors(&self) -> Vec<String> {
        let log = self.daemon.log();
        let lines = log.lines().filter(|line| {
            let line = line.to_lowercase();
            ["vmm", "client", "connect", "accept"]
                .iter()
                .any(|word| line.contains(word))
        });
        lines.map(str::to_owned).collect()
    }

    /// Starts other daemons on one of its paths, or both. Each must fail, without a trace in the log or the counters.
    #[track_caller]
    fn assert_undisturbed(&self) {
        // The log is written asynchronously.
        self.daemon.at_rest();
        let (visitors, counters) = (self.visitors(), self.counters());
        let elsewhere = TempDir::with_prefix("vsock-test-").unwrap();
        let (socket, uds) = (elsewhere.path().join("vhost"), elsewhere.path().join("vm"));
        for (socket, uds) in [
            (&self.daemon.vhost_socket(), &uds),
            (&socket, &self.daemon.uds_path()),
            (&self.daemon.vhost_socket(), &self.daemon.uds_path()),
        ] {
            let other = Command::new(binary())
                .arg(format!("--guest-cid={GUEST_CID}"))
                .args([Path::new("--socket"), socket, Path::new("--uds-path"), uds])
                .output()
                .unwrap();
            let message = String::from_utf8_lossy(&other.stderr);
            assert_eq!(other.status.code(), Some(1), "{message}");
            assert!(
                message.contains("another daemon listens there"),
                "{message}"
            );
        }
        self.daemon.at_rest();
        assert_eq!(self.visitors(), visitors);
        assert_eq!(self.counters(), counters);
    }
}

#[test]
fn a_second_daemon_on_its_paths_leaves_no_trace_without_a_vmm() {
    let first = First::start();
    (0..5).for_each(|_| first.assert_undisturbed());
    let mut guest = SimGuest::start(&first.daemon, Setup::default());
    assert_serves(&first.daemon, &mut guest);
}

#[test]
fn a_second_daemon_on_its_paths_leaves_no_trace_with_a_vmm() {
    let first = First::start();
    let mut guest = SimGuest::start(&first.daemon, Setup::default());
    let stream = from_guest(&first.daemon, &mut guest, &FLOW);
    (0..5).for_each(|_| first.assert_undisturbed());
    assert_moves_bytes(&mut guest, &stream, &FLOW);
    assert_serves(&first.daemon, &mut guest);
    drop(guest);
    // No other VMM was queued behind this one.
    drop(SimGuest::start(&first.daemon, Setup::default()));
    let counts_two = |line: &String| line.contains("vmm_sessions_total") && line.ends_with(" 2");
    eventually("two VMMs, counted", || {
        first.counters().iter().any(counts_two)
    });
}
