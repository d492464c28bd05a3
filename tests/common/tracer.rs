//! A daemon under a tracer, which lets it make system calls that it never makes by itself.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::user_regs_struct;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::daemon::{GUEST_CID, PATIENCE, binary, eventually};

/// Says that it is there, waits until it is seized, and becomes the daemon. Its umask keeps nobody out.
const LAUNCH: &str = "umask 0; echo; read -r go; exec \"$@\" >&2";

/// The variable of the environment that brings a path into the daemon's memory.
const PATH_VARIABLE: &str = "TRACED_PATH=";

/// A daemon whose first thread is traced. Only the thread that has started it may use it. It is killed, by pid, when this
/// is dropped.
pub struct Traced {
    child: Child,
    pid: Pid,
    folder: TempDir,
    path: u64,
    /// The registers behind the call of its own with which it was caught.
    caught: Option<user_regs_struct>,
    ended: bool,
}

/// What came of a system call.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this.
    Returned(i64),
    /// It was the last one.
    Killed(Signal),
}

impl Outcome {
    /// The system refused the call with this error.
    pub fn error(error: Errno) -> Self {
        Self::Returned(-i64::from(error as i32))
    }
}

impl Traced {
    /// Starts a daemon with `options` and with `path` in its memory. It stands still before its first instruction.
    pub fn start(options: &[&str], path: &Path) -> Self {
        let folder = TempDir::with_prefix("vsock-test-").unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let mut child = Command::new("/bin/sh")
            .args(["-c", LAUNCH, "sh"])
            .arg(binary())
            .arg(format!("--guest-cid={GUEST_CID}"))
            .arg("--socket")
            .arg(folder.path().join("vhost.socket"))
            .arg("--uds-path")
            .arg(folder.path().join("vm.vsock"))
            .args(options)
            .env(PATH_VARIABLE.trim_end_matches('='), path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut ready = [0];
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut ready).unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let options = Options::PTRACE_O_EXITKILL
            | Options::PTRACE_O_TRACEEXEC
            | Options::PTRACE_O_TRACESYSGOOD;
        ptrace::seize(pid, options)
            .expect("a process may trace its child: kernel.yama.ptrace_scope");
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let mut traced = Self {
            child,
            pid,
            folder,
            path: 0,
            caught: None,
            ended: false,
        };
        let exec = ptrace::Event::PTRACE_EVENT_EXEC as i32;
        assert_eq!(
            traced.wait(),
            WaitStatus::PtraceEvent(pid, Signal::SIGTRAP, exec)
        );
        // The end of the exec itself.
        traced.next_stop();
        traced.path = traced.find_path();
        traced
    }

    /// Starts a daemon and catches it when it waits for a VMM.
    pub fn serving(options: &[&str], path: &Path) -> Self {
        let mut traced = Self::start(options, path);
        ptrace::cont(traced.pid, None).unwrap();
        eventually("the daemon to serve", || {
            traced.log().contains("waiting for a VMM")
        });
        ptrace::interrupt(traced.pid).unwrap();
        assert!(matches!(traced.wait(), WaitStatus::PtraceEvent(..)));
        // It goes on waiting, until a VMM comes.
        traced.next_stop();
        ptrace::syscall(traced.pid, None).unwrap();
        drop(UnixStream::connect(traced.vhost_socket()).unwrap());
        assert_eq!(traced.wait(), WaitStatus::PtraceSyscall(traced.pid));
        traced.caught = Some(ptrace::getregs(traced.pid).unwrap());
        traced
    }

    /// Starts a daemon, waits until it serves, and sends it `signal`. Its first thread stands still before it notices.
    pub fn signalled(signal: Signal) -> Self {
        let mut traced = Self::start(&[], Path::new("/"));
        ptrace::cont(traced.pid, None).unwrap();
        eventually("the daemon to serve", || {
            traced.log().contains("waiting for a VMM")
        });
        ptrace::interrupt(traced.pid).unwrap();
        assert!(matches!(traced.wait(), WaitStatus::PtraceEvent(..)));
        kill(traced.pid, signal).unwrap();
        traced
    }

    /// Lets the daemon make a system call. It stands still again behind it.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Outcome {
        let caught = self.caught.expect("a daemon that was caught");
        ptrace::setregs(self.pid, registers::calling(caught, number, arguments)).unwrap();
        self.next_stop();
        ptrace::syscall(self.pid, None).unwrap();
        assert_eq!(self.wait(), WaitStatus::PtraceSyscall(self.pid));
        let behind = ptrace::getregs(self.pid).unwrap();
        // A call that the kernel has killed it for seems to end, but no instruction follows.
        ptrace::step(self.pid, None).unwrap();
        match self.wait() {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                Outcome::Returned(registers::result(&behind))
            }
            WaitStatus::Signaled(_, signal, _) => {
                self.ended = true;
                Outcome::Killed(signal)
            }
            other => panic!("{other:?} at the call {number}"),
        }
    }

    /// Lets the daemon go on until it has made the system call `number`. It stands still behind it.
    pub fn run_to(&mut self, number: i64) {
        loop {
            self.next_stop();
            let before = ptrace::getregs(self.pid).unwrap();
            self.next_stop();
            if registers::number(&before) == number {
                return;
            }
        }
    }

    /// Traces the daemon no more and waits for its end.
    pub fn wait_exit(mut self) -> ExitStatus {
        ptrace::detach(self.pid, None).unwrap();
        let mut status = None;
        eventually("the daemon to end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        self.ended = true;
        status.unwrap()
    }

    /// Lets the daemon go on where it was caught, and traces it no more.
    pub fn release(&mut self) {
        ptrace::setregs(self.pid, self.caught.take().unwrap()).unwrap();
        ptrace::detach(self.pid, None).unwrap();
    }

    /// Where in the daemon's memory the path is.
    pub fn path(&self) -> u64 {
        self.path
    }

    /// The daemon's process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The vhost-user socket.
    pub fn vhost_socket(&self) -> PathBuf {
        self.folder.path().join("vhost.socket")
    }

    /// The socket where host programs connect.
    pub fn uds_path(&self) -> PathBuf {
        self.folder.path().join("vm.vsock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Goes on to the beginning or the end of a system call. A signal on the way is delivered.
    fn next_stop(&mut self) {
        let mut signal = None;
        loop {
            ptrace::syscall(self.pid, signal).unwrap();
            match self.wait() {
                WaitStatus::PtraceSyscall(_) => return,
                WaitStatus::Stopped(_, caught) => signal = Some(caught),
                other => panic!("{other:?}\n{}", self.log()),
            }
        }
    }

    fn wait(&mut self) -> WaitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = waitpid(self.pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL));
            match status.unwrap() {
                WaitStatus::StillAlive => {}
                status => return status,
            }
            assert!(
                Instant::now() < deadline,
                "the daemon does not stop\n{}",
                self.log()
            );
            sleep(Duration::from_millis(1));
        }
    }

    /// The address of the path's value on the stack of a program that begins: behind the arguments are the pointers to the
    /// variables of the environment.
    fn find_path(&self) -> u64 {
        let mut place = registers::stack(&ptrace::getregs(self.pid).unwrap());
        let mut next = || {
            let word = self.word(place);
            place += 8;
            word
        };
        let arguments = next();
        (0..=arguments).for_each(|_| {
            next();
        });
        loop {
            let variable = next();
            assert_ne!(variable, 0, "no {PATH_VARIABLE} in the environment");
            if self.word(variable).to_ne_bytes() == PATH_VARIABLE.as_bytes()[..8]
                && self.word(variable + 4).to_ne_bytes() == PATH_VARIABLE.as_bytes()[4..12]
            {
                return variable + PATH_VARIABLE.len() as u64;
            }
        }
    }

    fn word(&self, address: u64) -> u64 {
        ptrace::read(self.pid, address as ptrace::AddressType).unwrap() as u64
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What the processor's registers are to a system call.
#[cfg(target_arch = "x86_64")]
mod registers {
    use super::user_regs_struct;

    /// The length of the instruction that makes one.
    const INSTRUCTION: u64 = 2;

    pub(super) fn stack(registers: &user_regs_struct) -> u64 {
        registers.rsp
    }

    pub(super) fn number(registers: &user_regs_struct) -> i64 {
        registers.orig_rax as i64
    }

    pub(super) fn result(registers: &user_regs_struct) -> i64 {
        registers.rax as i64
    }

    /// The registers behind a call, changed so that another follows.
    pub(super) fn calling(
        behind: user_regs_struct,
        number: i64,
        arguments: &[u64],
    ) -> user_regs_struct {
        let argument = |index| arguments.get(index).copied().unwrap_or(0);
        user_regs_struct {
            rip: behind.rip - INSTRUCTION,
            rax: number as u64,
            rdi: argument(0),
            rsi: argument(1),
            rdx: argument(2),
            r10: argument(3),
            r8: argument(4),
            r9: argument(5),
            ..behind
        }
    }
}

/// What the processor's registers are to a system call.
#[cfg(target_arch = "aarch64")]
mod registers {
    use super::user_regs_struct;

    /// The length of the instruction that makes one.
    const INSTRUCTION: u64 = 4;

    pub(super) fn stack(registers: &user_regs_struct) -> u64 {
        registers.sp
    }

    pub(super) fn number(registers: &user_regs_struct) -> i64 {
        registers.regs[8] as i64
    }

    pub(super) fn result(registers: &user_regs_struct) -> i64 {
        registers.regs[0] as i64
    }

    /// The registers behind a call, changed so that another follows.
    pub(super) fn calling(
        mut behind: user_regs_struct,
        number: i64,
        arguments: &[u64],
    ) -> user_regs_struct {
        behind.pc -= INSTRUCTION;
        behind.regs[8] = number as u64;
        for (index, register) in behind.regs[..6].iter_mut().enumerate() {
            *register = arguments.get(index).copied().unwrap_or(0);
        }
        behind
    }
}
