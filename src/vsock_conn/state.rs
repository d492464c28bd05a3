//! The states of a connection.

use serde::{Deserialize, Serialize};

use super::dialing::Dialing;

/// Where a connection is in its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// The guest's REQUEST waits for the peer.
    Dialing(Box<Dialing>),
    /// Our REQUEST waits for the guest's answer.
    Requested,
    /// Bytes flow.
    Established,
    /// The guest has closed; bytes of its still wait for the host program.
    Flushing,
    /// The host program has closed, and the guest was sent SHUTDOWN for both directions.
    Closing,
}

impl State {
    /// Its name in statistics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Dialing(_) => "dialing",
            Self::Requested => "connecting",
            Self::Established => "established",
            Self::Flushing => "flushing",
            Self::Closing => "finishing",
        }
    }
}
