// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

/// Descriptors are words here.
type Words = Core<&'static str>;

fn core(permanent: &[(u16, Vec<&'static str>)]) -> Words {
    let reserved: Vec<_> = permanent.iter().map(|(id, _)| PeerId(*id)).collect();
    let mut core = Core::new("memory", Ids::new(0, false, reserved));
    for (id, bells) in permanent {
        core.add_permanent(PeerId(*id), bells.clone());
    }
    core
}

fn sent(core: &mut Words, key: u64) -> Vec<(i64, Option<&'static str>)> {
    let queue = core.queue(Key(key)).expect("a client");
    queue.drain(..).map(|m| (m.number, m.fd)).collect()
}

#[test]
fn clients_are_told_of_each_other_in_the_order_of_qemus_server() {
    let mut core = core(&[]);
    assert_eq!(core.join(Key(1), vec!["a0", "a1"]), Ok(PeerId(0)));
    assert_eq!(
        sent(&mut core, 1),
        [
            (0, None),
            (0, None),
            (-1, Some("memory")),
            (0, Some("a0")),
            (0, Some("a1"))
        ]
    );
    assert_eq!(core.join(Key(2), vec!["b0", "b1"]), Ok(PeerId(1)));
    assert_eq!(core.join(Key(3), vec!["c0"]), Ok(PeerId(2)));
    assert_eq!(
        sent(&mut core, 1),
        [(1, Some("b0")), (1, Some("b1")), (2, Some("c0"))]
    );
    assert_eq!(
        sent(&mut core, 3),
        [
            (0, None),
            (2, None),
            (-1, Some("memory")),
            (0, Some("a0")),
            (0, Some("a1")),
            (1, Some("b0")),
            (1, Some("b1")),
            (2, Some("c0")),
        ]
    );
    core.leave(Key(2));
    assert_eq!(sent(&mut core, 1), [(1, None)]);
    assert_eq!(sent(&mut core, 3), [(1, None)]);
    assert_eq!(core.join(Key(4), vec!["d0"]), Ok(PeerId(3)));
}

#[test]
fn the_peer_of_a_port_with_an_id_never_joins_and_never_leaves() {
    let mut core = core(&[(5, vec!["p0"])]);
    assert_eq!(core.join(Key(1), vec!["a0"]), Ok(PeerId(0)));
    let first = [
        (0, None),
        (0, None),
        (-1, Some("memory")),
        (5, Some("p0")),
        (0, Some("a0")),
    ];
    assert_eq!(sent(&mut core, 1), first);
    for key in [2, 3] {
        assert_eq!(core.join_permanent(Key(key), PeerId(5)), Ok(()));
        assert_eq!(core.join_permanent(Key(9), PeerId(5)), Err(Refusal::Busy));
        assert_eq!(core.client_of(PeerId(5)), Some(Key(key)));
        assert_eq!(
            sent(&mut core, key),
            [
                (0, None),
                (5, None),
                (-1, Some("memory")),
                (0, Some("a0")),
                (5, Some("p0"))
            ]
        );
        core.leave(Key(key));
        assert_eq!(core.client_of(PeerId(5)), None);
    }
    assert_eq!(sent(&mut core, 1), []);
}

#[test]
fn a_client_for_which_too_much_waits_is_named_and_takes_no_more() {
    let mut core = core(&[]);
    core.join(Key(0), vec!["a0"]).unwrap();
    let at_first = core.queue(Key(0)).unwrap().len();
    for key in 1..=(MAX_NEWS as u64) {
        core.join(Key(key), vec!["b0"]).unwrap();
        core.leave(Key(key));
    }
    assert_eq!(core.queue(Key(0)).unwrap().len(), at_first + MAX_NEWS);
    assert_eq!(core.take_overrun().first(), Some(&Key(0)));
    core.leave(Key(0));
    assert_eq!(core.take_overrun(), []);
    assert!(core.queue(Key(0)).is_none());
}

#[test]
fn no_client_ever_sees_an_id_join_twice_without_leave_or_again_after_it() {
    // What QEMU's device bears: an id joins once. Clients come and go in a fixed disorder.
    use std::collections::BTreeMap;
    let mut core = core(&[(3, vec!["p"])]);
    let mut seen: BTreeMap<u64, BTreeMap<i64, u32>> = BTreeMap::new();
    let mut random = 1u64;
    for key in 0..2000 {
        core.join(Key(key), vec!["x"]).unwrap();
        seen.insert(key, BTreeMap::new());
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let living: Vec<u64> = seen.keys().copied().collect();
        if living.len() > 20 {
            let gone = living[usize::try_from(random >> 33).unwrap() % living.len()];
            core.leave(Key(gone));
            seen.remove(&gone);
        }
        for (key, joins) in &mut seen {
            for (number, fd) in sent(&mut core, *key) {
                if fd.is_some() && number >= 0 {
                    let count = joins.entry(number).or_default();
                    *count += 1;
                    assert_eq!(*count, 1, "id {number} joined twice for client {key}");
                }
            }
        }
    }
}
