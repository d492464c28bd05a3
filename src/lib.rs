//! The library.
pub mod config;
pub mod credit;
pub mod handshake;
pub mod header;
pub mod listener;
pub mod look;
pub mod packet;
pub mod rxops;
pub mod rxqueue;
pub mod server;
#[cfg(test)]
mod testing;
pub mod thread_backend;
pub mod txbuf;
pub mod vhost_user_vsock_thread;
pub mod vhu_vsock;
pub mod vring;
pub mod vsock_conn;
