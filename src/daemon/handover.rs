//! How a VM goes from one daemon to the next.

pub(super) mod kept;
