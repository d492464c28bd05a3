use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::packet::header::{Op, PeerAddr, VsockHeader};
use crate::saved::Saver;
use crate::testing::{self, reload};
use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::epoll::EventSet;

/// How long what must happen may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long nothing is seen to happen.
const STILL: Duration = Duration::from_millis(100);

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const ADD_MEM_REG: u32 = 37;
const SET_DEVICE_STATE_FD: u32 = 42;
const CHECK_DEVICE_STATE: u32 = 43;

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;

const RING_SIZE: u16 = 16;
const MEMORY: u64 = 1 << 20;
/// Where the memory is in the VMM.
const USER: u64 = 0x7000_0000;
/// Where the buffers are, one for each descriptor of each ring.
const BUFFERS: u64 = 0x8_0000;
const BUFFER_LEN: u64 = 256;

fn descriptors(ring: u32) -> u64 {
    0x1000 + 0x3000 * u64::from(ring)
}

fn available(ring: u32) -> u64 {
    descriptors(ring) + 0x1000
}

fn used(ring: u32) -> u64 {
    descriptors(ring) + 0x2000
}

fn buffer(ring: u32, slot: u16) -> u64 {
    BUFFERS + BUFFER_LEN * (u64::from(ring) * u64::from(RING_SIZE) + u64::from(slot))
}

fn number(number: u64) -> Vec<u8> {
    number.to_ne_bytes().into()
}

fn numbers(numbers: &[u32]) -> Vec<u8> {
    let bytes = numbers.iter().map(|number| number.to_ne_bytes());
    bytes.collect::<Vec<_>>().concat()
}

/// A VMM with its guest.
struct Vmm {
    socket: UnixStream,
    memory: File,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

impl Vmm {
    fn connect(folder: &TempDir) -> Self {
        let events = || {
            let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            (0..3).map(|_| event()).collect()
        };
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(MEMORY).unwrap();
        let socket = UnixStream::connect(folder.path().join("vhost")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            socket,
            memory,
            kicks: events(),
            calls: events(),
        }
    }

    fn send_with(&self, request: u32, payload: &[u8], fds: &[RawFd]) {
        let header = [request, 1, payload.len() as u32].map(u32::to_ne_bytes);
        let parts = [IoSlice::new(header.as_flattened()), IoSlice::new(payload)];
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &control };
        let socket = self.socket.as_raw_fd();
        sendmsg::<()>(socket, &parts, control, MsgFlags::empty(), None).unwrap();
    }

    fn send(&self, request: u32, payload: &[u8]) {
        self.send_with(request, payload, &[]);
    }

    fn reply(&self) -> Vec<u8> {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header).unwrap();
        let len = u32::from_ne_bytes(header[8..].try_into().unwrap());
        let mut payload = vec![0; len as usize];
        (&self.socket).read_exact(&mut payload).unwrap();
        payload
    }

    fn ask(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.send(request, payload);
        self.reply()
    }

    fn negotiate(&self) {
        let features = self.ask(GET_FEATURES, &[]);
        // With protocol features and VIRTIO_F_VERSION_1 only.
        let features = u64::from_ne_bytes(features.try_into().unwrap()) & (1 << 30 | 1 << 32);
        let protocol_features = self.ask(GET_PROTOCOL_FEATURES, &[]);
        self.send(SET_PROTOCOL_FEATURES, &protocol_features);
        self.send(SET_FEATURES, &number(features));
    }

    /// Negotiates, gives the memory, and starts all rings.
    fn set_up(&self) {
        self.negotiate();
        let region = [0, 0, MEMORY, USER, 0].map(number).concat();
        self.send_with(ADD_MEM_REG, &region, &[self.memory.as_raw_fd()]);
        for ring in [RX, TX, EVENT] {
            self.send(SET_VRING_NUM, &numbers(&[ring, RING_SIZE.into()]));
            self.send(SET_VRING_BASE, &numbers(&[ring, 0]));
            let addresses = [descriptors(ring), used(ring), available(ring), 0];
            let addresses = addresses.map(|addr| number(USER + addr)).concat();
            self.send(SET_VRING_ADDR, &[numbers(&[ring, 0]), addresses].concat());
            let (kick, call) = (&self.kicks[ring as usize], &self.calls[ring as usize]);
            self.set_event(SET_VRING_KICK, ring, kick);
            self.set_event(SET_VRING_CALL, ring, call);
            self.set_event(SET_VRING_ERR, ring, call);
            self.send(SET_VRING_ENABLE, &numbers(&[ring, 1]));
        }
        self.ask(GET_FEATURES, &[]);
    }

    fn set_event(&self, request: u32, ring: u32, event: &EventFd) {
        self.send_with(request, &number(ring.into()), &[event.as_fd().as_raw_fd()]);
    }

    fn u16_at(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn used_idx(&self, ring: u32) -> u16 {
        self.u16_at(used(ring) + 2)
    }

    /// Makes a buffer available, without a kick.
    fn post(&self, ring: u32, bytes: &[u8], len: u64, flags: u16) {
        let index = self.u16_at(available(ring) + 2);
        let slot = index % RING_SIZE;
        let at = buffer(ring, slot);
        let write = |bytes: &[u8], at: u64| self.memory.write_all_at(bytes, at).unwrap();
        write(bytes, at);
        let descriptor = [&at.to_le_bytes()[..], &(len as u32).to_le_bytes()].concat();
        let descriptor = [&descriptor[..], &flags.to_le_bytes(), &[0; 2]].concat();
        write(&descriptor, descriptors(ring) + 16 * u64::from(slot));
        let entry = available(ring) + 4 + 2 * u64::from(slot);
        write(&slot.to_le_bytes(), entry);
        write(&(index.wrapping_add(1)).to_le_bytes(), available(ring) + 2);
    }

    fn post_buffer(&self, ring: u32) {
        self.post(ring, &[], BUFFER_LEN, testing::WRITE);
    }

    /// Asks for a connection to a port where nobody listens, without a kick.
    fn post_request(&self, port: u32) {
        let (guest, host) = (GuestPort(port), PeerAddr::host(9));
        let request = VsockHeader::new(Cid::from_raw(4), guest, host, Op::Request).to_tx();
        self.post(TX, &request, request.len() as u64, 0);
    }

    fn clear_calls(&self) {
        for call in &self.calls {
            let _ = call.read();
        }
    }

    fn kick(&self, ring: u32) {
        self.kicks[ring as usize].write(1).unwrap();
    }

    #[track_caller]
    fn await_used(&self, ring: u32, index: u16) {
        await_that("buffers come back", || self.used_idx(ring) == index);
    }

    /// The packet that has been put into the so manyth buffer.
    fn received(&self, slot: u16) -> VsockHeader {
        let mut bytes = [0; 44];
        let at = buffer(RX, slot);
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        VsockHeader::from_rx(&bytes)
    }

    /// Asks for a connection to nobody, and sees that it is refused. It is the so manyth.
    #[track_caller]
    fn assert_refused(&self, nth: u16) {
        self.post_buffer(RX);
        self.post_request(1000 + u32::from(nth));
        self.kick(RX);
        self.kick(TX);
        self.await_used(TX, nth + 1);
        self.await_used(RX, nth + 1);
        assert_eq!(self.received(nth).op, Op::Rst);
    }
}

#[track_caller]
fn await_that(what: &str, mut happens: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happens() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn bind(folder: &TempDir) -> BoundVm {
    let config = testing::config(folder.path());
    let mut none = LoadedListeners::default();
    BoundVm::new(&config, &Arc::default(), &mut none, |_| {}).unwrap()
}

fn start(bound: BoundVm) -> Vm {
    bound.start(Threads::new(Naming::Off).unwrap()).unwrap()
}

fn folder() -> TempDir {
    TempDir::new().unwrap()
}

fn park(vm: &Vm) -> Parked<'_> {
    vm.park(Instant::now() + PATIENCE).unwrap()
}

/// Saves a VM, and loads it again.
fn hand_over(vm: Vm, successor: &mut BoundVm) {
    let file = tempfile::tempfile().unwrap();
    let parked = park(&vm);
    let (mut loader, state) = reload(&file, |saver| parked.save(saver).unwrap());
    successor.load(state, &mut loader).unwrap();
    end_parked(&vm, parked);
}

/// Ends a VM that does not take another message: a process just exits.
fn end_parked(vm: &Vm, parked: Parked<'_>) {
    vm.stop.request();
    vm.device.stop();
    drop(parked);
}

#[test]
fn a_parked_vm_stands_still_and_goes_on() {
    let folder = folder();
    let vm = start(bind(&folder));
    let vmm = Vmm::connect(&folder);
    vmm.set_up();
    vmm.assert_refused(0);
    let parked = park(&vm);
    vmm.post_buffer(RX);
    vmm.post_request(1001);
    vmm.kick(TX);
    vmm.send(GET_FEATURES, &[]);
    let other = Vmm::connect(&folder);
    other.send(GET_FEATURES, &[]);
    vmm.socket.set_read_timeout(Some(STILL)).unwrap();
    let nothing = (&vmm.socket).read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    assert_eq!((vmm.used_idx(TX), vmm.used_idx(RX)), (1, 1));
    drop(parked);
    vmm.socket.set_read_timeout(Some(PATIENCE)).unwrap();
    vmm.reply();
    vmm.await_used(TX, 2);
    vmm.await_used(RX, 2);
    // The other VMM waits in the backlog.
    drop(vmm);
    other.reply();
    vm.stop();
}

#[test]
fn a_vmm_in_the_midst_of_a_message_or_a_reply_is_parked_and_stopped() {
    let folder = folder();
    let vm = start(bind(&folder));
    let vmm = Vmm::connect(&folder);
    vmm.ask(GET_FEATURES, &[]);
    (&vmm.socket).write_all(&[1, 0, 0]).unwrap();
    drop(park(&vm));
    (&vmm.socket)
        .write_all(&[0, 1, 0, 0, 0, 0, 0, 0, 0])
        .unwrap();
    vmm.reply();
    // It reads nothing any more, until it can send nothing either.
    vmm.socket.set_nonblocking(true).unwrap();
    let question = numbers(&[GET_FEATURES, 1, 0]);
    let is_full = || match (&vmm.socket).write(&question) {
        Ok(sent) => {
            assert_eq!(sent, question.len());
            false
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            true
        }
    };
    await_that("the daemon takes no more", || {
        is_full() && park(&vm).session.as_ref().unwrap().has_unsent()
    });
    drop(park(&vm));
    let has_left = vm.threads.clone();
    vm.stop();
    assert!(has_left.have_ended());
}

#[test]
fn a_message_that_takes_its_time_keeps_its_vm_from_being_parked() {
    let folder = folder();
    let vm = start(bind(&folder));
    let vmm = Vmm::connect(&folder);
    vmm.negotiate();
    // The device's state comes through a pipe, and the VMM has not written it when it says so.
    let (reader, writer) = std::io::pipe().unwrap();
    vmm.send_with(
        SET_DEVICE_STATE_FD,
        &numbers(&[1, 0]),
        &[reader.as_raw_fd()],
    );
    vmm.reply();
    vmm.send(CHECK_DEVICE_STATE, &[]);
    await_that("the session waits", || {
        let parked = vm.park(Instant::now() + STILL);
        matches!(parked, Err(ParkError::Session))
    });
    drop(writer);
    assert_eq!(vmm.reply(), number(1));
    drop(park(&vm));
    vm.stop();
}

#[test]
fn a_session_goes_on_in_a_successor() {
    let folders = [folder(), folder(), folder()];
    let mut vm = start(bind(&folders[0]));
    let vmm = Vmm::connect(&folders[0]);
    vmm.set_up();
    vmm.assert_refused(0);
    // One ring is stopped.
    let base = vmm.ask(GET_VRING_BASE, &numbers(&[EVENT, 0]));
    let mut refused = 1;
    for folder in &folders[1..] {
        // What the guest does meanwhile, and a message that is half sent.
        vmm.clear_calls();
        let bytes = [GET_FEATURES, 1, 0].map(u32::to_ne_bytes);
        let (before, after) = bytes.as_flattened().split_at(5);
        (&vmm.socket).write_all(before).unwrap();
        let mut successor = bind(folder);
        hand_over(vm, &mut successor);
        vm = start(successor);
        (&vmm.socket).write_all(after).unwrap();
        vmm.reply();
        for _ in 0..2 {
            vmm.assert_refused(refused);
            refused += 1;
        }
        let snapshot = vm.device.snapshot();
        assert!(snapshot.vmm_connected && snapshot.driver_started);
        assert_eq!(snapshot.counters.sessions, 1, "counted again");
        // The rings that run were interrupted.
        assert!(vmm.calls[RX as usize].read().is_ok());
        assert!(vmm.calls[TX as usize].read().is_ok());
        assert!(vmm.calls[EVENT as usize].read().is_err());
    }
    assert_eq!(vmm.ask(GET_VRING_BASE, &numbers(&[EVENT, 0])), base);
    let standing = [TX, refused.into()];
    assert_eq!(
        vmm.ask(GET_VRING_BASE, &numbers(&[TX, 0])),
        numbers(&standing)
    );
    drop(vmm);
    await_that("the VMM is gone", || !vm.device.snapshot().vmm_connected);
    Vmm::connect(&folders[2]).ask(GET_FEATURES, &[]);
}

#[test]
fn a_session_that_was_handed_over_takes_the_place_of_an_inherited_connection() {
    let folders = [folder(), folder()];
    let vm = start(bind(&folders[0]));
    let vmm = Vmm::connect(&folders[0]);
    vmm.set_up();
    let (inherited, mut other) = UnixStream::pair().unwrap();
    other.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut successor = bind(&folders[1]);
    successor.vmm = VmmSocket::Connected(inherited);
    hand_over(vm, &mut successor);
    let vm = start(successor);
    assert_eq!(other.read(&mut [0]).unwrap(), 0);
    vmm.assert_refused(0);
    drop(vmm);
    await_that("nobody else is served", || vm.threads.have_ended());
}

#[test]
fn a_vm_that_has_ended_keeps_no_client_waiting() {
    let folder = folder();
    let (inherited, vmm) = UnixStream::pair().unwrap();
    let mut bound = bind(&folder);
    bound.vmm = VmmSocket::Connected(inherited);
    let mut vm = start(bound);
    drop(vmm);
    await_that("the VM ends", || vm.has_ended());
    let mut client = UnixStream::connect(folder.path().join("uds")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    vm.remove_if_ended();
    let reset = client.read(&mut [0]).unwrap_err();
    assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_transfer_and_a_broken_ring_go_on_in_a_successor() {
    let folders = [folder(), folder()];
    let vm = start(bind(&folders[0]));
    let vmm = Vmm::connect(&folders[0]);
    vmm.set_up();
    let (reader, mut writer) = std::io::pipe().unwrap();
    vmm.send_with(
        SET_DEVICE_STATE_FD,
        &numbers(&[1, 0]),
        &[reader.as_raw_fd()],
    );
    vmm.reply();
    // More entries than the ring has.
    let index = available(TX) + 2;
    vmm.memory.write_all_at(&[0, 1], index).unwrap();
    vmm.clear_calls();
    vmm.kick(TX);
    await_that("it is broken", || vmm.calls[TX as usize].read().is_ok());
    vmm.memory.write_all_at(&[0, 0], index).unwrap();
    let mut successor = bind(&folders[1]);
    hand_over(vm, &mut successor);
    let _vm = start(successor);
    vmm.post_request(1000);
    vmm.kick(TX);
    // It comes through the successor, which takes two turns meanwhile.
    writer.write_all(br#"{"version":1,"guest_cid":4}"#).unwrap();
    drop(writer);
    assert_eq!(vmm.ask(CHECK_DEVICE_STATE, &[]), number(0));
    vmm.post_buffer(EVENT);
    vmm.kick(EVENT);
    vmm.await_used(EVENT, 1);
    assert_eq!(vmm.used_idx(TX), 0, "a broken ring is worked on");
    // The VMM starts it again.
    vmm.set_event(SET_VRING_KICK, TX, &vmm.kicks[TX as usize]);
    vmm.await_used(TX, 1);
}

/// What a keeper has last been shown.
type Kept = Arc<Mutex<Option<(File, Vec<OwnedFd>, String)>>>;

struct Keeper(Kept);

impl Keep for Keeper {
    fn keep(&mut self, vm: Parts<'_>) {
        *self.0.lock() = vm.has_session().then(|| {
            let file = tempfile::tempfile().unwrap();
            let mut saver = Saver::new(&file).unwrap();
            let state = vm.save(&mut saver).unwrap();
            assert!(state.table.is_none());
            let text = serde_json::to_string(&state).unwrap();
            let fds = saver.finish(&state).unwrap();
            let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
            let fds = fds.into_iter().map(copy).collect();
            (file, fds, text)
        });
    }

    fn store(&mut self) {}
}

#[test]
fn a_session_goes_on_after_a_crash() {
    let folders = [folder(), folder()];
    let kept = Kept::default();
    let mut bound = bind(&folders[0]);
    bound.set_keeper(Box::new(Keeper(kept.clone())));
    let vm = start(bound);
    let vmm = Vmm::connect(&folders[0]);
    vmm.set_up();
    vmm.assert_refused(0);
    // It dies: it never takes the next packets.
    let dead = park(&vm);
    vmm.clear_calls();
    for _ in 0..2 {
        vmm.post_buffer(RX);
        vmm.post_buffer(EVENT);
    }
    vmm.post_request(1001);
    let (file, fds, _) = kept.lock().take().unwrap();
    let fds = fds.into_iter().map(Some).collect();
    let mut loader = Loader::open(file, fds).unwrap();
    let state = loader.document().unwrap();
    let mut successor = bind(&folders[1]);
    successor.load(state, &mut loader).unwrap();
    for call in &vmm.calls {
        assert_eq!(call.read().unwrap(), 1);
    }
    let _successor = start(successor);
    // Without a kick.
    vmm.await_used(TX, 2);
    vmm.await_used(RX, 2);
    vmm.await_used(EVENT, 1);
    assert_eq!(vmm.received(1).op, Op::Rst);
    assert_eq!(vmm.used_idx(EVENT), 1, "it is told twice");
    end_parked(&vm, dead);
}

#[test]
fn a_keeper_sees_every_change_and_the_end() {
    let folder = folder();
    let kept = Kept::default();
    let mut bound = bind(&folder);
    bound.set_keeper(Box::new(Keeper(kept.clone())));
    let _vm = start(bound);
    let vmm = Vmm::connect(&folder);
    let text = || kept.lock().as_ref().map(|(_, _, text)| text.clone());
    await_that("the session has begun", || text().is_some());
    vmm.ask(GET_FEATURES, &[]);
    let begun = text();
    assert_eq!(vmm.ask(GET_VRING_BASE, &numbers(&[TX, 0])).len(), 8);
    vmm.send(SET_VRING_NUM, &numbers(&[TX, 8]));
    await_that("a ring has another size", || text() != begun);
    // It is asked what has not changed, in two pieces.
    let sized = text();
    let bytes = [GET_FEATURES, 1, 0].map(u32::to_ne_bytes);
    let (before, after) = bytes.as_flattened().split_at(5);
    (&vmm.socket).write_all(before).unwrap();
    await_that("a message has begun", || text() != sized);
    (&vmm.socket).write_all(after).unwrap();
    vmm.reply();
    await_that("it is done", || {
        text().is_some_and(|text| text.contains(r#""files":[]"#))
    });
    drop(vmm);
    await_that("the session has ended", || text().is_none());
}

/// Everything that a document may become with one value of it replaced or removed.
fn mutants(document: &Value) -> Vec<Value> {
    let mut places = Vec::new();
    collect_places(document, String::new(), &mut places);
    let strange = [
        Value::Null,
        0.into(),
        1.into(),
        3.into(),
        (-1).into(),
        (1 << 15).into(),
        u64::from(u16::MAX).into(),
        (MEMORY - 16).into(),
        (1u64 << 40).into(),
        u64::MAX.into(),
        (u64::MAX - 15).into(),
        "broken".into(),
        Value::Array(Vec::new()),
        true.into(),
    ];
    let mut mutants = Vec::new();
    for place in &places {
        for value in &strange {
            let mut mutant = document.clone();
            *mutant.pointer_mut(place).unwrap() = value.clone();
            mutants.push(mutant);
        }
        let (parent, name) = place.rsplit_once('/').unwrap();
        let mut mutant = document.clone();
        match mutant.pointer_mut(parent).unwrap() {
            Value::Object(fields) => drop(fields.remove(name)),
            Value::Array(items) => items.push(items[0].clone()),
            _ => continue,
        }
        mutants.push(mutant);
    }
    mutants
}

fn collect_places(value: &Value, place: String, places: &mut Vec<String>) {
    let children: Vec<_> = match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| (name.clone(), value))
            .collect(),
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items
                .map(|(index, value)| (index.to_string(), value))
                .collect()
        }
        _ => Vec::new(),
    };
    for (name, child) in children {
        let place = format!("{place}/{name}");
        places.push(place.clone());
        collect_places(child, place, places);
    }
}

#[test]
fn no_document_whatever_it_says_breaks_the_daemon() {
    let folders = [folder(), folder()];
    let vm = start(bind(&folders[0]));
    let vmm = Vmm::connect(&folders[0]);
    vmm.set_up();
    (&vmm.socket)
        .write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 7])
        .unwrap();
    await_that("a message has begun", || {
        let file = tempfile::tempfile().unwrap();
        let parked = park(&vm);
        let (_, state) = reload(&file, |saver| parked.save(saver).unwrap());
        let session = serde_json::to_value(state.session).unwrap();
        session.pointer("/channel/begun/len") == Some(&13.into())
    });
    let parked = park(&vm);
    let file = tempfile::tempfile().unwrap();
    let mut saver = Saver::new(&file).unwrap();
    let state = parked.save(&mut saver).unwrap();
    let document = serde_json::to_value(&state).unwrap();
    let fds = saver.finish(&document).unwrap();
    let load = |successor: &mut BoundVm, document: Value| {
        // A region may be mapped again and again, an event set.
        let copy = |fd: &BorrowedFd<'_>| fd.try_clone_to_owned().ok();
        let fds = fds.iter().map(copy).collect();
        let mut loader = Loader::open(file.try_clone().unwrap(), fds).unwrap();
        let state = serde_json::from_value(document)?;
        successor.load(state, &mut loader)
    };
    let mut successor = bind(&folders[1]);
    let mut refused = 0;
    for mutant in mutants(&document) {
        match load(&mut successor, mutant) {
            Ok(()) => {
                // It is worked on, whatever it is.
                for _ in 0..2 {
                    successor
                        .device
                        .handle_event(0, EventSet::IN, &[], 0)
                        .unwrap();
                }
                successor.session = None;
                successor.device.end_session();
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 500, "only {refused} are refused");
    // One of a guest's that fits is loaded after all.
    load(&mut successor, document.clone()).unwrap();
    for (place, value, message) in [
        ("/guest_cid", 5u64, "another guest"),
        ("/session/rings/1/size", 1 << 15, "--queue-size"),
        ("/session/rings/1/used", 1 << 30, "guest's memory"),
        ("/session/regions/0/size", MEMORY + 1, "the end of its file"),
        ("/session/regions/0/file", 0, "can't map a region"),
        ("/session/features", 1 << 63, "does not offer"),
        ("/session/channel/socket", 1000, "not complete"),
    ] {
        let mut successor = bind(&folder());
        let mut mutant = document.clone();
        *mutant.pointer_mut(place).unwrap() = value.into();
        let error = load(&mut successor, mutant).unwrap_err().to_string();
        assert!(error.contains(message), "{place}: {error}");
        assert!(!successor.device.snapshot().vmm_connected);
    }
}
