// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn header(request: u32, flags: u32, size: u32) -> Result<Header, WireError> {
    let header = Header {
        request,
        flags,
        size,
    };
    Header::parse(header.as_bytes().try_into().unwrap())
}

#[test]
fn headers_of_replies_other_versions_and_endless_messages_are_refused() {
    assert!(header(1, 1, 0).is_ok());
    assert!(header(1, 9, 8).unwrap().wants_ack());
    assert_eq!(header(1, 2, 0).unwrap_err(), WireError::NotARequest(2));
    assert_eq!(header(1, 5, 0).unwrap_err(), WireError::NotARequest(5));
    assert!(matches!(
        header(5, 1, u32::MAX),
        Err(WireError::TooLong { .. })
    ));
    assert!(matches!(header(5, 1, 4109), Err(WireError::TooLong { .. })));
}

#[test]
fn every_length_and_descriptor_count_of_every_request_gives_a_value_or_an_error() {
    for request in 0..64 {
        for len in 0..200 {
            for fds in 0..4 {
                for fill in [0, 0xff, 1] {
                    let payload = vec![fill; len];
                    let _ = Request::parse(request, &payload, fds);
                }
            }
        }
    }
}

#[test]
fn a_memory_table_needs_exactly_its_regions_and_none_that_wraps() {
    let mut payload = vec![0; 8 + 64];
    payload[0] = 2;
    for at in [8, 40] {
        payload[at + 8..at + 16].copy_from_slice(&0x1000u64.to_ne_bytes());
    }
    let good = Request::parse(id::SET_MEM_TABLE, &payload, 2);
    assert!(
        matches!(&good, Ok(Request::SetMemTable(regions)) if regions.len() == 2),
        "{good:?}"
    );
    assert!(Request::parse(id::SET_MEM_TABLE, &payload[..71], 2).is_err());
    payload[8..16].copy_from_slice(&u64::MAX.to_ne_bytes());
    assert_eq!(
        Request::parse(id::SET_MEM_TABLE, &payload, 2),
        Err(WireError::BadField(id::SET_MEM_TABLE))
    );
    payload[0] = 33;
    assert_eq!(
        Request::parse(id::SET_MEM_TABLE, &payload, 2),
        Err(WireError::BadField(id::SET_MEM_TABLE))
    );
}

#[test]
fn a_ring_descriptor_is_there_exactly_if_the_message_says_so() {
    let with = 3u64.to_ne_bytes();
    let without = 0x103u64.to_ne_bytes();
    assert_eq!(
        Request::parse(id::SET_VRING_CALL, &with, 1),
        Ok(Request::SetVringCall { index: 3 })
    );
    assert_eq!(
        Request::parse(id::SET_VRING_KICK, &without, 0),
        Ok(Request::SetVringKick { index: 3 })
    );
    assert!(Request::parse(id::SET_VRING_CALL, &with, 0).is_err());
    assert!(Request::parse(id::SET_VRING_CALL, &without, 1).is_err());
}
