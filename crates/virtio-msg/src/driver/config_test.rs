// SPDX-License-Identifier: Apache-2.0 OR MIT
extern crate std;
use super::{ConfigError, ConfigReader, ConfigStep, ConfigWriter};
use crate::{ConfigData, Generation, Message};
use std::vec::Vec;

const SPACE: [u8; 60] = {
    let mut space = [0; 60];
    let mut i = 0;
    while i < 60 {
        space[i] = i.to_le_bytes()[0];
        i += 1;
    }
    space
};

fn read(
    buf: &mut [u8],
    offset: u32,
    max: usize,
    mut generation: impl FnMut() -> u32,
) -> (Result<Generation, ConfigError>, usize) {
    let mut reader = ConfigReader::new(offset, buf, max);
    let mut requests = 0;
    loop {
        match reader.step() {
            ConfigStep::Send(Message::GetConfig { offset, len }) => {
                requests += 1;
                assert!(20 + len as usize <= max);
                let data = &SPACE[offset as usize..(offset + len) as usize];
                let generation = Generation(generation());
                reader.handle_response(&Message::Config(ConfigData {
                    generation,
                    offset,
                    len,
                    data,
                }));
            }
            ConfigStep::Done(generation) => return (Ok(generation), requests),
            ConfigStep::Failed(error) => return (Err(error), requests),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_read_is_cut_to_the_message_size() {
    for (max, requests) in [(48, 3), (50, 2), (64, 2), (80, 1), (65536, 1)] {
        let mut buf = [0; 58];
        assert_eq!(
            read(&mut buf, 2, max, || 7),
            (Ok(Generation(7)), requests),
            "message size {max}"
        );
        assert_eq!(buf, SPACE[2..]);
    }
}

#[test]
fn an_empty_read_gives_the_generation() {
    assert_eq!(read(&mut [], 0, 48, || 3), (Ok(Generation(3)), 1));
}

#[test]
fn a_change_on_the_way_starts_the_read_again() {
    let mut n = 0;
    let mut buf = [0; 60];
    let result = read(&mut buf, 0, 48, || {
        n += 1;
        if n < 3 { 1 } else { 2 }
    });
    assert_eq!(result, (Ok(Generation(2)), 6));
    assert_eq!(buf, SPACE);
}

#[test]
fn a_space_that_never_holds_still_is_given_up() {
    let mut n = 0;
    let result = read(&mut [0; 60], 0, 48, || {
        n += 1;
        n
    });
    assert_eq!(result.0, Err(ConfigError::Unstable));
    assert!(result.1 < 40);
}

#[test]
fn an_answer_for_another_range_is_refused() {
    let mut buf = [0; 4];
    let mut reader = ConfigReader::new(0, &mut buf, 48);
    assert!(matches!(reader.step(), ConfigStep::Send(_)));
    reader.handle_response(&Message::Config(ConfigData {
        generation: Generation(0),
        offset: 1,
        len: 4,
        data: &[1; 4],
    }));
    assert_eq!(reader.step(), ConfigStep::Failed(ConfigError::BadAnswer));
}

#[test]
fn a_range_past_the_last_offset_is_refused() {
    assert_eq!(
        ConfigReader::new(u32::MAX, &mut [0; 2], 48).step(),
        ConfigStep::Failed(ConfigError::BadRange)
    );
}

#[test]
fn a_write_carries_the_generation_of_each_answer() {
    let data = [9; 40];
    let mut writer = ConfigWriter::new(4, &data, Generation(5), 48);
    let mut seen = Vec::new();
    let end = loop {
        match writer.step() {
            ConfigStep::Send(Message::SetConfig(d)) => {
                seen.push((d.generation.0, d.offset, d.len));
                let generation = d.generation.next();
                writer.handle_response(&Message::ConfigSet(ConfigData {
                    generation,
                    data: &[],
                    ..d
                }));
            }
            ConfigStep::Wait => panic!("nothing was sent"),
            end => break end,
        }
    };
    assert_eq!(end, ConfigStep::Done(Generation(7)));
    assert_eq!(seen, [(5, 4, 28), (6, 32, 12)]);
}

#[test]
fn a_rejected_write_tells_the_generation() {
    let mut writer = ConfigWriter::new(0, &[1], Generation(5), 48);
    assert!(matches!(writer.step(), ConfigStep::Send(_)));
    writer.handle_response(&Message::ConfigSet(ConfigData {
        generation: Generation(8),
        offset: 0,
        len: 0,
        data: &[],
    }));
    assert_eq!(
        writer.step(),
        ConfigStep::Failed(ConfigError::Rejected {
            generation: Generation(8),
            written: 0
        })
    );
}
