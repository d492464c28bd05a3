//! The paths of the sockets, and what can be wrong with them.
//!
//! Host programs listen for a guest at `<uds-path>_<port>`, so the UDS path is a prefix as well as a path: what the guest
//! can name must not lead to a socket that is meant for somebody else.

use std::borrow::Cow;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::packet::header::{Cid, PacketType};

/// The longest path of a Unix socket, in bytes, without its closing NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// What follows the UDS path for the highest port that a guest can connect to.
const LONGEST_PORT: &str = "_4294967295";

/// What follows the CID in the name of a sibling's socket.
const SIBLING_SUFFIX: &str = ".vsock";

/// What follows the path of a socket for streams in that of the socket for messages.
pub(super) const SEQPACKET_SUFFIX: &str = "_seqpacket";

/// The longest name of a sibling's socket.
const LONGEST_SIBLING: &str = "4294967294.vsock_seqpacket";

/// A mistake in the path of a socket. `option` is the option of the command line that has the path.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PathError {
    /// The path does not fit a Unix socket address.
    #[error(
        "{option} {path}: its {len} bytes are too long for a Unix socket, the limit is {limit}"
    )]
    TooLong {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
        /// The longest that it may be, in bytes. That of a UDS path leaves room for a port.
        limit: usize,
    },
    /// The path names no file.
    #[error("{option} {path}: this is not the path of a file")]
    NotAFile {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The directory of the socket does not exist.
    #[error("{option} {path}: the directory {directory} does not exist, make it first")]
    NoDirectory {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// The directory.
        directory: PathBuf,
    },
    /// What should be the directory of the socket is something else.
    #[error("{option} {path}: {directory} is not a directory")]
    NotADirectory {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// What is in the directory's place.
        directory: PathBuf,
    },
    /// The directory of the socket can't be entered.
    #[error("{option} {path}: the directory {directory}: {error}")]
    Directory {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// The directory.
        directory: PathBuf,
        /// What the system says.
        error: io::ErrorKind,
    },
    /// Two sockets have the same path.
    #[error("{option} {path}: another socket has this path, each needs its own")]
    Duplicate {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A guest can connect to the socket, since the path is that of one of its ports.
    #[error(
        "{option} {path}: a guest's connections to a port of --uds-path {uds_path} go there, choose another name"
    )]
    IsPort {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// The UDS path of the guest.
        uds_path: PathBuf,
    },
    /// The guest would connect to a socket that is not meant for it.
    #[error("{option} {path}: no host program listens there, it is a socket of {ours}")]
    NotAHostProgram {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// The option that the socket belongs to.
        ours: &'static str,
    },
}

/// A path of the configuration.
#[derive(Clone, Debug)]
pub(super) struct SocketPath<'c> {
    /// The index of the VM that has it, if one has.
    pub(super) vm: Option<usize>,
    /// The option of the command line that has it.
    pub(super) option: &'static str,
    pub(super) path: Cow<'c, Path>,
    pub(super) kind: PathKind,
}

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PathKind {
    /// A socket of the daemon.
    Bound,
    /// A socket of the daemon. Host programs listen at this path with a port behind it.
    UdsPath,
    /// A socket of the daemon, in a directory where other daemons have theirs. The name is made from the CID.
    Sibling,
    /// The socket of a host program, which the guest can connect to.
    HostProgram,
}

impl PathKind {
    /// Whether the daemon binds the socket.
    pub(super) fn is_bound(self) -> bool {
        self != Self::HostProgram
    }
}

/// A path with something behind its last component.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Where the guest with this CID is reached in a directory of siblings, for connections of this type.
pub fn sibling_path(directory: &Path, cid: Cid, packet_type: PacketType) -> PathBuf {
    let path = directory.join(format!("{cid}{SIBLING_SUFFIX}"));
    match packet_type {
        PacketType::Seqpacket => with_suffix(&path, SEQPACKET_SUFFIX),
        PacketType::Stream | PacketType::Unknown(_) => path,
    }
}

impl SocketPath<'_> {
    /// Checks the path alone. The result is the same path without symbolic links or dots in its directory.
    fn resolve(&self) -> Result<PathBuf, PathError> {
        let (option, path) = (self.option, &*self.path);
        let (path, len, limit) = match self.kind {
            PathKind::UdsPath => (
                path,
                path.as_os_str().len(),
                MAX_SOCKET_PATH - LONGEST_PORT.len(),
            ),
            PathKind::Sibling => {
                // Whatever this guest's CID is, others have longer ones.
                let directory = directory_of(path);
                let longest = directory.join(LONGEST_SIBLING).as_os_str().len();
                let len = directory.as_os_str().len();
                (directory, len, MAX_SOCKET_PATH - (longest - len))
            }
            PathKind::Bound | PathKind::HostProgram => {
                (path, path.as_os_str().len(), MAX_SOCKET_PATH)
            }
        };
        let path = path.to_owned();
        if len > limit {
            return Err(PathError::TooLong {
                option,
                path,
                len,
                limit,
            });
        }
        let Some(file) = self.path.file_name() else {
            return Err(PathError::NotAFile { option, path });
        };
        let directory = directory_of(&self.path).to_owned();
        match directory.canonicalize() {
            Ok(real) if real.is_dir() => Ok(real.join(file)),
            Ok(_) => Err(PathError::NotADirectory {
                option,
                path,
                directory,
            }),
            Err(error) => Err(match error.kind() {
                io::ErrorKind::NotFound => PathError::NoDirectory {
                    option,
                    path,
                    directory,
                },
                // A file is above it.
                io::ErrorKind::NotADirectory => PathError::NotADirectory {
                    option,
                    path,
                    directory: file_above(&directory),
                },
                error => PathError::Directory {
                    option,
                    path,
                    directory,
                    error,
                },
            }),
        }
    }
}

/// Checks all paths of a process, each alone and against the others. An error comes with the path that has it.
pub(super) fn check<'s, 'c>(
    paths: &'s [SocketPath<'c>],
) -> Result<(), (&'s SocketPath<'c>, PathError)> {
    let mut bound: Vec<(&SocketPath<'c>, PathBuf)> = Vec::new();
    let mut host_programs = Vec::new();
    for socket in paths {
        let real = socket.resolve().map_err(|error| (socket, error))?;
        if !socket.kind.is_bound() {
            host_programs.push((socket, real));
        } else if bound.iter().any(|(_, other)| *other == real) {
            let (option, path) = (socket.option, socket.path.to_path_buf());
            return Err((socket, PathError::Duplicate { option, path }));
        } else {
            bound.push((socket, real));
        }
    }
    for (socket, real) in &bound {
        let mut uds_paths = bound
            .iter()
            .filter(|(uds, _)| uds.kind == PathKind::UdsPath);
        if let Some((uds, _)) = uds_paths.find(|(_, prefix)| is_port_of(real, prefix)) {
            let error = PathError::IsPort {
                option: socket.option,
                path: socket.path.to_path_buf(),
                uds_path: uds.path.to_path_buf(),
            };
            return Err((socket, error));
        }
    }
    for (socket, real) in &host_programs {
        let is_ours = |(ours, bound): &(&SocketPath<'_>, PathBuf)| {
            bound == real || (ours.kind == PathKind::Sibling && is_sibling_of(real, bound))
        };
        if let Some((ours, _)) = bound.iter().find(|bound| is_ours(bound)) {
            let error = PathError::NotAHostProgram {
                option: socket.option,
                path: socket.path.to_path_buf(),
                ours: ours.option,
            };
            return Err((socket, error));
        }
    }
    Ok(())
}

/// Whether a daemon may listen at `path` for guests that reach `sibling` in the same directory.
fn is_sibling_of(path: &Path, sibling: &Path) -> bool {
    let is_name = |name: &[u8]| {
        let name = name
            .strip_suffix(SEQPACKET_SUFFIX.as_bytes())
            .unwrap_or(name);
        name.ends_with(SIBLING_SUFFIX.as_bytes())
    };
    let name = path.file_name().map(OsStrExt::as_bytes);
    directory_of(path) == directory_of(sibling) && name.is_some_and(is_name)
}

/// The directory that holds the file of this path.
pub fn directory_of(path: &Path) -> &Path {
    let parent = path.parent();
    let parent = parent.filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// What is in the way to a path, since it is there and no directory.
fn file_above(path: &Path) -> PathBuf {
    let mut above = path.ancestors();
    let found = above.find(|path| path.exists());
    found.unwrap_or(path).to_owned()
}

/// Whether host programs listen at `path` for the guest of `uds_path`.
fn is_port_of(path: &Path, uds_path: &Path) -> bool {
    let path = path.as_os_str().as_bytes();
    let suffix = path.strip_prefix(uds_path.as_os_str().as_bytes());
    let digits = suffix.and_then(|suffix| suffix.strip_prefix(b"_"));
    let digits = digits.and_then(|digits| str::from_utf8(digits).ok());
    // The daemon writes ports without a sign and without leading zeros.
    digits.is_some_and(|digits| {
        let port = digits.parse::<u32>();
        port.is_ok_and(|port| port.to_string() == digits)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(path: &Path) -> SocketPath<'_> {
        SocketPath {
            vm: None,
            option: "--socket",
            path: path.into(),
            kind: PathKind::Bound,
        }
    }

    fn uds(path: &Path) -> SocketPath<'_> {
        SocketPath {
            vm: None,
            option: "--uds-path",
            path: path.into(),
            kind: PathKind::UdsPath,
        }
    }

    #[test]
    fn a_path_fits_a_socket_address_and_a_uds_path_fits_with_a_port() {
        let path = |len: usize| PathBuf::from(format!("/tmp/{}", "x".repeat(len - 5)));
        for (len, accepted) in [(107, true), (108, false)] {
            assert_eq!(socket(&path(len)).resolve().is_ok(), accepted, "{len}");
        }
        for (len, accepted) in [(96, true), (97, false)] {
            assert_eq!(uds(&path(len)).resolve().is_ok(), accepted, "{len}");
        }
        let message = uds(&path(97)).resolve().unwrap_err().to_string();
        assert!(message.contains("97 bytes"), "{message}");
        assert!(message.contains("the limit is 96"), "{message}");
    }

    #[test]
    fn a_path_without_a_file_or_a_directory_is_refused() {
        let message = |path| socket(Path::new(path)).resolve().unwrap_err().to_string();
        let missing = message("/nowhere/at/all.socket");
        assert!(missing.contains("the directory /nowhere/at does not exist"));
        let not_a_directory = message("/dev/null/socket");
        assert!(not_a_directory.contains("/dev/null is not a directory"));
        let below_a_file = message("/dev/null/below/socket");
        assert!(below_a_file.contains("/dev/null is not a directory"));
        assert!(message("/").contains("not the path of a file"));
        assert!(message("/tmp/..").contains("not the path of a file"));
    }

    #[test]
    fn the_same_file_by_two_names_is_refused() {
        let paths = ["/tmp/vhost", "/tmp/./vhost"].map(Path::new).map(socket);
        let (_, error) = check(&paths).unwrap_err();
        assert!(error.to_string().starts_with("--socket /tmp/./vhost: "));
        assert!(matches!(error, PathError::Duplicate { .. }));
    }

    #[test]
    fn a_path_that_the_guest_can_name_is_refused_in_either_order() {
        for name in ["/tmp/uds_0", "/tmp/uds_1234", "/tmp/./uds_4294967295"] {
            let (prefix, path) = (uds(Path::new("/tmp/uds")), socket(Path::new(name)));
            for paths in [[prefix.clone(), path.clone()], [path, prefix]] {
                let (_, error) = check(&paths).unwrap_err();
                assert!(matches!(error, PathError::IsPort { .. }), "{name}");
            }
        }
    }

    #[test]
    fn a_path_that_only_looks_like_that_of_a_port_is_accepted() {
        for name in [
            "/tmp/uds_",
            "/tmp/uds_vhost",
            "/tmp/uds1",
            "/tmp/uds_01",
            "/tmp/uds_+1",
            "/tmp/uds_4294967296",
            "/tmp/uds_1_2",
        ] {
            let paths = [uds(Path::new("/tmp/uds")), socket(Path::new(name))];
            assert!(check(&paths).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_file_without_a_directory_is_in_the_current_one() {
        assert_eq!(directory_of(Path::new("socket")), Path::new("."));
        assert_eq!(directory_of(Path::new("/run/socket")), Path::new("/run"));
    }
}
