//! The worker: it walks the rings, waits for the host's sockets and keeps the time.
//!
//! Whatever wakes it, it takes one [turn](VhostUserVsockThread::turn): rounds of host sockets, TX ring and RX ring, until
//! there is nothing to do in any of them. Then it looks for more for a short while, asks the guest to kick again, and
//! sleeps. A turn has a bounded number of rounds, and a round a bounded amount of work, so that the VMM's messages come
//! in between; what is left over wakes the worker at once.

pub mod busy_poll;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vhost_user_backend::{VringState, VringT};
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use crate::config::VmConfig;
use crate::metrics::counters::VmSnapshot;
use crate::packet::{PacketError, RxBatch, TxBatch};
use crate::syscalls::Syscall;
use crate::thread_backend::{Registry, Token, VsockThreadBackend};
use crate::vhost_user_vsock_thread::busy_poll::Look;
use crate::vhu_vsock::vring::{GuestMemoryHandle, VsockVring, has_entries, needs_interrupt};
use crate::vsock_conn::Readiness;

/// To wait for sockets and kicks, to set the timer, to wake itself, and to give way to others. Sockets are accepted as
/// `listener` says.
pub(crate) const SYSCALLS: &[Syscall] = &[
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_epoll_wait),
    Syscall::any(libc::SYS_epoll_pwait),
    Syscall::any(libc::SYS_epoll_ctl),
    Syscall::any(libc::SYS_timerfd_settime),
    Syscall::any(libc::SYS_write),
    Syscall::any(libc::SYS_sched_yield),
];

/// The ring of the guest's buffers for packets to it.
pub const RX_RING: usize = 0;
/// The ring of the guest's packets.
pub const TX_RING: usize = 1;

/// How many rounds a turn has at most.
const MAX_ROUNDS: usize = 16;
/// How many packets, and about how many bytes of payload and descriptors, a round takes from the guest.
const MAX_TX_PACKETS: usize = 256;
const MAX_TX_BYTES: usize = 256 * 1024;
const MAX_TX_DESCRIPTORS: usize = 2048;
/// How often a round goes to a connection for packets for the guest.
const MAX_RX_BATCHES: usize = 32;
/// How many bytes the guest is given before it is interrupted, so that it takes them while more are on the way.
const MAX_UNTOLD_BYTES: usize = 64 * 1024;
/// How many host programs a round accepts.
const MAX_ACCEPTS: usize = 64;
/// How many events of sockets a round takes.
const MAX_EVENTS: usize = 256;

/// How long no host program is accepted when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the log says nothing more of what a guest has sent wrong.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// The worker's own descriptors in the event loop. Connections have other tokens.
const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const WAKE: u64 = u64::MAX - 2;
const KICK: u64 = u64::MAX - 3;

/// A ring's state in the vhost-user library.
type Ring = VringState<GuestMemoryHandle>;

/// What the worker knows of a ring besides the ring itself.
#[derive(Default)]
struct RingProgress {
    /// The next entry of the avail ring, as the worker has left it.
    position: Option<u16>,
    /// The start of the ring with which it was found in order.
    checked: Option<u64>,
    /// The start of the ring with which it was found broken.
    broken: Option<u64>,
    /// The guest was asked to kick.
    kicks: bool,
    /// The kick that is watched.
    kick: Option<Arc<File>>,
}

/// The worker.
pub struct VhostUserVsockThread {
    epoll: Arc<Epoll>,
    listener: UnixListener,
    timer: TimerFd,
    wake: EventFd,
    backend: VsockThreadBackend,
    has_vmm: bool,
    memory: Option<GuestMemoryHandle>,
    rings: [RingProgress; 2],
    /// The guest's driver has started the device.
    started: bool,
    notify_on_empty: bool,
    /// Host programs may be waiting to be accepted.
    accepting: bool,
    /// Some of them have to wait for a descriptor, and the log says so.
    short: bool,
    accept_again: Option<Instant>,
    armed: Option<Instant>,
    look: Look,
    malformed_logged: Option<Instant>,
    events: Vec<EpollEvent>,
    heads: Vec<u16>,
}

/// Registers sockets in the worker's epoll set, edge-triggered: it is told once of each change.
struct EpollRegistry(Arc<Epoll>);

impl Registry for EpollRegistry {
    fn register(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLPRI
            | EpollFlags::EPOLLET;
        Ok(self.0.add(socket, EpollEvent::new(flags, token.0))?)
    }
}

impl VhostUserVsockThread {
    /// A worker without a VMM, for the host programs that connect to `listener`.
    pub fn new(config: &VmConfig, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(&listener, EpollEvent::new(edge, LISTENER))?;
        epoll.add(timer.as_fd(), EpollEvent::new(edge, TIMER))?;
        epoll.add(&wake, EpollEvent::new(edge, WAKE))?;
        Ok(Self {
            backend: VsockThreadBackend::new(config, Box::new(EpollRegistry(epoll.clone()))),
            epoll,
            listener,
            timer,
            wake,
            has_vmm: false,
            memory: None,
            rings: Default::default(),
            started: false,
            notify_on_empty: false,
            accepting: false,
            short: false,
            accept_again: None,
            armed: None,
            look: Look::new(config.busy_poll),
            malformed_logged: None,
            events: vec![EpollEvent::empty(); MAX_EVENTS],
            heads: Vec::with_capacity(MAX_TX_PACKETS),
        })
    }

    /// The epoll set of all that the worker waits for besides the rings.
    pub fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// The VMM has given the guest this memory.
    pub fn set_memory(&mut self, memory: GuestMemoryHandle) {
        self.memory = Some(memory);
        for ring in &mut self.rings {
            ring.checked = None;
        }
    }

    /// Whether the driver wants to be notified of a TX ring that runs empty.
    pub fn set_notify_on_empty(&mut self, notify_on_empty: bool) {
        self.notify_on_empty = notify_on_empty;
    }

    /// The VMM has stopped a ring. Connections wait until it goes on.
    pub fn stop_ring(&mut self, index: usize) {
        if index < self.rings.len() {
            self.watch_kick(index, None);
            self.rings[index].kicks = false;
        }
    }

    /// The device starts anew: no connection survives.
    pub fn reset(&mut self) {
        for index in 0..self.rings.len() {
            self.watch_kick(index, None);
            self.rings[index] = RingProgress::default();
        }
        self.started = false;
        self.backend.reset();
    }

    /// A VMM has come.
    pub fn connect(&mut self) {
        self.has_vmm = true;
        self.backend.counters().sessions += 1;
    }

    /// The VMM is gone, and its memory with it.
    pub fn disconnect(&mut self) {
        self.has_vmm = false;
        self.reset();
        self.backend.disconnect();
        self.memory = None;
        self.notify_on_empty = false;
    }

    /// Whether there is a VMM, and how many connections.
    pub fn status(&self) -> (bool, usize) {
        (self.has_vmm, self.backend.connections())
    }

    /// What there is to tell now.
    pub fn snapshot(&self) -> VmSnapshot {
        self.backend.snapshot(self.has_vmm)
    }

    /// Does what there is to do.
    pub fn turn(&mut self, vrings: &[VsockVring]) {
        self.look.woke();
        for _ in 0..MAX_ROUNDS {
            // Clients come last: it depends on the rings whether there is a driver to talk to.
            let worked = self.serve_host() | self.serve_rings(vrings) | self.accept();
            if !worked && !self.look_for_work(vrings) && !self.ask_for_kicks(vrings) {
                self.set_timer();
                return self.look.sleeps();
            }
        }
        self.set_timer();
        // The counter can't overflow: nothing but this adds to it, once a turn.
        let _ = self.wake.write(1);
    }

    /// Watches this kick in place of the one before. It is never read: each kick is an event of its own.
    fn watch_kick(&mut self, index: usize, kick: Option<Arc<File>>) {
        if let Some(old) = std::mem::replace(&mut self.rings[index].kick, kick) {
            let _ = self.epoll.delete(&*old);
        }
        if let Some(new) = &self.rings[index].kick {
            let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            if let Err(error) = self.epoll.add(&**new, EpollEvent::new(edge, KICK)) {
                warn!("ring {index}: its kicks can't be watched: {error}");
            }
        }
    }

    /// Takes what has happened to the host's sockets and the timer. False when nothing has.
    fn serve_host(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        let count = self
            .epoll
            .wait(&mut events, EpollTimeout::ZERO)
            .unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accepting = self.accept_again.is_none(),
                TIMER => self.timer_fired(),
                KICK => self.backend.counters().kicks += 1,
                WAKE => {}
                token => {
                    let flags = event.events();
                    let has = |wanted| flags.intersects(wanted);
                    let ready = Readiness {
                        readable: has(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP),
                        halting: has(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI),
                        writable: has(EpollFlags::EPOLLOUT),
                        gone: has(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR),
                    };
                    self.backend.socket_ready(Token(token), ready);
                }
            }
        }
        self.events = events;
        count > 0
    }

    fn timer_fired(&mut self) {
        let now = Instant::now();
        self.armed = None;
        if self.accept_again.is_some_and(|again| again <= now) {
            self.accept_again = None;
            self.accepting = true;
        }
        self.backend.expire(now);
    }

    /// Sets the timer for the next deadline. A timer that fires too early does no harm, so it is only set earlier.
    fn set_timer(&mut self) {
        let next = self
            .backend
            .next_deadline()
            .into_iter()
            .chain(self.accept_again)
            .min();
        let Some(next) = next else { return };
        if self.armed.is_some_and(|armed| armed <= next) {
            return;
        }
        let delay = next.saturating_duration_since(Instant::now());
        let delay = TimeSpec::from_duration(delay.max(Duration::from_micros(1)));
        match self
            .timer
            .set(Expiration::OneShot(delay), TimerSetTimeFlags::empty())
        {
            Ok(()) => self.armed = Some(next),
            Err(error) => warn!("the timer can't be set: {error}"),
        }
    }

    /// Accepts host programs. Without a guest's driver to talk to, they are closed at once. False when none waits.
    fn accept(&mut self) -> bool {
        if !self.accepting {
            return false;
        }
        for _ in 0..MAX_ACCEPTS {
            let accepted = self.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            });
            match accepted {
                Ok(stream) if self.started => self.backend.add_client(stream),
                Ok(_) => debug!("closed a client: the guest's driver has not started the device"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.accepting = false;
                    self.short = false;
                    break;
                }
                Err(error) if is_shortage(&error) => {
                    if !std::mem::replace(&mut self.short, true) {
                        self.backend.counters().shortages += 1;
                        warn!("clients must wait: {error}");
                    }
                    self.accepting = false;
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    break;
                }
                // The client is gone already.
                Err(error) => debug!("a client could not be accepted: {error}"),
            }
        }
        true
    }

    /// Moves packets both ways. False when there was none.
    fn serve_rings(&mut self, vrings: &[VsockVring]) -> bool {
        let Some(memory) = self.memory.as_ref().map(|memory| memory.memory()) else {
            return false;
        };
        // What is owed already goes first: it makes room for the answers to what comes.
        let received = self.serve_ring(RX_RING, vrings, &memory, Self::serve_rx);
        let sent = self.serve_ring(TX_RING, vrings, &memory, Self::serve_tx);
        self.started |= self.rings.iter().all(|ring| ring.position.is_some());
        received | sent
    }

    /// Works on a ring if it runs, and stops it where it turns out to be broken.
    fn serve_ring(
        &mut self,
        index: usize,
        vrings: &[VsockVring],
        memory: &GuestMemoryMmap,
        work: impl FnOnce(&mut Self, &mut Ring, &GuestMemoryMmap) -> Result<bool, QueueError>,
    ) -> bool {
        let vring = &vrings[index];
        let mut state = vring.get_mut();
        let result = match self.is_running(index, vring, &state, memory) {
            Ok(false) => return false,
            Ok(true) => {
                let result = work(self, &mut state, memory);
                self.rings[index].position = Some(state.get_queue().next_avail());
                result
            }
            Err(error) => Err(error),
        };
        drop(state);
        result.unwrap_or_else(|error| {
            warn!("ring {index} stops until it is started again: {error}");
            self.rings[index].broken = Some(vring.starts());
            vring.signal_error();
            false
        })
    }

    /// Whether a ring can be worked on. One that doesn't go on where it was left belongs to a driver that has started
    /// afresh, and knows of no connection.
    fn is_running(
        &mut self,
        index: usize,
        vring: &VsockVring,
        state: &Ring,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        let (queue, starts) = (state.get_queue(), vring.starts());
        let ring = &self.rings[index];
        if !state.is_enabled() || !queue.ready() || ring.broken == Some(starts) {
            return Ok(false);
        }
        if ring
            .position
            .is_some_and(|position| position != queue.next_avail())
        {
            debug!("ring {index} starts afresh, closing all connections");
            self.rings.iter_mut().for_each(|ring| ring.position = None);
            self.backend.reset();
        }
        if self.rings[index].checked != Some(starts) {
            if !queue.is_valid(memory) {
                return Err(QueueError::QueueNotReady);
            }
            self.watch_kick(index, vring.kick());
            self.rings[index].checked = Some(starts);
            self.rings[index].kicks = true;
        }
        Ok(true)
    }

    /// Takes a batch of packets from the guest.
    fn serve_tx(&mut self, state: &mut Ring, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if !has_entries(state.get_queue(), memory)? {
            return Ok(false);
        }
        self.stop_kicks(TX_RING, state, memory)?;
        let queue = state.get_queue_mut();
        let ring_size = queue.size();
        let mut batch = TxBatch::new(memory);
        let mut heads = std::mem::take(&mut self.heads);
        for chain in queue.iter(memory)? {
            heads.push(chain.head_index());
            if let Err(error) = batch.push(chain, ring_size) {
                self.log_malformed(&error);
            }
            let is_full =
                batch.bytes() >= MAX_TX_BYTES || batch.descriptors() >= MAX_TX_DESCRIPTORS;
            if is_full || heads.len() == MAX_TX_PACKETS {
                break;
            }
        }
        batch.parse(|error| self.log_malformed(&error));
        self.backend.send_pkts(&batch);
        heads
            .drain(..)
            .try_for_each(|head| return_buffer(queue, memory, head, 0))?;
        self.heads = heads;
        self.notify(state, memory)?;
        Ok(true)
    }

    /// Gives the guest what is owed to it, as far as it has buffers.
    fn serve_rx(&mut self, state: &mut Ring, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if self.backend.rx_demand().is_none() {
            return Ok(false);
        }
        self.stop_kicks(RX_RING, state, memory)?;
        let mut batch = RxBatch::new(memory);
        let mut worked = false;
        let mut untold = 0;
        for _ in 0..MAX_RX_BATCHES {
            let Some(demand) = self.backend.rx_demand() else {
                break;
            };
            let queue = state.get_queue_mut();
            if self.gather(queue, memory, &mut batch, demand)? {
                self.notify(state, memory)?;
                worked = true;
            }
            if batch.is_empty() {
                break;
            }
            let queue = state.get_queue_mut();
            worked = true;
            let first = queue.next_avail().wrapping_sub(batch.len() as u16);
            self.backend.recv_pkts(&mut batch);
            for buffer in batch.filled() {
                return_buffer(queue, memory, buffer.head(), buffer.used())?;
                untold += buffer.used() as usize;
            }
            queue.set_next_avail(first.wrapping_add(batch.filled().len() as u16));
            if untold >= MAX_UNTOLD_BYTES {
                self.notify(state, memory)?;
                untold = 0;
            }
        }
        if untold > 0 {
            self.notify(state, memory)?;
        }
        Ok(worked)
    }

    /// Takes buffers for `demand` bytes of payload out of the RX ring, or one buffer when that is 0. A buffer that is
    /// none is given back at once; then the answer is true.
    fn gather(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        batch: &mut RxBatch<'_>,
        demand: usize,
    ) -> Result<bool, QueueError> {
        batch.clear();
        let ring_size = queue.size();
        let mut returned = 0;
        loop {
            let mut chains = queue.iter(memory)?;
            let mut rejected = None;
            for chain in chains.by_ref() {
                let head = chain.head_index();
                match batch.push(chain, ring_size, demand - batch.capacity()) {
                    Ok(()) if batch.capacity() >= demand || batch.is_full() => break,
                    Ok(()) => {}
                    Err(error) => {
                        self.log_malformed(&error);
                        rejected = Some(head);
                        break;
                    }
                }
            }
            match rejected {
                None => return Ok(returned > 0),
                // Used buffers keep their order: those before it go first, and it comes up again.
                Some(_) if !batch.is_empty() => {
                    queue.go_to_previous_position();
                    return Ok(returned > 0);
                }
                Some(head) => {
                    return_buffer(queue, memory, head, 0)?;
                    returned += 1;
                    // A guest that offers them again and again would never let this end.
                    if returned == ring_size {
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// Interrupts the guest if it wants to know of the buffers that were returned to it.
    fn notify(&mut self, state: &mut Ring, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let queue = state.get_queue_mut();
        let wanted = needs_interrupt(queue, memory)?;
        if wanted || (self.notify_on_empty && !has_entries(queue, memory)?) {
            self.backend.counters().interrupts += 1;
            // A VMM whose end is full has been told, and one without an end polls.
            let _ = state.signal_used_queue();
        }
        Ok(())
    }

    fn stop_kicks(
        &mut self,
        index: usize,
        state: &mut Ring,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        if std::mem::take(&mut self.rings[index].kicks) {
            state.get_queue_mut().disable_notification(memory)?;
        }
        Ok(())
    }

    /// Asks the guest to kick for what the worker would go on with. True when some of it is there already.
    fn ask_for_kicks(&mut self, vrings: &[VsockVring]) -> bool {
        let Some(memory) = self.memory.as_ref().map(|memory| memory.memory()) else {
            return false;
        };
        let ask = |index: usize| {
            move |worker: &mut Self, state: &mut Ring, memory: &GuestMemoryMmap| {
                worker.rings[index].kicks = true;
                state.get_queue_mut().enable_notification(memory)
            }
        };
        let more = self.serve_ring(TX_RING, vrings, &memory, ask(TX_RING));
        // Only a guest that has left us without buffers has reason to kick for new ones.
        let starving = self.backend.rx_demand().is_some();
        more | (starving && self.serve_ring(RX_RING, vrings, &memory, ask(RX_RING)))
    }

    /// Looks for work for a short while, if that has paid lately. True when there is some.
    fn look_for_work(&mut self, vrings: &[VsockVring]) -> bool {
        let Some(until) = self.look.until() else {
            return false;
        };
        let Some(memory) = self.memory.as_ref().map(|memory| memory.memory()) else {
            return false;
        };
        let waiting = |_: &mut Self, state: &mut Ring, memory: &GuestMemoryMmap| {
            has_entries(state.get_queue(), memory)
        };
        while Instant::now() < until {
            if self.serve_host() || self.serve_ring(TX_RING, vrings, &memory, waiting) {
                return true;
            }
            // What is waited for may need this processor.
            std::thread::yield_now();
        }
        self.look.in_vain();
        false
    }

    /// Counts what the guest has sent wrong, and says so now and then.
    fn log_malformed(&mut self, error: &PacketError) {
        self.backend.counters().malformed += 1;
        let now = Instant::now();
        if self
            .malformed_logged
            .is_none_or(|last| now - last >= LOG_PAUSE)
        {
            self.malformed_logged = Some(now);
            let count = self.backend.counters().malformed;
            warn!("the guest's driver sent {count} malformed chains so far, the last: {error}");
        }
    }
}

/// Returns a buffer to the guest. A head that is no descriptor can't be.
fn return_buffer(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    head: u16,
    used: u32,
) -> Result<(), QueueError> {
    if head >= queue.size() {
        return Ok(());
    }
    queue.add_used(memory, head, used)
}

/// Whether an error of accept says that something has run out, for now.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

#[cfg(test)]
mod tests;
