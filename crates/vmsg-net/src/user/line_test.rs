// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who waits how long.

use super::*;

/// A flow with `backlog` bytes to send, in frames of `size` bytes.
#[derive(Default)]
struct Sender {
    share: Share,
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
    let Some(mut budget) = line.begin(slot, &mut sender.share, FULL) else {
        return Some((index, 0));
    };
    let mut frames = 0;
    while !budget.is_spent() && sender.backlog > 0 {
        let n = sender.size.min(sender.backlog);
        sender.backlog -= n;
        sender.sent += n;
        budget.spend(n);
        frames += 1;
    }
    let turn = if sender.backlog > 0 {
        Turn::Again
    } else {
        Turn::Done
    };
    line.end(slot, &mut sender.share, turn, budget);
    Some((index, frames))
}

fn join(line: &mut Line, senders: &mut [Sender], index: usize) {
    let source = Source::Forward(u32::try_from(index).unwrap());
    line.join(source, &mut senders[index].share);
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
        // It comes back at any time.
        for _ in 0..2 + round % 130 {
            turn(&mut line, &mut senders);
        }
    }
    assert_eq!(worst, 0, "only the turn under way is before it");
}

/// One that pretends to be small with each frame has its share and no more.
#[test]
fn short_turns_in_a_round_are_no_more_than_one() {
    let mut senders = senders(3, 1500);
    let mut line = Line::default();
    for index in 0..2 {
        senders[index].backlog = usize::MAX / 2;
        join(&mut line, &mut senders, index);
    }
    for _ in 0..10_000 {
        if senders[2].backlog == 0 {
            senders[2].backlog = 1500;
            join(&mut line, &mut senders, 2);
        }
        turn(&mut line, &mut senders);
    }
    assert!(senders[2].sent > 0);
    assert!(senders[2].sent < senders[0].sent / 4, "{}", senders[2].sent);
    assert!(senders[0].sent.abs_diff(senders[1].sent) < 2 * FULL);
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
        assert!(line.len() <= 8);
    }
    while turn(&mut line, &mut senders).is_some() {}
    assert!(senders.iter().all(|sender| sender.backlog == 0));
    assert!(
        senders
            .iter()
            .all(|sender| sender.share.place == Place::Out)
    );
}
