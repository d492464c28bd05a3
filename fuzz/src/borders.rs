//! Where the messages in a stream of bytes end.

/// The messages of one direction of a connection, beside the [`Stream`](super::stream::Stream) of their bytes.
#[derive(Debug, Default)]
pub struct Borders {
    /// Behind how many bytes of the stream each message ends, in order.
    ends: Vec<u32>,
    /// How many messages have arrived.
    arrived: usize,
}

impl Borders {
    /// The message that has begun last ends here. One of no bytes is none.
    pub fn end(&mut self, sent: u32) {
        if self.unfinished(sent) > 0 {
            self.ends.push(sent);
        }
    }

    /// How many of these bytes belong to a message that has no end yet.
    pub fn unfinished(&self, sent: u32) -> u32 {
        sent - self.ends.last().copied().unwrap_or(0)
    }

    /// How long the message is that has not arrived, or not all of it.
    pub fn next_message(&self) -> Option<u32> {
        let start = self
            .arrived
            .checked_sub(1)
            .map_or(0, |last| self.ends[last]);
        Some(self.ends.get(self.arrived)? - start)
    }

    /// Bytes have arrived up to here, as a whole message.
    pub fn check_whole(&mut self, received: u32) {
        assert_eq!(self.ends.get(self.arrived), Some(&received), "{self:?}");
        self.arrived += 1;
    }

    /// Bytes have arrived up to here, as a part of a message, which is the last one or not.
    pub fn check_part(&mut self, received: u32, is_last: bool) {
        let end = self.ends.get(self.arrived);
        assert!(end.is_some_and(|end| received <= *end), "{self:?}");
        assert_eq!(end == Some(&received), is_last, "{self:?}");
        self.arrived += usize::from(is_last);
    }

    /// Whether so many of the bytes that were sent may have left a buffer: whole messages do, and one that was dropped since
    /// its end will not come.
    pub fn may_have_left(&self, count: u32, sent: u32, has_end: bool) -> bool {
        let is_border = |count| count == 0 || self.ends.binary_search(&count).is_ok();
        let dropped = if has_end { self.unfinished(sent) } else { 0 };
        is_border(count) || count.checked_sub(dropped).is_some_and(is_border)
    }

    /// Whether every whole message has arrived.
    pub fn is_complete(&self) -> bool {
        self.arrived == self.ends.len()
    }
}
