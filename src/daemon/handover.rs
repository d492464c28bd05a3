//! How a VM goes from one daemon to the next.

pub(super) mod crash;
pub(super) mod kept;
