// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::Arc;

use vmsg_mem::Mapping;

use super::*;

fn memory() -> DeviceSlice {
    let (mapping, _fd) = Mapping::memfd("ping", 4096, true).expect("memory");
    DeviceSlice::of_ram(Arc::new(mapping), 0, SIZE).expect("inside")
}

#[test]
fn each_ping_is_answered_once() {
    let block = memory();
    assert!(answer_once(&block).is_none(), "nobody asks");
    let mut asker = Asker::new(&block, Some(PeerId(7))).expect("random");
    assert!(answer_once(&block).is_none(), "nothing is asked yet");
    for _ in 0..3 {
        asker.ask(&block);
        assert!(!asker.is_answered(&block));
        assert_eq!(answer_once(&block), Some(Some(PeerId(7))));
        assert!(asker.is_answered(&block));
        assert_eq!(answer_once(&block), None);
    }
}

#[test]
fn an_answer_to_somebody_else_is_none() {
    let block = memory();
    let mut first = Asker::new(&block, None).expect("random");
    first.ask(&block);
    assert_eq!(answer_once(&block), Some(None));
    let mut second = Asker::new(&block, None).expect("random");
    second.ask(&block);
    assert!(!second.is_answered(&block), "it was for the first");
    assert_eq!(answer_once(&block), Some(None));
    assert!(second.is_answered(&block));
}

#[test]
fn an_asker_that_is_nobody_is_not_rung_and_any_bytes_are_borne() {
    let block = memory();
    for seed in 0u32..2000 {
        let word = seed.wrapping_mul(0x9e37_79b9);
        block.store_relaxed(usize::try_from(seed % 16).expect("small") * 4, word);
        block.store_relaxed(0, MAGIC);
        if let Some(Some(peer)) = answer_once(&block) {
            assert_eq!(u32::from(peer.0), block.load_relaxed(ASKER_ID));
        }
    }
    assert_eq!(peer(NOBODY), None);
    assert_eq!(peer(65536), None);
    assert_eq!(peer(65535), Some(PeerId(65535)));
}

#[test]
fn the_summary_has_the_median() {
    let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_micros).collect();
    assert!(summary(&mut times).ends_with("= 1.0/51.0/100.0/100.0 us"));
    assert_eq!(summary(&mut []), "");
}
