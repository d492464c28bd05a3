//! What the ends of connections report: how a round goes, and the sums over all rounds.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::plan::{Kind, Plan, Round, Side};

/// Why an end did not come to the end of its part.
#[derive(Debug)]
pub enum Fault {
    /// The connection was not made, or ended too early: as it must when the VMM is killed.
    Cut(String),
    /// What must never be.
    Wrong(String),
}

impl Fault {
    /// The connection broke after `count` bytes that were `done`.
    pub fn after(count: usize, done: &str, error: &io::Error) -> Self {
        Self::Cut(format!("after {count} bytes {done}: {error}"))
    }
}

/// One guest's sums.
#[derive(Default)]
pub struct Tally {
    connections: Mutex<BTreeMap<Kind, u64>>,
    /// Connections that a kill has cut, or that met no VMM.
    pub cut: AtomicU64,
    /// Payload bytes, seen by the host's ends.
    pub bytes: AtomicU64,
    pub kills: AtomicU64,
    /// Daemons that have followed another, or a crash.
    pub successors: AtomicU64,
    /// Connections of floods.
    pub floods: AtomicU64,
}

impl Tally {
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let connections = self.connections.lock().unwrap();
        let sum: u64 = connections.values().sum();
        write!(f, "{sum} connections (")?;
        for (kind, count) in connections.iter() {
            write!(f, "{count} {kind}, ")?;
        }
        write!(
            f,
            "{} cut by a kill), {} in floods, {:.2} GiB, VMM kills: {}, new daemons: {}",
            value(&self.cut),
            value(&self.floods),
            value(&self.bytes) as f64 / f64::from(1 << 30),
            value(&self.kills),
            value(&self.successors)
        )
    }
}

/// A round that is under way.
pub struct Course {
    pub round: Round,
    pub tally: Arc<Tally>,
    killed: AtomicBool,
    failures: Mutex<Vec<String>>,
}

impl Course {
    pub fn new(round: Round, tally: Arc<Tally>) -> Self {
        Self {
            round,
            tally,
            killed: AtomicBool::new(false),
            failures: Mutex::default(),
        }
    }

    /// The VMM is about to be killed: what is cut from now on is cut for that.
    pub fn expect_kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
    }

    pub fn is_killed(&self) -> bool {
        self.killed.load(Ordering::SeqCst)
    }

    /// Takes how the end of `plan` at `side` went.
    pub fn report(&self, plan: &Plan, side: Side, result: Result<(), Fault>) {
        match result {
            Ok(()) if side == Side::Host => {
                let mut connections = self.tally.connections.lock().unwrap();
                *connections.entry(plan.kind).or_default() += 1;
            }
            Ok(()) => {}
            Err(Fault::Cut(_)) if self.is_killed() => {
                Tally::add(&self.tally.cut, u64::from(side == Side::Host));
            }
            Err(Fault::Cut(what) | Fault::Wrong(what)) => {
                self.fail(format!("{plan}, the {side:?}'s end: {what}\n  {plan:?}"));
            }
        }
    }

    pub fn fail(&self, what: String) {
        self.failures.lock().unwrap().push(what);
    }

    pub fn failures(&self) -> Vec<String> {
        std::mem::take(&mut self.failures.lock().unwrap())
    }
}
