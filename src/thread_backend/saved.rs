//! The table of connections in a document (see [`crate::saved`]), and what becomes of connections that are in none.

use std::io;
use std::time::{Duration, Instant};

use log::warn;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::clients::{Client, Stage, Waiting, Wanted};
use super::connections::Entry;
use super::event_source::Token;
use super::resets::{self, Held, Resets, ResetsState};
use super::{VsockThreadBackend, pending::Pending, slot_list::SlotList};
use crate::host::connect_line::{Line, Role};
use crate::host::socket::{HostSocket, SocketState};
use crate::metrics::counters::{CallFailure, CloseReason, Counters, Side};
use crate::saved::{LoadError, Loader, Saver};
use crate::vsock_conn::saved::{ConnectionState, deadline, remaining};
use crate::vsock_conn::{ConnKey, Verdict, VsockConnection};

/// A [`VsockThreadBackend`] in a document. Whose guest it is, and what its driver has negotiated, others know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableState {
    /// Those that take a place.
    #[serde(default)]
    connections: Vec<EntryState>,
    /// Those whose client has left, oldest first.
    #[serde(default)]
    deserted: Vec<EntryState>,
    /// Those that have given their ports back, oldest first.
    #[serde(default)]
    lingering: Vec<EntryState>,
    /// Those that can't go to another process.
    #[serde(default)]
    relayed: Vec<RelayedState>,
    /// Those without a line, then those that wait for the guest, each oldest first.
    #[serde(default)]
    clients: Vec<ClientState>,
    #[serde(default)]
    resets: ResetsState,
    #[serde(default)]
    counters: Counters,
    #[serde(default)]
    next_host_port: u32,
    has_guest: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EntryState {
    opened_by: Side,
    is_counted: bool,
    #[serde(default)]
    waiting: Option<WaitingState>,
    /// How long ago it was requested, in milliseconds.
    #[serde(default)]
    age: u64,
    connection: ConnectionState,
}

impl TableState {
    /// How many connections take a place.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }
}

/// A connection whose other end is with threads of the process that has saved it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RelayedState {
    key: ConnKey,
    opened_by: Side,
    is_counted: bool,
    /// The guest has asked for it, and has no answer.
    is_dialing: bool,
    known_to_guest: bool,
    /// The guest has closed it.
    #[serde(default)]
    is_lingering: bool,
}

/// A [`Waiting`]. The times are what remains, in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct WaitingState {
    wanted: Wanted,
    until: u64,
    answer_by: u64,
}

impl WaitingState {
    fn save(waiting: &Waiting, now: Instant) -> Self {
        Self {
            wanted: waiting.wanted,
            until: remaining(waiting.until, now),
            answer_by: remaining(waiting.answer_by, now),
        }
    }

    fn load(&self, now: Instant) -> Result<Waiting, LoadError> {
        Ok(Waiting {
            wanted: self.wanted,
            until: deadline(self.until, now)?,
            answer_by: deadline(self.answer_by, now)?,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StageState {
    Line(Line),
    Guest { waiting: WaitingState, due: bool },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ClientState {
    socket: SocketState,
    stage: StageState,
    /// The remaining time, in milliseconds.
    deadline: u64,
    #[serde(default)]
    sibling_dir: Option<usize>,
}

impl ClientState {
    fn save<'fd>(client: &'fd Client, saver: &mut Saver<'fd>, now: Instant) -> Self {
        Self {
            socket: client.socket.save(saver),
            stage: match &client.stage {
                Stage::Line(line) => StageState::Line(line.clone()),
                Stage::Guest { waiting, due } => StageState::Guest {
                    waiting: WaitingState::save(waiting, now),
                    due: *due,
                },
            },
            deadline: remaining(client.deadline, now),
            sibling_dir: client.sibling_dir,
        }
    }

    fn load(self, loader: &mut Loader, now: Instant) -> Result<Client, LoadError> {
        let stage = match (self.stage, self.sibling_dir) {
            (StageState::Line(line), None) => {
                line.check(Role::Request)?;
                Stage::Line(line)
            }
            (StageState::Line(line), Some(_)) => {
                line.check(Role::SiblingRequest)?;
                Stage::Line(line)
            }
            (StageState::Guest { waiting, due }, None) => Stage::Guest {
                waiting: waiting.load(now)?,
                due,
            },
            (StageState::Guest { .. }, Some(_)) => {
                return Err(LoadError::Invalid("a sibling that waits for the guest"));
            }
        };
        Ok(Client {
            socket: HostSocket::load(&self.socket, loader)?,
            stage,
            deadline: deadline(self.deadline, now)?,
            sibling_dir: self.sibling_dir,
        })
    }
}

impl EntryState {
    fn save<'fd>(entry: &'fd Entry, saver: &mut Saver<'fd>, now: Instant) -> io::Result<Self> {
        let waiting = entry.waiting.as_ref();
        Ok(Self {
            opened_by: entry.opened_by,
            is_counted: entry.is_counted,
            waiting: waiting.map(|waiting| WaitingState::save(waiting, now)),
            age: remaining(now, entry.since),
            connection: entry.conn.save(saver, now)?,
        })
    }

    /// Those of `entries` that can go to another process.
    fn save_all<'fd>(
        entries: impl Iterator<Item = &'fd Entry>,
        saver: &mut Saver<'fd>,
        now: Instant,
    ) -> io::Result<Vec<Self>> {
        entries
            .filter(|entry| !entry.conn.is_relayed())
            .map(|entry| Self::save(entry, saver, now))
            .collect()
    }
}

impl RelayedState {
    fn save(entry: &Entry, is_lingering: bool) -> Self {
        Self {
            key: entry.conn.key(),
            opened_by: entry.opened_by,
            is_counted: entry.is_counted,
            is_dialing: entry.conn.is_dialing(),
            known_to_guest: entry.conn.known_to_guest(),
            is_lingering,
        }
    }
}

/// Checks that counters can go on counting.
fn check(counters: &Counters) -> Result<(), LoadError> {
    fn can_go_on(counters: &Value) -> bool {
        match counters {
            Value::Object(members) => members.values().all(can_go_on),
            Value::Number(count) => count.as_u64().is_some_and(|count| count <= u64::MAX / 2),
            _ => false,
        }
    }
    if can_go_on(&serde_json::to_value(counters)?) {
        Ok(())
    } else {
        Err(LoadError::Invalid("a counter that can't be"))
    }
}

impl VsockThreadBackend {
    /// Saves everything, and changes nothing: the table may go on as if it had not been saved.
    ///
    /// # Errors
    /// The system refuses.
    pub fn save<'fd>(&'fd self, saver: &mut Saver<'fd>, now: Instant) -> io::Result<TableState> {
        let (placed, deserted) = (self.connections.placed(), self.connections.deserted());
        let open = placed.chain(deserted).map(|entry| (entry, false));
        let lingering = self.connections.lingering().map(|entry| (entry, true));
        let relayed = open
            .chain(lingering)
            .filter(|(entry, _)| entry.conn.is_relayed())
            .map(|(entry, lingers)| RelayedState::save(entry, lingers));
        let relayed = relayed.collect();
        let clients = self.clients.iter();
        Ok(TableState {
            connections: EntryState::save_all(self.connections.placed(), saver, now)?,
            deserted: EntryState::save_all(self.connections.deserted(), saver, now)?,
            lingering: EntryState::save_all(self.connections.lingering(), saver, now)?,
            relayed,
            clients: clients
                .map(|client| ClientState::save(client, saver, now))
                .collect(),
            resets: self.pending.resets.save(saver, now),
            counters: self.counters.clone(),
            next_host_port: self.next_host_port,
            has_guest: self.has_guest,
        })
    }

    /// Takes what was saved into a table that is empty. Connections that can't go to another process are reset. What exceeds a
    /// limit of this table stays nevertheless.
    ///
    /// # Errors
    /// It is not complete, it can't be, or the system refuses. The table is empty again.
    pub fn load(
        &mut self,
        state: TableState,
        loader: &mut Loader,
        now: Instant,
    ) -> Result<(), LoadError> {
        let loaded = self.try_load(state, loader, now);
        if loaded.is_err() {
            self.connections.clear();
            self.clients.clear();
            self.deadlines = Default::default();
            self.pending = Pending::default();
            self.flushable = SlotList::default();
            self.counters = Counters::default();
            self.has_guest = false;
        }
        loaded
    }

    fn try_load(
        &mut self,
        state: TableState,
        loader: &mut Loader,
        now: Instant,
    ) -> Result<(), LoadError> {
        check(&state.counters)?;
        self.counters = state.counters;
        self.next_host_port = state.next_host_port;
        self.has_guest = state.has_guest;
        self.pending.resets = Resets::load(state.resets, self.guest_cid, loader, now)?;
        self.list_resets();
        let mut loaded = Vec::new();
        // First, while no other has their ports.
        for entry in state.lingering {
            let Some(token) = self.load_entry(entry, loader, now)? else {
                continue;
            };
            if !(self.connections.get(token)).is_some_and(|entry| entry.conn.is_flushing()) {
                return Err(LoadError::Invalid("a connection that lingers for nothing"));
            }
            self.connections.linger(token);
            loaded.push(token);
        }
        for entry in state.connections {
            loaded.extend(self.load_entry(entry, loader, now)?);
        }
        for entry in state.deserted {
            if let Some(token) = self.load_entry(entry, loader, now)? {
                self.connections.desert(token);
                loaded.push(token);
            }
        }
        for client in state.clients {
            self.load_client(client, loader, now)?;
        }
        for token in loaded {
            if let Some(entry) = self.connections.get_mut(token) {
                entry.conn.resume();
            }
            self.settle(token, Verdict::Open);
        }
        self.end_relayed(&state.relayed);
        Ok(())
    }

    /// Loads a connection. One whose socket got lost is reset.
    fn load_entry(
        &mut self,
        state: EntryState,
        loader: &mut Loader,
        now: Instant,
    ) -> Result<Option<Token>, LoadError> {
        let key = state.connection.key();
        let conn = match VsockConnection::load(state.connection, self.guest_cid, loader, now) {
            Err(LoadError::Lost) => {
                self.count_lost(state.opened_by, state.is_counted);
                self.reset_ports(key);
                return Ok(None);
            }
            conn => conn?,
        };
        if self.connections.contains(&conn.key()) {
            return Err(LoadError::Invalid("two connections of the same ports"));
        }
        let waiting = state.waiting.map(|waiting| waiting.load(now)).transpose()?;
        let token = self.insert(state.opened_by, conn)?;
        if let Some(entry) = self.connections.get_mut(token) {
            entry.is_counted = state.is_counted;
            // Nothing is older than the clock.
            let since = now.checked_sub(Duration::from_millis(state.age));
            entry.since = since.unwrap_or(now);
            entry.waiting = waiting;
            if waiting.is_some() {
                self.clients.begin_request();
            }
        }
        Ok(Some(token))
    }

    fn load_client(
        &mut self,
        state: ClientState,
        loader: &mut Loader,
        now: Instant,
    ) -> Result<(), LoadError> {
        let side = match state.sibling_dir {
            Some(_) => Side::Sibling,
            None => Side::Host,
        };
        let client = match state.load(loader, now) {
            Err(LoadError::Lost) => {
                let why = "its socket got lost at a hand-over";
                self.drop_client(side, None, CallFailure::Other, why);
                return Ok(());
            }
            client => client?,
        };
        let directory = client.sibling_dir;
        if directory.is_some_and(|directory| !self.routes.has_sibling_dir(directory)) {
            let why = "its directory of siblings is there no more";
            self.drop_client(side, None, CallFailure::Other, why);
            return Ok(());
        }
        if let Some(token) = self.add_to_clients(client) {
            self.clients.look_at(token);
        }
        Ok(())
    }

    fn end_relayed(&mut self, relayed: &[RelayedState]) {
        for state in relayed.iter().filter(|state| !state.is_lingering) {
            if state.is_dialing {
                self.counters.refused += 1;
                let failed = &mut self.counters.failed[Side::Guest as usize];
                failed[CallFailure::Other as usize] += 1;
            } else {
                self.count_lost(state.opened_by, state.is_counted);
            }
            if state.known_to_guest {
                self.reset_ports(state.key);
            }
        }
        if !relayed.is_empty() {
            let count = relayed.len();
            warn!(
                "{count} connections of messages that are forwarded to AF_VSOCK are reset: they can't be handed over"
            );
        }
    }

    /// Resets connections that a process had which is gone, and with it everything but their ports.
    pub fn reset_lost(&mut self, keys: Vec<ConnKey>) {
        for key in keys {
            self.reset_ports(key);
        }
    }

    /// Resets a connection that is in no table.
    fn reset_ports(&mut self, key: ConnKey) {
        self.push_reset(resets::header(self.guest_cid, key), Held::default());
    }

    /// Counts the end of a connection that did not arrive.
    fn count_lost(&mut self, opened_by: Side, is_counted: bool) {
        self.counters.opened[opened_by as usize] += u64::from(!is_counted);
        self.counters.ended[CloseReason::HostGone as usize] += 1;
    }
}
