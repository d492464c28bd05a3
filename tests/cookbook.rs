//! Runs the commands of docs/COOKBOOK.md in a real guest and on its host, and compares what they write with the page.

mod common;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, PATIENCE, binary};
use common::guest::{Guest, GuestProcess, installed};
use common::uml::Uml;
use common::watchdog::Watchdog;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long a command may take; it bounds a failing run.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// The TCP ports of the page that are the host's. A test takes free ones: others may run at the same time.
const HOST_TCP_PORTS: [&str; 3] = ["15201", "15280", "18080"];

/// The sockets of single ports that the page has, and the options for them.
const PLAIN_SOCKETS: [(&str, &str); 5] = [
    ("--guest-port=22", "vm4-ssh.sock"),
    ("--guest-port=80", "vm4-web.sock"),
    ("--guest-port=1000", "vm4-bus.sock"),
    ("--guest-port=5201", "vm4-iperf.sock"),
    ("--host-port=7001", "who.sock"),
];

/// Marks a section of the page that has nothing to run.
const NOT_RUN: &str = "Not run by the tests";

#[test]
fn all_that_the_page_says_happens() {
    for program in ["ssh", "scp", "iperf3", "curl", "dbus-daemon", "busctl"] {
        installed(program);
    }
    let sections = read_page(&page());
    let sockets = TempDir::with_prefix("vsock-test-").unwrap();
    let path_of = |name: &str| sockets.path().join(name).display().to_string();
    let options = PLAIN_SOCKETS.map(|(option, name)| format!("{option}={}", path_of(name)));
    let daemon = Daemon::start_with(&options.each_ref().map(String::as_str));
    let guest = Uml::boot(&daemon);
    let mut host = Host::new(&daemon);
    let named = PLAIN_SOCKETS.map(|(_, name)| (format!("/tmp/{name}"), path_of(name)));
    host.substitutes.splice(0..0, named);
    prepare_guest(&guest, &host);
    for section in sections {
        println!("{}: {} commands", section.title, section.commands());
        run(&section, &guest, &host).unwrap();
    }
}

#[test]
fn every_section_is_run_or_says_that_it_is_not() {
    let text = page();
    for section in read_page(&text) {
        let title = &section.title;
        let begin = text.find(&format!("\n## {title}\n")).unwrap();
        let body = &text[begin + 1..];
        let body = &body[..body.find("\n## ").unwrap_or(body.len())];
        assert!(
            section.commands() > 0 || body.contains(NOT_RUN),
            "{title} has no command that runs, and does not say so"
        );
    }
}

#[test]
fn what_differs_from_the_page_is_noticed() {
    let daemon = Daemon::start();
    let guest = Uml::boot(&daemon);
    let host = Host::new(&daemon);
    for (commands, difference) in [
        ("host$ echo one\ntwo", "one"),
        ("guest$ echo one\ntwo", "one"),
        ("host$ echo one\none\ntwo", "one"),
        ("guest$ printf 'one\\ntwo\\n'\none", "two"),
        ("host$ false", "exit status 1"),
        ("guest$ exit 3", "exit status 3"),
        ("host$ echo one &\ntwo", "one"),
        ("guest$ echo one &\ntwo", "one"),
    ] {
        let page = format!("\n## Wrong\n\n```sh\n{commands}\n```\n");
        let section = read_page(&page).remove(0);
        let failure = run(&section, &guest, &host).expect_err(commands);
        assert!(failure.contains(difference), "{commands}: {failure}");
    }
}

/// The part of the page below one `## ` heading. What it starts runs until its end.
struct Section {
    title: String,
    steps: Vec<Step>,
}

impl Section {
    fn commands(&self) -> usize {
        let is_command = |step: &&Step| matches!(step, Step::Run { .. });
        self.steps.iter().filter(is_command).count()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Host,
    Guest,
}

enum Step {
    Write {
        place: Place,
        path: String,
        text: String,
    },
    Run {
        place: Place,
        line: String,
        in_background: bool,
        shown: Vec<String>,
    },
}

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/COOKBOOK.md");
    fs::read_to_string(path).unwrap()
}

/// The sections of a page. A block of code counts when it is `sh`, or has the name of a file behind its language.
fn read_page(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(title) = line.strip_prefix("## ") {
            sections.push(Section {
                title: title.to_owned(),
                steps: Vec::new(),
            });
        }
        let Some(kind) = line.strip_prefix("```") else {
            continue;
        };
        let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        match *kind.split(' ').collect::<Vec<_>>() {
            ["sh"] => sections.last_mut().unwrap().steps.extend(commands(&block)),
            [_] | [_, "not-run"] => {}
            [_, file] => {
                let (place, path) = file.split_once(':').unwrap();
                let step = Step::Write {
                    place: place_called(place).unwrap(),
                    path: path.to_owned(),
                    text: block.join("\n") + "\n",
                };
                sections.last_mut().unwrap().steps.push(step);
            }
            _ => panic!("what is a block of `{kind}`?"),
        }
    }
    sections
}

/// The commands of a block, each with the lines that it is shown to write.
fn commands(block: &[&str]) -> Vec<Step> {
    let mut commands: Vec<Step> = Vec::new();
    for line in block {
        let command = line.split_once("$ ");
        let command = command.and_then(|(place, line)| Some((place_called(place)?, line)));
        if let Some((place, line)) = command {
            let foreground = line.strip_suffix(" &");
            commands.push(Step::Run {
                place,
                line: foreground.unwrap_or(line).to_owned(),
                in_background: foreground.is_some(),
                shown: Vec::new(),
            });
        } else if let Some(Step::Run { shown, .. }) = commands.last_mut() {
            shown.push((*line).to_owned());
        } else {
            panic!("no `host$` or `guest$` stands before `{line}`");
        }
    }
    commands
}

fn place_called(name: &str) -> Option<Place> {
    match name {
        "host" => Some(Place::Host),
        "guest" => Some(Place::Guest),
        _ => None,
    }
}

/// Does what a section says; what differs from it otherwise.
fn run(section: &Section, guest: &Guest, host: &Host) -> Result<(), String> {
    let mut running = Vec::new();
    for step in &section.steps {
        match step {
            Step::Write { place, path, text } => match place {
                Place::Host => host.write(path, text),
                Place::Guest => write_in_guest(guest, path, text),
            },
            Step::Run {
                place,
                line,
                in_background,
                shown,
            } => {
                let start = || match place {
                    Place::Host => Running::Host(host.start(line)),
                    Place::Guest => Running::Guest(start_in_guest(guest, line)),
                };
                if *in_background {
                    running.push((line, shown, start()));
                } else {
                    let patience = if running.is_empty() {
                        Duration::ZERO
                    } else {
                        PATIENCE
                    };
                    run_to_its_end(line, shown, patience, start)?;
                }
            }
        }
    }
    for (line, shown, process) in running {
        // A command that shows no output is a service, which is stopped now.
        if !shown.is_empty() {
            compare(line, shown, &process.end())?;
        }
    }
    Ok(())
}

/// Runs a command that may need what was started before it and takes its time to be ready. So it is repeated until it
/// succeeds and writes something; that must then be what is shown.
fn run_to_its_end(
    line: &str,
    shown: &[String],
    patience: Duration,
    start: impl Fn() -> Running,
) -> Result<(), String> {
    let deadline = Instant::now() + patience;
    loop {
        let outcome = start().end();
        let found = outcome.status == 0 && (shown.is_empty() || !outcome.text.is_empty());
        if found || Instant::now() >= deadline {
            return compare(line, shown, &outcome);
        }
        sleep(Duration::from_millis(50));
    }
}

/// The result of a command.
struct Outcome {
    status: i32,
    text: String,
}

fn compare(line: &str, shown: &[String], outcome: &Outcome) -> Result<(), String> {
    let written: Vec<&str> = outcome.text.lines().collect();
    let as_shown = shown.is_empty() || matches_lines(shown, &written);
    if outcome.status == 0 && as_shown {
        return Ok(());
    }
    Err(format!(
        "`{line}`: exit status {}, and it wrote\n{}\nwhere the page shows\n{}\n",
        outcome.status,
        written.join("\n"),
        shown.join("\n")
    ))
}

/// Whether lines are as shown. A line of `…` alone stands for any lines.
fn matches_lines(shown: &[String], written: &[&str]) -> bool {
    match shown.split_first() {
        None => written.is_empty(),
        Some((first, rest)) if first == "…" => {
            (0..=written.len()).any(|skipped| matches_lines(rest, &written[skipped..]))
        }
        Some((first, rest)) => {
            let line = written.first();
            line.is_some_and(|line| matches_line(first, line)) && matches_lines(rest, &written[1..])
        }
    }
}

/// Whether a line is as shown. `…` in it stands for any text.
fn matches_line(shown: &str, written: &str) -> bool {
    let Some((begin, rest)) = shown.split_once('…') else {
        return shown == written;
    };
    let Some(behind) = written.strip_prefix(begin) else {
        return false;
    };
    let mut ends = behind.char_indices().map(|(at, _)| at).collect::<Vec<_>>();
    ends.push(behind.len());
    ends.iter().any(|&at| matches_line(rest, &behind[at..]))
}

/// A command that runs. It is killed when this is dropped, with all that it has started.
enum Running {
    Host(HostShell),
    Guest(GuestProcess),
}

impl Running {
    /// Waits for the command's end.
    fn end(self) -> Outcome {
        match self {
            Running::Host(shell) => shell.end(),
            Running::Guest(process) => {
                let output = process.wait();
                Outcome {
                    status: output.status,
                    text: output.stdout,
                }
            }
        }
    }
}

fn start_in_guest(guest: &Guest, line: &str) -> GuestProcess {
    let process = guest.spawn(&format!("export HOME=/root; cd; {{ {line}\n}} 2>&1"));
    process.close_stdin();
    process
}

fn write_in_guest(guest: &Guest, path: &str, text: &str) {
    let writer = guest.spawn(&format!("HOME=/root; cat >{path}"));
    writer.write(text);
    writer.close_stdin();
    writer.wait_ok();
}

/// Makes of the guest, which has the host's files read only, what an installed system is: directories to write in, a loopback
/// interface, and sshd's keys.
fn prepare_guest(guest: &Guest, host: &Host) {
    guest.run_ok("busybox ip link set lo up");
    guest.run_ok(
        "for directory in /root /tmp /etc/ssh; do mount -t tmpfs -o mode=700 tmpfs $directory; done",
    );
    guest.run_ok("ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key");
    write_in_guest(
        guest,
        "/etc/ssh/sshd_config",
        "Subsystem sftp internal-sftp\n",
    );
    // sshd rejects a root without a readable password entry, or with a locked one.
    guest.run_ok(
        "echo 'root:*:1:0:99999:7:::' >/run/shadow && mount --bind /run/shadow /etc/shadow",
    );
    guest.run_ok("mkdir -m 700 /root/.ssh");
    let key = fs::read_to_string(host.directory.join("key.pub")).unwrap();
    write_in_guest(guest, "/root/.ssh/authorized_keys", &key);
}

/// The host, with a home directory, ports and paths of this test's own in place of the page's.
struct Host {
    directory: PathBuf,
    path: OsString,
    substitutes: Vec<(String, String)>,
}

impl Host {
    fn new(daemon: &Daemon) -> Self {
        let directory = daemon.directory().to_owned();
        let programs = directory.join("programs");
        fs::create_dir(&programs).unwrap();
        for program in ["ssh", "scp"] {
            write_wrapper(program, &programs, &directory);
        }
        let made = Command::new(installed("ssh-keygen"))
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(directory.join("key"))
            .status();
        assert!(made.unwrap().success(), "ssh-keygen failed");

        symlink(binary(), programs.join("vhost-user-vsock")).unwrap();
        let inherited = std::env::var_os("PATH").unwrap();
        let path = [programs]
            .into_iter()
            .chain(std::env::split_paths(&inherited));
        let mut substitutes = vec![
            (
                "/tmp/vm4.vsock".into(),
                daemon.uds_path().display().to_string(),
            ),
            ("/tmp/".into(), format!("{}/", directory.display())),
        ];
        substitutes.extend(
            HOST_TCP_PORTS
                .map(str::to_owned)
                .into_iter()
                .zip(free_ports()),
        );
        Self {
            path: std::env::join_paths(path).unwrap(),
            directory,
            substitutes,
        }
    }

    /// The page's text with this test's paths and ports.
    fn substitute(&self, text: &str) -> String {
        // Test directories are in /tmp as well: replacements are not searched again.
        let mut done = String::new();
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let substitute = self
                .substitutes
                .iter()
                .find(|(from, _)| rest.starts_with(from.as_str()));
            if let Some((from, to)) = substitute {
                done += to;
                rest = &rest[from.len()..];
            } else {
                done.push(next);
                rest = &rest[next.len_utf8()..];
            }
        }
        done
    }

    fn write(&self, path: &str, text: &str) {
        let file = self.directory.join(path.strip_prefix("~/").unwrap());
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, self.substitute(text)).unwrap();
    }

    fn start(&self, line: &str) -> HostShell {
        let output = tempfile::tempfile().unwrap();
        let child = Command::new("sh")
            .args(["-c", &format!("{{ {}\n}} 2>&1", self.substitute(line))])
            .env("HOME", &self.directory)
            .env("PATH", &self.path)
            .current_dir(&self.directory)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .spawn()
            .unwrap();
        HostShell {
            watchdog: Watchdog::start(child.id()),
            child,
            output,
        }
    }
}

/// A shell command on the host, as a process group of its own.
struct HostShell {
    child: Child,
    watchdog: Watchdog,
    output: File,
}

impl HostShell {
    fn end(mut self) -> Outcome {
        let deadline = Instant::now() + COMMAND_LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < deadline, "a command of the host hangs");
            sleep(Duration::from_millis(5));
        };
        let mut text = String::new();
        self.output.seek(SeekFrom::Start(0)).unwrap();
        self.output.read_to_string(&mut text).unwrap();
        Outcome { status, text }
    }
}

impl Drop for HostShell {
    fn drop(&mut self) {
        self.watchdog.dismiss();
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// ssh and scp take the user's directory from the password file, whatever HOME says: here they get this test's.
fn write_wrapper(program: &str, programs: &Path, home: &Path) {
    let wrapper = programs.join(program);
    let (program, home) = (installed(program), home.display());
    let script = format!(
        "#!/bin/sh\nexec {} -F {home}/.ssh/config -o IdentityFile={home}/key \\\n  \
         -o UserKnownHostsFile={home}/known_hosts -o BatchMode=yes -o LogLevel=error \"$@\"\n",
        program.display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Ports that nobody uses now.
fn free_ports() -> Vec<String> {
    let listeners = HOST_TCP_PORTS.map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = listeners.iter().map(|listener| listener.local_addr());
    ports.map(|port| port.unwrap().port().to_string()).collect()
}
