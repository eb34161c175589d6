// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn requests() -> Vec<Request> {
    vec![
        Request::WindowAdd(WindowAdd {
            id: 7,
            writable: true,
            base: BusAddr(0x4000_0000),
            len: 0x1000,
            file_offset: 0x2000,
            more: true,
        }),
        Request::WindowRemove { id: 9, more: true },
        Request::QueueNotify(QueueNotify {
            dev: DevNum(3),
            queue: QueueIndex(1),
            kick: false,
            call: true,
        }),
        Request::QueueResume {
            dev: DevNum(3),
            queue: QueueIndex(1),
            from: Resume::At {
                avail_idx: 0xfffe,
                used_idx: 0xfff0,
            },
        },
        Request::QueueResume {
            dev: DevNum(4),
            queue: QueueIndex(0),
            from: Resume::UsedInRing,
        },
        Request::Claim {
            dev: DevNum(5),
            release: true,
        },
        Request::DeviceName(DevNum(6)),
        Request::QueueInflight(QueueInflight {
            dev: DevNum(7),
            queue: QueueIndex(2),
            resume: true,
            offset: 0x4000,
            len: 0x4010,
        }),
        Request::BackingAdd(BackingAdd {
            id: 8,
            writable: true,
            len: 0x4000_0000,
            file_offset: 0x1000,
        }),
        Request::BackingRemove { id: 10 },
        Request::ViewAdd(ViewAdd {
            id: 11,
            writable: true,
            backing: 8,
            base: BusAddr(0xffff_f000),
            len: 0x1000,
            offset: 0x2000,
            more: true,
        }),
        Request::SharedMemory {
            dev: DevNum(7),
            id: 2,
        },
        Request::QueueVectors(QueueVectors {
            dev: DevNum(7),
            queue: QueueIndex(3),
            kick: Some(0x102),
            call: None,
        }),
        Request::ViewAdd(ViewAdd {
            id: 12,
            writable: false,
            backing: COMMON_BACKING,
            base: BusAddr(0x20_0000),
            len: 0x20_0000,
            offset: 0x40_0000,
            more: false,
        }),
    ]
}

#[test]
fn requests_survive_the_wire_and_responses_name_them() {
    for request in requests() {
        let mut bytes = [0; MAX_PAYLOAD];
        let len = request.encode(&mut bytes).unwrap();
        assert_eq!(Request::decode(request.id(), &bytes[..len]), Ok(request));
        let first = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let named = matches!(
            request.id(),
            id::CLAIM | id::DEVICE_NAME | id::SHARED_MEMORY
        );
        assert_eq!(
            request.subject(),
            if named { first & 0xffff } else { first }
        );
        assert!(Request::decode(request.id(), &bytes[..len - 1]).is_err());
        assert_eq!(
            request.encode(&mut bytes[..len - 1]),
            Err(ControlError::NoRoom)
        );
    }
}

#[test]
fn window_add_has_the_bytes_of_the_specification() {
    let mut bytes = [0; 32];
    assert_eq!(requests()[0].encode(&mut bytes), Ok(32));
    let mut expected = Vec::new();
    expected.extend(7u32.to_le_bytes());
    expected.extend(3u32.to_le_bytes());
    expected.extend(0x4000_0000u64.to_le_bytes());
    expected.extend(0x1000u64.to_le_bytes());
    expected.extend(0x2000u64.to_le_bytes());
    assert_eq!(bytes.as_slice(), expected);
}

#[test]
fn view_add_has_the_bytes_of_the_specification() {
    let mut bytes = [0; MAX_PAYLOAD];
    let view = requests()[10];
    assert_eq!(view.encode(&mut bytes), Ok(40));
    let mut expected = Vec::new();
    expected.extend(11u32.to_le_bytes());
    expected.extend(3u32.to_le_bytes());
    expected.extend(8u32.to_le_bytes());
    expected.extend(0u32.to_le_bytes());
    expected.extend(0xffff_f000u64.to_le_bytes());
    expected.extend(0x1000u64.to_le_bytes());
    expected.extend(0x2000u64.to_le_bytes());
    assert_eq!(bytes.as_slice(), expected);
}

#[test]
fn queue_vectors_has_the_bytes_of_the_specification() {
    let vectors = requests()[12];
    let mut bytes = [0; MAX_PAYLOAD];
    assert_eq!(vectors.encode(&mut bytes), Ok(8));
    assert_eq!(bytes[..8], [7, 0, 3, 0, 2, 1, 0xff, 0xff]);
    assert_eq!(vectors.subject(), 0x3_0007);
    let line = "device 7, queue 3, kick vector 258, calls by message";
    assert_eq!(vectors.to_string(), line);
    let response = vectors.response(Status::OK, "");
    assert_eq!(response.encode(&mut bytes), Ok(8));
    assert_eq!(
        Response::decode(id::QUEUE_VECTORS, &bytes[..8]),
        Ok(response)
    );
}

#[test]
fn ids_of_windows_say_whose_they_are_where_each_device_has_its_own() {
    for (device, number, id) in [(0, 1, 1), (3, 7, 0x3_0007), (0xffff, 0xffff, u32::MAX)] {
        assert_eq!(window_of_device(DevNum(device), number), id);
        assert_eq!(device_of_window(id), device);
    }
}

#[test]
fn a_view_of_the_common_memory_says_so() {
    assert_eq!(
        requests()[13].to_string(),
        "window 12, 0x200000 bytes at 0x200000, offset 0x400000 of the common memory"
    );
}

#[test]
fn a_region_is_in_the_answer_only_if_there_is_one() {
    let request = Request::SharedMemory {
        dev: DevNum(7),
        id: 2,
    };
    let mut out = [0; 64];
    let found = Response {
        memory: Some(SharedMemory {
            len: 0x10_0000,
            file_offset: 0x1000,
        }),
        ..request.response(Status::OK, "")
    };
    assert_eq!(found.encode(&mut out), Ok(24));
    assert_eq!(Response::decode(id::SHARED_MEMORY, &out[..24]), Ok(found));
    assert_eq!(found.to_string(), "0x100000 bytes at file offset 0x1000");
    assert_eq!(found.encode(&mut out[..23]), Err(ControlError::NoRoom));
    for len in [8, 23, 25] {
        let short = Response::decode(id::SHARED_MEMORY, &out[..len]);
        assert!(
            matches!(short, Err(ControlError::BadLength { .. })),
            "{len}"
        );
    }
    let missing = request.response(Status::NOT_FOUND, "");
    assert_eq!(missing.encode(&mut out), Ok(8));
    assert_eq!(Response::decode(id::SHARED_MEMORY, &out[..8]), Ok(missing));
    assert!(Response::decode(id::SHARED_MEMORY, &out[..24]).is_err());
}

#[test]
fn responses_carry_status_and_name() {
    let mut out = [0; 300];
    let claim = Request::Claim {
        dev: DevNum(5),
        release: false,
    };
    let response = claim.response(Status::HELD, "vmsg-proxy (pid 12)");
    let len = response.encode(&mut out).unwrap();
    assert_eq!(Response::decode(id::CLAIM, &out[..len]), Ok(response));
    assert_eq!(
        Response::decode(id::WINDOW_ADD, &out[..len]),
        Err(ControlError::BadLength { id: 0x80, len })
    );
    assert_eq!(
        Response::decode(0x8c, &out[..len]),
        Err(ControlError::UnknownId(0x8c))
    );
    assert_eq!(
        claim.response(Status::HELD, "é").encode(&mut out[..9]),
        Ok(8)
    );
    assert_eq!(
        claim
            .response(Status::HELD, &"x".repeat(500))
            .encode(&mut out),
        Ok(8 + MAX_NAME)
    );
}

#[test]
fn any_bytes_give_a_value_or_an_error() {
    proptest::proptest!(|(id: u8, bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64))| {
        if let Ok(request) = Request::decode(id, &bytes) {
            let mut out = [0; MAX_PAYLOAD];
            let len = request.encode(&mut out).unwrap();
            assert_eq!(Request::decode(id, &out[..len]), Ok(request));
        }
        let _ = Response::decode(id, &bytes);
    });
}

#[test]
fn messages_read_well_in_a_trace() {
    let lines = [
        (
            Request::WindowAdd(WindowAdd {
                id: 7,
                writable: true,
                base: BusAddr(0x4000_0000),
                len: 0x1000,
                file_offset: 0,
                more: true,
            }),
            "window 7, 0x1000 bytes at 0x40000000, file offset 0x0, writable, more",
        ),
        (
            Request::QueueResume {
                dev: DevNum(2),
                queue: QueueIndex(1),
                from: Resume::UsedInRing,
            },
            "device 2, queue 1, used index of the ring",
        ),
        (
            Request::Claim {
                dev: DevNum(2),
                release: true,
            },
            "device 2, release",
        ),
    ];
    for (request, line) in lines {
        assert_eq!(request.to_string(), line);
        assert!(name(request.id()).is_some());
    }
    let claim = Request::Claim {
        dev: DevNum(2),
        release: false,
    };
    // What a peer calls itself cannot do anything to a terminal.
    assert_eq!(
        claim.response(Status::HELD, "a\u{1b}[2J").to_string(),
        r#"held by another driver: "a\u{1b}[2J""#
    );
    assert_eq!(claim.response(Status::OK, "").to_string(), "done");
}
