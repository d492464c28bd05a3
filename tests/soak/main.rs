//! Two guests, a simulated and a real one, each with a daemon of its own, do all that guests do, for a long time and at
//! random: connections of every kind in both directions, stalls, kills of the VMM. Their daemons are replaced by others meanwhile,
//! and one of them dies now and then. Three more are siblings and reach each
//! other, two of them in one process, with streams and with messages. Every byte and every message is compared, and in the end
//! the daemons must have given everything back.
//!
//! `SOAK_SECONDS` says how long (`make soak`: 600; otherwise 15), `SOAK_SEED` repeats what a seed has drawn. The times at
//! which things happen are drawn as well, but kept only as well as the machine keeps them.

#[path = "../common/mod.rs"]
mod common;

mod checks;
mod course;
mod ends;
mod host;
mod lineage;
mod plan;
mod siblings;
mod sim;
mod uml;

use std::any::Any;
use std::env;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use signal_hook::consts::SIGINT;
use signal_hook::flag;

use checks::Rest;
use common::daemon::Daemon;
use common::handover::Way;
use course::{Course, Tally};
use lineage::Lineage;
use plan::{Abilities, Blow, Dice, Round};

/// How long to go on, in seconds, when nothing else is asked for.
const SECONDS: u64 = 15;

/// The part of the time that is the warm-up: a fifth of it.
const WARM_UP: u32 = 5;

/// A guest that a round is played with.
trait SoakGuest: Sized {
    const NAME: &str;
    const ABILITIES: Abilities;
    /// How its daemon is replaced.
    const WAY: Way;
    /// Its ends of a round's connections.
    type Parts;

    fn boot(daemon: &Daemon, dice: &mut Dice) -> Self;
    /// A VMM that comes and goes and never starts its device.
    fn stillborn(daemon: &Daemon);
    /// Starts the guest's ends. All that is to listen listens then.
    fn begin(&self, daemon: &Daemon, course: &Arc<Course>) -> Self::Parts;
    /// Waits until they have come to their end.
    fn finish(&self, parts: Self::Parts, course: &Course);
    fn suffer(&self, daemon: &Daemon, blow: Blow) -> Result<(), String>;
}

/// When to stop.
#[derive(Clone)]
struct Clock {
    start: Instant,
    length: Duration,
    /// By the user, or because the other guest has failed.
    stopped: Arc<AtomicBool>,
}

impl Clock {
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.is_stopped() || self.start.elapsed() >= self.length
    }

    fn is_warm(&self) -> bool {
        self.start.elapsed() >= self.length / WARM_UP
    }
}

fn main() -> ExitCode {
    // The arguments are cargo's, for any test program.
    let mut filters = env::args().skip(1).filter(|word| !word.starts_with('-'));
    if env::args().any(|word| word == "--list") {
        println!("soak: test");
        return ExitCode::SUCCESS;
    }
    if filters.next().is_some_and(|word| !"soak".contains(&word)) {
        println!("soak: filtered out");
        return ExitCode::SUCCESS;
    }
    soak()
}

fn soak() -> ExitCode {
    let seconds = number("SOAK_SECONDS").unwrap_or(SECONDS);
    let any = u64::from(RandomState::new().build_hasher().finish() as u32);
    let seed = number("SOAK_SEED").unwrap_or(any);
    println!("soak: {seconds} s, SOAK_SEED={seed}");
    let stopped = Arc::new(AtomicBool::new(false));
    // The second interrupt ends it at once.
    flag::register_conditional_shutdown(SIGINT, 1, Arc::clone(&stopped)).unwrap();
    flag::register(SIGINT, Arc::clone(&stopped)).unwrap();
    let clock = Clock {
        start: Instant::now(),
        length: Duration::from_secs(seconds),
        stopped,
    };
    let guests = [
        Player::start::<sim::Sim>(seed, &clock),
        Player::start::<uml::RealGuest>(seed, &clock),
        Player::start_with("siblings", &clock, move |clock, tally| {
            siblings::soak(Dice::new(seed, siblings::ABILITIES), clock, tally)
        }),
    ];
    show_progress(&guests, &clock);
    let mut failed = false;
    for guest in guests {
        let (name, tally) = (guest.name, guest.tally);
        let result = guest.thread.join();
        println!("{name}: {tally}");
        match result.unwrap_or_else(|panic| Err(text_of(&*panic))) {
            Ok(summary) => println!("{name}: {summary}"),
            Err(what) => {
                println!("{name}: FAILED with SOAK_SEED={seed}\n{what}");
                failed = true;
            }
        }
    }
    println!("soak: {}", if failed { "FAILED" } else { "ok" });
    ExitCode::from(u8::from(failed))
}

/// The number in an environment variable.
fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

/// One of the guests, or several that belong together, with a thread of its own.
struct Player {
    name: &'static str,
    tally: Arc<Tally>,
    thread: JoinHandle<Result<String, String>>,
}

impl Player {
    fn start<G: SoakGuest>(seed: u64, clock: &Clock) -> Self {
        Self::start_with(G::NAME, clock, move |clock, tally| {
            soak_guest::<G>(Dice::new(seed, G::ABILITIES), clock, tally)
        })
    }

    fn start_with(
        name: &'static str,
        clock: &Clock,
        play: impl FnOnce(&Clock, &Arc<Tally>) -> Result<String, String> + Send + 'static,
    ) -> Self {
        let tally = Arc::new(Tally::default());
        let (own, clock) = (Arc::clone(&tally), clock.clone());
        let thread = thread::spawn(move || {
            let stop = StopOthers(Arc::clone(&clock.stopped));
            let result = play(&clock, &own);
            if result.is_ok() {
                std::mem::forget(stop);
            }
            result
        });
        Self {
            name,
            tally,
            thread,
        }
    }
}

/// Prints the sums now and then, until all have ended.
fn show_progress(guests: &[Player], clock: &Clock) {
    let interval = (clock.length / 20).clamp(Duration::from_secs(5), Duration::from_secs(30));
    let mut next = interval;
    while !guests.iter().all(|guest| guest.thread.is_finished()) {
        sleep(Duration::from_millis(100));
        if clock.start.elapsed() >= next {
            for Player { name, tally, .. } in guests {
                println!("{:4} s, {name}: {tally}", next.as_secs());
            }
            next += interval;
        }
    }
}

/// Lets a guest and its daemon live together until the time is over, through at least two VMMs.
fn soak_guest<G: SoakGuest>(
    mut dice: Dice,
    clock: &Clock,
    tally: &Arc<Tally>,
) -> Result<String, String> {
    let lineage = Lineage::start(G::WAY);
    let daemon = lineage.daemon();
    let start = Rest::at_start(daemon);
    let mut warm: Option<Rest> = None;
    loop {
        let was_warm = warm.is_some() && clock.is_warm();
        live::<G>(&lineage, &mut dice, clock, tally)
            .map_err(|what| format!("{what}\nthe daemon's log:\n{}", tail(&daemon.log())))?;
        let now = Rest::again(daemon, start)?;
        if was_warm && clock.is_over() {
            daemon.assert_idle();
            let warm = warm.unwrap_or(now);
            now.check_memory(warm)?;
            return Ok(format!(
                "the daemon had {start}; after the warm-up {warm}; in the end {now}"
            ));
        }
        if clock.is_stopped() {
            daemon.assert_idle();
            return Ok(format!(
                "the daemon had {start}; in the end {now}; stopped before there was more memory to compare"
            ));
        }
        if !was_warm {
            warm = Some(now.or_larger(warm));
        }
    }
}

/// One VMM from its start to its violent end.
fn live<G: SoakGuest>(
    lineage: &Lineage,
    dice: &mut Dice,
    clock: &Clock,
    tally: &Arc<Tally>,
) -> Result<(), String> {
    let daemon = lineage.daemon();
    if dice.is_stillborn() {
        G::stillborn(daemon);
    }
    let guest = G::boot(daemon, dice);
    let rounds = dice.life();
    for round in 1.. {
        let is_last = round >= rounds || clock.is_over();
        play_round(&guest, lineage, dice.round(is_last), tally)?;
        if is_last {
            break;
        }
    }
    Tally::add(&tally.kills, 1);
    Ok(())
}

fn play_round<G: SoakGuest>(
    guest: &G,
    lineage: &Lineage,
    round: Round,
    tally: &Arc<Tally>,
) -> Result<(), String> {
    let daemon = lineage.daemon();
    let course = Arc::new(Course::new(round, Arc::clone(tally)));
    let doors = host::Doors::open(daemon, &course.round.plans);
    let parts = guest.begin(daemon, &course);
    let ends = host::start(daemon, &course, doors);
    let start = Instant::now();
    for &(moment, blow) in &course.round.blows {
        sleep(moment.saturating_sub(start.elapsed()));
        if matches!(blow, Blow::Killed | Blow::Crashed) {
            course.expect_kill();
        }
        let suffered = match blow {
            Blow::HandedOver => lineage.hand_over(),
            Blow::Crashed => {
                lineage.crash();
                Ok(())
            }
            _ => guest.suffer(daemon, blow),
        };
        let successors = matches!(blow, Blow::HandedOver | Blow::Crashed);
        Tally::add(&tally.successors, successors.into());
        if let Err(what) = suffered {
            course.fail(format!("{blow:?}: {what}"));
        }
        Tally::add(&tally.floods, blow.connections() as u64);
    }
    join(ends, &course);
    guest.finish(parts, &course);
    let failures = course.failures();
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("\n"))
    }
}

/// Waits for threads; one that has panicked is a failure of the round.
fn join(threads: Vec<JoinHandle<()>>, course: &Course) {
    for thread in threads {
        if let Err(panic) = thread.join() {
            course.fail(text_of(&*panic));
        }
    }
}

/// Stops the other guest when this one fails, in whatever way.
struct StopOthers(Arc<AtomicBool>);

impl Drop for StopOthers {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a panic has said.
fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
