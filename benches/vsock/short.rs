//! Many short connections: what each costs, and what they leave behind.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::Instant;

use crate::apps::Echo;
use crate::idle::{SETTLE, exchange};
use crate::measure::{Sample, key, percentiles};
use crate::session::Session;
use crate::threads::join;

/// How many host programs connect at the same time.
const PROGRAMS: usize = 8;

/// `count` connections of host programs, each of which is opened, used for 64 bytes each way, and closed.
pub fn run(mut session: Session, count: usize) -> Result<Sample, String> {
    let text = |error: io::Error| error.to_string();
    let guest = session.start_guest(Echo::default())?;
    let path = session.daemon.uds_path();
    // What is allocated once belongs to none of them.
    drop(exchange(&path).map_err(text)?);
    sleep(SETTLE);
    let (anon, _) = session.daemon.memory().map_err(text)?;
    let opened = Arc::new(AtomicUsize::new(0));
    let mut programs = Vec::new();
    for _ in 0..PROGRAMS {
        let (path, opened) = (path.clone(), opened.clone());
        programs.push(session.spawn(move |shared| {
            let mut latencies = Vec::new();
            while opened.fetch_add(1, Ordering::Relaxed) < count && !shared.stopped() {
                let begin = Instant::now();
                drop(exchange(&path).map_err(text)?);
                latencies.push(begin.elapsed().as_nanos() as u64);
                shared.add_op();
            }
            Ok(latencies)
        }));
    }
    let window = session.probe().until(|counts| counts.ops >= count as u64);
    sleep(SETTLE);
    let memory = session.daemon.memory();
    session.end(guest)?;
    let mut latencies = Vec::new();
    for program in programs {
        latencies.extend(join(program)?.unwrap_or_default());
    }
    let mut sample = window?.per_op()?;
    sample.insert(key::ANON_KIB_LEFT, memory.map_err(text)?.0 - anon);
    sample.extend(percentiles(&mut latencies));
    Ok(sample)
}
