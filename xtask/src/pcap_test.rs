// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;

/// A capture of these frames.
fn capture(frames: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65536, 1] {
        bytes.extend(word.to_le_bytes());
    }
    for frame in frames {
        let length = u32::try_from(frame.len()).expect("a short frame");
        for word in [0, 0, length, length] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(*frame);
    }
    bytes
}

fn ethernet(tag: Option<u16>, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 7]);
    if let Some(vlan) = tag {
        frame.extend([0x81, 0x00]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

#[test]
fn arp_echo_and_tags_are_told_apart() {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend([2, 0, 0, 0, 0, 7, 192, 168, 1, 1]);
    arp.extend([0, 0, 0, 0, 0, 0, 192, 168, 1, 2]);
    let mut echo = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0];
    echo.extend([192, 168, 1, 1, 192, 168, 1, 2]);
    echo.extend([0, 0, 0, 0, 0, 0, 0, 0]);
    let frames = [
        ethernet(None, 0x0806, &arp),
        ethernet(Some(10), 0x0800, &echo),
    ];
    let found = parse(&capture(&[&frames[0], &frames[1]])).expect("a whole capture");
    let [from, to] = [1, 2].map(|n| Ipv4Addr::new(192, 168, 1, n));
    assert_eq!(found.len(), 2);
    assert_eq!(
        found[0].source,
        Mac::parse("02:00:00:00:00:07").expect("an address")
    );
    assert_eq!(
        (found[0].vlan, found[0].carries),
        (
            None,
            Carries::Arp {
                asks: true,
                from,
                to
            }
        )
    );
    assert_eq!(
        (found[1].vlan, found[1].carries),
        (
            Some(10),
            Carries::Echo {
                asks: false,
                from,
                to
            }
        )
    );
}

#[test]
fn what_is_cut_off_is_no_capture() {
    let whole = capture(&[&ethernet(None, 0x88cc, &[0; 46])]);
    assert_eq!(
        parse(&whole).expect("a whole capture")[0].carries,
        Carries::Other
    );
    assert!(parse(&whole[..whole.len() - 1]).is_err());
    assert!(parse(&whole[..30]).is_err());
    assert!(parse(b"something else").is_err());
}

#[test]
fn addresses_have_six_bytes() {
    assert_eq!(
        Mac::parse("52:54:00:76:6d:01\n"),
        Some(Mac([0x52, 0x54, 0, 0x76, 0x6d, 1]))
    );
    assert_eq!(Mac::parse("52:54:00:76:6d"), None);
    assert_eq!(Mac::parse("52:54:00:76:6d:01:02"), None);
}
