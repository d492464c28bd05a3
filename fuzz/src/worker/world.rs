//! A worker with its guest, its VMM and its host programs.

mod guest_side;
mod programs;

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::Read as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_backend::VringT;
use vhost_user_vsock::config::VmConfig;
use vhost_user_vsock::packet::header::{Cid, Op, VsockHeader};
use vhost_user_vsock::thread_backend::Types;
use vhost_user_vsock::vhost_user_vsock_thread::{
    Epoll, EventBuffer, GuestMemoryHandle, NUM_RINGS, RX_RING, TX_RING, VhostUserVsockThread,
    VsockVring, Wait,
};
use vhost_user_vsock::vsock_conn::ConnKey;

use super::super::memory::Memory;
use super::super::ring::{Layout, MAX_PACKET, Ring};
use super::conn::{Conn, MAX_READ, Promise, State};
use super::host::{Host, PORTS};
use super::{Setup, Step};

const CID: Cid = Cid::from_raw(4);

/// The first guest port that a host program asks for. Each asks for one of its own.
const FIRST_CLIENT: u32 = 10_000;

/// The first guest port that host programs ask for which leave at once. Each asks for one of its own.
const FIRST_DEPARTED: u32 = 20_000;

/// The first guest port of a flood of requests, and the host port that they are for, which is none that the daemon gives out.
/// Each is from a port of its own.
const FIRST_FLOOD: u32 = 50_000;
const NOBODY: u32 = 1000;

/// How many requests of floods may be unanswered at a time. So many resets wait for the guest as long as it takes.
const MAX_REFUSED: usize = 512;

/// How long an interrupt may take that may come later than the packets' return.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many turns a worker with nothing to do may take at most.
const MAX_TURNS: usize = 1000;

/// How many connections, clients without a CONNECT line and fresh starts of the driver an input has at most. They take much
/// longer than anything else, and more of them do nothing that these do not.
const MAX_CONNS: usize = 16;
const MAX_UNWELCOME: usize = 4;
const MAX_DEPARTED: u32 = 64;
const MAX_RESTARTS: usize = 4;

pub(super) struct World<'m> {
    memory: &'m Memory,
    host: &'m Host,
    /// The daemon's buffer for each connection.
    window: u32,
    worker: VhostUserVsockThread,
    epoll: Arc<Epoll>,
    events: EventBuffer,
    /// What the worker's last turn has asked for.
    wait: Wait,
    vrings: Vec<VsockVring>,
    /// The driver's side, and whether the VMM has stopped them.
    rings: [Ring<'m>; 2],
    paused: [bool; 2],
    /// The driver has asked for an interrupt, and nothing was returned to it before.
    armed: [bool; 2],
    /// Such an interrupt is still to come: one for the guest's packets has some time.
    owed: bool,
    conns: Vec<Conn>,
    /// Requests of the guest's that the worker has not taken yet: which connection, and which packet.
    asking: VecDeque<(usize, u64)>,
    sent: u64,
    consumed: u64,
    /// Answers that wait for room in the TX ring.
    replies: VecDeque<VsockHeader>,
    /// How many packets with these addresses and this type may still be answered with an RST, since there is no such connection.
    resets: HashMap<(ConnKey, u16), u32>,
    /// Requests of floods, each of which must be answered with one RST. How many there were.
    refused: HashSet<ConnKey>,
    floods: u32,
    /// Connections that host programs have asked for which were gone by then, as far as the guest knows them. How many there were.
    departed: HashSet<ConnKey>,
    departures: u32,
    /// Host programs that must be closed.
    unwelcome: Vec<UnixStream>,
    /// How many host programs have connected, whether some do so for messages, and whether others do so for streams.
    clients: u32,
    for_messages: bool,
    for_both: bool,
    /// Which host ports have listeners for messages, bit by bit.
    message_ports: u8,
    restarts: usize,
    is_eager: bool,
}

impl<'m> World<'m> {
    pub(super) fn new(setup: Setup, memory: &'m Memory, host: &'m Host) -> Self {
        let window = (u32::from(setup.tx_buffer_size) + 1) * (1 + u32::from(setup.factor) % 4);
        let config = VmConfig {
            tx_buffer_size: window,
            // Programs that are gone must not keep others out.
            max_connections: MAX_CONNS,
            busy_poll: Duration::ZERO,
            ..VmConfig::new(CID, "", host.uds_path())
        };
        let mut worker = VhostUserVsockThread::new(&config, host.entries()).unwrap();
        worker.set_types(Types {
            stream: true,
            seqpacket: true,
        });
        let handle = GuestMemoryHandle::new(memory.map().clone());
        worker.set_memory(handle.clone());
        worker.set_notify_on_empty(setup.notify_on_empty);
        let ring = |is_rx, size: u8| {
            Ring::new(memory, is_rx, 8 << (size % 3), setup.event_idx, setup.start)
        };
        let vrings = (0..NUM_RINGS).map(|_| {
            let vring = VsockVring::new(handle.clone(), 64).unwrap();
            vring.set_queue_event_idx(setup.event_idx);
            vring
        });
        let mut world = Self {
            memory,
            host,
            window,
            epoll: worker.epoll(),
            events: EventBuffer::default(),
            wait: Wait::ForEvents,
            worker,
            vrings: vrings.collect(),
            rings: [ring(true, setup.rx_size), ring(false, setup.tx_size)],
            paused: [true; 2],
            armed: [false; 2],
            owed: false,
            conns: Vec::new(),
            asking: VecDeque::new(),
            sent: 0,
            consumed: 0,
            replies: VecDeque::new(),
            resets: HashMap::new(),
            refused: HashSet::new(),
            floods: 0,
            departed: HashSet::new(),
            departures: 0,
            unwelcome: Vec::new(),
            clients: 0,
            for_messages: setup.factor & 0x80 != 0,
            for_both: setup.factor & 0x40 != 0,
            message_ports: setup.listening >> 4,
            restarts: 0,
            is_eager: setup.is_eager,
        };
        for port in 1..=PORTS {
            let is_open = setup.listening >> (port - 1) & 1 != 0;
            host.listen(port, is_open.then(|| world.type_of(port)));
        }
        world.start();
        world
    }

    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Run => self.run_step(),
            Step::Connect { pieces } => self.connect(pieces),
            Step::ConnectWithGarbage { text } => self.connect_with_garbage(text),
            Step::Listen { port } => self.listen(port, true),
            Step::Unlisten { port } => self.listen(port, false),
            Step::ProgramWrites { conn, len } => {
                self.with(conn, |conn| conn.program_writes(len.into()))
            }
            Step::ProgramReads { conn, len } => {
                self.with(conn, |conn| _ = conn.program_reads(len.into()));
            }
            Step::ProgramShuts { conn, reading } => {
                self.with(conn, |conn| conn.program_shuts(reading))
            }
            Step::ProgramCloses { conn } => self.with(conn, Conn::program_closes),
            Step::GuestAnswers { conn, accept } => self.answer(conn, accept),
            Step::GuestRequests { port, guest_port } => self.request(port, guest_port),
            Step::GuestWrites {
                conn,
                len,
                part,
                layout,
            } => self.write(conn, len, part, layout),
            Step::GuestOverruns { conn, more } => self.overrun(conn, more),
            Step::GuestTakes { conn, len } => self.update(conn, |conn| {
                conn.taken += (conn.to_guest.received - conn.taken).min(len.into());
            }),
            Step::GuestBuffer { conn, size } => {
                self.update(conn, |conn| conn.guest_window = size.into())
            }
            Step::GuestShuts { conn, flags } => self.shut(conn, flags),
            Step::GuestAborts { conn } => self.abort(conn),
            Step::GuestAsksForCredit { conn } => self.ask_for_credit(conn),
            Step::GuestSendsGarbage {
                conn,
                cid,
                kind,
                op,
                len,
            } => self.send_garbage(conn, [cid, kind, op, len]),
            Step::GuestOffers {
                buffers,
                len,
                layout,
            } => self.offer(1 + buffers % 8, len, layout),
            Step::GuestReceives => {
                self.receive();
            }
            Step::GuestOffersMalformed { is_rx, malformed } => {
                self.offer_malformed(is_rx, malformed)
            }
            Step::GuestWantsInterrupts { wanted } => self.arm(wanted),
            Step::Pause { is_rx } => self.pause(if is_rx { RX_RING } else { TX_RING }),
            Step::Restart { reset, breaks } => self.restart(reset, breaks),
            Step::GuestFloods { requests } => self.flood(requests),
            Step::GuestOffersHollow { buffers, len } => self.offer_hollow(1 + buffers % 8, len),
            Step::ClientsLeave { clients, is_known } => {
                self.clients_leave(1 + clients % 32, is_known)
            }
        }
    }
}

// The VMM.
impl World<'_> {
    fn start(&mut self) {
        for index in [RX_RING, TX_RING] {
            self.start_ring(index);
        }
        // Until the worker has seen that both rings are started, it closes clients.
        self.run();
    }

    fn start_ring(&mut self, index: usize) {
        let (ring, vring) = (&self.rings[index], &self.vrings[index]);
        let [desc, avail, used] = ring.addresses();
        let [kick, call, err] = ring.files();
        vring.set_queue_size(ring.size());
        vring.set_queue_info(desc, avail, used).unwrap();
        // Whatever base the VMM names, a ring starts at its used index. One that reconnects names this.
        vring.set_queue_next_avail(ring.avail_idx());
        vring.set_enabled(true);
        self.worker.set_call(index, Some(call));
        self.worker.set_err(index, Some(err));
        self.worker.set_kick(index, Some(kick));
        self.worker
            .start_ring(index, vring.get_mut().get_queue_mut());
        assert_eq!(vring.queue_next_avail(), ring.returned_idx());
        self.paused[index] = false;
    }

    fn stop_ring(&mut self, index: usize) {
        self.worker.stop_ring(index);
        self.paused[index] = true;
        self.armed[index] = false;
        self.owed &= index != TX_RING;
    }

    fn pause(&mut self, index: usize) {
        if self.paused[index] {
            self.start_ring(index);
        } else {
            self.stop_ring(index);
        }
    }

    /// The guest's driver starts afresh, which ends all connections.
    fn restart(&mut self, reset: bool, breaks: u8) {
        if self.restarts == MAX_RESTARTS {
            return;
        }
        self.restarts += 1;
        self.run();
        let has_all_packets = self.sent == self.consumed;
        if breaks % 3 == 1 && !self.paused[TX_RING] {
            self.rings[TX_RING].break_it();
            self.rings[TX_RING].kick_anyway();
            self.run();
            assert!(self.rings[TX_RING].is_reported_broken());
        }
        let positions = [RX_RING, TX_RING].map(|index| self.vrings[index].queue_next_avail());
        for index in [RX_RING, TX_RING] {
            self.stop_ring(index);
        }
        // A driver that starts where the one before has left off can't be told from it.
        if reset || positions == [0, 0] {
            self.worker.reset();
        }
        (self.sent, self.consumed) = (0, 0);
        self.asking.clear();
        self.replies.clear();
        self.resets.clear();
        self.refused.clear();
        self.departed.clear();
        for conn in &mut self.conns {
            conn.abort();
            // An RST for a message that is too long may have been in the ring.
            if !has_all_packets || conn.is_next_too_long() {
                conn.promise = Promise::Prefix;
            }
            if conn.state != State::Unknown {
                conn.end();
            }
        }
        self.rings.iter_mut().for_each(|ring| ring.begin(0));
        self.start();
    }
}

// The worker.
impl World<'_> {
    /// Lets the worker take its turns until nothing wakes it any more.
    fn run(&mut self) {
        for _ in 0..MAX_TURNS {
            self.epoll.wait(&mut self.events, Wait::Not);
            if self.events.is_empty() && self.wait == Wait::ForEvents {
                return;
            }
            self.turn();
        }
        panic!("the worker never sleeps");
    }

    fn run_step(&mut self) {
        self.run();
        if self.is_eager {
            self.receive_all();
            for index in 0..self.conns.len() {
                self.answer(index as u8, true);
            }
        }
    }

    fn turn(&mut self) {
        if self.sent == self.consumed
            && self.replies.is_empty()
            && !self.rings[RX_RING].has_returned()
        {
            self.conns.iter_mut().for_each(Conn::settle_credit);
        }
        self.worker.take_events(&self.events);
        self.wait = self.worker.turn(&self.vrings);
        let [rx, tx] = &self.rings;
        if rx.has_returned() && std::mem::take(&mut self.armed[RX_RING]) {
            assert!(rx.is_interrupted(), "an interrupt is missing");
        }
        self.owed |= tx.has_returned() && std::mem::take(&mut self.armed[TX_RING]);
        self.owed &= !tx.is_interrupted();
        while let Some(returned) = self.rings[TX_RING].take() {
            self.consumed += u64::from(returned.is_sound);
        }
        while let Some((index, packet)) = self.asking.front().copied()
            && packet < self.consumed
        {
            self.asking.pop_front();
            self.accept(index);
        }
        self.check_resets();
        self.send_replies();
    }

    /// A host program takes the connection that the worker has made for this request, if it has made one.
    fn accept(&mut self, index: usize) {
        let conn = &mut self.conns[index];
        let port = conn.key.peer.port.0 as u8;
        conn.program = self.host.accept(port, conn.key.packet_type);
        conn.is_accepted = conn.program.is_some();
        assert_eq!(
            conn.is_accepted,
            self.host.listens(port, conn.key.packet_type),
            "who listens gets connections"
        );
    }

    /// Where a host program sees that the guest has closed, the RST which frees the guest's ports is in the RX ring already. Which
    /// of both the worker does first within a turn is not seen here.
    fn check_resets(&mut self) {
        let can_receive = !self.paused[RX_RING] && self.rings[RX_RING].has_unreturned();
        for index in 0..self.conns.len() {
            let conn = &mut self.conns[index];
            let Some(program) = conn.program.as_ref().filter(|_| {
                conn.awaits_reset() && conn.program_shutdown.is_empty() && !conn.ends_early
            }) else {
                continue;
            };
            let mut fds = [PollFd::new(program.as_fd(), PollFlags::empty())];
            if poll(&mut fds, PollTimeout::ZERO).unwrap() == 0 {
                continue;
            }
            if can_receive {
                self.receive();
                assert_eq!(self.conns[index].state, State::Over, "no RST in the ring");
            } else {
                conn.ends_early = true;
            }
        }
    }
}

// All come to rest.
impl World<'_> {
    /// The guest takes all packets. False when it can't.
    fn sync(&mut self) -> bool {
        if self.paused != [false; 2] {
            return false;
        }
        self.run();
        while self.receive_all() {}
        self.resets.clear();
        self.check_refused();
        true
    }

    /// The guest is interrupted for its packets in time.
    fn await_interrupt(&mut self) {
        let begin = Instant::now();
        while self.owed {
            self.run();
            assert!(begin.elapsed() < PATIENCE, "an interrupt is missing");
        }
    }

    /// Every request of a flood was answered.
    fn check_refused(&self) {
        let lost = self.refused.len();
        assert!(lost == 0, "{lost} requests without an answer");
    }

    fn receive_all(&mut self) -> bool {
        let mut received = self.receive();
        self.arm(true);
        self.offer(32, MAX_PACKET as u16 - 45, Layout::PLAIN);
        self.run();
        received |= self.receive();
        received
    }

    /// Both sides take what there is until nothing happens any more. Then everything that was promised has come.
    pub(super) fn settle(&mut self) {
        for index in [RX_RING, TX_RING] {
            if self.paused[index] {
                self.pause(index);
            }
        }
        self.run();
        loop {
            let mut progress = self.receive_all();
            for index in 0..self.conns.len() {
                progress |= self.serve(index);
            }
            if !progress {
                break;
            }
        }
        assert!(
            self.asking.is_empty() && self.replies.is_empty(),
            "the guest's packets are not taken"
        );
        self.await_interrupt();
        self.check_refused();
        self.check_places();
        self.conns.iter().for_each(Conn::check_settled);
        for program in &mut self.unwelcome {
            let read = program.read(&mut [0]);
            let is_gone = read.as_ref().map_or_else(
                |error| error.kind() == std::io::ErrorKind::ConnectionReset,
                |count| *count == 0,
            );
            assert!(is_gone, "not closed: {read:?}");
        }
        let writable: Vec<_> = self.rings.iter().flat_map(Ring::writable).collect();
        self.memory.check(&writable);
    }

    /// Host programs that were gone before the guest has answered take no place, and neither does what is over.
    fn check_places(&self) {
        let departed = self.departed.len();
        assert!(
            departed == 0,
            "{departed} connections of programs that are gone"
        );
        let (_, taken) = self.worker.status();
        let open = self.conns.iter().filter(|conn| conn.state != State::Over);
        assert!(taken <= open.count(), "{taken} places are taken");
    }

    /// Both ends of a connection take what there is. False when there is nothing.
    fn serve(&mut self, index: usize) -> bool {
        let mut progress = self.conns[index].program_reads(MAX_READ) > 0;
        if !self.make_room() {
            return progress;
        }
        let conn = &mut self.conns[index];
        if conn.state == State::Asked {
            conn.state = State::Open;
            self.send_for(index, Op::Response, |_| {});
            progress = true;
        } else if conn.state == State::Open
            && (conn.taken, conn.guest_window) != (conn.to_guest.received, 1 << 16)
        {
            (conn.taken, conn.guest_window) = (conn.to_guest.received, 1 << 16);
            self.send_for(index, Op::CreditUpdate, |_| {});
            progress = true;
        }
        progress
    }
}
