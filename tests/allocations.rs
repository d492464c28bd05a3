//! The device embedded in a process whose allocator counts: packets cost no allocation.
#![allow(unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::sim::host::{
    PORT, accept, assert_same, connect, pattern, read_exactly, read_ok, recv_bytes,
};
use common::sim::{Flow, Op, Setup, SimGuest};
use tempfile::TempDir;
use vhost_user_vsock::{Cid, Vm, VmConfig};

/// Counts the allocations of all threads but the test's.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static IS_TEST: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    // A thread that ends has no such variable any more.
    if !IS_TEST.try_with(Cell::get).unwrap_or(true) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is the system's allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A connection, and the host program's end of it.
struct Conn {
    flow: Flow,
    program: UnixStream,
}

impl Conn {
    fn by_guest(guest: &mut SimGuest, listener: &UnixListener, port: u32) -> Self {
        let flow = Flow::new(port, PORT);
        guest.send(&flow.packet(Op::Request));
        let program = accept(listener);
        guest.recv().assert_is(Op::Response, &flow);
        Self { flow, program }
    }

    fn by_host(guest: &mut SimGuest, uds_path: &Path, port: u32) -> Self {
        let mut program = connect(uds_path);
        program
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let request = guest.recv();
        assert!(request.is(Op::Request), "{request:?}");
        let flow = Flow::of(&request);
        guest.send(&flow.packet(Op::Response));
        read_ok(&program);
        Self { flow, program }
    }

    /// Moves bytes both ways, the guest's in packets of `part` bytes.
    fn echo(&mut self, guest: &mut SimGuest, bytes: &[u8], part: usize) {
        for chunk in bytes.chunks(part) {
            guest.send(&self.flow.rw(chunk));
        }
        assert_same(&read_exactly(&self.program, bytes.len()), bytes);
        self.program.write_all(bytes).unwrap();
        assert_same(&recv_bytes(guest, &self.flow, bytes.len()), bytes);
        // What the guest's program has taken is credit again.
        self.flow.fwd_cnt = self.flow.fwd_cnt.wrapping_add(bytes.len() as u32);
        guest.send(&self.flow.packet(Op::CreditUpdate));
    }
}

#[test]
fn packets_cost_no_allocation() {
    IS_TEST.set(true);
    let directory = TempDir::new().unwrap();
    let (socket, uds_path) = (
        directory.path().join("vhost.socket"),
        directory.path().join("vm.vsock"),
    );
    let listener = UnixListener::bind(directory.path().join(format!("vm.vsock_{PORT}"))).unwrap();
    let config = VmConfig::new(Cid::try_from(4u64).unwrap(), &socket, &uds_path);
    let vm = Vm::start(&config).unwrap();
    let mut guest = SimGuest::start_over(UnixStream::connect(&socket).unwrap(), Setup::default());
    let mut conns: Vec<Conn> = (1..=3)
        .map(|port| Conn::by_guest(&mut guest, &listener, port))
        .collect();
    conns.extend((10..=11).map(|port| Conn::by_host(&mut guest, &uds_path, port)));

    let mut round = |guest: &mut SimGuest, seed: u64| {
        let nobody = Flow::new(99, PORT + 1);
        guest.send(&nobody.rw(b"nobody listens"));
        guest.recv().assert_is(Op::Rst, &nobody);
        for conn in &mut conns {
            for (len, part) in [
                (1, 1),
                (64, 64),
                (4000, 100),
                (30_000, 4096),
                (60_000, 60_000),
            ] {
                conn.echo(guest, &pattern(seed, len), part);
            }
        }
    };
    // Storage grows to its largest size.
    (0..100).for_each(|seed| round(&mut guest, seed));
    assert!(
        ALLOCATIONS.load(Ordering::Relaxed) > 0,
        "nothing is counted"
    );
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    (100..140).for_each(|seed| round(&mut guest, seed));
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(allocations, 0, "over some 12,000 packets");
    vm.stop();
    assert!(!socket.exists() && !uds_path.exists());
}
