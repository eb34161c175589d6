// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest: a driver in this process, on a connection to a bus of its own.

use std::time::Instant;

use virtio_msg::DevNum;
use vmsg_bus::DriverBus;
use vmsg_bus::unix::Connector;
use vmsg_driver::net::{NetDriver, NetOptions};
use vmsg_driver::{BusClient, DmaPool, Error, Sleep};
use vmsg_mem::BusAddr;

use crate::process::{PATIENCE, Serve};

/// A type of frames for experiments (IEEE 802, local experimental ethertype 1).
const TYPE: [u8; 2] = [0x88, 0xb5];

pub(crate) struct Station {
    net: NetDriver<'static, DriverBus, Sleep, Vec<u8>>,
    pub(crate) mac: [u8; 6],
    sequence: u32,
}

impl Station {
    /// Drives the device with this number on a bus.
    pub(crate) fn new(serve: &Serve, bus: &str, number: u16) -> Self {
        Self::try_new(serve, bus, number).expect("a driver")
    }

    pub(crate) fn try_new(serve: &Serve, bus: &str, number: u16) -> Result<Self, Error> {
        let path = serve.file(&format!("{bus}.sock"));
        let connection = Connector::new(path, "station").connect();
        let mut client = BusClient::on_bus(connection.expect("connected"));
        client.set_timeout(PATIENCE);
        // There are few, and the process is short.
        let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 4 << 20).expect("memory");
        let pool: &'static DmaPool = Box::leak(Box::new(pool));
        pool.lend(&mut client, 1)?;
        let options = NetOptions::default();
        let mut net = NetDriver::new(client, DevNum(number), pool, &options)?;
        let mac = net.mac()?.expect("an address");
        Ok(Self {
            net,
            mac,
            sequence: 0,
        })
    }

    /// Sends a frame of `len` bytes; returns the number that is in it.
    pub(crate) fn send(&mut self, to: [u8; 6], len: usize) -> u32 {
        self.sequence += 1;
        let mut frame = Vec::with_capacity(len);
        frame.extend(to);
        frame.extend(self.mac);
        frame.extend(TYPE);
        frame.extend(self.sequence.to_be_bytes());
        frame.resize(len.max(60), 0xa5);
        while self
            .net
            .transmit([frame.as_slice()])
            .expect("a live device")
            == 0
        {
            self.net.wait_sent(PATIENCE).expect("a live device");
        }
        self.sequence
    }

    /// Takes what is there: who has sent it, and its number.
    pub(crate) fn drain(&mut self) -> Vec<([u8; 6], u32)> {
        let mut frames = Vec::new();
        let mut bytes = [0; 2048];
        loop {
            let each = |frame: vmsg_driver::net::RxFrame<'_>| {
                let bytes = frame.copy_to(&mut bytes);
                assert_eq!(bytes[12..14], TYPE);
                let from = bytes[6..12].try_into().expect("six bytes");
                let number = u32::from_be_bytes(bytes[14..18].try_into().expect("four bytes"));
                frames.push((from, number));
            };
            if self.net.receive(256, each).expect("a live device") == 0 {
                return frames;
            }
        }
    }

    /// Waits for the frame `number` of `from`, and drops those before it.
    pub(crate) fn wait_for(&mut self, from: [u8; 6], number: u32) {
        let begun = Instant::now();
        while !self.drain().contains(&(from, number)) {
            assert!(begun.elapsed() < PATIENCE, "frame {number} does not come");
            self.net.wait(PATIENCE).expect("a live device");
        }
    }

    /// A frame to `other`, and one back.
    pub(crate) fn ping(&mut self, other: &mut Self) {
        let number = self.send(other.mac, 60);
        other.wait_for(self.mac, number);
        let number = other.send(self.mac, 60);
        self.wait_for(other.mac, number);
    }

    /// A frame to `other` gets lost. `witness` is one that frames of this station reach.
    pub(crate) fn ping_in_vain(&mut self, other: &mut Self, witness: &mut Self) {
        other.drain();
        let lost = self.send(other.mac, 60);
        // All of a batch are done when a frame of the next one has come.
        for _ in 0..2 {
            let number = self.send(witness.mac, 60);
            witness.wait_for(self.mac, number);
        }
        assert!(!other.drain().contains(&(self.mac, lost)), "it has come");
    }
}

/// Is true once it was dropped, however that came: threads that go on until then do not hang a test that has failed.
pub(crate) struct Ends<'a>(pub(crate) &'a std::sync::atomic::AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}
