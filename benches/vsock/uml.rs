//! A real guest: Debian's Linux as a User-Mode Linux kernel, with `uml/stream.c` as its only program.

use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::uml_proxy;
use crate::daemon::Daemon;
use crate::guest::GUEST_PORT;
use crate::host::{self, HOST_PORT};
use crate::measure::{Probe, Sample, Timing, key, percentiles};
use crate::pattern::REQUEST_LEN;
use crate::ring::Notifications;
use crate::shared::{Counts, Shared};
use crate::threads::{Running, join, spawn};
use crate::traffic::Direction;

/// The kernel, a program.
pub const KERNEL: &str = "/usr/bin/linux.uml";
const MODULES: &str = "/usr/lib/uml/modules";
/// The guest loads the modules with the host's program.
const INSMOD: [&str; 2] = ["/usr/sbin/insmod", "/sbin/insmod"];
/// The virtio device id of a vsock device.
const VIRTIO_ID_VSOCK: u32 = 19;
/// How long a guest may take to boot and listen.
const BOOT_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a host program tries to connect meanwhile.
const BOOT_CHECK: Duration = Duration::from_millis(20);

/// Results that are known without a look into the guest.
const KNOWN: [&str; 6] = [
    key::MIB_PER_S,
    key::OPS_PER_S,
    key::CPU_S_PER_GIB,
    key::CPU_US_PER_OP,
    key::SYSCALLS_PER_MIB,
    key::SYSCALLS_PER_OP,
];

/// What is missing for a real guest, as text for the user.
pub fn missing() -> Option<&'static str> {
    if !Path::new(KERNEL).exists() || !Path::new(MODULES).exists() {
        return Some("linux.uml is not installed (Debian's user-mode-linux)");
    }
    if !INSMOD.iter().any(|path| Path::new(path).exists()) {
        return Some("there is no insmod (Debian's kmod)");
    }
    let cc = Command::new("cc").arg("--version").output();
    cc.is_err()
        .then_some("there is no C compiler (Debian's gcc)")
}

/// What a real guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Streams, in writes of `write` bytes.
    Streams {
        /// Where they lead.
        direction: Direction,
        /// Bytes per write.
        write: usize,
    },
    /// A host program exchanges a request and a response with a program of the guest, again and again.
    RequestResponse,
}

impl Traffic {
    /// Boots a guest, measures, and kills it.
    pub fn run(
        self,
        mut daemon: Daemon,
        timing: &Timing,
        syscalls: bool,
    ) -> Result<Sample, String> {
        let shared = Arc::new(Shared::default());
        let hosts = self.spawn_hosts(&daemon, &shared)?;
        let guest = Uml::boot(&daemon, self).map_err(|error| format!("UML: {error}"))?;
        let notifications = Notifications::default();
        let mut probe = Probe {
            daemon: &mut daemon,
            shared: &shared,
            notifications: &notifications,
            timeout: BOOT_TIMEOUT,
        };
        let begun = match self {
            Self::Streams {
                direction: Direction::Both,
                ..
            } => probe.wait_for(Counts::moved_both_ways),
            _ => Ok(()),
        };
        let window = begun.and_then(|()| probe.window(timing, syscalls));
        shared.end();
        drop(guest);
        daemon.kill();
        let mut latencies = Vec::new();
        for host in hosts {
            latencies.extend(join(host)?.unwrap_or_default());
        }
        let window = window?;
        let mut sample = match self {
            Self::Streams { .. } => window.per_byte()?,
            Self::RequestResponse => window.per_op()?,
        };
        // The rest is known of the simulated guest alone.
        sample.retain(|key, _| KNOWN.contains(key));
        match self {
            Self::RequestResponse => sample.extend(percentiles(&mut latencies)),
            Self::Streams {
                direction: Direction::Both,
                ..
            } => sample.extend(window.per_direction()),
            Self::Streams { .. } => {}
        }
        Ok(sample)
    }

    /// Starts the host programs. They return how long operations took, in nanoseconds.
    fn spawn_hosts(
        self,
        daemon: &Daemon,
        shared: &Arc<Shared>,
    ) -> Result<Vec<Running<Vec<u64>>>, String> {
        let uds_path = daemon.uds_path();
        let Self::Streams { direction, write } = self else {
            return Ok(vec![spawn(
                shared,
                move |shared| match connect_when_booted(&uds_path, shared)? {
                    Some(stream) => host::request_echoes(stream, shared),
                    None => Ok(Vec::new()),
                },
            )]);
        };
        let mut hosts = Vec::new();
        if direction != Direction::ToGuest {
            let listener = UnixListener::bind(daemon.host_port_path(HOST_PORT));
            let listener = listener.map_err(|error| error.to_string())?;
            hosts.push(spawn(shared, move |shared| {
                host::accept_and_drain(&listener, write, shared).map(|()| Vec::new())
            }));
        }
        if direction != Direction::ToHost {
            hosts.push(spawn(shared, move |shared| {
                connect_and_fill(&uds_path, write, shared).map(|()| Vec::new())
            }));
        }
        Ok(hosts)
    }

    /// What the guest's program is told: what to do, and with how many bytes at a time.
    fn arguments(self) -> (&'static str, usize) {
        match self {
            Self::Streams { direction, write } => match direction {
                Direction::ToHost => ("send", write),
                Direction::ToGuest => ("take", write),
                Direction::Both => ("both", write),
            },
            Self::RequestResponse => ("echo", REQUEST_LEN),
        }
    }
}

/// Writes a stream into the guest as soon as it listens. Counts what was written, since the guest can't report what it
/// has read.
fn connect_and_fill(uds_path: &Path, write: usize, shared: &Shared) -> Result<(), String> {
    match connect_when_booted(uds_path, shared)? {
        Some(stream) => host::fill(stream, write, shared, |len| shared.add_to_guest(len)),
        None => Ok(()),
    }
}

/// Connects to the guest as soon as it listens; None when the run is over.
fn connect_when_booted(uds_path: &Path, shared: &Shared) -> Result<Option<UnixStream>, String> {
    let begin = Instant::now();
    while !shared.stopped() {
        match host::connect(uds_path, GUEST_PORT) {
            Ok(stream) => return Ok(Some(stream)),
            Err(error) if begin.elapsed() > BOOT_TIMEOUT => return Err(error.to_string()),
            Err(_) => sleep(BOOT_CHECK),
        }
    }
    Ok(None)
}

/// A running guest. It is killed when this is dropped.
struct Uml {
    kernel: Child,
    watchdog: Child,
    _directory: TempDir,
}

impl Uml {
    fn boot(daemon: &Daemon, traffic: Traffic) -> io::Result<Self> {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = TempDir::with_prefix("vsock-bench-uml-")?;
        let program = directory.path().join("stream");
        let shim = directory.path().join("uml_xstate.so");
        let stream_source = sources.join("benches/vsock/uml/stream.c");
        compile(&["-static"], &stream_source, &program)?;
        // On a processor with AMX, UML needs this.
        let shim_source = sources.join("tests/guest/uml_xstate.c");
        compile(&["-shared", "-fPIC"], &shim_source, &shim)?;
        let socket = directory.path().join("vhost");
        uml_proxy::start(&socket, &daemon.vhost_socket());
        let (mode, size) = traffic.arguments();
        let init = sources.join("benches/vsock/uml/init.sh");
        let kernel = Command::new(KERNEL)
            .args([
                "mem=256M",
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                "quiet",
            ])
            .args(["con=null", "con0=null,fd:1", "umid=guest"])
            .arg(format!("uml_dir={}", directory.path().display()))
            .arg(format!("init={}", init.display()))
            .arg(device(&socket))
            .arg(format!("STREAM_PROGRAM={}", program.display()))
            .arg(format!("STREAM_MODE={mode}"))
            .arg(format!("STREAM_HOST_PORT={HOST_PORT}"))
            .arg(format!("STREAM_GUEST_PORT={GUEST_PORT}"))
            .arg(format!("STREAM_SIZE={size}"))
            .env("LD_PRELOAD", shim)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(File::create(directory.path().join("console"))?)
            .stderr(Stdio::null())
            .spawn()?;
        // Kills the guest if this process ends without running destructors.
        let watchdog = Command::new("sh")
            .args(["-c", "read -r _; kill -KILL -- -$1", "sh"])
            .arg(kernel.id().to_string())
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()?;
        Ok(Self {
            kernel,
            watchdog,
            _directory: directory,
        })
    }
}

impl Drop for Uml {
    fn drop(&mut self) {
        // The watchdog first: the process group's id may be reused afterwards.
        let _ = self.watchdog.kill();
        let _ = self.watchdog.wait();
        let _ = killpg(Pid::from_raw(self.kernel.id() as i32), Signal::SIGKILL);
        let _ = self.kernel.wait();
    }
}

fn device(socket: &Path) -> String {
    format!("virtio_uml.device={}:{VIRTIO_ID_VSOCK}", socket.display())
}

fn compile(options: &[&str], source: &Path, program: &PathBuf) -> io::Result<()> {
    let built = Command::new("cc")
        .arg("-O2")
        .args(options)
        .arg(source)
        .arg("-o")
        .arg(program)
        .arg("-ldl")
        .output()?;
    if built.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&built.stderr).into_owned();
    Err(io::Error::other(format!("cc: {stderr}")))
}
