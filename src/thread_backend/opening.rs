//! How connections are opened, by the guest and by host programs.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use log::debug;
use thiserror::Error;

use super::clients::{Client, Stage, Waiting, Wanted};
use super::event_source::{EventSource, Token};
use super::{VsockThreadBackend, cost, name};
use crate::host::connect_line::{self, Line, Progress};
use crate::host::entry::Entry;
use crate::host::routes::{DialError, Dialed};
use crate::host::socket::HostSocket;
use crate::metrics::counters::{CallFailure, CloseReason, Side};
use crate::packet::header::{GuestPort, PacketType, PeerAddr, VsockHeader};
use crate::vsock_conn::{ConnKey, Dialing, Greeting, Readiness, Verdict, VsockConnection};

/// The first host port that is given out. From here on to 65535 a port has at most five digits, which is all that
/// some readers of the `OK` line expect.
const FIRST_HOST_PORT: u32 = 1024;
const HOST_PORTS: u32 = 65536 - FIRST_HOST_PORT;

/// Why a connection is not opened.
#[derive(Debug, Error)]
pub(super) enum OpenError {
    #[error("the guest has no connections of type {0:?}")]
    Type(PacketType),
    #[error("at the limit of connections")]
    Limit,
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("nobody listens, as the last REQUEST has shown")]
    SameAsBefore,
    #[error("the guest's driver has not started the device")]
    NoGuest,
    #[error("its address has a connection to this port already")]
    Taken,
    #[error("can't watch the socket: {0}")]
    Register(#[from] io::Error),
}

impl OpenError {
    /// As what it is counted, and what the caller is told.
    pub(super) fn failure(&self) -> CallFailure {
        match self {
            Self::Limit => CallFailure::Limit,
            Self::Dial(error) if error.is_nobody() => CallFailure::NobodyListens,
            Self::Dial(error) if error.is_limit() => CallFailure::Limit,
            Self::SameAsBefore => CallFailure::NobodyListens,
            Self::NoGuest => CallFailure::NoDriver,
            Self::Type(_) | Self::Dial(_) | Self::Taken | Self::Register(_) => CallFailure::Other,
        }
    }
}

// For host programs.
impl VsockThreadBackend {
    /// Whether the guest's driver has started the device.
    pub fn has_guest(&self) -> bool {
        self.has_guest
    }

    /// The guest's driver has started the device: whoever waits for it is connected.
    pub fn guest_started(&mut self) {
        self.has_guest = true;
        self.clients.retry_all();
    }

    /// There is a VMM.
    pub fn connect(&mut self) {
        self.has_vmm = true;
    }

    /// Whether there is one.
    pub fn has_vmm(&self) -> bool {
        self.has_vmm
    }

    /// Why there is no guest.
    pub(super) fn no_guest(&self) -> CallFailure {
        match self.has_vmm {
            true => CallFailure::NoDriver,
            false => CallFailure::NoVmm,
        }
    }

    /// What the end of a call means that was not answered yet.
    pub(super) fn failure_of(&self, reason: CloseReason) -> CallFailure {
        match reason {
            CloseReason::DeviceReset => self.no_guest(),
            _ => reason.failure(),
        }
    }

    /// Closes a host program that has just connected to `entry`: there is no guest, and it does not wait for one.
    pub fn refuse_client(&mut self, entry: Entry, socket: &HostSocket) {
        self.counters.clients += 1;
        let side = match entry {
            Entry::Host | Entry::Port(_) | Entry::Vsock(_) => Side::Host,
            Entry::Sibling(_) => Side::Sibling,
        };
        let why = "the guest's driver has not started the device";
        self.drop_client(side, Some(socket), self.no_guest(), why);
    }

    /// Whether a host program that connects to `entry` is taken although there is no guest.
    pub fn waits_for_guest(&self, entry: Entry) -> bool {
        match entry {
            Entry::Host | Entry::Port(_) => !self.wait_for_guest.is_zero(),
            Entry::Vsock(_) | Entry::Sibling(_) => false,
        }
    }

    /// Takes a host program that has just connected to `entry`.
    pub fn add_client(&mut self, entry: Entry, socket: HostSocket) {
        self.counters.clients += 1;
        match entry {
            Entry::Host => self.read_line(Client::new(socket)),
            Entry::Sibling(directory) => self.read_line(Client::sibling(socket, directory)),
            Entry::Port(port) => {
                let greeting = Greeting::Nothing;
                self.connect_or_wait(socket, Wanted { port, greeting });
            }
            Entry::Vsock(port) => {
                let greeting = Greeting::Nothing;
                match self.routes.forwarded(socket) {
                    Ok(socket) => self.connect_guest(socket, Wanted { port, greeting }, None),
                    Err(error) => {
                        let why = format!("guest port {}: {error}", port.0);
                        self.drop_client(Side::Host, None, CallFailure::Other, &why);
                    }
                }
            }
        }
    }

    fn read_line(&mut self, mut client: Client) {
        // Most clients write their line right after connecting.
        match client.read_line() {
            Progress::Complete { port, .. } => self.admit(client, GuestPort(port)),
            Progress::Incomplete => self.await_line(client),
            Progress::Invalid => self.drop_without_line(&client, "no CONNECT line"),
        }
    }

    /// Connects a client to the port that its line names.
    fn admit(&mut self, client: Client, port: GuestPort) {
        let greeting = Greeting::Ok;
        match client.sibling_dir {
            None => self.connect_or_wait(client.socket, Wanted { port, greeting }),
            Some(directory) => self.admit_sibling(client, directory, port),
        }
    }

    /// Takes an event of a client's socket.
    pub fn client_ready(&mut self, token: Token, ready: Readiness) {
        self.clients.set_ready(token, ready.hung_up);
    }

    /// Whether [`VsockThreadBackend::serve_client`] has something to do.
    pub fn has_ready_clients(&self) -> bool {
        self.clients.has_ready() || self.routes.has_calls()
    }

    /// Goes on with the client that has waited longest since its event.
    pub fn serve_client(&mut self) {
        let Some(token) = self.clients.next_ready() else {
            return;
        };
        let Some(client) = self.clients.get_mut(token) else {
            return;
        };
        self.cost += cost::CONNECT_LINE;
        if let Stage::Guest { waiting, due } = client.stage {
            return self.serve_waiting(token, waiting, due);
        }
        match client.read_line() {
            Progress::Incomplete => {}
            Progress::Invalid => {
                if let Some(client) = self.clients.remove(token) {
                    self.drop_without_line(&client, "no CONNECT line");
                }
            }
            Progress::Complete { port, .. } => {
                if let Some(client) = self.clients.remove(token) {
                    self.admit(client, GuestPort(port));
                }
            }
        }
    }

    /// Goes on with a client that waits for the guest: it may have left, or its next REQUEST may be due.
    fn serve_waiting(&mut self, token: Token, waiting: Waiting, due: bool) {
        let has_left = |client: &mut Client| client.socket.peer_closed();
        if self.clients.get_mut(token).is_some_and(has_left) {
            self.clients.remove(token);
            let why = "it has left while it waited for the guest";
            self.drop_client(Side::Host, None, CallFailure::Other, why);
        } else if due && self.has_guest && self.connections.has_place(Side::Host) {
            if let Some(client) = self.clients.remove(token) {
                self.connect_guest(client.socket, waiting.wanted, Some(waiting));
            }
        } else if due {
            self.clients.put_off(token, self.has_guest);
        }
    }

    fn await_line(&mut self, client: Client) {
        if let Some(oldest) = self.clients.surplus(&client)
            && let Some(oldest) = self.clients.remove(oldest)
        {
            let why = "too many without a CONNECT line, this is the oldest";
            self.drop_client(oldest.side(), Some(&oldest.socket), CallFailure::Limit, why);
        }
        self.add_to_clients(client);
    }

    /// Lets a client wait until there is a guest, or until the guest may accept it.
    pub(super) fn await_guest(&mut self, socket: HostSocket, waiting: Waiting) {
        self.add_to_clients(Client::waiting(socket, waiting, self.has_guest));
    }

    /// Puts a client into the table, and its socket into the event loop. None where that fails: the client is dropped.
    pub(super) fn add_to_clients(&mut self, client: Client) -> Option<Token> {
        let registry = &self.registry;
        let side = client.side();
        let added = self.clients.try_insert(|token| {
            registry.register(client.socket.as_fd(), EventSource::Client(token))?;
            io::Result::Ok(client)
        });
        if let Err(error) = &added {
            let why = format!("can't watch the socket: {error}");
            self.drop_client(side, None, CallFailure::Other, &why);
        }
        added.ok()
    }

    /// Counts a client that is closed before it has a connection, and tells it why if its socket is still there and it wants to
    /// know.
    pub(super) fn drop_client(
        &mut self,
        side: Side,
        socket: Option<&HostSocket>,
        failure: CallFailure,
        why: &str,
    ) {
        self.counters.clients_dropped += 1;
        self.counters.failed[side as usize][failure as usize] += 1;
        if let Some(socket) = socket {
            connect_line::refuse(socket, failure);
        }
        debug!("a client was closed: {why}");
    }

    pub(super) fn drop_without_line(&mut self, client: &Client, why: &str) {
        let failure = CallFailure::NoLine;
        self.drop_client(client.side(), Some(&client.socket), failure, why);
    }

    /// Takes a host program that has said what it wants.
    fn connect_or_wait(&mut self, socket: HostSocket, wanted: Wanted) {
        let waits = !self.wait_for_guest.is_zero();
        let waiting = (waits && self.clients.may_wait())
            .then(|| Waiting::new(wanted, Instant::now(), self.wait_for_guest));
        match waiting {
            Some(waiting) if !self.has_guest => self.await_guest(socket, waiting),
            None if waits && !self.has_guest => {
                let why = "there is no guest, and too many wait for it";
                self.drop_client(Side::Host, Some(&socket), CallFailure::Limit, why);
            }
            waiting => self.connect_guest(socket, wanted, waiting),
        }
    }

    /// Sends the guest a REQUEST for a host program. Where that waits, it may take more than one, and the connection is
    /// counted when it is established.
    fn connect_guest(&mut self, socket: HostSocket, wanted: Wanted, waiting: Option<Waiting>) {
        match self.try_connect_guest(socket, wanted) {
            Ok(token) => {
                if let (Some(waiting), Some(entry)) = (waiting, self.connections.get_mut(token)) {
                    entry.conn.answer_by(waiting.answer_by);
                    entry.waiting = Some(waiting);
                    self.clients.begin_request();
                }
                self.settle(token, Verdict::Open);
            }
            Err(error) => {
                let why = format!("guest port {}: {error}", wanted.port.0);
                self.drop_client(Side::Host, None, error.failure(), &why);
            }
        }
    }

    fn try_connect_guest(
        &mut self,
        socket: HostSocket,
        wanted: Wanted,
    ) -> Result<Token, OpenError> {
        let key = self.free_key(wanted.port, socket.packet_type());
        let key = key.inspect_err(|error| connect_line::refuse(&socket, error.failure()))?;
        self.make_room();
        let conn = VsockConnection::requested(
            self.guest_cid,
            key,
            socket,
            wanted.greeting,
            self.tx_buffer_size,
        );
        let token = self.insert(Side::Host, conn)?;
        debug!("{} requested by a client", name(key));
        Ok(token)
    }

    /// What the client of a connection goes on to wait for when that ends for `reason`.
    pub(super) fn waits_on(&mut self, token: Token, reason: CloseReason) -> Option<Waiting> {
        use CloseReason::{DeviceReset, Refused, Timeout};
        let entry = self.connections.get_mut(token)?;
        let waiting = entry.waiting.take()?;
        self.clients.end_request();
        let is_gone = entry.conn.is_deserted() || Instant::now() >= waiting.until;
        if matches!(reason, Refused | Timeout | DeviceReset) && !is_gone {
            return Some(waiting);
        }
        None
    }

    /// A key for a new connection to the guest's `port`, with the next host port that is free with it.
    fn free_key(&mut self, port: GuestPort, packet_type: PacketType) -> Result<ConnKey, OpenError> {
        self.check_type(packet_type)?;
        self.check_limit(Side::Host)?;
        let free = (0..HOST_PORTS).find_map(|_| {
            self.next_host_port = self.next_host_port.wrapping_add(1);
            let key = ConnKey {
                guest: port,
                peer: PeerAddr::host(FIRST_HOST_PORT + self.next_host_port % HOST_PORTS),
                packet_type,
            };
            (!self.connections.contains(&key)).then_some(key)
        });
        free.ok_or(OpenError::Limit)
    }
}

// For the guest.
impl VsockThreadBackend {
    /// Opens the connection that a guest's REQUEST asks for, or refuses it.
    pub(super) fn open(&mut self, request: &VsockHeader) {
        match self.try_open(request) {
            Ok(token) => {
                self.settle(token, Verdict::Open);
                let entry = self.connections.get(token);
                let what = match entry.is_some_and(|entry| entry.conn.is_dialing()) {
                    true => "requested",
                    false => "opened",
                };
                debug!("{} {what} by the guest", name(ConnKey::of(request)));
            }
            Err(error) => {
                debug!("{} refused: {error}", name(ConnKey::of(request)));
                self.counters.refused += 1;
                self.counters.failed[Side::Guest as usize][error.failure() as usize] += 1;
                self.refuse(request);
            }
        }
    }

    fn try_open(&mut self, request: &VsockHeader) -> Result<Token, OpenError> {
        self.check_type(request.packet_type)?;
        self.check_limit(Side::Guest)?;
        let destination = (request.peer, request.packet_type);
        if self.nobody_at == Some(destination) {
            return Err(OpenError::SameAsBefore);
        }
        // The peer is asked first: a connection makes others give way, but not an attempt at one.
        self.cost += cost::DIAL;
        let dialed = self.routes.dial(request);
        if dialed.as_ref().is_err_and(DialError::is_nobody) {
            self.nobody_at = Some(destination);
        }
        let dialed = dialed?;
        self.make_room();
        let conn = match dialed {
            Dialed::Connected(socket) => {
                VsockConnection::accepted(request, socket, self.tx_buffer_size)
            }
            Dialed::Connecting(socket) => {
                let dialing = Dialing::Connect;
                VsockConnection::dialing(request, socket, dialing, self.tx_buffer_size)
            }
            Dialed::Calling(socket) => {
                let dialing = Dialing::Answer(Line::answer());
                VsockConnection::dialing(request, socket, dialing, self.tx_buffer_size)
            }
        };
        Ok(self.insert(Side::Guest, conn)?)
    }
}

// For both.
impl VsockThreadBackend {
    pub(super) fn check_type(&self, packet_type: PacketType) -> Result<(), OpenError> {
        if self.types.contains(packet_type) {
            Ok(())
        } else {
            Err(OpenError::Type(packet_type))
        }
    }

    pub(super) fn check_limit(&self, side: Side) -> Result<(), OpenError> {
        if self.connections.has_place(side) {
            Ok(())
        } else {
            Err(OpenError::Limit)
        }
    }

    pub(super) fn make_room(&mut self) {
        if let Some(surplus) = self.connections.surplus() {
            self.reset_connection(surplus, CloseReason::Evicted);
        }
    }

    /// Puts a connection into the table, and its socket into the event loop.
    pub(super) fn insert(&mut self, side: Side, conn: VsockConnection) -> io::Result<Token> {
        let registry = &self.registry;
        let token = self.connections.try_insert(side, |token| {
            registry.register(conn.socket(), EventSource::Connection(token))?;
            io::Result::Ok(conn)
        })?;
        // So that a packet costs no allocation later.
        self.pending.make_room(token.slot);
        self.flushable.make_room(token.slot);
        Ok(token)
    }
}

#[cfg(test)]
mod tests;
