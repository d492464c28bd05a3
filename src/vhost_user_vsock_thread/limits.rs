//! What bounds a turn. Whatever a guest offers, the VMM's messages must not wait long.

/// How many rounds a turn has at most.
pub(super) const MAX_ROUNDS: usize = 16;
/// How many packets, and about how many bytes and descriptors, a round takes from the guest.
pub(super) const MAX_TX_PACKETS: usize = 256;
pub(super) const MAX_TX_BYTES: usize = 256 * 1024;
pub(super) const MAX_TX_DESCRIPTORS: usize = 2048;
/// How often a round serves a connection, or a reset, that has something for the guest.
pub(super) const MAX_RX_BATCHES: usize = 32;
/// About how many descriptors a round takes from the RX ring.
pub(super) const MAX_RX_DESCRIPTORS: usize = 8192;
/// How many bytes the guest is given before it is interrupted, so that it takes them while more are on the way.
pub(super) const MAX_QUIET_BYTES: usize = 64 * 1024;
/// How many clients a round accepts.
pub(super) const MAX_ACCEPTS: usize = 64;
