//! Guests that reach each other, in one process and across processes.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use common::daemon::eventually;
use common::siblings::{Kind, Vms, flow};
use common::sim::host::{assert_same, pattern, recv_bytes, recv_other};
use common::sim::packet::{NO_RECEIVE, NO_SEND};
use common::sim::stack::GuestStream;
use common::sim::{Dice, Flow, GuestStack, Op, Setup, SimGuest};
use nix::sys::signal::Signal;

/// The port where a guest's program listens.
const PORT: u32 = 80;

/// The port that a guest's program calls from.
const CALLER: u32 = 1000;

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
    bytes_arrive_in_both_directions_at_once
    either_direction_ends_by_itself
    what_was_sent_before_a_close_arrives
    a_reset_ends_the_connection_of_both
    what_a_guest_no_longer_receives_is_not_sent
    refusals_carry_the_address_that_was_dialled
    a_guest_that_does_not_run_refuses
    the_same_address_twice_is_refused
    a_caller_that_gives_up_leaves_nothing
    a_sibling_without_vmm_is_gone_and_comes_back
    a_sibling_that_reboots_loses_its_connections
    a_sibling_that_resets_its_device_loses_its_connections
    a_sibling_that_pauses_loses_nothing
    a_sibling_that_pauses_answers_later
    only_the_connection_that_is_not_read_waits
    two_hundred_connections_at_once
    a_chain_of_three
    many_refusals_leave_nothing
}

/// Two guests of siblings, 4 and 5, and a connection from 4 to 5.
struct Pair {
    vms: Vms,
    four: GuestStack,
    five: GuestStack,
    caller: GuestStream,
    callee: GuestStream,
}

impl Pair {
    fn new(kind: Kind) -> Self {
        let vms = Vms::start(kind, &[4, 5]);
        let (four, five) = (vms.stack(4), vms.stack(5));
        five.listen(PORT);
        let (caller, callee) = connect(&four, &five, 5);
        Self {
            vms,
            four,
            five,
            caller,
            callee,
        }
    }
}

/// A connection to the guest `to`, which listens on [`PORT`] and has this CID.
#[track_caller]
fn connect(from: &GuestStack, to: &GuestStack, cid: u64) -> (GuestStream, GuestStream) {
    let caller = from.connect_to(cid, PORT).unwrap();
    (caller, to.accept(PORT))
}

/// Writes `bytes` in writes of very different sizes.
fn write_all(stream: &GuestStream, bytes: Vec<u8>, seed: u64) -> JoinHandle<()> {
    let mut stream = stream.handle();
    spawn(move || {
        let mut dice = Dice::new(seed);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let size = dice.one_of(&[1, 2, 44, 1000, 3732, 3733, 4096, 65_536, 262_144]);
            let (part, after) = rest.split_at(size.min(rest.len()));
            stream.write_all(part).unwrap();
            rest = after;
        }
    })
}

#[track_caller]
fn read_exactly(stream: &mut GuestStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[track_caller]
fn read_to_end(stream: &mut GuestStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Moves some bytes both ways.
#[track_caller]
fn assert_moves(a: &mut GuestStream, b: &mut GuestStream) {
    let bytes = pattern(5, 5000);
    a.write_all(&bytes).unwrap();
    assert_same(&read_exactly(b, bytes.len()), &bytes);
    b.write_all(&bytes).unwrap();
    assert_same(&read_exactly(a, bytes.len()), &bytes);
}

#[track_caller]
fn assert_refused(from: &GuestStack, cid: u64, port: u32) {
    let refused = from.connect_to(cid, port).map(|stream| stream.ports());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

fn bytes_arrive_in_both_directions_at_once(kind: Kind) {
    let Pair {
        vms,
        four,
        five,
        mut caller,
        mut callee,
    } = Pair::new(kind);
    assert_eq!((callee.peer_cid(), caller.peer_cid()), (4, 5));
    assert_eq!(callee.ports(), (PORT, caller.ports().0));
    let (there, back) = (pattern(1, 3 << 20), pattern(2, (3 << 20) + 1));
    let writers = [
        write_all(&caller, there.clone(), 1),
        write_all(&callee, back.clone(), 2),
    ];
    let reader = spawn(move || {
        assert_same(&read_exactly(&mut callee, there.len()), &there);
        callee
    });
    assert_same(&read_exactly(&mut caller, back.len()), &back);
    let callee = reader.join().unwrap();
    writers
        .into_iter()
        .for_each(|writer| writer.join().unwrap());
    caller.close();
    caller.wait_gone();
    callee.wait_gone();
    assert_eq!((four.open_connections(), five.open_connections()), (0, 0));
    vms.assert_idle();
}

fn either_direction_ends_by_itself(kind: Kind) {
    let Pair {
        mut caller,
        mut callee,
        vms: _vms,
        four: _four,
        five: _five,
    } = Pair::new(kind);
    let (there, back) = (pattern(1, 100_000), pattern(2, 100_000));
    caller.write_all(&there).unwrap();
    caller.shutdown(NO_SEND);
    assert_same(&read_to_end(&mut callee), &there);
    callee.write_all(&back).unwrap();
    assert_same(&read_exactly(&mut caller, back.len()), &back);
    callee.shutdown(NO_SEND);
    assert_same(&read_to_end(&mut caller), &[]);
    caller.close();
    caller.wait_gone();
    callee.wait_gone();
}

fn what_was_sent_before_a_close_arrives(kind: Kind) {
    let Pair {
        mut caller,
        mut callee,
        four,
        vms: _vms,
        five: _five,
    } = Pair::new(kind);
    // As much as there is credit for, without anybody reading.
    let bytes = pattern(3, 262_144);
    caller.write_all(&bytes).unwrap();
    caller.close();
    assert_same(&read_to_end(&mut callee), &bytes);
    callee.wait_gone();
    caller.wait_gone();
    assert_eq!(four.open_connections(), 0);
}

fn a_reset_ends_the_connection_of_both(kind: Kind) {
    let Pair {
        caller,
        mut callee,
        vms: _vms,
        four: _four,
        five: _five,
    } = Pair::new(kind);
    caller.reset();
    assert_same(&read_to_end(&mut callee), &[]);
    callee.wait_gone();
}

fn what_a_guest_no_longer_receives_is_not_sent(kind: Kind) {
    let Pair {
        mut caller,
        mut callee,
        vms: _vms,
        four: _four,
        five: _five,
    } = Pair::new(kind);
    callee.shutdown(NO_RECEIVE);
    eventually("the other guest to know", || {
        caller.write_all(b"nobody reads this").is_err()
    });
    callee.write_all(b"still open").unwrap();
    assert_same(&read_exactly(&mut caller, 10), b"still open");
}

fn refusals_carry_the_address_that_was_dialled(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let (mut four, mut five) = (vms.guest(4), vms.guest(5));
    // Nobody listens there, says the other guest.
    let dialled = flow((4, CALLER), (5, PORT));
    four.send(&dialled.packet(Op::Request));
    let request = five.recv();
    let seen = flow((5, PORT), (4, CALLER));
    request.assert_is(Op::Request, &seen);
    five.send(&seen.packet(Op::Rst));
    four.recv().assert_is(Op::Rst, &dialled);
    // There is no such guest: nobody has to be asked.
    for cid in [
        0,
        1,
        3,
        4,
        6,
        u64::from(u32::MAX),
        u64::from(u32::MAX) + 6,
        u64::MAX,
    ] {
        let dialled = flow((4, CALLER), (cid, PORT));
        four.send(&dialled.packet(Op::Request));
        four.recv().assert_is(Op::Rst, &dialled);
    }
    // No type that is served.
    let seqpacket = Flow { kind: 2, ..dialled };
    four.send(&seqpacket.packet(Op::Request));
    four.recv().assert_is(Op::Rst, &seqpacket);
    assert_eq!(five.settle(), []);
    // The same port again, accepted now.
    let (mut caller, mut callee) = (dialled, seen);
    accept(&mut four, &mut five, &mut caller, &mut callee);
}

/// Opens a connection between two guests, and moves bytes both ways.
#[track_caller]
fn accept(from: &mut SimGuest, to: &mut SimGuest, caller: &mut Flow, callee: &mut Flow) {
    from.send(&caller.packet(Op::Request));
    to.recv().assert_is(Op::Request, callee);
    to.send(&callee.packet(Op::Response));
    from.recv().assert_is(Op::Response, caller);
    let bytes = pattern(9, 5000);
    from.send(&caller.rw(&bytes));
    assert_same(&recv_bytes(to, callee, bytes.len()), &bytes);
    to.send(&callee.rw(&bytes));
    assert_same(&recv_bytes(from, caller, bytes.len()), &bytes);
}

fn a_guest_that_does_not_run_refuses(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let four = vms.stack(4);
    assert_refused(&four, 5, PORT);
    let vmm = vms.silent_vmm(5);
    assert_refused(&four, 5, PORT);
    drop(vmm);
    let five = vms.stack(5);
    assert_refused(&four, 5, PORT);
    five.listen(PORT);
    let (mut caller, mut callee) = connect(&four, &five, 5);
    assert_moves(&mut caller, &mut callee);
}

fn the_same_address_twice_is_refused(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let (mut four, mut five) = (vms.guest(4), vms.guest(5));
    let (mut caller, mut callee) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    accept(&mut four, &mut five, &mut caller, &mut callee);
    // The other way round, these are the same two addresses.
    five.send(&callee.packet(Op::Request));
    five.recv().assert_is(Op::Rst, &callee);
    let shutdown = recv_other(&mut four);
    shutdown.assert_is(Op::Shutdown, &caller);
    assert_eq!(shutdown.flags, NO_RECEIVE | NO_SEND);
    four.send(&caller.packet(Op::Rst));
    let (mut caller, mut callee) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    accept(&mut four, &mut five, &mut caller, &mut callee);
}

fn a_caller_that_gives_up_leaves_nothing(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let (mut four, mut five) = (vms.guest(4), vms.guest(5));
    let (caller, callee) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    four.send(&caller.packet(Op::Request));
    five.recv().assert_is(Op::Request, &callee);
    four.send(&caller.packet(Op::Rst));
    assert_eq!(four.settle(), []);
    // The answer comes too late.
    five.send(&callee.packet(Op::Response));
    five.recv().assert_is(Op::Rst, &callee);
    assert_eq!(four.settle(), []);
    vms.assert_idle();
}

fn a_sibling_without_vmm_is_gone_and_comes_back(kind: Kind) {
    let Pair {
        vms,
        four,
        five,
        mut caller,
        callee: _callee,
    } = Pair::new(kind);
    five.kill();
    assert_same(&read_to_end(&mut caller), &[]);
    caller.wait_gone();
    eventually("the VMM's end", || {
        four.connect_to(5, PORT)
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    let five = vms.stack(5);
    five.listen(PORT);
    let (mut caller, mut callee) = connect(&four, &five, 5);
    assert_moves(&mut caller, &mut callee);
}

fn a_sibling_that_reboots_loses_its_connections(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let (mut four, mut five) = (vms.guest(4), vms.guest(5));
    let (mut caller, mut callee) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    accept(&mut four, &mut five, &mut caller, &mut callee);
    five.stop_rings();
    five.restart_fresh();
    assert_is_closed(&mut four, &mut five, &caller);
}

fn a_sibling_that_resets_its_device_loses_its_connections(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let (mut four, mut five) = (vms.guest(4), vms.guest(5));
    let (mut caller, mut callee) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    accept(&mut four, &mut five, &mut caller, &mut callee);
    five.frontend.reset_device();
    // The VMM configures everything again.
    five.frontend.set_features(five.features);
    five.frontend.set_mem_table(&five.memory);
    five.restart_fresh();
    assert_is_closed(&mut four, &mut five, &caller);
}

/// The caller gets the end of a connection that the other guest has lost, and the next works.
#[track_caller]
fn assert_is_closed(four: &mut SimGuest, five: &mut SimGuest, caller: &Flow) {
    let shutdown = recv_other(four);
    shutdown.assert_is(Op::Shutdown, caller);
    assert_eq!(shutdown.flags, NO_RECEIVE | NO_SEND);
    four.send(&caller.packet(Op::Rst));
    assert_eq!(five.settle(), []);
    let (mut caller, mut callee) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    accept(four, five, &mut caller, &mut callee);
}

fn a_sibling_that_pauses_loses_nothing(kind: Kind) {
    let Pair {
        mut caller,
        mut callee,
        five,
        vms: _vms,
        four: _four,
    } = Pair::new(kind);
    let (there, back) = (pattern(1, 2 << 20), pattern(2, 2 << 20));
    let writers = [
        write_all(&caller, there.clone(), 1),
        write_all(&callee, back.clone(), 2),
    ];
    let start = read_exactly(&mut callee, 100_000);
    let received = read_exactly(&mut caller, 100_000);
    five.pause();
    // Meanwhile, the other guest sends what it may.
    sleep(Duration::from_millis(100));
    five.resume();
    let rest = read_exactly(&mut callee, there.len() - start.len());
    assert_same(&[start, rest].concat(), &there);
    let rest = read_exactly(&mut caller, back.len() - received.len());
    assert_same(&[received, rest].concat(), &back);
    writers
        .into_iter()
        .for_each(|writer| writer.join().unwrap());
}

fn a_sibling_that_pauses_answers_later(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let (mut four, mut five) = (vms.guest(4), vms.guest(5));
    five.stop_rings();
    let (caller, callee) = (flow((4, CALLER), (5, PORT)), flow((5, PORT), (4, CALLER)));
    four.send(&caller.packet(Op::Request));
    assert_eq!(four.settle(), []);
    five.start_rings();
    five.recv().assert_is(Op::Request, &callee);
    five.send(&callee.packet(Op::Response));
    four.recv().assert_is(Op::Response, &caller);
}

fn only_the_connection_that_is_not_read_waits(kind: Kind) {
    let Pair {
        four,
        five,
        mut caller,
        mut callee,
        vms: _vms,
    } = Pair::new(kind);
    let bytes = pattern(1, 8 << 20);
    let writer = write_all(&caller, bytes.clone(), 1);
    let (mut other, mut others) = connect(&four, &five, 5);
    for _ in 0..100 {
        assert_moves(&mut other, &mut others);
    }
    assert!(!writer.is_finished(), "nobody has read that much");
    callee.write_all(b"the other direction").unwrap();
    assert_same(&read_exactly(&mut caller, 19), b"the other direction");
    assert_same(&read_exactly(&mut callee, bytes.len()), &bytes);
    writer.join().unwrap();
}

fn two_hundred_connections_at_once(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5]);
    let (four, five) = (vms.stack(4), vms.stack(5));
    five.listen(PORT);
    let callers = four.connect_many_to(5, PORT, 200).unwrap();
    assert_eq!(callers.len(), 200);
    let mut callees: Vec<_> = (0..200).map(|_| five.accept(PORT)).collect();
    for mut caller in callers.iter().map(GuestStream::handle) {
        let port = caller.ports().0;
        caller.write_all(&pattern(port.into(), 10_000)).unwrap();
    }
    for callee in &mut callees {
        let (_, port) = callee.ports();
        assert_same(&read_exactly(callee, 10_000), &pattern(port.into(), 10_000));
        callee.write_all(&port.to_le_bytes()).unwrap();
        callee.close();
    }
    for mut caller in callers {
        assert_same(&read_to_end(&mut caller), &caller.ports().0.to_le_bytes());
        caller.wait_gone();
    }
    vms.assert_idle();
}

fn a_chain_of_three(kind: Kind) {
    let vms = Vms::start(kind, &[4, 5, 6]);
    let [four, five, six] = [4, 5, 6].map(|cid| vms.stack(cid));
    five.listen(PORT);
    six.listen(PORT);
    let (mut caller, mut near) = connect(&four, &five, 5);
    let (mut far, mut callee) = connect(&five, &six, 6);
    assert_eq!((near.peer_cid(), callee.peer_cid()), (4, 5));
    let (mut forth, mut back) = (near.handle(), far.handle());
    let relays = [
        spawn(move || std::io::copy(&mut forth, &mut far).map(|_| far.shutdown(NO_SEND))),
        spawn(move || std::io::copy(&mut back, &mut near).map(|_| near.shutdown(NO_SEND))),
    ];
    let bytes = pattern(7, 2 << 20);
    let writer = write_all(&caller, bytes.clone(), 7);
    let echo = spawn(move || {
        let received = read_exactly(&mut callee, 2 << 20);
        callee.write_all(&received).unwrap();
        callee.shutdown(NO_SEND);
        callee
    });
    assert_same(&read_exactly(&mut caller, bytes.len()), &bytes);
    writer.join().unwrap();
    caller.shutdown(NO_SEND);
    assert_same(&read_to_end(&mut caller), &[]);
    assert_same(&read_to_end(&mut echo.join().unwrap()), &[]);
    relays
        .into_iter()
        .for_each(|relay| relay.join().unwrap().unwrap());
}

fn many_refusals_leave_nothing(kind: Kind) {
    let mut vms = Vms::start(kind, &[4, 5]);
    let (four, _five) = (vms.stack(4), vms.stack(5));
    let before = vms.daemon(4).at_rest();
    for _ in 0..10 {
        let accepted = four.connect_many_to(5, PORT, 150).unwrap();
        assert_eq!(accepted.len(), 0);
    }
    assert_eq!(four.open_connections(), 0);
    assert_eq!(vms.daemon(4).at_rest(), before);
    vms.assert_idle();
}

// --- What belongs to one kind alone.

#[test]
fn only_groups_in_common_are_reached() {
    let mut vms = Vms::none();
    vms.add_daemon(&[
        (4, "groups=a".into()),
        (5, "groups=b".into()),
        (6, "groups=a+b".into()),
        (7, String::new()),
    ]);
    let [four, five, six, seven] = [4, 5, 6, 7].map(|cid| vms.stack(cid));
    for stack in [&four, &five, &six, &seven] {
        stack.listen(PORT);
    }
    for (from, cid) in [(&four, 5), (&five, 4), (&seven, 6), (&six, 7), (&four, 4)] {
        assert_refused(from, cid, PORT);
    }
    for (from, to, cid) in [(&four, &six, 6), (&six, &four, 4), (&five, &six, 6)] {
        let (mut caller, mut callee) = connect(from, to, cid);
        assert_moves(&mut caller, &mut callee);
    }
}

#[test]
fn a_daemon_without_directories_is_not_reached() {
    let mut vms = Vms::none();
    vms.add_daemon(&[(4, String::new())]);
    vms.add_daemon(&[(5, String::new())]);
    let (four, five) = (vms.stack(4), vms.stack(5));
    five.listen(PORT);
    assert_refused(&four, 5, PORT);
}

#[test]
fn the_process_comes_before_directories() {
    let mut vms = Vms::none();
    let directory = vms.sibling_dir();
    vms.add_daemon(&[
        (4, directory.clone()),
        (5, directory.clone()),
        (7, format!("{directory},groups=other")),
    ]);
    vms.add(6);
    let [four, five, six, seven] = [4, 5, 6, 7].map(|cid| vms.stack(cid));
    for stack in [&four, &five, &six, &seven] {
        stack.listen(PORT);
    }
    let pairs = [
        (&four, &five, 5),
        (&four, &six, 6),
        (&six, &four, 4),
        (&four, &seven, 7),
        (&seven, &five, 5),
    ];
    for (from, to, cid) in pairs {
        let (mut caller, mut callee) = connect(from, to, cid);
        assert_moves(&mut caller, &mut callee);
    }
    std::fs::remove_file(vms.sibling_path(5)).unwrap();
    assert_refused(&seven, 5, PORT);
    let (mut caller, mut callee) = connect(&four, &five, 5);
    assert_moves(&mut caller, &mut callee);
}

#[test]
fn a_daemon_that_dies_is_replaced() {
    let Pair {
        mut vms,
        four,
        mut caller,
        five: _five,
        callee: _callee,
    } = Pair::new(Kind::Processes);
    vms.kill_daemon(5);
    assert_same(&read_to_end(&mut caller), &[]);
    assert!(vms.sibling_path(5).exists(), "a dead socket stays");
    assert_refused(&four, 5, PORT);
    vms.add(5);
    let five = vms.stack(5);
    five.listen(PORT);
    let (mut caller, mut callee) = connect(&four, &five, 5);
    assert_moves(&mut caller, &mut callee);
}

#[test]
fn a_daemon_that_stops_removes_its_socket() {
    let mut vms = Vms::start(Kind::Processes, &[4, 5]);
    let four = vms.stack(4);
    assert!(vms.sibling_path(5).exists());
    let daemon = vms.daemon(5);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_exit().success());
    assert!(!vms.sibling_path(5).exists() && vms.sibling_path(4).exists());
    assert_refused(&four, 5, PORT);
}

#[test]
fn the_first_directory_where_a_sibling_answers_is_taken() {
    let mut vms = Vms::none();
    let dead = tempfile::TempDir::new().unwrap();
    drop(std::os::unix::net::UnixListener::bind(dead.path().join("5.vsock")).unwrap());
    let dead = format!("sibling-dir={}", dead.path().display());
    vms.add_daemon(&[(4, format!("{dead},{}", vms.sibling_dir()))]);
    vms.add(5);
    let (four, five) = (vms.stack(4), vms.stack(5));
    five.listen(PORT);
    four.listen(PORT);
    let (mut caller, mut callee) = connect(&four, &five, 5);
    assert_moves(&mut caller, &mut callee);
    let (mut caller, mut callee) = connect(&five, &four, 4);
    assert_moves(&mut caller, &mut callee);
}

#[test]
fn a_stack_of_small_buffers_gets_the_same_bytes() {
    let vms = Vms::start(Kind::OneProcess, &[4, 5]);
    let setup = Setup {
        cid: 5,
        rx: vec![100],
        buf_alloc: 20_000,
        ..Setup::default()
    };
    let five = GuestStack::new(SimGuest::start_over(vms.vmm(5), setup));
    let four = vms.stack(4);
    five.listen(PORT);
    let (caller, mut callee) = connect(&four, &five, 5);
    let bytes = pattern(1, 1 << 20);
    let writer = write_all(&caller, bytes.clone(), 3);
    assert_same(&read_exactly(&mut callee, bytes.len()), &bytes);
    writer.join().unwrap();
}
