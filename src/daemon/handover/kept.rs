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
use nix::sys::socket::{Shutdown, shutdown};
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

    /// Ends what is left of a VM that can't be loaded, and has the manager forget it. The sockets are shut down: nobody is to wait
    /// for an answer, or for its turn with a listener, until the manager has heard of it.
    pub(in crate::daemon) fn end(self, store: &impl Store, cid: Cid) {
        for fd in self.fds.values() {
            if let Ok((_, SFlag::S_IFSOCK)) = Identity::of(fd.as_fd()) {
                let _ = shutdown(fd.as_raw_fd(), Shutdown::Both);
            }
        }
        self.forget(store, cid);
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
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    use nix::sys::eventfd::{EfdFlags, EventFd};
    use proptest::prelude::*;

    use crate::saved::SavedFd;

    const CID: Cid = Cid::from_raw(7);

    /// What systemd does: an open file that it has is not stored under another name.
    #[derive(Clone, Debug, Default)]
    struct Manager(Rc<RefCell<Stored>>);

    #[derive(Debug, Default)]
    struct Stored {
        fds: Vec<(String, OwnedFd)>,
        /// How many messages it got.
        messages: usize,
        /// How many it gets before it reads no more.
        left: Option<usize>,
    }

    impl Stored {
        fn count(&mut self) -> io::Result<()> {
            if let Some(left) = &mut self.left {
                *left = left.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
            }
            self.messages += 1;
            Ok(())
        }
    }

    fn is_event(fd: BorrowedFd<'_>) -> bool {
        matches!(Identity::of(fd).unwrap(), (Identity::Fd(_), _))
    }

    fn is_same(fd: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
        if !is_event(fd) || !is_event(other) {
            return Identity::of(fd).unwrap() == Identity::of(other).unwrap();
        }
        nix::unistd::write(fd, &1u64.to_ne_bytes()).unwrap();
        let is_same = nix::unistd::read(other, &mut [0; 8]).is_ok();
        let _ = nix::unistd::read(fd, &mut [0; 8]);
        is_same
    }

    impl Store for Manager {
        fn store(&self, name: &str, fd: BorrowedFd<'_>, poll: bool) -> io::Result<()> {
            let mut stored = self.0.borrow_mut();
            stored.count()?;
            let is_socket = Identity::of(fd).unwrap().1 == SFlag::S_IFSOCK;
            assert_eq!(poll, is_socket);
            let mut others = stored.fds.iter();
            if !others.any(|(_, other)| is_same(fd, other.as_fd())) {
                let fd = fd.try_clone_to_owned().unwrap();
                stored.fds.push((name.to_owned(), fd));
            }
            Ok(())
        }

        fn forget(&self, name: &str) -> io::Result<()> {
            let mut stored = self.0.borrow_mut();
            stored.count()?;
            stored.fds.retain(|(stored, _)| stored != name);
            Ok(())
        }
    }

    impl Manager {
        fn names(&self) -> Vec<String> {
            let stored = self.0.borrow();
            let mut names: Vec<String> = stored.fds.iter().map(|(name, _)| name.clone()).collect();
            names.sort();
            names
        }

        fn remains(&self) -> Remains {
            let mut remains = Remains::default();
            for (name, fd) in &self.0.borrow().fds {
                let part = match name.parse() {
                    Ok(StoredName::Kept { cid: 7, number }) => Part::Fd(number),
                    Ok(StoredName::State(7)) => Part::State,
                    Ok(StoredName::Connections(7)) => Part::Connections,
                    _ => panic!("{name}"),
                };
                remains.add(part, fd.try_clone().unwrap());
            }
            remains
        }

        fn messages(&self) -> usize {
            std::mem::take(&mut self.0.borrow_mut().messages)
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Document {
        text: String,
        fds: Vec<SavedFd>,
    }

    fn event() -> OwnedFd {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        EventFd::from_flags(flags).unwrap().into()
    }

    fn memory() -> OwnedFd {
        memfd("memory").unwrap().into()
    }

    fn keeper() -> (Manager, Keeper<Manager>) {
        let manager = Manager::default();
        (manager.clone(), Keeper::new(manager, CID).unwrap())
    }

    fn keep(keeper: &mut Keeper<Manager>, text: &str, fds: &[&OwnedFd]) {
        try_keep(keeper, text, fds).unwrap();
    }

    fn try_keep(keeper: &mut Keeper<Manager>, text: &str, fds: &[&OwnedFd]) -> io::Result<()> {
        let document = |saver: &mut Saver<'_>, fds| {
            saver.bytes(&[b"bytes"])?;
            let text = text.to_owned();
            Ok(Document { text, fds })
        };
        let next = keeper.save(|saver| {
            let fds = fds.iter().map(|fd| saver.fd(fd.as_fd())).collect();
            document(saver, fds)
        });
        keeper.keep(next.unwrap())
    }

    /// What the next daemon finds.
    fn load(manager: &Manager) -> (String, Vec<Option<OwnedFd>>, Keeper<Manager>) {
        let (mut loader, keeper) = manager.remains().load(manager.clone(), CID).unwrap();
        let document: Document = loader.document().unwrap();
        let fds = document.fds.iter().map(|fd| loader.take_fd(*fd).ok());
        (document.text, fds.collect(), keeper)
    }

    fn assert_same(loaded: &[Option<OwnedFd>], fds: &[&OwnedFd]) {
        assert_eq!(loaded.len(), fds.len());
        for (loaded, fd) in loaded.iter().zip(fds) {
            assert!(is_same(loaded.as_ref().unwrap().as_fd(), fd.as_fd()));
        }
    }

    #[test]
    fn numbers_stay_what_they_are() {
        let (manager, mut keeper) = keeper();
        let fds = [event(), event(), memory()];
        let fds: Vec<&OwnedFd> = fds.iter().collect();
        keep(&mut keeper, "first", &fds);
        let names = [
            "handover-7-0",
            "handover-7-1",
            "handover-7-2",
            "handover-7-state",
        ];
        assert_eq!(manager.names(), names);
        manager.messages();
        keep(&mut keeper, "second", &fds);
        keep(
            &mut keeper,
            "third, in another order",
            &[fds[2], fds[0], fds[1]],
        );
        assert_eq!((manager.names().len(), manager.messages()), (4, 0));
        let (text, loaded, _) = load(&manager);
        assert_eq!(text, "third, in another order");
        assert_same(&loaded, &[fds[2], fds[0], fds[1]]);
    }

    #[test]
    fn what_is_replaced_is_forgotten() {
        let (manager, mut keeper) = keeper();
        let (kick, socket) = (event(), OwnedFd::from(UnixStream::pair().unwrap().0));
        keep(&mut keeper, "first", &[&kick, &socket]);
        let other = event();
        keep(&mut keeper, "second", &[&other, &socket]);
        assert_eq!(
            manager.names(),
            ["handover-7-1", "handover-7-2", "handover-7-state"]
        );
        assert_same(&load(&manager).1, &[&other, &socket]);
        keep(&mut keeper, "the VMM has left", &[]);
        assert_eq!(manager.names(), ["handover-7-state"]);
        keeper.keep_connections(memory().as_fd()).unwrap();
        assert_eq!(
            manager.names(),
            ["handover-7-connections", "handover-7-state"]
        );
        keeper.forget();
        assert!(manager.names().is_empty());
    }

    #[test]
    fn an_event_that_is_sent_once_more_stays() {
        let (manager, mut keeper) = keeper();
        let kick = event();
        keep(&mut keeper, "first", &[&kick]);
        let again = kick.try_clone().unwrap();
        keep(&mut keeper, "second", &[&again]);
        drop(kick);
        assert_eq!(manager.names(), ["handover-7-1", "handover-7-state"]);
        assert_same(&load(&manager).1, &[&again]);
    }

    #[test]
    fn one_file_of_memory_is_kept_once_however_often_it_comes() {
        let (manager, mut keeper) = keeper();
        let file = memory();
        let again = file.try_clone().unwrap();
        keep(&mut keeper, "two regions", &[&file, &again]);
        assert_eq!(manager.names(), ["handover-7-0", "handover-7-state"]);
        let (_, loaded, mut next) = load(&manager);
        assert_same(&loaded, &[&file, &file]);
        let third = file.try_clone().unwrap();
        keep(&mut next, "and a third", &[&third, &file, &again]);
        assert_eq!(manager.names(), ["handover-7-0", "handover-7-state"]);
    }

    #[test]
    fn the_next_daemon_stores_nothing_twice() {
        let (manager, mut keeper) = keeper();
        let fds = [event(), memory(), event()];
        let fds: Vec<&OwnedFd> = fds.iter().collect();
        keep(&mut keeper, "before", &fds);
        // The daemon dies before the state names what it has stored.
        manager
            .store("handover-7-99", event().as_fd(), false)
            .unwrap();
        let (_, loaded, mut next) = load(&manager);
        manager.messages();
        let loaded: Vec<&OwnedFd> = loaded.iter().flatten().collect();
        keep(&mut next, "after", &loaded);
        assert_eq!((manager.messages(), manager.names().len()), (1, 4));
        let more = event();
        keep(&mut next, "more", &[loaded[0], loaded[1], &more]);
        let names = [
            "handover-7-0",
            "handover-7-1",
            "handover-7-3",
            "handover-7-state",
        ];
        assert_eq!(manager.names(), names);
        let (text, again, _) = load(&manager);
        assert_eq!(text, "more");
        assert_same(&again, &[fds[0], fds[1], &more]);
    }

    #[test]
    fn a_state_that_is_half_written_is_not_read() {
        let (manager, mut keeper) = keeper();
        let kick = event();
        keep(&mut keeper, "first", &[&kick]);
        keep(&mut keeper, "second", &[&kick]);
        // What the daemon would write next.
        let file = keeper.kept.file.try_clone().unwrap();
        file.write_all_at(b"{\"version\":1,", HALVES[keeper.kept.next_half])
            .unwrap();
        let (text, loaded, mut next) = load(&manager);
        assert_eq!(text, "second");
        assert_same(&loaded, &[&kick]);
        keep(&mut next, "third", &[loaded[0].as_ref().unwrap()]);
        assert_eq!(load(&manager).0, "third");
    }

    #[test]
    fn what_is_lost_is_missing_and_nothing_else() {
        let (manager, mut keeper) = keeper();
        let (socket, file) = (OwnedFd::from(UnixStream::pair().unwrap().0), memory());
        keep(&mut keeper, "first", &[&socket, &file, &file]);
        manager.forget("handover-7-0").unwrap();
        let (_, loaded, _) = load(&manager);
        assert!(loaded[0].is_none());
        assert_same(&loaded[1..], &[&file, &file]);
    }

    #[test]
    fn a_state_that_can_t_be_kept_leaves_nothing() {
        let (manager, mut keeper) = keeper();
        let kick = event();
        keep(&mut keeper, "first", &[&kick]);
        let failed = keeper.save(|saver| {
            saver.fd(kick.as_fd());
            saver.bytes(&[&vec![0; HALF as usize]])?;
            Ok(())
        });
        failed.unwrap_err();
        keeper.invalidate();
        assert_eq!(manager.names(), ["handover-7-state"]);
        let mut remains = manager.remains();
        assert!(remains.load(manager.clone(), CID).is_err());
        keep(&mut keeper, "second", &[&kick]);
        assert_eq!(load(&manager).0, "second");
    }

    #[test]
    fn a_manager_that_does_not_read_gets_all_of_it_later() {
        for left in 0..7 {
            let (manager, mut keeper) = keeper();
            let fds = [event(), event(), memory()];
            let other = event();
            let before: Vec<&OwnedFd> = fds.iter().collect();
            let after = [&other, &fds[2], &fds[1].try_clone().unwrap()];
            keep(&mut keeper, "before", &before);
            // Stores two, forgets two, stores two again.
            manager.0.borrow_mut().left = Some(left);
            let kept = try_keep(&mut keeper, "after", &after);
            assert_eq!(kept.is_ok(), left == 6);
            let loaded = manager.remains().load(manager.clone(), CID);
            assert_eq!(loaded.is_ok(), left == 6);
            manager.0.borrow_mut().left = None;
            keep(&mut keeper, "later", &after);
            assert_eq!(manager.names().len(), 4, "{:?}", manager.names());
            let (text, loaded, _) = load(&manager);
            assert_eq!(text, "later");
            assert_same(&loaded, &after);
        }
    }

    #[test]
    fn what_can_t_be_loaded_is_forgotten() {
        let (manager, mut keeper) = keeper();
        let (vmm, daemon) = UnixStream::pair().unwrap();
        keep(&mut keeper, "first", &[&event(), &memory(), &daemon.into()]);
        keeper.keep_connections(memory().as_fd()).unwrap();
        keeper.kept.file.write_all_at(b"{{", HALVES[0]).unwrap();
        let mut remains = manager.remains();
        let loaded = remains.load(manager.clone(), CID);
        assert!(matches!(loaded, Err(LoadError::Document(_))), "{loaded:?}");
        // Whatever else has it.
        let copies = manager.remains();
        remains.end(&manager, CID);
        assert!(manager.names().is_empty());
        assert_eq!((&vmm).read(&mut [0]).unwrap(), 0, "it waits");
        drop(copies);
    }

    proptest! {
        #[test]
        fn whatever_a_file_holds_is_refused_or_read(
            index in prop::array::uniform3(prop_oneof![
                Just(HALVES[0]), Just(HALVES[1]), 0u64..100, any::<u64>(),
            ]),
            magic in any::<bool>(),
            half in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let file = tempfile::tempfile().unwrap();
            if magic {
                file.write_all_at(&MAGIC, 0).unwrap();
            }
            file.write_all_at(index.map(u64::to_le_bytes).as_flattened(), 8).unwrap();
            file.write_all_at(b"{\"version\":1,\"fds\":[0,0,5]}", HALVES[0]).unwrap();
            file.write_all_at(&half, HALVES[0] + 29).unwrap();
            let mut remains = Remains::default();
            remains.add(Part::State, file.into());
            remains.add(Part::Fd(0), memory());
            let _ = remains.load(Manager::default(), CID);
        }
    }
}
