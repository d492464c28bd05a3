//! The daemon under test: any program that takes `--guest-cid`, `--socket` and `--uds-path`, and for guests that reach each
//! other `--vm` or `--sibling-dir`.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{io, mem};

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::packet::{GUEST_CID, SIBLING_CID};

/// How long a daemon may take to create its sockets.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// For how much longer each further daemon may keep the others waiting.
const START_TIMEOUT_MORE: Duration = Duration::from_millis(100);
/// How often they are checked.
const START_CHECK: Duration = Duration::from_micros(50);
/// How often they are checked at least.
const START_CHECK_LONGEST: Duration = Duration::from_millis(20);
/// How often it is checked whether a predecessor has exited.
const EXIT_CHECK: Duration = Duration::from_micros(500);
/// The option of a daemon that limits the connections of a guest.
const MAX_CONNECTIONS: &str = "--max-connections";
/// So many are expected to be permitted without it.
const CONNECTIONS_BY_DEFAULT: usize = 1000;
/// Room for those that are being closed, and for what a daemon keeps for others than host programs.
const CONNECTIONS_MORE: usize = 1000;
/// The option of a daemon that hands over to a successor: the path of the socket between the two.
pub const HAND_OVER: &str = "--handover-path";
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

    /// Whether its help has `option`, with its dashes.
    pub fn offers(&self, option: &str) -> bool {
        let help = Command::new(&self.path).arg("--help").output();
        help.is_ok_and(|help| {
            let text = String::from_utf8_lossy(&help.stdout);
            text.split_whitespace().any(|word| word == option)
        })
    }
}

/// Options that are a VM's and not the process's.
const OPTIONS_OF_A_VM: [&str; 2] = ["--tx-buffer-size", "--queue-size"];

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
    /// The option that they take, beyond those of every daemon.
    pub fn option(self) -> Option<&'static str> {
        match self {
            Self::One => None,
            Self::OneProcess => Some("--vm"),
            Self::TwoProcesses => Some("--sibling-dir"),
        }
    }

    /// The options of each process, with the binary's own.
    fn options(self, directory: &Path, own: &[String]) -> Vec<Vec<String>> {
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
        let with_own = |options: Vec<String>| [options, own.to_vec()].concat();
        match self {
            Self::One => vec![with_own(one(guest))],
            Self::OneProcess => {
                let (of_vms, mut all): (Vec<&String>, Vec<&String>) =
                    own.iter().partition(|option| is_of_a_vm(option));
                let of_vms: String = of_vms
                    .iter()
                    .map(|option| option.replace("--", ","))
                    .collect();
                let vm = |options: [String; 3]| {
                    format!("--vm={},groups=bench{of_vms}", options.join(","))
                };
                let (guest, sibling) = (vm(guest), vm(sibling));
                all.extend([&guest, &sibling]);
                vec![all.into_iter().cloned().collect()]
            }
            Self::TwoProcesses => [guest, sibling]
                .map(|options| {
                    let mut options = one(options);
                    options.push(format!("--sibling-dir={}", directory.display()));
                    with_own(options)
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

/// Whether an option is a VM's, which stands within `--vm` if there are several.
fn is_of_a_vm(option: &str) -> bool {
    let name = option.split('=').next().unwrap_or_default();
    OPTIONS_OF_A_VM.contains(&name)
}

/// A running daemon, of one process or two. They are killed, by pid, when this is dropped.
pub struct Daemon {
    program: PathBuf,
    /// The options of each process.
    options: Vec<Vec<String>>,
    processes: Vec<Child>,
    vms: Vms,
    directory: TempDir,
    /// How long it took from its start until its sockets accepted connections.
    pub start_up: Duration,
}

impl Daemon {
    /// Starts a daemon and waits until its sockets accept connections.
    pub fn start(binary: &Binary, vms: Vms) -> io::Result<Self> {
        Self::start_with(binary, vms, |_| None)
    }

    /// The same for a daemon with a guest that has `connections`, for which it may need an option.
    pub fn start_for_many(binary: &Binary, connections: usize) -> io::Result<Self> {
        let needed = connections > CONNECTIONS_BY_DEFAULT && binary.offers(MAX_CONNECTIONS);
        let most = connections + CONNECTIONS_MORE;
        Self::start_with(binary, Vms::One, |_| {
            needed.then(|| format!("{MAX_CONNECTIONS}={most}"))
        })
    }

    /// The same for a daemon that hands over to another.
    pub fn start_replaceable(binary: &Binary, vms: Vms) -> io::Result<Self> {
        Self::start_with(binary, vms, |directory| {
            let path = directory.join("hand-over");
            Some(format!("{HAND_OVER}={}", path.display()))
        })
    }

    fn start_with(
        binary: &Binary,
        vms: Vms,
        option: impl Fn(&Path) -> Option<String>,
    ) -> io::Result<Self> {
        let mut daemon = Self::new(binary, vms)?;
        if let Some(option) = option(daemon.directory.path()) {
            daemon
                .options
                .iter_mut()
                .for_each(|options| options.push(option.clone()));
        }
        let begin = Instant::now();
        daemon.spawn_all()?;
        wait(
            std::slice::from_mut(&mut daemon),
            START_TIMEOUT,
            START_CHECK,
        )?;
        daemon.start_up = begin.elapsed();
        Ok(daemon)
    }

    /// Starts `count` daemons at the same time, and waits for all of them. Returns how long that took.
    pub fn start_many(binary: &Binary, count: usize) -> io::Result<(Vec<Self>, Duration)> {
        let daemons: io::Result<_> = (0..count).map(|_| Self::new(binary, Vms::One)).collect();
        let mut daemons: Vec<Self> = daemons?;
        let begin = Instant::now();
        for daemon in &mut daemons {
            daemon.spawn_all()?;
        }
        let more = count as u32 - 1;
        // To look for many takes long, and they are starting meanwhile.
        let check = (START_CHECK * count as u32).min(START_CHECK_LONGEST);
        wait(
            &mut daemons,
            START_TIMEOUT + START_TIMEOUT_MORE * more,
            check,
        )?;
        Ok((daemons, begin.elapsed()))
    }

    fn new(binary: &Binary, vms: Vms) -> io::Result<Self> {
        let directory = TempDir::with_prefix("vsock-bench-")?;
        Ok(Self {
            program: binary.path.clone(),
            options: vms.options(directory.path(), &binary.args),
            processes: Vec::new(),
            vms,
            directory,
            start_up: Duration::ZERO,
        })
    }

    fn spawn_all(&mut self) -> io::Result<()> {
        for options in &self.options {
            self.processes.push(self.spawn(options)?);
        }
        Ok(())
    }

    fn spawn(&self, options: &[String]) -> io::Result<Child> {
        let log = self.directory.path().join("log");
        let log = File::options().create(true).append(true).open(log)?;
        Command::new(&self.program)
            .args(options)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
    }

    /// Starts a successor of the first process with the same command line, and waits until the predecessor has exited.
    /// Returns how long that took.
    pub fn hand_over(&mut self) -> io::Result<Duration> {
        let begin = Instant::now();
        let successor = self.spawn(&self.options[0])?;
        let mut predecessor = mem::replace(&mut self.processes[0], successor);
        let result = self.wait_for_exit(&mut predecessor, begin);
        if result.is_err() {
            let _ = predecessor.kill();
            let _ = predecessor.wait();
        }
        result
    }

    fn wait_for_exit(&mut self, predecessor: &mut Child, begin: Instant) -> io::Result<Duration> {
        loop {
            if let Some(status) = predecessor.try_wait()? {
                let took = begin.elapsed();
                let why = || io::Error::other(format!("the predecessor ended, {status}"));
                return status.success().then_some(took).ok_or_else(why);
            }
            self.check()?;
            if begin.elapsed() > START_TIMEOUT {
                return Err(io::Error::other("the predecessor does not end"));
            }
            sleep(EXIT_CHECK);
        }
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

/// Waits until all sockets of the daemons accept connections.
fn wait(daemons: &mut [Daemon], timeout: Duration, check: Duration) -> io::Result<()> {
    let sockets = daemons.iter();
    let mut sockets: Vec<PathBuf> = sockets
        .flat_map(|daemon| daemon.vms.sockets(daemon.directory.path()))
        .collect();
    let begin = Instant::now();
    loop {
        // Not before the last one exists: the list is longer than that question.
        if sockets.last().is_none_or(|socket| socket.exists()) {
            let listening = listening()?;
            sockets.retain(|socket| !listening.contains(socket));
        }
        if sockets.is_empty() {
            return Ok(());
        }
        for daemon in &mut *daemons {
            daemon.check()?;
        }
        if begin.elapsed() > timeout {
            return Err(io::Error::other("the daemon has not created its sockets"));
        }
        sleep(check);
    }
}

/// All Unix sockets of this machine that listen.
fn listening() -> io::Result<HashSet<PathBuf>> {
    let table = fs::read_to_string("/proc/net/unix")?;
    let paths = table.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let listens = fields.nth(3) == Some(LISTENING);
        fields.nth(3).filter(|_| listens).map(PathBuf::from)
    });
    Ok(paths.collect())
}
