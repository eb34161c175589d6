// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any bytes of a server, for the parts of the NBD client that look at them.

use std::collections::HashMap;

use vmsg_block::nbd::{Event, Expected, LONGEST_HEAD, Negotiation, Replies, UnderWay};

struct Requests(HashMap<u64, Expected>);

impl UnderWay for Requests {
    fn get(&mut self, cookie: u64) -> Option<&mut Expected> {
        self.0.get_mut(&cookie)
    }
}

/// A negotiation and what follows it. The first byte says how the bytes come apart, the second what is under way.
#[allow(unreachable_pub, reason = "the fuzz target is another crate")]
pub fn server(bytes: &[u8]) {
    let [pieces, kinds, bytes @ ..] = bytes else {
        return;
    };
    let piece = usize::from(*pieces) + 1;
    let uri = "nbd://h/x".parse().expect("a URI");
    let mut negotiation = Negotiation::new(&uri);
    let mut whole = Negotiation::new(&uri);
    let mut rest = bytes;
    let at_once = whole.input(&mut rest);
    let mut result = Ok(None);
    let mut left = 0;
    for part in bytes.chunks(piece) {
        if !matches!(result, Ok(None)) {
            left += part.len();
            continue;
        }
        let mut part = part;
        result = negotiation.input(&mut part);
        left += part.len();
        let out = negotiation.output().len();
        assert!(out < 8192, "no more than a few questions");
        negotiation.sent(out / 2);
    }
    assert_eq!(
        result, at_once,
        "it does not matter how the bytes come apart"
    );
    let (structured, replies) = match result {
        Ok(Some(export)) => {
            assert_eq!(left, rest.len());
            assert!(export.minimum.is_power_of_two() && export.preferred >= export.minimum);
            (export.structured, rest)
        }
        // What is no negotiation can be replies.
        _ => (kinds & 1 != 0, bytes),
    };
    transmission(structured, *kinds, replies);
}

/// Replies to requests with the cookies 0 to 7, of which some are reads.
fn transmission(structured: bool, kinds: u8, bytes: &[u8]) {
    let expected = |cookie: u64| match kinds >> cookie & 1 {
        0 => Expected::new(0, 0),
        _ => Expected::new(cookie << 12, 4096),
    };
    let mut requests = Requests((0..8).map(|cookie| (cookie, expected(cookie))).collect());
    let mut replies = Replies::new(structured);
    let mut bytes = bytes;
    let mut failed = HashMap::new();
    let mut data = HashMap::<u64, u64>::new();
    let mut steps = 0;
    while let Ok(step) = replies.next(bytes, &mut requests) {
        let Some((len, event)) = step else {
            assert!(bytes.len() < LONGEST_HEAD, "a head is never longer");
            return;
        };
        bytes = &bytes[len..];
        steps += 1;
        match event {
            Event::Data { cookie, at, len } | Event::Zeroes { cookie, at, len } => {
                let wanted = requests.0[&cookie].len;
                assert!(
                    at <= wanted && len <= wanted - at,
                    "inside what was asked for"
                );
                let all = data.entry(cookie).or_default();
                *all += u64::from(len);
                assert!(*all <= u64::from(wanted), "never more than was asked for");
                if matches!(event, Event::Data { .. }) {
                    bytes = &bytes[bytes.len().min(len as usize)..];
                }
            }
            Event::Failed {
                cookie,
                error,
                text,
            } => {
                assert!(error != 0 && text.chars().all(|c| !c.is_control()));
                *failed.entry(cookie).or_insert(0) += 1;
                assert!(failed[&cookie] <= 16);
            }
            Event::Done { cookie } => {
                let request = requests.0.remove(&cookie).expect("each is done once");
                let all = data.get(&cookie).copied().unwrap_or(0);
                assert!(
                    failed.contains_key(&cookie) || all == u64::from(request.len),
                    "complete"
                );
            }
        }
        assert!(steps <= 8 * (4096 + 16 + 1), "it comes to an end");
    }
}
