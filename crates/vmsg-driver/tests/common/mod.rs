// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A channel whose other side is a script, on a clock that only moves when somebody waits.

#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared by tests that each use a part"
)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use virtio_msg::{Channel, ChannelError, DevNum, Frame, Instant, Message, Token, decode};
use vmsg_driver::{Client, Interest, Wait};

/// Time and messages on their way to the driver: when they arrive, and what they are.
#[derive(Default)]
pub struct World {
    pub now: u64,
    pub incoming: VecDeque<(u64, Vec<u8>)>,
    /// Everything the driver sent.
    pub sent: Vec<Vec<u8>>,
    /// Messages that the channel takes before it is full; `None`: any number.
    pub room: Option<usize>,
    pub closed: bool,
}

impl World {
    /// Lets a message arrive after `delay`. Messages keep their order.
    pub fn deliver(&mut self, delay: Duration, bytes: Vec<u8>) {
        let at = self.now + u64::try_from(delay.as_nanos()).unwrap();
        let at = self.incoming.back().map_or(at, |(last, _)| at.max(*last));
        self.incoming.push_back((at, bytes));
    }

    /// Lets a frame arrive at once.
    pub fn reply(&mut self, frame: &Frame<'_>) {
        self.deliver(Duration::ZERO, bytes(frame));
    }
}

/// A frame as bytes.
pub fn bytes(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = vec![0; 65535];
    let size = frame.encode(&mut out).unwrap();
    out.truncate(size);
    out
}

/// An event as bytes.
pub fn event(device: u16, message: Message<'_>) -> Vec<u8> {
    bytes(&Frame::new(DevNum(device), Token(0), message))
}

type Script = Box<dyn FnMut(&mut World, &Frame<'_>)>;

/// The driver's end; `script` is called with each message the driver sends.
pub struct Scripted {
    max: usize,
    world: Rc<RefCell<World>>,
    script: Script,
}

impl Channel for Scripted {
    fn max_message_size(&self) -> usize {
        self.max
    }

    fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError> {
        assert!(
            message.len() <= self.max,
            "a message of {} bytes",
            message.len()
        );
        let mut world = self.world.borrow_mut();
        if world.closed {
            return Err(ChannelError::Closed);
        }
        if world.room == Some(0) {
            return Err(ChannelError::Full);
        }
        world.room = world.room.map(|room| room - 1);
        world.sent.push(message.to_vec());
        let frame = decode(message, self.max).expect("the driver sends proper messages");
        (self.script)(&mut world, &frame);
        Ok(())
    }

    fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ChannelError> {
        assert!(buf.len() >= self.max);
        let mut world = self.world.borrow_mut();
        match world.incoming.front() {
            Some((at, _)) if *at <= world.now => {
                let (_, message) = world.incoming.pop_front().unwrap();
                // As the slots of a queue: something is behind the message.
                buf.fill(0xa5);
                let size = message.len().min(buf.len());
                buf[..size].copy_from_slice(&message[..size]);
                Ok(Some(self.max))
            }
            None if world.closed => Err(ChannelError::Closed),
            _ => Ok(None),
        }
    }

    fn flush(&mut self) -> Result<(), ChannelError> {
        Ok(())
    }
}

/// Waits by moving the clock to the next arrival, or by a millisecond.
pub struct Clockwork(Rc<RefCell<World>>);

impl Wait<Scripted> for Clockwork {
    fn now(&mut self) -> Instant {
        Instant(self.0.borrow().now)
    }

    fn wait(&mut self, _channel: &mut Scripted, interest: Interest, deadline: Instant) {
        let mut world = self.0.borrow_mut();
        let next = match interest {
            Interest::Message => world.incoming.front().map_or(deadline.0, |(at, _)| *at),
            Interest::Room => {
                world.room = Some(1);
                world.now + 1_000_000
            }
        };
        world.now = next.min(deadline.0).max(world.now);
    }
}

pub type ScriptedClient = Client<Scripted, Clockwork, Vec<u8>>;

/// A client whose peer does what `script` says, on a bus of `max` bytes.
pub fn client(
    max: usize,
    script: impl FnMut(&mut World, &Frame<'_>) + 'static,
) -> (ScriptedClient, Rc<RefCell<World>>) {
    let world = Rc::new(RefCell::new(World::default()));
    let channel = Scripted {
        max,
        world: Rc::clone(&world),
        script: Box::new(script),
    };
    let client = Client::new(channel, Clockwork(Rc::clone(&world)), vec![0; 2 * max]).unwrap();
    (client, world)
}
