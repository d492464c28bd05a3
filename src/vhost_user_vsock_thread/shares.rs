//! Who gets the worker's time.

use crate::thread_backend::RxSource;

/// What the worker may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// To give the guest packets.
    Rx(RxSource),
    /// To take packets from the guest.
    Tx,
    /// To send to host programs what had to be buffered.
    Flush,
    /// To accept host programs, and to read their CONNECT lines.
    Clients,
}

impl Work {
    /// All kinds. What makes room for answers is first where several have had the same.
    pub(super) const ALL: [Self; 6] = [
        Self::Rx(RxSource::Resets),
        Self::Rx(RxSource::Packets),
        Self::Rx(RxSource::Streams),
        Self::Tx,
        Self::Flush,
        Self::Clients,
    ];

    /// How many shares it has. A stream beside a flood of small packets or of clients also waits for programs that have to share
    /// processors with the flood's: with one share it kept 5 to 9 % of its speed, with three 10 to 16 %.
    fn shares(self) -> u64 {
        match self {
            Self::Rx(RxSource::Streams) => 3,
            _ => 1,
        }
    }
}

/// Shares time by what was done: of the kinds of work that there are, the one that has cost least for its shares is next. So
/// each gets what its shares say as long as it has enough to do, however much or little one step of it costs, and what one
/// leaves goes to the others.
#[derive(Debug, Default)]
pub(super) struct Shares {
    costs: [u64; Work::ALL.len()],
}

impl Shares {
    /// The work to do next, of that for which `is_there` is true.
    pub(super) fn next(&mut self, is_there: impl Fn(Work) -> bool) -> Option<Work> {
        let there = Work::ALL.map(is_there);
        let waiting = (0..there.len()).filter(|index| there[*index]);
        let next = waiting.min_by_key(|index| self.costs[*index])?;
        let least = self.costs[next];
        // Time in which there was nothing to do is no claim on more of it later.
        for (cost, is_there) in self.costs.iter_mut().zip(there) {
            if !is_there {
                *cost = least.max(*cost);
            }
        }
        Some(Work::ALL[next])
    }

    /// Notes that some work has cost so much.
    pub(super) fn charge(&mut self, work: Work, cost: usize) {
        if let Some(index) = Work::ALL.iter().position(|other| *other == work) {
            self.costs[index] += cost as u64 / work.shares();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAMS: Work = Work::Rx(RxSource::Streams);

    /// Lets these kinds of work compete, whose steps cost so much, and returns what each has got.
    fn compete(shares: &mut Shares, steps: usize, there: &[(Work, usize)]) -> Vec<usize> {
        let mut got = vec![0; there.len()];
        for _ in 0..steps {
            let next = shares.next(|work| there.iter().any(|(other, _)| *other == work));
            let index = there.iter().position(|(work, _)| Some(*work) == next);
            let index = index.unwrap();
            let (work, cost) = there[index];
            shares.charge(work, cost);
            got[index] += cost;
        }
        got
    }

    #[test]
    fn steps_of_any_cost_get_their_shares() {
        let there = [(Work::Tx, 300_000), (STREAMS, 1000), (Work::Clients, 7)];
        let mut got = compete(&mut Shares::default(), 1_000_000, &there);
        got[1] /= 3;
        let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
        assert!(most - least <= 300_000, "{got:?}");
    }

    #[test]
    fn who_was_away_has_no_claim_on_what_others_got() {
        let mut shares = Shares::default();
        compete(&mut shares, 1000, &[(Work::Tx, 1000)]);
        let got = compete(&mut shares, 100, &[(Work::Tx, 1000), (Work::Flush, 1000)]);
        assert!(got[0].abs_diff(got[1]) <= 2000, "{got:?}");
    }

    #[test]
    fn without_work_there_is_nothing_to_do() {
        assert_eq!(Shares::default().next(|_| false), None);
    }
}
