// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that reads and writes configuration, of devices that change theirs, refuse, or answer wrong.

mod common;

use common::client;
use virtio_msg::{ConfigData, DevNum, Generation, Message};
use vmsg_driver::Error;

const DEVICE: DevNum = DevNum(3);

/// A device with 100 bytes of configuration whose generation changes every `period`th read, or never if that is 0.
fn with_config(
    max: usize,
    period: u32,
) -> (
    common::ScriptedClient,
    std::rc::Rc<std::cell::RefCell<common::World>>,
) {
    let mut config: Vec<u8> = (0..100).collect();
    let mut reads: u32 = 0;
    client(max, move |world, request| match request.message {
        Message::GetConfig { offset, len } => {
            reads += 1;
            let generation = Generation(reads.checked_div(period).unwrap_or(0));
            let data = &config[offset as usize..][..len as usize];
            world.reply(&request.response(Message::Config(ConfigData {
                generation,
                offset,
                len,
                data,
            })));
        }
        Message::SetConfig(part) => {
            // Refused the first time each, as stale.
            let stale = part.generation.0 < 1000;
            if !stale {
                config[part.offset as usize..][..part.data.len()].copy_from_slice(part.data);
            }
            let generation = Generation(1000);
            let (len, data) = if stale {
                (0, &[][..])
            } else {
                (part.len, part.data)
            };
            world.reply(&request.response(Message::ConfigSet(ConfigData {
                generation,
                len,
                data,
                ..part
            })));
        }
        _ => panic!("{request}"),
    })
}

#[test]
fn configuration_is_read_and_written_in_pieces_of_the_message_size() {
    let (mut client, world) = with_config(48, 0);
    let mut read = [0; 90];
    client.read_config(DEVICE, 10, &mut read).unwrap();
    assert_eq!(read.to_vec(), (10..100).collect::<Vec<u8>>());
    assert_eq!(world.borrow().sent.len(), 90usize.div_ceil(28));
    client.write_config(DEVICE, 20, &[0xee; 60]).unwrap();
    client.read_config(DEVICE, 10, &mut read).unwrap();
    assert_eq!(read[9..11], [19, 0xee]);
    assert_eq!(read[69..71], [0xee, 80]);
}

#[test]
fn reading_no_configuration_gives_the_generation() {
    let (mut client, world) = with_config(48, 1);
    assert_eq!(
        client.read_config(DEVICE, 0, &mut []).unwrap(),
        Generation(1)
    );
    assert_eq!(world.borrow().sent.len(), 1);
}

#[test]
fn configuration_that_changes_in_between_is_read_again() {
    // Four messages for 90 bytes, and the generation moves with each third.
    let (mut client, world) = with_config(48, 3);
    let mut read = [0; 90];
    assert!(matches!(
        client.read_config(DEVICE, 10, &mut read),
        Err(Error::ConfigUnstable)
    ));
    let (mut client, again) = with_config(48, 6);
    for _ in 0..3 {
        client.config_generation(DEVICE).unwrap();
    }
    assert_eq!(
        client.read_config(DEVICE, 10, &mut read).unwrap(),
        Generation(1)
    );
    // The generation moved in the first round only.
    assert_eq!(again.borrow().sent.len(), 3 + 3 + 4);
    assert!(world.borrow().sent.len() <= 17 * 4);
}

#[test]
fn a_write_that_stays_refused_ends() {
    let (mut client, world) = client(48, |world, request| match request.message {
        Message::GetConfig { offset, .. } => {
            let part = ConfigData {
                generation: Generation(5),
                offset,
                len: 0,
                data: &[],
            };
            world.reply(&request.response(Message::Config(part)));
        }
        Message::SetConfig(part) => {
            let part = ConfigData {
                generation: part.generation.next(),
                len: 0,
                data: &[],
                ..part
            };
            world.reply(&request.response(Message::ConfigSet(part)));
        }
        _ => panic!("{request}"),
    });
    assert!(matches!(
        client.write_config(DEVICE, 0, &[1, 2, 3]),
        Err(Error::ConfigRefused)
    ));
    assert!(world.borrow().sent.len() < 32);
    assert!(matches!(
        client.read_config(DEVICE, u32::MAX, &mut [0; 2]),
        Err(Error::ConfigRange { .. })
    ));
}

#[test]
fn configuration_of_another_place_or_length_is_refused() {
    for (shift, longer) in [(1, 0), (0, 1)] {
        let (mut client, _) = client(48, move |world, request| {
            if let Message::GetConfig { offset, len } = request.message {
                let data = vec![0; len as usize + longer];
                let part = ConfigData {
                    generation: Generation(0),
                    offset: offset + shift,
                    len: u32::try_from(data.len()).unwrap(),
                    data: &data,
                };
                world.reply(&request.response(Message::Config(part)));
            }
        });
        assert!(matches!(
            client.read_config(DEVICE, 0, &mut [0; 4]),
            Err(Error::BadAnswer { .. })
        ));
    }
}
