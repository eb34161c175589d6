// SPDX-License-Identifier: Apache-2.0 OR MIT
use core::sync::atomic::AtomicU64;

use super::*;

fn memory() -> Vec<AtomicU64> {
    (0..64).map(|_| AtomicU64::new(0)).collect()
}

fn heads(inflight: &Inflight, record: RamSlice<'_>) -> Vec<u16> {
    let mut heads = [0; 8];
    let count = inflight.heads(record, &mut heads).unwrap();
    heads[..count].to_vec()
}

#[test]
fn a_record_of_nothing_is_zeros() {
    let words = memory();
    let record = RamSlice::from_atomics(&words);
    let (inflight, recovered) = Inflight::resume(record, 8, 5).unwrap();
    assert_eq!(
        recovered,
        Recovered {
            used: 5,
            in_flight: 0
        }
    );
    assert_eq!(heads(&inflight, record), []);
}

#[test]
fn the_bytes_are_those_of_vhost_user() {
    let words = memory();
    let record = RamSlice::from_atomics(&words);
    let mut inflight = Inflight::begin(record, 8).unwrap();
    inflight.take(record, 3).unwrap();
    inflight.take(record, 6).unwrap();
    inflight.complete(record, 6).unwrap();
    let mut bytes = [0; 16];
    record.read(0, &mut bytes);
    // features, version 1, 8 descriptors, last batch head 6, used index 0
    assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 6, 0, 0, 0]);
    record.read(16 + 16 * 6, &mut bytes);
    assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    inflight.published(record, &[6], 1).unwrap();
    record.read(16 + 16 * 6, &mut bytes);
    assert_eq!(bytes[0], 0);
    assert_eq!(Inflight::bytes_for(8), 16 + 8 * 16);
}

#[test]
fn requests_come_back_in_the_order_in_which_they_were_taken() {
    let words = memory();
    let record = RamSlice::from_atomics(&words);
    let mut inflight = Inflight::begin(record, 8).unwrap();
    for head in [5, 2, 7, 0] {
        inflight.take(record, head).unwrap();
    }
    inflight.complete(record, 2).unwrap();
    inflight.published(record, &[2], 1).unwrap();
    inflight.give_back(record, 0).unwrap();
    let (mut next, recovered) = Inflight::resume(record, 8, 1).unwrap();
    assert_eq!(recovered.in_flight, 2);
    assert_eq!(heads(&next, record), [5, 7]);
    // What is taken now comes after all that was taken before.
    next.take(record, 1).unwrap();
    let (again, _) = Inflight::resume(record, 8, 1).unwrap();
    assert_eq!(heads(&again, record), [5, 7, 1]);
}

#[test]
fn a_request_is_done_when_the_used_index_is_out() {
    let words = memory();
    let record = RamSlice::from_atomics(&words);
    let mut inflight = Inflight::begin(record, 8).unwrap();
    for head in [5, 2, 7] {
        inflight.take(record, head).unwrap();
    }
    inflight.complete(record, 7).unwrap();
    inflight.complete(record, 5).unwrap();
    // The process dies before the used index goes out, or after.
    let (before, _) = Inflight::resume(record, 8, 0).unwrap();
    assert_eq!(heads(&before, record), [5, 2, 7]);
    let (after, _) = Inflight::resume(record, 8, 2).unwrap();
    assert_eq!(heads(&after, record), [2]);
}

#[test]
fn a_record_that_contradicts_the_queue_is_refused() {
    let words = memory();
    let record = RamSlice::from_atomics(&words);
    let refused = |size, used| match Inflight::resume(record, size, used) {
        Err(QueueError::BadRecord(why)) => why,
        other => panic!("{other:?}"),
    };
    Inflight::begin(record, 8).unwrap();
    assert!(refused(4, 0).contains("another size"));
    assert!(refused(8, 9).contains("used index"));
    record.write(LAST_BATCH_HEAD, &[200, 0]);
    assert!(refused(8, 1).contains("outside"));
    record.write(VERSION, &[9]);
    assert!(refused(8, 0).contains("version"));
    assert!(refused(64, 0).contains("small"));
    let (_, odd) = record.split_at(4);
    assert!(Inflight::begin(odd, 8).is_err());
}

#[test]
fn counters_that_change_while_they_are_sorted_by_do_no_harm() {
    const SIZE: u16 = 256;
    let words: Vec<AtomicU64> = (0..Inflight::bytes_for(SIZE).div_ceil(8))
        .map(|_| AtomicU64::new(0))
        .collect();
    let record = RamSlice::from_atomics(&words);
    let mut inflight = Inflight::begin(record, SIZE).unwrap();
    for head in 0..SIZE {
        inflight.take(record, head).unwrap();
    }
    struct Over<'a>(&'a std::sync::atomic::AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let end = Over(&over);
        let changing = scope.spawn(|| {
            let mut random = 1u64;
            while !over.load(Ordering::Relaxed) {
                for head in 0..usize::from(SIZE) {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    words[(HEADER + ENTRY * head + COUNTER) / 8]
                        .store(random >> 33, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..2000 {
            let mut heads = [0; SIZE as usize];
            let count = inflight.heads(record, &mut heads).unwrap();
            assert_eq!(count, heads.len());
            heads.sort_unstable();
            assert!(heads.iter().copied().eq(0..SIZE), "each of them once");
        }
        drop(end);
        changing.join().unwrap();
    });
    // Left alone they say the order again, whatever it is.
    for head in 0..SIZE {
        let counter = u64::from(head) * 7919 % 256;
        words[(HEADER + ENTRY * usize::from(head) + COUNTER) / 8].store(counter, Ordering::Relaxed);
    }
    let mut heads = [0; SIZE as usize];
    inflight.heads(record, &mut heads).unwrap();
    assert!(heads.is_sorted_by_key(|head| u64::from(*head) * 7919 % 256));
}

proptest::proptest! {
    #[test]
    fn no_memory_makes_it_panic(bytes: [u8; 144], used: u16) {
        let words = memory();
        let record = RamSlice::from_atomics(&words);
        record.write(0, &bytes);
        if let Ok((inflight, recovered)) = Inflight::resume(record, 8, used) {
            assert_eq!(heads(&inflight, record).len(), usize::from(recovered.in_flight));
        }
        // And with the two fields right that an attacker gets right first.
        record.write(0, &bytes);
        record.write(VERSION, &[1, 0, 8, 0]);
        record.write(USED_IDX, &used.to_le_bytes());
        assert!(Inflight::resume(record, 8, used).is_ok());
        record.write(USED_IDX, &used.wrapping_sub(3).to_le_bytes());
        let _ = Inflight::resume(record, 8, used);
    }
}
