//! Guests of this process that reach each other.
//!
//! Two VMs of a process are siblings if they share the name of a group. A guest's REQUEST for a sibling becomes a *call*: one
//! end of a socket pair, which is left for the sibling's worker. To either worker its end is a socket like a host program's:
//!
//! ```text
//! guest 4 <-> worker of 4 <-> socket pair <-> worker of 5 <-> guest 5
//! ```
//!
//! The caller waits for the line `OK`, as it does where the sibling is another process's and its socket was connected to.
//! A worker that closes the call instead has refused it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::socket::{AddressFamily, SockFlag, socketpair};
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::socket::{HostSocket, SocketState, socket_type};
use crate::config::VmConfig;
use crate::packet::header::{Cid, GuestPort, PeerAddr, PeerPort, VsockHeader};
use crate::saved::{LoadError, Loader, Saver};
use crate::syscalls::{Argument, Syscall};

/// To call a sibling in this process. Where there is none, these calls are not made.
pub(crate) const SYSCALLS: &[Syscall] = &[
    Syscall::only(libc::SYS_socketpair, &unix_pair(libc::SOCK_STREAM)),
    Syscall::only(libc::SYS_socketpair, &unix_pair(libc::SOCK_SEQPACKET)),
];

const fn unix_pair(kind: libc::c_int) -> [Argument; 2] {
    [
        Argument::Is(0, libc::AF_UNIX),
        Argument::Is(1, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC),
    ]
}

/// How many calls of one guest may wait for its siblings' workers: as many as a batch of its packets may make.
const MAX_CALLS: usize = 256;

/// Whether there are siblings among the VMs of a process.
pub fn are_among(vms: &[VmConfig]) -> bool {
    vms.iter().enumerate().any(|(index, vm)| {
        let mut before = vms[..index].iter();
        before.any(|other| have_common(&vm.groups, &other.groups))
    })
}

fn have_common(groups: &[String], others: &[String]) -> bool {
    groups.iter().any(|group| others.contains(group))
}

/// Why a sibling in this process can't be called.
#[derive(Debug, Error)]
pub enum CallError {
    /// The siblings' workers have not taken the last calls yet.
    #[error("too many calls of this guest wait for siblings")]
    TooMany,
    /// The system refused.
    #[error("no socket pair: {0}")]
    Io(#[from] io::Error),
}

/// A guest's REQUEST for a sibling.
#[derive(Debug)]
pub struct Call {
    /// The guest's program that calls.
    pub caller: PeerAddr,
    /// The sibling's port that it wants.
    pub port: GuestPort,
    /// The sibling's end of the connection.
    pub socket: HostSocket,
    /// It waits as long as this exists.
    _waits: Waits,
}

/// Counts a call among those of its caller that wait.
#[derive(Debug)]
struct Waits(Arc<AtomicUsize>);

impl Waits {
    fn new(calls: &Arc<AtomicUsize>) -> Self {
        calls.fetch_add(1, Ordering::Relaxed);
        Self(calls.clone())
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The VMs of a process.
#[derive(Debug, Default)]
pub struct Siblings(Mutex<BTreeMap<Cid, Member>>);

/// What the other VMs must know of one.
#[derive(Debug)]
struct Member {
    groups: Vec<String>,
    calls: Calls,
    /// How many calls wait, for its worker: it looks often, and takes no lock where there is none.
    waiting: Arc<AtomicUsize>,
    /// How many calls of its guest wait for other workers.
    own_calls: Arc<AtomicUsize>,
    /// Wakes its worker.
    wake: EventFd,
}

/// The calls that wait for a worker. Callers are served in turn.
#[derive(Debug, Default)]
struct Calls(VecDeque<(Cid, VecDeque<Call>)>);

impl Calls {
    fn push(&mut self, call: Call) {
        let caller = call.caller.cid;
        match self.of(caller) {
            Some(calls) => calls.push_back(call),
            None => self.0.push_back((caller, [call].into())),
        }
    }

    fn of(&mut self, caller: Cid) -> Option<&mut VecDeque<Call>> {
        let mut all = self.0.iter_mut();
        let found = all.find(|(cid, _)| *cid == caller)?;
        Some(&mut found.1)
    }

    fn pop(&mut self) -> Option<Call> {
        let (caller, mut calls) = self.0.pop_front()?;
        let call = calls.pop_front();
        if !calls.is_empty() {
            self.0.push_back((caller, calls));
        }
        call
    }
}

impl Member {
    /// Leaves a call for its worker.
    fn leave_call(&mut self, call: Call) {
        self.calls.push(call);
        self.waiting.fetch_add(1, Ordering::Release);
        // It fails only where the counter is full, and then the worker is awake.
        let _ = self.wake.write(1);
    }
}

impl Siblings {
    /// Adds the VM of `config`, whose worker is woken with `wake`. It stays until it leaves.
    pub fn join(self: &Arc<Self>, config: &VmConfig, wake: EventFd) -> Membership {
        let (waiting, own_calls) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let member = Member {
            groups: config.groups.clone(),
            calls: Calls::default(),
            waiting: waiting.clone(),
            own_calls: own_calls.clone(),
            wake,
        };
        self.0.lock().insert(config.guest_cid, member);
        Membership {
            siblings: self.clone(),
            cid: config.guest_cid,
            groups: config.groups.clone(),
            waiting,
            max_calls: MAX_CALLS.min(config.max_clients.div_ceil(2)),
            calls: own_calls,
        }
    }
}

/// A call that waits, in a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallState {
    callee: Cid,
    caller: PeerAddr,
    port: GuestPort,
    socket: SocketState,
}

/// The calls of a process, none of which is made or taken while this exists.
#[derive(Debug)]
pub struct ParkedCalls<'s>(MutexGuard<'s, BTreeMap<Cid, Member>>);

impl ParkedCalls<'_> {
    /// Saves the calls that wait.
    pub fn save_calls<'fd>(&'fd self, saver: &mut Saver<'fd>) -> Vec<CallState> {
        let mut saved = Vec::new();
        for (callee, member) in self.0.iter() {
            let calls = member.calls.0.iter().flat_map(|(_, calls)| calls);
            saved.extend(calls.map(|call| CallState {
                callee: *callee,
                caller: call.caller,
                port: call.port,
                socket: call.socket.save(saver),
            }));
        }
        saved
    }
}

impl Siblings {
    /// Lets nobody call, nor take a call, as long as what this returns exists: they wait for it, so the workers should be parked.
    pub fn park_calls(&self) -> ParkedCalls<'_> {
        ParkedCalls(self.0.lock())
    }

    /// Leaves the calls that were saved for their workers, where all VMs have joined. A call between VMs that are siblings no more
    /// is refused.
    ///
    /// # Errors
    /// A socket is not there.
    pub fn load_calls(&self, calls: Vec<CallState>, loader: &mut Loader) -> Result<(), LoadError> {
        for call in calls {
            let socket = match HostSocket::load(&call.socket, loader) {
                // The caller finds that it is refused.
                Err(LoadError::Lost) => continue,
                socket => socket?,
            };
            let mut members = self.0.lock();
            let Some(caller) = members.get(&call.caller.cid) else {
                continue;
            };
            let (groups, own_calls) = (caller.groups.clone(), caller.own_calls.clone());
            if let Some(callee) = members.get_mut(&call.callee)
                && call.callee != call.caller.cid
                && have_common(&groups, &callee.groups)
            {
                callee.leave_call(Call {
                    caller: call.caller,
                    port: call.port,
                    socket,
                    _waits: Waits::new(&own_calls),
                });
            }
        }
        Ok(())
    }
}

/// A VM among its siblings. When this is dropped, it has left them.
#[derive(Debug)]
pub struct Membership {
    siblings: Arc<Siblings>,
    cid: Cid,
    groups: Vec<String>,
    /// How many calls wait for its own worker.
    waiting: Arc<AtomicUsize>,
    max_calls: usize,
    /// How many calls of its guest wait for other workers.
    calls: Arc<AtomicUsize>,
}

impl Membership {
    /// Calls the sibling that a guest's REQUEST is for, in the name of the program that asks. None if there is no such sibling.
    /// Only the worker of this VM calls.
    pub fn call(&self, request: &VsockHeader) -> Option<Result<HostSocket, CallError>> {
        let callee = request.peer.cid;
        if !self.has_sibling(callee) {
            return None;
        }
        if self.calls.load(Ordering::Relaxed) >= self.max_calls {
            return Some(Err(CallError::TooMany));
        }
        // Made without the lock, for which other workers may wait.
        let (ours, call) = match self.new_call(request) {
            Ok(ends) => ends,
            Err(error) => return Some(Err(error.into())),
        };
        // The sibling may have left meanwhile.
        self.with_sibling(callee, |member| member.leave_call(call))?;
        Some(Ok(ours))
    }

    /// Both ends of a call, the sibling's with what its worker must know.
    fn new_call(&self, request: &VsockHeader) -> io::Result<(HostSocket, Call)> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let packet_type = request.packet_type;
        let kind = socket_type(packet_type);
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags)?;
        let call = Call {
            caller: PeerAddr {
                cid: self.cid,
                port: PeerPort(request.guest_port.0),
            },
            port: GuestPort(request.peer.port.0),
            socket: HostSocket::new(packet_type, theirs),
            _waits: Waits::new(&self.calls),
        };
        Ok((HostSocket::new(packet_type, ours), call))
    }

    /// What `use_it` makes of the sibling of this CID, if there is one.
    fn with_sibling<T>(&self, cid: Cid, use_it: impl FnOnce(&mut Member) -> T) -> Option<T> {
        let mut members = self.siblings.0.lock();
        let member = members.get_mut(&cid)?;
        let is_sibling = cid != self.cid && have_common(&self.groups, &member.groups);
        is_sibling.then(|| use_it(member))
    }

    /// Whether there is a sibling of this CID.
    pub fn has_sibling(&self, cid: Cid) -> bool {
        self.with_sibling(cid, |_| ()).is_some()
    }

    /// Whether siblings have called.
    pub fn has_calls(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// The call that is to be taken next.
    pub fn next_call(&self) -> Option<Call> {
        let mut members = self.siblings.0.lock();
        let call = members.get_mut(&self.cid)?.calls.pop()?;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Some(call)
    }

    /// Nobody calls from now on, and those who have called are refused.
    pub fn leave(&self) {
        let member = self.siblings.0.lock().remove(&self.cid);
        // Their sockets are closed without the lock.
        drop(member);
        self.waiting.store(0, Ordering::Relaxed);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::header::Op;
    use crate::testing::loader;

    fn config(cid: u32, groups: &[&str]) -> VmConfig {
        let mut config = VmConfig::new(Cid::try_from(cid).unwrap(), "", "");
        config.groups = groups.iter().map(|group| (*group).into()).collect();
        config
    }

    fn join(siblings: &Arc<Siblings>, cid: u32, groups: &[&str]) -> (Membership, EventFd) {
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let joined = siblings.join(&config(cid, groups), wake.try_clone().unwrap());
        (joined, wake)
    }

    fn addr(cid: u32, port: u32) -> PeerAddr {
        PeerAddr {
            cid: Cid::from_raw(cid.into()),
            port: PeerPort(port),
        }
    }

    const PORT: GuestPort = GuestPort(7);

    fn request(from: &Membership, to: PeerAddr) -> VsockHeader {
        VsockHeader::new(from.cid, PORT, to, Op::Request)
    }

    #[test]
    fn a_call_arrives_with_the_address_of_its_caller() {
        let siblings = Arc::default();
        let ((four, _), (five, wake)) =
            (join(&siblings, 4, &["a", "b"]), join(&siblings, 5, &["b"]));
        assert!(!five.has_calls() && five.next_call().is_none());
        let ours = four.call(&request(&four, addr(5, 80))).unwrap().unwrap();
        assert_eq!(wake.read().unwrap(), 1);
        assert!(five.has_calls() && !four.has_calls());
        let call = five.next_call().unwrap();
        assert!(!five.has_calls());
        assert_eq!((call.caller, call.port), (addr(4, 7), GuestPort(80)));
        assert!(!ours.peer_closed());
        drop(call);
        assert!(ours.peer_closed(), "a call that is dropped is refused");
    }

    #[test]
    fn only_siblings_are_called() {
        let siblings = Arc::default();
        let ((four, _), (five, _)) = (join(&siblings, 4, &["a"]), join(&siblings, 5, &["b"]));
        let (six, _) = join(&siblings, 6, &["a", "b"]);
        for (from, to) in [(&four, 5), (&four, 4), (&four, 2), (&four, 7), (&five, 4)] {
            assert!(
                from.call(&request(from, addr(to, 80))).is_none(),
                "{} calls {to}",
                from.cid
            );
            assert!(!from.has_sibling(Cid::from_raw(to.into())));
        }
        for (from, to) in [(&four, 6), (&six, 4), (&six, 5), (&five, 6)] {
            assert!(from.call(&request(from, addr(to, 80))).unwrap().is_ok());
            assert!(from.has_sibling(Cid::from_raw(to.into())));
        }
    }

    #[test]
    fn a_vm_that_leaves_refuses_what_waits() {
        let siblings = Arc::default();
        let ((four, _), (five, _)) = (join(&siblings, 4, &["a"]), join(&siblings, 5, &["a"]));
        let ours = four.call(&request(&four, addr(5, 80))).unwrap().unwrap();
        five.leave();
        assert!(ours.peer_closed());
        assert!(!five.has_calls() && five.next_call().is_none());
        assert!(four.call(&request(&four, addr(5, 80))).is_none());
        drop(four);
        assert!(siblings.0.lock().is_empty());
    }

    #[test]
    fn a_caller_keeps_no_other_out() {
        let siblings = Arc::default();
        let ((four, _), (five, _)) = (join(&siblings, 4, &["a"]), join(&siblings, 5, &["a"]));
        let (six, _) = join(&siblings, 6, &["a"]);
        let mut ends: Vec<_> = (0..MAX_CALLS)
            .map(|_| four.call(&request(&four, addr(6, 80))).unwrap().unwrap())
            .collect();
        let refused = four.call(&request(&four, addr(6, 80))).unwrap();
        assert!(matches!(refused, Err(CallError::TooMany)));
        ends.push(five.call(&request(&five, addr(6, 81))).unwrap().unwrap());
        let refused = four.call(&request(&four, addr(5, 80))).unwrap();
        assert!(refused.is_err(), "the limit is for all siblings together");
        let callers = [(); 3].map(|()| six.next_call().unwrap().caller.cid.get());
        assert_eq!(callers, [4, 5, 4], "in turn");
        assert!(four.call(&request(&four, addr(5, 80))).unwrap().is_ok());
        assert_eq!(
            std::iter::from_fn(|| six.next_call()).count(),
            MAX_CALLS - 2
        );
        assert!(!six.has_calls());
    }

    #[test]
    fn calls_that_wait_go_to_the_next_process() {
        let siblings: Arc<Siblings> = Arc::default();
        let ((four, _), (five, _)) = (join(&siblings, 4, &["a"]), join(&siblings, 5, &["a"]));
        let (six, _) = join(&siblings, 6, &["a"]);
        let calls = [(&four, 80), (&four, 81), (&five, 82), (&four, 83)];
        let mut ends: Vec<_> = calls
            .iter()
            .map(|(from, port)| from.call(&request(from, addr(6, *port))).unwrap().unwrap())
            .collect();
        ends.push(six.call(&request(&six, addr(5, 84))).unwrap().unwrap());
        let file = tempfile::tempfile().unwrap();
        let parked = siblings.park_calls();
        let mut loader = loader(&file, |saver| parked.save_calls(saver));
        drop(parked);
        assert!(six.has_calls(), "they are still here");

        let next: Arc<Siblings> = Arc::default();
        let ((new_four, _), (new_six, wake)) = (join(&next, 4, &["a"]), join(&next, 6, &["a"]));
        let (new_five, _) = join(&next, 5, &["b"]);
        let calls = loader.document().unwrap();
        next.load_calls(calls, &mut loader).unwrap();
        drop((four, five, six, siblings));
        assert_eq!(wake.read().unwrap(), 3);
        assert_eq!(new_four.calls.load(Ordering::Relaxed), 3);
        let taken = [(); 3].map(|()| new_six.next_call().unwrap());
        assert_eq!(taken.each_ref().map(|call| call.port.0), [80, 81, 83]);
        assert!(taken.iter().all(|call| call.caller == addr(4, 7)));
        assert!(!new_six.has_calls() && !new_five.has_calls());
        let refused: Vec<_> = ends.iter().map(HostSocket::peer_closed).collect();
        assert_eq!(
            refused,
            [false, false, true, false, true],
            "siblings no more"
        );
        drop(taken);
        assert_eq!(new_four.calls.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn siblings_share_a_group() {
        assert!(!are_among(&[config(4, &["a"])]));
        assert!(!are_among(&[
            config(4, &["a"]),
            config(5, &["b"]),
            config(6, &[])
        ]));
        assert!(are_among(&[
            config(4, &["a"]),
            config(5, &["b"]),
            config(6, &["c", "a"])
        ]));
    }
}
