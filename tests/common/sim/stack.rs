//! The guest's socket layer: many streams over one simulated guest, each with correct credit
//! (virtio 1.2 §5.10.6.3). A thread of its own takes the packets; streams block with bounded patience.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{JoinHandle, spawn};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::guest::{RX, SimGuest, TX};
use super::packet::{EOM, Flow, HOST_CID, NO_RECEIVE, NO_SEND, Op, Packet, SEQPACKET, STREAM};
use crate::common::daemon::PATIENCE;

/// The guest's port, the peer's CID and its port.
type Key = (u32, u64, u32);

fn key_of(flow: &Flow) -> Key {
    (flow.guest_port, flow.peer_cid, flow.host_port)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Asked,
    Open,
    /// SHUTDOWN 3 sent; the peer's RST is pending.
    Closing,
    Gone,
}

struct Conn {
    flow: Flow,
    phase: Phase,
    received: VecDeque<u8>,
    /// Whole messages, and the beginning of one.
    messages: VecDeque<Vec<u8>>,
    partial: Vec<u8>,
    rx_cnt: u32,
    last_sent_fwd_cnt: u32,
    peer_alloc: u32,
    peer_fwd: u32,
    tx_cnt: u32,
    peer_shutdown: u32,
    aborted: bool,
}

impl Conn {
    fn new(flow: Flow, phase: Phase) -> Self {
        Self {
            flow,
            phase,
            received: VecDeque::new(),
            messages: VecDeque::new(),
            partial: Vec::new(),
            rx_cnt: 0,
            last_sent_fwd_cnt: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            tx_cnt: 0,
            peer_shutdown: 0,
            aborted: false,
        }
    }

    fn has_unread(&self) -> bool {
        !self.received.is_empty() || !self.messages.is_empty()
    }

    /// The credit left: the peer's, capped by our own buffer if configured.
    fn credit(&self, cap: bool) -> u32 {
        let alloc = if cap {
            self.peer_alloc.min(self.flow.buf_alloc)
        } else {
            self.peer_alloc
        };
        alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd))
    }

    /// Whether the peer believes that less than half of our buffer is free, although more is.
    fn update_due(&self) -> bool {
        let unread = self
            .rx_cnt
            .wrapping_sub(self.last_sent_fwd_cnt)
            .min(self.flow.buf_alloc);
        let (believed, all) = (
            u64::from(self.flow.buf_alloc - unread),
            u64::from(self.flow.buf_alloc),
        );
        self.phase == Phase::Open
            && 2 * believed < all
            && self.flow.fwd_cnt != self.last_sent_fwd_cnt
    }
}

struct State {
    guest: SimGuest,
    conns: HashMap<Key, Conn>,
    /// Connections waiting in accept, by listening port.
    listeners: HashMap<u32, VecDeque<Key>>,
    control: VecDeque<Packet>,
    next_port: u32,
    paused: bool,
    stop: bool,
    failure: Option<String>,
    updates_sent: u64,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

/// The sockets of a simulated guest.
pub struct GuestStack {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// One stream of it.
pub struct GuestStream {
    shared: Arc<Shared>,
    key: Key,
}

impl GuestStack {
    /// Serves the sockets of `guest`.
    pub fn new(guest: SimGuest) -> Self {
        let state = State {
            guest,
            conns: HashMap::new(),
            listeners: HashMap::new(),
            control: VecDeque::new(),
            next_port: 50_000,
            paused: false,
            stop: false,
            failure: None,
            updates_sent: 0,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap(),
        });
        let of_thread = shared.clone();
        let thread = Some(spawn(move || of_thread.serve()));
        Self { shared, thread }
    }

    /// Listens on a guest port.
    pub fn listen(&self, port: u32) {
        self.shared.lock().listeners.insert(port, VecDeque::new());
    }

    /// The next connection made to `port`.
    #[track_caller]
    pub fn accept(&self, port: u32) -> GuestStream {
        self.try_accept(port)
            .expect("nobody connected to the guest")
    }

    /// The next connection made to `port`; none when nobody comes in time, or the VMM is killed.
    pub fn try_accept(&self, port: u32) -> Option<GuestStream> {
        let key = self.shared.wait(|state| {
            let waiting = state.listeners.get_mut(&port)?.pop_front();
            (waiting.is_some() || state.stop).then_some(waiting)
        })??;
        Some(GuestStream {
            shared: self.shared.clone(),
            key,
        })
    }

    /// The next connection made to `port`, if one waits.
    pub fn poll_accept(&self, port: u32) -> Option<GuestStream> {
        let key = self.shared.lock().listeners.get_mut(&port)?.pop_front()?;
        Some(GuestStream {
            shared: self.shared.clone(),
            key,
        })
    }

    /// Connects to a host port.
    pub fn connect(&self, port: u32) -> io::Result<GuestStream> {
        self.connect_to(HOST_CID, port)
    }

    /// Connects to a port of any CID.
    pub fn connect_to(&self, cid: u64, port: u32) -> io::Result<GuestStream> {
        self.connect_for(STREAM, cid, port)
    }

    /// Connects to a port of any CID, for messages.
    pub fn connect_for_messages_to(&self, cid: u64, port: u32) -> io::Result<GuestStream> {
        self.connect_for(SEQPACKET, cid, port)
    }

    fn connect_for(&self, kind: u16, cid: u64, port: u32) -> io::Result<GuestStream> {
        let stream = self.request(kind, cid, port)?;
        self.shared.wake();
        self.answered(stream)
    }

    /// Connects to a host port so many times at once. Returns the connections that were accepted; all others were refused.
    pub fn connect_many(&self, port: u32, count: usize) -> io::Result<Vec<GuestStream>> {
        self.connect_many_to(HOST_CID, port, count)
    }

    /// The same for a port of any CID.
    pub fn connect_many_to(
        &self,
        cid: u64,
        port: u32,
        count: usize,
    ) -> io::Result<Vec<GuestStream>> {
        let requests = (0..count).map(|_| self.request(STREAM, cid, port));
        let requests = requests.collect::<io::Result<Vec<_>>>()?;
        self.shared.wake();
        let answers = requests.into_iter().map(|stream| self.answered(stream));
        let accepted = answers.filter(
            |answer| !matches!(answer, Err(error) if error.kind() == ErrorKind::ConnectionRefused),
        );
        accepted.collect()
    }

    fn request(&self, kind: u16, cid: u64, port: u32) -> io::Result<GuestStream> {
        let mut state = self.shared.lock();
        if state.stop {
            return Err(ErrorKind::NotConnected.into());
        }
        state.next_port += 1;
        let flow = Flow {
            guest_cid: state.guest.setup.cid,
            peer_cid: cid,
            kind,
            buf_alloc: state.guest.setup.buf_alloc,
            ..Flow::new(state.next_port, port)
        };
        let key = key_of(&flow);
        state.control.push_back(flow.packet(Op::Request));
        state.conns.insert(key, Conn::new(flow, Phase::Asked));
        Ok(GuestStream {
            shared: self.shared.clone(),
            key,
        })
    }

    fn answered(&self, stream: GuestStream) -> io::Result<GuestStream> {
        let key = stream.key;
        let answered = self
            .shared
            .wait(|state| (state.conns.get(&key)?.phase != Phase::Asked).then_some(()));
        if answered.is_none() {
            return Err(ErrorKind::TimedOut.into());
        }
        let was_open = {
            let conn = &self.shared.lock().conns[&key];
            // It may have ended again since.
            conn.phase == Phase::Open || conn.aborted || conn.peer_shutdown != 0
        };
        if was_open {
            Ok(stream)
        } else {
            Err(ErrorKind::ConnectionRefused.into())
        }
    }

    /// Works on the guest itself while no packet is taken or sent.
    pub fn with_guest<T>(&self, work: impl FnOnce(&mut SimGuest) -> T) -> T {
        let result = work(&mut self.shared.lock().guest);
        self.shared.wake();
        result
    }

    /// Stops the rings, as a paused VM does; what the streams send meanwhile is queued in the TX ring.
    pub fn pause(&self) {
        let mut state = self.shared.lock();
        state.paused = true;
        state.guest.stop_rings();
    }

    /// Starts them again where they stopped.
    pub fn resume(&self) {
        let mut state = self.shared.lock();
        state.paused = false;
        state.guest.start_rings();
        drop(state);
        self.shared.wake();
    }

    /// Boots again: the rings start afresh, and no stream goes on. Who listened listens.
    pub fn reboot(&self) {
        let mut state = self.shared.lock();
        state.forget_streams();
        state.control.clear();
        state.guest.stop_rings();
        state.guest.restart_fresh();
        drop(state);
        self.shared.wake();
        self.shared.changed.notify_all();
    }

    /// Kills the VMM: its connection to the daemon is cut, and every stream with it.
    pub fn kill(&self) {
        let mut state = self.shared.lock();
        state.stop = true;
        // An error means that the daemon closed first.
        let _ = state.guest.frontend.stream().shutdown(Shutdown::Both);
        state.forget_streams();
        drop(state);
        self.shared.wake();
        self.shared.changed.notify_all();
    }

    /// How many connections are not gone.
    pub fn open_connections(&self) -> usize {
        let state = self.shared.lock();
        state
            .conns
            .values()
            .filter(|conn| conn.phase != Phase::Gone)
            .count()
    }

    /// How many CREDIT_UPDATEs the guest has sent.
    pub fn updates_sent(&self) -> u64 {
        self.shared.lock().updates_sent
    }
}

impl Drop for GuestStack {
    fn drop(&mut self) {
        if let Ok(mut state) = self.shared.state.lock() {
            state.stop = true;
        }
        self.shared.wake();
        let ended = self.thread.take().map(JoinHandle::join);
        if matches!(ended, Some(Err(_))) && !std::thread::panicking() {
            panic!("the guest's thread panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.state.lock().expect("the guest's thread panicked");
        assert!(state.failure.is_none(), "{:?}", state.failure);
        state
    }

    fn wake(&self) {
        let _ = self.wake.write(1);
    }

    /// Waits until `ready` gives something; None when it does not in time.
    fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            if let Some(result) = ready(&mut state) {
                return Some(result);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .expect("the guest's thread panicked")
                .0;
            assert!(state.failure.is_none(), "{:?}", state.failure);
        }
    }

    /// The thread: takes packets and returned buffers, only on interrupts.
    fn serve(&self) {
        loop {
            let mut state = self.state.lock().unwrap();
            if state.stop {
                return;
            }
            let more = state.turn();
            let fds = [RX, TX].map(|i| {
                state.guest.rings[i]
                    .call_fd
                    .as_fd()
                    .try_clone_to_owned()
                    .unwrap()
            });
            drop(state);
            self.changed.notify_all();
            if more {
                continue;
            }
            let mut polled = [fds[0].as_fd(), fds[1].as_fd(), self.wake.as_fd()]
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            poll(&mut polled, PollTimeout::NONE).unwrap();
            let _ = self.wake.read();
        }
    }
}

impl State {
    /// Does what there is to do; true when there is more.
    fn turn(&mut self) -> bool {
        if self.paused {
            // The device may not touch the rings: nothing can have come.
            self.flush_control();
            return false;
        }
        for index in [RX, TX] {
            self.guest.rings[index].drain_call();
        }
        while let Some(packet) = self.guest.poll_packet() {
            self.take(&packet);
        }
        self.guest.reclaim_tx();
        self.flush_control();
        let rx = self.guest.rings[RX].arm();
        rx | self.guest.rings[TX].arm()
    }

    fn forget_streams(&mut self) {
        for conn in self.conns.values_mut() {
            conn.aborted |= conn.phase == Phase::Open;
            conn.phase = Phase::Gone;
        }
        self.listeners.values_mut().for_each(VecDeque::clear);
    }

    fn flush_control(&mut self) {
        let (layout, indirect) = (self.guest.setup.tx, self.guest.setup.indirect);
        while let Some(packet) = self.control.front() {
            if !self.guest.try_send(packet, layout, indirect) {
                break;
            }
            self.control.pop_front();
        }
        self.guest.rings[TX].kick_if_needed();
    }

    fn take(&mut self, packet: &Packet) {
        let key = key_of(&Flow::of(packet));
        if packet.is(Op::Request)
            && !self
                .conns
                .get(&key)
                .is_some_and(|conn| conn.phase != Phase::Gone)
        {
            return self.take_request(packet);
        }
        match self.conns.get_mut(&key) {
            Some(conn) if conn.phase != Phase::Gone => {
                conn.peer_alloc = packet.buf_alloc;
                conn.peer_fwd = packet.fwd_cnt;
                self.take_known(key, packet);
            }
            _ if packet.is(Op::Rst) => (),
            _ => self.control.push_back(Flow::of(packet).packet(Op::Rst)),
        }
    }

    fn take_request(&mut self, packet: &Packet) {
        let mut flow = Flow::of(packet);
        flow.buf_alloc = self.guest.setup.buf_alloc;
        let key = key_of(&flow);
        let Some(backlog) = self.listeners.get_mut(&flow.guest_port) else {
            return self.control.push_back(flow.packet(Op::Rst));
        };
        backlog.push_back(key);
        self.control.push_back(flow.packet(Op::Response));
        let mut conn = Conn::new(flow, Phase::Open);
        (conn.peer_alloc, conn.peer_fwd) = (packet.buf_alloc, packet.fwd_cnt);
        self.conns.insert(key, conn);
    }

    fn take_known(&mut self, key: Key, packet: &Packet) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        if conn.tx_cnt.wrapping_sub(conn.peer_fwd) > u32::MAX / 2 {
            self.failure = Some(format!(
                "the daemon claims bytes that were not sent: {packet:?}"
            ));
            return;
        }
        match packet.op {
            op if op == Op::Response as u16 => conn.phase = Phase::Open,
            op if op == Op::Rst as u16 => {
                conn.aborted =
                    conn.phase == Phase::Open && conn.peer_shutdown != NO_RECEIVE | NO_SEND;
                conn.phase = Phase::Gone;
            }
            op if op == Op::Shutdown as u16 => {
                conn.peer_shutdown |= packet.flags;
                self.confirm_end(key);
            }
            op if op == Op::Rw as u16 => self.take_bytes(key, packet),
            op if op == Op::CreditRequest as u16 => self.send_credit_update(key),
            op if op == Op::CreditUpdate as u16 => (),
            op => self.failure = Some(format!("op {op} from the daemon")),
        }
    }

    fn take_bytes(&mut self, key: Key, packet: &Packet) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        if packet.payload.is_empty() || conn.peer_shutdown & NO_SEND != 0 {
            self.failure = Some(format!("no bytes, or bytes after the end: {packet:?}"));
            return;
        }
        conn.rx_cnt = conn.rx_cnt.wrapping_add(packet.len);
        if conn.rx_cnt.wrapping_sub(conn.last_sent_fwd_cnt) > conn.flow.buf_alloc {
            self.failure = Some(format!("more than the credit given: {packet:?}"));
        }
        if packet.flags & !(if packet.kind == SEQPACKET { EOM } else { 0 }) != 0 {
            self.failure = Some(format!("flags: {packet:?}"));
        } else if conn.phase == Phase::Open && packet.kind == SEQPACKET {
            conn.partial.extend(&packet.payload);
            if packet.flags == EOM {
                conn.messages.push_back(std::mem::take(&mut conn.partial));
            }
        } else if conn.phase == Phase::Open {
            conn.received.extend(&packet.payload);
        }
    }

    /// A peer that has shut down both ways gets its RST once all was read (§5.10.6.5).
    fn confirm_end(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        let over = conn.peer_shutdown == NO_RECEIVE | NO_SEND;
        if over && !conn.has_unread() && matches!(conn.phase, Phase::Open | Phase::Closing) {
            conn.phase = Phase::Gone;
            self.control.push_back(conn.flow.packet(Op::Rst));
        }
    }

    fn send_credit_update(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        conn.last_sent_fwd_cnt = conn.flow.fwd_cnt;
        self.updates_sent += 1;
        self.control.push_back(conn.flow.packet(Op::CreditUpdate));
    }

    /// Sends what credit and the ring allow; None when that is nothing yet.
    fn send_some(&mut self, key: Key, bytes: &[u8]) -> Option<io::Result<usize>> {
        let setup = &self.guest.setup;
        let (layout, indirect) = (setup.tx, setup.indirect);
        let (cap, most) = (setup.cap_in_flight, setup.tx_payload);
        let conn = self.conns.get_mut(&key)?;
        if conn.phase != Phase::Open || conn.peer_shutdown & NO_RECEIVE != 0 {
            return Some(Err(ErrorKind::BrokenPipe.into()));
        }
        let len = bytes.len().min(conn.credit(cap) as usize).min(most);
        if len == 0 || !self.control.is_empty() {
            return None;
        }
        let mut packet = conn.flow.rw(&bytes[..len]);
        if conn.flow.kind == SEQPACKET && len == bytes.len() {
            packet.flags = EOM;
        }
        if !self.guest.try_send(&packet, layout, indirect) {
            return None;
        }
        conn.tx_cnt = conn.tx_cnt.wrapping_add(len as u32);
        conn.last_sent_fwd_cnt = conn.flow.fwd_cnt;
        self.guest.rings[TX].kick_if_needed();
        Some(Ok(len))
    }

    /// The next whole message; one of no bytes at the end.
    fn take_message(&mut self, key: Key) -> Option<io::Result<Vec<u8>>> {
        let conn = self.conns.get_mut(&key)?;
        let Some(message) = conn.messages.pop_front() else {
            if conn.aborted {
                return Some(Err(ErrorKind::ConnectionReset.into()));
            }
            let over = conn.peer_shutdown & NO_SEND != 0 || conn.phase != Phase::Open;
            return over.then_some(Ok(Vec::new()));
        };
        let taken = message.len() as u32;
        conn.flow.fwd_cnt = conn.flow.fwd_cnt.wrapping_add(taken);
        // The next message may need all of the buffer. Linux tells of each.
        if conn.phase == Phase::Open {
            self.send_credit_update(key);
        }
        self.confirm_end(key);
        self.flush_control();
        Some(Ok(message))
    }

    fn take_received(&mut self, key: Key, into: &mut [u8]) -> Option<io::Result<usize>> {
        let conn = self.conns.get_mut(&key)?;
        if conn.received.is_empty() {
            if conn.aborted {
                return Some(Err(ErrorKind::ConnectionReset.into()));
            }
            let over = conn.peer_shutdown & NO_SEND != 0 || conn.phase != Phase::Open;
            return over.then_some(Ok(0));
        }
        let len = conn.received.read(into).unwrap();
        conn.flow.fwd_cnt = conn.flow.fwd_cnt.wrapping_add(len as u32);
        if conn.update_due() {
            self.send_credit_update(key);
        }
        self.confirm_end(key);
        self.flush_control();
        Some(Ok(len))
    }
}

impl GuestStream {
    /// The guest's and the host's port.
    pub fn ports(&self) -> (u32, u32) {
        (self.key.0, self.key.2)
    }

    /// The CID of the other end.
    pub fn peer_cid(&self) -> u64 {
        self.key.1
    }

    /// Another handle of the same stream.
    pub fn handle(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            key: self.key,
        }
    }

    /// Sends a message, in as many packets as credit and the guest's limit of a packet make of it.
    pub fn send_message(&self, message: &[u8]) -> io::Result<()> {
        let mut rest = message;
        while !rest.is_empty() {
            let sent = self.shared.wait(|state| state.send_some(self.key, rest));
            let sent = sent.unwrap_or_else(|| Err(ErrorKind::TimedOut.into()))?;
            rest = &rest[sent..];
        }
        Ok(())
    }

    /// Receives a message; one of no bytes at the end.
    pub fn recv_message(&self) -> io::Result<Vec<u8>> {
        let done = self.shared.wait(|state| state.take_message(self.key));
        done.unwrap_or_else(|| Err(ErrorKind::TimedOut.into()))
    }

    fn control(&self, make: impl FnOnce(&mut Conn) -> Option<Packet>) {
        let mut state = self.shared.lock();
        let made = state.conns.get_mut(&self.key).and_then(|conn| {
            let packet = make(conn)?;
            conn.last_sent_fwd_cnt = packet.fwd_cnt;
            Some(packet)
        });
        state.control.extend(made);
        drop(state);
        self.shared.wake();
    }

    /// Shuts down by these flags; the stream stays.
    pub fn shutdown(&self, flags: u32) {
        self.control(|conn| (conn.phase == Phase::Open).then(|| conn.flow.shutdown(flags)));
    }

    /// Closes: SHUTDOWN 3, which the daemon confirms with RST.
    pub fn close(&self) {
        self.control(|conn| {
            let open = conn.phase == Phase::Open;
            open.then(|| {
                conn.phase = Phase::Closing;
                conn.flow.shutdown(NO_RECEIVE | NO_SEND)
            })
        });
    }

    /// Aborts: RST.
    pub fn reset(&self) {
        self.control(|conn| {
            conn.phase = Phase::Gone;
            Some(conn.flow.packet(Op::Rst))
        });
    }

    /// Waits until the connection is gone: reset by the daemon, or by ourselves in answer to its close.
    #[track_caller]
    pub fn wait_gone(&self) {
        assert!(self.is_gone(), "the connection {:?} stays", self.key);
    }

    /// As `wait_gone`, and says whether it is.
    pub fn is_gone(&self) -> bool {
        let gone =
            |state: &mut State| (state.conns.get(&self.key)?.phase == Phase::Gone).then_some(());
        self.shared.wait(gone).is_some()
    }
}

impl Read for GuestStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let key = self.key;
        let done = self.shared.wait(|state| state.take_received(key, into));
        done.unwrap_or_else(|| Err(ErrorKind::TimedOut.into()))
    }
}

impl Write for GuestStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let key = self.key;
        let done = self.shared.wait(|state| state.send_some(key, bytes));
        done.unwrap_or_else(|| Err(ErrorKind::TimedOut.into()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
