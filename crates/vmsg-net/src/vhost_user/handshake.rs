// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a back end is given its device: features, memory, rings.

use std::os::fd::{AsFd, BorrowedFd};

use vmsg_queue::QueueConfig;

use super::Trouble;
use super::rings::Rings;
use super::wire::{Answers, Request, id};
use crate::Offloads;

/// Feature bits (virtio 1.3, 5.1.3 and 6; bit 30 is vhost-user's own).
pub(super) mod feature {
    pub(crate) const CSUM: u64 = 1 << 0;
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    pub(crate) const GUEST_ECN: u64 = 1 << 9;
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    pub(crate) const HOST_ECN: u64 = 1 << 13;
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
    pub(crate) const GUEST_USO4: u64 = 1 << 54;
    pub(crate) const GUEST_USO6: u64 = 1 << 55;
    pub(crate) const HOST_USO: u64 = 1 << 56;
}

/// Frames to the back end may make use of these.
const HOST: u64 = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_USO;
/// Frames from the back end may make use of these.
const GUEST: u64 = feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6;

/// Of what a back end offers, what is taken.
pub(super) const fn choose(offered: u64, offloads: bool) -> u64 {
    let mut wanted =
        feature::VERSION_1 | feature::PROTOCOL_FEATURES | feature::MRG_RXBUF | feature::EVENT_IDX;
    if offloads {
        wanted |= feature::CSUM | feature::GUEST_CSUM | HOST | GUEST;
    }
    let mut chosen = offered & wanted;
    // Each needs another one (5.1.3.1); and large frames only fit into several buffers.
    if chosen & feature::CSUM == 0 {
        chosen &= !HOST;
    }
    if chosen & feature::GUEST_CSUM == 0 || chosen & feature::MRG_RXBUF == 0 {
        chosen &= !GUEST;
    }
    if chosen & (feature::HOST_TSO4 | feature::HOST_TSO6) == 0 {
        chosen &= !feature::HOST_ECN;
    }
    if chosen & (feature::GUEST_TSO4 | feature::GUEST_TSO6) == 0 {
        chosen &= !feature::GUEST_ECN;
    }
    // Linux and DPDK take one only with the other.
    if chosen & (feature::GUEST_USO4 | feature::GUEST_USO6)
        != feature::GUEST_USO4 | feature::GUEST_USO6
    {
        chosen &= !(feature::GUEST_USO4 | feature::GUEST_USO6);
    }
    chosen
}

/// What a back end takes, seen as a receiver of frames.
pub(super) fn takes(features: u64) -> Offloads {
    let has = |bit: u64| features & bit != 0;
    Offloads {
        guest_csum: has(feature::CSUM),
        guest_tso4: has(feature::HOST_TSO4),
        guest_tso6: has(feature::HOST_TSO6),
        guest_ecn: has(feature::HOST_ECN),
        guest_uso4: has(feature::HOST_USO),
        guest_uso6: has(feature::HOST_USO),
        mtu: u16::MAX,
        ..Offloads::NONE
    }
}

/// What is being waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Features,
    ProtocolFeatures,
    /// Everything was said; the answer to one more question shows that the peer has read it.
    Done,
}

/// The conversation with a back end that has just come.
#[derive(Debug)]
pub(super) struct Handshake {
    step: Step,
    answers: Answers,
    offloads: bool,
    features: u64,
    rings: Option<Rings>,
}

impl Handshake {
    /// Asks the first question.
    pub(super) fn begin(socket: BorrowedFd<'_>, offloads: bool) -> Result<Self, Trouble> {
        Request::new(id::GET_FEATURES).send(socket, None)?;
        Ok(Self {
            step: Step::Features,
            answers: Answers::new(),
            offloads,
            features: 0,
            rings: None,
        })
    }

    /// Goes on as far as the peer has answered; the rings and the features when it is through.
    pub(super) fn go_on(
        &mut self,
        socket: BorrowedFd<'_>,
    ) -> Result<Option<(Rings, u64)>, Trouble> {
        loop {
            let asked = match self.step {
                Step::Features | Step::Done => id::GET_FEATURES,
                Step::ProtocolFeatures => id::GET_PROTOCOL_FEATURES,
            };
            let Some(answer) = self.answers.read(socket, asked)? else {
                return Ok(None);
            };
            match self.step {
                Step::Features => {
                    if answer & feature::VERSION_1 == 0 {
                        return Err(Trouble::Legacy { features: answer });
                    }
                    self.features = choose(answer, self.offloads);
                    if self.features & feature::PROTOCOL_FEATURES == 0 {
                        self.set_up(socket)?;
                    } else {
                        Request::new(id::GET_PROTOCOL_FEATURES).send(socket, None)?;
                        self.step = Step::ProtocolFeatures;
                    }
                }
                Step::ProtocolFeatures => {
                    // None of them is of use here.
                    let none = Request::new(id::SET_PROTOCOL_FEATURES).long(0);
                    none.send(socket, None)?;
                    self.set_up(socket)?;
                }
                Step::Done => return Ok(self.rings.take().map(|rings| (rings, self.features))),
            }
        }
    }

    /// Says all that there is to say.
    fn set_up(&mut self, socket: BorrowedFd<'_>) -> Result<(), Trouble> {
        let rings = Rings::new(self.features)?;
        Request::new(id::SET_OWNER).send(socket, None)?;
        let features = Request::new(id::SET_FEATURES).long(self.features);
        features.send(socket, None)?;
        let region = rings.region();
        Request::new(id::SET_MEM_TABLE)
            .word(1)
            .word(0)
            .long(region.address)
            .long(region.len)
            // Where front ends have it mapped: for the rings' addresses below. It is nobody's business.
            .long(region.address)
            .long(0)
            .send(socket, Some(rings.file()))?;
        for (index, ring) in (0..).zip(rings.ends()) {
            let QueueConfig {
                size,
                desc,
                driver,
                device,
            } = ring.config;
            Request::new(id::SET_VRING_NUM)
                .word(index)
                .word(size.into())
                .send(socket, None)?;
            Request::new(id::SET_VRING_BASE)
                .word(index)
                .word(0)
                .send(socket, None)?;
            Request::new(id::SET_VRING_ADDR)
                .word(index)
                .word(0)
                .long(desc.0)
                .long(device.0)
                .long(driver.0)
                .long(0)
                .send(socket, None)?;
            for (request, fd) in [
                (id::SET_VRING_CALL, ring.call.as_fd()),
                (id::SET_VRING_KICK, ring.kick.as_fd()),
            ] {
                let request = Request::new(request).long(index.into());
                request.send(socket, Some(fd))?;
            }
        }
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            for index in [0, 1] {
                let enable = Request::new(id::SET_VRING_ENABLE).word(index).word(1);
                enable.send(socket, None)?;
            }
        }
        Request::new(id::GET_FEATURES).send(socket, None)?;
        self.step = Step::Done;
        self.rings = Some(rings);
        Ok(())
    }
}

#[cfg(test)]
#[path = "handshake_test.rs"]
mod tests;
