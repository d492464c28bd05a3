//! Whether the guest's driver starts the device, for the log. Where it does not, that is mostly the VMM's configuration.

use std::time::{Duration, Instant};

use log::{info, warn};

use crate::log_limit::LogLimit;

/// How long a VMM may be connected before the log says that the driver is missing.
const PATIENCE: Duration = Duration::from_secs(5);

/// Watches for the driver of one VMM's guest.
#[derive(Debug, Default)]
pub(super) struct DriverWatch {
    /// When the log says that the driver is missing.
    due: Option<Instant>,
    /// The driver has accepted features, so the VMM is about to start the device.
    has_accepted: bool,
    /// A guest may restart its driver as often as it likes.
    start_log: LogLimit,
}

impl DriverWatch {
    /// A VMM has connected.
    pub(super) fn connected(&mut self, now: Instant) {
        self.due = Some(now + PATIENCE);
        self.has_accepted = false;
    }

    /// The VMM is gone.
    pub(super) fn disconnected(&mut self) {
        self.due = None;
    }

    /// The driver has accepted features.
    pub(super) fn accepted(&mut self) {
        self.has_accepted = true;
    }

    /// The driver has started the device, for the first time or after a reset.
    pub(super) fn started(&mut self) {
        self.due = None;
        self.start_log
            .log(|| info!("the guest's driver has started the device"));
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
}
