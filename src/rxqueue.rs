//! The operations that a connection has pending for its guest.

use serde::{Deserialize, Serialize};

use crate::rxops::RxOps;

/// A set of [`RxOps`], which leave it in the order of [`RxOps::IN_ORDER`]. An operation that is added twice is sent once:
/// its packet is made from the connection's state at the time it is sent. In a document it is the list of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<RxOps>", into = "Vec<RxOps>")]
pub struct RxQueue(u8);

impl RxQueue {
    /// Adds an operation.
    pub fn add(&mut self, op: RxOps) {
        self.0 |= op.bit();
    }

    /// Removes an operation.
    pub fn remove(&mut self, op: RxOps) {
        self.0 &= !op.bit();
    }

    /// Removes all operations.
    pub fn clear(&mut self) {
        self.0 = 0;
    }

    /// The operation that is sent next.
    pub fn peek(&self) -> Option<RxOps> {
        RxOps::IN_ORDER
            .into_iter()
            .find(|op| self.0 & op.bit() != 0)
    }
}

impl From<Vec<RxOps>> for RxQueue {
    fn from(ops: Vec<RxOps>) -> Self {
        let mut queue = Self::default();
        ops.into_iter().for_each(|op| queue.add(op));
        queue
    }
}

impl From<RxQueue> for Vec<RxOps> {
    fn from(queue: RxQueue) -> Self {
        let is_in = |op: &RxOps| queue.0 & op.bit() != 0;
        RxOps::IN_ORDER.into_iter().filter(is_in).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_leave_in_their_order() {
        let mut queue = RxQueue::default();
        for op in RxOps::IN_ORDER.into_iter().rev() {
            queue.add(op);
            queue.add(op);
        }
        for op in RxOps::IN_ORDER {
            assert_eq!(queue.peek(), Some(op));
            queue.remove(op);
        }
        assert_eq!(queue.peek(), None);
    }
}
