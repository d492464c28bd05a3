//! Where a guest's connection leads: the host program, or the peer, that a destination stands for.

use std::fs;
use std::io::{self, IoSlice};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use super::connect_line;
use super::dialer::{self, Dialer};
use super::relay::{RelayError, Relays};
use super::siblings::{Call, CallError, Membership};
use super::socket::{HostSocket, SendError};
use super::vsock;
use crate::config::{HostSide, PortPath, VmConfig, sibling_path, with_suffix};
use crate::packet::header::{Cid, PacketType, PeerAddr, PeerPort, VsockHeader};
use crate::syscalls::Syscall;

/// To see whose socket a sibling's is.
pub(super) const SYSCALLS: &[Syscall] = &[Syscall::any(libc::SYS_statx)];

/// The user who may call in any guest's name.
const ROOT: u32 = 0;

/// The user whom a user namespace shows in place of all those that it has no number for (user_namespaces(7), overflowuid). It may
/// be anybody.
const NOBODY: u32 = 65534;

/// Why a destination can't be reached.
#[derive(Debug, Error)]
pub enum DialError {
    /// Nothing is behind this CID.
    #[error("CID {0} can't be reached")]
    NoSuchCid(Cid),
    /// Nobody listens, the backlog is full, or the system refused.
    #[error("{}: {error}", .path.display())]
    Connect {
        /// Where the host program would listen.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The host's AF_VSOCK does not even try.
    #[error("{to} of AF_VSOCK: {error}")]
    Vsock {
        /// Where the guest's connections lead.
        to: PeerAddr,
        /// What the system said.
        error: io::Error,
    },
    /// A sibling in this process can't be called.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Messages can't be forwarded.
    #[error(transparent)]
    Relay(#[from] RelayError),
}

impl DialError {
    /// Nobody listens, and asking again at once would bring the same answer.
    pub fn is_nobody(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        match self {
            Self::NoSuchCid(_) => true,
            Self::Connect { error, .. } => matches!(error.kind(), ConnectionRefused | NotFound),
            Self::Call(_) | Self::Vsock { .. } | Self::Relay(_) => false,
        }
    }

    /// A limit of the daemon's is reached.
    pub fn is_limit(&self) -> bool {
        matches!(
            self,
            Self::Call(CallError::TooMany) | Self::Relay(RelayError::TooMany)
        )
    }
}

/// A connection that was begun.
#[derive(Debug)]
pub enum Dialed {
    /// The other side has it.
    Connected(HostSocket),
    /// The other side will answer.
    Connecting(HostSocket),
    /// The other side will answer with the line `OK`.
    Calling(HostSocket),
}

/// Why a sibling of another process is not who it says that it is.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Not a guest's CID, or this guest's.
    #[error("no other guest has CID {0}")]
    Cid(Cid),
    /// The CID is that of a sibling in this process.
    #[error("the guest with CID {0} is in this process")]
    InProcess(Cid),
    /// The socket for this CID is another user's.
    #[error("CID {cid} is user {owner}'s, not user {user}'s")]
    Owner {
        /// The CID that was claimed.
        cid: Cid,
        /// Who owns the socket for it.
        owner: u32,
        /// Who claims it.
        user: u32,
    },
    /// The system does not say who it is.
    #[error("can't tell whose it is: {0}")]
    Io(#[from] io::Error),
}

/// Where the destinations of one guest lead.
#[derive(Debug)]
pub struct Routes {
    guest_cid: Cid,
    siblings: Option<Arc<Membership>>,
    sibling_dirs: Vec<PathBuf>,
    host: HostSide,
    host_ports: Vec<PortPath>,
    dialer: Dialer,
    relays: Relays,
}

impl Routes {
    /// The routes of the guest of `config`.
    pub fn new(config: &VmConfig) -> Self {
        Self {
            guest_cid: config.guest_cid,
            siblings: None,
            sibling_dirs: config.sibling_dirs.clone(),
            host: config.host.clone(),
            host_ports: config.host_ports.clone(),
            dialer: Dialer::default(),
            relays: Relays::default(),
        }
    }

    /// The guest reaches siblings in this process from now on.
    pub fn join(&mut self, siblings: Arc<Membership>) {
        self.siblings = Some(siblings);
    }

    /// Whether there is a directory of siblings of this index.
    pub fn has_sibling_dir(&self, index: usize) -> bool {
        index < self.sibling_dirs.len()
    }

    /// Connects to the destination of a guest's REQUEST, without waiting.
    pub fn dial(&mut self, request: &VsockHeader) -> Result<Dialed, DialError> {
        let (peer, packet_type) = (request.peer, request.packet_type);
        if let Some(called) = self.call_sibling(request) {
            return called.map(Dialed::Calling);
        }
        let named = if peer.cid == Cid::HOST {
            self.host_path(peer.port, packet_type)
        } else {
            None
        };
        match (named, &self.host) {
            (Some(path), _) => match self.dial_host(&path, request) {
                Ok(socket) => Ok(Dialed::Connected(socket)),
                Err(error) => Err(DialError::Connect { path, error }),
            },
            (None, HostSide::Vsock { cid, .. }) => self.forward(*cid, peer.port, packet_type),
            (None, HostSide::Unix { .. }) => Err(DialError::NoSuchCid(peer.cid)),
        }
    }

    /// Calls the sibling that a REQUEST is for, in this process before others. None if there is no such sibling. Somebody who is at
    /// its place in a directory and can't be called hides whoever is in the next: that may be another VM.
    fn call_sibling(&mut self, request: &VsockHeader) -> Option<Result<HostSocket, DialError>> {
        let (callee, packet_type) = (request.peer, request.packet_type);
        if callee.cid == self.guest_cid || Cid::try_from(callee.cid.get()).is_err() {
            return None;
        }
        let in_process = self.siblings.as_ref();
        if let Some(called) = in_process.and_then(|siblings| siblings.call(request)) {
            return Some(called.map_err(DialError::from));
        }
        let caller = PeerAddr {
            cid: self.guest_cid,
            port: PeerPort(request.guest_port.0),
        };
        for directory in &self.sibling_dirs {
            let path = sibling_path(directory, callee.cid, packet_type);
            let call = Sibling {
                path: &path,
                packet_type,
                caller,
                port: callee.port,
            };
            match call.begin(&mut self.dialer) {
                Ok(socket) => return Some(Ok(socket)),
                Err(error) => {
                    let error = DialError::Connect { path, error };
                    if !error.is_nobody() {
                        return Some(Err(error));
                    }
                }
            }
        }
        None
    }

    /// Checks that `client`, which has connected in the directory of siblings of this index, may call in the name of the guest
    /// with this CID: the one who owns that guest's socket there may, and root.
    pub fn check_claim(
        &self,
        directory: usize,
        client: &HostSocket,
        cid: Cid,
    ) -> Result<(), ClaimError> {
        if cid == self.guest_cid || Cid::try_from(cid.get()).is_err() {
            return Err(ClaimError::Cid(cid));
        }
        let in_process = self.siblings.as_ref();
        if in_process.is_some_and(|siblings| siblings.has_sibling(cid)) {
            return Err(ClaimError::InProcess(cid));
        }
        let Some(directory) = self.sibling_dirs.get(directory) else {
            return Err(ClaimError::Cid(cid));
        };
        let socket = sibling_path(directory, cid, PacketType::Stream);
        let owner = match fs::symlink_metadata(socket) {
            Ok(file) => file.uid(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let user = client.peer_uid()?;
        if (user == owner && user != NOBODY) || user == ROOT {
            Ok(())
        } else {
            Err(ClaimError::Owner { cid, owner, user })
        }
    }

    /// Begins to connect to this port of the host's AF_VSOCK.
    fn forward(
        &self,
        cid: Cid,
        port: PeerPort,
        packet_type: PacketType,
    ) -> Result<Dialed, DialError> {
        let number = u32::try_from(cid.get()).map_err(|_| DialError::NoSuchCid(cid))?;
        if packet_type == PacketType::Seqpacket {
            return Ok(Dialed::Calling(self.relays.connect(number, port)?));
        }
        let to = PeerAddr { cid, port };
        let socket = vsock::begin_connect(number, port);
        socket
            .map(Dialed::Connecting)
            .map_err(|error| DialError::Vsock { to, error })
    }

    /// The socket for what has connected from the host's AF_VSOCK.
    pub fn forwarded(&self, socket: HostSocket) -> Result<HostSocket, RelayError> {
        match socket.packet_type() {
            PacketType::Seqpacket => self.relays.accepted(socket),
            PacketType::Stream | PacketType::Unknown(_) => Ok(socket),
        }
    }

    fn dial_host(&mut self, path: &Path, request: &VsockHeader) -> io::Result<HostSocket> {
        let call = dialer::Call::of(request);
        self.dialer.connect(path, request.packet_type, Some(call))
    }

    /// Whether siblings in this process have called.
    pub fn has_calls(&self) -> bool {
        self.siblings
            .as_ref()
            .is_some_and(|siblings| siblings.has_calls())
    }

    /// The call of a sibling in this process that is to be taken next.
    pub fn next_call(&self) -> Option<Call> {
        self.siblings
            .as_ref()
            .filter(|siblings| siblings.has_calls())?
            .next_call()
    }

    /// Nothing will be dialed for a while.
    pub fn rest(&mut self) {
        self.dialer.rest();
    }

    /// Where a host program listens for the guest's connections to `port`.
    pub fn host_path(&self, port: PeerPort, packet_type: PacketType) -> Option<PathBuf> {
        let is_named = |named: &&PortPath| (named.port, named.packet_type) == (port.0, packet_type);
        let named = self.host_ports.iter().find(is_named);
        if let Some(named) = named {
            return Some(named.path.clone());
        }
        Some(with_suffix(self.host.uds_path()?, &format!("_{}", port.0)))
    }
}

/// A call of a sibling in another process.
struct Sibling<'p> {
    path: &'p Path,
    packet_type: PacketType,
    caller: PeerAddr,
    port: PeerPort,
}

impl Sibling<'_> {
    /// Connects to the sibling's socket and says who calls. The answer is to be waited for.
    fn begin(&self, dialer: &mut Dialer) -> io::Result<HostSocket> {
        let socket = dialer.connect(self.path, self.packet_type, None)?;
        let line = connect_line::sibling_request(self.port, self.caller);
        match socket.send_bytes(&[IoSlice::new(line.as_bytes())]) {
            Ok(sent) if sent == line.len() => Ok(socket),
            Ok(_) | Err(SendError::Full) => Err(io::ErrorKind::WouldBlock.into()),
            Err(SendError::Closed) => Err(io::ErrorKind::ConnectionReset.into()),
            Err(SendError::Failed(error)) => Err(error),
        }
    }
}
