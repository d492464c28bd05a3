//! The worker: it walks the rings, waits for events and keeps the time.
//!
//! A virtio-vsock device has an RX ring, where the driver posts buffers for packets to the guest, a TX ring, where it puts
//! packets from the guest, and an event ring (virtio 1.2, 5.10.2). The driver *kicks* when it has put something into a ring and
//! was asked to; the device *interrupts* when it has returned buffers and the driver wants to know (2.7.7, 2.7.10). Kicks,
//! interrupts and the host's sockets meet here:
//!
//! ```text
//! epoll --> turn:  round, round, …   each: steps at the RX ring, the TX ring, what is buffered, new clients
//!           nothing left to do: busy poll for a while, ask the driver to kick again, sleep
//! ```
//!
//! A turn has a bounded number of rounds, and a round a bounded amount of work, so that the VMM's messages come in between.
//! Whatever is left is the next turn's, which follows without waiting. Which step is next is decided by what the steps have cost
//! so far ([`shares`]), so that nothing that a guest or its host programs do in any number keeps others from theirs.

mod acceptor;
mod busy_poll;
mod driver_watch;
mod epoll;
mod event_ring;
mod limits;
mod ring;
mod rings;
mod round;
mod rx_ring;
pub mod saved;
mod shares;
#[cfg(test)]
mod tests;
mod tx_interrupts;
mod tx_ring;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::config::VmConfig;
use crate::host::entry::EntrySocket;
use crate::host::siblings::Membership;
use crate::log_limit::LogLimit;
use crate::metrics::counters::VmSnapshot;
use crate::packet::{PacketError, RxStorage, TxStorage};
use crate::syscalls::Syscall;
use crate::thread_backend::event_source::EventSource;
use crate::thread_backend::{Types, VsockThreadBackend};
use acceptor::Acceptors;
use busy_poll::{BusyPoll, Usage, thread_cpu};
use driver_watch::DriverWatch;
use epoll::SocketRegistry;
pub use epoll::{Epoll, EventBuffer, Wait};
use limits::{MAX_POLLS, MAX_ROUNDS, MAX_TX_PACKETS};
pub use ring::GuestMemoryHandle;
use rings::{Rings, Start};
use round::Queues;
use rx_ring::Quiet;
use shares::Shares;
use tx_interrupts::TxInterrupts;

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
        &ring::syscalls(),
        &crate::host::syscalls(),
        &crate::packet::syscalls(),
        crate::txbuf::SYSCALLS,
    ]
    .concat()
}

/// A ring in the vhost-user library's words.
pub type VsockVring = VringMutex<GuestMemoryHandle>;

/// The ring of the guest's buffers for packets to it.
pub const RX_RING: usize = 0;
/// The ring of the guest's packets.
pub const TX_RING: usize = 1;
/// The ring of the guest's buffers for events.
pub const EVENT_RING: usize = 2;
/// RX, TX and event ring.
pub const NUM_RINGS: usize = 3;

/// The worker of one VM.
pub struct VhostUserVsockThread {
    epoll: Arc<Epoll>,
    events: EventBuffer,
    acceptors: Acceptors,
    timer: TimerFd,
    /// When the timer fires.
    armed: Option<Instant>,
    wake: EventFd,
    backend: VsockThreadBackend,
    driver_watch: DriverWatch,
    /// The driver must hear that all connections are gone.
    transport_reset: bool,
    notify_on_empty: bool,
    rings: Rings,
    shares: Shares,
    /// What was done so far, in units of cost.
    work: u64,
    busy_poll: BusyPoll,
    malformed_log: LogLimit,
    tx_storage: TxStorage,
    rx_storage: RxStorage,
    quiet: Quiet,
    tx_interrupts: TxInterrupts,
    heads: Vec<u16>,
}

impl VhostUserVsockThread {
    /// A worker without a VMM, for those who connect to `entries`.
    pub fn new(config: &VmConfig, entries: Vec<EntrySocket>) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let acceptors = Acceptors::new(entries, &epoll)?;
        let timer = TimerFd::new()?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.add_input(&timer, EventSource::Timer)?;
        epoll.add_input(&wake, EventSource::Wake)?;
        let registry = Box::new(SocketRegistry(epoll.clone()));
        Ok(Self {
            backend: VsockThreadBackend::new(config, registry),
            events: EventBuffer::default(),
            acceptors,
            timer,
            armed: None,
            wake,
            driver_watch: DriverWatch::default(),
            transport_reset: false,
            notify_on_empty: false,
            rings: Rings::new(epoll.clone()),
            epoll,
            shares: Shares::default(),
            work: 0,
            busy_poll: BusyPoll::new(config.busy_poll),
            malformed_log: LogLimit::default(),
            tx_storage: TxStorage::default(),
            rx_storage: RxStorage::default(),
            quiet: Quiet::default(),
            tx_interrupts: TxInterrupts::default(),
            heads: Vec::with_capacity(MAX_TX_PACKETS),
        })
    }

    /// The guest reaches siblings in this process from now on, and they reach it.
    pub fn join(&mut self, siblings: Arc<Membership>) {
        self.backend.join(siblings);
    }

    /// What the worker waits for between two turns.
    pub fn epoll(&self) -> Arc<Epoll> {
        self.epoll.clone()
    }

    /// Whether there is a VMM, and how many connections.
    pub fn status(&self) -> (bool, usize) {
        (self.backend.has_vmm(), self.backend.connections())
    }

    /// What statistics show now.
    pub fn snapshot(&self) -> VmSnapshot {
        self.backend.snapshot()
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
        self.backend.connect();
        self.driver_watch.connected(Instant::now());
        self.wake();
        self.backend.counters().sessions += 1;
    }

    /// The VMM is gone, and its memory with it.
    pub fn disconnect(&mut self) {
        self.driver_watch.disconnected();
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

    /// Takes the types of connections that the driver has chosen.
    pub fn set_types(&mut self, types: Types) {
        self.driver_watch.accepted();
        self.backend.set_types(types);
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
            self.backend.reset();
        }
        self.wake();
    }

    /// The VMM stops a ring. Connections wait until it goes on.
    pub fn stop_ring(&mut self, index: usize) {
        if index == TX_RING {
            // The guest is interrupted when the ring goes on.
            self.tx_interrupts.forget();
        }
        self.rings.stop(index);
    }

    /// The device starts anew: no connection survives.
    pub fn reset(&mut self) {
        self.transport_reset = false;
        self.tx_interrupts = TxInterrupts::default();
        self.rings.reset();
        self.backend.reset();
    }
}

// The turn.
impl VhostUserVsockThread {
    /// Stops accepting host programs, and closes the listening sockets.
    pub fn stop_listening(&mut self) {
        self.acceptors.close();
    }

    /// Takes the events that a wait has brought.
    pub fn take_events(&mut self, events: &EventBuffer) {
        for (source, ready) in events.iter() {
            match source {
                EventSource::Connection(token) => self.backend.socket_ready(token, ready),
                EventSource::Client(token) => self.backend.client_ready(token, ready),
                EventSource::Kick(_) => self.backend.counters().kicks += 1,
                EventSource::Listener(number) => self.acceptors.set_pending(number),
                EventSource::Timer => self.timer_fired(),
                EventSource::Wake => {}
            }
        }
    }

    /// Does what there is to do, and returns whether to wait before the next turn.
    pub fn turn(&mut self, vrings: &[VsockVring]) -> Wait {
        self.end_wait();
        // Before the connections that it ends are reset: it tells programs of an error, and a reset of the end.
        let has_more = self.serve_events(vrings);
        let memory = self.rings.memory().map(GuestMemoryHandle::memory);
        let (mut rx, mut tx) = (vrings[RX_RING].get_mut(), vrings[TX_RING].get_mut());
        let mut queues = memory.as_deref().map(|memory| Queues {
            memory,
            queues: [
                self.rings.check(RX_RING, &mut rx, memory),
                self.rings.check(TX_RING, &mut tx, memory),
            ],
        });
        if self.driver_watch.looks_for_buffers()
            && self.backend.has_guest()
            && let Some(queues) = &mut queues
        {
            self.look_for_buffers(queues);
        }
        let wait = self.rounds(queues.as_mut());
        self.set_timer();
        if has_more { Wait::Not } else { wait }
    }

    fn rounds(&mut self, mut queues: Option<&mut Queues<'_>>) -> Wait {
        let mut was_idle = true;
        let mut wait = Wait::Not;
        for round in 0..MAX_ROUNDS {
            // The events of the first round came with the wait. A second round is short where the first has done
            // everything, and then waiting or polling brings the new ones.
            let has_events = round > 1 && self.poll_events();
            let goes_on = self.round(&mut queues) | has_events;
            // What comes after a wait may be all there is, and is not to be late. Where work follows work, more may be on the way,
            // and one interrupt is for all of it.
            if was_idle || !goes_on || self.quiet.is_late() {
                self.end_rx(&mut queues);
            }
            was_idle = false;
            if goes_on {
                continue;
            }
            if let Some(queues) = &mut queues {
                if self.busy_poll(queues) {
                    was_idle = true;
                    // Its timer may have ended the poll, and the next poll may be long.
                    self.end_tx(queues);
                    continue;
                }
                if self.enable_kicks(queues) {
                    continue;
                }
            }
            self.busy_poll.begin(Instant::now);
            wait = Wait::ForEvents;
            break;
        }
        self.end_rx(&mut queues);
        if let Some(queues) = queues {
            self.end_tx(queues);
        }
        wait
    }

    /// Takes the events that are there now, up to a limit. False when there are none.
    fn poll_events(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        let mut has_events = false;
        for _ in 0..MAX_POLLS {
            self.epoll.wait(&mut events, Wait::Not);
            self.take_events(&events);
            has_events |= !events.is_empty();
            if !events.is_full() {
                break;
            }
        }
        self.events = events;
        has_events
    }

    fn timer_fired(&mut self) {
        let now = Instant::now();
        self.armed = None;
        self.acceptors.resume(now);
        self.backend.expire(now);
        self.tx_interrupts.expire(now);
        let (has_guest, has_memory) = (self.backend.has_guest(), self.rings.memory().is_some());
        self.driver_watch.expire(now, has_guest, has_memory);
    }

    /// Sets the timer for the next deadline. A timer that fires too early does no harm, so it is only ever set earlier.
    fn set_timer(&mut self) {
        let deadlines = [
            self.backend.next_deadline(),
            self.acceptors.deadline(),
            self.driver_watch.deadline(),
            self.tx_interrupts.deadline(),
        ];
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

    /// Polls for work for a short while, if that has paid lately. True when there is some.
    fn busy_poll(&mut self, queues: &mut Queues<'_>) -> bool {
        let Some(time) = self.busy_poll.time() else {
            return false;
        };
        let start = Instant::now();
        self.busy_poll.begin(|| start);
        loop {
            if self.has_packets(queues) || self.poll_events() {
                self.end_wait();
                return true;
            }
            if start.elapsed() >= time {
                return false;
            }
            // What is waited for may need this processor.
            std::thread::yield_now();
        }
    }

    /// There is something to do again.
    fn end_wait(&mut self) {
        let work = self.work;
        let usage = || Usage {
            cpu: thread_cpu(),
            work,
        };
        self.busy_poll.end(Instant::now, usage);
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
