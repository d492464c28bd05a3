//! What happens to a socket.

/// What an event says about a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There are bytes, or the end of the stream.
    pub readable: bool,
    /// A short receive does not mean that the socket is drained: EPOLLRDHUP or EPOLLPRI was set.
    pub until_empty: bool,
    /// There is room.
    pub writable: bool,
    /// Both directions are over.
    pub hung_up: bool,
}

impl Readiness {
    /// Room, and nothing else.
    pub(super) const WRITABLE: Self = Self {
        readable: false,
        until_empty: false,
        writable: true,
        hung_up: false,
    };
}
