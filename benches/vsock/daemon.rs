//! The daemon under test: any program that takes `--guest-cid`, `--socket` and `--uds-path`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::packet::GUEST_CID;

/// How long a daemon may take to create its sockets.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How often they are checked.
const START_CHECK: Duration = Duration::from_micros(50);
/// The flag of a listening socket in /proc/net/unix.
const LISTENING: &str = "00010000";

/// A program to measure.
#[derive(Clone, Debug)]
pub struct Binary {
    /// What the report calls it.
    pub name: String,
    /// The executable.
    pub path: PathBuf,
    /// Options in addition to those three.
    pub args: Vec<String>,
}

impl Binary {
    /// Parses `NAME=PATH[,OPTION]...`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, rest) = text
            .split_once('=')
            .ok_or("expected NAME=PATH[,OPTION]...")?;
        let mut parts = rest.split(',');
        let path = PathBuf::from(parts.next().unwrap_or_default());
        if !path.is_file() {
            return Err(format!("{} is not a file", path.display()));
        }
        Ok(Self {
            name: name.into(),
            path,
            args: parts.map(Into::into).collect(),
        })
    }
}

/// A running daemon. It is killed, by pid, when this is dropped.
pub struct Daemon {
    child: Child,
    directory: TempDir,
    /// How long it took from its start until both sockets accepted connections.
    pub start_up: Duration,
}

impl Daemon {
    /// Starts a daemon and waits until both sockets accept connections.
    pub fn start(binary: &Binary) -> io::Result<Self> {
        let directory = TempDir::with_prefix("vsock-bench-")?;
        let log = File::create(directory.path().join("log"))?;
        let begin = Instant::now();
        let child = Command::new(&binary.path)
            .arg(format!("--guest-cid={GUEST_CID}"))
            .arg(format!(
                "--socket={}",
                directory.path().join("vhost").display()
            ))
            .arg(format!(
                "--uds-path={}",
                directory.path().join("vm").display()
            ))
            .args(&binary.args)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut daemon = Self {
            child,
            directory,
            start_up: Duration::ZERO,
        };
        while !(listening(&daemon.vhost_socket())? && listening(&daemon.uds_path())?) {
            daemon.check()?;
            if begin.elapsed() > START_TIMEOUT {
                return Err(io::Error::other("the daemon has not created its sockets"));
            }
            sleep(START_CHECK);
        }
        daemon.start_up = begin.elapsed();
        Ok(daemon)
    }

    /// The vhost-user socket.
    pub fn vhost_socket(&self) -> PathBuf {
        self.directory.path().join("vhost")
    }

    /// The socket for host programs.
    pub fn uds_path(&self) -> PathBuf {
        self.directory.path().join("vm")
    }

    /// The socket of the host program that listens on `port`.
    pub fn host_port_path(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("vm_{port}"))
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails with the last line of its log if it has ended.
    pub fn check(&mut self) -> io::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let last = log.lines().last().unwrap_or_default();
        Err(io::Error::other(format!(
            "the daemon ended, {status}: {last}"
        )))
    }

    /// The CPU time of all its threads, past ones included, by the scheduler's accounting.
    pub fn cpu(&self) -> io::Result<Duration> {
        let clock: ClockId = clock_getcpuclockid(Pid::from_raw(self.pid() as i32))?;
        Ok(Duration::from(clock.now()?))
    }

    /// Its anonymous and its resident memory, in KiB.
    pub fn memory(&self) -> io::Result<(f64, f64)> {
        // Only root may read smaps_rollup of a sandboxed daemon. The counters in status are less exact.
        self.kib("smaps_rollup", ["Anonymous", "Rss"])
            .or_else(|_| self.kib("status", ["RssAnon", "VmRSS"]))
    }

    /// Two fields of a file in /proc/PID, in KiB.
    fn kib(&self, file: &str, fields: [&str; 2]) -> io::Result<(f64, f64)> {
        let text = fs::read_to_string(format!("/proc/{}/{file}", self.pid()))?;
        let field = |name: &str| {
            text.lines()
                .filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .find_map(|rest| rest.split_whitespace().next()?.parse().ok())
                .ok_or_else(|| io::Error::other(format!("no {name} in {file}")))
        };
        Ok((field(fields[0])?, field(fields[1])?))
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

fn listening(path: &Path) -> io::Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let path = path.to_string_lossy();
    Ok(fs::read_to_string("/proc/net/unix")?.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some(LISTENING) && fields.nth(3) == Some(&*path)
    }))
}
