//! A virtio-vsock device for virtual machines, as a vhost-user daemon.
//!
//! A VMM connects to a Unix socket of the daemon's and shares its guest's memory with it (vhost-user). A program in the guest
//! then reaches host programs over AF_VSOCK, and host programs reach it over plain Unix sockets. There is no kernel module and
//! no privilege on the host.
//!
//! # Embedding
//!
//! [`VmConfig`] describes a VM, and [`Vm::start`] serves it until it is dropped:
//!
//! ```no_run
//! use vhost_user_vsock::{Cid, Vm, VmConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = VmConfig::new(Cid::try_from(4u32)?, "/tmp/vhost4.socket", "/tmp/vm4.vsock");
//! let vm = Vm::start(&config)?;
//! std::thread::park();
//! vm.stop();
//! # Ok(())
//! # }
//! ```
//!
//! Everything else is for the binary, and may change with any version.
//!
//! # Which file owns what
//!
//! Names are the specifications'. A file knows those below it and none above.
//!
//! ```text
//! main, cli                      arguments, signals, exit code
//! commands/                      connect, list and stats: clients, which know metrics/ and host/connect_line
//! config (+ config/)             what a process and its VMs are told to do: options, a file of them, what can be wrong
//! daemon/                        server (a process), vm (one VM), handover (from one process to the next), threads, descriptors,
//!                                service, sandbox, log_writer
//! vhu_vsock                      the device, and a VMM's session (+ channel, message, session, memory, state, saved)
//! vhost_user_vsock_thread        the worker: epoll, rings, timer   (+ acceptor, busy_poll, epoll, saved, one file for each ring)
//! thread_backend                 the table of connections          (+ one file for each concern of it)
//! vsock_conn                     one connection: its states        (+ credit, shutdown, and a mover for each type)
//! rxqueue, rxops, txbuf          what is pending for the guest, and bytes that wait for the host
//! host/                          the host's side: sockets, listeners, the CONNECT line, routes, siblings
//! metrics/                       counters, and the texts that show them
//! packet (+ header, chain, iov)  packets in guest memory; iov is the only unsafe code
//! saved                          what goes from one process to the next: a document, bytes and descriptors
//! memory                         how it goes back to the system
//! log_limit, log_vm              how often a line is logged, and which VM it is about
//! syscalls                       how a file lists the system calls that it makes
//! ```
//!
//! # How a byte travels
//!
//! *From the guest.* The driver puts a packet into the TX ring and kicks. The worker takes a batch of chains off the ring,
//! and `packet` makes headers and slices of guest memory of them. `thread_backend` gives consecutive packets of one
//! connection to `vsock_conn`, which sends them with one `sendmsg`, straight from guest memory. What the host program does
//! not take goes to `txbuf`. Then the worker returns the chains and interrupts the guest, once.
//!
//! *To the guest.* The socket becomes readable, and its connection joins the queue of those with something pending. The
//! worker takes as many buffers off the RX ring as that connection may fill now, one `recvmsg` fills them, each gets its
//! header, the filled ones are returned, and the others go back to the ring.

// Nothing that a guest, a host program or a VMM sends may end the daemon.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg_attr(feature = "fuzzing", warn(unreachable_pub))]

/// Declares the modules that are not for embedders. The fuzz targets see them with the feature `fuzzing`.
macro_rules! internal {
    ($($module:ident)*) => {
        $(
            #[cfg(feature = "fuzzing")]
            #[doc(hidden)]
            pub mod $module;
            #[cfg(not(feature = "fuzzing"))]
            mod $module;
        )*
    };
}

internal! {
    host
    log_limit
    log_vm
    memory
    packet
    rxops
    rxqueue
    saved
    syscalls
    thread_backend
    txbuf
    vhost_user_vsock_thread
    vhu_vsock
    vsock_conn
}

// For the binary and for what is built from its command line.
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod commands;
#[doc(hidden)]
pub mod config;
#[doc(hidden)]
pub mod daemon;
#[doc(hidden)]
pub mod metrics;
#[cfg(test)]
mod testing;

pub use config::{ConfigError, Socket, SocketAccess, SocketGroup, SocketMode, VmConfig};
pub use daemon::vm::{Vm, VmError};
pub use packet::header::{Cid, InvalidCid};
