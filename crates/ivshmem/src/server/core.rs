// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who is there and what is to be sent to whom, without I/O.

use std::collections::{BTreeMap, VecDeque};

use super::ids::Ids;
use crate::PeerId;
use crate::protocol::{MEMORY, VERSION};

/// Messages about others that may wait for a client beyond those it gets at first.
pub(super) const MAX_NEWS: usize = 4096;

/// A client while it is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key(pub(super) u64);

/// A message for a client. `F` is a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message<F> {
    pub(super) number: i64,
    pub(super) fd: Option<F>,
}

/// Why somebody does not become a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The port has one already.
    Busy,
    /// All ids are in use, or were in use by somebody who was seen to leave.
    NoId,
}

/// A peer, in the order of arrival. That of a port with an id is there from the beginning, with or without a client.
#[derive(Debug)]
struct Member<F> {
    id: PeerId,
    bells: Vec<F>,
    /// Its id is that of a port, and nobody ever sees it leave.
    stays: bool,
    client: Option<Client<F>>,
}

#[derive(Debug)]
struct Client<F> {
    key: Key,
    joined: u64,
    queue: VecDeque<Message<F>>,
    max_queue: usize,
}

/// Who is there. Peers are told of each other in the order of QEMU's server.
#[derive(Debug)]
pub(super) struct Core<F> {
    memory: F,
    ids: Ids,
    members: BTreeMap<u64, Member<F>>,
    /// Where each client is among the members.
    places: BTreeMap<Key, u64>,
    /// Counts what happens.
    clock: u64,
    /// Clients for which too much waits.
    overrun: Vec<Key>,
}

impl<F: Clone> Core<F> {
    pub(super) fn new(memory: F, ids: Ids) -> Self {
        Self {
            memory,
            ids,
            members: BTreeMap::new(),
            places: BTreeMap::new(),
            clock: 0,
            overrun: Vec::new(),
        }
    }

    /// A peer that stays, whose client can come and go. Only before the first client.
    pub(super) fn add_permanent(&mut self, id: PeerId, bells: Vec<F>) {
        let place = self.tick();
        let member = Member {
            id,
            bells,
            stays: true,
            client: None,
        };
        self.members.insert(place, member);
    }

    /// The client of the port with this id is there.
    pub(super) fn join_permanent(&mut self, key: Key, id: PeerId) -> Result<(), Refusal> {
        let joined = self.tick();
        let (&place, member) = self
            .members
            .iter()
            .find(|(_, member)| member.stays && member.id == id)
            .expect("made with its port");
        if member.client.is_some() {
            return Err(Refusal::Busy);
        }
        let client = self.client(key, joined, place, id, &member.bells);
        self.members.get_mut(&place).expect("just seen").client = Some(client);
        self.places.insert(key, place);
        Ok(())
    }

    /// Another client is there; its id.
    pub(super) fn join(&mut self, key: Key, bells: Vec<F>) -> Result<PeerId, Refusal> {
        let clients = self.members.values().filter_map(|m| m.client.as_ref());
        let oldest = clients.map(|client| client.joined).min();
        let id = self.ids.take(oldest).ok_or(Refusal::NoId)?;
        let place = self.tick();
        for bell in &bells {
            self.tell_all(&Message {
                number: i64::from(id.0),
                fd: Some(bell.clone()),
            });
        }
        let client = self.client(key, place, place, id, &bells);
        let member = Member {
            id,
            bells,
            stays: false,
            client: Some(client),
        };
        self.members.insert(place, member);
        self.places.insert(key, place);
        Ok(id)
    }

    /// A client is gone.
    pub(super) fn leave(&mut self, key: Key) {
        let Some(place) = self.places.remove(&key) else {
            return;
        };
        let now = self.tick();
        let member = self.members.get_mut(&place).expect("places are of members");
        member.client = None;
        if member.stays {
            return;
        }
        let id = member.id;
        self.members.remove(&place);
        self.ids.give_back(id, now);
        self.tell_all(&Message {
            number: i64::from(id.0),
            fd: None,
        });
    }

    /// What a client gets at first.
    fn client(&self, key: Key, joined: u64, place: u64, id: PeerId, own: &[F]) -> Client<F> {
        let mut queue = VecDeque::new();
        let mut put = |number, fd: Option<&F>| {
            queue.push_back(Message {
                number,
                fd: fd.cloned(),
            });
        };
        put(VERSION, None);
        put(i64::from(id.0), None);
        put(MEMORY, Some(&self.memory));
        for (_, other) in self.members.iter().filter(|(at, _)| **at != place) {
            for bell in &other.bells {
                put(i64::from(other.id.0), Some(bell));
            }
        }
        for bell in own {
            put(i64::from(id.0), Some(bell));
        }
        Client {
            key,
            joined,
            max_queue: queue.len() + MAX_NEWS,
            queue,
        }
    }

    fn tell_all(&mut self, message: &Message<F>) {
        let clients = self.members.values_mut();
        for client in clients.filter_map(|member| member.client.as_mut()) {
            if client.queue.len() < client.max_queue {
                client.queue.push_back(message.clone());
            } else if self.overrun.last() != Some(&client.key) {
                self.overrun.push(client.key);
            }
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Clients for which too much waits: they have missed something and must go.
    pub(super) fn take_overrun(&mut self) -> Vec<Key> {
        std::mem::take(&mut self.overrun)
    }

    /// What waits to be sent to a client.
    pub(super) fn queue(&mut self, key: Key) -> Option<&mut VecDeque<Message<F>>> {
        let member = self.members.get_mut(self.places.get(&key)?)?;
        Some(&mut member.client.as_mut()?.queue)
    }

    /// The client of the port with this id.
    pub(super) fn client_of(&self, id: PeerId) -> Option<Key> {
        let mut members = self.members.values();
        let member = members.find(|member| member.stays && member.id == id)?;
        Some(member.client.as_ref()?.key)
    }

    /// The first id that was never given.
    pub(super) fn next_id(&self) -> u32 {
        self.ids.next()
    }
}

#[cfg(test)]
#[path = "core_test.rs"]
mod tests;
