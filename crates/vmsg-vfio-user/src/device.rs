// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is served: a PCI device, as `<linux/vfio.h>` describes one.

use rustix::io::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};

/// What a device has (`struct vfio_device_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// How many regions there are, those of size 0 included: 9 for a PCI device (six BARs, ROM, configuration space, VGA). QEMU accepts 100.
    pub regions: u32,
    /// How many kinds of interrupt there are: 5 for a PCI device (INTx, MSI, MSI-X, error, request). QEMU accepts 50.
    pub irqs: u32,
    /// Whether [`Device::reset`] works.
    pub can_reset: bool,
}

/// A region of a device (`struct vfio_region_info`).
#[derive(Clone, Debug)]
pub struct Region<'a> {
    /// Bytes; 0 if there is no such region.
    pub size: u64,
    /// Whether the client may read it.
    pub readable: bool,
    /// Whether the client may write it.
    pub writable: bool,
    /// How the client can map it, if it can. QEMU stops posting writes, to any region, of a device that has a mappable region.
    pub mmap: Option<RegionMap<'a>>,
}

/// How a client maps a region. Reads and writes of mapped parts by message may come all the same.
#[derive(Clone, Debug)]
pub struct RegionMap<'a> {
    /// The mappable parts; empty means all of it. They go into the capability `VFIO_REGION_INFO_CAP_SPARSE_MMAP`. At most 1024 are told.
    pub areas: Vec<MapArea>,
    /// What is mapped. The client gets a duplicate.
    pub fd: BorrowedFd<'a>,
    /// Where the region begins in the file, in bytes. Offsets of areas come on top.
    pub offset: u64,
}

/// A mappable part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapArea {
    /// Where it begins in the region, in bytes; a multiple of the page size.
    pub offset: u64,
    /// Bytes; a multiple of the page size.
    pub len: u64,
}

/// A kind of interrupt (`struct vfio_irq_info`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many interrupts of the kind there are.
    pub count: u32,
    /// Whether they can be told by eventfds.
    pub eventfd: bool,
    /// Whether they can be masked and unmasked.
    pub maskable: bool,
    /// Whether one masks itself when it is raised.
    pub automasked: bool,
    /// Whether all have to be disabled before more of them are enabled.
    pub no_resize: bool,
}

impl IrqInfo {
    /// There is no such interrupt.
    pub const NONE: IrqInfo = IrqInfo {
        count: 0,
        eventfd: false,
        maskable: false,
        automasked: false,
        no_resize: false,
    };
}

/// What SET_IRQS is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Masking.
    Mask,
    /// Unmasking.
    Unmask,
    /// Raising.
    Trigger,
}

/// What SET_IRQS gives for the interrupts it is about.
#[derive(Debug)]
pub enum IrqData {
    /// Nothing: do it to all of them. With a count of 0: take all eventfds of the kind away.
    None,
    /// Do it to those with `true`. As many as [`SetIrqs::count`].
    Bools(Vec<bool>),
    /// The eventfds to write to when it happens ([`IrqAction::Trigger`]) or to listen to for doing it ([`IrqAction::Mask`], [`IrqAction::Unmask`]); `None` takes one away. As many as
    /// [`SetIrqs::count`].
    Eventfds(Vec<Option<OwnedFd>>),
}

/// SET_IRQS (`struct vfio_irq_set`). Index, start and count are within what [`Device::info`] and [`Device::irq`] tell, mask and unmask and eventfds come only where [`IrqInfo`] says so.
#[derive(Debug)]
pub struct SetIrqs {
    /// The kind.
    pub index: u32,
    /// The first.
    pub start: u32,
    /// How many. 0 (with a start of 0 and no data) means all.
    pub count: u32,
    /// What.
    pub action: IrqAction,
    /// With what.
    pub data: IrqData,
}

/// Memory of the client that the device may use from now on (DMA_MAP).
#[derive(Debug)]
pub struct DmaMap {
    /// Where the device finds it.
    pub address: u64,
    /// Bytes; not 0, and `address + size - 1` does not overflow.
    pub size: u64,
    /// Where it begins in its file, in bytes. Not checked against the file.
    pub offset: u64,
    /// Whether the device may read it.
    pub readable: bool,
    /// Whether the device may write it.
    pub writable: bool,
    /// The file; `None` for memory that is reached only by [`crate::Dma`].
    pub fd: Option<OwnedFd>,
}

/// Memory of the client that the device has to let go of (DMA_UNMAP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaUnmap {
    /// Where the device found it; 0 with `all`.
    pub address: u64,
    /// Bytes; not 0, and `address + size - 1` does not overflow. 0 with `all`.
    pub size: u64,
    /// All memory there is.
    pub all: bool,
}

/// A PCI device.
///
/// All is called from [`crate::Connection::turn`], on its thread, and answered when it returns: QEMU waits 5 s at most. None of it may wait for a [`crate::Dma`], nor for a thread that waits for
/// one: answers come through that same `turn`, and QEMU gives them only when it has had its own. [`crate::Dma::cancel`] ends such waiting.
///
/// An `Err` goes to the client as it is.
pub trait Device {
    /// A client says its version, which comes first. An error turns it away: QEMU ends with it at its start, and prints it.
    fn greet(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    /// What it has.
    fn info(&self) -> DeviceInfo;

    /// A region; `index` is below [`DeviceInfo::regions`]. `None` refuses to describe it (EINVAL): QEMU does not complain about a missing ROM then.
    fn region(&self, index: u32) -> Option<Region<'_>>;

    /// A kind of interrupt; `index` is below [`DeviceInfo::irqs`].
    fn irq(&self, index: u32) -> IrqInfo;

    /// Reads a readable region. `data` is not empty, lies inside of the region and is at most [`crate::Options::max_data_xfer_size`] long; it is zeroed before.
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes a writable region. `data` is as in [`Device::read`].
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno>;

    /// Sets interrupts up, masks or raises them.
    fn set_irqs(&mut self, set: SetIrqs) -> Result<(), Errno>;

    /// Lends memory. EEXIST if some of it is lent already.
    fn map(&mut self, map: DmaMap) -> Result<(), Errno>;

    /// Takes memory back, and gives how many bytes that were. When it returns, nobody may use them any more.
    fn unmap(&mut self, unmap: DmaUnmap) -> Result<u64, Errno>;

    /// Resets the device. Memory and interrupts stay set up.
    fn reset(&mut self) -> Result<(), Errno>;
}
