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
