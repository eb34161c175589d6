// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

const SLOT: Slot = Slot(3);

fn used(queue: usize) -> Reply {
    Reply::Notice(SLOT, Notice::Used { queue })
}

fn config(offset: usize, value: u8) -> Reply {
    let data = vec![value; 2];
    Reply::Notice(SLOT, Notice::Config { offset, data })
}

fn done(ticket: u64) -> Reply {
    let result = Ok(());
    Reply::Done { ticket, result }
}

fn taken(outbox: &Outbox) -> Vec<Reply> {
    let mut replies = Vec::new();
    outbox.take(&mut replies);
    replies.into_iter().map(|(_, reply)| reply).collect()
}

#[test]
fn repeated_notices_take_one_place() {
    let outbox = Outbox::default();
    for value in 0..=255 {
        outbox.extend(0, [used(0), config(6, value), used(1)].into_iter());
    }
    outbox.extend(0, [config(0, 1)].into_iter());
    assert_eq!(
        taken(&outbox),
        [used(0), config(6, 255), used(1), config(0, 1)]
    );
    assert_eq!(taken(&outbox), []);
    outbox.extend(0, [used(0), config(6, 7)].into_iter());
    assert_eq!(taken(&outbox), [used(0), config(6, 7)]);
}

#[test]
fn answers_and_other_workers_are_all_heard() {
    let outbox = Outbox::default();
    outbox.extend(0, [used(0), done(1), done(2)].into_iter());
    outbox.extend(1, [used(0), done(3)].into_iter());
    assert_eq!(
        taken(&outbox),
        [used(0), done(1), done(2), used(0), done(3)]
    );
}
