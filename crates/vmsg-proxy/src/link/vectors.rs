// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which doorbells of a connection the queues of its sessions get.

use crate::session::QueueVectors;
use vmsg_bus::Vectors;

/// Most devices have two queues that are busy: sessions begin with other doorbells as long as there are some.
const STEP: usize = 2;

/// For the queues of the session at `seat`, one after another. Where there are fewer doorbells than queues, some have the same.
pub(super) fn plan(vectors: &Vectors, seat: usize) -> Vec<QueueVectors> {
    let theirs: Vec<u16> = vectors.theirs().collect();
    let own: Vec<u16> = vectors.own().collect();
    let of = |all: &[u16], at: usize| {
        let at = (seat * STEP + at).checked_rem(all.len())?;
        all.get(at).copied()
    };
    let count = theirs.len().max(own.len());
    let queues = (0..count).map(|queue| QueueVectors {
        kick: of(&theirs, queue),
        call: of(&own, queue),
    });
    queues.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsg_mem::Doorbell;

    fn vectors(own: &[u16], theirs: &[u16]) -> Vectors {
        let bell = |&vector| (vector, Doorbell::new().unwrap());
        let fd = |&vector| (vector, Doorbell::new().unwrap().into());
        Vectors::new(
            own.iter().map(fd).collect(),
            theirs.iter().map(bell).collect(),
        )
    }

    fn plan_of(own: &[u16], theirs: &[u16], seat: usize) -> Vec<(Option<u16>, Option<u16>)> {
        let plan = plan(&vectors(own, theirs), seat);
        plan.iter().map(|queue| (queue.kick, queue.call)).collect()
    }

    #[test]
    fn each_queue_has_its_own_as_long_as_there_are_some() {
        let some = |kick, call| (Some(kick), Some(call));
        assert_eq!(plan_of(&[1, 2], &[5, 6], 0), [some(5, 1), some(6, 2)]);
        assert_eq!(
            plan_of(&[1, 2, 3, 4], &[5, 6, 7, 8], 1),
            [some(7, 3), some(8, 4), some(5, 1), some(6, 2)]
        );
        // Fewer at one end.
        assert_eq!(plan_of(&[1], &[5, 6], 3), [some(5, 1), some(6, 1)]);
        assert_eq!(plan_of(&[1], &[], 0), [(None, Some(1))]);
        assert_eq!(plan_of(&[], &[], 7), []);
    }
}
