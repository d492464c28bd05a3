//! Messages between real guests and their hosts, or other guests: what `tests/guest/messages.py` does at either end.

use super::daemon::Daemon;
use super::guest::{Guest, GuestProcess, scripts};
use super::host::{HostProgram, new_port};
use super::scenarios::Opener;

/// The ports of [`start_with_plain_ports`] that have sockets of their own.
const PLAIN: u32 = 7000;

/// A daemon with a plain socket of messages each way.
pub fn start_with_plain_ports(directory: &std::path::Path) -> Daemon {
    let path = directory.display();
    Daemon::start_with(&[
        "--wait-for-guest=600",
        &format!("--guest-port={PLAIN}={path}/guest,seqpacket"),
        &format!("--host-port={PLAIN}={path}/host,seqpacket"),
    ])
}

/// A task at an end in a guest: its name, the address and what follows.
pub fn spawn(guest: &Guest, task: &str, address: &str, more: &str) -> GuestProcess {
    guest.spawn(&format!(
        "exec /usr/bin/python3 $GUEST/messages.py {task} {address} {more}"
    ))
}

fn spawn_at_host(task: &str, address: &str, more: &str) -> HostProgram {
    let script = scripts().join("messages.py");
    let arguments = [script.to_str().unwrap(), task, address];
    let arguments = arguments.into_iter().chain(more.split_whitespace());
    HostProgram::start("/usr/bin/python3", arguments)
}

/// What both ends do: a task and what follows its address.
type Tasks<'t> = [(&'t str, &'t str); 2];

/// All that is tried between two ends, the first of which calls.
const TALKS: [Tasks; 5] = [
    [
        ("exchange", "caller callee 60"),
        ("exchange", "callee caller 60"),
    ],
    [("say", ""), ("truncate", "")],
    [("truncate", ""), ("say", "")],
    [("flood", "8"), ("late", "8")],
    [("late", "8"), ("flood", "8")],
];

/// Starts a task at the guest and one at the host.
fn start(
    guest: &Guest,
    guests: (&str, &str),
    at: &str,
    hosts: (&str, &str),
    host_at: &str,
) -> Talk {
    Talk {
        host: spawn_at_host(hosts.0, host_at, hosts.1),
        guest: spawn(guest, guests.0, at, guests.1),
    }
}

struct Talk {
    host: HostProgram,
    guest: GuestProcess,
}

impl Talk {
    #[track_caller]
    fn finish(self) {
        assert_eq!(self.guest.wait_ok(), "done\n");
        assert_eq!(self.host.next_line().as_deref(), Some("done\n"));
    }
}

/// A guest and its host talk in every way, whoever calls.
pub fn guest_and_host_talk(guest: &Guest, daemon: &Daemon, opener: Opener) {
    let talks = TALKS.map(|[caller, callee]| {
        let port = new_port();
        match opener {
            Opener::Guest => {
                let path = format!("listen={}", daemon.host_port_path(port).display());
                start(guest, caller, &format!("2:{port}"), callee, &path)
            }
            Opener::Host => {
                let path = format!("{}_seqpacket={port}", daemon.uds_path().display());
                start(guest, callee, &port.to_string(), caller, &path)
            }
        }
    });
    talks.into_iter().for_each(Talk::finish);
}

/// The same at the sockets of [`start_with_plain_ports`].
pub fn plain_ports_carry_messages(guest: &Guest, directory: &std::path::Path) {
    let [guest_path, host_path] = ["guest", "host"].map(|name| directory.join(name));
    let host_path = format!("listen={}", host_path.display());
    let [caller, callee] = TALKS[0];
    let to_host = start(guest, caller, &format!("2:{PLAIN}"), callee, &host_path);
    to_host.finish();
    let guest_path = guest_path.to_str().unwrap();
    start(guest, callee, &PLAIN.to_string(), caller, guest_path).finish();
}

/// A guest calls another, which has this CID, in every way.
pub fn guests_talk(from: &Guest, to: (&Guest, u64)) {
    let talks = TALKS.map(|[caller, callee]| {
        let port = new_port();
        let answers = spawn(to.0, callee.0, &port.to_string(), callee.1);
        let calls = spawn(from, caller.0, &format!("{}:{port}", to.1), caller.1);
        (calls, answers)
    });
    for (calls, answers) in talks {
        assert_eq!(calls.wait_ok(), "done\n");
        assert_eq!(answers.wait_ok(), "done\n");
    }
}
