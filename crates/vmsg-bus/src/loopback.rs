// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both ends of a bus in one process.
//!
//! The same queues as on `unix`, in memory of the process; file descriptors are
//! duplicated across. Without doorbells nothing of the operating system is
//! used: a simulation that runs both ends in one thread looks at
//! [`take_wake`](DriverBus::take_wake) instead of sleeping.

use crate::bell::Bell;
use crate::carrier::{Carrier, Packet};
use crate::link::{Framing, Parts, Queues};
use crate::memory::Part;
use crate::{Capabilities, CommonRam, DeviceBus, DriverBus, Peer, Vectors};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmsg_mem::Doorbell;
use vmsg_mem::spsc::Layout;

/// How a loopback is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What it can do, and the longest message: 48 to 65536 bytes.
    pub capabilities: Capabilities,
    /// Slots each way, at least 2; one of them stays free.
    pub slots: u32,
    /// With eventfds to sleep on.
    pub doorbells: bool,
    /// What [`DriverBus::epoch`] says.
    pub epoch: u64,
}

impl Default for Options {
    /// Everything, 320-byte messages, 256 slots.
    fn default() -> Self {
        Self {
            capabilities: Capabilities::all(crate::DEFAULT_MESSAGE_SIZE),
            slots: crate::DEFAULT_SLOTS,
            doorbells: true,
            epoch: 1,
        }
    }
}

/// Makes a bus and returns its two ends.
///
/// # Errors
/// `InvalidInput` for sizes out of range; without doorbells nothing else. With them, those of `eventfd`.
pub fn pair(options: &Options) -> io::Result<(DriverBus, DeviceBus)> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let max = options.capabilities.max_message_size;
    if !crate::MESSAGE_SIZES.contains(&max) || !crate::SLOTS.contains(&options.slots) {
        return Err(invalid());
    }
    let slot_size = crate::slot_size(max);
    let queue = Layout::armed(slot_size)
        .bytes_for(options.slots)
        .ok_or_else(invalid)?;
    let memory: Arc<[AtomicU64]> = (0..queue.div_ceil(8) * 2)
        .map(|_| AtomicU64::new(0))
        .collect();
    let to_device = Part::Heap {
        words: Arc::clone(&memory),
        offset: 0,
        len: queue,
    };
    let to_driver = Part::Heap {
        words: memory,
        offset: queue.next_multiple_of(8),
        len: queue,
    };
    let (device_bell, device_waits) = bell(options.doorbells)?;
    let (driver_bell, driver_waits) = bell(options.doorbells)?;
    let shared = Arc::new(Shared::default());
    let driver = Parts {
        queues: Queues::Fresh {
            outgoing: to_device.clone(),
            incoming: to_driver.clone(),
            slot_size,
        },
        framing: Framing::Sized,
        theirs: device_bell,
        ours: driver_waits,
        carrier: Carrier::Local(Side {
            shared: Arc::clone(&shared),
            this: DRIVER,
        }),
        capabilities: options.capabilities,
        peer: Peer::named("loopback device"),
        epoch: options.epoch,
    };
    let device = Parts {
        queues: Queues::Fresh {
            outgoing: to_driver,
            incoming: to_device,
            slot_size,
        },
        framing: Framing::Sized,
        theirs: driver_bell,
        ours: device_waits,
        carrier: Carrier::Local(Side {
            shared,
            this: DEVICE,
        }),
        capabilities: options.capabilities,
        peer: Peer::named("loopback driver"),
        epoch: options.epoch,
    };
    let broken = |_| invalid();
    Ok((
        DriverBus::new(driver, None).map_err(broken)?,
        DeviceBus::new(device, None).map_err(broken)?,
    ))
}

/// What the two ends of a loopback have in common that passes no descriptors.
#[derive(Clone, Debug, Default)]
pub struct Common {
    /// The memory as the driver's end has it.
    pub driver: Option<Arc<CommonRam>>,
    /// The memory as the device's end has it.
    pub device: Option<Arc<CommonRam>>,
    /// How many doorbells each end has beside the bus's own; numbered from 1.
    pub vectors: u16,
}

/// As [`pair`], for a bus of [`Capabilities::common`] or the like.
///
/// # Errors
/// As [`pair`], and those of `eventfd` if there are vectors.
pub fn pair_with(options: &Options, common: &Common) -> io::Result<(DriverBus, DeviceBus)> {
    let (mut driver, mut device) = pair(options)?;
    let mut vectors = (Vec::new(), Vec::new());
    let mut bells = (Vec::new(), Vec::new());
    for vector in 1..=common.vectors {
        let (of_driver, of_device) = (Doorbell::new()?, Doorbell::new()?);
        vectors.0.push((vector, of_driver.try_clone()?.into()));
        vectors.1.push((vector, of_device.try_clone()?.into()));
        bells.0.push((vector, of_device));
        bells.1.push((vector, of_driver));
    }
    let some = |own, theirs| (common.vectors != 0).then(|| Arc::new(Vectors::new(own, theirs)));
    driver.share(common.driver.clone(), some(vectors.0, bells.0));
    device.share(common.device.clone(), some(vectors.1, bells.1));
    Ok((driver, device))
}

/// A bell for the one who rings and the one who waits.
fn bell(eventfd: bool) -> io::Result<(Bell, Bell)> {
    if eventfd {
        let doorbell = Doorbell::new()?;
        let other = doorbell.try_clone()?;
        Ok((Bell::Fd(doorbell), Bell::Fd(other)))
    } else {
        let flag = Arc::new(AtomicBool::new(false));
        Ok((Bell::Flag(Arc::clone(&flag)), Bell::Flag(flag)))
    }
}

const DRIVER: usize = 0;
const DEVICE: usize = 1;

/// A message and what came with it.
type WithFds = (Vec<u8>, Vec<OwnedFd>);

#[derive(Default)]
struct Shared {
    /// Messages sent by each side that came with descriptors; each has a marker in
    /// the queue, so that there are never more than slots.
    packets: [Mutex<VecDeque<WithFds>>; 2],
    closed: [AtomicBool; 2],
}

/// One side's view of what the two share beside the queues.
pub(crate) struct Side {
    shared: Arc<Shared>,
    this: usize,
}

impl Side {
    fn packets(&self, of: usize) -> MutexGuard<'_, VecDeque<WithFds>> {
        self.shared.packets[of]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
        let fds = fds
            .iter()
            .map(|fd| fd.try_clone_to_owned())
            .collect::<io::Result<Vec<_>>>()?;
        self.packets(self.this).push_back((message.to_vec(), fds));
        Ok(true)
    }

    pub(crate) fn recv(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<Packet>, &'static str> {
        let Some((message, came)) = self.packets(1 - self.this).pop_front() else {
            return Ok(None);
        };
        let Some(to) = buf.get_mut(..message.len()) else {
            return Err("a message longer than agreed");
        };
        to.copy_from_slice(&message);
        fds.extend(came);
        Ok(Some(Packet {
            len: message.len(),
            fds_lost: false,
        }))
    }

    pub(crate) fn peer_is_gone(&self) -> bool {
        self.shared.closed[1 - self.this].load(Ordering::Acquire)
    }

    pub(crate) fn close(&self) {
        self.shared.closed[self.this].store(true, Ordering::Release);
    }
}
