//! Host programs and siblings that have connected and have no connection to the guest: those that have not said yet which port
//! they want, and the host programs that wait for a guest that accepts them.
//!
//! ```text
//! accepted --> Line --CONNECT--> Guest --REQUEST--> a connection --RESPONSE--> established
//!                                  ^                     |
//!                                  +---- RST, no guest --+        where clients wait (--wait-for-guest)
//! ```
//!
//! A socket for one port has no `Line`. A client that finds the guest there is never in `Guest` before its first REQUEST.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::deadlines::Deadlines;
use super::event_source::Token;
use super::slot_list::SlotList;
use super::slots::Slots;
use crate::host::connect_line::{self, Line, Progress};
use crate::host::socket::HostSocket;
use crate::metrics::counters::Side;
use crate::packet::header::{GuestPort, PeerAddr};
use crate::vsock_conn::{ANSWER_TIMEOUT, Greeting};

/// How long a host program has to write its CONNECT line. A person may type it by hand.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The time between two REQUESTs for a client.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wanted {
    /// The guest's port.
    pub(super) port: GuestPort,
    /// What it hears when the guest has accepted.
    pub(super) greeting: Greeting,
}

/// What a client waits for whom the guest's first answer need not be the last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) wanted: Wanted,
    /// When it gives up.
    pub(super) until: Instant,
    /// By when the guest must have answered its REQUEST, if it was sent in time.
    pub(super) answer_by: Instant,
}

impl Waiting {
    /// For a client that has said at the time `now` what it wants, and waits so long.
    pub(super) fn new(wanted: Wanted, now: Instant, wait: Duration) -> Self {
        Self {
            wanted,
            until: now + wait,
            // Who waits for a short while has no less time than who does not wait.
            answer_by: now + wait.max(ANSWER_TIMEOUT),
        }
    }

    /// When to look at the client again: without a guest, nothing happens before its time is over.
    fn next_try(self, has_guest: bool) -> Instant {
        match has_guest {
            true => self.until.min(Instant::now() + RETRY_INTERVAL),
            false => self.until,
        }
    }
}

/// What a client waits for.
#[derive(Debug)]
pub(super) enum Stage {
    /// The end of its line.
    Line(Line),
    /// The guest. Where `due` is set, a REQUEST is to be sent as soon as there is a guest.
    Guest { waiting: Waiting, due: bool },
}

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: HostSocket,
    pub(super) stage: Stage,
    /// When it is looked at whatever happens.
    pub(super) deadline: Instant,
    /// In which directory of siblings it has connected, if it is one.
    pub(super) sibling_dir: Option<usize>,
}

impl Client {
    /// One that has just connected, and has to write a line.
    pub(super) fn new(socket: HostSocket) -> Self {
        Self {
            socket,
            stage: Stage::Line(Line::request()),
            deadline: Instant::now() + HANDSHAKE_TIMEOUT,
            sibling_dir: None,
        }
    }

    /// One that waits for the guest. Where there is one, it is asked again soon.
    pub(super) fn waiting(socket: HostSocket, waiting: Waiting, has_guest: bool) -> Self {
        Self {
            socket,
            deadline: waiting.next_try(has_guest),
            stage: Stage::Guest {
                waiting,
                due: false,
            },
            sibling_dir: None,
        }
    }

    /// One that has connected in the directory of siblings of this index.
    pub(super) fn sibling(socket: HostSocket, directory: usize) -> Self {
        Self {
            stage: Stage::Line(Line::sibling_request()),
            sibling_dir: Some(directory),
            ..Self::new(socket)
        }
    }

    /// Who calls, as a sibling's line that is complete says.
    pub(super) fn caller(&self) -> Option<PeerAddr> {
        match &self.stage {
            Stage::Line(line) => Some(line.caller()),
            Stage::Guest { .. } => None,
        }
    }

    /// Who it is.
    pub(super) fn side(&self) -> Side {
        match self.sibling_dir {
            None => Side::Host,
            Some(_) => Side::Sibling,
        }
    }

    /// Whether it has said what it wants.
    pub(super) fn has_line(&self) -> bool {
        matches!(self.stage, Stage::Guest { .. })
    }

    /// Reads on at its line. Nothing comes of it where there is none.
    pub(super) fn read_line(&mut self) -> Progress {
        match &mut self.stage {
            Stage::Line(line) => connect_line::read(&self.socket, line),
            Stage::Guest { .. } => Progress::Incomplete,
        }
    }
}

/// The clients.
#[derive(Debug)]
pub(super) struct Clients {
    /// How many there may be without a line, and how many that wait for the guest. One more of the first kind evicts the
    /// oldest. One more of the second is treated as if there was no waiting: whoever waits longest should get in first.
    max: usize,
    slots: Slots<Client>,
    /// Those without a line, oldest first.
    lines: SlotList,
    /// The siblings among them, oldest first.
    siblings: SlotList,
    /// Those that wait for the guest.
    waiting: SlotList,
    /// How many of those that wait have a connection at the moment, which the guest has not accepted.
    requested: usize,
    deadlines: Deadlines,
    /// Those that something has happened to, in the order in which they are served.
    ready: SlotList,
}

impl Clients {
    pub(super) fn new(max: usize) -> Self {
        Self {
            max,
            slots: Slots::default(),
            lines: SlotList::default(),
            siblings: SlotList::default(),
            waiting: SlotList::default(),
            requested: 0,
            deadlines: Deadlines::default(),
            ready: SlotList::default(),
        }
    }

    /// How many have not named a port.
    pub(super) fn handshaking(&self) -> usize {
        self.lines.len()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// The client that is to give way to this new one, if there are too many. Of four places, siblings may have one: most are
    /// kept for host programs.
    pub(super) fn surplus(&self, new: &Client) -> Option<Token> {
        if new.sibling_dir.is_some() && self.siblings.len() >= (self.max / 4).max(1) {
            return self.oldest_sibling();
        }
        self.oldest().filter(|_| self.lines.len() >= self.max)
    }

    /// How many wait for the guest, those whose REQUEST is on its way included.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len() + self.requested
    }

    /// Whether one more may wait for the guest.
    pub(super) fn may_wait(&self) -> bool {
        self.waiting() < self.max
    }

    /// One that waits has got a connection.
    pub(super) fn begin_request(&mut self) {
        self.requested += 1;
    }

    /// That connection is established, or over.
    pub(super) fn end_request(&mut self) {
        self.requested -= 1;
    }

    /// Adds the client that `make` returns for its token.
    pub(super) fn try_insert<E>(
        &mut self,
        make: impl FnOnce(Token) -> Result<Client, E>,
    ) -> Result<Token, E> {
        let token = self.slots.try_insert(make)?;
        if let Some(client) = self.slots.get(token) {
            match client.stage {
                Stage::Line(_) => self.lines.push(token.slot),
                Stage::Guest { .. } => self.waiting.push(token.slot),
            }
            self.deadlines.replace(token, None, Some(client.deadline));
        }
        let client = self.slots.get(token);
        if client.is_some_and(|client| client.sibling_dir.is_some()) {
            self.siblings.push(token.slot);
        }
        Ok(token)
    }

    /// Those without a line, then those that wait for the guest, each oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Client> {
        let slots = self.lines.iter().chain(self.waiting.iter());
        slots.filter_map(|slot| self.slots.get(self.slots.token(slot)?))
    }

    /// Something may have happened to a client before it was loaded.
    pub(super) fn look_at(&mut self, token: Token) {
        self.ready.push(token.slot);
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new(self.max);
    }

    pub(super) fn get_mut(&mut self, token: Token) -> Option<&mut Client> {
        self.slots.get_mut(token)
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Client> {
        let client = self.slots.remove(token)?;
        self.lines.remove(token.slot);
        self.siblings.remove(token.slot);
        self.waiting.remove(token.slot);
        self.deadlines.remove(token, Some(client.deadline));
        self.ready.remove(token.slot);
        let lists = [
            &mut self.lines,
            &mut self.siblings,
            &mut self.waiting,
            &mut self.ready,
        ];
        lists.into_iter().for_each(SlotList::give_back);
        Some(client)
    }

    /// Something has happened to a client's socket; `left` says whether it has closed. One that waits for the guest may
    /// write what it likes.
    pub(super) fn set_ready(&mut self, token: Token, left: bool) {
        if let Some(client) = self.slots.get(token)
            && (left || matches!(client.stage, Stage::Line(_)))
        {
            self.ready.push(token.slot);
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        self.ready.len() > 0
    }

    /// The client that has waited longest since something has happened.
    pub(super) fn next_ready(&mut self) -> Option<Token> {
        self.slots.token(self.ready.pop()?)
    }

    /// The oldest without a line.
    pub(super) fn oldest(&self) -> Option<Token> {
        self.slots.token(self.lines.first()?)
    }

    /// The oldest sibling without a line.
    fn oldest_sibling(&self) -> Option<Token> {
        self.slots.token(self.siblings.first()?)
    }

    /// One without a line that does not wait for the guest; host programs may do so.
    pub(super) fn oldest_that_leaves(&self, host_programs_wait: bool) -> Option<Token> {
        match host_programs_wait {
            true => self.oldest_sibling(),
            false => self.oldest(),
        }
    }

    /// The earliest deadline.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.next()
    }

    /// A client whose deadline has passed.
    pub(super) fn expired(&self, now: Instant) -> Option<Token> {
        self.deadlines.expired(now)
    }

    /// The next REQUEST of a client is due. False when its time is over, or when it is none that waits for the guest.
    pub(super) fn retry(&mut self, token: Token, now: Instant) -> bool {
        let until = self.schedule(token, true, |waiting| waiting.until);
        until.is_some_and(|until| until > now)
    }

    /// No REQUEST can be sent now for a client whose next one was due.
    pub(super) fn put_off(&mut self, token: Token, has_guest: bool) {
        self.schedule(token, false, |waiting| waiting.next_try(has_guest));
    }

    /// There is a guest: all REQUESTs are due.
    pub(super) fn retry_all(&mut self) {
        for _ in 0..self.waiting.len() {
            let Some(slot) = self.waiting.pop() else {
                break;
            };
            // All go to the end, one by one, and so keep their order.
            self.waiting.push(slot);
            if let Some(token) = self.slots.token(slot) {
                self.schedule(token, true, |waiting| waiting.until);
            }
        }
    }

    /// Changes whether a REQUEST is due and when the client is looked at again, and returns that.
    fn schedule(
        &mut self,
        token: Token,
        is_due: bool,
        deadline: impl FnOnce(Waiting) -> Instant,
    ) -> Option<Instant> {
        let client = self.slots.get_mut(token)?;
        let Stage::Guest { waiting, due } = &mut client.stage else {
            return None;
        };
        *due = is_due;
        let new = deadline(*waiting);
        let old = std::mem::replace(&mut client.deadline, new);
        self.deadlines.replace(token, Some(old), Some(new));
        if is_due {
            self.ready.push(token.slot);
        }
        Some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn socket() -> HostSocket {
        UnixStream::pair().unwrap().0.into()
    }

    /// Clients of which at most two wait, and one that waits for a minute.
    fn waiting(has_guest: bool) -> (Clients, Token, Instant) {
        let mut clients = Clients::new(2);
        let (now, minute) = (Instant::now(), Duration::from_secs(60));
        let wanted = Wanted {
            port: GuestPort(22),
            greeting: Greeting::Nothing,
        };
        let client = Client::waiting(socket(), Waiting::new(wanted, now, minute), has_guest);
        let token = clients.try_insert(|_| Ok::<_, ()>(client)).unwrap();
        (clients, token, now + minute)
    }

    fn is_due(clients: &mut Clients, token: Token) -> bool {
        let client = clients.get_mut(token).unwrap();
        matches!(client.stage, Stage::Guest { due: true, .. })
    }

    #[test]
    fn without_a_guest_only_the_end_of_the_wait_is_waited_for() {
        let (mut clients, token, until) = waiting(false);
        assert_eq!(clients.next_deadline(), Some(until));
        assert_eq!(clients.expired(until), Some(token));
        assert!(!clients.retry(token, until), "its time is over");
    }

    #[test]
    fn with_a_guest_it_is_asked_again_and_put_off_where_that_can_not_be() {
        let (mut clients, token, until) = waiting(true);
        let next = clients.next_deadline().unwrap();
        assert!(next <= Instant::now() + RETRY_INTERVAL);
        assert!(!clients.has_ready() && clients.expired(next) == Some(token));
        assert!(clients.retry(token, next));
        assert_eq!(clients.next_deadline(), Some(until), "asked twice");
        assert_eq!(clients.next_ready(), Some(token));
        assert!(is_due(&mut clients, token));
        clients.put_off(token, true);
        assert!(!is_due(&mut clients, token) && !clients.has_ready());
        assert!(clients.next_deadline().unwrap() < until);
        clients.put_off(token, false);
        assert_eq!(clients.next_deadline(), Some(until));
    }

    #[test]
    fn a_guest_that_starts_is_asked_for_all() {
        let (mut clients, token, until) = waiting(false);
        clients.retry_all();
        assert!(is_due(&mut clients, token));
        assert_eq!(clients.next_ready(), Some(token));
        assert_eq!(clients.next_deadline(), Some(until));
    }

    #[test]
    fn what_a_client_writes_while_it_waits_is_not_read() {
        let (mut clients, token, _) = waiting(true);
        clients.set_ready(token, false);
        assert!(!clients.has_ready());
        clients.set_ready(token, true);
        assert_eq!(clients.next_ready(), Some(token));
    }

    #[test]
    fn those_that_were_asked_for_count_among_those_that_wait() {
        let (mut clients, token, _) = waiting(true);
        assert!(clients.may_wait());
        clients.begin_request();
        assert!(!clients.may_wait());
        clients.remove(token);
        assert!(clients.may_wait() && clients.waiting() == 1);
        clients.end_request();
        assert_eq!((clients.waiting(), clients.next_deadline()), (0, None));
    }

    #[test]
    fn the_guest_has_its_time_to_answer_and_no_more_than_the_client() {
        let now = Instant::now();
        let wanted = Wanted {
            port: GuestPort(22),
            greeting: Greeting::Nothing,
        };
        let answer_by = |wait| Waiting::new(wanted, now, wait).answer_by;
        assert_eq!(
            answer_by(Duration::from_secs(60)),
            now + Duration::from_secs(60)
        );
        assert_eq!(answer_by(Duration::from_secs(1)), now + ANSWER_TIMEOUT);
    }
}
