// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a daemon asks by itself.

use crate::stream::{Incoming, Message};
use crate::wire::{NEED_REPLY, REPLY, Writer};

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;

/// What a daemon says by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The configuration is not what it was.
    ConfigChanged,
    /// Something else, which is not done. Its descriptors are closed.
    Other {
        /// Its number.
        id: u32,
    },
}

/// What a message of the daemon says, and the answer, if it wants one.
pub fn handle(message: &Incoming) -> (Call, Option<Message>) {
    let header = message.header;
    let known = header.id == CONFIG_CHANGE && header.is_of_version() && header.flags & REPLY == 0;
    let call = if known {
        Call::ConfigChanged
    } else {
        Call::Other { id: header.id }
    };
    let wants = header.flags & NEED_REPLY != 0;
    let answer = wants.then(|| {
        let mut body = Writer::new(header.id, REPLY);
        body.long((!known).into());
        Message::new(body.finish(), Vec::new())
    });
    (call, answer)
}
