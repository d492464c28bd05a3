//! When connections are to be reset.

use std::collections::BTreeSet;
use std::time::Instant;

use super::event_source::Token;

/// The deadlines of those connections that have one.
#[derive(Debug, Default)]
pub(super) struct Deadlines(BTreeSet<(Instant, Token)>);

impl Deadlines {
    /// Replaces a connection's deadline.
    pub(super) fn replace(&mut self, token: Token, old: Option<Instant>, new: Option<Instant>) {
        if old != new {
            self.remove(token, old);
            self.0.extend(new.map(|new| (new, token)));
        }
    }

    pub(super) fn remove(&mut self, token: Token, deadline: Option<Instant>) {
        if let Some(deadline) = deadline {
            self.0.remove(&(deadline, token));
        }
    }

    /// The earliest one.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.first().map(|(deadline, _)| *deadline)
    }

    /// A connection whose deadline has passed.
    pub(super) fn expired(&self, now: Instant) -> Option<Token> {
        let (deadline, token) = self.0.first()?;
        (*deadline <= now).then_some(*token)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
