//! A daemon under ptrace, which makes it issue system calls that it never makes itself.

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

/// Reports that it is running, waits to be seized, and execs the daemon.
const LAUNCH: &str = "umask 0; echo; read -r go; exec \"$@\" >&2";

/// The environment variable that puts a path into the daemon's memory.
const PATH_VARIABLE: &str = "TRACED_PATH=";

const OPTIONS: Options = Options::PTRACE_O_EXITKILL
    .union(Options::PTRACE_O_TRACEEXEC)
    .union(Options::PTRACE_O_TRACESYSGOOD);

/// The daemon's threads, in the order in which they start.
const THREADS: [&str; 3] = ["worker-4", "session-4", "log"];

/// The one that waits for a VMM.
const SESSION: usize = 1;

/// A daemon with a traced thread: its first, or the one that waits for a VMM. Only the thread that started it may use it.
/// Killed by pid on drop.
pub struct Traced {
    child: Child,
    /// The traced thread.
    pid: Pid,
    directory: TempDir,
    path: u64,
    /// The registers after the system call that it was stopped at.
    caught: Option<user_regs_struct>,
    ended: bool,
}

/// The outcome of a system call.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this.
    Returned(i64),
    /// The daemon was killed for it.
    Killed(Signal),
}

impl Outcome {
    /// The system refused the call with this error.
    pub fn error(error: Errno) -> Self {
        Self::Returned(-i64::from(error as i32))
    }
}

impl Traced {
    /// Starts a daemon with `options` and with `path` in its memory, stopped at its first instruction.
    pub fn start(options: &[&str], path: &Path) -> Self {
        let directory = TempDir::with_prefix("vsock-test-").unwrap();
        let log = File::create(directory.path().join("log")).unwrap();
        // With AF_VSOCK instead there is no path.
        let forwards = options
            .iter()
            .any(|option| option.starts_with("--forward-cid"));
        let uds_path = (!forwards).then(|| directory.path().join("vm.vsock"));
        let mut child = Command::new("/bin/sh")
            .args(["-c", LAUNCH, "sh"])
            .arg(binary())
            .arg(format!("--guest-cid={GUEST_CID}"))
            .arg("--socket")
            .arg(directory.path().join("vhost.socket"))
            .args(uds_path.map(|path| format!("--uds-path={}", path.display())))
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
        ptrace::seize(pid, OPTIONS)
            .expect("a process may trace its child: kernel.yama.ptrace_scope");
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let mut traced = Self {
            child,
            pid,
            directory,
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

    /// Starts a daemon and stops it when it waits for a VMM.
    pub fn serving(options: &[&str], path: &Path) -> Self {
        let mut traced = Self::start(options, path);
        traced.follow_session();
        eventually("the daemon to serve", || {
            traced.log().contains("waiting for a VMM")
        });
        ptrace::interrupt(traced.pid).unwrap();
        assert!(matches!(traced.wait(), WaitStatus::PtraceEvent(..)));
        // It goes on to wait for a VMM.
        traced.next_stop();
        ptrace::syscall(traced.pid, None).unwrap();
        drop(UnixStream::connect(traced.vhost_socket()).unwrap());
        assert_eq!(traced.wait(), WaitStatus::PtraceSyscall(traced.pid));
        traced.caught = Some(ptrace::getregs(traced.pid).unwrap());
        traced
    }

    /// Lets the first thread start the others, and traces the one that waits for a VMM in its place.
    fn follow_session(&mut self) {
        let (first, options) = (self.pid, OPTIONS | Options::PTRACE_O_TRACECLONE);
        ptrace::setoptions(first, options).unwrap();
        let mut session = first;
        for (index, name) in THREADS.into_iter().enumerate() {
            ptrace::cont(first, None).unwrap();
            self.pid = first;
            let clone = ptrace::Event::PTRACE_EVENT_CLONE as i32;
            assert_eq!(
                self.wait(),
                WaitStatus::PtraceEvent(first, Signal::SIGTRAP, clone),
                "{name}"
            );
            self.pid = Pid::from_raw(ptrace::getevent(first).unwrap() as i32);
            assert!(matches!(self.wait(), WaitStatus::PtraceEvent(..)), "{name}");
            if index == SESSION {
                session = self.pid;
                ptrace::setoptions(session, OPTIONS).unwrap();
                ptrace::cont(session, None).unwrap();
            } else {
                ptrace::detach(self.pid, None).unwrap();
            }
        }
        ptrace::detach(first, None).unwrap();
        self.pid = session;
        let comm = format!("/proc/{first}/task/{session}/comm");
        eventually("the thread to have its name", || {
            fs::read_to_string(&comm).is_ok_and(|name| name.trim() == THREADS[SESSION])
        });
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

    /// Makes the daemon issue a system call, after which it is stopped again.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Outcome {
        let caught = self.caught.expect("a daemon that was caught");
        ptrace::setregs(self.pid, registers::calling(caught, number, arguments)).unwrap();
        self.next_stop();
        ptrace::syscall(self.pid, None).unwrap();
        assert_eq!(self.wait(), WaitStatus::PtraceSyscall(self.pid));
        let behind = ptrace::getregs(self.pid).unwrap();
        // A call that it is killed for seems to return, but no instruction follows.
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

    /// Continues the daemon up to and including the system call `number`.
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

    /// Continues the daemon where it was stopped, and detaches.
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
        Pid::from_raw(self.child.id() as i32)
    }

    /// The vhost-user socket.
    pub fn vhost_socket(&self) -> PathBuf {
        self.directory.path().join("vhost.socket")
    }

    /// The socket where host programs connect.
    pub fn uds_path(&self) -> PathBuf {
        self.directory.path().join("vm.vsock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Continues to the next entry to or exit from a system call. A signal on the way is delivered.
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

    /// Changes a byte of the daemon's memory.
    pub fn set_byte(&self, address: u64, byte: u8) {
        let mut word = self.word(address).to_le_bytes();
        word[0] = byte;
        let word = i64::from_le_bytes(word);
        ptrace::write(self.pid, address as ptrace::AddressType, word).unwrap();
    }

    fn word(&self, address: u64) -> u64 {
        ptrace::read(self.pid, address as ptrace::AddressType).unwrap() as u64
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
        }
        // A process ends when its tracer has seen the end of each thread.
        let first = self.pid.as_raw() == self.child.id() as i32;
        if !first && !self.ended {
            let _ = waitpid(self.pid, Some(WaitPidFlag::__WALL));
        }
        let _ = self.child.wait();
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
