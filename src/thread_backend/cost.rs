//! What work costs, so that those who want some can share it fairly.
//!
//! A unit is about the time in which one byte is copied, so that a payload costs its length. The other numbers are measured, and
//! rounded: they need to be right within a factor of two.

/// To read or write a packet and its entry in a ring.
pub const PACKET: usize = 512;
/// To read a descriptor.
pub const DESCRIPTOR: usize = 128;
/// To move bytes through a socket, however many.
pub const TRANSFER: usize = 2 * 1024;
/// To connect to a host program, or to find that nobody listens.
pub const DIAL: usize = 8 * 1024;
/// To accept a client.
pub const ACCEPT: usize = 32 * 1024;
/// To read on at a client's CONNECT line, and to open its connection.
pub const CONNECT_LINE: usize = 16 * 1024;
