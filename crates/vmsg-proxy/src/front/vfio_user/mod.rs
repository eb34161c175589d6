// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whole PCI functions for VMMs that speak vfio-user.
