// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;

/// A file as the writer makes it, with two messages.
fn file() -> Vec<u8> {
    let mut bytes = Vec::new();
    block::section(&mut bytes, "test");
    block::interface(&mut bytes, "b0/peer", "a peer");
    for (i, lost) in [0, 3].into_iter().enumerate() {
        let head = Head {
            layout: Layout::Revision1,
            way: Way::ToDriver,
            fds: 1,
            side: crate::trace::Side::Driver,
            connection: 0,
        };
        block::packet(
            &mut bytes,
            &block::Packet {
                interface: 0,
                time: 1_700_000_000_123_456_789 + i as u64,
                head: head.to_bytes(),
                message: &b"message"[i..],
                outbound: true,
                lost,
            },
        );
    }
    block::statistics(&mut bytes, 0, 5, 5, 3);
    bytes
}

/// What there is, in few words, and the error.
fn read(bytes: &[u8]) -> (Vec<String>, Option<String>) {
    let mut reader = Reader::new(bytes);
    let mut items = Vec::new();
    loop {
        match reader.next_item() {
            Ok(None) => return (items, None),
            Err(error) => return (items, Some(error.to_string())),
            Ok(Some(Item::Message(m))) => {
                let text = String::from_utf8_lossy(m.message);
                items.push(format!("{} {text} {} {}", m.interface, m.time, m.lost));
            }
            Ok(Some(Item::Section { application })) => items.push(application.to_owned()),
            Ok(Some(Item::Interface { source, .. })) => items.push(source.name.clone()),
            Ok(Some(Item::Statistics { seen, lost, .. })) => items.push(format!("{lost}/{seen}")),
            Ok(Some(Item::Foreign { why, .. })) => items.push(why.to_owned()),
        }
    }
}

const ITEMS: [&str; 5] = [
    "test",
    "b0/peer",
    "0 message 1700000000123456789 0",
    "0 essage 1700000000123456790 3",
    "3/5",
];

#[test]
fn everything_before_the_end_is_read_wherever_the_file_ends() {
    let bytes = file();
    assert_eq!(read(&bytes), (ITEMS.map(str::to_owned).to_vec(), None));
    for len in 0..bytes.len() {
        let mut reader = Reader::new(&bytes[..len]);
        let mut items = 0;
        while reader.next_item().unwrap().is_some() {
            items += 1;
        }
        let (offset, unfinished) = reader.unfinished();
        assert_eq!(offset + unfinished as u64, len as u64);
        assert!(items < ITEMS.len());
    }
}

#[test]
fn sections_count_their_interfaces_anew() {
    let bytes = [file(), file()].concat();
    let (items, error) = read(&bytes);
    assert_eq!(error, None);
    assert_eq!(items[5 + 2], "1 message 1700000000123456789 0");
}

#[test]
fn faults_are_named_with_their_place() {
    let good = file();
    let fault = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        read(&bytes).1.unwrap_or_default()
    };
    assert_eq!(
        fault(0, 9),
        "at offset 0: this is no trace: no pcapng section header"
    );
    assert_eq!(
        fault(8, 9),
        "at offset 0: a section header without byte order"
    );
    assert_eq!(
        fault(12, 9),
        "at offset 0: a section of another version than 1 of pcapng"
    );
    assert_eq!(fault(4, 9), "at offset 0: a block of impossible length");
    assert_eq!(fault(7, 9), "at offset 0: a block of more than 1 MiB");
    let section = usize::from(good[4]);
    let at = |text: &str| format!("at offset {section}: {text}");
    assert_eq!(
        fault(section + 4, 60),
        at("a block with two different lengths")
    );
    let packet = section + usize::from(good[section + 4]);
    let at = |text: &str| format!("at offset {packet}: {text}");
    assert_eq!(
        fault(packet + 8, 1),
        at("an interface that was not announced")
    );
    assert_eq!(
        fault(packet + 20, 200),
        at("a packet that is longer than its block")
    );
    assert_eq!(
        read(b"hello").1.unwrap(),
        "at offset 0: this is no trace: no pcapng section header"
    );
    assert_eq!(read(b"").1, None);
    // The fault comes after all that is good.
    let mut bytes = good.clone();
    bytes.extend_from_slice(&[1; 12]);
    assert_eq!(read(&bytes).0, ITEMS);
}

#[test]
fn packets_of_others_are_told_and_left_out() {
    let good = file();
    let section = usize::from(good[4]);
    let mut bytes = good.clone();
    // Ethernet.
    bytes[section + 8] = 1;
    let (items, error) = read(&bytes);
    assert_eq!(error, None);
    assert_eq!(items[2], "a packet of another link type than USER0");
    let packet = section + usize::from(good[section + 4]);
    for (at, value, why) in [
        (0, 2, "a packet whose head is of another version"),
        (1, 7, "a packet whose head is too short"),
        (1, 200, "a packet that ends in its head"),
        (2, 9, "a message of unknown layout"),
        (3, 9, "a message of unknown direction"),
        (5, 9, "a message from an unknown end"),
    ] {
        let mut bytes = good.clone();
        bytes[packet + 28 + at] = value;
        assert_eq!(read(&bytes).0[2], why);
    }
}

/// As a machine of the other byte order would write it: microseconds, and an offset of seconds.
#[test]
fn the_other_byte_order_and_other_clocks_are_read() {
    let block = |kind: u32, body: &[u8]| {
        let len = u32::try_from(body.len() + 12).unwrap().to_be_bytes();
        [&kind.to_be_bytes()[..], &len, body, &len].concat()
    };
    let section = [&BYTE_ORDER.to_be_bytes()[..], &[0, 1, 0, 0], &[0xff; 8]].concat();
    let interface = [
        0, 147, 0, 0, 0, 0, 0, 0, 0, 14, 0, 8, 0, 0, 0, 0, 0, 0, 0, 2,
    ];
    let packet = |time: u32| {
        let mut body = [0u32, 0, time, 10, 10].map(u32::to_be_bytes).concat();
        body.extend_from_slice(&[1, 8, 1, 0, 0, 0, 0, 0, b'h', b'i', 0, 0]);
        body
    };
    let bytes = [
        block(block::SECTION, &section),
        block(block::INTERFACE, &interface),
        block(block::PACKET, &packet(5)),
        // A block of a kind that is not known.
        block(77, &[1; 8]),
        block(block::PACKET, &packet(6)),
    ]
    .concat();
    let (items, error) = read(&bytes);
    assert_eq!(error, None);
    assert_eq!(items[2..], ["0 hi 2000005000 0", "0 hi 2000006000 0"]);
}

#[test]
fn any_resolution_gives_some_time() {
    for n in 0..=127 {
        for ticks in [0, 1, 1 << 40, u64::MAX] {
            Resolution::Ten(n).nanoseconds(ticks);
            Resolution::Two(n).nanoseconds(ticks);
        }
    }
    assert_eq!(Resolution::Two(10).nanoseconds(1024), 1_000_000_000);
    assert_eq!(Resolution::Ten(12).nanoseconds(5_000), 5);
    assert_eq!(Resolution::Ten(3).nanoseconds(5), 5_000_000);
}

#[test]
fn what_grows_is_read_on_and_what_was_written_over_is_read_again() {
    let good = file();
    let section = usize::from(good[4]);
    let file = tempfile::tempfile().unwrap();
    let write = |file: &std::fs::File, at: usize, bytes: &[u8]| {
        file.write_all_at(bytes, at as u64).unwrap();
    };
    // A section, and a block that will not be finished.
    write(&file, 0, &good[..section]);
    write(&file, section, &[6, 0, 0, 0, 200, 0, 0, 0, 1, 1, 1, 1, 1]);
    let mut reader = Reader::new(file.try_clone().unwrap());
    assert!(matches!(
        reader.next_item().unwrap(),
        Some(Item::Section { .. })
    ));
    assert_eq!(reader.next_item().unwrap(), None);
    assert_eq!(reader.unfinished(), (section as u64, 13));
    file.set_len(section as u64).unwrap();
    write(&file, section, &good[section..]);
    reader.reread().unwrap();
    assert!(matches!(
        reader.next_item().unwrap(),
        Some(Item::Interface { .. })
    ));
    assert!(matches!(
        reader.next_item().unwrap(),
        Some(Item::Message(_))
    ));
}

proptest! {
    #[test]
    fn no_bytes_do_harm(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12), cut in any::<prop::sample::Index>()) {
        let mut bytes = file();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        let (items, _) = read(&bytes);
        prop_assert!(items.len() <= bytes.len() / FRAME);
    }
}

#[test]
fn a_hundred_thousand_connections_are_read_past() {
    let mut bytes = Vec::new();
    block::section(&mut bytes, "test");
    for interface in 0..100_000 {
        block::interface(&mut bytes, "b0/peer", "a peer");
        block::statistics(&mut bytes, interface, 0, 0, 0);
    }
    let (items, error) = read(&bytes);
    assert_eq!((items.len(), error), (200_001, None));
}
