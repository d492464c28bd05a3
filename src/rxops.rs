//! The operations that a connection sends to its guest.

use serde::{Deserialize, Serialize};

/// An operation that a connection has pending for its guest. RST is not among them: the connection that it ends is gone by
/// then, so resets wait in a queue of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum RxOps {
    /// Ask for a connection.
    Request = 0,
    /// Accept a connection.
    Response = 1,
    /// Say how much the guest may send.
    CreditUpdate = 2,
    /// Carry bytes from the host program.
    Rw = 3,
    /// Ask the guest how much it can take.
    CreditRequest = 4,
    /// Say that one direction or both are over.
    Shutdown = 5,
}

impl RxOps {
    /// All of them, in the order in which they are sent: SHUTDOWN comes last, so that no byte is behind it.
    pub const IN_ORDER: [Self; 6] = [
        Self::Request,
        Self::Response,
        Self::CreditUpdate,
        Self::Rw,
        Self::CreditRequest,
        Self::Shutdown,
    ];

    /// Its bit in a set.
    pub fn bit(self) -> u8 {
        1 << self as u8
    }
}
