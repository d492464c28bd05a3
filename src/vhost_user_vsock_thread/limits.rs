//! What bounds a turn. Whatever a guest offers, the VMM's messages must not wait long.

use crate::thread_backend::MAX_BATCH;

/// How many rounds a turn has at most.
pub(super) const MAX_ROUNDS: usize = 16;
/// How much a round does, in units of cost; then it looks for new events. It ends with the first step that exceeds this.
pub(super) const MAX_ROUND_COST: usize = 1024 * 1024;
/// How often a round takes as many events as one call brings: sockets that have waited should all be in line before the first of
/// them is served.
pub(super) const MAX_POLLS: usize = 8;
/// How many packets, and about how many bytes and descriptors, a step takes from the guest.
pub(super) const MAX_TX_PACKETS: usize = MAX_BATCH;
pub(super) const MAX_TX_BYTES: usize = 256 * 1024;
pub(super) const MAX_TX_DESCRIPTORS: usize = 2048;
/// About how many descriptors a step takes from the RX ring, those of rejected buffers included.
pub(super) const MAX_RX_DESCRIPTORS: usize = 2048;
/// How many buffers that can take no packet a step gives back.
pub(super) const MAX_REJECTED: usize = 256;
/// How many resets a step gives the guest.
pub(super) const MAX_RESETS: usize = 32;
/// How many bytes the guest is given before it is interrupted, so that it takes them while more are on the way.
pub(super) const MAX_QUIET_BYTES: usize = 64 * 1024;
/// How much may be done, in units of cost, before the guest is interrupted for what it was given.
pub(super) const MAX_QUIET_COST: usize = 64 * 1024;
