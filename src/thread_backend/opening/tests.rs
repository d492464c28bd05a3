use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, socket};
use tempfile::TempDir;

use super::*;
use crate::config::VmConfig;
use crate::testing::{self, NoEvents};

/// The table of a guest that does nothing, and a socket for its host programs.
struct Table {
    backend: VsockThreadBackend,
    listener: UnixListener,
    folder: TempDir,
}

impl Table {
    fn with(change: impl FnOnce(&mut VmConfig)) -> Self {
        let folder = TempDir::new().unwrap();
        let mut config = testing::config(folder.path());
        change(&mut config);
        Self {
            backend: VsockThreadBackend::new(&config, Box::new(NoEvents)),
            listener: UnixListener::bind(folder.path().join("host")).unwrap(),
            folder,
        }
    }

    /// A host program that has connected, from a socket of this abstract name if there is one, and the daemon's end.
    fn connect(&self, name: Option<&str>) -> (UnixStream, HostSocket) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        if let Some(name) = name {
            let name = UnixAddr::new_abstract(name.as_bytes()).unwrap();
            bind(client.as_raw_fd(), &name).unwrap();
        }
        let path = UnixAddr::new(&self.folder.path().join("host")).unwrap();
        connect(client.as_raw_fd(), &path).unwrap();
        let (server, _) = self.listener.accept().unwrap();
        server.set_nonblocking(true).unwrap();
        (client.into(), server.into())
    }

    /// One that asks why it is refused, and calls.
    fn call(&mut self, line: &str) -> UnixStream {
        static CALLS: AtomicU32 = AtomicU32::new(0);
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}/{call}", connect_line::ASKS_WHY, process::id());
        let (mut client, server) = self.connect(Some(&name));
        client.write_all(line.as_bytes()).unwrap();
        self.backend.add_client(Entry::Host, server);
        client
    }

    fn expire(&mut self) {
        self.backend
            .expire(Instant::now() + Duration::from_secs(120));
    }

    fn failed(&self, failure: CallFailure) -> u64 {
        self.backend.counters.failed[Side::Host as usize][failure as usize]
    }
}

fn told(mut client: UnixStream) -> String {
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn only_a_client_that_asks_is_told_why() {
    let mut table = Table::with(|_| {});
    table.backend.guest_started();
    let own = format!("not/{}/{}", connect_line::ASKS_WHY, process::id());
    for name in [None, Some(own.as_str())] {
        let (mut client, server) = table.connect(name);
        client.write_all(b"CONNECT 80\n").unwrap();
        table.backend.add_client(Entry::Host, server);
        table.expire();
        assert_eq!(told(client), "");
    }
    let asking = table.call("CONNECT 80\n");
    table.expire();
    assert_eq!(told(asking), "ERR timeout\n");
    assert_eq!(table.failed(CallFailure::Timeout), 3);
}

#[test]
fn what_ends_a_call_is_told() {
    use CallFailure::{Limit, NoDriver, NoLine, NoVmm};
    let mut table = Table::with(|_| {});
    table.backend.connect();
    table.backend.guest_started();
    let reset = table.call("CONNECT 80\n");
    table.backend.reset();
    assert_eq!(told(reset), "ERR no_driver\n");
    table.backend.guest_started();
    let disconnected = table.call("CONNECT 80\n");
    let silent = table.call("");
    table.backend.disconnect();
    assert_eq!(told(disconnected), "ERR no_vmm\n");
    assert_eq!(told(silent), "ERR no_vmm\n");
    let silent = table.call("CONNECT");
    table.expire();
    assert_eq!(told(silent), "ERR no_line\n");
    let counts = [NoDriver, NoVmm, NoLine, Limit].map(|failure| table.failed(failure));
    assert_eq!(counts, [1, 2, 1, 0]);
    let nobody_waits = table.backend.clients.waiting() == 0;
    assert!(nobody_waits && table.backend.connections.is_empty());
}

#[test]
fn who_has_waited_in_vain_is_told_for_what() {
    let mut table = Table::with(|config| config.wait_for_guest = Duration::from_secs(60));
    let client = table.call("CONNECT 80\n");
    table.expire();
    assert_eq!(told(client), "ERR no_vmm\n");
    table.backend.connect();
    let client = table.call("CONNECT 80\n");
    table.expire();
    assert_eq!(told(client), "ERR no_driver\n");
    assert_eq!(table.failed(CallFailure::NoVmm), 1);
    assert_eq!(table.failed(CallFailure::NoDriver), 1);
    // Its time is over before the guest's is.
    let mut table = Table::with(|config| config.wait_for_guest = Duration::from_nanos(1));
    table.backend.guest_started();
    let client = table.call("CONNECT 80\n");
    table.expire();
    assert_eq!(told(client), "ERR timeout\n");
    assert_eq!(table.failed(CallFailure::Timeout), 1);
}
