// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn an_answer_has_the_id_and_the_command_of_the_question() {
    let mut question = Vec::new();
    begin_command(&mut question, 0x1234, id::REGION_READ);
    finish(&mut question);
    let question = Header::parse(question.first_chunk().expect("16 bytes")).expect("a header");
    assert!(!question.is_reply() && question.wants_reply());

    let mut answer = Vec::new();
    begin_reply(&mut answer, &question);
    answer.extend_from_slice(&[1, 2, 3]);
    finish(&mut answer);
    let header = Header::parse(answer.first_chunk().expect("16 bytes")).expect("a header");
    assert_eq!((header.id, header.command, header.len()), (0x1234, 9, 19));
    assert!(header.is_reply());
    assert_eq!(header.error(), None);

    error_reply(&mut answer, &question, 22);
    let header = Header::parse(answer.first_chunk().expect("16 bytes")).expect("a header");
    assert_eq!(
        (header.id, header.len(), header.error()),
        (0x1234, 16, Some(22))
    );
}

#[test]
fn every_command_that_is_cut_short_is_refused() {
    let payload = [0xff; 64];
    let lengths = [
        (id::VERSION, 4),
        (id::DMA_MAP, 32),
        (id::DMA_UNMAP, 24),
        (id::DEVICE_GET_INFO, 4),
        (id::DEVICE_GET_REGION_INFO, 12),
        (id::DEVICE_GET_IRQ_INFO, 12),
        (id::DEVICE_SET_IRQS, 20),
        (id::REGION_READ, 16),
        (id::REGION_WRITE, 16),
        (id::REGION_WRITE_MULTI, 8),
    ];
    for (command, least) in lengths {
        for len in 0..least {
            let parsed = Command::parse(command, &payload[..len]);
            assert!(
                matches!(parsed, Err(Malformed::Short(_))),
                "{command} {len}: {parsed:?}"
            );
        }
        let parsed = Command::parse(command, &payload[..least]);
        assert!(
            !matches!(parsed, Err(Malformed::Short(_))),
            "{command}: {parsed:?}"
        );
    }
}

#[test]
fn several_writes_are_taken_apart() {
    let mut payload = 2u64.to_ne_bytes().to_vec();
    for (offset, count) in [(8u64, 8u32), (16, 2)] {
        let access = Access {
            offset,
            region: 4,
            count,
        };
        access.put(&mut payload);
        payload.extend_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    }
    let Ok(Command::RegionWriteMulti(writes)) = Command::parse(id::REGION_WRITE_MULTI, &payload)
    else {
        panic!("not several writes");
    };
    let data: Vec<_> = writes
        .writes()
        .map(|(access, data)| (access.offset, data))
        .collect();
    assert_eq!(data, [(8, &[1, 2, 3, 4, 5, 6, 7, 8][..]), (16, &[1, 2])]);
    payload[0] = 3;
    assert_eq!(
        Command::parse(id::REGION_WRITE_MULTI, &payload),
        Err(Malformed::Count)
    );
    // A count that overflows when it is multiplied.
    payload[..8].copy_from_slice(&(u64::MAX / 24 + 1).to_ne_bytes());
    assert_eq!(
        Command::parse(id::REGION_WRITE_MULTI, &payload),
        Err(Malformed::Count)
    );
}
