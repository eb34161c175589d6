// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Between a driver and a device host: messages on their way, in the form that the bus has.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use virtio_msg::r1::{self, DeviceAdapter, DriverAdapter};
use vmsg_bus::Capabilities;

use crate::world::MESSAGE;

/// Kinds of buses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Bus {
    /// Passes descriptors, lends memory.
    #[default]
    Unix,
    /// Messages only; windows are views of memory that both ends have.
    Common,
    /// Messages only; the driver's memory is known from the start.
    Bare,
    /// The same, with the older messages on the wire.
    BareR1,
}

impl Bus {
    pub(crate) fn lends(self) -> bool {
        self == Self::Unix
    }

    pub(crate) fn max_message(self) -> usize {
        match self {
            Self::Unix => MESSAGE,
            Self::Common => 64,
            Self::Bare | Self::BareR1 => 48,
        }
    }

    pub(crate) fn capabilities(self) -> Capabilities {
        match self {
            Self::Unix => Capabilities::all(MESSAGE),
            Self::Common => Capabilities::common(64),
            Self::Bare => {
                let mut capabilities = Capabilities::from_bits(0, 48);
                capabilities.enumerates = true;
                capabilities
            }
            Self::BareR1 => Capabilities::from_bits(0, 48),
        }
    }
}

pub(crate) type Message = (Vec<u8>, Vec<OwnedFd>);

/// Both directions of a connection.
#[derive(Default)]
pub(crate) struct Line {
    bus: Bus,
    to_host: VecDeque<Message>,
    to_driver: VecDeque<Vec<u8>>,
    r1: Option<Box<Translated>>,
    /// Messages taken off the wire that came to nothing for either side.
    pub(crate) swallowed: usize,
}

/// What lies at the ends of a wire with the older messages.
struct Translated {
    driver: DriverAdapter,
    device: DeviceAdapter,
    from_driver: VecDeque<Vec<u8>>,
    from_host: VecDeque<Vec<u8>>,
}

impl Line {
    pub(crate) fn new(bus: Bus) -> Self {
        let mut line = Self {
            bus,
            ..Self::default()
        };
        line.clear();
        line
    }

    /// The connection has ended; another one begins.
    pub(crate) fn clear(&mut self) {
        self.to_host.clear();
        self.to_driver.clear();
        self.r1 = (self.bus == Bus::BareR1).then(|| {
            Box::new(Translated {
                driver: DriverAdapter::default(),
                device: DeviceAdapter::default(),
                from_driver: VecDeque::new(),
                from_host: VecDeque::new(),
            })
        });
    }

    pub(crate) fn driver_sends(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        match &mut self.r1 {
            None => self.to_host.push_back((bytes, fds)),
            Some(r1) => r1.from_driver.push_back(bytes),
        }
    }

    pub(crate) fn host_sends(&mut self, bytes: Vec<u8>) {
        match &mut self.r1 {
            None => self.to_driver.push_back(bytes),
            Some(r1) => r1.from_host.push_back(bytes),
        }
    }

    /// The next message for the host.
    pub(crate) fn for_host(&mut self) -> Option<Message> {
        let Some(r1) = &mut self.r1 else {
            return self.to_host.pop_front();
        };
        loop {
            r1.put_on_wire(&mut self.to_host, &mut self.to_driver);
            if let Some(bytes) = polled(|out| r1.device.poll_message(out)) {
                return Some((bytes, Vec::new()));
            }
            let (bytes, _) = self.to_host.front()?;
            if r1.device.handle_wire(bytes).is_err() {
                return None;
            }
            self.to_host.pop_front();
            self.swallowed += 1;
        }
    }

    /// The next message for the driver.
    pub(crate) fn for_driver(&mut self) -> Option<Vec<u8>> {
        let Some(r1) = &mut self.r1 else {
            return self.to_driver.pop_front();
        };
        loop {
            r1.put_on_wire(&mut self.to_host, &mut self.to_driver);
            if let Some(bytes) = polled(|out| r1.driver.poll_message(out)) {
                return Some(bytes);
            }
            let bytes = self.to_driver.front()?;
            if r1.driver.handle_wire(bytes).is_err() {
                return None;
            }
            self.to_driver.pop_front();
            self.swallowed += 1;
        }
    }
}

fn polled(mut poll: impl FnMut(&mut [u8]) -> Option<usize>) -> Option<Vec<u8>> {
    let mut bytes = vec![0; r1::MESSAGE_SIZE];
    let len = poll(&mut bytes)?;
    bytes.truncate(len);
    Some(bytes)
}

impl Translated {
    /// Sends all that the adapters take.
    fn put_on_wire(&mut self, to_host: &mut VecDeque<Message>, to_driver: &mut VecDeque<Vec<u8>>) {
        loop {
            let mut moved = false;
            while let Some(bytes) = polled(|out| self.driver.poll_wire(out)) {
                to_host.push_back((bytes, Vec::new()));
                moved = true;
            }
            while let Some(bytes) = polled(|out| self.device.poll_wire(out)) {
                to_driver.push_back(bytes);
                moved = true;
            }
            if let Some(bytes) = self.from_driver.front()
                && self.driver.handle_request(bytes).is_ok()
            {
                self.from_driver.pop_front();
                moved = true;
            }
            if let Some(bytes) = self.from_host.front()
                && self.device.handle_message(bytes).is_ok()
            {
                self.from_host.pop_front();
                moved = true;
            }
            if !moved {
                return;
            }
        }
    }
}
