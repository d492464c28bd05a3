//! A running guest: its VMM as a process, and shell commands into it, whichever VMM that is.
//!
//! The guest runs `tests/guest/agent.py` on a serial line whose other end is a socket of this process, so that commands
//! do not depend on the device under test.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::watchdog::Watchdog;

/// How long a guest may take to boot; it bounds a failing run.
const BOOT_LIMIT: Duration = Duration::from_secs(90);

/// How long a command in the guest may take; it bounds a failing run.
const COMMAND_LIMIT: Duration = Duration::from_secs(200);

/// A VMM and the processes it has started. All are killed on drop.
pub struct Vmm {
    child: Child,
    watchdog: Watchdog,
    killed: bool,
}

impl Vmm {
    /// Starts `program`, configured by `prepare`, as leader of its own process group.
    pub fn start(program: &Path, prepare: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(program);
        command.process_group(0);
        prepare(&mut command);
        let child = command.spawn().unwrap();
        Self {
            watchdog: Watchdog::start(child.id()),
            child,
            killed: false,
        }
    }

    /// Kills the VMM, as a crash would.
    pub fn kill(&mut self) {
        if std::mem::replace(&mut self.killed, true) {
            return;
        }
        // The watchdog first: the group's id may be reused afterwards.
        self.watchdog.dismiss();
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Stops the VMM's processes, or continues them.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The path of `program`, which `tests/install-guests.sh` installs.
pub fn installed(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path)
        // A user's PATH may lack the sbin directories.
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|file| file.exists())
        .unwrap_or_else(|| panic!("no {program} here; run `make test`, which installs it"))
}

/// The directory of the scripts that run in guests.
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest")
}

/// The directory that `tests/install-guests.sh` fills.
pub fn guests() -> PathBuf {
    std::env::var_os("VSOCK_GUESTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests"),
        PathBuf::from,
    )
}

/// The result of a command in the guest.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit status; negative for a signal.
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs commands in a guest.
pub struct Guest(Arc<Agent>);

struct Agent {
    line: Mutex<UnixStream>,
    console: PathBuf,
    heard: Mutex<Heard>,
    changed: Condvar,
}

/// What the guest's agent has said so far.
#[derive(Default)]
struct Heard {
    boots: usize,
    ended: bool,
    last_number: u64,
    outputs: HashMap<u64, Output>,
}

impl Guest {
    /// The guest whose agent is at the other end of `line`, and whose kernel writes to the file `console`.
    pub fn new(line: UnixStream, console: PathBuf) -> Self {
        let messages = BufReader::new(line.try_clone().unwrap());
        let agent = Arc::new(Agent {
            line: Mutex::new(line),
            console,
            heard: Mutex::default(),
            changed: Condvar::new(),
        });
        let listener = Arc::clone(&agent);
        std::thread::spawn(move || listener.listen(messages));
        Self(agent)
    }

    /// Waits until the guest has booted `count` times in all, and has its vsock device.
    pub fn wait_for_boot(&self, count: usize) {
        self.0.wait_for("the guest to boot", BOOT_LIMIT, |heard| {
            (heard.boots >= count).then_some(())
        });
        self.run_ok("ls -d /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*");
    }

    /// Runs a shell command in the guest to its end.
    pub fn run(&self, command: &str) -> Output {
        self.spawn(command).wait()
    }

    /// Runs a shell command that must succeed; returns its output.
    pub fn run_ok(&self, command: &str) -> String {
        self.spawn(command).wait_ok()
    }

    /// Starts a shell command in the guest.
    pub fn spawn(&self, command: &str) -> GuestProcess {
        let (number, boot) = {
            let mut heard = self.0.heard.lock().unwrap();
            heard.last_number += 1;
            (heard.last_number, heard.boots)
        };
        self.0
            .say(&format!("run {number} {}", to_hex(command.as_bytes())));
        GuestProcess {
            agent: Arc::clone(&self.0),
            number,
            boot,
            command: command.to_owned(),
        }
    }
}

impl Agent {
    fn listen(&self, messages: BufReader<UnixStream>) {
        for message in messages.lines().map_while(Result::ok) {
            let mut heard = self.heard.lock().unwrap();
            match *message.split_whitespace().collect::<Vec<_>>() {
                ["ready"] => heard.boots += 1,
                ["done", number, status, stdout, stderr] => {
                    let output = Output {
                        status: status.parse().unwrap(),
                        stdout: from_hex(stdout),
                        stderr: from_hex(stderr),
                    };
                    heard.outputs.insert(number.parse().unwrap(), output);
                }
                // A line cut short by a reboot.
                _ => {}
            }
            self.changed.notify_all();
        }
        self.heard.lock().unwrap().ended = true;
        self.changed.notify_all();
    }

    fn say(&self, message: &str) {
        // If the guest is gone, the caller finds out by waiting for the answer.
        let _ = writeln!(self.line.lock().unwrap(), "{message}");
    }

    fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        mut find: impl FnMut(&mut Heard) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + limit;
        let mut heard = self.heard.lock().unwrap();
        loop {
            if let Some(found) = find(&mut heard) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if heard.ended || left.is_zero() {
                let why = if heard.ended {
                    "the VMM has ended"
                } else {
                    "timed out"
                };
                drop(heard);
                let console = self.console_tail();
                panic!("the guest's console:\n{console}\n{why} waiting for {what}");
            }
            heard = self.changed.wait_timeout(heard, left).unwrap().0;
        }
    }

    fn console_tail(&self) -> String {
        let text = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned()
    }
}

/// A command running in the guest. Killed on drop.
pub struct GuestProcess {
    agent: Arc<Agent>,
    number: u64,
    boot: usize,
    command: String,
}

impl GuestProcess {
    /// Writes to the command's standard input.
    pub fn write(&self, text: &str) {
        self.agent.say(&format!(
            "input {} {}",
            self.number,
            to_hex(text.as_bytes())
        ));
    }

    /// Closes the command's standard input.
    pub fn close_stdin(&self) {
        self.agent.say(&format!("close {}", self.number));
    }

    /// Kills the command, if it still runs.
    pub fn kill(&self) {
        self.agent.say(&format!("kill {}", self.number));
    }

    /// Waits for the command to end.
    pub fn wait(self) -> Output {
        let what = format!("the end of `{}` in the guest", self.command);
        self.agent.wait_for(&what, COMMAND_LIMIT, |heard| {
            assert_eq!(
                heard.boots, self.boot,
                "the guest has rebooted under `{}`",
                self.command
            );
            heard.outputs.remove(&self.number)
        })
    }

    /// Waits for the command to succeed; returns its output.
    pub fn wait_ok(self) -> String {
        let command = self.command.clone();
        let output = self.wait();
        assert_eq!(output.status, 0, "`{command}` in the guest: {output:?}");
        output.stdout
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Decodes bytes as the agent writes them in a line of text.
fn to_hex(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "-".to_owned();
    }
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> String {
    let digits = if text == "-" { "" } else { text };
    let bytes: Vec<u8> = (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
