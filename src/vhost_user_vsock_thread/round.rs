//! A round of the worker: steps at everything that there is to do, as their shares have it.

use std::time::Instant;

use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::acceptor::Accepted;
use super::limits::MAX_ROUND_COST;
use super::ring::{has_entries, needs_interrupt};
use super::shares::Work;
use super::{RX_RING, TX_RING, VhostUserVsockThread};
use crate::thread_backend::{RxSource, cost};

/// The two rings that carry packets, for the time of a turn. One that can't be worked on is not there.
pub(super) struct Queues<'q> {
    pub(super) memory: &'q GuestMemoryMmap,
    pub(super) queues: [Option<&'q mut Queue>; 2],
}

/// What is known of the rings in a round.
#[derive(Debug)]
struct Round {
    /// The RX ring may have buffers.
    has_buffers: bool,
    /// The TX ring may have packets.
    has_packets: bool,
}

impl VhostUserVsockThread {
    /// Does what there is to do, up to a limit. False when there was nothing.
    pub(super) fn round(&mut self, queues: &mut Option<&mut Queues<'_>>) -> bool {
        let rings = queues.as_ref().map(|queues| &queues.queues);
        let has = |ring: usize| rings.is_some_and(|rings| rings[ring].is_some());
        let mut round = Round {
            has_buffers: has(RX_RING),
            has_packets: has(TX_RING),
        };
        if round.has_buffers && round.has_packets && !self.backend.has_guest() {
            self.backend.guest_started();
            self.driver_watch.started(Instant::now());
        }
        if !round.has_buffers {
            self.backend.rx_starved();
        }
        let mut worked = false;
        let mut total = 0;
        while total < MAX_ROUND_COST {
            let (backend, acceptors) = (&self.backend, &self.acceptors);
            let next = self.shares.next(|work| match work {
                Work::Rx(source) => round.has_buffers && backend.has_pending(source),
                Work::Tx => {
                    let takes = backend.has_room() || !round.has_buffers && backend.gave_up();
                    round.has_packets && takes
                }
                Work::Flush => backend.can_flush(),
                Work::Clients => acceptors.is_pending() || backend.has_ready_clients(),
            });
            let Some(work) = next else { break };
            worked |= self.step(work, queues, &mut round);
            let cost = self.backend.take_cost().max(cost::PACKET);
            self.shares.charge(work, cost);
            total += cost;
        }
        self.work = self.work.wrapping_add(total as u64);
        self.quiet.pass(total);
        worked
    }

    /// Does one step of some work. False when there was nothing to do.
    fn step(
        &mut self,
        work: Work,
        queues: &mut Option<&mut Queues<'_>>,
        round: &mut Round,
    ) -> bool {
        match (work, queues) {
            (Work::Rx(source), Some(queues)) => {
                let step = |worker: &mut Self, queue: &mut Queue, memory: &_| {
                    worker.serve_rx(source, queue, memory)
                };
                let served = self.with_queue(queues, RX_RING, step);
                round.has_buffers = served;
                served
            }
            (Work::Tx, Some(queues)) => {
                round.has_packets = self.with_queue(queues, TX_RING, Self::serve_tx);
                round.has_packets
            }
            (Work::Rx(_) | Work::Tx, None) => false,
            (Work::Flush, _) => {
                self.backend.flush();
                true
            }
            (Work::Clients, _) => {
                self.serve_clients();
                true
            }
        }
    }

    /// Accepts a client, and goes on with one that was accepted before. Without a driver to talk to, those that do not wait for
    /// it are closed at once.
    fn serve_clients(&mut self) {
        self.backend.serve_client();
        self.backend.serve_call();
        if !self.acceptors.is_pending() {
            return;
        }
        self.backend.add_cost(cost::ACCEPT);
        match self.acceptors.accept() {
            Accepted::Client(entry, socket)
                if self.backend.has_guest() || self.backend.waits_for_guest(entry) =>
            {
                self.backend.add_client(entry, socket);
            }
            Accepted::Client(entry, socket) => self.backend.refuse_client(entry, &socket),
            Accepted::Shortage => self.backend.counters().shortages += 1,
            Accepted::Nobody => {}
        }
    }

    /// Works on a ring if it can be worked on, and stops it where it turns out to be broken. False when there was nothing to
    /// do.
    pub(super) fn with_queue(
        &mut self,
        queues: &mut Queues<'_>,
        index: usize,
        work: impl FnOnce(&mut Self, &mut Queue, &GuestMemoryMmap) -> Result<bool, QueueError>,
    ) -> bool {
        let Some(queue) = &mut queues.queues[index] else {
            return false;
        };
        let result = work(self, queue, queues.memory);
        self.rings.set_position(index, queue.next_avail());
        result.unwrap_or_else(|error| {
            queues.queues[index] = None;
            self.rings.stop_broken(index, &error);
            if index == RX_RING {
                self.backend.rx_starved();
            }
            false
        })
    }

    /// Finds out whether the driver has ever put buffers into the RX ring.
    pub(super) fn look_for_buffers(&mut self, queues: &mut Queues<'_>) {
        // Of a ring that is not there nothing is known.
        let mut has_buffers = true;
        self.with_queue(queues, RX_RING, |_, queue, memory| {
            has_buffers = queue.next_avail() != 0 || has_entries(queue, memory)?;
            Ok(true)
        });
        self.driver_watch.looked(has_buffers);
    }

    /// Interrupts the guest if it wants to know of the buffers that were returned to it.
    pub(super) fn notify(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        let wanted = needs_interrupt(queue, memory)?;
        if wanted || (self.notify_on_empty && !has_entries(queue, memory)?) {
            self.backend.counters().interrupts += 1;
            self.rings.interrupt(index);
        }
        Ok(())
    }

    /// Whether packets are taken from the guest. Where a round has left resets, it has found that the guest has no buffers.
    fn takes_packets(&self) -> bool {
        self.backend.has_room() || self.backend.gave_up()
    }

    /// Whether there are packets that are to be taken from the guest.
    pub(super) fn has_packets(&mut self, queues: &mut Queues<'_>) -> bool {
        self.takes_packets()
            && self.with_queue(queues, TX_RING, |_, queue, memory| {
                has_entries(queue, memory)
            })
    }

    /// Asks the driver to kick for what the worker would go on with. True when some of it is there already.
    pub(super) fn enable_kicks(&mut self, queues: &mut Queues<'_>) -> bool {
        let enable = |index: usize| {
            move |worker: &mut Self, queue: &mut Queue, memory: &GuestMemoryMmap| {
                worker.rings.enable_kicks(index, queue, memory)
            }
        };
        // Packets that are left in their ring are gone on with when the guest has given buffers for the answers.
        let has_packets = self.takes_packets() && self.with_queue(queues, TX_RING, enable(TX_RING));
        // Only where buffers are missing is there a reason to hear of new ones.
        let is_starved = RxSource::ALL
            .into_iter()
            .any(|source| self.backend.has_pending(source));
        has_packets | (is_starved && self.with_queue(queues, RX_RING, enable(RX_RING)))
    }
}
