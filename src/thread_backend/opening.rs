//! How connections are opened, by the guest and by host programs.

use std::io;
use std::os::fd::AsFd;

use log::debug;
use thiserror::Error;

use super::clients::Client;
use super::event_source::{EventSource, Token};
use super::{VsockThreadBackend, cost, name};
use crate::host::connect_line::{Line, Progress};
use crate::host::entry::Entry;
use crate::host::routes::{DialError, Dialed};
use crate::host::socket::HostSocket;
use crate::metrics::counters::{CloseReason, Side};
use crate::packet::header::{GuestPort, PeerAddr, VsockHeader};
use crate::vsock_conn::{ConnKey, Dialing, Greeting, Verdict, VsockConnection};

/// The first host port that is given out. From here on to 65535 a port has at most five digits, which is all that
/// some readers of the `OK` line expect.
const FIRST_HOST_PORT: u32 = 1024;
const HOST_PORTS: u32 = 65536 - FIRST_HOST_PORT;

/// Why a connection is not opened.
#[derive(Debug, Error)]
pub(super) enum OpenError {
    #[error("at the limit of connections")]
    Limit,
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("nobody listens, as the last REQUEST has shown")]
    SameAsBefore,
    #[error("its address has a connection to this port already")]
    Taken,
    #[error("can't watch the socket: {0}")]
    Register(#[from] io::Error),
}

// For host programs.
impl VsockThreadBackend {
    /// Takes a host program that has just connected to `entry`.
    pub fn add_client(&mut self, entry: Entry, socket: HostSocket) {
        self.counters.clients += 1;
        match entry {
            Entry::Host => self.read_line(Client::new(socket)),
            Entry::Sibling(directory) => self.read_line(Client::sibling(socket, directory)),
            Entry::Port(port) | Entry::Vsock(port) => {
                self.connect_guest(socket, port, Greeting::Nothing);
            }
        }
    }

    fn read_line(&mut self, mut client: Client) {
        // Most clients write their line right after connecting.
        match client.read_line() {
            Progress::Complete { port, .. } => self.admit(client, GuestPort(port)),
            Progress::Incomplete => self.await_line(client),
            Progress::Invalid => self.drop_client("no CONNECT line"),
        }
    }

    /// Connects a client to the port that its line names.
    fn admit(&mut self, client: Client, port: GuestPort) {
        match client.sibling_dir {
            None => self.connect_guest(client.socket, port, Greeting::Ok),
            Some(directory) => self.admit_sibling(client, directory, port),
        }
    }

    /// Takes an event of a client's socket.
    pub fn client_ready(&mut self, token: Token) {
        self.clients.set_ready(token);
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
        match client.read_line() {
            Progress::Incomplete => {}
            Progress::Invalid => {
                self.clients.remove(token);
                self.drop_client("no CONNECT line");
            }
            Progress::Complete { port, .. } => {
                if let Some(client) = self.clients.remove(token) {
                    self.admit(client, GuestPort(port));
                }
            }
        }
    }

    fn await_line(&mut self, client: Client) {
        if let Some(oldest) = self.clients.surplus(&client) {
            self.clients.remove(oldest);
            self.drop_client("too many without a CONNECT line, this is the oldest");
        }
        let registry = &self.registry;
        let added = self.clients.try_insert(|token| {
            registry.register(client.socket.as_fd(), EventSource::Client(token))?;
            io::Result::Ok(client)
        });
        if let Err(error) = added {
            self.drop_client(&format!("can't watch the socket: {error}"));
        }
    }

    pub(super) fn drop_client(&mut self, why: &str) {
        self.counters.clients_dropped += 1;
        debug!("a client was closed: {why}");
    }

    /// Connects a host program to the guest's `port`.
    fn connect_guest(&mut self, socket: HostSocket, port: GuestPort, greeting: Greeting) {
        match self.try_connect_guest(socket, port, greeting) {
            Ok(token) => {
                self.counters.opened[Side::Host as usize] += 1;
                self.settle(token, Verdict::Open);
            }
            Err(error) => self.drop_client(&format!("guest port {}: {error}", port.0)),
        }
    }

    fn try_connect_guest(
        &mut self,
        socket: HostSocket,
        port: GuestPort,
        greeting: Greeting,
    ) -> Result<Token, OpenError> {
        self.check_limit(Side::Host)?;
        let key = self.free_key(port).ok_or(OpenError::Limit)?;
        self.make_room();
        let conn = VsockConnection::requested(self.guest_cid, key, socket, greeting, self.tx_buffer_size);
        let token = self.insert(Side::Host, conn)?;
        debug!("{} requested by a client", name(key));
        Ok(token)
    }

    /// A key for a new connection to the guest's `port`, with the next host port that is free with it.
    fn free_key(&mut self, port: GuestPort) -> Option<ConnKey> {
        (0..HOST_PORTS).find_map(|_| {
            self.next_host_port = self.next_host_port.wrapping_add(1);
            let key = ConnKey {
                guest: port,
                peer: PeerAddr::host(FIRST_HOST_PORT + self.next_host_port % HOST_PORTS),
            };
            (!self.connections.contains(&key)).then_some(key)
        })
    }
}

// For the guest.
impl VsockThreadBackend {
    /// Opens the connection that a guest's REQUEST asks for, or refuses it.
    pub(super) fn open(&mut self, request: &VsockHeader) {
        match self.try_open(request) {
            Ok(token) => {
                self.counters.opened[Side::Guest as usize] += 1;
                debug!("{} opened by the guest", name(ConnKey::of(request)));
                self.settle(token, Verdict::Open);
            }
            Err(error) => {
                debug!("{} refused: {error}", name(ConnKey::of(request)));
                self.counters.refused += 1;
                self.refuse(request);
            }
        }
    }

    fn try_open(&mut self, request: &VsockHeader) -> Result<Token, OpenError> {
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
