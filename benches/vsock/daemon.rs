//! The daemon under test: any program that takes `--guest-cid`, `--socket` and `--uds-path`, and for guests that reach each
//! other `--vm` or `--sibling-dir`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::packet::{GUEST_CID, SIBLING_CID};

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

/// How many VMs there are, and how many processes serve them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vms {
    /// One VM.
    One,
    /// Two VMs that reach each other, of one process.
    OneProcess,
    /// Two VMs that reach each other, of a process each.
    TwoProcesses,
}

/// The names of a VM's sockets: its vhost-user socket, and that for host programs.
const GUEST_SOCKETS: [&str; 2] = ["vhost", "vm"];
const SIBLING_SOCKETS: [&str; 2] = ["vhost-sibling", "vm-sibling"];

impl Vms {
    /// The options of each process.
    fn options(self, directory: &Path) -> Vec<Vec<String>> {
        let options = |cid, [vhost, uds]: [&str; 2]| {
            [
                format!("guest-cid={cid}"),
                format!("socket={}", directory.join(vhost).display()),
                format!("uds-path={}", directory.join(uds).display()),
            ]
        };
        let one = |options: [String; 3]| options.map(|option| format!("--{option}")).to_vec();
        let guest = options(GUEST_CID, GUEST_SOCKETS);
        let sibling = options(SIBLING_CID, SIBLING_SOCKETS);
        match self {
            Self::One => vec![one(guest)],
            Self::OneProcess => {
                let vm = |options: [String; 3]| format!("--vm={},groups=bench", options.join(","));
                vec![vec![vm(guest), vm(sibling)]]
            }
            Self::TwoProcesses => [guest, sibling]
                .map(|options| {
                    let mut options = one(options);
                    options.push(format!("--sibling-dir={}", directory.display()));
                    options
                })
                .to_vec(),
        }
    }

    /// The sockets that listen when the daemon has started.
    fn sockets(self, directory: &Path) -> Vec<PathBuf> {
        let mut names: Vec<String> = GUEST_SOCKETS.map(Into::into).to_vec();
        if self != Self::One {
            names.extend(SIBLING_SOCKETS.map(Into::into));
        }
        if self == Self::TwoProcesses {
            names.extend([GUEST_CID, SIBLING_CID].map(|cid| format!("{cid}.vsock")));
        }
        names.iter().map(|name| directory.join(name)).collect()
    }
}

/// A running daemon, of one process or two. They are killed, by pid, when this is dropped.
pub struct Daemon {
    processes: Vec<Child>,
    vms: Vms,
    directory: TempDir,
    /// How long it took from its start until its sockets accepted connections.
    pub start_up: Duration,
}

impl Daemon {
    /// Starts a daemon and waits until its sockets accept connections.
    pub fn start(binary: &Binary, vms: Vms) -> io::Result<Self> {
        let directory = TempDir::with_prefix("vsock-bench-")?;
        let log = File::create(directory.path().join("log"))?;
        let options = vms.options(directory.path());
        let mut sockets = vms.sockets(directory.path());
        let mut daemon = Self {
            processes: Vec::new(),
            vms,
            directory,
            start_up: Duration::ZERO,
        };
        let begin = Instant::now();
        for options in options {
            let process = Command::new(&binary.path)
                .args(options)
                .args(&binary.args)
                .env_remove("RUST_LOG")
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log.try_clone()?)
                .spawn()?;
            daemon.processes.push(process);
        }
        while !all_listen(&mut sockets)? {
            daemon.check()?;
            if begin.elapsed() > START_TIMEOUT {
                return Err(io::Error::other("the daemon has not created its sockets"));
            }
            sleep(START_CHECK);
        }
        daemon.start_up = begin.elapsed();
        Ok(daemon)
    }

    /// Its VMs.
    pub fn vms(&self) -> Vms {
        self.vms
    }

    /// The guest's vhost-user socket.
    pub fn vhost_socket(&self) -> PathBuf {
        self.directory.path().join(GUEST_SOCKETS[0])
    }

    /// The other guest's vhost-user socket.
    pub fn sibling_socket(&self) -> PathBuf {
        self.directory.path().join(SIBLING_SOCKETS[0])
    }

    /// The socket for host programs.
    pub fn uds_path(&self) -> PathBuf {
        self.directory.path().join(GUEST_SOCKETS[1])
    }

    /// The socket of the host program that listens on `port`.
    pub fn host_port_path(&self, port: u32) -> PathBuf {
        self.directory.path().join(format!("vm_{port}"))
    }

    /// The ids of its processes.
    pub fn pids(&self) -> impl Iterator<Item = u32> + '_ {
        self.processes.iter().map(Child::id)
    }

    /// Fails with the last line of its log, or the line with the error, if it has ended.
    pub fn check(&mut self) -> io::Result<()> {
        let mut ended = None;
        for process in &mut self.processes {
            ended = ended.or(process.try_wait()?);
        }
        let Some(status) = ended else {
            return Ok(());
        };
        let log = fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let error = log.lines().find(|line| line.starts_with("error"));
        let why = error.or(log.lines().last()).unwrap_or_default();
        Err(io::Error::other(format!(
            "the daemon ended, {status}: {why}"
        )))
    }

    /// The CPU time of all its threads, past ones included, by the scheduler's accounting.
    pub fn cpu(&self) -> io::Result<Duration> {
        let mut total = Duration::ZERO;
        for pid in self.pids() {
            let clock: ClockId = clock_getcpuclockid(Pid::from_raw(pid as i32))?;
            total += Duration::from(clock.now()?);
        }
        Ok(total)
    }

    /// The anonymous and the resident memory of its first process, in KiB.
    pub fn memory(&self) -> io::Result<(f64, f64)> {
        // Only root may read smaps_rollup of a sandboxed daemon. The counters in status are less exact.
        self.kib("smaps_rollup", ["Anonymous", "Rss"])
            .or_else(|_| self.kib("status", ["RssAnon", "VmRSS"]))
    }

    /// Two fields of a file in /proc/PID, in KiB.
    fn kib(&self, file: &str, fields: [&str; 2]) -> io::Result<(f64, f64)> {
        let pid = self.pids().next().unwrap_or_default();
        let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
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
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether all `sockets` accept connections. Those that do are taken out.
fn all_listen(sockets: &mut Vec<PathBuf>) -> io::Result<bool> {
    while let Some(socket) = sockets.last() {
        if !listening(socket)? {
            return Ok(false);
        }
        sockets.pop();
    }
    Ok(true)
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
