//! The worker's epoll set.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use epoll::{ControlOptions, Event, Events};

use crate::syscalls::Syscall;
use crate::thread_backend::Registry;
use crate::thread_backend::event_source::EventSource;
use crate::vsock_conn::Readiness;

/// To wait for events and to choose their sources.
pub(super) const SYSCALLS: &[Syscall] = &[
    #[cfg(target_arch = "x86_64")]
    Syscall::any(libc::SYS_epoll_wait),
    Syscall::any(libc::SYS_epoll_pwait),
    Syscall::any(libc::SYS_epoll_ctl),
];

/// How many events are taken at a time.
const MAX_EVENTS: usize = 256;

/// How long to wait for events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until there is one.
    ForEvents,
    /// Not at all.
    Not,
}

/// An epoll set. Everything in it is edge-triggered: a change is reported once.
#[derive(Debug)]
pub struct Epoll(RawFd);

impl Epoll {
    pub(super) fn new() -> io::Result<Self> {
        epoll::create(true).map(Self)
    }

    /// Adds a descriptor whose reading counts.
    pub(super) fn add_input(&self, fd: &impl AsRawFd, source: EventSource) -> io::Result<()> {
        self.add(fd.as_raw_fd(), source, Events::EPOLLIN)
    }

    fn add(&self, fd: RawFd, source: EventSource, events: Events) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, source, events)
    }

    /// Gives a descriptor another source. Its state is reported again.
    fn modify(&self, fd: RawFd, source: EventSource, events: Events) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_MOD, fd, source, events)
    }

    fn control(
        &self,
        operation: ControlOptions,
        fd: RawFd,
        source: EventSource,
        events: Events,
    ) -> io::Result<()> {
        let event = Event::new(events | Events::EPOLLET, source.to_data());
        epoll::ctl(self.0, operation, fd, event)
    }

    /// Removes a descriptor. One that others have open stays in the set otherwise.
    pub(super) fn remove(&self, fd: &impl AsRawFd) {
        let (fd, event) = (fd.as_raw_fd(), Event::new(Events::empty(), 0));
        let _ = epoll::ctl(self.0, ControlOptions::EPOLL_CTL_DEL, fd, event);
    }

    /// Puts the events that are there into `events`. An interrupted wait brings none.
    pub fn wait(&self, events: &mut EventBuffer, wait: Wait) {
        let timeout = match wait {
            Wait::ForEvents => -1,
            Wait::Not => 0,
        };
        let none = Event::new(Events::empty(), 0);
        events.events.resize(MAX_EVENTS, none);
        events.count = epoll::wait(self.0, timeout, &mut events.events).unwrap_or(0);
    }
}

impl Drop for Epoll {
    fn drop(&mut self) {
        let _ = epoll::close(self.0);
    }
}

impl AsRawFd for Epoll {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// Registers the sockets of the table of connections.
#[derive(Debug)]
pub(super) struct SocketRegistry(pub(super) std::sync::Arc<Epoll>);

/// What is watched for on a socket: all that can happen to it but room.
fn socket_events() -> Events {
    Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLPRI
}

impl Registry for SocketRegistry {
    fn register(&self, socket: BorrowedFd<'_>, source: EventSource) -> io::Result<()> {
        let events = socket_events() | Events::EPOLLOUT;
        match self.0.add(socket.as_raw_fd(), source, events) {
            // A client's socket becomes a connection's.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                self.0.modify(socket.as_raw_fd(), source, events)
            }
            added => added,
        }
    }

    fn watch_room(&self, socket: BorrowedFd<'_>, source: EventSource, watch: bool) {
        let mut events = socket_events();
        events.set(Events::EPOLLOUT, watch);
        // A socket in the set can be changed: nothing is allocated for it.
        let _ = self.0.modify(socket.as_raw_fd(), source, events);
    }
}

/// Room for events.
#[derive(Debug, Default)]
pub struct EventBuffer {
    /// Allocated by the first wait.
    events: Vec<Event>,
    count: usize,
}

impl EventBuffer {
    /// Whether the last wait brought no event.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether there may be more events than the last wait could bring.
    pub(super) fn is_full(&self) -> bool {
        self.count == MAX_EVENTS
    }

    /// The events that the last wait brought: their sources, and what they say of a socket.
    pub(super) fn iter(&self) -> impl Iterator<Item = (EventSource, Readiness)> + '_ {
        self.events[..self.count].iter().filter_map(|event| {
            let source = EventSource::from_data(event.data)?;
            let flags = Events::from_bits_retain(event.events);
            let has = |wanted| flags.intersects(wanted);
            let ready = Readiness {
                readable: has(Events::EPOLLIN | Events::EPOLLRDHUP),
                until_empty: has(Events::EPOLLRDHUP | Events::EPOLLPRI),
                writable: has(Events::EPOLLOUT),
                hung_up: has(Events::EPOLLHUP | Events::EPOLLERR),
            };
            Some((source, ready))
        })
    }
}
