//! A simulated guest: a vhost-user frontend and virtio split rings in shared memory, written from the
//! specifications alone (vhost-user; virtio 1.2 §2.7 and §5.10). It shares no code with the daemon.

// Not every test file uses every name.
#![allow(unused_imports)]

pub mod guest;
pub mod host;
pub mod memory;
pub mod packet;
pub mod ring;
pub mod setup;
pub mod stack;
pub mod survivor;
pub mod vhost_user;

pub use guest::SimGuest;

pub use packet::{Flow, Op, Packet};
pub use setup::{HeaderPlace, Setup, TxLayout};
pub use stack::{GuestStack, GuestStream};
pub use survivor::{Dice, Survivor};
