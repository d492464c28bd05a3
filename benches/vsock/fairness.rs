//! What each of two directions keeps of the speed that it has alone.

use crate::cases::{Guests, Kind};
use crate::daemon::Binary;
use crate::failure::Failure;
use crate::measure::{Sample, Timing, key};
use crate::traffic::Direction;
use crate::uml;

/// Measures a stream out of the guest, one into it, and both at once, each with a daemon and a guest of its own.
pub fn run(
    binary: &Binary,
    guests: Guests,
    write: usize,
    timing: &Timing,
) -> Result<Sample, Failure> {
    let measure = |direction| {
        match guests {
            Guests::Simulated => Kind::Streams { direction, write },
            Guests::Linux => Kind::Uml(uml::Traffic::Streams { direction, write }),
        }
        .run(binary, timing, false)
    };
    let get = |sample: &Sample, key| sample.get(key).copied().unwrap_or_default();
    let out_alone = get(&measure(Direction::ToHost)?, key::MIB_PER_S);
    let in_alone = get(&measure(Direction::ToGuest)?, key::MIB_PER_S);
    let mut sample = measure(Direction::Both)?;
    let kept_out = get(&sample, key::TO_HOST_MIB_PER_S) / out_alone;
    let kept_in = get(&sample, key::TO_GUEST_MIB_PER_S) / in_alone;
    sample.extend([
        (key::OUT_ALONE_MIB_PER_S, out_alone),
        (key::IN_ALONE_MIB_PER_S, in_alone),
        (key::KEPT_OUT, kept_out),
        (key::KEPT_IN, kept_in),
        (key::KEPT, kept_out.min(kept_in)),
    ]);
    Ok(sample)
}
