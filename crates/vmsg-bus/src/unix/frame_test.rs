// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 2,
        message_size: 264,
        observer: true,
        name: "vmsg-proxy".into(),
    }
}

fn welcome() -> Welcome {
    Welcome {
        message_size: 264,
        slot_size: 320,
        slots: 8,
        capabilities: 0x1f,
        epoch: 0x0123_4567_89ab_cdef,
        max_windows: 32,
        to_device: 0,
        to_driver: 4096,
        queue_len: 128 + 8 * 320,
        file_len: 8192,
        name: "host".into(),
    }
}

#[test]
fn frames_survive_the_wire() {
    assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
    assert_eq!(
        Answer::decode(&welcome().encode()),
        Ok(Answer::Welcome(welcome()))
    );
    let refuse = Refuse::new(RefuseReason::TooMany, "64 already");
    assert_eq!(Answer::decode(&refuse.encode()), Ok(Answer::Refuse(refuse)));
}

#[test]
fn hello_has_the_bytes_of_the_specification() {
    let mut expected =
        b"VMSG\x01\x00\x22\x00\x01\x00\x02\x00\x08\x01\x00\x00\x01\x00\x00\x00\x0a\x00\x00\x00"
            .to_vec();
    expected.extend(b"vmsg-proxy");
    assert_eq!(hello().encode(), expected);
}

#[test]
fn welcome_has_its_name_at_offset_76() {
    let frame = welcome().encode();
    assert_eq!(&frame[76..], b"host");
    assert_eq!(frame[32..40], 0x0123_4567_89ab_cdefu64.to_le_bytes());
    assert_eq!(frame[64..72], 8192u64.to_le_bytes());
}

#[test]
fn longer_frames_of_the_future_are_understood() {
    let mut frame = hello().encode();
    frame.extend([1, 2, 3]);
    frame[6] += 3;
    assert_eq!(Hello::decode(&frame), Ok(hello()));
    frame.push(0);
    assert!(
        Hello::decode(&frame).is_err(),
        "the length must be that of the packet"
    );
}

#[test]
fn a_welcome_that_leads_outside_its_file_is_refused() {
    let broken: [fn(&mut Welcome); 9] = [
        |w| w.to_driver = 64,
        |w| w.to_driver = 8192,
        |w| w.to_device = 4097,
        |w| w.file_len = 1 << 40,
        |w| w.slots = 1,
        |w| w.slots = u32::MAX,
        |w| w.slot_size = 256,
        |w| w.slot_size = 330,
        |w| w.message_size = 47,
    ];
    for (i, breaks) in broken.iter().enumerate() {
        let mut w = welcome();
        breaks(&mut w);
        assert!(Answer::decode(&w.encode()).is_err(), "case {i}");
    }
}

#[test]
fn names_are_made_printable() {
    let mut h = hello();
    h.name = "a\x1b[2J\nb".into();
    assert_eq!(Hello::decode(&h.encode()).unwrap().name, "a?[2J?b");
    h.name = "é".repeat(60);
    assert_eq!(Hello::decode(&h.encode()).unwrap().name, "é".repeat(32));
}

#[test]
fn any_bytes_give_a_frame_or_an_error() {
    proptest::proptest!(|(kind in 0u16..5, body in proptest::collection::vec(proptest::num::u8::ANY, 0..200))| {
        let frame = close(kind, &body, "");
        let _ = Hello::decode(&frame);
        let _ = Answer::decode(&frame);
        let _ = Hello::decode(&body);
        let _ = Answer::decode(&body);
    });
}
