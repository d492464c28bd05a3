use super::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::path::Successor;
use super::store::{Stored, store};
use crate::config::{HostSide, ProcessConfig, Socket, SocketAccess, VmConfig};
use crate::daemon::service::ServiceManager;
use crate::daemon::vm::BoundVm;
use crate::host::listener::{LoadedListeners, SocketFile};
use crate::host::siblings::Siblings;
use crate::packet::header::PacketType;
use crate::saved::Saver;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::geteuid;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A service manager that keeps descriptors.
struct Manager {
    _directory: TempDir,
    socket: UnixDatagram,
    client: ServiceManager,
    kept: BTreeMap<String, OwnedFd>,
}

impl Manager {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self {
            client: ServiceManager::at(&path),
            _directory: directory,
            socket,
            kept: BTreeMap::new(),
        }
    }

    /// Does what it was told.
    fn work(&mut self) {
        while let Ok(Some((text, mut fds))) =
            parcels::receive_message(self.socket.as_fd(), rustix::net::RecvFlags::DONTWAIT)
        {
            let text = String::from_utf8(text).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            let name = lines[1].strip_prefix("FDNAME=").unwrap().to_owned();
            match lines[0] {
                "FDSTORE=1" => {
                    assert_eq!(lines[2], "FDPOLL=0");
                    self.kept.insert(name, fds.pop().unwrap());
                }
                "FDSTOREREMOVE=1" => drop(self.kept.remove(&name)),
                other => panic!("{other}"),
            }
        }
    }

    /// The numbers and names that the next process gets.
    fn passed(&mut self) -> Vec<(RawFd, String)> {
        self.work();
        let pass =
            |(name, fd): (&String, &OwnedFd)| (fd.try_clone().unwrap().into_raw_fd(), name.clone());
        self.kept.iter().map(pass).collect()
    }
}

/// A state file with this document.
fn state(document: &Value) -> File {
    let file = tempfile::tempfile().unwrap();
    Saver::new(&file).unwrap().finish(document).unwrap();
    file
}

/// What a process without VMs would hand over.
fn empty_state(version: u32) -> Value {
    json!({"version": version, "process": 7, "vms": [], "more": "of later"})
}

fn config(directory: &Path) -> ProcessConfig {
    let path = |name| directory.join(name);
    let cid = Cid::try_from(4u32).unwrap();
    ProcessConfig::new(vec![VmConfig::new(cid, path("vhost"), path("uds"))])
}

#[test]
fn what_is_stored_is_there_until_it_is_taken_over() {
    let mut manager = Manager::new();
    let (end, other) = UnixStream::pair().unwrap();
    let state = state(&empty_state(VERSION));
    let fds = vec![end.as_fd(); 450];
    store(&manager.client, parcels::pack(&state, &fds)).unwrap();
    drop(end);
    let directory = TempDir::new().unwrap();
    let config = config(directory.path());
    // The first dies half-way.
    for takes_over in [false, true] {
        let passed = manager.passed();
        let names: Vec<&str> = passed.iter().map(|(_, name)| &name[..]).collect();
        assert_eq!(names, ["handover-0", "handover-1", "handover-2"]);
        let (found, _) = Predecessor::find(&config, &passed, &manager.client).unwrap();
        let mut found = found.unwrap();
        if takes_over {
            found.load(&mut [], &Siblings::default()).unwrap();
            found.commit().unwrap();
        }
    }
    assert!(manager.passed().is_empty());
    // Nobody has a copy of what was in the parcels.
    other.set_nonblocking(true).unwrap();
    assert_eq!(std::io::Read::read(&mut &other, &mut [0]).unwrap(), 0);
}

#[test]
fn what_cant_be_read_is_forgotten_and_the_daemon_starts_afresh() {
    let directory = TempDir::new().unwrap();
    let config = config(directory.path());
    for document in [
        empty_state(VERSION + 1),
        json!({"version": 1}),
        json!("garbage"),
    ] {
        let mut manager = Manager::new();
        let state = state(&document);
        store(&manager.client, parcels::pack(&state, &[])).unwrap();
        let passed = manager.passed();
        let (found, _) = Predecessor::find(&config, &passed, &manager.client).unwrap();
        assert!(found.is_none());
        assert!(manager.passed().is_empty());
    }
}

#[test]
fn a_part_of_what_was_stored_is_forgotten() {
    let mut manager = Manager::new();
    let state = state(&empty_state(VERSION));
    let fds = vec![state.as_fd(); 300];
    store(&manager.client, parcels::pack(&state, &fds)).unwrap();
    manager.work();
    manager.kept.remove("handover-0").unwrap();
    let passed = manager.passed();
    let directory = TempDir::new().unwrap();
    let found = Predecessor::find(&config(directory.path()), &passed, &manager.client);
    assert!(found.unwrap().0.is_none() && manager.passed().is_empty());
}

#[test]
fn names_that_make_no_sense_are_forgotten() {
    let mut manager = Manager::new();
    let (end, _) = UnixStream::pair().unwrap();
    for name in ["handover-x", "handover-1-2-3"] {
        manager.client.store(name, end.as_fd(), false).unwrap();
    }
    let passed = manager.passed();
    let directory = TempDir::new().unwrap();
    let found = Predecessor::find(&config(directory.path()), &passed, &manager.client);
    assert!(found.unwrap().0.is_none() && manager.passed().is_empty());
}

#[test]
fn a_manager_that_does_not_read_gets_nothing() {
    let manager = Manager::new();
    let (end, _) = UnixStream::pair().unwrap();
    while manager
        .client
        .store("handover-9", end.as_fd(), false)
        .is_ok()
    {}
    let state = state(&empty_state(VERSION));
    assert!(store(&manager.client, parcels::pack(&state, &[])).is_err());
    let nobody = ServiceManager::at(Path::new("/nowhere/at/all"));
    assert!(!nobody.has_store());
    assert!(store(&nobody, parcels::pack(&state, &[])).is_err());
}

#[test]
fn a_number_that_is_not_open_is_no_reason_to_fail() {
    let stored = Stored::take(&[(1_000_000, "handover-0".into())]);
    assert!(stored.parcels.is_empty());
    assert_eq!(stored.strange, ["handover-0"]);
}

#[test]
fn a_state_that_cant_be_taken_over_is_refused_and_the_predecessor_goes_on() {
    let vm = json!({"guest_cid": 9, "session": null, "listeners": [], "table": null});
    for (document, message) in [
        (
            empty_state(2),
            "the state of the daemon that runs has version 2, this one reads version 1",
        ),
        (json!({"version": 1}), "it can't be understood"),
        (
            json!({"version": 1, "process": 7, "vms": [vm]}),
            "CID 9: the daemon that runs serves it, and it is not configured here",
        ),
    ] {
        let directory = TempDir::new().unwrap();
        let mut config = config(directory.path());
        let path = directory.path().join("handover");
        let access = SocketAccess::default();
        let socket = SocketFile::bind(&path, PacketType::Seqpacket, access).unwrap();
        config.handover_path = Some(path);
        let (stop, _stopper) = UnixStream::pair().unwrap();
        let document = state(&document);
        thread::scope(|scope| {
            let taken = scope.spawn(|| {
                let manager = ServiceManager::at(Path::new("/nowhere/at/all"));
                Predecessor::find(&config, &[], &manager).map(|found| found.0.is_some())
            });
            let successor = loop {
                match Successor::accept(socket.as_fd(), geteuid(), stop.as_fd()).unwrap() {
                    Some(successor) => break successor,
                    None => thread::sleep(Duration::from_millis(1)),
                }
            };
            successor.await_request().unwrap();
            let given = successor.give(parcels::pack(&document, &[])).unwrap_err();
            let error = taken.join().unwrap().unwrap_err().to_string();
            assert!(error.contains(message), "{error} should say {message}");
            assert_eq!(given.to_string(), error);
        });
    }
}

/// Something of this kind, and what must live as long.
fn descriptor(kind: &str, directory: &Path, number: usize) -> (OwnedFd, Option<OwnedFd>) {
    let socket_pair = |kind| {
        let flags = SockFlag::SOCK_NONBLOCK;
        let pair = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        (pair.0, Some(pair.1))
    };
    let listener = |packet_type| {
        let path = directory.join(format!("listener{number}"));
        let access = SocketAccess::default();
        let socket = SocketFile::bind(&path, packet_type, access).unwrap();
        (socket.listener().unwrap().into(), None)
    };
    match kind {
        "stream" => socket_pair(SockType::Stream),
        "seqpacket" => socket_pair(SockType::SeqPacket),
        "stream listener" => listener(PacketType::Stream),
        "seqpacket listener" => listener(PacketType::Seqpacket),
        "eventfd" => {
            let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            (event.into(), None)
        }
        _ => {
            let len = kind.strip_prefix("file ").unwrap().parse().unwrap();
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            (file.into(), None)
        }
    }
}

/// Asserts that `new` says all that `old` says.
#[track_caller]
fn assert_says_as_much(old: &Value, new: &Value) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => old.iter().for_each(|(name, old)| {
            let new = new.get(name).unwrap_or_else(|| panic!("{name} is gone"));
            assert_says_as_much(old, new);
        }),
        (Value::Array(old), Value::Array(new)) => {
            assert_eq!(old.len(), new.len());
            old.iter()
                .zip(new)
                .for_each(|(old, new)| assert_says_as_much(old, new));
        }
        _ => assert_eq!(old, new),
    }
}

/// What a daemon of the first version has handed over. Every later one reads it, so the file stays as it is.
#[test]
fn the_state_of_the_first_version_is_loaded() {
    let directory = TempDir::new().unwrap();
    let first: Value =
        serde_json::from_str(include_str!("../../../tests/data/handover-v1.json")).unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut saver = Saver::new(&file).unwrap();
    // What connections have buffered, which is nothing special, behind a message of the VMM's that has begun.
    let len = first["bytes"].as_u64().unwrap() - 24;
    let message = [1, 0, 0, 0, 1];
    let buffered = vec![0; len as usize - message.len()];
    saver.bytes(&[&message, &buffered]).unwrap();
    saver.finish(&first["document"]).unwrap();
    let kinds = first["descriptors"].as_array().unwrap().iter().zip(0..);
    let made =
        kinds.map(|(kind, number)| descriptor(kind.as_str().unwrap(), directory.path(), number));
    let (fds, _others): (Vec<_>, Vec<_>) = made.map(|(fd, other)| (Some(fd), other)).unzip();
    let mut loader = Loader::open(file, fds).unwrap();

    let mut state = ProcessState::load(&loader).unwrap();
    let again = serde_json::to_value(&state).unwrap();
    assert_says_as_much(&first["document"], &again);
    let siblings = Arc::new(Siblings::default());
    let mut config = config(directory.path());
    let mut five = config.vms[0].clone();
    five.guest_cid = Cid::try_from(5u32).unwrap();
    five.socket = Socket::Path(directory.path().join("vhost5"));
    five.host = HostSide::unix(directory.path().join("uds5"));
    config.vms.push(five);
    let mut loaded = LoadedListeners::default();
    for (mut vm, config) in state.vms.drain(..).zip(&config.vms) {
        assert_eq!(vm.guest_cid, config.guest_cid);
        let is_first = vm.guest_cid.get() == 4;
        assert_eq!(vm.connections(), if is_first { 9 } else { 0 });
        let mut none = LoadedListeners::default();
        let mut bound = BoundVm::new(config, &siblings, &mut none, |_| {}).unwrap();
        for listener in std::mem::take(&mut vm.listeners) {
            loaded.load(listener, &mut loader).unwrap();
        }
        bound.load(vm, &mut loader).unwrap();
        assert_eq!(bound.has_vmm(), is_first);
    }
    siblings.load_calls(state.calls, &mut loader).unwrap();
    for listener in [state.stats, state.handover] {
        loaded.load(listener.unwrap(), &mut loader).unwrap();
    }
}
