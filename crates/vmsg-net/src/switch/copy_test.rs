// SPDX-License-Identifier: Apache-2.0 OR MIT
use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn a_sum_does_not_depend_on_how_its_bytes_come(
        bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6),
    ) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        let mut sum = Running::default();
        let mut from = 0;
        for cut in cuts {
            sum.add(&bytes[from..cut]);
            from = cut;
        }
        sum.add(&bytes[from..]);
        prop_assert_eq!(sum.finish(), !smoltcp::wire::checksum::data(&bytes));
    }
}

const ADDRESSES: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

fn frame(behind: &[u8]) -> Vec<u8> {
    [&ADDRESSES[..], behind].concat()
}

#[test]
fn tags_come_and_go_before_all_others() {
    let plain = frame(&[8, 0, 0x45]);
    let tagged = frame(&[0x81, 0, 0x60, 5, 8, 0, 0x45]);
    let both = frame(&[0x81, 0, 0x20, 7, 0x81, 0, 0x60, 5, 8, 0, 0x45]);
    for (from, change, to, network) in [
        (&plain, TagChange::Keep, &plain, 14),
        (&tagged, TagChange::Keep, &tagged, 18),
        (&tagged, TagChange::Strip, &plain, 14),
        (&plain, TagChange::Push(0x6005), &tagged, 18),
        (&tagged, TagChange::Push(0x2007), &both, 22),
        (&both, TagChange::Strip, &tagged, 18),
        (
            &frame(&[0x81, 0, 0, 9, 8, 0, 0x45]),
            TagChange::Replace(0x6005),
            &tagged,
            18,
        ),
    ] {
        let front = Front::new(from, change).expect("long enough");
        assert_eq!(front.bytes(), to, "{change:?}");
        assert_eq!(front.network, network);
        assert_eq!(front.moved(from.len()), to.len());
        assert_eq!(front.original(to.len()), from.len());
    }
}

#[test]
fn a_tag_that_is_not_there_cannot_be_changed() {
    let plain = frame(&[8, 0, 0x45, 0, 0, 0, 0]);
    assert!(Front::new(&plain, TagChange::Strip).is_none());
    assert!(Front::new(&plain, TagChange::Replace(1)).is_none());
    let short = frame(&[0x81, 0, 0, 1]);
    assert!(
        Front::new(&short, TagChange::Strip).is_none(),
        "no type behind it"
    );
    assert!(Front::new(&ADDRESSES, TagChange::Keep).is_none());
}
