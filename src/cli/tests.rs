use std::time::Duration;

use super::*;
use crate::config::{HostSide, PortPath, Socket, SocketMode, VmConfig, VsockPort};
use crate::packet::header::Cid;
use crate::packet::header::PacketType;

fn try_config(args: &[&str], activation: &Activation) -> Result<ProcessConfig, ConfigError> {
    let args = [&["vhost-user-vsock"], args].concat();
    Args::try_parse_from(args).unwrap().config(activation)
}

fn config(args: &[&str]) -> ProcessConfig {
    try_config(args, &Activation::default()).unwrap()
}

const THREE: [&str; 3] = ["--guest-cid=4", "--socket=/tmp/a", "--uds-path=/tmp/b"];

#[test]
fn options_that_are_not_given_have_the_defaults_of_the_library() {
    let vm = "guest-cid=4,socket=/tmp/a,uds-path=/tmp/b";
    let expected = VmConfig::new(Cid::try_from(4u32).unwrap(), "/tmp/a", "/tmp/b");
    for args in [&THREE[..], &["--vm", vm]] {
        let config = config(args);
        let expected = ProcessConfig::new(vec![expected.clone()]);
        assert_eq!(format!("{config:?}"), format!("{expected:?}"), "{args:?}");
    }
}

/// Every option but those of a VM's sockets, with a value that is not the default.
const MORE: [(&str, &str); 9] = [
    ("tx-buffer-size", "9"),
    ("queue-size", "64"),
    ("max-connections", "7"),
    ("busy-poll", "8"),
    ("socket-mode", "606"),
    ("groups", "a+b"),
    ("wait-for-guest", "5"),
    ("sibling-dir", "/tmp"),
    ("host-port", "80=/tmp/web"),
];

fn assert_changed(vm: &VmConfig) {
    assert_eq!((vm.tx_buffer_size, vm.queue_size), (9, 64));
    assert_eq!(vm.max_connections, 7);
    assert_eq!(vm.busy_poll, Duration::from_micros(8));
    assert_eq!(vm.access.mode, SocketMode(0o606));
    assert_eq!(vm.groups, ["a", "b"]);
    assert_eq!(vm.wait_for_guest, Duration::from_secs(5));
    assert_eq!(vm.sibling_dirs, [PathBuf::from("/tmp")]);
    let (port, path) = (80, "/tmp/web".into());
    assert_eq!(
        vm.host_ports,
        [PortPath {
            port,
            packet_type: PacketType::Stream,
            path
        }]
    );
}

#[test]
fn options_change_the_configuration() {
    let more = MORE.map(|(name, value)| format!("--{name}={value}"));
    let mut args = THREE.to_vec();
    args.extend(more.iter().map(String::as_str));
    args.extend(["--sandbox=strict", "--stats-path=/tmp/c"]);
    args.push("--handover-path=/tmp/h");
    args.extend(["--guest-port=22=/tmp/ssh", "--guest-port=81=/tmp/x=y"]);
    let config = config(&args);
    let [vm] = &config.vms[..] else { panic!() };
    assert_changed(vm);
    let port_path = |port, path: &str| PortPath {
        packet_type: PacketType::Stream,
        port,
        path: path.into(),
    };
    let expected = [port_path(22, "/tmp/ssh"), port_path(81, "/tmp/x=y")];
    assert_eq!(vm.guest_ports, expected);
    assert_eq!(config.access, vm.access);
    assert_eq!(config.sandbox, Sandbox::Strict);
    assert_eq!(config.stats_path, Some("/tmp/c".into()));
    assert_eq!(config.handover_path, Some("/tmp/h".into()));
}

#[test]
fn all_options_of_a_vm_may_stand_in_vm() {
    let more = MORE.map(|(name, value)| format!(",{}={value}", name.replace('-', "_")));
    let vm = format!(
        "guest-cid=5,fd=3,uds-path=/tmp/b,guest-port=1=/tmp/c{}",
        more.concat()
    );
    let config = config(&["--vm", &vm]);
    assert_changed(&config.vms[0]);
    assert_eq!(config.vms[0].socket, Socket::Inherited(3));
    assert_eq!(config.vms[0].guest_ports[0].port, 1);
}

#[test]
fn options_beside_vm_are_for_those_that_say_nothing_else() {
    let config = config(&[
        "--vm=guest-cid=4,socket=/tmp/a,uds-path=/tmp/b",
        "--vm=guest-cid=5,socket=/tmp/c,uds-path=/tmp/d,queue-size=128,groups=b",
        "--queue-size=64",
        "--groups=a",
        "--socket-mode=606",
    ]);
    let sizes: Vec<_> = config.vms.iter().map(|vm| vm.queue_size).collect();
    assert_eq!(sizes, [64, 128]);
    let groups: Vec<_> = config.vms.iter().map(|vm| vm.groups.concat()).collect();
    assert_eq!(groups, ["a", "b"]);
    assert_eq!(config.vms[1].access.mode, SocketMode(0o606));
    assert_eq!(config.access.mode, SocketMode(0o606));
}

fn at(port: u32) -> VsockPort {
    VsockPort {
        port,
        packet_type: PacketType::Stream,
    }
}

#[test]
fn a_vm_with_a_uds_path_is_not_forwarded_by_default() {
    let config = config(&[
        "--vm=guest-cid=4,socket=/tmp/a,uds-path=/tmp/b",
        "--vm=guest-cid=5,socket=/tmp/c,forward-listen=9001+9002",
        "--forward-cid=1",
    ]);
    assert_eq!(config.vms[0].host, HostSide::unix("/tmp/b"));
    let forwarded = HostSide::Vsock {
        cid: Cid::from_raw(1),
        listen: vec![at(9001), at(9002)],
    };
    assert_eq!(config.vms[1].host, forwarded);
}

#[test]
fn groups_may_be_none() {
    let groups = |option| {
        let args = [&THREE[..], &[option]].concat();
        config(&args).vms[0].groups.clone()
    };
    assert_eq!(groups("--groups="), [""; 0]);
    assert_eq!(groups("--groups=a+b+a"), ["a", "b"]);
    let args = [&THREE[..], &["--groups=a+"]].concat();
    let refused = try_config(&args, &Activation::default());
    assert_eq!(refused.unwrap_err(), ConfigError::GroupName);
}

#[test]
fn inherited_sockets_replace_those_of_the_paths() {
    let sockets = [(3, "vhost-user".to_owned()), (4, "host".to_owned())];
    let activation = Activation::new(sockets.into_iter()).unwrap();
    let config = try_config(&THREE, &activation).unwrap();
    assert_eq!(config.vms[0].socket, Socket::Inherited(3));
    let uds = HostSide::Unix {
        path: "/tmp/b".into(),
        fd: Some(4),
    };
    assert_eq!(config.vms[0].host, uds);
}

#[test]
fn a_vm_is_read_as_vhost_device_vsock_reads_it() {
    let args = ["--vm=guest_cid=5,socket=/tmp/a,uds-path=/tmp/b,tx-buffer-size=9,queue-size=64"];
    let config = config(&args);
    let [vm] = &config.vms[..] else { panic!() };
    assert_eq!(vm.guest_cid.get(), 5);
    assert_eq!((vm.tx_buffer_size, vm.queue_size), (9, 64));
    assert_eq!(vm.socket, Socket::Path("/tmp/a".into()));
    assert_eq!(vm.host, HostSide::unix("/tmp/b"));
}

#[test]
fn mistakes_in_a_vm_are_named() {
    let vm = |text: &str| format!("guest-cid=5,socket=/tmp/a,uds-path=/tmp/b,{text}");
    for (text, mistake) in [
        (
            "guest-cid=5,socket=/tmp/a".to_owned(),
            "uds-path= is missing",
        ),
        (
            "socket=/tmp/a,uds-path=/tmp/b".to_owned(),
            "guest-cid= is missing",
        ),
        (
            "guest-cid=x,socket=/a,uds-path=/b".to_owned(),
            "guest-cid=x: not a number",
        ),
        (
            "guest-cid=2,socket=/a,uds-path=/b".to_owned(),
            "guest-cid=2: 2 is not a guest's CID",
        ),
        ("guest-cid".to_owned(), "not KEY=VALUE"),
        (vm("group=c"), "group: no such key"),
        (vm("vm=c"), "vm: no such key"),
        (vm("sandbox=off"), "sandbox: no such key"),
        (vm("guest_cid=6"), "guest_cid: given twice"),
        (vm("fd=3"), "--fd and --socket exclude each other"),
        (
            vm("forward-cid=1"),
            "--forward-cid and --uds-path exclude each other",
        ),
        (vm("forward-listen=1"), "it goes with --forward-cid"),
        (vm("forward-listen=1+x"), "forward-listen=1+x: not a number"),
        (vm("guest-port=22"), "guest-port=22: say PORT=PATH"),
        (vm("guest-port=-1=/tmp/x"), "say PORT=PATH"),
        (
            vm("guest-port=4294967295=/tmp/x"),
            "--guest-port: 4294967295 is no port",
        ),
        (
            vm("guest-port=1=/tmp/x,guest-port=1=/tmp/y"),
            "--guest-port: port 1 is given twice",
        ),
        (
            vm("host-port=1=/tmp/x,host-port=1=/tmp/y"),
            "--host-port: port 1 is given twice",
        ),
        (vm("wait-for-guest=86401"), "at most 86400 seconds"),
        (vm("queue-size=3"), "--queue-size=3: a ring"),
    ] {
        let args = ["vhost-user-vsock", "--vm", &text];
        let config = Args::try_parse_from(args).map_err(|error| error.to_string());
        let config = config.and_then(|args| {
            let config = args.config(&Activation::default());
            config.map_err(|error| error.to_string())
        });
        let error = config.unwrap_err();
        assert!(error.contains(mistake), "{error} should say {mistake}");
    }
}

#[test]
fn a_mistake_in_one_of_several_vms_says_in_which() {
    let error = try_config(
        &[
            "--vm=guest-cid=4,socket=/tmp/a,uds-path=/tmp/b",
            "--vm=guest-cid=5,socket=/tmp/c,uds-path=/tmp/./b",
        ],
        &Activation::default(),
    );
    let message = "--vm number 2: --uds-path /tmp/./b: another socket has this path";
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with(message), "{error}");
}
