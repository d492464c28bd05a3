//! What is on the host's side of a connection.

pub mod connect_line;
pub mod listener;
