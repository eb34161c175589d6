// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn the_loopback_interface_is_found_and_is_no_tap() {
    let link = by_name("lo").unwrap().expect("always there");
    assert_eq!((link.index, link.tap), (1, None));
    assert_eq!(by_index(1).unwrap(), Some(link));
    assert_eq!(by_name("no-such-link").unwrap(), None);
}

#[test]
fn malformed_messages_are_no_links() {
    let good = Request::new(kind::NEW_LINK, 0)
        .link(7, UP, 0)
        .attribute(attribute::LINK_MTU, &1400u32.to_ne_bytes())
        .attribute(attribute::LINK_ADDRESS, &[2, 0, 0, 0, 0, 1])
        .finish();
    let (kind, payload) = messages(&good).next().expect("one message");
    let link = Link::parse(payload).expect("a link");
    assert_eq!(
        (kind, link.index, link.up, link.mtu),
        (kind::NEW_LINK, 7, true, 1400)
    );
    assert_eq!(link.address, Some([2, 0, 0, 0, 0, 1]));
    for len in 0..good.len() {
        // Cut off: the length does not fit any more.
        assert_eq!(messages(&good[..len]).count(), 0, "{len} bytes");
        let _ = Link::parse(&good[..len]);
    }
    for at in 0..good.len() {
        for value in [0, 1, 3, 255] {
            let mut bad = good.clone();
            bad[at] = value;
            for (_, payload) in messages(&bad) {
                let _ = Link::parse(payload);
            }
        }
    }
}
