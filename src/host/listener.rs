//! Listening Unix sockets: those that the daemon binds, with the files that are their names, and inherited ones.
//!
//! A socket file outlives the process that bound it, so a daemon that starts must tell a dead file, which it replaces, from
//! that of a running daemon, which it leaves alone. Two daemons that start at once, or one that stops while its successor
//! starts, could each take the other's file for dead. The rules against this:
//!
//! - Whoever makes, replaces or removes a socket file holds the lock (`flock`) of its directory meanwhile.
//! - A file is removed while its socket still listens. A file that nobody is bound to is therefore always a dead one.
//!
//! The sandbox lets the daemon open nothing, so the directory is opened when the socket is bound and kept open for its
//! removal.
//!
//! A daemon that hands its VMs over leaves its files, and its successor adopts the sockets (`listener/saved.rs`).

mod saved;

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libc::{O_NOFOLLOW, O_PATH, c_int};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::unistd::fchownat;
use thiserror::Error;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub use self::saved::{ListenerState, LoadedListeners};
use super::socket::socket_type;
use crate::config::{SocketAccess, directory_of};
use crate::packet::header::PacketType;
use crate::syscalls::{Argument, Syscall};

/// How long a daemon that starts waits for the lock of a directory. Daemons hold it for an instant; another program may
/// hold it for as long as it likes, and then the daemon goes on without.
const LOCK_AT_START: Duration = Duration::from_secs(1);

/// How long a daemon that stops waits for it, for each socket, unless it has less time for all of them.
const LOCK_AT_STOP: Duration = Duration::from_millis(100);

/// The pause between two tries to lock a directory.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// The system calls of this file that are made inside the sandbox.
pub(crate) fn syscalls() -> Vec<Syscall> {
    vec![
        // To accept, and to duplicate a listening socket.
        Syscall::any(libc::SYS_accept4),
        Syscall::only(libc::SYS_ioctl, &[Argument::Is(1, libc::FIONBIO as c_int)]),
        Syscall::only(libc::SYS_fcntl, &[Argument::Is(1, libc::F_DUPFD_CLOEXEC)]),
        Syscall::any(libc::SYS_close),
        // To remove a socket's file.
        Syscall::only(
            libc::SYS_flock,
            &[Argument::Is(1, libc::LOCK_EX | libc::LOCK_NB)],
        ),
        Syscall::only(libc::SYS_flock, &[Argument::Is(1, libc::LOCK_UN)]),
        Syscall::any(libc::SYS_clock_nanosleep),
        Syscall::any(libc::SYS_statx),
        #[cfg(target_arch = "x86_64")]
        Syscall::any(libc::SYS_unlink),
        Syscall::only(libc::SYS_unlinkat, &[Argument::Is(2, 0)]),
    ]
}

/// Why there is no listening socket.
#[derive(Debug, Error)]
pub enum ListenerError {
    /// A running process has a socket bound to the path.
    #[error("{0}: another daemon listens there, stop it or choose another path")]
    InUse(PathBuf),
    /// The path is that of a file which is not a socket. Such a file is never removed.
    #[error("{0}: a file that is not a socket is in the way, move it or choose another path")]
    NotASocket(PathBuf),
    /// The system refused to bind the socket.
    #[error("{0}: can't listen there: {1}")]
    Io(PathBuf, io::Error),
    /// Connections are to be forwarded to AF_VSOCK, and the kernel has none.
    #[error(
        "--forward-cid: no AF_VSOCK in this kernel, load a module for it (vsock_loopback for CID 1): {0}"
    )]
    NoVsock(io::Error),
    /// The system refused to listen on a port of AF_VSOCK.
    #[error("port {0} of AF_VSOCK: can't listen there: {1}")]
    Vsock(u32, io::Error),
    /// The inherited descriptor is not a socket that can be used.
    #[error("descriptor {0}: {1}")]
    Inherited(RawFd, io::Error),
    /// The system refused to set the socket's mode or group.
    #[error("{0}: can't set its mode and group: {1}")]
    Access(PathBuf, io::Error),
}

/// A listening, non-blocking Unix socket. The file of one that was bound here is removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    /// Above `listener`, and so dropped before it: the file is removed while the socket still listens.
    file: Option<OwnFile>,
    listener: UnixListener,
}

/// The file of a socket that was bound here.
#[derive(Debug)]
struct OwnFile {
    path: PathBuf,
    /// Device and inode, to recognize a file that has taken its place. The bound socket keeps the inode from being reused.
    identity: (u64, u64),
    directory: Directory,
    /// Whether this process may remove it. It may not before it has taken it over, and not after it has handed it over.
    is_owned: Arc<AtomicBool>,
    /// When its removal waits no longer for the lock of the directory.
    remove_by: Option<Instant>,
}

/// Makes new socket files accessible to their owner only, so that nobody connects before a socket has its final mode. The
/// umask belongs to the whole process: this is called before other threads run, and it is not set back.
pub fn tighten_umask() {
    umask(Mode::from_bits_truncate(0o177));
}

impl SocketFile {
    /// Listens at `path` for connections of this type, with the mode and group of `access`. A socket file that nobody is bound to
    /// any more is replaced.
    pub fn bind(
        path: &Path,
        packet_type: PacketType,
        access: SocketAccess,
    ) -> Result<Self, ListenerError> {
        let failed = |error: io::Error| ListenerError::Io(path.to_owned(), error);
        let directory = Directory::containing(path);
        let locked = directory.lock(LOCK_AT_START);
        clear(path)?;
        let listener = listen(path, packet_type).map_err(failed)?;
        let (file, identity) = open(path).map_err(failed)?;
        drop(locked);
        let own = OwnFile {
            path: path.to_owned(),
            identity,
            directory,
            is_owned: Arc::new(true.into()),
            remove_by: None,
        };
        let socket = Self {
            file: Some(own),
            listener,
        };
        give_access(&file, access)
            .map_err(|error| ListenerError::Access(path.to_owned(), error))?;
        Ok(socket)
    }

    /// A listening socket that somebody else has made. Its file, if it has one, is left alone.
    pub fn foreign(listener: UnixListener) -> Self {
        Self {
            file: None,
            listener,
        }
    }

    /// Stops listening and removes the file, if it was bound here. Another process may keep the directory locked: from
    /// `deadline` on that is not waited for.
    pub fn remove_by(mut self, deadline: Instant) {
        if let Some(file) = &mut self.file {
            file.remove_by = Some(deadline);
        }
    }

    /// Stops listening here. The file stays: the socket is a successor's.
    pub fn leave(mut self) {
        if let Some(file) = &mut self.file {
            // Not that of others which are taken over together.
            file.is_owned = Arc::default();
        }
    }

    /// A duplicate of the listening socket.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// A Unix stream socket that the process inherited from whoever started it.
pub enum Inherited {
    /// A listening socket, which does not block from now on.
    Listener(UnixListener),
    /// A connected socket.
    Stream(UnixStream),
}

impl Inherited {
    /// A duplicate of descriptor number `fd`.
    pub fn take(fd: RawFd) -> Result<Self, ListenerError> {
        let failed = |error: io::Error| ListenerError::Inherited(fd, error);
        let socket = duplicate(fd).map_err(failed)?;
        let kind = getsockopt(&socket, sockopt::SockType).map_err(|error| failed(error.into()))?;
        let listens = getsockopt(&socket, sockopt::AcceptConn);
        let listens = listens.map_err(|error| failed(error.into()))?;
        let stream = UnixStream::from(socket);
        // The addresses of other families are an error, and so is that of a missing peer.
        stream.local_addr().map_err(failed)?;
        if kind != SockType::Stream {
            Err(failed(io::Error::other("not a stream socket")))
        } else if listens {
            // Another process may accept from the same socket: after poll, a blocking accept could wait for good.
            stream.set_nonblocking(true).map_err(failed)?;
            Ok(Self::Listener(OwnedFd::from(stream).into()))
        } else {
            stream.peer_addr().map_err(failed)?;
            Ok(Self::Stream(stream))
        }
    }

    /// A duplicate of descriptor number `fd`, which must be a listening socket.
    pub fn take_listener(fd: RawFd) -> Result<UnixListener, ListenerError> {
        match Self::take(fd)? {
            Self::Listener(listener) => Ok(listener),
            Self::Stream(_) => {
                let error = io::Error::other("not a listening socket");
                Err(ListenerError::Inherited(fd, error))
            }
        }
    }
}

/// Makes a descriptor its own that the process inherited and knows by its number only. The number is closed.
///
/// # Errors
/// There is no such descriptor, or the system refuses.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let owned = duplicate(fd)?;
    nix::unistd::close(fd)?;
    Ok(owned)
}

/// The file at a path itself, even if another takes its place there, and its device and inode.
fn open(path: &Path) -> io::Result<(File, (u64, u64))> {
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(O_PATH | O_NOFOLLOW);
    let file = options.open(path)?;
    let metadata = file.metadata()?;
    Ok((file, (metadata.dev(), metadata.ino())))
}

/// A listening, non-blocking socket at a path.
fn listen(path: &Path, packet_type: PacketType) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let kind = socket_type(packet_type);
    let socket = nix::sys::socket::socket(AddressFamily::Unix, kind, flags, None)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    nix::sys::socket::listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// Duplicates a descriptor that is known by its number only. The number may be wrong, so it can't become an `OwnedFd` or a
/// `BorrowedFd`; the kernel checks it when it is sent over a socket.
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    let (from, to) = UnixStream::pair()?;
    from.send_with_fd(&[0][..], fd)?;
    let (_, received) = to.recv_with_fd(&mut [0])?;
    let received = received.ok_or_else(|| io::Error::other("it can't be duplicated"))?;
    // The received one is inherited by child processes; duplicates are not.
    received.try_clone().map(OwnedFd::from)
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        if !self.is_owned.load(Ordering::Relaxed) {
            return;
        }
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let patience = self.remove_by.map_or(LOCK_AT_STOP, left);
        let _locked = self.directory.lock(patience.min(LOCK_AT_STOP));
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: can't remove it: {error}", self.path.display());
        }
    }
}

/// Sets the mode and the group of a socket's file.
fn give_access(file: &File, access: SocketAccess) -> io::Result<()> {
    // The group first: the mode is not meant for the previous one.
    if let Some(group) = access.group {
        fchownat(file, "", None, Some(group.0), AtFlags::AT_EMPTY_PATH)?;
    }
    let mode = access.mode.0;
    if file.metadata()?.mode() & 0o777 == mode {
        return Ok(());
    }
    // fchmod refuses O_PATH descriptors.
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(itself, Permissions::from_mode(mode))
}

/// The directory of a socket's file, open for its lock. Without permission to read it there is no lock.
#[derive(Debug)]
struct Directory(Option<File>);

impl Directory {
    fn containing(path: &Path) -> Self {
        Self(File::open(directory_of(path)).ok())
    }

    /// Locks the directory until the result is dropped; `None` if another process holds the lock for all of `patience`.
    fn lock(&self, patience: Duration) -> Option<DirectoryLock<'_>> {
        let directory = self.0.as_ref()?;
        let deadline = Instant::now() + patience;
        while directory.try_lock().is_err() {
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(LOCK_RETRY);
        }
        Some(DirectoryLock(directory))
    }
}

struct DirectoryLock<'d>(&'d File);

impl Drop for DirectoryLock<'_> {
    fn drop(&mut self) {
        // It can't fail while the lock is held, and closing the directory unlocks it as well.
        let _ = self.0.unlock();
    }
}

/// Removes a dead socket file at `path`. It is an error if anything else is there.
fn clear(path: &Path) -> Result<(), ListenerError> {
    let failed = |error: io::Error| ListenerError::Io(path.to_owned(), error);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(file) if !file.file_type().is_socket() => {
            Err(ListenerError::NotASocket(path.to_owned()))
        }
        Ok(_) if is_bound(path).map_err(failed)? => Err(ListenerError::InUse(path.to_owned())),
        Ok(_) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        },
    }
}

/// Whether a process has a socket bound to `path`. A stream listener does not notice the question: the kernel compares the
/// socket types before it connects anything (unix(7), EPROTOTYPE).
fn is_bound(path: &Path) -> io::Result<bool> {
    let probe = UnixDatagram::unbound()?;
    match probe.connect(path).map_err(Errno::try_from) {
        // EPERM: a datagram socket that takes messages from its own peer only.
        Ok(()) | Err(Ok(Errno::EPROTOTYPE | Errno::EPERM)) => Ok(true),
        Err(Ok(Errno::ECONNREFUSED | Errno::ENOENT)) => Ok(false),
        Err(Ok(error)) => Err(error.into()),
        Err(Err(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::dialer::Dialer;
    use nix::sys::socket::{AddressFamily, SockFlag, UnixAddr, socket};
    use tempfile::TempDir;

    fn bind(path: &Path) -> Result<SocketFile, ListenerError> {
        SocketFile::bind(path, PacketType::Stream, SocketAccess::default())
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let socket = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(ListenerError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_listener_does_not_notice_that_its_path_was_tried() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let socket = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(ListenerError::InUse(_))));
        let accepted = socket.listener().unwrap().accept();
        assert_eq!(accepted.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn sockets_of_other_types_and_ones_that_do_not_listen_yet_are_in_use() {
        let directory = TempDir::new().unwrap();
        let path = |name| directory.path().join(name);
        let _datagram = UnixDatagram::bind(path("datagram")).unwrap();
        let connected = UnixDatagram::bind(path("connected")).unwrap();
        connected.connect(path("datagram")).unwrap();
        let bound = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::empty(),
            None,
        )
        .unwrap();
        let address = UnixAddr::new(&path("bound")).unwrap();
        nix::sys::socket::bind(bound.as_raw_fd(), &address).unwrap();
        for name in ["datagram", "connected", "bound"] {
            let refused = bind(&path(name));
            assert!(matches!(refused, Err(ListenerError::InUse(_))), "{name}");
        }
    }

    #[test]
    fn a_file_in_the_way_is_never_touched() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(ListenerError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_directory_that_another_process_has_locked_delays_it_for_a_bounded_time() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let held = File::open(directory.path()).unwrap();
        held.lock().unwrap();
        let socket = bind(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_is_removed_without_the_lock_when_there_is_no_time_for_it() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let socket = bind(&path).unwrap();
        let held = File::open(directory.path()).unwrap();
        held.lock().unwrap();
        socket.remove_by(Instant::now());
        assert!(!path.exists());
    }

    #[test]
    fn the_directory_is_not_locked_while_a_socket_is_served() {
        let directory = TempDir::new().unwrap();
        let socket = bind(&directory.path().join("socket")).unwrap();
        let other = File::open(directory.path()).unwrap();
        other.try_lock().unwrap();
        other.unlock().unwrap();
        drop(socket);
        other.try_lock().unwrap();
    }

    #[test]
    fn only_its_own_file_is_removed() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let socket = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn a_full_backlog_is_in_use() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut dialer = Dialer::default();
        let mut waiting = Vec::new();
        while let Ok(stream) = dialer.connect(&path, PacketType::Stream, None) {
            waiting.push(stream);
        }
        assert!(matches!(bind(&path), Err(ListenerError::InUse(_))));
    }

    #[test]
    fn an_inherited_listener_does_not_block() {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let inherited = Inherited::take_listener(listener.as_raw_fd()).unwrap();
        let accepted = inherited.accept();
        assert_eq!(accepted.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn an_inherited_descriptor_is_not_passed_to_child_processes() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let duplicate = duplicate(stream.as_raw_fd()).unwrap();
        let flags = nix::fcntl::fcntl(&duplicate, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, libc::FD_CLOEXEC);
    }
}
