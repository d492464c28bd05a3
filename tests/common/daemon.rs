//! The daemon under test, as a process in a temporary directory of its own.

use std::fmt::Display;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, geteuid};
use rustix::io::{FdFlags, fcntl_setfd};
use tempfile::TempDir;

use super::watchdog::Watchdog;

/// The guest's CID, unless a test needs another.
pub const GUEST_CID: u64 = 4;

/// How long a test waits for what should happen at once. It only bounds a failing run.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running daemon. Killed by pid on drop.
pub struct Daemon {
    process: Mutex<Process>,
    /// A daemon that is replaced by another shares it with that.
    directory: Arc<TempDir>,
    patience: Duration,
}

/// Its process, which another may replace.
struct Process {
    child: Child,
    watchdog: Watchdog,
}

impl Daemon {
    /// Starts a daemon with the default options and waits until both its sockets are there.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a daemon with `options` after the three mandatory ones.
    pub fn start_with(options: &[&str]) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        Self::start_in(directory, options, log.into())
    }

    /// Starts a daemon that inherits its vhost-user socket as descriptor 0.
    pub fn start_inheriting(socket: impl Into<Stdio>) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let mut command = Self::command(&directory);
        command.arg("--fd=0").stdin(socket);
        Self::start_by(&mut command, directory, log, PATIENCE)
    }

    /// Starts a daemon that logs to `stderr` instead of the file behind [`Daemon::log`].
    pub fn start_logging_to(stderr: impl Into<Stdio>, options: &[&str]) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        fs::write(directory.path().join("log"), "").unwrap();
        Self::start_in(directory, options, stderr.into())
    }

    fn start_in(directory: TempDir, options: &[&str], stderr: Stdio) -> Self {
        let mut command = Self::command(&directory);
        command
            .arg("--socket")
            .arg(directory.path().join("vhost.socket"))
            .args(options)
            .stdin(Stdio::null());
        Self::start_by(&mut command, directory, stderr, PATIENCE)
    }

    fn command(directory: &TempDir) -> Command {
        let mut command = program();
        command
            .arg(format!("--guest-cid={GUEST_CID}"))
            .arg("--uds-path")
            .arg(directory.path().join("vm.vsock"))
            .stdout(Stdio::null());
        command
    }

    /// Starts a command that becomes a daemon, or runs one, with its sockets in `directory`. Start and stop may each
    /// take `patience`.
    pub fn start_by(
        command: &mut Command,
        directory: TempDir,
        stderr: impl Into<Stdio>,
        patience: Duration,
    ) -> Self {
        let daemon = Self::spawn(command, &Arc::new(directory), stderr, patience, &[]);
        daemon.wait_for_sockets();
        daemon
    }

    /// Starts a command without waiting for anything. It inherits `descriptors` under the numbers that they have here, which no
    /// other daemon does.
    pub fn spawn(
        command: &mut Command,
        directory: &Arc<TempDir>,
        stderr: impl Into<Stdio>,
        patience: Duration,
        descriptors: &[OwnedFd],
    ) -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        // A test that has failed meanwhile has harmed nothing.
        let turn = ONE_AT_A_TIME
            .lock()
            .unwrap_or_else(|held| held.into_inner());
        let inherit = |flags| {
            for fd in descriptors {
                fcntl_setfd(fd, flags).unwrap();
            }
        };
        inherit(FdFlags::empty());
        let child = command
            // Ctrl-C must reach only the test, which stops the daemon itself.
            .process_group(0)
            .stderr(stderr)
            .spawn()
            .unwrap();
        inherit(FdFlags::CLOEXEC);
        let watchdog = Watchdog::start(child.id());
        drop(turn);
        Self {
            process: Mutex::new(Process { child, watchdog }),
            directory: directory.clone(),
            patience,
        }
    }

    /// The vhost-user socket, where the VMM connects.
    pub fn vhost_socket(&self) -> PathBuf {
        self.directory.path().join("vhost.socket")
    }

    /// The socket where host programs connect.
    pub fn uds_path(&self) -> PathBuf {
        self.directory.path().join("vm.vsock")
    }

    /// The socket where a host program listens for the guest's connections to `port`.
    pub fn host_port_path(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("vm.vsock_{port}"))
    }

    /// The directory of the daemon's sockets; tests may put files of their own there.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The same, for a daemon that replaces this one.
    pub fn shared_directory(&self) -> &Arc<TempDir> {
        &self.directory
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.process().child.id()
    }

    /// What the daemon has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Number of open descriptors. The sandboxed daemon's can be listed only by root, but since Linux 6.2 the size of
    /// the directory is their number.
    pub fn open_descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.pid());
        match fs::read_dir(&directory) {
            Ok(descriptors) => descriptors.count(),
            Err(error) => {
                let size = fs::metadata(&directory).unwrap().len();
                assert_ne!(size, 0, "{directory} takes root, or Linux 6.2: {error}");
                size as usize
            }
        }
    }

    /// Number of descriptors and threads once two samples, taken apart in time, agree.
    pub fn at_rest(&self) -> (usize, usize) {
        let sample = || (self.open_descriptors(), self.threads());
        let mut before = sample();
        let deadline = Instant::now() + PATIENCE;
        loop {
            sleep(Duration::from_millis(100));
            let now = sample();
            if now == before {
                return now;
            }
            assert!(
                Instant::now() < deadline,
                "the daemon does not come to rest"
            );
            before = now;
        }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.tasks().count()
    }

    /// The daemon's anonymous memory in KiB: neither guest memory nor file mappings.
    pub fn anonymous_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        let number = line.unwrap().split_whitespace().nth(1);
        number.unwrap().parse().unwrap()
    }

    /// Sets a soft resource limit, by its prlimit(1) name.
    pub fn set_limit(&self, resource: &str, limit: impl Display) {
        let status = Command::new("prlimit")
            .arg(format!("--pid={}", self.pid()))
            .arg(format!("--{resource}={limit}:"))
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// CPU time used by all threads.
    pub fn cpu_time(&self) -> Duration {
        let spent = self.tasks().map(|task| {
            let line = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
            let nanoseconds = line.split_whitespace().next();
            nanoseconds.map_or(0, |nanoseconds| nanoseconds.parse::<u64>().unwrap())
        });
        Duration::from_nanos(spent.sum())
    }

    /// Panics if the daemon uses more than 5 % of a CPU while idle.
    #[track_caller]
    pub fn assert_idle(&self) {
        Self::assert_all_idle(&[self]);
    }

    /// The same for several daemons at once.
    #[track_caller]
    pub fn assert_all_idle(daemons: &[&Self]) {
        // Let pending work finish.
        sleep(Duration::from_millis(300));
        let before: Vec<_> = daemons.iter().map(|daemon| daemon.cpu_time()).collect();
        let while_waiting = Duration::from_millis(1500);
        sleep(while_waiting);
        for (daemon, before) in daemons.iter().zip(before) {
            let spent = daemon.cpu_time() - before;
            assert!(
                spent < while_waiting / 20,
                "{spent:?} of processor time in {while_waiting:?}"
            );
        }
    }

    fn tasks(&self) -> impl Iterator<Item = PathBuf> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        tasks.map(|task| task.unwrap().path())
    }

    /// Sends `signal` to the daemon.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Waits for the daemon to end by itself.
    pub fn wait_exit(&self) -> ExitStatus {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(status) = self.has_ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon did not end");
            sleep(Duration::from_millis(5));
        }
    }

    /// How the daemon has ended, if it has.
    pub fn has_ended(&self) -> Option<ExitStatus> {
        self.process().child.try_wait().unwrap()
    }

    /// Goes on as the process of `successor`, which has the same directory. Returns how its own has ended.
    pub fn replace_by(&self, successor: Self) -> ExitStatus {
        std::mem::swap(&mut *self.process(), &mut *successor.process());
        successor.wait_exit()
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Panics with the log when the daemon is no longer running.
    pub fn assert_alive(&self) {
        let status = self.has_ended();
        assert!(status.is_none(), "daemon ended: {status:?}\n{}", self.log());
    }

    /// Waits until a daemon that has no guest serves.
    pub fn wait_for_sockets(&self) {
        let deadline = Instant::now() + self.patience;
        // Without a guest, clients are closed at once; those of a daemon that lets them wait are for what they write. When
        // that happens, all threads are up.
        let is_closed = |mut client: UnixStream| {
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let _ = client.write_all(b"\n");
            match client.read(&mut [0]) {
                Ok(count) => count == 0,
                Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        };
        while !UnixStream::connect(self.uds_path()).is_ok_and(is_closed) {
            self.assert_alive();
            assert!(Instant::now() < deadline, "no sockets\n{}", self.log());
            sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let mut process = self.process();
        let Process { child, watchdog } = &mut *process;
        watchdog.dismiss();
        // The whole group, since the child may be a wrapper. Once waited for, the pid may be reused.
        if let Ok(None) = child.try_wait() {
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
        }
        let _ = child.wait();
        drop(process);
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
    }
}

/// A command that runs the binary under test. File modes apply to it even when the tests run as root.
pub fn program() -> Command {
    if !geteuid().is_root() {
        return Command::new(binary());
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-dac_override,-dac_read_search"]);
    command.arg(binary());
    command
}

/// The binary under test: this crate's own, or any other with the same three options.
pub fn binary() -> PathBuf {
    std::env::var_os("VSOCK_TEST_BINARY")
        .map_or_else(|| env!("CARGO_BIN_EXE_vhost-user-vsock").into(), Into::into)
}

/// Polls `condition` until it holds; panics with `what` after [`PATIENCE`].
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(5));
    }
}
