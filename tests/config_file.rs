//! The configuration file, and the command lines and files of `vhost-device-vsock`, which are read as they are.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use clap::Parser;
use common::daemon::{binary, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vhost_user_vsock::cli::{Activation, Args};
use vhost_user_vsock::config::{HostSide, ProcessConfig, Socket};

/// The configuration that a command line makes. Nothing is bound.
fn config(args: &[&str]) -> Result<ProcessConfig, String> {
    let args = [&["vhost-user-vsock"], args].concat();
    let args = Args::try_parse_from(args).map_err(|error| error.to_string())?;
    let config = args.config(&Activation::default());
    config.map_err(|error| error.to_string())
}

/// The configuration that a file makes, or the message without the path of the file.
fn file(text: &str) -> Result<ProcessConfig, String> {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("vms.yaml");
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let config = config(&["--config", path]);
    config.map_err(|error| error.replace(path, "FILE"))
}

/// What distinguishes the VMs of a configuration: CID, socket, host's side, sizes and groups.
fn describe(config: &ProcessConfig) -> Vec<String> {
    let describe = config.vms.iter().map(|vm| {
        let Socket::Path(socket) = &vm.socket else {
            panic!()
        };
        let host = match &vm.host {
            HostSide::Unix { path, .. } => path.display().to_string(),
            HostSide::Vsock { cid, listen } => {
                let ports: Vec<u32> = listen.iter().map(|at| at.port).collect();
                format!("{cid} {ports:?}")
            }
        };
        let socket = socket.display();
        let (tx, queue, groups) = (vm.tx_buffer_size, vm.queue_size, vm.groups.join("+"));
        format!("{} {socket} {host} {tx} {queue} {groups}", vm.guest_cid)
    });
    describe.collect()
}

/// The file in the README of vhost-device-vsock 0.3.0.
const FILE_OF_ITS_README: &str = "\
vms:
    - guest_cid: 3
      socket: /tmp/vhost3.socket
      uds_path: /tmp/vm3.sock
      tx_buffer_size: 65536
      queue_size: 1024
      groups: group1+groupA
    - guest_cid: 4
      socket: /tmp/vhost4.socket
      uds_path: /tmp/vm4.sock
      tx_buffer_size: 32768
      queue_size: 256
      groups: group2+groupB
    - guest_cid: 5
      socket: /tmp/vhost5.socket
      forward-cid: 1
      forward-listen: 9001+9002
      tx_buffer_size: 32768
      queue_size: 1024
";

#[test]
fn the_file_of_vhost_device_vsock_is_read_as_it_is() {
    let expected = [
        "3 /tmp/vhost3.socket /tmp/vm3.sock 65536 1024 group1+groupA",
        "4 /tmp/vhost4.socket /tmp/vm4.sock 32768 256 group2+groupB",
        "5 /tmp/vhost5.socket 1 [9001, 9002] 32768 1024 default",
    ];
    assert_eq!(describe(&file(FILE_OF_ITS_README).unwrap()), expected);
    // What its own parser takes.
    let snake = FILE_OF_ITS_README.replace("forward-", "forward_");
    assert_eq!(describe(&file(&snake).unwrap()), expected);
    let windows = FILE_OF_ITS_README.replace('\n', "\r\n");
    assert_eq!(describe(&file(&windows).unwrap()), expected);
    let marked = format!("\u{feff}---\n{FILE_OF_ITS_README}...\n");
    assert_eq!(describe(&file(&marked).unwrap()), expected);
}

#[test]
fn the_command_lines_of_vhost_device_vsock_are_read_as_they_are() {
    // From its README, with `vhost-device-vsock` left out.
    for (line, expected) in [
        (
            "--vm guest-cid=3,socket=/tmp/vhost3.socket,uds-path=/tmp/vm3.vsock,groups=group1+groupA \
             --vm guest-cid=4,socket=/tmp/vhost4.socket,uds-path=/tmp/vm4.vsock,tx-buffer-size=32768,queue-size=256 \
             --vm guest-cid=5,socket=/tmp/vhost5.socket,forward-cid=1,forward-listen=9001+9002,tx-buffer-size=32768,queue-size=1024",
            &[
                "3 /tmp/vhost3.socket /tmp/vm3.vsock 262144 1024 group1+groupA",
                "4 /tmp/vhost4.socket /tmp/vm4.vsock 32768 256 default",
                "5 /tmp/vhost5.socket 1 [9001, 9002] 32768 1024 default",
            ][..],
        ),
        (
            "--vm guest-cid=4,uds-path=/tmp/vm4.vsock,socket=/tmp/vhost4.socket",
            &["4 /tmp/vhost4.socket /tmp/vm4.vsock 262144 1024 default"],
        ),
        (
            "--vm guest-cid=4,uds-path=/tmp/vm4.vsock,socket=/tmp/vhost4.socket,tx-buffer-size=65536,queue-size=1024",
            &["4 /tmp/vhost4.socket /tmp/vm4.vsock 65536 1024 default"],
        ),
        (
            "--vm guest-cid=3,uds-path=/tmp/vm3.vsock,socket=/tmp/vhost3.socket,groups=group1+group2 \
             --vm guest-cid=4,uds-path=/tmp/vm4.vsock,socket=/tmp/vhost4.socket,groups=group1",
            &[
                "3 /tmp/vhost3.socket /tmp/vm3.vsock 262144 1024 group1+group2",
                "4 /tmp/vhost4.socket /tmp/vm4.vsock 262144 1024 group1",
            ],
        ),
        (
            "--vm guest-cid=4,forward-cid=1,forward-listen=9001+9002,socket=/tmp/vhost4.socket",
            &["4 /tmp/vhost4.socket 1 [9001, 9002] 262144 1024 default"],
        ),
        (
            "--guest-cid=4 --socket=/tmp/vhost4.socket --uds-path=/tmp/vm4.vsock --tx-buffer-size=65536 --queue-size=256 --groups=a+b",
            &["4 /tmp/vhost4.socket /tmp/vm4.vsock 65536 256 a+b"],
        ),
        (
            "--guest-cid=4 --socket=/tmp/vhost4.socket --forward-cid=1 --forward-listen=9001+9002 --tx-buffer-size=65536 --queue-size=256",
            &["4 /tmp/vhost4.socket 1 [9001, 9002] 65536 256 default"],
        ),
        (
            "--vm guest_cid=4,socket=/tmp/vhost4.socket,uds-path=/tmp/vm4.vsock,tx-buffer-size=65536,queue-size=256,groups=a",
            &["4 /tmp/vhost4.socket /tmp/vm4.vsock 65536 256 a"],
        ),
    ] {
        let args: Vec<&str> = line.split_whitespace().collect();
        let config = config(&args).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(describe(&config), expected, "{line}");
    }
}

#[test]
fn what_the_parser_of_vhost_device_vsock_gets_wrong_works() {
    let vm = "vms:\n- guest_cid: 5\n  socket: /tmp/vhost5.socket\n";
    for (text, expected) in [
        // A string alone is a port there, which YAML does not make of digits.
        (
            "  forward_cid: 1\n  forward_listen: 9001\n",
            "1 [9001] 262144 1024 default",
        ),
        (
            "  forward_cid: 1\n  forward_listen: '9001'\n",
            "1 [9001] 262144 1024 default",
        ),
        (
            "  forward_cid: 1\n  forward_listen: [9001, 9002]\n",
            "1 [9001, 9002] 262144 1024 default",
        ),
        ("  forward-cid: 2\n", "2 [] 262144 1024 default"),
        (
            "  uds_path: /tmp/vm5.vsock\n  groups: 7\n",
            "/tmp/vm5.vsock 262144 1024 7",
        ),
        (
            "  uds_path: /tmp/vm5.vsock\n  groups: [7, a]\n",
            "/tmp/vm5.vsock 262144 1024 7+a",
        ),
        (
            "  uds_path: /tmp/vm5.vsock\n  groups: []\n",
            "/tmp/vm5.vsock 262144 1024 ",
        ),
        (
            "  uds_path: /tmp/vm5.vsock\n  groups:\n",
            "/tmp/vm5.vsock 262144 1024 default",
        ),
        (
            "  uds-path: '/tmp/vm5.vsock'\n  queue-size: '256'\n",
            "/tmp/vm5.vsock 262144 256 default",
        ),
    ] {
        let config = file(&format!("{vm}{text}")).unwrap_or_else(|error| panic!("{text}: {error}"));
        let expected = format!("5 /tmp/vhost5.socket {expected}");
        assert_eq!(describe(&config), [expected], "{text}");
    }
}

#[test]
fn all_options_may_stand_in_the_file() {
    let text = "\
vms:
- guest_cid: 5
  fd: 7
  uds_path: /tmp/vm5.vsock
  max_connections: 9
  busy-poll: 0
  socket_mode: 0606
  socket_group: 0
  wait_for_guest: 30
  sibling_dir: [/tmp, /]
  guest_port:
    22: /tmp/vm5-ssh.socket
    80: /tmp/vm5-web.socket
  host_port: 5432=/tmp/postgres.socket
  seqpacket: false
";
    let config = file(text).unwrap();
    let [vm] = &config.vms[..] else { panic!() };
    assert_eq!(vm.socket, Socket::Inherited(7));
    assert_eq!(vm.max_connections, 9);
    assert!(vm.busy_poll.is_zero());
    assert_eq!(vm.access.mode.0, 0o606);
    assert_eq!(vm.access.group.unwrap().0.as_raw(), 0);
    assert_eq!(vm.wait_for_guest.as_secs(), 30);
    assert_eq!(vm.sibling_dirs.len(), 2);
    let ports: Vec<u32> = vm.guest_ports.iter().map(|port| port.port).collect();
    assert_eq!(ports, [22, 80]);
    assert_eq!(vm.host_ports[0].port, 5432);
    assert!(!vm.seqpacket);
}

#[test]
fn options_beside_the_file_are_for_vms_that_say_nothing_else() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("vms.yaml");
    fs::write(&path, FILE_OF_ITS_README).unwrap();
    let path = path.to_str().unwrap();
    let config = config(&["--config", path, "--groups=x", "--max-connections=3"]).unwrap();
    let groups: Vec<String> = config.vms.iter().map(|vm| vm.groups.join("+")).collect();
    assert_eq!(groups, ["group1+groupA", "group2+groupB", "x"]);
    assert!(config.vms.iter().all(|vm| vm.max_connections == 3));
}

#[test]
fn mistakes_have_file_line_column_and_name() {
    let vm = "vms:\n- guest_cid: 3\n  socket: /tmp/a\n  uds_path: /tmp/b\n";
    let with = |line: &str| format!("{vm}{line}");
    for (text, mistake) in [
        (String::new(), "FILE:1:1: vms is missing"),
        ("guest_cid: 3".into(), "FILE:1:1: guest_cid: no such key"),
        ("vms: [".into(), "FILE:"),
        (
            "vms:\n- guest_cid: 3\n  socket: /tmp/a\n".into(),
            "FILE:2:3: uds-path is missing",
        ),
        (
            "vms:\n- socket: /tmp/a\n  uds_path: /tmp/b\n".into(),
            "FILE:2:3: guest-cid is missing",
        ),
        (with("  group: a\n"), "FILE:5:3: group: no such key"),
        (
            with("  uds-path: /tmp/c\n"),
            "FILE:5:3: uds-path: given twice",
        ),
        (
            with("  queue_size: [1]\n"),
            "FILE:5:15: queue_size: this is a list",
        ),
        (
            with("  queue_size: big\n"),
            "FILE:5:15: queue_size=big: not a number in range",
        ),
        (
            with("  seqpacket: maybe\n"),
            "FILE:5:14: seqpacket=maybe: say on or off",
        ),
        (
            with("  queue_size: 3\n"),
            "FILE:5:15: --queue-size=3: a ring",
        ),
        (
            with("  forward_cid: 1\n"),
            "FILE:5:16: --forward-cid and --uds-path exclude",
        ),
        (
            with("  forward_listen: 1\n"),
            "FILE:5:19: --forward-listen: it goes with",
        ),
        (
            with("  guest_port: {22: /tmp/a}\n"),
            "FILE:5:15: --guest-port /tmp/a: another socket",
        ),
        (
            with("  guest_port: {22: /tmp/b_1}\n"),
            "FILE:5:15: --guest-port /tmp/b_1: a guest's",
        ),
        (
            with("  host_port: {22: /tmp/./a}\n"),
            "FILE:5:14: --host-port /tmp/./a: no host program",
        ),
        (
            with("  host_port: {22: /no/where}\n"),
            "FILE:5:14: --host-port /no/where: the directory",
        ),
        (
            with("  sibling_dir: /no/where\n"),
            "FILE:5:16: --sibling-dir /no/where",
        ),
        (
            with("  socket_group: nobody at all\n"),
            "FILE:5:17: socket_group=nobody at all: ",
        ),
        (
            with("- guest_cid: 3\n  socket: /tmp/c\n  uds_path: /tmp/d\n"),
            "FILE:5:14: --guest-cid=3: another VM",
        ),
        (
            with("- guest_cid: 4\n  socket: /tmp/c\n  uds_path: /tmp/a\n"),
            "FILE:7:13: --uds-path /tmp/a: another",
        ),
        (
            with("- guest_cid: 4\n  socket: /tmp/c\n  forward_cid: 3\n"),
            "FILE:7:16: --forward-cid=3: a guest of",
        ),
        (
            with("- guest_cid: 2\n  socket: /tmp/c\n  forward_cid: 3\n"),
            "FILE:5:14: --guest-cid=2: ",
        ),
    ] {
        let error = file(&text).unwrap_err();
        assert!(
            error.starts_with(mistake),
            "{text}: {error} should say {mistake}"
        );
    }
}

#[test]
fn the_files_of_the_documentation_are_right() {
    let mut files = 0;
    for page in ["README.md", "docs/COOKBOOK.md"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(page);
        let text = fs::read_to_string(path).unwrap();
        for block in text.split("\n```yaml\n").skip(1) {
            let block = block.split_once("\n```").unwrap().0;
            let config = file(&block.replace("/run/vms/", "/tmp/"));
            let config = config.unwrap_or_else(|error| panic!("{page}: {error}"));
            assert!(config.vms.len() > 1);
            files += 1;
        }
    }
    assert_eq!(files, 2);
}

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn assert_refused(args: &[&str], message: &str) {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(message), "{stderr} should say {message}");
}

#[test]
fn a_file_that_can_not_be_used_ends_the_daemon_with_one_line() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("vms.yaml");
    let path = path.to_str().unwrap();
    assert_refused(
        &["--config", path],
        &format!("--config {path}: No such file"),
    );
    let here = directory.path().to_str().unwrap();
    assert_refused(&["--config", here], "Is a directory");
    for (text, mistake) in [
        (
            &b"vms:\n- guest_cid: 2\n  x: 1\n"[..],
            ":3:3: x: no such key",
        ),
        (b"vms: \xff", "not UTF-8"),
        (&[b'#'; (1 << 20) + 1], "more than 1048576 bytes"),
        (&[b'['; 1 << 20], "vms.yaml:1:"),
    ] {
        fs::write(path, text).unwrap();
        assert_refused(&["--config", path], mistake);
    }
    assert_refused(&["--config", path, "--guest-cid=3"], "--config");
    assert_refused(&["--config", path, "--vm=guest-cid=3"], "--config");
    assert_refused(
        &["--vm=guest-cid=3", "--guest-port=1=/tmp/x"],
        "--guest-port",
    );
}

#[test]
fn the_vms_of_a_file_are_served() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let text = [5, 6].map(|cid| {
        let [socket, uds] = ["vhost", "uds"].map(|name| path(&format!("{name}{cid}")));
        let (socket, uds) = (socket.display(), uds.display());
        format!("  - guest_cid: {cid}\n    socket: {socket}\n    uds_path: {uds}\n")
    });
    let file = path("vms.yaml");
    fs::write(&file, format!("vms:\n{}", text.concat())).unwrap();
    let mut daemon = Command::new(binary())
        .arg("--config")
        .arg(&file)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let sockets = ["vhost5", "vhost6", "uds5", "uds6"].map(path);
    eventually("all sockets to be served", || {
        let mut sockets = sockets.iter();
        sockets.all(|socket| UnixStream::connect(socket).is_ok())
    });
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert!(sockets.iter().all(|socket| !socket.exists()));
}
