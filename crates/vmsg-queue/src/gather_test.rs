// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;
use crate::ring::AvailRing;

const BASE: u64 = 0x10_0000;
const SIZE: u16 = 8;
/// Where the indirect tables are, right behind the table of the queue.
const TABLES: usize = 0x80;
const RING: usize = 0x800;

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let addr = prop_oneof![
        6 => BASE + 0x900..BASE + 0xf00,
        3 => (0u64..4).prop_map(|n| BASE + 0x80 + n * 0x20),
        1 => BASE - 0x20..BASE + 0x1020,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        12 => (1u32..5).prop_map(|n| n * 16),
        2 => 0u32..0x200,
        1 => any::<u32>(),
    ];
    let flags = prop::sample::select(&[0u16, 0, 1, 1, 2, 2, 3, 4, 4, 5, 7, 0xfff8][..]);
    let next = prop_oneof![12 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| Descriptor {
        addr: BusAddr(addr),
        len,
        flags,
        next,
    })
}

fn address(pieces: &[RamSlice<'_>]) -> Vec<(usize, usize)> {
    let address = |piece: &RamSlice<'_>| (piece.as_ptr().addr(), piece.len());
    pieces.iter().map(address).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever the hot path takes, the thorough path takes in the same way.
    #[test]
    fn both_paths_agree_on_what_the_hot_one_takes(
        direct in prop::collection::vec(descriptor(), usize::from(SIZE)),
        inner in prop::collection::vec(descriptor(), usize::from(SIZE)),
        capacity in 1usize..12,
        indirect: bool,
        read_only: bool,
    ) {
        let words: Vec<AtomicU64> = (0..0x1000 / 8).map(|_| AtomicU64::new(0)).collect();
        let ram = RamSlice::from_atomics(&words);
        let table = DescriptorTable::new(ram, SIZE.into()).unwrap();
        let tables = DescriptorTable::new(ram.split_at(TABLES).1, SIZE.into()).unwrap();
        let avail = AvailRing::new(ram.split_at(RING).1, SIZE, true).unwrap();
        for (index, (outer, inner)) in (0..SIZE).zip(direct.into_iter().zip(inner)) {
            prop_assert!(table.set(index, outer) && tables.set(index, inner));
            avail.set_head(index, index);
        }
        let access = if read_only { Access::Read } else { Access::ReadWrite };
        let windows = [Window::new(BusAddr(BASE), ram, access).unwrap()];
        let space = AddressSpace::new(&windows).unwrap();
        for head in 0..SIZE {
            let mut hot = [RamSlice::EMPTY; 12];
            let list = PieceList::new(&mut hot[..capacity]);
            let mut gather = Gather::new(space, list, indirect);
            let mut slots = [ChainSlot { head: ChainHead { id: 0 }, split: 0, end: 0 }];
            let mut run = |kind| gather.run(kind, avail.heads_from(head), table, &mut slots);
            let n = Kind::ALL.into_iter().map(&mut run).find(|&n| n > 0).unwrap_or(0);
            prop_assert!(n <= 1);
            let hot = gather.list.finish();
            if n == 0 {
                prop_assert!(hot.is_empty());
                continue;
            }
            let mut thorough = [RamSlice::EMPTY; 12];
            let list = PieceList::new(&mut thorough[..capacity]);
            let mut gather = Gather::new(space, list, indirect);
            let split = gather.chain(table, head);
            let Ok(split) = split else {
                return Err(TestCaseError::fail("the thorough path refuses the chain"));
            };
            prop_assert_eq!((slots[0].head.id, slots[0].split), (head, split));
            prop_assert_eq!(slots[0].end as usize, hot.len());
            prop_assert_eq!(address(hot), address(gather.list.finish()));
        }
    }
}

/// Makes a chain of one buffer and lets the hot path have it.
fn plain_chain(flags: u16, len: u32) -> u16 {
    let words: Vec<AtomicU64> = (0..0x1000 / 8).map(|_| AtomicU64::new(0)).collect();
    let ram = RamSlice::from_atomics(&words);
    let table = DescriptorTable::new(ram, SIZE.into()).unwrap();
    let avail = AvailRing::new(ram.split_at(RING).1, SIZE, true).unwrap();
    let addr = BusAddr(BASE + 0x900);
    let next = 0;
    assert!(table.set(
        0,
        Descriptor {
            addr,
            len,
            flags,
            next
        }
    ));
    let windows = [Window::new(BusAddr(BASE), ram, Access::ReadWrite).unwrap()];
    let mut pieces = [RamSlice::EMPTY; 4];
    let list = PieceList::new(&mut pieces);
    let mut gather = Gather::new(AddressSpace::new(&windows).unwrap(), list, true);
    let mut slots = [ChainSlot {
        head: ChainHead { id: 0 },
        split: 0,
        end: 0,
    }];
    let mut run = |kind| gather.run(kind, avail.heads_from(0), table, &mut slots);
    Kind::ALL
        .into_iter()
        .map(&mut run)
        .find(|&n| n > 0)
        .unwrap_or(0)
}

#[test]
fn the_hot_path_takes_plain_chains_and_leaves_others() {
    assert_eq!(plain_chain(0, 0x700), 1);
    assert_eq!(plain_chain(WRITE, 1), 1);
    assert_eq!(plain_chain(0, 0x701), 0);
    assert_eq!(plain_chain(0, 0), 0);
    assert_eq!(plain_chain(NEXT, 16), 0);
    assert_eq!(plain_chain(INDIRECT, 16), 0);
}
