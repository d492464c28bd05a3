//! The ports of the connections that the guest knows, in memory that outlives the daemon.
//!
//! Nothing of a connection survives a crash but the guest's end of it, which would wait for ever: virtio 1.2 has no way to find out.
//! So the ports of each connection, and of each RST that the guest has not taken, are listed in a file without a name (a memfd). A
//! service manager has a descriptor of it, and gives it to the next daemon, which sends an RST for each.
//!
//! ```text
//! offset  size  field
//!      0     4  state       1: listed; anything else: vacant
//!      4     4  type        of the connection, as in a packet's header
//!      8     4  guest port
//!     12     4  peer port
//!     16     8  peer CID
//!     24     8  unused, 0
//! ```
//!
//! That is an entry; the file has nothing else. Numbers are little-endian. The state is written last where an entry is made, and is
//! the only thing that is written where it is cleared, so whenever the daemon dies, each entry is whole or vacant. The file is
//! mapped: an entry costs a few stores and no system call. Pages that no entry was ever in take no memory.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::debug;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::MAX_BATCH;
use super::connections::Places;
use super::resets::MAX_RESETS;
use crate::config::VmConfig;
use crate::memory::give_back;
use crate::packet::header::{Cid, GuestPort, PacketType, PeerAddr, PeerPort};
use crate::syscalls::Syscall;
use crate::vsock_conn::ConnKey;

/// To give memory back. For a daemon that has a service manager.
pub const SYSCALLS: &[Syscall] = &[Syscall::any(libc::SYS_fallocate)];

/// The size of an entry, in bytes.
const ENTRY: usize = 32;

/// The state of an entry that lists a connection.
const LISTED: u32 = 1;

/// Most entries that a file has, or that are read of one, whatever the limit of connections.
const MAX_ENTRIES: usize = 1 << 20;

/// From how many entries on their memory goes back when all are vacant: 64 KiB.
const LARGE: u32 = (64 * 1024 / ENTRY) as u32;

/// The ports that are listed. Without a service manager there is no file, and nothing is.
#[derive(Clone, Debug, Default)]
pub struct Journal(Option<Arc<Inner>>);

struct Inner {
    /// Written only with `vacant` locked.
    memory: MmapRegion,
    vacant: Mutex<Vacant>,
}

/// Which entries are vacant: `rest` and those behind it, and those in `before`.
#[derive(Debug)]
struct Vacant {
    before: Vec<u32>,
    rest: u32,
    /// How many entries there are.
    capacity: u32,
    /// How many connections were not listed because the file was full.
    missed: u64,
}

/// An entry. When it is dropped, the guest knows no more of the connection.
#[derive(Debug, Default)]
pub(super) struct Listed(Option<(Arc<Inner>, u32)>);

/// What a daemon that has crashed has listed. It stays listed for the next if this is dropped.
#[derive(Debug, Default)]
pub struct Lost {
    /// The connections, each once.
    pub keys: Vec<ConnKey>,
    entries: Vec<Listed>,
}

impl Journal {
    /// A journal with room for what the VM of `config` may have.
    ///
    /// # Errors
    /// The system has no memory or descriptor for it.
    pub fn new(config: &VmConfig) -> io::Result<Self> {
        let file = memfd_create("vsock-connections", MFdFlags::MFD_CLOEXEC)?.into();
        Self::with_capacity(file, capacity(config))
    }

    /// Goes on with the file of a daemon that has crashed, whatever is in it, and returns what that has listed.
    ///
    /// # Errors
    /// The file can't be mapped.
    pub fn resume(file: File, config: &VmConfig) -> io::Result<(Self, Lost)> {
        let journal = Self::with_capacity(file, capacity(config))?;
        let lost = journal.lost();
        Ok((journal, lost))
    }

    fn with_capacity(file: File, capacity: usize) -> io::Result<Self> {
        let entries = (file.metadata()?.len() / ENTRY as u64).min(MAX_ENTRIES as u64) as usize;
        if entries < capacity {
            file.set_len((capacity * ENTRY) as u64)?;
        }
        let capacity = capacity.max(entries);
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), capacity * ENTRY);
        Ok(Self(Some(Arc::new(Inner {
            memory: memory.map_err(io::Error::other)?,
            vacant: Mutex::new(Vacant {
                before: Vec::new(),
                rest: 0,
                capacity: capacity as u32,
                missed: 0,
            }),
        }))))
    }

    /// Takes the entries of a file that is not new.
    fn lost(&self) -> Lost {
        let mut lost = Lost::default();
        let Some(inner) = &self.0 else { return lost };
        let mut keys = BTreeSet::new();
        let mut vacant = inner.vacant.lock();
        for index in 0..vacant.capacity {
            let Some(key) = inner.read(index) else {
                continue;
            };
            let between = vacant.rest..index;
            vacant.before.extend(between);
            vacant.rest = index + 1;
            keys.insert(key);
            lost.entries.push(Listed(Some((inner.clone(), index))));
        }
        drop(vacant);
        lost.keys = keys.into_iter().collect();
        lost
    }

    /// The file, for the service manager.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        let file = self.0.as_ref()?.memory.file_offset()?;
        Some(file.file().as_fd())
    }

    /// Lists a connection. That does nothing where the file is full.
    pub(super) fn list(&self, key: ConnKey) -> Listed {
        let Some(inner) = &self.0 else {
            return Listed::default();
        };
        let mut vacant = inner.vacant.lock();
        let Some(index) = vacant.take() else {
            vacant.missed += 1;
            debug!(
                "{} connections are not in the journal: it is full",
                vacant.missed
            );
            return Listed::default();
        };
        inner.write(index, key);
        Listed(Some((inner.clone(), index)))
    }

    #[cfg(test)]
    pub(super) fn keys(&self) -> Vec<ConnKey> {
        let Some(inner) = &self.0 else {
            return Vec::new();
        };
        let capacity = inner.vacant.lock().capacity;
        (0..capacity)
            .filter_map(|index| inner.read(index))
            .collect()
    }
}

impl Lost {
    /// Clears the entries: the connections were reset, and are listed anew for that.
    pub fn clear(mut self) {
        self.entries.clear();
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        self.entries.drain(..).for_each(std::mem::forget);
    }
}

/// How many entries a VM may take: one for each connection, and one for each RST. Those that have given their places up still have
/// their ports, and take the place of none that has not.
fn capacity(config: &VmConfig) -> usize {
    let places = Places::new(config.max_connections.min(MAX_ENTRIES)).total();
    (2 * places + MAX_RESETS + MAX_BATCH).min(MAX_ENTRIES)
}

impl Vacant {
    fn take(&mut self) -> Option<u32> {
        if let Some(index) = self.before.pop() {
            return Some(index);
        }
        let index = self.rest;
        (index < self.capacity).then(|| self.rest += 1)?;
        Some(index)
    }

    /// Takes an entry back, and returns whether all are vacant now and were many.
    fn put_back(&mut self, index: u32) -> bool {
        self.before.push(index);
        let were_many = self.rest > LARGE;
        if self.before.len() as u32 == self.rest {
            give_back(&mut self.before);
            self.rest = 0;
            return were_many;
        }
        false
    }
}

impl Inner {
    fn store<T: AtomicAccess>(&self, value: T, offset: usize, order: Ordering) {
        let memory = self.memory.as_volatile_slice();
        // Each offset is within the mapping.
        let _ = memory.store(value, offset, order);
    }

    fn load<T: AtomicAccess + Default>(&self, offset: usize, order: Ordering) -> T {
        let memory = self.memory.as_volatile_slice();
        memory.load(offset, order).unwrap_or_default()
    }

    fn write(&self, index: u32, key: ConnKey) {
        let at = index as usize * ENTRY;
        let packet_type = u32::from(u16::from(key.packet_type));
        let words = [packet_type, key.guest.0, key.peer.port.0];
        for (offset, word) in (at + 4..).step_by(4).zip(words) {
            self.store(word.to_le(), offset, Ordering::Relaxed);
        }
        let cid = key.peer.cid.get();
        self.store(cid.to_le(), at + 16, Ordering::Relaxed);
        self.store(LISTED.to_le(), at, Ordering::Release);
    }

    fn read(&self, index: u32) -> Option<ConnKey> {
        let at = index as usize * ENTRY;
        let word = |offset| u32::from_le(self.load(at + offset, Ordering::Relaxed));
        if u32::from_le(self.load(at, Ordering::Acquire)) != LISTED {
            return None;
        }
        Some(ConnKey {
            packet_type: PacketType::from(u16::try_from(word(4)).ok()?),
            guest: GuestPort(word(8)),
            peer: PeerAddr {
                cid: Cid::from_raw(u64::from_le(self.load(at + 16, Ordering::Relaxed))),
                port: PeerPort(word(12)),
            },
        })
    }

    fn clear(&self, index: u32) {
        let mut vacant = self.vacant.lock();
        self.store(0u32, index as usize * ENTRY, Ordering::Release);
        if vacant.put_back(index)
            && let Some(file) = self.memory.file_offset()
        {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(file.file(), punch, 0, self.memory.size() as i64);
        }
    }
}

impl Listed {
    /// Whether it is an entry.
    pub(super) fn is_some(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some((inner, index)) = self.0.take() {
            inner.clear(index);
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.vacant.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use proptest::prelude::*;

    fn key(port: u32) -> ConnKey {
        ConnKey {
            guest: GuestPort(port),
            peer: PeerAddr {
                cid: Cid::from_raw(1 << 40 | 5),
                port: PeerPort(!port),
            },
            packet_type: PacketType::Seqpacket,
        }
    }

    fn new(capacity: usize) -> Journal {
        Journal::with_capacity(tempfile::tempfile().unwrap(), capacity).unwrap()
    }

    fn file(journal: &Journal) -> File {
        journal.file().unwrap().try_clone_to_owned().unwrap().into()
    }

    fn resume(file: File, capacity: usize) -> (Journal, Lost) {
        let journal = Journal::with_capacity(file, capacity).unwrap();
        let lost = journal.lost();
        (journal, lost)
    }

    #[test]
    fn an_entry_is_there_until_its_guard_is_dropped() {
        let journal = new(8);
        let first = journal.list(key(1));
        let second = journal.list(key(2));
        assert_eq!(journal.keys(), [key(1), key(2)]);
        drop(first);
        assert_eq!(journal.keys(), [key(2)]);
        let third = journal.list(key(3));
        assert_eq!(journal.keys(), [key(3), key(2)]);
        drop((second, third));
        assert_eq!(journal.keys(), []);
    }

    #[test]
    fn without_a_file_nothing_is_listed() {
        let journal = Journal::default();
        assert!(!journal.list(key(1)).is_some());
        assert!(journal.file().is_none());
    }

    #[test]
    fn a_full_journal_lists_no_more_until_an_entry_is_vacant() {
        let journal = new(2);
        let first = journal.list(key(1));
        let _second = journal.list(key(2));
        assert!(!journal.list(key(3)).is_some());
        drop(first);
        assert!(journal.list(key(3)).is_some());
    }

    #[test]
    fn it_has_room_for_all_that_a_vm_may_have() {
        let mut config = VmConfig::new(Cid::from_raw(4), "/vhost", "/uds");
        config.max_connections = usize::MAX;
        assert_eq!(capacity(&config), MAX_ENTRIES);
        config.max_connections = 30;
        assert!(capacity(&config) > 2 * 50 + MAX_RESETS);
        let journal = Journal::new(&config).unwrap();
        assert_eq!(file(&journal).metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn the_next_daemon_finds_what_was_listed_and_goes_on() {
        let journal = new(8);
        let mut listed: Vec<Listed> = (0..5).map(|port| journal.list(key(port))).collect();
        drop((listed.remove(3), listed.remove(0)));
        let file = file(&journal);
        // As if the process had ended.
        std::mem::forget(listed);
        // One that does not serve leaves them to the next.
        drop(resume(file.try_clone().unwrap(), 8));
        let (next, lost) = resume(file.try_clone().unwrap(), 6);
        assert_eq!(lost.keys, [key(1), key(2), key(4)]);
        let again: Vec<Listed> = lost.keys.iter().map(|key| next.list(*key)).collect();
        assert_eq!(next.keys().len(), 6);
        lost.clear();
        assert_eq!(next.keys().len(), 3);
        std::mem::forget(again);
        let (larger, lost) = resume(file, 20);
        assert_eq!(lost.keys.len(), 3);
        let more: Vec<Listed> = (0..17).map(|port| larger.list(key(port))).collect();
        assert!(more.iter().all(Listed::is_some) && !larger.list(key(0)).is_some());
    }

    #[test]
    fn memory_of_many_entries_goes_back() {
        let config = VmConfig::new(Cid::from_raw(4), "/vhost", "/uds");
        let journal = Journal::new(&config).unwrap();
        let blocks = || file(&journal).metadata().unwrap().blocks();
        let many: Vec<Listed> = (0..LARGE + 1).map(|port| journal.list(key(port))).collect();
        assert!(blocks() > 0);
        drop(many);
        assert_eq!(blocks(), 0);
        let _one = journal.list(key(7));
        assert_eq!(journal.keys(), [key(7)]);
    }

    proptest! {
        #[test]
        fn whatever_a_file_holds_is_read(
            bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(1), any::<u8>()], 0..400),
            capacity in 1usize..20,
        ) {
            let garbage = tempfile::tempfile().unwrap();
            garbage.write_all_at(&bytes, 0).unwrap();
            let (journal, lost) = resume(garbage, capacity);
            prop_assert!(lost.keys.len() <= bytes.len() / ENTRY + 1);
            prop_assert!(journal.keys().iter().all(|key| lost.keys.contains(key)));
            lost.clear();
            prop_assert_eq!(journal.keys(), []);
            let room = capacity.max(bytes.len() / ENTRY);
            let listed: Vec<Listed> = (0..room).map(|port| journal.list(key(port as u32))).collect();
            prop_assert!(listed.iter().all(Listed::is_some));
            prop_assert_eq!(journal.keys().len(), room);
        }
    }
}
