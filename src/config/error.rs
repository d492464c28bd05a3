//! The mistakes that a configuration can have.

use std::os::fd::RawFd;

use thiserror::Error;

use super::Sandbox;
use super::check::{MAX_BUSY_POLL, MAX_QUEUE_SIZE, MAX_TX_BUFFER, MAX_WAIT_FOR_GUEST, PORT_ANY};
use super::options::OptionError;
use super::paths::PathError;
use crate::packet::header::{Cid, InvalidCid};

/// A mistake in a configuration. Each message says which option is wrong and what to do about it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The CID can't be that of a guest.
    #[error("--guest-cid={number}: {0}", number = .0.0)]
    Cid(#[from] InvalidCid),
    /// A socket for messages, where there are none.
    #[error("--seqpacket=off: a port with `,seqpacket` takes --seqpacket=on")]
    SeqpacketOff,
    /// Two VMs have the same CID.
    #[error("--guest-cid={0}: another VM has this CID, each needs its own")]
    DuplicateCid(Cid),
    /// The path of a socket is wrong.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The buffer is too small or too large.
    #[error("--tx-buffer-size={0}: a buffer has from 1 to {MAX_TX_BUFFER} bytes")]
    TxBufferSize(u32),
    /// A ring can't have this size (virtio 1.2, 2.7).
    #[error("--queue-size={0}: a ring has a power of two from 2 to {MAX_QUEUE_SIZE} entries")]
    QueueSize(u64),
    /// No connection would be possible.
    #[error("--max-connections=0: at least one connection must be possible")]
    MaxConnections,
    /// The busy poll is too long. The number is in microseconds.
    #[error("--busy-poll={0}: poll for at most {max} microseconds", max = MAX_BUSY_POLL.as_micros())]
    BusyPoll(u128),
    /// The name is not that of a [`Sandbox`].
    #[error("it is one of {}", Sandbox::NAMES.join(", "))]
    Sandbox,
    /// A VM lacks an option that it needs.
    #[error("{0}= is missing")]
    Missing(&'static str),
    /// Two options exclude each other.
    #[error("--{0} and --{1} exclude each other, leave one out")]
    Conflict(&'static str, &'static str),
    /// Ports of AF_VSOCK are given, and AF_VSOCK is not in use.
    #[error("--forward-listen: it goes with --forward-cid, which takes the place of --uds-path")]
    ForwardListenAlone,
    /// The CID is not one that connections can be forwarded to.
    #[error("--forward-cid={0}: it is 1 (this host), 2 (the host of this VM) or a guest's CID")]
    ForwardCid(Cid),
    /// The connections would be forwarded to a guest of this process.
    #[error("--forward-cid={0}: a guest of this process has this CID, it is reached with --groups")]
    ForwardToGuest(Cid),
    /// No program can listen on the port (VMADDR_PORT_ANY).
    #[error("--{option}: {port} is no port, the highest is {max}", max = PORT_ANY - 1)]
    Port {
        /// The option.
        option: &'static str,
        /// The port.
        port: u32,
    },
    /// A port has two sockets.
    #[error("--{option}: port {port} is given twice")]
    DuplicatePort {
        /// The option.
        option: &'static str,
        /// The port.
        port: u32,
    },
    /// Two sockets are the same descriptor.
    #[error("--fd={0}: another socket is this descriptor, each needs its own")]
    DuplicateFd(RawFd),
    /// Two names in a list of groups have nothing between them.
    #[error("--groups: the name of a group is empty")]
    GroupName,
    /// The wait is too long. The number is in seconds.
    #[error("--wait-for-guest={0}: wait for at most {max} seconds", max = MAX_WAIT_FOR_GUEST.as_secs())]
    WaitForGuest(u64),
    /// A key or a value is wrong.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// There is no VM to serve.
    #[error("no VM is given: say --guest-cid, --socket and --uds-path, or --vm, or --config")]
    NoVm,
    /// The configuration file can't be read, or is not what it should be. The text has the place.
    #[error("{0}")]
    File(String),
    /// A mistake in one of several VMs, or in a file.
    #[error("{place}: {error}")]
    At {
        /// Which VM, or the place in the file.
        place: String,
        /// The mistake.
        error: Box<ConfigError>,
    },
    /// The sockets of the service manager (`LISTEN_FDS`) are not the ones that the daemon can use.
    #[error("the sockets of the service manager: {0}")]
    Activation(String),
}

impl ConfigError {
    /// The name of the option that is wrong, where only one can be.
    pub(crate) fn option(&self) -> Option<&'static str> {
        match self {
            Self::Cid(_) => Some("guest-cid"),
            Self::Conflict(option, _) => Some(option),
            Self::ForwardListenAlone => Some("forward-listen"),
            Self::GroupName => Some("groups"),
            Self::QueueSize(_) => Some("queue-size"),
            _ => None,
        }
    }
}
