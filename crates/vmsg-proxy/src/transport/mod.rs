// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers of a virtio device, over whatever stands behind them.
//!
//! * [`Backend`]: what stands behind: [`Direct`], a session to which the guest's memory is lent, or one that copies.
//! * [`Core`]: the registers of modern virtio (1.3 §4.1.4.3 and §4.2.2 have the same ones), each once.
//! * [`mmio::Mmio`] and [`pci::Function`]: where these registers lie, and how interrupts get to the driver.
//!
//! The driver is not trusted: it may access any byte in any width at any time. What no register is made of reads as 0 and ignores
//! writes; a write that covers only a part of a register is ignored; an access that covers several does them in ascending order.

mod backend;
mod core;
mod direct;
pub mod mmio;
pub mod pci;
mod registers;
mod shared;
mod trigger;

pub use self::core::{Core, Options};
pub use backend::Backend;
pub use direct::Direct;
pub use shared::SharedMemory;
pub use trigger::TriggerError;
