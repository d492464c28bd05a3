use super::*;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

fn state() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"the state").unwrap();
    file
}

/// Different files, which are told apart by their inodes.
fn files(count: usize) -> Vec<File> {
    (0..count).map(|_| tempfile::tempfile().unwrap()).collect()
}

fn inode(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

fn send(parcel: &mut Parcel<'_>, socket: BorrowedFd<'_>) -> io::Result<usize> {
    let send =
        |text: &[u8], fds: &[BorrowedFd<'_>]| send_message(socket, text, fds, MsgFlags::empty());
    parcel.send(send, is_nested)
}

/// The receiving ends of pairs with a parcel in each.
fn stored(state: &File, fds: &[BorrowedFd<'_>]) -> Vec<OwnedFd> {
    let mut parcels = pack(state, fds);
    let store = |parcel: &mut Parcel<'_>| {
        let (ours, theirs) = pair().unwrap();
        send(parcel, ours.as_fd()).unwrap();
        theirs
    };
    parcels.iter_mut().map(store).collect()
}

fn open(sockets: &[OwnedFd]) -> Result<(File, Vec<Option<OwnedFd>>), ParcelError> {
    let mut opened = Opened::default();
    for socket in sockets {
        let (label, fds) = peek(socket.as_fd())?;
        opened.open(&label, fds)?;
    }
    opened.finish()
}

#[test]
fn many_descriptors_arrive_in_their_order_as_often_as_they_are_looked_at() {
    let files = files(500);
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let sockets = stored(&state(), &fds);
    assert_eq!(sockets.len(), 3);
    for _ in 0..2 {
        let (state, received) = open(&sockets).unwrap();
        let mut text = [0; 9];
        state.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"the state");
        let received: Vec<u64> = received
            .into_iter()
            .map(|fd| inode(&fd.unwrap().into()))
            .collect();
        assert_eq!(received, files.iter().map(inode).collect::<Vec<_>>());
    }
}

#[test]
fn a_file_goes_alone_where_there_is_nothing_else() {
    let (_, fds) = open(&stored(&state(), &[])).unwrap();
    assert!(fds.is_empty());
}

#[test]
fn parcels_that_are_not_all_there_are_refused() {
    let files = files(500);
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut sockets = stored(&state(), &fds);
    let last = sockets.pop().unwrap();
    assert!(matches!(open(&sockets), Err(ParcelError::Incomplete)));
    sockets.insert(0, last);
    assert!(matches!(open(&sockets), Err(ParcelError::Incomplete)));
    assert!(matches!(open(&[]), Err(ParcelError::Incomplete)));
}

#[test]
fn what_is_no_parcel_is_refused() {
    for text in [
        &b"garbage"[..],
        b"{}",
        br#"{"parcel":0,"of":0}"#,
        br#"{"parcel":0,"of":4294967295}"#,
        br#"{"parcel":0,"of":1}"#,
        br#"{"parcel":-1,"of":1}"#,
        &[b'{'; MAX_TEXT + 1],
    ] {
        let (ours, theirs) = pair().unwrap();
        send_message(ours.as_fd(), text, &[], MsgFlags::empty()).unwrap();
        assert!(open(&[theirs]).is_err());
    }
    // Nothing in it, closed, or no such socket.
    let (_ours, theirs) = pair().unwrap();
    assert!(open(&[theirs]).is_err());
    assert!(open(&[pair().unwrap().1]).is_err());
    assert!(open(&[state().into()]).is_err());
}

#[test]
fn more_missing_than_there_can_be_is_refused() {
    let missing = Label {
        parcel: 0,
        of: 1,
        missing: (0..MAX_FDS as u32 + 1).collect(),
    };
    let opened = Opened::default().open(&missing, Vec::new());
    assert!(matches!(opened, Err(ParcelError::Garbage)));
}

/// A socket in which sockets wait, `depth` levels of them.
fn nested(depth: usize) -> (OwnedFd, Vec<OwnedFd>) {
    let (mut outer, mut kept) = (pair().unwrap().1, Vec::new());
    for _ in 0..depth {
        let (ours, theirs) = pair().unwrap();
        if send_message(ours.as_fd(), b"x", &[outer.as_fd()], MsgFlags::empty()).is_err() {
            break;
        }
        kept.push(ours);
        outer = theirs;
    }
    (outer, kept)
}

#[test]
fn a_descriptor_that_cant_be_sent_is_missing_and_no_other() {
    let (deep, _kept) = nested(10);
    let files = files(2);
    let fds = [files[0].as_fd(), deep.as_fd(), files[1].as_fd()];
    let state = state();
    let is_limited = !is_sendable(deep.as_fd()).unwrap();
    let mut parcels = pack(&state, &fds);
    let (ours, theirs) = pair().unwrap();
    // As if the kernel refused, whether or not this one does.
    parcels[0].leave_out_nested().unwrap();
    send(&mut parcels[0], ours.as_fd()).unwrap();
    let (mut file, received) = open(&[theirs]).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let there: Vec<bool> = received.iter().map(Option::is_some).collect();
    assert_eq!(there, [true, !is_limited, true]);
    let last = received.into_iter().next_back().flatten().unwrap();
    assert_eq!(inode(&last.into()), inode(&files[1]));
}
