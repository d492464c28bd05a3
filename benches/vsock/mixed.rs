//! Guest programs side by side: one that echoes, and streams in both directions.

use std::collections::HashMap;
use std::sync::Arc;

use crate::apps::{Echo, Sender};
use crate::conns::ConnId;
use crate::guest::{App, DISCARD_PORT, Event, Guest};
use crate::host::HOST_PORT;
use crate::pattern::Checker;
use crate::shared::Shared;

/// A program that echoes what comes to `GUEST_PORT`, streams to the host's `HOST_PORT`, and streams from the host to
/// `DISCARD_PORT`.
pub struct Mixed {
    shared: Arc<Shared>,
    echo: Echo,
    senders: Vec<Sender>,
    write: usize,
    checkers: HashMap<ConnId, Checker>,
}

impl Mixed {
    /// So many streams to the host. All streams are written `write` bytes at a time.
    pub fn new(shared: Arc<Shared>, streams_out: usize, write: usize) -> Self {
        let senders = (0..streams_out).map(|_| Sender::new(HOST_PORT, write));
        Self {
            shared,
            echo: Echo::default(),
            senders: senders.collect(),
            write,
            checkers: HashMap::new(),
        }
    }
}

impl App for Mixed {
    fn event(&mut self, guest: &mut Guest, conn: ConnId, event: Event<'_>) -> Result<(), String> {
        if let Event::Accepted { port: DISCARD_PORT } = event {
            self.checkers.insert(conn, Checker::new(self.write));
            return Ok(());
        }
        let stream_out = self.senders.iter().any(|sender| sender.has(conn));
        match (event, self.checkers.get_mut(&conn)) {
            (Event::Read(bytes), Some(checker)) => {
                self.shared.add_to_guest(bytes.len());
                checker.check(bytes)
            }
            (Event::Ended, checker) if stream_out || checker.is_some() => {
                Err("a stream ended".into())
            }
            (event, _) => self.echo.event(guest, conn, event),
        }
    }

    fn run(&mut self, guest: &mut Guest) -> Result<(), String> {
        self.echo.run(guest)?;
        // The first one finds most room in the ring.
        if self.senders.len() > 1 {
            self.senders.rotate_left(1);
        }
        for sender in &mut self.senders {
            sender.run(guest);
        }
        Ok(())
    }
}
