//! Ends writes to the VMM's descriptors that block.
//!
//! O_NONBLOCK is a flag of the open file, which the VMM shares: it may clear the flag and keep the descriptor full at any time.
//! There is no other way to write to an eventfd without blocking: eventfds do not support RWF_NOWAIT, and can't be reopened
//! through /proc. So a thread notes when it begins to write and when it has written, and a watchdog thread interrupts it with a
//! signal if that takes too long, as a VMM kicks its vCPUs. The handler is installed without SA_RESTART, so `write` fails with
//! EINTR.
//!
//! This costs a write two uncontended locks and no system call. While there are writes, the watchdog wakes up at an interval;
//! while there are none, it sleeps.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use log::warn;
use nix::sys::pthread::{Pthread, pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

use crate::syscalls::{Argument, Syscall};

/// To install the handler, to signal a thread, and to return from the handler.
pub(super) const SYSCALLS: &[Syscall] = &[
    Syscall::only(libc::SYS_rt_sigaction, &[Argument::Is(0, SIGNAL as c_int)]),
    Syscall::any(libc::SYS_rt_sigprocmask),
    Syscall::any(libc::SYS_getpid),
    Syscall::any(libc::SYS_gettid),
    Syscall::only(libc::SYS_tgkill, &[Argument::OwnPid(0)]),
    Syscall::any(libc::SYS_rt_sigreturn),
];

/// What a thread is interrupted with. By default it is ignored, so that it does no harm without its handler.
const SIGNAL: Signal = Signal::SIGURG;

/// How often the watchdog checks. A write that was going on at the last check and still is gets interrupted.
const INTERVAL: Duration = Duration::from_millis(50);

/// The watchdog of a VM's threads, of which one writes at a time. It ends when this is dropped.
#[derive(Debug)]
pub(in super::super) struct Watchdog(Arc<Writes>);

impl Watchdog {
    /// Starts the watchdog's thread, and installs the handler in this process.
    pub(in super::super) fn start() -> io::Result<Self> {
        register_signal_handler(SIGNAL as c_int, ignore)?;
        let writes = Arc::new(Writes::default());
        let watched = writes.clone();
        thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || watched.watch())?;
        Ok(Self(writes))
    }

    /// What is watched.
    pub(super) fn writes(&self) -> Arc<Writes> {
        self.0.clone()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.changed.notify_one();
    }
}

/// Writes that a watchdog watches.
#[derive(Debug, Default)]
pub(super) struct Writes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The thread that writes. It can't end before it has taken itself out.
    writer: Option<Pthread>,
    /// How many writes have begun.
    count: u64,
    /// The watchdog checks at its interval, and need not be woken.
    is_awake: bool,
    is_over: bool,
}

impl Writes {
    /// Writes `bytes`. Fails with [`io::ErrorKind::Interrupted`] if that blocks.
    pub(super) fn write(&self, mut file: &File, bytes: &[u8]) -> io::Result<usize> {
        unblock();
        self.begin();
        let written = file.write(bytes);
        self.lock().writer = None;
        written
    }

    /// A lock of parking_lot's would allocate when a thread first has to wait for one.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) {
        let mut state = self.lock();
        state.writer = Some(pthread_self());
        state.count = state.count.wrapping_add(1);
        if !std::mem::replace(&mut state.is_awake, true) {
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Interrupts writes that block, until the watchdog is dropped.
    fn watch(&self) {
        let mut state = self.lock();
        let mut seen = state.count;
        while !state.is_over {
            match state.writer {
                None if state.count == seen => {
                    state.is_awake = false;
                    let woken = self.changed.wait(state);
                    state = woken.unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                Some(writer) if state.count == seen => {
                    // At each check: the signal may come just before the system call.
                    let _ = pthread_kill(writer, SIGNAL);
                }
                _ => seen = state.count,
            }
            let woken = self.changed.wait_timeout(state, INTERVAL);
            (state, _) = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The handler. The signal has served its purpose when it interrupts a system call.
extern "C" fn ignore(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

/// Unblocks the signal for the calling thread, once: an embedder may have blocked all signals.
fn unblock() {
    thread_local! {
        static IS_UNBLOCKED: Cell<bool> = const { Cell::new(false) };
    }
    if !IS_UNBLOCKED.replace(true)
        && let Err(error) = unblock_signal(SIGNAL as c_int)
    {
        warn!("can't unblock SIGURG, so a VMM may block this thread: {error:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};

    #[test]
    fn a_write_that_blocks_is_interrupted() {
        let watchdog = Watchdog::start().unwrap();
        let event = EventFd::from_value_and_flags(0, EfdFlags::empty()).unwrap();
        event.write(u64::MAX - 1).unwrap();
        let file = File::from(nix::unistd::dup(&event).unwrap());
        for _ in 0..3 {
            let written = watchdog.writes().write(&file, &1u64.to_ne_bytes());
            assert_eq!(written.unwrap_err().kind(), io::ErrorKind::Interrupted);
        }
        event.read().unwrap();
        let written = watchdog.writes().write(&file, &1u64.to_ne_bytes());
        assert_eq!((written.unwrap(), event.read().unwrap()), (8, 1));
    }

    #[test]
    fn it_ends_when_it_is_dropped() {
        let watchdog = Watchdog::start().unwrap();
        let writes = Arc::downgrade(&watchdog.writes());
        drop(watchdog);
        while writes.strong_count() > 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
