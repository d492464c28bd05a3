//! Why a run has no results.

use std::io::{self, ErrorKind};

/// Why a run has no results.
#[derive(Debug)]
pub enum Failure {
    /// The daemon does not have what the case is about.
    Unsupported(String),
    /// The daemon has it, and failed.
    Failed(String),
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let why = error.to_string();
        if error.kind() == ErrorKind::Unsupported {
            Self::Unsupported(why)
        } else {
            Self::Failed(why)
        }
    }
}
