// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What tests of the host have in common: drivers' messages, and a worker that works when it is told to.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use virtio_msg::{
    DevNum, DeviceStatus, Frame, Instant, Message, QueueIndex, QueueSize, Token, VqueueConfig,
    decode,
};
use vmsg_bus::control::{Request, Response, WindowAdd};
use vmsg_mem::{BusAddr, Mapping};

use super::connection::{ConnId, Peer};
use super::core::{Core, Order};
use crate::stand::{BASE, NoFds};
use crate::worker::{self, Command, Reply};

/// Bytes of the longest message.
pub(super) const MESSAGE: usize = 320;
pub(super) const NOW: Instant = Instant(0);

/// A driver says something.
pub(super) fn say(core: &mut Core, conn: ConnId, frame: &Frame<'_>, fds: Vec<OwnedFd>) {
    let mut bytes = [0; MESSAGE];
    let len = frame.encode(&mut bytes).expect("short");
    core.handle_message(NOW, conn, &bytes[..len], fds);
}

/// A driver asks something of the bus.
pub(super) fn ask(core: &mut Core, conn: ConnId, request: Request, fds: Vec<OwnedFd>) {
    let mut payload = [0; 64];
    let len = request.encode(&mut payload).expect("short");
    let message = Message::BusSpecific {
        id: request.id(),
        response: false,
        payload: &payload[..len],
    };
    say(core, conn, &Frame::bus(Token(9), message), fds);
}

/// The next message for a driver.
pub(super) fn take(core: &mut Core, conn: ConnId) -> Option<Vec<u8>> {
    let message = core.poll_transmit(conn)?.to_vec();
    core.sent(conn);
    Some(message)
}

/// The answer to a request to the bus.
pub(super) fn response(bytes: &[u8]) -> Response<'_> {
    match decode(bytes, MESSAGE).expect("a message").message {
        Message::BusSpecific { id, payload, .. } => {
            Response::decode(id, payload).expect("a response")
        }
        other => panic!("{other:?}"),
    }
}

/// A worker agrees to all that it is told, and nothing comes of it.
pub(super) fn agree(core: &mut Core, mut each: impl FnMut(Command)) {
    while let Some(Order {
        ticket, command, ..
    }) = core.poll_order()
    {
        each(command);
        let result = Ok(());
        core.handle_reply(NOW, 0, Reply::Done { ticket, result });
    }
}

/// The first queue of a device, in the memory of its driver.
pub(super) fn queue() -> Message<'static> {
    Message::SetVqueue(VqueueConfig {
        index: QueueIndex(0),
        size: QueueSize(16),
        descriptor: BASE,
        driver: BASE + 0x1000,
        device: BASE + 0x2000,
    })
}

/// A host whose only worker works when it is told to.
pub(super) struct House {
    pub(super) core: Core,
    pub(super) worker: worker::Core,
    /// It works after each message.
    pub(super) at_once: bool,
    orders: VecDeque<Order>,
    /// Commands that the worker was given, but those nobody waits for.
    pub(super) given: usize,
    pub(super) memory: Arc<Mapping>,
    file: OwnedFd,
}

impl House {
    pub(super) fn new() -> Self {
        let (memory, file) = Mapping::memfd("test", 1 << 16, true).expect("memory");
        Self {
            core: Core::new(MESSAGE, 0),
            worker: worker::Core::new(),
            at_once: false,
            orders: VecDeque::new(),
            given: 0,
            memory: Arc::new(memory),
            file,
        }
    }

    pub(super) fn connect(&mut self) -> ConnId {
        self.core.connect(Peer::default(), MESSAGE)
    }

    /// A driver says something.
    pub(super) fn say(&mut self, conn: ConnId, frame: &Frame<'_>) {
        say(&mut self.core, conn, frame, Vec::new());
        self.spoken();
    }

    fn spoken(&mut self) {
        if self.at_once {
            self.work();
        }
    }

    pub(super) fn send(&mut self, conn: ConnId, num: u16, message: Message<'_>) {
        let frame = Frame::new(DevNum(num), Token(7), message);
        self.say(conn, &frame);
    }

    pub(super) fn request(&mut self, conn: ConnId, request: Request) {
        ask(&mut self.core, conn, request, Vec::new());
        self.spoken();
    }

    pub(super) fn status(&mut self, conn: ConnId, num: u16, status: DeviceStatus) {
        self.send(conn, num, Message::SetDeviceStatus(status));
    }

    pub(super) fn claim(&mut self, conn: ConnId, num: u16, release: bool) {
        let dev = DevNum(num);
        self.request(conn, Request::Claim { dev, release });
    }

    /// The worker carries out one command; false if there is nothing to do.
    pub(super) fn work_once(&mut self) -> bool {
        while let Some(order) = self.core.poll_order() {
            self.given += usize::from(!matches!(order.command, Command::Kick { .. }));
            self.orders.push_back(order);
        }
        let order = self.orders.pop_front();
        let any = order.is_some();
        if let Some(order) = order {
            self.worker
                .command(order.slot, order.ticket, order.command, &mut NoFds);
        }
        self.worker.carry_on(&mut NoFds);
        let replies: Vec<_> = self.worker.take_replies().collect();
        let heard = !replies.is_empty();
        for reply in replies {
            self.core.handle_reply(NOW, 0, reply);
        }
        any || heard
    }

    pub(super) fn work(&mut self) {
        while self.work_once() {}
    }

    /// What was said to `conn`, as a trace shows it.
    pub(super) fn said(&mut self, conn: ConnId) -> Vec<String> {
        let messages = std::iter::from_fn(|| take(&mut self.core, conn));
        messages
            .map(|bytes| {
                let frame = decode(&bytes, MESSAGE).expect("a message");
                match frame.message {
                    Message::BusSpecific { .. } => format!("{:?}", response(&bytes).status),
                    message => format!("{}: {message:?}", frame.token.0),
                }
            })
            .collect()
    }

    /// Lends memory, once, and brings the device up.
    pub(super) fn bring_up(&mut self, conn: ConnId, num: u16) {
        let file = self.file.as_fd().try_clone_to_owned().expect("a file");
        let window = Request::WindowAdd(WindowAdd {
            id: 1,
            writable: true,
            more: false,
            base: BusAddr(BASE),
            len: 1 << 16,
            file_offset: 0,
        });
        ask(&mut self.core, conn, window, vec![file]);
        self.spoken();
        self.status(conn, num, DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        self.status(conn, num, DeviceStatus::FEATURES_OK);
        self.send(conn, num, queue());
        self.status(conn, num, DeviceStatus::DRIVER_OK);
        self.work();
        let said = self.said(conn);
        assert!(
            said.last().is_some_and(|said| said.contains("DRIVER_OK")),
            "{said:?}"
        );
    }
}
