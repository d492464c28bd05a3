//! The simulated guest's side.

use std::io::ErrorKind;
use std::sync::Arc;
use std::thread::{self, JoinHandle, sleep};

use super::SoakGuest;
use super::common::daemon::Daemon;
use super::common::handover::Way;
use super::common::host::Listener;
use super::common::sim::ring::Indirect;
use super::common::sim::{GuestStack, HeaderPlace, Setup, SimGuest, TxLayout};
use super::course::{Course, Fault};
use super::ends;
use super::host;
use super::plan::{Abilities, Blow, Dice, Kind, Plan, Side};

/// The sockets of a simulated guest.
pub struct Sim(Arc<GuestStack>);

impl SoakGuest for Sim {
    const NAME: &str = "simulated guest";
    const ABILITIES: Abilities = Abilities {
        connections: 60,
        resets: true,
        messages: false,
        lines: true,
        blows: |time, count| {
            vec![
                Blow::NoBuffers(time),
                Blow::Paused(time),
                Blow::Refused(count),
                Blow::Accepted(count),
                Blow::Deserted(count),
                Blow::HandedOver,
                Blow::Crashed,
            ]
        },
    };
    const WAY: Way = Way::Manager;
    type Parts = Vec<JoinHandle<()>>;

    fn boot(daemon: &Daemon, dice: &mut Dice) -> Self {
        let guest = SimGuest::start(daemon, dice.one_of(&drivers()).clone());
        Self(Arc::new(GuestStack::new(guest)))
    }

    fn stillborn(daemon: &Daemon) {
        drop(SimGuest::connect(daemon, Setup::default()));
    }

    fn begin(&self, _daemon: &Daemon, course: &Arc<Course>) -> Self::Parts {
        let plans = course.round.plans.iter();
        let plans: Vec<_> = plans
            .filter(|plan| plan.concerns_guest())
            .cloned()
            .collect();
        for plan in plans.iter().filter(|plan| plan.opener == Side::Host) {
            self.0.listen(plan.port());
        }
        let ends = plans.into_iter().map(|plan| {
            let (stack, course) = (Arc::clone(&self.0), Arc::clone(course));
            thread::spawn(move || {
                sleep(plan.delay);
                course.report(&plan, Side::Guest, play(&stack, &plan, &course));
            })
        });
        ends.collect()
    }

    fn finish(&self, parts: Self::Parts, course: &Course) {
        super::join(parts, course);
    }

    fn suffer(&self, daemon: &Daemon, blow: Blow) -> Result<(), String> {
        match blow {
            Blow::NoBuffers(time) => {
                self.0.with_guest(|guest| guest.auto_repost = false);
                sleep(time);
                self.0.with_guest(|guest| {
                    guest.auto_repost = true;
                    guest.post_rx();
                });
            }
            Blow::Paused(time) => {
                self.0.pause();
                sleep(time);
                self.0.resume();
            }
            Blow::Refused(count) => self.flood(host::NOBODY, count, 0)?,
            Blow::Accepted(count) => {
                let _program = Listener::bind(daemon, host::FLOODED);
                self.flood(host::FLOODED, count, count)?;
            }
            Blow::Deserted(count) => host::desert(daemon, count),
            Blow::HandedOver | Blow::Crashed => {}
            Blow::Killed => self.0.kill(),
        }
        Ok(())
    }
}

impl Sim {
    /// Connects so many times at once. Of these, so many are accepted.
    fn flood(&self, port: u32, count: usize, accepted: usize) -> Result<(), String> {
        let streams = self.0.connect_many(port, count);
        let streams = streams.map_err(|error| format!("not all are answered: {error}"))?;
        if streams.len() == accepted {
            Ok(())
        } else {
            Err(format!("{} of {count} were accepted", streams.len()))
        }
    }
}

/// How the guest's driver may have set its device up.
pub fn drivers() -> [Setup; 4] {
    let linux = Setup::default();
    let newer = Setup {
        queues: 3,
        indirect: Indirect::Whole,
        tx: TxLayout {
            header: HeaderPlace::Alone,
            descriptors: 17,
        },
        cap_in_flight: true,
        ..linux.clone()
    };
    let other = Setup {
        ring_size: 64,
        features: 0,
        rx: vec![44, 4096],
        tx: TxLayout {
            header: HeaderPlace::Together,
            descriptors: 1,
        },
        enable_first: true,
        call_first: true,
        ..linux.clone()
    };
    let wasteful = Setup {
        indirect: Indirect::Whole,
        rx: [vec![0; 30], vec![4096]].concat(),
        ..linux.clone()
    };
    [linux, newer, other, wasteful]
}

fn play(stack: &GuestStack, plan: &Plan, course: &Course) -> Result<(), Fault> {
    let stream = match plan.opener {
        Side::Host => stack.try_accept(plan.port()),
        Side::Guest => match stack.connect(plan.port()) {
            Err(error) if plan.kind == Kind::Refused => {
                return match error.kind() {
                    ErrorKind::ConnectionRefused => Ok(()),
                    _ => Err(Fault::Cut(format!("instead of a refusal: {error}"))),
                };
            }
            Ok(_) if plan.kind == Kind::Refused => {
                return Err(Fault::Wrong("connected to nobody".into()));
            }
            opened => opened.ok(),
        },
    };
    let stream = stream.ok_or_else(|| Fault::Cut("no connection".into()))?;
    ends::play(stream, plan, Side::Guest, course)
}
