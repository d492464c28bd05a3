//! The daemon as a process.
//!
//! ```text
//! server         the process: its VMs, what they share, its end
//!   vm           one VM: its sockets, its device
//!     threads    those that serve a VM, and what becomes of it when one panics
//!   handover     a new process takes the VMs over
//!   descriptors  the limit of them, and each VM's share
//!   service      the service manager: readiness and status
//!   sandbox      what the process gives up before it serves
//! log_writer     the log's way to stderr, and the VM's CID in its lines
//! ```

mod descriptors;
pub mod handover;
pub mod log_writer;
pub mod sandbox;
pub mod server;
pub mod service;
mod threads;
pub mod vm;
