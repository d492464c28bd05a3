//! When the guest may hear that a program does no more.

use vhost_user_vsock::packet::header::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Who has ended what, as flags of SHUTDOWN, before one is told to the guest.
pub struct Ended {
    pub by_guest: u32,
    pub by_program: u32,
    pub told: u32,
}

impl Ended {
    /// Checks that `flags` tell of what the program has done, of something new, and of the end of its bytes no earlier
    /// than behind the last.
    pub fn check(&self, flags: u32, has_all_bytes: bool) {
        // A direction that the guest has ended needs no end by the program: with the other one, the socket is over.
        let mut may = self.by_program;
        if self.by_program & self.by_guest & SHUTDOWN_RECEIVE != 0 {
            may |= SHUTDOWN_SEND;
        }
        if self.by_program & self.by_guest & SHUTDOWN_SEND != 0 {
            may |= SHUTDOWN_RECEIVE;
        }
        assert_eq!(flags & !may, 0, "the program still does that");
        assert!(flags != self.told && flags & self.told == self.told);
        if flags & SHUTDOWN_SEND != 0 && self.by_guest & SHUTDOWN_RECEIVE == 0 {
            assert!(has_all_bytes, "the end came before the last byte");
        }
    }
}
