//! A guest under QEMU, which interprets the guest's instructions (TCG) and so needs no /dev/kvm.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::daemon::{Daemon, PATIENCE, eventually};
use super::guest::{Guest, Vmm, guests, installed, scripts};

/// Debian's cloud kernel that the guest runs.
#[derive(Clone, Copy, Debug)]
pub enum Kernel {
    /// Every packet in one piece.
    V6_1,
    /// Payloads of more than 32 KiB are spread over several descriptors.
    V6_12,
}

/// QEMU's backend for the guest memory that the daemon maps.
#[derive(Clone, Copy, Debug)]
pub enum Memory {
    /// `memory-backend-file,share=on`
    File,
    /// `memory-backend-memfd`
    Memfd,
}

/// A running QEMU guest. Killed on drop.
pub struct Qemu {
    guest: Guest,
    vmm: Vmm,
    directory: TempDir,
    boots: usize,
}

impl Qemu {
    /// Boots a guest whose vsock device is `daemon`'s.
    pub fn boot(daemon: &Daemon, kernel: Kernel, memory: Memory) -> Self {
        Self::boot_with(daemon, kernel, memory, "")
    }

    /// The same with more properties of the device: `,NAME=VALUE`.
    pub fn boot_with(daemon: &Daemon, kernel: Kernel, memory: Memory, properties: &str) -> Self {
        Self::boot_at(&daemon.vhost_socket(), kernel, memory, properties)
    }

    /// The same for the device behind the vhost-user socket `backend`.
    pub fn boot_at(backend: &Path, kernel: Kernel, memory: Memory, properties: &str) -> Self {
        let program = installed("qemu-system-x86_64");
        let directory = TempDir::with_prefix("qemu-").unwrap();
        let (agent, line) = UnixStream::pair().unwrap();
        let console = directory.path().join("console");
        let vmm = Vmm::start(&program, |command| {
            add_machine(command);
            add_kernel(command, kernel);
            add_memory(command, memory, directory.path());
            add_vsock(command, backend, properties);
            add_lines(command, directory.path());
            // Standard input and output are the agent's serial line.
            command
                .stdin(OwnedFd::from(line.try_clone().unwrap()))
                .stdout(OwnedFd::from(line))
                .stderr(File::create(directory.path().join("stderr")).unwrap());
        });
        let guest = Guest::new(agent, console);
        guest.wait_for_boot(1);
        Self {
            guest,
            vmm,
            directory,
            boots: 1,
        }
    }

    /// Kills the VMM, as a crash would.
    pub fn kill(mut self) {
        self.vmm.kill();
    }

    /// Pauses the machine.
    pub fn stop(&self) {
        self.monitor("stop");
    }

    /// Resumes the paused machine.
    pub fn cont(&self) {
        self.monitor("cont");
    }

    /// Presses the machine's reset button and waits until the guest has booted again.
    pub fn reset(&mut self) {
        self.monitor("system_reset");
        self.boots += 1;
        self.guest.wait_for_boot(self.boots);
    }

    /// Gives QEMU's monitor (QMP) one command.
    fn monitor(&self, command: &str) {
        let path = self.directory.path().join("qmp");
        let mut monitor = None;
        eventually("QEMU's monitor", || {
            monitor = UnixStream::connect(&path).ok();
            monitor.is_some()
        });
        let mut monitor = monitor.unwrap();
        monitor.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answers = BufReader::new(monitor.try_clone().unwrap()).lines();
        answers.next().unwrap().unwrap(); // The greeting.
        for word in ["qmp_capabilities", command] {
            writeln!(monitor, "{{\"execute\":\"{word}\"}}").unwrap();
            // Events may come before the answer.
            let answer = answers.by_ref().map(Result::unwrap);
            let answer = answer.into_iter().find(|line| !line.contains("\"event\""));
            let answer = answer.unwrap_or_default();
            assert!(answer.contains("\"return\""), "monitor: {word}: {answer}");
        }
    }
}

impl Deref for Qemu {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

fn add_machine(command: &mut Command) {
    command
        .args(["-nodefaults", "-display", "none", "-accel", "tcg"])
        .args(["-machine", "q35,memory-backend=mem0"])
        // Five-level page tables only slow TCG down.
        .args(["-cpu", "max,la57=off", "-smp", "2", "-m", "512M"]);
}

fn add_kernel(command: &mut Command, kernel: Kernel) {
    let version = match kernel {
        Kernel::V6_1 => "6.1",
        Kernel::V6_12 => "6.12",
    };
    let directory = guests().join(format!("linux-{version}"));
    let initramfs = guests().join(format!("initramfs-{version}"));
    command
        .arg("-kernel")
        .arg(find_kernel(&directory))
        .arg("-initrd")
        .arg(build_initramfs(&directory, &initramfs))
        .args([
            "-append",
            "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr",
        ]);
}

fn find_kernel(directory: &Path) -> PathBuf {
    let files = fs::read_dir(directory.join("boot")).into_iter().flatten();
    files
        .map(|file| file.unwrap().path())
        .find(|file| file.to_string_lossy().contains("/vmlinuz-"))
        .unwrap_or_else(|| {
            let directory = directory.display();
            panic!("no kernel in {directory}; run `make test`, which fetches it")
        })
}

fn build_initramfs(kernel: &Path, initramfs: &Path) -> PathBuf {
    let script = scripts().join("make-initramfs.sh");
    let status = Command::new(script).arg(kernel).arg(initramfs).status();
    assert!(
        status.unwrap().success(),
        "no initramfs; run `make test`, which installs what it is made of"
    );
    initramfs.to_owned()
}

fn add_memory(command: &mut Command, memory: Memory, directory: &Path) {
    let kind = match memory {
        Memory::File => format!(
            "memory-backend-file,mem-path={}",
            directory.join("memory").display()
        ),
        Memory::Memfd => "memory-backend-memfd".to_owned(),
    };
    command
        .arg("-object")
        .arg(format!("{kind},id=mem0,size=512M,share=on"));
}

fn add_vsock(command: &mut Command, socket: &Path, properties: &str) {
    command
        .arg("-chardev")
        .arg(format!(
            "socket,id=char0,reconnect=0,path={}",
            socket.display()
        ))
        .arg("-device")
        .arg(format!("vhost-user-vsock-pci,chardev=char0{properties}"));
}

/// The console, the agent's serial line and the monitor.
fn add_lines(command: &mut Command, directory: &Path) {
    command
        .arg("-serial")
        .arg(format!("file:{}", directory.join("console").display()))
        .args(["-chardev", "stdio,id=agent,signal=off"])
        .args(["-serial", "chardev:agent"])
        .arg("-qmp")
        .arg(format!(
            "unix:{},server=on,wait=off",
            directory.join("qmp").display()
        ));
}
