// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Consoles of guests: which there are, and one terminal for all of them.

mod registry;

pub(crate) use registry::Registry;
