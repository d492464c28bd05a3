//! A listening Unix socket, and the file that is its name.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use libc::{O_NOFOLLOW, O_PATH, c_int};
use nix::fcntl::{AtFlags, Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt,
    sendmsg, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::fchownat;
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use thiserror::Error;

use crate::config::{SocketAccess, folder};
use crate::syscalls::{Argument, Syscall};

/// To connect to a host program; to accept; to share a listening socket; to remove a socket's file if it is ours.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::only(
        libc::SYS_socket,
        &[
            Argument::Is(0, libc::AF_UNIX),
            Argument::Is(
                1,
                libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            ),
        ],
    ),
    Syscall::any(libc::SYS_connect),
    Syscall::any(libc::SYS_accept4),
    Syscall::only(libc::SYS_ioctl, &[Argument::Is(1, libc::FIONBIO as c_int)]),
    Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_DUPFD_CLOEXEC)]),
    Syscall::any(libc::SYS_close),
    Syscall::any(libc::SYS_statx),
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_unlink),
    Syscall::only(libc::SYS_unlinkat, &[Argument::Is(2, 0)]),
];

/// Why a socket could not be made.
#[derive(Debug, Error)]
pub enum ListenerError {
    /// Somebody answers there.
    #[error("{0}: another daemon listens there, stop it or choose another path")]
    InUse(PathBuf),
    /// There is a file that is no socket. It is never touched.
    #[error("{0}: a file that is no socket is in the way, move it or choose another path")]
    NoSocket(PathBuf),
    /// The system refused.
    #[error("{0}: can't listen there: {1}")]
    Io(PathBuf, io::Error),
    /// What was inherited is no socket that listens.
    #[error("descriptor {0}: {1}")]
    Inherited(RawFd, io::Error),
    /// The system does not let these connect to it.
    #[error("{0}: can't set its mode and group: {1}")]
    Access(PathBuf, io::Error),
}

/// A listening socket. If its file was made with it, it is removed with it.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    /// Goes with it.
    _file: Option<OwnFile>,
}

/// The file of a socket of ours.
#[derive(Debug)]
struct OwnFile {
    path: PathBuf,
    /// Device and inode of the file, so that another's is not removed.
    identity: (u64, u64),
}

/// Makes every socket file from now on its owner's alone, until it is said who else may connect: nobody slips in between.
/// This holds for all threads of the process at once, and so it is set before there are any, and never back.
pub fn tighten_umask() {
    umask(Mode::from_bits_truncate(0o177));
}

impl SocketFile {
    /// Listens at `path`, for those who are given access. A socket file there that nobody listens at any more is replaced.
    pub fn bind(path: &Path, access: SocketAccess) -> Result<Self, ListenerError> {
        let failed = |error: io::Error| ListenerError::Io(path.to_owned(), error);
        // Two daemons that start at once both see the same stale file: one after the other.
        let _turn = lock_folder(path);
        clear(path)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        let mut options = OpenOptions::new();
        // The file itself, whatever stands at the path later.
        let file = options.read(true).custom_flags(O_PATH | O_NOFOLLOW);
        let file = file.open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let own = OwnFile {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        let socket = Self {
            listener,
            _file: Some(own),
        };
        give_access(&file, access)
            .map_err(|error| ListenerError::Access(path.to_owned(), error))?;
        Ok(socket)
    }

    /// A listening socket whose file is somebody else's, or that has none.
    pub fn foreign(listener: UnixListener) -> Self {
        Self {
            listener,
            _file: None,
        }
    }

    /// The listening socket once more.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// A Unix socket that whoever started the daemon has made.
pub enum Inherited {
    /// It listens.
    Listener(UnixListener),
    /// Somebody is at its other end.
    Stream(UnixStream),
}

impl Inherited {
    /// The socket with this number.
    pub fn take(fd: RawFd) -> Result<Self, ListenerError> {
        let failed = |error: io::Error| ListenerError::Inherited(fd, error);
        let socket = duplicate(fd).map_err(failed)?;
        let kind = getsockopt(&socket, sockopt::SockType).map_err(|error| failed(error.into()))?;
        let listens = getsockopt(&socket, sockopt::AcceptConn);
        let listens = listens.map_err(|error| failed(error.into()))?;
        let stream = UnixStream::from(socket);
        // They fail where it is no Unix socket, and where nobody is at its other end.
        stream.local_addr().map_err(failed)?;
        if kind != SockType::Stream {
            Err(failed(io::Error::other("not a stream socket")))
        } else if listens {
            Ok(Self::Listener(OwnedFd::from(stream).into()))
        } else {
            stream.peer_addr().map_err(failed)?;
            Ok(Self::Stream(stream))
        }
    }

    /// The socket with this number, if it listens.
    pub fn take_listener(fd: RawFd) -> Result<UnixListener, ListenerError> {
        match Self::take(fd)? {
            Self::Listener(listener) => Ok(listener),
            Self::Stream(_) => {
                let error = io::Error::other("not a socket that listens");
                Err(ListenerError::Inherited(fd, error))
            }
        }
    }
}

/// A descriptor of this process by its number. We send it to ourselves: that fails, and harms nobody, where the number is
/// none.
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    let (from, to) = UnixStream::pair()?;
    let rights = [ControlMessage::ScmRights(&[fd])];
    let slices = [IoSlice::new(&[0])];
    sendmsg::<UnixAddr>(from.as_raw_fd(), &slices, &rights, MsgFlags::empty(), None)?;
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut received = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    recvmsg(&to, &mut [IoSliceMut::new(&mut [0])], &mut received, flags)?;
    let mut descriptors = received.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    let missing = || io::Error::other("it did not come through");
    descriptors.next().ok_or_else(missing)
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: can't remove it: {error}", self.path.display());
        }
    }
}

/// Lets who shall connect to the socket of this file. The group comes first: the mode is not meant for another.
fn give_access(file: &File, access: SocketAccess) -> io::Result<()> {
    if let Some(group) = access.group {
        fchownat(file, "", None, Some(group.0), AtFlags::AT_EMPTY_PATH)?;
    }
    let mode = access.mode.0;
    if file.metadata()?.mode() & 0o777 == mode {
        return Ok(());
    }
    // A file that is only known by its place takes no mode by its descriptor, other than so.
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(itself, Permissions::from_mode(mode))
}

/// Waits for the folder of `path` to be nobody else's, until the answer is dropped. Somebody who is no daemon may hold it
/// for long: after a second it goes without.
fn lock_folder(path: &Path) -> Option<Flock<File>> {
    let mut folder = File::open(folder(path)).ok()?;
    for _ in 0..100 {
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((unlocked, _)) => folder = unlocked,
        }
        thread::sleep(Duration::from_millis(10));
    }
    None
}

/// Makes room at `path`, where nothing may be but a dead socket.
fn clear(path: &Path) -> Result<(), ListenerError> {
    let failed = |error: io::Error| ListenerError::Io(path.to_owned(), error);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(file) if !file.file_type().is_socket() => Err(ListenerError::NoSocket(path.to_owned())),
        Ok(_) if answers(path).map_err(failed)? => Err(ListenerError::InUse(path.to_owned())),
        Ok(_) => fs::remove_file(path).map_err(failed),
    }
}

/// Connects to who listens at `path`, without waiting: a full backlog is `WouldBlock`. The stream doesn't block either.
pub fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

/// Whether somebody listens at `path`. A full backlog is somebody too.
fn answers(path: &Path) -> io::Result<bool> {
    match connect_at_once(path) {
        Ok(_) => Ok(true),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock => Ok(true),
            io::ErrorKind::ConnectionRefused => Ok(false),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let socket = SocketFile::bind(&path, SocketAccess::default()).unwrap();
        assert!(matches!(
            SocketFile::bind(&path, SocketAccess::default()),
            Err(ListenerError::InUse(_))
        ));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_in_the_way_is_never_touched() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            SocketFile::bind(&path, SocketAccess::default()),
            Err(ListenerError::NoSocket(_))
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_folder_that_somebody_holds_does_not_keep_it_waiting_forever() {
        let folder = TempDir::new().unwrap();
        let held = File::open(folder.path()).unwrap();
        let _held = Flock::lock(held, FlockArg::LockExclusive).unwrap();
        SocketFile::bind(&folder.path().join("socket"), SocketAccess::default()).unwrap();
    }

    #[test]
    fn only_its_own_file_is_removed() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        let socket = SocketFile::bind(&path, SocketAccess::default()).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn a_full_backlog_is_somebody() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = connect_at_once(&path) {
            waiting.push(stream);
        }
        assert!(matches!(
            SocketFile::bind(&path, SocketAccess::default()),
            Err(ListenerError::InUse(_))
        ));
    }
}
