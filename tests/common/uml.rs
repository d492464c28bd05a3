//! A guest under User-Mode Linux: a kernel that is an ordinary process and shares the host's root directory, read only.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use tempfile::TempDir;

use super::daemon::Daemon;
use super::guest::{Guest, Vmm, guests, installed, scripts};
use super::uml_proxy;

/// The virtio device id of a vsock device.
const VIRTIO_ID_VSOCK: u32 = 19;

/// A running UML guest. Killed on drop.
pub struct Uml {
    guest: Guest,
    vmm: Vmm,
    _directory: TempDir,
}

impl Uml {
    /// Boots a guest whose vsock device is `daemon`'s.
    pub fn boot(daemon: &Daemon) -> Self {
        Self::boot_at(&daemon.vhost_socket())
    }

    /// Boots guests at once, each with the vsock device behind one of the vhost-user sockets.
    pub fn boot_all<const N: usize>(sockets: [PathBuf; N]) -> [Self; N] {
        let boots = sockets.map(|socket| thread::spawn(move || Self::boot_at(&socket)));
        boots.map(|boot| boot.join().unwrap())
    }

    /// Boots a guest whose vsock device is behind the vhost-user socket `backend`.
    pub fn boot_at(backend: &Path) -> Self {
        let kernel = installed("linux.uml");
        for program in ["socat", "ncat", "nc", "python3", "insmod"] {
            installed(program);
        }
        let directory = TempDir::with_prefix("uml-").unwrap();
        let socket = directory.path().join("vhost.socket");
        uml_proxy::start(&socket, backend);

        let (agent, line) = UnixStream::pair().unwrap();
        let console = directory.path().join("console");
        let vmm = Vmm::start(&kernel, |command| {
            command
                .args(["mem=256M", "rootfstype=hostfs", "rootflags=/", "ro"])
                .arg(format!("init={}", scripts().join("uml-init.sh").display()))
                .arg(format!(
                    "virtio_uml.device={}:{VIRTIO_ID_VSOCK}",
                    socket.display()
                ))
                .arg(format!("sshd={}", guests().join("sshd").display()))
                // The console goes to standard output, the agent's serial line is standard input.
                .args(["con=null", "con0=null,fd:1", "ssl0=fd:0"])
                .arg(format!("uml_dir={}", directory.path().display()))
                .arg("umid=guest")
                .env("LD_PRELOAD", build_xstate_shim(directory.path()))
                .stdin(OwnedFd::from(line))
                .stdout(File::create(&console).unwrap())
                .stderr(Stdio::null());
        });
        let guest = Guest::new(agent, console);
        guest.wait_for_boot(1);
        Self {
            guest,
            vmm,
            _directory: directory,
        }
    }

    /// Kills the VMM, as a crash would.
    pub fn kill(mut self) {
        self.vmm.kill();
    }

    /// Stops the guest's processes, or continues them.
    pub fn freeze(&self, frozen: bool) {
        self.vmm.freeze(frozen);
    }
}

impl Deref for Uml {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

/// Must be preloaded for UML to run on a CPU with AMX.
fn build_xstate_shim(directory: &Path) -> PathBuf {
    let shim = directory.join("uml_xstate.so");
    let built = Command::new(installed("cc"))
        .args(["-O2", "-shared", "-fPIC", "-o"])
        .arg(&shim)
        .arg(scripts().join("uml_xstate.c"))
        .arg("-ldl")
        .status()
        .unwrap();
    assert!(built.success(), "cc failed on uml_xstate.c");
    shim
}
