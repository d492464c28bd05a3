//! What a service manager keeps of a VM, for the daemon that follows a crash.
//!
//! The manager keeps descriptors by name. Of each VM there are:
//!
//! ```text
//! handover-<CID>-<number>      a descriptor of the session's, or a listening socket
//! handover-<CID>-state         a file that says what they are
//! handover-<CID>-connections   the journal (see thread_backend/journal)
//! ```
//!
//! A number means one open file for as long as the VM has it. The file of the state has two halves, and an index that says which of
//! them is valid:
//!
//! ```text
//! offset  size  field
//!      0     8  magic     "vhu-kept"
//!      8     8  offset    where the half begins
//!     16     8  head      the length of the head: which number each descriptor of the state has, in JSON
//!     24     8  state     the length of the state, which follows the head: a file as in saved.rs
//! ```
//!
//! Numbers are little-endian. What changes is written in an order that leaves a whole state wherever the daemon dies: new descriptors
//! go to the manager, then the state into the other half, then the index, and at last the descriptors that it no longer names are
//! removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use nix::sys::stat::{SFlag, fstat};
use serde::{Deserialize, Serialize};

use super::names::StoredName;
use crate::packet::header::Cid;
use crate::saved::{LoadError, Loader, Saver};
use crate::syscalls::Syscall;

/// To tell descriptors apart. For a daemon that has a service manager, with those of `saved`.
pub(in crate::daemon) const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_newfstatat),
    Syscall::any(libc::SYS_fstat),
];

const MAGIC: [u8; 8] = *b"vhu-kept";

const INDEX_LEN: usize = 32;

/// The layout of the file. What the state says has no version: its fields have names.
const VERSION: u32 = 1;

/// Where the halves begin. They are sparse.
const HALVES: [u64; 2] = [4096, 4096 + HALF];

/// The length of a half, in bytes. A region of memory takes some 200 of them.
const HALF: u64 = 16 << 20;

/// Where descriptors are kept.
pub(in crate::daemon) trait Store {
    /// Keeps a descriptor under a name. With `poll`, it is not kept any longer than its other end is open. An open file that is
    /// kept already is not kept a second time.
    fn store(&self, name: &str, fd: BorrowedFd<'_>, poll: bool) -> io::Result<()>;

    /// Keeps no more what has this name.
    fn forget(&self, name: &str) -> io::Result<()>;
}

/// What tells an open file from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    /// Of memory and sockets, the device and the inode. A VMM may send the same file again and again, or once for each of
    /// the regions in it, and each time it has another descriptor here.
    Inode(u64, u64),
    /// Of all others: an inode of the system's that is no file's is everybody's. A descriptor is the same as long as it is
    /// open, and none is closed and opened between two states.
    Fd(RawFd),
}

impl Identity {
    fn of(fd: BorrowedFd<'_>) -> io::Result<(Self, SFlag)> {
        let stat = fstat(fd)?;
        let file_type = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        let identity = if [SFlag::S_IFREG, SFlag::S_IFSOCK].contains(&file_type) {
            Self::Inode(stat.st_dev, stat.st_ino)
        } else {
            Self::Fd(fd.as_raw_fd())
        };
        Ok((identity, file_type))
    }
}

/// What is before a state in its half.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    version: u32,
    /// The number of each descriptor in the state's list.
    fds: Vec<u32>,
}

/// Keeps what the daemon after a crash takes to serve one VM.
#[derive(Debug)]
pub(in crate::daemon) struct Keeper<S: Store> {
    /// Where a state is made.
    scratch: File,
    kept: KeptVm<S>,
}

#[derive(Debug)]
struct KeptVm<S: Store> {
    store: S,
    cid: Cid,
    /// The file with the halves.
    file: File,
    /// Which half is written next.
    next_half: usize,
    /// The head and the state in the other half. Nothing where that is not valid.
    current: Vec<u8>,
    /// The numbers of what is kept.
    numbers: BTreeMap<Identity, u32>,
    /// The numbers of what is to be kept no more.
    old: BTreeSet<u32>,
}

/// A state that is to be kept. It holds nothing of the VM's.
#[derive(Debug)]
pub(in crate::daemon) struct NextState {
    state: Vec<u8>,
    /// What the state names, in its order. Those that are kept already are not here.
    fds: Vec<(Identity, Option<NewFd>)>,
}

#[derive(Debug)]
struct NewFd {
    fd: OwnedFd,
    is_socket: bool,
}

fn memfd(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC)?.into())
}

impl<S: Store> Keeper<S> {
    /// Begins to keep the VM with this CID, of which nothing is kept.
    ///
    /// # Errors
    /// The system has no memory or descriptors for it, or the manager does not take them.
    pub(in crate::daemon) fn new(store: S, cid: Cid) -> io::Result<Self> {
        let file = memfd("vsock-kept")?;
        store.store(&Part::State.name(cid), file.as_fd(), false)?;
        Ok(Self {
            scratch: memfd("vsock-state")?,
            kept: KeptVm {
                store,
                cid,
                file,
                next_half: 0,
                current: Vec::new(),
                numbers: BTreeMap::new(),
                old: BTreeSet::new(),
            },
        })
    }

    /// Keeps the journal.
    ///
    /// # Errors
    /// The manager does not take it.
    pub(in crate::daemon) fn keep_connections(&self, journal: BorrowedFd<'_>) -> io::Result<()> {
        let name = Part::Connections.name(self.kept.cid);
        self.kept.store.store(&name, journal, false)
    }

    /// Takes the state that `save` makes. Only this takes the VM to stand still.
    ///
    /// # Errors
    /// The system has no memory or descriptors, or the state is too long. [`Keeper::invalidate`] must follow.
    pub(in crate::daemon) fn save<'fd, D: Serialize>(
        &'fd self,
        save: impl FnOnce(&mut Saver<'fd>) -> io::Result<D>,
    ) -> io::Result<NextState> {
        let Self { scratch, kept } = self;
        let mut saver = Saver::new(scratch)?;
        let document = save(&mut saver)?;
        let fds = saver.finish(&document)?;
        let fds = fds.into_iter().map(|fd| kept.identify(fd));
        let fds = fds.collect::<io::Result<_>>()?;
        let len = scratch.metadata()?.len();
        if len > HALF {
            return Err(too_long());
        }
        let mut state = vec![0; len as usize];
        scratch.read_exact_at(&mut state, 0)?;
        scratch.set_len(0)?;
        Ok(NextState { state, fds })
    }

    /// Replaces what is kept with this state, and its descriptors. That costs the manager nothing where nothing has changed.
    ///
    /// # Errors
    /// The system has no memory, or the manager does not take what it is given. Then nothing is kept until the next time.
    pub(in crate::daemon) fn keep(&mut self, next: NextState) -> io::Result<()> {
        let result = self.kept.update(&next);
        if result.is_err() {
            self.kept.invalidate();
        }
        result
    }

    /// Keeps none of the states any more, but goes on with the next.
    pub(in crate::daemon) fn invalidate(&mut self) {
        self.kept.invalidate();
    }

    /// Keeps nothing of the VM any more.
    pub(in crate::daemon) fn forget(mut self) {
        self.kept.invalidate();
        for part in [Part::State, Part::Connections] {
            // The manager has closed its socket, or is too busy: it keeps a state that says nothing.
            let _ = self.kept.store.forget(&part.name(self.kept.cid));
        }
    }
}

fn too_long() -> io::Error {
    io::Error::other("the state is too long")
}

impl<S: Store> KeptVm<S> {
    fn identify(&self, fd: BorrowedFd<'_>) -> io::Result<(Identity, Option<NewFd>)> {
        let (identity, file_type) = Identity::of(fd)?;
        if self.numbers.contains_key(&identity) {
            return Ok((identity, None));
        }
        let new = NewFd {
            fd: fd.try_clone_to_owned()?,
            is_socket: file_type == SFlag::S_IFSOCK,
        };
        Ok((identity, Some(new)))
    }

    fn update(&mut self, next: &NextState) -> io::Result<()> {
        // What is still there under an old name would not be kept under its new one.
        self.forget_old()?;
        let taken: BTreeSet<u32> = self.numbers.values().copied().collect();
        let mut vacant = (0..).filter(|number| !taken.contains(number));
        let mut numbers = BTreeMap::new();
        let mut head = Head {
            version: VERSION,
            fds: Vec::new(),
        };
        for (identity, new) in &next.fds {
            let number = match (self.numbers.get(identity), new) {
                (Some(number), _) => *number,
                (None, Some(new)) => {
                    let number = vacant.next().unwrap_or(u32::MAX);
                    self.numbers.insert(*identity, number);
                    self.store(number, new)?;
                    number
                }
                // It was kept when the state was made, and is not now.
                (None, None) => return Err(io::ErrorKind::NotFound.into()),
            };
            numbers.insert(*identity, number);
            head.fds.push(number);
        }
        self.write(&head, &next.state)?;
        let before = std::mem::replace(&mut self.numbers, numbers);
        let is_old = |(identity, _): &(Identity, u32)| !self.numbers.contains_key(identity);
        let old: Vec<_> = before.into_iter().filter(is_old).collect();
        self.old.extend(old.iter().map(|(_, number)| number));
        self.forget_old()?;
        if old.iter().any(|(old, _)| matches!(old, Identity::Fd(_))) {
            self.store_again(next)?;
        }
        Ok(())
    }

    /// Stores once more what is new and has no inode of its own. It may be the same open file as one that was forgotten just now,
    /// which the VMM has sent a second time: then the manager did not take it before.
    fn store_again(&self, next: &NextState) -> io::Result<()> {
        for (identity, new) in &next.fds {
            if let Identity::Fd(_) = identity
                && let (Some(number), Some(new)) = (self.numbers.get(identity), new)
            {
                self.store(*number, new)?;
            }
        }
        Ok(())
    }

    fn store(&self, number: u32, new: &NewFd) -> io::Result<()> {
        let name = Part::Fd(number).name(self.cid);
        self.store.store(&name, new.fd.as_fd(), new.is_socket)
    }

    fn forget_old(&mut self) -> io::Result<()> {
        while let Some(number) = self.old.first() {
            self.store.forget(&Part::Fd(*number).name(self.cid))?;
            self.old.pop_first();
        }
        Ok(())
    }

    /// Writes a state into the half that is not valid, and then the index.
    fn write(&mut self, head: &Head, state: &[u8]) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(head)?;
        let lens = [bytes.len() as u64, state.len() as u64];
        bytes.extend_from_slice(state);
        if bytes.len() as u64 > HALF {
            return Err(too_long());
        }
        if bytes == self.current {
            return Ok(());
        }
        let offset = HALVES[self.next_half];
        self.file.write_all_at(&bytes, offset)?;
        let numbers = [offset, lens[0], lens[1]].map(u64::to_le_bytes);
        let index = [&MAGIC, numbers.as_flattened()].concat();
        self.file.write_all_at(&index, 0)?;
        self.next_half = 1 - self.next_half;
        self.current = bytes;
        Ok(())
    }

    fn invalidate(&mut self) {
        // Where this fails, the state names descriptors that are not there, and is refused for that.
        let _ = self.file.write_all_at(&[0; INDEX_LEN], 0);
        self.current.clear();
        self.old
            .extend(std::mem::take(&mut self.numbers).into_values());
        // What the manager does not hear of now, it hears of the next time.
        let _ = self.forget_old();
    }
}

/// What of a VM is in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon) enum Part {
    /// A descriptor that the state names by this number.
    Fd(u32),
    /// The file of the state.
    State,
    /// The journal.
    Connections,
}

impl Part {
    fn name(self, cid: Cid) -> String {
        let cid = cid.get() as u32;
        let name = match self {
            Self::Fd(number) => StoredName::Kept { cid, number },
            Self::State => StoredName::State(cid),
            Self::Connections => StoredName::Connections(cid),
        };
        name.to_string()
    }
}

/// What the service manager has kept of one VM: what a daemon that has crashed leaves.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Remains {
    /// The file of the state.
    state: Option<File>,
    /// The journal.
    pub(in crate::daemon) connections: Option<File>,
    fds: BTreeMap<u32, OwnedFd>,
    /// All numbers that the manager has, whatever became of the descriptors here.
    numbers: BTreeSet<u32>,
}

impl Remains {
    /// Takes a descriptor from the manager.
    pub(in crate::daemon) fn add(&mut self, part: Part, fd: OwnedFd) {
        match part {
            Part::Fd(number) => {
                self.fds.insert(number, fd);
                self.numbers.insert(number);
            }
            Part::State => self.state = Some(fd.into()),
            Part::Connections => self.connections = Some(fd.into()),
        }
    }

    /// The state, and a keeper that goes on with what is kept. The descriptors of the state must stay what they are until the
    /// keeper gets the next state: none may be a copy of what the loader gives.
    ///
    /// # Errors
    /// There is no whole state. What is kept is left to [`Remains::forget`].
    pub(in crate::daemon) fn load<S: Store>(
        &mut self,
        store: S,
        cid: Cid,
    ) -> Result<(Loader, Keeper<S>), LoadError> {
        let file = self.state.as_ref().ok_or(LoadError::Missing)?;
        let current = read_current(file)?;
        let scratch = memfd("vsock-state")?;
        let copy = memfd("vsock-state")?;
        copy.write_all_at(&current.bytes[current.head_len..], 0)?;
        let file = file.try_clone()?;
        // Before the descriptors are taken: what can't be loaded still has them.
        Loader::open(copy.try_clone()?, Vec::new())?;
        let (fds, numbers) = self.take_fds(&current.head)?;
        let kept = KeptVm {
            store,
            cid,
            file,
            next_half: 1 - current.half,
            current: current.bytes,
            numbers,
            // Those that the state was to name next, or has named before.
            old: std::mem::take(&mut self.fds).into_keys().collect(),
        };
        let loader = Loader::open(copy, fds)?;
        Ok((loader, Keeper { scratch, kept }))
    }

    /// The descriptors of a state in its order, and their numbers. A file that is there more than once has one number.
    #[allow(clippy::type_complexity)]
    fn take_fds(
        &mut self,
        head: &Head,
    ) -> io::Result<(Vec<Option<OwnedFd>>, BTreeMap<Identity, u32>)> {
        let mut numbers = BTreeMap::new();
        let mut fds: Vec<Option<OwnedFd>> = Vec::new();
        let mut places: BTreeMap<u32, usize> = BTreeMap::new();
        for (place, number) in head.fds.iter().enumerate() {
            let first = places.get(number).and_then(|place| fds[*place].as_ref());
            let fd = match first {
                Some(first) => Some(first.try_clone()?),
                None => self.fds.remove(number),
            };
            if let Some(fd) = &fd
                && !places.contains_key(number)
            {
                numbers.insert(Identity::of(fd.as_fd())?.0, *number);
                places.insert(*number, place);
            }
            fds.push(fd);
        }
        Ok((fds, numbers))
    }

    /// Ends what is left of a VM that can't be loaded, and has the manager forget it. Connected sockets are shut down: nobody is to
    /// wait for an answer until the manager has heard of it. Those that listen are returned: this process can go on with them, and
    /// would find its paths in use until the manager has closed its copies.
    pub(in crate::daemon) fn end(mut self, store: &impl Store, cid: Cid) -> Vec<OwnedFd> {
        let mut listening = Vec::new();
        for fd in std::mem::take(&mut self.fds).into_values() {
            let Ok((_, SFlag::S_IFSOCK)) = Identity::of(fd.as_fd()) else {
                continue;
            };
            if getsockopt(&fd, sockopt::AcceptConn) == Ok(true) {
                listening.push(fd);
            } else {
                let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
            }
        }
        self.forget(store, cid);
        listening
    }

    /// Has the manager forget what is left.
    pub(in crate::daemon) fn forget(self, store: &impl Store, cid: Cid) {
        let parts = self.numbers.into_iter().map(Part::Fd);
        for part in parts.chain([Part::State, Part::Connections]) {
            let _ = store.forget(&part.name(cid));
        }
    }
}

/// The valid half of a file.
#[derive(Debug)]
struct Current {
    half: usize,
    head: Head,
    head_len: usize,
    /// The head and the state.
    bytes: Vec<u8>,
}

fn read_current(file: &File) -> Result<Current, LoadError> {
    let mut index = [0; INDEX_LEN];
    file.read_exact_at(&mut index, 0)
        .map_err(|_| LoadError::Magic)?;
    let (magic, numbers) = index.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(LoadError::Magic);
    }
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| numbers[at + i]));
    let (offset, head_len, state_len) = (number(0), number(8), number(16));
    let half = HALVES.iter().position(|start| *start == offset);
    let half = half.ok_or(LoadError::Invalid("no half begins there"))?;
    let len = head_len.checked_add(state_len).filter(|len| *len <= HALF);
    let len = len.ok_or(LoadError::Invalid("a half of that length"))?;
    if offset + len > file.metadata()?.len() {
        return Err(LoadError::Missing);
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, offset)?;
    let head_len = head_len as usize;
    let head: Head = serde_json::from_slice(&bytes[..head_len])?;
    if head.version > VERSION {
        return Err(LoadError::Invalid("it is from a newer version"));
    }
    Ok(Current {
        half,
        head,
        head_len,
        bytes,
    })
}

#[cfg(test)]
mod tests;
