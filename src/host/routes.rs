//! Where a guest's connection leads: the host program, or the peer, that a destination stands for.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::dialer::{Call, Dialer};
use super::socket::HostSocket;
use super::vsock;
use crate::config::{HostSide, PortPath, VmConfig, with_suffix};
use crate::packet::header::{Cid, PacketType, PeerAddr, PeerPort, VsockHeader};

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
    Connecting(HostSocket),
}

/// Where the destinations of one guest lead.
#[derive(Debug)]
pub struct Routes {
    host: HostSide,
    host_ports: Vec<PortPath>,
    dialer: Dialer,
}

impl Routes {
    /// The routes of the guest of `config`.
    pub fn new(config: &VmConfig) -> Self {
        Self {
            host: config.host.clone(),
            host_ports: config.host_ports.clone(),
            dialer: Dialer::default(),
        }
    }

    /// Connects to the destination of a guest's REQUEST, without waiting.
    pub fn dial(&mut self, request: &VsockHeader) -> Result<Dialed, DialError> {
        let (peer, packet_type) = (request.peer, request.packet_type);
        let named = if peer.cid == Cid::HOST {
            self.host_path(peer.port, packet_type)
        } else {
            None
        };
        match (named, &self.host) {
            (Some(path), _) => match self.dialer.connect(&path, packet_type, Some(Call::of(request))) {
                Ok(socket) => Ok(Dialed::Connected(socket)),
                Err(error) => Err(DialError::Connect { path, error }),
            },
            (None, HostSide::Vsock { cid, .. }) => forward(*cid, peer.port, packet_type),
            (None, HostSide::Unix { .. }) => Err(DialError::NoSuchCid(peer.cid)),
        }
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

/// Begins to connect to this port of the host's AF_VSOCK.
fn forward(cid: Cid, port: PeerPort, packet_type: PacketType) -> Result<Dialed, DialError> {
    let failed = |error| DialError::Vsock {
        to: PeerAddr { cid, port },
        error,
    };
    let number = u32::try_from(cid.get()).map_err(|_| DialError::NoSuchCid(cid))?;
    let socket = vsock::begin_connect(number, port, packet_type).map_err(failed)?;
    Ok(Dialed::Connecting(socket))
}
