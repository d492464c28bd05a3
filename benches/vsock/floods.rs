//! What is left of a stream, of round trips and of connections beside a flood, and whether the flood gets its answers.

use crate::apps::{Echo, Flooded, Requests, Sender, Streams};
use crate::flooders::{self, Writers};
use crate::guest::{App, CLOSED_PORT, DISCARD_PORT};
use crate::host::{self, HOST_PORT};
use crate::measure::{Sample, Timing, key, percentiles};
use crate::session::Session;
use crate::shared::Shared;
use crate::threads::{Running, join, join_all};

/// The size of the writes of all streams.
const WRITE: usize = 64 << 10;

/// What is measured beside the flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measured {
    /// A stream from the guest to the host.
    ToHost,
    /// A stream from the host to the guest.
    ToGuest,
    /// A host program that sends 64 bytes to the guest and waits for the echo.
    Echo,
    /// A host program that connects to the guest and waits for the OK.
    Connect,
}

impl Measured {
    /// Whether it is about throughput; about latency otherwise.
    pub fn is_stream(self) -> bool {
        matches!(self, Self::ToHost | Self::ToGuest)
    }
}

/// Who floods the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// Nobody.
    None,
    /// The guest, with REQUESTs to ports on which nobody listens.
    RefusedRequests(Requests),
    /// Host programs, with CONNECTs to a port on which nobody listens.
    RefusedConnects,
    /// Host programs, with CONNECTs that are accepted, and closed at once.
    AcceptedConnects,
    /// Host programs that write single bytes to so many connections.
    Bytes(usize),
    /// Host programs that write streams to so many connections.
    Streams(usize),
}

impl Flood {
    /// Makes the connections over which the flood will come.
    fn prepare(self, session: &Session) -> Result<Option<Writers>, String> {
        let (count, write) = match self {
            Self::Bytes(count) => (count, 1),
            Self::Streams(count) => (count, WRITE),
            _ => return Ok(None),
        };
        Writers::connect(&session.daemon.uds_path(), count, write).map(Some)
    }

    fn start(self, session: &Session, writers: Option<Writers>) -> Option<Running<()>> {
        session.shared.flood();
        let path = session.daemon.uds_path();
        let port = match self {
            Self::None | Self::RefusedRequests(_) => return None,
            Self::Bytes(_) | Self::Streams(_) => {
                return writers.map(|writers| session.spawn(|shared| writers.run(shared)));
            }
            Self::RefusedConnects => CLOSED_PORT,
            Self::AcceptedConnects => DISCARD_PORT,
        };
        Some(session.spawn(move |shared| flooders::reconnect(&path, port, shared)))
    }
}

/// Measures beside a flood.
pub fn run(
    session: Session,
    measured: Measured,
    flood: Flood,
    timing: &Timing,
) -> Result<Sample, String> {
    let shared = session.shared.clone();
    let path = session.daemon.uds_path();
    match measured {
        Measured::ToHost => {
            let listener = session.listen()?;
            let app = Streams::new(shared, Some(Sender::new(HOST_PORT, WRITE)), WRITE);
            beside(session, app, flood, timing, move |shared| {
                host::accept_and_drain(&listener, WRITE, shared).map(|()| Vec::new())
            })
        }
        Measured::ToGuest => {
            let app = Streams::new(shared, None, WRITE);
            beside(session, app, flood, timing, move |shared| {
                host::connect_and_fill(&path, WRITE, shared).map(|()| Vec::new())
            })
        }
        Measured::Echo => beside(session, Echo::default(), flood, timing, move |shared| {
            host::connect_and_request_echoes(&path, shared)
        }),
        Measured::Connect => beside(session, Echo::default(), flood, timing, move |shared| {
            host::reconnect(&path, shared)
        }),
    }
}

/// Lets the flood begin when the traffic between `app` and `host_program`, which returns its latencies, has begun.
fn beside<A: App + Send + 'static>(
    mut session: Session,
    app: A,
    flood: Flood,
    timing: &Timing,
    host_program: impl FnOnce(&Shared) -> Result<Vec<u64>, String> + Send + 'static,
) -> Result<Sample, String> {
    let requests = match flood {
        Flood::RefusedRequests(requests) => Some(requests),
        _ => None,
    };
    let app = Flooded::new(app, session.shared.clone(), requests);
    let guest = session.start_guest(app)?;
    let writers = flood.prepare(&session)?;
    let host = session.spawn(host_program);
    let begun = session.probe().wait_for_traffic();
    let flooder = flood.start(&session, writers);
    let window = begun.and_then(|()| session.probe().window(timing, false));
    session.end(guest)?;
    let latencies = join(host)?;
    join_all(flooder.into_iter().collect())?;
    let window = window?;
    let mut sample = window.per_second();
    if requests.is_some() {
        sample.insert(key::FLOOD_ANSWERED, window.flood_answered());
    }
    sample.extend(percentiles(&mut latencies.unwrap_or_default()));
    Ok(sample)
}
