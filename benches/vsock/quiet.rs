//! Many connections with little traffic beside a few with all they can carry: how long the quiet ones wait.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::guest::{DISCARD_PORT, GUEST_PORT};
use crate::host::{self, accept_and_drain, connect, text};
use crate::measure::{Sample, Timing, key, percentiles};
use crate::mixed::Mixed;
use crate::pattern::REQUEST_LEN;
use crate::session::Session;
use crate::shared::Shared;
use crate::threads::{Running, join, join_all};

/// The size of the writes of all streams.
const WRITE: usize = 64 << 10;
/// How often one of the quiet connections sends a request: each in its turn, whether or not others have been answered.
const INTERVAL: Duration = Duration::from_millis(1);
const EVENTS: usize = 64;

/// The streams beside the quiet connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Out of the guest.
    pub out: usize,
    /// Into it.
    pub into: usize,
}

/// Measures `quiet` connections beside the streams.
pub fn run(
    mut session: Session,
    quiet: usize,
    busy: Busy,
    timing: &Timing,
) -> Result<Sample, String> {
    let mut streams: Vec<Running<()>> = Vec::new();
    let listener = session.listen()?;
    for _ in 0..busy.out {
        let listener = listener.try_clone().map_err(text)?;
        streams.push(session.spawn(move |shared| accept_and_drain(&listener, WRITE, shared)));
    }
    let app = Mixed::new(session.shared.clone(), busy.out, WRITE);
    let guest = session.start_guest(app)?;
    let path = session.daemon.uds_path();
    for _ in 0..busy.into {
        let path = path.clone();
        streams.push(session.spawn(move |shared| {
            let stream = connect(&path, DISCARD_PORT).map_err(text)?;
            host::fill(stream, WRITE, shared, |_| {})
        }));
    }
    let clients = session.spawn(move |shared| serve(&path, quiet, shared));
    let mut probe = session.probe();
    let window = probe
        .wait_for(|counts| {
            let out = busy.out == 0 || counts.to_host > 0;
            let into = busy.into == 0 || counts.to_guest > 0;
            counts.ops > 0 && out && into
        })
        .and_then(|()| probe.window(timing, false));
    session.shared.end();
    let latencies = join(clients)?;
    session.end(guest)?;
    join_all(streams)?;
    let window = window?;
    let mut sample = window.per_second();
    sample.extend(window.per_direction());
    let mut latencies = latencies.unwrap_or_default();
    sample.extend(percentiles(&mut latencies));
    // They are sorted now.
    if let Some(&worst) = latencies.last() {
        sample.insert(key::WORST_US, worst as f64 / 1e3);
    }
    Ok(sample)
}

/// A connection that sends a request now and then.
struct Client {
    stream: UnixStream,
    number: u64,
    /// When the request was sent that has no answer yet.
    sent: Option<Instant>,
    response: Vec<u8>,
}

/// Sends requests until the run is over. Returns how long those of the measured window took, in nanoseconds; one that has no
/// answer at the end counts with the time it has waited.
fn serve(uds_path: &Path, count: usize, shared: &Shared) -> Result<Vec<u64>, String> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|error| error.to_string())?;
    let mut clients = Vec::new();
    for i in 0..count {
        let client = Client::connect(uds_path).map_err(text)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, i as u64);
        epoll
            .add(&client.stream, event)
            .map_err(|error| error.to_string())?;
        clients.push(client);
    }
    let mut events = [EpollEvent::empty(); EVENTS];
    let mut latencies = Vec::new();
    let (mut turn, mut due) = (0, Instant::now());
    while !shared.stopped() {
        if Instant::now() >= due {
            due = Instant::now() + INTERVAL;
            clients[turn].request().map_err(text)?;
            turn = (turn + 1) % count;
        }
        let ready = epoll.wait(&mut events, EpollTimeout::from(1_u8));
        let ready = ready.map_err(|error| error.to_string())?;
        for event in &events[..ready] {
            let answered = clients[event.data() as usize].answer().map_err(text)?;
            if let Some(took) = answered
                && shared.add_op()
            {
                latencies.push(took.as_nanos() as u64);
            }
        }
    }
    let waiting = clients.iter().filter_map(|client| client.sent);
    latencies.extend(waiting.map(|sent| sent.elapsed().as_nanos() as u64));
    Ok(latencies)
}

impl Client {
    fn connect(uds_path: &Path) -> io::Result<Self> {
        let stream = connect(uds_path, GUEST_PORT)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            number: 0,
            sent: None,
            response: Vec::new(),
        })
    }

    fn bytes(&self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0x2d; REQUEST_LEN];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// Sends a request, unless it waits for the answer to one.
    fn request(&mut self) -> io::Result<()> {
        if self.sent.is_none() {
            self.number += 1;
            self.response.clear();
            self.sent = Some(Instant::now());
            self.stream.write_all(&self.bytes())?;
        }
        Ok(())
    }

    /// Reads. Returns how long the answer took when it is complete.
    fn answer(&mut self) -> io::Result<Option<Duration>> {
        let mut buffer = [0; REQUEST_LEN];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => self.response.extend(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        if self.response.len() < REQUEST_LEN {
            return Ok(None);
        }
        if self.response != self.bytes() {
            return Err(io::Error::other("a wrong echo"));
        }
        Ok(self.sent.take().map(|sent| sent.elapsed()))
    }
}
