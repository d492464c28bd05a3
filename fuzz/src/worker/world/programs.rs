//! The host programs.

use std::io::Write as _;

use vhost_user_vsock::host::connect_line::Progress;
use vhost_user_vsock::packet::header::{GuestPort, PacketType, PeerAddr};
use vhost_user_vsock::vsock_conn::ConnKey;

use super::super::super::connect_line::{Role, parse};
use super::super::conn::{Conn, State};
use super::super::host::PORTS;
use super::{FIRST_CLIENT, FIRST_DEPARTED, MAX_CONNS, MAX_DEPARTED, MAX_UNWELCOME, World};

impl World<'_> {
    pub(super) fn with(&mut self, conn: u8, act: impl FnOnce(&mut Conn)) {
        if let Some(index) = usize::from(conn).checked_rem(self.conns.len()) {
            act(&mut self.conns[index]);
        }
    }

    /// The type of the host programs that listen there.
    pub(super) fn type_of(&self, port: u8) -> PacketType {
        if self.message_ports >> (port - 1) & 1 == 0 {
            PacketType::Stream
        } else {
            PacketType::Seqpacket
        }
    }

    /// What the next host program that connects does so for.
    pub(super) fn next_type(&mut self) -> PacketType {
        self.clients += 1;
        if self.for_messages && !(self.for_both && self.clients.is_multiple_of(2)) {
            PacketType::Seqpacket
        } else {
            PacketType::Stream
        }
    }

    pub(super) fn connect(&mut self, pieces: u8) {
        if self.conns.len() == MAX_CONNS {
            return;
        }
        let packet_type = self.next_type();
        let Ok(mut program) = self.host.connect(packet_type) else {
            return;
        };
        let number = self.conns.len() as u32;
        let port = FIRST_CLIENT + number;
        let line = match pieces >> 6 {
            0 => format!("CONNECT {port}\n"),
            1 => format!("connect {port}\n"),
            2 => format!("CONNECT  {port} \r\n"),
            _ => format!("Connect   {port}\r\n"),
        };
        // As a message it has no pieces.
        let at = match packet_type {
            PacketType::Seqpacket => 0,
            _ => usize::from(pieces) % line.len(),
        };
        let (first, second) = line.split_at(at);
        program.write_all(first.as_bytes()).unwrap();
        // Programs that have left are seen to have done so before this one takes a place.
        if !first.is_empty() || self.departures > 0 {
            self.run();
        }
        program.write_all(second.as_bytes()).unwrap();
        let key = ConnKey {
            packet_type,
            guest: GuestPort(port),
            peer: PeerAddr::host(0),
        };
        let mut conn = Conn::new(number, key, State::Unknown, self.window);
        conn.program = Some(program);
        self.conns.push(conn);
    }

    pub(super) fn connect_with_garbage(&mut self, mut text: [u8; 12]) {
        // At the latest here it is no CONNECT line.
        text[11] = b'!';
        let is_line = matches!(parse(Role::Client, &text), Progress::Complete { .. });
        if is_line || self.unwelcome.len() == MAX_UNWELCOME {
            return;
        }
        let packet_type = self.next_type();
        let Ok(mut program) = self.host.connect(packet_type) else {
            return;
        };
        program.write_all(&text).unwrap();
        self.unwelcome.push(program);
    }

    /// Host programs leave without an answer. The worker may have seen them before.
    pub(super) fn clients_leave(&mut self, clients: u8, is_known: bool) {
        // Those of one type may be taken before others that have come before them, at the other listener.
        self.run();
        let mut programs = Vec::new();
        for _ in 0..clients {
            if self.departures == MAX_DEPARTED {
                break;
            }
            let packet_type = self.next_type();
            let Ok(mut program) = self.host.connect(packet_type) else {
                break;
            };
            let port = FIRST_DEPARTED + self.departures;
            program
                .write_all(format!("CONNECT {port}\n").as_bytes())
                .unwrap();
            self.departures += 1;
            programs.push(program);
        }
        if is_known {
            self.run();
        }
    }

    pub(super) fn listen(&mut self, port: u8, wanted: bool) {
        self.run();
        // Requests on the way would find one or the other.
        if self.asking.is_empty() {
            let port = 1 + port % PORTS;
            self.host.listen(port, wanted.then(|| self.type_of(port)));
        }
    }
}
