//! How connections are opened by siblings: other guests, of this process and of others.

use std::sync::Arc;

use log::debug;

use super::clients::Client;
use super::event_source::Token;
use super::opening::OpenError;
use super::{VsockThreadBackend, cost, name};
use crate::host::siblings::Membership;
use crate::host::socket::HostSocket;
use crate::metrics::counters::{CallFailure, Side};
use crate::packet::header::{GuestPort, PeerAddr};
use crate::vsock_conn::{ConnKey, Greeting, Verdict, VsockConnection};

impl VsockThreadBackend {
    /// The guest reaches siblings in this process from now on, and they reach it.
    pub fn join(&mut self, siblings: Arc<Membership>) {
        self.routes.join(siblings);
    }

    /// Takes a call of a sibling in this process.
    pub fn serve_call(&mut self) {
        let Some(call) = self.routes.next_call() else {
            return;
        };
        self.cost += cost::CONNECT_LINE;
        self.counters.clients += 1;
        self.connect_sibling(call.socket, call.port, call.caller);
    }

    /// Connects a sibling of another process to the guest's `port`, if it is who it says that it is.
    pub(super) fn admit_sibling(&mut self, client: Client, directory: usize, port: GuestPort) {
        let Some(caller) = client.caller() else {
            return;
        };
        match self
            .routes
            .check_claim(directory, &client.socket, caller.cid)
        {
            Ok(()) => self.connect_sibling(client.socket, port, caller),
            Err(error) => {
                let why = format!("{caller} is not the caller: {error}");
                self.drop_client(Side::Sibling, None, CallFailure::Other, &why);
            }
        }
    }

    fn connect_sibling(&mut self, socket: HostSocket, port: GuestPort, caller: PeerAddr) {
        match self.try_connect_sibling(socket, port, caller) {
            Ok(token) => self.settle(token, Verdict::Open),
            Err(error) => {
                let failure = match error {
                    OpenError::NoGuest => self.no_guest(),
                    _ => error.failure(),
                };
                let why = format!("guest port {}, {caller}: {error}", port.0);
                self.drop_client(Side::Sibling, None, failure, &why);
            }
        }
    }

    fn try_connect_sibling(
        &mut self,
        socket: HostSocket,
        port: GuestPort,
        caller: PeerAddr,
    ) -> Result<Token, OpenError> {
        if !self.has_guest {
            return Err(OpenError::NoGuest);
        }
        let packet_type = socket.packet_type();
        self.check_type(packet_type)?;
        self.check_limit(Side::Sibling)?;
        let key = ConnKey {
            guest: port,
            peer: caller,
            packet_type,
        };
        if self.connections.contains(&key) {
            return Err(OpenError::Taken);
        }
        self.make_room();
        let size = self.tx_buffer_size;
        let conn = VsockConnection::requested(self.guest_cid, key, socket, Greeting::Ok, size);
        let token = self.insert(Side::Sibling, conn)?;
        debug!("{} requested by a sibling", name(key));
        Ok(token)
    }
}
