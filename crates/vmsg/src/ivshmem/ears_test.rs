// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn news_that_nobody_asks_for_take_no_more_and_more_memory() {
    let mut news = Vec::new();
    for _ in 0..10 * MAX_NEWS {
        keep(&mut news, Event::Joined(ivshmem::PeerId(1)));
    }
    assert_eq!(news.len(), MAX_NEWS);
}

#[test]
fn the_counter_of_an_eventfd_is_seen_without_reading_it() {
    let bell = vmsg_mem::Doorbell::new().expect("eventfd");
    let fd = bell.eventfd().expect("an eventfd");
    assert_eq!(count(fd), Some(0));
    for _ in 0..17 {
        bell.ring().expect("rung");
    }
    assert_eq!(count(fd), Some(17));
    assert_eq!(bell.drain().expect("drained"), 17);
}
