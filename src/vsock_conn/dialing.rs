//! A guest's REQUEST that the peer has not answered yet.

use serde::{Deserialize, Serialize};

use crate::host::connect_line::{self, Line, Progress};
use crate::host::socket::HostSocket;

/// What a guest's REQUEST waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialing {
    /// The end of a connect(2) that has not waited.
    Connect,
    /// The answer to our CONNECT line.
    Answer(Line),
}

/// What the peer has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    None,
    Accepted,
    Refused,
}

impl Dialing {
    /// Looks whether the peer behind `socket` has answered.
    pub(super) fn poll(&mut self, socket: &HostSocket) -> Answer {
        match self {
            Self::Connect => match socket.connect_result() {
                None => Answer::None,
                Some(Ok(())) => Answer::Accepted,
                Some(Err(_)) => Answer::Refused,
            },
            Self::Answer(line) => match connect_line::read(socket, line) {
                Progress::Incomplete => Answer::None,
                Progress::Complete { .. } => Answer::Accepted,
                Progress::Invalid => Answer::Refused,
            },
        }
    }
}
