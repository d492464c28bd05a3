//! The real guest's side: `soak` in `tests/guest/peer.py` plays its parts.

use std::fs;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use super::SoakGuest;
use super::common::daemon::Daemon;
use super::common::guest::GuestProcess;
use super::common::handover::Way;
use super::common::host::Listener;
use super::common::scenarios::spawn_peer;
use super::common::uml::Uml;
use super::course::Course;
use super::host;
use super::plan::{Abilities, Blow, Dice, Part, Plan};

/// The host port where the guest's program says that it listens everywhere.
const READY_PORT: u32 = 19_999;

/// A guest under User-Mode Linux, until it is killed.
pub struct RealGuest(Mutex<Option<Uml>>);

impl SoakGuest for RealGuest {
    const NAME: &str = "UML guest";
    const ABILITIES: Abilities = Abilities {
        connections: 30,
        resets: false,
        messages: false,
        lines: true,
        blows: |time, count| vec![Blow::Paused(time), Blow::Deserted(count), Blow::HandedOver],
    };
    const WAY: Way = Way::Path;
    type Parts = GuestProcess;

    fn boot(daemon: &Daemon, _dice: &mut Dice) -> Self {
        Self(Mutex::new(Some(Uml::boot(daemon))))
    }

    fn stillborn(_daemon: &Daemon) {}

    fn begin(&self, daemon: &Daemon, course: &Arc<Course>) -> Self::Parts {
        let ready = Listener::bind(daemon, READY_PORT);
        // The guest sees the host's files; they would be too much for its serial line.
        let file = daemon.directory().join("plans");
        let plans = course.round.plans.iter();
        let lines = plans.filter(|plan| plan.concerns_guest()).map(line);
        fs::write(&file, lines.collect::<String>()).unwrap();
        let task = format!("soak {READY_PORT} {}", file.display());
        let peer = self.with(|uml| spawn_peer(uml, &task));
        drop(ready.accept());
        peer
    }

    fn finish(&self, peer: Self::Parts, course: &Course) {
        if course.is_killed() {
            return;
        }
        let output = peer.wait();
        if output.status != 0 {
            course.fail(format!("in the guest: {}{}", output.stdout, output.stderr));
        }
    }

    fn suffer(&self, daemon: &Daemon, blow: Blow) -> Result<(), String> {
        match blow {
            Blow::Deserted(count) => host::desert(daemon, count),
            Blow::Refused(_)
            | Blow::Accepted(_)
            | Blow::NoBuffers(_)
            | Blow::HandedOver
            | Blow::Crashed => {
                unreachable!("not among its abilities")
            }
            Blow::Paused(time) => {
                self.with(|uml| uml.freeze(true));
                sleep(time);
                self.with(|uml| uml.freeze(false));
            }
            Blow::Killed => self
                .0
                .lock()
                .unwrap()
                .take()
                .into_iter()
                .for_each(Uml::kill),
        }
        Ok(())
    }
}

impl RealGuest {
    fn with<T>(&self, work: impl FnOnce(&Uml) -> T) -> T {
        let uml = self.0.lock().unwrap();
        work(uml.as_ref().expect("a guest that was killed"))
    }
}

/// A plan as the guest's program reads it.
fn line(plan: &Plan) -> String {
    let part = |part: &Part| {
        let stall: Duration = part.stall;
        format!(
            "{} {} {} {} {:?}",
            part.bytes,
            part.write,
            part.stall_at,
            stall.as_secs_f64(),
            part.ending
        )
    };
    let Plan { number, kind, .. } = plan;
    format!(
        "{number} {kind:?} {:?} {} {} {} {}\n",
        plan.opener,
        plan.port(),
        plan.delay.as_secs_f64(),
        part(&plan.guest),
        part(&plan.host)
    )
}
