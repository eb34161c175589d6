// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a conversation begins: what the daemon is, and can.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::front_end::{Done, FrontEnd};
use crate::{Answer, F_PROTOCOL_FEATURES, F_VERSION_1, Fault, Protocol, Request, TABLE_REGIONS};

/// What is wanted of the daemon.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Features of the protocol that are used if it has them.
    pub protocol: Protocol,
    /// Bytes of configuration to read, by the virtio features that the daemon has.
    pub config_len: fn(u64) -> u32,
    /// Instead: always so many.
    pub config_len_fixed: Option<u32>,
}

/// What a daemon is and can.
#[derive(Clone, Debug, Default)]
pub struct Offer {
    /// Its virtio features, F_PROTOCOL_FEATURES included.
    pub features: u64,
    /// Features of the protocol that are in use.
    pub protocol: Protocol,
    /// How many queues it has, if it says.
    pub queues: Option<u64>,
    /// Regions of memory that it can have.
    pub regions: usize,
    /// The configuration, if it tells any.
    pub config: Option<Vec<u8>>,
}

/// The beginning of a conversation.
#[derive(Debug)]
pub struct Greeting {
    wanted: Wanted,
    channel: Option<Arc<OwnedFd>>,
    offer: Offer,
}

impl Greeting {
    /// Asks the first question. `channel` is where the daemon can ask, if it wants to.
    pub fn begin(wanted: Wanted, channel: Option<OwnedFd>, front: &mut FrontEnd) -> Self {
        front.ask(Request::GetFeatures);
        Self {
            wanted,
            channel: channel.map(Arc::new),
            offer: Offer {
                regions: TABLE_REGIONS,
                ..Offer::default()
            },
        }
    }

    /// Takes an answer; what the daemon is, when everything is known.
    ///
    /// # Errors
    /// [`Fault::Legacy`], [`Fault::Refused`], [`Fault::Nonsense`].
    pub fn handle(&mut self, done: Done, front: &mut FrontEnd) -> Result<Option<Offer>, Fault> {
        let name = done.request.name();
        match (done.request, done.answer) {
            (_, Answer::Refused(code)) => {
                return Err(Fault::Refused {
                    request: name,
                    code,
                });
            }
            (Request::GetFeatures, Answer::Number(features)) => {
                if features & F_VERSION_1 == 0 {
                    return Err(Fault::Legacy { features });
                }
                self.offer.features = features;
                if features & F_PROTOCOL_FEATURES == 0 {
                    front.ask(Request::SetOwner);
                } else {
                    front.ask(Request::GetProtocolFeatures);
                }
            }
            (Request::GetProtocolFeatures, Answer::Number(features)) => {
                let mut chosen = Protocol::from_bits_truncate(features) & self.wanted.protocol;
                if self.channel.is_none() {
                    chosen -= Protocol::BACKEND_REQ;
                }
                self.offer.protocol = chosen;
                front.ask(Request::SetProtocolFeatures(chosen.bits()));
            }
            (Request::SetProtocolFeatures(_), _) => {
                let has = |feature| self.offer.protocol.contains(feature);
                if has(Protocol::REPLY_ACK) {
                    front.use_acks();
                }
                if has(Protocol::MQ) {
                    front.ask(Request::GetQueueNum);
                }
                if has(Protocol::CONFIGURE_MEM_SLOTS) {
                    front.ask(Request::GetMaxMemSlots);
                }
                if let Some(channel) = self.channel.take_if(|_| has(Protocol::BACKEND_REQ)) {
                    front.ask(Request::SetBackendChannel(channel));
                }
                front.ask(Request::SetOwner);
            }
            (Request::GetQueueNum, Answer::Number(queues)) => {
                if queues == 0 {
                    return Err(Fault::Nonsense {
                        request: name,
                        why: "no queues",
                    });
                }
                self.offer.queues = Some(queues);
            }
            (Request::GetMaxMemSlots, Answer::Number(slots)) => {
                if slots == 0 {
                    return Err(Fault::Nonsense {
                        request: name,
                        why: "no room for any memory",
                    });
                }
                self.offer.regions = usize::try_from(slots).unwrap_or(usize::MAX);
            }
            (Request::SetOwner, _) => {
                let len = self.wanted.config_len_fixed;
                let len = len.unwrap_or_else(|| (self.wanted.config_len)(self.offer.features));
                if !self.offer.protocol.contains(Protocol::CONFIG) || len == 0 {
                    return Ok(Some(std::mem::take(&mut self.offer)));
                }
                front.ask(Request::GetConfig { offset: 0, len });
            }
            (Request::GetConfig { .. }, Answer::Config(config)) => {
                self.offer.config = Some(config).filter(|config| !config.is_empty());
                return Ok(Some(std::mem::take(&mut self.offer)));
            }
            _ => {}
        }
        Ok(None)
    }
}
