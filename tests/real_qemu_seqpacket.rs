//! Real guests under QEMU exchange messages, with their hosts and with each other: Debian's cloud kernels 6.1 and 6.12.

mod common;

use std::thread::scope;

use common::daemon::Daemon;
use common::messages;
use common::qemu::{Kernel, Memory, Qemu};
use common::scenarios::{self, Opener};
use common::siblings::{Kind, Vms};

/// QEMU hands the feature on by itself where the daemon offers it, and where it is told to.
#[test]
fn messages_keep_their_borders_with_both_kernels() {
    let mut vms = Vms::start(Kind::Processes, &[4, 5]);
    let boot = |cid, kernel, memory, properties| {
        Qemu::boot_at(&vms.vhost_socket(cid), kernel, memory, properties)
    };
    let (four, five) = scope(|scope| {
        let five = scope.spawn(|| boot(5, Kernel::V6_12, Memory::File, ",seqpacket=on"));
        let four = boot(4, Kernel::V6_1, Memory::Memfd, "");
        (four, five.join().unwrap())
    });
    messages::guests_talk(&four, (&five, 5));
    messages::guest_and_host_talk(&four, vms.daemon(4), Opener::Guest);
    messages::guest_and_host_talk(&five, vms.daemon(5), Opener::Host);
}

/// The daemon offers it, and QEMU does not hand it on.
#[test]
fn a_device_without_messages_has_streams() {
    let daemon = Daemon::start();
    let guest = Qemu::boot_with(&daemon, Kernel::V6_12, Memory::Memfd, ",seqpacket=off");
    let refused = messages::spawn(&guest, "say", "2:1", "").wait();
    assert_ne!(refused.status, 0);
    assert!(
        !refused.stderr.contains("ECONNRESET") && !refused.stderr.contains("reset by peer"),
        "{refused:?}"
    );
    scenarios::works(&guest, &daemon);
}
