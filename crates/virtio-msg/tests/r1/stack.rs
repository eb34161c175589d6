// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two adapters with what belongs above them.

use crate::recorded::Bytes;
use virtio_msg::device::{
    Action, ActionResult, DeviceMachine, Handled, Identity, Options, QueueSlot,
};
use virtio_msg::driver::{Bringup, BringupStep, Received, Requester};
use virtio_msg::r1::{
    self, DeviceAdapter, DriverAdapter, DriverOptions, MESSAGE_SIZE, Outcome, SIZE,
};
use virtio_msg::{
    DevNum, Duration, FeatureSet, Frame, Instant, Message, QueueIndex, VqueueConfig, decode,
};

pub(crate) type Machine = DeviceMachine<Vec<QueueSlot>, Vec<u8>>;

pub(crate) fn bytes(message: r1::Message) -> Bytes {
    r1::Frame::new(DevNum(0), message).to_bytes()
}

/// A device machine below a device adapter: what an r1 driver sees.
pub(crate) struct Device {
    pub(crate) adapter: DeviceAdapter,
    pub(crate) machine: Machine,
    /// What the machine had to do, kicks left out.
    pub(crate) actions: Vec<Action>,
    pub(crate) kicks: Vec<QueueIndex>,
}

impl Device {
    pub(crate) fn net(offered: u64, queue_size: u16, config: &[u8]) -> Device {
        let identity = Identity {
            device_id: 1,
            vendor_id: 0x4d53_4756,
            ..Identity::default()
        };
        Device {
            adapter: DeviceAdapter::new(),
            machine: DeviceMachine::new(
                DevNum(0),
                identity,
                FeatureSet::from_u64(offered),
                vec![QueueSlot::new(queue_size); 3],
                config.to_vec(),
                Options::new(MESSAGE_SIZE),
            ),
            actions: Vec::new(),
            kicks: Vec::new(),
        }
    }

    /// Everything the device says after this message of the driver.
    pub(crate) fn takes(&mut self, wire: &[u8]) -> Vec<Bytes> {
        assert_eq!(self.adapter.handle_wire(wire), Ok(Outcome::Taken));
        self.works()
    }

    /// Everything the device says now.
    pub(crate) fn works(&mut self) -> Vec<Bytes> {
        let mut said = Vec::new();
        loop {
            let mut message = [0; MESSAGE_SIZE];
            if let Some(size) = self.adapter.poll_message(&mut message) {
                let frame = decode(&message[..size], MESSAGE_SIZE).expect("a message");
                let handled = self.machine.handle_message(Instant(1), &frame);
                assert!(
                    matches!(handled, Ok(Handled::Request | Handled::Event)),
                    "{frame}: {handled:?}"
                );
                while let Some(action) = self.machine.poll_action() {
                    match action {
                        Action::Avail { queue, .. } => self.kicks.push(queue),
                        other => {
                            self.actions.push(other);
                            self.machine.complete(ActionResult::Done);
                        }
                    }
                }
                continue;
            }
            if let Some(size) = self.machine.poll_transmit(&mut message) {
                assert_eq!(
                    self.adapter.handle_message(&message[..size]),
                    Ok(Outcome::Taken)
                );
                continue;
            }
            let mut wire = [0; SIZE];
            match self.adapter.poll_wire(&mut wire) {
                Some(size) => said.push(wire[..size].try_into().expect("40 bytes")),
                None => return said,
            }
        }
    }
}

/// A driver above a driver adapter, and the peer that answers it.
pub(crate) struct Driver<P> {
    pub(crate) adapter: DriverAdapter,
    pub(crate) requester: Requester<4>,
    pub(crate) peer: P,
    /// Everything that went to the device.
    pub(crate) wire: Vec<r1::Message>,
    /// Events for the driver, as lines.
    pub(crate) events: Vec<String>,
}

impl<P: FnMut(&Bytes) -> Vec<Bytes>> Driver<P> {
    pub(crate) fn new(peer: P) -> Driver<P> {
        Driver {
            adapter: DriverAdapter::new(DriverOptions::default()),
            requester: Requester::new(),
            peer,
            wire: Vec::new(),
            events: Vec::new(),
        }
    }

    /// The adapter and the peer, until both have nothing to say.
    pub(crate) fn settle(&mut self) {
        let mut wire = [0; SIZE];
        while let Some(size) = self.adapter.poll_wire(&mut wire) {
            assert_eq!(size, SIZE);
            self.wire
                .push(r1::decode(&wire).expect("an r1 message").message);
            for said in (self.peer)(&wire) {
                self.adapter.handle_wire(&said).expect("room");
            }
        }
    }

    /// One request, and the message that answers it, as its bytes.
    pub(crate) fn ask(&mut self, message: &Message<'_>) -> Option<Vec<u8>> {
        let mut out = [0; MESSAGE_SIZE];
        let (id, size) = self
            .requester
            .start(
                Instant(0),
                DevNum(0),
                message,
                Duration::from_secs(1),
                &mut out,
            )
            .expect("a request");
        assert_eq!(
            self.adapter.handle_request(&out[..size]),
            Ok(Outcome::Taken),
            "{message}"
        );
        self.settle();
        let mut answer = None;
        for bytes in self.messages() {
            let frame = decode(&bytes, MESSAGE_SIZE).expect("a message");
            match self.requester.handle_frame(&frame) {
                Received::Response(of, _) => {
                    assert_eq!(of, id);
                    answer = Some(bytes);
                }
                Received::Event(frame) => self.events.push(frame.to_string()),
                other => panic!("{other:?}"),
            }
        }
        if answer.is_none() {
            assert!(self.requester.cancel(id));
        }
        answer
    }

    /// The same, as a line of a trace.
    pub(crate) fn line(&mut self, message: &Message<'_>) -> String {
        let answer = self
            .ask(message)
            .unwrap_or_else(|| panic!("no answer to {message}"));
        let frame = decode(&answer, MESSAGE_SIZE).expect("a message");
        frame.message.to_string()
    }

    pub(crate) fn messages(&mut self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut out = [0; MESSAGE_SIZE];
        while let Some(size) = self.adapter.poll_message(&mut out) {
            all.push(out[..size].to_vec());
        }
        all
    }

    pub(crate) fn event(&mut self, message: Message<'_>) {
        let mut out = [0; MESSAGE_SIZE];
        let frame = Frame::new(DevNum(0), virtio_msg::Token(0), message);
        let size = frame.encode(&mut out).expect("fits");
        assert_eq!(
            self.adapter.handle_request(&out[..size]),
            Ok(Outcome::Taken)
        );
        self.settle();
    }

    /// From nothing to DRIVER_OK with these features and queues.
    pub(crate) fn bring_up(&mut self, features: u64, queues: &[VqueueConfig]) -> Bringup {
        let mut bringup = Bringup::new();
        let mut left = queues.iter();
        loop {
            let message = match bringup.step() {
                BringupStep::Send(message) => message,
                BringupStep::ChooseFeatures(_) => {
                    bringup.choose_features(FeatureSet::from_u64(features));
                    continue;
                }
                BringupStep::Queues(None) => {
                    match left.next() {
                        Some(queue) => bringup.set_queue(*queue),
                        None => bringup.finish(),
                    }
                    continue;
                }
                BringupStep::Ready => return bringup,
                other => panic!("{other:?}"),
            };
            let mut out = [0; MESSAGE_SIZE];
            let (_, size) = self
                .requester
                .start(
                    Instant(0),
                    DevNum(0),
                    &message,
                    Duration::from_secs(1),
                    &mut out,
                )
                .expect("a request");
            assert_eq!(
                self.adapter.handle_request(&out[..size]),
                Ok(Outcome::Taken)
            );
            self.settle();
            for bytes in self.messages() {
                let frame = decode(&bytes, MESSAGE_SIZE).expect("a message");
                match self.requester.handle_frame(&frame) {
                    Received::Response(_, message) => bringup.handle_response(&message),
                    Received::Event(frame) => self.events.push(frame.to_string()),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}
