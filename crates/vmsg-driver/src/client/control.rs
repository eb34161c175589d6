// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What our own buses can do beside virtio-msg: windows, eventfds for queues, claims, names (`docs/bus-unix.md` §5).

use std::os::fd::BorrowedFd;

use virtio_msg::{DevNum, Message, QueueIndex};
use vmsg_bus::Bus;
use vmsg_bus::control::{
    self, BackingAdd, MAX_PAYLOAD, QueueInflight, QueueNotify, Request, Response, Resume, Status,
    ViewAdd, WindowAdd,
};

use super::Client;
use crate::error::Error;
use crate::wait::Wait;

fn name(request: &Request) -> &'static str {
    control::name(request.id()).unwrap_or("a bus message")
}

impl<C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>> Client<C, W, B> {
    /// Lends memory to the device side: from now on it finds `window.len` bytes of the file `fd` at `window.base`.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn add_window(&mut self, window: WindowAdd, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let able = self.channel.capabilities().runtime_windows;
        self.done(Request::WindowAdd(window), able, &[fd])
    }

    /// Takes a window back. When this returns, nothing on the device side uses it any more.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn remove_window(&mut self, id: u32) -> Result<(), Error> {
        let able = self.channel.capabilities().runtime_windows;
        self.done(Request::WindowRemove { id, more: false }, able, &[])
    }

    /// Lends a file of which windows can be made with [`Self::add_view`] without mapping anything anew.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn add_backing(&mut self, backing: BackingAdd, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let able = self.channel.capabilities().views;
        self.done(Request::BackingAdd(backing), able, &[fd])
    }

    /// Takes such a file back; there must be no views of it.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn remove_backing(&mut self, id: u32) -> Result<(), Error> {
        let able = self.channel.capabilities().views;
        self.done(Request::BackingRemove { id }, able, &[])
    }

    /// Makes a window of a part of a backing; [`Self::remove_window`] removes it.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn add_view(&mut self, view: ViewAdd) -> Result<(), Error> {
        let able = self.channel.capabilities().views;
        self.done(Request::ViewAdd(view), able, &[])
    }

    /// Gives a queue eventfds: the device waits for `kick` beside EVENT_AVAIL, and rings `call` in place of EVENT_USED. `None` takes
    /// the one that was given before away.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn queue_notify(
        &mut self,
        device: DevNum,
        queue: QueueIndex,
        kick: Option<BorrowedFd<'_>>,
        call: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        let able = self.channel.capabilities().out_of_band_notify;
        let request = QueueNotify {
            dev: device,
            queue,
            kick: kick.is_some(),
            call: call.is_some(),
        };
        let both: [BorrowedFd<'_>; 2];
        let one: [BorrowedFd<'_>; 1];
        let fds: &[BorrowedFd<'_>] = match (kick, call) {
            (Some(kick), Some(call)) => {
                both = [kick, call];
                &both
            }
            (Some(fd), None) | (None, Some(fd)) => {
                one = [fd];
                &one
            }
            (None, None) => &[],
        };
        self.done(Request::QueueNotify(request), able, fds)
    }

    /// Says where a queue goes on when it is set up next.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn queue_resume(
        &mut self,
        device: DevNum,
        queue: QueueIndex,
        from: Resume,
    ) -> Result<(), Error> {
        self.done(
            Request::QueueResume {
                dev: device,
                queue,
                from,
            },
            true,
            &[],
        )
    }

    /// Says where the device keeps what is in flight in a queue when it is set up next, in a part of the file `fd`. Devices that use each
    /// queue in order need none and say nothing to it.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn queue_inflight(
        &mut self,
        record: QueueInflight,
        fd: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let capabilities = self.channel.capabilities();
        let able = capabilities.passes_fds && capabilities.runtime_windows;
        self.done(Request::QueueInflight(record), able, &[fd])
    }

    /// Claims a device for this connection.
    ///
    /// # Errors
    /// [`Error::Held`] by another; [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn claim(&mut self, device: DevNum) -> Result<(), Error> {
        let able = self.channel.capabilities().claims;
        let request = Request::Claim {
            dev: device,
            release: false,
        };
        let (status, holder) = self.control(request, able, &[])?;
        match status {
            Status::HELD => Err(Error::Held { device, holder }),
            status => status.ok().map_err(|status| Error::Refused {
                request: name(&request),
                status,
            }),
        }
    }

    /// Lets go of a device.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn release(&mut self, device: DevNum) -> Result<(), Error> {
        let able = self.channel.capabilities().claims;
        self.done(
            Request::Claim {
                dev: device,
                release: true,
            },
            able,
            &[],
        )
    }

    /// The name that the owner of the device host gave to a device. Control characters are replaced: the other side may be hostile.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::Refused`], [`Error::Unsupported`]; [`Error::Timeout`], [`Error::Channel`].
    pub fn device_name(&mut self, device: DevNum) -> Result<String, Error> {
        let able = self.channel.capabilities().enumerates;
        let request = Request::DeviceName(device);
        match self.control(request, able, &[])? {
            (Status::OK, text) => Ok(text),
            (Status::NOT_FOUND, _) => Err(Error::NoDevice(device)),
            (status, _) => Err(Error::Refused {
                request: name(&request),
                status,
            }),
        }
    }

    /// Makes a request whose answer is only a status.
    fn done(&mut self, request: Request, able: bool, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let (status, _) = self.control(request, able, fds)?;
        status.ok().map_err(|status| Error::Refused {
            request: name(&request),
            status,
        })
    }

    /// Makes a request and gives the status and the name in the answer.
    fn control(
        &mut self,
        request: Request,
        able: bool,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Status, String), Error> {
        let request_name = name(&request);
        if !able {
            return Err(Error::Unsupported {
                request: request_name,
            });
        }
        let mut payload = [0; MAX_PAYLOAD];
        let size = request
            .encode(&mut payload)
            .expect("MAX_PAYLOAD is enough for all");
        let message = Message::BusSpecific {
            id: request.id(),
            response: false,
            payload: &payload[..size],
        };
        let mut put = |channel: &mut C, bytes: &[u8]| channel.try_send_with_fds(bytes, fds);
        self.exchange(request_name, DevNum(0), message, &mut put, |answer| {
            let Message::BusSpecific { payload, .. } = answer else {
                return None;
            };
            let answer = Response::decode(request.id(), payload).ok()?;
            let text = answer
                .name
                .chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect();
            (answer.subject == request.subject()).then_some((answer.status, text))
        })
    }
}
