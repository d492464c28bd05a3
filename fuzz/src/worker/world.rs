//! A worker with its guest, its VMM and its host programs.

mod guest_side;

use std::collections::{HashMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;
use vhost_user_backend::VringT;
use vhost_user_vsock::config::{Socket, SocketAccess, VmConfig};
use vhost_user_vsock::host::listener::connect_at_once;
use vhost_user_vsock::packet::header::{Cid, GuestPort, HostPort, Op, VsockHeader};
use vhost_user_vsock::vhost_user_vsock_thread::{RX_RING, TX_RING, VhostUserVsockThread};
use vhost_user_vsock::vhu_vsock::vring::{GuestMemoryHandle, VsockVring};
use vhost_user_vsock::vsock_conn::ConnKey;

use super::super::memory::Memory;
use super::super::ring::{Layout, MAX_PACKET, Ring};
use super::end::{End, Promise, State};
use super::{Setup, Step};

const CID: Cid = Cid(4);

/// How many host ports may have a listener, from 1 on.
const PORTS: u8 = 4;

/// The first guest port that a host program asks for. Each asks for one of its own.
const FIRST_CLIENT: u32 = 10_000;

/// How often something may wake a worker that has nothing to do.
const MAX_TURNS: usize = 1000;

pub(super) struct World<'m> {
    memory: &'m Memory,
    folder: TempDir,
    window: u32,
    worker: VhostUserVsockThread,
    vrings: Vec<VsockVring>,
    /// The driver's side, and whether the VMM has stopped them.
    rings: [Ring<'m>; 2],
    paused: [bool; 2],
    /// The driver has asked for an interrupt, and nothing was returned to it before.
    armed: [bool; 2],
    listeners: [Option<UnixListener>; PORTS as usize],
    ends: Vec<End>,
    /// Requests of the guest's that the worker has not taken yet, and which packet each is.
    asking: VecDeque<(usize, u64)>,
    sent: u64,
    consumed: u64,
    /// Answers that wait for room in the TX ring.
    replies: VecDeque<VsockHeader>,
    /// How often the guest may be told that a connection is none.
    resets: HashMap<ConnKey, u32>,
    /// Host programs that must be sent away.
    babblers: Vec<UnixStream>,
    scratch: Vec<u8>,
    is_eager: bool,
}

impl<'m> World<'m> {
    pub(super) fn new(setup: Setup, memory: &'m Memory) -> Self {
        let folder = TempDir::new().unwrap();
        let window = (u32::from(setup.tx_buffer_size) + 1) * (1 + u32::from(setup.factor) % 4);
        let config = VmConfig {
            guest_cid: CID,
            socket: Socket::Path(folder.path().join("vhost")),
            uds_path: folder.path().join("vsock"),
            uds_fd: None,
            tx_buffer_size: window,
            queue_size: 64,
            max_connections: 1024,
            busy_poll: Duration::ZERO,
            access: SocketAccess::default(),
        };
        let listener = UnixListener::bind(&config.uds_path).unwrap();
        let mut worker = VhostUserVsockThread::new(&config, listener).unwrap();
        let handle = GuestMemoryHandle::new(memory.map().clone());
        worker.set_memory(handle.clone());
        worker.set_notify_on_empty(setup.notify_on_empty);
        let ring = |is_rx, size: u8| {
            Ring::new(memory, is_rx, 8 << (size % 3), setup.event_idx, setup.start)
        };
        let vrings = (0..3).map(|_| VsockVring::new(handle.clone(), 64).unwrap());
        let mut world = Self {
            memory,
            folder,
            window,
            worker,
            vrings: vrings.collect(),
            rings: [ring(true, setup.rx_size), ring(false, setup.tx_size)],
            paused: [true; 2],
            armed: [false; 2],
            listeners: Default::default(),
            ends: Vec::new(),
            asking: VecDeque::new(),
            sent: 0,
            consumed: 0,
            replies: VecDeque::new(),
            resets: HashMap::new(),
            babblers: Vec::new(),
            scratch: vec![0; 1 << 18],
            is_eager: setup.is_eager,
        };
        for index in [RX_RING, TX_RING] {
            world.vrings[index].set_queue_event_idx(setup.event_idx);
            world.start_ring(index, setup.start);
        }
        for port in 0..PORTS {
            world.listen(port, setup.listening >> port & 1 != 0);
        }
        world
    }

    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Run => self.run_step(),
            Step::Connect { pieces } => self.connect(pieces),
            Step::Babble { text } => self.babble(text),
            Step::Listen { port } => self.listen(port, true),
            Step::Unlisten { port } => self.listen(port, false),
            Step::ProgramWrites { end, len } => {
                self.with(end, |end| end.program_writes(len.into()))
            }
            Step::ProgramReads { end, len } => self.program_reads(end, len),
            Step::ProgramShuts { end, reading } => self.with(end, |end| end.program_shuts(reading)),
            Step::ProgramCloses { end } => self.with(end, End::program_closes),
            Step::GuestAnswers { end, accept } => self.answer(end, accept),
            Step::GuestRequests { port, guest_port } => self.request(port, guest_port),
            Step::GuestWrites {
                end,
                len,
                part,
                layout,
            } => self.write(end, len, part, layout),
            Step::GuestOverruns { end, more } => self.overrun(end, more),
            Step::GuestTakes { end, len } => self.update(end, |end| {
                end.taken += (end.to_guest.received - end.taken).min(len.into());
            }),
            Step::GuestBuffer { end, size } => {
                self.update(end, |end| end.guest_window = size.into())
            }
            Step::GuestShuts { end, flags } => self.shut(end, flags),
            Step::GuestAborts { end } => self.abort(end),
            Step::GuestAsks { end } => self.ask(end),
            Step::GuestBabbles {
                end,
                cid,
                kind,
                op,
                len,
            } => self.guest_babbles(end, [cid, kind, op, len]),
            Step::GuestOffers {
                buffers,
                len,
                layout,
            } => self.offer(1 + buffers % 8, len, layout),
            Step::GuestReceives => {
                self.receive();
            }
            Step::GuestOffersNonsense { is_rx, nonsense } => self.offer_nonsense(is_rx, nonsense),
            Step::GuestWantsInterrupts { wanted } => self.arm(wanted),
            Step::Pause { is_rx } => self.pause(if is_rx { RX_RING } else { TX_RING }),
            Step::Restart { reset, breaks } => self.restart(reset, breaks),
        }
    }

    // The VMM.

    fn start_ring(&mut self, index: usize, base: u16) {
        let [desc, avail, used] = self.rings[index].addresses();
        let [kick, call, err] = self.rings[index].files();
        let vring = &self.vrings[index];
        vring.set_queue_size(self.rings[index].size());
        vring.set_queue_info(desc, avail, used).unwrap();
        vring.set_queue_next_avail(base);
        vring.set_queue_next_used(vring.queue_used_idx().unwrap());
        vring.set_enabled(true);
        vring.set_call(Some(call));
        vring.set_err(Some(err));
        vring.set_kick(Some(kick));
        vring.set_queue_ready(true);
        self.paused[index] = false;
        self.turn();
    }

    fn stop_ring(&mut self, index: usize) {
        let vring = &self.vrings[index];
        vring.set_queue_ready(false);
        self.worker.stop_ring(index);
        vring.set_kick(None);
        vring.set_call(None);
        self.paused[index] = true;
        self.armed[index] = false;
    }

    fn pause(&mut self, index: usize) {
        if self.paused[index] {
            self.start_ring(index, self.vrings[index].queue_next_avail());
        } else {
            self.stop_ring(index);
        }
    }

    /// The guest's driver begins anew: with what was, it is over.
    fn restart(&mut self, reset: bool, breaks: u8) {
        self.run();
        let was_heard = self.sent == self.consumed;
        if breaks % 3 == 1 && !self.paused[TX_RING] {
            self.rings[TX_RING].break_it();
            self.rings[TX_RING].kick_anyway();
            self.run();
            assert!(self.rings[TX_RING].is_reported_broken());
        }
        let bases = [RX_RING, TX_RING].map(|index| self.vrings[index].queue_next_avail());
        for index in [RX_RING, TX_RING] {
            self.stop_ring(index);
        }
        // A driver that begins where the one before has left off can't be told from it.
        if reset || bases == [0, 0] {
            self.worker.reset();
        }
        (self.sent, self.consumed) = (0, 0);
        self.asking.clear();
        self.replies.clear();
        self.resets.clear();
        for end in &mut self.ends {
            end.taint();
            if !was_heard {
                end.promise = Promise::Prefix;
            }
            if end.state != State::Unknown {
                end.end();
            }
        }
        for index in [RX_RING, TX_RING] {
            self.rings[index].begin(0);
            self.rings[index].renew_eventfds();
            self.start_ring(index, 0);
        }
    }

    // The worker.

    /// Lets the worker take its turns until nothing wakes it any more.
    fn run(&mut self) {
        for _ in 0..MAX_TURNS {
            let mut fds = [PollFd::new(
                self.worker.epoll().0.as_fd(),
                PollFlags::POLLIN,
            )];
            if poll(&mut fds, PollTimeout::ZERO).unwrap() == 0 {
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
            for index in 0..self.ends.len() {
                self.answer(index as u8, true);
            }
        }
    }

    fn turn(&mut self) {
        if self.sent == self.consumed
            && self.replies.is_empty()
            && !self.rings[RX_RING].has_returned()
        {
            self.ends.iter_mut().for_each(End::was_heard);
        }
        self.worker.turn(&self.vrings);
        for (ring, armed) in self.rings.iter().zip(&mut self.armed) {
            if ring.has_returned() && std::mem::take(armed) {
                assert!(
                    ring.is_interrupted(),
                    "an interrupt was asked for, and none came"
                );
            }
        }
        while let Some(returned) = self.rings[TX_RING].take() {
            self.consumed += u64::from(returned.is_sound);
        }
        while let Some((index, packet)) = self.asking.front().copied()
            && packet < self.consumed
        {
            self.asking.pop_front();
            self.accept(index);
        }
        self.send_replies();
    }

    /// A host program takes the connection that the worker has made for this request, if it has made one.
    fn accept(&mut self, index: usize) {
        let end = &mut self.ends[index];
        let port = end.key.host.0 as usize - 1;
        let accepted = self.listeners[port]
            .as_ref()
            .and_then(|listener| listener.accept().ok());
        end.program = accepted.map(|(program, _)| program);
        end.is_accepted = end.program.is_some();
        if let Some(program) = &end.program {
            program.set_nonblocking(true).unwrap();
        }
        assert_eq!(
            end.program.is_some(),
            self.listeners[port].is_some(),
            "who listens gets connections"
        );
    }

    // The host programs.

    fn with(&mut self, end: u8, act: impl FnOnce(&mut End)) {
        if let Some(index) = usize::from(end).checked_rem(self.ends.len()) {
            act(&mut self.ends[index]);
        }
    }

    fn uds_path(&self) -> PathBuf {
        self.folder.path().join("vsock")
    }

    fn connect(&mut self, pieces: u8) {
        let Ok(mut program) = connect_at_once(&self.uds_path()) else {
            return;
        };
        let number = self.ends.len() as u32;
        let port = FIRST_CLIENT + number;
        let line = format!("CONNECT {port}\n");
        let (first, second) = line.split_at(usize::from(pieces) % line.len());
        program.write_all(first.as_bytes()).unwrap();
        if !first.is_empty() {
            self.run();
        }
        program.write_all(second.as_bytes()).unwrap();
        let key = ConnKey {
            guest: GuestPort(port),
            host: HostPort(0),
        };
        let mut end = End::new(number, key, State::Unknown, self.window);
        end.program = Some(program);
        self.ends.push(end);
    }

    fn babble(&mut self, mut text: [u8; 12]) {
        let Ok(mut program) = connect_at_once(&self.uds_path()) else {
            return;
        };
        // At the latest here it is no CONNECT line.
        text[11] = b'!';
        program.write_all(&text).unwrap();
        self.babblers.push(program);
    }

    fn listen(&mut self, port: u8, wanted: bool) {
        self.run();
        let port = port % PORTS;
        let place = &mut self.listeners[usize::from(port)];
        // Requests on the way would find one or the other.
        if place.is_some() == wanted || !self.asking.is_empty() {
            return;
        }
        let path = self.folder.path().join(format!("vsock_{}", port + 1));
        *place = wanted.then(|| UnixListener::bind(&path).unwrap());
        match place {
            Some(listener) => listener.set_nonblocking(true).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
    }

    fn program_reads(&mut self, end: u8, len: u16) {
        let mut scratch = std::mem::take(&mut self.scratch);
        self.with(end, |end| _ = end.program_reads(&mut scratch[..len.into()]));
        self.scratch = scratch;
    }

    // All come to rest.

    /// The guest hears all there is to hear. False when it can't.
    fn sync(&mut self) -> bool {
        if self.paused != [false; 2] {
            return false;
        }
        self.run();
        while self.receive_all() {}
        self.resets.clear();
        true
    }

    fn receive_all(&mut self) -> bool {
        let mut received = self.receive();
        self.arm(true);
        self.offer(32, MAX_PACKET as u16 - 45, Layout::PLAIN);
        self.run();
        received |= self.receive();
        received
    }

    /// Both sides take all there is: then all that was promised has come.
    pub(super) fn settle(&mut self) {
        for index in [RX_RING, TX_RING] {
            if self.paused[index] {
                self.pause(index);
            }
        }
        self.run();
        loop {
            let mut progress = self.receive_all();
            for index in 0..self.ends.len() {
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
        self.ends.iter().for_each(End::check_settled);
        for babbler in &mut self.babblers {
            let read = babbler.read(&mut [0]);
            let is_gone = read.as_ref().map_or_else(
                |error| error.kind() == std::io::ErrorKind::ConnectionReset,
                |count| *count == 0,
            );
            assert!(is_gone, "still there: {read:?}");
        }
        let writable: Vec<_> = self.rings.iter().flat_map(Ring::writable).collect();
        self.memory.check(&writable);
    }

    /// Both ends of a connection take what there is.
    fn serve(&mut self, index: usize) -> bool {
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut progress = self.ends[index].program_reads(&mut scratch) > 0;
        self.scratch = scratch;
        if !self.can_send() {
            return progress;
        }
        let end = &mut self.ends[index];
        if end.state == State::Asked {
            end.state = State::Open;
            self.say(index, Op::Response, |_| {});
            progress = true;
        } else if end.state == State::Open
            && (end.taken, end.guest_window) != (end.to_guest.received, 1 << 16)
        {
            (end.taken, end.guest_window) = (end.to_guest.received, 1 << 16);
            self.say(index, Op::CreditUpdate, |_| {});
            progress = true;
        }
        progress
    }
}
