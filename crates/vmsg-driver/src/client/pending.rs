// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which answers are expected.

use virtio_msg::{DevNum, Frame, Message, Token};

/// How many requests may wait for an answer at the same time.
pub(crate) const MAX_PENDING: usize = 32;

/// A request on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestId(u16);

#[derive(Clone, Copy, Debug)]
struct Expected {
    token: Token,
    device: DevNum,
    msg_id: u8,
    bus: bool,
}

/// The requests that wait for an answer.
#[derive(Debug)]
pub(crate) struct Pending {
    expected: [Option<Expected>; MAX_PENDING],
    next: u16,
}

impl Pending {
    pub(crate) const fn new() -> Self {
        Self {
            expected: [None; MAX_PENDING],
            next: 1,
        }
    }

    /// Notes a request and finds a token for it; `None` if there are too many already.
    pub(crate) fn start(
        &mut self,
        device: DevNum,
        request: &Message<'_>,
    ) -> Option<(RequestId, Token)> {
        // At most MAX_PENDING tokens are taken, so a free one turns up soon. 0 is left to events.
        while self.next == 0
            || self
                .expected
                .iter()
                .flatten()
                .any(|e| e.token.0 == self.next)
        {
            self.next = self.next.wrapping_add(1);
        }
        let slot = self.expected.iter_mut().find(|slot| slot.is_none())?;
        let token = Token(self.next);
        *slot = Some(Expected {
            token,
            device,
            msg_id: request.id(),
            bus: request.is_bus(),
        });
        self.next = self.next.wrapping_add(1);
        Some((RequestId(token.0), token))
    }

    /// Finds the request that `frame` answers, and expects no more answer to it.
    pub(crate) fn answered(&mut self, frame: &Frame<'_>) -> Option<RequestId> {
        let fits = |e: &Expected| {
            // QEMU's device side answers GET_DEVICES with token 0, whatever was sent.
            let lost_token = frame.token.0 == 0 && matches!(frame.message, Message::Devices(_));
            (e.token == frame.token || lost_token)
                && e.device == frame.dev_num
                && e.msg_id == frame.message.id()
                && e.bus == frame.message.is_bus()
        };
        let slot = self
            .expected
            .iter_mut()
            .find(|slot| slot.as_ref().is_some_and(fits))?;
        slot.take().map(|e| RequestId(e.token.0))
    }

    /// Expects no answer to this request any more: it came, or it is too late.
    pub(crate) fn forget(&mut self, id: RequestId) {
        for slot in &mut self.expected {
            if slot.is_some_and(|e| e.token.0 == id.0) {
                *slot = None;
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.expected.iter().all(Option::is_none)
    }
}
