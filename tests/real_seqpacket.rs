//! Real Linux 6.1 guests under User-Mode Linux exchange messages, with their host and with each other.

mod common;

use common::daemon::Daemon;
use common::messages;
use common::scenarios::{self, Opener};
use common::siblings::{Kind, Vms};
use common::uml::Uml;
use tempfile::TempDir;

#[test]
fn programs_talk_in_both_directions() {
    let directory = TempDir::new().unwrap();
    let daemon = messages::start_with_plain_ports(directory.path());
    let guest = Uml::boot(&daemon);
    messages::guest_and_host_talk(&guest, &daemon, Opener::Guest);
    messages::guest_and_host_talk(&guest, &daemon, Opener::Host);
    messages::plain_ports_carry_messages(&guest, directory.path());
    scenarios::works(&guest, &daemon);
}

#[test]
fn guests_of_one_process_talk() {
    guests_talk(Kind::OneProcess);
}

#[test]
fn guests_across_processes_talk() {
    guests_talk(Kind::Processes);
}

fn guests_talk(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let [four, five] = Uml::boot_all([4, 5].map(|cid| vms.vhost_socket(cid)));
    messages::guests_talk(&four, (&five, 5));
    messages::guests_talk(&five, (&four, 4));
}

#[test]
fn without_messages_there_are_streams() {
    let daemon = Daemon::start_with(&["--seqpacket=off"]);
    let guest = Uml::boot(&daemon);
    let refused =
        "import socket; socket.socket(socket.AF_VSOCK, socket.SOCK_SEQPACKET).connect((2, 1))";
    let output = guest.run(&format!("/usr/bin/python3 -c '{refused}'"));
    assert_ne!(output.status, 0);
    scenarios::works(&guest, &daemon);
}
