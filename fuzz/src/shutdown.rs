//! What a SHUTDOWN may say.

use vhost_user_vsock::packet::header::{ShutdownFlags, VsockHeader};

/// What each end of a connection will no longer do, before a SHUTDOWN goes to the guest.
pub struct Ended {
    /// The guest, as it has said.
    pub by_guest: ShutdownFlags,
    /// The host program.
    pub by_program: ShutdownFlags,
    /// What of the host program's the guest knows.
    pub sent: ShutdownFlags,
}

impl Ended {
    /// Checks a SHUTDOWN, and returns its flags: they say what the program has done, something new is among them, and the end
    /// of its bytes is not before the last byte.
    pub fn check(&self, header: &VsockHeader, has_all_bytes: bool) -> ShutdownFlags {
        let flags = header.shutdown_flags();
        assert_eq!(flags.bits(), header.flags, "no other bits are set");
        let mut allowed = self.by_program;
        // A direction that the guest has ended needs no end by the program: with the other one, the socket is over.
        let both = self.by_program & self.by_guest;
        if both.contains(ShutdownFlags::RECEIVE) {
            allowed |= ShutdownFlags::SEND;
        }
        if both.contains(ShutdownFlags::SEND) {
            allowed |= ShutdownFlags::RECEIVE;
        }
        assert!(allowed.contains(flags), "the program has not ended that");
        assert!(flags != self.sent && flags.contains(self.sent));
        if flags.contains(ShutdownFlags::SEND) && !self.by_guest.contains(ShutdownFlags::RECEIVE) {
            assert!(has_all_bytes, "the end is before the last byte");
        }
        flags
    }
}
