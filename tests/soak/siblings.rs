//! Guests that reach each other: two in one daemon, and one in a daemon of its own.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::thread::{self, JoinHandle, sleep};
use std::time::Instant;

use super::Clock;
use super::checks::Rest;
use super::common::daemon::PATIENCE;
use super::common::siblings::Vms;
use super::common::sim::{GuestStack, GuestStream, Setup, SimGuest};
use super::course::{Course, Fault, Tally};
use super::ends::{self, Messages};
use super::plan::{Abilities, Blow, Dice, Kind, Plan, Round, Side};
use super::sim::drivers;

pub const ABILITIES: Abilities = Abilities {
    connections: 18,
    resets: true,
    messages: true,
    lines: false,
    blows: |time, _| vec![Blow::NoBuffers(time), Blow::Paused(time)],
};

const CIDS: [u64; 3] = [5, 6, 7];

/// The CIDs of each daemon's VMs.
const DAEMONS: [&[u64]; 2] = [&[5, 6], &[7]];

/// Who connects to whom: the guest and the host of the plans.
const PAIRS: [(usize, usize); 3] = [(0, 1), (1, 2), (2, 0)];

/// How a guest's life ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Reboot,
    VmmKilled,
    DaemonKilled,
}

const ENDS: [End; 3] = [End::Reboot, End::VmmKilled, End::DaemonKilled];

/// Lets siblings live together until the time is over. All VMMs end at the end of each of their lives, and the daemons must
/// then have what they had at their start.
pub fn soak(mut dice: Dice, clock: &Clock, tally: &Arc<Tally>) -> Result<String, String> {
    let mut vms = Vms::none();
    DAEMONS.iter().for_each(|cids| start(&mut vms, cids));
    let mut rests = DAEMONS.map(|cids| Rest::at_start(vms.daemon(cids[0])));
    loop {
        let killed = live(&mut vms, &mut dice, clock, tally).map_err(|what| {
            let logs = DAEMONS.map(|cids| super::tail(&vms.daemon(cids[0]).log()));
            format!("{what}\nthe daemons' logs:\n{}", logs.join("\n--\n"))
        })?;
        for (cids, rest) in DAEMONS.iter().zip(&mut rests) {
            if killed == *cids {
                *rest = Rest::at_start(vms.daemon(cids[0]));
            }
            Rest::again(vms.daemon(cids[0]), *rest)?;
        }
        if clock.is_over() {
            vms.assert_idle();
            let [both, one] = rests;
            return Ok(format!("the daemons had {both}; and {one}"));
        }
    }
}

fn start(vms: &mut Vms, cids: &[u64]) {
    let options: Vec<_> = cids.iter().map(|cid| (*cid, vms.sibling_dir())).collect();
    vms.add_daemon(&options);
}

/// From the start of all guests to the end of one of them, which ends that of the others. Returns the VMs whose daemon was
/// killed and started again.
fn live(
    vms: &mut Vms,
    dice: &mut Dice,
    clock: &Clock,
    tally: &Arc<Tally>,
) -> Result<&'static [u64], String> {
    let stacks = CIDS.map(|cid| Arc::new(boot(vms, cid, dice)));
    let rounds = dice.life();
    let mut killed: &[u64] = &[];
    for round in 1.. {
        let is_last = round >= rounds || clock.is_over();
        let round = dice.round(is_last);
        let mut world = World {
            stacks: &stacks,
            vms,
            dice,
            killed,
        };
        world.play(round, tally)?;
        killed = world.killed;
        if is_last {
            break;
        }
    }
    Tally::add(&tally.kills, 1);
    stacks.iter().for_each(|stack| stack.kill());
    Ok(killed)
}

fn boot(vms: &Vms, cid: u64, dice: &mut Dice) -> GuestStack {
    let setup = Setup {
        cid,
        ..dice.one_of(&drivers()).clone()
    };
    GuestStack::new(SimGuest::start_over(vms.vmm(cid), setup.with_messages()))
}

/// The guests in a round.
struct World<'w> {
    stacks: &'w [Arc<GuestStack>; 3],
    vms: &'w mut Vms,
    dice: &'w mut Dice,
    killed: &'static [u64],
}

impl World<'_> {
    fn play(&mut self, round: Round, tally: &Arc<Tally>) -> Result<(), String> {
        let Round { plans, blows } = round;
        // Each pair has its own course: a guest's end cuts the connections of its pairs, and no others.
        let courses = [0, 1, 2].map(|pair| {
            let plans = plans.iter().filter(|plan| plan.number % 3 == pair);
            let round = Round {
                plans: plans.cloned().collect(),
                blows: Vec::new(),
            };
            Arc::new(Course::new(round, Arc::clone(tally)))
        });
        let ends: Vec<_> = PAIRS
            .iter()
            .zip(&courses)
            .map(|(pair, course)| begin(self.stacks, *pair, course))
            .collect();
        let start = Instant::now();
        for (moment, blow) in blows {
            sleep(moment.saturating_sub(start.elapsed()));
            self.suffer(blow, &courses);
        }
        for (ends, course) in ends.into_iter().zip(&courses) {
            super::join(ends, course);
        }
        let failures: Vec<_> = courses
            .iter()
            .flat_map(|course| course.failures())
            .collect();
        if failures.is_empty() {
            Ok(())
        } else {
            Err(failures.join("\n"))
        }
    }

    /// Lets it befall any of the guests.
    fn suffer(&mut self, blow: Blow, courses: &[Arc<Course>; 3]) {
        let victim = *self.dice.one_of(&[0, 1, 2]);
        let stack = &self.stacks[victim];
        match blow {
            Blow::NoBuffers(time) => {
                stack.with_guest(|guest| guest.auto_repost = false);
                sleep(time);
                stack.with_guest(|guest| {
                    guest.auto_repost = true;
                    guest.post_rx();
                });
            }
            Blow::Paused(time) => {
                stack.pause();
                sleep(time);
                stack.resume();
            }
            Blow::Killed => self.end(victim, courses),
            Blow::Refused(_)
            | Blow::Accepted(_)
            | Blow::Deserted(_)
            | Blow::HandedOver
            | Blow::Crashed => {
                unreachable!("not among its abilities")
            }
        }
    }

    fn end(&mut self, victim: usize, courses: &[Arc<Course>; 3]) {
        let end = *self.dice.one_of(&ENDS);
        let own = [CIDS[victim]];
        let cids = match end {
            End::DaemonKilled => DAEMONS[usize::from(victim == 2)],
            End::Reboot | End::VmmKilled => &own,
        };
        for ((one, other), course) in PAIRS.iter().zip(courses) {
            if cids.contains(&CIDS[*one]) || cids.contains(&CIDS[*other]) {
                course.expect_kill();
            }
        }
        match end {
            End::Reboot => self.stacks[victim].reboot(),
            End::VmmKilled => self.stacks[victim].kill(),
            End::DaemonKilled => {
                self.vms.kill_daemon(cids[0]);
                for (stack, cid) in self.stacks.iter().zip(CIDS) {
                    if cids.contains(&cid) {
                        stack.kill();
                    }
                }
                self.killed = DAEMONS[usize::from(victim == 2)];
                start(self.vms, cids);
            }
        }
    }
}

/// Starts both ends of all connections of a pair of guests.
fn begin(
    stacks: &[Arc<GuestStack>; 3],
    pair: (usize, usize),
    course: &Arc<Course>,
) -> Vec<JoinHandle<()>> {
    let sides = [(Side::Guest, pair.0, pair.1), (Side::Host, pair.1, pair.0)];
    let plans = &course.round.plans;
    for (side, own, _) in sides {
        let awaited = plans.iter().filter(|plan| plan.is_met());
        for plan in awaited.filter(|plan| plan.opener != side) {
            stacks[own].listen(plan.port());
        }
    }
    let ends = plans.iter().flat_map(|plan| {
        sides.map(|(side, own, other)| {
            let (plan, course) = (plan.clone(), Arc::clone(course));
            let stack = Arc::clone(&stacks[own]);
            thread::spawn(move || {
                sleep(plan.delay);
                let result = play(&stack, CIDS[other], &plan, side, &course);
                course.report(&plan, side, result);
            })
        })
    });
    ends.collect()
}

fn play(
    stack: &GuestStack,
    other: u64,
    plan: &Plan,
    side: Side,
    course: &Course,
) -> Result<(), Fault> {
    let is_opener = plan.opener == side;
    if plan.kind == Kind::Refused {
        return if is_opener {
            refused(connect(stack, other, plan))
        } else {
            Ok(())
        };
    }
    let stream = if is_opener {
        let connected = connect(stack, other, plan);
        connected.map_err(|error| Fault::Cut(format!("no connection: {error}")))?
    } else {
        accept(stack, plan, course).ok_or_else(|| Fault::Cut("nobody has connected".into()))?
    };
    if stream.peer_cid() != other {
        return Err(Fault::Wrong(format!("CID {} calls", stream.peer_cid())));
    }
    if plan.messages {
        ends::play(Messages(stream), plan, side, course)
    } else {
        ends::play(stream, plan, side, course)
    }
}

fn connect(stack: &GuestStack, other: u64, plan: &Plan) -> io::Result<GuestStream> {
    if plan.messages {
        stack.connect_for_messages_to(other, plan.port())
    } else {
        stack.connect_to(other, plan.port())
    }
}

fn refused(connected: io::Result<GuestStream>) -> Result<(), Fault> {
    match connected {
        Ok(_) => Err(Fault::Wrong("connected to nobody".into())),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(Fault::Cut(format!("instead of a refusal: {error}"))),
    }
}

fn accept(stack: &GuestStack, plan: &Plan, course: &Course) -> Option<GuestStream> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline && !course.is_killed() {
        if let Some(stream) = stack.poll_accept(plan.port()) {
            return Some(stream);
        }
        sleep(std::time::Duration::from_millis(2));
    }
    None
}
