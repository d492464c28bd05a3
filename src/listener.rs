//! A listening Unix socket, and the file that is its name.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use thiserror::Error;

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
}

/// A listening socket. Its file is removed with it.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that another's is not removed.
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`. A socket file there that nobody listens at any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenerError> {
        let failed = |error: io::Error| ListenerError::Io(path.to_owned(), error);
        // Two daemons that start at once both see the same stale file: one after the other.
        let _turn = lock_folder(path);
        clear(path)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        let file = fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: (file.dev(), file.ino()),
        })
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

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{}: can't remove it: {error}", self.path.display());
        }
    }
}

/// Waits for the folder of `path` to be nobody else's, until the answer is dropped. Somebody who is no daemon may hold it
/// for long: after a second it goes without.
fn lock_folder(path: &Path) -> Option<Flock<File>> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut folder = File::open(folder.unwrap_or(Path::new("."))).ok()?;
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
        let socket = SocketFile::bind(&path).unwrap();
        assert!(matches!(
            SocketFile::bind(&path),
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
            SocketFile::bind(&path),
            Err(ListenerError::NoSocket(_))
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_folder_that_somebody_holds_does_not_keep_it_waiting_forever() {
        let folder = TempDir::new().unwrap();
        let held = File::open(folder.path()).unwrap();
        let _held = Flock::lock(held, FlockArg::LockExclusive).unwrap();
        SocketFile::bind(&folder.path().join("socket")).unwrap();
    }

    #[test]
    fn only_its_own_file_is_removed() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("socket");
        let socket = SocketFile::bind(&path).unwrap();
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
            SocketFile::bind(&path),
            Err(ListenerError::InUse(_))
        ));
    }
}
