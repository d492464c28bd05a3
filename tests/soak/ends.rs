//! One end of a connection plays its part: it sends and checks bytes, stalls and ends as planned. The guest's programs do the
//! same in `tests/guest/peer.py`.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::thread::{scope, sleep};

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::common::host::Pattern;
use super::common::sim::GuestStream;
use super::common::sim::packet::NO_SEND;
use super::course::{Course, Fault, Tally};
use super::plan::{Ending, MAX_WRITE, Plan, Side, any_size};

/// What an end may send before it learns that its peer has left, in bytes.
const ENDLESS: usize = 256 << 20;

/// How far apart the bytes of two connections begin in their pattern.
const STRIDE: usize = 104_729;

/// A stream as a program holds it.
pub trait End: Read + Write + Send {
    /// Another handle of it.
    fn again(&self) -> Self;
    /// Closes its writing side. An error only says that the other end was quicker.
    fn finish_writing(&self);
    /// Closes it. A false says that the other end does not confirm.
    fn close(self) -> bool;
    fn reset(self);
}

impl End for UnixStream {
    fn again(&self) -> Self {
        self.try_clone().unwrap()
    }

    fn finish_writing(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }

    fn close(self) -> bool {
        true
    }

    fn reset(self) {
        unreachable!("a host program has no way to reset a connection");
    }
}

impl End for GuestStream {
    fn again(&self) -> Self {
        self.handle()
    }

    fn finish_writing(&self) {
        self.shutdown(NO_SEND);
    }

    fn close(self) -> bool {
        GuestStream::close(&self);
        self.is_gone()
    }

    fn reset(self) {
        GuestStream::reset(&self);
    }
}

/// A connection of messages: a write is one, and so is a read.
pub struct Messages(pub GuestStream);

impl Read for Messages {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let message = self.0.recv_message()?;
        let Some(place) = into.get_mut(..message.len()) else {
            return Err(io::Error::other("a message longer than any that was sent"));
        };
        place.copy_from_slice(&message);
        Ok(message.len())
    }
}

impl Write for Messages {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        self.0.send_message(message)?;
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl End for Messages {
    fn again(&self) -> Self {
        Self(self.0.handle())
    }

    fn finish_writing(&self) {
        End::finish_writing(&self.0);
    }

    fn close(self) -> bool {
        End::close(self.0)
    }

    fn reset(self) {
        End::reset(self.0);
    }
}

/// Plays the part of `side` in `plan` with a stream that has just been opened.
pub fn play<E: End>(mut stream: E, plan: &Plan, side: Side, course: &Course) -> Result<(), Fault> {
    let actor = Actor { plan, side, course };
    match plan.part(side).ending {
        Ending::HalfClose | Ending::Endless => {
            let mut outgoing = stream.again();
            scope(|scope| {
                let sending = scope.spawn(move || {
                    actor.send(&mut outgoing)?;
                    outgoing.finish_writing();
                    Ok(())
                });
                let received = actor.receive(&mut stream);
                received.and(sending.join().unwrap())
            })?;
        }
        Ending::Close => actor.send(&mut stream)?,
        Ending::Reset => {
            actor.send(&mut stream)?;
            stream.reset();
            return Ok(());
        }
    }
    if stream.close() {
        Ok(())
    } else {
        Err(Fault::Cut(
            "the other end does not confirm the close".into(),
        ))
    }
}

/// The bytes of the end of `plan` at `side`.
pub fn bytes(plan: &Plan, side: Side, offset: usize, size: usize) -> &'static [u8] {
    pattern(side).at(plan.number as usize * STRIDE + offset, size)
}

fn pattern(side: Side) -> &'static Pattern {
    static GUEST: LazyLock<Pattern> = LazyLock::new(|| Pattern::new("guest"));
    static HOST: LazyLock<Pattern> = LazyLock::new(|| Pattern::new("host"));
    match side {
        Side::Guest => &GUEST,
        Side::Host => &HOST,
    }
}

#[derive(Clone, Copy)]
struct Actor<'a> {
    plan: &'a Plan,
    side: Side,
    course: &'a Course,
}

impl Actor<'_> {
    /// Sends all bytes of its part.
    fn send(&self, stream: &mut impl Write) -> Result<(), Fault> {
        let part = self.plan.part(self.side);
        let peer_leaves = self.plan.part(self.side.other()).ending.is_abrupt();
        let endless = part.ending == Ending::Endless;
        let total = if endless { ENDLESS } else { part.bytes };
        let mut rng = SmallRng::seed_from_u64(self.plan.number.into());
        let mut sent = 0;
        while sent < total {
            let size = any_size(&mut rng, part.write).min(total - sent);
            match stream.write(bytes(self.plan, self.side, sent, size)) {
                Ok(size) => {
                    sent += size;
                    self.count(size);
                }
                Err(error) if peer_leaves && is_end(&error) => return Ok(()),
                Err(error) => return Err(Fault::after(sent, "sent", &error)),
            }
        }
        if endless {
            let what = format!("{sent} bytes are taken although the other end has left");
            return Err(Fault::Wrong(what));
        }
        Ok(())
    }

    /// Compares what comes, to the end, with what the other end sends.
    fn receive(&self, stream: &mut impl Read) -> Result<(), Fault> {
        let part = self.plan.part(self.side);
        let theirs = self.plan.part(self.side.other());
        let mut rng = SmallRng::seed_from_u64(self.plan.number.into());
        let mut buffer = vec![0; MAX_WRITE];
        let mut received = 0;
        let mut stall = Some(part.stall);
        loop {
            if received >= part.stall_at {
                stall.take().into_iter().for_each(sleep);
            }
            // Of messages, the other end's draws.
            let (most, limit) = match self.plan.messages {
                true => (theirs.write, theirs.bytes.saturating_sub(received)),
                false => (1 << 17, usize::MAX),
            };
            let wanted = any_size(&mut rng, most).min(limit);
            let room = if self.plan.messages {
                MAX_WRITE
            } else {
                wanted
            };
            match stream.read(&mut buffer[..room]) {
                Ok(0) => break,
                Ok(size) if self.plan.messages && size != wanted => {
                    let what = format!("behind {received} bytes, {size} in place of {wanted}");
                    return Err(Fault::Wrong(what));
                }
                Ok(size) => {
                    self.check(received, &buffer[..size], theirs.bytes)?;
                    received += size;
                    self.count(size);
                }
                Err(error) if theirs.ending.is_abrupt() && is_end(&error) => break,
                Err(error) => return Err(Fault::after(received, "received", &error)),
            }
        }
        // Only what is reset may lose bytes.
        if received == theirs.bytes || theirs.ending == Ending::Reset {
            return Ok(());
        }
        let what = format!("ended after {received} of {} bytes", theirs.bytes);
        Err(Fault::Cut(what))
    }

    fn check(&self, offset: usize, got: &[u8], total: usize) -> Result<(), Fault> {
        let Plan { number, .. } = self.plan;
        if offset + got.len() > total {
            let what = format!("more than {total} bytes");
            return Err(Fault::Wrong(what));
        }
        let start = *number as usize * STRIDE + offset;
        match pattern(self.side.other()).difference(start, got) {
            None => Ok(()),
            Some(differs) => Err(Fault::Wrong(format!(
                "a wrong byte at offset {}",
                offset + differs
            ))),
        }
    }

    fn count(&self, size: usize) {
        if self.side == Side::Host {
            Tally::add(&self.course.tally.bytes, size as u64);
        }
    }
}

/// Whether an error says that the other end has left.
fn is_end(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionReset)
}
