//! Real Linux 6.1 guests under User-Mode Linux reach each other: as VMs of one process, and across processes.

mod common;

use std::time::Instant;

use common::daemon::{Daemon, eventually};
use common::guest::GuestProcess;
use common::host::new_port;
use common::scenarios::{self, spawn_peer};
use common::siblings::{Kind, Vms};
use common::uml::Uml;

const MIB: usize = 1 << 20;

/// Longer than Linux keeps a closed connection for, whose bytes the other end has not taken: that is 8 s.
const LATE: u32 = 10;

/// Runs each scenario with siblings of either kind.
macro_rules! with_either_kind {
    ($($scenario:ident)*) => {
        mod in_one_process {
            $(#[test] fn $scenario() { super::$scenario(super::Kind::OneProcess) })*
        }
        mod across_processes {
            $(#[test] fn $scenario() { super::$scenario(super::Kind::Processes) })*
        }
    };
}

with_either_kind! {
    bytes_arrive_whatever_the_size_of_writes
    programs_talk
    a_killed_guest_ends_its_streams_and_the_next_is_served
}

/// Two guests that are siblings, and their daemons.
struct Pair {
    vms: Vms,
    four: Uml,
    five: Uml,
}

impl Pair {
    fn boot(kind: Kind) -> Self {
        let vms = Vms::start(kind, &[4, 5]);
        let [four, five] = boot(&vms, [4, 5]);
        Self { vms, four, five }
    }
}

fn boot<const N: usize>(vms: &Vms, cids: [u64; N]) -> [Uml; N] {
    Uml::boot_all(cids.map(|cid| vms.vhost_socket(cid)))
}

/// A program in one guest that connects to a program in the other, which has this CID.
struct Talk {
    caller: GuestProcess,
    callee: GuestProcess,
    port: u32,
}

impl Talk {
    /// Starts the task `calls` in `from`, which connects to where `to` does the task `answers`. Each is a task of peer.py and
    /// what follows its address.
    fn start(from: &Uml, calls: [&str; 2], to: (&Uml, u64), answers: [&str; 2]) -> Self {
        let (port, (to, cid)) = (new_port(), to);
        let ([call, of_caller], [answer, of_callee]) = (calls, answers);
        Self {
            callee: spawn_peer(to, &format!("{answer} {port} {of_callee}")),
            caller: spawn_peer(from, &format!("{call} {cid}:{port} {of_caller}")),
            port,
        }
    }

    /// What the caller and the callee have printed, when both have succeeded.
    fn finish(self) -> [String; 2] {
        let at_caller = self.caller.wait();
        if at_caller.status != 0 {
            // It may wait for the caller. If it has failed before, it still says why.
            self.callee.kill();
        }
        let outputs = [at_caller, self.callee.wait()];
        let [caller, callee] = &outputs;
        let succeeded = outputs.iter().all(|output| output.status == 0);
        assert!(succeeded, "caller: {caller:?}\ncallee: {callee:?}");
        outputs.map(|output| output.stdout)
    }
}

/// Two programs that move bytes each way at once and compare them all. Each sees the other's address.
struct Transfer {
    talk: Talk,
    from: u64,
    to: u64,
}

impl Transfer {
    /// Starts to move `total` bytes, in writes of `write` bytes. The caller's guest gets the file `connected`.
    fn start(from: (&Uml, u64), to: (&Uml, u64), total: usize, write: usize) -> Self {
        let caller = format!("caller callee {total} {write} $TMPDIR/connected");
        let callee = format!("callee caller {total} {write}");
        Self {
            talk: Talk::start(from.0, ["move", &caller], to, ["move", &callee]),
            from: from.1,
            to: to.1,
        }
    }

    fn finish(self) {
        let port = self.talk.port;
        let [at_caller, at_callee] = self.talk.finish();
        let own_port = at_caller.split(' ').next().unwrap();
        assert_eq!(at_caller, format!("{own_port} {} {port}\n", self.to));
        assert_eq!(at_callee, format!("{port} {} {own_port}\n", self.from));
    }
}

fn transfer(from: (&Uml, u64), to: (&Uml, u64), total: usize, write: usize) {
    let start = Instant::now();
    Transfer::start(from, to, total, write).finish();
    println!(
        "{total} bytes each way, {write} a write: {:?}",
        start.elapsed()
    );
}

fn bytes_arrive_whatever_the_size_of_writes(kind: Kind) {
    let Pair {
        vms: _vms,
        four,
        five,
    } = Pair::boot(kind);
    let (four, five) = ((&four, 4), (&five, 5));
    let late = [late_reader(four, five), late_reader(five, four)];
    for (from, to, total, write) in [
        (four, five, MIB / 32, 1),
        (five, four, MIB / 2, 777),
        (four, five, 4 * MIB, 4096),
        (five, four, 4 * MIB, 32_769),
        (four, five, 8 * MIB, 65_536),
        (five, four, 8 * MIB, 262_144),
    ] {
        transfer(from, to, total, write);
    }
    late.into_iter().for_each(expect_all);
}

/// A guest fills a connection and closes it; the other starts to read it late.
fn late_reader(from: (&Uml, u64), to: (&Uml, u64)) -> Talk {
    let pause = LATE.to_string();
    Talk::start(from.0, ["fill_sibling", ""], to, ["drain", &pause])
}

fn expect_all(late: Talk) {
    let [sent, received] = late.finish();
    assert_eq!(sent, received, "bytes sent and received");
    let bytes: usize = sent.trim().parse().unwrap();
    assert!(bytes >= 1 << 16, "only {bytes} bytes were taken");
}

fn programs_talk(kind: Kind) {
    let mut vms = Vms::none();
    let stranger = (6, stranger_group(kind));
    match kind {
        Kind::OneProcess => vms.add_daemon(&[(4, String::new()), (5, String::new()), stranger]),
        Kind::Processes => {
            vms.add(4);
            vms.add(5);
            vms.add_daemon(&[stranger]);
        }
    }
    let [four, five, six] = boot(&vms, [4, 5, 6]);
    either_end_half_closes(&four, (&five, 5));
    either_end_half_closes(&five, (&four, 4));
    refusals_are_immediate(&four, &six);
    two_hundred_connections_at_once(&four, (&five, 5));
    a_guest_that_stands_still_loses_nothing(&four, (&five, 5), vms.daemon(4));
}

/// What the options of a VM say that is in no group with the others.
fn stranger_group(kind: Kind) -> String {
    match kind {
        Kind::OneProcess => "groups=other".to_owned(),
        Kind::Processes => String::new(),
    }
}

fn either_end_half_closes(from: &Uml, to: (&Uml, u64)) {
    let [answer, _] = Talk::start(from, ["ask", ""], to, ["reply", ""]).finish();
    assert_eq!(answer, "8 bytes, question");
    let [_, answer] = Talk::start(from, ["reply", ""], to, ["ask", ""]).finish();
    assert_eq!(answer, "8 bytes, question");
}

fn refusals_are_immediate(four: &Uml, six: &Uml) {
    let port = new_port();
    // There is somebody, who is no sibling.
    let _listener = spawn_peer(six, &format!("echo {port}"));
    eventually("a program in the stranger's guest", || {
        six.run("ls /proc/[0-9]*/cmdline | xargs cat 2>/dev/null | tr '\\0' ' ' | grep -q 'peer.py echo'")
            .status
            == 0
    });
    let nobody = "5:9999 6:9999 77:9999 1:9999 4294967294:1";
    expect_refusals(four, &format!("6:{port} {nobody}"), 6);
}

/// The guest's own time-out, which would be ETIMEDOUT, is 2 s.
fn expect_refusals(guest: &Uml, addresses: &str, count: usize) {
    let answers = spawn_peer(guest, &format!("refused {addresses}")).wait_ok();
    assert_eq!(answers.lines().count(), count, "{answers}");
    let is_refusal =
        |answer: &str| answer.starts_with("ECONNRESET ") || answer.starts_with("ECONNREFUSED ");
    assert!(
        answers.lines().all(is_refusal),
        "connecting to {addresses}: {answers}"
    );
}

fn two_hundred_connections_at_once(from: &Uml, to: (&Uml, u64)) {
    let port = new_port();
    let _echo = spawn_peer(to.0, &format!("echo {port}"));
    let clients = spawn_peer(from, &format!("clients {}:{port} 200", to.1));
    clients.write("go\n");
    clients.wait_ok();
}

fn a_guest_that_stands_still_loses_nothing(from: &Uml, to: (&Uml, u64), daemon: &Daemon) {
    from.run_ok("rm -f $TMPDIR/connected");
    let waits = Transfer::start((from, 4), to, 16 * MIB, 65_536);
    eventually("the connection", || {
        from.run("test -e $TMPDIR/connected").status == 0
    });
    to.0.freeze(true);
    // Only what goes to that guest waits.
    scenarios::works(from, daemon);
    to.0.freeze(false);
    waits.finish();
}

fn a_killed_guest_ends_its_streams_and_the_next_is_served(kind: Kind) {
    let Pair { vms, four, five } = Pair::boot(kind);
    let pump = ["pump", "$TMPDIR/flows"];
    let called = Talk::start(&four, pump, (&five, 5), pump);
    let calling = Talk::start(
        &five,
        ["pump", "$TMPDIR/flows2"],
        (&four, 4),
        ["pump", "$TMPDIR/flows2"],
    );
    eventually("bytes to flow", || {
        four.run("ls $TMPDIR/flows $TMPDIR/flows2").status == 0
    });
    five.kill();
    for survivor in [called.caller, calling.callee] {
        let ending = survivor.wait_ok();
        assert!(["end\n", "ECONNRESET\n"].contains(&&*ending), "{ending}");
    }
    expect_refusals(&four, "5:1", 1);

    let [next] = boot(&vms, [5]);
    transfer((&four, 4), (&next, 5), MIB, 65_536);
    transfer((&next, 5), (&four, 4), MIB, 65_536);
}
