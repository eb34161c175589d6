// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads the recordings in `tests/golden`.

use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    ToDevice,
    FromDevice,
}

pub(crate) struct Line {
    pub(crate) number: usize,
    pub(crate) direction: Direction,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) struct Recording {
    pub(crate) name: String,
    pub(crate) lines: Vec<Line>,
}

/// Every file, in the order of names.
pub(crate) fn recordings() -> Vec<Recording> {
    // The tests of other crates read them, too.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../virtio-msg/tests/golden");
    let mut all = Vec::new();
    for folder in ["linux", "qemu"] {
        for entry in std::fs::read_dir(root.join(folder)).expect("the recordings") {
            let path = entry.expect("a file").path();
            let file = path
                .file_name()
                .expect("a name")
                .to_str()
                .expect("a plain name")
                .to_owned();
            let text = std::fs::read_to_string(&path).expect("a text");
            let lines = (1..)
                .zip(text.lines())
                .filter(|(_, l)| !l.starts_with('#') && !l.trim().is_empty())
                .map(|(number, l)| {
                    parse(number, l, &file).unwrap_or_else(|| panic!("{file} line {number}: {l}"))
                })
                .collect();
            all.push(Recording {
                name: format!("{folder}/{file}"),
                lines,
            });
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

#[allow(dead_code, reason = "the bus ivshmem has no recordings in two files")]
/// The same, with the two files of QEMU's devices and drivers joined: each response right after its request.
pub(crate) fn conversations() -> Vec<Recording> {
    let mut joined: Vec<Recording> = Vec::new();
    for mut recording in recordings() {
        let Some(base) = recording.name.strip_suffix(".driver.txt") else {
            if !recording.name.ends_with(".device.txt") {
                joined.push(recording);
            } else {
                // What the device sent was not recorded in time with the driver: its events are left out.
                recording.lines.retain(|l| l.bytes[0] & 1 != 0);
                recording.name = recording.name.replace(".device.txt", "");
                joined.push(recording);
            }
            continue;
        };
        let device = joined
            .iter_mut()
            .find(|r| r.name == base)
            .expect("sorted before its driver");
        let mut answers = std::mem::take(&mut device.lines).into_iter();
        for line in recording.lines {
            let answered = line.bytes[1] & 0x40 == 0;
            device.lines.push(line);
            if answered {
                device
                    .lines
                    .push(answers.next().expect("a response to each request"));
            }
        }
        assert!(
            answers.next().is_none(),
            "{base}: responses without request"
        );
    }
    joined
}

fn parse(number: usize, line: &str, file: &str) -> Option<Line> {
    let (direction, mut bytes) = match line.split_once('|') {
        // `   0 BUS_GET_DEVICES  02 02 00 00 00 00 0c 00 | 000020`, or with `>` or `<` in front.
        Some((head, payload)) => {
            let mut words = head.split_whitespace();
            let direction = match words.next()? {
                ">" => Direction::ToDevice,
                "<" => Direction::FromDevice,
                _ if file.ends_with(".driver.txt") => Direction::ToDevice,
                _ => Direction::FromDevice,
            };
            let header: String = words.skip(1).collect();
            (direction, hex(&(header + payload.trim()))?)
        }
        // `d>D 0002000001000800  # GET_DEVICE_INFO`
        None => {
            let mut words = line.split_whitespace();
            let direction = match words.next()? {
                "d>D" => Direction::ToDevice,
                "D>d" => Direction::FromDevice,
                _ => return None,
            };
            (direction, hex(words.next()?)?)
        }
    };
    let size = u16::from_le_bytes([*bytes.get(6)?, *bytes.get(7)?]);
    if bytes.len() > size.into() {
        return None;
    }
    bytes.resize(size.into(), 0);
    Some(Line {
        number,
        direction,
        bytes,
    })
}

fn hex(text: &str) -> Option<Vec<u8>> {
    if text.len() & 1 != 0 {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok())
        .collect()
}
