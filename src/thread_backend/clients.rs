//! Host programs and siblings that have connected and not said yet which port they want.

use std::time::{Duration, Instant};

use super::event_source::Token;
use super::slot_list::SlotList;
use super::slots::Slots;
use crate::host::connect_line::{self, Line, Progress};
use crate::host::socket::HostSocket;
use crate::packet::header::PeerAddr;

/// How long a host program has to write its CONNECT line. A person may type it by hand.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A client and its line as far as it has come.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: HostSocket,
    line: Line,
    deadline: Instant,
    /// In which directory of siblings it has connected, if it is one.
    pub(super) sibling_dir: Option<usize>,
}

impl Client {
    pub(super) fn new(socket: HostSocket) -> Self {
        Self {
            socket,
            line: Line::request(),
            deadline: Instant::now() + HANDSHAKE_TIMEOUT,
            sibling_dir: None,
        }
    }

    /// One that has connected in the directory of siblings of this index.
    pub(super) fn sibling(socket: HostSocket, directory: usize) -> Self {
        Self {
            line: Line::sibling_request(),
            sibling_dir: Some(directory),
            ..Self::new(socket)
        }
    }

    /// Who calls, as a sibling's line that is complete says.
    pub(super) fn caller(&self) -> PeerAddr {
        self.line.caller()
    }

    /// Reads on at its line.
    pub(super) fn read_line(&mut self) -> Progress {
        connect_line::read(&self.socket, &mut self.line)
    }
}

/// The clients, oldest first.
#[derive(Debug)]
pub(super) struct Clients {
    /// How many there may be. One more evicts the oldest.
    max: usize,
    slots: Slots<Client>,
    /// Oldest first, and so by deadline too.
    order: SlotList,
    /// The siblings among them, oldest first.
    siblings: SlotList,
    /// Those that have written something, in the order in which they are served.
    ready: SlotList,
}

impl Clients {
    pub(super) fn new(max: usize) -> Self {
        Self {
            max,
            slots: Slots::default(),
            order: SlotList::default(),
            ready: SlotList::default(),
            siblings: SlotList::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The client that is to give way to this new one, if there are too many. Of four places, siblings may have one: most are
    /// kept for host programs.
    pub(super) fn surplus(&self, new: &Client) -> Option<Token> {
        if new.sibling_dir.is_some() && self.siblings.len() >= (self.max / 4).max(1) {
            return self.slots.token(self.siblings.first()?);
        }
        self.oldest().filter(|_| self.len() >= self.max)
    }

    /// Adds the client that `make` returns for its token.
    pub(super) fn try_insert<E>(
        &mut self,
        make: impl FnOnce(Token) -> Result<Client, E>,
    ) -> Result<Token, E> {
        let token = self.slots.try_insert(make)?;
        self.order.push(token.slot);
        let client = self.slots.get(token);
        if client.is_some_and(|client| client.sibling_dir.is_some()) {
            self.siblings.push(token.slot);
        }
        Ok(token)
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut Client> {
        self.slots.get_mut(token)
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Client> {
        let client = self.slots.remove(token)?;
        self.order.remove(token.slot);
        self.siblings.remove(token.slot);
        self.ready.remove(token.slot);
        Some(client)
    }

    /// A client has written something.
    pub(super) fn set_ready(&mut self, token: Token) {
        if self.slots.get(token).is_some() {
            self.ready.push(token.slot);
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        self.ready.len() > 0
    }

    /// The client that has waited longest since it has written something.
    pub(super) fn next_ready(&mut self) -> Option<Token> {
        self.slots.token(self.ready.pop()?)
    }

    pub(super) fn oldest(&self) -> Option<Token> {
        self.slots.token(self.order.first()?)
    }

    /// The earliest deadline.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let oldest = self.slots.get(self.oldest()?)?;
        Some(oldest.deadline)
    }

    /// A client whose deadline has passed.
    pub(super) fn expired(&self, now: Instant) -> Option<Token> {
        self.next_deadline().filter(|deadline| *deadline <= now)?;
        self.oldest()
    }
}
