//! The worker: it walks the rings, waits for events and keeps the time.
//!
//! A virtio-vsock device has an RX ring, where the driver posts buffers for packets to the guest, a TX ring, where it puts
//! packets from the guest, and an event ring (virtio 1.2, 5.10.2). The driver *kicks* when it has put something into a ring and
//! was asked to; the device *interrupts* when it has returned buffers and the driver wants to know (2.7.7, 2.7.10). Kicks,
//! interrupts and the host's sockets meet here:
//!
//! ```text
//! epoll --> turn:  round, round, …   each: RX ring, TX ring, flushes, new clients
//!           nothing left to do: busy poll for a while, ask the driver to kick again, sleep
//! ```
//!
//! A turn has a bounded number of rounds, and a round a bounded amount of work, so that the VMM's messages come in between.
//! Whatever is left is the next turn's, which follows without waiting.

mod acceptor;
mod busy_poll;
mod epoll;
mod limits;
mod log_limit;
mod ring;
mod rings;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::config::VmConfig;
use crate::host::socket::HostSocket;
use crate::metrics::counters::VmSnapshot;
use crate::packet::{PacketError, RxBatch, RxStorage, TxChains, TxStorage};
use crate::syscalls::Syscall;
use crate::thread_backend::VsockThreadBackend;
use crate::thread_backend::event_source::EventSource;
use acceptor::{Accepted, Acceptor};
use busy_poll::BusyPoll;
use epoll::SocketRegistry;
pub use epoll::{Epoll, EventBuffer, Wait};
use limits::{
    MAX_ACCEPTS, MAX_QUIET_BYTES, MAX_ROUNDS, MAX_RX_BATCHES, MAX_RX_DESCRIPTORS, MAX_TX_BYTES,
    MAX_TX_DESCRIPTORS, MAX_TX_PACKETS,
};
use log_limit::LogLimit;
pub use ring::GuestMemoryHandle;
use ring::{has_entries, needs_interrupt, return_buffer};
use rings::{Rings, Start};

/// To set the timer, to wake the worker, and to give way to others while polling.
const SYSCALLS: &[Syscall] = &[
    Syscall::any(libc::SYS_timerfd_settime),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_sched_yield),
];

pub(crate) fn syscalls() -> Vec<Syscall> {
    [
        SYSCALLS,
        acceptor::SYSCALLS,
        busy_poll::SYSCALLS,
        epoll::SYSCALLS,
        ring::SYSCALLS,
        &crate::host::syscalls(),
        &crate::packet::syscalls(),
    ]
    .concat()
}

/// A ring in the vhost-user library's words.
pub type VsockVring = VringMutex<GuestMemoryHandle>;

/// The ring of the guest's buffers for packets to it.
pub const RX_RING: usize = 0;
/// The ring of the guest's packets.
pub const TX_RING: usize = 1;
/// RX, TX and event ring.
pub const NUM_RINGS: usize = 3;

/// The worker of one VM.
pub struct VhostUserVsockThread {
    epoll: Arc<Epoll>,
    events: EventBuffer,
    acceptor: Acceptor,
    timer: TimerFd,
    /// When the timer fires.
    armed: Option<Instant>,
    wake: EventFd,
    backend: VsockThreadBackend,
    has_vmm: bool,
    /// The guest's driver has started the device.
    started: bool,
    notify_on_empty: bool,
    rings: Rings,
    busy_poll: BusyPoll,
    malformed_log: LogLimit,
    tx_storage: TxStorage,
    rx_storage: RxStorage,
    heads: Vec<u16>,
}

/// The two rings that carry packets, for the time of a turn. One that can't be worked on is not there.
struct Queues<'q> {
    memory: &'q GuestMemoryMmap,
    queues: [Option<&'q mut Queue>; 2],
}

impl VhostUserVsockThread {
    /// A worker without a VMM, for the host programs that connect to `listener`.
    pub fn new(config: &VmConfig, listener: UnixListener) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let acceptor = Acceptor::new(listener)?;
        let timer = TimerFd::new()?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.add_input(&acceptor, EventSource::Listener)?;
        epoll.add_input(&timer, EventSource::Timer)?;
        epoll.add_input(&wake, EventSource::Wake)?;
        let registry = Box::new(SocketRegistry(epoll.clone()));
        Ok(Self {
            backend: VsockThreadBackend::new(config, registry),
            events: EventBuffer::default(),
            acceptor,
            timer,
            armed: None,
            wake,
            has_vmm: false,
            started: false,
            notify_on_empty: false,
            rings: Rings::new(epoll.clone()),
            epoll,
            busy_poll: BusyPoll::new(config.busy_poll),
            malformed_log: LogLimit::default(),
            tx_storage: TxStorage::default(),
            rx_storage: RxStorage::default(),
            heads: Vec::with_capacity(MAX_TX_PACKETS),
        })
    }

    /// What the worker waits for between two turns.
    pub fn epoll(&self) -> Arc<Epoll> {
        self.epoll.clone()
    }

    /// Whether there is a VMM, and how many connections.
    pub fn status(&self) -> (bool, usize) {
        (self.has_vmm, self.backend.connections())
    }

    /// What statistics show now.
    pub fn snapshot(&self) -> VmSnapshot {
        self.backend.snapshot(self.has_vmm)
    }

    /// What wakes the worker when 1 is written to it.
    pub fn wake_handle(&self) -> io::Result<EventFd> {
        self.wake.try_clone()
    }

    /// Lets the worker take a turn.
    pub fn wake(&self) {
        // It fails only where the counter is full, and then the worker is awake.
        let _ = self.wake.write(1);
    }
}

// What the VMM decides.
impl VhostUserVsockThread {
    /// A VMM has connected.
    pub fn connect(&mut self) {
        self.has_vmm = true;
        self.backend.counters().sessions += 1;
    }

    /// The VMM is gone, and its memory with it.
    pub fn disconnect(&mut self) {
        self.has_vmm = false;
        self.reset();
        self.rings.clear();
        self.backend.disconnect();
        self.notify_on_empty = false;
    }

    /// The VMM has given the guest this memory. No turn goes on in what was there before.
    pub fn set_memory(&mut self, memory: GuestMemoryHandle) {
        self.rings.set_memory(memory);
    }

    /// Whether the driver wants to be notified of a TX ring that runs empty (VIRTIO_F_NOTIFY_ON_EMPTY).
    pub fn set_notify_on_empty(&mut self, notify_on_empty: bool) {
        self.notify_on_empty = notify_on_empty;
    }

    /// Takes the eventfd for a ring's kicks.
    pub fn set_kick(&mut self, index: usize, kick: Option<File>) {
        self.rings.set_kick(index, kick);
    }

    /// Takes the eventfd for a ring's interrupts.
    pub fn set_call(&mut self, index: usize, call: Option<File>) {
        self.rings.set_call(index, call);
    }

    /// Takes the eventfd for a ring's errors.
    pub fn set_err(&mut self, index: usize, err: Option<File>) {
        self.rings.set_err(index, err);
    }

    /// Whether the VMM has started a ring and not stopped it since.
    pub fn is_started(&self, index: usize) -> bool {
        self.rings.is_started(index)
    }

    /// The VMM starts a ring, or changes one that runs. It goes on at its used index.
    pub fn start_ring(&mut self, index: usize, queue: &mut Queue) {
        if self.rings.start(index, queue) == Start::Afresh {
            debug!("ring {index} starts afresh, closing all connections");
            self.started = false;
            self.backend.reset();
        }
        self.wake();
    }

    /// The VMM stops a ring. Connections wait until it goes on.
    pub fn stop_ring(&mut self, index: usize) {
        self.rings.stop(index);
    }

    /// The device starts anew: no connection survives.
    pub fn reset(&mut self) {
        self.rings.reset();
        self.started = false;
        self.backend.reset();
    }
}

// The turn.
impl VhostUserVsockThread {
    /// Takes the events that a wait has brought.
    pub fn take_events(&mut self, events: &EventBuffer) {
        for (source, ready) in events.iter() {
            match source {
                EventSource::Connection(token) => self.backend.socket_ready(token, ready),
                EventSource::Client(token) => self.backend.client_ready(token),
                EventSource::Kick(_) => self.backend.counters().kicks += 1,
                EventSource::Listener => self.acceptor.set_pending(),
                EventSource::Timer => self.timer_fired(),
                EventSource::Wake => {}
            }
        }
    }

    /// Does what there is to do, and returns whether to wait before the next turn.
    pub fn turn(&mut self, vrings: &[VsockVring]) -> Wait {
        self.busy_poll.woke();
        let memory = self.rings.memory().map(GuestMemoryHandle::memory);
        let (mut rx, mut tx) = (vrings[RX_RING].get_mut(), vrings[TX_RING].get_mut());
        let mut queues = memory.as_deref().map(|memory| Queues {
            memory,
            queues: [
                self.rings.check(RX_RING, &mut rx, memory),
                self.rings.check(TX_RING, &mut tx, memory),
            ],
        });
        let wait = self.rounds(queues.as_mut());
        self.set_timer();
        wait
    }

    fn rounds(&mut self, mut queues: Option<&mut Queues<'_>>) -> Wait {
        for round in 0..MAX_ROUNDS {
            // The events of the first round came with the wait. A second round is short where the first has done
            // everything, and then waiting or polling brings the new ones.
            let has_events = round > 1 && self.poll_events();
            let worked = match &mut queues {
                Some(queues) => self.serve_rings(queues),
                None => false,
            };
            if has_events | worked | self.backend.flush() | self.accept() {
                continue;
            }
            if let Some(queues) = &mut queues
                && (self.busy_poll(queues) || self.enable_kicks(queues))
            {
                continue;
            }
            self.busy_poll.sleeps();
            return Wait::ForEvents;
        }
        Wait::Not
    }

    /// Takes the events that are there now. False when there are none.
    fn poll_events(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        self.epoll.wait(&mut events, Wait::Not);
        self.take_events(&events);
        let has_events = !events.is_empty();
        self.events = events;
        has_events
    }

    fn timer_fired(&mut self) {
        let now = Instant::now();
        self.armed = None;
        self.acceptor.resume(now);
        self.backend.expire(now);
    }

    /// Sets the timer for the next deadline. A timer that fires too early does no harm, so it is only ever set earlier.
    fn set_timer(&mut self) {
        let deadlines = [self.backend.next_deadline(), self.acceptor.deadline()];
        let Some(next) = deadlines.into_iter().flatten().min() else {
            return;
        };
        if self.armed.is_some_and(|armed| armed <= next) {
            return;
        }
        let delay = next.saturating_duration_since(Instant::now());
        match self.timer.reset(delay.max(Duration::from_micros(1)), None) {
            Ok(()) => self.armed = Some(next),
            Err(error) => warn!("can't set the timer: {error}"),
        }
    }

    /// Accepts clients. Without a driver to talk to, they are closed at once. False when nobody is waiting.
    fn accept(&mut self) -> bool {
        if !self.acceptor.is_pending() {
            return false;
        }
        for _ in 0..MAX_ACCEPTS {
            match self.acceptor.accept() {
                Accepted::Client(socket) if self.started => {
                    self.backend.add_client(HostSocket::new(socket));
                }
                Accepted::Client(_) => {
                    debug!("closed a client: the guest's driver has not started the device");
                }
                Accepted::Shortage => self.backend.counters().shortages += 1,
                Accepted::Nobody => break,
            }
        }
        true
    }

    /// Polls for work for a short while, if that has paid lately. True when there is some.
    fn busy_poll(&mut self, queues: &mut Queues<'_>) -> bool {
        let Some(until) = self.busy_poll.until() else {
            return false;
        };
        while Instant::now() < until {
            let has_packets = self.with_queue(queues, TX_RING, |_, queue, memory| {
                has_entries(queue, memory)
            });
            if has_packets || self.poll_events() {
                return true;
            }
            // What is waited for may need this processor.
            std::thread::yield_now();
        }
        self.busy_poll.was_in_vain();
        false
    }
}

// The rings.
impl VhostUserVsockThread {
    /// Works on a ring if it can be worked on, and stops it where it turns out to be broken. False when there was nothing to
    /// do.
    fn with_queue(
        &mut self,
        queues: &mut Queues<'_>,
        index: usize,
        work: impl FnOnce(&mut Self, &mut Queue, &GuestMemoryMmap) -> Result<bool, QueueError>,
    ) -> bool {
        let Some(queue) = &mut queues.queues[index] else {
            return false;
        };
        let result = work(self, queue, queues.memory);
        self.rings.set_position(index, queue.next_avail());
        result.unwrap_or_else(|error| {
            queues.queues[index] = None;
            self.rings.stop_broken(index, &error);
            false
        })
    }

    /// Moves packets both ways. False when there were none.
    fn serve_rings(&mut self, queues: &mut Queues<'_>) -> bool {
        // What is pending already goes first: it makes room for the answers to what comes.
        let received = self.with_queue(queues, RX_RING, Self::serve_rx);
        let sent = self.with_queue(queues, TX_RING, Self::serve_tx);
        self.started |= queues.queues.iter().all(Option::is_some);
        if queues.queues[RX_RING].is_none() {
            self.backend.rx_starved();
        }
        received | sent
    }

    /// Takes a batch of packets from the guest.
    fn serve_tx(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        if !has_entries(queue, memory)? {
            return Ok(false);
        }
        self.rings.disable_kicks(TX_RING, queue, memory)?;
        let ring_size = queue.size();
        let mut chains = TxChains::new(memory, std::mem::take(&mut self.tx_storage));
        self.heads.clear();
        for chain in queue.iter(memory)? {
            self.heads.push(chain.head_index());
            if let Err(error) = chains.push(chain, ring_size) {
                self.count_malformed(&error);
            }
            let is_full =
                chains.bytes() >= MAX_TX_BYTES || chains.descriptors() >= MAX_TX_DESCRIPTORS;
            if is_full || self.heads.len() == MAX_TX_PACKETS {
                break;
            }
        }
        let batch = chains.parse(|error| self.count_malformed(&error));
        self.backend.send_pkts(&batch);
        self.tx_storage = batch.into_storage();
        for head in &self.heads {
            return_buffer(queue, memory, *head, 0)?;
        }
        self.notify(TX_RING, queue, memory)?;
        Ok(true)
    }

    /// Gives the guest what is pending for it, as far as it has buffers.
    fn serve_rx(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        if self.backend.rx_size().is_none() {
            return Ok(false);
        }
        self.rings.disable_kicks(RX_RING, queue, memory)?;
        let mut batch = RxBatch::new(memory, std::mem::take(&mut self.rx_storage));
        let worked = self.fill_batches(queue, memory, &mut batch);
        self.rx_storage = batch.into_storage();
        self.backend.rx_delivered();
        worked
    }

    fn fill_batches(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
    ) -> Result<bool, QueueError> {
        let mut worked = false;
        let mut quiet = 0;
        for _ in 0..MAX_RX_BATCHES {
            let Some(size) = self.backend.rx_size() else {
                break;
            };
            worked |= self.gather(queue, memory, batch, size)?;
            if batch.is_empty() {
                if batch.descriptors() < MAX_RX_DESCRIPTORS {
                    self.backend.rx_starved();
                }
                break;
            }
            worked = true;
            let first = queue.next_avail().wrapping_sub(batch.len() as u16);
            self.backend.recv_pkts(batch);
            for buffer in batch.filled() {
                return_buffer(queue, memory, buffer.head(), buffer.used())?;
                quiet += buffer.used() as usize;
            }
            queue.set_next_avail(first.wrapping_add(batch.filled().len() as u16));
            if quiet >= MAX_QUIET_BYTES {
                self.notify(RX_RING, queue, memory)?;
                quiet = 0;
            }
            if batch.descriptors() >= MAX_RX_DESCRIPTORS {
                break;
            }
        }
        if quiet > 0 {
            self.notify(RX_RING, queue, memory)?;
        }
        Ok(worked)
    }

    /// Takes buffers for `size` bytes of payload out of the RX ring, or one buffer when that is 0. A buffer that can take no
    /// packet is returned unused at once; then the answer is true.
    fn gather(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
        size: usize,
    ) -> Result<bool, QueueError> {
        batch.clear();
        let mut rejected = 0;
        loop {
            match self.gather_sound(queue, memory, batch, size)? {
                None => break,
                // Used buffers keep their order: those before it go first, and it comes up again.
                Some(_) if !batch.is_empty() => {
                    queue.go_to_previous_position();
                    break;
                }
                Some(head) => {
                    return_buffer(queue, memory, head, 0)?;
                    rejected += 1;
                    // A guest that offers such buffers again and again would never let this end.
                    if rejected == queue.size() || batch.descriptors() >= MAX_RX_DESCRIPTORS {
                        break;
                    }
                }
            }
        }
        if rejected > 0 {
            self.notify(RX_RING, queue, memory)?;
        }
        Ok(rejected > 0)
    }

    /// Takes buffers until the batch holds `size` bytes, and returns the head of a buffer that can take no packet.
    fn gather_sound(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
        size: usize,
    ) -> Result<Option<u16>, QueueError> {
        let ring_size = queue.size();
        for chain in queue.iter(memory)? {
            let head = chain.head_index();
            match batch.push(chain, ring_size, size - batch.capacity()) {
                Ok(()) => {}
                Err(error) => {
                    self.count_malformed(&error);
                    return Ok(Some(head));
                }
            }
            let is_full = batch.is_full() || batch.descriptors() >= MAX_RX_DESCRIPTORS;
            if batch.capacity() >= size || is_full {
                break;
            }
        }
        Ok(None)
    }

    /// Interrupts the guest if it wants to know of the buffers that were returned to it.
    fn notify(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        let wanted = needs_interrupt(queue, memory)?;
        if wanted || (self.notify_on_empty && !has_entries(queue, memory)?) {
            self.backend.counters().interrupts += 1;
            self.rings.interrupt(index);
        }
        Ok(())
    }

    /// Asks the driver to kick for what the worker would go on with. True when some of it is there already.
    fn enable_kicks(&mut self, queues: &mut Queues<'_>) -> bool {
        let enable = |index: usize| {
            move |worker: &mut Self, queue: &mut Queue, memory: &GuestMemoryMmap| {
                worker.rings.enable_kicks(index, queue, memory)
            }
        };
        let has_packets = self.with_queue(queues, TX_RING, enable(TX_RING));
        // Only where buffers are missing is there a reason to hear of new ones.
        let is_starved = self.backend.rx_size().is_some();
        has_packets | (is_starved && self.with_queue(queues, RX_RING, enable(RX_RING)))
    }

    /// Counts what the guest's driver has got wrong, and logs it now and then.
    fn count_malformed(&mut self, error: &PacketError) {
        self.backend.counters().malformed += 1;
        let count = self.backend.counters().malformed;
        self.malformed_log.log(|| {
            warn!("the guest's driver sent {count} malformed chains so far, the last: {error}");
        });
    }
}
