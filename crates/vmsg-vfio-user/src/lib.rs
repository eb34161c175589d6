// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server side of vfio-user: a PCI device for a VMM, served from another process over a Unix socket.
//!
//! The client is a VMM: QEMU (`vfio-user-pci`, since 10.1) or cloud-hypervisor (`--user-device`). The protocol is that of QEMU's docs/interop/vfio-user.rst; its structures and numbers
//! are those of `<linux/vfio.h>`. What is served is a [`Device`]; a [`Connection`] serves it to one client over a socket that the caller has accepted; a [`Dma`] reads and writes memory of the
//! client that came without a descriptor.
//!
//! ```no_run
//! # fn serve(device: &mut dyn vmsg_vfio_user::Device) -> std::io::Result<()> {
//! use rustix::event::{PollFd, PollFlags, poll};
//! use vmsg_vfio_user::{Connection, Options};
//!
//! let listener = std::os::unix::net::UnixListener::bind("/run/device.sock")?;
//! loop {
//!     let mut connection = Connection::new(listener.accept()?.0, Options::default())?;
//!     let end = loop {
//!         match connection.turn(device, 64) {
//!             Ok(turn) if turn.more => {}
//!             Ok(_) => {
//!                 let interest = connection.interest();
//!                 let mut flags = PollFlags::empty();
//!                 flags.set(PollFlags::IN, interest.read);
//!                 flags.set(PollFlags::OUT, interest.write);
//!                 poll(&mut [PollFd::new(&connection, flags)], None)?;
//!             }
//!             Err(end) => break end,
//!         }
//!     };
//!     eprintln!("client gone: {end}");
//! }
//! # }
//! ```
//!
//! What the client sends is not trusted. Whatever it sends, nothing here panics, waits for it, or allocates more than a few MiB. Each command is answered unless it asks for no reply; one that
//! is malformed is answered with an error and leaves its successors intact. Only a header that cannot be one ends the connection.
//!
//! QEMU aborts when its server goes away. A panic in a [`Device`] is therefore caught, answered with an error and told in [`Turn::panics`] (not where panics abort the process).
#![forbid(unsafe_code)]

mod capabilities;
mod connection;
mod device;
mod dma;
mod machine;
mod receiver;
mod shared;
mod socket;
mod wire;

pub use capabilities::Negotiated;
pub use connection::{Connection, Counters, End, Interest, Options, Turn};
pub use device::{
    Device, DeviceInfo, DmaMap, DmaUnmap, IrqAction, IrqData, IrqInfo, MapArea, Region, RegionMap,
    SetIrqs,
};
pub use dma::Dma;
pub use rustix::io::Errno;
pub use shared::DmaError;
pub use wire::HeaderError;
