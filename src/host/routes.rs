//! Where a guest's connection leads: the host program, or the peer, that a destination stands for.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use thiserror::Error;

use super::socket::HostSocket;
use crate::config::{HostSide, PortPath, VmConfig};
use crate::packet::header::{Cid, PacketType, PeerAddr, PeerPort};

/// Why a destination can't be reached.
#[derive(Debug, Error)]
pub enum DialError {
    /// Nothing is behind this CID.
    #[error("CID {0} can't be reached")]
    NoSuchCid(Cid),
    /// Connections of this type are not offered.
    #[error("no connections of type {0:?}")]
    Type(PacketType),
    /// Nobody listens, the backlog is full, or the system refused.
    #[error("{}: {error}", .path.display())]
    Connect {
        /// Where the host program would listen.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl DialError {
    /// Nobody listens, and asking again at once would bring the same answer.
    pub fn is_nobody(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(self, Self::Connect { error, .. } if matches!(error.kind(), ConnectionRefused | NotFound))
    }
}

/// A connection that was begun.
#[derive(Debug)]
pub enum Dialed {
    /// The other side has it.
    Connected(HostSocket),
    /// The other side will answer.
    #[cfg_attr(
        not(feature = "fuzzing"),
        expect(dead_code, reason = "for routes over AF_VSOCK")
    )]
    Connecting(HostSocket),
}

/// Where the destinations of one guest lead.
#[derive(Debug)]
pub struct Routes {
    host: HostSide,
    host_ports: Vec<PortPath>,
    /// A socket that could not be connected.
    spare: Option<OwnedFd>,
}

impl Routes {
    /// The routes of the guest of `config`.
    pub fn new(config: &VmConfig) -> Self {
        Self {
            host: config.host.clone(),
            host_ports: config.host_ports.clone(),
            spare: None,
        }
    }

    /// Connects to the destination `peer`, without waiting.
    pub fn dial(&mut self, peer: PeerAddr, packet_type: PacketType) -> Result<Dialed, DialError> {
        if packet_type != PacketType::Stream {
            return Err(DialError::Type(packet_type));
        }
        if peer.cid != Cid::HOST {
            return Err(DialError::NoSuchCid(peer.cid));
        }
        let path = self.host_path(peer.port).ok_or(DialError::NoSuchCid(peer.cid))?;
        match HostSocket::connect(&path, &mut self.spare) {
            Ok(socket) => Ok(Dialed::Connected(socket)),
            Err(error) => Err(DialError::Connect { path, error }),
        }
    }

    /// Nothing will be dialed for a while.
    pub fn rest(&mut self) {
        self.spare = None;
    }

    /// Where a host program listens for the guest's connections to `port`.
    pub fn host_path(&self, port: PeerPort) -> Option<PathBuf> {
        let named = self.host_ports.iter().find(|named| named.port == port.0);
        if let Some(named) = named {
            return Some(named.path.clone());
        }
        let mut path = self.host.uds_path()?.as_os_str().to_owned();
        path.push(format!("_{}", port.0));
        Some(path.into())
    }
}
