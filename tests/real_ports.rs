//! Programs of the host that know nothing of vsock, and a real Linux 6.1 guest under User-Mode Linux: ports as plain sockets,
//! programs that start before the guest, and who calls.

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread::spawn;

use common::daemon::{Daemon, GUEST_CID, eventually};
use common::guest::installed;
use common::host::{HostProgram, Pattern, assert_is_ok};
use common::scenarios::spawn_peer;
use common::ssh;
use common::uml::Uml;
use tempfile::TempDir;

/// Ports of the guest's that have a socket of their own on the host.
const HTTP: u32 = 80;
const SSH: u32 = 22;
const AGENT: u32 = 23;

/// A port of the host's that has one.
const HOST_AGENT: u32 = 24;

/// A port that has none.
const ECHO: u32 = 9000;

/// A daemon with sockets for the ports, in a directory of their own.
struct Ports {
    daemon: Daemon,
    folder: TempDir,
}

impl Ports {
    fn start(options: &[&str]) -> Self {
        let folder = TempDir::with_prefix("ports-").unwrap();
        let path = |name| folder.path().join(name).display().to_string();
        let ports = [
            format!("--guest-port={HTTP}={}", path("http")),
            format!("--guest-port={SSH}={}", path("ssh")),
            format!("--guest-port={AGENT}={}", path("agent")),
            format!("--host-port={HOST_AGENT}={}", path("host-agent")),
        ];
        let ports = ports.iter().map(String::as_str);
        let options: Vec<_> = ports.chain(options.iter().copied()).collect();
        Self {
            daemon: Daemon::start_with(&options),
            folder,
        }
    }

    /// A file in the directory.
    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `curl` of a page of the guest's.
    fn curl(&self, page: &str) -> Command {
        let mut curl = Command::new(installed("curl"));
        curl.args(["--silent", "--show-error", "--max-time", "100"])
            .arg("--unix-socket")
            .arg(self.file("http"))
            .arg(format!("http://vm/{page}"));
        curl
    }

    /// `ssh` to the guest.
    fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new(installed("ssh"));
        ssh.args(ssh::arguments(
            &self.file("ssh"),
            &self.file("key"),
            command,
        ))
        .stderr(Stdio::piped());
        ssh
    }
}

/// The output of a program that must succeed.
#[track_caller]
fn output_of(child: Child) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{status}: {stderr}");
    String::from_utf8(stdout).unwrap()
}

fn start(command: &mut Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn curl_reaches_a_server_in_the_guest() {
    let ports = Ports::start(&[]);
    let guest = Uml::boot(&ports.daemon);
    let early = start(&mut ports.curl("")).wait_with_output().unwrap();
    assert!(!early.status.success(), "nobody serves yet: {early:?}");
    let _server = spawn_peer(&guest, &format!("http {HTTP}"));
    eventually("the guest's server", || {
        start(&mut ports.curl("")).wait().unwrap().success()
    });
    for page in ["", "a/page"] {
        let answer = output_of(start(&mut ports.curl(page)));
        assert_eq!(answer, format!("vm/{page} in the guest\n"));
    }
}

#[test]
fn ssh_gets_in() {
    let ports = Ports::start(&["--wait-for-guest=30"]);
    ssh::make_key(&ports.file("key"));
    let guest = Uml::boot(&ports.daemon);
    let _sshd = ssh::serve(&guest, SSH, &ports.file("key"));
    let answer = output_of(start(&mut ports.ssh("uname")));
    assert_eq!(answer, "Linux\n");

    // A file there and back, while ssh's own windows are in use.
    let bytes = Pattern::new("ssh").at(0, 1 << 18).repeat(4);
    let mut cat = ports.ssh("cat");
    cat.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut cat = cat.spawn().unwrap();
    let (mut input, sent) = (cat.stdin.take().unwrap(), bytes.clone());
    let writer = spawn(move || input.write_all(&sent).unwrap());
    let output = cat.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout == bytes, "other bytes came back");
}

/// `ssh-add` knows its server, an agent, by a Unix path alone, and an agent knows nothing else.
#[test]
fn programs_that_know_only_a_unix_path_talk_to_each_other() {
    const LIST: &str = "ssh-add -l";
    let ports = Ports::start(&[]);
    ssh::make_key(&ports.file("key"));
    let guest = Uml::boot(&ports.daemon);

    // The agent in the guest.
    let agent = format!(
        "ssh-agent -D -a /run/agent & exec socat VSOCK-LISTEN:{AGENT},fork UNIX-CONNECT:/run/agent"
    );
    let _agent = guest.spawn(&agent);
    let at_host = |arguments: &[&str]| {
        let mut add = Command::new(installed("ssh-add"));
        add.args(arguments)
            .env("SSH_AUTH_SOCK", ports.file("agent"));
        add
    };
    eventually("the guest's agent", || {
        let keys = start(&mut at_host(&["-l"])).wait_with_output();
        keys.unwrap()
            .stdout
            .starts_with(b"The agent has no identities")
    });
    output_of(start(&mut at_host(&[ports.file("key").to_str().unwrap()])));
    let keys = output_of(start(&mut at_host(&["-l"])));
    assert!(keys.contains("the-test"), "{keys}");
    let in_guest = guest.run_ok(&format!("SSH_AUTH_SOCK=/run/agent {LIST}"));
    assert_eq!(in_guest, keys);

    // The agent on the host.
    let path = ports.file("host-agent");
    let _agent = HostProgram::start("ssh-agent", ["-D", "-a", path.to_str().unwrap()]);
    eventually("the host's agent", || path.exists());
    let add = Command::new(installed("ssh-add"))
        .arg("-q")
        .arg(ports.file("key"))
        .env("SSH_AUTH_SOCK", &path)
        .status();
    assert!(add.unwrap().success());
    let _door = guest.spawn(&format!(
        "exec socat UNIX-LISTEN:/run/door,fork VSOCK-CONNECT:2:{HOST_AGENT}"
    ));
    eventually("the guest's door", || {
        guest.run("test -S /run/door").status == 0
    });
    let in_guest = guest.run_ok(&format!("SSH_AUTH_SOCK=/run/door {LIST}"));
    assert_eq!(in_guest, keys);
}

#[test]
fn programs_that_start_before_the_guest_get_in() {
    let ports = Ports::start(&["--wait-for-guest=100"]);
    ssh::make_key(&ports.file("key"));
    let ssh = start(&mut ports.ssh("echo in"));
    let curl = start(&mut ports.curl("early"));
    let path = ports.daemon.uds_path();
    let mut line = HostProgram::start("nc", ["-U", path.to_str().unwrap()]);
    line.write(&format!("CONNECT {ECHO}\n"));

    let guest = Uml::boot(&ports.daemon);
    // The guest is there, and refuses until its servers are, too.
    let _echo = spawn_peer(&guest, &format!("echo {ECHO}"));
    assert_is_ok(&line.next_line().unwrap());
    line.write("an echo\n");
    assert_eq!(line.next_line().as_deref(), Some("an echo\n"));
    let _server = spawn_peer(&guest, &format!("http {HTTP}"));
    assert_eq!(output_of(curl), "vm/early in the guest\n");
    let _sshd = ssh::serve(&guest, SSH, &ports.file("key"));
    assert_eq!(output_of(ssh), "in\n");
}

/// What README has for Python.
const WHO_CALLS: &str = "
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print('listening', flush=True)
while True:
    stream, _ = listener.accept()
    print(stream.getpeername().decode(), flush=True)
    stream.close()
";

#[test]
fn a_host_program_sees_who_calls() {
    let ports = Ports::start(&[]);
    let guest = Uml::boot(&ports.daemon);
    let mut names = Vec::new();
    for (port, path) in [
        (ECHO, ports.daemon.host_port_path(ECHO)),
        (HOST_AGENT, ports.file("host-agent")),
    ] {
        let program = HostProgram::start("python3", ["-c", WHO_CALLS, path.to_str().unwrap()]);
        assert_eq!(program.next_line().as_deref(), Some("listening\n"));
        for _ in 0..2 {
            let own_port = spawn_peer(&guest, &format!("port {port}")).wait_ok();
            let name = program.next_line().unwrap();
            let caller = format!(
                "\0vhost-user-vsock/2:{port}/{GUEST_CID}:{}/{}.",
                own_port.trim(),
                ports.daemon.pid()
            );
            assert!(name.starts_with(&caller), "{name:?} is not {caller:?}");
            names.push(name);
        }
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 4, "{names:?}");
}
