use super::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::path::Successor;
use super::store::{Stored, store};
use crate::config::{ProcessConfig, SocketAccess, VmConfig};
use crate::daemon::service::ServiceManager;
use crate::host::listener::SocketFile;
use crate::host::siblings::Siblings;
use crate::packet::header::PacketType;
use crate::saved::Saver;
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
