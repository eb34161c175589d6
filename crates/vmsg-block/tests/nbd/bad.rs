// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that say what they must not, or nothing.
