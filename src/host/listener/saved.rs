//! Listening sockets that go from one daemon to the next.
//!
//! A socket and its file stay what they are: no client is refused meanwhile. Until the predecessor has gone, it may still go on,
//! so the successor removes no file before [`LoadedListeners::own`].

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{UnixAddr, VsockAddr, getsockname, getsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::{Directory, ListenerError, OwnFile, SocketFile, give_access, open};
use crate::config::{SocketAccess, directory_of};
use crate::host::socket::socket_type;
use crate::packet::header::PacketType;
use crate::saved::{LoadError, Loader, SavedFd, Saver};

/// A listening socket, in a document.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ListenerState {
    /// One with a file.
    File {
        /// The file's path, device and inode.
        path: SavedPath,
        #[allow(missing_docs)]
        device: u64,
        #[allow(missing_docs)]
        inode: u64,
        /// The socket.
        fd: SavedFd,
    },
    /// One of AF_VSOCK. It knows its port.
    Vsock {
        /// The socket.
        vsock: SavedFd,
    },
}

/// A path, which need not be text.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum SavedPath {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&Path> for SavedPath {
    fn from(path: &Path) -> Self {
        match path.to_str() {
            Some(text) => Self::Text(text.into()),
            None => Self::Bytes(path.as_os_str().as_bytes().into()),
        }
    }
}

impl From<SavedPath> for PathBuf {
    fn from(path: SavedPath) -> Self {
        match path {
            SavedPath::Text(text) => text.into(),
            SavedPath::Bytes(bytes) => OsString::from_vec(bytes).into(),
        }
    }
}

/// The listening sockets of a predecessor that nobody has adopted yet.
#[derive(Debug)]
pub struct LoadedListeners {
    sockets: Vec<SocketFile>,
    /// Those of AF_VSOCK.
    vsock: Vec<OwnedFd>,
    /// Whether their files are this process's, and those of the adopted ones.
    is_owned: Arc<AtomicBool>,
    /// Whether the predecessor has ended, so that one that nobody can adopt may be removed.
    is_orphaned: bool,
}

impl LoadedListeners {
    /// No sockets. The predecessor has ended, or may still go on.
    pub fn new(is_orphaned: bool) -> Self {
        Self {
            sockets: Vec::new(),
            vsock: Vec::new(),
            is_owned: Arc::default(),
            is_orphaned,
        }
    }

    /// Adds a socket.
    ///
    /// # Errors
    /// Its descriptor is not there.
    pub fn load(&mut self, state: ListenerState, loader: &mut Loader) -> Result<(), LoadError> {
        match state {
            ListenerState::File {
                path,
                device,
                inode,
                fd,
            } => self.push(loader.take_fd(fd)?, path.into(), (device, inode)),
            ListenerState::Vsock { vsock } => self.vsock.push(loader.take_fd(vsock)?),
        }
        Ok(())
    }

    /// Adds a socket of which nothing else is known, if it listens and, where its name is that of a file, the file is there.
    pub fn find(&mut self, socket: OwnedFd) {
        let Ok(true) = getsockopt(&socket, sockopt::AcceptConn) else {
            return;
        };
        if getsockname::<VsockAddr>(socket.as_raw_fd()).is_ok() {
            self.vsock.push(socket);
            return;
        }
        let name = getsockname::<UnixAddr>(socket.as_raw_fd());
        let path = name.ok().and_then(|name| Some(name.path()?.to_owned()));
        if let Some(path) = path
            && let Ok((_, identity)) = open(&path)
        {
            self.push(socket, path, identity);
        }
    }

    fn push(&mut self, listener: OwnedFd, path: PathBuf, identity: (u64, u64)) {
        let file = OwnFile {
            identity,
            directory: Directory::containing(&path),
            path,
            is_owned: self.is_owned.clone(),
            remove_by: None,
        };
        self.sockets.push(SocketFile {
            file: Some(file),
            listener: listener.into(),
        });
    }

    /// The directories of their files.
    pub fn directories(&self) -> Vec<PathBuf> {
        let files = self
            .sockets
            .iter()
            .filter_map(|socket| socket.file.as_ref());
        let directories = files.map(|file| directory_of(&file.path));
        // One that is gone has no file.
        let there = directories.filter(|directory| directory.is_dir());
        there.map(Path::to_owned).collect()
    }

    /// Makes the files this process's: those of the sockets that were adopted, and those of the others, which are removed.
    pub fn own(self) {
        self.is_owned.store(true, Ordering::Relaxed);
    }

    /// Takes out the socket of the file at `path`, if it is of this type.
    fn take(&mut self, path: &Path, packet_type: PacketType) -> Option<SocketFile> {
        let (_, found) = open(path).ok()?;
        let is_it = |socket: &SocketFile| {
            let file = socket.file.as_ref();
            file.is_some_and(|file| file.identity == found)
        };
        let place = self.sockets.iter().position(is_it)?;
        if listens_for(&self.sockets[place], packet_type) {
            return Some(self.sockets.swap_remove(place));
        }
        if self.is_orphaned
            && let Some(file) = &mut self.sockets.swap_remove(place).file
        {
            file.is_owned = Arc::new(true.into());
        }
        None
    }

    /// Takes out the socket of a port of AF_VSOCK, if it is of this type.
    pub(in crate::host) fn take_vsock(
        &mut self,
        port: u32,
        packet_type: PacketType,
    ) -> Option<OwnedFd> {
        let is_it = |socket: &OwnedFd| {
            let name = getsockname::<VsockAddr>(socket.as_raw_fd());
            name.is_ok_and(|name| name.port() == port) && listens_for(socket, packet_type)
        };
        let place = self.vsock.iter().position(is_it)?;
        Some(self.vsock.swap_remove(place))
    }
}

/// Whether a socket listens for connections of this type.
fn listens_for(socket: &impl AsFd, packet_type: PacketType) -> bool {
    getsockopt(socket, sockopt::AcceptConn) == Ok(true)
        && getsockopt(socket, sockopt::SockType) == Ok(socket_type(packet_type))
}

impl SocketFile {
    /// Saves the socket. One that was inherited is none: the successor inherits it as well.
    pub(crate) fn save<'a>(&'a self, saver: &mut Saver<'a>) -> Option<ListenerState> {
        let file = self.file.as_ref()?;
        let (device, inode) = file.identity;
        Some(ListenerState::File {
            path: SavedPath::from(&*file.path),
            device,
            inode,
            fd: saver.fd(self.listener.as_fd()),
        })
    }

    /// As [`bind`](Self::bind), but where the file at `path` is that of a predecessor's socket of this type, that one goes on.
    pub fn bind_or_adopt(
        path: &Path,
        packet_type: PacketType,
        access: SocketAccess,
        loaded: &mut LoadedListeners,
    ) -> Result<Self, ListenerError> {
        let Some(mut socket) = loaded.take(path, packet_type) else {
            return Self::bind(path, packet_type, access);
        };
        let failed = |error| ListenerError::Access(path.to_owned(), error);
        if let Some(own) = &mut socket.file {
            own.path = path.to_owned();
            let (file, identity) = open(path).map_err(failed)?;
            if identity == own.identity {
                give_access(&file, access).map_err(failed)?;
            }
        }
        Ok(socket)
    }
}

impl Default for LoadedListeners {
    fn default() -> Self {
        Self::new(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use crate::config::SocketMode;
    use tempfile::TempDir;

    fn bind(path: &Path) -> SocketFile {
        SocketFile::bind(path, PacketType::Stream, SocketAccess::default()).unwrap()
    }

    /// What a successor gets of a socket.
    fn handed_over(socket: &SocketFile, is_orphaned: bool) -> LoadedListeners {
        let file: File = tempfile::tempfile().unwrap();
        let mut saver = Saver::new(&file).unwrap();
        let state = socket.save(&mut saver).unwrap();
        let fds = saver.finish(&state).unwrap();
        let fds = fds.iter().map(|fd| fd.try_clone_to_owned().ok()).collect();
        let mut loader = Loader::open(file.try_clone().unwrap(), fds).unwrap();
        let mut loaded = LoadedListeners::new(is_orphaned);
        let state = loader.document().unwrap();
        loaded.load(state, &mut loader).unwrap();
        loaded
    }

    fn adopt(
        path: &Path,
        packet_type: PacketType,
        loaded: &mut LoadedListeners,
    ) -> Result<SocketFile, ListenerError> {
        SocketFile::bind_or_adopt(path, packet_type, SocketAccess::default(), loaded)
    }

    #[test]
    fn a_client_that_came_before_is_accepted_after() {
        for name in ["socket".into(), OsString::from_vec(vec![b'a', 0xff])] {
            let directory = TempDir::new().unwrap();
            let path = directory.path().join(name);
            let socket = bind(&path);
            let _client = UnixStream::connect(&path).unwrap();
            let mut loaded = handed_over(&socket, false);
            let access = SocketAccess::new(Some(SocketMode(0o640)), None);
            let adopted =
                SocketFile::bind_or_adopt(&path, PacketType::Stream, access, &mut loaded).unwrap();
            loaded.own();
            socket.leave();
            adopted.listener().unwrap().accept().unwrap();
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o640);
            drop(adopted);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_successor_that_gives_up_removes_nothing() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let socket = bind(&path);
        let mut loaded = handed_over(&socket, false);
        drop(adopt(&path, PacketType::Stream, &mut loaded).unwrap());
        drop(handed_over(&socket, false));
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn what_nobody_adopts_is_removed_with_the_rest() {
        let directory = TempDir::new().unwrap();
        let path = |name| directory.path().join(name);
        let socket = bind(&path("old"));
        let mut loaded = handed_over(&socket, false);
        let other = adopt(&path("new"), PacketType::Stream, &mut loaded).unwrap();
        socket.leave();
        assert!(path("old").exists());
        loaded.own();
        assert!(!path("old").exists());
        drop(other);
        assert!(!path("new").exists());
    }

    #[test]
    fn a_file_that_has_taken_its_place_is_not_adopted() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let socket = bind(&path);
        let mut loaded = handed_over(&socket, false);
        // The socket keeps the inode.
        fs::remove_file(&path).unwrap();
        let other = bind(&path);
        let adopted = adopt(&path, PacketType::Stream, &mut loaded);
        assert!(matches!(adopted, Err(ListenerError::InUse(_))));
        loaded.own();
        drop(socket);
        UnixStream::connect(&path).unwrap();
        drop(other);
    }

    #[test]
    fn a_socket_of_another_type_is_replaced_if_the_predecessor_has_ended() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let socket = bind(&path);
        let mut loaded = handed_over(&socket, false);
        let adopted = adopt(&path, PacketType::Seqpacket, &mut loaded);
        assert!(matches!(adopted, Err(ListenerError::InUse(_))));
        let mut loaded = handed_over(&socket, true);
        socket.leave();
        let adopted = adopt(&path, PacketType::Seqpacket, &mut loaded).unwrap();
        loaded.own();
        assert!(path.exists());
        drop(adopted);
        assert!(!path.exists());
    }

    #[test]
    fn an_inherited_socket_is_not_saved() {
        let directory = TempDir::new().unwrap();
        let socket = bind(&directory.path().join("socket"));
        let foreign = SocketFile::foreign(socket.listener().unwrap());
        let file = tempfile::tempfile().unwrap();
        assert!(foreign.save(&mut Saver::new(&file).unwrap()).is_none());
    }
}
