//! Whether the guest's driver starts the device and uses it, for the log. Where it does not, that is mostly the VMM's configuration.

use std::time::{Duration, Instant};

use log::{info, warn};

use crate::log_limit::LogLimit;

/// How long a VMM may be connected before the log says that the driver is missing, and a driver may have started the device before
/// it says that the buffers are.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is to come from the guest next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Awaited {
    /// Nothing, or it has come.
    #[default]
    Nothing,
    /// The driver starts the device.
    Start,
    /// It puts buffers into the RX ring. All drivers do, at once.
    Buffers,
}

/// Watches for the driver of one VMM's guest.
#[derive(Debug, Default)]
pub(super) struct DriverWatch {
    awaited: Awaited,
    /// When the log says that it is missing.
    due: Option<Instant>,
    /// The driver has accepted features, so the VMM is about to start the device.
    has_accepted: bool,
    /// A guest may restart its driver as often as it likes.
    start_log: LogLimit,
    buffers_log: LogLimit,
}

impl DriverWatch {
    /// A VMM has connected.
    pub(super) fn connected(&mut self, now: Instant) {
        self.wait_for(Awaited::Start, now);
    }

    /// The VMM is gone.
    pub(super) fn disconnected(&mut self) {
        self.awaited = Awaited::Nothing;
        self.due = None;
        self.has_accepted = false;
    }

    /// The driver has accepted features.
    pub(super) fn accepted(&mut self) {
        self.has_accepted = true;
    }

    /// The driver has started the device, for the first time or after a reset.
    pub(super) fn started(&mut self, now: Instant) {
        self.wait_for(Awaited::Buffers, now);
        self.start_log
            .log(|| info!("the guest's driver has started the device"));
    }

    fn wait_for(&mut self, awaited: Awaited, now: Instant) {
        self.awaited = awaited;
        self.due = Some(now + PATIENCE);
    }

    /// When to call [`DriverWatch::expire`].
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Says once that the driver is missing, when it is time, and what to check. A guest that was handed over has started it before.
    pub(super) fn expire(&mut self, now: Instant, has_guest: bool, has_memory: bool) {
        if self.due.is_none_or(|due| due > now) {
            return;
        }
        self.due = None;
        if self.awaited != Awaited::Start {
            return;
        }
        self.awaited = Awaited::Nothing;
        if has_guest {
            return;
        }
        let seconds = PATIENCE.as_secs();
        if self.has_accepted && !has_memory {
            warn!(
                "a VMM has been connected for {seconds} s, and has not shared the guest's memory: check that it is shared \
                 (QEMU: -object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine memory-backend=mem0)"
            );
        } else {
            warn!(
                "a VMM has been connected for {seconds} s, and the guest's driver has not started the device: check that the guest \
                 has booted and has the driver (modprobe vmw_vsock_virtio_transport), and that its memory is shared (QEMU: \
                 memory-backend-memfd with share=on)"
            );
        }
    }

    /// Whether it is time to look for buffers. The answer is for [`DriverWatch::looked`].
    pub(super) fn looks_for_buffers(&self) -> bool {
        self.awaited == Awaited::Buffers && self.due.is_none()
    }

    /// Whether the driver has put buffers into the RX ring, ever. A ring that stays empty is one that the guest does not see.
    pub(super) fn looked(&mut self, has_buffers: bool) {
        self.awaited = Awaited::Nothing;
        if !has_buffers {
            let seconds = PATIENCE.as_secs();
            self.buffers_log.log(|| {
                warn!(
                    "the guest's driver started the device {seconds} s ago, and has put no buffers into the RX ring: most likely \
                     the guest's memory is not shared (QEMU: memory-backend-memfd with share=on)"
                )
            });
        }
    }
}
