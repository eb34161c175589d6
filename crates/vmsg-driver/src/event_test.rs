// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn used(queue: u32) -> Event {
    Event::Used {
        device: DevNum(1),
        queue: QueueIndex(queue),
    }
}

fn drain(queue: &mut EventQueue) -> Vec<Event> {
    std::iter::from_fn(|| queue.pop()).collect()
}

#[test]
fn events_come_out_as_they_went_in_and_used_events_only_once() {
    let mut queue = EventQueue::new();
    let other = Event::Device {
        device: DevNum(2),
        state: DeviceState::Removed,
    };
    for event in [used(0), other, used(1), used(0), other] {
        queue.push(event);
    }
    assert_eq!(drain(&mut queue), [used(0), other, used(1), other]);
    queue.push(used(0));
    assert_eq!(drain(&mut queue), [used(0)]);
}

#[test]
fn a_flood_of_events_takes_no_more_memory_and_is_told() {
    let mut queue = EventQueue::new();
    for i in 0..1000 {
        queue.push(used(i));
    }
    let events = drain(&mut queue);
    assert_eq!(events.len(), MAX_EVENTS);
    assert_eq!(events[..3], [used(0), used(1), used(2)]);
    assert_eq!(events.last(), Some(&Event::Lost));
    assert_eq!(queue.lost(), 1000 - (MAX_EVENTS as u64 - 1));
    queue.push(used(7));
    assert_eq!(drain(&mut queue), [used(7)]);
}

#[test]
fn taking_one_event_leaves_the_order_of_the_others() {
    let mut queue = EventQueue::new();
    // Away from the start, so that the ring wraps around.
    for i in 0..MAX_EVENTS - 2 {
        queue.push(used(u32::try_from(i).unwrap()));
    }
    drain(&mut queue);
    for i in 0..5 {
        queue.push(used(i));
    }
    assert_eq!(queue.take(|event| *event == used(2)), Some(used(2)));
    assert_eq!(queue.take(|event| *event == used(2)), None);
    assert_eq!(drain(&mut queue), [used(0), used(1), used(3), used(4)]);
}
