//! The cases, and one run of one of them against one daemon.

use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::apps::{After, Client, Echo, Sender, Streams};
use crate::daemon::{Binary, Daemon};
use crate::guest::{App, Guest};
use crate::idle;
use crate::limits::Limit;
use crate::measure::{Probe, Sample, Timing, key, percentiles};
use crate::packet::MAX_PAYLOAD;
use crate::ring::Notifications;
use crate::shared::Shared;
use crate::{echo_clients, host, uml};

/// The port of host programs.
pub const HOST_PORT: u32 = 5000;
/// How long traffic may take to begin.
const BEGIN_PATIENCE: Duration = Duration::from_secs(10);
/// How long a thread may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// What a case does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Streams, in writes of `write` bytes.
    Streams {
        /// From the guest to the host.
        to_host: bool,
        /// From the host to the guest.
        to_guest: bool,
        /// Bytes per write.
        write: usize,
    },
    /// A guest program asks a host program, on one connection.
    Ask,
    /// A guest program connects, asks, and closes.
    Connect,
    /// So many host programs send 4 KiB and wait for the echo.
    Echo(usize),
    /// So many connections that do nothing.
    Idle(usize),
    /// A stream of a real guest.
    Uml(uml::Stream),
    /// Nothing but the start.
    StartUp,
}

/// One case.
pub struct Case {
    /// Its name on the command line and in the report.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// What the machine could do.
    pub limit: Option<Limit>,
}

const fn stream(name: &'static str, to_host: bool, to_guest: bool, write: usize) -> Case {
    // Small writes of the guest are no limit: a daemon may join them.
    let limit = match (to_host, to_guest, write) {
        (true, true, _) => None,
        (true, false, _) if write < MAX_PAYLOAD => None,
        _ => Some(Limit::SocketPair(write)),
    };
    let kind = Kind::Streams {
        to_host,
        to_guest,
        write,
    };
    Case { name, kind, limit }
}

const fn other(name: &'static str, kind: Kind, limit: Option<Limit>) -> Case {
    Case { name, kind, limit }
}

const fn real(name: &'static str, to_host: bool, write: usize) -> Case {
    other(name, Kind::Uml(uml::Stream { to_host, write }), None)
}

/// All cases, in the order of the report.
pub const CASES: &[Case] = &[
    stream("guest to host 64 KiB", true, false, 64 << 10),
    stream("guest to host 4 KiB", true, false, 4 << 10),
    stream("guest to host 256 B", true, false, 256),
    stream("host to guest 64 KiB", false, true, 64 << 10),
    stream("host to guest 4 KiB", false, true, 4 << 10),
    stream("host to guest 256 B", false, true, 256),
    stream("both directions 64 KiB", true, true, 64 << 10),
    other("request-response 64 B", Kind::Ask, Some(Limit::Relay)),
    other("connect-exchange-close", Kind::Connect, None),
    other("100 connections echo 4 KiB", Kind::Echo(100), None),
    other("1000 connections echo 4 KiB", Kind::Echo(1000), None),
    other("1000 idle connections", Kind::Idle(1000), None),
    other("start-up", Kind::StartUp, None),
    real("Linux guest to host 64 KiB", true, 64 << 10),
    real("Linux guest to host 4 KiB", true, 4 << 10),
    real("host to Linux guest 64 KiB", false, 64 << 10),
    real("host to Linux guest 4 KiB", false, 4 << 10),
];

impl Kind {
    /// The key of the result that the case is about.
    pub fn headline(self) -> &'static str {
        match self {
            Self::Streams { .. } | Self::Uml(_) => key::MIB_PER_S,
            Self::Ask => key::P50_US,
            Self::Connect | Self::Echo(_) => key::OPS_PER_S,
            Self::Idle(_) => key::ANON_KIB_PER_CONN,
            Self::StartUp => key::START_UP_MS,
        }
    }

    /// Whether system calls are worth counting.
    pub fn has_traffic(self) -> bool {
        !matches!(self, Self::Idle(_) | Self::StartUp)
    }

    /// Runs once against a fresh daemon; with `syscalls`, they are counted, and other results are disturbed.
    pub fn run(self, binary: &Binary, timing: &Timing, syscalls: bool) -> Result<Sample, String> {
        catching(|| {
            let daemon = Daemon::start(binary).map_err(|error| error.to_string())?;
            match self {
                Self::StartUp => idle::start_up(&daemon),
                Self::Uml(stream) => stream.run(daemon, timing, syscalls),
                _ => Session::begin(daemon)?.run(self, timing, syscalls),
            }
        })
    }
}

/// A daemon with a guest and host programs.
pub struct Session {
    /// The daemon.
    pub daemon: Daemon,
    /// What the threads share.
    pub shared: Arc<Shared>,
    notifications: Arc<Notifications>,
    guest: Option<Guest>,
}

/// A thread of a run; it gives nothing when it failed.
pub type Running<T> = JoinHandle<Option<T>>;

impl Session {
    fn begin(daemon: Daemon) -> Result<Self, String> {
        let notifications = Arc::new(Notifications::default());
        let guest = Guest::start(&daemon.vhost_socket(), &notifications);
        Ok(Self {
            daemon,
            shared: Arc::new(Shared::default()),
            notifications,
            guest: Some(guest.map_err(|error| error.to_string())?),
        })
    }

    fn run(mut self, kind: Kind, timing: &Timing, syscalls: bool) -> Result<Sample, String> {
        match kind {
            Kind::Streams {
                to_host,
                to_guest,
                write,
            } => self.streams([to_host, to_guest], write, timing, syscalls),
            Kind::Ask => self.client(After::AskAgain, timing, syscalls),
            Kind::Connect => self.client(After::Reconnect, timing, syscalls),
            Kind::Echo(count) => self.echo(count, timing, syscalls),
            Kind::Idle(count) => idle::idle(&mut self, count, timing),
            Kind::StartUp | Kind::Uml(_) => Err("no simulated guest".into()),
        }
    }

    fn streams(
        mut self,
        [to_host, to_guest]: [bool; 2],
        write: usize,
        timing: &Timing,
        syscalls: bool,
    ) -> Result<Sample, String> {
        let mut threads = Vec::new();
        let sender = to_host.then(|| Sender::new(HOST_PORT, write));
        if to_host {
            let listener = self.listen()?;
            threads.push(self.spawn(move |shared| host::take_stream(&listener, write, shared)));
        }
        let guest = self.start_guest(Streams::new(self.shared.clone(), sender, write))?;
        if to_guest {
            let path = self.daemon.uds_path();
            threads.push(self.spawn(move |shared| host::give_stream(&path, write, shared)));
        }
        let window = self.probe().window(timing, syscalls);
        self.end(guest)?;
        join_all(threads)?;
        Ok(window?.per_byte())
    }

    fn client(mut self, after: After, timing: &Timing, syscalls: bool) -> Result<Sample, String> {
        let listener = self.listen()?;
        let host = self.spawn(move |shared| host::answer(&listener, shared));
        let guest = self.start_guest(Client::new(self.shared.clone(), HOST_PORT, after))?;
        let window = self.probe().window(timing, syscalls);
        let client = self.end(guest)?;
        join_all(vec![host])?;
        let mut sample = window?.per_op();
        if let Some(mut client) = client {
            sample.extend(percentiles(&mut client.latencies));
        }
        Ok(sample)
    }

    fn echo(mut self, count: usize, timing: &Timing, syscalls: bool) -> Result<Sample, String> {
        let guest = self.start_guest(Echo::default())?;
        let path = self.daemon.uds_path();
        let host = self.spawn(move |shared| echo_clients::run(&path, count, shared));
        let window = self.probe().window(timing, syscalls);
        self.shared.end();
        let counts = join(host)?;
        self.end(guest)?;
        let mut sample = window?.per_op();
        if let Some(counts) = counts {
            let slowest = counts.iter().min().copied().unwrap_or(0) as f64;
            let fastest = counts.iter().max().copied().unwrap_or(0).max(1) as f64;
            sample.insert(key::FAIRNESS, slowest / fastest);
        }
        Ok(sample)
    }

    /// Starts the guest's thread.
    pub fn start_guest<A: App + Send + 'static>(
        &mut self,
        mut app: A,
    ) -> Result<Running<A>, String> {
        let mut guest = self.guest.take().ok_or("the guest runs already")?;
        Ok(self.spawn(move |shared| guest.serve(&mut app, shared).map(|()| app)))
    }

    /// Ends the run: the guest first, then the daemon, so that no host program waits any longer.
    pub fn end<A>(&mut self, guest: Running<A>) -> Result<Option<A>, String> {
        self.shared.end();
        let app = join(guest);
        self.daemon.kill();
        app
    }

    fn listen(&self) -> Result<UnixListener, String> {
        let path = self.daemon.host_port_path(HOST_PORT);
        UnixListener::bind(path).map_err(|error| error.to_string())
    }

    fn probe(&mut self) -> Probe<'_> {
        Probe {
            daemon: &mut self.daemon,
            shared: &self.shared,
            notifications: &self.notifications,
            patience: BEGIN_PATIENCE,
        }
    }

    fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, String> + Send + 'static,
    ) -> Running<T> {
        spawn(&self.shared, work)
    }
}

/// Starts a thread whose failure ends the run.
pub fn spawn<T: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Result<T, String> + Send + 'static,
) -> Running<T> {
    let shared = shared.clone();
    thread::spawn(move || {
        catching(|| work(&shared))
            .inspect_err(|failure| shared.fail(failure))
            .ok()
    })
}

fn join<T>(thread: Running<T>) -> Result<Option<T>, String> {
    let begin = Instant::now();
    while !thread.is_finished() {
        if begin.elapsed() > END_PATIENCE {
            return Err("a thread does not end".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    thread.join().map_err(|_| "a thread panicked".into())
}

/// Waits for threads that have nothing to say.
pub fn join_all(threads: Vec<Running<()>>) -> Result<(), String> {
    threads
        .into_iter()
        .try_for_each(|thread| join(thread).map(drop))
}

/// Makes a failure of a panic: the frontend panics when a daemon does not answer.
fn catching<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("panicked").into())
    })
}
