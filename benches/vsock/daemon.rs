//! A daemon under measurement: any program that takes `--guest-cid --socket --uds-path`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::guest::GUEST_CID;

/// How long a daemon may take to make its sockets.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How often its sockets are looked for.
const START_CHECK: Duration = Duration::from_micros(50);
/// The flag of a listening socket in /proc/net/unix.
const LISTENING: &str = "00010000";

/// A program to measure.
#[derive(Clone, Debug)]
pub struct Binary {
    /// What the report calls it.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Options besides the three.
    pub args: Vec<String>,
}

impl Binary {
    /// Parses `NAME=PATH[,OPTION]...`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, rest) = text
            .split_once('=')
            .ok_or("write it as NAME=PATH[,OPTION]...")?;
        let mut parts = rest.split(',');
        let path = PathBuf::from(parts.next().unwrap_or_default());
        if !path.is_file() {
            return Err(format!("{} is no file", path.display()));
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
    folder: TempDir,
    /// How long it took from its start until both its sockets took connections.
    pub start_up: Duration,
}

impl Daemon {
    /// Starts a daemon and waits until both its sockets take connections.
    pub fn start(binary: &Binary) -> io::Result<Self> {
        let folder = TempDir::with_prefix("vsock-bench-")?;
        let log = File::create(folder.path().join("log"))?;
        let begin = Instant::now();
        let child = Command::new(&binary.path)
            .arg(format!("--guest-cid={GUEST_CID}"))
            .arg(format!(
                "--socket={}",
                folder.path().join("vhost").display()
            ))
            .arg(format!("--uds-path={}", folder.path().join("vm").display()))
            .args(&binary.args)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut daemon = Self {
            child,
            folder,
            start_up: Duration::ZERO,
        };
        while !(listening(&daemon.vhost_socket())? && listening(&daemon.uds_path())?) {
            daemon.check()?;
            if begin.elapsed() > START_PATIENCE {
                return Err(io::Error::other("no sockets"));
            }
            sleep(START_CHECK);
        }
        daemon.start_up = begin.elapsed();
        Ok(daemon)
    }

    /// The vhost-user socket.
    pub fn vhost_socket(&self) -> PathBuf {
        self.folder.path().join("vhost")
    }

    /// The socket for host programs.
    pub fn uds_path(&self) -> PathBuf {
        self.folder.path().join("vm")
    }

    /// The socket of the host program that listens on `port`.
    pub fn host_port_path(&self, port: u32) -> PathBuf {
        self.folder.path().join(format!("vm_{port}"))
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs; the end of its log when it does not.
    pub fn check(&mut self) -> io::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let last = log.lines().last().unwrap_or_default();
        Err(io::Error::other(format!(
            "the daemon ended, {status}: {last}"
        )))
    }

    /// The processor time that all its threads have used, ended ones too, by the scheduler's accounting.
    pub fn cpu(&self) -> io::Result<Duration> {
        let clock: ClockId = clock_getcpuclockid(Pid::from_raw(self.pid() as i32))?;
        Ok(Duration::from(clock.now()?))
    }

    /// The memory that is its own, in KiB, and all of its memory.
    pub fn memory(&self) -> io::Result<(f64, f64)> {
        // Of a sandboxed daemon, all but root see only the numbers that the kernel rounds.
        self.kib("smaps_rollup", ["Anonymous", "Rss"])
            .or_else(|_| self.kib("status", ["RssAnon", "VmRSS"]))
    }

    /// Two fields of a file in /proc/PID.
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
}

impl Daemon {
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
