//! `vhost-user-vsock`: a virtio-vsock device for one virtual machine, as a vhost-user daemon.
//!
//! A VMM connects to the daemon's vhost-user socket and shares the guest's memory with it. A connection of the guest's to
//! the host becomes a Unix stream socket to a host program, and the other way round.
//!
//! # Which file owns what
//!
//! Names are the specifications'. A file knows those below it and not those above, with two exceptions: the table of
//! connections connects as `listener` does, and the device reports to `service`.
//!
//! ```text
//! main                      logging, signals, exit code              log_writer: the log's way to stderr
//!   server                  the sockets, one VMM after the other     listener: a socket and its file
//!     sandbox               what the daemon gives up before it serves    service: what the service manager is told
//!     vhu_vsock             the device as the vhost-user library sees it vring: the library's rings, mended
//!       vhost_user_vsock_thread   the worker: rings, epoll, timer        look: whether to look before sleep
//!         thread_backend    the table of connections, resets, limits     handshake: the CONNECT line
//!           vsock_conn      one connection: states, both directions      credit, txbuf, rxqueue, rxops
//!             packet        packets in guest memory; all unsafe code     header: the 44 bytes and their names
//! cli, config               what the daemon is told, and the mistakes in it
//! relay                     the way of a VMM whose connection was inherited to the library
//! stats                     what is counted, and what there is to tell of a connection
//! stats_socket              tells it, as the text that metrics makes of it; stats_table shows that to a person
//! calls                     how a file lists the system calls that it makes
//! ```
//!
//! # How a byte travels
//!
//! *From the guest.* The driver puts a packet into the TX ring and kicks. The worker takes a batch of chains off the ring
//! and [`packet`] makes headers and slices of guest memory of them. [`thread_backend`] gives consecutive packets of one
//! connection to [`vsock_conn`], which sends them with one `sendmsg`, straight out of guest memory. What the host program
//! does not take goes to [`txbuf`]. Then the worker returns the chains and interrupts the guest, once.
//!
//! *To the guest.* The socket becomes readable, its connection joins the queue of those that owe the guest something. The
//! worker takes as many buffers off the RX ring as that connection may fill now, `readv` fills them all at once, each
//! gets its header, the filled ones are returned, and the others go back to the ring.

// Nothing that a guest, a host program or a VMM sends may end the daemon.
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

pub mod cli;
pub mod config;
pub mod daemon;
pub mod host;
pub mod metrics;
pub mod packet;
pub mod rxops;
pub mod rxqueue;
pub mod syscalls;
#[cfg(test)]
mod testing;
pub mod thread_backend;
pub mod txbuf;
pub mod vhost_user_vsock_thread;
pub mod vhu_vsock;
pub mod vsock_conn;
