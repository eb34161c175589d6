// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who waits how long.

use super::*;

/// A flow that always has frames of `size` bytes while `active`.
#[derive(Default)]
struct Sender {
    place: Place,
    debt: usize,
    backlog: usize,
    size: usize,
    sent: usize,
}

const FULL: usize = 64 << 10;

/// One turn; the source that had it, and the frames it sent.
fn turn(line: &mut Line, senders: &mut [Sender]) -> Option<(usize, usize)> {
    let slot = line.next()?;
    let Source::Forward(index) = slot.source else {
        panic!("{:?}", slot.source);
    };
    let index = index as usize;
    let sender = &mut senders[index];
    if sender.place == Place::Resting {
        sender.place = Place::Out;
        return Some((index, 0));
    }
    let Some(mut budget) = slot.budget(FULL, &mut sender.debt) else {
        line.again(slot);
        return Some((index, 0));
    };
    let mut frames = 0;
    while budget > 0 && sender.backlog > 0 {
        let n = sender.size.min(sender.backlog);
        sender.backlog -= n;
        sender.sent += n;
        sender.debt += n.saturating_sub(budget);
        budget = budget.saturating_sub(n);
        frames += 1;
    }
    let again = if sender.backlog > 0 {
        true
    } else {
        slot.done(line, &mut sender.place)
    };
    if again {
        line.again(slot);
    }
    Some((index, frames))
}

fn join(line: &mut Line, senders: &mut [Sender], index: usize) {
    let source = Source::Forward(u32::try_from(index).unwrap());
    line.join(source, &mut senders[index].place);
}

fn senders(count: usize, size: usize) -> Vec<Sender> {
    (0..count)
        .map(|_| Sender {
            size,
            ..Sender::default()
        })
        .collect()
}

#[test]
fn everybody_gets_the_same_in_bytes_whatever_the_size_of_frames() {
    let mut senders = senders(3, 1500);
    senders[1].size = 65_000;
    senders[2].size = 60;
    let mut line = Line::default();
    for index in 0..3 {
        senders[index].backlog = usize::MAX / 2;
        join(&mut line, &mut senders, index);
    }
    for _ in 0..3000 {
        turn(&mut line, &mut senders);
    }
    let sent: Vec<_> = senders.iter().map(|sender| sender.sent).collect();
    let (least, most) = (sent.iter().min().unwrap(), sent.iter().max().unwrap());
    assert!(most - least < 3 * FULL, "{sent:?}");
}

#[test]
fn a_small_flow_waits_for_one_turn_of_the_large_ones() {
    let mut senders = senders(65, 1514);
    let mut line = Line::default();
    for index in 0..64 {
        senders[index].backlog = usize::MAX / 2;
        join(&mut line, &mut senders, index);
    }
    for _ in 0..500 {
        turn(&mut line, &mut senders);
    }
    senders[64].size = 100;
    let mut worst = 0;
    for round in 0..1000 {
        senders[64].backlog = 100;
        join(&mut line, &mut senders, 64);
        let mut waited = 0;
        loop {
            let (index, frames) = turn(&mut line, &mut senders).unwrap();
            if index == 64 && frames > 0 {
                break;
            }
            waited += frames;
        }
        worst = worst.max(waited);
        // It comes back in the middle of anything.
        for _ in 0..round % 130 {
            turn(&mut line, &mut senders);
        }
    }
    // Its own turn is next unless it had one less than a round ago.
    assert!(worst <= 64 * (FULL / 1514 + 1), "{worst}");
    // After a round of rest there is nothing before it.
    for _ in 0..200 {
        turn(&mut line, &mut senders);
    }
    senders[64].backlog = 100;
    join(&mut line, &mut senders, 64);
    assert_eq!(turn(&mut line, &mut senders), Some((64, 1)));
}

/// Flows that come and go with little each time, as those whose window is closed again and again.
#[test]
fn newcomers_do_not_starve_those_that_wait() {
    let mut senders = senders(9, 1500);
    let mut line = Line::default();
    senders[8].backlog = usize::MAX / 2;
    join(&mut line, &mut senders, 8);
    for _ in 0..20_000 {
        for index in 0..8 {
            if senders[index].backlog == 0 {
                senders[index].backlog = 3000;
                join(&mut line, &mut senders, index);
            }
        }
        turn(&mut line, &mut senders);
    }
    let most = senders[..8].iter().map(|sender| sender.sent).max().unwrap();
    assert!(senders[8].sent > most, "{} {most}", senders[8].sent);
    assert!(most > 1_000_000, "they are served, too");
}

#[test]
fn nobody_is_in_line_twice_and_nobody_is_left_in_it() {
    let mut senders = senders(4, 1000);
    let mut line = Line::default();
    for step in 0..10_000usize {
        let index = step * 7 % 4;
        senders[index].backlog += step % 3000;
        if senders[index].backlog > 0 {
            join(&mut line, &mut senders, index);
        }
        if step % 3 == 0 {
            turn(&mut line, &mut senders);
        }
        assert!(line.len() <= 4);
    }
    while turn(&mut line, &mut senders).is_some() {}
    assert!(senders.iter().all(|sender| sender.backlog == 0));
    assert!(senders.iter().all(|sender| sender.place == Place::Out));
}
