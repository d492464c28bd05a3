//! The threads that serve VMs. One that panics takes its VM with it, and no other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use log::error;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::log_vm;
use crate::packet::header::Cid;

/// Whether the log names the VM that a thread works for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// With several VMs.
    On,
    /// With one.
    Off,
}

/// Counts the threads of a process that serve VMs, and signals when one has ended.
#[derive(Debug)]
pub(super) struct Threads {
    running: AtomicUsize,
    ended: EventFd,
    naming: Naming,
}

impl Threads {
    pub(super) fn new(naming: Naming) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            running: AtomicUsize::new(0),
            ended: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            naming,
        }))
    }

    /// Waits until all have ended, or until something can be read from one of `others`, of which the first is returned. When a
    /// thread has ended, `each` is called.
    pub(super) fn wait<const N: usize>(
        &self,
        others: [BorrowedFd<'_>; N],
        mut each: impl FnMut(),
    ) -> io::Result<Option<usize>> {
        while self.running.load(Ordering::SeqCst) > 0 {
            let all = others.into_iter().chain([self.ended.as_fd()]);
            let mut fds: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            poll_until(&mut fds, PollTimeout::NONE)?;
            let ready = fds[..N].iter().position(|fd| fd.any() != Some(false));
            if ready.is_some() {
                return Ok(ready);
            }
            let _ = self.ended.read();
            each();
        }
        Ok(None)
    }

    /// Waits until all have ended. False when that takes longer than `timeout`.
    pub(super) fn wait_timeout(&self, timeout: Duration) -> io::Result<bool> {
        self.wait_until(timeout, || self.running.load(Ordering::SeqCst) == 0)
    }

    /// Waits until enough have ended. False when that takes longer than `timeout`.
    pub(super) fn wait_until(
        &self,
        timeout: Duration,
        is_enough: impl Fn() -> bool,
    ) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        while !is_enough() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            wait_readable(&[self.ended.as_fd()], left)?;
            let _ = self.ended.read();
        }
        Ok(true)
    }
}

/// The threads of one VM.
pub(super) struct VmThreads {
    all: Arc<Threads>,
    cid: Cid,
    running: AtomicUsize,
    has_panicked: AtomicBool,
    /// Tells the others to end.
    give_up: Box<dyn Fn() + Send + Sync>,
}

impl VmThreads {
    /// Threads that are also counted by `all`. When one panics, `give_up` is called to end the others.
    pub(super) fn new(
        all: Arc<Threads>,
        cid: Cid,
        give_up: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            all,
            cid,
            running: AtomicUsize::new(0),
            has_panicked: AtomicBool::new(false),
            give_up: Box::new(give_up),
        })
    }

    /// All threads of the process.
    pub(super) fn all(&self) -> &Threads {
        &self.all
    }

    /// Whether all that were started have ended.
    pub(super) fn have_ended(&self) -> bool {
        self.running.load(Ordering::SeqCst) == 0
    }

    /// Whether one has panicked.
    pub(super) fn has_panicked(&self) -> bool {
        self.has_panicked.load(Ordering::SeqCst)
    }

    pub(super) fn spawn(
        self: &Arc<Self>,
        role: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let running = Running::new(self.clone());
        let name = format!("{role}-{}", self.cid);
        thread::Builder::new().name(name).spawn(move || {
            let vm = &running.0;
            if vm.all.naming == Naming::On {
                log_vm::set(vm.cid);
            }
            // What the thread has worked on is not used again: the VM is given up.
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                error!("a thread of this VM panicked, the VM is no longer served");
                vm.has_panicked.store(true, Ordering::SeqCst);
                (vm.give_up)();
            }
        })?;
        Ok(())
    }
}

/// A thread that counts as long as this exists.
struct Running(Arc<VmThreads>);

impl Running {
    fn new(vm: Arc<VmThreads>) -> Self {
        vm.running.fetch_add(1, Ordering::SeqCst);
        vm.all.running.fetch_add(1, Ordering::SeqCst);
        Self(vm)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        self.0.all.running.fetch_sub(1, Ordering::SeqCst);
        let _ = self.0.all.ended.write(1);
    }
}

/// Waits until one of the descriptors can be read from, or the time is over. Returns what has happened to each.
pub(super) fn wait_readable<const N: usize>(
    fds: &[BorrowedFd<'_>; N],
    timeout: PollTimeout,
) -> io::Result<[PollFlags; N]> {
    wait_for(&fds.map(|fd| (fd, PollFlags::POLLIN)), timeout)
}

/// Waits until what is wanted of one of the descriptors happens to it, or the time is over. Returns what has happened to each.
pub(super) fn wait_for<const N: usize>(
    wanted: &[(BorrowedFd<'_>, PollFlags); N],
    timeout: PollTimeout,
) -> io::Result<[PollFlags; N]> {
    let mut fds = wanted.map(|(fd, events)| PollFd::new(fd, events));
    poll_until(&mut fds, timeout)?;
    Ok(fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty())))
}

fn poll_until(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<()> {
    loop {
        match poll(fds, timeout) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    fn cid(cid: u32) -> Cid {
        Cid::try_from(cid).unwrap()
    }

    #[test]
    fn a_panic_gives_its_vm_up_and_no_other() {
        let all = Threads::new(Naming::On).unwrap();
        let vm = |number| {
            let (ends, end) = mpsc::channel::<()>();
            let vm = VmThreads::new(all.clone(), cid(number), move || {
                let _ = ends.send(());
            });
            vm.spawn("session", move || {
                let _ = end.recv();
            })
            .unwrap();
            vm
        };
        let (broken, other) = (vm(4), vm(5));
        broken.spawn("worker", || panic!("a test's panic")).unwrap();
        let (stop, _stopper) = UnixStream::pair().unwrap();
        // Until the other thread of that VM has ended as well.
        while !broken.have_ended() {
            let (signalled, signal) = UnixStream::pair().unwrap();
            let mut signal = Some(signal);
            // The closed end can be read from.
            all.wait([signalled.as_fd()], || drop(signal.take()))
                .unwrap();
        }
        assert!(broken.has_panicked());
        assert!(!other.has_panicked() && !other.have_ended());
        (other.give_up)();
        let ended = all.wait([stop.as_fd()], || {}).unwrap();
        assert_eq!(ended, None);
        assert!(other.have_ended() && !other.has_panicked());
    }
}
