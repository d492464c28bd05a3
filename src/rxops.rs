//! What a connection may owe its guest.

/// An operation that a connection owes the guest. There is no RST among them: the connection that owed it is gone, so
/// its reset waits with the other resets, which go before any connection's operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RxOps {
    /// Ask for a connection.
    Request = 0,
    /// Accept a connection.
    Response = 1,
    /// Tell the guest how much it may send.
    CreditUpdate = 2,
    /// Carry bytes from the host program.
    Rw = 3,
    /// Ask the guest how much it can take.
    CreditRequest = 4,
    /// Say that one direction or both are over: last, so that no byte comes behind it.
    Shutdown = 5,
}

impl RxOps {
    /// All of them, in the order in which they go out.
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
