// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PCI function, in a guest.
