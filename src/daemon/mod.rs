//! The daemon as a process.

pub mod log_writer;
pub mod relay;
pub mod sandbox;
pub mod server;
pub mod service;
