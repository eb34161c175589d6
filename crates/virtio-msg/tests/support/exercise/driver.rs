// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stories for the driver side.

use super::{Source, any_message};
use std::collections::HashSet;
use virtio_msg::driver::{
    Bringup, BringupStep, ConfigReader, ConfigStep, ConfigWriter, Enumeration, EnumerationStep,
    Received, RequestId, Requester,
};
use virtio_msg::{
    DevNum, Duration, FeatureSet, Frame, Generation, Instant, Kind, Message, QueueIndex, Token,
    U32, VqueueConfig, decode,
};

/// The driver side against a device that answers anything, or nothing.
pub(crate) fn driver(bytes: &[u8]) {
    requests(&mut Source::new(bytes));
    sequences(&mut Source::new(bytes));
}

fn requests(s: &mut Source<'_>) {
    let mut requester = Requester::<3>::new();
    let mut outstanding: Vec<(RequestId, Token, DevNum, (bool, u8))> = Vec::new();
    let mut now = Instant(0);
    while !s.is_empty() {
        match s.u8() % 8 {
            0..=2 => {
                let mut words = [U32::new(0); 12];
                let message = any_message(s, &mut words);
                let mut out = [0; 300];
                let dev = DevNum(u16::from(s.u8() % 2));
                let timeout = Duration::from_nanos(s.u8().into());
                if let Ok((id, size)) = requester.start(now, dev, &message, timeout, &mut out) {
                    let frame = decode(&out[..size], 300).expect("own message");
                    assert!(frame.message.kind() == Kind::Request && frame.token != Token(0));
                    assert!(outstanding.iter().all(|o| o.1 != frame.token && o.0 != id));
                    outstanding.push((
                        id,
                        frame.token,
                        frame.dev_num,
                        (message.is_bus(), message.id()),
                    ));
                } else {
                    assert!(outstanding.len() == 3 || message.kind() != Kind::Request);
                }
            }
            3..=5 => {
                let mut words = [U32::new(0); 12];
                let message = any_message(s, &mut words);
                let (dev_num, mut token) = (DevNum(u16::from(s.u8() % 2)), Token(s.u8().into()));
                if let Some(o) = outstanding.get(usize::from(s.u8() % 4)) {
                    token = o.1;
                }
                let frame = Frame {
                    dev_num,
                    token,
                    message,
                };
                match requester.handle_frame(&frame) {
                    Received::Response(id, answer) => {
                        let at = outstanding
                            .iter()
                            .position(|o| o.0 == id)
                            .expect("outstanding");
                        let (_, sent, to, msg_id) = outstanding.remove(at);
                        assert_eq!(msg_id, (answer.is_bus(), answer.id()));
                        assert!(
                            sent == token
                                || matches!(answer, Message::Devices(_) | Message::Pong { .. })
                                    && token == Token(0)
                        );
                        assert!(to == dev_num || answer.is_bus());
                    }
                    Received::Event(_) => assert_eq!(message.kind(), Kind::Event),
                    Received::Request(_) => assert_eq!(message.kind(), Kind::Request),
                    Received::Dropped(_) => {
                        let name = (message.is_bus(), message.id());
                        let known = |o: &(_, Token, DevNum, _)| {
                            o.1 == token && o.3 == name && (o.2 == dev_num || name.0)
                        };
                        let response = message.kind() == Kind::Response;
                        assert!(!response || !outstanding.iter().any(known));
                    }
                }
            }
            6 => now = now.saturating_add(Duration::from_nanos(s.u8().into())),
            _ => {
                while let Some(id) = requester.handle_timeout(now) {
                    let at = outstanding
                        .iter()
                        .position(|o| o.0 == id)
                        .expect("outstanding");
                    outstanding.remove(at);
                }
                assert!(requester.poll_timeout().is_none_or(|t| t > now));
            }
        }
        assert_eq!(requester.outstanding(), outstanding.len());
    }
    while let Some(deadline) = requester.poll_timeout() {
        assert!(requester.handle_timeout(deadline).is_some());
    }
    assert_eq!(requester.outstanding(), 0);
}

/// Each sequence ends by itself once nothing is answered any more, and takes whatever comes before.
fn sequences(s: &mut Source<'_>) {
    let mut bringup = Bringup::new();
    let mut steps = 0;
    while !matches!(bringup.step(), BringupStep::Ready | BringupStep::Failed(_)) {
        steps += 1;
        assert!(steps < 10_000);
        match bringup.step() {
            BringupStep::ChooseFeatures(_) => {
                bringup.choose_features(FeatureSet::from_u64(u64::MAX))
            }
            BringupStep::Queues(None) if s.u8() & 1 != 0 => bringup.get_queue(QueueIndex(0)),
            BringupStep::Queues(Some(info)) => bringup.set_queue(VqueueConfig {
                index: info.index,
                ..Default::default()
            }),
            BringupStep::Queues(None) => bringup.finish(),
            _ if s.is_empty() => bringup.handle_timeout(),
            _ => bringup.handle_response(&any_message(s, &mut [U32::new(0); 12])),
        }
    }

    let mut enumeration = Enumeration::new(48);
    let mut steps = 0;
    let mut found = HashSet::new();
    while enumeration.step() != EnumerationStep::Done {
        steps += 1;
        assert!(steps < 10_000);
        if s.is_empty() {
            enumeration.handle_timeout();
        } else {
            let mut words = [U32::new(0); 12];
            enumeration.handle_response(&any_message(s, &mut words), |d| {
                assert!(found.insert(d), "{d} twice")
            });
        }
    }

    let mut buf = [0; 100];
    let mut reader = ConfigReader::new(s.u32(), &mut buf, 48);
    while let ConfigStep::Send(_) | ConfigStep::Wait = reader.step() {
        reader.handle_response(&any_message(s, &mut [U32::new(0); 12]));
    }
    let mut writer = ConfigWriter::new(s.u32(), &[1; 100], Generation(0), 48);
    while let ConfigStep::Send(_) | ConfigStep::Wait = writer.step() {
        writer.handle_response(&any_message(s, &mut [U32::new(0); 12]));
    }
}
