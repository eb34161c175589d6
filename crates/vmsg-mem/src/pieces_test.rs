// SPDX-License-Identifier: Apache-2.0 OR MIT

use core::sync::atomic::AtomicU64;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const BYTES: usize = 64;

fn memory(bytes: usize) -> Vec<AtomicU64> {
    // Every byte another value.
    (0..bytes / 8)
        .map(|word| {
            let byte = |i: usize| u8::try_from(word * 8 + i).expect("a small memory");
            AtomicU64::new(u64::from_ne_bytes(core::array::from_fn(byte)))
        })
        .collect()
}

/// Where pieces lie in the memory, and how the run is cut: skip, take, skip, take...
fn shape() -> impl Strategy<Value = (Vec<(usize, usize)>, Vec<usize>)> {
    let piece = (0..BYTES, 0usize..20).prop_map(|(offset, len)| (offset, len.min(BYTES - offset)));
    (
        prop::collection::vec(piece, 0..6),
        prop::collection::vec(0usize..40, 0..4),
    )
}

/// The addresses of all bytes of the run, in order, by a simple way.
fn model(pieces: &[(usize, usize)], cuts: &[usize]) -> Vec<usize> {
    let mut bytes: Vec<usize> = pieces
        .iter()
        .flat_map(|(offset, len)| *offset..offset + len)
        .collect();
    for (i, cut) in cuts.iter().enumerate() {
        if i % 2 == 0 {
            bytes.drain(..bytes.len().min(*cut));
        } else {
            bytes.truncate(*cut);
        }
    }
    bytes
}

fn cut<'m>(mut pieces: Pieces<'m>, cuts: &[usize]) -> Pieces<'m> {
    for (i, cut) in cuts.iter().enumerate() {
        pieces = if i % 2 == 0 {
            pieces.skip(*cut)
        } else {
            pieces.take(*cut)
        };
    }
    pieces
}

fn slices<'m>(ram: RamSlice<'m>, pieces: &[(usize, usize)]) -> Vec<RamSlice<'m>> {
    pieces
        .iter()
        .map(|(offset, len)| ram.get(*offset, *len).expect("inside"))
        .collect()
}

fn all(ram: RamSlice<'_>) -> Vec<u8> {
    let mut bytes = vec![0; ram.len()];
    ram.read(0, &mut bytes);
    bytes
}

proptest! {
    #[test]
    fn cutting_and_reading_agree_with_single_bytes((pieces, cuts) in shape(), room in 0usize..80) {
        let words = memory(BYTES);
        let slices = slices(RamSlice::from_atomics(&words), &pieces);
        let run = cut(Pieces::new(&slices), &cuts);
        let expected = model(&pieces, &cuts);
        prop_assert_eq!(run.len(), expected.len());
        prop_assert_eq!(run.is_empty(), expected.is_empty());
        prop_assert_eq!(run.iter().map(|piece| piece.len()).sum::<usize>(), expected.len());
        prop_assert!(run.iter().all(|piece| !piece.is_empty()));
        let mut into = vec![0xff; room];
        let n = run.read(&mut into);
        prop_assert_eq!(n, room.min(expected.len()));
        prop_assert!(into[..n].iter().zip(&expected).all(|(byte, at)| usize::from(*byte) == *at));
        prop_assert!(into[n..].iter().all(|byte| *byte == 0xff));
        let first = run.read_array::<4>().map(|bytes| bytes.map(usize::from));
        prop_assert_eq!(first, expected.first_chunk::<4>().copied());
        let (one, two) = run.split_at(room);
        prop_assert_eq!(one.len() + two.len(), run.len());
        let mut second = vec![0; two.len()];
        two.read(&mut second);
        prop_assert!(second.iter().zip(&expected[one.len()..]).all(|(byte, at)| usize::from(*byte) == *at));
    }

    #[test]
    fn writing_touches_the_run_and_nothing_else(
        (pieces, cuts) in shape(),
        from in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let words = memory(BYTES);
        let ram = RamSlice::from_atomics(&words);
        let mut expected = all(ram);
        let places = model(&pieces, &cuts);
        for (at, byte) in places.iter().zip(&from) {
            expected[*at] = *byte;
        }
        let slices = slices(ram, &pieces);
        let run = cut(Pieces::new(&slices), &cuts);
        prop_assert_eq!(run.write(&from), from.len().min(places.len()));
        prop_assert_eq!(all(ram), expected);
    }

    #[test]
    fn writing_an_array_is_writing_its_bytes((pieces, cuts) in shape(), from in any::<[u8; 14]>()) {
        let (words, other_words) = (memory(BYTES), memory(BYTES));
        let (ram, other) = (RamSlice::from_atomics(&words), RamSlice::from_atomics(&other_words));
        let (slices, others) = (slices(ram, &pieces), slices(other, &pieces));
        let fits = cut(Pieces::new(&slices), &cuts).write_array(&from);
        let written = cut(Pieces::new(&others), &cuts).write(&from);
        prop_assert_eq!(fits, written == from.len());
        prop_assert_eq!(all(ram), all(other));
    }

    #[test]
    fn copying_between_runs_agrees_with_single_bytes(
        (pieces, cuts) in shape(),
        (to_pieces, to_cuts) in shape(),
    ) {
        let (words, to_words) = (memory(BYTES), memory(BYTES));
        let (ram, to_ram) = (RamSlice::from_atomics(&words), RamSlice::from_atomics(&to_words));
        to_ram.fill(0xff);
        let mut expected = all(to_ram);
        let (from, to) = (model(&pieces, &cuts), model(&to_pieces, &to_cuts));
        for (to, from) in to.iter().zip(&from) {
            expected[*to] = u8::try_from(*from).expect("a small memory");
        }
        let (slices, to_slices) = (slices(ram, &pieces), slices(to_ram, &to_pieces));
        let run = cut(Pieces::new(&slices), &cuts);
        let n = run.copy_to(cut(Pieces::new(&to_slices), &to_cuts));
        prop_assert_eq!(n, from.len().min(to.len()));
        prop_assert_eq!(all(to_ram), expected);
    }
}

#[test]
fn lengths_do_not_overflow() {
    let words = memory(BYTES);
    let slices = slices(RamSlice::from_atomics(&words), &[(0, 8), (8, 8)]);
    let run = Pieces::new(&slices);
    assert!(run.skip(usize::MAX).is_empty());
    assert_eq!(run.take(usize::MAX).len(), 16);
    assert_eq!(run.skip(3).skip(usize::MAX).iter().count(), 0);
    assert!(Pieces::EMPTY.skip(1).read_array::<1>().is_none());
}
